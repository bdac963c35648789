//! Bookings that wait for their payment: how many, and for how long. A buyer has time to act (3-D Secure, an approval), and many
//! never do: what waits for its buyer within that time is counted apart, and nothing is wrong with it.

use super::seats::{self, Waiting};
use crate::database::Database;
use contract::CheckStatus;
use prometheus_client::metrics::gauge::Gauge;
use resilience::{Check, CheckOutcome, Resilience};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// Time between two measurements.
const EVERY: Duration = Duration::from_secs(5);
/// Age of the oldest from which on something is wrong, and from which on a person must see to it.
const LATE: Duration = Duration::from_secs(600);
const TOO_LATE: Duration = Duration::from_secs(3_600);

pub struct Pending {
    database: Arc<Database>,
    /// Whether orders that have a price are taken.
    payments: bool,
    /// How long a buyer has to act.
    buyer_limit: Duration,
    count: Gauge,
    for_buyers: Gauge,
    age: Gauge,
}

impl Pending {
    pub fn new(database: &Arc<Database>, resilience: &Resilience, payments: bool, buyer_limit: Duration) -> Arc<Self> {
        let (count, for_buyers, age) = (Gauge::default(), Gauge::default(), Gauge::default());
        resilience.metrics().register(|registry| {
            registry.register("bookings_payment_pending", "Bookings that wait for their payment", count.clone());
            let help = "Those of them that wait for their buyers to act";
            registry.register("bookings_payment_pending_buyers", help, for_buyers.clone());
            let help = "Time that the oldest of them has been waiting, without the time that its buyer had to act";
            registry.register("bookings_payment_pending_age_seconds", help, age.clone());
        });
        Arc::new(Self { database: Arc::clone(database), payments, buyer_limit, count, for_buyers, age })
    }

    /// Keeps the figures up to date, for as long as it is polled.
    pub fn measure(self: &Arc<Self>) -> impl Future<Output = ()> + use<> {
        let own = Arc::clone(self);
        async move {
            loop {
                let limit = own.buyer_limit;
                if let Ok(waiting) = own.database.attempt(|connection| seats::pending(connection, limit)).await {
                    own.note(waiting);
                }
                tokio::time::sleep(EVERY).await;
            }
        }
    }

    fn note(&self, Waiting { count, for_buyers, age }: Waiting) {
        self.count.set(count);
        self.for_buyers.set(for_buyers);
        self.age.set(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
    }

    /// `payments-pending`: every pod sees the same, so a policy takes it as a check of the whole workload.
    pub fn check(self: &Arc<Self>) -> Check {
        let own = Arc::clone(self);
        Check::new("payments-pending", &["business"], move |_| {
            let own = Arc::clone(&own);
            async move { own.look().await }
        })
        .when_unanswered(CheckStatus::Unknown)
    }

    async fn look(&self) -> CheckOutcome {
        let unknown = |what: &str, why: &dyn std::fmt::Display| {
            CheckOutcome::new(CheckStatus::Unknown, format!("failed to read {what}: {why}"))
        };
        let is_refusing = if self.payments {
            false
        } else {
            match self.database.attempt(seats::has_priced_events).await {
                Ok(any) => any,
                Err(error) => return unknown("events", &error),
            }
        };
        match self.database.attempt(|connection| seats::pending(connection, self.buyer_limit)).await {
            Ok(waiting) => {
                self.note(waiting);
                outcome(waiting, is_refusing)
            }
            Err(error) => unknown("bookings that wait", &error),
        }
    }
}

/// What is wrong, if anything. `is_refusing`: there are prices, and nobody can charge. That hides nothing of what waits.
fn outcome(waiting: Waiting, is_refusing: bool) -> CheckOutcome {
    let Waiting { count, for_buyers, age } = waiting;
    let of_age = match age {
        age if age >= TOO_LATE => CheckStatus::Unhealthy,
        age if age >= LATE => CheckStatus::Degraded,
        _ => CheckStatus::Healthy,
    };
    let at_least = if is_refusing { CheckStatus::Degraded } else { CheckStatus::Healthy };
    let refuses = if is_refusing { "PAYMENT_URL is not set: orders that have a price are refused; " } else { "" };
    let message = format!(
        "{refuses}{count} bookings wait for their payment, {for_buyers} of them for their buyers, the oldest for {} s without the \
         time that a buyer has to act",
        age.as_secs()
    );
    CheckOutcome::new(of_age.max(at_least), message)
        .with("pending", json!(count))
        .with("waitingForBuyers", json!(for_buyers))
        .with("oldestSeconds", json!(age.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(599, false, CheckStatus::Healthy)]
    #[case(600, false, CheckStatus::Degraded)]
    #[case(3_599, false, CheckStatus::Degraded)]
    #[case(3_600, false, CheckStatus::Unhealthy)]
    #[case::nobody_can_charge(0, true, CheckStatus::Degraded)]
    #[case::and_somebody_waits(3_600, true, CheckStatus::Unhealthy)]
    fn the_worse_of_both_is_said(#[case] seconds: u64, #[case] is_refusing: bool, #[case] expected: CheckStatus) {
        let waiting = Waiting { count: 3, for_buyers: 2, age: Duration::from_secs(seconds) };
        let outcome = outcome(waiting, is_refusing);
        assert_eq!(outcome.status(), expected);
        assert_eq!(outcome.message().contains("PAYMENT_URL"), is_refusing);
        let says = format!("3 bookings wait for their payment, 2 of them for their buyers, the oldest for {seconds} s");
        assert!(outcome.message().contains(&says), "{outcome:?}");
    }
}
