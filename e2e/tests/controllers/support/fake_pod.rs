//! A fake pod: a Pod object of the API server, and at its address a server in the test's process that speaks the contract,
//! correctly or wrongly as the test sets it.

use super::{World, eventually};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use contract::{
    ActionAnswer, ActionOutcome, ActionRequest, Applied, AppliedFrom, BuiltIns, CONTRACT_VERSION, CheckReport,
    CheckStatus, CircuitReport, CircuitState, EffectiveReport, FlagProblem, HealthReport, LoadReport, PushAnswer,
    PushOutcome, RuntimeConfig, WorkloadKind,
    admin::{ACTIONS_PATH, CONFIG_PATH, EFFECTIVE_PATH, HEALTH_PATH, TOKEN_HEADER},
    revision::{Admission, admit},
    signing::{
        Advertised, CONTENT_HASH_HEADER, ContentHash, Presented, SCHEME, SCHEME_ANNOTATION, SIGNATURE_HEADER,
        TIME_HEADER,
    },
};
use crds::Recovery;
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinHandle};

/// Added to a revision, in milliseconds: more than any test lasts, because later changes have higher revisions.
const NEVER_PUBLISHED: i64 = 24 * 60 * 60 * 1_000;

/// Path of its public port at which it answers with what the test sets.
pub const SITE: &str = "/site";

/// How a fake pod answers the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// As the contract says.
    Correct,
    /// It has not mounted its token yet and refuses everything.
    NoTokenYet,
    /// It answers after longer than the operator waits.
    Slow,
    /// Its answers are not of the contract.
    Garbage,
    /// Its answers never end.
    Endless,
    /// Its answers are far too big.
    Huge,
    /// It reports a revision that was never published.
    UnpublishedRevision,
    /// It reports figures that cannot be true.
    ImpossibleFigures,
    /// It reports under another pod's name.
    OtherPodName,
    /// It acknowledges a configuration, and has none a moment later.
    Forgetful,
}

/// A configuration that was pushed.
#[derive(Clone, Debug)]
pub struct Push {
    pub revision: i64,
    pub outcome: PushOutcome,
}

/// An action that was asked for, and the Recovery that was there of it at that moment.
#[derive(Clone, Debug)]
pub struct Asked {
    pub intent_id: String,
    pub action: contract::Action,
    pub recovery: Option<Recovery>,
}

