//! `helm upgrade` of the operator from version 0.1 while a recovery is in flight.
//!
//! `make e2e-upgrade` runs it. It is not part of `make test`, because it builds version 0.1 from git, which takes minutes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../scenarios/common.rs"]
mod common;
#[path = "../scenarios/incident.rs"]
mod incident;

use common::{REPLICAS, SOON, in_every_pod, nodes, programmed, provider, published, restarts};
use crds::{
    ResiliencePolicy,
    status::{ActionOutcome, ActionRecord},
};
use e2e::{
    progress::Progress,
    release::VERSION_0_1,
    testbed::{Images, SYSTEM, TICKETING, Testbed, until},
    traffic::Traffic,
};
use incident::{Broken, Incident, Pods, prepare};
use k8s_openapi::{
    ByteString,
    api::{
        coordination::v1::Lease,
        core::v1::{ConfigMap, Pod, Secret},
    },
};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use std::{collections::BTreeMap, time::Duration};

/// A label of nodes that the Job of an incident waits for.
const GATE: &str = "ticketwave-e2e/upgraded";
/// Pods of version 0.1 keep connections that hang until they are told to reset them.
const OF_0_1: Pods = Pods { timeout: ("5s", "1s"), replace_silent: false, startup_grace: false };

#[tokio::test]
async fn recoveries_in_flight_tokens_and_documents_carry_on_through_a_helm_upgrade_from_0_1() {
    let progress = Progress::new();
    let old = Images::of_release(VERSION_0_1, provider(), &progress).await.unwrap();
    let new = Images::find(provider(), &progress).await.unwrap();
    assert_ne!(old.operator(), new.operator(), "an upgrade to the same image would show nothing");
    let testbed = Testbed::open(provider(), None, nodes(), &progress).await.unwrap();
    testbed.load_operator(&new).await.unwrap();
    for incident in Incident::ALL {
        progress.say(format!("upgrading while {incident:?} is in flight"));
        install_0_1(&testbed, &old).await;
        upgrade_during(&testbed, &new, incident).await;
        pods_of_0_1_are_programmed_and_recovered(&testbed).await;
    }
    progress.say("upgrading the workloads, too");
    let token = token(&testbed).await;
    testbed.install_booking(&new, REPLICAS).await.unwrap();
    programmed(&testbed).await;
    assert_eq!(self::token(&testbed).await, token, "the workloads keep their tokens");
    pods_are_recovered(&testbed, Pods::CURRENT).await;
}

/// Version 0.1 alone, as on a cluster that has seen nothing newer.
async fn install_0_1(testbed: &Testbed, old: &Images) {
    testbed.kubectl.run(&format!("label nodes --all {GATE}-")).await.unwrap();
    testbed.uninstall().await.unwrap();
    testbed.delete_definitions().await.unwrap();
    testbed.install_operator(old, &[]).await.unwrap();
    testbed.install_booking(old, REPLICAS).await.unwrap();
}

