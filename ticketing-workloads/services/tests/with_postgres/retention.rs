//! What is old and done is deleted, and nothing else.

use crate::support::app::App;
use crate::support::eventually;
use crate::support::mails::Mails;
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;

async fn names(postgres: &Postgres, query: &str) -> Vec<String> {
    postgres.connect().await.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

const OLD: &str = "
    INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, cancel_reason, settle_at, created_at)
    SELECT gen_random_uuid(), e.id, name, 1, status, name, reason,
           CASE status WHEN 'PaymentPending' THEN 'infinity'::timestamptz END, now() - age::interval
    FROM (SELECT id FROM events LIMIT 1) e, (VALUES
        ('old expired', 'Cancelled', 'expired', '31 days'), ('old given back', 'Cancelled', 'given back', '31 days'),
        ('new expired', 'Cancelled', 'expired', '29 days'), ('old declined', 'Cancelled', 'declined', '500 days'),
        ('old confirmed', 'Confirmed', NULL, '500 days'), ('old pending', 'PaymentPending', NULL, '500 days'))
        AS b (name, status, reason, age);
    INSERT INTO outbox (booking_id, kind, done_at)
    SELECT id, kind, now() - age::interval FROM bookings, (VALUES ('BookingConfirmed', '29 days'), ('Ticket', '31 days'))
        AS o (kind, age) WHERE user_id = 'old confirmed';
    INSERT INTO outbox (booking_id, kind, done_at)
    SELECT id, 'Ticket', now() - interval '31 days' FROM bookings WHERE user_id = 'old declined';
    INSERT INTO dead_letters SELECT o.id, 'refused' FROM outbox o JOIN bookings b ON b.id = o.booking_id
    WHERE b.user_id = 'old declined';
    INSERT INTO payments (key, amount_cents, currency, created_at)
    SELECT COALESCE((SELECT id::text FROM bookings WHERE user_id = key), key), 100, 'eur', now() - age::interval
    FROM (VALUES ('charged', '401 days'), ('in doubt', '401 days'), ('new', '399 days'), ('old pending', '401 days'))
        AS p (key, age);
    INSERT INTO payment_attempts (key, provider, state, charge_id)
    SELECT key, 'stripe', CASE key WHEN 'in doubt' THEN 'Begun' ELSE 'Charged' END,
           CASE WHEN key <> 'in doubt' THEN 'c' END FROM payments";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_and_done_is_deleted_and_nothing_else() {
    let postgres = Postgres::start().await;
    let first = App::start(&postgres, "pod-1").await;
    first.schema_is_done().await;
    postgres.connect().await.batch_execute(OLD).await.unwrap();
    let (mails, providers) = (Mails::start(), Providers::start());
    let booking = App::booking_with(&postgres, &[]).await;
    let notification = App::notification(&postgres, &mails).await;
    let untouched = App::payment(&postgres, &providers).await;
    let payment = App::payment_over(&postgres.url(), &[("--keep-payments-days", "400")], &postgres, &providers).await;
    let bookings = "SELECT user_id FROM bookings ORDER BY 1";
    let expected = ["new expired", "old confirmed", "old declined", "old pending"];
    eventually("old reservations are gone", async || (names(&postgres, bookings).await == expected).then_some(()))
        .await;
    let mails = "SELECT o.kind || ' ' || b.user_id FROM outbox o JOIN bookings b ON b.id = o.booking_id ORDER BY 1";
    let expected = ["BookingConfirmed old confirmed", "Ticket old declined"];
    eventually("old mails are gone", async || (names(&postgres, mails).await == expected).then_some(())).await;
    let payments =
        "SELECT COALESCE(b.user_id, p.key) FROM payments p LEFT JOIN bookings b ON b.id::text = p.key ORDER BY 1";
    let expected = ["in doubt", "new", "old pending"];
    eventually("old payments are gone", async || (names(&postgres, payments).await == expected).then_some(())).await;
    let metrics = untouched.get("/metrics").await.text().await.unwrap();
    assert!(!metrics.contains("retention_deleted_total{"), "payments are kept unless somebody says how long");
    for (app, what) in [(&booking, "cancelled reservations"), (&notification, "sent mails"), (&payment, "payments")] {
        eventually("it is counted", async || {
            let metrics = app.get("/metrics").await.text().await.unwrap();
            let name = format!("retention_deleted_total{{what=\"{what}\"}}");
            metrics.lines().any(|line| line.starts_with(&name)).then_some(())
        })
        .await;
    }
}
