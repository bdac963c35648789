//! The five flags of ADR-007 §5, each turned off and on again under a sale: what it does, and that nothing is lost by it.

use crate::fixture::{Fixture, OPENING_NIGHT, Seen, policy};
use crate::tickets::mail;
use contract::FlagsSettings;
use e2e::local_stack::Port;
use futures::future::join_all;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn flags_of_the_adr_act() {
    let mut fixture = Fixture::start().await;
    real_time_inventory(&mut fixture).await;
    external_payment_providers(&mut fixture).await;
    email_notifications(&mut fixture).await;
    pdf_generation(&mut fixture).await;
    max_concurrent_bookings(&mut fixture).await;
    fixture.finish().await;
}

/// Gives a flag this value, in one service, as the operator does it.
async fn set(fixture: &Fixture, service: &'static str, key: &str, value: impl Into<Value>) {
    let flag = json!({"state": "ENABLED", "variants": {"now": value.into()}, "defaultVariant": "now"});
    let flags: FlagsSettings = serde_json::from_value(json!({"flags": {key: flag}})).unwrap();
    fixture.configure_all(service, policy(service), flags).await;
}

/// Free seats of the opening night, as a buyer sees them, and the answer.
async fn free_seats(fixture: &Fixture) -> (i64, Seen) {
    let seen = fixture.events("").await;
    let events = seen.body["events"].as_array().unwrap();
    let event = events.iter().find(|event| event["eventId"] == OPENING_NIGHT).unwrap();
    (event["available"].as_i64().unwrap(), seen)
}

/// Off, pages are those of a moment ago, and the database is not asked for them.
async fn real_time_inventory(fixture: &mut Fixture) {
    let (before, seen) = free_seats(fixture).await;
    assert_eq!(seen.body["isFromCache"], false);
    fixture.book().await;
    assert_eq!(free_seats(fixture).await.0, before - 1, "on, each look is at the seats of this moment");

    set(fixture, "catalog", "EnableRealTimeInventory", false).await;
    let is_kept = async || free_seats(fixture).await.1.body["isFromCache"] == true;
    fixture.until("pages are those that were kept", is_kept).await;
    let (kept, _) = free_seats(fixture).await;
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed", "seats are sold by what there is, not by what a page says");
    let (still, seen) = free_seats(fixture).await;
    assert_eq!((still, &seen.body["isFromCache"]), (kept, &json!(true)));

    let begin = Instant::now();
    set(fixture, "catalog", "EnableRealTimeInventory", true).await;
    fixture.until("seats are those of this moment", async || free_seats(fixture).await.0 == kept - 1).await;
    let well = begin.elapsed();
    let sees = "200, as it was a moment ago";
    fixture.record("EnableRealTimeInventory off", sees, seen.took, well, "isFromCache true; seats sold as ever");
}

/// Off, no provider is asked; what is ordered meanwhile is paid when it is on again.
async fn external_payment_providers(fixture: &mut Fixture) {
    set(fixture, "payment", "EnableExternalPaymentProviders", false).await;
    let orders = join_all((0..3).map(|_| fixture.book())).await;
    for booked in &orders {
        assert_eq!(booked.in_words(), "202 PaymentPending");
        assert!(fixture.charged(booked).await.is_empty(), "nobody is asked for money");
    }
    let begin = Instant::now();
    set(fixture, "payment", "EnableExternalPaymentProviders", true).await;
    for booked in &orders {
        fixture.until_confirmed(booked).await;
        assert_eq!(fixture.charged(booked).await, ["stripe"], "charged once");
    }
    fixture.until_well().await;
    let took = orders.iter().map(|booked| booked.took).max().unwrap();
    let sees = "202 PaymentPending, Confirmed later";
    let metrics = "each charged once, when it is on again";
    fixture.record("EnableExternalPaymentProviders off", sees, took, begin.elapsed(), metrics);
}

