//! The ladder: which step comes next, and what came of the last one.

use super::{
    model::{Action, CheckState, History, JobState, Outcome, Record, Settings, Step, Subject},
    rollout,
    view::View,
};
use crate::signals;
use contract::canonical;
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// The step that comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This one.
    Step {
        /// Its place, from 0.
        index: usize,
        /// It follows a step that did not help.
        escalates: bool,
    },
    /// None is left.
    Exhausted,
}

/// The step after the last one that was tried since the check was healthy for the healthy delay. The pod that took the place of
/// one whose restart did not help goes on where that one was, however late its check fails: another restart would help no more.
pub(super) fn next(steps: &[Step], check: &CheckState, observed: &View<'_>, history: &History, dry_run: bool) -> Next {
    let inherited = |record: &Record| record.goes_on() && succeeds(record, check, observed);
    // An edit may have put another step in the place of one that was given up.
    let same_step = |record: &Record| steps.get(record.index).is_some_and(|step| step.action == record.step.action);
    let same_failure = |record: &Record| record.failed_at == check.since && same_step(record);
    let own = |record: &Record| {
        let counts = !record.by_hand && !record.withdrawn;
        counts && record.subject == check.subject && (record.goes_on() || same_failure(record))
    };
    let tried = history
        .of_kind(dry_run)
        .filter(|record| own(record) || inherited(record))
        .map(|record| record.index + 1)
        .max()
        .unwrap_or(0);
    if tried < steps.len() { Next::Step { index: tried, escalates: tried > 0 } } else { Next::Exhausted }
}

/// Whether a check is that of the pod that took the place of the one that `record` restarted.
pub(super) fn succeeds(record: &Record, check: &CheckState, observed: &View<'_>) -> bool {
    let subject = &check.subject;
    if record.step.action.replaces_all() {
        // It concerns all of them, whichever it was decided for.
        let same = (&record.subject.target, &record.subject.check) == (&subject.target, &subject.check);
        return same && !record.dry_run && !record.by_hand;
    }
    if record.before.is_some() {
        return !record.dry_run && record.is_succeeded_by(subject);
    }
    // It was decided by version 0.1, for which every pod that came later was a successor as long as it was judged.
    let created_at = subject.pod.as_ref().and_then(|pod| observed.pods.get(&pod.uid)).map(|facts| facts.created_at);
    record.step.action == Action::RestartPod
        && !record.dry_run
        && record.finished_at.is_none()
        && is_gone(record, observed)
        && (&record.subject.target, &record.subject.check) == (&subject.target, &subject.check)
        && created_at.is_some_and(|created_at| is_later(record, created_at))
}

/// Whether the pod that something was done to is not there any more.
pub(super) fn is_gone(record: &Record, observed: &View<'_>) -> bool {
    record.subject.pod.as_ref().is_some_and(|pod| !observed.pods.contains_key(&pod.uid))
}

/// Whether a pod was created after a restart that version 0.1 decided. An eviction may land though nobody heard so.
fn is_later(record: &Record, created_at: Timestamp) -> bool {
    later_by(created_at, MAX_CLOCK_SKEW) >= record.executed_at.unwrap_or(record.started_at)
}

/// Finds the pod that took the place of the one that was restarted: the oldest that came after the restart was decided, and
/// follows no other pod; of a StatefulSet the one of the same name. As long as the restart is judged, another one follows a
/// successor that went away. Once it is over, only a place that is still empty is filled. `taken` has the pods by their successors.
pub(super) fn find_successor(record: &mut Record, observed: &View<'_>, taken: &mut BTreeMap<String, String>) {
    let Some((before, pod)) = record.before.as_ref().zip(record.subject.pod.as_ref()) else { return };
    let is_there = record.successor.as_ref().is_some_and(|uid| observed.pods.contains_key(uid));
    let is_over = record.finished_at.is_some();
    let executed = record.executed_at.is_some() && !record.dry_run && is_gone(record, observed);
    if !executed || is_there || (is_over && record.successor.is_some()) {
        return;
    }
    let target = &record.subject.target;
    let keeps_names = observed.keeps_names.contains(target);
    let new = observed.pods.iter().filter(|(uid, facts)| {
        facts.target == *target
            && before.has_not(uid, facts.created_at)
            && (!keeps_names || facts.name == pod.name)
            && taken.get(*uid).is_none_or(|predecessor| *predecessor == pod.uid)
    });
    // A pod that was restarted for two checks has one successor.
    let oldest = new.min_by_key(|(uid, facts)| (!taken.contains_key(*uid), facts.created_at, (*uid).clone()));
    record.successor = oldest.map(|(uid, _)| uid.clone());
    taken.extend(record.successor.clone().map(|successor| (successor, pod.uid.clone())));
}

