//! Too many buyers, and too little memory.

use crate::fixture::{Fixture, critical, degradation, order, policy};
use contract::{BulkheadSettings, CheckStatus, FlagsSettings};
use e2e::local_stack::Port;
use futures::future::join_all;
use serde_json::json;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const TOO_MANY: &str = "503 TOO_MANY_BOOKINGS";

#[tokio::test(flavor = "multi_thread")]
async fn load_and_memory_are_too_high() {
    let mut fixture = Fixture::start().await;
    memory_over_the_limit(&mut fixture).await;
    load_over_80_percent(&mut fixture).await;
    the_smaller_limit_wins(&mut fixture).await;
    who_confirms_goes_before_who_polls(&mut fixture).await;
    who_orders_is_held_back(&mut fixture).await;
    fixture.finish().await;
}

/// The limit falls below what the process has: it says so, and goes on selling.
async fn memory_over_the_limit(fixture: &mut Fixture) {
    let failures = r#"health_check_failures_total{check_name="memory"}"#;
    let mut little = policy("booking");
    little.health_checks.get_mut("memory").unwrap().memory_max_bytes = Some(1 << 20);
    fixture.configure("booking", little).await;
    let is = async |status| fixture.check(Port::Booking, "memory").await.status == status;
    let noticed = fixture.until("the check is degraded", async || is(CheckStatus::Degraded).await).await;
    let report = fixture.health(Port::Booking).await;
    assert_eq!(report.status, CheckStatus::Degraded, "degraded, not unhealthy: nothing is restarted for it");
    assert!(report.checks["memory"].data["usedBytes"].as_u64().unwrap() > 1 << 20);
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    let failed = fixture.metric(Port::Booking, failures).await;
    assert!(failed >= 1);
    fixture.configure("booking", policy("booking")).await;
    let well = fixture.until_well().await;
    let metrics = format!("memory check failed {failed} times, seen after {} ms", noticed.as_millis());
    fixture.record("memory over the limit", "201 Confirmed", booked.took, well, &metrics);
}

