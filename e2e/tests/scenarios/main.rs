//! The scenarios: what the operator promises, on a real cluster with real pods.
//!
//! `PROVIDER` and `NODES` choose the cluster, as for `make e2e`. The scenarios share one installation, so they run one
//! after the other; each begins with nothing programmed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod crashes;
mod incident;
mod operator_process;
mod services;

use crds::{
    condition::types::{ACCEPTED, HEALTHY, PROGRAMMED, READY, RECOVERY_ALLOWED},
    status::ActionOutcome,
};
use e2e::{
    pod_admin::PodAdmin,
    progress::Progress,
    provider::ProviderKind,
    sabotage::{StoppedBackends, resume_database, sql, stop_database},
    stage::{Images, SYSTEM, Stage, StageError, TICKETING, is_true, reason, until},
    traffic::Traffic,
};
use k8s_openapi::api::{
    core::v1::{ConfigMap, Node, Pod},
    events::v1::Event,
};
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, MutexGuard};

const REPLICAS: u32 = 3;
const POLICY: &str = "crds/samples/quickstart.yaml";
const FLAGS: &str = "crds/samples/flags.yaml";
const SOON: Duration = Duration::from_secs(60);

/// One scenario at a time; the value holds what the stage was set with, once it is set.
static TURN: Mutex<Option<Images>> = Mutex::const_new(None);

fn nodes() -> u32 {
    std::env::var("NODES").ok().and_then(|nodes| nodes.parse().ok()).unwrap_or(2)
}

fn provider() -> ProviderKind {
    let name = std::env::var("PROVIDER").unwrap_or_else(|_| "local".to_owned());
    clap::ValueEnum::from_str(&name, true).expect("PROVIDER names a provider")
}

/// The stage, set once, with nothing programmed; the guard keeps the other scenarios waiting.
async fn stage() -> (Stage, MutexGuard<'static, Option<Images>>) {
    let mut set = TURN.lock().await;
    let progress = Progress::new();
    let stage = Stage::open(provider(), None, nodes(), &progress).await.unwrap();
    if set.is_none() {
        let images = Images::find(provider(), &progress).await.unwrap();
        stage.install_operator(&images, &words(&on_the_first_node(&stage))).await.unwrap();
        stage.install_booking(&images, REPLICAS).await.unwrap();
        *set = Some(images);
    }
    // Whatever the one before did to it: all pods are there and well.
    for rollout in ["statefulset/postgres", "deployment/booking"] {
        stage.kubectl.run(&format!("rollout status -n {TICKETING} {rollout} --timeout=120s")).await.unwrap();
    }
    stage.scale_operator(1).await.unwrap();
    stage.delete_resources().await.unwrap();
    until(SOON, "the defaults live in every pod", || in_every_pod(&stage, |hash, _| hash == defaults())).await.unwrap();
    (stage, set)
}

/// The second node will be cut off; the operator itself is to see that from outside.
fn on_the_first_node(stage: &Stage) -> Vec<String> {
    let name = stage.cluster.node_name(1);
    name.map(|name| format!("nodeSelector.kubernetes\\.io/hostname={name}")).into_iter().collect()
}

fn words(values: &[String]) -> Vec<&str> {
    values.iter().map(String::as_str).collect()
}

/// What a workload runs by when no resource names it.
fn defaults() -> String {
    contract::RuntimeConfig::hash(&Default::default(), &Default::default())
}

/// Whether what each pod runs is as `check` wants it: hash and revision.
async fn in_every_pod(stage: &Stage, check: impl Fn(&str, i64) -> bool) -> Result<Result<(), String>, StageError> {
    // Before anything was ever published there is no token, and the pods run what is built in: that is fine.
    let Ok(pods) = PodAdmin::find(stage).await else { return Ok(Ok(())) };
    for name in &pods.names {
        let applied = pods.health(name).await?.applied;
        if !check(&applied.content_hash, applied.revision) {
            return Ok(Err(format!("{name} runs {:?} at revision {}", applied.content_hash, applied.revision)));
        }
    }
    Ok(Ok(()))
}

