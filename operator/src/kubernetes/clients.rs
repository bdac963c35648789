//! Three clients: one that watches, one that acts, and one for the Lease alone.
//!
//! The acting client never retries by itself: a refused eviction is a 429 with `Retry-After`, and a retry that the
//! caller does not see would hold up everything behind it. Each of its calls has a deadline. The Lease has connections of
//! its own, so that nothing else can be in its way.

use super::observation::{Observation, ObservationLayer};
use crds::ResiliencePolicy;
use futures::StreamExt;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Api, Client, Config,
    api::{WatchEvent, WatchParams},
    client::{Body, ClientBuilder, ConfigExt},
    runtime::watcher,
};
use std::time::Duration;
use tower::{BoxError, Layer, ServiceBuilder, util::BoxCloneService};

/// Longest time of a call to the API server.
pub const API_DEADLINE: Duration = Duration::from_secs(10);

/// Longest time for a connection to the API server to come about.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// The clients.
#[derive(Clone)]
pub struct Clients {
    /// For lists and watches: it never times out while a watch is silent, but notices a dead connection.
    pub watch: Client,
    /// For everything else: no retries, and a deadline.
    pub act: Client,
    /// As `act`, for the Lease alone.
    pub lease: Client,
    /// When each watch was last heard.
    pub observation: Observation,
    /// Whether the API server streams initial lists.
    pub streams_lists: bool,
}

impl Clients {
    /// Clients as `config` says; nothing is connected yet.
    pub fn new(config: &Config) -> kube::Result<Self> {
        let observation = Observation::default();
        Ok(Self {
            watch: watching(config, &observation)?,
            act: acting(config)?,
            lease: acting(config)?,
            observation,
            streams_lists: false,
        })
    }

    /// Asks the API server whether it streams initial lists. Its version does not tell: it depends on its store, too. So a
    /// list of nothing is asked for in that way.
    pub async fn look_at_server(&mut self, namespace: Option<&str>) -> Result<(), ApiError> {
        let api: Api<ResiliencePolicy> = match namespace {
            Some(namespace) => Api::namespaced(self.act.clone(), namespace),
            None => Api::all(self.act.clone()),
        };
        let nothing = WatchParams {
            field_selector: Some("metadata.name=no-such-policy".to_owned()),
            timeout: Some(2),
            bookmarks: true,
            send_initial_events: true,
            ..WatchParams::default()
        };
        let first = async {
            let mut events = api.watch(&nothing, "0").await?.boxed();
            Ok(events.next().await)
        };
        self.streams_lists = match call(first).await {
            Ok(Some(Ok(WatchEvent::Bookmark(_)))) => true,
            // It knows the way and cannot go it, or it does not know it.
            Ok(_) => false,
            Err(error) if error.code() == Some(422) => false,
            Err(error) => return Err(error),
        };
        Ok(())
    }
}

/// A client for watches.
fn watching(config: &Config, observation: &Observation) -> kube::Result<Client> {
    let layer = ObservationLayer::new(observation.clone());
    if config.proxy_url.is_some() {
        return Ok(ClientBuilder::try_from(config.clone())?.with_layer(&layer).build());
    }
    Ok(Client::new(layer.layer(transport(config)?), config.default_namespace.clone()))
}

/// A client for everything else.
fn acting(config: &Config) -> kube::Result<Client> {
    if config.proxy_url.is_some() {
        let mut config = config.clone();
        config.default_retry = false;
        config.connect_timeout = Some(CONNECT_DEADLINE);
        config.read_timeout = Some(API_DEADLINE);
        config.write_timeout = Some(API_DEADLINE);
        return Client::try_from(config);
    }
    Ok(Client::new(transport(config)?, config.default_namespace.clone()))
}

