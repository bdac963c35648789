//! One provider: how it behaves, its objects, and what it answers again for a key.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::middleware;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use uuid::Uuid;

/// Objects that are kept; a test needs a few thousand, ten minutes of load some hundred thousand.
const MAX_OBJECTS: usize = 400_000;
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
    /// Requests of a hundred that fail with `fail_status`, before anything is done.
    pub fail_percent: u32,
    /// Whether chance decides which of them fail; otherwise they are evenly spread.
    pub fail_at_random: bool,
    /// The status of a failure; 0: 503.
    pub fail_status: u16,
    /// What a failure has as `Retry-After`, in seconds; 0: none.
    pub fail_retry_after: u32,
    /// Objects are made, and the answer never comes.
    pub create_then_hang: bool,
    /// Charges are made, and the answer never comes.
    pub charge_then_hang: bool,
    /// Charges are made, and the answer is a failure.
    pub charge_then_fail: bool,
    /// A confirmation fails with 500 without a charge, and so does each with the same key, marked as replayed.
    pub stored_failure: bool,
    /// Charges are declined.
    pub decline: bool,
    /// The buyer has to act before a charge.
    pub requires_action: bool,
    /// A charge is refused until the buyer has approved the order, which stays as it is.
    pub requires_approval: bool,
    /// Charges stay under way.
    pub processing: bool,
    /// Orders with these keys are refused as invalid, with 400.
    pub invalid_keys: Vec<String>,
    /// A charge is refused as invalid, with 400, and its object stays as it is.
    pub invalid_charges: bool,
    /// Creations and confirmations are answered by something before the provider, with this status and no JSON; 0: none is.
    pub proxy_status: u16,
    /// The key is not allowed to do what orders with these keys need: 403; `*`: any order.
    pub forbidden_keys: Vec<String>,
    /// The API key is not allowed to charge what it may create: 403.
    pub forbid_charges: bool,
    /// The API key is not taken: 401.
    pub unauthorized: bool,
    /// The API key is allowed nothing: 403.
    pub forbidden: bool,
    /// Objects cannot be read or searched for.
    pub hide: bool,
    /// Refunds stay under way.
    pub refund_pending: bool,
    /// A refund fails with 500, and so does each with the same key.
    pub refund_stored_failure: bool,
    /// How long a search does not find a new charge, in milliseconds.
    pub search_lag_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Unconfirmed,
    Processing,
    NeedsBuyer,
    Charged,
    Declined,
    Cancelled,
}

/// A payment intent, or an order.
#[derive(Clone, Debug)]
pub struct Object {
    pub id: String,
    /// The key of the order that it was made for.
    pub key: String,
    /// Hundredths of the currency.
    pub amount_cents: u64,
    /// Such as `eur`.
    pub currency: String,
    pub status: Status,
    /// Whether the buyer has approved it.
    pub approved: bool,
    /// Seconds since 1970.
    pub created: u64,
    /// Since when it is charged.
    charged: Option<Instant>,
}

/// What somebody wants.
pub struct Wanted<'a> {
    pub key: &'a str,
    pub amount_cents: u64,
    pub currency: &'a str,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Charge {
    pub id: String,
    /// The key of the order.
    pub key: String,
    /// Hundredths of the currency.
    pub amount_cents: u64,
    /// Such as `eur`.
    pub currency: String,
    /// Whether the money was given back.
    pub refunded: bool,
}

/// Money that goes back: all of a charge, or a part.
#[derive(Clone, Debug)]
pub struct Refund {
    pub id: String,
    /// Hundredths of the currency.
    pub amount_cents: u64,
    pub pending: bool,
    /// Seconds since 1970.
    pub created: u64,
}

/// How a request ends.
pub enum Outcome {
    /// How the object stands then.
    Object(Object),
    /// The card is not good for it.
    Declined,
    /// The buyer has to act; the object stands as before.
    NeedsBuyer(Object),
    /// The buyer has not approved it.
    NotApproved(Object),
    /// The object is not in a state for it.
    WrongState(Object),
    /// There is no such object.
    NotFound,
    /// The order is not valid.
    Invalid,
    /// The API key is not taken.
    Unauthorized,
    /// The API key may not do this.
    Forbidden,
    /// Something before the provider has answered.
    Proxy(StatusCode),
    /// The key was used for something else.
    KeyReused,
    /// The provider is in trouble; `replayed`: this is the stored answer of an earlier request with the key.
    Failed { status: StatusCode, replayed: bool },
}

