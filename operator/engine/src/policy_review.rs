//! What the author of a valid policy should know of it, and what is wrong in a policy by itself.
//!
//! Whether a policy makes sense depends on what it is laid over, so most of it is judged on the effective values: what
//! the policy says, resolved over what the pods of the workload report as built in.

use contract::{
    BuiltIns, DependencyPolicy, DependencySettings, FallbackPolicy, FallbackSettings, ManualState, PolicySettings,
    RetrySettings, TripRule, duration::spell, resolution::resolve,
};
use std::collections::BTreeMap;

/// Two values of one dependency that exclude each other, whatever the workload has built in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// The field to change, by its path inside the dependency.
    pub field: &'static str,
    /// What is wrong, with both values and with values that work.
    pub message: String,
}

/// The first two values of a dependency's policy that exclude each other, if any do.
pub fn conflict(said: &DependencyPolicy) -> Option<Conflict> {
    let (timeout, retry, breaker) = (&said.timeout, &said.retry, &said.circuit_breaker);
    let longer = |field, this: Option<u64>, than: &str, limit: Option<u64>| {
        let (this, limit) = (this?, limit?);
        let name = field_name(field);
        (this > limit).then(|| Conflict {
            field,
            message: format!("must not be longer than {than} ({}): {name} is {}", spell(limit), spell(this)),
        })
    };
    longer("timeout.perTry", timeout.per_try_ms, "request", timeout.request_ms)
        .or_else(|| longer("timeout.connect", timeout.connect_ms, "perTry", timeout.per_try_ms))
        .or_else(|| longer("timeout.connect", timeout.connect_ms, "request", timeout.request_ms))
        .or_else(|| longer("retry.backOff.baseInterval", retry.base_interval_ms, "maxInterval", retry.max_interval_ms))
        .or_else(|| waits_conflict(said))
        .or_else(|| {
            let both = breaker.consecutive_failures.is_some() && breaker.failure_ratio_percent.is_some();
            both.then(|| Conflict {
                field: "circuitBreaker.consecutiveFailures",
                message: "excludes failureRatioPercent: keep one of them".to_owned(),
            })
        })
        .or_else(|| longer("circuitBreaker.breakDuration", breaker.break_ms, "maxBreakDuration", breaker.max_break_ms))
}

fn field_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// The waits that the policy itself asks for leave no time for the last retry.
fn waits_conflict(said: &DependencyPolicy) -> Option<Conflict> {
    let retry = &said.retry;
    let (request_ms, num_retries) = (said.timeout.request_ms?, retry.num_retries?);
    let base_interval_ms = retry.base_interval_ms?;
    // Waits never shrink from one to the next, so what is not said can only make them longer.
    let (factor, max_interval_ms) = retry.factor.zip(retry.max_interval_ms).unwrap_or((1.0, base_interval_ms));
    let least = RetrySettings { num_retries, base_interval_ms, factor, max_interval_ms, ..RetrySettings::default() };
    let waits = least.total_wait_ms();
    (num_retries > 0 && waits >= request_ms).then(|| Conflict {
        field: "retry",
        message: format!(
            "the waits between {num_retries} retries are {} together, and timeout.request is {}, so the last retry could never start; what works: {} retries, or a request longer than {}",
            spell(waits),
            spell(request_ms),
            retries_that_start(&least, request_ms),
            spell(waits)
        ),
    })
}

/// The largest number of retries that all start within `request_ms`.
fn retries_that_start(retry: &RetrySettings, request_ms: u64) -> u32 {
    let starts =
        |num_retries: &u32| RetrySettings { num_retries: *num_retries, ..retry.clone() }.total_wait_ms() < request_ms;
    (0..retry.num_retries.min(100)).rev().find(starts).unwrap_or(0)
}

