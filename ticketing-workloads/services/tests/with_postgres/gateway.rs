//! The gateway before real services, and before one that misbehaves.

use crate::support::app::{App, OPENING_NIGHT, order};
use crate::support::nobody;
use crate::support::postgres::Postgres;
use axum::Router;
use axum::http::StatusCode;
use contract::{ActionOutcome, CircuitState, FallbackSettings, FlagsSettings, ManualState, PolicySettings, WorkloadId};
use futures::future::join_all;
use resilience::{Resilience, deadline};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use ticketing_services::http_client::{self, HttpCall};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The ADR's shape of a policy for the catalog, with shorter times.
fn quick() -> PolicySettings {
    let mut policy = PolicySettings::default();
    let catalog = policy.dependencies.entry("catalog".to_owned()).or_default();
    catalog.timeout.request_ms = 1_000;
    catalog.timeout.per_try_ms = 200;
    catalog.retry.num_retries = 0;
    catalog.circuit_breaker.break_ms = 500;
    catalog.fallback = vec![
        FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 0 },
        FallbackSettings::Static { status_code: 503, body: json!({"events": [], "isFallback": true}).to_string() },
    ];
    policy
}

/// Takes connections and never answers.
async fn stuck() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    address
}

/// Answers every request with this status.
async fn answering(status: u16) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let status = StatusCode::from_u16(status).unwrap();
    let app = Router::new().fallback(move || async move { status });
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// A policy under which booking has this long to answer.
fn booking_answers_within(ms: u64) -> PolicySettings {
    let mut policy = PolicySettings::default();
    let booking = policy.dependencies.entry("booking".to_owned()).or_default();
    (booking.timeout.request_ms, booking.timeout.per_try_ms, booking.retry.num_retries) = (ms, ms, 0);
    policy
}

