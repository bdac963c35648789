//! Calls to other services over HTTP, behind the layers of a dependency.

mod retry_after;
#[cfg(test)]
mod tests;

use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use contract::RetrySettings;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use resilience::{Attempt, Guarded, Repeatable};
use resilience::{CallError, Dependency, Failure, FailureKind, deadline};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tower::util::MapResult;
use tower::{Layer, Service, ServiceExt};

/// In an answer: its sender has retried already, so its callers should not retry on top.
pub const RETRIED: HeaderName = HeaderName::from_static("x-retried");
/// In an answer: nothing has failed, its sender only does not want the request now.
pub const REFUSED: HeaderName = HeaderName::from_static("x-refused");
/// In an answer that is a failure: the deadline that the request came with had passed by then. It says nothing of its sender.
pub const DEADLINE_PASSED: HeaderName = HeaderName::from_static("x-deadline-passed");
/// What services of ours say to each other only: the edge takes it from nobody, and tells it nobody.
pub const INTERNAL: [HeaderName; 4] = [deadline::HEADER, RETRIED, REFUSED, DEADLINE_PASSED];
/// Header that makes a request safe to send twice.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;
/// Idle connections to one service that are kept.
const IDLE_CONNECTIONS: usize = 32;

/// A request to another service.
#[derive(Clone, Debug)]
pub struct HttpCall {
    pub method: Method,
    /// Path and query, from `/`.
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl HttpCall {
    /// A GET of `path`.
    pub fn get(path: impl Into<String>) -> Self {
        Self { method: Method::GET, path: path.into(), headers: HeaderMap::new(), body: Bytes::new() }
    }

    /// A POST of a JSON document.
    pub fn post(path: impl Into<String>, document: &serde_json::Value) -> Self {
        let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
        Self { method: Method::POST, path: path.into(), headers, body: document.to_string().into() }
    }
}

impl Repeatable for HttpCall {
    fn may_repeat(&self, settings: &RetrySettings) -> bool {
        settings.methods.contains(self.method.as_str()) || self.headers.contains_key(IDEMPOTENCY_KEY)
    }
}

/// An answer, whole.
#[derive(Clone, Debug)]
pub struct HttpAnswer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// Why another service gave no answer to go on with.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nothing was sent.
    #[error("no connection: {0}")]
    NotSent(String),
    /// The connection broke before the answer was there.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// The answer is a failure: 429, 500 and above, or one that the policy retries (`httpStatusCodes`).
    #[error("status {}", .0.status)]
    Status(Box<HttpAnswer>),
    /// The answer is too large.
    #[error("the answer has more than {MAX_ANSWER_BYTES} bytes")]
    TooLarge,
}

impl HttpError {
    fn header(&self, name: HeaderName) -> Option<&str> {
        let Self::Status(answer) = self else { return None };
        answer.headers.get(name)?.to_str().ok()
    }
}

impl Failure for HttpError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::NotSent(_) => FailureKind::NotSent,
            Self::Broken(_) => FailureKind::ConnectFailure,
            Self::TooLarge => FailureKind::Other,
            Self::Status(_) if self.header(REFUSED) == Some("true") => FailureKind::RateLimited,
            Self::Status(_) if self.header(DEADLINE_PASSED) == Some("true") => FailureKind::Timeout,
            Self::Status(answer) => kind_of(answer),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        let Self::Status(answer) = self else { return None };
        retry_after::of(&answer.headers, SystemTime::now())
    }

    fn was_retried(&self) -> bool {
        self.header(RETRIED) == Some("true")
    }
}

/// The kind of an answer that does not say by our headers that it refuses. A 503 that says when to come back is a server
/// that has too much to do; unless it has retried already, as ours have: then something behind it has failed.
pub fn kind_of(answer: &HttpAnswer) -> FailureKind {
    let busy = match answer.status {
        StatusCode::TOO_MANY_REQUESTS => true,
        StatusCode::SERVICE_UNAVAILABLE => {
            !answer.headers.contains_key(RETRIED) && retry_after::of(&answer.headers, SystemTime::now()).is_some()
        }
        _ => false,
    };
    let status = answer.status.as_u16();
    if busy { FailureKind::Overloaded(status) } else { FailureKind::Status(status) }
}

/// Another service, without any layer.
#[derive(Clone)]
pub struct Bare {
    client: reqwest::Client,
    base: String,
    /// Whose policy says which answers are failures; `None`: none below 500 but 429 is.
    dependency: Option<&'static Dependency>,
}

