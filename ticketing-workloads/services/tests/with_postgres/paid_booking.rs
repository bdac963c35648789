//! Booking with payment behind it: whatever happens to payment, no seat is sold twice, no booking is lost, and nobody
//! pays twice or for nothing.

use crate::support::app::{App, OPENING_NIGHT, order, quick_policy};
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use crate::support::{eventually, nobody, within};
use contract::{
    BulkheadSettings, CheckStatus, DegradationSettings, DependencySettings, FallbackSettings, FlagsSettings,
    PolicySettings, RetryOn,
};
use futures::future::join_all;
use reqwest::Response;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use ticketing_services::booking::cleanup;
use ticketing_services::payment::reconcile;

/// Booking asks payment once, and waits for two seconds.
pub fn quick(fallback: &[FallbackSettings]) -> PolicySettings {
    let mut policy = quick_policy();
    let mut payment = DependencySettings { fallback: fallback.to_vec(), ..Default::default() };
    payment.timeout.request_ms = 2_000;
    payment.timeout.per_try_ms = 2_000;
    payment.retry.num_retries = 0;
    payment.circuit_breaker.break_ms = 300;
    policy.dependencies.insert("payment".to_owned(), payment);
    policy
}

/// Providers are given up after 300 ms.
pub fn quick_providers() -> PolicySettings {
    let mut policy = PolicySettings::default();
    for name in ["stripe", "paypal"] {
        let mut provider = DependencySettings::default();
        provider.timeout.request_ms = 1_000;
        provider.timeout.per_try_ms = 300;
        provider.retry.num_retries = 1;
        provider.retry.base_interval_ms = 10;
        provider.retry.retry_on = [RetryOn::ServerError].into();
        provider.circuit_breaker.break_ms = 300;
        policy.dependencies.insert(name.to_owned(), provider);
    }
    let stripe = policy.dependencies.get_mut("stripe").unwrap();
    stripe.fallback = vec![FallbackSettings::Provider { provider: "paypal".into() }];
    policy
}

/// The same for a crowd: as in the ADR, without a bulkhead a thousand buyers only get in each other's way.
pub fn for_a_crowd() -> PolicySettings {
    let mut policy = quick(&[FallbackSettings::Queue]);
    let database = policy.dependencies.get_mut("database").unwrap();
    database.retry.num_retries = 8;
    database.bulkhead = Some("critical".to_owned());
    let critical = BulkheadSettings { max_concurrent: 8, max_queued: 200, max_wait_ms: 2_000 };
    policy.bulkheads.insert("critical".to_owned(), critical);
    policy
}

struct Stage {
    booking: App,
    // Ends with the stage.
    payment: App,
    providers: Providers,
    postgres: Postgres,
}

async fn stage() -> Stage {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let payment = App::payment(&postgres, &providers).await;
    payment.push(quick_providers(), FlagsSettings::default()).await;
    let booking = App::paid_booking(&postgres, payment.address).await;
    booking.push(quick(&[FallbackSettings::Queue]), FlagsSettings::default()).await;
    Stage { booking, payment, providers, postgres }
}

/// The status of an answer, the id of the booking, and how it stands.
async fn taken(answer: Response) -> (u16, String, String) {
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    (status, text("bookingId"), text("status"))
}

async fn until_status(booking: &App, id: &str, status: &str) {
    eventually(status, async || {
        let found: Value = booking.get(&format!("/api/bookings/{id}")).await.json().await.ok()?;
        (found["status"] == status).then_some(())
    })
    .await;
}

/// Free seats of the first event.
async fn free(postgres: &Postgres) -> i64 {
    let query = "SELECT available::bigint FROM events WHERE id::text = $1";
    postgres.connect().await.query_one(query, &[&OPENING_NIGHT]).await.unwrap().get(0)
}

