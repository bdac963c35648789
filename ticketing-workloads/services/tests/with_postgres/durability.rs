//! What a buyer was told stays so: after a crash of the server, and where commits wait for a replica.

use crate::support::app::{App, OPENING_NIGHT, order, quick_policy};
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use crate::support::{eventually, nobody};
use contract::{DependencySettings, FlagsSettings, ManualState};
use serde_json::{Value, json};

/// One attempt for each call: what it finds is told.
async fn without_retries(app: &App) {
    let mut policy = quick_policy();
    policy.dependencies.get_mut("database").unwrap().retry.num_retries = 0;
    // The circuit is not to answer in place of the database.
    policy.dependencies.get_mut("database").unwrap().circuit_breaker.manual_state = ManualState::Closed;
    app.push(policy, FlagsSettings::default()).await;
}

fn order_with_key(key: &str) -> Value {
    let mut wanted = order(OPENING_NIGHT, 2);
    wanted["idempotencyKey"] = json!(key);
    wanted
}

/// The status of a booking, as it is in the server at this moment.
async fn status_of(postgres: &Postgres, column: &str, value: &str) -> Option<String> {
    let query = format!("SELECT status FROM bookings WHERE {column}::text = $1");
    postgres.connect().await.query_opt(&query, &[&value]).await.unwrap().map(|row| row.get(0))
}

/// The commit that takes the seats waits for nothing; the answer waits for the replica.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_told_before_the_replica_has_it() {
    let postgres = Postgres::alone().await;
    let app = App::start(&postgres, "pod-1").await;
    app.schema_is_done().await;
    without_retries(&app).await;
    let reserve = async |key: &str| {
        let answer = app.post_to("/api/reservations", &order_with_key(key)).await;
        answer.json::<Value>().await.unwrap()["bookingId"].as_str().unwrap().to_owned()
    };
    let (bought, given_back) = (reserve("bought").await, reserve("given back").await);
    postgres.wait_for_replica(true).await;

    let wanted = order_with_key("mine");
    for _ in 0..4 {
        let answer = app.post(&wanted).await;
        assert_ne!(answer.status(), 201, "first with nothing there, then with a booking of which nobody was told");
    }
    assert_eq!(app.post(&order_with_key("other")).await.status(), 504);
    let id: String = {
        let query = "SELECT id::text FROM bookings WHERE idempotency_key = 'mine' AND status = 'Confirmed'";
        postgres.connect().await.query_one(query, &[]).await.unwrap().get(0)
    };
    assert_ne!(app.get(&format!("/api/bookings/{id}")).await.status(), 200, "nor who reads it");

    let confirm = format!("/api/reservations/{bought}/confirm");
    for _ in 0..4 {
        assert_ne!(app.post_to(&confirm, &json!({})).await.status(), 201);
    }
    for _ in 0..4 {
        assert_ne!(app.delete(&format!("/api/reservations/{given_back}")).await.status(), 200);
    }

    postgres.wait_for_replica(false).await;
    eventually("all of them are told", async || {
        let told = app.post(&wanted).await.status() == 201
            && app.get(&format!("/api/bookings/{id}")).await.status() == 200
            && app.post_to(&confirm, &json!({})).await.status() == 201
            && app.delete(&format!("/api/reservations/{given_back}")).await.status() == 200;
        told.then_some(())
    })
    .await;
    let taken = "SELECT capacity - available FROM events";
    assert_eq!(postgres.connect().await.query_one(taken, &[]).await.unwrap().get::<_, i32>(0), 6, "three are bought");
}

/// Has the second commit of an order wait for a minute.
const SLOW_FLUSH: &str = "
    CREATE FUNCTION public.pg_logical_emit_message(boolean, text, text) RETURNS pg_lsn LANGUAGE plpgsql AS 'BEGIN
        PERFORM pg_sleep(60); RETURN pg_catalog.pg_logical_emit_message($1, $2, $3); END'";

