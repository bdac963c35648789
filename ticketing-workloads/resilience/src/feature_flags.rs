//! Feature flags as the operator sent them: the live settings behind [`flags::FlagSet`].

mod details;
mod misreads;
mod unread;
mod value;

pub use details::{AnswerReason, Details, ErrorCode};
pub use value::{FlagValue, ValueType};

use crate::clock;
use crate::sync::lock;
use arc_swap::ArcSwap;
use contract::FlagsSettings;
use contract::flag_problem::{FlagProblem, FlagProblemKind, MAX_FLAG_PROBLEM_BYTES, MAX_FLAG_PROBLEMS};
use flags::{Context, Flag, FlagSet, Inputs, Resolution};
use misreads::Misreads;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use unread::Known;

/// The flags of the workload.
#[derive(Default)]
pub struct Flags {
    compiled: ArcSwap<FlagSet>,
    /// Variants that hold while the workload is degraded; empty while it is not.
    degraded: ArcSwap<BTreeMap<String, String>>,
    /// Whether there are any, so that evaluations do not look in vain.
    is_degraded: AtomicBool,
    /// The load of the stage that the workload is in, in percent.
    stage_load: AtomicU32,
    /// Flags whose rule had no usable answer since the last configuration: each is logged once.
    logged: Mutex<BTreeSet<String>>,
    misreads: Misreads,
    known: Known,
}

/// Most log lines about rules of one configuration.
const MAX_LOGGED: usize = MAX_FLAG_PROBLEMS;

impl Flags {
    pub(crate) fn configure(&self, settings: FlagsSettings) {
        let compiled = FlagSet::compile(settings);
        let before = self.compiled.load();
        self.known.configured(&before, &compiled, Instant::now());
        // Once, and not again for as long as the mistake stays the same.
        let is_new = |key: &str, error| before.find(key).and_then(Flag::rule_error) != Some(error);
        let broken = compiled.iter().filter_map(|(key, flag)| flag.rule_error().map(|error| (key, error)));
        let mut broken = broken.filter(|(key, error)| is_new(key, error));
        for (key, error) in broken.by_ref().take(MAX_LOGGED) {
            tracing::warn!(flag = %key, %error, "invalid targeting rule; the default variant applies");
        }
        let more = broken.count();
        if more > 0 {
            tracing::warn!(
                flags = more,
                "more flags have invalid targeting rules; the default variant applies to each"
            );
        }
        drop(before);
        let compiled = Arc::new(compiled);
        self.compiled.store(Arc::clone(&compiled));
        lock(&self.logged).clear();
        self.misreads.configured(&compiled, &self.degraded.load(), clock::now_ms());
    }

    /// Variants that hold while the workload is degraded, and the load of the stage that it is in, in percent.
    pub(crate) fn set_degraded(&self, variants: BTreeMap<String, String>, stage_load: u32) {
        let any = !variants.is_empty();
        self.stage_load.store(stage_load, Ordering::Relaxed);
        self.degraded.store(Arc::new(variants));
        self.is_degraded.store(any, Ordering::Release);
    }

    /// What is wrong with flags at `now_ms` (milliseconds since the Unix epoch): rules that cannot be used, and values of
    /// another type than the code has asked for. At most [`MAX_FLAG_PROBLEMS`] of each kind.
    pub fn problems(&self, now_ms: i64) -> Vec<FlagProblem> {
        let compiled = self.compiled.load();
        let broken = compiled.iter().filter_map(|(key, flag)| {
            let message = format!("the default variant is used, because the rule cannot be: {}", flag.rule_error()?);
            Some(FlagProblem { key: key.to_owned(), kind: FlagProblemKind::InvalidRule, message })
        });
        let misread = self.misreads.problems(&compiled, &self.degraded.load(), now_ms);
        let mut problems: Vec<_> = broken.take(MAX_FLAG_PROBLEMS).chain(misread.into_values()).collect();
        problems.retain(|problem| problem.key.len() <= MAX_FLAG_PROBLEM_BYTES);
        for FlagProblem { message, .. } in &mut problems {
            message.truncate(message.floor_char_boundary(MAX_FLAG_PROBLEM_BYTES));
        }
        problems
    }

