//! Buyers of a laptop's shop, as many at once as are wanted, and what became of their orders.

use crate::laptop::{Laptop, LaptopError, Port};
use reqwest::Client;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longer than any answer may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Seats of an event: nobody is to be told that there are none left.
const SEATS: i32 = 1_000_000;

/// Where seats are sold, and of what.
pub struct Market {
    gateway: String,
    client: Client,
    events: Vec<String>,
    next: AtomicUsize,
}

/// An answer to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status; 0: there was none.
    pub status: u16,
    /// How long it took.
    pub took: Duration,
}

impl Market {
    /// With as many new events, so that buyers do not stand in each other's way.
    pub async fn open(laptop: &Laptop, events: i32) -> Result<Self, LaptopError> {
        let insert = "INSERT INTO events (id, name, capacity, available, price_cents)
                      SELECT gen_random_uuid(), 'Evening ' || nth, $2, $2, 4500 FROM generate_series(1, $1::int) nth
                      RETURNING id::text";
        let rows = laptop.connect().await?.query(insert, &[&events, &SEATS]).await?;
        let events = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let client = Client::builder().no_proxy().timeout(PATIENCE).build().unwrap_or_default();
        Ok(Self { gateway: laptop.url(Port::Gateway), client, events, next: AtomicUsize::new(0) })
    }

    fn order(&self) -> Value {
        let nth = self.next.fetch_add(1, Ordering::Relaxed);
        let event = self.events.get(nth % self.events.len().max(1)).cloned().unwrap_or_default();
        json!({"eventId": event, "userId": format!("buyer-{nth}"), "ticketCount": 1, "email": "buyer@example.com"})
    }

    async fn post(&self, path: &str, body: &Value) -> (Answer, Value) {
        let begin = Instant::now();
        let answer = self.client.post(format!("{}{path}", self.gateway)).body(body.to_string()).send().await;
        let status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
        let body = match answer {
            Ok(answer) => answer.json().await.unwrap_or_default(),
            Err(_) => Value::Null,
        };
        (Answer { status, took: begin.elapsed() }, body)
    }

    /// Books one seat.
    pub async fn book(&self) -> Answer {
        self.post("/api/bookings", &self.order()).await.0
    }

    /// Reserves one seat, and buys it every second time.
    pub async fn reserve(&self) -> Answer {
        let (answer, body) = self.post("/api/reservations", &self.order()).await;
        match body["bookingId"].as_str() {
            Some(id) if self.next.load(Ordering::Relaxed).is_multiple_of(2) => {
                self.post(&format!("/api/reservations/{id}/confirm"), &json!({})).await.0
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

    /// As many buyers at once book one seat after the other for so long. Those who still wait at the end count with the
    /// time that they have waited.
    pub async fn rush(&self, buyers: usize, time: Duration) -> Vec<Answer> {
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
