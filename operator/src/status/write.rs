//! Writing the status of a resource, in exactly the version that it was made from.

use super::conditions;
use crate::{
    context::Context,
    error::ReconcileError,
    fleet::facts::{Seen, Version},
    kubernetes::{clients::call, meta::FIELD_MANAGER},
};
use crds::{Condition, ConditionStatus, ConditionType, reason::Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Resource,
    api::{Patch, PatchParams},
    core::NamespaceResourceScope,
};
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

/// A resource whose status the operator writes.
pub trait HasStatus: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Send + Sync + 'static {}

impl HasStatus for crds::ResiliencePolicy {}
impl HasStatus for crds::FeatureFlag {}
impl HasStatus for crds::Recovery {}

/// Writes a status: what it does not have is removed. The answer is the new version of the object.
pub async fn write_status<K: HasStatus>(
    ctx: &Context,
    meta: &ObjectMeta,
    status: &impl Serialize,
) -> Result<Option<String>, ReconcileError> {
    let whole = PatchParams::apply(FIELD_MANAGER).force();
    patch_status::<K>(ctx, meta, status, &whole, Patch::Apply, false).await
}

/// Takes parts out of a status, those that are null: whatever else it has, stays, also what others wrote.
pub async fn take_out_of_status<K: HasStatus>(
    ctx: &Context,
    meta: &ObjectMeta,
    parts: &impl Serialize,
) -> Result<(), ReconcileError> {
    patch_status::<K>(ctx, meta, parts, &PatchParams::default(), Patch::Merge, false).await.map(drop)
}

/// Writes parts of the status of an object that cannot be read: whatever else it has, stays.
pub async fn write_unreadable_status<K: HasStatus>(
    ctx: &Context,
    meta: &ObjectMeta,
    status: &impl Serialize,
) -> Result<(), ReconcileError> {
    patch_status::<K>(ctx, meta, status, &PatchParams::default(), Patch::Merge, true).await.map(drop)
}

async fn patch_status<K: HasStatus>(
    ctx: &Context,
    meta: &ObjectMeta,
    status: &impl Serialize,
    params: &PatchParams,
    kind: fn(serde_json::Value) -> Patch<serde_json::Value>,
    unreadable: bool,
) -> Result<Option<String>, ReconcileError> {
    if !ctx.shared.fence.holds() {
        return Err(ReconcileError::NotLeading);
    }
    let (name, namespace) = (meta.name.clone().unwrap_or_default(), meta.namespace.clone().unwrap_or_default());
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": { "name": name, "namespace": namespace, "uid": meta.uid, "resourceVersion": meta.resource_version },
        "status": status,
    });
    // Of the answer, only the version is read: the rest may be large, or not readable as the type.
    let api: Api<Seen<Version<K>>> = Api::namespaced(ctx.shared.clients.act.clone(), &namespace);
    let answer = call(api.patch_status(&name, params, &kind(patch))).await;
    let answer = answer.map_err(ReconcileError::api("writing the status"))?;
    if answer.metadata.resource_version != meta.resource_version {
        ctx.status_writes.note(meta, unreadable, Instant::now());
    }
    Ok(answer.metadata.resource_version)
}

/// Says on an object that the operator itself failed over it: `Ready=False, InternalError`. Whatever else its status says
/// stays, in particular what recovery has done.
pub async fn write_internal_error<K: HasStatus>(ctx: &Context, meta: &ObjectMeta, old: &[Condition], message: &str) {
    let message = format!(
        "the operator failed over this resource ({message}); it tries again ever more rarely, and other resources are not affected. Report it with the operator's log"
    );
    let known = conditions::find(old, ConditionType::Ready);
    if known.is_some_and(|known| known.reason == Reason::InternalError.as_str() && known.message == message) {
        return;
    }
    let now = crate::pods::prober::now_in_milliseconds();
    let verdict =
        conditions::Verdict::new(ConditionType::Ready, ConditionStatus::False, Reason::InternalError, message);
    let mut all: Vec<_> = old.iter().filter(|condition| *condition.type_ != ConditionType::Ready).cloned().collect();
    all.extend(conditions::settle(old, vec![verdict], meta.generation, now));
    let parts = json!({ "observedGeneration": meta.generation, "conditions": all });
    if let Err(error) = write_unreadable_status::<K>(ctx, meta, &parts).await {
        tracing::warn!(%error, "the internal error could not be told in the status");
    }
}
