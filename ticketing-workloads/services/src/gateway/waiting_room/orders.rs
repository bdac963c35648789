//! What is measured of orders that are passed on to booking: how many there are now, and what came of them.

use crate::http_client::error_code;
use crate::waiting_room::Orders;
use axum::body::Body;
use axum::http::StatusCode;
use axum::response::Response;
use http_body_util::BodyExt;
use std::sync::atomic::{AtomicU32, Ordering};

/// Codes of answers that say: too much at once.
const REFUSALS: [&str; 3] = ["TOO_MANY_BOOKINGS", "TOO_MANY_REQUESTS_UNDER_WAY", "GAVE_WAY"];
/// Codes of a 503 that is no sign of trouble.
const ANSWERS: [&str; 1] = ["PAYMENTS_NOT_SET_UP"];

/// What came of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Booking dealt with it.
    Completed,
    /// There was no room for it.
    Refused,
    Failed,
}

#[derive(Default)]
pub struct Measured {
    under_way: AtomicU32,
    completed: AtomicU32,
    refused: AtomicU32,
    failed: AtomicU32,
}

/// An order under way; ends when dropped.
pub struct UnderWay<'a>(&'a Measured);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Measured {
    pub fn begin(&self) -> UnderWay<'_> {
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay(self)
    }

    pub fn count(&self, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Completed => &self.completed,
            Outcome::Refused => &self.refused,
            Outcome::Failed => &self.failed,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Orders under way in percent of `places`.
    pub fn load_percent(&self, places: u32) -> u32 {
        let percent = u64::from(self.under_way.load(Ordering::Relaxed)) * 100 / u64::from(places.max(1));
        u32::try_from(percent).unwrap_or(u32::MAX)
    }

    /// What came of orders since this was asked last.
    pub fn take(&self) -> Orders {
        let taken = |counter: &AtomicU32| counter.swap(0, Ordering::Relaxed);
        Orders { completed: taken(&self.completed), refused: taken(&self.refused), failed: taken(&self.failed) }
    }
}

/// What the answer to an order says of booking; its body is read where the status is not enough. A 429 is about its buyer alone.
pub async fn outcome(response: Response) -> (Outcome, Response) {
    let status = response.status();
    if status != StatusCode::SERVICE_UNAVAILABLE {
        let outcome = if status.is_server_error() { Outcome::Failed } else { Outcome::Completed };
        return (outcome, response);
    }
    let (parts, body) = response.into_parts();
    // It is in memory already.
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let code = error_code(&body).unwrap_or_default();
    let outcome = match code.as_str() {
        code if REFUSALS.contains(&code) => Outcome::Refused,
        code if ANSWERS.contains(&code) => Outcome::Completed,
        _ => Outcome::Failed,
    };
    (outcome, Response::from_parts(parts, Body::from(body)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::{problem, refused, shed, too_many, unavailable};
    use axum::response::IntoResponse;
    use std::time::Duration;

    #[tokio::test]
    async fn an_answer_says_whether_booking_copes() {
        let second = Duration::from_secs(1);
        let cases = [
            (StatusCode::CREATED.into_response(), Outcome::Completed),
            (problem(StatusCode::CONFLICT, "INSUFFICIENT_TICKETS", ""), Outcome::Completed),
            (too_many("TOO_MANY_SEATS", "of this buyer", second), Outcome::Completed),
            (refused("PAYMENTS_NOT_SET_UP", "", second), Outcome::Completed),
            (refused("TOO_MANY_BOOKINGS", "", second), Outcome::Refused),
            (refused("TOO_MANY_REQUESTS_UNDER_WAY", "", second), Outcome::Refused),
            (shed(), Outcome::Refused),
            (unavailable("BOOKING_FAILED", "", second), Outcome::Failed),
            (problem(StatusCode::GATEWAY_TIMEOUT, "OUTCOME_UNKNOWN", ""), Outcome::Failed),
            (StatusCode::SERVICE_UNAVAILABLE.into_response(), Outcome::Failed),
        ];
        for (response, expected) in cases {
            let (status, retry_after) = (response.status(), response.headers().get("retry-after").cloned());
            let (outcome, response) = outcome(response).await;
            assert_eq!(outcome, expected, "{status}");
            assert_eq!((response.status(), response.headers().get("retry-after").cloned()), (status, retry_after));
        }
        let (_, response) = outcome(refused("TOO_MANY_BOOKINGS", "full", second)).await;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(error_code(&body).as_deref(), Some("TOO_MANY_BOOKINGS"), "it is passed on");
    }

    #[test]
    fn what_is_under_way_is_the_load_and_what_is_over_is_told_once() {
        let measured = Measured::default();
        let first = measured.begin();
        let _second = measured.begin();
        assert_eq!((measured.load_percent(4), measured.load_percent(0)), (50, 200));
        drop(first);
        assert_eq!(measured.load_percent(4), 25);
        measured.count(Outcome::Refused);
        measured.count(Outcome::Completed);
        measured.count(Outcome::Completed);
        assert_eq!(measured.take(), Orders { completed: 2, refused: 1, failed: 0 });
        assert_eq!(measured.take(), Orders::default());
    }
}
