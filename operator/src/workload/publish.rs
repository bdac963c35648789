//! The ConfigMap that carries a workload's document: reading it, and writing it without ever overwriting what somebody
//! else changed or owns.

use crate::kubernetes::{
    clients::{ApiError, Clients, call},
    meta::{FIELD_MANAGER, owner_reference},
};
use contract::{CONFIG_KEY, RuntimeConfig, WorkloadId, config_map_name};
use engine::publish::Published;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

/// Why a document could not be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A ConfigMap of that name belongs to somebody else.
    #[error(
        "a ConfigMap named {0} exists and was not made by this operator: rename or delete it; until then the pods keep what they run"
    )]
    NotOurs(String),
    /// The document cannot be written.
    #[error(transparent)]
    Document(#[from] contract::ConfigError),
    /// The API server refused.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// Whether a ConfigMap is the one that this operator made for this very workload.
fn is_ours(map: &ConfigMap, workload_uid: &str) -> bool {
    let owners = map.metadata.owner_references.as_deref().unwrap_or_default();
    owners.iter().any(|owner| owner.uid == workload_uid && owner.controller == Some(true))
}

/// What is published for a workload, judged from its ConfigMap.
pub fn read(map: Option<&ConfigMap>, workload: &WorkloadId) -> Published {
    let Some(map) = map else { return Published::Nothing };
    let text = map.data.as_ref().and_then(|data| data.get(CONFIG_KEY));
    match text.map(|text| RuntimeConfig::parse(text.as_bytes())) {
        Some(Ok((config, _))) if config.workload == *workload => Published::Document(Box::new(config)),
        _ => Published::Damaged,
    }
}

/// Writes the document: makes the ConfigMap, or replaces what it holds in exactly the version that was read.
pub async fn write(
    clients: &Clients,
    document: &RuntimeConfig,
    workload_uid: &str,
    read: Option<&ConfigMap>,
) -> Result<Vec<u8>, PublishError> {
    let bytes = document.to_bytes()?;
    let name = config_map_name(&document.workload.name);
    let api: Api<ConfigMap> = Api::namespaced(clients.act.clone(), &document.workload.namespace);
    match read {
        Some(map) => apply(&api, &name, document, &bytes, workload_uid, map).await?,
        None => match call(api.create(
            &PostParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() },
            &new(document, &bytes, workload_uid)?,
        ))
        .await
        {
            Ok(_) => {}
            // It exists, but without our label: either it never was ours, or somebody took the label away.
            Err(error) if error.is_conflict() => {
                let map = call(api.get(&name)).await?;
                apply(&api, &name, document, &bytes, workload_uid, &map).await?;
            }
            Err(error) => return Err(error.into()),
        },
    }
    Ok(bytes)
}

async fn apply(
    api: &Api<ConfigMap>,
    name: &str,
    document: &RuntimeConfig,
    bytes: &[u8],
    workload_uid: &str,
    map: &ConfigMap,
) -> Result<(), PublishError> {
    if !is_ours(map, workload_uid) {
        return Err(PublishError::NotOurs(name.to_owned()));
    }
    let mut body = manifest(document, bytes, workload_uid);
    body["metadata"]["uid"] = json!(map.metadata.uid);
    body["metadata"]["resourceVersion"] = json!(map.metadata.resource_version);
    // Forced, because an edit by hand made its author an owner of the field; uid and resourceVersion are the fence.
    call(api.patch(name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&body))).await?;
    Ok(())
}

fn new(document: &RuntimeConfig, bytes: &[u8], workload_uid: &str) -> Result<ConfigMap, contract::ConfigError> {
    serde_json::from_value(manifest(document, bytes, workload_uid))
        .map_err(|error| contract::ConfigError::Malformed(error.to_string()))
}

fn manifest(document: &RuntimeConfig, bytes: &[u8], workload_uid: &str) -> Value {
    let workload = &document.workload;
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(&workload.name),
            "namespace": workload.namespace,
            "labels": { "app.kubernetes.io/managed-by": FIELD_MANAGER, "resilience.ticketwave.io/workload": workload.name },
            "ownerReferences": [owner_reference(&workload.name, workload_uid)],
        },
        // serde_json writes valid UTF-8.
        "data": { CONFIG_KEY: String::from_utf8_lossy(bytes) },
    })
}
