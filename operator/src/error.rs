//! Why a reconciliation failed.

use crate::{fleet::index::ObjectKey, kubernetes::clients::ApiError, workload::publish::PublishError};
use contract::WorkloadId;
use std::time::Duration;

/// Longest time that a reconcile may take; every call in it has a shorter deadline of its own.
pub const RECONCILE_DEADLINE: Duration = Duration::from_secs(45);

/// Why a reconciliation failed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The API server refused or did not answer.
    #[error("{doing}: {source}")]
    Api {
        /// What was being done.
        doing: &'static str,
        /// The API server's words.
        source: ApiError,
    },
    /// The document could not be published.
    #[error("publishing: {0}")]
    Publish(#[from] PublishError),
    /// The workload went away.
    #[error("the workload {0} is gone")]
    WorkloadGone(WorkloadId),
    /// What is to be written is not what the type allows: a defect of the operator.
    #[error("a Recovery cannot be written: {0}")]
    NotWritable(#[source] serde_json::Error),
    /// Somebody made an object of the name that an intent has.
    #[error("a Recovery {0} is there that the operator did not make: delete it")]
    NameTaken(ObjectKey),
    /// This replica stopped leading in the middle.
    #[error("this replica does not lead any more: nothing was done")]
    NotLeading,
    /// It took too long.
    #[error("not done within {} s; it is tried again from the start", RECONCILE_DEADLINE.as_secs())]
    TimedOut,
    /// The operator's own code failed.
    #[error("internal error: {0}")]
    Panicked(String),
}

impl ReconcileError {
    /// Names what was being done.
    pub fn api(doing: &'static str) -> impl FnOnce(ApiError) -> Self {
        move |source| Self::Api { doing, source }
    }

    /// The object changed meanwhile: nothing is wrong, look again soon.
    pub fn is_conflict(&self) -> bool {
        match self {
            Self::Api { source, .. } | Self::Publish(PublishError::Api(source)) => {
                source.is_conflict() || source.is_not_found()
            }
            _ => false,
        }
    }

    /// Label for metrics: `conflict`, `timeout`, `panic` or `error`.
    pub fn label(&self) -> &'static str {
        match self {
            _ if self.is_conflict() => "conflict",
            Self::TimedOut => "timeout",
            Self::Panicked(_) => "panic",
            _ => "error",
        }
    }
}
