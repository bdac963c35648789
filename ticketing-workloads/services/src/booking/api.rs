//! The HTTP interface of booking.

use super::PAYMENT;
use super::asker::Asker;
use super::limits::{Limits, Place, UnderWay};
use super::order::{IDEMPOTENCY_HEADER, Order, OrderError};
use super::payments::{self, Paid, Payments};
use super::seats::{self, Booked, BookingError, Purpose, Wish};
use crate::answers::{self, body_unreadable, problem, refused, shed, unavailable};
use crate::cancel_reason::CancelReason;
use crate::database::{Database, DatabaseError};
use crate::schema::{self, Schema};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use backon::{ExponentialBuilder, Retryable};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::control::degradation::InFlight;
use resilience::failure::Verdict;
use resilience::server::read_body;
use resilience::{CallError, Failure, Priority, Rejection, Resilience, priority};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
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
/// Seats are reserved and not bought yet.
pub(super) const HELD: &str = "Held";
/// How long the request that takes a booking has to ask payment for it, before the settling task does.
const ASKED_WITHIN: Duration = Duration::from_secs(30);
/// Header that marks the answer to a repeated request.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// How what has a price is sold.
pub struct Selling {
    /// Absent: it is not, unless nothing is charged.
    pub payments: Option<Arc<Payments>>,
    /// It is confirmed without a payment.
    pub charge_nothing: bool,
    /// How much one buyer may take.
    pub limits: Limits,
}

/// What the handlers work on.
pub struct Bookings {
    pub(super) resilience: Arc<Resilience>,
    pub(super) database: Arc<Database>,
    payments: Option<Arc<Payments>>,
    /// Whether orders that have a price are taken.
    pub(super) sells_priced: bool,
    /// How long a reservation keeps its seats.
    pub(super) hold: Duration,
    limits: Limits,
    pub(super) schema: Schema,
    under_way: UnderWay,
    outcomes: Family<OutcomeLabel, Counter>,
}

