//! Bookings that wait for their payment: how many, and for how long.

use super::seats;
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
    count: Gauge,
    age: Gauge,
}

impl Pending {
    pub fn new(database: &Arc<Database>, resilience: &Resilience, payments: bool) -> Arc<Self> {
        let (count, age) = (Gauge::default(), Gauge::default());
        resilience.metrics().register(|registry| {
            registry.register("bookings_payment_pending", "Bookings that wait for their payment", count.clone());
            let help = "Time that the oldest of them has been waiting";
            registry.register("bookings_payment_pending_age_seconds", help, age.clone());
        });
        Arc::new(Self { database: Arc::clone(database), payments, count, age })
    }

    /// Keeps the figures up to date, for as long as it is polled.
    pub fn measure(self: &Arc<Self>) -> impl Future<Output = ()> + use<> {
        let own = Arc::clone(self);
        async move {
            loop {
                if let Ok((count, age)) = own.database.attempt(seats::pending).await {
                    own.note(count, age);
                }
                tokio::time::sleep(EVERY).await;
            }
        }
    }

    fn note(&self, count: i64, age: Duration) {
        self.count.set(count);
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
        if !self.payments {
            match self.database.attempt(seats::has_priced_events).await {
                Ok(true) => {
                    let message = "PAYMENT_URL is not set: orders that have a price are refused";
                    return CheckOutcome::new(CheckStatus::Degraded, message);
                }
                Ok(false) => {}
                Err(error) => {
                    return CheckOutcome::new(CheckStatus::Unknown, format!("failed to read events: {error}"));
                }
            }
        }
        match self.database.attempt(seats::pending).await {
            Ok((count, age)) => {
                self.note(count, age);
                let status = match age {
                    age if age >= TOO_LATE => CheckStatus::Unhealthy,
                    age if age >= LATE => CheckStatus::Degraded,
                    _ => CheckStatus::Healthy,
                };
                let message = format!("{count} bookings wait for their payment, the oldest for {} s", age.as_secs());
                CheckOutcome::new(status, message)
                    .with("pending", json!(count))
                    .with("oldestSeconds", json!(age.as_secs()))
            }
            Err(error) => {
                CheckOutcome::new(CheckStatus::Unknown, format!("failed to read bookings that wait: {error}"))
            }
        }
    }
}
