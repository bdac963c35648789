//! Listening, connections, and what is looked after beside them.

use super::{
    access::static_tokens::{InvalidTokens, MAX_FILE_BYTES, StaticTokens},
    service::Service,
};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{convert::Infallible, net::SocketAddr, path::Path, pin::pin, sync::Arc, time::Duration};
use tokio::{
    io::AsyncReadExt,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

/// Most connections.
const MAX_CONNECTIONS: usize = 1024;
/// Longest time for the head of a request to arrive; and for a connection without a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// Largest head of a request, in bytes.
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// A connection takes no more requests after this time: so clients spread over replicas, and one that does not read ends.
const MAX_AGE: Duration = Duration::from_secs(300);
/// Longest time for the last answer of a connection.
const GRACE: Duration = Duration::from_secs(10);
/// Wait after a connection that could not be taken: files may have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often the file with the tokens is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

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

/// Serves until `shutdown`.
pub async fn serve(listener: TcpListener, service: Arc<Service>, shutdown: CancellationToken) {
    let (connections, places) = (TaskTracker::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
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
        let (service, shutdown) = (Arc::clone(&service), shutdown.clone());
        connections.spawn(async move {
            connection(stream, from, service, shutdown).await;
            drop(place);
        });
    }
    connections.close();
    let _ = timeout(GRACE, connections.wait()).await;
}

async fn connection(stream: TcpStream, from: SocketAddr, service: Arc<Service>, shutdown: CancellationToken) {
    let _ = stream.set_nodelay(true);
    let answer = hyper::service::service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { Ok::<_, Infallible>(service.answer(request, from.ip()).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), answer);
    let mut connection = pin!(connection);
    tokio::select! {
        // The client is gone, or spoke something else.
        _ = connection.as_mut() => return,
        () = shutdown.cancelled() => {}
        () = sleep(MAX_AGE) => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = timeout(GRACE, connection).await;
}

/// Keeps the static tokens as their file has them, and gives up flags that nobody asks for; until `shutdown`.
pub async fn look_after(service: Arc<Service>, tokens: Option<std::path::PathBuf>, shutdown: CancellationToken) {
    let mut last = None;
    loop {
        if let Some(path) = &tokens {
            let read = read(path).await;
            if last.as_ref() != Some(&read) {
                take_in(&service, path, &read);
                last = Some(read);
            }
        }
        if shutdown.run_until_cancelled(sleep(LOOK_EVERY)).await.is_none() {
            return;
        }
        service.scopes.sweep(tokio::time::Instant::now());
    }
}

/// What a file holds, or why it cannot be read.
type FileContent = Result<Vec<u8>, String>;

/// Reads a file, but no more than one byte more than is allowed.
async fn read(path: &Path) -> FileContent {
    let mut content = Vec::new();
    let read = async {
        let file = tokio::fs::File::open(path).await?;
        file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut content).await
    };
    read.await.map_err(|error: std::io::Error| error.to_string())?;
    Ok(content)
}

/// A file that cannot be used changes nothing: the tokens of the last good one stay.
fn take_in(service: &Service, path: &Path, read: &FileContent) {
    let parsed = match read {
        Ok(content) => StaticTokens::parse(content).map_err(|error: InvalidTokens| error.to_string()),
        Err(error) => Err(error.clone()),
    };
    match parsed {
        Ok(tokens) => {
            info!(file = %path.display(), tokens = tokens.len(), "OFREP: static tokens read");
            service.access.set_static_tokens(tokens);
        }
        Err(error) => {
            warn!(file = %path.display(), %error, "OFREP: the static tokens cannot be read; those that were read before stay");
        }
    }
}
