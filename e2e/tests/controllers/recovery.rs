//! A check fails, connections are reset, and the check says whether it helped.

use crate::support::{
    World,
    operator::Operator,
    recovery_policy, says,
    world::{condition, last, message, phase, policy_conditions, steps_and_phases},
};
use crds::{resilience_policy::StepAction, status::ActionOutcome};
use kube::ResourceExt;
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_check_recovers_by_one_action_whose_intent_is_written_first() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let _operator = world.operator().await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    workload.pods[0].script().failing = true;

    let asked = workload.pods[0].until_asked(1).await;
    let intent = asked[0].recovery.clone().expect("the Recovery was there before the pod was asked");
    assert_eq!(phase(&intent), "Pending");
    assert_eq!((intent.spec.action, intent.spec.check.as_deref()), (StepAction::ResetConnections, Some("database")));
    assert_eq!(intent.spec.pod.as_ref().unwrap().name, workload.pods[0].name);
    let owner = &intent.owner_references()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("Deployment", workload.uid.as_str()));
    assert!(intent.name_any().starts_with("booking-database-"), "{}", intent.name_any());

    let recovered = world
        .until_policy("booking", "it succeeded", |policy| {
            last(policy).is_some_and(|record| record.outcome == ActionOutcome::Succeeded)
        })
        .await;
    let recovery = recovered.status.clone().unwrap().recovery.unwrap();
    let record = recovery.last.as_ref().unwrap();
    assert_eq!((record.id.as_str(), record.dry_run), (asked[0].intent_id.as_str(), false));
    assert!(record.acted_at.is_some() && record.finished_at.is_some());
    assert!(recovery.in_flight.is_empty());
    assert_eq!(recovery.remaining_budget, Some(19));
    assert!(says(policy_conditions(&recovered), "Healthy", "True", "AllChecksPass"));
    assert!(
        says(policy_conditions(&recovered), "Ready", "True", "Programmed"),
        "an incident never makes a policy unready"
    );

    workload.pods[0].after_more_reports(3).await;
    assert_eq!(workload.pods[0].script().asked.len(), 1, "exactly once");
    assert!(workload.pods[1].script().asked.is_empty(), "the healthy pod is left alone");
    world.until_events("booking", &["CheckUnhealthy", "RecoveryStarted", "RecoverySucceeded"]).await;
    world.until_events(&intent.name_any(), &["RecoveryStarted", "RecoverySucceeded"]).await;
    let all = world.recoveries().await;
    assert_eq!(steps_and_phases(&all), [("1/1", "Succeeded")]);
    assert!(message(&all[0]).starts_with("healthy for "), "{}", message(&all[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_no_step_helps_the_ladder_ends_and_a_person_is_called() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    {
        let mut script = workload.pods[0].script();
        (script.failing, script.reset_helps) = (true, false);
    }
    let _operator = world.operator().await;
    let mut policy = recovery_policy("booking", "booking");
    let step = json!({ "action": "ResetConnections", "timeout": "1s" });
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([step, step]);
    // Within one ladder the next step need not wait for the cooldown.
    policy["spec"]["recovery"]["limits"]["cooldown"] = json!("10m");
    world.apply(&policy).await;

    let given_up = world.until_policy_says("booking", "RecoveryExhausted", "True", "RecoveryExhausted").await;
    let conditions = policy_conditions(&given_up);
    assert!(
        says(conditions, "Ready", "True", "Programmed") && says(conditions, "Stalled", "False", ""),
        "{conditions:?}"
    );
    assert!(says(conditions, "Healthy", "False", "CheckUnhealthy"));
    assert!(condition(&given_up, "RecoveryExhausted").message.contains(&workload.pods[0].name));
    let all = world.recoveries().await;
    assert_eq!(steps_and_phases(&all), [("2/2", "Failed"), ("1/2", "Failed")]);
    let slot = all[1].name_any().rsplit('-').next().map(str::to_owned);
    assert_eq!(all[0].spec.after, slot, "each follows the one before");
    workload.pods[0].after_more_reports(3).await;
    let asked: Vec<_> = workload.pods[0].script().asked.iter().map(|asked| asked.intent_id.clone()).collect();
    assert!(asked.len() == 2 && asked[0] != asked[1], "each step once: {asked:?}");
    world.until_events("booking", &["RecoveryStarted", "RecoveryFailed", "RecoveryExhausted"]).await;

    // It is well again by itself: nothing is left of it.
    workload.pods[0].script().failing = false;
    world.until_policy_says("booking", "RecoveryExhausted", "False", "NotExhausted").await;
    world.until_policy_says("booking", "Healthy", "True", "AllChecksPass").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_that_starts_again_neither_repeats_nor_forgets() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    {
        let mut script = workload.pods[0].script();
        (script.failing, script.reset_helps) = (true, false);
    }
    let operator = Operator::start_with_short_lease(&world, "first").await;
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([{ "action": "ResetConnections", "timeout": "20s" }]);
    world.apply(&policy).await;
    workload.pods[0].until_asked(1).await;
    operator.crash().await;

    let _operator = Operator::start_with_short_lease(&world, "second").await;
    workload.pods[0].after_more_reports(3).await;
    let ids: std::collections::BTreeSet<_> =
        workload.pods[0].script().asked.iter().map(|asked| asked.intent_id.clone()).collect();
    assert_eq!(ids.len(), 1, "it goes on with the intent that it finds");
    workload.pods[0].script().failing = false;
    world.until_recoveries("and brings it to its end", |all| steps_and_phases(all) == [("1/1", "Succeeded")]).await;
}
