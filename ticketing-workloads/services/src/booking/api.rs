//! The HTTP interface of booking.

use super::order::{IDEMPOTENCY_HEADER, Order, OrderError};
use super::payments::{Paid, Payments};
use super::seats::{self, Booked, BookingError};
use crate::answers::{not_found, problem, unavailable};
use crate::database::{Database, DatabaseError};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::server::read_body;
use resilience::{CallError, Resilience};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use uuid::Uuid;

/// Largest body of a request, in bytes.
const MAX_BODY_BYTES: usize = 64 * 1024;
/// Time to send a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// When to come back after a failure of which nothing better is known.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// Flag that bounds the bookings under way, and its value without an operator (ADR-007 §5).
const LIMIT_FLAG: (&str, i64) = ("MaxConcurrentBookings", 100);
/// A booking waits for its payment.
const PENDING: &str = "PaymentPending";
/// Why a booking is cancelled that was not paid for.
const DECLINED: &str = "declined";
/// How long whoever takes a booking has to ask payment for it, before others do.
const ASKED_WITHIN: Duration = Duration::from_secs(30);
/// Header that marks the answer to a repeated request.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// What the handlers work on.
pub struct Bookings {
    resilience: Arc<Resilience>,
    database: Arc<Database>,
    /// Absent: nothing has to be paid for.
    payments: Option<Arc<Payments>>,
    outcomes: Family<OutcomeLabel, Counter>,
}

impl Bookings {
    /// Handlers over `database`.
    pub fn new(resilience: Arc<Resilience>, database: Arc<Database>, payments: Option<Arc<Payments>>) -> Arc<Self> {
        let outcomes = Family::<OutcomeLabel, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("bookings", "Requests to book, by outcome", outcomes.clone());
        });
        Arc::new(Self { resilience, database, payments, outcomes })
    }

    fn count(&self, outcome: &'static str) {
        self.outcomes.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Bookings that may be under way at once, by the flag as it is now.
    fn limit(&self) -> u32 {
        let limit = self.resilience.flags().integer(LIMIT_FLAG.0, LIMIT_FLAG.1);
        u32::try_from(limit.max(0)).unwrap_or(u32::MAX)
    }
}

/// The routes.
pub fn router(bookings: Arc<Bookings>) -> Router {
    Router::new()
        .route("/api/bookings", post(create))
        .route("/api/bookings/{id}", get(find))
        .route("/api/events", get(events))
        .fallback(not_found)
        .method_not_allowed_fallback(|| async {
            problem(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", "this path takes another method")
        })
        .with_state(bookings)
}

async fn create(State(bookings): State<Arc<Bookings>>, headers: HeaderMap, body: Body) -> Response {
    let limit = bookings.limit();
    let Some(_under_way) = bookings.resilience.load().enter(limit) else {
        bookings.count("limited");
        let message = format!("{limit} bookings are under way, the most that {} allows; try again", LIMIT_FLAG.0);
        return unavailable("TOO_MANY_BOOKINGS", &message, Duration::from_secs(1));
    };
    let key = headers.get(IDEMPOTENCY_HEADER).map(HeaderValue::as_bytes);
    let order = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(bytes) => Order::read(&bytes, key),
        Err(error) => {
            bookings.count("invalid");
            return problem(error.status(), "INVALID_REQUEST", &error.to_string());
        }
    };
    let order = match order {
        Ok(order) => order,
        Err(error) => {
            bookings.count("invalid");
            return refuse(&error);
        }
    };
    // Under high load what can wait waits (ADR-007 §5): payment is asked later, by whoever finds the time.
    let degraded = bookings.resilience.is_degraded();
    let asks_within = bookings.payments.as_ref().map(|_| if degraded { Duration::ZERO } else { ASKED_WITHIN });
    let unanswered = AtomicBool::new(false);
    let attempt = |connection| seats::book(connection, &order, asks_within, &unanswered);
    match bookings.database.call(attempt).await {
        Ok(booked) => conclude(&bookings, booked, degraded).await,
        Err(error) if unanswered.into_inner() => {
            bookings.count("unknown");
            tracing::warn!(event = %order.event_id, booking = %order.booking_id, %error, "nobody knows whether it is booked");
            unknown(&order)
        }
        Err(error) => fail(&bookings, &order, &error),
    }
}

