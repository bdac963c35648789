//! Specs become settings here, and nowhere else.

pub mod asked;
pub mod checks;
pub mod degradation;
pub mod findings;
pub mod flags;
pub mod policy;
pub mod recovery;

use contract::WorkloadKind;
use crds::resilience_policy::TargetKind;

/// Why a resource cannot be used, with the field that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct Invalid {
    path: String,
    message: String,
}

fn invalid(path: impl Into<String>, message: impl Into<String>) -> Invalid {
    Invalid { path: path.into(), message: message.into() }
}

/// A number that the schema bounds to be non-negative.
fn count(value: i32) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

/// The kind of a workload.
pub const fn target_kind(kind: TargetKind) -> WorkloadKind {
    match kind {
        TargetKind::Deployment => WorkloadKind::Deployment,
        TargetKind::StatefulSet => WorkloadKind::StatefulSet,
    }
}