/// What a fake pod is to do, and what it was asked so far.
#[expect(clippy::struct_excessive_bools, reason = "each is a setting of its own that a test may turn")]
pub struct Script {
    pub behavior: Behavior,
    /// Paths of a document that it does not know, as an older version of the workload would not.
    pub unsupported: Vec<String>,
    /// What it finds wrong with flags of the document that it runs.
    pub flag_problems: Vec<FlagProblem>,
    /// Flags that it says nobody in it reads.
    pub flags_unread: Vec<String>,
    /// Version of the contract that it speaks.
    pub contract_version: u32,
    /// Its dependencies; those that a document names besides are unknown to it.
    pub dependencies: Option<BTreeSet<String>>,
    /// What it says that it has built in; `None`: it cannot tell.
    pub built_ins: Option<BuiltIns>,
    /// How often it was asked for that.
    pub asked_for_built_ins: u32,
    /// Whether its check `database` fails.
    pub failing: bool,
    /// Whether ResetConnections makes the check healthy.
    pub reset_helps: bool,
    /// What a fresh connection of it says, while its check fails.
    pub dependency_answers: Option<bool>,
    pub circuits: BTreeMap<String, CircuitState>,
    /// Its load, in percent, and what it says that it is the load of.
    pub load: (u32, &'static str),
    pub running: Option<RuntimeConfig>,
    pub pushes: Vec<Push>,
    pub asked: Vec<Asked>,
    /// Which process it is; another one has forgotten what the one before did.
    pub instance: String,
    /// Actions that took effect, by intent, over all processes.
    pub effects: BTreeMap<String, u32>,
    /// Whether its check `booking-consistency` fails.
    pub inconsistent: bool,
    /// How long it takes to report its health to the operator.
    pub report_takes: Duration,
    /// Requests of any kind, also those that were refused.
    pub requests: usize,
    /// Requests for health that were answered.
    pub reports: u64,
    /// Tokens that it was shown; an empty one for a request without any.
    pub tokens_seen: HashSet<String>,
    /// Whether it understands signed requests, and then takes no others. Otherwise it is of version 0.1 in that.
    pub signs: bool,
    /// Signed requests that it took.
    pub signed_requests: usize,
    /// Documents that were sent to it, also those that it did not take.
    pub puts: usize,
    /// What its failing check says.
    pub complaint: String,
    /// What it answers the public at [`SITE`] with.
    pub site_status: u16,
    /// How often it was asked there.
    pub site_requests: usize,
    unsupported_now: Vec<String>,
    consecutive_failures: u32,
}

/// What the servers of one fake pod share.
struct PodServer {
    world_client: Client,
    namespace: String,
    kind: WorkloadKind,
    workload: String,
    pod: String,
    uid: OnceLock<String>,
    script: Mutex<Script>,
}

/// Which pod to make.
pub struct Blueprint<'a> {
    pub kind: WorkloadKind,
    pub workload: &'a str,
    pub owners: Value,
    pub ready: bool,
    /// Its name; one of its own otherwise.
    pub name: Option<String>,
    /// Its address; one of its own on the loopback otherwise.
    pub address: Option<&'a str>,
    /// Whether it is of a version that understands signed requests, and says so in an annotation.
    pub annotated: bool,
}

impl<'a> Blueprint<'a> {
    /// A pod that is ready, of version 0.1 in how it authenticates the operator.
    pub fn new(kind: WorkloadKind, workload: &'a str, owners: Value) -> Self {
        Self { kind, workload, owners, ready: true, name: None, address: None, annotated: false }
    }
}

/// A fake pod; its servers end with this value.
pub struct FakePod {
    pub name: String,
    server: Arc<PodServer>,
    servers: Vec<JoinHandle<()>>,
}

impl Drop for FakePod {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

impl FakePod {
    /// Creates the Pod object, and answers at its address.
    pub async fn start(world: &World, workload: &str, owners: Value, ready: bool) -> Self {
        Self::make(world, Blueprint { ready, ..Blueprint::new(WorkloadKind::Deployment, workload, owners) }).await
    }

