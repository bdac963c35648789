//! From a document and a context to an answer. Pure but for the serializer.

use super::{document::Document, request::EvaluationContext};
use crate::{fleet::set_metadata::FlagMetadata, kubernetes::meta::cut};
use flags::{Attribute, EvaluationError, Flag, Inputs};
use serde::Serialize;
use serde_json::Value;
use std::io::{self, Write};

/// Longest key that an error repeats, in bytes.
const MAX_SHOWN_KEY: usize = 256;

/// One flag, evaluated.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum Evaluated<'a> {
    /// It has an answer, which may be the caller's own default: then there is no value.
    Success(Success<'a>),
    /// It has none.
    Failure(Failure<'a>),
}

/// A flag that has an answer.
#[derive(Debug, Serialize)]
pub struct Success<'a> {
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a Value>,
    reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    variant: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<FlagMetadata<'a>>,
}

/// A call, or a flag, that has no answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    error_code: &'static str,
    /// Always there: providers rely on it.
    error_details: String,
}

impl<'a> Failure<'a> {
    /// A call that failed, over one flag or over all.
    pub fn new(key: Option<&'a str>, error_code: &'static str, error_details: String) -> Self {
        Self { key, error_code, error_details }
    }

    /// Its code.
    pub const fn code(&self) -> &'static str {
        self.error_code
    }

    /// A flag that is not there.
    pub fn not_found(key: &'a str, scope: &str) -> Self {
        let key = cut(key, MAX_SHOWN_KEY);
        Self::new(Some(key), "FLAG_NOT_FOUND", format!("there is no flag {key} in {scope}"))
    }
}

/// All flags, evaluated.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bulk<'a> {
    flags: Vec<Evaluated<'a>>,
    /// Where changes are told.
    #[serde(skip_serializing_if = "Option::is_none")]
    event_streams: Option<[EventStream<'a>; 1]>,
}

/// A stream of changes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct EventStream<'a> {
    r#type: &'static str,
    endpoint: Endpoint<'a>,
    inactivity_delay_sec: u32,
}

/// Without an origin: it is that of the base URL, which a proxy may have made another.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint<'a> {
    request_uri: &'a str,
}

/// A client that is not looked at for so long, such as a page in the background, ends its stream until then.
const INACTIVITY_SECONDS: u32 = 120;

impl<'a> Bulk<'a> {
    /// How many flags there are.
    pub const fn len(&self) -> usize {
        self.flags.len()
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.flags.is_empty()
    }

    /// With the path and query of its stream of changes.
    #[must_use]
    pub fn with_stream(mut self, request_uri: Option<&'a str>) -> Self {
        let stream = |request_uri| EventStream {
            r#type: "sse",
            endpoint: Endpoint { request_uri },
            inactivity_delay_sec: INACTIVITY_SECONDS,
        };
        self.event_streams = request_uri.map(|request_uri| [stream(request_uri)]);
        self
    }
}

impl<'a> Success<'a> {
    /// Its variant, and why it has that.
    pub const fn result(&self) -> (Option<&'a str>, &'static str) {
        (self.variant, self.reason)
    }
}

/// The evaluation of all flags took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the evaluation of all flags took too long: ask for single flags, or for those of a workload")]
pub struct OutOfTime;

/// Largest answer, in bytes.
pub const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;

/// The answer is too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the answer has more than {MAX_ANSWER_BYTES} bytes: ask for single flags, or for those of a workload")]
pub struct LargeAnswer;

/// The JSON of an answer, if it is not too large.
pub fn spell(answer: &impl Serialize) -> Result<Vec<u8>, LargeAnswer> {
    let mut bounded = Bounded(Vec::new());
    // There is nothing in an answer that has no spelling.
    serde_json::to_writer(&mut bounded, answer).map_err(|_| LargeAnswer)?;
    Ok(bounded.0)
}

/// Takes no more than an answer may have.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, part: &[u8]) -> io::Result<usize> {
        if self.0.len() + part.len() > MAX_ANSWER_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Evaluates one flag; `None`: there is no such flag.
pub fn single<'a>(
    document: &'a Document,
    key: &'a str,
    context: &EvaluationContext,
    now_ms: i64,
) -> Option<Evaluated<'a>> {
    let flag = document.flags.find(key)?;
    Some(evaluate(document, key, flag, context, &context.attributes(), now_ms))
}

/// Evaluates all flags, by key, as long as there is time.
pub fn bulk<'a>(
    document: &'a Document,
    context: &EvaluationContext,
    now_ms: i64,
    mut is_out_of_time: impl FnMut() -> bool,
) -> Result<Bulk<'a>, OutOfTime> {
    let attributes = context.attributes();
    let mut flags = Vec::with_capacity(document.section.settings.flags.len());
    for key in document.section.settings.flags.keys() {
        if is_out_of_time() {
            return Err(OutOfTime);
        }
        let Some(flag) = document.flags.find(key) else { continue };
        flags.push(evaluate(document, key, flag, context, &attributes, now_ms));
    }
    Ok(Bulk { flags, event_streams: None })
}

