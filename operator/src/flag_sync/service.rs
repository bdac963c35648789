//! From a call to its answer.

use super::{
    body::{Answer, trailers},
    failure::{Failure, result},
    feeds::{Feeds, News, Subscription},
    message::{self, framed},
    places::Places,
    selector::{Selected, Selector, of_call},
    stream::{self, End},
    wire::{EmptyStruct, FetchAllFlagsRequest, GetMetadataResponse, SyncFlagsRequest, path},
};
use crate::{
    ofrep::{
        access::{Access, Digest},
        rate::Rates,
        service::Watched,
    },
    telemetry::metrics::{FlagSyncEndLabels, FlagSyncLabels, Metrics},
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use hyper::body::Incoming;
use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status};

/// What every message of gRPC is sent as.
const GRPC: &str = "application/grpc";
/// Metadata in which newer clients say which flags they want.
const SELECTOR: &str = "flagd-selector";
/// Where clients put a static token, beside `authorization`.
const API_KEY: &str = "x-api-key";
/// Metadata of an answer from caches that may be old; it says why.
const STALE: &str = "x-resilience-stale";
/// Longest time for a request to arrive, in seconds.
const REQUEST_SECONDS: u64 = 5;
/// Longest time for a document to be made for the first time.
const FIRST_DOCUMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// Most calls that are being looked at; a stream that is open counts no more.
const MAX_AT_ONCE: usize = 256;
/// Calls that a client (one token) may make in a second.
const CALLS_PER_SECOND: u32 = 50;
/// Most clients whose rate is remembered.
const MAX_CLIENTS: usize = 16_384;

/// Serves documents from the caches of this replica.
pub struct Service {
    contexts: Vec<Watched>,
    /// Every cache has been filled once.
    ready: Arc<AtomicBool>,
    /// Metrics.
    pub metrics: Metrics,
    /// Who may read what.
    pub access: Access,
    /// What is followed.
    pub feeds: Arc<Feeds>,
    rates: Rates<Digest>,
    streams: Arc<Places>,
    places: Semaphore,
    /// For making documents: that takes a processor for a while.
    turns: Arc<Semaphore>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// What a call is about.
#[derive(Clone, Copy)]
enum Call {
    Sync,
    Fetch,
    Metadata,
}

/// A caller whose right is known.
struct Caller {
    digest: Digest,
    /// With its token, for asking again.
    credentials: HeaderMap,
    selected: Selected,
}

/// Keeps the connection of a call open, and ends it.
#[derive(Clone)]
pub struct Peer {
    /// Its address.
    pub address: IpAddr,
    /// Each call that is open has one of it.
    pub calls: Arc<()>,
    /// Ends the connection.
    pub end: CancellationToken,
}

impl Service {
    /// Serves from these contexts, once `ready` says that their caches are filled, until `shutdown`.
    pub fn new(
        contexts: Vec<Watched>,
        ready: Arc<AtomicBool>,
        metrics: Metrics,
        access: Access,
        streams_each: u16,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            contexts,
            ready,
            metrics,
            access,
            feeds: Arc::default(),
            rates: Rates::new(CALLS_PER_SECOND, MAX_CLIENTS),
            streams: Arc::new(Places::new(usize::from(streams_each))),
            places: Semaphore::new(MAX_AT_ONCE),
            turns: Arc::new(Semaphore::new(1)),
            tasks: TaskTracker::new(),
            shutdown,
        }
    }

