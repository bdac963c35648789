//! The payments that were asked for, and the outcome at each provider, in the database.

use super::decision::{Attempt, PROVIDERS, State};
use crate::database::{Connection, Database, DatabaseError};
use crate::retention::Rule;
use resilience::CallError;
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// How long a claim holds: longer than almost every request takes. One that takes longer writes nothing any more.
const CLAIM: Duration = Duration::from_secs(70);

/// Claims the payment, unless somebody else has it. Somebody who has died loses it in time. Closing it is part of the claim:
/// a request that writes afterwards has read that it is closed.
const CLAIM_SQL: &str = "
    INSERT INTO payments AS p (key, amount_cents, currency, claim, claimed_until, closed_at)
    VALUES ($1, $2, $3, $4, now() + $5 * interval '1 second', CASE WHEN $6 THEN now() END)
    ON CONFLICT (key) DO UPDATE SET claim = excluded.claim, claimed_until = excluded.claimed_until, closed_at =
        CASE WHEN p.amount_cents = excluded.amount_cents AND p.currency = excluded.currency
             THEN COALESCE(p.closed_at, excluded.closed_at) ELSE p.closed_at END
    WHERE p.claim = excluded.claim OR p.claimed_until IS NULL OR p.claimed_until < now()
    RETURNING p.amount_cents, p.currency, p.closed_at IS NOT NULL";

const FIND: &str = "SELECT amount_cents, currency, closed_at IS NOT NULL FROM payments WHERE key = $1";
const RELEASE: &str = "UPDATE payments SET claim = NULL, claimed_until = NULL WHERE key = $1 AND claim = $2";

/// The keys of the one-step protocol are as old as the payment.
const ATTEMPTS: &str = "
    SELECT a.provider, a.number, a.state, COALESCE(a.object_id, a.charge_id),
           extract(epoch FROM now() - CASE WHEN a.state IN ('Begun', 'NotCharged') THEN p.created_at
                                           WHEN a.state = 'NeedsBuyer' THEN COALESCE(a.waits_since, a.began_at)
                                           ELSE a.began_at END)::float8,
           extract(epoch FROM now() - a.began_at)::float8
    FROM payment_attempts a JOIN payments p ON p.key = a.key WHERE a.key = $1";

/// Only the holder of the claim writes, and only over what it has read: a statement that was held up on its way must not
/// write over a newer one. One that is made again changes nothing more. The object's id stays: a late event of it still finds
/// its order. And a buyer does not get more time by each try to confirm what they have not approved.
const NOTE: &str = "
    INSERT INTO payment_attempts AS a (key, provider, state, number, object_id, charge_id, reason, waits_since)
    SELECT key, $3, $4, $5, $6, CASE WHEN $4 = 'Charged' THEN $6 END, $7, CASE WHEN $4 = 'NeedsBuyer' THEN now() END
    FROM payments
    WHERE key = $1 AND claim = $2 AND claimed_until > now() FOR UPDATE
    ON CONFLICT (key, provider) DO UPDATE
    SET state = excluded.state, number = excluded.number, object_id = COALESCE(excluded.object_id, a.object_id),
        charge_id = excluded.charge_id, reason = excluded.reason, began_at = now(), asks = a.asks + 1,
        waits_since = CASE WHEN excluded.state = 'NeedsBuyer' THEN COALESCE(a.waits_since, now())
                           WHEN excluded.state IN ('Confirming', 'Reconfirming') THEN a.waits_since END
    WHERE (a.number = $8 AND (a.state = $9 OR $9 = 'Begun' AND a.state = 'NotCharged')) OR (a.number = excluded.number AND a.state = excluded.state)";

/// Of a booking that is cancelled the money goes back; booking writes the same when it hears of the charge.
const OWE: &str = "
    INSERT INTO refunds (key, provider, charge_id, reason)
    SELECT key, provider, charge_id, 'the booking was cancelled' FROM payment_attempts
    WHERE key = $1 AND state = 'Charged' AND (SELECT status = 'Cancelled' FROM bookings WHERE id = $2)
    ON CONFLICT DO NOTHING";
