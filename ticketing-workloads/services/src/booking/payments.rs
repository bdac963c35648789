//! Paying for bookings: at once, or later when payment is away or does not know.
//!
//! A booking is written down before payment is asked, with its own id as the idempotency key. So whichever process dies, and when, the
//! next one asks with the same key, and nobody pays twice.

use super::seats::{self, Due, Told};
use crate::cancel_reason::CancelReason;
use crate::database::Database;
use crate::http_client::{self, HttpCall, HttpError, HttpService, IDEMPOTENCY_KEY};
use crate::schema::{self, Schema};
use crate::side_by_side::side_by_side;
use axum::http::{HeaderValue, StatusCode};
use contract::FallbackSettings;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use resilience::{CallError, Dependency, Priority, Resilience, priority};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Currency of all prices.
const CURRENCY: &str = "eur";
/// Time between two looks for bookings to settle.
const LOOK: Duration = Duration::from_millis(500);
/// Bookings that are settled side by side, if the policy has no bulkhead for payment: as many as payment passes on to a
/// provider at once.
const AT_ONCE: usize = 20;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SettledLabel {
    outcome: &'static str,
}

/// What payment said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paid {
    Yes,
    /// It will not be paid.
    Declined,
    /// It is not paid, and nothing is under way.
    NotCharged,
    /// Whether it is paid is unknown.
    Unknown,
    /// The buyer has to confirm it with the provider first.
    NeedsBuyer,
}

/// Asks payment, now and later.
pub struct Payments {
    service: HttpService,
    dependency: &'static Dependency,
    database: Arc<Database>,
    schema: Schema,
    settled: Family<SettledLabel, Counter>,
    /// After which time a booking that waits is given up, if nothing is charged.
    limit: Duration,
}

impl Payments {
    /// Asks the payment service at `base`.
    pub fn new(
        base: &str,
        dependency: &'static Dependency,
        database: &Arc<Database>,
        schema: Schema,
        resilience: &Resilience,
        limit: Duration,
    ) -> Arc<Self> {
        let settled = Family::<SettledLabel, Counter>::default();
        resilience.metrics().register(|registry| {
            registry.register("bookings_settled", "Bookings that were settled later, by outcome", settled.clone());
        });
        let service = http_client::service(base, dependency);
        Arc::new(Self { service, dependency, database: Arc::clone(database), schema, settled, limit })
    }

    /// Whether a booking is taken although payment is away (ADR-007 §5): the policy's fallback `Queue`.
    pub fn may_wait(&self) -> bool {
        self.dependency.settings().fallback.contains(&FallbackSettings::Queue)
    }

    /// Asks payment for a booking.
    pub async fn pay(&self, booking: Uuid, amount_cents: i32) -> Paid {
        self.ask("/api/payments", booking, amount_cents).await
    }

    /// Has payment see to it that nothing is charged any more, unless it is already.
    async fn close(&self, booking: Uuid, amount_cents: i32) -> Paid {
        self.ask("/api/payments/close", booking, amount_cents).await
    }

    async fn ask(&self, path: &str, booking: Uuid, amount_cents: i32) -> Paid {
        let document = json!({"amountCents": amount_cents, "currency": CURRENCY});
        let mut call = HttpCall::post(path, &document);
        if let Ok(key) = HeaderValue::from_str(&booking.to_string()) {
            call.headers.insert(IDEMPOTENCY_KEY, key);
        }
        let paid = match http_client::ask(&self.service, call).await {
            Ok(answer) => match answer.status {
                StatusCode::OK => Paid::Yes,
                StatusCode::PAYMENT_REQUIRED => Paid::Declined,
                StatusCode::ACCEPTED if status_of(&answer.body) == "RequiresAction" => Paid::NeedsBuyer,
                StatusCode::ACCEPTED => Paid::Unknown,
                status => {
                    let body = String::from_utf8_lossy(&answer.body);
                    tracing::error!(%booking, %status, %body, "payment rejected the request as invalid");
                    Paid::Unknown
                }
            },
            Err(error) => {
                tracing::warn!(%booking, %error, "payment outcome unknown");
                unpaid(&error)
            }
        };
        tracing::debug!(%booking, ?paid, "payment answered");
        paid
    }

    /// Settles what is due, for as long as it is polled: as much of it at once as orders pay at once that do not wait, each
    /// as soon as there is room for it, so that a slow one holds no other up. It finishes sales, and goes before new ones.
    pub async fn settle(self: Arc<Self>) {
        let own = &*self;
        let claim = |most: usize| async move {
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            match own.database.call(|connection| seats::due(connection, most)).await {
                Ok(due) => due,
                Err(error) => {
                    tracing::warn!(%error, "failed to read bookings to settle");
                    tokio::time::sleep(LOOK * 3).await;
                    Vec::new()
                }
            }
        };
        let at_once =
            || own.dependency.max_concurrent().map_or(AT_ONCE, |most| usize::try_from(most).unwrap_or(AT_ONCE));
        let settling = side_by_side(at_once, LOOK, claim, |due: Due| async move { own.settle_one(&due).await });
        priority::within(Priority::Finish, settling).await;
    }

    /// A booking is paid that was cancelled: its refund is written down already.
    pub fn paid_for_nothing(&self, booking: Uuid) {
        tracing::warn!(%booking, "charged after the booking was cancelled: it is refunded");
        self.settled.get_or_create(&SettledLabel { outcome: "paid_for_nothing" }).inc();
    }