/// What a key was used for.
#[derive(Clone)]
enum Stored {
    Object(String),
    Declined,
    NeedsBuyer(String),
    Failure,
}

#[derive(Default)]
struct Books {
    behaviour: Behaviour,
    /// In the order in which they were made.
    objects: Vec<Object>,
    by_id: HashMap<String, usize>,
    stored: HashMap<String, Stored>,
    /// Refunds by object.
    refunds: BTreeMap<String, Vec<Refund>>,
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
        let charges = books.objects.iter().filter(|object| object.status == Status::Charged).count();
        (books.behaviour.clone(), books.requests, charges)
    }

    /// What it has charged.
    pub fn charges(&self) -> Vec<Charge> {
        let books = self.books();
        let charged = books.objects.iter().filter(|object| object.status == Status::Charged);
        let charge = |object: &Object| Charge {
            id: object.id.clone(),
            key: object.key.clone(),
            amount_cents: object.amount_cents,
            currency: object.currency.clone(),
            refunded: books.refunded(&object.id, |refund| !refund.pending) == object.amount_cents,
        };
        charged.map(charge).collect()
    }

    /// Makes an object. The same key again is the same object.
    pub async fn create(&self, request: &str, wanted: &Wanted<'_>) -> Outcome {
        let behaviour = match self.arrive().await {
            Ok(behaviour) => behaviour,
            Err(outcome) => return outcome,
        };
        if behaviour.invalid_keys.iter().any(|key| key == wanted.key) {
            return Outcome::Invalid;
        }
        if behaviour.forbidden_keys.iter().any(|key| key == wanted.key || key == "*") {
            return Outcome::Forbidden;
        }
        if let Some(proxy) = proxy(&behaviour) {
            return proxy;
        }
        let outcome = self.books().create(request, wanted);
        if behaviour.create_then_hang {
            tokio::time::sleep(NEVER).await;
        }
        outcome
    }

    /// Charges an object, as it behaves. The same key again is the same answer.
    pub async fn confirm(&self, request: &str, id: &str) -> Outcome {
        let behaviour = match self.arrive().await {
            Ok(behaviour) => behaviour,
            Err(outcome) => return outcome,
        };
        if let Some(proxy) = proxy(&behaviour) {
            return proxy;
        }
        if behaviour.forbid_charges {
            return Outcome::Forbidden;
        }
        if behaviour.invalid_charges {
            return Outcome::Invalid;
        }
        let outcome = self.books().confirm(request, id);
        self.answer(&behaviour, outcome).await
    }

    /// Makes an object and charges it, as version 0.1 asks for it. The same key again is the same charge.
    pub async fn charge(&self, request: &str, wanted: &Wanted<'_>) -> Outcome {
        let behaviour = match self.arrive().await {
            Ok(behaviour) => behaviour,
            Err(outcome) => return outcome,
        };
        let outcome = {
            let mut books = self.books();
            match books.create(request, wanted) {
                Outcome::Object(object) => books.confirm(&format!("{request} at once"), &object.id),
                other => other,
            }
        };
        self.answer(&behaviour, outcome).await
    }

    async fn answer(&self, behaviour: &Behaviour, outcome: Outcome) -> Outcome {
        if behaviour.charge_then_hang {
            tokio::time::sleep(NEVER).await;
        }
        if behaviour.charge_then_fail { failed(behaviour) } else { outcome }
    }

    /// Finds an object by its id.
    pub async fn read(&self, id: &str) -> Outcome {
        match self.arrive().await {
            Ok(behaviour) if behaviour.hide => failed(&behaviour),
            Ok(_) => self.books().object(id).map_or(Outcome::NotFound, |object| Outcome::Object(object.clone())),
            Err(outcome) => outcome,
        }
    }

    /// Cancels what is not charged.
    pub async fn cancel(&self, id: &str) -> Outcome {
        if let Err(outcome) = self.arrive().await {
            return outcome;
        }
        let mut books = self.books();
        let Some(object) = books.object(id) else { return Outcome::NotFound };
        if matches!(object.status, Status::Charged | Status::Processing) {
            return Outcome::WrongState(object.clone());
        }
        object.status = Status::Cancelled;
        Outcome::Object(object.clone())
    }

    /// Gives so much of a charge back, or what is left of it; never more than that: it is refused, as `WrongState`.
    pub async fn refund(&self, request: &str, id: &str, amount_cents: Option<u64>) -> Result<Refund, Outcome> {
        let behaviour = self.arrive().await?;
        let mut books = self.books();
        match books.stored.get(request) {
            Some(Stored::Failure) => return Err(failed_again()),
            Some(Stored::Object(refund)) => {
                let known = books.refunds.values().flatten().find(|one| one.id == *refund);
                return known.cloned().ok_or(Outcome::NotFound);
            }
            Some(_) => return Err(Outcome::KeyReused),
            None => {}
        }
        if behaviour.refund_stored_failure {
            books.stored.insert(request.to_owned(), Stored::Failure);
            return Err(failed_again());
        }
        let Some(object) = books.object(id).cloned() else { return Err(Outcome::NotFound) };
        let left = object.amount_cents.saturating_sub(books.refunded(id, |_| true));
        let amount_cents = amount_cents.unwrap_or(left);
        if object.status != Status::Charged || amount_cents == 0 || amount_cents > left {
            return Err(Outcome::WrongState(object));
        }
        let (id_of_refund, pending) = (format!("re_{}", Uuid::new_v4().simple()), behaviour.refund_pending);
        let refund = Refund { id: id_of_refund.clone(), amount_cents, pending, created: now() };
        books.stored.insert(request.to_owned(), Stored::Object(id_of_refund));
        books.refunds.entry(id.to_owned()).or_default().push(refund.clone());
        Ok(refund)
    }

    /// The refunds of an object, which end once they no longer stay under way.
    pub fn refunds_of(&self, id: &str) -> Vec<Refund> {
        let mut books = self.books();
        let stays = books.behaviour.refund_pending;
        let Some(refunds) = books.refunds.get_mut(id) else { return Vec::new() };
        for refund in refunds.iter_mut() {
            refund.pending &= stays;
        }
        refunds.clone()
    }

    /// What went back in that time, with the objects; both ends count, in seconds since 1970.
    pub fn refunds_between(&self, since: u64, until: u64) -> Vec<(Object, Refund)> {
        let mut books = self.books();
        let stays = books.behaviour.refund_pending;
        let Books { objects, by_id, refunds, .. } = &mut *books;
        let mut found = Vec::new();
        for (id, all) in refunds {
            for refund in all {
                refund.pending &= stays;
                let object = by_id.get(id).and_then(|place| objects.get(*place));
                if !refund.pending && (since..=until).contains(&refund.created) {
                    found.extend(object.map(|object| (object.clone(), refund.clone())));
                }
            }
        }
        found
    }

    /// Finds the objects that were made for `key` and are in the index of the search by now.
    pub async fn search(&self, key: &str) -> Result<Vec<Object>, Outcome> {
        let behaviour = self.arrive().await?;
        if behaviour.hide {
            return Err(failed(&behaviour));
        }
        let lag = Duration::from_millis(behaviour.search_lag_ms);
        let seen = |object: &&Object| object.key == key && object.charged.is_none_or(|since| since.elapsed() >= lag);
        Ok(self.books().objects.iter().filter(seen).cloned().collect())
    }

    /// Objects since then, in seconds since 1970, in the order in which they were made.
    pub async fn list(&self, since: u64) -> Result<Vec<Object>, Outcome> {
        self.arrive().await?;
        Ok(self.books().objects.iter().filter(|object| object.created >= since).cloned().collect())
    }

    /// The buyer does what was asked for, for every object of this key.
    pub fn buyer_acts(&self, key: &str) {
        for object in self.books().objects.iter_mut().filter(|object| object.key == key) {
            object.approved = true;
            if object.status == Status::NeedsBuyer {
                // At Stripe that is the charge; at PayPal the order is approved, and captured next.
                let charges = self.name == "stripe";
                object.status = if charges { Status::Charged } else { Status::Unconfirmed };
                object.charged = charges.then(Instant::now);
            }
        }
    }

    /// What happens to every request.
    pub async fn arrive(&self) -> Result<Behaviour, Outcome> {
        let (behaviour, nth) = {
            let mut books = self.books();
            books.requests += 1;
            (books.behaviour.clone(), books.requests)
        };
        if behaviour.latency_ms > 0 {
            tokio::time::sleep(Duration::from_millis(behaviour.latency_ms)).await;
        }
        if behaviour.unauthorized {
            return Err(Outcome::Unauthorized);
        }
        if behaviour.forbidden {
            return Err(Outcome::Forbidden);
        }
        let percent = u64::from(behaviour.fail_percent);
        let fails = if behaviour.fail_at_random {
            rand::random_range(0..100) < percent
        } else {
            // A test that asks for half gets every second one.
            nth * percent / 100 > (nth - 1) * percent / 100
        };
        if fails {
            return Err(failed(&behaviour));
        }
        Ok(behaviour)
    }
}

