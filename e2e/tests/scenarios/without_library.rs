//! Workloads that know nothing of us: a shell that is ready as long as a file is there. They are only recovered, by what
//! Kubernetes says of them, and nothing is written or sent for them.

use crate::{SOON, testbed, words};
use crds::{ConditionType, Recovery, ResiliencePolicy};
use e2e::testbed::{SYSTEM, TICKETING, Testbed, phase, reason, until};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{ConfigMap, Pod, Secret},
};
use kube::{
    Api, ResourceExt,
    api::{ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const NAME: &str = "shell";
/// Serves until it is told to end: it is ready once it has slept for as long as the ConfigMap says, if that is there.
const SERVE: &str =
    "sleep $(cat /starts/seconds || echo 0); touch /state/ready; trap 'exit 0' TERM; while true; do sleep 1; done";
/// A version that does not come up.
const CRASH: &str = "echo 'no such table: seats' >&2; exit 3";

/// What the pods are made from. The image is the database's: it has a shell.
async fn template(testbed: &Testbed, script: &str) -> Value {
    let postgres = testbed.kubectl.get(&format!("statefulset postgres -n {TICKETING}")).await.unwrap();
    let container = &postgres["spec"]["template"]["spec"]["containers"][0];
    json!({
        "metadata": { "labels": { "app.kubernetes.io/name": NAME } },
        "spec": {
            "terminationGracePeriodSeconds": 1, "automountServiceAccountToken": false,
            "securityContext": { "runAsUser": 999, "runAsGroup": 999, "runAsNonRoot": true },
            "containers": [{
                "name": "main", "image": container["image"], "imagePullPolicy": container["imagePullPolicy"],
                "command": ["sh", "-c", script],
                "readinessProbe": { "exec": { "command": ["test", "-f", "/state/ready"] }, "periodSeconds": 1, "failureThreshold": 1 },
                "volumeMounts": [{ "name": "state", "mountPath": "/state" }, { "name": "starts", "mountPath": "/starts" }],
            }],
            "volumes": [
                { "name": "state", "emptyDir": {} },
                { "name": "starts", "configMap": { "name": "shell-starts", "optional": true } },
            ],
        },
    })
}

async fn make(testbed: &Testbed, kind: &str, replicas: usize, script: &str) {
    remove(testbed).await;
    let labels = json!({ "matchLabels": { "app.kubernetes.io/name": NAME } });
    let mut workload = json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": NAME, "namespace": TICKETING },
        "spec": { "replicas": replicas, "selector": labels, "template": template(testbed, script).await },
    });
    if kind == "StatefulSet" {
        workload["spec"]["serviceName"] = json!(NAME);
        workload["spec"]["podManagementPolicy"] = json!("Parallel");
    }
    // As a person makes it: what applies it on the server again and again would own the template.
    let how = PostParams::default();
    if kind == "StatefulSet" {
        let sets: Api<StatefulSet> = Api::namespaced(testbed.client.clone(), TICKETING);
        sets.create(&how, &serde_json::from_value(workload).unwrap()).await.unwrap();
    } else {
        testbed.deployments().create(&how, &serde_json::from_value(workload).unwrap()).await.unwrap();
    }
    testbed.kubectl.run(&format!("rollout status -n {TICKETING} {kind}/{NAME} --timeout=120s")).await.unwrap();
}

async fn remove(testbed: &Testbed) {
    let all = "deployment/shell statefulset/shell configmap/shell-starts pdb/shell";
    let words = format!("delete {all} -n {TICKETING} --ignore-not-found --cascade=foreground --timeout=60s");
    testbed.kubectl.run(&words).await.unwrap();
}

