//! The steps that replace all pods of a workload: when a rollout may be undone, and what came of a restart or a rollback.

use super::{
    gates::{Closed, Proposal},
    ladder::{MAX_CLOCK_SKEW, Progress, WATCHES_CATCH_UP, evaluated, later, later_by},
    model::{Action, History, Outcome, PodFacts, Record, Rollout, Settings, Undo},
    view::View,
};
use crate::signals::Signal;
use jiff::{SignedDuration, Timestamp};

/// How long after the beginning of a rollout a failure may begin for that rollout to be its likely cause.
const BLAMED_FOR: SignedDuration = SignedDuration::from_hours(1);
/// How long a rollout may be under way at most. A Deployment has a deadline for its progress, a StatefulSet has none.
const LONGEST: SignedDuration = SignedDuration::from_mins(30);

/// Why a rollback that a ladder asks for is refused, if it is. It needs evidence: that a rollout is the cause, and that what was
/// before it is better.
pub(super) fn refused(
    settings: &Settings,
    observed: &View<'_>,
    history: &History,
    proposal: &Proposal<'_>,
    now: Timestamp,
) -> Closed {
    let undo = undo(observed, proposal)?;
    let young = move |facts: &PodFacts| now < later(facts.created_at, settings.startup_grace_ms);
    told(undo.and_then(|undo| is_the_cause(undo, observed, history, proposal, young)))
}

/// Why a rollback that a person asks for is refused, if it is. The person knows what the cause is.
pub(super) fn refused_by_hand(observed: &View<'_>, proposal: &Proposal<'_>) -> Closed {
    told(undo(observed, proposal)?.map(drop))
}

fn told(result: Result<(), String>) -> Closed {
    result.err().map(|why| (format!("{why}; nothing is rolled back, and it waits for a person"), None))
}

/// What a rollback would undo, if that is what is proposed.
fn undo<'a>(observed: &'a View<'_>, proposal: &Proposal<'_>) -> Option<Result<&'a Undo, String>> {
    (proposal.step.action == Action::Rollback).then(|| {
        let unknown = || "nothing is known of its revisions".to_owned();
        let rollout = observed.rollouts.get(&proposal.check.subject.target).ok_or_else(unknown)?;
        let undo = rollout.undo.as_ref().map_err(Clone::clone)?;
        if undo.proven {
            return Ok(undo);
        }
        Err(format!("nobody has seen a pod of revision {} ready, so it is not known to be better", undo.to))
    })
}

fn is_the_cause(
    undo: &Undo,
    observed: &View<'_>,
    history: &History,
    proposal: &Proposal<'_>,
    is_young: impl Fn(&PodFacts) -> bool,
) -> Result<(), String> {
    let (check, Undo { began_at, from, to, .. }) = (&proposal.check, undo);
    let subject = &check.subject;
    if check.since < *began_at {
        return Err(format!("{} failed before the rollout of revision {from} began", subject.check));
    }
    if check.since > later_by(*began_at, BLAMED_FOR) {
        let hours = BLAMED_FOR.as_hours();
        return Err(format!(
            "{} began to fail more than {hours} h after the rollout of revision {from}",
            subject.check
        ));
    }
    let target = &subject.target;
    let undoes = |record: &&Record| record.step.action == Action::Rollback && record.subject.target == *target;
    let undone = |record: &&Record| {
        record.executed_at.is_some_and(|at| later_by(at, MAX_CLOCK_SKEW) >= *began_at) && !record.dry_run
    };
    if history.all().filter(undoes).any(|record| undone(&record)) {
        return Err(format!("revision {from} was undone already, and somebody brought it back"));
    }
    let of_older = |record: &Record| {
        let same = record.subject.target == subject.target && record.subject.check == subject.check;
        let not_long_before = record.failed_at < *began_at && later_by(record.failed_at, BLAMED_FOR) >= *began_at;
        same && !record.by_hand && !record.dry_run && record.outcome != Outcome::Succeeded && not_long_before
    };
    if history.all().any(of_older) {
        return Err(format!("{} failed already before the rollout of revision {from}", subject.check));
    }
    let Some(pod) = &subject.pod else {
        let why = "nobody saw when it began to fail, so it is not known whether that was with the rollout";
        return match () {
            () if check.asked => {
                Err("what the operator asks a Service for says nothing of the pods of a revision".to_owned())
            }
            () if check.began_before => Err(why.to_owned()),
            () => Ok(()),
        };
    };
    let Some(facts) = observed.pods.get(&pod.uid).filter(|facts| !facts.outdated) else {
        return Err(format!("{} is not of revision {from}", pod.name));
    };
    // That a pod is not ready yet says nothing of it: it may only start slowly. That it crashes does.
    let stuck = observed.rollouts.get(target).is_some_and(|rollout| rollout.stuck);
    let crashes = matches!(Signal::of(&subject.check), Some(Signal::Restarts | Signal::Image));
    let shown = crashes || stuck;
    if !facts.was_ready && !shown {
        return Err(format!("{} was never ready, and its rollout may still come to its end", pod.name));
    }
    if is_young(facts) && !shown {
        return Err(format!("{} is too young to be judged (startupGrace)", pod.name));
    }
    let mut failing = 0;
    for other in &observed.checks {
        let pod = other.subject.pod.as_ref().and_then(|pod| observed.pods.get(&pod.uid));
        let same = other.subject.target == *target && other.subject.check == subject.check;
        let Some(facts) = pod.filter(|_| same) else { continue };
        if facts.outdated && !other.healthy {
            let name = other.subject.display_name();
            return Err(format!("{name} of revision {to} fails, too, so the rollout is not the cause"));
        }
        failing += usize::from(!facts.outdated && !other.healthy);
    }
    // One that has not been heard yet may be well.
    let all = observed.pods.values().filter(|facts| facts.target == *target && !facts.outdated).count();
    if failing * 2 > all {
        return Ok(());
    }
    let others = all.saturating_sub(failing);
    Err(format!("{others} of {all} pods of revision {from} do not fail, so the rollout is not the cause"))
}

