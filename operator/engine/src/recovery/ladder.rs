//! The ladder: which rung comes next, and what came of the last one.

use super::model::{CheckState, History, Observed, Outcome, Record, Settings, Step, Subject};
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

/// The rung after the last one that was tried since the check began to fail.
pub(super) fn next(steps: &[Step], check: &CheckState, history: &History, dry_run: bool) -> Next {
    let tried = history
        .of_kind(dry_run)
        .filter(|record| record.subject == check.subject && record.failed_at == check.since)
        .map(|record| record.index + 1)
        .max()
        .unwrap_or(0);
    if tried < steps.len() { Next::Step { index: tried, escalates: tried > 0 } } else { Next::Exhausted }
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
    if let Some(pod) = &record.subject.pod
        && !observed.pods.contains(&pod.uid)
    {
        return Verdict::Over(Outcome::Cancelled, "the pod is gone".to_owned());
    }
    if !settings.ladders.contains_key(&record.subject.check) {
        return Verdict::Over(Outcome::Cancelled, "the policy no longer heals this check".to_owned());
    }
    let deadline = record.acted_at.unwrap_or(record.started_at) + millis(record.step.timeout_ms);
    let Some(acted_at) = record.acted_at else {
        if now >= deadline {
            let why = record.message.as_deref().unwrap_or("no answer");
            return Verdict::Over(Outcome::Failed, format!("it could not be carried out in time: {why}"));
        }
        return Verdict::Wait(Some(deadline));
    };
    let state = observed.checks.iter().find(|check| check.subject == record.subject);
    match state {
        Some(check) if check.healthy => {
            let proven_at = check.since.max(acted_at) + millis(settings.healthy_delay_ms);
            if now >= proven_at {
                let took = seconds_between(record.failed_at, check.since.max(record.failed_at));
                let stood = seconds(settings.healthy_delay_ms);
                Verdict::Over(
                    Outcome::Succeeded,
                    format!("healthy again {took} s after it failed, and for {stood} s since"),
                )
            } else {
                Verdict::Wait(Some(proven_at))
            }
        }
        _ if now >= deadline => {
            let what = match state {
                Some(check) => format!("the check still fails: {}", check.message),
                None => "the check is not reported".to_owned(),
            };
            Verdict::Over(
                Outcome::Failed,
                format!("it did not help within {} s; {what}", seconds(record.step.timeout_ms)),
            )
        }
        _ => Verdict::Wait(Some(deadline)),
    }
}

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
