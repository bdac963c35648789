//! A connection that is given up when its client keeps it without using it.

use crate::sync::lock;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// How long a client may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// Between the begin of the connection and the first byte of its first request.
    pub first: Duration,
    /// Between an answer and the first byte of the next request.
    pub idle: Duration,
    /// For the head of a request, from its first byte.
    pub head: Duration,
    /// To take what is ready for it, or [`PROGRESS`] bytes more of it.
    pub write: Duration,
}

/// Bytes of an answer that begin its client's time anew. Who takes fewer in that time keeps the connection for nothing.
const PROGRESS: usize = 16 * 1024;

/// Which time ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimedOut {
    Idle,
    Head,
    Write,
}

/// Requests of one connection; the one who answers them counts, its stream reads.
#[derive(Debug, Default)]
pub(super) struct Requests {
    begun: AtomicU64,
    ended: AtomicU64,
    idle_since: Mutex<Option<Instant>>,
}

impl Requests {
    pub(super) fn begin(self: &Arc<Self>) -> UnderWay {
        self.begun.fetch_add(1, Ordering::Relaxed);
        UnderWay(Arc::clone(self))
    }

    /// Since when nothing is asked for, and nothing is on its way in either direction; `None`: something is.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        *lock(&self.idle_since)
    }

    pub(super) fn rest(&self, since: Option<Instant>) {
        *lock(&self.idle_since) = since;
    }

    /// Whether there has been one.
    pub(super) fn have_begun(&self) -> bool {
        self.begun.load(Ordering::Relaxed) > 0
    }

    pub(super) fn are_none_under_way(&self) -> bool {
        self.at_rest().is_some()
    }

    /// How many had begun, if none is being answered.
    fn at_rest(&self) -> Option<u64> {
        let begun = self.begun.load(Ordering::Relaxed);
        (begun == self.ended.load(Ordering::Relaxed)).then_some(begun)
    }
}

/// A request that is being answered, until it is dropped.
pub(super) struct UnderWay(Arc<Requests>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// What the server waits for from its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    /// A request that has not begun; `first`: of its connection.
    Request { since: Instant, first: bool },
    /// The rest of a head; `after` requests had begun before.
    Head { since: Instant, after: u64 },
    /// Nothing: it is the server's turn, or a body arrives, which has bounds of its own.
    Nothing,
}

impl Awaited {
    /// Takes the count of requests into account; `at_rest` as [`Requests::at_rest`] has it.
    fn updated(self, at_rest: Option<u64>, now: Instant) -> Self {
        match (self, at_rest) {
            (_, None) => Self::Nothing,
            (Self::Nothing, Some(_)) => Self::Request { since: now, first: false },
            (Self::Head { after, .. }, Some(begun)) if after != begun => Self::Request { since: now, first: false },
            (awaited, Some(_)) => awaited,
        }
    }

    /// Bytes arrived.
    fn heard(self, at_rest: Option<u64>, now: Instant) -> Self {
        match (self.updated(at_rest, now), at_rest) {
            (Self::Request { .. }, Some(after)) => Self::Head { since: now, after },
            (awaited, _) => awaited,
        }
    }

    fn ends(self, times: &Times) -> Option<(Instant, TimedOut)> {
        match self {
            Self::Request { since, first: true } => Some((since + times.first.min(times.idle), TimedOut::Idle)),
            Self::Request { since, first: false } => Some((since + times.idle, TimedOut::Idle)),
            Self::Head { since, .. } => Some((since + times.head, TimedOut::Head)),
            Self::Nothing => None,
        }
    }
}

/// A stream that fails when one of its [`Times`] has run out.
pub(super) struct TimedStream<S> {
    stream: S,
    times: Times,
    requests: Arc<Requests>,
    awaited: Awaited,
    read_timer: Pin<Box<Sleep>>,
    /// Since when its client takes nothing, or not all, of what is ready.
    blocked_since: Option<Instant>,
    /// Bytes that it has taken since then.
    taken: usize,
    write_timer: Pin<Box<Sleep>>,
    timed_out: Option<TimedOut>,
}

impl<S> TimedStream<S> {
    pub(super) fn new(stream: S, times: Times, requests: Arc<Requests>) -> Self {
        let now = Instant::now();
        requests.rest(Some(now));
        Self {
            stream,
            times,
            requests,
            awaited: Awaited::Request { since: now, first: true },
            read_timer: Box::pin(sleep_until(now)),
            blocked_since: None,
            taken: 0,
            write_timer: Box::pin(sleep_until(now)),
            timed_out: None,
        }
    }

