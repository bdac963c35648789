//! The flags of a scope as a document of flagd: what a flagd, or an SDK that evaluates in its own process, has to read to answer what
//! we answer. Which set has a key, and what a person has put over it, is worked in. Pure but for the serializer.

use super::{
    answer::{LargeAnswer, spell},
    document::{Document, FlagMetadata},
    etag,
};
use contract::{FlagSettings, FlagState};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// Where the schema of such documents is.
const SCHEMA: &str = "https://flagd.dev/schema/v0/flags.json";

/// Why there is no document: it is too large.
pub type Unwritable = LargeAnswer;

/// Which version of its flags a scope has: a hash of the whole document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// As an entity tag, in quotes.
    pub tag: String,
    /// When the next override ends, in milliseconds since the Unix epoch, and with it this version.
    pub until_ms: Option<i64>,
}

impl Version {
    /// Whether it still is the version at `now_ms`.
    pub fn holds_at(&self, now_ms: i64) -> bool {
        self.until_ms.is_none_or(|until| now_ms < until)
    }
}

#[derive(Serialize)]
struct FlagdDocument<'a> {
    #[serde(rename = "$schema")]
    schema: &'static str,
    flags: BTreeMap<&'a str, FlagdFlag<'a>>,
    #[serde(rename = "$evaluators", skip_serializing_if = "BTreeMap::is_empty")]
    evaluators: &'a BTreeMap<String, Value>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct FlagdFlag<'a> {
    state: FlagState,
    variants: &'a BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_variant: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    targeting: Option<&'a Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<FlagMetadata<'a>>,
}

/// The document at `now_ms`, and its version, which `document` knows from then on.
pub fn write(document: &Document, now_ms: i64) -> Result<(Vec<u8>, Version), Unwritable> {
    let settings = &document.section.settings;
    let flag = |(key, flag)| (String::as_str(key), flagd_flag(document, key, flag, now_ms));
    let flags = settings.flags.iter().map(flag).collect();
    let bytes = spell(&FlagdDocument { schema: SCHEMA, flags, evaluators: &settings.evaluators })?;
    let ends = settings.flags.values().filter_map(|flag| flag.active_override(now_ms)?.until_ms);
    let version = Version { tag: etag::of(&bytes), until_ms: ends.min() };
    document.note_version(version.clone());
    Ok((bytes, version))
}

