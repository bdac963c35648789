//! The outbox: the messages to buyers, and how far each of them is.

use crate::database::{Connection, DatabaseError};
use crate::retention::Rule;
use std::time::Duration;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// How long a claim holds: longer than a mail may take.
pub const CLAIM: Duration = Duration::from_secs(60);

/// How far a look goes into the outbox: the first so many that are due, whatever their domains.
const WINDOW: i64 = 200;
/// Domains that one look goes through. Those behind them are for the next.
pub const DOMAINS: usize = 300;

/// What has waited longest, of the kinds that are wanted and to none of the domains that have no place. Bounded, however many
/// mails to such domains wait in front.
const DUE: &str = "
    SELECT id, domain FROM (
        SELECT id, domain, kind, next_at FROM outbox
        WHERE done_at IS NULL AND (claimed_until IS NULL OR claimed_until < now())
        ORDER BY next_at, id LIMIT $1
    ) first
    WHERE next_at <= now() AND kind = ANY($2) AND domain <> ALL($3)
    ORDER BY next_at, id";

/// The domains that open messages of a kind go to, in their order behind one of them: a look at the index for each.
const OPEN_DOMAINS: &str = "
    WITH RECURSIVE open AS (
        (SELECT domain, 1 AS nth FROM outbox WHERE done_at IS NULL AND kind = $1 AND domain > $2 ORDER BY domain LIMIT 1)
        UNION ALL
        SELECT following.domain, nth + 1 FROM open CROSS JOIN LATERAL (
            SELECT domain FROM outbox WHERE done_at IS NULL AND kind = $1 AND domain > open.domain ORDER BY domain LIMIT 1
        ) following
        WHERE nth < $3
    )
    SELECT domain FROM open";

/// What has waited longest for each of these domains; so many for each, and so many in all.
const DUE_OF: &str = "
    SELECT due.id, wanted.domain FROM unnest($2::text[]) AS wanted (domain) CROSS JOIN LATERAL (
        SELECT id FROM outbox
        WHERE done_at IS NULL AND kind = $1 AND domain = wanted.domain AND next_at <= now()
          AND (claimed_until IS NULL OR claimed_until < now())
        ORDER BY next_at, id LIMIT $3
    ) due
    LIMIT $4";

/// Claims some of these. Done twice it claims the same ones: its answer may get lost. A process whose claim ran
/// out while the mail was leaving has died.
const CLAIM_SQL: &str = "
    WITH next AS MATERIALIZED (
        SELECT id FROM outbox
        WHERE id = ANY($3) AND done_at IS NULL
          AND (claim = $1 OR next_at <= now() AND (claimed_until IS NULL OR claimed_until < now()))
        ORDER BY (claim IS NOT DISTINCT FROM $1) DESC, next_at, id LIMIT $4 FOR UPDATE SKIP LOCKED
    ), claimed AS (
        UPDATE outbox SET claim = $1, claimed_until = now() + $2 * interval '1 second',
                          tries = tries + (claim IS DISTINCT FROM $1)::integer,
                          possible_duplicates = possible_duplicates + (sending AND claim IS NOT NULL AND claim <> $1)::integer
        WHERE id IN (SELECT id FROM next)
        RETURNING id, booking_id, kind, tries, sending, domain, possible_duplicates, waiting_since
    )
    SELECT c.id, c.booking_id, c.kind, c.tries, c.sending, b.email, b.user_id, b.ticket_count, b.amount_cents, e.name,
           to_char(e.starts_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI \"UTC\"'), c.domain, c.possible_duplicates,
           greatest(extract(epoch FROM now() - c.waiting_since), 0)::double precision, b.event_id, b.status, b.cancel_reason,
           c.kind = 'PaymentPending' AND EXISTS (SELECT FROM outbox o
                                                 WHERE o.booking_id = c.booking_id AND o.kind = 'ConfirmPayment')
    FROM claimed c JOIN bookings b ON b.id = c.booking_id JOIN events e ON e.id = b.event_id";

const SENDING: &str = "
    UPDATE outbox SET sending = true, claimed_until = now() + $3 * interval '1 second'
    WHERE id = $1 AND claim = $2 AND done_at IS NULL AND claimed_until > now()";

/// What is done; a ticket that could not be made follows later.
const DONE: &str = "
    WITH done AS (
        UPDATE outbox SET done_at = now(), claim = NULL, claimed_until = NULL, sending = false, last_error = NULL
        WHERE id = $1 AND claim = $2 AND done_at IS NULL RETURNING booking_id
    )
    INSERT INTO outbox (booking_id, kind) SELECT booking_id, 'Ticket' FROM done WHERE $3
    ON CONFLICT (booking_id, kind) DO NOTHING";

const LATER: &str = "
    UPDATE outbox SET claim = NULL, claimed_until = NULL, sending = $4, next_at = now() + $3 * interval '1 second',
                      possible_duplicates = possible_duplicates + $5::integer, last_error = $6
    WHERE id = $1 AND claim = $2 AND done_at IS NULL";

/// Back as if it had not been claimed, at its place or after a while.
const HOLD: &str = "
    UPDATE outbox SET claim = NULL, claimed_until = NULL, sending = $3, tries = greatest(tries - 1, 0), last_error = $4,
                      next_at = COALESCE(now() + $5::float8 * interval '1 second', next_at)
    WHERE id = $1 AND claim = $2 AND done_at IS NULL";

/// Back as if they had not been claimed, at their place.
const GIVE_BACK: &str = "
    UPDATE outbox SET claim = NULL, claimed_until = NULL, tries = greatest(tries - 1, 0)
    WHERE id = ANY($1) AND claim = $2 AND done_at IS NULL";

/// For how long the oldest message waits.
const OLDEST: &str = "
    SELECT COALESCE(extract(epoch FROM now() - min(waiting_since)), 0)::double precision FROM outbox WHERE done_at IS NULL";

const NEVER: &str = "
    WITH done AS (
        UPDATE outbox SET done_at = now(), claim = NULL, claimed_until = NULL, sending = false, last_error = $3
        WHERE id = $1 AND claim = $2 AND done_at IS NULL RETURNING id
    )
    INSERT INTO dead_letters (outbox_id, reason) SELECT id, $3 FROM done";

/// Mails that were sent. What could not be sent stays until a person has looked at it.
pub const RETENTION: Rule = Rule {
    what: "sent mails",
    sql: "
    DELETE FROM outbox WHERE id = ANY(ARRAY(
        SELECT id FROM outbox o
        WHERE done_at < now() - $1 * interval '1 day'
          AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.outbox_id = o.id)
        ORDER BY done_at LIMIT $2 FOR UPDATE SKIP LOCKED))",
};

