//! The test fixture: a local stack, one buyer's requests to it, and what health reports, metrics and simulators say.

use contract::{
    BulkheadSettings, CheckReport, CircuitState, DegradationSettings, DependencySettings, FallbackSettings,
    FlagsSettings, HealthReport, PolicySettings, RetryOn, TripRule,
};
use e2e::local_stack::{LocalStack, NO_BUYER_LIMITS, Port, Ports};
use e2e::progress::Progress;
use hmac::Mac;
use reqwest::Client;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub const OPENING_NIGHT: &str = "11111111-1111-4111-8111-111111111111";
/// The services, where they are asked, and where they are configured.
pub const SERVICES: [(&str, Port, Port); 5] = [
    ("gateway", Port::Gateway, Port::GatewayAdmin),
    ("catalog", Port::Catalog, Port::CatalogAdmin),
    ("booking", Port::Booking, Port::BookingAdmin),
    ("payment", Port::Payment, Port::PaymentAdmin),
    ("notification", Port::Notification, Port::NotificationAdmin),
];
/// The secret that events of Stripe are signed with.
const WEBHOOK_SECRET: &str = "whsec_local_stack";
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);
/// The ADR's answer when there is neither a catalog nor a cached page of it.
pub const NO_EVENTS: &str = r#"{"events":[],"message":"Event catalog is temporarily unavailable. Please try again later.","isFromCache":false,"isFallback":true}"#;

/// An answer, and how long it took.
pub struct Seen {
    pub status: u16,
    pub body: Value,
    pub headers: reqwest::header::HeaderMap,
    pub took: Duration,
}

