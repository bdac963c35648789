//! From what people write to what pods run by. Nothing else turns a `ResiliencePolicy` into settings.
//!
//! It also validates again what the API server should have validated, because an object may be older than its schema.

use super::{Invalid, asked, checks::is_reported, count, degradation, invalid};
use contract::{
    BuiltIns, BulkheadSettings, CircuitBreakerPolicy, DependencyPolicy, FallbackPolicy, HealthCheckSettings,
    ManualState, PolicySettings, RetryBudgetPolicy, RetryOn, RetryPolicy, SlowCallPolicy, TimeoutPolicy,
    WaitingRoomSettings,
};
use crds::{ResiliencePolicySpec, resilience_policy as api};
use engine::{check::Thresholds, policy_review};
use std::collections::BTreeMap;

/// A status code that the schema bounds to 200..=599.
fn status_code(value: i32) -> u16 {
    u16::try_from(value).unwrap_or(contract::defaults::STATIC_STATUS_CODE)
}

/// The settings of the pods under a policy.
pub fn policy(spec: &ResiliencePolicySpec) -> Result<PolicySettings, Invalid> {
    let mut settings = PolicySettings::default();
    for (index, entry) in spec.dependencies.iter().enumerate() {
        let path = format!("spec.dependencies[{index}]");
        let said = dependency(entry);
        if let Some(conflict) = policy_review::conflict(&said) {
            return Err(invalid(format!("{path}.{}", conflict.field), conflict.message));
        }
        for (nth, fallback) in entry.fallback.iter().flatten().enumerate() {
            validate_fallback(fallback, entry, &format!("{path}.fallback[{nth}]"))?;
        }
        if settings.insert_dependency(entry.name.clone(), said).is_some() {
            return Err(invalid(format!("{path}.name"), format!("{} is there twice", entry.name)));
        }
    }
    settings.bulkheads = spec.bulkheads.iter().map(|one| (one.name.clone(), bulkhead(one))).collect();
    asked::asked(spec)?;
    settings.health_checks = spec
        .health_checks
        .iter()
        .filter(|check| is_reported(check))
        .map(|check| (check.name.clone(), health_check(check)))
        .collect();
    settings.degradation = spec.degradation.as_ref().map(degradation::of_pod).transpose()?;
    settings.waiting_room = spec.waiting_room.as_ref().map(waiting_room).transpose()?;
    Ok(settings)
}

fn validate_fallback(fallback: &api::Fallback, owner: &api::Dependency, path: &str) -> Result<(), Invalid> {
    match (fallback.type_, &fallback.provider, &fallback.response) {
        (api::FallbackType::Provider, Some(name), _) if *name != owner.name => Ok(()),
        (api::FallbackType::Provider, _, _) => Err(invalid(format!("{path}.provider"), "must name another dependency")),
        (api::FallbackType::Static, _, None) => Err(invalid(format!("{path}.response"), "must be set for type Static")),
        _ => Ok(()),
    }
}

/// Sentences about a valid policy that its author should know. `built_ins` is what the workload's pods report.
pub fn policy_warnings(settings: &PolicySettings, built_ins: Option<&BuiltIns>) -> Vec<String> {
    policy_review::warnings(settings, built_ins)
}

fn dependency(spec: &api::Dependency) -> DependencyPolicy {
    // Taken apart as a whole, so that a new member cannot be forgotten.
    let api::Dependency { name: _, timeout, retry, circuit_breaker, bulkhead_ref, fallback } = spec;
    DependencyPolicy {
        timeout: timeout.as_ref().map(self::timeout).unwrap_or_default(),
        retry: retry.as_ref().map(self::retry).unwrap_or_default(),
        circuit_breaker: circuit_breaker.as_ref().map(self::circuit_breaker).unwrap_or_default(),
        bulkhead: bulkhead_ref.as_ref().map(|reference| reference.name.clone()),
        fallback: fallback.as_ref().map(|list| list.iter().map(self::fallback).collect()),
    }
}

fn timeout(spec: &api::Timeout) -> TimeoutPolicy {
    let api::Timeout { request, per_try, connect } = spec;
    TimeoutPolicy {
        request_ms: request.map(api::CallTime::millis),
        per_try_ms: per_try.map(api::CallTime::millis),
        connect_ms: connect.map(api::CallTime::millis),
    }
}

