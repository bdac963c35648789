//! The gateway: the public interface. It keeps its callers apart from what is behind it: each service has a bulkhead, a
//! circuit and deadlines of its own here, so that a stuck catalog never keeps anybody from booking.

mod bookings;
pub mod buyers;
mod events;
mod holding_back;
mod waiting_room;
mod webhooks;

use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::{answers, checks, http_client};
use axum::{Router, middleware};
use buyers::Buyers;
use contract::{
    BulkheadSettings, DependencySettings, FallbackSettings, PolicySettings, RetrySettings, TimeoutSettings,
};
use resilience::{Actions, Resilience, retry};
use std::sync::Arc;
use tokio_util::task::TaskTracker;

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "gateway";
const CATALOG: &str = "catalog";
const BOOKING: &str = "booking";
/// Payment, for the events of one provider and of the other: anybody can send some, and those of one must not keep out the
/// other's.
const STRIPE_EVENTS: &str = "stripe-events";
const PAYPAL_EVENTS: &str = "paypal-events";
/// What is answered when there is neither a catalog nor a memory of it (ADR-007 §2).
const NO_EVENTS: &str = r#"{"events":[],"message":"Event catalog is temporarily unavailable. Please try again later.","isFromCache":false,"isFallback":true}"#;

/// Settings of the gateway.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub pod: PodSettings,
    /// Address of the catalog.
    #[arg(long, env = "CATALOG_URL", default_value = "http://catalog:8080")]
    pub catalog_url: String,
    /// Address of booking.
    #[arg(long, env = "BOOKING_URL", default_value = "http://booking:8080")]
    pub booking_url: String,
    /// Address of payment, for the webhooks of its providers. Without one they are not passed on.
    #[arg(long, env = "PAYMENT_URL")]
    pub payment_url: Option<String>,
    /// Whether fewer orders and looks are let through while they slow those who finish a sale.
    #[arg(long, env = "HOLD_BACK", default_value = "yes", value_parser = clap::builder::BoolishValueParser::new(), action = clap::ArgAction::Set)]
    pub hold_back: bool,
    #[command(flatten)]
    pub waiting_room: waiting_room::RoomSettings,
    #[command(flatten)]
    pub buyers: buyers::BuyerSettings,
}

/// What holds without a policy: the ADR's numbers.
pub(crate) fn defaults() -> PolicySettings {
    let catalog = DependencySettings {
        retry: RetrySettings { budget: Some(retry::BUDGET), ..Default::default() },
        bulkhead: Some(CATALOG.to_owned()),
        fallback: vec![
            FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 0 },
            FallbackSettings::Static { status_code: 503, body: NO_EVENTS.to_owned() },
        ],
        ..Default::default()
    };
    // Booking makes the retries that make sense; a second series here would only multiply them.
    let booking = DependencySettings {
        timeout: TimeoutSettings { request_ms: 25_000, per_try_ms: 25_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..Default::default() },
        bulkhead: Some(BOOKING.to_owned()),
        ..Default::default()
    };
    // The provider sends an event again that is not taken.
    let events_of = |name: &str| DependencySettings {
        timeout: TimeoutSettings { request_ms: 10_000, per_try_ms: 10_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..Default::default() },
        bulkhead: Some(name.to_owned()),
        ..Default::default()
    };
    let events_room = BulkheadSettings { max_concurrent: 20, max_queued: 20, max_wait_ms: 1_000 };
    let room = BulkheadSettings { max_concurrent: 100, max_queued: 200, max_wait_ms: 1_000 };
    PolicySettings {
        dependencies: [
            (CATALOG.to_owned(), catalog),
            (BOOKING.to_owned(), booking),
            (STRIPE_EVENTS.to_owned(), events_of(STRIPE_EVENTS)),
            (PAYPAL_EVENTS.to_owned(), events_of(PAYPAL_EVENTS)),
        ]
        .into(),
        bulkheads: [(CATALOG, &room), (BOOKING, &room), (STRIPE_EVENTS, &events_room), (PAYPAL_EVENTS, &events_room)]
            .map(|(name, room)| (name.to_owned(), room.clone()))
            .into(),
        ..Default::default()
    }
}

/// Opens the ports. The services behind it may be away.
pub fn start(settings: Settings) -> Result<Service, StartError> {
    let Settings { pod, catalog_url, booking_url, payment_url, hold_back, waiting_room, buyers } = settings;
    let resilience = Resilience::builder(pod.workload(NAME))
        .dependency(CATALOG)
        .dependency(BOOKING)
        .dependency(STRIPE_EVENTS)
        .dependency(PAYPAL_EVENTS)
        .defaults(defaults())
        .waiting_room(waiting_room.has_key())
        .build();
    let events = events::router(&catalog_url, host::declared(&resilience, CATALOG)?, resilience.spare_memory());
    let booking = host::declared(&resilience, BOOKING)?;
    // Whatever a crowd looks at or orders, sales that are under way can be finished.
    booking.keep_slots();
    let traffic = Arc::new(holding_back::Traffic::default());
    let keep_limit = holding_back::keep_limit(Arc::clone(&traffic), http_client::bare(&booking_url), booking);
    let bookings = bookings::router(&booking_url, booking, traffic);
    let (room, keep_contact) = waiting_room::WaitingRoom::new(waiting_room, &booking_url, &resilience)?;
    let bookings = room.before(bookings);
    let webhooks = match payment_url.filter(|url| !url.is_empty()) {
        Some(url) => webhooks::router(&url, "stripe", host::declared(&resilience, STRIPE_EVENTS)?)
            .merge(webhooks::router(&url, "paypal", host::declared(&resilience, PAYPAL_EVENTS)?)),
        None => Router::new(),
    };
    let buyers = Buyers::parts(&buyers, resilience.metrics())?;
    let mut checks =
        vec![checks::service(CATALOG, &catalog_url), checks::service(BOOKING, &booking_url), checks::memory()];
    checks.push(room.check());
    checks.extend(buyers.checks);
    let mut tasks = buyers.tasks;
    tasks.push(keep_contact);
    if hold_back {
        tasks.push(Box::pin(keep_limit));
    }
    // Providers are no buyers: their events have bulkheads of their own.
    let for_buyers = Router::new().merge(events).merge(bookings);
    let for_buyers = for_buyers.route_layer(middleware::from_fn_with_state(buyers.buyers, buyers::identify));
    let parts = Parts {
        checks,
        actions: Actions::new(Arc::clone(resilience.metrics())),
        api: for_buyers.merge(webhooks).fallback(answers::not_found),
        tasks,
        work: TaskTracker::new(),
        capacity: Some(host::CAPACITY),
        resilience,
    };
    Service::open(pod, parts).map(Service::at_the_edge)
}