/// Between the commit that takes the seats and the one that waits for the disk, the server crashes: the seats are free
/// again, nobody was told that they are taken, and the same key takes them once.
#[tokio::test(flavor = "multi_thread")]
async fn seats_that_a_crash_takes_away_were_told_to_nobody() {
    let postgres = Postgres::alone().await;
    let app = App::start(&postgres, "pod-1").await;
    app.schema_is_done().await;
    without_retries(&app).await;
    let client = postgres.connect().await;
    client.batch_execute("ALTER DATABASE postgres SET search_path = public, pg_catalog").await.unwrap();
    client.batch_execute(SLOW_FLUSH).await.unwrap();
    drop(client);
    app.reset_connections("intent-1").await;
    let held = postgres.hold_background_writes().await;

    let wanted = order_with_key("mine");
    let answer = app.post(&wanted).await;
    assert_eq!(answer.status(), 504);
    assert_eq!(status_of(&postgres, "idempotency_key", "mine").await.as_deref(), Some("Confirmed"), "others see it");
    postgres.crash().await;
    drop(held);
    assert_eq!(status_of(&postgres, "idempotency_key", "mine").await, None, "it was not on the disk");

    postgres.connect().await.batch_execute("DROP FUNCTION public.pg_logical_emit_message").await.unwrap();
    app.reset_connections("intent-2").await;
    eventually("it is booked", async || (app.post(&wanted).await.status() == 201).then_some(())).await;
    postgres.crash().await;
    assert_eq!(status_of(&postgres, "idempotency_key", "mine").await.as_deref(), Some("Confirmed"));
    let taken = "SELECT capacity - available FROM events";
    assert_eq!(postgres.connect().await.query_one(taken, &[]).await.unwrap().get::<_, i32>(0), 2, "taken once");
}

/// A buyer who was told that the booking has failed must not be charged later.
#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_a_crash_may_bring_back_is_not_told_to_have_failed() {
    let postgres = Postgres::alone().await;
    let app = App::paid_booking(&postgres, nobody().await).await;
    app.schema_is_done().await;
    let mut policy = quick_policy();
    policy.dependencies.get_mut("database").unwrap().retry.num_retries = 0;
    // No `Queue`: where payment is away, the booking is given up.
    let mut payment = DependencySettings { fallback: Vec::new(), ..Default::default() };
    payment.retry.num_retries = 0;
    policy.dependencies.insert("payment".to_owned(), payment);
    app.push(policy, FlagsSettings::default()).await;

    let first = app.post(&order_with_key("given up")).await;
    assert_eq!(first.status(), 503, "it is given up at once");
    // From here on, the commits of a cancellation and of what waits for it are apart.
    let client = postgres.connect().await;
    let slow = SLOW_FLUSH.replace(
        "pg_sleep(60)",
        "pg_sleep(CASE WHEN EXISTS (SELECT FROM bookings \
        WHERE status = ''Cancelled'' AND user_id = ''ann'' AND cancel_reason = ''payment unavailable'' \
        AND idempotency_key LIKE ''mine%'') THEN 60 ELSE 0 END)",
    );
    client.batch_execute("ALTER DATABASE postgres SET search_path = public, pg_catalog").await.unwrap();
    client.batch_execute(&slow).await.unwrap();
    app.reset_connections("intent-1").await;
    let answer = app.post(&order_with_key("mine")).await;
    assert_ne!(answer.status(), 503, "{}", answer.text().await.unwrap());
    let cancelled = "SELECT status FROM bookings WHERE idempotency_key LIKE 'mine%'";
    let status: String = client.query_one(cancelled, &[]).await.unwrap().get(0);
    assert_eq!(status, "Cancelled", "others see it");
}

/// A confirmation that is repeated finds its booking confirmed, by a commit that the replica has not.
#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_confirmation_waits_for_the_replica_too() {
    let (postgres, other) = (Postgres::alone().await, Postgres::start().await);
    let providers = Providers::start();
    let payment = App::payment(&other, &providers).await;
    let app = App::paid_booking(&postgres, payment.address).await;
    app.schema_is_done().await;
    without_retries(&app).await;
    providers.behave("stripe", json!({"latencyMs": 1_500})).await;
    let wanted = order_with_key("mine");
    let pending = async {
        eventually("its payment is under way", async || status_of(&postgres, "idempotency_key", "mine").await).await;
        postgres.wait_for_replica(true).await;
    };
    let (answer, ()) = tokio::join!(app.post(&wanted), pending);
    assert_eq!(answer.status(), 202, "{}", answer.text().await.unwrap());
    // The attempt of which nobody knows is cancelled in the end, and PostgreSQL leaves it committed here alone.
    eventually("others see it", async || {
        (status_of(&postgres, "idempotency_key", "mine").await.as_deref() == Some("Confirmed")).then_some(())
    })
    .await;
    assert_ne!(app.post(&wanted).await.status(), 201);
}
