//! Facts about objects: what decisions need, read straight from the API server's answer, and nothing else.
//!
//! Reading drops everything that is not listed here before it is ever stored: ten thousand pods have to fit into memory,
//! and an object's size is up to its author. Every list and text that is kept has a bound.

use super::pod_signals::{self, RawContainerStatus};
use crate::kubernetes::meta::{INTENT_LABEL, OPERATOR_ANNOTATION, RESTARTED_BY_ANNOTATION, ROLLBACK_TO_LABEL, cut};
use contract::{WorkloadId, WorkloadKind, admin, signing};
use engine::{
    recovery::JobState,
    signals::{PodSignals, Progress},
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, ReplicaSet, StatefulSet},
        batch::v1::Job,
        core::v1::{ConfigMap, Pod},
    },
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time},
};
use kube::{
    Resource,
    core::{NamespaceResourceScope, PartialObjectMeta},
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny},
};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    marker::PhantomData,
    net::IpAddr,
    sync::Arc,
};

/// Most labels of a pod, or of a selector, that are compared.
pub const MAX_LABELS: usize = 32;
/// Most named ports of a pod that are kept.
const MAX_NAMED_PORTS: usize = 16;
/// Longest name of a port that is kept, in bytes; the API server takes none that is longer.
const MAX_PORT_NAME: usize = 15;
/// Port of a pod that serves the public when no container names one.
const DEFAULT_PUBLIC_PORT: u16 = 8080;
/// Longest text of a Job's condition that is kept, in bytes.
const MAX_JOB_MESSAGE: usize = 512;
/// Longest text of a workload's condition that is kept, in bytes.
const MAX_WORDS: usize = 256;

/// Uid of an object.
pub type Uid = Arc<str>;

/// An object as it is read from the API server: which one it is, and the facts that are kept of it.
#[derive(Clone)]
pub struct Seen<F> {
    /// Name, namespace, uid and version; the rest of the metadata is not kept.
    pub metadata: ObjectMeta,
    /// What is kept.
    pub facts: F,
}

/// What is kept of a kind of object.
pub trait Facts: Sized {
    /// The kind.
    type Kind: Resource<DynamicType = (), Scope = NamespaceResourceScope>;
    /// The parts of the object that are read.
    type Raw: DeserializeOwned;
    /// Picks the facts.
    fn pick(raw: Self::Raw) -> (RawMeta, Self);
}

/// The metadata that is read.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub struct RawMeta {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
    generation: Option<i64>,
    creation_timestamp: Option<Time>,
    deletion_timestamp: Option<Time>,
    owner_references: Option<Vec<OwnerReference>>,
    labels: Option<BTreeMap<String, String>>,
    annotations: RawAnnotations,
    managed_fields: Option<Vec<RawManager>>,
}

/// The parts that are read of what somebody has written of an object.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawManager {
    manager: String,
    operation: String,
    subresource: Option<String>,
    fields_v1: RawFields,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawFields {
    #[serde(rename = "f:spec")]
    spec: RawSpecFields,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawSpecFields {
    #[serde(rename = "f:template")]
    template: Option<RawTemplateFields>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTemplateFields {
    #[serde(rename = "f:spec")]
    spec: Option<IgnoredAny>,
}

/// Names of managers that write a template again and again from a repository, though they do not apply it on the server.
const GITOPS: [&str; 7] =
    ["argocd", "flux", "kustomize-controller", "helm-controller", "fleet", "config-sync", "kapp-controller"];

impl RawManager {
    /// Whether it puts the template back when somebody else changes it: what applies on the server and is no person at a
    /// command line does, and what is known to.
    fn reasserts_template(&self) -> bool {
        let of_template = self.fields_v1.spec.template.as_ref().is_some_and(|template| template.spec.is_some());
        let applies = self.operation == "Apply" && !self.manager.starts_with("kubectl");
        let known = || GITOPS.iter().any(|name| self.manager.starts_with(name));
        self.subresource.is_none() && of_template && (applies || known())
    }
}

/// The annotations that are read.
#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAnnotations {
    #[serde(rename = "resilience.ticketwave.io/admin-auth")]
    admin_auth: Option<String>,
    #[serde(rename = "resilience.ticketwave.io/pause-recovery")]
    pause_recovery: Option<String>,
    #[serde(rename = "resilience.ticketwave.io/restarted-by")]
    restarted_by: Option<String>,
    #[serde(rename = "resilience.ticketwave.io/rolled-back-by")]
    rolled_back_by: Option<String>,
}

/// The id of an intent that an annotation carries. Anybody may have written it.
fn intent(annotation: Option<&str>) -> Option<Box<str>> {
    annotation.map(|id| cut(id, 64).into())
}

/// Label of a pod to which nothing is to be done.
const EXCLUDE_LABEL: &str = "resilience.ticketwave.io/exclude-from-recovery";

impl RawMeta {
    fn id(&self, kind: WorkloadKind) -> WorkloadId {
        WorkloadId::new(self.namespace.clone().unwrap_or_default(), kind, self.name.clone().unwrap_or_default())
    }

    fn created_at(&self) -> Timestamp {
        self.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
    }

    fn shared_uid(&self) -> Uid {
        self.uid.as_deref().unwrap_or_default().into()
    }
}

impl<'de, F: Facts> Deserialize<'de> for Seen<F> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (raw, facts) = F::pick(F::Raw::deserialize(deserializer)?);
        let RawMeta { name, namespace, uid, resource_version, .. } = raw;
        Ok(Self { metadata: ObjectMeta { name, namespace, uid, resource_version, ..ObjectMeta::default() }, facts })
    }
}

