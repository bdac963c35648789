//! Recovery's history, between the words of the status and those of the decision.

use crate::{
    kubernetes::meta::cut,
    spec::recovery::{action, step_action},
};
use crds::{
    ResiliencePolicySpec,
    status::{ActionOutcome, ActionRecord, RecoveryStatus, WorkloadBefore},
};
use engine::recovery::{Before, History, Outcome, Pod, Record, Step, Subject};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};

/// Time of a step that the policy does not have any more.
const FORGOTTEN_TIMEOUT_MS: u64 = 60_000;

/// Reads the history out of a status.
pub fn read(status: Option<&RecoveryStatus>, spec: &ResiliencePolicySpec) -> History {
    let record = |record: &ActionRecord| self::record(record, spec);
    status.map_or_else(History::default, |status| History {
        in_flight: status.in_flight.iter().map(record).collect(),
        recent: status.recent.iter().map(record).collect(),
    })
}

fn record(from: &ActionRecord, spec: &ResiliencePolicySpec) -> Record {
    let place = |value: i32| usize::try_from(value.saturating_sub(1)).unwrap_or(0);
    let index = place(from.step);
    let ladders = spec.recovery.iter().flat_map(|recovery| &recovery.ladders);
    // Only while it is still the same step: an edit may have put another one in its place.
    let step = ladders
        .filter(|ladder| ladder.check == from.check)
        .find_map(|ladder| ladder.steps.get(index))
        .filter(|step| step.action == from.action);
    Record {
        id: from.id.clone(),
        subject: Subject {
            target: from.target.clone(),
            pod: from.pod.clone().zip(from.pod_uid.clone()).map(|(name, uid)| Pod { name, uid }),
            check: from.check.clone(),
        },
        instance: from.pod_instance.clone(),
        step: Step {
            action: action(from.action),
            cron_job: step.and_then(|step| step.cron_job_ref.as_ref()).map(|reference| reference.name.clone()),
            timeout_ms: step.map_or(FORGOTTEN_TIMEOUT_MS, |step| step.timeout.millis()),
        },
        index,
        steps: place(from.steps) + 1,
        failed_at: from.failed_at.0,
        started_at: from.started_at.0,
        executed_at: from.acted_at.as_ref().map(|at| at.0),
        finished_at: from.finished_at.as_ref().map(|at| at.0),
        outcome: match from.outcome {
            ActionOutcome::Pending => Outcome::Pending,
            ActionOutcome::Waiting => Outcome::Waiting,
            ActionOutcome::Verifying => Outcome::Verifying,
            ActionOutcome::Succeeded => Outcome::Succeeded,
            ActionOutcome::Failed => Outcome::Failed,
            ActionOutcome::Cancelled => Outcome::Cancelled,
        },
        healed_at: from.healed_at.as_ref().map(|at| at.0),
        before: from.before.as_ref().map(|before| Before {
            wanted: usize::try_from(before.wanted).unwrap_or_default(),
            youngest_at: before.youngest_at.0,
            youngest: before.youngest.iter().cloned().collect(),
        }),
        successor: from.successor.clone(),
        dry_run: from.dry_run,
        message: from.message.clone(),
    }
}

/// Writes a record as the status shows it.
pub fn write(from: &Record) -> ActionRecord {
    let place = |index: usize| i32::try_from(index).unwrap_or(i32::MAX);
    let time = |at: Timestamp| MicroTime(at);
    ActionRecord {
        id: from.id.clone(),
        target: from.subject.target.clone(),
        pod: from.subject.pod.as_ref().map(|pod| pod.name.clone()),
        pod_uid: from.subject.pod.as_ref().map(|pod| pod.uid.clone()),
        pod_instance: from.instance.clone(),
        check: from.subject.check.clone(),
        action: step_action(from.step.action),
        step: place(from.index + 1),
        steps: place(from.steps),
        failed_at: time(from.failed_at),
        started_at: time(from.started_at),
        acted_at: from.executed_at.map(time),
        finished_at: from.finished_at.map(time),
        outcome: match from.outcome {
            Outcome::Pending => ActionOutcome::Pending,
            Outcome::Waiting => ActionOutcome::Waiting,
            Outcome::Verifying => ActionOutcome::Verifying,
            Outcome::Succeeded => ActionOutcome::Succeeded,
            Outcome::Failed => ActionOutcome::Failed,
            Outcome::Cancelled => ActionOutcome::Cancelled,
        },
        healed_at: from.healed_at.map(time),
        before: from.before.as_ref().map(|before| WorkloadBefore {
            wanted: place(before.wanted),
            youngest_at: Time(before.youngest_at),
            youngest: before.youngest.iter().cloned().collect(),
        }),
        successor: from.successor.clone(),
        dry_run: from.dry_run,
        message: from.message.as_ref().map(|message| cut(message, 1000).to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_status() {
        let spec: ResiliencePolicySpec = serde_saphyr::from_str(
            "{targetRefs: [{name: w}], healthChecks: [{name: database}], recovery: {ladders: [{check: database, steps: [{action: ResetConnections, timeout: 15s}]}]}}",
        )
        .unwrap();
        let at = |ms| Timestamp::from_millisecond(ms).unwrap();
        let record = Record {
            id: "7f3a".into(),
            subject: Subject {
                target: "w".into(),
                pod: Some(Pod { name: "p".into(), uid: "u".into() }),
                check: "database".into(),
            },
            instance: Some("i".into()),
            step: Step { action: engine::recovery::Action::ResetConnections, cron_job: None, timeout_ms: 15_000 },
            index: 0,
            steps: 1,
            failed_at: at(1_234),
            started_at: at(2_345),
            executed_at: Some(at(3_456)),
            finished_at: None,
            outcome: Outcome::Verifying,
            healed_at: Some(at(4_567)),
            before: Some(Before { wanted: 3, youngest_at: at(1_000), youngest: ["u".to_owned()].into() }),
            successor: Some("s".into()),
            dry_run: false,
            message: Some("m".into()),
        };
        let status = RecoveryStatus { in_flight: vec![write(&record)], ..RecoveryStatus::default() };
        // Through the text that the API server keeps: times must not lose their milliseconds on the way.
        let status: RecoveryStatus = serde_json::from_str(&serde_json::to_string(&status).unwrap()).unwrap();
        assert_eq!(read(Some(&status), &spec).in_flight, [record]);
    }
}
