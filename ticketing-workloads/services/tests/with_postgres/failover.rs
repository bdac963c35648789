//! A server that takes no writes any more, and connections that the server ends.

use crate::support::pooled::{APPLICATION, POOL, Pooled};
use crate::support::postgres::{Postgres, settings};
use crate::support::{eventually, within};
use contract::{CheckReport, CheckStatus, CircuitState};
use futures::future::join_all;
use std::time::Duration;
use ticketing_services::database::{Connection, DatabaseError, DatabaseSettings};
use tokio_postgres::error::SqlState;

const READ_ONLY: &str = "the server is read-only: it is a replica now, or writes to it were stopped";

/// Both servers, as an address names them.
fn both(first: &Postgres, second: &Postgres) -> DatabaseSettings {
    settings(&["--database-url", &format!("postgres://postgres@{},{}/postgres", first.address(), second.address())])
}

async fn with_table(server: &Postgres) {
    server.connect().await.batch_execute("CREATE TABLE written (by text)").await.unwrap();
}

async fn write(connection: Connection) -> Result<u64, DatabaseError> {
    Ok(connection.execute("INSERT INTO written SELECT 'pool'", &[]).await?)
}

async fn written(server: &Postgres) -> i64 {
    server.connect().await.query_one("SELECT count(*) FROM written", &[]).await.unwrap().get(0)
}

/// All callers of a full pool write, again and again, until no connection to `server` is left; nobody may notice.
async fn write_until_it_is_left(pool: &Pooled, server: &Postgres) {
    // A back end that is busy reads its configuration a moment later.
    eventually("the server is left", async || {
        for written in join_all((0..POOL).map(|_| pool.database.call(write))).await {
            assert_eq!(written.unwrap(), 1);
        }
        server.back_ends(APPLICATION).await.is_empty().then_some(())
    })
    .await;
}

/// The connections stay open and answer, so nothing but the refused writes tells that the server is the wrong one.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_takes_no_writes_any_more_is_left_without_a_failure() {
    let (old, new) = tokio::join!(Postgres::alone(), Postgres::alone());
    for server in [&old, &new] {
        with_table(server).await;
    }
    let pool = Pooled::new(&both(&old, &new));
    pool.fill().await;
    assert_eq!(old.back_ends(APPLICATION).await.len(), usize::from(POOL));
    old.take_writes(false).await;
    write_until_it_is_left(&pool, &old).await;
    assert!(written(&new).await >= i64::from(POOL));
    assert_eq!(pool.dependency.circuit().state, CircuitState::Closed);
    assert_eq!(pool.database.resets().get(), 0);
    let check = pool.check().await;
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);

    // And back.
    let before = written(&old).await;
    old.take_writes(true).await;
    new.take_writes(false).await;
    write_until_it_is_left(&pool, &new).await;
    assert!(written(&old).await >= before + i64::from(POOL));
}

/// One caller finds out, and nobody else has to.
#[tokio::test(flavor = "multi_thread")]
async fn one_refused_write_is_enough_to_leave() {
    let (old, new) = tokio::join!(Postgres::alone(), Postgres::alone());
    for server in [&old, &new] {
        with_table(server).await;
    }
    let pool = Pooled::new(&both(&old, &new));
    pool.fill().await;
    old.take_writes(false).await;
    eventually("a write is refused", async || {
        let result = pool.database.attempt(write).await;
        result.is_err_and(|error| error.sql_state() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION)).then_some(())
    })
    .await;
    eventually("all connections are given up", async || old.back_ends(APPLICATION).await.is_empty().then_some(()))
        .await;
    assert_eq!(pool.database.attempt(write).await.unwrap(), 1);
    assert_eq!(written(&new).await, 1);
}

/// The first run of the check that fails.
async fn until_unhealthy(pool: &Pooled) -> CheckReport {
    eventually("the check fails", async || {
        Some(pool.check().await).filter(|check| check.status == CheckStatus::Unhealthy)
    })
    .await
}

/// Nobody writes, so the check has to find out.
#[tokio::test(flavor = "multi_thread")]
async fn the_check_sees_idle_connections_to_a_server_that_takes_no_writes() {
    let (old, new) = tokio::join!(Postgres::alone(), Postgres::alone());
    let pool = Pooled::new(&both(&old, &new));
    pool.fill().await;
    old.take_writes(false).await;
    let check = until_unhealthy(&pool).await;
    assert_eq!(check.message, READ_ONLY);
    assert_eq!(check.dependency_answers, Some(true), "another server takes writes: the pool was the cause");
    let check = pool.check().await;
    assert_eq!((check.status, check.dependency_answers), (CheckStatus::Healthy, None), "{}", check.message);
    assert_eq!((old.back_ends(APPLICATION).await.len(), pool.database.resets().get()), (0, 0));

    new.take_writes(false).await;
    let pooled_lead_to_it = until_unhealthy(&pool).await;
    let none_can_be_opened = pool.check().await;
    for check in [pooled_lead_to_it, none_can_be_opened] {
        assert_eq!((check.status, check.message.as_str()), (CheckStatus::Unhealthy, READ_ONLY));
        assert_eq!(check.dependency_answers, Some(false), "no server takes writes");
    }
    old.take_writes(true).await;
    let check = pool.check().await;
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
}

