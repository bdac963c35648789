//! What calls over HTTP meet: who asks them to come back, connections that are closed, headers from outside, and large bodies.

use crate::fixture::{Fixture, order, policy};
use contract::RetryOn;
use e2e::local_stack::Port;
use futures::future::join_all;
use reqwest::Client;
use serde_json::{Value, json};
use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

const UNKNOWN: &str = "504 OUTCOME_UNKNOWN";

#[tokio::test(flavor = "multi_thread")]
async fn calls_meet_what_they_may() {
    let mut fixture = Fixture::start().await;
    asks_to_come_back(&mut fixture).await;
    booking_frozen(&mut fixture).await;
    large_bodies(&mut fixture).await;
    connections_close(&mut fixture).await;
    fixture.finish().await;
}

/// Half of what the provider is asked for gets a 503 with `Retry-After`, which the policy waits for.
async fn asks_to_come_back(fixture: &mut Fixture) {
    let (opened, retries) =
        (r#"circuit_breaker_opened_total{service="stripe"}"#, r#"retry_attempts_total{service="stripe""#);
    let figures = async || (fixture.metric(Port::Payment, opened).await, fixture.metrics(Port::Payment, retries).await);
    let mut patient = policy("payment");
    let stripe = patient.dependencies.get_mut("stripe").unwrap();
    stripe.retry.retry_on = [RetryOn::RateLimited].into();
    stripe.retry.num_retries = 4;
    stripe.timeout.request_ms = 10_000;
    // Of the whole sale as of the provider.
    let mut booking = policy("booking");
    booking.dependencies.get_mut("payment").unwrap().timeout.request_ms = 15_000;
    booking.dependencies.get_mut("payment").unwrap().timeout.per_try_ms = 15_000;
    fixture.configure("payment", patient).await;
    fixture.configure("booking", booking).await;
    let before = figures().await;
    fixture.provider("stripe", json!({"failPercent": 50, "failRetryAfter": 1})).await;
    let seen = join_all((0..4).map(|_| fixture.book())).await;
    fixture.provider("stripe", json!({})).await;
    for booked in &seen {
        assert_eq!(booked.in_words(), "201 Confirmed");
        assert_eq!(fixture.charged(booked).await, ["stripe"], "nobody else was asked");
    }
    let after = figures().await;
    let (opened, retried) = (after.0 - before.0, after.1 - before.1);
    assert!(opened == 0 && retried >= 4, "{opened} {retried}");
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    assert!(slowest >= Duration::from_secs(1), "it has waited: {slowest:?}");
    for service in ["payment", "booking"] {
        fixture.configure(service, policy(service)).await;
    }
    let well = fixture.until_well().await;
    let metrics = format!("stripe opened +0, retries +{retried}");
    fixture.record(
        "provider: 503 with Retry-After, half of it",
        "201 Confirmed, a second later",
        slowest,
        well,
        &metrics,
    );
}

/// Sends an order with this key, and whatever a caller inside could say of it: less time than the gateway has.
async fn from_a_phone(fixture: &Fixture, client: &Client, key: &str) -> (String, Duration) {
    let mut wanted = order();
    wanted["idempotencyKey"] = json!(key);
    let request = client.post(fixture.stack.url(Port::Gateway) + "/api/bookings").body(wanted.to_string());
    let request = ["x-deadline-ms", "x-retried", "x-refused", "x-deadline-passed"]
        .into_iter()
        .fold(request.bearer_auth(fixture.stack.buyers().token(key)), |request, name| request.header(name, "300"));
    let begin = Instant::now();
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    let word = ["status", "errorCode"].iter().find_map(|name| body[name].as_str()).unwrap_or_default();
    (format!("{status} {word}"), begin.elapsed())
}

/// Booking hangs. What phones say of deadlines does not keep the circuit from opening; when its break is over, and every
/// connection has been idle for as long as one is kept, sales resume at once.
async fn booking_frozen(fixture: &mut Fixture) {
    const BREAK: Duration = Duration::from_secs(5);
    let opened = r#"circuit_breaker_opened_total{service="booking"}"#;
    let mut quick = policy("gateway");
    let booking = quick.dependencies.get_mut("booking").unwrap();
    (booking.timeout.request_ms, booking.timeout.per_try_ms) = (500, 500);
    booking.circuit_breaker.break_ms = 5_000;
    fixture.configure("gateway", quick).await;
    fixture.until_well().await;
    let client = Client::builder().pool_max_idle_per_host(0).build().unwrap();
    let before = fixture.metric(Port::Gateway, opened).await;
    fixture.stack.freeze("booking").unwrap();
    let (mut keys, mut slowest) = (Vec::new(), Duration::ZERO);
    while fixture.metric(Port::Gateway, opened).await == before {
        assert!(keys.len() < 10, "the circuit stays closed");
        let key = format!("frozen-{}", keys.len());
        let (answer, took) = from_a_phone(fixture, &client, &key).await;
        assert_eq!(answer, UNKNOWN);
        assert!(took > Duration::from_millis(450), "what a phone says of time is believed: {took:?}");
        slowest = slowest.max(took);
        keys.push(key);
    }
    let opened_at = Instant::now();
    let refused = fixture.book().await;
    assert_eq!(refused.in_words(), "503 BOOKING_UNAVAILABLE");
    assert!(refused.header("retry-after").is_some() && refused.took < Duration::from_millis(400), "{:?}", refused.took);
    fixture.stack.thaw("booking").unwrap();
    fixture.until("sales resume", async || fixture.book().await.in_words() == "201 Confirmed").await;
    let resumed = opened_at.elapsed();
    assert!(resumed + Duration::from_millis(500) > BREAK && resumed < BREAK + Duration::from_secs(2), "{resumed:?}");
    for key in &keys {
        let is_confirmed = async || from_a_phone(fixture, &client, key).await.0 == "201 Confirmed";
        fixture.until("the same key is confirmed", is_confirmed).await;
    }
    let booked = "SELECT count(*) FROM bookings WHERE idempotency_key LIKE '%frozen-%'";
    let booked: i64 = fixture.stack.connect().await.unwrap().query_one(booked, &[]).await.unwrap().get(0);
    assert_eq!(usize::try_from(booked).unwrap(), keys.len(), "each once");
    fixture.configure("gateway", policy("gateway")).await;
    fixture.until_well().await;
    let sees = format!("{} x {UNKNOWN}, then 503 at once", keys.len());
    let metrics =
        format!("booking opened +1, sales resume {} ms after (break {} s)", resumed.as_millis(), BREAK.as_secs());
    fixture.record("booking frozen, phones send x-deadline-ms", &sees, slowest, resumed, &metrics);
}

/// More of large bodies arrives than the process has room for: who is small is served.
async fn large_bodies(fixture: &mut Fixture) {
    const BODIES: u16 = 290;
    const NETWORKS: u8 = 3;
    let gateway = SocketAddr::from((Ipv4Addr::LOCALHOST, fixture.stack.port(Port::Gateway)));
    let head = "POST /api/bookings HTTP/1.1\r\nhost: x\r\ncontent-length: 65536\r\n\r\n";
    let used = async || fixture.check(Port::Gateway, "memory").await.data["usedBytes"].as_u64().unwrap() >> 20;
    let before = used().await;
    // All but the last of it.
    let part = format!("{head}{}", " ".repeat(65_500));
    let arriving = join_all((0..NETWORKS).flat_map(|network| (0..BODIES).map(move |_| network)).map(|network| {
        let part = &part;
        async move {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind((Ipv4Addr::new(127, 0, 0, 2 + network), 0).into()).unwrap();
            let mut stream = socket.connect(gateway).await.unwrap();
            // One that is refused is closed before it has sent all.
            let _ = stream.write_all(part.as_bytes()).await;
            stream
        }
    }))
    .await;
    let mut large = order();
    large["userId"] = json!("x".repeat(60_000));
    let refused = "503 TOO_MANY_REQUESTS_UNDER_WAY";
    let told = Cell::new(None);
    fixture
        .until("there is no room", async || {
            let seen = fixture.post("/api/bookings", &large).await;
            let is_refused = seen.in_words() == refused;
            told.set(seen.header("retry-after").map(str::to_owned));
            is_refused
        })
        .await;
    assert_eq!(told.take().as_deref(), Some("1"), "when to come back");
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        slowest = slowest.max(booked.took);
    }
    let used = used().await;
    // The chart gives it 128 MiB, of which it has 12 before.
    assert!(used < before + 110, "{before} MiB before, then {used} MiB");
    drop(arriving);
    let well = fixture.until_well().await;
    let what = format!("{} bodies of 64 KiB at once", BODIES * u16::from(NETWORKS));
    let sees = format!("201 Confirmed; large ones: {refused}");
    fixture.record(&what, &sees, slowest, well, &format!("the gateway has {} MiB more", used.saturating_sub(before)));
}

