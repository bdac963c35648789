//! The SQL of reservations: seats that are kept for somebody for a while (`Held`), until they are bought, given back, or
//! the time is over. Whose a reservation is, `to_jsonb` says: it works before step 12, too, when all is nobody's. A buyer at the last moment and the expiry meet at the row of the booking: only one of them has it.

use super::asker::Asker;
use super::limits::{Limited, Values};
use super::seats::{self, Booked, BookingError};
use crate::database::{Connection, DatabaseError};
use crate::retention::Rule;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Turns a reservation into a booking, as long as it lasts, unless too many payments of the buyer were declined. What was reserved
/// before a login belongs to the login from then on, within the login's own limit, and counts for no network any more. `lower(status)`: it is looked up by its id,
/// and not in the index of all reservations.
const BUY: &str = "
    WITH held AS MATERIALIZED (
        SELECT b.id, b.event_id, $2 AND b.amount_cents > 0 AS costs, b.owner = ANY($5) AND b.owner <> $6 AS moves,
               COALESCE(e.seats_per_buyer, ($8::integer[])[1]) AS seats, ($8::integer[])[6:7] AS declines
        FROM bookings b JOIN events e ON e.id = b.event_id
        WHERE b.id = $1 AND lower(b.status) = 'held' AND b.held_until > now()
          AND ($5::text[] IS NULL OR b.owner IS NULL OR b.owner = ANY($5))
    ), allowed AS MATERIALIZED (
        SELECT reached, seconds FROM held CROSS JOIN LATERAL buyer_limit($5, $7, event_id, id, NULL, 0, ARRAY[
            CASE WHEN moves THEN seats END, NULL, NULL, NULL, NULL,
            CASE WHEN costs THEN declines[1] END, CASE WHEN costs THEN declines[2] END])
        WHERE (costs OR moves) AND cardinality(array_remove($8::integer[], NULL)) > 0
    ), bought AS (
        UPDATE bookings
        SET status = CASE WHEN $2 AND amount_cents > 0 THEN 'PaymentPending' ELSE 'Confirmed' END, held_until = NULL,
            settle_at = CASE WHEN $2 AND amount_cents > 0 THEN now() + $3 * interval '1 second' END, pending_since = now(),
            owner = CASE WHEN owner = ANY($5) THEN $6 ELSE owner END,
            network = CASE WHEN owner = ANY($5) AND owner <> $6 THEN NULL ELSE network END
        WHERE id = $1 AND lower(status) = 'held' AND held_until > now() AND ($4 OR amount_cents = 0)
          AND ($5::text[] IS NULL OR owner IS NULL OR owner = ANY($5))
          AND NOT EXISTS (SELECT FROM allowed WHERE reached IS NOT NULL)
        RETURNING id, status, amount_cents, email
    ), told AS (
        INSERT INTO outbox (booking_id, kind)
        SELECT id, CASE status WHEN 'Confirmed' THEN 'BookingConfirmed' ELSE 'PaymentPending' END FROM bought
        WHERE status = 'Confirmed' OR status = 'PaymentPending' AND $9 AND email IS NOT NULL
    )
    SELECT status, amount_cents, reached, seconds
    FROM (SELECT) one LEFT JOIN bought ON true LEFT JOIN allowed ON true";

/// The same before step 12: all is nobody's, and nobody is counted.
const BUY_BEFORE_OWNERS: &str = "
    WITH bought AS (
        UPDATE bookings
        SET status = CASE WHEN $2 AND amount_cents > 0 THEN 'PaymentPending' ELSE 'Confirmed' END, held_until = NULL,
            settle_at = CASE WHEN $2 AND amount_cents > 0 THEN now() + $3 * interval '1 second' END, pending_since = now()
        WHERE id = $1 AND lower(status) = 'held' AND held_until > now() AND ($4 OR amount_cents = 0)
          AND ($5::text[] IS NULL OR to_jsonb(bookings) ->> 'owner' IS NULL OR to_jsonb(bookings) ->> 'owner' = ANY($5))
        RETURNING id, status, amount_cents
    ), told AS (
        INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingConfirmed' FROM bought WHERE status = 'Confirmed'
    )
    SELECT status, amount_cents, NULL::integer, NULL::float8 FROM (SELECT) one LEFT JOIN bought ON true";

