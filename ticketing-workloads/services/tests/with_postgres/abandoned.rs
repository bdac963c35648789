//! Statements that nobody waits for any more.

use crate::support::eventually;
use crate::support::pooled::{APPLICATION, Pooled};
use crate::support::postgres::Postgres;
use std::time::{Duration, Instant};

/// How many statements are under way for the pool.
async fn under_way(postgres: &Postgres) -> i64 {
    let query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'active'";
    postgres.connect().await.query_one(query, &[&APPLICATION]).await.unwrap().get(0)
}

/// Begins a statement that takes far longer than its caller waits.
async fn abandon(pool: &Pooled, postgres: &Postgres) -> Instant {
    let running = pool.run("SELECT pg_sleep(60)");
    let began = eventually("it is under way", async || (under_way(postgres).await == 1).then(Instant::now));
    tokio::select! {
        _ = running => panic!("it took no time"),
        began = began => began,
    }
}

pub async fn is_cancelled(pool: &Pooled, postgres: &Postgres) {
    // The server itself would go on for far longer.
    pool.set_per_try(Duration::from_secs(30));
    let left = abandon(pool, postgres).await;
    eventually("it is cancelled", async || (under_way(postgres).await == 0).then_some(())).await;
    assert!(left.elapsed() < Duration::from_secs(10), "{:?}", left.elapsed());
}

/// Its rows are free again soon, and not only after 15 s.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_was_left_is_cancelled() {
    let postgres = Postgres::alone().await;
    let pool = Pooled::new(&postgres.settings());
    pool.fill().await;
    is_cancelled(&pool, &postgres).await;
}

/// The server ends by itself what it was not asked to end.
#[tokio::test(flavor = "multi_thread")]
async fn the_server_bounds_a_statement_by_the_time_of_an_attempt_and_follows_the_policy() {
    let postgres = Postgres::start().await;
    let pool = Pooled::new(&postgres.settings());
    pool.fill().await;
    let bounds = async || pool.text("SHOW statement_timeout").await;
    assert_eq!(bounds().await, "2s", "1 s for an attempt");
    for (per_try_ms, expected) in [(4_000, "5s"), (300, "1300ms")] {
        pool.set_per_try(Duration::from_millis(per_try_ms));
        for _ in 0..3 {
            assert_eq!(bounds().await, expected);
        }
    }
}

/// A connection that is being opened while the policy changes has the new bound, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_was_being_opened_follows_the_policy() {
    let postgres = Postgres::start().await;
    let slow = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = postgres.url().replace(&postgres.address().to_string(), &slow.local_addr().unwrap().to_string());
    let server = postgres.address();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = slow.accept().await {
            tokio::spawn(async move {
                // The start-up message has arrived by then, with the bound of that moment.
                client.readable().await.unwrap();
                tokio::time::sleep(Duration::from_millis(500)).await;
                let mut server = tokio::net::TcpStream::connect(server).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let pool = Pooled::new(&crate::support::postgres::settings(&["--database-url", &url, "--pgsslmode", "disable"]));
    let change = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        pool.set_per_try(Duration::from_secs(4));
        pool.text("SHOW statement_timeout").await
    };
    let (opened, other) = tokio::join!(pool.text("SHOW statement_timeout"), change);
    assert_eq!((opened.as_str(), other.as_str()), ("5s", "5s"));
    for _ in 0..4 {
        assert_eq!(pool.text("SHOW statement_timeout").await, "5s");
    }
}
