//! `GET /api/tickets/{code}`: whether a ticket lets somebody in, by its signature and by how its booking stands now. It says
//! nothing of who has bought it.

use super::api::Bookings;
use crate::answers::{problem, unavailable};
use crate::database::{Connection, DatabaseError};
use crate::schema;
use crate::tickets::{Code, CodeError, KeyId, PublicKey, Ticket};
use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// The key that a code names, and the booking. It is refunded once all that was charged for it goes back: of two charges, one
/// does while the booking stands; a payment that is deleted for its age has left its refund. Read without a wait for the disk: who stands at the entrance has had the ticket for a while.
const LOOK: &str = "
    SELECT k.public_key, k.revoked_at IS NOT NULL, b.event_id, b.ticket_count, b.status, e.name,
           CASE WHEN EXISTS (SELECT FROM payment_attempts a WHERE a.key = b.id::text AND a.state = 'Charged')
           THEN NOT EXISTS (SELECT FROM payment_attempts a
                           WHERE a.key = b.id::text AND a.state = 'Charged'
                             AND NOT EXISTS (SELECT FROM refunds r WHERE r.provider = a.provider AND r.charge_id = a.charge_id))
           ELSE EXISTS (SELECT FROM refunds r WHERE r.key = b.id::text AND r.reason <> 'charged besides') END
    FROM (SELECT) one
    LEFT JOIN ticket_keys k ON k.id = $1
    LEFT JOIN bookings b ON b.id = $2
    LEFT JOIN events e ON e.id = b.event_id";

/// Statements that are made all the time.
pub const HOT: &[(&str, &str)] = &[("ticket", LOOK)];

/// What is known of the key and the booking that a code names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Known {
    key: Option<PublicKey>,
    is_revoked: bool,
    booking: Option<Booked>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Booked {
    event: Uuid,
    event_name: String,
    seats: i32,
    status: String,
    is_refunded: bool,
}

/// Why a ticket lets nobody in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("This ticket is of version 0.1 and not signed: look its booking up, or have a signed one sent")]
    Unsigned,
    #[error("This ticket is signed with a key that is not ours")]
    UnknownKey,
    #[error("This ticket was forged, or changed after it was signed")]
    Forged,
    #[error("This ticket is signed with a key that was revoked: its buyer needs a new one")]
    KeyRevoked,
    #[error("There is no such booking any more")]
    NoBooking,
    #[error("The booking of this ticket is cancelled")]
    Cancelled,
    #[error("What was paid for this ticket was refunded")]
    Refunded,
    #[error("The booking of this ticket is not confirmed")]
    NotConfirmed,
}

impl Refusal {
    fn name(self) -> &'static str {
        match self {
            Self::Unsigned => "Unsigned",
            Self::UnknownKey => "UnknownKey",
            Self::Forged => "Forged",
            Self::KeyRevoked => "KeyRevoked",
            Self::NoBooking => "NoBooking",
            Self::Cancelled => "Cancelled",
            Self::Refunded => "Refunded",
            Self::NotConfirmed => "NotConfirmed",
        }
    }
}

/// Whether this code lets somebody in, by what is known. Of a booking it says something only to those who hold its ticket.
fn judge(code: &Code, known: &Known) -> Result<(Ticket, String), Refusal> {
    let key = known.key.as_ref().ok_or(Refusal::UnknownKey)?;
    let ticket = code.verify_with(key).map_err(|_| Refusal::Forged)?;
    if known.is_revoked {
        return Err(Refusal::KeyRevoked);
    }
    let booking = known.booking.as_ref().ok_or(Refusal::NoBooking)?;
    if booking.event != ticket.event || booking.seats < i32::from(ticket.seat) {
        return Err(Refusal::NoBooking);
    }
    match booking.status.as_str() {
        "Confirmed" if booking.is_refunded => Err(Refusal::Refunded),
        "Confirmed" => Ok((ticket, booking.event_name.clone())),
        "Cancelled" => Err(Refusal::Cancelled),
        _ => Err(Refusal::NotConfirmed),
    }
}

pub fn routes() -> Router<Arc<Bookings>> {
    Router::new().route("/api/tickets/{code}", get(look))
}

