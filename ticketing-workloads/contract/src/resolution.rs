//! From what a policy says to what a workload runs by, field by field.
//!
//! A value comes from the policy, else from what the workload has built in, else from ADR-007. Values that the policy
//! does not say are changed where they would contradict what it does say ([`Origin::Fitted`]): a policy that says
//! `timeout: {request: 5s}` and nothing else gets a time per try and waits that fit into five seconds. What the policy
//! says is never changed.
//!
//! Pure: the workload runs by it, and the operator foretells with it what a workload will run by.

use crate::{
    BulkheadSettings, CircuitBreakerPolicy, CircuitBreakerSettings, DependencyPolicy, DependencySettings,
    PolicySettings, RetryBudgetSettings, RetrySettings, SlowCallSettings, TimeoutSettings, TripRule, defaults,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where the value of a field comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Origin {
    /// The policy says it.
    Policy,
    /// The policy says nothing of it, and the workload has it built in.
    BuiltIn,
    /// Neither says anything of it: a number of ADR-007.
    Default,
    /// The built-in value or the ADR's number would contradict what the policy says, and was changed until it fits.
    Fitted,
    /// An origin that this reader does not know.
    #[serde(other)]
    Unknown,
}

/// Settings of one dependency, and where each value comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The settings.
    pub settings: DependencySettings,
    /// Origin of each field, by the path that it has in a policy's manifest, such as `timeout.perTry`.
    pub origins: BTreeMap<String, Origin>,
}

/// What a workload has built in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BuiltIns {
    /// The dependencies that it has. `None`: it has the dependency, and runs it on the ADR's numbers.
    pub dependencies: BTreeMap<String, Option<DependencySettings>>,
    /// Its bulkheads.
    pub bulkheads: BTreeMap<String, BulkheadSettings>,
    /// Whether it has a waiting room that a policy can open.
    pub waiting_room: bool,
}

impl BuiltIns {
    /// Every dependency of the workload under `policy`, by name.
    pub fn resolve(&self, policy: &PolicySettings) -> BTreeMap<String, Resolved> {
        self.dependencies.keys().map(|name| (name.clone(), self.resolve_one(policy, name))).collect()
    }

    fn resolve_one(&self, policy: &PolicySettings, name: &str) -> Resolved {
        let built_in = self.dependencies.get(name).and_then(Option::as_ref);
        let mut resolved = match (policy.dependency_policies.get(name), policy.dependencies.get(name)) {
            (Some(said), _) => resolve(said, built_in),
            (None, Some(whole)) => whole_entry(whole, built_in),
            (None, None) => resolve(&DependencyPolicy::default(), built_in),
        };
        let known =
            |bulkhead: &String| self.bulkheads.contains_key(bulkhead) || policy.bulkheads.contains_key(bulkhead);
        if resolved.settings.bulkhead.as_ref().is_some_and(|bulkhead| !known(bulkhead)) {
            // A misspelt name must not take a protection away that the workload has.
            let own = built_in.and_then(|own| own.bulkhead.clone()).filter(known);
            let origin = if own.is_some() { Origin::BuiltIn } else { Origin::Default };
            resolved.origins.insert(BULKHEAD.to_owned(), origin);
            resolved.settings.bulkhead = own;
        }
        resolved
    }
}

const BULKHEAD: &str = "bulkheadRef";

/// An entry of a document of contract 1, which replaces what is built in as a whole, but for the bulkhead.
fn whole_entry(whole: &DependencySettings, built_in: Option<&DependencySettings>) -> Resolved {
    let mut settings = whole.clone();
    let mut origins = resolve(&DependencyPolicy::default(), None).origins;
    for origin in origins.values_mut() {
        *origin = Origin::Policy;
    }
    if settings.bulkhead.is_none() {
        settings.bulkhead = built_in.and_then(|own| own.bulkhead.clone());
        let origin = if settings.bulkhead.is_some() { Origin::BuiltIn } else { Origin::Default };
        origins.insert(BULKHEAD.to_owned(), origin);
    }
    Resolved { settings, origins }
}

/// What a dependency runs by: what the policy says, over what the workload has built in, over ADR-007.
pub fn resolve(said: &DependencyPolicy, built_in: Option<&DependencySettings>) -> Resolved {
    let mut fields = Fields { built_in, default: DependencySettings::default(), origins: BTreeMap::new() };
    let settings = DependencySettings {
        timeout: fields.timeout(said),
        retry: fields.retry(said),
        circuit_breaker: fields.circuit_breaker(&said.circuit_breaker),
        bulkhead: fields.pick_optional(BULKHEAD, said.bulkhead.clone(), |of| of.bulkhead.clone()),
        fallback: fields.pick(
            "fallback",
            said.fallback.as_ref().map(|list| {
                let own = built_in.map(|own| own.fallback.as_slice()).unwrap_or_default();
                list.iter().map(|entry| entry.fill(own)).collect()
            }),
            |of| of.fallback.clone(),
        ),
    };
    let mut resolved = Resolved { settings, origins: fields.origins };
    fit_timeouts(said, built_in, &mut resolved);
    fit_waits(said, built_in, &mut resolved);
    fit_breaks(&said.circuit_breaker, &mut resolved);
    resolved
}

