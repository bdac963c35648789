//! What holds recovery back, and that nothing is done to a pod meanwhile.

use crate::support::{
    World,
    audit::operator_writes,
    eventually, flag_set,
    manifests::policy_with_request,
    operator::Operator,
    recovery_policy, says,
    workload::Workload,
    world::{condition, last, phase, policy_conditions, steps_and_phases},
};
use contract::CircuitState;
use crds::{Recovery, ResiliencePolicy, status::ActionOutcome};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::{Value, json};

/// A workload under a policy, both in order so far.
pub async fn in_order(pods: usize, policy: &Value) -> (World, Workload, Operator) {
    let world = World::new().await;
    let workload = world.workload("booking", pods).await;
    let operator = world.operator().await;
    world.apply(policy).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    (world, workload, operator)
}

/// The first pod fails, and the policy, an Event and a metric say which gate holds recovery back. Nothing is done meanwhile.
async fn held_back(world: &World, workload: &Workload, operator: &Operator, reason: &str) -> ResiliencePolicy {
    let before = workload.pods[0].script().asked.len();
    workload.pods[0].script().failing = true;
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", reason).await;
    assert!(says(policy_conditions(&held), "Ready", "True", ""), "it is no fault of the policy");
    workload.pods[0].after_more_reports(3).await;
    assert_eq!(workload.pods[0].script().asked.len(), before, "nothing is done");
    world.until_events("booking", &["RecoveryWithheld"]).await;
    let namespace = &world.namespace;
    let gauge = format!(
        r#"resilience_operator_recovery_withheld{{namespace="{namespace}",policy="booking",reason="{reason}"}}"#
    );
    assert!(operator.metric(&gauge).await >= 1, "{gauge}");
    world
        .until_policy("booking", "the failure is seen all the same", |p| {
            says(policy_conditions(p), "Healthy", "False", "CheckUnhealthy")
        })
        .await
}

