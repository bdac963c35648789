//! The scenarios: what the operator promises, on a real cluster with real pods.
//!
//! `PROVIDER` and `NODES` choose the cluster, as for `make e2e`. The scenarios share one installation, so they run one
//! after the other; each begins with nothing programmed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod by_hand;
mod cleanup_jobs;
mod common;
mod crashes;
mod database_faults;
mod flags;
mod incident;
mod operator_process;
mod random_faults;
mod services;
mod services_faults;
mod stateful_set;
mod without_library;

use common::{REPLICAS, SOON, in_every_pod, nodes, programmed, provider, published, restarts};
use crds::{ConditionType, status::ActionOutcome};
use e2e::{
    pod_admin::PodAdmin,
    progress::Progress,
    provider::ProviderKind,
    quick_policy::quick_policy_with_readiness,
    sabotage::{
        HungCalls, PATIENT, StoppedBackends, have_patient_calls, replaced_connections, resume_database, sql,
        stop_database,
    },
    testbed::{Images, SYSTEM, TICKETING, Testbed, is_true, reason, until},
    traffic::Traffic,
};
use incident::Before;
use k8s_openapi::api::{
    core::v1::{ConfigMap, Node, Pod},
    events::v1::Event,
};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use services_faults::Done;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, MutexGuard};

const POLICY: &str = "crds/samples/quickstart.yaml";
const FLAGS: &str = "crds/samples/flags.yaml";

/// One scenario at a time; the value holds the images that the testbed was installed with, once it is.
static TURN: Mutex<Option<Images>> = Mutex::const_new(None);

/// The testbed, installed once, with nothing programmed; the guard keeps the other scenarios waiting.
async fn testbed() -> (Testbed, MutexGuard<'static, Option<Images>>) {
    let mut set = TURN.lock().await;
    let progress = Progress::new();
    let testbed = Testbed::open(provider(), None, nodes(), &progress).await.unwrap();
    if set.is_none() {
        let images = Images::find(provider(), &progress).await.unwrap();
        testbed.install_operator(&images, &words(&on_the_first_node(&testbed))).await.unwrap();
        testbed.install_booking(&images, REPLICAS).await.unwrap();
        *set = Some(images);
    }
    // The scenario before may have changed anything: all pods are to be there and ready.
    for rollout in ["statefulset/postgres", "deployment/booking"] {
        testbed.kubectl.run(&format!("rollout status -n {TICKETING} {rollout} --timeout=120s")).await.unwrap();
    }
    stateful_set::remove(&testbed).await;
    testbed.scale_operator(1).await.unwrap();
    testbed.delete_resources().await.unwrap();
    until(SOON, "the defaults live in every pod", || in_every_pod(&testbed, |hash, _| hash == defaults()))
        .await
        .unwrap();
    (testbed, set)
}

/// The second node will be cut off; the operator itself is to see that from outside.
fn on_the_first_node(testbed: &Testbed) -> Vec<String> {
    let name = testbed.cluster.node_name(1);
    name.map(|name| format!("nodeSelector.kubernetes\\.io/hostname={name}")).into_iter().collect()
}

fn words(values: &[String]) -> Vec<&str> {
    values.iter().map(String::as_str).collect()
}

/// What a workload runs by when no resource names it.
fn defaults() -> String {
    contract::RuntimeConfig::hash(&Default::default(), &Default::default())
}

async fn event_reasons(testbed: &Testbed) -> Vec<String> {
    let events: Api<Event> = Api::namespaced(testbed.client.clone(), TICKETING);
    let list = events.list(&ListParams::default()).await.unwrap();
    list.items.into_iter().filter_map(|event| event.reason).collect()
}

