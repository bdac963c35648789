//! What waits too long is said: bookings for their payment, and money that is owed.

use crate::support::app::{App, quick_policy};
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use crate::support::{eventually, nobody};
use contract::{CheckReport, CheckStatus, FlagsSettings, HealthCheckSettings, PolicySettings};
use rstest::rstest;
use std::net::SocketAddr;

/// The check of this name runs often.
fn with_check(name: &str, mut policy: PolicySettings) -> PolicySettings {
    let check = HealthCheckSettings { interval_ms: 100, timeout_ms: 2_000, ..Default::default() };
    policy.health_checks.insert(name.to_owned(), check);
    policy
}

async fn gauge(app: &App, name: &str) -> i64 {
    let text = app.metrics().await;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()).unwrap()
}

/// Bookings that wait, and what is wrong with them.
struct Stage {
    postgres: Postgres,
    booking: App,
}

impl Stage {
    /// A pod with these settings.
    async fn start(settings: &[(&'static str, &str)]) -> Self {
        let postgres = Postgres::start().await;
        let booking = App::booking_with(&postgres, settings).await;
        booking.push(with_check("payments-pending", quick_policy()), FlagsSettings::default()).await;
        Self { postgres, booking }
    }

    async fn execute(&self, sql: &str) {
        self.postgres.connect().await.batch_execute(sql).await.unwrap();
    }

    /// A booking that has waited for so many seconds.
    async fn waits(&self, seconds: u32) {
        self.execute(&format!(
            "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, amount_cents, settle_at, pending_since)
             SELECT gen_random_uuid(), id, 'ann', 1, 'PaymentPending', 'key ' || {seconds}, 4500, 'infinity',
                    now() - {seconds} * interval '1 second'
             FROM events LIMIT 1"
        ))
        .await;
    }

    /// Its buyer has been asked to act for so many seconds, and that is the state now.
    async fn is_for_its_buyer(&self, seconds: u32, state: &str) {
        self.execute(&format!(
            "INSERT INTO payments (key, amount_cents, currency) SELECT id::text, 4500, 'eur' FROM bookings ON CONFLICT DO NOTHING;
             INSERT INTO payment_attempts (key, provider, state, object_id, waits_since)
             SELECT key, 'stripe', '{state}', 'o', now() - {seconds} * interval '1 second' FROM payments
             ON CONFLICT (key, provider) DO UPDATE SET state = excluded.state, waits_since = excluded.waits_since"
        ))
        .await;
    }

    async fn is(&self, what: &str, status: CheckStatus) -> CheckReport {
        self.booking.check("payments-pending", what, |check| check.status == status).await
    }

    /// Until the gauge of the age has one of these values.
    async fn age_is(&self, values: std::ops::Range<i64>) {
        eventually("the gauge has it", async || {
            values.contains(&gauge(&self.booking, "bookings_payment_pending_age_seconds").await).then_some(())
        })
        .await;
    }
}

async fn nowhere() -> String {
    let address: SocketAddr = nobody().await;
    format!("http://{address}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booking_that_waits_too_long_for_its_payment_is_said() {
    let url = nowhere().await;
    let stage = Stage::start(&[("--payment-url", url.as_str())]).await;
    stage.waits(550).await;
    stage.age_is(550..600).await;
    stage.is("it is not late yet", CheckStatus::Healthy).await;
    stage.waits(610).await;
    let check = stage.is("it is late", CheckStatus::Degraded).await;
    assert!(check.message.contains("2 bookings wait for their payment, 0 of them for their buyers"), "{check:?}");
    stage.waits(3_610).await;
    stage.is("a person must see to it", CheckStatus::Unhealthy).await;
    stage.age_is(3_610..3_700).await;
    assert_eq!(gauge(&stage.booking, "bookings_payment_pending").await, 3);
}

/// Many buyers never do what their bank asks for: with a steady stream of them, all was Degraded all night.
#[tokio::test(flavor = "multi_thread")]
async fn the_time_that_a_buyer_has_to_act_is_nothing_wrong() {
    let url = nowhere().await;
    let stage = Stage::start(&[("--payment-url", url.as_str())]).await;
    stage.waits(880).await;
    let check = stage.is("it is late", CheckStatus::Degraded).await;
    assert_eq!(check.data["waitingForBuyers"], 0);
    stage.is_for_its_buyer(870, "NeedsBuyer").await;
    let check = stage.is("it waits for its buyer", CheckStatus::Healthy).await;
    assert_eq!((&check.data["waitingForBuyers"], &check.data["oldestSeconds"]), (&1.into(), &0.into()));
    stage.age_is(0..1).await;
    assert_eq!(gauge(&stage.booking, "bookings_payment_pending_buyers").await, 1);
    // The buyer has acted at the last moment.
    stage.is_for_its_buyer(890, "Confirming").await;
    let check = stage
        .booking
        .check("payments-pending", "it is being confirmed", |check| check.data["waitingForBuyers"] == 0)
        .await;
    assert_eq!(check.status, CheckStatus::Healthy);
    // The payment should have been ended by then.
    stage.execute("UPDATE bookings SET pending_since = now() - interval '1 day'").await;
    stage.is_for_its_buyer(900 + 610, "NeedsBuyer").await;
    stage.is("its time is over", CheckStatus::Degraded).await;
    stage.is_for_its_buyer(900 + 3_610, "NeedsBuyer").await;
    stage.is("nobody ends it", CheckStatus::Unhealthy).await;
}

/// What waits since before is not hidden by the missing setting.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_payment_service_the_worse_is_said() {
    let stage = Stage::start(&[("--charge-nothing", "no")]).await;
    stage.is("orders are refused", CheckStatus::Degraded).await;
    stage.waits(3_610).await;
    let check = stage.is("nobody asks for it", CheckStatus::Unhealthy).await;
    assert!(check.message.contains("PAYMENT_URL") && check.message.contains("1 bookings wait"), "{check:?}");
}

#[rstest]
#[case::young(850, CheckStatus::Healthy)]
#[case::late(910, CheckStatus::Degraded)]
#[case::too_late(86_410, CheckStatus::Unhealthy)]
#[tokio::test(flavor = "multi_thread")]
async fn money_that_does_not_go_back_is_said(#[case] seconds: i64, #[case] status: CheckStatus) {
    let (postgres, providers) = (Postgres::start().await, Providers::start());
    App::start(&postgres, "pod-1").await.end().await;
    let client = postgres.connect().await;
    let owed = format!(
        "INSERT INTO refunds (key, provider, charge_id, reason, created_at, next_at, last_error)
         VALUES ('k', 'stripe', 'old', 'cancelled', now() - {seconds} * interval '1 second', 'infinity', 'no money left'),
                ('l', 'stripe', 'new', 'cancelled', now(), 'infinity', NULL)"
    );
    client.batch_execute(&owed).await.unwrap();
    let payment = App::payment(&postgres, &providers).await;
    payment.push(with_check("refunds", PolicySettings::default()), FlagsSettings::default()).await;
    let check = payment.check("refunds", "its age is said", |check| check.message.starts_with("2 refunds")).await;
    assert_eq!((check.status, &check.data["open"]), (status, &2.into()));
    assert!(check.message.ends_with("the last error of it: no money left"), "{check:?}");
    eventually("the gauge has it", async || {
        (seconds..seconds + 60).contains(&gauge(&payment, "refunds_oldest_seconds").await).then_some(())
    })
    .await;
    client.batch_execute("UPDATE refunds SET done_at = now()").await.unwrap();
    payment.check("refunds", "all is back", |check| check.status == CheckStatus::Healthy).await;
}