/// Waits for the transaction that is changing it: it must not be told as over while it is being bought. The lock is written
/// down, so its commit waits for the disk and the replicas: a purchase that nobody has heard of is told only then.
const LOOK: &str = "
    SELECT CASE WHEN status = 'Held' AND held_until <= now() THEN 'Cancelled' ELSE status END,
           CASE WHEN status = 'Held' THEN 'expired' ELSE cancel_reason END, amount_cents,
           status = 'PaymentPending' AND EXISTS (SELECT FROM payment_attempts a
                                                 WHERE a.key = bookings.id::text AND a.state = 'NeedsBuyer')
    FROM bookings
    WHERE id = $1 AND ($2::text[] IS NULL OR to_jsonb(bookings) ->> 'owner' IS NULL OR to_jsonb(bookings) ->> 'owner' = ANY($2))
    FOR SHARE";

/// Its commit does not wait for the disk while the event's row is locked; [`give_back`] does, before it answers.
const GIVE_BACK: &str = "
    WITH ended AS (
        UPDATE bookings SET status = 'Cancelled', held_until = NULL, cancel_reason = 'given back'
        WHERE id = $1 AND status = 'Held'
          AND ($2::text[] IS NULL OR to_jsonb(bookings) ->> 'owner' IS NULL OR to_jsonb(bookings) ->> 'owner' = ANY($2))
        RETURNING id, event_id, ticket_count, email
    ), told AS (
        INSERT INTO outbox (booking_id, kind)
        SELECT id, 'BookingCancelled' FROM ended WHERE $3 AND email IS NOT NULL
        ON CONFLICT DO NOTHING
    )
    UPDATE events e SET available = available + ticket_count, version = version + 1 FROM ended WHERE e.id = event_id
    RETURNING set_config('synchronous_commit', 'off', true)";

/// How a booking stands that the asker may see.
const STATUS: &str = "
    SELECT status FROM bookings
    WHERE id = $1 AND ($2::text[] IS NULL OR to_jsonb(bookings) ->> 'owner' IS NULL OR to_jsonb(bookings) ->> 'owner' = ANY($2))";

/// Ends reservations that ran out, some at a time, so that no event is locked for long, and not while the disk writes: what
/// a crash takes away runs out again.
const EXPIRE: &str = "
    WITH due AS (
        SELECT id FROM bookings WHERE status = 'Held' AND held_until <= now()
        ORDER BY held_until LIMIT $1 FOR UPDATE SKIP LOCKED
    ), ended AS (
        UPDATE bookings b SET status = 'Cancelled', held_until = NULL, cancel_reason = 'expired'
        FROM due WHERE b.id = due.id RETURNING b.id, event_id, ticket_count, email
    ), told AS (
        INSERT INTO outbox (booking_id, kind)
        SELECT id, 'BookingCancelled' FROM ended WHERE $2 AND email IS NOT NULL
        ON CONFLICT DO NOTHING
    ), freed AS (
        UPDATE events e SET available = available + seats, version = version + 1
        FROM (SELECT event_id, sum(ticket_count)::integer AS seats FROM ended GROUP BY event_id) one
        WHERE e.id = one.event_id
    )
    SELECT count(*), set_config('synchronous_commit', 'off', true) FROM ended";

/// Reservations that came to nothing: of these reasons alone, for which payment was never asked, and of which the index
/// `bookings_ended` is. One that payment knows of all the same stays for as long as it does: what is charged for it goes back.
/// Of what was confirmed once, the mail is older than its end.
pub const RETENTION: Rule = Rule {
    what: "cancelled reservations",
    sql: "
    DELETE FROM bookings WHERE id = ANY(ARRAY(
        SELECT id FROM bookings b
        WHERE status = 'Cancelled' AND cancel_reason IN ('expired', 'given back')
          AND created_at < now() - $1 * interval '1 day'
          AND NOT EXISTS (SELECT FROM outbox o WHERE o.booking_id = b.id)
          AND NOT EXISTS (SELECT FROM payments p WHERE p.key = b.id::text)
        ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED))",
};