/// Only the holder of the claim knows that it is not the charge of the payment.
const OWE_SURPLUS: &str = "
    INSERT INTO refunds (key, provider, charge_id, reason)
    SELECT key, $3, $4, 'charged besides' FROM payments WHERE key = $1 AND claim = $2 AND claimed_until > now() FOR UPDATE
    ON CONFLICT DO NOTHING";
const IS_REFUNDED: &str = "SELECT EXISTS (SELECT FROM refunds WHERE provider = $1 AND charge_id = $2)";

/// Payments that nobody works on and nothing has happened to for so long; whose outcome is known at every provider, for what
/// may still be charged is read again, however old; of which no money is to go back any more; and whose booking waits for
/// nothing. What was given back stays in `refunds`.
pub const RETENTION: Rule = Rule {
    what: "payments",
    sql: "
    WITH old AS (
        SELECT key FROM payments p
        WHERE created_at < now() - $1 * interval '1 day' AND (claimed_until IS NULL OR claimed_until < now())
          AND (SELECT bool_or(a.began_at >= now() - $1 * interval '1 day'
                              OR a.state NOT IN ('Creating', 'Created', 'Charged', 'Uncharged', 'Declined', 'Expired', 'Refused')
                              OR a.state = 'Charged' AND r.done_at IS NULL AND b.status = 'Cancelled')
               FROM payment_attempts a
               LEFT JOIN refunds r ON r.provider = a.provider AND r.charge_id = a.charge_id
               LEFT JOIN bookings b
                    ON b.id = CASE WHEN a.key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN a.key::uuid END
               WHERE a.key = p.key) IS NOT TRUE
          AND (SELECT count(*) FROM refunds r WHERE r.key = p.key AND r.done_at IS NULL) = 0
          AND NOT EXISTS (SELECT FROM bookings b WHERE b.id::text = p.key AND b.status = 'PaymentPending')
        ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
    ), attempts AS (
        DELETE FROM payment_attempts WHERE key = ANY(ARRAY(SELECT key FROM old))
    )
    DELETE FROM payments WHERE key = ANY(ARRAY(SELECT key FROM old))",
};

/// Statements that are made for each payment, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("claim a payment", CLAIM_SQL),
    ("find a payment", FIND),
    ("release", RELEASE),
    ("attempts", ATTEMPTS),
    ("note", NOTE),
    ("owe", OWE),
    ("owe a surplus", OWE_SURPLUS),
    ("is refunded", IS_REFUNDED),
    ("old payments", RETENTION.sql),
];

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The idempotency key: one key is one payment.
    pub key: String,
    /// Hundredths of the currency.
    pub amount_cents: i32,
    /// Such as `eur`.
    pub currency: String,
}

/// How an order was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is ours until the claim ends. `closed`: it must not be begun again.
    Ours { claim: Claim, closed: bool },
    /// Somebody works on it.
    UnderWay,
    /// The key belongs to an order of another amount.
    KeyReused,
}

/// The right to work on a payment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    key: String,
    id: Uuid,
}

/// Why something could not be written down.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error(transparent)]
    Database(#[from] CallError<DatabaseError>),
    /// The claim ran out, and somebody else may work on the payment.
    #[error("the claim on the payment has expired")]
    ClaimLost,
}

pub struct Ledger {
    database: Arc<Database>,
}

impl Ledger {
    /// A ledger in `database`.
    pub fn new(database: &Arc<Database>) -> Self {
        Self { database: Arc::clone(database) }
    }

