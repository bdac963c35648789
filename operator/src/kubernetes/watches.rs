//! What the operator knows of the cluster: one watch and one cache for each kind.
//!
//! Objects are stripped to what decisions need before they are kept: ten thousand pods have to fit into memory.

use super::{
    clients::Clients,
    guard::Guard,
    meta::{FIELD_MANAGER, INTENT_LABEL, controller},
};
use crds::{FeatureFlag, ResiliencePolicy};
use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    batch::v1::{Job, JobSpec},
    core::v1::{ConfigMap, Pod, PodTemplateSpec},
};
use kube::{
    Api, Resource, ResourceExt,
    core::{NamespaceResourceScope, PartialObjectMeta},
    runtime::{
        WatchStreamExt,
        reflector::{self, ObjectRef, Store},
        watcher::{self, Event, watcher},
    },
};
use serde::de::DeserializeOwned;
use std::{fmt::Debug, sync::Arc};
use tracing::warn;

/// A policy, or the reason why it cannot be read. One unreadable object must not hide all others.
pub type Policy = Guard<ResiliencePolicy>;
/// A flag set, or the reason why it cannot be read.
pub type FlagSet = Guard<FeatureFlag>;

/// The caches of one watched namespace, or of all.
pub struct Caches {
    /// Workloads.
    pub deployments: Store<Deployment>,
    /// Between workloads and pods.
    pub replica_sets: Store<PartialObjectMeta<ReplicaSet>>,
    /// Pods.
    pub pods: Store<Pod>,
    /// ConfigMaps that carry our label.
    pub config_maps: Store<ConfigMap>,
    /// Jobs that were made for an intent.
    pub jobs: Store<Job>,
    /// Policies.
    pub policies: Store<Policy>,
    /// Flag sets.
    pub flag_sets: Store<FlagSet>,
}

/// Something changed; the reference says what.
#[derive(Clone, Debug)]
pub enum Change {
    /// A workload.
    Deployment(Arc<Deployment>),
    /// What joins a workload to its pods.
    ReplicaSet(Arc<PartialObjectMeta<ReplicaSet>>),
    /// A pod.
    Pod(Arc<Pod>),
    /// A ConfigMap of ours.
    ConfigMap(Arc<ConfigMap>),
    /// A Job of ours.
    Job(Arc<Job>),
    /// A policy; the flag says that it is gone.
    Policy(Arc<Policy>, bool),
    /// A flag set; the flag says that it is gone.
    FlagSet(Arc<FlagSet>, bool),
    /// A watch began anew: anything may have changed meanwhile.
    Everything,
}

impl Caches {
    /// Starts the watches. The stream yields every change after its cache shows it; it ends only with the process.
    pub fn start(clients: &Clients, namespace: Option<&str>) -> (Self, impl Stream<Item = Change> + Send + use<>) {
        let (deployments, writer) = reflector::store();
        let deployment_changes = changes(watcher(api(clients, namespace), config()), writer, strip_deployment)
            .map(|change| change.map_or(Change::Everything, |(object, _)| Change::Deployment(object)));
        let (replica_sets, writer) = reflector::store();
        let replica_set_changes =
            changes(watcher(api::<PartialObjectMeta<ReplicaSet>>(clients, namespace), config()), writer, strip)
                .map(|change| change.map_or(Change::Everything, |(set, _)| Change::ReplicaSet(set)));
        let (pods, writer) = reflector::store();
        let pod_changes = changes(watcher(api(clients, namespace), config()), writer, strip_pod)
            .map(|change| change.map_or(Change::Everything, |(pod, _)| Change::Pod(pod)));
        let (config_maps, writer) = reflector::store();
        let ours = config().labels(&format!("app.kubernetes.io/managed-by={FIELD_MANAGER}"));
        let config_map_changes = changes(watcher(api(clients, namespace), ours), writer, strip)
            .map(|change| change.map_or(Change::Everything, |(map, _)| Change::ConfigMap(map)));
        let (jobs, writer) = reflector::store();
        let for_intents = config().labels(INTENT_LABEL);
        let job_changes = changes(watcher(api(clients, namespace), for_intents), writer, strip_job)
            .map(|change| change.map_or(Change::Everything, |(job, _)| Change::Job(job)));
        let (policies, writer) = reflector::store();
        let policy_changes = changes(watcher(api(clients, namespace), config()), writer, strip)
            .map(|change| change.map_or(Change::Everything, |(policy, gone)| Change::Policy(policy, gone)));
        let (flag_sets, writer) = reflector::store();
        let flag_changes = changes(watcher(api(clients, namespace), config()), writer, strip)
            .map(|change| change.map_or(Change::Everything, |(flags, gone)| Change::FlagSet(flags, gone)));
        let streams = futures::stream::select_all([
            deployment_changes.boxed(),
            replica_set_changes.boxed(),
            pod_changes.boxed(),
            config_map_changes.boxed(),
            job_changes.boxed(),
            policy_changes.boxed(),
            flag_changes.boxed(),
        ]);
        (Self { deployments, replica_sets, pods, config_maps, jobs, policies, flag_sets }, streams)
    }

