//! The admin port: the operator's way into the pod.
//!
//! Every call is signed with the workload's token, or carries it if the operator is of version 0.1 ([`super::authentication`]);
//! without a mounted token, every call is refused. A call is accepted or refused by its head, so a caller without the token
//! cannot even send a body.

use crate::clock;
use crate::control::actions::Actions;
use crate::control::authentication::{Authenticated, Authentication};
use crate::control::config::ConfigStore;
use crate::control::health::Checks;
use crate::fault_injection::FilledMemory;
use crate::server::{BodyError, ByteBudget, Limits, read_body_within};
use crate::workload::Resilience;
use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use contract::admin::{
    ACTIONS_PATH, APPLIED_PATH, CONFIG_PATH, EFFECTIVE_PATH, HEALTH_PATH, MEMORY_FAULT_PATH, MemoryFault,
};
use contract::signing::{Advertised, CONTENT_HASH_HEADER};
use contract::{ActionRequest, AppliedFrom, HealthReport, MAX_CONFIG_BYTES};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Time to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// A request for an action or a fault has a few dozen bytes.
const MAX_ACTION_BYTES: usize = 4 * 1024;
/// Ids are remembered, so they are bounded.
const MAX_INTENT_ID_BYTES: usize = 256;

/// Bounds of the admin port, whose clients are the operator and the kubelet. The operator means this very pod: its
/// connections may be as old as they get.
pub const LIMITS: Limits =
    Limits { connections: 512, connections_per_peer: 256, connection_age: Duration::MAX, ..Limits::DEFAULT };

/// Bytes of bodies that are held at once while they arrive: those of the operator, which crowds at the public port must not
/// keep out.
static BODIES: ByteBudget = ByteBudget::new(16 * 1024 * 1024);

async fn read_body(body: Body, max_bytes: usize) -> Result<Vec<u8>, BodyError> {
    read_body_within(&BODIES, body, max_bytes, BODY_TIMEOUT).await
}

/// Everything that the admin port works on.
pub struct Admin {
    /// The workload that is configured and reported.
    pub resilience: Arc<Resilience>,
    /// Takes pushed configurations.
    pub store: Arc<ConfigStore>,
    /// Health checks, for the report.
    pub checks: Arc<Checks>,
    /// Recovery actions that the workload supports.
    pub actions: Arc<Actions>,
    /// Who may use the port.
    pub auth: Authentication,
    /// Name of the pod, for the report.
    pub pod: String,
    /// What drills may do to the process; `None`: nothing.
    pub faults: Option<Arc<FilledMemory>>,
}

impl Admin {
    /// The deep health report.
    pub fn report(&self) -> HealthReport {
        let (status, checks) = self.checks.report();
        HealthReport {
            status,
            pod: self.pod.clone(),
            instance: self.actions.instance().to_owned(),
            checks,
            circuits: self.resilience.dependencies().map(|one| (one.name().to_owned(), one.circuit())).collect(),
            load: self.resilience.load_report(),
            degraded: self.resilience.is_degraded(),
            applied: self.store.applied(),
            actions_done: self.actions.counts(),
        }
    }

    /// The routes of the admin port.
    pub fn router(self: &Arc<Self>) -> Router {
        Router::new()
            .route(CONFIG_PATH, put(put_config))
            .route(APPLIED_PATH, get(get_applied))
            .route(EFFECTIVE_PATH, get(get_effective))
            .route(ACTIONS_PATH, post(post_action))
            .route(MEMORY_FAULT_PATH, put(put_memory_fault))
            .route(HEALTH_PATH, get(get_health))
            .fallback(|| async { refuse(StatusCode::NOT_FOUND, "NotFound", "there is no such call") })
            .layer(middleware::from_fn_with_state(Arc::clone(self), authenticate))
            .with_state(Arc::clone(self))
    }
}