impl<F: Facts> std::fmt::Debug for Seen<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}/{:?}", F::Kind::kind(&()), self.metadata.namespace, self.metadata.name)
    }
}

impl<F: Facts> Resource for Seen<F> {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        Cow::Owned(F::Kind::kind(&()).into_owned())
    }

    fn group((): &()) -> Cow<'_, str> {
        Cow::Owned(F::Kind::group(&()).into_owned())
    }

    fn version((): &()) -> Cow<'_, str> {
        Cow::Owned(F::Kind::version(&()).into_owned())
    }

    fn plural((): &()) -> Cow<'_, str> {
        Cow::Owned(F::Kind::plural(&()).into_owned())
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// Nothing but which version of an object of kind `K` it is.
#[derive(Clone)]
pub struct Version<K>(PhantomData<K>);

/// The parts of any object that tell its version.
#[derive(Deserialize)]
pub struct RawVersion {
    #[serde(default)]
    metadata: RawMeta,
}

impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>> Facts for Version<K> {
    type Kind = K;
    type Raw = RawVersion;

    fn pick(raw: RawVersion) -> (RawMeta, Self) {
        (raw.metadata, Self(PhantomData))
    }
}

/// Hashes of labels within their namespace, sorted: whether one set holds another can be told without keeping the texts.
pub type LabelHashes = Box<[u64]>;

/// Hashes of the first [`MAX_LABELS`] labels.
pub fn label_hashes(namespace: Option<&str>, labels: Option<&BTreeMap<String, String>>) -> LabelHashes {
    let hash = |label: (&String, &String)| {
        let mut hasher = DefaultHasher::new();
        (namespace, label).hash(&mut hasher);
        hasher.finish()
    };
    let mut hashes: Vec<_> = labels.into_iter().flatten().take(MAX_LABELS).map(hash).collect();
    hashes.sort_unstable();
    hashes.into()
}

/// The controller of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodOwner {
    /// A ReplicaSet, most likely of a Deployment.
    ReplicaSet,
    /// A StatefulSet.
    StatefulSet,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct PodFacts {
    /// Which pod.
    pub uid: Uid,
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// What controls it: by owner references, never by labels, which anybody can give a pod.
    pub owner: Option<(PodOwner, Uid)>,
    /// Its labels.
    pub labels: LabelHashes,
    /// Its address.
    pub ip: Option<IpAddr>,
    /// Port of its admin server.
    pub admin_port: u16,
    /// Port on which it serves the public.
    pub public_port: u16,
    /// Its TCP ports that have a name.
    pub named_ports: Box<[(Box<str>, u16)]>,
    /// Its address is its node's, where anything may listen.
    pub host_network: bool,
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// Whether the kubelet calls it ready, or ever did.
    pub readiness: Readiness,
    /// It runs, or will: it is neither being deleted nor over.
    pub alive: bool,
    /// Its annotation says that it understands signed requests: it is never sent a token.
    pub signs: bool,
    /// Its label says that nothing is to be done to it.
    pub excluded: bool,
    /// What the kubelet says of it.
    pub signals: PodSignals,
}

/// Whether a kubelet calls a pod ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It never has.
    Never,
    /// It has, and does not now.
    NotNow,
    /// It does.
    Ready,
}

impl PodFacts {
    /// Whether the kubelet calls it ready.
    pub fn is_ready(&self) -> bool {
        self.readiness == Readiness::Ready
    }

    /// The TCP port of that name.
    pub fn named_port(&self, name: &str) -> Option<u16> {
        self.named_ports.iter().find(|(known, _)| **known == *name).map(|(_, port)| *port)
    }
}

