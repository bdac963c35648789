use super::*;
use crate::{CircuitBreakerPolicy, FallbackPolicy, FallbackSettings, RetryBudgetPolicy, RetryOn, SlowCallPolicy};
use proptest::prelude::*;
use serde_json::json;

/// What a policy says, in the words of the wire.
fn said(value: serde_json::Value) -> DependencyPolicy {
    serde_json::from_value(value).unwrap()
}

/// Booking's payment: one long try, and the queue.
fn payment() -> DependencySettings {
    DependencySettings {
        timeout: TimeoutSettings { request_ms: 20_000, per_try_ms: 20_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..RetrySettings::default() },
        bulkhead: Some("external".into()),
        fallback: vec![FallbackSettings::Queue],
        ..DependencySettings::default()
    }
}

/// A database as the services have it built in.
fn database() -> DependencySettings {
    DependencySettings {
        timeout: TimeoutSettings { request_ms: 5_000, per_try_ms: 1_000, connect_ms: Some(500) },
        retry: RetrySettings {
            base_interval_ms: 200,
            max_interval_ms: 2_000,
            jitter_percent: 50,
            retry_on: [RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::Deadlock, RetryOn::VersionConflict].into(),
            ..RetrySettings::default()
        },
        ..DependencySettings::default()
    }
}

/// PayPal: a circuit that opens by a share of failures.
fn paypal() -> DependencySettings {
    let trip = TripRule::FailureRatio { percent: 50, minimum_throughput: 20, sampling_ms: 60_000 };
    DependencySettings {
        circuit_breaker: CircuitBreakerSettings { trip, max_break_ms: Some(60_000), ..Default::default() },
        ..DependencySettings::default()
    }
}

fn origin(resolved: &Resolved, path: &str) -> Origin {
    resolved.origins.get(path).copied().unwrap_or_else(|| panic!("{path}: {:?}", resolved.origins))
}

#[test]
fn a_policy_that_names_only_a_timeout_keeps_everything_else_that_is_built_in() {
    let resolved = resolve(&said(json!({"timeout": {"requestMs": 25_000}})), Some(&payment()));
    let mut expected = payment();
    expected.timeout.request_ms = 25_000;
    assert_eq!(resolved.settings, expected, "the queue, the bulkhead and no retries stay");
    assert_eq!(origin(&resolved, "timeout.request"), Origin::Policy);
    for path in ["timeout.perTry", "retry.numRetries", "fallback", "bulkheadRef"] {
        assert_eq!(origin(&resolved, path), Origin::BuiltIn, "{path}");
    }
}

/// Deadlocks, which are not in the ADR's list, were retried no more.
#[test]
fn a_policy_that_names_only_the_circuit_breaker_keeps_what_is_retried() {
    let resolved = resolve(&said(json!({"circuitBreaker": {"consecutiveFailures": 7}})), Some(&database()));
    let mut expected = database();
    expected.circuit_breaker.trip = TripRule::ConsecutiveFailures { failures: 7 };
    assert_eq!(resolved.settings, expected);
    assert_eq!(origin(&resolved, "retry.retryOn"), Origin::BuiltIn);
}

#[test]
fn nothing_said_is_what_is_built_in_and_else_the_adr() {
    assert_eq!(resolve(&DependencyPolicy::default(), Some(&payment())).settings, payment());
    let bare = resolve(&DependencyPolicy::default(), None);
    assert_eq!(bare.settings, DependencySettings::default());
    assert!(bare.origins.values().all(|origin| *origin == Origin::Default), "{:?}", bare.origins);
}

#[test]
fn none_is_said_explicitly() {
    let off = said(json!({"fallback": [], "retry": {"numRetries": 0}, "circuitBreaker": {"manualState": "Closed"}}));
    let resolved = resolve(&off, Some(&DependencySettings { fallback: vec![FallbackSettings::Queue], ..database() }));
    assert_eq!(resolved.settings.fallback, []);
    assert_eq!(resolved.settings.retry.num_retries, 0);
    assert_eq!(resolved.settings.circuit_breaker.manual_state, crate::ManualState::Closed);
    assert_eq!(resolved.settings.retry.retry_on, database().retry.retry_on);
}

