//! `ticketing reconcile`: compares what the providers have charged with what is written down here, and says every difference.

use super::providers::{Listed, Listing, ProviderClient};
use super::{PAYPAL, STRIPE, Urls, defaults};
use crate::database::{DatabaseError, DatabaseSettings, Sessions, query};
use crate::host::StartError;
use contract::WorkloadId;
use resilience::Resilience;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_postgres::Client;

/// Longest time of one run.
const TIMEOUT: Duration = Duration::from_secs(3_000);
/// How much earlier than its charge an object may have been created: the longest time of a buyer to act.
const CREATED_BEFORE: Duration = Duration::from_secs(24 * 3_600);
/// Time of which a provider lists the charges at once: a list has an end.
const SLICE: Duration = Duration::from_secs(900);
/// How often a slice is asked for, and the wait after the first time, which doubles.
const TRIES: u32 = 5;
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Keys that are read at once.
const KEYS: usize = 5_000;

/// What was asked for, with the outcome at each provider.
const ROWS: &str = "
    SELECT p.key, p.amount_cents, p.currency, a.provider, a.state, COALESCE(a.charge_id, a.object_id),
           extract(epoch FROM a.began_at)::float8, b.status
    FROM payments p LEFT JOIN payment_attempts a ON a.key = p.key
    LEFT JOIN bookings b ON b.id = CASE WHEN p.key ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN p.key::uuid END
    WHERE p.key = ANY($1)";
/// What goes back or has, also of charges that are not those of their payments.
const REFUNDS: &str =
    "SELECT key, provider, charge_id, extract(epoch FROM done_at)::float8 FROM refunds WHERE key = ANY($1)";
/// What was charged here since then.
const CHARGED: &str = "SELECT key FROM payment_attempts WHERE state = 'Charged' AND began_at >= to_timestamp($1)";

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

/// Reads a time such as 24h.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
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
    #[error("timed out after {} s; nothing is compared. Compare a shorter time with --since", TIMEOUT.as_secs())]
    Timeout,
    #[error("{0} differences between the providers and the ledger; see the lines above")]
    Differences(usize),
}

impl ReconcileError {
    /// Whether everything was compared.
    pub fn has_compared(&self) -> bool {
        matches!(self, Self::Differences(_))
    }
}

/// A payment as it is written down here.
struct Written {
    amount_cents: i64,
    currency: String,
    /// By provider.
    attempts: BTreeMap<String, WrittenAttempt>,
    booking: Option<String>,
    /// By provider and object.
    refunds: BTreeMap<(String, String), WrittenRefund>,
}

impl Written {
    fn refund(&self, provider: &str, object: &str) -> WrittenRefund {
        let known = self.refunds.get(&(provider.to_owned(), object.to_owned()));
        known.copied().unwrap_or(WrittenRefund::None)
    }
}

struct WrittenAttempt {
    state: String,
    object: Option<String>,
    /// Since when it is in this state, in seconds since 1970.
    at: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum WrittenRefund {
    None,
    Open,
    Made {
        /// In seconds since 1970.
        at: f64,
    },
}

/// A charge at a provider.
struct Charge {
    provider: &'static str,
    listed: Listed,
}

impl Charge {
    /// Whether all of the money went back; `None`: no list says that any did.
    fn is_refunded(&self) -> Option<bool> {
        self.listed.refunded_cents.map(|cents| cents >= self.listed.amount_cents)
    }
}

/// The charges of all slices of time, each with what went back of it, in whichever slice that was.
fn with_refunds(provider: &'static str, listings: Vec<Listing>) -> Vec<Charge> {
    let mut refunds: BTreeMap<String, i64> = BTreeMap::new();
    let mut charges = Vec::new();
    for listing in listings {
        for (charge, cents) in listing.refunds {
            *refunds.entry(charge).or_default() += cents;
        }
        charges.extend(listing.charges);
    }
    let complete = |listed: Listed| {
        let refunded_cents = listed.refunded_cents.or_else(|| refunds.get(&listed.charge).copied());
        Charge { provider, listed: Listed { refunded_cents, ..listed } }
    };
    charges.into_iter().map(complete).collect()
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
        let mut listings = Vec::new();
        for (from, before) in slices(since.saturating_sub(CREATED_BEFORE), now) {
            listings.push(list(provider, client.as_ref(), from, before).await?);
        }
        charges.extend(with_refunds(provider, listings));
    }
    let connector = settings.database.connector("reconcile")?;
    let (client, connection) = connector.open().await.map_err(DatabaseError::Connect)?;
    let driver = tokio::spawn(connection);
    let written = read(&client, settings.database.database_pooler, &charges, since).await;
    driver.abort();
    let grace = Duration::from_secs(settings.grace_minutes * 60);
    let found = differences(&charges, &written?, now.saturating_sub(grace).as_secs_f64());
    tracing::info!(charges = charges.len(), differences = found.len(), "compared the providers with the ledger");
    Ok(found)
}