    /// The stream, and which time ran out, if one did.
    pub(super) fn into_inner(self) -> (S, Option<TimedOut>) {
        (self.stream, self.timed_out)
    }

    fn fail(&mut self, why: TimedOut) -> io::Error {
        self.timed_out = Some(why);
        io::Error::from(io::ErrorKind::TimedOut)
    }

    fn await_next(&mut self, awaited: Awaited) {
        let since = match awaited {
            Awaited::Request { since, .. } if self.blocked_since.is_none() => Some(since),
            _ => None,
        };
        self.requests.rest(since);
        self.awaited = awaited;
    }

    /// Takes a write into account that was `result`.
    fn progress(&mut self, result: &Poll<io::Result<usize>>) {
        if let (Poll::Ready(Ok(written)), Some(_)) = (result, self.blocked_since) {
            self.taken += written;
            if self.taken >= PROGRESS {
                (self.taken, self.blocked_since) = (0, Some(Instant::now()));
            }
        }
    }

    /// After a write that was `result`: whether the client has been taking too long.
    fn check_write<T>(&mut self, result: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            return result;
        }
        let since = *self.blocked_since.get_or_insert_with(Instant::now);
        if expired(&mut self.write_timer, since + self.times.write, cx) {
            return Poll::Ready(Err(self.fail(TimedOut::Write)));
        }
        Poll::Pending
    }
}

