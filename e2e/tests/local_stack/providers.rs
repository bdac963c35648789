//! What the payment providers do.

use crate::fixture::{Fixture, Seen};
use e2e::local_stack::Port;
use serde_json::json;
use std::time::{Duration, Instant};

const OPENED: &str = r#"circuit_breaker_opened_total{service="stripe"}"#;
const BY_PAYPAL: &str = r#"payments_total{outcome="succeeded",provider="paypal"}"#;
const UNKNOWN: &str = r#"payments_total{outcome="unknown",provider=""}"#;
const FALLBACKS: &str = r#"fallback_duration_seconds_count{service="stripe"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn providers_fail() {
    let mut fixture = Fixture::start().await;
    nothing_fails(&mut fixture).await;
    down(&mut fixture).await;
    slow(&mut fixture).await;
    flapping(&mut fixture).await;
    failing(&mut fixture).await;
    charges_then_times_out(&mut fixture).await;
    charges_then_times_out_and_hides(&mut fixture).await;
    declined_later(&mut fixture).await;
    fixture.finish().await;
}

async fn nothing_fails(fixture: &mut Fixture) {
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    assert_eq!(fixture.charged(&booked).await, ["stripe"]);
    let well = fixture.until("its mail is there", async || fixture.mails().await == 1).await;
    assert_eq!(fixture.metric(Port::Payment, OPENED).await + fixture.metric(Port::Payment, FALLBACKS).await, 0);
    fixture.record("nothing", "201 Confirmed, and a mail", booked.took, well, "nothing opened, nothing retried");
}

/// A refused connection is certain not to have charged: the second provider at once, and nobody waits.
async fn down(fixture: &mut Fixture) {
    fixture.provider("stripe", json!({"refuse": true})).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..6 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        assert_eq!(fixture.charged(&booked).await, ["paypal"]);
        slowest = slowest.max(booked.took);
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let (opened, by_paypal) =
        (fixture.metric(Port::Payment, OPENED).await, fixture.metric(Port::Payment, BY_PAYPAL).await);
    assert!(opened >= 1 && by_paypal == 6 && fixture.metric(Port::Payment, FALLBACKS).await == 6);
    fixture.provider("stripe", json!({})).await;
    let well = fixture.until_well().await;
    let metrics = format!("stripe opened +{opened}, {by_paypal} payments by paypal");
    fixture.record("provider down", "201 Confirmed, by the other provider", slowest, well, &metrics);
}

/// No object is made in time, so nothing can be charged: the second provider at once.
async fn slow(fixture: &mut Fixture) {
    let before = fixture.metric(Port::Payment, OPENED).await;
    fixture.provider("stripe", json!({"latencyMs": 10_000})).await;
    let mut seen: Vec<Seen> = Vec::new();
    for _ in 0..6 {
        seen.push(fixture.book().await);
    }
    for booked in &seen {
        assert_eq!(booked.in_words(), "201 Confirmed");
        assert_eq!(fixture.charged(booked).await, ["paypal"]);
    }
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    let opened = fixture.metric(Port::Payment, OPENED).await - before;
    assert!(opened >= 1);
    fixture.provider("stripe", json!({})).await;
    let well = fixture.until_well().await;
    let metrics = format!("stripe opened +{opened}");
    fixture.record("provider slow (10 s)", "201 Confirmed, by the other provider", slowest, well, &metrics);
}

/// It comes and goes: whatever the buyer sees, each booking is charged once.
async fn flapping(fixture: &mut Fixture) {
    let before = fixture.metric(Port::Payment, OPENED).await;
    let flap = async {
        for _ in 0..8 {
            fixture.provider("stripe", json!({"refuse": true})).await;
            tokio::time::sleep(Duration::from_millis(250)).await;
            fixture.provider("stripe", json!({})).await;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    };
    let buy = async {
        let mut seen = Vec::new();
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            seen.push(fixture.book().await);
        }
        seen
    };
    let ((), seen) = tokio::join!(flap, buy);
    let begin = Instant::now();
    for booked in &seen {
        assert!(matches!(booked.status, 201 | 202), "{}", booked.in_words());
        fixture.until_confirmed(booked).await;
        assert_eq!(fixture.charged(booked).await.len(), 1, "each is charged once");
    }
    let opened = fixture.metric(Port::Payment, OPENED).await - before;
    assert!(opened >= 1);
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    fixture.until_well().await;
    let sees = format!("{} bookings, all Confirmed in the end", seen.len());
    let metrics = format!("stripe opened +{opened}");
    fixture.record("provider flapping", &sees, slowest, begin.elapsed(), &metrics);
}