async fn programmed(stage: &Stage) -> crds::ResiliencePolicy {
    let wanted = format!("{REPLICAS}/{REPLICAS}");
    let live = |policy: &crds::ResiliencePolicy| {
        is_true(policy, PROGRAMMED)
            && is_true(policy, READY)
            && policy.status.as_ref().and_then(|status| status.programmed.as_deref()) == Some(&wanted)
    };
    stage.policy_until("booking", SOON * 2, "the policy live in every pod", live).await.unwrap()
}

fn published(policy: &crds::ResiliencePolicy) -> (i64, String) {
    let target = &policy.status.as_ref().unwrap().targets[0];
    (target.revision.unwrap(), target.content_hash.clone().unwrap())
}

/// How often the containers of each booking pod were restarted, by the pod's uid.
async fn restarts(stage: &Stage) -> BTreeMap<String, i32> {
    let count = |pod: Pod| {
        let statuses = pod.status.iter().filter_map(|status| status.container_statuses.as_ref()).flatten();
        (pod.uid().unwrap(), statuses.map(|status| status.restart_count).sum())
    };
    stage.booking_pods().await.unwrap().into_iter().map(count).collect()
}

async fn event_reasons(stage: &Stage) -> Vec<String> {
    let events: Api<Event> = Api::namespaced(stage.client.clone(), TICKETING);
    let list = events.list(&ListParams::default()).await.unwrap();
    list.items.into_iter().filter_map(|event| event.reason).collect()
}

#[tokio::test]
async fn broken_connections_are_found_reset_and_verified_while_bookings_go_on() {
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    programmed(&stage).await;
    let traffic = Traffic::start(&stage, Duration::from_millis(100)).await.unwrap();
    until(SOON, "bookings in every pod", || async {
        let slowest = traffic.by_pod.iter().map(|(_, count)| count.now().0).min().unwrap_or(0);
        Ok(if slowest >= 5 { Ok(()) } else { Err(format!("{slowest} bookings in the slowest pod")) })
    })
    .await
    .unwrap();
    let before = restarts(&stage).await;
    let victim = traffic.by_pod[1].0.clone();
    let stopped = StoppedBackends::of(&stage, &victim).await.unwrap();
    let others =
        || traffic.by_pod.iter().filter(|(name, _)| *name != victim).map(|(_, count)| count.now().0).sum::<u64>();
    let others_before = others();

    let healed = stage
        .policy_until("booking", SOON * 2, "a recovery that succeeded", |policy| {
            let recovery = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
            recovery.is_some_and(|recovery| recovery.recent.iter().any(|record| record.pod.as_deref() == Some(&victim)))
        })
        .await;
    stopped.resume(&stage).await.unwrap();
    let healed = healed.unwrap();
    let recovery = healed.status.as_ref().unwrap().recovery.as_ref().unwrap();
    let record = &recovery.recent[0];
    assert_eq!(record.outcome, ActionOutcome::Succeeded, "{record:?}");
    assert!(record.started_at.0 <= record.acted_at.as_ref().unwrap().0, "the intent comes before the act");
    assert_eq!(recovery.remaining_budget, Some(4));
    assert!(is_true(&healed, READY), "an incident must not make the policy unready");

    // The pod did it once, and under no other id.
    let pods = PodAdmin::find(&stage).await.unwrap();
    let done = pods.health(&victim).await.unwrap().actions_done;
    assert_eq!(done.values().sum::<u64>(), 1, "{done:?}");
    assert_eq!(restarts(&stage).await, before, "nothing was restarted");
    assert!(others() > others_before + 20, "the other pods went on selling");
    let own = traffic.by_pod[1].1.now().0;
    until(SOON, "the healed pod sells again", || async {
        let now = traffic.by_pod[1].1.now().0;
        Ok(if now > own + 5 { Ok(()) } else { Err(format!("{} bookings since", now - own)) })
    })
    .await
    .unwrap();
    let reasons = event_reasons(&stage).await;
    for reason in ["Programmed", "CheckUnhealthy", "RecoveryStarted", "RecoverySucceeded"] {
        assert!(reasons.iter().any(|seen| seen == reason), "no Event {reason} among {reasons:?}");
    }
    // Nothing was sold twice: what the bookings say and what the event lost agree.
    let balance = "select sum(capacity - available) - (select sum(ticket_count) from bookings where status <> 'Cancelled') from events";
    assert_eq!(sql(&stage, balance).await.unwrap().trim(), "0");
}