/// The first pod fails once and recovers, and the policy says so.
async fn recovered_once(world: &World, workload: &Workload) {
    workload.pods[0].script().failing = true;
    workload.pods[0].until_asked(1).await;
    world
        .until_policy("booking", "the first recovery succeeded", |policy| {
            last(policy).is_some_and(|record| record.outcome == ActionOutcome::Succeeded)
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspended_policy_executes_nothing_until_it_is_resumed() {
    let mut policy = recovery_policy("booking", "booking");
    let (world, workload, operator) = in_order(1, &policy).await;
    policy["spec"]["suspend"] = json!(true);
    world.apply(&policy).await;
    let held = held_back(&world, &workload, &operator, "Suspended").await;
    assert!(says(policy_conditions(&held), "Programmed", "True", "Suspended"));
    policy["spec"]["suspend"] = json!(false);
    world.apply(&policy).await;
    workload.pods[0].until_asked(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_failure_waits_for_the_cooldown() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["limits"]["cooldown"] = json!("10m");
    let (world, workload, operator) = in_order(1, &policy).await;
    recovered_once(&world, &workload).await;
    let held = held_back(&world, &workload, &operator, "Cooldown").await;
    assert!(condition(&held, "RecoveryAllowed").message.contains("it goes on at"), "it says until when");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_failure_finds_the_budget_used_up() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["limits"]["budget"]["actions"] = json!(1);
    let (world, workload, operator) = in_order(1, &policy).await;
    recovered_once(&world, &workload).await;
    let held = held_back(&world, &workload, &operator, "BudgetExhausted").await;
    assert_eq!(held.status.unwrap().recovery.unwrap().remaining_budget, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_pod_is_recovered_at_a_time() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"][0]["timeout"] = json!("20s");
    let (world, workload, _operator) = in_order(2, &policy).await;
    for pod in &workload.pods {
        let mut script = pod.script();
        (script.failing, script.reset_helps) = (true, false);
    }
    let asked = || workload.pods.iter().map(|pod| pod.script().asked.len()).sum::<usize>();
    eventually("one is asked", async || if asked() > 0 { Ok(()) } else { Err(String::new()) }).await;
    world.until_policy_says("booking", "RecoveryAllowed", "False", "OneStepAtATime").await;
    workload.pods[0].after_more_reports(3).await;
    workload.pods[1].after_more_reports(1).await;
    assert_eq!(asked(), 1);
    workload.pods.iter().for_each(|pod| pod.script().failing = false);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_while_pods_are_being_replaced() {
    let (world, workload, operator) = in_order(1, &recovery_policy("booking", "booking")).await;
    let deployments = world.api::<Deployment>();
    let status = |updated: i32| Patch::Merge(json!({ "status": { "updatedReplicas": updated } }));
    deployments.patch_status("booking", &PatchParams::default(), &status(0)).await.unwrap();
    held_back(&world, &workload, &operator, "RolloutInProgress").await;
    deployments.patch_status("booking", &PatchParams::default(), &status(1)).await.unwrap();
    workload.pods[0].until_asked(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_to_a_pod_that_was_never_ready() {
    let (world, workload, _operator) = in_order(1, &recovery_policy("booking", "booking")).await;
    let booting = workload.new_pod(&world, false).await;
    booting.script().failing = true;
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "StartingUp").await;
    let message = &condition(&held, "RecoveryAllowed").message;
    assert!(message.contains(&format!("{} was never ready", booting.name)), "{message}");
    booting.after_more_reports(3).await;
    assert!(booting.script().asked.is_empty());
    booting.becomes_ready(&world).await;
    booting.until_asked(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_may_not_have_more_pods_is_recovered_and_says_why_they_are_missing() {
    let (world, workload, _operator) = in_order(1, &recovery_policy("booking", "booking")).await;
    let status = json!({
        "replicas": 1, "updatedReplicas": 1,
        "conditions": [
            { "type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable", "message": "it has made progress" },
            { "type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: pods" },
        ],
    });
    workload.scale(&world, 3, &status).await;
    world
        .until_policy("booking", "it says why pods are missing", |policy| {
            let message = policy.status.as_ref().unwrap().targets[0].message.clone().unwrap_or_default();
            message == "pods cannot be made: exceeded quota: pods"
        })
        .await;
    workload.pods[0].script().failing = true;
    workload.pods[0].until_asked(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_left_alone_when_their_dependency_is_the_cause() {
    let (world, workload, operator) = in_order(3, &recovery_policy("booking", "booking")).await;
    for pod in &workload.pods[..2] {
        pod.script().circuits.insert("database".to_owned(), CircuitState::Open);
    }
    workload.pods[2].script().circuits.insert("database".to_owned(), CircuitState::Closed);
    world
        .until_policy("booking", "the circuit is seen", |p| {
            p.status.as_ref().unwrap().open.as_deref() == Some("database 2/3")
        })
        .await;
    let held = held_back(&world, &workload, &operator, "DependencyIsTheCause").await;
    assert!(condition(&held, "RecoveryAllowed").message.contains("database"), "it names the root cause");
    let circuit = held.status.unwrap().circuits.remove(0);
    assert_eq!((circuit.open_pods, circuit.total_pods), (2, 3));
    assert!(circuit.open_since.is_some());

    // One open circuit alone is that pod's own problem.
    workload.pods[1].script().circuits.insert("database".to_owned(), CircuitState::Closed);
    workload.pods[0].until_asked(1).await;
    world.until_events("booking", &["CircuitOpened"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_policy_only_says_what_it_would_do() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["mode"] = json!("DryRun");
    let (world, workload, _operator) = in_order(1, &policy).await;
    let status = world.policy("booking").await.status.unwrap();
    assert!(says(&status.conditions, "Programmed", "False", "DryRun"));
    assert!(status.targets[0].would_publish.is_some());
    workload.pods[0].script().failing = true;
    world
        .until_policy("booking", "what would have been done", |policy| last(policy).is_some_and(|last| last.dry_run))
        .await;
    workload.pods[0].after_more_reports(3).await;
    let all = world.recoveries().await;
    assert_eq!(steps_and_phases(&all), [("1/1", "Simulated")], "once");
    assert!(all[0].spec.dry_run && all[0].status.as_ref().unwrap().finished_at.is_some());
    assert_eq!(workload.pods[0].script().requests, 0, "its admin port is never asked anything");
    assert!(world.config_map("booking").await.is_none());

    // It holds no claim: a younger policy in mode Enforce owns the workload.
    world.apply(&policy_with_request("enforced", "booking", "6s")).await;
    world.until_policy_says("enforced", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_policy_does_not_change_how_the_enforced_one_evaluates_health() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    // It would call a check unhealthy only after a hundred failures, and among equals the one first by name counts.
    let mut dry_run = recovery_policy("a-dry-run", "booking");
    dry_run["spec"]["mode"] = json!("DryRun");
    dry_run["spec"]["healthChecks"][0]["unhealthyThreshold"] = json!(100);
    world.apply(&dry_run).await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    world
        .until_policy("a-dry-run", "its dry run is in the status", |policy| {
            policy.status.as_ref().unwrap().targets.first().is_some_and(|target| target.would_publish.is_some())
        })
        .await;
    recovered_once(&world, &workload).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_operator_writes_nothing_but_what_it_would_do() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    workload.pods[0].script().failing = true;
    let _operator = Operator::start(&world, &["--dry-run"]).await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.apply(&flag_set("flags", "booking")).await;
    world.until_flags_say("flags", "Programmed", "False", "DryRun").await;
    let status = world
        .until_policy("booking", "what would be published and done", |policy| {
            let status = policy.status.as_ref().unwrap();
            status.targets.first().is_some_and(|target| target.would_publish.is_some())
                && status
                    .recovery
                    .as_ref()
                    .is_some_and(|recovery| recovery.last.as_ref().is_some_and(|record| record.dry_run))
        })
        .await;
    assert!(says(policy_conditions(&status), "Ready", "True", "DryRun"));
    workload.pods[0].after_more_reports(2).await;
    assert_eq!(workload.pods[0].script().requests, 0);
    assert!(world.api::<ConfigMap>().list(&ListParams::default()).await.unwrap().items.is_empty());
    assert!(world.api::<Secret>().list(&ListParams::default()).await.unwrap().items.is_empty());
    let writes = operator_writes(&world.cluster, &[&world.namespace]);
    let allowed = ["resiliencepolicies/status", "featureflags/status", "recoveries", "recoveries/status", "events"];
    assert!(writes.iter().all(|write| allowed.contains(&write.resource.as_str())), "{writes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_is_paused_by_the_policy_and_on_the_workload() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["pauseRequests"] = json!(["on-sale tonight"]);
    let (world, workload, operator) = in_order(1, &policy).await;
    let held = held_back(&world, &workload, &operator, "Paused").await;
    assert!(condition(&held, "RecoveryAllowed").message.contains("the policy is paused: on-sale tonight"));
    let pause =
        |why: Value| json!({ "metadata": { "annotations": { "resilience.ticketwave.io/pause-recovery": why } } });
    world.edit::<Deployment>("booking", pause(json!("we look at it"))).await;
    policy["spec"]["recovery"]["pauseRequests"] = json!([]);
    world.apply(&policy).await;
    let says_why = |policy: &ResiliencePolicy| {
        let message = &condition(policy, "RecoveryAllowed").message;
        message.contains("the workload is paused: we look at it")
    };
    world.until_policy("booking", "the workload itself is paused", says_why).await;
    workload.pods[0].after_more_reports(2).await;
    assert!(workload.pods[0].script().asked.is_empty());
    world.edit::<Deployment>("booking", pause(Value::Null)).await;
    // An annotation counts as an edit of the Deployment, which its controller takes note of.
    let generation = world.api::<Deployment>().get("booking").await.unwrap().metadata.generation;
    let noted = Patch::Merge(json!({ "status": { "observedGeneration": generation } }));
    world.api::<Deployment>().patch_status("booking", &PatchParams::default(), &noted).await.unwrap();
    workload.pods[0].until_asked(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_done_to_a_pod_that_is_excluded() {
    let (world, workload, operator) = in_order(2, &recovery_policy("booking", "booking")).await;
    let exclude =
        |value: Value| json!({ "metadata": { "labels": { "resilience.ticketwave.io/exclude-from-recovery": value } } });
    world.edit::<Pod>(&workload.pods[0].name, exclude(json!("true"))).await;
    let held = held_back(&world, &workload, &operator, "Excluded").await;
    assert!(condition(&held, "RecoveryAllowed").message.contains(&workload.pods[0].name));
    workload.pods[1].script().failing = true;
    workload.pods[1].until_asked(1).await;
    world.edit::<Pod>(&workload.pods[0].name, exclude(Value::Null)).await;
    workload.pods[0].until_asked(1).await;
}

/// Two workloads, two policies, two pods each; two actions in the namespace are a storm.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_in_a_namespace_stops_all_of_its_policies_at_once() {
    let world = World::new().await;
    let names = ["booking", "payment"];
    let mut workloads = Vec::new();
    for name in names {
        workloads.push(world.workload(name, 2).await);
    }
    let storm = ["--storm-actions", "2", "--storm-interval", "1m", "--storm-cooldown", "1h"];
    let operator = Operator::start(&world, &storm).await;
    for name in names {
        let mut policy = recovery_policy(name, name);
        policy["spec"]["recovery"]["limits"]["maxInFlight"] = json!(10);
        // One policy may begin both actions; then it still has a step left that is held back.
        let step = json!({ "action": "ResetConnections", "timeout": "3s" });
        policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([step, step]);
        world.apply(&policy).await;
        world.until_policy_says(name, "Ready", "True", "Programmed").await;
    }
    for pod in workloads.iter().flat_map(|workload| &workload.pods) {
        let mut script = pod.script();
        (script.failing, script.reset_helps) = (true, false);
    }
    for name in names {
        let held = world.until_policy_says(name, "RecoveryAllowed", "False", "StormActive").await;
        let message = &condition(&held, "RecoveryAllowed").message;
        assert!(
            message.contains("2 actions were begun in this namespace within 60 s") && message.contains("it goes on at"),
            "{message}"
        );
        world.until_events(name, &["RecoveryWithheld"]).await;
    }
    for pod in workloads.iter().flat_map(|workload| &workload.pods) {
        pod.after_more_reports(2).await;
    }
    let begun = async || world.recoveries().await.len();
    assert_eq!(begun().await, 2, "not one more, whichever policy would have begun it");
    // Another leader counts the same.
    operator.stop().await;
    let _operator = Operator::start(&world, &storm).await;
    for pod in workloads.iter().flat_map(|workload| &workload.pods) {
        pod.after_more_reports(3).await;
    }
    assert_eq!(begun().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_fresh_connection_says_stands_above_the_circuits() {
    let (world, workload, _operator) = in_order(3, &recovery_policy("booking", "booking")).await;
    for pod in &workload.pods {
        pod.script().circuits.insert("database".to_owned(), CircuitState::Open);
    }
    let open = |policy: &ResiliencePolicy| policy.status.as_ref().unwrap().open.as_deref() == Some("database 3/3");
    world.until_policy("booking", "the circuits are seen", open).await;
    for pod in &workload.pods {
        let mut script = pod.script();
        (script.failing, script.reset_helps, script.dependency_answers) = (true, false, Some(false));
    }
    let failing =
        |policy: &ResiliencePolicy| policy.status.as_ref().unwrap().checks.iter().any(|one| one.unhealthy_pods == 3);
    world.until_policy("booking", "all fail", failing).await;
    for pod in &workload.pods {
        pod.script().circuits.insert("database".to_owned(), CircuitState::Closed);
        pod.after_more_reports(3).await;
    }
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "DependencyIsTheCause").await;
    let message = &condition(&held, "RecoveryAllowed").message;
    assert!(message.contains("database gives fresh connections of 3 of 3 pods no answer"), "{message}");
    assert!(workload.pods.iter().all(|pod| pod.script().asked.is_empty()));
    // All connections of all pods hang, and new ones work: all of them are given up, at once.
    for pod in &workload.pods {
        let mut script = pod.script();
        script.circuits.insert("database".to_owned(), CircuitState::Open);
        script.dependency_answers = Some(true);
    }
    for pod in &workload.pods {
        pod.until_asked(1).await;
    }
    let under_way = |one: &&Recovery| matches!(phase(one), "Pending" | "Verifying");
    let at_once = world.recoveries().await.iter().filter(under_way).count();
    assert!(at_once > 1, "not one after the other");
}
