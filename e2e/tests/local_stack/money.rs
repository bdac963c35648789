//! Money in odd ways: events of providers, keys that are revoked, buyers who have to act, money that goes back, books that differ.

use crate::fixture::{Fixture, Seen, order, policy};
use contract::CheckStatus;
use e2e::local_stack::Port;
use serde_json::json;
use std::process::Output;
use std::time::{Duration, Instant};
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn money_goes_odd_ways() {
    let mut fixture = Fixture::start().await;
    let (cancelled, since) = cancelled_after_the_charge(&fixture).await;
    events(&mut fixture).await;
    one_order_fails_for_ever(&mut fixture).await;
    key_revoked(&mut fixture).await;
    buyer_has_to_act(&mut fixture).await;
    money_goes_back(&mut fixture, &cancelled, since).await;
    books_differ(&mut fixture).await;
    no_payment_service(&mut fixture).await;
    payments_do_not_end(&mut fixture).await;
    fixture.finish().await;
}

/// A booking that is cancelled although it is paid, as one that was given up while its charge was under way.
async fn cancelled_after_the_charge(fixture: &Fixture) -> (Seen, Instant) {
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    let id = booked.body["bookingId"].as_str().unwrap();
    let cancel = format!(
        "BEGIN; UPDATE bookings SET status = 'Cancelled', cancel_reason = 'declined' WHERE id = '{id}';
         UPDATE events SET available = available + 1 FROM bookings b WHERE b.id = '{id}' AND events.id = b.event_id; COMMIT"
    );
    fixture.stack.connect().await.unwrap().batch_execute(&cancel).await.unwrap();
    (booked, Instant::now())
}

/// A booking whose charge has no answer, and that asks for it by itself only in an hour.
async fn in_doubt(fixture: &Fixture) -> Seen {
    fixture.provider("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "202 PaymentPending");
    let wait = "UPDATE bookings SET settle_at = now() + interval '1 hour' WHERE status = 'PaymentPending'";
    fixture.stack.connect().await.unwrap().batch_execute(wait).await.unwrap();
    fixture.provider("stripe", json!({})).await;
    booked
}

async fn events(fixture: &mut Fixture) {
    let count = async |fixture: &Fixture, outcome: &str| {
        let labels = format!("payment_webhooks_total{{provider=\"stripe\",outcome=\"{outcome}\"}}");
        fixture.metric(Port::Payment, &labels).await
    };
    let booked = in_doubt(fixture).await;
    let object = fixture.object_of(&booked).await;
    let forged = fixture.event_of_stripe(&object, Some("whsec_guessed")).await;
    assert_eq!(forged.in_words(), "400 SIGNATURE_INVALID");
    let path = format!("/api/bookings/{}", booked.body["bookingId"].as_str().unwrap());
    assert_eq!(fixture.get(Port::Gateway, &path).await.body["status"], "PaymentPending", "nobody believes it");
    let metrics = format!("webhooks not_genuine +{}", count(fixture, "not_genuine").await);
    fixture.record("webhook forged", "400 SIGNATURE_INVALID to its sender", forged.took, Duration::ZERO, &metrics);
    let genuine = fixture.event_of_stripe(&object, None).await;
    assert_eq!(genuine.status, 200);
    let settled = fixture.until_confirmed(&booked).await;
    assert_eq!(fixture.charged(&booked).await, ["stripe"], "once, and by nobody else");
    fixture.until_well().await;
    let metrics = format!("webhooks received +{}", count(fixture, "received").await);
    let sees = "202 PaymentPending, Confirmed by the event";
    fixture.record("answer lost, then its webhook", sees, booked.took, settled, &metrics);
}

/// The provider keeps a failure for the key of one order: that opens its circuit for nobody.
async fn one_order_fails_for_ever(fixture: &mut Fixture) {
    let opened = r#"circuit_breaker_opened_total{service="stripe"}"#;
    let before = fixture.metric(Port::Payment, opened).await;
    fixture.provider("stripe", json!({"storedFailure": true})).await;
    let booked = fixture.book().await;
    assert_eq!(booked.in_words(), "201 Confirmed");
    assert_eq!(fixture.charged(&booked).await, ["paypal"]);
    fixture.provider("stripe", json!({})).await;
    let next = fixture.book().await;
    assert_eq!(
        (next.in_words().as_str(), &*fixture.charged(&next).await),
        ("201 Confirmed", &["stripe".to_owned()][..])
    );
    let opened = fixture.metric(Port::Payment, opened).await - before;
    assert_eq!(opened, 0);
    let well = fixture.until_well().await;
    let sees = "201 Confirmed, by the other provider";
    fixture.record("provider keeps failing for one order", sees, booked.took, well, "stripe opened +0");
}

async fn key_revoked(fixture: &mut Fixture) {
    fixture.provider("stripe", json!({"unauthorized": true})).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..4 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        assert_eq!(fixture.charged(&booked).await, ["paypal"]);
        slowest = slowest.max(booked.took);
    }
    let name = "payment-provider-stripe";
    let is_said = async || fixture.check(Port::Payment, name).await.status == CheckStatus::Unhealthy;
    let noticed = fixture.until("the check says it", is_said).await;
    let report = fixture.check(Port::Payment, name).await;
    assert!(report.message.contains("does not take the API key"), "{}", report.message);
    fixture.provider("stripe", json!({})).await;
    let well = fixture.until_well().await;
    let metrics = format!("check {name} unhealthy after {} ms", noticed.as_millis());
    fixture.record("provider's key revoked (401)", "201 Confirmed, by the other provider", slowest, well, &metrics);
}