async fn count(postgres: &Postgres, query: &str) -> i64 {
    postgres.connect().await.query_one(query, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_is_paid_is_confirmed_at_once() {
    let stage = stage().await;
    let (status, id, stands) = taken(stage.booking.post(&order(OPENING_NIGHT, 2)).await).await;
    assert_eq!((status, stands.as_str()), (201, "Confirmed"));
    let charges = stage.providers.charges().await;
    assert_eq!((charges.len(), &charges[0]["key"], &charges[0]["amountCents"]), (1, &json!(id), &json!(9_000)));
    assert_eq!(count(&stage.postgres, "SELECT count(*) FROM outbox").await, 1);
}

/// The ADR's test `Booking_ShouldSucceed_WhenPaymentServiceIsTemporarilyUnavailable`.
#[tokio::test(flavor = "multi_thread")]
async fn a_booking_is_taken_while_payment_is_away_and_paid_for_when_it_is_back() {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let address = nobody().await;
    let booking = App::paid_booking(&postgres, address).await;
    booking.push(quick(&[FallbackSettings::Queue]), FlagsSettings::default()).await;
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!("once");
    let answer = booking.post(&wanted).await;
    assert_eq!(answer.status(), 202);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!((&answer["success"], &answer["status"]), (&json!(true), &json!("PaymentPending")));
    assert_eq!(count(&postgres, "SELECT count(*) FROM outbox").await, 0, "nobody is told before it is so");

    // Nothing expires that may be paid for.
    cleanup::run(&postgres.settings()).await.unwrap();
    assert_eq!(free(&postgres).await, 99_998);

    let payment = App::payment_at(address.port(), &postgres, &providers).await;
    let id = answer["bookingId"].as_str().unwrap();
    until_status(&booking, id, "Confirmed").await;
    assert_eq!(providers.charged(id).await, ["stripe"]);
    assert_eq!(taken(booking.post(&wanted).await).await, (201, id.to_owned(), "Confirmed".to_owned()));
    assert_eq!(count(&postgres, "SELECT count(*) FROM outbox").await, 1);
    drop(payment);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_declined_gets_no_seat_and_pays_nothing() {
    let stage = stage().await;
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"decline": true})).await;
    }
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!("once");
    for _ in 0..2 {
        let answer = stage.booking.post(&wanted).await;
        assert_eq!(answer.status(), 402);
        assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "PAYMENT_DECLINED");
    }
    assert_eq!(free(&stage.postgres).await, 100_000);
    assert_eq!(stage.providers.charges().await.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seat_is_kept_for_as_long_as_nobody_knows_whether_it_is_paid_for() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    let (status, id, stands) = taken(stage.booking.post(&order(OPENING_NIGHT, 2)).await).await;
    assert_eq!((status, stands.as_str()), (202, "PaymentPending"));
    cleanup::run(&stage.postgres.settings()).await.unwrap();
    assert_eq!(free(&stage.postgres).await, 99_998);
    stage.providers.behave("stripe", json!({})).await;
    until_status(&stage.booking, &id, "Confirmed").await;
    assert_eq!(stage.providers.charged(&id).await, ["stripe"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_queue_a_booking_that_cannot_be_paid_for_is_refused() {
    let stage = stage().await;
    stage.booking.push(quick(&[]), FlagsSettings::default()).await;
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"refuse": true})).await;
    }
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!("once");
    let answer = stage.booking.post(&wanted).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "BOOKING_FAILED");
    assert_eq!(free(&stage.postgres).await, 100_000);
    stage.providers.behave("stripe", json!({})).await;
    eventually("the same key books", async || {
        (taken(stage.booking.post(&wanted).await).await.2 == "Confirmed").then_some(())
    })
    .await;
    assert_eq!(stage.providers.charges().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn under_high_load_payment_is_asked_later() {
    let stage = stage().await;
    let mut policy = quick(&[FallbackSettings::Queue]);
    policy.degradation = Some(DegradationSettings {
        enter_load_percent: 0,
        enter_for_ms: 0,
        exit_load_percent: 0,
        exit_for_ms: 60_000,
        flag_overrides: BTreeMap::new(),
        stages: Vec::new(),
    });
    stage.booking.push(policy, FlagsSettings::default()).await;
    eventually("it is degraded", async || stage.booking.health().await.degraded.then_some(())).await;
    let (status, id, stands) = taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
    assert_eq!((status, stands.as_str()), (202, "PaymentPending"));
    until_status(&stage.booking, &id, "Confirmed").await;
    assert_eq!(stage.providers.charged(&id).await, ["stripe"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_was_tried_for_weeks_holds_up_no_other() {
    let stage = stage().await;
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"refuse": true})).await;
    }
    let (status, id, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
    assert_eq!(status, 202);
    let weeks = "UPDATE bookings SET settle_tries = 30000, settle_at = now() WHERE id::text = $1";
    stage.postgres.connect().await.execute(weeks, &[&id]).await.unwrap();
    let (_, other, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({})).await;
    }
    until_status(&stage.booking, &other, "Confirmed").await;
}

