//! The manifests that are made from the types.

use crate::recovery::Phase;
use crate::{FeatureFlag, Recovery, ResiliencePolicy};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSON};
use kube::CustomResourceExt;
use serde_json::json;
use std::path::{Path, PathBuf};

/// First lines of every generated file.
const HEADER: &str = "# Generated from crds/src by `make generate`. Edit the Rust types, not this file.\n";

/// Folders, below the root of the checkout, that hold a copy of every manifest.
pub const FOLDERS: [&str; 2] = ["crds/yaml", "charts/resilience-operator/files/crds"];

/// Every custom resource definition.
pub fn definitions() -> [CustomResourceDefinition; 3] {
    [ResiliencePolicy::crd(), FeatureFlag::crd(), with_pending_by_default(Recovery::crd())]
}

/// A Recovery is Pending from the moment that it exists, before anybody has written a status.
fn with_pending_by_default(mut definition: CustomResourceDefinition) -> CustomResourceDefinition {
    for version in &mut definition.spec.versions {
        let schema = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut());
        let status = schema.and_then(|schema| schema.properties.as_mut()?.get_mut("status"));
        if let Some(status) = status {
            status.default = Some(JSON(json!({ "phase": Phase::Pending.as_str() })));
        }
    }
    definition
}

/// Why the manifests could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// A type gave a schema that cannot be written as YAML; that is a defect of the type.
    #[error("the definition {name} cannot be written as YAML: {message}")]
    Yaml {
        /// Which definition.
        name: String,
        /// The writer's words.
        message: String,
    },
}

/// Every generated file: path below the root of the checkout, and text.
pub fn files() -> Result<Vec<(PathBuf, String)>, ManifestError> {
    let mut files = Vec::new();
    for definition in definitions() {
        let name = definition.metadata.name.clone().unwrap_or_default();
        let body = serde_saphyr::to_string(&definition)
            .map_err(|error| ManifestError::Yaml { name: name.clone(), message: error.to_string() })?;
        let (plural, group) = name.split_once('.').unwrap_or((&name, crate::GROUP));
        for folder in FOLDERS {
            files.push((Path::new(folder).join(format!("{group}_{plural}.yaml")), format!("{HEADER}---\n{body}")));
        }
    }
    Ok(files)
}
