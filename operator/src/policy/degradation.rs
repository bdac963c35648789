//! The degraded mode of a policy's fleet: from what its pods report and what its status says to what its status says next.
//!
//! The decision is in [`engine::degradation`]. Here it is put into the status, with an end that is put off while the operator runs:
//! one that is dead leaves the last state for that long, and then each pod decides alone again.

use crate::{
    context::Context,
    fleet::{degradations::Degradations, facts::PodFacts, index::ObjectKey},
    kubernetes::{events::Event, meta::cut},
    spec,
    status::target::{Target, workload_of},
};
use contract::{CircuitState, DegradationSettings, DegradationStage};
use crds::{
    EventReason, ResiliencePolicy,
    resilience_policy::{FlagVariant, Mode},
    status::DegradationStatus,
};
use engine::degradation::{self, Beyond, Decision, Reading, Settings, State, Workload};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::ResourceExt;
use std::{collections::BTreeMap, sync::Arc};

/// For how long the state of a fleet holds if the operator does not put its end off.
pub const LASTS: SignedDuration = SignedDuration::from_mins(10);
/// How much of that is left when it is put off.
const RENEW_AT: SignedDuration = SignedDuration::from_mins(5);
/// Longest message, in bytes.
const MAX_MESSAGE: usize = 1000;

/// What comes of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// What the status says from now on; none: the fleet is not degraded.
    pub status: Option<DegradationStatus>,
    /// Which side of a change the load is on.
    pub beyond: Option<Beyond>,
    /// The stage changed: what was noted of the load so far counts until that is written down.
    pub changed: bool,
    /// What there is to tell of it.
    pub event: Option<Event>,
    /// When to look again, if nothing happens before.
    pub next: Option<Timestamp>,
}

/// What is known of a policy apart from its pods.
pub struct Inputs<'a> {
    /// The policy.
    pub policy: &'a ResiliencePolicy,
    /// It can be used, and is not suspended: otherwise what it has stays.
    pub may_change: bool,
    /// It has some of its targets.
    pub in_force: bool,
    /// Nothing is to be set.
    pub dry_run: bool,
    /// Which side of a change the load was on, as far as this process knows.
    pub beyond: Option<Beyond>,
    /// What all degraded fleets of the namespace say.
    pub all: &'a Degradations,
    /// Now.
    pub now: Timestamp,
}

/// Decides over the fleet of a policy, as this process knows it.
pub fn decide(ctx: &Context, policy: &ResiliencePolicy, held: &[&Target], valid: bool, now: Timestamp) -> Box<Outcome> {
    let key = ObjectKey::of(policy);
    let inputs = Inputs {
        policy,
        may_change: valid && !policy.spec.suspend,
        in_force: !held.is_empty(),
        dry_run: ctx.shared.args.dry_run || policy.spec.mode == Mode::DryRun,
        beyond: ctx.degradation_timers().get(&key).copied(),
        all: &ctx.index.degradations_in(&key.namespace),
        now,
    };
    let outcome = next(&inputs, || readings(ctx, &key.namespace, held));
    if !outcome.changed {
        keep_timer(ctx, &key, outcome.beyond);
    }
    // It is carried through a long reconcile.
    Box::new(outcome)
}

/// Notes on which side of a change the load of a policy's fleet is.
pub fn keep_timer(ctx: &Context, key: &ObjectKey, beyond: Option<Beyond>) {
    let mut timers = ctx.degradation_timers();
    match beyond {
        Some(beyond) => drop(timers.insert(key.clone(), beyond)),
        None => drop(timers.remove(key)),
    }
}

/// What the pods of the workloads said last. A workload that is to have no pods has no load.
fn readings(ctx: &Context, namespace: &str, held: &[&Target]) -> Vec<Workload> {
    let held = held.iter().filter(|target| target.wanted > 0);
    let with_pods = held.map(|target| (target, ctx.index.pods_of(&workload_of(namespace, &target.key))));
    let with_pods: Vec<_> = with_pods.collect();
    let fleet = ctx.fleet.lock();
    let workload = |(target, pods): &(&&Target, Vec<_>)| {
        let known = fleet.get(&workload_of(namespace, &target.key));
        let reading = |facts: &Arc<PodFacts>| {
            let ready = facts.is_ready();
            let state = known.and_then(|known| known.pod(&facts.uid));
            let Some(state) = state.filter(|state| state.reported && state.is_heard()) else {
                return Reading { ready, ..Reading::default() };
            };
            let open = state.circuits.iter().filter(|(_, state)| *state == CircuitState::Open);
            Reading {
                ready,
                heard: true,
                load_percent: state.load_percent,
                cause: state.load_cause.to_string(),
                open_circuits: open.map(|(name, _)| name.to_string()).collect(),
            }
        };
        Workload { name: target.name.clone(), pods: pods.iter().map(reading).collect() }
    };
    with_pods.iter().map(workload).collect()
}