/// Case 5: what has a price is not given away because nobody can charge it.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_payment_service_only_free_events_are_sold() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[("--charge-nothing", "no")]).await;
    for path in ["/api/bookings", "/api/reservations"] {
        let answer = booking.post_to(path, &order(OPENING_NIGHT, 2)).await;
        assert_eq!(answer.status(), 503);
        assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "PAYMENTS_NOT_SET_UP");
    }
    assert_eq!(free(&postgres).await, 100_000);
    assert_eq!(count(&postgres, "SELECT count(*) FROM bookings").await, 0);
    let check = booking.check("payments-pending", "it says so", |check| check.message.contains("PAYMENT_URL")).await;
    assert_eq!(check.status, CheckStatus::Degraded);
    postgres.connect().await.execute("UPDATE events SET price_cents = 0", &[]).await.unwrap();
    let (status, _, stands) = taken(booking.post(&order(OPENING_NIGHT, 2)).await).await;
    assert_eq!((status, stands.as_str()), (201, "Confirmed"));
    booking.check("payments-pending", "all is free", |check| check.status == CheckStatus::Healthy).await;
}

/// Case 5: nor is what was reserved before, such as at another pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_that_has_a_price_is_not_given_away_without_a_payment_service() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let (status, id, _) = taken(booking.post_to("/api/reservations", &order(OPENING_NIGHT, 2)).await).await;
    assert_eq!(status, 201);
    let booking = App::booking_with(&postgres, &[("--charge-nothing", "no")]).await;
    let answer = booking.post_to(&format!("/api/reservations/{id}/confirm"), &json!({})).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "PAYMENTS_NOT_SET_UP");
    assert_eq!(
        count(&postgres, "SELECT count(*) FROM bookings WHERE status = 'Held'").await,
        1,
        "it can be bought yet"
    );
    assert_eq!(count(&postgres, "SELECT count(*) FROM outbox").await, 0, "nobody is told that it is bought");
}

/// A reservation waits for its payment only once it is bought.
#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_a_reservation_does_not_count_as_waiting_for_its_payment() {
    let stage = stage().await;
    let (status, id, _) = taken(stage.booking.post_to("/api/reservations", &order(OPENING_NIGHT, 2)).await).await;
    assert_eq!(status, 201);
    let client = stage.postgres.connect().await;
    client.execute("UPDATE bookings SET pending_since = now() - interval '9 minutes'", &[]).await.unwrap();
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"refuse": true})).await;
    }
    let answer = stage.booking.post_to(&format!("/api/reservations/{id}/confirm"), &json!({})).await;
    assert_eq!(answer.status(), 202);
    let young = "SELECT count(*) FROM bookings WHERE pending_since > now() - interval '1 minute'";
    assert_eq!(count(&stage.postgres, young).await, 1);
}

/// Case 6: a buyer who has waited learns why it came to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn who_waited_and_is_declined_learns_why() {
    let stage = stage().await;
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"refuse": true})).await;
    }
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["email"] = json!("ann@example.com");
    let (status, id, _) = taken(stage.booking.post(&wanted).await).await;
    assert_eq!(status, 202);
    let found: Value = stage.booking.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
    assert!(found["message"].as_str().unwrap().starts_with("The payment is being settled"), "{found}");
    for provider in ["stripe", "paypal"] {
        stage.providers.behave(provider, json!({"decline": true})).await;
    }
    until_status(&stage.booking, &id, "Cancelled").await;
    let found: Value = stage.booking.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
    assert_eq!(found["cancelReason"], "declined");
    assert!(found["message"].as_str().unwrap().starts_with("The payment was declined"), "{found}");
    assert_eq!(count(&stage.postgres, "SELECT count(*) FROM outbox WHERE kind = 'BookingCancelled'").await, 1);
    assert_eq!(free(&stage.postgres).await, 100_000);
}

/// Case 3, as the buyer sees it.
#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_who_has_to_act_keeps_the_seats_for_that_time() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"requiresAction": true})).await;
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!("once");
    let answer = stage.booking.post(&wanted).await;
    assert_eq!(answer.status(), 202);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["action"], "ConfirmPayment");
    let id = answer["bookingId"].as_str().unwrap();
    let again: Value = stage.booking.post(&wanted).await.json().await.unwrap();
    assert_eq!((&again["bookingId"], &again["action"]), (&json!(id), &json!("ConfirmPayment")), "asked again");
    let found: Value = stage.booking.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
    assert_eq!((&found["status"], &found["action"]), (&json!("PaymentPending"), &json!("ConfirmPayment")));
    assert_eq!(free(&stage.postgres).await, 99_998);
    // The time to act is over after two seconds.
    until_status(&stage.booking, id, "Cancelled").await;
    assert_eq!(free(&stage.postgres).await, 100_000);
    stage.providers.buyer_acts(id).await;
    assert_eq!(stage.providers.charges().await.len(), 0, "cancelled at the provider, too");
}

