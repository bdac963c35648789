//! What a policy means to a running workload, with every default filled in.
//!
//! Named things are maps by name and unordered choices are sets, so that two policies that mean the same are equal.
//! Durations are whole milliseconds. The defaults are the HTTP numbers of ADR-007 §1.

use crate::{DependencyPolicy, resolution};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The `policy` section of a document.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicySettings {
    /// How each thing that the workload calls is called, with every value filled in. In a document that is what readers
    /// of contract 1 run by: they know nothing of `dependency_policies`, and take an entry in place of all that they have
    /// built in. Later readers use an entry only if the document has no policy of that name.
    pub dependencies: BTreeMap<String, DependencySettings>,
    /// What the policy says of each dependency, and nothing else; see [`crate::resolution`]. Since contract 2.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub dependency_policies: BTreeMap<String, DependencyPolicy>,
    /// Compartments that dependencies share.
    pub bulkheads: BTreeMap<String, BulkheadSettings>,
    /// Checks that the pod itself runs and reports.
    pub health_checks: BTreeMap<String, HealthCheckSettings>,
    /// When the pod calls itself degraded; absent: as the workload has it built in, else never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degradation: Option<DegradationSettings>,
    /// Where buyers wait while there are too many of them, for a workload that has such a place; absent: nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_room: Option<WaitingRoomSettings>,
}

impl PolicySettings {
    /// Puts what a policy says of a dependency in both places: as it is, and filled in for readers of contract 1, as if
    /// the workload had nothing built in. Answers what was said of that dependency before.
    pub fn insert_dependency(&mut self, name: String, said: DependencyPolicy) -> Option<DependencyPolicy> {
        self.dependencies.insert(name.clone(), resolution::resolve(&said, None).settings);
        self.dependency_policies.insert(name, said)
    }

    /// The dependencies that it names.
    pub fn named_dependencies(&self) -> BTreeSet<&str> {
        self.dependencies.keys().chain(self.dependency_policies.keys()).map(String::as_str).collect()
    }
}

/// Settings of one dependency, with every value filled in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DependencySettings {
    /// Deadlines.
    pub timeout: TimeoutSettings,
    /// Retries within the deadline.
    pub retry: RetrySettings,
    /// The circuit breaker.
    pub circuit_breaker: CircuitBreakerSettings,
    /// Name of the bulkhead that calls pass through; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bulkhead: Option<String>,
    /// What to answer with when the call fails, tried in order.
    pub fallback: Vec<FallbackSettings>,
}

/// Deadlines of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TimeoutSettings {
    /// Total time of a call with all its attempts and waits, in milliseconds.
    pub request_ms: u64,
    /// Time of one attempt, in milliseconds.
    pub per_try_ms: u64,
    /// Time to open a connection, in milliseconds; absent: bounded by `per_try_ms` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connect_ms: Option<u64>,
}

impl Default for TimeoutSettings {
    fn default() -> Self {
        Self { request_ms: 15_000, per_try_ms: 10_000, connect_ms: None }
    }
}

impl DependencySettings {
    /// Time of a call that makes every try for as long as it may and waits in between, in milliseconds; what of it is
    /// beyond the time of the whole call is cut short or never starts.
    pub fn longest_ms(&self) -> u64 {
        let tries = u64::from(self.retry.num_retries).saturating_add(1);
        tries.saturating_mul(self.timeout.per_try_ms).saturating_add(self.retry.total_wait_ms())
    }
}

/// Retries of a call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RetrySettings {
    /// Attempts after the first one.
    pub num_retries: u32,
    /// Wait before the first retry, in milliseconds.
    pub base_interval_ms: u64,
    /// Each wait is this many times the one before.
    pub factor: f64,
    /// Longest wait, in milliseconds.
    pub max_interval_ms: u64,
    /// A wait is shortened by a random share of up to this many percent, so that callers do not come back in step.
    pub jitter_percent: u32,
    /// Which failures are worth another attempt.
    pub retry_on: BTreeSet<RetryOn>,
    /// HTTP status codes that are retried besides what `retry_on` names.
    pub http_status_codes: BTreeSet<u16>,
    /// HTTP methods that may be sent twice; any other needs an idempotency key.
    pub methods: BTreeSet<String>,
    /// Bound on retries as a share of the traffic; absent: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<RetryBudgetSettings>,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            num_retries: 3,
            base_interval_ms: 2_000,
            factor: 2.0,
            max_interval_ms: 30_000,
            jitter_percent: 0,
            retry_on: BTreeSet::from([RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::ServerError]),
            http_status_codes: BTreeSet::new(),
            methods: ["GET", "HEAD", "OPTIONS", "PUT", "DELETE"].map(String::from).into(),
            budget: None,
        }
    }
}

