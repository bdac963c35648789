//! What can go wrong with a call, and what each kind means to the patterns.

use crate::clock::in_words;
use contract::{RetryOn, RetrySettings};
use std::time::Duration;

/// How an error of a call is to be taken. Implemented by the error type of whatever makes the call.
pub trait Failure: std::error::Error {
    /// What it means to retry and circuit breaker.
    fn kind(&self) -> FailureKind;

    /// What it says to the circuit breaker.
    fn verdict(&self) -> Verdict {
        self.kind().verdict()
    }

    /// How long the other side asks to wait before the next attempt (RFC 9110 §10.2.3), if it does: seconds, or until a date.
    fn retry_after(&self) -> Option<Duration> {
        None
    }

    /// Whether the other side says that it has retried already: then its callers do not retry on top.
    fn was_retried(&self) -> bool {
        false
    }
}

/// Kinds of failure, by what they mean to retry and circuit breaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The call worked; the answer is a "no" that the caller asked for, such as too few tickets. Never retried.
    Business,
    /// No answer in time.
    Timeout,
    /// Nothing reached the other side, such as a refused connection. Retried as [`FailureKind::ConnectFailure`], also
    /// where a request must not be made twice.
    NotSent,
    /// The connection broke before an answer.
    ConnectFailure,
    /// This side gave the connection up, as a recovery action does; retried as [`FailureKind::ConnectFailure`].
    GivenUp,
    /// An HTTP status that is not a success.
    Status(u16),
    /// The other side says that it refuses because of its load.
    RateLimited,
    /// The same by an HTTP status: 429, or 503 with `Retry-After`. To the circuit breaker, the 503 is a failure like any other
    /// unless the policy has it waited for (`retryOn: [RateLimited]`) and there is time for another attempt.
    Overloaded(u16),
    /// The database chose this transaction as the victim of a deadlock, or could not serialise it.
    Deadlock,
    /// Another transaction changed the row first (optimistic locking).
    VersionConflict,
    /// Anything else that went wrong on the other side.
    Other,
}

/// What a result tells about the health of the dependency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The dependency works.
    Success,
    /// The dependency does not work.
    Failure,
    /// The result says nothing about the dependency.
    Neutral,
}

impl FailureKind {
    /// What it says to the circuit breaker. A conflict or a deadlock is the answer of a dependency that works, so a
    /// popular event must not open the circuit to the database.
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Business | Self::Deadlock | Self::VersionConflict => Verdict::Success,
            // What this side did itself says nothing, or a reset of connections would open the circuit that it is to heal.
            Self::RateLimited | Self::GivenUp => Verdict::Neutral,
            Self::Overloaded(status) if status < 500 => Verdict::Neutral,
            Self::Status(status) if status < 500 => Verdict::Success,
            Self::Timeout
            | Self::NotSent
            | Self::ConnectFailure
            | Self::Status(_)
            | Self::Overloaded(_)
            | Self::Other => Verdict::Failure,
        }
    }

    /// Whether the settings ask for another attempt after it.
    pub fn is_retried(self, settings: &RetrySettings) -> bool {
        let on = |kind| settings.retry_on.contains(&kind);
        match self {
            Self::Business | Self::Other => false,
            Self::Timeout => on(RetryOn::Timeout),
            Self::NotSent | Self::ConnectFailure | Self::GivenUp => on(RetryOn::ConnectFailure),
            Self::RateLimited => on(RetryOn::RateLimited),
            Self::Deadlock => on(RetryOn::Deadlock),
            Self::VersionConflict => on(RetryOn::VersionConflict),
            Self::Overloaded(status) => on(RetryOn::RateLimited) || Self::Status(status).is_retried(settings),
            Self::Status(status) => {
                settings.http_status_codes.contains(&status) || (status >= 500 && on(RetryOn::ServerError))
            }
        }
    }
}

