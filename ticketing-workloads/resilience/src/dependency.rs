//! One thing that the workload calls, with all its layers.

use crate::breaker::Breaker;
use crate::budget::RetryBudget;
use crate::bulkhead::Bulkhead;
use crate::clock::in_words;
use crate::failure::{CallError, Failure, FailureKind, Rejection, Verdict};
use crate::metrics::Metrics;
use crate::retry;
use arc_swap::ArcSwap;
use contract::{CircuitReport, CircuitState, DependencySettings, TimeoutSettings};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// A dependency. Calls go through [`Dependency::call`].
pub struct Dependency {
    name: String,
    live: ArcSwap<Live>,
    breaker: Arc<Breaker>,
    budget: RetryBudget,
    metrics: Arc<Metrics>,
}

/// What a call runs by; taken once, so that a call never mixes two configurations.
struct Live {
    settings: DependencySettings,
    bulkhead: Option<Arc<Bulkhead>>,
}

/// How one attempt failed.
enum AttemptError<E> {
    Rejected(Rejection),
    TimedOut(Duration),
    Failed(E),
}

impl Dependency {
    pub(crate) fn new(name: &str, metrics: Arc<Metrics>) -> Self {
        let settings = DependencySettings::default();
        metrics.circuit_state(name, CircuitState::Closed);
        let breaker = Breaker::new(settings.circuit_breaker.clone(), Box::new(on_change(name, Arc::clone(&metrics))));
        Self {
            name: name.to_owned(),
            live: ArcSwap::from_pointee(Live { settings, bulkhead: None }),
            breaker,
            budget: RetryBudget::new(),
            metrics,
        }
    }

    /// Takes new settings; the breaker keeps its state, calls under way end by what they started with.
    pub(crate) fn configure(&self, settings: DependencySettings, bulkhead: Option<Arc<Bulkhead>>) {
        self.breaker.configure(settings.circuit_breaker.clone());
        self.budget.configure(settings.retry.budget.as_ref());
        self.live.store(Arc::new(Live { settings, bulkhead }));
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The settings in force.
    pub fn settings(&self) -> DependencySettings {
        self.live.load().settings.clone()
    }

    /// Its deadlines in force.
    pub fn timeouts(&self) -> TimeoutSettings {
        self.live.load().settings.timeout.clone()
    }

    /// The state of its circuit.
    pub fn circuit(&self) -> CircuitReport {
        self.breaker.report()
    }

    /// Ends a break of its circuit now; the next call is a trial. For when the cause was removed.
    pub fn end_break(&self) {
        self.breaker.end_break();
    }

    /// Calls it. `call` is made once per attempt, so it must be safe to make more than once.
    pub async fn call<T, E, F, Fut>(&self, call: F) -> Result<T, CallError<E>>
    where
        E: Failure,
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.run(None, call).await
    }

    /// Calls it for a caller who waits until `deadline` at most, whatever the settings allow.
    pub async fn call_until<T, E, F, Fut>(&self, deadline: Instant, call: F) -> Result<T, CallError<E>>
    where
        E: Failure,
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.run(Some(deadline), call).await
    }

    /// Calls it; when no answer can be had, `fallback` answers. A business "no" is an answer.
    pub async fn call_or_else<T, E, F, Fut, G, Back>(&self, call: F, fallback: G) -> Result<T, CallError<E>>
    where
        E: Failure,
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
        G: FnOnce(CallError<E>) -> Back,
        Back: Future<Output = Result<T, CallError<E>>>,
    {
        match self.run(None, call).await {
            Err(CallError::Failed { source, dependency, attempts }) if source.kind() == FailureKind::Business => {
                Err(CallError::Failed { dependency, attempts, source })
            }
            Err(error) => {
                tracing::warn!(dependency = %self.name, %error, "falling back");
                let started = Instant::now();
                let answer = fallback(error).await;
                self.metrics.fallback(&self.name, started.elapsed());
                answer
            }
            answer => answer,
        }
    }

    async fn run<T, E, F, Fut>(&self, until: Option<Instant>, mut call: F) -> Result<T, CallError<E>>
    where
        E: Failure,
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let live = self.live.load_full();
        let retry = &live.settings.retry;
        let own = Instant::now() + Duration::from_millis(live.settings.timeout.request_ms);
        let deadline = until.map_or(own, |until| until.min(own));
        self.budget.record_call();
        let mut attempts = 0;
        loop {
            let error = match self.attempt(&live, deadline, &mut call).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            attempts += 1;
            let kind = match &error {
                AttemptError::Rejected(_) => None,
                AttemptError::TimedOut(_) => Some(FailureKind::Timeout),
                AttemptError::Failed(error) => Some(error.kind()),
            };
            let wait = kind.and_then(|kind| retry::next(retry, kind, attempts, deadline, rand::random()));
            let Some(wait) = wait.filter(|_| self.budget.take_retry(retry.budget.as_ref())) else {
                return Err(self.call_error(error, attempts));
            };
            self.metrics.retry(&self.name, attempts);
            tracing::warn!(dependency = %self.name, attempt = attempts, ?kind, wait = %in_words(wait), "retrying");
            tokio::time::sleep(wait).await;
        }
    }

    async fn attempt<T, E, F, Fut>(&self, live: &Live, deadline: Instant, call: &mut F) -> Result<T, AttemptError<E>>
    where
        E: Failure,
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let mut permit = self.breaker.acquire(deadline).map_err(AttemptError::Rejected)?;
        // Dropping the permit on a rejection tells the breaker nothing: the call was never made.
        let _place = match &live.bulkhead {
            Some(bulkhead) => Some(bulkhead.enter(deadline).await.map_err(AttemptError::Rejected)?),
            None => None,
        };
        let started = Instant::now();
        let attempt_deadline = deadline.min(started + Duration::from_millis(live.settings.timeout.per_try_ms));
        permit.start(attempt_deadline);
        match tokio::time::timeout_at(attempt_deadline, call()).await {
            Ok(Ok(answer)) => {
                permit.finish(Verdict::Success);
                Ok(answer)
            }
            Ok(Err(error)) => {
                permit.finish(error.kind().verdict());
                Err(AttemptError::Failed(error))
            }
            Err(_) => {
                permit.finish(Verdict::Failure);
                Err(AttemptError::TimedOut(attempt_deadline - started))
            }
        }
    }

    fn call_error<E>(&self, error: AttemptError<E>, attempts: u32) -> CallError<E> {
        let dependency = self.name.clone();
        match error {
            AttemptError::Rejected(rejection) => CallError::Rejected { dependency, rejection },
            AttemptError::TimedOut(after) => CallError::Timeout { dependency, after, attempts },
            AttemptError::Failed(source) => CallError::Failed { dependency, attempts, source },
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
            _ => tracing::info!(dependency = %name, why, "circuit closed"),
        }
    }
}

#[cfg(test)]
#[path = "dependency_tests.rs"]
mod tests;