/// The time from `from` to `to`, both counted, in seconds since 1970.
fn slices(from: Duration, to: Duration) -> impl Iterator<Item = (i64, i64)> {
    let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX - 1);
    let (from, end, slice) = (seconds(from), seconds(to) + 1, seconds(SLICE));
    let begins = std::iter::successors(Some(from), move |begin| Some(begin + slice).filter(|next| *next < end));
    begins.map(move |begin| (begin, (begin + slice).min(end)))
}

/// What a provider lists of a slice of time. It may be in trouble for a while, and one request of many may fail.
async fn list(
    provider: &'static str,
    client: &dyn ProviderClient,
    from: i64,
    before: i64,
) -> Result<Listing, ReconcileError> {
    let mut tries = 1;
    loop {
        match client.list(from, before).await {
            Ok(listing) => return Ok(listing),
            Err(reason) if tries >= TRIES => {
                return Err(ReconcileError::Provider { provider: provider.to_owned(), reason });
            }
            Err(reason) => {
                tracing::warn!(provider, from, before, %reason, "failed to list charges; retrying");
                tokio::time::sleep(FIRST_WAIT * 2u32.pow(tries - 1)).await;
                tries += 1;
            }
        }
    }
}

async fn read(
    client: &Client,
    sessions: Sessions,
    charges: &[Charge],
    since: Duration,
) -> Result<BTreeMap<String, Written>, DatabaseError> {
    let mut keys: BTreeSet<_> = charges.iter().map(|charge| charge.listed.key.clone()).collect();
    for row in query(client, sessions, CHARGED, &[&since.as_secs_f64()]).await? {
        keys.insert(row.try_get(0)?);
    }
    let keys: Vec<_> = keys.into_iter().collect();
    let mut all: BTreeMap<String, Written> = BTreeMap::new();
    for keys in keys.chunks(KEYS) {
        for row in query(client, sessions, ROWS, &[&keys]).await? {
            let written = Written {
                amount_cents: row.try_get::<_, i32>(1)?.into(),
                currency: row.try_get(2)?,
                attempts: BTreeMap::new(),
                booking: row.try_get(7)?,
                refunds: BTreeMap::new(),
            };
            let entry = all.entry(row.try_get(0)?).or_insert(written);
            if let Some(provider) = row.try_get::<_, Option<String>>(3)? {
                let attempt = WrittenAttempt { state: row.try_get(4)?, object: row.try_get(5)?, at: row.try_get(6)? };
                entry.attempts.insert(provider, attempt);
            }
        }
        for row in query(client, sessions, REFUNDS, &[&keys]).await? {
            let Some(written) = all.get_mut(row.try_get::<_, &str>(0)?) else { continue };
            let made = row.try_get::<_, Option<f64>>(3)?;
            let refund = made.map_or(WrittenRefund::Open, |at| WrittenRefund::Made { at });
            written.refunds.insert((row.try_get(1)?, row.try_get(2)?), refund);
        }
    }
    Ok(all)
}

/// What is not the same. `settled`: what was charged or refunded here before that time, in seconds since 1970, must be
/// listed by now, and what was under way then must have ended.
fn differences(charges: &[Charge], ledger: &BTreeMap<String, Written>, settled: f64) -> Vec<String> {
    let mut lines = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Charge>> = BTreeMap::new();
    for charge in charges {
        by_key.entry(&charge.listed.key).or_default().push(charge);
    }
    for (key, all) in by_key {
        let kept: Vec<_> = all.iter().filter(|one| one.is_refunded() != Some(true)).collect();
        let names = |all: &[&Charge]| {
            all.iter().map(|one| format!("{} {}", one.provider, one.listed.object)).collect::<Vec<_>>().join(", ")
        };
        if kept.len() > 1 && !key.is_empty() {
            lines.push(format!("CHARGED_TWICE key={key} charges: {}; refund all but one", names(&all)));
        }
        let Some(written) = ledger.get(key) else {
            lines.push(format!("UNKNOWN_HERE key={key} charges: {}; nothing here has asked for it", names(&all)));
            continue;
        };
        for charge in all {
            compare_charge(key, charge, written, settled, &mut lines);
        }
    }
    let there: BTreeSet<_> = charges.iter().map(|charge| (charge.provider, charge.listed.object.as_str())).collect();
    for (key, written) in ledger {
        for (provider, attempt) in written.attempts.iter().filter(|(_, attempt)| attempt.state == "Charged") {
            let object = attempt.object.as_deref().unwrap_or_default();
            if attempt.at <= settled && !there.contains(&(provider.as_str(), object)) {
                lines.push(format!("NOT_CHARGED_THERE key={key} {provider} {object}: the ledger says Charged"));
            }
            let refund = written.refund(provider, object);
            match written.booking.as_deref() {
                Some("Cancelled") if refund == WrittenRefund::None => {
                    lines.push(format!("NO_REFUND key={key} {provider} {object}: the booking is cancelled"));
                }
                // A booking is written down before it is paid; one that is cancelled is deleted in time, and what it
                // cost has gone back.
                None if refund == WrittenRefund::None => {
                    lines.push(format!(
                        "NO_BOOKING key={key} {provider} {object}: there is none that it was charged for"
                    ));
                }
                _ => {}
            }
        }
    }
    lines
}

