//! Facts about objects: what decisions need, read straight from the API server's answer, and nothing else.
//!
//! Reading drops everything that is not listed here before it is ever stored: ten thousand pods have to fit into memory,
//! and an object's size is up to its author. Every list and text that is kept has a bound.

mod config_map;
mod job;
mod pod;
mod replica_set;
mod workload;

pub use config_map::ConfigMapFacts;
pub use job::{JobFacts, RawJob};
pub use pod::{PodFacts, PodOwner, RawPod, RawPodStatus, Readiness};
pub use replica_set::{REVISION_ANNOTATION, ReplicaSetFacts};
pub use workload::{DeploymentFacts, RawWorkload, Rollout, StatefulSetFacts, WorkloadFacts};

use crate::kubernetes::meta::cut;
use contract::{WorkloadId, WorkloadKind};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::{Resource, core::NamespaceResourceScope};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny},
};
use std::{
    borrow::Cow,
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    marker::PhantomData,
    sync::Arc,
};

/// Most labels of a pod, or of a selector, that are compared.
pub const MAX_LABELS: usize = 32;

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

/// A condition of any object.
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

/// The workload that controls an object, if one does.
fn owning_workload(namespace: &str, owners: &[OwnerReference]) -> Option<(WorkloadId, Uid)> {
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    let id = WorkloadId::new(namespace, owner.kind.parse().ok()?, owner.name.as_str());
    Some((id, owner.uid.as_str().into()))
}

#[cfg(test)]
fn read<F: Facts>(object: &serde_json::Value) -> Seen<F> {
    serde_json::from_value(object.clone()).unwrap()
}