/// An answer of 503 is retried; before anything can be charged it is no doubt.
async fn failing(fixture: &mut Fixture) {
    let retries = r#"retry_attempts_total{service="stripe""#;
    let before = (fixture.metrics(Port::Payment, retries).await, fixture.metric(Port::Payment, OPENED).await);
    fixture.provider("stripe", json!({"failPercent": 100})).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..2 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        assert_eq!(fixture.charged(&booked).await, ["paypal"]);
        slowest = slowest.max(booked.took);
    }
    let retried = fixture.metrics(Port::Payment, retries).await - before.0;
    let opened = fixture.metric(Port::Payment, OPENED).await - before.1;
    assert!(retried >= 2 && opened >= 1, "{retried} {opened}");
    fixture.provider("stripe", json!({})).await;
    let well = fixture.until_well().await;
    let metrics = format!("stripe opened +{opened}, retries +{retried}");
    fixture.record("provider answers 503", "201 Confirmed, by the other provider", slowest, well, &metrics);
}

/// The ADR's own code would charge a second time here.
async fn charges_then_times_out(fixture: &mut Fixture) {
    fixture.provider("stripe", json!({"chargeThenHang": true})).await;
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    assert_eq!(fixture.charged(&booked).await, ["stripe"], "once, and by nobody else");
    let timeouts = fixture.metric(Port::Payment, r#"attempt_timeouts_total{service="stripe"}"#).await;
    assert!(timeouts >= 1);
    fixture.provider("stripe", json!({})).await;
    let well = fixture.until_well().await;
    let sees = "201 Confirmed, once its charge is found";
    fixture.record("provider charges, then times out", sees, booked.took, well, &format!("stripe timeouts {timeouts}"));
}

async fn charges_then_times_out_and_hides(fixture: &mut Fixture) {
    let before = fixture.metric(Port::Payment, UNKNOWN).await;
    fixture.provider("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "202 PaymentPending");
    let unknown = fixture.metric(Port::Payment, UNKNOWN).await - before;
    assert!(unknown >= 1);
    fixture.provider("stripe", json!({})).await;
    let begin = Instant::now();
    fixture.until_confirmed(&booked).await;
    assert_eq!(fixture.charged(&booked).await, ["stripe"], "once, and by nobody else");
    fixture.until_well().await;
    let sees = "202 PaymentPending, Confirmed later";
    fixture.record(
        "... and cannot be asked either",
        sees,
        booked.took,
        begin.elapsed(),
        &format!("payments unknown +{unknown}"),
    );
}

/// Who was told to wait is told how it ended, by mail and by the API.
async fn declined_later(fixture: &mut Fixture) {
    for provider in ["stripe", "paypal"] {
        fixture.provider(provider, json!({"refuse": true})).await;
    }
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "202 PaymentPending");
    for provider in ["stripe", "paypal"] {
        fixture.provider(provider, json!({"decline": true})).await;
    }
    let path = format!("/api/bookings/{}", booked.body["bookingId"].as_str().unwrap());
    fixture
        .until("it is declined", async || fixture.get(Port::Gateway, &path).await.body["cancelReason"] == "declined")
        .await;
    let told = fixture.get(Port::Gateway, &path).await;
    assert!(told.body["message"].as_str().unwrap().starts_with("The payment was declined"), "{}", told.body);
    let id = format!("<{}.BookingCancelled@ticketwave>", booked.body["bookingId"].as_str().unwrap());
    fixture
        .until("the mail says so", async || {
            let mails = fixture.get(Port::Mails, "/mails").await.body;
            mails["mails"].as_array().unwrap().iter().any(|mail| mail["messageId"] == id.as_str())
        })
        .await;
    for provider in ["stripe", "paypal"] {
        fixture.provider(provider, json!({})).await;
    }
    let well = fixture.until_well().await;
    let sees = "202 PaymentPending, then Cancelled: a mail and `cancelReason`";
    fixture.record("both providers away, then it is declined", sees, booked.took, well, "notifications sent +2");
}