#[rstest::rstest]
#[case::not_charged(json!({"refuse": true}), json!({"refuse": true}), "Cancelled")]
#[case::charged(json!({"chargeThenHang": true, "hide": true}), json!({}), "Confirmed")]
#[tokio::test(flavor = "multi_thread")]
async fn a_payment_that_never_ends_is_ended(#[case] before: Value, #[case] after: Value, #[case] ends: &str) {
    let stage = stage().await;
    let settings = [("--payment-url", format!("http://{}", stage.payment.address))];
    let settings = [(settings[0].0, settings[0].1.as_str()), ("--pending-limit-seconds", "3")];
    let booking = App::booking_with(&stage.postgres, &settings).await;
    booking.push(quick(&[FallbackSettings::Queue]), FlagsSettings::default()).await;
    stage.providers.behave("stripe", before).await;
    stage.providers.behave("paypal", json!({"refuse": true})).await;
    // Only the one with the limit settles what is open.
    stage.booking.end().await;
    let (status, id, _) = taken(booking.post(&order(OPENING_NIGHT, 2)).await).await;
    assert_eq!(status, 202);
    eventually("it is closed", async || {
        let closed = "SELECT count(*) FROM payments WHERE closed_at IS NOT NULL";
        (count(&stage.postgres, closed).await == 1).then_some(())
    })
    .await;
    if ends == "Confirmed" {
        let found: Value = booking.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
        assert_eq!(found["status"], "PaymentPending", "nobody knows of the charge yet");
    }
    stage.providers.behave("stripe", after).await;
    until_status(&booking, &id, ends).await;
    let charges = usize::from(ends == "Confirmed");
    assert_eq!(stage.providers.charges().await.len(), charges);
}

/// The money of a booking that is cancelled goes back, by whatever way that is found out, also when the provider fails at first.
#[rstest::rstest]
#[case::at_once("stripe", json!({}), json!({}))]
#[case::stored_failure("stripe", json!({"refundStoredFailure": true}), json!({}))]
#[case::stored_failure_at_paypal("paypal", json!({"refundStoredFailure": true}), json!({}))]
#[case::under_way("stripe", json!({"refundPending": true}), json!({}))]
#[case::under_way_at_paypal("paypal", json!({"refundPending": true}), json!({}))]
#[case::made_already("stripe", json!({}), json!(9_000))]
#[case::in_part_already("stripe", json!({}), json!(1_000))]
#[case::in_part_already_at_paypal("paypal", json!({}), json!(1_000))]
#[tokio::test(flavor = "multi_thread")]
async fn a_charge_of_a_cancelled_booking_is_refunded(
    #[case] provider: &str,
    #[case] before: Value,
    #[case] already: Value,
) {
    let stage = stage().await;
    if provider == "paypal" {
        stage.providers.behave("stripe", json!({"decline": true})).await;
    }
    let (_, id, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 2)).await).await;
    let client = stage.postgres.connect().await;
    let cancel = "UPDATE bookings SET status = 'Cancelled', cancel_reason = 'declined' WHERE id::text = $1";
    if let Some(cents) = already.as_u64() {
        let charge = "SELECT charge_id FROM payment_attempts WHERE state = 'Charged'";
        let object: String = client.query_one(charge, &[]).await.unwrap().get(0);
        refund_by_hand(&stage, provider, &object, cents).await;
    }
    stage.providers.behave(provider, before.clone()).await;
    client.execute(cancel, &[&id]).await.unwrap();
    if before != json!({}) {
        within(Duration::from_secs(90), "it is tried", async || {
            (count(&stage.postgres, "SELECT count(*) FROM refunds WHERE last_error IS NOT NULL").await == 1)
                .then_some(())
        })
        .await;
        assert_eq!(count(&stage.postgres, "SELECT count(*) FROM refunds WHERE done_at IS NOT NULL").await, 0);
        stage.providers.behave(provider, json!({})).await;
        client.execute("UPDATE refunds SET next_at = now()", &[]).await.unwrap();
    }
    within(Duration::from_secs(90), "the money is given back", async || {
        let charges = stage.providers.charges().await;
        charges.iter().all(|charge| charge["refunded"] == true).then_some(())
    })
    .await;
    within(Duration::from_secs(60), "that is written down", async || {
        let done = "SELECT count(*) FROM refunds WHERE done_at IS NOT NULL AND refund_id IS NOT NULL";
        (count(&stage.postgres, done).await == 1).then_some(())
    })
    .await;
}

