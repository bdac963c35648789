//! Which workload something is about.

use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// A workload: one document, one writer. The kind is part of the identity, so that a Deployment and a StatefulSet of one
/// name never share anything.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WorkloadId {
    /// Namespace of the workload, and of everything that is made for it.
    pub namespace: String,
    /// Kind of the workload. Absent in a document of version 0.1, which knew Deployments only; left out for a Deployment, so
    /// that its documents stay the same byte for byte.
    #[serde(default, skip_serializing_if = "WorkloadKind::is_deployment")]
    pub kind: WorkloadKind,
    /// Name of the Deployment or StatefulSet.
    pub name: String,
}

impl WorkloadId {
    /// The workload of that kind and name.
    pub fn new(namespace: impl Into<String>, kind: WorkloadKind, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), kind, name: name.into() }
    }

    /// The Deployment of that name.
    pub fn deployment(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self::new(namespace, WorkloadKind::Deployment, name)
    }
}

/// `namespace/name`, with the kind of all but Deployments behind it.
impl std::fmt::Display for WorkloadId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)?;
        if self.kind.is_deployment() { Ok(()) } else { write!(f, " ({})", self.kind) }
    }
}

/// Kinds of workloads that a policy can target. A document of any other kind is for no pod that reads this contract, so
/// it is refused as malformed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum WorkloadKind {
    /// `apps/v1` Deployment.
    #[default]
    Deployment,
    /// `apps/v1` StatefulSet.
    StatefulSet,
}

impl WorkloadKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Deployment, Self::StatefulSet];

    /// The kind as Kubernetes spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
        }
    }

    /// Whether it is [`WorkloadKind::Deployment`]; by reference, as serde asks.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that skip_serializing_if calls")]
    const fn is_deployment(&self) -> bool {
        matches!(self, Self::Deployment)
    }

    /// What the names of a workload's objects end with. Names of Deployments carry no kind: they are those of version 0.1.
    /// As the kind stands behind everything else, no Deployment's object can have the name of a StatefulSet's.
    const fn suffix(self) -> &'static str {
        match self {
            Self::Deployment => "",
            Self::StatefulSet => "-statefulset",
        }
    }
}

impl std::fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A kind that is none of [`WorkloadKind::ALL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be Deployment or StatefulSet")]
pub struct UnknownKind;

impl FromStr for WorkloadKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or(UnknownKind)
    }
}

/// Name of the ConfigMap that carries a workload's document: `booking-resilience`, `booking-resilience-statefulset`.
pub fn config_map_name(kind: WorkloadKind, workload: &str) -> String {
    format!("{workload}-resilience{}", kind.suffix())
}

/// Name of the Secret that carries a workload's admin token: `booking-resilience-token`,
/// `booking-resilience-token-statefulset`.
pub fn token_secret_name(kind: WorkloadKind, workload: &str) -> String {
    format!("{workload}-resilience-token{}", kind.suffix())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[rstest::rstest]
    #[case::of_version_0_1(json!({"namespace": "n", "name": "w"}), Some(WorkloadId::deployment("n", "w")))]
    #[case::deployment(json!({"namespace": "n", "kind": "Deployment", "name": "w"}), Some(WorkloadId::deployment("n", "w")))]
    #[case::stateful_set(
        json!({"namespace": "n", "kind": "StatefulSet", "name": "w"}),
        Some(WorkloadId::new("n", WorkloadKind::StatefulSet, "w"))
    )]
    #[case::of_tomorrow(json!({"namespace": "n", "kind": "DaemonSet", "name": "w"}), None)]
    fn reads(#[case] document: serde_json::Value, #[case] expected: Option<WorkloadId>) {
        assert_eq!(serde_json::from_value(document).ok(), expected);
    }

    #[rstest::rstest]
    #[case(WorkloadId::deployment("n", "w"), r#"{"namespace":"n","name":"w"}"#, "n/w")]
    #[case(
        WorkloadId::new("n", WorkloadKind::StatefulSet, "w"),
        r#"{"namespace":"n","kind":"StatefulSet","name":"w"}"#,
        "n/w (StatefulSet)"
    )]
    fn writes(#[case] id: WorkloadId, #[case] document: &str, #[case] text: &str) {
        assert_eq!((serde_json::to_string(&id).unwrap().as_str(), id.to_string().as_str()), (document, text));
    }

    #[test]
    fn kinds_are_spelled_as_kubernetes_spells_them() {
        for kind in WorkloadKind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(json!(kind), json!(kind.as_str()));
        }
        assert_eq!("deployment".parse::<WorkloadKind>(), Err(UnknownKind));
    }

    /// Whatever the workloads are called, each object is one workload's. Names of Deployments are those of version 0.1.
    #[test]
    fn no_two_workloads_share_an_object() {
        assert_eq!(config_map_name(WorkloadKind::Deployment, "booking"), "booking-resilience");
        assert_eq!(token_secret_name(WorkloadKind::Deployment, "booking"), "booking-resilience-token");
        let tricky = ["a", "a-resilience", "a-statefulset", "a-resilience-statefulset", "a-resilience-token"];
        for name in [config_map_name, token_secret_name] {
            let mut names: Vec<_> =
                tricky.iter().flat_map(|workload| WorkloadKind::ALL.map(|kind| name(kind, workload))).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), tricky.len() * WorkloadKind::ALL.len(), "{names:?}");
        }
    }
}
