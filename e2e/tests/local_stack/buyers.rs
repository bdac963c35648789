//! Buyers who want more than their share, or what is somebody else's: through the gateway, with the limits that it and booking
//! have by default.

use crate::fixture::{Fixture, Seen, Who, order, policy};
use e2e::local_stack::NO_BUYER_LIMITS;
use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What the local stack sets so that one address can stand for all buyers.
const GATEWAY_LIMITS: [&str; 4] =
    ["REQUESTS_PER_USER", "REQUESTS_PER_NETWORK", "NEW_SESSIONS_PER_NETWORK", "EVENT_REQUESTS_PER_NETWORK"];

#[tokio::test(flavor = "multi_thread")]
async fn nobody_takes_it_all_or_sees_what_is_not_theirs() {
    let mut fixture = Fixture::start().await;
    fixture.restart_with("booking", &NO_BUYER_LIMITS.map(|(name, _)| (name, None))).await;
    fixture.restart_with("gateway", &GATEWAY_LIMITS.map(|name| (name, None))).await;
    for service in ["booking", "gateway"] {
        fixture.configure(service, policy(service)).await;
    }
    fixture.until_well().await;
    two_hundred_requests_of_one_user(&mut fixture).await;
    two_hundred_requests_of_one_session(&mut fixture).await;
    a_stranger_asks_for_a_booking(&mut fixture).await;
    forged(&mut fixture).await;
    fixture.finish().await;
}

/// How many answers there are of each kind.
fn count(seen: &[Seen]) -> BTreeMap<String, usize> {
    let mut answers = BTreeMap::new();
    for one in seen {
        *answers.entry(one.in_words()).or_default() += 1;
    }
    answers
}

/// How often somebody may ask: so often a second, and so many at once.
#[derive(Clone, Copy)]
struct Limit {
    rate: f64,
    burst: f64,
}