/// As when an event is called off: whatever reason was written down, if any, and however long ago the tickets were sold.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_cancelled_by_hand_is_refunded_however_old_it_is() {
    let stage = stage().await;
    let client = stage.postgres.connect().await;
    for reason in [Some("the event is called off"), None, Some("declined")] {
        let (_, id, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
        let age = if reason == Some("declined") { "1 minute" } else { "200 days" };
        let cancel =
            "UPDATE bookings SET status = 'Cancelled', cancel_reason = $2, created_at = now() - $3::text::interval
                      WHERE id::text = $1";
        client.execute(cancel, &[&id, &reason, &age]).await.unwrap();
    }
    taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
    within(Duration::from_secs(90), "the money is given back", async || {
        let charges = stage.providers.charges().await;
        let refunded = charges.iter().filter(|charge| charge["refunded"] == true).count();
        assert!(refunded < 4, "the last one is confirmed");
        (refunded == 3).then_some(())
    })
    .await;
}

/// A booking that somebody cancels while it is charged, for a reason that the search for such charges knows nothing of: who hears
/// of the charge writes down that it goes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_is_cancelled_while_it_is_charged_gets_its_money_back() {
    let stage = stage().await;
    let mut providers = quick_providers();
    let stripe = providers.dependencies.get_mut("stripe").unwrap();
    (stripe.timeout.request_ms, stripe.timeout.per_try_ms, stripe.retry.num_retries) = (4_000, 4_000, 0);
    stage.payment.push(providers, FlagsSettings::default()).await;
    let mut policy = quick(&[FallbackSettings::Queue]);
    let payment = policy.dependencies.get_mut("payment").unwrap();
    (payment.timeout.request_ms, payment.timeout.per_try_ms) = (60_000, 60_000);
    stage.booking.push(policy, FlagsSettings::default()).await;
    stage.providers.behave("stripe", json!({"chargeThenHang": true})).await;
    let cancelled = async {
        eventually("it is charged", async || (stage.providers.charges().await.len() == 1).then_some(())).await;
        let cancel = "UPDATE bookings SET status = 'Cancelled', settle_at = NULL, cancel_reason = 'given back'
                      WHERE status = 'PaymentPending'";
        assert_eq!(stage.postgres.connect().await.execute(cancel, &[]).await.unwrap(), 1);
    };
    let wanted = order(OPENING_NIGHT, 2);
    let (answer, ()) = tokio::join!(stage.booking.post(&wanted), cancelled);
    assert_eq!(answer.status(), 503, "it is not booked");
    let owed = "SELECT count(*) FROM refunds WHERE reason = 'the booking was cancelled'";
    assert_eq!(count(&stage.postgres, owed).await, 1);
    eventually("the money is given back", async || {
        stage.providers.charges().await.iter().all(|charge| charge["refunded"] == true).then_some(())
    })
    .await;
}

/// By a person, or by a request of which nobody knows.
async fn refund_by_hand(stage: &Stage, provider: &str, object: &str, cents: u64) {
    let client = &stage.booking.client;
    let request = if provider == "stripe" {
        let url = format!("http://{}/v1/refunds", stage.providers.stripe);
        client.post(url).body(format!("payment_intent={object}&amount={cents}"))
    } else {
        let url = format!("http://{}/v2/payments/captures/capture-{object}/refund", stage.providers.paypal);
        let value = format!("{}.{:02}", cents / 100, cents % 100);
        client.post(url).body(json!({"amount": {"value": value, "currency_code": "EUR"}}).to_string())
    };
    let request = request.header("Idempotency-Key", "by hand").header("PayPal-Request-Id", "by hand");
    let refund = request.send().await.unwrap();
    assert!(refund.status().is_success(), "{:?}", refund.text().await);
}