    /// Waits until every cache has been filled once.
    pub async fn ready(&self) {
        let all = futures::join!(
            self.deployments.wait_until_ready(),
            self.replica_sets.wait_until_ready(),
            self.pods.wait_until_ready(),
            self.config_maps.wait_until_ready(),
            self.jobs.wait_until_ready(),
            self.policies.wait_until_ready(),
            self.flag_sets.wait_until_ready(),
        );
        // An error means that the watch is gone, and with it the process.
        let _ = all;
    }

    /// A workload by name.
    pub fn deployment(&self, namespace: &str, name: &str) -> Option<Arc<Deployment>> {
        self.deployments.get(&ObjectRef::new(name).within(namespace))
    }

    /// The workload that a pod belongs to: by owner references, never by labels, which anybody can give a pod.
    pub fn owner_of(&self, pod: &Pod) -> Option<Arc<Deployment>> {
        let namespace = pod.metadata.namespace.as_deref()?;
        let to_set = controller(pod.owner_references(), "ReplicaSet")?;
        let set = self.replica_sets.get(&ObjectRef::new(&to_set.name).within(namespace))?;
        if set.metadata.uid.as_deref() != Some(to_set.uid.as_str()) {
            return None;
        }
        let to_deployment = controller(set.owner_references(), "Deployment")?;
        let deployment = self.deployment(namespace, &to_deployment.name)?;
        (deployment.metadata.uid.as_deref() == Some(to_deployment.uid.as_str())).then_some(deployment)
    }

    /// The pods of a workload that are not going away, by name.
    pub fn pods_of(&self, deployment: &Deployment) -> Vec<Arc<Pod>> {
        let uid = deployment.metadata.uid.as_deref();
        let mut pods: Vec<_> = self
            .pods
            .state()
            .into_iter()
            .filter(|pod| {
                pod.metadata.namespace == deployment.metadata.namespace && pod.metadata.deletion_timestamp.is_none()
            })
            .filter(|pod| !matches!(phase(pod), Some("Succeeded" | "Failed")))
            .filter(|pod| self.owner_of(pod).is_some_and(|owner| owner.metadata.uid.as_deref() == uid))
            .collect();
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        pods
    }

    /// The workloads whose labels a pod carries.
    pub fn workloads_selecting(&self, pod: &Pod) -> Vec<Arc<Deployment>> {
        self.deployments.state_filter(|deployment| {
            deployment.metadata.namespace == pod.metadata.namespace && has_labels_of(pod, deployment)
        })
    }

    /// Names of pods that carry the labels of a workload and do not belong to it.
    pub fn unowned_pods(&self, deployment: &Deployment) -> Vec<String> {
        let uid = deployment.metadata.uid.as_deref();
        let mut names: Vec<_> = self
            .pods
            .state()
            .into_iter()
            .filter(|pod| {
                pod.metadata.namespace == deployment.metadata.namespace && pod.metadata.deletion_timestamp.is_none()
            })
            .filter(|pod| has_labels_of(pod, deployment))
            .filter(|pod| self.owner_of(pod).is_none_or(|owner| owner.metadata.uid.as_deref() != uid))
            .map(|pod| pod.name_any())
            .collect();
        names.sort();
        names
    }

    /// The Jobs that were made for intents about a workload.
    pub fn jobs_of(&self, deployment: &Deployment) -> Vec<Arc<Job>> {
        let (namespace, uid) = (&deployment.metadata.namespace, deployment.metadata.uid.as_deref());
        self.jobs.state_filter(|job| {
            job.metadata.namespace == *namespace
                && controller(job.owner_references(), "Deployment").is_some_and(|owner| Some(owner.uid.as_str()) == uid)
        })
    }

