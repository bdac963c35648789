//! Kubernetes' own signals are checks of any workload, also of one whose pods do not know us: nothing is published for it, and
//! nothing is asked of it.

use crate::support::{
    FakePod, World,
    audit::operator_writes,
    eventually, recovery_policy, says, within,
    world::{condition, policy_conditions, steps_and_phases},
};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};
use std::time::Duration;

/// A policy that says nothing of how the workload calls anything.
fn only_recovers(check: &str, steps: &Value) -> Value {
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": "booking" },
        "spec": {
            "targetRefs": [{ "kind": "Deployment", "name": "booking" }],
            "recovery": {
                "ladders": [{ "check": check, "steps": steps }],
                "limits": { "cooldown": "0s", "budget": { "actions": 20, "interval": "10m" } },
                "healthyDelay": "1s", "startupGrace": "0s",
            },
        },
    })
}

fn seconds_ago(seconds: i64) -> String {
    (Timestamp::now() - SignedDuration::from_secs(seconds)).to_string()
}

fn ready(status: &str, seconds: i64) -> Value {
    json!([{ "type": "Ready", "status": status, "lastTransitionTime": seconds_ago(seconds), "reason": "ContainersNotReady", "message": "containers with unready status: [main]" }])
}

async fn kubelet_says(world: &World, pod: &FakePod, status: &Value) {
    let status = json!({ "status": status });
    world.api::<Pod>().patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(status)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_without_our_library_is_only_recovered() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    for pod in &workload.pods {
        kubelet_says(&world, pod, &json!({ "conditions": ready("True", 600) })).await;
    }
    let operator = world.operator().await;
    world.apply(&only_recovers("pod-ready", &json!([{ "action": "RestartPod", "timeout": "60s" }]))).await;
    let done = world.until_policy_says("booking", "Ready", "True", "RecoveryOnly").await;
    assert!(says(policy_conditions(&done), "Programmed", "True", "RecoveryOnly"));
    assert_eq!(done.status.unwrap().programmed.as_deref(), Some("-"));

    // Not for long enough yet.
    kubelet_says(&world, &workload.pods[0], &json!({ "conditions": ready("False", 50) })).await;
    within(Duration::from_secs(40), "the pod is evicted once it was not ready for a minute", async || {
        let gone = world.api::<Pod>().get_opt(&workload.pods[0].name).await.unwrap().is_none();
        if gone { Ok(()) } else { Err("it is there".to_owned()) }
    })
    .await;
    let all = world.recoveries().await;
    let wait =
        all[0].spec.decided_at.as_ref().unwrap().0.as_second() - all[0].spec.failed_at.as_ref().unwrap().0.as_second();
    assert!((0..5).contains(&wait), "begun {wait} s after it was unhealthy");
    let successor = workload.new_pod(&world, true).await;
    kubelet_says(&world, &successor, &json!({ "conditions": ready("True", 0) })).await;
    world.until_recoveries("the restart succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;

    for pod in workload.pods.iter().chain([&successor]) {
        assert_eq!(pod.script().requests, 0, "{} was never asked anything", pod.name);
    }
    assert!(world.api::<ConfigMap>().get_opt("booking-resilience").await.unwrap().is_none());
    let ours = ListParams::default().fields("type=resilience.ticketwave.io/admin-token");
    assert!(world.api::<Secret>().list(&ours).await.unwrap().items.is_empty(), "no token is made");
    let kinds: std::collections::BTreeSet<_> =
        operator_writes(&world.cluster, &[&world.namespace]).into_iter().map(|write| write.resource).collect();
    let expected = ["events", "pods/eviction", "recoveries", "recoveries/status", "resiliencepolicies/status"];
    assert_eq!(kinds.iter().map(String::as_str).filter(|kind| *kind != "leases").collect::<Vec<_>>(), expected);

    // From now on it says something to the pods, too.
    let mut with_words = recovery_policy("booking", "booking");
    with_words["spec"]["recovery"]["ladders"] = json!([]);
    world.apply(&with_words).await;
    successor.until_it_runs("the policy", |_| true).await;
    // And no more: they get the defaults, as when a policy is deleted.
    world.apply(&only_recovers("pod-ready", &json!([{ "action": "RestartPod" }]))).await;
    successor
        .until_it_runs("the defaults", |running| {
            running.policy.sources.is_empty() && running.policy.settings.health_checks.is_empty()
        })
        .await;
    operator.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kubernetes_says_of_pods_and_rollouts_is_said_by_the_policy() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    for pod in &workload.pods {
        kubelet_says(&world, pod, &json!({ "conditions": ready("True", 600) })).await;
    }
    let _operator = world.operator().await;
    let mut policy = only_recovers("restarts", &json!([{ "action": "RestartPod" }]));
    policy["spec"]["suspend"] = json!(true);
    policy["spec"]["healthChecks"] = json!([{ "name": "image" }, { "name": "rollout" }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;

    let container = |state: Value, restarts: i32, last: Value| {
        json!({ "containerStatuses": [{
            "name": "main", "image": "registry/x:2", "imageID": "", "ready": false, "restartCount": restarts, "state": state, "lastState": last,
        }]})
    };
    let ended = json!({ "terminated": { "reason": "OOMKilled", "exitCode": 137, "finishedAt": seconds_ago(5) } });
    let loops = json!({ "waiting": { "reason": "CrashLoopBackOff" } });
    kubelet_says(&world, &workload.pods[0], &container(loops, 4, ended.clone())).await;
    let bad = world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
    let message = &condition(&bad, "Healthy").message;
    assert!(message.contains("container main was OOMKilled and was started again 4 times"), "{message}");
    assert!(message.contains(&workload.pods[0].name), "{message}");
    let runs = json!({ "running": { "startedAt": seconds_ago(70) } });
    kubelet_says(&world, &workload.pods[0], &container(runs, 4, ended)).await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;

    let pulls = json!({ "waiting": { "reason": "ImagePullBackOff" } });
    kubelet_says(&world, &workload.pods[1], &container(pulls, 0, json!({}))).await;
    let bad = world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
    let message = &condition(&bad, "Healthy").message;
    assert!(message.contains("container main: its image registry/x:2 cannot be used (ErrImagePull)"), "{message}");
    let runs = json!({ "running": { "startedAt": seconds_ago(1) } });
    kubelet_says(&world, &workload.pods[1], &container(runs, 0, json!({}))).await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;

    let deployments = world.api::<Deployment>();
    let generation = deployments.get("booking").await.unwrap().metadata.generation;
    let stuck = json!({ "status": { "observedGeneration": generation, "conditions": [{
        "type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded",
        "message": "ReplicaSet \"booking-2\" has timed out progressing.", "lastTransitionTime": seconds_ago(1),
    }]}});
    deployments.patch_status("booking", &PatchParams::default(), &Patch::Merge(stuck)).await.unwrap();
    eventually("the stuck rollout is said", async || {
        let policy = world.policy("booking").await;
        let message = condition(&policy, "Healthy").message.clone();
        let said = message.contains("rollout is unhealthy of booking") && message.contains("timed out progressing");
        if said { Ok(()) } else { Err(message) }
    })
    .await;
    world.until_events("booking", &["CheckUnhealthy"]).await;
}
