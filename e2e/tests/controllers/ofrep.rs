//! Flags over OFREP: who gets them, what is answered, and how soon an edit is there.

use crate::support::{World, cluster::apply, eventually, flag_set, operator::Operator, tcp_proxy::TcpProxy};
use reqwest::{Client, RequestBuilder, Response, StatusCode, header::HeaderMap};
use serde_json::{Value, json};
use std::{
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

/// An operator that serves OFREP, and callers of it.
pub struct Served {
    pub base: String,
    pub world: World,
    pub client: Client,
    pub operator: Operator,
}

impl Served {
    /// In a world of its own, with `extra` on the command line.
    pub async fn start(extra: &[&str]) -> Self {
        let world = prepared().await;
        let listen = address();
        let command_line: Vec<_> = ["--ofrep-listen", &listen].into_iter().chain(extra.iter().copied()).collect();
        let operator = Operator::start(&world, &command_line).await;
        Self::of(world, operator, &listen)
    }

    pub fn of(world: World, operator: Operator, listen: &str) -> Self {
        let client = Client::builder().no_proxy().build().unwrap();
        Self { base: format!("http://{listen}"), world, client, operator }
    }

    /// A call about the world's namespace as `user`, with this body.
    pub fn call(&self, user: &str, path: &str, body: &Value) -> RequestBuilder {
        let url = format!("{}/namespaces/{}{path}", self.base, self.world.namespace);
        let token = self.world.cluster.server.user_token(user).unwrap_or(user);
        self.client.post(url).bearer_auth(token).body(body.to_string()).header("content-type", "application/json")
    }

    /// What one flag is for `user-1`.
    pub async fn flag(&self, key: &str, context: Value) -> (StatusCode, Value) {
        read(self.call("user-1", &format!("/ofrep/v1/evaluate/flags/{key}"), &json!({ "context": context }))).await
    }

    /// Waits until a flag has this value.
    pub async fn until(&self, key: &str, value: &Value) {
        eventually(&format!("{key} is {value}"), async || match self.flag(key, json!({})).await {
            (StatusCode::OK, answer) if answer["value"] == *value => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
    }
}

/// A world whose operator may review tokens, and in which `user-1` may read the flags.
pub async fn prepared() -> World {
    prepare(World::new().await).await
}

pub async fn prepare(world: World) -> World {
    for right in world.cluster.ofrep_rights(&world.home).await {
        apply(&world.client, "", &right).await.unwrap();
    }
    let_read(&world).await;
    world
}

/// Lets `user-1` read the flags of the world's namespace.
pub async fn let_read(world: &World) {
    let rbac = "rbac.authorization.k8s.io";
    let reads = json!({ "apiGroups": ["resilience.ticketwave.io"], "resources": ["featureflags"], "verbs": ["get"] });
    let role = json!({
        "apiVersion": format!("{rbac}/v1"), "kind": "Role", "metadata": { "name": "reads-flags" }, "rules": [reads],
    });
    let binding = json!({
        "apiVersion": format!("{rbac}/v1"), "kind": "RoleBinding", "metadata": { "name": "reads-flags" },
        "roleRef": { "apiGroup": rbac, "kind": "Role", "name": "reads-flags" },
        "subjects": [{ "apiGroup": rbac, "kind": "User", "name": "user-1" }],
    });
    world.apply(&role).await;
    world.apply(&binding).await;
}

/// A free address for each.
pub fn address() -> String {
    static NUMBER: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    std::net::TcpListener::bind((format!("127.85.{high}.{low}"), 0)).unwrap().local_addr().unwrap().to_string()
}

pub async fn read(request: RequestBuilder) -> (StatusCode, Value) {
    let answer = request.send().await.map_err(reqwest::Error::without_url);
    let Ok(answer) = answer else { return (StatusCode::BAD_GATEWAY, json!(answer.unwrap_err().to_string())) };
    let status = answer.status();
    let text = answer.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

/// A set with a flag of each kind.
pub fn flags() -> Value {
    let mut set = flag_set("flags", "booking");
    let flag =
        |variants: Value, default: &str| json!({ "state": "ENABLED", "variants": variants, "defaultVariant": default });
    let flags = &mut set["spec"]["flagSpec"]["flags"];
    flags["Limit"] = flag(json!({ "a": 1.5, "b": 2.5 }), "a");
    flags["checkout/new"] = flag(json!({ "a": "A" }), "a");
    flags["Off"] = flag(json!({ "on": true }), "on");
    flags["Off"]["state"] = json!("DISABLED");
    flags["Country"] = flag(json!({ "on": true, "off": false }), "off");
    flags["Country"]["targeting"] = json!({ "if": [{ "==": [{ "var": "country" }, "AT"] }, "on"] });
    set
}

#[tokio::test(flavor = "multi_thread")]
async fn one_flag_and_all_flags_are_answered() {
    let served = Served::start(&[]).await;
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let id = format!("{}/flags", served.world.namespace);
    let expected = json!({
        "key": "Limit", "value": 1.5, "variant": "a", "reason": "STATIC", "metadata": { "flagSetId": id },
    });
    assert_eq!(served.flag("Limit", json!({})).await, (StatusCode::OK, expected));
    let (status, country) = served.flag("Country", json!({ "targetingKey": "u", "country": "AT" })).await;
    assert_eq!(
        (status, &country["value"], &country["reason"]),
        (StatusCode::OK, &json!(true), &json!("TARGETING_MATCH"))
    );
    assert_eq!(served.flag("checkout%2Fnew/", json!({})).await.1["value"], "A");
    let (status, off) = served.flag("Off", json!({})).await;
    assert_eq!((status, &off["reason"], off.get("value")), (StatusCode::OK, &json!("DISABLED"), None));
    let (status, absent) = served.flag("Absent", json!({})).await;
    assert_eq!((status, &absent["errorCode"]), (StatusCode::NOT_FOUND, &json!("FLAG_NOT_FOUND")));
    assert!(absent["errorDetails"].as_str().unwrap().contains("no flag Absent"), "{absent}");
    let (status, wrong) = served.flag("Limit", json!([])).await;
    assert_eq!((status, &wrong["errorCode"]), (StatusCode::BAD_REQUEST, &json!("INVALID_CONTEXT")));
    let large = served.flag("Limit", json!({ "a": "x".repeat(65 * 1024) })).await;
    assert_eq!(large.0, StatusCode::PAYLOAD_TOO_LARGE);
    let get = served.client.get(format!("{}/namespaces/n/ofrep/v1/evaluate/flags", served.base));
    assert_eq!(read(get).await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(read(served.call("user-1", "/ofrep/v1/flags", &json!({}))).await.0, StatusCode::NOT_FOUND);

    let bulk = async |country: &str, tag: Option<&str>| -> Response {
        let body = json!({ "context": { "country": country } });
        let call = served.call("user-1", "/ofrep/v1/evaluate/flags", &body);
        let call = if let Some(tag) = tag { call.header("if-none-match", tag) } else { call };
        call.send().await.unwrap()
    };
    let tag = |headers: &HeaderMap| headers["etag"].to_str().unwrap().to_owned();
    let first = bulk("AT", None).await;
    let first_tag = tag(first.headers());
    let all: Value = first.json().await.unwrap();
    let keys: Vec<_> = all["flags"].as_array().unwrap().iter().map(|flag| flag["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["Country", "EnablePdf", "Limit", "Off", "checkout/new"]);
    let same = bulk("AT", Some(&first_tag)).await;
    assert_eq!((same.status(), tag(same.headers())), (StatusCode::NOT_MODIFIED, first_tag.clone()));
    assert_eq!(bulk("DE", Some(&first_tag)).await.status(), StatusCode::OK, "another context");
    let counted = "resilience_operator_ofrep_requests_total{call=\"bulk\",result=\"not_modified\"}";
    assert_eq!(served.operator.metric(counted).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_reads_what_rbac_lets_it_read() {
    let served = Served::start(&[]).await;
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let path = "/ofrep/v1/evaluate/flags/EnablePdf";
    let (status, answer) = read(served.call("user-2", path, &json!({}))).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(answer["errorDetails"].as_str().unwrap().contains("user-2 may not get featureflags"), "{answer}");
    let unknown = served.call("no-such-token", path, &json!({})).send().await.unwrap();
    assert_eq!(
        (unknown.status(), &unknown.headers()["www-authenticate"]),
        (StatusCode::UNAUTHORIZED, &"Bearer".parse().unwrap())
    );
    let url = format!("{}/namespaces/{}{path}", served.base, served.world.namespace);
    let (status, nobody) = read(served.client.post(url).body("{}")).await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert!(nobody["errorDetails"].as_str().unwrap().contains("Authorization: Bearer"), "{nobody}");
    let elsewhere = format!("{}/namespaces/default{path}", served.base);
    let token = served.world.cluster.server.user_token("user-1").unwrap();
    let (status, _) = read(served.client.post(elsewhere).bearer_auth(token).body("{}")).await;
    assert_eq!(status, StatusCode::FORBIDDEN, "its Role is of one namespace");
    let admin = served.world.cluster.server.token();
    let elsewhere = format!("{}/namespaces/default{path}", served.base);
    let (status, answer) = read(served.client.post(elsewhere).bearer_auth(admin).body("{}")).await;
    assert_eq!((status, &answer["errorCode"]), (StatusCode::NOT_FOUND, &json!("FLAG_NOT_FOUND")), "not watched");
}

/// A replica that does not lead answers, too, and what is edited is there at once.
#[tokio::test(flavor = "multi_thread")]
async fn an_edit_is_live_in_a_replica_that_does_not_lead() {
    let world = prepared().await;
    let leader = Operator::start(&world, &["--identity", "first"]).await;
    eventually("the first leads", async || {
        let leads = leader.readiness().await.0 && leader.metric("resilience_operator_leader").await == 1;
        leads.then_some(()).ok_or_else(|| "not yet".to_owned())
    })
    .await;
    let listen = address();
    let standby = Operator::start(&world, &["--identity", "second", "--ofrep-listen", &listen]).await;
    let served = Served::of(world, standby, &listen);
    let mut set = flags();
    served.world.apply(&set).await;
    served.until("EnablePdf", &json!(true)).await;
    let mut times = Vec::new();
    for (variant, value) in [("off", false), ("on", true), ("off", false)] {
        set["spec"]["overrides"] = json!([{ "key": "EnablePdf", "variant": variant }]);
        served.world.apply(&set).await;
        let begun = Instant::now();
        served.until("EnablePdf", &json!(value)).await;
        times.push(begun.elapsed());
    }
    // The median: a machine that is busy for a moment proves nothing.
    times.sort();
    assert!(times[1] < Duration::from_secs(1), "{times:?}");
    assert_eq!(served.operator.metric("resilience_operator_leader").await, 0);
    // One that becomes invalid keeps its flags, and hides nothing of another one.
    let mut other = flag_set("other", "booking");
    other["spec"]["flagSpec"]["flags"] = json!({ "Other": set["spec"]["flagSpec"]["flags"]["EnablePdf"] });
    set["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("no-such-variant");
    served.world.apply(&set).await;
    served.world.apply(&other).await;
    served.until("Other", &json!(true)).await;
    served.until("EnablePdf", &json!(false)).await;
    leader.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_has_the_flags_that_target_it() {
    let served = Served::start(&[]).await;
    served.world.apply(&flags()).await;
    let mut high = flag_set("high", "payment");
    high["spec"]["priority"] = json!(10);
    high["spec"]["flagSpec"]["flags"]["EnablePdf"]["defaultVariant"] = json!("off");
    served.world.apply(&high).await;
    served.until("EnablePdf", &json!(false)).await;
    let of = async |workload: &str, key: &str| {
        read(served.call("user-1", &format!("/workloads/{workload}/ofrep/v1/evaluate/flags{key}"), &json!({}))).await
    };
    assert_eq!(of("booking", "/EnablePdf").await.1["value"], true, "a set for others has no say here");
    assert_eq!(of("payment", "/EnablePdf").await.1["value"], false);
    assert_eq!(of("payment", "/Limit").await.0, StatusCode::NOT_FOUND);
    assert_eq!(of("payment", "").await.1["flags"].as_array().unwrap().len(), 1);
    let (status, unknown) = of("nobody", "/EnablePdf").await;
    assert_eq!((status, &unknown["errorCode"]), (StatusCode::NOT_FOUND, &json!("FLAG_NOT_FOUND")));
    assert!(unknown["errorDetails"].as_str().unwrap().contains("nobody"), "{unknown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_calls_with_a_static_token_that_can_change() {
    const TOKENS: [&str; 2] = ["page-token-0123456789", "page-token-9876543210"];
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens");
    let line = |token: &str, namespace: &str| std::fs::write(&file, format!("page {token} {namespace}\n")).unwrap();
    line(TOKENS[0], "elsewhere");
    let extra = ["--ofrep-tokens", file.to_str().unwrap(), "--ofrep-cors-origins", "https://shop.example"];
    let served = Served::start(&extra).await;
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let path = "/ofrep/v1/evaluate/flags/EnablePdf";
    let (status, answer) = read(served.call(TOKENS[0], path, &json!({}))).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert!(answer["errorDetails"].as_str().unwrap().contains("the token page is not for"), "{answer}");

    line(TOKENS[1], &served.world.namespace);
    eventually("the new token is known", async || {
        let (status, answer) = read(served.call(TOKENS[1], path, &json!({}))).await;
        if status == StatusCode::OK { Ok(()) } else { Err(answer.to_string()) }
    })
    .await;
    assert_eq!(read(served.call(TOKENS[0], path, &json!({}))).await.0, StatusCode::UNAUTHORIZED);

    let url = format!("{}/namespaces/{}{path}", served.base, served.world.namespace);
    let from = async |origin: &str| {
        let preflight = served.client.request(reqwest::Method::OPTIONS, &url).header("origin", origin).send();
        let call = served.client.post(&url).header("origin", origin).header("x-api-key", TOKENS[1]).body("{}").send();
        let (preflight, call) = (preflight.await.unwrap(), call.await.unwrap());
        assert_eq!((preflight.status(), call.status()), (StatusCode::NO_CONTENT, StatusCode::OK));
        let allowed = |headers: &HeaderMap| headers.contains_key("access-control-allow-origin");
        (allowed(preflight.headers()), allowed(call.headers()))
    };
    assert_eq!(from("https://shop.example").await, (true, true));
    assert_eq!(from("https://other.example").await, (false, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_unseen_while_the_api_server_is_away() {
    let world = prepared().await;
    let proxy = TcpProxy::start(&world).await;
    let listen = address();
    let config = proxy.operator_config(&world).await;
    let operator = Operator::start_through(&world, config, &["--ofrep-listen", &listen]);
    let served = Served::of(world, operator, &listen);
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    proxy.darken_all();
    assert_eq!(served.flag("EnablePdf", json!({})).await.0, StatusCode::OK, "who is known goes on");
    let unknown = served.call("user-2", "/ofrep/v1/evaluate/flags/EnablePdf", &json!({}));
    let (status, answer) = read(unknown).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(answer["errorDetails"].as_str().unwrap().contains("cannot be reviewed"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_calls_too_often_waits() {
    let served = Served::start(&["--ofrep-rate", "1"]).await;
    served.world.apply(&flags()).await;
    let limited = eventually("it is told to wait", async || {
        let call = served.call("user-1", "/ofrep/v1/evaluate/flags", &json!({}));
        let answer = call.send().await.map_err(|error| error.to_string())?;
        if answer.status() == StatusCode::TOO_MANY_REQUESTS { Ok(answer) } else { Err(answer.status().to_string()) }
    })
    .await;
    assert_eq!(limited.headers()["retry-after"], "1");
}

/// What is invalid when a replica starts is answered as the pods have it.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_starts_while_a_set_is_invalid_says_what_the_pods_say() {
    let world = prepared().await;
    let _workload = world.workload("booking", 1).await;
    let leader = Operator::start(&world, &[]).await;
    let mut set = flags();
    world.apply(&set).await;
    world.until_flags_say("flags", "Ready", "True", "Programmed").await;
    set["spec"]["flagSpec"]["flags"]["Limit"]["defaultVariant"] = json!("no-such-variant");
    world.apply(&set).await;
    world.until_flags_say("flags", "Accepted", "False", "InvalidFlagSet").await;

    let listen = address();
    let operator = Operator::start(&world, &["--ofrep-listen", &listen]).await;
    let served = Served::of(world, operator, &listen);
    let path = "/workloads/booking/ofrep/v1/evaluate/flags/Limit";
    eventually("it answers", async || match read(served.call("user-1", path, &json!({}))).await {
        (StatusCode::OK, answer) if answer["value"] == 1.5 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(
        served.flag("Limit", json!({})).await.0,
        StatusCode::NOT_FOUND,
        "of a namespace nothing is kept elsewhere"
    );
    leader.assert_alive().await;
}

/// What degrades the fleet of a workload is answered for all who read the flag: by workload, and by namespace.
#[tokio::test(flavor = "multi_thread")]
async fn a_flag_that_a_degraded_fleet_sets_is_answered_so() {
    let served = Served::start(&[]).await;
    let _workload = served.world.workload("booking", 1).await;
    served.world.apply(&flags()).await;
    served.until("EnablePdf", &json!(true)).await;
    let mut policy = crate::support::policy("booking", "booking");
    policy["spec"]["degradation"] =
        json!({ "mode": "Forced", "flagOverrides": [{ "key": "EnablePdf", "variant": "off" }] });
    served.world.apply(&policy).await;
    served.until("EnablePdf", &json!(false)).await;
    let path = "/workloads/booking/ofrep/v1/evaluate/flags/EnablePdf";
    let (status, answer) = read(served.call("user-1", path, &json!({ "context": {} }))).await;
    assert_eq!((status, &answer["value"], &answer["variant"]), (StatusCode::OK, &json!(false), &json!("off")));
    policy["spec"]["degradation"]["mode"] = json!("Disabled");
    served.world.apply(&policy).await;
    served.until("EnablePdf", &json!(true)).await;
}
