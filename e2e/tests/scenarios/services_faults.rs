//! What a pod cannot cure by itself, and what the operator does about it: the mildest thing that helps, once, where it is
//! needed, and nothing anywhere else.

use crate::{SOON, incident::Before, programmed, restarts, selling, testbed};
use contract::admin::MemoryFault;
use crds::{ConditionType, Recovery, ResiliencePolicy, resilience_policy::StepAction};
use e2e::{
    pod_admin::PodAdmin,
    quick_policy::{quick_policy, quick_policy_with_readiness},
    sabotage::{OutdatedSessions, StoppedProcess, leak_reservations, leaked_seats},
    testbed::{Testbed, TestbedError, is_true, phase, until},
    traffic::Traffic,
};
use kube::ResourceExt;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

pub async fn recover_quickly(testbed: &Testbed) {
    testbed.kubectl.apply(&quick_policy("booking").to_string()).await.unwrap();
    programmed(testbed).await;
}

/// What was done between two looks, as pods count it and as the API server's log has it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Resets of connections, by pod.
    pub resets: BTreeMap<String, u64>,
    pub evictions: usize,
    pub jobs: usize,
    /// Uids of pods that are gone.
    pub gone: Vec<String>,
}

impl Done {
    pub async fn since(testbed: &Testbed, before: &Before) -> Self {
        let after = Before::look(testbed).await;
        let more = |(pod, now): (String, u64)| {
            let more = now - before.resets.get(&pod).copied().unwrap_or_default();
            (more > 0).then_some((pod, more))
        };
        Self {
            resets: after.resets.into_iter().filter_map(more).collect(),
            evictions: after.evictions - before.evictions,
            jobs: after.jobs - before.jobs,
            gone: before.pods.difference(&after.pods).cloned().collect(),
        }
    }
}

/// Whether the API server's log is there to be counted in.
async fn is_logged(testbed: &Testbed) -> usize {
    usize::from(testbed.cluster.audit_log().await.unwrap().is_some())
}

/// Waits until as many steps are over and all is well; the answer is what was done, the first step first.
async fn recovered_by(testbed: &Testbed, steps: &[(StepAction, &str)]) -> Result<Vec<Recovery>, TestbedError> {
    let all = until(SOON * 2, "recovered", || async {
        let mut all = testbed.recoveries().await?;
        all.reverse();
        let seen: Vec<_> = all.iter().map(|one| (one.spec.action, phase(one))).collect();
        let over = seen.iter().filter(|(_, phase)| ["Succeeded", "Failed", "Cancelled"].contains(phase)).count();
        Ok(if over >= steps.len() { Ok(all) } else { Err(format!("{seen:?}")) })
    })
    .await?;
    let seen: Vec<_> = all.iter().map(|one| (one.spec.action, phase(one))).collect();
    assert_eq!(seen, steps, "{all:#?}");
    let healthy = |policy: &ResiliencePolicy| is_true(policy, ConditionType::Healthy.as_str());
    testbed.policy_until("booking", SOON, "all checks healthy", healthy).await?;
    Ok(all)
}

