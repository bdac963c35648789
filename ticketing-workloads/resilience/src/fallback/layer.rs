//! Fallbacks as a [`tower::Layer`], outermost.
//!
//! The policy lists the kinds of fallback in the order in which they are tried; the workload says how each kind is done
//! here ([`Fallbacks`]). A kind that the workload does not have, or that has nothing to say, is passed over. A business
//! "no" is an answer, and falls back to nothing.

use super::cache::Cache;
use crate::dependency::Dependency;
use crate::failure::{CallError, Failure};
use contract::{CircuitState, FallbackSettings};
use futures::future::BoxFuture;
use pin_project_lite::pin_project;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::time::Instant;
use tower::{Layer, Service};

/// An answer, and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer<T> {
    /// The answer.
    pub value: T,
    /// Where it comes from.
    pub source: Source,
}

/// Where an answer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The dependency itself.
    Dependency,
    /// An earlier answer.
    Cache {
        /// How old it is.
        age: Duration,
        /// Whether it is past its time to live.
        stale: bool,
    },
    /// Another dependency.
    Provider(String),
    /// Taken now, settled later.
    Queue,
    /// A fixed answer.
    Static,
}

impl Source {
    fn name(&self) -> &'static str {
        match self {
            Self::Dependency => "dependency",
            Self::Cache { .. } => "cache",
            Self::Provider(_) => "provider",
            Self::Queue => "queue",
            Self::Static => "static",
        }
    }
}

/// A way to answer for a request that failed; `None`: it has no answer.
type Way<R, T, E> = Box<dyn Fn(R, Arc<CallError<E>>) -> BoxFuture<'static, Option<T>> + Send + Sync>;

/// How each kind of fallback is done for one dependency.
pub struct Fallbacks<R, T, E> {
    dependency: &'static Dependency,
    cache: Option<Earlier<R, T>>,
    providers: HashMap<String, Way<R, T, E>>,
    queue: Option<Way<R, T, E>>,
    fixed: Option<fn(u16, &str) -> Option<T>>,
}

/// Earlier answers, and which requests mean the same.
struct Earlier<R, T> {
    key: fn(&R) -> Option<String>,
    answers: Cache<T>,
}

