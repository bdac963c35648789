//! Waiting for something to become true, never for time to pass.

use std::time::{Duration, Instant};

/// Longest wait for anything.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Asks again and again until the answer is `Ok`; fails with the last answer after [`TIMEOUT`].
pub async fn eventually<T, Fut>(what: &str, probe: impl FnMut() -> Fut) -> T
where
    Fut: Future<Output = Result<T, String>>,
{
    within(TIMEOUT, what, probe).await
}

/// As [`eventually`], with another timeout.
pub async fn within<T, Fut>(timeout: Duration, what: &str, mut probe: impl FnMut() -> Fut) -> T
where
    Fut: Future<Output = Result<T, String>>,
{
    let begin = Instant::now();
    loop {
        match probe().await {
            Ok(value) => return value,
            Err(last) if begin.elapsed() > timeout => {
                panic!("after {timeout:?} still not: {what}; last seen: {last}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(40)).await,
        }
    }
}