#[tokio::test]
async fn silent_connections_are_replaced_by_their_pool_and_the_operator_does_nothing() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    programmed(&testbed).await;
    let traffic = selling(&testbed).await;
    let before = restarts(&testbed).await;
    let victim = traffic.by_pod[1].0.clone();
    let replaced = replaced_connections(&testbed, &victim).await.unwrap();
    let done = actions_done(&testbed, &victim).await;
    let stopped = StoppedBackends::of(&testbed, &[victim.as_str()]).await.unwrap();
    let cured = until(Duration::from_secs(15), "every silent connection replaced", || async {
        let now = replaced_connections(&testbed, &victim).await? - replaced;
        Ok(if now >= stopped.pids.len() { Ok(()) } else { Err(format!("{now} of {}", stopped.pids.len())) })
    });
    let cured = cured.await;
    let own = traffic.by_pod[1].1.now().0;
    let sells = until(SOON, "the pod sells again", || async {
        let now = traffic.by_pod[1].1.now().0;
        Ok(if now > own + 5 { Ok(()) } else { Err(format!("{} bookings since", now - own)) })
    });
    let sells = sells.await;
    stopped.resume(&testbed).await.unwrap();
    cured.and(sells).unwrap();
    let policy = testbed.policies().get("booking").await.unwrap();
    let recovery = policy.status.and_then(|status| status.recovery).unwrap_or_default();
    assert!(recovery.in_flight.is_empty() && testbed.recoveries().await.unwrap().is_empty(), "{recovery:#?}");
    assert_eq!(restarts(&testbed).await, before, "nothing was restarted");
    assert_eq!(actions_done(&testbed, &victim).await, done, "nobody asked it for anything");
}

/// How many actions a pod has done since it started, as it counts itself.
async fn actions_done(testbed: &Testbed, pod: &str) -> u64 {
    let pods = PodAdmin::find(testbed).await.unwrap();
    pods.health(pod).await.unwrap().actions_done.values().sum()
}

/// Buyers that have sold in every pod.
async fn selling(testbed: &Testbed) -> Traffic {
    let traffic = Traffic::start(testbed, Duration::from_millis(100)).await.unwrap();
    until(SOON, "bookings in every pod", || async {
        let slowest = traffic.by_pod.iter().map(|(_, count)| count.now().0).min().unwrap_or(0);
        Ok(if slowest >= 5 { Ok(()) } else { Err(format!("{slowest} bookings in the slowest pod")) })
    })
    .await
    .unwrap();
    traffic
}

#[tokio::test]
async fn connections_that_hang_in_use_are_found_reset_and_verified_while_bookings_go_on() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    have_patient_calls(&testbed, PATIENT).await.unwrap();
    programmed(&testbed).await;
    let traffic = selling(&testbed).await;
    let before = restarts(&testbed).await;
    let victim = traffic.by_pod[1].0.clone();
    let done = actions_done(&testbed, &victim).await;
    let hung = HungCalls::of(&testbed, &victim).await.unwrap();
    let others =
        || traffic.by_pod.iter().filter(|(name, _)| *name != victim).map(|(_, count)| count.now().0).sum::<u64>();
    let others_before = others();

    let recovered = testbed
        .policy_until("booking", SOON * 2, "a recovery that succeeded", |policy| {
            let recovery = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
            recovery.is_some_and(|recovery| recovery.last.iter().any(|last| last.pod.as_deref() == Some(&victim)))
        })
        .await;
    hung.resume(&testbed).await.unwrap();
    let recovered = recovered.unwrap();
    let recovery = recovered.status.as_ref().unwrap().recovery.as_ref().unwrap();
    let record = recovery.last.as_ref().unwrap();
    assert_eq!(record.outcome, ActionOutcome::Succeeded, "{record:?}");
    assert!(record.started_at.0 <= record.acted_at.as_ref().unwrap().0, "the intent comes before the action");
    assert_eq!(recovery.remaining_budget, Some(4));
    assert!(is_true(&recovered, ConditionType::Ready.as_str()), "an incident must not make the policy unready");

    // The pod did it once, and under no other id.
    assert_eq!(actions_done(&testbed, &victim).await, done + 1);
    assert_eq!(restarts(&testbed).await, before, "nothing was restarted");
    assert!(others() > others_before + 20, "the other pods went on selling");
    let own = traffic.by_pod[1].1.now().0;
    until(SOON, "the recovered pod sells again", || async {
        let now = traffic.by_pod[1].1.now().0;
        Ok(if now > own + 5 { Ok(()) } else { Err(format!("{} bookings since", now - own)) })
    })
    .await
    .unwrap();
    let reasons = event_reasons(&testbed).await;
    for reason in ["Programmed", "CheckUnhealthy", "RecoveryStarted", "RecoverySucceeded"] {
        assert!(reasons.iter().any(|seen| seen == reason), "no Event {reason} among {reasons:?}");
    }
    // Nothing was sold twice: what the bookings say and what the event lost agree.
    let balance = "select sum(capacity - available) - (select sum(ticket_count) from bookings where status <> 'Cancelled') from events";
    assert_eq!(sql(&testbed, balance).await.unwrap().trim(), "0");
}

