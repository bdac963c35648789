//! A StatefulSet is a workload as a Deployment is: what it is called, whose its pods are, and how one of them is replaced.

use crate::support::{
    FakePod, World,
    api_proxy::ApiProxy,
    audit::operator_writes,
    eventually, flag_set,
    manifests::policy_with_request,
    operator::Operator,
    policy, recovery_policy, says,
    workload::owned_by,
    world::{policy_conditions, request_ms, steps_and_phases},
};
use contract::{CONFIG_KEY, RuntimeConfig, WorkloadKind};
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    ResourceExt,
    api::{DeleteParams, Preconditions},
};
use serde_json::{Value, json};

/// The manifest with a StatefulSet as its target.
fn aimed_at_set(mut manifest: Value) -> Value {
    manifest["spec"]["targetRefs"][0]["kind"] = json!("StatefulSet");
    manifest
}

fn rolling() -> Value {
    json!({ "type": "RollingUpdate" })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stateful_set_is_programmed_under_names_of_its_own() {
    let world = World::new().await;
    let set = world.stateful_set("booking", 2, rolling()).await;
    // Neither its labels nor the name of its owner make a pod its own.
    let unreal = "00000000-0000-0000-0000-000000000000";
    let other = FakePod::start(&world, "booking", owned_by("StatefulSet", "booking", unreal), true).await;
    let _operator = world.operator().await;
    world.apply(&aimed_at_set(policy("booking", "booking"))).await;
    world.apply(&aimed_at_set(flag_set("flags", "booking"))).await;
    let done = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    let target = &done.status.as_ref().unwrap().targets[0];
    assert_eq!((target.kind.as_str(), target.name.as_str()), ("StatefulSet", "booking"));
    assert_eq!((target.pods, target.pods_in_sync), (2, 2));

    for pod in &set.pods {
        let running = pod
            .until_it_runs("policy and flags", |running| {
                request_ms(running) == Some(5_000) && running.flags.settings.flags.contains_key("EnablePdf")
            })
            .await;
        assert_eq!((running.workload.kind, running.workload.name.as_str()), (WorkloadKind::StatefulSet, "booking"));
    }
    let map = world.api::<ConfigMap>().get("booking-resilience-statefulset").await.unwrap();
    let secret = world.api::<Secret>().get("booking-resilience-token-statefulset").await.unwrap();
    for owners in [map.owner_references(), secret.owner_references()] {
        assert_eq!((owners[0].kind.as_str(), owners[0].uid.as_str()), ("StatefulSet", set.uid.as_str()));
    }
    let (document, _) = RuntimeConfig::parse(map.data.unwrap()[CONFIG_KEY].as_bytes()).unwrap();
    assert_eq!(document.workload.kind, WorkloadKind::StatefulSet);
    assert!(world.config_map("booking").await.is_none(), "nothing is written under a Deployment's name");
    let script = other.script();
    assert_eq!((script.requests, script.tokens_seen.len()), (0, 0), "a pod of another owner is never contacted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_and_a_stateful_set_of_one_name_share_nothing() {
    let world = World::new().await;
    let deployment = world.workload("booking", 1).await;
    let set = world.stateful_set("booking", 1, rolling()).await;
    let _operator = world.operator().await;
    world.apply(&policy_with_request("for-the-deployment", "booking", "6s")).await;
    world.apply(&aimed_at_set(policy_with_request("for-the-set", "booking", "7s"))).await;
    // Neither has taken the other's target.
    for name in ["for-the-deployment", "for-the-set"] {
        let done = world.until_policy_says(name, "Ready", "True", "Programmed").await;
        assert_eq!(done.status.unwrap().programmed.as_deref(), Some("1/1"), "{name}");
    }
    let (one, other) = (&deployment.pods[0], &set.pods[0]);
    one.until_it_runs("the Deployment's policy", |running| request_ms(running) == Some(6_000)).await;
    other.until_it_runs("the StatefulSet's policy", |running| request_ms(running) == Some(7_000)).await;
    let token = |name: String| {
        let secrets = world.api::<Secret>();
        async move { secrets.get(&name).await.unwrap().data.unwrap().remove("current").unwrap().0 }
    };
    let tokens = [WorkloadKind::Deployment, WorkloadKind::StatefulSet]
        .map(|kind| token(contract::token_secret_name(kind, "booking")));
    let [for_deployment, for_set] = futures::future::join_all(tokens).await.try_into().unwrap();
    assert_ne!(for_deployment, for_set);
    let shown = |pod: &FakePod, token: &[u8]| pod.script().tokens_seen.contains(std::str::from_utf8(token).unwrap());
    assert!(shown(one, &for_deployment) && !shown(one, &for_set));
    assert!(shown(other, &for_set) && !shown(other, &for_deployment));

    // An edit of one leaves the other alone.
    let before = one.script().puts;
    world.apply(&aimed_at_set(policy_with_request("for-the-set", "booking", "8s"))).await;
    other.until_it_runs("the edit", |running| request_ms(running) == Some(8_000)).await;
    one.after_more_reports(2).await;
    let script = one.script();
    assert_eq!((script.puts, script.running.as_ref().and_then(request_ms)), (before, Some(6_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_evicts_by_uid_and_the_pod_of_the_same_name_is_judged_as_successor() {
    let world = World::new().await;
    let set = world.stateful_set("booking", 3, rolling()).await;
    let _operator = world.operator().await;
    let mut policy = aimed_at_set(recovery_policy("booking", "booking"));
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([{ "action": "RestartPod", "timeout": "90s" }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let old = world.api::<Pod>().get("booking-1").await.unwrap().uid().unwrap();
    {
        let mut script = set.pods[1].script();
        (script.failing, script.reset_helps) = (true, false);
    }
    eventually("booking-1 is evicted", async || match world.api::<Pod>().get_opt("booking-1").await.unwrap() {
        None => Ok(()),
        Some(_) => Err(String::new()),
    })
    .await;

    // Its successor fails at first: it is of the same name, and not taken for the pod that was evicted.
    let successor = set.new_pod(&world, 1).await;
    successor.script().failing = true;
    let new = world.api::<Pod>().get("booking-1").await.unwrap().uid().unwrap();
    assert_ne!(old, new);
    successor.until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    successor.after_more_reports(3).await;
    let all = world
        .until_recoveries("as long as it fails, nothing has succeeded", |all| {
            steps_and_phases(all) == [("1/1", "Verifying")]
        })
        .await;
    assert_eq!(all[0].spec.pod.as_ref().unwrap().name, "booking-1");
    successor.script().failing = false;
    world.until_recoveries("the restart succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;

    // The eviction named the old pod's uid: asked again for it, the API server refuses.
    let evictions = operator_writes(&world.cluster, &[&world.namespace]);
    let evictions: Vec<_> = evictions.iter().filter(|one| one.resource == "pods/eviction").collect();
    assert_eq!(evictions.iter().map(|one| (one.name.as_str(), one.code)).collect::<Vec<_>>(), [("booking-1", 201)]);
    let preconditions = Some(Preconditions { uid: Some(old), resource_version: None });
    let again = DeleteParams { preconditions, ..DeleteParams::default() };
    assert!(world.api::<Pod>().delete("booking-1", &again).await.is_err(), "the successor has another uid");
    assert_eq!(world.api::<Pod>().get("booking-1").await.unwrap().uid().unwrap(), new);
    for pod in [&set.pods[0], &set.pods[2]] {
        assert!(world.api::<Pod>().get_opt(&pod.name).await.unwrap().is_some(), "{} is left alone", pod.name);
    }
}

/// Somebody deletes the pod while the request to evict it is on its way.
#[tokio::test(flavor = "multi_thread")]
async fn an_eviction_that_lands_late_does_not_hit_the_successor_of_the_same_name() {
    let world = World::new().await;
    let set = world.stateful_set("booking", 3, rolling()).await;
    let proxy = ApiProxy::start(&world).await;
    let _operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    let mut policy = aimed_at_set(recovery_policy("booking", "booking"));
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([{ "action": "RestartPod", "timeout": "90s" }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    proxy.hold(Some(|call| call.path.contains("/eviction")));
    set.pods[1].script().failing = true;
    eventually("the eviction is on its way", async || {
        let asked = proxy.calls().iter().any(|call| call.path.contains("/booking-1/eviction"));
        if asked { Ok(()) } else { Err(String::new()) }
    })
    .await;
    set.pods[1].delete(&world).await;
    let successor = set.new_pod(&world, 1).await;
    let uid = world.api::<Pod>().get("booking-1").await.unwrap().uid();
    proxy.hold(None);
    successor.until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    world.until_recoveries("the restart succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    assert_eq!(world.api::<Pod>().get("booking-1").await.unwrap().uid(), uid, "it is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn partition_and_on_delete_are_said_and_are_no_rollout() {
    let world = World::new().await;
    let partitioned = json!({ "type": "RollingUpdate", "rollingUpdate": { "partition": 2 } });
    let booking = world.stateful_set("booking", 3, partitioned).await;
    let catalog = world.stateful_set("catalog", 2, json!({ "type": "OnDelete" })).await;
    booking.has_updated(&world, 1, 3).await;
    catalog.has_updated(&world, 0, 2).await;
    let _operator = world.operator().await;
    let expected = [("booking", "partition"), ("catalog", "OnDelete")];
    for (name, word) in expected {
        world.apply(&aimed_at_set(recovery_policy(name, name))).await;
        let done = world
            .until_policy(name, "it says how its pods are replaced", |policy| {
                let message = policy.status.as_ref().unwrap().targets.first().and_then(|one| one.message.clone());
                message.is_some_and(|message| message.contains(word))
                    && says(policy_conditions(policy), "Ready", "True", "Programmed")
            })
            .await;
        assert!(says(policy_conditions(&done), "RecoveryAllowed", "True", ""), "{:?}", policy_conditions(&done));
    }
    // What is left alone on purpose holds no recovery back; what is being replaced does.
    booking.pods[0].script().failing = true;
    booking.pods[0].until_asked(1).await;
    let one_more = json!({ "spec": { "updateStrategy": { "rollingUpdate": { "partition": 1 } } } });
    world.edit::<StatefulSet>("booking", one_more).await;
    booking.has_updated(&world, 1, 3).await;
    booking.pods[1].script().failing = true;
    world.until_policy_says("booking", "RecoveryAllowed", "False", "RolloutInProgress").await;
    assert!(booking.pods[1].script().asked.is_empty());
    booking.has_updated(&world, 2, 3).await;
    booking.pods[1].until_asked(1).await;
    world.until_policy_says("booking", "RecoveryAllowed", "True", "").await;
}