fn evaluate<'a>(
    document: &'a Document,
    key: &'a str,
    flag: &'a Flag,
    context: &EvaluationContext,
    attributes: &[(&str, Attribute<'_>)],
    now_ms: i64,
) -> Evaluated<'a> {
    let inputs = Inputs { context: context.with(attributes), degraded_variant: None };
    match flag.resolve(key, &inputs, || now_ms) {
        Ok(resolution) => Evaluated::Success(Success {
            key,
            value: resolution.value,
            reason: resolution.reason.as_str(),
            variant: resolution.variant,
            metadata: document.metadata(key),
        }),
        Err(error) => {
            let code = match &error {
                EvaluationError::Rule(_) => "PARSE_ERROR",
                EvaluationError::UnknownVariant(_) => "GENERAL",
            };
            Evaluated::Failure(Failure::new(
                Some(key),
                code,
                format!("the targeting rule has no usable answer: {error}"),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::degradations::Degradations;
    use serde_json::json;

    fn document() -> Document {
        let flag = |variants: Value, more: Value| {
            let mut flag = json!({"state": "ENABLED", "variants": variants});
            for (name, value) in more.as_object().unwrap() {
                flag[name] = value.clone();
            }
            flag
        };
        let on_off = || json!({"on": true, "off": false});
        let match_at = json!({"if": [{"==": [{"var": "country"}, "AT"]}, "on"]});
        let set = json!({
            "metadata": {"namespace": "n", "name": "s", "uid": "u", "generation": 1},
            "spec": {
                "flagSpec": {
                    "metadata": {"team": "sales", "nested": {"is": "dropped"}},
                    "flags": {
                        "bool": flag(on_off(), json!({"defaultVariant": "on", "metadata": {"owner": "ann", "team": "x"}})),
                        "text": flag(json!({"a": "A"}), json!({"defaultVariant": "a"})),
                        "whole": flag(json!({"a": 7}), json!({"defaultVariant": "a"})),
                        "float": flag(json!({"a": 1.0, "b": 2.5}), json!({"defaultVariant": "a"})),
                        "object": flag(json!({"a": {"x": [1]}}), json!({"defaultVariant": "a"})),
                        "disabled": flag(on_off(), json!({"defaultVariant": "on", "state": "DISABLED"})),
                        "no-default": flag(on_off(), json!({})),
                        "targeted": flag(on_off(), json!({"defaultVariant": "off", "targeting": match_at})),
                        "split": flag(on_off(), json!({"defaultVariant": "off", "targeting": {"fractional": [["on", 1]]}})),
                        "nobody": flag(on_off(), json!({"targeting": {"cat": ["no", {"var": "country"}]}})),
                        "number": flag(on_off(), json!({"targeting": {"+": [1, {"var": "n"}]}})),
                        "killed": flag(on_off(), json!({"defaultVariant": "on"})),
                    },
                },
                "overrides": [{"key": "killed", "variant": "off", "until": "1970-01-01T00:00:01Z"}],
            },
        });
        Document::of_namespace(
            &[std::sync::Arc::new(serde_json::from_str(&set.to_string()).unwrap())],
            &Degradations::new(),
            None,
        )
    }

    fn context(context: &Value) -> EvaluationContext {
        EvaluationContext::parse(json!({ "context": context }).to_string().as_bytes()).unwrap()
    }

    fn asked(key: &str, about: &Value, now_ms: i64) -> Value {
        let document = document();
        let mut answer = json!(single(&document, key, &context(about), now_ms).unwrap());
        answer.as_object_mut().unwrap().remove("metadata");
        answer
    }

    #[rstest::rstest]
    #[case("bool", json!({}), json!({"key": "bool", "value": true, "reason": "STATIC", "variant": "on"}))]
    #[case("text", json!({}), json!({"key": "text", "value": "A", "reason": "STATIC", "variant": "a"}))]
    #[case("whole", json!({}), json!({"key": "whole", "value": 7, "reason": "STATIC", "variant": "a"}))]
    #[case("float", json!({}), json!({"key": "float", "value": 1.0, "reason": "STATIC", "variant": "a"}))]
    #[case("object", json!({}), json!({"key": "object", "value": {"x": [1]}, "reason": "STATIC", "variant": "a"}))]
    #[case("disabled", json!({}), json!({"key": "disabled", "reason": "DISABLED"}))]
    #[case("no-default", json!({}), json!({"key": "no-default", "reason": "DEFAULT"}))]
    #[case::a_match("targeted", json!({"country": "AT"}),
        json!({"key": "targeted", "value": true, "reason": "TARGETING_MATCH", "variant": "on"}))]
    #[case::no_match("targeted", json!({"country": "DE"}),
        json!({"key": "targeted", "value": false, "reason": "DEFAULT", "variant": "off"}))]
    #[case::a_bucket("split", json!({"targetingKey": "u"}),
        json!({"key": "split", "value": true, "reason": "TARGETING_MATCH", "variant": "on"}))]
    #[case::no_bucket_without_a_targeting_key("split", json!({}),
        json!({"key": "split", "value": false, "reason": "DEFAULT", "variant": "off"}))]
    #[case::an_unknown_variant("nobody", json!({"country": "body"}), json!({"key": "nobody", "errorCode": "GENERAL",
        "errorDetails": "the targeting rule has no usable answer: nobody is not among the variants"}))]
    #[case::no_name("number", json!({"n": 1}), json!({"key": "number", "errorCode": "PARSE_ERROR",
        "errorDetails": "the targeting rule has no usable answer: the rule answers with a number, which names no variant; it must be a text, true, false or null"}))]
    fn answers(#[case] key: &str, #[case] about: Value, #[case] expected: Value) {
        assert_eq!(asked(key, &about, 5_000), expected);
    }

    #[test]
    fn an_override_holds_until_its_end() {
        let value = |now_ms| asked("killed", &json!({}), now_ms)["value"].clone();
        assert_eq!((value(999), value(1_000)), (json!(false), json!(true)));
    }

    #[test]
    fn a_float_is_spelled_as_one() {
        let (document, context) = (document(), context(&json!({})));
        let text = serde_json::to_string(&single(&document, "float", &context, 0).unwrap()).unwrap();
        assert!(text.contains("\"value\":1.0,"), "{text}");
    }

    #[test]
    fn metadata_are_those_of_the_flag_above_those_of_the_set() {
        let (document, context) = (document(), context(&json!({})));
        let answer = json!(single(&document, "bool", &context, 0).unwrap());
        assert_eq!(answer["metadata"], json!({"team": "x", "owner": "ann", "flagSetId": "n/s"}));
        let answer = json!(single(&document, "text", &context, 0).unwrap());
        assert_eq!(answer["metadata"], json!({"team": "sales", "flagSetId": "n/s"}), "only plain values");
    }

    #[test]
    fn all_flags_are_answered_by_key_as_one_by_one() {
        let (document, context) = (document(), context(&json!({"country": "AT", "targetingKey": "u"})));
        let all = json!(bulk(&document, &context, 0, || false).unwrap());
        let flags = all["flags"].as_array().unwrap();
        assert_eq!(flags.len(), 12);
        for flag in flags {
            let key = flag["key"].as_str().unwrap();
            assert_eq!(*flag, json!(single(&document, key, &context, 0).unwrap()));
        }
        assert!(flags.windows(2).all(|two| two[0]["key"].as_str() < two[1]["key"].as_str()));
    }

    #[test]
    fn the_stream_of_changes_is_named_as_the_protocol_has_it() {
        let (document, context) = (document(), context(&json!({})));
        let bulk = || bulk(&document, &context, 0, || false).unwrap();
        let expected = json!([{"type": "sse", "endpoint": {"requestUri": "/a?b=c"}, "inactivityDelaySec": 120}]);
        assert_eq!(json!(bulk().with_stream(Some("/a?b=c")))["eventStreams"], expected);
        assert!(json!(bulk().with_stream(None)).get("eventStreams").is_none());
    }

    #[test]
    fn what_takes_too_long_ends() {
        let mut left = 3;
        let mut out_of_time = || {
            left -= 1;
            left < 0
        };
        assert_eq!(bulk(&document(), &context(&json!({})), 0, &mut out_of_time).unwrap_err(), OutOfTime);
    }

    #[test]
    fn an_answer_that_is_too_large_is_none() {
        let text = |bytes: usize| json!("x".repeat(bytes - 2));
        assert_eq!(spell(&text(MAX_ANSWER_BYTES)).map(|answer| answer.len()), Ok(MAX_ANSWER_BYTES));
        assert_eq!(spell(&text(MAX_ANSWER_BYTES + 1)), Err(LargeAnswer));
    }

    #[test]
    fn an_unknown_flag_is_not_found_and_a_long_key_is_cut() {
        assert!(single(&document(), "absent", &context(&json!({})), 0).is_none());
        let long = "x".repeat(10_000);
        let answer = serde_json::to_string(&Failure::not_found(&long, "namespace n")).unwrap();
        assert!(answer.contains("FLAG_NOT_FOUND") && answer.contains("errorDetails") && answer.len() < 1_000);
    }
}