/// Statements that are made for each reservation, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("buy", BUY),
    ("buy before owners", BUY_BEFORE_OWNERS),
    ("look at a reservation", LOOK),
    ("give back", GIVE_BACK),
    ("status of a reservation", STATUS),
    ("expire", EXPIRE),
    ("old reservations", RETENTION.sql),
];

/// Who buys what is reserved, and how.
#[derive(Clone, Copy, Debug)]
pub struct Purchase<'a> {
    pub id: Uuid,
    pub asker: &'a Asker,
    /// It has to be paid for, and somebody asks payment within this time.
    pub asks_within: Option<Duration>,
    /// Whether it may have a price.
    pub sells_priced: bool,
    /// Whether the table says whose a booking is: from step 12 on.
    pub has_owners: bool,
    /// Whether a payment that is asked for later is told to the buyer by mail.
    pub tells: bool,
    /// How often payments may be declined.
    pub limits: Values,
}

/// Buys what is reserved. What is bought already stays as it is, and so does what has a price without `sells_priced`; of what has
/// run out the answer is `Cancelled`. `None`: there is no such booking of the asker.
/// `unanswered` stays true once it may have been bought without an answer.
pub async fn buy(
    connection: Connection,
    purchase: Purchase<'_>,
    unanswered: &AtomicBool,
) -> Result<Option<Booked>, BookingError> {
    let Purchase { id, asker, asks_within, sells_priced, has_owners, tells, limits } = purchase;
    let buy = connection.prepare_cached(if has_owners { BUY } else { BUY_BEFORE_OWNERS }).await?;
    let seconds = asks_within.unwrap_or_default().as_secs_f64();
    let (is_paid_for, owners, owner, network) = (asks_within.is_some(), asker.owners(), asker.owner(), asker.network());
    let (of_buyer, tells) = (limits.as_slice(), tells && asks_within == Some(Duration::ZERO));
    let values: [&(dyn ToSql + Sync); 9] =
        [&id, &is_paid_for, &seconds, &sells_priced, &owners, &owner, &network, &of_buyer, &tells];
    let values = if has_owners { values.as_slice() } else { &values[..5] };
    let row = seats::answered(unanswered, connection.query_one(&buy, values)).await?;
    if let Some(status) = row.try_get(0)? {
        let amount_cents = row.try_get(1)?;
        return Ok(Some(Booked { id, status, cancel_reason: None, amount_cents, before: false, needs_buyer: false }));
    }
    let limited = row.try_get::<_, Option<i32>>(2)?;
    let seconds = row.try_get(3)?;
    if let Some(limited) = limited.and_then(|place| Limited::read(place, seconds, &limits, asker)) {
        return Err(limited.into());
    }
    let look = connection.prepare_cached(LOOK).await?;
    let Some(row) = connection.query_opt(&look, &[&id, &owners]).await? else { return Ok(None) };
    let (status, cancel_reason, amount_cents) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    // An attempt before this one may have bought it without hearing of it.
    let before = !unanswered.load(Ordering::Relaxed);
    Ok(Some(Booked { id, status, cancel_reason, amount_cents, before, needs_buyer: row.try_get(3)? }))
}

/// Gives reserved seats back; doing it again changes nothing. `tells`: the buyer gets a mail. The answer is how the booking stands then, `None`: there is
/// none of the asker.
pub async fn give_back(
    connection: Connection,
    id: Uuid,
    asker: &Asker,
    tells: bool,
) -> Result<Option<String>, DatabaseError> {
    let give_back = connection.prepare_cached(GIVE_BACK).await?;
    let owners = asker.owners();
    let values: [&(dyn ToSql + Sync); 3] = [&id, &owners, &tells];
    // Sent together, in this order.
    let (given, flushed) =
        tokio::join!(biased; connection.execute(&give_back, &values), connection.batch_execute(seats::FLUSH));
    given?;
    flushed?;
    let status = connection.prepare_cached(STATUS).await?;
    let row = connection.query_opt(&status, &values[..2]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

/// Ends up to `most` reservations that ran out, and gives their seats back; `tells`: their buyers get a mail. The answer is how
/// many.
pub async fn expire(connection: Connection, most: i64, tells: bool) -> Result<i64, DatabaseError> {
    let expire = connection.prepare_cached(EXPIRE).await?;
    Ok(connection.query_one(&expire, &[&most, &tells]).await?.try_get(0)?)
}
