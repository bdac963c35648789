//! Automatic recovery: which action to take for which failing check, and when not to.
//!
//! [`decide`] is the whole protocol. Its caller writes [`History::changes_since`] to the ledger *before* it executes
//! anything in [`Decision::execute`]: a new record only if none has its id, a changed one only if it is still as it was read.
//! The id of each record travels to where the action lands, which does each id once. So a crash at any point neither loses an
//! action nor repeats one: what is recorded as pending is executed again under the same id. Of one subject, each record
//! follows another, and no two follow the same: so two operators that know the same cannot both begin.

mod gates;
mod ladder;
mod model;
mod retention;
mod rollout;
mod view;

pub use gates::Gate;
pub(crate) use ladder::later;
pub use model::{
    Action, Before, Change, CheckState, Decision, Exhausted, History, Job, JobState, Limits, MaxUnhealthy, Observed,
    Outage, Outcome, Pod, PodFacts, Record, Rollout, Settings, Step, Storm, Subject, Undo, Withheld,
};
pub use retention::{Retention, forgettable};

use jiff::Timestamp;
use ladder::Next;
use std::collections::{BTreeMap, BTreeSet};
use view::View;

/// Decides what to do now. `policy` tells apart what several policies rehearse on one workload.
pub fn decide(settings: &Settings, observed: &Observed, history: &History, policy: &str, now: Timestamp) -> Decision {
    let observed = &View::new(observed, now);
    let mut decision = Decision { history: history.clone(), ..Decision::default() };
    settle(settings, observed, &mut decision, now);
    let mut begun = BTreeSet::new();

    for check in observed.checks.iter().filter(|check| !check.healthy) {
        let Some(steps) = settings.ladders.get(&check.subject.check) else { continue };
        // What a person asks for and has to wait for holds up no ladder.
        let waits = |record: &Record| record.by_hand && record.outcome == Outcome::Waiting;
        if decision.history.in_flight.iter().any(|record| record.subject == check.subject && !waits(record)) {
            continue;
        }
        // The successor of a pod that is being restarted is what the restart is judged by.
        let restarting = |record: &Record| ladder::succeeds(record, check, observed);
        if decision.history.in_flight.iter().any(restarting) {
            continue;
        }
        let next = ladder::next(steps, check, observed, &decision.history, settings.dry_run);
        let closed = |index: usize, decision: &Decision| {
            let escalates = index > 0 && matches!(next, Next::Step { escalates: true, .. });
            let proposal = gates::Proposal { check, step: &steps[index], escalates };
            gates::first_closed(settings, observed, &decision.history, &proposal, now)
        };
        let step = match next {
            Next::Step { index, .. } => {
                let pod = check.subject.pod.as_ref().and_then(|pod| observed.pods.get(&pod.uid));
                let came_up = pod.is_none_or(|facts| facts.was_ready);
                open_step(steps, index, came_up, &mut decision, closed)
            }
            Next::Exhausted => Err(true),
        };
        let step = match step {
            Ok(step) => step,
            Err(exhausted) => {
                let exhausted = exhausted.then(|| Exhausted { subject: check.subject.clone(), since: check.since });
                decision.exhausted.extend(exhausted);
                continue;
            }
        };
        let (slot, after) = ladder::next_slot(policy, &check.subject, &decision.history, settings.dry_run);
        let record = Record {
            id: ladder::intent_id(&slot, now),
            slot,
            after,
            by_hand: false,
            withdrawn: false,
            subject: check.subject.clone(),
            instance: instance(observed, &check.subject, steps[step].action),
            step: steps[step].clone(),
            index: step,
            steps: steps.len(),
            failed_at: check.since,
            started_at: now,
            executed_at: None,
            finished_at: None,
            outcome: Outcome::Pending,
            healed_at: None,
            before: before(&steps[step], &check.subject, observed),
            successor: None,
            dry_run: settings.dry_run,
            message: None,
        };
        begun.insert(record.id.clone());
        decision.history.in_flight.push(record);
    }

    // What is pending is executed: the new ones, and those whose execution nobody can vouch for.
    // Not while the policy is suspended or runs dry, though: then what is pending waits, and fails when its time is over.
    if !settings.suspended && !settings.dry_run {
        // Only on what is seen to fail now: after a time in which nobody looked, that has to be heard first.
        let fails = |subject: &Subject| observed.check(subject).is_some_and(|check| !check.healthy);
        // A pod is only taken away through the gates: what was begun in another pass goes through them again, below.
        let at_once =
            |record: &Record| begun.contains(&record.id) || (!record.step.action.disrupts() && !record.by_hand);
        // What people want to be left alone is, also by what was begun before.
        let is_held = |record: &Record| {
            let excluded = record.subject.pod.as_ref().is_some_and(|pod| observed.excluded.contains(&pod.uid));
            excluded || observed.paused.contains_key(&record.subject.target) || !settings.pause_requests.is_empty()
        };
        let pending = |record: &&Record| {
            let wanted = fails(&record.subject) || (record.step.action.done_by_pod() && is_reported(observed, record));
            record.outcome == Outcome::Pending && !record.dry_run && wanted && at_once(record) && !is_held(record)
        };
        decision.execute = decision.history.in_flight.iter().filter(pending).cloned().collect();
    }
    ask_again(settings, observed, &mut decision, &begun, now);
    for record in &mut decision.history.in_flight {
        if record.dry_run && record.outcome == Outcome::Pending {
            record.outcome = Outcome::Verifying;
            record.executed_at = Some(now);
            record.message = Some("dry run: nothing was done".to_owned());
        }
    }
    // A pod that a new leader has not heard yet counts as broken for a while; that ends by itself.
    let heard = ladder::later_by(observed.watching_since, ladder::OBSERVATION_GRACE);
    if now < heard && !decision.withheld.is_empty() {
        decision.wake_at(Some(heard));
    }
    let settled = |record: &&Record| record.outcome != Outcome::Waiting;
    let deadlines: Vec<_> =
        decision.history.in_flight.iter().filter(settled).map(|record| ladder::deadline(record, settings)).collect();
    for deadline in deadlines.into_iter().filter(|deadline| *deadline > now) {
        decision.wake_at(Some(deadline));
    }
    decision.remaining_budget = gates::remaining_budget(settings, &decision.history, now);
    decision.next_check = decision.next_check.map(|at| at.max(ladder::later(now, 1)));
    decision
}