impl RetrySettings {
    /// The wait before retry number `retry` (from 1), in milliseconds and before jitter.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "waits are bounded by max_interval_ms, far below 2^53; `as` saturates"
    )]
    pub fn wait_ms(&self, retry: u32) -> u64 {
        let exponent = i32::try_from(retry.saturating_sub(1)).unwrap_or(i32::MAX);
        let wait = self.base_interval_ms as f64 * self.factor.max(1.0).powi(exponent);
        (wait as u64).min(self.max_interval_ms)
    }

    /// All waits together, in milliseconds and before jitter.
    pub fn total_wait_ms(&self) -> u64 {
        // A workload may claim to have any number of retries built in; the sum must not take as long to make.
        const ADDED_UP: u32 = 1_000;
        let first =
            (1..=self.num_retries.min(ADDED_UP)).fold(0_u64, |sum, retry| sum.saturating_add(self.wait_ms(retry)));
        let others =
            u64::from(self.num_retries.saturating_sub(ADDED_UP)).saturating_mul(self.wait_ms(self.num_retries));
        first.saturating_add(others)
    }
}

/// Failures that a retry may cure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RetryOn {
    /// No answer within the attempt's time.
    Timeout,
    /// No connection could be had, or it broke before an answer.
    ConnectFailure,
    /// HTTP status 500 and above.
    #[serde(rename = "5xx")]
    ServerError,
    /// HTTP 429, 503 with `Retry-After`, or an answer whose sender says that it refuses because of its load.
    RateLimited,
    /// The database chose this transaction as the victim of a deadlock, or could not serialise it.
    Deadlock,
    /// Somebody else changed the row first (optimistic locking).
    VersionConflict,
    /// A value that a newer operator knows and this reader does not.
    #[serde(other)]
    Unknown,
}

/// Bound on retries as a share of calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RetryBudgetSettings {
    /// Retries per hundred calls.
    pub percent: u32,
    /// Over this time, in milliseconds.
    pub interval_ms: u64,
    /// Retries that are always allowed per interval, so that a quiet service may retry too.
    pub min_retries: u32,
}

/// A circuit breaker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CircuitBreakerSettings {
    /// When it opens.
    pub trip: TripRule,
    /// How long it stays open before it lets trial calls through, in milliseconds.
    pub break_ms: u64,
    /// Failed trials double the break up to this, in milliseconds; absent: the break does not grow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_break_ms: Option<u64>,
    /// Trial calls that may be under way at once while half-open; as many successes in a row close the circuit.
    pub half_open_max_requests: u32,
    /// Calls that are slow count as failures; absent: they do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_call: Option<SlowCallSettings>,
    /// A person's word over the breaker's own decision.
    pub manual_state: ManualState,
}

impl Default for CircuitBreakerSettings {
    fn default() -> Self {
        Self {
            trip: TripRule::ConsecutiveFailures { failures: 5 },
            break_ms: 30_000,
            max_break_ms: None,
            half_open_max_requests: 1,
            slow_call: None,
            manual_state: ManualState::Auto,
        }
    }
}

/// When a circuit opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum TripRule {
    /// After this many failures without a success between them.
    ConsecutiveFailures {
        /// How many.
        failures: u32,
    },
    /// When the share of failures within a window reaches a limit.
    FailureRatio {
        /// Failures per hundred calls.
        percent: u32,
        /// Calls that the window must hold before the share counts.
        minimum_throughput: u32,
        /// Length of the window, in milliseconds.
        sampling_ms: u64,
    },
    /// A rule that a newer operator knows and this reader does not; the reader keeps to its default rule.
    #[serde(other)]
    Unknown,
}

