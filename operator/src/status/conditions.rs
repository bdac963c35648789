//! Conditions: putting them together so that an unchanged one stays exactly as it is.

use crate::kubernetes::meta::cut;
use crds::{Condition, ConditionStatus, ConditionType, Reason};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// One condition, before it is known when it last changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    type_: ConditionType,
    /// Its status.
    pub status: ConditionStatus,
    /// One CamelCase word.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Verdict {
    /// A condition of `type_`.
    pub fn new(
        type_: ConditionType,
        status: impl Into<ConditionStatus>,
        reason: Reason,
        message: impl Into<String>,
    ) -> Self {
        Self { type_, status: status.into(), reason, message: message.into() }
    }

    fn is_true(&self) -> bool {
        self.status == ConditionStatus::True
    }
}

/// Longest message that is kept.
const MAX_MESSAGE: usize = 4096;

/// The conditions of an object, given the ones it had.
pub fn settle(old: &[Condition], verdicts: Vec<Verdict>, generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    verdicts
        .into_iter()
        .map(|verdict| {
            let unchanged = old.iter().find(|old| *old.type_ == verdict.type_ && old.status == verdict.status);
            Condition {
                type_: verdict.type_.as_str().to_owned(),
                status: verdict.status,
                observed_generation: generation,
                last_transition_time: unchanged.map_or(Time(now), |old| old.last_transition_time.clone()),
                reason: verdict.reason.as_str().to_owned(),
                message: cut(&verdict.message, MAX_MESSAGE).to_owned(),
            }
        })
        .collect()
}

/// Ready, Reconciling and Stalled, as kstatus reads them, from Accepted, Programmed and whether a person is needed.
///
/// Only what was asked for counts here. An open circuit, degraded mode or an exhausted recovery is the system at work on
/// an incident, and must not make a GitOps wait fail.
pub fn summarize(accepted: &Verdict, programmed: &Verdict, stalled: bool, rests: bool) -> [Verdict; 3] {
    let done = accepted.is_true() && (programmed.is_true() || rests);
    let decisive = if accepted.is_true() { programmed } else { accepted };
    let (reason, message) = (decisive.reason, decisive.message.clone());
    let working = !done && !stalled;
    [
        Verdict::new(ConditionType::Ready, done, reason, message.clone()),
        Verdict::new(
            ConditionType::Reconciling,
            working,
            if working { reason } else { Reason::Settled },
            if working { message.clone() } else { String::new() },
        ),
        Verdict::new(
            ConditionType::Stalled,
            stalled,
            if stalled { reason } else { Reason::NotStalled },
            if stalled { message } else { String::new() },
        ),
    ]
}

/// Finds a condition.
pub fn find(conditions: &[Condition], type_: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|condition| *condition.type_ == type_)
}

/// The verdict that a resource cannot be used.
pub fn invalid(reason: Reason, message: impl Into<String>) -> (Verdict, Verdict) {
    let message = message.into();
    let kept = "The last valid configuration stays in effect.";
    (
        Verdict::new(ConditionType::Accepted, false, reason, format!("{message}. {kept}")),
        Verdict::new(ConditionType::Programmed, ConditionStatus::Unknown, reason, kept),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn the_transition_time_moves_with_the_status_only() {
        let first = settle(&[], vec![Verdict::new(ConditionType::Ready, false, Reason::Accepted, "a")], Some(1), at(1));
        let second =
            settle(&first, vec![Verdict::new(ConditionType::Ready, false, Reason::Publishing, "b")], Some(2), at(2));
        assert_eq!(second[0].last_transition_time, Time(at(1)));
        assert_eq!((second[0].reason.as_str(), second[0].observed_generation), ("Publishing", Some(2)));
        let third =
            settle(&second, vec![Verdict::new(ConditionType::Ready, true, Reason::Programmed, "c")], Some(2), at(3));
        assert_eq!(third[0].last_transition_time, Time(at(3)));
    }

    #[rstest::rstest]
    #[case::done(true, true, false, false, [true, false, false])]
    #[case::on_the_way(true, false, false, false, [false, true, false])]
    #[case::nothing_to_program(true, false, false, true, [true, false, false])]
    #[case::a_person_is_needed(true, false, true, false, [false, false, true])]
    #[case::refused(false, true, true, false, [false, false, true])]
    #[case::waits_for_its_target(false, false, false, false, [false, true, false])]
    fn kstatus(
        #[case] accepted: bool,
        #[case] programmed: bool,
        #[case] stalled: bool,
        #[case] rests: bool,
        #[case] expected: [bool; 3],
    ) {
        let verdicts = summarize(
            &Verdict::new(ConditionType::Accepted, accepted, Reason::Accepted, ""),
            &Verdict::new(ConditionType::Programmed, programmed, Reason::Programmed, ""),
            stalled,
            rests,
        );
        assert_eq!(verdicts.map(|verdict| verdict.is_true()), expected);
    }
}