    /// Flags that no code has read since this process started, and that it has had for an hour by `now`; by key, at most
    /// [`MAX_FLAG_PROBLEMS`].
    pub fn unread(&self, now: Instant) -> Vec<String> {
        self.known.unread(&self.compiled.load(), now)
    }

    /// The value of `key` at `now_ms` (milliseconds since the Unix epoch), when nothing is known about the request;
    /// `None`: the caller's own default.
    pub fn value_at(&self, key: &str, now_ms: i64) -> Option<Value> {
        self.resolve(key, &Context::EMPTY, || now_ms, |resolved| resolved.ok()?.value.cloned()).flatten()
    }

    /// A flag that is on or off, when nothing is known about the request.
    pub fn bool(&self, key: &str, default: bool) -> bool {
        self.bool_for(key, default, &Context::EMPTY)
    }

    /// A flag that is a whole number, when nothing is known about the request; `20.0` is one, too.
    pub fn integer(&self, key: &str, default: i64) -> i64 {
        self.integer_for(key, default, &Context::EMPTY)
    }

    /// A flag that is any number, when nothing is known about the request.
    pub fn float(&self, key: &str, default: f64) -> f64 {
        self.float_for(key, default, &Context::EMPTY)
    }

    /// A flag that is a text, when nothing is known about the request.
    pub fn string(&self, key: &str, default: &str) -> String {
        self.string_for(key, default, &Context::EMPTY)
    }

    /// A flag that is a JSON object, when nothing is known about the request.
    pub fn object(&self, key: &str, default: Map<String, Value>) -> Map<String, Value> {
        self.object_for(key, default, &Context::EMPTY)
    }

    /// A flag that is on or off for `context`.
    pub fn bool_for(&self, key: &str, default: bool, context: &Context<'_>) -> bool {
        self.read(key, context).unwrap_or(default)
    }

    /// A flag that is a whole number for `context`; `20.0` is one, too.
    pub fn integer_for(&self, key: &str, default: i64, context: &Context<'_>) -> i64 {
        self.read(key, context).unwrap_or(default)
    }

    /// A flag that is any number for `context`.
    pub fn float_for(&self, key: &str, default: f64, context: &Context<'_>) -> f64 {
        self.read(key, context).unwrap_or(default)
    }

    /// A flag that is a text for `context`.
    pub fn string_for(&self, key: &str, default: &str, context: &Context<'_>) -> String {
        self.read(key, context).unwrap_or_else(|| default.to_owned())
    }

    /// A flag that is a JSON object for `context`.
    pub fn object_for(&self, key: &str, default: Map<String, Value>, context: &Context<'_>) -> Map<String, Value> {
        self.read(key, context).unwrap_or(default)
    }

    /// A flag of any type for `context`, with the variant that it is of, and the reason, as OpenFeature has it.
    ///
    /// ```
    /// use contract::WorkloadId;
    /// use resilience::{Resilience, feature_flags::{Details, ErrorCode}};
    ///
    /// let workload = Resilience::builder(WorkloadId::deployment("ticketing", "booking")).build();
    /// let Details { value, variant, reason } = workload.flags().details("Discount", 0.5, &flags::Context::EMPTY);
    /// assert_eq!((value, variant), (0.5, None));
    /// assert_eq!((reason.as_str(), reason.error()), ("ERROR", Some(ErrorCode::FlagNotFound)));
    /// ```
    pub fn details<T: FlagValue>(&self, key: &str, default: T, context: &Context<'_>) -> Details<T> {
        let answer = self.resolve(key, context, clock::now_ms, |resolved| match resolved {
            Err(_) => Err(ErrorCode::General),
            Ok(Resolution { value: None, reason, .. }) => Ok((None, reason)),
            Ok(Resolution { value: Some(value), variant, reason }) => match T::read(value) {
                Some(value) => Ok((Some((value, variant.map(str::to_owned))), reason)),
                None => Err(self.misread::<T>(key, variant, value)),
            },
        });
        match answer.unwrap_or(Err(ErrorCode::FlagNotFound)) {
            Ok((Some((value, variant)), reason)) => Details { value, variant, reason: AnswerReason::Resolved(reason) },
            Ok((None, reason)) => Details { value: default, variant: None, reason: AnswerReason::Resolved(reason) },
            Err(code) => Details { value: default, variant: None, reason: AnswerReason::Error(code) },
        }
    }

