//! What every service has: two ports, probes, metrics, hot reload, background tasks, and an orderly end.

use crate::answers::problem;
use crate::checks;
use crate::http_client::{DEADLINE_PASSED, INTERNAL, REFUSED};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, middleware};
use contract::admin::{HEALTH_PATH, REPORT_PATH};
use contract::workload_id::UnknownKind;
use contract::{WorkloadId, WorkloadKind};
use futures::future::BoxFuture;
use prometheus_client::metrics::counter::Counter;
use resilience::control::admin::{self, Admin};
use resilience::control::authentication::Authentication;
use resilience::control::mount::ConfigMount;
use resilience::control::token::TokenMount;
use resilience::server::{Clients, Limits, ListenError, listen, serve, serve_and_count};
use resilience::{Actions, Check, Checks, ConfigStore, Dependency, Resilience, deadline, metrics, priority};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time that requests under way get at the end.
const DRAIN: Duration = Duration::from_secs(15);
/// Time that admin calls under way get after that.
const ADMIN_DRAIN: Duration = Duration::from_secs(2);
/// Time that other work under way gets after that, unless the service says otherwise.
const WORK_DRAIN: Duration = Duration::from_secs(5);
/// Requests under way that are a load of 100 % for a service without a limit of its own.
pub const CAPACITY: u32 = 200;
/// No request takes longer, whatever its policy allows.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// The name of this machine, or of this container.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "local".to_owned() } else { name.trim().to_owned() }
}

/// Settings of the pod that a service runs in.
#[derive(Clone, Debug, clap::Args)]
pub struct PodSettings {
    /// Address to listen on [default: all addresses of the machine, IPv6 and IPv4]
    #[arg(long, env = "BIND_ADDRESS")]
    pub bind_address: Option<IpAddr>,
    /// Port for everybody; 0 takes any free one.
    #[arg(long, env = "PORT", default_value_t = 8080)]
    pub port: u16,
    /// Port for the operator; 0 takes any free one.
    #[arg(long, env = "ADMIN_PORT", default_value_t = contract::admin::DEFAULT_PORT)]
    pub admin_port: u16,
    /// Name of the pod [default: the host's name, which is the pod's in Kubernetes]
    #[arg(long, env = "POD_NAME", default_value_t = host_name(), hide_default_value = true)]
    pub pod_name: String,
    /// Uid of the pod, for which the operator signs its requests. Empty: it signs for the pod's name and process instead.
    #[arg(long, env = "POD_UID", default_value = "")]
    pub pod_uid: String,
    /// Namespace of the pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    pub pod_namespace: String,
    /// Name of the Deployment or StatefulSet, if it is not the service's own.
    #[arg(long, env = "WORKLOAD_NAME")]
    pub workload_name: Option<String>,
    /// Kind of the workload: Deployment or StatefulSet.
    #[arg(long, env = "WORKLOAD_KIND", default_value = "Deployment", value_parser = workload_kind)]
    pub workload_kind: WorkloadKind,
    /// Where the ConfigMap is mounted; it may appear later.
    #[arg(long, env = "RESILIENCE_CONFIG_DIR", default_value = "/etc/resilience/config")]
    pub resilience_config_dir: PathBuf,
    /// Where the Secret with the admin token is mounted; it may appear later.
    #[arg(long, env = "RESILIENCE_TOKEN_DIR", default_value = "/etc/resilience/token")]
    pub resilience_token_dir: PathBuf,
    /// Seconds to go on serving after SIGTERM, while the Service still sends requests here.
    #[arg(long, env = "SHUTDOWN_DELAY_SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u64).range(..=60))]
    pub shutdown_delay_seconds: u64,
    /// Connections to the port for everybody that one address may have, of 1024 for all, while fewer than 128 places are free;
    /// others of it wait. To the gateway, a network of 48 bits with IPv6 is one address. 1024 where all callers come through one
    /// proxy.
    #[arg(long, env = "CONNECTIONS_PER_PEER", default_value_t = 512, value_parser = clap::value_parser!(u16).range(1..=1_024))]
    pub connections_per_peer: u16,
    /// Seconds for which a connection is kept without a request. Clients, and proxies in front of it, should give it up sooner.
    #[arg(long, env = "IDLE_TIMEOUT_SECONDS", default_value_t = 75, value_parser = clap::value_parser!(u64).range(6..=3_600))]
    pub idle_timeout_seconds: u64,
    /// Whether drills may disturb this process through its admin port. Never in production.
    #[arg(long, env = "ALLOW_FAULTS", default_value_t = false, action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub allow_faults: bool,
}

