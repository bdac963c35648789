//! Against servers of the test's own, through all layers.

use super::*;
use axum::Router;
use axum::extract::State;
use contract::{CircuitState, DependencySettings, PolicySettings, RetryOn, WorkloadId};
use resilience::Resilience;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::TcpListener;

/// A dependency with these settings.
fn dependency(settings: DependencySettings) -> &'static Dependency {
    let defaults = PolicySettings { dependencies: [("peer".to_owned(), settings)].into(), ..Default::default() };
    let id = WorkloadId::deployment("ticketing", "caller");
    Resilience::builder(id).dependency("peer").defaults(defaults).build().dependency("peer").unwrap()
}

/// Settings whose retries do not wait.
fn settings(retries: u32, on: &[RetryOn], codes: &[u16]) -> DependencySettings {
    let mut settings = DependencySettings::default();
    settings.retry.num_retries = retries;
    settings.retry.base_interval_ms = 1;
    settings.retry.retry_on = on.iter().copied().collect();
    settings.retry.http_status_codes = codes.iter().copied().collect();
    settings
}

/// One answer of a [`Script`].
#[derive(Clone)]
struct Line(u16, Vec<(HeaderName, HeaderValue)>);

fn line(status: u16, headers: &[(&'static str, &str)]) -> Line {
    let header = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().unwrap());
    Line(status, headers.iter().map(header).collect())
}

/// A server that gives these answers one after the other, and the last of them for ever.
struct Script {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Script {
    async fn start(lines: Vec<Line>) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = (Arc::clone(&asked), Arc::new(lines));
        let app = Router::new().fallback(next_line).with_state(state);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn service(&self, dependency: &'static Dependency) -> HttpService {
        service(&format!("http://{}", self.address), dependency)
    }
}

async fn next_line(State((asked, lines)): State<(Arc<AtomicUsize>, Arc<Vec<Line>>)>) -> Response {
    let number = asked.fetch_add(1, Ordering::SeqCst).min(lines.len() - 1);
    let Line(status, headers) = lines[number].clone();
    (StatusCode::from_u16(status).unwrap(), HeaderMap::from_iter(headers)).into_response()
}

#[tokio::test]
async fn a_503_with_retry_after_is_rate_limited() {
    let server = Script::start(vec![line(503, &[("retry-after", "0")]), line(200, &[])]).await;
    let service = server.service(dependency(settings(1, &[RetryOn::RateLimited], &[])));
    assert_eq!(ask(&service, HttpCall::get("/")).await.unwrap().status, 200);
    assert_eq!(server.asked(), 2);
}

#[tokio::test]
async fn a_server_that_says_when_to_come_back_opens_no_circuit() {
    let server = Script::start(vec![line(503, &[("retry-after", "1")])]).await;
    let dependency = dependency(settings(0, &[], &[]));
    let service = server.service(dependency);
    for _ in 0..10 {
        let error = ask(&service, HttpCall::get("/")).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(1)));
    }
    assert_eq!((server.asked(), dependency.circuit().state), (10, CircuitState::Closed));
}

/// Ours say when to come back with every failure; that they have retried says that it is one.
#[tokio::test]
async fn one_of_ours_that_has_failed_opens_it() {
    let server = Script::start(vec![line(503, &[("retry-after", "1"), ("x-retried", "true")])]).await;
    let dependency = dependency(settings(3, &[RetryOn::RateLimited, RetryOn::ServerError], &[503]));
    let service = server.service(dependency);
    for _ in 0..6 {
        ask(&service, HttpCall::get("/")).await.unwrap_err();
    }
    assert_eq!((server.asked(), dependency.circuit().state), (5, CircuitState::Open));
}

#[tokio::test]
async fn a_date_is_waited_for() {
    let soon = SystemTime::now() + Duration::from_secs(2);
    let server =
        Script::start(vec![line(503, &[("retry-after", &httpdate::fmt_http_date(soon))]), line(200, &[])]).await;
    let service = server.service(dependency(settings(1, &[RetryOn::RateLimited], &[])));
    let started = std::time::Instant::now();
    assert_eq!(ask(&service, HttpCall::get("/")).await.unwrap().status, 200);
    assert!(started.elapsed() >= Duration::from_millis(900), "asked again after {:?}", started.elapsed());
}

#[rstest::rstest]
#[case(408)]
#[case(409)]
#[case(425)]
#[tokio::test]
async fn a_listed_status_is_retried_and_at_last_the_answer(#[case] status: u16) {
    let server = Script::start(vec![line(status, &[("location", "/here")])]).await;
    let dependency = dependency(settings(2, &[], &[408, 409, 425]));
    let answer = ask(&server.service(dependency), HttpCall::get("/")).await.unwrap();
    assert_eq!((answer.status.as_u16(), &answer.headers["location"]), (status, &HeaderValue::from_static("/here")));
    assert_eq!(server.asked(), 3);
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
    let unlisted = Script::start(vec![line(404, &[])]).await;
    assert_eq!(ask(&unlisted.service(dependency), HttpCall::get("/")).await.unwrap().status, 404);
    assert_eq!(unlisted.asked(), 1);
}
