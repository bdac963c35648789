//! ReplicaSets.

use super::{Uid, intent, owning_workload};
use crate::kubernetes::meta::RESTARTED_BY_ANNOTATION;
use contract::WorkloadKind;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use kube::core::PartialObjectMeta;

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
