//! What a policy says of one dependency, and nothing else.
//!
//! Every field is optional. What is absent is the workload's built-in value, or ADR-007's number where the workload has
//! none built in; [`crate::resolution`] fills it in. "None" is said explicitly: an empty `fallback`, `numRetries` 0,
//! `manualState` Closed. The fields have the names that people write in a policy's manifest; durations are whole
//! milliseconds.

use crate::{FallbackSettings, ManualState, RetryOn};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// What a policy says of one dependency.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DependencyPolicy {
    /// Deadlines.
    #[serde(skip_serializing_if = "is_default")]
    pub timeout: TimeoutPolicy,
    /// Retries within the deadline.
    #[serde(skip_serializing_if = "is_default")]
    pub retry: RetryPolicy,
    /// The circuit breaker.
    #[serde(skip_serializing_if = "is_default")]
    pub circuit_breaker: CircuitBreakerPolicy,
    /// Name of the bulkhead that calls pass through: one of the policy, or one that the workload has built in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bulkhead: Option<String>,
    /// What to answer with when the call fails, in order. It replaces the built-in list as a whole; empty: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Vec<FallbackPolicy>>,
}

/// What a policy says of deadlines.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TimeoutPolicy {
    /// Total time of a call, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_ms: Option<u64>,
    /// Time of one attempt, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_try_ms: Option<u64>,
    /// Time to open a connection, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_ms: Option<u64>,
}

/// What a policy says of retries.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryPolicy {
    /// Attempts after the first one; 0: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_retries: Option<u32>,
    /// Wait before the first retry, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base_interval_ms: Option<u64>,
    /// Each wait is this many times the one before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    /// Longest wait, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_interval_ms: Option<u64>,
    /// A wait is shortened by a random share of up to this many percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter_percent: Option<u32>,
    /// Failures that are worth another attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_on: Option<BTreeSet<RetryOn>>,
    /// HTTP status codes that are retried as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http_status_codes: Option<BTreeSet<u16>>,
    /// HTTP methods that may be sent twice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub methods: Option<BTreeSet<String>>,
    /// Bound on retries as a share of the traffic; present and empty: a bound with the numbers that are built in, else
    /// [`crate::defaults::RETRY_BUDGET`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudgetPolicy>,
}

/// What a policy says of a retry budget.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetryBudgetPolicy {
    /// Retries per hundred calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
    /// Over this time, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// Retries that are always allowed in each interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_retries: Option<u32>,
}

/// What a policy says of a circuit breaker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CircuitBreakerPolicy {
    /// Failures in a row that open the circuit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub consecutive_failures: Option<u32>,
    /// Share of failed calls, in percent, that opens the circuit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_ratio_percent: Option<u32>,
    /// Calls that the window must hold before the share counts; of use only where the circuit opens by a share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimum_throughput: Option<u32>,
    /// Length of the window, in milliseconds; of use only where the circuit opens by a share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampling_ms: Option<u64>,
    /// How long the circuit stays open before trial calls, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub break_ms: Option<u64>,
    /// Longest break, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_break_ms: Option<u64>,
    /// Trial calls at once while half-open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub half_open_max_requests: Option<u32>,
    /// When a call counts as slow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_call: Option<SlowCallPolicy>,
    /// Auto, Open or Closed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manual_state: Option<ManualState>,
}

/// What a policy says of slow calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlowCallPolicy {
    /// From this duration on a call is slow, in milliseconds.
    pub duration_ms: u64,
    /// Slow calls per hundred at which the circuit opens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
}

/// One entry of a policy's fallback list. What is absent in it is taken from the first built-in fallback of the same
/// type, else from [`crate::defaults`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum FallbackPolicy {
    /// The last good answer.
    Cache {
        /// How long an answer is fresh, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ttl_ms: Option<u64>,
        /// How long past that it may still be given, in milliseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        max_stale_ms: Option<u64>,
    },
    /// Another dependency that does the same.
    Provider {
        /// Its name.
        provider: String,
    },
    /// Taken now, settled later.
    Queue,
    /// A fixed answer.
    Static {
        /// HTTP status.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status_code: Option<u16>,
        /// Body, as it is sent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        body: Option<String>,
    },
    /// A type that this reader does not know; it is passed over.
    #[serde(other)]
    Unknown,
}

impl FallbackPolicy {
    /// The entry with what it leaves out filled in; `built_in` is the workload's own list.
    pub(crate) fn fill(&self, built_in: &[FallbackSettings]) -> FallbackSettings {
        use crate::defaults;
        match self {
            Self::Cache { ttl_ms, max_stale_ms } => {
                let own = built_in.iter().find_map(|one| match one {
                    FallbackSettings::Cache { ttl_ms, max_stale_ms } => Some((*ttl_ms, *max_stale_ms)),
                    _ => None,
                });
                let (ttl, stale) = own.unwrap_or((defaults::CACHE_TTL_MS, defaults::CACHE_MAX_STALE_MS));
                FallbackSettings::Cache { ttl_ms: ttl_ms.unwrap_or(ttl), max_stale_ms: max_stale_ms.unwrap_or(stale) }
            }
            Self::Provider { provider } => FallbackSettings::Provider { provider: provider.clone() },
            Self::Queue => FallbackSettings::Queue,
            Self::Static { status_code, body } => {
                let own = built_in.iter().find_map(|one| match one {
                    FallbackSettings::Static { status_code, body } => Some((*status_code, body.as_str())),
                    _ => None,
                });
                let (status, text) = own.unwrap_or((defaults::STATIC_STATUS_CODE, ""));
                FallbackSettings::Static {
                    status_code: status_code.unwrap_or(status),
                    body: body.clone().unwrap_or_else(|| text.to_owned()),
                }
            }
            Self::Unknown => FallbackSettings::Unknown,
        }
    }
}