fn compare_charge(key: &str, charge: &Charge, written: &Written, settled: f64, lines: &mut Vec<String>) {
    let Charge { provider, listed } = charge;
    let object = &listed.object;
    let refund = written.refund(provider, object);
    match written.attempts.get(*provider) {
        Some(attempt) if attempt.state == "Charged" && attempt.object.as_ref() == Some(object) => {
            let cents = listed.refunded_cents.unwrap_or_default();
            if cents > 0 && refund == WrittenRefund::None {
                lines.push(format!(
                    "REFUNDED_THERE key={key} {provider} {object}: {cents} of {}; no refund is written down",
                    listed.amount_cents
                ));
            }
        }
        // It is not the charge of the payment, and goes back.
        _ if refund != WrittenRefund::None => {}
        // It was charged a moment ago, or its outcome is being looked up.
        Some(attempt) if attempt.at > settled && is_open(&attempt.state) => {}
        Some(attempt) => {
            let state = &attempt.state;
            lines.push(format!("NOT_CHARGED_HERE key={key} {provider} {object}: the ledger says {state}"));
        }
        None => lines.push(format!("NOT_CHARGED_HERE key={key} {provider} {object}: it was never asked")),
    }
    // A list that says nothing of a refund has none: it goes from before the charge until now.
    let is_settled = matches!(refund, WrittenRefund::Made { at } if at <= settled);
    if is_settled && charge.is_refunded() != Some(true) {
        lines.push(format!("NOT_REFUNDED_THERE key={key} {provider} {object}: the ledger says refunded"));
    }
    if (listed.amount_cents, &listed.currency) != (written.amount_cents, &written.currency) {
        lines.push(format!(
            "AMOUNT_DIFFERS key={key} {provider} {object}: {} {} there, {} {} here",
            listed.amount_cents, listed.currency, written.amount_cents, written.currency
        ));
    }
}

