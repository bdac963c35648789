//! ConfigMaps.

use super::{Uid, owning_workload};
use crate::kubernetes::meta::{OPERATOR_ANNOTATION, cut};
use contract::WorkloadId;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::core::PartialObjectMeta;

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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

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