/// However many bookings came to nothing: they are looked through some at a time, and a failure holds up nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn charges_are_found_among_many_cancelled_bookings() {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let booking = App::paid_booking(&postgres, nobody().await).await;
    booking.schema_is_done().await;
    let client = postgres.connect().await;
    client
        .batch_execute(
            // Those that are as old as the last one of the first page are charged, too.
            "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, cancel_reason, created_at)
             SELECT gen_random_uuid(), e.id, 'ann', 1, 'Cancelled', nth::text, 'declined',
                    now() - interval '2 days' + (nth / 7) * interval '1 second'
             FROM (SELECT id FROM events LIMIT 1) e, generate_series(1, 2000) nth;
             INSERT INTO payments (key, amount_cents, currency) SELECT id::text, 100, 'eur' FROM bookings;
             INSERT INTO payment_attempts (key, provider, state, charge_id)
             SELECT id::text, 'stripe', 'Charged', 'charge of ' || idempotency_key FROM bookings
             WHERE idempotency_key::integer BETWEEN 497 AND 503 OR idempotency_key IN ('1', '2000');
             INSERT INTO webhook_events (provider, event_id, object_id, done_at)
             VALUES ('stripe', 'old', 'o', now() - interval '40 days');
             CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not now'; END $$;
             CREATE TRIGGER fail BEFORE INSERT ON refunds FOR EACH ROW EXECUTE FUNCTION fail();",
        )
        .await
        .unwrap();
    let broken = App::payment(&postgres, &providers).await;
    eventually("old events are removed", async || {
        (count(&postgres, "SELECT count(*) FROM webhook_events").await == 0).then_some(())
    })
    .await;
    assert_eq!(count(&postgres, "SELECT count(*) FROM refunds").await, 0);
    broken.end().await;
    client.batch_execute("DROP TRIGGER fail ON refunds").await.unwrap();
    let payment = App::payment(&postgres, &providers).await;
    eventually("all are found", async || (count(&postgres, "SELECT count(*) FROM refunds").await == 9).then_some(()))
        .await;
    drop(payment);
}

/// Payments of which a look finds out nothing keep no others from being looked at.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_doubt_has_its_turn() {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    App::paid_booking(&postgres, nobody().await).await.end().await;
    let client = postgres.connect().await;
    client
        .batch_execute(
            "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, cancel_reason)
             SELECT gen_random_uuid(), e.id, 'ann', 1, 'Cancelled', nth::text, 'payment timed out'
             FROM (SELECT id FROM events LIMIT 1) e, generate_series(1, 45) nth;
             INSERT INTO payments (key, amount_cents, currency) SELECT id::text, 100, 'eur' FROM bookings;
             INSERT INTO payment_attempts (key, provider, state) SELECT key, 'stripe', 'Begun' FROM payments",
        )
        .await
        .unwrap();
    let payment = App::payment(&postgres, &providers).await;
    within(Duration::from_secs(150), "all are closed", async || {
        (count(&postgres, "SELECT count(*) FROM payments WHERE closed_at IS NOT NULL").await == 45).then_some(())
    })
    .await;
    assert_eq!(count(&postgres, "SELECT count(*) FROM payment_attempts WHERE state = 'Begun'").await, 45);
    drop(payment);
}

/// However long a cancelled booking has been in doubt: its refund is written down by the look that finds the charge, for no
/// search goes back that far.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_booking_in_doubt_for_weeks_is_looked_at_and_old_events_are_removed() {
    let stage = stage().await;
    stage.providers.behave("stripe", json!({"chargeThenHang": true, "hide": true})).await;
    let (status, id, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 2)).await).await;
    assert_eq!(status, 202);
    let client = stage.postgres.connect().await;
    client
        .batch_execute(
            "UPDATE bookings SET status = 'Cancelled', cancel_reason = 'payment timed out', settle_at = NULL,
                                 pending_since = now() - interval '40 days', created_at = now() - interval '40 days';
             UPDATE payments SET created_at = now() - interval '40 days';
             UPDATE payment_attempts SET began_at = now() - interval '40 days';
             INSERT INTO webhook_events (provider, event_id, object_id, done_at) VALUES
                 ('stripe', 'old', 'o', now() - interval '40 days'), ('stripe', 'new', 'o', now())",
        )
        .await
        .unwrap();
    stage.providers.behave("stripe", json!({})).await;
    within(Duration::from_secs(120), "the money is given back", async || {
        let charges = stage.providers.charges().await;
        charges.iter().any(|charge| charge["key"] == json!(id) && charge["refunded"] == true).then_some(())
    })
    .await;
    assert_eq!(count(&stage.postgres, "SELECT count(*) FROM webhook_events").await, 1);
}

