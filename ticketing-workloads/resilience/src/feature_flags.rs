//! Feature flags as the operator sent them: the live settings behind [`flags::FlagSet`].

use crate::clock;
use crate::sync::lock;
use arc_swap::ArcSwap;
use contract::FlagsSettings;
use flags::{Context, FlagSet, Inputs};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// The flags of the workload.
#[derive(Default)]
pub struct Flags {
    compiled: ArcSwap<FlagSet>,
    /// Variants that hold while the workload is degraded; empty while it is not.
    degraded: ArcSwap<BTreeMap<String, String>>,
    /// Whether there are any, so that evaluations do not look in vain.
    is_degraded: AtomicBool,
    /// Flags whose rule had no usable answer since the last configuration: each is logged once.
    logged: Mutex<BTreeSet<String>>,
}

impl Flags {
    pub(crate) fn configure(&self, settings: FlagsSettings) {
        let compiled = FlagSet::compile(settings);
        let before = self.compiled.load();
        for (key, flag) in compiled.iter() {
            // Once, and not again for as long as the mistake stays the same.
            if let Some(error) = flag.rule_error()
                && before.find(key).and_then(flags::Flag::rule_error) != Some(error)
            {
                tracing::warn!(flag = %key, %error, "invalid targeting rule; the default variant applies");
            }
        }
        drop(before);
        self.compiled.store(Arc::new(compiled));
        lock(&self.logged).clear();
    }

    pub(crate) fn set_degraded(&self, variants: BTreeMap<String, String>) {
        let any = !variants.is_empty();
        self.degraded.store(Arc::new(variants));
        self.is_degraded.store(any, Ordering::Release);
    }

    /// The value of `key` at `now_ms` (milliseconds since the Unix epoch), when nothing is known about the request;
    /// `None`: the caller's own default.
    pub fn value_at(&self, key: &str, now_ms: i64) -> Option<Value> {
        self.read(key, &Context::EMPTY, || now_ms, |value| Some(value.clone()))
    }

    /// A flag that is on or off, when nothing is known about the request.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.bool_for(key, default, &Context::EMPTY)
    }

    /// A flag that is a whole number, when nothing is known about the request; `20.0` is one, too.
    pub fn integer(&self, key: &str, default: i64) -> i64 {
        self.integer_for(key, default, &Context::EMPTY)
    }

    /// A flag that is a text, when nothing is known about the request.
    pub fn string(&self, key: &str, default: &str) -> String {
        self.string_for(key, default, &Context::EMPTY)
    }

    /// A flag that is on or off for `context`.
    pub fn bool_for(&self, key: &str, default: bool, context: &Context<'_>) -> bool {
        self.read(key, context, clock::now_ms, Value::as_bool).unwrap_or(default)
    }

    /// A flag that is a whole number for `context`; `20.0` is one, too.
    pub fn integer_for(&self, key: &str, default: i64, context: &Context<'_>) -> i64 {
        self.read(key, context, clock::now_ms, whole).unwrap_or(default)
    }

    /// A flag that is a text for `context`.
    pub fn string_for(&self, key: &str, default: &str, context: &Context<'_>) -> String {
        let text = self.read(key, context, clock::now_ms, |value| value.as_str().map(str::to_owned));
        text.unwrap_or_else(|| default.to_owned())
    }

    /// What `take` makes of the value of `key`. The clock is read only by flags that depend on it.
    #[inline]
    fn read<T>(
        &self,
        key: &str,
        context: &Context<'_>,
        now_ms: impl Fn() -> i64,
        take: impl FnOnce(&Value) -> Option<T>,
    ) -> Option<T> {
        let compiled = self.compiled.load();
        let flag = compiled.find(key)?;
        let degraded = self.is_degraded.load(Ordering::Acquire).then(|| self.degraded.load());
        let degraded_variant = degraded.as_ref().and_then(|variants| variants.get(key)).map(String::as_str);
        match flag.evaluate(key, &Inputs { context: *context, degraded_variant }, now_ms) {
            Ok(value) => value.and_then(take),
            Err(error) => {
                self.log_once(key, &error);
                None
            }
        }
    }

    #[cold]
    fn log_once(&self, key: &str, error: &dyn Display) {
        if lock(&self.logged).insert(key.to_owned()) {
            tracing::warn!(flag = %key, %error, "the targeting rule has no usable answer; the caller's default applies");
        }
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
    use flags::Attribute;
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

    /// A flag with this targeting rule, and evaluators.
    fn targeted(targeting: &Value, more: &Value) -> Flags {
        let flags = Flags::default();
        let mut flag = json!({
            "state": "ENABLED", "defaultVariant": "none", "targeting": targeting,
            "variants": {"none": 0, "some": 10, "all": 100.0, "true": 1, "false": 2},
        });
        more.as_object().unwrap().iter().for_each(|(name, value)| flag[name] = value.clone());
        let settings = json!({
            "flags": {"Limit": flag, "Other": {"state": "ENABLED", "variants": {"on": true}, "defaultVariant": "on"}},
            "evaluators": {"isVip": {"ends_with": [{"var": "email"}, "@vip.example"]}},
        });
        flags.configure(serde_json::from_value(settings).unwrap());
        flags
    }

    const UNSET: i64 = -1;

    #[rstest::rstest]
    #[case::a_variant(json!({"if": [{"==": [{"var": "country"}, "AT"]}, "all", "some"]}), 100)]
    #[case::the_clock(json!({"if": [{">": [{"var": "$flagd.timestamp"}, 1_700_000_000]}, "all"]}), 100)]
    #[case::a_variant_that_is_not_there(json!({"cat": ["no", "body"]}), UNSET)]
    #[case::a_rule_that_does_not_compile(json!({"iff": [true, "all"]}), 0)]
    fn targeting(#[case] rule: Value, #[case] expected: i64) {
        let flags = targeted(&rule, &json!({}));
        let attributes = [("country", Attribute::Text("AT"))];
        assert_eq!(flags.integer_for("Limit", UNSET, &Context::new(&attributes)), expected);
        assert!(flags.bool("Other", false), "another flag is not affected");
    }

    #[test]
    fn without_a_context_the_rule_is_evaluated_all_the_same() {
        let flags = targeted(&json!({"if": [{"var": "email"}, "all", "some"]}), &json!({}));
        assert_eq!(flags.integer("Limit", UNSET), 10);
        assert_eq!(flags.value_at("Limit", 0), Some(json!(10)));
    }
}
