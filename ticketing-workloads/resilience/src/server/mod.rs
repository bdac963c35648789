//! An HTTP/1 server that no client can hold up: connections, headers, bodies and the end of the process are bounded.

mod body;
mod peers;
mod timed_stream;

pub use body::{BodyError, ByteBudget, HeldBytes, read_body, read_body_within};

use crate::sync::lock;
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
pub use peers::{Clients, network_of};
use peers::{Connected, Places};
use prometheus_client::metrics::counter::Counter;
use socket2::{Domain, Protocol, Socket, Type};
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use timed_stream::{TimedOut, TimedStream, Times};
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
/// Time between two lines of the log about connections that were refused.
const REPORT: Duration = Duration::from_secs(10);

/// What a client gets for whose connection there was no place in time. Nothing that it has sent was read.
fn no_place(clients: Clients) -> Vec<u8> {
    const BODY: &str =
        r#"{"success":false,"errorCode":"TOO_MANY_CONNECTIONS","message":"too many connections; nothing was begun"}"#;
    let refused = if clients == Clients::Inside { "x-refused: true\r\n" } else { "" };
    let length = BODY.len();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n{refused}retry-after: 1\r\n\
        content-type: application/json\r\ncontent-length: {length}\r\n\r\n{BODY}"
    )
    .into_bytes()
}

