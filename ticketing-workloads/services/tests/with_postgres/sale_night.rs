//! A whole night: a thousand buyers with and without a login, through two gateways with limits and a waiting room, for 500
//! seats, while connections are cut, providers change their ways and events come twice and forged.

use crate::paid_booking::{for_a_crowd, quick_providers, reconcile_settings};
use crate::support::app::App;
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use crate::support::within;
use contract::{BulkheadSettings, DependencySettings, FlagsSettings, PolicySettings, WaitingRoomSettings};
use futures::future::join_all;
use hmac::{Hmac, Mac};
use reqwest::Client;
use serde_json::{Value, json};
use sha2::Sha256;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tempfile::TempDir;
use ticketing_services::gateway::buyers::local_token;
use ticketing_services::payment::reconcile;

const SECRET: &str = "0123456789abcdef0123456789abcdef";
const SEATS: i64 = 500;
const BUYERS: usize = 1_000;

/// The waiting room opens when a fifth of the places of a gateway is taken.
fn gateway_policy() -> PolicySettings {
    let mut policy = PolicySettings::default();
    let mut booking = DependencySettings { bulkhead: Some("booking".to_owned()), ..Default::default() };
    (booking.timeout.request_ms, booking.timeout.per_try_ms, booking.retry.num_retries) = (10_000, 10_000, 0);
    booking.circuit_breaker.break_ms = 300;
    policy.dependencies.insert("booking".to_owned(), booking);
    let room = BulkheadSettings { max_concurrent: 50, max_queued: 100, max_wait_ms: 1_000 };
    policy.bulkheads.insert("booking".to_owned(), room);
    policy.waiting_room = Some(WaitingRoomSettings {
        enter_load_percent: 20,
        exit_load_percent: 10,
        min_admit_per_second: 20,
        max_admit_per_second: 1_000,
        ..WaitingRoomSettings::default()
    });
    policy
}

struct Night {
    client: Client,
    gateways: [App; 2],
    booking: App,
    // They end with the night.
    _payment: App,
    _keys: TempDir,
    providers: Providers,
    postgres: Postgres,
}

impl Night {
    async fn begin() -> Self {
        let postgres = Postgres::start().await;
        let providers = Providers::start();
        let payment = App::payment(&postgres, &providers).await;
        payment.mount("stripe-webhooks", "whsec\n");
        payment.push(quick_providers(), FlagsSettings::default()).await;
        let booking = App::paid_booking(&postgres, payment.address).await;
        booking.push(for_a_crowd(), FlagsSettings::default()).await;
        let keys = tempfile::tempdir().unwrap();
        let file = keys.path().join("keys");
        std::fs::write(&file, SECRET).unwrap();
        let file = file.display().to_string();
        let gateways = [Self::gateway(&booking, &payment, &file).await, Self::gateway(&booking, &payment, &file).await];
        let client = Client::builder().pool_max_idle_per_host(0).build().unwrap();
        Self { client, gateways, booking, _payment: payment, _keys: keys, providers, postgres }
    }

    /// All buyers come from one network, whose limits would be met by any of them; those of users and sessions hold.
    async fn gateway(booking: &App, payment: &App, keys: &str) -> App {
        let payment = format!("http://{}", payment.address);
        let settings = [
            ("--payment-url", payment.as_str()),
            ("--token-hmac-file", keys),
            ("--session-key-file", keys),
            ("--waiting-room-key-file", keys),
            ("--requests-per-user", "20:40"),
            ("--new-sessions-per-network", "0"),
        ];
        let gateway = App::gateway_with(booking.address, &settings).await;
        gateway.push(gateway_policy(), FlagsSettings::default()).await;
        gateway
    }

    async fn count(&self, query: &str) -> i64 {
        self.postgres.connect().await.query_one(query, &[]).await.unwrap().get(0)
    }
}

/// Somebody at one of the gateways, with a token or a session of his own.
struct Buyer<'a> {
    client: &'a Client,
    gateway: &'a App,
    number: usize,
    token: Option<String>,
    cookies: BTreeMap<String, String>,
    place: Option<String>,
    waited: bool,
}