/// A policy that says nothing but how it recovers.
async fn recover(testbed: &Testbed, kind: &str, check: &str, step: Value, limits: Value) {
    let policy = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": NAME, "namespace": TICKETING },
        "spec": {
            "targetRefs": [{ "kind": kind, "name": NAME }],
            "healthChecks": [{ "name": "pod-ready", "kubernetes": { "for": "3s" } }],
            "recovery": {
                "ladders": [{ "check": check, "steps": [step] }],
                "limits": limits, "healthyDelay": "2s", "startupGrace": "0s",
            },
        },
    });
    testbed.kubectl.apply(&policy.to_string()).await.unwrap();
    let rests = |policy: &ResiliencePolicy| reason(policy, ConditionType::Programmed.as_str()) == Some("RecoveryOnly");
    testbed.policy_until(NAME, SOON, "the policy in force", rests).await.unwrap();
}

/// The pods that are not going away: whether each is ready, and its uid, by name.
async fn pods(testbed: &Testbed) -> BTreeMap<String, (bool, String)> {
    let api: Api<Pod> = Api::namespaced(testbed.client.clone(), TICKETING);
    let list = api.list(&ListParams::default().labels(&format!("app.kubernetes.io/name={NAME}"))).await.unwrap();
    let there = list.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    there
        .map(|pod| {
            let conditions = pod.status.iter().filter_map(|status| status.conditions.as_ref()).flatten();
            let ready = conditions.into_iter().any(|one| one.type_ == "Ready" && one.status == "True");
            (pod.name_any(), (ready, pod.uid().unwrap()))
        })
        .collect()
}

/// For how many seconds all pods have been ready.
async fn ready_for(testbed: &Testbed) -> i64 {
    let api: Api<Pod> = Api::namespaced(testbed.client.clone(), TICKETING);
    let list = api.list(&ListParams::default().labels(&format!("app.kubernetes.io/name={NAME}"))).await.unwrap();
    let since = list.items.iter().map(|pod| {
        let conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let ready = conditions.filter(|one| one.type_ == "Ready" && one.status == "True");
        let times: Vec<_> = ready.filter_map(|one| one.last_transition_time.as_ref()).collect();
        times.first().map_or(0, |time| jiff::Timestamp::now().duration_since(time.0).as_secs())
    });
    since.min().unwrap_or_default()
}

/// Its file goes, so the kubelet does not call it ready any more.
async fn break_pod(testbed: &Testbed, name: &str) {
    testbed.kubectl.run(&format!("exec -n {TICKETING} {name} -- rm /state/ready")).await.unwrap();
}

async fn mend_pod(testbed: &Testbed, name: &str) {
    testbed.kubectl.run(&format!("exec -n {TICKETING} {name} -- touch /state/ready")).await.unwrap();
}

async fn until_recoveries(testbed: &Testbed, what: &str, wanted: impl Fn(&[Recovery]) -> bool) -> Vec<Recovery> {
    let ask = || async {
        let all = testbed.recoveries().await?;
        Ok(if wanted(&all) { Ok(all) } else { Err(shown(&all)) })
    };
    until(SOON * 3, what, ask).await.unwrap()
}

fn shown(all: &[Recovery]) -> String {
    let one = |recovery: &Recovery| {
        let message = recovery.status.as_ref().and_then(|status| status.message.clone()).unwrap_or_default();
        format!("{} {}: {message}", recovery.name_any(), phase(recovery))
    };
    all.iter().map(one).collect::<Vec<_>>().join("; ")
}

fn phases(all: &[Recovery]) -> Vec<&str> {
    all.iter().map(phase).collect()
}

/// What the operator has changed in the namespace of the workloads since `from`, by resource and verb; only what was granted.
async fn changes(testbed: &Testbed, from: usize) -> BTreeMap<String, usize> {
    let mut changes = BTreeMap::new();
    let lines = testbed.audit_lines().await.unwrap();
    let operator = format!("system:serviceaccount:{SYSTEM}:resilience-operator");
    for line in lines.iter().skip(from).filter(|line| line["user"]["username"] == operator.as_str()) {
        let object = &line["objectRef"];
        let granted = line["responseStatus"]["code"].as_u64().is_some_and(|code| code < 300);
        let verb = line["verb"].as_str().unwrap_or_default();
        if granted && object["namespace"] == TICKETING && !["get", "list", "watch"].contains(&verb) {
            let sub = object["subresource"].as_str().map(|sub| format!("/{sub}")).unwrap_or_default();
            let resource = object["resource"].as_str().unwrap_or_default();
            *changes.entry(format!("{verb} {resource}{sub}")).or_default() += 1;
        }
    }
    changes
}

