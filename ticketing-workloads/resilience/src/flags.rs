//! Feature flags as the operator sent them. Precedence: a person's override, then degradation, then the spec: whether the
//! flag is enabled, its targeting rule, its default variant.

use crate::clock;
use arc_swap::ArcSwap;
use contract::flags::targeting::{Request, Rule, RuleError};
use contract::{FlagSettings, FlagState, FlagsSettings};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use contract::flags::{Attribute, Context};

/// The flags of the workload.
#[derive(Default)]
pub struct Flags {
    compiled: ArcSwap<Compiled>,
    /// Variants that hold while the workload is degraded; empty while it is not.
    degraded: ArcSwap<BTreeMap<String, String>>,
    /// Whether there are any, so that nobody looks in vain.
    is_degraded: AtomicBool,
}

impl Flags {
    pub(crate) fn configure(&self, settings: FlagsSettings) {
        let compiled = Compiled::new(settings, &self.compiled.load());
        self.compiled.store(Arc::new(compiled));
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
        if flag.settings.kill_switch.is_some()
            && let Some(over) = flag.settings.active_override(now_ms())
        {
            return flag.settings.variants.get(&over.variant).and_then(take);
        }
        if self.is_degraded.load(Ordering::Acquire)
            && let Some(variant) = self.degraded.load().get(key)
            && let Some(value) = flag.settings.variants.get(variant)
        {
            return take(value);
        }
        if flag.settings.state != FlagState::Enabled {
            return None;
        }
        match &flag.rule {
            None => flag.default.as_ref(),
            Some(rule) => flag.target(rule, key, context, now_ms),
        }
        .and_then(take)
    }
}

/// A configuration, ready to be asked.
#[derive(Default)]
struct Compiled {
    /// Ordered by length and then by name: most comparisons are over after the length.
    flags: Box<[(Box<str>, Flag)]>,
}

impl Compiled {
    /// Compiles every rule. One that cannot be used costs its own flag the targeting, and is told once: not again as long
    /// as `before` had the same.
    fn new(settings: FlagsSettings, before: &Self) -> Self {
        let FlagsSettings { flags, evaluators } = settings;
        let mut flags: Box<[_]> = flags
            .into_iter()
            .map(|(key, settings)| {
                let flag = Flag::new(settings, &evaluators);
                if let Some(error) = &flag.broken
                    && before.find(&key).is_none_or(|before| before.broken.as_ref() != Some(error))
                {
                    tracing::warn!(flag = %key, %error, "the targeting rule cannot be used; the default variant holds");
                }
                (key.into_boxed_str(), flag)
            })
            .collect();
        flags.sort_by(|(left, _), (right, _)| order(left, right));
        Self { flags }
    }

    #[inline]
    fn find(&self, key: &str) -> Option<&Flag> {
        let at = self.flags.binary_search_by(|(known, _)| order(known, key)).ok()?;
        self.flags.get(at).map(|(_, flag)| flag)
    }
}