/// When the check of an action that failed will have been healthy for the healthy delay, if it is healthy: in the pod itself, or
/// in the one that took its place. What ends with its pod, because no other pod took the place, counts as healed, too.
pub(super) fn healed(record: &Record, settings: &Settings, observed: &View<'_>, now: Timestamp) -> Option<Timestamp> {
    let wanted = *observed.wanted.get(&record.subject.target)?;
    if record.step.action.replaces_all() {
        return match rollout::all_healthy(record, observed) {
            Progress::Healthy(since) => Some(later(since, settings.healthy_delay_ms)),
            Progress::Over(..) | Progress::NotYet(..) => None,
        };
    }
    if is_gone(record, observed) && record.successor.as_ref().is_none_or(|uid| !observed.pods.contains_key(uid)) {
        let is_filled = record.successor.is_some() || observed.pods_of(&record.subject.target) >= wanted;
        return (is_filled || record.step.action != Action::RestartPod).then_some(now);
    }
    let state = match &record.successor {
        Some(uid) if observed.pods.get(uid).is_some_and(|facts| !facts.ready) => None,
        Some(uid) => observed.pod_check(uid, &record.subject.check),
        None => observed.check(&record.subject),
    };
    match evaluated(state) {
        Progress::Healthy(since) => Some(later(since, settings.healthy_delay_ms)),
        Progress::Over(..) | Progress::NotYet(..) => None,
    }
}

/// Takes note of what shows that an action was executed, though nobody could write it down.
pub(super) fn catch_up(record: &mut Record, observed: &View<'_>, now: Timestamp) {
    if !matches!(record.outcome, Outcome::Pending | Outcome::Waiting) || record.dry_run {
        return;
    }
    let target_there = observed.wanted.contains_key(&record.subject.target);
    let evidence = match record.step.action {
        Action::RestartPod => {
            // What waited was not asked for since: somebody else took the pod away, just now.
            let at = if record.outcome == Outcome::Waiting { now } else { record.started_at };
            (is_gone(record, observed) && target_there).then_some((at, "the pod is gone"))
        }
        Action::RunCleanupJob => observed.jobs.get(&record.id).map(|job| (job.created_at, "its Job is there")),
        action if action.replaces_all() => {
            let carries = rollout::carries(record, observed);
            carries.then_some((record.started_at, "the workload carries its id"))
        }
        _ => None,
    };
    if let Some((at, message)) = evidence {
        record.outcome = Outcome::Verifying;
        record.executed_at = Some(at.max(record.started_at));
        record.message = Some(message.to_owned());
    }
}

/// Whether an action is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Not yet; look again then.
    Wait(Option<Timestamp>),
    /// It is.
    Over(Outcome, String),
}

