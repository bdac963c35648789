//! Two releases of the operator that watch one namespace: the second says so and leaves everything alone, until the first
//! is gone.

use crate::support::{
    World,
    audit::{Write, operator_writes},
    eventually,
    manifests::policy_with_request,
    operator::Operator,
    policy, within,
    world::request_ms,
};
use contract::WorkloadKind;
use crds::ResiliencePolicy;
use k8s_openapi::api::{
    core::v1::{ConfigMap, Secret},
    events::v1::Event,
};
use kube::{ResourceExt, api::ListParams};
use std::time::Duration;

/// Annotation of a ConfigMap that says who writes it.
const MARK: &str = "resilience.ticketwave.io/operator";
/// The second looks at the first's Lease every 10 s, and at a workload that is not its own every 30 s.
const TAKEOVER: Duration = Duration::from_secs(50);

/// Versions of all that a release writes for the workload.
async fn versions(world: &World) -> [Option<String>; 3] {
    let map = contract::config_map_name(WorkloadKind::Deployment, "booking");
    let secret = contract::token_secret_name(WorkloadKind::Deployment, "booking");
    [
        world.api::<ResiliencePolicy>().get("booking").await.unwrap().resource_version(),
        world.api::<ConfigMap>().get(&map).await.unwrap().resource_version(),
        world.api::<Secret>().get(&secret).await.unwrap().resource_version(),
    ]
}

async fn mark(world: &World) -> String {
    let map = world.config_map("booking").await.unwrap();
    map.annotations().get(MARK).cloned().unwrap_or_default()
}

/// Notes of the Events that say it.
async fn conflicts(world: &World) -> Vec<String> {
    let all = world.api::<Event>().list(&ListParams::default()).await.unwrap().items;
    let told = all.into_iter().filter(|event| event.reason.as_deref() == Some("Conflicted"));
    told.filter_map(|event| event.note).collect()
}

/// What a release wrote, or tried to, in the namespace, but for Events.
fn writes_of(world: &World) -> Vec<Write> {
    let user = format!("system:serviceaccount:{}:", world.home);
    let mut all = operator_writes(&world.cluster, &[&world.namespace]);
    all.retain(|write| write.user.starts_with(&user) && write.resource != "events");
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_releases_the_second_writes_nothing_until_the_first_is_gone() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let first = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let first_mark = format!("{}/resilience-operator", world.home);
    assert_eq!(mark(&world).await, first_mark);
    let before = versions(&world).await;

    let elsewhere = world.for_another_release().await;
    let second = Operator::start(&elsewhere, &["--identity", "second"]).await;
    eventually("the second says who was there first", async || {
        let told = conflicts(&world).await;
        if told.iter().any(|note| note.contains(&first_mark)) { Ok(()) } else { Err(format!("{told:?}")) }
    })
    .await;
    futures::future::join_all(workload.pods.iter().map(|pod| pod.after_more_reports(2))).await;
    assert_eq!(versions(&world).await, before, "policy, ConfigMap and Secret stand still");

    // An edit is the first's to publish; the second sees it too, and does nothing.
    world.apply(&policy_with_request("booking", "booking", "6s")).await;
    for pod in &workload.pods {
        pod.until_it_runs("the edit", |running| request_ms(running) == Some(6_000)).await;
    }
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    let settled = versions(&world).await;
    for pod in &workload.pods {
        pod.after_more_reports(2).await;
        assert_eq!(pod.script().tokens_seen.len(), 2, "no token, and that of the first");
    }
    assert_eq!((versions(&world).await, mark(&world).await), (settled, first_mark.clone()));
    assert_eq!(writes_of(&elsewhere), [], "it only publishes Events");
    assert!(second.metrics().await.contains("resilience_operator_leader 1"), "it leads its own release all the same");

    first.stop().await;
    let second_mark = format!("{}/resilience-operator", elsewhere.home);
    within(TAKEOVER, "the second takes over", async || {
        let mark = mark(&world).await;
        if mark == second_mark { Ok(()) } else { Err(mark) }
    })
    .await;
    world.apply(&policy_with_request("booking", "booking", "7s")).await;
    for pod in &workload.pods {
        pod.until_it_runs("what the second published", |running| request_ms(running) == Some(7_000)).await;
    }
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    workload.assert_revisions_grow();
}