/// With a real replica under the only address: it says what is wrong, and works as soon as the replica is promoted.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_no_database_until_it_is_promoted() {
    let server = Postgres::alone().await;
    with_table(&server).await;
    let pool = Pooled::new(&server.settings());
    pool.fill().await;
    server.become_replica().await;
    let check = pool.check().await;
    assert_eq!((check.status, check.message.as_str()), (CheckStatus::Unhealthy, READ_ONLY));
    assert_eq!(check.dependency_answers, Some(false));
    let refused = pool.database.attempt(write).await.unwrap_err();
    assert_eq!(refused.to_string(), READ_ONLY);
    server.promote().await;
    within(Duration::from_secs(10), "the check is healthy again", async || {
        (pool.check().await.status == CheckStatus::Healthy).then_some(())
    })
    .await;
    assert_eq!(pool.database.attempt(write).await.unwrap(), 1);
    assert_eq!(pool.database.resets().get(), 0);
}

/// Somebody who wants to read from a replica says so in the address.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_may_ask_for_any_server() {
    let server = Postgres::alone().await;
    with_table(&server).await;
    let url = server.url() + "?target_session_attrs=any";
    let pool = Pooled::new(&settings(&["--database-url", &url]));
    server.become_replica().await;
    pool.fill().await;
    let before = server.back_ends(APPLICATION).await;
    let check = pool.check().await;
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
    let refused = pool.database.attempt(write).await.unwrap_err();
    assert_eq!(refused.sql_state(), Some(&SqlState::READ_ONLY_SQL_TRANSACTION));
    assert_eq!(server.back_ends(APPLICATION).await, before, "another connection would be no better");
}

/// Its machine takes connections and its processes answer none: each attempt must get past it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_left_for_the_next_one_of_the_address() {
    let (old, new) = tokio::join!(Postgres::alone(), Postgres::alone());
    let pool = Pooled::new(&both(&old, &new));
    pool.fill().await;
    let hung = old.hang().await;
    let took = pool.until_all_are_served().await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    assert_eq!((pool.database.resets().get(), pool.dependency.circuit().state), (0, CircuitState::Closed));
    // Those that nobody has asked yet are found by the check.
    pool.check().await;
    let check = pool.check().await;
    assert_eq!(check.status, CheckStatus::Healthy, "{}", check.message);
    drop(hung);
}

/// Of a host that is gone nobody hears anything, of one that is a replica that it is one.
#[tokio::test(flavor = "multi_thread")]
async fn what_says_more_about_the_cause_is_named() {
    let replica = Postgres::alone().await;
    replica.become_replica().await;
    let gone = crate::support::nobody().await;
    for hosts in [format!("{gone},{}", replica.address()), format!("{},{gone}", replica.address())] {
        let pool = Pooled::new(&settings(&["--database-url", &format!("postgres://postgres@{hosts}/postgres")]));
        assert_eq!(pool.check().await.message, READ_ONLY, "{hosts}");
    }
}

/// Errors after which a server ends the connection, or whatever stands before it has lost the server. The pool does not
/// wait until it notices the end.
#[rstest::rstest]
#[case::administrator("57P01")]
#[case::crash("57P02")]
#[case::start("57P03")]
#[case::connection_failure("08006")]
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_is_not_given_out_again(#[case] state: &str) {
    let postgres = Postgres::start().await;
    let pool = Pooled::new(&postgres.settings());
    let fails = format!("DO $$ BEGIN RAISE EXCEPTION 'lost' USING ERRCODE = '{state}'; END $$");
    pool.fill().await;
    let before = postgres.back_ends(APPLICATION).await;
    for _ in 0..POOL {
        let error = pool.run(&fails).await.unwrap_err();
        assert_eq!(error.sql_state().unwrap().code(), state);
    }
    eventually("each has lost its place", async || {
        let after = postgres.back_ends(APPLICATION).await;
        before.iter().all(|pid| !after.contains(pid)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_a_statement_costs_no_connection() {
    let postgres = Postgres::start().await;
    let pool = Pooled::new(&postgres.settings());
    pool.fill().await;
    let before = postgres.back_ends(APPLICATION).await;
    for _ in 0..POOL {
        pool.run("SELECT 1 / 0").await.unwrap_err();
    }
    pool.fill().await;
    assert_eq!(postgres.back_ends(APPLICATION).await, before);
}

/// Of connections without traffic the kernel tries the other end, long before anybody needs them.
#[tokio::test(flavor = "multi_thread")]
async fn pooled_connections_are_kept_alive() {
    let postgres = Postgres::start().await;
    let pool = Pooled::new(&postgres.settings());
    pool.fill().await;
    let query = "SELECT client_port FROM pg_stat_activity WHERE datname = $1 AND application_name = $2 LIMIT 1";
    let client = postgres.connect().await;
    let port: i32 = client.query_one(query, &[&postgres.database, &APPLICATION]).await.unwrap().get(0);
    let ends = (format!(":{port:04X}"), format!(":{:04X}", postgres.address().port()));
    eventually("its timer runs", async || {
        let sockets = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let mut fields = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let socket = fields.find(|fields| fields[1].ends_with(&ends.0) && fields[2].ends_with(&ends.1))?;
        // Kind of the timer, 2 for keep-alives, and hundredths of a second until it runs out.
        let (kind, left) = socket[5].split_once(':')?;
        let left = u64::from_str_radix(left, 16).unwrap();
        (kind == "02" && left <= 500).then_some(())
    })
    .await;
}
