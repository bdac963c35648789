//! Calls to the admin port of a pod.
//!
//! A pod may be slow, broken or hostile: every call has a deadline, every answer a size limit, and whatever comes back
//! is read as the contract's types or not at all.

use crate::{args::PodTransport, kubernetes::clients::Clients};
use contract::{ActionAnswer, ActionRequest, HealthReport, MAX_REPORT_BYTES, PushAnswer, admin};
use http_body_util::{BodyExt, Limited};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// Longest time of a call to a pod.
pub const POD_DEADLINE: Duration = Duration::from_secs(2);
/// Longest time of an action in a pod.
const ACTION_DEADLINE: Duration = Duration::from_secs(5);

/// Where a pod's admin port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Its address.
    pub ip: String,
    /// Its port.
    pub port: u16,
}

impl Endpoint {
    /// The admin port of a pod that has an address.
    pub fn admin(pod: &Pod) -> Option<Self> {
        Self::named(pod, admin::PORT_NAME, admin::DEFAULT_PORT)
    }

    /// The port that serves the public, where the health report is to be had without a token.
    pub fn public(pod: &Pod) -> Option<Self> {
        Self::named(pod, "http", 8080)
    }

    fn named(pod: &Pod, name: &str, otherwise: u16) -> Option<Self> {
        let ip = pod.status.as_ref()?.pod_ip.clone().filter(|ip| !ip.is_empty())?;
        let ports = pod
            .spec
            .iter()
            .flat_map(|spec| &spec.containers)
            .filter_map(|container| container.ports.as_ref())
            .flatten();
        let port = ports
            .filter(|port| port.name.as_deref() == Some(name))
            .find_map(|port| u16::try_from(port.container_port).ok())
            .unwrap_or(otherwise);
        Some(Self { namespace: pod.metadata.namespace.clone()?, pod: pod.metadata.name.clone()?, ip, port })
    }
}

/// Why a call to a pod failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PodError {
    /// No answer in time.
    #[error("no answer from its admin port within {} s", .0.as_secs())]
    Deadline(Duration),
    /// No connection, or it broke.
    #[error("its admin port cannot be reached: {0}")]
    Unreachable(String),
    /// The pod does not take the token, most likely because it has not mounted it yet.
    #[error("it does not take the operator's token (it may not have mounted it yet)")]
    Unauthorized,
    /// Another HTTP error.
    #[error("its admin port answered with HTTP {0}")]
    Status(u16),
    /// Not an answer of the contract.
    #[error("invalid response: {0}")]
    InvalidResponse(String),
}

impl PodError {
    /// Label for metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Deadline(_) | Self::Unreachable(_) => "unreachable",
            Self::Unauthorized | Self::Status(_) => "refused",
            Self::InvalidResponse(_) => "invalid",
        }
    }
}

/// Calls pods.
#[derive(Clone)]
pub enum PodClient {
    /// Straight at their address.
    Direct(reqwest::Client),
    /// Through the API server.
    Proxy(Client),
}

impl PodClient {
    /// As the command line says.
    pub fn new(transport: PodTransport, clients: &Clients) -> Result<Self, reqwest::Error> {
        Ok(match transport {
            PodTransport::ApiserverProxy => Self::Proxy(clients.act.clone()),
            PodTransport::Direct => Self::Direct(
                reqwest::Client::builder()
                    // Pods are reached by address; a proxy of the environment or a redirect would lead the token astray.
                    .no_proxy()
                    .redirect(reqwest::redirect::Policy::none())
                    .connect_timeout(Duration::from_secs(1))
                    .pool_idle_timeout(Duration::from_secs(30))
                    .pool_max_idle_per_host(1)
                    .build()?,
            ),
        })
    }

    /// Pushes a document.
    pub async fn push(&self, endpoint: &Endpoint, token: &str, document: Vec<u8>) -> Result<PushAnswer, PodError> {
        // A refusal (409, 422) carries an answer too.
        self.call(endpoint, "PUT", admin::CONFIG_PATH, token, document, POD_DEADLINE, &[409, 422]).await
    }

