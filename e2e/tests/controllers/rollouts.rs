//! The steps that replace all pods of a workload: restarting all of them, and undoing a rollout.

use crate::support::{
    FakePod, World, eventually, recovery_policy, says,
    workload::{Workload, owned_by},
    world::{condition, message, policy_conditions, steps_and_phases},
};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use kube::{
    ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

const RESTARTED_BY: &str = "resilience.ticketwave.io/restarted-by";
const ROLLED_BACK_BY: &str = "resilience.ticketwave.io/rolled-back-by";
const ROLLBACK_TO: &str = "resilience.ticketwave.io/rollback-to";

fn with_steps(check: &str, steps: &Value) -> Value {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"] = json!([{ "check": check, "steps": steps }]);
    policy
}

/// The template of a revision, as its ReplicaSet has it.
fn template(image: &str) -> Value {
    json!({ "metadata": { "labels": { "app": "booking" } }, "spec": { "containers": [{ "name": "main", "image": image }] } })
}

/// The ReplicaSet of a revision, as the controller of a Deployment makes it.
async fn revision(world: &World, workload: &Workload, number: u32, image: &str) -> ReplicaSet {
    let mut template = template(image);
    template["metadata"]["labels"]["pod-template-hash"] = json!(format!("hash{number}"));
    let set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {
            "name": format!("booking-hash{number}"), "labels": template["metadata"]["labels"],
            "annotations": { "deployment.kubernetes.io/revision": number.to_string() },
            "ownerReferences": owned_by("Deployment", "booking", &workload.uid),
        },
        "spec": { "replicas": 1, "selector": { "matchLabels": template["metadata"]["labels"] }, "template": template },
    });
    world.api().create(&PostParams::default(), &serde_json::from_value(set).unwrap()).await.unwrap()
}

async fn pod_of(world: &World, set: &ReplicaSet, ready: bool) -> FakePod {
    let owners = owned_by("ReplicaSet", &set.name_any(), &set.uid().unwrap());
    let pod = FakePod::start(world, "booking", owners, ready).await;
    // One that is ready has been so for a while, and its containers run for as long.
    let since = (jiff::Timestamp::now() - jiff::SignedDuration::from_secs(120)).to_string();
    let ready_now = json!({ "status": {
        "conditions": [{ "type": "Ready", "status": if ready { "True" } else { "False" }, "lastTransitionTime": since }],
        "containerStatuses": [{
            "name": "main", "image": "shop", "imageID": "", "ready": ready, "restartCount": 0, "state": { "running": { "startedAt": since } },
        }],
    }});
    let pods = world.api::<k8s_openapi::api::core::v1::Pod>();
    pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(ready_now)).await.unwrap();
    pod
}

/// The controller of the Deployment counts its revisions.
async fn is_of_revision(world: &World, number: u32) {
    let noted = json!({ "metadata": { "annotations": { "deployment.kubernetes.io/revision": number.to_string() } } });
    world.api::<Deployment>().patch("booking", &PatchParams::default(), &Patch::Merge(noted)).await.unwrap();
}

/// The controller of the Deployment says how far it is.
async fn progress(world: &World, wanted: i64, (all, updated, available): (i64, i64, i64)) {
    let deployments = world.api::<Deployment>();
    let seen = deployments.get("booking").await.unwrap().metadata.generation;
    let status = json!({ "status": {
        "observedGeneration": seen, "replicas": all, "updatedReplicas": updated, "readyReplicas": available,
        "availableReplicas": available, "unavailableReplicas": (wanted - available).max(0),
    }});
    deployments.patch_status("booking", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
}

async fn image(world: &World) -> String {
    let deployment = world.api::<Deployment>().get("booking").await.unwrap();
    deployment.spec.template.spec.unwrap().containers[0].image.clone().unwrap()
}

/// Three pods of revision 1 that serve, and revision 2, whose first pod crashes again and again. The manager writes the template.
async fn crashing_rollout(world: &World, manager: &PatchParams) -> (Workload, [ReplicaSet; 2], Vec<FakePod>) {
    let (workload, sets, pods) = Box::pin(begun_rollout(world, manager)).await;
    let ended = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1);
    let crashed = json!({ "exitCode": 1, "finishedAt": ended.to_string() });
    waits(world, &pods[3], "CrashLoopBackOff", json!({ "terminated": crashed })).await;
    (workload, sets, pods)
}