/// Waits until the outbox was looked at again and again: what would be sent is sent by then.
async fn outbox_looked_at(fixture: &Fixture) {
    let runs = async || fixture.check(Port::Notification, "database").await.runs;
    let until = runs().await + 15;
    // 0.2 s each, and the outbox is looked at every 0.5 s.
    fixture.until("the outbox was looked at", async || runs().await >= until).await;
}

/// Off, mails wait in the outbox; they are sent when it is on again, once each.
async fn email_notifications(fixture: &mut Fixture) {
    fixture.until("nothing is left to send", async || fixture.open_mails().await == 0).await;
    set(fixture, "notification", "EnableEmailNotifications", false).await;
    let before = fixture.mails().await;
    let orders = join_all((0..3).map(|_| fixture.book())).await;
    assert!(orders.iter().all(|booked| booked.in_words() == "201 Confirmed"));
    outbox_looked_at(fixture).await;
    assert_eq!((fixture.open_mails().await, fixture.mails().await), (3, before), "they wait");
    let begin = Instant::now();
    set(fixture, "notification", "EnableEmailNotifications", true).await;
    fixture.until("they are sent", async || fixture.open_mails().await == 0).await;
    let well = begin.elapsed();
    outbox_looked_at(fixture).await;
    assert_eq!(fixture.mails().await, before + 3, "once each");
    let took = orders.iter().map(|booked| booked.took).max().unwrap();
    let sees = "201 Confirmed; the mail comes later";
    fixture.record("EnableEmailNotifications off", sees, took, well, "3 mails wait, none is lost or sent twice");
}

/// Off, a mail says that the ticket follows, and it follows when it is on again.
async fn pdf_generation(fixture: &mut Fixture) {
    set(fixture, "notification", "EnablePdfGeneration", false).await;
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    let confirmation = mail(fixture, &booked, "BookingConfirmed").await;
    assert!(confirmation.contains("Your ticket follows in another mail"), "{confirmation}");
    let begin = Instant::now();
    set(fixture, "notification", "EnablePdfGeneration", true).await;
    let ticket = mail(fixture, &booked, "Ticket").await;
    assert!(ticket.contains("Your ticket is attached"), "{ticket}");
    let well = begin.elapsed();
    let sees = "201 Confirmed; the ticket comes later";
    fixture.record("EnablePdfGeneration off", sees, booked.took, well, "the mail at once, without a ticket");
}

/// As small as this, it refuses what is more; it is another number at once.
async fn max_concurrent_bookings(fixture: &mut Fixture) {
    set(fixture, "booking", "MaxConcurrentBookings", 2).await;
    fixture.provider("stripe", json!({"latencyMs": 200})).await;
    let seen = join_all((0..12).map(|_| fixture.book())).await;
    let (taken, refused): (Vec<_>, Vec<_>) = seen.iter().partition(|booked| booked.status == 201);
    assert!((1..=4).contains(&taken.len()), "{} were taken", taken.len());
    for booked in &refused {
        assert_eq!(booked.in_words(), "503 TOO_MANY_BOOKINGS");
        assert_eq!(booked.body["limit"], "MaxConcurrentBookings");
        assert!(booked.took < Duration::from_secs(1), "refused at once: {:?}", booked.took);
    }
    let begin = Instant::now();
    set(fixture, "booking", "MaxConcurrentBookings", 100).await;
    let later = join_all((0..12).map(|_| fixture.book())).await;
    assert!(later.iter().all(|booked| matches!(booked.status, 201 | 202)), "all have their place");
    let well = begin.elapsed();
    fixture.provider("stripe", json!({})).await;
    for booked in &later {
        fixture.until_confirmed(booked).await;
    }
    fixture.until_well().await;
    let took = refused.iter().map(|booked| booked.took).max().unwrap();
    let sees = format!("{} x 201 Confirmed, {} x 503", taken.len(), refused.len());
    fixture.record("MaxConcurrentBookings 2, 12 buyers", &sees, took, well, "with 100 again, all 12 are taken");
}
