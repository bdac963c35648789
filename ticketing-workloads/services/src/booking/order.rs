//! What a client asks for: the body of `POST /api/bookings`, read with a message for whatever is wrong with it.

use crate::mail_address::MailAddress;
use serde_json::{Map, Value};
use std::borrow::Cow;
use uuid::Uuid;

/// Header that may carry the idempotency key.
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";
/// Longest user id and longest idempotency key, in bytes.
const MAX_TEXT_BYTES: usize = 128;
const FIELDS: [&str; 5] = ["eventId", "userId", "ticketCount", "idempotencyKey", "email"];

/// A booking that somebody wants to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Id of the booking if it is made. Chosen before the first attempt, so that attempts cannot book twice.
    pub booking_id: Uuid,
    pub event_id: Uuid,
    pub user_id: String,
    pub ticket_count: i32,
    /// The same key twice is the same booking. The client's, or else the booking's id.
    pub idempotency_key: String,
    /// Where the ticket is sent; nowhere if absent.
    pub email: Option<String>,
}

/// What is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// The body is not a JSON object.
    #[error("the body must be a JSON object with eventId, userId and ticketCount: {0}")]
    NotAnObject(String),
    #[error("{field} {problem}")]
    Field {
        field: String,
        /// What it must be.
        problem: Cow<'static, str>,
    },
}

impl Order {
    /// Reads a request; `header_key` is the value of [`IDEMPOTENCY_HEADER`], if there is one.
    pub fn read(body: &[u8], header_key: Option<&[u8]>) -> Result<Self, OrderError> {
        let object: Map<String, Value> =
            serde_json::from_slice(body).map_err(|error| OrderError::NotAnObject(error.to_string()))?;
        if let Some(unknown) = object.keys().find(|key| !FIELDS.contains(&key.as_str())) {
            let name: String = unknown.chars().take(40).collect();
            return Err(OrderError::Field { field: name, problem: "is not a field of a booking".into() });
        }
        let text = |name| object.get(name).and_then(Value::as_str);
        let event_id = text("eventId").and_then(|id| Uuid::parse_str(id).ok());
        let user_id = text("userId").filter(|id| is_plain_text(id));
        let ticket_count =
            object.get("ticketCount").and_then(Value::as_i64).and_then(|count| i32::try_from(count).ok());
        let booking_id = Uuid::new_v4();
        Ok(Self {
            booking_id,
            event_id: event_id.ok_or_else(|| field("eventId", "must be a UUID"))?,
            user_id: user_id
                .ok_or_else(|| field("userId", "must be a text of 1 to 128 bytes without control characters"))?
                .to_owned(),
            ticket_count: ticket_count
                .filter(|count| (1..=10).contains(count))
                .ok_or_else(|| field("ticketCount", "must be a whole number from 1 to 10"))?,
            idempotency_key: idempotency_key(object.get("idempotencyKey"), header_key)?
                .unwrap_or_else(|| booking_id.to_string()),
            email: email(object.get("email"))?,
        })
    }
}

fn field(name: &str, problem: &'static str) -> OrderError {
    OrderError::Field { field: name.to_owned(), problem: problem.into() }
}

fn is_plain_text(text: &str) -> bool {
    !text.trim().is_empty() && text.len() <= MAX_TEXT_BYTES && !text.chars().any(char::is_control)
}

/// Read as it will be when the mail is sent: no seat is sold to an address that no mail can be sent to. It is kept as given.
fn email(in_body: Option<&Value>) -> Result<Option<String>, OrderError> {
    match in_body {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let text = value.as_str().ok_or_else(|| field("email", "must be a text, such as ann@example.com"))?;
            MailAddress::parse(text)
                .map_err(|error| OrderError::Field { field: "email".to_owned(), problem: error.to_string().into() })?;
            Ok(Some(text.to_owned()))
        }
    }
}

fn idempotency_key(in_body: Option<&Value>, in_header: Option<&[u8]>) -> Result<Option<String>, OrderError> {
    let wrong = || field("idempotencyKey", "must be a text of 1 to 128 bytes without control characters");
    let in_body = match in_body {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.as_str().ok_or_else(wrong)?),
    };
    let in_header = in_header.map(std::str::from_utf8).transpose().map_err(|_| wrong())?;
    match (in_body, in_header) {
        (Some(body), Some(header)) if body != header => {
            Err(field("idempotencyKey", "differs from the header Idempotency-Key; send one of them"))
        }
        (body, header) => match body.or(header) {
            Some(key) if !is_plain_text(key) => Err(wrong()),
            key => Ok(key.map(ToOwned::to_owned)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const EVENT: &str = "11111111-1111-4111-8111-111111111111";

    fn read(body: &Value, header: Option<&str>) -> Result<Order, String> {
        Order::read(body.to_string().as_bytes(), header.map(str::as_bytes)).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_a_request_and_gives_it_a_key_of_its_own() {
        let order = read(&json!({"eventId": EVENT, "userId": "ann", "ticketCount": 2}), None).unwrap();
        assert_eq!(order.email, None);
        assert_eq!((order.user_id.as_str(), order.ticket_count), ("ann", 2));
        assert_eq!(order.idempotency_key, order.booking_id.to_string());
    }

    #[rstest::rstest]
    #[case::body(Some("k"), None, Ok("k"))]
    #[case::header(None, Some("k"), Ok("k"))]
    #[case::both_the_same(Some("k"), Some("k"), Ok("k"))]
    #[case::different(Some("k"), Some("other"), Err("idempotencyKey differs"))]
    #[case::empty(Some(""), None, Err("idempotencyKey must"))]
    fn takes_the_key_from_body_or_header(
        #[case] body: Option<&str>,
        #[case] header: Option<&str>,
        #[case] expected: Result<&str, &str>,
    ) {
        let request = json!({"eventId": EVENT, "userId": "ann", "ticketCount": 2, "idempotencyKey": body});
        match (read(&request, header), expected) {
            (Ok(order), Ok(key)) => assert_eq!(order.idempotency_key, key),
            (Err(error), Err(start)) => assert!(error.starts_with(start), "{error}"),
            (got, _) => panic!("{got:?}"),
        }
    }

    #[rstest::rstest]
    #[case(json!([1]), "the body must be a JSON object")]
    #[case(json!({}), "eventId must be a UUID")]
    #[case(json!({"eventId": "x", "userId": "a", "ticketCount": 1}), "eventId must be a UUID")]
    #[case(json!({"eventId": EVENT, "userId": "", "ticketCount": 1}), "userId must be")]
    #[case(json!({"eventId": EVENT, "userId": "a\nb", "ticketCount": 1}), "userId must be")]
    #[case(json!({"eventId": EVENT, "userId": "a".repeat(129), "ticketCount": 1}), "userId must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 0}), "ticketCount must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 11}), "ticketCount must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 1.5}), "ticketCount must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": "2"}), "ticketCount must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 4_294_967_297i64}), "ticketCount must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "tickets": 1}), "tickets is not a field")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 1, "email": "nobody"}), "email must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 1, "email": "a@b\nBcc: c@d"}), "email must not have spaces")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 1, "email": "a@b,c@d"}), "email must be")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 1, "email": "a@b"}), "email must have a domain with a dot")]
    #[case(json!({"eventId": EVENT, "userId": "a", "ticketCount": 1, "email": 7}), "email must be a text")]
    fn names_what_is_wrong(#[case] body: Value, #[case] message: &str) {
        let error = read(&body, None).unwrap_err();
        assert!(error.starts_with(message), "{error}");
    }
}
