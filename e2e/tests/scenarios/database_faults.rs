//! What befalls the database, for all pods at once: they help themselves, and nobody does anything to them.

use crate::{
    POLICY, SOON,
    incident::Before,
    programmed, reason, restarts, selling,
    services_faults::{Done, all_sell, recover_quickly},
    testbed,
};
use crds::ConditionType;
use e2e::{
    pod_admin::PodAdmin,
    sabotage::{StoppedBackends, fail_back, fail_over_to_replica, give_database_back, take_database_away, take_writes},
    testbed::{Testbed, TestbedError, is_true, until},
};
use std::time::{Duration, Instant};

/// What is promised of the worst case.
const PROMISED: Duration = Duration::from_secs(5);

#[tokio::test]
async fn orders_flow_again_within_5_s_of_a_hang_of_all_connections_of_all_pods() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    programmed(&testbed).await;
    let traffic = selling(&testbed).await;
    let (before, running) = (Before::look(&testbed).await, restarts(&testbed).await);
    let names: Vec<_> = traffic.by_pod.iter().map(|(name, _)| name.as_str()).collect();
    let stopped = StoppedBackends::of(&testbed, &names).await.unwrap();
    let sold = || traffic.by_pod.iter().map(|(_, count)| count.now().0).collect::<Vec<_>>();
    let (at_the_hang, failed) = (sold(), traffic.count.now().1);
    let flow = until(SOON, "orders in every pod", || async {
        let more: Vec<_> = sold().iter().zip(&at_the_hang).map(|(now, then)| now - then).collect();
        // All buyers of each pod, and not only those that were first to get a new connection.
        Ok(if more.iter().all(|more| *more >= 12) { Ok(stopped.since.elapsed()) } else { Err(format!("{more:?}")) })
    });
    let flow = flow.await;
    stopped.resume(&testbed).await.unwrap();
    let flow = flow.unwrap();
    let failed = traffic.count.now().1 - failed;
    println!(
        "{} connections of {} pods hang: orders flow again in every pod after {flow:.1?}, {failed} failed",
        stopped.pids.len(),
        names.len()
    );
    assert!(flow < PROMISED, "{flow:?}");
    all_sell(&traffic, SOON).await;
    nothing_was_done(&testbed, &before).await;
    assert_eq!(restarts(&testbed).await, running, "nothing was restarted");
}

async fn nothing_was_done(testbed: &Testbed, before: &Before) {
    let all = testbed.recoveries().await.unwrap();
    assert!(all.is_empty(), "{all:#?}");
    assert_eq!(Done::since(testbed, before).await, Done::default());
}

#[tokio::test]
async fn nobody_is_restarted_for_a_database_that_takes_no_writes() {
    let lose = async |testbed: &Testbed| take_writes(testbed, false).await;
    let give_back = async |testbed: &Testbed| take_writes(testbed, true).await;
    left_alone("a database that takes no writes", lose, give_back).await;
}

#[tokio::test]
async fn nobody_is_restarted_for_a_database_that_was_failed_over_to_a_replica() {
    let lose = async |testbed: &Testbed| fail_over_to_replica(testbed).await;
    let give_back = async |testbed: &Testbed| fail_back(testbed).await;
    left_alone("a database that was failed over to a read-only replica", lose, give_back).await;
}

#[tokio::test]
async fn nobody_is_restarted_for_a_database_that_is_away() {
    let lose = async |testbed: &Testbed| take_database_away(testbed).await;
    let give_back = async |testbed: &Testbed| give_database_back(testbed).await;
    left_alone("a database that is away", lose, give_back).await;
}

/// Loses the database and gives it back: the operator names it as the cause and does nothing, and the pods sell again by
/// themselves.
async fn left_alone(
    what: &str,
    lose: impl AsyncFnOnce(&Testbed) -> Result<(), TestbedError>,
    give_back: impl AsyncFnOnce(&Testbed) -> Result<(), TestbedError>,
) {
    let (testbed, _turn) = testbed().await;
    recover_quickly(&testbed).await;
    let traffic = selling(&testbed).await;
    let (before, running) = (Before::look(&testbed).await, restarts(&testbed).await);
    let since = Instant::now();
    let away = async {
        lose(&testbed).await?;
        let held = testbed
            .policy_until("booking", SOON, "recovery held back, with the root cause named", |policy| {
                reason(policy, ConditionType::RecoveryAllowed.as_str()) == Some("DependencyIsTheCause")
            })
            .await?;
        let named = since.elapsed();
        // Long after an action would have been due.
        until(SOON, "the check failing again and again in every pod", || async {
            let pods = PodAdmin::find(&testbed).await?;
            let mut failed = Vec::new();
            for pod in &pods.names {
                failed.push(pods.health(pod).await?.checks["database"].consecutive_failures);
            }
            Ok(if failed.iter().all(|runs| *runs >= 5) { Ok(()) } else { Err(format!("{failed:?} runs")) })
        })
        .await?;
        Ok::<_, TestbedError>((held, named, testbed.recoveries().await?))
    };
    let away = away.await;
    // Also after a failure the database is left as it was found.
    give_back(&testbed).await.unwrap();
    let back = Instant::now();
    let (held, named, meanwhile) = away.unwrap();
    assert!(meanwhile.is_empty(), "{meanwhile:#?}");
    assert!(is_true(&held, ConditionType::Ready.as_str()), "it is no fault of the policy");
    all_sell(&traffic, SOON).await;
    let sold = back.elapsed();
    testbed
        .policy_until("booking", SOON, "all checks healthy", |policy| is_true(policy, ConditionType::Healthy.as_str()))
        .await
        .unwrap();
    let done = Done::since(&testbed, &before).await;
    println!(
        "{what}: named as the cause after {:.1} s; sold again in every pod {:.1} s after it was back",
        named.as_secs_f64(),
        sold.as_secs_f64()
    );
    assert_eq!(done, Done::default(), "also for a pod that notices last that it is back");
    let all = testbed.recoveries().await.unwrap();
    assert!(all.is_empty(), "{all:#?}");
    assert_eq!(restarts(&testbed).await, running, "nothing was restarted");
}
