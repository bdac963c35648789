//! The charts: Helm's own lint, and what they render for every switch that they have.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests say what is wrong by panicking")]

mod network;
mod types;
mod wiring;

use e2e::{
    binaries::{Binaries, Tool},
    checkout,
    command::Run,
    progress::Progress,
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

const CHARTS: [&str; 2] = ["resilience-operator", "ticketing"];

/// What belongs to a value that is empty by default: one that is not, which Helm renders differently.
const EXAMPLES: &[(&str, &str)] = &[
    ("tag", r#""v1.2.3""#),
    ("imagePullSecrets", r#"[{"name": "registry"}]"#),
    ("watchNamespaces", r#"["tickets", "shop"]"#),
    ("nodeSelector", r#"{"disk": "fast"}"#),
    ("tolerations", r#"[{"key": "a", "operator": "Exists"}]"#),
    ("affinity", r#"{"podAntiAffinity": {}}"#),
    ("podAnnotations", r#"{"a": "b: c"}"#),
    ("extraEnv", r#"[{"name": "A", "value": "b: c"}]"#),
    ("env", r#"{"A": "b: c"}"#),
    ("corsOrigins", r#"["https://shop.example"]"#),
    ("tokensSecret", r#""ofrep-tokens""#),
    ("secretName", r#""ofrep-tls""#),
    ("nameOverride", r#""other""#),
    ("fullnameOverride", r#""other""#),
    ("existingSecret", r#""database""#),
    ("user", r#""tickets@example.com""#),
    ("paypalWebhookId", r#""WH-1""#),
    ("host", r#""db.example""#),
    ("parameters", r#""connect_timeout=5""#),
    ("configMap", r#""roots""#),
    ("migrationUrlKey", r#""migrations""#),
    ("password", r#""a b\"c""#),
    ("storageClass", r#""fast""#),
    ("labels", r#"{"release": "prometheus"}"#),
    ("MAIL_HELO_NAME", r#""tickets.example.com""#),
    ("jwksUrl", r#""https://id.example/keys""#),
    ("issuer", r#""https://id.example""#),
    ("audience", r#""tickets""#),
    ("hmacSecret", r#""tokens""#),
    ("trustedProxies", r#""10.0.0.0/8""#),
    ("from", r#"[{"podSelector": {"matchLabels": {"app": "box-office"}}}]"#),
    ("adminFrom", r#"[{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]"#),
    ("gateway", r#"{"replicas": 3, "env": {"A": "b"}}"#),
];

/// Values that make no sense alone, and what they need.
const TOGETHER: &[(&str, &[&str])] = &[
    ("postgresql.enabled=false", &["database.existingSecret=\"database\""]),
    ("database.host=\"db.example\"", &["postgresql.enabled=false", "database.existingSecret=\"database\""]),
    (
        "database.parameters=\"connect_timeout=5\"",
        &["postgresql.enabled=false", "database.existingSecret=\"database\"", "database.host=\"a\""],
    ),
    (
        "database.rootCertificates.configMap=\"roots\"",
        &["postgresql.enabled=false", "database.existingSecret=\"database\"", "database.sslMode=\"verify-full\""],
    ),
    (
        "database.migrationUrlKey=\"migrations\"",
        &["postgresql.enabled=false", "database.existingSecret=\"database\"", "database.pooler=\"transaction\""],
    ),
    (
        "providers.existingSecret=\"database\"",
        &["services.payment.env.STRIPE_URL=\"https://a\"", "services.payment.env.PAYPAL_URL=\"https://b\""],
    ),
    (
        "mail.existingSecret=\"database\"",
        &["mail.user=\"tickets\"", "services.notification.env.SMTP_ENCRYPTION=\"tls\""],
    ),
    (
        "mail.user=\"tickets@example.com\"",
        &["mail.existingSecret=\"login\"", "services.notification.env.SMTP_ENCRYPTION=\"starttls\""],
    ),
    ("ofrep.tls.secretName=\"ofrep-tls\"", &["ofrep.enabled=true"]),
    ("alerts.labels={\"release\": \"prometheus\"}", &["alerts.enabled=true"]),
    (
        "gateway.tokens.jwksUrl=\"https://id.example/keys\"",
        &["gateway.tokens.issuer=\"https://id.example\"", "gateway.tokens.audience=\"tickets\""],
    ),
    (
        "networkPolicy.from=[{\"podSelector\": {\"matchLabels\": {\"app\": \"box-office\"}}}]",
        &["networkPolicy.enabled=true"],
    ),
    (
        "networkPolicy.adminFrom=[{\"namespaceSelector\": {\"matchLabels\": {\"kubernetes.io/metadata.name\": \"monitoring\"}}}]",
        &["networkPolicy.enabled=true"],
    ),
    ("postgresql.persistence.storageClass=\"fast\"", &["postgresql.persistence.enabled=true"]),
];

fn read(path: &Path) -> Value {
    serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Each way in which one value can differ from its default, as `--set-json` takes it.
fn switches(values: &Value, schema: &Value, root: &Value, path: &str, found: &mut Vec<String>) {
    let schema = match schema["$ref"].as_str() {
        Some(reference) => root.pointer(reference.trim_start_matches('#')).unwrap(),
        None => schema,
    };
    if let Some(options) = schema["enum"].as_array() {
        found.extend(options.iter().filter(|option| *option != values).map(|option| format!("{path}={option}")));
        return;
    }
    let name = path.rsplit('.').next().unwrap();
    let example = || EXAMPLES.iter().find(|(known, _)| *known == name).map(|(_, example)| format!("{path}={example}"));
    let empty = match values {
        Value::Bool(on) => return found.push(format!("{path}={}", !on)),
        Value::Object(fields) => {
            for (field, value) in fields {
                let schema = if schema["properties"][field].is_null() {
                    &schema["additionalProperties"]
                } else {
                    &schema["properties"][field]
                };
                let path = if path.is_empty() { field.clone() } else { format!("{path}.{field}") };
                switches(value, schema, root, &path, found);
            }
            fields.is_empty()
        }
        Value::Array(items) => {
            found.extend((!items.is_empty()).then(|| format!("{path}=[]")));
            items.is_empty()
        }
        Value::String(text) => text.is_empty(),
        _ => false,
    };
    if empty {
        found.push(
            example().unwrap_or_else(|| panic!("{path} is empty by default: put an example of it into this test")),
        );
    }
}

struct Charts {
    helm: PathBuf,
}

impl Charts {
    async fn new() -> Self {
        Self { helm: Binaries::new(Progress::new()).path(Tool::Helm).await.unwrap() }
    }

    fn path(chart: &str) -> PathBuf {
        checkout::root().join("charts").join(chart)
    }

    async fn render(&self, chart: &str, set: &[&str]) -> Result<String, String> {
        let mut run =
            Run::new(&self.helm).args(["template", "release"]).arg(Self::path(chart)).args(["--namespace", "home"]);
        for value in set {
            run = run.args(["--set-json", value]);
        }
        run.output().await.map_err(|error| error.to_string())
    }
}

/// Everything that is rendered is an object that could be applied, and no two have one name.
fn check(what: &str, text: &str) -> usize {
    let mut seen = BTreeSet::new();
    for document in text
        .split("\n---")
        .filter(|document| document.lines().any(|line| !line.is_empty() && !line.starts_with(['#', '-'])))
    {
        let object: Value =
            serde_saphyr::from_str(document).unwrap_or_else(|error| panic!("{what}: {error}\n{document}"));
        let word = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let identity = ["/apiVersion", "/kind", "/metadata/namespace", "/metadata/name"].map(word);
        assert!([0, 1, 3].into_iter().all(|at| !identity[at].is_empty()), "{what}: {identity:?} in\n{document}");
        assert!(
            !document.contains("<no value>") && !document.contains("%!"),
            "{what}: a value is missing in\n{document}"
        );
        for label in object["metadata"]["labels"].as_object().into_iter().flatten().map(|(_, value)| value) {
            assert!(label.as_str().is_some_and(|label| label.len() <= 63), "{what}: {label} is no label's value");
        }
        assert!(seen.insert(identity.clone()), "{what}: {identity:?} twice");
    }
    assert!(!seen.is_empty(), "{what}: nothing is rendered");
    seen.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn helm_has_nothing_to_say_against_them() {
    let charts = Charts::new().await;
    let run = Run::new(&charts.helm).args(["lint", "--strict"]);
    let run = CHARTS.iter().fold(run, |run, chart| run.arg(Charts::path(chart)));
    let said = run.output().await.unwrap();
    assert!(!said.contains("[WARNING]") && !said.contains("[ERROR]"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_switch_renders_objects_that_can_be_applied() {
    let charts = &Charts::new().await;
    for chart in CHARTS {
        let path = Charts::path(chart);
        let schema = read(&path.join("values.schema.json"));
        let mut all = vec![String::new()];
        switches(&read(&path.join("values.yaml")), &schema, &schema, "", &mut all);
        assert!(all.len() > 15, "the switches of {chart} are found: {all:?}");
        let done = stream::iter(all).map(|switch| async move {
            let with = TOGETHER.iter().find(|(alone, _)| *alone == switch).map_or(&[][..], |(_, with)| with);
            let set: Vec<_> = with.iter().copied().chain((!switch.is_empty()).then_some(switch.as_str())).collect();
            let what = format!("{chart} with {set:?}");
            check(&what, &charts.render(chart, &set).await.unwrap_or_else(|error| panic!("{what}: {error}")))
        });
        let objects: Vec<_> = done.buffer_unordered(4).collect().await;
        assert!(objects.iter().any(|count| *count != objects[0]), "some switch changes what is rendered");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_schemas_do_not_know_is_refused() {
    let charts = Charts::new().await;
    for (chart, set, words) in [
        ("resilience-operator", json!({ "admissionPolicies": {} }), "admissionPolicies"),
        ("resilience-operator", json!({ "admissionPolicy": { "enabled": "no" } }), "boolean"),
        ("resilience-operator", json!({ "admissionPolicy": { "cronJobs": ["A b"] } }), "cronJobs"),
        ("resilience-operator", json!({ "podTransport": "udp" }), "podTransport"),
        ("resilience-operator", json!({ "ofrep": { "port": 8080 } }), "port"),
        ("resilience-operator", json!({ "ofrep": { "corsOrigins": ["shop.example"] } }), "corsOrigins"),
        ("resilience-operator", json!({ "ofrep": { "streams": 10_001 } }), "streams"),
        ("resilience-operator", json!({ "ofrep": { "tls": { "secretName": "A b" } } }), "secretName"),
        ("resilience-operator", json!({ "flagSync": { "streams": 0 } }), "streams"),
        ("ticketing", json!({ "services": { "booking": { "databasePoolSize": 201 } } }), "databasePoolSize"),
        ("ticketing", json!({ "gateway": { "limits": { "requestsPerUser": "many" } } }), "requestsPerUser"),
        ("ticketing", json!({ "gateway": { "tokens": { "jwksUrl": "https://a", "issuer": "b" } } }), "audience"),
        ("ticketing", json!({ "database": { "parameters": "a=b c" } }), "parameters"),
        ("ticketing", json!({ "database": { "sslMode": "on" } }), "sslMode"),
        ("ticketing", json!({ "services": { "catalog": { "headless": false } } }), "headless"),
        ("ticketing", json!({ "serviceDefaults": { "drainSeconds": 61 } }), "drainSeconds"),
        // An empty peer is everybody.
        ("ticketing", json!({ "networkPolicy": { "from": [{}] } }), "from"),
    ] {
        let set: Vec<_> = set.as_object().unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect();
        let refused = charts.render(chart, &set.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let error = refused.err().unwrap_or_else(|| panic!("{chart} takes {set:?}"));
        assert!(error.contains(words), "{error}");
    }
}

/// What is rendered, as objects.
fn objects(text: &str) -> Vec<Value> {
    let objects = text.split("\n---").map(|document| serde_saphyr::from_str::<Value>(document).unwrap_or_default());
    objects.filter(|object| object["kind"].is_string()).collect()
}

/// An alert about a metric that there is not is never seen to be silent.
#[tokio::test(flavor = "multi_thread")]
async fn alerts_are_about_metrics_and_runbooks_that_there_are() {
    let charts = Charts::new().await;
    let rendered = objects(&charts.render("ticketing", &["alerts.enabled=true"]).await.unwrap());
    let rule = rendered.iter().find(|object| object["kind"] == "PrometheusRule").unwrap();
    let metrics = std::fs::read_to_string(checkout::root().join("docs/metrics.md")).unwrap();
    let groups = rule["spec"]["groups"].as_array().unwrap();
    let rules: Vec<_> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
    for rule in &rules {
        let expression = rule["expr"].as_str().unwrap();
        let selected = expression.match_indices('{').map(|(at, _)| {
            let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
            expression[..at].rsplit(|c| !is_part(c)).next().unwrap()
        });
        let names: BTreeSet<_> = selected.collect();
        assert_eq!(names.len(), 1, "about one metric: {names:?}");
        let name = names.into_iter().next().unwrap();
        let (_, page) = rule["annotations"]["runbook_url"].as_str().unwrap().split_once("/blob/main/").unwrap();
        assert!(checkout::root().join(page).exists(), "{page}");
        assert!(expression.contains("namespace=\"home\""), "{expression}");
        // Of Kubernetes' objects kube-state-metrics says how they are.
        if name.starts_with("kube_job_") {
            let (_, jobs) = expression.split_once("job_name=~\"").unwrap();
            let (cron_job, _) = jobs.split_once("-[0-9]+\"}").unwrap();
            let is_it = |one: &Value| one["kind"] == "CronJob" && one["metadata"]["name"] == cron_job;
            assert!(rendered.iter().any(is_it), "there is no CronJob {cron_job}");
            assert!(metrics.contains(&format!("`{name}`")) && name == "kube_job_status_failed", "{name}");
            continue;
        }
        let (name, kind) = name.strip_suffix("_total").map_or((name, "gauge"), |counter| (counter, "counter"));
        let row = metrics.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        assert!(row.is_some_and(|row| row.contains(&format!("| {kind} |"))), "{name} is no {kind} of docs/metrics.md");
    }
    assert!(rules.len() >= 7);
    let names: BTreeSet<_> = rules.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    assert!(names.len() == rules.len() && names.contains("TicketPaymentsDiffer"), "{names:?}");
    let listed = |name: &&&str| metrics.contains(&format!("`{name}`"));
    assert_eq!(names.iter().filter(listed).count(), names.len(), "not all of {names:?} are in docs/metrics.md");
    // Without the Job there is nothing to wait for.
    let without = charts.render("ticketing", &["alerts.enabled=true", "reconcile.enabled=false"]).await.unwrap();
    assert!(!without.contains("TicketPaymentsDiffer") && without.contains("TicketRefundsWait"));
}

/// Callers take 3 s to ask DNS again, which has kept its answer for 5 s; then requests under way have 22 s.
#[tokio::test(flavor = "multi_thread")]
async fn services_send_their_callers_elsewhere_for_long_enough_before_they_end() {
    let charts = Charts::new().await;
    for (set, delay) in [(&[][..], 8), (&["serviceDefaults.drainSeconds=11"], 11)] {
        let rendered = charts.render("ticketing", set).await.unwrap();
        let mut services = 0;
        for object in objects(&rendered) {
            let pod = &object["spec"]["template"]["spec"];
            let container = &pod["containers"][0];
            let env = |name: &str| {
                let all = container["env"].as_array()?;
                all.iter().find(|one| one["name"] == name)?["value"].as_str()?.parse::<u64>().ok()
            };
            let Some(seconds) = env("SHUTDOWN_DELAY_SECONDS").filter(|_| object["kind"] == "Deployment") else {
                continue;
            };
            services += 1;
            assert_eq!((seconds, env("CONNECTIONS_PER_PEER")), (delay, Some(512)));
            assert!(container["lifecycle"].is_null(), "a hook runs before the process knows that it stops");
            assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() >= seconds + 22);
        }
        assert_eq!(services, 5);
    }
}

/// A key of the chart's own or one that is there; anybody else who has it could sign.
#[tokio::test(flavor = "multi_thread")]
async fn notification_alone_has_the_key_of_tickets() {
    let charts = Charts::new().await;
    for (set, secret) in [(&[][..], "ticket-key"), (&[r#"tickets.existingSecret="mine""#], "mine")] {
        let objects = objects(&charts.render("ticketing", set).await.unwrap());
        let made = objects.iter().filter(|object| object["metadata"]["name"] == "ticket-key").count();
        assert_eq!(made, usize::from(secret == "ticket-key"));
        let has_it = |object: &&Value| {
            let volumes = object["spec"]["template"]["spec"]["volumes"].as_array();
            volumes.is_some_and(|volumes| volumes.iter().any(|volume| volume["secret"]["secretName"] == secret))
        };
        let names: Vec<_> = objects.iter().filter(has_it).map(|object| &object["metadata"]["name"]).collect();
        assert_eq!(names, [&json!("notification")]);
    }
}

/// The same of the password for the mail server, and only with a way that is encrypted.
#[tokio::test(flavor = "multi_thread")]
async fn notification_alone_has_the_password_for_mails() {
    let charts = Charts::new().await;
    let set = [
        r#"mail.existingSecret="smtp""#,
        r#"mail.user="tickets""#,
        r#"mail.rootCertificates.configMap="roots""#,
        r#"services.notification.env.SMTP_ENCRYPTION="starttls""#,
    ];
    let objects = objects(&charts.render("ticketing", &set).await.unwrap());
    for (kind, name) in [("secret", "secretName"), ("configMap", "name")] {
        let source = if kind == "secret" { "smtp" } else { "roots" };
        let has_it = |object: &&Value| {
            let volumes = object["spec"]["template"]["spec"]["volumes"].as_array();
            volumes.is_some_and(|volumes| volumes.iter().any(|volume| volume[kind][name] == source))
        };
        let names: Vec<_> = objects.iter().filter(has_it).map(|object| &object["metadata"]["name"]).collect();
        assert_eq!(names, [&json!("notification")]);
    }
    for (missing, says) in [(1, "mail.user"), (3, "SMTP_ENCRYPTION")] {
        let some: Vec<_> = set.iter().enumerate().filter(|(nth, _)| *nth != missing).map(|(_, set)| *set).collect();
        let error = charts.render("ticketing", &some).await.unwrap_err();
        assert!(error.contains(says), "{error}");
    }
}

/// One could switch a Service off by whose name the others call.
#[tokio::test(flavor = "multi_thread")]
async fn services_call_each_other_by_names_that_there_are() {
    let charts = Charts::new().await;
    let objects = objects(&charts.render("ticketing", &[]).await.unwrap());
    let services: BTreeSet<_> = objects
        .iter()
        .filter(|object| object["kind"] == "Service")
        .filter_map(|object| object["metadata"]["name"].as_str())
        .collect();
    let mut called = 0;
    for value in objects.iter().flat_map(|object| {
        let env = object["spec"]["template"]["spec"]["containers"][0]["env"].as_array().cloned().unwrap_or_default();
        env.into_iter().filter_map(|one| one["value"].as_str().map(str::to_owned)).collect::<Vec<_>>()
    }) {
        let Some(host) = value.strip_prefix("http://").and_then(|url| url.split([':', '/']).next()) else {
            continue;
        };
        called += 1;
        assert!(services.contains(host), "{host} is called, and is none of {services:?}");
    }
    assert_eq!(called, 6);
}

/// An upgrade that keeps the values of version 0.1 must not switch the policies off in silence.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_with_old_values_says_what_is_missing() {
    let charts = Charts::new().await;
    let error = charts.render("resilience-operator", &["admissionPolicy=null", "aggregatedRoles=null"]);
    let error = error.await.unwrap_err();
    assert!(error.contains("--reset-then-reuse-values"), "{error}");
}