impl Seen {
    /// The code or the status that the body names, after the status of the answer.
    pub fn in_words(&self) -> String {
        let word = ["status", "errorCode"].iter().find_map(|name| self.body[name].as_str()).unwrap_or_default();
        format!("{} {word}", self.status)
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

/// Who somebody says to be.
#[derive(Clone, Copy)]
pub enum Who<'a> {
    /// With a token of this name.
    User(&'a str),
    /// With this as a token.
    Token(&'a str),
    /// With the cookie of a session.
    Session(&'a str),
    Nobody,
}

/// A local stack whose services have the ADR's policies with shorter times.
pub struct Fixture {
    pub stack: LocalStack,
    client: Client,
    rows: Vec<String>,
    /// Read for each event.
    secret: tempfile::NamedTempFile,
    /// Who has which booking.
    buyers: Mutex<HashMap<String, String>>,
    orders: AtomicUsize,
}

impl Fixture {
    pub async fn start() -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_ticketwave-e2e")).with_file_name("ticketing");
        assert!(program.is_file(), "build it first: cargo build --workspace --bins");
        let first_port = Ports::any_free().unwrap();
        // What no policy says is shortened here: how often reservations that ran out are looked for.
        let secret = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(secret.path(), WEBHOOK_SECRET).unwrap();
        let path = secret.path().display().to_string();
        let own =
            [("EXPIRE_EVERY_SECONDS", "1"), ("STRIPE_WEBHOOK_SECRET_FILE", path.as_str()), ("REQUESTS_PER_USER", "0")];
        let environment = [own.as_slice(), &NO_BUYER_LIMITS].concat();
        let stack = LocalStack::start(program, first_port, &environment, false, &Progress::quiet()).await.unwrap();
        let client = Client::builder().pool_max_idle_per_host(0).build().unwrap();
        let (rows, buyers, orders) = (Vec::new(), Mutex::default(), AtomicUsize::default());
        let fixture = Self { stack, client, rows, secret, buyers, orders };
        for (service, ..) in SERVICES {
            fixture.configure(service, policy(service)).await;
        }
        fixture
    }

    /// Ends everything, and prints the table.
    pub async fn finish(self) {
        if !self.rows.is_empty() {
            let (what, sees) = ("what fails", "what the buyer sees");
            println!("\n{what:<40} {sees:<38} {:>9}  {:>9}  what the metrics say", "answer", "well in");
            println!("{}\n", self.rows.join("\n"));
        }
        self.stack.stop().await;
    }

    /// Adds a row to the table: `took` is how long the buyer waited, `well_in` the time from the end of the failure until
    /// everything worked again.
    pub fn record(&mut self, what: &str, sees: &str, took: Duration, well_in: Duration, metrics: &str) {
        let (took, well_in) = (took.as_millis(), well_in.as_millis());
        self.rows.push(format!("{what:<40} {sees:<38} {took:>6} ms  {well_in:>6} ms  {metrics}"));
    }

    pub async fn configure(&self, service: &'static str, policy: PolicySettings) {
        self.configure_all(service, policy, FlagsSettings::default()).await;
    }

    /// A live change, as the operator makes it.
    pub async fn configure_all(&self, service: &'static str, policy: PolicySettings, flags: FlagsSettings) {
        let (.., admin) = SERVICES.into_iter().find(|(name, ..)| *name == service).unwrap();
        self.stack.push(service, admin, policy, flags).await.unwrap();
    }

    async fn seen(&self, request: reqwest::RequestBuilder) -> Seen {
        let begin = Instant::now();
        let answer = request.send().await.unwrap();
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let body = answer.bytes().await.unwrap();
        Seen { status, body: serde_json::from_slice(&body).unwrap_or_default(), headers, took: begin.elapsed() }
    }

    pub async fn get(&self, of: Port, path: &str) -> Seen {
        let request = self.client.get(self.stack.url(of) + path);
        let buyer = self.owner(path).filter(|_| of == Port::Gateway);
        self.seen(match buyer {
            Some(buyer) => request.bearer_auth(self.stack.buyers().token(&buyer)),
            None => request,
        })
        .await
    }

    /// Who has the booking that a path names.
    fn owner(&self, path: &str) -> Option<String> {
        let buyers = self.buyers.lock().unwrap();
        path.split('/').find_map(|part| buyers.get(part).cloned())
    }

    /// Whether it answers at all, and well.
    pub async fn get_if_there(&self, of: Port, path: &str) -> bool {
        let answer = self.client.get(self.stack.url(of) + path).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Mails that are still to be sent.
    pub async fn open_mails(&self) -> usize {
        let client = self.stack.connect().await.unwrap();
        let row = client.query_one("SELECT count(*) FROM outbox WHERE done_at IS NULL", &[]).await.unwrap();
        usize::try_from(row.get::<_, i64>(0)).unwrap()
    }

    /// Looks at a page of events.
    pub async fn events(&self, query: &str) -> Seen {
        self.get(Port::Gateway, &format!("/api/events{query}")).await
    }

    /// Books one seat.
    pub async fn book(&self) -> Seen {
        self.post("/api/bookings", &order()).await
    }

    /// Asks the gateway as somebody.
    pub async fn ask_as(&self, who: Who<'_>, method: reqwest::Method, path: &str, body: &Value) -> Seen {
        let request = self.client.request(method, self.stack.url(Port::Gateway) + path).body(body.to_string());
        self.seen(match who {
            Who::User(name) => request.bearer_auth(self.stack.buyers().token(name)),
            Who::Token(token) => request.bearer_auth(token),
            Who::Session(cookie) => request.header("cookie", cookie),
            Who::Nobody => request,
        })
        .await
    }

    /// Books one seat as this buyer, on a place of the waiting room.
    pub async fn book_on(&self, buyer: &str, place: Option<&str>) -> Seen {
        let request = self.client.post(self.stack.url(Port::Gateway) + "/api/bookings");
        let request = request.bearer_auth(self.stack.buyers().token(buyer)).body(order().to_string());
        self.seen(match place {
            Some(place) => request.header("x-place", place),
            None => request,
        })
        .await
    }

    /// How the place of this buyer stands.
    pub async fn standing(&self, buyer: &str, place: &str) -> Seen {
        let request = self.client.get(self.stack.url(Port::Gateway) + "/api/waiting-room");
        self.seen(request.bearer_auth(self.stack.buyers().token(buyer)).header("x-place", place)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Seen {
        self.post_text(path, body.to_string()).await
    }

    /// Each order is somebody else's, but for those with one key, and for what is done with a booking.
    pub async fn post_text(&self, path: &str, body: String) -> Seen {
        let key = || Some(serde_json::from_str::<Value>(&body).ok()?["idempotencyKey"].as_str()?.to_owned());
        let new = || format!("buyer-{}", self.orders.fetch_add(1, Ordering::Relaxed));
        let buyer = self.owner(path).or_else(key).unwrap_or_else(new);
        let request = self.client.post(self.stack.url(Port::Gateway) + path);
        let request = request.bearer_auth(self.stack.buyers().token(&buyer)).body(body);
        let seen = self.seen(request).await;
        if let Some(id) = seen.body["bookingId"].as_str() {
            self.buyers.lock().unwrap().insert(id.to_owned(), buyer);
        }
        seen
    }

    async fn behave(&self, of: Port, path: &str, behaviour: &Value) {
        let answer = self.client.put(self.stack.url(of) + path).body(behaviour.to_string()).send().await.unwrap();
        assert_eq!(answer.status(), 200);
    }

    /// Sets how a provider behaves from now on; `{}`: as it should.
    pub async fn provider(&self, name: &str, behaviour: Value) {
        self.behave(Port::Providers, &format!("/providers/{name}"), &behaviour).await;
    }

    /// Sets how the mail server behaves from now on; `{}`: as it should.
    pub async fn mail_server(&self, behaviour: Value) {
        self.behave(Port::Mails, "/behaviour", &behaviour).await;
    }

    /// The buyer of a booking does what a provider asks for.
    pub async fn buyer_acts(&self, seen: &Seen) {
        let url = format!("{}/buyers/{}", self.stack.url(Port::Providers), seen.body["bookingId"].as_str().unwrap());
        assert!(self.client.put(url).send().await.unwrap().status().is_success());
    }

    /// The provider's id of what it was asked for, for a booking.
    pub async fn object_of(&self, seen: &Seen) -> String {
        let query = "SELECT object_id FROM payment_attempts WHERE key = $1 AND object_id IS NOT NULL";
        let key = seen.body["bookingId"].as_str().unwrap();
        self.stack.connect().await.unwrap().query_one(query, &[&key]).await.unwrap().get(0)
    }

    /// Sends an event of Stripe about this object through the gateway, as somebody who knows `secret`; `None`: the right one.
    pub async fn event_of_stripe(&self, object: &str, secret: Option<&str>) -> Seen {
        let event = format!("evt_{}", rand::random::<u64>());
        let body =
            json!({"id": event, "type": "payment_intent.succeeded", "data": {"object": {"id": object}}}).to_string();
        let kept = std::fs::read_to_string(self.secret.path()).unwrap();
        let now = jiff::Timestamp::now().as_second();
        let mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(secret.unwrap_or(&kept).as_bytes()).unwrap();
        let mac = mac.chain_update(format!("{now}.{body}")).finalize().into_bytes();
        let signature = mac.iter().fold(format!("t={now},v1="), |text, byte| format!("{text}{byte:02x}"));
        let request = self.client.post(self.stack.url(Port::Gateway) + "/api/webhooks/stripe");
        self.seen(request.header("stripe-signature", signature).body(body)).await
    }

    /// Ends a service and starts it with another environment, and with its built-in settings.
    pub async fn restart_with(&mut self, name: &'static str, changes: &[(&'static str, Option<&str>)]) {
        self.stack.kill(name).await;
        self.stack.restart_with(name, changes).unwrap();
        let (_, of, _) = SERVICES.into_iter().find(|(service, ..)| *service == name).unwrap();
        self.until("it is there", async || self.get_if_there(of, "/readyz").await).await;
    }

    /// Who has charged for a booking, each as often as they did.
    pub async fn charged(&self, seen: &Seen) -> Vec<String> {
        let charges = self.get(Port::Providers, "/charges").await.body;
        let charges = charges["charges"].as_array().unwrap();
        let of_booking = charges.iter().filter(|charge| charge["key"] == seen.body["bookingId"]);
        of_booking.map(|charge| charge["provider"].as_str().unwrap().to_owned()).collect()
    }

    /// Who got a mail, each as often as they did.
    pub async fn mails(&self) -> usize {
        self.get(Port::Mails, "/mails").await.body["mails"].as_array().unwrap().len()
    }

    pub async fn health(&self, of: Port) -> HealthReport {
        let (of, path) = reports_of(of, "/health", "/report");
        serde_json::from_value(self.get(of, path).await.body).unwrap()
    }

    pub async fn check(&self, of: Port, name: &str) -> CheckReport {
        self.health(of).await.checks.remove(name).unwrap()
    }

    async fn metrics_text(&self, of: Port) -> String {
        let (of, path) = reports_of(of, "/metrics", "/metrics");
        self.client.get(self.stack.url(of) + path).send().await.unwrap().text().await.unwrap()
    }

    /// A figure of a service, such as `circuit_breaker_opened_total{service="stripe"}`; 0 if it has none yet.
    pub async fn metric(&self, of: Port, name: &str) -> u64 {
        let text = self.metrics_text(of).await;
        let figures = text.lines().filter_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        figures.sum()
    }

    /// The same of all labels that go on as `start` does.
    pub async fn metrics(&self, of: Port, start: &str) -> u64 {
        let text = self.metrics_text(of).await;
        let figures = text.lines().filter(|line| line.starts_with(start));
        figures.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
    }

    /// Waits until `done`; the answer is how long that took.
    pub async fn until<Fut: Future<Output = bool>>(&self, what: &str, done: impl Fn() -> Fut) -> Duration {
        let begin = Instant::now();
        while !done().await {
            assert!(begin.elapsed() < WAIT_TIMEOUT, "not within {} s: {what}", WAIT_TIMEOUT.as_secs());
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        begin.elapsed()
    }

    pub async fn until_confirmed(&self, seen: &Seen) -> Duration {
        let path = format!("/api/bookings/{}", seen.body["bookingId"].as_str().unwrap());
        let is_confirmed = async || self.get(Port::Gateway, &path).await.body["status"] == "Confirmed";
        self.until("the booking is confirmed", is_confirmed).await
    }

    /// Waits until all is as if nothing had happened: events are of this moment, a booking is confirmed at once and charged
    /// by the first provider, every circuit is closed, every check is healthy and nobody is degraded.
    pub async fn until_well(&self) -> Duration {
        self.until("all is well again", async || {
            let events = self.events("").await;
            if events.status != 200 || events.header("x-served-from").is_some() || events.body["isFromCache"] == true {
                return false;
            }
            let booked = self.book().await;
            if booked.status != 201 || self.charged(&booked).await != ["stripe"] {
                return false;
            }
            for (_, of, _) in SERVICES {
                let health = self.health(of).await;
                let closed = health.circuits.values().all(|circuit| circuit.state == CircuitState::Closed);
                if !closed || health.degraded || health.status != contract::CheckStatus::Healthy {
                    return false;
                }
            }
            true
        })
        .await
    }
}

/// Where a service says how it is: the gateway to nobody outside.
fn reports_of(of: Port, path: &'static str, at_the_edge: &'static str) -> (Port, &'static str) {
    if of == Port::Gateway { (Port::GatewayAdmin, at_the_edge) } else { (of, path) }
}

/// What this machine lacks fails the test, so that no row is left out in silence; unless `ALLOW_SKIP=yes`.
pub fn skip(what: &str, missing: &dyn std::fmt::Display) {
    let is_allowed = std::env::var("ALLOW_SKIP").is_ok_and(|value| value == "yes");
    assert!(is_allowed, "{what}: {missing}. To go on without these rows: ALLOW_SKIP=yes");
    println!("SKIPPED, {what}: {missing}");
}

/// One seat of the first event, for somebody with an address.
pub fn order() -> Value {
    json!({"eventId": OPENING_NIGHT, "userId": "ann", "ticketCount": 1, "email": "ann@example.com"})
}

fn dependency(request_ms: u64, per_try_ms: u64, retries: u32) -> DependencySettings {
    let mut settings = DependencySettings::default();
    settings.timeout.request_ms = request_ms;
    settings.timeout.per_try_ms = per_try_ms;
    settings.retry.num_retries = retries;
    settings.retry.base_interval_ms = 50;
    settings.circuit_breaker.break_ms = 1_000;
    settings
}

/// The database as every service calls it: longer than the server takes to break a deadlock.
fn database() -> DependencySettings {
    let mut database = dependency(3_000, 1_000, 3);
    database.retry.jitter_percent = 50;
    database.retry.retry_on =
        [RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::Deadlock, RetryOn::VersionConflict].into();
    database
}

/// The policy of a service: everything as ADR-007 has it but for the times.
pub fn policy(service: &str) -> PolicySettings {
    let mut policy = PolicySettings::default();
    let mut add = |name: &str, settings| policy.dependencies.insert(name.to_owned(), settings);
    let cache = FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 0 };
    match service {
        "gateway" => {
            let nothing = FallbackSettings::Static { status_code: 503, body: NO_EVENTS.to_owned() };
            let fallback = vec![cache, nothing];
            add(
                "catalog",
                DependencySettings { fallback, bulkhead: Some("catalog".into()), ..dependency(1_000, 300, 1) },
            );
            add("booking", DependencySettings { bulkhead: Some("booking".into()), ..dependency(25_000, 25_000, 0) });
        }
        "catalog" => {
            add("database", DependencySettings { fallback: vec![cache], ..database() });
        }
        "booking" => {
            add("database", DependencySettings { bulkhead: Some("critical".into()), ..database() });
            add(
                "payment",
                DependencySettings { fallback: vec![FallbackSettings::Queue], ..dependency(5_000, 5_000, 0) },
            );
        }
        "payment" => {
            add("database", database());
            let mut stripe = dependency(1_500, 300, 2);
            stripe.retry.factor = 1.0;
            stripe.retry.retry_on = [RetryOn::ServerError].into();
            stripe.circuit_breaker.trip = TripRule::ConsecutiveFailures { failures: 3 };
            stripe.fallback = vec![FallbackSettings::Provider { provider: "paypal".to_owned() }];
            add("stripe", stripe);
            add("paypal", dependency(1_000, 1_000, 0));
        }
        _ => {
            add("database", database());
            add("smtp", DependencySettings { bulkhead: Some("background".into()), ..dependency(1_000, 500, 0) });
        }
    }
    let check = contract::HealthCheckSettings { interval_ms: 200, timeout_ms: 500, ..Default::default() };
    let checks = ["database", "schema", "memory", "booking-consistency", "catalog-service", "booking-service", "mail"];
    let checks = checks.into_iter().chain([
        "payment-provider-stripe",
        "refunds",
        "payments-pending",
        "buyer-limits",
        "ticket-key",
    ]);
    policy.health_checks = checks.map(|name| (name.to_owned(), check.clone())).collect();
    policy
}

/// Degraded mode from 80 % on, without the wait.
pub fn degradation() -> DegradationSettings {
    DegradationSettings {
        enter_load_percent: 80,
        enter_for_ms: 0,
        exit_load_percent: 60,
        exit_for_ms: 1_000,
        flag_overrides: BTreeMap::new(),
        stages: Vec::new(),
    }
}

/// The bulkhead of bookings, as small as this.
pub fn critical(max_concurrent: u32, max_queued: u32) -> (String, BulkheadSettings) {
    ("critical".to_owned(), BulkheadSettings { max_concurrent, max_queued, max_wait_ms: 1_000 })
}