/// Waits until each of these pods has sold some more.
pub async fn all_sell(traffic: &Traffic, limit: Duration) {
    let sold = || traffic.by_pod.iter().map(|(_, count)| count.now().0).collect::<Vec<_>>();
    let before = sold();
    until(limit, "bookings in every pod", || async {
        let more: Vec<_> = sold().iter().zip(&before).map(|(now, before)| now - before).collect();
        Ok(if more.iter().all(|more| *more >= 2) { Ok(()) } else { Err(format!("{more:?}")) })
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn leaked_reservations_are_freed_by_one_job_for_the_whole_workload() {
    let (testbed, _turn) = testbed().await;
    recover_quickly(&testbed).await;
    let traffic = selling(&testbed).await;
    let (before, running) = (Before::look(&testbed).await, restarts(&testbed).await);
    assert_eq!(leaked_seats(&testbed).await.unwrap(), 0);
    leak_reservations(&testbed, 7).await.unwrap();
    let since = Instant::now();
    let all = recovered_by(&testbed, &[(StepAction::RunCleanupJob, "Succeeded")]).await.unwrap();
    println!("leaked reservations: healthy again {:.1} s after the leak", since.elapsed().as_secs_f64());

    assert_eq!(all[0].spec.check.as_deref(), Some("booking-consistency"));
    assert!(all[0].spec.pod.is_none(), "it is nobody's own fault");
    all_sell(&traffic, SOON).await;
    drop(traffic);
    until(SOON, "every seat is free or sold", || async {
        // A booking may be between the two figures for a moment.
        let leaked = leaked_seats(&testbed).await?;
        Ok(if leaked == 0 { Ok(()) } else { Err(format!("{leaked} are neither")) })
    })
    .await
    .unwrap();
    let done = Done::since(&testbed, &before).await;
    assert_eq!(done, Done { jobs: is_logged(&testbed).await, ..Done::default() });
    assert_eq!(restarts(&testbed).await, running, "nothing was restarted");
}

#[tokio::test]
async fn sessions_that_answer_and_are_of_no_use_are_reset_in_their_pod_and_nothing_is_restarted() {
    let (testbed, _turn) = testbed().await;
    recover_quickly(&testbed).await;
    let traffic = selling(&testbed).await;
    let names: Vec<_> = traffic.by_pod.iter().map(|(name, _)| name.as_str()).collect();
    let (victim, others) = names.split_last().unwrap();
    let (before, running) = (Before::look(&testbed).await, restarts(&testbed).await);
    let outdated = OutdatedSessions::of(&testbed, &[*victim], others).await.unwrap();
    let seen = until(SOON, "the sessions found out", || async {
        let check = PodAdmin::find(&testbed).await?.health(victim).await?.checks.remove("database").unwrap();
        Ok(if check.message.contains("cached plan must not change result type") {
            Ok(check)
        } else {
            Err(check.message)
        })
    })
    .await
    .unwrap();
    println!("{} sessions are outdated: {}", outdated.pids.len(), seen.message);
    assert_eq!(seen.dependency_answers, Some(true), "{seen:?}");
    let all = recovered_by(&testbed, &[(StepAction::ResetConnections, "Succeeded")]).await;
    outdated.end(&testbed).await.unwrap();
    let all = all.unwrap();
    println!("outdated sessions: healthy again after {:.1} s", outdated.since.elapsed().as_secs_f64());

    let pod = all[0].spec.pod.as_ref().map(|pod| pod.name.as_str());
    assert_eq!((all[0].spec.check.as_deref(), pod), (Some("database"), Some(*victim)));
    all_sell(&traffic, SOON).await;
    let done = Done::since(&testbed, &before).await;
    assert_eq!(done, Done { resets: [((*victim).to_owned(), 1)].into(), ..Done::default() });
    assert_eq!(restarts(&testbed).await, running, "nothing was restarted");
}

/// As most migrations do it: no pod has new sessions.
#[tokio::test]
async fn sessions_of_no_use_in_all_pods_are_reset_in_each_of_them_once() {
    let (testbed, _turn) = testbed().await;
    recover_quickly(&testbed).await;
    let traffic = selling(&testbed).await;
    let names: Vec<_> = traffic.by_pod.iter().map(|(name, _)| name.as_str()).collect();
    let (before, running) = (Before::look(&testbed).await, restarts(&testbed).await);
    let outdated = OutdatedSessions::of(&testbed, &names, &[]).await.unwrap();
    let reset = (StepAction::ResetConnections, "Succeeded");
    let all = recovered_by(&testbed, &vec![reset; names.len()]).await;
    outdated.end(&testbed).await.unwrap();
    all.unwrap();
    println!("outdated sessions in all pods: healthy again after {:.1} s", outdated.since.elapsed().as_secs_f64());
    all_sell(&traffic, SOON).await;
    let done = Done::since(&testbed, &before).await;
    let resets = names.iter().map(|name| ((*name).to_owned(), 1)).collect();
    assert_eq!(done, Done { resets, ..Done::default() });
    assert_eq!(restarts(&testbed).await, running, "nothing was restarted");
}

#[tokio::test]
async fn memory_that_leaks_is_asked_for_first_and_then_its_pod_is_replaced() {
    let (testbed, _turn) = testbed().await;
    recover_quickly(&testbed).await;
    let traffic = selling(&testbed).await;
    let before = Before::look(&testbed).await;
    let pods = PodAdmin::find(&testbed).await.unwrap();
    let victim = &testbed.booking_pods().await.unwrap()[0];
    let name = victim.name_any();
    pods.fill_memory(&name, MemoryFault { mebibytes: 64, lease_seconds: 120 }).await.unwrap();
    let since = Instant::now();
    until(SOON, "the pod has given back what it can", || async {
        let done = pods.health(&name).await?.actions_done;
        Ok(if done.get("TrimMemory") == Some(&1) { Ok(()) } else { Err(format!("{done:?}")) })
    })
    .await
    .unwrap();
    let steps = [(StepAction::TrimMemory, "Failed"), (StepAction::RestartPod, "Succeeded")];
    let all = recovered_by(&testbed, &steps).await.unwrap();
    println!("a memory leak: healthy again after {:.1} s", since.elapsed().as_secs_f64());

    for (one, step) in all.iter().zip(["1/2", "2/2"]) {
        let pod = one.spec.pod.as_ref().map(|pod| pod.name.as_str());
        assert_eq!(
            (one.spec.check.as_deref(), pod, one.spec.step.as_str()),
            (Some("memory"), Some(name.as_str()), step)
        );
    }
    let done = Done::since(&testbed, &before).await;
    let evictions = is_logged(&testbed).await;
    assert_eq!(done, Done { evictions, gone: vec![victim.uid().unwrap()], ..Done::default() });
    programmed(&testbed).await;
    drop(traffic);
}

/// What the scenarios of hanging processes rely on.
#[tokio::test]
async fn a_process_that_hangs_is_seen_by_its_kubelet_and_its_pod_is_replaced_once() {
    let (testbed, _turn) = testbed().await;
    testbed.kubectl.apply(&quick_policy_with_readiness("booking").to_string()).await.unwrap();
    programmed(&testbed).await;
    let before = Before::look(&testbed).await;
    let pods = testbed.booking_pods().await.unwrap();
    let stopped = StoppedProcess::of(&testbed, &pods[0].name_any()).await.unwrap();
    let since = stopped.since;
    let recovered = recovered_by(&testbed, &[(StepAction::RestartPod, "Succeeded")]).await;
    let took = since.elapsed();
    // It is being taken away, and goes at once if it may.
    let _ = stopped.resume(&testbed).await;
    recovered.unwrap();
    println!(
        "a process that hangs: another pod is healthy in its place {:.1} s after it was stopped",
        took.as_secs_f64()
    );
    let done = Done::since(&testbed, &before).await;
    let gone = vec![pods[0].uid().unwrap()];
    let evictions = is_logged(&testbed).await;
    assert_eq!(done, Done { evictions, gone, ..Done::default() }, "that pod, once, and nothing else");
}
