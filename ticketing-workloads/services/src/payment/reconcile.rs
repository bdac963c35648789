//! `ticketing reconcile`: compares what the providers have charged with what is written down here, and says every difference.

use super::providers::{Listed, ProviderClient};
use super::{PAYPAL, STRIPE, Urls, defaults};
use crate::database::{DatabaseError, DatabaseSettings};
use crate::host::StartError;
use contract::WorkloadId;
use resilience::Resilience;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_postgres::Client;

/// Longest time of one run.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What was asked for, with the outcome at each provider, for these keys and for what was charged since then.
const LEDGER: &str = "
    SELECT p.key, p.amount_cents, p.currency, a.provider, a.state, COALESCE(a.charge_id, a.object_id),
           extract(epoch FROM a.began_at)::float8, b.status,
           EXISTS (SELECT FROM refunds r WHERE r.provider = a.provider AND r.charge_id = a.charge_id)
    FROM payments p LEFT JOIN payment_attempts a ON a.key = p.key
    LEFT JOIN bookings b ON b.id = CASE WHEN p.key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN p.key::uuid END
    WHERE p.key = ANY($1) OR (a.state = 'Charged' AND a.began_at >= to_timestamp($2))";

/// What to compare.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub urls: Urls,
    /// How far back, such as 24h, 90m or 7d.
    #[arg(long, env = "RECONCILE_SINCE", default_value = "24h", value_parser = duration)]
    pub since: Duration,
    /// Minutes that a provider may take to list a charge: what is younger here is not missed there.
    #[arg(long, env = "RECONCILE_GRACE_MINUTES", default_value_t = 180, value_parser = clap::value_parser!(u64).range(..=10_080))]
    pub grace_minutes: u64,
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration; write a number with m, h or d, such as 24h");
    let unit = match text.chars().last() {
        Some('m') => 60,
        Some('h') => 3_600,
        Some('d') => 86_400,
        _ => return Err(wrong()),
    };
    let count: u64 = text.get(..text.len() - 1).ok_or_else(wrong)?.parse().map_err(|_| wrong())?;
    count.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

/// Why nothing could be compared, or what differs.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Setting(#[from] StartError),
    #[error("the database: {0}")]
    Database(#[from] DatabaseError),
    #[error("{provider} cannot be asked for its charges: {reason}")]
    Provider {
        /// Its name.
        provider: String,
        /// Why not.
        reason: String,
    },
    #[error("timed out after {} s; compare a shorter time with --since", TIMEOUT.as_secs())]
    Timeout,
    #[error("{0} differences between the providers and the ledger; see the lines above")]
    Differences(usize),
}

/// How an attempt stands in the ledger.
struct Written {
    amount_cents: i64,
    currency: String,
    attempts: BTreeMap<String, (String, Option<String>, f64, bool)>,
    booking: Option<String>,
}

/// A charge at a provider.
struct Charge {
    provider: &'static str,
    listed: Listed,
}

/// Compares, and prints a line for each difference. An error if there are any.
pub async fn run(settings: &Settings) -> Result<(), ReconcileError> {
    let found = tokio::time::timeout(TIMEOUT, compare(settings)).await.map_err(|_| ReconcileError::Timeout)??;
    for line in &found {
        println!("{line}");
    }
    if found.is_empty() { Ok(()) } else { Err(ReconcileError::Differences(found.len())) }
}

/// The differences, each in a line.
pub async fn compare(settings: &Settings) -> Result<Vec<String>, ReconcileError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let since = now.saturating_sub(settings.since);
    let id = WorkloadId::deployment("default", "reconcile");
    let resilience = Resilience::builder(id).dependency(STRIPE).dependency(PAYPAL).defaults(defaults(1)).build();
    let [stripe, paypal] = settings.urls.providers(&resilience)?;
    let mut charges = Vec::new();
    for (provider, client) in [(STRIPE, stripe), (PAYPAL, paypal)] {
        charges.extend(list(provider, client.as_ref(), since).await?);
    }
    let connector = settings.database.connector("reconcile")?;
    let (client, connection) = connector.open().await.map_err(DatabaseError::Connect)?;
    let driver = tokio::spawn(connection);
    let written = read(&client, &charges, since).await;
    driver.abort();
    let grace = Duration::from_secs(settings.grace_minutes * 60);
    let found = differences(&charges, &written?, now.saturating_sub(grace).as_secs_f64());
    tracing::info!(charges = charges.len(), differences = found.len(), "compared the providers with the ledger");
    Ok(found)
}

async fn list(
    provider: &'static str,
    client: &dyn ProviderClient,
    since: Duration,
) -> Result<Vec<Charge>, ReconcileError> {
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    let listed = client.list(seconds).await;
    let listed = listed.map_err(|reason| ReconcileError::Provider { provider: provider.to_owned(), reason })?;
    Ok(listed.into_iter().map(|listed| Charge { provider, listed }).collect())
}

async fn read(
    client: &Client,
    charges: &[Charge],
    since: Duration,
) -> Result<BTreeMap<String, Written>, DatabaseError> {
    let keys: BTreeSet<_> = charges.iter().map(|charge| charge.listed.key.as_str()).collect();
    let keys: Vec<_> = keys.into_iter().collect();
    let mut all: BTreeMap<String, Written> = BTreeMap::new();
    for row in client.query(LEDGER, &[&keys, &since.as_secs_f64()]).await? {
        let written = Written {
            amount_cents: row.try_get::<_, i32>(1)?.into(),
            currency: row.try_get(2)?,
            attempts: BTreeMap::new(),
            booking: row.try_get(7)?,
        };
        let entry = all.entry(row.try_get(0)?).or_insert(written);
        if let Some(provider) = row.try_get::<_, Option<String>>(3)? {
            entry.attempts.insert(provider, (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?, row.try_get(8)?));
        }
    }
    Ok(all)
}