/// Statements that are made for each mail, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("mails that are due", DUE),
    ("domains of mails", OPEN_DOMAINS),
    ("mails of domains", DUE_OF),
    ("claim mails", CLAIM_SQL),
    ("sending", SENDING),
    ("done", DONE),
    ("later", LATER),
    ("hold", HOLD),
    ("give back", GIVE_BACK),
    ("oldest mail", OLDEST),
    ("never", NEVER),
    ("old mails", RETENTION.sql),
];

/// What a message is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// That a booking is confirmed, with the ticket if that may be made.
    BookingConfirmed,
    /// The ticket, which could not be made then.
    Ticket,
    /// That a booking or a reservation came to nothing, and why.
    BookingCancelled,
    /// That the seats are kept and the payment is open.
    PaymentPending,
    /// That the buyer has to confirm the payment with the provider.
    ConfirmPayment,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::BookingConfirmed, Self::Ticket, Self::BookingCancelled, Self::PaymentPending, Self::ConfirmPayment];

    /// Its name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::BookingConfirmed => "BookingConfirmed",
            Self::Ticket => "Ticket",
            Self::BookingCancelled => "BookingCancelled",
            Self::PaymentPending => "PaymentPending",
            Self::ConfirmPayment => "ConfirmPayment",
        }
    }

    /// How its booking stands for as long as the message is true.
    fn status(self) -> &'static str {
        match self {
            Self::BookingConfirmed | Self::Ticket => "Confirmed",
            Self::BookingCancelled => "Cancelled",
            Self::PaymentPending | Self::ConfirmPayment => "PaymentPending",
        }
    }

    /// Whether tickets come with it, if they may be made.
    pub fn has_tickets(self) -> bool {
        matches!(self, Self::BookingConfirmed | Self::Ticket)
    }
}

/// A message that is ours to send.
#[derive(Clone, Debug)]
pub struct Message {
    /// Its place in the outbox.
    pub id: i64,
    pub(super) claim: Uuid,
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
    pub event_id: Uuid,
    pub event: String,
    pub starts_at: Option<String>,
    /// The domain that it goes to, for the limit of one; empty without an address.
    pub domain: String,
    /// How often it left without an answer.
    pub unanswered: i32,
    /// For how long it has been tried.
    pub age: Duration,
    /// How the booking stands by now.
    pub status: String,
    /// Why it is cancelled, if it is.
    pub cancel_reason: Option<String>,
    /// Whether another message asks the buyer to confirm the payment that this one says is open.
    pub asks_to_confirm: bool,
}

/// A message that may be claimed.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub id: i64,
    pub domain: String,
}

fn candidates(rows: &[Row]) -> Result<Vec<Candidate>, DatabaseError> {
    rows.iter().map(|row| Ok(Candidate { id: row.try_get(0)?, domain: row.try_get(1)? })).collect()
}

