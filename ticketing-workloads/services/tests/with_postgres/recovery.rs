//! What breaks and what heals: hung connections, a database that is away, hot reload, an orderly end.

use crate::support::app::{App, OPENING_NIGHT, document, now_ms, order, quick_policy};
use crate::support::postgres::{Postgres, Stopped};
use crate::support::providers::Providers;
use crate::support::{eventually, within};
use contract::{
    ActionOutcome, AppliedFrom, CheckReport, CheckStatus, CircuitState, DependencySettings, FlagsSettings,
    PolicySettings, PushOutcome,
};
use futures::FutureExt;
use futures::future::join_all;
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn is(status: CheckStatus) -> impl Fn(&CheckReport) -> bool {
    move |check| check.status == status
}

/// A pod with a full pool.
async fn warm_pod(postgres: &Postgres) -> App {
    let app = App::start(postgres, "pod-1").await;
    app.push(quick_policy(), FlagsSettings::default()).await;
    eventually("the pool is full", async || {
        app.book_at_once(24).await;
        (postgres.back_ends("pod-1").await.len() == 10).then_some(())
    })
    .await;
    // Each has been asked, also the one that was opened last: all have prepared what they are asked with.
    let all_answer = |check: &CheckReport| check.status == CheckStatus::Healthy && check.data["answered"] == 10;
    app.check("database", "all is well", all_answer).await;
    app
}

#[tokio::test(flavor = "multi_thread")]
async fn hung_connections_in_use_are_seen_and_a_reset_heals_them() {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let mut policy = quick_policy();
    let database = policy.dependencies.get_mut("database").unwrap();
    // Long enough that no attempt is abandoned: the pool has no reason to replace a connection by itself.
    (database.timeout.request_ms, database.timeout.per_try_ms) = (60_000, 50_000);
    // They all want the same event, and go on at the same moment.
    database.retry.num_retries = 20;
    policy.health_checks.get_mut("database").unwrap().interval_ms = 60_000;
    app.push(policy.clone(), FlagsSettings::default()).await;
    let old = postgres.back_ends("pod-1").await;
    let stopped = Stopped::new(&old);
    let broken = Instant::now();
    let buyers = app.book_in_the_background(old.len());
    eventually("all connections are in use", async || {
        (app.health().await.load.in_flight as usize == old.len()).then_some(())
    })
    .await;
    policy.health_checks.get_mut("database").unwrap().interval_ms = 200;
    app.push(policy, FlagsSettings::default()).await;

    let check = app.check("database", "the hang is seen", is(CheckStatus::Unhealthy)).await;
    assert_eq!(check.dependency_answers, Some(true), "{}", check.message);
    assert!(broken.elapsed() < Duration::from_secs(5), "seen after {:?}", broken.elapsed());
    assert_eq!(check.dependency.as_deref(), Some("database"));
    assert_ne!(app.health().await.checks["booking-consistency"].status, CheckStatus::Unhealthy);
    assert_eq!(app.get("/readyz").await.status(), 200, "the pod itself is ready");

    let answer = app.reset_connections("intent-1").await;
    for buyer in buyers {
        assert_eq!(buyer.await.unwrap(), 201, "retried on a new connection");
    }
    assert_eq!(answer.outcome, ActionOutcome::Done, "{}", answer.message);
    assert_eq!(app.book_at_once(8).await, [201; 8], "at once, circuit or not");
    app.check("database", "healed", is(CheckStatus::Healthy)).await;
    assert_eq!(app.reset_connections("intent-1").await.outcome, ActionOutcome::AlreadyDone);
    let report = app.health().await;
    assert_eq!(report.actions_done["ResetConnections"], 1);
    assert_eq!(report.circuits["database"].state, CircuitState::Closed);
    let new = postgres.back_ends("pod-1").await;
    assert!(new.iter().any(|pid| !old.contains(pid)));

    drop(stopped);
    eventually("the old connections are gone", async || {
        let now = postgres.back_ends("pod-1").await;
        old.iter().all(|pid| !now.contains(pid)).then_some(())
    })
    .await;
    app.check("booking-consistency", "nothing was booked twice", is(CheckStatus::Healthy)).await;
}

