//! The SQL of booking. One transaction per attempt.
//!
//! Seats are taken by a decrement under the condition that enough are left. Such decrements and the increments of seats
//! that are given back commute, so nobody has to compare versions: a statement that waits for the event's row goes on from
//! what the one before left. With a comparison, all but one of those who want a hot event would lose, and lose again after
//! a pause.
//! `version` still counts every change: pods of version 0.1 compare it.
//!
//! Seats and booking change in one statement: a connection that hangs between two of them would hold the event's row
//! locked for everybody. And an attempt may be made again even if nobody knows whether the one before was committed: both
//! carry the same idempotency key.
//!
//! The event's row is locked for no longer than that statement takes, and not while the disk writes: its commit does not
//! wait for the disk (`synchronous_commit` off), and a second one, which locks nothing, does ([`FLUSH`]). No answer of this
//! version says that a booking is confirmed, held or cancelled before such a second commit is over, and all who wait for
//! the disk share its writes: that goes for the request that changed it, for a repeated one that finds it changed, and for
//! one that only reads it. `PaymentPending` promises nothing, so reading it does not wait. What a crash takes away in
//! between, nobody has heard of; a later booking is never there without an earlier one.
//!
//! Two gaps are left. During a roll-out, a pod of version 0.1 that is asked for a booking which another pod has made a
//! moment ago answers without the second commit. And PostgreSQL reports success to a session whose wait for a synchronous
//! replica an administrator cancels.

use super::asker::Asker;
use super::limits::{Limited, Limits};
use super::order::Order;
use crate::cancel_reason::CancelReason;
use crate::database::{Connection, DatabaseError, Sample};
use resilience::{Failure, FailureKind};
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// What a buyer has to do whose payment needs it.
pub const CONFIRM_PAYMENT: &str =
    "Please confirm the payment with your bank or provider; the seats are kept meanwhile.";

/// Events that are listed at most.
const MAX_EVENTS: i64 = 100;

/// The event and an earlier booking of the same buyer under the same key, if there are any. Without owners (`$5`), of anybody.
/// One that is nobody's may be the buyer's own, made by a pod of version 0.1 a moment ago in the middle of an update: so it
/// is one for an hour, if all its details are the same. `to_jsonb`: works before step 12, too, when the columns are not there and
/// all is nobody's.
const LOOK: &str = "
    SELECT e.available, b.id, b.event_id, b.user_id, b.ticket_count,
           CASE WHEN b.status = 'Held' AND b.held_until <= now() THEN 'Cancelled' ELSE b.status END,
           CASE WHEN b.status = 'Held' THEN 'expired' ELSE b.cancel_reason END, b.amount_cents,
           b.email IS NOT DISTINCT FROM $3, e.price_cents,
           b.status = 'PaymentPending' AND EXISTS (SELECT FROM payment_attempts a
                                                   WHERE a.key = b.id::text AND a.state = 'NeedsBuyer'),
           b.belongs_to IS NULL, (to_jsonb(e) ->> 'seats_per_buyer')::integer, EXISTS (SELECT FROM bookings o WHERE o.idempotency_key = $2)
    FROM (SELECT) one
    LEFT JOIN events e ON e.id = $1
    LEFT JOIN LATERAL (
        SELECT id, event_id, user_id, ticket_count, status, held_until, cancel_reason, amount_cents, email, belongs_to
        FROM bookings o CROSS JOIN LATERAL (SELECT to_jsonb(o) ->> 'owner' AS belongs_to) whose
        WHERE idempotency_key = ANY($4)
          AND ($5::text[] IS NULL OR belongs_to = ANY($5)
               OR (belongs_to IS NULL AND created_at > now() - interval '1 hour'))
        ORDER BY belongs_to IS NULL, idempotency_key = $2 LIMIT 1
    ) b ON true";

/// What every booking begins with, for no event and no booking.
pub const SAMPLE: Sample =
    Sample { statement: LOOK, values: &[&Uuid::nil(), &"", &None::<&str>, &None::<&[&str]>, &None::<&[&str]>] };

