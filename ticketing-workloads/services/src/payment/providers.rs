//! How the providers are spoken to.

use crate::http_client::{Bare, HttpAnswer, HttpCall, HttpError};
use crate::{http_client, payment::ledger::Order};
use async_trait::async_trait;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use resilience::Attempt;
use resilience::failure::Verdict;
use resilience::{CallError, Dependency, Failure, FailureKind};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tower::ServiceExt;

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
        /// Whether it may have charged all the same, now or still to come.
        in_doubt: bool,
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

    /// Total timeout of a charge, with all its attempts.
    fn request_timeout(&self) -> Duration;

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
    #[error("invalid provider response: {0}")]
    InvalidResponse(String),
    #[error(transparent)]
    Http(#[from] HttpError),
}

impl Failure for ProviderError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Declined => FailureKind::Business,
            Self::InvalidResponse(_) => FailureKind::Other,
            Self::Http(HttpError::Status(answer)) => http_client::kind_of(answer),
            Self::Http(error) => error.kind(),
        }
    }

    fn verdict(&self) -> Verdict {
        match self {
            Self::Http(error) if error.is_isolated() => Verdict::Neutral,
            error => error.kind().verdict(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        if let Self::Http(error) = self { error.retry_after() } else { None }
    }
}

impl ProviderError {
    /// Whether it leaves open that the provider has charged, or still will. An answer of a server in trouble does: it may
    /// come from something before the provider, which works on.
    fn in_doubt(&self) -> bool {
        match self {
            Self::Declined | Self::Http(HttpError::NotSent(_)) => false,
            // Refused before anything else happens.
            Self::Http(HttpError::Status(answer)) => answer.status != StatusCode::TOO_MANY_REQUESTS,
            Self::InvalidResponse(_) | Self::Http(_) => true,
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
        Self { service: http_client::of_dependency(base, dependency), dependency }
    }

    async fn once(&self, call: HttpCall) -> Result<HttpAnswer, HttpError> {
        self.service.clone().oneshot(Attempt::first(call, resilience::deadline::current())).await
    }

    /// Asks for money with `call`; `read` finds the id of the charge in an answer, or that it was declined.
    async fn charge(&self, call: HttpCall, read: fn(&HttpAnswer) -> Result<String, ProviderError>) -> Asked {
        // Whether any attempt leaves something open. One that is given up never gets to say that it does not.
        let in_doubt = AtomicBool::new(false);
        let attempt = || async {
            let before = in_doubt.swap(true, Ordering::Relaxed);
            let result = match self.once(call.clone()).await {
                Ok(answer) => read(&answer),
                // The policy retries this status; not so if it is the provider's word for a "no".
                Err(HttpError::Status(answer)) if answer.status.is_client_error() => match read(&answer) {
                    Err(ProviderError::InvalidResponse(_)) => Err(HttpError::Status(answer).into()),
                    known => known,
                },
                Err(error) => Err(error.into()),
            };
            in_doubt.store(before || result.as_ref().is_err_and(ProviderError::in_doubt), Ordering::Relaxed);
            result
        };
        match self.dependency.call(attempt).await {
            Ok(charge) => Asked::Charged { charge },
            Err(error) => {
                let in_doubt = in_doubt.into_inner();
                // What an earlier attempt may have charged is not undone by a later one that was declined.
                if !in_doubt && matches!(error, CallError::Failed { source: ProviderError::Declined, .. }) {
                    return Asked::Declined;
                }
                let unavailable =
                    matches!(&error, CallError::Rejected { rejection, .. } if rejection.is_open_circuit());
                Asked::Failed { in_doubt, unavailable, reason: error.to_string() }
            }
        }
    }

    /// Asks once, past the circuit: what has been charged can be known while no more charges are wanted. It has the time of
    /// an attempt, even if nobody waits for it: it is what settles a payment of which the caller has given up. `read` finds
    /// the charges in an answer.
    async fn find(
        &self,
        call: HttpCall,
        read: fn(&Value) -> Option<Vec<Charge<'_>>>,
    ) -> Result<Option<String>, String> {
        let time = Duration::from_millis(self.dependency.timeouts().per_try_ms);
        let answer = match tokio::time::timeout(time, self.once(call)).await {
            Ok(answer) => answer.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("timed out after {} ms", time.as_millis())),
        };
        if answer.status != StatusCode::OK {
            return Err(format!("status {}", answer.status));
        }
        let body = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
        settled(&read(&body).ok_or("invalid provider response")?)
    }
}

/// A charge as a provider tells of it.
struct Charge<'a> {
    id: &'a str,
    status: &'a str,
}

