//! The operator dies at every point of the protocol, is paused, loses the API server: each action is executed once, and
//! none is lost.

use crate::{
    POLICY, SOON, event_reasons,
    incident::{Before, Broken, Incident, Pods, prepare},
    operator_process::OperatorProcess,
    programmed, restarts,
    services_faults::Done,
    testbed,
};
use crds::status::ActionOutcome;
use e2e::{
    provider::ProviderKind,
    sabotage::{HungCalls, PATIENT, have_patient_calls},
    testbed::until,
};
use kube::ResourceExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustix::process::Signal;
use std::{os::unix::process::ExitStatusExt, time::Duration};

const CRASH_POINTS: [&str; 4] = ["before-intent", "after-intent", "after-act", "before-status"];
/// Kills at random when `KILLS` says nothing else; `make soak` asks for more.
const RANDOM_KILLS: usize = 4;

#[tokio::test]
async fn an_operator_that_is_killed_executes_each_action_once_and_loses_none() {
    let (testbed, _turn) = testbed().await;
    testbed.scale_operator(0).await.unwrap();
    let kills: usize = std::env::var("KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(RANDOM_KILLS);
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("random kills with SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    // Each point with one kind of incident, or with each where there is time.
    let kinds = if kills > RANDOM_KILLS { Incident::ALL.len() } else { 1 };
    let crashes = (0..kinds)
        .flat_map(|kind| CRASH_POINTS.iter().enumerate().map(move |(place, point)| (kind + place, Some(*point))));
    let rounds = crashes.chain((0..kills).map(|kill| (kill, None)));
    for (round, (kind, crash_at)) in rounds.enumerate() {
        let incident = Incident::ALL[kind % Incident::ALL.len()];
        let delay = Duration::from_millis(random.random_range(0..5_000));
        println!(
            "round {round}: {incident:?}, killed {}",
            crash_at.map_or_else(|| format!("after {delay:?}"), |at| at.replace('-', " "))
        );
        prepare(&testbed, incident, Pods::CURRENT, "1s").await;
        let mut first = OperatorProcess::start(&testbed, &format!("first-{round}"), crash_at);
        first.leads(&testbed).await;
        programmed(&testbed).await;
        let broken = Broken::bring_about(&testbed, incident, Pods::CURRENT, round).await;
        if let Some(point) = crash_at {
            let status = first.ended().await;
            assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "at {point}: {status}\n{}", first.said());
        } else {
            tokio::time::sleep(delay).await;
            first.kill().await;
        }
        let second = OperatorProcess::start(&testbed, &format!("second-{round}"), None);
        broken.recovered_once(&testbed).await;
        second.stop().await;
    }
    testbed.scale_operator(1).await.unwrap();
}

#[tokio::test]
async fn a_leader_that_is_paused_and_wakes_up_beside_its_successor_executes_nothing_twice() {
    let (testbed, _turn) = testbed().await;
    testbed.scale_operator(0).await.unwrap();
    // Paused as soon as its intent is written, whatever it is about to do; and before it has seen anything.
    let moments =
        [(Incident::Reset, true), (Incident::Cleanup, true), (Incident::Restart, true), (Incident::Reset, false)];
    for (round, (incident, intent_first)) in moments.into_iter().enumerate() {
        prepare(&testbed, incident, Pods::CURRENT, "1s").await;
        let mut paused = OperatorProcess::start(&testbed, &format!("paused-{round}"), None);
        paused.leads(&testbed).await;
        let standby = OperatorProcess::start(&testbed, &format!("standby-{round}"), None);
        programmed(&testbed).await;
        let broken = Broken::bring_about(&testbed, incident, Pods::CURRENT, round).await;
        if intent_first {
            broken.intended(&testbed).await;
        }
        paused.signal(Signal::STOP);
        standby.leads(&testbed).await;
        if !intent_first {
            broken.intended(&testbed).await;
        }
        paused.signal(Signal::CONT);
        let status = paused.ended().await;
        assert_eq!(status.code(), Some(1), "it ends, and says why: {}", paused.said());
        broken.recovered_once(&testbed).await;
        standby.stop().await;
    }
    testbed.scale_operator(1).await.unwrap();
}

#[tokio::test]
async fn an_api_server_that_freezes_in_the_middle_of_a_recovery_changes_nothing() {
    if crate::provider() == ProviderKind::Existing {
        println!("not on somebody else's cluster: its API server is not ours to freeze");
        return;
    }
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    have_patient_calls(&testbed, PATIENT).await.unwrap();
    programmed(&testbed).await;
    let (before, restarts_before) = (Before::look(&testbed).await, restarts(&testbed).await);
    let victim = testbed.booking_pods().await.unwrap()[0].name_any();
    let hung = HungCalls::of(&testbed, &victim).await.unwrap();
    testbed
        .policy_until("booking", SOON, "an intent", |policy| {
            let recovery = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
            recovery.is_some_and(|recovery| !recovery.in_flight.is_empty())
        })
        .await
        .unwrap();
    testbed.cluster.pause_api_server().await.unwrap();
    tokio::time::sleep(Duration::from_secs(30)).await;
    testbed.cluster.resume_api_server().await.unwrap();
    let recovered = testbed
        .policy_until("booking", SOON * 3, "the recovery at its end", |policy| {
            let recovery = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
            recovery.is_some_and(|recovery| recovery.in_flight.is_empty() && recovery.last.is_some())
        })
        .await;
    hung.resume(&testbed).await.unwrap();
    let all = testbed.recoveries().await.unwrap();
    assert_eq!(all.len(), 1, "{all:#?}");
    let record = recovered.unwrap().status.unwrap().recovery.unwrap().last.unwrap();
    assert_eq!((record.outcome, record.pod.as_ref()), (ActionOutcome::Succeeded, Some(&victim)), "{record:?}");
    assert!(record.acted_at.is_some() && record.finished_at.is_some(), "the status has both times: {record:?}");
    let done = Done::since(&testbed, &before).await;
    let once = Done { resets: [(victim, 1)].into(), ..Done::default() };
    assert_eq!(done, once, "one reset, and nothing else");
    assert_eq!(restarts(&testbed).await, restarts_before, "no container was restarted either");
    programmed(&testbed).await;
    until(SOON, "the recovery in Events", || async {
        let reasons = event_reasons(&testbed).await;
        let published =
            ["RecoveryStarted", "RecoverySucceeded"].iter().all(|one| reasons.iter().any(|seen| seen == one));
        Ok(if published { Ok(()) } else { Err(format!("{reasons:?}")) })
    })
    .await
    .unwrap();
}
