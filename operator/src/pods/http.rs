//! A small HTTP/1.1 client for the admin ports of very many pods.
//!
//! General clients keep tens of kilobytes of buffers for each idle connection; here an idle connection is its socket and
//! nothing else, and buffers live as long as a call. What comes back is bounded before it is read: by head and body, and by
//! what all calls together may hold.

use bytes::Bytes;
use httparse::{EMPTY_HEADER, Status};
use std::{
    collections::HashMap,
    fmt::Write,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

/// Longest head of an answer, in bytes.
pub(crate) const MAX_HEAD: usize = 16 * 1024;
/// Most headers of an answer.
const MAX_HEADERS: usize = 64;
/// Longest time for a connection to come about.
const CONNECT: Duration = Duration::from_secs(1);
/// How long a connection is kept without a call.
const KEPT_IDLE: Duration = Duration::from_secs(75);
/// Most idle connections.
const MAX_IDLE: usize = 16 * 1024;
/// Bytes of answers and documents that all calls together may hold beyond [`FREE`] each, in KiB.
const SHARED_KIB: usize = 24 * 1024;
/// Bytes that each call may hold without asking.
const FREE: usize = 16 * 1024;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// No connection, or it broke.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came back is no HTTP answer, or one that is too long.
    #[error("{0}")]
    Invalid(String),
}

/// A request.
pub struct Request<'a> {
    /// Method.
    pub method: &'a str,
    /// Path.
    pub path: &'a str,
    /// Headers besides host, length and connection.
    pub headers: &'a [(&'static str, String)],
    /// Body.
    pub body: Bytes,
}

/// An answer.
#[derive(Debug)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// The headers whose names begin with [`OWN_HEADERS`], by their lower-case names.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Response {
    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// How the names of the contract's own headers begin; no others are kept.
const OWN_HEADERS: &str = "x-resilience-";

/// Calls servers, and keeps one idle connection to each.
#[derive(Clone)]
pub struct HttpClient(Arc<Inner>);

struct Inner {
    idle: Mutex<HashMap<SocketAddr, (TcpStream, Instant)>>,
    shared: Arc<Semaphore>,
    max_body: usize,
}

impl HttpClient {
    /// A client that reads answers of at most `max_body` bytes.
    pub fn new(max_body: usize) -> Self {
        let shared = Arc::new(Semaphore::new(SHARED_KIB));
        Self(Arc::new(Inner { idle: Mutex::default(), shared, max_body }))
    }

    /// Sends a request and reads its answer. A kept connection that turns out to be closed is replaced
    /// once; so only what may be asked twice is to be sent with it.
    pub async fn send(&self, to: SocketAddr, request: &Request<'_>) -> Result<Response, HttpError> {
        // A large document counts as held for as long as it is being sent.
        let _held = self.reserve(request.body.len()).await;
        if let Some(kept) = self.take_idle(to) {
            match self.exchange(kept, to, request).await {
                Err((HttpError::Io(_), true)) => {}
                other => return other.map_err(|(error, _)| error),
            }
        }
        let fresh = tokio::time::timeout(CONNECT, TcpStream::connect(to)).await;
        let fresh = fresh.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no connection within 1 s"))??;
        fresh.set_nodelay(true)?;
        self.exchange(fresh, to, request).await.map_err(|(error, _)| error)
    }

    async fn reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let kib = u32::try_from(bytes.saturating_sub(FREE).div_ceil(1024)).unwrap_or(u32::MAX);
        if kib == 0 {
            return None;
        }
        let most = u32::try_from(SHARED_KIB).unwrap_or(u32::MAX);
        Arc::clone(&self.0.shared).acquire_many_owned(kib.min(most)).await.ok()
    }

    fn take_idle(&self, to: SocketAddr) -> Option<TcpStream> {
        let (stream, since) = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).remove(&to)?;
        (since.elapsed() < KEPT_IDLE).then_some(stream)
    }

    fn keep_idle(&self, to: SocketAddr, stream: TcpStream) {
        let mut idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.insert(to, (stream, Instant::now()));
        }
    }

    /// Closes connections that nobody has used for a while.
    pub fn close_unused(&self) {
        let mut idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|_, (_, since)| since.elapsed() < KEPT_IDLE);
    }

    /// One exchange over a connection. The flag of an error says that not a byte of an answer came.
    async fn exchange(
        &self,
        mut stream: TcpStream,
        to: SocketAddr,
        request: &Request<'_>,
    ) -> Result<Response, (HttpError, bool)> {
        let mut head = String::with_capacity(256);
        // Writing to a String cannot fail.
        let _ = write!(head, "{} {} HTTP/1.1\r\nhost: {to}\r\n", request.method, request.path);
        for (name, value) in request.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        if !request.body.is_empty() || request.method != "GET" {
            let _ = write!(head, "content-type: application/json\r\ncontent-length: {}\r\n", request.body.len());
        }
        head.push_str("\r\n");
        let mut wire = head.into_bytes();
        if request.body.len() <= FREE {
            wire.extend_from_slice(&request.body);
        }
        stream.write_all(&wire).await.map_err(|error| (error.into(), true))?;
        if request.body.len() > FREE {
            stream.write_all(&request.body).await.map_err(|error| (error.into(), true))?;
        }
        let mut reader = Reader { stream, buffer: wire, filled: 0, held: None, client: self };
        reader.buffer.clear();
        let answer = reader.answer(request.method == "HEAD").await;
        let nothing_came = reader.filled == 0;
        match answer {
            Ok(answer) => {
                if answer.reusable {
                    self.keep_idle(to, reader.stream);
                }
                Ok(answer.response)
            }
            Err(error) => Err((error, nothing_came)),
        }
    }
}

