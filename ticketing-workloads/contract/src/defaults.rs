//! Numbers of ADR-007 that hold where neither the policy nor the workload says anything, besides the `Default`s in
//! [`crate::settings`]. They stand here once; docs and manifests are tested against them.

use crate::RetryBudgetSettings;

/// A retry budget of which the policy says no number: a fifth of the calls, and ten in ten seconds for a quiet service.
pub const RETRY_BUDGET: RetryBudgetSettings = RetryBudgetSettings { percent: 20, interval_ms: 10_000, min_retries: 10 };
/// Calls that a window must hold before a share of failures counts.
pub const MINIMUM_THROUGHPUT: u32 = 10;
/// Window over which a share of failures is taken, in milliseconds.
pub const SAMPLING_MS: u64 = 30_000;
/// Share of slow calls that opens a circuit, in percent.
pub const SLOW_CALL_PERCENT: u32 = 50;
/// How long a cached answer is fresh, in milliseconds.
pub const CACHE_TTL_MS: u64 = 300_000;
/// How long past that it may still be given, in milliseconds.
pub const CACHE_MAX_STALE_MS: u64 = 0;
/// HTTP status of a fixed answer.
pub const STATIC_STATUS_CODE: u16 = 503;
/// How long a memory check may be over its limit before it is unhealthy, in milliseconds.
pub const MEMORY_DEGRADED_FOR_MS: u64 = 60_000;
