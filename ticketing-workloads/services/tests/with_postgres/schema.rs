//! The schema: who may create it, what it waits for, and what others notice of it.

use crate::support::app::{App, quick_policy};
use crate::support::postgres::{Postgres, settings};
use crate::support::providers::Providers;
use crate::support::{eventually, within};
use contract::{CheckReport, CheckStatus, FlagsSettings, PolicySettings};
use futures::future::join_all;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use ticketing_services::database::migrations::{self, Migration, MigrationError, Progress, State};
use ticketing_services::database::{Connector, DatabaseSettings};

const TABLE: Migration = Migration { version: 1, name: "table", sql: "CREATE TABLE sold (id integer, seat integer)" };
const COLUMN: Migration =
    Migration { version: 2, name: "column", sql: "ALTER TABLE sold ADD COLUMN row_of_seat integer" };
const INDEX: Migration = Migration {
    version: 3,
    name: "index",
    sql: "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS one_seat_once ON sold (seat);",
};

/// The schema of version 0.1.
const VERSION_0_1: &[Migration] = &[
    Migration { version: 1, name: "1", sql: include_str!("../../migrations/booking/0001_events_and_bookings.sql") },
    Migration { version: 2, name: "2", sql: include_str!("../../migrations/booking/0002_first_event.sql") },
    Migration { version: 3, name: "3", sql: include_str!("../../migrations/booking/0003_catalog.sql") },
    Migration { version: 4, name: "4", sql: include_str!("../../migrations/booking/0004_payments.sql") },
    Migration { version: 5, name: "5", sql: include_str!("../../migrations/booking/0005_paid_bookings.sql") },
    Migration { version: 6, name: "6", sql: include_str!("../../migrations/booking/0006_notifications.sql") },
    Migration { version: 7, name: "7", sql: include_str!("../../migrations/booking/0007_possible_duplicates.sql") },
];

fn connector(postgres: &Postgres) -> Connector {
    postgres.settings().connector("migration").unwrap()
}

async fn migrate(postgres: &Postgres, steps: &[Migration]) -> Result<usize, MigrationError> {
    migrations::run(&connector(postgres), "test", steps, &Progress::default()).await
}

/// A login of its own, which may do nothing yet, and its way to the database.
async fn role_without_rights(postgres: &Postgres) -> (String, DatabaseSettings) {
    let role = format!("none_in_{}", postgres.database);
    postgres.connect().await.batch_execute(&format!("CREATE ROLE {role} LOGIN")).await.unwrap();
    let url = postgres.url().replace("postgres@", &format!("{role}@"));
    (role, settings(&["--database-url", &url]))
}

fn is(status: CheckStatus) -> impl Fn(&CheckReport) -> bool {
    move |check| check.status == status
}

/// From PostgreSQL 15 on, nobody but its owner may create tables in the schema `public`.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_may_not_be_created_is_unhealthy_with_the_servers_words() {
    let postgres = Postgres::start().await;
    let (role, _) = role_without_rights(&postgres).await;
    let url = postgres.url().replace("postgres@", &format!("{role}@"));
    let app = App::booking_before_its_schema(&url).await;
    app.push(quick_policy(), FlagsSettings::default()).await;
    assert_eq!(app.book().await, 503);
    let check = app.check("schema", "the server's words are told", is(CheckStatus::Unhealthy)).await;
    for words in ["step 1 (events and bookings)", "permission denied for schema public", "GRANT CREATE"] {
        assert!(check.message.contains(words), "{}", check.message);
    }
    let grant = format!("GRANT CREATE ON SCHEMA public TO {role}");
    postgres.connect().await.batch_execute(&grant).await.unwrap();
    app.check("schema", "it is created without a restart", is(CheckStatus::Healthy)).await;
    eventually("bookings work", async || (app.book().await == 201).then_some(())).await;
}

/// Who runs the services need not own the tables.
#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_is_up_to_date_needs_no_rights() {
    let postgres = Postgres::start().await;
    assert_eq!(migrate(&postgres, &[TABLE]).await.unwrap(), 1);
    let (role, settings) = role_without_rights(&postgres).await;
    let grant = format!("GRANT SELECT ON schema_migrations TO {role}");
    postgres.connect().await.batch_execute(&grant).await.unwrap();
    let connector = settings.connector("migration").unwrap();
    let progress = Progress::default();
    assert_eq!(migrations::run(&connector, "test", &[TABLE], &progress).await.unwrap(), 0);
    let refused = migrations::run(&connector, "test", &[TABLE, COLUMN], &progress).await.unwrap_err().to_string();
    assert!(refused.starts_with("step 2 (column) failed: must be owner of table sold"), "{refused}");
}

