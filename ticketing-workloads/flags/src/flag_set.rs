//! The flags of a workload, compiled once and evaluated for each request.

use crate::Context;
use crate::by_key::ByKey;
use crate::resolution::{Reason, Resolution};
use crate::targeting::{self, Evaluators, Request, Rule, RuleError};
use crate::variants::Variants;
use contract::{FlagDegradation, FlagOverride, FlagSettings, FlagState, FlagsSettings};
use serde_json::Value;
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// All flags of a configuration, ready to be evaluated.
#[derive(Debug, Default)]
pub struct FlagSet {
    flags: ByKey<Flag>,
}

impl FlagSet {
    /// Compiles every targeting rule. A rule that does not compile costs only its own flag the targeting: its default
    /// variant applies ([`Flag::rule_error`]).
    pub fn compile(settings: FlagsSettings) -> Self {
        let FlagsSettings { flags, evaluators } = settings;
        let evaluators = Evaluators::compile_leniently(&evaluators);
        let compiled =
            flags.into_iter().map(|(key, settings)| (key, Flag::compile(Arc::unwrap_or_clone(settings), &evaluators)));
        Self { flags: compiled.collect() }
    }

    /// The flag of that key, if it is in the set.
    #[inline]
    pub fn find(&self, key: &str) -> Option<&Flag> {
        self.flags.find(key)
    }

    /// All flags with their keys, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Flag)> {
        self.flags.iter()
    }
}

/// A flag, ready to be evaluated.
#[derive(Debug)]
pub struct Flag {
    state: FlagState,
    variants: Variants,
    /// The default variant, if it is one of them and the flag is not disabled, and its value.
    default: Option<(Box<str>, Value)>,
    /// A person's override.
    kill_switch: Option<FlagOverride>,
    /// Why the default holds for every request, at any time, as long as the workload is not degraded; `None`: there is more
    /// to look at.
    fixed: Option<Reason>,
    rule: Option<Rule>,
    rule_error: Option<RuleError>,
    /// What the degradation of a fleet says of it, perhaps of another time.
    degraded: Option<FlagDegradation>,
    /// Whether somebody noted that code has asked for it. It is here so that to look at it costs nothing where the flag is looked at.
    is_read: AtomicBool,
}

/// What an evaluation depends on besides the flag and the time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inputs<'a> {
    /// What is known about the request.
    pub context: Context<'a>,
    /// The variant that the flag has while the workload is degraded; `None`: the workload is not degraded, or degradation
    /// leaves this flag alone. A variant that the flag does not have is ignored.
    pub degraded_variant: Option<&'a str>,
}

/// Why a targeting rule has no usable answer for a request. The caller's own default is safer than any guess.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvaluationError {
    /// The rule failed.
    #[error(transparent)]
    Rule(#[from] targeting::EvaluationError),
    /// The rule answered with a variant that the flag does not have.
    #[error("{0} is not among the variants")]
    UnknownVariant(String),
}

impl Flag {
    /// Compiles one flag, whose rule may refer to `evaluators`.
    pub fn compile(settings: FlagSettings, evaluators: &Evaluators) -> Self {
        // Taken apart as a whole, so that a new member cannot be forgotten.
        let FlagSettings { state, variants, default_variant, targeting, kill_switch, degraded } = settings;
        let rule = targeting.map_or(Ok(None), |rule| Rule::compile(&rule, evaluators));
        let (rule, rule_error) = rule.map_or_else(|error| (None, Some(error)), |rule| (rule, None));
        let is_enabled = state == FlagState::Enabled;
        let default = default_variant.filter(|_| is_enabled).and_then(|name| {
            let value = variants.get(&name)?.clone();
            Some((name.into_boxed_str(), value))
        });
        let variants = Variants::from(variants);
        let is_read = AtomicBool::new(false);
        let mut flag = Self { state, variants, default, kill_switch, degraded, fixed: None, rule, rule_error, is_read };
        // Whatever else decides, for a time or for some requests, belongs to this condition.
        if flag.kill_switch.is_none() && flag.degraded.is_none() {
            flag.fixed = flag.by_definition().ok().map(|resolution| resolution.reason);
        }
        flag
    }

    /// Notes that code has asked for it.
    #[inline]
    pub fn note_read(&self) {
        // Written once: a line that is only read is in the cache of every core.
        if !self.is_read() {
            self.is_read.store(true, Ordering::Relaxed);
        }
    }

    /// Whether code has asked for it, as far as it was noted.
    #[inline]
    pub fn is_read(&self) -> bool {
        self.is_read.load(Ordering::Relaxed)
    }