/// Request, time per try, number of retries, first and longest wait.
type Times = (u64, u64, u32, u64, u64);

fn times(resolved: &Resolved) -> Times {
    let DependencySettings { timeout, retry, .. } = &resolved.settings;
    (timeout.request_ms, timeout.per_try_ms, retry.num_retries, retry.base_interval_ms, retry.max_interval_ms)
}

#[rstest::rstest]
// The ADR's numbers are 15 s, 10 s, three retries from 2 s up to 30 s.
#[case::request_alone_shortens_in_proportion(json!({"timeout": {"requestMs": 5_000}}), None, (5_000, 3_333, 3, 666, 10_000))]
#[case::the_same_request_changes_nothing(json!({"timeout": {"requestMs": 15_000}}), None, (15_000, 10_000, 3, 2_000, 30_000))]
#[case::a_longer_request_changes_nothing_else(json!({"timeout": {"requestMs": 60_000}}), None, (60_000, 10_000, 3, 2_000, 30_000))]
#[case::the_shortest_request(json!({"timeout": {"requestMs": 1}}), None, (1, 1, 3, 0, 2))]
#[case::a_long_try_makes_the_call_as_long(json!({"timeout": {"perTryMs": 20_000}}), None, (20_000, 20_000, 3, 2_000, 30_000))]
#[case::a_short_try_leaves_the_call(json!({"timeout": {"perTryMs": 1_000}}), None, (15_000, 1_000, 3, 2_000, 30_000))]
#[case::a_long_connect_makes_the_try_as_long(json!({"timeout": {"connectMs": 12_000}}), None, (15_000, 12_000, 3, 2_000, 30_000))]
#[case::more_retries_wait_less(json!({"retry": {"numRetries": 5}}), None, (15_000, 10_000, 5, 250, 3_750))]
#[case::steep_waits_wait_less(json!({"retry": {"factor": 10.0}}), None, (15_000, 10_000, 3, 288, 4_320))]
#[case::a_long_first_wait_grows_less(json!({"retry": {"baseIntervalMs": 3_000}}), None, (15_000, 10_000, 3, 3_000, 3_000))]
#[case::what_cannot_start_is_not_promised(json!({"retry": {"baseIntervalMs": 10_000}}), None, (15_000, 10_000, 1, 10_000, 10_000))]
#[case::what_is_said_is_kept_even_so(json!({"retry": {"baseIntervalMs": 10_000, "numRetries": 3}}), None, (15_000, 10_000, 3, 10_000, 10_000))]
#[case::a_short_longest_wait_bounds_the_first(json!({"retry": {"maxIntervalMs": 500}}), None, (15_000, 10_000, 3, 500, 500))]
#[case::over_a_built_in_database(json!({"timeout": {"requestMs": 2_000}}), Some(database()), (2_000, 400, 3, 80, 800))]
#[case::over_a_single_long_try(json!({"timeout": {"requestMs": 5_000}}), Some(payment()), (5_000, 5_000, 0, 500, 7_500))]
fn values_that_are_not_said_fit_those_that_are(
    #[case] words: serde_json::Value,
    #[case] built_in: Option<DependencySettings>,
    #[case] expected: Times,
) {
    let resolved = resolve(&said(words), built_in.as_ref());
    assert_eq!(times(&resolved), expected, "{:?}", resolved.origins);
}

#[test]
fn a_fitted_value_says_so() {
    let resolved = resolve(&said(json!({"timeout": {"requestMs": 300}})), Some(&database()));
    for path in ["timeout.perTry", "timeout.connect", "retry.backOff.baseInterval", "retry.backOff.maxInterval"] {
        assert_eq!(origin(&resolved, path), Origin::Fitted, "{path}");
    }
    assert_eq!(origin(&resolved, "timeout.request"), Origin::Policy);
    assert_eq!(resolved.settings.timeout.connect_ms, Some(60));
}