fn metric(text: &str, name: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_from_the_catalog_then_from_memory_then_from_nowhere() {
    let postgres = Postgres::start().await;
    let catalog = App::catalog(&postgres).await;
    let gateway = App::gateway(catalog.address, nobody().await).await;
    gateway.push(quick(), FlagsSettings::default()).await;

    let live = gateway.get("/api/events?pageSize=5").await;
    assert_eq!((live.status().as_u16(), live.headers().get("x-served-from")), (200, None));
    let live: Value = live.json().await.unwrap();
    assert_eq!(live["events"][0]["eventId"], OPENING_NIGHT);
    assert_eq!(gateway.get("/api/events?page=0").await.status(), 400);

    catalog.end().await;
    let kept = gateway.get("/api/events?page=1&pageSize=5").await;
    assert_eq!((kept.status().as_u16(), &kept.headers()["x-served-from"]), (200, &"cache".parse().unwrap()));
    assert_eq!(kept.json::<Value>().await.unwrap(), live, "however the address spells it");
    let unseen = gateway.get("/api/events?category=opera").await;
    assert_eq!((unseen.status().as_u16(), &unseen.headers()["x-served-from"]), (503, &"static".parse().unwrap()));
    assert_eq!(unseen.json::<Value>().await.unwrap(), json!({"events": [], "isFallback": true}));
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_given_back_but_not_the_last_answers_that_there_are() {
    let postgres = Postgres::start().await;
    let catalog = App::catalog(&postgres).await;
    let gateway = App::gateway(catalog.address, nobody().await).await;
    gateway.push(quick(), FlagsSettings::default()).await;
    let dropped = async |intent: &str| {
        let answer = gateway.execute(intent, "TrimMemory", "memory").await;
        assert_eq!(answer.outcome, ActionOutcome::Done, "{}", answer.message);
        let kib =
            answer.message.strip_prefix("dropped ").and_then(|rest| rest.split_once(" KiB of caches; ")).unwrap().0;
        kib.parse::<u64>().unwrap()
    };
    for page in 1..=20 {
        assert_eq!(gateway.get(&format!("/api/events?page={page}")).await.status(), 200);
    }
    let runs = gateway.health().await.checks["memory"].runs;
    assert!(dropped("one").await >= 20, "each answer counts for a KiB and more");
    gateway.check("memory", "the check runs at once", |check| check.runs > runs).await;
    assert_eq!(dropped("two").await, 0);

    assert_eq!(gateway.get("/api/events?page=1").await.status(), 200);
    catalog.end().await;
    for _ in 0..5 {
        assert_eq!(gateway.get("/api/events?page=1").await.headers()["x-served-from"], "cache");
    }
    assert_eq!(dropped("three").await, 0, "the circuit is open");
    assert_eq!(gateway.get("/api/events?page=1").await.headers()["x-served-from"], "cache");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_policy_the_minimal_answer_is_the_adrs() {
    let gateway = App::gateway(nobody().await, nobody().await).await;
    // The ADR waits 2, 4 and 8 s between its attempts; the circuit is open before the second one.
    for answer in join_all((0..5).map(|_| gateway.get("/api/events"))).await {
        assert_eq!(answer.status(), 503);
        assert_eq!(
            answer.json::<Value>().await.unwrap(),
            json!({
                "events": [], "message": "Event catalog is temporarily unavailable. Please try again later.",
                "isFromCache": false, "isFallback": true,
            })
        );
    }
}

/// The ADR's test `CircuitBreaker_ShouldOpenAfter_ConsecutiveFailures`.
#[tokio::test(flavor = "multi_thread")]
async fn after_five_failures_in_a_row_the_sixth_call_is_not_made() {
    let gateway = App::gateway(nobody().await, nobody().await).await;
    gateway.push(quick(), FlagsSettings::default()).await;
    for _ in 0..5 {
        assert_eq!(gateway.get("/api/events").await.status(), 503);
    }
    assert_eq!(gateway.get("/api/events").await.status(), 503);
    let text = gateway.metrics().await;
    assert_eq!(metric(&text, r#"circuit_breaker_opened_total{service="catalog"}"#), 1);
    let calls =
        |result: &str| metric(&text, &format!(r#"circuit_breaker_calls_total{{service="catalog",result="{result}"}}"#));
    assert_eq!((calls("failure"), calls("rejected")), (5, 1), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_catalog_keeps_nobody_from_booking() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let gateway = App::gateway(stuck().await, booking.address).await;
    let mut slow = quick();
    let catalog = slow.dependencies.get_mut("catalog").unwrap();
    (catalog.timeout.request_ms, catalog.timeout.per_try_ms) = (8_000, 8_000);
    // The circuit is no help here: only the bulkhead is, of which the policy says nothing.
    catalog.circuit_breaker.manual_state = ManualState::Closed;
    gateway.push(slow, FlagsSettings::default()).await;
    // More than the 1,024 connections that the gateway takes: without a bulkhead they would fill all of them, for as long as
    // the catalog may take. They are there before the first buyer.
    let looking = join_all((0..1_100).map(|_| async {
        let mut stream = TcpStream::connect(gateway.address).await.unwrap();
        stream.write_all(b"GET /api/events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        stream
    }));
    let looking = looking.await;
    let started = Instant::now();
    let mut bought = Vec::new();
    for _ in 0..10 {
        bought.push(gateway.book().await);
    }
    let took = started.elapsed();
    for mut stream in looking {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    }
    assert!(bought.iter().all(|status| *status == 201), "{bought:?}");
    assert!(took < Duration::from_secs(3), "they waited for the catalog: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_booking_says_is_passed_on() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let gateway = App::gateway(nobody().await, booking.address).await;
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!("once");
    let first = gateway.post(&wanted).await;
    assert_eq!((first.status().as_u16(), first.headers().get("idempotent-replayed")), (201, None));
    let id = first.json::<Value>().await.unwrap()["bookingId"].as_str().unwrap().to_owned();
    let again = gateway.post(&wanted).await;
    assert_eq!(again.headers()["idempotent-replayed"], "true");
    let found: Value = gateway.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
    assert_eq!(found["ticketCount"], 2);
    for (answer, status, code) in [
        (gateway.post(&order("22222222-2222-4222-8222-222222222222", 1)).await, 404, "EVENT_NOT_FOUND"),
        (gateway.post(&json!({"eventId": 7})).await, 422, "INVALID_REQUEST"),
        (gateway.get("/api/bookings/none").await, 400, "INVALID_REQUEST"),
        (gateway.get("/api/nothing").await, 404, "NOT_FOUND"),
    ] {
        assert_eq!(answer.status(), status);
        assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], code);
    }
    let huge = gateway.client.post(format!("http://{}/api/bookings", gateway.address)).body("x".repeat(70_000));
    assert_eq!(huge.send().await.unwrap().status(), 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_tells_what_may_have_happened_from_what_has_not() {
    let away = App::gateway(nobody().await, nobody().await).await;
    let answer = away.post(&order(OPENING_NIGHT, 1)).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "BOOKING_UNAVAILABLE");

    let silent = App::gateway(nobody().await, stuck().await).await;
    silent.push(booking_answers_within(300), FlagsSettings::default()).await;
    let started = Instant::now();
    let answer = silent.post(&order(OPENING_NIGHT, 1)).await;
    assert_eq!(answer.status(), 504);
    let key = answer.headers()["idempotency-key"].clone();
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(
        (&answer["errorCode"], &answer["idempotencyKey"]),
        (&json!("OUTCOME_UNKNOWN"), &json!(key.to_str().unwrap()))
    );
    assert!(started.elapsed() < Duration::from_secs(2), "the deadline holds");
}

/// The deadline of a caller in here holds, and its end says nothing of the service.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_says_that_it_ran_out_of_its_callers_time() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let holder = postgres.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let post = async |deadline: &str| {
        let request = booking.client.post(format!("http://{}/api/bookings", booking.address));
        let request = request.header("x-deadline-ms", deadline.to_owned()).body(order(OPENING_NIGHT, 1).to_string());
        request.send().await.unwrap()
    };
    let answer = post("100").await;
    assert_eq!(
        (answer.status().is_server_error(), &answer.headers()["x-deadline-passed"]),
        (true, &"true".parse().unwrap())
    );
    let answer = post("0").await;
    assert_eq!(answer.headers()["x-refused"], "true");
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "DEADLINE_PASSED");
}

/// Whatever callers from outside say of how long they wait: 30 of 30 failures counted for nothing before, and the circuit
/// to a booking that was frozen, or failed, stayed closed.
#[rstest::rstest]
#[case::frozen(None)]
#[case::failing(Some(503))]
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_from_outside_counts_for_nothing(#[case] status: Option<u16>) {
    let booking = match status {
        None => stuck().await,
        Some(status) => answering(status).await,
    };
    let gateway = App::gateway(nobody().await, booking).await;
    gateway.push(booking_answers_within(300), FlagsSettings::default()).await;
    for _ in 0..5 {
        let request = gateway.client.post(format!("http://{}/api/bookings", gateway.address));
        let request = ["x-deadline-ms", "x-retried", "x-refused", "x-deadline-passed"]
            .into_iter()
            .fold(request, |request, name| request.header(name, "100"));
        let answer = request.body(order(OPENING_NIGHT, 1).to_string()).send().await.unwrap();
        assert_eq!(answer.status(), status.unwrap_or(504));
    }
    let text = gateway.metrics().await;
    assert_eq!(metric(&text, r#"circuit_breaker_opened_total{service="booking"}"#), 1, "{text}");
    let answer = gateway.post(&order(OPENING_NIGHT, 1)).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("x-retried")), (503, None), "nor is it told any of it");
}

/// Nothing has failed where there are only too many buyers: those who come a moment later are let in.
#[tokio::test(flavor = "multi_thread")]
async fn a_rush_of_buyers_opens_no_circuit() {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let gateway = App::gateway(nobody().await, booking.address).await;
    let limit = |most: u32| {
        let flag = json!({"state": "ENABLED", "variants": {"most": most}, "defaultVariant": "most"});
        serde_json::from_value::<FlagsSettings>(json!({"flags": {"MaxConcurrentBookings": flag}})).unwrap()
    };
    booking.push(PolicySettings::default(), limit(0)).await;
    for _ in 0..10 {
        let answer = gateway.post(&order(OPENING_NIGHT, 1)).await;
        assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "TOO_MANY_BOOKINGS");
    }
    booking.push(PolicySettings::default(), limit(100)).await;
    assert_eq!(gateway.book().await, 201);
    assert_eq!(metric(&gateway.metrics().await, r#"circuit_breaker_opened_total{service="booking"}"#), 0);
}

/// Nor may a caller with a short deadline shut the others out: while the event is locked, no booking ends within it.
#[rstest::rstest]
#[case::no_time(1)]
#[case::some_time(60)]
#[case::more_time(200)]
#[tokio::test(flavor = "multi_thread")]
async fn a_short_deadline_opens_no_circuit(#[case] time_left_ms: u64) {
    let postgres = Postgres::start().await;
    let booking = App::start(&postgres, "booking-1").await;
    let caller = Resilience::builder(WorkloadId::deployment("ticketing", "caller")).dependency("booking").build();
    let dependency = caller.dependency("booking").unwrap();
    let service = http_client::service(&format!("http://{}", booking.address), dependency);
    let holder = postgres.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let call = || HttpCall::post("/api/bookings", &order(OPENING_NIGHT, 1));
    for _ in 0..10 {
        let until = tokio::time::Instant::now() + Duration::from_millis(time_left_ms);
        deadline::within(Some(until), http_client::ask(&service, call())).await.unwrap_err();
    }
    assert_eq!((dependency.circuit().state, dependency.circuit().opened_total), (CircuitState::Closed, 0));
    holder.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(http_client::ask(&service, call()).await.unwrap().status, 201);
}

/// Gateway and catalog both may make three retries; only the one next to the failure makes them.
#[tokio::test(flavor = "multi_thread")]
async fn tiers_do_not_multiply_their_retries() {
    let postgres = Postgres::start().await;
    let catalog = App::catalog(&postgres).await;
    let gateway = App::gateway(catalog.address, nobody().await).await;
    let retries = |name: &str| {
        let mut policy = PolicySettings::default();
        let dependency = policy.dependencies.entry(name.to_owned()).or_default();
        dependency.retry.base_interval_ms = 10;
        dependency.circuit_breaker.manual_state = ManualState::Closed;
        policy
    };
    catalog.push(retries("database"), FlagsSettings::default()).await;
    gateway.push(retries("catalog"), FlagsSettings::default()).await;
    let attempts = async |app: &App, service: &str| {
        let text = app.metrics().await;
        let failed = metric(&text, &format!(r#"circuit_breaker_calls_total{{service="{service}",result="failure"}}"#));
        let retries =
            text.lines().filter(|line| line.starts_with(&format!(r#"retry_attempts_total{{service="{service}""#)));
        let retries: u64 = retries.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum();
        (failed, retries)
    };
    postgres.drop_database().await;
    assert_eq!(gateway.get("/api/events").await.status(), 503);
    assert_eq!(attempts(&catalog, "database").await.1, 3, "one series of retries");
    assert_eq!(attempts(&gateway, "catalog").await.1, 0, "and none above it");
}
