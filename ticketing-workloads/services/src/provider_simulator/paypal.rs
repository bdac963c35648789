//! A provider shaped as PayPal: orders that are captured at once. PayPal itself has no search by reference; this one
//! answers `GET /v2/checkout/orders?reference_id=` in its place.

use super::provider::{Charge, Outcome, Provider};
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Value, json};
use std::sync::Arc;

pub fn router(provider: Arc<Provider>) -> Router {
    Router::new().route("/v2/checkout/orders", post(create).get(find)).with_state(provider)
}

async fn create(State(provider): State<Arc<Provider>>, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let amount = &body["purchase_units"][0]["amount"];
    let cents = amount["value"].as_str().and_then(cents);
    let key = headers.get("paypal-request-id").and_then(|key| key.to_str().ok());
    let (Some(key), Some(cents), Some(currency)) = (key, cents, amount["currency_code"].as_str()) else {
        return error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "MISSING_REQUIRED_PARAMETER");
    };
    match provider.charge(key, cents, currency).await {
        Outcome::Charged(charge) => (StatusCode::CREATED, Json(order(&charge))).into_response(),
        Outcome::Declined => error(StatusCode::UNPROCESSABLE_ENTITY, "UNPROCESSABLE_ENTITY", "INSTRUMENT_DECLINED"),
        Outcome::KeyReused => error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "DUPLICATE_REQUEST_ID"),
        Outcome::Failed(status) => error(status, "INTERNAL_SERVER_ERROR", "INTERNAL_SERVICE_ERROR"),
    }
}

async fn find(State(provider): State<Arc<Provider>>, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    let key = form_urlencoded::parse(query.as_bytes()).find(|(name, _)| name == "reference_id");
    let Some((_, key)) = key else {
        return error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "MISSING_REQUIRED_PARAMETER");
    };
    match provider.find(&key).await {
        Ok(found) => Json(json!({"orders": found.iter().map(order).collect::<Vec<_>>()})).into_response(),
        Err(status) => error(status, "INTERNAL_SERVER_ERROR", "INTERNAL_SERVICE_ERROR"),
    }
}

/// `45.00` as 4500.
fn cents(value: &str) -> Option<u64> {
    let (whole, part) = value.split_once('.')?;
    let part = (part.len() == 2).then(|| part.parse::<u64>().ok())??;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(part)
}

fn order(charge: &Charge) -> Value {
    let value = format!("{}.{:02}", charge.amount_cents / 100, charge.amount_cents % 100);
    json!({
        "id": charge.id,
        "status": "COMPLETED",
        "purchase_units": [{
            "reference_id": charge.key,
            "amount": {"currency_code": charge.currency, "value": value},
        }],
    })
}

fn error(status: StatusCode, name: &str, issue: &str) -> Response {
    (status, Json(json!({"name": name, "details": [{"issue": issue}]}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("45.00", Some(4_500))]
    #[case("0.07", Some(7))]
    #[case("45", None)]
    #[case("45.0", None)]
    #[case("-1.00", None)]
    #[case("99999999999999999999.00", None)]
    fn amounts(#[case] value: &str, #[case] expected: Option<u64>) {
        assert_eq!(cents(value), expected);
    }
}