    /// The same for any kind of pod.
    pub async fn make(world: &World, blueprint: Blueprint<'_>) -> Self {
        static NUMBER: AtomicU16 = AtomicU16::new(1);
        let Blueprint { kind, workload, owners, ready, name, address, annotated } = blueprint;
        let [high, low] = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let address = address.map_or_else(|| format!("127.83.{high}.{low}"), str::to_owned);
        let name = name.unwrap_or_else(|| format!("{workload}-1-{high:02x}{low:02x}"));
        let annotations = if annotated { json!({ SCHEME_ANNOTATION: SCHEME }) } else { json!({}) };
        let listen = async || TcpListener::bind((address.as_str(), 0)).await.unwrap();
        let (admin, public) = (listen().await, listen().await);
        let port = |listener: &TcpListener| listener.local_addr().unwrap().port();
        let ports = json!([
            { "name": "admin", "containerPort": port(&admin) },
            { "name": "http", "containerPort": port(&public) },
        ]);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "labels": { "app": workload }, "annotations": annotations, "ownerReferences": owners },
            "spec": { "containers": [{ "name": "main", "image": "none", "ports": ports }] },
        });
        let server = Arc::new(PodServer {
            world_client: world.client.clone(),
            namespace: world.namespace.clone(),
            kind,
            workload: workload.to_owned(),
            pod: name.clone(),
            uid: OnceLock::new(),
            script: Mutex::new(Script { signs: annotated, ..Script::default() }),
        });
        let administration = Router::new()
            .route(CONFIG_PATH, put(take_config))
            .route(ACTIONS_PATH, post(take_action))
            .route(HEALTH_PATH, get(report_to_operator))
            .route(EFFECTIVE_PATH, get(tell_built_ins))
            .with_state(Arc::clone(&server));
        let site = Router::new().route(HEALTH_PATH, get(report_to_public)).route(SITE, get(show_site));
        let site = site.with_state(Arc::clone(&server));
        let serve = |listener, app: Router| {
            tokio::spawn(async move {
                let _ = axum::serve(listener, app).await;
            })
        };
        let servers = vec![serve(admin, administration), serve(public, site)];
        let pods = world.api::<Pod>();
        let made = pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
        server.uid.set(made.uid().unwrap()).unwrap();
        let ready = if ready { "True" } else { "False" };
        let status = json!({ "status": {
            "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
            "conditions": [{ "type": "Ready", "status": ready }],
        }});
        pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&status)).await.unwrap();
        Self { name, server, servers }
    }

    /// What it does and what was done to it.
    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.server.script()
    }

    /// Its process ends, and another one starts that knows nothing.
    pub fn restart_process(&self) {
        let mut script = self.script();
        script.instance.push('1');
        script.running = None;
        script.asked.clear();
        script.consecutive_failures = 0;
        script.reports = 0;
    }

    /// The kubelet calls it ready from now on.
    pub async fn becomes_ready(&self, world: &World) {
        let ready = json!({ "status": { "conditions": [{ "type": "Ready", "status": "True" }] } });
        let how = PatchParams::default();
        world.api::<Pod>().patch_status(&self.name, &how, &Patch::Strategic(ready)).await.unwrap();
    }

    /// Nothing listens at its address any more.
    pub fn go_silent(&mut self) {
        self.servers.drain(..).for_each(|server| server.abort());
    }

    /// Deletes the pod.
    pub async fn delete(&self, world: &World) {
        let now = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        world.api::<Pod>().delete(&self.name, &now).await.unwrap();
    }

    /// Revisions that went live, in order.
    pub fn applied_revisions(&self) -> Vec<i64> {
        let script = self.script();
        script.pushes.iter().filter(|push| push.outcome == PushOutcome::Applied).map(|push| push.revision).collect()
    }

    /// Waits until it runs what `wanted` describes.
    pub async fn until_it_runs(&self, what: &str, wanted: impl Fn(&RuntimeConfig) -> bool) -> RuntimeConfig {
        eventually(&format!("{} runs {what}", self.name), async || {
            let script = self.script();
            let running = script.running.as_ref();
            if let Some(running) = running.filter(|running| wanted(running)) {
                return Ok(running.clone());
            }
            // In a few words: a document may have a megabyte, and this is asked often.
            let running =
                running.map(|running| (running.revision, running.policy.settings.dependencies.get("database")));
            Err(format!("{running:?}, {:?}", script.pushes))
        })
        .await
    }

    /// Waits until it was asked for `count` actions.
    pub async fn until_asked(&self, count: usize) -> Vec<Asked> {
        eventually(&format!("{} is asked for {count} actions", self.name), async || {
            let asked = self.script().asked.clone();
            if asked.len() >= count { Ok(asked) } else { Err(format!("{asked:?}")) }
        })
        .await
    }

    /// Waits until it was asked for its health `count` more times: whatever the operator does about a report, it has
    /// had the time for it.
    pub async fn after_more_reports(&self, count: u64) {
        let goal = self.script().reports + count;
        eventually(&format!("{} reports {count} more times", self.name), async || {
            let reports = self.script().reports;
            if reports >= goal { Ok(()) } else { Err(reports.to_string()) }
        })
        .await;
    }
}