async fn audit_length(testbed: &Testbed) -> usize {
    testbed.audit_lines().await.unwrap().len()
}

fn evictions(changes: &BTreeMap<String, usize>) -> usize {
    changes.get("create pods/eviction").copied().unwrap_or_default()
}

/// What recovery writes where nothing is published.
fn assert_nothing_else(changes: &BTreeMap<String, usize>, besides: &[&str]) {
    let allowed: BTreeSet<&str> = [
        "create events",
        "patch events",
        "create pods/eviction",
        "create recoveries",
        "delete recoveries",
        "patch recoveries/status",
        "patch resiliencepolicies/status",
    ]
    .into_iter()
    .chain(besides.iter().copied())
    .collect();
    let other: Vec<_> = changes.keys().filter(|change| !allowed.contains(change.as_str())).collect();
    assert!(other.is_empty(), "nothing else was touched: {changes:?}");
}

#[tokio::test]
async fn a_workload_without_our_library_is_restarted_within_its_disruption_budget() {
    let (testbed, _turn) = testbed().await;
    for kind in ["Deployment", "StatefulSet"] {
        make(&testbed, kind, 3, SERVE).await;
        let from = audit_length(&testbed).await;
        recover(
            &testbed,
            kind,
            "pod-ready",
            json!({ "action": "RestartPod", "timeout": "30s" }),
            json!({ "cooldown": "0s" }),
        )
        .await;
        let before = pods(&testbed).await;
        let budget = json!({
            "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": NAME, "namespace": TICKETING },
            "spec": { "maxUnavailable": 0, "selector": { "matchLabels": { "app.kubernetes.io/name": NAME } } },
        });
        testbed.kubectl.apply(&budget.to_string()).await.unwrap();
        let (victim, (_, uid)) = before.first_key_value().unwrap();
        break_pod(&testbed, victim).await;

        // A budget that forbids it is respected, and said.
        let all =
            until_recoveries(&testbed, "the restart waits for the budget", |all| phases(all) == ["Waiting"]).await;
        assert!(shown(&all).contains("disruption budget"), "{}", shown(&all));
        assert_eq!(evictions(&changes(&testbed, from).await), 0);
        testbed.kubectl.run(&format!("delete pdb {NAME} -n {TICKETING}")).await.unwrap();
        until_recoveries(&testbed, "the restart helped", |all| phases(all) == ["Succeeded"]).await;

        let after = pods(&testbed).await;
        let gone: Vec<_> = before.values().filter(|pod| !after.values().any(|now| now.1 == pod.1)).collect();
        assert_eq!(gone, [&(true, uid.clone())], "{kind}: that pod, and no other");
        let changes = changes(&testbed, from).await;
        assert_nothing_else(&changes, &[]);
        if testbed.cluster.audit_log().await.unwrap().is_some() {
            assert_eq!(evictions(&changes), 1, "{kind}: once: {changes:?}");
        }
        let kind = kind.parse().unwrap();
        let maps: Api<ConfigMap> = Api::namespaced(testbed.client.clone(), TICKETING);
        let secrets: Api<Secret> = Api::namespaced(testbed.client.clone(), TICKETING);
        assert!(maps.get_opt(&contract::config_map_name(kind, NAME)).await.unwrap().is_none());
        assert!(secrets.get_opt(&contract::token_secret_name(kind, NAME)).await.unwrap().is_none());
        println!("{}", testbed.kubectl.run(&format!("get rpol,recoveries -n {TICKETING}")).await.unwrap());
        testbed.delete_resources().await.unwrap();
    }
    remove(&testbed).await;
}

