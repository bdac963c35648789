//! The token does not travel: requests are signed, but for pods of version 0.1.

use crate::support::{FakePod, World, policy, recovery_policy, world::request_ms};

/// Whether a request to the pod ever carried a token.
fn saw_a_token(pod: &FakePod) -> bool {
    pod.script().tokens_seen.iter().any(|token| !token.is_empty())
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_understand_signatures_never_see_the_token() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let annotated = workload.new_pod_of(&world, None, true).await;
    // Its annotation was lost; it says what it understands in its answers.
    let advertising = workload.new_pod(&world, true).await;
    advertising.script().signs = true;
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    let done = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(done.status.unwrap().programmed.as_deref(), Some("3/3"));
    for pod in [&annotated, &advertising] {
        pod.script().failing = true;
        pod.until_asked(1).await;
        pod.after_more_reports(2).await;
        let script = pod.script();
        // A push, an action and reports.
        assert!(script.running.is_some() && script.signed_requests >= 4, "{}", script.signed_requests);
        drop(script);
        assert!(!saw_a_token(pod), "{} was shown a token", pod.name);
    }
    let script = annotated.script();
    assert_eq!(script.requests, script.signed_requests, "each is taken at the first try");
    drop(script);
    assert!(saw_a_token(&workload.pods[0]), "a pod of version 0.1 takes nothing else");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_the_annotation_never_sees_the_token_whatever_it_answers() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    // Somebody else answers at its address, or it was rolled back in place: it refuses signatures and does not advertise.
    let annotated = workload.new_pod_of(&world, None, true).await;
    annotated.script().signs = false;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    workload.pods[0].until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    world
        .until_policy("booking", "it is told apart", |policy| {
            policy.status.as_ref().unwrap().programmed.as_deref() == Some("1/2")
        })
        .await;
    let before = annotated.script().requests;
    workload.pods[0].after_more_reports(3).await;
    assert!(annotated.script().requests > before, "it is asked again");
    assert!(!saw_a_token(&annotated) && annotated.script().running.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_once_took_a_signature_is_not_talked_into_the_token() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let pod = &workload.pods[0];
    pod.script().signs = true;
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    pod.after_more_reports(1).await;
    pod.script().signs = false;
    let before = pod.script().requests;
    crate::support::eventually("it is asked again", async || {
        let requests = pod.script().requests;
        if requests >= before + 3 { Ok(()) } else { Err(requests.to_string()) }
    })
    .await;
    assert!(!saw_a_token(pod));
}