/// Collects values, and notes where each comes from.
struct Fields<'a> {
    built_in: Option<&'a DependencySettings>,
    default: DependencySettings,
    origins: BTreeMap<String, Origin>,
}

impl Fields<'_> {
    fn pick<T>(&mut self, path: &str, said: Option<T>, of: impl Fn(&DependencySettings) -> T) -> T {
        let (value, origin) = match (said, self.built_in) {
            (Some(value), _) => (value, Origin::Policy),
            (None, Some(own)) => (of(own), Origin::BuiltIn),
            (None, None) => (of(&self.default), Origin::Default),
        };
        self.origins.insert(path.to_owned(), origin);
        value
    }

    fn pick_optional<T>(
        &mut self,
        path: &str,
        said: Option<T>,
        of: impl Fn(&DependencySettings) -> Option<T>,
    ) -> Option<T> {
        self.pick(path, said.map(Some), of)
    }

    fn timeout(&mut self, said: &DependencyPolicy) -> TimeoutSettings {
        let said = &said.timeout;
        TimeoutSettings {
            request_ms: self.pick("timeout.request", said.request_ms, |of| of.timeout.request_ms),
            per_try_ms: self.pick("timeout.perTry", said.per_try_ms, |of| of.timeout.per_try_ms),
            connect_ms: self.pick_optional("timeout.connect", said.connect_ms, |of| of.timeout.connect_ms),
        }
    }

    fn retry(&mut self, said: &DependencyPolicy) -> RetrySettings {
        let said = &said.retry;
        RetrySettings {
            num_retries: self.pick("retry.numRetries", said.num_retries, |of| of.retry.num_retries),
            base_interval_ms: self.pick(BASE_INTERVAL, said.base_interval_ms, |of| of.retry.base_interval_ms),
            factor: self.pick("retry.backOff.factor", said.factor, |of| of.retry.factor),
            max_interval_ms: self.pick(MAX_INTERVAL, said.max_interval_ms, |of| of.retry.max_interval_ms),
            jitter_percent: self.pick("retry.backOff.jitterPercent", said.jitter_percent, |of| of.retry.jitter_percent),
            retry_on: self.pick("retry.retryOn", said.retry_on.clone(), |of| of.retry.retry_on.clone()),
            http_status_codes: self
                .pick("retry.httpStatusCodes", said.http_status_codes.clone(), |of| of.retry.http_status_codes.clone()),
            methods: self.pick("retry.methods", said.methods.clone(), |of| of.retry.methods.clone()),
            budget: {
                let own = self.built_in.and_then(|own| own.retry.budget.clone()).unwrap_or(defaults::RETRY_BUDGET);
                let said = said.budget.as_ref().map(|said| RetryBudgetSettings {
                    percent: said.percent.unwrap_or(own.percent),
                    interval_ms: said.interval_ms.unwrap_or(own.interval_ms),
                    min_retries: said.min_retries.unwrap_or(own.min_retries),
                });
                self.pick_optional("retry.budget", said, |of| of.retry.budget.clone())
            },
        }
    }

    fn circuit_breaker(&mut self, said: &CircuitBreakerPolicy) -> CircuitBreakerSettings {
        let trip = self.trip(said);
        let own_percent = self.built_in.and_then(|own| Some(own.circuit_breaker.slow_call.as_ref()?.percent));
        let slow_call = said.slow_call.as_ref().map(|said| SlowCallSettings {
            duration_ms: said.duration_ms,
            percent: said.percent.or(own_percent).unwrap_or(defaults::SLOW_CALL_PERCENT),
        });
        CircuitBreakerSettings {
            trip,
            break_ms: self.pick(BREAK, said.break_ms, |of| of.circuit_breaker.break_ms),
            max_break_ms: self.pick_optional(MAX_BREAK, said.max_break_ms, |of| of.circuit_breaker.max_break_ms),
            half_open_max_requests: self.pick(
                "circuitBreaker.halfOpenMaxRequests",
                said.half_open_max_requests,
                |of| of.circuit_breaker.half_open_max_requests,
            ),
            slow_call: self
                .pick_optional("circuitBreaker.slowCall", slow_call, |of| of.circuit_breaker.slow_call.clone()),
            manual_state: self
                .pick("circuitBreaker.manualState", said.manual_state, |of| of.circuit_breaker.manual_state),
        }
    }

    fn trip(&mut self, said: &CircuitBreakerPolicy) -> TripRule {
        let own = self.built_in.map(|own| own.circuit_breaker.trip.clone());
        let own_ratio = match &own {
            Some(TripRule::FailureRatio { percent, minimum_throughput, sampling_ms }) => {
                Some((*percent, *minimum_throughput, *sampling_ms))
            }
            _ => None,
        };
        let ratio = match (said.failure_ratio_percent, said.consecutive_failures) {
            (Some(percent), _) => Some((percent, Origin::Policy)),
            (None, None) => own_ratio.map(|(percent, ..)| (percent, Origin::BuiltIn)),
            (None, Some(_)) => None,
        };
        let Some((percent, origin)) = ratio else {
            let failures = self.pick("circuitBreaker.consecutiveFailures", said.consecutive_failures, |of| {
                match of.circuit_breaker.trip {
                    TripRule::ConsecutiveFailures { failures } => failures,
                    TripRule::FailureRatio { .. } | TripRule::Unknown => DEFAULT_FAILURES,
                }
            });
            return TripRule::ConsecutiveFailures { failures };
        };
        self.origins.insert("circuitBreaker.failureRatioPercent".to_owned(), origin);
        let mut of_ratio = |path: &str, said: Option<u64>, own: Option<u64>, default: u64| {
            let (value, origin) = match (said, own) {
                (Some(value), _) => (value, Origin::Policy),
                (None, Some(value)) => (value, Origin::BuiltIn),
                (None, None) => (default, Origin::Default),
            };
            self.origins.insert(path.to_owned(), origin);
            value
        };
        let throughput = of_ratio(
            "circuitBreaker.minimumThroughput",
            said.minimum_throughput.map(u64::from),
            own_ratio.map(|(_, throughput, _)| throughput.into()),
            defaults::MINIMUM_THROUGHPUT.into(),
        );
        let sampling_ms = of_ratio(
            "circuitBreaker.samplingDuration",
            said.sampling_ms,
            own_ratio.map(|(_, _, sampling)| sampling),
            defaults::SAMPLING_MS,
        );
        TripRule::FailureRatio {
            percent,
            minimum_throughput: u32::try_from(throughput).unwrap_or(u32::MAX),
            sampling_ms,
        }
    }
}

