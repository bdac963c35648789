//! The bulkhead as a layer.

use super::{Attempt, AttemptError, dependency_layer, take_ready};
use crate::bulkhead::{Entry, Place, Queued};
use crate::failure::Rejection;
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tower::Service;

dependency_layer! {
    /// Lets a bounded number of attempts through at once. Waiting for a place counts against the deadline.
    BulkheadLayer makes
    /// A service in a bulkhead.
    Compartment
}

impl<S, R, E> Service<Attempt<R>> for Compartment<S>
where
    S: Service<Attempt<R>, Error = AttemptError<E>> + Clone,
{
    type Response = S::Response;
    type Error = AttemptError<E>;
    type Future = Housed<S, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, attempt: Attempt<R>) -> Self::Future {
        let Some(bulkhead) = self.dependency.bulkhead() else {
            return Housed::Inside { answer: self.inner.call(attempt), _place: None };
        };
        match bulkhead.enter(attempt.deadline) {
            Ok(Entry::Inside(place)) => Housed::Inside { answer: self.inner.call(attempt), _place: Some(place) },
            Ok(Entry::Queued(queued)) => {
                let waiter = Waiter { queued, service: take_ready(&mut self.inner), attempt: Some(attempt) };
                Housed::Waiting { waiter: Box::new(waiter) }
            }
            Err(rejection) => Housed::Refused { rejection: Some(rejection) },
        }
    }
}

/// An attempt in the queue, and what it will be made with.
pub struct Waiter<S, R> {
    queued: Queued,
    service: S,
    attempt: Option<Attempt<R>>,
}

pin_project! {
    /// An attempt in a bulkhead, or before it.
    #[project = HousedProjection]
    pub enum Housed<S, R>
    where
        S: Service<Attempt<R>>,
    {
        /// Under way.
        Inside {
            #[pin]
            answer: S::Future,
            _place: Option<Place>,
        },
        /// In the queue.
        Waiting { waiter: Box<Waiter<S, R>> },
        /// Not let through.
        Refused { rejection: Option<Rejection> },
    }
}

impl<S, R, E> Future for Housed<S, R>
where
    S: Service<Attempt<R>, Error = AttemptError<E>>,
{
    type Output = Result<S::Response, AttemptError<E>>;

    #[inline]
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let inside = match self.as_mut().project() {
                HousedProjection::Inside { answer, .. } => return answer.poll(cx),
                HousedProjection::Waiting { waiter } => match ready!(Pin::new(&mut waiter.queued).poll(cx)) {
                    Ok(place) => match waiter.attempt.take() {
                        Some(attempt) => Housed::Inside { answer: waiter.service.call(attempt), _place: Some(place) },
                        None => return Poll::Pending,
                    },
                    Err(rejection) => return Poll::Ready(Err(AttemptError::Rejected(rejection))),
                },
                HousedProjection::Refused { rejection } => {
                    let rejection = rejection.take().unwrap_or(Rejection::BulkheadFull { in_use: 0, queued: 0 });
                    return Poll::Ready(Err(AttemptError::Rejected(rejection)));
                }
            };
            self.set(inside);
        }
    }
}
