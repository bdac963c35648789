//! Why a reconcile over an object failed, and when to try again.

use crate::{kubernetes::clients::ApiError, workload::publish::PublishError};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Why a reconcile failed.
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
    /// This replica stopped leading in the middle.
    #[error("this replica does not lead any more: nothing was done")]
    NotLeading,
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
}

/// How often each object failed in a row.
#[derive(Default)]
pub struct Backoffs(Mutex<HashMap<String, u32>>);

impl Backoffs {
    /// The wait after one more failure: 0.5 s doubled up to 60 s; a conflict waits 0.1 s.
    pub fn after_failure(&self, key: &str, error: &ReconcileError) -> Duration {
        if error.is_conflict() {
            return Duration::from_millis(100);
        }
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let failures = all.entry(key.to_owned()).or_insert(0);
        *failures = failures.saturating_add(1);
        Duration::from_millis(250 * 2u64.pow((*failures).min(8))).min(Duration::from_secs(60))
    }

    /// The object is well again, or gone.
    pub fn forget(&self, key: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}
