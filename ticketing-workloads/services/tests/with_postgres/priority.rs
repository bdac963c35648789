//! What finishes a sale goes before what starts one, and that before what only looks: at the gateway, in booking, in its pool.

use crate::support::app::{App, OPENING_NIGHT, order, quick_policy};
use crate::support::pooled::{POOL, Pooled};
use crate::support::postgres::{Postgres, settings};
use crate::support::{eventually, nobody, within};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::{Json, Router};
use contract::{BulkheadSettings, FlagsSettings, PolicySettings};
use futures::future::join_all;
use resilience::{Priority, priority};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use ticketing_services::database::{Connection, DatabaseError};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// A booking that is slow with everything but what finishes a sale, and notes how important it is told that requests are.
struct SlowBooking {
    may_go_on: Semaphore,
    heard: Mutex<Vec<(String, String)>>,
}

impl SlowBooking {
    async fn start() -> (Arc<Self>, SocketAddr) {
        let own = Arc::new(Self { may_go_on: Semaphore::new(0), heard: Mutex::default() });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(Self::answer).with_state(Arc::clone(&own));
        tokio::spawn(async move { axum::serve(listener, app).await });
        (own, address)
    }

    async fn answer(State(own): State<Arc<Self>>, method: Method, uri: Uri, headers: HeaderMap) -> Json<Value> {
        let said = headers.get(priority::HEADER).map_or("none", |value| value.to_str().unwrap()).to_owned();
        let finishes = said == "finish";
        own.heard.lock().unwrap().push((format!("{method} {}", uri.path()), said));
        if !finishes {
            own.may_go_on.acquire().await.unwrap().forget();
        }
        Json(json!({"success": true}))
    }

    fn heard(&self, what: &str) -> Vec<String> {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|(request, _)| request == what).map(|(_, said)| said.clone()).collect()
    }
}

async fn metric(app: &App, name: &str) -> u64 {
    let text = app.metrics().await;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or(0)
}

/// Waits until so many calls are in a bulkhead, and so many wait for it.
async fn until_full(app: &App, bulkhead: &str, in_use: u64, queued: u64) {
    let now = async |what: &str| metric(app, &format!("bulkhead_{what}{{bulkhead=\"{bulkhead}\"}}")).await;
    eventually("the bulkhead is as full as that", async || {
        ((now("in_use").await, now("queued").await) == (in_use, queued)).then_some(())
    })
    .await;
}

async fn error_code(answer: reqwest::Response) -> (u16, String, String) {
    let retry_after = answer.headers().get("retry-after").map_or("", |value| value.to_str().unwrap()).to_owned();
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    (status, body["errorCode"].as_str().unwrap_or_default().to_owned(), retry_after)
}

