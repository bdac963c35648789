//! `Recovery`: one action, why it is taken and what came of it. The Recoveries of a workload are the ledger that budget,
//! cooldown and the position on a ladder are computed from.

use crate::{
    bounded::Duration,
    resilience_policy::{CronJobRef, StepAction, StepTime, TargetRef},
    schema::{NAME_PATTERN, OBJECT_NAME_PATTERN},
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most finished Recoveries that are kept of one workload.
pub const MAX_PER_WORKLOAD: usize = 200;

/// A Recovery is one action on a workload or on one of its pods: written before anything is done, and brought to its outcome afterwards. The operator makes them by its policies. A person makes one to have something done now, and deletes one to cancel what was not done yet.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "resilience.ticketwave.io",
    version = "v1alpha1",
    kind = "Recovery",
    doc = "A Recovery is one action on a workload or one of its pods: why it is taken, and what came of it. Make one to have something done now; delete one to cancel it.",
    plural = "recoveries",
    shortname = "rec",
    category = "ticketwave",
    namespaced,
    status = "RecoveryStatus",
    derive = "PartialEq",
    printcolumn(name = "Workload", type_ = "string", json_path = ".spec.targetRef.name"),
    printcolumn(name = "Check", type_ = "string", json_path = ".spec.check"),
    printcolumn(name = "Pod", type_ = "string", json_path = ".spec.pod.name"),
    printcolumn(name = "Action", type_ = "string", json_path = ".spec.action"),
    printcolumn(name = "Step", type_ = "string", json_path = ".spec.step", description = "Which step of the ladder, of how many"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message"),
    printcolumn(name = "Kind", type_ = "string", json_path = ".spec.targetRef.kind", priority = 1),
    printcolumn(name = "Policy", type_ = "string", json_path = ".spec.policyRef.name", priority = 1),
    selectable = ".spec.targetRef.name",
    selectable = ".spec.action",
    selectable = ".spec.check",
    validation = Rule::new("self.metadata.name.size() <= 200").message("a Recovery's name must have at most 200 characters"),
    validation = Rule::new("has(self.spec.policyRef) || !self.metadata.name.matches('-[0-9a-f]{16}$')").message("names that end like this are the operator's own; choose another one"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self == oldSelf")
        .message("a Recovery cannot be changed: delete it and make another one").reason(Reason::FieldValueForbidden),
    validation = Rule::new("(self.action == 'RunCleanupJob') == has(self.cronJobRef)")
        .message("cronJobRef must be set for action RunCleanupJob, and for no other").field_path(".cronJobRef").reason(Reason::FieldValueInvalid),
    validation = Rule::new("!(self.action in ['TrimMemory', 'ResetConnections', 'RestartPod']) || has(self.pod)")
        .message("pod must be set: this action is done to one pod").field_path(".pod").reason(Reason::FieldValueRequired),
    validation = Rule::new("!self.dryRun || has(self.policyRef)")
        .message("dryRun is the operator's own; leave it out in a Recovery that you make").field_path(".dryRun").reason(Reason::FieldValueInvalid),
    validation = Rule::new("has(self.policyRef) || !(has(self.after) || has(self.failedAt) || has(self.decidedAt) || has(self.before) || (has(self.pod) && has(self.pod.instance)))")
        .message("after, failedAt, decidedAt, before and pod.instance are the operator's own; leave them out in a Recovery that you make").reason(Reason::FieldValueInvalid),
    validation = Rule::new("has(self.policyRef) == has(self.intent)")
        .message("intent is the operator's own; leave it out in a Recovery that you make").field_path(".intent").reason(Reason::FieldValueInvalid),
)]
pub struct RecoverySpec {
    /// The workload: a Deployment or StatefulSet of the same namespace.
    pub target_ref: TargetRef,
    /// The policy by which the operator decided it. Absent: a person asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_ref: Option<PolicyRef>,
    /// The check that fails. In a Recovery that you make: the check that has to be healthy for it to count as a success; without one, it is enough that it was done, and for a restart that the new pod is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = NAME_PATTERN))]
    pub check: Option<String>,
    /// The pod, for an action on one pod. Its name is enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// What is done. TrimMemory and ResetConnections are done by the pod itself. RunCleanupJob runs a Job from a CronJob. RestartPod evicts the pod, so that disruption budgets hold.
    pub action: StepAction,
    /// For RunCleanupJob: the CronJob of the same namespace to run; it may be suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cron_job_ref: Option<CronJobRef>,
    /// How long it may take until it has helped, 1s to 1h. Default: 60s.
    #[serde(default = "default_timeout")]
    pub timeout: StepTime,
    /// Which step of the ladder it is, of how many, such as 1/2. Default: 1/1.
    #[serde(default = "default_step")]
    #[schemars(length(max = 3), regex(pattern = "^[1-6]/[1-6]$"))]
    pub step: String,
    /// true: nothing is done, this is what would be done. Default: false.
    #[serde(default)]
    pub dry_run: bool,
    /// Who asked for it and why, in free text; for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub requested_by: Option<String>,
    /// Id that is carried to where the action lands, which does each id once. No two Recoveries have the same. Set by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 16, max = 16), regex(pattern = "^[0-9a-f]{16}$"))]
    pub intent: Option<String>,
    /// How the name of the Recovery ends that came before this one, for the same check of the same pod. Set by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 16, max = 16), regex(pattern = "^[0-9a-f]{16}$"))]
    pub after: Option<String>,
    /// When the check began to fail. Set by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_at: Option<MicroTime>,
    /// When it was decided. Set by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decided_at: Option<MicroTime>,
    /// For a restart: the workload when it was decided. No pod that was there before is taken for a successor. Set by the operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<WorkloadBefore>,
}

fn default_timeout() -> StepTime {
    Duration::from_millis(60_000)
}

fn default_step() -> String {
    "1/1".to_owned()
}

/// Reference to a policy of the same namespace.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct PolicyRef {
    /// Its name.
    #[schemars(length(min = 1, max = 63), regex(pattern = OBJECT_NAME_PATTERN))]
    pub name: String,
}

