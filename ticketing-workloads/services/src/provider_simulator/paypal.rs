//! A provider shaped as PayPal: orders that are captured, a list of transactions, and refunds. PayPal itself has no search by
//! reference; this one answers `GET /v2/checkout/orders?reference_id=` in its place.

use super::provider::{Object, Outcome, Provider, Refund, Status, Wanted};
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::sync::Arc;

pub fn router(provider: Arc<Provider>) -> Router {
    Router::new()
        .route("/v2/checkout/orders", post(create).get(search))
        .route("/v2/checkout/orders/{id}", get(read))
        .route("/v2/checkout/orders/{id}/capture", post(capture))
        .route("/v2/payments/captures/{id}/refund", post(refund))
        .route("/v1/reporting/transactions", get(list))
        .route("/v1/notifications/verify-webhook-signature", post(verify))
        .with_state(provider)
}

type Shared = State<Arc<Provider>>;

fn pairs(query: Option<String>) -> HashMap<String, String> {
    form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned().collect()
}

fn request_id(headers: &HeaderMap) -> Option<&str> {
    headers.get("paypal-request-id").and_then(|key| key.to_str().ok())
}

fn missing() -> Response {
    error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "MISSING_REQUIRED_PARAMETER")
}

/// Version 0.1 uses the reference as the request id, and expects the order to be captured at once.
async fn create(State(provider): Shared, headers: HeaderMap, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let unit = &body["purchase_units"][0];
    let amount = &unit["amount"];
    let cents = amount["value"].as_str().and_then(cents);
    let (Some(request), Some(amount_cents), Some(currency)) =
        (request_id(&headers), cents, amount["currency_code"].as_str())
    else {
        return missing();
    };
    let key = unit["reference_id"].as_str().unwrap_or(request);
    if key != request && currency.chars().any(|letter| letter.is_ascii_lowercase()) {
        return error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "INVALID_CURRENCY_CODE");
    }
    let currency = &currency.to_ascii_lowercase();
    let wanted = Wanted { key, amount_cents, currency };
    let outcome =
        if key == request { provider.charge(request, &wanted).await } else { provider.create(request, &wanted).await };
    answer(outcome, StatusCode::CREATED)
}

async fn capture(State(provider): Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let Some(request) = request_id(&headers) else { return missing() };
    answer(provider.confirm(request, &id).await, StatusCode::CREATED)
}

async fn read(State(provider): Shared, Path(id): Path<String>) -> Response {
    match provider.read(&id).await {
        Outcome::Object(object) => {
            let mut order = order(&object);
            let refunds = provider.refunds_of(&id);
            if !refunds.is_empty() {
                let all = refunds.iter().map(|refund| refund.amount_cents).sum::<u64>() == object.amount_cents;
                let payments = &mut order["purchase_units"][0]["payments"];
                payments["captures"][0]["status"] = json!(if all { "REFUNDED" } else { "PARTIALLY_REFUNDED" });
                payments["refunds"] = refunds.iter().map(|refund| refund_object(&object, refund)).collect();
            }
            (StatusCode::OK, Json(order)).into_response()
        }
        outcome => answer(outcome, StatusCode::OK),
    }
}

async fn refund(State(provider): Shared, Path(id): Path<String>, headers: HeaderMap, body: Bytes) -> Response {
    let Some(request) = request_id(&headers) else { return missing() };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let amount = body["amount"]["value"].as_str().and_then(cents);
    match provider.refund(request, id.strip_prefix("capture-").unwrap_or(&id), amount).await {
        Ok(refund) => {
            (StatusCode::CREATED, Json(json!({"id": refund.id, "status": refund_status(&refund)}))).into_response()
        }
        Err(Outcome::WrongState(_)) => unprocessable("CAPTURE_FULLY_REFUNDED"),
        Err(outcome) => answer(outcome, StatusCode::OK),
    }
}

fn refund_object(object: &Object, refund: &Refund) -> Value {
    let amount = json!({"currency_code": object.currency, "value": value(refund.amount_cents)});
    json!({"id": refund.id, "status": refund_status(refund), "amount": amount})
}

fn refund_status(refund: &Refund) -> &'static str {
    if refund.pending { "PENDING" } else { "COMPLETED" }
}

#[derive(Deserialize)]
struct Question {
    transmission_id: String,
    transmission_sig: String,
    webhook_event: Box<RawValue>,
}

/// An event is its own if its signature is the SHA-256 of `<transmission id>.<its bytes>`, in hexadecimal digits.
async fn verify(State(provider): Shared, body: Bytes) -> Response {
    if let Err(outcome) = provider.arrive().await {
        return answer(outcome, StatusCode::OK);
    }
    let Ok(question) = serde_json::from_slice::<Question>(&body) else { return missing() };
    let digest = Sha256::digest(format!("{}.{}", question.transmission_id, question.webhook_event.get()));
    let signature = digest.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    let status = if question.transmission_sig == signature { "SUCCESS" } else { "FAILURE" };
    Json(json!({"verification_status": status})).into_response()
}

async fn search(State(provider): Shared, RawQuery(query): RawQuery) -> Response {
    let Some(key) = pairs(query).remove("reference_id") else { return missing() };
    match provider.search(&key).await {
        Ok(found) => Json(json!({"orders": found.iter().map(order).collect::<Vec<_>>()})).into_response(),
        Err(outcome) => answer(outcome, StatusCode::OK),
    }
}

