//! The health checks of booking: `database`, `memory`, `booking-consistency`.

use super::{DATABASE, seats};
use crate::database::Database;
use contract::{CheckStatus, HealthCheckSettings};
use resilience::clock::in_words;
use resilience::memory::MemoryProbe;
use resilience::{Check, CheckOutcome};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// All checks, not running yet.
pub fn all(database: &Arc<Database>) -> [Check; 3] {
    let (pool, books) = (Arc::clone(database), Arc::clone(database));
    let memory = Arc::new(MemoryProbe::default());
    [
        Check::new("database", &["critical", "database"], move |settings| {
            let pool = Arc::clone(&pool);
            async move { connections(&pool, &settings).await }
        })
        .dependency(DATABASE),
        Check::new("memory", &["resource"], move |settings| {
            let memory = Arc::clone(&memory);
            async move { memory.check(&settings) }
        }),
        Check::new("booking-consistency", &["business"], move |_| {
            let books = Arc::clone(&books);
            async move { consistency(&books).await }
        })
        .dependency(DATABASE)
        // Without an answer nothing is known about the books; that the database is silent is for its own check to say.
        .when_unanswered(CheckStatus::Unknown),
    ]
}

/// Every pooled connection must answer. A few that hang are enough to fail bookings, so they are enough to fail this.
async fn connections(database: &Database, settings: &HealthCheckSettings) -> CheckOutcome {
    // A little less than the check has, so that it can say how many are silent.
    let time = Duration::from_millis(settings.timeout_ms) * 9 / 10;
    let health = database.examine(time).await;
    let (status, message) = match &health.error {
        _ if health.hung > 0 => {
            let message = format!(
                "{} of {} pooled connections gave no answer within {}",
                health.hung,
                health.open,
                in_words(time)
            );
            (CheckStatus::Unhealthy, message)
        }
        Some(error) => (CheckStatus::Unhealthy, error.clone()),
        None => (CheckStatus::Healthy, format!("{} of {} pooled connections answered", health.answered, health.open)),
    };
    CheckOutcome::new(status, message)
        .with("open", json!(health.open))
        .with("answered", json!(health.answered))
        .with("hung", json!(health.hung))
        .with("max", json!(health.max))
        .with("resets", json!(database.resets().get()))
}

async fn consistency(database: &Database) -> CheckOutcome {
    match database.attempt(seats::consistency).await {
        Ok(found) => {
            let status = if found.wrong_events > 0 || found.expired_holds > 0 {
                CheckStatus::Unhealthy
            } else {
                CheckStatus::Healthy
            };
            let message = format!(
                "{} events do not add up; {} expired reservations still hold seats",
                found.wrong_events, found.expired_holds
            );
            CheckOutcome::new(status, message)
                .with("wrongEvents", json!(found.wrong_events))
                .with("expiredHolds", json!(found.expired_holds))
        }
        Err(error) => CheckOutcome::new(CheckStatus::Unknown, format!("the books could not be read: {error}")),
    }
}
