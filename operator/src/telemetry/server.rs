//! `/livez`, `/readyz` and `/metrics`.
//!
//! `/livez` fails when a controller has work and has done none of it for a minute. Leadership and the API server have no part
//! in it: a restart would cure neither.

use super::metrics::Metrics;
use crate::kubernetes::filling::Filling;
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, time::Instant};
use tokio_util::sync::CancellationToken;

/// What the answers are made from.
#[derive(Clone, Default)]
pub struct Status {
    /// Every cache has been filled once. Leadership has no part in it: a standby is ready too.
    pub ready: Arc<AtomicBool>,
    /// Metrics.
    pub metrics: Metrics,
    progress: Arc<Mutex<Vec<(&'static str, StuckFor)>>>,
    fillings: Arc<Mutex<Vec<Filling>>>,
}

/// For how long a controller has had work and done none of it.
type StuckFor = Box<dyn Fn(Instant) -> Option<Duration> + Send>;

/// Time without progress after which a controller counts as stuck. A reconcile ends after 45 s at the latest.
const STUCK_AFTER: Duration = Duration::from_secs(60);

impl Status {
    /// Lets `/livez` depend on the progress of a controller.
    pub fn watch_progress(
        &self,
        controller: &'static str,
        stuck_for: impl Fn(Instant) -> Option<Duration> + Send + 'static,
    ) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).push((controller, Box::new(stuck_for)));
    }

    /// Lets `/readyz` say what keeps these caches from being filled.
    pub fn watch_filling(&self, filling: Filling) {
        self.fillings.lock().unwrap_or_else(PoisonError::into_inner).push(filling);
    }

    /// Why it is not ready.
    fn unready(&self) -> String {
        let fillings = self.fillings.lock().unwrap_or_else(PoisonError::into_inner);
        if fillings.is_empty() {
            return "waiting for the API server".to_owned();
        }
        let missing: Vec<_> = fillings.iter().flat_map(Filling::missing).collect();
        format!("the caches are still being filled: {}", missing.join(", "))
    }

    /// The controllers that are stuck.
    fn stuck(&self, now: Instant) -> Vec<String> {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let stuck = progress.iter().filter_map(|(controller, stuck_for)| {
            let time = stuck_for(now).filter(|time| *time > STUCK_AFTER)?;
            Some(format!("the {controller} controller has work and has done none of it for {} s", time.as_secs()))
        });
        stuck.collect()
    }
}

/// The kernel does not know the family of the address.
const EAFNOSUPPORT: i32 = 97;

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; choose another address with --listen")]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Listens. Where the kernel has no IPv6, `[::]` means every IPv4 address.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    match TcpListener::bind(address).await {
        Err(error) if error.raw_os_error() == Some(EAFNOSUPPORT) && address.ip() == Ipv6Addr::UNSPECIFIED => {
            TcpListener::bind(everywhere).await
        }
        bound => bound,
    }
}

/// Serves until `shutdown`.
pub async fn serve(address: SocketAddr, status: Status, shutdown: CancellationToken) -> Result<(), ListenError> {
    let failed = |source| ListenError { address, source };
    let listener = bind(address).await.map_err(failed)?;
    let app = Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(render))
        .with_state(status);
    axum::serve(listener, app).with_graceful_shutdown(shutdown.cancelled_owned()).await.map_err(failed)
}

async fn livez(State(status): State<Status>) -> Response {
    match status.stuck(Instant::now()).as_slice() {
        [] => "ok".into_response(),
        stuck => (StatusCode::SERVICE_UNAVAILABLE, stuck.join("; ")).into_response(),
    }
}

async fn readyz(State(status): State<Status>) -> Response {
    if status.ready.load(Ordering::Relaxed) {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, status.unready()).into_response()
    }
}

async fn render(State(status): State<Status>) -> Response {
    match status.metrics.render() {
        Ok(text) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::queue::Queue;

    #[tokio::test(start_paused = true)]
    async fn a_controller_that_does_not_do_its_work_is_named() {
        let (status, queue) = (Status::default(), Queue::<u32>::default());
        status.watch_progress("policy", {
            let queue = queue.clone();
            move |now| queue.stuck_for(now)
        });
        tokio::time::sleep(Duration::from_secs(600)).await;
        assert!(status.stuck(Instant::now()).is_empty(), "nothing to do");
        queue.enqueue(1);
        tokio::time::sleep(STUCK_AFTER).await;
        assert!(status.stuck(Instant::now()).is_empty());
        tokio::time::sleep(Duration::from_secs(1)).await;
        let stuck = status.stuck(Instant::now());
        assert_eq!(stuck, ["the policy controller has work and has done none of it for 61 s"]);
    }
}
