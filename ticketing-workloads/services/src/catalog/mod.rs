//! The catalog service: events with their free seats, as they are now or as they were a moment ago.

mod api;
mod events;

use crate::checks;
use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::schema::Schema;
use contract::{DependencySettings, FallbackSettings, PolicySettings};
use resilience::Resilience;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

/// Statements that are made all the time.
pub(crate) use events::HOT;

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "catalog";
/// What it calls.
const DATABASE: &str = "database";

/// Settings of the catalog service.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub pod: PodSettings,
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Seconds for which a page is not read again while EnableRealTimeInventory is off.
    #[arg(long, env = "INVENTORY_CACHE_SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub inventory_cache_seconds: u64,
}

/// What holds without a policy: a page that cannot be read is given as it was, up to five minutes ago.
pub(crate) fn defaults(pool_size: u16) -> PolicySettings {
    let fallback = vec![FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 0 }];
    let database = DependencySettings { fallback, ..database::defaults() };
    PolicySettings {
        dependencies: [(DATABASE.to_owned(), database)].into(),
        bulkheads: [database::bulkhead(pool_size)].into(),
        ..Default::default()
    }
}

/// Opens the ports. The database may be away.
pub fn start(settings: Settings) -> Result<Service, StartError> {
    let pod = settings.pod;
    let pool_size = settings.database.database_pool_size;
    let resilience = Resilience::builder(pod.workload(NAME)).dependency(DATABASE).defaults(defaults(pool_size)).build();
    let dependency = host::declared(&resilience, DATABASE)?;
    let connector = settings.database.connector(&pod.pod_name)?;
    let migrator = settings.database.migration_connector(&pod.pod_name)?;
    let database = Arc::new(Database::new(connector, pool_size, dependency, None)?);
    let cached_for = Duration::from_secs(settings.inventory_cache_seconds);
    let catalog = api::Catalog::new(Arc::clone(&resilience), Arc::clone(&database), dependency, cached_for);
    let schema = Schema::default();
    let migration = schema.clone().bring_up_to_date(migrator, dependency);
    let parts = Parts {
        checks: vec![database::check(&database, DATABASE), schema.check(DATABASE), checks::memory()],
        actions: database::actions(&resilience, database),
        api: api::router(catalog),
        tasks: vec![Box::pin(migration)],
        work: TaskTracker::new(),
        capacity: Some(host::CAPACITY),
        resilience,
    };
    Service::open(pod, parts)
}