/// Whether the workload carries the id of a restart or of a rollback: then it was executed.
pub(super) fn carries(record: &Record, observed: &View<'_>) -> bool {
    observed.rollouts.get(&record.subject.target).is_some_and(|rollout| carried(record, rollout) == Some(&record.id))
}

fn carried<'a>(record: &Record, rollout: &'a Rollout) -> Option<&'a String> {
    match record.step.action {
        Action::Rollback => rollout.rolled_back_by.as_ref(),
        _ => rollout.restarted_by.as_ref(),
    }
}

/// Whether the pods are being replaced: until then nothing can have helped.
pub(super) fn is_under_way(record: &Record, executed_at: Timestamp, observed: &View<'_>, now: Timestamp) -> bool {
    let rolls = observed.rolling_out.contains(&record.subject.target);
    record.step.action.replaces_all() && !record.dry_run && rolls && now < later_by(executed_at, LONGEST)
}

/// From when on a step can have helped: one that replaces all pods, not before the last of them was made.
pub(super) fn helps_from(record: &Record, executed_at: Timestamp, observed: &View<'_>) -> Timestamp {
    if !record.step.action.replaces_all() {
        return executed_at;
    }
    let own = observed.pods.values().filter(|facts| facts.target == record.subject.target);
    // Pods that come later, because it is scaled, are no part of it.
    let latest = later_by(executed_at, LONGEST);
    own.map(|facts| facts.created_at).max().map_or(executed_at, |youngest| youngest.clamp(executed_at, latest))
}

/// What came of replacing all pods: they must be there, and healthy by the check.
pub(super) fn replaced(record: &Record, executed_at: Timestamp, observed: &View<'_>, now: Timestamp) -> Progress {
    let caught_up = now >= later_by(executed_at.max(observed.watching_since), WATCHES_CATCH_UP);
    let seen_at = caught_up.then_some(now);
    let Some(rollout) = observed.rollouts.get(&record.subject.target) else {
        return Progress::Over(Outcome::Cancelled, "the workload is gone".to_owned());
    };
    if carried(record, rollout) != Some(&record.id) {
        if caught_up {
            // It counts as tried: what takes the annotation away each time would else make it begin again each time.
            let why = "somebody changed the workload meanwhile, and it does not carry the intent any more";
            return Progress::Over(Outcome::Failed, why.to_owned());
        }
        return Progress::NotYet(None, "the workload does not show it yet".to_owned());
    }
    if !rollout.complete {
        return Progress::NotYet(seen_at, "not all pods are of the new revision and available".to_owned());
    }
    if !record.subject.has_check() {
        return Progress::Healthy(executed_at);
    }
    all_healthy(record, observed)
}

/// Whether the check that an action was for is healthy in the whole workload.
pub(super) fn all_healthy(record: &Record, observed: &View<'_>) -> Progress {
    if record.subject.pod.is_none()
        && let Some(of_workload) = observed.check(&record.subject)
    {
        return evaluated(Some(of_workload));
    }
    let (target, check) = (&record.subject.target, &record.subject.check);
    let own = observed.checks.iter().filter(|state| {
        state.subject.target == *target && state.subject.check == *check && state.subject.pod.is_some()
    });
    // In a large workload some pod is always only starting: most must be well, and none may fail.
    let (mut well_since, mut heard) = (Vec::new(), 0);
    for state in own {
        if !state.healthy {
            return evaluated(Some(state));
        }
        heard += 1;
        well_since.extend(state.well_since);
    }
    well_since.sort_unstable();
    match well_since.get(heard / 2) {
        Some(at) => Progress::Healthy(*at),
        None if heard == 0 => Progress::NotYet(None, "the check is not reported".to_owned()),
        None => Progress::NotYet(None, format!("the check has passed in {} of {heard} pods", well_since.len())),
    }
}

/// Whether a rollback that was not executed has lost its rollout: a later one began since it was asked for.
pub(super) fn has_lost_its_rollout(record: &Record, observed: &View<'_>) -> bool {
    let undo = observed.rollouts.get(&record.subject.target).and_then(|rollout| rollout.undo.as_ref().ok());
    // What a person asked for has its time from the API server, too.
    let skew = if record.by_hand { SignedDuration::ZERO } else { MAX_CLOCK_SKEW };
    record.step.action == Action::Rollback && undo.is_some_and(|undo| undo.began_at > later_by(record.started_at, skew))
}
