//! Listening, and connections.

use super::{patient::Patient, service::Service, stream, tls};
use http_body_util::Either;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

/// Most connections beside those of streams.
const MAX_CONNECTIONS: usize = 1024;
/// Longest time in which the other side may confirm nothing of what it was sent.
const UNCONFIRMED_MS: u32 = 60_000;
/// Longest time for the head of a request to arrive; and for a connection without a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// Largest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// A connection takes no more requests after this time: so clients spread over replicas, and one that does not read ends.
const MAX_AGE: Duration = Duration::from_secs(300);
/// Longest time for the last answer of a connection, unless it is a stream.
const GRACE: Duration = Duration::from_secs(10);
/// A stream ends by itself before.
const STREAM_END: Duration = stream::MAX_AGE.saturating_mul(2);
/// Wait after a connection that could not be taken: files may have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why flags cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve flags at {address}: {source}; choose another address with --ofrep-listen")]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Listens.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    crate::telemetry::server::bind(address).await.map_err(|source| ListenError { address, source })
}

/// What is listened with.
pub struct Listening {
    /// The address.
    pub listener: TcpListener,
    /// How TLS is spoken; none: there is no TLS.
    pub acceptor: Option<TlsAcceptor>,
    /// Most streams of changes.
    pub streams: usize,
}

/// Serves until `shutdown`.
pub async fn serve(listening: Listening, service: Arc<Service>, shutdown: CancellationToken) {
    let Listening { listener, acceptor, streams } = listening;
    let (connections, places) = (TaskTracker::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS + streams)));
    while let Some(accepted) = shutdown.run_until_cancelled(listener.accept()).await {
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "OFREP: a connection could not be taken");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let (service, shutdown, acceptor) = (Arc::clone(&service), shutdown.clone(), acceptor.clone());
        connections.spawn(async move {
            accept(stream, acceptor, from, service, shutdown).await;
            drop(place);
        });
    }
    connections.close();
    let _ = timeout(GRACE, connections.wait()).await;
}

async fn accept(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
    from: SocketAddr,
    service: Arc<Service>,
    shutdown: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, UNCONFIRMED_MS);
    let Some(acceptor) = acceptor else { return connection(stream, from, service, shutdown).await };
    if let Some(Some(stream)) = shutdown.run_until_cancelled(tls::handshake(&acceptor, stream)).await {
        // Boxed, so that connections without TLS do not take its room.
        Box::pin(connection(stream, from, service, shutdown)).await;
    }
}

async fn connection(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    from: SocketAddr,
    service: Arc<Service>,
    shutdown: CancellationToken,
) {
    let is_streaming = &AtomicBool::new(false);
    let answer = hyper::service::service_fn(|request| {
        let service = Arc::clone(&service);
        async move {
            let answer = service.answer(request, from.ip()).await;
            is_streaming.store(matches!(answer.body(), Either::Right(_)), Ordering::Relaxed);
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(Patient::new(stream)), answer);
    let mut connection = pin!(connection);
    tokio::select! {
        // The client is gone, or spoke something else.
        _ = connection.as_mut() => return,
        () = shutdown.cancelled() => {}
        () = sleep(MAX_AGE) => {}
    }
    connection.as_mut().graceful_shutdown();
    let last_answer = async {
        if is_streaming.load(Ordering::Relaxed) {
            let _ = timeout(STREAM_END, shutdown.cancelled()).await;
        }
        sleep(GRACE).await;
    };
    tokio::select! {
        _ = connection => {}
        () = last_answer => {}
    }
}