/// What came of an action that is in flight.
pub(super) fn outcome(record: &Record, settings: &Settings, observed: &View<'_>, now: Timestamp) -> Verdict {
    let restart = record.step.action == Action::RestartPod;
    if let Some(pod) = &record.subject.pod {
        match observed.pods.get(&pod.uid) {
            // It was replaced with all the others.
            None if record.step.action.replaces_all() && record.executed_at.is_some() && !record.dry_run => {}
            None if !restart => return Verdict::Over(Outcome::Cancelled, "the pod is gone".to_owned()),
            None if !observed.wanted.contains_key(&record.subject.target) => {
                return Verdict::Over(Outcome::Cancelled, "the workload is gone".to_owned());
            }
            Some(facts) if record.executed_at.is_none() && other_process(record, facts.instance.as_ref()) => {
                let why = "its process was started again before this was known to be executed";
                return Verdict::Over(Outcome::Cancelled, why.to_owned());
            }
            _ => {}
        }
    }
    if let Some(why) = not_wanted(record, settings) {
        return Verdict::Over(Outcome::Cancelled, why.to_owned());
    }
    let state = observed.check(&record.subject);
    if record.executed_at.is_none() && rollout::has_lost_its_rollout(record, observed) {
        let why = "another rollout began before this could be executed";
        return Verdict::Over(Outcome::Cancelled, why.to_owned());
    }
    if record.outcome == Outcome::Waiting {
        return match state {
            Some(check) if check.healthy && !record.by_hand => {
                Verdict::Over(Outcome::Cancelled, "healthy again before it could be executed".to_owned())
            }
            _ => Verdict::Wait(Some(later_by(now, WAITING_RETRY))),
        };
    }
    let Some(executed_at) = record.executed_at else {
        if let Some(check) = state.filter(|check| check.healthy)
            && !record.step.action.done_by_pod()
            && !record.by_hand
        {
            let took = seconds_between(record.failed_at, check.since.max(record.failed_at));
            let why = format!("healthy again after {took} s, before this was known to be executed");
            return Verdict::Over(Outcome::Cancelled, why);
        }
        // A new leader tries for a while, too, however long nobody could.
        let deadline =
            later(record.started_at, record.step.timeout_ms).max(later_by(observed.watching_since, OBSERVATION_GRACE));
        if now >= deadline {
            let why = record.message.as_deref().unwrap_or("no answer");
            return Verdict::Over(Outcome::Failed, format!("it could not be executed in time: {why}"));
        }
        return Verdict::Wait(Some(deadline));
    };
    if rollout::is_under_way(record, executed_at, observed, now) {
        // Kubernetes has a deadline of its own for it.
        return Verdict::Wait(Some(later_by(now, WAITING_RETRY)));
    }
    let proof_ms = signals::proven_after_ms(&record.subject.check);
    let helps_from = rollout::helps_from(record, executed_at, observed);
    let deadline = later(helps_from, record.step.timeout_ms.saturating_add(proof_ms));
    let progress = match record.step.action {
        _ if record.dry_run => evaluated(state),
        Action::RestartPod => restarted(record, executed_at, observed, now),
        Action::RunCleanupJob => cleaned_up(record, state, observed),
        action if action.replaces_all() => rollout::replaced(record, executed_at, observed, now),
        _ if !record.subject.has_check() => Progress::Healthy(executed_at),
        _ => evaluated(state),
    };
    match progress {
        Progress::Healthy(_) if !record.subject.has_check() => {
            let what = match record.step.action {
                Action::RestartPod => "done; the pod that took the place is ready",
                Action::RolloutRestart | Action::Rollback => "done; all pods are of the new revision, and available",
                _ => record.message.as_deref().unwrap_or("done"),
            };
            Verdict::Over(Outcome::Succeeded, what.to_owned())
        }
        Progress::Healthy(since) => {
            // Times of Kubernetes' signals are of the node's clock: one that is ahead by far says only that it is so now.
            let since = if since > later_by(now, MAX_CLOCK_SKEW) { executed_at } else { since };
            let proven_at = later(since.max(executed_at), settings.healthy_delay_ms);
            if now < proven_at {
                return Verdict::Wait(Some(proven_at));
            }
            let took = seconds_between(executed_at, since.max(executed_at));
            let stood = seconds(settings.healthy_delay_ms);
            let message = format!("healthy for {stood} s; recovered {took} s after the action");
            Verdict::Over(Outcome::Succeeded, message)
        }
        Progress::Over(outcome, why) => Verdict::Over(outcome, why),
        // That the main container of a Job is done wakes nobody.
        Progress::NotYet(..) if now < deadline && observed.jobs.contains_key(&record.id) => {
            Verdict::Wait(Some(deadline.min(later_by(now, WAITING_RETRY))))
        }
        Progress::NotYet(..) if now < deadline => Verdict::Wait(Some(deadline)),
        // What was last heard before the deadline may have changed until then.
        Progress::NotYet(seen_at, what) => {
            let latest = later_by(deadline.max(observed.watching_since), OBSERVATION_GRACE);
            if seen_at.is_some_and(|seen_at| seen_at >= deadline) || now >= latest {
                let message = format!("it did not help within {} s; {what}", seconds(record.step.timeout_ms));
                Verdict::Over(Outcome::Failed, message)
            } else {
                // A report that says nothing new wakes nobody.
                Verdict::Wait(Some(latest.min(later_by(now, LISTEN))))
            }
        }
    }
}

