//! The Recovery objects: what they count for, what a person can do with them, and what becomes of them.

use crate::recovery_gates::in_order;
use crate::support::{
    World,
    cluster::{apply, object},
    recovery_policy,
    wait::within,
    world::{condition, message, phase, policy_conditions, says, steps_and_phases},
};
use crds::{Recovery, ResiliencePolicy, recovery::MAX_PER_WORKLOAD};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::{core::v1::Pod, policy::v1::PodDisruptionBudget};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// What a person writes to have something done.
fn asked_for(name: &str, spec: &Value) -> Value {
    let mut spec = spec.clone();
    spec["targetRef"] = json!({ "name": "booking" });
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "Recovery",
        "metadata": { "name": name }, "spec": spec,
    })
}

async fn until_phase(world: &World, name: &str, wanted: &str) -> Recovery {
    within(Duration::from_secs(60), &format!("{name} is {wanted}"), async || {
        let recovery = world.api::<Recovery>().get(name).await.unwrap();
        if phase(&recovery) == wanted { Ok(recovery) } else { Err(serde_json::to_string(&recovery).unwrap()) }
    })
    .await
}

/// The workload's pods may not be evicted, or may.
async fn allow_evictions(world: &World, pods: i32) {
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "booking" },
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": { "app": "booking" } } },
    });
    world.apply(&budget).await;
    let status = json!({ "status": {
        "observedGeneration": 1, "disruptionsAllowed": pods,
        "currentHealthy": 3, "desiredHealthy": 2, "expectedPods": 3,
    }});
    let api = world.api::<PodDisruptionBudget>();
    api.patch_status("booking", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_counts_for_a_policy_that_is_made_again_and_for_another_one() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["limits"]["budget"]["actions"] = json!(1);
    let (world, workload, _operator) = in_order(1, &policy).await;
    workload.pods[0].script().failing = true;
    world.until_recoveries("the only action is over", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
    for name in ["booking", "successor"] {
        world.delete(&json!({
            "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy", "metadata": { "name": "booking" },
        }))
        .await;
        policy["metadata"]["name"] = json!(name);
        world.apply(&policy).await;
        world.until_policy_says(name, "Ready", "True", "Programmed").await;
        workload.pods[0].script().failing = true;
        let held = world.until_policy_says(name, "RecoveryAllowed", "False", "BudgetExhausted").await;
        let recovery = held.status.unwrap().recovery.unwrap();
        assert_eq!(recovery.remaining_budget, Some(0), "{name}");
        let withheld = &recovery.withheld[0];
        assert_eq!(
            (withheld.reason.as_str(), withheld.pod.as_deref()),
            ("BudgetExhausted", Some(&*workload.pods[0].name))
        );
        assert!(withheld.until.is_some(), "it says until when: {withheld:?}");
        workload.pods[0].script().failing = false;
    }
    // A person who has looked at why so many were needed may forget them.
    world.api::<Recovery>().delete_collection(&DeleteParams::default(), &Default::default()).await.unwrap();
    workload.pods[0].script().failing = true;
    workload.pods[0].until_asked(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_deletes_is_not_done_and_comes_back_only_after_the_cooldown() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([{ "action": "RestartPod", "timeout": "90s" }]);
    policy["spec"]["recovery"]["limits"]["cooldown"] = json!("8s");
    let (world, workload, _operator) = in_order(3, &policy).await;
    allow_evictions(&world, 0).await;
    {
        let mut script = workload.pods[0].script();
        (script.failing, script.reset_helps) = (true, false);
    }
    let waiting =
        world.until_recoveries("the eviction waits", |all| steps_and_phases(all) == [("1/1", "Waiting")]).await;
    let first = waiting[0].clone();
    assert!(message(&first).contains("disruption budget"), "{}", message(&first));
    world.api::<Recovery>().delete(&first.name_any(), &DeleteParams::default()).await.unwrap();
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "Cooldown").await;
    assert!(world.recoveries().await.is_empty(), "it is not begun again at once");
    assert!(held.status.unwrap().recovery.unwrap().in_flight.is_empty());
    let again =
        world.until_recoveries("it is asked for again", |all| steps_and_phases(all) == [("1/1", "Waiting")]).await;
    assert_ne!(again[0].name_any(), first.name_any());
    allow_evictions(&world, 1).await;
    let _successor = {
        let pods = world.api::<Pod>();
        let gone = || async { pods.get_opt(&workload.pods[0].name).await.unwrap().is_none() };
        within(
            Duration::from_secs(30),
            "it is evicted",
            async || if gone().await { Ok(()) } else { Err(String::new()) },
        )
        .await;
        workload.new_pod(&world, true).await
    };
    world.until_recoveries("it succeeded", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_has_something_done_by_making_a_recovery() {
    let (world, workload, _operator) = in_order(3, &recovery_policy("booking", "booking")).await;
    let pod = &workload.pods[1];
    world.apply(&asked_for("by-hand", &json!({ "action": "ResetConnections", "pod": { "name": pod.name } }))).await;
    let done = until_phase(&world, "by-hand", "Succeeded").await;
    let status = done.status.clone().unwrap();
    assert_eq!(status.pod_uid, world.api::<Pod>().get(&pod.name).await.unwrap().uid(), "it says which pod that was");
    assert_eq!(pod.script().asked.len(), 1);
    world.until_events("by-hand", &["RecoveryStarted", "RecoverySucceeded"]).await;

    // It cannot be changed afterwards, and it says who is to be asked.
    let change = json!({ "spec": { "action": "RestartPod" } });
    let refused = world.api::<Recovery>().patch("by-hand", &PatchParams::default(), &Patch::Merge(&change)).await;
    assert!(refused.unwrap_err().to_string().contains("delete it and make another one"));
    let forged = asked_for(
        "forged",
        &json!({
            "action": "ResetConnections", "pod": { "name": pod.name }, "intent": "0123456789abcdef",
        }),
    );
    assert!(world.try_apply(&forged).await.unwrap_err().to_string().contains("leave it out"));
    let squatting =
        asked_for("booking-database-0123456789abcdef", &json!({ "action": "TrimMemory", "pod": { "name": "p" } }));
    assert!(world.try_apply(&squatting).await.unwrap_err().to_string().contains("choose another one"));

    // A restart is over when the pod that took the place is ready; disruption budgets hold for people, too.
    allow_evictions(&world, 0).await;
    let victim = &workload.pods[0];
    let restart =
        json!({ "action": "RestartPod", "pod": { "name": victim.name }, "requestedBy": "on call, ticket 4711" });
    world.apply(&asked_for("restart", &restart)).await;
    let waits = |one: &Recovery| one.name_any() == "restart" && message(one).contains("disruption budget");
    world.until_recoveries("it waits", |all| all.iter().any(waits)).await;
    allow_evictions(&world, 1).await;
    until_phase(&world, "restart", "Verifying").await;
    let successor = workload.new_pod(&world, true).await;
    let done = until_phase(&world, "restart", "Succeeded").await;
    assert_eq!(message(&done), "done; the pod that took the place is ready");
    let uid = world.api::<Pod>().get(&successor.name).await.unwrap().uid();
    assert_eq!(done.status.unwrap().successor, uid);
    assert!(world.api::<Pod>().get_opt(&victim.name).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_asks_for_in_vain_says_why() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let pod = &workload.pods[0].name;
    world.apply(&asked_for("early", &json!({ "action": "ResetConnections", "pod": { "name": pod } }))).await;
    let waits = until_phase(&world, "early", "Waiting").await;
    assert_eq!(message(&waits), "held back: no ResiliencePolicy is in force for Deployment booking; it waits for one");
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["limits"]["budget"]["actions"] = json!(1);
    world.apply(&policy).await;
    until_phase(&world, "early", "Succeeded").await;
    let absent = json!({ "action": "RestartPod", "pod": { "name": "no-such-pod" } });
    world.apply(&asked_for("absent", &absent)).await;
    let failed = until_phase(&world, "absent", "Failed").await;
    assert!(message(&failed).ends_with("has no pod no-such-pod"), "{}", message(&failed));
    world.apply(&asked_for("too-many", &json!({ "action": "ResetConnections", "pod": { "name": pod } }))).await;
    let held = until_phase(&world, "too-many", "Waiting").await;
    assert!(message(&held).starts_with("held back: 1 of 1 actions are used up"), "{}", message(&held));
    assert_eq!(workload.pods[0].script().asked.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_when_its_policy_goes_is_given_up_after_a_while() {
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"][0]["timeout"] = json!("10m");
    let (world, workload, _operator) = in_order(1, &policy).await;
    {
        let mut script = workload.pods[0].script();
        (script.failing, script.reset_helps) = (true, false);
    }
    world.until_recoveries("it is under way", |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
    world.delete(&policy).await;
    // Made again soon enough, it goes on with it.
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(steps_and_phases(&world.recoveries().await), [("1/1", "Verifying")]);
    world.delete(&policy).await;
    let given_up = within(Duration::from_secs(60), "it is given up", async || match &world.recoveries().await[..] {
        [one] if phase(one) == "Cancelled" => Ok(one.clone()),
        all => Err(format!("{all:?}")),
    })
    .await;
    assert_eq!(message(&given_up), "no policy recovers this workload any more");
    assert_eq!(workload.pods[0].script().asked.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_version_0_1_wrote_down_goes_on_as_recoveries() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    world.apply(&recovery_policy("booking", "booking")).await;
    let record = async |pod: usize, id: &str, outcome: &str, more: Value| {
        let name = &workload.pods[pod].name;
        let uid = world.api::<Pod>().get(name).await.unwrap().uid();
        let at = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let mut record = json!({
            "id": id, "target": "booking", "pod": name, "podUid": uid, "check": "database",
            "action": "ResetConnections", "step": 1, "steps": 1, "outcome": outcome,
            "failedAt": at, "startedAt": at, "dryRun": false,
        });
        record.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        record
    };
    let at = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
    let executed = record(0, "00000000000000aa", "Verifying", json!({ "actedAt": at })).await;
    let pending = record(1, "00000000000000bb", "Pending", json!({})).await;
    let over = record(1, "00000000000000cc", "Succeeded", json!({ "actedAt": at, "finishedAt": at })).await;
    let of_nobody = json!({ "id": "?", "target": "Not A Name", "check": "", "action": "Rollback", "step": 1, "steps": 1,
        "outcome": "Failed", "failedAt": at, "startedAt": at });
    let status = json!({ "status": { "recovery": { "inFlight": [executed, pending], "recent": [over, of_nobody] } } });
    let policies = world.api::<ResiliencePolicy>();
    policies.patch_status("booking", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    workload.pods[1].script().failing = true;

    let _operator = world.operator().await;
    let all = world
        .until_recoveries("all of it is over", |all| {
            steps_and_phases(all) == [("1/1", "Succeeded"), ("1/1", "Succeeded"), ("1/1", "Succeeded")]
        })
        .await;
    let ids: std::collections::BTreeSet<_> = all.iter().filter_map(|one| one.spec.intent.clone()).collect();
    assert_eq!(ids.into_iter().collect::<Vec<_>>(), ["00000000000000aa", "00000000000000bb", "00000000000000cc"]);
    assert!(workload.pods[0].script().asked.is_empty(), "what the old version executed is not executed again");
    let asked: Vec<_> = workload.pods[1].script().asked.iter().map(|asked| asked.intent_id.clone()).collect();
    assert_eq!(asked, ["00000000000000bb"], "what it had only intended is, under its id");
    let recovery = world
        .until_policy("booking", "its status names Recoveries", |policy| {
            let recovery = policy.status.as_ref().unwrap().recovery.clone().unwrap_or_default();
            recovery.recent.is_empty() && recovery.last.is_some_and(|last| last.recovery.is_some())
        })
        .await
        .status
        .unwrap()
        .recovery
        .unwrap();
    assert_eq!(recovery.remaining_budget, Some(17), "what the old version did counts");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_ledger_forgets_what_is_old_and_more_than_it_can_hold() {
    let (world, workload, _operator) = in_order(1, &recovery_policy("booking", "booking")).await;
    let made = async |name: &str, ago: SignedDuration| {
        world
            .apply(&asked_for(name, &json!({ "action": "ResetConnections", "pod": { "name": "gone", "uid": "gone" } })))
            .await;
        let at = (Timestamp::now() - ago).strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let status = json!({ "status": { "phase": "Succeeded", "executedAt": at, "finishedAt": at } });
        world.api::<Recovery>().patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    };
    let (hours, days) = (SignedDuration::from_hours(1), SignedDuration::from_hours(48));
    for number in 0..3 {
        made(&format!("old-{number}"), days).await;
    }
    made("fresh", hours).await;
    let names = |all: &[Recovery]| all.iter().map(ResourceExt::name_any).collect::<Vec<_>>();
    world.until_recoveries("only the fresh one is left", |all| names(all) == ["fresh"]).await;
    for number in 0..MAX_PER_WORKLOAD {
        made(&format!("more-{number}"), hours).await;
    }
    world.until_recoveries("no more than it can hold", |all| all.len() == MAX_PER_WORKLOAD).await;
    // And it works on.
    workload.pods[0].script().failing = true;
    workload.pods[0].until_asked(1).await;
    let policy = world.until_policy_says("booking", "Healthy", "True", "").await;
    assert!(says(policy_conditions(&policy), "Ready", "True", ""), "{:?}", condition(&policy, "Ready"));
}

/// A quota, a policy of the cluster or a missing right keeps the operator from making Recoveries.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_written_down_is_not_done_and_that_is_said() {
    let (world, workload, _operator) = in_order(1, &recovery_policy("booking", "booking")).await;
    let name = format!("no-recoveries-{}", world.namespace);
    let matches = json!({
        "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": world.namespace } },
        "resourceRules": [{
            "apiGroups": ["resilience.ticketwave.io"], "apiVersions": ["*"], "operations": ["CREATE"], "resources": ["recoveries"],
        }],
    });
    let denial = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": { "name": name },
        "spec": { "matchConstraints": matches, "validations": [{ "expression": "false", "message": "not tonight" }] },
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": { "name": name }, "spec": { "policyName": name, "validationActions": ["Deny"] },
    });
    for manifest in [&denial, &binding] {
        apply(&world.client, "", manifest).await.unwrap();
    }
    let (probe, tries) = (json!({ "action": "ResetConnections", "pod": { "name": "p" } }), AtomicU32::new(0));
    within(Duration::from_secs(30), "no Recovery can be made", async || {
        let name = format!("probe-{}", tries.fetch_add(1, Ordering::Relaxed));
        match world.try_apply(&asked_for(&name, &probe)).await {
            Err(error) if error.to_string().contains("not tonight") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    workload.pods[0].script().failing = true;
    world.until_events("booking", &["RecoveryWithheld"]).await;
    workload.pods[0].after_more_reports(2).await;
    assert!(workload.pods[0].script().asked.is_empty(), "nothing is done that is not written down");
    object(&world.client, "", &binding).delete(&name, &DeleteParams::default()).await.unwrap();
    workload.pods[0].until_asked(1).await;
}

/// A policy of two workloads: what is asked for one of them may not reach a pod of the other one.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_another_workload_is_not_touched_whatever_a_person_writes() {
    let world = World::new().await;
    let (_booking, payment) = (world.workload("booking", 2).await, world.workload("payment", 2).await);
    let _operator = world.operator().await;
    let mut policy = recovery_policy("booking", "booking");
    let target = |name: &str| json!({ "group": "apps", "kind": "Deployment", "name": name });
    policy["spec"]["targetRefs"] = json!([target("booking"), target("payment")]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let pod = &payment.pods[0].name;
    let uid = world.api::<Pod>().get(pod).await.unwrap().uid();
    for (name, action) in [("restart", "RestartPod"), ("reset", "ResetConnections")] {
        world.apply(&asked_for(name, &json!({ "action": action, "pod": { "name": pod, "uid": uid } }))).await;
        let failed = until_phase(&world, name, "Failed").await;
        assert!(message(&failed).contains("has no pod"), "{}", message(&failed));
    }
    let other = json!({ "action": "ResetConnections", "pod": { "name": pod, "uid": "another" } });
    let mut other = asked_for("other-uid", &other);
    other["spec"]["targetRef"]["name"] = json!("payment");
    world.apply(&other).await;
    until_phase(&world, "other-uid", "Failed").await;
    assert!(world.api::<Pod>().get_opt(pod).await.unwrap().is_some());
    assert!(payment.pods[0].script().asked.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_people_pile_up_is_refused_beyond_a_bound() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let restart = json!({ "action": "RestartPod", "pod": { "name": workload.pods[0].name } });
    for number in 0..55 {
        world.apply(&asked_for(&format!("restart-{number}"), &restart)).await;
    }
    let count = |all: &[Recovery], wanted: &str| all.iter().filter(|one| phase(one) == wanted).count();
    world.until_recoveries("five are refused", |all| (count(all, "Waiting"), count(all, "Failed")) == (50, 5)).await;
    // They keep nothing from being recovered.
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["limits"]["maxUnhealthy"] = json!(0);
    world.apply(&policy).await;
    workload.pods[0].script().failing = true;
    workload.pods[0].until_asked(1).await;
}
