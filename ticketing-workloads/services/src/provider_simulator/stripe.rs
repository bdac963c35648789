//! A provider shaped as Stripe: payment intents that are confirmed at once, form-encoded requests, and a search.

use super::provider::{Charge, Outcome, Provider};
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

pub fn router(provider: Arc<Provider>) -> Router {
    Router::new()
        .route("/v1/payment_intents", post(create))
        .route("/v1/payment_intents/search", get(search))
        .with_state(provider)
}

async fn create(State(provider): State<Arc<Provider>>, headers: HeaderMap, body: Bytes) -> Response {
    let form: HashMap<_, _> = form_urlencoded::parse(&body).into_owned().collect();
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok());
    let amount = form.get("amount").and_then(|amount| amount.parse().ok());
    let (Some(key), Some(amount), Some(currency)) = (key, amount, form.get("currency")) else {
        let message = "Idempotency-Key, amount and currency are needed";
        return error(StatusCode::BAD_REQUEST, "invalid_request_error", "parameter_missing", message);
    };
    match provider.charge(key, amount, currency).await {
        Outcome::Charged(charge) => Json(intent(&charge)).into_response(),
        Outcome::Declined => {
            error(StatusCode::PAYMENT_REQUIRED, "card_error", "card_declined", "Your card was declined.")
        }
        Outcome::KeyReused => {
            let message = "Keys for idempotent requests can only be used with the same parameters.";
            error(StatusCode::BAD_REQUEST, "idempotency_error", "idempotency_key_in_use", message)
        }
        Outcome::Failed(status) => error(status, "api_error", "api_error", "An error occurred on our side."),
    }
}

/// Only one kind of question is understood: `metadata['key']:'<key>'`.
async fn search(State(provider): State<Arc<Provider>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let asked = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "query");
    let asked = asked.map(|(_, value)| value.into_owned()).unwrap_or_default();
    let Some(key) = asked.strip_prefix("metadata['key']:'").and_then(|rest| rest.strip_suffix('\'')) else {
        let message = "query must be metadata['key']:'<key>'";
        return error(StatusCode::BAD_REQUEST, "invalid_request_error", "parameter_invalid", message);
    };
    match provider.find(key).await {
        Ok(found) => {
            let data: Vec<_> = found.iter().map(intent).collect();
            Json(json!({"object": "search_result", "has_more": false, "data": data})).into_response()
        }
        Err(status) => error(status, "api_error", "api_error", "An error occurred on our side."),
    }
}

fn intent(charge: &Charge) -> Value {
    json!({
        "id": format!("pi_{}", charge.id),
        "object": "payment_intent",
        "amount": charge.amount_cents,
        "currency": charge.currency,
        "metadata": {"key": charge.key},
        "status": "succeeded",
    })
}

fn error(status: StatusCode, kind: &str, code: &str, message: &str) -> Response {
    (status, Json(json!({"error": {"type": kind, "code": code, "message": message}}))).into_response()
}
