//! The total timeout: how long a call may take with all its attempts and waits.

use crate::attempt::Attempt;
use crate::deadline;
use crate::dependency_layer::dependency_layer;
use crate::failure::CallError;
use futures::future::{Either, Ready, ready};
use std::task::{Context, Poll};
use tokio::time::Instant;
use tower::Service;

dependency_layer! {
    /// Bounds a call, and does not start one whose caller no longer waits. It needs no timer: the layers further in
    /// wait no longer than the deadline that is set here.
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
