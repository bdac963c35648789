//! The ConfigMap is edited or deleted by hand, and repaired.

use crate::support::{
    World, flag_set,
    manifests::policy_with_request,
    policy, says,
    workload::Workload,
    world::{condition, policy_conditions, request_ms},
};
use contract::{CONFIG_KEY, RuntimeConfig, config_map_name};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use serde_json::json;

const MAP: &str = "booking-resilience";

/// A workload of one pod that runs a policy.
async fn programmed() -> (World, Workload, crate::support::operator::Operator, RuntimeConfig) {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let document = world.document("booking").await;
    (world, workload, operator, document)
}

/// The document is there again, newer and with the old meaning, and the pod runs it.
async fn repaired(world: &World, workload: &Workload, before: &RuntimeConfig) {
    let what = "the ConfigMap is repaired";
    let after = world
        .until_document("booking", what, |d| d.content_hash == before.content_hash && d.revision > before.revision)
        .await;
    assert_eq!(request_ms(&after), request_ms(before));
    workload.pods[0].until_it_runs("what was live", |running| running.content_hash == before.content_hash).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let map = world.config_map("booking").await.unwrap();
    assert_eq!(map.labels()["app.kubernetes.io/managed-by"], "resilience-operator");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_by_hand_is_undone() {
    let (world, workload, _operator, before) = programmed().await;
    let text = String::from_utf8(before.to_bytes().unwrap()).unwrap();
    for edited in [text.replace("\"requestMs\":5000", "\"requestMs\":1"), "{}".to_owned(), "not even JSON".to_owned()] {
        assert_ne!(edited, text);
        let before = world.document("booking").await;
        world.edit::<ConfigMap>(MAP, json!({ "data": { CONFIG_KEY: edited } })).await;
        repaired(&world, &workload, &before).await;
    }
    let before = world.document("booking").await;
    world.edit::<ConfigMap>(MAP, json!({ "data": { CONFIG_KEY: null } })).await;
    repaired(&world, &workload, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sound_document_that_somebody_else_wrote_is_undone_too() {
    let (world, workload, _operator, before) = programmed().await;
    let mut forged = before.clone();
    forged.policy.settings.dependencies.get_mut("database").unwrap().timeout.request_ms = 1;
    let forged = RuntimeConfig::new(forged.workload, before.revision + 1, forged.policy, forged.flags);
    let forged = String::from_utf8(forged.to_bytes().unwrap()).unwrap();
    world.edit::<ConfigMap>(MAP, json!({ "data": { CONFIG_KEY: forged } })).await;
    repaired(&world, &workload, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_by_hand_it_is_made_again() {
    let (world, workload, _operator, before) = programmed().await;
    world.api::<ConfigMap>().delete(MAP, &Default::default()).await.unwrap();
    repaired(&world, &workload, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_removed_by_hand_is_put_back() {
    let (world, workload, _operator, before) = programmed().await;
    let label = json!({ "metadata": { "labels": { "app.kubernetes.io/managed-by": null } } });
    world.edit::<ConfigMap>(MAP, label).await;
    repaired(&world, &workload, &before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_far_in_the_future_is_brought_back_within_the_pods_reach() {
    let (world, workload, _operator, before) = programmed().await;
    let forged = RuntimeConfig { revision: i64::MAX - 1, ..before.clone() };
    let forged = String::from_utf8(forged.to_bytes().unwrap()).unwrap();
    world.edit::<ConfigMap>(MAP, json!({ "data": { CONFIG_KEY: forged } })).await;
    let now = jiff::Timestamp::now().as_millisecond();
    world
        .until_document("booking", "a revision of today", |d| d.revision < now + 60_000 && d.revision > before.revision)
        .await;
    // The pods take what comes next.
    world.apply(&policy_with_request("booking", "booking", "7s")).await;
    workload.pods[0].until_it_runs("the next edit", |running| request_ms(running) == Some(7_000)).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_that_is_not_ours_is_never_touched_and_holds_nobody_else_up() {
    let world = World::new().await;
    let (_booking, catalog) = (world.workload("booking", 1).await, world.workload("catalog", 1).await);
    let not_ours = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": config_map_name(contract::WorkloadKind::Deployment, "booking"), "labels": { "app.kubernetes.io/managed-by": "somebody" } },
        "data": { CONFIG_KEY: "mine" },
    });
    world.apply(&not_ours).await;
    let before = world.config_map("booking").await.unwrap();
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.apply(&policy("catalog", "catalog")).await;

    let held = world.until_policy_says("booking", "Programmed", "False", "ConfigMapNotOurs").await;
    assert!(says(policy_conditions(&held), "Stalled", "True", "ConfigMapNotOurs"));
    let words = &condition(&held, "Programmed").message;
    assert!(words.contains(MAP) && words.contains("rename or delete it"), "{words}");
    world.until_events("booking", &["ConfigMapNotOurs"]).await;
    world.until_policy_says("catalog", "Ready", "True", "Programmed").await;
    catalog.pods[0].until_it_runs("its own policy", |running| request_ms(running) == Some(5_000)).await;
    assert_eq!(world.config_map("booking").await.unwrap(), before, "not a byte of it changed");

    world.delete(&not_ours).await;
    let document = world.document("booking").await;
    assert_eq!(request_ms(&document), Some(5_000));
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_suspended_policy_keeps_live_survives_an_edit_by_hand() {
    let (world, workload, _operator, before) = programmed().await;
    let mut frozen = policy_with_request("booking", "booking", "9s");
    frozen["spec"]["suspend"] = json!(true);
    world.apply(&frozen).await;
    world.until_policy_says("booking", "Programmed", "True", "Suspended").await;
    assert_eq!(world.document("booking").await, before, "what is live stays");

    world.edit::<ConfigMap>(MAP, json!({ "data": { CONFIG_KEY: "oops" } })).await;
    let after =
        world.until_document("booking", "what was live is back", |d| d.content_hash == before.content_hash).await;
    world.api::<ConfigMap>().delete(MAP, &Default::default()).await.unwrap();
    world
        .until_document("booking", "again", |d| d.content_hash == before.content_hash && d.revision > after.revision)
        .await;

    // Flags go their own way meanwhile.
    world.apply(&flag_set("flags", "booking")).await;
    let running = workload.pods[0]
        .until_it_runs("the flags", |running| running.flags.settings.flags.contains_key("EnablePdf"))
        .await;
    assert_eq!(request_ms(&running), Some(5_000));

    frozen["spec"]["suspend"] = json!(false);
    world.apply(&frozen).await;
    workload.pods[0].until_it_runs("what the policy says now", |running| request_ms(running) == Some(9_000)).await;
    workload.assert_revisions_grow();
}
