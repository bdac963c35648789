//! Events of payment providers, passed on to payment as it came: it verifies the signature over these very bytes.

use crate::answers::{body_unreadable, unavailable};
use crate::http_client::{self, HttpCall, HttpService};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::response::Response;
use axum::routing::post;
use resilience::server::read_body;
use resilience::{CallError, Dependency};
use std::time::Duration;

/// Largest event, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time to send one.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// When to send it again.
const RETRY_AFTER: Duration = Duration::from_secs(30);
/// What the signatures are in.
const SIGNED_BY: [&str; 6] = [
    "stripe-signature",
    "paypal-auth-algo",
    "paypal-cert-url",
    "paypal-transmission-id",
    "paypal-transmission-sig",
    "paypal-transmission-time",
];

/// For the events of `provider`, to payment at `base`.
pub fn router(base: &str, provider: &str, dependency: &'static Dependency) -> Router {
    let service = http_client::service(base, dependency);
    Router::new().route(&format!("/api/webhooks/{provider}"), post(pass_on)).with_state(service)
}

async fn pass_on(State(service): State<HttpService>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(body) => Bytes::from(body),
        Err(error) => return body_unreadable(error),
    };
    let mut headers = HeaderMap::new();
    let content_type = parts.headers.get(header::CONTENT_TYPE).cloned();
    headers.extend(content_type.map(|value| (header::CONTENT_TYPE, value)));
    for name in SIGNED_BY {
        if let Some(value) = parts.headers.get(name) {
            headers.insert(name, value.clone());
        }
    }
    let call = HttpCall { method: Method::POST, path: parts.uri.path().to_owned(), headers, body };
    match http_client::ask(&service, call).await {
        Ok(answer) => http_client::pass_on(answer),
        Err(CallError::Failed { source: http_client::HttpError::Status(answer), .. }) => http_client::pass_on(*answer),
        Err(error) => {
            tracing::warn!(%error, "an event of a provider could not be passed on; it sends it again");
            unavailable("WEBHOOK_UNAVAILABLE", "Events cannot be taken now", RETRY_AFTER)
        }
    }
}
