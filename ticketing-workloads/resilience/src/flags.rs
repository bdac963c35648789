//! Feature flags as the operator sent them. Precedence: a person's override, then degradation, then the spec.

use crate::clock;
use arc_swap::ArcSwap;
use contract::FlagsSettings;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The flags of the workload.
#[derive(Default)]
pub struct Flags {
    settings: ArcSwap<FlagsSettings>,
    /// Variants that hold while the workload is degraded; empty while it is not.
    degraded: ArcSwap<BTreeMap<String, String>>,
}

impl Flags {
    pub(crate) fn configure(&self, settings: FlagsSettings) {
        self.settings.store(Arc::new(settings));
    }

    pub(crate) fn set_degraded(&self, variants: BTreeMap<String, String>) {
        self.degraded.store(Arc::new(variants));
    }

    /// The value of `key` at `now_ms` (milliseconds since the Unix epoch); `None`: the caller's own default.
    pub fn value_at(&self, key: &str, now_ms: i64) -> Option<Value> {
        let settings = self.settings.load();
        let flag = settings.flags.get(key)?;
        if flag.active_override(now_ms).is_none()
            && let Some(variant) = self.degraded.load().get(key)
            && let Some(value) = flag.variants.get(variant)
        {
            return Some(value.clone());
        }
        flag.value(now_ms).cloned()
    }

    /// A flag that is on or off.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.value_at(key, clock::now_ms()).and_then(|value| value.as_bool()).unwrap_or(default)
    }

    /// A flag that is a whole number; `20.0` is one, too.
    pub fn integer(&self, key: &str, default: i64) -> i64 {
        self.value_at(key, clock::now_ms()).and_then(|value| whole(&value)).unwrap_or(default)
    }

    /// A flag that is a text.
    pub fn string(&self, key: &str, default: &str) -> String {
        let value = self.value_at(key, clock::now_ms());
        value.as_ref().and_then(Value::as_str).unwrap_or(default).to_owned()
    }
}

#[expect(clippy::cast_possible_truncation, reason = "guarded by the range check")]
fn whole(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| {
        let float = value.as_f64()?;
        (float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0).then_some(float as i64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn flags(over: &Value) -> Flags {
        let flags = Flags::default();
        let settings = json!({"flags": {
            "Pdf": {"state": "ENABLED", "variants": {"on": true, "off": false}, "defaultVariant": "on", "override": over},
            "Limit": {"state": "ENABLED", "variants": {"normal": 100.0, "low": 20}, "defaultVariant": "normal"},
            "Greeting": {"state": "ENABLED", "variants": {"formal": "Good evening"}, "defaultVariant": "formal"},
            "Off": {"state": "DISABLED", "variants": {"on": true}, "defaultVariant": "on"},
        }});
        flags.configure(serde_json::from_value(settings).unwrap());
        flags
    }

    #[test]
    fn values_by_type_and_the_callers_default_for_the_rest() {
        let flags = flags(&Value::Null);
        assert!(flags.bool("Pdf", false));
        assert_eq!(flags.integer("Limit", 1), 100);
        assert_eq!(flags.string("Greeting", ""), "Good evening");
        assert!(flags.bool("Off", true) && !flags.bool("Off", false), "disabled: the caller's default");
        assert_eq!(flags.integer("Missing", 7), 7);
        assert_eq!(flags.integer("Greeting", 7), 7, "another type");
    }

    #[test]
    fn a_person_beats_degradation_and_degradation_beats_the_spec() {
        let degraded =
            BTreeMap::from([("Pdf".to_owned(), "off".to_owned()), ("Limit".to_owned(), "no such".to_owned())]);
        let plain = flags(&Value::Null);
        plain.set_degraded(degraded.clone());
        assert!(!plain.bool("Pdf", true));
        assert_eq!(plain.integer("Limit", 1), 100, "a variant that does not exist changes nothing");
        plain.set_degraded(BTreeMap::new());
        assert!(plain.bool("Pdf", false));

        let overridden = flags(&json!({"variant": "on", "untilMs": 1_000}));
        overridden.set_degraded(degraded);
        assert_eq!(overridden.value_at("Pdf", 999), Some(json!(true)));
        assert_eq!(overridden.value_at("Pdf", 1_000), Some(json!(false)), "the override is over");
    }
}