impl PodSettings {
    /// The workload that the pod belongs to; `service` is its name unless `workload_name` is set.
    pub fn workload(&self, service: &str) -> WorkloadId {
        let name = self.workload_name.clone().filter(|name| !name.is_empty()).unwrap_or_else(|| service.to_owned());
        WorkloadId::new(self.pod_namespace.clone(), self.workload_kind, name)
    }
}

/// An empty text is the default, as for the name: that is what a template without a value gives.
fn workload_kind(text: &str) -> Result<WorkloadKind, UnknownKind> {
    if text.is_empty() { Ok(WorkloadKind::default()) } else { text.parse() }
}

/// Why a service cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A port cannot be listened on.
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("{0}")]
    Setting(String),
}

/// What a service is made of.
pub struct Parts {
    pub resilience: Arc<Resilience>,
    pub checks: Vec<Check>,
    /// What the operator may ask it to do for itself.
    pub actions: Actions,
    pub api: Router,
    /// What it does beside its requests, until it stops.
    pub tasks: Vec<BoxFuture<'static, ()>>,
    /// Work that is to be ended, not broken off, when the service stops.
    pub work: TaskTracker,
    /// Requests under way that are a load of 100 %; `None`: the service measures its load itself.
    pub capacity: Option<u32>,
}

/// A service with its ports open.
pub struct Service {
    pod: PodSettings,
    admin: Arc<Admin>,
    api: Router,
    tasks: Vec<BoxFuture<'static, ()>>,
    work: TaskTracker,
    work_drain: Duration,
    public: TcpListener,
    private: TcpListener,
    ready: Arc<AtomicBool>,
    edge: bool,
}

impl Service {
    /// Opens both ports.
    pub fn open(pod: PodSettings, parts: Parts) -> Result<Self, StartError> {
        let Parts { resilience, checks, actions, api, tasks, work, capacity } = parts;
        let api = match capacity {
            Some(capacity) => {
                let load = (Arc::clone(&resilience), capacity);
                api.layer(middleware::from_fn_with_state(load, measure_load))
            }
            None => api,
        };
        let public = listen(pod.bind_address, pod.port)?;
        let private = listen(pod.bind_address, pod.admin_port)?;
        let auth = Authentication::new(Arc::default(), &pod.pod_uid, &pod.pod_name, actions.instance());
        let checks = Checks::new(Arc::clone(&resilience), checks);
        let actions = checks::trim_memory(actions, &resilience, &checks);
        let admin = Arc::new(Admin {
            store: ConfigStore::new(Arc::clone(&resilience)),
            checks,
            actions: Arc::new(actions),
            auth,
            pod: pod.pod_name.clone(),
            faults: pod.allow_faults.then(Arc::default),
            resilience,
        });
        let work_drain = WORK_DRAIN;
        Ok(Self { pod, admin, api, tasks, work, work_drain, public, private, ready: Arc::default(), edge: false })
    }

    /// The same with so much time for work under way at the end. The pod's grace period must be longer.
    #[must_use]
    pub fn with_work_drain(self, work_drain: Duration) -> Self {
        Self { work_drain, ..self }
    }

    /// Its callers are not services of ours: what those say to each other ([`INTERNAL`]) is taken from nobody.
    #[must_use]
    pub fn at_the_edge(mut self) -> Self {
        self.edge = true;
        self
    }

