//! The payment service: charges with the first provider, and with the second only when it is certain that the first has
//! not charged.
//!
//! ADR-007 §2 asks the second provider after any failure of the first. That charges twice when the first has charged and
//! its answer got lost: an idempotency key binds one provider only. So each step with a provider is written down
//! (`ledger.rs`) before it is made, and what is in doubt is made definite, now or later, before anything else happens
//! (`decision.rs`).

mod api;
mod decision;
mod encrypted;
pub(crate) mod https;
mod key;
mod ledger;
#[cfg(test)]
mod model_tests;
mod paypal;
mod process;
mod providers;
pub mod reconcile;
mod refunds;
mod repeated;
mod stripe;
mod webhooks;

use crate::checks;
use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::retention;
use crate::schema::{self, Schema};
use contract::{
    BulkheadSettings, CircuitBreakerSettings, DependencySettings, FallbackSettings, PolicySettings, RetryOn,
    RetrySettings, TimeoutSettings, TripRule,
};
use decision::PROVIDERS;
use https::{Credentials, Https};
use paypal::Paypal;
use providers::ProviderClient;
use resilience::{Resilience, retry};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use stripe::Stripe;
use tokio::sync::Mutex;
use tokio_util::task::TaskTracker;

/// Statements that are made for each payment, or all the time.
pub(crate) fn hot_statements() -> impl Iterator<Item = (&'static str, &'static str)> {
    ledger::HOT.iter().chain(refunds::HOT).chain(webhooks::HOT).copied()
}

/// Events, and refunds, of one provider that a pod works off side by side: about 60 requests a second to a provider
/// that takes 130 ms for one, of the 100 a second that Stripe allows an account.
const AT_ONCE: usize = 8;

/// The same with so many connections to the database: of those, at most half are for one provider's.
fn at_once(pool_size: u16) -> usize {
    AT_ONCE.min(usize::from(pool_size) / 2).max(1)
}

/// Name of the service, and of its Deployment unless that is set.
const NAME: &str = "payment";
const DATABASE: &str = "database";
const STRIPE: &str = "stripe";
const PAYPAL: &str = "paypal";
/// Where calls to providers are apart from everything else (ADR-007 §3).
const EXTERNAL_API: &str = "external-api";

/// Where the providers are, and what they know us by.
#[derive(Clone, Debug, clap::Args)]
pub struct Urls {
    /// Address of the provider shaped as Stripe.
    #[arg(long, env = "STRIPE_URL", default_value = "http://provider-simulator:8081")]
    pub stripe_url: String,
    /// Address of the provider shaped as PayPal.
    #[arg(long, env = "PAYPAL_URL", default_value = "http://provider-simulator:8082")]
    pub paypal_url: String,
    /// File with the API key of Stripe. Without one no key is sent, as for a simulator.
    #[arg(long, env = "STRIPE_API_KEY_FILE")]
    pub stripe_api_key_file: Option<PathBuf>,
    /// File with the client id at PayPal.
    #[arg(long, env = "PAYPAL_CLIENT_ID_FILE")]
    pub paypal_client_id_file: Option<PathBuf>,
    /// File with its secret.
    #[arg(long, env = "PAYPAL_CLIENT_SECRET_FILE")]
    pub paypal_client_secret_file: Option<PathBuf>,
    /// File with certificates, in PEM, that are trusted for https besides the well-known authorities.
    #[arg(long, env = "PROVIDER_CA_FILE")]
    pub provider_ca_file: Option<PathBuf>,
}

impl Urls {
    /// The providers, in the order in which they are asked.
    fn providers(&self, resilience: &Resilience) -> Result<[Arc<dyn ProviderClient>; PROVIDERS], StartError> {
        let ca = self.provider_ca_file.as_deref();
        let stripe_key = self.stripe_api_key_file.clone().map_or(Credentials::None, Credentials::Bearer);
        let paypal_key = match (self.paypal_client_id_file.clone(), self.paypal_client_secret_file.clone()) {
            (Some(id), Some(secret)) => Credentials::Client { id, secret, token: Mutex::default() },
            (None, None) => Credentials::None,
            _ => {
                let message = "PAYPAL_CLIENT_ID_FILE and PAYPAL_CLIENT_SECRET_FILE: set both, or none";
                return Err(StartError::Setting(message.to_owned()));
            }
        };
        let (stripe, paypal) = (host::declared(resilience, STRIPE)?, host::declared(resilience, PAYPAL)?);
        Ok([
            Arc::new(Stripe::new(Https::new(&self.stripe_url, ca, stripe_key, Some(stripe))?, stripe)),
            Arc::new(Paypal::new(Https::new(&self.paypal_url, ca, paypal_key, Some(paypal))?, paypal)),
        ])
    }
}