fn flagd_flag<'a>(document: &'a Document, key: &str, flag: &'a FlagSettings, now_ms: i64) -> FlagdFlag<'a> {
    let metadata = document.metadata(key);
    if let Some(over) = flag.active_override(now_ms) {
        // A person's word stands above the state and the rule.
        let default_variant = Some(over.variant.as_str()).filter(|name| flag.variants.contains_key(*name));
        return FlagdFlag {
            state: FlagState::Enabled,
            variants: &flag.variants,
            default_variant,
            targeting: None,
            metadata,
        };
    }
    // A rule that we cannot use is left out: the default variant holds, as it does here.
    let is_usable = document.flags.find(key).is_some_and(|compiled| compiled.rule_error().is_none());
    FlagdFlag {
        state: if flag.state == FlagState::Enabled { FlagState::Enabled } else { FlagState::Disabled },
        variants: &flag.variants,
        default_variant: flag.default_variant.as_deref(),
        targeting: flag.targeting.as_ref().filter(|_| is_usable),
        metadata,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::FlagsSettings;
    use flags::{Attribute, Context, FlagSet, Inputs};
    use serde_json::json;
    use std::sync::Arc;

    fn set(name: &str, priority: i32, flags: &Value, overrides: &Value) -> Value {
        json!({
            "metadata": {"namespace": "n", "name": name, "uid": name, "generation": 1},
            "spec": {
                "priority": priority, "overrides": overrides,
                "flagSpec": {
                    "metadata": {"team": name, "nested": {"is": "dropped"}},
                    "$evaluators": {"isVip": {"ends_with": [{"var": "email"}, "@vip.example"]}},
                    "flags": flags,
                },
            },
        })
    }

    fn document() -> Document {
        let on_off = json!({"on": true, "off": false});
        let low = json!({
            "plain": {"state": "ENABLED", "variants": on_off, "defaultVariant": "on", "metadata": {"owner": "ann"}},
            "number": {"state": "ENABLED", "valueType": "float", "variants": {"a": 1, "b": 2.5}, "defaultVariant": "a"},
            "none": {"state": "ENABLED", "variants": on_off},
            "off": {"state": "DISABLED", "variants": on_off, "defaultVariant": "on"},
            "vip": {"state": "ENABLED", "variants": on_off, "defaultVariant": "off",
                "targeting": {"if": [{"$ref": "isVip"}, "on"]}},
            "killed": {"state": "DISABLED", "variants": on_off, "defaultVariant": "on",
                "targeting": {"if": [true, "on"]}},
            "shared": {"state": "ENABLED", "variants": on_off, "defaultVariant": "on"},
        });
        let high = json!({"shared": {"state": "ENABLED", "variants": on_off, "defaultVariant": "off"}});
        let killed = json!([{"key": "killed", "variant": "off", "until": "1970-01-01T00:00:02Z"}]);
        let sets = [set("low", 0, &low, &killed), set("high", 1, &high, &json!([]))];
        Document::of_namespace(&sets.map(|set| Arc::new(serde_json::from_str(&set.to_string()).unwrap())), None)
    }

    fn written(now_ms: i64) -> Value {
        serde_json::from_slice(&write(&document(), now_ms).unwrap().0).unwrap()
    }

    /// Read as flagd reads it, it has the answers that we give.
    #[test]
    fn its_reader_answers_what_we_answer() {
        let document = document();
        for now_ms in [0, 1_999, 2_000] {
            let mut read = written(now_ms);
            read["evaluators"] = read["$evaluators"].take();
            let settings: FlagsSettings = serde_json::from_value(read).unwrap();
            assert_eq!(settings.flags.len(), 7);
            assert!(settings.flags.values().all(|flag| flag.kill_switch.is_none()));
            let theirs = FlagSet::compile(settings);
            for email in ["a@vip.example", "a@example"] {
                let attributes = [("email", Attribute::Text(email))];
                let inputs = Inputs { context: Context::new(&attributes), degraded_variant: None };
                for (key, ours) in document.flags.iter() {
                    let ours = ours.resolve(key, &inputs, || now_ms);
                    assert_eq!(theirs.find(key).unwrap().resolve(key, &inputs, || now_ms), ours, "{key} at {now_ms}");
                }
            }
        }
    }

    #[test]
    fn it_has_the_shape_of_flagds_schema() {
        let written = written(0);
        let members = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(members(&written), ["$evaluators", "$schema", "flags"]);
        for (key, flag) in written["flags"].as_object().unwrap() {
            assert!(matches!(flag["state"].as_str(), Some("ENABLED" | "DISABLED")), "{key}");
            assert!(!flag["variants"].as_object().unwrap().is_empty());
            assert!(flag.get("defaultVariant").is_none_or(Value::is_string));
            assert!(flag.get("targeting").is_none_or(Value::is_object));
            let plain = |value: &Value| value.is_string() || value.is_number() || value.is_boolean();
            assert!(flag["metadata"].as_object().unwrap().values().all(plain), "{key}");
        }
        assert_eq!(written["flags"]["number"]["variants"].to_string(), r#"{"a":1.0,"b":2.5}"#);
        let metadata = json!({"owner": "ann", "team": "low", "flagSetId": "n/low"});
        assert_eq!(written["flags"]["plain"]["metadata"], metadata);
        assert_eq!(written["flags"]["shared"]["metadata"]["flagSetId"], "n/high", "who has the key");
    }

    #[test]
    fn a_version_ends_with_the_next_override() {
        let document = document();
        let first = document.version(0).unwrap();
        assert_eq!((first.until_ms, document.known_version(1_999)), (Some(2_000), Some(first.clone())));
        assert_eq!(document.known_version(2_000), None);
        let second = document.version(2_000).unwrap();
        assert_eq!(second.until_ms, None);
        assert_ne!(first.tag, second.tag);
        assert_eq!(document.known_version(i64::MAX), Some(second));
    }
}
