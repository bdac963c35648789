//! The operator: watches policies, flag sets, workloads and pods, and closes the loop between them.
//!
//! Decisions are in `engine`; here is the I/O around them. [`run`] is the whole process but for the command line.

pub mod args;
pub mod checks;
pub mod context;
pub mod crash_point;
pub mod error;
pub mod feature_flag;
pub mod flag_sync;
pub mod fleet;
pub mod kubernetes;
pub mod ofrep;
pub mod pods;
pub mod policy;
pub mod recovery;
pub mod spec;
pub mod status;
pub mod supervision;
pub mod telemetry;
pub mod workload;

use args::Args;
use context::{Context, Shared};
use feature_flag::reconcile::FlagSetReconciler;
use futures::StreamExt;
use kube::Config;
use kubernetes::{
    clients::{ApiError, Clients},
    controller,
    events::Events,
    filling::{Filling, NotFilled},
    leader_election::{ApiLeaseStore, Election, Fence, LostLead},
    releases::{self, Releases},
    watches::{self, News},
};
use pods::{
    client::PodClient,
    fair_queue::FairQueue,
    prober,
    tokens::{KeyError, Tokens},
};
use policy::reconcile::PolicyReconciler;
use recovery::reconcile::RecoveryReconciler;
use std::{
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};
use supervision::{Ended, Supervisor};
use telemetry::{metrics::Metrics, server};
use tokio::{sync::SetOnce, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use workload::reconcile::WorkloadReconciler;

/// How long reconciles under way may take to end at shutdown.
const DRAIN: Duration = Duration::from_secs(10);
/// How long an API server that answers, but not as it should, is waited for at the start.
const PATIENCE_AT_START: Duration = Duration::from_secs(60);
/// Wait between two questions to an API server that is starting.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// Why the operator stopped.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no way to the API server.
    #[error("cannot connect to the API server: {0}")]
    Connect(#[source] Box<kube::Error>),
    /// The API server does not let policies be watched.
    #[error("policies cannot be watched: {0}; check the operator's roles, and that its CRDs are installed")]
    Watch(#[source] ApiError),
    /// It does not let something else be watched.
    #[error(transparent)]
    NotFilled(#[from] NotFilled),
    /// There is no master key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The address is taken.
    #[error(transparent)]
    Listen(#[from] server::ListenError),
    /// The address of OFREP is taken.
    #[error(transparent)]
    Ofrep(#[from] ofrep::server::ListenError),
    /// The address of `flagd.sync.v1` is taken.
    #[error(transparent)]
    FlagSync(#[from] flag_sync::server::ListenError),
    /// Another replica may lead now.
    #[error(transparent)]
    Lost(#[from] LostLead),
    /// A task ended that should not.
    #[error(transparent)]
    TaskEnded(#[from] Ended),
}

/// The server of `/livez`, `/readyz` and `/metrics`.
type Serving = tokio::task::JoinHandle<Result<(), server::ListenError>>;

/// Runs until `shutdown`, or until the lead or a task is lost.
pub async fn run(args: Args, config: Config, shutdown: CancellationToken) -> Result<(), RunError> {
    let mut clients = Clients::new(&config).map_err(|error| RunError::Connect(Box::new(error)))?;
    let identity = args.identity.clone().unwrap_or_else(host_name);
    let status = server::Status::default();
    let mut serving = tokio::spawn(server::serve(args.listen, status.clone(), shutdown.clone()));

    let ofrep = match args.ofrep.ofrep_listen {
        Some(address) => Some(ofrep::server::bind(address).await?),
        None => None,
    };
    let flag_sync = match args.flag_sync.flag_sync_listen {
        Some(address) => Some(flag_sync::server::bind(address).await?),
        None => None,
    };

    let first = args.namespaces().into_iter().next().flatten();
    let starting = async {
        let mut patience = Patience::waiting_for("the API server");
        while let Err(error) = clients.look_at_server(first.as_deref()).await {
            patience.after(error).await.map_err(RunError::Watch)?;
        }
        load_tokens(&clients, &args.namespace).await.map_err(RunError::Key)
    };
    let tokens = tokio::select! {
        () = shutdown.cancelled() => return Ok(()),
        tokens = starting => tokens?,
        served = &mut serving => return end_of_server(served, &shutdown),
    };
    let fence = Fence::default();
    let shared = Arc::new(Shared {
        pods: PodClient::new(args.pod_transport, &clients),
        events: Events::new(clients.clone(), identity.clone()),
        metrics: status.metrics.clone(),
        fence: fence.clone(),
        tokens,
        pod_calls: FairQueue::default(),
        check_calls: FairQueue::default(),
        leading_since: OnceLock::new(),
        leads: SetOnce::new(),
        releases: Releases::default(),
        release: releases::mark(&args.namespace),
        clients: clients.clone(),
        args: args.clone(),
    });
    let (mut supervisor, mut ended) = Supervisor::new(shutdown.clone(), args.fault.clone());
    let mut contexts = Vec::new();
    let (mut fillings, mut ledgers) = (Vec::new(), Vec::new());
    for namespace in args.namespaces() {
        let filling = Filling::default();
        status.watch_filling(filling.clone());
        let ctx = start_controllers(&shared, namespace.as_deref(), &filling, &mut supervisor, &status);
        ledgers.push(start_ledger(&ctx, namespace.as_deref(), &mut supervisor));
        contexts.push(ctx);
        fillings.push(filling);
    }
    if let Some(listener) = ofrep {
        let watched = args.namespaces().into_iter().zip(contexts.iter().cloned()).collect();
        ofrep::start(&args.ofrep, listener, clients.act.clone(), &shared.tokens, watched, &status, &mut supervisor);
    }
    if let Some(listener) = flag_sync {
        let watched = args.namespaces().into_iter().zip(contexts.iter().cloned()).collect();
        flag_sync::start(&args.flag_sync, listener, clients.act.clone(), watched, &status, &mut supervisor);
    }
    let filled = futures::future::try_join_all(fillings.iter().map(Filling::done));
    let outcome = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        task = ended.recv() => Err(task.into()),
        served = &mut serving => end_of_server(served, &shutdown),
        filled = filled => match filled {
            Ok(_) => {
                status.ready.store(true, Ordering::Relaxed);
                info!(%identity, dry_run = args.dry_run, streamed = clients.streams_lists, "the caches are filled");
                let lead = lead_until(&args, identity, &contexts, &shared, &shutdown, &mut ended, &mut serving);
                let refused = async {
                    match futures::future::try_join_all(ledgers.iter().map(Filling::done)).await {
                        Ok(_) => std::future::pending().await,
                        Err(refused) => refused,
                    }
                };
                tokio::select! {
                    outcome = lead => outcome,
                    refused = refused => Err(refused.into()),
                }
            }
            Err(refused) => Err(refused.into()),
        },
    };
    shutdown.cancel();
    if tokio::time::timeout(DRAIN, supervisor.drain()).await.is_err() {
        warn!("some reconciles did not end in time");
    }
    if outcome.is_ok() {
        Election::new(
            ApiLeaseStore::new(&clients, &args.namespace),
            shared.events.instance().to_owned(),
            args.lease_duration,
            fence,
        )
        .release()
        .await;
    }
    outcome
}

/// Takes part in the election until something ends it.
async fn lead_until(
    args: &Args,
    identity: String,
    contexts: &[Arc<Context>],
    shared: &Arc<Shared>,
    shutdown: &CancellationToken,
    ended: &mut supervision::Endings,
    serving: &mut Serving,
) -> Result<(), RunError> {
    let store = ApiLeaseStore::new(&shared.clients, &args.namespace);
    let election = Election::new(store, identity, args.lease_duration, shared.fence.clone());
    tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        lost = lead(&election, contexts, shared) => Err(RunError::Lost(lost)),
        task = ended.recv() => Err(task.into()),
        served = serving => end_of_server(served, shutdown),
    }
}

/// What the end of the server means: it may only end at shutdown.
fn end_of_server(
    served: Result<Result<(), server::ListenError>, tokio::task::JoinError>,
    shutdown: &CancellationToken,
) -> Result<(), RunError> {
    match served {
        Ok(Err(error)) => Err(RunError::Listen(error)),
        Ok(Ok(())) if shutdown.is_cancelled() => Ok(()),
        _ => Err(Ended::of("server").into()),
    }
}

/// How long the API server is waited for at the start. One that cannot be reached is waited for; one that answers with an
/// error that may pass (it is starting, it is busy, roles are not synced yet) for [`PATIENCE_AT_START`].
struct Patience {
    what: &'static str,
    answered_at: Option<Instant>,
}

impl Patience {
    fn waiting_for(what: &'static str) -> Self {
        Self { what, answered_at: None }
    }

    /// Waits until it is worth asking again; fails if it is not.
    async fn after(&mut self, error: ApiError) -> Result<(), ApiError> {
        let what = self.what;
        if !error.is_transient() {
            return Err(error);
        }
        if error.code().is_none() {
            warn!(%error, "waiting for {what}: the API server cannot be reached");
        } else {
            let since = *self.answered_at.get_or_insert_with(Instant::now);
            if since.elapsed() >= PATIENCE_AT_START {
                return Err(error);
            }
            warn!(%error, "waiting for {what}, at most {} s", PATIENCE_AT_START.as_secs());
        }
        tokio::time::sleep(ASK_AGAIN).await;
        Ok(())
    }
}

/// The master key.
async fn load_tokens(clients: &Clients, namespace: &str) -> Result<Tokens, KeyError> {
    let mut patience = Patience::waiting_for("the operator's key Secret");
    loop {
        match Tokens::load(clients, namespace).await {
            Err(KeyError::Api { namespace, source }) => {
                patience.after(source).await.map_err(|source| KeyError::Api { namespace, source })?;
            }
            other => return other,
        }
    }
}

async fn lead(election: &Election<ApiLeaseStore>, contexts: &[Arc<Context>], shared: &Shared) -> LostLead {
    election.acquire().await;
    shared.metrics.leader.set(1);
    shared.leading_since(jiff::Timestamp::now());
    let _ = shared.leads.set(());
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
    filling: &Filling,
    supervisor: &mut Supervisor,
    status: &server::Status,
) -> Arc<Context> {
    let ctx = Arc::new(Context::new(Arc::clone(shared)));
    let metrics = || -> Metrics { shared.metrics.clone() };
    let news = watches::start(&shared.clients, namespace, &ctx.index, filling);
    let shutdown = supervisor.shutdown();
    supervisor.start("watch", {
        let (ctx, shutdown) = (Arc::clone(&ctx), shutdown.clone());
        async move {
            let mut news = std::pin::pin!(news);
            while let Some(Some(news)) = shutdown.run_until_cancelled(news.next()).await {
                match news {
                    News::Changed(affected) => ctx.enqueue(affected),
                    News::Filled => ctx.enqueue_everything(),
                }
            }
        }
    });
    let workloads = controller::run(
        Arc::new(WorkloadReconciler(Arc::clone(&ctx))),
        ctx.workloads.clone(),
        metrics(),
        shutdown.clone(),
    );
    supervisor.start("workload controller", workloads);
    let policies = controller::run(
        Arc::new(PolicyReconciler(Arc::clone(&ctx))),
        ctx.policies.clone(),
        metrics(),
        shutdown.clone(),
    );
    supervisor.start("policy controller", policies);
    let flag_sets = controller::run(
        Arc::new(FlagSetReconciler(Arc::clone(&ctx))),
        ctx.flag_sets.clone(),
        metrics(),
        shutdown.clone(),
    );
    supervisor.start("flag controller", flag_sets);
    let recoveries = controller::run(
        Arc::new(RecoveryReconciler(Arc::clone(&ctx))),
        ctx.recoveries.clone(),
        metrics(),
        shutdown.clone(),
    );
    supervisor.start("recovery controller", recoveries);
    supervisor.start("prober", prober::run(Arc::clone(&ctx), shutdown.clone()));
    supervisor.start("check prober", checks::prober::run(Arc::clone(&ctx), shutdown));
    status.watch_progress("workload", {
        let queue = ctx.workloads.clone();
        move |now| queue.stuck_for(now)
    });
    status.watch_progress("policy", {
        let queue = ctx.policies.clone();
        move |now| queue.stuck_for(now)
    });
    status.watch_progress("recovery", {
        let queue = ctx.recoveries.clone();
        move |now| queue.stuck_for(now)
    });
    status.watch_progress("flag", {
        let queue = ctx.flag_sets.clone();
        move |now| queue.stuck_for(now)
    });
    ctx
}

/// The watch of the ledger. It begins when this replica leads, so that it has all that another leader made before.
fn start_ledger(ctx: &Arc<Context>, namespace: Option<&str>, supervisor: &mut Supervisor) -> Filling {
    let (ctx, shutdown, filling) = (Arc::clone(ctx), supervisor.shutdown(), Filling::default());
    let news = watches::ledger(&ctx.shared.clients, namespace, &ctx.ledger, &filling);
    supervisor.start("ledger watch", async move {
        if shutdown.run_until_cancelled(ctx.shared.leads.wait()).await.is_none() {
            return;
        }
        let mut news = std::pin::pin!(news);
        while let Some(Some(news)) = shutdown.run_until_cancelled(news.next()).await {
            match news {
                News::Changed(affected) => ctx.enqueue(affected),
                News::Filled => {
                    ctx.ledger.set_filled();
                    ctx.enqueue_everything();
                }
            }
        }
    });
    filling
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "resilience-operator".to_owned(), |name| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    fn refused(code: u16) -> ApiError {
        kube::Error::Api(Status::failure("policies may not be listed", "Refused").with_code(code).boxed()).into()
    }

    /// Meets the same error again and again, and says after what time it was given up, if that was within ten minutes.
    async fn given_up_after(error: impl Fn() -> ApiError) -> Option<(Duration, ApiError)> {
        let (started, mut patience) = (Instant::now(), Patience::waiting_for("the API server"));
        while started.elapsed() < Duration::from_secs(600) {
            if let Err(error) = patience.after(error()).await {
                return Some((started.elapsed(), error));
            }
        }
        None
    }

    #[rstest::rstest]
    #[case::roles_are_not_synced(403)]
    #[case::busy(429)]
    #[case::broken(500)]
    #[case::starting(503)]
    #[tokio::test(start_paused = true)]
    async fn an_error_that_may_pass_is_waited_for_a_minute(#[case] code: u16) {
        let (after, error) = given_up_after(|| refused(code)).await.unwrap();
        assert_eq!(after, PATIENCE_AT_START);
        assert_eq!(error.code(), Some(code));
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_that_will_not_pass_is_not_waited_for() {
        for code in [400, 404] {
            let (after, _) = given_up_after(|| refused(code)).await.unwrap();
            assert_eq!(after, Duration::ZERO, "{code}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_cannot_be_reached_is_waited_for_and_does_not_use_the_minute_up() {
        assert!(given_up_after(|| ApiError::Deadline).await.is_none());
        let mut patience = Patience::waiting_for("the API server");
        for _ in 0..100 {
            patience.after(ApiError::Deadline).await.unwrap();
        }
        patience.after(refused(403)).await.unwrap();
    }

    #[test]
    fn the_end_names_what_could_not_be_done() {
        let policies = RunError::Watch(refused(403)).to_string();
        assert_eq!(
            policies,
            "policies cannot be watched: policies may not be listed; check the operator's roles, and that its CRDs are installed"
        );
        let key = RunError::Key(KeyError::Api { namespace: "home".to_owned(), source: refused(403) }).to_string();
        assert!(key.contains("the Secret resilience-operator-key in namespace home") && key.contains("Role"), "{key}");
    }
}
