//! The metrics of ADR-007, and those of the control loop, in OpenMetrics text.

use crate::bulkhead::Bulkheads;
use crate::circuit_breaker::Totals;
use crate::priority::Priority;
use crate::sync::lock;
use contract::{ActionOutcome, CircuitState, PushOutcome};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Content type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds; a fallback from memory is quick, one to another provider is not.
const FALLBACK_BUCKETS: [f64; 8] = [0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 20.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabel {
    service: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    service: String,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabels {
    service: String,
    attempt: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabels {
    service: String,
    source: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CheckLabel {
    check_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ActionLabels {
    action: String,
    outcome: &'static str,
}

type FallbackDuration = Family<ServiceLabel, Histogram, fn() -> Histogram>;

/// All metrics of a workload. `service` is the dependency in the metrics of the patterns, as in the ADR.
pub struct Metrics {
    workload: String,
    registry: Mutex<Registry>,
    watched: Arc<Watched>,
    circuit_opened: Family<ServiceLabel, Counter>,
    circuit_reset: Family<ServiceLabel, Counter>,
    circuit_state: Family<StateLabels, Gauge>,
    retries: Family<RetryLabels, Counter>,
    endpoint_ejections: Family<ServiceLabel, Counter>,
    endpoints_ejected: Family<ServiceLabel, Gauge>,
    fallback: OnceLock<FallbackDuration>,
    fallback_answers: Family<SourceLabels, Counter>,
    degraded: Family<ServiceLabel, Gauge>,
    check_failures: Family<CheckLabel, Counter>,
    config_received: Family<OutcomeLabel, Counter>,
    config_revision: Gauge,
    actions: Family<ActionLabels, Counter>,
}

impl Metrics {
    /// Metrics of a workload, registered.
    pub fn new(workload: &str) -> Self {
        let metrics = Self {
            workload: workload.to_owned(),
            registry: Mutex::default(),
            watched: Arc::default(),
            circuit_opened: Family::default(),
            circuit_reset: Family::default(),
            circuit_state: Family::default(),
            retries: Family::default(),
            endpoint_ejections: Family::default(),
            endpoints_ejected: Family::default(),
            fallback: OnceLock::new(),
            fallback_answers: Family::default(),
            degraded: Family::default(),
            check_failures: Family::default(),
            config_received: Family::default(),
            config_revision: Gauge::default(),
            actions: Family::default(),
        };
        // The encoder appends _total to the names of counters.
        metrics.register(|registry| {
            registry.register("circuit_breaker_opened", "Circuit breakers opened", metrics.circuit_opened.clone());
            registry.register("circuit_breaker_reset", "Circuit breakers closed again", metrics.circuit_reset.clone());
            registry.register_collector(Box::new(Collected(Arc::clone(&metrics.watched))));
            registry.register(
                "circuit_breaker_state",
                "1 for the state that the circuit is in, 0 for the others",
                metrics.circuit_state.clone(),
            );
            registry.register("retry_attempts", "Retries, by the attempt that failed", metrics.retries.clone());
            let help = "Endpoints left out for a while because they failed";
            registry.register("http_endpoint_ejections", help, metrics.endpoint_ejections.clone());
            registry.register("http_endpoints_ejected", "Endpoints left out now", metrics.endpoints_ejected.clone());
            let help = "Calls that fell back, by the fallback that answered";
            registry.register("fallback_answers", help, metrics.fallback_answers.clone());
            registry.register("degraded_mode_active", "Services in degraded mode", metrics.degraded.clone());
            registry.register(
                "health_check_failures",
                "Runs of health checks that were not healthy",
                metrics.check_failures.clone(),
            );
            registry.register(
                "resilience_config_received",
                "Configurations received, by outcome",
                metrics.config_received.clone(),
            );
            registry.register(
                "resilience_config_revision",
                "Revision that is live; 0: built-in defaults",
                metrics.config_revision.clone(),
            );
            registry.register("resilience_actions", "Recovery actions requested, by outcome", metrics.actions.clone());
        });
        metrics.degraded(false);
        metrics
    }

    /// Lets the workload register metrics of its own.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut lock(&self.registry));
    }

    /// The text; send it as [`CONTENT_TYPE`].
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &lock(&self.registry)).is_err() {
            tracing::error!("failed to encode metrics");
        }
        text
    }

    pub(crate) fn circuit_opened(&self, dependency: &str) {
        self.circuit_opened.get_or_create(&service(dependency)).inc();
    }

    pub(crate) fn circuit_reset(&self, dependency: &str) {
        self.circuit_reset.get_or_create(&service(dependency)).inc();
    }

    pub(crate) fn endpoint_ejected(&self, dependency: &str) {
        self.endpoint_ejections.get_or_create(&service(dependency)).inc();
    }

    pub(crate) fn endpoints_ejected(&self, dependency: &str, now: usize) {
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        self.endpoints_ejected.get_or_create(&service(dependency)).set(now);
    }

    /// Includes what the dependency counts itself.
    pub(crate) fn watch(&self, dependency: &'static dyn CallFigures) {
        lock(&self.watched.dependencies).push(dependency);
    }

    /// Includes these bulkheads.
    pub(crate) fn watch_bulkheads(&self, bulkheads: &'static Bulkheads) {
        lock(&self.watched.bulkheads).push(bulkheads);
    }

    pub(crate) fn circuit_state(&self, dependency: &str, now: CircuitState) {
        let states =
            [("closed", CircuitState::Closed), ("open", CircuitState::Open), ("half_open", CircuitState::HalfOpen)];
        for (name, state) in states {
            let labels = StateLabels { service: dependency.to_owned(), state: name };
            self.circuit_state.get_or_create(&labels).set(i64::from(state == now));
        }
    }

    pub(crate) fn retry(&self, dependency: &str, attempt: u32) {
        self.retries.get_or_create(&RetryLabels { service: dependency.to_owned(), attempt }).inc();
    }

    /// Counts a call that fell back, by who answered; for a workload that falls back by itself.
    pub fn fallback(&self, dependency: &str, source: &'static str, took: Duration) {
        self.fallback_answers.get_or_create(&SourceLabels { service: dependency.to_owned(), source }).inc();
        let family = self.fallback.get_or_init(|| {
            let family = FallbackDuration::new_with_constructor(|| Histogram::new(FALLBACK_BUCKETS));
            self.register(|registry| {
                registry.register("fallback_duration_seconds", "Time spent in fallback mode", family.clone());
            });
            family
        });
        family.get_or_create(&service(dependency)).observe(took.as_secs_f64());
    }

    pub(crate) fn degraded(&self, active: bool) {
        self.degraded.get_or_create(&service(&self.workload)).set(active.into());
    }

    pub(crate) fn check_failed(&self, check: &str) {
        self.check_failures.get_or_create(&CheckLabel { check_name: check.to_owned() }).inc();
    }

    pub(crate) fn config(&self, outcome: PushOutcome, revision: i64) {
        let outcome = match outcome {
            PushOutcome::Applied => "applied",
            PushOutcome::Unchanged => "unchanged",
            PushOutcome::RefusedOlder => "refused_older",
            PushOutcome::RefusedFuture => "refused_future",
            PushOutcome::RefusedInvalid => "refused_invalid",
            PushOutcome::Unknown => "unknown",
        };
        self.config_received.get_or_create(&OutcomeLabel { outcome }).inc();
        self.config_revision.set(revision);
    }

    pub(crate) fn action(&self, action: &str, outcome: ActionOutcome) {
        let outcome = match outcome {
            ActionOutcome::Done => "done",
            ActionOutcome::AlreadyDone => "already_done",
            ActionOutcome::Unsupported => "unsupported",
            ActionOutcome::Failed => "failed",
            ActionOutcome::OtherInstance => "other_instance",
            ActionOutcome::Unknown => "unknown",
        };
        self.actions.get_or_create(&ActionLabels { action: action.to_owned(), outcome }).inc();
    }
}

/// Figures of one dependency since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    /// How its calls ended, as its circuit breaker counts them.
    pub calls: Totals,
    /// Attempts that timed out.
    pub timeouts: u64,
    /// Retries that its budget did not allow.
    pub retries_refused: u64,
}

/// A dependency that counts its calls itself, so that no call waits for another to be counted.
pub(crate) trait CallFigures: Send + Sync {
    /// Its name, as label.
    fn name(&self) -> &str;
    /// What it has counted so far.
    fn figures(&self) -> Figures;
}

/// What counts for itself, so that no call waits for another, and is read when metrics are encoded.
#[derive(Default)]
struct Watched {
    dependencies: Mutex<Vec<&'static dyn CallFigures>>,
    bulkheads: Mutex<Vec<&'static Bulkheads>>,
}

struct Collected(Arc<Watched>);

impl fmt::Debug for Collected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Collected")
    }
}

