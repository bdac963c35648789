//! One thing that the workload calls: its settings and the state of its patterns.

use crate::breaker::{Breaker, Totals};
use crate::budget::RetryBudget;
use crate::bulkhead::{Bulkhead, Slots};
use crate::deadline;
use crate::failure::{CallError, Failure, Rejection};
use crate::faults::Faults;
use crate::layers::{Attempt, Attempts, DependencyLayer};
use crate::metrics::Metrics;
use arc_swap::ArcSwap;
use contract::{CircuitReport, CircuitState, DependencySettings, TimeoutSettings};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tower::service_fn;

/// A dependency. It lives as long as the process, so that a call needs no count of who still uses it: a workload
/// declares what it calls once, when it starts.
pub struct Dependency {
    name: String,
    settings: ArcSwap<DependencySettings>,
    request_ms: AtomicU64,
    per_try_ms: AtomicU64,
    has_fallback: AtomicBool,
    breaker: Breaker,
    budget: RetryBudget,
    bulkheads: &'static Slots,
    /// Number of the bulkhead in `bulkheads`.
    bulkhead: AtomicUsize,
    faults: Faults,
    timeouts: AtomicU64,
    metrics: Arc<Metrics>,
}

impl Dependency {
    /// A dependency on built-in defaults.
    pub fn new(name: &str, bulkheads: &'static Slots, metrics: &Arc<Metrics>) -> &'static Self {
        let settings = DependencySettings::default();
        metrics.circuit_state(name, CircuitState::Closed);
        let dependency = Self {
            name: name.to_owned(),
            request_ms: AtomicU64::new(settings.timeout.request_ms),
            per_try_ms: AtomicU64::new(settings.timeout.per_try_ms),
            has_fallback: AtomicBool::new(false),
            breaker: Breaker::new(settings.circuit_breaker.clone(), Box::new(on_change(name, Arc::clone(metrics)))),
            settings: ArcSwap::from_pointee(settings),
            budget: RetryBudget::new(),
            bulkheads,
            bulkhead: AtomicUsize::new(Slots::NONE),
            faults: Faults::default(),
            timeouts: AtomicU64::new(0),
            metrics: Arc::clone(metrics),
        };
        let dependency: &'static Self = Box::leak(Box::new(dependency));
        metrics.watch(dependency);
        dependency
    }

    /// Takes new settings; the breaker keeps its state, calls under way keep their deadlines and places. `bulkhead` is
    /// the slot of the bulkhead that the settings name.
    pub fn configure(&self, settings: DependencySettings, bulkhead: usize) {
        self.breaker.configure(settings.circuit_breaker.clone());
        self.budget.configure(settings.retry.budget.as_ref());
        self.request_ms.store(settings.timeout.request_ms, Ordering::Relaxed);
        self.per_try_ms.store(settings.timeout.per_try_ms, Ordering::Relaxed);
        self.has_fallback.store(!settings.fallback.is_empty(), Ordering::Relaxed);
        self.bulkhead.store(bulkhead, Ordering::Relaxed);
        self.settings.store(Arc::new(settings));
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<DependencySettings> {
        self.settings.load_full()
    }

    /// Its deadlines in force.
    pub fn timeouts(&self) -> TimeoutSettings {
        self.settings.load().timeout.clone()
    }

    /// The state of its circuit.
    pub fn circuit(&self) -> CircuitReport {
        self.breaker.report()
    }

    /// Ends a break of its circuit now; the next call is a trial. For when the cause was removed.
    pub fn end_break(&self) {
        self.breaker.end_break();
    }

    /// What drills do to it.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Puts a service behind the layers of this dependency, all but the fallback.
    pub fn layer(&'static self) -> DependencyLayer {
        DependencyLayer(self)
    }

    /// Calls it. `call` is made once per attempt, so it must be safe to make more than once.
    ///
    /// ```
    /// # use resilience::{Failure, FailureKind, Resilience};
    /// #[derive(Debug, thiserror::Error)]
    /// #[error("refused")]
    /// struct Refused;
    ///
    /// impl Failure for Refused {
    ///     fn kind(&self) -> FailureKind {
    ///         FailureKind::NotSent
    ///     }
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let id = serde_json::from_str(r#"{"namespace": "ticketing", "kind": "Deployment", "name": "shop"}"#)?;
    /// let shop = Resilience::builder(id).dependency("prices").build();
    /// let prices = shop.dependency("prices").ok_or("not declared")?;
    /// assert_eq!(prices.call(async || Ok::<_, Refused>(4_200)).await?, 4_200);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn call<T, E, F, Fut>(&'static self, call: F) -> Result<T, CallError<E>>
    where
        E: Failure,
        F: Fn() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let rejected = |rejection| CallError::Rejected { dependency: self.name.clone(), rejection, attempts: 0 };
        let deadline = self.call_deadline(deadline::current(), Instant::now()).map_err(rejected)?;
        let service = self.layer().attempt(service_fn(|_: Attempt<()>| call()));
        Attempts::new(self, service, Attempt::first((), Some(deadline))).await
    }

    pub(crate) fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    #[inline]
    pub(crate) fn bulkhead(&self) -> Option<&'static Bulkhead> {
        self.bulkheads.get(self.bulkhead.load(Ordering::Relaxed))
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    #[inline]
    pub(crate) fn request_time(&self) -> Duration {
        Duration::from_millis(self.request_ms.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn attempt_time(&self) -> Duration {
        Duration::from_millis(self.per_try_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn has_fallback(&self) -> bool {
        self.has_fallback.load(Ordering::Relaxed)
    }

    pub(crate) fn note_timeout(&self) {
        self.timeouts.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one retry from the budget.
    pub(crate) fn take_retry(&self) -> bool {
        self.budget.take_retry(self.settings.load().retry.budget.as_ref(), self.attempts())
    }

    /// Lets the budget know of the calls so far.
    pub(crate) fn look(&self) {
        self.budget.look(self.attempts());
    }

    fn attempts(&self) -> u64 {
        let Totals { successes, failures, ignored, rejected } = self.breaker.totals();
        successes + failures + ignored + rejected
    }

    /// What happened so far, for the metrics.
    pub(crate) fn figures(&self) -> Figures {
        Figures {
            calls: self.breaker.totals(),
            timeouts: self.timeouts.load(Ordering::Relaxed),
            retries_refused: self.budget.refused(),
        }
    }
}

/// Figures of one dependency since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Figures {
    pub calls: Totals,
    pub timeouts: u64,
    pub retries_refused: u64,
}

impl Rejection {
    /// Whether it comes from the circuit.
    pub fn is_open_circuit(&self) -> bool {
        matches!(self, Self::CircuitOpen { .. } | Self::TrialsUnderWay { .. } | Self::HeldOpen)
    }
}

fn on_change(name: &str, metrics: Arc<Metrics>) -> impl Fn(CircuitState, &str) + Send + Sync + 'static {
    let name = name.to_owned();
    move |state, why| {
        metrics.circuit_state(&name, state);
        match state {
            CircuitState::Open => {
                metrics.circuit_opened(&name);
                tracing::warn!(dependency = %name, why, "circuit opened");
            }
            CircuitState::HalfOpen => tracing::info!(dependency = %name, why, "circuit half-open"),
            _ => {
                metrics.circuit_reset(&name);
                tracing::info!(dependency = %name, why, "circuit closed");
            }
        }
    }
}

#[cfg(test)]
#[path = "dependency_tests.rs"]
mod tests;