    async fn settle_one(&self, due: &Due) {
        let database = &self.database;
        let over = due.age >= self.limit;
        let paid = if over {
            self.close(due.booking, due.amount_cents).await
        } else {
            self.pay(due.booking, due.amount_cents).await
        };
        let outcome = match paid {
            Paid::Yes => {
                let now = database.call(|connection| seats::confirm(connection, due.booking)).await;
                now.map(|now| {
                    if now == "Cancelled" {
                        self.paid_for_nothing(due.booking);
                    }
                    "paid"
                })
            }
            Paid::Declined => {
                let reason = if over { CancelReason::PaymentTimedOut } else { CancelReason::Declined };
                let cancel = |connection| seats::cancel(connection, due.booking, reason.name(), due.tries, true);
                database.call(cancel).await.map(|_| if over { "given_up" } else { "declined" })
            }
            Paid::NotCharged | Paid::Unknown | Paid::NeedsBuyer => {
                let told = told(&self.schema, paid);
                database.call(|connection| seats::settle_soon(connection, due.booking, told)).await.map(|_| "open")
            }
        };
        match outcome {
            Ok(outcome) => {
                tracing::info!(booking = %due.booking, outcome, tries = due.tries, "booking settled");
                self.settled.get_or_create(&SettledLabel { outcome }).inc();
            }
            Err(error) => {
                tracing::warn!(booking = %due.booking, %error, "failed to settle a booking; it stays due");
            }
        }
    }
}

/// What the buyer is told of a payment that is open, as far as the schema has it.
pub(super) fn told(schema: &Schema, paid: Paid) -> Told {
    if paid == Paid::NeedsBuyer && schema.has(schema::CONFIRM_PAYMENT) {
        Told::ToConfirm
    } else if schema.has(schema::TICKETS) {
        Told::Open
    } else {
        Told::Nothing
    }
}

fn status_of(body: &[u8]) -> String {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    body["status"].as_str().unwrap_or_default().to_owned()
}

/// Whether it is certain that nothing was charged.
fn unpaid(error: &CallError<HttpError>) -> Paid {
    if error.never_reached() {
        return Paid::NotCharged;
    }
    match error {
        // Payment itself says so, of all that was ever asked with this key.
        CallError::Failed { source: HttpError::Status(answer), attempts, .. } => {
            match http_client::error_code(&answer.body).as_deref() {
                Some("ALL_PROVIDERS_FAILED" | "PAYMENTS_TURNED_OFF") => Paid::NotCharged,
                // It says so of this attempt alone.
                Some(http_client::TOO_MANY_CONNECTIONS) if *attempts <= 1 => Paid::NotCharged,
                _ => Paid::Unknown,
            }
        }
        _ => Paid::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderMap;
    use std::cell::{Cell, RefCell};
    use tokio::time::Instant;

    /// Runs `count` payments, each for as long as `takes` says, up to 20 at once: how long it took, and the most at once.
    async fn settled(count: u64, takes: impl Fn(u64) -> Duration) -> (Duration, usize) {
        let (due, under_way, most, left) = (RefCell::new(0..count), Cell::new(0), Cell::new(0_usize), Cell::new(count));
        let claim = async |room: usize| {
            // A look at the database.
            tokio::time::sleep(Duration::from_millis(3)).await;
            due.borrow_mut().by_ref().take(room).collect::<Vec<_>>()
        };
        let pay = async |one: u64| {
            under_way.set(under_way.get() + 1);
            most.set(most.get().max(under_way.get()));
            tokio::time::sleep(takes(one)).await;
            under_way.set(under_way.get() - 1);
            left.set(left.get() - 1);
        };
        let started = Instant::now();
        let until_done = async {
            while left.get() > 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = side_by_side(|| AT_ONCE, LOOK, claim, pay) => unreachable!(),
            () = until_done => {}
        }
        (started.elapsed(), most.get())
    }

    /// What was put off under high load is paid as fast as what is paid at once: not one after the other.
    #[tokio::test(start_paused = true)]
    async fn a_backlog_is_paid_side_by_side() {
        let (took, most) = settled(200, |_| Duration::from_secs(1)).await;
        assert_eq!(most, AT_ONCE);
        assert!(took < Duration::from_millis(10_500), "200 payments of 1 s, 20 at once: {took:?}");
    }

    /// A provider that is asked for one of them in vain holds only that one up.
    #[tokio::test(start_paused = true)]
    async fn a_slow_payment_holds_up_no_other() {
        let others = Cell::new(Duration::ZERO);
        let started = Instant::now();
        let takes = |one: u64| {
            others.set(started.elapsed());
            if one == 0 { Duration::from_secs(60) } else { Duration::from_secs(1) }
        };
        let (took, most) = settled(191, takes).await;
        assert_eq!(most, AT_ONCE);
        assert!(took < Duration::from_secs(61), "{took:?}");
        assert!(others.get() < Duration::from_millis(9_500), "190 of 1 s in 19 places: {:?}", others.get());
    }

    /// An order that payment had no connection for was Pending until it was settled, though nothing had been begun.
    #[rstest::rstest]
    #[case::no_connection(http_client::TOO_MANY_CONNECTIONS, 1, Paid::NotCharged)]
    #[case::no_connection_the_second_time(http_client::TOO_MANY_CONNECTIONS, 2, Paid::Unknown)]
    #[case::of_all_attempts("ALL_PROVIDERS_FAILED", 2, Paid::NotCharged)]
    #[case::anything_else("PAYMENT_FAILED", 1, Paid::Unknown)]
    fn what_was_not_charged(#[case] code: &str, #[case] attempts: u32, #[case] expected: Paid) {
        let answer = http_client::HttpAnswer {
            status: StatusCode::SERVICE_UNAVAILABLE,
            headers: HeaderMap::new(),
            body: json!({ "errorCode": code }).to_string().into(),
            from_ejected: false,
        };
        let source = HttpError::Status(Box::new(answer));
        assert_eq!(unpaid(&CallError::Failed { dependency: "payment".to_owned(), attempts, source }), expected);
    }
}