    /// Waits until all streams have ended; after the shutdown they do.
    pub async fn drain(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Answers a call.
    pub async fn answer(self: &Arc<Self>, request: Request<Incoming>, peer: Peer) -> Response<Answer> {
        if !is_grpc(&request) {
            let mut answer = Response::new(Answer::default());
            *answer.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return answer;
        }
        let call = match request.uri().path() {
            path::SYNC_FLAGS => Ok(Call::Sync),
            path::FETCH_ALL_FLAGS => Ok(Call::Fetch),
            path::GET_METADATA => Ok(Call::Metadata),
            _ => Err(Failure::NoSuchCall),
        };
        let label = match call {
            Ok(Call::Sync) => "sync",
            Ok(Call::Fetch) => "fetch",
            Ok(Call::Metadata) => "metadata",
            Err(_) => "other",
        };
        let answered = match call {
            Ok(Call::Sync) => self.sync(request, peer).await,
            Ok(Call::Fetch) => self.fetch(request, peer).await,
            // It says nothing, so it asks for nothing.
            Ok(Call::Metadata) => Ok(metadata()),
            Err(failure) => Err(failure),
        };
        let code = answered.as_ref().map_or_else(Failure::code, |_| Code::Ok);
        self.metrics.flag_sync_calls.get_or_create(&FlagSyncLabels { call: label, result: result(code) }).inc();
        answered.unwrap_or_else(|failure| refusal(&failure.status()))
    }

    /// Opens a stream.
    async fn sync(self: &Arc<Self>, request: Request<Incoming>, peer: Peer) -> Result<Response<Answer>, Failure> {
        let place = self.places.try_acquire().map_err(|_| Failure::Busy)?;
        let (head, SyncFlagsRequest { provider_id, selector }) = read(request).await?;
        let caller = self.caller(&head, &selector, &provider_id, peer.address).await?;
        let stream_place = self.streams.take(caller.digest)?;
        let (mut subscription, stale) = self.subscribe(&caller.selected)?;
        first(&mut subscription).await?;
        drop(place);
        let (out, answer) = Answer::stream();
        let service = Arc::clone(self);
        self.tasks.spawn(async move {
            let _place = stream_place;
            service.metrics.flag_sync_streams.inc();
            let ask = || async {
                let checked = service.access.check_again(&caller.credentials, &caller.selected.namespace);
                checked.await.map(|_| ())
            };
            let count = || {
                service.metrics.flag_sync_documents.inc();
            };
            let end = stream::follow(subscription.news.clone(), out, ask, service.shutdown.clone(), count).await;
            drop(subscription);
            service.metrics.flag_sync_streams.dec();
            service.metrics.flag_sync_streams_ended.get_or_create(&FlagSyncEndLabels { reason: end.label() }).inc();
            peer.closed(&end);
        });
        Ok(opened(answer, stale))
    }

    /// Answers with the present document.
    async fn fetch(self: &Arc<Self>, request: Request<Incoming>, peer: Peer) -> Result<Response<Answer>, Failure> {
        let _place = self.places.try_acquire().map_err(|_| Failure::Busy)?;
        let (head, FetchAllFlagsRequest { provider_id, selector }) = read(request).await?;
        let caller = self.caller(&head, &selector, &provider_id, peer.address).await?;
        let stream_place = self.streams.take(caller.digest)?;
        let (mut subscription, stale) = self.subscribe(&caller.selected)?;
        let message = first(&mut subscription).await?;
        let (out, answer) = Answer::stream();
        self.tasks.spawn(async move {
            let _place = stream_place;
            if let Some(end) = stream::once(&message, out).await {
                peer.closed(&end);
            }
        });
        Ok(opened(answer, stale))
    }

    /// Who calls, and what for, if it may.
    async fn caller(
        &self,
        head: &HeaderMap,
        selector: &str,
        provider_id: &str,
        from: IpAddr,
    ) -> Result<Caller, Failure> {
        let said = head.get(SELECTOR).and_then(|value| value.to_str().ok());
        let Selector { selected, token } = Selector::parse(of_call(said, selector, provider_id))?;
        let credentials = credentials(head, token.as_deref());
        let digest = self.access.check(&credentials, from, &selected.namespace).await?.digest;
        self.rates.take(digest, Instant::now()).map_err(|_| Failure::ManyCalls)?;
        Ok(Caller { digest, credentials, selected })
    }

    /// Follows what is selected; and why the caches may be old, if they may.
    fn subscribe(&self, selected: &Selected) -> Result<(Subscription, Option<String>), Failure> {
        if self.shutdown.is_cancelled() {
            return Err(Failure::Stopping);
        }
        if !self.ready.load(Ordering::Relaxed) {
            return Err(Failure::NotReady);
        }
        let watches = |(watched, _): &&Watched| watched.as_ref().is_none_or(|watched| *watched == selected.namespace);
        let watched = self.contexts.iter().find(watches);
        let (_, ctx) = watched.ok_or_else(|| Failure::NotWatched(selected.namespace.clone()))?;
        let subscription = self.feeds.follow(selected, ctx, (&self.tasks, &self.turns, &self.shutdown))?;
        Ok((subscription, ctx.observer_stale()))
    }
}

impl Peer {
    /// A client that takes nothing holds what it was sent as long as it is connected.
    fn closed(&self, end: &End) {
        if *end == End::Slow {
            self.end.cancel();
        }
    }
}

fn is_grpc(request: &Request<Incoming>) -> bool {
    let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    // Not gRPC for the web, which is another protocol.
    let rest = content_type.and_then(|value| value.strip_prefix(GRPC));
    request.method() == Method::POST && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', ';']))
}

/// Takes a request apart.
async fn read<M: prost::Message + Default + 'static>(request: Request<Incoming>) -> Result<(HeaderMap, M), Failure> {
    let (head, body) = request.into_parts();
    let message = timeout(Duration::from_secs(REQUEST_SECONDS), message::read(body)).await;
    Ok((head.headers, message.map_err(|_| Failure::SlowRequest(REQUEST_SECONDS))??))
}