/// Every kind of difference, against real lists.
#[tokio::test(flavor = "multi_thread")]
async fn the_providers_are_compared_with_the_ledger() {
    let stage = stage().await;
    let (_, id, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 2)).await).await;
    stage.providers.behave("stripe", json!({"refuse": true})).await;
    let (_, by_paypal, _) = taken(stage.booking.post(&order(OPENING_NIGHT, 1)).await).await;
    stage.providers.behave("stripe", json!({})).await;
    assert_eq!(stage.providers.charged(&by_paypal).await, ["paypal"]);
    let settings = reconcile_settings(&stage.postgres, &stage.providers);
    // Some requests fail at one provider: those slices are asked for again.
    stage.providers.behave("paypal", json!({"failPercent": 2})).await;
    assert_eq!(reconcile::compare(&settings).await.unwrap(), Vec::<String>::new());
    let client = stage.postgres.connect().await;
    client.execute("UPDATE payments SET amount_cents = 1 WHERE key = $1", &[&id]).await.unwrap();
    let forget = "UPDATE payment_attempts SET charge_id = 'nobody' WHERE key = $1 AND provider = 'paypal'";
    client.execute(forget, &[&by_paypal]).await.unwrap();
    let found = reconcile::compare(&settings).await.unwrap();
    let words: Vec<_> = found.iter().map(|line| line.split(' ').next().unwrap()).collect();
    let mut sorted = words.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, ["AMOUNT_DIFFERS", "NOT_CHARGED_HERE", "NOT_CHARGED_THERE"], "{found:?}");
}

/// What went back, as the lists of both have it.
#[tokio::test(flavor = "multi_thread")]
async fn refunds_are_compared_with_the_ledger() {
    let stage = stage().await;
    let mut charges = Vec::new();
    let client = stage.postgres.connect().await;
    for provider in ["stripe", "paypal"] {
        let (_, id, stands) = taken(stage.booking.post(&order(OPENING_NIGHT, 2)).await).await;
        assert_eq!(stands, "Confirmed");
        let charge = "SELECT charge_id FROM payment_attempts WHERE key = $1 AND provider = $2";
        charges.push((provider, client.query_one(charge, &[&id, &provider]).await.unwrap().get::<_, String>(0)));
        stage.providers.behave("stripe", json!({"refuse": true})).await;
    }
    stage.providers.behave("stripe", json!({})).await;
    let settings = reconcile_settings(&stage.postgres, &stage.providers);
    assert_eq!(reconcile::compare(&settings).await.unwrap(), Vec::<String>::new());
    let expected = |rest: &str, cents: u64| {
        let line = |(provider, object): &(&str, String)| match rest {
            "REFUNDED_THERE" => format!("{provider} {object}: {cents} of 9000; no refund is written down"),
            _ => format!("{provider} {object}: the ledger says refunded"),
        };
        let mut all: Vec<_> = charges.iter().map(line).collect();
        all.sort();
        all
    };
    // Without the key, which is in front of that.
    let found = async |kind: &str| {
        let found = reconcile::compare(&settings).await.unwrap();
        assert!(found.iter().all(|line| line.starts_with(&format!("{kind} "))), "{found:?}");
        let mut rest: Vec<_> = found.iter().map(|line| line.splitn(3, ' ').nth(2).unwrap().to_owned()).collect();
        rest.sort();
        rest
    };
    let insert = "INSERT INTO refunds (key, provider, charge_id, reason, done_at)
                  SELECT key, provider, charge_id, 'by hand', now() FROM payment_attempts WHERE state = 'Charged'";
    client.execute(insert, &[]).await.unwrap();
    assert_eq!(found("NOT_REFUNDED_THERE").await, expected("NOT_REFUNDED_THERE", 0), "nothing went back there");
    client.execute("DELETE FROM refunds", &[]).await.unwrap();
    for (provider, object) in &charges {
        refund_by_hand(&stage, provider, object, 1_000).await;
    }
    assert_eq!(found("REFUNDED_THERE").await, expected("REFUNDED_THERE", 1_000));
    client.execute(insert, &[]).await.unwrap();
    assert_eq!(found("NOT_REFUNDED_THERE").await, expected("NOT_REFUNDED_THERE", 0));
}

#[derive(clap::Parser)]
struct Reconcile {
    #[command(flatten)]
    settings: reconcile::Settings,
}

