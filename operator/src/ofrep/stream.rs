//! One stream of changes, as server-sent events: what it says, and when it ends.

use super::flagd::Version;
use bytes::Bytes;
use http_body::{Body, Frame};
use serde::Serialize;
use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval_at, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// Something is sent at least so often, so that proxies do not take the stream for dead.
pub const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How often the right of the caller is looked at again.
pub const CHECK_EVERY: Duration = Duration::from_secs(10);
/// A client that takes nothing for so long is given up.
pub const SLOW_READER: Duration = Duration::from_secs(30);
/// A stream ends after this time, give or take a tenth, and its client comes again: so clients spread over replicas.
pub const MAX_AGE: Duration = Duration::from_secs(30 * 60);
/// How long a client waits before it comes again, and how much longer by chance, in milliseconds: not all come at once.
const RETRY_MS: u64 = 1_000;
const RETRY_SPREAD_MS: u64 = 4_000;
/// What is sent when there is nothing to tell: a comment.
const COMMENT: &[u8] = b": keep-alive\n\n";

/// What the flags of a scope are now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Tells versions of the flags apart, in each replica alike.
    pub id: String,
    text: Bytes,
}

impl Event {
    /// Tells of a version, and when it came about, in seconds since the Unix epoch, if that is known.
    pub fn new(version: &Version, last_modified: Option<i64>) -> Self {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Data<'a> {
            r#type: &'static str,
            etag: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            last_modified: Option<i64>,
        }
        let data = Data { r#type: "refetchEvaluation", etag: &version.tag, last_modified };
        // Two texts and a number always have a spelling, which has no line breaks.
        let data = serde_json::to_string(&data).unwrap_or_default();
        let id = version.tag.trim_matches('"').to_owned();
        let text = format!("id: {id}\nevent: message\ndata: {data}\n\n").into();
        Self { id, text }
    }
}

/// Whether the caller may still be told.
pub trait Right: Send {
    /// Looks again. A right that cannot be looked at now goes on.
    fn holds(&mut self) -> impl Future<Output = bool> + Send;
}

/// What a stream needs.
pub struct Streaming<R> {
    /// What the flags are, as long as somebody looks after that.
    pub state: watch::Receiver<Option<Arc<Event>>>,
    /// The last event that the client has seen, on an earlier connection.
    pub last_seen: Option<String>,
    /// The caller's right.
    pub right: R,
    /// A number by chance, from 0 to 1.
    pub chance: f64,
}

/// Why a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client went.
    Closed,
    /// It is old.
    Age,
    /// The right of the caller ended.
    Forbidden,
    /// The client did not read.
    Slow,
    /// The operator ends.
    Shutdown,
    /// Nobody looks after the flags of the scope any more.
    Failed,
}

impl End {
    /// The label of the metric.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Age => "age",
            Self::Forbidden => "forbidden",
            Self::Slow => "slow",
            Self::Shutdown => "shutdown",
            Self::Failed => "error",
        }
    }
}

impl<R: Right> Streaming<R> {
    /// Tells the client until the stream ends. `sent` is called for each event that was told.
    pub async fn run(mut self, chunks: mpsc::Sender<Bytes>, shutdown: CancellationToken, sent: impl Fn()) -> End {
        let begin = Instant::now();
        let mut keep_alive = interval_at(begin + KEEP_ALIVE, KEEP_ALIVE);
        let mut check = interval_at(begin + CHECK_EVERY.mul_f64(0.5 + self.chance / 2.0), CHECK_EVERY);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut age = std::pin::pin!(sleep(MAX_AGE.mul_f64(0.9 + self.chance / 5.0)));
        // What it is already is news for who just came.
        self.state.mark_changed();
        let mut next = Some(Bytes::from(format!("retry: {}\n\n", retry_ms(self.chance))));
        loop {
            if let Some(chunk) = next.take() {
                keep_alive.reset();
                match timeout(SLOW_READER, chunks.send(chunk)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return End::Closed,
                    Err(_) => return End::Slow,
                }
            }
            tokio::select! {
                () = chunks.closed() => return End::Closed,
                () = shutdown.cancelled() => return End::Shutdown,
                () = age.as_mut() => return End::Age,
                changed = self.state.changed() => {
                    if changed.is_err() {
                        return End::Failed;
                    }
                    let event = self.state.borrow_and_update().clone();
                    next = event.filter(|event| self.last_seen.as_deref() != Some(event.id.as_str())).map(|event| {
                        self.last_seen = Some(event.id.clone());
                        sent();
                        event.text.clone()
                    });
                }
                _ = check.tick() => {
                    if !self.right.holds().await {
                        return End::Forbidden;
                    }
                }
                _ = keep_alive.tick() => next = Some(Bytes::from_static(COMMENT)),
            }
        }
    }
}

/// How long a client is to wait before it comes again.
fn retry_ms(chance: f64) -> u128 {
    Duration::from_millis(RETRY_SPREAD_MS).mul_f64(chance).as_millis() + u128::from(RETRY_MS)
}

/// The body of the answer.
pub struct Events(mpsc::Receiver<Bytes>);

