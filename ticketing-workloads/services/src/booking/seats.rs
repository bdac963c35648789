//! The SQL of booking. One transaction per attempt, with optimistic locking on the event's version.
//!
//! Seats and booking change in one statement: a connection that hangs between two of them would hold the event's row
//! locked for everybody. And an attempt may be made again even if nobody knows whether the one before was committed:
//! both carry the same idempotency key.

use super::order::Order;
use crate::database::{Connection, DatabaseError};
use resilience::{Failure, FailureKind};
use serde::Serialize;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// Events that are listed at most.
const MAX_EVENTS: i64 = 100;

/// The event and an earlier booking under the same key, if there are any.
const LOOK: &str = "
    SELECT e.version, e.available, b.id, b.event_id, b.user_id, b.ticket_count
    FROM (SELECT) one
    LEFT JOIN events e ON e.id = $1
    LEFT JOIN bookings b ON b.idempotency_key = $2";

/// Takes the seats and books them, if nobody changed the event meanwhile.
const TAKE: &str = "
    WITH taken AS (
        UPDATE events SET available = available - $1, version = version + 1
        WHERE id = $2 AND version = $3 AND available >= $1
        RETURNING id
    )
    INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key)
    SELECT $4, taken.id, $5, $1, 'Confirmed', $6 FROM taken";

const FIND: &str = "SELECT id, event_id, user_id, ticket_count, status FROM bookings WHERE id = $1";
const EVENTS: &str = "SELECT id, name, capacity, available FROM events ORDER BY created_at, id LIMIT $1";

/// Events whose figures do not add up, and holds that ran out more than a minute ago.
const CONSISTENCY: &str = "
    SELECT (SELECT count(*) FROM events e
            WHERE e.capacity <> e.available + (SELECT COALESCE(sum(b.ticket_count), 0) FROM bookings b
                                               WHERE b.event_id = e.id AND b.status <> 'Cancelled')),
           (SELECT count(*) FROM bookings
            WHERE status = 'Held' AND held_until < now() - interval '1 minute')";

/// Why an attempt to book gave no booking.
#[derive(Debug, thiserror::Error)]
pub enum BookingError {
    /// Fewer seats are left than were asked for.
    #[error("Not enough tickets available for this event")]
    InsufficientTickets,
    /// There is no such event.
    #[error("There is no event with this id")]
    EventNotFound,
    /// The idempotency key belongs to another booking.
    #[error("This idempotency key was used for a booking with other details")]
    KeyReused,
    /// Somebody else booked first.
    #[error("the event changed while it was being booked")]
    VersionConflict,
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<tokio_postgres::Error> for BookingError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

impl Failure for BookingError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::InsufficientTickets | Self::EventNotFound | Self::KeyReused => FailureKind::Business,
            Self::VersionConflict => FailureKind::VersionConflict,
            Self::Database(error) => error.kind(),
        }
    }
}

/// A booking that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Booking {
    /// Its id.
    #[serde(rename = "bookingId")]
    pub id: Uuid,
    /// The event.
    pub event_id: Uuid,
    /// Who booked.
    pub user_id: String,
    /// Seats.
    pub ticket_count: i32,
    /// `Confirmed`, `Held` or `Cancelled`.
    pub status: String,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// Its id.
    #[serde(rename = "eventId")]
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Seats in all.
    pub capacity: i32,
    /// Seats that are free.
    pub available: i32,
}

/// How a booking came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Booked {
    /// Just now.
    Now(Uuid),
    /// By an earlier request with the same key.
    Before(Uuid),
}

/// Makes one attempt to book.
pub async fn book(connection: Connection, order: &Order) -> Result<Booked, BookingError> {
    let look = connection.prepare_cached(LOOK).await?;
    let row = connection.query_one(&look, &[&order.event_id, &order.idempotency_key]).await?;
    if let Some(booking_id) = row.try_get::<_, Option<Uuid>>(2)? {
        let same = row.try_get::<_, Uuid>(3)? == order.event_id
            && row.try_get::<_, &str>(4)? == order.user_id
            && row.try_get::<_, i32>(5)? == order.ticket_count;
        return match (same, booking_id == order.booking_id) {
            // An attempt before this one was committed without our knowing.
            (true, true) => Ok(Booked::Now(booking_id)),
            (true, false) => Ok(Booked::Before(booking_id)),
            (false, _) => Err(BookingError::KeyReused),
        };
    }
    let Some(version) = row.try_get::<_, Option<i64>>(0)? else { return Err(BookingError::EventNotFound) };
    if row.try_get::<_, i32>(1)? < order.ticket_count {
        return Err(BookingError::InsufficientTickets);
    }
    let take = connection.prepare_cached(TAKE).await?;
    let Order { booking_id, event_id, user_id, ticket_count, idempotency_key } = order;
    match connection.execute(&take, &[ticket_count, event_id, &version, booking_id, user_id, idempotency_key]).await {
        Ok(1) => Ok(Booked::Now(*booking_id)),
        Ok(_) => Err(BookingError::VersionConflict),
        // The same key, at the same moment: the next attempt finds its booking.
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Err(BookingError::VersionConflict),
        Err(error) => Err(error.into()),
    }
}

/// Finds a booking.
pub async fn find(connection: Connection, id: Uuid) -> Result<Option<Booking>, DatabaseError> {
    let find = connection.prepare_cached(FIND).await?;
    let Some(row) = connection.query_opt(&find, &[&id]).await? else { return Ok(None) };
    Ok(Some(Booking {
        id: row.try_get(0)?,
        event_id: row.try_get(1)?,
        user_id: row.try_get(2)?,
        ticket_count: row.try_get(3)?,
        status: row.try_get(4)?,
    }))
}

/// Lists events, oldest first.
pub async fn events(connection: Connection) -> Result<Vec<Event>, DatabaseError> {
    let events = connection.prepare_cached(EVENTS).await?;
    let rows = connection.query(&events, &[&MAX_EVENTS]).await?;
    let event = |row: &tokio_postgres::Row| {
        Ok(Event { id: row.try_get(0)?, name: row.try_get(1)?, capacity: row.try_get(2)?, available: row.try_get(3)? })
    };
    rows.iter().map(event).collect()
}

/// Figures of the check booking-consistency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Consistency {
    /// Events of which sold and free seats are not their capacity.
    pub wrong_events: i64,
    /// Holds that ran out and still keep their seats.
    pub expired_holds: i64,
}

/// Compares seats with bookings, in one snapshot.
pub async fn consistency(connection: Connection) -> Result<Consistency, DatabaseError> {
    let consistency = connection.prepare_cached(CONSISTENCY).await?;
    let row = connection.query_one(&consistency, &[]).await?;
    Ok(Consistency { wrong_events: row.try_get(0)?, expired_holds: row.try_get(1)? })
}
