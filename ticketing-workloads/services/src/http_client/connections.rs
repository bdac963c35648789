//! Connections to the endpoints of one service. Each carries one request at a time, is used again for a while, and is then
//! closed: sooner than the other side would, and soon enough for pods that were added to get their share.

use axum::body::Bytes;
use axum::http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

/// How connections are kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// Idle ones to one endpoint.
    pub idle: usize,
    /// For so long after their last answer. Servers keep them longer: ours for 75 s, and few of others for less than 5 s.
    pub idle_time: Duration,
    /// For so long after they were opened, less up to a fifth by chance.
    pub age: Duration,
}

/// The defaults.
pub const KEEP: Keep = Keep { idle: 32, idle_time: Duration::from_secs(4), age: Duration::from_secs(15) };

/// Time between two looks for connections that nobody takes any more.
const SWEEP: Duration = Duration::from_secs(1);
/// A request on a connection that the other side was closing meanwhile is lost within about the time of a packet there and back.
/// What is lost later was lost by a server that may have been at work on it.
const CLOSING: Duration = Duration::from_millis(500);

/// The idle connections of one service.
pub struct Connections {
    keep: Keep,
    idle: Mutex<IdleConnections>,
}

#[derive(Default)]
struct IdleConnections {
    of: HashMap<SocketAddr, Vec<Idle>>,
    /// When those that nobody takes any more were last looked for.
    swept_at: Option<Instant>,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// A connection for one request.
pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    ages_at: Instant,
    /// Whether it has carried one before: then the other side may have closed it without a word that has arrived here.
    pub used_before: bool,
}

/// Why there is no answer.
pub enum Failed {
    /// Nothing was sent.
    NotSent(hyper::Error),
    /// The request, or a part of it, may have arrived. `closing`: it met the end of an idle connection.
    Broken { error: hyper::Error, closing: bool },
}

impl Connections {
    pub fn new(keep: Keep) -> Arc<Self> {
        Arc::new(Self { keep, idle: Mutex::default() })
    }

    fn idle(&self) -> MutexGuard<'_, IdleConnections> {
        // No code here panics between two writes that belong together.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An idle connection to `address` that is still good, the one that was used last.
    pub async fn take(&self, address: SocketAddr) -> Option<Connection> {
        loop {
            let mut connection = {
                let mut idle = self.idle();
                let of_address = idle.of.get_mut(&address)?;
                let Some(found) = of_address.pop() else {
                    idle.of.remove(&address);
                    return None;
                };
                if !self.is_good(&found) {
                    continue;
                }
                found.connection
            };
            // At once; or it learns here that the other side has closed it.
            if connection.sender.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    fn is_good(&self, idle: &Idle) -> bool {
        let now = Instant::now();
        now < idle.since + self.keep.idle_time && now < idle.connection.ages_at && !idle.connection.sender.is_closed()
    }

    /// Opens a connection within `bound`.
    pub async fn open(&self, address: SocketAddr, bound: Duration) -> Result<Connection, String> {
        let late = |_| format!("{address} did not take the connection within {} ms", bound.as_millis());
        let stream = timeout(bound, TcpStream::connect(address)).await.map_err(late)?;
        let stream = stream.map_err(|error| format!("{address}: {error}"))?;
        // Requests are small; waiting to fill a packet only delays them.
        let _ = stream.set_nodelay(true);
        let (sender, driver) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| format!("{address}: {error}"))?;
        // Ends with the connection, which ends when its sender is dropped, or a request of it.
        tokio::spawn(async move {
            if let Err(error) = driver.await {
                tracing::trace!(%error, "connection ended");
            }
        });
        let age = self.keep.age.mul_f64(1.0 - 0.2 * rand::random::<f64>());
        Ok(Connection { sender, ages_at: Instant::now() + age, used_before: false })
    }

    /// Keeps a connection whose answer has been read to its end. `is_wanted`: whether its endpoint is one still.
    pub fn put_back(&self, address: SocketAddr, mut connection: Connection, is_wanted: impl Fn(SocketAddr) -> bool) {
        if connection.sender.is_closed() || Instant::now() >= connection.ages_at || !is_wanted(address) {
            return;
        }
        connection.used_before = true;
        let now = Instant::now();
        let mut idle = self.idle();
        // Those that nobody takes any more would stay for ever.
        if idle.swept_at.is_none_or(|at| now.saturating_duration_since(at) >= SWEEP) {
            idle.swept_at = Some(now);
            idle.of.retain(|address, connections| {
                connections.retain(|idle| self.is_good(idle));
                !connections.is_empty() && is_wanted(*address)
            });
        }
        let of_address = idle.of.entry(address).or_default();
        if of_address.len() < self.keep.idle {
            of_address.push(Idle { connection, since: now });
        }
    }
}

impl Connection {
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Failed> {
        let sent_at = Instant::now();
        self.sender.try_send_request(request).await.map_err(|mut failed| {
            let was_sent = failed.take_message().is_none();
            let error = failed.into_error();
            let closing = self.used_before && ended(&error) && sent_at.elapsed() < CLOSING;
            if was_sent { Failed::Broken { error, closing } } else { Failed::NotSent(error) }
        })
    }
}

/// Whether the connection ended, and not by an answer that makes no sense.
fn ended(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    let cause = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    let is_end = |cause: &std::io::Error| matches!(cause.kind(), BrokenPipe | ConnectionAborted | ConnectionReset);
    error.is_incomplete_message() || error.is_closed() || error.is_canceled() || cause.is_some_and(is_end)
}
