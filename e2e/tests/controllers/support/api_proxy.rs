//! A way to the API server that sees each call: it speaks plain HTTP to the operator and TLS to the server. It can refuse
//! calls, leave them unanswered, and let the connections of some go dark.

use super::{
    World,
    tcp_proxy::{go_dark, handle},
};
use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, Request, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::{IntoResponse, Response},
    serve::ListenerExt,
};
use futures::StreamExt;
use http_body_util::BodyExt;
use kube::{Client, Config};
use serde_json::json;
use socket2::Socket;
use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

/// A call to the API server.
#[derive(Clone, Debug)]
pub struct Call {
    /// Which connection it came over: the client's end of it.
    pub peer: SocketAddr,
    pub method: Method,
    /// Path and query.
    pub path: String,
}

impl Call {
    /// Whether it watches.
    pub fn is_watch(&self) -> bool {
        self.path.contains("watch=true")
    }

    /// Whether it is about the operator's Lease.
    pub fn is_of_lease(&self) -> bool {
        self.path.contains("/leases")
    }
}

/// Tells calls apart.
pub type Which = fn(&Call) -> bool;

/// The proxy; it ends with this value.
pub struct ApiProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    server: Client,
    calls: Mutex<Vec<Call>>,
    refusals: Mutex<VecDeque<(Which, StatusCode)>>,
    refused: Mutex<usize>,
    /// Calls that reach the server, and whose answers are lost.
    losses: Mutex<VecDeque<Which>>,
    /// Calls that get no answer, or no more of it, while this says so.
    held: watch::Sender<Option<Which>>,
    /// When a watch was last told something.
    watch_told: Mutex<Instant>,
    sockets: Mutex<Vec<(SocketAddr, Socket)>>,
}

impl ApiProxy {
    /// Starts one before the API server of a world, as whom the world's operator is.
    pub async fn start(world: &World) -> Self {
        let mut config = world.operator_config().await;
        config.default_retry = false;
        config.read_timeout = None;
        let shared = Arc::new(Shared {
            server: Client::try_from(config).unwrap(),
            calls: Mutex::default(),
            refusals: Mutex::default(),
            refused: Mutex::default(),
            losses: Mutex::default(),
            held: watch::Sender::new(None),
            watch_told: Mutex::new(Instant::now()),
            sockets: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listener = listener.tap_io({
            let shared = Arc::clone(&shared);
            move |stream| {
                let Ok(peer) = stream.peer_addr() else { return };
                shared.sockets.lock().unwrap().push((peer, handle(stream)));
            }
        });
        let app = Router::new().fallback(pass_on).with_state(Arc::clone(&shared));
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        Self { address, shared, task }
    }

    /// How the operator connects through it.
    pub async fn operator_config(&self, world: &World) -> Config {
        let mut config = world.operator_config().await;
        config.cluster_url = format!("http://{}", self.address).parse().unwrap();
        config
    }

    /// Refuses the next `count` of these calls, after those that are to be refused before.
    pub fn refuse(&self, count: usize, which: Which, status: StatusCode) {
        self.shared.refusals.lock().unwrap().extend(std::iter::repeat_n((which, status), count));
    }

    /// Lets the next `count` of these calls reach the server, and loses the answers: the caller hears nothing.
    pub fn lose_answers(&self, count: usize, which: Which) {
        self.shared.losses.lock().unwrap().extend(std::iter::repeat_n(which, count));
    }

    /// How many answers are still to be lost.
    pub fn answers_to_lose(&self) -> usize {
        self.shared.losses.lock().unwrap().len()
    }

    /// How many calls were refused.
    pub fn refused(&self) -> usize {
        *self.shared.refused.lock().unwrap()
    }

    /// Leaves these calls unanswered, also those that are being answered, until another word.
    pub fn hold(&self, which: Option<Which>) {
        self.shared.held.send_replace(which);
    }

    /// For how long no watch was told anything.
    pub fn watches_silent_for(&self) -> Duration {
        self.shared.watch_told.lock().unwrap().elapsed()
    }

    /// The calls so far, oldest first.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.calls.lock().unwrap().clone()
    }

    /// The connections that such calls came over.
    pub fn peers(&self, which: Which) -> BTreeSet<SocketAddr> {
        self.calls().iter().filter(|call| which(call)).map(|call| call.peer).collect()
    }

    /// The connections that such calls came over go dark; new ones work. The answer is how many calls there were until now.
    pub fn darken(&self, which: Which) -> usize {
        let peers = self.peers(which);
        let sockets = self.shared.sockets.lock().unwrap();
        let dark = sockets.iter().filter(|(peer, _)| peers.contains(peer));
        dark.for_each(|(_, socket)| go_dark(socket));
        self.shared.calls.lock().unwrap().len()
    }
}

impl Drop for ApiProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    /// How this call is refused, if it is.
    fn refusal(&self, call: &Call) -> Option<StatusCode> {
        let mut refusals = self.refusals.lock().unwrap();
        let (_, status) = refusals.front().filter(|(which, _)| which(call))?;
        let status = *status;
        refusals.pop_front();
        *self.refused.lock().unwrap() += 1;
        Some(status)
    }

    /// Whether the answer to this call is lost.
    fn loses_answer(&self, call: &Call) -> bool {
        let mut losses = self.losses.lock().unwrap();
        let lost = losses.front().is_some_and(|which| which(call));
        if lost {
            losses.pop_front();
        }
        lost
    }

    /// Waits until this call may be answered.
    async fn let_through(&self, call: &Call) {
        let mut held = self.held.subscribe();
        let _ = held.wait_for(|held| !held.is_some_and(|which| which(call))).await;
    }
}

async fn pass_on(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let path = request.uri().path_and_query().map(ToString::to_string).unwrap_or_default();
    let call = Call { peer, method: request.method().clone(), path };
    shared.calls.lock().unwrap().push(call.clone());
    if let Some(status) = shared.refusal(&call) {
        return refuse(status);
    }
    shared.let_through(&call).await;
    let (mut parts, body) = request.into_parts();
    // The client of this proxy says who it is, and where the server is.
    parts.headers.remove(header::AUTHORIZATION);
    parts.headers.remove(header::HOST);
    parts.uri = call.path.parse().unwrap();
    let Ok(body) = body.collect().await else { return StatusCode::BAD_REQUEST.into_response() };
    let request = Request::from_parts(parts, kube::client::Body::from(body.to_bytes().to_vec()));
    let answer = match shared.server.send(request).await {
        Ok(answer) => answer,
        Err(error) => return (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    };
    if shared.loses_answer(&call) {
        std::future::pending::<()>().await;
    }
    let (parts, body) = answer.into_parts();
    let body = body.into_data_stream().then(move |part| {
        let (shared, call) = (Arc::clone(&shared), call.clone());
        async move {
            shared.let_through(&call).await;
            if call.is_watch() {
                *shared.watch_told.lock().unwrap() = Instant::now();
            }
            part
        }
    });
    Response::from_parts(parts, Body::from_stream(body))
}

/// As an API server that is starting refuses: 503 without a word of its own, all others with a `Status`.
fn refuse(status: StatusCode) -> Response {
    if status == StatusCode::SERVICE_UNAVAILABLE {
        return (status, "apiserver not ready").into_response();
    }
    let reason = if status == StatusCode::FORBIDDEN { "Forbidden" } else { "TooManyRequests" };
    let text = json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure",
        "message": format!("the test refuses this with {status}"), "reason": reason, "code": status.as_u16(),
    });
    let mut answer = (status, text.to_string()).into_response();
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
