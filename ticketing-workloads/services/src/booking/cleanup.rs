//! The cleanup Job of booking: ends reservations that ran out, and makes the seats of every event add up again.
//!
//! Bookings are the truth; the free seats of an event are derived from them. Safe to run at any time, beside bookings and
//! beside another run of itself.

use crate::database::{DatabaseError, DatabaseSettings, Sessions, execute, query};
use crate::host::StartError;
use crate::schema;
use std::time::Duration;
use uuid::Uuid;

/// Longest time of one run.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What holds at the server, which does not notice when this process gives up: a statement would go on and keep its locks.
const BOUNDS: &str = "SET LOCAL statement_timeout = '55s'; SET LOCAL lock_timeout = '10s'";

/// Whether buyers can be told by mail.
const TELLS: &str = "SELECT FROM schema_migrations WHERE service = 'booking' AND version = $1";

/// Holds that ran out give their seats back, and their buyers get a mail.
const EXPIRE: &str = "WITH ended AS (
        UPDATE bookings SET status = 'Cancelled', held_until = NULL, cancel_reason = 'expired'
        WHERE status = 'Held' AND held_until <= now() RETURNING id, email
    ), told AS (
        INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingCancelled' FROM ended WHERE $1 AND email IS NOT NULL
        ON CONFLICT DO NOTHING
    )
    SELECT count(*) FROM ended";

/// Seats that are free by the bookings, for each event.
const FREE: &str = "SELECT e.id, e.capacity - COALESCE(sum(b.ticket_count), 0)::integer AS free
    FROM events e LEFT JOIN bookings b ON b.event_id = e.id AND b.status <> 'Cancelled'
    WHERE e.id = ANY($1) GROUP BY e.id";

/// Events that do not add up. Nobody books them while they are being put right.
const WRONG: &str = "SELECT id FROM events e
    WHERE e.available <> e.capacity - (SELECT COALESCE(sum(b.ticket_count), 0) FROM bookings b
                                       WHERE b.event_id = e.id AND b.status <> 'Cancelled')
    ORDER BY id FOR UPDATE";

/// Why the books could not be put in order.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error(transparent)]
    Setting(#[from] StartError),
    #[error("the database: {0}")]
    Database(#[from] DatabaseError),
    /// It took too long.
    #[error("timed out after {} s; run it again", TIMEOUT.as_secs())]
    Timeout,
    /// More seats are sold than there are. What was repaired elsewhere is kept.
    #[error(
        "sold more seats than there are: {}; a person must decide which bookings to cancel",
        list(.0)
    )]
    Oversold(Vec<(Uuid, i32)>),
}

fn list(events: &[(Uuid, i32)]) -> String {
    let words: Vec<_> = events.iter().map(|(event, by)| format!("event {event} by {by}")).collect();
    words.join(", ")
}

impl From<tokio_postgres::Error> for CleanupError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cleaned {
    /// Reservations that had run out.
    pub expired_holds: u64,
    /// Events whose seats add up again.
    pub repaired_events: u64,
}

/// Puts the books in order.
pub async fn run(settings: &DatabaseSettings) -> Result<Cleaned, CleanupError> {
    let connector = settings.connector("booking-cleanup")?;
    let work = async {
        let (client, connection) = connector.open().await.map_err(DatabaseError::Connect)?;
        let driver = tokio::spawn(connection);
        let result = clean(&client, settings.database_pooler).await;
        driver.abort();
        result
    };
    tokio::time::timeout(TIMEOUT, work).await.map_err(|_| CleanupError::Timeout)?
}

/// All of it in one transaction, which ends with the connection if it is not committed.
async fn clean(client: &tokio_postgres::Client, sessions: Sessions) -> Result<Cleaned, CleanupError> {
    client.batch_execute(&format!("BEGIN; {BOUNDS}")).await?;
    let tells = !query(client, sessions, TELLS, &[&schema::TICKETS]).await?.is_empty();
    let ended: i64 = match query(client, sessions, EXPIRE, &[&tells]).await?.first() {
        Some(row) => row.try_get(0)?,
        None => 0,
    };
    let expired_holds = ended.unsigned_abs();
    let wrong: Vec<Uuid> =
        query(client, sessions, WRONG, &[]).await?.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    // A new statement, so that it sees what was committed before the events were locked.
    let mut repaired_events = 0;
    let mut oversold = Vec::new();
    for row in query(client, sessions, FREE, &[&wrong]).await? {
        let (event, free): (Uuid, i32) = (row.try_get(0)?, row.try_get(1)?);
        if free < 0 {
            oversold.push((event, -free));
            continue;
        }
        let repair = "UPDATE events SET available = $2, version = version + 1 WHERE id = $1 AND available <> $2";
        repaired_events += execute(client, sessions, repair, &[&event, &free]).await?;
    }
    client.batch_execute("COMMIT").await?;
    let cleaned = Cleaned { expired_holds, repaired_events };
    tracing::info!(expired_holds, repaired_events, oversold = oversold.len(), "compared seats with bookings");
    if oversold.is_empty() { Ok(cleaned) } else { Err(CleanupError::Oversold(oversold)) }
}