    /// The value of `key`; `None`: the caller's own default.
    #[inline]
    fn read<T: FlagValue>(&self, key: &str, context: &Context<'_>) -> Option<T> {
        self.resolve(key, context, clock::now_ms, |resolved| {
            let Resolution { variant, value, .. } = resolved.ok()?;
            let value = value?;
            let read = T::read(value);
            if read.is_none() {
                self.misread::<T>(key, variant, value);
            }
            read
        })
        .flatten()
    }

    /// What `take` makes of what `key` resolves to; `None`: there is no such flag. The clock is read only by flags that depend on
    /// it.
    #[inline]
    fn resolve<T>(
        &self,
        key: &str,
        context: &Context<'_>,
        now_ms: impl Fn() -> i64,
        take: impl FnOnce(Result<Resolution<'_>, NoAnswer>) -> T,
    ) -> Option<T> {
        let compiled = self.compiled.load();
        let flag = compiled.find(key)?;
        flag.note_read();
        let is_degraded = self.is_degraded.load(Ordering::Acquire);
        Some(match flag.fixed().filter(|_| !is_degraded) {
            // The way that most go, with as little as possible around it.
            Some(fixed) => take(Ok(fixed)),
            None => self.decide(flag, key, context, is_degraded, now_ms, take),
        })
    }

    #[inline(never)]
    fn decide<T>(
        &self,
        flag: &Flag,
        key: &str,
        context: &Context<'_>,
        is_degraded: bool,
        now_ms: impl Fn() -> i64,
        take: impl FnOnce(Result<Resolution<'_>, NoAnswer>) -> T,
    ) -> T {
        let degraded = is_degraded.then(|| self.degraded.load());
        let own = degraded.as_ref().and_then(|variants| variants.get(key));
        // The higher stage has the say: a pod that has less to do than the others does what they do.
        let own = own.filter(|_| !flag.is_degraded_beyond(self.stage_load.load(Ordering::Relaxed), &now_ms));
        let degraded_variant = own.map(String::as_str);
        match flag.resolve(key, &Inputs { context: *context, degraded_variant }, now_ms) {
            Ok(resolution) => take(Ok(resolution)),
            Err(error) => {
                self.log_once(key, &error);
                take(Err(NoAnswer))
            }
        }
    }

    #[cold]
    fn misread<T: FlagValue>(&self, key: &str, variant: Option<&str>, value: &Value) -> ErrorCode {
        self.misreads.note(key, T::TYPE, variant.unwrap_or_default(), value);
        ErrorCode::TypeMismatch
    }

    #[cold]
    fn log_once(&self, key: &str, error: &dyn Display) {
        if lock(&self.logged).insert(key.to_owned()) {
            tracing::warn!(flag = %key, %error, "the targeting rule has no usable answer; the caller's default applies");
        }
    }
}

/// A rule had no usable answer, and that is logged.
struct NoAnswer;

#[cfg(test)]
mod tests {
    use super::*;
    use contract::flag_problem::UNREAD_AFTER_MS;
    use flags::Attribute;
    use serde_json::json;
    use std::time::Duration;

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
        plain.set_degraded(degraded.clone(), 80);
        assert!(!plain.bool("Pdf", true));
        assert_eq!(plain.integer("Limit", 1), 100, "a variant that does not exist changes nothing");
        plain.set_degraded(BTreeMap::new(), 0);
        assert!(plain.bool("Pdf", false));

        let overridden = flags(&json!({"variant": "on", "untilMs": 1_000}));
        overridden.set_degraded(degraded, 80);
        assert_eq!(overridden.value_at("Pdf", 999), Some(json!(true)));
        assert_eq!(overridden.value_at("Pdf", 1_000), Some(json!(false)), "the override is over");
    }

    #[rstest::rstest]
    #[case::the_fleet_alone(None, 999, json!("fleet"))]
    #[case::the_pod_in_a_lower_stage(Some(79), 999, json!("fleet"))]
    #[case::the_pod_in_the_same_stage(Some(80), 999, json!("pod"))]
    #[case::the_pod_in_a_higher_stage(Some(95), 999, json!("pod"))]
    #[case::the_operator_is_dead(None, 1_000, json!("normal"))]
    #[case::the_operator_is_dead_and_the_pod_decides(Some(79), 1_000, json!("pod"))]
    fn of_the_pod_and_its_fleet_the_higher_stage_has_the_say(
        #[case] own: Option<u32>,
        #[case] now_ms: i64,
        #[case] expected: Value,
    ) {
        let flags = configured(&json!({"Mode": {
            "state": "ENABLED", "defaultVariant": "n", "variants": {"n": "normal", "p": "pod", "f": "fleet"},
            "degraded": {"variant": "f", "untilMs": 1_000, "by": "booking", "loadPercent": 80},
        }}));
        let variants = own.map(|_| BTreeMap::from([("Mode".to_owned(), "p".to_owned())]));
        flags.set_degraded(variants.unwrap_or_default(), own.unwrap_or_default());
        assert_eq!(flags.value_at("Mode", now_ms), Some(expected));
    }

    fn configured(documents: &Value) -> Flags {
        let flags = Flags::default();
        flags.configure(serde_json::from_value(json!({ "flags": documents })).unwrap());
        flags
    }

    /// A flag whose variants are `on` and `off`, and `on` without a rule.
    fn flag(on: &Value, off: &Value) -> Value {
        json!({"state": "ENABLED", "variants": {"on": on, "off": off}, "defaultVariant": "on"})
    }

    #[test]
    fn numbers_and_objects_with_and_without_a_context() {
        let mut rate = flag(&json!(1), &json!(0.25));
        rate["targeting"] = json!({"if": [{"==": [{"var": "country"}, "AT"]}, "off"]});
        let mut style = flag(&json!({"color": "red"}), &json!({"color": "blue", "size": [1, 2]}));
        style["targeting"] = rate["targeting"].clone();
        let flags = configured(&json!({"Rate": rate, "Style": style}));
        let attributes = [("country", Attribute::Text("AT"))];
        let context = Context::new(&attributes);
        let object = |value: Value| value.as_object().unwrap().clone();

        assert_eq!((flags.float("Rate", 9.5), flags.float_for("Rate", 9.5, &context)), (1.0, 0.25));
        assert_eq!((flags.integer("Rate", 9), flags.integer_for("Rate", 9, &context)), (1, 9), "a fraction is lost");
        assert_eq!(flags.object("Style", Map::new()), object(json!({"color": "red"})));
        assert_eq!(flags.object_for("Style", Map::new(), &context), object(json!({"color": "blue", "size": [1, 2]})));
        assert_eq!(flags.object("Rate", object(json!({"own": 1}))), object(json!({"own": 1})));
        assert_eq!((flags.float("Missing", 9.5), flags.object("Missing", Map::new())), (9.5, Map::new()));
    }

    #[rstest::rstest]
    #[case::no_rule("Plain", "off", true, Some("on"), "STATIC", None)]
    #[case::the_rule("Ruled", "AT", false, Some("off"), "TARGETING_MATCH", None)]
    #[case::the_rule_chooses_none("Ruled", "DE", true, Some("on"), "DEFAULT", None)]
    #[case::a_rule_without_a_usable_answer("Ruled", "nowhere", false, None, "ERROR", Some("GENERAL"))]
    #[case::disabled("Disabled", "AT", false, None, "DISABLED", None)]
    #[case::no_default_variant("Open", "AT", false, None, "DEFAULT", None)]
    #[case::another_type("Text", "AT", false, None, "ERROR", Some("TYPE_MISMATCH"))]
    #[case::no_such_flag("Missing", "AT", false, None, "ERROR", Some("FLAG_NOT_FOUND"))]
    fn details_have_openfeatures_reasons(
        #[case] key: &str,
        #[case] country: &str,
        #[case] value: bool,
        #[case] variant: Option<&str>,
        #[case] reason: &str,
        #[case] error: Option<&str>,
    ) {
        let plain = flag(&json!(true), &json!(false));
        let with = |name: &str, member: Value| {
            let mut flag = plain.clone();
            flag[name] = member;
            flag
        };
        let place = json!({"var": "country"});
        let rule = json!({"if": [{"==": [place, "AT"]}, "off", {"==": [place, "nowhere"]}, "absent"]});
        let flags = configured(&json!({
            "Plain": plain, "Ruled": with("targeting", rule), "Disabled": with("state", json!("DISABLED")),
            "Open": with("defaultVariant", Value::Null), "Text": flag(&json!("true"), &json!("false")),
        }));
        let attributes = [("country", Attribute::Text(country))];
        let details = flags.details(key, false, &Context::new(&attributes));
        assert_eq!((details.value, details.variant.as_deref()), (value, variant));
        assert_eq!((details.reason.as_str(), details.reason.error().map(ErrorCode::as_str)), (reason, error));
    }

    fn problems(flags: &Flags) -> Vec<String> {
        flags.problems(NOW).into_iter().map(|one| format!("{}: {}", one.key, one.message)).collect()
    }

    const NOW: i64 = 1_000;

    #[test]
    fn a_value_of_another_type_is_reported_until_a_document_makes_it_right() {
        let texts = flag(&json!("true"), &json!("false"));
        let flags = configured(&json!({"Pdf": texts, "Other": texts}));
        assert!(flags.bool("Pdf", true) && !flags.bool("Pdf", false), "the default of the code");
        assert_eq!(flags.string("Other", ""), "true");
        let told = ["Pdf: code reads a boolean, the variant on is a string; the code's default is used"];
        assert_eq!(problems(&flags), told, "once, and only what code reads wrongly");

        // Another document that is no better. It is known before anybody reads the flag again.
        flags.configure(serde_json::from_value(json!({"flags": {"Pdf": texts}})).unwrap());
        assert_eq!(problems(&flags), told);
        flags.configure(serde_json::from_value(json!({"flags": {"Pdf": flag(&json!(true), &json!(false))}})).unwrap());
        assert_eq!(problems(&flags), [""; 0]);
        assert!(flags.bool("Pdf", false));
    }

    /// What is wrong with one variant alone is wrong for as long as that one holds.
    #[test]
    fn a_wrong_variant_is_reported_while_it_holds() {
        let mut mixed = flag(&json!(true), &json!("no"));
        mixed["override"] = json!({"variant": "off", "untilMs": clock::now_ms() + 60_000});
        let flags = configured(&json!({"Pdf": mixed}));
        assert!(flags.bool("Pdf", true));
        assert_eq!(problems(&flags).len(), 1);
        assert_eq!(flags.problems(clock::now_ms() + 60_000), [], "the override is over");

        let mut ruled = flag(&json!(true), &json!("no"));
        ruled["targeting"] = json!({"if": [{"==": [{"var": "country"}, "AT"]}, "off"]});
        flags.configure(serde_json::from_value(json!({"flags": {"Pdf": ruled}})).unwrap());
        assert!(flags.bool("Pdf", false), "right without a context");
        assert_eq!(problems(&flags).len(), 1, "the variant is still wrong, for some requests");
        flags.configure(serde_json::from_value(json!({"flags": {"Pdf": flag(&json!(true), &json!(false))}})).unwrap());
        assert_eq!(problems(&flags), [""; 0]);

        flags.set_degraded(BTreeMap::from([("Pdf".to_owned(), "off".to_owned())]), 80);
        flags.configure(serde_json::from_value(json!({"flags": {"Pdf": flag(&json!(true), &json!("no"))}})).unwrap());
        assert!(flags.bool("Pdf", true));
        assert_eq!(problems(&flags).len(), 1);
        flags.set_degraded(BTreeMap::new(), 0);
        assert_eq!(problems(&flags), [""; 0], "the degraded mode is over");
    }

    /// What is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_misread_flag_is_logged_once_for_each_document() {
        use tracing_subscriber::util::SubscriberInitExt;
        let texts = || json!({"Pdf": flag(&json!("true"), &json!("false"))});
        let misread = |flags: &Flags| (0..5).for_each(|_| assert!(flags.bool("Pdf", true)));
        // Another test may be the first one to come by this line, without anybody who reads it, and say just then that nobody does.
        misread(&configured(&texts()));
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone());
        let _guard = subscriber.finish().set_default();
        let flags = configured(&texts());
        misread(&flags);
        let lines = || {
            let text = String::from_utf8(lock(&log.0).clone()).unwrap();
            text.lines().filter(|line| line.contains("flag=Pdf variant=on wanted=\"a boolean\"")).count()
        };
        assert_eq!(lines(), 1);
        flags.configure(serde_json::from_value(json!({ "flags": texts() })).unwrap());
        misread(&flags);
        assert_eq!(lines(), 2);
    }

    #[test]
    fn reports_of_flags_are_bounded() {
        let mut all = Map::new();
        for nth in 0..100 {
            let mut broken = flag(&json!(true), &json!(false));
            broken["targeting"] = json!({ "ß".repeat(300): nth });
            all.insert(format!("Broken{nth}"), broken);
            all.insert(format!("Text{nth}"), flag(&json!("x".repeat(10_000)), &json!("")));
        }
        let flags = configured(&Value::Object(all));
        for nth in 0..100 {
            assert!(!flags.bool(&format!("Text{nth}"), false));
        }
        let problems = flags.problems(NOW);
        let of = |kind| problems.iter().filter(|one| one.kind == kind).count();
        assert_eq!(of(FlagProblemKind::InvalidRule), MAX_FLAG_PROBLEMS);
        assert_eq!(of(FlagProblemKind::TypeMismatch), MAX_FLAG_PROBLEMS);
        assert!(problems.iter().all(|one| one.message.len() <= MAX_FLAG_PROBLEM_BYTES));
    }

    #[test]
    fn a_rule_that_does_not_compile_is_reported_with_its_place() {
        let mut broken = flag(&json!(true), &json!(false));
        broken["targeting"] = json!({"if": [{"iff": [true]}, "off"]});
        let flags = configured(&json!({"Pdf": broken, "Other": flag(&json!(true), &json!(false))}));
        let problems = flags.problems(NOW);
        assert_eq!((problems.len(), problems[0].kind), (1, FlagProblemKind::InvalidRule));
        let message = &problems[0].message;
        assert!(message.contains("cannot be: targeting.if[0].iff: iff is not an operator"), "{message}");
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

    #[test]
    fn a_flag_that_nobody_reads_is_told_after_an_hour() {
        let (one, hour) = (flag(&json!(true), &json!(false)), Duration::from_millis(UNREAD_AFTER_MS));
        let flags = configured(&json!({"Read": one, "Unread": one, "Told": one}));
        let later = Instant::now() + hour;
        assert!(flags.bool("Read", false));
        assert_eq!(flags.unread(Instant::now()), [] as [&str; 0], "it may still come");
        assert_eq!(flags.unread(later), ["Told", "Unread"]);
        assert_eq!(flags.details("Told", false, &Context::EMPTY).variant.as_deref(), Some("on"));
        assert_eq!(flags.unread(later), ["Unread"]);

        let again = json!({ "flags": {"Read": flag(&json!(1), &json!(2)), "Unread": one, "New": one} });
        flags.configure(serde_json::from_value(again).unwrap());
        assert_eq!(flags.unread(later), ["Unread"], "what was read stays so, and what is new has its hour before it");
        assert_eq!(flags.unread(later + hour), ["New", "Unread"]);
    }

    #[test]
    fn few_unread_flags_are_told() {
        let all: Map<_, _> = (0..200).map(|nth| (format!("{nth:03}"), flag(&json!(1), &json!(2)))).collect();
        let flags = configured(&Value::Object(all));
        assert_eq!(flags.unread(Instant::now() + Duration::from_millis(UNREAD_AFTER_MS)).len(), MAX_FLAG_PROBLEMS);
    }
}