/// Takes the seats and books them, if enough are left and no limit of the buyer is in the way. What is to be paid for waits for
/// its payment; the request that asks payment at once has half a minute before others do. A reservation keeps them until it runs
/// out. Limits are looked at before the row of the event is locked.
const TAKE: &str = "
    WITH allowed AS MATERIALIZED (
        SELECT reached, seconds FROM buyer_limit($11, $12, $2, $3, $13, $1, $14)
    ), taken AS (
        UPDATE events SET available = available - $1, version = version + 1
        FROM allowed WHERE id = $2 AND available >= $1 AND reached IS NULL
        RETURNING id, price_cents * $1 AS amount_cents
    ), booked AS (
        INSERT INTO bookings
            (id, event_id, user_id, ticket_count, status, idempotency_key, email, amount_cents, settle_at, held_until,
             owner, network)
        SELECT $3, id, $4, $1,
               CASE WHEN $9::float8 IS NOT NULL THEN 'Held' WHEN $7 AND amount_cents > 0 THEN 'PaymentPending'
                    ELSE 'Confirmed' END,
               $5, $6, amount_cents,
               CASE WHEN $9 IS NULL AND $7 AND amount_cents > 0 THEN now() + $8 * interval '1 second' END,
               now() + $9 * interval '1 second', $10, $12
        FROM taken
        RETURNING id, status, amount_cents
    ), told AS (
        INSERT INTO outbox (booking_id, kind)
        SELECT id, CASE status WHEN 'Confirmed' THEN 'BookingConfirmed' ELSE 'PaymentPending' END FROM booked
        WHERE status = 'Confirmed' OR status = 'PaymentPending' AND $15 AND $6 IS NOT NULL
    )
    SELECT status, amount_cents, reached, seconds, set_config('synchronous_commit', 'off', true)
    FROM allowed LEFT JOIN booked ON true";

/// The same before step 12: what is booked is nobody's, and nobody is counted.
const TAKE_BEFORE_OWNERS: &str = "
    WITH taken AS (
        UPDATE events SET available = available - $1, version = version + 1
        WHERE id = $2 AND available >= $1
        RETURNING id, price_cents * $1 AS amount_cents
    ), booked AS (
        INSERT INTO bookings
            (id, event_id, user_id, ticket_count, status, idempotency_key, email, amount_cents, settle_at, held_until)
        SELECT $3, id, $4, $1,
               CASE WHEN $9::float8 IS NOT NULL THEN 'Held' WHEN $7 AND amount_cents > 0 THEN 'PaymentPending'
                    ELSE 'Confirmed' END,
               $5, $6, amount_cents,
               CASE WHEN $9 IS NULL AND $7 AND amount_cents > 0 THEN now() + $8 * interval '1 second' END,
               now() + $9 * interval '1 second'
        FROM taken
        RETURNING id, status, amount_cents
    ), told AS (
        INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingConfirmed' FROM booked WHERE status = 'Confirmed'
    )
    SELECT status, amount_cents, NULL::integer, NULL::float8, set_config('synchronous_commit', 'off', true)
    FROM (SELECT) one LEFT JOIN booked ON true";

/// Waits until all that was committed before is on the disk, and on the replicas that the server waits for. The message
/// has no reader: only a transaction that has written something waits.
pub(super) const FLUSH: &str = "SELECT pg_logical_emit_message(true, 'ticketing', '')";

