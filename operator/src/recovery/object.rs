//! A Recovery, between the words of its object and those of the decision.

use crate::{
    fleet::index::{ObjectKey, target_id},
    kubernetes::meta::{FIELD_MANAGER, created_at, cut, owner_reference},
    spec::recovery::{action, step_action},
    status::target::{target_key, workload_of},
};
use contract::{WorkloadId, canonical};
use crds::{
    Recovery,
    recovery::{Phase, RecoveryStatus, WorkloadBefore},
};
use engine::recovery::{Before, Outcome, Pod, Record, Step, Subject};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

/// Longest message that is written, in bytes.
const MAX_MESSAGE: usize = 1000;
/// Annotation of a Recovery that was made from what another version had written down.
pub const MIGRATED_ANNOTATION: &str = "resilience.ticketwave.io/migrated-from";

/// What the status of a Recovery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Nobody has written one yet.
    Nothing,
    /// Nobody has written one yet, and without it the object means nothing: another version did this.
    NothingOfMigrated,
    /// One that this version understands.
    Status,
    /// One whose phase this version does not know: it is kept as it is.
    ByNewerVersion,
}

/// What the operator knows of one Recovery.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Name, namespace, uid and version.
    pub meta: ObjectMeta,
    /// The workload.
    pub workload: WorkloadId,
    /// The policy by which it was decided; none if a person asked for it.
    pub policy: Option<String>,
    /// In the words of the decision.
    pub record: Record,
    /// It names a pod, and nobody has said yet which pod of that name.
    pub unresolved: bool,
    /// The uid that a person asked for, besides the name.
    pub wanted_uid: Option<String>,
    /// It is being deleted, and something keeps it from being gone.
    pub is_being_deleted: bool,
    /// What its status is.
    pub told: Told,
    /// What its spec says of the workload before a restart; the status says it only where that has changed since.
    spec_before: Option<Before>,
}

impl Entry {
    /// Reads an object.
    pub fn of(recovery: &Recovery) -> Self {
        let spec = &recovery.spec;
        let status = recovery.status.clone().unwrap_or_default();
        let namespace = recovery.namespace().unwrap_or_default();
        let workload = target_id(&namespace, &spec.target_ref);
        let by_hand = spec.policy_ref.is_none();
        // What a person wrote is looked up first: it may name a pod of another workload.
        let uid = |pod: &crds::recovery::PodRef| {
            if by_hand { status.pod_uid.clone() } else { pod.uid.clone() }
        };
        let pod = spec.pod.as_ref();
        let spec_before = spec.before.as_ref().map(read_before);
        let own_id = || canonical::content_hash(&json!(recovery.uid()))[..16].to_owned();
        let id = spec.intent.clone().unwrap_or_else(own_id);
        let name = recovery.name_any();
        let slot = name.rsplit('-').next().filter(|slot| !by_hand && is_slot(slot)).unwrap_or(&id).to_owned();
        let (step, steps) = spec.step.split_once('/').unwrap_or(("1", "1"));
        let number = |text: &str| text.parse::<usize>().ok().filter(|number| *number > 0).unwrap_or(1);
        let started_at = spec.decided_at.as_ref().map_or_else(|| created_at(recovery), |at| at.0);
        let finished_at = status.finished_at.as_ref().map(|at| at.0);
        let record = Record {
            id,
            slot,
            after: spec.after.clone(),
            by_hand,
            withdrawn: false,
            subject: Subject {
                target: target_key(&workload),
                pod: pod.map(|pod| Pod { name: pod.name.clone(), uid: uid(pod).unwrap_or_default() }),
                check: spec.check.clone().unwrap_or_default(),
            },
            instance: pod.and_then(|pod| pod.instance.clone()),
            step: Step {
                action: action(spec.action),
                cron_job: spec.cron_job_ref.as_ref().map(|reference| reference.name.clone()),
                timeout_ms: spec.timeout.millis(),
            },
            index: number(step) - 1,
            steps: number(steps).max(number(step)),
            failed_at: spec.failed_at.as_ref().map_or(started_at, |at| at.0),
            started_at,
            executed_at: status.executed_at.as_ref().map(|at| at.0),
            finished_at,
            outcome: outcome(&status, spec.dry_run),
            healed_at: status.healed_at.as_ref().map(|at| at.0),
            before: status.before.as_ref().map(read_before).or_else(|| spec_before.clone()),
            successor: status.successor.clone(),
            dry_run: spec.dry_run,
            message: status.message.clone(),
        };
        Self {
            meta: ObjectMeta {
                name: recovery.meta().name.clone(),
                namespace: Some(namespace),
                uid: recovery.uid(),
                resource_version: recovery.resource_version(),
                ..ObjectMeta::default()
            },
            workload,
            policy: spec.policy_ref.as_ref().map(|policy| policy.name.clone()),
            unresolved: pod.is_some_and(|pod| uid(pod).is_none()),
            wanted_uid: pod.and_then(|pod| pod.uid.clone()).filter(|_| by_hand),
            is_being_deleted: recovery.metadata.deletion_timestamp.is_some(),
            told: match &recovery.status {
                Some(status) if !is_known(status) => Told::ByNewerVersion,
                Some(status) if *status != untouched() => Told::Status,
                _ if recovery.annotations().contains_key(MIGRATED_ANNOTATION) => Told::NothingOfMigrated,
                _ => Told::Nothing,
            },
            record,
            spec_before,
        }
    }

