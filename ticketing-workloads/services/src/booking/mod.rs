//! The booking service: takes bookings, never sells a seat twice, and stays useful while its database is not.

mod api;
mod checks;
pub mod cleanup;
mod order;
mod payments;
mod seats;

use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::schema;
use contract::{
    BulkheadSettings, DependencySettings, FallbackSettings, PolicySettings, RetrySettings, TimeoutSettings,
};
use futures::FutureExt;
use futures::future::BoxFuture;
use resilience::Resilience;
use std::sync::Arc;
use tokio_util::task::TaskTracker;

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
    /// The pod.
    #[command(flatten)]
    pub pod: PodSettings,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Address of payment; without one nothing has to be paid for.
    #[arg(long, env = "PAYMENT_URL")]
    pub payment_url: Option<String>,
}

/// What holds without a policy: the ADR's numbers.
fn defaults() -> PolicySettings {
    let database = DependencySettings { bulkhead: Some(CRITICAL.to_owned()), ..database::defaults() };
    // Payment makes the retries that make sense towards its providers.
    let payment = DependencySettings {
        timeout: TimeoutSettings { request_ms: 20_000, per_try_ms: 20_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..Default::default() },
        fallback: vec![FallbackSettings::Queue],
        ..Default::default()
    };
    let critical = BulkheadSettings { max_concurrent: 10, max_queued: 50, max_wait_ms: 1_000 };
    PolicySettings {
        dependencies: [(DATABASE.to_owned(), database), (PAYMENT.to_owned(), payment)].into(),
        bulkheads: [(CRITICAL.to_owned(), critical)].into(),
        ..Default::default()
    }
}

/// Opens the ports. The database may be away.
pub async fn start(settings: Settings) -> Result<Service, StartError> {
    let pod = settings.pod;
    let resilience =
        Resilience::builder(pod.workload(NAME)).dependency(DATABASE).dependency(PAYMENT).defaults(defaults()).build();
    let dependency = host::declared(&resilience, DATABASE)?;
    let config = settings.database.config(&pod.pod_name)?;
    let database = Arc::new(Database::new(config.clone(), settings.database.database_pool_size, dependency)?);
    let payment_url = settings.payment_url.filter(|url| !url.is_empty());
    let payment = host::declared(&resilience, PAYMENT)?;
    let payments = payment_url.map(|url| payments::Payments::new(&url, payment, &database, &resilience));
    let bookings = api::Bookings::new(Arc::clone(&resilience), Arc::clone(&database), payments.clone());
    let migration = schema::bring_up_to_date(config, dependency);
    let mut tasks: Vec<BoxFuture<'static, ()>> = vec![Box::pin(migration)];
    tasks.extend(payments.map(|payments| payments.settle().boxed()));
    let parts = Parts {
        checks: checks::all(&database).into(),
        actions: database::actions(&resilience, database),
        api: api::router(bookings),
        tasks,
        work: TaskTracker::new(),
        resilience,
    };
    Service::open(pod, parts).await
}