/// Claims bookings of which the payment is open. The next try comes later each time, up to a minute.
const DUE: &str = "
    UPDATE bookings SET settle_tries = settle_tries + 1,
                        settle_at = now() + greatest(30, least(2 ^ least(settle_tries, 6), 60)) * interval '1 second'
    WHERE id IN (SELECT id FROM bookings WHERE status = 'PaymentPending' AND settle_at <= now()
                 ORDER BY settle_at LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING id, amount_cents, settle_tries, extract(epoch FROM now() - COALESCE(pending_since, created_at))::float8";

/// Asks payment again soon, not only when the claim of the process that asked it is over. The buyer is told once that the payment
/// is open: after an hour no more, when the message may have been deleted already.
const SETTLE_SOON: &str = "
    WITH open AS (
        UPDATE bookings SET settle_at = now() + least(2 ^ least(settle_tries, 6), 60) * interval '1 second'
        WHERE id = $1 AND status = 'PaymentPending' RETURNING id, email, COALESCE(pending_since, created_at) AS since
    )
    INSERT INTO outbox (booking_id, kind) SELECT id, 'PaymentPending' FROM open
    WHERE $2 AND email IS NOT NULL AND since > now() - interval '1 hour'
    ON CONFLICT DO NOTHING";

/// The same of a payment that waits for the buyer, who is asked once to confirm it: no message is deleted within a day, and after a
/// day nobody is asked any more. From step 15 on.
const WAIT_FOR_BUYER: &str = "
    WITH open AS (
        UPDATE bookings SET settle_at = now() + least(2 ^ least(settle_tries, 6), 60) * interval '1 second'
        WHERE id = $1 AND status = 'PaymentPending' RETURNING id, email
    )
    INSERT INTO outbox (booking_id, kind) SELECT id, 'ConfirmPayment' FROM open
    WHERE email IS NOT NULL
      AND EXISTS (SELECT FROM payment_attempts a
                  WHERE a.key = open.id::text AND a.state = 'NeedsBuyer' AND a.waits_since > now() - interval '1 day')
    ON CONFLICT DO NOTHING";

/// Of a booking that is cancelled the money goes back: that is written down in the same transaction that finds it out.
const CONFIRM: &str = "
    WITH confirmed AS (
        UPDATE bookings SET status = 'Confirmed', settle_at = NULL
        WHERE id = $1 AND status = 'PaymentPending' RETURNING id
    ), owed AS (
        INSERT INTO refunds (key, provider, charge_id, reason)
        SELECT a.key, a.provider, a.charge_id, 'the booking was cancelled'
        FROM bookings b JOIN payment_attempts a ON a.key = b.id::text AND a.state = 'Charged'
        WHERE b.id = $1 AND b.status = 'Cancelled'
        ON CONFLICT DO NOTHING
    )
    INSERT INTO outbox (booking_id, kind) SELECT id, 'BookingConfirmed' FROM confirmed";

/// Gives the seats back, unless somebody else has asked payment since; the buyer is told so by mail. Where nobody has said no, the key may be used for another try. Its commit does not wait for the disk while
/// the event's row is locked; [`cancel`] does, before it answers.
const CANCEL: &str = "
    WITH cancelled AS (
        UPDATE bookings SET status = 'Cancelled', settle_at = NULL, cancel_reason = $2, idempotency_key =
            CASE WHEN $2 IN ('declined', 'payment timed out') THEN idempotency_key ELSE idempotency_key || ':' || id END
        WHERE id = $1 AND status = 'PaymentPending' AND settle_tries = $3 RETURNING id, event_id, ticket_count, email
    ), told AS (
        INSERT INTO outbox (booking_id, kind)
        SELECT id, 'BookingCancelled' FROM cancelled WHERE $4 AND email IS NOT NULL
        ON CONFLICT DO NOTHING
    )
    UPDATE events e SET available = available + ticket_count, version = version + 1
    FROM cancelled WHERE e.id = event_id RETURNING set_config('synchronous_commit', 'off', true)";

/// How a booking stands.
pub(super) const STATUS: &str = "SELECT status FROM bookings WHERE id = $1";

/// How many wait, how many of them for their buyers, and for how long the oldest does. The `$1` seconds that a buyer has to act do
/// not count, also once the buyer has acted and the payment is being confirmed.
const PENDING: &str = "
    SELECT (SELECT count(*) FROM bookings WHERE status = 'PaymentPending'),
           count(*) FILTER (WHERE a.state = 'NeedsBuyer'),
           greatest(COALESCE(extract(epoch FROM now() - min(greatest(
               COALESCE(b.pending_since, b.created_at), a.waits_since + $1 * interval '1 second'))), 0), 0)::float8
    FROM bookings b LEFT JOIN payment_attempts a ON a.key = b.id::text AND a.waits_since IS NOT NULL
    WHERE b.status = 'PaymentPending'";

/// Asked for only where nobody can charge.
const PRICED: &str = "SELECT EXISTS (SELECT FROM events WHERE price_cents > 0)";

const FIND: &str = "
    SELECT id, event_id, user_id, ticket_count, status,
           to_char(held_until AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),
           CASE WHEN status = 'Cancelled' THEN cancel_reason END,
           CASE WHEN status = 'PaymentPending' AND EXISTS (SELECT FROM payment_attempts a
                                                           WHERE a.key = bookings.id::text AND a.state = 'NeedsBuyer')
                THEN 'ConfirmPayment' END
    FROM bookings CROSS JOIN LATERAL (SELECT to_jsonb(bookings) ->> 'owner' AS belongs_to) whose
    WHERE id = $1 AND ($2::text[] IS NULL OR belongs_to IS NULL OR belongs_to = ANY($2))";
const EVENTS: &str = "SELECT id, name, capacity, available FROM events ORDER BY created_at, id LIMIT $1";

/// Holds that ran out more than a minute ago, and what to compare next: up to `$2` events that were
/// changed since the snapshot that was the oldest one at `$1`, whatever changed them, the latest change first; and the next
/// `$4` behind `$3`, in turn. The age of a row that was not touched for two billion transactions is negative.
const OVERVIEW: &str = "
    SELECT (SELECT count(*) FROM bookings WHERE status = 'Held' AND held_until < now() - interval '1 minute'),
           ARRAY(SELECT id FROM events WHERE age(xmin) BETWEEN 0 AND age($1::text::xid8::xid)
                 ORDER BY age(xmin) LIMIT $2),
           ARRAY(SELECT id FROM events WHERE id > $3 ORDER BY id LIMIT $4),
           pg_snapshot_xmin(pg_current_snapshot())::text";

/// Those of the events whose free and sold seats are not their capacity.
const COMPARE: &str = "
    SELECT id FROM events e
    WHERE id = ANY($1::uuid[])
      AND capacity <> available + (SELECT COALESCE(sum(b.ticket_count), 0) FROM bookings b
                                   WHERE b.event_id = e.id AND b.status <> 'Cancelled')";

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
    /// It has a price, and there is no payment service.
    #[error("Tickets for this event cannot be sold now: booking has no payment service (PAYMENT_URL)")]
    PaymentsNotSetUp,
    /// Another request with the same key is being booked at this moment.
    #[error("another request with this idempotency key is being booked")]
    KeyUnderWay,
    /// The buyer may not take more now.
    #[error(transparent)]
    Limited(#[from] Limited),
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
            Self::InsufficientTickets
            | Self::EventNotFound
            | Self::KeyReused
            | Self::PaymentsNotSetUp
            | Self::Limited(_) => FailureKind::Business,
            Self::KeyUnderWay => FailureKind::VersionConflict,
            Self::Database(error) => error.kind(),
        }
    }
}

