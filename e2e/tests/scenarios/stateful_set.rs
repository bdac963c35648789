//! A StatefulSet as a target: it is programmed and recovered as a Deployment is, and its pods keep their identities.

use crate::{POLICY, SOON, common::published, programmed, restarts, testbed};
use contract::WorkloadKind;
use crds::{
    ConditionType, ResiliencePolicy,
    status::{ActionOutcome, ActionRecord},
};
use e2e::{
    pod_admin::PodAdmin,
    sabotage::{HungCalls, PATIENT},
    testbed::{TICKETING, Testbed, is_true, until},
};
use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{ConfigMap, Pod},
};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The same as that of the Deployment, on purpose: the two must not share anything.
pub const NAME: &str = "booking";
/// Tells its pods from those of the Deployment.
const LABEL: &str = "booking-set";
const POLICY_NAME: &str = "booking-set";
const PODS: usize = 2;

#[tokio::test]
async fn a_stateful_set_is_programmed_and_recovered_and_its_pods_keep_their_identities() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    let deployment = (published(&programmed(&testbed).await), restarts(&testbed).await);
    let owner = create(&testbed).await;

    recover_by(&testbed, "ResetConnections").await;
    let first = programmed_set(&testbed).await;
    in_every_pod(&testbed, &published(&first)).await;
    let maps: Api<ConfigMap> = Api::namespaced(testbed.client.clone(), TICKETING);
    let map = maps.get(&contract::config_map_name(WorkloadKind::StatefulSet, NAME)).await.unwrap();
    assert_eq!(map.owner_references()[0].uid, owner, "its document goes with it");
    let before = pods(&testbed).await;
    assert_eq!(before.keys().collect::<Vec<_>>(), ["booking-0", "booking-1"]);

    let reset = recovered(&testbed, "booking-1").await;
    assert_eq!((reset.outcome, reset.step), (ActionOutcome::Succeeded, 1), "{reset:?}");
    assert_eq!(pods(&testbed).await, before, "no pod was restarted");

    recover_by(&testbed, "RestartPod").await;
    programmed_set(&testbed).await;
    let evictions = evictions(&testbed, "booking-0").await;
    let restart = recovered(&testbed, "booking-0").await;
    assert_eq!((restart.outcome, restart.pod_uid.as_ref()), (ActionOutcome::Succeeded, before.get("booking-0")));
    let after = pods(&testbed).await;
    assert!(after.keys().eq(before.keys()), "the same identities: {after:?}");
    assert_ne!(after["booking-0"], before["booking-0"], "another pod under the same name");
    assert_eq!(after["booking-1"], before["booking-1"], "the other one is left alone");
    if testbed.cluster.audit_log().await.unwrap().is_some() {
        assert_eq!(self::evictions(&testbed, "booking-0").await, evictions + 1, "it was evicted once");
    }
    let last = programmed_set(&testbed).await;
    in_every_pod(&testbed, &published(&last)).await;

    let now = (published(&programmed(&testbed).await), restarts(&testbed).await);
    assert_eq!(now, deployment, "the Deployment of the same name has nothing to do with it");
    remove(&testbed).await;
}

/// Removes the StatefulSet and its pods, if they are there.
pub async fn remove(testbed: &Testbed) {
    let words =
        format!("delete statefulset {NAME} -n {TICKETING} --ignore-not-found --cascade=foreground --timeout=60s");
    testbed.kubectl.run(&words).await.unwrap();
}

/// The booking service once more, as a StatefulSet; the answer is its uid.
async fn create(testbed: &Testbed) -> String {
    let deployment = testbed.kubectl.get(&format!("deployment booking -n {TICKETING}")).await.unwrap();
    let mut template = deployment["spec"]["template"].clone();
    template["metadata"]["labels"]["app.kubernetes.io/name"] = json!(LABEL);
    let container = &mut template["spec"]["containers"][0];
    let environment = container["env"].as_array_mut().unwrap();
    environment.retain(|variable| variable["name"] != "WORKLOAD_KIND");
    environment.push(json!({ "name": "WORKLOAD_KIND", "value": "StatefulSet" }));
    for volume in template["spec"]["volumes"].as_array_mut().unwrap() {
        if volume["configMap"].is_object() {
            volume["configMap"]["name"] = json!(contract::config_map_name(WorkloadKind::StatefulSet, NAME));
        } else if volume["name"] == "resilience-token" {
            volume["secret"]["secretName"] = json!(contract::token_secret_name(WorkloadKind::StatefulSet, NAME));
        }
    }
    let labels = json!({ "app.kubernetes.io/name": LABEL });
    let set = json!({
        "apiVersion": "apps/v1", "kind": "StatefulSet",
        "metadata": { "name": NAME, "namespace": TICKETING },
        "spec": {
            "replicas": PODS, "serviceName": NAME, "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": labels }, "template": template,
        },
    });
    testbed.kubectl.apply(&set.to_string()).await.unwrap();
    testbed.kubectl.run(&format!("rollout status -n {TICKETING} statefulset/{NAME} --timeout=120s")).await.unwrap();
    let sets: Api<StatefulSet> = Api::namespaced(testbed.client.clone(), TICKETING);
    sets.get(NAME).await.unwrap().uid().unwrap()
}

