//! The HTTP interface of payment: `POST /api/payments`, and `POST /api/payments/close` with the same key and body.

use super::decision::Purpose;
use super::ledger::Order;
use super::process::{Outcome, Payments};
use crate::answers::{body_unreadable, not_found, problem, refused, unavailable};
use crate::http_client::IDEMPOTENCY_KEY;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use resilience::server::read_body;
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 4 * 1024;
/// Time to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// When to ask again for what is not settled.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Longest key, in bytes.
const MAX_KEY_BYTES: usize = 128;

/// The body of a request.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Wanted {
    amount_cents: i32,
    currency: String,
}

pub fn router(payments: Arc<Payments>, work: TaskTracker) -> Router {
    Router::new()
        .route("/api/payments", post(pay))
        .route("/api/payments/close", post(close))
        .fallback(not_found)
        .with_state((payments, work))
}

fn read(body: &[u8], headers: &HeaderMap) -> Result<Order, &'static str> {
    let wanted: Wanted =
        serde_json::from_slice(body).map_err(|_| "the body must be an object with amountCents and currency")?;
    let key = headers.get(IDEMPOTENCY_KEY).and_then(|key| key.to_str().ok());
    // It goes into a query at the provider: nothing that means something there.
    let plain = |key: &&str| {
        (1..=MAX_KEY_BYTES).contains(&key.len())
            && key.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.:".contains(letter))
    };
    let key = key.filter(plain).ok_or("the header Idempotency-Key must be 1 to 128 letters, digits or -_.:")?;
    if wanted.amount_cents < 1 {
        return Err("amountCents must be at least 1");
    }
    let code = |currency: &str| currency.len() == 3 && currency.chars().all(|letter| letter.is_ascii_lowercase());
    if !code(&wanted.currency) {
        return Err("currency must be three small letters");
    }
    Ok(Order { key: key.to_owned(), amount_cents: wanted.amount_cents, currency: wanted.currency })
}

type Shared = State<(Arc<Payments>, TaskTracker)>;

async fn pay(shared: Shared, headers: HeaderMap, body: Body) -> Response {
    process(shared, &headers, body, Purpose::Pay).await
}

/// Sees to it that the order is never charged, unless it is already.
async fn close(shared: Shared, headers: HeaderMap, body: Body) -> Response {
    process(shared, &headers, body, Purpose::Close).await
}

async fn process(State((payments, work)): Shared, headers: &HeaderMap, body: Body, purpose: Purpose) -> Response {
    let order = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(body) => read(&body, headers),
        Err(error) => return body_unreadable(error),
    };
    let order = match order {
        Ok(order) => order,
        Err(message) => return problem(StatusCode::UNPROCESSABLE_ENTITY, "INVALID_REQUEST", message),
    };
    // Not in this request's own task: a caller who leaves must not leave a charge behind that nobody has written down.
    let until = resilience::deadline::current();
    let paying = work.spawn(async move { payments.pay(&order, purpose, until).await });
    match paying.await {
        Ok(Ok(outcome)) => respond(outcome),
        Ok(Err(error)) => {
            tracing::warn!(%error, "failed to process a payment");
            unavailable("PAYMENT_UNAVAILABLE", "Payment is temporarily unavailable", RETRY_AFTER)
        }
        Err(error) => {
            tracing::error!(%error, "processing a payment panicked; its outcome is unknown");
            problem(StatusCode::INTERNAL_SERVER_ERROR, "PAYMENT_PENDING", "ask again with the same Idempotency-Key")
        }
    }
}

