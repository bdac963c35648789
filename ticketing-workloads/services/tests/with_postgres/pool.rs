//! The pool of connections when some of them, or all, fall silent.

use crate::support::pooled::{APPLICATION, NAME, POOL, Pooled, ask};
use crate::support::postgres::{Postgres, settings};
use crate::support::proxy::Proxy;
use crate::support::{eventually, within};
use contract::{CheckStatus, CircuitState};
use futures::future::join_all;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;
use ticketing_services::database::{Connection, DatabaseError};

/// A pool whose way to the database can be cut.
struct Stage {
    postgres: Postgres,
    proxy: Proxy,
    pool: Pooled,
}

impl Stage {
    /// With a full pool.
    async fn start() -> Self {
        let postgres = Postgres::start().await;
        let proxy = Proxy::start(postgres.address()).await;
        let url = format!("postgres://postgres@{}/{}", proxy.address, postgres.database);
        let pool = Pooled::new(&settings(&["--database-url", &url]));
        pool.fill().await;
        Self { postgres, proxy, pool }
    }
}

/// An incident without an operator: each caller lost a second, and the circuit opened, for which the database did nothing.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_are_replaced_within_seconds_and_without_anybodys_help() {
    let stage = Stage::start().await;
    stage.proxy.silence_old();
    let took = stage.pool.until_all_are_served().await;
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert_eq!(stage.pool.dependency.circuit().state, CircuitState::Closed);
    assert_eq!(stage.pool.database.resets().get(), 0);
    assert!(stage.pool.database.unresponsive().get() >= u64::from(POOL) / 2);
    let again = stage.pool.until_all_are_served().await;
    assert!(again < Duration::from_secs(1), "no silent one is left: {again:?}");
}

/// The retry of a caller who met a silent connection does not meet the next one.
#[tokio::test(flavor = "multi_thread")]
async fn one_silent_connection_is_enough_to_suspect_the_others() {
    let stage = Stage::start().await;
    stage.proxy.silence_old();
    let attempts = AtomicU16::new(0);
    let counted = |connection| {
        attempts.fetch_add(1, Ordering::SeqCst);
        ask(connection)
    };
    stage.pool.database.call(counted).await.unwrap();
    assert_eq!(attempts.load(Ordering::SeqCst), 2);
    assert_eq!(stage.pool.database.resets().get(), 0);
}