/// Sentences about a valid policy that its author should know. `built_ins` is what the workload reports; absent: no pod
/// has told yet, and only what the policy says by itself is judged.
pub fn warnings(policy: &PolicySettings, built_ins: Option<&BuiltIns>) -> Vec<String> {
    let mut warnings = Vec::new();
    for (name, said) in &policy.dependency_policies {
        let own = match built_ins.map(|all| (all, all.dependencies.get(name))) {
            None => None,
            Some((_, Some(own))) => own.as_ref(),
            Some((all, None)) => {
                let hint = nearest(name, all.dependencies.keys());
                warnings.push(format!("{name}: the workload has no dependency of that name{hint}"));
                continue;
            }
        };
        let effective = resolve(said, own).settings;
        let mut about = Vec::new();
        let by_itself = is_full(said) && said.retry.base_interval_ms.is_some();
        if built_ins.is_some() || by_itself {
            about.extend(arithmetic(said, own, &effective));
        }
        if built_ins.is_some() {
            about.extend(without_effect(said, &effective));
        }
        about.extend(switched_off(said, own));
        about.extend(unknown_names(name, said, policy, built_ins));
        warnings.extend(about.into_iter().map(|sentence| format!("{name}: {sentence}")));
    }
    if let Some(built_ins) = built_ins {
        let resolved = built_ins.resolve(policy);
        let used = |bulkhead: &String| resolved.values().any(|one| one.settings.bulkhead.as_ref() == Some(bulkhead));
        let unused = policy.bulkheads.keys().filter(|name| !used(name));
        warnings.extend(unused.map(|name| format!("bulkhead {name}: no dependency passes through it")));
        if policy.waiting_room.is_some() && !built_ins.waiting_room {
            let message = "waitingRoom: the workload has none, so nobody waits; the gateway has one where it has a key \
                           (WAITING_ROOM_KEY_FILE)";
            warnings.push(message.to_owned());
        }
    }
    warnings
}

/// Most sentences about flags that degradation sets.
const MOST_OVERRIDES: usize = 20;
/// Most names that a sentence lists.
const MOST_NAMES: usize = 10;
/// Longest name in a sentence, in characters; longer ones are cut, and not compared with others.
const LONGEST_NAME: usize = 64;

/// Sentences about flags, each with a variant, that degradation sets and that come to nothing, at most 20 and one that counts the others. `defined`
/// are the flags of the namespace, each with its variants. Keys of flags and names of variants may be any text.
pub fn override_warnings(overrides: &[(String, String)], defined: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let is_in_vain =
        |(flag, variant): &&(String, String)| defined.get(flag).is_none_or(|variants| !variants.contains(variant));
    let about = |(flag, variant): &(String, String)| match defined.get(flag) {
        None => {
            let (flag, hint) = (shown(flag), nearest(flag, defined.keys()));
            format!("degradation.flagOverrides: no flag set of the namespace defines {flag}{hint}")
        }
        Some(variants) => {
            let names = variants.iter().take(MOST_NAMES).map(|name| shown(name)).collect::<Vec<_>>().join(", ");
            let more = if variants.len() > MOST_NAMES { ", …" } else { "" };
            format!(
                "degradation.flagOverrides: the flag {} has no variant {}; it has {names}{more}",
                shown(flag),
                shown(variant),
            )
        }
    };
    let mut in_vain = overrides.iter().filter(is_in_vain);
    let mut sentences: Vec<_> = in_vain.by_ref().take(MOST_OVERRIDES).map(about).collect();
    let more = in_vain.count();
    sentences.extend((more > 0).then(|| format!("degradation.flagOverrides: {more} more come to nothing")));
    sentences
}

/// A name of any length and of any characters, on one line.
fn shown(name: &str) -> String {
    let cut = name.chars().nth(LONGEST_NAME).is_some();
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    name.chars().take(LONGEST_NAME).map(plain).chain(cut.then_some('…')).collect()
}

/// Whether the policy itself says how long all tries of a call may take.
fn is_full(said: &DependencyPolicy) -> bool {
    said.timeout.request_ms.is_some() && said.timeout.per_try_ms.is_some() && said.retry.num_retries.is_some()
}

/// From how many percent of the call on tries and waits are far longer than it.
const FAR_LONGER: u64 = 150;

