//! From what people write to what programs run by. This is the only place where a spec becomes settings.
//!
//! It also judges again what the API server should have judged, because an object may be older than its schema.

use contract::{
    BulkheadSettings, CircuitBreakerSettings, DegradationSettings, DependencySettings, FallbackSettings, FlagOverride,
    FlagSettings, FlagState, FlagsSettings, HealthCheckSettings, ManualState, PolicySettings, RetryBudgetSettings,
    RetryOn, RetrySettings, SlowCallSettings, TimeoutSettings, TripRule,
};
use crds::{
    FeatureFlagSpec, ResiliencePolicySpec,
    bounded::{IntOrPercent, spell},
    feature_flag::{self, FlagDefinition, MAX_DEPTH, MAX_FLAG_SPEC_BYTES},
    resilience_policy as api,
};
use engine::{
    check::Thresholds,
    recovery::{Action, Limits, MaxUnhealthy, Settings, Step},
};
use flags::targeting::{Rule, RuleError};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Why a resource cannot be used, with the field that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct Invalid {
    path: String,
    message: String,
}

fn invalid(path: impl Into<String>, message: impl Into<String>) -> Invalid {
    Invalid { path: path.into(), message: message.into() }
}

/// A number that the schema bounds to be non-negative.
fn count(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

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
        judge_dependency(&settings, &path)?;
        if let Some(name) = settings.bulkhead.as_ref().filter(|name| !bulkheads.contains_key(*name)) {
            return Err(invalid(format!("{path}.bulkheadRef.name"), format!("{name} is not among spec.bulkheads")));
        }
        for (nth, fallback) in dependency.fallback.iter().enumerate() {
            judge_fallback(fallback, dependency, &spec.dependencies, &format!("{path}.fallback[{nth}]"))?;
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

fn judge_dependency(settings: &DependencySettings, path: &str) -> Result<(), Invalid> {
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

fn judge_fallback(
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

/// How the operator heals under a policy. `dry_run` is the operator's own switch.
pub fn recovery(spec: &ResiliencePolicySpec, dry_run: bool) -> Settings {
    let dry_run = dry_run || spec.mode == api::Mode::DryRun;
    let Some(recovery) = &spec.recovery else {
        return Settings { suspended: spec.suspend, dry_run, ..Settings::default() };
    };
    let step = |step: &api::Step| Step {
        action: action(step.action),
        cron_job: step.cron_job_ref.as_ref().map(|reference| reference.name.clone()),
        timeout_ms: step.timeout.millis(),
    };
    Settings {
        ladders: recovery
            .ladders
            .iter()
            .map(|ladder| (ladder.check.clone(), ladder.steps.iter().map(step).collect()))
            .collect(),
        limits: Limits {
            max_in_flight: usize::try_from(recovery.limits.max_in_flight).unwrap_or(1),
            cooldown_ms: recovery.limits.cooldown.millis(),
            budget_actions: usize::try_from(recovery.limits.budget.actions).unwrap_or(0),
            budget_interval_ms: recovery.limits.budget.interval.millis(),
            max_unhealthy: match recovery.limits.max_unhealthy {
                IntOrPercent::Count(count) => MaxUnhealthy::Count(count as usize),
                IntOrPercent::Percent(percent) => MaxUnhealthy::Percent(percent as usize),
            },
        },
        healthy_delay_ms: recovery.healthy_delay.millis(),
        suspended: spec.suspend,
        dry_run,
    }
}

/// A rung's action.
pub const fn action(spec: api::StepAction) -> Action {
    match spec {
        api::StepAction::TrimMemory => Action::TrimMemory,
        api::StepAction::ResetConnections => Action::ResetConnections,
        api::StepAction::RunCleanupJob => Action::RunCleanupJob,
        api::StepAction::RestartPod => Action::RestartPod,
        api::StepAction::RolloutRestart => Action::RolloutRestart,
        api::StepAction::Rollback => Action::Rollback,
    }
}

/// The reverse of [`action`].
pub const fn step_action(action: Action) -> api::StepAction {
    match action {
        Action::TrimMemory => api::StepAction::TrimMemory,
        Action::ResetConnections => api::StepAction::ResetConnections,
        Action::RunCleanupJob => api::StepAction::RunCleanupJob,
        Action::RestartPod => api::StepAction::RestartPod,
        Action::RolloutRestart => api::StepAction::RolloutRestart,
        Action::Rollback => api::StepAction::Rollback,
    }
}

/// The flags of a flag set, with its overrides in place.
pub fn flags(spec: &FeatureFlagSpec) -> Result<FlagsSettings, Invalid> {
    let size = serde_json::to_vec(&spec.flag_spec).map_or(usize::MAX, |bytes| bytes.len());
    if size > MAX_FLAG_SPEC_BYTES {
        let message = format!("has {size} bytes, more than the {MAX_FLAG_SPEC_BYTES} that are allowed: split the set");
        return Err(invalid("spec.flagSpec", message));
    }
    let evaluators = spec.flag_spec.evaluators.clone().unwrap_or_default().into_iter().collect::<BTreeMap<_, _>>();
    for (name, rule) in &evaluators {
        judge_depth(rule, &format!("spec.flagSpec.$evaluators.{name}"))?;
    }
    for name in evaluators.keys() {
        Rule::validate_evaluator(name, &evaluators).map_err(|error| bad_rule(&error, "spec.flagSpec"))?;
    }
    let mut flags = BTreeMap::new();
    for (key, definition) in &spec.flag_spec.flags {
        let path = format!("spec.flagSpec.flags.{key}");
        judge_flag(definition, &path)?;
        let flag = flag(definition);
        judge_targeting(&flag, &evaluators, &path)?;
        flags.insert(key.clone(), flag);
    }
    for (index, over) in spec.overrides.iter().enumerate() {
        let path = format!("spec.overrides[{index}]");
        let Some(flag) = flags.get_mut(&over.key) else {
            return Err(invalid(format!("{path}.key"), format!("{} is not a flag of this set", over.key)));
        };
        if !flag.variants.contains_key(&over.variant) {
            let known: Vec<_> = flag.variants.keys().map(String::as_str).collect();
            return Err(invalid(
                format!("{path}.variant"),
                format!("{} has no variant {} (it has {})", over.key, over.variant, known.join(", ")),
            ));
        }
        flag.kill_switch = Some(FlagOverride {
            variant: over.variant.clone(),
            until_ms: over.until.as_ref().map(|until| until.0.as_millisecond()),
            reason: over.reason.clone().unwrap_or_default(),
        });
    }
    Ok(FlagsSettings { flags, evaluators })
}

fn flag(definition: &FlagDefinition) -> FlagSettings {
    FlagSettings {
        state: match definition.state {
            feature_flag::FlagState::Enabled => FlagState::Enabled,
            feature_flag::FlagState::Disabled => FlagState::Disabled,
        },
        variants: definition.variants.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
        default_variant: definition.default_variant.clone(),
        targeting: definition.targeting.clone().filter(|rule| !rule.is_empty()).map(Value::Object),
        kill_switch: None,
    }
}

fn judge_flag(definition: &FlagDefinition, path: &str) -> Result<(), Invalid> {
    let kinds: BTreeSet<_> = definition.variants.values().map(kind).collect();
    if definition.variants.is_empty() {
        return Err(invalid(format!("{path}.variants"), "must not be empty"));
    }
    if kinds.len() > 1 || kinds.contains("null") || kinds.contains("array") {
        let kinds: Vec<_> = kinds.into_iter().collect();
        let message =
            format!("must all be of one type, boolean, string, number or object; found {}", kinds.join(" and "));
        return Err(invalid(format!("{path}.variants"), message));
    }
    if let Some(name) = definition.default_variant.as_ref().filter(|name| !definition.variants.contains_key(*name)) {
        return Err(invalid(format!("{path}.defaultVariant"), format!("{name} is not among the variants")));
    }
    for (name, value) in &definition.variants {
        judge_depth(value, &format!("{path}.variants.{name}"))?;
    }
    for (name, value) in definition.targeting.iter().flatten() {
        judge_depth(value, &format!("{path}.targeting.{name}"))?;
    }
    Ok(())
}

/// Compiles the targeting rule, as the pods will, and looks for variants that it names and that are not there.
fn judge_targeting(flag: &FlagSettings, evaluators: &BTreeMap<String, Value>, path: &str) -> Result<(), Invalid> {
    let Some(rule) = &flag.targeting else { return Ok(()) };
    let Some(rule) = Rule::compile(rule, evaluators).map_err(|error| bad_rule(&error, path))? else { return Ok(()) };
    if let Some(name) = rule.named_variants().into_iter().find(|name| !flag.variants.contains_key(*name)) {
        let known: Vec<_> = flag.variants.keys().map(String::as_str).collect();
        let message = format!("can answer {name}, which is not among the variants ({})", known.join(", "));
        return Err(invalid(format!("{path}.targeting"), message));
    }
    Ok(())
}

/// A mistake in a rule of the flag at `path`, or in a shared one.
fn bad_rule(error: &RuleError, path: &str) -> Invalid {
    let path = if error.path.starts_with("$evaluators") { "spec.flagSpec" } else { path };
    invalid(format!("{path}.{}", error.path), error.mistake.to_string())
}

const fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn judge_depth(value: &Value, path: &str) -> Result<(), Invalid> {
    // Breadth first and without recursion: the depth is what is in question.
    let mut level: Vec<&Value> = vec![value];
    for _ in 0..MAX_DEPTH {
        level = level
            .into_iter()
            .flat_map(|value| -> Vec<&Value> {
                match value {
                    Value::Array(items) => items.iter().collect(),
                    Value::Object(members) => members.values().collect(),
                    _ => Vec::new(),
                }
            })
            .collect();
        if level.is_empty() {
            return Ok(());
        }
    }
    Err(invalid(path, format!("is nested deeper than {MAX_DEPTH} levels")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::{FeatureFlag, ResiliencePolicy};

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

    fn flag_spec(body: &str) -> FeatureFlagSpec {
        serde_saphyr::from_str(body).unwrap()
    }

    #[rstest::rstest]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1, y: 'no'}}}}",
        "spec.flagSpec.flags.a.variants: must all be of one type"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {}}}}",
        "spec.flagSpec.flags.a.variants: must not be empty"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, defaultVariant: z}}}",
        "spec.flagSpec.flags.a.defaultVariant: z is not among the variants"
    )]
    #[case(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, overrides: [{key: a, variant: z}]}",
        "spec.overrides[0].variant: a has no variant z (it has x)"
    )]
    #[case(
        "{flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}}, overrides: [{key: b, variant: x}]}",
        "spec.overrides[0].key: b is not a flag of this set"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{iff: [true]}, x]}}}}",
        "spec.flagSpec.flags.a.targeting.if[0].iff: iff is not an operator; use one of var, "
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {$ref: vip}}}}",
        "spec.flagSpec.flags.a.targeting.$ref: vip is not among $evaluators"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {fractional: [[x, 1], [z, 9]]}}}}",
        "spec.flagSpec.flags.a.targeting: can answer z, which is not among the variants (x)"
    )]
    #[case::a_word_that_yaml_reads_as_a_boolean(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}, targeting: {if: [{var: b}, off, x]}}}}",
        "spec.flagSpec.flags.a.targeting: can answer false, which is not among the variants (x)"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}, $evaluators: {vip: {in: [x]}}}",
        "spec.flagSpec.$evaluators.vip.in: takes two values, found 1"
    )]
    #[case(
        "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1}}}, $evaluators: {vip: {'!': {$ref: vip}}}}",
        "spec.flagSpec.$evaluators.vip.!.$ref: refers to itself: vip -> vip"
    )]
    fn bad_flags_are_refused_with_their_path(#[case] body: &str, #[case] expected: &str) {
        let error = flags(&flag_spec(body)).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn good_targeting_gets_through_with_its_evaluators() {
        let body = "flagSpec: {flags: {a: {state: ENABLED, variants: {x: 1, z: 2}, defaultVariant: x, \
                    targeting: {if: [{$ref: vip}, z, {fractional: [[x, 1], [z, 9]]}]}}, \
                    b: {state: ENABLED, variants: {x: 1}, targeting: {}}}, \
                    $evaluators: {vip: {ends_with: [{var: email}, '@vip.example']}}}";
        let settings = flags(&flag_spec(body)).unwrap();
        assert!(settings.flags["a"].targeting.is_some() && settings.flags["b"].targeting.is_none());
        assert_eq!(settings.evaluators.len(), 1);
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let mut spec = flag_spec("flagSpec: {flags: {a: {state: ENABLED, variants: {x: hello}}}}");
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), Value::from("x".repeat(MAX_FLAG_SPEC_BYTES)));
        assert!(flags(&spec).unwrap_err().to_string().starts_with("spec.flagSpec: has "));
        let mut deep = Value::from(1);
        for _ in 0..=MAX_DEPTH {
            deep = serde_json::json!({ "a": deep });
        }
        let definition = spec.flag_spec.flags.get_mut("a").unwrap();
        definition.variants.insert("x".into(), deep);
        assert!(flags(&spec).unwrap_err().to_string().contains("nested deeper"));
    }

    #[rstest::rstest]
    #[case(include_str!("../../crds/samples/booking.yaml"))]
    #[case(include_str!("../../crds/samples/payment.yaml"))]
    #[case(include_str!("../../crds/samples/gateway.yaml"))]
    #[case(include_str!("../../crds/samples/notification.yaml"))]
    #[case(include_str!("../../crds/samples/quickstart.yaml"))]
    fn the_samples_are_valid(#[case] text: &str) {
        policy(&serde_saphyr::from_str::<ResiliencePolicy>(text).unwrap().spec).unwrap();
    }

    #[test]
    fn the_sample_flags_are_valid() {
        let sample: FeatureFlag = serde_saphyr::from_str(include_str!("../../crds/samples/flags.yaml")).unwrap();
        let settings = flags(&sample.spec).unwrap();
        assert_eq!(settings.flags["EnablePdfGeneration"].kill_switch.as_ref().unwrap().variant, "off");
        assert_eq!(settings.flags["MaxConcurrentBookings"].value(0), Some(&Value::from(100)));
    }

    #[test]
    fn the_samples_carry_the_numbers_of_the_adr() {
        let booking: ResiliencePolicy =
            serde_saphyr::from_str(include_str!("../../crds/samples/booking.yaml")).unwrap();
        let settings = policy(&booking.spec).unwrap();
        let database = &settings.dependencies["database"];
        assert_eq!([1, 2, 3].map(|retry| database.retry.wait_ms(retry)), [200, 400, 800]);
        let memory = &settings.health_checks["memory"];
        assert_eq!((memory.memory_max_bytes, memory.memory_max_percent), (Some(1 << 30), Some(80)));
        let payment: ResiliencePolicy =
            serde_saphyr::from_str(include_str!("../../crds/samples/payment.yaml")).unwrap();
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
