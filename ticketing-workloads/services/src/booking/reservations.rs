//! `/api/reservations`: seats that are kept for a buyer for a limited time.

use super::api::{self, Bookings};
use super::holds::{self, Purchase};
use super::seats::Purpose;
use crate::answers::problem;
use crate::database::Database;
use crate::schema::{self, Schema};
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, post};
use prometheus_client::metrics::counter::Counter;
use resilience::{Priority, Resilience};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use uuid::Uuid;

/// Reservations that one statement ends.
const AT_ONCE: i64 = 200;

pub fn routes() -> Router<Arc<Bookings>> {
    Router::new()
        .route("/api/reservations", post(create))
        .route("/api/reservations/{id}", delete(give_back))
        .route("/api/reservations/{id}/confirm", post(confirm))
}

/// `POST /api/reservations`: takes the seats and keeps them.
async fn create(State(bookings): State<Arc<Bookings>>, headers: HeaderMap, body: Body) -> Response {
    let keep = bookings.hold;
    api::take(&bookings, &headers, body, Purpose::Held { keep }).await
}

/// `POST /api/reservations/{id}/confirm`: buys what is reserved.
async fn confirm(State(bookings): State<Arc<Bookings>>, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let asker = match bookings.asker(&headers) {
        Ok(asker) => asker,
        Err(refusal) => return *refusal,
    };
    let Ok(id) = Uuid::parse_str(&id) else { return not_an_id() };
    let _of_buyer = match bookings.enter_as(&asker) {
        Ok(place) => place,
        Err(refusal) => return *refusal,
    };
    let _under_way = match bookings.enter(Priority::Finish) {
        Ok(place) => place,
        Err(refusal) => return *refusal,
    };
    let degraded = bookings.resilience.is_degraded();
    let asks_within = bookings.asks_within(degraded);
    let tells = bookings.tells();
    let unanswered = AtomicBool::new(false);
    let limits = bookings.limits().map(|limits| limits.of_payment(&asker)).unwrap_or_default();
    let (sells_priced, has_owners) = (bookings.sells_priced, bookings.has_owners());
    let purchase = Purchase { id, asker: &asker, asks_within, sells_priced, has_owners, tells, limits };
    match bookings.database.call(|connection| holds::buy(connection, purchase, &unanswered)).await {
        Ok(Some(booked)) if booked.status == api::HELD => bookings.payments_not_set_up(),
        Ok(Some(booked)) => api::conclude(&bookings, booked, degraded).await,
        Ok(None) => not_found(),
        Err(error) if unanswered.into_inner() => {
            tracing::warn!(booking = %id, %error, "outcome of a purchase unknown");
            api::unknown(id, None)
        }
        Err(error) => api::fail(&bookings, &error),
    }
}

/// `DELETE /api/reservations/{id}`: gives the seats back.
async fn give_back(State(bookings): State<Arc<Bookings>>, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let asker = match bookings.asker(&headers) {
        Ok(asker) => asker,
        Err(refusal) => return *refusal,
    };
    let Ok(id) = Uuid::parse_str(&id) else { return not_an_id() };
    let tells = bookings.tells();
    match bookings.database.call(|connection| holds::give_back(connection, id, &asker, tells)).await {
        Ok(Some(status)) if status == "Cancelled" => {
            Json(json!({"success": true, "bookingId": id, "status": status})).into_response()
        }
        Ok(Some(status)) => {
            let message = format!("This is not a reservation any more; its status is {status}");
            problem(StatusCode::CONFLICT, "ALREADY_BOOKED", &message)
        }
        Ok(None) => not_found(),
        Err(error) => bookings.unavailable(&error),
    }
}

fn not_an_id() -> Response {
    problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "the id of a reservation is a UUID")
}

fn not_found() -> Response {
    problem(StatusCode::NOT_FOUND, "RESERVATION_NOT_FOUND", "There is no reservation with this id")
}

/// Ends reservations that ran out, for as long as it is polled. Every pod does; what one has another passes over.
pub async fn expire(database: Arc<Database>, resilience: Arc<Resilience>, schema: Schema, every: Duration) {
    let expired = Counter::<u64>::default();
    resilience.metrics().register(|registry| {
        registry.register(
            "reservations_expired",
            "Reservations that ran out and gave their seats back",
            expired.clone(),
        );
    });
    loop {
        let tells = schema.has(schema::TICKETS);
        match database.call(|connection| holds::expire(connection, AT_ONCE, tells)).await {
            Ok(ended) => {
                expired.inc_by(ended.unsigned_abs());
                if ended > 0 {
                    tracing::info!(ended, "ended expired reservations; their seats are free again");
                }
                if ended >= AT_ONCE {
                    continue;
                }
            }
            Err(error) => tracing::warn!(%error, "failed to end expired reservations"),
        }
        tokio::time::sleep(every).await;
    }
}