/// Each order comes as its connection has been idle for as long as the gateway keeps it, give or take a moment. One that meets
/// the end is told so at once, and comes again.
async fn connections_close(fixture: &mut Fixture) {
    const BUYERS: u32 = 60;
    const ROUNDS: u32 = 3;
    // Before the 6 s are over for which the gateway keeps a connection, for the first of them.
    const ALMOST: Duration = Duration::from_millis(5_940);
    // Longer than the gateway waits for booking: what it has taken it answers sooner.
    const PATIENCE: Duration = Duration::from_secs(40);
    fixture.restart_with("gateway", &[("IDLE_TIMEOUT_SECONDS", Some("6"))]).await;
    fixture.configure("gateway", policy("gateway")).await;
    fixture.until_well().await;
    let url = fixture.stack.url(Port::Gateway) + "/api/bookings";
    let again = Cell::new(0);
    let buy = async |nth: u32| {
        let client = Client::builder().pool_idle_timeout(None).timeout(PATIENCE).build().unwrap();
        let mut slowest = Duration::ZERO;
        for round in 0..ROUNDS {
            let mut wanted = order();
            let key = format!("idle-{nth}-{round}");
            wanted["idempotencyKey"] = json!(key);
            let (mut tries, begin) = (0, Instant::now());
            let answer = loop {
                let request = client.post(&url).bearer_auth(fixture.stack.buyers().token(&key));
                tries += 1;
                let sent = Instant::now();
                match request.body(wanted.to_string()).send().await {
                    Ok(answer) => break answer,
                    Err(error) => {
                        let told = sent.elapsed();
                        assert!(tries < 3 && told < Duration::from_secs(2), "{key}, after {told:?}: {error:?}");
                    }
                }
            };
            let status = answer.status().as_u16();
            let text = answer.text().await.unwrap();
            // On a slow machine, its payment may be found out later.
            assert!(status == 201 || status == 202, "{key}, after {:?}: {status} {text}", begin.elapsed());
            again.set(again.get() + tries - 1);
            slowest = slowest.max(begin.elapsed());
            if round + 1 < ROUNDS {
                tokio::time::sleep(ALMOST + Duration::from_millis(2) * nth).await;
            }
        }
        slowest
    };
    let slowest = join_all((0..BUYERS).map(buy)).await.into_iter().max().unwrap();
    let booked = "SELECT count(*) FROM bookings WHERE idempotency_key LIKE '%idle-%' AND status = 'Confirmed'";
    let all = i64::from(BUYERS * ROUNDS);
    fixture
        .until("each is booked once", async || {
            let booked: i64 = fixture.stack.connect().await.unwrap().query_one(booked, &[]).await.unwrap().get(0);
            assert!(booked <= all, "{booked} of {all}");
            booked == all
        })
        .await;
    let well = fixture.until_well().await;
    let sees = format!("{all} x 201 Confirmed, {} sent again", again.get());
    fixture.record("orders as their connections are closed", &sees, slowest, well, "nothing swallowed, nothing opened");
}