/// A call that was not let through. It is never retried, and says nothing about the dependency.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The caller no longer waits for the answer.
    #[error("the caller's deadline has passed")]
    TooLate,
    /// The circuit is open.
    #[error("the circuit is open; next trial call in {}", in_words(*.retry_in))]
    CircuitOpen {
        /// Time until a trial call may go through.
        retry_in: Duration,
    },
    /// The circuit is half-open and its trial calls are under way.
    #[error("the circuit is half-open and {trials} trial call(s) are in flight")]
    TrialsUnderWay {
        /// Trial calls in flight.
        trials: u32,
    },
    /// A person holds the circuit open.
    #[error("the circuit is held open by manualState: Open")]
    HeldOpen,
    /// The bulkhead and its queue are full.
    #[error("the bulkhead is full ({in_use} calls in flight, {queued} waiting)")]
    BulkheadFull {
        /// Calls under way.
        in_use: u32,
        /// Calls waiting.
        queued: u32,
    },
    /// It waited for a bulkhead slot for as long as it may.
    #[error("timed out after {} waiting for a bulkhead slot", in_words(*.waited))]
    BulkheadWait {
        /// How long the call waited.
        waited: Duration,
    },
    /// Calls that are more important have the slots, or its place in the queue.
    #[error("gave way to more important calls after {} in the queue of the bulkhead", in_words(*.waited))]
    Shed {
        /// How long the call waited.
        waited: Duration,
    },
}

impl Rejection {
    /// Whether it comes from the circuit.
    pub fn is_open_circuit(&self) -> bool {
        matches!(self, Self::CircuitOpen { .. } | Self::TrialsUnderWay { .. } | Self::HeldOpen)
    }

    /// Whether it comes from the bulkhead: there are only too many calls at once, and nothing has failed.
    pub fn is_full_bulkhead(&self) -> bool {
        matches!(self, Self::BulkheadFull { .. } | Self::BulkheadWait { .. } | Self::Shed { .. })
    }
}

/// Why a call through a [`crate::Dependency`] gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError<E> {
    /// It was not let through.
    #[error("{dependency}: not called: {rejection}")]
    Rejected {
        /// Name of the dependency.
        dependency: String,
        /// Which layer refused it, and why.
        rejection: Rejection,
        /// Attempts that were made before.
        attempts: u32,
    },
    /// The last attempt had no answer within its time, or the total time ran out.
    #[error("{dependency}: timed out after {} and {attempts} attempt(s)", in_words(*.after))]
    Timeout {
        /// Name of the dependency.
        dependency: String,
        /// The time that ran out: of the attempt, or of the whole call.
        after: Duration,
        /// Attempts that were made.
        attempts: u32,
    },
    /// A drill made the last attempt fail.
    #[error("{dependency}: failed after {attempts} attempt(s) by fault injection")]
    Injected {
        /// Name of the dependency.
        dependency: String,
        /// Attempts that were made.
        attempts: u32,
    },
    /// It failed, and so did its fallbacks.
    #[error("{reason}; no fallback had an answer")]
    Unanswered {
        /// Name of the dependency.
        dependency: String,
        /// How it failed, in words.
        reason: String,
    },
    /// The last attempt failed.
    #[error("{dependency}: failed after {attempts} attempt(s): {source}")]
    Failed {
        /// Name of the dependency.
        dependency: String,
        /// Attempts that were made.
        attempts: u32,
        /// The last failure.
        source: E,
    },
}

