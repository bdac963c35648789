//! What the payment providers do.

use crate::shop::{Seen, Shop};
use e2e::laptop::Port;
use serde_json::json;
use std::time::{Duration, Instant};

const OPENED: &str = r#"circuit_breaker_opened_total{service="stripe"}"#;
const BY_PAYPAL: &str = r#"payments_total{outcome="succeeded",provider="paypal"}"#;
const UNKNOWN: &str = r#"payments_total{outcome="unknown",provider=""}"#;
const FALLBACKS: &str = r#"fallback_duration_seconds_count{service="stripe"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn providers_fail() {
    let mut shop = Shop::open().await;
    nothing_fails(&mut shop).await;
    down(&mut shop).await;
    slow(&mut shop).await;
    flapping(&mut shop).await;
    failing(&mut shop).await;
    charges_then_times_out(&mut shop).await;
    charges_then_times_out_and_hides(&mut shop).await;
    shop.close().await;
}

async fn nothing_fails(shop: &mut Shop) {
    let booked = shop.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    assert_eq!(shop.charged(&booked).await, ["stripe"]);
    let well = shop.until("its mail is there", async || shop.mails().await == 1).await;
    assert_eq!(shop.metric(Port::Payment, OPENED).await + shop.metric(Port::Payment, FALLBACKS).await, 0);
    shop.tell("nothing", "201 Confirmed, and a mail", booked.took, well, "nothing opened, nothing retried");
}

/// A refused connection is certain not to have charged: the second provider at once, and nobody waits.
async fn down(shop: &mut Shop) {
    shop.provider("stripe", json!({"refuse": true})).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..6 {
        let booked = shop.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        assert_eq!(shop.charged(&booked).await, ["paypal"]);
        slowest = slowest.max(booked.took);
    }
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    let (opened, by_paypal) = (shop.metric(Port::Payment, OPENED).await, shop.metric(Port::Payment, BY_PAYPAL).await);
    assert!(opened >= 1 && by_paypal == 6 && shop.metric(Port::Payment, FALLBACKS).await == 6);
    shop.provider("stripe", json!({})).await;
    let well = shop.until_well().await;
    let metrics = format!("stripe opened +{opened}, {by_paypal} payments by paypal");
    shop.tell("provider down", "201 Confirmed, by the other provider", slowest, well, &metrics);
}

/// No answer in time, and it cannot be looked up in time either: pending, until the circuit is open and the second provider
/// is asked at once. In the end each is charged once.
async fn slow(shop: &mut Shop) {
    let before = (shop.metric(Port::Payment, UNKNOWN).await, shop.metric(Port::Payment, OPENED).await);
    shop.provider("stripe", json!({"latencyMs": 10_000})).await;
    let mut seen: Vec<Seen> = Vec::new();
    for _ in 0..6 {
        seen.push(shop.book().await);
    }
    let pending: Vec<&Seen> = seen.iter().filter(|one| one.in_words() == "202 PaymentPending").collect();
    assert!(!pending.is_empty() && pending.len() <= 4, "{:?}", seen.iter().map(Seen::in_words).collect::<Vec<_>>());
    assert!(seen.iter().all(|one| one.in_words() == "202 PaymentPending" || one.in_words() == "201 Confirmed"));
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    let unknown = shop.metric(Port::Payment, UNKNOWN).await - before.0;
    let opened = shop.metric(Port::Payment, OPENED).await - before.1;
    assert!(unknown >= 1 && opened >= 1);
    shop.provider("stripe", json!({})).await;
    let begin = Instant::now();
    for booked in &seen {
        shop.until_confirmed(booked).await;
        assert_eq!(shop.charged(booked).await.len(), 1, "each is charged once");
    }
    shop.until_well().await;
    let sees = format!("{} x 202 PaymentPending, then 201", pending.len());
    let metrics = format!("stripe opened +{opened}, payments unknown +{unknown}");
    shop.tell("provider slow (10 s)", &sees, slowest, begin.elapsed(), &metrics);
}

