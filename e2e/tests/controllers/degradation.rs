//! The degraded mode of a fleet, as a closed loop: from what pods report to the flags of other workloads, and back.

use crate::support::{
    World, eventually, flag_set, policy, recovery_policy, says, workload::Workload, world::policy_conditions,
};
use contract::{FlagDegradation, RuntimeConfig};
use crds::{FeatureFlag, ResiliencePolicy, feature_flag::FlagFinding, status::DegradationStatus};
use jiff::{SignedDuration, Timestamp};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

/// What degraded fleets say of the flag in a document.
fn said(document: &RuntimeConfig) -> Option<&FlagDegradation> {
    document.flags.settings.flags.get("EnablePdf")?.degraded.as_ref()
}

/// The value of the flag in a document.
fn value(document: &RuntimeConfig) -> Option<bool> {
    document.flags.settings.flags.get("EnablePdf")?.value(Timestamp::now().as_millisecond())?.as_bool()
}

/// A policy of two stages without waits, whose pods are asked every second. Its first stage sets the flag.
fn degrading(name: &str, workload: &str) -> Value {
    let mut policy = recovery_policy(name, workload);
    policy["spec"]["degradation"] = json!({
        "enter": { "for": "0s", "circuits": ["database"] }, "exit": { "loadPercent": 60, "for": "0s" }, "minDuration": "0s",
        "stages": [
            { "name": "tickets", "loadPercent": 80, "flagOverrides": [{ "key": "EnablePdf", "variant": "off" }] },
            { "name": "cache", "loadPercent": 90 },
        ],
    });
    policy
}

fn degradation(policy: &ResiliencePolicy) -> Option<&DegradationStatus> {
    policy.status.as_ref()?.degradation.as_deref()
}

/// Which stage the fleet of a policy is in; 0: it is not degraded.
fn level(policy: &ResiliencePolicy) -> i32 {
    degradation(policy).map_or(0, |status| status.level)
}

async fn until_level(world: &World, name: &str, wanted: i32) -> ResiliencePolicy {
    world.until_policy(name, &format!("{name} is in stage {wanted}"), |policy| level(policy) == wanted).await
}

fn set_load(workload: &Workload, loads: &[u32]) {
    for (pod, load) in workload.pods.iter().zip(loads) {
        pod.script().load = (*load, "requests");
    }
}

