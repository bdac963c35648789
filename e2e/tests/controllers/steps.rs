//! The steps after ResetConnections: a pod is evicted, a cleanup Job is run.

use crate::support::{
    World, eventually,
    operator::Operator,
    recovery_policy, says, within,
    workload::Workload,
    world::{condition, last, policy_conditions, steps_and_phases},
};
use crds::{resilience_policy::StepAction, status::ActionOutcome};
use k8s_openapi::api::{batch::v1::Job, core::v1::Pod, policy::v1::PodDisruptionBudget};
use kube::{
    ResourceExt,
    api::{ListParams, Patch, PatchParams},
};
use serde_json::{Value, json};
use std::time::Duration;

/// A workload under a ladder of a reset and a restart. Its first pod is to fail in a way that a reset does not help.
async fn with_restart(pods: usize) -> (World, Workload, Operator) {
    let world = World::new().await;
    let workload = world.workload("booking", pods).await;
    let operator = Operator::start_with_short_lease(&world, "first").await;
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"] =
        json!([{ "action": "ResetConnections", "timeout": "1s" }, { "action": "RestartPod", "timeout": "90s" }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    (world, workload, operator)
}

fn break_permanently(workload: &Workload, pod: usize) {
    let mut script = workload.pods[pod].script();
    (script.failing, script.reset_helps) = (true, false);
}

async fn until_gone(world: &World, pod: &str) {
    eventually(&format!("{pod} is evicted"), async || match world.api::<Pod>().get_opt(pod).await.unwrap() {
        None => Ok(()),
        Some(_) => Err(String::new()),
    })
    .await;
}

/// Codes of the operator's requests for a subresource or resource, oldest first.
fn codes(world: &World, verb: &str, resource: &str) -> Vec<u64> {
    let writes = crate::support::audit::operator_writes(&world.cluster, &[&world.namespace]);
    writes.iter().filter(|one| one.verb == verb && one.resource == resource).map(|one| one.code).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_a_reset_does_not_help_is_evicted_and_verified_by_its_successor() {
    let (world, workload, _operator) = with_restart(3).await;
    break_permanently(&workload, 0);
    until_gone(&world, &workload.pods[0].name).await;
    assert_eq!(workload.pods[0].script().asked.len(), 1, "the mildest step came first");
    let waiting = world
        .until_policy("booking", "it waits for the successor", |policy| {
            let recovery = policy.status.as_ref().unwrap().recovery.clone().unwrap_or_default();
            recovery.in_flight.iter().any(|record| record.outcome == ActionOutcome::Verifying)
        })
        .await;
    assert_eq!(steps_and_phases(&world.recoveries().await), [("2/2", "Verifying"), ("1/2", "Failed")]);
    assert_eq!(last(&waiting).unwrap().step, 1, "only the reset is over");
    let successor = workload.new_pod(&world, true).await;
    world
        .until_recoveries("the restart succeeded", |all| {
            steps_and_phases(all) == [("2/2", "Succeeded"), ("1/2", "Failed")]
        })
        .await;
    assert!(successor.script().running.is_some(), "it was programmed on the way");
    assert_eq!(codes(&world, "create", "pods/eviction"), [201], "once");
}

/// Its check fails from its first run on, but not often enough yet to count when it has been there for the healthy delay.
#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_has_never_passed_is_no_success_and_is_not_evicted_again() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    let _operator = world.operator().await;
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["healthChecks"][0]["unhealthyThreshold"] = json!(4);
    policy["spec"]["recovery"]["ladders"][0]["steps"] = json!([{ "action": "RestartPod", "timeout": "10s" }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    break_permanently(&workload, 0);
    until_gone(&world, &workload.pods[0].name).await;
    let successor = workload.new_pod(&world, true).await;
    successor.script().failing = true;
    world.until_policy_says("booking", "RecoveryExhausted", "True", "RecoveryExhausted").await;
    assert_eq!(steps_and_phases(&world.recoveries().await), [("1/1", "Failed")]);
    assert_eq!(codes(&world, "create", "pods/eviction"), [201], "once");
    // It is healthy at last, and for long enough: then another failure is another ladder.
    successor.script().failing = false;
    world
        .until_recoveries("it is healed", |all| all[0].status.as_ref().is_some_and(|status| status.healed_at.is_some()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_asked_to_give_memory_back_before_it_is_restarted() {
    let world = World::new().await;
    let workload = world.workload("booking", 3).await;
    let _operator = world.operator().await;
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["recovery"]["ladders"][0]["steps"] =
        json!([{ "action": "TrimMemory", "timeout": "3s" }, { "action": "RestartPod", "timeout": "90s" }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    workload.pods[0].script().failing = true;
    let helped = world
        .until_policy("booking", "that helped", |policy| {
            last(policy).is_some_and(|record| record.outcome == ActionOutcome::Succeeded)
        })
        .await;
    let record = last(&helped).unwrap();
    assert_eq!((record.action, record.step), (StepAction::TrimMemory, 1));
    assert_eq!(workload.pods[0].script().asked.last().unwrap().action, contract::Action::TrimMemory);

    break_permanently(&workload, 1);
    until_gone(&world, &workload.pods[1].name).await;
    assert_eq!(workload.pods[1].script().asked.len(), 1, "asked once before");
    assert_eq!(codes(&world, "create", "pods/eviction"), [201]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_ends_when_its_workload_is_scaled_down_meanwhile() {
    let (world, workload, _operator) = with_restart(3).await;
    break_permanently(&workload, 0);
    until_gone(&world, &workload.pods[0].name).await;
    workload.scale(&world, 2, &json!({ "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2 })).await;
    let over = world
        .until_policy("booking", "the restart is over", |policy| last(policy).is_some_and(|one| one.step == 2))
        .await;
    let record = last(&over).unwrap().clone();
    assert_eq!(record.outcome, ActionOutcome::Cancelled);
    let message = record.message.unwrap();
    assert!(message.starts_with("scaled down to 2 meanwhile"), "{message}");
    world.until_events("booking", &["RecoveryCancelled"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_eviction_waits_says_so_and_goes_on() {
    let (world, workload, _operator) = with_restart(3).await;
    let budget = json!({
        "apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": { "name": "booking" },
        "spec": { "maxUnavailable": 1, "selector": { "matchLabels": { "app": "booking" } } },
    });
    world.apply(&budget).await;
    let allow = async |pods: i32| {
        let status = json!({ "status": {
            "observedGeneration": 1, "disruptionsAllowed": pods,
            "currentHealthy": 3, "desiredHealthy": 2, "expectedPods": 3,
        }});
        let api = world.api::<PodDisruptionBudget>();
        api.patch_status("booking", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    };
    allow(0).await;
    break_permanently(&workload, 0);
    let waiting = world
        .until_policy("booking", "the eviction waits", |policy| {
            let recovery = policy.status.as_ref().unwrap().recovery.clone().unwrap_or_default();
            recovery.in_flight.iter().any(|record| record.outcome == ActionOutcome::Waiting)
        })
        .await;
    let record = waiting.status.as_ref().unwrap().recovery.as_ref().unwrap().in_flight[0].clone();
    assert!(record.message.unwrap().contains("disruption budget"), "it says who refuses");
    assert!(record.acted_at.is_none());
    assert!(says(policy_conditions(&waiting), "Ready", "True", ""));
    world.until_events("booking", &["RecoveryRefused"]).await;
    eventually("it asked again", async || {
        let refused = codes(&world, "create", "pods/eviction").len();
        if refused >= 2 { Ok(()) } else { Err(refused.to_string()) }
    })
    .await;
    assert!(world.api::<Pod>().get_opt(&workload.pods[0].name).await.unwrap().is_some());

    allow(1).await;
    until_gone(&world, &workload.pods[0].name).await;
    let _successor = workload.new_pod(&world, true).await;
    world
        .until_policy("booking", "the restart succeeded", |policy| {
            last(policy).is_some_and(|record| record.outcome == ActionOutcome::Succeeded)
        })
        .await;
    assert_eq!(codes(&world, "create", "pods/eviction").iter().filter(|code| **code == 201).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_pod_is_restarted_while_too_many_are_unhealthy() {
    let (world, workload, _operator) = with_restart(3).await;
    break_permanently(&workload, 0);
    break_permanently(&workload, 1);
    world.until_policy_says("booking", "RecoveryAllowed", "False", "TooManyUnhealthy").await;
    break_permanently(&workload, 2);
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "AllPodsUnhealthy").await;
    assert!(condition(&held, "RecoveryAllowed").message.contains("all 3 pods"));
    for pod in &workload.pods {
        pod.after_more_reports(2).await;
        assert!(world.api::<Pod>().get_opt(&pod.name).await.unwrap().is_some(), "{} is left alone", pod.name);
    }
    assert!(codes(&world, "create", "pods/eviction").is_empty());
    workload.pods.iter().for_each(|pod| pod.script().failing = false);
    world.until_policy_says("booking", "RecoveryAllowed", "True", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_started_since_is_not_asked_to_do_what_another_was_meant_to_do() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let operator = Operator::start_with_short_lease(&world, "first").await;
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    {
        let mut script = workload.pods[0].script();
        (script.failing, script.reset_helps) = (true, false);
    }
    workload.pods[0].until_asked(1).await;
    operator.crash().await;
    workload.pods[0].restart_process();
    let _operator = Operator::start_with_short_lease(&world, "second").await;
    workload.pods[0].until_it_runs("its configuration", |_| true).await;
    workload.pods[0].after_more_reports(3).await;
    assert!(workload.pods[0].script().effects.values().all(|times| *times == 1), "nothing twice");
    workload.pods[0].script().failing = false;
    world.until_policy_says("booking", "Healthy", "True", "").await;
}

/// A policy that runs a cleanup Job for the check `booking-consistency`, and the CronJob that it is made from.
async fn with_cleanup(pods: usize, timeout: &str) -> (World, Workload, Operator) {
    let world = World::new().await;
    let workload = world.workload("booking", pods).await;
    let container = json!({ "name": "cleanup", "image": "none" });
    let cron_job = json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "booking-cleanup" },
        "spec": { "schedule": "@yearly", "suspend": true, "jobTemplate": { "spec": { "backoffLimit": 0,
            "template": { "spec": { "restartPolicy": "Never", "containers": [container] } } } } },
    });
    world.apply(&cron_job).await;
    let operator = Operator::start_with_short_lease(&world, "first").await;
    let step = json!({ "action": "RunCleanupJob", "cronJobRef": { "name": "booking-cleanup" }, "timeout": timeout });
    let mut policy = recovery_policy("booking", "booking");
    policy["spec"]["healthChecks"] =
        json!([{ "name": "booking-consistency", "scope": "Workload", "interval": "1s", "unhealthyThreshold": 1 }]);
    policy["spec"]["recovery"]["ladders"] = json!([{ "check": "booking-consistency", "steps": [step] }]);
    world.apply(&policy).await;
    world.until_policy_says("booking", "Ready", "True", "").await;
    (world, workload, operator)
}

fn set_books(workload: &Workload, inconsistent: bool) {
    workload.pods.iter().for_each(|pod| pod.script().inconsistent = inconsistent);
}

async fn the_job(world: &World) -> Job {
    eventually("a Job is made", async || {
        let jobs = world.api::<Job>().list(&ListParams::default()).await.unwrap().items;
        assert!(jobs.len() <= 1, "one fact, one Job: {:?}", jobs.iter().map(ResourceExt::name_any).collect::<Vec<_>>());
        jobs.into_iter().next().ok_or_else(String::new)
    })
    .await
}

async fn finish(world: &World, job: &Job, well: bool) {
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let condition = |type_: &str, reason: &str| json!({ "type": type_, "status": "True", "reason": reason, "lastTransitionTime": now });
    let status: Value = if well {
        let conditions =
            [condition("SuccessCriteriaMet", "CompletionsReached"), condition("Complete", "CompletionsReached")];
        json!({ "startTime": now, "completionTime": now, "succeeded": 1, "conditions": conditions })
    } else {
        let conditions =
            [condition("FailureTarget", "BackoffLimitExceeded"), condition("Failed", "BackoffLimitExceeded")];
        json!({ "startTime": now, "failed": 1, "conditions": conditions })
    };
    let status = json!({ "status": status });
    world.api::<Job>().patch_status(&job.name_any(), &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_books_are_put_right_by_one_job_for_the_whole_workload() {
    let (world, workload, operator) = with_cleanup(3, "90s").await;
    set_books(&workload, true);
    let job = the_job(&world).await;
    let owner = &job.owner_references()[0];
    assert_eq!((owner.kind.as_str(), owner.uid.as_str()), ("Deployment", workload.uid.as_str()));
    // Another leader goes on with the same Job.
    operator.crash().await;
    let _operator = Operator::start_with_short_lease(&world, "second").await;
    set_books(&workload, false);
    workload.pods[0].after_more_reports(4).await;
    world.until_recoveries("the Job is not over", |all| steps_and_phases(all) == [("1/1", "Verifying")]).await;
    finish(&world, &job, true).await;
    let recovered = world
        .until_policy("booking", "it succeeded", |policy| {
            last(policy).is_some_and(|record| record.outcome == ActionOutcome::Succeeded)
        })
        .await;
    let record = last(&recovered).unwrap();
    assert_eq!(job.name_any(), format!("booking-cleanup-{}", record.id), "the Job is named by its intent");
    assert!(record.pod.is_none());
    the_job(&world).await;
    assert_eq!(codes(&world, "create", "jobs").iter().filter(|code| **code == 201).count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fails_ends_its_step_at_once_and_says_why() {
    let (world, workload, _operator) = with_cleanup(2, "90s").await;
    set_books(&workload, true);
    let job = the_job(&world).await;
    finish(&world, &job, false).await;
    let failed = world.until_policy_says("booking", "RecoveryExhausted", "True", "RecoveryExhausted").await;
    let record = last(&failed).unwrap();
    assert_eq!(record.outcome, ActionOutcome::Failed);
    assert!(record.message.as_ref().unwrap().contains("BackoffLimitExceeded"), "{record:?}");
    world.until_events("booking", &["RecoveryFailed"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cron_job_that_is_missing_is_named_and_waited_for() {
    let (world, workload, _operator) = with_cleanup(1, "2s").await;
    let cron_job = json!({ "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "booking-cleanup" } });
    world.delete(&cron_job).await;
    set_books(&workload, true);
    // Half a minute after it began to lead, it gives up.
    let message = within(Duration::from_secs(90), "it says what is missing", async || {
        let policy = world.policy("booking").await;
        last(&policy).and_then(|record| record.message.clone()).ok_or_else(String::new)
    })
    .await;
    assert!(message.contains("there is no CronJob booking-cleanup"), "{message}");
}