    /// Its namespace and name.
    pub fn key(&self) -> ObjectKey {
        ObjectKey { namespace: self.workload.namespace.clone(), name: self.meta.name.clone().unwrap_or_default() }
    }

    /// The status that says what a record says.
    pub fn status(&self, record: &Record) -> RecoveryStatus {
        let time = |at: Timestamp| MicroTime(at);
        let pod = record.subject.pod.as_ref();
        RecoveryStatus {
            phase: Some(phase(record).as_str().to_owned()),
            outcome: (record.dry_run && record.finished_at.is_some())
                .then(|| phase(&Record { dry_run: false, ..record.clone() }).as_str().to_owned()),
            executed_at: record.executed_at.map(time),
            finished_at: record.finished_at.map(time),
            healed_at: record.healed_at.map(time),
            pod_uid: pod.map(|pod| pod.uid.clone()).filter(|uid| record.by_hand && !uid.is_empty()),
            before: record
                .before
                .as_ref()
                .filter(|before| Some(*before) != self.spec_before.as_ref())
                .map(write_before),
            successor: record.successor.clone(),
            message: record.message.as_ref().map(|message| cut(message, MAX_MESSAGE).to_owned()),
        }
    }
}

/// What the schema says of the status of an object that nobody has written one for.
fn untouched() -> RecoveryStatus {
    RecoveryStatus { phase: Some(Phase::Pending.as_str().to_owned()), ..RecoveryStatus::default() }
}

/// Whether the phase of a status is one that this version knows.
fn is_known(status: &RecoveryStatus) -> bool {
    status.phase.as_deref().is_none_or(|word| Phase::ALL.iter().any(|phase| phase.as_str() == word))
}

/// How far a record is, in the word that its status has for it.
pub const fn phase(record: &Record) -> Phase {
    match record.outcome {
        _ if record.dry_run => Phase::Simulated,
        Outcome::Pending => Phase::Pending,
        Outcome::Waiting => Phase::Waiting,
        Outcome::Verifying => Phase::Verifying,
        Outcome::Succeeded => Phase::Succeeded,
        Outcome::Failed => Phase::Failed,
        Outcome::Cancelled => Phase::Cancelled,
    }
}

