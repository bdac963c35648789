//! Pods of all kinds: not ready, unowned, without a token yet, slow, with invalid answers, gone.

use crate::support::FakePod;
use crate::support::{
    Behavior, World, eventually,
    fake_pod::annotations,
    policy, recovery_policy, says,
    workload::owned_by,
    world::{condition, policy_conditions, request_ms},
};
use k8s_openapi::api::core::v1::Secret;
use kube::api::PostParams;
use serde_json::json;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_not_ready_is_pushed_to_and_does_not_count() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let starting = workload.new_pod(&world, false).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    starting.until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    let done = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(done.status.unwrap().programmed.as_deref(), Some("1/1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unowned_pod_with_the_workloads_labels_is_never_contacted() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let labelled = workload.unowned_pod(&world).await;
    // It names our ReplicaSet, but another one than there is; or an owner of another kind.
    let unreal = "00000000-0000-0000-0000-000000000000";
    let wrong_uid = FakePod::start(&world, "booking", owned_by("ReplicaSet", "booking-1", unreal), true).await;
    let direct = FakePod::start(&world, "booking", owned_by("Deployment", "booking", &workload.uid), true).await;
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    let done = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(done.status.unwrap().programmed.as_deref(), Some("1/1"), "they do not count");
    workload.pods[0].after_more_reports(2).await;
    for pod in [&labelled, &wrong_uid, &direct] {
        let script = pod.script();
        assert_eq!((script.requests, script.reports), (0, 0), "{} was contacted", pod.name);
        assert!(script.tokens_seen.is_empty(), "{} was shown a token", pod.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_its_token_gets_a_mount_refresh_and_then_succeeds() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    workload.pods[0].script().behavior = Behavior::NoTokenYet;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    let wanted = "resilience.ticketwave.io/mounts-wanted-at";
    eventually("the pod is annotated", async || {
        let found = annotations(&world, &workload.pods[0]).await;
        if found.contains_key(wanted) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let partial = world
        .until_policy("booking", "it says why", |policy| {
            condition(policy, "Programmed").message.contains("does not take the operator's token")
        })
        .await;
    assert!(says(policy_conditions(&partial), "Programmed", "False", "PartiallyProgrammed"));
    assert!(!annotations(&world, &workload.pods[1]).await.contains_key(wanted), "the other one needs none");

    workload.pods[0].script().behavior = Behavior::Correct;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_of_our_name_that_somebody_else_made_is_left_as_it_is() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let name = contract::token_secret_name(contract::WorkloadKind::Deployment, "booking");
    let theirs = json!({ "metadata": { "name": name }, "stringData": { "current": "a secret of somebody else" } });
    let secrets = world.api::<Secret>();
    let made = secrets.create(&PostParams::default(), &serde_json::from_value(theirs).unwrap()).await.unwrap();
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.document("booking").await;
    eventually("the pod is asked, and shown no token of theirs", async || {
        let script = workload.pods[0].script();
        if script.requests >= 3 { Ok(script.tokens_seen.clone()) } else { Err(script.requests.to_string()) }
    })
    .await;
    assert!(!workload.pods[0].script().tokens_seen.contains("a secret of somebody else"));
    let now = secrets.get(&name).await.unwrap();
    assert_eq!((now.data, now.metadata.resource_version), (made.data, made.metadata.resource_version), "not touched");
    world
        .until_policy("booking", "it says that the token is missing", |policy| {
            says(policy_conditions(policy), "Programmed", "False", "PartiallyProgrammed")
                && condition(policy, "Programmed").message.contains("token")
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_does_not_answer_is_named_and_nothing_is_done_to_it() {
    let world = World::new().await;
    let mut workload = world.workload("booking", 2).await;
    workload.pods[0].go_silent();
    workload.pods[0].script().failing = true;
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    let partial = world
        .until_policy("booking", "it is named as unreachable", |policy| {
            condition(policy, "Programmed").message.contains("cannot be reached")
                && policy.status.as_ref().unwrap().programmed.as_deref() == Some("1/2")
        })
        .await;
    assert!(says(policy_conditions(&partial), "Programmed", "False", "PartiallyProgrammed"));
    assert!(condition(&partial, "Programmed").message.contains(&workload.pods[0].name));
    workload.pods[1].after_more_reports(3).await;
    let status = world.policy("booking").await.status.unwrap();
    assert_eq!(status.targets[0].pods_unreachable, 1);
    let recovery = status.recovery.unwrap();
    assert!(recovery.in_flight.is_empty() && recovery.last.is_none(), "{recovery:?}");
    assert!(world.recoveries().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_never_answered_are_asked_ever_more_rarely_and_not_reconciled_over_each_time() {
    const SILENT: usize = 10;
    /// Reports of the pod that answers, which is asked every second.
    const REPORTS: u64 = 15;
    let world = World::new().await;
    let mut workload = world.workload("booking", 1 + SILENT).await;
    for pod in &mut workload.pods[1..] {
        pod.go_silent();
    }
    let operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world
        .until_policy("booking", "they are counted", |policy| {
            let target = policy.status.as_ref().and_then(|status| status.targets.first());
            target.is_some_and(|target| target.pods_unreachable == i32::try_from(SILENT).unwrap())
        })
        .await;
    let counts = async || {
        let metrics = ["workload", "policy"]
            .map(|kind| format!("resilience_operator_reconciliations_total{{kind=\"{kind}\",result=\"ok\"}}"));
        let missed = "resilience_operator_pod_calls_total{call=\"health\",result=\"unreachable\"}";
        let [workloads, policies] = [operator.metric(&metrics[0]).await, operator.metric(&metrics[1]).await];
        (workloads, policies, operator.metric(missed).await)
    };
    let before = counts().await;
    workload.pods[0].after_more_reports(REPORTS).await;
    let after = counts().await;
    let (workloads, policies, misses) = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
    let silent = SILENT as u64;
    assert!(workloads + policies < silent, "{workloads} and {policies} reconciles over pods that do not answer");
    assert!((2 * silent..silent * REPORTS / 2).contains(&misses), "{misses} questions without an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_pods_and_pods_with_invalid_answers_delay_no_other() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    workload.pods[0].script().behavior = Behavior::Slow;
    workload.pods[1].script().behavior = Behavior::Garbage;
    let _operator = world.operator().await;
    world.apply(&policy("warm-up", "booking")).await;
    workload.pods[2].until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    let begin = Instant::now();
    world.apply(&crate::support::manifests::policy_with_request("warm-up", "booking", "6s")).await;
    workload.pods[2].until_it_runs("the edit", |running| request_ms(running) == Some(6_000)).await;
    assert!(begin.elapsed() < Duration::from_secs(2), "it waited for the slow one: {:?}", begin.elapsed());
    let partial = world
        .until_policy("warm-up", "both are named", |policy| {
            let words = &condition(policy, "Programmed").message;
            words.contains("no answer from its admin port within") && words.contains("invalid response")
        })
        .await;
    assert_eq!(partial.status.unwrap().programmed.as_deref(), Some("1/3"));

    workload.pods[0].script().behavior = Behavior::Correct;
    workload.pods[1].script().behavior = Behavior::Correct;
    let done = world.until_policy_says("warm-up", "Ready", "True", "Programmed").await;
    assert_eq!(done.status.unwrap().programmed.as_deref(), Some("3/3"));
}
