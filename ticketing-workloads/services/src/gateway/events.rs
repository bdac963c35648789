//! `GET /api/events`: from the catalog, else from memory, else an answer that says so.

use crate::answers::{problem, unavailable};
use crate::events_query::EventsQuery;
use crate::http_client::{self, HttpAnswer, HttpCall, HttpError};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use resilience::control::spare_memory::SpareMemory;
use resilience::fallback::{Answer, Fallbacks, Source};
use resilience::{CallError, Dependency};
use std::time::Duration;
use tower::util::BoxCloneSyncService;
use tower::{Layer, ServiceExt};

/// Says that the answer is not the catalog's own: `cache` or `static`.
const SERVED_FROM: HeaderName = HeaderName::from_static("x-served-from");
/// Bytes of answers that are kept.
const CACHE_BYTES: usize = 16 * 1024 * 1024;
/// Age, in seconds, up to which an answer is kept: that of an inventory that is not in real time.
const OLDEST_KEPT: u64 = 60;
/// When to come back after a failure of which nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(5);

type Events = BoxCloneSyncService<HttpCall, Answer<HttpAnswer>, CallError<HttpError>>;

pub fn router(base: &str, dependency: &'static Dependency, spare_memory: &SpareMemory) -> Router {
    let weight = |answer: &HttpAnswer| {
        // A page that the catalog itself remembers is as old there as it may be.
        let age = answer.headers.get(header::AGE).and_then(|age| age.to_str().ok()?.parse().ok()).unwrap_or(0_u64);
        (answer.status == StatusCode::OK && age <= OLDEST_KEPT).then(|| answer.body.len())
    };
    let fallbacks = Fallbacks::new(dependency)
        .cache(CACHE_BYTES, |call: &HttpCall| Some(call.path.clone()), weight)
        .fixed(|status, body| {
            let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))]);
            let status = StatusCode::from_u16(status).ok()?;
            Some(HttpAnswer { status, headers, body: Bytes::from(body.to_owned()), from_ejected: false })
        });
    let fallbacks = fallbacks.layer();
    let events: Events = BoxCloneSyncService::new(fallbacks.layer(http_client::service(base, dependency)));
    spare_memory.add(move || fallbacks.forget_answers());
    Router::new().route("/api/events", get(list)).with_state(events)
}

async fn list(State(events): State<Events>, RawQuery(query): RawQuery) -> Response {
    let query = match EventsQuery::read(query.as_deref()) {
        Ok(query) => query,
        Err(error) => return problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", &error.to_string()),
    };
    // In one spelling, so that what means the same is remembered once.
    match events.oneshot(HttpCall::get(format!("/api/events?{}", query.to_query()))).await {
        Ok(answer) => respond(answer),
        Err(error) => {
            let wait = error.retry_after().unwrap_or(RETRY_AFTER);
            unavailable(
                "CATALOG_UNAVAILABLE",
                "Event catalog is temporarily unavailable. Please try again later.",
                wait,
            )
        }
    }
}

fn respond(Answer { value, source }: Answer<HttpAnswer>) -> Response {
    let mut response = http_client::pass_on(value);
    let headers = response.headers_mut();
    match source {
        Source::Cache { age, .. } => {
            headers.insert(SERVED_FROM, HeaderValue::from_static("cache"));
            headers.insert(header::AGE, HeaderValue::from(age.as_secs()));
        }
        Source::Static => {
            headers.insert(SERVED_FROM, HeaderValue::from_static("static"));
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER.as_secs()));
        }
        _ => {}
    }
    response.into_response()
}
