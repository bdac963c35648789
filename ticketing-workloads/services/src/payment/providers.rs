//! How the providers are spoken to.

use crate::http_client::{Bare, HttpAnswer, HttpCall, HttpError};
use crate::{http_client, payment::ledger::Order};
use async_trait::async_trait;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use resilience::layers::Attempt;
use resilience::{CallError, Dependency, Failure, FailureKind};
use serde_json::{Value, json};
use std::sync::Mutex;
use std::time::Duration;
use tower::ServiceExt;

/// What an unanswered question leaves open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doubt {
    /// Nothing: it was never asked, or said that it has not charged.
    #[default]
    None,
    /// It answered with a failure: it may have charged, and nothing is under way any more.
    Answered,
    /// It gave no answer: the request may even still arrive.
    InFlight,
}

/// What came of asking a provider for money.
#[derive(Debug)]
pub enum Asked {
    /// It has charged.
    Charged {
        /// Its id of the charge.
        charge: String,
    },
    /// It will not charge.
    Declined,
    /// No answer to go on with.
    Failed {
        /// Whether it may have charged all the same.
        doubt: Doubt,
        /// Whether the circuit to it is open.
        unavailable: bool,
        /// Why, in words.
        reason: String,
    },
}

/// A provider, behind the layers of its dependency.
#[async_trait]
pub trait ProviderClient: Send + Sync {
    /// Its name, which is that of the dependency.
    fn name(&self) -> &str;

    /// Asks for money. The same key again is the same charge, as far as this provider goes.
    async fn charge(&self, order: &Order) -> Asked;

    /// Looks a charge up by its key; `None`: there is none.
    async fn find(&self, key: &str) -> Result<Option<String>, String>;
}

/// Why a provider gave no charge.
#[derive(Debug, thiserror::Error)]
enum ProviderError {
    #[error("declined")]
    Declined,
    #[error("its answer makes no sense: {0}")]
    Nonsense(String),
    #[error(transparent)]
    Http(#[from] HttpError),
}

impl Failure for ProviderError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Declined => FailureKind::Business,
            Self::Nonsense(_) => FailureKind::Other,
            Self::Http(error) => error.kind(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        if let Self::Http(error) = self { error.retry_after() } else { None }
    }
}

impl ProviderError {
    fn doubt(&self) -> Doubt {
        match self {
            Self::Declined | Self::Http(HttpError::NotSent(_)) => Doubt::None,
            // Not even begun: these are refused before anything else happens.
            Self::Http(HttpError::Status(answer)) if answer.status == StatusCode::TOO_MANY_REQUESTS => Doubt::None,
            Self::Nonsense(_) | Self::Http(HttpError::Status(_) | HttpError::TooLarge) => Doubt::Answered,
            Self::Http(HttpError::Broken(_)) => Doubt::InFlight,
        }
    }
}

/// One provider over HTTP.
struct Client {
    service: Bare,
    dependency: &'static Dependency,
}

impl Client {
    fn new(base: &str, dependency: &'static Dependency) -> Self {
        Self { service: http_client::bare(base), dependency }
    }

    async fn once(&self, call: HttpCall) -> Result<HttpAnswer, HttpError> {
        self.service.clone().oneshot(Attempt::first(call, resilience::deadline::current())).await
    }

    /// Asks for money with `call`; `read` finds the id of the charge in an answer, or that it was declined.
    async fn charge(&self, call: HttpCall, read: fn(&HttpAnswer) -> Result<String, ProviderError>) -> Asked {
        // Of all attempts, the worst that is left open. An attempt that is given up never gets to say that it is not.
        let worst = Mutex::new(Doubt::None);
        let set = |doubt| *worst.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = doubt;
        let get = || *worst.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let attempt = || async {
            let before = get();
            set(Doubt::InFlight);
            let answer = self.once(call.clone()).await.map_err(ProviderError::from);
            let result = answer.and_then(|answer| read(&answer));
            if let Err(error) = &result {
                set(before.max(error.doubt()));
            }
            result
        };
        match self.dependency.call(attempt).await {
            Ok(charge) => Asked::Charged { charge },
            // What an earlier attempt may have charged is not undone by a later one that was declined.
            Err(CallError::Failed { source: ProviderError::Declined, .. }) if get() == Doubt::None => Asked::Declined,
            Err(error) => {
                let unavailable =
                    matches!(&error, CallError::Rejected { rejection, .. } if rejection.is_open_circuit());
                Asked::Failed { doubt: get(), unavailable, reason: error.to_string() }
            }
        }
    }