impl Bare {
    async fn ask(self, attempt: Attempt<HttpCall>) -> Result<HttpAnswer, HttpError> {
        let HttpCall { method, path, mut headers, body } = attempt.request;
        if let Some(until) = attempt.deadline {
            headers.insert(deadline::HEADER, deadline::to_header(until));
        }
        let request = self.client.request(method, format!("{}{path}", self.base)).headers(headers).body(body);
        let answer = request.send().await.map_err(|error| {
            let words = in_full(&error);
            if error.is_connect() || error.is_builder() { HttpError::NotSent(words) } else { HttpError::Broken(words) }
        })?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        let body = Limited::new(reqwest::Body::from(answer), MAX_ANSWER_BYTES).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() { HttpError::TooLarge } else { HttpError::Broken(error.to_string()) }
        })?;
        let answer = HttpAnswer { status, headers, body: body.to_bytes() };
        if is_failure(status) || self.dependency.is_some_and(|dependency| is_retried(status, dependency)) {
            return Err(HttpError::Status(Box::new(answer)));
        }
        Ok(answer)
    }
}

/// Whether it is one whatever the policy says.
fn is_failure(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

/// Whether the policy retries it by its number.
fn is_retried(status: StatusCode, dependency: &Dependency) -> bool {
    status.is_client_error() && dependency.settings().retry.http_status_codes.contains(&status.as_u16())
}

/// An error with what caused it; its own words are only where it happened.
pub fn in_full(error: &reqwest::Error) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        words = next.to_string();
        cause = next.source();
    }
    words
}

impl Service<Attempt<HttpCall>> for Bare {
    type Response = HttpAnswer;
    type Error = HttpError;
    type Future = BoxFuture<'static, Result<HttpAnswer, HttpError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), HttpError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, attempt: Attempt<HttpCall>) -> Self::Future {
        Box::pin(self.clone().ask(attempt))
    }
}

/// How a call ended.
type Outcome = Result<HttpAnswer, CallError<HttpError>>;

/// Another service, called through the layers of its dependency.
pub type HttpService = MapResult<Guarded<Bare>, fn(Outcome) -> Outcome>;

/// The service at `base` (such as `http://catalog:8080`) behind the layers of `dependency`.
pub fn service(base: &str, dependency: &'static Dependency) -> HttpService {
    dependency.layer().layer(of_dependency(base, dependency)).map_result(answered)
}

/// A status below 500 is an answer to the caller, also one that was retried until there were no more attempts.
fn answered(outcome: Outcome) -> Outcome {
    match outcome {
        Err(CallError::Failed { source: HttpError::Status(answer), .. }) if !is_failure(answer.status) => Ok(*answer),
        outcome => outcome,
    }
}

/// The service at `base` without layers: for health checks, which are to see it as it is.
pub fn bare(base: &str) -> Bare {
    connect(base, None)
}

/// The same by the policy of `dependency`, whose layers are put around it elsewhere.
pub fn of_dependency(base: &str, dependency: &'static Dependency) -> Bare {
    connect(base, Some(dependency))
}

fn connect(base: &str, dependency: Option<&'static Dependency>) -> Bare {
    let client = reqwest::Client::builder()
        .pool_max_idle_per_host(IDLE_CONNECTIONS)
        // Between services a redirect is a mistake, and no proxy of the environment belongs there.
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .build()
        .unwrap_or_default();
    Bare { client, base: base.trim_end_matches('/').to_owned(), dependency }
}

pub async fn ask(service: &HttpService, call: HttpCall) -> Outcome {
    service.clone().oneshot(call).await
}

/// Headers of an answer that mean something to the caller of the caller.
const PASSED_ON: [HeaderName; 5] = [
    header::AGE,
    header::CONTENT_TYPE,
    header::LOCATION,
    header::RETRY_AFTER,
    HeaderName::from_static("idempotent-replayed"),
];

/// An answer as the gateway's caller gets it.
pub fn pass_on(answer: HttpAnswer) -> Response {
    let mut response = (answer.status, answer.body).into_response();
    response.headers_mut().remove(header::CONTENT_TYPE);
    for name in PASSED_ON {
        if let Some(value) = answer.headers.get(&name) {
            response.headers_mut().insert(name, value.clone());
        }
    }
    response
}