/// Buyers come back until they have a seat. From 80 % on, payment is asked later, so that places come free; more than the
/// limit are asked to try again.
async fn load_over_80_percent(fixture: &mut Fixture) {
    let degraded = r#"degraded_mode_active{service="booking"}"#;
    let flags = json!({"flags": {"MaxConcurrentBookings": {
        "state": "ENABLED", "variants": {"low": 5}, "defaultVariant": "low"}}});
    let flags: FlagsSettings = serde_json::from_value(flags).unwrap();
    let mut busy = policy("booking");
    busy.degradation = Some(degradation());
    fixture.configure_all("booking", busy, flags).await;
    // Slow enough to fill all places, and within its time.
    fixture.provider("stripe", json!({"latencyMs": 200})).await;
    let until = Instant::now() + Duration::from_secs(3);
    let buyers = join_all((0..12).map(|_| {
        let fixture = &*fixture;
        async move {
            let mut seen = Vec::new();
            while Instant::now() < until {
                seen.push(fixture.book().await);
                // Like a buyer who was asked to try again in a moment.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            seen
        }
    }));
    let watch = fixture.until("it is degraded", async || fixture.metric(Port::Booking, degraded).await == 1);
    let (seen, noticed) = tokio::join!(buyers, watch);
    fixture.provider("stripe", json!({})).await;
    let begin = Instant::now();
    let mut answers: BTreeMap<String, usize> = BTreeMap::new();
    for booked in seen.iter().flatten() {
        *answers.entry(booked.in_words()).or_default() += 1;
        if booked.in_words() == TOO_MANY {
            let limit = &booked.body["limit"];
            assert_eq!((limit, booked.header("retry-after")), (&json!("MaxConcurrentBookings"), Some("1")));
        }
    }
    // Who loses against the others four times in a row is asked to try again, too.
    let expected = ["201 Confirmed", "202 PaymentPending", TOO_MANY, "503 BOOKING_FAILED", "503 GAVE_WAY"];
    assert!(answers.keys().all(|answer| expected.contains(&answer.as_str())), "{answers:?}");
    assert!(expected[..3].iter().all(|answer| answers.contains_key(*answer)), "{answers:?}");
    for booked in seen.iter().flatten().filter(|booked| booked.status == 202) {
        fixture.until_confirmed(booked).await;
    }
    fixture.until_well().await;
    assert_eq!(fixture.metric(Port::Booking, degraded).await, 0);
    let limited = fixture.metric(Port::Booking, r#"bookings_total{outcome="limited"}"#).await;
    let slowest = seen.iter().flatten().map(|one| one.took).max().unwrap();
    let count = |answer: &str| answers.get(answer).copied().unwrap_or(0);
    let sees =
        format!("{} x 201, {} x 202, {} x 503", count("201 Confirmed"), count("202 PaymentPending"), count(TOO_MANY));
    let metrics = format!("degraded_mode_active 1 after {} ms, {limited} limited", noticed.as_millis());
    fixture.record("load over 80 %", &sees, slowest, begin.elapsed(), &metrics);
}

/// A bulkhead that is smaller than the flag: the answer names it.
async fn the_smaller_limit_wins(fixture: &mut Fixture) {
    let rejected = r#"bulkhead_rejected_total{bulkhead="critical",reason="full"}"#;
    let mut small = policy("booking");
    small.bulkheads.extend([critical(1, 0)]);
    fixture.configure("booking", small).await;
    let seen = join_all((0..40).map(|_| fixture.book())).await;
    let refused: Vec<_> = seen.iter().filter(|booked| booked.status == 503).collect();
    assert!(!refused.is_empty());
    for booked in &refused {
        assert_eq!((booked.in_words().as_str(), &booked.body["limit"]), ("503 TOO_MANY_BOOKINGS", &json!("critical")));
    }
    let rejected = fixture.metric(Port::Booking, rejected).await;
    assert!(rejected >= 1);
    fixture.configure("booking", policy("booking")).await;
    let begin = Instant::now();
    for booked in seen.iter().filter(|booked| booked.status == 202) {
        fixture.until_confirmed(booked).await;
    }
    fixture.until_well().await;
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let sees = format!("{} taken, {} x 503 that names it", seen.len() - refused.len(), refused.len());
    fixture.record(
        "bulkhead of 1, 40 buyers",
        &sees,
        slowest,
        begin.elapsed(),
        &format!("critical rejected {rejected}"),
    );
}

/// More buyers ask how their order stands than booking may ask its database at once, and than may wait: some of them are
/// refused, and none of those who confirm.
async fn who_confirms_goes_before_who_polls(fixture: &mut Fixture) {
    let refused = |priority: &str| format!("bulkhead_shed_total{{bulkhead=\"critical\",priority=\"{priority}\"}}");
    let (looks, finishes) = (refused("look"), refused("finish"));
    let before = fixture.metric(Port::Booking, &finishes).await;
    let mut held = Vec::new();
    for _ in 0..12 {
        let reserved = fixture.post("/api/reservations", &order()).await;
        assert_eq!(reserved.in_words(), "201 Held");
        held.push(reserved.body["bookingId"].as_str().unwrap().to_owned());
    }
    let mut small = policy("booking");
    // Of a busy machine, nobody is refused for the time alone.
    let (name, critical) = critical(2, 4);
    small.bulkheads.insert(name, BulkheadSettings { max_wait_ms: 10_000, ..critical });
    fixture.configure("booking", small).await;
    let polled = fixture.metric(Port::Booking, &looks).await;
    let over = Cell::new(false);
    let poll = async |id: &String| {
        let mut seen = Vec::new();
        while !over.get() {
            let look = fixture.get(Port::Gateway, &format!("/api/bookings/{id}")).await;
            if look.status != 200 {
                // Less patient than it is asked to be.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            seen.push(look);
        }
        seen
    };
    let pollers = join_all((0..40).map(|index| poll(&held[index % held.len()])));
    let confirm = async {
        fixture.until("who polls is refused", async || fixture.metric(Port::Booking, &looks).await > polled + 20).await;
        let mut slowest = Duration::ZERO;
        for rush in held.chunks(4) {
            let confirm = async |id| fixture.post(&format!("/api/reservations/{id}/confirm"), &json!({})).await;
            for confirmed in join_all(rush.iter().map(confirm)).await {
                assert_eq!(confirmed.in_words(), "201 Confirmed");
                slowest = slowest.max(confirmed.took);
            }
        }
        over.set(true);
        slowest
    };
    let (seen, slowest) = tokio::join!(pollers, confirm);
    let codes: BTreeMap<String, usize> =
        seen.iter().flatten().filter(|look| look.status != 200).fold(BTreeMap::new(), |mut codes, look| {
            *codes.entry(look.in_words()).or_default() += 1;
            codes
        });
    let expected = ["503 TOO_MANY_REQUESTS_UNDER_WAY", "503 GAVE_WAY"];
    assert!(codes.keys().all(|code| expected.contains(&code.as_str())), "{codes:?}");
    assert_eq!(fixture.metric(Port::Booking, &finishes).await, before);
    fixture.configure("booking", policy("booking")).await;
    let well = fixture.until_well().await;
    let shed = fixture.metric(Port::Booking, &looks).await - polled;
    let sees = "12 x 201 Confirmed; who polls: 503";
    fixture.record("40 buyers poll, 12 confirm", sees, slowest, well, &format!("shed of look +{shed}, of finish +0"));
}

/// More buyers order at once than the machine has room for: as soon as one has bought, the gateway lets fewer of them in, and those
/// who buy what they have kept are not refused. Who orders still gets seats.
async fn who_orders_is_held_back(fixture: &mut Fixture) {
    let limit = r#"bulkhead_limit{bulkhead="booking",priority="start"}"#;
    let mut held = Vec::new();
    for _ in 0..12 {
        let reserved = fixture.post("/api/reservations", &order()).await;
        assert_eq!(reserved.in_words(), "201 Held");
        held.push(reserved.body["bookingId"].as_str().unwrap().to_owned());
    }
    let confirm = async |id: &String| {
        let confirmed = fixture.post(&format!("/api/reservations/{id}/confirm"), &json!({})).await;
        assert_eq!(confirmed.in_words(), "201 Confirmed");
        confirmed.took
    };
    let over = Cell::new(false);
    let crowd = join_all((0..60).map(|_| async {
        let mut sold = 0;
        while !over.get() {
            let booked = fixture.book().await;
            if booked.status < 300 {
                sold += 1;
            } else {
                assert_eq!(booked.status, 503, "{}", booked.in_words());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        sold
    }));
    let finish = async {
        let mut slowest = confirm(&held[0]).await;
        fixture.until("who orders is held back", async || fixture.metric(Port::Gateway, limit).await <= 30).await;
        for id in &held[1..] {
            slowest = slowest.max(confirm(id).await);
        }
        let least = fixture.metric(Port::Gateway, limit).await;
        over.set(true);
        (slowest, least)
    };
    let (sold, (slowest, least)) = tokio::join!(crowd, finish);
    let sold: usize = sold.into_iter().sum();
    assert!(sold > 0, "the sale goes on");
    let well = fixture.until_well().await;
    let metrics = format!("bulkhead_limit of start {least} of 75, {sold} orders meanwhile");
    fixture.record("60 buyers order, 12 confirm", "12 x 201 Confirmed; who orders waits", slowest, well, &metrics);
}
