//! Deployments and StatefulSets.

use super::{Facts, LabelHashes, RawAnnotations, RawCondition, RawMeta, Uid, intent, label_hashes};
use crate::kubernetes::meta::{ROLLBACK_TO_LABEL, cut};
use contract::{WorkloadId, WorkloadKind};
use engine::signals::Progress;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest text of a workload's condition that is kept, in bytes.
const MAX_WORDS: usize = 256;

/// A Deployment or a StatefulSet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadFacts {
    /// Kind, namespace and name.
    pub id: WorkloadId,
    /// Which object of that name.
    pub uid: Uid,
    /// The labels by which it selects its pods; empty: none that can be compared.
    pub selector: LabelHashes,
    /// Pods that it is to have.
    pub wanted: usize,
    /// How far a change of its template has come.
    pub rollout: Rollout,
    /// Why nothing is to be begun to recover it, if its annotation says so.
    pub paused: Option<String>,
    /// It has the mark of a rollback.
    pub marked: bool,
}

/// How far a change of a workload's template has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rollout {
    /// Pods of an old template are still being replaced.
    pub in_progress: bool,
    /// What a person should know of how its pods are replaced, if it is not the usual way.
    pub note: Option<String>,
    /// What the controller of a Deployment says of it.
    pub progress: Option<Progress>,
    /// All pods that are wanted are of the present template, and available.
    pub complete: bool,
    /// Why a change of the template replaces no pods, if it does not.
    pub held: Option<&'static str>,
    /// All its pods are taken away before others come.
    pub recreates: bool,
    /// Id of the restart of all pods that the template carries.
    pub restarted_by: Option<Box<str>>,
    /// Id of the rollback that the workload carries.
    pub rolled_back_by: Option<Box<str>>,
    /// Who puts the template back when somebody changes it.
    pub template_owner: Option<Box<str>>,
}

