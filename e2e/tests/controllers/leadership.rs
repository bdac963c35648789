//! Several replicas: one writes.

use crate::support::{
    World, eventually, manifests::policy_with_request, operator::Operator, policy, world::request_ms,
};
use crds::ResiliencePolicy;
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;

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
