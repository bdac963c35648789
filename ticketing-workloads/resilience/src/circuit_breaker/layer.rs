//! The circuit breaker as a [`tower::Layer`].

use super::state::Permit;
use crate::attempt::{Attempt, AttemptError};
use crate::dependency_layer::dependency_layer;
use crate::failure::{Failure, FailureKind, Rejection, Verdict};
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
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
                State::Calling { answer: self.inner.call(attempt), permit: Some(permit) }
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
            StateProjection::Calling { answer, permit } => {
                let result = ready!(answer.poll(cx));
                if let Some(permit) = permit.take() {
                    permit.finish(verdict(&result));
                }
                Poll::Ready(result)
            }
            StateProjection::Refused { rejection } => {
                Poll::Ready(Err(AttemptError::Rejected(rejection.take().unwrap_or(Rejection::HeldOpen))))
            }
        }
    }
}

fn verdict<T, E: Failure>(result: &Result<T, AttemptError<E>>) -> Verdict {
    match result {
        Ok(_) => Verdict::Success,
        Err(AttemptError::Rejected(_) | AttemptError::TimedOut { short_deadline: true, .. }) => Verdict::Neutral,
        Err(AttemptError::TimedOut { .. } | AttemptError::Injected) => Verdict::Failure,
        Err(AttemptError::Failed(error)) => error.verdict(),
        Err(AttemptError::FailedUnderShortDeadline(error)) => match (error.kind(), error.verdict()) {
            // Refusing a connection takes no time, and a failure that was told is one however little time there was. Who only
            // had too little of it says so, and is a timeout.
            (FailureKind::NotSent | FailureKind::Status(_), verdict) => verdict,
            (_, Verdict::Failure) => Verdict::Neutral,
            (_, verdict) => verdict,
        },
    }
}