#[rstest::rstest]
#[case::built_in_ratio_stays(json!({"breakMs": 1_000}), Some(paypal()), TripRule::FailureRatio { percent: 50, minimum_throughput: 20, sampling_ms: 60_000 })]
#[case::part_of_a_ratio(json!({"minimumThroughput": 5}), Some(paypal()), TripRule::FailureRatio { percent: 50, minimum_throughput: 5, sampling_ms: 60_000 })]
#[case::another_ratio(json!({"failureRatioPercent": 20}), Some(paypal()), TripRule::FailureRatio { percent: 20, minimum_throughput: 20, sampling_ms: 60_000 })]
#[case::ratio_over_failures_in_a_row(json!({"failureRatioPercent": 20}), None, TripRule::FailureRatio { percent: 20, minimum_throughput: 10, sampling_ms: 30_000 })]
#[case::failures_in_a_row_over_a_ratio(json!({"consecutiveFailures": 3}), Some(paypal()), TripRule::ConsecutiveFailures { failures: 3 })]
#[case::part_of_no_ratio(json!({"minimumThroughput": 5}), None, TripRule::ConsecutiveFailures { failures: 5 })]
fn when_a_circuit_opens(
    #[case] words: serde_json::Value,
    #[case] built_in: Option<DependencySettings>,
    #[case] expected: TripRule,
) {
    let resolved = resolve(&said(json!({"circuitBreaker": words})), built_in.as_ref());
    assert_eq!(resolved.settings.circuit_breaker.trip, expected);
}

#[rstest::rstest]
#[case::longer_break(json!({"breakMs": 120_000}), 120_000, 120_000)]
#[case::shorter_longest(json!({"maxBreakMs": 10_000}), 10_000, 10_000)]
#[case::both_fit(json!({"breakMs": 10_000}), 10_000, 60_000)]
fn breaks_fit_each_other(#[case] words: serde_json::Value, #[case] break_ms: u64, #[case] max_break_ms: u64) {
    let breaker = resolve(&said(json!({"circuitBreaker": words})), Some(&paypal())).settings.circuit_breaker;
    assert_eq!((breaker.break_ms, breaker.max_break_ms), (break_ms, Some(max_break_ms)));
}

#[test]
fn parts_of_groups_are_taken_from_the_built_in_group() {
    let own = DependencySettings {
        retry: RetrySettings {
            budget: Some(RetryBudgetSettings { percent: 5, interval_ms: 60_000, min_retries: 1 }),
            ..RetrySettings::default()
        },
        circuit_breaker: CircuitBreakerSettings {
            slow_call: Some(SlowCallSettings { duration_ms: 100, percent: 80 }),
            ..CircuitBreakerSettings::default()
        },
        fallback: vec![
            FallbackSettings::Cache { ttl_ms: 1_000, max_stale_ms: 2_000 },
            FallbackSettings::Static { status_code: 404, body: "none".into() },
        ],
        ..DependencySettings::default()
    };
    let words = said(json!({
        "retry": {"budget": {"percent": 30}},
        "circuitBreaker": {"slowCall": {"durationMs": 250}},
        "fallback": [{"type": "Static", "body": "sorry"}, {"type": "Cache", "ttlMs": 7}],
    }));
    let over = resolve(&words, Some(&own)).settings;
    assert_eq!(over.retry.budget, Some(RetryBudgetSettings { percent: 30, interval_ms: 60_000, min_retries: 1 }));
    assert_eq!(over.circuit_breaker.slow_call, Some(SlowCallSettings { duration_ms: 250, percent: 80 }));
    assert_eq!(
        over.fallback,
        [
            FallbackSettings::Static { status_code: 404, body: "sorry".into() },
            FallbackSettings::Cache { ttl_ms: 7, max_stale_ms: 2_000 }
        ]
    );
    let alone = resolve(&words, None).settings;
    assert_eq!(alone.retry.budget, Some(RetryBudgetSettings { percent: 30, ..defaults::RETRY_BUDGET }));
    assert_eq!(alone.circuit_breaker.slow_call.unwrap().percent, defaults::SLOW_CALL_PERCENT);
    assert_eq!(alone.fallback[0], FallbackSettings::Static { status_code: 503, body: "sorry".into() });
}