impl Default for Script {
    fn default() -> Self {
        Self {
            behavior: Behavior::Correct,
            unsupported: Vec::new(),
            flag_problems: Vec::new(),
            flags_unread: Vec::new(),
            contract_version: CONTRACT_VERSION,
            dependencies: None,
            built_ins: Some(BuiltIns { dependencies: [("database".to_owned(), None)].into(), ..BuiltIns::default() }),
            asked_for_built_ins: 0,
            failing: false,
            reset_helps: true,
            dependency_answers: None,
            circuits: BTreeMap::new(),
            load: (0, ""),
            running: None,
            pushes: Vec::new(),
            asked: Vec::new(),
            instance: "1".to_owned(),
            effects: BTreeMap::new(),
            inconsistent: false,
            report_takes: Duration::ZERO,
            requests: 0,
            reports: 0,
            tokens_seen: HashSet::new(),
            signs: false,
            signed_requests: 0,
            puts: 0,
            complaint: "no connection answers".to_owned(),
            site_status: 200,
            site_requests: 0,
            unsupported_now: Vec::new(),
            consecutive_failures: 0,
        }
    }
}

impl Script {
    /// Documents that were sent to it, and requests for health that were answered.
    pub fn counts(&self) -> (usize, u64) {
        (self.puts, self.reports)
    }

    fn applied(&self) -> Applied {
        let Some(running) = &self.running else {
            return Applied { contract_version: self.contract_version, ..Applied::default() };
        };
        let known = |name: &&String| self.dependencies.as_ref().is_none_or(|known| known.contains(*name));
        Applied {
            revision: running.revision,
            content_hash: running.content_hash.clone(),
            contract_version: self.contract_version,
            unsupported: self.unsupported_now.clone(),
            unknown_dependencies: running
                .policy
                .settings
                .dependencies
                .keys()
                .filter(|name| !known(name))
                .cloned()
                .collect(),
            flag_problems: self.flag_problems.clone(),
            flags_unread: self.flags_unread.clone(),
            applied_at_ms: 0,
            from: AppliedFrom::Push,
        }
    }

    /// Takes a document as the library in a real pod does.
    fn take(&mut self, bytes: &[u8]) -> (PushOutcome, String) {
        let (config, unknown) = match RuntimeConfig::parse(bytes) {
            Ok(parsed) => parsed,
            Err(error) => return (PushOutcome::RefusedInvalid, error.to_string()),
        };
        let running = self.running.as_ref().map(|running| running.revision);
        let outcome = match admit(running, config.revision, jiff::Timestamp::now().as_millisecond()) {
            Admission::Older => PushOutcome::RefusedOlder,
            Admission::TooFarAhead => PushOutcome::RefusedFuture,
            Admission::Take if self.running.as_ref().is_some_and(|old| old.content_hash == config.content_hash) => {
                PushOutcome::Unchanged
            }
            Admission::Take => PushOutcome::Applied,
        };
        self.pushes.push(Push { revision: config.revision, outcome });
        if matches!(outcome, PushOutcome::Applied | PushOutcome::Unchanged) {
            self.unsupported_now = unknown.into_iter().chain(self.unsupported.clone()).collect();
            self.running = Some(config);
        }
        (outcome, String::new())
    }

    fn report(&mut self, pod: &str) -> HealthReport {
        self.reports += 1;
        self.consecutive_failures = if self.failing { self.consecutive_failures + 1 } else { 0 };
        let status = if self.failing { CheckStatus::Unhealthy } else { CheckStatus::Healthy };
        let check = CheckReport {
            status,
            message: if self.failing { self.complaint.clone() } else { String::new() },
            tags: Vec::new(),
            dependency: Some("database".to_owned()),
            dependency_answers: self.dependency_answers,
            duration_ms: 1,
            consecutive_failures: self.consecutive_failures,
            runs: self.reports,
            data: BTreeMap::new(),
        };
        let circuit = |state: &CircuitState| CircuitReport { state: *state, ..CircuitReport::default() };
        let books = CheckReport {
            status: if self.inconsistent { CheckStatus::Unhealthy } else { CheckStatus::Healthy },
            message: if self.inconsistent { "1 events do not add up".to_owned() } else { String::new() },
            consecutive_failures: u32::from(self.inconsistent),
            dependency: None,
            ..check.clone()
        };
        HealthReport {
            status,
            pod: pod.to_owned(),
            instance: self.instance.clone(),
            checks: BTreeMap::from([("database".to_owned(), check), ("booking-consistency".to_owned(), books)]),
            circuits: self.circuits.iter().map(|(name, state)| (name.clone(), circuit(state))).collect(),
            load: LoadReport {
                worst_percent: Some(self.load.0),
                cause: self.load.1.to_owned(),
                ..LoadReport::default()
            },
            degraded: false,
            applied: self.applied(),
            actions_done: BTreeMap::new(),
        }
    }
}

