//! A flag that a person flips with kubectl while buyers buy.

use crate::{FLAGS, POLICY, SOON, programmed, restarts, selling, services_faults::all_sell, testbed};
use crds::FeatureFlag;
use e2e::{
    pod_admin::PodAdmin,
    testbed::{TICKETING, Testbed, until},
};
use kube::Api;
use serde_json::json;
use std::time::{Duration, Instant};

/// Flips; with three pods, so that the slowest of a hundred is among them.
const FLIPS: usize = 40;
/// Flag of the sample that booking reads, and its two variants.
const FLAG: &str = "MaxConcurrentBookings";
const VARIANTS: [&str; 2] = ["low", "normal"];

/// The revision that the set is live with everywhere, once the flag has this variant.
async fn live(testbed: &Testbed, variant: &str, after: i64) -> i64 {
    let sets: Api<FeatureFlag> = Api::namespaced(testbed.client.clone(), TICKETING);
    until(SOON, "the flag live in every pod", || async {
        let status = sets.get("ticketing").await?.status.unwrap_or_default();
        let has =
            status.flags.iter().any(|flag| flag.key == FLAG && flag.effective_variant.as_deref() == Some(variant));
        let target = status.targets.iter().find(|target| target.name == "booking");
        let revision = target.and_then(|target| target.revision).unwrap_or_default();
        Ok(if has && revision > after { Ok(revision) } else { Err(format!("{status:?}")) })
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_flag_that_a_person_flips_is_live_in_every_pod_at_once_and_no_booking_is_lost() {
    let (testbed, _turn) = testbed().await;
    testbed.apply_file(POLICY).await.unwrap();
    testbed.apply_file(FLAGS).await.unwrap();
    programmed(&testbed).await;
    let pods = PodAdmin::find(&testbed).await.unwrap();
    let before = restarts(&testbed).await;
    let traffic = selling(&testbed).await;
    let (sold, failed) = traffic.count.now();
    let mut revision = live(&testbed, "normal", 0).await;
    let (mut from_enter, mut from_answer) = (Vec::new(), Vec::new());
    for flip in 0..FLIPS {
        let variant = VARIANTS[flip % VARIANTS.len()];
        let overrides = json!([{ "key": FLAG, "variant": variant, "reason": "incident 4711" }]);
        let patch = json!({ "spec": { "overrides": overrides } }).to_string();
        let begun = jiff::Timestamp::now().as_millisecond();
        let words = ["patch", "fflag", "ticketing", "-n", TICKETING, "--field-manager=incident-4711", "--type=merge"];
        testbed.kubectl.args(&[words.as_slice(), &["-p", patch.as_str()]].concat()).await.unwrap();
        let answered = jiff::Timestamp::now().as_millisecond();
        revision = live(&testbed, variant, revision).await;
        for applied in pods.applied(revision).await.unwrap() {
            from_enter.push(applied.applied_at_ms.saturating_sub(begun));
            from_answer.push(applied.applied_at_ms.saturating_sub(answered).max(0));
        }
    }
    let began = Instant::now();
    all_sell(&traffic, SOON).await;
    assert!(began.elapsed() < SOON);
    let (sold, failed) = (traffic.count.now().0 - sold, traffic.count.now().1 - failed);
    assert!(failed == 0 && sold > 100, "{sold} bookings sold, {failed} not");
    assert_eq!(restarts(&testbed).await, before, "nothing was restarted");
    for (what, mut times) in [("from Enter", from_enter), ("from kubectl's answer", from_answer)] {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() * percent).div_ceil(100) - 1];
        println!("live in a pod, {what}: p50 {} ms, p99 {} ms of {}", at(50), at(99), times.len());
        assert!(at(100) < i64::try_from(Duration::from_secs(5).as_millis()).unwrap(), "{times:?}");
    }
    println!("{sold} bookings meanwhile, none failed");
}