const BASE_INTERVAL: &str = "retry.backOff.baseInterval";
const MAX_INTERVAL: &str = "retry.backOff.maxInterval";
const BREAK: &str = "circuitBreaker.breakDuration";
const MAX_BREAK: &str = "circuitBreaker.maxBreakDuration";
/// The ADR's failures in a row, for a built-in rule that is not about failures in a row.
const DEFAULT_FAILURES: u32 = 5;

/// `value * part / whole`, rounded down; `whole` 0 leaves `value` as it is.
fn share(value: u64, part: u64, whole: u64) -> u64 {
    let product = u128::from(value) * u128::from(part);
    product.checked_div(u128::from(whole)).map_or(value, |share| u64::try_from(share).unwrap_or(u64::MAX))
}

impl Resolved {
    fn fit(&mut self, path: &str, value: fn(&mut DependencySettings) -> &mut u64, fitted: u64) {
        let value = value(&mut self.settings);
        if *value != fitted {
            *value = fitted;
            self.origins.insert(path.to_owned(), Origin::Fitted);
        }
    }
}

/// By which share the policy shortens the whole call: `(said, built in)`.
fn shortened(said: &DependencyPolicy, built_in: Option<&DependencySettings>) -> Option<(u64, u64)> {
    let base = built_in.map_or_else(|| TimeoutSettings::default().request_ms, |own| own.timeout.request_ms);
    said.timeout.request_ms.filter(|request| *request < base).map(|request| (request, base))
}

