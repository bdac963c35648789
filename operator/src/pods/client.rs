//! Calls to the admin port of a pod.
//!
//! A pod may be slow, broken or hostile: every call has a deadline, every answer a size limit, and whatever comes back
//! is read as the contract's types or not at all.

use super::http::{HttpClient, HttpError, Request};
use crate::{
    args::PodTransport,
    fleet::facts::PodFacts,
    kubernetes::clients::{Clients, root_cause},
};
use bytes::Bytes;
use contract::{ActionAnswer, ActionRequest, HealthReport, MAX_REPORT_BYTES, PushAnswer, admin};
use http_body_util::{BodyExt, Limited};
use kube::Client;
use serde::de::DeserializeOwned;
use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Longest time of a call to a pod.
pub const POD_DEADLINE: Duration = Duration::from_secs(2);
/// Longest time of an action in a pod.
const ACTION_DEADLINE: Duration = Duration::from_secs(5);

/// Where a port of a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Its address.
    pub ip: IpAddr,
    /// Its port.
    pub port: u16,
}

impl Endpoint {
    /// The admin port of a pod that has an address.
    pub fn admin(pod: &PodFacts) -> Option<Self> {
        Self::of(pod, pod.admin_port)
    }

    /// The port that serves the public, where the health report is to be had without a token.
    pub fn public(pod: &PodFacts) -> Option<Self> {
        Self::of(pod, pod.public_port)
    }

    fn of(pod: &PodFacts, port: u16) -> Option<Self> {
        Some(Self { namespace: pod.namespace.to_string(), pod: pod.name.to_string(), ip: pod.ip?, port })
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
    /// Straight at their address. No proxy of the environment and no redirect has a say in where a token goes.
    Direct(HttpClient),
    /// Through the API server.
    Proxy(Client),
}

/// One call.
struct Call<'a> {
    to: &'a Endpoint,
    token: &'a str,
    method: &'static str,
    path: &'static str,
    body: Bytes,
    deadline: Duration,
    /// Statuses besides 2xx that carry an answer of the contract.
    also_answers: &'static [u16],
}

impl PodClient {
    /// As the command line says.
    pub fn new(transport: PodTransport, clients: &Clients) -> Self {
        match transport {
            PodTransport::ApiserverProxy => Self::Proxy(clients.act.clone()),
            PodTransport::Direct => Self::Direct(HttpClient::new(MAX_REPORT_BYTES)),
        }
    }

    /// Closes connections that nobody has used for a while.
    pub fn close_unused(&self) {
        if let Self::Direct(client) = self {
            client.close_unused();
        }
    }

    /// Pushes a document.
    pub async fn push(&self, to: &Endpoint, token: &str, document: Bytes) -> Result<PushAnswer, PodError> {
        let (method, path, deadline) = ("PUT", admin::CONFIG_PATH, POD_DEADLINE);
        // A refusal carries an answer too.
        self.call(Call { to, token, method, path, body: document, deadline, also_answers: &[409, 422] }).await
    }

    /// Asks for the health report.
    pub async fn health(&self, to: &Endpoint, token: &str) -> Result<HealthReport, PodError> {
        let (method, path, deadline) = ("GET", admin::HEALTH_PATH, POD_DEADLINE);
        // An unhealthy pod may say so with 503.
        self.call(Call { to, token, method, path, body: Bytes::new(), deadline, also_answers: &[503] }).await
    }

    /// Asks for an action.
    pub async fn execute(&self, to: &Endpoint, token: &str, request: &ActionRequest) -> Result<ActionAnswer, PodError> {
        let body = serde_json::to_vec(request).map_err(|error| PodError::InvalidResponse(error.to_string()))?.into();
        let (method, path, deadline) = ("POST", admin::ACTIONS_PATH, ACTION_DEADLINE);
        self.call(Call { to, token, method, path, body, deadline, also_answers: &[409, 422, 500, 501] }).await
    }

    async fn call<T: DeserializeOwned>(&self, call: Call<'_>) -> Result<T, PodError> {
        let exchange = async {
            match self {
                Self::Direct(client) => direct(client, &call).await,
                Self::Proxy(client) => proxied(client, &call).await,
            }
        };
        let exchange = tokio::time::timeout(call.deadline, exchange).await;
        let (status, answer) = exchange.map_err(|_| PodError::Deadline(call.deadline))??;
        match status {
            401 => Err(PodError::Unauthorized),
            200..=299 => serde_json::from_slice(&answer).map_err(|error| PodError::InvalidResponse(error.to_string())),
            other if call.also_answers.contains(&other) => {
                serde_json::from_slice(&answer).map_err(|_| PodError::Status(other))
            }
            other => Err(PodError::Status(other)),
        }
    }
}

async fn direct(client: &HttpClient, call: &Call<'_>) -> Result<(u16, Vec<u8>), PodError> {
    let headers = [(admin::TOKEN_HEADER, call.token.to_owned())];
    let body = call.body.clone();
    let request = Request { method: call.method, path: call.path, headers: &headers, body };
    client.send(SocketAddr::new(call.to.ip, call.to.port), &request).await.map_err(|error| match error {
        HttpError::Io(error) => PodError::Unreachable(root_cause(&error)),
        HttpError::Invalid(what) => PodError::InvalidResponse(what),
    })
}

async fn proxied(client: &Client, call: &Call<'_>) -> Result<(u16, Vec<u8>), PodError> {
    let Endpoint { namespace, pod, port, .. } = call.to;
    let url = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy{}", call.path);
    let request = http::Request::builder()
        .method(call.method)
        .uri(url)
        .header(admin::TOKEN_HEADER, call.token)
        .header("content-type", "application/json")
        .body(kube::client::Body::from(call.body.to_vec()))
        .map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    let response = client.send(request).await.map_err(|error| PodError::Unreachable(root_cause(&error)))?;
    let status = response.status().as_u16();
    let answer = Limited::new(response.into_body(), MAX_REPORT_BYTES)
        .collect()
        .await
        .map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    Ok((status, answer.to_bytes().to_vec()))
}