/// Three of them would have opened the circuit for everybody.
async fn buyer_has_to_act(fixture: &mut Fixture) {
    let opened = r#"circuit_breaker_opened_total{service="stripe"}"#;
    let before = fixture.metric(Port::Payment, opened).await;
    fixture.provider("stripe", json!({"requiresAction": true})).await;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let booked = fixture.book().await;
        assert_eq!(
            (booked.in_words().as_str(), &booked.body["action"]),
            ("202 PaymentPending", &json!("ConfirmPayment"))
        );
        waiting.push(booked);
    }
    fixture.provider("stripe", json!({})).await;
    assert_eq!(fixture.book().await.in_words(), "201 Confirmed", "others buy meanwhile");
    let begin = Instant::now();
    for booked in &waiting {
        fixture.buyer_acts(booked).await;
        // As a provider says so at once.
        let object = fixture.object_of(booked).await;
        assert_eq!(fixture.event_of_stripe(&object, None).await.status, 200);
    }
    for booked in &waiting {
        fixture.until_confirmed(booked).await;
        assert_eq!(fixture.charged(booked).await, ["stripe"]);
    }
    fixture.until_well().await;
    let opened = fixture.metric(Port::Payment, opened).await - before;
    assert_eq!(opened, 0);
    let slowest = waiting.iter().map(|one| one.took).max().unwrap();
    let sees = "202 ConfirmPayment; Confirmed once they have";
    fixture.record("buyers have to act (3-D Secure)", sees, slowest, begin.elapsed(), "stripe opened +0");
}

