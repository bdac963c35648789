//! Buyers who want more than their share, or what is somebody else's.

use crate::fixture::{Fixture, OPENING_NIGHT, order};
use e2e::local_stack::Port;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::Duration;

const ANN: &str = "session:00000000-0000-4000-8000-000000000001";
const EVE: &str = "session:00000000-0000-4000-8000-000000000002";

#[tokio::test(flavor = "multi_thread")]
async fn nobody_takes_it_all_or_sees_what_is_not_theirs() {
    let mut fixture = Fixture::start().await;
    fixture.until_well().await;
    two_hundred_requests_of_one_buyer(&mut fixture).await;
    a_stranger_asks_for_a_booking(&mut fixture).await;
    fixture.finish().await;
}

/// An event that gives ten seats to each, and one who wants two hundred.
async fn two_hundred_requests_of_one_buyer(fixture: &mut Fixture) {
    let client = fixture.stack.connect().await.unwrap();
    let limit = "UPDATE events SET seats_per_buyer = 10 WHERE id::text = $1";
    client.execute(limit, &[&OPENING_NIGHT]).await.unwrap();
    let body = order();
    let ask = || fixture.ask_as(ANN, Method::POST, "/api/bookings", &body);
    let mut seen = join_all((0..200).map(|_| ask())).await;
    fixture.until("one has as many as one may have", async || ask().await.in_words() == "429 TOO_MANY_SEATS").await;
    let refused = ask().await;
    assert_eq!(refused.body["limit"], "SEATS_PER_SESSION");
    assert!(refused.header("retry-after").is_some());
    seen.push(refused);
    for one in &seen {
        let expected = ["201 Confirmed", "202 PaymentPending", "429 TOO_MANY_ORDERS", "429 TOO_MANY_SEATS"];
        assert!(expected.contains(&one.in_words().as_str()), "{}", one.in_words());
    }
    let sold = "SELECT sum(ticket_count) FROM bookings WHERE owner = $1 AND status <> 'Cancelled'";
    assert_eq!(client.query_one(sold, &[&ANN]).await.unwrap().get::<_, i64>(0), 10);
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let other = fixture.ask_as(EVE, Method::POST, "/api/bookings", &body).await;
    assert_eq!(other.in_words(), "201 Confirmed", "others buy meanwhile");
    let well = fixture.until_well().await;
    let refused = fixture.metric(Port::Booking, r#"bookings_total{outcome="too_many_seats"}"#).await;
    let metrics = format!("too_many_seats {refused}, nothing opened");
    fixture.record("one buyer, 200 requests at once", "10 seats, then 429 with the limit", slowest, well, &metrics);
}

/// As if there were no such booking.
async fn a_stranger_asks_for_a_booking(fixture: &mut Fixture) {
    let held = fixture.ask_as(EVE, Method::POST, "/api/reservations", &order()).await;
    let id = held.body["bookingId"].as_str().unwrap().to_owned();
    let mut slowest = Duration::ZERO;
    for (method, path) in [
        (Method::GET, format!("/api/bookings/{id}")),
        (Method::POST, format!("/api/reservations/{id}/confirm")),
        (Method::DELETE, format!("/api/reservations/{id}")),
    ] {
        let seen = fixture.ask_as(ANN, method, &path, &Value::Null).await;
        assert_eq!(seen.status, 404, "{path}: {}", seen.body);
        slowest = slowest.max(seen.took);
    }
    let path = format!("/api/reservations/{id}/confirm");
    assert_eq!(fixture.ask_as(EVE, Method::POST, &path, &json!({})).await.in_words(), "201 Confirmed");
    let well = fixture.until_well().await;
    fixture.record("a stranger asks for a booking", "404, as if there were none", slowest, well, "nothing opened");
}
