//! From a request to an answer.

use super::{
    access::{Access, Digest, Refused},
    answer::{self, Failure, LargeAnswer, OutOfTime},
    cors::Cors,
    document::Document,
    etag,
    rate::Rates,
    request::{EvaluationContext, MAX_BODY_BYTES},
    route::Route,
    scopes::{Scope, Scopes},
};
use crate::{
    context::Context,
    telemetry::metrics::{Metrics, OfrepCallLabels, OfrepLabels},
    workload::publish,
};
use bytes::Bytes;
use contract::{FlagsSettings, Section, WorkloadId, WorkloadKind};
use engine::{compile::CompileError, publish::Published};
use http::{
    HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH, RETRY_AFTER, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use jiff::Timestamp;
use serde::Serialize;
use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::Instant,
};

/// Most calls at once; more are asked to come again.
const MAX_AT_ONCE: usize = 256;
/// Most evaluations of all flags, and compilations, at once: they take a processor for a while.
const MAX_LONG_AT_ONCE: usize = 2;
/// Longest wait for a place among those.
const LONG_PATIENCE: Duration = Duration::from_secs(3);
/// Most bytes of answers with all flags that wait for their readers, and the unit that they are counted in.
const MAX_UNREAD_BYTES: usize = 16 * 1024 * 1024;
const ROOM_UNIT: usize = 1024;
/// Longest time for a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for the evaluation of all flags.
const BULK_TIMEOUT: Duration = Duration::from_secs(2);
/// Most clients whose rate is remembered.
const MAX_CLIENTS: usize = 16_384;
/// Header of an answer from caches that may be old; it says why.
const STALE: &str = "x-resilience-stale";

/// An answer.
pub type Answer = Response<Full<Bytes>>;

/// Answers from the caches of this replica.
pub struct Service {
    contexts: Vec<Watched>,
    /// Every cache has been filled once.
    ready: Arc<AtomicBool>,
    metrics: Metrics,
    /// Who may read what.
    pub access: Access,
    /// What was compiled.
    pub scopes: Scopes,
    rates: Rates<Digest>,
    cors: Cors,
    places: Semaphore,
    long_places: Semaphore,
    /// For answers that nobody has read yet, in units.
    room: Arc<Semaphore>,
}

