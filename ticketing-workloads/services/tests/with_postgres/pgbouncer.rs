//! A real PgBouncer in transaction mode before the database: each transaction may get another session.

use crate::support::app::{App, order, quick_policy};
use crate::support::eventually;
use crate::support::pgbouncer::PgBouncer;
use crate::support::postgres::{Postgres, settings};
use crate::support::providers::Providers;
use contract::{CheckStatus, FlagsSettings};
use futures::future::join_all;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use ticketing_services::booking::cleanup;
use ticketing_services::database::migrations::{self, Migration, Progress, State};
use ticketing_services::notification::requeue;
use ticketing_services::payment::{Urls, reconcile};

const TRANSACTION: (&str, &str) = ("--database-pooler", "transaction");

/// Statements that were prepared in one session were asked for in another: nearly every order was refused.
#[tokio::test(flavor = "multi_thread")]
async fn orders_go_through_pgbouncer_in_transaction_mode() {
    let postgres = Postgres::start().await;
    let pooler = PgBouncer::start(&postgres).await;
    let url = pooler.url();
    let (one, two) = tokio::join!(App::booking_at(&url, &[TRANSACTION]), App::booking_at(&url, &[TRANSACTION]));
    for pod in [&one, &two] {
        pod.push(quick_policy(), FlagsSettings::default()).await;
        pod.check("schema", "it was migrated through the pooler", |check| check.status == CheckStatus::Healthy).await;
    }
    let client = postgres.connect().await;
    let insert = "INSERT INTO events (id, name, capacity, available)
                  VALUES (gen_random_uuid(), 'Test', 1000, 1000) RETURNING id::text";
    let event: String = client.query_one(insert, &[]).await.unwrap().get(0);
    let orders = (0..160).map(|nth| {
        let (pod, event) = (if nth % 2 == 0 { &one } else { &two }, &event);
        async move {
            // Two pods at once, with as many orders as their limits allow.
            let mut wanted = order(event, 1);
            wanted["idempotencyKey"] = json!(format!("order-{nth}"));
            if nth % 4 == 0 {
                let held = pod.post_to("/api/reservations", &wanted).await;
                let status = held.status().as_u16();
                let id = held.json::<Value>().await.unwrap()["bookingId"].as_str().unwrap_or_default().to_owned();
                if status != 201 {
                    return status;
                }
                return pod.post_to(&format!("/api/reservations/{id}/confirm"), &json!({})).await.status().as_u16();
            }
            pod.post(&wanted).await.status().as_u16()
        }
    });
    let mut orders: Vec<_> = orders.collect();
    while !orders.is_empty() {
        let some: Vec<_> = orders.drain(..orders.len().min(80)).collect();
        assert!(join_all(some).await.into_iter().all(|status| status == 201));
    }
    let sold = "SELECT available FROM events WHERE id::text = $1";
    assert_eq!(client.query_one(sold, &[&event]).await.unwrap().get::<_, i32>(0), 840);
    for name in ["database", "booking-consistency"] {
        one.check(name, "all is well", |check| check.status == CheckStatus::Healthy).await;
    }
    client.batch_execute("UPDATE events SET available = available - 1 WHERE name = 'Test'").await.unwrap();
    let settings = settings(&["--database-url", &pooler.url(), "--database-pooler", "transaction"]);
    assert_eq!(cleanup::run(&settings).await.unwrap().repaired_events, 1);
}

/// Claims, attempts and lists go the same way.
#[tokio::test(flavor = "multi_thread")]
async fn payments_and_events_go_through_pgbouncer_in_transaction_mode() {
    let postgres = Postgres::start().await;
    let pooler = PgBouncer::start(&postgres).await;
    let providers = Providers::start();
    let payment = App::payment_over(&pooler.url(), &[TRANSACTION], &postgres, &providers).await;
    let catalog = App::catalog_over(&pooler.url(), &[TRANSACTION]).await;
    // At once: one after the other, they would all get the same session.
    let asks = (0..20).map(async |nth| {
        let url = format!("http://{}/api/payments", payment.address);
        let request = payment.client.post(url).header("Idempotency-Key", format!("key-{nth}"));
        let answer = request.body(json!({"amountCents": 100, "currency": "eur"}).to_string()).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
        let events: Value = catalog.get("/api/events").await.json().await.unwrap();
        assert_eq!(events["total"], 1, "{events}");
    });
    join_all(asks).await;
    eventually("the check is healthy", async || {
        Some(payment.health().await.checks["database"].status).filter(|status| *status == CheckStatus::Healthy)
    })
    .await;
    let compared = reconcile::Settings {
        database: settings(&["--database-url", &pooler.url(), "--database-pooler", "transaction"]),
        urls: Urls {
            stripe_url: format!("http://{}", providers.stripe),
            paypal_url: format!("http://{}", providers.paypal),
            stripe_api_key_file: None,
            paypal_client_id_file: None,
            paypal_client_secret_file: None,
            provider_ca_file: None,
        },
        since: Duration::from_secs(3_600),
        grace_minutes: 0,
    };
    for found in join_all((0..4).map(|_| reconcile::compare(&compared))).await {
        // Nobody has booked anything for them; all else is the same.
        let found = found.unwrap();
        assert_eq!(found.len(), 20, "{found:?}");
        assert!(found.iter().all(|line| line.starts_with("NO_BOOKING ")), "{found:?}");
    }
}