async fn authenticate(State(admin): State<Arc<Admin>>, mut request: Request, next: Next) -> Response {
    let now_ms = clock::now_ms();
    let answer = match admin.auth.check(request.method(), request.uri(), request.headers(), now_ms) {
        Ok(authenticated) => {
            request.extensions_mut().insert(authenticated);
            next.run(request).await
        }
        Err(refusal) => refuse(StatusCode::UNAUTHORIZED, refusal.reason(), &refusal.to_string()),
    };
    advertise(answer, admin.auth.audience(), now_ms)
}

/// Every answer says how requests are to be signed: the operator must not send a token to find out.
fn advertise(mut answer: Response, audience: &str, now_ms: i64) -> Response {
    for (name, value) in Advertised::headers(audience, now_ms) {
        if let Ok(value) = HeaderValue::from_str(&value) {
            answer.headers_mut().insert(name, value);
        }
    }
    answer
}

async fn put_config(
    State(admin): State<Arc<Admin>>,
    Extension(authenticated): Extension<Authenticated>,
    body: Body,
) -> Result<Response, BodyError> {
    let bytes = read_body(body, MAX_CONFIG_BYTES).await?;
    if !authenticated.covers(&bytes) {
        return Ok(changed_on_its_way());
    }
    let answer = admin.store.apply(&bytes, AppliedFrom::Push, clock::now_ms());
    // A refusal is an answer, too: the outcome says so, and any other status means that there is none.
    Ok(Json(answer).into_response())
}

async fn get_applied(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.store.history()).into_response()
}

async fn get_effective(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.store.effective()).into_response()
}

async fn get_health(State(admin): State<Arc<Admin>>) -> Response {
    Json(admin.report()).into_response()
}

async fn post_action(
    State(admin): State<Arc<Admin>>,
    Extension(authenticated): Extension<Authenticated>,
    body: Body,
) -> Result<Response, BodyError> {
    let bytes = read_body(body, MAX_ACTION_BYTES).await?;
    if !authenticated.covers(&bytes) {
        return Ok(changed_on_its_way());
    }
    let request: ActionRequest = match serde_json::from_slice(&bytes) {
        Ok(request) => request,
        Err(error) => return Ok(refuse(StatusCode::BAD_REQUEST, "Malformed", &error.to_string())),
    };
    if request.intent_id.is_empty() || request.intent_id.len() > MAX_INTENT_ID_BYTES {
        let message = format!("intentId must have 1 to {MAX_INTENT_ID_BYTES} bytes");
        return Ok(refuse(StatusCode::BAD_REQUEST, "Malformed", &message));
    }
    let check = request.check.clone();
    let answer = admin.actions.act(request).await;
    // The operator waits to see the check well again; it need not wait for the interval.
    admin.checks.run_now(&check);
    Ok(Json(answer).into_response())
}

async fn put_memory_fault(
    State(admin): State<Arc<Admin>>,
    Extension(authenticated): Extension<Authenticated>,
    body: Body,
) -> Result<Response, BodyError> {
    let Some(memory) = &admin.faults else {
        let message = "this pod was not started with faults allowed";
        return Ok(refuse(StatusCode::FORBIDDEN, "FaultsNotAllowed", message));
    };
    let bytes = read_body(body, MAX_ACTION_BYTES).await?;
    if !authenticated.covers(&bytes) {
        return Ok(changed_on_its_way());
    }
    let held = match serde_json::from_slice::<MemoryFault>(&bytes) {
        Ok(fault) => memory.hold(fault).await.map(|()| fault),
        Err(error) => Err(error.to_string()),
    };
    Ok(match held {
        Ok(fault) => Json(fault).into_response(),
        Err(message) => refuse(StatusCode::BAD_REQUEST, "Malformed", &message),
    })
}

fn changed_on_its_way() -> Response {
    let message = format!("the body does not have the hash that {CONTENT_HASH_HEADER} states and the signature covers");
    refuse(StatusCode::UNAUTHORIZED, "WrongSignature", &message)
}

fn refuse(status: StatusCode, reason: &str, message: &str) -> Response {
    (status, Json(json!({ "reason": reason, "message": message }))).into_response()
}