impl<R, T, E> Fallbacks<R, T, E>
where
    R: Clone + Send + 'static,
    T: Clone + Send + 'static,
    E: Send + Sync + 'static,
{
    /// Without any way to answer yet.
    pub fn new(dependency: &'static Dependency) -> Self {
        Self { dependency, cache: None, providers: HashMap::new(), queue: None, fixed: None }
    }

    /// Earlier answers may be given again. `key` says which requests mean the same (`None`: not this one), `weight` how
    /// many bytes an answer takes (`None`: it is not kept); the oldest go when all would take more than `capacity`.
    #[must_use]
    pub fn cache(mut self, capacity: usize, key: fn(&R) -> Option<String>, weight: fn(&T) -> Option<usize>) -> Self {
        self.cache = Some(Earlier { key, answers: Cache::new(capacity, weight) });
        self
    }

    /// Another dependency may answer. The error is given along: only the workload knows whether it allows
    /// to ask another one.
    #[must_use]
    pub fn provider<F, Fut>(mut self, name: &str, ask: F) -> Self
    where
        F: Fn(R, Arc<CallError<E>>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Option<T>> + Send + 'static,
    {
        self.providers.insert(name.to_owned(), Box::new(move |request, error| Box::pin(ask(request, error))));
        self
    }

    /// The request may be taken now and settled later.
    #[must_use]
    pub fn queue<F, Fut>(mut self, take: F) -> Self
    where
        F: Fn(R, Arc<CallError<E>>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Option<T>> + Send + 'static,
    {
        self.queue = Some(Box::new(move |request, error| Box::pin(take(request, error))));
        self
    }

    /// A fixed HTTP answer, made from its status and body.
    #[must_use]
    pub fn fixed(mut self, answer: fn(u16, &str) -> Option<T>) -> Self {
        self.fixed = Some(answer);
        self
    }

    /// The layer; outermost.
    pub fn layer(self) -> FallbackLayer<R, T, E> {
        FallbackLayer(Arc::new(self))
    }

    /// The first fallback of the policy that has an answer.
    async fn answer(&self, request: R, error: &Arc<CallError<E>>) -> Option<Answer<T>> {
        let settings = self.dependency.settings();
        for fallback in &settings.fallback {
            let way = |way: &Way<R, T, E>| way(request.clone(), Arc::clone(error));
            let answer = match fallback {
                FallbackSettings::Cache { ttl_ms, max_stale_ms } => self.cached(&request, *ttl_ms, *max_stale_ms),
                FallbackSettings::Provider { provider } => match self.providers.get(provider) {
                    Some(ask) => way(ask).await.map(|value| (value, Source::Provider(provider.clone()))),
                    None => None,
                },
                FallbackSettings::Queue => match &self.queue {
                    Some(take) => way(take).await.map(|value| (value, Source::Queue)),
                    None => None,
                },
                FallbackSettings::Static { status_code, body } => {
                    let fixed = self.fixed.and_then(|answer| answer(*status_code, body));
                    fixed.map(|value| (value, Source::Static))
                }
                FallbackSettings::Unknown => None,
            };
            if let Some((value, source)) = answer {
                return Some(Answer { value, source });
            }
        }
        None
    }

    fn cached(&self, request: &R, ttl_ms: u64, max_stale_ms: u64) -> Option<(T, Source)> {
        let cache = self.cache.as_ref()?;
        let (value, age) = cache.answers.find(&(cache.key)(request)?)?;
        let stale = age > Duration::from_millis(ttl_ms);
        let usable = age <= Duration::from_millis(ttl_ms.saturating_add(max_stale_ms));
        usable.then_some((value, Source::Cache { age, stale }))
    }

    fn keep(&self, request: &R, value: &T) {
        if let Some(cache) = &self.cache
            && self.dependency.settings().fallback.iter().any(|one| matches!(one, FallbackSettings::Cache { .. }))
            && let Some(key) = (cache.key)(request)
        {
            cache.answers.keep(key, value);
        }
    }
}

/// Answers for a dependency that does not.
pub struct FallbackLayer<R, T, E>(Arc<Fallbacks<R, T, E>>);

impl<R, T: Clone, E> FallbackLayer<R, T, E> {
    /// Forgets earlier answers, to give memory back; how many bytes they took. While the circuit of the dependency is not
    /// closed they are kept: they may be all that there is to answer with.
    pub fn forget_answers(&self) -> usize {
        let closed = self.0.dependency.circuit().state == CircuitState::Closed;
        self.0.cache.as_ref().filter(|_| closed).map_or(0, |cache| cache.answers.clear())
    }
}

impl<S, R, T, E> Layer<S> for FallbackLayer<R, T, E> {
    type Service = Fallback<S, R, T, E>;

    fn layer(&self, inner: S) -> Self::Service {
        Fallback { fallbacks: Arc::clone(&self.0), inner }
    }
}

/// A service that always has an answer, if the policy has one.
pub struct Fallback<S, R, T, E> {
    fallbacks: Arc<Fallbacks<R, T, E>>,
    inner: S,
}

impl<S: Clone, R, T, E> Clone for Fallback<S, R, T, E> {
    fn clone(&self) -> Self {
        Self { fallbacks: Arc::clone(&self.fallbacks), inner: self.inner.clone() }
    }
}

impl<S, R, T, E> Service<R> for Fallback<S, R, T, E>
where
    S: Service<R, Response = T, Error = CallError<E>>,
    R: Clone + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
    E: Failure + Send + Sync + 'static,
{
    type Response = Answer<T>;
    type Error = CallError<E>;
    type Future = ResponseFuture<S::Future, R, T, E>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        // Nothing is kept for a fallback that there is not.
        let has_fallback = self.fallbacks.dependency.has_fallback();
        let back = has_fallback.then(|| (Arc::clone(&self.fallbacks), request.clone()));
        ResponseFuture { step: Step::Trying { answer: self.inner.call(request), back } }
    }
}

type FallingBack<T, E> = BoxFuture<'static, Result<Answer<T>, CallError<E>>>;

pin_project! {
    /// A call that may fall back.
    pub struct ResponseFuture<F, R, T, E> {
        #[pin]
        step: Step<F, R, T, E>,
    }
}

pin_project! {
    #[project = StepProjection]
    enum Step<F, R, T, E> {
        /// The dependency is called.
        Trying {
            #[pin]
            answer: F,
            back: Option<(Arc<Fallbacks<R, T, E>>, R)>,
        },
        /// A fallback is tried.
        FallingBack { answer: FallingBack<T, E> },
    }
}

impl<F, R, T, E> Future for ResponseFuture<F, R, T, E>
where
    F: Future<Output = Result<T, CallError<E>>>,
    R: Clone + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
    E: Failure + Send + Sync + 'static,
{
    type Output = Result<Answer<T>, CallError<E>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut step = self.project().step;
        loop {
            let falling_back = match step.as_mut().project() {
                StepProjection::Trying { answer, back } => match (ready!(answer.poll(cx)), back.take()) {
                    (Ok(value), back) => {
                        if let Some((fallbacks, request)) = back {
                            fallbacks.keep(&request, &value);
                        }
                        return Poll::Ready(Ok(Answer { value, source: Source::Dependency }));
                    }
                    (Err(error), Some((fallbacks, request))) if !error.is_business() => {
                        fall_back(fallbacks, request, error)
                    }
                    (Err(error), _) => return Poll::Ready(Err(error)),
                },
                StepProjection::FallingBack { answer } => return answer.as_mut().poll(cx),
            };
            step.set(Step::FallingBack { answer: falling_back });
        }
    }
}

