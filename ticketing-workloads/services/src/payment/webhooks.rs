//! Events that providers send. An event only makes payment read the object by its id: its body is not believed, so
//! order and repetition of events mean nothing. Those of each provider are worked off apart, several at once: one that
//! hangs, or that has sent thousands, holds up none of the other's, and a buyer who has confirmed a payment with it
//! does not wait for all those before.

use super::decision::{Answer, PROVIDERS};
use super::ledger::{LedgerError, Order};
use super::process::{Looked, Outcome, Payments};
use super::providers::{ProviderClient, VerifyError};
use super::{PAYPAL, STRIPE};
use crate::answers::{body_unreadable, not_found, problem, too_many, unavailable};
use crate::database::{Connection, Database, DatabaseError};
use crate::side_by_side::side_by_side;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use futures::future::join_all;
use hmac::{Hmac, Mac};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::server::read_body;
use resilience::{CallError, Resilience};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::Sha256;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Semaphore;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

/// Largest event, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time to send one.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How far the time of a signature may be from ours, in seconds.
const TOLERANCE: u64 = 300;
/// How old an event of PayPal may be, which sends one again for three days; and how far ahead its clock may be. An event is kept
/// for longer than that, so none counts twice.
const SENT_WITHIN: Duration = Duration::from_secs(4 * 24 * 3_600);
const AHEAD: Duration = Duration::from_secs(TOLERANCE);
/// Where PayPal has the certificates that its events are signed with.
const CERTIFICATES: &str = "paypal.com";
/// Time between two looks for events.
const LOOK: Duration = Duration::from_millis(500);
/// How often an event is looked at without a definite answer: over about an hour. It may be faster than our own note of the id;
/// and booking asks for what stays open anyhow.
const MAX_TRIES: i32 = 16;
/// Events that PayPal is asked about side by side: anybody can send some.
const VERIFIED_AT_ONCE: usize = 8;
/// When to send an event again that was not taken.
const RETRY_AFTER: Duration = Duration::from_secs(30);

const INSERT: &str =
    "INSERT INTO webhook_events (provider, event_id, object_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
/// The time until the next try is longer than the requests to the provider may take.
const CLAIM: &str = "
    UPDATE webhook_events SET tries = tries + 1, next_at = now() + interval '60 seconds'
    WHERE provider = $1 AND event_id = ANY(ARRAY(
        SELECT event_id FROM webhook_events WHERE provider = $1 AND done_at IS NULL AND next_at <= now()
        ORDER BY next_at LIMIT $2 FOR UPDATE SKIP LOCKED))
    RETURNING event_id, object_id, tries";
/// And whether that object is its charge: no event says more of it than that.
const ORDER: &str = "
    SELECT p.key, p.amount_cents, p.currency, a.state = 'Charged' AND COALESCE(a.object_id, a.charge_id) = $2
    FROM payment_attempts a JOIN payments p ON p.key = a.key
    WHERE a.provider = $1 AND (a.object_id = $2 OR a.charge_id = $2) LIMIT 1";
const ORDER_OF_KEY: &str = "SELECT key, amount_cents, currency FROM payments WHERE key = $1";
/// And if something has changed (`$5`), booking asks now, not only when it is due.
const LOOKED_AT: &str = "
    WITH due AS (
        UPDATE bookings SET settle_at = now() WHERE id = $3 AND status = 'PaymentPending' AND $5
    )
    UPDATE webhook_events
    SET done_at = CASE WHEN $4 THEN now() END,
        next_at = now() + least(2 ^ least(tries, 9), 300) * interval '1 second'
    WHERE provider = $1 AND event_id = $2 AND done_at IS NULL";

/// Statements that are made for each event, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("write an event down", INSERT),
    ("claim events", CLAIM),
    ("the payment of an event", ORDER),
    ("the payment of a key", ORDER_OF_KEY),
    ("an event is looked at", LOOKED_AT),
];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabels {
    provider: &'static str,
    outcome: &'static str,
}