/// When a call counts as slow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlowCallSettings {
    /// From this duration on, in milliseconds.
    pub duration_ms: u64,
    /// Slow calls per hundred at which the circuit opens.
    pub percent: u32,
}

/// A person's word over the breaker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ManualState {
    /// The breaker judges for itself.
    #[default]
    Auto,
    /// Held open: no call goes through.
    Open,
    /// Held closed: every call goes through.
    Closed,
    /// A state that this reader does not know; it behaves as `Auto`.
    #[serde(other)]
    Unknown,
}

/// A compartment with a bounded number of calls in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BulkheadSettings {
    /// Calls at once.
    pub max_concurrent: u32,
    /// Calls that may wait for a place.
    pub max_queued: u32,
    /// Longest wait for a place, in milliseconds.
    pub max_wait_ms: u64,
}

impl Default for BulkheadSettings {
    fn default() -> Self {
        Self { max_concurrent: 10, max_queued: 100, max_wait_ms: 1_000 }
    }
}

/// What to answer with when a call fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum FallbackSettings {
    /// The last good answer.
    Cache {
        /// How long an answer is fresh, in milliseconds.
        ttl_ms: u64,
        /// How long past that it may still be given, in milliseconds.
        max_stale_ms: u64,
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
        status_code: u16,
        /// Body, as it is sent.
        body: String,
    },
    /// A kind that this reader does not know; it is passed over.
    #[serde(other)]
    Unknown,
}

/// A check that the pod runs itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HealthCheckSettings {
    /// Time between two runs, in milliseconds.
    pub interval_ms: u64,
    /// Time of one run, in milliseconds.
    pub timeout_ms: u64,
    /// For a memory check: bytes from which the check is degraded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max_bytes: Option<u64>,
    /// For a memory check: percent of the container's limit from which the check is degraded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max_percent: Option<u32>,
    /// For a memory check: how long it may be degraded, in milliseconds, before it is unhealthy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_degraded_for_ms: Option<u64>,
}

impl Default for HealthCheckSettings {
    fn default() -> Self {
        Self {
            interval_ms: 5_000,
            timeout_ms: 1_000,
            memory_max_bytes: None,
            memory_max_percent: None,
            memory_degraded_for_ms: None,
        }
    }
}

/// When a pod calls itself degraded, with hysteresis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DegradationSettings {
    /// Load from which it is degraded, in percent.
    pub enter_load_percent: u32,
    /// The load must stay there this long, in milliseconds.
    pub enter_for_ms: u64,
    /// Load below which it is normal again, in percent.
    pub exit_load_percent: u32,
    /// The load must stay there this long, in milliseconds.
    pub exit_for_ms: u64,
    /// Flags that take another variant while degraded: flag to variant. With stages, those of the first one.
    pub flag_overrides: BTreeMap<String, String>,
    /// All stages, by ascending load, where the policy has more than one. Since contract 2: a reader of contract 1 knows only the
    /// first, which is in the other members, and reports that it does not know the rest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<DegradationStage>,
}

/// One stage of degraded mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DegradationStage {
    /// Its name, for people.
    pub name: String,
    /// Load from which it is entered, in percent, out of the stage before it.
    pub load_percent: u32,
    /// Load below which it is left again, in percent, for the stage before it.
    pub exit_load_percent: u32,
    /// Flags that take another variant in it, over what the stages before it say.
    pub flag_overrides: BTreeMap<String, String>,
}

/// Name of the only stage where nobody gave it one.
pub const ONLY_STAGE: &str = "degraded";

/// A load that no pod ever has, in percent: a pod whose degraded mode begins there is never degraded, whatever its version is.
pub const NEVER: u32 = u32::MAX;

impl DegradationSettings {
    /// Settings by which no pod is ever degraded, of whatever version it is and whatever it has built in.
    pub const fn never() -> Self {
        Self {
            enter_load_percent: NEVER,
            enter_for_ms: 0,
            exit_load_percent: 0,
            exit_for_ms: 0,
            flag_overrides: BTreeMap::new(),
            stages: Vec::new(),
        }
    }

