//! Buyers and what is theirs: nobody sees or changes what is somebody else's, and nobody takes it all.

use crate::support::app::{App, OPENING_NIGHT, order, quick_policy};
use crate::support::pgbouncer::PgBouncer;
use crate::support::postgres::Postgres;
use crate::support::providers::Providers;
use crate::support::{eventually, nobody};
use contract::{
    BulkheadSettings, CheckReport, CheckStatus, DependencySettings, FallbackSettings, FlagsSettings,
    HealthCheckSettings, PolicySettings,
};
use futures::future::join_all;
use futures::{StreamExt, stream};
use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use ticketing_services::buyer::{BUYER, BUYER_NETWORK, BUYER_SESSION, Buyer};
use uuid::Uuid;

/// The schema of version 0.1, step by step.
const VERSION_0_1: [&str; 7] = [
    include_str!("../../migrations/booking/0001_events_and_bookings.sql"),
    include_str!("../../migrations/booking/0002_first_event.sql"),
    include_str!("../../migrations/booking/0003_catalog.sql"),
    include_str!("../../migrations/booking/0004_payments.sql"),
    include_str!("../../migrations/booking/0005_paid_bookings.sql"),
    include_str!("../../migrations/booking/0006_notifications.sql"),
    include_str!("../../migrations/booking/0007_possible_duplicates.sql"),
];

/// What the gateway says of a buyer.
#[derive(Clone, Default)]
struct Who(HeaderMap);

impl Who {
    /// Somebody with a login.
    fn user(name: &str) -> Self {
        Self::default().with(&BUYER, &Buyer::user("https://id.example", name).to_string())
    }

    /// Somebody without one, in a network of its own.
    fn session(nth: u128) -> Self {
        Self::default().with(&BUYER, &session(nth)).of_network(&format!("network-{nth}"))
    }

    /// The session that somebody had before the login.
    fn before(self, nth: u128) -> Self {
        self.with(&BUYER_SESSION, &session(nth))
    }

    fn of_network(self, network: &str) -> Self {
        self.with(&BUYER_NETWORK, network)
    }

    fn with(mut self, name: &axum::http::HeaderName, value: &str) -> Self {
        self.0.insert(name.clone(), value.parse().unwrap());
        self
    }
}

fn session(nth: u128) -> String {
    Buyer::Session(Uuid::from_u128(nth)).to_string()
}

/// From inside the cluster.
fn inside() -> Who {
    Who::default()
}

/// An answer: its status, its headers, its body.
struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn id(&self) -> String {
        self.body["bookingId"].as_str().unwrap_or_default().to_owned()
    }

    fn code(&self) -> &str {
        self.body["errorCode"].as_str().unwrap_or_default()
    }

    /// Seconds after which to come back, of somebody who has reached this limit.
    fn limited_by(&self, code: &str, limit: &str) -> u64 {
        assert_eq!((self.status, self.code(), self.body["limit"].as_str()), (429, code, Some(limit)), "{}", self.body);
        assert_eq!(self.headers["x-refused"], "asker", "nothing has failed, and others are not concerned");
        self.headers["retry-after"].to_str().unwrap().parse().unwrap()
    }
}

async fn ask(app: &App, who: &Who, method: Method, path: &str, body: &Value) -> Answer {
    let request = app.client.request(method, format!("http://{}{path}", app.address)).headers(who.0.clone());
    let answer = request.body(body.to_string()).send().await.unwrap();
    let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
    Answer { status, headers, body: answer.json().await.unwrap_or_default() }
}

async fn book(app: &App, who: &Who, body: &Value) -> Answer {
    ask(app, who, Method::POST, "/api/bookings", body).await
}

async fn reserve(app: &App, who: &Who, body: &Value) -> Answer {
    ask(app, who, Method::POST, "/api/reservations", body).await
}

async fn confirm(app: &App, who: &Who, id: &str) -> Answer {
    ask(app, who, Method::POST, &format!("/api/reservations/{id}/confirm"), &json!({})).await
}

async fn give_back(app: &App, who: &Who, id: &str) -> Answer {
    ask(app, who, Method::DELETE, &format!("/api/reservations/{id}"), &Value::Null).await
}

async fn find(app: &App, who: &Who, id: &str) -> Answer {
    ask(app, who, Method::GET, &format!("/api/bookings/{id}"), &Value::Null).await
}

fn with_key(event: &str, tickets: u32, key: &str) -> Value {
    let mut order = order(event, tickets);
    order["idempotencyKey"] = json!(key);
    order
}

