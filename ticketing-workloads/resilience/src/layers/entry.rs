//! Where an attempt enters the service itself: the place for injected faults.

use super::{Attempt, AttemptError, dependency_layer, take_ready};
use crate::faults::Fault;
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::time::Sleep;
use tower::Service;

dependency_layer! {
    /// Hands attempts to the service, or to a drill's fault.
    EntryLayer makes
    /// A service that drills can disturb.
    Entry
}

impl<S, R> Service<Attempt<R>> for Entry<S>
where
    S: Service<Attempt<R>> + Clone,
{
    type Response = S::Response;
    type Error = AttemptError<S::Error>;
    type Future = Entered<S, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(AttemptError::Failed)
    }

    #[inline]
    fn call(&mut self, attempt: Attempt<R>) -> Self::Future {
        match self.dependency.faults().strike() {
            None => Entered::Calling { answer: self.inner.call(attempt) },
            Some(Fault::Failure) => Entered::Failing,
            Some(Fault::Latency(delay)) => {
                let service = take_ready(&mut self.inner);
                let delayed = Delayed { over: Box::pin(tokio::time::sleep(delay)), service, attempt: Some(attempt) };
                Entered::Waiting { delayed: Box::new(delayed) }
            }
        }
    }
}

/// An attempt that a drill holds up.
pub struct Delayed<S, R> {
    over: Pin<Box<Sleep>>,
    service: S,
    attempt: Option<Attempt<R>>,
}

pin_project! {
    /// An attempt at the service, or at a fault.
    #[project = EnteredProjection]
    pub enum Entered<S, R>
    where
        S: Service<Attempt<R>>,
    {
        /// Under way.
        Calling { #[pin] answer: S::Future },
        /// Held up.
        Waiting { delayed: Box<Delayed<S, R>> },
        /// Made to fail.
        Failing,
    }
}

impl<S, R> Future for Entered<S, R>
where
    S: Service<Attempt<R>>,
{
    type Output = Result<S::Response, AttemptError<S::Error>>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let calling = match self.as_mut().project() {
                EnteredProjection::Calling { answer } => return answer.poll(cx).map_err(AttemptError::Failed),
                EnteredProjection::Failing => return Poll::Ready(Err(AttemptError::Injected)),
                EnteredProjection::Waiting { delayed } => {
                    ready!(delayed.over.as_mut().poll(cx));
                    match delayed.attempt.take() {
                        Some(attempt) => Entered::Calling { answer: delayed.service.call(attempt) },
                        None => return Poll::Pending,
                    }
                }
            };
            self.set(calling);
        }
    }
}