/// Straight connections to the API server. Small writes leave at once: a request that waits until the last one was
/// acknowledged waits for up to 40 ms. TCP keep-alive ends a connection that died silently after 25 s.
fn transport(config: &Config) -> kube::Result<BoxCloneService<Request<Body>, Response<Incoming>, BoxError>> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_DEADLINE));
    connector.set_nodelay(true);
    connector.set_keepalive(Some(Duration::from_secs(10)));
    connector.set_keepalive_interval(Some(Duration::from_secs(5)));
    connector.set_keepalive_retries(Some(3));
    let connector = config.rustls_https_connector_with_connector(connector)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build::<_, Body>(connector));
    Ok(BoxCloneService::new(service))
}

/// Why a call to the API server failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// No answer in time.
    #[error("the API server did not answer within {} s", API_DEADLINE.as_secs())]
    Deadline,
    /// It answered with an error.
    #[error("{}", spelled(.0))]
    Kube(#[from] kube::Error),
}

impl ApiError {
    /// The server's status code, if it gave one.
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Kube(kube::Error::Api(status)) => Some(status.code),
            _ => None,
        }
    }

    /// The server refused or failed for now: it is worth asking again. 403 counts, because roles take a moment to sync
    /// when a cluster starts.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Kube(kube::Error::Api(status)) => matches!(status.code, 401 | 403 | 408 | 429 | 500..),
            Self::Deadline
            | Self::Kube(kube::Error::HyperError(_) | kube::Error::Service(_) | kube::Error::ReadEvents(_)) => true,
            Self::Kube(_) => false,
        }
    }

    /// A disruption budget refuses an eviction for now. The server's own limits on requests give the same code, and no cause.
    pub fn is_of_disruption_budget(&self) -> bool {
        let Self::Kube(kube::Error::Api(status)) = self else { return false };
        let mut causes = status.details.iter().flat_map(|details| &details.causes);
        status.code == 429 && causes.any(|cause| cause.reason == "DisruptionBudget")
    }

    /// Somebody else changed the object first.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }

    /// An object of that name is there.
    pub fn is_already_there(&self) -> bool {
        matches!(self, Self::Kube(kube::Error::Api(status)) if status.code == 409 && status.reason == "AlreadyExists")
    }

    /// There is no such object.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }
}

/// Puts a call under [`API_DEADLINE`].
pub async fn call<T>(future: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    match tokio::time::timeout(API_DEADLINE, future).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ApiError::Deadline),
    }
}

/// The server's own words, or why there are none.
pub fn spelled(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.message.is_empty() => format!("{} ({})", status.reason, status.code),
        kube::Error::Api(status) => status.message.clone(),
        other => root_cause(other),
    }
}

/// Why a watch failed, in the server's own words where it has any.
pub fn spelled_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(source) => format!("the list failed: {}", spelled(source)),
        watcher::Error::WatchStartFailed(source) => format!("the watch could not start: {}", spelled(source)),
        watcher::Error::WatchError(status) => format!("the server ended the watch: {}", status.message),
        watcher::Error::WatchFailed(source) => format!("the watch broke: {}", spelled(source)),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// The innermost cause, which says "connection refused" where the outer ones say "error sending request".
pub fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn answered(code: u16, details: &Value) -> ApiError {
        let status = json!({ "status": "Failure", "code": code, "reason": "TooManyRequests", "message": "m", "details": details });
        let status: kube::core::Status = serde_json::from_value(status).unwrap();
        kube::Error::Api(status.boxed()).into()
    }

    #[rstest::rstest]
    #[case::a_budget(429, json!({ "causes": [{ "reason": "DisruptionBudget", "message": "The disruption budget b needs 2 healthy pods" }] }), true)]
    #[case::priority_and_fairness(429, json!({ "retryAfterSeconds": 1 }), false)]
    #[case::nothing_said(429, Value::Null, false)]
    #[case::two_budgets(500, json!({ "causes": [{ "reason": "DisruptionBudget" }] }), false)]
    fn a_budget_is_told_from_a_busy_server(#[case] code: u16, #[case] details: Value, #[case] expected: bool) {
        assert_eq!(answered(code, &details).is_of_disruption_budget(), expected);
    }
}