#[tokio::test]
async fn a_change_goes_live_without_a_restart() {
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    stage.apply_file(FLAGS).await.unwrap();
    let first = published(&programmed(&stage).await);
    let before = restarts(&stage).await;
    stage.patch_policy("booking", &json!({ "bulkheads": [{ "name": "critical", "maxConcurrent": 7 }] })).await.unwrap();
    let second = stage
        .policy_until("booking", SOON, "the change live in every pod", |policy| {
            is_true(policy, PROGRAMMED)
                && policy.status.as_ref().unwrap().targets[0].content_hash.as_deref() != Some(&first.1)
        })
        .await
        .unwrap();
    let second = published(&second);
    assert!(second.0 > first.0);
    until(SOON, "the pods run it", || {
        in_every_pod(&stage, |hash, revision| (revision, hash) == (second.0, second.1.as_str()))
    })
    .await
    .unwrap();
    assert_eq!(restarts(&stage).await, before);

    // A change that means the same is not published.
    stage.patch_policy("booking", &json!({ "healthChecks": [{ "name": "memory", "memory": { "max": "1Gi", "maxPercentOfLimit": 80 } }, { "name": "booking-consistency", "scope": "Workload" }, { "name": "database", "interval": "1000ms" }] })).await.unwrap();
    let same = stage
        .policy_until("booking", SOON, "the new generation observed", |policy| is_true(policy, PROGRAMMED))
        .await
        .unwrap();
    assert_eq!(published(&same), second);
}

#[tokio::test]
async fn a_policy_deleted_while_the_operator_is_away_leaves_the_defaults_at_a_higher_revision() {
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    let first = published(&programmed(&stage).await);
    stage.scale_operator(0).await.unwrap();
    stage.delete_resources().await.unwrap();
    stage.scale_operator(1).await.unwrap();
    until(SOON, "the defaults, newer than the policy", || {
        in_every_pod(&stage, |hash, revision| hash == defaults() && revision > first.0)
    })
    .await
    .unwrap();
    // Created again, its generation starts over; the revision must not.
    stage.apply_file(POLICY).await.unwrap();
    let again = published(&programmed(&stage).await);
    assert_eq!(again.1, first.1, "the same policy means the same");
    assert!(again.0 > first.0);
}

#[tokio::test]
async fn a_pod_that_starts_while_the_operator_is_away_has_its_configuration() {
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    let (revision, hash) = published(&programmed(&stage).await);
    stage.scale_operator(0).await.unwrap();
    let victim = stage.booking_pods().await.unwrap()[0].name_any();
    stage.kubectl.run(&format!("delete pod -n {TICKETING} {victim}")).await.unwrap();
    stage.kubectl.run(&format!("rollout status -n {TICKETING} deployment/booking --timeout=90s")).await.unwrap();
    let expected = format!("every pod on {hash} at revision {revision}");
    until(SOON, &expected, || in_every_pod(&stage, |h, r| h == hash && r == revision)).await.unwrap();
    stage.scale_operator(1).await.unwrap();
    assert_eq!(published(&programmed(&stage).await), (revision, hash), "coming back changes nothing");
}

