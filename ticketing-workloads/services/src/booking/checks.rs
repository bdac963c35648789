//! The health checks of booking: `database`, `memory`, `booking-consistency`.

use super::{DATABASE, seats};
use crate::checks;
use crate::database::{self, Database};
use contract::CheckStatus;
use resilience::{Check, CheckOutcome};
use serde_json::json;
use std::sync::Arc;

/// All checks, not running yet.
pub fn all(database: &Arc<Database>) -> [Check; 3] {
    let books = Arc::clone(database);
    [
        database::check(database, DATABASE),
        checks::memory(),
        Check::new("booking-consistency", &["business"], move |_| {
            let books = Arc::clone(&books);
            async move { consistency(&books).await }
        })
        .dependency(DATABASE)
        // Without an answer nothing is known about the books; that the database is silent is for its own check to say.
        .when_unanswered(CheckStatus::Unknown),
    ]
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
        Err(error) => {
            CheckOutcome::new(CheckStatus::Unknown, format!("failed to compare seats with bookings: {error}"))
        }
    }
}