/// An answer that takes room until it is sent, so that callers who do not read fill no memory.
struct Unread {
    body: Vec<u8>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

/// A context, and the namespace that it watches; none: all.
pub type Watched = (Option<String>, Arc<Context>);

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Access(#[from] Refused),
    #[error("too many calls at once")]
    Busy,
    #[error("more calls than a client may make in a second")]
    TooMany(Duration),
    #[error("the caches are still being filled")]
    NotReady,
    #[error("this operator does not watch the namespace {0}")]
    NotWatched(String),
    #[error(
        "there is no Deployment or StatefulSet {workload} in the namespace {namespace}, and no FeatureFlag targets one"
    )]
    NoWorkload { namespace: String, workload: String },
    #[error("the body has more than {MAX_BODY_BYTES} bytes")]
    LargeBody,
    #[error("the body did not arrive within {} s", BODY_TIMEOUT.as_secs())]
    SlowBody,
    #[error("the flags cannot be put together: {0}")]
    Compile(#[from] CompileError),
    #[error(transparent)]
    OutOfTime(#[from] OutOfTime),
    #[error(transparent)]
    LargeAnswer(#[from] LargeAnswer),
    #[error("the evaluation failed inside the operator")]
    Internal,
}

impl Failed {
    const fn status(&self) -> StatusCode {
        match self {
            Self::Access(Refused::NoToken | Refused::InvalidToken) => StatusCode::UNAUTHORIZED,
            Self::Access(Refused::Forbidden(_)) => StatusCode::FORBIDDEN,
            Self::Access(Refused::TooMany(_)) | Self::Busy | Self::TooMany(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Access(Refused::Unavailable(_)) | Self::NotReady | Self::OutOfTime(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::NotWatched(_) | Self::NoWorkload { .. } => StatusCode::NOT_FOUND,
            Self::LargeBody => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::Compile(_) | Self::LargeAnswer(_) | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// When it is worth asking again.
    const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Access(Refused::TooMany(after)) | Self::TooMany(after) => Some(*after),
            Self::Busy | Self::NotReady | Self::Access(Refused::Unavailable(_)) => Some(Duration::from_secs(1)),
            _ => None,
        }
    }

    /// The answer; with the key, if one flag was asked for.
    fn answer(&self, key: Option<&str>) -> Answer {
        let code = match self {
            // As for a flag that is not there, and so providers take it.
            Self::NotWatched(_) | Self::NoWorkload { .. } if key.is_some() => "FLAG_NOT_FOUND",
            _ => "GENERAL",
        };
        let mut answer = json(self.status(), &Failure::new(key, code, self.to_string()));
        if let Some(after) = self.retry_after() {
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            answer.headers_mut().insert(RETRY_AFTER, seconds.max(1).into());
        }
        if self.status() == StatusCode::UNAUTHORIZED {
            answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        answer
    }
}

impl Service {
    /// Answers from these contexts, once `ready` says that their caches are filled.
    pub fn new(
        contexts: Vec<Watched>,
        ready: Arc<AtomicBool>,
        metrics: Metrics,
        access: Access,
        cors: Cors,
        calls_per_second: u32,
    ) -> Self {
        Self {
            contexts,
            ready,
            metrics,
            access,
            scopes: Scopes::default(),
            rates: Rates::new(calls_per_second, MAX_CLIENTS),
            cors,
            places: Semaphore::new(MAX_AT_ONCE),
            long_places: Semaphore::new(MAX_LONG_AT_ONCE),
            room: Arc::new(Semaphore::new(MAX_UNREAD_BYTES / ROOM_UNIT)),
        }
    }

    /// Answers a request.
    pub async fn answer(self: &Arc<Self>, request: Request<Incoming>, from: IpAddr) -> Answer {
        let begun = Instant::now();
        let route = Route::parse(request.uri().path());
        let call = match &route {
            Some(Route { key: Some(_), .. }) => "single",
            Some(Route { key: None, .. }) => "bulk",
            None => "other",
        };
        let mut cors = http::HeaderMap::new();
        let mut answer = if request.method() == Method::OPTIONS {
            self.cors.answer_preflight(request.headers(), &mut cors);
            empty(StatusCode::NO_CONTENT)
        } else {
            self.cors.answer(request.headers(), &mut cors);
            match route {
                None => json(
                    StatusCode::NOT_FOUND,
                    &Failure::new(None, "GENERAL", "there is nothing at this path: the base URL is /namespaces/NAMESPACE or /namespaces/NAMESPACE/workloads/NAME".to_owned()),
                ),
                Some(_) if request.method() != Method::POST => {
                    let details = "flags are evaluated with POST".to_owned();
                    let mut answer = json(StatusCode::METHOD_NOT_ALLOWED, &Failure::new(None, "GENERAL", details));
                    answer.headers_mut().insert(ALLOW, HeaderValue::from_static("POST, OPTIONS"));
                    answer
                }
                Some(route) => {
                    let key = route.key.clone();
                    let evaluated = self.evaluate(request, from, route).await;
                    evaluated.unwrap_or_else(|failed| failed.answer(key.as_deref()))
                }
            }
        };
        answer.headers_mut().extend(cors);
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let result = result(answer.status());
        self.metrics.ofrep_requests.get_or_create(&OfrepLabels { call, result }).inc();
        let seconds = self.metrics.ofrep_request_seconds.get_or_create(&OfrepCallLabels { call });
        seconds.observe(begun.elapsed().as_secs_f64());
        answer
    }

    async fn evaluate(
        self: &Arc<Self>,
        request: Request<Incoming>,
        from: IpAddr,
        route: Route,
    ) -> Result<Answer, Failed> {
        let _place = self.places.try_acquire().map_err(|_| Failed::Busy)?;
        let client = self.access.check(request.headers(), from, &route.namespace).await?;
        self.rates.take(client, Instant::now()).map_err(Failed::TooMany)?;
        if !self.ready.load(Ordering::Relaxed) {
            return Err(Failed::NotReady);
        }
        let watches = |(watched, _): &&Watched| watched.as_ref().is_none_or(|watched| *watched == route.namespace);
        let watched = self.contexts.iter().find(watches).ok_or_else(|| Failed::NotWatched(route.namespace.clone()))?;
        let ctx = &watched.1;
        let if_none_match = request.headers().get(IF_NONE_MATCH).cloned();
        let body = body(request).await?;
        let context = match EvaluationContext::parse(&body) {
            Ok(context) => context,
            Err(error) => {
                let failure = Failure::new(route.key.as_deref(), error.code(), error.to_string());
                return Ok(json(StatusCode::BAD_REQUEST, &failure));
            }
        };
        let scope = scope(ctx, &route)?;
        let document = self.document(ctx, &scope).await?;
        let mut answer = match &route.key {
            Some(key) => single(&document, key, &context, &scope),
            None => self.bulk(document, context, if_none_match.as_ref()).await?,
        };
        if let Some(why) = ctx.observer_stale()
            && let Ok(why) = HeaderValue::from_str(&why)
        {
            answer.headers_mut().insert(STALE, why);
        }
        Ok(answer)
    }

    /// The flags of a scope as they are now.
    async fn document(self: &Arc<Self>, ctx: &Arc<Context>, scope: &Scope) -> Result<Arc<Document>, Failed> {
        let namespace = match scope {
            Scope::Namespace(namespace) => namespace,
            Scope::Workload(id) => &id.namespace,
        };
        // Before the sets are read: what changes in between makes another version.
        let version = ctx.index.flag_sets_version(namespace);
        if let Some(fresh) = self.scopes.fresh(scope, version, Instant::now()) {
            return Ok(fresh);
        }
        let _place = self.long_place().await?;
        let published = match scope {
            Scope::Workload(id) if !self.scopes.is_known(scope) => published(ctx, id).await,
            _ => None,
        };
        let (service, ctx, scope) = (Arc::clone(self), Arc::clone(ctx), scope.clone());
        let refreshed = tokio::task::spawn_blocking(move || {
            service.scopes.refresh(&scope, version, Instant::now(), |before| {
                let (namespace, document) = match &scope {
                    Scope::Namespace(namespace) => {
                        (namespace, Ok(Document::of_namespace(&ctx.index.flag_sets_in(namespace), before)))
                    }
                    Scope::Workload(id) => {
                        let sets = ctx.index.flag_sets_of(id);
                        (&id.namespace, Document::of_workload(&sets, before, published.as_ref()))
                    }
                };
                document.map(|document| document.degraded(&ctx.index.degradations_in(namespace)))
            })
        });
        Ok(refreshed.await.map_err(|_| Failed::Internal)??)
    }

    /// Waits for a place among the calls that take a processor for a while.
    async fn long_place(&self) -> Result<SemaphorePermit<'_>, Failed> {
        let place = tokio::time::timeout(LONG_PATIENCE, self.long_places.acquire());
        place.await.map_err(|_| Failed::Busy)?.map_err(|_| Failed::Busy)
    }

    /// All flags.
    async fn bulk(
        &self,
        document: Arc<Document>,
        context: EvaluationContext,
        if_none_match: Option<&HeaderValue>,
    ) -> Result<Answer, Failed> {
        let _place = self.long_place().await?;
        let evaluated = tokio::task::spawn_blocking(move || {
            let (now_ms, end) = (Timestamp::now().as_millisecond(), Instant::now() + BULK_TIMEOUT);
            let bulk = answer::bulk(&document, &context, now_ms, || Instant::now() >= end)?;
            let body = answer::spell(&bulk)?;
            let tag = etag::of(&body);
            Ok::<_, Failed>((body, tag))
        });
        let (body, tag) = evaluated.await.map_err(|_| Failed::Internal)??;
        let known = if_none_match.and_then(|value| value.to_str().ok());
        let mut answer = if known.is_some_and(|known| etag::is_named(&tag, known)) {
            empty(StatusCode::NOT_MODIFIED)
        } else {
            let size = u32::try_from(body.len().div_ceil(ROOM_UNIT)).map_err(|_| Failed::Busy)?;
            let room = Arc::clone(&self.room).try_acquire_many_owned(size).map_err(|_| Failed::Busy)?;
            with_body(StatusCode::OK, Bytes::from_owner(Unread { body, _room: room }))
        };
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            answer.headers_mut().insert(ETAG, tag);
        }
        Ok(answer)
    }
}

/// One flag.
fn single(document: &Document, key: &str, context: &EvaluationContext, scope: &Scope) -> Answer {
    match answer::single(document, key, context, Timestamp::now().as_millisecond()) {
        Some(evaluated @ answer::Evaluated::Success(_)) => json(StatusCode::OK, &evaluated),
        Some(evaluated @ answer::Evaluated::Failure(_)) => json(StatusCode::BAD_REQUEST, &evaluated),
        None => json(StatusCode::NOT_FOUND, &Failure::not_found(key, &scope.to_string())),
    }
}

/// Whose flags a path means. Of a Deployment and a StatefulSet of one name it is the Deployment.
fn scope(ctx: &Context, route: &Route) -> Result<Scope, Failed> {
    let Some(name) = &route.workload else { return Ok(Scope::Namespace(route.namespace.clone())) };
    let [deployment, stateful_set] = [WorkloadKind::Deployment, WorkloadKind::StatefulSet]
        .map(|kind| WorkloadId::new(route.namespace.as_str(), kind, name.as_str()));
    let exists = |id: &&WorkloadId| ctx.index.workload(id).is_some();
    let is_targeted = |id: &&WorkloadId| !ctx.index.flag_set_keys_of(id).is_empty();
    let both = [&deployment, &stateful_set];
    let found = both.into_iter().find(exists).or_else(|| both.into_iter().find(is_targeted));
    found
        .map(|id| Scope::Workload(id.clone()))
        .ok_or_else(|| Failed::NoWorkload { namespace: route.namespace.clone(), workload: name.clone() })
}

/// The flags that a workload's pods have: what stays of a set that was invalid before this replica knew it. If they cannot be
/// read, only that is missing.
async fn published(ctx: &Context, id: &WorkloadId) -> Option<Section<FlagsSettings>> {
    ctx.index.config_map(id)?;
    let found = publish::read(&ctx.shared.clients, id).await.ok()??;
    match publish::document(found.text.as_deref(), id) {
        Published::Document(document) => Some(document.flags),
        Published::Nothing | Published::Damaged => None,
    }
}

async fn body(request: Request<Incoming>) -> Result<Bytes, Failed> {
    let body = Limited::new(request.into_body(), MAX_BODY_BYTES).collect();
    let collected = tokio::time::timeout(BODY_TIMEOUT, body).await.map_err(|_| Failed::SlowBody)?;
    // A connection that broke is told nothing anyway.
    collected.map(http_body_util::Collected::to_bytes).map_err(|_| Failed::LargeBody)
}

fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    match serde_json::to_vec(body) {
        Ok(body) => with_body(status, body),
        Err(_) => empty(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

fn with_body(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    answer
}

/// The label of a status.
fn result(status: StatusCode) -> &'static str {
    match status {
        StatusCode::OK | StatusCode::NO_CONTENT => "ok",
        StatusCode::NOT_MODIFIED => "not_modified",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::UNAUTHORIZED => "unauthorized",
        StatusCode::FORBIDDEN => "forbidden",
        StatusCode::TOO_MANY_REQUESTS => "limited",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        status if status.is_client_error() => "invalid",
        _ => "error",
    }
}
