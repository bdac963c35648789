//! What travels between the layers: one attempt at a call, and how it failed.

use crate::failure::{CallError, Rejection};
use contract::RetrySettings;
use std::time::Duration;
use tokio::time::Instant;

/// One attempt at a call.
#[derive(Clone, Debug)]
pub struct Attempt<R> {
    /// The request.
    pub request: R,
    /// Number of this attempt among those of its call, from 1.
    pub number: u32,
    /// When its caller stops waiting; `None`: it has no deadline.
    pub deadline: Option<Instant>,
    pub(crate) ticket: Ticket,
}

impl<R> Attempt<R> {
    /// The first attempt.
    pub fn first(request: R, deadline: Option<Instant>) -> Self {
        Self { request, number: 1, deadline, ticket: Ticket::default() }
    }
}

/// Identifies an attempt to the circuit breaker: the generation of the breaker in which it was let through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ticket(pub(crate) u64);

/// How one attempt failed.
#[derive(Debug)]
pub enum AttemptError<E> {
    /// It was refused by the circuit breaker, the bulkhead or the deadline.
    Rejected(Rejection),
    /// It had no answer in time.
    TimedOut {
        /// The time that it was given.
        after: Duration,
        /// Whether its caller left it less than half of the time that an attempt has.
        short_deadline: bool,
    },
    /// A drill made it fail.
    Injected,
    /// The service answered with an error.
    Failed(E),
    /// As [`AttemptError::Failed`], and its caller left it less than half of the time that an attempt has.
    FailedUnderShortDeadline(E),
}

impl<E> AttemptError<E> {
    /// The error that the caller of the dependency gets.
    pub(crate) fn after(self, dependency: &str, attempts: u32) -> CallError<E> {
        let dependency = dependency.to_owned();
        match self {
            Self::Rejected(rejection) => {
                CallError::Rejected { dependency, rejection, attempts: attempts.saturating_sub(1) }
            }
            Self::TimedOut { after, .. } => CallError::Timeout { dependency, after, attempts },
            Self::Injected => CallError::Injected { dependency, attempts },
            Self::Failed(source) | Self::FailedUnderShortDeadline(source) => {
                CallError::Failed { dependency, attempts, source }
            }
        }
    }
}

/// Whether a request may be repeated although the outcome of the attempt before is unknown.
pub trait Repeatable {
    /// `false`: only if it is certain that the attempt before was never begun.
    fn may_repeat(&self, settings: &RetrySettings) -> bool;
}

/// Work that was declared safe to do more than once by handing it to [`crate::Dependency::call`].
impl Repeatable for () {
    fn may_repeat(&self, _: &RetrySettings) -> bool {
        true
    }
}
