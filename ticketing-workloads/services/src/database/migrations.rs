//! Versioned migrations. They run under an advisory lock, so that several pods may start at once, and in one
//! transaction, so that half a migration never stays.

use super::{Connector, DatabaseError};
use backon::{ExponentialBuilder, Retryable};
use std::time::Duration;
use tokio_postgres::Client;

/// Key of the advisory lock: "ticketwv" in ASCII.
const LOCK: i64 = 0x7469_636b_6574_7776;
/// Longest time of one try.
const TIMEOUT: Duration = Duration::from_secs(60);

/// One step of a service's schema.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Place in the order, from 1.
    pub version: i32,
    /// What it does, in a few words.
    pub name: &'static str,
    /// Its statements.
    pub sql: &'static str,
}

/// Tries to migrate until it works. The service starts without: a pod must be able to start while the database is
/// away.
pub async fn run_until_done(connector: Connector, service: &'static str, migrations: &'static [Migration]) {
    let waits = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(200))
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times();
    let migrate = || async {
        match tokio::time::timeout(TIMEOUT, run(&connector, service, migrations)).await {
            Ok(result) => result,
            Err(_) => Err(DatabaseError::ConnectTimeout),
        }
    };
    let log = |error: &DatabaseError, wait: Duration| {
        tracing::warn!(%error, retry_in_ms = wait.as_millis(), "schema migration failed; retrying");
    };
    match migrate.retry(waits).notify(log).await {
        Ok(applied) => tracing::info!(service, applied, "the schema is up to date"),
        Err(error) => tracing::error!(%error, "schema migration failed"),
    }
}

/// Migrates; the answer is how many steps were missing.
pub async fn run(connector: &Connector, service: &str, migrations: &[Migration]) -> Result<usize, DatabaseError> {
    let (mut client, connection) = connector.open().await.map_err(DatabaseError::Connect)?;
    let driver = AbortOnDrop(tokio::spawn(connection));
    let applied = migrate(&mut client, service, migrations).await;
    drop((client, driver));
    applied
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn migrate(client: &mut Client, service: &str, migrations: &[Migration]) -> Result<usize, DatabaseError> {
    let transaction = client.transaction().await?;
    transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    transaction
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations (
                 service    text NOT NULL,
                 version    integer NOT NULL,
                 name       text NOT NULL,
                 applied_at timestamptz NOT NULL DEFAULT now(),
                 PRIMARY KEY (service, version)
             )",
        )
        .await?;
    let query = "SELECT COALESCE(max(version), 0) FROM schema_migrations WHERE service = $1";
    let current: i32 = transaction.query_one(query, &[&service]).await?.get(0);
    // A schema that is newer than this program is left alone: during an update both versions run.
    let missing: Vec<_> = migrations.iter().filter(|migration| migration.version > current).collect();
    for migration in &missing {
        transaction.batch_execute(migration.sql).await?;
        let insert = "INSERT INTO schema_migrations (service, version, name) VALUES ($1, $2, $3)";
        transaction.execute(insert, &[&service, &migration.version, &migration.name]).await?;
    }
    transaction.commit().await?;
    Ok(missing.len())
}