/// A booking that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Booking {
    #[serde(rename = "bookingId")]
    pub id: Uuid,
    pub event_id: Uuid,
    pub user_id: String,
    pub ticket_count: i32,
    /// `Confirmed`, `PaymentPending`, `Held` or `Cancelled`.
    pub status: String,
    /// When a reservation runs out, as RFC 3339 has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_until: Option<String>,
    /// Why it is cancelled: `declined`, `expired`, `given back`, `payment timed out`, `payment unavailable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel_reason: Option<String>,
    /// What the buyer has to do: `ConfirmPayment`, with the provider.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub action: Option<String>,
    /// How it stands, in words for the buyer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    #[serde(rename = "eventId")]
    pub id: Uuid,
    pub name: String,
    /// Seats in all.
    pub capacity: i32,
    pub available: i32,
}

/// A booking as it is when its seats are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Booked {
    pub id: Uuid,
    /// `Confirmed`, `PaymentPending`, `Held`, or for an earlier one `Cancelled`.
    pub status: String,
    /// Why it is cancelled.
    pub cancel_reason: Option<String>,
    /// What is to be paid.
    pub amount_cents: i32,
    /// Whether an earlier request with the same key made it.
    pub before: bool,
    /// Whether the buyer has to confirm the payment with the provider first.
    pub needs_buyer: bool,
}

