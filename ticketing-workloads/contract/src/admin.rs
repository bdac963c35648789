//! Calls of a pod's admin port.
//!
//! Every call is signed with the workload's token ([`crate::signing`]); a pod without a token refuses them all. An operator
//! of version 0.1 sends the token itself instead, in [`TOKEN_HEADER`], which has a name of its own because the API
//! server's pod proxy strips `Authorization`.

use crate::Applied;
use serde::{Deserialize, Serialize};

/// Header that carries the plain token, of an operator of version 0.1. A pod that has received a signed request does not
/// accept it any more.
pub const TOKEN_HEADER: &str = "x-resilience-token";
/// Name of the container port, and the port when no container names one.
pub const PORT_NAME: &str = "admin";
/// Port of the admin server when the pod names none.
pub const DEFAULT_PORT: u16 = 9901;
/// `PUT`: a [`crate::RuntimeConfig`]; the answer is a [`PushAnswer`].
pub const CONFIG_PATH: &str = "/admin/v1/config";
/// `GET`: the last configurations that went live, newest first, as a list of [`Applied`].
pub const APPLIED_PATH: &str = "/admin/v1/applied";
/// `POST`: an [`ActionRequest`]; the answer is an [`ActionAnswer`].
pub const ACTIONS_PATH: &str = "/admin/v1/actions";
/// `GET`: a [`crate::EffectiveReport`], what the pod runs by and where each value comes from. Since contract 2.
pub const EFFECTIVE_PATH: &str = "/admin/v1/effective";
/// `PUT`: a [`MemoryFault`], of a drill. A pod that was not started with faults allowed refuses it.
pub const MEMORY_FAULT_PATH: &str = "/admin/v1/faults/memory";
/// `GET`: a [`crate::HealthReport`].
pub const HEALTH_PATH: &str = "/health";
/// The same on the admin port, without a signature or a token: for those in the cluster, where the public port does not say it.
pub const REPORT_PATH: &str = "/report";
/// Keys of the token Secret: the token in force, and the one before it while pods still learn the new one.
pub const TOKEN_KEYS: [&str; 2] = ["current", "previous"];

/// Answer to a pushed configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PushAnswer {
    /// What the pod did with it.
    pub outcome: PushOutcome,
    /// What the pod runs now.
    pub applied: Applied,
    /// Why it was refused; empty if it was not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// What a pod did with a pushed configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PushOutcome {
    /// It is live now.
    Applied,
    /// It was live already.
    Unchanged,
    /// Older than what is live.
    RefusedOlder,
    /// Too far ahead of the pod's clock.
    RefusedFuture,
    /// Not a configuration for this workload.
    RefusedInvalid,
    /// An outcome that this reader does not know.
    #[serde(other)]
    Unknown,
}

/// A request to execute a recovery action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActionRequest {
    /// Id of the intent behind it. A pod does each id once, however often it is asked.
    pub intent_id: String,
    /// The action to execute.
    pub action: Action,
    /// The check that failed; the action is about what that check looks at. Empty: about everything that it can be done to.
    pub check: String,
    /// The process that is meant, as [`crate::HealthReport::instance`] names it. A process that was started since does
    /// not know which intents the one before it has done, so it must not act on them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
}

/// A fault of a drill: memory that the process holds and does not need, as one that leaks does. It ends with its lease, with
/// the process, or when one of 0 MiB takes its place; the drill may be long gone then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemoryFault {
    /// How much is held, in MiB; 0 to [`MemoryFault::MAX_MEBIBYTES`]. It is not added to what an earlier one holds.
    pub mebibytes: u32,
    /// For how long, in seconds; 1 to [`MemoryFault::MAX_LEASE_SECONDS`].
    pub lease_seconds: u32,
}

impl MemoryFault {
    /// Most memory that may be held, in MiB.
    pub const MAX_MEBIBYTES: u32 = 1024;
    /// Longest lease, in seconds.
    pub const MAX_LEASE_SECONDS: u32 = 600;
}

/// Recovery actions that a pod executes in its own process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Gives up every pooled connection, hung ones too; calls open new ones.
    ResetConnections,
    /// Returns unused memory to the operating system, as far as the workload can.
    TrimMemory,
    /// An action that this reader does not know.
    #[serde(other)]
    Unknown,
}

/// Answer to an action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActionAnswer {
    /// The id of the request.
    pub intent_id: String,
    /// How the request ended.
    pub outcome: ActionOutcome,
    /// Detail, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// The outcome of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionOutcome {
    /// Executed now.
    Done,
    /// This id was done before; nothing was done again.
    AlreadyDone,
    /// Another process was meant; nothing was done.
    OtherInstance,
    /// The workload cannot do this.
    Unsupported,
    /// It was tried and failed.
    Failed,
    /// An outcome that this reader does not know.
    #[serde(other)]
    Unknown,
}