/// The words of the providers for a charge that is made, and for one that will never be.
const MADE: [&str; 2] = ["succeeded", "COMPLETED"];
const NEVER: [&str; 2] = ["canceled", "VOIDED"];

/// Which of the charges with one key is made; none, if none ever will be.
fn settled(charges: &[Charge<'_>]) -> Result<Option<String>, String> {
    if let Some(made) = charges.iter().find(|charge| MADE.contains(&charge.status)) {
        return Ok(Some(made.id.to_owned()));
    }
    match charges.iter().find(|charge| !NEVER.contains(&charge.status)) {
        Some(open) => Err(format!("its charge {} is {}", open.id, open.status)),
        None => Ok(None),
    }
}

/// The charges in a list.
fn charges(list: &Value) -> Option<Vec<Charge<'_>>> {
    list.as_array()?.iter().map(charge_of).collect()
}

fn charge_of(one: &Value) -> Option<Charge<'_>> {
    Some(Charge { id: one["id"].as_str()?, status: one["status"].as_str()? })
}

fn json_of(answer: &HttpAnswer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_default()
}

fn invalid_response(answer: &HttpAnswer) -> ProviderError {
    ProviderError::InvalidResponse(format!("status {}", answer.status))
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

    fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.0.dependency.timeouts().request_ms)
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
                _ => Err(invalid_response(answer)),
            }
        };
        self.0.charge(call, read).await
    }

    async fn find(&self, key: &str) -> Result<Option<String>, String> {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("query", &format!("metadata['key']:'{key}'"))
            .finish();
        self.0.find(HttpCall::get(format!("/v1/payment_intents/search?{query}")), |body| charges(&body["data"])).await
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

    fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.0.dependency.timeouts().request_ms)
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
                _ => Err(invalid_response(answer)),
            }
        };
        self.0.charge(call, read).await
    }

    async fn find(&self, key: &str) -> Result<Option<String>, String> {
        let query = form_urlencoded::Serializer::new(String::new()).append_pair("reference_id", key).finish();
        self.0.find(HttpCall::get(format!("/v2/checkout/orders?{query}")), |body| charges(&body["orders"])).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::none(&[], Ok(None))]
    #[case::made(&[("a", "canceled"), ("b", "succeeded")], Ok(Some("b")))]
    #[case::never(&[("a", "canceled"), ("b", "VOIDED")], Ok(None))]
    #[case::under_way(&[("a", "processing")], Err("its charge a is processing"))]
    #[case::of_tomorrow(&[("a", "canceled"), ("b", "PENDING")], Err("its charge b is PENDING"))]
    fn a_charge_that_may_still_be_made_is_not_absent(
        #[case] found: &[(&str, &str)],
        #[case] expected: Result<Option<&str>, &str>,
    ) {
        let found: Vec<_> = found.iter().map(|(id, status)| Charge { id, status }).collect();
        assert_eq!(settled(&found), expected.map(|id| id.map(str::to_owned)).map_err(str::to_owned));
    }

    /// One of several addresses of a provider that fails alone opened the circuit to all of them.
    #[rstest::rstest]
    #[case::alone(true, Verdict::Neutral)]
    #[case::like_all(false, Verdict::Failure)]
    fn a_failure_of_one_endpoint_alone_says_nothing_of_the_provider(#[case] alone: bool, #[case] expected: Verdict) {
        let answer = HttpAnswer {
            status: StatusCode::SERVICE_UNAVAILABLE,
            headers: [(header::RETRY_AFTER, HeaderValue::from_static("1"))].into_iter().collect(),
            body: axum::body::Bytes::new(),
            from_ejected: alone,
        };
        for error in
            [HttpError::Status(Box::new(answer)), HttpError::Broken { why: "reset".to_owned(), from_ejected: alone }]
        {
            let error = ProviderError::from(error);
            assert_eq!(error.verdict(), expected, "{error}");
            assert!(error.in_doubt());
        }
    }
}