/// Why the policy wants an action no more, if so.
fn not_wanted(record: &Record, settings: &Settings) -> Option<&'static str> {
    if record.by_hand {
        return None;
    }
    let Some(steps) = settings.ladders.get(&record.subject.check) else {
        return Some("the policy no longer recovers this check");
    };
    let is_wanted = steps.get(record.index).is_some_and(|step| step.action == record.step.action);
    (record.executed_at.is_none() && !is_wanted).then_some("the policy no longer has this step")
}

/// How an action that was executed is getting on.
pub(super) enum Progress {
    /// The check is healthy, since then.
    Healthy(Timestamp),
    /// Nothing more is to be expected.
    Over(Outcome, String),
    /// Not yet: when that was seen, and what is missing.
    NotYet(Option<Timestamp>, String),
}

fn other_process(record: &Record, now: Option<&String>) -> bool {
    record.instance.as_ref().zip(now).is_some_and(|(meant, now)| meant != now)
}

pub(super) fn evaluated(state: Option<&CheckState>) -> Progress {
    match state {
        Some(check) if check.healthy => match check.well_since {
            Some(at) => Progress::Healthy(at),
            None => Progress::NotYet(Some(check.seen_at), "the check has not passed since".to_owned()),
        },
        Some(check) => Progress::NotYet(Some(check.seen_at), format!("the check still fails: {}", check.message)),
        None => Progress::NotYet(None, "the check is not reported".to_owned()),
    }
}

fn cleaned_up(record: &Record, state: Option<&CheckState>, observed: &View<'_>) -> Progress {
    match observed.jobs.get(&record.id).map(|job| &job.state) {
        Some(JobState::Failed(why)) => Progress::Over(Outcome::Failed, format!("the Job failed: {why}")),
        Some(JobState::Running) => Progress::NotYet(state.map(|check| check.seen_at), "the Job is not over".to_owned()),
        Some(JobState::Complete) if !record.subject.has_check() => Progress::Healthy(record.started_at),
        // A Job that somebody deleted tells nothing; the check does.
        Some(JobState::Complete) | None => evaluated(state),
    }
}

/// The pod's successor must be there, ready, and healthy by the same check.
fn restarted(record: &Record, executed_at: Timestamp, observed: &View<'_>, now: Timestamp) -> Progress {
    // What the cluster shows is as of now, once the watches have had the time to show it.
    let seen_at = (now >= later_by(observed.watching_since, WATCHES_CATCH_UP)).then_some(now);
    let (target, check) = (&record.subject.target, &record.subject.check);
    if !is_gone(record, observed) {
        return Progress::NotYet(seen_at, "the pod is still there".to_owned());
    }
    let pods: Vec<_> = observed.pods.iter().filter(|(_, facts)| facts.target == *target).collect();
    let ready = pods.iter().filter(|(_, facts)| facts.ready).count();
    let wanted = observed.wanted.get(target).copied().unwrap_or_default();
    let few = || Progress::NotYet(seen_at, format!("{ready} of {wanted} pods are ready"));
    let successors: Vec<_> = match &record.before {
        Some(_) => pods.iter().filter(|(uid, _)| record.successor.as_ref() == Some(*uid)).collect(),
        None if ready < wanted => return few(),
        None => pods.iter().filter(|(_, facts)| is_later(record, facts.created_at)).collect(),
    };
    if successors.iter().any(|(_, facts)| !facts.ready) || (successors.is_empty() && pods.len() < wanted) {
        return few();
    }
    if successors.is_empty() {
        return match &record.before {
            Some(before) if wanted < before.wanted => {
                let why = format!("scaled down to {wanted} meanwhile, so no pod took its place");
                Progress::Over(Outcome::Cancelled, why)
            }
            _ => Progress::NotYet(seen_at, "no pod took its place".to_owned()),
        };
    }
    let mut since = executed_at;
    if !record.subject.has_check() {
        return Progress::Healthy(since);
    }
    for (uid, _) in successors {
        match evaluated(observed.pod_check(uid, check)) {
            Progress::Healthy(at) => since = since.max(at),
            not => return not,
        }
    }
    Progress::Healthy(since)
}