async fn list(State(provider): Shared, RawQuery(query): RawQuery) -> Response {
    let query = pairs(query);
    let number = |name: &str| query.get(name).and_then(|value| value.parse::<usize>().ok());
    let date = |name: &str| {
        let date = query.get(name)?.parse::<jiff::Timestamp>().ok()?;
        u64::try_from(date.as_second()).ok()
    };
    let (Some(since), Some(until)) = (date("start_date"), date("end_date")) else { return missing() };
    let (page, size) = (number("page").unwrap_or(1).max(1), number("page_size").unwrap_or(100).clamp(1, 500));
    match provider.list(since).await {
        Ok(objects) => {
            let charged = objects.iter().filter(|object| object.status == Status::Charged && object.created <= until);
            // Refunds have a time of their own.
            let refunds = provider.refunds_between(since, until);
            let refunds = refunds.iter().map(|(object, refund)| refund_transaction(object, refund));
            let all: Vec<_> = charged.map(transaction).chain(refunds).collect();
            let details: Vec<_> = all.iter().skip((page - 1) * size).take(size).collect();
            let pages = all.len().div_ceil(size).max(1);
            Json(json!({"transaction_details": details, "page": page, "total_pages": pages})).into_response()
        }
        Err(outcome) => answer(outcome, StatusCode::OK),
    }
}

fn refund_transaction(object: &Object, refund: &Refund) -> Value {
    json!({"transaction_info": {
        "transaction_id": refund.id,
        "paypal_reference_id": format!("capture-{}", object.id),
        "paypal_reference_id_type": "TXN",
        "custom_field": object.key,
        "transaction_status": "S",
        "transaction_amount": {
            "currency_code": object.currency, "value": format!("-{}", value(refund.amount_cents)),
        },
    }})
}

fn transaction(object: &Object) -> Value {
    json!({"transaction_info": {
        "transaction_id": format!("capture-{}", object.id),
        "paypal_reference_id": object.id,
        "paypal_reference_id_type": "ODR",
        "custom_field": object.key,
        "transaction_status": "S",
        "transaction_amount": {"currency_code": object.currency, "value": value(object.amount_cents)},
    }})
}

/// `45.00` as 4500.
fn cents(value: &str) -> Option<u64> {
    let (whole, part) = value.split_once('.')?;
    let part = (part.len() == 2).then(|| part.parse::<u64>().ok())??;
    whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(part)
}

fn value(cents: u64) -> String {
    format!("{}.{:02}", cents / 100, cents % 100)
}

fn order(object: &Object) -> Value {
    let (status, captured) = match object.status {
        Status::Unconfirmed if object.approved => ("APPROVED", None),
        Status::Unconfirmed => ("CREATED", None),
        Status::Processing => ("COMPLETED", Some("PENDING")),
        Status::NeedsBuyer => ("PAYER_ACTION_REQUIRED", None),
        Status::Charged => ("COMPLETED", Some("COMPLETED")),
        Status::Declined => ("COMPLETED", Some("DECLINED")),
        Status::Cancelled => ("VOIDED", None),
    };
    let amount = json!({"currency_code": object.currency, "value": value(object.amount_cents)});
    let capture = |status| json!({"id": format!("capture-{}", object.id), "status": status, "amount": amount});
    let captures: Vec<_> = captured.into_iter().map(capture).collect();
    json!({
        "id": object.id,
        "status": status,
        "purchase_units": [{
            "reference_id": object.key,
            "custom_id": object.key,
            "amount": amount,
            "payments": {"captures": captures},
        }],
    })
}

fn answer(outcome: Outcome, done: StatusCode) -> Response {
    match outcome {
        Outcome::Object(object) => (done, Json(order(&object))).into_response(),
        Outcome::Declined => unprocessable("INSTRUMENT_DECLINED"),
        Outcome::NeedsBuyer(_) => unprocessable("PAYER_ACTION_REQUIRED"),
        Outcome::NotApproved(_) => unprocessable("ORDER_NOT_APPROVED"),
        Outcome::WrongState(object) if object.status == Status::NeedsBuyer => unprocessable("PAYER_ACTION_REQUIRED"),
        Outcome::WrongState(_) => unprocessable("ORDER_ALREADY_CAPTURED"),
        Outcome::NotFound => error(StatusCode::NOT_FOUND, "RESOURCE_NOT_FOUND", "INVALID_RESOURCE_ID"),
        Outcome::Invalid => error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "INVALID_PARAMETER_VALUE"),
        Outcome::Forbidden => error(StatusCode::FORBIDDEN, "NOT_AUTHORIZED", "PERMISSION_DENIED"),
        Outcome::Proxy(status) => (status, "<html><body>no</body></html>").into_response(),
        Outcome::Unauthorized => error(StatusCode::UNAUTHORIZED, "AUTHENTICATION_FAILURE", "INVALID_CLIENT"),
        Outcome::KeyReused => error(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "DUPLICATE_REQUEST_ID"),
        Outcome::Failed { status, .. } => error(status, "INTERNAL_SERVER_ERROR", "INTERNAL_SERVICE_ERROR"),
    }
}

fn unprocessable(issue: &str) -> Response {
    error(StatusCode::UNPROCESSABLE_ENTITY, "UNPROCESSABLE_ENTITY", issue)
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
