//! What a person has done by making a Recovery, and takes back by deleting one.

use crate::{POLICY, SOON, programmed, restarts, testbed};
use e2e::testbed::{TICKETING, Testbed, phase, until};
use kube::ResourceExt;
use serde_json::json;

/// Has a pod restarted.
async fn ask(testbed: &Testbed, name: &str, pod: &str) {
    let recovery = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "Recovery",
        "metadata": { "name": name, "namespace": TICKETING },
        "spec": {
            "targetRef": { "name": "booking" }, "action": "RestartPod", "pod": { "name": pod },
            "requestedBy": "on call, incident 4711",
        },
    });
    testbed.kubectl.apply(&recovery.to_string()).await.unwrap();
}

async fn until_phase(testbed: &Testbed, name: &str, wanted: &str) {
    until(SOON, &format!("{name} is {wanted}"), || async {
        let all = testbed.recoveries().await?;
        let one = all.iter().find(|recovery| recovery.name_any() == name);
        Ok(if one.is_some_and(|one| phase(one) == wanted) { Ok(()) } else { Err(format!("{one:?}")) })
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_person_restarts_one_pod_within_the_disruption_budget_and_takes_another_restart_back() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    programmed(&testbed).await;
    let before = restarts(&testbed).await;
    let pods = testbed.booking_pods().await.unwrap();
    let (first, second) = (&pods[0], &pods[1]);

    // No pod may go for now: one restart is taken back, the other one waits.
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": { "name": "by-hand", "namespace": TICKETING },
        "spec": { "maxUnavailable": 0, "selector": { "matchLabels": { "app.kubernetes.io/name": "booking" } } },
    });
    testbed.kubectl.apply(&budget.to_string()).await.unwrap();
    ask(&testbed, "restart-second", &second.name_any()).await;
    until_phase(&testbed, "restart-second", "Waiting").await;
    testbed.kubectl.run(&format!("delete recovery restart-second -n {TICKETING}")).await.unwrap();
    ask(&testbed, "restart-first", &first.name_any()).await;
    until_phase(&testbed, "restart-first", "Waiting").await;
    testbed.kubectl.run(&format!("delete pdb by-hand -n {TICKETING}")).await.unwrap();
    until_phase(&testbed, "restart-first", "Succeeded").await;
    programmed(&testbed).await;

    let after = restarts(&testbed).await;
    let gone: Vec<_> = before.keys().filter(|uid| !after.contains_key(*uid)).collect();
    assert_eq!(gone, [&first.uid().unwrap()], "that pod, and no other");
    let shown = testbed.kubectl.run(&format!("get recoveries -n {TICKETING}")).await.unwrap();
    println!("{shown}");
    let line = shown.lines().find(|line| line.starts_with("restart-first")).unwrap();
    for word in ["booking", "RestartPod", "1/1", "Succeeded"] {
        assert!(line.contains(word), "{line}");
    }
}
