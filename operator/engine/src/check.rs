//! From single runs of a check to a evaluation that does not flap.

use crate::signals;
use contract::{CheckReport, CheckStatus};
use jiff::Timestamp;

/// Runs in a row that change the evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thresholds {
    /// Failed runs that make a check unhealthy.
    pub unhealthy: u32,
    /// Good runs that make it healthy again.
    pub healthy: u32,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { unhealthy: 3, healthy: 1 }
    }
}

/// The evaluation of one check of one pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Whether it counts as healthy.
    pub healthy: bool,
    /// Since when.
    pub since: Timestamp,
    /// Since when every run has passed; absent if the last one failed or was degraded, or none has passed yet. That it does not
    /// count as unhealthy says less: it may only not have failed often enough.
    pub well_since: Option<Timestamp>,
    /// When the first report came of the failed runs in a row that the last report ends; absent if the last run has passed.
    pub failing_since: Option<Timestamp>,
    /// When the last report came.
    pub seen_at: Timestamp,
    /// What the last failed run said.
    pub message: String,
    /// The dependency behind the check, if the pod names one.
    pub dependency: Option<String>,
    /// Whether a fresh connection to that dependency answered when the check last failed, if that was tried.
    pub dependency_answers: Option<bool>,
    /// It was unhealthy in the first report that this process saw: the failure is older than `since`.
    pub began_before: bool,
    good_runs: u32,
    last_run: u64,
}

impl Evaluation {
    /// What a signal of Kubernetes says, which tells no single runs.
    pub fn of_signal(verdict: &signals::Verdict, now: Timestamp) -> Self {
        Self {
            healthy: verdict.healthy,
            since: verdict.since,
            well_since: verdict.well.then_some(verdict.since),
            failing_since: (!verdict.well).then_some(verdict.since),
            seen_at: now,
            message: verdict.message.clone(),
            dependency: None,
            dependency_answers: None,
            // Its times are Kubernetes' own: they are the same for whichever process looks.
            began_before: false,
            good_runs: 0,
            last_run: 0,
        }
    }
}