#[tokio::test]
async fn a_pod_that_starts_slowly_is_not_evicted_twice() {
    let (testbed, _turn) = testbed().await;
    make(&testbed, "Deployment", 3, SERVE).await;
    let from = audit_length(&testbed).await;
    // The step may take less time than the next pod needs.
    recover(
        &testbed,
        "Deployment",
        "pod-ready",
        json!({ "action": "RestartPod", "timeout": "60s" }),
        json!({ "cooldown": "0s" }),
    )
    .await;
    let starts = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "shell-starts", "namespace": TICKETING }, "data": { "seconds": "75" },
    });
    testbed.kubectl.apply(&starts.to_string()).await.unwrap();
    let victim = pods(&testbed).await.into_keys().next().unwrap();
    break_pod(&testbed, &victim).await;
    let all = until_recoveries(&testbed, "the step is out of time", |all| phases(all) == ["Failed"]).await;
    assert!(shown(&all).contains("2 of 3 pods are ready"), "{}", shown(&all));
    let healed =
        |all: &[Recovery]| all.iter().all(|one| one.status.as_ref().is_some_and(|status| status.healed_at.is_some()));
    until_recoveries(&testbed, "the successor is ready and judged so", healed).await;
    assert_eq!(testbed.recoveries().await.unwrap().len(), 1, "nothing more was begun");
    assert!(pods(&testbed).await.values().all(|(ready, _)| *ready));
    if testbed.cluster.audit_log().await.unwrap().is_some() {
        assert_eq!(evictions(&changes(&testbed, from).await), 1, "once");
    }
    remove(&testbed).await;
}

#[tokio::test]
async fn when_most_pods_fail_at_once_nothing_is_restarted_and_a_storm_is_stopped() {
    let (testbed, turn) = testbed().await;
    let images = turn.as_ref().unwrap();
    let places = crate::on_the_first_node(&testbed);
    let mut values = words(&places);
    values.push("storm.actions=2");
    testbed.install_operator(images, &values).await.unwrap();
    make(&testbed, "Deployment", 10, SERVE).await;
    let from = audit_length(&testbed).await;
    let limits = json!({ "cooldown": "0s", "maxInFlight": 5, "maxUnhealthy": "50%" });
    recover(&testbed, "Deployment", "pod-ready", json!({ "action": "RestartPod", "timeout": "60s" }), limits).await;
    let names: Vec<_> = pods(&testbed).await.into_keys().collect();
    for name in &names[..8] {
        break_pod(&testbed, name).await;
    }
    // As they fail one after the other, the first ones may be restarted before there are too many; no more than a storm has.
    let held = |policy: &ResiliencePolicy| {
        let why = reason(policy, ConditionType::RecoveryAllowed.as_str());
        policy.status.iter().flat_map(|status| &status.checks).any(|check| check.unhealthy_pods >= 6)
            && matches!(why, Some("TooManyUnhealthy" | "StormActive"))
    };
    testbed.policy_until(NAME, SOON, "nothing is restarted while most pods fail", held).await.unwrap();
    let restarted = evictions(&changes(&testbed, from).await);
    assert!(restarted <= 2, "{restarted}");
    // So many are well again that it may go on, and then it is a storm.
    for name in &names[..5] {
        if pods(&testbed).await.contains_key(name) {
            mend_pod(&testbed, name).await;
        }
    }
    let storm =
        |policy: &ResiliencePolicy| reason(policy, ConditionType::RecoveryAllowed.as_str()) == Some("StormActive");
    testbed.policy_until(NAME, SOON, "the storm is said", storm).await.unwrap();
    // What is intended counts for the storm, and is done a moment later; unless its pod became well in between.
    let begun = |all: &[Recovery]| all.len() == 2 && !phases(all).contains(&"Pending");
    let all = until_recoveries(&testbed, "both actions of the storm are begun", begun).await;
    let acted = all.iter().filter(|one| one.status.as_ref().is_some_and(|status| status.executed_at.is_some())).count();
    let changes = changes(&testbed, from).await;
    assert_nothing_else(&changes, &[]);
    if testbed.cluster.audit_log().await.unwrap().is_some() {
        assert_eq!(changes.get("create recoveries"), Some(&2), "{changes:?}");
        assert_eq!(evictions(&changes), acted, "each once: {changes:?}; {}", shown(&all));
    }
    remove(&testbed).await;
    testbed.install_operator(images, &words(&places)).await.unwrap();
}