/// Statements that were prepared stayed in the pooler's sessions, and the next run met them there.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_go_back_through_pgbouncer_in_transaction_mode() {
    let postgres = Postgres::start().await;
    App::start(&postgres, "pod-1").await.schema_is_done().await;
    let pooler = PgBouncer::start(&postgres).await;
    let dead = "WITH sold AS (
            INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key)
            SELECT gen_random_uuid(), id, 'ann', 1, 'Confirmed', gen_random_uuid()::text
            FROM events, generate_series(1, 8) RETURNING id
        ), told AS (
            INSERT INTO outbox (booking_id, kind, done_at) SELECT id, 'Ticket', now() FROM sold RETURNING id, booking_id
        )
        INSERT INTO dead_letters SELECT id, 'refused' FROM told RETURNING (SELECT booking_id FROM told WHERE id = outbox_id)";
    let client = postgres.connect().await;
    let dead: Vec<uuid::Uuid> = client.query(dead, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    let runs = dead.into_iter().map(|booking| requeue::Settings {
        database: settings(&["--database-url", &pooler.url(), "--database-pooler", "transaction"]),
        choice: requeue::Choice { booking: Some(booking), ..Default::default() },
        dry_run: false,
    });
    let runs = runs.map(|settings| async move { requeue::run(&settings, &mut |_| {}).await.unwrap() });
    assert_eq!(join_all(runs).await, [1; 8]);
}

/// With the bounds that its role is to have behind a pooler, an index could not be built, and was begun again for ever.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_built_past_the_pooler_where_the_role_has_bounds() {
    let postgres = Postgres::start().await;
    let bounds = "ALTER DATABASE {} SET lock_timeout = '500ms'; ALTER DATABASE {} SET statement_timeout = '2s'";
    postgres.connect().await.batch_execute(&bounds.replace("{}", &postgres.database)).await.unwrap();
    // All of its sessions have them.
    let pooler = PgBouncer::start(&postgres).await;
    let one = App::booking_at(&pooler.url(), &[TRANSACTION]).await;
    one.push(quick_policy(), FlagsSettings::default()).await;
    let check = one.check("schema", "it says what to do", |check| check.status == CheckStatus::Unhealthy).await;
    assert!(check.message.contains("set DATABASE_MIGRATION_URL"), "{}", check.message);
    let direct = postgres.url();
    let two = App::booking_at(&pooler.url(), &[TRANSACTION, ("--database-migration-url", &direct)]).await;
    for pod in [&one, &two] {
        pod.push(quick_policy(), FlagsSettings::default()).await;
        pod.check("schema", "one pod does it for all", |check| check.status == CheckStatus::Healthy).await;
    }
}

/// The session that a step has is known for as long as it has it: nobody else's blocker is named.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_behind_a_pooler_names_only_its_own_blocker() {
    const TABLE: Migration = Migration { version: 1, name: "table", sql: "CREATE TABLE sold (id integer)" };
    const COLUMN: Migration = Migration { version: 2, name: "column", sql: "ALTER TABLE sold ADD COLUMN seat integer" };
    let postgres = Postgres::start().await;
    let pooler = PgBouncer::start(&postgres).await;
    let url = pooler.url();
    let settings = settings(&["--database-url", &url, "--database-pooler", "transaction"]);
    let connector = settings.connector("migration").unwrap();
    migrations::run(&connector, "test", &[TABLE], &Progress::default()).await.unwrap();
    let (reader, other) = (postgres.connect().await, postgres.connect().await);
    reader.batch_execute("SET application_name = 'report'; BEGIN; SELECT * FROM sold").await.unwrap();
    other.batch_execute("SET application_name = 'other'; CREATE TABLE busy (); BEGIN; LOCK TABLE busy").await.unwrap();
    // More clients than the pooler has sessions take turns in them, and wait for somebody else.
    let others: Vec<_> = (0..12)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move {
                let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
                tokio::spawn(connection);
                loop {
                    let wait = "BEGIN; SET LOCAL lock_timeout = '70ms'; LOCK TABLE busy";
                    assert!(client.batch_execute(wait).await.is_err());
                    client.batch_execute("ROLLBACK").await.unwrap();
                }
            })
        })
        .collect();
    let progress = Progress::default();
    let steps: &'static [Migration] = &[TABLE, COLUMN];
    let migration = tokio::spawn(migrations::run_until_done(connector, "test", steps, progress.clone()));
    let began = Instant::now();
    let mut named = false;
    while began.elapsed() < Duration::from_secs(if named { 3 } else { 30 }) {
        if let State::UnderWay(message) = progress.state() {
            assert!(!message.contains("(other"), "{message}");
            named |= message.contains("(report");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(named, "its own one is");
    for other in others {
        other.abort();
    }
    reader.batch_execute("COMMIT").await.unwrap();
    migration.await.unwrap();
}