/// Attempts that may wait as long as a busy machine takes, and checks every 200 ms.
fn patient() -> PolicySettings {
    let mut policy = quick_policy();
    let timeout = &mut policy.dependencies.get_mut("database").unwrap().timeout;
    (timeout.per_try_ms, timeout.request_ms) = (10_000, 20_000);
    let check = HealthCheckSettings { interval_ms: 200, timeout_ms: 500, ..Default::default() };
    policy.health_checks.insert("buyer-limits".to_owned(), check);
    let critical = BulkheadSettings { max_concurrent: 10, max_queued: 1_000, max_wait_ms: 20_000 };
    policy.bulkheads.insert("critical".to_owned(), critical);
    policy
}

fn is_healthy(check: &CheckReport) -> bool {
    check.status == CheckStatus::Healthy
}

async fn pod(postgres: &Postgres, settings: &[(&'static str, &str)]) -> App {
    let app = App::booking_with(postgres, settings).await;
    app.push(patient(), FlagsSettings::default()).await;
    app.check("buyer-limits", "buyers are counted", is_healthy).await;
    app
}

async fn event(postgres: &Postgres, seats: i32) -> String {
    let statement = "INSERT INTO events (id, name, capacity, available)
                     VALUES (gen_random_uuid(), 'Test', $1, $1) RETURNING id::text";
    postgres.connect().await.query_one(statement, &[&seats]).await.unwrap().get(0)
}

/// Seats of an event that are taken.
async fn taken(postgres: &Postgres, event: &str) -> i32 {
    let query = "SELECT capacity - available FROM events WHERE id::text = $1";
    postgres.connect().await.query_one(query, &[&event]).await.unwrap().get(0)
}

/// Who a booking belongs to, and which network it counts for.
async fn owner(postgres: &Postgres, id: &str) -> (Option<String>, Option<String>) {
    let query = "SELECT owner, network FROM bookings WHERE id::text = $1";
    let row = postgres.connect().await.query_one(query, &[&id]).await.unwrap();
    (row.get(0), row.get(1))
}

/// Until so many sessions wait for a lock.
async fn until_waiting(watch: &tokio_postgres::Client, sessions: i64) {
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("several wait", async || {
        (watch.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) >= sessions).then_some(())
    })
    .await;
}

/// Metrics whose names begin like this. Before there is a schema, a call may be made again, and a circuit open.
async fn metrics(app: &App, name: &str) -> Vec<String> {
    let metrics = app.get("/metrics").await.text().await.unwrap();
    metrics.lines().filter(|line| line.starts_with(name)).map(String::from).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_sees_and_changes_nothing() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[]).await;
    let ann = Who::user("ann");
    let id = reserve(&app, &ann, &order(OPENING_NIGHT, 2)).await.id();
    let none = Uuid::new_v4().to_string();
    for stranger in [Who::user("bob"), Who::session(1), Who::user("bob").before(1)] {
        let asked = async |id: &str| {
            let answers = [
                find(&app, &stranger, id).await,
                confirm(&app, &stranger, id).await,
                give_back(&app, &stranger, id).await,
            ];
            answers.map(|answer| (answer.status, answer.body))
        };
        let answers = asked(&id).await;
        assert_eq!(answers, asked(&none).await, "as if it were not there");
        assert!(answers.iter().all(|(status, _)| *status == 404), "{answers:?}");
    }
    for who in [&ann, &inside()] {
        assert_eq!(find(&app, who, &id).await.body["status"], "Held");
    }
    assert_eq!(confirm(&app, &ann, &id).await.status, 201);
    assert_eq!(find(&app, &Who::user("bob"), &id).await.status, 404, "nor once it is booked");
    let other = reserve(&app, &ann, &order(OPENING_NIGHT, 1)).await.id();
    assert_eq!(give_back(&app, &ann, &other).await.status, 200);
    let support = reserve(&app, &ann, &order(OPENING_NIGHT, 1)).await.id();
    assert_eq!(give_back(&app, &inside(), &support).await.status, 200);
    // What is nobody's is found by its id, as before.
    let nobodys = reserve(&app, &inside(), &order(OPENING_NIGHT, 1)).await.id();
    assert_eq!(find(&app, &ann, &nobodys).await.status, 200);
    assert_eq!(confirm(&app, &ann, &nobodys).await.status, 201);
    assert_eq!(owner(&postgres, &nobodys).await, (None, None));
    assert_eq!(taken(&postgres, OPENING_NIGHT).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_cannot_be_read_are_not_taken_for_a_request_from_inside() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[]).await;
    let id = book(&app, &Who::user("ann"), &order(OPENING_NIGHT, 1)).await.id();
    let unknown = Who::default().with(&BUYER, "admin");
    assert_eq!(find(&app, &unknown, &id).await.status, 400);
    assert_eq!(book(&app, &unknown, &order(OPENING_NIGHT, 1)).await.status, 400);
    assert_eq!(confirm(&app, &unknown, &id).await.status, 400);
    assert_eq!(give_back(&app, &unknown, &id).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_logs_in_takes_along_what_the_session_reserved() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[("--seats-per-buyer", "3"), ("--seats-per-session", "2")]).await;
    let (before, ann) = (Who::session(7), Who::user("ann").before(7));
    let wanted = with_key(OPENING_NIGHT, 2, "once");
    let held = reserve(&app, &before, &wanted).await;
    let id = held.id();
    assert_eq!(owner(&postgres, &id).await, (Some(session(7)), Some("network-7".to_owned())));
    assert_eq!(find(&app, &ann, &id).await.body["status"], "Held");
    let again = reserve(&app, &ann, &wanted).await;
    assert_eq!((again.status, again.id()), (201, id.clone()), "the same order as before the login");
    book(&app, &ann, &order(OPENING_NIGHT, 2)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
    assert_eq!(confirm(&app, &ann, &id).await.status, 201);
    let of_ann = Buyer::user("https://id.example", "ann").to_string();
    assert_eq!(owner(&postgres, &id).await, (Some(of_ann), None));
    assert_eq!(find(&app, &Who::user("ann"), &id).await.status, 200, "in another browser");
    assert_eq!(find(&app, &before, &id).await.status, 404, "the next one at that machine");
    assert_eq!(taken(&postgres, OPENING_NIGHT).await, 2);

    // But no more than a login may have: one session after the other would get it any number of seats.
    let other = Who::session(8);
    let held = reserve(&app, &other, &order(OPENING_NIGHT, 2)).await.id();
    confirm(&app, &Who::user("ann").before(8), &held).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
    assert_eq!(find(&app, &other, &held).await.body["status"], "Held", "the session may still buy it");
    assert_eq!(confirm(&app, &other, &held).await.status, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_of_two_buyers_is_two_orders() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[]).await;
    let wanted = with_key(OPENING_NIGHT, 1, "k1");
    let buyers = [Who::user("ann"), Who::user("bob"), Who::session(7)];
    let mut ids = BTreeSet::new();
    for who in &buyers {
        let (first, second) = (book(&app, who, &wanted).await, book(&app, who, &wanted).await);
        assert_eq!((first.status, second.status, first.id()), (201, 201, second.id()));
        assert!(!first.headers.contains_key("idempotent-replayed"));
        assert!(second.headers.contains_key("idempotent-replayed"));
        ids.insert(first.id());
        let other = book(&app, who, &with_key(OPENING_NIGHT, 2, "k1")).await;
        assert_eq!((other.status, other.code()), (409, "IDEMPOTENCY_KEY_REUSED"));
    }
    assert_eq!(ids.len(), 3);
    // A buyer who logs in keeps the order, also under a key that somebody else had taken.
    let again = book(&app, &Who::user("eve").before(7), &wanted).await;
    assert!(again.headers.contains_key("idempotent-replayed") && ids.contains(&again.id()));
    // Pods of version 0.1 and what is inside know the key as it is.
    assert!(ids.contains(&book(&app, &inside(), &wanted).await.id()));
    assert_eq!(taken(&postgres, OPENING_NIGHT).await, 3);

    // All at once.
    let wanted = with_key(OPENING_NIGHT, 1, "k2");
    let orders = (0..40).map(|nth: usize| {
        let (app, who, wanted) = (&app, &buyers[nth % 2], &wanted);
        async move {
            loop {
                let answer = book(app, who, wanted).await;
                match answer.status {
                    201 => return (nth % 2, answer.id()),
                    // Too many of one buyer at once, or a conflict that outlasts the retries.
                    429 | 503 => tokio::task::yield_now().await,
                    other => panic!("status {other}: {}", answer.body),
                }
            }
        }
    });
    let ids: BTreeSet<_> = join_all(orders).await.into_iter().collect();
    assert_eq!(ids.len(), 2, "{ids:?}");
    assert_eq!(taken(&postgres, OPENING_NIGHT).await, 5);
}

/// In the middle of an update, an answer of a pod of version 0.1 gets lost, and the order comes again to a new one.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_a_pod_of_the_version_before_took_is_not_made_again() {
    const BY_0_1: &str = "
        WITH taken AS (UPDATE events SET available = available - $3, version = version + 1 WHERE id::text = $1 RETURNING id)
        INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key)
        SELECT gen_random_uuid(), id, 'ann', $3, 'Confirmed', $2 FROM taken RETURNING id::text";
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[]).await;
    let client = postgres.connect().await;
    let old: String = client.query_one(BY_0_1, &[&OPENING_NIGHT, &"k", &2]).await.unwrap().get(0);
    let ann = Who::user("ann");
    let again = book(&app, &ann, &with_key(OPENING_NIGHT, 2, "k")).await;
    assert_eq!((again.status, again.id()), (201, old.clone()));
    let other = book(&app, &Who::user("bob"), &with_key(OPENING_NIGHT, 1, "k")).await;
    assert_eq!(other.status, 201, "not the same order: somebody else's");
    assert_ne!(other.id(), old);
    client.batch_execute("UPDATE bookings SET created_at = created_at - interval '61 minutes'").await.unwrap();
    let later = book(&app, &Who::user("eve"), &with_key(OPENING_NIGHT, 2, "k")).await;
    assert_eq!(later.status, 201);
    assert_ne!(later.id(), old, "an update is over by then");

    // And the other way round: what a new pod took, an old one finds under its key.
    let new = book(&app, &ann, &with_key(OPENING_NIGHT, 1, "k3")).await;
    let look_of_0_1 = "SELECT id::text FROM bookings WHERE idempotency_key = $1";
    assert_eq!(client.query_one(look_of_0_1, &[&"k3"]).await.unwrap().get::<_, String>(0), new.id());
    assert!(client.query_one(BY_0_1, &[&OPENING_NIGHT, &"k3", &1]).await.is_err(), "nor does it take it twice");
    client.query_one(BY_0_1, &[&OPENING_NIGHT, &"k4", &1]).await.unwrap();
}