    /// Whether at `now_ms` (milliseconds since the Unix epoch) a fleet is in a stage of a higher load than this, in percent, and
    /// says which variant holds.
    pub fn is_degraded_beyond(&self, load_percent: u32, now_ms: impl Fn() -> i64) -> bool {
        let is_beyond = |degraded: &FlagDegradation| degraded.load_percent > load_percent;
        self.degraded.as_ref().is_some_and(is_beyond) && self.by_fleet(now_ms).is_some()
    }

    /// What a degraded fleet says, if it says something that the flag has.
    fn by_fleet(&self, now_ms: impl Fn() -> i64) -> Option<Resolution<'_>> {
        let degraded = self.degraded.as_ref()?;
        if degraded.is_active(now_ms()) { self.by_variant(&degraded.variant) } else { None }
    }

    fn by_variant(&self, variant: &str) -> Option<Resolution<'_>> {
        let (variant, value) = self.variants.get_key_value(variant)?;
        Some(Resolution { variant: Some(variant), value: Some(value), reason: Reason::Static })
    }

    /// Why the targeting rule is ignored, if it is.
    pub fn rule_error(&self) -> Option<&RuleError> {
        self.rule_error.as_ref()
    }

    /// The value of this flag, whose key is `key`; `None`: the caller's own default. See [`Flag::resolve`].
    #[inline]
    pub fn evaluate<'a>(
        &'a self,
        key: &str,
        inputs: &Inputs<'_>,
        now_ms: impl Fn() -> i64,
    ) -> Result<Option<&'a Value>, EvaluationError> {
        self.resolve(key, inputs, now_ms).map(|resolution| resolution.value)
    }

    /// What this flag, whose key is `key`, resolves to.
    ///
    /// Precedence: a person's override while it lasts, then degradation (what the caller says in [`Inputs::degraded_variant`], then
    /// what a fleet says), then the definition (state, targeting rule, default variant). `now_ms` (milliseconds since the Unix epoch) is asked only by flags that depend on the time.
    #[inline]
    pub fn resolve<'a>(
        &'a self,
        key: &str,
        inputs: &Inputs<'_>,
        now_ms: impl Fn() -> i64,
    ) -> Result<Resolution<'a>, EvaluationError> {
        match self.settled(inputs.degraded_variant, &now_ms) {
            Ok(settled) => Ok(settled),
            Err(rule) => self.target(rule, key, inputs.context, now_ms),
        }
    }

    /// What this flag resolves to for every request, at any time, as long as the workload is not degraded; `None`: there is more to
    /// look at.
    #[inline]
    pub fn fixed(&self) -> Option<Resolution<'_>> {
        self.fixed.map(|reason| Resolution { reason, ..self.by_default() })
    }

    /// What this flag resolves to for every request; `None`: its rule decides for each.
    pub fn for_every_request(&self, degraded_variant: Option<&str>, now_ms: i64) -> Option<Resolution<'_>> {
        self.settled(degraded_variant, &|| now_ms).ok()
    }

    /// The value of the variant of that name, if the flag has it.
    pub fn variant(&self, name: &str) -> Option<&Value> {
        self.variants.get(name)
    }

    /// The same as [`Flag::for_every_request`]; the error is the rule that decides.
    #[inline]
    fn settled(&self, degraded_variant: Option<&str>, now_ms: &impl Fn() -> i64) -> Result<Resolution<'_>, &Rule> {
        if degraded_variant.is_none()
            && let Some(fixed) = self.fixed()
        {
            return Ok(fixed);
        }
        if let Some(over) = &self.kill_switch
            && over.is_active(now_ms())
        {
            let (variant, value) = self.variants.get_key_value(&over.variant).unzip();
            return Ok(Resolution { variant, value, reason: Reason::Static });
        }
        let by_degradation = degraded_variant.and_then(|variant| self.by_variant(variant));
        if let Some(by_degradation) = by_degradation.or_else(|| self.by_fleet(now_ms)) {
            return Ok(by_degradation);
        }
        self.by_definition()
    }

    /// What the definition says by itself: state, rule, default variant.
    #[inline]
    fn by_definition(&self) -> Result<Resolution<'_>, &Rule> {
        let reason = match &self.rule {
            _ if self.state != FlagState::Enabled => Reason::Disabled,
            Some(rule) => return Err(rule),
            None if self.default.is_none() || self.rule_error.is_some() => Reason::Default,
            None => Reason::Static,
        };
        Ok(Resolution { reason, ..self.by_default() })
    }

    #[inline]
    fn by_default(&self) -> Resolution<'_> {
        let (variant, value) = self.default.as_ref().map(|(variant, value)| (&**variant, value)).unzip();
        Resolution { variant, value, reason: Reason::Default }
    }

    fn target(
        &self,
        rule: &Rule,
        key: &str,
        context: Context<'_>,
        now_ms: impl Fn() -> i64,
    ) -> Result<Resolution<'_>, EvaluationError> {
        let now_ms = if rule.uses_time() { now_ms() } else { 0 };
        match rule.evaluate(&Request { flag_key: key, now_ms, context })? {
            None => Ok(self.by_default()),
            Some(variant) => match self.variants.get_key_value(&variant) {
                Some((variant, value)) => {
                    Ok(Resolution { variant: Some(variant), value: Some(value), reason: Reason::TargetingMatch })
                }
                None => Err(EvaluationError::UnknownVariant(variant.into_owned())),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attribute;
    use serde_json::json;

    /// One flag, `Limit`, with this targeting rule and these members in place of the usual ones.
    fn limit(targeting: &Value, members: &Value) -> FlagSet {
        let mut flag = json!({
            "state": "ENABLED", "defaultVariant": "none", "targeting": targeting,
            "variants": {"none": 0, "some": 10, "all": 100, "true": 1, "false": 2},
        });
        members.as_object().unwrap().iter().for_each(|(name, value)| flag[name] = value.clone());
        let settings = json!({
            "flags": {"Limit": flag},
            "evaluators": {"isVip": {"ends_with": [{"var": "email"}, "@vip.example"]}},
        });
        FlagSet::compile(serde_json::from_value(settings).unwrap())
    }

    fn at(set: &FlagSet, now_ms: i64, degraded_variant: Option<&str>) -> Result<Option<Value>, EvaluationError> {
        let attributes = [("email", Attribute::Text("a@vip.example")), ("country", Attribute::Text("AT"))];
        let inputs = Inputs { context: Context::new(&attributes).with_key("k"), degraded_variant };
        set.find("Limit").unwrap().evaluate("Limit", &inputs, || now_ms).map(Option::<&Value>::cloned)
    }

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
    #[case::a_rule_that_does_not_compile(json!({"iff": [true, "all"]}), 0)]
    #[case::an_unknown_shared_rule(json!({"$ref": "nobody"}), 0)]
    fn targeting(#[case] rule: Value, #[case] expected: i64) {
        let set = limit(&rule, &json!({}));
        assert_eq!(at(&set, 1_800_000_000_000, None), Ok(Some(json!(expected))));
    }

    #[test]
    fn a_rule_without_a_usable_answer_is_an_error_and_one_that_does_not_compile_is_known() {
        let unknown = limit(&json!({"cat": ["no", "body"]}), &json!({}));
        assert_eq!(at(&unknown, 0, None), Err(EvaluationError::UnknownVariant("nobody".into())));
        let number = limit(&json!({"+": [1, 2]}), &json!({}));
        assert!(matches!(at(&number, 0, None), Err(EvaluationError::Rule(_))));
        let broken = limit(&json!({"iff": [true, "all"]}), &json!({}));
        assert!(broken.find("Limit").unwrap().rule_error().is_some());
        assert_eq!(broken.iter().map(|(key, _)| key).collect::<Vec<_>>(), ["Limit"]);
    }

    const OVERRIDE: &str = r#"{"override": {"variant": "none", "untilMs": 1000}}"#;
    const DISABLED: &str = r#"{"state": "DISABLED"}"#;
    const FLEET: &str = r#"{"degraded": {"variant": "none", "untilMs": 1000, "by": "booking", "loadPercent": 80}}"#;
    const FLEET_AND_PERSON: &str = r#"{"degraded": {"variant": "none", "untilMs": 2000, "by": "booking", "loadPercent": 80},
                                       "override": {"variant": "all", "untilMs": 1000}}"#;

    #[rstest::rstest]
    #[case::targeting("{}", 0, None, Some(100))]
    #[case::degradation_beats_targeting("{}", 0, Some("some"), Some(10))]
    #[case::an_unknown_degraded_variant_is_ignored("{}", 0, Some("absent"), Some(100))]
    #[case::an_override_beats_degradation(OVERRIDE, 999, Some("some"), Some(0))]
    #[case::an_override_that_is_over(OVERRIDE, 1_000, Some("some"), Some(10))]
    #[case::an_override_that_is_over_and_not_degraded(OVERRIDE, 1_000, None, Some(100))]
    #[case::disabled(DISABLED, 0, None, None)]
    #[case::degradation_beats_disabled(DISABLED, 0, Some("some"), Some(10))]
    #[case::no_default_variant(r#"{"defaultVariant": null, "targeting": null}"#, 0, None, None)]
    #[case::the_fleet_beats_targeting(FLEET, 999, None, Some(0))]
    #[case::the_fleet_is_not_degraded_any_more(FLEET, 1_000, None, Some(100))]
    #[case::the_callers_word_beats_the_fleet(FLEET, 999, Some("some"), Some(10))]
    #[case::the_fleet_where_the_caller_says_nothing_of_use(FLEET, 999, Some("absent"), Some(0))]
    #[case::a_person_beats_the_fleet(FLEET_AND_PERSON, 999, None, Some(100))]
    #[case::the_fleet_when_the_person_is_done(FLEET_AND_PERSON, 1_000, None, Some(0))]
    #[case::a_variant_that_the_flag_does_not_have(
        r#"{"degraded": {"variant": "absent", "untilMs": 1000, "by": "booking"}}"#,
        999,
        None,
        Some(100)
    )]
    fn precedence(
        #[case] members: &str,
        #[case] now_ms: i64,
        #[case] degraded: Option<&str>,
        #[case] expected: Option<i64>,
    ) {
        let set = limit(&json!({"if": [true, "all"]}), &serde_json::from_str(members).unwrap());
        assert_eq!(at(&set, now_ms, degraded), Ok(expected.map(|value| json!(value))));
    }

    #[rstest::rstest]
    #[case::no_rule("{}", r#"{"targeting": null}"#, None, "STATIC", Some("none"))]
    #[case::the_rule(r#"{"if": [true, "all"]}"#, "{}", None, "TARGETING_MATCH", Some("all"))]
    #[case::the_rule_chooses_none(r#"{"if": [false, "all"]}"#, "{}", None, "DEFAULT", Some("none"))]
    #[case::a_rule_that_does_not_compile(r#"{"iff": [true, "all"]}"#, "{}", None, "DEFAULT", Some("none"))]
    #[case::no_default_variant("{}", r#"{"defaultVariant": null}"#, None, "DEFAULT", None)]
    #[case::a_default_variant_that_is_not_there("{}", r#"{"defaultVariant": "absent"}"#, None, "DEFAULT", None)]
    #[case::disabled(r#"{"if": [true, "all"]}"#, DISABLED, None, "DISABLED", None)]
    #[case::overridden(r#"{"if": [true, "all"]}"#, OVERRIDE, None, "STATIC", Some("none"))]
    #[case::the_fleet_is_degraded(r#"{"if": [true, "all"]}"#, FLEET, None, "STATIC", Some("none"))]
    #[case::degraded(r#"{"if": [true, "all"]}"#, "{}", Some("some"), "STATIC", Some("some"))]
    fn reasons(
        #[case] rule: &str,
        #[case] members: &str,
        #[case] degraded_variant: Option<&str>,
        #[case] reason: &str,
        #[case] variant: Option<&str>,
    ) {
        let set = limit(&serde_json::from_str(rule).unwrap(), &serde_json::from_str(members).unwrap());
        let flag = set.find("Limit").unwrap();
        let inputs = Inputs { degraded_variant, ..Inputs::default() };
        let resolution = flag.resolve("Limit", &inputs, || 0).unwrap();
        assert_eq!((resolution.reason.as_str(), resolution.variant), (reason, variant));
        assert_eq!(resolution.value, variant.and_then(|variant| flag.variant(variant)));
        let is_by_rule = rule.contains("\"if\"") && reason != "STATIC" && reason != "DISABLED";
        let settled = flag.for_every_request(degraded_variant, 0);
        assert_eq!(settled, (!is_by_rule).then_some(resolution), "what no request decides is known without one");
    }

    #[rstest::rstest]
    #[case::a_higher_stage(79, 999, true)]
    #[case::the_same_stage(80, 999, false)]
    #[case::it_is_over(79, 1_000, false)]
    fn the_stage_of_a_fleet_is_known(#[case] own: u32, #[case] now_ms: i64, #[case] expected: bool) {
        let set = limit(&json!({}), &serde_json::from_str(FLEET).unwrap());
        assert_eq!(set.find("Limit").unwrap().is_degraded_beyond(own, || now_ms), expected);
    }

    #[test]
    fn a_flag_is_found_among_many() {
        let one = |nth| json!({"state": "ENABLED", "variants": {"it": nth}, "defaultVariant": "it"});
        let all: serde_json::Map<_, _> = (0..500).map(|nth| (format!("flag-{nth}"), one(nth))).collect();
        let set = FlagSet::compile(serde_json::from_value(json!({ "flags": all })).unwrap());
        let value = |key: &str| set.find(key)?.evaluate(key, &Inputs::default(), || 0).unwrap()?.as_i64();
        assert!((0..500).all(|nth| value(&format!("flag-{nth}")) == Some(nth)));
        assert_eq!((value("flag-500"), value("")), (None, None));
    }
}
