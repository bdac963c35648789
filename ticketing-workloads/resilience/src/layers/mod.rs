//! The patterns as [`tower::Layer`]s, in the order in which a call goes through them:
//!
//! ```text
//! fallback( total timeout( retry( circuit breaker( bulkhead( attempt timeout( call ))))))
//! ```
//!
//! [`crate::Dependency::layer`] puts them around a service, all but the fallback, which needs to know what an answer
//! looks like ([`fallback::Fallbacks`]). Between the layers a call is an [`Attempt`]; what the innermost service gets is
//! one, too, so that it can tell the next service how long somebody waits.
//!
//! On its way to a good answer a call allocates nothing in a layer, takes no lock, and clones no reference count; but for a
//! fallback that keeps answers, which puts a copy of each into its cache.

mod attempt_timeout;
mod bulkhead;
mod circuit_breaker;
mod entry;
pub mod fallback;
mod retry;
mod total_timeout;

pub use attempt_timeout::{AttemptTimeout, AttemptTimeoutLayer};
pub use bulkhead::{BulkheadLayer, Compartment};
pub use circuit_breaker::{CircuitBreaker, CircuitBreakerLayer};
pub use entry::{Entry, EntryLayer};
pub use retry::{Attempts, Retry, RetryLayer};
pub use total_timeout::{TotalTimeout, TotalTimeoutLayer};

use crate::breaker::Ticket;
use crate::failure::Rejection;
use crate::{CallError, Dependency};
use contract::RetrySettings;
use std::time::Duration;
use tokio::time::Instant;
use tower::Layer;

/// One attempt at a call.
#[derive(Clone, Debug)]
pub struct Attempt<R> {
    /// What is asked for.
    pub request: R,
    /// From 1.
    pub number: u32,
    /// When nobody waits for the answer any more; `None`: there is no such moment.
    pub deadline: Option<Instant>,
    pub(crate) ticket: Ticket,
}

impl<R> Attempt<R> {
    /// The first attempt.
    pub fn first(request: R, deadline: Option<Instant>) -> Self {
        Self { request, number: 1, deadline, ticket: Ticket::default() }
    }
}

/// How one attempt failed.
#[derive(Debug)]
pub enum AttemptError<E> {
    /// It was not let through.
    Rejected(Rejection),
    /// It had no answer in time.
    TimedOut {
        /// The time.
        after: Duration,
        /// Whether its caller left it less than half of the time that an attempt has.
        hurried: bool,
    },
    /// A drill made it fail.
    Injected,
    /// It failed.
    Failed(E),
    /// It failed, and its caller left it less than half of the time that an attempt has.
    FailedInAHurry(E),
}

impl<E> AttemptError<E> {
    /// As the caller gets it.
    pub(crate) fn after(self, dependency: &Dependency, attempts: u32) -> CallError<E> {
        let dependency = dependency.name().to_owned();
        match self {
            Self::Rejected(rejection) => {
                CallError::Rejected { dependency, rejection, attempts: attempts.saturating_sub(1) }
            }
            Self::TimedOut { after, .. } => CallError::Timeout { dependency, after, attempts },
            Self::Injected => CallError::Injected { dependency, attempts },
            Self::Failed(source) | Self::FailedInAHurry(source) => CallError::Failed { dependency, attempts, source },
        }
    }
}

/// Whether a request may be made again although nobody knows what became of the attempt before.
pub trait Repeatable {
    /// `false`: only if it is certain that the attempt before was never begun.
    fn may_repeat(&self, settings: &RetrySettings) -> bool;
}

/// Work that was declared safe to do more than once by handing it to [`Dependency::call`].
impl Repeatable for () {
    fn may_repeat(&self, _: &RetrySettings) -> bool {
        true
    }
}

/// A service behind all layers but the fallback.
pub type Guarded<S> = TotalTimeout<Retry<CircuitBreaker<Compartment<AttemptTimeout<Entry<S>>>>>>;
/// The part of [`Guarded`] that every attempt goes through.
pub type GuardedAttempt<S> = CircuitBreaker<Compartment<AttemptTimeout<Entry<S>>>>;

/// Puts a service behind all layers but the fallback.
#[derive(Clone, Copy)]
pub struct DependencyLayer(pub(crate) &'static Dependency);

impl DependencyLayer {
    /// The part that every attempt goes through.
    pub(crate) fn attempt<S>(self, service: S) -> GuardedAttempt<S> {
        let innermost = AttemptTimeoutLayer(self.0).layer(EntryLayer(self.0).layer(service));
        CircuitBreakerLayer(self.0).layer(BulkheadLayer(self.0).layer(innermost))
    }
}

impl<S> Layer<S> for DependencyLayer {
    type Service = Guarded<S>;

    fn layer(&self, service: S) -> Guarded<S> {
        TotalTimeoutLayer(self.0).layer(RetryLayer(self.0).layer(self.attempt(service)))
    }
}

/// A layer of one dependency, and the service that it makes.
macro_rules! dependency_layer {
    ($(#[$doc:meta])* $layer:ident makes $(#[$service_doc:meta])* $service:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub struct $layer(
            /// Whose settings and state it works with.
            pub &'static $crate::Dependency,
        );

        $(#[$service_doc])*
        #[derive(Clone)]
        pub struct $service<S> {
            dependency: &'static $crate::Dependency,
            inner: S,
        }

        impl<S> tower::Layer<S> for $layer {
            type Service = $service<S>;

            fn layer(&self, inner: S) -> $service<S> {
                $service { dependency: self.0, inner }
            }
        }
    };
}
use dependency_layer;

/// Takes the service that was polled ready, and leaves a clone in its place.
fn take_ready<S: Clone>(service: &mut S) -> S {
    let clone = service.clone();
    std::mem::replace(service, clone)
}