impl Collector for Collected {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let figures = |dependency: &&'static dyn CallFigures| (dependency.name(), dependency.figures());
        let dependencies: Vec<(&str, Figures)> = lock(&self.0.dependencies).iter().map(figures).collect();
        let calls = dependencies.iter().flat_map(|(name, figures)| {
            let results = [
                ("success", figures.calls.successes),
                ("failure", figures.calls.failures),
                ("ignored", figures.calls.ignored),
                ("rejected", figures.calls.rejected),
            ];
            results.map(|(result, count)| ([("service", *name), ("result", result)], count))
        });
        let help = "Attempts that reached the circuit breaker, by result";
        counters(&mut encoder, "circuit_breaker_calls", help, calls)?;
        let timeouts = dependencies.iter().map(|(name, figures)| ([("service", *name)], figures.timeouts));
        counters(&mut encoder, "attempt_timeouts", "Attempts that timed out", timeouts)?;
        let refused = dependencies.iter().map(|(name, figures)| ([("service", *name)], figures.retries_refused));
        counters(&mut encoder, "retry_budget_exhausted", "Retries that the budget refused", refused)?;

        let bulkheads: Vec<_> = lock(&self.0.bulkheads).iter().flat_map(|bulkheads| bulkheads.usage()).collect();
        let rejected = bulkheads.iter().flat_map(|(name, usage)| {
            let reasons = [("full", usage.full), ("timeout", usage.timed_out), ("shed", usage.shed)];
            reasons.map(|(reason, count)| ([("bulkhead", name.as_str()), ("reason", reason)], count))
        });
        counters(
            &mut encoder,
            "bulkhead_rejected",
            "Calls that a bulkhead refused, by reason: its queue was full, the wait in it timed out, or more important calls \
             went first",
            rejected,
        )?;
        let shed = bulkheads.iter().flat_map(|(name, usage)| {
            let count = |priority: Priority| (("bulkhead", name.as_str()), priority, usage.refused[priority as usize]);
            Priority::ALL
                .map(count)
                .map(|(bulkhead, priority, count)| ([bulkhead, ("priority", priority.name())], count))
        });
        counters(&mut encoder, "bulkhead_shed", "The same calls, by how important they were", shed)?;
        let limits = bulkheads.iter().flat_map(|(name, usage)| {
            let limit = |priority: Priority| (("bulkhead", name.as_str()), priority, usage.limits[priority as usize]);
            Priority::ALL
                .map(limit)
                .map(|(bulkhead, priority, limit)| ([bulkhead, ("priority", priority.name())], limit))
        });
        let what = "Most calls of a priority and those below it that may be in a bulkhead now";
        gauges(&mut encoder, "bulkhead_limit", what, limits)?;
        let in_use = bulkheads.iter().map(|(name, usage)| ([("bulkhead", name.as_str())], usage.in_use));
        gauges(&mut encoder, "bulkhead_in_use", "Calls in a bulkhead", in_use)?;
        let queued = bulkheads.iter().map(|(name, usage)| ([("bulkhead", name.as_str())], usage.queued));
        gauges(&mut encoder, "bulkhead_queued", "Calls that wait for a slot in a bulkhead", queued)
    }
}