/// However many requests come at once and to whichever pod: nobody gets more seats than a buyer may have.
#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_orders_of_one_buyer_at_once_get_no_more_than_one_buyer_may_have() {
    let postgres = Postgres::start().await;
    let pods = [pod(&postgres, &[]).await, pod(&postgres, &[]).await];
    let before = metrics(&pods[0], "circuit_breaker_opened").await;
    let event = event(&postgres, 10_000).await;
    let ann = [Who::user("ann"), Who::user("ann").before(7), Who::session(7)];
    // Nearly all are refused for want of a place, and come again until they are told that it is enough.
    let orders = (0..200).map(|nth: usize| {
        let (app, who, event) = (&pods[nth % 2], &ann[nth % 3], &event);
        async move {
            loop {
                let answer = book(app, who, &order(event, 1)).await;
                match (answer.status, answer.code()) {
                    (201, _) => return 1,
                    (429, "TOO_MANY_SEATS") => return 0,
                    (429, "TOO_MANY_ORDERS") | (503, _) => tokio::task::yield_now().await,
                    other => panic!("{other:?}: {}", answer.body),
                }
            }
        }
    });
    // The session that has logged in counts with the login, and alone; the login alone knows nothing of the session.
    let bought: i32 = join_all(orders).await.into_iter().sum();
    assert!((10..=20).contains(&bought), "{bought}");
    assert_eq!(taken(&postgres, &event).await, bought);
    let query = "SELECT owner, sum(ticket_count) FROM bookings WHERE event_id::text = $1 GROUP BY 1";
    let of_each = postgres.connect().await.query(query, &[&event]).await.unwrap();
    assert!(of_each.iter().all(|row| row.get::<_, i64>(1) <= 10), "{of_each:?}");

    // All wait for the event at the same moment: nobody is counted before the one in front has its seats.
    let bob = Who::user("bob");
    let (client, watch) = (postgres.connect().await, postgres.connect().await);
    client.execute("BEGIN", &[]).await.unwrap();
    client.execute("SELECT FROM events WHERE id::text = $1 FOR UPDATE", &[&event]).await.unwrap();
    let orders = join_all((0..8).map(|nth: usize| {
        let (app, who, event) = (&pods[nth % 2], &bob, &event);
        async move { reserve(app, who, &order(event, 3)).await }
    }));
    let release = async {
        until_waiting(&watch, 4).await;
        client.execute("COMMIT", &[]).await.unwrap();
    };
    let (answers, ()) = tokio::join!(orders, release);
    let held = answers.iter().filter(|answer| answer.status == 201).count();
    for refused in answers.iter().filter(|answer| answer.status != 201) {
        refused.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
    }
    assert_eq!((held, taken(&postgres, &event).await), (3, bought + 9));
    assert_eq!(metrics(&pods[0], r#"bookings_total{outcome="too_many_seats"}"#).await.len(), 1);
    assert_eq!(metrics(&pods[0], "circuit_breaker_opened").await, before, "no circuit opens");
}

/// A client that does not wait sends its order twice: with all seats that a buyer may have, the second one is no order for more.
#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_comes_twice_at_once_is_not_refused_for_its_own_seats() {
    let postgres = Postgres::start().await;
    let pods = [pod(&postgres, &[]).await, pod(&postgres, &[]).await];
    let event = event(&postgres, 100).await;
    let (holder, watch) = (postgres.connect().await, postgres.connect().await);
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let (ann, wanted) = (Who::user("ann"), with_key(&event, 10, "once"));
    let orders = join_all(pods.iter().map(|pod| book(pod, &ann, &wanted)));
    let release = async {
        until_waiting(&watch, 2).await;
        holder.batch_execute("COMMIT").await.unwrap();
    };
    let (answers, ()) = tokio::join!(orders, release);
    for answer in &answers {
        assert_eq!((answer.status, answer.id()), (201, answers[0].id()), "{}", answer.body);
    }
    assert_eq!(taken(&postgres, &event).await, 10);
}

