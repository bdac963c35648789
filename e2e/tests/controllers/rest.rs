//! Nothing changes, so nothing is written; and what is allowed is enough.

use crate::support::{World, audit::operator_writes, cluster::Cluster, flag_set, recovery_policy};
use std::sync::Arc;

#[tokio::test(flavor = "multi_thread")]
async fn at_rest_nothing_is_written_but_the_lease() {
    let world = World::new().await;
    let mut workloads = Vec::new();
    let _operator = world.operator().await;
    for name in ["gateway", "catalog", "booking", "payment", "notification"] {
        workloads.push(world.workload(name, 2).await);
        world.apply(&recovery_policy(name, name)).await;
    }
    world.apply(&flag_set("flags", "booking")).await;
    for workload in &workloads {
        world.until_policy_says(&workload.name, "Ready", "True", "Programmed").await;
    }
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    // Events of the beginning may still be on their way.
    let written = || operator_writes(&world.cluster, &[&world.namespace, &world.home]);
    for workload in &workloads {
        world.until_events(&workload.name, &["Programmed"]).await;
        workload.pods[0].after_more_reports(2).await;
    }

    let before = written();
    workloads[0].pods[0].after_more_reports(15).await;
    let mut since = written().split_off(before.len());
    let all = since.len();
    since.retain(|write| write.resource != "leases");
    assert!(since.is_empty(), "{since:?}");
    assert!(all > 0, "the lease was renewed meanwhile");
    assert!(before.iter().all(|write| write.code != 403), "the chart's rights are enough: {before:?}");
    let requests: Vec<_> =
        workloads.iter().flat_map(|workload| &workload.pods).map(|pod| pod.script().pushes.len()).collect();
    assert!(requests.iter().all(|pushes| *pushes <= 2), "nothing is pushed again and again: {requests:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_namespaces_can_be_watched_with_the_chart_s_cluster_role() {
    let cluster = Arc::new(Cluster::start().await);
    let world = World::watched_from_everywhere(Arc::clone(&cluster)).await;
    let other = World::watched_from_everywhere(cluster).await;
    let (one, two) = (world.workload("booking", 1).await, other.workload("booking", 1).await);
    let _operator = world.operator().await;
    for (world, workload) in [(&world, &one), (&other, &two)] {
        world.apply(&recovery_policy("booking", "booking")).await;
        world.until_policy_says("booking", "Ready", "True", "Programmed").await;
        workload.pods[0].script().failing = true;
        workload.pods[0].until_asked(1).await;
        world.until_events("booking", &["Programmed", "RecoveryStarted"]).await;
    }
    let writes = operator_writes(&world.cluster, &[&world.namespace, &other.namespace, &world.home]);
    assert!(writes.iter().all(|write| write.code != 403), "{writes:?}");
}
