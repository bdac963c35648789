//! One watched namespace, or all of them: its caches, its queues of work, and what turns a change into work.
//!
//! Everything that belongs together lives in one namespace, so contexts share nothing but the process.

use crate::{
    args::Args,
    crash_point::CrashPoint,
    error::Backoffs,
    kubernetes::{
        clients::Clients,
        events::Events,
        leader_election::Fence,
        meta::controller,
        watches::{Caches, Change, FlagSet, Policy, flag_set_targets, policy_targets},
    },
    pods::{client::PodClient, state::FleetState, tokens::Tokens},
    telemetry::metrics::Metrics,
};
use contract::WorkloadId;
use futures::channel::mpsc::UnboundedSender;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use kube::{Resource, ResourceExt, runtime::reflector::ObjectRef};
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, OnceLock, PoisonError},
};
use tokio::{sync::Semaphore, time::Instant};

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
    /// Bounds the calls to pods that are under way at once.
    pub pod_calls: Semaphore,
    /// Since when this replica leads; only a leader asks the pods.
    pub leading_since: OnceLock<Timestamp>,
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
}

/// Queues of work.
pub struct Queues {
    /// Workloads to publish and push.
    pub workloads: UnboundedSender<ObjectRef<Deployment>>,
    /// Policies whose status and recovery to look at.
    pub policies: UnboundedSender<ObjectRef<Policy>>,
    /// Flag sets whose status to look at.
    pub flag_sets: UnboundedSender<ObjectRef<FlagSet>>,
}

/// When the generation of an object was first seen, and which workloads it named.
struct Seen {
    generation: i64,
    at: Instant,
    targets: BTreeSet<String>,
}

/// One watched namespace, or all of them.
pub struct Context {
    /// What all contexts share.
    pub shared: Arc<Shared>,
    /// The cluster.
    pub caches: Caches,
    /// The pods.
    pub fleet: FleetState,
    /// Waits after failures.
    pub backoffs: Backoffs,
    /// When what was refused for now was last asked for, by intent.
    pub refused: Mutex<HashMap<String, (Instant, String)>>,
    /// Resource versions from before this process's last write of a status: a cache that still shows one is stale.
    pub written: Mutex<HashMap<String, String>>,
    queues: Queues,
    seen: Mutex<HashMap<String, Seen>>,
}

impl Context {
    /// A ctx over `caches`.
    pub fn new(shared: Arc<Shared>, caches: Caches, queues: Queues) -> Self {
        let (fleet, backoffs, refused, written, seen) = Default::default();
        Self { shared, caches, fleet, backoffs, refused, written, queues, seen }
    }

    /// Turns a change into work.
    pub fn on_change(&self, change: &Change) {
        match change {
            Change::Everything => self.enqueue_everything(),
            Change::Deployment(deployment) => {
                self.enqueue(deployment.metadata.namespace.as_deref(), deployment.metadata.name.as_deref());
            }
            Change::ReplicaSet(set) => {
                let owner = controller(set.owner_references(), "Deployment");
                self.enqueue(set.metadata.namespace.as_deref(), owner.map(|owner| owner.name.as_str()));
            }
            Change::Pod(pod) => {
                if let Some(owner) = self.caches.owner_of(pod) {
                    self.enqueue(pod.metadata.namespace.as_deref(), owner.metadata.name.as_deref());
                } else {
                    for looks_like in self.caches.workloads_selecting(pod) {
                        self.enqueue(pod.metadata.namespace.as_deref(), looks_like.metadata.name.as_deref());
                    }
                }
            }
            Change::ConfigMap(map) => {
                let owner = controller(map.owner_references(), "Deployment");
                self.enqueue(map.metadata.namespace.as_deref(), owner.map(|owner| owner.name.as_str()));
            }
            Change::Job(job) => {
                let owner = controller(job.owner_references(), "Deployment");
                if let (Some(namespace), Some(owner)) = (&job.metadata.namespace, owner) {
                    self.enqueue_status(namespace, &owner.name);
                }
            }
            Change::Policy(policy, gone) => {
                self.enqueue_targets(&**policy, policy_targets(policy).map(str::to_owned).collect(), *gone);
                let _ = self.queues.policies.unbounded_send(ObjectRef::from_obj(policy.as_ref()));
            }
            Change::FlagSet(set, gone) => {
                self.enqueue_targets(&**set, flag_set_targets(set).map(str::to_owned).collect(), *gone);
                let _ = self.queues.flag_sets.unbounded_send(ObjectRef::from_obj(set.as_ref()));
            }
        }
    }