async fn money_goes_back(fixture: &mut Fixture, cancelled: &Seen, since: Instant) {
    fixture
        .until("the money is given back", async || {
            let charges = fixture.get(Port::Providers, "/charges").await.body;
            let mut of_booking = charges["charges"].as_array().unwrap().iter();
            let is_its = |charge: &&serde_json::Value| charge["key"] == cancelled.body["bookingId"];
            of_booking.find(is_its).is_some_and(|charge| charge["refunded"] == json!(true))
        })
        .await;
    let took = since.elapsed();
    let made = fixture.metric(Port::Payment, r#"refunds_total{outcome="made"}"#).await;
    assert_eq!(made, 1);
    let sees = "the money back";
    fixture.record("charged, and cancelled meanwhile", sees, cancelled.took, took, &format!("refunds made +{made}"));
}

/// `ticketing reconcile`, as the chart's CronJob runs it.
async fn reconcile(fixture: &Fixture) -> Output {
    let mut command = Command::new(fixture.stack.program());
    command.args(["reconcile", "--since", "1h", "--grace-minutes", "0"]);
    command.env("DATABASE_URL", fixture.stack.database_url());
    command.env("STRIPE_URL", fixture.stack.url(Port::Stripe)).env("PAYPAL_URL", fixture.stack.url(Port::Paypal));
    command.output().await.unwrap()
}

async fn books_differ(fixture: &mut Fixture) {
    let booked = fixture.book().await;
    let client = fixture.stack.connect().await.unwrap();
    let fine = reconcile(fixture).await;
    assert_eq!(fine.status.code(), Some(0), "{fine:?}");
    let key = booked.body["bookingId"].as_str().unwrap();
    let was: String = client
        .query_one("SELECT charge_id FROM payment_attempts WHERE key = $1 AND state = 'Charged'", &[&key])
        .await
        .unwrap()
        .get(0);
    let set = "UPDATE payment_attempts SET charge_id = $2 WHERE key = $1 AND state = 'Charged'";
    client.execute(set, &[&key, &"nobody"]).await.unwrap();
    let found = reconcile(fixture).await;
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    assert_eq!(found.status.code(), Some(1), "{found:?}");
    let words: Vec<_> = text.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(words.contains(&"NOT_CHARGED_HERE") && words.contains(&"NOT_CHARGED_THERE"), "{text}");
    client.execute(set, &[&key, &was]).await.unwrap();
    let begin = Instant::now();
    assert_eq!(reconcile(fixture).await.status.code(), Some(0));
    let sees = "nothing; the job fails and names it";
    let metrics = format!("{} lines, exit code 1", words.len());
    fixture.record("ledger and provider differ", sees, booked.took, begin.elapsed(), &metrics);
}

/// Nothing that has a price is sold for nothing.
async fn no_payment_service(fixture: &mut Fixture) {
    let insert = "INSERT INTO events (id, name, capacity, available, price_cents)
                  VALUES (gen_random_uuid(), 'Open day', 9, 9, 0) RETURNING id::text";
    let client = fixture.stack.connect().await.unwrap();
    let free: String = client.query_one(insert, &[]).await.unwrap().get(0);
    let url = fixture.stack.url(Port::Payment);
    fixture.restart_with("booking", &[("PAYMENT_URL", None)]).await;
    fixture.until("orders arrive", async || fixture.book().await.in_words() == "503 PAYMENTS_NOT_SET_UP").await;
    let refused = fixture.book().await;
    assert_eq!(refused.in_words(), "503 PAYMENTS_NOT_SET_UP");
    assert!(refused.header("retry-after").is_some());
    let mut for_free = order();
    for_free["eventId"] = json!(free);
    assert_eq!(fixture.post("/api/bookings", &for_free).await.in_words(), "201 Confirmed");
    let is_said = async || fixture.check(Port::Booking, "payments-pending").await.message.contains("PAYMENT_URL");
    fixture.until("the check says it", is_said).await;
    fixture.restart_with("booking", &[("PAYMENT_URL", Some(&url))]).await;
    fixture.configure("booking", policy("booking")).await;
    let well = fixture.until_well().await;
    let sees = "503 PAYMENTS_NOT_SET_UP; free events 201";
    fixture.record("booking without PAYMENT_URL", sees, refused.took, well, "check payments-pending says it");
}

/// After `PENDING_LIMIT_SECONDS` a payment of which nothing was charged is over, and one in doubt is not, until it is certain.
async fn payments_do_not_end(fixture: &mut Fixture) {
    let settled = |outcome: &str| format!("bookings_settled_total{{outcome=\"{outcome}\"}}");
    fixture.restart_with("booking", &[("PENDING_LIMIT_SECONDS", Some("2"))]).await;
    fixture.configure("booking", policy("booking")).await;
    fixture.until_well().await;
    fixture.provider("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    let in_doubt = fixture.book().await;
    for provider in ["stripe", "paypal"] {
        fixture.provider(provider, json!({"refuse": true, "hide": true})).await;
    }
    let free = "SELECT available FROM events WHERE id = (SELECT event_id FROM bookings WHERE id::text = $1)";
    let id = |seen: &Seen| seen.body["bookingId"].as_str().unwrap().to_owned();
    let client = fixture.stack.connect().await.unwrap();
    let seats = async |of: &Seen| client.query_one(free, &[&id(of)]).await.unwrap().get::<_, i32>(0);
    let free = seats(&in_doubt).await;
    let never_charged = fixture.book().await;
    for booked in [&in_doubt, &never_charged] {
        assert_eq!(booked.in_words(), "202 PaymentPending");
    }
    let read = async |of: &Seen| fixture.get(Port::Gateway, &format!("/api/bookings/{}", id(of))).await.body;
    let is_over = async || read(&never_charged).await["cancelReason"] == "payment timed out";
    let ended = fixture.until("it is given up", is_over).await;
    let message = format!("<{}.BookingCancelled@ticketwave>", id(&never_charged));
    fixture
        .until("the mail says so", async || {
            let mails = fixture.get(Port::Mails, "/mails").await.body;
            mails["mails"].as_array().unwrap().iter().any(|mail| mail["messageId"] == message.as_str())
        })
        .await;
    assert_eq!(seats(&in_doubt).await, free, "the seat is free again");
    assert_eq!(fixture.metric(Port::Booking, &settled("given_up")).await, 1);
    let old = "SELECT pending_since < now() - interval '4 seconds' FROM bookings WHERE id::text = $1";
    let is_old = async || client.query_one(old, &[&id(&in_doubt)]).await.unwrap().get::<_, bool>(0);
    fixture.until("the one in doubt is over the limit, too", is_old).await;
    assert_eq!(read(&in_doubt).await["status"], "PaymentPending", "it may be charged");
    for provider in ["stripe", "paypal"] {
        fixture.provider(provider, json!({})).await;
    }
    let settled = fixture.until_confirmed(&in_doubt).await;
    assert_eq!(fixture.charged(&in_doubt).await, ["stripe"], "once, and by nobody else");
    assert!(fixture.charged(&never_charged).await.is_empty());
    fixture.until_well().await;
    let sees = "202, then Cancelled: payment timed out, a mail";
    let metrics = format!("given_up 1, {} ms after the answer", ended.as_millis());
    fixture.record("PENDING_LIMIT over, nothing charged", sees, never_charged.took, Duration::ZERO, &metrics);
    let sees = "202, Confirmed once that can be read";
    fixture.record("... and charged, but it cannot be read", sees, in_doubt.took, settled, "given_up +0, charged once");
}