fn respond(outcome: Outcome) -> Response {
    let pending = |message: &str| {
        let answer = json!({"success": false, "status": "PaymentPending", "message": message});
        let mut response = (StatusCode::ACCEPTED, Json(answer)).into_response();
        response.headers_mut().insert(axum::http::header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER.as_secs()));
        response
    };
    match outcome {
        Outcome::Succeeded { provider, charge, used_fallback } => Json(json!({
            "success": true, "status": "Succeeded", "provider": provider, "paymentId": charge,
            "usedFallback": used_fallback,
        }))
        .into_response(),
        Outcome::Declined => problem(StatusCode::PAYMENT_REQUIRED, "PAYMENT_DECLINED", "The payment was declined"),
        Outcome::NeedsBuyer { provider } => {
            let message = "The buyer has to confirm the payment with the provider";
            let answer = json!({
                "success": false, "status": "RequiresAction", "provider": provider, "message": message,
            });
            (StatusCode::ACCEPTED, Json(answer)).into_response()
        }
        // Not a success: to a caller who asked to pay it means that it is not paid.
        Outcome::Closed => {
            problem(StatusCode::PAYMENT_REQUIRED, "PAYMENT_CLOSED", "The payment is closed: nothing is charged")
        }
        Outcome::Unknown => pending("The outcome of the charge is unknown; it is looked up, and not charged again"),
        Outcome::UnderWay => pending("Another request is processing this payment"),
        Outcome::AllFailed { reasons } => {
            let mut response =
                unavailable("ALL_PROVIDERS_FAILED", "Payment processing is temporarily unavailable", RETRY_AFTER);
            let providers: serde_json::Map<_, _> =
                reasons.into_iter().map(|(provider, reason)| (provider, json!(reason))).collect();
            let answer = json!({
                "success": false, "errorCode": "ALL_PROVIDERS_FAILED",
                "message": "Payment processing is temporarily unavailable", "providers": providers,
            });
            *response.body_mut() = axum::body::Body::from(answer.to_string());
            response.headers_mut().remove(axum::http::header::CONTENT_LENGTH);
            response
        }
        Outcome::TurnedOff => {
            let message = "Payments are turned off (EnableExternalPaymentProviders)";
            refused("PAYMENTS_TURNED_OFF", message, RETRY_AFTER)
        }
        Outcome::KeyReused => {
            let message = "This idempotency key was used for a payment of another amount";
            problem(StatusCode::CONFLICT, "IDEMPOTENCY_KEY_REUSED", message)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(body: &str, key: Option<&'static str>) -> Result<Order, &'static str> {
        let headers = key.map(|key| (IDEMPOTENCY_KEY, HeaderValue::from_static(key)));
        read(body.as_bytes(), &HeaderMap::from_iter(headers))
    }

    #[rstest::rstest]
    #[case::fine(r#"{"amountCents": 4500, "currency": "eur"}"#, Some("abc-1"), Ok(4_500))]
    #[case::no_key(r#"{"amountCents": 4500, "currency": "eur"}"#, None, Err("the header"))]
    #[case::odd_key(r#"{"amountCents": 4500, "currency": "eur"}"#, Some("a'b"), Err("the header"))]
    #[case::nothing(r#"{"amountCents": 0, "currency": "eur"}"#, Some("k"), Err("amountCents"))]
    #[case::negative(r#"{"amountCents": -5, "currency": "eur"}"#, Some("k"), Err("amountCents"))]
    #[case::huge(r#"{"amountCents": 99999999999, "currency": "eur"}"#, Some("k"), Err("the body"))]
    #[case::currency(r#"{"amountCents": 5, "currency": "EURO"}"#, Some("k"), Err("currency"))]
    #[case::unknown(r#"{"amountCents": 5, "currency": "eur", "to": "me"}"#, Some("k"), Err("the body"))]
    #[case::garbage("{", Some("k"), Err("the body"))]
    fn reads_an_order_or_says_what_is_wrong(
        #[case] body: &str,
        #[case] key: Option<&'static str>,
        #[case] expected: Result<i32, &str>,
    ) {
        match (order(body, key), expected) {
            (Ok(order), Ok(amount)) => assert_eq!(order.amount_cents, amount),
            (Err(message), Err(start)) => assert!(message.starts_with(start), "{message}"),
            (got, _) => panic!("{got:?}"),
        }
    }
}
