//! The local stack: all services and the simulators as processes of this machine, on a PostgreSQL of their own, without
//! Kubernetes and without the operator.

mod buyers;
mod child;
mod names;
mod ports;
mod postgres;

pub use buyers::Buyers;
pub use names::can_name;
pub use ports::{Port, Ports};

use crate::packages::{self, PackageError};
use crate::process::ProcessId;
use crate::progress::Progress;
use crate::token;
use child::Running;
use contract::admin::{ACTIONS_PATH, CONFIG_PATH, TOKEN_HEADER, TOKEN_KEYS};
use contract::{FlagsSettings, PolicySettings, PushAnswer, PushOutcome, RuntimeConfig, Section, WorkloadId};
use postgres::Postgres;
use reqwest::Client;
use rustix::process::Signal;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::process::Command;

/// How long everything may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a process may take to end what is under way.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);
/// The file with the key that tickets are signed with.
const TICKET_KEY: &str = "ticket-key.pem";
/// The namespace that the services believe to be in.
const NAMESPACE: &str = "default";

/// For tests and measurements in which a few addresses stand for all buyers: booking counts nobody.
pub const NO_BUYER_LIMITS: [(&str, &str); 8] = [
    ("SEATS_PER_BUYER", "0"),
    ("SEATS_PER_SESSION", "0"),
    ("SEATS_PER_NETWORK", "0"),
    ("HELD_SEATS_PER_BUYER", "0"),
    ("HOLDS_PER_BUYER", "0"),
    ("HOLDS_PER_NETWORK", "0"),
    ("DECLINES_PER_BUYER", "0"),
    ("DECLINES_PER_NETWORK", "0"),
];

/// File with the key of the waiting room, beside the token.
const WAITING_ROOM_KEY: &str = "waiting-room-key";

