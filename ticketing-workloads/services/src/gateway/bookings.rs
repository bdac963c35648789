//! Everything about bookings and reservations, passed on as it is.

use crate::answers::{problem, unavailable};
use crate::http_client::{self, HttpCall, HttpError, HttpService, IDEMPOTENCY_KEY};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use axum::routing::any;
use resilience::server::read_body;
use resilience::{CallError, Dependency, Rejection};
use std::time::Duration;

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// When to come back after a failure of which nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// The routes.
pub fn router(base: &str, dependency: &'static Dependency) -> Router {
    let service = http_client::service(base, dependency);
    let paths = ["/api/bookings", "/api/bookings/{*rest}", "/api/reservations", "/api/reservations/{*rest}"];
    paths.into_iter().fold(Router::new(), |router, path| router.route(path, any(pass_on))).with_state(service)
}

async fn pass_on(State(service): State<HttpService>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(body) => body.into(),
        Err(error) => return problem(error.status(), "INVALID_REQUEST", &error.to_string()),
    };
    // What a client of HTTP would tidy up could lead somewhere else.
    let lowered = parts.uri.path().to_ascii_lowercase();
    if lowered.contains("..") || lowered.contains("%2e") {
        return crate::answers::not_found().await;
    }
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let mut headers = HeaderMap::new();
    for name in [header::ACCEPT, header::CONTENT_TYPE, IDEMPOTENCY_KEY] {
        headers.extend(parts.headers.get_all(&name).iter().map(|value| (Some(name.clone()), value.clone())));
    }
    let changes = parts.method != Method::GET && parts.method != Method::HEAD;
    match http_client::ask(&service, HttpCall { method: parts.method, path, headers, body }).await {
        Ok(answer) => http_client::pass_on(answer),
        Err(error) => fail(error, changes),
    }
}

/// What booking itself said is passed on. Otherwise it depends on whether something may have happened.
fn fail(error: CallError<HttpError>, changes: bool) -> Response {
    tracing::warn!(%error, "booking gave no answer");
    let never_sent = error.never_reached();
    let wait = error.retry_after().unwrap_or(RETRY_AFTER);
    match error {
        CallError::Failed { source: HttpError::Status(answer), .. } => http_client::pass_on(*answer),
        CallError::Rejected { rejection: Rejection::BulkheadFull { .. } | Rejection::BulkheadWait { .. }, .. } => {
            let message = "More bookings are under way than this gateway takes at once. Please try again.";
            unavailable("TOO_MANY_REQUESTS_UNDER_WAY", message, Duration::from_secs(1))
        }
        _ if never_sent || !changes => {
            unavailable("BOOKING_UNAVAILABLE", "Booking is temporarily unavailable. Please try again later.", wait)
        }
        _ => problem(
            StatusCode::GATEWAY_TIMEOUT,
            "OUTCOME_UNKNOWN",
            "Nobody knows yet whether this was done. Send it again with the same Idempotency-Key to find out.",
        ),
    }
}
