//! One thing that the workload calls: its settings and the state of its patterns.

use crate::bulkhead::{Bulkhead, Bulkheads};
use crate::circuit_breaker::{Breaker, Totals};
use crate::failure::Rejection;
use crate::fault_injection::Faults;
use crate::metrics::{CallFigures, Figures, Metrics};
use crate::retry::RetryBudget;
use arc_swap::ArcSwap;
use contract::{CircuitReport, CircuitState, DependencySettings, RetryOn, TimeoutSettings};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// A dependency. It lives as long as the process, so that a call needs no count of who still uses it: a workload
/// declares what it calls once, when it starts.
pub struct Dependency {
    name: String,
    settings: ArcSwap<DependencySettings>,
    request_ms: AtomicU64,
    per_try_ms: AtomicU64,
    has_fallback: AtomicBool,
    retries_rate_limited: AtomicBool,
    breaker: Breaker,
    budget: RetryBudget,
    pub(crate) bulkheads: &'static Bulkheads,
    /// Index in `bulkheads`.
    bulkhead: AtomicUsize,
    keeps_slots: AtomicBool,
    faults: Faults,
    timeouts: AtomicU64,
    metrics: Arc<Metrics>,
}

impl Dependency {
    /// A dependency on built-in defaults.
    pub fn new(name: &str, bulkheads: &'static Bulkheads, metrics: &Arc<Metrics>) -> &'static Self {
        let settings = DependencySettings::default();
        metrics.circuit_state(name, CircuitState::Closed);
        let dependency = Self {
            name: name.to_owned(),
            request_ms: AtomicU64::new(settings.timeout.request_ms),
            per_try_ms: AtomicU64::new(settings.timeout.per_try_ms),
            has_fallback: AtomicBool::new(false),
            retries_rate_limited: AtomicBool::new(settings.retry.retry_on.contains(&RetryOn::RateLimited)),
            breaker: Breaker::new(settings.circuit_breaker.clone(), Box::new(on_change(name, Arc::clone(metrics)))),
            settings: ArcSwap::from_pointee(settings),
            budget: RetryBudget::new(),
            bulkheads,
            bulkhead: AtomicUsize::new(Bulkheads::NONE),
            keeps_slots: AtomicBool::new(false),
            faults: Faults::default(),
            timeouts: AtomicU64::new(0),
            metrics: Arc::clone(metrics),
        };
        let dependency: &'static Self = Box::leak(Box::new(dependency));
        metrics.watch(dependency);
        dependency
    }

    /// Takes new settings; the breaker keeps its state, calls under way keep their deadlines and slots. `bulkhead` is
    /// the index of the bulkhead that the settings name.
    pub fn configure(&self, settings: DependencySettings, bulkhead: usize) {
        self.breaker.configure(settings.circuit_breaker.clone());
        self.budget.configure(settings.retry.budget.as_ref());
        self.request_ms.store(settings.timeout.request_ms, Ordering::Relaxed);
        self.per_try_ms.store(settings.timeout.per_try_ms, Ordering::Relaxed);
        self.has_fallback.store(!settings.fallback.is_empty(), Ordering::Relaxed);
        let retries_rate_limited = settings.retry.retry_on.contains(&RetryOn::RateLimited);
        self.retries_rate_limited.store(retries_rate_limited, Ordering::Relaxed);
        let before = self.bulkhead();
        self.bulkhead.store(bulkhead, Ordering::Relaxed);
        if self.keeps_slots() && !before.zip(self.bulkhead()).is_some_and(|(before, now)| std::ptr::eq(before, now)) {
            // Of the one that it had, others may be left.
            before.inspect(|before| before.hold_back(None));
        }
        if self.keeps_slots() {
            self.bulkhead().inspect(|bulkhead| bulkhead.keep_slots());
        }
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

    /// From now on, its bulkhead keeps slots for the more important calls ([`crate::priority`]), whichever bulkhead the policy
    /// gives it. For a dependency that is called for all kinds of reasons; one whose calls are all alike needs them all.
    pub fn keep_slots(&self) {
        self.keeps_slots.store(true, Ordering::Relaxed);
        self.bulkhead().inspect(|bulkhead| bulkhead.keep_slots());
    }

    /// Whether it does.
    pub fn keeps_slots(&self) -> bool {
        self.keeps_slots.load(Ordering::Relaxed)
    }

    /// Lets at most so many calls of it through at once that are not of the highest priority ([`AdaptiveLimit`] knows how
    /// many); `None`: as many as there are slots for.
    ///
    /// [`AdaptiveLimit`]: crate::bulkhead::AdaptiveLimit
    pub fn hold_back(&self, most: Option<u32>) {
        self.bulkhead().inspect(|bulkhead| bulkhead.hold_back(most));
    }

    /// Calls of it under way that are not of the highest priority.
    pub fn less_important(&self) -> u32 {
        self.bulkhead().map_or(0, Bulkhead::less_important)
    }

    /// Most calls of it at once, if it has a bulkhead.
    pub fn max_concurrent(&self) -> Option<u32> {
        self.bulkhead().map(Bulkhead::max_concurrent)
    }

    /// The state of its circuit.
    pub fn circuit(&self) -> CircuitReport {
        self.breaker.report()
    }

    /// Ends a break of its circuit now; the next call is a trial. For when the cause was removed.
    pub fn end_break(&self) {
        self.breaker.end_break();
    }

    /// The faults that drills inject into it.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Counts an endpoint that is left out for a while because it fails.
    pub fn endpoint_ejected(&self) {
        self.metrics.endpoint_ejected(&self.name);
    }

    /// Tells how many of its endpoints are left out now.
    pub fn endpoints_ejected(&self, now: usize) {
        self.metrics.endpoints_ejected(&self.name, now);
    }

    /// When a call that starts now ends at the latest, for a caller who waits until `until`.
    pub(crate) fn call_deadline(&self, until: Option<Instant>, now: Instant) -> Result<Instant, Rejection> {
        let own = now + self.request_time();
        match until {
            Some(until) if until <= now => Err(Rejection::TooLate),
            Some(until) => Ok(own.min(until)),
            None => Ok(own),
        }
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

    #[inline]
    pub(crate) fn retries_rate_limited(&self) -> bool {
        self.retries_rate_limited.load(Ordering::Relaxed)
    }

    /// Counts an attempt without an answer in time, where the attempt itself finds that out before its timeout does.
    pub fn record_timeout(&self) {
        self.timeouts.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes one retry from the budget.
    pub(crate) fn take_retry(&self) -> bool {
        self.budget.take_retry(self.settings.load().retry.budget.as_ref(), self.attempts())
    }

    /// Whether the budget has a retry for an attempt that is about to be counted.
    pub(crate) fn has_retry(&self) -> bool {
        self.budget.has_retry(self.settings.load().retry.budget.as_ref(), self.attempts() + 1)
    }

    /// Tells the retry budget how many calls there were so far.
    pub(crate) fn update_budget(&self) {
        self.budget.update(self.attempts());
    }

    fn attempts(&self) -> u64 {
        let Totals { successes, failures, ignored, rejected } = self.breaker.totals();
        successes + failures + ignored + rejected
    }
}

impl CallFigures for Dependency {
    fn name(&self) -> &str {
        &self.name
    }

    fn figures(&self) -> Figures {
        Figures {
            calls: self.breaker.totals(),
            timeouts: self.timeouts.load(Ordering::Relaxed),
            retries_refused: self.budget.refused(),
        }
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