/// The headers that say who calls: those that were sent, or else one with the token of the selector.
fn credentials(head: &HeaderMap, token: Option<&str>) -> HeaderMap {
    let mut credentials = HeaderMap::new();
    for name in [AUTHORIZATION, HeaderName::from_static(API_KEY)] {
        if let Some(value) = head.get(&name) {
            let mut value = value.clone();
            value.set_sensitive(true);
            credentials.insert(name, value);
        }
    }
    if credentials.is_empty()
        && let Some(Ok(mut value)) = token.map(|token| HeaderValue::from_str(&format!("Bearer {token}")))
    {
        value.set_sensitive(true);
        credentials.insert(AUTHORIZATION, value);
    }
    credentials
}

/// Waits for the first document.
async fn first(subscription: &mut Subscription) -> Result<Bytes, Failure> {
    let known = timeout(FIRST_DOCUMENT_TIMEOUT, subscription.news.wait_for(Option::is_some)).await;
    let known = known.map_err(|_| Failure::Busy)?.map_err(|_| Failure::Internal)?;
    match known.clone() {
        Some(News::Document(message)) => Ok(message),
        Some(News::Failed(failure)) => Err(failure),
        None => Err(Failure::Internal),
    }
}

fn metadata() -> Response<Answer> {
    let message = GetMetadataResponse { metadata: Some(EmptyStruct {}) };
    opened(Answer::of(framed(&message)), None)
}

fn opened(answer: Answer, stale: Option<String>) -> Response<Answer> {
    let mut answer = Response::new(answer);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    if let Some(Ok(why)) = stale.map(|why| HeaderValue::from_str(&why)) {
        answer.headers_mut().insert(STALE, why);
    }
    answer
}

/// An answer that is nothing but its end.
fn refusal(status: &Status) -> Response<Answer> {
    let mut answer = Response::new(Answer::default());
    *answer.headers_mut() = trailers(status);
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| ((*name).parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[rstest::rstest]
    #[case(&[("authorization", "Bearer a")], None, &[("authorization", "Bearer a")])]
    #[case(&[("authorization", "Bearer a"), ("x-api-key", "b"), ("cookie", "c")], Some("t"),
        &[("authorization", "Bearer a"), ("x-api-key", "b")])]
    #[case(&[("x-api-key", "b")], Some("t"), &[("x-api-key", "b")])]
    #[case(&[("cookie", "c")], Some("t"), &[("authorization", "Bearer t")])]
    #[case(&[], Some("a\nb"), &[])]
    #[case(&[], None, &[])]
    fn where_a_token_comes_from(
        #[case] sent: &[(&'static str, &str)],
        #[case] of_selector: Option<&str>,
        #[case] expected: &[(&'static str, &str)],
    ) {
        let found = credentials(&headers(sent), of_selector);
        assert_eq!(found, headers(expected));
        assert!(!format!("{found:?}").contains("Bearer"), "it is not shown");
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let answer = refusal(&Failure::NoToken.status());
        let head = answer.headers();
        assert_eq!(
            (answer.status(), &head["grpc-status"], &head["content-type"]),
            (StatusCode::OK, &HeaderValue::from_static("16"), &HeaderValue::from_static(GRPC))
        );
        assert!(head["grpc-message"].to_str().unwrap().contains("authorization:%20Bearer"), "{head:?}");
    }
}
