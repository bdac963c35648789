//! Writing the status of a resource, in exactly the version that it was made from.

use crate::{
    context::Context,
    error::ReconcileError,
    kubernetes::{clients::call, guard::Guard, meta::FIELD_MANAGER},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Api, Resource,
    api::{Patch, PatchParams},
    core::NamespaceResourceScope,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use std::sync::PoisonError;

/// Whether the cache still shows the object as it was before this process's own last write of its status.
pub fn cache_is_stale(ctx: &Context, meta: &ObjectMeta) -> bool {
    let written = ctx.written.lock().unwrap_or_else(PoisonError::into_inner);
    let uid = meta.uid.as_deref().unwrap_or_default();
    written.get(uid).is_some_and(|before| meta.resource_version.as_deref() == Some(before.as_str()))
}

/// Whether this process has written the status of an unreadable object in its present generation.
pub fn written_before(ctx: &Context, meta: &ObjectMeta) -> bool {
    let written = ctx.written.lock().unwrap_or_else(PoisonError::into_inner);
    written.get(&unreadable_key(meta)) == meta.generation.map(|generation| generation.to_string()).as_ref()
}

/// Notes that it has.
pub fn note_written(ctx: &Context, meta: &ObjectMeta) {
    let mut written = ctx.written.lock().unwrap_or_else(PoisonError::into_inner);
    written.insert(unreadable_key(meta), meta.generation.unwrap_or_default().to_string());
}

fn unreadable_key(meta: &ObjectMeta) -> String {
    format!("{}/unreadable", meta.uid.as_deref().unwrap_or_default())
}

/// Writes a status, in exactly the version of the object that it was made from. The answer is the new version.
pub async fn write_status<K>(
    ctx: &Context,
    meta: &ObjectMeta,
    status: &impl Serialize,
) -> Result<Option<String>, ReconcileError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
    patch_status::<K>(ctx, meta, status, true).await
}

/// `whole`: what the status does not have is removed; otherwise it stays.
pub async fn patch_status<K>(
    ctx: &Context,
    meta: &ObjectMeta,
    status: &impl Serialize,
    whole: bool,
) -> Result<Option<String>, ReconcileError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
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
    // Guarded, because the answer may not be readable as the type: that is one of the things a status tells.
    let api: Api<Guard<K>> = Api::namespaced(ctx.shared.clients.act.clone(), &namespace);
    let (params, patch) = if whole {
        (PatchParams::apply(FIELD_MANAGER).force(), Patch::Apply(&patch))
    } else {
        (PatchParams::default(), Patch::Merge(&patch))
    };
    let answer =
        call(api.patch_status(&name, &params, &patch)).await.map_err(ReconcileError::api("writing the status"))?;
    let mut written = ctx.written.lock().unwrap_or_else(PoisonError::into_inner);
    if let (Some(uid), Some(before)) = (meta.uid.clone(), meta.resource_version.clone())
        && answer.meta().resource_version != meta.resource_version
    {
        written.insert(uid, before);
    }
    Ok(answer.meta().resource_version.clone())
}