/// What is not the same. `settled`: what was charged here before that time, in seconds since 1970, must be listed by now.
fn differences(charges: &[Charge], ledger: &BTreeMap<String, Written>, settled: f64) -> Vec<String> {
    let mut lines = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Charge>> = BTreeMap::new();
    for charge in charges {
        by_key.entry(&charge.listed.key).or_default().push(charge);
    }
    for (key, all) in by_key {
        let names =
            || all.iter().map(|one| format!("{} {}", one.provider, one.listed.object)).collect::<Vec<_>>().join(", ");
        if all.len() > 1 && !key.is_empty() {
            lines.push(format!("CHARGED_TWICE key={key} charges: {}; refund all but one", names()));
        }
        let Some(written) = ledger.get(key) else {
            lines.push(format!("UNKNOWN_HERE key={key} charges: {}; nothing here has asked for it", names()));
            continue;
        };
        for Charge { provider, listed } in all.iter().copied() {
            let object = &listed.object;
            match written.attempts.get(*provider) {
                Some((state, Some(id), ..)) if state == "Charged" && id == object => {}
                Some((state, ..)) => {
                    lines.push(format!("NOT_CHARGED_HERE key={key} {provider} {object}: the ledger says {state}"));
                }
                None => lines.push(format!("NOT_CHARGED_HERE key={key} {provider} {object}: it was never asked")),
            }
            if (listed.amount_cents, &listed.currency) != (written.amount_cents, &written.currency) {
                lines.push(format!(
                    "AMOUNT_DIFFERS key={key} {provider} {object}: {} {} there, {} {} here",
                    listed.amount_cents, listed.currency, written.amount_cents, written.currency
                ));
            }
        }
    }
    let there: BTreeSet<_> = charges.iter().map(|charge| (charge.provider, charge.listed.object.as_str())).collect();
    for (key, written) in ledger {
        for (provider, (state, object, at, has_refund)) in &written.attempts {
            if state != "Charged" {
                continue;
            }
            let object = object.as_deref().unwrap_or_default();
            if *at <= settled && !there.contains(&(provider.as_str(), object)) {
                lines.push(format!("NOT_CHARGED_THERE key={key} {provider} {object}: the ledger says Charged"));
            }
            if written.booking.as_deref() == Some("Cancelled") && !has_refund {
                lines.push(format!("NO_REFUND key={key} {provider} {object}: the booking is cancelled"));
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("24h", Some(86_400))]
    #[case("90m", Some(5_400))]
    #[case("7d", Some(604_800))]
    #[case("24", None)]
    #[case("h", None)]
    #[case("", None)]
    #[case("1ä", None)]
    #[case("99999999999999999999d", None)]
    fn durations(#[case] text: &str, #[case] seconds: Option<u64>) {
        assert_eq!(duration(text).ok().map(|found| found.as_secs()), seconds);
    }

    fn charge(provider: &'static str, key: &str, object: &str, amount_cents: i64) -> Charge {
        let listed = Listed { key: key.into(), object: object.into(), amount_cents, currency: "eur".into() };
        Charge { provider, listed }
    }

    fn written(state: &str, object: &str, booking: &str, refund: bool) -> Written {
        let attempts = [("stripe".to_owned(), (state.to_owned(), Some(object.to_owned()), 10.0, refund))];
        Written { amount_cents: 100, currency: "eur".into(), attempts: attempts.into(), booking: Some(booking.into()) }
    }

    #[test]
    fn every_difference_is_said() {
        let ledger = BTreeMap::from([
            ("same".to_owned(), written("Charged", "a", "Confirmed", false)),
            ("twice".to_owned(), written("Charged", "b", "Confirmed", false)),
            ("open".to_owned(), written("Confirming", "d", "PaymentPending", false)),
            ("amount".to_owned(), written("Charged", "e", "Confirmed", false)),
            ("gone".to_owned(), written("Charged", "f", "Confirmed", false)),
            ("owed".to_owned(), written("Charged", "g", "Cancelled", false)),
            ("given-back".to_owned(), written("Charged", "h", "Cancelled", true)),
        ]);
        let charges = [
            charge("stripe", "same", "a", 100),
            charge("stripe", "twice", "b", 100),
            charge("paypal", "twice", "c", 100),
            charge("stripe", "open", "d", 100),
            charge("stripe", "amount", "e", 101),
            charge("stripe", "owed", "g", 100),
            charge("stripe", "given-back", "h", 100),
            charge("paypal", "stranger", "i", 100),
        ];
        let mut found = differences(&charges, &ledger, 20.0);
        found.sort();
        let words: Vec<_> = found.iter().map(|line| line.split(" charges").next().unwrap_or_default()).collect();
        assert_eq!(
            words,
            [
                "AMOUNT_DIFFERS key=amount stripe e: 101 eur there, 100 eur here",
                "CHARGED_TWICE key=twice",
                "NOT_CHARGED_HERE key=open stripe d: the ledger says Confirming",
                "NOT_CHARGED_HERE key=twice paypal c: it was never asked",
                "NOT_CHARGED_THERE key=gone stripe f: the ledger says Charged",
                "NO_REFUND key=owed stripe g: the booking is cancelled",
                "UNKNOWN_HERE key=stranger",
            ]
        );
        let younger = differences(&charges, &ledger, 5.0);
        assert!(!younger.iter().any(|line| line.starts_with("NOT_CHARGED_THERE")), "it may not be listed yet");
    }
}