/// What seats are taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be had without a payment.
    Free,
    /// To be paid for: somebody asks payment within this time.
    Paid { asks_within: Duration },
    /// To be kept for somebody this long.
    Held { keep: Duration },
}

/// Who wants seats, and what for.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    pub order: &'a Order,
    pub asker: &'a Asker,
    pub purpose: Purpose,
    /// Whether it may be of an event that has a price.
    pub sells_priced: bool,
    /// Whether the table says whose a booking is: from step 12 on.
    pub has_owners: bool,
    /// Whether a payment that is asked for later is told to the buyer by mail.
    pub tells: bool,
    /// What one buyer may take; nobody is counted if absent.
    pub limits: Option<&'a Limits>,
}

/// Makes one attempt to take seats. `unanswered` stays true once seats may have been taken without an answer.
pub async fn take(connection: Connection, wish: Wish<'_>, unanswered: &AtomicBool) -> Result<Booked, BookingError> {
    let Wish { order, asker, purpose, sells_priced, has_owners, tells, limits } = wish;
    let (keys, owners) = (asker.stored_keys(&order.idempotency_key), asker.owners());
    let look = connection.prepare_cached(LOOK).await?;
    let values: [&(dyn ToSql + Sync); 5] = [&order.event_id, &order.idempotency_key, &order.email, &keys, &owners];
    let row = connection.query_one(&look, &values).await?;
    if let Some(id) = row.try_get::<_, Option<Uuid>>(1)? {
        let same = row.try_get::<_, Uuid>(2)? == order.event_id
            && row.try_get::<_, &str>(3)? == order.user_id
            && row.try_get::<_, i32>(4)? == order.ticket_count
            && row.try_get(8)?;
        // One that is nobody's, and not the same, is somebody else's.
        let is_another = owners.is_some() && row.try_get(11)?;
        if !same && !is_another {
            return Err(BookingError::KeyReused);
        }
        if same {
            // One of our own attempts may have been committed without our knowing.
            let before = id != order.booking_id;
            let (status, cancel_reason, amount_cents) = (row.try_get(5)?, row.try_get(6)?, row.try_get(7)?);
            let needs_buyer = row.try_get(10)?;
            // The request that made it may be waiting for the disk still.
            connection.batch_execute(FLUSH).await?;
            return Ok(Booked { id, status, cancel_reason, amount_cents, before, needs_buyer });
        }
    }
    let Some(available) = row.try_get::<_, Option<i32>>(0)? else { return Err(BookingError::EventNotFound) };
    // Who comes too late must not queue for the event's row.
    if available < order.ticket_count {
        return Err(BookingError::InsufficientTickets);
    }
    let has_price = row.try_get::<_, Option<i32>>(9)?.is_some_and(|price| price > 0);
    if !sells_priced && has_price {
        return Err(BookingError::PaymentsNotSetUp);
    }
    let costs = has_price && matches!(purpose, Purpose::Paid { .. });
    let of_event = row.try_get(12)?;
    let limits = limits.map(|limits| limits.of_order(asker, purpose, of_event, costs)).unwrap_or_default();
    let is_taken: bool = row.try_get(13)?;
    let key = if is_taken { asker.own_key(&order.idempotency_key) } else { order.idempotency_key.clone() };
    let take = connection.prepare_cached(if has_owners { TAKE } else { TAKE_BEFORE_OWNERS }).await?;
    let Order { booking_id, event_id, user_id, ticket_count, email, .. } = order;
    let (is_paid_for, seconds, keep) = match purpose {
        Purpose::Free => (false, 0.0, None),
        Purpose::Paid { asks_within } => (true, asks_within.as_secs_f64(), None),
        Purpose::Held { keep } => (false, 0.0, Some(keep.as_secs_f64())),
    };
    let (owner, network, of_buyer) = (asker.owner(), asker.network(), limits.as_slice());
    let tells = tells && purpose == Purpose::Paid { asks_within: Duration::ZERO };
    let values: [&(dyn ToSql + Sync); 15] = [
        ticket_count,
        event_id,
        booking_id,
        user_id,
        &key,
        email,
        &is_paid_for,
        &seconds,
        &keep,
        &owner,
        &owners,
        &network,
        &keys,
        &of_buyer,
        &tells,
    ];
    let values = if has_owners { values.as_slice() } else { &values[..9] };
    let before = unanswered.swap(true, Ordering::Relaxed);
    // Sent together, in this order.
    let (taken, flushed) = tokio::join!(biased; connection.query_one(&take, values), connection.batch_execute(FLUSH));
    let status = match &taken {
        Ok(row) => row.try_get::<_, Option<String>>(0)?,
        Err(_) => None,
    };
    // An error without a state is not the server's: the connection broke. And seats that were taken may be lost again
    // until they are on the disk.
    let is_known = match &taken {
        Ok(_) => status.is_none() || flushed.is_ok(),
        Err(error) => error.code().is_some(),
    };
    if is_known {
        unanswered.store(before, Ordering::Relaxed);
    }
    match (taken, status) {
        (Ok(row), Some(status)) => {
            flushed?;
            let amount_cents = row.try_get(1)?;
            Ok(Booked { id: *booking_id, status, cancel_reason: None, amount_cents, before: false, needs_buyer: false })
        }
        (Ok(row), None) => Err(match row.try_get::<_, Option<i32>>(2)? {
            // Another order of the buyer has come before: the next attempt finds its booking.
            Some(0) => BookingError::KeyUnderWay,
            Some(place) => Limited::read(place, row.try_get(3)?, &limits, asker)
                .map_or(BookingError::InsufficientTickets, BookingError::Limited),
            // Others took the last ones meanwhile.
            None => BookingError::InsufficientTickets,
        }),
        // The same key, at the same moment: the next attempt finds its booking.
        (Err(error), _) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => Err(BookingError::KeyUnderWay),
        (Err(error), _) => Err(error.into()),
    }
}