/// The parts of a pod that are read.
#[derive(Deserialize)]
pub struct RawPod {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    spec: RawPodSpec,
    #[serde(default)]
    status: RawPodStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawPodSpec {
    containers: Vec<RawContainer>,
    init_containers: Vec<RawContainer>,
    host_network: Option<bool>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainer {
    #[serde(default)]
    ports: Vec<RawPort>,
    restart_policy: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPort {
    name: Option<String>,
    container_port: i32,
    protocol: Option<String>,
}

/// The named TCP ports of the containers, and of those init containers that go on beside them; of two of one name the first,
/// as for a Service.
fn named_ports(spec: &RawPodSpec) -> Box<[(Box<str>, u16)]> {
    let goes_on = |container: &&RawContainer| container.restart_policy.as_deref() == Some("Always");
    let containers = spec.containers.iter().chain(spec.init_containers.iter().filter(goes_on));
    let ports = containers.flat_map(|container| &container.ports);
    let tcp = ports.filter(|port| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP"));
    let named = tcp.filter_map(|port| {
        let name = port.name.as_deref().filter(|name| name.len() <= MAX_PORT_NAME)?;
        Some((name.into(), u16::try_from(port.container_port).ok()?))
    });
    named.take(MAX_NAMED_PORTS).collect()
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawPodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    start_time: Option<Time>,
    conditions: Option<Vec<RawCondition>>,
    pub(super) init_container_statuses: Option<Vec<RawContainerStatus>>,
    pub(super) container_statuses: Option<Vec<RawContainerStatus>>,
}

/// How long after a pod was taken up by its kubelet that may call it not ready for the first time.
const FIRST_WORD: SignedDuration = SignedDuration::from_secs(2);

impl RawPodStatus {
    pub(super) fn condition(&self, type_: &str) -> Option<&RawCondition> {
        self.conditions.iter().flatten().find(|condition| condition.type_ == type_)
    }

    /// A kubelet calls a pod not ready as it takes it up, and notes when it last changed its mind: later than that only if it
    /// has called it ready meanwhile. Both times are of one clock.
    fn readiness(&self) -> Readiness {
        let ready = self.condition("Ready");
        if ready.is_some_and(|ready| ready.status == "True") {
            return Readiness::Ready;
        }
        let changed_at = ready.and_then(|ready| ready.last_transition_time.as_ref());
        let times = self.start_time.as_ref().zip(changed_at);
        let changed = times.is_some_and(|(start, changed)| changed.0.duration_since(start.0) > FIRST_WORD);
        if changed { Readiness::NotNow } else { Readiness::Never }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RawCondition {
    #[serde(rename = "type", default)]
    type_: String,
    #[serde(default)]
    pub(super) status: String,
    pub(super) reason: Option<String>,
    pub(super) message: Option<String>,
    pub(super) last_transition_time: Option<Time>,
    last_update_time: Option<Time>,
}

impl Facts for PodFacts {
    type Kind = Pod;
    type Raw = RawPod;

    fn pick(raw: RawPod) -> (RawMeta, Self) {
        let RawPod { metadata, spec, status } = raw;
        let owner = metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        let owner = owner.and_then(|owner| match owner.kind.as_str() {
            "ReplicaSet" => Some((PodOwner::ReplicaSet, owner.uid.as_str().into())),
            "StatefulSet" => Some((PodOwner::StatefulSet, owner.uid.as_str().into())),
            _ => None,
        });
        let port = |name: &str, otherwise: u16| {
            let mut named = spec.containers.iter().flat_map(|container| &container.ports);
            let port = named.find(|port| port.name.as_deref() == Some(name));
            port.and_then(|port| u16::try_from(port.container_port).ok()).unwrap_or(otherwise)
        };
        let readiness = status.readiness();
        let signals = pod_signals::pick(&status, metadata.created_at());
        let facts = Self {
            uid: metadata.shared_uid(),
            namespace: metadata.namespace.as_deref().unwrap_or_default().into(),
            name: metadata.name.as_deref().unwrap_or_default().into(),
            owner,
            labels: label_hashes(metadata.namespace.as_deref(), metadata.labels.as_ref()),
            ip: status.pod_ip.and_then(|ip| ip.parse().ok()),
            admin_port: port(admin::PORT_NAME, admin::DEFAULT_PORT),
            public_port: port("http", DEFAULT_PUBLIC_PORT),
            named_ports: named_ports(&spec),
            host_network: spec.host_network == Some(true),
            created_at: metadata.created_at(),
            readiness,
            alive: metadata.deletion_timestamp.is_none()
                && !matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            signs: metadata.annotations.admin_auth.as_deref() == Some(signing::SCHEME),
            excluded: metadata.labels.iter().flatten().any(|(key, value)| key == EXCLUDE_LABEL && value == "true"),
            signals,
        };
        (metadata, facts)
    }
}

/// A Deployment or a StatefulSet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadFacts {
    /// Kind, namespace and name.
    pub id: WorkloadId,
    /// Which object of that name.
    pub uid: Uid,
    /// The labels by which it selects its pods; empty: none that can be compared.
    pub selector: LabelHashes,
    /// Pods that it is to have.
    pub wanted: usize,
    /// How far a change of its template has come.
    pub rollout: Rollout,
    /// Why nothing is to be begun to recover it, if its annotation says so.
    pub paused: Option<String>,
    /// It has the mark of a rollback.
    pub marked: bool,
}

/// How far a change of a workload's template has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rollout {
    /// Pods of an old template are still being replaced.
    pub in_progress: bool,
    /// What a person should know of how its pods are replaced, if it is not the usual way.
    pub note: Option<String>,
    /// What the controller of a Deployment says of it.
    pub progress: Option<Progress>,
    /// All pods that are wanted are of the present template, and available.
    pub complete: bool,
    /// Why a change of the template replaces no pods, if it does not.
    pub held: Option<&'static str>,
    /// All its pods are taken away before others come.
    pub recreates: bool,
    /// Id of the restart of all pods that the template carries.
    pub restarted_by: Option<Box<str>>,
    /// Id of the rollback that the workload carries.
    pub rolled_back_by: Option<Box<str>>,
    /// Who puts the template back when somebody changes it.
    pub template_owner: Option<Box<str>>,
}

/// The parts of a workload that are read.
#[derive(Deserialize)]
pub struct RawWorkload {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    spec: RawWorkloadSpec,
    #[serde(default)]
    status: RawWorkloadStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawWorkloadSpec {
    replicas: Option<i32>,
    selector: RawSelector,
    template: RawTemplate,
    strategy: RawStrategy,
    update_strategy: RawStrategy,
    paused: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTemplate {
    metadata: RawTemplateMeta,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTemplateMeta {
    annotations: RawAnnotations,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSelector {
    match_labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawStrategy {
    #[serde(rename = "type")]
    type_: Option<String>,
    rolling_update: Option<RawRollingUpdate>,
}

impl RawStrategy {
    /// Pods of a StatefulSet with a lower ordinal keep an older template.
    fn partition(&self) -> i32 {
        self.rolling_update.as_ref().and_then(|rolling| rolling.partition).unwrap_or(0)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRollingUpdate {
    partition: Option<i32>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawWorkloadStatus {
    observed_generation: Option<i64>,
    replicas: Option<i32>,
    updated_replicas: Option<i32>,
    available_replicas: Option<i32>,
    current_revision: Option<String>,
    update_revision: Option<String>,
    conditions: Option<Vec<RawCondition>>,
}

impl RawWorkloadStatus {
    fn condition(&self, type_: &str) -> Option<&RawCondition> {
        self.conditions.iter().flatten().find(|condition| condition.type_ == type_)
    }
}

fn workload(kind: WorkloadKind, raw: RawWorkload, rollout: Rollout) -> (RawMeta, WorkloadFacts) {
    let RawWorkload { metadata, spec, status } = raw;
    let wanted = spec.replicas.unwrap_or(1);
    let (all, updated) = (status.replicas.unwrap_or(0), status.updated_replicas.unwrap_or(0));
    let partition = spec.update_strategy.partition();
    let kept = partition.clamp(0, wanted);
    let held = match spec.update_strategy.type_.as_deref() {
        _ if spec.paused => Some("its rollout is paused"),
        Some("OnDelete") => Some("its pods are replaced only when somebody deletes them (OnDelete)"),
        _ if kept > 0 && kept == wanted => Some("all its pods keep their template (updateStrategy.partition)"),
        _ => None,
    };
    let seen = status.observed_generation.is_some() && status.observed_generation >= metadata.generation;
    let owner = metadata.managed_fields.iter().flatten().find(|manager| manager.reasserts_template());
    let rollout = Rollout {
        complete: seen
            && updated >= wanted - kept
            && all <= updated + kept
            && status.available_replicas.unwrap_or(0) >= wanted,
        restarted_by: intent(spec.template.metadata.annotations.restarted_by.as_deref()),
        rolled_back_by: intent(metadata.annotations.rolled_back_by.as_deref()),
        held,
        recreates: spec.strategy.type_.as_deref() == Some("Recreate"),
        template_owner: owner.map(|manager| cut(&manager.manager, MAX_WORDS).into()),
        ..rollout
    };
    let facts = WorkloadFacts {
        id: metadata.id(kind),
        uid: metadata.shared_uid(),
        selector: label_hashes(metadata.namespace.as_deref(), spec.selector.match_labels.as_ref()),
        wanted: spec.replicas.map_or(1, |wanted| usize::try_from(wanted).unwrap_or(0)),
        rollout,
        paused: metadata.annotations.pause_recovery.as_deref().map(|why| cut(why, MAX_WORDS).to_owned()),
        marked: metadata.labels.iter().flatten().any(|(key, _)| key == ROLLBACK_TO_LABEL),
    };
    (metadata, facts)
}

/// A Deployment.
#[derive(Clone, Debug)]
pub struct DeploymentFacts(pub WorkloadFacts);

impl Facts for DeploymentFacts {
    type Kind = Deployment;
    type Raw = RawWorkload;

    fn pick(raw: RawWorkload) -> (RawMeta, Self) {
        let rollout = deployment_rollout(&raw);
        let (metadata, facts) = workload(WorkloadKind::Deployment, raw, rollout);
        (metadata, Self(facts))
    }
}

/// A Deployment is being rolled out from the edit of its template until all pods are of the new one, or until its deadline.
/// Pods that are only missing, because it was scaled or because nobody may make them, are no rollout.
fn deployment_rollout(raw: &RawWorkload) -> Rollout {
    let (wanted, status) = (raw.spec.replicas.unwrap_or(1), &raw.status);
    let Some(observed) = status.observed_generation else { return Rollout::default() };
    let said = |condition: &RawCondition| {
        let words = condition.message.as_deref().or(condition.reason.as_deref()).unwrap_or_default();
        cut(words, MAX_WORDS).to_owned()
    };
    let blocked = status.condition("ReplicaFailure").filter(|condition| condition.status == "True");
    let blocked = blocked.map(|condition| format!("pods cannot be made: {}", said(condition)));
    let progressing = status.condition("Progressing");
    let reason = progressing.and_then(|condition| condition.reason.as_deref());
    let stuck = progressing.filter(|_| reason == Some("ProgressDeadlineExceeded"));
    let stuck = stuck.map(|condition| format!("its rollout does not progress: {}", said(condition)));
    let updated = status.updated_replicas.unwrap_or(0);
    let old_pods = status.replicas.unwrap_or(0) > updated;
    // Once all pods are of the new template, another reason stands there, and goes on to while it is scaled.
    let moves = matches!(reason, Some("NewReplicaSetCreated" | "FoundNewReplicaSet" | "ReplicaSetUpdated"));
    let replacing = old_pods || (moves && updated < wanted);
    let paused = (raw.spec.paused && replacing).then(|| "it is paused in the middle of a rollout".to_owned());
    let behind = Some(observed) < raw.metadata.generation;
    let in_progress = behind || (replacing && stuck.is_none() && !raw.spec.paused);
    // What it says of another template says nothing of this one.
    let progress = progressing.filter(|_| !behind).and_then(|condition| {
        let exceeded = reason == Some("ProgressDeadlineExceeded");
        // The time of the last change tells since when it is stuck; that of the last step, since when it is done.
        let (changed, updated) = (&condition.last_transition_time, &condition.last_update_time);
        let since = if exceeded { changed.as_ref() } else { updated.as_ref().or(changed.as_ref()) };
        Some(Progress { progresses: !exceeded, since: since?.0, message: said(condition).into() })
    });
    Rollout { in_progress, note: blocked.or(stuck).or(paused), progress, ..Rollout::default() }
}

/// A StatefulSet.
#[derive(Clone, Debug)]
pub struct StatefulSetFacts(pub WorkloadFacts);

impl Facts for StatefulSetFacts {
    type Kind = StatefulSet;
    type Raw = RawWorkload;

    fn pick(raw: RawWorkload) -> (RawMeta, Self) {
        let rollout = stateful_rollout(&raw);
        let (metadata, facts) = workload(WorkloadKind::StatefulSet, raw, rollout);
        (metadata, Self(facts))
    }
}

/// A StatefulSet replaces its pods from the highest ordinal down to its partition, or, with `OnDelete`, never by itself:
/// what it leaves alone on purpose is no rollout in progress.
fn stateful_rollout(raw: &RawWorkload) -> Rollout {
    let wanted = raw.spec.replicas.unwrap_or(1);
    let status = &raw.status;
    let behind = status.observed_generation.is_some() && status.observed_generation < raw.metadata.generation;
    // With one revision there is nothing to replace, though a pod that is going away counts among all and not among these.
    let one_revision = status.current_revision.is_some() && status.current_revision == status.update_revision;
    let old = status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0);
    let old = if one_revision { 0 } else { old.max(0) };
    if raw.spec.update_strategy.type_.as_deref() == Some("OnDelete") {
        let note = (old > 0 && status.observed_generation.is_some())
            .then(|| format!("{old} of {wanted} pods run an older template until somebody deletes them (OnDelete)"));
        return Rollout { in_progress: behind, note, ..Rollout::default() };
    }
    let partition = raw.spec.update_strategy.partition();
    let note = (partition > 0)
        .then(|| format!("pods with an ordinal below {partition} keep an older template (updateStrategy.partition)"));
    // What is missing was scaled up, or cannot be made: it is no rollout.
    let unfinished = status.observed_generation.is_some() && old > partition.max(0);
    Rollout { in_progress: behind || unfinished, note, ..Rollout::default() }
}

/// A ReplicaSet: it joins a Deployment to its pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaSetFacts {
    /// Which ReplicaSet.
    pub uid: Uid,
    /// Uid of the Deployment that controls it.
    pub deployment: Option<Uid>,
    /// Its name.
    pub name: Box<str>,
    /// Which revision of the Deployment it is; 0: it does not say.
    pub revision: u64,
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// Id of the restart of all pods that its Deployment carried when it was the newest.
    pub restarted_by: Option<Box<str>>,
}

/// Annotation in which a Deployment's controller counts revisions.
pub const REVISION_ANNOTATION: &str = "deployment.kubernetes.io/revision";

impl ReplicaSetFacts {
    /// One of which nothing is known but what it is of.
    pub fn bare(uid: Uid, deployment: Option<Uid>) -> Self {
        let created_at = Timestamp::UNIX_EPOCH;
        Self { uid, deployment, name: Box::default(), revision: 0, created_at, restarted_by: None }
    }

    /// Picks the facts.
    pub fn of(set: &PartialObjectMeta<ReplicaSet>) -> Self {
        let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
        let deployment = owning_workload(namespace, set.metadata.owner_references.as_deref().unwrap_or_default());
        let annotation = |name: &str| set.metadata.annotations.as_ref().and_then(|all| all.get(name));
        Self {
            uid: set.metadata.uid.as_deref().unwrap_or_default().into(),
            deployment: deployment.filter(|(id, _)| id.kind == WorkloadKind::Deployment).map(|(_, uid)| uid),
            name: set.metadata.name.as_deref().unwrap_or_default().into(),
            revision: annotation(REVISION_ANNOTATION).and_then(|text| text.parse().ok()).unwrap_or(0),
            created_at: set.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            restarted_by: intent(annotation(RESTARTED_BY_ANNOTATION).map(String::as_str)),
        }
    }
}

/// The workload that controls an object, if one does.
fn owning_workload(namespace: &str, owners: &[OwnerReference]) -> Option<(WorkloadId, Uid)> {
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    let id = WorkloadId::new(namespace, owner.kind.parse().ok()?, owner.name.as_str());
    Some((id, owner.uid.as_str().into()))
}

/// A ConfigMap that carries our label, by its metadata. What it holds is read when it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigMapFacts {
    /// Which version of it.
    pub resource_version: String,
    /// The workload that owns it.
    pub owner: (WorkloadId, Uid),
    /// Which release of the operator writes it, as `namespace/name of its lease`.
    pub operator: Option<String>,
}

impl ConfigMapFacts {
    /// Picks the facts of a ConfigMap that is named as a workload's document and owned by that workload; nothing of any
    /// other, whatever its labels say.
    pub fn of(map: &PartialObjectMeta<ConfigMap>) -> Option<Self> {
        let metadata = &map.metadata;
        let namespace = metadata.namespace.as_deref()?;
        let owner = owning_workload(namespace, metadata.owner_references.as_deref()?)?;
        let named = metadata.name.as_deref() == Some(contract::config_map_name(owner.0.kind, &owner.0.name).as_str());
        let operator = metadata.annotations.as_ref().and_then(|all| all.get(OPERATOR_ANNOTATION));
        named.then(|| Self {
            resource_version: metadata.resource_version.clone().unwrap_or_default(),
            owner,
            operator: operator.map(|operator| cut(operator, 320).to_owned()),
        })
    }
}

/// A Job that was made for an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobFacts {
    /// Id of the intent.
    pub intent: String,
    /// The workload that owns it.
    pub owner: Option<(WorkloadId, Uid)>,
    /// Its name.
    pub name: String,
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// Its outcome so far.
    pub state: JobState,
}

/// The parts of a Job that are read.
#[derive(Deserialize)]
pub struct RawJob {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    status: RawJobStatus,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawJobStatus {
    conditions: Option<Vec<RawCondition>>,
}

impl Facts for JobFacts {
    type Kind = Job;
    type Raw = RawJob;

    fn pick(raw: RawJob) -> (RawMeta, Self) {
        let RawJob { metadata, status } = raw;
        let owners = metadata.owner_references.as_deref().unwrap_or_default();
        let facts = Self {
            intent: metadata.labels.as_ref().and_then(|labels| labels.get(INTENT_LABEL)).cloned().unwrap_or_default(),
            owner: owning_workload(metadata.namespace.as_deref().unwrap_or_default(), owners),
            name: metadata.name.clone().unwrap_or_default(),
            created_at: metadata.created_at(),
            state: job_state(&status),
        };
        (metadata, facts)
    }
}

/// The outcome of a Job, as its conditions say.
fn job_state(status: &RawJobStatus) -> JobState {
    for condition in status.conditions.iter().flatten().filter(|condition| condition.status == "True") {
        match condition.type_.as_str() {
            "Complete" => return JobState::Complete,
            "Failed" => {
                let words = [condition.reason.as_deref(), condition.message.as_deref()];
                let text = words.into_iter().flatten().collect::<Vec<_>>().join(": ");
                return JobState::Failed(cut(&text, MAX_JOB_MESSAGE).to_owned());
            }
            _ => {}
        }
    }
    JobState::Running
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn read<F: Facts>(object: &Value) -> Seen<F> {
        serde_json::from_value(object.clone()).unwrap()
    }

    #[test]
    fn the_named_ports_of_a_pod_are_few_and_of_tcp() {
        let mut ports = vec![
            json!({ "name": "dns", "containerPort": 53, "protocol": "UDP" }),
            json!({ "containerPort": 1 }),
            json!({ "name": "web", "containerPort": 8080, "protocol": "TCP" }),
            json!({ "name": "web", "containerPort": 8081 }),
            json!({ "name": "x".repeat(100), "containerPort": 2 }),
        ];
        ports.extend((0..100).map(|number| json!({ "name": format!("p{number}"), "containerPort": 100 + number })));
        let spec = json!({ "hostNetwork": true, "containers": [{ "name": "app", "ports": ports }] });
        let facts = read::<PodFacts>(&json!({ "metadata": { "name": "p" }, "spec": spec })).facts;
        let init = json!([
            { "name": "once", "ports": [{ "name": "once", "containerPort": 3 }] },
            { "name": "sidecar", "restartPolicy": "Always", "ports": [{ "name": "beside", "containerPort": 4 }] },
        ]);
        let spec = json!({ "containers": [], "initContainers": init });
        let sidecar = read::<PodFacts>(&json!({ "metadata": { "name": "p" }, "spec": spec })).facts;
        assert_eq!(["once", "beside"].map(|name| sidecar.named_port(name)), [None, Some(4)]);
        assert_eq!(["dns", "web", "p1", "p99"].map(|name| facts.named_port(name)), [None, Some(8080), Some(101), None]);
        assert_eq!(facts.named_ports.len(), MAX_NAMED_PORTS);
        assert!(facts.host_network);
        assert!(!read::<PodFacts>(&json!({ "metadata": { "name": "p" } })).facts.host_network);
    }

    #[test]
    fn a_pod_is_read_without_what_nobody_needs() {
        let pod = read::<PodFacts>(&json!({
            "metadata": {
                "name": "booking-1", "namespace": "ticketing", "uid": "u1", "resourceVersion": "7",
                "creationTimestamp": "2026-11-28T10:00:00Z", "labels": { "app": "booking" },
                "annotations": { "big": "x".repeat(1000), signing::SCHEME_ANNOTATION: signing::SCHEME }, "managedFields": [{ "manager": "m" }],
                "ownerReferences": [{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "rs", "uid": "r1", "controller": true }],
            },
            "spec": { "containers": [
                { "name": "sidecar" },
                { "name": "app", "ports": [{ "name": "admin", "containerPort": 9999 }, { "name": "http", "containerPort": 80 }] },
            ]},
            "status": { "phase": "Running", "podIP": "fd00::1", "conditions": [{ "type": "Ready", "status": "True" }] },
        }));
        let facts = pod.facts;
        assert_eq!(
            (facts.admin_port, facts.public_port, facts.readiness, facts.alive),
            (9999, 80, Readiness::Ready, true)
        );
        assert!(facts.signs);
        assert_eq!(facts.owner, Some((PodOwner::ReplicaSet, "r1".into())));
        assert_eq!(facts.ip, Some("fd00::1".parse().unwrap()));
        assert!(pod.metadata.labels.is_none() && pod.metadata.annotations.is_none());
    }

    #[rstest::rstest]
    #[case::ready(json!({ "status": "True", "lastTransitionTime": "2026-11-28T10:00:09Z" }), Readiness::Ready)]
    #[case::starting(json!({ "status": "False", "lastTransitionTime": "2026-11-28T10:00:00Z" }), Readiness::Never)]
    #[case::starting_for_hours(json!({ "status": "False", "lastTransitionTime": "2026-11-28T10:00:01Z", "reason": "ContainersNotReady" }), Readiness::Never)]
    #[case::not_ready_any_more(json!({ "status": "False", "lastTransitionTime": "2026-11-28T10:05:00Z" }), Readiness::NotNow)]
    #[case::unknown_since_its_node_is_cut_off(json!({ "status": "Unknown", "lastTransitionTime": "2026-11-28T10:05:00Z" }), Readiness::NotNow)]
    #[case::no_time(json!({ "status": "False" }), Readiness::Never)]
    fn whether_a_pod_was_ever_ready_is_told_by_when_that_last_changed(
        #[case] mut ready: Value,
        #[case] expected: Readiness,
    ) {
        ready["type"] = json!("Ready");
        let status = json!({ "startTime": "2026-11-28T10:00:00Z", "conditions": [ready] });
        let facts = read::<PodFacts>(&json!({ "metadata": { "name": "p" }, "status": status })).facts;
        assert_eq!(facts.readiness, expected);
    }

    #[test]
    fn a_pod_without_anything_is_read_too() {
        let facts = read::<PodFacts>(&json!({ "metadata": { "name": "p" } })).facts;
        assert_eq!(
            (facts.admin_port, facts.readiness, facts.alive, facts.ip),
            (admin::DEFAULT_PORT, Readiness::Never, true, None)
        );
    }

    fn stateful_set(strategy: &Value, replicas: i32, updated: i32, observed: i64) -> Rollout {
        let set = read::<StatefulSetFacts>(&json!({
            "metadata": { "name": "s", "namespace": "n", "generation": 3 },
            "spec": { "replicas": replicas, "updateStrategy": strategy },
            "status": { "observedGeneration": observed, "updatedReplicas": updated, "replicas": replicas },
        }));
        set.facts.0.rollout
    }

    #[rstest::rstest]
    #[case::all_updated(json!({ "type": "RollingUpdate" }), 3, 3, false, false)]
    #[case::one_to_go(json!({ "type": "RollingUpdate" }), 3, 2, true, false)]
    #[case::not_seen_yet(json!({ "type": "RollingUpdate" }), 2, 3, true, false)]
    #[case::held_back_on_purpose(json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 2 } }), 3, 1, false, true)]
    #[case::partition_not_reached(json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 1 } }), 3, 1, true, true)]
    #[case::only_when_deleted(json!({ "type": "OnDelete" }), 3, 1, false, true)]
    fn what_a_stateful_set_leaves_alone_on_purpose_is_no_rollout(
        #[case] strategy: Value,
        #[case] observed: i64,
        #[case] updated: i32,
        #[case] in_progress: bool,
        #[case] noted: bool,
    ) {
        let rollout = stateful_set(&strategy, 3, updated, observed);
        assert_eq!((rollout.in_progress, rollout.note.is_some()), (in_progress, noted), "{rollout:?}");
    }

    #[rstest::rstest]
    #[case::rolled_out(json!({}), 4, 3, true)]
    #[case::scaled_beyond_a_quota(json!({}), 4, 4, false)]
    #[case::with_a_partition(json!({ "rollingUpdate": { "partition": 2 } }), 4, 2, false)]
    fn a_stateful_set_that_is_scaled_is_not_rolled_out(
        #[case] strategy: Value,
        #[case] replicas: i32,
        #[case] updated: i32,
        #[case] in_progress: bool,
    ) {
        let set = read::<StatefulSetFacts>(&json!({
            "metadata": { "name": "s", "namespace": "n", "generation": 3 },
            "spec": { "replicas": 6, "updateStrategy": strategy },
            "status": { "observedGeneration": 3, "updatedReplicas": updated, "replicas": replicas },
        }));
        assert_eq!(set.facts.0.rollout.in_progress, in_progress);
    }

    #[rstest::rstest]
    #[case::rolled_out("old", true)]
    #[case::a_pod_goes_away("new", false)]
    fn a_pod_of_a_stateful_set_that_goes_away_is_no_rollout(#[case] current: &str, #[case] in_progress: bool) {
        let set = read::<StatefulSetFacts>(&json!({
            "metadata": { "name": "s", "namespace": "n", "generation": 3 }, "spec": { "replicas": 3 },
            "status": {
                "observedGeneration": 3, "updatedReplicas": 2, "replicas": 3,
                "currentRevision": current, "updateRevision": "new",
            },
        }));
        assert_eq!(set.facts.0.rollout.in_progress, in_progress);
    }

    fn progressing(status: &str, reason: &str) -> Value {
        json!({ "type": "Progressing", "status": status, "reason": reason, "message": "words of Kubernetes" })
    }

    fn over_quota() -> Value {
        json!({ "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: four" })
    }

    #[rstest::rstest]
    #[case::complete(4, 4, 4, vec![progressing("True", "NewReplicaSetAvailable")], false, None)]
    #[case::old_pods(4, 3, 5, vec![progressing("True", "ReplicaSetUpdated")], true, None)]
    #[case::recreated(4, 0, 0, vec![progressing("True", "ReplicaSetUpdated")], true, None)]
    #[case::an_edit_whose_condition_is_old(4, 3, 5, vec![progressing("True", "NewReplicaSetAvailable")], true, None)]
    #[case::scaled(6, 4, 4, vec![progressing("True", "NewReplicaSetAvailable")], false, None)]
    #[case::scaled_beyond_a_quota(6, 4, 4, vec![progressing("True", "NewReplicaSetAvailable"), over_quota()], false, Some("pods cannot be made: exceeded quota"))]
    #[case::rolled_out_beyond_a_quota(4, 1, 4, vec![progressing("True", "ReplicaSetUpdated"), over_quota()], true, Some("pods cannot be made: exceeded quota"))]
    #[case::stuck(4, 1, 4, vec![progressing("False", "ProgressDeadlineExceeded")], false, Some("its rollout does not progress: words"))]
    #[case::without_a_deadline(4, 3, 5, vec![], true, None)]
    #[case::scaled_without_a_deadline(6, 4, 4, vec![], false, None)]
    #[case::scaled_while_paused(6, 4, 4, vec![progressing("Unknown", "DeploymentPaused")], false, None)]
    #[case::a_failure_that_is_over(4, 4, 4, vec![json!({ "type": "ReplicaFailure", "status": "False", "message": "m" })], false, None)]
    fn a_deployment_is_rolled_out_while_pods_are_being_replaced(
        #[case] wanted: i32,
        #[case] updated: i32,
        #[case] replicas: i32,
        #[case] conditions: Vec<Value>,
        #[case] in_progress: bool,
        #[case] note: Option<&str>,
    ) {
        let deployment = |observed: i64| {
            let deployment = read::<DeploymentFacts>(&json!({
                "metadata": { "name": "d", "namespace": "n", "generation": 3 }, "spec": { "replicas": wanted },
                "status": {
                    "observedGeneration": observed, "updatedReplicas": updated, "replicas": replicas, "conditions": conditions,
                },
            }));
            deployment.facts.0.rollout
        };
        let rollout = deployment(3);
        assert_eq!(rollout.in_progress, in_progress, "{rollout:?}");
        let told = rollout.note.as_deref().unwrap_or_default();
        assert!(note.map_or(told.is_empty(), |note| told.starts_with(note)), "{told}");
        assert!(deployment(2).in_progress, "the edit was not seen yet");
    }

    #[test]
    fn a_paused_deployment_is_not_rolled_out() {
        let deployment = read::<DeploymentFacts>(&json!({
            "metadata": { "name": "d", "namespace": "n", "generation": 3 }, "spec": { "replicas": 3, "paused": true },
            "status": { "observedGeneration": 3, "updatedReplicas": 0, "replicas": 3, "conditions": [progressing("Unknown", "DeploymentPaused")] },
        }));
        let rollout = deployment.facts.0.rollout;
        assert_eq!(
            (rollout.in_progress, rollout.note.as_deref()),
            (false, Some("it is paused in the middle of a rollout"))
        );
    }

    #[rstest::rstest]
    #[case::new(json!({}), JobState::Running)]
    #[case::not_really(json!({ "conditions": [{ "type": "Failed", "status": "False" }] }), JobState::Running)]
    #[case::done(json!({ "conditions": [{ "type": "SuccessCriteriaMet", "status": "True" }, { "type": "Complete", "status": "True" }] }), JobState::Complete)]
    #[case::failed(json!({ "conditions": [{ "type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "too often" }] }), JobState::Failed("BackoffLimitExceeded: too often".into()))]
    fn conditions_tell_the_outcome_of_a_job(#[case] status: Value, #[case] expected: JobState) {
        assert_eq!(read::<JobFacts>(&json!({ "metadata": {}, "status": status })).facts.state, expected);
    }

    fn config_map(name: &str, owner: &Value) -> Option<ConfigMapFacts> {
        let map =
            json!({ "metadata": { "name": name, "namespace": "n", "resourceVersion": "1", "ownerReferences": owner } });
        ConfigMapFacts::of(&serde_json::from_value(map).unwrap())
    }

    #[test]
    fn a_label_alone_makes_nobody_keep_a_config_map() {
        let owner = json!([{ "apiVersion": "apps/v1", "kind": "Deployment", "name": "booking", "uid": "d1", "controller": true }]);
        assert!(config_map("booking-resilience", &owner).is_some());
        assert!(config_map("anything", &owner).is_none(), "another name");
        assert!(config_map("booking-resilience", &json!([])).is_none(), "no owner");
        let pod = json!([{ "apiVersion": "v1", "kind": "Pod", "name": "booking", "uid": "p", "controller": true }]);
        assert!(config_map("booking-resilience", &pod).is_none(), "owned by something else");
    }
}