#[tokio::test]
async fn a_configuration_that_somebody_edits_or_deletes_is_put_right() {
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    let (first, hash) = published(&programmed(&stage).await);
    let maps: Api<ConfigMap> = Api::namespaced(stage.client.clone(), TICKETING);
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
    until(SOON, "every pod on it", || in_every_pod(&stage, |h, _| h == hash)).await.unwrap();
    assert!(is_true(&programmed(&stage).await, READY));
}

#[tokio::test]
async fn pods_are_reached_through_the_api_server_too() {
    let (stage, turn) = stage().await;
    let images = turn.as_ref().unwrap();
    let own = on_the_first_node(&stage);
    let proxied = [words(&own), vec!["podTransport=apiserver-proxy", "watchNamespaces={ticketing}"]].concat();
    stage.install_operator(images, &proxied).await.unwrap();
    stage.apply_file(POLICY).await.unwrap();
    let live = programmed(&stage).await;
    assert!(is_true(&live, HEALTHY));
    stage.install_operator(images, &words(&own)).await.unwrap();
}

#[tokio::test]
async fn a_database_that_hangs_for_all_pods_is_no_pods_fault() {
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    programmed(&stage).await;
    let traffic = Traffic::start(&stage, Duration::from_millis(100)).await.unwrap();
    let before = restarts(&stage).await;
    stop_database(&stage).await.unwrap();
    let held = stage
        .policy_until("booking", SOON * 2, "recovery held back, with the root cause named", |policy| {
            reason(policy, RECOVERY_ALLOWED) == Some("DependencyIsTheCause")
        })
        .await;
    resume_database(&stage).await.unwrap();
    let held = held.unwrap();
    assert!(is_true(&held, READY) && is_true(&held, ACCEPTED), "an open circuit must not make the policy unready");
    assert_eq!(held.status.as_ref().unwrap().open.as_deref().map(|open| open.starts_with("database")), Some(true));
    assert_eq!(restarts(&stage).await, before, "nothing was restarted for it");
    // A circuit closes when a call succeeds, so the buyers stay until all are closed.
    stage
        .policy_until("booking", SOON * 2, "all circuits closed and all checks healthy again", |policy| {
            is_true(policy, HEALTHY) && policy.status.as_ref().unwrap().open.is_none()
        })
        .await
        .unwrap();
    drop(traffic);
}

#[tokio::test]
async fn at_rest_nothing_is_written_but_the_lease() {
    let (stage, _turn) = stage().await;
    for sample in
        [POLICY, FLAGS, "crds/samples/payment.yaml", "crds/samples/gateway.yaml", "crds/samples/notification.yaml"]
    {
        stage.apply_file(sample).await.unwrap();
    }
    // A fifth one, for a workload that another policy has: its status must stand still, too.
    let fifth = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": "latecomer", "namespace": TICKETING },
        "spec": { "targetRefs": [{ "name": "booking" }] },
    });
    stage.kubectl.apply(&fifth.to_string()).await.unwrap();
    programmed(&stage).await;
    stage
        .policy_until("latecomer", SOON, "a conflict", |policy| reason(policy, ACCEPTED) == Some("Conflicted"))
        .await
        .unwrap();
    settle(&stage).await;

    let before = snapshot(&stage).await;
    let audit_from = audit_lines(&stage).await.len();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(snapshot(&stage).await, before, "some object changed while nothing happened");
    let account = format!("system:serviceaccount:{SYSTEM}:");
    let writes: Vec<_> = audit_lines(&stage)
        .await
        .into_iter()
        .skip(audit_from)
        .filter(|line| line["user"]["username"].as_str().is_some_and(|user| user.starts_with(&account)))
        .filter(|line| line["objectRef"]["resource"] != "leases")
        .collect();
    assert!(writes.is_empty(), "{writes:#?}");

    let memory = operator_memory(&stage).await;
    println!("operator memory at rest: {:.1} MiB", memory / 1_048_576.0);
    assert!(memory < 40.0 * 1_048_576.0, "the operator uses {memory} bytes");
}