/// Buyers who ask again and again how their order stands, and a booking that takes its time: who confirms still gets through.
#[tokio::test(flavor = "multi_thread")]
async fn at_the_gateway_a_crowd_of_looks_delays_no_confirmation() {
    let (booking, address) = SlowBooking::start().await;
    let gateway = Arc::new(App::gateway(nobody().await, address).await);
    let mut policy = PolicySettings::default();
    let small = BulkheadSettings { max_concurrent: 8, max_queued: 4, max_wait_ms: 60_000 };
    policy.bulkheads.insert("booking".to_owned(), small);
    gateway.push(policy, FlagsSettings::default()).await;
    let confirm = "/api/reservations/11111111-1111-4111-8111-111111111111/confirm";
    let look = |index: usize| {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { gateway.get(&format!("/api/bookings/{index}")).await })
    };
    let start = || {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move { gateway.post(&order(OPENING_NIGHT, 1)).await })
    };

    // Looks have half of it.
    let first: Vec<_> = (0..4).map(look).collect();
    until_full(&gateway, "booking", 4, 0).await;
    let mut waiting = Vec::new();
    for index in 4..8 {
        waiting.push(look(index));
        until_full(&gateway, "booking", 4, index as u64 - 3).await;
    }
    let full = error_code(gateway.get("/api/bookings/8").await).await;
    assert_eq!(full, (503, "TOO_MANY_REQUESTS_UNDER_WAY".to_owned(), "1".to_owned()), "among equals");
    assert_eq!(gateway.post_to(confirm, &json!({})).await.status(), 200);
    assert_eq!(gateway.delete(confirm.strip_suffix("/confirm").unwrap()).await.status(), 200);

    // Orders have some of the rest, and the places of looks in the queue.
    let orders: Vec<_> = (0..2).map(|_| start()).collect();
    until_full(&gateway, "booking", 6, 4).await;
    let one_more = start();
    let youngest = waiting.pop().unwrap();
    let shed = error_code(youngest.await.unwrap()).await;
    assert_eq!(shed, (503, "GAVE_WAY".to_owned(), "5".to_owned()));
    assert_eq!(gateway.post_to(confirm, &json!({})).await.status(), 200);
    let refused = error_code(gateway.get("/api/bookings/9").await).await;
    assert_eq!(refused.1, "GAVE_WAY", "one that is more important waits");

    let shed = async |priority: &str| {
        metric(&gateway, &format!("bulkhead_shed_total{{bulkhead=\"booking\",priority=\"{priority}\"}}")).await
    };
    assert_eq!((shed("look").await, shed("start").await, shed("finish").await), (3, 0, 0));
    assert_eq!(metric(&gateway, "bulkhead_rejected_total{bulkhead=\"booking\",reason=\"shed\"}").await, 2);
    assert_eq!(metric(&gateway, "bulkhead_rejected_total{bulkhead=\"booking\",reason=\"full\"}").await, 1);

    booking.may_go_on.add_permits(1_000);
    for answer in join_all(first.into_iter().chain(waiting).chain(orders).chain([one_more])).await {
        assert_eq!(answer.unwrap().status(), 200, "nobody is lost who was let wait");
    }
    assert_eq!(metric(&gateway, "circuit_breaker_opened_total{service=\"booking\"}").await, 0);
    assert_eq!(booking.heard(&format!("POST {confirm}")), ["finish", "finish"]);
    assert_eq!(booking.heard("POST /api/bookings"), ["start"; 3]);
    assert_eq!(booking.heard("GET /api/bookings/0"), ["look"]);
}

/// Else everybody would be the first.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_outside_says_how_important_a_request_is() {
    let (booking, address) = SlowBooking::start().await;
    booking.may_go_on.add_permits(9);
    let gateway = App::gateway(nobody().await, address).await;
    let url = format!("http://{}/api/bookings/1", gateway.address);
    let answer = gateway.client.get(url).header(priority::HEADER, "finish").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(booking.heard("GET /api/bookings/1"), ["look"]);
}

/// Holds a reservation of the first event.
async fn reserve(app: &App) -> String {
    let answer = app.post_to("/api/reservations", &order(OPENING_NIGHT, 1)).await;
    assert_eq!(answer.status(), 201);
    answer.json::<Value>().await.unwrap()["bookingId"].as_str().unwrap().to_owned()
}

