//! All services and the simulators as processes of this machine, on a PostgreSQL of their own: no Kubernetes, no operator.

use crate::packages::{self, PackageError};
use crate::process::ProcessId;
use crate::progress::Progress;
use rustix::process::Signal;
use std::collections::VecDeque;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};

/// `nobody` and its group on Debian: PostgreSQL refuses to run as root.
const NOBODY: (u32, u32) = (65_534, 65_534);
/// How long everything may take to start.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a process may take to end what is under way.
const STOPPING: Duration = Duration::from_secs(15);
/// Lines of a process that are shown if it ends by itself.
const LAST_LINES: usize = 15;

/// The services could not be run.
#[derive(Debug, thiserror::Error)]
pub enum LaptopError {
    /// A port is taken.
    #[error("port {port}, for {what}, is taken: choose others with FIRST_PORT, such as `make run FIRST_PORT=9000`")]
    Port {
        /// The port.
        port: u16,
        /// What it is for.
        what: &'static str,
    },
    /// A process could not be started.
    #[error("cannot start {what}: {source}")]
    Start {
        /// Which.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// A process ended.
    #[error("{what} has ended; the last that it said:\n{tail}")]
    Ended {
        /// Which.
        what: String,
        /// Its last lines.
        tail: String,
    },
    /// It took too long.
    #[error("{what} is not ready after {} s; the last that it said:\n{tail}", PATIENCE.as_secs())]
    NotReady {
        /// Which.
        what: String,
        /// Its last lines.
        tail: String,
    },
    /// A program of PostgreSQL failed.
    #[error("{program} failed:\n{output}")]
    Program {
        /// Which.
        program: &'static str,
        /// What it said.
        output: String,
    },
    /// PostgreSQL is not there.
    #[error("PostgreSQL's server programs are not below /usr/lib/postgresql, though its package is installed")]
    NoPostgres,
    /// A file.
    #[error("cannot write {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A package is missing.
    #[error(transparent)]
    Package(#[from] PackageError),
}

/// What has a port here, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// The gateway.
    Gateway,
    /// The catalog.
    Catalog,
    /// Booking.
    Booking,
    /// Payment.
    Payment,
    /// Notification.
    Notification,
    /// The provider simulator's admin interface.
    Providers,
    /// The provider shaped as Stripe.
    Stripe,
    /// The provider shaped as PayPal.
    Paypal,
    /// The mail sink's admin interface.
    Mails,
    /// SMTP of the mail sink.
    Smtp,
    /// PostgreSQL.
    Postgres,
}

const PORTS: [(Port, &str); 11] = [
    (Port::Gateway, "the gateway"),
    (Port::Catalog, "the catalog"),
    (Port::Booking, "booking"),
    (Port::Payment, "payment"),
    (Port::Notification, "notification"),
    (Port::Providers, "the provider simulator"),
    (Port::Stripe, "the provider shaped as Stripe"),
    (Port::Paypal, "the provider shaped as PayPal"),
    (Port::Mails, "the mail sink"),
    (Port::Smtp, "SMTP"),
    (Port::Postgres, "PostgreSQL"),
];

/// A process and what it said last.
struct Running {
    name: &'static str,
    child: Child,
    last: Arc<Mutex<VecDeque<String>>>,
}

impl Running {
    fn tail(&self) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    fn check(&mut self) -> Result<(), LaptopError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(LaptopError::Ended { what: self.name.to_owned(), tail: self.tail() }),
        }
    }
}

/// A service and its environment.
struct Service {
    name: &'static str,
    environment: Vec<(&'static str, String)>,
}

impl Service {
    fn start(&self, program: &Path, show: bool) -> Result<Running, LaptopError> {
        let mut command = Command::new(program);
        command.arg(self.name).stdin(Stdio::null()).env("BIND_ADDRESS", "127.0.0.1").env("ADMIN_PORT", "0");
        // Ctrl-C reaches a whole group of processes: these are ended in order instead.
        command.env("SHUTDOWN_DELAY_SECONDS", "0").envs(self.environment.iter().cloned()).process_group(0);
        spawn(self.name, command, show)
    }
}

/// Everything, running.
pub struct Laptop {
    program: PathBuf,
    first_port: u16,
    services: Vec<Service>,
    /// In the order in which they were started.
    running: Vec<Running>,
    postgres: Option<Running>,
    directory: TempDir,
    show: bool,
}

impl Laptop {
    /// Starts everything on eleven ports from `first_port` on, and waits until it works. With `show`, what the processes
    /// say is printed, each line with its service before it.
    /// `program` is `ticketing`.
    pub async fn start(
        program: PathBuf,
        first_port: u16,
        show: bool,
        progress: &Progress,
    ) -> Result<Self, LaptopError> {
        packages::ensure(packages::POSTGRES_IMAGE, progress).await?;
        for (nth, (_, what)) in (0..).zip(PORTS) {
            let port = first_port.saturating_add(nth);
            TcpListener::bind(("127.0.0.1", port)).map_err(|_| LaptopError::Port { port, what })?;
        }
        let start = |what: &str| {
            let what = what.to_owned();
            move |source| LaptopError::Start { what, source }
        };
        let directory =
            tempfile::Builder::new().prefix("ticketwave-").tempdir().map_err(start("a temporary folder"))?;
        let (services, running) = (Vec::new(), Vec::new());
        let mut laptop = Self { program, first_port, services, running, postgres: None, directory, show };
        laptop.start_postgres().await?;
        laptop.start_services()?;
        laptop.until_ready().await?;
        Ok(laptop)
    }