/// They wait for each other, and would take the places of all others in the queue for the database.
#[tokio::test(flavor = "multi_thread")]
async fn a_buyer_has_few_orders_under_way_at_a_pod() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[]).await;
    let event = event(&postgres, 100).await;
    let (holder, watch) = (postgres.connect().await, postgres.connect().await);
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let (ann, bob, wanted) = (Who::user("ann"), Who::user("bob"), order(&event, 1));
    let orders = join_all([&ann; 4].map(|who| book(&app, who, &wanted)).into_iter().chain([book(&app, &bob, &wanted)]));
    let more = async {
        until_waiting(&watch, 5).await;
        let refused = book(&app, &ann, &wanted).await;
        assert_eq!((refused.status, refused.code()), (429, "TOO_MANY_ORDERS"), "{}", refused.body);
        assert_eq!(
            (&refused.headers["retry-after"], &refused.headers["x-refused"]),
            (&"1".parse().unwrap(), &"asker".parse().unwrap())
        );
        holder.batch_execute("COMMIT").await.unwrap();
    };
    let (answers, ()) = tokio::join!(orders, more);
    assert!(answers.iter().all(|answer| answer.status == 201));
    assert_eq!(book(&app, &ann, &wanted).await.status, 201);
}

/// They are counted one after the other, and none of them has to begin again.
#[tokio::test(flavor = "multi_thread")]
async fn buyers_of_one_network_and_one_event_do_not_disturb_each_other() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[("--seats-per-network", "10000")]).await;
    let event = event(&postgres, 50_000).await;
    let before = metrics(&app, "retry_attempts").await;
    let buyers = (0..20).map(|nth| {
        let (app, event) = (&app, &event);
        async move {
            let who = Who::session(nth).of_network("one");
            for _ in 0..3 {
                let held = reserve(app, &who, &order(event, 2)).await;
                assert_eq!(held.status, 201, "{}", held.body);
                assert_eq!(give_back(app, &who, &held.id()).await.status, 200);
                let bought = book(app, &who, &order(event, 1)).await;
                assert_eq!(bought.status, 201, "{}", bought.body);
            }
        }
    });
    join_all(buyers).await;
    assert_eq!(taken(&postgres, &event).await, 60);
    assert_eq!(metrics(&app, "retry_attempts").await, before);
}