/// Folds one more report into the evaluation. Degraded and unknown results are neither good nor bad: they leave the
/// evaluation as it is. A report of a run that was seen already changes nothing.
pub fn evaluate(
    before: Option<&Evaluation>,
    report: &CheckReport,
    thresholds: Thresholds,
    now: Timestamp,
) -> Evaluation {
    let mut after = before.cloned().unwrap_or(Evaluation {
        healthy: true,
        since: now,
        well_since: None,
        failing_since: None,
        seen_at: now,
        message: String::new(),
        dependency: None,
        dependency_answers: None,
        began_before: false,
        good_runs: 0,
        last_run: 0,
    });
    after.seen_at = now;
    after.dependency.clone_from(&report.dependency);
    // A process that started again counts its runs from the beginning.
    let restarted = report.runs < after.last_run;
    let new_runs = if restarted { report.runs } else { report.runs - after.last_run };
    after.last_run = report.runs;
    match report.status {
        CheckStatus::Unhealthy => {
            after.good_runs = 0;
            after.failing_since.get_or_insert(now);
            after.message.clone_from(&report.message);
            after.dependency_answers = report.dependency_answers;
            if after.healthy && report.consecutive_failures >= thresholds.unhealthy.max(1) {
                after.healthy = false;
                after.since = now;
                after.began_before = before.is_none();
            }
            after.well_since = None;
        }
        CheckStatus::Healthy => {
            after.failing_since = None;
            after.good_runs = after.good_runs.saturating_add(u32::try_from(new_runs).unwrap_or(u32::MAX));
            if !after.healthy && after.good_runs >= thresholds.healthy.max(1) {
                after.healthy = true;
                after.since = now;
                after.began_before = false;
                after.message.clear();
                after.dependency_answers = None;
            }
            if after.healthy {
                after.well_since.get_or_insert(now);
                after.dependency_answers = None;
            }
        }
        CheckStatus::Degraded => after.well_since = None,
        CheckStatus::Unknown => {}
    }
    after
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn report(status: CheckStatus, failures: u32, runs: u64) -> CheckReport {
        CheckReport {
            status,
            message: "m".into(),
            tags: vec![],
            dependency: None,
            dependency_answers: None,
            duration_ms: 1,
            consecutive_failures: failures,
            runs,
            data: BTreeMap::new(),
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn run(reports: &[(CheckStatus, u32, u64)], thresholds: Thresholds) -> Evaluation {
        let mut evaluation = None;
        for (second, (status, failures, runs)) in (1i64..).zip(reports) {
            evaluation =
                Some(evaluate(evaluation.as_ref(), &report(*status, *failures, *runs), thresholds, at(second)));
        }
        evaluation.unwrap()
    }

    use CheckStatus::{Degraded as D, Healthy as H, Unhealthy as U};

    #[rstest::rstest]
    #[case::passes(&[(H, 0, 1), (H, 0, 2)], Some(1))]
    #[case::has_not_failed_often_enough(&[(U, 1, 1), (U, 2, 2)], None)]
    #[case::passes_after_that(&[(U, 1, 1), (H, 0, 2), (H, 0, 3)], Some(2))]
    #[case::one_failure_in_between(&[(H, 0, 1), (U, 1, 2), (H, 0, 3)], Some(3))]
    #[case::fails(&[(H, 0, 1), (U, 3, 4)], None)]
    #[case::not_often_enough_again(&[(U, 3, 3), (H, 0, 4)], None)]
    #[case::passes_again(&[(U, 3, 3), (H, 0, 4), (H, 0, 5)], Some(3))]
    #[case::degraded(&[(H, 0, 1), (D, 0, 2)], None)]
    #[case::degraded_from_the_start(&[(D, 0, 1), (D, 0, 2)], None)]
    #[case::not_degraded_any_more(&[(D, 0, 1), (H, 0, 2)], Some(2))]
    #[case::unknown(&[(CheckStatus::Unknown, 0, 0)], None)]
    fn a_check_is_well_once_it_has_passed(#[case] reports: &[(CheckStatus, u32, u64)], #[case] since: Option<i64>) {
        let evaluation = run(reports, Thresholds { unhealthy: 3, healthy: 2 });
        assert_eq!(evaluation.well_since, since.map(at));
    }

    #[rstest::rstest]
    #[case::below_threshold(&[(H, 0, 1), (U, 1, 2), (U, 2, 3)], true, 1)]
    #[case::at_threshold(&[(H, 0, 1), (U, 1, 2), (U, 2, 3), (U, 3, 4)], false, 4)]
    #[case::reports_were_missed(&[(H, 0, 1), (U, 7, 8)], false, 2)]
    #[case::one_good_run_is_not_enough(&[(U, 3, 3), (H, 0, 4)], false, 1)]
    #[case::seeing_it_twice_is_still_one_run(&[(U, 3, 3), (H, 0, 4), (H, 0, 4)], false, 1)]
    #[case::two_good_runs(&[(U, 3, 3), (H, 0, 4), (H, 0, 5)], true, 3)]
    #[case::a_failure_between_starts_over(&[(U, 3, 3), (H, 0, 4), (U, 1, 5), (H, 0, 6)], false, 1)]
    #[case::degraded_changes_nothing(&[(U, 3, 3), (D, 0, 4), (D, 0, 5)], false, 1)]
    #[case::process_restarted(&[(U, 3, 30), (H, 0, 1), (H, 0, 2)], true, 3)]
    fn thresholds(#[case] reports: &[(CheckStatus, u32, u64)], #[case] healthy: bool, #[case] since: i64) {
        let evaluation = run(reports, Thresholds { unhealthy: 3, healthy: 2 });
        assert_eq!((evaluation.healthy, evaluation.since), (healthy, at(since)));
    }
}
