//! The ConfigMap that carries a workload's document: reading it, and writing it without ever overwriting what somebody
//! else changed or owns.

use crate::kubernetes::{
    clients::{ApiError, Clients, call},
    meta::{FIELD_MANAGER, OPERATOR_ANNOTATION, owner_reference},
};
use bytes::Bytes;
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
    /// Another release of the operator writes it.
    #[error("the release {0} of the operator writes it")]
    OtherRelease(String),
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

/// Which release of the operator writes a ConfigMap, by its mark.
fn writer(map: &ConfigMap) -> Option<&str> {
    map.metadata.annotations.as_ref()?.get(OPERATOR_ANNOTATION).map(String::as_str)
}

/// The document in a ConfigMap.
pub fn document(text: Option<&[u8]>, workload: &WorkloadId) -> Published {
    match text.map(RuntimeConfig::parse) {
        Some(Ok((config, _))) if config.workload == *workload => Published::Document(Box::new(config)),
        _ => Published::Damaged,
    }
}

/// A ConfigMap as it was read.
pub struct Found {
    /// The object, without what it holds.
    map: ConfigMap,
    /// What it holds.
    pub text: Option<Bytes>,
}

impl Found {
    fn new(mut map: ConfigMap) -> Self {
        let text = map.data.take().and_then(|mut data| data.remove(CONFIG_KEY)).map(|text| text.into_bytes().into());
        map.binary_data = None;
        Self { map, text }
    }

    /// Which version of the ConfigMap it is.
    pub fn version(&self) -> Option<&str> {
        self.map.metadata.resource_version.as_deref()
    }
}

/// Reads the ConfigMap of a workload.
pub async fn read(clients: &Clients, id: &WorkloadId) -> Result<Option<Found>, PublishError> {
    let api: Api<ConfigMap> = Api::namespaced(clients.act.clone(), &id.namespace);
    match call(api.get(&config_map_name(id.kind, &id.name))).await {
        Ok(map) => Ok(Some(Found::new(map))),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What is to be written, and by whom.
pub struct Writing<'a> {
    /// The document.
    pub document: &'a RuntimeConfig,
    /// Uid of the workload.
    pub workload_uid: &'a str,
    /// This release of the operator.
    pub release: &'a str,
    /// Another release that is known to be gone.
    pub gone: Option<&'a str>,
}

/// Writes the document: makes the ConfigMap, or replaces what it holds in exactly the version that was read. The answer is
/// the text, and the ConfigMap's new version.
pub async fn write(
    clients: &Clients,
    writing: &Writing<'_>,
    found: Option<&Found>,
) -> Result<(Bytes, Option<String>), PublishError> {
    let text: Bytes = writing.document.to_bytes()?.into();
    let workload = &writing.document.workload;
    let api: Api<ConfigMap> = Api::namespaced(clients.act.clone(), &workload.namespace);
    if let Some(found) = found {
        return apply(&api, writing, &text, &found.map).await.map(|version| (text, version));
    }
    let how = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() };
    let new = serde_json::from_value(manifest(writing, &text))
        .map_err(|error| contract::ConfigError::Malformed(error.to_string()))?;
    let version = match call(api.create(&how, &new)).await {
        Ok(made) => made.metadata.resource_version,
        // It exists, but without our label: either it never was ours, or somebody took the label away.
        Err(error) if error.is_conflict() => {
            let map = call(api.get(&config_map_name(workload.kind, &workload.name))).await?;
            apply(&api, writing, &text, &map).await?
        }
        Err(error) => return Err(error.into()),
    };
    Ok((text, version))
}

async fn apply(
    api: &Api<ConfigMap>,
    writing: &Writing<'_>,
    text: &Bytes,
    map: &ConfigMap,
) -> Result<Option<String>, PublishError> {
    let workload = &writing.document.workload;
    let name = config_map_name(workload.kind, &workload.name);
    if !is_ours(map, writing.workload_uid) {
        return Err(PublishError::NotOurs(name));
    }
    if let Some(other) = writer(map).filter(|other| *other != writing.release && Some(*other) != writing.gone) {
        return Err(PublishError::OtherRelease(other.to_owned()));
    }
    let mut body = manifest(writing, text);
    body["metadata"]["uid"] = json!(map.metadata.uid);
    body["metadata"]["resourceVersion"] = json!(map.metadata.resource_version);
    // Forced, because an edit by hand made its author an owner of the field; uid and resourceVersion are the fence.
    let written = call(api.patch(&name, &PatchParams::apply(FIELD_MANAGER).force(), &Patch::Apply(&body))).await?;
    Ok(written.metadata.resource_version)
}

fn manifest(writing: &Writing<'_>, text: &Bytes) -> Value {
    let workload = &writing.document.workload;
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(workload.kind, &workload.name),
            "namespace": workload.namespace,
            "labels": {
                "app.kubernetes.io/managed-by": FIELD_MANAGER,
                "resilience.ticketwave.io/workload": workload.name,
            },
            "annotations": { OPERATOR_ANNOTATION: writing.release },
            "ownerReferences": [owner_reference(workload, writing.workload_uid)],
        },
        // serde_json writes valid UTF-8.
        "data": { CONFIG_KEY: String::from_utf8_lossy(text) },
    })
}
