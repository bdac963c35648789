//! A pod of the booking service inside the test's process, with everything mounted that a pod has.

use super::eventually;
use super::mails::Mails;
use super::postgres::Postgres;
use super::providers::Providers;
use clap::Parser;
use contract::admin::{ACTIONS_PATH, CONFIG_PATH, REPORT_PATH, TOKEN_HEADER};
use contract::{
    ActionAnswer, CheckReport, DependencySettings, FlagsSettings, HealthCheckSettings, HealthReport, PolicySettings,
    PushAnswer, RetryOn, RuntimeConfig, Section, WorkloadId,
};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use ticketing_services::booking::{self, Settings};
use ticketing_services::gateway::buyers::local_token;
use ticketing_services::host::Service;
use ticketing_services::{catalog, gateway, notification, payment, tickets};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// The event that the first migration brings.
pub const OPENING_NIGHT: &str = "11111111-1111-4111-8111-111111111111";
const TOKEN: &str = "0123456789abcdef";

#[derive(Parser)]
struct Cli<S: clap::Args> {
    #[command(flatten)]
    settings: S,
}

/// Signs the token of the buyer before a gateway.
pub const SECRET: &str = "a secret of 32 bytes, or even more";

/// What gateways of these tests take for a login.
pub fn token_of(buyer: &str) -> String {
    let now = Duration::from_millis(u64::try_from(now_ms()).unwrap());
    local_token::signed(buyer, SECRET.as_bytes(), now, Duration::from_secs(3_600)).unwrap()
}

/// What the buyer before a gateway asks with: it is always the same one.
fn of_one_buyer() -> Client {
    let headers = [(reqwest::header::AUTHORIZATION, format!("Bearer {}", token_of("ann")).parse().unwrap())];
    Client::builder().pool_max_idle_per_host(0).default_headers(headers.into_iter().collect()).build().unwrap()
}

/// What a pod has mounted; empty.
fn mounts() -> TempDir {
    let mounts = tempfile::tempdir().unwrap();
    for name in ["token", "config"] {
        std::fs::create_dir(mounts.path().join(name)).unwrap();
    }
    mounts
}