/// Waits for a statement that changes something. `unanswered` stays true once one had no answer, also if it is given up.
pub async fn answered<T>(
    unanswered: &AtomicBool,
    statement: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, tokio_postgres::Error> {
    let before = unanswered.swap(true, Ordering::Relaxed);
    let result = statement.await;
    // An error without a state is not the server's: the connection broke.
    if result.as_ref().map_or_else(|error| error.code().is_some(), |_| true) {
        unanswered.store(before, Ordering::Relaxed);
    }
    result
}

/// A booking of which the payment is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    pub booking: Uuid,
    /// What is to be paid.
    pub amount_cents: i32,
    /// How often payment was asked later, this time included.
    pub tries: i32,
    /// How long it has been waiting.
    pub age: Duration,
}

/// Claims up to `most` bookings of which the payment is open.
pub async fn due(connection: Connection, most: i64) -> Result<Vec<Due>, DatabaseError> {
    let due = connection.prepare_cached(DUE).await?;
    let one = |row: &tokio_postgres::Row| {
        let age = Duration::try_from_secs_f64(row.try_get(3)?).unwrap_or_default();
        Ok(Due { booking: row.try_get(0)?, amount_cents: row.try_get(1)?, tries: row.try_get(2)?, age })
    };
    connection.query(&due, &[&most]).await?.iter().map(one).collect()
}

/// What the buyer is told, by mail, of a payment that is open: each once, however often it is settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    Nothing,
    /// That it is open.
    Open,
    /// To confirm it.
    ToConfirm,
}

