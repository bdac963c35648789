//! An HTTP/1 server that no client can hold up: connections, headers, bodies and the end of the process are bounded.

mod body;
mod peers;
mod timed_stream;

pub use body::{BodyError, ByteBudget, HeldBytes, read_body, read_body_within};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use peers::{Connected, Peers};
use socket2::{Domain, Protocol, Socket, Type};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use timed_stream::{Requests, TimedOut, TimedStream, Times};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

/// Wait after a failed accept, such as one for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a client that still sends is listened to after its last answer, and how much of it is read.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 * 1024 * 1024;

/// What a client gets for whose connection there was no place in time. Nothing that it has sent was read.
const NO_PLACE: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nx-refused: true\r\nretry-after: 1\r\n\
    content-type: application/json\r\ncontent-length: 104\r\n\r\n\
    {\"success\":false,\"errorCode\":\"TOO_MANY_CONNECTIONS\",\"message\":\"too many connections; nothing was begun\"}";

/// Bounds that keep clients from exhausting a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are served at once. As many more wait, others in the kernel's queue.
    pub connections: usize,
    /// How long a connection waits until others have ended; then it gets a 503.
    pub place_timeout: Duration,
    /// Those of them from one address, or from one network of 64 bits with IPv6. As many more of it wait, others are closed.
    pub connections_per_peer: usize,
    /// Longest pause between two requests of a connection. Clients should give up an idle connection sooner: one that is
    /// closed while a request is on its way to it loses that request.
    pub idle_timeout: Duration,
    /// Time to send the head of a request, from its first byte.
    pub head_timeout: Duration,
    /// Time to take what is ready for it. A client that sends requests and reads no answer has as long.
    pub write_timeout: Duration,
    /// From this age on, less up to a fifth by chance, a connection is closed with its next answer (`Connection: close`), so that
    /// its client comes back to another pod.
    pub connection_age: Duration,
    /// Most headers of a request.
    pub headers: usize,
    /// Most bytes of a request's head.
    pub head_bytes: usize,
}

impl Limits {
    /// The defaults.
    pub const DEFAULT: Self = Self {
        connections: 1_024,
        place_timeout: Duration::from_secs(10),
        connections_per_peer: 512,
        idle_timeout: Duration::from_secs(75),
        head_timeout: Duration::from_secs(10),
        write_timeout: Duration::from_secs(20),
        connection_age: Duration::from_secs(20),
        headers: 64,
        head_bytes: 32 * 1024,
    };

