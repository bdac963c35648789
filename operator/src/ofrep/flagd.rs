//! Which version of its flags a scope has, and its document of flagd.

use super::{
    answer::{LargeAnswer, MAX_ANSWER_BYTES},
    document::Document,
    etag,
    flagd_document::{self, Snapshot},
};

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

/// The document at `now_ms`, and its version, which `document` knows from then on.
pub fn write(document: &Document, now_ms: i64) -> Result<(Vec<u8>, Version), Unwritable> {
    let Snapshot { text, changes_at_ms } =
        flagd_document::at(document, now_ms, MAX_ANSWER_BYTES).map_err(|_| LargeAnswer)?;
    let version = Version { tag: etag::of(text.as_bytes()), until_ms: changes_at_ms };
    document.note_version(version.clone());
    Ok((text.into_bytes(), version))
}

#[cfg(test)]
mod tests {
    use super::*;
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
