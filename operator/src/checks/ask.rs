//! One ask of one endpoint: a connection, or an answer over HTTP.
//!
//! A peer may be slow, broken or hostile: an ask has a deadline, head and body have bounds, and nothing of an answer
//! is kept but its status code. No redirect is followed and no proxy of the environment has a say, so what is asked is the
//! address that was chosen and nothing else.

use crate::{
    checks::turns::WhilePolled,
    kubernetes::clients::root_cause,
    pods::http::{self, Framing, HttpError},
};
use contract::duration::spell;
use httparse::Status;
use std::{
    fmt::Write,
    io,
    net::SocketAddr,
    ops::RangeInclusive,
    sync::{Arc, LazyLock},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
    time::Instant,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{ClientConfig, pki_types::ServerName},
};

/// Most of a body that is read, in bytes; what comes after is not waited for.
const MAX_BODY: usize = 64 * 1024;
/// Most interim answers (1xx) before the one that counts.
const MAX_INTERIM: usize = 8;
/// Bytes that are read at once.
const BUFFER: usize = 4 * 1024;
/// Most reads of one answer: a peer that sends each byte by itself must not cost more than others.
const MAX_READS: usize = 512;

/// Handshakes of TLS that compute at once in this process: what is verified is chosen by others, and it is costly.
const HANDSHAKES: usize = 4;

/// For handshakes.
static PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(HANDSHAKES)));

/// What is asked of every endpoint of a check.
#[derive(Clone, Debug)]
pub enum Ask {
    /// For a connection.
    Tcp,
    /// For an answer over HTTP.
    Http {
        /// The request as it is sent.
        request: Arc<[u8]>,
        /// Status codes of a healthy answer.
        expected: Vec<RangeInclusive<u16>>,
        /// How TLS is spoken, and with whom; absent: it is not.
        tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    },
}

/// Why an endpoint fails a check.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No answer in time, or only a part of it.
    #[error("{0} gave no complete answer within {time}", time = spell_duration(.1))]
    Timeout(SocketAddr, Duration),
    /// There is no connection.
    #[error("{0} cannot be reached: {why}", why = root_cause(.1))]
    Unreachable(SocketAddr, #[source] io::Error),
    /// It broke the connection off.
    #[error("{0} broke the connection off: {why}", why = root_cause(.1))]
    Broken(SocketAddr, #[source] io::Error),
    /// No TLS that can be trusted came about.
    #[error("no TLS with {0}: {why}", why = root_cause(.1))]
    Tls(SocketAddr, #[source] io::Error),
    /// It answered with another status code.
    #[error("{0} answered with HTTP {1}")]
    Status(SocketAddr, u16),
    /// What it answered is no HTTP, or too long.
    #[error("{0} gave an invalid answer: {1}")]
    Invalid(SocketAddr, String),
}

fn spell_duration(time: &Duration) -> String {
    spell(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

impl AskError {
    /// Label for metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Timeout(..) => "timeout",
            Self::Unreachable(..) | Self::Broken(..) => "unreachable",
            Self::Tls(..) => "tls",
            Self::Status(..) => "status",
            Self::Invalid(..) => "invalid",
        }
    }

    /// Whether asking again is likely to take as long.
    pub const fn is_silence(&self) -> bool {
        matches!(self, Self::Timeout(..))
    }
}

/// The request for a path. `host` is the name that a client of the Service would use.
pub fn request(path: &str, host: &str) -> Arc<[u8]> {
    let mut request = String::with_capacity(256);
    // Writing to a String cannot fail.
    let _ = write!(request, "GET {path} HTTP/1.1\r\nhost: {host}\r\n");
    request.push_str(concat!("user-agent: resilience-operator/", env!("CARGO_PKG_VERSION"), "\r\n"));
    request.push_str("accept: */*\r\nconnection: close\r\n\r\n");
    request.into_bytes().into()
}

/// What came of an ask.
#[derive(Debug)]
pub struct Asked {
    /// Whether the endpoint is healthy, or why not.
    pub result: Result<(), AskError>,
    /// When somebody was there: a connection came about or was refused, so the way there was open.
    pub reached: Option<Instant>,
}

/// Asks one endpoint.
pub async fn ask(to: SocketAddr, what: &Ask, timeout: Duration) -> Asked {
    let mut reached = None;
    let asked = tokio::time::timeout(timeout, exchange(to, what, &mut reached)).await;
    Asked { result: asked.unwrap_or(Err(AskError::Timeout(to, timeout))), reached }
}

/// Whether an error of a connection was told by somebody at the other end.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset)
}

async fn exchange(to: SocketAddr, what: &Ask, reached: &mut Option<Instant>) -> Result<(), AskError> {
    let unreachable = |error| AskError::Unreachable(to, error);
    let connected = TcpStream::connect(to).await;
    *reached = connected.as_ref().err().is_none_or(is_refusal).then(Instant::now);
    let stream = connected.map_err(unreachable)?;
    let Ask::Http { request, expected, tls } = what else { return Ok(()) };
    stream.set_nodelay(true).map_err(unreachable)?;
    let status = match tls {
        None => converse(stream, request, expected).await,
        Some((config, name)) => {
            let connector = TlsConnector::from(Arc::clone(config));
            let connected = WhilePolled::new(&PERMITS, connector.connect(name.clone(), stream)).await;
            converse(connected.map_err(|error| AskError::Tls(to, error))?, request, expected).await
        }
    };
    let status = status.map_err(|error| match error {
        HttpError::Io(error) => AskError::Broken(to, error),
        HttpError::Invalid(why) => AskError::Invalid(to, why),
    })?;
    if is_expected(status, expected) { Ok(()) } else { Err(AskError::Status(to, status)) }
}

fn is_expected(status: u16, expected: &[RangeInclusive<u16>]) -> bool {
    expected.iter().any(|range| range.contains(&status))
}

/// Sends the request, and reads a healthy answer to its end, or as much of it as is read. The value is its status code.
async fn converse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    request: &[u8],
    expected: &[RangeInclusive<u16>],
) -> Result<u16, HttpError> {
    stream.write_all(request).await?;
    stream.flush().await?;
    let mut reader = Reader { stream, buffer: Vec::new(), reads: 0 };
    let mut interim = 0;
    let (status, framing) = loop {
        match http::head(&reader.buffer)? {
            Some(head) if head.status < 200 => {
                interim += 1;
                if interim > MAX_INTERIM || head.status == 101 {
                    return Err(HttpError::Invalid("it does not come to the point".to_owned()));
                }
                reader.buffer.drain(..head.length);
            }
            Some(head) => {
                reader.buffer.drain(..head.length);
                break (head.status, head.framing);
            }
            None if reader.buffer.len() > http::MAX_HEAD => {
                return Err(HttpError::Invalid(format!("its head is longer than {} bytes", http::MAX_HEAD)));
            }
            None => reader.more().await?,
        }
    };
    if matches!(status, 204 | 304) || !is_expected(status, expected) {
        return Ok(status);
    }
    let skipped = match framing {
        Framing::Length(length) => reader.skip(length.min(MAX_BODY)).await,
        Framing::Chunked => reader.skip_chunks().await,
        Framing::UntilClose => reader.skip_to_the_end().await,
    };
    // A body in very many pieces is not waited for, as one that is very long.
    if reader.reads < MAX_READS {
        skipped?;
    }
    Ok(status)
}