/// Whether `at` has come; if not, the task is woken then.
fn expired(timer: &mut Pin<Box<Sleep>>, at: Instant, cx: &mut Context<'_>) -> bool {
    if timer.deadline() != at {
        timer.as_mut().reset(at);
    }
    timer.as_mut().poll(cx).is_ready()
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        // First of all what is there: a request that has arrived is never given up for the time.
        let result = Pin::new(&mut this.stream).poll_read(cx, buf);
        let (at_rest, now) = (this.requests.at_rest(), Instant::now());
        if result.is_ready() {
            if buf.filled().len() > before {
                this.await_next(this.awaited.heard(at_rest, now));
            }
            return result;
        }
        this.await_next(this.awaited.updated(at_rest, now));
        match this.awaited.ends(&this.times) {
            Some((at, why)) if expired(&mut this.read_timer, at, cx) => Poll::Ready(Err(this.fail(why))),
            _ => Poll::Pending,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.progress(&result);
        this.check_write(result, cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.progress(&result);
        this.check_write(result, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// Is asked for when all that was ready has been written. So a client that takes a byte now and then is given up, too.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_flush(cx);
        if result.is_ready() {
            (this.blocked_since, this.taken) = (None, 0);
            // After an answer, hyper does not read while it has a read under way: so the idle time begins here.
            this.await_next(this.awaited.updated(this.requests.at_rest(), Instant::now()));
            if let Some((at, _)) = this.awaited.ends(&this.times) {
                let _ = expired(&mut this.read_timer, at, cx);
            }
        }
        this.check_write(result, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.check_write(result, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    const TIMES: Times = Times {
        first: Duration::from_secs(5),
        idle: Duration::from_secs(60),
        head: Duration::from_secs(10),
        write: Duration::from_secs(20),
    };

    fn pair() -> (TimedStream<DuplexStream>, DuplexStream, Arc<Requests>) {
        let requests = Arc::new(Requests::default());
        let (server, client) = duplex(16);
        (TimedStream::new(server, TIMES, Arc::clone(&requests)), client, requests)
    }

    /// When and why the stream gives up a client from whom it reads.
    async fn read_until_given_up(stream: &mut TimedStream<DuplexStream>) -> (u64, Option<TimedOut>) {
        let started = Instant::now();
        let mut buffer = [0; 8];
        while let Ok(1..) = stream.read(&mut buffer).await {}
        (started.elapsed().as_secs(), stream.timed_out)
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_asks_for_nothing_has_the_idle_time() {
        let (mut stream, mut client, requests) = pair();
        client.write_all(b"GET /").await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
        drop(requests.begin());
        assert_eq!(read_until_given_up(&mut stream).await, (60, Some(TimedOut::Idle)));
        let (mut stream, mut client, _) = pair();
        tokio::time::sleep(Duration::from_secs(4)).await;
        client.write_all(b"GET").await.unwrap();
        assert_eq!(read_until_given_up(&mut stream).await, (10, Some(TimedOut::Head)), "then that of a head");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_has_never_asked_for_anything_has_less() {
        let (mut stream, _client, requests) = pair();
        assert_eq!(requests.idle_since(), Some(Instant::now()));
        assert_eq!(read_until_given_up(&mut stream).await, (5, Some(TimedOut::Idle)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_is_idle_while_nothing_is_on_its_way() {
        let (mut stream, mut client, requests) = pair();
        client.write_all(b"GET /").await.unwrap();
        stream.read_exact(&mut [0; 5]).await.unwrap();
        assert_eq!(requests.idle_since(), None, "a head arrives");
        drop(requests.begin());
        let blocked = tokio::time::timeout(Duration::from_secs(1), stream.write_all(&[0; 20])).await;
        assert!(blocked.is_err());
        assert!(tokio::time::timeout(Duration::from_secs(1), stream.read_u8()).await.is_err());
        assert_eq!(requests.idle_since(), None, "an answer is on its way");
        client.read_exact(&mut [0; 16]).await.unwrap();
        stream.flush().await.unwrap();
        assert!(requests.idle_since().is_some());
    }

    /// A phone with little signal takes longer than that for an answer of 256 KiB.
    #[tokio::test(start_paused = true)]
    async fn one_that_gets_on_is_kept_however_long_it_takes() {
        let (mut stream, mut client, _) = pair();
        let answer = vec![0; 10 * PROGRESS];
        let writing = stream.write_all(&answer);
        let reading = async {
            let mut some = [0; PROGRESS / 8];
            for _ in 0..80 {
                tokio::time::sleep(Duration::from_secs(2)).await;
                client.read_exact(&mut some).await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(writing, reading);
        written.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_comes_byte_by_byte_has_one_time() {
        let (mut stream, mut client, _) = pair();
        let dribble = async {
            loop {
                tokio::time::sleep(Duration::from_secs(3)).await;
                client.write_all(b"x").await.unwrap();
            }
        };
        let given_up =
            tokio::select! { given_up = read_until_given_up(&mut stream) => given_up, () = dribble => unreachable!() };
        assert_eq!(given_up, (13, Some(TimedOut::Head)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_is_being_answered_has_no_time() {
        let (mut stream, mut client, requests) = pair();
        client.write_all(b"GET /").await.unwrap();
        let mut buffer = [0; 8];
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 5);
        let under_way = requests.begin();
        let answered = async {
            tokio::time::sleep(Duration::from_secs(300)).await;
            drop(under_way);
        };
        let more = tokio::time::timeout(Duration::from_secs(299), stream.read(&mut buffer));
        let (more, ()) = tokio::join!(more, answered);
        assert!(more.is_err(), "it was given up");
        assert_eq!(read_until_given_up(&mut stream).await, (60, Some(TimedOut::Idle)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_nothing_or_hardly_anything_is_given_up() {
        for dribble in [false, true] {
            let (mut stream, mut client, _) = pair();
            let started = Instant::now();
            let writing = async {
                let failed = stream.write_all(&[0; 64]).await.unwrap_err();
                (started.elapsed().as_secs(), failed.kind(), stream.timed_out)
            };
            let reading = async {
                loop {
                    tokio::time::sleep(Duration::from_secs(3)).await;
                    if dribble {
                        client.read_u8().await.unwrap();
                    }
                }
            };
            let given_up = tokio::select! { given_up = writing => given_up, () = reading => unreachable!() };
            assert_eq!(given_up, (20, io::ErrorKind::TimedOut, Some(TimedOut::Write)), "dribble: {dribble}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_takes_all_in_time_is_kept() {
        let (mut stream, mut client, _) = pair();
        let writing = async {
            for _ in 0..5 {
                stream.write_all(&[0; 20]).await.unwrap();
                stream.flush().await.unwrap();
            }
        };
        let reading = async {
            let mut all = [0; 10];
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_secs(9)).await;
                client.read_exact(&mut all).await.unwrap();
            }
        };
        tokio::join!(writing, reading);
    }

    #[rstest::rstest]
    #[case::more_of_the_same(Awaited::Request { since: Instant::now(), first: true }, Some(3), "Request")]
    #[case::begun(Awaited::Head { since: Instant::now(), after: 3 }, None, "Nothing")]
    #[case::begun_and_ended_unseen(Awaited::Head { since: Instant::now(), after: 2 }, Some(3), "Request")]
    #[case::still_the_head(Awaited::Head { since: Instant::now(), after: 3 }, Some(3), "Head")]
    #[case::ended(Awaited::Nothing, Some(3), "Request")]
    fn what_is_awaited(#[case] awaited: Awaited, #[case] at_rest: Option<u64>, #[case] expected: &str) {
        let updated = awaited.updated(at_rest, Instant::now());
        assert!(format!("{updated:?}").starts_with(expected), "{updated:?}");
    }
}
