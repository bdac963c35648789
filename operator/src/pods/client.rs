//! Calls to the admin port of a pod.
//!
//! A pod may be slow, broken or hostile: every call has a deadline, every answer a size limit, and whatever comes back
//! is read as the contract's types or not at all.

use super::http::{HttpClient, HttpError, Request, Response};
use crate::{
    args::PodTransport,
    fleet::facts::PodFacts,
    kubernetes::clients::{Clients, root_cause},
};
use bytes::Bytes;
use contract::{
    ActionAnswer, ActionRequest, EffectiveReport, HealthReport, MAX_REPORT_BYTES, PushAnswer, admin,
    signing::{self, Advertised, ContentHash},
};
use engine::admin_auth::{self, AdminAuth};
use http_body_util::{BodyExt, Limited};
use jiff::Timestamp;
use kube::Client;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
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

/// A pod to be called, and how it wants to be authenticated to.
pub struct Access<'a> {
    /// Where it is.
    pub to: &'a Endpoint,
    /// Which pod.
    pub uid: &'a str,
    /// Its annotation says that it understands signed requests.
    pub signs: bool,
    /// The workload's token; absent at the public port, which asks for none.
    pub token: Option<String>,
    /// What was learned of how it wants requests to be authenticated; a call may learn more.
    pub auth: AdminAuth,
}

/// One call.
struct Call {
    method: &'static str,
    path: &'static str,
    body: Bytes,
    content: ContentHash,
    deadline: Duration,
    /// Statuses besides 2xx that carry an answer of the contract.
    also_answers: &'static [u16],
}

/// Tries of one call while the pod says how it wants to be authenticated to: its audience, its clock, its version.
const TRIES: usize = 3;

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

    /// Pushes a document; `content` is the hash of its bytes.
    pub async fn push(
        &self,
        access: &mut Access<'_>,
        document: Bytes,
        content: ContentHash,
    ) -> Result<PushAnswer, PodError> {
        let (method, path, deadline) = ("PUT", admin::CONFIG_PATH, POD_DEADLINE);
        // A refusal carries an answer too.
        self.call(access, Call { method, path, body: document, content, deadline, also_answers: &[409, 422] }).await
    }

    /// Asks for the health report.
    pub async fn health(&self, access: &mut Access<'_>) -> Result<HealthReport, PodError> {
        let (method, path, deadline) = ("GET", admin::HEALTH_PATH, POD_DEADLINE);
        let (body, content) = (Bytes::new(), ContentHash::of(b""));
        // An unhealthy pod may say so with 503.
        self.call(access, Call { method, path, body, content, deadline, also_answers: &[503] }).await
    }

    /// The same without a token, from the public port; from its admin port if the pod says nothing of itself to the public.
    pub async fn public_health<'a>(
        &self,
        access: &mut Access<'a>,
        at_admin: Option<&'a Endpoint>,
    ) -> Result<HealthReport, PodError> {
        let result = self.health(access).await;
        let (Err(PodError::Status(404)), Some(to)) = (&result, at_admin) else { return result };
        access.to = to;
        let (method, path, deadline) = ("GET", admin::REPORT_PATH, POD_DEADLINE);
        let (body, content) = (Bytes::new(), ContentHash::of(b""));
        self.call(access, Call { method, path, body, content, deadline, also_answers: &[503] }).await
    }

    /// Asks what the pod runs by and has built in.
    pub async fn effective(&self, access: &mut Access<'_>) -> Result<EffectiveReport, PodError> {
        let (method, path, deadline) = ("GET", admin::EFFECTIVE_PATH, POD_DEADLINE);
        let (body, content) = (Bytes::new(), ContentHash::of(b""));
        let call = Call { method, path, body, content, deadline, also_answers: &[] };
        let answer: Box<RawValue> = self.call(access, call).await?;
        EffectiveReport::parse(answer.get().as_bytes()).map_err(PodError::InvalidResponse)
    }

    /// Asks for an action.
    pub async fn execute(&self, access: &mut Access<'_>, request: &ActionRequest) -> Result<ActionAnswer, PodError> {
        let body: Bytes =
            serde_json::to_vec(request).map_err(|error| PodError::InvalidResponse(error.to_string()))?.into();
        let (method, path, deadline) = ("POST", admin::ACTIONS_PATH, ACTION_DEADLINE);
        let content = ContentHash::of(&body);
        self.call(access, Call { method, path, body, content, deadline, also_answers: &[409, 422, 500, 501] }).await
    }

    async fn call<T: DeserializeOwned>(&self, access: &mut Access<'_>, call: Call) -> Result<T, PodError> {
        let exchange = tokio::time::timeout(call.deadline, self.authenticated(access, &call)).await;
        let Response { status, body, .. } = exchange.map_err(|_| PodError::Deadline(call.deadline))??;
        let answer = match status {
            401 => Err(PodError::Unauthorized),
            200..=299 => serde_json::from_slice(&body).map_err(|error| PodError::InvalidResponse(error.to_string())),
            other if call.also_answers.contains(&other) => {
                serde_json::from_slice(&body).map_err(|_| PodError::Status(other))
            }
            other => Err(PodError::Status(other)),
        }?;
        // Only an answer of the contract shows that the pod has understood how it was asked.
        if access.token.is_some() {
            access.auth.accepted();
        }
        Ok(answer)
    }

    /// Sends a request, and again as long as the pod says how it wants it to be authenticated.
    async fn authenticated(&self, access: &mut Access<'_>, call: &Call) -> Result<Response, PodError> {
        let pod = admin_auth::Pod { uid: access.uid, name: &access.to.pod, signs: access.signs };
        let request = admin_auth::Request { method: call.method, path: call.path, content: call.content };
        for last in [false, false, true].into_iter().take(TRIES) {
            let now = Timestamp::now().as_millisecond();
            let headers = match &access.token {
                Some(token) => access.auth.headers(pod, request, token, now),
                None => Vec::new(),
            };
            let response = match self {
                Self::Direct(client) => direct(client, access.to, call, &headers).await,
                Self::Proxy(client) => proxied(client, access.to, call, &headers).await,
            }?;
            if access.token.is_none() || response.status != 401 {
                return Ok(response);
            }
            let advertised = Advertised::read(|name| response.header(name));
            if !access.auth.refused(pod, advertised.as_ref(), now) || last {
                return Ok(response);
            }
        }
        Err(PodError::Unauthorized)
    }
}

