//! Status of a `ResiliencePolicy`.

use crate::{
    Condition,
    resilience_policy::{FlagVariant, StepAction},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most actions that are in flight.
pub const MAX_IN_FLIGHT: usize = 100;
/// Most actions that are held back and named.
pub const MAX_WITHHELD: usize = 16;

/// What the operator sees and did. Times stand still while nothing happens, so that a healthy fleet causes no writes.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ResiliencePolicyStatus {
    /// The generation that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling and Stalled as kstatus reads them; Accepted, Programmed, Healthy, Degraded, RecoveryAllowed and RecoveryExhausted.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 16))]
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// Ready pods that run this policy, of all ready pods, such as 4/4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub programmed: Option<String>,
    /// Circuits that are open, and in how many pods, such as "catalog 2/2".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub open: Option<String>,
    /// Whether the fleet, or any pod by itself, runs in degraded mode.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degraded: Option<bool>,
    /// How the fleet is degraded. Absent: it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub degradation: Option<Box<DegradationStatus>>,
    /// The workloads, in the order of spec.targetRefs.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["kind".into(), "name".into()]))]
    #[schemars(length(max = 16))]
    #[serde(default)]
    pub targets: Vec<TargetStatus>,
    /// Circuits that are not closed somewhere.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["kind".into(), "target".into(), "dependency".into()]))]
    #[schemars(length(max = 256))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub circuits: Vec<CircuitStatus>,
    /// Checks that are not healthy somewhere.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["kind".into(), "target".into(), "name".into()]))]
    #[schemars(length(max = 256))]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<CheckFinding>,
    /// What is being done and was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<RecoverySummary>,
}

/// How a fleet is degraded. It is written when that changes, and when its end is put off; it is what the flags are set from, and what
/// another leader goes on from.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct DegradationStatus {
    /// The stage that is in force.
    #[schemars(length(max = 63))]
    pub stage: String,
    /// Which one that is, from 1.
    #[schemars(range(min = 1, max = 8))]
    pub level: i32,
    /// How many stages there are.
    #[schemars(range(min = 1, max = 8))]
    pub stages: i32,
    /// The load from which the stage is entered, in percent.
    #[schemars(range(min = 0, max = 100))]
    pub load_percent: i32,
    /// Since when.
    pub since: MicroTime,
    /// When it ends if the operator does not put that off, as it does while it runs.
    pub until: MicroTime,
    /// What it was entered for, such as "booking: 3 of 4 pods at 91 % or more".
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub why: String,
    /// The flags that it sets, by key.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["key".into()]))]
    #[schemars(length(max = 64))]
    pub flags: Vec<FlagVariant>,
    /// Flags of these that another policy sets, and what else there is to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
    /// true: nothing is set, this is what would be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// The kind of a workload that an older version wrote without one.
fn deployment() -> String {
    "Deployment".to_owned()
}

/// One workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct TargetStatus {
    /// Kind of the workload.
    #[schemars(length(max = 63))]
    pub kind: String,
    /// Name of the workload.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Whether this policy is the one that the workload runs by.
    pub accepted: bool,
    /// One word: Accepted, TargetNotFound, Conflicted, DryRun or Suspended.
    #[schemars(length(max = 63))]
    pub reason: String,
    /// Ready pods.
    #[schemars(range(min = 0))]
    pub pods: i32,
    /// Ready pods that run this configuration and understood all of it.
    #[schemars(range(min = 0))]
    pub pods_in_sync: i32,
    /// Pods whose admin port does not answer, or not in a way that can be believed.
    #[schemars(range(min = 0))]
    pub pods_unreachable: i32,
    /// Revision of the published configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<i64>,
    /// Hash of the published configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub content_hash: Option<String>,
    /// For a policy that only runs dry: the hash that it would publish.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub would_publish: Option<String>,
    /// What is wrong, if anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

/// One circuit over all pods of a workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CircuitStatus {
    /// Kind of the workload.
    #[serde(default = "deployment")]
    #[schemars(length(max = 63))]
    pub kind: String,
    /// Name of the workload.
    #[schemars(length(max = 63))]
    pub target: String,
    /// Name of the dependency.
    #[schemars(length(max = 63))]
    pub dependency: String,
    /// Pods whose circuit is not closed.
    #[schemars(range(min = 0))]
    pub open_pods: i32,
    /// Pods that reported.
    #[schemars(range(min = 0))]
    pub total_pods: i32,
    /// When the first of them opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_since: Option<MicroTime>,
}

