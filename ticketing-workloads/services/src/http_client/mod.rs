//! Calls to other services over HTTP, behind the layers of a dependency.

mod connections;
mod ejection;
mod endpoints;
mod retry_after;
#[cfg(test)]
mod tests;

pub use connections::Keep;
pub use endpoints::Resolve;

use crate::buyer::{BUYER, BUYER_NETWORK, BUYER_SESSION};
use axum::body::Bytes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use connections::{Connection, Connections, Failed, KEEP};
use contract::RetrySettings;
use endpoints::{Endpoints, Refused};
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use resilience::failure::Verdict;
use resilience::server::ByteBudget;
use resilience::{Attempt, Guarded, Repeatable};
use resilience::{CallError, Dependency, Failure, FailureKind, deadline, priority};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::time::{Instant, timeout_at};
use tower::util::MapResult;
use tower::{Layer, Service, ServiceExt};

/// In an answer: its sender has retried already, so its callers should not retry on top.
pub const RETRIED: HeaderName = HeaderName::from_static("x-retried");
/// In an answer: nothing has failed, its sender only does not want the request now.
pub const REFUSED: HeaderName = HeaderName::from_static("x-refused");
/// Value of [`REFUSED`]: not wanted of this asker. The next one who asks is somebody else, so it is an answer like any other.
pub const OF_ASKER: &str = "asker";
/// In an answer that is a failure: the deadline that the request came with had passed by then. It says nothing of its sender.
pub const DEADLINE_PASSED: HeaderName = HeaderName::from_static("x-deadline-passed");
/// What services of ours say to each other only: the edge takes it from nobody, and tells it nobody.
pub const INTERNAL: [HeaderName; 8] =
    [deadline::HEADER, priority::HEADER, RETRIED, REFUSED, DEADLINE_PASSED, BUYER, BUYER_SESSION, BUYER_NETWORK];
/// Header that makes a request safe to send twice.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Largest answer that is read, in bytes.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Bytes of answers that the process holds at once while they arrive.
static ANSWERS: ByteBudget = ByteBudget::new(32 * 1024 * 1024);
/// Time to open a connection, if the policy names none. A packet that was lost is sent again after a second; what takes longer
/// is a pod that has gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Endpoints that are asked at most, if the ones before took no connection.
const MAX_ENDPOINTS_TRIED: usize = 3;
/// How long before the end of an attempt it is decided whether its endpoint alone gives no answer: before the attempt timeout,
/// which knows of no endpoints.
const EARLIER: Duration = Duration::from_millis(5);
/// Code of an answer of a server of ours that had no place for the connection: nothing was begun.
pub const TOO_MANY_CONNECTIONS: &str = "TOO_MANY_CONNECTIONS";

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
    /// Whether it is a failure, and the endpoint that gave it is left out since. That one fails is dealt with then, and is no
    /// evidence against the others: those calls that it failed at once would open the circuit.
    pub from_ejected: bool,
}

/// Why another service gave no answer to go on with.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// Nothing was sent.
    #[error("no connection: {0}")]
    NotSent(String),
    /// The connection broke before the answer was there. `from_ejected` as of [`HttpAnswer`].
    #[error("the connection broke: {why}")]
    Broken { why: String, from_ejected: bool },
    /// Nothing came in time from an endpoint, while others have answered.
    #[error("the endpoint gave no answer in time; others do")]
    NoAnswer,
    /// The answer is a failure: 429, 500 and above, or one that the policy retries (`httpStatusCodes`).
    #[error("status {}", .0.status)]
    Status(Box<HttpAnswer>),
    /// The answer is too large.
    #[error("the answer has more than {most} bytes")]
    TooLarge { most: usize },
    /// This process has no memory for it.
    #[error("too many answers arrive at once")]
    NoMemory,
}

impl HttpError {
    pub fn broken(why: String) -> Self {
        Self::Broken { why, from_ejected: false }
    }

    /// Whether it is no evidence against the service as a whole: its endpoint is left out, or fails alone.
    pub fn is_isolated(&self) -> bool {
        match self {
            Self::Status(answer) => answer.from_ejected,
            Self::Broken { from_ejected, .. } => *from_ejected,
            Self::NoAnswer => true,
            Self::NotSent(_) | Self::TooLarge { .. } | Self::NoMemory => false,
        }
    }