/// An answer: its status, and its body.
type Answer = (u16, Value);

impl<'a> Buyer<'a> {
    /// Three of four have logged in.
    fn new(night: &'a Night, number: usize) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let name = format!("buyer-{number}");
        let token = local_token::signed(&name, SECRET.as_bytes(), now, Duration::from_secs(3_600));
        let token = token.filter(|_| !number.is_multiple_of(4));
        let (gateway, cookies) = (&night.gateways[number % 2], BTreeMap::new());
        let client = &night.client;
        Self { client, gateway, number, token, cookies, place: None, waited: false }
    }

    async fn ask(&mut self, request: reqwest::RequestBuilder) -> reqwest::Result<Answer> {
        let cookies: Vec<_> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = request.header("cookie", cookies.join("; "));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(place) = &self.place {
            request = request.header("x-place", place);
        }
        let answer = request.send().await?;
        for cookie in answer.headers().get_all("set-cookie") {
            let pair = cookie.to_str().unwrap().split(';').next().unwrap();
            let (name, value) = pair.split_once('=').unwrap();
            self.cookies.insert(name.to_owned(), value.to_owned());
        }
        if let Some(place) = answer.headers().get("x-place") {
            self.place = Some(place.to_str().unwrap().to_owned());
        }
        let status = answer.status().as_u16();
        Ok((status, answer.json().await.unwrap_or_default()))
    }

    async fn post(&mut self, path: &str, body: &Value) -> reqwest::Result<Answer> {
        let request = self.client.post(format!("http://{}{path}", self.gateway.address));
        let request = request.header("content-type", "application/json").body(body.to_string());
        self.ask(request).await
    }