impl PodServer {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// Counts a request to the admin port and authenticates it; the error is the answer to one that goes no further.
    async fn receive(&self, headers: &HeaderMap, method: &str, path: &str, body: &[u8]) -> Result<(), Response> {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let shown = header(TOKEN_HEADER);
        let (behavior, signs) = {
            let mut script = self.script();
            script.requests += 1;
            script.tokens_seen.insert(shown.to_owned());
            (script.behavior, script.signs)
        };
        match behavior {
            Behavior::NoTokenYet => return Err(self.unauthorized(signs)),
            Behavior::Slow => tokio::time::sleep(Duration::from_secs(60)).await,
            Behavior::Garbage => return Err("<html>welcome</html>".into_response()),
            Behavior::Endless => return Err(endless(Duration::from_millis(10))),
            Behavior::Huge => return Err(Body::from(vec![b' '; 64 << 20]).into_response()),
            Behavior::Correct
            | Behavior::UnpublishedRevision
            | Behavior::ImpossibleFigures
            | Behavior::OtherPodName
            | Behavior::Forgetful => {}
        }
        let secrets: Api<Secret> = Api::namespaced(self.world_client.clone(), &self.namespace);
        let secret = secrets.get_opt(&contract::token_secret_name(self.kind, &self.workload)).await.ok().flatten();
        let current = secret.and_then(|secret| secret.data?.remove("current")).map(|token| token.0).unwrap_or_default();
        let accepted = if signs {
            let (signature, time) = (header(SIGNATURE_HEADER), header(TIME_HEADER));
            let presented = Presented { method, path, signature, time, content: header(CONTENT_HASH_HEADER) };
            let now = jiff::Timestamp::now().as_millisecond();
            presented.verify(self.uid(), [current.as_slice()], now).is_ok_and(|hash| hash == ContentHash::of(body))
        } else {
            !current.is_empty() && current == shown.as_bytes()
        };
        if !accepted {
            return Err(self.unauthorized(signs));
        }
        self.script().signed_requests += usize::from(signs);
        Ok(())
    }

    /// A refusal; a pod that understands signatures says so in it.
    fn unauthorized(&self, signs: bool) -> Response {
        let mut answer = StatusCode::UNAUTHORIZED.into_response();
        if signs {
            for (name, value) in Advertised::headers(self.uid(), jiff::Timestamp::now().as_millisecond()) {
                answer.headers_mut().insert(name, value.parse().unwrap());
            }
        }
        answer
    }

    fn uid(&self) -> &str {
        self.uid.get().map_or("", String::as_str)
    }

    /// The Recovery of an intent right now.
    async fn intent(&self, id: &str) -> Option<Recovery> {
        let recoveries: Api<Recovery> = Api::namespaced(self.world_client.clone(), &self.namespace);
        let all = recoveries.list(&ListParams::default()).await.unwrap();
        all.items.into_iter().find(|recovery| recovery.spec.intent.as_deref() == Some(id))
    }
}