    /// The stages, in the order in which they are entered; at least one, and none that can never be reached.
    pub fn all_stages(&self) -> Vec<DegradationStage> {
        let only = || DegradationStage {
            name: ONLY_STAGE.to_owned(),
            load_percent: self.enter_load_percent,
            exit_load_percent: self.exit_load_percent,
            flag_overrides: self.flag_overrides.clone(),
        };
        let mut stages = if self.stages.is_empty() { vec![only()] } else { self.stages.clone() };
        stages.retain(|stage| stage.load_percent != NEVER);
        stages
    }

    /// What flags take while the first `level` stages are in force: what a later one says stands above what those before it say.
    pub fn overrides(stages: &[DegradationStage], level: usize) -> BTreeMap<String, String> {
        stages.iter().take(level).flat_map(|stage| stage.flag_overrides.clone()).collect()
    }
}

/// When buyers wait, and how many are let in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WaitingRoomSettings {
    /// Load from which everybody new gets a place, in percent.
    pub enter_load_percent: u32,
    /// Load down to which the room may close once nobody waits, in percent.
    pub exit_load_percent: u32,
    /// The load must stay there this long, in milliseconds, with nobody waiting.
    pub exit_for_ms: u64,
    /// Buyers that are let in each second at least.
    pub min_admit_per_second: u32,
    /// Buyers that are let in each second at most.
    pub max_admit_per_second: u32,
    /// How long somebody who was let in may begin orders at least, in milliseconds.
    pub admission_ttl_ms: u64,
}

impl Default for WaitingRoomSettings {
    fn default() -> Self {
        Self {
            enter_load_percent: 80,
            exit_load_percent: 50,
            exit_for_ms: 30_000,
            min_admit_per_second: 5,
            max_admit_per_second: 500,
            admission_ttl_ms: 600_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_waits_are_the_adrs() {
        let retry = RetrySettings::default();
        assert_eq!([1, 2, 3].map(|n| retry.wait_ms(n)), [2_000, 4_000, 8_000]);
        assert_eq!(retry.total_wait_ms(), 14_000);
        assert!(retry.total_wait_ms() < TimeoutSettings::default().request_ms);
    }

    fn stage(name: &str, load_percent: u32, overrides: &[(&str, &str)]) -> DegradationStage {
        let flag_overrides =
            overrides.iter().map(|(key, variant)| ((*key).to_owned(), (*variant).to_owned())).collect();
        DegradationStage { name: name.into(), load_percent, exit_load_percent: load_percent - 20, flag_overrides }
    }

    #[test]
    fn a_later_stage_stands_above_those_before_it() {
        let stages = [stage("mail", 80, &[("Mail", "off"), ("Pdf", "later")]), stage("pdf", 90, &[("Pdf", "off")])];
        let at = |level| DegradationSettings::overrides(&stages, level).into_values().collect::<Vec<_>>();
        assert_eq!(
            [at(0), at(1), at(2), at(9)],
            [vec![], vec!["off", "later"], vec!["off", "off"], vec!["off", "off"]]
        );
    }

    #[test]
    fn what_a_policy_without_stages_says_is_one_stage_and_never_is_none() {
        let one = DegradationSettings { enter_load_percent: 80, exit_load_percent: 60, ..DegradationSettings::never() };
        let stages = one.all_stages();
        assert_eq!((stages.len(), stages[0].load_percent, stages[0].exit_load_percent), (1, 80, 60));
        assert_eq!(DegradationSettings::never().all_stages(), []);
        let text = serde_json::to_string(&one).unwrap();
        assert!(!text.contains("stages"), "as version 0.1 wrote it: {text}");
    }

    #[test]
    fn waits_never_overflow() {
        let retry = RetrySettings { num_retries: 64, factor: f64::MAX, ..Default::default() };
        assert_eq!(retry.wait_ms(u32::MAX), retry.max_interval_ms);
        assert_eq!(retry.total_wait_ms(), 2_000 + 63 * retry.max_interval_ms);
    }
}
