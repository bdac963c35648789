//! What a pod finds wrong with a flag of the document that it runs.

use serde::{Deserialize, Serialize};

/// Most of one kind that a pod reports.
pub const MAX_FLAG_PROBLEMS: usize = 32;

/// Longest [`FlagProblem::key`], and longest [`FlagProblem::message`], in bytes.
pub const MAX_FLAG_PROBLEM_BYTES: usize = 256;

/// A flag that a pod has had for so long, in milliseconds, without any code that read it is reported: an hour.
pub const UNREAD_AFTER_MS: u64 = 3_600_000;

/// A flag that does not do in a pod what its definition says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlagProblem {
    /// Key of the flag.
    pub key: String,
    /// What kind of problem it is.
    pub kind: FlagProblemKind,
    /// What is wrong, and what holds instead, in words.
    #[serde(default)]
    pub message: String,
}

/// What can be wrong with a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum FlagProblemKind {
    /// The pod cannot use the targeting rule. The default variant holds.
    InvalidRule,
    /// Code asks for another type than the value has. The default in the code holds.
    TypeMismatch,
    /// Something that this reader does not know.
    #[serde(other)]
    Unknown,
}
