//! Money to give back: rows of `refunds`, those of each provider worked off apart, several at once; and the search for
//! what belongs there.

use super::decision::{PROVIDERS, Purpose};
use super::ledger::Order;
use super::process::Payments;
use super::providers::{self, ProviderClient};
use crate::database::{Connection, Database, DatabaseError};
use crate::side_by_side::side_by_side;
use contract::CheckStatus;
use futures::future::join_all;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use resilience::{CallError, Check, CheckOutcome, Priority, Resilience, priority};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Time between two looks for refunds to make.
const LOOK: Duration = Duration::from_secs(1);
/// Time between two searches for charges of cancelled bookings.
const SWEEP: Duration = Duration::from_secs(30);
/// How old the bookings are that a search looks at, and those that one of so many searches does.
const RECENT: Duration = Duration::from_secs(3_600);
const LONG_AGO: Duration = Duration::from_secs(30 * 24 * 3_600);
const LONG_AGO_EVERY: u32 = 120;
/// Longer than anybody keeps a booking.
const EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
/// Payments that one search ends at most; and statements with which it looks for them, or for what was cancelled by hand.
const AT_ONCE: u32 = 20;
const MAX_PAGES: u32 = 20;
/// Longest text of an error that is kept, in characters.
const MAX_WORDS: usize = 300;
/// Age of an open refund from which on something is wrong, and from which on a person must see to it.
const LATE: Duration = Duration::from_secs(900);
const TOO_LATE: Duration = Duration::from_secs(24 * 3_600);

/// Charges of the next bookings that are cancelled for these reasons, from a place on, which `$3` seconds ago is the first one. Most
/// of the rows are written when the charge is heard of; this is for what was not. The charges are looked up one by one,
/// however many bookings the server expects, and no statement looks at more than some.
macro_rules! find {
    ($reasons:literal) => {
        concat!(
            "
    WITH page AS MATERIALIZED (
        SELECT created_at, id FROM bookings
        WHERE status = 'Cancelled' AND ",
            $reasons,
            "
          AND (created_at, id) > (COALESCE($1::text::timestamptz, now() - $3 * interval '1 second'), $2)
        ORDER BY created_at, id LIMIT 500
    ), owed AS (
        INSERT INTO refunds (key, provider, charge_id, reason)
        SELECT key, provider, charge_id, 'the booking was cancelled' FROM payment_attempts
        WHERE key = ANY(ARRAY(SELECT id::text FROM page)) AND state = 'Charged'
        ON CONFLICT DO NOTHING RETURNING key
    )
    SELECT created_at::text, id, (SELECT count(*) FROM owed)
    FROM page ORDER BY page.created_at DESC, page.id DESC LIMIT 1"
        )
    };
}

/// By a service, for a reason with which something may be charged.
const FIND: &str = find!("cancel_reason IN ('declined', 'payment timed out', 'payment unavailable')");

/// By a person, who gives any other reason, or none.
const FIND_BY_HAND: &str = find!(
    "COALESCE(cancel_reason, '') NOT IN ('declined', 'payment timed out', 'payment unavailable', 'expired', 'given back')"
);

/// The next payments that may still be charged, from a key on, however old; and whether the booking of each is cancelled and
/// nobody works on it.
const OPEN: &str = "
    WITH page AS MATERIALIZED (
        SELECT key FROM payment_attempts
        WHERE state IN ('Begun', 'NotCharged', 'Confirming', 'Reconfirming', 'NeedsBuyer') AND key > $1
        ORDER BY key LIMIT 500
    )
    SELECT p.key, p.amount_cents, p.currency,
           COALESCE((SELECT b.status = 'Cancelled' AND COALESCE(b.cancel_reason, '') NOT IN ('expired', 'given back')
                     FROM bookings b
                     WHERE b.id = CASE WHEN p.key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN p.key::uuid END), false)
           AND (p.claimed_until IS NULL OR p.claimed_until < now())
           AND (SELECT count(*) FROM payment_attempts c WHERE c.key = p.key AND c.state = 'Charged') = 0
    FROM payments p WHERE p.key = ANY(ARRAY(SELECT key FROM page)) ORDER BY p.key";

/// Events are kept for as long as a provider may repeat one, and for a look back.
const FORGET: &str = "
    DELETE FROM webhook_events WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM webhook_events
        WHERE done_at < now() - interval '30 days' ORDER BY done_at LIMIT 1000 FOR UPDATE SKIP LOCKED))";

