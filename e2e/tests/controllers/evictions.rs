//! What may come in the way of a restart while it is under way: a busy API server, two disruption budgets, an autoscaler.

use crate::support::{
    World,
    api_proxy::ApiProxy,
    eventually,
    operator::Operator,
    recovery_policy, within,
    workload::Workload,
    world::{message, steps_and_phases},
};
use axum::http::StatusCode;
use crds::Recovery;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use std::time::Duration;

/// How the operator asked for evictions, and what the API server answered, oldest first.
fn evictions(world: &World) -> Vec<u64> {
    let writes = crate::support::audit::operator_writes(&world.cluster, &[&world.namespace]);
    let evictions = writes.iter().filter(|one| one.verb == "create" && one.resource == "pods/eviction");
    evictions.map(|one| one.code).collect()
}

fn restarting(timeout: &str) -> Value {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([{ "action": "RestartPod", "timeout": timeout }]);
    policy
}

async fn in_order(pods: usize, timeout: &str) -> (World, Workload, Operator, ApiProxy) {
    let world = World::new().await;
    let workload = world.workload("booking", pods).await;
    let proxy = ApiProxy::start(&world).await;
    let operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    world.apply(&restarting(timeout)).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    (world, workload, operator, proxy)
}

async fn until_gone(world: &World, pod: &str) {
    eventually(&format!("{pod} is evicted"), async || match world.api::<Pod>().get_opt(pod).await.unwrap() {
        None => Ok(()),
        Some(_) => Err(String::new()),
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_busy_is_asked_again_and_refuses_nothing() {
    let (world, workload, _operator, proxy) = in_order(3, "90s").await;
    proxy.refuse(2, |call| call.path.contains("/eviction"), StatusCode::TOO_MANY_REQUESTS);
    workload.pods[0].script().failing = true;
    let told = world
        .until_recoveries("it says why it is not done yet", |all| {
            all.first().is_some_and(|one| message(one).contains("the API server is busy, and is asked again"))
        })
        .await;
    assert_eq!(steps_and_phases(&told), [("1/1", "Pending")], "nobody has refused it");
    until_gone(&world, &workload.pods[0].name).await;
    assert_eq!((proxy.refused(), evictions(&world)), (2, vec![201]), "it was asked for until it was done, once");
    let _successor = workload.new_pod(&world, true).await;
    world.until_recoveries("the restart succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    let published = world.events_about("booking").await;
    assert!(!published.iter().any(|reason| reason == "RecoveryRefused"), "{published:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_under_two_disruption_budgets_is_left_alone_and_the_server_s_words_are_told() {
    let (world, workload, _operator, _proxy) = in_order(3, "4s").await;
    for name in ["by-the-team", "by-the-chart"] {
        let budget = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": name },
            "spec": { "maxUnavailable": 1, "selector": { "matchLabels": { "app": "booking" } } },
        });
        world.apply(&budget).await;
    }
    workload.pods[0].script().failing = true;
    // An operator that has only just begun to look gives it up a while after the step's own time.
    let failed = within(Duration::from_secs(60), "it is given up", async || {
        let all = world.recoveries().await;
        let seen = format!("{:?}", steps_and_phases(&all));
        if steps_and_phases(&all) == [("1/1", "Failed")] { Ok(all) } else { Err(seen) }
    })
    .await;
    let told = message(&failed[0]);
    assert!(
        told.contains("it could not be executed in time") && told.contains("more than one PodDisruptionBudget"),
        "{told}"
    );
    world.until_policy_says("booking", "RecoveryExhausted", "True", "RecoveryExhausted").await;
    assert!(world.api::<Pod>().get_opt(&workload.pods[0].name).await.unwrap().is_some());
    assert!(evictions(&world).iter().all(|code| *code == 500), "{:?}", evictions(&world));
}

/// What the controllers write of a Deployment whose pods are as many as it is to have.
fn complete(pods: usize) -> Value {
    json!({ "replicas": pods, "updatedReplicas": pods, "readyReplicas": pods })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_judged_by_the_number_of_pods_that_is_wanted_now() {
    let (world, workload, _operator, _proxy) = in_order(3, "90s").await;
    workload.pods[0].script().failing = true;
    until_gone(&world, &workload.pods[0].name).await;
    let verifying = |all: &[Recovery]| steps_and_phases(all) == [("1/1", "Verifying")];
    world.until_recoveries("it is executed", verifying).await;
    // An autoscaler wants one more, and takes that back: what is missing then is the successor still.
    workload.scale(&world, 4, &complete(2)).await;
    let more = workload.new_pod(&world, false).await;
    more.after_more_reports(2).await;
    workload.scale(&world, 3, &complete(3)).await;
    more.after_more_reports(2).await;
    assert!(verifying(&world.recoveries().await), "the pod that is there now was not ready yet");
    more.becomes_ready(&world).await;
    world.until_recoveries("the restart succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    assert_eq!(evictions(&world), [201], "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_ends_when_no_pod_is_wanted_any_more() {
    let (world, workload, _operator, _proxy) = in_order(2, "90s").await;
    workload.pods[0].script().failing = true;
    until_gone(&world, &workload.pods[0].name).await;
    workload.pods[1].delete(&world).await;
    workload.scale(&world, 0, &json!({ "replicas": 0, "updatedReplicas": 0, "readyReplicas": 0 })).await;
    let over = world.until_recoveries("it is over", |all| steps_and_phases(all) == [("1/1", "Cancelled")]).await;
    assert!(message(&over[0]).contains("scaled down to 0"), "{}", message(&over[0]));
    assert_eq!(evictions(&world), [201], "once");
}
