//! How long the caller still waits for the answer to what is being done.
//!
//! A service takes the time that its caller has left from a header, keeps it beside the request while it works on it,
//! and sends what is left of it with each call that it makes. So no service works on an answer that no caller waits for, and
//! each tier gives up before the one above it. The header holds a time span, not a moment: clocks differ.

use http::{HeaderMap, HeaderName, HeaderValue};
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// Whole milliseconds that the caller will still wait.
pub const HEADER: HeaderName = HeaderName::from_static("x-deadline-ms");

/// Longest time that is believed; more than any policy allows.
const LONGEST: Duration = Duration::from_secs(24 * 3_600);

tokio::task_local! {
    static CURRENT: Instant;
}

/// The deadline of what this task is doing, if there is one.
pub fn current() -> Option<Instant> {
    CURRENT.try_with(|deadline| *deadline).ok()
}

/// Does `work` for a caller that waits until `deadline`, or until an earlier one that holds already.
pub async fn within<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> T {
    match [deadline, current()].into_iter().flatten().min() {
        Some(deadline) => CURRENT.scope(deadline, work).await,
        None => work.await,
    }
}

/// Does one step under `deadline`.
#[inline]
pub(crate) fn during<T>(deadline: Instant, step: impl FnOnce() -> T) -> T {
    CURRENT.sync_scope(deadline, step)
}

/// The deadline that a request came with. A header that is no number of milliseconds says nothing.
pub fn of_request(headers: &HeaderMap) -> Option<Instant> {
    let ms: u64 = headers.get(HEADER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Instant::now() + Duration::from_millis(ms).min(LONGEST))
}

/// The header for a request whose caller waits until `deadline`.
pub fn to_header(deadline: Instant) -> HeaderValue {
    HeaderValue::from(crate::clock::millis(deadline.saturating_duration_since(Instant::now())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(HEADER, HeaderValue::from_str(value).unwrap())])
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_left_goes_on() {
        let given = of_request(&headers("1500")).unwrap();
        within(Some(given), async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            assert_eq!(to_header(current().unwrap()), "1100");
            within(Some(given + Duration::from_secs(9)), async {
                assert_eq!(current(), Some(given), "who is called has no more time than the caller");
            })
            .await;
            within(None, async { assert_eq!(current(), Some(given)) }).await;
            tokio::time::sleep(Duration::from_secs(9)).await;
            assert_eq!(to_header(current().unwrap()), "0");
        })
        .await;
        assert_eq!(current(), None);
    }

    #[rstest::rstest]
    #[case("")]
    #[case("soon")]
    #[case("-1")]
    #[case("1.5")]
    #[case("99999999999999999999999")]
    fn what_is_no_number_says_nothing(#[case] value: &str) {
        assert_eq!(of_request(&headers(value)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_huge_number_does_not_overflow() {
        assert_eq!(of_request(&headers("18446744073709551615")), Some(Instant::now() + LONGEST));
    }
}