/// Why the local stack could not be run.
#[derive(Debug, thiserror::Error)]
pub enum LocalStackError {
    /// A port is in use by another process.
    #[error("port {port}, for {what}, is taken: choose others with FIRST_PORT, such as `make run FIRST_PORT=9000`")]
    Port {
        /// The port's number.
        port: u16,
        /// The service that needs it, in words.
        what: &'static str,
    },
    /// A process could not be started.
    #[error("cannot start {what}: {source}")]
    Start {
        /// Name of the process.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A process ended by itself.
    #[error("{what} has ended; its last output:\n{tail}")]
    Ended {
        /// Name of the process.
        what: String,
        /// The last lines of its output.
        tail: String,
    },
    /// A service did not become ready in time.
    #[error("{what} is not ready after {} s; its last output:\n{tail}", START_TIMEOUT.as_secs())]
    NotReady {
        /// Name or address of the service.
        what: String,
        /// The last lines of its output.
        tail: String,
    },
    /// A program failed that ends by itself: one of PostgreSQL's, or `ticketing ticket-key`.
    #[error("{program} failed:\n{output}")]
    Program {
        /// Name of the program.
        program: &'static str,
        /// Its standard error.
        output: String,
    },
    /// PostgreSQL's programs are not where Debian puts them.
    #[error("PostgreSQL's server programs are not below /usr/lib/postgresql, though its package is installed")]
    NoPostgres,
    /// A file could not be written.
    #[error("cannot write {path}: {source}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A service refused a configuration.
    #[error("{service} refused the configuration: {why}")]
    Push {
        /// Name of the service.
        service: &'static str,
        /// Its reason.
        why: String,
    },
    /// The simulator refused a new behaviour.
    #[error("the provider simulator: {0}")]
    Simulator(reqwest::Error),
    /// No range of free ports was found.
    #[error("there are no {} free ports in a row", ports::COUNT)]
    NoPorts,
    /// This machine gives no process names of its own; the reason.
    #[error(
        "several pods have one name here only if a process can have an /etc/hosts of its own, and `unshare --mount` with `mount --bind` \
         failed ({0}): run it as root, in a container with CAP_SYS_ADMIN, or allow user namespaces (sysctl \
         kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0)"
    )]
    NoNames(String),
    /// A service was named that is not running.
    #[error("{0} is not running")]
    NotRunning(&'static str),
    /// What was measured is less than it has to be.
    #[error("{0}")]
    TooLittle(String),
    /// A query of the database failed.
    #[error("the database: {0}")]
    Database(#[from] tokio_postgres::Error),
    /// A Debian package could not be installed.
    #[error(transparent)]
    Package(#[from] PackageError),
}

/// A service and its environment.
struct Service {
    /// What its process is called here.
    name: &'static str,
    /// Which service of the program it is.
    command: &'static str,
    environment: Vec<(&'static str, String)>,
    /// The file that names addresses for it, in place of `/etc/hosts`.
    hosts: Option<PathBuf>,
}

impl Service {
    fn change(&mut self, changes: &[(&'static str, Option<&str>)]) {
        self.environment.retain(|(name, _)| changes.iter().all(|(changed, _)| changed != name));
        let set = changes.iter().filter_map(|(name, value)| Some((*name, (*value)?.to_owned())));
        self.environment.extend(set);
    }

    fn start(&self, program: &Path, show: bool) -> Result<Running, LocalStackError> {
        let mut command =
            self.hosts.as_deref().map_or_else(|| Command::new(program), |hosts| names::naming(hosts, program));
        command.arg(self.command).stdin(Stdio::null()).env("BIND_ADDRESS", "127.0.0.1").env("POD_NAMESPACE", NAMESPACE);
        // Ctrl-C reaches a whole group of processes: these are ended in order instead.
        command.env("SHUTDOWN_DELAY_SECONDS", "0").envs(self.environment.iter().cloned()).process_group(0);
        Running::start(self.name, command, show)
    }
}

/// The running processes. They end with this value; [`LocalStack::stop`] ends them in order.
pub struct LocalStack {
    program: PathBuf,
    ports: Ports,
    services: Vec<Service>,
    /// In the order in which they were started.
    running: Vec<Running>,
    postgres: Postgres,
    token: String,
    buyers: Buyers,
    client: Client,
    directory: TempDir,
    show: bool,
}

/// A test that fails says what the services had to say.
impl Drop for LocalStack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
        }
    }
}

impl LocalStack {
    /// The `ticketing` that was built without debug information and with optimisation, as images have it.
    pub fn release_program() -> PathBuf {
        let target =
            std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::checkout::root().join("target"), PathBuf::from);
        target.join("release/ticketing")
    }

    /// Starts everything on [`ports::COUNT`] ports from `first_port` on, and waits until an order would succeed. With
    /// `show`, the output of the processes is printed, each line with the name of its service before it. `program` is
    /// the path of `ticketing`; `environment` is added to that of every service.
    pub async fn start(
        program: PathBuf,
        first_port: u16,
        environment: &[(&'static str, &str)],
        show: bool,
        progress: &Progress,
    ) -> Result<Self, LocalStackError> {
        packages::ensure(packages::POSTGRES_IMAGE, progress).await?;
        let ports = Ports::from(first_port)?;
        let start = |source| LocalStackError::Start { what: "a temporary folder".into(), source };
        let directory = tempfile::Builder::new().prefix("ticketwave-").tempdir().map_err(start)?;
        // The database runs as somebody else, and has to find its own folder in here.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(directory.path(), open).map_err(start)?;
        let token = token::random().map_err(start)?;
        let tokens = directory.path().join("token");
        std::fs::create_dir(&tokens).map_err(start)?;
        std::fs::set_permissions(&tokens, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(start)?;
        std::fs::write(tokens.join(TOKEN_KEYS[0]), &token).map_err(start)?;
        make_ticket_key(&program, &directory.path().join(TICKET_KEY)).await?;
        let buyers = Buyers::new(&tokens).map_err(start)?;
        // A policy with a waiting room needs no more.
        std::fs::write(tokens.join(WAITING_ROOM_KEY), token::random().map_err(start)?).map_err(start)?;
        let home = directory.path().join("postgres");
        let postgres = Postgres::create(&home, ports.of(Port::Postgres), show).await?;
        let client = Client::builder().pool_max_idle_per_host(0).build().unwrap_or_default();
        let (services, running) = (Vec::new(), Vec::new());
        let mut stack = Self { program, ports, services, running, postgres, token, buyers, client, directory, show };
        stack.start_services(environment)?;
        stack.until_ready().await?;
        Ok(stack)
    }

    /// Base URL of a service.
    pub fn url(&self, of: Port) -> String {
        self.ports.url(of)
    }

    /// Who makes tokens that the gateway takes.
    pub fn buyers(&self) -> &Buyers {
        &self.buyers
    }

    /// Address of the database.
    pub fn database_url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.ports.of(Port::Postgres))
    }

    fn start_services(&mut self, all: &[(&'static str, &str)]) -> Result<(), LocalStackError> {
        let port = |of| self.ports.of(of).to_string();
        let none: Vec<(&str, String)> = Vec::new();
        let with = |more: Vec<(&'static str, String)>| {
            std::iter::once(("DATABASE_URL", self.database_url())).chain(more).collect::<Vec<_>>()
        };
        let services = [
            (
                "provider-simulator",
                Port::Providers,
                None,
                vec![("STRIPE_PORT", port(Port::Stripe)), ("PAYPAL_PORT", port(Port::Paypal))],
            ),
            ("mail-sink", Port::Mails, None, vec![("SMTP_PORT", port(Port::Smtp))]),
            (
                "payment",
                Port::Payment,
                Some(Port::PaymentAdmin),
                with(vec![("STRIPE_URL", self.url(Port::Stripe)), ("PAYPAL_URL", self.url(Port::Paypal))]),
            ),
            (
                "notification",
                Port::Notification,
                Some(Port::NotificationAdmin),
                with(vec![
                    ("SMTP_HOST", "127.0.0.1".to_owned()),
                    ("SMTP_PORT", port(Port::Smtp)),
                    ("TICKET_KEY_FILE", self.directory.path().join(TICKET_KEY).display().to_string()),
                ]),
            ),
            ("booking", Port::Booking, Some(Port::BookingAdmin), with(vec![("PAYMENT_URL", self.url(Port::Payment))])),
            ("catalog", Port::Catalog, Some(Port::CatalogAdmin), with(none)),
            (
                "gateway",
                Port::Gateway,
                Some(Port::GatewayAdmin),
                [
                    ("CATALOG_URL", self.url(Port::Catalog)),
                    ("BOOKING_URL", self.url(Port::Booking)),
                    ("PAYMENT_URL", self.url(Port::Payment)),
                    (
                        "WAITING_ROOM_KEY_FILE",
                        self.directory.path().join("token").join(WAITING_ROOM_KEY).display().to_string(),
                    ),
                ]
                .into_iter()
                .chain(self.buyers.settings())
                .collect(),
            ),
        ];
        let folder = |name: &str| self.directory.path().join(name).display().to_string();
        let services = services.map(|(name, own_port, admin_port, mut environment)| {
            environment.push(("PORT", port(own_port)));
            environment.extend(all.iter().map(|(name, value)| (*name, (*value).to_owned())));
            if let Some(admin_port) = admin_port {
                environment.push(("ADMIN_PORT", port(admin_port)));
                environment.push(("RESILIENCE_TOKEN_DIR", folder("token")));
                environment.push(("RESILIENCE_CONFIG_DIR", folder("config")));
            }
            Service { name, command: name, environment, hosts: None }
        });
        for service in services {
            let running = service.start(&self.program, self.show)?;
            self.running.push(running);
            self.services.push(service);
        }
        Ok(())
    }

    /// Kills a service (SIGKILL), and waits until it is gone.
    pub async fn kill(&mut self, name: &str) {
        for running in self.running.iter_mut().filter(|running| running.name == name) {
            // It may have ended by itself.
            let _ = running.child.kill().await;
        }
        self.running.retain(|running| running.name != name);
    }

    /// The process of a service.
    pub fn process(&self, name: &'static str) -> Result<ProcessId, LocalStackError> {
        let running = self.running.iter().find(|running| running.name == name);
        running.and_then(Running::process).ok_or(LocalStackError::NotRunning(name))
    }

    /// Stops a service as a hung machine would (SIGSTOP): its connections stay open and silent.
    pub fn freeze(&self, name: &'static str) -> Result<(), LocalStackError> {
        self.process(name)?.signal(Signal::STOP);
        Ok(())
    }

    /// Lets a service go on that was frozen.
    pub fn thaw(&self, name: &'static str) -> Result<(), LocalStackError> {
        self.process(name)?.signal(Signal::CONT);
        Ok(())
    }

    /// A connection to the database.
    pub async fn connect(&self) -> Result<tokio_postgres::Client, LocalStackError> {
        let (client, connection) = tokio_postgres::connect(&self.database_url(), tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Ends the database at once, as a crash does; its data stay.
    pub async fn crash_database(&mut self) {
        self.postgres.crash().await;
    }

    /// Starts a database that has crashed, and waits until it answers.
    pub async fn start_database(&mut self) -> Result<(), LocalStackError> {
        self.postgres.start().await
    }

    /// Configures a service while it runs, as the operator does: by its admin port.
    pub async fn push(
        &self,
        service: &'static str,
        admin: Port,
        policy: PolicySettings,
        flags: FlagsSettings,
    ) -> Result<(), LocalStackError> {
        self.push_pod(service, admin, Ipv4Addr::LOCALHOST, policy, flags).await
    }

    /// The same for the process of the service at this address.
    pub async fn push_pod(
        &self,
        service: &'static str,
        admin: Port,
        address: Ipv4Addr,
        policy: PolicySettings,
        flags: FlagsSettings,
    ) -> Result<(), LocalStackError> {
        let failed = |why: String| LocalStackError::Push { service, why };
        let id = WorkloadId::deployment(NAMESPACE, service);
        let policy = Section { sources: Vec::new(), settings: policy };
        let flags = Section { sources: Vec::new(), settings: flags };
        // Changes that follow each other within a millisecond would have one revision.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let revision = jiff::Timestamp::now().as_millisecond();
        let document = RuntimeConfig::new(id, revision, policy, flags).to_bytes().map_err(|e| failed(e.to_string()))?;
        let url = format!("http://{address}:{}{CONFIG_PATH}", self.port(admin));
        let request = self.client.put(url).header(TOKEN_HEADER, &self.token).body(document);
        let answer = request.send().await.map_err(|error| failed(error.to_string()))?;
        let answer: PushAnswer = answer.json().await.map_err(|error| failed(error.to_string()))?;
        match answer.outcome {
            PushOutcome::Applied | PushOutcome::Unchanged if answer.applied.unknown_dependencies.is_empty() => Ok(()),
            outcome => Err(failed(format!("{outcome:?} {} {:?}", answer.message, answer.applied.unknown_dependencies))),
        }
    }

    /// Starts a service that was killed.
    pub fn restart(&mut self, name: &str) -> Result<(), LocalStackError> {
        for service in self.services.iter().filter(|service| service.name == name) {
            self.running.push(service.start(&self.program, self.show)?);
        }
        Ok(())
    }

    /// Starts a service that was killed, with another environment from now on. `None` takes a variable away.
    pub fn restart_with(
        &mut self,
        name: &'static str,
        changes: &[(&'static str, Option<&str>)],
    ) -> Result<(), LocalStackError> {
        let of_name = self.services.iter_mut().find(|service| service.name == name);
        of_name.ok_or(LocalStackError::NotRunning(name))?.change(changes);
        self.restart(name)
    }

    /// Has a service that was killed look up names in `hosts`, which is as `/etc/hosts`, from its next start on. Only where
    /// [`can_name`] says so.
    pub fn name_by(&mut self, name: &'static str, hosts: &Path) -> Result<(), LocalStackError> {
        let of_name = self.services.iter_mut().find(|service| service.name == name);
        of_name.ok_or(LocalStackError::NotRunning(name))?.hosts = Some(hosts.to_owned());
        Ok(())
    }

    /// Starts one more process of `service`, called `name` here, on the same ports of another address of this machine. It has
    /// the environment of the first one but for `changes`.
    pub fn start_pod(
        &mut self,
        service: &'static str,
        name: &'static str,
        address: Ipv4Addr,
        changes: &[(&'static str, Option<&str>)],
    ) -> Result<(), LocalStackError> {
        let first = self.services.iter().find(|one| one.name == service).ok_or(LocalStackError::NotRunning(service))?;
        let (environment, hosts) = (first.environment.clone(), first.hosts.clone());
        let mut pod = Service { name, command: service, environment, hosts };
        pod.change(changes);
        pod.change(&[("BIND_ADDRESS", Some(&address.to_string()))]);
        self.running.push(pod.start(&self.program, self.show)?);
        self.services.push(pod);
        Ok(())
    }

    /// The program that all services are.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Port of a service.
    pub fn port(&self, of: Port) -> u16 {
        self.ports.of(of)
    }

    /// The last lines of the output of all processes.
    pub fn tails(&self) -> String {
        self.running.iter().map(|one| format!("{}:\n{}\n", one.name, one.tail())).collect::<Vec<_>>().concat()
    }

    /// A folder of this stack, which goes with it.
    pub fn folder(&self) -> &Path {
        self.directory.path()
    }

    /// Waits until a look at the events goes through all the way to the database.
    async fn until_ready(&mut self) -> Result<(), LocalStackError> {
        let begin = Instant::now();
        let urls = [
            (None, self.url(Port::Payment) + "/readyz"),
            (None, self.url(Port::Notification) + "/readyz"),
            (Some("booking"), self.url(Port::Booking) + "/api/events"),
            (Some("catalog"), self.url(Port::Catalog) + "/api/events"),
            (Some("gateway"), self.url(Port::Gateway) + "/api/events"),
        ];
        for (name, url) in urls {
            loop {
                self.check()?;
                let answer = self.client.get(&url).timeout(Duration::from_secs(2)).send().await;
                if answer.is_ok_and(|answer| answer.status().is_success()) {
                    break;
                }
                if begin.elapsed() > START_TIMEOUT {
                    let slow = self.running.iter().find(|one| name.is_none_or(|name| one.name == name));
                    let tail = slow.map(Running::tail).unwrap_or_default();
                    return Err(LocalStackError::NotReady { what: url, tail });
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    /// Fails if a process has ended.
    fn check(&mut self) -> Result<(), LocalStackError> {
        self.postgres.check()?;
        self.running.iter_mut().try_for_each(Running::check)
    }

    /// Waits until a process ends.
    pub async fn until_one_ends(&mut self) -> LocalStackError {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Ends everything, the services before their database; nothing is left.
    pub async fn stop(mut self) {
        for process in self.running.iter().rev().filter_map(Running::process) {
            // One that is frozen could not end.
            process.signal(Signal::CONT);
            process.stop(STOP_TIMEOUT).await;
        }
        // At once, without a checkpoint: the data go with the folder.
        self.postgres.crash().await;
        self.running.clear();
    }

    /// What to try, as lines to paste.
    pub fn tour(&self) -> String {
        let ports = [Port::Gateway, Port::Booking, Port::Providers, Port::Mails, Port::BookingAdmin];
        let [gateway, booking, providers, mails, booking_admin] = ports.map(|port| self.url(port));
        let token = &self.token;
        let ticketing = self.program.display();
        let secrets = self.buyers.secrets().display();
        format!(
            r#"Look at the events, book two seats, and see the mail with the ticket:

  curl {gateway}/api/events
  curl {gateway}/api/bookings -H 'Idempotency-Key: my-first' -d '{{"eventId":"11111111-1111-4111-8111-111111111111","userId":"ann","ticketCount":2,"email":"ann@example.com"}}'
  curl {mails}/mails

The same as somebody who has logged in:

  ann=$({ticketing} token --subject ann --hmac-file {secrets})
  curl {gateway}/api/bookings -H "Authorization: Bearer $ann" -d '{{"eventId":"11111111-1111-4111-8111-111111111111","userId":"ann","ticketCount":1}}'

Take the first payment provider away, book again, and see who has charged:

  curl -X PUT {providers}/providers/stripe -d '{{"refuse":true}}'
  curl {gateway}/api/bookings -d '{{"eventId":"11111111-1111-4111-8111-111111111111","userId":"ann","ticketCount":1}}'
  curl {providers}/charges

What a service says of itself:

  curl {booking}/health
  curl {booking}/metrics

What the operator does to recover it, by hand (the same intentId again does nothing):

  curl {booking_admin}{ACTIONS_PATH} -H '{TOKEN_HEADER}: {token}' -d '{{"intentId":"mine-1","action":"ResetConnections","check":"database"}}'
"#
        )
    }
}

/// Makes the key that tickets of this run are signed with.
async fn make_ticket_key(program: &Path, file: &Path) -> Result<(), LocalStackError> {
    let made = Command::new(program).args(["ticket-key", "new"]).arg(file).stdin(Stdio::null()).output().await;
    let made = made.map_err(|source| LocalStackError::Start { what: "ticketing ticket-key".to_owned(), source })?;
    if made.status.success() {
        return Ok(());
    }
    let output = String::from_utf8_lossy(&made.stderr).into_owned();
    Err(LocalStackError::Program { program: "ticketing ticket-key", output })
}

/// Runs everything until `stop`.
pub async fn run(first_port: u16, stop: impl Future<Output = ()>, progress: &Progress) -> Result<(), LocalStackError> {
    let program = std::env::current_exe().unwrap_or_default().with_file_name("ticketing");
    let starting = LocalStack::start(program, first_port, &[], true, progress);
    let mut stop = std::pin::pin!(stop);
    let mut stack = tokio::select! {
        stack = starting => stack?,
        // Whatever has been started ends with its handle.
        () = &mut stop => return Ok(()),
    };
    eprintln!("\nEverything runs. Ctrl-C ends it.\n\n{}", stack.tour());
    let result = tokio::select! {
        error = stack.until_one_ends() => Err(error),
        () = &mut stop => Ok(()),
    };
    progress.say("stopping");
    stack.stop().await;
    progress.say("stopped, nothing is left");
    result
}