impl Bookings {
    /// Handlers over `database`, whose schema is as far as `schema` says.
    pub fn new(
        resilience: Arc<Resilience>,
        database: Arc<Database>,
        schema: Schema,
        selling: Selling,
        hold: Duration,
    ) -> Arc<Self> {
        let outcomes = Family::<OutcomeLabel, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("bookings", "Requests to book, by outcome", outcomes.clone());
        });
        let Selling { payments, charge_nothing, limits } = selling;
        let sells_priced = payments.is_some() || charge_nothing;
        let under_way = UnderWay::default();
        Arc::new(Self { resilience, database, payments, sells_priced, hold, limits, schema, under_way, outcomes })
    }

    /// Whether the table says whose a booking is, as far as is known: what is booked as nobody's stays so for ever, so an order
    /// rather fails in the moment before the schema was read.
    pub(super) fn has_owners(&self) -> bool {
        !self.schema.lacks(schema::BUYERS)
    }

    /// What one buyer may take. Nobody is counted before the indexes are there: each order would read the whole table.
    pub(super) fn limits(&self) -> Option<&Limits> {
        (!self.schema.lacks(schema::BUYER_INDEXES)).then_some(&self.limits)
    }

    /// Who asks, or why that is not taken.
    pub(super) fn asker(&self, headers: &HeaderMap) -> Result<Asker, Box<Response>> {
        Asker::of(headers).map_err(|error| {
            self.count("invalid");
            tracing::error!("{error}");
            Box::new(problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", &error.to_string()))
        })
    }

    /// Takes a place among the buyer's own bookings under way, or refuses.
    pub(super) fn enter_as(&self, asker: &Asker) -> Result<Place<'_>, Box<Response>> {
        self.under_way.enter(asker).ok_or_else(|| {
            self.count("limited");
            let message = "Too many orders of yours at once. Please wait for their answers.";
            Box::new(answers::too_many_of_asker("TOO_MANY_ORDERS", message, Duration::from_secs(1)))
        })
    }

    fn count(&self, outcome: &'static str) {
        self.outcomes.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    /// Whether buyers get a mail at each turn of their order. Orders do not wait for the schema step that this needs.
    pub(super) fn tells(&self) -> bool {
        self.schema.has(schema::TICKETS)
    }

    /// Takes a place among the bookings under way, or refuses. The flag is read as it is now. It bounds what is started: for
    /// what finishes a sale there is a quarter more, unless the flag allows nothing at all.
    pub(super) fn enter(&self, priority: Priority) -> Result<InFlight<'_>, Box<Response>> {
        let limit = self.resilience.flags().integer(LIMIT_FLAG.0, LIMIT_FLAG.1);
        let limit = u32::try_from(limit.max(0)).unwrap_or(u32::MAX);
        let more = if priority == Priority::Finish { limit.div_ceil(4) } else { 0 };
        self.resilience.load().enter_beyond(limit, more).ok_or_else(|| {
            let message = format!("Too many bookings at once: {} allows {limit}. Please try again.", LIMIT_FLAG.0);
            Box::new(self.too_many(LIMIT_FLAG.0, &message))
        })
    }

    /// How soon payment is asked, if it is. Under high load what can wait waits (ADR-007 §5): payment is asked later, by
    /// the worker that comes to it.
    pub(super) fn asks_within(&self, degraded: bool) -> Option<Duration> {
        self.payments.as_ref().map(|_| if degraded { Duration::ZERO } else { ASKED_WITHIN })
    }

    /// The order has a price, and nobody can charge it. Nothing has failed: circuits in front of it stay closed.
    pub(super) fn payments_not_set_up(&self) -> Response {
        self.count("payments_not_set_up");
        let message = BookingError::PaymentsNotSetUp.to_string();
        refused("PAYMENTS_NOT_SET_UP", &message, Duration::from_secs(60))
    }

    /// More than one of the limits allows; the smaller one is met first, and the answer names it.
    fn too_many(&self, limit: &str, message: &str) -> Response {
        self.count("limited");
        let mut response = refused("TOO_MANY_BOOKINGS", message, Duration::from_secs(1));
        let answer = json!({"success": false, "errorCode": "TOO_MANY_BOOKINGS", "message": message, "limit": limit});
        *response.body_mut() = Body::from(answer.to_string());
        response.headers_mut().remove(header::CONTENT_LENGTH);
        response
    }

    /// The answer to a call that gave way to more important ones, if that is what it did.
    fn gave_way<E>(&self, error: &CallError<E>) -> Option<Response> {
        matches!(error, CallError::Rejected { rejection: Rejection::Shed { .. }, .. }).then(|| {
            self.count("limited");
            shed()
        })
    }

    /// A failure is answered as the ADR has it, with the reason in the log only, but for a full bulkhead.
    pub(super) fn unavailable<E: Failure>(&self, error: &CallError<E>) -> Response {
        if let Some(answer) = self.gave_way(error) {
            return answer;
        }
        if let CallError::Rejected { rejection, .. } = error
            && rejection.is_full_bulkhead()
        {
            let name = self.database.bulkhead().unwrap_or_default();
            return self.too_many(&name, "Too many bookings at once. Please try again.");
        }
        self.count("failed");
        tracing::warn!(%error, "booking failed");
        let message = "Unable to process booking at this time";
        match error {
            // Others were faster, again and again: that is no failure of the service.
            CallError::Failed { source, .. } if source.kind().verdict() == Verdict::Success => {
                refused("BOOKING_FAILED", message, Duration::from_secs(1))
            }
            _ => unavailable("BOOKING_FAILED", message, error.retry_after().unwrap_or(RETRY_AFTER)),
        }
    }

    /// Something could not be read. If only too much is under way, nothing has failed: circuits in front of it stay closed.
    pub(super) fn unreadable(&self, error: &CallError<DatabaseError>) -> Response {
        match error {
            CallError::Rejected { rejection, .. } if rejection.is_full_bulkhead() => {
                self.gave_way(error).unwrap_or_else(|| {
                    let message = "Too much is asked for at once. Please try again.";
                    refused("TOO_MANY_REQUESTS_UNDER_WAY", message, Duration::from_secs(1))
                })
            }
            _ => {
                tracing::warn!(%error, "failed to read bookings or events");
                let wait = error.retry_after().unwrap_or(RETRY_AFTER);
                unavailable("UNAVAILABLE", "Unable to read this at this time", wait)
            }
        }
    }
}

pub fn routes() -> Router<Arc<Bookings>> {
    Router::new()
        .route("/api/bookings", post(create))
        .route("/api/bookings/{id}", get(find))
        .route("/api/events", get(events))
}

async fn create(State(bookings): State<Arc<Bookings>>, headers: HeaderMap, body: Body) -> Response {
    let asks_within = bookings.asks_within(bookings.resilience.is_degraded());
    let purpose = asks_within.map_or(Purpose::Free, |asks_within| Purpose::Paid { asks_within });
    take(&bookings, &headers, body, purpose).await
}