    /// Asks for the health report.
    pub async fn health(&self, endpoint: &Endpoint, token: &str) -> Result<HealthReport, PodError> {
        // A pod that is unhealthy may say so with 503.
        self.call(endpoint, "GET", admin::HEALTH_PATH, token, Vec::new(), POD_DEADLINE, &[503]).await
    }

    /// Asks for an action.
    pub async fn act(
        &self,
        endpoint: &Endpoint,
        token: &str,
        request: &ActionRequest,
    ) -> Result<ActionAnswer, PodError> {
        let body = serde_json::to_vec(request).map_err(|error| PodError::InvalidResponse(error.to_string()))?;
        self.call(endpoint, "POST", admin::ACTIONS_PATH, token, body, ACTION_DEADLINE, &[409, 422, 500, 501]).await
    }

    #[expect(clippy::too_many_arguments, reason = "one private function behind three public ones")]
    async fn call<T: DeserializeOwned>(
        &self,
        endpoint: &Endpoint,
        method: &str,
        path: &str,
        token: &str,
        body: Vec<u8>,
        deadline: Duration,
        also_answers: &[u16],
    ) -> Result<T, PodError> {
        let exchange = async {
            match self {
                Self::Direct(client) => direct(client, endpoint, method, path, token, body).await,
                Self::Proxy(client) => proxied(client, endpoint, method, path, token, body).await,
            }
        };
        let (status, answer) =
            tokio::time::timeout(deadline, exchange).await.map_err(|_| PodError::Deadline(deadline))??;
        match status {
            401 => Err(PodError::Unauthorized),
            200..=299 => serde_json::from_slice(&answer).map_err(|error| PodError::InvalidResponse(error.to_string())),
            other if also_answers.contains(&other) => {
                serde_json::from_slice(&answer).map_err(|_| PodError::Status(other))
            }
            other => Err(PodError::Status(other)),
        }
    }
}

type Answer = Result<(u16, Vec<u8>), PodError>;

async fn direct(
    client: &reqwest::Client,
    to: &Endpoint,
    method: &str,
    path: &str,
    token: &str,
    body: Vec<u8>,
) -> Answer {
    let unreachable = |error: reqwest::Error| PodError::Unreachable(root_cause(&error));
    let host = if to.ip.contains(':') { format!("[{}]", to.ip) } else { to.ip.clone() };
    let method = method.parse::<reqwest::Method>().map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    let request = client
        .request(method, format!("http://{host}:{}{path}", to.port))
        .header(admin::TOKEN_HEADER, token)
        .header("content-type", "application/json")
        .body(body);
    let mut response = request.send().await.map_err(unreachable)?;
    let status = response.status().as_u16();
    let mut answer = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        if answer.len() + chunk.len() > MAX_REPORT_BYTES {
            return Err(PodError::InvalidResponse(format!("it is longer than {MAX_REPORT_BYTES} bytes")));
        }
        answer.extend_from_slice(&chunk);
    }
    Ok((status, answer))
}

async fn proxied(client: &Client, to: &Endpoint, method: &str, path: &str, token: &str, body: Vec<u8>) -> Answer {
    let url = format!("/api/v1/namespaces/{}/pods/{}:{}/proxy{path}", to.namespace, to.pod, to.port);
    let request = http::Request::builder()
        .method(method)
        .uri(url)
        .header(admin::TOKEN_HEADER, token)
        .header("content-type", "application/json")
        .body(kube::client::Body::from(body))
        .map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    let response = client.send(request).await.map_err(|error| PodError::Unreachable(error.to_string()))?;
    let status = response.status().as_u16();
    let answer = Limited::new(response.into_body(), MAX_REPORT_BYTES)
        .collect()
        .await
        .map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    Ok((status, answer.to_bytes().to_vec()))
}

/// The innermost cause, which says "connection refused" where the outer ones say "error sending request".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