/// Sends two hundred orders at once as somebody, and then more until it is said that it is enough; others buy meanwhile. All
/// answers, the last one of them that refusal, and how long the others waited.
async fn flood(fixture: &Fixture, who: Who<'_>, limit: Limit) -> (Vec<Seen>, Duration) {
    let begin = Instant::now();
    let body = order();
    let ask = || fixture.ask_as(who, Method::POST, "/api/bookings", &body);
    let over = Cell::new(false);
    let others = async {
        let mut slowest = Duration::ZERO;
        while !over.get() {
            let booked = fixture.book().await;
            assert_eq!(booked.in_words(), "201 Confirmed", "others buy meanwhile");
            slowest = slowest.max(booked.took);
        }
        slowest
    };
    let flood = async {
        let mut seen = join_all((0..200).map(|_| ask())).await;
        while seen.last().is_none_or(|last| last.in_words() != "429 TOO_MANY_SEATS") {
            assert!(seen.len() < 2_000, "{:?}", count(&seen));
            seen.push(ask().await);
            // Less patient than it is asked to be.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        over.set(true);
        seen
    };
    let (seen, slowest) = tokio::join!(flood, others);
    let expected =
        ["201 Confirmed", "202 PaymentPending", "429 TOO_MANY_ORDERS", "429 TOO_MANY_REQUESTS", "429 TOO_MANY_SEATS"];
    let answers = count(&seen);
    assert!(answers.keys().all(|answer| expected.contains(&answer.as_str())), "{answers:?}");
    let passed = u32::try_from(seen.iter().filter(|one| one.in_words() != "429 TOO_MANY_REQUESTS").count()).unwrap();
    let most = limit.rate.mul_add(begin.elapsed().as_secs_f64(), limit.burst);
    assert!(f64::from(passed) <= most, "{passed} got past the gateway, of {most} at the most: {answers:?}");
    assert!(seen.iter().filter(|one| one.status == 429).all(|one| one.header("retry-after").is_some()));
    (seen, slowest)
}

/// Seats that one owner of this kind has, of those who have most.
async fn most_seats_of_one(fixture: &Fixture, kind: &str) -> i64 {
    let most = "SELECT sum(ticket_count) FROM bookings WHERE status <> 'Cancelled' AND owner LIKE $1 || ':%'
                GROUP BY owner ORDER BY 1 DESC LIMIT 1";
    fixture.stack.connect().await.unwrap().query_one(most, &[&kind]).await.unwrap().get(0)
}

async fn two_hundred_requests_of_one_user(fixture: &mut Fixture) {
    let (seen, others) = flood(fixture, Who::User("greedy"), Limit { rate: 20.0, burst: 40.0 }).await;
    assert_eq!(seen.last().unwrap().body["limit"], "SEATS_PER_BUYER");
    assert_eq!(most_seats_of_one(fixture, "user").await, 10);
    let well = fixture.until_well().await;
    let answers = count(&seen);
    let of = |answer: &str| answers.get(answer).copied().unwrap_or_default();
    let metrics = format!(
        "{} refused by the gateway, {} by booking; others wait {} ms",
        of("429 TOO_MANY_REQUESTS"),
        of("429 TOO_MANY_SEATS") + of("429 TOO_MANY_ORDERS"),
        others.as_millis()
    );
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    fixture.record("one user, 200 requests at once", "10 seats, then 429 with the limit", slowest, well, &metrics);
}

/// Somebody without a login, who sends the cookie back that came with the first order.
async fn two_hundred_requests_of_one_session(fixture: &mut Fixture) {
    let first = fixture.ask_as(Who::Nobody, Method::POST, "/api/bookings", &order()).await;
    assert_eq!(first.in_words(), "201 Confirmed");
    let cookie = first.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let (seen, others) = flood(fixture, Who::Session(&cookie), Limit { rate: 5.0, burst: 10.0 }).await;
    assert_eq!(seen.last().unwrap().body["limit"], "SEATS_PER_SESSION");
    assert_eq!(most_seats_of_one(fixture, "session").await, 4);
    let well = fixture.until_well().await;
    let answers = count(&seen);
    let refused = answers.get("429 TOO_MANY_REQUESTS").copied().unwrap_or_default();
    let metrics = format!("{refused} refused by the gateway; others wait {} ms", others.as_millis());
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let sees = "4 seats, then 429 with the limit";
    fixture.record("one session, 200 requests at once", sees, slowest, well, &metrics);
}

/// As if there were no such booking.
async fn a_stranger_asks_for_a_booking(fixture: &mut Fixture) {
    let eve = Who::User("eve");
    let held = fixture.ask_as(eve, Method::POST, "/api/reservations", &order()).await;
    assert_eq!(held.in_words(), "201 Held");
    let id = held.body["bookingId"].as_str().unwrap().to_owned();
    let other = fixture.ask_as(Who::Nobody, Method::POST, "/api/bookings", &order()).await;
    let cookie = other.header("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    let mut slowest = Duration::ZERO;
    for stranger in [Who::User("ann"), Who::Session(&cookie), Who::Nobody] {
        for (method, path) in [
            (Method::GET, format!("/api/bookings/{id}")),
            (Method::POST, format!("/api/reservations/{id}/confirm")),
            (Method::DELETE, format!("/api/reservations/{id}")),
        ] {
            let seen = fixture.ask_as(stranger, method, &path, &Value::Null).await;
            assert_eq!(seen.status, 404, "{path}: {}", seen.body);
            slowest = slowest.max(seen.took);
        }
    }
    let path = format!("/api/reservations/{id}/confirm");
    assert_eq!(fixture.ask_as(eve, Method::POST, &path, &json!({})).await.in_words(), "201 Confirmed");
    let well = fixture.until_well().await;
    fixture.record("a stranger asks for a booking", "404, as if there were none", slowest, well, "nothing opened");
}

/// The last character but one is another one.
fn changed(text: &str) -> String {
    let (rest, last) = text.split_at(text.len() - 2);
    let other = if last.starts_with('A') { 'B' } else { 'A' };
    format!("{rest}{other}{}", &last[1..])
}

/// A token or a cookie that nobody of ours has signed: nothing of anybody else's is there.
async fn forged(fixture: &mut Fixture) {
    let token = changed(&fixture.stack.buyers().token("eve"));
    let refused = fixture.ask_as(Who::Token(&token), Method::POST, "/api/bookings", &order()).await;
    assert_eq!(refused.in_words(), "401 INVALID_TOKEN");
    assert!(refused.body["message"].as_str().unwrap().contains("signature"), "{}", refused.body);
    let well = fixture.until_well().await;
    fixture.record("token forged", "401 INVALID_TOKEN, with the reason", refused.took, well, "nothing opened");

    let own = fixture.ask_as(Who::Nobody, Method::POST, "/api/bookings", &order()).await;
    assert_eq!(own.in_words(), "201 Confirmed");
    let cookie = own.header("set-cookie").unwrap().split(';').next().unwrap();
    let path = format!("/api/bookings/{}", own.body["bookingId"].as_str().unwrap());
    assert_eq!(fixture.ask_as(Who::Session(cookie), Method::GET, &path, &Value::Null).await.status, 200);
    let forged = fixture.ask_as(Who::Session(&changed(cookie)), Method::GET, &path, &Value::Null).await;
    assert_eq!(forged.status, 404);
    let well = fixture.until_well().await;
    let sees = "404: as without one";
    fixture.record("cookie forged", sees, forged.took, well, "nothing opened");
}
