//! The circuit breaker as a [`tower::Layer`].

use super::state::Permit;
use crate::attempt::{Attempt, AttemptError, Repeatable};
use crate::dependency::Dependency;
use crate::dependency_layer::dependency_layer;
use crate::failure::{Failure, FailureKind, Rejection, Verdict};
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::time::Instant;
use tower::Service;

dependency_layer! {
    /// Refuses attempts while the circuit is open, and tells the breaker how each attempt ended. What a layer further in
    /// refuses is no verdict about the dependency.
    CircuitBreakerLayer makes
    /// A service behind a circuit breaker.
    CircuitBreaker
}

impl<S, R, E> Service<Attempt<R>> for CircuitBreaker<S>
where
    S: Service<Attempt<R>, Error = AttemptError<E>>,
    R: Repeatable,
    E: Failure,
{
    type Response = S::Response;
    type Error = AttemptError<E>;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut attempt: Attempt<R>) -> Self::Future {
        let state = match self.dependency.breaker().acquire(attempt.deadline) {
            Ok(permit) => {
                attempt.ticket = permit.ticket();
                let window = RetryWindow::of(self.dependency, &attempt);
                State::Calling {
                    answer: self.inner.call(attempt),
                    permit: Some(permit),
                    window,
                    dependency: self.dependency,
                }
            }
            Err(rejection) => State::Refused { rejection: Some(rejection) },
        };
        ResponseFuture { state }
    }
}

pin_project! {
    /// An attempt whose verdict the breaker gets.
    pub struct ResponseFuture<F>
    {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<F> {
        /// Under way.
        Calling {
            #[pin]
            answer: F,
            permit: Option<Permit<'static>>,
            window: RetryWindow,
            dependency: &'static Dependency,
        },
        /// Not let through.
        Refused { rejection: Option<Rejection> },
    }
}

impl<F, T, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<T, AttemptError<E>>>,
    E: Failure,
{
    type Output = Result<T, AttemptError<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Calling { answer, permit, window, dependency } => {
                let result = ready!(answer.poll(cx));
                if let Some(permit) = permit.take() {
                    permit.finish(verdict(&result, *window, dependency, Instant::now()));
                }
                Poll::Ready(result)
            }
            StateProjection::Refused { rejection } => {
                Poll::Ready(Err(AttemptError::Rejected(rejection.take().unwrap_or(Rejection::HeldOpen))))
            }
        }
    }
}

/// Until when the call may make another attempt at a server that is overloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RetryWindow {
    /// Never: this attempt is the last one.
    None,
    Until(Instant),
    Unlimited,
}

impl RetryWindow {
    #[inline]
    fn of<R: Repeatable>(dependency: &Dependency, attempt: &Attempt<R>) -> Self {
        if !dependency.retries_rate_limited() {
            return Self::None;
        }
        let settings = &dependency.settings().retry;
        if attempt.number > settings.num_retries || !attempt.request.may_repeat(settings) {
            return Self::None;
        }
        attempt.deadline.map_or(Self::Unlimited, Self::Until)
    }

    /// Whether another attempt follows this answer. If none does, as when the retry budget is used up, the answer is a failure:
    /// otherwise a server that is down for hours and says "in a second" would never open a circuit.
    fn allows_another(self, error: &impl Failure, dependency: &Dependency, now: Instant) -> bool {
        let wait = error.retry_after().unwrap_or_default();
        let fits = match self {
            Self::None => false,
            Self::Until(until) => now.checked_add(wait).is_some_and(|next| next < until),
            Self::Unlimited => true,
        };
        let may_wait = fits && matches!(error.kind(), FailureKind::Overloaded(_)) && !error.was_retried();
        may_wait && dependency.has_retry()
    }
}

fn verdict<T, E: Failure>(
    result: &Result<T, AttemptError<E>>,
    window: RetryWindow,
    dependency: &Dependency,
    now: Instant,
) -> Verdict {
    match result {
        Ok(_) => Verdict::Success,
        Err(AttemptError::Failed(error) | AttemptError::FailedUnderShortDeadline(error))
            if window.allows_another(error, dependency, now) =>
        {
            Verdict::Neutral
        }
        Err(AttemptError::Rejected(_) | AttemptError::TimedOut { short_deadline: true, .. }) => Verdict::Neutral,
        Err(AttemptError::TimedOut { .. } | AttemptError::Injected) => Verdict::Failure,
        Err(AttemptError::Failed(error)) => error.verdict(),
        Err(AttemptError::FailedUnderShortDeadline(error)) => match (error.kind(), error.verdict()) {
            // Refusing a connection takes no time, and a failure that was told is one however little time there was. Who only
            // had too little of it says so, and is a timeout.
            (FailureKind::NotSent | FailureKind::Status(_) | FailureKind::Overloaded(_), verdict) => verdict,
            (_, Verdict::Failure) => Verdict::Neutral,
            (_, verdict) => verdict,
        },
    }
}