/// What a status says of the outcome. A word that this version does not know is of a newer one, which knows what it did.
fn outcome(status: &RecoveryStatus, dry_run: bool) -> Outcome {
    let word = status.outcome.as_deref().filter(|_| dry_run).or(status.phase.as_deref());
    let known = Phase::ALL.iter().find(|phase| Some(phase.as_str()) == word);
    let is_over = status.finished_at.is_some();
    match known {
        None if word.is_none() => Outcome::Pending,
        Some(Phase::Pending) => Outcome::Pending,
        Some(Phase::Waiting) => Outcome::Waiting,
        Some(Phase::Succeeded) => Outcome::Succeeded,
        Some(Phase::Cancelled) => Outcome::Cancelled,
        Some(Phase::Verifying | Phase::Simulated) | None if !is_over => Outcome::Verifying,
        Some(Phase::Failed | Phase::Verifying | Phase::Simulated) | None => Outcome::Failed,
    }
}

/// Name of the object of an intent that a policy decided: by its place, so that there is one object for it.
pub fn name_of(record: &Record) -> String {
    // A StatefulSet's key has its kind in it; the place tells it from a Deployment of that name.
    let target = record.subject.target.rsplit('/').next().unwrap_or_default();
    format!("{target}-{}-{}", record.subject.check, record.slot)
}

