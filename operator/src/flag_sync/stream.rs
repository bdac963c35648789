//! One stream: the newest document whenever there is a newer one, as long as the client may have it.

use super::{body::trailers, failure::Failure, feeds::News};
use crate::ofrep::access::Refused;
use bytes::Bytes;
use http_body::Frame;
use std::time::Duration;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How often a stream asks again whether its client may still have it.
const ASK_EVERY: Duration = Duration::from_secs(60);
/// When it asks again after it got no answer.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// Longest time for a document to be taken.
const SEND_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time for the end of a stream to be taken.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest part that is given to the connection, in bytes: so a slow client holds no more than its share of a document that
/// all of them share.
const PART_BYTES: usize = 16 * 1024;

/// Why a stream is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The client went away.
    Client,
    /// The client did not take what it was sent.
    Slow,
    /// It was told why.
    Told(Failure),
}

impl End {
    /// The label of it.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Slow => "slow",
            Self::Told(Failure::Stopping) => "stopping",
            Self::Told(Failure::NoToken | Failure::Access(_)) => "rights",
            Self::Told(_) => "error",
        }
    }
}

/// Sends what `news` has, until the client is gone, may not have it any more (`ask` says so), or `shutdown`. It never ends with
/// success: some clients would take that for the end of all changes. `sent` is told of each document.
pub async fn follow<Asked: Future<Output = Result<(), Refused>>>(
    mut news: watch::Receiver<Option<News>>,
    out: mpsc::Sender<Frame<Bytes>>,
    ask: impl Fn() -> Asked,
    shutdown: CancellationToken,
    sent: impl Fn(),
) -> End {
    let mut ask_at = Instant::now() + ASK_EVERY;
    let mut last = Bytes::new();
    let end = loop {
        // The newest only: a client that is slow skips what was in between.
        let newest = news.borrow_and_update().clone();
        match newest {
            Some(News::Failed(failure)) => break failure,
            Some(News::Document(message)) if message != last => {
                if let Err(end) = send(&out, &message).await {
                    return end;
                }
                sent();
                last = message;
            }
            Some(News::Document(_)) | None => {}
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { break Failure::Internal },
            () = sleep_until(ask_at) => match ask().await {
                Ok(()) => ask_at = Instant::now() + ASK_EVERY,
                // Who may not be asked about now goes on: there are no newer flags than those it has.
                Err(Refused::Unavailable(_) | Refused::TooMany(_)) => ask_at = Instant::now() + ASK_AGAIN,
                Err(refused) => break refused.into(),
            },
            () = shutdown.cancelled() => break Failure::Stopping,
            () = out.closed() => return End::Client,
        }
    };
    finish(&out, &end.status()).await;
    End::Told(end)
}

/// Sends one document and the end.
pub async fn once(message: &Bytes, out: mpsc::Sender<Frame<Bytes>>) -> Option<End> {
    if let Err(end) = send(&out, message).await {
        return Some(end);
    }
    finish(&out, &Status::ok("")).await;
    None
}

async fn send(out: &mpsc::Sender<Frame<Bytes>>, message: &Bytes) -> Result<(), End> {
    let until = Instant::now() + SEND_TIMEOUT;
    let mut rest = message.clone();
    while !rest.is_empty() {
        let part = rest.split_to(PART_BYTES.min(rest.len()));
        let sent = timeout_at(until, out.send(Frame::data(part))).await.map_err(|_| End::Slow)?;
        sent.map_err(|_| End::Client)?;
    }
    Ok(())
}

