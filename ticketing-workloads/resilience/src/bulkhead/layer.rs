//! The bulkhead as a [`tower::Layer`].

use super::state::{Acquired, Queued, Slot};
use crate::attempt::{Attempt, AttemptError};
use crate::dependency_layer::{dependency_layer, take_ready};
use crate::failure::Rejection;
use crate::priority;
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tower::Service;

dependency_layer! {
    /// Lets a bounded number of attempts through at once. Waiting for a slot counts against the deadline.
    BulkheadLayer makes
    /// A service behind a bulkhead.
    BulkheadService
}

impl<S, R, E> Service<Attempt<R>> for BulkheadService<S>
where
    S: Service<Attempt<R>, Error = AttemptError<E>> + Clone,
{
    type Response = S::Response;
    type Error = AttemptError<E>;
    type Future = ResponseFuture<S, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, attempt: Attempt<R>) -> Self::Future {
        let Some(bulkhead) = self.dependency.bulkhead() else {
            return ResponseFuture { state: State::Inside { answer: self.inner.call(attempt), _slot: None } };
        };
        let state = match bulkhead.acquire(priority::current().unwrap_or_default(), attempt.deadline) {
            Ok(Acquired::Slot(slot)) => State::Inside { answer: self.inner.call(attempt), _slot: Some(slot) },
            Ok(Acquired::Queued(queued)) => {
                let waiter = Waiter { queued, service: take_ready(&mut self.inner), attempt: Some(attempt) };
                State::Waiting { waiter: Box::new(waiter) }
            }
            Err(rejection) => State::Refused { rejection: Some(rejection) },
        };
        ResponseFuture { state }
    }
}

/// An attempt in the queue, and the service that it will be made with.
struct Waiter<S, R> {
    queued: Queued,
    service: S,
    attempt: Option<Attempt<R>>,
}

pin_project! {
    /// An attempt behind a bulkhead.
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
        Inside {
            #[pin]
            answer: S::Future,
            _slot: Option<Slot>,
        },
        /// In the queue.
        Waiting { waiter: Box<Waiter<S, R>> },
        /// Not let through.
        Refused { rejection: Option<Rejection> },
    }
}

impl<S, R, E> Future for ResponseFuture<S, R>
where
    S: Service<Attempt<R>, Error = AttemptError<E>>,
{
    type Output = Result<S::Response, AttemptError<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.project().state;
        loop {
            let inside = match state.as_mut().project() {
                StateProjection::Inside { answer, .. } => return answer.poll(cx),
                StateProjection::Waiting { waiter } => match ready!(Pin::new(&mut waiter.queued).poll(cx)) {
                    Ok(slot) => match waiter.attempt.take() {
                        Some(attempt) => State::Inside { answer: waiter.service.call(attempt), _slot: Some(slot) },
                        None => return Poll::Pending,
                    },
                    Err(rejection) => return Poll::Ready(Err(AttemptError::Rejected(rejection))),
                },
                StateProjection::Refused { rejection } => {
                    let rejection = rejection.take().unwrap_or(Rejection::BulkheadFull { in_use: 0, queued: 0 });
                    return Poll::Ready(Err(AttemptError::Rejected(rejection)));
                }
            };
            state.set(inside);
        }
    }
}
