//! One watched namespace, or all of them: what is known of it, its queues of work, and what turns a change into work.
//!
//! Everything that belongs together lives in one namespace, so contexts share nothing but the process.

use crate::{
    args::Args,
    checks::Checks,
    crash_point::CrashPoint,
    fleet::index::{Affected, FleetIndex, ObjectKey, target_id},
    kubernetes::{
        clients::Clients, events::Events, leader_election::Fence, observation::STALE_AFTER, queue::Queue,
        releases::Releases,
    },
    pods::{client::PodClient, fair_queue::FairQueue, prober::ProbeKey, state::FleetState, tokens::Tokens},
    policy::outages::Outages,
    recovery::index::LedgerIndex,
    status::writes::StatusWrites,
    telemetry::metrics::Metrics,
};
use contract::WorkloadId;
use crds::resilience_policy::TargetRef;
use engine::degradation::Beyond;
use jiff::Timestamp;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{OwnedMutexGuard, SetOnce},
    time::Instant,
};

/// What all contexts share.
pub struct Shared {
    /// Command line.
    pub args: Args,
    /// Connections to the API server.
    pub clients: Clients,
    /// Metrics.
    pub metrics: Metrics,
    /// Events.
    pub events: Events,
    /// Whether this replica may act.
    pub fence: Fence,
    /// Tokens of the pods' admin ports.
    pub tokens: Tokens,
    /// Connections to pods.
    pub pods: PodClient,
    /// Who may call a pod now.
    pub pod_calls: FairQueue,
    /// Who may be asked for a check of the operator's own now; its namespaces take turns.
    pub check_calls: FairQueue,
    /// Since when this replica leads; only a leader asks the pods.
    pub leading_since: OnceLock<Timestamp>,
    /// Set when this replica comes to lead.
    pub leads: SetOnce<()>,
    /// Other releases of the operator.
    pub releases: Releases,
    /// This release of the operator, as it marks what it writes: namespace and name of its Lease.
    pub release: String,
}

impl Shared {
    /// Since when this replica leads; `now` if it has just begun.
    pub fn leading_since(&self, now: Timestamp) -> Timestamp {
        *self.leading_since.get_or_init(|| now)
    }

    /// Ends the process if a test told it to end here.
    pub fn crash(&self, point: CrashPoint) {
        point.reached(self.args.crash_at);
    }

    /// Fails as a test told it to, over an object of that name.
    pub async fn fail_for_test(&self, name: &str) {
        if let Some(fault) = &self.args.fault {
            fault.provoke(name).await;
        }
    }
}

/// One watched namespace, or all of them.
pub struct Context {
    /// What all contexts share.
    pub shared: Arc<Shared>,
    /// The cluster.
    pub index: Arc<FleetIndex>,
    /// What is being done and was done.
    pub ledger: Arc<LedgerIndex>,
    /// Since when a workload has had something in flight that no policy decides about.
    orphans: Mutex<HashMap<WorkloadId, Instant>>,
    /// Outages that are not long over.
    outages: Mutex<Outages>,
    /// On which side of a change of its degraded mode the load of a policy's fleet is.
    degradation_timers: Mutex<HashMap<ObjectKey, Beyond>>,
    /// Who may begin something in a namespace now: what is counted over all its policies is counted by one at a time.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// What was published, and what the pods say.
    pub fleet: FleetState,
    /// When what was refused for now was last asked for, by intent.
    pub refused: Mutex<HashMap<String, (Instant, String)>>,
    /// What this process wrote of statuses, and when.
    pub status_writes: StatusWrites,
    /// Workloads to publish and push.
    pub workloads: Queue<WorkloadId>,
    /// Policies whose status and recovery to look at.
    pub policies: Queue<ObjectKey>,
    /// Flag sets whose status to look at.
    pub flag_sets: Queue<ObjectKey>,
    /// Workloads whose ledger to keep in order.
    pub recoveries: Queue<WorkloadId>,
    /// Pods to ask for their health.
    pub probes: Queue<ProbeKey>,
    /// The checks that the operator asks itself.
    pub checks: Checks,
}