/// Messages of these kinds that are due, none of them to one of the `full` domains; not all of them if there are many.
pub async fn due(connection: Connection, kinds: &[&str], full: &[String]) -> Result<Vec<Candidate>, DatabaseError> {
    let sql = connection.prepare_cached(DUE).await?;
    candidates(&connection.query(&sql, &[&WINDOW, &kinds, &full]).await?)
}

/// The next domains behind `after` that messages of this kind wait for, in order; at most [`DOMAINS`].
pub async fn open_domains(connection: Connection, kind: &str, after: &str) -> Result<Vec<String>, DatabaseError> {
    let sql = connection.prepare_cached(OPEN_DOMAINS).await?;
    let most = i32::try_from(DOMAINS).unwrap_or(i32::MAX);
    let rows = connection.query(&sql, &[&kind, &after, &most]).await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// Messages of this kind to these domains that are due; at most so many of each, and so many in all.
pub async fn due_of(
    connection: Connection,
    kind: &str,
    domains: &[String],
    of_each: usize,
    most: usize,
) -> Result<Vec<Candidate>, DatabaseError> {
    let sql = connection.prepare_cached(DUE_OF).await?;
    let limits = [of_each, most].map(|limit| i64::try_from(limit).unwrap_or(i64::MAX));
    candidates(&connection.query(&sql, &[&kind, &domains, &limits[0], &limits[1]]).await?)
}

/// Takes up to `most` of these messages. May be done again with the same `claim` when its outcome is not known.
pub async fn claim(
    connection: Connection,
    claim: Uuid,
    ids: &[i64],
    most: usize,
) -> Result<Vec<Message>, DatabaseError> {
    let sql = connection.prepare_cached(CLAIM_SQL).await?;
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let rows = connection.query(&sql, &[&claim, &CLAIM.as_secs_f64(), &ids, &most]).await?;
    rows.iter().map(|row| Ok(Message::read(row, claim)?)).collect()
}

impl Message {
    fn read(row: &Row, claim: Uuid) -> Result<Self, tokio_postgres::Error> {
        let name: &str = row.try_get(2)?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name).unwrap_or(Kind::BookingConfirmed);
        Ok(Self {
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
            domain: row.try_get(11)?,
            unanswered: row.try_get(12)?,
            age: Duration::try_from_secs_f64(row.try_get(13)?).unwrap_or_default(),
            event_id: row.try_get(14)?,
            status: row.try_get(15)?,
            cancel_reason: row.try_get(16)?,
            asks_to_confirm: row.try_get(17)?,
        })
    }

    /// Whether the booking has gone on since it was written, or the buyer has to act: another message says how it stands now.
    pub fn is_outdated(&self) -> bool {
        self.status != self.kind.status() || self.asks_to_confirm
    }
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
    why: &str,
) -> Result<u64, DatabaseError> {
    let sql = connection.prepare_cached(LATER).await?;
    let (seconds, may_be_sent) = (wait.as_secs_f64(), unanswered || message.may_be_sent);
    let values: [&(dyn ToSql + Sync); 6] =
        [&message.id, &message.claim, &seconds, &may_be_sent, &i32::from(unanswered), &why];
    Ok(connection.execute(&sql, &values).await?)
}

/// The message waits for the mail server, and this try does not count. It is tried again after `wait`, or at its place.
pub async fn hold(
    connection: Connection,
    message: &Message,
    wait: Option<Duration>,
    why: &str,
) -> Result<u64, DatabaseError> {
    let sql = connection.prepare_cached(HOLD).await?;
    let seconds = wait.map(|wait| wait.as_secs_f64());
    let values: [&(dyn ToSql + Sync); 5] = [&message.id, &message.claim, &message.may_be_sent, &why, &seconds];
    Ok(connection.execute(&sql, &values).await?)
}

/// These messages are not worked on after all, as far as they have this claim.
pub async fn give_back(connection: Connection, claim: Uuid, ids: &[i64]) -> Result<u64, DatabaseError> {
    let sql = connection.prepare_cached(GIVE_BACK).await?;
    Ok(connection.execute(&sql, &[&ids, &claim]).await?)
}

/// For how long the oldest message of the outbox waits.
pub async fn oldest(connection: Connection) -> Result<Duration, DatabaseError> {
    let sql = connection.prepare_cached(OLDEST).await?;
    let seconds = connection.query_one(&sql, &[]).await?.try_get(0)?;
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or_default())
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
            event_id: "11111111-1111-4111-8111-111111111111".parse().unwrap(),
            event: event.into(),
            starts_at: Some("2027-06-18 19:30 UTC".into()),
            domain: "example.com".into(),
            unanswered: 0,
            age: Duration::ZERO,
            status: kind.status().into(),
            cancel_reason: None,
            asks_to_confirm: false,
        }
    }
}
