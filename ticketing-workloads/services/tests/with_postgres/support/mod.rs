//! What the tests of the services share.

pub mod app;
pub mod mails;
pub mod pgbouncer;
pub mod pooled;
pub mod postgres;
pub mod providers;
pub mod proxy;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Waits until `condition` gives something; fails with `what` after 30 s.
pub async fn eventually<T, F, Fut>(what: &str, condition: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    within(Duration::from_secs(30), what, condition).await
}

/// The same for what takes longer.
pub async fn within<T, F, Fut>(limit: Duration, what: &str, mut condition: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = condition().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", limit.as_secs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Nobody listens here. The port is none of those that the kernel gives to connections and listeners of other tests, so that it
/// can be listened on later.
pub async fn nobody() -> SocketAddr {
    loop {
        let port = rand::random_range(10_000..30_000);
        if let Ok(listener) = tokio::net::TcpListener::bind(("127.0.0.1", port)).await {
            return listener.local_addr().unwrap();
        }
    }
}