/// Takes the seats that somebody asks for, and goes on as far as it is to go at once.
pub(super) async fn take(bookings: &Bookings, headers: &HeaderMap, body: Body, purpose: Purpose) -> Response {
    let asker = match bookings.asker(headers) {
        Ok(asker) => asker,
        Err(refusal) => return *refusal,
    };
    // Before it counts as a booking in flight: a slow sender is no load.
    let key = headers.get(IDEMPOTENCY_HEADER).map(HeaderValue::as_bytes);
    let order = match read_body(body, MAX_BODY_BYTES, BODY_TIMEOUT).await {
        Ok(bytes) => Order::read(&bytes, key),
        Err(error) => {
            bookings.count("invalid");
            return body_unreadable(error);
        }
    };
    let order = match order {
        Ok(order) => order,
        Err(error) => {
            bookings.count("invalid");
            return refuse(&error);
        }
    };
    let _of_buyer = match bookings.enter_as(&asker) {
        Ok(place) => place,
        Err(refusal) => return *refusal,
    };
    let _under_way = match bookings.enter(Priority::Start) {
        Ok(place) => place,
        Err(refusal) => return *refusal,
    };
    let unanswered = AtomicBool::new(false);
    let (sells_priced, has_owners, limits) = (bookings.sells_priced, bookings.has_owners(), bookings.limits());
    let tells = bookings.tells();
    let wish = Wish { order: &order, asker: &asker, purpose, sells_priced, has_owners, tells, limits };
    let attempt = |connection| seats::take(connection, wish, &unanswered);
    match bookings.database.call(attempt).await {
        Ok(booked) if booked.status == HELD && !matches!(purpose, Purpose::Held { .. }) => {
            bookings.count("key_reused");
            let message = "This idempotency key was used for a reservation; confirm that, or book with another key";
            problem(StatusCode::CONFLICT, "IDEMPOTENCY_KEY_REUSED", message)
        }
        Ok(booked) => {
            let payment_waits = purpose == Purpose::Paid { asks_within: Duration::ZERO };
            // It has its seats: from here on a sale is finished.
            priority::within(Priority::Finish, conclude(bookings, booked, payment_waits)).await
        }
        Err(error) if unanswered.into_inner() => {
            bookings.count("unknown");
            tracing::warn!(event = %order.event_id, booking = %order.booking_id, %error, "booking outcome unknown");
            unknown(order.booking_id, Some(&order.idempotency_key))
        }
        Err(error) => fail(bookings, &error),
    }
}