fn built_ins() -> BuiltIns {
    BuiltIns {
        dependencies: [("payment".to_owned(), Some(payment())), ("catalog".to_owned(), None)].into(),
        bulkheads: [("external".to_owned(), BulkheadSettings::default())].into(),
        waiting_room: false,
    }
}

#[test]
fn a_bulkhead_that_nobody_has_takes_none_away() {
    let mut policy = PolicySettings::default();
    policy.insert_dependency("payment".into(), said(json!({"bulkhead": "extrenal"})));
    policy.insert_dependency("catalog".into(), said(json!({"bulkhead": "external"})));
    let resolved = built_ins().resolve(&policy);
    assert_eq!(resolved["payment"].settings.bulkhead.as_deref(), Some("external"));
    assert_eq!(origin(&resolved["payment"], "bulkheadRef"), Origin::BuiltIn);
    assert_eq!(resolved["catalog"].settings.bulkhead.as_deref(), Some("external"), "a built-in one may be named");
}

#[test]
fn an_entry_of_version_0_1_replaces_what_is_built_in_but_for_the_bulkhead() {
    let whole =
        DependencySettings { timeout: TimeoutSettings { request_ms: 7, ..Default::default() }, ..Default::default() };
    let policy = PolicySettings { dependencies: [("payment".to_owned(), whole.clone())].into(), ..Default::default() };
    let resolved = built_ins().resolve(&policy);
    assert_eq!(resolved["payment"].settings, DependencySettings { bulkhead: Some("external".into()), ..whole });
    assert_eq!(origin(&resolved["payment"], "fallback"), Origin::Policy);
    assert_eq!(origin(&resolved["payment"], "bulkheadRef"), Origin::BuiltIn);
    assert_eq!(resolved["catalog"].settings, DependencySettings::default());
}

prop_compose! {
    fn any_said()(
        timeout in proptest::option::of(1_u64..300_000),
        per_try in proptest::option::of(1_u64..300_000),
        connect in proptest::option::of(1_u64..300_000),
        retries in proptest::option::of(0_u32..=10),
        base in proptest::option::of(0_u64..300_000),
        factor in proptest::option::of(1.0_f64..10.0),
        max in proptest::option::of(0_u64..300_000),
        breaks in proptest::option::of(100_u64..3_600_000),
        max_break in proptest::option::of(100_u64..3_600_000),
        ratio in proptest::option::of(1_u32..100),
        no_fallback in any::<bool>(),
    ) -> DependencyPolicy {
        let mut said = DependencyPolicy::default();
        // What admission refuses never gets here.
        said.timeout.request_ms = timeout;
        said.timeout.per_try_ms = per_try.map(|ms| ms.min(timeout.unwrap_or(u64::MAX)));
        said.timeout.connect_ms = connect.map(|ms| ms.min(said.timeout.per_try_ms.or(timeout).unwrap_or(u64::MAX)));
        said.retry.num_retries = retries;
        said.retry.base_interval_ms = base.map(|ms| ms.min(max.unwrap_or(u64::MAX)));
        said.retry.factor = factor;
        said.retry.max_interval_ms = max;
        said.retry.budget = no_fallback.then(RetryBudgetPolicy::default);
        said.circuit_breaker = CircuitBreakerPolicy {
            failure_ratio_percent: ratio,
            break_ms: breaks.map(|ms| ms.min(max_break.unwrap_or(u64::MAX))),
            max_break_ms: max_break,
            slow_call: ratio.map(|_| SlowCallPolicy { duration_ms: 5, percent: None }),
            ..CircuitBreakerPolicy::default()
        };
        said.retry.retry_on = ratio.map(|_| [RetryOn::Deadlock].into());
        said.fallback = no_fallback.then(Vec::<FallbackPolicy>::new);
        said
    }
}

fn any_built_in() -> impl Strategy<Value = Option<DependencySettings>> {
    prop_oneof![Just(None), Just(Some(payment())), Just(Some(database())), Just(Some(paypal()))]
}

