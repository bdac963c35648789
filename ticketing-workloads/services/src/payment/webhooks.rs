//! Events that providers send. An event only makes payment read the object by its id: its body is not believed, so
//! order and repetition of events mean nothing.

use super::decision::{PROVIDERS, Purpose};
use super::ledger::Order;
use super::process::{Outcome, Payments};
use super::providers::{ProviderClient, VerifyError};
use super::{PAYPAL, STRIPE};
use crate::answers::{body_unreadable, not_found, problem, refused, unavailable};
use crate::database::{Connection, Database, DatabaseError};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
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
use uuid::Uuid;

/// Largest event, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time to send one.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How far the time of a signature may be from ours, in seconds.
const TOLERANCE: u64 = 300;
/// Time between two looks for events.
const LOOK: Duration = Duration::from_millis(500);
/// How often an event is looked at without a definite answer: over about an hour. It may be faster than our own note of the id;
/// and booking asks for what stays open anyhow.
const MAX_TRIES: i32 = 16;
/// Events that a provider is asked about side by side: anybody can send some.
const VERIFIED_AT_ONCE: usize = 8;
/// When to send an event again that was not taken.
const RETRY_AFTER: Duration = Duration::from_secs(30);

const INSERT: &str =
    "INSERT INTO webhook_events (provider, event_id, object_id) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
/// Whoever takes one has longer than the request to the provider may take.
const CLAIM: &str = "
    UPDATE webhook_events SET tries = tries + 1, next_at = now() + interval '60 seconds'
    WHERE (provider, event_id) IN (SELECT provider, event_id FROM webhook_events WHERE done_at IS NULL AND next_at <= now()
                                   ORDER BY next_at LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING provider, event_id, object_id, tries";
const ORDER: &str = "
    SELECT p.key, p.amount_cents, p.currency FROM payment_attempts a JOIN payments p ON p.key = a.key
    WHERE a.provider = $1 AND (a.object_id = $2 OR a.charge_id = $2) LIMIT 1";
/// And booking asks now, not only when it is due: something has changed.
const LOOKED_AT: &str = "
    WITH due AS (
        UPDATE bookings SET settle_at = now() WHERE id = $3 AND status = 'PaymentPending'
    )
    UPDATE webhook_events
    SET done_at = CASE WHEN $4 THEN now() END,
        next_at = now() + least(2 ^ least(tries, 9), 300) * interval '1 second'
    WHERE provider = $1 AND event_id = $2 AND done_at IS NULL";

/// Statements that are made for each event, or all the time.
pub const HOT: &[(&str, &str)] = &[
    ("write an event down", INSERT),
    ("claim an event", CLAIM),
    ("the payment of an event", ORDER),
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
    events: Family<EventLabels, Counter>,
    verifying: Semaphore,
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

impl Webhooks {
    pub fn new(
        settings: WebhookSettings,
        database: &Arc<Database>,
        payments: &Arc<Payments>,
        providers: [Arc<dyn ProviderClient>; PROVIDERS],
        resilience: &Resilience,
    ) -> Arc<Self> {
        let events = Family::<EventLabels, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("payment_webhooks", "Events of providers, by outcome", events.clone());
        });
        let (database, payments) = (Arc::clone(database), Arc::clone(payments));
        let verifying = Semaphore::new(VERIFIED_AT_ONCE);
        Arc::new(Self { settings, database, payments, providers, events, verifying })
    }

    pub fn router(self: &Arc<Self>) -> Router {
        Router::new().route("/api/webhooks/{provider}", post(receive)).with_state(Arc::clone(self))
    }

    fn count(&self, provider: &'static str, outcome: &'static str) {
        self.events.get_or_create(&EventLabels { provider, outcome }).inc();
    }

    /// Works off events, for as long as it is polled.
    pub async fn run(self: Arc<Self>) {
        loop {
            match self.next().await {
                Ok(true) => {}
                Ok(false) => tokio::time::sleep(LOOK).await,
                Err(error) => {
                    tracing::debug!(%error, "failed to read or write events of providers");
                    tokio::time::sleep(LOOK * 4).await;
                }
            }
        }
    }

    /// Works off one event; `false`: none is due.
    async fn next(&self) -> Result<bool, CallError<DatabaseError>> {
        let claim = |connection: Connection| async move {
            let claim = connection.prepare_cached(CLAIM).await?;
            let Some(event) = connection.query_opt(&claim, &[]).await? else { return Ok(None) };
            let (provider, object): (&str, &str) = (event.try_get(0)?, event.try_get(2)?);
            let order = connection.prepare_cached(ORDER).await?;
            let order = connection.query_opt(&order, &[&provider, &object]).await?;
            let read = |row: tokio_postgres::Row| {
                Ok::<_, DatabaseError>(Order {
                    key: row.try_get(0)?,
                    amount_cents: row.try_get(1)?,
                    currency: row.try_get(2)?,
                })
            };
            let (provider, id, tries): (String, String, i32) =
                (event.try_get(0)?, event.try_get(1)?, event.try_get(3)?);
            Ok::<_, DatabaseError>(Some((provider, id, tries, order.map(read).transpose()?)))
        };
        let Some((provider, id, tries, order)) = self.database.call(claim).await? else { return Ok(false) };
        let is_definite = match &order {
            Some(order) => match self.payments.pay(order, Purpose::Look, None).await {
                Ok(Outcome::Succeeded { .. } | Outcome::Declined | Outcome::NeedsBuyer { .. }) => true,
                Ok(_) => false,
                Err(error) => {
                    tracing::debug!(provider, event = id, %error, "failed to look at the object of an event");
                    false
                }
            },
            None => false,
        };
        let is_done = is_definite || tries >= MAX_TRIES;
        let booking = order.and_then(|order| Uuid::parse_str(&order.key).ok());
        let (provider, id) = (&provider, &id);
        let looked_at = |connection: Connection| async move {
            let looked_at = connection.prepare_cached(LOOKED_AT).await?;
            connection.execute(&looked_at, &[provider, id, &booking, &is_done]).await.map_err(DatabaseError::from)
        };
        self.database.call(looked_at).await.map(|_| true)
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
        let question = serde_json::to_string(&question).map_err(|error| VerifyError::Invalid(error.to_string()))?;
        let [_, paypal] = &self.providers;
        paypal.verify_event(question).await
    }
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

/// The id of the object that an event is about, as the ledger knows it.
fn object_of(provider: &str, event: &Value) -> Option<String> {
    let paths: &[&str] = if provider == STRIPE {
        &["/data/object/payment_intent", "/data/object/id"]
    } else {
        &["/resource/supplementary_data/related_ids/order_id", "/resource/id"]
    };
    paths.iter().find_map(|path| event.pointer(path)?.as_str()).map(str::to_owned)
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
    let Ok(_place) = webhooks.verifying.try_acquire() else {
        webhooks.count(provider, "limited");
        return refused("WEBHOOK_UNAVAILABLE", "Too many events at once", RETRY_AFTER);
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
    #[case(PAYPAL, json!({"resource": {"id": "o"}}), Some("o"))]
    #[case(PAYPAL, json!({}), None)]
    fn objects(#[case] provider: &str, #[case] event: Value, #[case] expected: Option<&str>) {
        assert_eq!(object_of(provider, &event).as_deref(), expected);
    }
}