/// An index that is built beside buyers waits for every report that began before, for hours: a sale must not.
#[tokio::test(flavor = "multi_thread")]
async fn a_sale_goes_on_after_an_update_while_its_indexes_wait_for_a_report() {
    let postgres = Postgres::start().await;
    migrations::run(&connector(&postgres), "booking", VERSION_0_1, &Progress::default()).await.unwrap();
    let (client, report) = (postgres.connect().await, postgres.connect().await);
    report.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").await.unwrap();

    let providers = Providers::start();
    let payment = App::payment_before_its_schema(0, &postgres, &providers).await;
    payment.push(PolicySettings::default(), FlagsSettings::default()).await;
    let booking = App::paid_booking_before_its_schema(&postgres, payment.address).await;
    booking.push(quick_policy(), FlagsSettings::default()).await;
    let waits = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
                 AND query LIKE 'CREATE % CONCURRENTLY%' LIMIT 1";
    eventually("an index waits", async || client.query_opt(waits, &[]).await.unwrap()).await;
    eventually("seats are sold and paid for", async || (booking.book().await == 201).then_some(())).await;
    assert_eq!(booking.book().await, 201);
    assert!(client.query_opt(waits, &[]).await.unwrap().is_some(), "it waits still");
    report.batch_execute("COMMIT").await.unwrap();
    postgres.has_its_schema().await;
}

/// Somebody who reads for long holds up a step, and would hold up everybody behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_waits_lets_buyers_pass_and_says_for_whom_it_waits() {
    let postgres = Postgres::start().await;
    migrate(&postgres, &[TABLE]).await.unwrap();
    let (reader, buyer) = (postgres.connect().await, postgres.connect().await);
    reader.batch_execute("SET application_name = 'report'; BEGIN; SELECT * FROM sold").await.unwrap();
    // As the connections of the pool have it.
    buyer.batch_execute("SET lock_timeout = '500ms'").await.unwrap();
    let progress = Progress::default();
    let steps: &'static [Migration] = &[TABLE, COLUMN];
    let migration = migrations::run_until_done(connector(&postgres), "test", steps, progress.clone());
    let migration = tokio::spawn(migration);
    let (bought, began) = (AtomicU32::new(0), Instant::now());
    let message = eventually("it says for whom it waits", async || {
        buyer
            .execute("INSERT INTO sold (id) VALUES (1)", &[])
            .await
            .expect("nobody has to wait longer than a booking does");
        bought.fetch_add(1, Ordering::SeqCst);
        match progress.state() {
            State::UnderWay(message) if message.contains("report") && began.elapsed() > Duration::from_secs(2) => {
                Some(message)
            }
            _ => None,
        }
    })
    .await;
    assert!(message.starts_with("step 2 (column)") && message.contains("idle in transaction"), "{message}");
    let bought = bought.into_inner();
    assert!(bought > 20, "{bought} in {:?}", began.elapsed());
    reader.batch_execute("COMMIT").await.unwrap();
    migration.await.unwrap();
    assert_eq!(progress.state(), State::Done("the schema is up to date (step 2)".into()));
}

/// It was given up by its client after 60 s and begun again, for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_takes_long_is_not_begun_again_and_says_that_it_is_under_way() {
    const LONG: Migration = Migration {
        version: 2,
        name: "long",
        sql: "CREATE SEQUENCE begun; SELECT nextval('begun'); SELECT pg_sleep(62); CREATE TABLE long_done ()",
    };
    let postgres = Postgres::start().await;
    let progresses = [Progress::default(), Progress::default()];
    let steps: &'static [Migration] = &[TABLE, LONG];
    let pods = progresses.clone().map(|progress| {
        let connector = connector(&postgres);
        tokio::spawn(migrations::run_until_done(connector, "test", steps, progress))
    });
    for words in ["step 2 (long) has been under way for", "another pod is migrating the schema"] {
        eventually(words, async || {
            let says =
                |progress: &Progress| matches!(progress.state(), State::UnderWay(what) if what.starts_with(words));
            progresses.iter().any(says).then_some(())
        })
        .await;
    }
    for pod in pods {
        pod.await.unwrap();
    }
    let client = postgres.connect().await;
    let begun: i64 = client.query_one("SELECT last_value FROM begun", &[]).await.unwrap().get(0);
    assert_eq!(begun, 1);
}

