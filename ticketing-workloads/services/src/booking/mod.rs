//! The booking service: takes bookings, never sells a seat twice, and stays useful while its database is not.

mod api;
mod asker;
mod checks;
pub mod cleanup;
mod holds;
mod limits;
pub(crate) mod order;
mod payments;
mod pending;
mod reservations;
mod seats;
mod tickets;
mod waiting_room;

use crate::answers::{not_found, problem};
use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::retention;
use crate::schema::Schema;
use axum::Router;
use axum::http::StatusCode;
use contract::{
    BulkheadSettings, DegradationSettings, DependencySettings, FallbackSettings, PolicySettings, RetrySettings,
    TimeoutSettings,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use resilience::Resilience;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Statements that are made for each order, or all the time.
pub(crate) fn hot_statements() -> impl Iterator<Item = (&'static str, &'static str)> {
    seats::HOT.iter().chain(holds::HOT).chain(tickets::HOT).copied()
}

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "booking";
/// What it calls.
const DATABASE: &str = "database";
const PAYMENT: &str = "payment";
/// Where bookings are apart from everything else (ADR-007 §3).
const CRITICAL: &str = "critical";

/// Settings of the booking service.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub pod: PodSettings,
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Address of payment. Without one, orders that have a price are refused.
    #[arg(long, env = "PAYMENT_URL")]
    pub payment_url: Option<String>,
    /// Whether orders that have a price are confirmed without a payment, where there is no PAYMENT_URL. For drills and tests, never
    /// in production.
    #[arg(long, env = "CHARGE_NOTHING", default_value_t = false, action = clap::ArgAction::Set, value_parser = clap::builder::BoolishValueParser::new())]
    pub charge_nothing: bool,
    /// Seconds after which a booking that waits for its payment is given up: payment is told to charge nothing any more, and once
    /// that is certain the booking is cancelled.
    #[arg(long, env = "PENDING_LIMIT_SECONDS", default_value_t = 86_400, value_parser = clap::value_parser!(u64).range(1..=2_592_000))]
    pub pending_limit_seconds: u64,
    /// Seconds that a buyer has to act (3-D Secure), as payment has them: for so long nothing is wrong with a booking that waits.
    #[arg(long, env = "BUYER_LIMIT_SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub buyer_limit_seconds: u64,
    /// Seconds for which a reservation keeps its seats.
    #[arg(long, env = "HOLD_SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub hold_seconds: u64,
    /// Seconds after which reservations that ran out are ended again.
    #[arg(long, env = "EXPIRE_EVERY_SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub expire_every_seconds: u64,
    /// Days after which reservations are deleted that ran out or were given back; 0: never.
    #[arg(long, env = "KEEP_CANCELLED_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(..=36_500))]
    pub keep_cancelled_days: u32,
    #[command(flatten)]
    pub limits: limits::Limits,
}

/// What holds without a policy: the ADR's numbers.
pub(crate) fn defaults() -> PolicySettings {
    let database = DependencySettings { bulkhead: Some(CRITICAL.to_owned()), ..database::defaults() };
    // Payment makes the retries that make sense towards its providers.
    let payment = DependencySettings {
        timeout: TimeoutSettings { request_ms: 20_000, per_try_ms: 20_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..Default::default() },
        fallback: vec![FallbackSettings::Queue],
        ..Default::default()
    };
    let critical = BulkheadSettings { max_concurrent: 10, max_queued: 50, max_wait_ms: 1_000 };
    let degradation = DegradationSettings {
        enter_load_percent: 80,
        enter_for_ms: 10_000,
        exit_load_percent: 60,
        exit_for_ms: 60_000,
        flag_overrides: BTreeMap::new(),
        stages: Vec::new(),
    };
    PolicySettings {
        degradation: Some(degradation),
        dependencies: [(DATABASE.to_owned(), database), (PAYMENT.to_owned(), payment)].into(),
        bulkheads: [(CRITICAL.to_owned(), critical)].into(),
        ..Default::default()
    }
}

fn router(bookings: Arc<api::Bookings>, others: Router<Arc<api::Bookings>>) -> Router {
    let other_method =
        || async { problem(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", "this path takes another method") };
    api::routes()
        .merge(reservations::routes())
        .merge(others)
        .merge(tickets::routes())
        .fallback(not_found)
        .method_not_allowed_fallback(other_method)
        .with_state(bookings)
}

/// Opens the ports. The database may be away.
pub fn start(settings: Settings) -> Result<Service, StartError> {
    let pod = settings.pod;
    let resilience =
        Resilience::builder(pod.workload(NAME)).dependency(DATABASE).dependency(PAYMENT).defaults(defaults()).build();
    let dependency = host::declared(&resilience, DATABASE)?;
    dependency.keep_slots();
    let connector = settings.database.connector(&pod.pod_name)?;
    let migrator = settings.database.migration_connector(&pod.pod_name)?;
    let pool_size = settings.database.database_pool_size;
    let database = Arc::new(Database::new(connector, pool_size, dependency, Some(seats::SAMPLE))?);
    let payment_url = settings.payment_url.filter(|url| !url.is_empty());
    let payment = host::declared(&resilience, PAYMENT)?;
    let limit = Duration::from_secs(settings.pending_limit_seconds);
    let schema = Schema::default();
    let new_payments =
        |url: String| payments::Payments::new(&url, payment, &database, schema.clone(), &resilience, limit);
    let payments = payment_url.map(new_payments);
    let charges = payments.is_some() || settings.charge_nothing;
    let buyer_limit = Duration::from_secs(settings.buyer_limit_seconds);
    let pending = pending::Pending::new(&database, &resilience, charges, buyer_limit);
    let hold = Duration::from_secs(settings.hold_seconds);
    let (payments_of, charge_nothing, limits) = (payments.clone(), settings.charge_nothing, settings.limits);
    let selling = api::Selling { payments: payments_of, charge_nothing, limits };
    let bookings = api::Bookings::new(Arc::clone(&resilience), Arc::clone(&database), schema.clone(), selling, hold);
    let expire_every = Duration::from_secs(settings.expire_every_seconds);
    let expiry = reservations::expire(Arc::clone(&database), Arc::clone(&resilience), schema.clone(), expire_every);
    let rooms = waiting_room::routes(&database, &resilience, &schema);
    let migration = schema.clone().bring_up_to_date(migrator, dependency);
    let retention = retention::run(
        Arc::clone(&database),
        Arc::clone(&resilience),
        schema.clone(),
        holds::RETENTION,
        settings.keep_cancelled_days,
    );
    let mut tasks: Vec<BoxFuture<'static, ()>> =
        vec![Box::pin(migration), Box::pin(expiry), Box::pin(retention), Box::pin(pending.measure())];
    tasks.extend(payments.map(|payments| payments.settle().boxed()));
    let parts = Parts {
        checks: checks::all(&database, &schema).into_iter().chain([pending.check()]).collect(),
        actions: database::actions(&resilience, database),
        api: router(bookings, rooms),
        tasks,
        work: TaskTracker::new(),
        // The flag MaxConcurrentBookings is it.
        capacity: None,
        resilience,
    };
    Service::open(pod, parts)
}
