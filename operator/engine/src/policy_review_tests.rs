use super::*;
use contract::{BulkheadSettings, CircuitBreakerPolicy, CircuitBreakerSettings, TimeoutSettings};
use serde_json::json;

fn said(value: serde_json::Value) -> DependencyPolicy {
    serde_json::from_value(value).unwrap()
}

#[rstest::rstest]
#[case(json!({"timeout": {"requestMs": 15_000, "perTryMs": 20_000}}), "timeout.perTry", "must not be longer than request (15s): perTry is 20s")]
#[case(json!({"timeout": {"perTryMs": 100, "connectMs": 101}}), "timeout.connect", "must not be longer than perTry (100ms): connect is 101ms")]
#[case(json!({"timeout": {"requestMs": 100, "connectMs": 101}}), "timeout.connect", "must not be longer than request (100ms): connect is 101ms")]
#[case(json!({"retry": {"baseIntervalMs": 3_000, "maxIntervalMs": 2_000}}), "retry.backOff.baseInterval", "must not be longer than maxInterval (2s): baseInterval is 3s")]
#[case(json!({"circuitBreaker": {"breakMs": 60_000, "maxBreakMs": 30_000}}), "circuitBreaker.breakDuration", "must not be longer than maxBreakDuration (30s): breakDuration is 1m")]
#[case(json!({"timeout": {"requestMs": 5_000}, "retry": {"numRetries": 3, "baseIntervalMs": 2_000}}), "retry",
    "the waits between 3 retries are 6s together, and timeout.request is 5s, so the last retry could never start; what works: 2 retries, or a request longer than 6s")]
#[case(json!({"timeout": {"requestMs": 14_000}, "retry": {"numRetries": 3, "baseIntervalMs": 2_000, "factor": 2.0, "maxIntervalMs": 30_000}}), "retry",
    "the waits between 3 retries are 14s together, and timeout.request is 14s, so the last retry could never start; what works: 2 retries, or a request longer than 14s")]
fn what_is_wrong_by_itself_is_told_with_values_that_work(
    #[case] words: serde_json::Value,
    #[case] field: &'static str,
    #[case] message: &str,
) {
    assert_eq!(conflict(&said(words)), Some(Conflict { field, message: message.to_owned() }));
}

#[rstest::rstest]
#[case(json!({"timeout": {"requestMs": 5_000}}))]
#[case(json!({"timeout": {"perTryMs": 20_000}}))]
#[case(json!({"timeout": {"connectMs": 20_000}}))]
#[case(json!({"retry": {"numRetries": 10}}))]
#[case(json!({"timeout": {"requestMs": 5_000}, "retry": {"numRetries": 3}}))]
#[case(json!({"timeout": {"requestMs": 5_000}, "retry": {"numRetries": 0, "baseIntervalMs": 6_000}}))]
#[case(json!({"timeout": {"requestMs": 5_000}, "retry": {"numRetries": 2, "baseIntervalMs": 2_000}}))]
#[case(json!({"circuitBreaker": {"maxBreakMs": 100}}))]
fn nothing_is_refused_for_what_it_does_not_say(#[case] words: serde_json::Value) {
    assert_eq!(conflict(&said(words)), None);
}

fn payment() -> DependencySettings {
    DependencySettings {
        timeout: TimeoutSettings { request_ms: 20_000, per_try_ms: 20_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..RetrySettings::default() },
        fallback: vec![FallbackSettings::Queue],
        ..DependencySettings::default()
    }
}

fn built_ins() -> BuiltIns {
    let stripe = DependencySettings {
        circuit_breaker: CircuitBreakerSettings::default(),
        bulkhead: Some("external-api".into()),
        ..DependencySettings::default()
    };
    BuiltIns {
        dependencies: [("payment".into(), Some(payment())), ("stripe".into(), Some(stripe)), ("bare".into(), None)]
            .into(),
        bulkheads: [("external-api".to_owned(), BulkheadSettings::default())].into(),
        waiting_room: false,
    }
}