async fn take_config(State(server): State<Arc<PodServer>>, headers: HeaderMap, body: Bytes) -> Response {
    server.script().puts += 1;
    if let Err(answer) = server.receive(&headers, "PUT", CONFIG_PATH, &body).await {
        return answer;
    }
    let mut script = server.script();
    let (outcome, message) = script.take(&body);
    let mut applied = script.applied();
    match script.behavior {
        Behavior::Forgetful => script.running = None,
        Behavior::UnpublishedRevision => applied.revision += NEVER_PUBLISHED,
        _ => {}
    }
    let status = match outcome {
        PushOutcome::Applied | PushOutcome::Unchanged => StatusCode::OK,
        PushOutcome::RefusedInvalid => StatusCode::UNPROCESSABLE_ENTITY,
        _ => StatusCode::CONFLICT,
    };
    (status, Json(PushAnswer { outcome, applied, message })).into_response()
}

async fn take_action(State(server): State<Arc<PodServer>>, headers: HeaderMap, body: Bytes) -> Response {
    if let Err(answer) = server.receive(&headers, "POST", ACTIONS_PATH, &body).await {
        return answer;
    }
    let request: ActionRequest = serde_json::from_slice(&body).unwrap();
    let recovery = server.intent(&request.intent_id).await;
    let mut script = server.script();
    let done_before = script.asked.iter().any(|asked| asked.intent_id == request.intent_id);
    script.asked.push(Asked { intent_id: request.intent_id.clone(), action: request.action, recovery });
    let outcome = if request.instance.as_ref().is_some_and(|meant| *meant != script.instance) {
        ActionOutcome::OtherInstance
    } else if done_before {
        ActionOutcome::AlreadyDone
    } else {
        *script.effects.entry(request.intent_id.clone()).or_default() += 1;
        script.failing = script.failing && !script.reset_helps;
        ActionOutcome::Done
    };
    Json(ActionAnswer { intent_id: request.intent_id, outcome, message: String::new() }).into_response()
}

async fn report_to_operator(State(server): State<Arc<PodServer>>, headers: HeaderMap) -> Response {
    if let Err(answer) = server.receive(&headers, "GET", HEALTH_PATH, b"").await {
        return answer;
    }
    let takes = server.script().report_takes;
    tokio::time::sleep(takes).await;
    let mut script = server.script();
    let mut report = script.report(&server.pod);
    match script.behavior {
        Behavior::UnpublishedRevision => report.applied.revision += NEVER_PUBLISHED,
        Behavior::ImpossibleFigures => {
            report.checks.values_mut().for_each(|check| check.consecutive_failures = u32::MAX);
        }
        Behavior::OtherPodName => report.pod.push_str("-not"),
        _ => {}
    }
    Json(report).into_response()
}

async fn tell_built_ins(State(server): State<Arc<PodServer>>, headers: HeaderMap) -> Response {
    if let Err(answer) = server.receive(&headers, "GET", EFFECTIVE_PATH, b"").await {
        return answer;
    }
    let mut script = server.script();
    script.asked_for_built_ins += 1;
    let Some(built_ins) = &script.built_ins else { return StatusCode::NOT_FOUND.into_response() };
    let (hash, policy) =
        script.running.as_ref().map(|one| (one.content_hash.clone(), one.policy.settings.clone())).unwrap_or_default();
    Json(EffectiveReport::new(hash, &policy, built_ins, None)).into_response()
}

/// An answer that goes on for ever.
fn endless(pause: Duration) -> Response {
    let crumbs = futures::stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok::<_, std::convert::Infallible>(Bytes::from_static(b" ")), ()))
    });
    Body::from_stream(crumbs).into_response()
}

async fn report_to_public(State(server): State<Arc<PodServer>>) -> Json<HealthReport> {
    Json(server.script().report(&server.pod))
}

async fn show_site(State(server): State<Arc<PodServer>>) -> StatusCode {
    let mut script = server.script();
    script.site_requests += 1;
    StatusCode::from_u16(script.site_status).unwrap()
}

/// Annotations of a pod.
pub async fn annotations(world: &World, pod: &FakePod) -> BTreeMap<String, String> {
    world.api::<Pod>().get(&pod.name).await.unwrap().annotations().clone()
}
