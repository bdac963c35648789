//! Whom the NetworkPolicies of the chart `ticketing` let in: what is rendered is asked as a network plugin asks it.

use crate::{Charts, objects, wiring::pods};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const HOME: &str = "home";
const PUBLIC: u64 = 8080;
const ADMIN: u64 = 9901;

/// Somebody who opens a connection: a pod with its namespace and labels.
struct Caller {
    name: &'static str,
    namespace: &'static str,
    labels: Value,
}

fn matches(selector: &Value, labels: &Value) -> bool {
    let known = selector.as_object().unwrap().keys().all(|key| key == "matchLabels");
    assert!(known, "this test understands matchLabels alone: {selector}");
    selector["matchLabels"].as_object().is_none_or(|wanted| wanted.iter().all(|(key, value)| labels[key] == *value))
}

fn is_peer(peer: &Value, caller: &Caller) -> bool {
    let namespace = json!({ "kubernetes.io/metadata.name": caller.namespace });
    let (of_namespace, of_pod) = (&peer["namespaceSelector"], &peer["podSelector"]);
    assert!(!of_namespace.is_null() || !of_pod.is_null(), "an empty peer: {peer}");
    (if of_namespace.is_null() { caller.namespace == HOME } else { matches(of_namespace, &namespace) })
        && (of_pod.is_null() || matches(of_pod, &caller.labels))
}

/// Whether a connection of `caller` to a port of a pod of the chart's namespace is let in: by any policy, or if none selects it.
fn is_let_in(policies: &[&Value], caller: &Caller, labels: &Value, port: u64) -> bool {
    let selecting: Vec<_> = policies.iter().filter(|policy| matches(&policy["spec"]["podSelector"], labels)).collect();
    let rules = selecting.iter().flat_map(|policy| policy["spec"]["ingress"].as_array().into_iter().flatten());
    let admits = |rule: &Value| {
        let of_port = |one: &Value| one["port"] == port && one["protocol"] == "TCP";
        // No ports are all ports, and no peers, or an empty list of them, are everybody.
        rule["ports"].as_array().is_none_or(|ports| ports.is_empty() || ports.iter().any(of_port))
            && rule["from"]
                .as_array()
                .is_none_or(|peers| peers.is_empty() || peers.iter().any(|peer| is_peer(peer, caller)))
    };
    selecting.is_empty() || rules.into_iter().any(admits)
}

/// Who gets to which port of which service, by the names of all of them.
fn let_in(rendered: &[Value], callers: &[Caller]) -> BTreeMap<(String, u64), BTreeSet<&'static str>> {
    let policies: Vec<_> = rendered.iter().filter(|object| object["kind"] == "NetworkPolicy").collect();
    for policy in &policies {
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress"]), "what goes out is let alone");
        assert_eq!(policy["metadata"]["namespace"], HOME);
    }
    let mut found = BTreeMap::new();
    for (name, pod) in pods(rendered).into_iter().filter(|(_, pod)| pod["spec"]["restartPolicy"] != "Never") {
        for port in [PUBLIC, ADMIN, 1025] {
            let can = |caller: &&Caller| is_let_in(&policies, caller, &pod["metadata"]["labels"], port);
            found.insert((name.clone(), port), callers.iter().filter(can).map(|caller| caller.name).collect());
        }
    }
    found
}