/// Writes one value per label set.
fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let values = values.map(|(labels, value)| (labels, ConstCounter::new(value)));
    family(encoder, name, help, values)
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, u32)>,
) -> fmt::Result {
    let values = values.map(|(labels, value)| (labels, ConstGauge::new(i64::from(value))));
    family(encoder, name, help, values)
}

fn family<L: EncodeLabelSet, M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, M)>,
) -> fmt::Result {
    let mut values = values.peekable();
    let Some((_, first)) = values.peek() else { return Ok(()) };
    let mut family = encoder.encode_descriptor(name, help, None, first.metric_type())?;
    values.try_for_each(|(labels, value)| value.encode(family.encode_family(&labels)?))
}

fn service(name: &str) -> ServiceLabel {
    ServiceLabel { service: name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_adrs_names_and_labels() {
        let metrics = Metrics::new("booking");
        metrics.circuit_opened("database");
        metrics.circuit_state("database", CircuitState::Open);
        metrics.retry("database", 2);
        metrics.check_failed("memory");
        let text = metrics.encode();
        for line in [
            r#"circuit_breaker_opened_total{service="database"} 1"#,
            r#"circuit_breaker_state{service="database",state="open"} 1"#,
            r#"circuit_breaker_state{service="database",state="closed"} 0"#,
            r#"retry_attempts_total{service="database",attempt="2"} 1"#,
            r#"degraded_mode_active{service="booking"} 0"#,
            r#"health_check_failures_total{check_name="memory"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis missing in\n{text}");
        }
        assert!(!text.contains("fallback_duration_seconds"), "there was no fallback yet");
        metrics.fallback("catalog", "cache", Duration::from_millis(3));
        assert!(metrics.encode().contains(r#"fallback_duration_seconds_count{service="catalog"} 1"#));
    }
}
