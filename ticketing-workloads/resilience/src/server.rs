//! An HTTP/1 server that no client can hold up: connections, headers, bodies and the end of the process are bounded.

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Wait after a failed accept, such as one for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a client that still sends is listened to after its last answer, and how much of it is read.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 * 1024 * 1024;

/// Bounds that keep clients from exhausting a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; more wait in the kernel's queue.
    pub connections: usize,
    /// Time to send the head of a request; also the longest pause between two requests of a connection.
    pub head_timeout: Duration,
    /// Most headers of a request.
    pub headers: usize,
    /// Most bytes of a request's head.
    pub head_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 1_024, head_timeout: Duration::from_secs(30), headers: 64, head_bytes: 32 * 1024 }
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
    let tracker = TaskTracker::new();
    let abort = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &places) => accepted,
        };
        let Some((stream, place)) = accepted else { continue };
        let (app, stop) = (app.clone(), stop.clone());
        let connection = async move {
            let _place = place;
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
    places: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => Some((stream, place)),
        Err(error) => {
            tracing::debug!(%error, "accept failed");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

async fn serve_connection(stream: TcpStream, app: Router, limits: Limits, stop: CancellationToken) {
    // Answers are small; waiting to fill a packet only delays them.
    let _ = stream.set_nodelay(true);
    let service = TowerToHyperService::new(app);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_headers(limits.headers)
        .max_buf_size(limits.head_bytes)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = connection;
    let result = tokio::select! {
        result = &mut connection => result,
        () = stop.cancelled() => {
            Pin::new(&mut connection).graceful_shutdown();
            (&mut connection).await
        }
    };
    if let Err(error) = result {
        tracing::trace!(%error, "connection ended");
    }
    let stream = connection.into_parts().io.into_inner();
    let _ = tokio::time::timeout(LINGER, drain(stream)).await;
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

/// Why a body could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It has more bytes than are allowed.
    #[error("the body has more than {0} bytes")]
    TooLarge(usize),
    /// It did not arrive in time.
    #[error("the body did not arrive within {} s", .0.as_secs())]
    TooSlow(Duration),
    /// The connection broke.
    #[error("the body broke off")]
    Broken,
}

impl BodyError {
    /// The status that says so.
    pub fn status(self) -> StatusCode {
        match self {
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow(_) => StatusCode::REQUEST_TIMEOUT,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }
}

impl IntoResponse for BodyError {
    fn into_response(self) -> Response {
        (self.status(), Json(json!({ "message": self.to_string() }))).into_response()
    }
}

/// Reads a body of at most `max_bytes` within `time`.
pub async fn read_body(body: Body, max_bytes: usize, time: Duration) -> Result<Vec<u8>, BodyError> {
    match tokio::time::timeout(time, Limited::new(body, max_bytes).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLarge(max_bytes)),
        Ok(Err(_)) => Err(BodyError::Broken),
        Err(_) => Err(BodyError::TooSlow(time)),
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