    /// Asks once, past the circuit: what has been charged can be known while no more charges are wanted.
    async fn find(&self, call: HttpCall, read: fn(&Value) -> Option<Option<String>>) -> Result<Option<String>, String> {
        let time = Duration::from_millis(self.dependency.timeouts().per_try_ms);
        let answer = match tokio::time::timeout(time, self.once(call)).await {
            Ok(answer) => answer.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("no answer within {} ms", time.as_millis())),
        };
        if answer.status != StatusCode::OK {
            return Err(format!("status {}", answer.status));
        }
        let body = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
        read(&body).ok_or_else(|| "its answer makes no sense".to_owned())
    }
}

fn json_of(answer: &HttpAnswer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_default()
}

fn nonsense(answer: &HttpAnswer) -> ProviderError {
    ProviderError::Nonsense(format!("status {}", answer.status))
}

/// A value for a header; keys are plain text, which was seen to when they came.
fn header_value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("invalid"))
}

/// A provider shaped as Stripe.
pub struct Stripe(Client);

impl Stripe {
    /// The one at `base`.
    pub fn new(base: &str, dependency: &'static Dependency) -> Self {
        Self(Client::new(base, dependency))
    }
}

#[async_trait]
impl ProviderClient for Stripe {
    fn name(&self) -> &str {
        self.0.dependency.name()
    }

    async fn charge(&self, order: &Order) -> Asked {
        let form = form_urlencoded::Serializer::new(String::new())
            .append_pair("amount", &order.amount_cents.to_string())
            .append_pair("currency", &order.currency)
            .append_pair("confirm", "true")
            .append_pair("metadata[key]", &order.key)
            .finish();
        let mut call = HttpCall::post("/v1/payment_intents", &Value::Null);
        call.body = form.into();
        call.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        call.headers.insert(http_client::IDEMPOTENCY_KEY, header_value(&order.key));
        let read = |answer: &HttpAnswer| {
            let body = json_of(answer);
            match (answer.status, body["id"].as_str(), body["status"].as_str()) {
                (StatusCode::OK, Some(id), Some("succeeded")) => Ok(id.to_owned()),
                (StatusCode::PAYMENT_REQUIRED, ..) => Err(ProviderError::Declined),
                _ => Err(nonsense(answer)),
            }
        };
        self.0.charge(call, read).await
    }

    async fn find(&self, key: &str) -> Result<Option<String>, String> {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("query", &format!("metadata['key']:'{key}'"))
            .finish();
        let read = |body: &Value| {
            let found = body["data"].as_array()?;
            Some(
                found
                    .iter()
                    .find(|one| one["status"] == "succeeded")
                    .and_then(|one| Some(one["id"].as_str()?.to_owned())),
            )
        };
        self.0.find(HttpCall::get(format!("/v1/payment_intents/search?{query}")), read).await
    }
}

/// A provider shaped as PayPal.
pub struct Paypal(Client);

impl Paypal {
    /// The one at `base`.
    pub fn new(base: &str, dependency: &'static Dependency) -> Self {
        Self(Client::new(base, dependency))
    }
}

#[async_trait]
impl ProviderClient for Paypal {
    fn name(&self) -> &str {
        self.0.dependency.name()
    }

    async fn charge(&self, order: &Order) -> Asked {
        let value = format!("{}.{:02}", order.amount_cents / 100, order.amount_cents % 100);
        let mut call = HttpCall::post(
            "/v2/checkout/orders",
            &json!({
                "intent": "CAPTURE",
                "purchase_units": [{
                    "reference_id": order.key,
                    "amount": {"currency_code": order.currency, "value": value},
                }],
            }),
        );
        call.headers.insert(HeaderName::from_static("paypal-request-id"), header_value(&order.key));
        let read = |answer: &HttpAnswer| {
            let body = json_of(answer);
            match (answer.status, body["id"].as_str(), body["status"].as_str()) {
                (StatusCode::CREATED | StatusCode::OK, Some(id), Some("COMPLETED")) => Ok(id.to_owned()),
                (StatusCode::UNPROCESSABLE_ENTITY, ..) => Err(ProviderError::Declined),
                _ => Err(nonsense(answer)),
            }
        };
        self.0.charge(call, read).await
    }

    async fn find(&self, key: &str) -> Result<Option<String>, String> {
        let query = form_urlencoded::Serializer::new(String::new()).append_pair("reference_id", key).finish();
        let read = |body: &Value| {
            let found = body["orders"].as_array()?;
            Some(
                found
                    .iter()
                    .find(|one| one["status"] == "COMPLETED")
                    .and_then(|one| Some(one["id"].as_str()?.to_owned())),
            )
        };
        self.0.find(HttpCall::get(format!("/v2/checkout/orders?{query}")), read).await
    }
}
