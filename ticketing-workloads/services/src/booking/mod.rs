//! The booking service: takes bookings, never sells a seat twice, and stays useful while its database is not.

mod api;
mod checks;
pub mod cleanup;
mod order;
mod seats;

use crate::database::migrations::{self, Migration};
use crate::database::{Database, DatabaseSettings};
use crate::host::{Host, PodSettings, StartError};
use contract::{Action, WorkloadId};
use resilience::admin::Admin;
use resilience::{Actions, Checks, ConfigStore, Resilience, Tokens};
use std::net::SocketAddr;
use std::sync::Arc;

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "booking";
/// The one thing that it calls so far.
const DATABASE: &str = "database";
/// Its schema, step by step.
const MIGRATIONS: &[Migration] = &[
    Migration {
        version: 1,
        name: "events and bookings",
        sql: include_str!("../../migrations/booking/0001_events_and_bookings.sql"),
    },
    Migration { version: 2, name: "first event", sql: include_str!("../../migrations/booking/0002_first_event.sql") },
];

/// Settings of the booking service.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// The pod.
    #[command(flatten)]
    pub pod: PodSettings,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseSettings,
}

/// The service with its ports open.
pub struct Service {
    host: Host,
    bookings: Arc<api::Bookings>,
    migration: tokio::task::JoinHandle<()>,
}

impl Service {
    /// Opens the ports and starts what runs in the background. The database may be away.
    pub async fn start(settings: Settings) -> Result<Self, StartError> {
        let pod = settings.pod;
        let name = pod.workload_name.clone().filter(|name| !name.is_empty()).unwrap_or_else(|| NAME.to_owned());
        let id = WorkloadId { namespace: pod.pod_namespace.clone(), name };
        let resilience = Resilience::builder(id).dependency(DATABASE).build();
        let dependency = resilience
            .dependency(DATABASE)
            .ok_or_else(|| StartError::Setting("the dependency database is not declared".into()))?;
        let schema_user = Arc::clone(&dependency);
        let config = settings.database.config(&pod.pod_name)?;
        let database = Arc::new(Database::new(config.clone(), settings.database.database_pool_size, dependency)?);
        let bookings = api::Bookings::new(Arc::clone(&resilience), Arc::clone(&database));
        let admin = Arc::new(Admin {
            store: ConfigStore::new(Arc::clone(&resilience)),
            checks: Checks::new(Arc::clone(&resilience), checks::all(&database)),
            actions: Arc::new(actions(&resilience, database)),
            tokens: Arc::new(Tokens::default()),
            pod: pod.pod_name.clone(),
            resilience,
        });
        let host = Host::open(pod, admin).await?;
        let migration = tokio::spawn(async move {
            migrations::run_until_done(config, NAME, MIGRATIONS).await;
            // Calls that came before may have opened the circuit; what they lacked is there now.
            schema_user.end_break();
        });
        Ok(Self { host, bookings, migration })
    }

    /// Address of the port for everybody.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.host.address()
    }

    /// Address of the admin port.
    pub fn admin_address(&self) -> std::io::Result<SocketAddr> {
        self.host.admin_address()
    }

    /// Serves until `stop` is over; then ends what is under way.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Result<(), StartError> {
        self.host.run(api::router(self.bookings), stop).await;
        self.migration.abort();
        Ok(())
    }
}

/// What the operator may ask the service to do for itself.
fn actions(resilience: &Resilience, database: Arc<Database>) -> Actions {
    let resets = database.resets().clone();
    resilience.metrics().register(|registry| {
        registry.register("database_connection_resets", "Times that all pooled connections were given up", resets);
    });
    Actions::new(Arc::clone(resilience.metrics())).on(Action::ResetConnections, DATABASE, move || {
        let database = Arc::clone(&database);
        async move {
            let given_up = database.reset().map_err(|error| error.to_string())?;
            Ok(format!("{given_up} pooled connections given up; calls open new ones"))
        }
    })
}
