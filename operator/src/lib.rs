//! The operator: watches policies, flag sets, workloads and pods, and closes the loop between them.
//!
//! Decisions are in `engine`; here is the I/O around them. [`run`] is the whole process but for the command line.

pub mod args;
pub mod context;
pub mod crash_point;
pub mod error;
pub mod feature_flag;
pub mod kubernetes;
pub mod pods;
pub mod policy;
pub mod spec;
pub mod status;
pub mod telemetry;
pub mod workload;

use args::Args;
use context::{Context, Queues, Shared};
use error::ReconcileError;
use futures::{FutureExt, StreamExt, channel::mpsc};
use kube::{
    Config, Resource, ResourceExt,
    runtime::{
        controller::{Action, Config as ControllerConfig, ReconcileRequest, applier},
        reflector::{ObjectRef, Store},
    },
};
use kubernetes::{
    clients::Clients,
    events::Events,
    leader_election::{ApiLeaseStore, Election, Fence, LostLead},
    watches::Caches,
};
use pods::{
    client::PodClient,
    prober,
    tokens::{self, Tokens},
};
use std::{
    convert::Infallible,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};
use telemetry::{logging, server};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, info, info_span, warn};

/// Objects of one kind that are looked at at once.
const CONCURRENCY: u16 = 16;
/// Calls to pods that are under way at once.
const POD_CALLS: usize = 256;
/// Longest time that a reconcile may take; every call in it has a shorter deadline of its own.
const RECONCILE_DEADLINE: Duration = Duration::from_secs(45);
/// How long reconciles under way may take to end at shutdown.
const DRAIN: Duration = Duration::from_secs(10);