/// The next try comes later each time, up to an hour.
const CLAIM: &str = "
    UPDATE refunds SET tries = tries + 1,
                       next_at = now() + greatest(30, least(2 ^ least(tries, 12), 3600)) * interval '1 second'
    WHERE provider = $1 AND charge_id = ANY(ARRAY(
        SELECT charge_id FROM refunds WHERE provider = $1 AND done_at IS NULL AND next_at <= now()
        ORDER BY next_at LIMIT $2 FOR UPDATE SKIP LOCKED))
    RETURNING key, charge_id, tries";

/// Of a provider that nobody knows here, nothing is claimed; the check `refunds` has this to say.
const ORPHANED: &str = "
    UPDATE refunds SET last_error = 'there is no provider ' || provider || ' any more'
    WHERE done_at IS NULL AND provider <> ALL($1) AND last_error IS NULL";

const DONE: &str = "UPDATE refunds SET done_at = now(), refund_id = $3, last_error = NULL
                    WHERE provider = $1 AND charge_id = $2 AND done_at IS NULL";
const FAILED: &str = "UPDATE refunds SET last_error = $3 WHERE provider = $1 AND charge_id = $2 AND done_at IS NULL";
const BACKLOG: &str = "
    SELECT count(*), COALESCE(extract(epoch FROM now() - min(created_at)), 0)::float8,
           (SELECT last_error FROM refunds WHERE done_at IS NULL ORDER BY created_at LIMIT 1)
    FROM refunds WHERE done_at IS NULL";

/// Statements that are made for each refund, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("charges of cancelled bookings", FIND),
    ("charges of bookings that were cancelled by hand", FIND_BY_HAND),
    ("open payments of cancelled bookings", OPEN),
    ("old events", FORGET),
    ("claim refunds", CLAIM),
    ("refunds of no provider", ORPHANED),
    ("a refund is made", DONE),
    ("a refund failed", FAILED),
    ("open refunds", BACKLOG),
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

struct Refund {
    key: String,
    charge: String,
    tries: i32,
}

/// The last booking that a search has looked at.
#[derive(Default)]
struct Place {
    at: Option<String>,
    booking: Uuid,
}

pub struct Refunds {
    database: Arc<Database>,
    payments: Arc<Payments>,
    providers: [Arc<dyn ProviderClient>; PROVIDERS],
    /// Refunds of one provider that are made side by side.
    at_once: usize,
    outcomes: Family<OutcomeLabel, Counter>,
    age: Gauge,
}

impl Refunds {
    pub fn new(
        database: &Arc<Database>,
        payments: &Arc<Payments>,
        providers: [Arc<dyn ProviderClient>; PROVIDERS],
        at_once: usize,
        resilience: &Resilience,
    ) -> Arc<Self> {
        let (outcomes, age) = (Family::<OutcomeLabel, Counter>::default(), Gauge::default());
        resilience.metrics().register(|registry| {
            registry.register("refunds", "Tries to give money back, by outcome", outcomes.clone());
            registry.register("refunds_oldest_seconds", "Age of the oldest refund that is not made yet", age.clone());
        });
        let (database, payments) = (Arc::clone(database), Arc::clone(payments));
        Arc::new(Self { database, payments, providers, at_once, outcomes, age })
    }

    /// Works off refunds, and searches for more, for as long as it is polled. Neither waits for the payments that are
    /// closed beside, which asks providers; and buyers who pay get their connections to the database before refunds.
    pub async fn run(self: Arc<Self>) {
        let working_off = join_all((0..PROVIDERS).map(|index| self.work_off(index)));
        tokio::join!(self.search(), self.close(), priority::within(Priority::Look, working_off));
    }

    /// One failure holds up nothing else.
    async fn search(&self) {
        let mut by_hand = Place::default();
        for nth in 0u32.. {
            let age = if nth.is_multiple_of(LONG_AGO_EVERY) { LONG_AGO } else { RECENT };
            if let Err(error) = self.find(age).await {
                tracing::warn!(%error, "failed to look for charges of cancelled bookings");
            }
            if let Err(error) = self.find_by_hand(&mut by_hand).await {
                tracing::warn!(%error, "failed to look for charges of bookings that were cancelled by hand");
            }
            if let Err(error) = self.forget().await {
                tracing::warn!(%error, "failed to delete old events of providers");
            }
            if let Err(error) = self.mark_orphaned().await {
                tracing::warn!(%error, "failed to look for refunds of providers that are gone");
            }
            match self.database.call(backlog).await {
                Ok((_, age, _)) => {
                    self.age.set(i64::try_from(age.as_secs()).unwrap_or(i64::MAX));
                }
                Err(error) => tracing::warn!(%error, "failed to read how old the oldest refund is"),
            }
            tokio::time::sleep(SWEEP).await;
        }
    }