/// The settings of a service in a pod, with these besides.
fn settings<S: clap::Args>(mounts: &TempDir, pod: &str, more: &[(&'static str, String)]) -> S {
    let directory = |name: &str| mounts.path().join(name).display().to_string();
    let pod = [
        ("--bind-address", "127.0.0.1".to_owned()),
        ("--port", "0".to_owned()),
        ("--admin-port", "0".to_owned()),
        ("--pod-name", pod.to_owned()),
        ("--pod-namespace", "ticketing".to_owned()),
        ("--resilience-config-dir", directory("config")),
        ("--resilience-token-dir", directory("token")),
        ("--shutdown-delay-seconds", "0".to_owned()),
        // All buyers of a test come from one.
        ("--connections-per-peer", "1024".to_owned()),
    ];
    let is_other = |(name, _): &(&str, String)| more.iter().all(|(other, _)| other != name);
    let all = pod.into_iter().filter(is_other).chain(more.iter().cloned());
    let arguments = all.flat_map(|(name, value)| [name.to_owned(), value]);
    Cli::parse_from(std::iter::once("service".to_owned()).chain(arguments)).settings
}

fn with_url(url: &str, more: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
    let more = more.iter().map(|(name, value)| (*name, (*value).to_owned()));
    std::iter::once(("--database-url", url.to_owned())).chain(more).collect()
}

/// Orders are confirmed without a payment.
fn charge_nothing() -> (&'static str, String) {
    ("--charge-nothing", "yes".to_owned())
}

/// A running pod.
pub struct App {
    workload: &'static str,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    pub client: Client,
    pub mounts: TempDir,
    /// Ends the pod when sent to or dropped.
    pub stop: Option<oneshot::Sender<()>>,
    pub run: JoinHandle<()>,
    revision: AtomicI64,
}

impl App {
    /// A pod with a token and a migrated database.
    pub async fn start(postgres: &Postgres, pod: &str) -> Self {
        let app = Self::start_bare(postgres, pod).until_it_has_events().await;
        postgres.has_its_schema().await;
        app
    }

    /// A pod with nothing mounted, whatever the state of its database.
    pub fn start_bare(postgres: &Postgres, pod: &str) -> Self {
        let mounts = mounts();
        let settings: Settings = settings(&mounts, pod, &[("--database-url", postgres.url()), charge_nothing()]);
        Self::run("booking", booking::start(settings).unwrap(), mounts)
    }

    /// A pod with these settings, a token and a migrated database.
    pub async fn booking_with(postgres: &Postgres, more: &[(&'static str, &str)]) -> Self {
        let app = Self::booking_at(&postgres.url(), more).await;
        postgres.has_its_schema().await;
        app
    }

    /// The same at this address of the database.
    pub async fn booking_at(url: &str, more: &[(&'static str, &str)]) -> Self {
        let mounts = mounts();
        let mut all = vec![("--database-url", url.to_owned())];
        if more.iter().all(|(name, _)| *name != "--charge-nothing") {
            all.push(charge_nothing());
        }
        all.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        let settings: Settings = settings(&mounts, "booking-1", &all);
        let app = Self::run("booking", booking::start(settings).unwrap(), mounts);
        app.until_it_has_events().await
    }

    /// A pod of booking with a token, at this address of a database that has no schema.
    pub async fn booking_before_its_schema(url: &str) -> Self {
        let mounts = mounts();
        let more = [("--database-url", url.to_owned()), charge_nothing()];
        let settings: Settings = settings(&mounts, "booking-1", &more);
        let app = Self::run("booking", booking::start(settings).unwrap(), mounts);
        app.mount_token().await;
        app
    }

    /// A catalog at this address of the database, with these settings besides.
    pub async fn catalog_over(url: &str, more: &[(&'static str, &str)]) -> Self {
        let mounts = mounts();
        let settings = settings(&mounts, "catalog-1", &with_url(url, more));
        let app = Self::run("catalog", catalog::start(settings).unwrap(), mounts);
        app.until_it_has_events().await
    }

    /// A payment service at this address of the database, with these settings besides.
    pub async fn payment_over(
        url: &str,
        more: &[(&'static str, &str)],
        postgres: &Postgres,
        providers: &Providers,
    ) -> Self {
        let mounts = mounts();
        let mut all = with_url(url, more);
        for (name, address) in [("--stripe-url", providers.stripe), ("--paypal-url", providers.paypal)] {
            if more.iter().all(|(other, _)| *other != name) {
                all.push((name, format!("http://{address}")));
            }
        }
        let settings = settings(&mounts, "payment-1", &all);
        let app = Self::run("payment", payment::start(settings).unwrap(), mounts);
        app.mount_token().await;
        postgres.has_its_schema().await;
        app
    }

    /// A catalog with a token and a migrated database.
    pub async fn catalog(postgres: &Postgres) -> Self {
        let mounts = mounts();
        let settings = settings(&mounts, "catalog-1", &[("--database-url", postgres.url())]);
        let app = Self::run("catalog", catalog::start(settings).unwrap(), mounts).until_it_has_events().await;
        postgres.has_its_schema().await;
        app
    }

    /// A gateway before these, with a token.
    pub async fn gateway(catalog: SocketAddr, booking: SocketAddr) -> Self {
        let mounts = mounts();
        let secrets = mounts.path().join("secrets");
        std::fs::write(&secrets, SECRET).unwrap();
        let unlimited = ["--requests-per-user", "--requests-per-network", "--event-requests-per-network"];
        let mut more = vec![
            ("--catalog-url", format!("http://{catalog}")),
            ("--booking-url", format!("http://{booking}")),
            ("--token-hmac-file", secrets.display().to_string()),
        ];
        more.extend(unlimited.map(|name| (name, "0".to_owned())));
        let settings = settings(&mounts, "gateway-1", &more);
        let mut app = Self::run("gateway", gateway::start(settings).unwrap(), mounts);
        app.client = of_one_buyer();
        app.mount_token().await;
        app
    }

    /// A gateway before this booking, with these settings besides. Its client is one buyer, who may ask as often as he likes.
    pub async fn gateway_with(booking: SocketAddr, more: &[(&'static str, &str)]) -> Self {
        let mounts = mounts();
        let secrets = mounts.path().join("secrets");
        std::fs::write(&secrets, SECRET).unwrap();
        let (booking, secrets) = (format!("http://{booking}"), secrets.display().to_string());
        let own = [
            ("--catalog-url", booking.as_str()),
            ("--booking-url", &booking),
            ("--token-hmac-file", &secrets),
            ("--requests-per-user", "0"),
            ("--requests-per-network", "0"),
        ];
        let is_other = |(name, _): &&(&str, &str)| more.iter().all(|(other, _)| other != name);
        let all: Vec<_> =
            own.iter().filter(is_other).chain(more).map(|(name, value)| (*name, (*value).to_owned())).collect();
        let settings = settings(&mounts, "gateway-1", &all);
        let mut app = Self::run("gateway", gateway::start(settings).unwrap(), mounts);
        app.client = of_one_buyer();
        app.mount_token().await;
        app
    }

    /// The same with payment for the webhooks of its providers.
    pub async fn gateway_to_payment(nobody: SocketAddr, payment: SocketAddr) -> Self {
        let mounts = mounts();
        let urls = [
            ("--catalog-url", format!("http://{nobody}")),
            ("--booking-url", format!("http://{nobody}")),
            ("--payment-url", format!("http://{payment}")),
        ];
        let settings = settings(&mounts, "gateway-1", &urls);
        let app = Self::run("gateway", gateway::start(settings).unwrap(), mounts);
        app.mount_token().await;
        app
    }

    /// A pod of booking that asks payment at this address.
    pub async fn paid_booking(postgres: &Postgres, payment: SocketAddr) -> Self {
        let app = Self::paid_booking_before_its_schema(postgres, payment).await;
        postgres.has_its_schema().await;
        app
    }

    /// The same as soon as it has events.
    pub async fn paid_booking_before_its_schema(postgres: &Postgres, payment: SocketAddr) -> Self {
        let mounts = mounts();
        let more = [("--database-url", postgres.url()), ("--payment-url", format!("http://{payment}"))];
        let settings: Settings = settings(&mounts, "booking-1", &more);
        Self::run("booking", booking::start(settings).unwrap(), mounts).until_it_has_events().await
    }

    /// A payment service before these providers, with a token and a migrated database.
    pub async fn payment(postgres: &Postgres, providers: &Providers) -> Self {
        Self::payment_at(0, postgres, providers).await
    }

    /// The same on this port.
    pub async fn payment_at(port: u16, postgres: &Postgres, providers: &Providers) -> Self {
        let app = Self::payment_before_its_schema(port, postgres, providers).await;
        postgres.has_its_schema().await;
        app
    }

    /// The same, whatever the state of its database.
    pub async fn payment_before_its_schema(port: u16, postgres: &Postgres, providers: &Providers) -> Self {
        let mounts = mounts();
        let more = [
            ("--port", port.to_string()),
            ("--database-url", postgres.url()),
            ("--stripe-url", format!("http://{}", providers.stripe)),
            ("--paypal-url", format!("http://{}", providers.paypal)),
            ("--buyer-limit-seconds", "2".to_owned()),
            ("--stripe-webhook-secret-file", mounts.path().join("stripe-webhooks").display().to_string()),
            ("--paypal-webhook-id", "our-webhook".to_owned()),
        ];
        let settings = settings(&mounts, "payment-1", &more);
        let app = Self::run("payment", payment::start(settings).unwrap(), mounts);
        app.mount_token().await;
        app
    }

    /// The notification service before this mail server, with a token and a migrated database.
    pub async fn notification(postgres: &Postgres, mails: &Mails) -> Self {
        let app = Self::notification_before_its_schema(postgres, mails).await;
        postgres.has_its_schema().await;
        app
    }

    /// The same, whatever the state of its database.
    pub async fn notification_before_its_schema(postgres: &Postgres, mails: &Mails) -> Self {
        Self::notification_with(postgres, mails, &[]).await
    }

    /// The same with these settings besides.
    pub async fn notification_with(postgres: &Postgres, mails: &Mails, more: &[(&'static str, &str)]) -> Self {
        let mounts = mounts();
        std::fs::write(mounts.path().join("ticket-key"), tickets::generate().unwrap()).unwrap();
        let own = [
            ("--ticket-key-file", mounts.path().join("ticket-key").display().to_string()),
            ("--database-url", postgres.url()),
            ("--smtp-host", mails.smtp.ip().to_string()),
            ("--smtp-port", mails.smtp.port().to_string()),
        ];
        let more = more.iter().map(|(name, value)| (*name, (*value).to_owned()));
        let all: Vec<_> = own.into_iter().chain(more).collect();
        let settings = settings(&mounts, "notification-1", &all);
        let app = Self::run("notification", notification::start(settings).unwrap(), mounts);
        app.mount_token().await;
        app
    }

    fn run(workload: &'static str, service: Service, mounts: TempDir) -> Self {
        let (address, admin) = (service.address().unwrap(), service.admin_address().unwrap());
        let (stop, stopped) = oneshot::channel();
        let run = tokio::spawn(service.run(async { drop(stopped.await) }));
        let client = Client::builder().pool_max_idle_per_host(0).build().unwrap();
        Self { workload, address, admin, client, mounts, stop: Some(stop), run, revision: AtomicI64::new(now_ms()) }
    }

    /// With a token and a schema.
    async fn until_it_has_events(self) -> Self {
        self.mount_token().await;
        eventually("the schema is there", async || {
            let events = self.get("/api/events").await;
            events.status().is_success().then_some(())
        })
        .await;
        self
    }

    async fn mount_token(&self) {
        self.mount("token/current", TOKEN);
        eventually("the token is mounted", async || self.admin_health().await).await;
    }

    /// Waits until the last step of the schema is done.
    pub async fn schema_is_done(&self) {
        self.push(quick_policy(), FlagsSettings::default()).await;
        self.check("schema", "all steps are done", |check| check.status == contract::CheckStatus::Healthy).await;
    }

    /// Ends the pod, and waits until it is gone.
    pub async fn end(self) {
        drop(self.stop);
        self.run.await.unwrap();
    }

    pub fn mount(&self, file: &str, content: &str) {
        std::fs::write(self.mounts.path().join(file), content).unwrap();
    }

    pub async fn get(&self, path: &str) -> Response {
        self.client.get(format!("http://{}{path}", self.address)).send().await.unwrap()
    }

    pub async fn post(&self, body: &Value) -> Response {
        self.post_to("/api/bookings", body).await
    }

    pub async fn post_to(&self, path: &str, body: &Value) -> Response {
        self.try_to_post(path, body).await.unwrap()
    }

    /// The same, where an answer need not come: a server refuses connections above its bounds.
    pub async fn try_to_post(&self, path: &str, body: &Value) -> reqwest::Result<Response> {
        self.client.post(format!("http://{}{path}", self.address)).body(body.to_string()).send().await
    }

    pub async fn delete(&self, path: &str) -> Response {
        self.client.delete(format!("http://{}{path}", self.address)).send().await.unwrap()
    }

    /// Books one ticket of the first event; the answer is the status.
    pub async fn book(&self) -> u16 {
        self.post(&order(OPENING_NIGHT, 1)).await.status().as_u16()
    }

    /// Several bookings at once, so that the pool fills.
    pub async fn book_at_once(&self, count: usize) -> Vec<u16> {
        futures::future::join_all((0..count).map(|_| self.book())).await
    }

    /// Bookings that are under way, with their statuses to come.
    pub fn book_in_the_background(&self, count: usize) -> Vec<tokio::task::JoinHandle<u16>> {
        let url = format!("http://{}/api/bookings", self.address);
        let one = || {
            let request = self.client.post(&url).body(order(OPENING_NIGHT, 1).to_string());
            tokio::spawn(async move { request.send().await.unwrap().status().as_u16() })
        };
        (0..count).map(|_| one()).collect()
    }

    pub async fn health(&self) -> HealthReport {
        // On the admin port, where each service has it.
        let report = self.client.get(format!("http://{}{REPORT_PATH}", self.admin)).send().await.unwrap();
        report.json().await.unwrap()
    }

    /// The metrics, from the admin port, where each service has them.
    pub async fn metrics(&self) -> String {
        self.client.get(format!("http://{}/metrics", self.admin)).send().await.unwrap().text().await.unwrap()
    }

    pub async fn admin_health(&self) -> Option<HealthReport> {
        let request = self.client.get(format!("http://{}/health", self.admin)).header(TOKEN_HEADER, TOKEN);
        let answer = request.send().await.unwrap();
        if answer.status().is_success() { Some(answer.json().await.unwrap()) } else { None }
    }

    /// Waits until the check is as `wanted` says.
    pub async fn check(&self, name: &str, what: &str, wanted: impl Fn(&CheckReport) -> bool) -> CheckReport {
        eventually(what, async || self.health().await.checks.remove(name).filter(&wanted)).await
    }

    /// Pushes a configuration that is newer than the ones before.
    pub async fn push(&self, policy: PolicySettings, flags: FlagsSettings) -> PushAnswer {
        let document = document(self.workload, self.revision.fetch_add(1, Ordering::SeqCst), policy, flags);
        let request = self.client.put(format!("http://{}{CONFIG_PATH}", self.admin)).header(TOKEN_HEADER, TOKEN);
        request.body(document).send().await.unwrap().json().await.unwrap()
    }

    pub async fn reset_connections(&self, intent: &str) -> ActionAnswer {
        self.execute(intent, "ResetConnections", "database").await
    }

    /// Asks for a recovery action, as the operator does.
    pub async fn execute(&self, intent: &str, action: &str, check: &str) -> ActionAnswer {
        let body = json!({"intentId": intent, "action": action, "check": check});
        let request = self.client.post(format!("http://{}{ACTIONS_PATH}", self.admin)).header(TOKEN_HEADER, TOKEN);
        request.body(body.to_string()).send().await.unwrap().json().await.unwrap()
    }
}

pub fn order(event: &str, tickets: u32) -> Value {
    json!({"eventId": event, "userId": "ann", "ticketCount": tickets})
}

/// A document as the operator publishes it.
pub fn document(workload: &str, revision: i64, policy: PolicySettings, flags: FlagsSettings) -> Vec<u8> {
    let id = WorkloadId::deployment("ticketing", workload);
    let section = Section { sources: Vec::new(), settings: policy };
    let flags = Section { sources: Vec::new(), settings: flags };
    RuntimeConfig::new(id, revision, section, flags).to_bytes().unwrap()
}

/// The ADR's shape of a policy for the database, with shorter times, and checks every 200 ms.
pub fn quick_policy() -> PolicySettings {
    let mut database = DependencySettings::default();
    database.timeout.request_ms = 3_000;
    database.timeout.per_try_ms = 300;
    database.circuit_breaker.break_ms = 1_000;
    database.retry.base_interval_ms = 20;
    database.retry.jitter_percent = 50;
    database.retry.retry_on =
        [RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::Deadlock, RetryOn::VersionConflict].into();
    let check = HealthCheckSettings { interval_ms: 200, timeout_ms: 500, ..Default::default() };
    let checks = ["database", "schema", "memory", "booking-consistency"].map(|name| (name.to_owned(), check.clone()));
    PolicySettings {
        dependencies: [("database".to_owned(), database)].into(),
        health_checks: checks.into(),
        ..Default::default()
    }
}

pub fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}