/// For all that is written down and charged by now.
pub fn reconcile_settings(postgres: &Postgres, providers: &Providers) -> reconcile::Settings {
    let arguments = [
        "reconcile".to_owned(),
        "--database-url".to_owned(),
        postgres.url(),
        format!("--stripe-url=http://{}", providers.stripe),
        format!("--paypal-url=http://{}", providers.paypal),
        "--grace-minutes=0".to_owned(),
    ];
    <Reconcile as clap::Parser>::parse_from(arguments).settings
}

/// A thousand buyers of 500 seats, all at once, while connections are cut, rows are locked and providers change their ways.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_buyers_of_500_seats() {
    let stage = &stage().await;
    let client = stage.postgres.connect().await;
    let insert = "INSERT INTO events (id, name, capacity, available, price_cents)
                  VALUES (gen_random_uuid(), 'Final', 500, 500, 100) RETURNING id::text";
    let event: String = client.query_one(insert, &[]).await.unwrap().get(0);
    stage.booking.push(for_a_crowd(), FlagsSettings::default()).await;

    let until = Instant::now() + Duration::from_secs(120);
    // Each buyer comes back with the same key until somebody says yes or no.
    let buyers = join_all((0..1_000).map(|buyer| {
        let mut wanted = order(&event, 1);
        wanted["idempotencyKey"] = json!(format!("buyer-{buyer}"));
        async move {
            loop {
                // All buyers come from one address, which has a bound on its connections: one may be refused.
                let answer = stage.booking.try_to_post("/api/bookings", &wanted).await;
                let status = answer.map(|answer| answer.status().as_u16());
                if let Ok(status @ (201 | 202 | 409)) = status {
                    return status;
                }
                assert!(Instant::now() < until, "buyer {buyer} has no answer; the last one was {status:?}");
                tokio::time::sleep(Duration::from_millis(300 + buyer % 100)).await;
            }
        }
    }));
    let faults = async {
        let ways = [
            ("stripe", json!({"chargeThenHang": true})),
            ("stripe", json!({"refuse": true})),
            ("paypal", json!({"chargeThenFail": true, "hide": true})),
            ("stripe", json!({"failPercent": 50})),
            ("paypal", json!({})),
            ("stripe", json!({})),
        ];
        for (nth, (provider, way)) in ways.into_iter().enumerate() {
            stage.providers.behave(provider, way).await;
            let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                       WHERE datname = current_database() AND pid <> pg_backend_pid()";
            client.execute(cut, &[]).await.unwrap();
            stage.booking.reset_connections(&format!("intent-{nth}")).await;
            // Somebody holds the event for a while: statements that wait for it give up.
            let hold = "BEGIN; SELECT FROM events FOR UPDATE; SELECT pg_sleep(0.3); COMMIT";
            client.batch_execute(hold).await.unwrap();
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
    };
    let (answers, ()) = tokio::join!(buyers, faults);
    let yes = answers.iter().filter(|status| **status != 409).count();
    assert_eq!(yes, 500, "every seat is sold, and none twice");

    // A cut connection may leave a claim on a payment behind, for 70 s, and the next try is up to a minute later.
    within(Duration::from_secs(300), "every payment is settled", async || {
        let open = count(&stage.postgres, "SELECT count(*) FROM bookings WHERE status = 'PaymentPending'").await;
        (open == 0).then_some(())
    })
    .await;
    let books = "SELECT (SELECT sum(available)::bigint FROM events WHERE name = 'Final') * 1000000
                 + (SELECT count(*) FROM bookings b JOIN events e ON e.id = b.event_id
                    WHERE e.name = 'Final' AND b.status = 'Confirmed') * 1000
                 + (SELECT count(DISTINCT booking_id) FROM outbox)";
    assert_eq!(count(&stage.postgres, books).await, 500_500, "no seat is free, 500 are confirmed, 500 are told");
    let confirmed = client.query("SELECT id::text FROM bookings WHERE status = 'Confirmed'", &[]).await.unwrap();
    let mut confirmed: Vec<String> = confirmed.iter().map(|row| row.get(0)).collect();
    let charges = stage.providers.charges().await;
    let mut charged: Vec<String> = charges.iter().map(|charge| charge["key"].as_str().unwrap().to_owned()).collect();
    confirmed.sort();
    charged.sort();
    assert_eq!(charged, confirmed, "who has a seat has paid once, and nobody else has paid");
}