impl<E: Failure> CallError<E> {
    /// How long the caller should wait before it asks again, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Rejected { rejection: Rejection::CircuitOpen { retry_in }, .. } => Some(*retry_in),
            Self::Failed { source, .. } => source.retry_after(),
            _ => None,
        }
    }

    /// Whether it is certain that nothing ever reached the dependency, not even by an earlier attempt.
    pub fn never_reached(&self) -> bool {
        match self {
            Self::Rejected { attempts, .. } => *attempts == 0,
            Self::Injected { attempts, .. } => *attempts <= 1,
            Self::Failed { source, attempts, .. } => *attempts <= 1 && source.kind() == FailureKind::NotSent,
            Self::Timeout { .. } | Self::Unanswered { .. } => false,
        }
    }

    /// Whether it is an answer that the caller asked for, only not the one hoped for.
    pub fn is_business(&self) -> bool {
        matches!(self, Self::Failed { source, .. } if source.kind() == FailureKind::Business)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(on: &[RetryOn], codes: &[u16]) -> RetrySettings {
        RetrySettings {
            retry_on: on.iter().copied().collect(),
            http_status_codes: codes.iter().copied().collect(),
            ..Default::default()
        }
    }

    #[rstest::rstest]
    #[case::listed(FailureKind::Timeout, &[RetryOn::Timeout], true)]
    #[case::not_listed(FailureKind::Timeout, &[RetryOn::Deadlock], false)]
    #[case::deadlock(FailureKind::Deadlock, &[RetryOn::Deadlock], true)]
    #[case::business(FailureKind::Business, &[RetryOn::Timeout, RetryOn::VersionConflict], false)]
    #[case::server_error(FailureKind::Status(502), &[RetryOn::ServerError], true)]
    #[case::client_error(FailureKind::Status(404), &[RetryOn::ServerError], false)]
    #[case::too_many(FailureKind::Overloaded(429), &[RetryOn::RateLimited], true)]
    #[case::too_many_is_no_server_error(FailureKind::Overloaded(429), &[RetryOn::ServerError], false)]
    #[case::busy(FailureKind::Overloaded(503), &[RetryOn::RateLimited], true)]
    #[case::busy_is_a_server_error_too(FailureKind::Overloaded(503), &[RetryOn::ServerError], true)]
    #[case::busy_and_not_listed(FailureKind::Overloaded(503), &[RetryOn::Timeout], false)]
    #[case::unknown_word(FailureKind::Other, &[RetryOn::Unknown], false)]
    fn retried(#[case] kind: FailureKind, #[case] on: &[RetryOn], #[case] expected: bool) {
        assert_eq!(kind.is_retried(&settings(on, &[])), expected);
    }

    #[derive(Debug, thiserror::Error)]
    #[error("{0:?}")]
    struct Kind(FailureKind);

    impl Failure for Kind {
        fn kind(&self) -> FailureKind {
            self.0
        }
    }

    #[rstest::rstest]
    #[case::refused_at_once(rejected(0), true)]
    #[case::refused_after_an_attempt(rejected(1), false)]
    #[case::never_sent(failed(FailureKind::NotSent, 1), true)]
    #[case::never_sent_the_second_time(failed(FailureKind::NotSent, 2), false)]
    #[case::broken(failed(FailureKind::ConnectFailure, 1), false)]
    #[case::timeout(CallError::Timeout { dependency: String::new(), after: Duration::ZERO, attempts: 1 }, false)]
    #[case::drill(CallError::Injected { dependency: String::new(), attempts: 1 }, true)]
    #[case::drill_after_an_attempt(CallError::Injected { dependency: String::new(), attempts: 2 }, false)]
    fn certainly_never_reached(#[case] error: CallError<Kind>, #[case] expected: bool) {
        assert_eq!(error.never_reached(), expected);
    }

    fn rejected(attempts: u32) -> CallError<Kind> {
        CallError::Rejected { dependency: String::new(), rejection: Rejection::HeldOpen, attempts }
    }

    fn failed(kind: FailureKind, attempts: u32) -> CallError<Kind> {
        CallError::Failed { dependency: String::new(), source: Kind(kind), attempts }
    }

    #[test]
    fn a_listed_status_is_retried_whatever_its_class() {
        for kind in [FailureKind::Status(409), FailureKind::Overloaded(429), FailureKind::Overloaded(503)] {
            assert!(kind.is_retried(&settings(&[], &[409, 429, 503])), "{kind:?}");
        }
    }
}
