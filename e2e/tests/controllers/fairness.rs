//! Tenants: what one of them does, or what happens to it, costs the others nothing.

use crate::support::{
    World,
    audit::operator_writes,
    flag_set,
    manifests::policy_with_request,
    operator::Operator,
    process::OperatorProcess,
    recovery_policy, within,
    workload::{Workload, owned_by},
    world::request_ms,
};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use kube::api::{Patch, PatchParams, PostParams};
use operator::{pods::client::POD_DEADLINE, status::writes::WRITE_INTERVAL};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};
use tokio::{net::TcpListener, task::JoinHandle};

/// Connections that are held open at once by what never answers.
const HELD: usize = 512;
/// Edits that are timed.
const EDITS: u64 = 7;

/// How long it takes in the middle until an edit of the policy `catalog` is live in the workload of that name.
async fn time_of_an_edit(world: &World, catalog: &Workload) -> Duration {
    let mut times = Vec::new();
    for edit in 0..EDITS {
        let request = 6_000 + edit;
        let begin = Instant::now();
        world.apply(&policy_with_request("catalog", "catalog", &format!("{request}ms"))).await;
        for pod in &catalog.pods {
            pod.until_it_runs("the edit", |running| request_ms(running) == Some(request)).await;
        }
        times.push(begin.elapsed());
    }
    times.sort();
    println!("edits elsewhere took {times:?}");
    times[times.len() / 2]
}

/// How long it takes from a failing check of `payment` until the pod is asked for an action.
async fn time_of_an_action(payment: &Workload) -> Duration {
    let begin = Instant::now();
    payment.pods[0].script().failing = true;
    payment.pods[0].until_asked(1).await;
    println!("an action elsewhere took {:?}", begin.elapsed());
    begin.elapsed()
}

