//! The health checks of booking: `database`, `schema`, `memory`, `booking-consistency`.

use super::{DATABASE, seats};
use crate::checks;
use crate::database::{self, Database};
use crate::schema::Schema;
use contract::CheckStatus;
use resilience::clock::in_words;
use resilience::{Check, CheckOutcome};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// All checks, not running yet.
pub fn all(database: &Arc<Database>, schema: &Schema) -> [Check; 4] {
    let books = Arc::new(Books { database: Arc::clone(database), known: Mutex::default() });
    [
        database::check(database, DATABASE),
        schema.check(DATABASE),
        checks::memory(),
        Check::new("booking-consistency", &["business"], move |settings| {
            let books = Arc::clone(&books);
            async move { books.compare(Duration::from_millis(settings.timeout_ms) * 8 / 10).await }
        })
        .dependency(DATABASE)
        // Without an answer nothing is known about the books; that the database is silent is for its own check to say.
        .when_unanswered(CheckStatus::Unknown),
    ]
}

/// Events of each kind that one look takes in, as long as that is quick enough.
const MOST: i64 = 200;

/// What is known of the books from one look to the next.
struct Books {
    database: Arc<Database>,
    known: Mutex<Known>,
}

struct Known {
    position: seats::Position,
    /// Events that did not add up: they are looked at until they do.
    wrong: Vec<Uuid>,
    /// Events of each kind that the next look takes in.
    most: i64,
}

impl Default for Known {
    fn default() -> Self {
        Self { position: seats::Position::default(), wrong: Vec::new(), most: MOST }
    }
}

impl Books {
    /// Looks at what was changed since the last look, and at some others in turn, for no longer than `time`.
    async fn compare(&self, time: Duration) -> CheckOutcome {
        let mut known = self.known.lock().await;
        let Known { position, wrong, most } = &*known;
        let look = |connection| seats::consistency(connection, position, wrong, *most, time);
        match self.database.attempt(look).await {
            Ok(found) => {
                let status = if found.wrong_events.is_empty() && found.expired_holds == 0 {
                    CheckStatus::Healthy
                } else {
                    CheckStatus::Unhealthy
                };
                let count = found.wrong_events.len();
                let message = format!(
                    "{count} events do not add up; {} expired reservations still hold seats",
                    found.expired_holds
                );
                let most = (known.most * 2).min(MOST);
                *known = Known { position: found.next, wrong: found.wrong_events, most };
                CheckOutcome::new(status, message)
                    .with("wrongEvents", json!(count))
                    .with("expiredHolds", json!(found.expired_holds))
                    .with("eventsLookedAt", json!(found.looked_at))
            }
            Err(error) if error.sql_state() == Some(&SqlState::QUERY_CANCELED) => {
                known.most = (known.most / 4).max(1);
                let message = format!(
                    "comparing seats with bookings was given up after {}; the next look takes in {} events of each kind",
                    in_words(time),
                    known.most
                );
                CheckOutcome::new(CheckStatus::Unknown, message)
            }
            Err(error) => {
                CheckOutcome::new(CheckStatus::Unknown, format!("failed to compare seats with bookings: {error}"))
            }
        }
    }
}