/// The step that may begin: the one that comes next, or another one in two cases. A rollback that is refused is passed over, as
/// there is nothing to go back to; and where nothing may be done because the pods of a rollout do not come up, that rollout may
/// be undone. Otherwise what is held back is noted, and the answer is whether nothing is left to be tried.
fn open_step(
    steps: &[Step],
    first: usize,
    came_up: bool,
    decision: &mut Decision,
    closed: impl Fn(usize, &Decision) -> Option<Withheld>,
) -> Result<usize, bool> {
    let mut index = first;
    loop {
        let Some(held) = closed(index, decision) else { return Ok(index) };
        let rollback = || (index + 1..steps.len()).find(|later| steps[*later].action == Action::Rollback);
        // One that came up, and is only too young, is left the time for that.
        let stuck = held.gate == Gate::RolloutInProgress || (held.gate == Gate::StartingUp && !came_up);
        if let Some(rollback) = rollback().filter(|later| stuck && closed(*later, decision).is_none()) {
            return Ok(rollback);
        }
        let refused = held.gate == Gate::RollbackRefused;
        decision.wake_at(held.until);
        decision.withheld.push(held);
        if !refused {
            return Err(false);
        }
        index += 1;
        if index == steps.len() {
            return Err(true);
        }
    }
}

/// What was refused for now, and what would take a pod away and nobody can vouch for, is asked for again, as long as the
/// gates would let it begin.
fn ask_again(
    settings: &Settings,
    observed: &View<'_>,
    decision: &mut Decision,
    begun: &BTreeSet<String>,
    now: Timestamp,
) {
    let again = |record: &&Record| match record.outcome {
        // What a person asks for is done by a policy that is suspended, too.
        _ if settings.dry_run || record.dry_run || (settings.suspended && !record.by_hand) => false,
        Outcome::Waiting => true,
        Outcome::Pending => record.by_hand || (record.step.action.disrupts() && !begun.contains(&record.id)),
        _ => false,
    };
    let mut waiting: Vec<_> = decision.history.in_flight.iter().filter(again).cloned().collect();
    if !waiting.is_empty() {
        // Each comes first in its turn: one that is refused for ever must not keep the others from being asked for.
        let turn = usize::try_from(now.as_second() / ladder::WAITING_RETRY.as_secs()).unwrap_or(0);
        let turn = turn % waiting.len();
        waiting.rotate_left(turn);
    }
    for record in waiting {
        let asked = CheckState::asked_for(&record);
        let failing = observed.check(&record.subject).filter(|check| !check.healthy);
        let Some(check) = failing.or(record.by_hand.then_some(&asked)) else { continue };
        let proposal = gates::Proposal { check, step: &record.step, escalates: true };
        // Those that are asked for now count as busy, too.
        let mut busy = decision.history.clone();
        for asked in busy.in_flight.iter_mut().filter(|other| decision.execute.iter().any(|act| act.id == other.id)) {
            (asked.outcome, asked.executed_at) = (Outcome::Pending, asked.executed_at.or(Some(now)));
        }
        busy.in_flight.retain(|other| other.id != record.id);
        let closed = if record.by_hand { gates::first_closed_by_hand } else { gates::first_closed };
        if let Some(held) = closed(settings, observed, &busy, &proposal, now) {
            if record.by_hand {
                // The person looks at the record, not at the policy.
                for own in decision.history.in_flight.iter_mut().filter(|own| own.id == record.id) {
                    own.outcome = Outcome::Waiting;
                    own.message = Some(format!("held back: {}", held.message));
                }
                decision.wake_at(held.until);
            } else {
                decision.withheld.push(held);
            }
            continue;
        }
        decision.execute.push(record);
    }
}

