//! The payment service: charges with the first provider, and with the second only when it is certain that the first has
//! not charged.
//!
//! ADR-007 §2 asks the second provider after any failure of the first. That charges twice when the first has charged and
//! its answer got lost: an idempotency key binds one provider only. So what became of each provider is written down
//! (`ledger.rs`) before it is asked, and an unknown outcome is looked up, now or later, before anything else happens.

mod api;
mod ledger;
mod process;
mod providers;

use crate::checks;
use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::retention;
use crate::schema::Schema;
use contract::{
    BulkheadSettings, CircuitBreakerSettings, DependencySettings, FallbackSettings, PolicySettings, RetryOn,
    RetrySettings, TimeoutSettings, TripRule,
};
use providers::{Paypal, ProviderClient, Stripe};
use resilience::{Resilience, retry};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Statements that are made for each payment, or all the time.
pub(crate) use ledger::HOT;

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "payment";
const DATABASE: &str = "database";
const STRIPE: &str = "stripe";
const PAYPAL: &str = "paypal";
/// Where calls to providers are apart from everything else (ADR-007 §3).
const EXTERNAL_API: &str = "external-api";

/// Settings of the payment service.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub pod: PodSettings,
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Address of the provider shaped as Stripe.
    #[arg(long, env = "STRIPE_URL", default_value = "http://provider-simulator:8081")]
    pub stripe_url: String,
    /// Address of the provider shaped as PayPal.
    #[arg(long, env = "PAYPAL_URL", default_value = "http://provider-simulator:8082")]
    pub paypal_url: String,
    /// Seconds after which a request that had no good answer can no longer arrive at a provider, and what has arrived can be
    /// found there: from then on, a charge that is not found was never made.
    #[arg(long, env = "ABSENT_AFTER_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    pub absent_after_seconds: u64,
    /// Days after which payments are deleted whose outcome is known; 0: never. Not fewer than providers remember keys and
    /// the law asks for.
    #[arg(long, env = "KEEP_PAYMENTS_DAYS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=36_500))]
    pub keep_payments_days: u32,
}

/// What holds without a policy: the ADR's numbers.
pub(crate) fn defaults(pool_size: u16) -> PolicySettings {
    let external = Some(EXTERNAL_API.to_owned());
    let stripe = DependencySettings {
        timeout: TimeoutSettings { request_ms: 12_000, per_try_ms: 3_000, connect_ms: None },
        retry: RetrySettings {
            num_retries: 2,
            base_interval_ms: 1_000,
            factor: 1.0,
            retry_on: [RetryOn::ServerError].into(),
            budget: Some(retry::BUDGET),
            ..Default::default()
        },
        circuit_breaker: CircuitBreakerSettings {
            trip: TripRule::ConsecutiveFailures { failures: 3 },
            break_ms: 120_000,
            ..Default::default()
        },
        bulkhead: external.clone(),
        fallback: vec![FallbackSettings::Provider { provider: PAYPAL.to_owned() }],
    };
    let paypal = DependencySettings {
        timeout: TimeoutSettings { request_ms: 6_000, per_try_ms: 6_000, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..Default::default() },
        circuit_breaker: CircuitBreakerSettings {
            trip: TripRule::FailureRatio { percent: 50, minimum_throughput: 10, sampling_ms: 30_000 },
            ..Default::default()
        },
        bulkhead: external,
        ..Default::default()
    };
    let room = BulkheadSettings { max_concurrent: 20, max_queued: 100, max_wait_ms: 30_000 };
    PolicySettings {
        dependencies: [
            (DATABASE.to_owned(), database::defaults()),
            (STRIPE.to_owned(), stripe),
            (PAYPAL.to_owned(), paypal),
        ]
        .into(),
        bulkheads: [(EXTERNAL_API.to_owned(), room), database::bulkhead(pool_size)].into(),
        ..Default::default()
    }
}

/// Opens the ports. Database and providers may be away.
pub fn start(settings: Settings) -> Result<Service, StartError> {
    let Settings { pod, database, stripe_url, paypal_url, absent_after_seconds, keep_payments_days } = settings;
    let pool_size = database.database_pool_size;
    let resilience = Resilience::builder(pod.workload(NAME))
        .dependency(DATABASE)
        .dependency(STRIPE)
        .dependency(PAYPAL)
        .defaults(defaults(pool_size))
        .build();
    let dependency = host::declared(&resilience, DATABASE)?;
    let connector = database.connector(&pod.pod_name)?;
    let migrator = database.migration_connector(&pod.pod_name)?;
    let database = Arc::new(Database::new(connector, pool_size, dependency, None)?);
    let providers: [Arc<dyn ProviderClient>; 2] = [
        Arc::new(Stripe::new(&stripe_url, host::declared(&resilience, STRIPE)?)),
        Arc::new(Paypal::new(&paypal_url, host::declared(&resilience, PAYPAL)?)),
    ];
    let absent_after = Duration::from_secs(absent_after_seconds);
    let work = TaskTracker::new();
    let payments =
        process::Payments::new(Arc::clone(&resilience), ledger::Ledger::new(&database), providers, absent_after);
    let schema = Schema::default();
    let retention = retention::run(
        Arc::clone(&database),
        Arc::clone(&resilience),
        schema.clone(),
        ledger::RETENTION,
        keep_payments_days,
    );
    let migration = schema.clone().bring_up_to_date(migrator, dependency);
    let parts = Parts {
        checks: vec![database::check(&database, DATABASE), schema.check(DATABASE), checks::memory()],
        actions: database::actions(&resilience, database),
        api: api::router(payments, work.clone()),
        tasks: vec![Box::pin(migration), Box::pin(retention)],
        work,
        capacity: Some(host::CAPACITY),
        resilience,
    };
    Service::open(pod, parts)
}