/// The parts of a workload that are read.
#[derive(Deserialize)]
pub struct RawWorkload {
    #[serde(default)]
    metadata: RawMeta,
    #[serde(default)]
    spec: RawWorkloadSpec,
    #[serde(default)]
    status: RawWorkloadStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawWorkloadSpec {
    replicas: Option<i32>,
    selector: RawSelector,
    template: RawTemplate,
    strategy: RawStrategy,
    update_strategy: RawStrategy,
    paused: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTemplate {
    metadata: RawTemplateMeta,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawTemplateMeta {
    annotations: RawAnnotations,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSelector {
    match_labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawStrategy {
    #[serde(rename = "type")]
    type_: Option<String>,
    rolling_update: Option<RawRollingUpdate>,
}

impl RawStrategy {
    /// Pods of a StatefulSet with a lower ordinal keep an older template.
    fn partition(&self) -> i32 {
        self.rolling_update.as_ref().and_then(|rolling| rolling.partition).unwrap_or(0)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRollingUpdate {
    partition: Option<i32>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawWorkloadStatus {
    observed_generation: Option<i64>,
    replicas: Option<i32>,
    updated_replicas: Option<i32>,
    available_replicas: Option<i32>,
    current_revision: Option<String>,
    update_revision: Option<String>,
    conditions: Option<Vec<RawCondition>>,
}

impl RawWorkloadStatus {
    fn condition(&self, type_: &str) -> Option<&RawCondition> {
        self.conditions.iter().flatten().find(|condition| condition.type_ == type_)
    }
}

fn workload(kind: WorkloadKind, raw: RawWorkload, rollout: Rollout) -> (RawMeta, WorkloadFacts) {
    let RawWorkload { metadata, spec, status } = raw;
    let wanted = spec.replicas.unwrap_or(1);
    let (all, updated) = (status.replicas.unwrap_or(0), status.updated_replicas.unwrap_or(0));
    let partition = spec.update_strategy.partition();
    let kept = partition.clamp(0, wanted);
    let held = match spec.update_strategy.type_.as_deref() {
        _ if spec.paused => Some("its rollout is paused"),
        Some("OnDelete") => Some("its pods are replaced only when somebody deletes them (OnDelete)"),
        _ if kept > 0 && kept == wanted => Some("all its pods keep their template (updateStrategy.partition)"),
        _ => None,
    };
    let seen = status.observed_generation.is_some() && status.observed_generation >= metadata.generation;
    let owner = metadata.managed_fields.iter().flatten().find(|manager| manager.reasserts_template());
    let rollout = Rollout {
        complete: seen
            && updated >= wanted - kept
            && all <= updated + kept
            && status.available_replicas.unwrap_or(0) >= wanted,
        restarted_by: intent(spec.template.metadata.annotations.restarted_by.as_deref()),
        rolled_back_by: intent(metadata.annotations.rolled_back_by.as_deref()),
        held,
        recreates: spec.strategy.type_.as_deref() == Some("Recreate"),
        template_owner: owner.map(|manager| cut(&manager.manager, MAX_WORDS).into()),
        ..rollout
    };
    let facts = WorkloadFacts {
        id: metadata.id(kind),
        uid: metadata.shared_uid(),
        selector: label_hashes(metadata.namespace.as_deref(), spec.selector.match_labels.as_ref()),
        wanted: spec.replicas.map_or(1, |wanted| usize::try_from(wanted).unwrap_or(0)),
        rollout,
        paused: metadata.annotations.pause_recovery.as_deref().map(|why| cut(why, MAX_WORDS).to_owned()),
        marked: metadata.labels.iter().flatten().any(|(key, _)| key == ROLLBACK_TO_LABEL),
    };
    (metadata, facts)
}

/// A Deployment.
#[derive(Clone, Debug)]
pub struct DeploymentFacts(pub WorkloadFacts);

impl Facts for DeploymentFacts {
    type Kind = Deployment;
    type Raw = RawWorkload;

    fn pick(raw: RawWorkload) -> (RawMeta, Self) {
        let rollout = deployment_rollout(&raw);
        let (metadata, facts) = workload(WorkloadKind::Deployment, raw, rollout);
        (metadata, Self(facts))
    }
}

/// A Deployment is being rolled out from the edit of its template until all pods are of the new one, or until its deadline.
/// Pods that are only missing, because it was scaled or because nobody may make them, are no rollout.
fn deployment_rollout(raw: &RawWorkload) -> Rollout {
    let (wanted, status) = (raw.spec.replicas.unwrap_or(1), &raw.status);
    let Some(observed) = status.observed_generation else { return Rollout::default() };
    let said = |condition: &RawCondition| {
        let words = condition.message.as_deref().or(condition.reason.as_deref()).unwrap_or_default();
        cut(words, MAX_WORDS).to_owned()
    };
    let blocked = status.condition("ReplicaFailure").filter(|condition| condition.status == "True");
    let blocked = blocked.map(|condition| format!("pods cannot be made: {}", said(condition)));
    let progressing = status.condition("Progressing");
    let reason = progressing.and_then(|condition| condition.reason.as_deref());
    let stuck = progressing.filter(|_| reason == Some("ProgressDeadlineExceeded"));
    let stuck = stuck.map(|condition| format!("its rollout does not progress: {}", said(condition)));
    let updated = status.updated_replicas.unwrap_or(0);
    let old_pods = status.replicas.unwrap_or(0) > updated;
    // Once all pods are of the new template, another reason stands there, and goes on to while it is scaled.
    let moves = matches!(reason, Some("NewReplicaSetCreated" | "FoundNewReplicaSet" | "ReplicaSetUpdated"));
    let replacing = old_pods || (moves && updated < wanted);
    let paused = (raw.spec.paused && replacing).then(|| "it is paused in the middle of a rollout".to_owned());
    let behind = Some(observed) < raw.metadata.generation;
    let in_progress = behind || (replacing && stuck.is_none() && !raw.spec.paused);
    // What it says of another template says nothing of this one.
    let progress = progressing.filter(|_| !behind).and_then(|condition| {
        let exceeded = reason == Some("ProgressDeadlineExceeded");
        // The time of the last change tells since when it is stuck; that of the last step, since when it is done.
        let (changed, updated) = (&condition.last_transition_time, &condition.last_update_time);
        let since = if exceeded { changed.as_ref() } else { updated.as_ref().or(changed.as_ref()) };
        Some(Progress { progresses: !exceeded, since: since?.0, message: said(condition).into() })
    });
    Rollout { in_progress, note: blocked.or(stuck).or(paused), progress, ..Rollout::default() }
}

/// A StatefulSet.
#[derive(Clone, Debug)]
pub struct StatefulSetFacts(pub WorkloadFacts);

impl Facts for StatefulSetFacts {
    type Kind = StatefulSet;
    type Raw = RawWorkload;

    fn pick(raw: RawWorkload) -> (RawMeta, Self) {
        let rollout = stateful_rollout(&raw);
        let (metadata, facts) = workload(WorkloadKind::StatefulSet, raw, rollout);
        (metadata, Self(facts))
    }
}

/// A StatefulSet replaces its pods from the highest ordinal down to its partition, or, with `OnDelete`, never by itself:
/// what it leaves alone on purpose is no rollout in progress.
fn stateful_rollout(raw: &RawWorkload) -> Rollout {
    let wanted = raw.spec.replicas.unwrap_or(1);
    let status = &raw.status;
    let behind = status.observed_generation.is_some() && status.observed_generation < raw.metadata.generation;
    // With one revision there is nothing to replace, though a pod that is going away counts among all and not among these.
    let one_revision = status.current_revision.is_some() && status.current_revision == status.update_revision;
    let old = status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0);
    let old = if one_revision { 0 } else { old.max(0) };
    if raw.spec.update_strategy.type_.as_deref() == Some("OnDelete") {
        let note = (old > 0 && status.observed_generation.is_some())
            .then(|| format!("{old} of {wanted} pods run an older template until somebody deletes them (OnDelete)"));
        return Rollout { in_progress: behind, note, ..Rollout::default() };
    }
    let partition = raw.spec.update_strategy.partition();
    let note = (partition > 0)
        .then(|| format!("pods with an ordinal below {partition} keep an older template (updateStrategy.partition)"));
    // What is missing was scaled up, or cannot be made: it is no rollout.
    let unfinished = status.observed_generation.is_some() && old > partition.max(0);
    Rollout { in_progress: behind || unfinished, note, ..Rollout::default() }
}

#[cfg(test)]
mod tests {
    use super::{super::read, *};
    use serde_json::{Value, json};

    fn stateful_set(strategy: &Value, replicas: i32, updated: i32, observed: i64) -> Rollout {
        let set = read::<StatefulSetFacts>(&json!({
            "metadata": { "name": "s", "namespace": "n", "generation": 3 },
            "spec": { "replicas": replicas, "updateStrategy": strategy },
            "status": { "observedGeneration": observed, "updatedReplicas": updated, "replicas": replicas },
        }));
        set.facts.0.rollout
    }

    #[rstest::rstest]
    #[case::all_updated(json!({ "type": "RollingUpdate" }), 3, 3, false, false)]
    #[case::one_to_go(json!({ "type": "RollingUpdate" }), 3, 2, true, false)]
    #[case::not_seen_yet(json!({ "type": "RollingUpdate" }), 2, 3, true, false)]
    #[case::held_back_on_purpose(json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 2 } }), 3, 1, false, true)]
    #[case::partition_not_reached(json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 1 } }), 3, 1, true, true)]
    #[case::only_when_deleted(json!({ "type": "OnDelete" }), 3, 1, false, true)]
    fn what_a_stateful_set_leaves_alone_on_purpose_is_no_rollout(
        #[case] strategy: Value,
        #[case] observed: i64,
        #[case] updated: i32,
        #[case] in_progress: bool,
        #[case] noted: bool,
    ) {
        let rollout = stateful_set(&strategy, 3, updated, observed);
        assert_eq!((rollout.in_progress, rollout.note.is_some()), (in_progress, noted), "{rollout:?}");
    }

    #[rstest::rstest]
    #[case::rolled_out(json!({}), 4, 3, true)]
    #[case::scaled_beyond_a_quota(json!({}), 4, 4, false)]
    #[case::with_a_partition(json!({ "rollingUpdate": { "partition": 2 } }), 4, 2, false)]
    fn a_stateful_set_that_is_scaled_is_not_rolled_out(
        #[case] strategy: Value,
        #[case] replicas: i32,
        #[case] updated: i32,
        #[case] in_progress: bool,
    ) {
        let set = read::<StatefulSetFacts>(&json!({
            "metadata": { "name": "s", "namespace": "n", "generation": 3 },
            "spec": { "replicas": 6, "updateStrategy": strategy },
            "status": { "observedGeneration": 3, "updatedReplicas": updated, "replicas": replicas },
        }));
        assert_eq!(set.facts.0.rollout.in_progress, in_progress);
    }

    #[rstest::rstest]
    #[case::rolled_out("old", true)]
    #[case::a_pod_goes_away("new", false)]
    fn a_pod_of_a_stateful_set_that_goes_away_is_no_rollout(#[case] current: &str, #[case] in_progress: bool) {
        let set = read::<StatefulSetFacts>(&json!({
            "metadata": { "name": "s", "namespace": "n", "generation": 3 }, "spec": { "replicas": 3 },
            "status": {
                "observedGeneration": 3, "updatedReplicas": 2, "replicas": 3,
                "currentRevision": current, "updateRevision": "new",
            },
        }));
        assert_eq!(set.facts.0.rollout.in_progress, in_progress);
    }

    fn progressing(status: &str, reason: &str) -> Value {
        json!({ "type": "Progressing", "status": status, "reason": reason, "message": "words of Kubernetes" })
    }

    fn over_quota() -> Value {
        json!({ "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: four" })
    }

    #[rstest::rstest]
    #[case::complete(4, 4, 4, vec![progressing("True", "NewReplicaSetAvailable")], false, None)]
    #[case::old_pods(4, 3, 5, vec![progressing("True", "ReplicaSetUpdated")], true, None)]
    #[case::recreated(4, 0, 0, vec![progressing("True", "ReplicaSetUpdated")], true, None)]
    #[case::an_edit_whose_condition_is_old(4, 3, 5, vec![progressing("True", "NewReplicaSetAvailable")], true, None)]
    #[case::scaled(6, 4, 4, vec![progressing("True", "NewReplicaSetAvailable")], false, None)]
    #[case::scaled_beyond_a_quota(6, 4, 4, vec![progressing("True", "NewReplicaSetAvailable"), over_quota()], false, Some("pods cannot be made: exceeded quota"))]
    #[case::rolled_out_beyond_a_quota(4, 1, 4, vec![progressing("True", "ReplicaSetUpdated"), over_quota()], true, Some("pods cannot be made: exceeded quota"))]
    #[case::stuck(4, 1, 4, vec![progressing("False", "ProgressDeadlineExceeded")], false, Some("its rollout does not progress: words"))]
    #[case::without_a_deadline(4, 3, 5, vec![], true, None)]
    #[case::scaled_without_a_deadline(6, 4, 4, vec![], false, None)]
    #[case::scaled_while_paused(6, 4, 4, vec![progressing("Unknown", "DeploymentPaused")], false, None)]
    #[case::a_failure_that_is_over(4, 4, 4, vec![json!({ "type": "ReplicaFailure", "status": "False", "message": "m" })], false, None)]
    fn a_deployment_is_rolled_out_while_pods_are_being_replaced(
        #[case] wanted: i32,
        #[case] updated: i32,
        #[case] replicas: i32,
        #[case] conditions: Vec<Value>,
        #[case] in_progress: bool,
        #[case] note: Option<&str>,
    ) {
        let deployment = |observed: i64| {
            let deployment = read::<DeploymentFacts>(&json!({
                "metadata": { "name": "d", "namespace": "n", "generation": 3 }, "spec": { "replicas": wanted },
                "status": {
                    "observedGeneration": observed, "updatedReplicas": updated, "replicas": replicas, "conditions": conditions,
                },
            }));
            deployment.facts.0.rollout
        };
        let rollout = deployment(3);
        assert_eq!(rollout.in_progress, in_progress, "{rollout:?}");
        let told = rollout.note.as_deref().unwrap_or_default();
        assert!(note.map_or(told.is_empty(), |note| told.starts_with(note)), "{told}");
        assert!(deployment(2).in_progress, "the edit was not seen yet");
    }

    #[test]
    fn a_paused_deployment_is_not_rolled_out() {
        let deployment = read::<DeploymentFacts>(&json!({
            "metadata": { "name": "d", "namespace": "n", "generation": 3 }, "spec": { "replicas": 3, "paused": true },
            "status": { "observedGeneration": 3, "updatedReplicas": 0, "replicas": 3, "conditions": [progressing("Unknown", "DeploymentPaused")] },
        }));
        let rollout = deployment.facts.0.rollout;
        assert_eq!(
            (rollout.in_progress, rollout.note.as_deref()),
            (false, Some("it is paused in the middle of a rollout"))
        );
    }
}