/// What a restart has to know of its workload.
fn before(step: &Step, subject: &Subject, observed: &View<'_>) -> Option<Before> {
    (step.action == Action::RestartPod).then(|| Before::of(&subject.target, observed)).flatten()
}

/// Whether the record's check is heard of now.
fn is_reported(observed: &View<'_>, record: &Record) -> bool {
    observed.check(&record.subject).is_some()
}

/// Since when something fails. Of a failure that began before this operator looked, the history knows since when, so that
/// its ladder goes on; the pod that took the place of one whose restart did not help goes on there.
pub fn failing_since(seen: Timestamp, began_before: bool, subject: &Subject, history: &History) -> Timestamp {
    if !began_before {
        return seen;
    }
    let all = || history.in_flight.iter().chain(&history.recent);
    let goes_on = |record: &&Record| record.finished_at.is_none() || record.goes_on();
    if let Some(own) = all().find(|record| record.subject == *subject && !record.by_hand) {
        return Some(own).filter(goes_on).map_or(seen, |record| record.failed_at);
    }
    let inherited = all().find(|record| record.goes_on() && record.is_succeeded_by(subject));
    inherited.and_then(|record| record.finished_at).unwrap_or(seen)
}

/// The process that is to do what a pod does itself.
fn instance(observed: &View<'_>, subject: &Subject, action: Action) -> Option<String> {
    let pod = subject.pod.as_ref().filter(|_| action.done_by_pod())?;
    observed.pods.get(&pod.uid)?.instance.clone()
}

/// Brings every action in flight to its outcome where that is known.
fn settle(settings: &Settings, observed: &View<'_>, decision: &mut Decision, now: Timestamp) {
    let in_flight = std::mem::take(&mut decision.history.in_flight);
    let all = in_flight.iter().chain(&decision.history.recent);
    let pod = |record: &Record| Some((record.successor.clone()?, record.subject.pod.as_ref()?.uid.clone()));
    let mut taken: BTreeMap<_, _> = all.filter_map(pod).collect();
    for mut record in in_flight {
        if record.executed_at.is_none() && !ladder::is_gone(&record, observed) {
            // Pods that came while it waited are no successors either.
            record.before = before(&record.step, &record.subject, observed);
        }
        ladder::catch_up(&mut record, observed, now);
        ladder::find_successor(&mut record, observed, &mut taken);
        match ladder::outcome(&record, settings, observed, now) {
            ladder::Verdict::Wait(until) => {
                decision.wake_at(until);
                decision.history.in_flight.push(record);
            }
            ladder::Verdict::Over(outcome, message) => {
                record.outcome = outcome;
                record.finished_at = Some(now);
                record.message = Some(message);
                decision.finished.push(record.clone());
                decision.history.recent.insert(0, record);
            }
        }
    }
    let mut heals = None;
    for record in decision.history.recent.iter_mut().rev().filter(|record| record.goes_on()) {
        ladder::find_successor(record, observed, &mut taken);
        match ladder::healed(record, settings, observed, now) {
            Some(at) if at <= now => record.healed_at = Some(now),
            at => heals = heals.into_iter().chain(at).min(),
        }
    }
    decision.wake_at(heals);
}

#[cfg(test)]
mod by_hand_tests;
#[cfg(test)]
mod gate_tests;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod restart_tests;
#[cfg(test)]
mod rollout_tests;
#[cfg(test)]
mod tests;
