//! A load generator for a local stack: any number of concurrent buyers, and the outcome and latency of each order.

use crate::local_stack::{Buyers, LocalStack, LocalStackError, Port};
use reqwest::Client;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// An answer that takes longer counts as none.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Seats of an event: so many that none of them sells out.
pub const SEATS: i32 = 1_000_000;

/// Sends orders for the seats of its own events to the gateway.
pub struct LoadGenerator {
    gateway: String,
    client: Client,
    buyers: Buyers,
    events: Vec<String>,
    next: AtomicUsize,
}

/// The answer to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status; 0 if there was no answer in time.
    pub status: u16,
    /// Time from the request to the end of the answer.
    pub took: Duration,
}

impl LoadGenerator {
    /// Adds `events` new events with `seats` each to the database; with more of them, fewer buyers contend for one row.
    pub async fn new(stack: &LocalStack, events: i32, seats: i32) -> Result<Self, LocalStackError> {
        let insert = "INSERT INTO events (id, name, capacity, available, price_cents)
                      SELECT gen_random_uuid(), 'Evening ' || nth, $2, $2, 4500 FROM generate_series(1, $1::int) nth
                      RETURNING id::text";
        let rows = stack.connect().await?.query(insert, &[&events, &seats]).await?;
        let events = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let client = Client::builder().no_proxy().timeout(ANSWER_TIMEOUT).build().unwrap_or_default();
        let (gateway, buyers) = (stack.url(Port::Gateway), stack.buyers().clone());
        Ok(Self { gateway, client, buyers, events, next: AtomicUsize::new(0) })
    }

    /// The next order, and the token of its buyer: each is somebody else's, as in a crowd.
    fn order(&self) -> (Value, String) {
        let nth = self.next.fetch_add(1, Ordering::Relaxed);
        let event = self.events.get(nth % self.events.len().max(1)).cloned().unwrap_or_default();
        let buyer = format!("buyer-{nth}");
        let token = self.buyers.token(&buyer);
        (json!({"eventId": event, "userId": buyer, "ticketCount": 1, "email": "buyer@example.com"}), token)
    }

    async fn post(&self, path: &str, body: &Value, token: &str) -> (Answer, Value) {
        let begin = Instant::now();
        let request = self.client.post(format!("{}{path}", self.gateway)).bearer_auth(token);
        let answer = request.body(body.to_string()).send().await;
        let status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
        let body = match answer {
            Ok(answer) => answer.json().await.unwrap_or_default(),
            Err(_) => Value::Null,
        };
        (Answer { status, took: begin.elapsed() }, body)
    }

    /// Books one seat.
    pub async fn book(&self) -> Answer {
        let (order, token) = self.order();
        self.post("/api/bookings", &order, &token).await.0
    }

    /// Reserves one seat, and buys it every second time.
    pub async fn reserve(&self) -> Answer {
        let (order, token) = self.order();
        let (answer, body) = self.post("/api/reservations", &order, &token).await;
        match body["bookingId"].as_str() {
            Some(id) if self.next.load(Ordering::Relaxed).is_multiple_of(2) => {
                self.post(&format!("/api/reservations/{id}/confirm"), &json!({}), &token).await.0
            }
            _ => answer,
        }
    }

    /// Looks at a page of events.
    pub async fn look(&self, page: usize) -> Answer {
        let begin = Instant::now();
        let url = format!("{}/api/events?page={}&pageSize=10", self.gateway, page % 20 + 1);
        let status = match self.client.get(url).send().await {
            Ok(answer) => {
                let status = answer.status().as_u16();
                if answer.bytes().await.is_ok() { status } else { 0 }
            }
            Err(_) => 0,
        };
        Answer { status, took: begin.elapsed() }
    }

    /// `buyers` concurrent buyers each book one seat after the other for `time`. An order that is still open at the end
    /// has status 0 and the time that it has taken so far.
    pub async fn run(&self, buyers: usize, time: Duration) -> Vec<Answer> {
        let end = tokio::time::Instant::now() + time;
        let one = || async {
            let mut answers = Vec::new();
            loop {
                let begin = Instant::now();
                let Ok(answer) = tokio::time::timeout_at(end, self.book()).await else {
                    answers.push(Answer { status: 0, took: begin.elapsed() });
                    return answers;
                };
                answers.push(answer);
            }
        };
        futures::future::join_all((0..buyers).map(|_| one())).await.concat()
    }
}