    /// Takes an order, unless another request is processing it. `close`: nobody may begin it again.
    pub async fn take(&self, order: &Order, close: bool) -> Result<Taken, LedgerError> {
        let id = Uuid::new_v4();
        let work = |connection: Connection| async move {
            let take = connection.prepare_cached(CLAIM_SQL).await?;
            let Order { key, amount_cents, currency } = order;
            let seconds = CLAIM.as_secs_f64();
            let values: [&(dyn ToSql + Sync); 6] = [key, amount_cents, currency, &id, &seconds, &close];
            let row = connection.query_opt(&take, &values).await?;
            let claimed = row.is_some();
            let row = match row {
                Some(row) => row,
                None => connection.query_one(&connection.prepare_cached(FIND).await?, &[key]).await?,
            };
            let same = row.try_get::<_, i32>(0)? == *amount_cents && row.try_get::<_, &str>(1)? == currency;
            Ok::<_, DatabaseError>((claimed, same, row.try_get(2)?))
        };
        let claim = Claim { key: order.key.clone(), id };
        let taken = match self.database.call(work).await {
            Ok(taken) => taken,
            Err(error) => {
                // The claim may be there all the same; nobody would be let near the payment for as long as it holds.
                if !error.never_reached() {
                    self.release(&claim).await;
                }
                return Err(error.into());
            }
        };
        match taken {
            (true, true, closed) => Ok(Taken::Ours { claim, closed }),
            (true, false, _) => {
                self.release(&claim).await;
                Ok(Taken::KeyReused)
            }
            (false, true, _) => Ok(Taken::UnderWay),
            (false, false, _) => Ok(Taken::KeyReused),
        }
    }

    /// Gives the payment free for the next request. If that fails, the claim runs out by itself.
    pub async fn release(&self, claim: &Claim) {
        let work = |connection: Connection| async move {
            let release = connection.prepare_cached(RELEASE).await?;
            connection.execute(&release, &[&claim.key, &claim.id]).await.map_err(DatabaseError::from)
        };
        if let Err(error) = self.database.call(work).await {
            tracing::warn!(key = %claim.key, %error, "failed to release the claim on a payment; it expires by itself");
        }
    }

    /// The last attempt with each of these providers.
    pub async fn attempts(
        &self,
        key: &str,
        names: [&str; PROVIDERS],
    ) -> Result<[Option<Attempt>; PROVIDERS], LedgerError> {
        Ok(self.attempts_and_objects(key, names).await?.map(|one| Some(one?.0)))
    }

    /// The same, each with the object that was the last one, also of an attempt that is over.
    pub async fn attempts_and_objects(
        &self,
        key: &str,
        names: [&str; PROVIDERS],
    ) -> Result<[Option<(Attempt, Option<String>)>; PROVIDERS], LedgerError> {
        let work = |connection: Connection| async move {
            let sql = connection.prepare_cached(ATTEMPTS).await?;
            let mut attempts = [const { None }; PROVIDERS];
            for row in connection.query(&sql, &[&key]).await? {
                let provider: &str = row.try_get(0)?;
                let Some(index) = names.iter().position(|name| *name == provider) else { continue };
                let object: Option<String> = row.try_get(3)?;
                let [age, idle] = [row.try_get(4)?, row.try_get(5)?]
                    .map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default());
                let state = state(row.try_get(2)?, object.clone().unwrap_or_default());
                attempts[index] = Some((Attempt { number: row.try_get(1)?, state, age, idle }, object));
            }
            Ok::<_, DatabaseError>(attempts)
        };
        Ok(self.database.call(work).await?)
    }

    /// Writes down that the money of a payment goes back, if it is charged and its booking is cancelled; the answer is whether
    /// that is new.
    pub async fn owe(&self, key: &str) -> Result<bool, LedgerError> {
        let Ok(booking) = Uuid::parse_str(key) else { return Ok(false) };
        let work = |connection: Connection| async move {
            let owe = connection.prepare_cached(OWE).await?;
            connection.execute(&owe, &[&key, &booking]).await.map_err(DatabaseError::from)
        };
        Ok(self.database.call(work).await? > 0)
    }

    /// Writes down that a charge goes back that is not the one of the payment.
    pub async fn owe_surplus(&self, claim: &Claim, provider: &str, object: &str) -> Result<(), LedgerError> {
        let work = |connection: Connection| async move {
            let owe = connection.prepare_cached(OWE_SURPLUS).await?;
            let values: [&(dyn ToSql + Sync); 4] = [&claim.key, &claim.id, &provider, &object];
            connection.execute(&owe, &values).await.map_err(DatabaseError::from)
        };
        if self.database.call(work).await? == 0 && !self.is_refunded(provider, object).await? {
            return Err(LedgerError::ClaimLost);
        }
        Ok(())
    }

    /// Whether a charge goes back, or has.
    pub async fn is_refunded(&self, provider: &str, object: &str) -> Result<bool, LedgerError> {
        let work = |connection: Connection| async move {
            let is_refunded = connection.prepare_cached(IS_REFUNDED).await?;
            Ok::<_, DatabaseError>(connection.query_one(&is_refunded, &[&provider, &object]).await?.try_get(0)?)
        };
        Ok(self.database.call(work).await?)
    }

    /// Writes down how an attempt stands now, over what was read of it `before`.
    pub async fn note(
        &self,
        claim: &Claim,
        provider: &str,
        before: Option<&Attempt>,
        now: &Attempt,
        reason: Option<&str>,
    ) -> Result<(), LedgerError> {
        let (name, object) = (name(&now.state), now.state.object());
        let (number_before, name_before) =
            (before.map(|before| before.number), before.map(|before| self::name(&before.state)));
        let work = |connection: Connection| async move {
            let note = connection.prepare_cached(NOTE).await?;
            let values: [&(dyn ToSql + Sync); 9] =
                [&claim.key, &claim.id, &provider, &name, &now.number, &object, &reason, &number_before, &name_before];
            connection.execute(&note, &values).await.map_err(DatabaseError::from)
        };
        if self.database.call(work).await? == 0 { Err(LedgerError::ClaimLost) } else { Ok(()) }
    }
}

