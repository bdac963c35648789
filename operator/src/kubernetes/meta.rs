//! Small facts about objects that several rooms need: names, labels, owners, references.

use contract::WorkloadId;
use jiff::Timestamp;
use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::Resource;
use serde_json::{Value, json};

/// Who writes, in `managedFields`.
pub const FIELD_MANAGER: &str = "resilience-operator";
/// Annotation of a ConfigMap that says which release of the operator writes it, as `namespace/name` of its Lease.
pub const OPERATOR_ANNOTATION: &str = "resilience.ticketwave.io/operator";
/// Annotation of a workload, and of its template, that says which restart of all pods came last: the intent's id.
pub const RESTARTED_BY_ANNOTATION: &str = "resilience.ticketwave.io/restarted-by";
/// Annotation of a workload that says which rollback came last: the intent's id.
pub const ROLLED_BACK_BY_ANNOTATION: &str = "resilience.ticketwave.io/rolled-back-by";
/// Label of a Deployment and of the ReplicaSet whose template a rollback gives it, while that is being done; its value is the
/// intent's id. The admission policy of the chart compares the one with the other.
pub const ROLLBACK_TO_LABEL: &str = "resilience.ticketwave.io/rollback-to";
/// Label of a Job that was made for an intent; its value is the intent's id.
pub const INTENT_LABEL: &str = "resilience.ticketwave.io/intent";
/// Annotation that makes a pod's kubelet look at the pod at once, and so refresh its optional mounts.
pub const MOUNT_REFRESH_ANNOTATION: &str = "resilience.ticketwave.io/mounts-wanted-at";

/// Makes the workload the owner: what is ours goes with it, and outlives policy and operator.
pub fn owner_reference(workload: &WorkloadId, uid: &str) -> Value {
    json!({
        "apiVersion": "apps/v1",
        "kind": workload.kind.as_str(),
        "name": workload.name,
        "uid": uid,
        "controller": true,
    })
}

/// When an object was created.
pub fn created_at<K: Resource>(object: &K) -> Timestamp {
    object.meta().creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

/// A hash, cut to what a person compares.
pub fn short(hash: &str) -> &str {
    hash.get(..6).unwrap_or(hash)
}

/// A reference to an object, for Events.
pub fn object_reference<K: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        ..ObjectReference::default()
    }
}

/// `text`, cut to at most `max` bytes at a character boundary.
pub fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}
