//! Bodies of requests, bounded each and all together.

use axum::Json;
use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use serde_json::json;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Bytes of bodies that a process holds at once while they arrive; who has all of a body goes on under a bulkhead. With the buffers of
/// a connection, and what the allocator cannot use between them, each takes three times as much: with a thousand connections a
/// gateway stays below the 128 MiB that its chart gives it.
static PUBLIC: ByteBudget = ByteBudget::new(16 * 1024 * 1024);

/// So much of each body is held outside the budget: an order is smaller, and is taken however many large bodies arrive. As much
/// for all connections is 4 MiB.
const FREE_BYTES: usize = 4 * 1024;

/// A number of bytes that may be held at once.
#[derive(Debug)]
pub struct ByteBudget {
    left: AtomicUsize,
}

impl ByteBudget {
    /// This many bytes.
    pub const fn new(bytes: usize) -> Self {
        Self { left: AtomicUsize::new(bytes) }
    }

    /// A holder of none yet.
    pub fn hold(&self) -> HeldBytes<'_> {
        HeldBytes { budget: self, bytes: 0 }
    }
}

/// Bytes that are held until it is dropped.
#[derive(Debug)]
pub struct HeldBytes<'a> {
    budget: &'a ByteBudget,
    bytes: usize,
}

impl HeldBytes<'_> {
    /// Takes `bytes` more; `false`: there are not as many left, and none is taken.
    #[must_use]
    pub fn add(&mut self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        let taken = self.budget.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        self.bytes += if taken { bytes } else { 0 };
        taken
    }
}

impl Drop for HeldBytes<'_> {
    fn drop(&mut self) {
        self.budget.left.fetch_add(self.bytes, Ordering::Relaxed);
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
    /// Too many bodies arrive at once.
    #[error("too many requests with bodies arrive at once; send it again in a moment")]
    NoMemory,
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
            Self::NoMemory => StatusCode::SERVICE_UNAVAILABLE,
            Self::Broken => StatusCode::BAD_REQUEST,
        }
    }
}

impl IntoResponse for BodyError {
    fn into_response(self) -> Response {
        (self.status(), Json(json!({ "message": self.to_string() }))).into_response()
    }
}

/// Reads a body of at most `max_bytes` within `time`, by the budget of the public port: 16 MiB for the whole process, and for
/// each body 4 KiB that are not counted.
pub async fn read_body(body: Body, max_bytes: usize, time: Duration) -> Result<Vec<u8>, BodyError> {
    read_body_within(&PUBLIC, body, max_bytes, time).await
}

/// Reads a body of at most `max_bytes` within `time`, by this budget.
pub async fn read_body_within(
    budget: &ByteBudget,
    body: Body,
    max_bytes: usize,
    time: Duration,
) -> Result<Vec<u8>, BodyError> {
    tokio::time::timeout(time, collect(budget, body, max_bytes, FREE_BYTES))
        .await
        .unwrap_or(Err(BodyError::TooSlow(time)))
}

async fn collect(
    budget: &ByteBudget,
    mut body: Body,
    max_bytes: usize,
    free_bytes: usize,
) -> Result<Vec<u8>, BodyError> {
    let mut held = budget.hold();
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
        if data.len() > max_bytes - bytes.len() {
            return Err(BodyError::TooLarge(max_bytes));
        }
        let counted = |bytes: usize| bytes.saturating_sub(free_bytes);
        if !held.add(counted(bytes.len() + data.len()) - counted(bytes.len())) {
            return Err(BodyError::NoMemory);
        }
        if bytes.capacity() - bytes.len() < data.len() {
            // Doubled, it would hold up to twice of what is counted.
            bytes.reserve_exact(data.len().max(FREE_BYTES));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{FutureExt, StreamExt, stream};
    use proptest::prelude::*;

    const TIME: Duration = Duration::from_secs(10);

    fn arriving(sizes: &[usize]) -> Body {
        let chunks: Vec<_> = sizes.iter().map(|size| Ok::<_, std::io::Error>(vec![b'x'; *size])).collect();
        Body::from_stream(stream::iter(chunks))
    }

    /// A body of which this much arrives, and then nothing.
    fn stuck(size: usize) -> Body {
        Body::from_stream(stream::iter([Ok::<_, std::io::Error>(vec![b'x'; size])]).chain(stream::pending()))
    }

    #[tokio::test(start_paused = true)]
    async fn what_arrives_slowly_counts_until_it_is_there_or_given_up() {
        let budget = ByteBudget::new(100);
        let most = FREE_BYTES + 90;
        let mut slow = Box::pin(read_body_within(&budget, stuck(FREE_BYTES + 80), most, TIME));
        assert!(slow.as_mut().now_or_never().is_none());
        let read =
            async |sizes: &[usize]| read_body_within(&budget, arriving(sizes), most, TIME).await.map(|body| body.len());
        assert_eq!(read(&[FREE_BYTES, 10, 11]).await, Err(BodyError::NoMemory));
        assert_eq!(read(&[FREE_BYTES - 1, 11, 10]).await, Ok(FREE_BYTES + 20));
        assert_eq!(slow.await, Err(BodyError::TooSlow(TIME)));
        assert_eq!(read(&[most]).await, Ok(most));
        assert_eq!(read(&[most, 1]).await, Err(BodyError::TooLarge(most)));
        drop(Box::pin(read_body_within(&budget, stuck(most), most, TIME)).now_or_never());
        assert_eq!(read(&[most]).await, Ok(most), "all of it is there again");
    }

    /// With large bodies that never ended, one address kept all orders out.
    #[tokio::test(start_paused = true)]
    async fn small_bodies_are_taken_however_many_large_ones_arrive() {
        let budget = ByteBudget::new(100);
        let mut slow = Box::pin(read_body_within(&budget, stuck(FREE_BYTES + 100), 64 * 1024, TIME));
        assert!(slow.as_mut().now_or_never().is_none());
        let small = read_body_within(&budget, arriving(&[FREE_BYTES]), 64 * 1024, TIME).await;
        assert_eq!(small.map(|body| body.len()), Ok(FREE_BYTES));
        let large = read_body_within(&budget, arriving(&[FREE_BYTES + 1]), 64 * 1024, TIME).await;
        assert_eq!(large, Err(BodyError::NoMemory));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_the_bound_holds(parts in proptest::collection::vec((0usize..200, any::<bool>()), 0..40)) {
            let budget = ByteBudget::new(500);
            let mut holders = Vec::new();
            for (bytes, drop_one) in parts {
                let mut held = budget.hold();
                let before: usize = holders.iter().map(|held: &HeldBytes| held.bytes).sum();
                prop_assert_eq!(held.add(bytes), before + bytes <= 500);
                holders.push(held);
                if drop_one {
                    holders.remove(0);
                }
            }
            drop(holders);
            prop_assert_eq!(budget.left.load(Ordering::Relaxed), 500);
        }
    }
}