/// How far the clocks of the operator and of the API server may be apart. Creation times come from the latter.
pub(super) const MAX_CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(30);
/// How long an action may still be judged after its deadline, if nobody has looked since.
pub(super) const OBSERVATION_GRACE: SignedDuration = SignedDuration::from_secs(30);
/// How long until it is seen whether a report has come.
const LISTEN: SignedDuration = SignedDuration::from_secs(1);
/// How long after its start an operator may see the cluster as it was.
pub(super) const WATCHES_CATCH_UP: SignedDuration = SignedDuration::from_secs(5);
/// How long until an action that was refused for now is asked for again.
pub(super) const WAITING_RETRY: SignedDuration = SignedDuration::from_secs(5);

/// When an action in flight has to be looked at again at the latest.
pub(super) fn deadline(record: &Record, settings: &Settings) -> Timestamp {
    let from = record.executed_at.unwrap_or(record.started_at);
    later(from, record.step.timeout_ms.max(settings.healthy_delay_ms))
}

/// The next place among the records of a subject, and the one before it. Whichever replica decides it, and whatever it
/// decides: what follows the same record has the same place, so that only one of them can be written.
pub(super) fn next_slot(policy: &str, subject: &Subject, history: &History, dry_run: bool) -> (String, Option<String>) {
    let all = history.all().chain(&history.aside);
    let own: Vec<_> =
        all.filter(|record| record.dry_run == dry_run && !record.by_hand && record.subject == *subject).collect();
    let followed: BTreeSet<_> = own.iter().filter_map(|record| record.after.as_deref()).collect();
    let last = own.iter().filter(|record| !followed.contains(record.slot.as_str()));
    let after = last.max_by_key(|record| (record.started_at, &record.slot)).map(|record| record.slot.clone());
    let pod = subject.pod.as_ref().map_or("", |pod| pod.uid.as_str());
    // Several policies may rehearse on one workload.
    let rehearsed_by = dry_run.then_some(policy);
    let parts = serde_json::json!([subject.target, pod, subject.check, rehearsed_by, after]);
    (canonical::content_hash(&parts)[..16].to_owned(), after)
}

/// Id of an intent in a place. A place may be taken once more, after a person deleted what was there; an id never comes again.
pub(super) fn intent_id(slot: &str, decided_at: Timestamp) -> String {
    canonical::content_hash(&serde_json::json!([slot, decided_at.as_millisecond()]))[..16].to_owned()
}

/// `at` and so many milliseconds. Times come out of objects that anybody may have edited, so this never overflows: the end
/// of time is late enough.
pub(crate) fn later(at: Timestamp, millis: u64) -> Timestamp {
    later_by(at, SignedDuration::from_millis(i64::try_from(millis).unwrap_or(i64::MAX)))
}

/// `at` and a span; see [`later`].
pub(super) fn later_by(at: Timestamp, span: SignedDuration) -> Timestamp {
    at.checked_add(span).unwrap_or(Timestamp::MAX)
}

fn seconds(millis: u64) -> String {
    let (whole, tenths) = (millis / 1000, millis % 1000 / 100);
    if tenths == 0 { whole.to_string() } else { format!("{whole}.{tenths}") }
}

fn seconds_between(from: Timestamp, to: Timestamp) -> String {
    seconds(u64::try_from(to.duration_since(from).as_millis()).unwrap_or(0))
}