/// Settings of the payment service.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub pod: PodSettings,
    #[command(flatten)]
    pub database: DatabaseSettings,
    #[command(flatten)]
    pub urls: Urls,
    #[command(flatten)]
    pub webhooks: webhooks::WebhookSettings,
    /// Seconds that a buyer has to confirm a payment with the provider, as for 3-D Secure; then it is cancelled.
    #[arg(long, env = "BUYER_LIMIT_SECONDS", default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub buyer_limit_seconds: u64,
    /// Days after which payments are deleted whose outcome is known; 0: never, and at least 35 otherwise. Not fewer than the law
    /// asks for, and more than a day more than `ticketing reconcile` looks back.
    #[arg(long, env = "KEEP_PAYMENTS_DAYS", default_value_t = 0, value_parser = keep_payments_days)]
    pub keep_payments_days: u32,
}

/// Fewer days would delete charges that the search for money to give back has not gone through yet: it goes back 30 days.
const LEAST_KEPT_DAYS: u32 = 35;

fn keep_payments_days(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(days) if days == 0 || (LEAST_KEPT_DAYS..=36_500).contains(&days) => Ok(days),
        _ => Err(format!("{text:?} is not 0, for never, nor a number of days from {LEAST_KEPT_DAYS} to 36500")),
    }
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
    let Settings { pod, database, urls, webhooks, buyer_limit_seconds, keep_payments_days } = settings;
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
    let providers = urls.providers(&resilience)?;
    let key_checks = providers.each_ref().map(providers::key_check);
    let buyer_limit = Duration::from_secs(buyer_limit_seconds);
    let work = TaskTracker::new();
    let payments =
        process::Payments::new(Arc::clone(&resilience), ledger::Ledger::new(&database), providers.clone(), buyer_limit);
    let webhooks =
        webhooks::Webhooks::new(webhooks, &database, &payments, providers.clone(), at_once(pool_size), &resilience);
    let refunds = refunds::Refunds::new(&database, &payments, providers, at_once(pool_size), &resilience);
    let schema = Schema::default();
    let retention = retention::run(
        Arc::clone(&database),
        Arc::clone(&resilience),
        schema.clone(),
        ledger::RETENTION,
        keep_payments_days,
    );
    let (ready, events) = (schema.clone(), Arc::clone(&webhooks));
    let working_off = async move {
        // Without its indexes, each look would read whole tables.
        ready.reaches(schema::REFUND_INDEX).await;
        tokio::join!(refunds.run(), events.run());
    };
    let own_checks =
        [database::check(&database, DATABASE), schema.check(DATABASE), checks::memory(), refunds::check(&database)];
    let migration = schema.bring_up_to_date(migrator, dependency);
    let parts = Parts {
        checks: own_checks.into_iter().chain(key_checks).collect(),
        actions: database::actions(&resilience, database),
        api: api::router(payments, work.clone()).merge(webhooks.router()),
        tasks: vec![Box::pin(migration), Box::pin(retention), Box::pin(working_off)],
        work,
        capacity: Some(host::CAPACITY),
        resilience,
    };
    Service::open(pod, parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("0", Some(0))]
    #[case("35", Some(35))]
    #[case("36500", Some(36_500))]
    #[case("34", None)]
    #[case("36501", None)]
    #[case("-1", None)]
    #[case("", None)]
    fn payments_are_kept_for_as_long_as_something_may_need_them(#[case] text: &str, #[case] days: Option<u32>) {
        assert_eq!(keep_payments_days(text).ok(), days);
    }
}