fn is_open(state: &str) -> bool {
    matches!(state, "Begun" | "Confirming" | "Reconfirming" | "NeedsBuyer")
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
        let currency = "eur".to_owned();
        let (object, charge) = (object.to_owned(), format!("charge of {object}"));
        Charge {
            provider,
            listed: Listed { key: key.into(), object, charge, amount_cents, currency, refunded_cents: None },
        }
    }

    fn written(state: &str, object: &str, booking: &str, refund: bool) -> Written {
        let refunds = refund.then(|| (("stripe".to_owned(), object.to_owned()), WrittenRefund::Made { at: 10.0 }));
        let attempt = WrittenAttempt { state: state.to_owned(), object: Some(object.to_owned()), at: 10.0 };
        let attempts = [("stripe".to_owned(), attempt)];
        Written {
            amount_cents: 100,
            currency: "eur".into(),
            attempts: attempts.into(),
            booking: Some(booking.into()),
            refunds: refunds.into_iter().collect(),
        }
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
            ("deleted".to_owned(), Written { booking: None, ..written("Charged", "j", "", false) }),
            ("given-back-and-deleted".to_owned(), Written { booking: None, ..written("Charged", "k", "", true) }),
            ("in-doubt".to_owned(), Written { booking: None, ..written("Confirming", "l", "", false) }),
        ]);
        let given_back = |key: &str, object: &str| {
            let mut charge = charge("stripe", key, object, 100);
            charge.listed.refunded_cents = Some(100);
            charge
        };
        let charges = [
            charge("stripe", "same", "a", 100),
            charge("stripe", "twice", "b", 100),
            charge("paypal", "twice", "c", 100),
            charge("stripe", "open", "d", 100),
            charge("stripe", "amount", "e", 101),
            charge("stripe", "owed", "g", 100),
            given_back("given-back", "h"),
            charge("paypal", "unknown", "i", 100),
            charge("stripe", "deleted", "j", 100),
            given_back("given-back-and-deleted", "k"),
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
                "NO_BOOKING key=deleted stripe j: there is none that it was charged for",
                "NO_REFUND key=owed stripe g: the booking is cancelled",
                "UNKNOWN_HERE key=unknown",
            ]
        );
        let younger = differences(&charges, &ledger, 5.0);
        assert!(!younger.iter().any(|line| line.starts_with("NOT_CHARGED_THERE")), "it may not be listed yet");
        let is_open = |line: &String| line.starts_with("NOT_CHARGED_HERE key=open");
        assert!(!younger.iter().any(is_open), "its outcome is being looked up");
    }

    #[test]
    fn refunds_are_compared() {
        let refunded = |key: &str, object: &str, cents| {
            let mut charge = charge("stripe", key, object, 100);
            charge.listed.refunded_cents = Some(cents);
            charge
        };
        let mut surplus = written("Charged", "g", "Confirmed", false);
        surplus.refunds.insert(("stripe".to_owned(), "h".to_owned()), WrittenRefund::Made { at: 10.0 });
        let ledger = BTreeMap::from([
            ("both".to_owned(), written("Charged", "a", "Cancelled", true)),
            ("here".to_owned(), written("Charged", "b", "Cancelled", true)),
            ("there".to_owned(), written("Charged", "c", "Confirmed", false)),
            ("twice".to_owned(), written("Charged", "d", "Confirmed", false)),
            ("in-part".to_owned(), written("Charged", "f", "Cancelled", true)),
            ("not-listed".to_owned(), written("Charged", "i", "Cancelled", true)),
            ("surplus".to_owned(), surplus),
        ]);
        let charges = [
            refunded("both", "a", 100),
            refunded("here", "b", 0),
            refunded("there", "c", 30),
            refunded("twice", "d", 0),
            refunded("twice", "e", 100),
            refunded("in-part", "f", 99),
            // As PayPal lists one of which nothing went back.
            charge("stripe", "not-listed", "i", 100),
            refunded("surplus", "g", 0),
            refunded("surplus", "h", 100),
        ];
        let found = differences(&charges, &ledger, 20.0);
        let words: Vec<_> = found.iter().map(|line| line.split(':').next().unwrap()).collect();
        assert_eq!(
            words,
            [
                "NOT_REFUNDED_THERE key=here stripe b",
                "NOT_REFUNDED_THERE key=in-part stripe f",
                "NOT_REFUNDED_THERE key=not-listed stripe i",
                "REFUNDED_THERE key=there stripe c",
                "NOT_CHARGED_HERE key=twice stripe e",
            ],
            "the second charge has gone back"
        );
        let younger = differences(&charges, &ledger, 5.0);
        assert!(!younger.iter().any(|line| line.starts_with("NOT_REFUNDED_THERE")), "it may not be listed yet");
    }

    /// A refund is listed when it is made, long after its charge.
    #[test]
    fn a_refund_of_another_slice_of_time_counts() {
        let listing = |charges: &[(&str, Option<i64>)], refunds: &[(&str, i64)]| Listing {
            charges: charges
                .iter()
                .map(|(object, refunded_cents)| Listed {
                    refunded_cents: *refunded_cents,
                    ..charge("paypal", "key", object, 100).listed
                })
                .collect(),
            refunds: refunds.iter().map(|(charge, cents)| (format!("charge of {charge}"), *cents)).collect(),
        };
        let listings = vec![
            listing(&[("a", None), ("b", None), ("c", None), ("d", Some(0))], &[]),
            listing(&[], &[("a", 60), ("b", 60)]),
            listing(&[], &[("a", 40), ("of an earlier time", 100)]),
        ];
        let refunded: Vec<_> = with_refunds("paypal", listings).iter().map(Charge::is_refunded).collect();
        assert_eq!(refunded, [Some(true), Some(false), None, Some(false)]);
    }

    #[test]
    fn slices_cover_every_second_once() {
        let slices: Vec<_> = slices(Duration::from_secs(100), Duration::from_secs(100 + 2_000)).collect();
        assert_eq!(slices, [(100, 1_000), (1_000, 1_900), (1_900, 2_101)]);
    }
}
