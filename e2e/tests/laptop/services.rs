//! What the services themselves and the mail server do.

use crate::shop::{NO_EVENTS, Shop};
use e2e::laptop::Port;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const OPENED: &str = r#"circuit_breaker_opened_total{service="catalog"}"#;
const FROM_CACHE: &str = r#"fallback_answers_total{service="catalog",source="cache"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn services_fail() {
    let mut shop = Shop::open().await;
    catalog_down(&mut shop).await;
    catalog_slow(&mut shop).await;
    payment_down(&mut shop).await;
    mail_server_down(&mut shop).await;
    shop.close().await;
}

/// What was shown within five minutes is shown; of what nobody has looked at yet there is the ADR's minimal answer.
async fn catalog_down(shop: &mut Shop) {
    let before = shop.events("").await;
    assert_eq!((before.status, &before.body["isFromCache"]), (200, &json!(false)));
    shop.laptop.kill("catalog").await;
    let (slowest, opened, cached) = without_a_catalog(shop, &before.body).await;
    shop.laptop.restart("catalog").unwrap();
    let begin = Instant::now();
    shop.until("the catalog is there", async || shop.get_if_there(Port::Catalog, "/readyz").await).await;
    // A new process: what the operator told the one before is told again.
    shop.configure("catalog", crate::shop::policy("catalog")).await;
    shop.until_well().await;
    let metrics = format!("catalog opened +{opened}, {cached} answers from cache");
    shop.tell("catalog down", "200 from memory, else the minimal 503", slowest, begin.elapsed(), &metrics);
}

/// The same, but every attempt has to be given up first, until the circuit is open.
async fn catalog_slow(shop: &mut Shop) {
    let before = shop.events("").await;
    assert_eq!((before.status, &before.body["isFromCache"]), (200, &json!(false)));
    shop.laptop.freeze("catalog").unwrap();
    let (slowest, opened, cached) = without_a_catalog(shop, &before.body).await;
    shop.laptop.thaw("catalog").unwrap();
    let well = shop.until_well().await;
    let metrics = format!("catalog opened +{opened}, {cached} answers from cache");
    shop.tell("catalog slow (frozen)", "200 from memory, else the minimal 503", slowest, well, &metrics);
}

/// How long the slowest answer took, how often the circuit opened, and how many answers came from memory.
async fn without_a_catalog(shop: &Shop, before: &Value) -> (Duration, u64, u64) {
    let figures = async || (shop.metric(Port::Gateway, OPENED).await, shop.metric(Port::Gateway, FROM_CACHE).await);
    let begin = figures().await;
    let mut slowest = Duration::ZERO;
    for _ in 0..4 {
        let events = shop.events("").await;
        assert_eq!((events.status, events.header("x-served-from")), (200, Some("cache")));
        assert_eq!(&events.body, before);
        slowest = slowest.max(events.took);
    }
    assert!(slowest < Duration::from_millis(1_500), "{slowest:?}");
    let never_seen = shop.events("?category=opera").await;
    let minimal: Value = serde_json::from_str(NO_EVENTS).unwrap();
    assert_eq!((never_seen.status, &never_seen.body), (503, &minimal));
    assert_eq!(shop.book().await.in_words(), "201 Confirmed", "nobody is kept from booking");
    let end = figures().await;
    let (opened, cached) = (end.0 - begin.0, end.1 - begin.1);
    assert!(opened >= 1 && cached >= 4, "{opened} {cached}");
    (slowest, opened, cached)
}

async fn payment_down(shop: &mut Shop) {
    let pending = r#"bookings_total{outcome="payment_pending"}"#;
    let before = shop.metric(Port::Booking, pending).await;
    shop.laptop.kill("payment").await;
    let booked = shop.book().await;
    assert_eq!((booked.in_words(), &booked.body["success"]), ("202 PaymentPending".to_owned(), &json!(true)));
    let pending = shop.metric(Port::Booking, pending).await - before;
    assert!(pending >= 1);
    shop.laptop.restart("payment").unwrap();
    let begin = Instant::now();
    shop.until("payment is there", async || shop.get_if_there(Port::Payment, "/readyz").await).await;
    shop.configure("payment", crate::shop::policy("payment")).await;
    shop.until_confirmed(&booked).await;
    assert_eq!(shop.charged(&booked).await.len(), 1);
    shop.until_well().await;
    let sees = "202 PaymentPending, Confirmed later";
    shop.tell("payment down", sees, booked.took, begin.elapsed(), &format!("bookings pending +{pending}"));
}

/// A mail that cannot be sent is no reason not to sell; each is sent in the end, once.
async fn mail_server_down(shop: &mut Shop) {
    let opened = r#"circuit_breaker_opened_total{service="smtp"}"#;
    let failures = r#"circuit_breaker_calls_total{service="smtp",result="failure"}"#;
    shop.until("nothing is left to send", async || shop.open_mails().await == 0).await;
    let (before, mails) = (shop.metric(Port::Notification, failures).await, shop.mails().await);
    shop.mail_server(json!({"down": true})).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..6 {
        let booked = shop.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        slowest = slowest.max(booked.took);
    }
    shop.until("the circuit to the mail server opens", async || shop.metric(Port::Notification, opened).await >= 1)
        .await;
    let failed = shop.metric(Port::Notification, failures).await - before;
    assert_eq!(shop.mails().await, mails, "nothing gets out");
    shop.mail_server(json!({})).await;
    let begin = Instant::now();
    shop.until("the mails are there", async || shop.mails().await == mails + 6).await;
    shop.until_well().await;
    let opened = shop.metric(Port::Notification, opened).await;
    let metrics = format!("smtp opened +{opened}, {failed} failed attempts");
    shop.tell("mail server down", "201 Confirmed, the mails come later", slowest, begin.elapsed(), &metrics);
}