/// Whether this is how a place is written.
pub fn is_slot(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The object that is made for an intent.
pub fn manifest(record: &Record, namespace: &str, policy: &str, workload_uid: &str) -> Value {
    let workload = workload_of(namespace, &record.subject.target);
    let pod = record.subject.pod.as_ref();
    let pod = pod.map(|pod| json!({ "name": pod.name, "uid": pod.uid, "instance": record.instance }));
    json!({
        "apiVersion": Recovery::api_version(&()),
        "kind": Recovery::kind(&()),
        "metadata": {
            "name": name_of(record),
            "namespace": namespace,
            "labels": { "app.kubernetes.io/managed-by": FIELD_MANAGER },
            "ownerReferences": [owner_reference(&workload, workload_uid)],
        },
        "spec": {
            "targetRef": { "group": "apps", "kind": workload.kind.as_str(), "name": workload.name },
            "policyRef": { "name": policy },
            "check": record.subject.check,
            "pod": pod,
            "action": step_action(record.step.action),
            "cronJobRef": record.step.cron_job.as_ref().map(|name| json!({ "name": name })),
            "timeout": crds::resilience_policy::StepTime::from_millis(record.step.timeout_ms),
            "step": format!("{}/{}", record.index + 1, record.steps.max(record.index + 1)),
            "dryRun": record.dry_run,
            "intent": record.id,
            "after": record.after,
            "failedAt": MicroTime(record.failed_at),
            "decidedAt": MicroTime(record.started_at),
            "before": record.before.as_ref().map(write_before),
        },
    })
}

fn read_before(before: &WorkloadBefore) -> Before {
    Before {
        wanted: usize::try_from(before.wanted).unwrap_or_default(),
        youngest_at: before.youngest_at.0,
        youngest: before.youngest.iter().cloned().collect(),
    }
}

fn write_before(before: &Before) -> WorkloadBefore {
    WorkloadBefore {
        wanted: i32::try_from(before.wanted).unwrap_or(i32::MAX).min(1_000_000),
        youngest_at: Time(before.youngest_at),
        youngest: before.youngest.iter().cloned().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn at(ms: i64) -> Timestamp {
        Timestamp::from_millisecond(ms).unwrap()
    }

    fn record() -> Record {
        Record {
            id: "aaaabbbbccccdddd".into(),
            slot: "0123456789abcdef".into(),
            after: Some("fedcba9876543210".into()),
            by_hand: false,
            withdrawn: false,
            subject: Subject {
                target: "StatefulSet/w".into(),
                pod: Some(Pod { name: "p".into(), uid: "u".into() }),
                check: "database".into(),
            },
            instance: Some("i".into()),
            step: Step { action: engine::recovery::Action::RestartPod, cron_job: None, timeout_ms: 15_000 },
            index: 1,
            steps: 2,
            failed_at: at(1_234),
            started_at: at(2_345),
            executed_at: None,
            finished_at: None,
            outcome: Outcome::Pending,
            healed_at: None,
            before: Some(Before { wanted: 3, youngest_at: at(1_000), youngest: ["u".to_owned()].into() }),
            successor: None,
            dry_run: false,
            message: None,
        }
    }

    /// As the API server gives it back: through text, and with a version.
    fn stored(record: &Record, status: Option<RecoveryStatus>) -> Entry {
        let mut manifest = manifest(record, "n", "policy", "uid");
        manifest["metadata"]["resourceVersion"] = json!("7");
        manifest["status"] = serde_json::to_value(status).unwrap();
        let text = manifest.to_string();
        Entry::of(&serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn a_record_survives_its_object() {
        let begun = stored(&record(), None);
        assert_eq!((&begun.record, begun.told, begun.unresolved), (&record(), Told::Nothing, false));
        assert_eq!(begun.key().name, "w-database-0123456789abcdef");
        assert_eq!(
            (begun.policy.as_deref(), begun.workload.to_string().as_str()),
            (Some("policy"), "n/w (StatefulSet)")
        );
        assert_eq!(stored(&record(), Some(untouched())).told, Told::Nothing, "as the schema's default has it");
        let over = Record {
            executed_at: Some(at(3_456)),
            finished_at: Some(at(4_567)),
            outcome: Outcome::Failed,
            healed_at: Some(at(5_678)),
            before: Some(Before { wanted: 4, youngest_at: at(2_000), youngest: ["v".to_owned()].into() }),
            successor: Some("s".into()),
            message: Some("m".into()),
            ..record()
        };
        let status = begun.status(&over);
        assert_eq!(status.phase.as_deref(), Some("Failed"));
        // Its spec is what was decided at first.
        let read = stored(&record(), Some(status));
        assert_eq!((read.record, read.told), (over, Told::Status));
    }

    #[rstest]
    #[case::under_way(Outcome::Verifying, None)]
    #[case::well_by_itself(Outcome::Succeeded, Some("Succeeded"))]
    #[case::still_failing(Outcome::Failed, Some("Failed"))]
    fn a_dry_run_is_simulated_and_remembers_what_came_of_it(#[case] outcome: Outcome, #[case] told: Option<&str>) {
        let finished_at = told.map(|_| at(9_000));
        let record = Record { dry_run: true, outcome, finished_at, ..record() };
        let status = stored(&record, None).status(&record);
        assert_eq!((status.phase.as_deref(), status.outcome.as_deref()), (Some("Simulated"), told));
        assert_eq!(stored(&record, Some(status)).record.outcome, outcome);
    }

    #[rstest]
    #[case::nothing_written(None, false, Outcome::Pending)]
    #[case::a_newer_word(Some("Rewinding"), false, Outcome::Verifying)]
    #[case::a_newer_word_that_is_over(Some("Rewound"), true, Outcome::Failed)]
    fn an_unknown_phase_is_nothing_to_act_on(#[case] word: Option<&str>, #[case] over: bool, #[case] read: Outcome) {
        let finished_at = over.then(|| MicroTime(at(1)));
        let status = RecoveryStatus { phase: word.map(str::to_owned), finished_at, ..RecoveryStatus::default() };
        assert_eq!(is_known(&status), word.is_none());
        assert_eq!(outcome(&status, false), read);
    }

    #[test]
    fn what_a_person_made_needs_little() {
        let made = json!({
            "metadata": { "name": "by-hand", "namespace": "n", "uid": "1-2", "creationTimestamp": "2026-01-01T00:00:00Z" },
            "spec": { "targetRef": { "name": "w" }, "action": "RestartPod", "pod": { "name": "p" } },
        });
        let entry = Entry::of(&serde_json::from_value(made).unwrap());
        assert!(entry.unresolved && entry.told == Told::Nothing && entry.record.by_hand && entry.policy.is_none());
        let Record { id, slot, step, subject, index, steps, .. } = &entry.record;
        assert_eq!(slot, id);
        assert_eq!((id.len(), step.timeout_ms, subject.check.as_str(), *index, *steps), (16, 60_000, "", 0, 1));
    }
}
