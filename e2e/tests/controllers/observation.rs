//! What the operator knows may be old, and the API server may not be ready: it waits, says so, and acts on nothing stale.

use crate::support::{
    World,
    api_proxy::{ApiProxy, Call},
    eventually,
    manifests::policy_with_request,
    operator::Operator,
    policy, recovery_policy, says,
    tcp_proxy::TcpProxy,
    within,
    world::{condition, policy_conditions, request_ms},
};
use axum::http::StatusCode;
use k8s_openapi::api::{events::v1::Event, rbac::v1::Role};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};
use serde_json::Value;
use std::{
    io::Write,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_is_noticed_although_all_connections_died_silently() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let proxy = TcpProxy::start(&world).await;
    let operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    world.apply(&policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(operator.metric("resilience_operator_leader").await, 1);

    proxy.darken_existing();
    let died = Instant::now();
    world.apply(&policy_with_request("booking", "booking", "6s")).await;
    within(Duration::from_secs(60), "the edit is live", async || {
        let running = workload.pods[0].script().running.as_ref().and_then(request_ms);
        if running == Some(6_000) { Ok(()) } else { Err(format!("{running:?}")) }
    })
    .await;
    // TCP gives such a connection up after 25 s; sooner would mean that it was not dead at all.
    assert!(died.elapsed() >= Duration::from_secs(10), "{:?}", died.elapsed());
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(operator.metric("resilience_operator_leader").await, 1, "it led all the time");
    operator.assert_alive().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_recovered_on_the_word_of_watches_that_are_silent() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let proxy = ApiProxy::start(&world).await;
    let operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    world.until_policy_says("booking", "RecoveryAllowed", "True", "").await;

    proxy.hold(Some(Call::is_watch));
    within(Duration::from_secs(120), "no watch hears anything for longer than 90 s", async || {
        let silent = proxy.watches_silent_for();
        if silent > Duration::from_secs(91) { Ok(()) } else { Err(format!("{silent:?}")) }
    })
    .await;
    workload.pods[0].script().failing = true;
    let held = world.until_policy_says("booking", "RecoveryAllowed", "False", "ObserverStale").await;
    let message = &condition(&held, "RecoveryAllowed").message;
    assert!(message.contains("has heard nothing from the API server for"), "{message}");
    workload.pods[0].after_more_reports(3).await;
    assert!(workload.pods[0].script().asked.is_empty(), "nothing is done");
    operator.assert_alive().await;

    proxy.hold(None);
    workload.pods[0].until_asked(1).await;
    world.until_policy_says("booking", "RecoveryAllowed", "True", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_whose_own_last_write_no_watch_shows_says_that_the_watches_are_silent() {
    let world = World::new().await;
    let workload = world.workload("booking", 2).await;
    let proxy = ApiProxy::start(&world).await;
    let _operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    world.apply(&recovery_policy("booking", "booking")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    // What the operator has written so far has come back to it: before that it would wait for it, and not act.
    eventually("the watches have told what there was", async || {
        let silent = proxy.watches_silent_for();
        if silent > Duration::from_secs(3) { Ok(()) } else { Err(format!("{silent:?}")) }
    })
    .await;

    proxy.hold(Some(Call::is_watch));
    // The intent is written and executed, and from then on what the operator has of the policy is older than its own write.
    workload.pods[0].script().failing = true;
    workload.pods[0].until_asked(1).await;
    within(Duration::from_secs(120), "no watch hears anything for longer than 90 s", async || {
        let silent = proxy.watches_silent_for();
        if silent > Duration::from_secs(91) { Ok(()) } else { Err(format!("{silent:?}")) }
    })
    .await;
    workload.pods[1].script().failing = true;
    eventually("the status says so", async || {
        let policy = world.policy("booking").await;
        let known = says(policy_conditions(&policy), "RecoveryAllowed", "False", "ObserverStale");
        if known { Ok(()) } else { Err(serde_json::to_string(&policy.status).unwrap()) }
    })
    .await;
    assert!(workload.pods[1].script().asked.is_empty(), "nothing is done");
    proxy.hold(None);
    workload.pods[1].until_asked(1).await;
    world.until_policy_says("booking", "RecoveryAllowed", "True", "").await;
    assert_eq!(workload.pods[0].script().asked.len(), 1, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_starting_is_waited_for() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    world.apply(&policy("booking", "booking")).await;
    let proxy = ApiProxy::start(&world).await;
    // It asks every 2 s: so the API server is not there for 20 s, and then still busy for a while.
    proxy.refuse(10, |_| true, StatusCode::SERVICE_UNAVAILABLE);
    proxy.refuse(2, |_| true, StatusCode::TOO_MANY_REQUESTS);
    proxy.refuse(2, |_| true, StatusCode::FORBIDDEN);
    // The key is asked for next, the Lease and the watches after that.
    proxy.refuse(1, |call| call.path.contains("/secrets/"), StatusCode::FORBIDDEN);
    proxy.refuse(1, Call::is_watch, StatusCode::SERVICE_UNAVAILABLE);
    proxy.refuse(1, Call::is_of_lease, StatusCode::TOO_MANY_REQUESTS);
    let operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    within(Duration::from_secs(60), "all refusals are met", async || {
        assert!(!operator.has_ended(), "it ended after {} refusals", proxy.refused());
        if proxy.refused() == 17 { Ok(()) } else { Err(proxy.refused().to_string()) }
    })
    .await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert!(workload.pods[0].script().running.is_some());
    operator.assert_alive().await;
    operator.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kind_that_stays_refused_is_named_and_ends_the_process_after_a_minute() {
    let world = World::new().await;
    let proxy = ApiProxy::start(&world).await;
    proxy.refuse(1_000, |call| call.path.contains("/pods"), StatusCode::FORBIDDEN);
    let begin = Instant::now();
    let operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    eventually("/readyz says what it waits for", async || {
        let (ready, text) = operator.readiness().await;
        assert!(!ready, "{text}");
        if text.starts_with("the caches are still being filled: pods (") { Ok(()) } else { Err(text) }
    })
    .await;
    within(Duration::from_secs(70), "it ends", async || if operator.has_ended() { Ok(()) } else { Err(String::new()) })
        .await;
    assert!(begin.elapsed() >= Duration::from_secs(60), "it waited");
    let ended = operator.ended().await.unwrap_err().to_string();
    assert!(ended.starts_with("pods cannot be watched: ") && ended.contains("check the operator's roles"), "{ended}");
    assert_plain("the end", &ended);
}

/// Collects log lines.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How Rust would show an error to its programmer.
const DEBUG_TEXTS: &[&str] = &["Status {", "Some(", "Error {", "Api(", "ErrorResponse", "Kube(", "HyperError("];

fn assert_plain(what: &str, text: &str) {
    let found: Vec<_> = DEBUG_TEXTS.iter().filter(|debug| text.contains(**debug)).collect();
    assert!(found.is_empty(), "{found:?} in {what}: {text}");
}

/// The Role of the world's operator as the chart has it, without the right to write these resources.
fn without(complete: &Role, resources: &[&str]) -> Role {
    let mut role = complete.clone();
    role.metadata.resource_version = None;
    let rules = role.rules.as_mut().unwrap();
    for rule in rules.iter_mut() {
        let named = rule.resources.iter().flatten().any(|resource| resources.contains(&resource.as_str()));
        rule.verbs.retain(|verb| !named || ["get", "list", "watch"].contains(&verb.as_str()));
    }
    rules.retain(|rule| !rule.verbs.is_empty());
    role
}

// One thread, so that this test's log is heard and no other's.
#[tokio::test]
async fn an_error_of_the_api_server_is_told_in_its_words() {
    let world = World::new().await;
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_env_filter("operator=debug").with_writer({
        let log = log.clone();
        move || log.clone()
    });
    let _listening = tracing::subscriber::set_default(subscriber.finish());
    let _workload = world.workload("booking", 1).await;
    let roles = world.api::<Role>();
    let complete = roles.get(&world.home).await.unwrap();
    let now_without = async |resources: &[&str]| {
        roles.replace(&world.home, &PostParams::default(), &without(&complete, resources)).await.unwrap();
    };
    now_without(&["configmaps", "resiliencepolicies/status", "events"]).await;
    let operators = Client::try_from(world.operator_config().await).unwrap();
    eventually("the role is in force", async || {
        let events: Api<Event> = Api::namespaced(operators.clone(), &world.namespace);
        match events.create(&PostParams::default(), &Event::default()).await {
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;

    let proxy = ApiProxy::start(&world).await;
    proxy.refuse(2, |_| true, StatusCode::SERVICE_UNAVAILABLE);
    proxy.refuse(2, |call| call.is_watch() && call.path.contains("/pods"), StatusCode::FORBIDDEN);
    let operator = Operator::start_through(&world, proxy.operator_config(&world).await, &[]);
    world.apply(&policy("booking", "booking")).await;
    let until_logged = async |wanted: &[&str]| {
        eventually("every refusal is in the log", async || {
            let log = log.text();
            let missing: Vec<_> = wanted.iter().filter(|wanted| !log.contains(**wanted)).collect();
            if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?} in {log}")) }
        })
        .await;
    };
    let refusals = ["waiting for the API server", "a watch failed", "error=writing the status: ", "error=publishing: "];
    until_logged(&refusals).await;

    // Now the status may be written, and says what else was refused.
    now_without(&["configmaps", "events"]).await;
    let told = world.until_policy_says("booking", "Programmed", "False", "PublishFailed").await;
    let message = &condition(&told, "Programmed").message;
    assert!(message.contains("configmaps") && message.contains("forbidden"), "the server's words: {message}");
    assert_plain("the status", &serde_json::to_value(&told.status).unwrap().to_string());

    now_without(&["events"]).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    until_logged(&["an Event was lost"]).await;

    now_without(&[]).await;
    world.apply(&policy_with_request("booking", "booking", "6s")).await;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    world.until_events("booking", &["Programmed"]).await;
    let events = world.api::<Event>().list(&ListParams::default()).await.unwrap().items;
    assert!(!events.is_empty());
    for event in events {
        assert_plain("an Event", &serde_json::to_value(event).unwrap_or(Value::Null).to_string());
    }
    operator.stop().await;
    assert_plain("the log", &log.text());
}