#[tokio::test]
async fn a_change_goes_live_without_a_restart() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    testbed.apply_file(FLAGS).await.unwrap();
    let first = published(&programmed(&testbed).await);
    let before = restarts(&testbed).await;
    testbed
        .patch_policy("booking", &json!({ "bulkheads": [{ "name": "critical", "maxConcurrent": 7 }] }))
        .await
        .unwrap();
    let second = testbed
        .policy_until("booking", SOON, "the change live in every pod", |policy| {
            is_true(policy, ConditionType::Programmed.as_str())
                && policy.status.as_ref().unwrap().targets[0].content_hash.as_deref() != Some(&first.1)
        })
        .await
        .unwrap();
    let second = published(&second);
    assert!(second.0 > first.0);
    until(SOON, "the pods run it", || {
        in_every_pod(&testbed, |hash, revision| (revision, hash) == (second.0, second.1.as_str()))
    })
    .await
    .unwrap();
    assert_eq!(restarts(&testbed).await, before);

    // A change that means the same is not published.
    testbed.patch_policy("booking", &json!({ "healthChecks": [{ "name": "memory", "memory": { "max": "1Gi", "maxPercentOfLimit": 80 } }, { "name": "booking-consistency", "scope": "Workload", "interval": "2000ms" }, { "name": "database", "interval": "1000ms" }] })).await.unwrap();
    let same = testbed
        .policy_until("booking", SOON, "the new generation observed", |policy| {
            is_true(policy, ConditionType::Programmed.as_str())
        })
        .await
        .unwrap();
    assert_eq!(published(&same), second);
}

#[tokio::test]
async fn a_policy_deleted_while_the_operator_is_away_leaves_the_defaults_at_a_higher_revision() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    let first = published(&programmed(&testbed).await);
    testbed.scale_operator(0).await.unwrap();
    testbed.delete_resources().await.unwrap();
    testbed.scale_operator(1).await.unwrap();
    until(SOON, "the defaults, newer than the policy", || {
        in_every_pod(&testbed, |hash, revision| hash == defaults() && revision > first.0)
    })
    .await
    .unwrap();
    // Created again, its generation starts over; the revision must not.
    testbed.apply_file(POLICY).await.unwrap();
    let again = published(&programmed(&testbed).await);
    assert_eq!(again.1, first.1, "the same policy means the same");
    assert!(again.0 > first.0);
}

#[tokio::test]
async fn a_pod_that_starts_while_the_operator_is_away_has_its_configuration() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    let (revision, hash) = published(&programmed(&testbed).await);
    testbed.scale_operator(0).await.unwrap();
    let victim = testbed.booking_pods().await.unwrap()[0].name_any();
    testbed.kubectl.run(&format!("delete pod -n {TICKETING} {victim}")).await.unwrap();
    testbed.kubectl.run(&format!("rollout status -n {TICKETING} deployment/booking --timeout=90s")).await.unwrap();
    let expected = format!("every pod on {hash} at revision {revision}");
    until(SOON, &expected, || in_every_pod(&testbed, |h, r| h == hash && r == revision)).await.unwrap();
    testbed.scale_operator(1).await.unwrap();
    assert_eq!(published(&programmed(&testbed).await), (revision, hash), "coming back changes nothing");
}