/// The flag in the status of the set, once it comes from there.
async fn until_source(world: &World, source: &str) -> FlagFinding {
    eventually(&format!("the source of the flag is {source}"), async || {
        let set = world.api::<FeatureFlag>().get("flags").await.unwrap();
        let found = set.status.unwrap_or_default().flags.into_iter().find(|flag| flag.key == "EnablePdf");
        match found {
            Some(found) if found.source == source => Ok(found),
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// Booking of three pods, notification of one that has the flag, and a policy for booking.
async fn stage(world: &World) -> (Workload, Workload) {
    let booking = world.workload("booking", 3).await;
    let notification = world.workload("notification", 1).await;
    world.apply(&flag_set("flags", "notification")).await;
    (booking, notification)
}

#[tokio::test(flavor = "multi_thread")]
async fn booking_is_overloaded_and_the_flag_turns_in_notification_until_it_is_over() {
    let world = World::new().await;
    let (booking, notification) = stage(&world).await;
    let operator = world.operator().await;
    world.apply(&degrading("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    notification.pods[0].until_it_runs("the flag", |running| value(running) == Some(true)).await;

    // One of three is no quorum.
    set_load(&booking, &[99, 10, 10]);
    booking.pods[0].after_more_reports(3).await;
    assert_eq!(level(&world.policy("booking").await), 0);

    set_load(&booking, &[99, 85, 10]);
    let degraded = until_level(&world, "booking", 1).await;
    let status = degradation(&degraded).unwrap().clone();
    assert_eq!((status.stage.as_str(), status.stages, status.flags.len()), ("tickets", 2, 1));
    assert_eq!(status.why, "booking: 2 of 3 pods at 85 % or more (requests)");
    assert!(says(policy_conditions(&degraded), "Degraded", "True", "FleetDegraded"));
    assert_eq!(degraded.status.as_ref().unwrap().degraded, Some(true), "the column");
    world.until_events("booking", &["FleetDegraded"]).await;
    let running = notification.pods[0].until_it_runs("the stage", |running| value(running) == Some(false)).await;
    let told = said(&running).unwrap();
    assert_eq!((told.by.as_str(), told.load_percent), ("booking", 80));
    assert_eq!(told.until_ms, status.until.0.as_millisecond());
    let shown = until_source(&world, "Degradation").await;
    assert_eq!((shown.degraded_by.as_deref(), shown.effective_variant.as_deref()), (Some("booking"), Some("off")));
    let namespace = &world.namespace;
    let gauge = |stage: &str| {
        format!(
            "resilience_operator_degraded_mode_active{{namespace=\"{namespace}\",policy=\"booking\",stage=\"{stage}\"}}"
        )
    };
    assert_eq!(operator.metric(&gauge("tickets")).await, 1);

    // A person has the last word, and gives it back.
    let mut set = flag_set("flags", "notification");
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "on", "reason": "the printer can do it" }]);
    world.apply(&set).await;
    let running = notification.pods[0].until_it_runs("the override", |running| value(running) == Some(true)).await;
    assert!(said(&running).is_some());
    until_source(&world, "Override").await;
    set["spec"]["overrides"] = json!([]);
    world.apply(&set).await;
    notification.pods[0].until_it_runs("no override", |running| value(running) == Some(false)).await;

    // Another operator goes on from where the last one was.
    operator.crash().await;
    let pushes = notification.pods[0].applied_revisions();
    let operator = world.operator().await;
    booking.pods[0].after_more_reports(3).await;
    let kept = world.policy("booking").await;
    assert_eq!(degradation(&kept), Some(&status), "its stage, since when, and until when");
    assert_eq!(notification.pods[0].applied_revisions(), pushes, "there is nothing new");

    set_load(&booking, &[99, 95, 10]);
    until_level(&world, "booking", 2).await;
    assert_eq!((operator.metric(&gauge("tickets")).await, operator.metric(&gauge("cache")).await), (0, 1));
    set_load(&booking, &[99, 65, 10]);
    until_level(&world, "booking", 1).await;
    set_load(&booking, &[99, 10, 10]);
    let normal = until_level(&world, "booking", 0).await;
    assert!(says(policy_conditions(&normal), "Degraded", "False", "NotDegraded"));
    world.until_events("booking", &["FleetDegraded", "FleetRecovered"]).await;
    let running = notification.pods[0].until_it_runs("normal", |running| value(running) == Some(true)).await;
    assert_eq!(said(&running), None);
    until_source(&world, "Spec").await;
    assert_eq!(operator.metric(&gauge("tickets")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn open_circuits_of_a_quorum_degrade_and_silent_pods_change_nothing() {
    let world = World::new().await;
    let (mut booking, _notification) = stage(&world).await;
    let _operator = world.operator().await;
    world.apply(&degrading("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    // All three have been heard.
    for pod in &booking.pods {
        pod.after_more_reports(2).await;
    }
    for pod in &booking.pods[..2] {
        pod.script().circuits.insert("database".to_owned(), contract::CircuitState::Open);
    }
    let degraded = until_level(&world, "booking", 1).await;
    let why = &degradation(&degraded).unwrap().why;
    assert!(why.starts_with("booking: the circuit of database is open in 2 of 3 pods"), "{why}");

    booking.pods[0].go_silent();
    booking.pods[1].go_silent();
    booking.pods[2].script().load = (0, "requests");
    let stays = "it stays, as too few pods are heard: booking: 1 of 3 ready pods are heard";
    let told = |policy: &ResiliencePolicy| degradation(policy).and_then(|status| status.message.clone());
    world.until_policy("booking", stays, |policy| told(policy).as_deref() == Some(stays)).await;
    booking.pods[2].after_more_reports(3).await;
    assert_eq!(level(&world.policy("booking").await), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_forces_holds_rehearses_and_takes_back() {
    let world = World::new().await;
    let (_booking, notification) = stage(&world).await;
    let _operator = world.operator().await;
    let pod = &notification.pods[0];
    let mut manifest = degrading("booking", "booking");
    manifest["spec"]["degradation"]["mode"] = json!("Forced");
    world.apply(&manifest).await;
    assert_eq!(degradation(&until_level(&world, "booking", 2).await).unwrap().why, "a person forces it");
    pod.until_it_runs("all stages", |running| value(running) == Some(false)).await;

    // Suspended, it holds what it has, whatever is written.
    manifest["spec"]["suspend"] = json!(true);
    manifest["spec"]["degradation"]["mode"] = json!("Disabled");
    world.apply(&manifest).await;
    let held = world.until_policy_says("booking", "Programmed", "True", "Suspended").await;
    assert_eq!((level(&held), pod.script().running.as_ref().and_then(value)), (2, Some(false)));
    manifest["spec"]["suspend"] = json!(false);
    world.apply(&manifest).await;
    until_level(&world, "booking", 0).await;
    pod.until_it_runs("none", |running| value(running) == Some(true)).await;

    manifest["spec"]["degradation"]["mode"] = json!("Forced");
    manifest["spec"]["mode"] = json!("DryRun");
    world.apply(&manifest).await;
    let rehearsed = until_level(&world, "booking", 2).await;
    assert!(degradation(&rehearsed).unwrap().dry_run);
    assert!(says(policy_conditions(&rehearsed), "Degraded", "False", "NotDegraded"));
    until_source(&world, "Spec").await;
    assert_eq!(pod.script().running.as_ref().and_then(value), Some(true));

    manifest["spec"]["mode"] = json!("Enforce");
    world.apply(&manifest).await;
    pod.until_it_runs("all stages", |running| value(running) == Some(false)).await;
    world.delete(&manifest).await;
    pod.until_it_runs("no policy", |running| value(running) == Some(true) && said(running).is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_policies_the_higher_stage_sets_the_flag() {
    let world = World::new().await;
    let (_booking, notification) = stage(&world).await;
    let _payment = world.workload("payment", 1).await;
    let _operator = world.operator().await;
    let forced = |name: &str, variant: &str, stage: &str| {
        let mut manifest = degrading(name, name);
        manifest["spec"]["degradation"]["mode"] = json!("Forced");
        manifest["spec"]["degradation"]["forcedStage"] = json!(stage);
        manifest["spec"]["degradation"]["stages"][0]["flagOverrides"][0]["variant"] = json!(variant);
        manifest
    };
    let pod = &notification.pods[0];
    let by = |name: &'static str| move |running: &RuntimeConfig| said(running).is_some_and(|said| said.by == name);
    world.apply(&forced("booking", "off", "tickets")).await;
    pod.until_it_runs("what booking says", by("booking")).await;
    world.apply(&forced("payment", "on", "tickets")).await;
    let told = |policy: &ResiliencePolicy| degradation(policy).and_then(|status| status.message.clone());
    let loses = "EnablePdf is as the policy booking says";
    world.until_policy("payment", "it says so", |policy| told(policy).as_deref() == Some(loses)).await;
    assert!(pod.script().running.as_ref().is_some_and(by("booking")), "among equals the older");
    world.apply(&forced("payment", "on", "cache")).await;
    pod.until_it_runs("what payment says", by("payment")).await;
    let loses = "EnablePdf is as the policy payment says";
    world.until_policy("booking", "it says so", |policy| told(policy).as_deref() == Some(loses)).await;
}

/// Writes another end into the status of the policy, as if time had passed. It is the operator's own word: what another author wrote
/// there would stay when the operator takes its own away.
async fn ends_in(world: &World, minutes: i64) {
    let until = Timestamp::now() + SignedDuration::from_mins(minutes);
    let mut status = json!(world.policy("booking").await.status);
    status["degradation"]["until"] = json!(format!("{until:.6}"));
    let body = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy", "metadata": { "name": "booking" },
        "status": status,
    });
    let how = PatchParams::apply("resilience-operator").force();
    world.api::<ResiliencePolicy>().patch_status("booking", &how, &Patch::Apply(&body)).await.unwrap();
}

fn left(until: Timestamp) -> SignedDuration {
    until.duration_since(Timestamp::now())
}

#[tokio::test(flavor = "multi_thread")]
async fn its_end_is_put_off_while_an_operator_runs_and_comes_when_none_does() {
    let world = World::new().await;
    let (booking, notification) = stage(&world).await;
    let operator = world.operator().await;
    let pod = &notification.pods[0];
    world.apply(&degrading("booking", "booking")).await;
    set_load(&booking, &[85; 3]);
    until_level(&world, "booking", 1).await;
    pod.until_it_runs("the stage", |running| value(running) == Some(false)).await;

    ends_in(&world, 4).await;
    let is_long = |until: Timestamp| left(until) > SignedDuration::from_mins(9);
    let renewed = |policy: &ResiliencePolicy| degradation(policy).is_some_and(|status| is_long(status.until.0));
    world.until_policy("booking", "its end is put off", renewed).await;
    let in_pod = |running: &RuntimeConfig| {
        said(running).is_some_and(|said| is_long(Timestamp::from_millisecond(said.until_ms).unwrap()))
    };
    pod.until_it_runs("the later end", in_pod).await;

    // Nobody puts it off.
    operator.stop().await;
    ends_in(&world, -1).await;
    let running = pod.script().running.clone().unwrap();
    let flag = &running.flags.settings.flags["EnablePdf"];
    let after = said(&running).unwrap().until_ms;
    assert_eq!((flag.value(after - 1), flag.value(after)), (Some(&json!(false)), Some(&json!(true))), "the pod knows");

    // What has ended is over, and begins anew only when the load says so.
    set_load(&booking, &[0; 3]);
    let _operator = world.operator().await;
    until_level(&world, "booking", 0).await;
    world.until_events("booking", &["FleetDegraded", "FleetRecovered"]).await;
    pod.until_it_runs("normal", |running| said(running).is_none()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_at_once() {
    let world = World::new().await;
    let refusal = async |change: Value| {
        let mut manifest = policy("booking", "booking");
        manifest["spec"]["degradation"] = change;
        world.try_apply(&manifest).await.unwrap_err().to_string()
    };
    let stages = json!([{ "name": "a", "loadPercent": 90 }, { "name": "b", "loadPercent": 80 }]);
    let cases = [
        (json!({ "stages": stages }), "stages must be in the order of their loadPercent"),
        (json!({ "stages": [{ "name": "a", "loadPercent": 20 }] }), "the stage would never end"),
        (
            json!({ "stages": [{ "name": "a", "loadPercent": 80 }], "flagOverrides": [{ "key": "a", "variant": "b" }] }),
            "excludes stages",
        ),
        (json!({ "mode": "Forced", "forcedStage": "b" }), "must name an entry of stages"),
        (json!({ "quorum": "101%" }), "spec.degradation.quorum"),
    ];
    for (change, expected) in cases {
        let error = refusal(change).await;
        assert!(error.contains(expected), "{error}");
    }
}