async fn finish(out: &mpsc::Sender<Frame<Bytes>>, status: &Status) {
    // Who does not take it sees the connection end.
    let _ = timeout(END_TIMEOUT, out.send(Frame::trailers(trailers(status)))).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flag_sync::body::Answer;
    use http_body_util::BodyExt;
    use std::{
        future::ready,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };
    use tokio::{task::JoinHandle, time::advance};

    struct Following {
        feed: watch::Sender<Option<News>>,
        answer: Answer,
        task: JoinHandle<End>,
        shutdown: CancellationToken,
        sent: Arc<AtomicUsize>,
    }

    fn document(text: impl Into<Bytes>) -> News {
        News::Document(text.into())
    }

    fn large() -> Vec<u8> {
        vec![b'x'; 4 * PART_BYTES]
    }

    fn start(rights: Result<(), Refused>) -> Following {
        let (feed, news) = watch::channel(Some(document("one")));
        let (out, answer) = Answer::stream();
        let (shutdown, sent) = (CancellationToken::new(), Arc::<AtomicUsize>::default());
        let count = Arc::clone(&sent);
        let count = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        let task = tokio::spawn(follow(news, out, move || ready(rights.clone()), shutdown.clone(), count));
        Following { feed, answer, task, shutdown, sent }
    }

    impl Following {
        fn put(&self, text: impl Into<Bytes>) {
            self.feed.send_replace(Some(document(text)));
        }

        async fn data(&mut self) -> Bytes {
            self.answer.frame().await.unwrap().unwrap().into_data().unwrap()
        }

        async fn code(&mut self) -> String {
            let end = self.answer.frame().await.unwrap().unwrap().into_trailers().unwrap();
            end["grpc-status"].to_str().unwrap().to_owned()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_gets_the_present_document_and_each_that_differs() {
        let mut following = start(Ok(()));
        assert_eq!(following.data().await, "one");
        following.put("one");
        // It looks at it, and sends nothing.
        advance(Duration::from_millis(1)).await;
        following.put("two");
        assert_eq!(following.data().await, "two");
        assert_eq!(following.sent.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_gets_the_newest() {
        let mut following = start(Ok(()));
        assert_eq!(following.data().await, "one");
        following.put(large());
        assert_eq!(following.data().await.len(), PART_BYTES);
        for text in ["two", "three", "four"] {
            following.put(text);
        }
        for _ in 0..3 {
            assert_eq!(following.data().await.len(), PART_BYTES);
        }
        assert_eq!(following.data().await, "four");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up() {
        let following = start(Ok(()));
        following.put(large());
        assert_eq!(following.task.await.unwrap(), End::Slow);
    }

    #[tokio::test(start_paused = true)]
    async fn who_may_not_read_any_more_is_told() {
        let mut following = start(Err(Refused::Forbidden("no".into())));
        assert_eq!(following.data().await, "one");
        assert_eq!(following.code().await, "7");
        assert_eq!(following.task.await.unwrap().label(), "rights");
    }

    #[tokio::test(start_paused = true)]
    async fn while_nobody_can_be_asked_it_goes_on() {
        let mut following = start(Err(Refused::Unavailable("away".into())));
        assert_eq!(following.data().await, "one");
        advance(20 * ASK_EVERY).await;
        following.put("two");
        assert_eq!(following.data().await, "two");
    }

    #[tokio::test(start_paused = true)]
    async fn ends_are_told() {
        let mut following = start(Ok(()));
        assert_eq!(following.data().await, "one");
        following.shutdown.cancel();
        assert_eq!(following.code().await, "14");
        assert_eq!(following.task.await.unwrap(), End::Told(Failure::Stopping));

        let mut following = start(Ok(()));
        assert_eq!(following.data().await, "one");
        following.feed.send_replace(Some(News::Failed(Failure::NoRoom)));
        assert_eq!(following.code().await, "8");

        let mut following = start(Ok(()));
        assert_eq!(following.data().await, "one");
        drop(following.feed);
        let end = following.answer.frame().await.unwrap().unwrap().into_trailers().unwrap();
        assert_eq!(end["grpc-status"], "13");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_ends_its_stream() {
        let mut following = start(Ok(()));
        assert_eq!(following.data().await, "one");
        drop(following.answer);
        assert_eq!(following.task.await.unwrap(), End::Client);
    }
}
