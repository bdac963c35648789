//! What the charts render has no field that Kubernetes does not know. The API server drops such a field with a warning that
//! nobody reads: a slip in the name of a probe's threshold would be found by the night that needs it.

use crate::{Charts, objects, wiring::CASES};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    batch::v1::CronJob,
    core::v1::{Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// The object with whole numbers only. A mode such as 0440 is octal for Helm and for Kubernetes, and a fraction for this test's reader.
fn whole(value: &Value) -> Value {
    match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), whole(value))).collect(),
        Value::Array(items) => items.iter().map(whole).collect(),
        Value::Number(number) if number.is_f64() => number.to_string().split('.').next().unwrap().parse().unwrap(),
        other => other.clone(),
    }
}

/// The object as its type has it.
fn typed<T: DeserializeOwned + Serialize>(object: &Value) -> Value {
    let typed: T = serde_json::from_value(whole(object)).unwrap_or_else(|error| panic!("{error} in {object}"));
    serde_json::to_value(typed).unwrap()
}

/// Fields of `object` that its type has lost, by their paths. What is empty may be left out.
fn lost(object: &Value, typed: &Value, path: &str, found: &mut Vec<String>) {
    match (object, typed) {
        (Value::Object(fields), _) => {
            for (name, value) in fields {
                lost(value, &typed[name], &format!("{path}.{name}"), found);
            }
        }
        (Value::Array(items), _) => {
            for (at, item) in items.iter().enumerate() {
                lost(item, &typed[at], &format!("{path}[{at}]"), found);
            }
        }
        (Value::Null, _) => {}
        (_, Value::Null) => found.push(path.to_owned()),
        _ => {}
    }
}

/// The same for an object of any kind that the charts have; `None` for those that are no types of Kubernetes' own.
fn fields_lost(object: &Value) -> Option<Vec<String>> {
    let kind = object["kind"].as_str().unwrap();
    let typed = match kind {
        "Deployment" => typed::<Deployment>(object),
        "StatefulSet" => typed::<StatefulSet>(object),
        "CronJob" => typed::<CronJob>(object),
        "Service" => typed::<Service>(object),
        "ServiceAccount" => typed::<ServiceAccount>(object),
        "NetworkPolicy" => typed::<NetworkPolicy>(object),
        "Role" => typed::<Role>(object),
        "RoleBinding" => typed::<RoleBinding>(object),
        "ClusterRole" => typed::<ClusterRole>(object),
        "ClusterRoleBinding" => typed::<ClusterRoleBinding>(object),
        "Secret" => typed::<Secret>(object),
        _ => return None,
    };
    let mut found = Vec::new();
    lost(object, &typed, kind, &mut found);
    Some(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn no_field_is_one_that_kubernetes_does_not_know() {
    let charts = Charts::new().await;
    let policies = &["networkPolicy.enabled=true", r#"networkPolicy.adminFrom=[{"podSelector": {}}]"#][..];
    let persistent = &["postgresql.persistence.enabled=true"][..];
    let of_services = CASES.iter().map(|(set, _)| *set).chain([&[][..], policies, persistent]);
    let ofrep =
        r#"ofrep={"enabled": true, "tokensSecret": "t", "corsOrigins": ["https://a"], "tls": {"secretName": "c"}}"#;
    let flag_sync = r#"flagSync={"enabled": true, "tokensSecret": "t", "tls": {"secretName": "c"}}"#;
    let of_operator = [&[][..], &[r#"watchNamespaces=["tickets"]"#], &[ofrep], &[flag_sync], &[ofrep, flag_sync]];
    let sets = of_services.map(|set| ("ticketing", set)).chain(of_operator.map(|set| ("resilience-operator", set)));
    let mut looked_at = 0;
    for (chart, set) in sets {
        for object in objects(&charts.render(chart, set).await.unwrap()) {
            let Some(lost) = fields_lost(&object) else { continue };
            looked_at += 1;
            assert!(lost.is_empty(), "{chart} with {set:?}: {} has {lost:?}", object["metadata"]["name"]);
        }
    }
    assert!(looked_at > 200, "{looked_at}");
}

#[test]
fn a_slip_in_a_name_is_seen() {
    let object = serde_json::json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "a" },
        "spec": { "selector": {}, "template": { "spec": {
            "teminationGracePeriodSeconds": 3,
            "containers": [{ "name": "a", "livenessProbe": { "httpGet": { "port": 1 }, "periodSecond": 1 } }],
        } } },
    });
    let lost = fields_lost(&object).unwrap();
    let spec = "Deployment.spec.template.spec";
    let expected = [".containers[0].livenessProbe.periodSecond", ".teminationGracePeriodSeconds"];
    assert_eq!(lost, expected.map(|path| format!("{spec}{path}")));
}
