//! How a client names the flags that it wants. Pure.
//!
//! `namespace=ticketing`, `namespace=ticketing,workload=booking`, and at the end of either, for clients that cannot send metadata,
//! `,token=TOKEN`.

use std::fmt;

/// What a client may follow: one document.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Selected {
    /// The namespace.
    pub namespace: String,
    /// The workload; none: all flags of the namespace.
    pub workload: Option<String>,
}

/// A selector, read.
#[derive(Clone, PartialEq, Eq)]
pub struct Selector {
    /// What it names.
    pub selected: Selected,
    /// The token that it carries.
    pub token: Option<String>,
}

/// Without the token.
impl fmt::Debug for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selector").field("selected", &self.selected).finish_non_exhaustive()
    }
}

/// Why a selector cannot be used. It never quotes a value, which may be a token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSelector {
    /// It names no namespace.
    #[error(
        "say which flags: selector namespace=NAMESPACE, or namespace=NAMESPACE,workload=NAME; a token stands at its end"
    )]
    NoNamespace,
    /// A part is no pair.
    #[error("part {0} of the selector is no pair such as namespace=NAMESPACE")]
    NoPair(usize),
    /// A part that means nothing here.
    #[error("part {0} of the selector means nothing here: namespace, workload and, at its end, token do")]
    Unknown(usize),
    /// The same twice.
    #[error("the selector says {0} twice")]
    Twice(&'static str),
    /// No name of an object.
    #[error(
        "the {0} of the selector is no name of Kubernetes: lower-case letters, digits, - and ., at most 253 of them"
    )]
    NoName(&'static str),
    /// An empty token.
    #[error("the token of the selector is empty")]
    NoToken,
}

/// The selector of a call: the metadata `flagd-selector` stands above the member of the message; where there is neither, a name of
/// the client that is a selector counts as one.
pub fn of_call<'a>(metadata: Option<&'a str>, selector: &'a str, provider_id: &'a str) -> &'a str {
    let said = metadata.filter(|text| !text.is_empty()).unwrap_or(selector);
    if said.is_empty() && provider_id.contains('=') { provider_id } else { said }
}

impl Selector {
    /// Reads a selector.
    pub fn parse(text: &str) -> Result<Self, InvalidSelector> {
        let (mut namespace, mut workload, mut token) = (None, None, None);
        let (mut rest, mut part) = (text.trim(), 0);
        while !rest.is_empty() {
            part += 1;
            // A token may hold commas.
            if let Some(value) = rest.strip_prefix("token=") {
                token = Some(value.trim().to_owned()).filter(|token| !token.is_empty());
                if token.is_none() {
                    return Err(InvalidSelector::NoToken);
                }
                break;
            }
            let (pair, others) = rest.split_once(',').unwrap_or((rest, ""));
            rest = others.trim_start();
            let (member, value) = pair.split_once('=').ok_or(InvalidSelector::NoPair(part))?;
            let (what, found) = match member.trim() {
                "namespace" => ("namespace", &mut namespace),
                "workload" => ("workload", &mut workload),
                _ => return Err(InvalidSelector::Unknown(part)),
            };
            if found.is_some() {
                return Err(InvalidSelector::Twice(what));
            }
            *found = Some(name(value.trim()).ok_or(InvalidSelector::NoName(what))?);
        }
        let namespace = namespace.ok_or(InvalidSelector::NoNamespace)?;
        Ok(Self { selected: Selected { namespace, workload }, token })
    }
}

/// The name of an object, if it can be one.
fn name(text: &str) -> Option<String> {
    let is_valid = (1..=253).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'));
    is_valid.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("namespace=n", None, None)]
    #[case(" namespace = n ", None, None)]
    #[case("namespace=n,workload=w.x", Some("w.x"), None)]
    #[case("workload=w, namespace=n", Some("w"), None)]
    #[case("namespace=n,token=a=b,c", None, Some("a=b,c"))]
    #[case("namespace=n,workload=w,token=abc", Some("w"), Some("abc"))]
    fn selectors(#[case] text: &str, #[case] workload: Option<&str>, #[case] token: Option<&str>) {
        let selector = Selector::parse(text).unwrap();
        assert_eq!(selector.selected.namespace, "n");
        assert_eq!((selector.selected.workload.as_deref(), selector.token.as_deref()), (workload, token));
    }

    #[rstest::rstest]
    #[case("", InvalidSelector::NoNamespace)]
    #[case("workload=w", InvalidSelector::NoNamespace)]
    #[case("token=abc,namespace=n", InvalidSelector::NoNamespace)]
    #[case("namespace=n,abc", InvalidSelector::NoPair(2))]
    #[case("flagSetId=a", InvalidSelector::Unknown(1))]
    #[case("namespace=n,namespace=m", InvalidSelector::Twice("namespace"))]
    #[case("namespace=N", InvalidSelector::NoName("namespace"))]
    #[case("namespace=n,workload=", InvalidSelector::NoName("workload"))]
    #[case("namespace=n,token=", InvalidSelector::NoToken)]
    fn what_is_wrong_with_others(#[case] text: &str, #[case] expected: InvalidSelector) {
        assert_eq!(Selector::parse(text), Err(expected));
    }

    #[test]
    fn a_token_is_not_shown() {
        let selector = Selector::parse("namespace=n,token=very-secret").unwrap();
        assert!(!format!("{selector:?}").contains("secret"));
    }

    #[rstest::rstest]
    #[case(Some("a"), "b", "c=d", "a")]
    #[case(Some(""), "b", "", "b")]
    #[case(None, "b", "c=d", "b")]
    #[case(None, "", "c=d", "c=d")]
    #[case::a_name_is_none(None, "", "sidecar-7", "")]
    fn where_a_call_says_it(
        #[case] metadata: Option<&str>,
        #[case] selector: &str,
        #[case] provider_id: &str,
        #[case] expected: &str,
    ) {
        assert_eq!(of_call(metadata, selector, provider_id), expected);
    }
}
