//! Several replicas: one writes.

use crate::support::{
    World, audit::operator_writes, eventually, manifests::policy_with_request, operator::Operator, policy,
    recovery_policy, within, world::request_ms,
};
use crds::ResiliencePolicy;
use k8s_openapi::api::{
    coordination::v1::Lease,
    core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::time::{Duration, Instant};

/// Waits until the Lease names this replica.
async fn until_leads(world: &World, replica: &str) {
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), &world.home);
    eventually(&format!("{replica} leads"), async || {
        let lease = leases.get_opt("resilience-operator").await.unwrap();
        let holder = lease.and_then(|lease| lease.spec?.holder_identity);
        if holder.as_deref() == Some(replica) { Ok(()) } else { Err(format!("{holder:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_when_the_leader_ends_or_dies() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let first = Operator::start_with_short_lease(&world, "first").await;
    until_leads(&world, "first").await;
    let second = Operator::start_with_short_lease(&world, "second").await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(workload.pods[0].script().pushes.len(), 1, "only one of the two pushes");

    first.stop().await;
    until_leads(&world, "second").await;
    world.apply(&policy_with_request("booking", "booking", "6s")).await;
    workload.pods[0].until_it_runs("the edit", |running| request_ms(running) == Some(6_000)).await;

    // This one releases nothing: the next has to wait until the Lease has run out.
    let _third = Operator::start_with_short_lease(&world, "third").await;
    second.crash().await;
    until_leads(&world, "third").await;
    world.apply(&policy_with_request("booking", "booking", "7s")).await;
    workload.pods[0].until_it_runs("the next edit", |running| request_ms(running) == Some(7_000)).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    workload.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_lease_is_taken_ends_and_says_so() {
    let world = World::new().await;
    let first = Operator::start_with_short_lease(&world, "first").await;
    until_leads(&world, "first").await;
    let leases: Api<Lease> = Api::namespaced(world.client.clone(), &world.home);
    let taken = json!({ "spec": { "holderIdentity": "somebody" } });
    leases.patch("resilience-operator", &PatchParams::default(), &Patch::Merge(&taken)).await.unwrap();
    let ended = first.ended().await.unwrap_err().to_string();
    assert!(ended.contains("somebody took the lease"), "{ended}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_made_from_an_old_version_is_refused() {
    // The shape of the operator's own writes: forced, and fenced by resourceVersion.
    let world = World::new().await;
    world.apply(&policy("booking", "booking")).await;
    let seen = world.policy("booking").await;
    world.apply(&policy_with_request("booking", "booking", "6s")).await;
    let write = async |version: Option<String>, uid: Option<String>| {
        let status = json!({
            "apiVersion": "resilience.ticketwave.io/v1alpha1",
            "kind": "ResiliencePolicy",
            "metadata": { "name": "booking", "uid": uid, "resourceVersion": version },
            "status": { "conditions": [], "targets": [], "open": "made up" },
        });
        let how = PatchParams::apply("resilience-operator").force();
        let api = world.api::<ResiliencePolicy>();
        match api.patch_status("booking", &how, &Patch::Apply(&status)).await {
            Ok(_) => 200,
            Err(kube::Error::Api(status)) => status.code,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(write(seen.resource_version(), seen.uid()).await, 409, "an old version");
    let now = world.policy("booking").await;
    assert_eq!(write(now.resource_version(), now.uid()).await, 200);
    world.delete(&policy("booking", "booking")).await;
    assert_ne!(write(now.resource_version(), now.uid()).await, 200, "it is not brought back");
}

/// It listens first: pods that are in sync get nothing, and nothing is written.
#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_asks_all_pods_and_neither_pushes_nor_writes_where_all_is_in_sync() {
    const PODS: usize = 30;
    let world = World::new().await;
    let workload = world.workload("booking", PODS).await;
    let first = Operator::start_with_short_lease(&world, "first").await;
    // Its checks are asked for every second.
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;
    let versions = async || {
        let map = contract::config_map_name(contract::WorkloadKind::Deployment, "booking");
        let secret = contract::token_secret_name(contract::WorkloadKind::Deployment, "booking");
        [
            world.policy("booking").await.resource_version(),
            world.api::<ConfigMap>().get(&map).await.unwrap().resource_version(),
            world.api::<Secret>().get(&secret).await.unwrap().resource_version(),
        ]
    };
    let status = async || serde_json::to_string_pretty(&world.policy("booking").await.status).unwrap();
    let writes = || operator_writes(&world.cluster, &[&world.namespace]).len();

    let mut last = Some(first);
    for (successor, clean) in [("second", true), ("third", false)] {
        let before = last.take().unwrap();
        if clean {
            before.stop().await;
        } else {
            before.crash().await;
        }
        let (known, written, said) = (versions().await, writes(), status().await);
        let counts: Vec<_> = workload.pods.iter().map(|pod| pod.script().counts()).collect();
        let now = Operator::start_with_short_lease(&world, successor).await;
        until_leads(&world, successor).await;
        let led = Instant::now();
        within(Duration::from_secs(30), "all pods are asked", async || {
            let unheard =
                workload.pods.iter().zip(&counts).filter(|(pod, (_, reports))| pod.script().reports == *reports);
            let unheard = unheard.count();
            if unheard == 0 { Ok(()) } else { Err(unheard.to_string()) }
        })
        .await;
        // One interval and two seconds.
        assert!(led.elapsed() < Duration::from_secs(3), "{successor} knows all pods after {:?}", led.elapsed());
        futures::future::join_all(workload.pods.iter().map(|pod| pod.after_more_reports(3))).await;
        let puts: Vec<_> = workload.pods.iter().map(|pod| pod.script().puts).collect();
        assert_eq!(puts, counts.iter().map(|(puts, _)| *puts).collect::<Vec<_>>(), "{successor} pushed");
        assert_eq!(status().await, said, "{successor} said something else");
        assert_eq!(versions().await, known, "{successor} wrote policy, ConfigMap or Secret");
        assert_eq!(writes(), written, "{successor} asked for no write in the namespace");
        last = Some(now);
    }

    // And it does push where a pod has fallen behind.
    workload.pods[0].restart_process();
    workload.pods[0].until_it_runs("it again", |running| request_ms(running) == Some(5_000)).await;
}