/// Makes a booking due soon, and writes down what the buyer is told.
pub async fn settle_soon(connection: Connection, booking: Uuid, told: Told) -> Result<u64, DatabaseError> {
    if told == Told::ToConfirm {
        let wait = connection.prepare_cached(WAIT_FOR_BUYER).await?;
        return Ok(connection.execute(&wait, &[&booking]).await?);
    }
    let soon = connection.prepare_cached(SETTLE_SOON).await?;
    Ok(connection.execute(&soon, &[&booking, &(told == Told::Open)]).await?)
}

/// Confirms a booking that is paid; doing it again changes nothing. The answer is how it stands then.
pub async fn confirm(connection: Connection, booking: Uuid) -> Result<String, DatabaseError> {
    let confirm = connection.prepare_cached(CONFIRM).await?;
    if connection.execute(&confirm, &[&booking]).await? == 0 {
        // An attempt before this one may be waiting for the disk or a replica still.
        connection.batch_execute(FLUSH).await?;
    }
    status(&connection, booking).await
}

/// Cancels a booking that is not going to be paid, and gives its seats back; doing it again changes nothing. `tries` is how
/// often payment was asked later, as far as the caller knows: if somebody has asked since, nothing is cancelled. `tell`: the
/// buyer gets a mail. The answer is how it stands then, and stays so after a crash: the buyer is told that
/// nothing will be charged.
pub async fn cancel(
    connection: Connection,
    booking: Uuid,
    reason: &str,
    tries: i32,
    tell: bool,
) -> Result<String, DatabaseError> {
    let cancel = connection.prepare_cached(CANCEL).await?;
    let values: [&(dyn ToSql + Sync); 4] = [&booking, &reason, &tries, &tell];
    // Sent together, in this order.
    let (cancelled, flushed) =
        tokio::join!(biased; connection.execute(&cancel, &values), connection.batch_execute(FLUSH));
    cancelled?;
    flushed?;
    status(&connection, booking).await
}

async fn status(connection: &Connection, booking: Uuid) -> Result<String, DatabaseError> {
    let status = connection.prepare_cached(STATUS).await?;
    Ok(connection.query_one(&status, &[&booking]).await?.try_get(0)?)
}

/// Finds a booking that the asker may see. The answer stays true after a crash.
pub async fn find(connection: Connection, id: Uuid, asker: &Asker) -> Result<Option<Booking>, DatabaseError> {
    let find = connection.prepare_cached(FIND).await?;
    let Some(row) = connection.query_opt(&find, &[&id, &asker.owners()]).await? else { return Ok(None) };
    if row.try_get::<_, &str>(4)? != "PaymentPending" {
        // The request that made it so may be waiting for the disk still, and may yet be told otherwise.
        connection.batch_execute(FLUSH).await?;
    }
    let mut booking = Booking {
        id: row.try_get(0)?,
        event_id: row.try_get(1)?,
        user_id: row.try_get(2)?,
        ticket_count: row.try_get(3)?,
        status: row.try_get(4)?,
        held_until: row.try_get(5)?,
        cancel_reason: row.try_get(6)?,
        action: row.try_get(7)?,
        message: None,
    };
    booking.message = message(&booking);
    Ok(Some(booking))
}

/// What a buyer is to know of a booking that is not simply confirmed or held.
fn message(booking: &Booking) -> Option<&'static str> {
    match booking.status.as_str() {
        "Cancelled" => Some(CancelReason::read(booking.cancel_reason.as_deref()).message()),
        "PaymentPending" if booking.action.is_some() => Some(CONFIRM_PAYMENT),
        "PaymentPending" => {
            Some("The payment is being settled; the seats are kept meanwhile. There is no need to book again.")
        }
        _ => None,
    }
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

/// Bookings that wait for their payment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    pub count: i64,
    /// Those of them that wait for their buyers to act.
    pub for_buyers: i64,
    /// For how long the oldest has waited, without the time that its buyer had to act.
    pub age: Duration,
}