/// A policy for it whose only step is `action`.
async fn recover_by(testbed: &Testbed, action: &str) {
    let policy = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": POLICY_NAME, "namespace": TICKETING },
        "spec": {
            "targetRefs": [{ "group": "apps", "kind": "StatefulSet", "name": NAME }],
            "dependencies": [{ "name": "database", "timeout": { "request": PATIENT.0, "perTry": PATIENT.1 }, "retry": { "numRetries": 1, "backOff": { "baseInterval": "200ms" } } }],
            "healthChecks": [{ "name": "database", "interval": "1s", "unhealthyThreshold": 1 }],
            "recovery": {
                "ladders": [{ "check": "database", "steps": [{ "action": action, "timeout": "90s" }] }],
                "limits": { "cooldown": "0s" },
                "healthyDelay": "1s", "startupGrace": "0s",
            },
        },
    });
    testbed.kubectl.apply(&policy.to_string()).await.unwrap();
}

async fn programmed_set(testbed: &Testbed) -> ResiliencePolicy {
    let wanted = format!("{PODS}/{PODS}");
    let live = |policy: &ResiliencePolicy| {
        is_true(policy, ConditionType::Programmed.as_str())
            && is_true(policy, ConditionType::Ready.as_str())
            && policy.status.as_ref().and_then(|status| status.programmed.as_deref()) == Some(&wanted)
    };
    testbed.policy_until(POLICY_NAME, SOON * 2, "the policy live in every pod of the StatefulSet", live).await.unwrap()
}

/// Makes the calls of a pod hang; the answer is the record of the recovery that followed.
async fn recovered(testbed: &Testbed, pod: &str) -> ActionRecord {
    let find = |policy: &ResiliencePolicy| {
        let recovery = policy.status.as_ref().and_then(|status| status.recovery.clone()).unwrap_or_default();
        let over = recovery.last.into_iter().find(|record| record.pod.as_deref() == Some(pod));
        over.filter(|_| recovery.in_flight.is_empty())
    };
    let hung = HungCalls::of(testbed, pod).await.unwrap();
    let over =
        testbed.policy_until(POLICY_NAME, SOON * 2, &format!("{pod} recovered"), |policy| find(policy).is_some()).await;
    hung.resume(testbed).await.unwrap();
    find(&over.unwrap()).unwrap()
}

/// Its pods: uid by name.
async fn pods(testbed: &Testbed) -> BTreeMap<String, String> {
    let pods: Api<Pod> = Api::namespaced(testbed.client.clone(), TICKETING);
    let list = pods.list(&ListParams::default().labels(&format!("app.kubernetes.io/name={LABEL}"))).await.unwrap();
    list.items.iter().map(|pod| (pod.name_any(), pod.uid().unwrap())).collect()
}

/// Waits until each pod says that it runs this revision and hash.
async fn in_every_pod(testbed: &Testbed, (revision, hash): &(i64, String)) {
    let names: Vec<_> = pods(testbed).await.into_keys().collect();
    until(SOON, "the document in every pod of the StatefulSet", || async {
        let admin = PodAdmin::of(testbed, WorkloadKind::StatefulSet, NAME, names.clone()).await?;
        for name in &names {
            let applied = admin.health(name).await?.applied;
            if (applied.revision, &applied.content_hash) != (*revision, hash) {
                return Ok(Err(format!("{name} runs {applied:?}")));
            }
        }
        Ok(Ok(()))
    })
    .await
    .unwrap();
}

/// Evictions of a pod that were granted so far.
async fn evictions(testbed: &Testbed, pod: &str) -> usize {
    let granted = |line: &&Value| {
        let object = &line["objectRef"];
        line["verb"] == "create"
            && (&object["subresource"], &object["name"]) == (&json!("eviction"), &json!(pod))
            && line["responseStatus"]["code"].as_u64().is_some_and(|code| (200..300).contains(&code))
    };
    testbed.audit_lines().await.unwrap().iter().filter(granted).count()
}