/// How events are verified.
#[derive(Clone, Debug, clap::Args)]
pub struct WebhookSettings {
    /// File with the signing secrets of Stripe's webhooks, one a line: all of them hold, so that one can be replaced. Read anew
    /// for each event.
    #[arg(long, env = "STRIPE_WEBHOOK_SECRET_FILE")]
    pub stripe_webhook_secret_file: Option<PathBuf>,
    /// Id of our webhook at PayPal, which verifies its events itself.
    #[arg(long, env = "PAYPAL_WEBHOOK_ID")]
    pub paypal_webhook_id: Option<String>,
}

pub struct Webhooks {
    settings: WebhookSettings,
    database: Arc<Database>,
    payments: Arc<Payments>,
    providers: [Arc<dyn ProviderClient>; PROVIDERS],
    /// Events of one provider that are worked off side by side.
    at_once: usize,
    events: Family<EventLabels, Counter>,
    verifying: Semaphore,
}

/// An event to work off.
struct Event {
    id: String,
    object: String,
    tries: i32,
    /// The payment that its object is written down for.
    order: Option<Order>,
    /// Whether the object is written down as the charge of that payment.
    is_known: bool,
}

/// What PayPal is asked about an event, whose bytes are what is signed.
#[derive(Serialize)]
struct Question<'a> {
    auth_algo: &'a str,
    cert_url: &'a str,
    transmission_id: &'a str,
    transmission_sig: &'a str,
    transmission_time: &'a str,
    webhook_id: &'a str,
    webhook_event: &'a RawValue,
}

/// What an event has come to.
#[derive(Default)]
struct Meaning {
    /// There is nothing more to find out.
    is_definite: bool,
    /// Booking has something to do.
    is_new: bool,
    order: Option<Order>,
}

/// Why an object could not be looked at.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error("{0}")]
    Provider(String),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Database(#[from] CallError<DatabaseError>),
}

fn read_order(row: &tokio_postgres::Row) -> Result<Order, DatabaseError> {
    Ok(Order { key: row.try_get(0)?, amount_cents: row.try_get(1)?, currency: row.try_get(2)? })
}