    /// Looks at a workload, and at every policy and flag set that names it.
    fn enqueue(&self, namespace: Option<&str>, name: Option<&str>) {
        if let (Some(namespace), Some(name)) = (namespace, name) {
            self.enqueue_workload(namespace, name);
            self.enqueue_status(namespace, name);
        }
    }

    /// Looks at a workload.
    pub fn enqueue_workload(&self, namespace: &str, name: &str) {
        if self.caches.deployment(namespace, name).is_some() {
            // The receiver is gone only at shutdown.
            let _ = self.queues.workloads.unbounded_send(ObjectRef::new(name).within(namespace));
        } else {
            let id = WorkloadId { namespace: namespace.to_owned(), name: name.to_owned() };
            let gone = self.fleet.lock().remove(&id).unwrap_or_default();
            self.shared.metrics.forget(namespace, name, gone.circuits().keys());
        }
    }

    /// Looks at every policy and flag set that names a workload.
    pub fn enqueue_status(&self, namespace: &str, name: &str) {
        for policy in self.caches.policies_for(namespace, name) {
            let _ = self.queues.policies.unbounded_send(ObjectRef::from_obj(policy.as_ref()));
        }
        for set in self.caches.flag_sets_for(namespace, name) {
            let _ = self.queues.flag_sets.unbounded_send(ObjectRef::from_obj(set.as_ref()));
        }
    }

    /// Looks at all there is: at the start, when this replica comes to lead, and after a watch began anew.
    pub fn enqueue_everything(&self) {
        for deployment in self.caches.deployments.state() {
            let _ = self.queues.workloads.unbounded_send(ObjectRef::from_obj(deployment.as_ref()));
        }
        for policy in self.caches.policies.state() {
            let _ = self.queues.policies.unbounded_send(ObjectRef::from_obj(policy.as_ref()));
        }
        for set in self.caches.flag_sets.state() {
            let _ = self.queues.flag_sets.unbounded_send(ObjectRef::from_obj(set.as_ref()));
        }
    }

    /// Looks at the workloads that an object names, and at those that it named before.
    fn enqueue_targets<K: Resource<DynamicType = ()>>(&self, object: &K, targets: BTreeSet<String>, gone: bool) {
        let Some(namespace) = object.meta().namespace.clone() else { return };
        let uid = object.meta().uid.clone().unwrap_or_default();
        let generation = object.meta().generation.unwrap_or_default();
        let before = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            if gone {
                seen.remove(&uid).map(|seen| seen.targets)
            } else {
                let new = |targets| Seen { generation, at: Instant::now(), targets };
                match seen.get_mut(&uid) {
                    // Only its status changed.
                    Some(old) if old.generation == generation => return,
                    Some(old) => Some(std::mem::replace(old, new(targets.clone())).targets),
                    None => {
                        seen.insert(uid.clone(), new(targets.clone()));
                        None
                    }
                }
            }
        };
        if gone {
            self.backoffs.forget(&uid);
            self.written.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| !key.starts_with(&uid));
        }
        for name in targets.into_iter().chain(before.into_iter().flatten()).collect::<BTreeSet<_>>() {
            self.enqueue(Some(&namespace), Some(&name));
        }
    }

    /// When the present generation of an object was first seen by this process.
    pub fn seen_at(&self, uid: &str, generation: i64) -> Option<Instant> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(uid).filter(|seen| seen.generation == generation).map(|seen| seen.at)
    }

    /// Looks at a workload again after a while.
    pub fn enqueue_workload_later(self: &Arc<Self>, id: WorkloadId, after: std::time::Duration) {
        let ctx = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            ctx.enqueue_workload(&id.namespace, &id.name);
        });
    }
}