fn retry(spec: &api::Retry) -> RetryPolicy {
    let api::Retry { num_retries, back_off, retry_on, http_status_codes, methods, budget } = spec;
    let api::BackOff { base_interval, factor, max_interval, jitter_percent } = back_off.clone().unwrap_or_default();
    RetryPolicy {
        num_retries: num_retries.map(count),
        base_interval_ms: base_interval.map(api::Wait::millis),
        factor,
        max_interval_ms: max_interval.map(api::Wait::millis),
        jitter_percent: jitter_percent.map(count),
        retry_on: retry_on.as_ref().map(|list| list.iter().copied().map(self::retry_on).collect()),
        http_status_codes: http_status_codes.as_ref().map(|list| list.iter().copied().map(status_code).collect()),
        methods: methods.as_ref().map(|list| list.iter().copied().map(method).map(str::to_owned).collect()),
        budget: budget.as_ref().map(|api::RetryBudget { percent, interval, min_retries }| RetryBudgetPolicy {
            percent: percent.map(count),
            interval_ms: interval.map(api::StepTime::millis),
            min_retries: min_retries.map(count),
        }),
    }
}

const fn retry_on(spec: api::RetryOn) -> RetryOn {
    match spec {
        api::RetryOn::Timeout => RetryOn::Timeout,
        api::RetryOn::ConnectFailure => RetryOn::ConnectFailure,
        api::RetryOn::ServerError => RetryOn::ServerError,
        api::RetryOn::RateLimited => RetryOn::RateLimited,
        api::RetryOn::Deadlock => RetryOn::Deadlock,
        api::RetryOn::VersionConflict => RetryOn::VersionConflict,
    }
}

const fn method(spec: api::Method) -> &'static str {
    match spec {
        api::Method::Get => "GET",
        api::Method::Head => "HEAD",
        api::Method::Options => "OPTIONS",
        api::Method::Put => "PUT",
        api::Method::Delete => "DELETE",
        api::Method::Post => "POST",
        api::Method::Patch => "PATCH",
    }
}

fn circuit_breaker(spec: &api::CircuitBreaker) -> CircuitBreakerPolicy {
    let api::CircuitBreaker {
        consecutive_failures,
        failure_ratio_percent,
        minimum_throughput,
        sampling_duration,
        break_duration,
        max_break_duration,
        half_open_max_requests,
        slow_call,
        manual_state,
    } = spec;
    CircuitBreakerPolicy {
        consecutive_failures: consecutive_failures.map(count),
        failure_ratio_percent: failure_ratio_percent.map(count),
        minimum_throughput: minimum_throughput.map(count),
        sampling_ms: sampling_duration.map(api::Period::millis),
        break_ms: break_duration.map(api::Period::millis),
        max_break_ms: max_break_duration.map(api::Period::millis),
        half_open_max_requests: half_open_max_requests.map(count),
        slow_call: slow_call.as_ref().map(|api::SlowCall { duration, percent }| SlowCallPolicy {
            duration_ms: duration.millis(),
            percent: percent.map(count),
        }),
        manual_state: manual_state.map(|state| match state {
            api::ManualState::Auto => ManualState::Auto,
            api::ManualState::Open => ManualState::Open,
            api::ManualState::Closed => ManualState::Closed,
        }),
    }
}

fn fallback(spec: &api::Fallback) -> FallbackPolicy {
    match spec.type_ {
        api::FallbackType::Cache => FallbackPolicy::Cache {
            ttl_ms: spec.cache.as_ref().and_then(|cache| cache.ttl).map(api::Period::millis),
            max_stale_ms: spec.cache.as_ref().and_then(|cache| cache.max_stale).map(api::Span::millis),
        },
        api::FallbackType::Provider => FallbackPolicy::Provider { provider: spec.provider.clone().unwrap_or_default() },
        api::FallbackType::Queue => FallbackPolicy::Queue,
        api::FallbackType::Static => FallbackPolicy::Static {
            status_code: spec.response.as_ref().and_then(|response| response.status_code).map(status_code),
            body: spec.response.as_ref().and_then(|response| response.body.clone()),
        },
    }
}

fn bulkhead(spec: &api::Bulkhead) -> BulkheadSettings {
    BulkheadSettings {
        max_concurrent: count(spec.max_concurrent),
        max_queued: count(spec.max_queued),
        max_wait_ms: spec.max_wait.millis(),
    }
}

fn health_check(spec: &api::HealthCheck) -> HealthCheckSettings {
    HealthCheckSettings {
        interval_ms: spec.interval.millis(),
        timeout_ms: spec.timeout.millis(),
        memory_max_bytes: spec.memory.as_ref().and_then(|memory| memory.max).map(crds::ByteSize::bytes),
        memory_max_percent: spec.memory.as_ref().and_then(|memory| memory.max_percent_of_limit).map(count),
        memory_degraded_for_ms: spec.memory.as_ref().and_then(|memory| memory.degraded_for).map(api::Span::millis),
    }
}