async fn script(testbed: &Testbed) -> String {
    let deployment: Deployment = testbed.deployments().get(NAME).await.unwrap();
    deployment.spec.template.spec.unwrap().containers[0].command.clone().unwrap().pop().unwrap()
}

/// Rolls a script out, as this manager.
async fn roll_out(testbed: &Testbed, script: &str, how: &PatchParams) {
    let change = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": NAME },
        "spec": {
            "selector": { "matchLabels": { "app.kubernetes.io/name": NAME } }, "template": template(testbed, script).await,
        },
    });
    let patch = if how.force { Patch::Apply(change) } else { Patch::Strategic(change) };
    testbed.deployments().patch(NAME, how, &patch).await.unwrap();
}

#[tokio::test]
async fn a_rollout_that_crashes_is_rolled_back_unless_gitops_owns_the_template() {
    let (testbed, _turn) = testbed().await;
    make(&testbed, "Deployment", 3, SERVE).await;
    let from = audit_length(&testbed).await;
    recover(
        &testbed,
        "Deployment",
        "restarts",
        json!({ "action": "Rollback", "timeout": "60s" }),
        json!({ "cooldown": "0s" }),
    )
    .await;
    let before = pods(&testbed).await;
    until(SOON * 2, "all pods have served for a minute, so their revision is known to work", || async {
        let youngest = ready_for(&testbed).await;
        Ok(if youngest >= 61 { Ok(()) } else { Err(format!("{youngest} s")) })
    })
    .await
    .unwrap();
    roll_out(&testbed, CRASH, &PatchParams::default()).await;
    let all = until_recoveries(&testbed, "the rollback helped", |all| phases(all) == ["Succeeded"]).await;
    println!("{}", testbed.kubectl.run(&format!("describe rpol {NAME} -n {TICKETING}")).await.unwrap());
    assert_eq!(all[0].spec.action.as_str(), "Rollback");
    assert_eq!(script(&testbed).await, SERVE);
    assert_eq!(pods(&testbed).await, before, "the pods that served were not touched");
    let changes = changes(&testbed, from).await;
    assert_nothing_else(&changes, &["patch deployments", "patch replicasets"]);
    assert_eq!(evictions(&changes), 0);

    // The same from a repository: it would be put back, so that is left to people.
    let gitops = PatchParams::apply("argocd-controller").force();
    roll_out(&testbed, SERVE, &gitops).await;
    roll_out(&testbed, CRASH, &gitops).await;
    let refused =
        |policy: &ResiliencePolicy| reason(policy, ConditionType::RecoveryAllowed.as_str()) == Some("RollbackRefused");
    let held = testbed.policy_until(NAME, SOON * 2, "the rollback is refused", refused).await.unwrap();
    let conditions = held.status.unwrap().conditions;
    let said = conditions.iter().find(|one| one.type_ == ConditionType::RecoveryAllowed.as_str()).unwrap();
    assert!(said.message.contains("argocd-controller owns the template"), "{}", said.message);
    assert_eq!(script(&testbed).await, CRASH);
    assert_eq!(testbed.recoveries().await.unwrap().len(), 1);
    remove(&testbed).await;
}
