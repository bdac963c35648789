//! From the body of a call to the context that flags are evaluated for. Pure.

use flags::{Attribute, Context};
use serde_json::{Map, Value};

/// Largest body, in bytes.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// Most attributes of a context.
pub const MAX_ATTRIBUTES: usize = 256;
/// Longest targeting key, in bytes.
pub const MAX_TARGETING_KEY_BYTES: usize = 4096;

/// Why a body cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// It is no JSON object.
    #[error("the body is not a JSON object such as {{\"context\": {{\"targetingKey\": \"user-1\"}}}}: {0}")]
    Parse(String),
    /// The context is no object.
    #[error("context must be an object, found {0}")]
    NoObject(&'static str),
    /// The targeting key is no text.
    #[error("context.targetingKey must be a string, found {0}")]
    NoText(&'static str),
    /// The targeting key is too long.
    #[error("context.targetingKey has {0} bytes, more than the {MAX_TARGETING_KEY_BYTES} that are allowed")]
    LongKey(usize),
    /// Too many attributes.
    #[error(
        "context has {0} attributes, more than the {MAX_ATTRIBUTES} that are allowed: send only those that rules need"
    )]
    ManyAttributes(usize),
}

impl RequestError {
    /// The code of OpenFeature for it.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Parse(_) => "PARSE_ERROR",
            Self::NoObject(_) | Self::NoText(_) | Self::LongKey(_) | Self::ManyAttributes(_) => "INVALID_CONTEXT",
        }
    }
}

/// What the caller knows about the request that flags are evaluated for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvaluationContext {
    targeting_key: Option<String>,
    attributes: Map<String, Value>,
}

impl EvaluationContext {
    /// Reads a body. The parser follows at most 128 levels of nesting. A context that is missing or null is an empty one, and
    /// the targeting key may be missing: providers leave it out when the application gives none.
    pub fn parse(body: &[u8]) -> Result<Self, RequestError> {
        let body: Value = serde_json::from_slice(body).map_err(|error| RequestError::Parse(error.to_string()))?;
        let Value::Object(mut body) = body else {
            return Err(RequestError::Parse(format!("found {}", kind(&body))));
        };
        let mut attributes = match body.remove("context") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(context)) => context,
            Some(other) => return Err(RequestError::NoObject(kind(&other))),
        };
        let targeting_key = match attributes.remove("targetingKey") {
            None | Some(Value::Null) => None,
            Some(Value::String(key)) if key.len() > MAX_TARGETING_KEY_BYTES => {
                return Err(RequestError::LongKey(key.len()));
            }
            Some(Value::String(key)) => Some(key),
            Some(other) => return Err(RequestError::NoText(kind(&other))),
        };
        if attributes.len() > MAX_ATTRIBUTES {
            return Err(RequestError::ManyAttributes(attributes.len()));
        }
        Ok(Self { targeting_key, attributes })
    }

    /// Its attributes, borrowed.
    pub fn attributes(&self) -> Vec<(&str, Attribute<'_>)> {
        self.attributes.iter().map(|(name, value)| (name.as_str(), Attribute::Json(value))).collect()
    }

    /// The context for the evaluation with these attributes.
    pub fn with<'a>(&'a self, attributes: &'a [(&'a str, Attribute<'a>)]) -> Context<'a> {
        let context = Context::new(attributes);
        self.targeting_key.as_deref().map_or(context, |key| context.with_key(key))
    }
}

const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[rstest::rstest]
    #[case(json!({}))]
    #[case(json!({"context": null}))]
    #[case(json!({"context": {}}))]
    #[case(json!({"context": {"targetingKey": null}}))]
    #[case::other_members(json!({"context": {}, "flags": ["a"]}))]
    fn a_missing_context_or_targeting_key_is_accepted(#[case] body: Value) {
        assert_eq!(EvaluationContext::parse(body.to_string().as_bytes()), Ok(EvaluationContext::default()));
    }

    #[test]
    fn attributes_and_targeting_key_reach_the_evaluation() {
        let body = json!({"context": {"targetingKey": "u", "country": "AT", "amount": 1.0, "roles": ["a"]}});
        let context = EvaluationContext::parse(body.to_string().as_bytes()).unwrap();
        let attributes = context.attributes();
        let context = context.with(&attributes);
        assert_eq!(context.targeting_key(), Some("u"));
        assert_eq!(context.attribute("country"), Some(Attribute::Json(&json!("AT"))));
        assert_eq!(context.attribute("targetingKey"), None, "it stands apart");
    }

    fn context_with(count: usize) -> String {
        let context: Map<_, _> = (0..count).map(|number| (number.to_string(), json!(1))).collect();
        json!({ "context": context }).to_string()
    }

    fn context_with_key(bytes: usize) -> String {
        json!({"context": {"targetingKey": "x".repeat(bytes)}}).to_string()
    }

    #[rstest::rstest]
    #[case("", "PARSE_ERROR")]
    #[case("{", "PARSE_ERROR")]
    #[case("[]", "PARSE_ERROR")]
    #[case("null", "PARSE_ERROR")]
    #[case(r#"{"context": {}} more"#, "PARSE_ERROR")]
    #[case(&format!("{{\"context\": {}{}}}", "[".repeat(200), "]".repeat(200)), "PARSE_ERROR")]
    #[case(r#"{"context": []}"#, "INVALID_CONTEXT")]
    #[case(r#"{"context": {"targetingKey": 7}}"#, "INVALID_CONTEXT")]
    #[case(&context_with_key(MAX_TARGETING_KEY_BYTES + 1), "INVALID_CONTEXT")]
    #[case(&context_with(MAX_ATTRIBUTES + 1), "INVALID_CONTEXT")]
    fn what_cannot_be_used_is_refused_with_its_code(#[case] body: &str, #[case] code: &str) {
        let error = EvaluationContext::parse(body.as_bytes()).unwrap_err();
        assert_eq!(error.code(), code, "{error}");
    }

    #[test]
    fn the_bounds_themselves_are_allowed() {
        for body in [context_with(MAX_ATTRIBUTES), context_with_key(MAX_TARGETING_KEY_BYTES)] {
            assert!(EvaluationContext::parse(body.as_bytes()).is_ok());
        }
    }
}