async fn direct(
    client: &HttpClient,
    to: &Endpoint,
    call: &Call,
    headers: &[(&'static str, String)],
) -> Result<Response, PodError> {
    let request = Request { method: call.method, path: call.path, headers, body: call.body.clone() };
    client.send(SocketAddr::new(to.ip, to.port), &request).await.map_err(|error| match error {
        HttpError::Io(error) => PodError::Unreachable(root_cause(&error)),
        HttpError::Invalid(what) => PodError::InvalidResponse(what),
    })
}

async fn proxied(
    client: &Client,
    to: &Endpoint,
    call: &Call,
    headers: &[(&'static str, String)],
) -> Result<Response, PodError> {
    let Endpoint { namespace, pod, port, .. } = to;
    let url = format!("/api/v1/namespaces/{namespace}/pods/{pod}:{port}/proxy{}", call.path);
    let mut request = http::Request::builder().method(call.method).uri(url).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let request = request
        .body(kube::client::Body::from(call.body.to_vec()))
        .map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    let response = client.send(request).await.map_err(|error| PodError::Unreachable(root_cause(&error)))?;
    let status = response.status().as_u16();
    let own = [signing::SCHEME_HEADER, signing::AUDIENCE_HEADER, signing::TIME_HEADER];
    let header = |name: &str| Some((name.to_owned(), response.headers().get(name)?.to_str().ok()?.to_owned()));
    let headers = own.into_iter().filter_map(header).collect();
    let body = Limited::new(response.into_body(), MAX_REPORT_BYTES)
        .collect()
        .await
        .map_err(|error| PodError::InvalidResponse(error.to_string()))?;
    Ok(Response { status, headers, body: body.to_bytes().to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A port that has a report at `path` only, and what it is asked for with a signature it does not answer well.
    async fn port(path: &'static str) -> Endpoint {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 2_048];
                let length = stream.read(&mut head).await.unwrap();
                let head = String::from_utf8_lossy(&head[..length]).to_ascii_lowercase();
                let has_it = head.starts_with(&format!("get {path} ")) && !head.contains("x-resilience");
                let (status, body) =
                    if has_it { ("200 OK", r#"{"status":"Healthy","pod":"p"}"#) } else { ("404 Not Found", "{}") };
                let answer =
                    format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Endpoint { namespace: "n".to_owned(), pod: "p".to_owned(), ip: address.ip(), port: address.port() }
    }

    /// The gateway says to nobody outside how it is, and a policy that only dry runs has no token.
    #[tokio::test]
    async fn without_a_token_a_pod_is_asked_where_it_says_how_it_is() {
        let (open, shut) = (port(admin::HEALTH_PATH).await, port("/nothing").await);
        let at_admin = port(admin::REPORT_PATH).await;
        let client = PodClient::Direct(HttpClient::new(MAX_REPORT_BYTES));
        let ask = async |to: &Endpoint, at_admin: Option<&Endpoint>| {
            let mut access = Access { to, uid: "u", signs: true, token: None, auth: AdminAuth::default() };
            client.public_health(&mut access, at_admin).await.map(|report| report.pod)
        };
        assert_eq!(ask(&open, None).await, Ok("p".to_owned()));
        assert_eq!(ask(&shut, Some(&at_admin)).await, Ok("p".to_owned()));
        assert_eq!(ask(&shut, None).await, Err(PodError::Status(404)));
        assert_eq!(ask(&shut, Some(&shut)).await, Err(PodError::Status(404)));
    }
}