    fn times(&self) -> Times {
        Times { idle: self.idle_timeout, head: self.head_timeout, write: self.write_timeout }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Connections that the kernel keeps ready to be accepted.
const BACKLOG: i32 = 1_024;

/// Listens on `address`; without one on all addresses of this machine, of IPv6 and IPv4 with one socket, or of IPv4 where
/// the kernel has no IPv6. Port 0 takes any free one. The error names the address.
///
/// Must be called within a tokio runtime.
pub fn listen(address: Option<IpAddr>, port: u16) -> Result<TcpListener, ListenError> {
    let all = |ip: IpAddr| open(SocketAddr::new(ip, port));
    match address {
        Some(address) => all(address),
        None => match all(Ipv6Addr::UNSPECIFIED.into()) {
            Err(error) if error.is_without_ipv6() => all(Ipv4Addr::UNSPECIFIED.into()),
            result => result,
        },
    }
}

/// An address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}")]
pub struct ListenError {
    address: SocketAddr,
    source: io::Error,
}

impl ListenError {
    /// Whether the kernel was built or started without IPv6, or has it switched off.
    fn is_without_ipv6(&self) -> bool {
        matches!(self.source.raw_os_error(), Some(EAFNOSUPPORT | EPROTONOSUPPORT | EADDRNOTAVAIL))
    }
}

/// As Linux numbers them.
const EPROTONOSUPPORT: i32 = 93;
const EAFNOSUPPORT: i32 = 97;
const EADDRNOTAVAIL: i32 = 99;

fn open(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        if address.is_ipv6() {
            // Whatever the machine's default is: [::] stands for IPv4, too.
            socket.set_only_v6(false)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    open().map_err(|source| ListenError { address, source })
}

/// Serves `app` until `stop`; then takes no more connections, lets requests under way end for up to `drain`, and
/// returns whether all of them did.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    stop: CancellationToken,
    drain: Duration,
) -> bool {
    let places = Arc::new(Semaphore::new(limits.connections));
    // Of connections that were taken and are not served yet. They cost a file each, so there is a bound on them, too.
    let waiting = Arc::new(Semaphore::new(limits.connections));
    let peers = Peers::new(limits.connections_per_peer);
    let tracker = TaskTracker::new();
    let abort = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &waiting) => accepted,
        };
        let Some((stream, address, waits)) = accepted else { continue };
        let Some(connected) = peers.enter(address.ip()) else {
            // As a courtesy, which must cost nothing.
            let _ = stream.try_write(NO_PLACE);
            tracing::debug!(peer = %address.ip(), "connection closed: its peer has too many");
            continue;
        };
        let (app, stop, places) = (app.clone(), stop.clone(), Arc::clone(&places));
        let connection = async move {
            let place = tokio::select! {
                () = stop.cancelled() => return,
                place = tokio::time::timeout(limits.place_timeout, place(&connected, &places)) => place,
            };
            let Ok(Some(_places)) = place else {
                tracing::debug!(peer = %address.ip(), "connection closed: no other one ended in time");
                // Its client may come back with another one while this one is told.
                drop(connected);
                let _ = tokio::time::timeout(LINGER, refuse(stream)).await;
                return;
            };
            drop(waits);
            serve_connection(stream, app, limits, stop).await;
        };
        let abort = abort.clone();
        tracker.spawn(async move {
            tokio::select! {
                () = connection => {}
                () = abort.cancelled() => {}
            }
        });
    }
    drop(listener);
    tracker.close();
    let drained = tokio::time::timeout(drain, tracker.wait()).await.is_ok();
    if !drained {
        tracing::warn!(connections = tracker.len(), "requests did not finish in time; closing their connections");
        abort.cancel();
        tracker.wait().await;
    }
    drained
}

async fn accept(
    listener: &TcpListener,
    waiting: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let waits = Arc::clone(waiting).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, address)) => Some((stream, address, waits)),
        Err(error) => {
            tracing::debug!(%error, "accept failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn refuse(mut stream: TcpStream) {
    if stream.write_all(NO_PLACE).await.is_ok() && stream.shutdown().await.is_ok() {
        drain(stream).await;
    }
}

/// First the peer's place, so that one with too many connections waits for itself only.
async fn place(connected: &Connected, places: &Arc<Semaphore>) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
    let of_peer = connected.place().await?;
    Some((of_peer, Arc::clone(places).acquire_owned().await.ok()?))
}

async fn serve_connection(stream: TcpStream, app: Router, limits: Limits, stop: CancellationToken) {
    // Answers are small; waiting to fill a packet only delays them.
    let _ = stream.set_nodelay(true);
    let requests = Arc::new(Requests::default());
    let stream = TimedStream::new(stream, limits.times(), Arc::clone(&requests));
    let ages_at = ages_at(limits.connection_age, rand::random());
    let service = {
        let (requests, stop) = (Arc::clone(&requests), stop.clone());
        hyper::service::service_fn(move |request: Request<Incoming>| {
            let (app, stop, under_way) = (app.clone(), stop.clone(), requests.begin());
            async move {
                let Ok(mut response) = app.oneshot(request.map(Body::new)).await;
                drop(under_way);
                if stop.is_cancelled() || ages_at.is_some_and(|at| at <= Instant::now()) {
                    close_after(&mut response);
                }
                Ok::<_, Infallible>(response)
            }
        })
    };
    let mut connection = http1::Builder::new()
        // The stream has its own times, which tell a connection that is idle from a head that does not end.
        .header_read_timeout(None)
        .max_headers(limits.headers)
        .max_buf_size(limits.head_bytes)
        .serve_connection(TokioIo::new(stream), service);
    let mut was_idle = false;
    let result = tokio::select! {
        result = &mut connection => result,
        () = stop.cancelled() => {
            was_idle = requests.are_none_under_way();
            Pin::new(&mut connection).graceful_shutdown();
            (&mut connection).await
        }
    };
    if let Err(error) = result {
        tracing::trace!(%error, "connection ended");
    }
    let (stream, timed_out) = connection.into_parts().io.into_inner().into_inner();
    match timed_out {
        // At once. Were it read on, a request that arrives now would be taken and never answered; so its sender sees at once
        // that it must send it again.
        Some(TimedOut::Idle | TimedOut::Head) => {}
        // With what it did not take, or the kernel would keep that for minutes.
        Some(TimedOut::Write) => {
            let _ = stream.set_zero_linger();
        }
        None if was_idle => {}
        None => {
            let _ = tokio::time::timeout(LINGER, drain(stream)).await;
        }
    }
}