async fn look(State(bookings): State<Arc<Bookings>>, Path(code): Path<String>) -> Response {
    let code = match Code::read(&code) {
        Ok(code) => code,
        Err(CodeError::Unsigned) => return refuse(Refusal::Unsigned),
        Err(error) => return problem(StatusCode::NOT_FOUND, "NOT_A_TICKET", &error.to_string()),
    };
    if !bookings.schema.has(schema::TICKETS) {
        let message = "Tickets cannot be looked up before the database is up to date";
        return unavailable("UNAVAILABLE", message, Duration::from_secs(5));
    }
    let (key, booking) = (code.key(), code.claims().booking);
    match bookings.database.call(|connection| find(connection, key, booking)).await {
        Ok(known) => match judge(&code, &known) {
            Ok((ticket, event)) => answer(&json!({
                "valid": true, "eventId": ticket.event, "event": event, "seat": ticket.seat, "of": ticket.of,
            })),
            Err(refusal) => refuse(refusal),
        },
        Err(error) => bookings.unreadable(&error),
    }
}

fn refuse(refusal: Refusal) -> Response {
    answer(&json!({"valid": false, "reason": refusal.name(), "message": refusal.to_string()}))
}

/// The next moment it may be another one.
fn answer(document: &serde_json::Value) -> Response {
    let mut response = Json(document).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

async fn find(connection: Connection, key: KeyId, booking: Uuid) -> Result<Known, DatabaseError> {
    let look = connection.prepare_cached(LOOK).await?;
    let row = connection.query_one(&look, &[&key.to_string(), &booking]).await?;
    let key = row.try_get::<_, Option<&[u8]>>(0)?.and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
    let booking = match row.try_get::<_, Option<Uuid>>(2)? {
        None => None,
        Some(event) => Some(Booked {
            event,
            seats: row.try_get(3)?,
            status: row.try_get(4)?,
            event_name: row.try_get(5)?,
            is_refunded: row.try_get(6)?,
        }),
    };
    Ok(Known { key: key.map(PublicKey::from), is_revoked: row.try_get(1)?, booking })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tickets::SigningKey;

    fn ticket() -> Ticket {
        Ticket { booking: Uuid::from_u128(3), event: Uuid::from_u128(1), seat: 2, of: 4 }
    }

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_seed(&[seed; 32]).unwrap()
    }

    fn known() -> Known {
        let booking = Booked {
            event: Uuid::from_u128(1),
            event_name: "Opening Night".to_owned(),
            seats: 4,
            status: "Confirmed".to_owned(),
            is_refunded: false,
        };
        Known { key: Some(key(1).public_key()), is_revoked: false, booking: Some(booking) }
    }

    fn with(change: impl FnOnce(&mut Booked)) -> Known {
        let mut known = known();
        change(known.booking.as_mut().unwrap());
        known
    }

    #[rstest::rstest]
    #[case::valid(known(), None)]
    #[case::unknown_key(Known { key: None, ..known() }, Some(Refusal::UnknownKey))]
    #[case::another_key(Known { key: Some(key(2).public_key()), ..known() }, Some(Refusal::Forged))]
    #[case::revoked(Known { is_revoked: true, ..known() }, Some(Refusal::KeyRevoked))]
    #[case::deleted(Known { booking: None, ..known() }, Some(Refusal::NoBooking))]
    #[case::another_event(with(|booking| booking.event = Uuid::nil()), Some(Refusal::NoBooking))]
    #[case::fewer_seats(with(|booking| booking.seats = 1), Some(Refusal::NoBooking))]
    #[case::cancelled(with(|booking| booking.status = "Cancelled".to_owned()), Some(Refusal::Cancelled))]
    #[case::pending(with(|booking| booking.status = "PaymentPending".to_owned()), Some(Refusal::NotConfirmed))]
    #[case::refunded(with(|booking| booking.is_refunded = true), Some(Refusal::Refunded))]
    fn who_is_let_in(#[case] known: Known, #[case] refusal: Option<Refusal>) {
        let code = Code::read(&ticket().sign(&key(1))).unwrap();
        let judged = judge(&code, &known);
        assert_eq!(judged.as_ref().err().copied(), refusal);
        if let Ok(judged) = judged {
            assert_eq!(judged, (ticket(), "Opening Night".to_owned()));
        }
    }

    /// Who has no genuine ticket learns nothing of a booking.
    #[test]
    fn a_forged_ticket_asks_nothing_about_a_booking() {
        let forged = Code::read(&ticket().sign(&key(2))).unwrap();
        let known = with(|booking| booking.status = "Cancelled".to_owned());
        assert_eq!(judge(&forged, &known), Err(Refusal::Forged));
    }
}