/// Pays for a booking that has its seats, if that is to be done now, and says how it stands.
pub(super) async fn conclude(bookings: &Bookings, booked: Booked, payment_waits: bool) -> Response {
    let Booked { id, mut status, mut cancel_reason, amount_cents, before, mut needs_buyer } = booked;
    let pending = status == PENDING;
    if let Some(payments) = bookings.payments.as_ref().filter(|_| pending && !before && !payment_waits) {
        let started = Instant::now();
        let paid = payments.pay(id, amount_cents).await;
        let may_wait = payments.may_wait();
        needs_buyer = paid == Paid::NeedsBuyer;
        if may_wait && matches!(paid, Paid::NotCharged | Paid::Unknown) {
            bookings.resilience.metrics().fallback(PAYMENT, "queue", started.elapsed());
        }
        let database = &bookings.database;
        let unpaid = if paid == Paid::Declined { CancelReason::Declined } else { CancelReason::PaymentUnavailable };
        let unpaid = unpaid.name();
        // Where nothing was booked, the answer says so, and the same key may book yet: no mail.
        let tells_end = bookings.tells() && paid == Paid::Declined;
        let told = payments::told(&bookings.schema, paid);
        let write = || async {
            match paid {
                Paid::Yes => database.call(|connection| seats::confirm(connection, id)).await,
                Paid::Declined | Paid::NotCharged if paid == Paid::Declined || !may_wait => {
                    database.call(|connection| seats::cancel(connection, id, unpaid, 0, tells_end)).await
                }
                _ => database
                    .call(|connection| seats::settle_soon(connection, id, told))
                    .await
                    .map(|_| PENDING.to_owned()),
            }
        };
        // Worth several tries, also where the bulkhead is full: otherwise the buyer waits until the booking is settled later.
        let written =
            write.retry(ExponentialBuilder::new().with_min_delay(Duration::from_millis(50)).with_jitter()).await;
        match written {
            Ok(now) => {
                if paid == Paid::Yes && now == "Cancelled" {
                    payments.paid_for_nothing(id);
                }
                if now == "Cancelled" {
                    cancel_reason = Some(unpaid.to_owned());
                }
                status = now;
            }
            // What payment said is asked for again with the same key, and written down then.
            Err(error) => {
                tracing::warn!(booking = %id, %error, "failed to record the payment outcome; it is looked up again");
            }
        }
    }
    let (code, outcome) = match status.as_str() {
        "Cancelled" => {
            bookings.count("cancelled");
            return match cancel_reason.as_deref() {
                Some(reason) if reason == CancelReason::Declined.name() => {
                    problem(StatusCode::PAYMENT_REQUIRED, "PAYMENT_DECLINED", "The payment was declined")
                }
                // It ended before this request: no other one can change that.
                _ if before => {
                    let message =
                        "The reservation is over, its seats are free again. Reserve or book with another key.";
                    problem(StatusCode::CONFLICT, "RESERVATION_EXPIRED", message)
                }
                _ => unavailable("BOOKING_FAILED", "Unable to process booking at this time", RETRY_AFTER),
            };
        }
        PENDING => (StatusCode::ACCEPTED, "payment_pending"),
        HELD => (StatusCode::CREATED, "held"),
        _ => (StatusCode::CREATED, "confirmed"),
    };
    bookings.count(if before { "replayed" } else { outcome });
    let mut answer = json!({"success": true, "bookingId": id, "status": status});
    if status == HELD && !before {
        answer["heldForSeconds"] = json!(bookings.hold.as_secs());
    }
    if needs_buyer && status == PENDING {
        answer["action"] = json!("ConfirmPayment");
        answer["message"] = json!(seats::CONFIRM_PAYMENT);
    }
    let mut response = (code, Json(answer)).into_response();
    if before {
        response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

/// It may be done; the answer got lost.
pub(super) fn unknown(booking: Uuid, key: Option<&str>) -> Response {
    let message = match key {
        Some(_) => "The outcome is unknown. Send the request again with the same Idempotency-Key to find out.",
        None => "The outcome is unknown. Send the request again to find out.",
    };
    let answer = json!({
        "success": false, "errorCode": "OUTCOME_UNKNOWN", "message": message,
        "bookingId": booking, "idempotencyKey": key,
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

/// An error that is an answer keeps its own code.
pub(super) fn fail(bookings: &Bookings, error: &CallError<BookingError>) -> Response {
    let CallError::Failed { source, .. } = error else { return bookings.unavailable(error) };
    let (outcome, status, code) = match source {
        BookingError::InsufficientTickets => ("insufficient_tickets", StatusCode::CONFLICT, "INSUFFICIENT_TICKETS"),
        BookingError::EventNotFound => ("event_not_found", StatusCode::NOT_FOUND, "EVENT_NOT_FOUND"),
        BookingError::PaymentsNotSetUp => {
            return bookings.payments_not_set_up();
        }
        BookingError::Limited(limited) => {
            let (code, outcome) = limited.reached.codes();
            bookings.count(outcome);
            let (message, limit) = (limited.to_string(), limited.reached.name());
            let mut response = answers::too_many_of_asker(code, &message, limited.wait);
            let answer = json!({"success": false, "errorCode": code, "message": message, "limit": limit});
            *response.body_mut() = Body::from(answer.to_string());
            response.headers_mut().remove(header::CONTENT_LENGTH);
            return response;
        }
        BookingError::KeyReused => ("key_reused", StatusCode::CONFLICT, "IDEMPOTENCY_KEY_REUSED"),
        BookingError::KeyUnderWay | BookingError::Database(_) => return bookings.unavailable(error),
    };
    bookings.count(outcome);
    problem(status, code, &source.to_string())
}

async fn find(State(bookings): State<Arc<Bookings>>, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let asker = match bookings.asker(&headers) {
        Ok(asker) => asker,
        Err(refusal) => return *refusal,
    };
    let Ok(id) = Uuid::parse_str(&id) else {
        return problem(StatusCode::BAD_REQUEST, "INVALID_REQUEST", "the id of a booking is a UUID");
    };
    match bookings.database.call(|connection| seats::find(connection, id, &asker)).await {
        Ok(Some(booking)) => Json(booking).into_response(),
        Ok(None) => problem(StatusCode::NOT_FOUND, "BOOKING_NOT_FOUND", "There is no booking with this id"),
        Err(error) => bookings.unreadable(&error),
    }
}

async fn events(State(bookings): State<Arc<Bookings>>) -> Response {
    match bookings.database.call(seats::events).await {
        Ok(events) => Json(json!({ "events": events })).into_response(),
        Err(error) => bookings.unreadable(&error),
    }
}
