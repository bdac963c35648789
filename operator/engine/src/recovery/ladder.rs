//! The ladder: which rung comes next, and what came of the last one.

use super::model::{Action, CheckState, History, JobState, Observed, Outcome, Record, Settings, Step, Subject};
use contract::canonical;
use jiff::{SignedDuration, Timestamp};

/// The rung that comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// This one.
    Step {
        /// Its place, from 0.
        index: usize,
        /// It follows a rung that did not help.
        escalates: bool,
    },
    /// None is left.
    Exhausted,
}

/// The rung after the last one that was tried since the check began to fail. A pod that took the place of one whose
/// restart did not help goes on where that one was: another restart would help no more.
pub(super) fn next(steps: &[Step], check: &CheckState, observed: &Observed, history: &History, dry_run: bool) -> Next {
    let created_at =
        check.subject.pod.as_ref().and_then(|pod| observed.pods.get(&pod.uid)).map(|facts| facts.created_at);
    let inherited = |record: &Record| {
        record.step.action == Action::RestartPod
            && record.outcome == Outcome::Failed
            && (&record.subject.target, &record.subject.check) == (&check.subject.target, &check.subject.check)
            && record.subject.pod != check.subject.pod
            && record.acted_at.zip(created_at).is_some_and(|(acted, created)| created >= whole_second(acted))
            && record.finished_at.is_some_and(|finished| check.since <= finished)
    };
    let own = |record: &Record| record.subject == check.subject && record.failed_at == check.since;
    let tried = history
        .of_kind(dry_run)
        .filter(|record| own(record) || inherited(record))
        .map(|record| record.index + 1)
        .max()
        .unwrap_or(0);
    if tried < steps.len() { Next::Step { index: tried, escalates: tried > 0 } } else { Next::Exhausted }
}