/// Bounds that keep clients from exhausting a server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections that are served at once. As many more wait, an eighth of them only of clients that have none; others in the
    /// kernel's queue. A place goes to a client with the fewest.
    pub connections: usize,
    /// How long a connection waits until others have ended; then it gets a 503.
    pub place_timeout: Duration,
    /// While fewer than an eighth of those are free, a peer that has so many gets no more, nor one that has seven times as many
    /// as are free; unless it may have all. As many more of it wait, a sixteenth of all places once half of those wait that may;
    /// others are closed.
    pub connections_per_peer: usize,
    /// What a peer is: an address, or outside a network of 48 bits with IPv6.
    pub clients: Clients,
    /// Time to begin the first request of a connection.
    pub first_byte_timeout: Duration,
    /// Longest pause between two requests of a connection; five seconds, or one before the first request, if another one waits for its place. Clients should give up an idle connection sooner: one that is
    /// closed while a request is on its way to it loses that request.
    pub idle_timeout: Duration,
    /// Time to send the head of a request, from its first byte.
    pub head_timeout: Duration,
    /// Time to take what is ready for it, or 16 KiB more of it. A client that sends requests and reads no answer has as long.
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
        clients: Clients::Inside,
        first_byte_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(75),
        head_timeout: Duration::from_secs(10),
        write_timeout: Duration::from_secs(20),
        connection_age: Duration::from_secs(20),
        headers: 64,
        head_bytes: 32 * 1024,
    };

    fn times(&self) -> Times {
        Times {
            first: self.first_byte_timeout,
            idle: self.idle_timeout,
            head: self.head_timeout,
            write: self.write_timeout,
        }
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

/// Serves `app` as [`serve_and_count`] does, and counts nothing.
pub async fn serve(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    stop: CancellationToken,
    drain: Duration,
) -> bool {
    serve_and_count(listener, app, limits, Counter::default(), stop, drain).await
}

/// Counts and logs connections that were refused.
struct Refusals {
    counter: Counter,
    report: Mutex<RareReport>,
}

impl Refusals {
    fn add(&self, peer: IpAddr, why: &str) {
        self.counter.inc();
        if let Some(refused) = lock(&self.report).note(Instant::now()) {
            tracing::warn!(%peer, refused, "connection refused: {why}");
        }
    }
}

/// Limits how often an event that may come often is logged.
#[derive(Debug, Default)]
struct RareReport {
    reported_at: Option<Instant>,
    unreported: u64,
}

impl RareReport {
    /// Counts one more. The count since the last report, if the next report is due.
    fn note(&mut self, now: Instant) -> Option<u64> {
        self.unreported += 1;
        if self.reported_at.is_some_and(|at| now.saturating_duration_since(at) < REPORT) {
            return None;
        }
        self.reported_at = Some(now);
        Some(std::mem::take(&mut self.unreported))
    }
}

/// Serves `app` until `stop`, each request with its peer's address ([`ConnectInfo`]); then takes no more connections, lets requests under way end for up to `drain`, and
/// returns whether all of them did. Connections that it had no place for are counted in `refused`.
pub async fn serve_and_count(
    listener: TcpListener,
    app: Router,
    limits: Limits,
    refused: Counter,
    stop: CancellationToken,
    drain: Duration,
) -> bool {
    let places = Places::new(limits.connections, limits.connections_per_peer, limits.clients);
    // Of connections that were taken and are not served yet. They cost a file each, so there is a bound on them, too.
    let waiting = Arc::new(Semaphore::new(limits.connections));
    let lingering = Arc::new(Semaphore::new(limits.connections));
    let refusals = Arc::new(Refusals { counter: refused, report: Mutex::default() });
    let no_place: Arc<[u8]> = no_place(limits.clients).into();
    let tracker = TaskTracker::new();
    let abort = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accept(&listener, &waiting) => accepted,
        };
        let Some((stream, address, waits)) = accepted else { continue };
        let Some(mut connected) = places.enter(address.ip()) else {
            // As a courtesy, which must cost nothing.
            let _ = stream.try_write(&no_place);
            refusals.add(address.ip(), "its address has too many, or too many wait");
            continue;
        };
        let (app, stop, refusals) = (app.clone(), stop.clone(), Arc::clone(&refusals));
        let (lingering, no_place) = (Arc::clone(&lingering), Arc::clone(&no_place));
        let connection = async move {
            let place = tokio::select! {
                () = stop.cancelled() => return,
                place = tokio::time::timeout(limits.place_timeout, connected.place()) => place,
            };
            drop(waits);
            if place.is_err() {
                refusals.add(address.ip(), "no other one ended in time");
                // Its client may come back with another one while this one is told.
                drop(connected);
                refuse(stream, &no_place, &lingering).await;
                return;
            }
            serve_connection(stream, address, app, limits, &connected, stop).await;
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

/// Tells a client that there is no place. If as many as there are places are told at once, it may lose the answer to what it
/// still sends.
async fn refuse(mut stream: TcpStream, no_place: &[u8], lingering: &Semaphore) {
    let Ok(_lingers) = lingering.try_acquire() else {
        let _ = stream.try_write(no_place);
        return;
    };
    let tell = async {
        if stream.write_all(no_place).await.is_ok() && stream.shutdown().await.is_ok() {
            drain(stream).await;
        }
    };
    let _ = tokio::time::timeout(LINGER, tell).await;
}

async fn serve_connection(
    stream: TcpStream,
    address: SocketAddr,
    app: Router,
    limits: Limits,
    connected: &Connected,
    stop: CancellationToken,
) {
    // Answers are small; waiting to fill a packet only delays them.
    let _ = stream.set_nodelay(true);
    let requests = Arc::clone(&connected.requests);
    let stream = TimedStream::new(stream, limits.times(), Arc::clone(&requests));
    let ages_at = ages_at(limits.connection_age, rand::random());
    let service = {
        let (requests, ends) = (Arc::clone(&requests), [stop.clone(), connected.shed.clone()]);
        hyper::service::service_fn(move |request: Request<Incoming>| {
            let (app, ends, under_way) = (app.clone(), ends.clone(), requests.begin());
            async move {
                let mut request = request.map(Body::new);
                request.extensions_mut().insert(ConnectInfo(address));
                let Ok(mut response) = app.oneshot(request).await;
                drop(under_way);
                if ends.iter().any(CancellationToken::is_cancelled) || ages_at.is_some_and(|at| at <= Instant::now()) {
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
    let end = async {
        tokio::select! {
            () = stop.cancelled() => {}
            () = connected.shed.cancelled() => {}
        }
    };
    let result = tokio::select! {
        result = &mut connection => result,
        () = end => {
            was_idle = requests.are_none_under_way();
            Pin::new(&mut connection).graceful_shutdown();
            // One that was opened and never used ends here; hyper waits for its first request.
            if requests.idle_since().is_some() { Ok(()) } else { (&mut connection).await }
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
        for (clients, says_so) in [(Clients::Inside, true), (Clients::Outside, false)] {
            let text = String::from_utf8(no_place(clients)).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("content-length: {}", body.len())), "{}", body.len());
            assert_eq!(serde_json::from_str::<serde_json::Value>(body).unwrap()["errorCode"], "TOO_MANY_CONNECTIONS");
            assert_eq!(head.contains("x-refused"), says_so, "what services say to each other is not said outside");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn many_refusals_are_told_once_in_a_while() {
        let mut report = RareReport::default();
        assert_eq!(report.note(Instant::now()), Some(1));
        for _ in 0..1_000 {
            assert_eq!(report.note(Instant::now()), None);
        }
        tokio::time::advance(REPORT).await;
        assert_eq!(report.note(Instant::now()), Some(1_001));
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
