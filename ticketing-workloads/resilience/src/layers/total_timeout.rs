//! The total timeout: how long a call may take with all its attempts and waits.

use super::{Attempt, dependency_layer};
use crate::failure::Rejection;
use crate::{CallError, deadline};
use futures::future::{Either, Ready, ready};
use std::task::{Context, Poll};
use tokio::time::Instant;
use tower::Service;

dependency_layer! {
    /// Bounds a call, and does not start one that nobody waits for. It needs no timer: whatever waits further in goes
    /// by the deadline that is set here.
    TotalTimeoutLayer makes
    /// A service with a bound on the time of a call.
    TotalTimeout
}

impl<S, R, E> Service<R> for TotalTimeout<S>
where
    S: Service<Attempt<R>, Error = CallError<E>>,
{
    type Response = S::Response;
    type Error = CallError<E>;
    type Future = Either<S::Future, Ready<Result<S::Response, CallError<E>>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, request: R) -> Self::Future {
        match self.dependency.call_deadline(deadline::current(), Instant::now()) {
            Ok(deadline) => Either::Left(self.inner.call(Attempt::first(request, Some(deadline)))),
            Err(rejection) => {
                let dependency = self.dependency.name().to_owned();
                Either::Right(ready(Err(CallError::Rejected { dependency, rejection, attempts: 0 })))
            }
        }
    }
}

impl crate::Dependency {
    /// When a call that starts now ends at the latest, for a caller who waits until `until`.
    pub(crate) fn call_deadline(&self, until: Option<Instant>, now: Instant) -> Result<Instant, Rejection> {
        let own = now + self.request_time();
        match until {
            Some(until) if until <= now => Err(Rejection::TooLate),
            Some(until) => Ok(own.min(until)),
            None => Ok(own),
        }
    }
}
