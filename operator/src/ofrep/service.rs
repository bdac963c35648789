//! From a request to an answer.

use super::{
    access::{self, Access, Caller, Refused, static_tokens::StaticTokens},
    answer::{self, Failure, LargeAnswer, OutOfTime},
    cors::Cors,
    document::Document,
    etag, flagd,
    hub::{Full, Hub},
    rate::Rates,
    request::{EvaluationContext, MAX_BODY_BYTES},
    route::{Call, EVENTS, Route},
    scopes::{Scope, Scopes},
    spans,
    stream::{Events, Right, Streaming},
    teller,
    thread_time::ThreadTime,
    tickets::{Client, InvalidTicket, Tickets},
    turns::{Crowded, Limits, Place, Turns},
};
use crate::{
    context::Context,
    telemetry::metrics::{Metrics, OfrepCallLabels, OfrepLabels, OfrepStreamEndLabels},
    workload::publish,
};
use bytes::Bytes;
use contract::{FlagsSettings, Section, WorkloadId, WorkloadKind};
use engine::{compile::CompileError, publish::Published};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, ETAG, IF_NONE_MATCH, RETRY_AFTER, WWW_AUTHENTICATE},
};
use http_body_util::{BodyExt, Either, Full as Whole, Limited};
use hyper::body::Incoming;
use jiff::Timestamp;
use serde::Serialize;
use std::{
    fmt::Display,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Calls at once. When flags change, all that listen call at the same time: they wait for a moment.
const CALLS: Limits = Limits { places: 256, share: 128, waiting: 1280, patience: Duration::from_secs(3) };
/// Evaluations and compilations that take a processor for a while. One namespace has half of the places at most.
const LONG_CALLS: Limits = Limits { places: 2, share: 1, waiting: 128, patience: Duration::from_secs(3) };
/// A long call gives way to those of other namespaces after this time.
const SLICE: Duration = Duration::from_millis(20);
/// Most bytes of answers with all flags that wait for their readers, and the unit that they are counted in.
const MAX_UNREAD_BYTES: usize = 16 * 1024 * 1024;
const ROOM_UNIT: usize = 1024;
/// Longest time for a body to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// Most work for the evaluation of all flags, and the longest time that it may take where processors are scarce.
const BULK_TIMEOUT: Duration = Duration::from_secs(1);
const BULK_PATIENCE: Duration = Duration::from_secs(10);
/// How often is looked how much work there was.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// Most clients whose rate is remembered.
const MAX_CLIENTS: usize = 16_384;
/// Longest name of an event that a client has seen before, in bytes.
const MAX_EVENT_ID: usize = 64;
/// When it is worth asking for a stream again while there are too many.
const STREAMS_LATER: Duration = Duration::from_secs(30);
/// Header of an answer from caches that may be old; it says why.
const STALE: &str = "x-resilience-stale";
/// Tells a proxy to pass on what a stream says at once.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The body of an answer: all at once, or a stream of changes.
pub type Payload = Either<Whole<Bytes>, Events>;

/// An answer.
pub type Answer = Response<Payload>;

/// Answers from the caches of this replica.
pub struct Service {
    parts: Parts,
    /// What was compiled.
    pub scopes: Scopes,
    rates: Rates<Client>,
    calls: Arc<Turns>,
    long_calls: Arc<Turns>,
    hub: Arc<Hub>,
    /// Room for answers that nobody has read yet, in units.
    room: Arc<Semaphore>,
}

/// What a service is made of.
pub struct Parts {
    /// What is watched.
    pub contexts: Vec<Watched>,
    /// Every cache has been filled once.
    pub ready: Arc<AtomicBool>,
    /// Metrics.
    pub metrics: Metrics,
    /// Who may read what.
    pub access: Access,
    /// Who knows clients again.
    pub tickets: Tickets,
    /// Which web pages may call.
    pub cors: Cors,
    /// Calls that a client may make in a second.
    pub calls_per_second: u32,
    /// Most streams of changes.
    pub streams: usize,
    /// Ends the streams.
    pub shutdown: CancellationToken,
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
pub(crate) enum Failed {
    #[error(transparent)]
    Access(#[from] Refused),
    #[error(transparent)]
    Ticket(#[from] InvalidTicket),
    #[error(transparent)]
    Crowded(#[from] Crowded),
    #[error(transparent)]
    Streams(#[from] Full),
    #[error(
        "a static token is for the evaluation of flags alone: the document of flagd, which shows the rules, is for accounts that may get featureflags"
    )]
    OnlyAnswers,
    #[error("this operator tells of no changes: ask for all flags now and then instead")]
    NoStreams,
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
            Self::Access(Refused::NoToken | Refused::InvalidToken) | Self::Ticket(_) => StatusCode::UNAUTHORIZED,
            Self::Access(Refused::Forbidden(_)) | Self::OnlyAnswers => StatusCode::FORBIDDEN,
            Self::Access(Refused::TooMany(_)) | Self::Crowded(_) | Self::TooMany(_) | Self::Streams(_) => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::Access(Refused::Unavailable(_)) | Self::NotReady | Self::OutOfTime(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::NotWatched(_) | Self::NoWorkload { .. } | Self::NoStreams => StatusCode::NOT_FOUND,
            Self::LargeBody => StatusCode::PAYLOAD_TOO_LARGE,
            Self::SlowBody => StatusCode::REQUEST_TIMEOUT,
            Self::Compile(_) | Self::LargeAnswer(_) | Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// When it is worth asking again.
    const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Access(Refused::TooMany(after)) | Self::TooMany(after) => Some(*after),
            Self::Crowded(_) | Self::NotReady | Self::Access(Refused::Unavailable(_)) => Some(Duration::from_secs(1)),
            Self::Streams(_) => Some(STREAMS_LATER),
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
    /// Answers from these parts, once `ready` says that their caches are filled.
    pub fn new(parts: Parts) -> Self {
        Self {
            scopes: Scopes::default(),
            rates: Rates::new(parts.calls_per_second, MAX_CLIENTS),
            calls: Turns::new(CALLS),
            long_calls: Turns::new(LONG_CALLS),
            hub: Hub::new(parts.streams),
            room: Arc::new(Semaphore::new(MAX_UNREAD_BYTES / ROOM_UNIT)),
            parts,
        }
    }

    /// Who may read what.
    pub const fn access(&self) -> &Access {
        &self.parts.access
    }

    /// Metrics.
    pub const fn metrics(&self) -> &Metrics {
        &self.parts.metrics
    }

    /// Answers a request.
    pub async fn answer(self: &Arc<Self>, request: Request<Incoming>, from: IpAddr) -> Answer {
        let begun = Instant::now();
        let route = Route::parse(request.uri().path());
        let call = route.as_ref().map_or("other", |route| route.call.label());
        let mut cors = HeaderMap::new();
        let mut answer = if request.method() == Method::OPTIONS {
            self.parts.cors.answer_preflight(request.headers(), &mut cors);
            empty(StatusCode::NO_CONTENT)
        } else {
            self.parts.cors.answer(request.headers(), &mut cors);
            match route {
                None => json(
                    StatusCode::NOT_FOUND,
                    &Failure::new(None, "GENERAL", "there is nothing at this path: the base URL is /namespaces/NAMESPACE or /namespaces/NAMESPACE/workloads/NAME".to_owned()),
                ),
                Some(route) => match route.call.method() {
                    (method, _) if request.method() == method => {
                        let key = route.call.key().map(str::to_owned);
                        let answered = self.answer_route(request, from, route).await;
                        answered.unwrap_or_else(|failed| failed.answer(key.as_deref()))
                    }
                    (method, allowed) => {
                        let details = format!("this is asked for with {method}");
                        let failure = Failure::new(None, "GENERAL", details);
                        let mut answer = json(StatusCode::METHOD_NOT_ALLOWED, &failure);
                        answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
                        answer
                    }
                },
            }
        };
        answer.headers_mut().extend(cors);
        answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let result = result(answer.status());
        let metrics = self.metrics();
        metrics.ofrep_requests.get_or_create(&OfrepLabels { call, result }).inc();
        let seconds = metrics.ofrep_request_seconds.get_or_create(&OfrepCallLabels { call });
        seconds.observe(begun.elapsed().as_secs_f64());
        answer
    }

    async fn answer_route(
        self: &Arc<Self>,
        request: Request<Incoming>,
        from: IpAddr,
        route: Route,
    ) -> Result<Answer, Failed> {
        // Only who may read there takes a place of the namespace.
        let access = self.admit(&request, from, &route).await?;
        self.rates.take(access.client, Instant::now()).map_err(Failed::TooMany)?;
        let _place = self.calls.take(&route.namespace).await?;
        if !self.parts.ready.load(Ordering::Relaxed) {
            return Err(Failed::NotReady);
        }
        let watches = |(watched, _): &&Watched| watched.as_ref().is_none_or(|watched| *watched == route.namespace);
        let watched = self.parts.contexts.iter().find(watches);
        let ctx = &watched.ok_or_else(|| Failed::NotWatched(route.namespace.clone()))?.1;
        let mut answer = match &route.call {
            Call::Single(_) | Call::Bulk => self.evaluate(request, ctx, &route, &access).await?,
            Call::Events => self.stream(&request, ctx, &route, access)?,
            // It shows the rules. A static token is often public, and may see no more than answers.
            Call::Document if access.is_static => return Err(Failed::OnlyAnswers),
            Call::Document => self.document_of_flagd(&request, ctx, &route).await?,
        };
        if let Some(why) = ctx.observer_stale()
            && let Ok(why) = HeaderValue::from_str(&why)
        {
            answer.headers_mut().insert(STALE, why);
        }
        Ok(answer)
    }

    /// Who calls, if it may. A stream of changes may be opened by a ticket.
    async fn admit(
        self: &Arc<Self>,
        request: &Request<Incoming>,
        from: IpAddr,
        route: &Route,
    ) -> Result<Admitted, Failed> {
        let Parts { access, tickets, .. } = &self.parts;
        let namespace = &route.namespace;
        let ticket = request.uri().query().and_then(ticket).filter(|_| route.call == Call::Events);
        let headers = access::credentials(request.headers());
        if headers.is_empty()
            && let Some(ticket) = ticket
        {
            let ticket = tickets.read(ticket, &route.base(), Timestamp::now())?;
            let by = match ticket.until {
                Some(until) => Credential::Until(until),
                None => Credential::Static(self.static_tokens_of(&ticket.client, namespace).ok_or(InvalidTicket)?),
            };
            return Ok(Admitted { client: ticket.client, is_static: ticket.until.is_none(), by });
        }
        let Caller { digest, is_static } = access.check(&headers, from, namespace).await?;
        Ok(Admitted { client: tickets.client(&digest), is_static, by: Credential::Token(headers) })
    }

    /// The static tokens, if one of them for the namespace is that of the client.
    fn static_tokens_of(&self, client: &Client, namespace: &str) -> Option<Arc<StaticTokens>> {
        let tokens = self.access().static_tokens();
        tokens.any_reaches(namespace, |digest| self.parts.tickets.client(digest) == *client).then_some(tokens)
    }

    async fn evaluate(
        self: &Arc<Self>,
        request: Request<Incoming>,
        ctx: &Arc<Context>,
        route: &Route,
        access: &Admitted,
    ) -> Result<Answer, Failed> {
        let if_none_match = request.headers().get(IF_NONE_MATCH).cloned();
        let body = body(request).await?;
        let context = match EvaluationContext::parse(&body) {
            Ok(context) => context,
            Err(error) => {
                let failure = Failure::new(route.call.key(), error.code(), error.to_string());
                return Ok(json(StatusCode::BAD_REQUEST, &failure));
            }
        };
        let scope = scope(ctx, route)?;
        let document = self.document(ctx, &scope).await?;
        let Some(key) = route.call.key() else {
            let stream = self.hub.is_open().then(|| {
                let base = route.base();
                let ticket = self.parts.tickets.issue(&access.client, access.is_static, &base, Timestamp::now());
                format!("{base}/{EVENTS}?ticket={ticket}")
            });
            return self.bulk(document, context, if_none_match.as_ref(), stream, &scope).await;
        };
        let now_ms = Timestamp::now().as_millisecond();
        let by_rule = || document.flags.find(key).is_some_and(|flag| flag.for_every_request(None, now_ms).is_none());
        if document.is_slow() && by_rule() {
            let (key, shown) = (key.to_owned(), scope.to_string());
            return self.long(&route.namespace, move |_| single(&document, &key, &context, now_ms, &shown)).await;
        }
        let begun = ThreadTime::now();
        let answer = single(&document, key, &context, now_ms, &scope);
        document.note_time(begun.elapsed());
        Ok(answer)
    }

    /// The flags of a scope as they are now.
    pub(super) async fn document(self: &Arc<Self>, ctx: &Arc<Context>, scope: &Scope) -> Result<Arc<Document>, Failed> {
        // Before the sets are read: what changes in between makes another version.
        let version = ctx.index.flag_sets_version(scope.namespace());
        if let Some(fresh) = self.scopes.fresh(scope, version, Instant::now()) {
            return Ok(fresh);
        }
        let published = match scope {
            Scope::Workload(id) if !self.scopes.is_known(scope) => published(ctx, id).await,
            _ => None,
        };
        let (service, ctx, own) = (Arc::clone(self), Arc::clone(ctx), scope.clone());
        let refreshed = self.long(scope.namespace(), move |_| {
            let make = |before: Option<&Document>| Document::of(&own, &ctx.index, before, published.as_ref());
            service.scopes.refresh(&own, version, Instant::now(), make)
        });
        Ok(refreshed.await??)
    }

    /// Which version of its flags a scope has.
    pub(super) async fn version(
        self: &Arc<Self>,
        ctx: &Arc<Context>,
        scope: &Scope,
        now_ms: i64,
    ) -> Result<flagd::Version, Failed> {
        let document = self.document(ctx, scope).await?;
        self.version_of(&document, scope, now_ms).await
    }

    async fn version_of(&self, document: &Arc<Document>, scope: &Scope, now_ms: i64) -> Result<flagd::Version, Failed> {
        if let Some(known) = document.known_version(now_ms) {
            return Ok(known);
        }
        if document.is_light() {
            return Ok(document.version(now_ms));
        }
        let document = Arc::clone(document);
        self.long(scope.namespace(), move |_| document.version(now_ms)).await
    }

    /// Works in turn, and not on a thread that others wait for.
    async fn long<T: Send + 'static>(
        &self,
        namespace: &str,
        work: impl FnOnce(&mut Place) -> T + Send + 'static,
    ) -> Result<T, Failed> {
        let mut place = self.long_calls.take(namespace).await?;
        tokio::task::spawn_blocking(move || work(&mut place)).await.map_err(|_| Failed::Internal)
    }

    /// All flags.
    async fn bulk(
        &self,
        document: Arc<Document>,
        context: EvaluationContext,
        if_none_match: Option<&HeaderValue>,
        stream: Option<String>,
        scope: &Scope,
    ) -> Result<Answer, Failed> {
        let shown = scope.to_string();
        let (body, tag) = if document.is_light() {
            let begun = ThreadTime::now();
            let evaluated = evaluate_all(&document, &context, stream.as_deref(), None, &shown);
            document.note_time(begun.elapsed());
            evaluated?
        } else {
            let evaluate =
                move |place: &mut Place| evaluate_all(&document, &context, stream.as_deref(), Some(place), &shown);
            self.long(scope.namespace(), evaluate).await??
        };
        self.tagged(body, &tag, if_none_match)
    }

    /// All flags as a document of flagd.
    async fn document_of_flagd(
        self: &Arc<Self>,
        request: &Request<Incoming>,
        ctx: &Arc<Context>,
        route: &Route,
    ) -> Result<Answer, Failed> {
        let if_none_match = request.headers().get(IF_NONE_MATCH);
        let scope = scope(ctx, route)?;
        let document = self.document(ctx, &scope).await?;
        let now_ms = Timestamp::now().as_millisecond();
        let version = self.version_of(&document, &scope, now_ms).await?;
        if is_known(&version.tag, if_none_match) {
            return Ok(not_modified(&version.tag));
        }
        let body = self.long(&route.namespace, move |_| flagd::write(&document, now_ms)).await??;
        self.tagged(body, &version.tag, if_none_match)
    }

    /// An answer with a tag, or the news that there is none.
    fn tagged(&self, body: Vec<u8>, tag: &str, if_none_match: Option<&HeaderValue>) -> Result<Answer, Failed> {
        if is_known(tag, if_none_match) {
            return Ok(not_modified(tag));
        }
        let size = u32::try_from(body.len().div_ceil(ROOM_UNIT)).map_err(|_| Crowded)?;
        let room = Arc::clone(&self.room).try_acquire_many_owned(size).map_err(|_| Crowded)?;
        let mut answer = with_body(StatusCode::OK, Bytes::from_owner(Unread { body, _room: room }));
        put_tag(&mut answer, tag);
        Ok(answer)
    }

    /// The stream of changes.
    fn stream(
        self: &Arc<Self>,
        request: &Request<Incoming>,
        ctx: &Arc<Context>,
        route: &Route,
        access: Admitted,
    ) -> Result<Answer, Failed> {
        if !self.hub.is_open() {
            return Err(Failed::NoStreams);
        }
        let scope = scope(ctx, route)?;
        let tell = |state| tokio::spawn(teller::tell(Arc::clone(self), Arc::clone(ctx), scope.clone(), state));
        let subscription = self.hub.subscribe(&scope, access.client, tell)?;
        let last_seen = request.headers().get(LAST_EVENT_ID).and_then(|id| id.to_str().ok());
        let last_seen = last_seen.filter(|id| id.len() <= MAX_EVENT_ID).map(str::to_owned);
        let (chunks, events) = Events::new();
        let client = access.client;
        let right = StreamRight { service: Arc::clone(self), namespace: route.namespace.clone(), access };
        let streaming = Streaming { state: subscription.state.clone(), last_seen, right, chance: rand::random() };
        let (service, shutdown) = (Arc::clone(self), self.parts.shutdown.clone());
        self.metrics().ofrep_streams.inc();
        tokio::spawn(async move {
            let told = || {
                service.metrics().ofrep_events.inc();
                // It is told so that it asks.
                service.rates.give(&client);
            };
            let end = streaming.run(chunks, shutdown, told).await;
            drop(subscription);
            service.metrics().ofrep_streams.dec();
            service.metrics().ofrep_stream_ends.get_or_create(&OfrepStreamEndLabels { reason: end.as_str() }).inc();
        });
        let mut answer = Response::new(Either::Right(events));
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        answer.headers_mut().insert(UNBUFFERED, HeaderValue::from_static("no"));
        Ok(answer)
    }
}

/// A caller that may read.
struct Admitted {
    client: Client,
    is_static: bool,
    by: Credential,
}

/// What a caller may read by.
enum Credential {
    /// The headers with its token.
    Token(HeaderMap),
    /// A ticket for a static token that was among these.
    Static(Arc<StaticTokens>),
    /// A ticket that ends then.
    Until(Timestamp),
}

/// The right to go on with a stream.
struct StreamRight {
    service: Arc<Service>,
    namespace: String,
    access: Admitted,
}

impl Right for StreamRight {
    async fn holds(&mut self) -> bool {
        match &mut self.access.by {
            Credential::Token(headers) => {
                match self.service.access().check_again(headers, &self.namespace).await {
                    // While nobody can be asked, a stream goes on until it is old.
                    Ok(_) | Err(Refused::Unavailable(_) | Refused::TooMany(_)) => true,
                    Err(Refused::NoToken | Refused::InvalidToken | Refused::Forbidden(_)) => false,
                }
            }
            Credential::Static(known) => {
                if Arc::ptr_eq(known, &self.service.access().static_tokens()) {
                    return true;
                }
                let now = self.service.static_tokens_of(&self.access.client, &self.namespace);
                now.map(|tokens| *known = tokens).is_some()
            }
            Credential::Until(until) => Timestamp::now() < *until,
        }
    }
}

/// The ticket in a query.
fn ticket(query: &str) -> Option<&str> {
    query.split('&').find_map(|pair| pair.strip_prefix("ticket="))
}

/// The work of a long call: neither the time in which others have their turn, nor that in which others have the processor.
struct WorkTime {
    begun: ThreadTime,
    begun_at: Instant,
    slice: ThreadTime,
    looked_at: Instant,
}

impl WorkTime {
    fn begin() -> Self {
        let (now, at) = (ThreadTime::now(), Instant::now());
        Self { begun: now, begun_at: at, slice: now, looked_at: at }
    }

    /// Whether there is no time left. With a place it gives way to others now and then.
    fn is_over(&mut self, place: Option<&mut Place>) -> bool {
        // To ask how long a thread has worked takes longer than many an evaluation.
        if self.looked_at.elapsed() < LOOK_EVERY {
            return false;
        }
        let is_over = self.begun.elapsed() >= BULK_TIMEOUT
            || self.begun_at.elapsed() >= BULK_PATIENCE
            || self.slice.elapsed() >= SLICE && place.is_some_and(|place| self.give_way(place));
        self.looked_at = Instant::now();
        is_over
    }

    /// Lets others have their turn. Says whether there is none any more for this call.
    fn give_way(&mut self, place: &mut Place) -> bool {
        let is_turned_away = place.give_way().is_err();
        self.slice = ThreadTime::now();
        is_turned_away
    }
}

/// The answer with all flags, and its tag.
fn evaluate_all(
    document: &Document,
    context: &EvaluationContext,
    stream: Option<&str>,
    mut place: Option<&mut Place>,
    scope: &str,
) -> Result<(Vec<u8>, String), Failed> {
    let span = spans::evaluation_of_all(scope);
    let (now_ms, mut time) = (Timestamp::now().as_millisecond(), WorkTime::begin());
    let bulk = answer::bulk(document, context, now_ms, || time.is_over(place.as_deref_mut()));
    spans::record_all(&span, bulk.as_ref().ok().map(answer::Bulk::len));
    let body = answer::spell(&bulk?.with_stream(stream))?;
    let tag = etag::of(&body);
    Ok((body, tag))
}

/// One flag.
fn single(document: &Document, key: &str, context: &EvaluationContext, now_ms: i64, scope: &impl Display) -> Answer {
    let span = spans::evaluation(key);
    let evaluated = answer::single(document, key, context, now_ms);
    spans::record(&span, document, key, evaluated.as_ref());
    match evaluated {
        Some(evaluated @ answer::Evaluated::Success(_)) => json(StatusCode::OK, &evaluated),
        Some(evaluated @ answer::Evaluated::Failure(_)) => json(StatusCode::BAD_REQUEST, &evaluated),
        None => json(StatusCode::NOT_FOUND, &Failure::not_found(key, &scope.to_string())),
    }
}

/// Whether the caller has what this tag stands for.
fn is_known(tag: &str, if_none_match: Option<&HeaderValue>) -> bool {
    if_none_match.and_then(|value| value.to_str().ok()).is_some_and(|known| etag::is_named(tag, known))
}

fn not_modified(tag: &str) -> Answer {
    let mut answer = empty(StatusCode::NOT_MODIFIED);
    put_tag(&mut answer, tag);
    answer
}

fn put_tag(answer: &mut Answer, tag: &str) {
    if let Ok(tag) = HeaderValue::from_str(tag) {
        answer.headers_mut().insert(ETAG, tag);
    }
}

/// Whose flags a path means. Of a Deployment and a StatefulSet of one name it is the Deployment.
pub(crate) fn scope(ctx: &Context, route: &Route) -> Result<Scope, Failed> {
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
pub(crate) async fn published(ctx: &Context, id: &WorkloadId) -> Option<Section<FlagsSettings>> {
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
    let mut answer = Response::new(Either::Left(Whole::new(body.into())));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Either::Left(Whole::default()));
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