/// Takes note of what shows that an action was carried out, though nobody could write it down.
pub(super) fn catch_up(record: &mut Record, observed: &Observed) {
    if !matches!(record.outcome, Outcome::Pending | Outcome::Waiting) || record.dry_run {
        return;
    }
    let target_there = observed.wanted.contains_key(&record.subject.target);
    let evidence = match record.step.action {
        Action::RestartPod => {
            let gone = record.subject.pod.as_ref().is_some_and(|pod| !observed.pods.contains_key(&pod.uid));
            (gone && target_there).then_some((record.started_at, "the pod is gone"))
        }
        Action::RunCleanupJob => observed.jobs.get(&record.id).map(|job| (job.created_at, "its Job is there")),
        _ => None,
    };
    if let Some((at, message)) = evidence {
        record.outcome = Outcome::Verifying;
        record.acted_at = Some(at.max(record.started_at));
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
pub(super) fn outcome(record: &Record, settings: &Settings, observed: &Observed, now: Timestamp) -> Verdict {
    let restart = record.step.action == Action::RestartPod;
    if let Some(pod) = &record.subject.pod {
        match observed.pods.get(&pod.uid) {
            None if !restart => return Verdict::Over(Outcome::Cancelled, "the pod is gone".to_owned()),
            None if !observed.wanted.contains_key(&record.subject.target) => {
                return Verdict::Over(Outcome::Cancelled, "the workload is gone".to_owned());
            }
            Some(facts) if record.acted_at.is_none() && other_process(record, facts.instance.as_ref()) => {
                let why = "its process was started again before this was known to be carried out";
                return Verdict::Over(Outcome::Cancelled, why.to_owned());
            }
            _ => {}
        }
    }
    if !settings.ladders.contains_key(&record.subject.check) {
        return Verdict::Over(Outcome::Cancelled, "the policy no longer heals this check".to_owned());
    }
    let state = observed.checks.iter().find(|check| check.subject == record.subject);
    if record.outcome == Outcome::Waiting {
        return match state {
            Some(check) if check.healthy => {
                Verdict::Over(Outcome::Cancelled, "healthy again before it could be carried out".to_owned())
            }
            _ => Verdict::Wait(Some(now + WAITING_RETRY)),
        };
    }
    let deadline = record.acted_at.unwrap_or(record.started_at) + millis(record.step.timeout_ms);
    let Some(acted_at) = record.acted_at else {
        if now >= deadline {
            let why = record.message.as_deref().unwrap_or("no answer");
            return Verdict::Over(Outcome::Failed, format!("it could not be carried out in time: {why}"));
        }
        return Verdict::Wait(Some(deadline));
    };
    let progress = match record.step.action {
        Action::RestartPod => restarted(record, acted_at, observed),
        Action::RunCleanupJob => cleaned_up(record, state, observed),
        _ => judged(state),
    };
    match progress {
        Progress::Healthy(since) => {
            let proven_at = since.max(acted_at) + millis(settings.healthy_delay_ms);
            if now < proven_at {
                return Verdict::Wait(Some(proven_at));
            }
            let took = seconds_between(record.failed_at, since.max(record.failed_at));
            let stood = seconds(settings.healthy_delay_ms);
            let message = format!("healthy again {took} s after it failed, and for {stood} s since");
            Verdict::Over(Outcome::Succeeded, message)
        }
        Progress::Over(outcome, why) => Verdict::Over(outcome, why),
        Progress::NotYet(what) if now >= deadline => {
            let message = format!("it did not help within {} s; {what}", seconds(record.step.timeout_ms));
            Verdict::Over(Outcome::Failed, message)
        }
        Progress::NotYet(_) => Verdict::Wait(Some(deadline)),
    }
}

/// How an action that was carried out is getting on.
enum Progress {
    /// The check is healthy, since then.
    Healthy(Timestamp),
    /// Nothing more is to be expected.
    Over(Outcome, String),
    /// Not yet; what is missing.
    NotYet(String),
}

fn other_process(record: &Record, now: Option<&String>) -> bool {
    record.instance.as_ref().zip(now).is_some_and(|(meant, now)| meant != now)
}

fn judged(state: Option<&CheckState>) -> Progress {
    match state {
        Some(check) if check.healthy => Progress::Healthy(check.since),
        Some(check) => Progress::NotYet(format!("the check still fails: {}", check.message)),
        None => Progress::NotYet("the check is not reported".to_owned()),
    }
}

fn cleaned_up(record: &Record, state: Option<&CheckState>, observed: &Observed) -> Progress {
    match observed.jobs.get(&record.id).map(|job| &job.state) {
        Some(JobState::Failed(why)) => Progress::Over(Outcome::Failed, format!("the Job failed: {why}")),
        Some(JobState::Running) => Progress::NotYet("the Job is not over".to_owned()),
        // A Job that somebody deleted tells nothing; the check does.
        Some(JobState::Complete) | None => judged(state),
    }
}

/// The pod's successors must be there, ready, and healthy by the same check.
fn restarted(record: &Record, acted_at: Timestamp, observed: &Observed) -> Progress {
    let (target, check) = (&record.subject.target, &record.subject.check);
    if record.subject.pod.as_ref().is_some_and(|pod| observed.pods.contains_key(&pod.uid)) {
        return Progress::NotYet("the pod is still there".to_owned());
    }
    let pods: Vec<_> = observed.pods.iter().filter(|(_, facts)| facts.target == *target).collect();
    let (ready, wanted) = (
        pods.iter().filter(|(_, facts)| facts.ready).count(),
        observed.wanted.get(target).copied().unwrap_or_default(),
    );
    if ready < wanted {
        return Progress::NotYet(format!("{ready} of {wanted} pods are ready"));
    }
    let successors: Vec<_> =
        pods.iter().filter(|(_, facts)| facts.created_at >= whole_second(acted_at)).map(|(uid, _)| *uid).collect();
    if successors.is_empty() {
        return Progress::Over(Outcome::Cancelled, "the pod is gone, and none took its place".to_owned());
    }
    let state_of = |uid: &String| {
        observed.checks.iter().find(|state| {
            state.subject.check == *check && state.subject.pod.as_ref().is_some_and(|pod| pod.uid == *uid)
        })
    };
    let mut since = acted_at;
    for uid in successors {
        match judged(state_of(uid)) {
            Progress::Healthy(at) => since = since.max(at),
            not => return not,
        }
    }
    Progress::Healthy(since)
}

/// Creation times have whole seconds.
fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// How long until an action that was refused for now is asked for again.
pub(super) const WAITING_RETRY: SignedDuration = SignedDuration::from_secs(5);

/// When an action in flight has to be looked at again at the latest.
pub(super) fn deadline(record: &Record, settings: &Settings) -> Timestamp {
    let from = record.acted_at.unwrap_or(record.started_at);
    from + millis(record.step.timeout_ms.max(settings.healthy_delay_ms))
}

/// Id of an intent: the same failure at the same rung gives the same id, whoever decides it.
pub(super) fn intent_id(
    policy_uid: &str,
    subject: &Subject,
    failed_at: Timestamp,
    index: usize,
    dry_run: bool,
) -> String {
    let pod = subject.pod.as_ref().map_or("", |pod| pod.uid.as_str());
    let parts =
        serde_json::json!([policy_uid, subject.target, pod, subject.check, failed_at.as_millisecond(), index, dry_run]);
    canonical::content_hash(&parts)[..16].to_owned()
}

/// A span of `millis`, cut to what a span can hold.
pub(super) fn millis(millis: u64) -> SignedDuration {
    SignedDuration::from_millis(i64::try_from(millis).unwrap_or(i64::MAX / 4).min(i64::MAX / 4))
}

fn seconds(millis: u64) -> String {
    let (whole, tenths) = (millis / 1000, millis % 1000 / 100);
    if tenths == 0 { whole.to_string() } else { format!("{whole}.{tenths}") }
}

fn seconds_between(from: Timestamp, to: Timestamp) -> String {
    seconds(u64::try_from(to.duration_since(from).as_millis()).unwrap_or(0))
}