/// When a connection that begins now is old; `None`: never. `random` in `0.0..1.0` keeps those that began together apart.
fn ages_at(age: Duration, random: f64) -> Option<Instant> {
    let age = Duration::try_from_secs_f64(age.as_secs_f64() * (1.0 - 0.2 * random)).ok()?;
    Instant::now().checked_add(age)
}

/// Lets the client know that the connection ends with this answer.
fn close_after(response: &mut Response) {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
}

/// Reads what a client still sends after its last answer. If it were left unread, the kernel would reset the connection,
/// and the client could lose the answer that tells it what was wrong.
async fn drain(mut stream: TcpStream) {
    let mut unread = [0; 8 * 1024];
    let mut left = LINGER_BYTES;
    while let Ok(read @ 1..) = stream.read(&mut unread).await {
        left = left.saturating_sub(read);
        if left == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn reaches(listener: &TcpListener, from: IpAddr) -> bool {
        let address = SocketAddr::new(from, listener.local_addr().unwrap().port());
        let (accepted, connected) =
            tokio::join!(tokio::time::timeout(Duration::from_secs(5), listener.accept()), TcpStream::connect(address));
        connected.is_ok() && accepted.is_ok_and(|accepted| accepted.is_ok())
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ages_a_little_sooner_by_chance_or_never() {
        let age = |random| ages_at(Duration::from_secs(20), random).unwrap() - Instant::now();
        assert_eq!((age(0.0), age(1.0)), (Duration::from_secs(20), Duration::from_secs(16)));
        for random in [0.0, 0.5, 1.0] {
            assert_eq!(ages_at(Duration::MAX, random), None);
        }
    }

    #[test]
    fn the_refusal_has_the_length_that_it_says() {
        let text = std::str::from_utf8(NO_PLACE).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
        assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["errorCode"], "TOO_MANY_CONNECTIONS");
    }

    #[tokio::test]
    async fn without_an_address_both_families_are_served() {
        let listener = listen(None, 0).unwrap();
        assert!(reaches(&listener, Ipv4Addr::LOCALHOST.into()).await);
        if std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            assert!(reaches(&listener, Ipv6Addr::LOCALHOST.into()).await);
        } else {
            assert!(listener.local_addr().unwrap().is_ipv4(), "a machine without IPv6");
        }
    }

    #[tokio::test]
    async fn with_an_address_only_that_is_served() {
        let listener = listen(Some(Ipv4Addr::LOCALHOST.into()), 0).unwrap();
        assert_eq!(listener.local_addr().unwrap().ip(), Ipv4Addr::LOCALHOST);
        let port = listener.local_addr().unwrap().port();
        let taken = listen(Some(Ipv4Addr::LOCALHOST.into()), port).unwrap_err();
        assert!(taken.to_string().starts_with(&format!("cannot listen on 127.0.0.1:{port}: ")), "{taken}");
    }

    /// A port that is taken must not be opened for IPv4 alone: half of the clients would reach another process.
    #[rstest::rstest]
    #[case::no_such_family(EAFNOSUPPORT, true)]
    #[case::switched_off(EADDRNOTAVAIL, true)]
    #[case::no_such_protocol(EPROTONOSUPPORT, true)]
    #[case::in_use(98, false)]
    #[case::not_permitted(13, false)]
    fn falls_back_to_ipv4_only_without_ipv6(#[case] errno: i32, #[case] expected: bool) {
        let address = (Ipv6Addr::UNSPECIFIED, 8_080).into();
        let error = ListenError { address, source: io::Error::from_raw_os_error(errno) };
        assert_eq!(error.is_without_ipv6(), expected);
    }
}