impl Books {
    /// How much of an object such refunds give back.
    fn refunded(&self, id: &str, counts: fn(&Refund) -> bool) -> u64 {
        let refunds = self.refunds.get(id).into_iter().flatten();
        refunds.filter(|refund| counts(refund)).map(|refund| refund.amount_cents).sum()
    }

    fn object(&mut self, id: &str) -> Option<&mut Object> {
        self.objects.get_mut(*self.by_id.get(id)?)
    }

    fn create(&mut self, request: &str, wanted: &Wanted<'_>) -> Outcome {
        if let Some(stored) = self.stored.get(request).cloned() {
            let Stored::Object(id) = stored else { return Outcome::KeyReused };
            return match self.object(&id) {
                Some(one) if one.amount_cents == wanted.amount_cents && one.currency == wanted.currency => {
                    Outcome::Object(one.clone())
                }
                _ => Outcome::KeyReused,
            };
        }
        if self.objects.len() >= MAX_OBJECTS {
            return Outcome::Failed { status: StatusCode::INSUFFICIENT_STORAGE, replayed: false };
        }
        let object = Object {
            id: Uuid::new_v4().simple().to_string(),
            key: wanted.key.to_owned(),
            amount_cents: wanted.amount_cents,
            currency: wanted.currency.to_owned(),
            status: Status::Unconfirmed,
            approved: false,
            created: now(),
            charged: None,
        };
        self.stored.insert(request.to_owned(), Stored::Object(object.id.clone()));
        self.by_id.insert(object.id.clone(), self.objects.len());
        self.objects.push(object.clone());
        Outcome::Object(object)
    }