/// 200 buyers poll how their order stands, without a break, beside 20 who confirm: more than booking may ask its database at
/// once, and more than may wait for it. Who polls is refused, and never who confirms.
#[tokio::test(flavor = "multi_thread")]
async fn polling_buyers_shed_no_confirmation() {
    let postgres = Postgres::start().await;
    let app = Arc::new(App::start(&postgres, "booking-1").await);
    // Of a busy machine, nobody is refused for the time alone.
    let mut policy = quick_policy();
    let database = policy.dependencies.get_mut("database").unwrap();
    (database.timeout.request_ms, database.timeout.per_try_ms) = (30_000, 30_000);
    let critical = BulkheadSettings { max_concurrent: 10, max_queued: 50, max_wait_ms: 30_000 };
    policy.bulkheads.insert("critical".to_owned(), critical);
    app.push(policy, FlagsSettings::default()).await;
    let mut reservations = Vec::new();
    for _ in 0..20 {
        reservations.push(reserve(&app).await);
    }
    let over = Arc::new(AtomicBool::new(false));
    let pollers: Vec<_> = (0..200)
        .map(|index| {
            let (app, over, id) = (Arc::clone(&app), Arc::clone(&over), reservations[index % 20].clone());
            tokio::spawn(async move {
                let mut refusals = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let answer = app.get(&format!("/api/bookings/{id}")).await;
                    if answer.status() != 200 {
                        refusals.push(error_code(answer).await);
                        // More patient than it could be, and far less than it is told to be.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                refusals
            })
        })
        .collect();
    // It may have been opened before there was a schema.
    let opened = async || metric(&app, "circuit_breaker_opened_total{service=\"database\"}").await;
    let before = opened().await;
    let shed = async |priority: &str| {
        metric(&app, &format!("bulkhead_shed_total{{bulkhead=\"critical\",priority=\"{priority}\"}}")).await
    };
    within(Duration::from_secs(30), "pollers are refused", async || (shed("look").await > 100).then_some(())).await;
    let confirm = |id: &String| {
        let (app, path) = (Arc::clone(&app), format!("/api/reservations/{id}/confirm"));
        async move { app.post_to(&path, &json!({})).await.status().as_u16() }
    };
    // In two rushes, so that more want to confirm at once than slots are kept for them.
    for rush in reservations.chunks(10) {
        assert_eq!(join_all(rush.iter().map(confirm)).await, [201; 10]);
    }
    assert_eq!(shed("finish").await, 0);
    over.store(true, Ordering::Relaxed);
    for poller in pollers {
        for (status, code, _) in poller.await.unwrap() {
            assert_eq!(status, 503);
            assert!(["TOO_MANY_REQUESTS_UNDER_WAY", "GAVE_WAY"].contains(&code.as_str()), "{code}");
        }
    }
    assert_eq!(opened().await, before, "nothing has failed");
}

/// The flag bounds what is begun: what holds seats already can be bought, however many wait to take some.
#[tokio::test(flavor = "multi_thread")]
async fn the_flag_keeps_room_for_what_is_to_be_finished() {
    let postgres = Postgres::start().await;
    let app = Arc::new(App::start(&postgres, "booking-1").await);
    let id = reserve(&app).await;
    let flag = |limit: u32| {
        let flag = json!({"state": "ENABLED", "variants": {"most": limit}, "defaultVariant": "most"});
        serde_json::from_value::<FlagsSettings>(json!({"flags": {"MaxConcurrentBookings": flag}})).unwrap()
    };
    let mut policy = quick_policy();
    let database = policy.dependencies.get_mut("database").unwrap();
    (database.timeout.request_ms, database.timeout.per_try_ms) = (30_000, 30_000);
    app.push(policy.clone(), flag(1)).await;
    let holder = postgres.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let begun = app.book_in_the_background(1);
    eventually("it is under way", async || (app.health().await.load.in_flight == 1).then_some(())).await;
    let more = error_code(app.post(&order(OPENING_NIGHT, 1)).await).await;
    assert_eq!((more.0, more.1.as_str()), (503, "TOO_MANY_BOOKINGS"));
    let confirm = format!("/api/reservations/{id}/confirm");
    assert_eq!(app.post_to(&confirm, &json!({})).await.status(), 201);
    app.push(policy, flag(0)).await;
    let none = error_code(app.post_to(&confirm, &json!({})).await).await;
    assert_eq!((none.0, none.1.as_str()), (503, "TOO_MANY_BOOKINGS"), "nothing at all is nothing at all");
    holder.batch_execute("ROLLBACK").await.unwrap();
    for one in begun {
        assert!([201, 503].contains(&one.await.unwrap()));
    }
}

/// Nor may those who wait for seats have all that booking may ask its database at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_rush_of_orders_leaves_slots_for_what_is_to_be_finished() {
    let postgres = Postgres::start().await;
    let app = Arc::new(App::start(&postgres, "booking-1").await);
    let id = reserve(&app).await;
    let mut policy = quick_policy();
    let database = policy.dependencies.get_mut("database").unwrap();
    (database.timeout.request_ms, database.timeout.per_try_ms) = (30_000, 30_000);
    let critical = BulkheadSettings { max_concurrent: 8, max_queued: 50, max_wait_ms: 30_000 };
    policy.bulkheads.insert("critical".to_owned(), critical);
    app.push(policy, FlagsSettings::default()).await;
    let holder = postgres.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let begun = app.book_in_the_background(9);
    until_full(&app, "critical", 6, 3).await;
    let confirm = app.post_to(&format!("/api/reservations/{id}/confirm"), &json!({})).await;
    assert_eq!(confirm.status(), 201, "while all of them wait");
    holder.batch_execute("ROLLBACK").await.unwrap();
    for one in begun {
        assert_eq!(one.await.unwrap(), 201);
    }
}