/// Waits until no object of ours has changed for 5 seconds.
async fn settle(stage: &Stage) {
    let mut last = (snapshot(stage).await, Instant::now());
    let deadline = Instant::now() + SOON;
    while last.1.elapsed() < Duration::from_secs(5) {
        assert!(Instant::now() < deadline, "the objects never come to rest");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = snapshot(stage).await;
        if now != last.0 {
            last = (now, Instant::now());
        }
    }
}

/// Versions of every object that the operator may write.
async fn snapshot(stage: &Stage) -> BTreeMap<String, String> {
    let mut versions = BTreeMap::new();
    for kinds in ["rpol", "fflag", "configmaps", "secrets", "deployments", "events"] {
        let list = stage.kubectl.get(&format!("{kinds} -n {TICKETING}")).await.unwrap();
        for item in e2e::kubectl::items(&list) {
            let name = item["metadata"]["name"].as_str().unwrap_or_default();
            let version = item["metadata"]["resourceVersion"].as_str().unwrap_or_default();
            // The kubelet tells events of its own accord; only the operator's count.
            if kinds != "events" || item["source"]["component"].is_null() {
                versions.insert(format!("{kinds}/{name}"), version.to_owned());
            }
        }
    }
    versions
}

async fn audit_lines(stage: &Stage) -> Vec<Value> {
    let text = stage.cluster.audit_log().await.unwrap().unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Memory of the operator's pod, as its kubelet counts it, in bytes.
async fn operator_memory(stage: &Stage) -> f64 {
    let nodes: Api<Node> = Api::all(stage.client.clone());
    for node in nodes.list(&ListParams::default()).await.unwrap() {
        let path = format!("/api/v1/nodes/{}/proxy/stats/summary", node.name_any());
        let summary: Value = stage.client.request(http::Request::get(path).body(Vec::new()).unwrap()).await.unwrap();
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
    let (stage, _turn) = stage().await;
    stage.apply_file(POLICY).await.unwrap();
    let first = published(&programmed(&stage).await);
    if provider() == ProviderKind::Existing {
        println!("not on somebody else's cluster: its nodes are not ours to cut off");
        return;
    }
    if nodes() < 2 {
        // The only node holds everything: from outside nothing answers, inside everything goes on.
        let before = restarts(&stage).await;
        stage.cluster.cut_node(1).await.unwrap();
        let silent = until(SOON, "silence", || async {
            Ok(if stage.kubectl.server_ready().await { Err("it answers".to_owned()) } else { Ok(()) })
        });
        let silent = silent.await;
        stage.cluster.join_node(1).await.unwrap();
        silent.unwrap();
        assert_eq!(published(&programmed(&stage).await), first);
        assert_eq!(restarts(&stage).await, before);
        return;
    }
    let before = restarts(&stage).await;
    stage.cluster.cut_node(2).await.unwrap();
    let cut = async {
        let change = json!({ "bulkheads": [{ "name": "critical", "maxConcurrent": 9 }] });
        stage.patch_policy("booking", &change).await?;
        stage
            .policy_until(
                "booking",
                SOON * 2,
                "the change published, and live in the pods that are reached",
                |policy| {
                    let target = &policy.status.as_ref().unwrap().targets[0];
                    target.content_hash.as_deref() != Some(&first.1) && target.pods_in_sync >= 1
                },
            )
            .await
    };
    let cut = cut.await;
    stage.cluster.join_node(2).await.unwrap();
    let cut = cut.unwrap();
    let actions = cut
        .status
        .as_ref()
        .unwrap()
        .recovery
        .as_ref()
        .map_or(0, |recovery| recovery.in_flight.len() + recovery.recent.len());
    assert_eq!(actions, 0, "an unreachable pod is not an unhealthy one");
    let live = programmed(&stage).await;
    assert_ne!(published(&live).1, first.1);
    assert_eq!(restarts(&stage).await, before);
}