/// Pays for a booking that has its seats, if that is to be done now, and says how it stands.
async fn conclude(bookings: &Bookings, booked: Booked, degraded: bool) -> Response {
    let Booked { id, mut status, mut cancel_reason, amount_cents, before } = booked;
    let pending = status == PENDING;
    if let Some(payments) = bookings.payments.as_ref().filter(|_| pending && !before && !degraded) {
        let paid = payments.pay(id, amount_cents).await;
        let may_wait = payments.may_wait();
        let database = &bookings.database;
        let written = match paid {
            Paid::Yes => database.call(|connection| seats::confirm(connection, id)).await,
            Paid::Declined | Paid::NotCharged if paid == Paid::Declined || !may_wait => {
                let reason = if paid == Paid::Declined { DECLINED } else { "payment unavailable" };
                cancel_reason = Some(reason.to_owned());
                database.call(|connection| seats::cancel(connection, id, reason, 0)).await
            }
            _ => database.call(|connection| seats::settle_soon(connection, id)).await.map(|_| PENDING.to_owned()),
        };
        match written {
            Ok(now) => {
                if paid == Paid::Yes && now == "Cancelled" {
                    payments.paid_for_nothing(id);
                }
                status = now;
            }
            // What payment said is asked for again with the same key, and written down then.
            Err(error) => tracing::warn!(booking = %id, %error, "what payment said could not be written down"),
        }
    }
    let (code, outcome) = match status.as_str() {
        "Cancelled" => {
            bookings.count("cancelled");
            return match cancel_reason.as_deref() {
                Some(DECLINED) => problem(StatusCode::PAYMENT_REQUIRED, "PAYMENT_DECLINED", "The payment was declined"),
                _ => unavailable("BOOKING_FAILED", "Unable to process booking at this time", RETRY_AFTER),
            };
        }
        PENDING => (StatusCode::ACCEPTED, "payment_pending"),
        _ => (StatusCode::CREATED, "confirmed"),
    };
    bookings.count(if before { "replayed" } else { outcome });
    let mut response = (code, Json(json!({"success": true, "bookingId": id, "status": status}))).into_response();
    if before {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

/// The seats may be taken; the answer got lost.
fn unknown(order: &Order) -> Response {
    let message = "Nobody knows yet whether this was booked. Send it again with the same Idempotency-Key to find out.";
    let answer = json!({
        "success": false, "errorCode": "OUTCOME_UNKNOWN", "message": message,
        "bookingId": order.booking_id, "idempotencyKey": order.idempotency_key,
    });
    (StatusCode::GATEWAY_TIMEOUT, Json(answer)).into_response()
}

fn refuse(error: &OrderError) -> Response {
    match error {
        OrderError::NotAnObject(_) => problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", &error.to_string()),
        OrderError::Field { field, .. } => {
            let answer = json!({
                "success": false, "errorCode": "INVALID_REQUEST", "message": error.to_string(), "field": field,
            });
            (StatusCode::UNPROCESSABLE_ENTITY, Json(answer)).into_response()
        }
    }
}

/// A "no" is told as such; everything else is told as the ADR has it, with the reason in the log only.
fn fail(bookings: &Bookings, order: &Order, error: &CallError<BookingError>) -> Response {
    let business = match error {
        CallError::Failed { source, .. } => match source {
            BookingError::InsufficientTickets => Some((StatusCode::CONFLICT, "INSUFFICIENT_TICKETS", source)),
            BookingError::EventNotFound => Some((StatusCode::NOT_FOUND, "EVENT_NOT_FOUND", source)),
            BookingError::KeyReused => Some((StatusCode::CONFLICT, "IDEMPOTENCY_KEY_REUSED", source)),
            BookingError::VersionConflict | BookingError::Database(_) => None,
        },
        _ => None,
    };
    if let Some((status, code, source)) = business {
        bookings.count(match source {
            BookingError::InsufficientTickets => "insufficient_tickets",
            BookingError::EventNotFound => "event_not_found",
            _ => "key_reused",
        });
        return problem(status, code, &source.to_string());
    }
    bookings.count("failed");
    tracing::warn!(event = %order.event_id, booking = %order.booking_id, %error, "booking failed");
    let wait = error.retry_after().unwrap_or(RETRY_AFTER);
    unavailable("BOOKING_FAILED", "Unable to process booking at this time", wait)
}

async fn find(State(bookings): State<Arc<Bookings>>, Path(id): Path<String>) -> Response {
    let Ok(id) = Uuid::parse_str(&id) else {
        return problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "the id of a booking is a UUID");
    };
    match bookings.database.call(move |connection| seats::find(connection, id)).await {
        Ok(Some(booking)) => Json(booking).into_response(),
        Ok(None) => problem(StatusCode::NOT_FOUND, "BOOKING_NOT_FOUND", "There is no booking with this id"),
        Err(error) => unreadable(&error),
    }
}

async fn events(State(bookings): State<Arc<Bookings>>) -> Response {
    match bookings.database.call(seats::events).await {
        Ok(events) => Json(json!({ "events": events })).into_response(),
        Err(error) => unreadable(&error),
    }
}

fn unreadable(error: &CallError<DatabaseError>) -> Response {
    tracing::warn!(%error, "reading failed");
    let wait = error.retry_after().unwrap_or(RETRY_AFTER);
    unavailable("UNAVAILABLE", "Unable to read this at this time", wait)
}
