//! The notification service: works off the outbox. It mails how an order stands at each of its turns: that its payment is open,
//! that it is confirmed, with a signed ticket for each seat as a PDF, or that it came to nothing, and why.
//!
//! Nothing is lost: a message stays in the outbox until the mail server has taken it, or until it is known that it can
//! never be sent; then it goes to `dead_letters` with the reason, and back by [`requeue`]. While the mail server takes
//! nothing from this service at all, sending pauses. SMTP cannot tell whether a mail was taken when the
//! connection breaks at the wrong moment, so a process that dies while it sends may send one mail twice: with the same
//! Message-ID, and counted.

mod access;
mod domains;
mod drain;
mod mail;
mod outbox;
mod refusal;
mod relay;
pub mod requeue;
mod sessions;
mod signer;
mod texts;
mod ticket;

use crate::answers::not_found;
use crate::checks;
use crate::database::{self, Database, DatabaseSettings};
use crate::host::{self, Parts, PodSettings, Service, StartError};
use crate::retention;
use crate::schema::{self, Schema};
use axum::Router;
use contract::{BulkheadSettings, DependencySettings, PolicySettings, RetryOn, RetrySettings, TimeoutSettings};
use futures::FutureExt;
use resilience::Resilience;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::task::TaskTracker;

pub use sessions::Encryption;

/// Statements that are made for each mail, or all the time.
pub(crate) fn hot_statements() -> impl Iterator<Item = (&'static str, &'static str)> {
    outbox::HOT.iter().chain(signer::HOT).copied()
}

/// Name of the service, and of its Deployment unless told otherwise.
const NAME: &str = "notification";
const DATABASE: &str = "database";
const SMTP: &str = "smtp";
/// Where background work is apart from everything else (ADR-007 §3).
const BACKGROUND: &str = "background";
/// Background work at once (ADR-007 §3).
const BACKGROUND_AT_ONCE: u16 = 5;

/// Time that mails under way get when the pod stops: an attempt, and most of what a server may take for the end of a mail. One
/// that is broken off may be sent twice.
const WORK_DRAIN: Duration = Duration::from_secs(30);

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
    /// Its password, if it is not in a file.
    #[arg(long, env = "SMTP_PASSWORD", hide_env_values = true)]
    pub smtp_password: Option<String>,
    /// File with its password, which stands above SMTP_PASSWORD. It is read again for each session, so one that is rotated needs no
    /// restart.
    #[arg(long, env = "SMTP_PASSWORD_FILE")]
    pub smtp_password_file: Option<PathBuf>,
    /// Certificates that are trusted besides the well-known authorities, in PEM.
    #[arg(long, env = "SMTP_CA_FILE")]
    pub smtp_ca_file: Option<PathBuf>,
    /// Whom the mails are from.
    #[arg(long, env = "MAIL_FROM", default_value = "TicketWave <tickets@ticketwave.example>")]
    pub mail_from: String,
    /// File of the private key that tickets are signed with (Ed25519, PKCS#8 in PEM), read again and again. Without one, mails go
    /// without tickets, which follow once there is a key.
    #[arg(long, env = "TICKET_KEY_FILE")]
    pub ticket_key_file: Option<PathBuf>,
    /// Days after which mails that were sent are deleted from the outbox; 0: never.
    #[arg(long, env = "KEEP_SENT_DAYS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(..=36_500))]
    pub keep_sent_days: u32,
    /// What this service calls itself towards the mail server (EHLO): a name with a dot, or an address in brackets
    /// [default: the pod's address in brackets]
    #[arg(long, env = "MAIL_HELO_NAME", default_value = "", hide_default_value = true)]
    pub mail_helo_name: String,
    /// Most mails on their way at once, each over a session that is kept. A policy's bulkhead `background` bounds them, too.
    #[arg(long, env = "MAIL_SESSIONS", default_value_t = BACKGROUND_AT_ONCE, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub mail_sessions: u16,
    /// Most of them to one domain, so that a slow one does not hold up the others.
    #[arg(long, env = "MAIL_SESSIONS_PER_DOMAIN", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub mail_sessions_per_domain: u16,
    /// Hours for which a mail is tried that the mail server puts off or refuses for what may pass. Then it is a dead letter,
    /// with the last reason.
    #[arg(long, env = "MAIL_GIVE_UP_HOURS", default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=8_760))]
    pub mail_give_up_hours: u32,
}

/// What holds without a policy: the ADR's numbers for background work, and room for as many `sessions` as were asked for.
pub(crate) fn defaults(pool_size: u16, sessions: u16) -> PolicySettings {
    let smtp = DependencySettings {
        // Each address of the mail server has its own time to take a connection, so that the attempt reaches the next one.
        timeout: TimeoutSettings { request_ms: 30_000, per_try_ms: 10_000, connect_ms: Some(3_000) },
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
    let at_once = u32::from(sessions.max(BACKGROUND_AT_ONCE));
    let background = BulkheadSettings { max_concurrent: at_once, max_queued: 100, max_wait_ms: 30_000 };
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
        .defaults(defaults(pool_size, settings.mail_sessions))
        .build();
    let dependency = host::declared(&resilience, DATABASE)?;
    let connector = settings.database.connector(&pod.pod_name)?;
    let migrator = settings.database.migration_connector(&pod.pod_name)?;
    let database = Arc::new(Database::new(connector, pool_size, dependency, None)?);
    let mailer = mail::Mailer::new(&mailer_settings, host::declared(&resilience, SMTP)?)?;
    let work = TaskTracker::new();
    let relay = relay::RelayWatch::new(resilience.metrics());
    let bounds = drain::Bounds {
        at_once: usize::from(settings.mail_sessions),
        per_domain: usize::from(settings.mail_sessions_per_domain),
        give_up_after: Duration::from_secs(3_600 * u64::from(settings.mail_give_up_hours)),
    };
    let check = relay.check(SMTP);
    let signer = signer::Signer::new(settings.ticket_key_file);
    let ticket_key = signer.check();
    let schema = Schema::default();
    let drain = drain::Drain::new(
        Arc::clone(&resilience),
        Arc::clone(&database),
        schema.clone(),
        signer,
        mailer,
        relay,
        bounds,
    );
    let retention = retention::run(
        Arc::clone(&database),
        Arc::clone(&resilience),
        schema.clone(),
        outbox::RETENTION,
        settings.keep_sent_days,
    );
    let (tracker, ready) = (work.clone(), schema.clone());
    let sending = async move {
        // No mail leaves whose outcome could not be written down. What comes behind that step makes it faster, and may wait
        // for as long as somebody else takes.
        ready.reaches(schema::MAIL).await;
        drain.run(tracker).await;
    };
    let migration = schema.clone().bring_up_to_date(migrator, dependency);
    let parts = Parts {
        checks: vec![database::check(&database, DATABASE), schema.check(DATABASE), checks::memory(), check, ticket_key],
        actions: database::actions(&resilience, database),
        api: Router::new().fallback(not_found),
        tasks: vec![migration.boxed(), retention.boxed(), sending.boxed()],
        work,
        capacity: Some(host::CAPACITY),
        resilience,
    };
    Ok(Service::open(pod, parts)?.with_work_drain(WORK_DRAIN))
}