/// The kubelet says why the container of a pod of revision 2 does not run.
async fn waits(world: &World, pod: &FakePod, reason: &str, last: Value) {
    let status = json!({ "status": { "containerStatuses": [{
        "name": "main", "image": "shop:2", "imageID": "", "ready": false,
        "restartCount": if last.is_null() { 0 } else { 3 }, "state": { "waiting": { "reason": reason } }, "lastState": last,
    }]}});
    let pods = world.api::<k8s_openapi::api::core::v1::Pod>();
    pods.patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(status)).await.unwrap();
}

/// Three pods of revision 1 that serve, and revision 2, whose first pod is not ready. The manager writes the template.
async fn begun_rollout(world: &World, manager: &PatchParams) -> (Workload, [ReplicaSet; 2], Vec<FakePod>) {
    let workload = world.workload("booking", 0).await;
    let scaled = json!({ "spec": { "replicas": 3, "template": template("shop:1") } });
    world.api::<Deployment>().patch("booking", &PatchParams::default(), &Patch::Merge(scaled)).await.unwrap();
    let old = revision(world, &workload, 1, "shop:1").await;
    let mut pods = Vec::new();
    for _ in 0..3 {
        pods.push(pod_of(world, &old, true).await);
    }
    progress(world, 3, (3, 3, 3)).await;
    // Times of creation are in whole seconds.
    eventually("another second", async || {
        let made = old.creation_timestamp().unwrap().0;
        if jiff::Timestamp::now().as_second() > made.as_second() { Ok(()) } else { Err(made.to_string()) }
    })
    .await;
    let change = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "booking" },
        "spec": { "selector": { "matchLabels": { "app": "booking" } }, "template": template("shop:2") },
    });
    let patch = if manager.force { Patch::Apply(change) } else { Patch::Merge(change) };
    world.api::<Deployment>().patch("booking", manager, &patch).await.unwrap();
    let new = revision(world, &workload, 2, "shop:2").await;
    is_of_revision(world, 2).await;
    progress(world, 3, (4, 1, 3)).await;
    pods.push(pod_of(world, &new, false).await);
    (workload, [old, new], pods)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_that_crashes_is_undone_once_and_verified() {
    let world = World::new().await;
    let (_workload, [old, _], pods) = Box::pin(crashing_rollout(&world, &PatchParams::default())).await;
    let operator = world.operator().await;
    world.apply(&with_steps("restarts", &json!([{ "action": "Rollback", "timeout": "60s" }]))).await;
    eventually("the template of revision 1 is back", async || {
        let image = image(&world).await;
        if image == "shop:1" { Ok(()) } else { Err(image) }
    })
    .await;
    let all = world.until_recoveries("it is verified", |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
    assert_eq!(message(&all[0]), "the rollout of revision 2 is being undone; revision 1 comes back");
    let deployment = world.api::<Deployment>().get("booking").await.unwrap();
    assert_eq!(deployment.annotations()[ROLLED_BACK_BY], all[0].spec.intent.clone().unwrap());
    let labels = deployment.spec.template.metadata.as_ref().unwrap().labels.clone().unwrap();
    assert_eq!(labels.into_iter().collect::<Vec<_>>(), [("app".to_owned(), "booking".to_owned())]);
    let labelled = world.api::<ReplicaSet>().list(&ListParams::default().labels(ROLLBACK_TO)).await.unwrap();
    assert!(labelled.items.is_empty(), "the label is taken away again");

    // What the Deployment's controller does: revision 1 is the newest again, and the pod of revision 2 goes away.
    let noted = json!({ "metadata": { "annotations": { "deployment.kubernetes.io/revision": "3" } } });
    world.api::<ReplicaSet>().patch(&old.name_any(), &PatchParams::default(), &Patch::Merge(noted)).await.unwrap();
    is_of_revision(&world, 3).await;
    pods[3].delete(&world).await;
    progress(&world, 3, (3, 3, 3)).await;
    world.until_recoveries("it helped", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    world.until_events("booking", &["RecoveryStarted", "RecoverySucceeded"]).await;

    // What came back is not rolled back further.
    let ended = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(1);
    let crashes = json!({ "status": { "containerStatuses": [{
        "name": "main", "image": "shop:1", "imageID": "", "ready": false, "restartCount": 3,
        "state": { "waiting": { "reason": "CrashLoopBackOff" } },
        "lastState": { "terminated": { "exitCode": 1, "finishedAt": ended.to_string() } },
    }]}});
    let api = world.api::<k8s_openapi::api::core::v1::Pod>();
    api.patch_status(&pods[0].name, &PatchParams::default(), &Patch::Strategic(&crashes)).await.unwrap();
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "RollbackRefused").await;
    let why = &condition(&held, "RecoveryAllowed").message;
    assert!(why.contains("revision 3 is itself a return to an older template"), "{why}");
    assert_eq!(image(&world).await, "shop:1");
    operator.assert_alive().await;
}

/// Kubernetes' own word is enough: of an image that nobody can pull, and of a rollout that does not progress.
#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_is_undone_for_its_image_and_for_its_deadline() {
    for signal in ["image", "rollout"] {
        let world = World::new().await;
        let (_workload, _sets, pods) = Box::pin(begun_rollout(&world, &PatchParams::default())).await;
        let operator = world.operator().await;
        world.apply(&with_steps(signal, &json!([{ "action": "Rollback", "timeout": "60s" }]))).await;
        world.until_policy_says("booking", "Healthy", "True", "").await;
        if signal == "image" {
            waits(&world, &pods[3], "ImagePullBackOff", json!(null)).await;
        } else {
            let now = jiff::Timestamp::now().to_string();
            let stuck = json!({ "status": { "conditions": [{
                "type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded",
                "message": "ReplicaSet \"booking-hash2\" has timed out progressing.", "lastTransitionTime": now,
            }]}});
            let deployments = world.api::<Deployment>();
            deployments.patch_status("booking", &PatchParams::default(), &Patch::Merge(stuck)).await.unwrap();
        }
        let all = world.until_recoveries(signal, |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
        assert_eq!(message(&all[0]), "the rollout of revision 2 is being undone; revision 1 comes back");
        assert_eq!(all[0].spec.check.as_deref(), Some(signal));
        assert_eq!(image(&world).await, "shop:1");
        operator.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_gitops_owns_is_not_rolled_back_and_that_is_said() {
    let world = World::new().await;
    let manager = PatchParams::apply("argocd-controller").force();
    let (_workload, ..) = Box::pin(crashing_rollout(&world, &manager)).await;
    let _operator = world.operator().await;
    world.apply(&with_steps("restarts", &json!([{ "action": "Rollback" }]))).await;
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "RollbackRefused").await;
    let why = &condition(&held, "RecoveryAllowed").message;
    assert!(why.contains("argocd-controller owns the template of booking and would put it back"), "{why}");
    assert!(says(policy_conditions(&held), "Healthy", "False", "CheckUnhealthy"));
    assert!(world.recoveries().await.is_empty());
    assert_eq!(image(&world).await, "shop:2");
    world.until_events("booking", &["RecoveryWithheld"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_pods_are_restarted_once_and_judged_when_they_are_there() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    progress(&world, 3, (3, 3, 3)).await;
    let _operator = world.operator().await;
    world.apply(&with_steps("database", &json!([{ "action": "RolloutRestart", "timeout": "60s" }]))).await;
    world.until_policy_says("booking", "RecoveryAllowed", "True", "Allowed").await;
    for pod in &workload.pods[..1] {
        pod.script().failing = true;
    }
    let all = world.until_recoveries("it is executed", |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
    let deployment = world.api::<Deployment>().get("booking").await.unwrap();
    let intent = all[0].spec.intent.clone().unwrap();
    assert_eq!(deployment.annotations()[RESTARTED_BY], intent);
    let template = deployment.spec.template;
    assert_eq!(template.metadata.unwrap().annotations.unwrap()[RESTARTED_BY], intent);

    // While the pods are replaced, what fails in one of them begins nothing more.
    progress(&world, 3, (4, 1, 3)).await;
    let new = workload.new_pod(&world, true).await;
    new.script().failing = true;
    new.until_it_runs("the policy", |_| true).await;
    new.after_more_reports(3).await;
    assert_eq!(steps_and_phases(&world.recoveries().await), [("1/1", "Verifying")]);
    new.script().failing = false;
    for pod in &workload.pods {
        pod.delete(&world).await;
    }
    progress(&world, 3, (3, 3, 3)).await;
    world.until_recoveries("it helped", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    let after = world.api::<Deployment>().get("booking").await.unwrap();
    assert_eq!(after.metadata.generation, deployment.metadata.generation, "it was written once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stateful_set_is_restarted_by_hand_and_not_rolled_back() {
    let world = World::new().await;
    let set = world.stateful_set("booking", 1, json!({ "type": "RollingUpdate" })).await;
    let _operator = world.operator().await;
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["targetRefs"][0]["kind"] = json!("StatefulSet");
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let ask = async |action: &str| {
        world
            .apply(&json!({
                "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "Recovery",
                "metadata": { "name": action.to_lowercase() },
                "spec": { "targetRef": { "kind": "StatefulSet", "name": "booking" }, "action": action },
            }))
            .await;
    };
    ask("Rollback").await;
    world
        .until_recoveries("it is held back", |all| {
            all.iter().any(|one| message(one).contains("held back: a StatefulSet is not rolled back"))
        })
        .await;
    ask("RolloutRestart").await;
    eventually("its template carries an id", async || {
        let set = world.api::<StatefulSet>().get("booking").await.unwrap();
        let annotations = set.spec.template.metadata.unwrap().annotations.unwrap_or_default();
        if annotations.contains_key(RESTARTED_BY) { Ok(()) } else { Err(format!("{annotations:?}")) }
    })
    .await;
    let api = world.api::<StatefulSet>();
    let seen = api.get("booking").await.unwrap().metadata.generation;
    let done = json!({ "status": { "observedGeneration": seen, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1 } });
    api.patch_status("booking", &PatchParams::default(), &Patch::Merge(done)).await.unwrap();
    world
        .until_recoveries("it is over", |all| {
            all.iter().any(|one| message(one) == "done; all pods are of the new revision, and available")
        })
        .await;
    drop(set);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mark_of_a_rollback_that_was_left_behind_is_taken_away() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    revision(&world, &workload, 1, "shop:1").await;
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let mark = json!({ "metadata": { "labels": { ROLLBACK_TO: "0123456789abcdef" } } });
    let deployments = world.api::<Deployment>();
    // Nothing is there that the admission policy could compare with; somebody has taken that away.
    let set = world.api::<ReplicaSet>();
    set.patch("booking-hash1", &PatchParams::default(), &Patch::Merge(&mark)).await.unwrap();
    eventually("it is marked", async || {
        let marked = deployments.patch("booking", &PatchParams::default(), &Patch::Merge(&mark)).await;
        marked.map(drop).map_err(|error| error.to_string())
    })
    .await;
    let gone = json!({ "metadata": { "labels": { ROLLBACK_TO: null } } });
    set.patch("booking-hash1", &PatchParams::default(), &Patch::Merge(&gone)).await.unwrap();
    eventually("no mark is left", async || {
        let with = ListParams::default().labels(ROLLBACK_TO);
        let left = deployments.list(&with).await.unwrap().items.len() + set.list(&with).await.unwrap().items.len();
        if left == 0 { Ok(()) } else { Err(left.to_string()) }
    })
    .await;
}
