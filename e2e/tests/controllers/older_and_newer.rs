//! Workloads and operators of different versions.

use crate::support::{
    World, policy, says,
    world::{condition, policy_conditions, request_ms},
};
use contract::{CONFIG_KEY, canonical};
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};
use std::collections::BTreeSet;

#[tokio::test(flavor = "multi_thread")]
async fn an_older_workload_goes_on_and_says_what_it_lacks() {
    let world = World::new().await;
    let mut workload = world.workload("booking", 2).await;
    {
        let mut older = workload.pods[0].script();
        older.contract_version = 0;
        older.unsupported = vec!["policy.settings.dependencies.database.circuitBreaker".to_owned()];
    }
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    let words = [
        "live in 1 of 2 pods",
        &workload.pods[0].name,
        "dependencies.database.circuitBreaker",
        "speaks contract 0",
        "upgrade",
    ];
    // The pods answer one after the other, and each answer may make a message of its own.
    let partial = world
        .until_policy("booking", "it names the pod and what it lacks", |policy| {
            says(policy_conditions(policy), "Programmed", "False", "PartiallyProgrammed")
                && words.iter().all(|word| condition(policy, "Programmed").message.contains(word))
        })
        .await;
    assert_eq!(partial.status.as_ref().unwrap().programmed.as_deref(), Some("1/2"));
    assert!(says(policy_conditions(&partial), "Ready", "False", "PartiallyProgrammed"));
    assert!(says(policy_conditions(&partial), "Stalled", "False", ""));
    workload.pods[0].until_it_runs("what it understands", |running| request_ms(running) == Some(5_000)).await;

    // It is replaced by a pod of the present version.
    workload.pods[0].delete(&world).await;
    let fresh = workload.new_pod(&world, true).await;
    workload.pods.push(fresh);
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_workload_is_as_good_as_any() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    workload.pods[0].script().contract_version = contract::CONTRACT_VERSION + 1;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dependency_that_the_workload_does_not_have_is_named() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    workload.pods[0].script().dependencies = Some(BTreeSet::from(["database".to_owned()]));
    let _operator = world.operator().await;
    let mut misspelt = policy("booking", "booking");
    misspelt["spec"]["dependencies"].as_array_mut().unwrap().push(json!({ "name": "paymnet" }));
    world.apply(&misspelt).await;
    let partial = world
        .until_policy("booking", "it says so", |policy| {
            says(policy_conditions(policy), "Programmed", "False", "PartiallyProgrammed")
                && condition(policy, "Programmed").message.contains("no dependency named paymnet")
        })
        .await;
    assert_eq!(partial.status.unwrap().programmed.as_deref(), Some("0/1"));
    assert_eq!(request_ms(workload.pods[0].script().running.as_ref().unwrap()), Some(5_000), "the rest of it is live");
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_takes_over_what_a_newer_one_published() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let before = world.document("booking").await;
    operator.stop().await;

    // The document of an operator that knows more than this one, sealed as that one would.
    let mut newer: Value = serde_json::from_slice(&before.to_bytes().unwrap()).unwrap();
    newer["contractVersion"] = json!(contract::CONTRACT_VERSION + 1);
    newer["revision"] = json!(before.revision + 1);
    newer["policy"]["settings"]["hedging"] = json!({ "afterMs": 100 });
    let meaning = json!({ "policy": newer["policy"]["settings"], "flags": newer["flags"]["settings"] });
    newer["contentHash"] = json!(canonical::content_hash(&meaning));
    world.edit::<ConfigMap>("booking-resilience", json!({ "data": { CONFIG_KEY: newer.to_string() } })).await;

    let _operator = world.operator().await;
    let after =
        world.until_document("booking", "this operator's document", |d| d.content_hash == before.content_hash).await;
    assert!(after.revision > before.revision + 1);
    workload.pods[0].until_it_runs("it", |running| running.content_hash == after.content_hash).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
}
