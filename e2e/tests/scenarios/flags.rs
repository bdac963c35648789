//! A flag that a person flips with kubectl while buyers buy, and those that the operator sets while a fleet is overloaded.

use crate::{FLAGS, POLICY, REPLICAS, SOON, programmed, restarts, selling, services_faults::all_sell, testbed};
use crds::{FeatureFlag, ResiliencePolicy};
use e2e::{
    pod_admin::PodAdmin,
    sabotage::sql,
    sale,
    testbed::{TICKETING, Testbed, reason, until},
    traffic::Traffic,
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

const MAILS: &str = "EnableEmailNotifications";

/// The five flags, with so few places that the buyers of a test fill them.
fn few_places() -> String {
    let toggle = json!({ "state": "ENABLED", "variants": { "on": true, "off": false }, "defaultVariant": "on" });
    let places = json!({ "state": "ENABLED", "variants": { "few": 4 }, "defaultVariant": "few" });
    let targets = ["booking", "catalog", "payment", "notification"].map(|name| json!({ "name": name }));
    let flags = json!({ MAILS: toggle, "EnablePdfGeneration": toggle, FLAG: places });
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
        "metadata": { "name": "ticketing", "namespace": TICKETING },
        "spec": { "targetRefs": targets, "flagSpec": { "flags": flags } },
    })
    .to_string()
}

fn fleet_is_degraded(policy: &ResiliencePolicy) -> bool {
    reason(policy, "Degraded") == Some("FleetDegraded")
}

/// Mails that are still to be sent for a booking.
async fn waiting_mails(testbed: &Testbed, booking: &str) -> usize {
    let query = format!("select count(*) from outbox where booking_id = '{booking}' and done_at is null");
    sql(testbed, &query).await.unwrap().trim().parse().unwrap()
}

/// A seat for somebody with an address, taken as soon as there is a place. Right after a rush it may be paid a little later; who asked
/// for another one instead would soon have as many as one buyer may have.
async fn sold(testbed: &Testbed) -> String {
    let taken = until(SOON, "a sale", || async {
        let sale = sale::sell(testbed, Some("ann@example.com")).await?;
        Ok(if sale.booking.is_empty() { Err(format!("{sale:?}")) } else { Ok(sale.booking) })
    });
    let booking = taken.await.unwrap();
    let query = format!("select status from bookings where id = '{booking}'");
    until(SOON, "the sale confirmed", || async {
        let status = sql(testbed, &query).await?;
        Ok(if status.trim() == "Confirmed" { Ok(()) } else { Err(status) })
    })
    .await
    .unwrap();
    booking
}

/// Which variant the flag of the mails has, and where from.
async fn mails_are(testbed: &Testbed, variant: &str, source: &str) {
    let sets: Api<FeatureFlag> = Api::namespaced(testbed.client.clone(), TICKETING);
    until(SOON, "the flag as it is meant to be", || async {
        let flags = sets.get("ticketing").await?.status.unwrap_or_default().flags;
        let flag = flags.into_iter().find(|flag| flag.key == MAILS).unwrap_or_default();
        let is = flag.effective_variant.as_deref() == Some(variant) && flag.source == source;
        Ok(if is { Ok(()) } else { Err(format!("{flag:?}")) })
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_fleet_puts_off_its_mails_which_follow_when_the_load_is_over() {
    let (testbed, set) = testbed().await;
    let images = set.as_ref().unwrap();
    testbed.install_all(images, REPLICAS).await.unwrap();
    for file in ["booking", "notification", "payment"] {
        testbed.apply_file(&format!("crds/samples/{file}.yaml")).await.unwrap();
    }
    testbed.kubectl.apply(&few_places()).await.unwrap();
    let off = [MAILS, "EnablePdfGeneration"].map(|key| json!({ "key": key, "variant": "off" }));
    let degradation = json!({
        "enter": { "loadPercent": 50, "for": "2s" }, "exit": { "loadPercent": 20, "for": "30s" },
        "minDuration": "5s", "flagOverrides": off, "stages": null,
    });
    testbed.patch_policy("booking", &json!({ "degradation": degradation })).await.unwrap();
    programmed(&testbed).await;
    mails_are(&testbed, "on", "Spec").await;
    let before = sold(&testbed).await;
    sale::mailed(&testbed, &before).await.unwrap();

    // Four buyers at each pod fill its four places.
    let begun = Instant::now();
    let traffic = Traffic::start(&testbed, Duration::ZERO).await.unwrap();
    testbed.policy_until("booking", SOON, "a degraded fleet", fleet_is_degraded).await.unwrap();
    println!("the fleet is degraded {:.1} s after the load began", begun.elapsed().as_secs_f64());
    mails_are(&testbed, "off", "Degradation").await;
    drop(traffic);
    let booking = sold(&testbed).await;
    assert!(waiting_mails(&testbed, &booking).await > 0);

    // Nobody is there to say so, and it stays.
    testbed.scale_operator(0).await.unwrap();
    let second = sold(&testbed).await;
    assert!(waiting_mails(&testbed, &second).await > 0 && waiting_mails(&testbed, &booking).await > 0);
    testbed.scale_operator(1).await.unwrap();
    let policy = testbed.policy_until("booking", SOON, "the fleet as it was", fleet_is_degraded).await.unwrap();
    let since = policy.status.unwrap().degradation.unwrap().since;
    assert!(waiting_mails(&testbed, &booking).await > 0);

    // A person has the last word, while the fleet is degraded.
    let patch = json!({ "spec": { "overrides": [{ "key": MAILS, "variant": "on", "reason": "the mails must go" }] } });
    let words = ["patch", "fflag", "ticketing", "-n", TICKETING, "--field-manager=incident-4711", "--type=merge"];
    testbed.kubectl.args(&[words.as_slice(), &["-p", &patch.to_string()]].concat()).await.unwrap();
    mails_are(&testbed, "on", "Override").await;
    sale::mailed(&testbed, &booking).await.unwrap();
    sale::mailed(&testbed, &second).await.unwrap();
    let policy = testbed.policies().get("booking").await.unwrap();
    assert!(fleet_is_degraded(&policy), "{:?}", policy.status);
    assert_eq!(
        policy.status.unwrap().degradation.unwrap().since,
        since,
        "the stage is the same as before the operator went"
    );

    // The load is over: what was put off follows.
    let is_over = |policy: &ResiliencePolicy| reason(policy, "Degraded") == Some("NotDegraded");
    testbed.policy_until("booking", SOON * 2, "the end of it", is_over).await.unwrap();
    until(SOON, "the tickets, too", || async {
        let waiting = waiting_mails(&testbed, &booking).await + waiting_mails(&testbed, &second).await;
        Ok(if waiting == 0 { Ok(()) } else { Err(format!("{waiting} mails wait")) })
    })
    .await
    .unwrap();
    testbed.delete_resources().await.unwrap();
    testbed.install_booking(images, REPLICAS).await.unwrap();
}