    /// Comes back with the same key until somebody says yes or no. Half of them reserve first; the answer is the booking.
    async fn buy(&mut self, event: &str, until: Instant) -> Option<String> {
        let reserves = self.number % 2 == 1;
        let key = format!("{:08x}-0000-4000-8000-000000000000", self.number);
        let order = json!({"eventId": event, "userId": "ann", "ticketCount": 1, "idempotencyKey": key});
        let mut path = (if reserves { "/api/reservations" } else { "/api/bookings" }).to_owned();
        loop {
            // All buyers come from one address, which has a bound on its connections: one may be refused.
            let answer = self.post(&path, &order).await;
            let (status, body) = answer.unwrap_or_default();
            self.waited |= body["status"] == "Waiting";
            match status {
                201 if body["status"] == "Held" => {
                    path = format!("/api/reservations/{}/confirm", body["bookingId"].as_str().unwrap());
                    continue;
                }
                201 => return body["bookingId"].as_str().map(str::to_owned),
                202 if body["status"] == "PaymentPending" => return body["bookingId"].as_str().map(str::to_owned),
                409 if body["errorCode"] == "INSUFFICIENT_TICKETS" => return None,
                _ => {}
            }
            assert!(Instant::now() < until, "buyer {} has no answer; the last one was {status}: {body}", self.number);
            assert!(status == 0 || status == 202 || status >= 429, "{status}: {body}");
            let pause = 300 + u64::try_from(self.number).unwrap() % 100;
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }
}

/// What Stripe sends of each of its objects: each event twice, and a forged one besides, until `is_over`.
async fn events_of_stripe(night: &Night, is_over: &AtomicBool) -> usize {
    let mut sent = BTreeSet::new();
    loop {
        let last = is_over.load(Ordering::SeqCst);
        let query = "SELECT object_id FROM payment_attempts WHERE provider = 'stripe' AND object_id IS NOT NULL";
        // Its connection may be cut, too.
        let rows = night.postgres.connect().await.query(query, &[]).await.unwrap_or_default();
        for (nth, object) in rows.iter().map(|row| row.get::<_, String>(0)).enumerate() {
            if !sent.insert(object.clone()) {
                continue;
            }
            let gateway = &night.gateways[nth % 2];
            for secret in ["whsec", "whsec", "forged"] {
                let body = json!({"id": format!("evt-{object}"), "data": {"object": {"id": object}}}).to_string();
                let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
                let mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
                let mac = mac.chain_update(format!("{time}.{body}")).finalize().into_bytes();
                let hex = mac.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
                let url = format!("http://{}/api/webhooks/stripe", gateway.address);
                let request = night.client.post(url).header("stripe-signature", format!("t={time},v1={hex}"));
                let Ok(answer) = request.body(body).send().await else { continue };
                let status = answer.status().as_u16();
                // One that cannot be written down now is sent again.
                if secret == "forged" {
                    assert!(status == 400 || status >= 500, "a forged event was taken: {status}");
                }
            }
        }
        if last {
            return sent.len();
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn faults(night: &Night) {
    let client = night.postgres.connect().await;
    let ways = [
        ("stripe", json!({"chargeThenHang": true})),
        ("stripe", json!({"refuse": true})),
        ("paypal", json!({"chargeThenFail": true, "hide": true})),
        ("stripe", json!({"failPercent": 50})),
        ("paypal", json!({})),
        ("stripe", json!({"chargeThenHang": true, "hide": true})),
        ("stripe", json!({})),
    ];
    for (nth, (provider, way)) in ways.into_iter().enumerate() {
        night.providers.behave(provider, way).await;
        let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        client.execute(cut, &[]).await.unwrap();
        night.booking.reset_connections(&format!("intent-{nth}")).await;
        let hold = "BEGIN; SELECT FROM events FOR UPDATE; SELECT pg_sleep(0.3); COMMIT";
        client.batch_execute(hold).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_buyers_of_500_seats_in_a_night_with_everything_on() {
    let night = &Night::begin().await;
    let insert = "INSERT INTO events (id, name, capacity, available, price_cents)
                  VALUES (gen_random_uuid(), 'Final', 500, 500, 100) RETURNING id::text";
    let event: &str = &night.postgres.connect().await.query_one(insert, &[]).await.unwrap().get::<_, String>(0);

    // Somebody with many keys gets no more than a buyer may have, not even as the first one.
    let until = Instant::now() + Duration::from_secs(60);
    let answers = join_all((0..30).map(|nth| greedy(night, event, nth, until))).await;
    let held = answers.iter().filter(|answer| answer.0 == 201).count();
    let refused = answers.iter().filter(|answer| answer.1["errorCode"] == "TOO_MANY_SEATS").count();
    assert_eq!((held, refused), (5, 25), "two seats at a time, up to ten: {answers:?}");

    let until = Instant::now() + Duration::from_secs(180);
    let waited = &AtomicUsize::new(0);
    let buyers = join_all((0..BUYERS).map(|number| async move {
        let mut buyer = Buyer::new(night, number);
        let booking = buyer.buy(event, until).await;
        waited.fetch_add(usize::from(buyer.waited), Ordering::SeqCst);
        (buyer, booking)
    }));
    // He goes on among the others.
    let greedy = join_all((30..40).map(|nth| greedy(night, event, nth, until)));
    let is_over = &AtomicBool::new(false);
    let selling = async {
        let (buyers, answers, ()) = tokio::join!(buyers, greedy, faults(night));
        assert!(answers.iter().all(|answer| answer.0 != 201), "{answers:?}");
        is_over.store(true, Ordering::SeqCst);
        buyers
    };
    let (buyers, events) = tokio::join!(selling, events_of_stripe(night, is_over));
    assert!(events > 0, "events of Stripe came");
    assert!(waited.load(Ordering::SeqCst) > 0, "some have waited in the waiting room");

    let owned = "SELECT coalesce(max(seats), 0)::bigint FROM (SELECT sum(ticket_count) AS seats FROM bookings
                 WHERE status <> 'Cancelled' GROUP BY owner) all_owners";
    assert_eq!(
        night.count(owned).await,
        10,
        "nobody has more seats than a buyer may have, and the greedy one has as many"
    );

    within(Duration::from_secs(300), "every payment is settled", async || {
        let open = night.count("SELECT count(*) FROM bookings WHERE status = 'PaymentPending'").await;
        (open == 0).then_some(())
    })
    .await;
    // Reservations of the greedy one and of those who had no answer keep their seats until they run out.
    let seats = "SELECT (SELECT available FROM events WHERE name = 'Final')
                 + (SELECT coalesce(sum(ticket_count), 0) FROM bookings b JOIN events e ON e.id = b.event_id
                    WHERE e.name = 'Final' AND b.status <> 'Cancelled')::bigint";
    assert_eq!(night.count(seats).await, SEATS, "no seat is lost, and none is sold twice");
    let client = night.postgres.connect().await;
    let confirmed = client.query("SELECT id::text FROM bookings WHERE status = 'Confirmed'", &[]).await.unwrap();
    let confirmed: BTreeSet<String> = confirmed.iter().map(|row| row.get(0)).collect();
    let free = night.count("SELECT available::bigint FROM events WHERE name = 'Final'").await;
    assert_eq!(free, 0, "who came in vain came in vain because all seats were taken");
    let mut charged = BTreeMap::new();
    for charge in night.providers.charges().await.iter().filter(|charge| charge["refunded"] != true) {
        *charged.entry(charge["key"].as_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert!(charged.values().all(|times| *times == 1), "somebody has paid twice: {charged:?}");
    assert_eq!(charged.into_keys().collect::<BTreeSet<_>>(), confirmed, "who has a seat has paid, and nobody else");
    let refunds = night.count("SELECT count(*) FROM refunds").await;
    assert_eq!(refunds, 0, "nobody was charged for nothing");
    let written = night.count("SELECT count(*) FROM webhook_events").await;
    assert!(
        (1..=i64::try_from(events).unwrap()).contains(&written),
        "{written} of {events}: one that comes twice is one"
    );

    // Each has what he was told, and nobody else sees it.
    let sold: Vec<_> = buyers.iter().filter(|(_, booking)| booking.is_some()).collect();
    for ((buyer, booking), (stranger, _)) in sold.iter().zip(sold.iter().skip(1)).take(20) {
        let path = format!("/api/bookings/{}", booking.as_ref().unwrap());
        assert_eq!(look(buyer, &path).await.1["status"], "Confirmed");
        assert_eq!(look(stranger, &path).await.0, 404);
    }
    let told: BTreeSet<_> = sold.iter().filter_map(|(_, booking)| booking.clone()).collect();
    assert!(told.is_subset(&confirmed), "every buyer with a yes has a seat");

    assert_eq!(
        reconcile::compare(&reconcile_settings(&night.postgres, &night.providers)).await.unwrap(),
        Vec::<String>::new()
    );
}

/// One of the many orders of somebody who wants two seats with each: until it is definite.
async fn greedy(night: &Night, event: &str, nth: usize, until: Instant) -> Answer {
    let mut buyer = Buyer::new(night, 5_001);
    let key = format!("{nth:08x}-1111-4111-8111-111111111111");
    let order = json!({"eventId": event, "userId": "ann", "ticketCount": 2, "idempotencyKey": key});
    loop {
        let (status, body) = buyer.post("/api/reservations", &order).await.unwrap_or_default();
        if matches!(status, 201 | 409) || body["errorCode"] == "TOO_MANY_SEATS" {
            return (status, body);
        }
        assert!(Instant::now() < until, "order {nth} has no answer; the last one was {status}: {body}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// As often as it is refused for coming too often.
async fn look(buyer: &Buyer<'_>, path: &str) -> Answer {
    let mut again = Buyer { cookies: buyer.cookies.clone(), token: buyer.token.clone(), place: None, ..*buyer };
    loop {
        let request = buyer.client.get(format!("http://{}{path}", buyer.gateway.address));
        let (status, body) = again.ask(request).await.unwrap();
        if status != 429 && status < 500 {
            return (status, body);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
