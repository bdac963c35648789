//! Booking over HTTP, against a real PostgreSQL.

use crate::support::app::{App, OPENING_NIGHT, order, quick_policy};
use crate::support::eventually;
use crate::support::postgres::Postgres;
use contract::{CheckReport, CheckStatus, CircuitBreakerPolicy, DependencyPolicy, FlagsSettings, PolicySettings};
use futures::future::join_all;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;
use ticketing_services::booking::cleanup::{self, Cleaned};

/// Makes an event with as many seats.
async fn event(postgres: &Postgres, seats: i32) -> String {
    let statement = "INSERT INTO events (id, name, capacity, available)
                     VALUES (gen_random_uuid(), 'Test', $1, $1) RETURNING id::text";
    postgres.connect().await.query_one(statement, &[&seats]).await.unwrap().get(0)
}

/// Free seats and sold seats.
async fn seats(postgres: &Postgres, event: &str) -> (i64, i64) {
    let query = "SELECT available::bigint, (SELECT COALESCE(sum(ticket_count), 0) FROM bookings b
                     WHERE b.event_id = e.id AND b.status <> 'Cancelled')
                 FROM events e WHERE id::text = $1";
    let row = postgres.connect().await.query_one(query, &[&event]).await.unwrap();
    (row.get(0), row.get(1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_booking_is_made_and_found_again() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let answer = app.post(&order(OPENING_NIGHT, 2)).await;
    assert_eq!(answer.status(), 201);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!((&answer["success"], &answer["status"]), (&json!(true), &json!("Confirmed")));
    let id = answer["bookingId"].as_str().unwrap();
    let found: Value = app.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
    assert_eq!(
        found,
        json!({"bookingId": id, "eventId": OPENING_NIGHT, "userId": "ann", "ticketCount": 2, "status": "Confirmed"})
    );
    let events: Value = app.get("/api/events").await.json().await.unwrap();
    assert_eq!(
        events,
        json!({"events": [{"eventId": OPENING_NIGHT, "name": "Opening Night", "capacity": 100_000, "available": 99_998}]})
    );
    let metrics = app.get("/metrics").await;
    assert_eq!(metrics.headers()["content-type"], "application/openmetrics-text; version=1.0.0; charset=utf-8");
    assert!(metrics.text().await.unwrap().contains(r#"bookings_total{outcome="confirmed"} 1"#));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_no_is_told_as_such_and_never_retried() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let event = event(&postgres, 3).await;
    let cases = [
        (order(&event, 4), 409, "INSUFFICIENT_TICKETS"),
        (order("22222222-2222-4222-8222-222222222222", 1), 404, "EVENT_NOT_FOUND"),
        (order(&event, 11), 422, "INVALID_REQUEST"),
        (json!([]), 400, "INVALID_REQUEST"),
        (json!({"eventId": event, "userId": "x".repeat(70_000), "ticketCount": 1}), 413, "INVALID_REQUEST"),
    ];
    for (body, status, code) in cases {
        let answer = app.post(&body).await;
        assert_eq!(answer.status(), status, "{code}");
        let answer: Value = answer.json().await.unwrap();
        assert_eq!((&answer["success"], &answer["errorCode"]), (&json!(false), &json!(code)));
    }
    let invalid: Value = app.post(&order(&event, 11)).await.json().await.unwrap();
    assert_eq!(invalid["field"], "ticketCount");
    for (path, status) in [
        ("/api/bookings/x", 400),
        (&format!("/api/bookings/{OPENING_NIGHT}"), 404),
        ("/none", 404),
        ("/api/bookings", 405),
    ] {
        assert_eq!(app.get(path).await.status(), status, "{path}");
    }
    let metrics = app.get("/metrics").await.text().await.unwrap();
    assert!(!metrics.contains("retry_attempts_total{"), "{metrics}");
    assert_eq!(seats(&postgres, &event).await, (3, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_is_one_booking_also_when_it_arrives_many_times_at_once() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    app.push(quick_policy(), FlagsSettings::default()).await;
    let event = event(&postgres, 100).await;
    let body = json!({"eventId": event, "userId": "ann", "ticketCount": 2, "idempotencyKey": "k1"});
    let answers = join_all((0..20).map(|_| app.post(&body))).await;
    let mut ids = BTreeSet::new();
    let mut first = 0;
    for answer in answers {
        assert_eq!(answer.status(), 201);
        first += u32::from(!answer.headers().contains_key("idempotent-replayed"));
        ids.insert(answer.json::<Value>().await.unwrap()["bookingId"].to_string());
    }
    assert_eq!((ids.len(), first), (1, 1));
    assert_eq!(seats(&postgres, &event).await, (98, 2));
    let mut other = body.clone();
    other["ticketCount"] = json!(3);
    let answer = app.post(&other).await;
    assert_eq!(answer.status(), 409);
    assert_eq!(answer.json::<Value>().await.unwrap()["errorCode"], "IDEMPOTENCY_KEY_REUSED");
    other["ticketCount"] = json!(2);
    other["email"] = json!("somebody.else@example.com");
    assert_eq!(
        app.post(&other).await.status(),
        409,
        "a ticket must not go to another address than the caller believes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_buyers_of_a_hundred_seats_in_two_pods_get_exactly_a_hundred() {
    let postgres = Postgres::start().await;
    let (one, two) = (App::start(&postgres, "pod-1").await, App::start(&postgres, "pod-2").await);
    for pod in [&one, &two] {
        pod.push(quick_policy(), FlagsSettings::default()).await;
    }
    let event = event(&postgres, 100).await;
    let buyers = (0..200).map(|buyer| {
        let pod = if buyer % 2 == 0 { &one } else { &two };
        let mut body = order(&event, 1);
        body["idempotencyKey"] = json!(format!("buyer-{buyer}"));
        async move {
            loop {
                match pod.post(&body).await.status().as_u16() {
                    201 => return true,
                    409 => return false,
                    // 504: the outcome is unknown, and asking again with the same key finds it out.
                    503 | 504 => tokio::task::yield_now().await,
                    other => panic!("status {other}"),
                }
            }
        }
    });
    let bought = join_all(buyers).await.into_iter().filter(|bought| *bought).count();
    assert_eq!(bought, 100);
    assert_eq!(seats(&postgres, &event).await, (0, 100));
    one.check("booking-consistency", "the books add up", |check| check.status == CheckStatus::Healthy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_names_only_the_circuit_breaker_leaves_the_retries_of_a_hot_event_alone() {
    const BUYERS: usize = 40;
    const ORDERS_EACH: usize = 10;
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let breaker = CircuitBreakerPolicy { consecutive_failures: Some(5), ..CircuitBreakerPolicy::default() };
    let database = DependencyPolicy { circuit_breaker: breaker, ..DependencyPolicy::default() };
    let policy =
        PolicySettings { dependency_policies: [("database".to_owned(), database)].into(), ..PolicySettings::default() };
    app.push(policy, FlagsSettings::default()).await;
    let event = event(&postgres, 10_000).await;
    // Every third attempt meets a deadlock, as where many statements want the same rows in different orders.
    let deadlocks = "CREATE SEQUENCE attempts;
        CREATE FUNCTION deadlock() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
            IF nextval(''attempts'') % 3 = 0 THEN RAISE EXCEPTION USING ERRCODE = ''40P01''; END IF; RETURN NEW; END';
        CREATE TRIGGER deadlock BEFORE INSERT ON bookings FOR EACH ROW EXECUTE FUNCTION deadlock()";
    postgres.connect().await.batch_execute(deadlocks).await.unwrap();
    let buyers = (0..BUYERS).map(|_| async {
        let mut refused = 0;
        for _ in 0..ORDERS_EACH {
            refused += usize::from(app.post(&order(&event, 1)).await.status() == 503);
        }
        refused
    });
    let refused: usize = join_all(buyers).await.into_iter().sum();
    // Without the built-in retries it is every third one.
    assert!(refused * 20 < BUYERS * ORDERS_EACH, "{refused} of {} orders were refused", BUYERS * ORDERS_EACH);
}

#[tokio::test(flavor = "multi_thread")]
async fn books_that_do_not_add_up_and_expired_holds_are_noticed() {
    let postgres = Postgres::start().await;
    // Nobody ends what ran out, as if this had been forgotten.
    let app = App::booking_with(&postgres, &[("--expire-every-seconds", "86400")]).await;
    app.push(quick_policy(), FlagsSettings::default()).await;
    let client = postgres.connect().await;
    app.check("booking-consistency", "all is well", |check| check.status == CheckStatus::Healthy).await;
    client.batch_execute("UPDATE events SET available = available - 1").await.unwrap();
    let is_unhealthy = |check: &CheckReport| check.status == CheckStatus::Unhealthy;
    let check = app.check("booking-consistency", "a seat is lost", is_unhealthy).await;
    assert_eq!(check.data["wrongEvents"], 1);
    let hold = format!(
        "INSERT INTO bookings (id, event_id, user_id, ticket_count, status, idempotency_key, held_until)
         VALUES (gen_random_uuid(), '{OPENING_NIGHT}', 'ann', 1, 'Held', 'k', now() - interval '2 minutes')"
    );
    client.batch_execute(&hold).await.unwrap();
    let check = app
        .check("booking-consistency", "a hold ran out", |check| check.data.get("expiredHolds") == Some(&json!(1)))
        .await;
    assert_eq!((check.status, &check.data["wrongEvents"]), (CheckStatus::Unhealthy, &json!(0)));
    let cleaned = cleanup::run(&postgres.settings()).await.unwrap();
    assert_eq!(cleaned, Cleaned { expired_holds: 1, repaired_events: 1 });
    app.check("booking-consistency", "all is well again", |check| check.status == CheckStatus::Healthy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_repairs_what_it_can_and_names_what_a_person_must_decide() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let (fine, oversold) = (event(&postgres, 10).await, event(&postgres, 10).await);
    assert_eq!(app.post(&order(&oversold, 8)).await.status(), 201);
    let damage = format!(
        "UPDATE events SET available = 3 WHERE id::text = '{fine}';
         UPDATE events SET capacity = 5, available = 0 WHERE id::text = '{oversold}'"
    );
    postgres.connect().await.batch_execute(&damage).await.unwrap();
    let error = cleanup::run(&postgres.settings()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("event {oversold} by 3")) && error.contains("a person must decide"), "{error}");
    assert_eq!(seats(&postgres, &fine).await, (10, 0), "the other one is repaired all the same");
    assert_eq!(seats(&postgres, &oversold).await, (0, 8), "no booking is lost");
}

/// The server does not notice when the Job gives up: its statement went on, and kept its locks.
#[tokio::test(flavor = "multi_thread")]
async fn cleanup_is_bounded_by_the_server() {
    let postgres = Postgres::start().await;
    App::start(&postgres, "pod-1").await.schema_is_done().await;
    let client = postgres.connect().await;
    let watch = "CREATE TABLE seen (bounds text);
        CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO seen VALUES (current_setting('statement_timeout') || ' ' || current_setting('lock_timeout'));
              RETURN NULL; END $$;
        CREATE TRIGGER see AFTER UPDATE ON bookings FOR EACH STATEMENT EXECUTE FUNCTION see()";
    client.batch_execute(watch).await.unwrap();
    cleanup::run(&postgres.settings()).await.unwrap();
    let bounds: Vec<String> =
        client.query("SELECT bounds FROM seen", &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert!(bounds.contains(&"55s 10s".to_owned()), "{bounds:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn cleanup_beside_buyers_loses_no_seat() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let event = event(&postgres, 200).await;
    postgres.connect().await.batch_execute("UPDATE events SET available = available - 50").await.unwrap();
    let buyers = join_all((0..60).map(|_| async { app.post(&order(&event, 1)).await.status() == 201 }));
    let settings = postgres.settings();
    let cleaners = join_all((0..4).map(|_| cleanup::run(&settings)));
    let (bought, cleaned) = tokio::join!(buyers, cleaners);
    let bought = i64::try_from(bought.into_iter().filter(|bought| *bought).count()).unwrap();
    assert!(cleaned.into_iter().all(|result| result.is_ok()));
    assert_eq!(seats(&postgres, &event).await, (200 - bought, bought));
}

/// The id and the status of a booking, after the status of the answer.
async fn told(answer: reqwest::Response) -> (u16, String, String) {
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap();
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let word = if status < 400 { text("status") } else { text("errorCode") };
    (status, text("bookingId"), word)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_is_bought_or_given_back() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let event = event(&postgres, 10).await;
    let mut wanted = order(&event, 2);
    wanted["idempotencyKey"] = json!("mine");
    let (status, id, word) = told(app.post_to("/api/reservations", &wanted).await).await;
    assert_eq!((status, word.as_str()), (201, "Held"));
    assert_eq!(seats(&postgres, &event).await, (8, 2));
    assert_eq!(told(app.post_to("/api/reservations", &wanted).await).await, (201, id.clone(), "Held".into()), "once");
    let found: Value = app.get(&format!("/api/bookings/{id}")).await.json().await.unwrap();
    assert!(found["heldUntil"].as_str().unwrap().ends_with('Z'), "{found}");
    let (status, _, word) = told(app.post(&wanted).await).await;
    assert_eq!((status, word.as_str()), (409, "IDEMPOTENCY_KEY_REUSED"), "a booking is not a reservation");

    let confirm = format!("/api/reservations/{id}/confirm");
    for _ in 0..2 {
        let bought = told(app.post_to(&confirm, &json!({})).await).await;
        assert_eq!(bought, (201, id.clone(), "Confirmed".into()));
    }
    let told_of = "SELECT count(*) FROM outbox";
    assert_eq!(postgres.connect().await.query_one(told_of, &[]).await.unwrap().get::<_, i64>(0), 1);
    assert_eq!(told(app.delete(&format!("/api/reservations/{id}")).await).await.2, "ALREADY_BOOKED");

    let (_, second, _) = told(app.post_to("/api/reservations", &order(&event, 3)).await).await;
    assert_eq!(seats(&postgres, &event).await, (5, 5));
    for _ in 0..2 {
        let ended = told(app.delete(&format!("/api/reservations/{second}")).await).await;
        assert_eq!(ended, (200, second.clone(), "Cancelled".into()));
    }
    assert_eq!(seats(&postgres, &event).await, (8, 2));
    let late = told(app.post_to(&format!("/api/reservations/{second}/confirm"), &json!({})).await).await;
    assert_eq!((late.0, late.2.as_str()), (409, "RESERVATION_EXPIRED"));
    let nobody = "/api/reservations/33333333-3333-4333-8333-333333333333/confirm";
    assert_eq!(told(app.post_to(nobody, &json!({})).await).await.2, "RESERVATION_NOT_FOUND");
    assert_eq!(app.post_to("/api/reservations/none/confirm", &json!({})).await.status(), 400);
    let many = told(app.post_to("/api/reservations", &order(&event, 9)).await).await;
    assert_eq!((many.0, many.2.as_str()), (409, "INSUFFICIENT_TICKETS"));
}

/// Seats of which nobody made up his mind are free again, without a person and without the cleanup Job.
#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_runs_out_and_gives_its_seats_back() {
    let postgres = Postgres::start().await;
    let quick = [("--hold-seconds", "1"), ("--expire-every-seconds", "1")];
    let (one, two) = (App::booking_with(&postgres, &quick).await, App::booking_with(&postgres, &quick).await);
    let event = event(&postgres, 40).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(told(one.post_to("/api/reservations", &order(&event, 2)).await).await.1);
    }
    eventually("all seats are free again", async || (seats(&postgres, &event).await == (40, 0)).then_some(())).await;
    for pod in [&one, &two] {
        let late = told(pod.post_to(&format!("/api/reservations/{}/confirm", ids[0]), &json!({})).await).await;
        assert_eq!((late.0, late.2.as_str()), (409, "RESERVATION_EXPIRED"));
    }
    one.check("booking-consistency", "the books add up", |check| check.status == CheckStatus::Healthy).await;
}

/// Expiry and buyers meet at the last moment: a seat is bought or free, never both and never neither.
#[tokio::test(flavor = "multi_thread")]
async fn buyers_at_the_last_moment_and_expiry_share_the_seats_out() {
    let postgres = Postgres::start().await;
    let app = App::booking_with(&postgres, &[("--hold-seconds", "1"), ("--expire-every-seconds", "1")]).await;
    let event = event(&postgres, 60).await;
    let bought = join_all((0..30).map(|nth: u64| {
        let (app, event) = (&app, &event);
        async move {
            let (status, id, _) = told(app.post_to("/api/reservations", &order(event, 1)).await).await;
            if status != 201 {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(600 + nth * 25)).await;
            told(app.post_to(&format!("/api/reservations/{id}/confirm"), &json!({})).await).await.0 == 201
        }
    }))
    .await;
    let bought = i64::try_from(bought.into_iter().filter(|bought| *bought).count()).unwrap();
    assert!(0 < bought && bought < 30, "all were early or all were late: {bought}");
    eventually("the rest is free", async || (seats(&postgres, &event).await == (60 - bought, bought)).then_some(()))
        .await;
}

/// The database takes the seats, and nobody hears of it: the buyer is told so, and finds out with the same key.
#[tokio::test(flavor = "multi_thread")]
async fn seats_that_are_taken_without_an_answer_are_found_again() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let event = event(&postgres, 10).await;
    let mut policy = quick_policy();
    policy.dependencies.get_mut("database").unwrap().retry.num_retries = 0;
    app.push(policy, FlagsSettings::default()).await;
    // The commit itself takes longer than anybody waits, and ends before it would be cancelled.
    let slow =
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END'";
    let slow_commit = "CREATE CONSTRAINT TRIGGER slow AFTER INSERT OR UPDATE ON bookings DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION slow()";
    let client = postgres.connect().await;
    client.batch_execute(slow).await.unwrap();
    client.batch_execute(slow_commit).await.unwrap();
    let mut wanted = order(&event, 2);
    wanted["idempotencyKey"] = json!("mine");
    let answer = app.post(&wanted).await;
    assert_eq!(answer.status(), 504);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!((&answer["errorCode"], &answer["idempotencyKey"]), (&json!("OUTCOME_UNKNOWN"), &json!("mine")));
    let same = |found: &(u16, String, String)| (found.0 == 201 && found.1 == answer["bookingId"]).then_some(());
    eventually("the same booking is found", async || same(&told(app.post(&wanted).await).await)).await;
    assert_eq!(seats(&postgres, &event).await, (8, 2), "taken once");

    client.batch_execute("DROP TRIGGER slow ON bookings").await.unwrap();
    let (_, id, _) = told(app.post_to("/api/reservations", &order(&event, 1)).await).await;
    client.batch_execute(slow_commit).await.unwrap();
    let confirm = format!("/api/reservations/{id}/confirm");
    assert_eq!(told(app.post_to(&confirm, &json!({})).await).await, (504, id.clone(), "OUTCOME_UNKNOWN".into()));
    eventually("it is bought", async || (told(app.post_to(&confirm, &json!({})).await).await.0 == 201).then_some(()))
        .await;
}

/// The books of an event with many bookings are not added up again while nobody changes it, and every event has its turn.
#[tokio::test(flavor = "multi_thread")]
async fn the_books_are_compared_where_something_was_changed_and_everywhere_in_turn() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    app.schema_is_done().await;
    let client = postgres.connect().await;
    let many = "INSERT INTO events (id, name, capacity, available)
                SELECT gen_random_uuid(), 'Test', 10, 10 FROM generate_series(1, 1000)";
    client.batch_execute(many).await.unwrap();
    app.push(quick_policy(), FlagsSettings::default()).await;
    let compared = |check: &CheckReport| check.data["eventsCompared"].as_i64().unwrap();
    // The thousand are new, and are compared some at a time.
    let is_quiet = |check: &CheckReport| check.data.contains_key("eventsCompared") && compared(check) <= 200;
    app.check("booking-consistency", "some are compared in each run", is_quiet).await;
    // Somebody takes a booking away, and the event stays as it was.
    let event = event(&postgres, 10).await;
    assert_eq!(app.post(&order(&event, 2)).await.status(), 201);
    let is_wrong = |check: &CheckReport| check.data.get("wrongEvents") == Some(&json!(1));
    app.check("booking-consistency", "it adds up", |check| check.data.get("wrongEvents") == Some(&json!(0))).await;
    client.batch_execute("DELETE FROM outbox; DELETE FROM bookings").await.unwrap();
    app.check("booking-consistency", "it is found when it has its turn", is_wrong).await;
    // And is not forgotten while others have theirs.
    let runs = app.health().await.checks["booking-consistency"].runs;
    let later = app.check("booking-consistency", "others had their turn", |check| check.runs >= runs + 3).await;
    assert!(is_wrong(&later), "{}", later.message);
    cleanup::run(&postgres.settings()).await.unwrap();
    app.check("booking-consistency", "it was put right", |check| check.status == CheckStatus::Healthy).await;
}

/// Books that take long to compare must not hold up those who buy.
#[tokio::test(flavor = "multi_thread")]
async fn a_comparison_that_takes_long_is_given_up() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    app.schema_is_done().await;
    let slow = "CREATE FUNCTION slow(integer) RETURNS integer STABLE LANGUAGE plpgsql
                AS 'BEGIN PERFORM pg_sleep(2); RETURN $1; END';
                ALTER TABLE events RENAME TO all_events;
                CREATE VIEW events AS SELECT id, name, slow(capacity) AS capacity, available, created_at, xmin FROM all_events";
    postgres.connect().await.batch_execute(slow).await.unwrap();
    app.push(quick_policy(), FlagsSettings::default()).await;
    let given_up = |check: &CheckReport| check.message.contains("comparing 1 events was given up after 200 ms");
    let check = app.check("booking-consistency", "it is given up", given_up).await;
    assert_eq!((check.status, &check.data["slowEvents"]), (CheckStatus::Degraded, &json!(1)), "{}", check.message);
    let query = "SELECT count(*) FROM pg_stat_activity
                 WHERE datname = current_database() AND state = 'active' AND now() - xact_start > interval '1 second'";
    let client = postgres.connect().await;
    assert_eq!(client.query_one(query, &[]).await.unwrap().get::<_, i64>(0), 0, "nothing goes on in the server");
}
