//! From a path to what is asked for. Pure.

use http::Method;
use percent_encoding::percent_decode_str;

/// What a path asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The namespace.
    pub namespace: String,
    /// The workload; none: all flags of the namespace.
    pub workload: Option<String>,
    /// What is asked about their flags.
    pub call: Call,
}

/// What is asked about the flags of a scope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// The evaluation of one flag, by its key.
    Single(String),
    /// The evaluation of all flags.
    Bulk,
    /// The stream of changes.
    Events,
    /// All flags as a document of flagd.
    Document,
}

/// What the path of the stream of changes ends with.
pub const EVENTS: &str = "ofrep/v1/events";
/// What the path of the document of flagd ends with. flagd goes by the end of the name.
const DOCUMENT: &str = "flagd.json";

impl Route {
    /// Reads a path, as it was sent. A slash at its end changes nothing; a key may hold slashes, escaped or not.
    pub fn parse(path: &str) -> Option<Self> {
        let path = path.strip_prefix('/')?;
        let path = path.strip_suffix('/').unwrap_or(path).strip_prefix("namespaces/")?;
        let (namespace, mut rest) = path.split_once('/')?;
        let mut workload = None;
        if let Some(path) = rest.strip_prefix("workloads/") {
            let (found, path) = path.split_once('/')?;
            (workload, rest) = (Some(name(found)?), path);
        }
        Some(Self { namespace: name(namespace)?, workload, call: Call::parse(rest)? })
    }

    /// The path of the base URL.
    pub fn base(&self) -> String {
        let Self { namespace, workload, .. } = self;
        workload.as_ref().map_or_else(
            || format!("/namespaces/{namespace}"),
            |workload| format!("/namespaces/{namespace}/workloads/{workload}"),
        )
    }
}

impl Call {
    fn parse(path: &str) -> Option<Self> {
        match path {
            EVENTS => return Some(Self::Events),
            DOCUMENT => return Some(Self::Document),
            _ => {}
        }
        match path.strip_prefix("ofrep/v1/evaluate/flags")? {
            "" => Some(Self::Bulk),
            key => {
                let key = percent_decode_str(key.strip_prefix('/')?).decode_utf8().ok()?;
                (!key.is_empty()).then(|| Self::Single(key.into_owned()))
            }
        }
    }

    /// The key of the flag, if one is asked for.
    pub fn key(&self) -> Option<&str> {
        if let Self::Single(key) = self { Some(key) } else { None }
    }

    /// The label of the metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Single(_) => "single",
            Self::Bulk => "bulk",
            Self::Events => "events",
            Self::Document => "document",
        }
    }

    /// The method that it is asked with, and those that a caller is told of.
    pub const fn method(&self) -> (Method, &'static str) {
        match self {
            Self::Single(_) | Self::Bulk => (Method::POST, "POST, OPTIONS"),
            Self::Events | Self::Document => (Method::GET, "GET, OPTIONS"),
        }
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
        assert_eq!((route.namespace.as_str(), route.workload.as_deref(), route.call.key()), ("n", workload, key));
        assert_eq!(route.call == Call::Bulk, key.is_none());
    }

    #[rstest::rstest]
    #[case("/namespaces/n/ofrep/v1/events", None, Call::Events)]
    #[case("/namespaces/n/workloads/w/ofrep/v1/events/", Some("w"), Call::Events)]
    #[case("/namespaces/n/flagd.json", None, Call::Document)]
    #[case("/namespaces/n/workloads/w.x/flagd.json", Some("w.x"), Call::Document)]
    fn what_is_got(#[case] path: &str, #[case] workload: Option<&str>, #[case] call: Call) {
        let route = Route::parse(path).unwrap();
        assert_eq!((route.workload.as_deref(), &route.call), (workload, &call));
        assert_eq!(call.method().0, Method::GET);
        assert!(path.starts_with(&format!("{}/", route.base())) && route.base().ends_with(workload.unwrap_or("n")));
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
    #[case("/namespaces/n/ofrep/v1/evaluate/flagsx")]
    #[case("/namespaces/n/ofrep/v1/events/x")]
    #[case("/namespaces/n/x/flagd.json")]
    #[case("/namespaces/n/workloads/w")]
    #[case::no_utf8("/namespaces/n/ofrep/v1/evaluate/flags/%FF")]
    fn other_paths_are_none(#[case] path: &str) {
        assert_eq!(Route::parse(path), None);
    }
}
