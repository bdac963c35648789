//! Retries as a [`tower::Layer`].

use super::wait;
use crate::attempt::{Attempt, AttemptError, Repeatable};
use crate::clock::in_words;
use crate::dependency::Dependency;
use crate::dependency_layer::{dependency_layer, take_ready};
use crate::failure::{CallError, Failure, FailureKind};
use pin_project_lite::pin_project;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::{Instant, Sleep};
use tower::Service;
use tracing::Span;

dependency_layer! {
    /// Makes another attempt after a failure that may pass. The settings at the time of the failure apply: turning
    /// retries off during an incident stops those under way, too.
    RetryLayer makes
    /// A service whose failed attempts are repeated.
    Retry
}

impl<S, R, E> Service<Attempt<R>> for Retry<S>
where
    S: Service<Attempt<R>, Error = AttemptError<E>> + Clone,
    R: Repeatable + Clone,
    E: Failure,
{
    type Response = S::Response;
    type Error = CallError<E>;
    type Future = ResponseFuture<S, R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(|error| error.after(self.dependency.name(), 0))
    }

    #[inline]
    fn call(&mut self, attempt: Attempt<R>) -> Self::Future {
        ResponseFuture::new(self.dependency, take_ready(&mut self.inner), attempt)
    }
}

pin_project! {
    /// A call with all its attempts.
    pub struct ResponseFuture<S, R>
    where
        S: Service<Attempt<R>>,
    {
        dependency: &'static Dependency,
        service: S,
        attempt: Attempt<R>,
        #[pin]
        step: Step<S::Future>,
    }
}

pin_project! {
    #[project = StepProjection]
    enum Step<F> {
        /// The service gets ready for the attempt.
        Preparing,
        Calling { #[pin] answer: F, span: Span },
        /// The wait before the next attempt.
        Waiting { over: Pin<Box<Sleep>> },
    }
}

impl<S: Service<Attempt<R>>, R> ResponseFuture<S, R> {
    /// Makes `attempt`, and further ones as the settings of `dependency` have it.
    #[inline]
    pub(crate) fn new(dependency: &'static Dependency, service: S, attempt: Attempt<R>) -> Self {
        Self { dependency, service, attempt, step: Step::Preparing }
    }
}

impl<S, R, E> Future for ResponseFuture<S, R>
where
    S: Service<Attempt<R>, Error = AttemptError<E>>,
    R: Repeatable + Clone,
    E: Failure,
{
    type Output = Result<S::Response, CallError<E>>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let result = match this.step.as_mut().project() {
                StepProjection::Preparing => match ready!(this.service.poll_ready(cx)) {
                    Ok(()) => {
                        let number = this.attempt.number;
                        let span = tracing::debug_span!("attempt", dependency = this.dependency.name(), number);
                        let answer = span.in_scope(|| this.service.call(this.attempt.clone()));
                        this.step.set(Step::Calling { answer, span });
                        continue;
                    }
                    Err(error) => Err(error),
                },
                StepProjection::Calling { answer, span } => {
                    let _in_it = span.enter();
                    ready!(answer.poll(cx))
                }
                StepProjection::Waiting { over } => {
                    ready!(over.as_mut().poll(cx));
                    this.attempt.number += 1;
                    this.step.set(Step::Preparing);
                    continue;
                }
            };
            let error = match result {
                Ok(answer) => return Poll::Ready(Ok(answer)),
                Err(error) => error,
            };
            match wait_before_next(this.dependency, this.attempt, &error) {
                Some(wait) => this.step.set(Step::Waiting { over: Box::pin(tokio::time::sleep(wait)) }),
                None => return Poll::Ready(Err(error.after(this.dependency.name(), this.attempt.number))),
            }
        }
    }
}

/// How long to wait before another attempt; `None`: this failure is the answer.
#[cold]
fn wait_before_next<R: Repeatable, E: Failure>(
    dependency: &Dependency,
    attempt: &Attempt<R>,
    error: &AttemptError<E>,
) -> Option<Duration> {
    let (kind, at_least) = match error {
        AttemptError::Rejected(_) => return None,
        // The tier next to the failure has made its retries: another one here would multiply them.
        AttemptError::Failed(error) | AttemptError::FailedUnderShortDeadline(error) if error.was_retried() => {
            return None;
        }
        AttemptError::Failed(error) | AttemptError::FailedUnderShortDeadline(error) => {
            (error.kind(), error.retry_after())
        }
        AttemptError::TimedOut { .. } => (FailureKind::Timeout, None),
        AttemptError::Injected => (FailureKind::ConnectFailure, None),
    };
    let settings = dependency.settings();
    let settings = &settings.retry;
    if kind != FailureKind::NotSent && !attempt.request.may_repeat(settings) {
        return None;
    }
    let wait = wait::next(settings, kind, attempt.number, rand::random())?.max(at_least.unwrap_or_default());
    let next = Instant::now().checked_add(wait)?;
    if attempt.deadline.is_some_and(|deadline| next >= deadline) {
        return None;
    }
    if !dependency.take_retry() {
        tracing::warn!(dependency = dependency.name(), ?kind, "not retried: the retry budget is exhausted");
        return None;
    }
    dependency.metrics().retry(dependency.name(), attempt.number);
    tracing::warn!(
        dependency = dependency.name(),
        attempt = attempt.number,
        ?kind,
        wait = %in_words(wait),
        "retrying"
    );
    Some(wait)
}