struct Answer {
    response: Response,
    reusable: bool,
}

/// How the end of a body is told.
pub(crate) enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// The head of an answer.
pub(crate) struct Head {
    pub(crate) status: u16,
    own: Vec<(String, String)>,
    /// Its length in bytes.
    pub(crate) length: usize,
    pub(crate) framing: Framing,
    keep_alive: bool,
}

struct Reader<'a> {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// Bytes that came in all.
    filled: usize,
    held: Option<OwnedSemaphorePermit>,
    client: &'a HttpClient,
}

impl Reader<'_> {
    /// Reads some more. The value is false at the end of the stream.
    async fn more(&mut self) -> Result<bool, HttpError> {
        if self.held.is_none() && self.buffer.len() >= FREE {
            // Rather wait than hold more than all calls together may.
            self.held = self.client.reserve(self.client.0.max_body + FREE).await;
        }
        self.buffer.reserve(4096);
        let count = self.stream.read_buf(&mut self.buffer).await?;
        self.filled += count;
        Ok(count > 0)
    }

    async fn answer(&mut self, without_body: bool) -> Result<Answer, HttpError> {
        let head = loop {
            match head(&self.buffer)? {
                // An interim answer: the real one follows.
                Some(head) if head.status < 200 => drop(self.buffer.drain(..head.length)),
                Some(head) => break head,
                None if self.buffer.len() > MAX_HEAD => {
                    return Err(HttpError::Invalid(format!("its head is longer than {MAX_HEAD} bytes")));
                }
                None => self.more_or_broken().await?,
            }
        };
        self.buffer.drain(..head.length);
        let Head { status, own, framing, mut keep_alive, .. } = head;
        let body = match framing {
            _ if without_body || matches!(status, 204 | 304) => Vec::new(),
            Framing::Length(length) => {
                self.within_bounds(length)?;
                while self.buffer.len() < length {
                    self.more_or_broken().await?;
                }
                keep_alive &= self.buffer.len() == length;
                self.buffer.truncate(length);
                std::mem::take(&mut self.buffer)
            }
            Framing::Chunked => self.chunks().await?,
            Framing::UntilClose => {
                keep_alive = false;
                while self.more().await? {
                    self.within_bounds(self.buffer.len())?;
                }
                std::mem::take(&mut self.buffer)
            }
        };
        Ok(Answer { response: Response { status, headers: own, body }, reusable: keep_alive })
    }

    async fn chunks(&mut self) -> Result<Vec<u8>, HttpError> {
        let mut body = Vec::new();
        loop {
            let (start, size) = loop {
                match httparse::parse_chunk_size(&self.buffer) {
                    Ok(Status::Complete((start, size))) => break (start, usize::try_from(size).unwrap_or(usize::MAX)),
                    Ok(Status::Partial) if self.buffer.len() <= MAX_HEAD => self.more_or_broken().await?,
                    _ => return Err(HttpError::Invalid("its chunks are not well formed".to_owned())),
                }
            };
            self.within_bounds(body.len().saturating_add(size))?;
            if size == 0 {
                // Trailers, up to an empty line.
                self.buffer.drain(..start);
                loop {
                    if self.buffer.starts_with(b"\r\n") {
                        self.buffer.drain(..2);
                        return Ok(body);
                    }
                    if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                        self.buffer.drain(..end + 2);
                    } else if self.buffer.len() > MAX_HEAD {
                        return Err(HttpError::Invalid("its trailers are too long".to_owned()));
                    } else {
                        self.more_or_broken().await?;
                    }
                }
            }
            while self.buffer.len() < start + size + 2 {
                self.more_or_broken().await?;
            }
            body.extend_from_slice(&self.buffer[start..start + size]);
            self.buffer.drain(..start + size + 2);
        }
    }

    async fn more_or_broken(&mut self) -> Result<(), HttpError> {
        if self.more().await? {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed in the middle").into())
    }

    fn within_bounds(&self, length: usize) -> Result<(), HttpError> {
        let most = self.client.0.max_body;
        if length <= most { Ok(()) } else { Err(HttpError::Invalid(format!("it is longer than {most} bytes"))) }
    }
}