fn about(name: &str, words: serde_json::Value) -> Vec<String> {
    let mut policy = PolicySettings::default();
    policy.insert_dependency(name.to_owned(), said(words));
    warnings(&policy, Some(&built_ins()))
}

#[rstest::rstest]
#[case::off("payment", json!({"fallback": []}), "payment: fallback: [] switches off the built-in fallback Queue")]
#[case::other("payment", json!({"fallback": [{"type": "Cache"}]}), "payment: fallback (Cache) switches off the built-in fallback Queue")]
#[case::no_retries("stripe", json!({"retry": {"numRetries": 0}}), "stripe: numRetries: 0 switches off the 3 built-in retries")]
#[case::closed("stripe", json!({"circuitBreaker": {"manualState": "Closed"}}), "stripe: manualState: Closed switches off the circuit breaker")]
#[case::dependency("paymnet", json!({}), "paymnet: the workload has no dependency of that name; did you mean payment?")]
#[case::far_name("mainframe", json!({}), "mainframe: the workload has no dependency of that name")]
#[case::bulkhead("stripe", json!({"bulkhead": "external-ap"}), "stripe: neither the policy nor the workload has a bulkhead external-ap; did you mean external-api?; calls pass as if no bulkheadRef were there")]
#[case::provider("stripe", json!({"fallback": [{"type": "Provider", "provider": "paymetn"}]}), "stripe: its fallback names paymetn, and there is no dependency of that name; did you mean payment?; it is passed over")]
#[case::throughput("stripe", json!({"circuitBreaker": {"minimumThroughput": 5}}), "stripe: minimumThroughput and samplingDuration have no effect: the circuit opens after 5 failures in a row; set failureRatioPercent")]
#[case::sum("payment", json!({"retry": {"numRetries": 3}}),
    "payment: 4 tries of 20s and waits of 14s are 1m34s together, far longer than request (20s), so the last tries are cut short or never start; what fits: perTry 1s500ms, or numRetries 0, or request 1m34s")]
#[case::sum_in_full("bare", json!({"timeout": {"requestMs": 15_000, "perTryMs": 10_000}, "retry": {"numRetries": 3}}),
    "bare: 4 tries of 10s and waits of 14s are 54s together, far longer than request (15s), so the last tries are cut short or never start; what fits: perTry 250ms, or numRetries 0, or request 54s")]
#[case::sum_in_full_by_little("bare", json!({"timeout": {"requestMs": 5_000, "perTryMs": 1_000}, "retry": {"numRetries": 3, "baseIntervalMs": 200}}),
    "bare: 4 tries of 1s and waits of 1s400ms are 5s400ms together, longer than request (5s), so the last tries are cut short or never start; what fits: perTry 900ms, or numRetries 2, or request 5s400ms")]
fn the_author_is_told(#[case] name: &str, #[case] words: serde_json::Value, #[case] expected: &str) {
    assert_eq!(about(name, words), [expected]);
}

#[rstest::rstest]
#[case::nothing("payment", json!({}))]
#[case::request_alone("stripe", json!({"timeout": {"requestMs": 5_000}}))]
#[case::request_alone_of_a_bare_one("bare", json!({"timeout": {"requestMs": 5_000}}))]
#[case::the_same_fallback("payment", json!({"fallback": [{"type": "Queue"}, {"type": "Cache"}]}))]
#[case::a_built_in_bulkhead("payment", json!({"bulkhead": "external-api"}))]
#[case::a_built_in_provider("stripe", json!({"fallback": [{"type": "Provider", "provider": "payment"}]}))]
#[case::a_ratio("stripe", json!({"circuitBreaker": {"minimumThroughput": 5, "failureRatioPercent": 5}}))]
#[case::what_other_fields_say("bare", json!({"retry": {"retryOn": ["5xx"]}}))]
fn nobody_is_told_what_is_well(#[case] name: &str, #[case] words: serde_json::Value) {
    assert_eq!(about(name, words), [] as [&str; 0]);
}