/// Tries and waits that together are longer than the call.
///
/// Where the policy itself says how long they are, it is told whenever they do not fit. Where part of it is built in, only of
/// what it makes worse, and by far: a workload whose own numbers do not fit (those of ADR-007 do not) has its reasons, its
/// retries are for failures that come fast.
fn arithmetic(
    said: &DependencyPolicy,
    own: Option<&DependencySettings>,
    effective: &DependencySettings,
) -> Option<String> {
    let (timeout, retry) = (&said.timeout, &said.retry);
    let in_part = [timeout.request_ms, timeout.per_try_ms, retry.base_interval_ms, retry.max_interval_ms]
        .iter()
        .any(Option::is_some)
        || retry.num_retries.is_some()
        || retry.factor.is_some();
    let default = DependencySettings::default();
    let own = own.unwrap_or(&default);
    let percent = |of: &DependencySettings| of.longest_ms().saturating_mul(100) / of.timeout.request_ms.max(1);
    let now = percent(effective);
    // Fitted values are rounded down to whole milliseconds, which can move the proportion by a percent.
    let made_worse = in_part && now > FAR_LONGER && now > percent(own).saturating_add(1);
    let in_full = is_full(said) && effective.longest_ms() > effective.timeout.request_ms;
    if !(made_worse || in_full) {
        return None;
    }
    let far = if now > FAR_LONGER { "far " } else { "" };
    let request_ms = effective.timeout.request_ms;
    let tries = u64::from(effective.retry.num_retries).saturating_add(1);
    let waits = effective.retry.total_wait_ms();
    let longest = effective.longest_ms();
    let mut works = Vec::new();
    let per_try = request_ms.saturating_sub(waits) / tries;
    if per_try >= 10 {
        works.push(format!("perTry {}", spell(per_try)));
    }
    let fits = |num_retries: &u32| {
        let retry = RetrySettings { num_retries: *num_retries, ..effective.retry.clone() };
        DependencySettings { retry, ..effective.clone() }.longest_ms() <= request_ms
    };
    works.extend(
        (0..effective.retry.num_retries.min(100)).rev().find(fits).map(|retries| format!("numRetries {retries}")),
    );
    works.push(format!("request {}", spell(longest)));
    Some(format!(
        "{tries} tries of {} and waits of {} are {} together, {far}longer than request ({}), so the last tries are cut short or never start; what fits: {}",
        spell(effective.timeout.per_try_ms),
        spell(waits),
        spell(longest),
        spell(request_ms),
        works.join(", or ")
    ))
}

/// Protections that the workload has built in and the policy takes away.
fn switched_off(said: &DependencyPolicy, own: Option<&DependencySettings>) -> Vec<String> {
    let mut off = Vec::new();
    if let Some((list, own)) = said.fallback.as_ref().zip(own) {
        let kinds: Vec<_> = list.iter().map(said_kind).collect();
        let lost = own.fallback.iter().map(kind).filter(|kind| !kinds.contains(kind));
        let lost: Vec<_> = lost.collect();
        if !lost.is_empty() {
            let by =
                if kinds.is_empty() { "fallback: []".to_owned() } else { format!("fallback ({})", kinds.join(", ")) };
            off.push(format!("{by} switches off the built-in fallback {}", lost.join(", ")));
        }
    }
    let retries = own.map_or(0, |own| own.retry.num_retries);
    if said.retry.num_retries == Some(0) && retries > 0 {
        off.push(format!("numRetries: 0 switches off the {retries} built-in retries"));
    }
    match said.circuit_breaker.manual_state {
        Some(ManualState::Closed) => off.push("manualState: Closed switches off the circuit breaker".to_owned()),
        Some(ManualState::Open) => {
            off.push("manualState: Open lets no call through until it is set back to Auto".to_owned());
        }
        _ => {}
    }
    off
}

const fn kind(fallback: &FallbackSettings) -> &'static str {
    match fallback {
        FallbackSettings::Cache { .. } => "Cache",
        FallbackSettings::Provider { .. } => "Provider",
        FallbackSettings::Queue => "Queue",
        FallbackSettings::Static { .. } => "Static",
        FallbackSettings::Unknown => "of an unknown type",
    }
}