/// A pod of the workload.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
pub struct PodRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = OBJECT_NAME_PATTERN))]
    pub name: String,
    /// Which pod of that name; without it, the one that has the name when the operator first sees this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub uid: Option<String>,
    /// Which process in the pod, for an action that the pod does itself: one that was started since must not do it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub instance: Option<String>,
}

/// A workload at some moment.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadBefore {
    /// Pods that it was to have.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub wanted: i32,
    /// When the youngest of its pods were created, by the clock of the API server, in whole seconds.
    pub youngest_at: Time,
    /// The uids of those, at most 16.
    #[schemars(length(max = 16), inner(length(max = 64)))]
    pub youngest: Vec<String>,
}

crate::words! {
    /// How far a Recovery is. In a status it may also be a word that a newer version wrote.
    pub enum Phase {
        /// Intended, not yet known to be executed.
        Pending,
        /// Refused for now, by a disruption budget for example, or held back by a gate; it is asked for again.
        Waiting,
        /// Executed; the check is watched.
        Verifying,
        /// It helped.
        Succeeded,
        /// It did not help in time, or could not be done.
        Failed,
        /// The pod or the need for it went away.
        Cancelled,
        /// Nothing was done: a dry run.
        Simulated,
    }
}

/// How far a Recovery is, and what came of it.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct RecoveryStatus {
    /// Pending (intended), Waiting (refused or held back for now; it is asked for again), Verifying (done; the check is watched), Succeeded, Failed, Cancelled (the pod or the need for it went away), or Simulated (a dry run: nothing was done).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub phase: Option<String>,
    /// Of a dry run that is over: Succeeded if the check became healthy by itself in the step's time, Failed if not, Cancelled if the pod went away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub outcome: Option<String>,
    /// When it was executed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub executed_at: Option<MicroTime>,
    /// When its outcome was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<MicroTime>,
    /// For an action that failed: when its check had been healthy for healthyDelay after all. Until then the next failure goes on with the step after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub healed_at: Option<MicroTime>,
    /// Which pod of that name is meant, where spec.pod has no uid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub pod_uid: Option<String>,
    /// For a restart that waited: the workload when it was last asked for, where that differs from spec.before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<WorkloadBefore>,
    /// For a restart: uid of the pod that took the place, once it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub successor: Option<String>,
    /// Detail in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}