    fn header(&self, name: HeaderName) -> Option<&str> {
        let Self::Status(answer) = self else { return None };
        answer.headers.get(name)?.to_str().ok()
    }
}

impl Failure for HttpError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::NotSent(_) => FailureKind::NotSent,
            Self::Broken { .. } => FailureKind::ConnectFailure,
            Self::NoAnswer => FailureKind::Timeout,
            Self::TooLarge { .. } => FailureKind::Other,
            Self::NoMemory => FailureKind::GivenUp,
            Self::Status(_) if self.header(REFUSED) == Some("true") => FailureKind::RateLimited,
            Self::Status(_) if self.header(REFUSED) == Some(OF_ASKER) => FailureKind::Business,
            Self::Status(_) if self.header(DEADLINE_PASSED) == Some("true") => FailureKind::Timeout,
            Self::Status(answer) => kind_of(answer),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        let Self::Status(answer) = self else { return None };
        retry_after::of(&answer.headers, SystemTime::now())
    }

    fn verdict(&self) -> Verdict {
        if self.is_isolated() { Verdict::Neutral } else { self.kind().verdict() }
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
pub struct Bare(Result<Arc<Peer>, String>);

/// A service at an address that can be read.
struct Peer {
    /// For the header `Host`.
    host: HeaderValue,
    /// What comes before every path.
    prefix: String,
    endpoints: Arc<Endpoints>,
    connections: Arc<Connections>,
    /// Whose policy says which answers are failures; `None`: none below 500 but 429 is.
    dependency: Option<&'static Dependency>,
}

impl Peer {
    fn new(
        base: &str,
        dependency: Option<&'static Dependency>,
        resolve: Resolve,
        keep: Keep,
    ) -> Result<Arc<Self>, String> {
        let invalid = |why: &str| format!("the address {base:?} {why}: it must be like http://catalog:8080");
        let uri: Uri = base.trim_end_matches('/').parse().map_err(|_| invalid("is no URL"))?;
        let authority = uri.authority().ok_or_else(|| invalid("names no host"))?;
        if uri.scheme_str() != Some("http") {
            return Err(invalid("is not of HTTP without TLS"));
        }
        if authority.as_str().contains('@') {
            return Err(invalid("has credentials, which are not sent"));
        }
        let host = HeaderValue::from_str(authority.as_str()).map_err(|_| invalid("names no host"))?;
        let endpoints = Endpoints::new(authority.host(), authority.port_u16().unwrap_or(80), resolve, dependency);
        let prefix = uri.path().trim_end_matches('/').to_owned();
        Ok(Arc::new(Self { host, prefix, endpoints, connections: Connections::new(keep), dependency }))
    }

    /// Asks one endpoint; the next ones only if nothing could be sent to those before. Whatever came after a request that was
    /// lost on its way, and whenever: that one may have arrived, so it is `Broken`, and nobody may say that nothing was sent.
    async fn ask(&self, attempt: Attempt<HttpCall>) -> Result<HttpAnswer, HttpError> {
        let mut lost = None;
        match self.ask_endpoints(attempt, &mut lost).await {
            Err(HttpError::NotSent(why)) => Err(lost.map_or(HttpError::NotSent(why), HttpError::broken)),
            Err(HttpError::Status(answer)) if was_not_begun(&answer) => {
                Err(lost.map_or(HttpError::Status(answer), HttpError::broken))
            }
            result => result,
        }
    }

    /// The same; `lost`: how a request was lost, if one was, whose end is not the answer.
    async fn ask_endpoints(
        &self,
        attempt: Attempt<HttpCall>,
        lost: &mut Option<String>,
    ) -> Result<HttpAnswer, HttpError> {
        let Attempt { request: call, deadline: until, .. } = attempt;
        let settings = self.dependency.map(Dependency::settings).unwrap_or_default();
        let own = Duration::from_millis(settings.timeout.per_try_ms);
        // As for the circuit: what a caller gave too little time says nothing of whom it was to ask.
        let short = until.is_some_and(|until| until < Instant::now() + own / 2);
        let bound = settings.timeout.connect_ms.map_or(CONNECT_TIMEOUT, Duration::from_millis);
        let may_repeat = call.may_repeat(&settings.retry);
        let mut request = self.request(call)?;
        let (mut tried, mut refused) = (Vec::new(), None);
        while tried.len() < MAX_ENDPOINTS_TRIED {
            let Some(asked) =
                self.endpoints.choose(&tried, until.filter(|_| !short)).await.map_err(HttpError::NotSent)?
            else {
                break;
            };
            if let Some(until) = until {
                request.headers_mut().insert(deadline::HEADER, deadline::to_header(until));
            }
            let address = asked.address();
            let mut answer = pin!(self.ask_endpoint(address, &request, may_repeat, lost, bound));
            let result = match until.filter(|_| !short) {
                Some(until) => match timeout_at(until - EARLIER.min(own / 10), &mut answer).await {
                    Ok(result) => result,
                    Err(_) if asked.give_up() => {
                        self.dependency.inspect(|dependency| dependency.record_timeout());
                        return Err(HttpError::NoAnswer);
                    }
                    // The attempt timeout says the rest.
                    Err(_) => return answer.await,
                },
                None => answer.await,
            };
            let is_isolated = asked.finish(verdict(&result, short), refused_by(&result, short));
            match result {
                Err(error @ HttpError::NotSent(_)) => {
                    self.endpoints.may_have_changed();
                    tried.push(address);
                    refused = Some(error);
                }
                Err(HttpError::Status(answer)) if was_not_begun(&answer) => {
                    tried.push(address);
                    refused = Some(HttpError::Status(answer));
                }
                Err(HttpError::Status(mut answer)) => {
                    answer.from_ejected = is_isolated;
                    return Err(HttpError::Status(answer));
                }
                Err(HttpError::Broken { why, .. }) => return Err(HttpError::Broken { why, from_ejected: is_isolated }),
                result => return result,
            }
        }
        Err(refused.unwrap_or_else(|| HttpError::NotSent("there is no endpoint to ask".to_owned())))
    }

    fn request(&self, call: HttpCall) -> Result<Request<Full<Bytes>>, HttpError> {
        let HttpCall { method, path, headers, body } = call;
        let uri = format!("{}{path}", self.prefix);
        let request = Request::builder().method(method).uri(uri).body(Full::new(body));
        let mut request = request.map_err(|error| HttpError::NotSent(error.to_string()))?;
        *request.headers_mut() = headers;
        request.headers_mut().insert(header::HOST, self.host.clone());
        if let Some(priority) = priority::current() {
            request.headers_mut().insert(priority::HEADER, priority.to_header());
        }
        Ok(request)
    }

    /// On an idle connection, or a new one. An idle one may have been closed by the other side while the request was on its
    /// way: a request that never began, or may be made twice, is sent again, once, on a new one (RFC 9112 §9.3.1). `NotSent`:
    /// the endpoint takes no connection; how the request was lost before is in `lost`.
    async fn ask_endpoint(
        &self,
        address: SocketAddr,
        request: &Request<Full<Bytes>>,
        may_repeat: bool,
        lost: &mut Option<String>,
        bound: Duration,
    ) -> Result<HttpAnswer, HttpError> {
        while lost.is_none()
            && let Some(mut connection) = self.connections.take(address).await
        {
            match connection.send(request.clone()).await {
                Ok(answer) => return self.read(address, connection, answer).await,
                Err(Failed::NotSent(_)) => {}
                Err(Failed::Broken { error, closing: true }) if may_repeat => *lost = Some(in_full(&error)),
                Err(Failed::Broken { error, .. }) => return Err(HttpError::broken(in_full(&error))),
            }
        }
        let mut connection = self.connections.open(address, bound).await.map_err(HttpError::NotSent)?;
        match connection.send(request.clone()).await {
            Ok(answer) => self.read(address, connection, answer).await,
            Err(Failed::NotSent(error)) => Err(HttpError::NotSent(in_full(&error))),
            Err(Failed::Broken { error, .. }) => Err(HttpError::broken(in_full(&error))),
        }
    }

    async fn read(
        &self,
        address: SocketAddr,
        connection: Connection,
        answer: Response<Incoming>,
    ) -> Result<HttpAnswer, HttpError> {
        let (parts, body) = answer.into_parts();
        let body = collect(body, MAX_ANSWER_BYTES).await?;
        let answer = HttpAnswer { status: parts.status, headers: parts.headers, body, from_ejected: false };
        let is_retried = |dependency| is_retried(answer.status, dependency);
        let result = if is_failure(answer.status) || self.dependency.is_some_and(is_retried) {
            Err(HttpError::Status(Box::new(answer)))
        } else {
            Ok(answer)
        };
        // Behind one address there may be many pods, to one of which each connection leads: not again to one that fails.
        if verdict(&result, false) != Verdict::Failure {
            self.connections.put_back(address, connection, |address| self.endpoints.contains(address));
        }
        result
    }
}

/// Whether the answer comes from a server that had no place for the connection, and has read nothing of the request.
fn was_not_begun(answer: &HttpAnswer) -> bool {
    let refused = answer.headers.get(REFUSED).is_some_and(|value| value == "true");
    refused && error_code(&answer.body).is_some_and(|code| code == TOO_MANY_CONNECTIONS)
}

/// The code in an answer of ours that is no success.
pub fn error_code(body: &[u8]) -> Option<String> {
    let body: serde_json::Value = serde_json::from_slice(body).ok()?;
    body["errorCode"].as_str().map(str::to_owned)
}

/// What a result says of the endpoint that was asked, `short`: by a caller that gave it too little time.
fn verdict(result: &Result<HttpAnswer, HttpError>, short: bool) -> Verdict {
    match result {
        Ok(_) => Verdict::Success,
        Err(error) => match error.kind() {
            FailureKind::Timeout | FailureKind::ConnectFailure | FailureKind::Other if short => Verdict::Neutral,
            kind => kind.verdict(),
        },
    }
}

/// Whether the endpoint has refused because of its load. Not if there was little time: that may have been why.
fn refused_by(result: &Result<HttpAnswer, HttpError>, short: bool) -> Option<Refused> {
    let error = result.as_ref().err().filter(|_| !short)?;
    let refused = matches!(error.kind(), FailureKind::RateLimited | FailureKind::Overloaded(_));
    refused.then(|| Refused { wait: error.retry_after() })
}

/// All of an answer, of `most` bytes. While it arrives, it counts for all that the process holds.
pub async fn collect(mut body: Incoming, most: usize) -> Result<Bytes, HttpError> {
    let mut held = ANSWERS.hold();
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| HttpError::broken(in_full(&error)))?;
        let Ok(data) = frame.into_data() else { continue };
        if data.len() > most - bytes.len() {
            return Err(HttpError::TooLarge { most });
        }
        if !held.add(data.len()) {
            return Err(HttpError::NoMemory);
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.into())
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
pub fn in_full(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
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
        let peer = self.0.clone();
        Box::pin(async move { peer.map_err(HttpError::NotSent)?.ask(attempt).await })
    }
}

/// How a call ended.
type Outcome = Result<HttpAnswer, CallError<HttpError>>;

/// Another service, called through the layers of its dependency.
pub type HttpService = MapResult<Guarded<Bare>, fn(Outcome) -> Outcome>;

/// The service at `base` (such as `http://catalog:8080`) behind the layers of `dependency`.
pub fn service(base: &str, dependency: &'static Dependency) -> HttpService {
    guarded(of_dependency(base, dependency), dependency)
}

/// A service behind the layers of `dependency`.
pub fn guarded(bare: Bare, dependency: &'static Dependency) -> HttpService {
    dependency.layer().layer(bare).map_result(answered)
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
    Bare::new(base, None, endpoints::dns(), KEEP)
}

/// The same by the policy of `dependency`, whose layers are put around it elsewhere.
pub fn of_dependency(base: &str, dependency: &'static Dependency) -> Bare {
    Bare::new(base, Some(dependency), endpoints::dns(), KEEP)
}

impl Bare {
    /// The service at `base`, whose addresses `resolve` knows. Where `base` is no address, each call says so.
    pub fn new(base: &str, dependency: Option<&'static Dependency>, resolve: Resolve, keep: Keep) -> Self {
        Self(Peer::new(base, dependency, resolve, keep))
    }
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
