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
        ('old confirmed', 'Confirmed', NULL, '500 days'), ('old pending', 'PaymentPending', NULL, '500 days'),
        ('old expired in doubt', 'Cancelled', 'expired', '500 days'), ('old owed', 'Cancelled', 'declined', '500 days'),
        ('old refund', 'Cancelled', 'declined', '500 days'), ('old refunded', 'Cancelled', 'declined', '500 days'))
        AS b (name, status, reason, age);
    INSERT INTO outbox (booking_id, kind, done_at)
    SELECT id, kind, now() - age::interval FROM bookings, (VALUES ('BookingConfirmed', '29 days'), ('Ticket', '31 days'))
        AS o (kind, age) WHERE user_id = 'old confirmed';
    INSERT INTO outbox (booking_id, kind, done_at)
    SELECT id, 'Ticket', now() - interval '31 days' FROM bookings WHERE user_id = 'old declined';
    INSERT INTO dead_letters SELECT o.id, 'refused' FROM outbox o JOIN bookings b ON b.id = o.booking_id
    WHERE b.user_id = 'old declined';
    CREATE TEMPORARY TABLE tried AS
    SELECT COALESCE((SELECT id::text FROM bookings WHERE user_id = name), name) AS key, name, state, created::interval,
           COALESCE(began, created)::interval AS began
    FROM (VALUES ('charged', 'Charged', '401 days', NULL), ('declined', 'Declined', '401 days', NULL),
                 ('charged twice', 'Charged', '401 days', NULL),
                 ('in doubt', 'Begun', '401 days', NULL), ('waits for its buyer', 'NeedsBuyer', '401 days', NULL),
                 ('of version 0.1', 'NotCharged', '401 days', NULL), ('new', 'Charged', '399 days', NULL),
                 ('charged lately', 'Charged', '401 days', '399 days'), ('old pending', 'Charged', '401 days', NULL),
                 ('old expired in doubt', 'Confirming', '401 days', NULL), ('old owed', 'Charged', '401 days', NULL),
                 ('old refund', 'Charged', '401 days', NULL), ('old refunded', 'Charged', '401 days', NULL))
        AS t (name, state, created, began);
    INSERT INTO payments (key, amount_cents, currency, created_at) SELECT key, 100, 'eur', now() - created FROM tried;
    INSERT INTO payment_attempts (key, provider, state, object_id, charge_id, began_at)
    SELECT key, 'stripe', state, name, CASE WHEN state = 'Charged' THEN name END, now() - began FROM tried;
    INSERT INTO refunds (key, provider, charge_id, reason, next_at, done_at)
    SELECT key, 'stripe', name, 'cancelled', 'infinity'::timestamptz, CASE name WHEN 'old refunded' THEN now() - interval '400 days' END
    FROM tried WHERE name IN ('old refund', 'old refunded')
    UNION ALL SELECT key, 'stripe', 'another', 'charged besides', 'infinity'::timestamptz, NULL FROM tried WHERE name = 'charged twice'";

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
    let expected = [
        "new expired",
        "old confirmed",
        "old declined",
        "old expired in doubt",
        "old owed",
        "old pending",
        "old refund",
        "old refunded",
    ];
    eventually("old reservations are gone", async || (names(&postgres, bookings).await == expected).then_some(()))
        .await;
    let mails = "SELECT o.kind || ' ' || b.user_id FROM outbox o JOIN bookings b ON b.id = o.booking_id ORDER BY 1";
    let expected = ["BookingConfirmed old confirmed", "Ticket old declined"];
    eventually("old mails are gone", async || (names(&postgres, mails).await == expected).then_some(())).await;
    let payments =
        "SELECT COALESCE(b.user_id, p.key) FROM payments p LEFT JOIN bookings b ON b.id::text = p.key ORDER BY 1";
    let expected = [
        "charged lately",
        "charged twice",
        "in doubt",
        "new",
        "of version 0.1",
        "old expired in doubt",
        "old owed",
        "old pending",
        "old refund",
        "waits for its buyer",
    ];
    eventually("old payments are gone", async || (names(&postgres, payments).await == expected).then_some(())).await;
    let refunds = names(&postgres, "SELECT charge_id FROM refunds ORDER BY 1").await;
    assert_eq!(refunds, ["another", "old refund", "old refunded"], "what was given back can be looked up");
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
