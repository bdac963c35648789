//! Conditions, shaped as `metav1.Condition` with its bounds, and the words used in them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One aspect of a resource's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Which aspect, in CamelCase.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 316), regex(pattern = "^[A-Za-z]([A-Za-z0-9]*)$"))]
    pub type_: String,
    /// True, False or Unknown.
    pub status: ConditionStatus,
    /// The generation of the resource that this is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// When the status last changed.
    pub last_transition_time: Time,
    /// One CamelCase word for programs; there is a runbook page for each.
    #[schemars(length(min = 1, max = 1024), regex(pattern = "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"))]
    pub reason: String,
    /// What, where, since when, and what happens next, for people.
    #[schemars(length(max = 32768))]
    pub message: String,
}

/// Status of a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    /// It is so.
    True,
    /// It is not so.
    False,
    /// It cannot be told.
    Unknown,
}

impl From<bool> for ConditionStatus {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

crate::words! {
    /// Types of conditions.
    pub enum ConditionType {
        /// Everything that was asked for is in place.
        Ready,
        /// Work is under way (kstatus).
        Reconciling,
        /// A person has to change something before work can go on (kstatus).
        Stalled,
        /// The resource is valid and holds at least one of its targets.
        Accepted,
        /// All ready pods run what the resource says.
        Programmed,
        /// No check of the targets is failing.
        Healthy,
        /// The fleet, or some pod by itself, runs in degraded mode.
        Degraded,
        /// Recovery may act now; if not, the reason names the gate that holds it.
        RecoveryAllowed,
        /// Every step of a ladder was tried and the check still fails.
        RecoveryExhausted,
        /// Some flag is overridden by a person.
        Overridden,
        /// Code in some pod reads another type than a flag has.
        TypeMismatch,
        /// The flag set is past its `expiresAt`.
        Expired,
    }
}
