//! The notification service: works off the outbox. It mails a confirmation with the ticket as a PDF.
//!
//! Nothing is lost: a message stays in the outbox until the mail server has taken it, or until it is known that it can
//! never be sent; then it goes to `dead_letters` with the reason. SMTP cannot tell whether a mail was taken when the
//! connection breaks at the wrong moment, so a process that dies while it sends may send one mail twice: with the same
//! Message-ID, and counted.

mod drain;
mod mail;
mod outbox;
mod ticket;

use crate::answers::not_found;
use crate::checks;
use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::retention;
use crate::schema::Schema;
use axum::Router;
use contract::{BulkheadSettings, DependencySettings, PolicySettings, RetryOn, RetrySettings, TimeoutSettings};
use futures::FutureExt;
use resilience::Resilience;
use std::sync::Arc;
use tokio_util::task::TaskTracker;

pub use mail::Encryption;

/// Statements that are made for each mail, or all the time.
pub(crate) use outbox::HOT;

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "notification";
const DATABASE: &str = "database";
const SMTP: &str = "smtp";
/// Where background work is apart from everything else (ADR-007 §3).
const BACKGROUND: &str = "background";

/// Settings of the notification service.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    #[command(flatten)]
    pub pod: PodSettings,
    #[command(flatten)]
    pub database: DatabaseSettings,
    /// Host of the mail server.
    #[arg(long, env = "SMTP_HOST", default_value = "mail-sink")]
    pub smtp_host: String,
    /// Port of the mail server.
    #[arg(long, env = "SMTP_PORT", default_value_t = 1025)]
    pub smtp_port: u16,
    /// How the way to the mail server is encrypted.
    #[arg(long, env = "SMTP_ENCRYPTION", value_enum, default_value_t)]
    pub smtp_encryption: Encryption,
    /// User to log in as; nobody logs in without one.
    #[arg(long, env = "SMTP_USER")]
    pub smtp_user: Option<String>,
    /// Its password.
    #[arg(long, env = "SMTP_PASSWORD", hide_env_values = true)]
    pub smtp_password: Option<String>,
    /// Whom the mails are from.
    #[arg(long, env = "MAIL_FROM", default_value = "TicketWave <tickets@ticketwave.example>")]
    pub mail_from: String,
    /// Days after which mails that were sent are deleted from the outbox; 0: never.
    #[arg(long, env = "KEEP_SENT_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(..=36_500))]
    pub keep_sent_days: u32,
}

/// What holds without a policy: the ADR's numbers for background work.
pub(crate) fn defaults(pool_size: u16) -> PolicySettings {
    let smtp = DependencySettings {
        timeout: TimeoutSettings { request_ms: 30_000, per_try_ms: 10_000, connect_ms: None },
        // Only what never reached the server: anything else the outbox tries again, and counts.
        retry: RetrySettings {
            num_retries: 1,
            base_interval_ms: 1_000,
            retry_on: [RetryOn::ConnectFailure].into(),
            ..Default::default()
        },
        bulkhead: Some(BACKGROUND.to_owned()),
        ..Default::default()
    };
    let background = BulkheadSettings { max_concurrent: 5, max_queued: 100, max_wait_ms: 30_000 };
    PolicySettings {
        dependencies: [(DATABASE.to_owned(), database::defaults()), (SMTP.to_owned(), smtp)].into(),
        bulkheads: [(BACKGROUND.to_owned(), background), database::bulkhead(pool_size)].into(),
        ..Default::default()
    }
}

/// Opens the ports. Database and mail server may be away.
pub fn start(settings: Settings) -> Result<Service, StartError> {
    let mailer_settings = settings.clone();
    let pod = settings.pod;
    let pool_size = settings.database.database_pool_size;
    let resilience = Resilience::builder(pod.workload(NAME))
        .dependency(DATABASE)
        .dependency(SMTP)
        .defaults(defaults(pool_size))
        .build();
    let dependency = host::declared(&resilience, DATABASE)?;
    let connector = settings.database.connector(&pod.pod_name)?;
    let migrator = settings.database.migration_connector(&pod.pod_name)?;
    let database = Arc::new(Database::new(connector, pool_size, dependency, None)?);
    let mailer = mail::Mailer::new(&mailer_settings, host::declared(&resilience, SMTP)?)?;
    let work = TaskTracker::new();
    let keep_days = mailer_settings.keep_sent_days;
    let drain = drain::Drain::new(Arc::clone(&resilience), Arc::clone(&database), mailer);
    let schema = Schema::default();
    let retention =
        retention::run(Arc::clone(&database), Arc::clone(&resilience), schema.clone(), outbox::RETENTION, keep_days);
    let migration = schema.clone().bring_up_to_date(migrator, dependency);
    let parts = Parts {
        checks: vec![database::check(&database, DATABASE), schema.check(DATABASE), checks::memory()],
        actions: database::actions(&resilience, database),
        api: Router::new().fallback(not_found),
        tasks: vec![migration.boxed(), retention.boxed(), drain.run(work.clone()).boxed()],
        work,
        capacity: Some(host::CAPACITY),
        resilience,
    };
    Service::open(pod, parts)
}
