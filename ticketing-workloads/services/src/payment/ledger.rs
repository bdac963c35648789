//! The payments that were asked for, and the outcome at each provider, in the database.

use crate::database::{Connection, Database, DatabaseError};
use crate::retention::Rule;
use resilience::CallError;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// How long a claim holds: longer than any request may take.
const CLAIM: Duration = Duration::from_secs(70);

/// Claims the payment, unless somebody else has it. Somebody who has died loses it in time.
const CLAIM_SQL: &str = "
    INSERT INTO payments AS p (key, amount_cents, currency, claim, claimed_until)
    VALUES ($1, $2, $3, $4, now() + $5 * interval '1 second')
    ON CONFLICT (key) DO UPDATE SET claim = excluded.claim, claimed_until = excluded.claimed_until
    WHERE p.claim = excluded.claim OR p.claimed_until IS NULL OR p.claimed_until < now()
    RETURNING p.amount_cents, p.currency";

const FIND: &str = "SELECT amount_cents, currency FROM payments WHERE key = $1";
const RELEASE: &str = "UPDATE payments SET claim = NULL, claimed_until = NULL WHERE key = $1 AND claim = $2";
const ATTEMPTS: &str = "
    SELECT provider, state, charge_id, extract(epoch FROM now() - began_at)::float8, asks
    FROM payment_attempts WHERE key = $1";

/// Only the holder of the claim writes.
const BEGIN: &str = "
    INSERT INTO payment_attempts AS a (key, provider, state)
    SELECT key, $3, 'Begun' FROM payments WHERE key = $1 AND claim = $2 AND claimed_until > now() FOR UPDATE
    ON CONFLICT (key, provider) DO UPDATE
    SET state = 'Begun', charge_id = NULL, began_at = now(), asks = a.asks + 1
    RETURNING asks";

/// And only the outcome of the last request to the provider: a statement that was held up on its way must not write
/// over a newer one.
const SETTLE: &str = "
    UPDATE payment_attempts a SET state = $4, charge_id = $5
    FROM payments p
    WHERE p.key = $1 AND p.claim = $2 AND p.claimed_until > now()
      AND a.key = p.key AND a.provider = $3 AND a.asks = $6 AND a.state IN ('Begun', $4)";

/// Payments that nobody works on, whose outcome is known at every provider, and whose booking waits for nothing.
pub const RETENTION: Rule = Rule {
    what: "payments",
    sql: "
    WITH old AS (
        SELECT key FROM payments p
        WHERE created_at < now() - $1 * interval '1 day' AND (claimed_until IS NULL OR claimed_until < now())
          AND (SELECT bool_or(a.state = 'Begun') FROM payment_attempts a WHERE a.key = p.key) IS NOT TRUE
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
    ("begin", BEGIN),
    ("settle", SETTLE),
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

/// What is known of one provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// It was asked, and charge outcome unknown.
    Begun {
        /// How long ago it was asked.
        age: Duration,
        /// How often it was asked.
        asks: i32,
    },
    /// It has charged.
    Charged {
        /// Its id of the charge.
        charge: String,
    },
    /// It has not charged.
    NotCharged,
    /// It will not charge.
    Declined,
}

impl Known {
    fn columns(&self) -> (&'static str, Option<&str>) {
        match self {
            Self::Begun { .. } => ("Begun", None),
            Self::Charged { charge } => ("Charged", Some(charge)),
            Self::NotCharged => ("NotCharged", None),
            Self::Declined => ("Declined", None),
        }
    }
}

/// How an order was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is ours until the claim ends.
    Ours(Claim),
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

    /// Takes an order, unless another request is processing it.
    pub async fn take(&self, order: &Order) -> Result<Taken, LedgerError> {
        let id = Uuid::new_v4();
        let work = |connection: Connection| async move {
            let take = connection.prepare_cached(CLAIM_SQL).await?;
            let Order { key, amount_cents, currency } = order;
            let seconds = CLAIM.as_secs_f64();
            let row = connection.query_opt(&take, &[key, amount_cents, currency, &id, &seconds]).await?;
            let claimed = row.is_some();
            let row = match row {
                Some(row) => row,
                None => connection.query_one(&connection.prepare_cached(FIND).await?, &[key]).await?,
            };
            let same = row.try_get::<_, i32>(0)? == *amount_cents && row.try_get::<_, &str>(1)? == currency;
            Ok::<_, DatabaseError>((claimed, same))
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
            (true, true) => Ok(Taken::Ours(claim)),
            (true, false) => {
                self.release(&claim).await;
                Ok(Taken::KeyReused)
            }
            (false, true) => Ok(Taken::UnderWay),
            (false, false) => Ok(Taken::KeyReused),
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

    /// What is known of each provider that was ever asked.
    pub async fn known(&self, key: &str) -> Result<HashMap<String, Known>, LedgerError> {
        let work = |connection: Connection| async move {
            let attempts = connection.prepare_cached(ATTEMPTS).await?;
            let mut known = HashMap::new();
            for row in connection.query(&attempts, &[&key]).await? {
                let age = Duration::try_from_secs_f64(row.try_get(3)?).unwrap_or_default();
                let state = match (row.try_get(1)?, row.try_get::<_, Option<String>>(2)?) {
                    ("Charged", charge) => Known::Charged { charge: charge.unwrap_or_default() },
                    ("NotCharged", _) => Known::NotCharged,
                    ("Declined", _) => Known::Declined,
                    _ => Known::Begun { age, asks: row.try_get(4)? },
                };
                known.insert(row.try_get(0)?, state);
            }
            Ok::<_, DatabaseError>(known)
        };
        Ok(self.database.call(work).await?)
    }

    /// Writes down that a provider is asked, before it is. The answer is how often it was.
    pub async fn begin(&self, claim: &Claim, provider: &str) -> Result<i32, LedgerError> {
        let work = |connection: Connection| async move {
            let begin = connection.prepare_cached(BEGIN).await?;
            let row = connection.query_opt(&begin, &[&claim.key, &claim.id, &provider]).await?;
            row.map(|row| row.try_get(0)).transpose().map_err(DatabaseError::from)
        };
        self.database.call(work).await?.ok_or(LedgerError::ClaimLost)
    }

    /// Writes down what came of asking a provider for that time.
    pub async fn settle(&self, claim: &Claim, provider: &str, asks: i32, known: &Known) -> Result<(), LedgerError> {
        let (state, charge) = known.columns();
        let work = |connection: Connection| async move {
            let settle = connection.prepare_cached(SETTLE).await?;
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
                [&claim.key, &claim.id, &provider, &state, &charge, &asks];
            connection.execute(&settle, &values).await.map_err(DatabaseError::from)
        };
        if self.database.call(work).await? == 0 { Err(LedgerError::ClaimLost) } else { Ok(()) }
    }
}