/// A time per try that is not said keeps its proportion to a shorter call; a call of which no time is said is at least
/// as long as one try.
fn fit_timeouts(said: &DependencyPolicy, built_in: Option<&DependencySettings>, resolved: &mut Resolved) {
    let said_timeout = &said.timeout;
    let longest_said = said_timeout.per_try_ms.max(said_timeout.connect_ms).unwrap_or(0);
    let TimeoutSettings { request_ms, per_try_ms, .. } = resolved.settings.timeout;
    let request_ms = if said_timeout.request_ms.is_none() { request_ms.max(longest_said) } else { request_ms };
    resolved.fit("timeout.request", |settings| &mut settings.timeout.request_ms, request_ms);
    if said_timeout.per_try_ms.is_none() {
        let in_proportion =
            shortened(said, built_in).map_or(per_try_ms, |(request, base)| share(per_try_ms, request, base).max(1));
        let fitted = in_proportion.max(said_timeout.connect_ms.unwrap_or(0)).min(request_ms);
        resolved.fit("timeout.perTry", |settings| &mut settings.timeout.per_try_ms, fitted);
    }
    let per_try_ms = resolved.settings.timeout.per_try_ms;
    if said_timeout.connect_ms.is_none() && resolved.settings.timeout.connect_ms.is_some_and(|ms| ms > per_try_ms) {
        resolved.settings.timeout.connect_ms = Some(per_try_ms);
        resolved.origins.insert("timeout.connect".to_owned(), Origin::Fitted);
    }
}

/// Waits that are not said keep their proportion to a shorter call, and leave half of the call to the tries where they
/// would not fit into it. A number of retries that is not said is no larger than what can start.
fn fit_waits(said: &DependencyPolicy, built_in: Option<&DependencySettings>, resolved: &mut Resolved) {
    let said_retry = &said.retry;
    let (base_is_free, max_is_free) = (said_retry.base_interval_ms.is_none(), said_retry.max_interval_ms.is_none());
    let mut retry = resolved.settings.retry.clone();
    if let Some((request, whole)) = shortened(said, built_in).filter(|_| base_is_free) {
        retry.base_interval_ms = share(retry.base_interval_ms, request, whole);
        if max_is_free {
            retry.max_interval_ms = share(retry.max_interval_ms, request, whole);
        }
    }
    if max_is_free {
        retry.max_interval_ms = retry.max_interval_ms.max(retry.base_interval_ms);
    } else if base_is_free {
        retry.base_interval_ms = retry.base_interval_ms.min(retry.max_interval_ms);
    }
    let request_ms = resolved.settings.timeout.request_ms;
    if retry.num_retries > 0 && retry.total_wait_ms() >= request_ms {
        if base_is_free {
            let whole = retry.clone();
            let with_base = |base: u64| {
                let max = if max_is_free {
                    share(whole.max_interval_ms, base, whole.base_interval_ms).max(base)
                } else {
                    whole.max_interval_ms
                };
                RetrySettings { base_interval_ms: base, max_interval_ms: max, ..whole.clone() }
            };
            retry =
                with_base(largest(whole.base_interval_ms, |base| with_base(base).total_wait_ms() <= request_ms / 2));
        } else if max_is_free {
            let whole = retry.clone();
            let with_max = |more: u64| {
                let max_interval_ms = whole.base_interval_ms.saturating_add(more);
                RetrySettings { max_interval_ms, ..whole.clone() }
            };
            let room = whole.max_interval_ms.saturating_sub(whole.base_interval_ms);
            retry = with_max(largest(room, |more| with_max(more).total_wait_ms() <= request_ms / 2));
        }
    }
    if said_retry.num_retries.is_none() && retry.num_retries > 0 && retry.total_wait_ms() >= request_ms {
        let with = |num_retries: u64| {
            let num_retries = u32::try_from(num_retries).unwrap_or(u32::MAX);
            RetrySettings { num_retries, ..retry.clone() }
        };
        retry = with(largest(retry.num_retries.into(), |retries| with(retries).total_wait_ms() < request_ms));
        resolved.settings.retry.num_retries = retry.num_retries;
        resolved.origins.insert("retry.numRetries".to_owned(), Origin::Fitted);
    }
    resolved.fit(BASE_INTERVAL, |settings| &mut settings.retry.base_interval_ms, retry.base_interval_ms);
    resolved.fit(MAX_INTERVAL, |settings| &mut settings.retry.max_interval_ms, retry.max_interval_ms);
}

/// The largest number up to `most` that `fits`; 0 if none does. What fits, fits for every smaller number, too.
fn largest(most: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// A break that is not said is no longer than the longest one that is, and the other way round.
fn fit_breaks(said: &CircuitBreakerPolicy, resolved: &mut Resolved) {
    let CircuitBreakerSettings { break_ms, max_break_ms: Some(max_break_ms), .. } = resolved.settings.circuit_breaker
    else {
        return;
    };
    if max_break_ms >= break_ms {
        return;
    }
    if said.max_break_ms.is_none() {
        resolved.settings.circuit_breaker.max_break_ms = Some(break_ms);
        resolved.origins.insert(MAX_BREAK.to_owned(), Origin::Fitted);
    } else if said.break_ms.is_none() {
        resolved.fit(BREAK, |settings| &mut settings.circuit_breaker.break_ms, max_break_ms);
    }
}

#[cfg(test)]
#[path = "resolution_tests.rs"]
mod tests;
