//! A load generator for a local stack: any number of concurrent buyers, and the outcome and latency of each order.

use crate::local_stack::{LocalStack, LocalStackError, Port};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// An answer that takes longer counts as none.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Seats of an event: so many that none of them sells out.
pub const SEATS: i32 = 1_000_000;

/// Who a buyer says to be.
#[derive(Clone, Debug, Default)]
pub struct Buyer {
    /// Sent as `Authorization: Bearer`. Without one the gateway takes the buyer for somebody unknown.
    pub bearer: Option<String>,
}

/// Names the buyer with this number.
pub type Identify = Arc<dyn Fn(usize) -> Buyer + Send + Sync>;

/// Sends orders for the seats of its own events to the gateway.
pub struct LoadGenerator {
    gateway: String,
    client: Client,
    events: Vec<String>,
    next: AtomicUsize,
    identify: Identify,
}

/// A seat that is kept for a buyer.
#[derive(Clone, Debug)]
pub struct Reservation {
    /// Its id.
    pub id: String,
    /// Number of the buyer.
    buyer: usize,
}

/// The answer to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status; 0 if there was no answer in time.
    pub status: u16,
    /// Time from the request to the end of the answer.
    pub took: Duration,
}

fn client() -> Client {
    Client::builder().no_proxy().timeout(ANSWER_TIMEOUT).build().unwrap_or_default()
}

impl LoadGenerator {
    /// Adds `events` new events with `seats` each to the database; with more of them, fewer buyers contend for one row.
    pub async fn new(stack: &LocalStack, events: i32, seats: i32) -> Result<Self, LocalStackError> {
        let insert = "INSERT INTO events (id, name, capacity, available, price_cents)
                      SELECT gen_random_uuid(), 'Evening ' || nth, $2, $2, 4500 FROM generate_series(1, $1::int) nth
                      RETURNING id::text";
        let rows = stack.connect().await?.query(insert, &[&events, &seats]).await?;
        let events = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        let client = client();
        // Each is somebody else, as in a crowd.
        let buyers = stack.buyers().clone();
        let identify: Identify = Arc::new(move |nth| Buyer { bearer: Some(buyers.token(&format!("buyer-{nth}"))) });
        Ok(Self { gateway: stack.url(Port::Gateway), client, events, next: AtomicUsize::new(0), identify })
    }

    /// The same with buyers who say who they are. Each order is another buyer's.
    #[must_use]
    pub fn with_buyers(self, identify: Identify) -> Self {
        Self { identify, ..self }
    }

    /// The same with connections of its own, for another runtime.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self {
            gateway: self.gateway.clone(),
            client: client(),
            events: self.events.clone(),
            next: AtomicUsize::new(0),
            identify: Arc::clone(&self.identify),
        }
    }

    /// The next buyer, and what they want.
    fn order(&self) -> (usize, Value) {
        let nth = self.next.fetch_add(1, Ordering::Relaxed);
        let event = self.events.get(nth % self.events.len().max(1)).cloned().unwrap_or_default();
        let order =
            json!({"eventId": event, "userId": format!("buyer-{nth}"), "ticketCount": 1, "email": "buyer@example.com"});
        (nth, order)
    }

    async fn post(&self, buyer: usize, path: &str, body: &Value) -> (Answer, Value) {
        self.send(buyer, self.client.post(format!("{}{path}", self.gateway)).body(body.to_string())).await
    }

    async fn send(&self, buyer: usize, request: RequestBuilder) -> (Answer, Value) {
        let request = match (self.identify)(buyer).bearer {
            Some(token) => request.bearer_auth(token),
            None => request,
        };
        let begin = Instant::now();
        let answer = request.send().await;
        let status = answer.as_ref().map_or(0, |answer| answer.status().as_u16());
        let body = match answer {
            Ok(answer) => answer.json().await.unwrap_or_default(),
            Err(_) => Value::Null,
        };
        (Answer { status, took: begin.elapsed() }, body)
    }

    /// Books one seat.
    pub async fn book(&self) -> Answer {
        let (buyer, order) = self.order();
        self.post(buyer, "/api/bookings", &order).await.0
    }

    /// Reserves one seat, and buys it every second time.
    pub async fn reserve(&self) -> Answer {
        match self.keep_a_seat().await {
            (_, Some(reservation)) if self.next.load(Ordering::Relaxed).is_multiple_of(2) => {
                self.confirm(&reservation).await
            }
            (answer, _) => answer,
        }
    }

    /// Reserves one seat.
    pub async fn keep_a_seat(&self) -> (Answer, Option<Reservation>) {
        let (buyer, order) = self.order();
        let (answer, body) = self.post(buyer, "/api/reservations", &order).await;
        (answer, body["bookingId"].as_str().map(|id| Reservation { id: id.to_owned(), buyer }))
    }

    /// Buys a seat that is kept.
    pub async fn confirm(&self, reservation: &Reservation) -> Answer {
        let path = format!("/api/reservations/{}/confirm", reservation.id);
        self.post(reservation.buyer, &path, &json!({})).await.0
    }

    /// Asks how a reservation or booking stands.
    pub async fn ask_about(&self, reservation: &Reservation) -> Answer {
        let url = format!("{}/api/bookings/{}", self.gateway, reservation.id);
        self.send(reservation.buyer, self.client.get(url)).await.0
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
