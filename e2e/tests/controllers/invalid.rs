//! Objects that got past an older, laxer definition: contradictory ones, and ones that cannot even be read.
//!
//! Each test has an API server of its own, because definitions are shared by all namespaces.

use crate::support::{
    World, audit::operator_writes, cluster::Cluster, eventually, flag_set, manifests::policy_with_request, policy,
    says, workload::Workload, world::request_ms,
};
use crds::Condition;
use serde_json::{Value, json};
use std::sync::Arc;

/// Takes away from a schema whatever keeps wrong values out.
fn loosen(schema: &mut Value) {
    match schema {
        Value::Object(members) => {
            for rule in ["x-kubernetes-validations", "pattern", "enum", "maxLength", "maxItems", "maximum"] {
                // A field may be called like a rule; rules are never objects with a type.
                if members.get(rule).is_some_and(|rule| !rule.is_object()) {
                    members.remove(rule);
                }
            }
            members.values_mut().for_each(loosen);
        }
        Value::Array(items) => items.iter_mut().for_each(loosen),
        _ => {}
    }
}

/// A world whose API server takes nearly everything.
async fn lax_world() -> World {
    let cluster = Cluster::without_definitions().await;
    let definitions = crds::manifests::definitions().map(|crd| {
        let mut crd = serde_json::to_value(crd).unwrap();
        loosen(&mut crd["spec"]["versions"][0]["schema"]);
        crd
    });
    cluster.define(&definitions).await;
    World::on(Arc::new(cluster)).await
}

/// Waits for a condition of an object that may be unreadable as its type.
async fn until_it_says(world: &World, manifest: &Value, type_: &str, status: &str, reason: &str) -> String {
    let api = crate::support::cluster::object(&world.client, &world.namespace, manifest);
    let name = manifest["metadata"]["name"].as_str().unwrap();
    eventually(&format!("{name} says {type_}={status}/{reason}"), async || {
        let object = api.get(name).await.unwrap();
        let now = &object.data["status"];
        let conditions: Vec<Condition> = serde_json::from_value(now["conditions"].clone()).unwrap_or_default();
        if now["observedGeneration"] == json!(object.metadata.generation) && says(&conditions, type_, status, reason) {
            return Ok(conditions.into_iter().find(|one| one.type_ == type_).unwrap().message);
        }
        Err(now.to_string())
    })
    .await
}

async fn pod_runs(workload: &Workload, request: u64, pdf: bool) {
    let what = format!("{request} ms and EnablePdf={pdf}");
    let now = || jiff::Timestamp::now().as_millisecond();
    workload.pods[0]
        .until_it_runs(&what, |running| {
            let flag = running.flags.settings.flags.get("EnablePdf").and_then(|flag| flag.value(now()));
            request_ms(running) == Some(request) && flag == Some(&json!(pdf))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_policy_keeps_what_is_live_and_holds_up_nobody_else() {
    let world = lax_world().await;
    let (booking, catalog) = (world.workload("booking", 1).await, world.workload("catalog", 1).await);
    let operator = world.operator().await;
    let mut switch = flag_set("flags", "booking");
    let mut throw = async |variant: &str| {
        switch["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": variant }]);
        world.apply(&switch).await;
    };
    world.apply(&policy("booking", "booking")).await;
    throw("on").await;
    pod_runs(&booking, 5_000, true).await;

    // Contradictory: readable, and wrong.
    let contradictory = policy_with_request("booking", "booking", "500ms");
    world.apply(&contradictory).await;
    let words = until_it_says(&world, &contradictory, "Accepted", "False", "InvalidPolicy").await;
    assert!(words.contains("spec.dependencies[0].timeout.perTry") && words.contains("stays in effect"), "{words}");
    until_it_says(&world, &contradictory, "Stalled", "True", "InvalidPolicy").await;
    until_it_says(&world, &contradictory, "Ready", "False", "InvalidPolicy").await;
    throw("off").await;
    pod_runs(&booking, 5_000, false).await;

    // Unreadable: no type of ours can hold it.
    let unreadable = policy_with_request("booking", "booking", "99999999999999999999h");
    world.apply(&unreadable).await;
    let words = until_it_says(&world, &unreadable, "Accepted", "False", "InvalidPolicy").await;
    assert!(words.contains("99999999999999999999h"), "{words}");
    until_it_says(&world, &unreadable, "Stalled", "True", "InvalidPolicy").await;
    throw("on").await;
    pod_runs(&booking, 5_000, true).await;

    // The others go on, also when the operator starts anew beside the unreadable one.
    world.apply(&policy_with_request("catalog", "catalog", "6s")).await;
    catalog.pods[0].until_it_runs("its policy", |running| request_ms(running) == Some(6_000)).await;
    operator.stop().await;
    let _operator = world.operator().await;
    world.apply(&policy_with_request("catalog", "catalog", "7s")).await;
    catalog.pods[0].until_it_runs("its edit", |running| request_ms(running) == Some(7_000)).await;
    throw("off").await;
    pod_runs(&booking, 5_000, false).await;

    // Repaired.
    world.apply(&policy_with_request("booking", "booking", "8s")).await;
    pod_runs(&booking, 8_000, false).await;
    until_it_says(&world, &unreadable, "Ready", "True", "Programmed").await;
    booking.assert_revisions_grow();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_flag_set_keeps_its_flags_and_is_reported_once() {
    let world = lax_world().await;
    let booking = world.workload("booking", 1).await;
    let operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    world.apply(&flag_set("flags", "booking")).await;
    pod_runs(&booking, 5_000, true).await;

    let mut unreadable = flag_set("flags", "booking");
    unreadable["spec"]["flagSpec"]["flags"]["EnablePdf"]["state"] = json!("MAYBE");
    world.apply(&unreadable).await;
    let words = until_it_says(&world, &unreadable, "Accepted", "False", "InvalidFlagSet").await;
    assert!(words.contains("spec.flagSpec.flags.EnablePdf.state: unknown variant `MAYBE`"), "{words}");
    let status_writes = || {
        let mut writes = operator_writes(&world.cluster, &[&world.namespace]);
        writes.retain(|write| write.resource == "featureflags/status");
        writes.len()
    };
    let change = async |request| {
        world.apply(&policy_with_request("booking", "booking", request)).await;
        until_it_says(&world, &policy("booking", "booking"), "Ready", "True", "Programmed").await;
    };
    // What the set's other conditions say of it may be written a moment later, but before this.
    change("6s").await;
    pod_runs(&booking, 6_000, true).await;
    let before = status_writes();
    for request in ["7s", "8s"] {
        change(request).await;
    }
    pod_runs(&booking, 8_000, true).await;
    booking.pods[0].after_more_reports(1).await;
    assert_eq!(status_writes(), before, "its status did not change");

    operator.stop().await;
    let _operator = world.operator().await;
    world.apply(&policy_with_request("booking", "booking", "9s")).await;
    pod_runs(&booking, 9_000, true).await;
    world.apply(&flag_set("flags", "booking")).await;
    until_it_says(&world, &unreadable, "Ready", "True", "Programmed").await;
}
