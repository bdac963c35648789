//! How fresh the caches are: when each watch last heard from the API server.
//!
//! kube's watcher keeps bookmarks and reconnections to itself, so this listens one level below: every part of an answer
//! counts, be it an event, a bookmark or the head of a new watch. Watches end within a minute and begin anew, so one that
//! has been silent for longer is cut off, whatever it believes.

use http::{Request, Response};
use http_body::Frame;
use http_body_util::BodyExt;
use kube::client::Body;
use std::{
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;
use tower::{BoxError, Layer, Service};

/// Silence after which what a watch has shown says nothing of now.
pub const STALE_AFTER: Duration = Duration::from_secs(90);

/// When each watch was last heard.
#[derive(Clone, Default)]
pub struct Observation(Arc<Mutex<BTreeMap<String, Arc<Mutex<Instant>>>>>);

impl Observation {
    fn mark(&self, path: &str) -> Arc<Mutex<Instant>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mark = all.entry(path.to_owned()).or_insert_with(|| Arc::new(Mutex::new(Instant::now())));
        Arc::clone(mark)
    }

    /// The watch that has been silent for longest, if that is too long: its path, and for how long.
    pub fn stale(&self, now: Instant) -> Option<(String, Duration)> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let age =
            |mark: &Mutex<Instant>| now.saturating_duration_since(*mark.lock().unwrap_or_else(PoisonError::into_inner));
        let oldest = all.iter().map(|(path, mark)| (path, age(mark))).max_by_key(|(_, age)| *age);
        oldest.filter(|(_, age)| *age > STALE_AFTER).map(|(path, age)| (path.clone(), age))
    }
}

fn heard(mark: &Mutex<Instant>) {
    *mark.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
}

/// Notes what comes back for every request that passes.
#[derive(Clone)]
pub struct ObservationLayer(Observation);

impl ObservationLayer {
    /// Notes it in `observation`.
    pub fn new(observation: Observation) -> Self {
        Self(observation)
    }
}

impl<S> Layer<S> for ObservationLayer {
    type Service = ObservationService<S>;

    fn layer(&self, inner: S) -> ObservationService<S> {
        ObservationService { inner, observation: self.0.clone() }
    }
}

/// See [`ObservationLayer`].
#[derive(Clone)]
pub struct ObservationService<S> {
    inner: S,
    observation: Observation,
}

type Answer = Response<http_body_util::combinators::UnsyncBoxBody<bytes::Bytes, BoxError>>;

impl<S, B> Service<Request<Body>> for ObservationService<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Answer;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mark = self.observation.mark(request.uri().path());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await.map_err(Into::into)?;
            // A refusal shows nothing, however often it comes.
            let shows = answer.status().is_success();
            if shows {
                heard(&mark);
            }
            Ok(answer.map(|body| {
                let body = body.map_err(Into::into).map_frame(move |frame: Frame<bytes::Bytes>| {
                    if shows {
                        heard(&mark);
                    }
                    frame
                });
                body.boxed_unsync()
            }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::StatusCode;
    use http_body_util::Full;
    use tower::{ServiceExt, service_fn};

    #[rstest::rstest]
    #[case::shown(StatusCode::OK, false)]
    #[case::forbidden(StatusCode::FORBIDDEN, true)]
    #[case::broken(StatusCode::INTERNAL_SERVER_ERROR, true)]
    #[tokio::test(start_paused = true)]
    async fn only_what_is_shown_is_heard(#[case] status: StatusCode, #[case] stale: bool) {
        let observation = Observation::default();
        let answers = ObservationLayer::new(observation.clone()).layer(service_fn(move |_| async move {
            let mut answer = Response::new(Full::new(bytes::Bytes::from_static(b"words")));
            *answer.status_mut() = status;
            Ok::<_, BoxError>(answer)
        }));
        for _ in 0..10 {
            let request = Request::get("/pods?watch=true").body(Body::empty()).unwrap();
            let answer = answers.clone().oneshot(request).await.unwrap();
            answer.into_body().collect().await.unwrap();
            tokio::time::sleep(Duration::from_secs(10)).await;
        }
        assert_eq!(observation.stale(Instant::now()).is_some(), stale);
    }

    #[tokio::test(start_paused = true)]
    async fn one_silent_watch_is_enough() {
        let observation = Observation::default();
        let (pods, _sets) = (observation.mark("/pods"), observation.mark("/sets"));
        assert_eq!(observation.stale(Instant::now()), None);
        tokio::time::sleep(STALE_AFTER).await;
        heard(&pods);
        assert_eq!(observation.stale(Instant::now()), None, "at the limit");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(observation.stale(Instant::now()), Some(("/sets".to_owned(), STALE_AFTER + Duration::from_secs(1))));
    }
}