impl Webhooks {
    pub fn new(
        settings: WebhookSettings,
        database: &Arc<Database>,
        payments: &Arc<Payments>,
        providers: [Arc<dyn ProviderClient>; PROVIDERS],
        at_once: usize,
        resilience: &Resilience,
    ) -> Arc<Self> {
        let events = Family::<EventLabels, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("payment_webhooks", "Events of providers, by outcome", events.clone());
        });
        let (database, payments) = (Arc::clone(database), Arc::clone(payments));
        let verifying = Semaphore::new(VERIFIED_AT_ONCE);
        Arc::new(Self { settings, database, payments, providers, at_once, events, verifying })
    }

    pub fn router(self: &Arc<Self>) -> Router {
        Router::new().route("/api/webhooks/{provider}", post(receive)).with_state(Arc::clone(self))
    }

    fn count(&self, provider: &'static str, outcome: &'static str) {
        self.events.get_or_create(&EventLabels { provider, outcome }).inc();
    }

    /// Works off events, for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        join_all((0..PROVIDERS).map(|index| self.work_off(index))).await;
    }

    /// Works off those of one provider.
    async fn work_off(&self, index: usize) {
        let claim = |most: usize| async move {
            match self.claim(index, most).await {
                Ok(events) => events,
                Err(error) => {
                    tracing::debug!(%error, "failed to read events of providers");
                    tokio::time::sleep(LOOK * 3).await;
                    Vec::new()
                }
            }
        };
        let work = |event: Event| async move {
            if let Err(error) = self.work_off_one(index, event).await {
                tracing::debug!(%error, "failed to write down that an event was looked at");
            }
        };
        side_by_side(|| self.at_once, LOOK, claim, work).await;
    }

    /// Claims events of a provider that are due, `most` of them at most: those that have waited longest.
    async fn claim(&self, index: usize, most: usize) -> Result<Vec<Event>, CallError<DatabaseError>> {
        let (provider, most) = (self.providers[index].name(), i64::try_from(most).unwrap_or(i64::MAX));
        let claim = |connection: Connection| async move {
            let claim = connection.prepare_cached(CLAIM).await?;
            let find = connection.prepare_cached(ORDER).await?;
            let mut events = Vec::new();
            for row in connection.query(&claim, &[&provider, &most]).await? {
                let object: String = row.try_get(1)?;
                let found = connection.query_opt(&find, &[&provider, &object]).await?;
                let order = found.as_ref().map(read_order).transpose()?;
                let is_known = found.map(|found| found.try_get::<_, Option<bool>>(3)).transpose()?.flatten();
                let is_known = is_known.unwrap_or_default();
                events.push(Event { id: row.try_get(0)?, object, tries: row.try_get(2)?, order, is_known });
            }
            Ok::<_, DatabaseError>(events)
        };
        self.database.call(claim).await
    }

    async fn work_off_one(&self, index: usize, event: Event) -> Result<(), CallError<DatabaseError>> {
        let Event { id, object, tries, order, is_known } = event;
        let provider = self.providers[index].name();
        let meaning = if is_known {
            Meaning { is_definite: true, is_new: false, order }
        } else {
            self.look(index, &object, order).await.unwrap_or_else(|error| {
                tracing::debug!(provider, event = id, %error, "failed to look at the object of an event");
                Meaning::default()
            })
        };
        let is_done = meaning.is_definite || tries >= MAX_TRIES;
        let booking = meaning.order.and_then(|order| Uuid::parse_str(&order.key).ok());
        let (id, is_new) = (&id, meaning.is_new);
        let looked_at = |connection: Connection| async move {
            let looked_at = connection.prepare_cached(LOOKED_AT).await?;
            let values: [&(dyn ToSql + Sync); 5] = [&provider, id, &booking, &is_done, &is_new];
            connection.execute(&looked_at, &values).await.map_err(DatabaseError::from)
        };
        self.database.call(looked_at).await.map(drop)
    }

    /// Reads the object of an event, unless it is written down as the charge: what is charged there needs a booking or
    /// a refund, also if that was out of the question, or if the object is not the one that its payment was about last.
    async fn look(&self, index: usize, object: &str, order: Option<Order>) -> Result<Meaning, LookError> {
        let seen = self.providers[index].inspect(object).await.map_err(LookError::Provider)?;
        let order = match (order, &seen.key) {
            (Some(order), _) => order,
            (None, Some(key)) => match self.order_of_key(key).await? {
                Some(order) => order,
                // A payment is written down before its object is made, so it is none of ours.
                None => return Ok(Meaning { is_definite: true, ..Meaning::default() }),
            },
            // Nor is one without a key; but another account's key may not find it.
            (None, None) => {
                return Ok(Meaning { is_definite: seen.answer != Answer::Gone, ..Meaning::default() });
            }
        };
        if let Answer::Charged { object } = &seen.answer {
            let found = self.payments.found(&order, index, object).await?;
            return Ok(Meaning { is_definite: found.is_some(), is_new: found == Some(true), order: Some(order) });
        }
        let Looked { outcome, noted } = self.payments.look(&order).await?;
        // It is our turn again, although that is nothing to write down.
        let has_acted = matches!(outcome, Outcome::NeedsBuyer { .. })
            && matches!(seen.answer, Answer::Unconfirmed | Answer::Declined | Answer::Cancelled);
        let is_over = matches!(seen.answer, Answer::Declined | Answer::Cancelled) && outcome != Outcome::UnderWay;
        let is_definite =
            is_over || matches!(outcome, Outcome::Succeeded { .. } | Outcome::Declined | Outcome::NeedsBuyer { .. });
        Ok(Meaning { is_definite, is_new: noted || has_acted, order: Some(order) })
    }

    async fn order_of_key(&self, key: &str) -> Result<Option<Order>, CallError<DatabaseError>> {
        let find = |connection: Connection| async move {
            let order = connection.prepare_cached(ORDER_OF_KEY).await?;
            let row = connection.query_opt(&order, &[&key]).await?;
            row.as_ref().map(read_order).transpose()
        };
        self.database.call(find).await
    }

    async fn is_genuine(&self, provider: &str, headers: &HeaderMap, body: &[u8]) -> Result<bool, VerifyError> {
        let header = |name: &'static str| {
            let value = headers.get(name).and_then(|value| value.to_str().ok()).filter(|value| !value.is_empty());
            value.ok_or_else(|| VerifyError::Invalid(format!("it has no header {name}")))
        };
        if provider == STRIPE {
            let path = self.settings.stripe_webhook_secret_file.as_ref();
            let path = path.ok_or(VerifyError::NotSetUp("STRIPE_WEBHOOK_SECRET_FILE"))?;
            let signature = header("stripe-signature")?;
            let secrets = tokio::fs::read_to_string(path).await;
            let secrets =
                secrets.map_err(|error| VerifyError::Failed(format!("cannot read {}: {error}", path.display())))?;
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            return Ok(stripe_signed(signature, body, &secrets, now));
        }
        let id = self.settings.paypal_webhook_id.as_ref().filter(|id| !id.is_empty());
        let question = Question {
            webhook_id: id.ok_or(VerifyError::NotSetUp("PAYPAL_WEBHOOK_ID"))?,
            auth_algo: header("paypal-auth-algo")?,
            cert_url: header("paypal-cert-url")?,
            transmission_id: header("paypal-transmission-id")?,
            transmission_sig: header("paypal-transmission-sig")?,
            transmission_time: header("paypal-transmission-time")?,
            // As it came: the signature is over its bytes, and to parse it and write it again would sort its keys.
            webhook_event: serde_json::from_slice(body).map_err(|error| VerifyError::Invalid(error.to_string()))?,
        };
        may_be_of_paypal(&question, SystemTime::now()).map_err(|why| VerifyError::Invalid(why.to_owned()))?;
        let question = serde_json::to_string(&question).map_err(|error| VerifyError::Invalid(error.to_string()))?;
        let Ok(_place) = self.verifying.try_acquire() else { return Err(VerifyError::Busy) };
        let [_, paypal] = &self.providers;
        paypal.verify_event(question).await
    }
}

