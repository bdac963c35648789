//! From a path to what is asked for. Pure.

use percent_encoding::percent_decode_str;

/// What the path of every call ends with, before the key.
const EVALUATE: [&str; 4] = ["ofrep", "v1", "evaluate", "flags"];

/// What a path asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The namespace.
    pub namespace: String,
    /// The workload; none: all flags of the namespace.
    pub workload: Option<String>,
    /// Key of the flag; none: all of them.
    pub key: Option<String>,
}

impl Route {
    /// Reads a path, as it was sent. A slash at its end changes nothing; a key may hold slashes, escaped or not.
    pub fn parse(path: &str) -> Option<Self> {
        let path = path.strip_prefix('/')?;
        let mut segments = path.strip_suffix('/').unwrap_or(path).split('/');
        let mut next = || segments.next();
        if next()? != "namespaces" {
            return None;
        }
        let namespace = name(next()?)?;
        let mut segment = next()?;
        let mut workload = None;
        if segment == "workloads" {
            workload = Some(name(next()?)?);
            segment = next()?;
        }
        for (index, expected) in EVALUATE.iter().enumerate() {
            if index > 0 {
                segment = next()?;
            }
            if segment != *expected {
                return None;
            }
        }
        let rest: Vec<_> = segments.collect();
        let key = match rest.as_slice() {
            [] => None,
            some => Some(percent_decode_str(&some.join("/")).decode_utf8().ok()?.into_owned()),
        };
        if key.as_deref() == Some("") {
            return None;
        }
        Some(Self { namespace, workload, key })
    }
}

/// The name of an object, if it can be one.
fn name(segment: &str) -> Option<String> {
    let is_valid = (1..=253).contains(&segment.len())
        && segment.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'));
    is_valid.then(|| segment.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags", None, None)]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags/", None, None)]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags/a", None, Some("a"))]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags/a/", None, Some("a"))]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags/a%2Fb%20c%2F", None, Some("a/b c/"))]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags/a/b", None, Some("a/b"))]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags/a+b", None, Some("a+b"))]
    #[case("/namespaces/n/workloads/w.x/ofrep/v1/evaluate/flags", Some("w.x"), None)]
    #[case("/namespaces/n/workloads/w/ofrep/v1/evaluate/flags/workloads", Some("w"), Some("workloads"))]
    fn paths(#[case] path: &str, #[case] workload: Option<&str>, #[case] key: Option<&str>) {
        let route = Route::parse(path).unwrap();
        assert_eq!((route.namespace.as_str(), route.workload.as_deref(), route.key.as_deref()), ("n", workload, key));
    }

    #[rstest::rstest]
    #[case("")]
    #[case("/")]
    #[case("/ofrep/v1/evaluate/flags")]
    #[case("/namespaces//ofrep/v1/evaluate/flags")]
    #[case("/namespaces/N/ofrep/v1/evaluate/flags")]
    #[case("/namespaces/n%2Fm/ofrep/v1/evaluate/flags")]
    #[case("/namespaces/n/ofrep/v1/evaluate")]
    #[case("/namespaces/n/ofrep/v2/evaluate/flags/a")]
    #[case("/namespaces/n/workloads/ofrep/v1/evaluate/flags")]
    #[case("/namespaces/n/ofrep/v1/evaluate/flags//")]
    #[case::no_utf8("/namespaces/n/ofrep/v1/evaluate/flags/%FF")]
    fn other_paths_are_none(#[case] path: &str) {
        assert_eq!(Route::parse(path), None);
    }
}