const fn said_kind(fallback: &FallbackPolicy) -> &'static str {
    match fallback {
        FallbackPolicy::Cache { .. } => "Cache",
        FallbackPolicy::Provider { .. } => "Provider",
        FallbackPolicy::Queue => "Queue",
        FallbackPolicy::Static { .. } => "Static",
        FallbackPolicy::Unknown => "of an unknown type",
    }
}

/// What the policy says and nothing comes of.
fn without_effect(said: &DependencyPolicy, effective: &DependencySettings) -> Option<String> {
    let breaker = &said.circuit_breaker;
    let of_ratio = breaker.minimum_throughput.is_some() || breaker.sampling_ms.is_some();
    match effective.circuit_breaker.trip {
        TripRule::ConsecutiveFailures { failures } if of_ratio => Some(format!(
            "minimumThroughput and samplingDuration have no effect: the circuit opens after {failures} failures in a row; set failureRatioPercent"
        )),
        _ => None,
    }
}

/// Bulkheads and providers that nobody knows.
fn unknown_names(
    dependency: &str,
    said: &DependencyPolicy,
    policy: &PolicySettings,
    built_ins: Option<&BuiltIns>,
) -> Vec<String> {
    let mut sentences = Vec::new();
    let bulkheads: Vec<_> =
        policy.bulkheads.keys().chain(built_ins.into_iter().flat_map(|all| all.bulkheads.keys())).collect();
    if let Some(name) = said.bulkhead.as_ref().filter(|name| !bulkheads.contains(name)) {
        let hint = nearest(name, bulkheads.iter().copied());
        sentences.push(if built_ins.is_some() {
            format!("neither the policy nor the workload has a bulkhead {name}{hint}; calls pass as if no bulkheadRef were there")
        } else {
            format!("{name} is not among spec.bulkheads{hint}; no pod has told yet whether the workload has it built in")
        });
    }
    let dependencies: Vec<_> = policy
        .dependency_policies
        .keys()
        .chain(built_ins.into_iter().flat_map(|all| all.dependencies.keys()))
        .filter(|name| *name != dependency)
        .collect();
    for fallback in said.fallback.iter().flatten() {
        let FallbackPolicy::Provider { provider } = fallback else { continue };
        if !dependencies.contains(&provider) {
            let hint = nearest(provider, dependencies.iter().copied());
            sentences.push(if built_ins.is_some() {
                format!("its fallback names {provider}, and there is no dependency of that name{hint}; it is passed over")
            } else {
                format!("its fallback names {provider}, which is not among spec.dependencies{hint}; no pod has told yet whether the workload has it")
            });
        }
    }
    sentences
}

/// "; did you mean …?" if one of `known` differs from `name` by at most a third of its letters.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> String {
    if name.len() > LONGEST_NAME {
        return String::new();
    }
    let most = (name.len() / 3).max(1);
    // What is so much longer or shorter differs by more.
    let near = known.filter(|other| other.len().abs_diff(name.len()) <= most);
    match near.map(|other| (distance(name, other), other)).min() {
        Some((distance, other)) if distance > 0 && distance <= most => format!("; did you mean {}?", shown(other)),
        _ => String::new(),
    }
}

/// How many letters have to be added, removed, replaced, or swapped with their neighbour, to make one from the other.
fn distance(one: &str, other: &str) -> usize {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (row, letter) in one.iter().enumerate() {
        let mut now = vec![row + 1];
        for (column, counterpart) in other.iter().enumerate() {
            let replaced = last[column] + usize::from(letter != counterpart);
            let mut least = replaced.min(last[column + 1] + 1).min(now[column] + 1);
            if row > 0 && column > 0 && *letter == other[column - 1] && one[row - 1] == *counterpart {
                least = least.min(before[column - 1] + 1);
            }
            now.push(least);
        }
        before = std::mem::replace(&mut last, now);
    }
    last.last().copied().unwrap_or_default()
}

#[cfg(test)]
#[path = "policy_review_tests.rs"]
mod tests;
