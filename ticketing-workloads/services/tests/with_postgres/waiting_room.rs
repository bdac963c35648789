//! The waiting room: gateways and booking over their real ports, numbers in a real database.

use crate::support::app::{App, OPENING_NIGHT, order, quick_policy, token_of};
use crate::support::postgres::Postgres;
use crate::support::{eventually, nobody};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use contract::{CheckStatus, FlagsSettings, HealthCheckSettings, PolicySettings, WaitingRoomSettings};
use futures::future::join_all;
use reqwest::Response;
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;
use tempfile::NamedTempFile;

const KEY: &str = "the key of all gateways, for tests only";

fn key(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// A room that opens at the first order under way and does not close by itself.
fn room() -> WaitingRoomSettings {
    WaitingRoomSettings {
        enter_load_percent: 90,
        exit_load_percent: 0,
        exit_for_ms: 3_600_000,
        min_admit_per_second: 1,
        max_admit_per_second: 1,
        ..WaitingRoomSettings::default()
    }
}

fn policy(room: WaitingRoomSettings) -> PolicySettings {
    let check = HealthCheckSettings { interval_ms: 100, timeout_ms: 500, ..Default::default() };
    let health_checks = [("waiting-room".to_owned(), check)].into();
    PolicySettings { waiting_room: Some(room), health_checks, ..Default::default() }
}

/// A gateway with a key that runs by this.
async fn gateway(booking: &App, key: &NamedTempFile, room: WaitingRoomSettings) -> App {
    let gateway =
        App::gateway_with(booking.address, &[("--waiting-room-key-file", key.path().to_str().unwrap())]).await;
    gateway.push(policy(room), FlagsSettings::default()).await;
    gateway
}

/// What another gateway would tell booking.
async fn report(booking: &App, room: &WaitingRoomSettings, load_percent: u32, arrivals: u32) -> Value {
    let report = json!({"settings": room, "loadPercent": load_percent, "arrivals": arrivals});
    let answer = booking.post_to("/internal/waiting-room", &report).await;
    assert_eq!(answer.status(), 200);
    answer.json().await.unwrap()
}

async fn is_open(gateway: &App, open: bool) {
    let line = format!("waiting_room_open {}", i32::from(open));
    eventually(&line, async || {
        let metrics = gateway.metrics().await;
        metrics.lines().any(|found| found == line).then_some(())
    })
    .await;
}

/// Orders one ticket, on this place.
async fn buy(gateway: &App, event: &str, place: Option<&str>) -> Response {
    buy_as("ann", gateway, event, place).await
}

async fn buy_as(buyer: &str, gateway: &App, event: &str, place: Option<&str>) -> Response {
    let url = format!("http://{}/api/bookings", gateway.address);
    let request = gateway.client.post(url).bearer_auth(token_of(buyer)).body(order(event, 1).to_string());
    let request = place.into_iter().fold(request, |request, place| request.header("x-place", place));
    request.send().await.unwrap()
}

async fn standing(gateway: &App, place: &str) -> Value {
    standing_of("ann", gateway, place).await
}

async fn standing_of(buyer: &str, gateway: &App, place: &str) -> Value {
    let url = format!("http://{}/api/waiting-room", gateway.address);
    let cookie = format!("other=1; ticketwave-place={place}");
    gateway
        .client
        .get(url)
        .bearer_auth(token_of(buyer))
        .header("cookie", cookie)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap()
}

fn place(answer: &Response) -> String {
    answer.headers()["x-place"].to_str().unwrap().to_owned()
}

fn number(place: &str) -> u64 {
    let bytes = URL_SAFE_NO_PAD.decode(place).unwrap();
    u64::from_be_bytes(bytes[17..25].try_into().unwrap())
}

async fn code(answer: Response) -> String {
    answer.json::<Value>().await.unwrap()["errorCode"].as_str().unwrap_or_default().to_owned()
}

/// One order of arrival, whichever gateway one comes to, and nobody loses his place when a process ends.
#[tokio::test(flavor = "multi_thread")]
async fn arrivals_at_all_gateways_have_one_order_that_outlives_them() {
    let postgres = Postgres::start().await;
    let port = nobody().await.port().to_string();
    let booking = App::booking_with(&postgres, &[("--port", &port)]).await;
    let key = key(KEY);
    let (one, other) = (gateway(&booking, &key, room()).await, gateway(&booking, &key, room()).await);
    // A crowd at a third one: it takes minutes until they are all let in.
    assert_eq!(report(&booking, &room(), 95, 500).await["first"], 1);
    is_open(&one, true).await;
    is_open(&other, true).await;
    let mut places = Vec::new();
    for gateway in [&one, &other, &one, &other, &other] {
        let answer = buy(gateway, OPENING_NIGHT, None).await;
        assert_eq!(answer.status(), 202);
        let after: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((20..=30).contains(&after), "{after}: they are far back");
        let cookie = answer.headers()["set-cookie"].to_str().unwrap().to_owned();
        places.push(place(&answer));
        assert!(cookie.starts_with(&format!("ticketwave-place={}; Path=/; ", places.last().unwrap())), "{cookie}");
        let said: Value = answer.json().await.unwrap();
        assert_eq!((&said["status"], &said["errorCode"]), (&json!("Waiting"), &json!("WAITING_ROOM")));
        assert_eq!(said["ahead"].as_u64().unwrap() + 1, said["position"].as_u64().unwrap());
        assert!(said["estimateSeconds"].as_u64().unwrap() > 300, "{said}");
    }
    assert_eq!(places.iter().map(|place| number(place)).collect::<Vec<_>>(), [501, 502, 503, 504, 505]);
    // A program without a login and without cookies keeps its place by the key that it is given.
    let bare = reqwest::Client::new();
    let url = |gateway: &App| format!("http://{}/api/bookings", gateway.address);
    let order_of_its_own = order(OPENING_NIGHT, 1).to_string();
    let waits = bare.post(url(&one)).body(order_of_its_own.clone()).send().await.unwrap();
    let (its_key, own) = (waits.headers()["idempotency-key"].clone(), place(&waits));
    assert_eq!((waits.status().as_u16(), number(&own)), (202, 506));
    let again = bare.post(url(&one)).header("idempotency-key", its_key).header("x-place", &own).body(order_of_its_own);
    assert_eq!(place(&again.send().await.unwrap()), own);
    // Who comes again has the same place, at any of them, and is nearer.
    let again = buy(&other, OPENING_NIGHT, Some(&places[0])).await;
    assert_eq!((again.status().as_u16(), place(&again)), (202, places[0].clone()));

    one.end().await;
    booking.end().await;
    let booking = App::booking_with(&postgres, &[("--port", &port)]).await;
    let one = gateway(&booking, &key, room()).await;
    // It asks before it lets anybody in: no look beforehand.
    let answer = buy(&one, OPENING_NIGHT, Some(&places[4])).await;
    assert_eq!((answer.status().as_u16(), place(&answer)), (202, places[4].clone()));
    let standing = standing(&one, &places[1]).await;
    assert_eq!(standing["status"], "Waiting");
    let ahead = standing["ahead"].as_u64().unwrap();
    assert!((300..501).contains(&ahead), "{standing}");
    eventually("it draws again", async || {
        let answer = buy(&other, OPENING_NIGHT, None).await;
        (answer.status() == 202).then(|| assert_eq!(number(&place(&answer)), 507))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_ahead_with_a_place_that_is_not_his_own() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let (ours, others) = (key(KEY), key("a key that our gateways do not know of"));
    let short = WaitingRoomSettings { admission_ttl_ms: 1_000, ..room() };
    let gateway_with_others = gateway(&booking, &others, short.clone()).await;
    let gateway = gateway(&booking, &ours, short.clone()).await;
    report(&booking, &short, 95, 0).await;
    is_open(&gateway, true).await;
    is_open(&gateway_with_others, true).await;
    // The first one; it is his turn within some seconds.
    let first = place(&buy(&gateway, OPENING_NIGHT, None).await);
    let foreign = place(&buy(&gateway_with_others, OPENING_NIGHT, None).await);
    let mut forged = URL_SAFE_NO_PAD.decode(&foreign).unwrap();
    forged[24] = 1;
    report(&booking, &short, 95, 1_000).await;
    eventually("his turn", async || (standing(&gateway, &first).await["status"] == "Admitted").then_some(())).await;
    for bad in [&foreign, &URL_SAFE_NO_PAD.encode(forged), "nothing", &"x".repeat(2_000)] {
        let answer = buy(&gateway, OPENING_NIGHT, Some(bad)).await;
        assert_eq!(answer.status(), 202, "{bad}");
        assert!(number(&place(&answer)) > 1_000, "at the end of the queue");
        assert_eq!(standing(&gateway, bad).await["status"], "NoPlace");
    }
    // Nor with one that somebody sold him.
    let answer = buy_as("bob", &gateway, OPENING_NIGHT, Some(&first)).await;
    assert_eq!((answer.status().as_u16(), number(&place(&answer)) > 1_000), (202, true));
    let metrics = gateway.metrics().await;
    assert!(metrics.contains(r#"waiting_room_orders_total{outcome="not_genuine"} 5"#), "{metrics}");
    // Who does not come has had his turn.
    eventually("it is over", async || (standing(&gateway, &first).await["status"] == "Lapsed").then_some(())).await;
    let late = buy(&gateway, OPENING_NIGHT, Some(&first)).await;
    assert_eq!(late.status(), 202);
    assert!(number(&place(&late)) > 1_000);
    // Numbers of another database are nothing here.
    postgres.connect().await.execute("UPDATE waiting_room SET epoch = gen_random_uuid()", &[]).await.unwrap();
    let last = place(&late);
    eventually("another row", async || (standing(&gateway, &last).await["status"] == "NoPlace").then_some(())).await;
}

/// A place is for some orders, and the ones that there was no room for do not count.
#[tokio::test(flavor = "multi_thread")]
async fn an_admission_is_good_for_some_orders() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let gateway = gateway(&booking, &key(KEY), room()).await;
    report(&booking, &room(), 95, 0).await;
    is_open(&gateway, true).await;
    let first = place(&buy(&gateway, OPENING_NIGHT, None).await);
    report(&booking, &room(), 95, 1_000).await;
    eventually("his turn", async || (standing(&gateway, &first).await["status"] == "Admitted").then_some(())).await;
    let flag = |most: u32| {
        let flag = json!({"state": "ENABLED", "variants": {"most": most}, "defaultVariant": "most"});
        serde_json::from_value::<FlagsSettings>(json!({"flags": {"MaxConcurrentBookings": flag}})).unwrap()
    };
    booking.push(PolicySettings::default(), flag(0)).await;
    for _ in 0..7 {
        assert_eq!(code(buy(&gateway, OPENING_NIGHT, Some(&first)).await).await, "TOO_MANY_BOOKINGS");
    }
    booking.push(PolicySettings::default(), flag(100)).await;
    let mut statuses = Vec::new();
    for _ in 0..7 {
        statuses.push(buy(&gateway, OPENING_NIGHT, Some(&first)).await.status().as_u16());
    }
    // His first order may have been passed on at once.
    assert!(statuses.starts_with(&[201; 4]) && statuses.ends_with(&[202; 2]), "{statuses:?}");
}

/// It opens when orders pile up, lets finishing and looking through, and closes by itself.
#[tokio::test(flavor = "multi_thread")]
async fn it_opens_under_load_and_closes_when_that_is_over() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let slow_policy = || {
        let mut policy = quick_policy();
        let timeout = &mut policy.dependencies.get_mut("database").unwrap().timeout;
        (timeout.per_try_ms, timeout.request_ms) = (10_000, 20_000);
        policy
    };
    booking.push(slow_policy(), FlagsSettings::default()).await;
    let quick = WaitingRoomSettings {
        enter_load_percent: 3,
        exit_load_percent: 1,
        exit_for_ms: 0,
        min_admit_per_second: 5,
        max_admit_per_second: 50,
        ..WaitingRoomSettings::default()
    };
    let gateway = gateway(&booking, &key(KEY), quick).await;
    let held = gateway.post_to("/api/reservations", &order(OPENING_NIGHT, 1)).await;
    assert_eq!(held.status(), 201, "below the load nobody waits");
    assert_eq!(held.headers().get("x-place"), None);
    let id = held.json::<Value>().await.unwrap()["bookingId"].as_str().unwrap().to_owned();

    let holder = postgres.connect().await;
    holder.batch_execute("BEGIN; SELECT FROM events FOR UPDATE").await.unwrap();
    let under_way = gateway.book_in_the_background(3);
    is_open(&gateway, true).await;
    for path in ["/api/bookings", "/api/reservations"] {
        let answer = gateway.post_to(path, &order(OPENING_NIGHT, 1)).await;
        assert_eq!((answer.status().as_u16(), code(answer).await.as_str()), (202, "WAITING_ROOM"), "{path}");
    }
    assert_eq!(gateway.get(&format!("/api/bookings/{id}")).await.status(), 200, "looking does not wait");
    let page = gateway.get("/waiting-room").await;
    assert_eq!(page.status(), 200);
    assert!(page.headers()["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'"));
    holder.batch_execute("ROLLBACK").await.unwrap();
    let confirmed = gateway.post_to(&format!("/api/reservations/{id}/confirm"), &json!({})).await;
    assert_eq!(confirmed.status(), 201, "finishing does not wait");
    for order in under_way {
        assert_eq!(order.await.unwrap(), 201, "who was before it opened goes on");
    }
    is_open(&gateway, false).await;
    let answer = buy(&gateway, OPENING_NIGHT, None).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("x-place")), (201, None));
    assert_eq!(gateway.post_to("/internal/waiting-room", &json!({})).await.status(), 404, "not for the public");
}

/// Without numbers the sale goes on: for ten seconds as it stood, then as if there were no waiting room.
#[tokio::test(flavor = "multi_thread")]
async fn without_numbers_orders_pass_on() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let gateway_away = App::gateway_with(nobody().await, &[]).await;
    let gateway = gateway(&booking, &key(KEY), room()).await;
    report(&booking, &room(), 95, 0).await;
    is_open(&gateway, true).await;
    let first = place(&buy(&gateway, OPENING_NIGHT, None).await);
    report(&booking, &room(), 95, 1_000).await;
    eventually("his turn", async || (standing(&gateway, &first).await["status"] == "Admitted").then_some(())).await;
    let waiting = place(&buy(&gateway, OPENING_NIGHT, None).await);

    let client = postgres.connect().await;
    client.batch_execute("ALTER TABLE waiting_room RENAME TO elsewhere").await.unwrap();
    let newcomer = buy(&gateway, OPENING_NIGHT, None).await;
    assert_eq!(newcomer.status(), 503);
    assert_eq!(newcomer.headers()["retry-after"], "2");
    assert_eq!(code(newcomer).await, "WAITING_ROOM_UNAVAILABLE");
    assert_eq!(buy(&gateway, OPENING_NIGHT, Some(&waiting)).await.status(), 202);
    assert_eq!(buy(&gateway, OPENING_NIGHT, Some(&first)).await.status(), 201, "who was let in orders");
    gateway.check("waiting-room", "it says so", |check| check.status == CheckStatus::Degraded).await;
    eventually("everybody orders", async || (buy(&gateway, OPENING_NIGHT, None).await.status() == 201).then_some(()))
        .await;
    assert_eq!(standing(&gateway, &waiting).await["status"], "NotNeeded");
    client.batch_execute("ALTER TABLE elsewhere RENAME TO waiting_room").await.unwrap();
    eventually("the queue is as it was", async || {
        let answer = buy(&gateway, OPENING_NIGHT, Some(&waiting)).await;
        (answer.status() == 202).then(|| assert_eq!(place(&answer), waiting))
    })
    .await;
    // Nor does a booking that is away altogether make anybody wait.
    gateway_away.push(policy(room()), FlagsSettings::default()).await;
    assert_eq!(code(buy(&gateway_away, OPENING_NIGHT, None).await).await, "BOOKING_UNAVAILABLE");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_or_a_policy_nobody_waits() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let without_key = App::gateway_with(booking.address, &[]).await;
    let key = key(KEY);
    let without_policy =
        App::gateway_with(booking.address, &[("--waiting-room-key-file", key.path().to_str().unwrap())]).await;
    without_key.push(policy(room()), FlagsSettings::default()).await;
    report(&booking, &room(), 95, 1_000).await;
    let check = without_key.check("waiting-room", "degraded", |check| check.status == CheckStatus::Degraded).await;
    assert!(check.message.contains("WAITING_ROOM_KEY_FILE is not set"), "{}", check.message);
    let check = without_policy.check("waiting-room", "off", |check| check.status == CheckStatus::Healthy).await;
    assert!(check.message.starts_with("off"), "{}", check.message);
    for gateway in [&without_key, &without_policy] {
        let answer = buy(gateway, OPENING_NIGHT, None).await;
        assert_eq!((answer.status().as_u16(), answer.headers().get("x-place")), (201, None));
        let said: Value = gateway.get("/api/waiting-room").await.json().await.unwrap();
        assert_eq!((&said["status"], &said["admitted"]), (&json!("NotNeeded"), &json!(true)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn booking_takes_no_report_that_makes_no_sense() {
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    for body in [json!({"arrivals": 10_001}), json!({"arrivals": -1}), json!("x"), json!({"x": "y".repeat(5_000)})] {
        let status = booking.post_to("/internal/waiting-room", &body).await.status();
        assert!(status.is_client_error(), "{status}");
    }
    // Whatever is asked for at the same time, no number is given twice.
    report(&booking, &room(), 95, 0).await;
    let room = room();
    let all = join_all((0..40).map(|_| report(&booking, &room, 95, 3))).await;
    let mut first: Vec<_> = all.iter().map(|view| view["first"].as_u64().unwrap()).collect();
    first.sort_unstable();
    assert_eq!(first, (0..40).map(|nth| nth * 3 + 1).collect::<Vec<_>>());
}

/// Pods of booking write over each other's numbers only with the version that they have read.
#[tokio::test(flavor = "multi_thread")]
async fn several_pods_of_booking_give_no_number_twice() {
    let postgres = Postgres::start().await;
    let pods = [App::booking_with(&postgres, &[]).await, App::booking_with(&postgres, &[]).await];
    let room = room();
    report(&pods[0], &room, 95, 0).await;
    // The schema of the other one.
    eventually("it gives numbers, too", async || {
        let report = json!({"settings": room, "loadPercent": 95, "arrivals": 0});
        (pods[1].post_to("/internal/waiting-room", &report).await.status() == 200).then_some(())
    })
    .await;
    let all = join_all((0..80).map(|nth| report(&pods[nth % 2], &room, 95, 3))).await;
    let mut first: Vec<_> = all.iter().map(|view| view["first"].as_u64().unwrap()).collect();
    first.sort_unstable();
    assert_eq!(first, (0..80).map(|nth| nth * 3 + 1).collect::<Vec<_>>());
}

/// A sold-out night: five times as many buyers as seats, at two gateways.
#[tokio::test(flavor = "multi_thread")]
async fn five_hundred_buyers_come_to_a_hundred_seats_in_order() {
    const BUYERS: usize = 500;
    const SEATS: i32 = 100;
    let postgres = Postgres::start().await;
    let booking = App::booking_with(&postgres, &[]).await;
    let insert = "INSERT INTO events (id, name, capacity, available)
                  VALUES (gen_random_uuid(), 'Night', $1, $1) RETURNING id::text";
    let event: String = postgres.connect().await.query_one(insert, &[&SEATS]).await.unwrap().get(0);
    let settings = WaitingRoomSettings { min_admit_per_second: 40, max_admit_per_second: 40, ..room() };
    let key = key(KEY);
    let gateways = [gateway(&booking, &key, settings.clone()).await, gateway(&booking, &key, settings.clone()).await];
    report(&booking, &settings, 95, 0).await;
    for gateway in &gateways {
        is_open(gateway, true).await;
    }
    let buyers = (0..BUYERS).map(|nth| {
        let (gateways, event) = (&gateways, &event);
        async move {
            let buyer = &format!("buyer-{nth}");
            let answer = buy_as(buyer, &gateways[nth % 2], event, None).await;
            let place = place(&answer);
            let mut status = answer.status().as_u16();
            // On a busy machine there may be no room for him when it is his turn: he keeps his place, and comes again.
            while [202, 503].contains(&status) {
                // Looks do not cost booking a call, so they may come often.
                eventually("his turn", async || {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    (standing_of(buyer, &gateways[nth % 2], &place).await["admitted"] == true).then_some(())
                })
                .await;
                status = buy_as(buyer, &gateways[(nth + 1) % 2], event, Some(&place)).await.status().as_u16();
            }
            (number(&place), status)
        }
    });
    let mut all = join_all(buyers).await;
    all.sort_unstable();
    assert_eq!(all.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (1..=500).collect::<Vec<_>>());
    let bought: Vec<_> = all.iter().filter(|(_, status)| *status == 201).map(|(number, _)| *number).collect();
    assert_eq!(bought.len(), 100, "every seat is sold, and none twice");
    assert!(all.iter().all(|(_, status)| [201, 409].contains(status)), "{all:?}");
    // Who is let in within the same second may overtake on his way.
    assert!(bought.iter().all(|number| *number <= 200), "{bought:?}");
    let late = all.iter().filter(|(number, status)| *number <= 50 && *status != 201).count();
    assert_eq!(late, 0, "{all:?}");
}