impl Events {
    /// A body, and the way to fill it: one chunk waits at most.
    pub fn new() -> (mpsc::Sender<Bytes>, Self) {
        let (sender, chunks) = mpsc::channel(1);
        (sender, Self(chunks))
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        self.0.poll_recv(cx).map(|chunk| chunk.map(|chunk| Ok(Frame::data(chunk))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn event(tag: &str, last_modified: Option<i64>) -> Arc<Event> {
        Arc::new(Event::new(&Version { tag: format!("\"{tag}\""), until_ms: None }, last_modified))
    }

    struct Until(Instant);

    impl Right for Until {
        async fn holds(&mut self) -> bool {
            Instant::now() < self.0
        }
    }

    /// A stream, whose right lasts `right`, and which has seen `last_seen` before.
    struct Running {
        state: watch::Sender<Option<Arc<Event>>>,
        body: Option<mpsc::Receiver<Bytes>>,
        shutdown: CancellationToken,
        sent: Arc<AtomicUsize>,
        end: tokio::task::JoinHandle<End>,
    }

    fn start(state: Option<Arc<Event>>, last_seen: Option<&str>, right: Duration) -> Running {
        let (state, receiver) = watch::channel(state);
        let (chunks, body) = mpsc::channel(1);
        let (shutdown, sent) = (CancellationToken::new(), Arc::new(AtomicUsize::new(0)));
        let right = Until(Instant::now() + right);
        let last_seen = last_seen.map(str::to_owned);
        let streaming = Streaming { state: receiver, last_seen, right, chance: 0.5 };
        let count = Arc::clone(&sent);
        let run = streaming.run(chunks, shutdown.clone(), move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        Running { state, body: Some(body), shutdown, sent, end: tokio::spawn(run) }
    }

    impl Running {
        async fn next(&mut self) -> Option<String> {
            let chunk = self.body.as_mut().unwrap().recv().await?;
            Some(String::from_utf8(chunk.to_vec()).unwrap())
        }

        /// Reads to the end.
        async fn rest(mut self) -> (Vec<String>, End) {
            let mut chunks = Vec::new();
            while let Some(chunk) = self.next().await {
                chunks.push(chunk);
            }
            (chunks, self.end.await.unwrap())
        }
    }

    const LONG: Duration = Duration::from_secs(1_000_000);

    #[tokio::test(start_paused = true)]
    async fn it_tells_what_is_and_what_changes_and_nothing_twice() {
        let mut running = start(Some(event("a", None)), None, LONG);
        assert_eq!(running.next().await.unwrap(), "retry: 3000\n\n");
        let expected = "id: a\nevent: message\ndata: {\"type\":\"refetchEvaluation\",\"etag\":\"\\\"a\\\"\"}\n\n";
        assert_eq!(running.next().await.unwrap(), expected);
        running.state.send_replace(Some(event("a", Some(7))));
        running.state.send_replace(Some(event("b", Some(8))));
        let told = running.next().await.unwrap();
        assert!(told.starts_with("id: b\n") && told.contains("\"lastModified\":8"), "{told}");
        assert_eq!(running.next().await.unwrap(), ": keep-alive\n\n");
        assert_eq!(running.sent.load(Ordering::Relaxed), 2);
        running.shutdown.cancel();
        assert_eq!(running.rest().await, (vec![], End::Shutdown));
    }

    #[rstest::rstest]
    #[case(Some("a"), ": keep-alive\n\n")]
    #[case(Some("before"), "id: a\n")]
    #[tokio::test(start_paused = true)]
    async fn who_comes_again_is_told_what_it_has_missed(#[case] last_seen: Option<&str>, #[case] expected: &str) {
        let mut running = start(Some(event("a", None)), last_seen, LONG);
        running.next().await.unwrap();
        let told = running.next().await.unwrap();
        assert!(told.starts_with(expected), "{told}");
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_when_the_right_does_or_when_it_is_old() {
        let (begin, forbidden) = (Instant::now(), start(None, None, Duration::from_secs(60)));
        let (chunks, end) = forbidden.rest().await;
        assert_eq!((end, chunks.len()), (End::Forbidden, 5), "{chunks:?}");
        assert!(begin.elapsed() <= Duration::from_secs(60) + CHECK_EVERY);
        let begin = Instant::now();
        let (_, end) = start(None, None, LONG).rest().await;
        assert_eq!((end, begin.elapsed()), (End::Age, MAX_AGE));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_or_goes_is_given_up() {
        let slow = start(Some(event("a", None)), None, LONG);
        let begin = Instant::now();
        assert_eq!(slow.end.await.unwrap(), End::Slow);
        assert!(begin.elapsed() <= SLOW_READER + KEEP_ALIVE);
        let mut gone = start(None, None, LONG);
        drop(gone.body.take());
        assert_eq!(gone.end.await.unwrap(), End::Closed);
        let failed = start(None, None, LONG);
        let Running { state, end, body, .. } = failed;
        drop(state);
        assert_eq!((end.await.unwrap(), body.is_some()), (End::Failed, true));
    }

    #[test]
    fn clients_do_not_come_again_all_at_once() {
        assert_eq!([0.0, 0.25, 1.0].map(retry_ms), [1_000, 2_000, 5_000]);
    }

    #[test]
    fn a_body_holds_one_chunk_at_most() {
        let (sender, body) = Events::new();
        assert!(sender.try_send(Bytes::new()).is_ok() && sender.try_send(Bytes::new()).is_err());
        drop(body);
        assert!(sender.is_closed());
    }
}
