//! Workloads and operators of different versions.

use crate::support::{
    World, policy, says,
    world::{condition, policy_conditions, request_ms},
};
use contract::{BulkheadSettings, CONFIG_KEY, DependencySettings, FallbackSettings, canonical};
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

/// It does with the policy what it did under an operator of its own version; nothing turns red with the operator's upgrade.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_version_0_1_is_in_sync_and_the_policy_says_what_it_does_otherwise() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    {
        let mut older = workload.pods[0].script();
        older.contract_version = 1;
        older.unsupported = vec!["policy.settings.dependencyPolicies".to_owned()];
    }
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    let policy = world
        .until_policy("booking", "both run it, and one of them is told of", |policy| {
            says(policy_conditions(policy), "Programmed", "True", "Programmed")
                && condition(policy, "Accepted").message.contains("1 of 2 pods are of an older version")
        })
        .await;
    assert!(says(policy_conditions(&policy), "Ready", "True", "Programmed"));
    let running = workload.pods[0].until_it_runs("it", |running| request_ms(running) == Some(5_000)).await;
    let filled_in = &running.policy.settings.dependencies["database"];
    assert_eq!((filled_in.timeout.per_try_ms, filled_in.retry.factor), (1_000, 2.0), "with every value in it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_judged_on_what_its_pods_have_built_in() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let payment = DependencySettings { fallback: vec![FallbackSettings::Queue], ..DependencySettings::default() };
    for pod in &workload.pods {
        let mut script = pod.script();
        let own = script.built_ins.as_mut().unwrap();
        own.dependencies.insert("payment".to_owned(), Some(payment.clone()));
        own.bulkheads.insert("critical".to_owned(), BulkheadSettings::default());
    }
    let _operator = world.operator().await;
    let mut manifest = policy("booking", "booking");
    manifest["spec"]["dependencies"] = json!([
        { "name": "database", "bulkheadRef": { "name": "critical" }, "timeout": { "request": "5s" } },
        { "name": "payment", "fallback": [], "bulkheadRef": { "name": "critcal" } },
    ]);
    world.apply(&manifest).await;
    let words = ["payment: fallback: [] switches off the built-in fallback Queue", "did you mean critical?"];
    let judged = world
        .until_policy("booking", "it says what the policy takes away", |policy| {
            words.iter().all(|word| condition(policy, "Accepted").message.contains(word))
        })
        .await;
    let message = &condition(&judged, "Accepted").message;
    assert_eq!(message.matches("warning: ").count(), 2, "{message}");
    assert!(says(policy_conditions(&judged), "Accepted", "True", "Accepted"));

    // One pod is asked, once, whatever else they report.
    for pod in &workload.pods {
        pod.after_more_reports(2).await;
    }
    let asked: Vec<_> = workload.pods.iter().map(|pod| pod.script().asked_for_built_ins).collect();
    assert_eq!(asked.iter().sum::<u32>(), 1, "{asked:?}");
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
