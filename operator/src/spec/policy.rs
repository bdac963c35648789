//! From what people write to what pods run by. Nothing else turns a `ResiliencePolicy` into settings.
//!
//! It also validates again what the API server should have validated, because an object may be older than its schema.

use super::{Invalid, count, invalid, recovery::action};
use contract::{
    BulkheadSettings, CircuitBreakerSettings, DegradationSettings, DependencySettings, FallbackSettings,
    HealthCheckSettings, ManualState, PolicySettings, RetryBudgetSettings, RetryOn, RetrySettings, SlowCallSettings,
    TimeoutSettings, TripRule,
};
use crds::{ResiliencePolicySpec, bounded::spell, resilience_policy as api};
use engine::{check::Thresholds, recovery::Action};
use std::collections::{BTreeMap, BTreeSet};

/// A status code that the schema bounds to 200..=599.
fn status_code(value: i32) -> u16 {
    u16::try_from(value).unwrap_or(503)
}

/// The settings of the pods under a policy.
pub fn policy(spec: &ResiliencePolicySpec) -> Result<PolicySettings, Invalid> {
    let bulkheads: BTreeMap<_, _> =
        spec.bulkheads.iter().map(|bulkhead| (bulkhead.name.clone(), self::bulkhead(bulkhead))).collect();
    let mut dependencies = BTreeMap::new();
    for (index, dependency) in spec.dependencies.iter().enumerate() {
        let path = format!("spec.dependencies[{index}]");
        let settings = self::dependency(dependency);
        validate_dependency(&settings, &path)?;
        if let Some(name) = settings.bulkhead.as_ref().filter(|name| !bulkheads.contains_key(*name)) {
            return Err(invalid(format!("{path}.bulkheadRef.name"), format!("{name} is not among spec.bulkheads")));
        }
        for (nth, fallback) in dependency.fallback.iter().enumerate() {
            validate_fallback(fallback, dependency, &spec.dependencies, &format!("{path}.fallback[{nth}]"))?;
        }
        if dependencies.insert(dependency.name.clone(), settings).is_some() {
            return Err(invalid(format!("{path}.name"), format!("{} is there twice", dependency.name)));
        }
    }
    let health_checks = spec
        .health_checks
        .iter()
        .filter(|check| check.http.is_none() && check.tcp.is_none())
        .map(|check| (check.name.clone(), health_check(check)))
        .collect();
    let degradation = spec.degradation.as_ref().map(degradation);
    if degradation.as_ref().is_some_and(|d| d.exit_load_percent >= d.enter_load_percent) {
        return Err(invalid(
            "spec.degradation.exit.loadPercent",
            "must be below enter.loadPercent, or the mode would flap",
        ));
    }
    Ok(PolicySettings { dependencies, bulkheads, health_checks, degradation })
}

fn validate_dependency(settings: &DependencySettings, path: &str) -> Result<(), Invalid> {
    let TimeoutSettings { request_ms, per_try_ms, connect_ms } = settings.timeout;
    if per_try_ms > request_ms {
        return Err(invalid(
            format!("{path}.timeout.perTry"),
            format!("must not be longer than request ({})", spell(request_ms)),
        ));
    }
    if connect_ms.is_some_and(|connect| connect > per_try_ms) {
        return Err(invalid(
            format!("{path}.timeout.connect"),
            format!("must not be longer than perTry ({})", spell(per_try_ms)),
        ));
    }
    let waits = settings.retry.total_wait_ms();
    if settings.retry.num_retries > 0 && waits >= request_ms {
        let message = format!(
            "the waits between the retries ({}) must together be shorter than timeout.request ({})",
            spell(waits),
            spell(request_ms)
        );
        return Err(invalid(format!("{path}.retry"), message));
    }
    Ok(())
}

fn validate_fallback(
    fallback: &api::Fallback,
    owner: &api::Dependency,
    all: &[api::Dependency],
    path: &str,
) -> Result<(), Invalid> {
    match (fallback.type_, &fallback.provider, &fallback.response) {
        (api::FallbackType::Provider, Some(name), _) if all.iter().any(|d| d.name == *name) && *name != owner.name => {
            Ok(())
        }
        (api::FallbackType::Provider, _, _) => {
            Err(invalid(format!("{path}.provider"), "must name another entry of spec.dependencies"))
        }
        (api::FallbackType::Static, _, None) => Err(invalid(format!("{path}.response"), "must be set for type Static")),
        _ => Ok(()),
    }
}