    /// Closes what is open of cancelled bookings.
    async fn close(&self) {
        // Where the last search for what is open has ended, so that each has its turn. Several pods begin in several
        // places.
        let mut place = Uuid::new_v4().to_string();
        loop {
            if let Err(error) = self.end_open(&mut place).await {
                tracing::warn!(%error, "failed to look for open payments of cancelled bookings");
            }
            tokio::time::sleep(SWEEP).await;
        }
    }

    /// Works off those of one provider.
    async fn work_off(&self, index: usize) {
        let claim = |most: usize| async move {
            match self.claim(index, most).await {
                Ok(refunds) => refunds,
                Err(error) => {
                    tracing::debug!(%error, "failed to read refunds");
                    tokio::time::sleep(LOOK).await;
                    Vec::new()
                }
            }
        };
        let make = |refund: Refund| async move {
            if let Err(error) = self.make(index, &refund).await {
                tracing::debug!(%error, "failed to write down how a refund went");
            }
        };
        side_by_side(|| self.at_once, LOOK, claim, make).await;
    }

    /// Finds what is charged for bookings of that age that are cancelled.
    async fn find(&self, age: Duration) -> Result<(), CallError<DatabaseError>> {
        let mut place = Place::default();
        while self.find_page(FIND, age, &mut place).await? {}
        Ok(())
    }

    /// The same for some of those that were cancelled by hand, from `place` on: there may be all of a cancelled event, as old as its
    /// first sale, and nothing says when they were cancelled.
    async fn find_by_hand(&self, place: &mut Place) -> Result<(), CallError<DatabaseError>> {
        for _ in 0..MAX_PAGES {
            if !self.find_page(FIND_BY_HAND, EVER, place).await? {
                *place = Place::default();
                return Ok(());
            }
        }
        Ok(())
    }

    /// Finds what is charged for the bookings of the next page; `false`: there is none.
    async fn find_page(
        &self,
        statement: &'static str,
        age: Duration,
        place: &mut Place,
    ) -> Result<bool, CallError<DatabaseError>> {
        let (since, booking, age) = (&place.at, &place.booking, age.as_secs_f64());
        let find = |connection: Connection| async move {
            let find = connection.prepare_cached(statement).await?;
            let values: [&(dyn ToSql + Sync); 3] = [since, booking, &age];
            let Some(row) = connection.query_opt(&find, &values).await? else { return Ok(None) };
            Ok::<_, DatabaseError>(Some((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)))
        };
        let Some((at, booking, found)) = self.database.call(find).await? else { return Ok(false) };
        let found: i64 = found;
        if found > 0 {
            tracing::warn!(found, "found charges of cancelled bookings; they are refunded");
        }
        *place = Place { at: Some(at), booking };
        Ok(true)
    }

    /// Ends some of what is open of cancelled bookings, from `place` on.
    async fn end_open(&self, place: &mut String) -> Result<(), CallError<DatabaseError>> {
        let mut ended = 0;
        for _ in 0..MAX_PAGES {
            let from = &*place;
            let open = |connection: Connection| async move {
                let open = connection.prepare_cached(OPEN).await?;
                let one = |row: &tokio_postgres::Row| {
                    let order =
                        Order { key: row.try_get(0)?, amount_cents: row.try_get(1)?, currency: row.try_get(2)? };
                    Ok((order, row.try_get(3)?))
                };
                connection.query(&open, &[from]).await?.iter().map(one).collect::<Result<Vec<_>, DatabaseError>>()
            };
            let page = self.database.call(open).await?;
            if page.is_empty() {
                // From the beginning, next time.
                place.clear();
                return Ok(());
            }
            for (order, is_due) in page {
                if is_due && ended == AT_ONCE {
                    return Ok(());
                }
                order.key.clone_into(place);
                if !is_due {
                    continue;
                }
                ended += 1;
                match self.payments.pay(&order, Purpose::Close, None).await {
                    Ok(outcome) => {
                        tracing::info!(key = %order.key, ?outcome, "closed the payment of a cancelled booking");
                    }
                    Err(error) => {
                        tracing::warn!(key = %order.key, %error, "failed to close the payment of a cancelled booking");
                    }
                }
            }
        }
        Ok(())
    }