/// Upgrades the operator in the middle of a recovery, and lets that come to its end only then.
async fn upgrade_during(testbed: &Testbed, new: &Images, incident: Incident) {
    // A reset is in flight for as long as its check is watched.
    prepare(testbed, incident, OF_0_1, if incident == Incident::Reset { "45s" } else { "1s" }).await;
    programmed(testbed).await;
    let (token, document) = (token(testbed).await, document(testbed).await);
    let mut pods = restarts(testbed).await;
    hold(testbed, incident).await;
    let traffic = Traffic::start(testbed, Duration::from_millis(200)).await.unwrap();
    let broken = Broken::bring_about(testbed, incident, OF_0_1, 1).await;
    broken.intended(testbed).await;
    let in_flight = in_flight(testbed, incident).await;
    let sold_before = sold_by_others(&traffic, &in_flight);

    testbed.install_operator(new, &[]).await.unwrap();
    let led_since = leads(testbed, new).await;
    release(testbed, incident).await;
    broken.recovered_once(testbed).await;

    let policy = testbed.policies().get("booking").await.unwrap();
    let all = testbed.recoveries().await.unwrap();
    assert_eq!(all.len(), 1, "one incident, one Recovery: {all:#?}");
    let recovery = policy.status.unwrap().recovery.unwrap();
    assert!(recovery.recent.is_empty(), "what the old version wrote has become Recoveries: {recovery:#?}");
    let over = recovery.last.unwrap();
    assert_eq!(over.id, in_flight.id, "the new version goes on with the intent of the old one");
    assert!(
        over.finished_at.as_ref().unwrap().0 > led_since,
        "the upgrade came too late: {over:?}, led since {led_since}"
    );
    if let Some(acted_at) = &in_flight.acted_at {
        assert_eq!(over.acted_at.as_ref(), Some(acted_at), "it was executed by the old version, and only then");
    }
    assert!(sold_by_others(&traffic, &in_flight) > sold_before + 20, "the other pods went on selling");
    drop(traffic);

    assert_eq!(self::token(testbed).await, token, "the token is the same");
    programmed(testbed).await;
    carries_on(&document, &self::document(testbed).await);
    if incident == Incident::Restart {
        pods.retain(|uid, _| Some(uid) != in_flight.pod_uid.as_ref());
    }
    let now = restarts(testbed).await;
    assert!(pods.iter().all(|pod| now.contains_key(pod.0) && now[pod.0] == *pod.1), "{pods:?} were to stay: {now:?}");
}

/// Keeps the recovery from this incident from coming to its end, where the incident itself does not.
async fn hold(testbed: &Testbed, incident: Incident) {
    match incident {
        Incident::Reset => {}
        Incident::Restart => {
            let budget = json!({
                "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
                "metadata": { "name": "upgrade", "namespace": TICKETING },
                "spec": { "maxUnavailable": 0, "selector": { "matchLabels": { "app.kubernetes.io/name": "booking" } } },
            });
            testbed.kubectl.apply(&budget.to_string()).await.unwrap();
        }
        Incident::Cleanup => {
            let pod = json!({ "spec": { "nodeSelector": { GATE: "true" } } });
            let patch = json!({ "spec": { "jobTemplate": { "spec": { "template": pod } } } }).to_string();
            let words = ["patch", "cronjob", "booking-cleanup", "-n", TICKETING, "--type=merge", "-p", &patch];
            testbed.kubectl.args(&words).await.unwrap();
        }
    }
}

/// Takes away what [`hold`] has put in the way.
async fn release(testbed: &Testbed, incident: Incident) {
    match incident {
        Incident::Reset => {}
        Incident::Restart => {
            testbed.kubectl.run(&format!("delete pdb upgrade -n {TICKETING}")).await.unwrap();
        }
        Incident::Cleanup => {
            testbed.kubectl.run(&format!("label nodes --all {GATE}=true")).await.unwrap();
        }
    }
}

/// The record of the recovery, once it has come as far as it can before the upgrade.
async fn in_flight(testbed: &Testbed, incident: Incident) -> ActionRecord {
    let find = |policy: &ResiliencePolicy| {
        let recovery = policy.status.as_ref().and_then(|status| status.recovery.clone()).unwrap_or_default();
        recovery.in_flight.into_iter().find(|record| match incident {
            Incident::Restart => record.outcome == ActionOutcome::Waiting,
            Incident::Reset | Incident::Cleanup => record.acted_at.is_some(),
        })
    };
    let expected = format!("{incident:?} in flight");
    let policy = testbed.policy_until("booking", SOON, &expected, |policy| find(policy).is_some()).await.unwrap();
    find(&policy).unwrap()
}