/// Sentences about a valid policy that its author should know.
pub fn policy_warnings(settings: &PolicySettings) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, dependency) in &settings.dependencies {
        let tries = u64::from(dependency.retry.num_retries) + 1;
        let all = tries.saturating_mul(dependency.timeout.per_try_ms).saturating_add(dependency.retry.total_wait_ms());
        if all > dependency.timeout.request_ms {
            let (all, request) = (spell(all), spell(dependency.timeout.request_ms));
            warnings.push(format!(
                "{name}: {tries} tries with their waits can take {all}, longer than request ({request}), so the last ones may be cut short or never start"
            ));
        }
    }
    warnings
}

/// Sentences about what a policy asks for and this version does not do.
pub fn not_done_yet(spec: &ResiliencePolicySpec, supported: &[Action]) -> Vec<String> {
    let asked = spec.health_checks.iter().filter(|check| check.http.is_some() || check.tcp.is_some());
    let mut notes: Vec<_> =
        asked.map(|check| format!("{}: this version does not ask http and tcp checks itself", check.name)).collect();
    for ladder in spec.recovery.iter().flat_map(|recovery| &recovery.ladders) {
        let steps = ladder.steps.iter().filter(|step| !supported.contains(&action(step.action)));
        notes.extend(steps.map(|step| format!("{}: this version cannot do {:?}", ladder.check, step.action)));
    }
    notes
}

fn dependency(spec: &api::Dependency) -> DependencySettings {
    DependencySettings {
        timeout: TimeoutSettings {
            request_ms: spec.timeout.request.millis(),
            per_try_ms: spec.timeout.per_try.millis(),
            connect_ms: spec.timeout.connect.map(api::CallTime::millis),
        },
        retry: retry(&spec.retry),
        circuit_breaker: circuit_breaker(&spec.circuit_breaker),
        bulkhead: spec.bulkhead_ref.as_ref().map(|reference| reference.name.clone()),
        fallback: spec.fallback.iter().map(fallback).collect(),
    }
}