/// What comes next.
pub fn next(inputs: &Inputs<'_>, readings: impl FnOnce() -> Vec<Workload>) -> Outcome {
    let Inputs { policy, may_change, in_force, dry_run, beyond, all, now } = *inputs;
    let old = policy.status.as_ref().and_then(|status| status.degradation.as_deref());
    // What only was a rehearsal is not gone on from in earnest, and the other way round; nor is what has ended meanwhile.
    let ended = old.is_some_and(|old| old.until.0 <= now);
    let live = old.filter(|old| old.dry_run == dry_run && !ended);
    let told = old.filter(|old| !old.dry_run || dry_run);
    let over = |why: &str| Outcome {
        event: told.map(|old| recovered(old, why)),
        changed: old.is_some(),
        ..Outcome::default()
    };
    let Some(spec) = policy.spec.degradation.as_ref() else { return over("the policy says nothing of degradation") };
    if !in_force {
        return over("the policy is not in force");
    }
    let usable = spec::degradation::of_fleet(spec).ok().filter(|_| may_change);
    let Some((settings, stages)) = usable else {
        // What is live stays, and with it its end is put off.
        let held = live.map(|live| renewed(live, now));
        let event = told.filter(|_| held.is_none()).map(|old| recovered(old, dropped_for(ended)));
        return Outcome { next: held.as_ref().map(renewal), status: held, beyond, event, ..Outcome::default() };
    };
    let before = live.map_or(State::normal(now), |live| {
        let level = usize::try_from(live.level).unwrap_or_default();
        State::restored(&settings, &live.stage, level, live.since.0, now)
    });
    let before = State { beyond, ..before };
    let decision = degradation::decide(&settings, &readings(), before, now);
    let status = status(&settings, &stages, &decision, live, inputs, all);
    let dropped = told.is_some() && live.is_none();
    let event = match (told, &status) {
        _ if decision.changed_from.is_none() && !dropped => None,
        (_, Some(new)) if dropped || told.is_none_or(|old| old.level < new.level) => Some(entered(new)),
        (Some(old), Some(new)) => Some(recovered(old, &format!("{} is still in force: {}", stage_of(new), new.why))),
        (Some(old), None) if dropped => Some(recovered(old, dropped_for(ended))),
        (Some(old), None) => Some(recovered(old, &decision.why)),
        (None, _) => None,
    };
    Outcome {
        changed: decision.changed_from.is_some(),
        beyond: decision.state.beyond,
        next: decision.next_check.into_iter().chain(status.as_ref().map(renewal)).min(),
        status,
        event,
    }
}

/// Why nothing is gone on from.
const fn dropped_for(ended: bool) -> &'static str {
    if ended { "it ended while no operator put that off" } else { "nothing is set by a dry run" }
}

/// When the end of a state is put off.
fn renewal(status: &DegradationStatus) -> Timestamp {
    status.until.0.checked_sub(RENEW_AT).unwrap_or(status.until.0)
}

/// The same state, with its end put off if that is near, or further away than it can be.
fn renewed(live: &DegradationStatus, now: Timestamp) -> DegradationStatus {
    let left = live.until.0.duration_since(now);
    let until = if left <= RENEW_AT || left > LASTS { later(now) } else { live.until.0 };
    DegradationStatus { until: MicroTime(until), ..live.clone() }
}

fn later(now: Timestamp) -> Timestamp {
    now.checked_add(LASTS).unwrap_or(Timestamp::MAX)
}

fn status(
    settings: &Settings,
    stages: &[DegradationStage],
    decision: &Decision,
    live: Option<&DegradationStatus>,
    inputs: &Inputs<'_>,
    all: &Degradations,
) -> Option<DegradationStatus> {
    let level = decision.state.level;
    let stage = settings.stages.get(level.checked_sub(1)?)?;
    let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
    let flags: BTreeMap<_, _> = DegradationSettings::overrides(stages, level);
    let others = flags.keys().filter_map(|key| {
        let by = &all.get(key)?.by;
        (*by != inputs.policy.name_any() && !inputs.dry_run).then(|| format!("{key} is as the policy {by} says"))
    });
    let said: Vec<_> = others
        .chain(decision.unheard.iter().map(|unheard| format!("it stays, as too few pods are heard: {unheard}")))
        .collect();
    let same = live.filter(|_| decision.changed_from.is_none());
    let until = same.map_or_else(|| later(inputs.now), |live| renewed(live, inputs.now).until.0);
    Some(DegradationStatus {
        stage: stage.name.clone(),
        level: count(level),
        stages: count(settings.stages.len()),
        load_percent: i32::try_from(stage.enter_percent).unwrap_or(100),
        since: MicroTime(decision.state.since),
        until: MicroTime(until),
        // Of the moment when it changed: the load goes up and down all the time, and nobody wants to read that.
        why: same.map_or_else(|| cut(&decision.why, MAX_MESSAGE).to_owned(), |live| live.why.clone()),
        flags: flags.into_iter().map(|(key, variant)| FlagVariant { key, variant }).collect(),
        message: (!said.is_empty()).then(|| cut(&said.join("; "), MAX_MESSAGE).to_owned()),
        dry_run: inputs.dry_run,
    })
}

/// A stage in words.
fn stage_of(status: &DegradationStatus) -> String {
    format!("stage {} ({} of {}, {} %)", status.stage, status.level, status.stages, status.load_percent)
}

/// A state in words, which stay the same for as long as it does.
pub fn in_words(status: &DegradationStatus) -> String {
    let flags = status.flags.iter().map(|flag| format!("{}={}", flag.key, flag.variant)).collect::<Vec<_>>().join(", ");
    let sets = if flags.is_empty() { String::new() } else { format!("; sets {flags}") };
    let message = status.message.as_ref().map(|message| format!("; {message}")).unwrap_or_default();
    let dry = if status.dry_run { "dry run: the fleet would be in" } else { "the fleet is in" };
    let all = format!("{dry} {} since {}: {}{sets}{message}", stage_of(status), status.since.0, status.why);
    cut(&all, MAX_MESSAGE).to_owned()
}

fn entered(new: &DegradationStatus) -> Event {
    Event::warning(EventReason::FleetDegraded, "Degrade", in_words(new))
}

fn recovered(old: &DegradationStatus, why: &str) -> Event {
    let dry = if old.dry_run { "dry run: " } else { "" };
    let note = format!("{dry}{} is over: {why}", stage_of(old));
    Event::normal(EventReason::FleetRecovered, "Restore", cut(&note, MAX_MESSAGE).to_owned())
}

#[cfg(test)]
#[path = "degradation_tests.rs"]
mod tests;