/// Numbers are given out when a step is written, and steps are shipped when they are done.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_whose_number_was_left_out_comes_later() {
    let postgres = Postgres::start().await;
    assert_eq!(migrate(&postgres, &[TABLE, INDEX]).await.unwrap(), 2);
    assert_eq!(migrate(&postgres, &[TABLE, COLUMN, INDEX]).await.unwrap(), 1);
    assert_eq!(migrate(&postgres, &[TABLE]).await.unwrap(), 0, "a newer schema is left alone");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_is_built_beside_buyers_and_again_if_it_was_left_half_built() {
    let postgres = Postgres::start().await;
    migrate(&postgres, &[TABLE]).await.unwrap();
    let (client, buyer) = (postgres.connect().await, postgres.connect().await);
    client.batch_execute("INSERT INTO sold (id, seat) VALUES (1, 7), (2, 7)").await.unwrap();
    let refused = migrate(&postgres, &[TABLE, INDEX]).await.unwrap_err().to_string();
    assert!(refused.contains("could not create unique index"), "{refused}");
    // What the role or the database has is for buyers, not for an index that waits for them.
    let bounds = "ALTER DATABASE {} SET lock_timeout = '100ms'; ALTER DATABASE {} SET statement_timeout = '300ms'";
    client.batch_execute(&bounds.replace("{}", &postgres.database)).await.unwrap();
    let valid = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'one_seat_once'::regclass";
    assert!(!client.query_one(valid, &[]).await.unwrap().get::<_, bool>(0), "left half built");
    client.batch_execute("DELETE FROM sold WHERE id = 2").await.unwrap();
    // A buyer in the middle of a purchase: the index waits for it, and nobody for the index.
    buyer.batch_execute("BEGIN; INSERT INTO sold (id, seat) VALUES (3, 8)").await.unwrap();
    let building = tokio::spawn({
        let connector = connector(&postgres);
        async move { migrations::run(&connector, "test", &[TABLE, INDEX], &Progress::default()).await }
    });
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("the index waits for the purchase", async || {
        (client.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) > 0).then_some(())
    })
    .await;
    client.batch_execute("SET lock_timeout = '500ms'; INSERT INTO sold (id, seat) VALUES (4, 9)").await.unwrap();
    // Far longer than the bounds. Meanwhile, the transaction of the pod that migrates asks nothing: with a snapshot of its
    // own, the index would wait for it, and it for the index.
    let asks = "SELECT a.query FROM pg_stat_activity a JOIN pg_locks l USING (pid)
                WHERE l.locktype = 'advisory' AND l.granted AND a.datname = current_database()
                  AND a.state = 'idle in transaction'";
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let asked: Vec<String> = client.query(asks, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    assert_eq!(asked, [""]);
    buyer.batch_execute("COMMIT").await.unwrap();
    assert_eq!(building.await.unwrap().unwrap(), 1);
    assert!(client.query_one(valid, &[]).await.unwrap().get::<_, bool>(0));
}