    fn port(&self, of: Port) -> u16 {
        let nth = (0..).zip(PORTS).find_map(|(nth, (port, _))| (port == of).then_some(nth));
        self.first_port.saturating_add(nth.unwrap_or(0))
    }

    /// Where something is.
    pub fn url(&self, of: Port) -> String {
        format!("http://127.0.0.1:{}", self.port(of))
    }

    /// Address of the database.
    pub fn database_url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port(Port::Postgres))
    }

    async fn start_postgres(&mut self) -> Result<(), LaptopError> {
        let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let mut found: Vec<_> = installed.map(|entry| entry.path().join("bin")).collect();
        found.retain(|programs| programs.join("initdb").exists() && programs.join("postgres").exists());
        found.sort();
        let programs = found.pop().ok_or(LaptopError::NoPostgres)?;
        let home = self.directory.path();
        let file = |source| LaptopError::File { path: home.to_owned(), source };
        std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o700)).map_err(file)?;
        if is_root() {
            chown(home, Some(NOBODY.0), Some(NOBODY.1)).map_err(file)?;
        }
        let data = home.join("data");
        let start = |source| LaptopError::Start { what: "PostgreSQL".into(), source };
        let made = unprivileged(&programs.join("initdb"), home)
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"])
            .arg(&data)
            .output()
            .await
            .map_err(start)?;
        if !made.status.success() {
            let output = String::from_utf8_lossy(&made.stderr).into_owned();
            return Err(LaptopError::Program { program: "initdb", output });
        }
        let mut command = unprivileged(&programs.join("postgres"), home);
        command.arg("-D").arg(&data).arg("-k").arg(home).args(["-p", &self.port(Port::Postgres).to_string()]);
        command.args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "log_min_messages=fatal"]);
        let mut server = spawn("postgres", command, self.show)?;
        let begin = Instant::now();
        let address = ["-h", "127.0.0.1", "-p", &self.port(Port::Postgres).to_string()].map(String::from);
        // The services would come up without it, and say so at length.
        while !Command::new(programs.join("pg_isready"))
            .arg("-q")
            .args(&address)
            .status()
            .await
            .is_ok_and(|s| s.success())
        {
            server.check()?;
            if begin.elapsed() > PATIENCE {
                return Err(LaptopError::NotReady { what: "PostgreSQL".into(), tail: server.tail() });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.postgres = Some(server);
        Ok(())
    }

    fn start_services(&mut self) -> Result<(), LaptopError> {
        let port = |of| self.port(of).to_string();
        let none: Vec<(&str, String)> = Vec::new();
        let with = |more: Vec<(&'static str, String)>| {
            std::iter::once(("DATABASE_URL", self.database_url())).chain(more).collect::<Vec<_>>()
        };
        let services = [
            (
                "provider-simulator",
                Port::Providers,
                vec![("STRIPE_PORT", port(Port::Stripe)), ("PAYPAL_PORT", port(Port::Paypal))],
            ),
            ("mail-sink", Port::Mails, vec![("SMTP_PORT", port(Port::Smtp))]),
            (
                "payment",
                Port::Payment,
                with(vec![("STRIPE_URL", self.url(Port::Stripe)), ("PAYPAL_URL", self.url(Port::Paypal))]),
            ),
            (
                "notification",
                Port::Notification,
                with(vec![("SMTP_HOST", "127.0.0.1".to_owned()), ("SMTP_PORT", port(Port::Smtp))]),
            ),
            ("booking", Port::Booking, with(vec![("PAYMENT_URL", self.url(Port::Payment))])),
            ("catalog", Port::Catalog, with(none)),
            (
                "gateway",
                Port::Gateway,
                vec![("CATALOG_URL", self.url(Port::Catalog)), ("BOOKING_URL", self.url(Port::Booking))],
            ),
        ];
        let services = services.map(|(name, own_port, mut environment)| {
            environment.push(("PORT", port(own_port)));
            Service { name, environment }
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

    /// Starts a service that was killed.
    pub fn restart(&mut self, name: &str) -> Result<(), LaptopError> {
        for service in self.services.iter().filter(|service| service.name == name) {
            self.running.push(service.start(&self.program, self.show)?);
        }
        Ok(())
    }

    /// Waits until a look at the events goes through all the way to the database.
    async fn until_ready(&mut self) -> Result<(), LaptopError> {
        let client = reqwest::Client::new();
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
                let answer = client.get(&url).timeout(Duration::from_secs(2)).send().await;
                if answer.is_ok_and(|answer| answer.status().is_success()) {
                    break;
                }
                if begin.elapsed() > PATIENCE {
                    let slow = self.running.iter().find(|one| name.is_none_or(|name| one.name == name));
                    let tail = slow.map(Running::tail).unwrap_or_default();
                    return Err(LaptopError::NotReady { what: url, tail });
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    /// Fails if a process has ended.
    fn check(&mut self) -> Result<(), LaptopError> {
        self.postgres.iter_mut().chain(&mut self.running).try_for_each(Running::check)
    }

    /// Waits until a process ends.
    pub async fn until_one_ends(&mut self) -> LaptopError {
        loop {
            if let Err(error) = self.check() {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Ends everything, the services before their database; nothing is left.
    pub async fn stop(mut self) {
        for running in self.running.iter().rev() {
            if let Some(process) = running.child.id().and_then(ProcessId::of) {
                process.stop(STOPPING).await;
            }
        }
        if let Some(process) = self.postgres.as_ref().and_then(|running| running.child.id()).and_then(ProcessId::of) {
            // At once, without a checkpoint: the data go with the folder.
            process.signal(Signal::QUIT);
            process.stop(STOPPING).await;
        }
        self.running.clear();
    }

    /// What to try, as lines to paste.
    pub fn tour(&self) -> String {
        let [gateway, booking, providers, mails] =
            [Port::Gateway, Port::Booking, Port::Providers, Port::Mails].map(|port| self.url(port));
        format!(
            r#"Look at the events, book two seats, and see the mail with the ticket:

  curl {gateway}/api/events
  curl {gateway}/api/bookings -H 'Idempotency-Key: my-first' -d '{{"eventId":"11111111-1111-4111-8111-111111111111","userId":"ann","ticketCount":2,"email":"ann@example.com"}}'
  curl {mails}/mails

Take the first payment provider away, book again, and see who has charged:

  curl -X PUT {providers}/providers/stripe -d '{{"refuse":true}}'
  curl {gateway}/api/bookings -d '{{"eventId":"11111111-1111-4111-8111-111111111111","userId":"ann","ticketCount":1}}'
  curl {providers}/charges

What a service says of itself:

  curl {booking}/health
  curl {booking}/metrics
"#
        )
    }
}

/// Runs everything until `stop`.
pub async fn run(first_port: u16, stop: impl Future<Output = ()>, progress: &Progress) -> Result<(), LaptopError> {
    let program = std::env::current_exe().unwrap_or_default().with_file_name("ticketing");
    let starting = Laptop::start(program, first_port, true, progress);
    let mut stop = std::pin::pin!(stop);
    let mut laptop = tokio::select! {
        laptop = starting => laptop?,
        // Whatever has been started ends with its handle.
        () = &mut stop => return Ok(()),
    };
    eprintln!("\nEverything runs. Ctrl-C ends it.\n\n{}", laptop.tour());
    let result = tokio::select! {
        error = laptop.until_one_ends() => Err(error),
        () = &mut stop => Ok(()),
    };
    progress.say("stopping");
    laptop.stop().await;
    progress.say("stopped, nothing is left");
    result
}

/// A command that runs as `nobody` if we are root.
fn unprivileged(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(directory).stdin(Stdio::null()).process_group(0);
    if is_root() {
        command.uid(NOBODY.0).gid(NOBODY.1);
    }
    command
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}

fn spawn(name: &'static str, mut command: Command, show: bool) -> Result<Running, LaptopError> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let start = |source| LaptopError::Start { what: name.to_owned(), source };
    let mut child = command.spawn().map_err(start)?;
    let last = Arc::new(Mutex::new(VecDeque::new()));
    if let Some(output) = child.stdout.take() {
        tokio::spawn(pass_on(name, output, Arc::clone(&last), show));
    }
    if let Some(output) = child.stderr.take() {
        tokio::spawn(pass_on(name, output, Arc::clone(&last), show));
    }
    Ok(Running { name, child, last })
}

/// Prints each line with the name of its process before it.
async fn pass_on(name: &str, output: impl AsyncRead + Unpin, last: Arc<Mutex<VecDeque<String>>>, show: bool) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if show {
            println!("{name:<18} | {line}");
        }
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() >= LAST_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
}