fn fall_back<R, T, E>(fallbacks: Arc<Fallbacks<R, T, E>>, request: R, error: CallError<E>) -> FallingBack<T, E>
where
    R: Clone + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
    E: Failure + Send + Sync + 'static,
{
    Box::pin(async move {
        let started = Instant::now();
        let dependency = fallbacks.dependency;
        let error = Arc::new(error);
        let answer = fallbacks.answer(request, &error).await;
        let source = answer.as_ref().map_or("none", |answer| answer.source.name());
        dependency.metrics().fallback(dependency.name(), source, started.elapsed());
        tracing::warn!(dependency = dependency.name(), %error, answered_by = source, "fell back");
        // The fallbacks that were given the error have ended by now; if one kept it, the caller gets its text.
        answer.ok_or_else(|| {
            Arc::try_unwrap(error).unwrap_or_else(|kept| CallError::Unanswered {
                dependency: dependency.name().to_owned(),
                reason: kept.to_string(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempt::{Attempt, Repeatable};
    use crate::bulkhead::Bulkheads;
    use crate::failure::FailureKind;
    use contract::{DependencySettings, RetrySettings};
    use std::sync::atomic::{AtomicBool, Ordering};
    use tower::{ServiceExt as _, service_fn};

    #[derive(Debug, thiserror::Error)]
    #[error("{0:?}")]
    struct Broken(FailureKind);

    impl Failure for Broken {
        fn kind(&self) -> FailureKind {
            self.0
        }
    }

    #[derive(Clone, Debug)]
    struct Page(u32);

    impl Repeatable for Page {
        fn may_repeat(&self, _: &RetrySettings) -> bool {
            true
        }
    }

    const CACHE: FallbackSettings = FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 60_000 };

    fn dependency(fallback: &[FallbackSettings]) -> &'static Dependency {
        let dependency = Dependency::new("catalog", Bulkheads::new(), &Arc::new(crate::Metrics::new("gateway")));
        configure(dependency, fallback);
        dependency
    }

    fn configure(dependency: &Dependency, fallback: &[FallbackSettings]) {
        let retry = RetrySettings { num_retries: 0, ..Default::default() };
        let settings = DependencySettings { retry, fallback: fallback.to_vec(), ..Default::default() };
        dependency.configure(settings, Bulkheads::NONE);
    }

    fn fixed() -> FallbackSettings {
        FallbackSettings::Static { status_code: 503, body: "nothing".into() }
    }

    /// Asks for pages; the answers come as words and sources.
    struct Shop {
        dependency: &'static Dependency,
        works: Arc<AtomicBool>,
        layer: FallbackLayer<Page, String, Broken>,
    }

    impl Shop {
        fn new(fallback: &[FallbackSettings]) -> Self {
            let dependency = dependency(fallback);
            let layer = Fallbacks::new(dependency)
                .cache(
                    10_000,
                    |page: &Page| (page.0 < 100).then(|| page.0.to_string()),
                    |text: &String| Some(text.len()),
                )
                .provider("other", |page: Page, _| async move { (page.0 == 7).then(|| "from the other".to_owned()) })
                .queue(|page: Page, error| async move { Some(format!("{} queued after: {error}", page.0)) })
                .fixed(|status, body| Some(format!("{status} {body}")))
                .layer();
            Self { dependency, works: Arc::new(AtomicBool::new(true)), layer }
        }

        async fn ask(&self, page: u32, broken: FailureKind) -> Result<Answer<String>, CallError<Broken>> {
            let works = Arc::clone(&self.works);
            let service = service_fn(move |attempt: Attempt<Page>| {
                let works = works.load(Ordering::SeqCst);
                let answer = format!("page {}", attempt.request.0);
                std::future::ready(if works { Ok(answer) } else { Err(Broken(broken)) })
            });
            self.layer.layer(self.dependency.layer().layer(service)).oneshot(Page(page)).await
        }

        async fn answer(&self, page: u32) -> (String, &'static str) {
            let answer = self.ask(page, FailureKind::Other).await.unwrap();
            (answer.value, answer.source.name())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_earlier_answer_is_given_as_long_as_it_may_be() {
        let shop = Shop::new(&[CACHE, fixed()]);
        assert_eq!(shop.answer(1).await, ("page 1".into(), "dependency"));
        shop.works.store(false, Ordering::SeqCst);
        tokio::time::advance(Duration::from_secs(300)).await;
        let answer = shop.ask(1, FailureKind::Other).await.unwrap();
        assert_eq!(answer.source, Source::Cache { age: Duration::from_secs(300), stale: false });
        tokio::time::advance(Duration::from_secs(60)).await;
        let answer = shop.ask(1, FailureKind::Other).await.unwrap();
        assert_eq!(answer.source, Source::Cache { age: Duration::from_secs(360), stale: true });
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(shop.answer(1).await, ("503 nothing".into(), "static"));
        assert_eq!(shop.answer(2).await, ("503 nothing".into(), "static"), "it was never asked for before");
        let text = shop.dependency.metrics().encode();
        assert!(text.contains(r#"fallback_answers_total{service="catalog",source="cache"} 2"#), "{text}");
        assert!(text.contains(r#"fallback_duration_seconds_count{service="catalog"} 4"#), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_policy_says_who_answers_and_in_which_order() {
        let provider = FallbackSettings::Provider { provider: "other".into() };
        let unknown = FallbackSettings::Provider { provider: "unknown".into() };
        let shop = Shop::new(&[FallbackSettings::Unknown, unknown, provider, FallbackSettings::Queue, fixed()]);
        shop.works.store(false, Ordering::SeqCst);
        assert_eq!(shop.answer(7).await, ("from the other".into(), "provider"));
        let (words, source) = shop.answer(8).await;
        assert_eq!((words.as_str(), source), ("8 queued after: catalog: failed after 1 attempt(s): Other", "queue"));
        configure(shop.dependency, &[fixed()]);
        assert_eq!(shop.answer(7).await, ("503 nothing".into(), "static"));
        configure(shop.dependency, &[]);
        assert!(shop.ask(7, FailureKind::Other).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_business_no_is_an_answer() {
        let shop = Shop::new(&[fixed()]);
        shop.works.store(false, Ordering::SeqCst);
        assert!(shop.ask(1, FailureKind::Business).await.is_err());
        assert!(shop.ask(1, FailureKind::Other).await.is_ok());
    }
}
