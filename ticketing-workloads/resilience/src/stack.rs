//! The patterns put together, in the order in which a call goes through them:
//!
//! ```text
//! fallback( total timeout( retry( circuit breaker( bulkhead( attempt timeout( call ))))))
//! ```
//!
//! [`Dependency::layer`] puts them around a service, all but the fallback, which needs to know what an answer looks like
//! ([`crate::fallback::Fallbacks`]). Between the layers a call is an [`Attempt`]; the innermost service gets one, too, so
//! that it can tell the next service how long its caller waits.
//!
//! On its way to a good answer a call allocates nothing in a layer, takes no lock, and clones no reference count; but for a
//! fallback that keeps answers, which puts a copy of each into its cache.

use crate::attempt::Attempt;
use crate::bulkhead::{BulkheadLayer, BulkheadService};
use crate::circuit_breaker::{CircuitBreaker, CircuitBreakerLayer};
use crate::deadline;
use crate::dependency::Dependency;
use crate::failure::{CallError, Failure};
use crate::fault_injection::{FaultInjection, FaultInjectionLayer};
use crate::retry::{self, Retry, RetryLayer};
use crate::timeout::{AttemptTimeout, AttemptTimeoutLayer, TotalTimeout, TotalTimeoutLayer};
use std::future::Future;
use tokio::time::Instant;
use tower::{Layer, service_fn};

/// A service behind all layers but the fallback.
pub type Guarded<S> = TotalTimeout<Retry<GuardedAttempt<S>>>;
/// The part of [`Guarded`] that every attempt goes through.
pub type GuardedAttempt<S> = CircuitBreaker<BulkheadService<AttemptTimeout<FaultInjection<S>>>>;

/// Puts a service behind all layers but the fallback.
#[derive(Clone, Copy)]
pub struct DependencyLayer(&'static Dependency);

impl DependencyLayer {
    /// The part that every attempt goes through.
    fn attempt<S>(self, service: S) -> GuardedAttempt<S> {
        let innermost = AttemptTimeoutLayer(self.0).layer(FaultInjectionLayer(self.0).layer(service));
        CircuitBreakerLayer(self.0).layer(BulkheadLayer(self.0).layer(innermost))
    }
}

impl<S> Layer<S> for DependencyLayer {
    type Service = Guarded<S>;

    fn layer(&self, service: S) -> Guarded<S> {
        TotalTimeoutLayer(self.0).layer(RetryLayer(self.0).layer(self.attempt(service)))
    }
}

impl Dependency {
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
        let rejected = |rejection| CallError::Rejected { dependency: self.name().to_owned(), rejection, attempts: 0 };
        let deadline = self.call_deadline(deadline::current(), Instant::now()).map_err(rejected)?;
        let service = self.layer().attempt(service_fn(|_: Attempt<()>| call()));
        retry::ResponseFuture::new(self, service, Attempt::first((), Some(deadline))).await
    }
}

#[cfg(test)]
#[path = "stack_tests.rs"]
mod tests;