/// One client with a new session for each request emptied an event.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_one_network_cannot_empty_an_event() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[]).await;
    let event = event(&postgres, 50_000).await;
    let statuses: Vec<_> = stream::iter(0..5_000)
        .map(|nth| {
            let (app, event) = (&app, &event);
            async move { reserve(app, &Who::session(nth).of_network("one"), &order(event, 4)).await.status }
        })
        .buffer_unordered(16)
        .collect()
        .await;
    let held = statuses.iter().filter(|status| **status == 201).count();
    assert_eq!((held, taken(&postgres, &event).await), (50, 200));
    let refused = reserve(&app, &Who::session(7_000).of_network("one"), &order(&event, 1)).await;
    let wait = refused.limited_by("TOO_MANY_SEATS", "SEATS_PER_NETWORK");
    assert!((1..=600).contains(&wait), "when the first reservation ends: {wait} s");
    assert_eq!(book(&app, &Who::session(7_001), &order(&event, 1)).await.status, 201, "from elsewhere");
    let login = Who::user("ann").of_network("one");
    assert_eq!(book(&app, &login, &order(&event, 1)).await.status, 201, "with a login");
    assert_eq!(book(&app, &inside(), &order(&event, 10)).await.status, 201, "from inside");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_may_say_how_many_seats_a_buyer_gets() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[("--seats-per-session", "3")]).await;
    let (few, many, other) = (event(&postgres, 100).await, event(&postgres, 100).await, event(&postgres, 100).await);
    let client = postgres.connect().await;
    let limit = "UPDATE events SET seats_per_buyer = $2 WHERE id::text = $1";
    client.execute(limit, &[&few, &2]).await.unwrap();
    client.execute(limit, &[&many, &15]).await.unwrap();
    let (ann, anonymous) = (Who::user("ann"), Who::session(7));
    for who in [&ann, &anonymous] {
        assert_eq!(book(&app, who, &order(&few, 2)).await.status, 201);
        let refused = book(&app, who, &order(&few, 1)).await;
        assert_eq!((refused.status, refused.code()), (429, "TOO_MANY_SEATS"));
    }
    assert_eq!(book(&app, &ann, &order(&many, 10)).await.status, 201);
    assert_eq!(book(&app, &ann, &order(&many, 5)).await.status, 201);
    let wait = book(&app, &ann, &order(&many, 1)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
    assert_eq!(wait, 3_600, "nothing is reserved that could end");
    book(&app, &anonymous, &order(&many, 4)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_SESSION");
    book(&app, &anonymous, &order(&other, 4)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_SESSION");
    let nonsense = client.execute(limit, &[&few, &0]).await;
    assert!(nonsense.is_err(), "the event would be closed to all with a login and open to support");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_buyer_reserves_of_all_events_is_limited() {
    let postgres = Postgres::start().await;
    let app = pod(&postgres, &[("--held-seats-per-buyer", "5")]).await;
    let (one, two) = (event(&postgres, 100).await, event(&postgres, 100).await);
    let ann = Who::user("ann");
    let first = reserve(&app, &ann, &order(&one, 3)).await.id();
    let wait = reserve(&app, &ann, &order(&two, 3)).await.limited_by("TOO_MANY_SEATS", "HELD_SEATS_PER_BUYER");
    assert!((500..=600).contains(&wait), "{wait}");
    assert_eq!(book(&app, &ann, &order(&two, 3)).await.status, 201, "what is bought is not held");
    assert_eq!(confirm(&app, &ann, &first).await.status, 201);
    assert_eq!(reserve(&app, &ann, &order(&two, 3)).await.status, 201);
}

/// The seats of an event were kept from others by a buyer who reserved them again and again.
#[tokio::test(flavor = "multi_thread")]
async fn reservations_are_not_renewed_for_ever() {
    let postgres = Postgres::start().await;
    let limits = [("--holds-per-buyer", "3"), ("--holds-per-network", "5"), ("--expire-every-seconds", "1")];
    let app = pod(&postgres, &limits).await;
    let (event, other) = (event(&postgres, 100).await, event(&postgres, 100).await);
    let client = postgres.connect().await;
    let ann = Who::user("ann");
    let bought = reserve(&app, &ann, &order(&event, 1)).await.id();
    assert_eq!(confirm(&app, &ann, &bought).await.status, 201, "what is bought does not count");
    let mut first = String::new();
    for nth in 0..3 {
        let id = reserve(&app, &ann, &order(&event, 1)).await.id();
        if nth == 0 {
            // One runs out, the others are given back.
            let over = "UPDATE bookings SET held_until = now() - interval '1 second' WHERE id::text = $1";
            client.execute(over, &[&id]).await.unwrap();
            eventually("it runs out", async || {
                (find(&app, &ann, &id).await.body["cancelReason"] == "expired").then_some(())
            })
            .await;
            first = id;
        } else {
            assert_eq!(give_back(&app, &ann, &id).await.status, 200);
        }
    }
    let wait = reserve(&app, &ann, &order(&event, 1)).await.limited_by("TOO_MANY_RESERVATIONS", "HOLDS_PER_BUYER");
    assert_eq!(wait, 3_600);
    assert_eq!(book(&app, &ann, &order(&event, 1)).await.status, 201, "buying is another matter");
    assert_eq!(reserve(&app, &ann, &order(&other, 1)).await.status, 201, "and so is another event");
    let age = "UPDATE bookings SET created_at = now() - interval '6 hours' + interval '30 seconds' WHERE id::text = $1";
    client.execute(age, &[&first]).await.unwrap();
    let wait = reserve(&app, &ann, &order(&event, 1)).await.limited_by("TOO_MANY_RESERVATIONS", "HOLDS_PER_BUYER");
    assert!((1..=30).contains(&wait), "{wait}");
    client.execute(&age.replace("+ interval '30 seconds'", ""), &[&first]).await.unwrap();
    assert_eq!(reserve(&app, &ann, &order(&event, 1)).await.status, 201, "it counts no more");

    for nth in 0..5 {
        let who = Who::session(nth).of_network("one");
        let id = reserve(&app, &who, &order(&event, 1)).await.id();
        assert_eq!(give_back(&app, &who, &id).await.status, 200);
    }
    let next = Who::session(99).of_network("one");
    reserve(&app, &next, &order(&event, 1)).await.limited_by("TOO_MANY_RESERVATIONS", "HOLDS_PER_NETWORK");
    assert_eq!(reserve(&app, &Who::session(100), &order(&event, 1)).await.status, 201, "from elsewhere");
}

/// Who has a list of cards tries them here no longer.
#[tokio::test(flavor = "multi_thread")]
async fn payments_are_not_declined_for_ever() {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let payment = App::payment(&postgres, &providers).await;
    let url = format!("http://{}", payment.address);
    let limits = [("--declines-per-buyer", "2"), ("--declines-per-network", "3")];
    let settings = [("--payment-url", url.as_str()), ("--charge-nothing", "no")];
    let app = pod(&postgres, &[limits, settings].concat()).await;
    for provider in ["stripe", "paypal"] {
        providers.behave(provider, json!({"decline": true})).await;
    }
    let declined = async |who: &Who| book(&app, who, &order(OPENING_NIGHT, 1)).await;
    let ann = Who::user("ann");
    let held = reserve(&app, &ann, &order(OPENING_NIGHT, 1)).await.id();
    for _ in 0..2 {
        assert_eq!(declined(&ann).await.status, 402);
    }
    let wait = declined(&ann).await.limited_by("TOO_MANY_DECLINED_PAYMENTS", "DECLINES_PER_BUYER");
    assert!((3_000..=3_600).contains(&wait), "{wait}");
    confirm(&app, &ann, &held).await.limited_by("TOO_MANY_DECLINED_PAYMENTS", "DECLINES_PER_BUYER");
    assert_eq!(find(&app, &ann, &held).await.body["status"], "Held", "it is kept for its time");
    let free = event(&postgres, 10).await;
    assert_eq!(book(&app, &ann, &order(&free, 1)).await.status, 201, "nothing is to be paid");
    assert_eq!(declined(&Who::user("bob")).await.status, 402, "others may try");
    for nth in 0..3 {
        assert_eq!(declined(&Who::session(nth).of_network("one")).await.status, 402);
    }
    let next = Who::session(9).of_network("one");
    declined(&next).await.limited_by("TOO_MANY_DECLINED_PAYMENTS", "DECLINES_PER_NETWORK");

    let client = postgres.connect().await;
    let hour = "UPDATE bookings SET pending_since = pending_since - interval '1 hour' WHERE cancel_reason = 'declined'";
    client.batch_execute(hour).await.unwrap();
    for provider in ["stripe", "paypal"] {
        providers.behave(provider, json!({})).await;
    }
    assert_eq!(confirm(&app, &ann, &held).await.status, 201, "an hour later");
    // Payments that are under way may be declined, too: cards are not tried side by side.
    let wait =
        "UPDATE bookings SET status = 'PaymentPending', settle_at = now() + interval '1 hour' WHERE id::text = $1";
    client.execute(wait, &[&held]).await.unwrap();
    let again = confirm(&app, &ann, &held).await;
    assert_eq!((again.status, again.id()), (202, held), "asked again, it is the same");
    assert_eq!(declined(&ann).await.status, 201);
    client
        .batch_execute(
            "UPDATE bookings SET status = 'PaymentPending', settle_at = now() + interval '1 hour'
                          WHERE status = 'Confirmed' AND amount_cents > 0",
        )
        .await
        .unwrap();
    assert_eq!(declined(&ann).await.limited_by("TOO_MANY_DECLINED_PAYMENTS", "DECLINES_PER_BUYER"), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paid_for_later_stays_its_buyers() {
    let postgres = Postgres::start().await;
    let providers = Providers::start();
    let address = nobody().await;
    let url = format!("http://{address}");
    let app = App::booking_with(&postgres, &[("--payment-url", &url), ("--charge-nothing", "no")]).await;
    let mut policy = patient();
    let payment = DependencySettings { fallback: vec![FallbackSettings::Queue], ..DependencySettings::default() };
    policy.dependencies.insert("payment".to_owned(), payment);
    app.push(policy, FlagsSettings::default()).await;
    let (before, ann, bob) = (Who::session(7), Who::user("ann").before(7), Who::user("bob"));
    let held = reserve(&app, &before, &order(OPENING_NIGHT, 1)).await.id();
    let later = confirm(&app, &ann, &held).await;
    assert_eq!((later.status, later.body["status"].as_str()), (202, Some("PaymentPending")));
    assert_eq!(find(&app, &bob, &held).await.status, 404);
    let payment = App::payment_at(address.port(), &postgres, &providers).await;
    eventually("it is settled", async || {
        (find(&app, &Who::user("ann"), &held).await.body["status"] == "Confirmed").then_some(())
    })
    .await;
    assert_eq!(providers.charged(&held).await, ["stripe"]);
    assert_eq!((find(&app, &bob, &held).await.status, confirm(&app, &bob, &held).await.status), (404, 404));
    drop(payment);
}

/// An index waits for a report, for hours. Without it each order would read the whole table, so nobody is counted.
#[tokio::test(flavor = "multi_thread")]
async fn orders_do_not_wait_for_the_indexes_of_limits() {
    let postgres = Postgres::start().await;
    let report = postgres.connect().await;
    report.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();
    let app = App::booking_at(&postgres.url(), &[("--seats-per-buyer", "1")]).await;
    app.push(patient(), FlagsSettings::default()).await;
    let is_degraded = |check: &CheckReport| check.status == CheckStatus::Degraded && check.message.contains("step 43");
    app.check("buyer-limits", "it says so", is_degraded).await;
    let ann = Who::user("ann");
    let id = book(&app, &ann, &order(OPENING_NIGHT, 2)).await.id();
    assert_eq!(find(&app, &ann, &id).await.status, 200);
    assert_eq!(find(&app, &Who::user("bob"), &id).await.status, 404, "but all is kept apart already");
    report.batch_execute("COMMIT").await.unwrap();
    app.check("buyer-limits", "buyers are counted", is_healthy).await;
    book(&app, &ann, &order(OPENING_NIGHT, 1)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
}

/// A report that reads the table keeps the step out that adds whose a booking is, for hours: a sale goes on as before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sale_goes_on_while_the_table_does_not_say_whose_a_booking_is() {
    let postgres = Postgres::start().await;
    let steps = VERSION_0_1.iter().enumerate().map(|(nth, sql)| {
        let record = "INSERT INTO schema_migrations (service, version, name) VALUES ('booking'";
        format!("{sql}; {record}, {}, 'x');", nth + 1)
    });
    let table = "CREATE TABLE schema_migrations (service text NOT NULL, version integer NOT NULL, name text NOT NULL,
                 applied_at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (service, version));";
    let client = postgres.connect().await;
    client.batch_execute(&std::iter::once(table.to_owned()).chain(steps).collect::<String>()).await.unwrap();
    let report = postgres.connect().await;
    report.batch_execute("BEGIN; SELECT FROM events LIMIT 1").await.unwrap();
    let app = App::booking_at(&postgres.url(), &[("--seats-per-buyer", "4")]).await;
    app.push(patient(), FlagsSettings::default()).await;
    let waits = |check: &CheckReport| check.message.contains("step 12 (buyers)");
    app.check("schema", "it says for whom it waits", waits).await;
    let ann = Who::user("ann");
    let wanted = with_key(OPENING_NIGHT, 6, "k");
    let (first, again) = (book(&app, &ann, &wanted).await, book(&app, &ann, &wanted).await);
    assert_eq!((first.status, again.status, first.id()), (201, 201, again.id()));
    assert_eq!(find(&app, &ann, &first.id()).await.status, 200);
    let (held, other) =
        (reserve(&app, &ann, &order(OPENING_NIGHT, 1)).await, reserve(&app, &ann, &order(OPENING_NIGHT, 1)).await);
    assert_eq!(confirm(&app, &ann, &held.id()).await.status, 201);
    assert_eq!(give_back(&app, &ann, &other.id()).await.status, 200);
    app.check("database", "its sessions can be worked with", is_healthy).await;
    report.batch_execute("COMMIT").await.unwrap();
    app.check("buyer-limits", "buyers are counted", is_healthy).await;
    assert_eq!(book(&app, &ann, &wanted).await.id(), first.id(), "the same order after the step");
    let mine = reserve(&app, &ann, &order(OPENING_NIGHT, 4)).await.id();
    assert_eq!(find(&app, &Who::user("bob"), &mine).await.status, 404);
    assert_eq!(find(&app, &Who::user("bob"), &first.id()).await.status, 200, "what was booked before is nobody's");
    reserve(&app, &ann, &order(OPENING_NIGHT, 1)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
}

#[tokio::test(flavor = "multi_thread")]
async fn buyers_are_told_apart_through_pgbouncer_in_transaction_mode() {
    let postgres = Postgres::start().await;
    let pooler = PgBouncer::start(&postgres).await;
    let app = App::booking_at(&pooler.url(), &[("--database-pooler", "transaction")]).await;
    app.push(patient(), FlagsSettings::default()).await;
    app.check("buyer-limits", "buyers are counted", is_healthy).await;
    let (ann, anonymous) = (Who::user("ann").before(1), Who::session(7));
    let id = reserve(&app, &ann, &order(OPENING_NIGHT, 6)).await.id();
    assert_eq!(find(&app, &anonymous, &id).await.status, 404);
    reserve(&app, &ann, &order(OPENING_NIGHT, 6)).await.limited_by("TOO_MANY_SEATS", "SEATS_PER_BUYER");
    assert_eq!(confirm(&app, &ann, &id).await.status, 201);
    assert_eq!(book(&app, &anonymous, &order(OPENING_NIGHT, 4)).await.status, 201);
}