    fn confirm(&mut self, request: &str, id: &str) -> Outcome {
        if let Some(stored) = self.stored.get(request).cloned() {
            return self.again(stored);
        }
        let behaviour = self.behaviour.clone();
        let Some(object) = self.object(id) else { return Outcome::NotFound };
        if object.status != Status::Unconfirmed {
            return Outcome::WrongState(object.clone());
        }
        if behaviour.requires_approval && !object.approved {
            return Outcome::NotApproved(object.clone());
        }
        let (stored, outcome) = if behaviour.stored_failure {
            let failure = Outcome::Failed { status: StatusCode::INTERNAL_SERVER_ERROR, replayed: false };
            (Stored::Failure, failure)
        } else if behaviour.decline {
            object.status = Status::Declined;
            (Stored::Declined, Outcome::Declined)
        } else if behaviour.requires_action {
            object.status = Status::NeedsBuyer;
            (Stored::NeedsBuyer(object.id.clone()), Outcome::NeedsBuyer(object.clone()))
        } else {
            object.status = if behaviour.processing { Status::Processing } else { Status::Charged };
            object.charged = (!behaviour.processing).then(Instant::now);
            (Stored::Object(object.id.clone()), Outcome::Object(object.clone()))
        };
        self.stored.insert(request.to_owned(), stored);
        outcome
    }

    fn again(&mut self, stored: Stored) -> Outcome {
        match stored {
            Stored::Object(id) => self.object(&id).map_or(Outcome::NotFound, |object| Outcome::Object(object.clone())),
            Stored::Declined => Outcome::Declined,
            Stored::NeedsBuyer(id) => {
                self.object(&id).map_or(Outcome::NotFound, |object| Outcome::NeedsBuyer(object.clone()))
            }
            Stored::Failure => Outcome::Failed { status: StatusCode::INTERNAL_SERVER_ERROR, replayed: true },
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn proxy(behaviour: &Behaviour) -> Option<Outcome> {
    let status = (behaviour.proxy_status > 0).then(|| StatusCode::from_u16(behaviour.proxy_status).ok());
    status.flatten().map(Outcome::Proxy)
}

fn failed_again() -> Outcome {
    Outcome::Failed { status: StatusCode::INTERNAL_SERVER_ERROR, replayed: true }
}

fn failed(behaviour: &Behaviour) -> Outcome {
    let status = StatusCode::from_u16(behaviour.fail_status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    Outcome::Failed { status, replayed: false }
}