/// What needs no question to PayPal: anybody can send an event, and each question takes a place from a genuine one.
fn may_be_of_paypal(question: &Question<'_>, now: SystemTime) -> Result<(), &'static str> {
    let sent: jiff::Timestamp = question.transmission_time.parse().map_err(|_| "its transmission time is no time")?;
    let sent = SystemTime::from(sent);
    let is_old = now.duration_since(sent).is_ok_and(|age| age > SENT_WITHIN);
    let is_ahead = sent.duration_since(now).is_ok_and(|ahead| ahead > AHEAD);
    if is_old || is_ahead {
        return Err("its transmission time is too far from now");
    }
    let uri: Uri = question.cert_url.parse().map_err(|_| "the address of its certificate is none")?;
    let host = uri.host().unwrap_or_default().to_ascii_lowercase();
    let is_theirs = host == CERTIFICATES || host.strip_suffix(CERTIFICATES).is_some_and(|rest| rest.ends_with('.'));
    if uri.scheme_str() == Some("https") && is_theirs { Ok(()) } else { Err("its certificate is not PayPal's") }
}

/// Whether one of the secrets has signed the body, not long ago.
fn stripe_signed(header: &str, body: &[u8], secrets: &str, now: u64) -> bool {
    let values = |wanted: &str| {
        let wanted = wanted.to_owned();
        header.split(',').filter_map(move |part| {
            let (name, value) = part.trim().split_once('=')?;
            (name == wanted).then_some(value)
        })
    };
    let Some(time) = values("t").next() else { return false };
    if time.parse::<u64>().map_or(true, |at| at.abs_diff(now) > TOLERANCE) {
        return false;
    }
    let signatures: Vec<Vec<u8>> = values("v1").filter_map(from_hex).collect();
    let secrets = secrets.lines().map(str::trim).filter(|secret| !secret.is_empty());
    secrets.filter_map(|secret| Hmac::<Sha256>::new_from_slice(secret.as_bytes()).ok()).any(|mac| {
        let mac = mac.chain_update(time.as_bytes()).chain_update(b".").chain_update(body);
        signatures.iter().any(|signature| mac.clone().verify_slice(signature).is_ok())
    })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pair = |pair: &[u8]| Some(digit(pair[0])? * 16 + digit(pair[1])?);
    (text.len() == 64).then(|| text.as_bytes().chunks_exact(2).map(pair).collect())?
}

/// The id of the object that an event is about, as the ledger knows it; none of an event about something else, which would only
/// be asked for in vain.
fn object_of(provider: &str, event: &Value) -> Option<String> {
    let text = |path: &str| event.pointer(path)?.as_str();
    let object = if provider == STRIPE {
        let own = || text("/data/object/id").filter(|id| id.starts_with("pi_"));
        text("/data/object/payment_intent").or_else(own)
    } else {
        let is_order = text("/resource_type").is_none_or(|kind| kind == "checkout-order");
        let own = || text("/resource/id").filter(|_| is_order);
        text("/resource/supplementary_data/related_ids/order_id").or_else(own)
    };
    object.map(str::to_owned)
}

async fn receive(
    State(webhooks): State<Arc<Webhooks>>,
    Path(provider): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let provider = match provider.as_str() {
        STRIPE => STRIPE,
        PAYPAL => PAYPAL,
        _ => return not_found().await,
    };
    let body = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(body) => body,
        Err(error) => return body_unreadable(error),
    };
    match webhooks.is_genuine(provider, &headers, &body).await {
        Ok(true) => {}
        Ok(false) | Err(VerifyError::Invalid(_)) => {
            webhooks.count(provider, "not_genuine");
            return problem(StatusCode::BAD_REQUEST, "SIGNATURE_INVALID", "The signature of this event is not valid");
        }
        Err(error @ VerifyError::NotSetUp(_)) => {
            webhooks.count(provider, "not_set_up");
            tracing::debug!(provider, %error, "an event of a provider whose events are not set up");
            return not_found().await;
        }
        Err(VerifyError::Busy) => {
            webhooks.count(provider, "limited");
            return too_many("WEBHOOK_UNAVAILABLE", "Too many events at once", RETRY_AFTER);
        }
        Err(VerifyError::Failed(reason)) => {
            webhooks.count(provider, "failed");
            tracing::warn!(provider, %reason, "an event cannot be verified; the provider sends it again");
            return unavailable("WEBHOOK_UNAVAILABLE", "Events cannot be verified now", RETRY_AFTER);
        }
    }
    let event: Value = serde_json::from_slice(&body).unwrap_or_default();
    let (Some(id), Some(object)) = (event["id"].as_str().map(str::to_owned), object_of(provider, &event)) else {
        webhooks.count(provider, "ignored");
        return Json(json!({"received": true})).into_response();
    };
    let (id, object) = (&id, &object);
    let insert = |connection: Connection| async move {
        let insert = connection.prepare_cached(INSERT).await?;
        connection.execute(&insert, &[&provider, id, object]).await.map_err(DatabaseError::from)
    };
    match webhooks.database.call(insert).await {
        Ok(new) => {
            webhooks.count(provider, if new == 1 { "received" } else { "repeated" });
            Json(json!({"received": true})).into_response()
        }
        Err(error) => {
            webhooks.count(provider, "failed");
            tracing::warn!(provider, %error, "failed to write an event down; the provider sends it again");
            unavailable("WEBHOOK_UNAVAILABLE", "Events cannot be taken now", Duration::from_secs(30))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed apart from this code: `printf '1000.{"id":"evt"}' | openssl dgst -sha256 -hmac whsec_one`.
    const SIGNATURE: &str = "43f8a5ccfa0329ce54fac4a05f653ac1e057bb8045f645c3ce00bf8a7cc56511";
    const BODY: &[u8] = br#"{"id":"evt"}"#;

    #[rstest::rstest]
    #[case::good(&format!("t=1000,v1={SIGNATURE}"), "whsec_one", 1_000, true)]
    #[case::several(&format!("t=1000,v1={},v1={SIGNATURE},v0=x", "0".repeat(64)), "whsec_two\nwhsec_one\n", 1_299, true)]
    #[case::old(&format!("t=1000,v1={SIGNATURE}"), "whsec_one", 1_301, false)]
    #[case::of_the_future(&format!("t=1000,v1={SIGNATURE}"), "whsec_one", 699, false)]
    #[case::other_time(&format!("t=1001,v1={SIGNATURE}"), "whsec_one", 1_000, false)]
    #[case::other_secret(&format!("t=1000,v1={SIGNATURE}"), "whsec_two", 1_000, false)]
    #[case::no_secret(&format!("t=1000,v1={SIGNATURE}"), "\n", 1_000, false)]
    #[case::short("t=1000,v1=00", "whsec_one", 1_000, false)]
    #[case::no_ascii("t=1000,v1=ä", "whsec_one", 1_000, false)]
    #[case::nothing("", "whsec_one", 1_000, false)]
    fn signatures(#[case] header: &str, #[case] secrets: &str, #[case] now: u64, #[case] genuine: bool) {
        assert_eq!(stripe_signed(header, BODY, secrets, now), genuine);
        assert!(!stripe_signed(header, b"other", secrets, now));
    }

    #[rstest::rstest]
    #[case(STRIPE, json!({"data": {"object": {"id": "pi_1"}}}), Some("pi_1"))]
    #[case(STRIPE, json!({"data": {"object": {"id": "ch_1", "payment_intent": "pi_1"}}}), Some("pi_1"))]
    #[case(PAYPAL, json!({"resource": {"id": "c", "supplementary_data": {"related_ids": {"order_id": "o"}}}}), Some("o"))]
    #[case(STRIPE, json!({"data": {"object": {"id": "cus_1"}}}), None)]
    #[case(PAYPAL, json!({"resource": {"id": "o"}}), Some("o"))]
    #[case(PAYPAL, json!({"resource_type": "checkout-order", "resource": {"id": "o"}}), Some("o"))]
    #[case(PAYPAL, json!({"resource_type": "dispute", "resource": {"id": "d"}}), None)]
    #[case(PAYPAL, json!({}), None)]
    fn objects(#[case] provider: &str, #[case] event: Value, #[case] expected: Option<&str>) {
        assert_eq!(object_of(provider, &event).as_deref(), expected);
    }

    const CERT: &str = "https://api.paypal.com/v1/notifications/certs/CERT-360caa42-fca2a594-1d93a270";

    #[rstest::rstest]
    #[case::now("2026-06-18T19:30:00Z", CERT, true)]
    #[case::sandbox("2026-06-18T19:30:00Z", "https://API.Sandbox.PayPal.com/c", true)]
    #[case::sent_again_for_three_days("2026-06-15T19:30:00.123Z", CERT, true)]
    #[case::old("2026-06-14T19:29:59Z", CERT, false)]
    #[case::of_the_future("2026-06-18T19:35:01Z", CERT, false)]
    #[case::no_time("any", CERT, false)]
    #[case::elsewhere("2026-06-18T19:30:00Z", "https://example.com/paypal.com", false)]
    #[case::looks_alike("2026-06-18T19:30:00Z", "https://notpaypal.com/c", false)]
    #[case::behind_a_name("2026-06-18T19:30:00Z", "https://paypal.com@example.com/c", false)]
    #[case::not_encrypted("2026-06-18T19:30:00Z", "http://api.paypal.com/c", false)]
    #[case::no_address("2026-06-18T19:30:00Z", "any", false)]
    fn what_paypal_is_asked_about(#[case] transmission_time: &str, #[case] cert_url: &str, #[case] expected: bool) {
        let question = Question {
            auth_algo: "SHA256withRSA",
            cert_url,
            transmission_id: "t",
            transmission_sig: "s",
            transmission_time,
            webhook_id: "w",
            webhook_event: serde_json::from_str("{}").unwrap(),
        };
        let now: jiff::Timestamp = "2026-06-18T19:30:00Z".parse().unwrap();
        let found = may_be_of_paypal(&question, now.into());
        assert_eq!(found.is_ok(), expected, "{found:?}");
    }
}
