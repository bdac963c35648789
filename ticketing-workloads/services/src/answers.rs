//! Answers that say what went wrong.

use crate::http_client::{OF_ASKER, REFUSED, RETRIED};
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use resilience::server::BodyError;
use resilience::{Priority, priority};
use serde_json::json;
use std::time::Duration;

/// A failure, by a code for programs and a message for people.
pub fn problem(status: StatusCode, code: &str, message: &str) -> Response {
    (status, Json(json!({ "success": false, "errorCode": code, "message": message }))).into_response()
}

/// A failure that passes, and when to come back. Whatever is worth another attempt was tried here.
pub fn unavailable(code: &str, message: &str, retry_after: Duration) -> Response {
    let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, code, message);
    // Rounded up: a client that comes back a moment early only finds the circuit still open.
    let seconds = retry_after.as_millis().div_ceil(1_000).max(1);
    if let Ok(seconds) = HeaderValue::from_str(&seconds.to_string()) {
        response.headers_mut().insert(header::RETRY_AFTER, seconds);
    }
    response.headers_mut().insert(RETRIED, HeaderValue::from_static("true"));
    response
}

/// The same where nothing has failed: this service, well as it is, does not want the request now. Circuits in front of it
/// stay closed, or a rush of buyers would keep everybody out for as long as a circuit stays open.
pub fn refused(code: &str, message: &str, retry_after: Duration) -> Response {
    let mut response = unavailable(code, message, retry_after);
    response.headers_mut().insert(REFUSED, HeaderValue::from_static("true"));
    response
}

/// The same to a request that gave way to more important ones. Who only looks can wait the longest.
pub fn shed() -> Response {
    let retry_after = match priority::current() {
        Some(Priority::Look) => 5,
        Some(Priority::Start) => 2,
        Some(Priority::Finish) | None => 1,
    };
    let message = "Too much is under way at once: what finishes a purchase goes first. Please try again.";
    refused("GAVE_WAY", message, Duration::from_secs(retry_after))
}

/// The same to a caller who sends more than its share, whom 429 has slow down.
pub fn too_many(code: &str, message: &str, retry_after: Duration) -> Response {
    let mut response = refused(code, message, retry_after);
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    response
}

/// The same to one of many for whom a caller asks: it says nothing to the others, so the caller does not slow down.
pub fn too_many_of_asker(code: &str, message: &str, retry_after: Duration) -> Response {
    let mut response = too_many(code, message, retry_after);
    response.headers_mut().insert(REFUSED, HeaderValue::from_static(OF_ASKER));
    response
}

/// A body that could not be read.
pub fn body_unreadable(error: BodyError) -> Response {
    match error {
        BodyError::NoMemory => refused("TOO_MANY_REQUESTS_UNDER_WAY", &error.to_string(), Duration::from_secs(1)),
        error => problem(error.status(), "INVALID_REQUEST", &error.to_string()),
    }
}

/// For every path that there is not.
pub async fn not_found() -> Response {
    problem(StatusCode::NOT_FOUND, "NOT_FOUND", "there is nothing at this path")
}
