//! How long the ledger remembers.

use super::{
    ladder::{later, later_by},
    model::{History, Record},
};
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// What decides for how long records of one workload are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The longest time over which a policy of the workload counts actions, in milliseconds: its budget's interval, its cooldown.
    pub counted_for_ms: u64,
    /// The pods that exist, by uid.
    pub pods: BTreeSet<String>,
    /// Most finished records.
    pub most: usize,
}

/// For how long whatever is over is kept, so that people can read of it.
const KEPT_FOR: SignedDuration = SignedDuration::from_hours(24);

/// What a record is still needed for, the more the later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    /// It was only rehearsed.
    Rehearsed,
    /// Only for people.
    Read,
    /// The next record of its subject follows it, so that none is begun twice.
    Followed,
    /// A ladder goes on after it.
    Ladder,
    /// Budget or cooldown count it.
    Counts,
}

/// Ids of what may be forgotten: what is over, older than a day and needed for nothing; and of more than [`Retention::most`],
/// what is needed least, the oldest first. What is in flight is never among them.
pub fn forgettable(history: &History, retention: &Retention, now: Timestamp) -> Vec<String> {
    let lasts = last_of_each_subject(history);
    let need = |record: &Record| need(record, retention, &lasts, now);
    let mut kept: Vec<_> = Vec::new();
    let mut forgotten: Vec<_> = Vec::new();
    for record in &history.recent {
        let over_at = record.finished_at.unwrap_or(record.started_at);
        let is_old = now >= later_by(over_at, KEPT_FOR);
        let need = need(record);
        if is_old && need <= Need::Read {
            forgotten.push(record.id.clone());
        } else {
            kept.push((need, over_at, &record.id));
        }
    }
    kept.sort_unstable();
    let too_many = kept.len().saturating_sub(retention.most);
    forgotten.extend(kept.into_iter().take(too_many).map(|(_, _, id)| id.clone()));
    forgotten
}

fn need(record: &Record, retention: &Retention, lasts: &BTreeSet<&str>, now: Timestamp) -> Need {
    let begin = record.executed_at.unwrap_or(record.started_at).max(record.finished_at.unwrap_or(Timestamp::MIN));
    // What nothing is computed from, because its times cannot be, counts for nothing.
    let did_something = !record.by_hand || record.executed_at.is_some();
    if did_something && record.is_possible(now) && now < later(begin, retention.counted_for_ms) && !record.dry_run {
        return Need::Counts;
    }
    let is_there = record.subject.pod.as_ref().is_none_or(|pod| retention.pods.contains(&pod.uid));
    match record {
        _ if record.dry_run => Need::Rehearsed,
        _ if record.goes_on() && (is_there || record.step.action.disrupts()) => Need::Ladder,
        _ if is_there && lasts.contains(record.id.as_str()) => Need::Followed,
        _ => Need::Read,
    }
}

/// The records that none of their subject follows.
fn last_of_each_subject(history: &History) -> BTreeSet<&str> {
    let own = || history.all().filter(|record| !record.by_hand && !record.dry_run);
    let followed: BTreeSet<_> = own().filter_map(|record| record.after.as_deref()).collect();
    let mut lasts = BTreeMap::new();
    for record in own().filter(|record| !followed.contains(record.slot.as_str())) {
        let last = lasts.entry(&record.subject).or_insert(record);
        if (record.started_at, &record.id) > (last.started_at, &last.id) {
            *last = record;
        }
    }
    lasts.into_values().map(|record| record.id.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Action, Outcome, tests::*};
    use super::*;
    use rstest::rstest;

    const DAY: i64 = 24 * 3_600;

    fn retention(most: usize) -> Retention {
        Retention { counted_for_ms: 600_000, pods: [POD.to_owned()].into(), most }
    }

    fn kept(history: &History, most: usize, now: i64) -> Vec<String> {
        let gone = forgettable(history, &retention(most), at(now));
        history.recent.iter().map(|record| record.id.clone()).filter(|id| !gone.contains(id)).collect()
    }

    fn changed(change: fn(&mut Record)) -> Record {
        let mut record = record("gone", 0, Outcome::Succeeded);
        change(&mut record);
        record
    }

    #[rstest]
    #[case::for_people(|_: &mut Record| {}, false)]
    #[case::what_its_pod_did_last(|record: &mut Record| record.subject = subject(POD), true)]
    #[case::a_ladder_of_a_pod_that_is_there(
        |record: &mut Record| (record.subject, record.outcome, record.after) = (subject(POD), Outcome::Failed, None), true)]
    #[case::a_ladder_of_a_pod_that_is_gone(|record: &mut Record| record.outcome = Outcome::Failed, false)]
    #[case::a_restart_that_did_not_help(
        |record: &mut Record| (record.outcome, record.step.action) = (Outcome::Failed, Action::RestartPod), true)]
    #[case::a_restart_that_healed(
        |record: &mut Record| (record.outcome, record.step.action, record.healed_at) =
            (Outcome::Failed, Action::RestartPod, Some(at(9))), false)]
    #[case::a_rehearsal(|record: &mut Record| (record.subject, record.dry_run) = (subject(POD), true), false)]
    #[case::one_asked_for_by_a_person(|record: &mut Record| (record.subject, record.by_hand) = (subject(POD), true), false)]
    #[case::one_from_the_future(|record: &mut Record| record.finished_at = Some(Timestamp::MAX), true)]
    fn a_record_is_kept_for_a_day_and_as_long_as_it_is_needed(#[case] change: fn(&mut Record), #[case] needed: bool) {
        let history: History = [changed(change)].into_iter().collect();
        assert_eq!(kept(&history, 200, DAY).len(), 1, "a day is not over");
        assert_eq!(kept(&history, 200, 2 * DAY).len(), usize::from(needed));
    }

    #[test]
    fn only_the_last_of_a_subject_is_followed() {
        let mut second = record(POD, 50, Outcome::Succeeded);
        second.after = Some(record(POD, 0, Outcome::Succeeded).slot);
        let history: History = [record(POD, 0, Outcome::Succeeded), second].into_iter().collect();
        assert_eq!(kept(&history, 200, 2 * DAY), [format!("{POD}-50")]);
    }

    #[test]
    fn of_too_many_those_go_that_are_needed_least() {
        let rehearsed = Record { dry_run: true, id: "rehearsed".into(), ..record(POD, 900, Outcome::Failed) };
        let others = [
            record("gone", 10, Outcome::Succeeded),
            record("gone", 100, Outcome::Succeeded),
            record(POD, 5, Outcome::Failed),
            record("gone", 800, Outcome::Succeeded),
        ];
        let in_flight = record(POD, 1, Outcome::Verifying);
        let history: History = others.into_iter().chain([rehearsed, in_flight]).collect();
        let ids = |most| kept(&history, most, 1_000);
        assert_eq!(ids(5).len(), 5);
        assert!(!ids(4).contains(&"rehearsed".to_owned()));
        assert!(!ids(3).contains(&"gone-10".to_owned()), "the oldest for people");
        assert_eq!(ids(2), ["gone-800".to_owned(), format!("{POD}-5")], "the ladder, and what the budget counts");
        assert_eq!(ids(1), ["gone-800"]);
    }
}
