//! Nothing changes, so nothing is written; and what is allowed is enough.

use crate::support::{World, audit::operator_writes, cluster::Cluster, flag_set, recovery_policy};
use operator::status::writes::WRITE_INTERVAL;
use serde_json::Value;
use std::{sync::Arc, time::Instant};

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

/// Each report of a pod changes what there is to say.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_of_which_much_changes_is_written_five_times_a_second_at_most() {
    const PODS: usize = 60;
    let world = World::new().await;
    let workload = world.workload("booking", PODS).await;
    let _operator = world.operator().await;
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"] = Value::Null;
    world.apply(&policy).await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;
    let writes = || {
        let all = operator_writes(&world.cluster, &[&world.namespace]);
        all.iter().filter(|one| one.resource == "resiliencepolicies/status").count()
    };
    let (begin, before) = (Instant::now(), writes());
    for failing in [true, false, true, false] {
        for pod in &workload.pods {
            pod.script().failing = failing;
        }
        let expected = if failing { PODS } else { 0 };
        world
            .until_policy("booking", "all of them are counted", |policy| {
                let checks = &policy.status.as_ref().unwrap().checks;
                checks.iter().map(|check| check.unhealthy_pods).sum::<i32>() == i32::try_from(expected).unwrap()
            })
            .await;
    }
    let (time, writes) = (begin.elapsed(), writes() - before);
    println!("{writes} writes in {time:?}");
    let most = time.as_millis() / WRITE_INTERVAL.as_millis() + 2;
    assert!(writes as u128 <= most, "{writes} writes in {time:?}");
    assert!(writes > 4, "there was more to say than the ends");
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