/// The other workloads, programmed: `catalog` for edits, `payment` for an action.
async fn others(world: &World) -> (Workload, Workload) {
    let (catalog, payment) = (world.workload("catalog", 2).await, world.workload("payment", 2).await);
    world.apply(&policy_with_request("catalog", "catalog", "5s")).await;
    world.apply(&recovery_policy("payment", "payment")).await;
    for name in ["catalog", "payment"] {
        world.until_policy_says(name, "Ready", "True", "Programmed").await;
    }
    (catalog, payment)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_pods_that_fail_at_once_delay_nobody_and_cost_few_writes() {
    const FAILING: usize = 1_000;
    let world = World::new().await;
    let booking = world.workload("booking", FAILING).await;
    let _operator = Operator::start(&world, &[]).await;
    let (catalog, payment) = others(&world).await;
    let mut policy = recovery_policy("booking", "booking");
    // All these pods answer in the test's own process, beside everything else that is tested there.
    policy["spec"]["healthChecks"][0]["interval"] = json!("5s");
    world.apply(&policy).await;
    for pod in &booking.pods {
        pod.until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    }
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;

    let status_writes = || {
        let mut writes = operator_writes(&world.cluster, &[&world.namespace]);
        writes.retain(|one| one.resource == "resiliencepolicies/status" && one.name == "booking" && one.code == 200);
        writes.len()
    };
    let (begin, before) = (Instant::now(), status_writes());
    for pod in &booking.pods {
        let mut script = pod.script();
        (script.failing, script.reset_helps) = (true, false);
    }
    // Every one of them fails while the others are looked at.
    let edit = time_of_an_edit(&world, &catalog).await;
    let action = time_of_an_action(&payment).await;
    futures::future::join_all(booking.pods.iter().map(|pod| pod.after_more_reports(3))).await;
    let (time, writes) = (begin.elapsed(), status_writes() - before);
    let intents: usize = booking.pods.iter().map(|pod| pod.script().effects.len()).sum();
    println!("{writes} status writes in {time:?} with {intents} actions");
    assert!(edit < POD_DEADLINE, "an edit elsewhere took {edit:?}");
    // The check is asked for every second, and fails for a moment before it counts.
    assert!(action < Duration::from_secs(5), "an action elsewhere took {action:?}");
    // An intent is written before it is executed, afterwards, and when it has ended.
    let coalesced = time.as_millis() / WRITE_INTERVAL.as_millis() + 2;
    let most = usize::try_from(coalesced).unwrap() + 3 * intents;
    assert!(writes <= most, "{writes} status writes, at most {most} expected");
    world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
}

/// Each of its pods takes long to report, so that the questions to them queue up.
#[tokio::test(flavor = "multi_thread")]
async fn actions_and_pushes_do_not_wait_behind_the_questions_to_their_own_workload() {
    const PODS: usize = 200;
    let world = World::new().await;
    let booking = world.workload("booking", PODS).await;
    let _operator = Operator::start(&world, &[]).await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    for pod in &booking.pods {
        pod.script().report_takes = Duration::from_millis(1_500);
    }
    booking.pods[0].after_more_reports(1).await;
    let asked_before = Instant::now();
    booking.pods[0].after_more_reports(1).await;
    let turn = asked_before.elapsed();
    assert!(turn > Duration::from_secs(4), "the questions queue up: it is asked again after {turn:?}");

    let mut edited = recovery_policy("booking", "booking");
    edited["spec"]["dependencies"][0]["timeout"]["request"] = json!("6s");
    let begin = Instant::now();
    world.apply(&edited).await;
    for pod in &booking.pods {
        pod.until_it_runs("the edit", |running| request_ms(running) == Some(6_000)).await;
    }
    let edit = begin.elapsed();
    booking.pods[0].script().failing = true;
    booking.pods[0].after_more_reports(1).await;
    let begin = Instant::now();
    booking.pods[0].until_asked(1).await;
    let action = begin.elapsed();
    println!("a pod is asked every {turn:?}; an edit took {edit:?}, an action {action:?}");
    assert!(edit < turn && action < turn / 3, "an edit took {edit:?}, an action {action:?}, a turn {turn:?}");
}

/// Takes connections at every address of the loopback, and never answers. The value is the port.
async fn black_hole() -> (u16, JoinHandle<()>) {
    let listener = TcpListener::bind(("0.0.0.0", 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let holding = tokio::spawn(async move {
        // Held for far longer than their callers wait, but not all of them: a process may not have so many.
        let mut held = VecDeque::new();
        while let Ok((connection, _)) = listener.accept().await {
            held.push_back(connection);
            if held.len() > HELD {
                held.pop_front();
            }
        }
    });
    (port, holding)
}

/// Pods of `workload` that take connections and never answer, each at an address of its own.
async fn silent_pods(world: &World, workload: &Workload, numbers: Range<usize>, port: u16) {
    let make = |number: usize| async move {
        let name = format!("{}-silent-{number}", workload.name);
        let [high, low] = u16::try_from(number).unwrap().to_be_bytes();
        let address = format!("127.86.{high}.{low}");
        let ports = json!([{ "name": "admin", "containerPort": port }, { "name": "http", "containerPort": port }]);
        let pod = json!({
            "metadata": { "name": name, "labels": { "app": workload.name }, "ownerReferences": workload.owners() },
            "spec": { "containers": [{ "name": "main", "image": "none", "ports": ports }] },
        });
        let pods = world.api::<Pod>();
        pods.create(&PostParams::default(), &serde_json::from_value(pod).unwrap()).await.unwrap();
        let status = json!({ "status": {
            "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        }});
        pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(&status)).await.unwrap();
    };
    futures::stream::iter(numbers.map(make)).buffer_unordered(16).collect::<Vec<()>>().await;
}

/// ConfigMaps of about a MiB that carry our label and name a workload as their owner.
async fn forged_config_maps(world: &World, count: usize, owner: &Workload) {
    let text = "x".repeat(750 * 1024);
    let annotation = "y".repeat(250 * 1024);
    let (text, annotation) = (text.as_str(), annotation.as_str());
    let make = |number: usize| async move {
        let map = json!({
            "metadata": {
                "name": format!("forged-{number}-resilience"),
                "labels": {
                    "app.kubernetes.io/managed-by": "resilience-operator",
                    "resilience.ticketwave.io/workload": format!("forged-{number}"),
                },
                "annotations": { "note": annotation },
                "ownerReferences": owned_by("Deployment", &format!("forged-{number}"), &owner.uid),
            },
            "data": { contract::CONFIG_KEY: text },
        });
        let map: ConfigMap = serde_json::from_value(map).unwrap();
        world.api().create(&PostParams::default(), &map).await.unwrap();
    };
    futures::stream::iter((0..count).map(make)).buffer_unordered(4).collect::<Vec<()>>().await;
}

/// A flag set that is larger than any that is read; the API server takes it.
fn oversized_flag_set() -> Value {
    let mut set = flag_set("oversized", "catalog");
    let text = "z".repeat(900 * 1024);
    set["spec"]["flagSpec"]["flags"]["EnablePdf"]["variants"] = json!({ "on": text, "off": "" });
    set
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_can_neither_fill_the_memory_nor_slow_down_the_others() {
    const MAPS: usize = 200;
    /// Silent pods of each of the tenant's workloads.
    const SILENT: usize = 1_000;
    /// What a tenant may cost, in MiB, in a build for tests; its ConfigMaps alone have 200.
    const GROWTH: u64 = 96;
    let world = World::new().await;
    let (tenant, other) = (world.workload("booking", 1).await, world.workload("orders", 1).await);
    let alone = OperatorProcess::start(&world).await;
    let (catalog, payment) = others(&world).await;
    for workload in [&tenant, &other] {
        world.apply(&recovery_policy(&workload.name, &workload.name)).await;
        world.until_policy_says(&workload.name, "Ready", "True", "Programmed").await;
    }
    time_of_an_edit(&world, &catalog).await;
    let before = alone.peak_memory();
    drop(alone);

    forged_config_maps(&world, MAPS, &tenant).await;
    let (port, _holding) = black_hole().await;
    silent_pods(&world, &tenant, 0..SILENT, port).await;
    silent_pods(&world, &other, SILENT..2 * SILENT, port).await;
    world.apply(&oversized_flag_set()).await;
    let crowded = OperatorProcess::start(&world).await;
    let [may_open, could_open] = crowded.open_files();
    assert_eq!(may_open, could_open, "it raises its own limit of open files");
    within(Duration::from_secs(120), "the silent pods are counted", async || {
        let count = i32::try_from(SILENT).unwrap();
        for workload in [&tenant, &other] {
            let policy = world.policy(&workload.name).await;
            let target = policy.status.unwrap_or_default().targets.into_iter().next().unwrap();
            let (pods, unreachable) = (target.pods, target.pods_unreachable);
            if (pods, unreachable) != (count + 1, count) {
                return Err(format!("{}: {pods}, {unreachable}", workload.name));
            }
        }
        Ok(())
    })
    .await;
    let edit = time_of_an_edit(&world, &catalog).await;
    let action = time_of_an_action(&payment).await;
    assert!(edit < POD_DEADLINE, "an edit elsewhere took {edit:?}");
    assert!(action < Duration::from_secs(5), "an action elsewhere took {action:?}");
    tenant.pods[0].after_more_reports(2).await;
    // Its policy asks every second.
    let begin = Instant::now();
    payment.pods[1].after_more_reports(10).await;
    let heard = begin.elapsed();
    assert!(heard < Duration::from_secs(13), "ten reports of a pod that answers took {heard:?}");

    let refused = world.until_flags_say("oversized", "Accepted", "False", "InvalidFlagSet").await;
    let message =
        &refused.status.unwrap().conditions.iter().find(|one| one.type_ == "Accepted").unwrap().message.clone();
    assert!(message.contains("that are read"), "it is not even parsed: {message}");
    let peak = crowded.peak_memory();
    println!("the process had {before} MiB at most without the tenant's objects, and {peak} MiB with them");
    assert!(peak < before + GROWTH, "{peak} MiB; {before} MiB without the tenant's objects");
}
