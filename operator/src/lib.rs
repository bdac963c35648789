//! The operator: watches policies, flag sets, workloads and pods, and closes the loop between them.
//!
//! Decisions are in `engine`; here is the I/O around them. [`run`] is the whole process but for the command line.

pub mod acts;
pub mod args;
pub mod board;
pub mod caches;
pub mod clients;
pub mod conditions;
pub mod crash_point;
pub mod error;
pub mod events;
pub mod flag_set;
pub mod guard;
pub mod history;
pub mod jobs;
pub mod lease;
pub mod metrics;
pub mod observe;
pub mod pod_client;
pub mod policy;
pub mod policy_status;
pub mod policy_stories;
pub mod prober;
pub mod publisher;
pub mod pusher;
pub mod server;
pub mod shard;
pub mod target;
pub mod telemetry;
pub mod tokens;
pub mod translate;
pub mod workload;

use args::Args;
use clients::Clients;
use error::ReconcileError;
use futures::{FutureExt, StreamExt, channel::mpsc};
use kube::{
    Config, Resource, ResourceExt,
    runtime::{
        controller::{Action, Config as ControllerConfig, ReconcileRequest, applier},
        reflector::{ObjectRef, Store},
    },
};
use lease::{ApiLeaseStore, Election, Fence, LostLead};
use shard::{Queues, Shard, Shared};
use std::{
    convert::Infallible,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};
use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument, info, info_span, warn};

/// Objects of one kind that are looked at at once.
const CONCURRENCY: u16 = 16;
/// Calls to pods that are under way at once.
const POD_CALLS: usize = 256;
/// Longest time that a pass may take; every call in it has a shorter deadline of its own.
const PASS_DEADLINE: Duration = Duration::from_secs(45);
/// How long passes under way may take to end at shutdown.
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
        pods: pod_client::PodClient::new(args.pod_transport, &clients)?,
        events: events::Events::new(clients.clone(), identity.clone()),
        metrics: status.metrics.clone(),
        fence: fence.clone(),
        tokens,
        pod_calls: Semaphore::new(POD_CALLS),
        leading_since: OnceLock::new(),
        clients: clients.clone(),
        args: args.clone(),
    });
    let mut shards = Vec::new();
    for namespace in args.namespaces() {
        shards.push(start_shard(&shared, namespace.as_deref(), &tracker, &shutdown));
    }
    let filled = async {
        for shard in &shards {
            shard.caches.ready().await;
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
        lost = lead(&election, &shards, &shared) => Err(RunError::Lost(lost)),
        served = serving => match served {
            Ok(Err(error)) => Err(RunError::Listen(error)),
            _ => Ok(()),
        },
    };
    shutdown.cancel();
    tracker.close();
    if tokio::time::timeout(DRAIN, tracker.wait()).await.is_err() {
        warn!("some passes did not end in time");
    }
    if outcome.is_ok() {
        election.release().await;
    }
    outcome
}

/// The master key. An API server that is away is waited for; anything else is said.
async fn load_tokens(clients: &Clients, namespace: &str) -> Result<tokens::Tokens, tokens::KeyError> {
    loop {
        match tokens::Tokens::load(clients, namespace).await {
            Err(tokens::KeyError::Api { source, .. }) if source.code().is_none() => {
                warn!(error = %source, "the API server cannot be reached; trying again");
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            other => return other,
        }
    }
}

async fn lead(election: &Election<ApiLeaseStore>, shards: &[Arc<Shard>], shared: &Shared) -> LostLead {
    election.acquire().await;
    shared.metrics.leader.set(1);
    shared.leading_since(jiff::Timestamp::now());
    for shard in shards {
        shard.touch_everything();
    }
    let lost = election.keep().await;
    shared.metrics.leader.set(0);
    lost
}

fn start_shard(
    shared: &Arc<Shared>,
    namespace: Option<&str>,
    tracker: &TaskTracker,
    shutdown: &CancellationToken,
) -> Arc<Shard> {
    let (caches, changes) = caches::Caches::start(&shared.clients, namespace);
    let (workloads, workload_queue) = mpsc::unbounded();
    let (policies, policy_queue) = mpsc::unbounded();
    let (flag_sets, flag_set_queue) = mpsc::unbounded();
    let shard = Arc::new(Shard::new(Arc::clone(shared), caches, Queues { workloads, policies, flag_sets }));
    tracker.spawn({
        let (shard, shutdown) = (Arc::clone(&shard), shutdown.clone());
        async move {
            let mut changes = std::pin::pin!(changes);
            while let Some(Some(change)) = shutdown.run_until_cancelled(changes.next()).await {
                shard.on_change(&change);
            }
        }
    });
    tracker.spawn(control(
        "workload",
        shard.caches.deployments.clone(),
        workload_queue,
        workload::reconcile,
        Arc::clone(&shard),
        shutdown.clone(),
    ));
    tracker.spawn(control(
        "policy",
        shard.caches.policies.clone(),
        policy_queue,
        policy::reconcile,
        Arc::clone(&shard),
        shutdown.clone(),
    ));
    tracker.spawn(control(
        "flag",
        shard.caches.flag_sets.clone(),
        flag_set_queue,
        flag_set::reconcile,
        Arc::clone(&shard),
        shutdown.clone(),
    ));
    tracker.spawn(prober::run(Arc::clone(&shard), shutdown.clone()));
    shard
}

/// Runs one controller: takes references off the queue, never looks at one object twice at once, and tries again after
/// a growing wait when a pass fails.
async fn control<K, F, Fut>(
    kind: &'static str,
    store: Store<K>,
    queue: mpsc::UnboundedReceiver<ObjectRef<K>>,
    reconcile: F,
    shard: Arc<Shard>,
    shutdown: CancellationToken,
) where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
    F: Fn(Arc<K>, Arc<Shard>) -> Fut + Send + 'static,
    Fut: Future<Output = Result<Action, ReconcileError>> + Send + 'static,
{
    let requests = queue
        .map(|reference| Ok::<_, Infallible>(ReconcileRequest::from(reference)))
        .take_until(shutdown.cancelled_owned());
    let pass = move |object: Arc<K>, shard: Arc<Shard>| {
        let span = info_span!(
            "pass",
            kind,
            object = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any()),
            trace_id = telemetry::trace_id()
        );
        let work = reconcile(object, shard);
        async move { tokio::time::timeout(PASS_DEADLINE, work).await.unwrap_or(Ok(Action::requeue(Duration::from_secs(5)))) }
            .instrument(span)
            .boxed()
    };
    let on_error = move |object: Arc<K>, error: &ReconcileError, shard: Arc<Shard>| {
        let wait = shard.backoffs.after_failure(&object.uid().unwrap_or_default(), error);
        let object = format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any());
        if error.is_conflict() {
            tracing::debug!(kind, %object, %error, "changed meanwhile; looking again");
        } else {
            warn!(kind, %object, %error, retry_in = ?wait, "a pass failed");
        }
        Action::requeue(wait)
    };
    let config = ControllerConfig::default().concurrency(CONCURRENCY);
    applier(pass, on_error, shard, store, requests, config).for_each(|_| std::future::ready(())).await;
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "resilience-operator".to_owned(), |name| name.trim().to_owned())
}
