//! A policy on its way: applied, published, pushed, acknowledged, said.

use crate::support::{
    World,
    audit::operator_writes,
    eventually, flag_set,
    manifests::policy_with_request,
    policy, says,
    world::{condition, policy_conditions, request_ms},
};
use contract::{DependencyPolicy, TimeoutPolicy};
use crds::ResiliencePolicy;
use futures::StreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_published_pushed_acknowledged_and_said_so() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let statuses = Arc::new(Mutex::new(Vec::new()));
    let watching = tokio::spawn({
        let (api, statuses) = (world.api::<ResiliencePolicy>(), Arc::clone(&statuses));
        async move {
            let mut events = watcher(api, watcher::Config::default()).boxed();
            while let Some(event) = events.next().await {
                if let Ok(Event::Apply(policy)) = event {
                    statuses.lock().unwrap().push(policy);
                }
            }
        }
    });
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;

    let done = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let status = done.status.clone().unwrap();
    assert_eq!(status.programmed.as_deref(), Some("2/2"));
    assert_eq!(status.observed_generation, done.metadata.generation);
    for (type_, expected) in [
        ("Programmed", "True"),
        ("Accepted", "True"),
        ("Reconciling", "False"),
        ("Stalled", "False"),
        ("Healthy", "True"),
    ] {
        assert!(says(&status.conditions, type_, expected, ""), "{type_}: {:?}", status.conditions);
        assert_eq!(condition(&done, type_).observed_generation, done.metadata.generation);
    }
    // Valid, and still worth a word: 4 tries of 1 s with 1.4 s of waiting are more than 5 s.
    let words = &condition(&done, "Accepted").message;
    assert!(words.starts_with("valid") && words.contains("warning: database: 4 tries"), "{words}");

    let map = world.config_map("booking").await.unwrap();
    let owner = &map.metadata.owner_references.as_ref().unwrap()[0];
    assert_eq!(
        (owner.kind.as_str(), owner.uid.as_str(), owner.controller),
        ("Deployment", workload.uid.as_str(), Some(true))
    );
    let document = world.document("booking").await;
    assert_eq!(request_ms(&document), Some(5_000));
    assert_eq!(status.targets[0].revision, Some(document.revision));
    assert_eq!(status.targets[0].content_hash.as_deref(), Some(document.content_hash.as_str()));
    for pod in &workload.pods {
        let running = pod.script().running.clone().unwrap();
        assert_eq!(running, document, "pods run exactly what is published");
    }
    // The ConfigMap comes first: a pod that starts in between finds what the others were pushed.
    let writes = operator_writes(&world.cluster, &[&world.namespace]);
    assert_eq!(writes.iter().filter(|write| write.resource == "configmaps").count(), 1, "{writes:?}");
    world.until_events("booking", &["Programmed"]).await;

    watching.abort();
    let statuses = statuses.lock().unwrap();
    let written: Vec<_> = statuses.iter().filter(|policy| policy.status.is_some()).collect();
    assert!(!written.is_empty());
    for policy in written {
        for type_ in ["Ready", "Reconciling", "Stalled", "Accepted", "Programmed"] {
            assert!(policy_conditions(policy).iter().any(|one| one.type_ == type_), "{type_} is missing at first");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_waits_for_its_target_and_goes_on_when_it_appears() {
    let world = World::new().await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    let waiting = world.until_policy_says("booking", "Accepted", "False", "TargetNotFound").await;
    let conditions = policy_conditions(&waiting);
    assert!(says(conditions, "Ready", "False", ""), "{conditions:?}");
    assert!(says(conditions, "Reconciling", "True", ""), "it waits, and nobody has to do anything: {conditions:?}");
    assert!(says(conditions, "Stalled", "False", ""), "{conditions:?}");
    assert!(condition(&waiting, "Accepted").message.contains("booking"));
    assert!(world.config_map("booking").await.is_none());

    let workload = world.workload("booking", 1).await;
    let found = world
        .until_policy("booking", "its pod runs it", |p| {
            p.status.as_ref().is_some_and(|s| s.programmed.as_deref() == Some("1/1"))
        })
        .await;
    assert!(says(policy_conditions(&found), "Accepted", "True", "Accepted"));
    assert_eq!(request_ms(&workload.pods[0].script().running.clone().unwrap()), Some(5_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_pods_a_policy_is_programmed_all_the_same() {
    let world = World::new().await;
    let _operator = world.operator().await;
    world.workload("booking", 0).await;
    world.apply(&policy("booking", "booking")).await;
    let done = world.until_policy_says("booking", "Programmed", "True", "NoPods").await;
    assert!(says(policy_conditions(&done), "Ready", "True", "NoPods"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_edited_while_it_is_rolled_out_ends_with_the_last_edit_everywhere() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    let _operator = world.operator().await;
    for seconds in 5..=20 {
        world.apply(&policy_with_request("booking", "booking", &format!("{seconds}s"))).await;
        if seconds == 12 {
            // Some edits come in a burst, some while an earlier one is on its way to the pods.
            workload.pods[0].until_it_runs("anything", |_| true).await;
        }
    }
    let done = world.until_policy("booking", "all pods run the last edit", |policy| {
        says(policy_conditions(policy), "Ready", "True", "Programmed")
            && policy.status.as_ref().is_some_and(|status| status.programmed.as_deref() == Some("3/3"))
    });
    done.await;
    for pod in &workload.pods {
        assert_eq!(request_ms(pod.script().running.as_ref().unwrap()), Some(20_000));
    }
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_what_means_nothing_publishes_nothing() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let mut manifest = policy("booking", "booking");
    world.apply(&manifest).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let before = world.document("booking").await;

    // 5 s said otherwise: another generation, the same meaning.
    manifest["spec"]["dependencies"][0]["timeout"]["request"] = "5000ms".into();
    world.apply(&manifest).await;
    let after = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(after.metadata.generation, Some(2));
    assert_eq!(world.document("booking").await.revision, before.revision);
    assert_eq!(workload.pods[0].script().pushes.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_starts_later_is_brought_up_to_date() {
    let world = World::new().await;
    let mut workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let late = workload.new_pod(&world, true).await;
    late.until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    workload.pods.push(late);
    world
        .until_policy("booking", "both pods count", |p| {
            p.status.as_ref().is_some_and(|s| s.programmed.as_deref() == Some("2/2"))
        })
        .await;
    workload.pods[0].delete(&world).await;
    eventually("the pod that is gone does not count any more", async || {
        let programmed = world.policy("booking").await.status.unwrap_or_default().programmed;
        if programmed.as_deref() == Some("1/1") { Ok(()) } else { Err(format!("{programmed:?}")) }
    })
    .await;
}

/// A policy of which the dependency has these members beside its name.
fn policy_of(dependency: &Value) -> Value {
    let mut manifest = policy("booking", "booking");
    manifest["spec"]["dependencies"] = json!([dependency]);
    manifest["spec"]["dependencies"][0]["name"] = json!("database");
    manifest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_says_only_what_it_says_and_a_contradiction_is_told_with_values_that_work() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&policy_of(&json!({ "timeout": { "request": "5s" } }))).await;
    let programmed = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(condition(&programmed, "Accepted").message, "valid", "nothing is missing and nothing is too long");
    let said =
        workload.pods[0].script().running.clone().unwrap().policy.settings.dependency_policies["database"].clone();
    let timeout = TimeoutPolicy { request_ms: Some(5_000), ..TimeoutPolicy::default() };
    assert_eq!(said, DependencyPolicy { timeout, ..DependencyPolicy::default() }, "the rest is the workload's own");

    // What contradicts itself is refused at once, what only does not fit well is told.
    let retries = |wait: &str| json!({ "numRetries": 3, "backOff": { "baseInterval": wait } });
    let contradiction = json!({ "timeout": { "request": "5s" }, "retry": retries("2s") });
    let refused = world.try_apply(&policy_of(&contradiction)).await.unwrap_err().to_string();
    let tight = json!({ "timeout": { "request": "5s", "perTry": "1s" }, "retry": retries("400ms") });
    world.apply(&policy_of(&tight)).await;
    let told = world
        .until_policy("booking", "the tries that do not fit are told", |policy| {
            policy_conditions(policy).iter().any(|one| one.type_ == "Accepted" && one.message.contains("warning"))
        })
        .await;
    let warning = condition(&told, "Accepted").message.clone();
    for (message, parts) in [
        (refused, ["3 retries wait at least 6000ms together", "timeout.request is 5s", "a request longer than 6000ms"]),
        (warning, ["4 tries of 1s and waits of", "together, longer than request (5s)", "what fits: perTry"]),
    ] {
        for part in parts {
            assert!(message.contains(part), "{part} in {message}");
        }
    }
    assert!(says(policy_conditions(&told), "Accepted", "True", "Accepted"), "it is in force all the same");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_that_degradation_sets_in_vain_is_told() {
    let world = World::new().await;
    let _workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let mut manifest = policy("booking", "booking");
    manifest["spec"]["degradation"] = json!({
        "enter": { "loadPercent": 80 }, "flagOverrides": [{ "key": "EnablePDF", "variant": "off" }],
    });
    world.apply(&manifest).await;
    let says = async |wanted: &str| {
        world
            .until_policy("booking", wanted, |policy| {
                let mut conditions = policy_conditions(policy).iter();
                conditions.any(|one| one.type_ == "Accepted" && one.message.contains(wanted))
            })
            .await
    };
    says("no flag set of the namespace defines EnablePDF").await;
    world.apply(&flag_set("flags", "booking")).await;
    says("did you mean EnablePdf?").await;
    manifest["spec"]["degradation"]["flagOverrides"][0]["key"] = json!("EnablePdf");
    world.apply(&manifest).await;
    let told = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert!(!condition(&told, "Accepted").message.contains("flagOverrides"), "it is defined");
}