#[test]
fn before_a_pod_has_told_only_what_the_policy_says_is_judged() {
    let mut policy = PolicySettings::default();
    policy.insert_dependency("paymnet".into(), said(json!({"fallback": [], "retry": {"numRetries": 5}})));
    assert_eq!(warnings(&policy, None), [] as [&str; 0]);
    policy.insert_dependency(
        "a".into(),
        said(json!({"bulkhead": "x", "fallback": [{"type": "Provider", "provider": "b"}]})),
    );
    let told = warnings(&policy, None);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told.iter().all(|sentence| sentence.contains("no pod has told yet")), "{told:?}");
}

#[test]
fn a_waiting_room_where_there_is_none_is_told() {
    let policy = PolicySettings { waiting_room: Some(contract::WaitingRoomSettings::default()), ..Default::default() };
    let told = warnings(&policy, Some(&built_ins()));
    assert!(told.len() == 1 && told[0].starts_with("waitingRoom: the workload has none"), "{told:?}");
    let gateway = BuiltIns { waiting_room: true, ..built_ins() };
    assert_eq!(warnings(&policy, Some(&gateway)), [] as [&str; 0]);
    assert_eq!(warnings(&policy, None), [] as [&str; 0], "no pod has told yet");
}

#[test]
fn a_bulkhead_that_nothing_passes_through_is_told() {
    let mut policy = PolicySettings::default();
    policy.bulkheads.insert("critical".into(), BulkheadSettings::default());
    policy.insert_dependency("stripe".into(), DependencyPolicy::default());
    assert_eq!(warnings(&policy, Some(&built_ins())), ["bulkhead critical: no dependency passes through it"]);
    let breaker = CircuitBreakerPolicy::default();
    let used = DependencyPolicy { bulkhead: Some("critical".into()), circuit_breaker: breaker, ..Default::default() };
    policy.insert_dependency("stripe".into(), used);
    assert_eq!(warnings(&policy, Some(&built_ins())), [] as [&str; 0]);
}

#[rstest::rstest]
#[case("payment", "paymnet", 1)]
#[case("database", "databse", 1)]
#[case("a", "", 1)]
#[case("smtp", "stripe", 4)]
#[case("same", "same", 0)]
fn letters_between_two_names(#[case] one: &str, #[case] other: &str, #[case] expected: usize) {
    assert_eq!(distance(one, other), expected);
}

#[rstest::rstest]
#[case::all_there(&[("EnablePdf", "off")], &[])]
#[case::misspelt(&[("EnablePDF", "off")], &["degradation.flagOverrides: no flag set of the namespace defines EnablePDF; did you mean EnablePdf?"])]
#[case::unknown(&[("Seats", "off")], &["degradation.flagOverrides: no flag set of the namespace defines Seats"])]
#[case::no_such_variant(&[("EnablePdf", "false")], &["degradation.flagOverrides: the flag EnablePdf has no variant false; it has off, on"])]
fn flags_that_degradation_sets_in_vain_are_told(#[case] overrides: &[(&str, &str)], #[case] expected: &[&str]) {
    let overrides: Vec<_> =
        overrides.iter().map(|(flag, variant)| ((*flag).to_owned(), (*variant).to_owned())).collect();
    let defined = [("EnablePdf".to_owned(), vec!["off".to_owned(), "on".to_owned()])].into();
    assert_eq!(override_warnings(&overrides, &defined), expected);
}

#[test]
fn what_is_said_of_flags_that_degradation_sets_is_short_whatever_they_are_called() {
    let long = "ü\n".repeat(64);
    let overrides: Vec<_> = (0..500).map(|nth| (format!("{nth:03}{long}"), long.clone())).collect();
    let variants: Vec<_> = (0..500).map(|nth| format!("{nth}{long}")).collect();
    // One half is not there, the other one has no such variant.
    let defined: BTreeMap<_, _> = overrides.iter().step_by(2).map(|(key, _)| (key.clone(), variants.clone())).collect();
    let told = override_warnings(&overrides, &defined);
    assert_eq!(told.len(), MOST_OVERRIDES + 1);
    assert!(told.iter().all(|one| one.len() < 2_500 && !one.contains('\n')), "{told:#?}");
    assert_eq!(told.last().unwrap(), "degradation.flagOverrides: 480 more come to nothing");
}