/// The pool cures itself: silent connections are replaced within seconds, under traffic and without, and no buyer needs an
/// operator for it.
#[rstest::rstest]
#[case::a_few(2)]
#[case::all(10)]
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_are_replaced_without_a_reset(#[case] silent: usize) {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let old = postgres.back_ends("pod-1").await;
    let stopped = Stopped::new(&old[..silent]);
    let broken = Instant::now();
    let seen = app.check("database", "the hang is seen", is(CheckStatus::Unhealthy));
    let cured = within(Duration::from_secs(15), "every buyer is served", async || {
        let statuses = app.book_at_once(8).await;
        statuses.iter().all(|status| *status == 201).then(|| broken.elapsed())
    });
    let (seen, cured) = tokio::join!(seen, cured);
    assert!(seen.message.contains("did not answer") || seen.dependency_answers == Some(true), "{}", seen.message);
    assert!(cured < Duration::from_secs(15), "{cured:?}");
    app.check("database", "healthy again", is(CheckStatus::Healthy)).await;
    assert!(app.health().await.actions_done.is_empty(), "nobody reset anything");
    drop(stopped);
    app.check("booking-consistency", "nothing was booked twice", is(CheckStatus::Healthy)).await;
}

/// As after a migration: what a session has prepared before fails for as long as it lives, and a new session does well.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_answer_and_fail_their_statements_are_seen_and_a_reset_heals_them() {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let old = postgres.back_ends("pod-1").await;
    let migration = "ALTER TABLE bookings ALTER COLUMN cancel_reason TYPE varchar";
    postgres.connect().await.batch_execute(migration).await.unwrap();
    assert_ne!(app.book().await, 201);
    let check = app.check("database", "it is seen", is(CheckStatus::Unhealthy)).await;
    assert_eq!(check.dependency_answers, Some(true), "{}", check.message);
    let words =
        ["of 10 pooled connections answer and cannot be worked with", "cached plan must not change result type"];
    assert!(words.iter().all(|words| check.message.contains(words)), "{}", check.message);
    // The pool does not make it better by itself, however long one waits.
    let runs = app.health().await.checks["database"].runs;
    // One that is in use at that moment is not asked.
    let all_asked = |check: &CheckReport| check.runs >= runs + 3 && check.data["failing"] == 10;
    let later = app.check("database", "more runs", all_asked).await;
    assert_eq!((later.status, &later.data["failing"]), (CheckStatus::Unhealthy, &json!(10)), "{}", later.message);
    assert_eq!(postgres.back_ends("pod-1").await, old);

    assert_eq!(app.reset_connections("intent-1").await.outcome, ActionOutcome::Done);
    assert_eq!(app.book_at_once(8).await, [201; 8]);
    app.check("database", "healed", is(CheckStatus::Healthy)).await;
}

/// A migration that takes its time is no failure: a call that waits for it is told so by the server, within half a second.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_a_migration_has_locked_is_no_failure_of_its_sessions() {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let mut policy = quick_policy();
    policy.health_checks.get_mut("database").unwrap().timeout_ms = 1_500;
    app.push(policy, FlagsSettings::default()).await;
    let mut client = postgres.connect().await;
    let migration = client.transaction().await.unwrap();
    migration.batch_execute("LOCK TABLE bookings IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let runs = app.health().await.checks["database"].runs;
    let check = app.check("database", "it ran meanwhile", |check| check.runs >= runs + 3).await;
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
    migration.rollback().await.unwrap();
}

