//! Flag sets: sound ones, huge ones, wrong ones, and the switch that a person throws.

use crate::support::{
    World, eventually, flag_set,
    manifests::policy_with_request,
    policy, says,
    world::{condition, request_ms},
};
use axum::http::Request;
use contract::{FlagProblem, FlagProblemKind, RuntimeConfig};
use crds::FeatureFlag;
use serde_json::{Value, json};

/// The value of a boolean flag in a document.
fn value(document: &RuntimeConfig, key: &str) -> Option<Value> {
    let now = jiff::Timestamp::now().as_millisecond();
    document.flags.settings.flags.get(key)?.value(now).cloned()
}

/// `set` with its flag overridden.
fn switched_off(mut set: Value) -> Value {
    set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": "off", "reason": "printer on fire" }]);
    set
}

/// A set whose flags together have about `bytes` bytes.
fn big_set(name: &str, bytes: usize) -> Value {
    let mut set = flag_set(name, "booking");
    set["spec"]["flagSpec"]["flags"] = json!({});
    let text = "x".repeat(bytes / 10);
    for number in 0..10 {
        let flag = json!({ "state": "ENABLED", "variants": { "long": text }, "defaultVariant": "long" });
        set["spec"]["flagSpec"]["flags"][format!("{name}-{number}")] = flag;
    }
    set
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_set_reaches_the_pods_and_an_override_beats_it() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&flag_set("flags", "booking")).await;
    let done = world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    let status = done.status.unwrap();
    assert_eq!((status.flag_count, status.overridden, status.programmed.as_deref()), (Some(1), Some(0), Some("1/1")));
    assert!(says(&status.conditions, "Overridden", "False", ""));
    workload.pods[0].until_it_runs("the flag", |running| value(running, "EnablePdf") == Some(json!(true))).await;

    world.apply(&switched_off(flag_set("flags", "booking"))).await;
    workload.pods[0].until_it_runs("the override", |running| value(running, "EnablePdf") == Some(json!(false))).await;
    let over = world.until_flags_say("flags", "Overridden", "True", "Overridden").await.status.unwrap();
    assert!(over.flags[0].message.as_ref().unwrap().contains("printer on fire"), "{:?}", over.flags);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_document_of_a_megabyte_is_refused_and_what_was_live_stays() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.apply(&flag_set("flags", "booking")).await;
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;

    world.apply(&big_set("flags", 1 << 20)).await;
    let refused = world.until_flags_say("flags", "Accepted", "False", "InvalidFlagSet").await.status.unwrap();
    assert!(says(&refused.conditions, "Stalled", "True", "InvalidFlagSet"));
    assert!(says(&refused.conditions, "Ready", "False", "InvalidFlagSet"));
    let words = &refused.conditions.iter().find(|one| one.type_ == "Accepted").unwrap().message;
    assert!(words.contains("more than the") && words.contains("split it"), "{words}");

    // The policy beside it goes on, and the last good flags with it.
    world.apply(&policy_with_request("booking", "booking", "7s")).await;
    let running =
        workload.pods[0].until_it_runs("the edited policy", |running| request_ms(running) == Some(7_000)).await;
    assert_eq!(value(&running, "EnablePdf"), Some(json!(true)));
    assert_eq!(running.flags.settings.flags.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn flag_sets_that_are_too_much_together_hold_up_neither_policy_nor_kill_switch() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.apply(&flag_set("flags", "booking")).await;
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;

    // Each is within its own bounds.
    for number in 0..5 {
        world.apply(&big_set(&format!("big{number}"), 200 << 10)).await;
    }
    let too_much = world.until_flags_say("big4", "Programmed", "False", "ConfigTooLarge").await.status.unwrap();
    assert!(says(&too_much.conditions, "Stalled", "True", "ConfigTooLarge"), "the youngest is left out");
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;

    world.apply(&policy_with_request("booking", "booking", "7s")).await;
    workload.pods[0].until_it_runs("the edited policy", |running| request_ms(running) == Some(7_000)).await;
    world.apply(&switched_off(flag_set("flags", "booking"))).await;
    workload.pods[0].until_it_runs("the override", |running| value(running, "EnablePdf") == Some(json!(false))).await;

    world.delete(&big_set("big0", 1)).await;
    world.until_flags_say("big4", "Ready", "True", "Programmed").await;
    workload.pods[0]
        .until_it_runs("the set that fits now", |running| running.flags.settings.flags.contains_key("big4-0"))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_schema_cannot_see_in_a_flag_is_refused_by_the_operator() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let flag =
        |variants: Value, default: &str| json!({ "state": "ENABLED", "variants": variants, "defaultVariant": default });
    let mut deep = json!(1);
    for _ in 0..100 {
        deep = json!({ "if": deep });
    }
    let cases = [
        (
            flag(json!({ "on": true, "off": "no" }), "on"),
            "spec.flagSpec.flags.EnablePdf.variants",
            "must all be of one type",
        ),
        (
            flag(json!({ "on": true }), "maybe"),
            "spec.flagSpec.flags.EnablePdf.defaultVariant",
            "not among the variants",
        ),
        (
            json!({ "state": "ENABLED", "variants": { "on": true }, "targeting": deep }),
            "spec.flagSpec.flags.EnablePdf.targeting",
            "nested",
        ),
    ];
    for (wrong, field, words) in cases {
        world.apply(&flag_set("flags", "booking")).await;
        world.until_flags_say("flags", "Ready", "True", "Programmed").await;
        let mut set = flag_set("flags", "booking");
        set["spec"]["flagSpec"]["flags"]["EnablePdf"] = wrong;
        world.apply(&set).await;
        let refused = world.until_flags_say("flags", "Accepted", "False", "InvalidFlagSet").await.status.unwrap();
        let said = &refused.conditions.iter().find(|one| one.type_ == "Accepted").unwrap().message;
        assert!(said.contains(field) && said.contains(words), "{said}");
        let running = workload.pods[0].script().running.clone().unwrap();
        assert_eq!(value(&running, "EnablePdf"), Some(json!(true)), "the last good flags stay live");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_float_flag_stays_one_and_what_is_hardly_meant_is_said() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let mut set = flag_set("flags", "booking");
    set["spec"]["flagSpec"]["flags"]["Factor"] = json!({
        "state": "ENABLED", "valueType": "float", "variants": { "one": 1.0, "half": 0.5 }, "defaultVariant": "one",
        "targeting": { "fractional": ["email", ["one", 1], ["half", 1]] },
    });
    world.apply(&set).await;
    let done = world.until_flags_say("flags", "Ready", "True", "Programmed").await.status.unwrap();
    let said = &done.conditions.iter().find(|one| one.type_ == "Accepted").unwrap().message;
    assert!(said.starts_with("valid; warning: spec.flagSpec.flags.Factor.targeting.fractional[0]: "), "{said}");
    let factor = |running: &RuntimeConfig| value(running, "Factor").map(|value| value.to_string());
    workload.pods[0].until_it_runs("a float", |running| factor(running).as_deref() == Some("1.0")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_nested_too_deeply_stops_no_other_object() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let mut deep = json!(1);
    for _ in 0..400 {
        deep = json!({ "if": deep });
    }
    let mut set = flag_set("deep", "booking");
    set["spec"]["flagSpec"]["flags"]["EnablePdf"]["targeting"] = deep;
    // By hand, because clients that parse the answer may choke on it too.
    let path = format!("/apis/resilience.ticketwave.io/v1alpha1/namespaces/{}/featureflags", world.namespace);
    let request = Request::post(path).header("content-type", "application/json").body(set.to_string().into_bytes());
    world.client.request_text(request.unwrap()).await.unwrap();
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    world.apply(&flag_set("flags", "booking")).await;
    workload.pods[0]
        .until_it_runs("the flags of the other set", |running| value(running, "EnablePdf") == Some(json!(true)))
        .await;
    let list =
        "/apis/resilience.ticketwave.io/v1alpha1/namespaces/NS/featureflags/deep".replace("NS", &world.namespace);
    eventually("the deep one says what is wrong with it", async || {
        let request = Request::get(&list).body(Vec::new()).unwrap();
        let text = world.client.request_text(request).await.unwrap();
        if text.contains("InvalidFlagSet") && text.contains("recursion limit") { Ok(()) } else { Err(text) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_override_ends_by_itself() {
    let world = World::new().await;
    let _workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let mut set = switched_off(flag_set("flags", "booking"));
    let soon = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(4);
    set["spec"]["overrides"][0]["until"] = json!(soon.to_string());
    world.apply(&set).await;
    let overridden = world.until_flags_say("flags", "Overridden", "True", "Overridden").await.status.unwrap();
    let first = &overridden.flags[0];
    assert_eq!((&*first.key, &*first.source, first.type_.as_deref()), ("EnablePdf", "Override", Some("boolean")));
    assert_eq!(first.overridden_by.as_deref(), Some("test"), "the field manager of this test");
    assert_eq!(first.until.as_ref().unwrap().at().unwrap().as_millisecond(), soon.as_millisecond());
    let document = world.document("booking").await;
    world.until_flags_say("flags", "Overridden", "False", "NoOverride").await;
    assert_eq!(value(&document, "EnablePdf"), Some(json!(true)), "the pod evaluates the end by itself");
    assert_eq!(world.document("booking").await.revision, document.revision, "so nothing has to be published");
    let policy_less = world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    assert_eq!(policy_less.status.unwrap().overridden, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_sets_with_one_flag_the_higher_priority_wins() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    world.apply(&flag_set("usual", "booking")).await;
    let mut urgent = flag_set("urgent", "booking");
    urgent["spec"]["priority"] = json!(10);
    urgent["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("off");
    world.apply(&urgent).await;
    workload.pods[0]
        .until_it_runs("the urgent set's", |running| value(running, "EnablePdf") == Some(json!(false)))
        .await;
    world.delete(&urgent).await;
    workload.pods[0].until_it_runs("the usual set's", |running| value(running, "EnablePdf") == Some(json!(true))).await;
    world.apply(&policy("booking", "booking")).await;
    let programmed = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert!(condition(&programmed, "Accepted").message.starts_with("valid"));
}

/// A flag set that has lost a flag to another one, and what it says of an override of that flag.
#[tokio::test(flavor = "multi_thread")]
async fn an_override_that_switches_nothing_says_so() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let _operator = world.operator().await;
    let mut platform = flag_set("platform", "booking");
    platform["spec"]["priority"] = json!(10);
    world.apply(&platform).await;
    world.apply(&switched_off(flag_set("shop", "booking"))).await;
    let lost = world.until_flags_say("shop", "Overridden", "False", "OverrideNotInForce").await;
    let status = lost.status.unwrap();
    let overridden = status.conditions.iter().find(|condition| condition.type_ == "Overridden").unwrap();
    assert_eq!(overridden.message, "not in force: EnablePdf, as booking runs by the set platform");
    assert_eq!(status.overridden, Some(0));
    assert_eq!(value(&world.document("booking").await, "EnablePdf"), Some(json!(true)));
    world.delete(&platform).await;
    world.until_flags_say("shop", "Overridden", "True", "Overridden").await;
    workload.pods[0].until_it_runs("the override", |running| value(running, "EnablePdf") == Some(json!(false))).await;
}

/// The set of an incident takes a flag over from one that is invalid, and goes again, also while the operator is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_goes_gives_its_flags_back_to_one_that_is_invalid() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let operator = world.operator().await;
    let mut own = switched_off(flag_set("own", "booking"));
    world.apply(&own).await;
    workload.pods[0].until_it_runs("its own", |running| value(running, "EnablePdf") == Some(json!(false))).await;
    let mut incident = flag_set("incident", "booking");
    incident["spec"]["priority"] = json!(1_000);
    world.apply(&incident).await;
    workload.pods[0].until_it_runs("the incident's", |running| value(running, "EnablePdf") == Some(json!(true))).await;
    own["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("nothing of the sort");
    world.apply(&own).await;
    world.until_flags_say("own", "Accepted", "False", "InvalidFlagSet").await;
    drop(operator);
    let _operator = world.operator().await;
    world.delete(&incident).await;
    workload.pods[0].until_it_runs("its own again", |running| value(running, "EnablePdf") == Some(json!(false))).await;
    assert_eq!(world.document("booking").await.flags.sources[0].name, "own");
}

/// What a pod reports of a flag.
fn problem(kind: FlagProblemKind, message: &str) -> FlagProblem {
    FlagProblem { key: "EnablePdf".to_owned(), kind, message: message.to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pods_find_wrong_with_a_flag_is_shown_and_forgotten() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let _operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.apply(&flag_set("flags", "booking")).await;
    let mut other = flag_set("other", "booking");
    other["spec"]["flagSpec"]["flags"] = json!({ "EnableMail": other["spec"]["flagSpec"]["flags"]["EnablePdf"] });
    world.apply(&other).await;
    let fine = world.until_flags_say("flags", "Ready", "True", "Programmed").await.status.unwrap();
    assert!(says(&fine.conditions, "TypeMismatch", "False", "NoTypeMismatch"), "{:?}", fine.conditions);
    let reports = |problems: &[FlagProblem]| {
        for pod in &workload.pods {
            pod.script().flag_problems = problems.to_vec();
        }
    };

    let words = "code reads a boolean, the variant on is a string; the code's default is used";
    reports(&[problem(FlagProblemKind::TypeMismatch, words)]);
    let told = format!("booking: {words} (2 of 2 pods)");
    let status = eventually("the mismatch of both pods is told", async || {
        let status = world.api::<FeatureFlag>().get("flags").await.unwrap().status.unwrap_or_default();
        let is_told = status.flags.iter().any(|one| one.message.as_deref() == Some(told.as_str()));
        if is_told { Ok(status) } else { Err(format!("{status:?}")) }
    })
    .await;
    assert_eq!((status.flags[0].key.as_str(), status.flags[0].source.as_str()), ("EnablePdf", "Code"));
    assert!(says(&status.conditions, "TypeMismatch", "True", "TypeMismatch"));
    assert!(says(&status.conditions, "Ready", "True", "Programmed"), "the pods run the document");
    let message = |type_: &str| status.conditions.iter().find(|one| one.type_ == type_).unwrap().message.clone();
    assert!(message("Ready").contains("see the condition TypeMismatch"), "{}", message("Ready"));

    reports(&[problem(FlagProblemKind::InvalidRule, "the default variant is used, because the rule cannot be: why")]);
    let status = world.until_flags_say("flags", "Programmed", "False", "PartiallyProgrammed").await.status.unwrap();
    let said = &status.conditions.iter().find(|one| one.type_ == "Programmed").unwrap().message;
    assert!(said.contains("EnablePdf: booking: the default variant is used"), "{said}");
    world.until_flags_say("flags", "TypeMismatch", "False", "NoTypeMismatch").await;
    // It is that set's matter alone.
    world.until_flags_say("other", "Ready", "True", "Programmed").await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;

    reports(&[]);
    let status = world.until_flags_say("flags", "Ready", "True", "Programmed").await.status.unwrap();
    assert!(status.flags.iter().all(|flag| flag.source == "Spec"), "{:?}", status.flags);
    assert!(says(&status.conditions, "TypeMismatch", "False", "NoTypeMismatch"));

    // Of both pods, one alone does not read it.
    let is_unread = async |expected: Option<bool>| {
        eventually("whether the flag is read", async || {
            let status = world.api::<FeatureFlag>().get("flags").await.unwrap().status.unwrap_or_default();
            if status.flags[0].unread == expected { Ok(()) } else { Err(format!("{:?}", status.flags)) }
        })
        .await;
    };
    let unread = vec!["EnablePdf".to_owned()];
    workload.pods.iter().for_each(|pod| pod.script().flags_unread.clone_from(&unread));
    is_unread(Some(true)).await;
    workload.pods[0].script().flags_unread.clear();
    is_unread(None).await;
}