fn retry(spec: &api::Retry) -> RetrySettings {
    RetrySettings {
        num_retries: count(spec.num_retries),
        base_interval_ms: spec.back_off.base_interval.millis(),
        factor: spec.back_off.factor,
        max_interval_ms: spec.back_off.max_interval.millis(),
        jitter_percent: count(spec.back_off.jitter_percent),
        retry_on: spec.retry_on.iter().copied().map(retry_on).collect(),
        http_status_codes: spec.http_status_codes.iter().copied().map(status_code).collect(),
        methods: spec.methods.iter().copied().map(method).map(str::to_owned).collect::<BTreeSet<_>>(),
        budget: spec.budget.as_ref().map(|budget| RetryBudgetSettings {
            percent: count(budget.percent),
            interval_ms: budget.interval.millis(),
            min_retries: count(budget.min_retries),
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

fn circuit_breaker(spec: &api::CircuitBreaker) -> CircuitBreakerSettings {
    let trip = match spec.failure_ratio_percent {
        Some(percent) => TripRule::FailureRatio {
            percent: count(percent),
            minimum_throughput: spec.minimum_throughput.map_or(10, count),
            sampling_ms: spec.sampling_duration.map_or(30_000, api::Period::millis),
        },
        None => TripRule::ConsecutiveFailures { failures: spec.consecutive_failures.map_or(5, count) },
    };
    CircuitBreakerSettings {
        trip,
        break_ms: spec.break_duration.millis(),
        max_break_ms: spec.max_break_duration.map(api::Period::millis),
        half_open_max_requests: count(spec.half_open_max_requests),
        slow_call: spec
            .slow_call
            .as_ref()
            .map(|slow| SlowCallSettings { duration_ms: slow.duration.millis(), percent: count(slow.percent) }),
        manual_state: match spec.manual_state {
            api::ManualState::Auto => ManualState::Auto,
            api::ManualState::Open => ManualState::Open,
            api::ManualState::Closed => ManualState::Closed,
        },
    }
}

fn fallback(spec: &api::Fallback) -> FallbackSettings {
    match spec.type_ {
        api::FallbackType::Cache => FallbackSettings::Cache {
            ttl_ms: spec.cache.as_ref().map_or(300_000, |cache| cache.ttl.millis()),
            max_stale_ms: spec.cache.as_ref().map_or(0, |cache| cache.max_stale.millis()),
        },
        api::FallbackType::Provider => {
            FallbackSettings::Provider { provider: spec.provider.clone().unwrap_or_default() }
        }
        api::FallbackType::Queue => FallbackSettings::Queue,
        api::FallbackType::Static => FallbackSettings::Static {
            status_code: spec.response.as_ref().map_or(503, |response| status_code(response.status_code)),
            body: spec.response.as_ref().map(|response| response.body.clone()).unwrap_or_default(),
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
    }
}

fn degradation(spec: &api::Degradation) -> DegradationSettings {
    DegradationSettings {
        enter_load_percent: count(spec.enter.load_percent),
        enter_for_ms: spec.enter.r#for.millis(),
        exit_load_percent: count(spec.exit.load_percent),
        exit_for_ms: spec.exit.r#for.millis(),
        flag_overrides: spec.flag_overrides.iter().map(|over| (over.key.clone(), over.variant.clone())).collect(),
    }
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
    use crds::ResiliencePolicy;

    fn spec(body: &str) -> ResiliencePolicySpec {
        serde_saphyr::from_str(&format!("targetRefs: [{{name: w}}]\n{body}")).unwrap()
    }

    #[test]
    fn a_bare_dependency_runs_on_the_contract_defaults() {
        let settings = policy(&spec("dependencies: [{name: a}]")).unwrap();
        assert_eq!(settings.dependencies["a"], DependencySettings::default());
    }

    #[rstest::rstest]
    #[case(
        "dependencies: [{name: a, timeout: {perTry: 20s}}]",
        "spec.dependencies[0].timeout.perTry: must not be longer than request (15s)"
    )]
    #[case(
        "dependencies: [{name: a, timeout: {connect: 11s}}]",
        "spec.dependencies[0].timeout.connect: must not be longer than perTry (10s)"
    )]
    #[case(
        "dependencies: [{name: a, timeout: {request: 14s}}]",
        "spec.dependencies[0].retry: the waits between the retries (14s) must together be shorter than timeout.request (14s)"
    )]
    #[case(
        "dependencies: [{name: a, bulkheadRef: {name: x}}]",
        "spec.dependencies[0].bulkheadRef.name: x is not among spec.bulkheads"
    )]
    #[case("dependencies: [{name: a}, {name: a}]", "spec.dependencies[1].name: a is there twice")]
    #[case(
        "dependencies: [{name: a, fallback: [{type: Provider, provider: a}]}]",
        "spec.dependencies[0].fallback[0].provider: must name another entry of spec.dependencies"
    )]
    #[case(
        "dependencies: [{name: a, fallback: [{type: Static}]}]",
        "spec.dependencies[0].fallback[0].response: must be set for type Static"
    )]
    #[case(
        "degradation: {enter: {loadPercent: 50}, exit: {loadPercent: 50}}",
        "spec.degradation.exit.loadPercent: must be below enter.loadPercent, or the mode would flap"
    )]
    fn what_an_older_schema_let_through_is_refused(#[case] body: &str, #[case] expected: &str) {
        assert_eq!(policy(&spec(body)).unwrap_err().to_string(), expected);
    }

    #[test]
    fn tries_that_can_outlast_the_request_are_a_warning() {
        let settings = policy(&spec("dependencies: [{name: a}, {name: b, retry: {numRetries: 0}}]")).unwrap();
        let warnings = policy_warnings(&settings);
        assert_eq!(warnings.len(), 1);
        assert!(
            warnings[0].starts_with("a: 4 tries with their waits can take 54s, longer than request (15s)"),
            "{warnings:?}"
        );
    }

    #[rstest::rstest]
    #[case(include_str!("../../../crds/samples/booking.yaml"))]
    #[case(include_str!("../../../crds/samples/payment.yaml"))]
    #[case(include_str!("../../../crds/samples/gateway.yaml"))]
    #[case(include_str!("../../../crds/samples/notification.yaml"))]
    #[case(include_str!("../../../crds/samples/quickstart.yaml"))]
    fn the_samples_are_valid(#[case] text: &str) {
        policy(&serde_saphyr::from_str::<ResiliencePolicy>(text).unwrap().spec).unwrap();
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