/// The bookings that wait for their payment, where a buyer has `buyer_limit` to act.
pub async fn pending(connection: Connection, buyer_limit: Duration) -> Result<Waiting, DatabaseError> {
    let pending = connection.prepare_cached(PENDING).await?;
    let row = connection.query_one(&pending, &[&buyer_limit.as_secs_f64()]).await?;
    let age = Duration::try_from_secs_f64(row.try_get(2)?).unwrap_or_default();
    Ok(Waiting { count: row.try_get(0)?, for_buyers: row.try_get(1)?, age })
}

/// Whether an event has a price.
pub async fn has_priced_events(connection: Connection) -> Result<bool, DatabaseError> {
    let any = connection.prepare_cached(PRICED).await?;
    Ok(connection.query_one(&any, &[]).await?.try_get(0)?)
}

/// What there is to compare, and how many holds have run out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overview {
    /// Holds that ran out and still keep their seats.
    pub expired_holds: i64,
    /// Events that were changed since the overview before, the latest change first.
    pub changed: Vec<Uuid>,
    /// The next events in turn, by their ids.
    pub in_turn: Vec<Uuid>,
    /// Transaction id of the server from which on this overview knows nothing of changes.
    pub since: Option<String>,
}

/// What an overview lists.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// `since` of the overview before; absent at first, when nothing counts as changed.
    pub since: Option<&'a str>,
    /// Changed events at most.
    pub changed: i64,
    /// The last event that had its turn.
    pub behind: Uuid,
    /// Events in turn at most.
    pub in_turn: i64,
}

/// Looks what there is to compare. The server gives it up after `time`.
pub async fn overview(connection: &Connection, wanted: Wanted<'_>, time: Duration) -> Result<Overview, DatabaseError> {
    let Wanted { since, changed, behind, in_turn } = wanted;
    let rows = bounded(connection, OVERVIEW, &[&since, &changed, &behind, &in_turn], time).await?;
    let Some(row) = rows.first() else { return Err(DatabaseError::Pool("an overview without a row".to_owned())) };
    Ok(Overview {
        expired_holds: row.try_get(0)?,
        changed: row.try_get(1)?,
        in_turn: row.try_get(2)?,
        since: row.try_get(3)?,
    })
}

/// Compares seats with bookings, each event in one snapshot; the answer is which events do not add up. The server gives it
/// up after `time`: it must not disturb those who buy.
pub async fn compare(connection: &Connection, events: &[Uuid], time: Duration) -> Result<Vec<Uuid>, DatabaseError> {
    bounded(connection, COMPARE, &[&events], time).await?.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// Reads with a bound of its own.
async fn bounded(
    connection: &Connection,
    query: &str,
    values: &[&(dyn ToSql + Sync)],
    time: Duration,
) -> Result<Vec<tokio_postgres::Row>, DatabaseError> {
    let query = connection.prepare_cached(query).await?;
    let bound = format!("BEGIN READ ONLY; SET LOCAL statement_timeout = {}", time.as_millis().max(1));
    // Sent together, in this order, so that the connection is in use for no longer than it takes. After a failure, the end
    // of the transaction undoes it.
    let (began, rows, ended) = tokio::join!(
        biased;
        connection.batch_execute(&bound),
        connection.query(&query, values),
        connection.batch_execute("COMMIT"),
    );
    began?;
    let rows = rows?;
    ended?;
    Ok(rows)
}

/// Statements that are made for each order, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("look", LOOK),
    ("take", TAKE),
    ("take before owners", TAKE_BEFORE_OWNERS),
    ("due", DUE),
    ("settle soon", SETTLE_SOON),
    ("wait for buyer", WAIT_FOR_BUYER),
    ("confirm", CONFIRM),
    ("cancel", CANCEL),
    ("status", STATUS),
    ("pending", PENDING),
    ("priced events", PRICED),
    ("find", FIND),
    ("events", EVENTS),
    ("overview", OVERVIEW),
    ("compare", COMPARE),
];