/// One check that is not healthy.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct CheckFinding {
    /// Kind of the workload.
    #[serde(default = "deployment")]
    #[schemars(length(max = 63))]
    pub kind: String,
    /// Name of the workload.
    #[schemars(length(max = 63))]
    pub target: String,
    /// Name of the check.
    #[schemars(length(max = 63))]
    pub name: String,
    /// Pods for which it fails, at most 10 by name.
    #[schemars(length(max = 10), inner(length(max = 253)))]
    pub pods: Vec<String>,
    /// How many pods that is.
    #[schemars(range(min = 0))]
    pub unhealthy_pods: i32,
    /// Since when it fails in the first of them.
    pub since: MicroTime,
    /// What the pod said.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub message: String,
}

/// What is being done, what was done last, and what is held back. All that was done is in the Recovery objects.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct RecoverySummary {
    /// The state of recovery in a few words, such as "ResetConnections (1 of 2)".
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub summary: Option<String>,
    /// Actions that may still be done before the budget is used up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub remaining_budget: Option<i32>,
    /// What is under way, at most 100.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 100))]
    pub in_flight: Vec<ActionRecord>,
    /// What was over last. With dryRun: what would have been done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<ActionRecord>,
    /// What is needed and held back, at most 16.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub withheld: Vec<WithheldAction>,
    /// What version 0.1 wrote down. It is made into Recovery objects once, and is empty after that.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 20))]
    pub recent: Vec<ActionRecord>,
}

/// An action that is needed and held back.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct WithheldAction {
    /// The workload: the name of a Deployment; of a StatefulSet `StatefulSet/name`.
    #[schemars(length(max = 80))]
    pub target: String,
    /// Name of the pod, for an action on a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pod: Option<String>,
    /// The check that fails.
    #[schemars(length(max = 63))]
    pub check: String,
    /// The action that waits.
    #[schemars(length(max = 63))]
    pub action: String,
    /// What holds it back, in one word that has a runbook page.
    #[schemars(length(max = 63))]
    pub reason: String,
    /// When that ends by itself, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<MicroTime>,
    /// Detail in words.
    #[schemars(length(max = 1024))]
    pub message: String,
}

/// One action, from its intent to its outcome.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ActionRecord {
    /// Name of the Recovery. Absent in what version 0.1 wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub recovery: Option<String>,
    /// Id of the intent; it is carried to where the action lands, which does each id once.
    #[schemars(length(min = 1, max = 64))]
    pub id: String,
    /// The workload: the name of a Deployment; of a StatefulSet `StatefulSet/name`.
    #[schemars(length(max = 80))]
    pub target: String,
    /// Name of the pod, for an action on a pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pod: Option<String>,
    /// Which pod of that name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub pod_uid: Option<String>,
    /// Which process in the pod, for an action that the pod does itself: one that was started since must not do it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub pod_instance: Option<String>,
    /// The check that fails.
    #[schemars(length(max = 63))]
    pub check: String,
    /// The action.
    pub action: StepAction,
    /// Which step of the ladder, from 1.
    #[schemars(range(min = 1, max = 6))]
    pub step: i32,
    /// How many steps the ladder has.
    #[schemars(range(min = 1, max = 6))]
    pub steps: i32,
    /// When the check began to fail.
    pub failed_at: MicroTime,
    /// When the intent was written.
    pub started_at: MicroTime,
    /// When the action was executed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acted_at: Option<MicroTime>,
    /// When the outcome was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<MicroTime>,
    /// What came of it.
    pub outcome: ActionOutcome,
    /// true: nothing was done, this is what would have been done.
    #[serde(default)]
    pub dry_run: bool,
    /// Detail in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

/// What came of an action.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActionOutcome {
    /// Intended, not yet known to be executed.
    Pending,
    /// Refused for now, by a disruption budget for example; it is asked for again.
    Waiting,
    /// Carried out; the check is watched.
    Verifying,
    /// The check was healthy for healthyDelay.
    Succeeded,
    /// The check did not become healthy within the step's time, or the action failed.
    Failed,
    /// The pod or the need for it went away.
    Cancelled,
}