/// What is promised of the worst case: all connections of all pods hang at one moment, while orders come in; new ones work.
/// Nobody helps, and there is no policy but the ADR's numbers. An order flows if its seats are taken: where booking's circuit
/// to payment has opened meanwhile, it is paid after the break of that one (202).
#[rstest::rstest]
#[case::a_quiet_hour(1)]
#[case::a_usual_one(3)]
#[case::a_crowd(12)]
#[tokio::test(flavor = "multi_thread")]
async fn orders_flow_again_within_5_seconds_of_a_hang_of_all_connections(#[case] buyers_of_each_pod: usize) {
    const PODS: [&str; 2] = ["booking-1", "booking-2"];
    // Of its own: what is stopped must not hold up other tests.
    let (postgres, providers) = (Postgres::alone().await, Providers::start());
    let payment = App::payment(&postgres, &providers).await;
    let payment_url = format!("http://{}", payment.address);
    let pods = join_all(PODS.map(async |pod| {
        let app = App::booking_with(&postgres, &[("--payment-url", &payment_url), ("--pod-name", pod)]).await;
        app.book_at_once(24).await;
        Arc::new(app)
    }))
    .await;
    let orders = Arc::new(Mutex::new(Vec::new()));
    let buyers: Vec<_> = (pods.iter().enumerate())
        .flat_map(|pod| vec![pod; buyers_of_each_pod])
        .map(|(pod, app)| {
            let (app, orders) = (Arc::clone(app), Arc::clone(&orders));
            tokio::spawn(async move {
                loop {
                    let begun = Instant::now();
                    let status = app.book().await;
                    orders.lock().unwrap().push((pod, begun, Instant::now(), status));
                }
            })
        })
        .collect();
    // When the last of the pods has taken its first order that was begun after this moment.
    let taken_since = async |since: Instant, limit: Duration| {
        within(limit, "each pod takes orders", async || {
            let orders = orders.lock().unwrap();
            let first = |wanted: usize| {
                let is_good = |(pod, begun, _, status): &&(usize, Instant, Instant, u16)| {
                    *pod == wanted && matches!(status, 201 | 202) && *begun > since
                };
                orders.iter().find(is_good).map(|(_, _, ended, _)| *ended)
            };
            (0..pods.len()).map(first).collect::<Option<Vec<_>>>()?.into_iter().max()
        })
        .await
    };
    taken_since(Instant::now(), Duration::from_secs(10)).await;

    let (hung_at, hung, stopped) = stop_all_between_statements(&postgres).await;
    assert!(hung.len() > 2 * PODS.len(), "each pod has its connections: {hung:?}");
    let all_stopped = Instant::now();
    let flow = taken_since(all_stopped, Duration::from_secs(10)).await - hung_at;
    println!("{} connections hang; every pod takes orders again after {flow:?}", hung.len());
    assert!(flow < Duration::from_secs(5), "{flow:?}");
    // And they go on to.
    let later = Instant::now().max(hung_at + Duration::from_secs(5));
    taken_since(later, Duration::from_secs(10)).await;
    for buyer in buyers {
        buyer.abort();
    }
    for pod in &pods {
        assert!(pod.book_at_once(8).await.iter().all(|status| matches!(status, 201 | 202)));
        assert!(pod.health().await.actions_done.is_empty(), "nobody asked for anything");
        let metrics = pod.get("/metrics").await.text().await.unwrap();
        assert!(metrics.contains("database_connection_resets_total 0"), "nobody reset anything: {metrics}");
    }
    drop(stopped);
    for pod in &pods {
        pod.check("booking-consistency", "nothing was booked twice", is(CheckStatus::Healthy)).await;
    }
}

