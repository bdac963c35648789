//! Listening, and connections.

use super::service::{Peer, Service};
use crate::ofrep::tls;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

/// Most connections.
const MAX_CONNECTIONS: usize = 1024;
/// Most calls that one connection may have open.
const MAX_CALLS: u32 = 64;
/// Largest head of a call, in bytes: it may hold a token.
const MAX_HEAD_BYTES: u32 = 32 * 1024;
/// Bytes of an answer that wait in a connection.
const MAX_SEND_BYTES: usize = 64 * 1024;
/// How often a silent client is asked whether it is there, and how long it has for its answer.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection without an open call for this long ends.
const MAX_IDLE: Duration = Duration::from_secs(60);
/// Longest time for open calls to end at shutdown.
const GRACE: Duration = Duration::from_secs(8);
/// Wait after a connection that could not be taken: files may have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why flags cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve flagd.sync.v1 at {address}: {source}; choose another address with --flag-sync-listen")]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Listens.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, ListenError> {
    crate::telemetry::server::bind(address).await.map_err(|source| ListenError { address, source })
}

/// Serves until `shutdown`; with TLS, if there is an acceptor.
pub async fn serve(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    service: Arc<Service>,
    shutdown: CancellationToken,
) {
    let (connections, places) = (TaskTracker::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    while let Some(accepted) = shutdown.run_until_cancelled(listener.accept()).await {
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "flag sync: a connection could not be taken");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let (service, shutdown, acceptor) = (Arc::clone(&service), shutdown.clone(), acceptor.clone());
        connections.spawn(async move {
            let _ = stream.set_nodelay(true);
            match acceptor {
                None => connection(stream, from, service, shutdown).await,
                Some(acceptor) => {
                    if let Some(Some(stream)) = shutdown.run_until_cancelled(tls::handshake(&acceptor, stream)).await {
                        // Boxed, so that connections without TLS do not take its room.
                        Box::pin(connection(stream, from, service, shutdown)).await;
                    }
                }
            }
            drop(place);
        });
    }
    connections.close();
    let ended = async {
        service.drain().await;
        connections.wait().await;
    };
    let _ = timeout(GRACE, ended).await;
}

/// Serves one connection.
async fn connection<S>(stream: S, from: SocketAddr, service: Arc<Service>, shutdown: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let peer = Peer { address: from.ip(), calls: Arc::default(), end: CancellationToken::new() };
    let (calls, end) = (Arc::clone(&peer.calls), peer.end.clone());
    let answer = hyper::service::service_fn(move |request| {
        let (service, peer) = (Arc::clone(&service), peer.clone());
        async move { Ok::<_, Infallible>(service.answer(request, peer).await) }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_CALLS)
        .max_header_list_size(MAX_HEAD_BYTES)
        .max_send_buf_size(MAX_SEND_BYTES)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    tokio::select! {
        // The client is gone, or spoke something else.
        _ = connection.as_mut() => return,
        () = end.cancelled() => return,
        () = shutdown.cancelled() => {}
        () = idle(&calls) => {}
    }
    // Open calls end by themselves, and no others come.
    connection.as_mut().graceful_shutdown();
    let _ = timeout(GRACE, connection).await;
}

/// Waits until no call has been open for a while.
async fn idle(calls: &Arc<()>) {
    /// This function's caller, and what answers calls.
    const OTHERS: usize = 2;
    let mut was_idle = false;
    loop {
        sleep(MAX_IDLE / 2).await;
        let is_idle = Arc::strong_count(calls) <= OTHERS;
        if is_idle && was_idle {
            return;
        }
        was_idle = is_idle;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::task::yield_now;
    use tokio::time::{Instant, advance};

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_when_it_has_had_no_call_for_a_while() {
        let begun = Instant::now();
        let of_service = Arc::new(());
        let (calls, open) = (Arc::clone(&of_service), Arc::clone(&of_service));
        let waits = tokio::spawn(async move { idle(&calls).await });
        advance(10 * MAX_IDLE).await;
        yield_now().await;
        assert!(!waits.is_finished());
        drop(open);
        waits.await.unwrap();
        assert!(begun.elapsed() >= 11 * MAX_IDLE, "one look is not enough");
        drop(of_service);
    }
}