/// Reads the head of an answer; nothing if it is not complete yet.
pub(crate) fn head(buffer: &[u8]) -> Result<Option<Head>, HttpError> {
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut answer = httparse::Response::new(&mut headers);
    let length = match answer.parse(buffer) {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) => return Ok(None),
        Err(error) => return Err(HttpError::Invalid(format!("it is not HTTP: {error}"))),
    };
    let value = |name: &str| {
        let header = answer.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        header.and_then(|header| std::str::from_utf8(header.value).ok()).map(str::trim)
    };
    let has = |name: &str, word: &str| {
        value(name).is_some_and(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(word)))
    };
    let framing = if has("transfer-encoding", "chunked") {
        Framing::Chunked
    } else if let Some(length) = value("content-length") {
        let length = length.parse().map_err(|_| HttpError::Invalid("its length is no number".to_owned()))?;
        Framing::Length(length)
    } else {
        Framing::UntilClose
    };
    let keep_alive = answer.version == Some(1) && !has("connection", "close");
    let own = answer.headers.iter().filter_map(|header| {
        let name = header.name.to_ascii_lowercase();
        let value = std::str::from_utf8(header.value).ok()?;
        name.starts_with(OWN_HEADERS).then(|| (name, value.to_owned()))
    });
    Ok(Some(Head { status: answer.code.unwrap_or(0), own: own.collect(), length, framing, keep_alive }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// A server that gives one scripted answer for each request, and says how many connections it saw.
    async fn server(answers: Vec<(&'static [u8], bool)>) -> (SocketAddr, tokio::task::JoinHandle<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let (mut connections, mut answers) = (0, answers.into_iter().peekable());
            while answers.peek().is_some() {
                let (mut stream, _) = listener.accept().await.unwrap();
                connections += 1;
                let mut seen = Vec::new();
                while let Some((answer, closes)) = answers.peek().copied() {
                    while !seen.windows(4).any(|end| end == b"\r\n\r\n") {
                        if stream.read_buf(&mut seen).await.unwrap_or(0) == 0 {
                            break;
                        }
                    }
                    if seen.is_empty() {
                        break;
                    }
                    seen.clear();
                    answers.next();
                    stream.write_all(answer).await.unwrap();
                    if closes {
                        break;
                    }
                }
            }
            connections
        });
        (address, task)
    }

    const GET: Request<'_> = Request { method: "GET", path: "/", headers: &[], body: Bytes::new() };

    #[rstest::rstest]
    #[case::length(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, "ok")]
    #[case::chunked(
        b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\nt: v\r\n\r\n",
        503,
        "ok"
    )]
    #[case::until_close(b"HTTP/1.0 200 OK\r\n\r\nok", 200, "ok")]
    #[case::interim(b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, "ok")]
    #[case::nothing(b"HTTP/1.1 204 No Content\r\n\r\n", 204, "")]
    #[tokio::test]
    async fn answers_are_read_however_they_end(#[case] answer: &'static [u8], #[case] status: u16, #[case] body: &str) {
        let (address, _server) = server(vec![(answer, true)]).await;
        let found = HttpClient::new(1000).send(address, &GET).await.unwrap();
        assert_eq!((found.status, std::str::from_utf8(&found.body).unwrap()), (status, body));
    }

    #[rstest::rstest]
    #[case::too_long(b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n", "longer than 1000")]
    #[case::too_long_in_chunks(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffff\r\n",
        "longer than 1000"
    )]
    #[case::not_http(b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP")]
    #[case::cut_short(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nok", "closed in the middle")]
    #[tokio::test]
    async fn what_cannot_be_read_is_an_error(#[case] answer: &'static [u8], #[case] expected: &str) {
        let (address, _server) = server(vec![(answer, true)]).await;
        let error = HttpClient::new(1000).send(address, &GET).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[tokio::test]
    async fn a_connection_serves_many_calls_and_a_closed_one_is_replaced() {
        let ok: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
        // The third answer ends its connection without having said so.
        let (address, server) = server(vec![(ok, false), (ok, false), (ok, true), (ok, true)]).await;
        let client = HttpClient::new(1000);
        for _ in 0..4 {
            assert_eq!(client.send(address, &GET).await.unwrap().status, 200);
        }
        assert_eq!(server.await.unwrap(), 2);
    }

    #[tokio::test]
    async fn what_all_calls_hold_together_is_bounded() {
        let client = HttpClient::new(1000);
        assert!(client.reserve(FREE).await.is_none(), "a small one need not ask");
        let all = client.reserve(SHARED_KIB * 1024 + FREE).await;
        assert!(tokio::time::timeout(Duration::from_millis(20), client.reserve(FREE + 1)).await.is_err());
        drop(all);
        assert!(client.reserve(FREE + 1).await.is_some());
    }
}
