//! Fault injection as a [`tower::Layer`], around the service itself.

use super::state::Fault;
use crate::attempt::{Attempt, AttemptError};
use crate::dependency_layer::{dependency_layer, take_ready};
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::time::Sleep;
use tower::Service;

dependency_layer! {
    /// Passes attempts to the service, or to the fault of a drill.
    FaultInjectionLayer makes
    /// A service that drills can disturb.
    FaultInjection
}

impl<S, R> Service<Attempt<R>> for FaultInjection<S>
where
    S: Service<Attempt<R>> + Clone,
{
    type Response = S::Response;
    type Error = AttemptError<S::Error>;
    type Future = ResponseFuture<S, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(AttemptError::Failed)
    }

    #[inline]
    fn call(&mut self, attempt: Attempt<R>) -> Self::Future {
        let state = match self.dependency.faults().next_fault() {
            None => State::Calling { answer: self.inner.call(attempt) },
            Some(Fault::Failure) => State::Failing,
            Some(Fault::Latency(delay)) => {
                let service = take_ready(&mut self.inner);
                let delayed = Delayed { over: Box::pin(tokio::time::sleep(delay)), service, attempt: Some(attempt) };
                State::Waiting { delayed: Box::new(delayed) }
            }
        };
        ResponseFuture { state }
    }
}

/// An attempt that a drill delays.
struct Delayed<S, R> {
    over: Pin<Box<Sleep>>,
    service: S,
    attempt: Option<Attempt<R>>,
}

pin_project! {
    /// An attempt that a fault may hit.
    pub struct ResponseFuture<S, R>
    where
        S: Service<Attempt<R>>,
    {
        #[pin]
        state: State<S, R>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<S, R>
    where
        S: Service<Attempt<R>>,
    {
        /// Under way.
        Calling { #[pin] answer: S::Future },
        /// Delayed.
        Waiting { delayed: Box<Delayed<S, R>> },
        /// Made to fail.
        Failing,
    }
}

impl<S, R> Future for ResponseFuture<S, R>
where
    S: Service<Attempt<R>>,
{
    type Output = Result<S::Response, AttemptError<S::Error>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let calling = match state.as_mut().project() {
                StateProjection::Calling { answer } => return answer.poll(cx).map_err(AttemptError::Failed),
                StateProjection::Failing => return Poll::Ready(Err(AttemptError::Injected)),
                StateProjection::Waiting { delayed } => {
                    ready!(delayed.over.as_mut().poll(cx));
                    match delayed.attempt.take() {
                        Some(attempt) => State::Calling { answer: delayed.service.call(attempt) },
                        None => return Poll::Pending,
                    }
                }
            };
            state.set(calling);
        }
    }
}