    async fn forget(&self) -> Result<(), CallError<DatabaseError>> {
        let forget = |connection: Connection| async move {
            let forget = connection.prepare_cached(FORGET).await?;
            connection.execute(&forget, &[]).await.map_err(DatabaseError::from)
        };
        self.database.call(forget).await.map(drop)
    }

    async fn mark_orphaned(&self) -> Result<(), CallError<DatabaseError>> {
        let names = &self.providers.each_ref().map(|provider| provider.name());
        let mark = |connection: Connection| async move {
            let mark = connection.prepare_cached(ORPHANED).await?;
            connection.execute(&mark, &[&names.as_slice()]).await.map_err(DatabaseError::from)
        };
        self.database.call(mark).await.map(drop)
    }

    /// Claims refunds of a provider that are due, `most` of them at most: those that have waited longest.
    async fn claim(&self, index: usize, most: usize) -> Result<Vec<Refund>, CallError<DatabaseError>> {
        let (provider, most) = (self.providers[index].name(), i64::try_from(most).unwrap_or(i64::MAX));
        let claim = |connection: Connection| async move {
            let claim = connection.prepare_cached(CLAIM).await?;
            let one = |row: &tokio_postgres::Row| {
                Ok(Refund { key: row.try_get(0)?, charge: row.try_get(1)?, tries: row.try_get(2)? })
            };
            let claimed = connection.query(&claim, &[&provider, &most]).await?;
            claimed.iter().map(one).collect::<Result<Vec<_>, DatabaseError>>()
        };
        self.database.call(claim).await
    }

    /// Makes one refund.
    async fn make(&self, index: usize, refund: &Refund) -> Result<(), CallError<DatabaseError>> {
        let Refund { key, charge, tries } = refund;
        let provider = self.providers[index].name();
        // A failure may be stored for a key, so each try has its own; the refunds of the charge are read before, and a
        // provider gives back no more than was charged.
        let made = self.providers[index].refund(&format!("{key}:refund:{charge}:{tries}"), charge).await;
        let (sql, text, outcome) = match made {
            Ok(providers::Refund::Pending) => {
                tracing::debug!(%key, %provider, %charge, "a refund is under way");
                (FAILED, "it is under way at the provider".to_owned(), "pending")
            }
            Ok(providers::Refund::Made(id)) => {
                tracing::info!(%key, %provider, %charge, refund = %id, "gave money back");
                (DONE, id, "made")
            }
            Err(error) => {
                tracing::warn!(%key, %provider, %charge, tries, %error, "failed to give money back; it is tried again");
                (FAILED, error.chars().take(MAX_WORDS).collect(), "later")
            }
        };
        let write = |connection: Connection| {
            let text = text.clone();
            async move {
                let sql = connection.prepare_cached(sql).await?;
                let values: [&(dyn ToSql + Sync); 3] = [&provider, charge, &text];
                connection.execute(&sql, &values).await.map_err(DatabaseError::from)
            }
        };
        // If that fails, the next try finds the refund at the provider.
        self.database.call(write).await?;
        self.outcomes.get_or_create(&OutcomeLabel { outcome }).inc();
        Ok(())
    }
}

/// How many refunds are open, how old the oldest is, and why it failed last.
async fn backlog(connection: Connection) -> Result<(i64, Duration, Option<String>), DatabaseError> {
    let backlog = connection.prepare_cached(BACKLOG).await?;
    let row = connection.query_one(&backlog, &[]).await?;
    let age = Duration::try_from_secs_f64(row.try_get(1)?).unwrap_or_default();
    Ok((row.try_get(0)?, age, row.try_get(2)?))
}

/// `refunds`: whether money that is owed goes back.
pub fn check(database: &Arc<Database>) -> Check {
    let database = Arc::clone(database);
    Check::new("refunds", &["business"], move |_| {
        let database = Arc::clone(&database);
        async move {
            let (open, age, error) = match database.attempt(backlog).await {
                Ok(found) => found,
                Err(error) => {
                    return CheckOutcome::new(CheckStatus::Unknown, format!("failed to read refunds: {error}"));
                }
            };
            let status = match age {
                age if age >= TOO_LATE => CheckStatus::Unhealthy,
                age if age >= LATE => CheckStatus::Degraded,
                _ => CheckStatus::Healthy,
            };
            let last = error.map(|error| format!("; the last error of it: {error}")).unwrap_or_default();
            let message = format!("{open} refunds are open, the oldest for {} s{last}", age.as_secs());
            CheckOutcome::new(status, message).with("open", json!(open)).with("oldestSeconds", json!(age.as_secs()))
        }
    })
    .when_unanswered(CheckStatus::Unknown)
}