proptest! {
    #[test]
    fn what_is_said_is_never_changed(said in any_said(), built_in in any_built_in()) {
        let Resolved { settings, origins } = resolve(&said, built_in.as_ref());
        let pairs = [
            ("timeout.request", said.timeout.request_ms, settings.timeout.request_ms),
            ("timeout.perTry", said.timeout.per_try_ms, settings.timeout.per_try_ms),
            ("timeout.connect", said.timeout.connect_ms, settings.timeout.connect_ms.unwrap_or(0)),
            ("retry.numRetries", said.retry.num_retries.map(u64::from), settings.retry.num_retries.into()),
            ("retry.backOff.baseInterval", said.retry.base_interval_ms, settings.retry.base_interval_ms),
            ("retry.backOff.maxInterval", said.retry.max_interval_ms, settings.retry.max_interval_ms),
            ("circuitBreaker.breakDuration", said.circuit_breaker.break_ms, settings.circuit_breaker.break_ms),
        ];
        for (path, said, effective) in pairs {
            prop_assert_eq!(said.is_some(), origins[path] == Origin::Policy, "{}", path);
            if let Some(said) = said {
                prop_assert_eq!(said, effective, "{}", path);
            }
        }
    }

    #[test]
    fn the_result_never_contradicts_itself_unless_the_policy_does(said in any_said(), built_in in any_built_in()) {
        let settings = resolve(&said, built_in.as_ref()).settings;
        let TimeoutSettings { request_ms, per_try_ms, connect_ms } = settings.timeout;
        prop_assert!(per_try_ms <= request_ms && per_try_ms > 0, "{per_try_ms} of {request_ms}");
        prop_assert!(connect_ms.unwrap_or(0) <= per_try_ms);
        prop_assert!(settings.retry.base_interval_ms <= settings.retry.max_interval_ms);
        let breaker = &settings.circuit_breaker;
        prop_assert!(breaker.max_break_ms.is_none_or(|max| max >= breaker.break_ms));
        if said.retry.num_retries.is_none() || said.retry.base_interval_ms.is_none() {
            prop_assert!(settings.retry.num_retries == 0 || settings.retry.total_wait_ms() < request_ms);
        }
    }

    #[test]
    fn saying_what_holds_anyway_changes_nothing(said in any_said(), built_in in any_built_in()) {
        let settings = resolve(&said, built_in.as_ref()).settings;
        let mut in_full = said;
        in_full.timeout.request_ms = Some(settings.timeout.request_ms);
        in_full.timeout.per_try_ms = Some(settings.timeout.per_try_ms);
        in_full.timeout.connect_ms = settings.timeout.connect_ms;
        in_full.retry.num_retries = Some(settings.retry.num_retries);
        in_full.retry.base_interval_ms = Some(settings.retry.base_interval_ms);
        in_full.retry.max_interval_ms = Some(settings.retry.max_interval_ms);
        in_full.retry.factor = Some(settings.retry.factor);
        prop_assert_eq!(resolve(&in_full, built_in.as_ref()).settings, settings);
    }

    /// The operator resolves what pods report, and a pod may report anything.
    #[test]
    fn no_built_in_value_is_too_strange(
        said in any_said(), request in any::<u64>(), per_try in any::<u64>(), retries in any::<u32>(),
        base in any::<u64>(), max in any::<u64>(), factor in any::<f64>(), breaks in any::<u64>(),
    ) {
        let mut own = database();
        own.timeout = TimeoutSettings { request_ms: request, per_try_ms: per_try, connect_ms: Some(breaks) };
        own.retry = RetrySettings { num_retries: retries, base_interval_ms: base, max_interval_ms: max, factor, ..own.retry };
        own.circuit_breaker.break_ms = breaks;
        let settings = resolve(&said, Some(&own)).settings;
        prop_assert!(settings.longest_ms() >= settings.timeout.per_try_ms);
    }

    #[test]
    fn the_wire_keeps_what_was_said(said in any_said()) {
        let text = serde_json::to_string(&said).unwrap();
        prop_assert_eq!(serde_json::from_str::<DependencyPolicy>(&text).unwrap(), said);
    }
}
