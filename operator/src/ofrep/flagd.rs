//! Which version of its flags a scope has, and its document of flagd.

use super::{
    answer::{LargeAnswer, MAX_ANSWER_BYTES},
    compiled::{Hash, hash_of},
    document::Document,
    etag, flagd_document,
};
use sha2::{Digest, Sha256};

/// Raised when another document, or another answer, is made from the same flags: who has the old one must not keep it.
const FORMAT: u8 = 1;

/// Why there is no document: it is too large.
pub type Unwritable = LargeAnswer;

/// Which version of its flags a scope has: a hash of all that answers, and flagd's document, are made from. It is the same on replicas
/// of one version of the operator that have the same flags, and an edit that changes no answer leaves it alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// As an entity tag, in quotes.
    pub tag: String,
    /// When the next override ends, in milliseconds since the Unix epoch, and with it this version.
    pub until_ms: Option<i64>,
}

impl Version {
    /// The version of `document` at `now_ms`. Flags that stay as they are cost little: a hash of each is known.
    pub fn of(document: &Document, now_ms: i64) -> Self {
        let settings = &document.section.settings;
        let mut hasher = Sha256::new();
        hasher.update([FORMAT]);
        hasher.update(hash_of(&settings.evaluators));
        let text = |hasher: &mut Sha256, text: &str| {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text);
        };
        for (key, flag) in &settings.flags {
            text(&mut hasher, key);
            hasher.update(document.flags.hash(key).unwrap_or(&Hash::default()));
            text(&mut hasher, flag.set_variant(now_ms).unwrap_or_default());
            if let Some(metadata) = document.metadata(key) {
                hasher.update(hash_of(&metadata));
            }
        }
        Self { tag: etag::of_hash(&hasher.finalize().into()), until_ms: flagd_document::changes_at(settings, now_ms) }
    }

    /// Whether it still is the version at `now_ms`.
    pub fn holds_at(&self, now_ms: i64) -> bool {
        self.until_ms.is_none_or(|until| now_ms < until)
    }
}

/// The document at `now_ms`.
pub fn write(document: &Document, now_ms: i64) -> Result<Vec<u8>, Unwritable> {
    flagd_document::at(document, now_ms, MAX_ANSWER_BYTES).map(String::into_bytes).map_err(|_| LargeAnswer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::degradations::Degradations;
    use contract::FlagsSettings;
    use flags::{Attribute, Context, FlagSet, Inputs};
    use serde_json::{Value, json};
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
        Document::of_namespace(
            &sets.map(|set| Arc::new(serde_json::from_str(&set.to_string()).unwrap())),
            &Degradations::new(),
            None,
        )
    }

    fn written(now_ms: i64) -> Value {
        serde_json::from_slice(&write(&document(), now_ms).unwrap()).unwrap()
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
        let first = document.version(0);
        assert_eq!((first.until_ms, document.known_version(1_999)), (Some(2_000), Some(first.clone())));
        assert_eq!(document.known_version(2_000), None);
        let second = document.version(2_000);
        assert_eq!(second.until_ms, None);
        assert_ne!(first.tag, second.tag);
        assert_eq!(document.known_version(i64::MAX), Some(second));
    }
}