/// Everybody who might call: the pods of the chart, and others.
fn callers(rendered: &[Value]) -> Vec<Caller> {
    let mut found = Vec::new();
    for (name, pod) in pods(rendered) {
        let names = ["gateway", "catalog", "booking", "payment", "notification", "payment-reconcile", "mail-sink"];
        if let Some(name) = names.into_iter().find(|known| *known == name) {
            found.push(Caller { name, namespace: HOME, labels: pod["metadata"]["labels"].clone() });
        }
    }
    let gateway = found.iter().find(|caller| caller.name == "gateway").unwrap().labels.clone();
    let operator = json!({ "app.kubernetes.io/name": "resilience-operator" });
    for (name, namespace, labels) in [
        ("operator", "resilience-system", operator.clone()),
        ("beside the operator", "resilience-system", json!({ "app": "shell" })),
        ("called like the operator", HOME, operator),
        ("called like the gateway", "elsewhere", gateway),
        ("beside the services", HOME, json!({ "app": "shell" })),
        ("box office", HOME, json!({ "app": "box-office" })),
        ("prometheus", "monitoring", json!({ "app": "prometheus" })),
    ] {
        found.push(Caller { name, namespace, labels });
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_reached_by_those_who_call_them_and_by_nobody_else() {
    let charts = Charts::new().await;
    let rendered = objects(&charts.render("ticketing", &["networkPolicy.enabled=true"]).await.unwrap());
    let callers = callers(&rendered);
    let found = let_in(&rendered, &callers);
    let all: BTreeSet<_> = callers.iter().map(|caller| caller.name).collect();
    for (name, expected) in [
        ("catalog", &["gateway", "operator"][..]),
        ("booking", &["gateway", "operator"]),
        ("payment", &["booking", "gateway", "operator"]),
        ("notification", &["operator"]),
    ] {
        assert_eq!(found[&(name.to_owned(), PUBLIC)], expected.iter().copied().collect(), "{name}");
    }
    assert_eq!(found[&("gateway".to_owned(), PUBLIC)], all);
    for name in ["gateway", "catalog", "booking", "payment", "notification"] {
        assert_eq!(found[&(name.to_owned(), ADMIN)], all, "{name}: kubelets, Prometheus and the operator");
        assert!(found[&(name.to_owned(), 1025)].is_empty(), "{name} has no other port");
    }
    // Demos and tests go on.
    for name in ["mail-sink", "provider-simulator", "postgres"] {
        assert_eq!(found[&(name.to_owned(), PUBLIC)], all, "{name}");
    }
}

/// A call that is added must not be forgotten here, or nobody would see it before policies are enforced.
#[tokio::test(flavor = "multi_thread")]
async fn each_address_that_a_service_has_is_one_that_it_may_call() {
    let charts = Charts::new().await;
    let rendered = objects(&charts.render("ticketing", &["networkPolicy.enabled=true"]).await.unwrap());
    let found = let_in(&rendered, &callers(&rendered));
    let mut calls = 0;
    for (name, pod) in pods(&rendered) {
        for one in pod["spec"]["containers"][0]["env"].as_array().into_iter().flatten() {
            let host = one["value"].as_str().and_then(|value| value.strip_prefix("http://")?.split(':').next());
            let Some(to) = host.and_then(|host| host.strip_suffix("-pods")) else { continue };
            calls += 1;
            assert!(found[&(to.to_owned(), PUBLIC)].contains(name.as_str()), "{name} may not call {to}");
        }
    }
    assert_eq!(calls, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn others_are_let_in_where_the_values_say_so() {
    let charts = Charts::new().await;
    let set = [
        "networkPolicy.enabled=true",
        r#"networkPolicy.from=[{"podSelector": {"matchLabels": {"app": "box-office"}}}]"#,
        r#"networkPolicy.adminFrom=[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]"#,
        "services.catalog.enabled=false",
    ];
    let rendered = objects(&charts.render("ticketing", &set).await.unwrap());
    let callers = callers(&rendered);
    let found = let_in(&rendered, &callers);
    let who = |name: &str, port| found[&(name.to_owned(), port)].iter().copied().collect::<Vec<_>>();
    assert_eq!(who("booking", PUBLIC), ["box office", "gateway", "operator"]);
    assert_eq!(who("notification", PUBLIC), ["box office", "operator"]);
    assert_eq!(who("gateway", PUBLIC).len(), callers.len());
    for name in ["gateway", "booking", "payment", "notification"] {
        assert_eq!(who(name, ADMIN), ["operator", "prometheus"], "{name}");
    }
    let policies = rendered.iter().filter(|object| object["kind"] == "NetworkPolicy");
    assert_eq!(policies.count(), 4, "none for a service that is switched off");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_switch_nobody_is_kept_out() {
    let charts = Charts::new().await;
    let rendered = objects(&charts.render("ticketing", &[]).await.unwrap());
    assert!(rendered.iter().all(|object| object["kind"] != "NetworkPolicy"));
}

/// The operator's chart gives its pods the labels by which they are let in.
#[tokio::test(flavor = "multi_thread")]
async fn the_operator_is_known_by_the_labels_that_its_chart_gives() {
    let charts = Charts::new().await;
    let rendered = objects(&charts.render("resilience-operator", &[]).await.unwrap());
    let pods = pods(&rendered);
    let [pod] = pods.values().collect::<Vec<_>>()[..] else { panic!("{pods:?}") };
    assert_eq!(pod["metadata"]["labels"]["app.kubernetes.io/name"], "resilience-operator");
}
