//! What each pod of the chart `ticketing` gets: its settings and their files, where they come from, and that no other pod has them.

use crate::{Charts, objects, read};
use clap::{Args, Command, CommandFactory};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use ticketing_services::{
    booking, catalog, database::DatabaseSettings, gateway, mail_sink, notification, payment, provider_simulator,
};

/// Where a setting comes from. `{pod}` is the name of the workload.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// The text itself.
    Text(&'static str),
    /// What `services.<workload>.env` of values.yaml says, which is what the process itself takes without it.
    Values,
    /// A field of the pod.
    Field(&'static str),
    /// A key of a Secret.
    Key(&'static str, &'static str),
    /// The path of a file, which is a key of a Secret.
    SecretFile(&'static str, &'static str),
    /// The path of a file, which is a key of a ConfigMap.
    ConfigMapFile(&'static str, &'static str),
    /// The path of a folder, which is a whole Secret.
    SecretFolder(&'static str),
    /// The path of a folder, which is a whole ConfigMap.
    ConfigMapFolder(&'static str),
}

use Source::{ConfigMapFile, ConfigMapFolder, Field, Key, SecretFile, SecretFolder, Text, Values};

/// The pods that have a setting, its name, and where it comes from. No other pod has it.
pub type Row = (&'static [&'static str], &'static str, Source);

const SERVICES: &[&str] = &["booking", "catalog", "gateway", "notification", "payment"];
const WITH_DATABASE: &[&str] =
    &["booking", "booking-cleanup", "catalog", "notification", "payment", "payment-reconcile"];
const BOOKING: &[&str] = &["booking"];
const GATEWAY: &[&str] = &["gateway"];
const NOTIFICATION: &[&str] = &["notification"];
const PAYMENT: &[&str] = &["payment"];
const OF_PROVIDERS: &[&str] = &["payment", "payment-reconcile"];
const NOBODY: &[&str] = &[];

/// What is set without any value: all of it.
const DEFAULT: &[Row] = &[
    (SERVICES, "WORKLOAD_NAME", Text("{pod}")),
    (SERVICES, "WORKLOAD_KIND", Text("Deployment")),
    (SERVICES, "POD_NAME", Field("metadata.name")),
    (SERVICES, "POD_UID", Field("metadata.uid")),
    (SERVICES, "POD_NAMESPACE", Field("metadata.namespace")),
    (SERVICES, "PORT", Text("8080")),
    (SERVICES, "ADMIN_PORT", Text("9901")),
    (SERVICES, "SHUTDOWN_DELAY_SECONDS", Text("8")),
    (SERVICES, "CONNECTIONS_PER_PEER", Text("512")),
    (SERVICES, "RESILIENCE_CONFIG_DIR", ConfigMapFolder("{pod}-resilience")),
    (SERVICES, "RESILIENCE_TOKEN_DIR", SecretFolder("{pod}-resilience-token")),
    (WITH_DATABASE, "DATABASE_URL", Key("postgres-auth", "url")),
    (WITH_DATABASE, "DATABASE_PASSWORD_FILE", SecretFile("postgres-auth", "password")),
    (&["booking", "catalog", "notification", "payment"], "DATABASE_POOL_SIZE", Text("10")),
    (&["postgres"], "POSTGRES_USER", Key("postgres-auth", "username")),
    (&["postgres"], "POSTGRES_PASSWORD", Key("postgres-auth", "password")),
    (&["postgres"], "POSTGRES_DB", Key("postgres-auth", "database")),
    (&["postgres"], "PGDATA", Text("/var/lib/postgresql/data/pgdata")),
    (GATEWAY, "CATALOG_URL", Text("http://catalog-pods:8080")),
    (GATEWAY, "BOOKING_URL", Text("http://booking-pods:8080")),
    (&["booking", "gateway"], "PAYMENT_URL", Text("http://payment-pods:8080")),
    (GATEWAY, "SESSION_KEY_FILE", SecretFile("gateway-sessions", "session-keys")),
    (GATEWAY, "SECURE_COOKIES", Text("false")),
    (GATEWAY, "TRUSTED_PROXIES", Text("")),
    (GATEWAY, "REQUESTS_PER_USER", Text("20:40")),
    (GATEWAY, "REQUESTS_PER_SESSION", Text("5:10")),
    (GATEWAY, "REQUESTS_PER_NETWORK", Text("50:100")),
    (GATEWAY, "NEW_SESSIONS_PER_NETWORK", Text("20:100")),
    (GATEWAY, "EVENT_REQUESTS_PER_NETWORK", Text("200:400")),
    (GATEWAY, "SHOP_URL", Text("/")),
    (&["booking", "payment"], "BUYER_LIMIT_SECONDS", Values),
    (BOOKING, "SEATS_PER_BUYER", Values),
    (BOOKING, "SEATS_PER_SESSION", Values),
    (BOOKING, "SEATS_PER_NETWORK", Values),
    (BOOKING, "HELD_SEATS_PER_BUYER", Values),
    (BOOKING, "HOLDS_PER_BUYER", Values),
    (BOOKING, "HOLDS_PER_NETWORK", Values),
    (BOOKING, "DECLINES_PER_BUYER", Values),
    (BOOKING, "DECLINES_PER_NETWORK", Values),
    (BOOKING, "KEEP_CANCELLED_DAYS", Values),
    (NOTIFICATION, "KEEP_SENT_DAYS", Values),
    // The process alone keeps them for ever.
    (PAYMENT, "KEEP_PAYMENTS_DAYS", Text("4018")),
    (OF_PROVIDERS, "STRIPE_URL", Text("http://provider-simulator:8081")),
    (OF_PROVIDERS, "PAYPAL_URL", Text("http://provider-simulator:8082")),
    (&["payment-reconcile"], "RECONCILE_SINCE", Text("24h")),
    (NOTIFICATION, "SMTP_HOST", Text("mail-sink")),
    (NOTIFICATION, "SMTP_PORT", Text("1025")),
    (NOTIFICATION, "MAIL_HELO_NAME", Text("")),
    (NOTIFICATION, "MAIL_SESSIONS", Values),
    (NOTIFICATION, "MAIL_SESSIONS_PER_DOMAIN", Values),
    (NOTIFICATION, "MAIL_GIVE_UP_HOURS", Values),
    (NOTIFICATION, "TICKET_KEY_FILE", SecretFile("ticket-key", "private.pem")),
];

/// Values, and all that they change in what pods get.
pub const CASES: &[(&[&str], &[Row])] = &[
    (
        &["postgresql.enabled=false", r#"database.existingSecret="db""#],
        &[
            (WITH_DATABASE, "DATABASE_URL", Key("db", "url")),
            (NOBODY, "DATABASE_PASSWORD_FILE", Text("")),
            (WITH_DATABASE, "DATABASE_POOLER", Text("session")),
            (NOBODY, "POSTGRES_USER", Text("")),
            (NOBODY, "POSTGRES_PASSWORD", Text("")),
            (NOBODY, "POSTGRES_DB", Text("")),
            (NOBODY, "PGDATA", Text("")),
        ],
    ),
    (
        &[
            "postgresql.enabled=false",
            r#"database.existingSecret="db""#,
            r#"database.host="db.example""#,
            "database.port=6432",
            r#"database.name="sale""#,
            r#"database.passwordKey="secret-word""#,
            r#"database.parameters="connect_timeout=5""#,
            r#"database.sslMode="verify-full""#,
            r#"database.rootCertificates={"configMap": "roots", "key": "bundle.pem"}"#,
            r#"database.pooler="transaction""#,
            r#"database.migrationUrlKey="migrations""#,
            "serviceDefaults.databasePoolSize=7",
        ],
        &[
            (WITH_DATABASE, "DATABASE_URL", Text("postgres://ticketing@db.example:6432/sale?connect_timeout=5")),
            (WITH_DATABASE, "DATABASE_PASSWORD_FILE", SecretFile("db", "secret-word")),
            (WITH_DATABASE, "DATABASE_POOLER", Text("transaction")),
            (WITH_DATABASE, "DATABASE_MIGRATION_URL", Key("db", "migrations")),
            (WITH_DATABASE, "PGSSLMODE", Text("verify-full")),
            (WITH_DATABASE, "PGSSLROOTCERT", ConfigMapFile("roots", "bundle.pem")),
            (&["booking", "catalog", "notification", "payment"], "DATABASE_POOL_SIZE", Text("7")),
            (NOBODY, "POSTGRES_USER", Text("")),
            (NOBODY, "POSTGRES_PASSWORD", Text("")),
            (NOBODY, "POSTGRES_DB", Text("")),
            (NOBODY, "PGDATA", Text("")),
        ],
    ),
    (
        &["services.catalog.database=false"],
        &[
            (
                &["booking", "booking-cleanup", "notification", "payment", "payment-reconcile"],
                "DATABASE_URL",
                Key("postgres-auth", "url"),
            ),
            (
                &["booking", "booking-cleanup", "notification", "payment", "payment-reconcile"],
                "DATABASE_PASSWORD_FILE",
                SecretFile("postgres-auth", "password"),
            ),
            (&["booking", "notification", "payment"], "DATABASE_POOL_SIZE", Text("10")),
            (&["postgres"], "POSTGRES_PASSWORD", Key("postgres-auth", "password")),
        ],
    ),
    (
        &[
            r#"providers={"existingSecret": "keys", "paypalWebhookId": "WH-1"}"#,
            r#"providers.rootCertificates={"configMap": "proxy", "key": "proxy.pem"}"#,
            r#"services.payment.env={"STRIPE_URL": "https://stripe.example", "PAYPAL_URL": "https://paypal.example"}"#,
            r#"reconcile.since="36h""#,
        ],
        &[
            (OF_PROVIDERS, "STRIPE_URL", Text("https://stripe.example")),
            (OF_PROVIDERS, "PAYPAL_URL", Text("https://paypal.example")),
            (OF_PROVIDERS, "STRIPE_API_KEY_FILE", SecretFile("keys", "stripe-api-key")),
            (OF_PROVIDERS, "PAYPAL_CLIENT_ID_FILE", SecretFile("keys", "paypal-client-id")),
            (OF_PROVIDERS, "PAYPAL_CLIENT_SECRET_FILE", SecretFile("keys", "paypal-client-secret")),
            (PAYMENT, "STRIPE_WEBHOOK_SECRET_FILE", SecretFile("keys", "stripe-webhook-secret")),
            (PAYMENT, "PAYPAL_WEBHOOK_ID", Text("WH-1")),
            (OF_PROVIDERS, "PROVIDER_CA_FILE", ConfigMapFile("proxy", "proxy.pem")),
            (&["payment-reconcile"], "RECONCILE_SINCE", Text("36h")),
        ],
    ),
    (
        &[
            r#"gateway.tokens={"jwksUrl": "https://id.example/keys", "issuer": "https://id.example", "audience": "us"}"#,
            r#"gateway.tokens.rootCertificates.configMap="issuer-roots""#,
            r#"gateway.tokens.hmacSecret="tokens""#,
            r#"gateway.sessions={"existingSecret": "cookies", "secureCookies": true}"#,
            r#"gateway.trustedProxies="10.0.0.0/8,fd00::/8""#,
            r#"gateway.limits={"requestsPerUser": "1:2", "requestsPerSession": "3:4", "requestsPerNetwork": "5:6"}"#,
            r#"gateway.limits.newSessionsPerNetwork="7:8""#,
            r#"gateway.limits.eventRequestsPerNetwork="0""#,
        ],
        &[
            (GATEWAY, "TOKEN_JWKS_URL", Text("https://id.example/keys")),
            (GATEWAY, "TOKEN_ISSUER", Text("https://id.example")),
            (GATEWAY, "TOKEN_AUDIENCE", Text("us")),
            (GATEWAY, "TOKEN_CA_FILE", ConfigMapFile("issuer-roots", "ca.crt")),
            (GATEWAY, "TOKEN_HMAC_FILE", SecretFile("tokens", "hmac-secrets")),
            (GATEWAY, "SESSION_KEY_FILE", SecretFile("cookies", "session-keys")),
            (GATEWAY, "SECURE_COOKIES", Text("true")),
            (GATEWAY, "TRUSTED_PROXIES", Text("10.0.0.0/8,fd00::/8")),
            (GATEWAY, "REQUESTS_PER_USER", Text("1:2")),
            (GATEWAY, "REQUESTS_PER_SESSION", Text("3:4")),
            (GATEWAY, "REQUESTS_PER_NETWORK", Text("5:6")),
            (GATEWAY, "NEW_SESSIONS_PER_NETWORK", Text("7:8")),
            (GATEWAY, "EVENT_REQUESTS_PER_NETWORK", Text("0")),
        ],
    ),
    (
        &[r#"waitingRoom={"existingSecret": "places", "shopUrl": "https://shop.example/"}"#],
        &[
            (GATEWAY, "WAITING_ROOM_KEY_FILE", SecretFile("places", "waiting-room-key")),
            (GATEWAY, "SHOP_URL", Text("https://shop.example/")),
        ],
    ),
    (
        &[r#"tickets={"existingSecret": "mine", "key": "ed25519.pem"}"#],
        &[(NOTIFICATION, "TICKET_KEY_FILE", SecretFile("mine", "ed25519.pem"))],
    ),
    (
        &[
            r#"mail={"existingSecret": "relay", "passwordKey": "word", "user": "tickets"}"#,
            r#"mail.rootCertificates={"configMap": "relay-roots", "key": "roots.pem"}"#,
            r#"services.notification.env={"SMTP_HOST": "relay.example", "SMTP_ENCRYPTION": "starttls"}"#,
        ],
        &[
            (NOTIFICATION, "SMTP_HOST", Text("relay.example")),
            (NOTIFICATION, "SMTP_ENCRYPTION", Text("starttls")),
            (NOTIFICATION, "SMTP_USER", Text("tickets")),
            (NOTIFICATION, "SMTP_PASSWORD_FILE", SecretFile("relay", "word")),
            (NOTIFICATION, "SMTP_CA_FILE", ConfigMapFile("relay-roots", "roots.pem")),
        ],
    ),
    (
        &["serviceDefaults.drainSeconds=11", "serviceDefaults.connectionsPerPeer=1024"],
        &[(SERVICES, "SHUTDOWN_DELAY_SECONDS", Text("11")), (SERVICES, "CONNECTIONS_PER_PEER", Text("1024"))],
    ),
];

/// The pods that are rendered, by the name of their workload.
pub fn pods(objects: &[Value]) -> BTreeMap<String, Value> {
    let pod = |object: &Value| {
        let template = match object["kind"].as_str()? {
            "Deployment" | "StatefulSet" => &object["spec"]["template"],
            "CronJob" => &object["spec"]["jobTemplate"]["spec"]["template"],
            _ => return None,
        };
        assert_eq!(template["spec"]["containers"].as_array().unwrap().len(), 1, "{object}");
        Some((object["metadata"]["name"].as_str().unwrap().to_owned(), template.clone()))
    };
    objects.iter().filter_map(pod).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn container(pod: &Value) -> &Value {
    &pod["spec"]["containers"][0]
}

/// The settings of a pod by their names, none twice.
fn env(pod: &Value) -> BTreeMap<&str, &Value> {
    let all = list(&container(pod)["env"]);
    let found: BTreeMap<_, _> = all.iter().map(|one| (one["name"].as_str().unwrap(), one)).collect();
    assert_eq!(found.len(), all.len(), "a setting twice: {all:?}");
    assert!(container(pod)["envFrom"].is_null(), "what comes so is not looked at here");
    found
}

/// The volume that is mounted as this folder, to be read only and followed by the kubelet.
fn mounted<'a>(pod: &'a Value, folder: &str) -> &'a Value {
    let mounts: Vec<_> =
        list(&container(pod)["volumeMounts"]).iter().filter(|mount| mount["mountPath"] == folder).collect();
    let [mount] = mounts[..] else { panic!("{folder} is mounted {} times: {pod}", mounts.len()) };
    // What is mounted by a sub-path is never replaced in a running pod.
    assert!(mount["readOnly"] == true && mount["subPath"].is_null(), "{mount}");
    list(&pod["spec"]["volumes"]).iter().find(|volume| volume["name"] == mount["name"]).unwrap()
}

/// The key of a Secret or a ConfigMap that is the file of this name.
fn key_of<'a>(source: &'a Value, file: &'a str) -> &'a str {
    match &source["items"] {
        Value::Null => file,
        items => list(items).iter().find(|item| item["path"] == file).unwrap()["key"].as_str().unwrap(),
    }
}

/// Where a setting of a pod comes from, as the rows say it.
fn origin(pod: &Value, one: &Value, expected: Source) -> String {
    let reference = &one["valueFrom"];
    if let Some(field) = reference["fieldRef"]["fieldPath"].as_str() {
        return format!("field {field}");
    }
    if let Some(key) = reference["secretKeyRef"]["key"].as_str() {
        return format!("Secret {} key {key}", reference["secretKeyRef"]["name"].as_str().unwrap());
    }
    let text = one["value"].as_str().unwrap_or_else(|| panic!("{one}"));
    let named = |volume: &Value, key: Option<&str>| {
        let key = |source: &Value| key.map_or("all".to_owned(), |file| format!("file {}", key_of(source, file)));
        match (&volume["secret"], &volume["configMap"]) {
            (Value::Null, source) => format!("ConfigMap {} {}", source["name"].as_str().unwrap_or("?"), key(source)),
            (source, _) => format!("Secret {} {}", source["secretName"].as_str().unwrap(), key(source)),
        }
    };
    match expected {
        SecretFile(..) | ConfigMapFile(..) => {
            let (folder, file) = text.rsplit_once('/').unwrap();
            named(mounted(pod, folder), Some(file))
        }
        SecretFolder(_) | ConfigMapFolder(_) => named(mounted(pod, text), None),
        _ => format!("text {text}"),
    }
}

/// The same of a row.
fn expected(source: Source, pod: &str, name: &str, values: &Value) -> String {
    let said = match source {
        Text(text) => format!("text {text}"),
        Values => format!("text {}", values["services"][pod]["env"][name].as_str().unwrap()),
        Field(field) => format!("field {field}"),
        Key(secret, key) => format!("Secret {secret} key {key}"),
        SecretFile(secret, key) => format!("Secret {secret} file {key}"),
        ConfigMapFile(map, key) => format!("ConfigMap {map} file {key}"),
        SecretFolder(secret) => format!("Secret {secret} all"),
        ConfigMapFolder(map) => format!("ConfigMap {map} all"),
    };
    said.replace("{pod}", pod)
}

/// Secrets and ConfigMaps that a pod gets, whichever way.
fn has(pod: &Value) -> BTreeSet<String> {
    let volumes = list(&pod["spec"]["volumes"]).iter().flat_map(|volume| {
        assert!(volume["projected"].is_null(), "what comes so is not looked at here");
        let secret = volume["secret"]["secretName"].as_str().map(|name| format!("Secret {name}"));
        secret.into_iter().chain(volume["configMap"]["name"].as_str().map(|name| format!("ConfigMap {name}")))
    });
    let keys = list(&container(pod)["env"]).iter().filter_map(|one| {
        let reference = &one["valueFrom"];
        assert!(reference["configMapKeyRef"].is_null(), "what comes so is not looked at here");
        Some(format!("Secret {}", reference["secretKeyRef"]["name"].as_str()?))
    });
    volumes.chain(keys).collect()
}

/// One rendering is as the rows say; what differs from the `usual` one, and no more, is in the rows.
fn compare(set: &[&str], objects: &[Value], rows: &[Row], usual: &BTreeMap<String, Value>, values: &Value) {
    let pods = pods(objects);
    let mut secrets = BTreeMap::<String, BTreeSet<&str>>::new();
    let mut named = BTreeMap::<&str, BTreeSet<&str>>::new();
    for (of, name, source) in rows {
        named.entry(name).or_default().extend(*of);
        for pod in *of {
            let what = format!("{name} of {pod} with {set:?}");
            let one = *env(&pods[*pod]).get(name).unwrap_or_else(|| panic!("{what} is missing"));
            let said = expected(*source, pod, name, values);
            assert_eq!(origin(&pods[*pod], one, *source), said, "{what}");
            let mut words = said.split(' ');
            if let (Some(kind @ ("Secret" | "ConfigMap")), Some(holder)) = (words.next(), words.next()) {
                secrets.entry(format!("{kind} {holder}")).or_default().insert(pod);
                let made = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == holder);
                match (made, words.nth(1)) {
                    (Some(made), Some(key)) => {
                        let is_there = !made["data"][key].is_null() || !made["stringData"][key].is_null();
                        assert!(is_there, "{what}: {holder} is made without {key}");
                    }
                    _ => assert!(
                        holder.contains("-resilience") || set.iter().any(|value| value.contains(holder)),
                        "{what}: nobody makes {holder}"
                    ),
                }
            }
        }
    }
    for (name, of) in &named {
        let having = pods.iter().filter(|(_, pod)| env(pod).contains_key(name)).map(|(pod, _)| &**pod);
        assert_eq!(&having.collect::<BTreeSet<_>>(), of, "who has {name} with {set:?}");
    }
    for (holder, of) in &secrets {
        let having = pods.iter().filter(|(_, pod)| has(pod).contains(holder)).map(|(pod, _)| &**pod);
        assert_eq!(&having.collect::<BTreeSet<_>>(), of, "who has {holder} with {set:?}");
    }
    for (name, pod) in &pods {
        let (now, before) = (env(pod), usual.get(name).map(env).unwrap_or_default());
        for setting in now.keys().chain(before.keys()).filter(|setting| now.get(**setting) != before.get(**setting)) {
            assert!(named.contains_key(setting), "{setting} of {name} changes with {set:?}, and has no row here");
        }
        let mounts: BTreeSet<_> =
            list(&container(pod)["volumeMounts"]).iter().map(|one| one["name"].as_str()).collect();
        let volumes = list(&pod["spec"]["volumes"]).iter().map(|one| one["name"].as_str());
        let volumes: BTreeSet<_> = volumes.chain((name == "postgres").then_some(Some("data"))).collect();
        assert_eq!(mounts, volumes, "volumes of {name} with {set:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_pod_gets_its_settings_and_no_other_does() {
    let charts = Charts::new().await;
    let values = read(&Charts::path("ticketing").join("values.yaml"));
    let usual = objects(&charts.render("ticketing", &[]).await.unwrap());
    // Without anything usual everything is a difference.
    compare(&[], &usual, DEFAULT, &BTreeMap::new(), &values);
    for (set, rows) in CASES {
        let rendered = objects(&charts.render("ticketing", set).await.unwrap());
        compare(set, &rendered, rows, &pods(&usual), &values);
    }
}

/// The settings that the binary knows by this first argument.
fn command(service: &str) -> Command {
    fn of<T: Args>() -> Command {
        T::augment_args(Command::new("ticketing"))
    }
    match service {
        "gateway" => of::<gateway::Settings>(),
        "catalog" => of::<catalog::Settings>(),
        "booking" => of::<booking::Settings>(),
        "payment" => of::<payment::Settings>(),
        "notification" => of::<notification::Settings>(),
        "mail-sink" => of::<mail_sink::Settings>(),
        "provider-simulator" => of::<provider_simulator::Settings>(),
        "booking-cleanup" => of::<DatabaseSettings>(),
        "reconcile" => of::<payment::reconcile::Settings>(),
        other => panic!("`ticketing {other}` is nothing that this test knows"),
    }
}

/// A name with a slip in it would be set for nobody, and a value that is none would keep every pod from starting.
#[tokio::test(flavor = "multi_thread")]
async fn the_binary_knows_each_setting_and_takes_its_value() {
    let charts = Charts::new().await;
    let sets = CASES.iter().map(|(set, _)| *set);
    for set in std::iter::once(&[][..]).chain(sets) {
        let rendered = objects(&charts.render("ticketing", set).await.unwrap());
        for (name, pod) in pods(&rendered).into_iter().filter(|(name, _)| name != "postgres") {
            let arguments = list(&container(&pod)["args"]);
            let [service] = arguments else { panic!("{name} runs {arguments:?}") };
            start(&format!("{name} with {set:?}"), command(service.as_str().unwrap()), &pod);
        }
    }
}

/// Each setting of the pod is one of the command, which takes all values.
fn start(what: &str, command: Command, pod: &Value) {
    let mut line = vec!["program".to_owned()];
    for (setting, one) in env(pod) {
        let argument = command.get_arguments().find(|argument| argument.get_env() == Some(setting.as_ref()));
        let argument = argument.unwrap_or_else(|| panic!("{what} knows no setting {setting}"));
        // What comes from a Secret or from the pod itself may be any text.
        let value = one["value"].as_str().unwrap_or("any");
        line.push(format!("--{}={value}", argument.get_long().unwrap()));
    }
    command.try_get_matches_from(&line).unwrap_or_else(|error| panic!("{what} does not start: {error}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_knows_each_setting_and_takes_its_value() {
    let charts = Charts::new().await;
    let other = [
        r#"watchNamespaces=["tickets", "shop"]"#,
        r#"podTransport="apiserver-proxy""#,
        "dryRun=true",
        "jobLogs=false",
        r#"logFormat="json""#,
        r#"storm={"actions": 0, "interval": "1m30s", "cooldown": "1h"}"#,
        r#"ofrep={"enabled": true, "port": 9016, "rate": 7, "streams": 5, "corsOrigins": ["https://a", "https://b"], "tokensSecret": "t", "tls": {"secretName": "c"}}"#,
        r#"flagSync={"enabled": true, "port": 9015, "streams": 7, "tokensSecret": "t", "tls": {"secretName": "c"}}"#,
    ];
    for set in [&[][..], &other] {
        let rendered = objects(&charts.render("resilience-operator", set).await.unwrap());
        let pods = pods(&rendered);
        let [pod] = pods.values().collect::<Vec<_>>()[..] else { panic!("{pods:?}") };
        assert!(env(pod).len() > 10);
        start(&format!("the operator with {set:?}"), operator::args::Args::command(), pod);
    }
}

/// A Secret that is mounted elsewhere than the operator looks for it would be missed silently.
#[tokio::test(flavor = "multi_thread")]
async fn the_operator_finds_the_secrets_of_flags_where_it_looks_for_them() {
    let charts = Charts::new().await;
    let some = |name: &str| Some(name.to_owned());
    for (of, setting, plain) in [("ofrep", "OFREP", "http"), ("flagSync", "FLAG_SYNC", "kubernetes.io/h2c")] {
        let found = async |more: &str| {
            let set = format!(r#"{of}={{"enabled": true{more}}}"#);
            let rendered = objects(&charts.render("resilience-operator", &[&set]).await.unwrap());
            let pod = pods(&rendered).into_values().next().unwrap();
            let path = |name: &str| {
                let value = env(&pod).get(format!("{setting}_{name}").as_str()).map(|one| one["value"].clone());
                value.map(|value| value.as_str().unwrap().to_owned())
            };
            let secret = |folder: &str, files: &[&str]| {
                let source = &mounted(&pod, folder)["secret"];
                assert!(
                    files.iter().all(|file| key_of(source, file) == *file) && source["optional"] == true,
                    "{source}"
                );
                source["secretName"].as_str().unwrap().to_owned()
            };
            let tokens = path("TOKENS").map(|file| secret(file.strip_suffix("/tokens").unwrap(), &["tokens"]));
            let certificates = path("CERTIFICATES").map(|folder| secret(&folder, &["tls.crt", "tls.key"]));
            let service = rendered.iter().find(|object| object["kind"] == "Service").unwrap();
            let protocol = service["spec"]["ports"][0]["appProtocol"].as_str().unwrap_or_default().to_owned();
            (tokens, certificates, protocol)
        };
        let both = found(r#", "tokensSecret": "t", "tls": {"secretName": "c"}"#).await;
        assert_eq!(both, (some("t"), some("c"), "https".to_owned()));
        let tls = found(r#", "tls": {"secretName": "c"}"#).await;
        assert_eq!(tls, (None, some("c"), "https".to_owned()));
        let neither = found("").await;
        assert_eq!(neither, (None, None, plain.to_owned()));
    }
}

/// A default that stands twice is the same twice.
#[test]
fn values_that_repeat_a_default_of_the_binary_agree_with_it() {
    let values = read(&Charts::path("ticketing").join("values.yaml"));
    let rows: Vec<_> = DEFAULT.iter().filter(|(_, _, source)| matches!(source, Values)).collect();
    assert!(rows.len() > 10, "{rows:?}");
    for (of, name, _) in rows {
        for service in *of {
            let command = command(service);
            let argument = command.get_arguments().find(|argument| argument.get_env() == Some(name.as_ref())).unwrap();
            let said = values["services"][*service]["env"][*name].as_str().unwrap();
            assert_eq!(argument.get_default_values(), [said], "{name} of {service}");
        }
    }
}

/// Only by a Service without an address of its own do callers see the pods themselves, and can leave out one that fails.
#[tokio::test(flavor = "multi_thread")]
async fn services_call_the_pods_of_each_other() {
    let charts = Charts::new().await;
    let rendered = objects(&charts.render("ticketing", &[]).await.unwrap());
    let pods = pods(&rendered);
    let mut called = BTreeSet::new();
    for (caller, setting) in pods.iter().flat_map(|(name, pod)| env(pod).into_values().map(move |one| (name, one))) {
        let name = setting["name"].as_str().unwrap();
        let Some(to) = ["CATALOG_URL", "BOOKING_URL", "PAYMENT_URL"].into_iter().find(|url| *url == name) else {
            continue;
        };
        let to = to.trim_end_matches("_URL").to_lowercase();
        let url = setting["value"].as_str().unwrap();
        let (host, port) = url.strip_prefix("http://").unwrap().split_once(':').unwrap();
        let service = rendered.iter().find(|one| one["kind"] == "Service" && one["metadata"]["name"] == host);
        let service = service.unwrap_or_else(|| panic!("{caller} calls {url}, and there is no Service {host}"));
        let spec = &service["spec"];
        assert_eq!(spec["clusterIP"], "None", "{caller} calls {url}: one address for all pods");
        let selector = spec["selector"].as_object().unwrap();
        let is_selected = |labels: &Value| selector.iter().all(|(label, value)| labels[label] == *value);
        let selected = pods.iter().filter(|(_, pod)| is_selected(&pod["metadata"]["labels"])).map(|(name, _)| name);
        assert_eq!(selected.collect::<Vec<_>>(), [&to], "{caller} calls {url}");
        // Without an address nobody translates the port: it is the pod's own.
        let ports = list(&spec["ports"]);
        assert_eq!((ports.len(), ports[0]["port"].to_string().as_str()), (1, port), "{url}");
        let open = list(&container(&pods[&to])["ports"]).iter().find(|open| open["name"] == ports[0]["targetPort"]);
        assert_eq!(open.unwrap()["containerPort"], ports[0]["port"], "{url}");
        called.insert((caller.as_str(), to));
    }
    let expected = [("booking", "payment"), ("gateway", "booking"), ("gateway", "catalog"), ("gateway", "payment")];
    assert_eq!(called, expected.map(|(caller, to)| (caller, to.to_owned())).into());
}

/// Whatever the role is called, it is who logs in, and to the host that was named.
#[tokio::test(flavor = "multi_thread")]
async fn any_name_of_a_role_is_escaped_in_the_address() {
    let charts = Charts::new().await;
    let user = "sale@server/1?a=b&c #%:ü+d";
    let user_set = format!("database.user={}", Value::from(user));
    let set = [
        "postgresql.enabled=false",
        r#"database.existingSecret="db""#,
        r#"database.host="db.example""#,
        r#"database.parameters="connect_timeout=5""#,
        user_set.as_str(),
    ];
    let rendered = objects(&charts.render("ticketing", &set).await.unwrap());
    let pods = pods(&rendered);
    let address = env(&pods["booking"])["DATABASE_URL"]["value"].as_str().unwrap();
    let config: tokio_postgres::Config = address.parse().unwrap();
    assert_eq!(config.get_user(), Some(user), "{address}");
    assert_eq!(config.get_hosts(), [tokio_postgres::config::Host::Tcp("db.example".to_owned())], "{address}");
    assert_eq!((config.get_dbname(), config.get_ports()), (Some("ticketing"), &[5432][..]), "{address}");
}

/// The last one of two would count, and nobody would see which.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_providers_are_not_named_twice() {
    let charts = Charts::new().await;
    let set =
        [r#"providers.rootCertificates.configMap="roots""#, r#"services.payment.env.PROVIDER_CA_FILE="/etc/ca.pem""#];
    let error = charts.render("ticketing", &set).await.unwrap_err();
    assert!(error.contains("PROVIDER_CA_FILE would be set twice"), "{error}");
    for set in set {
        let rendered = objects(&charts.render("ticketing", &[set]).await.unwrap());
        let pods = pods(&rendered);
        for name in OF_PROVIDERS {
            assert!(env(&pods[*name]).contains_key("PROVIDER_CA_FILE"), "{name} with {set}");
        }
    }
}