/// A state's name in the table. Version 0.1 takes one that it does not know for one in doubt, and changes nothing.
pub(super) fn name(state: &State) -> &'static str {
    match state {
        State::Creating => "Creating",
        State::Created { .. } => "Created",
        State::Confirming { again: false, .. } => "Confirming",
        State::Confirming { again: true, .. } => "Reconfirming",
        State::NeedsBuyer { .. } => "NeedsBuyer",
        State::Charged { .. } => "Charged",
        State::NotCharged => "Uncharged",
        State::Declined => "Declined",
        State::Expired => "Expired",
        State::Refused => "Refused",
        State::Begun => "Begun",
    }
}

/// The state of that name. One of a later version is one in doubt; and so is `NotCharged` of version 0.1, which takes that a
/// search finds nothing for a proof.
pub(super) fn state(name: &str, object: String) -> State {
    match name {
        "Creating" => State::Creating,
        "Created" => State::Created { object },
        "NeedsBuyer" => State::NeedsBuyer { object },
        "Charged" => State::Charged { object },
        "Uncharged" => State::NotCharged,
        "Declined" => State::Declined,
        "Expired" => State::Expired,
        "Refused" => State::Refused,
        "Begun" | "NotCharged" => State::Begun,
        _ if object.is_empty() => State::Begun,
        _ => State::Confirming { object, again: name != "Confirming" },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states() -> Vec<State> {
        let object = || "o".to_owned();
        vec![
            State::Creating,
            State::Created { object: object() },
            State::Confirming { object: object(), again: false },
            State::Confirming { object: object(), again: true },
            State::NeedsBuyer { object: object() },
            State::Charged { object: object() },
            State::NotCharged,
            State::Declined,
            State::Expired,
            State::Refused,
            State::Begun,
        ]
    }

    /// Also what a version that knows more states writes is kept.
    #[test]
    fn only_what_can_charge_no_more_is_deleted() {
        for state in states() {
            let may_charge = state.in_doubt() || matches!(state, State::NeedsBuyer { .. });
            let is_deleted = RETENTION.sql.contains(&format!("'{}'", name(&state)));
            assert_eq!(is_deleted, !may_charge, "{state:?}");
        }
        assert!(!RETENTION.sql.contains("'NotCharged'"), "what version 0.1 concludes from a search proves nothing");
    }
}
