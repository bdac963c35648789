//! Two policies for one workload.

use crate::support::{
    World, eventually,
    manifests::policy_with_request,
    policy, says,
    world::{condition, policy_conditions, request_ms},
};
use kube::ResourceExt;

/// Creation times have whole seconds: waits for the next one.
async fn a_second_passes(world: &World, than: &str) {
    let made = world.policy(than).await.creation_timestamp().unwrap().0;
    eventually("the next second", async || {
        if jiff::Timestamp::now().as_second() > made.as_second() { Ok(()) } else { Err(String::new()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_policies_the_older_wins_and_the_younger_takes_over_when_it_goes() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let older = policy_with_request("zebra", "booking", "5s");
    world.apply(&older).await;
    a_second_passes(&world, "zebra").await;
    world.apply(&policy_with_request("aardvark", "booking", "6s")).await;

    let loser = world.until_policy_says("aardvark", "Accepted", "False", "Conflicted").await;
    let conditions = policy_conditions(&loser);
    assert!(says(conditions, "Stalled", "True", "Conflicted"), "{conditions:?}");
    assert!(says(conditions, "Ready", "False", "Conflicted"), "{conditions:?}");
    assert!(condition(&loser, "Accepted").message.contains("zebra"), "it says to whom it lost");
    let target = &loser.status.as_ref().unwrap().targets[0];
    assert!(!target.accepted && target.reason == "Conflicted");
    world.until_policy_says("zebra", "Ready", "True", "Programmed").await;
    let before = world.document("booking").await;
    assert_eq!(request_ms(&before), Some(5_000));

    world.delete(&older).await;
    world.until_policy_says("aardvark", "Ready", "True", "Programmed").await;
    let after = world.until_document("booking", "the younger's", |d| request_ms(d) == Some(6_000)).await;
    assert!(after.revision > before.revision);
    workload.pods[0].until_it_runs("the younger's", |running| request_ms(running) == Some(6_000)).await;
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_loses_one_of_its_targets_keeps_the_others() {
    let world = World::new().await;
    let (_booking, _catalog) = (world.workload("booking", 1).await, world.workload("catalog", 1).await);
    let _operator = world.operator().await;
    world.apply(&policy("older", "booking")).await;
    a_second_passes(&world, "older").await;
    let mut both = policy_with_request("younger", "booking", "6s");
    both["spec"]["targetRefs"]
        .as_array_mut()
        .unwrap()
        .push(serde_json::json!({"group": "apps", "kind": "Deployment", "name": "catalog"}));
    world.apply(&both).await;
    let younger = world.until_policy_says("younger", "Ready", "True", "Programmed").await;
    let accepted: Vec<_> =
        younger.status.unwrap().targets.into_iter().map(|target| (target.name, target.accepted)).collect();
    assert_eq!(accepted, [("booking".to_owned(), false), ("catalog".to_owned(), true)]);
    assert_eq!(request_ms(&world.document("booking").await), Some(5_000));
    assert_eq!(request_ms(&world.document("catalog").await), Some(6_000));
}
