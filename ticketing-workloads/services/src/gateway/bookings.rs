//! Everything about bookings, reservations and tickets, passed on as it is.

use super::buyers::{FirstOrder, NewKey};
use super::holding_back::Traffic;
use crate::answers::{body_unreadable, refused, shed, unavailable};
use crate::buyer::{BUYER, BUYER_NETWORK, BUYER_SESSION};
use crate::http_client::{self, HttpCall, HttpError, HttpService, IDEMPOTENCY_KEY, error_code};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Json, Router};
use resilience::server::read_body;
use resilience::{CallError, Dependency, Rejection, priority};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Largest body of a request, in bytes.
pub(super) const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time to send a body.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// When to come back after a failure of which nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Booking, and a note of what is asked of it.
#[derive(Clone)]
struct Booking {
    service: HttpService,
    traffic: Arc<Traffic>,
}

pub fn router(base: &str, dependency: &'static Dependency, traffic: Arc<Traffic>) -> Router {
    let booking = Booking { service: http_client::service(base, dependency), traffic };
    let paths = [
        "/api/bookings",
        "/api/bookings/{*rest}",
        "/api/reservations",
        "/api/reservations/{*rest}",
        "/api/tickets/{code}",
    ];
    paths.into_iter().fold(Router::new(), |router, path| router.route(path, any(pass_on))).with_state(booking)
}

async fn pass_on(State(booking): State<Booking>, request: Request) -> Response {
    booking.traffic.see();
    let (parts, body) = request.into_parts();
    let body = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(body) => axum::body::Bytes::from(body),
        Err(error) => return body_unreadable(error),
    };
    // What a client of HTTP would tidy up could lead somewhere else.
    let lowered = parts.uri.path().to_ascii_lowercase();
    if lowered.contains("..") || lowered.contains("%2e") {
        return crate::answers::not_found().await;
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let mut headers = HeaderMap::new();
    for name in [header::ACCEPT, header::CONTENT_TYPE, IDEMPOTENCY_KEY, BUYER, BUYER_SESSION, BUYER_NETWORK] {
        headers.extend(parts.headers.get_all(&name).iter().map(|value| (Some(name.clone()), value.clone())));
    }
    let changes = parts.method != Method::GET && parts.method != Method::HEAD;
    let mut key = headers.get(IDEMPOTENCY_KEY).cloned();
    let makes_one = ["/api/bookings", "/api/reservations"].contains(&parts.uri.path());
    if parts.method == Method::POST && makes_one && key.is_none() && needs_a_key(&body) {
        let new = parts.extensions.get().map_or_else(Uuid::new_v4, |NewKey(key)| *key);
        key = HeaderValue::from_str(&new.to_string()).ok();
        headers.extend(key.clone().map(|key| (IDEMPOTENCY_KEY, key)));
    }
    // Sent again without the cookie that came with the answer, it is the same buyer's.
    let mut cookie = None;
    if key.is_none()
        && let Some(first) = parts.extensions.get::<FirstOrder>()
        && let Some((buyer, own)) = key_in(&body).and_then(|key| first.by(&key))
    {
        headers.insert(BUYER, buyer);
        cookie = Some(own);
    }
    let mut response =
        match http_client::ask(&booking.service, HttpCall { method: parts.method, path, headers, body }).await {
            Ok(answer) => http_client::pass_on(answer),
            Err(error) => fail(error, changes, key.as_ref()),
        };
    booking.traffic.see_answer(priority::current().unwrap_or_default(), response.status());
    response.headers_mut().extend(key.map(|key| (IDEMPOTENCY_KEY, key)));
    response.headers_mut().extend(cookie.map(|cookie| (header::SET_COOKIE, cookie)));
    response
}

/// The key that an order has in its body.
fn key_in(body: &[u8]) -> Option<String> {
    let order: serde_json::Value = serde_json::from_slice(body).ok()?;
    Some(order["idempotencyKey"].as_str()?.to_owned())
}

/// Whether it is an order without a key: then it gets one here, so that its sender can ask for the outcome.
pub(super) fn needs_a_key(body: &[u8]) -> bool {
    let order: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    order.is_object() && order["idempotencyKey"].is_null()
}

/// What booking itself said is passed on. Otherwise it depends on whether something may have happened.
fn fail(error: CallError<HttpError>, changes: bool, key: Option<&HeaderValue>) -> Response {
    tracing::warn!(%error, "booking did not answer");
    let never_sent = error.never_reached();
    let wait = error.retry_after().unwrap_or(RETRY_AFTER);
    match error {
        // Booking was cut off in the middle, and could not say more than that.
        CallError::Failed { source: HttpError::Status(answer), .. }
            if !(changes
                && answer.status == StatusCode::GATEWAY_TIMEOUT
                && error_code(&answer.body).as_deref() == Some("TIMEOUT")) =>
        {
            http_client::pass_on(*answer)
        }
        CallError::Rejected { rejection: Rejection::Shed { .. }, .. } if never_sent => shed(),
        CallError::Rejected { rejection, .. } if never_sent && rejection.is_full_bulkhead() => {
            let message = "Too many bookings at once. Please try again.";
            refused("TOO_MANY_REQUESTS_UNDER_WAY", message, Duration::from_secs(1))
        }
        _ if never_sent || !changes => {
            unavailable("BOOKING_UNAVAILABLE", "Booking is temporarily unavailable. Please try again later.", wait)
        }
        _ => {
            let key = key.and_then(|key| key.to_str().ok());
            let again = if key.is_some() { " with the same Idempotency-Key" } else { "" };
            let message = format!("The outcome is unknown. Send the request again{again} to find out.");
            let answer = json!({
                "success": false, "errorCode": "OUTCOME_UNKNOWN", "message": message, "idempotencyKey": key,
            });
            (StatusCode::GATEWAY_TIMEOUT, Json(answer)).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn a_gateway_that_is_full_says_so_and_when_to_come_back() {
        for (rejection, code) in [
            (Rejection::BulkheadFull { in_use: 50, queued: 100 }, "TOO_MANY_REQUESTS_UNDER_WAY"),
            (Rejection::BulkheadWait { waited: Duration::from_secs(1) }, "TOO_MANY_REQUESTS_UNDER_WAY"),
            (Rejection::Shed { waited: Duration::from_secs(1) }, "GAVE_WAY"),
        ] {
            let error = CallError::Rejected { dependency: "booking".into(), rejection, attempts: 0 };
            let answer = fail(error, true, None);
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert_eq!(answer.headers()["retry-after"], "1");
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(error_code(&body).as_deref(), Some(code));
        }
    }
}
