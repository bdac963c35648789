//! The attempt timeout: how long one attempt may take once it is let through.

use crate::attempt::{Attempt, AttemptError, Ticket};
use crate::deadline;
use crate::dependency::Dependency;
use crate::dependency_layer::dependency_layer;
use crate::failure::Rejection;
use futures::future::Either;
use pin_project_lite::pin_project;
use std::future::{Future, Ready};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::time::{Instant, Timeout, timeout_at};
use tower::Service;

dependency_layer! {
    /// Ends an attempt that takes too long. It also reports to the breaker what only this layer knows: that an attempt was
    /// slow, waits in a queue not counted; and that one was abandoned after its time was over. An attempt to which its
    /// caller's deadline left less than half of its time says nothing about the dependency, however it fails: otherwise a
    /// caller with a short deadline could open the circuit for all others.
    AttemptTimeoutLayer makes
    /// A service with a bound on the time of an attempt.
    AttemptTimeout
}

impl<S, R, E> Service<Attempt<R>> for AttemptTimeout<S>
where
    S: Service<Attempt<R>, Error = AttemptError<E>>,
{
    type Response = S::Response;
    type Error = AttemptError<E>;
    type Future = Either<ResponseFuture<S::Future>, Ready<Result<S::Response, AttemptError<E>>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut attempt: Attempt<R>) -> Self::Future {
        let started = Instant::now();
        if attempt.deadline.is_some_and(|deadline| deadline <= started) {
            // It waited for too long before.
            return Either::Right(std::future::ready(Err(AttemptError::Rejected(Rejection::TooLate))));
        }
        let time = self.dependency.attempt_time();
        let own = started + time;
        let deadline = attempt.deadline.map_or(own, |until| own.min(until));
        attempt.deadline = Some(deadline);
        let short_deadline = deadline::current().is_some_and(|caller| caller < started + time / 2);
        let ticket = attempt.ticket;
        let watch = Watch { dependency: self.dependency, ticket, started, deadline, short_deadline, under_way: true };
        Either::Left(ResponseFuture { watch, answer: timeout_at(deadline, self.inner.call(attempt)) })
    }
}

/// An attempt under way, as the breaker is told about it.
struct Watch {
    dependency: &'static Dependency,
    ticket: Ticket,
    started: Instant,
    deadline: Instant,
    /// Whether its caller left it less than half of an attempt's time, too little to say anything about the dependency.
    short_deadline: bool,
    under_way: bool,
}

impl Watch {
    #[inline]
    fn answered(&mut self) {
        self.under_way = false;
        let breaker = self.dependency.breaker();
        if let Some(slow_from) = breaker.slow_from()
            && self.started.elapsed() >= slow_from
        {
            breaker.record_slow(self.ticket);
        }
    }
}

impl Drop for Watch {
    #[inline]
    fn drop(&mut self) {
        if self.under_way && Instant::now() >= self.deadline {
            self.dependency.record_timeout();
            if !self.short_deadline {
                self.dependency.breaker().record_abandoned(self.ticket);
            }
        }
    }
}

pin_project! {
    /// An attempt with a bound on its time.
    pub struct ResponseFuture<F> {
        watch: Watch,
        #[pin]
        answer: Timeout<F>,
    }
}

impl<F, T, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<T, AttemptError<E>>>,
{
    type Output = Result<T, AttemptError<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        // What the attempt calls in turn has no more time than the attempt.
        let deadline = this.watch.deadline;
        let answer = ready!(deadline::during(deadline, || this.answer.poll(cx)));
        let short_deadline = this.watch.short_deadline;
        if let Ok(result) = answer {
            this.watch.answered();
            return Poll::Ready(result.map_err(|error| match error {
                AttemptError::Failed(error) if short_deadline => AttemptError::FailedUnderShortDeadline(error),
                error => error,
            }));
        }
        this.watch.under_way = false;
        this.watch.dependency.record_timeout();
        let after = deadline - this.watch.started;
        Poll::Ready(Err(AttemptError::TimedOut { after, short_deadline }))
    }
}
