//! The outbox: what is to be told, to whom, and how far that is.

use crate::database::{Connection, DatabaseError};
use std::time::Duration;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// How long a claim holds: longer than a mail may take.
pub const CLAIM: Duration = Duration::from_secs(60);

/// Claims what has waited longest, of the kinds that are wanted. Whose claim ran out while the mail was leaving has died.
const CLAIM_SQL: &str = "
    WITH claimed AS (
        UPDATE outbox SET claim = $1, claimed_until = now() + $2 * interval '1 second', tries = tries + 1,
                          possible_duplicates = possible_duplicates + (sending AND claim IS NOT NULL)::integer
        WHERE id = (SELECT id FROM outbox
                    WHERE done_at IS NULL AND next_at <= now() AND kind = ANY($3)
                      AND (claimed_until IS NULL OR claimed_until < now())
                    ORDER BY next_at, id LIMIT 1 FOR UPDATE SKIP LOCKED)
        RETURNING id, booking_id, kind, tries, sending
    )
    SELECT c.id, c.booking_id, c.kind, c.tries, c.sending, b.email, b.user_id, b.ticket_count, b.amount_cents, e.name,
           to_char(e.starts_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI \"UTC\"')
    FROM claimed c JOIN bookings b ON b.id = c.booking_id JOIN events e ON e.id = b.event_id";

const SENDING: &str = "
    UPDATE outbox SET sending = true, claimed_until = now() + $3 * interval '1 second'
    WHERE id = $1 AND claim = $2 AND done_at IS NULL AND claimed_until > now()";

/// What is done; a ticket that could not be made follows later.
const DONE: &str = "
    WITH done AS (
        UPDATE outbox SET done_at = now(), claim = NULL, claimed_until = NULL, sending = false
        WHERE id = $1 AND claim = $2 AND done_at IS NULL RETURNING booking_id
    )
    INSERT INTO outbox (booking_id, kind) SELECT booking_id, 'Ticket' FROM done WHERE $3
    ON CONFLICT (booking_id, kind) DO NOTHING";

const LATER: &str = "
    UPDATE outbox SET claim = NULL, claimed_until = NULL, sending = $4, next_at = now() + $3 * interval '1 second',
                      possible_duplicates = possible_duplicates + $5::integer
    WHERE id = $1 AND claim = $2 AND done_at IS NULL";

const NEVER: &str = "
    WITH done AS (
        UPDATE outbox SET done_at = now(), claim = NULL, claimed_until = NULL, sending = false
        WHERE id = $1 AND claim = $2 AND done_at IS NULL RETURNING id
    )
    INSERT INTO dead_letters (outbox_id, reason) SELECT id, $3 FROM done";

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// That a booking is confirmed, with the ticket if that may be made.
    BookingConfirmed,
    /// The ticket, which could not be made then.
    Ticket,
    /// That a booking that waited for its payment is cancelled.
    BookingCancelled,
}

impl Kind {
    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::BookingConfirmed => "BookingConfirmed",
            Self::Ticket => "Ticket",
            Self::BookingCancelled => "BookingCancelled",
        }
    }
}

/// A message that is ours to send.
#[derive(Clone, Debug)]
pub struct Message {
    /// Its place in the outbox.
    pub id: i64,
    claim: Uuid,
    pub kind: Kind,
    /// How often it was tried, this time included.
    pub tries: i32,
    /// Whether somebody may have sent it and died before that was written down.
    pub may_be_sent: bool,
    pub booking: Uuid,
    /// Where it goes; nowhere if the buyer gave no address.
    pub email: Option<String>,
    pub user: String,
    pub seats: i32,
    pub amount_cents: i32,
    pub event: String,
    pub starts_at: Option<String>,
}

/// Takes the next message of these kinds.
pub async fn claim(connection: Connection, kinds: &[&str]) -> Result<Option<Message>, DatabaseError> {
    let sql = connection.prepare_cached(CLAIM_SQL).await?;
    let claim = Uuid::new_v4();
    let Some(row) = connection.query_opt(&sql, &[&claim, &CLAIM.as_secs_f64(), &kinds]).await? else {
        return Ok(None);
    };
    let name: &str = row.try_get(2)?;
    let kind = [Kind::Ticket, Kind::BookingCancelled].into_iter().find(|kind| kind.name() == name);
    let kind = kind.unwrap_or(Kind::BookingConfirmed);
    Ok(Some(Message {
        id: row.try_get(0)?,
        claim,
        kind,
        tries: row.try_get(3)?,
        may_be_sent: row.try_get(4)?,
        booking: row.try_get(1)?,
        email: row.try_get(5)?,
        user: row.try_get(6)?,
        seats: row.try_get(7)?,
        amount_cents: row.try_get(8)?,
        event: row.try_get(9)?,
        starts_at: row.try_get(10)?,
    }))
}

/// Says that the mail leaves now; `false`: the message is no longer ours.
pub async fn sending(connection: Connection, message: &Message) -> Result<bool, DatabaseError> {
    let sql = connection.prepare_cached(SENDING).await?;
    let seconds = CLAIM.as_secs_f64();
    Ok(connection.execute(&sql, &[&message.id, &message.claim, &seconds]).await? == 1)
}

/// The message was sent, or there is nobody to send it to.
pub async fn done(connection: Connection, message: &Message, ticket_follows: bool) -> Result<u64, DatabaseError> {
    let sql = connection.prepare_cached(DONE).await?;
    Ok(connection.execute(&sql, &[&message.id, &message.claim, &ticket_follows]).await?)
}

/// The message is to be tried again; `unanswered`: the mail has left this time, and the mail server did not say whether it
/// took it.
pub async fn later(
    connection: Connection,
    message: &Message,
    wait: Duration,
    unanswered: bool,
) -> Result<u64, DatabaseError> {
    let sql = connection.prepare_cached(LATER).await?;
    let (seconds, may_be_sent) = (wait.as_secs_f64(), unanswered || message.may_be_sent);
    let values: [&(dyn ToSql + Sync); 5] =
        [&message.id, &message.claim, &seconds, &may_be_sent, &i32::from(unanswered)];
    Ok(connection.execute(&sql, &values).await?)
}

/// The message can never be sent.
pub async fn never(connection: Connection, message: &Message, reason: &str) -> Result<u64, DatabaseError> {
    let sql = connection.prepare_cached(NEVER).await?;
    Ok(connection.execute(&sql, &[&message.id, &message.claim, &reason]).await?)
}

#[cfg(test)]
impl Message {
    pub fn example(kind: Kind, event: &str) -> Self {
        Self {
            id: 1,
            claim: Uuid::nil(),
            kind,
            tries: 1,
            may_be_sent: false,
            booking: "33333333-3333-4333-8333-333333333333".parse().unwrap(),
            email: Some("ann@example.com".into()),
            user: "ann".into(),
            seats: 2,
            amount_cents: 9_000,
            event: event.into(),
            starts_at: Some("2027-06-18 19:30 UTC".into()),
        }
    }
}