#[tokio::test]
async fn a_configuration_that_somebody_edits_or_deletes_is_put_right() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    let (first, hash) = published(&programmed(&testbed).await);
    let maps: Api<ConfigMap> = Api::namespaced(testbed.client.clone(), TICKETING);
    let name = contract::config_map_name(contract::WorkloadKind::Deployment, "booking");
    let sound = |after: i64| {
        let (maps, name, hash) = (maps.clone(), name.clone(), hash.clone());
        move || {
            let (maps, name, hash) = (maps.clone(), name.clone(), hash.clone());
            async move {
                let map = maps.get_opt(&name).await?;
                let text = map.and_then(|map| map.data?.get(contract::CONFIG_KEY).cloned()).unwrap_or_default();
                Ok(match contract::RuntimeConfig::parse(text.as_bytes()) {
                    Ok((config, _)) if config.content_hash == hash && config.revision > after => Ok(config.revision),
                    Ok((config, _)) => Err(format!("revision {} with hash {}", config.revision, config.content_hash)),
                    Err(error) => Err(error.to_string()),
                })
            }
        }
    };
    let edit = kube::api::Patch::Merge(json!({ "data": { (contract::CONFIG_KEY): "{\"revision\": 99999999999999}" } }));
    maps.patch(&name, &kube::api::PatchParams::default(), &edit).await.unwrap();
    let second = until(SOON, "the edited ConfigMap repaired", sound(first)).await.unwrap();
    maps.delete(&name, &kube::api::DeleteParams::default()).await.unwrap();
    let third = until(SOON, "the deleted ConfigMap made again", sound(second)).await.unwrap();
    // The pods already run what it means, so the newer revision may reach them by their mounts, in its own time.
    assert!(third > second);
    until(SOON, "every pod on it", || in_every_pod(&testbed, |h, _| h == hash)).await.unwrap();
    assert!(is_true(&programmed(&testbed).await, ConditionType::Ready.as_str()));
}

#[tokio::test]
async fn pods_are_reached_through_the_api_server_too() {
    let (testbed, turn) = testbed().await;
    let images = turn.as_ref().unwrap();
    let own = on_the_first_node(&testbed);
    let proxied = [words(&own), vec!["podTransport=apiserver-proxy", "watchNamespaces={ticketing}"]].concat();
    testbed.install_operator(images, &proxied).await.unwrap();
    testbed.apply_file(POLICY).await.unwrap();
    let live = programmed(&testbed).await;
    assert!(is_true(&live, ConditionType::Healthy.as_str()));
    testbed.install_operator(images, &words(&own)).await.unwrap();
}

#[tokio::test]
async fn no_pod_is_restarted_for_a_database_that_hangs_for_all_pods() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    programmed(&testbed).await;
    let traffic = Traffic::start(&testbed, Duration::from_millis(100)).await.unwrap();
    let before = restarts(&testbed).await;
    stop_database(&testbed).await.unwrap();
    let held = testbed
        .policy_until("booking", SOON * 2, "recovery held back, with the root cause named", |policy| {
            reason(policy, ConditionType::RecoveryAllowed.as_str()) == Some("DependencyIsTheCause")
        })
        .await;
    resume_database(&testbed).await.unwrap();
    let held = held.unwrap();
    assert!(
        is_true(&held, ConditionType::Ready.as_str()) && is_true(&held, ConditionType::Accepted.as_str()),
        "an open circuit must not make the policy unready"
    );
    assert_eq!(held.status.as_ref().unwrap().open.as_deref().map(|open| open.starts_with("database")), Some(true));
    assert_eq!(restarts(&testbed).await, before, "nothing was restarted for it");
    // A circuit closes when a call succeeds, so the buyers stay until all are closed.
    testbed
        .policy_until("booking", SOON * 2, "all circuits closed and all checks healthy again", |policy| {
            is_true(policy, ConditionType::Healthy.as_str()) && policy.status.as_ref().unwrap().open.is_none()
        })
        .await
        .unwrap();
    drop(traffic);
}