impl Context {
    /// A context of which nothing is known yet.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            index: Arc::default(),
            ledger: Arc::default(),
            orphans: Mutex::default(),
            outages: Mutex::default(),
            degradation_timers: Mutex::default(),
            turns: Mutex::default(),
            fleet: FleetState::default(),
            refused: Mutex::default(),
            status_writes: StatusWrites::default(),
            workloads: Queue::default(),
            policies: Queue::default(),
            flag_sets: Queue::default(),
            recoveries: Queue::default(),
            probes: Queue::default(),
            checks: Checks::default(),
        }
    }

    /// Turns a change into work.
    pub fn enqueue(&self, affected: Vec<Affected>) {
        for one in affected {
            match one {
                Affected::Workload(id) => {
                    self.recoveries.enqueue(id.clone());
                    self.enqueue_status(&id);
                    self.enqueue_workload(&id);
                }
                Affected::Status(id) => self.enqueue_status(&id),
                Affected::Policy(key) => self.policies.enqueue(key),
                Affected::FlagSet(key) => self.flag_sets.enqueue(key),
                Affected::Recovery(id) => {
                    for key in self.index.policy_keys_of(&id) {
                        self.policies.enqueue(key);
                    }
                    self.recoveries.enqueue(id);
                }
            }
        }
    }

    /// Waits until nobody else begins something in a namespace; until the answer is dropped, nobody else does.
    pub async fn turn(&self, namespace: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(namespace.to_owned()).or_default())
        };
        turn.lock_owned().await
    }

    /// See the field.
    pub fn outages(&self) -> MutexGuard<'_, Outages> {
        self.outages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub fn degradation_timers(&self) -> MutexGuard<'_, HashMap<ObjectKey, Beyond>> {
        self.degradation_timers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See the field.
    pub fn orphans(&self) -> MutexGuard<'_, HashMap<WorkloadId, Instant>> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at a workload.
    pub fn enqueue_workload(&self, id: &WorkloadId) {
        self.workloads.enqueue(id.clone());
    }

    /// Looks at a workload again after a while.
    pub fn enqueue_workload_after(&self, id: &WorkloadId, after: Duration) {
        self.workloads.enqueue_after(id.clone(), after);
    }

    /// Looks at every policy and flag set that names a workload.
    pub fn enqueue_status(&self, id: &WorkloadId) {
        self.enqueue_status_after(id, Duration::ZERO);
    }

    /// Looks at every policy and flag set that names a workload after a while.
    pub fn enqueue_status_after(&self, id: &WorkloadId, after: Duration) {
        for key in self.index.policy_keys_of(id) {
            self.policies.enqueue_after(key, after);
        }
        for key in self.index.flag_set_keys_of(id) {
            self.flag_sets.enqueue_after(key, after);
        }
    }

    /// Another release of the operator that writes the document of one of these workloads, if one does.
    pub fn managed_elsewhere<'a>(
        &self,
        namespace: &str,
        targets: impl IntoIterator<Item = &'a TargetRef>,
    ) -> Option<String> {
        let ids = targets.into_iter().map(|target| target_id(namespace, target));
        let mut writers = ids.filter_map(|id| self.index.config_map(&id)?.operator.clone());
        writers.find(|writer| *writer != self.shared.release)
    }

    /// Why what the index shows may be too old to act on, if it may.
    pub fn observer_stale(&self) -> Option<String> {
        let (path, age) = self.shared.clients.observation.stale(Instant::now())?;
        let (age, limit) = (age.as_secs(), STALE_AFTER.as_secs());
        Some(format!("the watch of {path} has heard nothing from the API server for {age} s (the limit is {limit} s)"))
    }

    /// Looks at all there is: when this replica comes to lead.
    pub fn enqueue_everything(&self) {
        self.enqueue(self.index.everything());
        for id in self.ledger.workloads() {
            self.recoveries.enqueue(id);
        }
    }
}