/// Comes and goes: whatever is seen, each is charged once.
async fn flapping(shop: &mut Shop) {
    let before = shop.metric(Port::Payment, OPENED).await;
    let flap = async {
        for _ in 0..8 {
            shop.provider("stripe", json!({"refuse": true})).await;
            tokio::time::sleep(Duration::from_millis(250)).await;
            shop.provider("stripe", json!({})).await;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    };
    let buy = async {
        let mut seen = Vec::new();
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            seen.push(shop.book().await);
        }
        seen
    };
    let ((), seen) = tokio::join!(flap, buy);
    let begin = Instant::now();
    for booked in &seen {
        assert!(matches!(booked.status, 201 | 202), "{}", booked.in_words());
        shop.until_confirmed(booked).await;
        assert_eq!(shop.charged(booked).await.len(), 1, "each is charged once");
    }
    let opened = shop.metric(Port::Payment, OPENED).await - before;
    assert!(opened >= 1);
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    shop.until_well().await;
    let sees = format!("{} bookings, all Confirmed in the end", seen.len());
    let metrics = format!("stripe opened +{opened}");
    shop.tell("provider flapping", &sees, slowest, begin.elapsed(), &metrics);
}

/// An answer of 503 is retried, and leaves open whether it has charged.
async fn failing(shop: &mut Shop) {
    let retries = r#"retry_attempts_total{service="stripe""#;
    let before = (shop.metrics(Port::Payment, retries).await, shop.metric(Port::Payment, OPENED).await);
    shop.provider("stripe", json!({"failPercent": 100})).await;
    let first = shop.book().await;
    assert_eq!(first.in_words(), "202 PaymentPending");
    // Its three attempts have opened the circuit.
    let second = shop.book().await;
    assert_eq!(second.in_words(), "201 Confirmed");
    assert_eq!(shop.charged(&second).await, ["paypal"]);
    let retried = shop.metrics(Port::Payment, retries).await - before.0;
    let opened = shop.metric(Port::Payment, OPENED).await - before.1;
    assert!(retried >= 2 && opened >= 1, "{retried} {opened}");
    shop.provider("stripe", json!({})).await;
    let begin = Instant::now();
    shop.until_confirmed(&first).await;
    assert_eq!(shop.charged(&first).await.len(), 1);
    shop.until_well().await;
    let metrics = format!("stripe opened +{opened}, retries +{retried}");
    shop.tell("provider answers 503", "1 x 202 PaymentPending, then 201", first.took, begin.elapsed(), &metrics);
}

/// The ADR's own code would charge a second time here.
async fn charges_then_times_out(shop: &mut Shop) {
    shop.provider("stripe", json!({"chargeThenHang": true})).await;
    let booked = shop.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    assert_eq!(shop.charged(&booked).await, ["stripe"], "once, and by nobody else");
    let timeouts = shop.metric(Port::Payment, r#"attempt_timeouts_total{service="stripe"}"#).await;
    assert!(timeouts >= 1);
    shop.provider("stripe", json!({})).await;
    let well = shop.until_well().await;
    let sees = "201 Confirmed, once its charge is found";
    shop.tell("provider charges, then times out", sees, booked.took, well, &format!("stripe timeouts {timeouts}"));
}

async fn charges_then_times_out_and_hides(shop: &mut Shop) {
    let before = shop.metric(Port::Payment, UNKNOWN).await;
    shop.provider("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    let booked = shop.book().await;
    assert_eq!(booked.in_words(), "202 PaymentPending");
    let unknown = shop.metric(Port::Payment, UNKNOWN).await - before;
    assert!(unknown >= 1);
    shop.provider("stripe", json!({})).await;
    let begin = Instant::now();
    shop.until_confirmed(&booked).await;
    assert_eq!(shop.charged(&booked).await, ["stripe"], "once, and by nobody else");
    shop.until_well().await;
    let sees = "202 PaymentPending, Confirmed later";
    shop.tell(
        "... and cannot be asked either",
        sees,
        booked.took,
        begin.elapsed(),
        &format!("payments unknown +{unknown}"),
    );
}
