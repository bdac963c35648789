//! What pods say: how much of it is kept, shown and measured.

use crate::support::{World, recovery_policy, within, world::policy_conditions};
use contract::CircuitState;
use std::{collections::BTreeMap, time::Duration};

/// The value of a workload's circuit in the metrics.
fn gauge(metrics: &str, namespace: &str, dependency: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| {
        line.starts_with("resilience_operator_circuit_open_pods{")
            && line.contains(&format!("namespace=\"{namespace}\""))
            && line.contains(&format!("dependency=\"{dependency}\""))
    });
    line.and_then(|line| line.split(' ').next_back()?.parse().ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gauge_of_a_circuit_falls_and_goes_when_nobody_reports_it() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    let circuits =
        |state| BTreeMap::from([("database".to_owned(), CircuitState::Closed), ("payment".to_owned(), state)]);
    for pod in &workload.pods {
        pod.script().circuits = circuits(CircuitState::Open);
    }
    let operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    let until = async |what: &str, expected: Option<f64>| {
        within(Duration::from_secs(20), what, async || {
            let seen = gauge(&operator.metrics().await, &world.namespace, "payment");
            if seen == expected { Ok(()) } else { Err(format!("{seen:?}")) }
        })
        .await;
    };
    until("all three are open", Some(3.0)).await;
    workload.pods[0].script().circuits = circuits(CircuitState::Closed);
    until("one has closed", Some(2.0)).await;
    // A pod that is gone reports nothing any more.
    workload.pods[1].delete(&world).await;
    until("the pod of another is gone", Some(1.0)).await;
    workload.pods[2].script().circuits = circuits(CircuitState::Closed);
    until("the last has closed", Some(0.0)).await;
    for pod in &workload.pods {
        pod.script().circuits.remove("payment");
    }
    until("nobody has that circuit any more", None).await;
    assert_eq!(gauge(&operator.metrics().await, &world.namespace, "database"), Some(0.0), "the others stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pods_say_is_cut_before_it_is_kept_or_shown() {
    // What the whole status may be: a few pods must not fill etcd.
    const MOST: usize = 32 * 1024;
    let world = World::new().await;
    let workload = world.workload("booking", 8).await;
    for (number, pod) in workload.pods.iter().enumerate() {
        let mut script = pod.script();
        let text = format!("{number} {}", "ß".repeat(20_000));
        (script.failing, script.reset_helps) = (true, false);
        script.complaint.clone_from(&text);
        script.unsupported = (0..200).map(|path| format!("policy.settings.{path}.{}", "ß".repeat(200))).collect();
        script.circuits = (0..200).map(|name| (format!("{name}-{}", "c".repeat(50)), CircuitState::Open)).collect();
    }
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    let told = world
        .until_policy("booking", "check, circuits and what is unsupported are told", |policy| {
            let text = serde_json::to_string(&policy.status).unwrap();
            text.contains("policy.settings.0.") && text.contains("ßß") && text.contains("cccc")
        })
        .await;
    futures::future::join_all(workload.pods.iter().map(|pod| pod.after_more_reports(2))).await;
    let now = world.policy("booking").await;
    for policy in [&told, &now] {
        let size = serde_json::to_string(&policy.status).unwrap().len();
        assert!(size <= MOST, "the status has {size} bytes");
        for condition in policy_conditions(policy) {
            assert!(condition.message.len() <= 4096, "{}: {} bytes", condition.type_, condition.message.len());
        }
    }
    world.until_policy_says("booking", "Healthy", "False", "CheckUnhealthy").await;
}
