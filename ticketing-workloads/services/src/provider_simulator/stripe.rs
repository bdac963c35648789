//! A provider shaped as Stripe: payment intents, form-encoded requests, a search that lags, a list, and refunds.

use super::provider::{Object, Outcome, Provider, Refund, Status, Wanted};
use axum::body::Bytes;
use axum::extract::{Path, RawQuery, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

pub fn router(provider: Arc<Provider>) -> Router {
    Router::new()
        .route("/v1/payment_intents", post(create).get(list))
        .route("/v1/payment_intents/search", get(search))
        .route("/v1/payment_intents/{id}", get(read))
        .route("/v1/payment_intents/{id}/confirm", post(confirm))
        .route("/v1/payment_intents/{id}/cancel", post(cancel))
        .route("/v1/refunds", post(refund).get(refunds))
        .with_state(provider)
}

type Shared = State<Arc<Provider>>;

fn pairs(text: &[u8]) -> HashMap<String, String> {
    form_urlencoded::parse(text).into_owned().collect()
}

fn key_of(headers: &HeaderMap) -> Option<&str> {
    headers.get("idempotency-key").and_then(|key| key.to_str().ok())
}

fn missing(message: &str) -> Response {
    error(StatusCode::BAD_REQUEST, "invalid_request_error", "parameter_missing", message)
}

async fn create(State(provider): Shared, headers: HeaderMap, body: Bytes) -> Response {
    let form = pairs(&body);
    let amount = form.get("amount").and_then(|amount| amount.parse().ok());
    let (Some(request), Some(amount_cents), Some(currency)) = (key_of(&headers), amount, form.get("currency")) else {
        return missing("Idempotency-Key, amount and currency are needed");
    };
    let key = form.get("metadata[key]").map_or(request, String::as_str);
    let wanted = Wanted { key, amount_cents, currency };
    let at_once = form.get("confirm").is_some_and(|confirm| confirm == "true");
    answer(if at_once { provider.charge(request, &wanted).await } else { provider.create(request, &wanted).await })
}

async fn confirm(State(provider): Shared, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let Some(request) = key_of(&headers) else { return missing("Idempotency-Key is needed") };
    answer(provider.confirm(request, plain(&id)).await)
}

async fn read(State(provider): Shared, Path(id): Path<String>) -> Response {
    answer(provider.read(plain(&id)).await)
}

async fn cancel(State(provider): Shared, Path(id): Path<String>) -> Response {
    answer(provider.cancel(plain(&id)).await)
}

async fn refund(State(provider): Shared, headers: HeaderMap, body: Bytes) -> Response {
    let form = pairs(&body);
    let (Some(request), Some(id)) = (key_of(&headers), form.get("payment_intent")) else {
        return missing("Idempotency-Key and payment_intent are needed");
    };
    let amount = form.get("amount").and_then(|amount| amount.parse().ok());
    match provider.refund(request, plain(id), amount).await {
        Ok(refund) => Json(refund_object(&refund, id)).into_response(),
        Err(Outcome::WrongState(_)) => {
            let message = "Charge has already been refunded.";
            error(StatusCode::BAD_REQUEST, "invalid_request_error", "charge_already_refunded", message)
        }
        Err(outcome) => answer(outcome),
    }
}

async fn refunds(State(provider): Shared, RawQuery(query): RawQuery) -> Response {
    if let Err(outcome) = provider.arrive().await {
        return answer(outcome);
    }
    let query = pairs(query.unwrap_or_default().as_bytes());
    let Some(id) = query.get("payment_intent") else { return missing("payment_intent is needed") };
    let data: Vec<_> = provider.refunds_of(plain(id)).iter().map(|refund| refund_object(refund, id)).collect();
    Json(json!({"object": "list", "has_more": false, "data": data})).into_response()
}

fn refund_object(refund: &Refund, intent: &str) -> Value {
    let status = if refund.pending { "pending" } else { "succeeded" };
    json!({
        "id": refund.id, "object": "refund", "payment_intent": intent, "status": status, "amount": refund.amount_cents,
    })
}

/// Only one kind of question is understood: `metadata['key']:'<key>'`.
async fn search(State(provider): Shared, RawQuery(query): RawQuery) -> Response {
    let asked = pairs(query.unwrap_or_default().as_bytes()).remove("query").unwrap_or_default();
    let Some(key) = asked.strip_prefix("metadata['key']:'").and_then(|rest| rest.strip_suffix('\'')) else {
        let message = "query must be metadata['key']:'<key>'";
        return error(StatusCode::BAD_REQUEST, "invalid_request_error", "parameter_invalid", message);
    };
    match provider.search(key).await {
        Ok(found) => {
            let data: Vec<_> = found.iter().map(intent).collect();
            Json(json!({"object": "search_result", "has_more": false, "data": data})).into_response()
        }
        Err(outcome) => answer(outcome),
    }
}

/// Newest first, as Stripe lists them.
async fn list(State(provider): Shared, RawQuery(query): RawQuery) -> Response {
    let query = pairs(query.unwrap_or_default().as_bytes());
    let number = |name: &str| query.get(name).and_then(|value| value.parse::<u64>().ok());
    let limit = usize::try_from(number("limit").unwrap_or(10).clamp(1, 100)).unwrap_or(10);
    match provider.list(number("created[gte]").unwrap_or_default()).await {
        Ok(mut objects) => {
            let before = number("created[lt]").unwrap_or(u64::MAX);
            objects.retain(|object| object.created < before);
            objects.reverse();
            let after = query.get("starting_after").map(|id| plain(id));
            let begin = after.and_then(|id| objects.iter().position(|object| object.id == id));
            let rest = &objects[begin.map_or(0, |place| place + 1)..];
            let data: Vec<_> = rest.iter().take(limit).map(|object| listed(&provider, object)).collect();
            Json(json!({"object": "list", "has_more": rest.len() > limit, "data": data})).into_response()
        }
        Err(outcome) => answer(outcome),
    }
}

/// With `expand[]=data.latest_charge`.
fn listed(provider: &Provider, object: &Object) -> Value {
    let mut intent = intent(object);
    if object.status == Status::Charged {
        let refunds = provider.refunds_of(&object.id);
        let refunded: u64 = refunds.iter().filter(|one| !one.pending).map(|one| one.amount_cents).sum();
        intent["latest_charge"] = json!({
            "id": format!("ch_{}", object.id), "amount_refunded": refunded, "refunded": refunded == object.amount_cents,
        });
    }
    intent
}

fn plain(id: &str) -> &str {
    id.strip_prefix("pi_").unwrap_or(id)
}

fn intent(object: &Object) -> Value {
    let status = match object.status {
        Status::Unconfirmed => "requires_confirmation",
        Status::Processing => "processing",
        Status::NeedsBuyer => "requires_action",
        Status::Charged => "succeeded",
        Status::Declined => "requires_payment_method",
        Status::Cancelled => "canceled",
    };
    json!({
        "id": format!("pi_{}", object.id),
        "object": "payment_intent",
        "amount": object.amount_cents,
        "amount_received": if object.status == Status::Charged { object.amount_cents } else { 0 },
        "currency": object.currency,
        "metadata": {"key": object.key},
        "status": status,
        "created": object.created,
    })
}

fn answer(outcome: Outcome) -> Response {
    match outcome {
        Outcome::Object(object) | Outcome::NeedsBuyer(object) | Outcome::NotApproved(object) => {
            Json(intent(&object)).into_response()
        }
        Outcome::Declined => {
            error(StatusCode::PAYMENT_REQUIRED, "card_error", "card_declined", "Your card was declined.")
        }
        Outcome::WrongState(object) => {
            let message = format!("The state of this PaymentIntent does not allow it: {}", intent(&object)["status"]);
            error(StatusCode::BAD_REQUEST, "invalid_request_error", "payment_intent_unexpected_state", &message)
        }
        Outcome::NotFound => {
            error(StatusCode::NOT_FOUND, "invalid_request_error", "resource_missing", "No such object")
        }
        Outcome::Invalid => error(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            "amount_too_small",
            "Amount must be at least 50 cents",
        ),
        Outcome::Forbidden => error(
            StatusCode::FORBIDDEN,
            "invalid_request_error",
            "more_permissions_required",
            "The key may not do this",
        ),
        Outcome::Proxy(status) => (status, "<html><body>no</body></html>").into_response(),
        Outcome::Unauthorized => {
            error(StatusCode::UNAUTHORIZED, "invalid_request_error", "api_key_expired", "Expired API Key provided")
        }
        Outcome::KeyReused => {
            let message = "Keys for idempotent requests can only be used with the same parameters.";
            error(StatusCode::BAD_REQUEST, "idempotency_error", "idempotency_key_in_use", message)
        }
        Outcome::Failed { status, replayed } => {
            let mut response = error(status, "api_error", "api_error", "An error occurred on our side.");
            if replayed {
                let name = HeaderName::from_static("idempotent-replayed");
                response.headers_mut().insert(name, HeaderValue::from_static("true"));
            }
            response
        }
    }
}

fn error(status: StatusCode, kind: &str, code: &str, message: &str) -> Response {
    (status, Json(json!({"error": {"type": kind, "code": code, "message": message}}))).into_response()
}