/// Stops all back ends of the pods. One that is stopped in the middle of a statement keeps its locks, on rows or in the
/// server's memory, which is another failure than the one to be shown; so it is tried again until none is. The answer:
/// when they began to hang, and which.
async fn stop_all_between_statements(postgres: &Postgres) -> (Instant, Vec<i32>, Stopped) {
    let client = postgres.connect().await;
    let all = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
               AND application_name <> ''";
    let busy = "SELECT FROM pg_stat_activity WHERE pid = ANY($1) AND state <> 'idle'";
    let busy = client.prepare(busy).await.unwrap();
    within(Duration::from_secs(30), "connections are stopped between statements", async || {
        let pids: Vec<i32> = client.query(all, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
        let since = Instant::now();
        let stopped = Stopped::new(&pids);
        // Without an answer, one of them has a lock that everybody needs.
        let busy = tokio::time::timeout(Duration::from_millis(200), client.query(&busy, &[&pids])).await;
        busy.is_ok_and(|busy| busy.unwrap().is_empty()).then_some((since, pids, stopped))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_somebody_holds_is_no_failure_of_the_database() {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let mut policy = quick_policy();
    let database = policy.dependencies.get_mut("database").unwrap();
    // Long enough that no attempt is cut off: the server ends each after half a second.
    (database.timeout.request_ms, database.timeout.per_try_ms) = (60_000, 50_000);
    policy.health_checks.get_mut("database").unwrap().timeout_ms = 2_000;
    app.push(policy, FlagsSettings::default()).await;
    let mut client = postgres.connect().await;
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("SELECT * FROM events FOR UPDATE").await.unwrap();
    let before = app.health().await;
    let first = before.checks["database"].runs;
    let bookings = app.book_at_once(12);
    let check = app.check("database", "it ran meanwhile", |check| check.runs >= first + 3);
    let (statuses, check) = tokio::join!(bookings, check);
    assert_eq!(statuses, [503; 12]);
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
    assert_eq!(app.health().await.circuits["database"].opened_total, before.circuits["database"].opened_total);
    lock.rollback().await.unwrap();
    assert_eq!(app.book().await, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn bookings_under_way_during_a_reset_succeed_on_new_connections() {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let mut policy = quick_policy();
    let database = policy.dependencies.get_mut("database").unwrap();
    // Long enough that only the reset can end the attempts.
    (database.timeout.request_ms, database.timeout.per_try_ms) = (60_000, 50_000);
    assert_eq!(app.push(policy, FlagsSettings::default()).await.outcome, PushOutcome::Applied);
    let opened = app.health().await.circuits["database"].opened_total;
    let _stopped = Stopped::new(&postgres.back_ends("pod-1").await);
    let bookings = join_all((0..6).map(|_| app.book()));
    let reset = async {
        eventually("they are under way", async || (app.health().await.load.in_flight == 6).then_some(())).await;
        app.reset_connections("intent-1").await
    };
    let (statuses, _) = tokio::join!(bookings, reset);
    assert_eq!(statuses, [201; 6]);
    let after = app.health().await.circuits["database"].opened_total;
    assert_eq!(after, opened, "a reset is no failure of the database");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_an_open_circuit_open() {
    let postgres = Postgres::start().await;
    let app = warm_pod(&postgres).await;
    let mut policy = quick_policy();
    policy.dependencies.get_mut("database").unwrap().circuit_breaker.break_ms = 30_000;
    app.push(policy.clone(), FlagsSettings::default()).await;
    postgres.drop_database().await;
    let circuit = async || app.health().await.circuits["database"].clone();
    eventually("the circuit opens", async || {
        app.book().await;
        (circuit().await.state == CircuitState::Open).then_some(())
    })
    .await;
    let opened = circuit().await.opened_total;
    policy.dependencies.get_mut("database").unwrap().retry.num_retries = 1;
    assert_eq!(app.push(policy, FlagsSettings::default()).await.outcome, PushOutcome::Applied);
    let after = circuit().await;
    assert_eq!((after.state, after.opened_total), (CircuitState::Open, opened));
    let started = Instant::now();
    let refused = app.post(&order(OPENING_NIGHT, 1)).await;
    assert_eq!(refused.status(), 503);
    assert!(started.elapsed() < Duration::from_millis(250), "refused at once, not after an attempt");
    let seconds: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((20..=30).contains(&seconds), "the rest of the break: {seconds}");
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_without_its_database_and_works_when_it_comes() {
    let postgres = Postgres::start_without_database().await;
    let app = App::start_bare(&postgres, "pod-1");
    for probe in ["/livez", "/readyz"] {
        assert_eq!(app.get(probe).await.status(), 200, "{probe}");
    }
    app.check("database", "it is away", is(CheckStatus::Unhealthy)).await;
    let mut policy = quick_policy();
    policy.dependencies.get_mut("database").unwrap().circuit_breaker.break_ms = 60_000;
    let document = document("booking", now_ms(), policy, FlagsSettings::default());
    app.mount("config/runtime-config.json", std::str::from_utf8(&document).unwrap());
    eventually("the policy is read", async || (app.health().await.applied.revision > 0).then_some(())).await;
    assert_eq!(app.book().await, 503);
    postgres.create_database().await;
    eventually("bookings work", async || (app.book().await == 201).then_some(())).await;
    app.check("database", "it is there", is(CheckStatus::Healthy)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_start_together_migrate_once() {
    let postgres = Postgres::start().await;
    let pods = ["pod-1", "pod-2", "pod-3", "pod-4"];
    let apps = join_all(pods.map(|pod| App::start(&postgres, pod))).await;
    let client = postgres.connect().await;
    let count = async |query: &str| client.query_one(query, &[]).await.unwrap().get::<_, i64>(0);
    for app in &apps {
        app.check("schema", "all of them see that it is done", is(CheckStatus::Healthy)).await;
    }
    assert_eq!(count("SELECT count(*) FROM events").await, 1);
    let steps = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/booking")).unwrap().count();
    let recorded = count("SELECT count(*) FROM schema_migrations").await;
    assert_eq!(recorded, i64::try_from(steps).unwrap(), "each step is recorded");
    let invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";
    assert_eq!(count(invalid).await, 0, "no index was left half built");
    drop(apps);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_mounted_is_followed_and_garbage_is_not() {
    let postgres = Postgres::start().await;
    let app = App::start_bare(&postgres, "pod-1");
    assert!(app.admin_health().await.is_none(), "no token yet");
    app.mount("token/current", "0123456789abcdef\n");
    eventually("the token is read", async || app.admin_health().await).await;

    let now = now_ms();
    let text =
        |revision, policy| String::from_utf8(document("booking", revision, policy, FlagsSettings::default())).unwrap();
    app.mount("config/runtime-config.json", &text(now, quick_policy()));
    let report = eventually("the document is read", async || {
        Some(app.health().await).filter(|report| report.applied.revision == now)
    })
    .await;
    assert_eq!(report.applied.from, AppliedFrom::Mount);

    let refused = async |outcome: &str| {
        let line = format!(r#"resilience_config_received_total{{outcome="{outcome}"}}"#);
        eventually(outcome, async || app.get("/metrics").await.text().await.unwrap().contains(&line).then_some(()))
            .await;
    };
    app.mount("config/runtime-config.json", "{ half");
    refused("refused_invalid").await;
    app.mount("config/runtime-config.json", &text(now - 1, PolicySettings::default()));
    refused("refused_older").await;
    assert_eq!(app.health().await.applied, report.applied);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_on_bookings_under_way_is_a_flag() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let flags = |limit: u32| {
        let flags = json!({"flags": {"MaxConcurrentBookings": {
            "state": "ENABLED", "variants": {"normal": limit}, "defaultVariant": "normal",
        }}});
        serde_json::from_value::<FlagsSettings>(flags).unwrap()
    };
    app.push(quick_policy(), flags(0)).await;
    let answer = app.post(&order(OPENING_NIGHT, 1)).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.headers()["retry-after"], "1");
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["errorCode"], "TOO_MANY_BOOKINGS");
    assert!(answer["message"].as_str().unwrap().contains("MaxConcurrentBookings"));
    app.push(quick_policy(), flags(20)).await;
    assert_eq!(app.book().await, 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_for_something_else_is_named() {
    let postgres = Postgres::start().await;
    let app = App::start(&postgres, "pod-1").await;
    let mut policy = quick_policy();
    policy.dependencies.insert("printer".into(), DependencySettings::default());
    let answer = app.push(policy, FlagsSettings::default()).await;
    assert_eq!(answer.applied.unknown_dependencies, ["printer"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_ends_before_the_pod_does() {
    let postgres = Postgres::start().await;
    let mut app = App::start(&postgres, "pod-1").await;
    let mut client = postgres.connect().await;
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("SELECT * FROM events FOR UPDATE").await.unwrap();
    let url = format!("http://{}/api/bookings", app.address);
    let booking = tokio::spawn(app.client.post(url).body(order(OPENING_NIGHT, 1).to_string()).send());
    eventually("it waits for the row", async || (app.health().await.load.in_flight == 1).then_some(())).await;
    drop(app.stop.take());
    let readyz = format!("http://{}/readyz", app.address);
    eventually("no new connections", async || app.client.get(&readyz).send().await.is_err().then_some(())).await;
    assert!((&mut app.run).now_or_never().is_none(), "it waits for the booking");
    lock.rollback().await.unwrap();
    assert_eq!(booking.await.unwrap().unwrap().status(), 201);
    tokio::time::timeout(Duration::from_secs(20), app.run).await.unwrap().unwrap();
}

#[test]
fn the_process_ends_well_on_sigterm() {
    let mut process = Command::new(env!("CARGO_BIN_EXE_ticketing"))
        .arg("booking")
        .env_clear()
        .envs([("BIND_ADDRESS", "127.0.0.1"), ("PORT", "0"), ("ADMIN_PORT", "0"), ("SHUTDOWN_DELAY_SECONDS", "0")])
        .envs([("PGHOST", "127.0.0.1"), ("PGPORT", "1"), ("LOG_FORMAT", "json")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(process.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains(r#""message":"started""#)));
    let kill = format!("kill -TERM {}", process.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    assert!(lines.any(|line| line.unwrap().contains(r#""message":"stopped""#)));
    assert_eq!(process.wait().unwrap().code(), Some(0));
}