    /// Address of the port for everybody.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.public.local_addr()
    }

    /// Address of the admin port.
    pub fn admin_address(&self) -> std::io::Result<SocketAddr> {
        self.private.local_addr()
    }

    /// Serves until `stop` is over; then ends what is under way.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let Self { pod, admin, api, tasks, work, work_drain, public, private, ready, edge } = self;
        let background = Background::start(&pod, &admin).await;
        for task in tasks {
            background.add(task);
        }
        let (stop_public, stop_private) = (CancellationToken::new(), CancellationToken::new());
        let probes = probes(&ready);
        let app = api.merge(probes.clone());
        // What is said of the inside is no business of strangers.
        let app = if edge { app } else { app.merge(reports(HEALTH_PATH, Arc::clone(&admin))) };
        let app = app.layer(middleware::from_fn(bound_request));
        let app = if edge { app.layer(middleware::from_fn(without_internal_headers)) } else { app };
        let private_app = admin.router().merge(probes).merge(reports(REPORT_PATH, Arc::clone(&admin)));
        let app = app.layer(middleware::from_fn_with_state(Arc::clone(&ready), close_when_stopping));
        let refused = Counter::default();
        admin.resilience.metrics().register(|registry| {
            let help = "Connections to the public port for which there was no place";
            registry.register("http_connections_refused", help, refused.clone());
        });
        let public =
            tokio::spawn(serve_and_count(public, app, limits(&pod, edge), refused, stop_public.clone(), DRAIN));
        let private = tokio::spawn(serve(private, private_app, admin::LIMITS, stop_private.clone(), ADMIN_DRAIN));
        ready.store(true, Ordering::Release);
        tracing::info!(workload = %admin.resilience.id(), pod = %pod.pod_name, "started");

        stop.await;
        ready.store(false, Ordering::Release);
        tracing::info!(
            "stopping: not ready any more; new connections are refused after the shutdown delay, requests in flight finish"
        );
        tokio::time::sleep(Duration::from_secs(pod.shutdown_delay_seconds)).await;
        stop_public.cancel();
        let drained = public.await.unwrap_or(false);
        stop_private.cancel();
        let _ = private.await;
        background.stop().await;
        work.close();
        let finished = tokio::time::timeout(work_drain, work.wait()).await.is_ok();
        tracing::info!(drained, finished, "stopped");
    }
}

/// The bounds of the public port.
fn limits(pod: &PodSettings, edge: bool) -> Limits {
    Limits {
        connections_per_peer: pod.connections_per_peer.into(),
        clients: if edge { Clients::Outside } else { Clients::Inside },
        idle_timeout: Duration::from_secs(pod.idle_timeout_seconds),
        ..Limits::DEFAULT
    }
}

/// The dependency that the service has declared under this name.
pub fn declared(resilience: &Resilience, name: &str) -> Result<&'static Dependency, StartError> {
    let missing = || StartError::Setting(format!("the dependency {name} is not declared"));
    resilience.dependency(name).ok_or_else(missing)
}

/// Tasks that run beside the requests.
struct Background {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Background {
    /// What is mounted is read before the first request is served.
    async fn start(pod: &PodSettings, admin: &Arc<Admin>) -> Self {
        let background = Self { tasks: TaskTracker::new(), stop: CancellationToken::new() };
        let mut config = ConfigMount::new(&pod.resilience_config_dir, Arc::clone(&admin.store));
        config.refresh().await;
        background.add(config.watch());
        let mut tokens = TokenMount::new(&pod.resilience_token_dir, Arc::clone(admin.auth.tokens()));
        tokens.refresh().await;
        background.add(tokens.watch());
        let checks = Arc::clone(&admin.checks);
        background.add(async move { checks.run().await });
        let resilience = Arc::clone(&admin.resilience);
        background.add(async move { resilience.watch_load().await });
        background
    }

    fn add(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => {}
                () = stop.cancelled() => {}
            }
        });
    }

    async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// `/livez` and `/readyz` depend on nothing outside the process: a database in trouble must not take every pod out of its
/// Service. They are on both ports: the kubelet asks on the one for the operator, where no crowd can be in its way.
fn probes(ready: &Arc<AtomicBool>) -> Router {
    Router::new().route("/livez", get(|| async { "ok" })).route("/readyz", get(readyz)).with_state(Arc::clone(ready))
}