/// Why the operator stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no way to the API server.
    #[error("cannot connect to the API server: {0}")]
    Connect(#[source] Box<kube::Error>),
    /// The client for pods could not be made.
    #[error("cannot make a client for pods: {0}")]
    PodClient(#[from] reqwest::Error),
    /// There is no master key.
    #[error(transparent)]
    Key(#[from] tokens::KeyError),
    /// The address is taken.
    #[error(transparent)]
    Listen(#[from] server::ListenError),
    /// Another replica may lead now.
    #[error(transparent)]
    Lost(#[from] LostLead),
}

/// Runs until `shutdown`, or until the lead is lost.
pub async fn run(args: Args, config: Config, shutdown: CancellationToken) -> Result<(), RunError> {
    let clients = Clients::new(&config).map_err(|error| RunError::Connect(Box::new(error)))?;
    let identity = args.identity.clone().unwrap_or_else(host_name);
    let status = server::Status::default();
    let tracker = TaskTracker::new();
    let serving = tokio::spawn(server::serve(args.listen, status.clone(), shutdown.clone()));

    let Some(tokens) = shutdown.run_until_cancelled(load_tokens(&clients, &args.namespace)).await.transpose()? else {
        return Ok(());
    };
    let fence = Fence::default();
    let shared = Arc::new(Shared {
        pods: PodClient::new(args.pod_transport, &clients)?,
        events: Events::new(clients.clone(), identity.clone()),
        metrics: status.metrics.clone(),
        fence: fence.clone(),
        tokens,
        pod_calls: Semaphore::new(POD_CALLS),
        leading_since: OnceLock::new(),
        clients: clients.clone(),
        args: args.clone(),
    });
    let mut contexts = Vec::new();
    for namespace in args.namespaces() {
        contexts.push(start_controllers(&shared, namespace.as_deref(), &tracker, &shutdown));
    }
    let filled = async {
        for ctx in &contexts {
            ctx.caches.ready().await;
        }
    };
    if shutdown.run_until_cancelled(filled).await.is_some() {
        status.ready.store(true, Ordering::Relaxed);
        info!(%identity, dry_run = args.dry_run, "the caches are filled");
    }

    let election =
        Election::new(ApiLeaseStore::new(&clients, &args.namespace), identity, args.lease_duration, fence.clone());
    let outcome = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        lost = lead(&election, &contexts, &shared) => Err(RunError::Lost(lost)),
        served = serving => match served {
            Ok(Err(error)) => Err(RunError::Listen(error)),
            _ => Ok(()),
        },
    };
    shutdown.cancel();
    tracker.close();
    if tokio::time::timeout(DRAIN, tracker.wait()).await.is_err() {
        warn!("some reconciles did not end in time");
    }
    if outcome.is_ok() {
        election.release().await;
    }
    outcome
}

/// The master key. An API server that is away is waited for; anything else is said.
async fn load_tokens(clients: &Clients, namespace: &str) -> Result<Tokens, tokens::KeyError> {
    loop {
        match Tokens::load(clients, namespace).await {
            Err(tokens::KeyError::Api { source, .. }) if source.code().is_none() => {
                warn!(error = %source, "the API server cannot be reached; trying again");
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            other => return other,
        }
    }
}

async fn lead(election: &Election<ApiLeaseStore>, contexts: &[Arc<Context>], shared: &Shared) -> LostLead {
    election.acquire().await;
    shared.metrics.leader.set(1);
    shared.leading_since(jiff::Timestamp::now());
    for ctx in contexts {
        ctx.enqueue_everything();
    }
    let lost = election.keep().await;
    shared.metrics.leader.set(0);
    lost
}

fn start_controllers(
    shared: &Arc<Shared>,
    namespace: Option<&str>,
    tracker: &TaskTracker,
    shutdown: &CancellationToken,
) -> Arc<Context> {
    let (caches, changes) = Caches::start(&shared.clients, namespace);
    let (workloads, workload_queue) = mpsc::unbounded();
    let (policies, policy_queue) = mpsc::unbounded();
    let (flag_sets, flag_set_queue) = mpsc::unbounded();
    let ctx = Arc::new(Context::new(Arc::clone(shared), caches, Queues { workloads, policies, flag_sets }));
    tracker.spawn({
        let (ctx, shutdown) = (Arc::clone(&ctx), shutdown.clone());
        async move {
            let mut changes = std::pin::pin!(changes);
            while let Some(Some(change)) = shutdown.run_until_cancelled(changes.next()).await {
                ctx.on_change(&change);
            }
        }
    });
    tracker.spawn(control(
        "workload",
        ctx.caches.deployments.clone(),
        workload_queue,
        workload::reconcile::reconcile,
        Arc::clone(&ctx),
        shutdown.clone(),
    ));
    tracker.spawn(control(
        "policy",
        ctx.caches.policies.clone(),
        policy_queue,
        policy::reconcile::reconcile,
        Arc::clone(&ctx),
        shutdown.clone(),
    ));
    tracker.spawn(control(
        "flag",
        ctx.caches.flag_sets.clone(),
        flag_set_queue,
        feature_flag::reconcile::reconcile,
        Arc::clone(&ctx),
        shutdown.clone(),
    ));
    tracker.spawn(prober::run(Arc::clone(&ctx), shutdown.clone()));
    ctx
}

/// Runs one controller: takes references off the queue, never looks at one object twice at once, and tries again after
/// a growing wait when a reconcile fails.
async fn control<K, F, Fut>(
    kind: &'static str,
    store: Store<K>,
    queue: mpsc::UnboundedReceiver<ObjectRef<K>>,
    reconcile: F,
    ctx: Arc<Context>,
    shutdown: CancellationToken,
) where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
    F: Fn(Arc<K>, Arc<Context>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<Action, ReconcileError>> + Send + 'static,
{
    let requests = queue
        .map(|reference| Ok::<_, Infallible>(ReconcileRequest::from(reference)))
        .take_until(shutdown.cancelled_owned());
    let reconcile_object = move |object: Arc<K>, ctx: Arc<Context>| {
        let span = info_span!(
            "reconcile",
            kind,
            object = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any()),
            trace_id = logging::trace_id()
        );
        let work = reconcile(object, ctx);
        async move {
            tokio::time::timeout(RECONCILE_DEADLINE, work).await.unwrap_or(Ok(Action::requeue(Duration::from_secs(5))))
        }
        .instrument(span)
        .boxed()
    };
    let on_error = move |object: Arc<K>, error: &ReconcileError, ctx: Arc<Context>| {
        let wait = ctx.backoffs.after_failure(&object.uid().unwrap_or_default(), error);
        let object = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        if error.is_conflict() {
            tracing::debug!(kind, %object, %error, "changed meanwhile; looking again");
        } else {
            warn!(kind, %object, %error, retry_in = ?wait, "reconciliation failed");
        }
        Action::requeue(wait)
    };
    let config = ControllerConfig::default().concurrency(CONCURRENCY);
    applier(reconcile_object, on_error, ctx, store, requests, config).for_each(|_| std::future::ready(())).await;
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "resilience-operator".to_owned(), |name| name.trim().to_owned())
}
