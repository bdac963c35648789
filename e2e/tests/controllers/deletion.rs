//! Policies that go, and come again: what is published always moves forward.

use crate::support::{
    World,
    manifests::policy_with_request,
    policy, says,
    world::{policy_conditions, request_ms},
};
use contract::PolicySettings;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::DeleteParams;

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_policy_means_the_defaults_under_a_higher_revision() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let before = world.document("booking").await;

    world.delete(&policy("booking", "booking")).await;
    let after =
        world.until_document("booking", "the defaults", |d| d.policy.settings == PolicySettings::default()).await;
    assert!(after.revision > before.revision);
    assert!(after.policy.sources.is_empty(), "they come from no resource");
    for pod in &workload.pods {
        pod.until_it_runs("the defaults", |running| running.content_hash == after.content_hash).await;
    }
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_deleted_and_created_again_still_reaches_the_pods() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    for (edit, request) in ["5s", "6s", "7s"].into_iter().enumerate() {
        world.apply(&policy_with_request("booking", "booking", request)).await;
        let policy = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
        assert_eq!(policy.metadata.generation, Some(i64::try_from(edit).unwrap() + 1));
    }
    let before = world.document("booking").await;
    world.delete(&policy("booking", "booking")).await;
    world.apply(&policy_with_request("booking", "booking", "8s")).await;
    let again = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(again.metadata.generation, Some(1), "its generation starts over");
    let after = world.until_document("booking", "the new policy's", |d| request_ms(d) == Some(8_000)).await;
    assert!(after.revision > before.revision, "the pods' revision does not");
    workload.pods[0].until_it_runs("the new policy's", |running| request_ms(running) == Some(8_000)).await;
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_while_the_operator_was_down_is_undone_when_it_is_back() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let before = world.document("booking").await;
    operator.stop().await;

    world.delete(&policy("booking", "booking")).await;
    assert_eq!(world.document("booking").await, before, "nothing happens while nobody is there");
    let operator = world.operator().await;
    let after =
        world.until_document("booking", "the defaults", |d| d.policy.settings == PolicySettings::default()).await;
    assert!(after.revision > before.revision);
    workload.pods[0].until_it_runs("the defaults", |running| running.content_hash == after.content_hash).await;

    // And created again while it is down.
    operator.stop().await;
    world.apply(&policy_with_request("booking", "booking", "9s")).await;
    let _operator = world.operator().await;
    workload.pods[0].until_it_runs("the new policy", |running| request_ms(running) == Some(9_000)).await;
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_taken_out_of_a_policy_goes_back_to_the_defaults() {
    let world = World::new().await;
    let (booking, catalog) = (world.workload("booking", 1).await, world.workload("catalog", 1).await);
    let _operator = world.operator().await;
    world.apply(&policy("tickets", "booking")).await;
    world.until_policy_says("tickets", "Ready", "True", "Programmed").await;
    world.apply(&policy("tickets", "catalog")).await;
    catalog.pods[0].until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    booking.pods[0].until_it_runs("the defaults", |running| running.policy.settings == PolicySettings::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_deleted_and_created_again_is_programmed_anew() {
    let world = World::new().await;
    let first = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let before = world.document("booking").await;

    first.delete(&world).await;
    world.until_policy_says("booking", "Accepted", "False", "TargetNotFound").await;
    let second = world.workload("booking", 1).await;
    // What the old one owned is still there when the new one comes; then the garbage collector comes by.
    world
        .until_policy("booking", "it is found", |policy| !says(policy_conditions(policy), "Accepted", "False", ""))
        .await;
    world.api::<ConfigMap>().delete("booking-resilience", &DeleteParams::default()).await.unwrap();
    world.api::<Secret>().delete("booking-resilience-token", &DeleteParams::default()).await.unwrap();
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    second.pods[0].until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    assert!(world.document("booking").await.revision > before.revision);
}