/// The deep report, at `path`, and the metrics.
fn reports(path: &str, admin: Arc<Admin>) -> Router {
    Router::new()
        .route(path, get(|State(admin): State<Arc<Admin>>| async move { Json(admin.report()) }))
        .route("/metrics", get(metrics_text))
        .with_state(admin)
}

async fn readyz(State(ready): State<Arc<AtomicBool>>) -> Response {
    if ready.load(Ordering::Acquire) {
        "ok".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping").into_response()
    }
}

async fn metrics_text(State(admin): State<Arc<Admin>>) -> Response {
    // Brings the circuits up to date: the end of a break is noticed when somebody looks.
    for dependency in admin.resilience.dependencies() {
        dependency.circuit();
    }
    let text = admin.resilience.metrics().encode();
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

/// Counts the requests in flight. None is refused for their number: connections and bulkheads are bounded.
async fn measure_load(
    State((resilience, capacity)): State<(Arc<Resilience>, u32)>,
    request: axum::extract::Request,
    next: middleware::Next,
) -> Response {
    let _under_way = resilience.load().enter(capacity);
    next.run(request).await
}

/// Bounds a request by its own deadline, which it may have come with, and lets all that it calls know, and how important it is.
async fn bound_request(request: axum::extract::Request, next: middleware::Next) -> Response {
    let longest = Instant::now() + REQUEST_TIMEOUT;
    let given = deadline::of_request(request.headers()).filter(|given| *given < longest);
    let until = given.unwrap_or(longest);
    if until <= Instant::now() {
        let message = "the deadline of the request has passed";
        let mut response = problem(StatusCode::GATEWAY_TIMEOUT, "DEADLINE_PASSED", message);
        response.headers_mut().insert(REFUSED, HeaderValue::from_static("true"));
        return response;
    }
    let priority = crate::priority::of_request(request.headers(), request.method(), request.uri().path());
    let answer = priority::within(priority, deadline::within(Some(until), next.run(request)));
    let mut response = match tokio::time::timeout_at(until, answer).await {
        Ok(response) => response,
        Err(_) => problem(StatusCode::GATEWAY_TIMEOUT, "TIMEOUT", "the request timed out"),
    };
    if response.status().is_server_error() && given.is_some_and(|given| given <= Instant::now()) {
        response.headers_mut().insert(DEADLINE_PASSED, HeaderValue::from_static("true"));
    }
    response
}

/// Callers that are told so go elsewhere before the port is closed, and no request of theirs meets its end.
async fn close_when_stopping(
    State(ready): State<Arc<AtomicBool>>,
    request: axum::extract::Request,
    next: middleware::Next,
) -> Response {
    let mut response = next.run(request).await;
    if !ready.load(Ordering::Acquire) {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// Else everybody could tell a service how long to wait for the ones behind it, and so keep their circuits from opening.
async fn without_internal_headers(mut request: axum::extract::Request, next: middleware::Next) -> Response {
    for name in &INTERNAL {
        request.headers_mut().remove(name);
    }
    let mut response = next.run(request).await;
    for name in &INTERNAL {
        response.headers_mut().remove(name);
    }
    response
}

/// Ends with the first SIGTERM or SIGINT after this call. As process 1 of a container there is no default for them, and
/// elsewhere the default is the end on the spot: so they are caught from the call on, not only once this is waited for.
pub fn until_terminated() -> impl Future<Output = ()> {
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        match signals {
            (Ok(mut terminate), Ok(mut interrupt)) => {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(%error, "failed to install signal handlers; only SIGKILL ends this process");
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{mail_sink, provider_simulator};
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        pod: PodSettings,
    }

    #[derive(Parser)]
    struct Simulators {
        #[command(subcommand)]
        one: Simulator,
    }

    #[derive(clap::Subcommand)]
    enum Simulator {
        Mail(mail_sink::Settings),
        Providers(provider_simulator::Settings),
    }

    fn pod(arguments: &[&str]) -> PodSettings {
        Cli::try_parse_from([&["ticketing"], arguments].concat()).unwrap().pod
    }

    /// A cluster may have IPv6 only, or IPv4 only.
    #[test]
    fn everything_listens_on_both_families_unless_told_otherwise() {
        assert_eq!(pod(&[]).bind_address, None);
        assert_eq!(pod(&["--bind-address", "::1"]).bind_address, Some(std::net::Ipv6Addr::LOCALHOST.into()));
        for name in ["mail", "providers"] {
            let address = match Simulators::try_parse_from(["ticketing", name]).unwrap().one {
                Simulator::Mail(settings) => settings.bind_address,
                Simulator::Providers(settings) => settings.bind_address,
            };
            assert_eq!(address, None, "{name}");
        }
    }

    #[tokio::test]
    async fn a_service_that_stops_sends_its_callers_elsewhere() {
        let ready = Arc::new(AtomicBool::new(true));
        let app = probes(&ready).layer(middleware::from_fn_with_state(Arc::clone(&ready), close_when_stopping));
        let asked = async || {
            let request = axum::extract::Request::get("/livez").body(axum::body::Body::empty()).unwrap();
            tower::ServiceExt::oneshot(app.clone(), request).await.unwrap().headers().get(header::CONNECTION).cloned()
        };
        assert_eq!(asked().await, None);
        ready.store(false, Ordering::Release);
        assert_eq!(asked().await, Some(HeaderValue::from_static("close")));
    }

    #[test]
    fn pods_of_the_cluster_are_told_apart_and_networks_outside_are_not() {
        let pod = pod(&["--connections-per-peer", "7", "--idle-timeout-seconds", "9"]);
        let limits = |edge| limits(&pod, edge);
        assert_eq!((limits(true).clients, limits(false).clients), (Clients::Outside, Clients::Inside));
        assert_eq!((limits(true).connections_per_peer, limits(true).idle_timeout.as_secs()), (7, 9));
    }

    /// As the chart runs it: the delay is in the process, which so knows that it stops.
    #[tokio::test]
    async fn during_the_delay_callers_are_served_and_sent_elsewhere() {
        let pod =
            pod(&["--bind-address", "127.0.0.1", "--port", "0", "--admin-port", "0", "--shutdown-delay-seconds", "2"]);
        let resilience = Resilience::builder(pod.workload("test")).build();
        let parts = Parts {
            checks: Vec::new(),
            actions: Actions::new(Arc::clone(resilience.metrics())),
            api: Router::new().route("/", get(|| async { "served" })),
            tasks: Vec::new(),
            work: TaskTracker::new(),
            capacity: None,
            resilience,
        };
        let service = Service::open(pod, parts).unwrap();
        let url = format!("http://{}", service.address().unwrap());
        let stop = CancellationToken::new();
        let running = tokio::spawn(service.run(stop.clone().cancelled_owned()));
        let ask = async |path: &str| {
            let client = crate::http_client::bare(&url);
            let call = crate::http_client::HttpCall::get(path);
            tower::ServiceExt::oneshot(client, resilience::Attempt::first(call, None)).await
        };
        let closes = |answer: crate::http_client::HttpAnswer| answer.headers.contains_key(header::CONNECTION);
        while ask("/readyz").await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!closes(ask("/").await.unwrap()));
        let stopped_at = Instant::now();
        stop.cancel();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(ask("/readyz").await.is_err(), "not ready any more");
        assert!(closes(ask("/").await.unwrap()), "a new connection is taken, and its caller sent elsewhere");
        running.await.unwrap();
        assert!(stopped_at.elapsed() >= Duration::from_secs(2));
        assert!(ask("/").await.is_err());
    }

    #[test]
    fn a_pod_belongs_to_a_deployment_unless_told_otherwise() {
        assert_eq!(pod(&["--workload-kind", ""]).workload("booking"), WorkloadId::deployment("default", "booking"));
        let stateful = pod(&["--workload-kind", "StatefulSet", "--workload-name", "seats"]).workload("booking");
        assert_eq!(stateful, WorkloadId::new("default", WorkloadKind::StatefulSet, "seats"));
        assert!(Cli::try_parse_from(["ticketing", "--workload-kind", "DaemonSet"]).is_err());
    }
}