#[tokio::test]
async fn the_built_in_roles_reach_all_our_kinds() {
    let (testbed, _turn) = testbed().await;
    for role in ["view", "edit", "admin"] {
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
            "metadata": { "name": format!("some-{role}"), "namespace": TICKETING },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role },
            "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": format!("some-{role}") }],
        });
        testbed.kubectl.apply(&binding.to_string()).await.unwrap();
    }
    let may = async |role: &str, asked: &str| {
        let asked = format!("auth can-i {asked} -n {TICKETING} --as=some-{role}");
        testbed.kubectl.run(&asked).await.is_ok()
    };
    for what in ["resiliencepolicies", "featureflags", "recoveries"] {
        for (role, verb, expected) in [
            ("view", "list", true),
            ("view", "update", false),
            ("edit", "list", true),
            ("edit", "update", true),
            ("admin", "delete", true),
        ] {
            let asked = format!("{verb} {what}.resilience.ticketwave.io");
            // The controller that gathers the rules takes a moment.
            until(SOON, &format!("whether {role} may {asked}: {expected}"), || async {
                Ok(if may(role, &asked).await == expected { Ok(()) } else { Err(format!("{}", !expected)) })
            })
            .await
            .unwrap();
        }
        for role in ["edit", "admin"] {
            let status = format!("update {what}.resilience.ticketwave.io --subresource=status");
            assert!(!may(role, &status).await, "{role} may not write a status");
        }
    }
}

#[tokio::test]
async fn at_rest_nothing_is_written_but_the_lease() {
    let (testbed, _turn) = testbed().await;
    for sample in
        [POLICY, FLAGS, "crds/samples/payment.yaml", "crds/samples/gateway.yaml", "crds/samples/notification.yaml"]
    {
        testbed.apply_file(sample).await.unwrap();
    }
    // A fifth one, for a workload that another policy has: its status must stand still, too.
    let fifth = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": "latecomer", "namespace": TICKETING },
        "spec": { "targetRefs": [{ "name": "booking" }] },
    });
    testbed.kubectl.apply(&fifth.to_string()).await.unwrap();
    programmed(&testbed).await;
    testbed
        .policy_until("latecomer", SOON, "a conflict", |policy| {
            reason(policy, ConditionType::Accepted.as_str()) == Some("Conflicted")
        })
        .await
        .unwrap();
    // A circuit that a scenario before has opened closes at the next call, whenever that is.
    let traffic = selling(&testbed).await;
    let closed = |policy: &crds::ResiliencePolicy| policy.status.as_ref().is_some_and(|status| status.open.is_none());
    testbed.policy_until("booking", SOON, "all circuits closed", closed).await.unwrap();
    drop(traffic);
    settle(&testbed).await;

    let before = snapshot(&testbed).await;
    let audit_from = testbed.audit_lines().await.unwrap().len();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshot(&testbed).await, before, "some object changed while nothing happened");
    let account = format!("system:serviceaccount:{SYSTEM}:");
    let writes: Vec<_> = testbed
        .audit_lines()
        .await
        .unwrap()
        .into_iter()
        .skip(audit_from)
        .filter(|line| line["user"]["username"].as_str().is_some_and(|user| user.starts_with(&account)))
        .filter(|line| line["objectRef"]["resource"] != "leases")
        .collect();
    assert!(writes.is_empty(), "{writes:#?}");

    let memory = operator_memory(&testbed).await;
    println!("operator memory at rest: {:.1} MiB", memory / 1_048_576.0);
    assert!(memory < 40.0 * 1_048_576.0, "the operator uses {memory} bytes");
}

/// Waits until no object of ours has changed for 5 seconds.
async fn settle(testbed: &Testbed) {
    let mut last = (snapshot(testbed).await, Instant::now());
    let deadline = Instant::now() + SOON;
    while last.1.elapsed() < Duration::from_secs(5) {
        assert!(Instant::now() < deadline, "the objects never come to rest");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = snapshot(testbed).await;
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
}

/// Versions of every object that the operator may write.
async fn snapshot(testbed: &Testbed) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    for kinds in ["rpol", "fflag", "configmaps", "secrets", "deployments", "events"] {
        let list = testbed.kubectl.get(&format!("{kinds} -n {TICKETING}")).await.unwrap();
        for item in e2e::kubectl::items(&list) {
            let name = item["metadata"]["name"].as_str().unwrap_or_default();
            let version = item["metadata"]["resourceVersion"].as_str().unwrap_or_default();
            // The kubelet publishes Events of its own; only the operator's count.
            if kinds != "events" || item["source"]["component"].is_null() {
                versions.insert(format!("{kinds}/{name}"), version.to_owned());
            }
        }
    }
    versions
}