/// The circuit opens after the first cure, for connections that were in use meanwhile: its break is not for that cure alone.
#[tokio::test(flavor = "multi_thread")]
async fn connections_of_the_same_hang_that_are_found_out_later_end_the_break_too() {
    let stage = Stage::start().await;
    stage.proxy.silence_old();
    let early = tokio::time::timeout(Duration::from_millis(100), stage.pool.database.attempt(ask));
    let others = join_all((1..POOL).map(|_| stage.pool.database.call(ask)));
    let (early, _) = tokio::join!(early, others);
    assert!(early.is_err());
    assert!(stage.pool.dependency.circuit().opened_total >= 1, "as many failures in a row as it takes");
    stage.pool.until_all_are_served().await;
    assert_eq!(stage.pool.database.resets().get(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_says_whether_a_fresh_connection_answers() {
    let stage = Stage::start().await;
    let well = stage.pool.check().await;
    assert_eq!((well.status, well.dependency_answers), (CheckStatus::Healthy, None), "{}", well.message);

    stage.proxy.silence_old();
    let hung = stage.pool.check().await;
    assert_eq!((hung.status, hung.dependency_answers), (CheckStatus::Unhealthy, Some(true)), "{}", hung.message);
    assert_eq!(hung.message, "8 of 8 pooled connections did not answer within 900 ms");
    assert_eq!(hung.dependency.as_deref(), Some(NAME));
    let cured = stage.pool.check().await;
    assert_eq!((cured.status, cured.dependency_answers), (CheckStatus::Healthy, None), "{}", cured.message);

    stage.pool.fill().await;
    stage.proxy.silence_all();
    for what in ["pooled ones are silent, and a fresh one", "there is none left, and a new one is silent"] {
        let down = stage.pool.check().await;
        assert_eq!(
            (down.status, down.dependency_answers),
            (CheckStatus::Unhealthy, Some(false)),
            "{what}: {}",
            down.message
        );
    }
}

/// Calls without a deadline that nobody has abandoned: the pool has no reason to close anything, but nothing is left in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_is_used_up_by_silent_connections_is_seen_as_the_cause() {
    let stage = Stage::start().await;
    stage.proxy.silence_old();
    let in_use = Arc::new(AtomicU16::new(0));
    let callers: Vec<_> = (0..POOL)
        .map(|_| {
            let (database, in_use) = (Arc::clone(&stage.pool.database), Arc::clone(&in_use));
            tokio::spawn(async move {
                let ask = |connection| {
                    in_use.fetch_add(1, Ordering::SeqCst);
                    ask(connection)
                };
                database.attempt(ask).await
            })
        })
        .collect();
    eventually("all connections are in use", async || (in_use.load(Ordering::SeqCst) == POOL).then_some(())).await;
    let report = stage.pool.check().await;
    assert_eq!((report.status, &report.data["hung"]), (CheckStatus::Unhealthy, &0.into()), "{}", report.message);
    assert_eq!(report.dependency_answers, Some(true), "{}", report.message);
    stage.pool.database.reset().unwrap();
    for caller in callers {
        assert!(matches!(caller.await.unwrap(), Err(DatabaseError::GivenUp)));
    }
    assert_eq!(stage.pool.check().await.status, CheckStatus::Healthy);
}

/// A buyer who leaves, or a statement that is a little too slow, costs no connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_answers_after_its_caller_has_left_is_kept() {
    let stage = Stage::start().await;
    let before = (stage.postgres.back_ends(APPLICATION).await, stage.proxy.opened());
    let slow = async |connection: Connection| {
        connection.simple_query("SELECT pg_sleep(0.3)").await.map(drop).map_err(DatabaseError::from)
    };
    for _ in 0..3 {
        let left = join_all(
            (0..POOL).map(|_| tokio::time::timeout(Duration::from_millis(50), stage.pool.database.attempt(slow))),
        );
        assert!(left.await.iter().all(Result::is_err));
    }
    assert!(stage.pool.until_all_are_served().await < Duration::from_secs(2));
    assert_eq!((stage.postgres.back_ends(APPLICATION).await, stage.proxy.opened()), before);
    assert_eq!(stage.pool.database.unresponsive().get(), 0);
}

/// Whatever an abandoned use had begun is undone before the connection is lent again.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_the_transaction_of_somebody_who_left() {
    let stage = Stage::start().await;
    stage.postgres.connect().await.batch_execute("CREATE TABLE written (by text)").await.unwrap();
    let slow = async |connection: Connection| {
        let begun = "BEGIN; INSERT INTO written VALUES ('who left'); SELECT pg_sleep(0.3)";
        connection.batch_execute(begun).await.map_err(DatabaseError::from)
    };
    let left = join_all(
        (0..POOL).map(|_| tokio::time::timeout(Duration::from_millis(100), stage.pool.database.attempt(slow))),
    );
    assert!(left.await.iter().all(Result::is_err));
    // All at once, so that each connection of the pool is among them; a commit would make the rows stay.
    let commit = async |connection: Connection| {
        connection.batch_execute("SELECT pg_sleep(0.2); COMMIT").await.map_err(DatabaseError::from)
    };
    join_all((0..POOL).map(|_| stage.pool.database.attempt(commit))).await;
    let count = "SELECT count(*) FROM written";
    let written: i64 = stage.postgres.connect().await.query_one(count, &[]).await.unwrap().get(0);
    assert_eq!(written, 0);
}

/// Statements that take far too long do not pile up in the server, beside the connections that take their places.
#[tokio::test(flavor = "multi_thread")]
async fn endless_statements_do_not_flood_the_server_with_connections() {
    let stage = Stage::start().await;
    let endless = async |connection: Connection| {
        connection.simple_query("SELECT pg_sleep(14)").await.map(drop).map_err(DatabaseError::from)
    };
    for round in 1..=3 {
        let abandoned =
            (0..POOL).map(|_| tokio::time::timeout(Duration::from_millis(300), stage.pool.database.attempt(endless)));
        assert!(join_all(abandoned).await.iter().all(Result::is_err));
        eventually("their connections are replaced", async || {
            (stage.pool.database.unresponsive().get() == round * u64::from(POOL)).then_some(())
        })
        .await;
    }
    let client = stage.postgres.connect().await;
    within(Duration::from_secs(5), "what is too much is cancelled", async || {
        let query = "SELECT count(*) FROM pg_stat_activity
                     WHERE datname = current_database() AND state = 'active' AND query = 'SELECT pg_sleep(14)'";
        let active: i64 = client.query_one(query, &[]).await.unwrap().get(0);
        (active <= i64::from(POOL)).then_some(())
    })
    .await;
}
