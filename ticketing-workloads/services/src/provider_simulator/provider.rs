//! One provider: how it behaves, and what it has charged.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

/// Charges that are kept; a test needs a few thousand, ten minutes of load some hundred thousand.
const MAX_CHARGES: usize = 400_000;
/// How long an answer takes that is never to arrive.
const NEVER: Duration = Duration::from_secs(3_600);

/// How a provider behaves. Without a body it behaves well.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
#[expect(clippy::struct_excessive_bools, reason = "each is a thing to ask for on its own")]
pub struct Behaviour {
    /// The port is closed: connections are refused.
    pub refuse: bool,
    /// Time before anything else happens, in milliseconds.
    pub latency_ms: u64,
    /// Requests of a hundred that fail with `fail_status`, before anything is charged.
    pub fail_percent: u32,
    /// The status of a failure; 0: 503.
    pub fail_status: u16,
    /// What a failure has as `Retry-After`, in seconds; 0: none.
    pub fail_retry_after: u32,
    /// Charges are made, and the answer never comes.
    pub charge_then_hang: bool,
    /// Charges are made, and the answer is a failure.
    pub charge_then_fail: bool,
    /// Charges are declined.
    pub decline: bool,
    /// Charges can be made and not looked up.
    pub hide: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Charge {
    pub id: String,
    /// The key that it was asked for with.
    pub key: String,
    /// Hundredths of the currency.
    pub amount_cents: u64,
    /// Such as `eur`.
    pub currency: String,
}

/// How a request to charge ends.
pub enum Outcome {
    /// It is charged, now or by an earlier request with the same key.
    Charged(Charge),
    /// The card is not good for it.
    Declined,
    /// The key was used for something else.
    KeyReused,
    /// The provider is in trouble.
    Failed(StatusCode),
}

#[derive(Default)]
struct Books {
    behaviour: Behaviour,
    charges: BTreeMap<String, Charge>,
    requests: u64,
}

pub struct Provider {
    pub name: &'static str,
    books: Mutex<Books>,
    refuses: watch::Sender<bool>,
    shape: fn(Arc<Provider>) -> Router,
}

impl Provider {
    /// One that behaves, and speaks as `shape` does.
    pub fn new(name: &'static str, shape: fn(Arc<Self>) -> Router) -> Self {
        Self { name, books: Mutex::default(), refuses: watch::Sender::new(false), shape }
    }

    pub fn router(self: &Arc<Self>) -> Router {
        let provider = Arc::clone(self);
        let say_when = move |mut response: Response| {
            let wait = provider.books().behaviour.fail_retry_after;
            if wait > 0 && response.status().is_server_error() {
                response.headers_mut().insert(header::RETRY_AFTER, wait.into());
            }
            std::future::ready(response)
        };
        (self.shape)(Arc::clone(self)).layer(middleware::map_response(say_when))
    }

    /// Tells whether it refuses connections.
    pub fn refuses(&self) -> watch::Receiver<bool> {
        self.refuses.subscribe()
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes how it behaves.
    pub fn behave(&self, behaviour: Behaviour) {
        tracing::info!(provider = self.name, ?behaviour, "behavior changed");
        self.refuses.send_replace(behaviour.refuse);
        self.books().behaviour = behaviour;
    }

    /// How it behaves, how many requests it got, and how many charges it has made.
    pub fn state(&self) -> (Behaviour, u64, usize) {
        let books = self.books();
        (books.behaviour.clone(), books.requests, books.charges.len())
    }

    /// What it has charged.
    pub fn charges(&self) -> Vec<Charge> {
        self.books().charges.values().cloned().collect()
    }

    /// Charges, as it behaves. The same key again is the same charge.
    pub async fn charge(&self, key: &str, amount_cents: u64, currency: &str) -> Outcome {
        let behaviour = match self.arrive().await {
            Ok(behaviour) => behaviour,
            Err(status) => return Outcome::Failed(status),
        };
        let charge = {
            let mut books = self.books();
            match books.charges.get(key) {
                Some(before) if before.amount_cents == amount_cents && before.currency == currency => before.clone(),
                Some(_) => return Outcome::KeyReused,
                None if behaviour.decline => return Outcome::Declined,
                None if books.charges.len() >= MAX_CHARGES => return Outcome::Failed(StatusCode::INSUFFICIENT_STORAGE),
                None => {
                    let id = Uuid::new_v4().simple().to_string();
                    let charge = Charge { id, key: key.to_owned(), amount_cents, currency: currency.to_owned() };
                    books.charges.insert(key.to_owned(), charge.clone());
                    charge
                }
            }
        };
        if behaviour.charge_then_hang {
            tokio::time::sleep(NEVER).await;
        }
        if behaviour.charge_then_fail { Outcome::Failed(status(&behaviour)) } else { Outcome::Charged(charge) }
    }

    /// Finds the charge that was made with `key`.
    pub async fn find(&self, key: &str) -> Result<Option<Charge>, StatusCode> {
        let behaviour = self.arrive().await?;
        if behaviour.hide {
            return Err(status(&behaviour));
        }
        Ok(self.books().charges.get(key).cloned())
    }

    /// What happens to every request.
    async fn arrive(&self) -> Result<Behaviour, StatusCode> {
        let (behaviour, nth) = {
            let mut books = self.books();
            books.requests += 1;
            (books.behaviour.clone(), books.requests)
        };
        if behaviour.latency_ms > 0 {
            tokio::time::sleep(Duration::from_millis(behaviour.latency_ms)).await;
        }
        // Evenly spread, not random: a test that asks for half gets every second one.
        if nth * u64::from(behaviour.fail_percent) / 100 > (nth - 1) * u64::from(behaviour.fail_percent) / 100 {
            return Err(status(&behaviour));
        }
        Ok(behaviour)
    }
}

fn status(behaviour: &Behaviour) -> StatusCode {
    StatusCode::from_u16(behaviour.fail_status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE)
}