/// Memory of the operator's pod, as its kubelet counts it, in bytes.
async fn operator_memory(testbed: &Testbed) -> f64 {
    let nodes: Api<Node> = Api::all(testbed.client.clone());
    for node in nodes.list(&ListParams::default()).await.unwrap() {
        let path = format!("/api/v1/nodes/{}/proxy/stats/summary", node.name_any());
        let summary: Value = testbed.client.request(http::Request::get(path).body(Vec::new()).unwrap()).await.unwrap();
        for pod in summary["pods"].as_array().into_iter().flatten() {
            if pod["podRef"]["namespace"] == SYSTEM {
                return pod["memory"]["workingSetBytes"].as_f64().expect("the kubelet counts memory");
            }
        }
    }
    panic!("no kubelet knows the operator's pod");
}

#[tokio::test]
async fn a_node_that_is_cut_off_is_no_reason_to_restart_anything() {
    let (testbed, _turn) = testbed().await;
    testbed.kubectl.apply(&quick_policy_with_readiness("booking").to_string()).await.unwrap();
    let first = published(&programmed(&testbed).await);
    if provider() == ProviderKind::Existing {
        println!("not on somebody else's cluster: its nodes are not ours to cut off");
        return;
    }
    if nodes() < 2 {
        // The only node holds everything: from outside nothing answers, inside everything goes on.
        let before = restarts(&testbed).await;
        testbed.cluster.cut_node(1).await.unwrap();
        let silent = until(SOON, "silence", || async {
            Ok(if testbed.kubectl.server_ready().await { Err("it answers".to_owned()) } else { Ok(()) })
        });
        let silent = silent.await;
        testbed.cluster.join_node(1).await.unwrap();
        silent.unwrap();
        assert_eq!(published(&programmed(&testbed).await), first);
        assert_eq!(restarts(&testbed).await, before);
        return;
    }
    let (before, seen) = (restarts(&testbed).await, Before::look(&testbed).await);
    testbed.cluster.cut_node(2).await.unwrap();
    let cut = async {
        let change = json!({ "bulkheads": [{ "name": "critical", "maxConcurrent": 9 }] });
        testbed.patch_policy("booking", &change).await?;
        testbed
            .policy_until(
                "booking",
                SOON * 2,
                "the change published, and live in the pods that are reached",
                |policy| {
                    let target = &policy.status.as_ref().unwrap().targets[0];
                    target.content_hash.as_deref() != Some(&first.1) && target.pods_in_sync >= 1
                },
            )
            .await?;
        // Kubernetes says itself that the pods of such a node are not ready; the policy restarts one that is not for 2 s.
        until(SOON * 3, "a pod that was called not ready 15 s ago", || async {
            let since = testbed.booking_pods().await?.iter().filter_map(not_ready_since).min();
            let long = since.is_some_and(|since| jiff::Timestamp::now().duration_since(since).as_secs() >= 15);
            Ok(if long { Ok(()) } else { Err(format!("{since:?}")) })
        })
        .await
    };
    let cut = cut.await;
    testbed.cluster.join_node(2).await.unwrap();
    cut.unwrap();
    let actions = testbed.recoveries().await.unwrap();
    assert!(actions.is_empty(), "an unreachable pod is not an unhealthy one: {actions:#?}");
    let live = programmed(&testbed).await;
    assert_ne!(published(&live).1, first.1);
    assert_eq!(restarts(&testbed).await, before);
    // The database may be on that node. Then a pod that is kept from it for longer than those beside it gives up its connections,
    // which takes nothing from anybody.
    let done = Done::since(&testbed, &seen).await;
    assert_eq!(done, Done { resets: done.resets.clone(), ..Done::default() });
}

fn not_ready_since(pod: &Pod) -> Option<jiff::Timestamp> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    let ready = conditions.find(|one| one.type_ == "Ready" && one.status != "True")?;
    ready.last_transition_time.as_ref().map(|time| time.0)
}