    /// The pods that a Job started, the newest first.
    pub fn pods_of_job(&self, job: &Job) -> Vec<Arc<Pod>> {
        let (namespace, uid) = (&job.metadata.namespace, job.metadata.uid.as_deref());
        let mut pods = self.pods.state_filter(|pod| {
            pod.metadata.namespace == *namespace
                && controller(pod.owner_references(), "Job").is_some_and(|owner| Some(owner.uid.as_str()) == uid)
        });
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.creation_timestamp().map(|time| time.0)));
        pods
    }

    /// The policies that name a workload.
    pub fn policies_for(&self, namespace: &str, workload: &str) -> Vec<Arc<Policy>> {
        self.policies.state_filter(|policy| {
            policy.namespace().as_deref() == Some(namespace) && policy_targets(policy).any(|name| name == workload)
        })
    }

    /// The flag sets that name a workload.
    pub fn flag_sets_for(&self, namespace: &str, workload: &str) -> Vec<Arc<FlagSet>> {
        self.flag_sets.state_filter(|set| {
            set.namespace().as_deref() == Some(namespace) && flag_set_targets(set).any(|name| name == workload)
        })
    }
}

/// The workloads that a policy names; none, if it cannot be read.
pub fn policy_targets(policy: &Policy) -> impl Iterator<Item = &str> {
    policy.0.iter().flat_map(|policy| &policy.spec.target_refs).map(|target| target.name.as_str())
}

/// The workloads that a flag set names; none, if it cannot be read.
pub fn flag_set_targets(set: &FlagSet) -> impl Iterator<Item = &str> {
    set.0.iter().flat_map(|set| &set.spec.target_refs).map(|target| target.name.as_str())
}

/// Whether a pod carries the labels by which a workload selects its pods.
fn has_labels_of(pod: &Pod, deployment: &Deployment) -> bool {
    let wanted = deployment.spec.selector.match_labels.as_ref().filter(|labels| !labels.is_empty());
    wanted.is_some_and(|wanted| wanted.iter().all(|(key, value)| pod.labels().get(key) == Some(value)))
}

/// Phase of a pod.
fn phase(pod: &Pod) -> Option<&str> {
    pod.status.as_ref()?.phase.as_deref()
}

/// Whether Kubernetes calls a pod Ready.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
    conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

fn config() -> watcher::Config {
    watcher::Config::default()
}

fn api<K>(clients: &Clients, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(clients.watch.clone(), namespace),
        None => Api::all(clients.watch.clone()),
    }
}

/// Keeps a store filled from a watch, and yields what changed; `None` when the watch has filled it anew. Errors of the
/// watch are logged, and it goes on.
fn changes<K>(
    watch: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
    writer: reflector::store::Writer<K>,
    strip: fn(&mut K),
) -> impl Stream<Item = Option<(Arc<K>, bool)>> + Send
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let kind = K::kind(&()).into_owned();
    watch
        .default_backoff()
        .modify(strip)
        .reflect(writer)
        .inspect_err(move |error| warn!(kind, %error, "a watch failed; it is started again"))
        .filter_map(|event| {
            std::future::ready(match event {
                Ok(Event::Apply(object)) => Some(Some((Arc::new(object), false))),
                Ok(Event::Delete(object)) => Some(Some((Arc::new(object), true))),
                Ok(Event::InitDone) => Some(None),
                Ok(Event::Init | Event::InitApply(_)) | Err(_) => None,
            })
        })
}

fn strip<K: Resource>(object: &mut K) {
    object.meta_mut().managed_fields = None;
}

fn strip_deployment(deployment: &mut Deployment) {
    strip(deployment);
    deployment.metadata.annotations = None;
    deployment.spec.template = PodTemplateSpec::default();
}

fn strip_job(job: &mut Job) {
    strip(job);
    job.metadata.annotations = None;
    job.spec = job.spec.as_ref().map(|_| JobSpec::default());
}

fn strip_pod(pod: &mut Pod) {
    strip(pod);
    pod.metadata.annotations = None;
    if let Some(spec) = &mut pod.spec {
        let ports = spec
            .containers
            .iter_mut()
            .map(|container| k8s_openapi::api::core::v1::Container {
                name: std::mem::take(&mut container.name),
                ports: container.ports.take(),
                ..Default::default()
            })
            .collect();
        *spec = k8s_openapi::api::core::v1::PodSpec { containers: ports, ..Default::default() };
    }
    if let Some(status) = &mut pod.status {
        *status = k8s_openapi::api::core::v1::PodStatus {
            phase: status.phase.take(),
            pod_ip: status.pod_ip.take(),
            conditions: status.conditions.take().map(|mut all| {
                all.retain(|condition| condition.type_ == "Ready");
                all
            }),
            ..Default::default()
        };
    }
}