fn waiting_room(spec: &api::WaitingRoom) -> Result<WaitingRoomSettings, Invalid> {
    let api::WaitingRoom { enter_load_percent, exit_load_percent, exit_for, admit_per_second, admission_ttl } = spec;
    let api::AdmitPerSecond { min, max } = admit_per_second;
    if exit_load_percent >= enter_load_percent {
        let message = "must be below enterLoadPercent, or the waiting room would open and close all the time";
        return Err(invalid("spec.waitingRoom.exitLoadPercent", message));
    }
    if min > max {
        let message = format!("must not be more than max ({max}): min is {min}");
        return Err(invalid("spec.waitingRoom.admitPerSecond.min", message));
    }
    Ok(WaitingRoomSettings {
        enter_load_percent: count(*enter_load_percent),
        exit_load_percent: count(*exit_load_percent),
        exit_for_ms: exit_for.millis(),
        min_admit_per_second: count(*min),
        max_admit_per_second: count(*max),
        admission_ttl_ms: admission_ttl.millis(),
    })
}

/// When a check of the policy counts as failed.
pub fn thresholds(spec: &ResiliencePolicySpec) -> BTreeMap<String, Thresholds> {
    let of = |check: &api::HealthCheck| Thresholds {
        unhealthy: count(check.unhealthy_threshold),
        healthy: count(check.healthy_threshold),
    };
    spec.health_checks.iter().map(|check| (check.name.clone(), of(check))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{DependencySettings, TripRule};
    use crds::ResiliencePolicy;
    use serde_json::json;
    use std::collections::BTreeSet;

    fn spec(body: &str) -> ResiliencePolicySpec {
        serde_saphyr::from_str(&format!("targetRefs: [{{name: w}}]\n{body}")).unwrap()
    }

    fn said(body: &str) -> serde_json::Value {
        let settings = policy(&spec(&format!("dependencies: [{{name: a, {body}}}]"))).unwrap();
        serde_json::to_value(&settings.dependency_policies["a"]).unwrap()
    }

    #[test]
    fn a_bare_dependency_says_nothing() {
        let settings = policy(&spec("dependencies: [{name: a}]")).unwrap();
        assert_eq!(settings.dependency_policies["a"], DependencyPolicy::default());
        assert_eq!(settings.dependencies["a"], DependencySettings::default(), "for readers of contract 1");
    }

    #[test]
    fn a_waiting_room_is_what_the_policy_says_over_the_defaults() {
        let room = |body: &str| policy(&spec(body)).unwrap().waiting_room;
        assert_eq!(room("dependencies: []"), None);
        assert_eq!(room("waitingRoom: {}"), Some(WaitingRoomSettings::default()));
        let said = "waitingRoom: {enterLoadPercent: 70, exitLoadPercent: 0, exitFor: 1m, admitPerSecond: {min: 1, max: 9}, admissionTtl: 5m}";
        let expected = WaitingRoomSettings {
            enter_load_percent: 70,
            exit_load_percent: 0,
            exit_for_ms: 60_000,
            min_admit_per_second: 1,
            max_admit_per_second: 9,
            admission_ttl_ms: 300_000,
        };
        assert_eq!(room(said), Some(expected));
    }

    #[rstest::rstest]
    #[case("timeout: {request: 5s}", json!({"timeout": {"requestMs": 5_000}}))]
    #[case("timeout: {}, retry: {backOff: {}}, circuitBreaker: {}", json!({}))]
    #[case("fallback: []", json!({"fallback": []}))]
    #[case("retry: {numRetries: 0, retryOn: []}", json!({"retry": {"numRetries": 0, "retryOn": []}}))]
    #[case("retry: {budget: {}}", json!({"retry": {"budget": {}}}))]
    #[case("circuitBreaker: {manualState: Closed}", json!({"circuitBreaker": {"manualState": "Closed"}}))]
    #[case("bulkheadRef: {name: built-in}", json!({"bulkhead": "built-in"}))]
    #[case("fallback: [{type: Cache}, {type: Provider, provider: built-in}, {type: Static, response: {}}]",
        json!({"fallback": [{"type": "Cache"}, {"type": "Provider", "provider": "built-in"}, {"type": "Static"}]}))]
    #[case("retry: {backOff: {baseInterval: 1s, factor: 1, maxInterval: 2s, jitterPercent: 3}, httpStatusCodes: [409], methods: [POST]}",
        json!({"retry": {"baseIntervalMs": 1_000, "factor": 1.0, "maxIntervalMs": 2_000, "jitterPercent": 3, "httpStatusCodes": [409], "methods": ["POST"]}}))]
    #[case("circuitBreaker: {failureRatioPercent: 1, minimumThroughput: 2, samplingDuration: 3s, breakDuration: 4s, maxBreakDuration: 5s, halfOpenMaxRequests: 6, slowCall: {duration: 7s, percent: 8}}",
        json!({"circuitBreaker": {"failureRatioPercent": 1, "minimumThroughput": 2, "samplingMs": 3_000, "breakMs": 4_000, "maxBreakMs": 5_000, "halfOpenMaxRequests": 6, "slowCall": {"durationMs": 7_000, "percent": 8}}}))]
    fn a_policy_says_only_what_it_says(#[case] body: &str, #[case] expected: serde_json::Value) {
        assert_eq!(said(body), expected);
    }

    #[rstest::rstest]
    #[case(
        "dependencies: [{name: a, timeout: {request: 15s, perTry: 20s}}]",
        "spec.dependencies[0].timeout.perTry: must not be longer than request (15s): perTry is 20s"
    )]
    #[case(
        "dependencies: [{name: a, timeout: {request: 5s}, retry: {numRetries: 3, backOff: {baseInterval: 2s}}}]",
        "spec.dependencies[0].retry: the waits between 3 retries are 6s together, and timeout.request is 5s, so the last retry could never start; what works: 2 retries, or a request longer than 6s"
    )]
    #[case(
        "dependencies: [{name: a, circuitBreaker: {consecutiveFailures: 1, failureRatioPercent: 1}}]",
        "spec.dependencies[0].circuitBreaker.consecutiveFailures: excludes failureRatioPercent: keep one of them"
    )]
    #[case("dependencies: [{name: a}, {name: a}]", "spec.dependencies[1].name: a is there twice")]
    #[case(
        "dependencies: [{name: a, fallback: [{type: Provider, provider: a}]}]",
        "spec.dependencies[0].fallback[0].provider: must name another dependency"
    )]
    #[case(
        "dependencies: [{name: a, fallback: [{type: Static}]}]",
        "spec.dependencies[0].fallback[0].response: must be set for type Static"
    )]
    #[case(
        "degradation: {enter: {loadPercent: 50}, exit: {loadPercent: 50}}",
        "spec.degradation.exit.loadPercent: must be below enter.loadPercent, or the mode would flap"
    )]
    #[case(
        "waitingRoom: {enterLoadPercent: 50, exitLoadPercent: 50}",
        "spec.waitingRoom.exitLoadPercent: must be below enterLoadPercent, or the waiting room would open and close all the time"
    )]
    #[case(
        "waitingRoom: {admitPerSecond: {min: 9, max: 8}}",
        "spec.waitingRoom.admitPerSecond.min: must not be more than max (8): min is 9"
    )]
    fn what_an_older_schema_let_through_is_refused(#[case] body: &str, #[case] expected: &str) {
        assert_eq!(policy(&spec(body)).unwrap_err().to_string(), expected);
    }

    #[rstest::rstest]
    #[case(include_str!("../../../crds/samples/booking.yaml"))]
    #[case(include_str!("../../../crds/samples/catalog.yaml"))]
    #[case(include_str!("../../../crds/samples/payment.yaml"))]
    #[case(include_str!("../../../crds/samples/gateway.yaml"))]
    #[case(include_str!("../../../crds/samples/notification.yaml"))]
    #[case(include_str!("../../../crds/samples/quickstart.yaml"))]
    fn the_samples_are_valid(#[case] text: &str) {
        let settings = policy(&serde_saphyr::from_str::<ResiliencePolicy>(text).unwrap().spec).unwrap();
        let warnings = policy_warnings(&settings, None);
        // The ADR's own numbers for databases and mail are a little longer than its timeouts; nothing else is worth a word.
        assert!(warnings.iter().all(|warning| warning.contains("together, longer than request")), "{warnings:?}");
    }

    #[test]
    fn the_samples_carry_the_numbers_of_the_adr() {
        let booking: ResiliencePolicy =
            serde_saphyr::from_str(include_str!("../../../crds/samples/booking.yaml")).unwrap();
        let settings = policy(&booking.spec).unwrap();
        let database = &settings.dependencies["database"];
        assert_eq!([1, 2, 3].map(|retry| database.retry.wait_ms(retry)), [200, 400, 800]);
        let memory = &settings.health_checks["memory"];
        assert_eq!((memory.memory_max_bytes, memory.memory_max_percent), (Some(1 << 30), Some(80)));
        let payment: ResiliencePolicy =
            serde_saphyr::from_str(include_str!("../../../crds/samples/payment.yaml")).unwrap();
        let settings = policy(&payment.spec).unwrap();
        let stripe = &settings.dependencies["stripe"];
        assert_eq!(stripe.circuit_breaker.trip, TripRule::ConsecutiveFailures { failures: 3 });
        assert_eq!(
            (stripe.circuit_breaker.break_ms, stripe.retry.num_retries, stripe.retry.wait_ms(2)),
            (120_000, 2, 1_000)
        );
        assert_eq!(stripe.retry.retry_on, BTreeSet::from([RetryOn::ServerError]));
        assert_eq!(
            (settings.bulkheads["external-api"].max_concurrent, settings.bulkheads["external-api"].max_wait_ms),
            (20, 30_000)
        );
    }
}