#[inline]
fn order(left: &str, right: &str) -> std::cmp::Ordering {
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

/// A flag, ready to be asked.
struct Flag {
    settings: FlagSettings,
    /// The value of the default variant.
    default: Option<Value>,
    rule: Option<Rule>,
    /// Why the rule is not there.
    broken: Option<RuleError>,
    /// Whether it was told that the rule gave no answer that can be used.
    told: AtomicBool,
}

impl Flag {
    fn new(settings: FlagSettings, evaluators: &BTreeMap<String, Value>) -> Self {
        let rule = settings.targeting.as_ref().map_or(Ok(None), |rule| Rule::compile(rule, evaluators));
        let (rule, broken) = rule.map_or_else(|error| (None, Some(error)), |rule| (rule, None));
        let default = settings.default_variant.as_ref().and_then(|variant| settings.variants.get(variant)).cloned();
        Self { settings, default, rule, broken, told: AtomicBool::new(false) }
    }

    /// The value that `rule` picks. A rule that fails, or that names a variant that is not there, is a mistake: the
    /// caller's own default is safer than any guess. It is told once for each configuration.
    fn target(&self, rule: &Rule, key: &str, context: &Context<'_>, now_ms: impl Fn() -> i64) -> Option<&Value> {
        let now_ms = if rule.uses_time() { now_ms() } else { 0 };
        let tell = |mistake: &dyn std::fmt::Display| {
            if !self.told.swap(true, Ordering::Relaxed) {
                tracing::warn!(flag = %key, %mistake, "the targeting rule gave no answer; callers get their own default");
            }
        };
        match rule.evaluate(&Request { flag_key: key, now_ms, context: *context }) {
            Ok(None) => self.default.as_ref(),
            Ok(Some(variant)) => {
                let value = self.settings.variants.get(&*variant);
                if value.is_none() {
                    tell(&format_args!("{variant} is not among the variants"));
                }
                value
            }
            Err(error) => {
                tell(&error);
                None
            }
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
    #[case::a_text(json!({"if": [{"==": [{"var": "country"}, "AT"]}, "all", "some"]}), 100)]
    #[case::a_shared_rule(json!({"if": [{"$ref": "isVip"}, "all", null]}), 100)]
    #[case::yes(json!({"$ref": "isVip"}), 1)]
    #[case::no(json!({"!": {"$ref": "isVip"}}), 2)]
    #[case::null_is_the_default_variant(json!({"if": [false, "all"]}), 0)]
    #[case::no_rule(json!({}), 0)]
    #[case::flag_key(json!({"if": [{"==": [{"var": "$flagd.flagKey"}, "Limit"]}, "all"]}), 100)]
    #[case::clock(json!({"if": [{">": [{"var": "$flagd.timestamp"}, 1_700_000_000]}, "all"]}), 100)]
    #[case::targeting_key(json!({"if": [{"==": [{"var": "targetingKey"}, "k"]}, "all"]}), 100)]
    #[case::unknown_variant(json!({"cat": ["no", "body"]}), UNSET)]
    #[case::number(json!({"+": [1, 2]}), UNSET)]
    #[case::a_rule_that_does_not_compile(json!({"iff": [true, "all"]}), 0)]
    #[case::an_unknown_shared_rule(json!({"$ref": "nobody"}), 0)]
    fn targeting(#[case] rule: Value, #[case] expected: i64) {
        let flags = targeted(&rule, &json!({}));
        let attributes = [("email", Attribute::Text("a@vip.example")), ("country", Attribute::Text("AT"))];
        assert_eq!(flags.integer_for("Limit", UNSET, &Context::new(&attributes).with_key("k")), expected);
        assert!(flags.bool("Other", false), "another flag is not affected");
    }

    #[test]
    fn without_a_context_the_rule_is_evaluated_all_the_same() {
        let flags = targeted(&json!({"if": [{"var": "email"}, "all", "some"]}), &json!({}));
        assert_eq!(flags.integer("Limit", UNSET), 10);
        assert_eq!(flags.value_at("Limit", 0), Some(json!(10)));
    }

    #[test]
    fn a_person_degradation_and_disabled_stand_above_targeting() {
        let rule = json!({"if": [true, "all"]});
        let degraded = BTreeMap::from([("Limit".to_owned(), "some".to_owned())]);
        let plain = targeted(&rule, &json!({}));
        assert_eq!(plain.integer("Limit", UNSET), 100);
        plain.set_degraded(degraded.clone());
        assert_eq!(plain.integer("Limit", UNSET), 10);

        let overridden = targeted(&rule, &json!({"override": {"variant": "none", "untilMs": 1_000}}));
        overridden.set_degraded(degraded);
        assert_eq!(overridden.value_at("Limit", 999), Some(json!(0)));
        assert_eq!(overridden.value_at("Limit", 1_000), Some(json!(10)));
        overridden.set_degraded(BTreeMap::new());
        assert_eq!(overridden.value_at("Limit", 1_000), Some(json!(100.0)));

        assert_eq!(targeted(&rule, &json!({"state": "DISABLED"})).integer("Limit", UNSET), UNSET);
        assert_eq!(targeted(&json!(null), &json!({"defaultVariant": null})).integer("Limit", UNSET), UNSET);
    }

    #[test]
    fn a_flag_is_found_among_many() {
        let flags = Flags::default();
        let one = |nth| json!({"state": "ENABLED", "variants": {"it": nth}, "defaultVariant": "it"});
        let all: serde_json::Map<_, _> = (0..500).map(|nth| (format!("flag-{nth}"), one(nth))).collect();
        flags.configure(serde_json::from_value(json!({ "flags": all })).unwrap());
        assert!((0..500).all(|nth| flags.integer(&format!("flag-{nth}"), UNSET) == nth));
        assert_eq!(flags.integer("flag-500", UNSET), UNSET);
        assert_eq!(flags.integer("", UNSET), UNSET);
    }
}