struct Reader<S> {
    stream: S,
    /// What was read and not looked at yet.
    buffer: Vec<u8>,
    reads: usize,
}

impl<S: AsyncRead + Unpin> Reader<S> {
    /// Reads some more. The value is false at the end of the stream.
    async fn some(&mut self) -> Result<bool, HttpError> {
        if self.reads >= MAX_READS {
            return Err(HttpError::Invalid(format!("it comes in more than {MAX_READS} pieces")));
        }
        self.reads += 1;
        self.buffer.reserve(BUFFER);
        Ok(self.stream.read_buf(&mut self.buffer).await? > 0)
    }

    async fn more(&mut self) -> Result<(), HttpError> {
        if self.some().await? {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its answer is not complete").into())
    }

    /// Reads so much of a body and keeps nothing of it.
    async fn skip(&mut self, mut length: usize) -> Result<(), HttpError> {
        loop {
            let here = length.min(self.buffer.len());
            self.buffer.drain(..here);
            length -= here;
            if length == 0 {
                return Ok(());
            }
            self.more().await?;
        }
    }

    async fn skip_chunks(&mut self) -> Result<(), HttpError> {
        let mut left = MAX_BODY;
        loop {
            let (start, size) = loop {
                match httparse::parse_chunk_size(&self.buffer) {
                    Ok(Status::Complete((start, size))) => break (start, usize::try_from(size).unwrap_or(usize::MAX)),
                    Ok(Status::Partial) if self.buffer.len() <= http::MAX_HEAD => self.more().await?,
                    _ => return Err(HttpError::Invalid("its chunks are not well formed".to_owned())),
                }
            };
            self.buffer.drain(..start);
            // Trailers say nothing that counts. Chunks of one byte cost a few more each.
            let cost = size.saturating_add(start);
            if size == 0 || cost >= left {
                return self.skip(size.min(left)).await;
            }
            left -= cost;
            self.skip(size + 2).await?;
        }
    }

    async fn skip_to_the_end(&mut self) -> Result<(), HttpError> {
        let mut read = 0;
        loop {
            read += self.buffer.len();
            self.buffer.clear();
            if read >= MAX_BODY {
                return Ok(());
            }
            match self.some().await {
                Ok(true) => {}
                // Many close without saying so over TLS; there is no more to come either way.
                Ok(false) => return Ok(()),
                Err(HttpError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
#[path = "ask_tests.rs"]
mod tests;