/// As PostgreSQL 17 has it, and a role with five seconds for a transaction: each step that took longer was begun again for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_bound_of_whole_transactions_is_lifted() {
    const BOUND: Migration = Migration {
        version: 2,
        name: "bound",
        sql: "CREATE TABLE bound AS SELECT setting FROM pg_settings WHERE name = 'transaction_timeout'",
    };
    let postgres = Postgres::start().await;
    let client = postgres.connect().await;
    let as_in_17 = "ALTER DATABASE {} SET search_path = public, pg_catalog;
        CREATE FUNCTION public.set_config(name text, value text, is_local boolean) RETURNS text LANGUAGE sql AS $$
            SELECT pg_catalog.set_config(replace(name, 'transaction_timeout', 'test.transaction_timeout'), value, is_local)
        $$;
        CREATE VIEW public.pg_settings AS SELECT name, setting FROM pg_catalog.pg_settings
            WHERE name <> 'transaction_timeout'
            UNION ALL SELECT 'transaction_timeout', COALESCE(NULLIF(current_setting('test.transaction_timeout', true), ''), '5000')";
    client.batch_execute(&as_in_17.replace("{}", &postgres.database)).await.unwrap();
    assert_eq!(migrate(&postgres, &[TABLE, BOUND, INDEX]).await.unwrap(), 3);
    let bound: String = client.query_one("SELECT setting FROM bound", &[]).await.unwrap().get(0);
    assert_eq!(bound, "0");
    // Behind a pooler, only the role or the server itself can lift it for an index.
    let url = postgres.url();
    let pooled =
        settings(&["--database-url", &url, "--database-pooler", "transaction"]).connector("migration").unwrap();
    let other = Migration {
        version: 4,
        name: "other index",
        sql: "CREATE INDEX CONCURRENTLY IF NOT EXISTS by_id ON sold (id);",
    };
    let refused =
        migrations::run(&pooled, "test", &[TABLE, BOUND, INDEX, other], &Progress::default()).await.unwrap_err();
    assert!(matches!(refused, MigrationError::Bounded { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_start_together_do_each_step_once() {
    const COUNT: Migration =
        Migration { version: 2, name: "count", sql: "INSERT INTO sold (id) VALUES (1); SELECT pg_sleep(0.2)" };
    let postgres = Postgres::start().await;
    let done = join_all((0..6).map(|_| migrate(&postgres, &[TABLE, COUNT]))).await;
    assert_eq!(done.into_iter().map(Result::unwrap).sum::<usize>(), 2);
    let client = postgres.connect().await;
    assert_eq!(client.query_one("SELECT count(*) FROM sold", &[]).await.unwrap().get::<_, i64>(0), 1);
}

/// The server goes on with an index whose pod is gone: that index is waited for, and not dropped when it is nearly done.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_another_session_builds_is_waited_for() {
    let postgres = Postgres::start().await;
    migrate(&postgres, &[TABLE]).await.unwrap();
    let (client, buyer, gone) = (postgres.connect().await, postgres.connect().await, postgres.connect().await);
    buyer.batch_execute("BEGIN; INSERT INTO sold (id, seat) VALUES (3, 8)").await.unwrap();
    let left = tokio::spawn(async move { gone.batch_execute(INDEX.sql).await });
    let index = "SELECT indexrelid FROM pg_index WHERE indexrelid = to_regclass('one_seat_once')";
    let first: u32 =
        eventually("it is begun", async || client.query_opt(index, &[]).await.unwrap().map(|row| row.get(0))).await;
    let progress = Progress::default();
    let steps: &'static [Migration] = &[TABLE, INDEX];
    let migration = migrations::run_until_done(connector(&postgres), "test", steps, progress.clone());
    let migration = tokio::spawn(migration);
    eventually("it says what it waits for", async || match progress.state() {
        State::UnderWay(message) if message.contains("another session, which builds the same index") => Some(()),
        _ => None,
    })
    .await;
    buyer.batch_execute("COMMIT").await.unwrap();
    left.await.unwrap().unwrap();
    migration.await.unwrap();
    assert_eq!(client.query_one(index, &[]).await.unwrap().get::<_, u32>(0), first, "the same index");
}

/// Its connections stay open and silent, as those of a node that has failed; without a bound, they would for two hours.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_not_heard_of_any_more_loses_its_turn() {
    let postgres = Postgres::start().await;
    migrate(&postgres, &[TABLE]).await.unwrap();
    let reader = postgres.connect().await;
    reader.batch_execute("BEGIN; SELECT * FROM sold").await.unwrap();
    let steps: &'static [Migration] = &[TABLE, COLUMN];
    let first = Progress::default();
    let (fail, failed) = std::sync::mpsc::channel::<()>();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let pod = std::thread::spawn({
        let (connector, progress) = (connector(&postgres), first.clone());
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut migration = Box::pin(migrations::run_until_done(connector, "test", steps, progress));
            runtime.block_on(async {
                while failed.try_recv().is_err() {
                    let _ = tokio::time::timeout(Duration::from_millis(50), migration.as_mut()).await;
                }
            });
            // From here on, nothing drives it.
            let _ = ended.recv();
        }
    });
    eventually("it has its turn and waits", async || {
        matches!(first.state(), State::UnderWay(message) if message.starts_with("step 2")).then_some(())
    })
    .await;
    fail.send(()).unwrap();
    reader.batch_execute("COMMIT").await.unwrap();
    let second = Progress::default();
    let migration = tokio::spawn(migrations::run_until_done(connector(&postgres), "test", steps, second.clone()));
    within(Duration::from_secs(60), "another pod does it", async || {
        matches!(second.state(), State::Done(_)).then_some(())
    })
    .await;
    migration.await.unwrap();
    drop(end);
    pod.join().unwrap();
}
