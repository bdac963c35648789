//! What the services themselves and the mail server do.

use crate::fixture::{Fixture, NO_EVENTS};
use e2e::local_stack::Port;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const OPENED: &str = r#"circuit_breaker_opened_total{service="catalog"}"#;
const FROM_CACHE: &str = r#"fallback_answers_total{service="catalog",source="cache"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn services_fail() {
    let mut fixture = Fixture::start().await;
    catalog_down(&mut fixture).await;
    catalog_slow(&mut fixture).await;
    payment_down(&mut fixture).await;
    mail_server_down(&mut fixture).await;
    ticket_forged(&mut fixture).await;
    crate::tickets::key_missing_and_replaced(&mut fixture).await;
    fixture.finish().await;
}

/// What was shown within five minutes is shown; of what nobody has looked at yet there is the ADR's minimal answer.
async fn catalog_down(fixture: &mut Fixture) {
    let before = fixture.events("").await;
    assert_eq!((before.status, &before.body["isFromCache"]), (200, &json!(false)));
    fixture.stack.kill("catalog").await;
    let (slowest, opened, cached) = without_a_catalog(fixture, &before.body).await;
    fixture.stack.restart("catalog").unwrap();
    let begin = Instant::now();
    fixture.until("the catalog is there", async || fixture.get_if_there(Port::Catalog, "/readyz").await).await;
    // A new process starts with the built-in values, so it is configured again.
    fixture.configure("catalog", crate::fixture::policy("catalog")).await;
    fixture.until_well().await;
    let metrics = format!("catalog opened +{opened}, {cached} answers from cache");
    fixture.record("catalog down", "200 from memory, else the minimal 503", slowest, begin.elapsed(), &metrics);
}

/// The same, but every attempt has to be given up first, until the circuit is open.
async fn catalog_slow(fixture: &mut Fixture) {
    let before = fixture.events("").await;
    assert_eq!((before.status, &before.body["isFromCache"]), (200, &json!(false)));
    fixture.stack.freeze("catalog").unwrap();
    let (slowest, opened, cached) = without_a_catalog(fixture, &before.body).await;
    fixture.stack.thaw("catalog").unwrap();
    let well = fixture.until_well().await;
    let metrics = format!("catalog opened +{opened}, {cached} answers from cache");
    fixture.record("catalog slow (frozen)", "200 from memory, else the minimal 503", slowest, well, &metrics);
}

/// How long the slowest answer took, how often the circuit opened, and how many answers came from memory.
async fn without_a_catalog(fixture: &Fixture, before: &Value) -> (Duration, u64, u64) {
    let figures =
        async || (fixture.metric(Port::Gateway, OPENED).await, fixture.metric(Port::Gateway, FROM_CACHE).await);
    let begin = figures().await;
    let mut slowest = Duration::ZERO;
    for _ in 0..4 {
        let events = fixture.events("").await;
        assert_eq!((events.status, events.header("x-served-from")), (200, Some("cache")));
        assert_eq!(&events.body, before);
        slowest = slowest.max(events.took);
    }
    assert!(slowest < Duration::from_millis(1_500), "{slowest:?}");
    let never_seen = fixture.events("?category=opera").await;
    let minimal: Value = serde_json::from_str(NO_EVENTS).unwrap();
    assert_eq!((never_seen.status, &never_seen.body), (503, &minimal));
    assert_eq!(fixture.book().await.in_words(), "201 Confirmed", "nobody is kept from booking");
    let end = figures().await;
    let (opened, cached) = (end.0 - begin.0, end.1 - begin.1);
    assert!(opened >= 1 && cached >= 4, "{opened} {cached}");
    (slowest, opened, cached)
}

async fn payment_down(fixture: &mut Fixture) {
    let pending = r#"bookings_total{outcome="payment_pending"}"#;
    let before = fixture.metric(Port::Booking, pending).await;
    fixture.stack.kill("payment").await;
    let booked = fixture.book().await;
    assert_eq!((booked.in_words(), &booked.body["success"]), ("202 PaymentPending".to_owned(), &json!(true)));
    let pending = fixture.metric(Port::Booking, pending).await - before;
    assert!(pending >= 1);
    fixture.stack.restart("payment").unwrap();
    let begin = Instant::now();
    fixture.until("payment is there", async || fixture.get_if_there(Port::Payment, "/readyz").await).await;
    fixture.configure("payment", crate::fixture::policy("payment")).await;
    fixture.until_confirmed(&booked).await;
    assert_eq!(fixture.charged(&booked).await.len(), 1);
    fixture.until_well().await;
    let sees = "202 PaymentPending, Confirmed later";
    fixture.record("payment down", sees, booked.took, begin.elapsed(), &format!("bookings pending +{pending}"));
}

/// A mail that cannot be sent is no reason not to sell; each is sent in the end, once.
async fn mail_server_down(fixture: &mut Fixture) {
    let paused = "notification_pauses_total";
    let failures = r#"circuit_breaker_calls_total{service="smtp",result="failure"}"#;
    fixture.until("nothing is left to send", async || fixture.open_mails().await == 0).await;
    let (before, mails) = (fixture.metric(Port::Notification, failures).await, fixture.mails().await);
    fixture.mail_server(json!({"down": true})).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..6 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        slowest = slowest.max(booked.took);
    }
    fixture
        .until("sending is paused", async || fixture.metric(Port::Notification, "notification_paused").await == 1)
        .await;
    let failed = fixture.metric(Port::Notification, failures).await - before;
    assert_eq!(fixture.mails().await, mails, "nothing gets out");
    fixture.mail_server(json!({})).await;
    let begin = Instant::now();
    fixture.until("the mails are there", async || fixture.mails().await == mails + 6).await;
    fixture.until_well().await;
    let paused = fixture.metric(Port::Notification, paused).await;
    let metrics = format!("sending paused {paused} time(s), {failed} failed attempts");
    fixture.record("mail server down", "201 Confirmed, the mails come later", slowest, begin.elapsed(), &metrics);
}

/// A code in the right form that nobody of ours has signed.
async fn ticket_forged(fixture: &mut Fixture) {
    let forged =
        format!("/api/tickets/TW1.NHUPmL1Z_PwAAAAAAAAAAAAAAAAAAAAzAAAAAAAAAAAAAAAAAAAAEQIE.{}", "A".repeat(86));
    let asked = fixture.get(Port::Gateway, &forged).await;
    assert_eq!((asked.status, &asked.body["valid"], &asked.body["reason"]), (200, &json!(false), &json!("UnknownKey")));
    assert_eq!(fixture.get(Port::Gateway, "/api/tickets/nonsense").await.status, 404);
    let well = fixture.until_well().await;
    fixture.record("ticket forged", "200, not valid: UnknownKey", asked.took, well, "nothing opened");
}
