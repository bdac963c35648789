//! The HTTP interface of the catalog.

use super::events::{self, Page, Query};
use crate::answers::{problem, unavailable};
use crate::database::{Database, DatabaseError};
use crate::events_query::EventsQuery;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use contract::CircuitState;
use resilience::fallback::Cache;
use resilience::fallback::{Answer, Fallbacks, Source};
use resilience::{Attempt, Repeatable};
use resilience::{Attribute, CallError, Context, Dependency, Resilience};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tower::util::BoxCloneSyncService;
use tower::{Layer, ServiceExt, service_fn};

/// Flag that turns real-time inventory off (ADR-007 §5).
const REAL_TIME: &str = "EnableRealTimeInventory";
/// Bytes of pages that are kept, for each of the two reasons to keep one.
const CACHE_BYTES: usize = 8 * 1024 * 1024;
/// When to come back after a failure of which nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(5);

impl Repeatable for Query {
    fn may_repeat(&self, _: &contract::RetrySettings) -> bool {
        true
    }
}

impl From<EventsQuery> for Query {
    fn from(EventsQuery { category, page, page_size }: EventsQuery) -> Self {
        Self { category, page, page_size }
    }
}

type Pages = BoxCloneSyncService<Query, Answer<Page>, CallError<DatabaseError>>;

/// What the handlers work on.
pub struct Catalog {
    resilience: Arc<Resilience>,
    pages: Pages,
    /// Pages for while real-time inventory is off.
    recent: Arc<Cache<Page>>,
    recent_for: Duration,
}

impl Catalog {
    /// Handlers over `database`, called through `dependency`.
    pub fn new(
        resilience: Arc<Resilience>,
        database: Arc<Database>,
        dependency: &'static Dependency,
        recent_for: Duration,
    ) -> Arc<Self> {
        let read = service_fn(move |attempt: Attempt<Query>| {
            let database = Arc::clone(&database);
            async move { database.attempt(|connection| events::list(connection, attempt.request.clone())).await }
        });
        let weight = |page: &Page| Some(page.weight());
        let fallbacks = Fallbacks::new(dependency).cache(CACHE_BYTES, |query: &Query| Some(key(query)), weight);
        let fallbacks = fallbacks.layer();
        let pages = BoxCloneSyncService::new(fallbacks.layer(dependency.layer().layer(read)));
        let recent = Arc::new(Cache::new(CACHE_BYTES, weight));
        resilience.spare_memory().add({
            let recent = Arc::clone(&recent);
            move || {
                // In an outage they are all that there is to answer with.
                let closed = dependency.circuit().state == CircuitState::Closed;
                if closed { fallbacks.forget_answers() + recent.clear() } else { 0 }
            }
        });
        Arc::new(Self { resilience, pages, recent, recent_for })
    }

    /// A page, and how old it is if it is not of this moment.
    async fn page(&self, query: Query) -> Result<(Page, Option<Duration>), CallError<DatabaseError>> {
        let key = key(&query);
        let category = query.category.as_deref().map(|category| ("category", Attribute::Text(category)));
        let real_time = self.resilience.flags().bool_for(REAL_TIME, true, &Context::new(category.as_slice()));
        if !real_time
            && let Some((page, age)) = self.recent.find(&key)
            && age < self.recent_for
        {
            return Ok((page, Some(age)));
        }
        let Answer { value, source } = self.pages.clone().oneshot(query).await?;
        let age = if let Source::Cache { age, .. } = source { Some(age) } else { None };
        if age.is_none() {
            self.recent.keep(key, &value);
        }
        Ok((value, age))
    }
}

fn key(Query { category, page, page_size }: &Query) -> String {
    format!("{}_{page}_{page_size}", category.as_deref().unwrap_or_default())
}

pub fn router(catalog: Arc<Catalog>) -> Router {
    Router::new().route("/api/events", get(list)).fallback(crate::answers::not_found).with_state(catalog)
}

async fn list(State(catalog): State<Arc<Catalog>>, RawQuery(query): RawQuery) -> Response {
    let query = match EventsQuery::read(query.as_deref()) {
        Ok(query) => query,
        Err(error) => return problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", &error.to_string()),
    };
    let (page, page_size) = (query.page, query.page_size);
    match catalog.page(query.into()).await {
        Ok((found, age)) => {
            let mut answer = json!({
                "events": found.events,
                "page": page,
                "pageSize": page_size,
                "total": found.total,
                "isFromCache": age.is_some(),
            });
            if let Some(age) = age {
                answer["ageSeconds"] = json!(age.as_secs());
            }
            let mut response = Json(answer).into_response();
            response.headers_mut().extend(age.map(|age| (header::AGE, HeaderValue::from(age.as_secs()))));
            response
        }
        Err(error) => {
            tracing::warn!(%error, "failed to read events");
            let wait = error.retry_after().unwrap_or(RETRY_AFTER);
            unavailable("CATALOG_UNAVAILABLE", "Unable to read the events at this time", wait)
        }
    }
}