/// A pool would hand its connections out as they were asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_used_up_serves_the_more_important_first() {
    let postgres = Postgres::start().await;
    let pool = Arc::new(Pooled::new(&settings(&["--database-url", &postgres.url()])));
    let (may_end, order, under_way) =
        (Arc::new(Semaphore::new(0)), Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
    let attempt = |priority: Priority, name: &'static str| {
        let (pool, may_end, order) = (Arc::clone(&pool), Arc::clone(&may_end), Arc::clone(&order));
        let under_way = Arc::clone(&under_way);
        tokio::spawn(priority::within(priority, async move {
            let work = |connection: Connection| {
                let (may_end, order, under_way) = (Arc::clone(&may_end), Arc::clone(&order), Arc::clone(&under_way));
                async move {
                    order.lock().unwrap().push(name);
                    under_way.fetch_add(1, Ordering::SeqCst);
                    connection.simple_query("SELECT 1").await?;
                    may_end.acquire().await.unwrap().forget();
                    Ok::<_, DatabaseError>(())
                }
            };
            pool.database.attempt(work).await
        }))
    };
    let mut all: Vec<_> = (0..POOL).map(|_| attempt(Priority::Look, "first")).collect();
    let at_work = async |count: usize| {
        eventually("they are at work", async || (under_way.load(Ordering::SeqCst) == count).then_some(())).await;
    };
    at_work(usize::from(POOL)).await;
    let arrivals = [(Priority::Look, "look"), (Priority::Start, "start"), (Priority::Finish, "finish")];
    for (waiting, (priority, name)) in arrivals.into_iter().chain(arrivals).enumerate() {
        all.push(attempt(priority, name));
        eventually("it waits", async || (pool.database.waiting() as usize == waiting + 1).then_some(())).await;
    }
    for done in 1..=arrivals.len() * 2 {
        may_end.add_permits(1);
        at_work(usize::from(POOL) + done).await;
    }
    may_end.add_permits(usize::from(POOL));
    for one in all {
        one.await.unwrap().unwrap();
    }
    let order = order.lock().unwrap();
    assert_eq!(order[usize::from(POOL)..], ["finish", "finish", "start", "start", "look", "look"]);
}

/// Takes payments, as slowly as it is told, and notes how many there were at once.
#[derive(Default)]
struct SlowPayment {
    under_way: AtomicUsize,
    most: AtomicUsize,
    said: Mutex<Vec<String>>,
}

impl SlowPayment {
    async fn start() -> (Arc<Self>, SocketAddr) {
        let own = Arc::new(Self::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = Router::new().fallback(Self::pay).with_state(Arc::clone(&own));
        tokio::spawn(async move { axum::serve(listener, app).await });
        (own, address)
    }

    async fn pay(State(own): State<Arc<Self>>, headers: HeaderMap) -> (StatusCode, Json<Value>) {
        let said = headers.get(priority::HEADER).map_or("none", |value| value.to_str().unwrap()).to_owned();
        own.said.lock().unwrap().push(said);
        let now = own.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        own.most.fetch_max(now, Ordering::SeqCst);
        // As a provider takes its time.
        tokio::time::sleep(Duration::from_secs(1)).await;
        own.under_way.fetch_sub(1, Ordering::SeqCst);
        (StatusCode::OK, Json(json!({"status": "Succeeded"})))
    }
}

/// Orders whose payment was put off under high load: they are paid side by side, as those are that are paid at once.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_off_is_paid_side_by_side() {
    let postgres = Postgres::start().await;
    let (payment, address) = SlowPayment::start().await;
    let booking = App::paid_booking(&postgres, address).await;
    let client = postgres.connect().await;
    client
        .batch_execute(&format!(
            "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, amount_cents, settle_at)
             SELECT gen_random_uuid(), '{OPENING_NIGHT}', 'ann', 1, 'PaymentPending', 'put off ' || n, 4500, now()
             FROM generate_series(1, 80) n"
        ))
        .await
        .unwrap();
    within(Duration::from_secs(30), "all are paid", async || {
        let pending = "SELECT count(*) FROM bookings WHERE status = 'PaymentPending'";
        (client.query_one(pending, &[]).await.unwrap().get::<_, i64>(0) == 0).then_some(())
    })
    .await;
    assert_eq!(payment.most.load(Ordering::SeqCst), 20);
    let said = payment.said.lock().unwrap();
    assert_eq!((said.len(), said.iter().all(|said| said == "finish")), (80, true));
    drop(booking);
}