/// Waits until a pod with the new image leads, and no pod of the old one is left; the answer is since when it leads.
async fn leads(testbed: &Testbed, new: &Images) -> jiff::Timestamp {
    let leases: Api<Lease> = Api::namespaced(testbed.client.clone(), SYSTEM);
    let pods: Api<Pod> = Api::namespaced(testbed.client.clone(), SYSTEM);
    let led_since = until(SOON, "the new version leads", || async {
        let lease = leases.get_opt("resilience-operator").await?.and_then(|lease| lease.spec).unwrap_or_default();
        let all = pods.list(&ListParams::default()).await?.items;
        let is_new = |pod: &Pod| {
            pod.spec.as_ref().is_some_and(|spec| spec.containers[0].image.as_deref() == Some(new.operator()))
        };
        let is_leader =
            |pod: &Pod| lease.holder_identity.as_ref().is_some_and(|holder| holder.contains(&pod.name_any()));
        let leads = all.iter().all(is_new) && all.iter().any(is_leader);
        let names: Vec<_> = all.iter().map(ResourceExt::name_any).collect();
        Ok(if leads {
            Ok(lease.acquire_time.unwrap().0)
        } else {
            Err(format!("{:?} leads, of {names:?}", lease.holder_identity))
        })
    });
    led_since.await.unwrap()
}

/// The token that the booking pods take.
async fn token(testbed: &Testbed) -> BTreeMap<String, ByteString> {
    let secrets: Api<Secret> = Api::namespaced(testbed.client.clone(), TICKETING);
    secrets
        .get(&contract::token_secret_name(contract::WorkloadKind::Deployment, "booking"))
        .await
        .unwrap()
        .data
        .unwrap()
}

/// The document of the booking pods, as its ConfigMap holds it.
async fn document(testbed: &Testbed) -> Value {
    let maps: Api<ConfigMap> = Api::namespaced(testbed.client.clone(), TICKETING);
    let map = maps.get(&contract::config_map_name(contract::WorkloadKind::Deployment, "booking")).await.unwrap();
    serde_json::from_str(&map.data.unwrap()[contract::CONFIG_KEY]).unwrap()
}

/// A document may have new members, which pods of version 0.1 ignore. All that they know has its old value.
fn carries_on(before: &Value, after: &Value) {
    let revision = |document: &Value| document["revision"].as_i64().unwrap();
    assert!(revision(after) >= revision(before), "pods refuse a lower revision: {after}");
    assert_eq!(after["contractVersion"], before["contractVersion"], "pods of 0.1 know no other one");
    assert_eq!(after["workload"], before["workload"]);
    for section in ["policy", "flags"] {
        for (member, value) in before[section]["settings"].as_object().unwrap() {
            assert_eq!(&after[section]["settings"][member], value, "{section}.settings.{member}");
        }
    }
}

/// Bookings that the pods without the incident have taken.
fn sold_by_others(traffic: &Traffic, record: &ActionRecord) -> u64 {
    let others = traffic.by_pod.iter().filter(|(name, _)| record.pod.as_ref() != Some(name));
    others.map(|(_, count)| count.now().0).sum()
}

/// The new operator makes pods of version 0.1 run a change, and recovers them.
async fn pods_of_0_1_are_programmed_and_recovered(testbed: &Testbed) {
    let before = published(&programmed(testbed).await);
    testbed
        .patch_policy("booking", &json!({ "bulkheads": [{ "name": "critical", "maxConcurrent": 7 }] }))
        .await
        .unwrap();
    let changed = testbed
        .policy_until("booking", SOON, "the change live in every pod", |policy| {
            e2e::testbed::is_true(policy, crds::ConditionType::Programmed.as_str()) && published(policy).1 != before.1
        })
        .await
        .unwrap();
    let (revision, hash) = published(&changed);
    assert!(revision > before.0);
    until(SOON, "the pods run the change", || in_every_pod(testbed, |h, r| (h, r) == (hash.as_str(), revision)))
        .await
        .unwrap();
    pods_are_recovered(testbed, OF_0_1).await;
}

/// A pod recovers by one action. The policy is a new one: with the small bulkhead of the one before, not all of the pod's
/// connections could be busy at once.
async fn pods_are_recovered(testbed: &Testbed, pods: Pods) {
    testbed.delete_resources().await.unwrap();
    prepare(testbed, Incident::Reset, pods, "1s").await;
    programmed(testbed).await;
    Broken::bring_about(testbed, Incident::Reset, pods, 2).await.recovered_once(testbed).await;
}
