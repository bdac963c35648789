//! Versioned migrations, in steps that pods of the version before survive while they run.
//!
//! - One pod at a time migrates. It holds an advisory lock in a transaction that does nothing else, so no pod waits in a
//!   statement for another: a statement that waits would itself hold up an index that is built `CONCURRENTLY`.
//! - Each step is a transaction of its own, so half a step never stays and what is done is not begun again. Nobody gives a
//!   step up for its length.
//! - A step waits for a lock for less time than a booking does. Whoever queues behind it meanwhile does not notice, and
//!   the step lets them pass before it tries again.
//! - A step that builds indexes `CONCURRENTLY` takes no lock that anybody meets.
//!
//! All of it works through PgBouncer in transaction mode: nothing is kept in a session.

use super::connector::Driver;
use super::{Connector, DatabaseError};
use arc_swap::ArcSwap;
use backon::{BackoffBuilder, ExponentialBuilder};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, SimpleQueryMessage};

/// Key of the advisory lock under which a step changes the schema: "ticketwv" in ASCII. Version 0.1 waits for it, so it
/// is never held for longer than a step takes.
const STEP_LOCK: i64 = 0x7469_636b_6574_7776;
/// Key of the advisory lock of the pod that migrates: "ticketwm" in ASCII.
const POD_LOCK: i64 = 0x7469_636b_6574_776d;
/// Time to open a connection.
const OPEN_TIME: Duration = Duration::from_secs(10);
/// Time between two looks whether the pod that migrates is done, or a lock is free.
const POLL: Duration = Duration::from_millis(500);
/// Time between two looks at what holds up a step that was just begun: several, while it waits for a lock.
const LOOK: Duration = Duration::from_millis(100);
/// After this time, a step that is under way is said to be, and what holds it up.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// Time that the server has to say what holds a step up. If it has nothing to say, it is not there any more.
const SAY_TIME: Duration = Duration::from_secs(10);

/// What holds for a step. The wait for a lock is shorter than that of a booking (`lock_timeout` of the pool).
const STEP_BOUNDS: &str = "
    SET LOCAL lock_timeout = '300ms'; SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = '10s';
    SELECT set_config(name, '1s', true) FROM pg_settings WHERE name = 'client_connection_check_interval'";

/// What is recorded.
const TABLE: &str = "CREATE TABLE schema_migrations (
    service    text NOT NULL,
    version    integer NOT NULL,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (service, version)
)";

/// One step of a service's schema.
#[derive(Clone, Copy, Debug)]
pub struct Migration {
    /// Its number, from 1. Steps are done in this order; a number that is missing in between may come later.
    pub version: i32,
    /// What it does, in a few words.
    pub name: &'static str,
    /// Its statements. If they build indexes `CONCURRENTLY`, they do nothing else, and each is done on its own.
    pub sql: &'static str,
}

impl Migration {
    /// Its statements, if they have to be done outside a transaction.
    fn online(&self) -> Option<Vec<String>> {
        let code: Vec<_> = self.sql.lines().filter(|line| !line.trim_start().starts_with("--")).collect();
        let code = code.join("\n");
        let statements = || code.split(';').map(str::trim).filter(|one| !one.is_empty()).map(String::from).collect();
        code.contains(" CONCURRENTLY ").then(statements)
    }

    fn in_words(&self) -> String {
        format!("step {} ({})", self.version, self.name)
    }
}

/// The index that a statement of a step builds: `CREATE INDEX CONCURRENTLY IF NOT EXISTS name ON …`.
fn index_of(statement: &str) -> Option<&str> {
    statement.split_whitespace().skip_while(|word| !word.eq_ignore_ascii_case("EXISTS")).nth(1)
}

/// A migration that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The server could not be reached.
    #[error("{0}")]
    Unreached(String),
    /// It refused a statement.
    #[error("{step} failed: {source}{}", hint(.source))]
    Step {
        /// The step.
        step: String,
        /// Its words.
        source: DatabaseError,
    },
    /// It did not answer any more.
    #[error("{step}: the server did not answer for {} s", SAY_TIME.as_secs())]
    Silent {
        /// The step.
        step: String,
    },
}

/// What to do about an error that comes again until somebody does something.
fn hint(error: &DatabaseError) -> &'static str {
    match error.sql_state() {
        Some(state) if *state == SqlState::INSUFFICIENT_PRIVILEGE => {
            "; give the role of the services the right that it lacks (GRANT CREATE ON SCHEMA public TO …, and ownership of \
             the tables), or run one service as their owner"
        }
        _ => "",
    }
}

/// How far a migration is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The server could not be asked yet; why, in words.
    Unknown(String),
    /// It is under way, or waits; for what, in words.
    UnderWay(String),
    /// It failed, and is tried again; the server's words.
    Failed(String),
    /// The schema is up to date.
    Done(String),
}

/// Where a migration says how far it is.
#[derive(Clone)]
pub struct Progress(Arc<ArcSwap<State>>);

impl Default for Progress {
    fn default() -> Self {
        Self(Arc::new(ArcSwap::from_pointee(State::Unknown("the database was not asked yet".to_owned()))))
    }
}

impl Progress {
    /// How far it is now.
    pub fn state(&self) -> State {
        State::clone(&self.0.load())
    }

    /// In the log, too, but not over and over.
    fn under_way(&self, message: &str, subject: &str) {
        let is_new = !matches!(&**self.0.load(), State::UnderWay(before) if before.starts_with(subject));
        if is_new {
            tracing::info!("schema migration: {message}");
        }
        self.0.store(Arc::new(State::UnderWay(message.to_owned())));
    }

    fn set(&self, state: State) {
        self.0.store(Arc::new(state));
    }
}

/// Tries to migrate until it works, and says in `progress` how far it is. The service starts without: a pod must be able
/// to start while the database is away.
pub async fn run_until_done(
    connector: Connector,
    service: &'static str,
    migrations: &'static [Migration],
    progress: Progress,
) {
    let waits = || {
        let waits = ExponentialBuilder::new().with_min_delay(Duration::from_millis(200));
        waits.with_max_delay(Duration::from_secs(5)).with_jitter().without_max_times().build()
    };
    let mut pauses = waits();
    loop {
        let error = match run(&connector, service, migrations, &progress).await {
            Ok(applied) => {
                let last = migrations.iter().map(|migration| migration.version).max().unwrap_or_default();
                progress.set(State::Done(format!("the schema is up to date (step {last})")));
                tracing::info!(service, applied, "the schema is up to date");
                return;
            }
            Err(error) => error,
        };
        let wait = pauses.next().unwrap_or(POLL);
        tracing::warn!(%error, retry_in_ms = wait.as_millis(), "schema migration failed; retrying");
        progress.set(match error {
            MigrationError::Unreached(words) => State::Unknown(words),
            other => State::Failed(other.to_string()),
        });
        tokio::time::sleep(wait).await;
    }
}

/// Migrates; the answer is how many steps were missing.
pub async fn run(
    connector: &Connector,
    service: &str,
    migrations: &[Migration],
    progress: &Progress,
) -> Result<usize, MigrationError> {
    let session = Session::open(connector).await?;
    let looking = |source| MigrationError::Step { step: "reading which steps are done".to_owned(), source };
    let missing = async || -> Result<Vec<Migration>, MigrationError> {
        let done = session.done(service).await.map_err(looking)?;
        Ok(migrations.iter().filter(|migration| !done.contains(&migration.version)).copied().collect())
    };
    // Nothing is locked and no right is needed where nothing is to be done. A schema that is newer than this program is
    // left alone: during an update both versions run.
    if missing().await?.is_empty() {
        return Ok(0);
    }
    let turn = Session::open(connector).await?;
    while !turn.takes_its_turn().await.map_err(looking)? {
        progress.under_way("another pod is migrating the schema", "another pod");
        tokio::time::sleep(POLL).await;
        if missing().await?.is_empty() {
            return Ok(0);
        }
    }
    let missing = missing().await?;
    let is_new = session.done(service).await.map_err(looking)?.is_empty();
    let mut rest = missing.as_slice();
    while let Some(first) = rest.first() {
        // In a new database nobody is there to be disturbed: its first steps are there together, or not at all.
        let together = if is_new && first.online().is_none() {
            rest.iter().take_while(|one| one.online().is_none()).count()
        } else {
            1
        };
        let (some, others) = rest.split_at(together);
        step(&session, &turn, service, some, progress).await?;
        rest = others;
    }
    Ok(missing.len())
}

/// Does one step, or several together, however long it takes and however often it has to begin again because a lock was not
/// free.
async fn step(
    session: &Session,
    turn: &Session,
    service: &str,
    migrations: &[Migration],
    progress: &Progress,
) -> Result<(), MigrationError> {
    let (began, at) = (Instant::now(), AtomicUsize::new(0));
    let words = || migrations.get(at.load(Ordering::Relaxed)).map_or_else(String::new, Migration::in_words);
    let mut pauses = ExponentialBuilder::new()
        .with_min_delay(POLL)
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .build();
    let mut tries = 0_u32;
    loop {
        tries += 1;
        let failed = |source| MigrationError::Step { step: words(), source };
        let pid = session.pid().await.map_err(failed)?;
        let attempt = async {
            match migrations {
                [one] if one.online().is_some() => session.build(service, one).await,
                several => session.change(service, several, &at).await,
            }
        };
        let mut attempt = std::pin::pin!(attempt);
        let (tried, mut blocker) = (Instant::now(), None);
        let done = loop {
            tokio::select! {
                done = &mut attempt => break done,
                () = tokio::time::sleep(if tried.elapsed() < SAY_AFTER { LOOK } else { SAY_AFTER }) => {}
            }
            let said = tokio::time::timeout(SAY_TIME, turn.blockers(&pid)).await;
            let Ok(said) = said else { return Err(MigrationError::Silent { step: words() }) };
            blocker = said.map_err(failed)?.or(blocker);
            if began.elapsed() >= SAY_AFTER {
                let waits = blocker.as_ref().map_or_else(String::new, |who| format!("; it waits for {who}"));
                let message = format!("{} has been under way for {} s{waits}", words(), began.elapsed().as_secs());
                progress.under_way(&message, &words());
            }
        };
        match done {
            Ok(Done::Yes) => {
                for Migration { version, name, .. } in migrations {
                    tracing::info!(step = version, name, tries, "schema migrated");
                }
                return Ok(());
            }
            Ok(Done::LockedByOldPod) => {}
            Err(error) if error.sql_state() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {}
            Err(source) => return Err(failed(source)),
        }
        let by = blocker.unwrap_or_else(|| "somebody who is gone by now".to_owned());
        let message = format!(
            "{} waits for a lock, held by {by}; tried {tries} times in {} s, and lets others pass in between",
            words(),
            began.elapsed().as_secs()
        );
        progress.under_way(&message, &words());
        tokio::time::sleep(pauses.next().unwrap_or(POLL)).await;
    }
}

enum Done {
    Yes,
    /// A pod of version 0.1 looks whether it has something to migrate.
    LockedByOldPod,
}

/// A connection of its own, with what drives it.
struct Session {
    client: Client,
    _driver: AbortOnDrop,
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Rows of a simple query, each as its first column. Statements are text alone: a prepared one would stay in a session
/// of PgBouncer's.
fn first_columns(messages: &[SimpleQueryMessage]) -> Vec<String> {
    let first = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => row.try_get(0).ok().flatten().map(String::from),
        _ => None,
    };
    messages.iter().filter_map(first).collect()
}

/// A text inside a statement.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

impl Session {
    async fn open(connector: &Connector) -> Result<Self, MigrationError> {
        let opened = tokio::time::timeout(OPEN_TIME, connector.open()).await;
        let unreached = |error: DatabaseError| MigrationError::Unreached(connector.explain(&error));
        let (client, connection): (Client, Driver) = opened
            .map_err(|_| unreached(DatabaseError::ConnectTimeout))?
            .map_err(|error| unreached(DatabaseError::Connect(error)))?;
        let driver = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { client, _driver: AbortOnDrop(driver) })
    }

    async fn ask(&self, statement: &str) -> Result<Vec<String>, DatabaseError> {
        Ok(first_columns(&self.client.simple_query(statement).await?))
    }

    /// Whether the pod may migrate from now on, for as long as this session lives.
    async fn takes_its_turn(&self) -> Result<bool, DatabaseError> {
        self.client.batch_execute("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0").await?;
        let is_ours = self.ask(&format!("SELECT pg_try_advisory_xact_lock({POD_LOCK})")).await? == ["t"];
        if !is_ours {
            self.client.batch_execute("ROLLBACK").await?;
        }
        Ok(is_ours)
    }

    /// Steps that are done.
    async fn done(&self, service: &str) -> Result<BTreeSet<i32>, DatabaseError> {
        if self.ask("SELECT to_regclass('schema_migrations')").await?.is_empty() {
            return Ok(BTreeSet::new());
        }
        let query = format!("SELECT version FROM schema_migrations WHERE service = {}", quoted(service));
        Ok(self.ask(&query).await?.iter().filter_map(|version| version.parse().ok()).collect())
    }

    async fn pid(&self) -> Result<String, DatabaseError> {
        Ok(self.ask("SELECT pg_backend_pid()").await?.concat())
    }

    /// Who holds up the session with this process id, in words.
    async fn blockers(&self, pid: &str) -> Result<Option<String>, DatabaseError> {
        let query = format!(
            "SELECT format('process %s (%s, %s for %s s)', pid, COALESCE(NULLIF(application_name, ''), usename, 'unnamed'),
                           COALESCE(state, backend_type), COALESCE(floor(extract(epoch FROM now() - xact_start)), 0))
             FROM pg_stat_activity WHERE pid = ANY(pg_blocking_pids({pid})) LIMIT 3"
        );
        // What was seen before in this transaction would be shown again.
        self.client.simple_query("SELECT pg_stat_clear_snapshot()").await?;
        let who = self.ask(&query).await?.join(" and ");
        Ok(Some(who).filter(|who| !who.is_empty()))
    }

    /// Does steps in a transaction, with their records; `at` is which of them is under way.
    async fn change(&self, service: &str, migrations: &[Migration], at: &AtomicUsize) -> Result<Done, DatabaseError> {
        let all = async {
            if !self.begin().await? {
                return Ok(Done::LockedByOldPod);
            }
            for (index, migration) in migrations.iter().enumerate() {
                at.store(index, Ordering::Relaxed);
                self.client.batch_execute(migration.sql).await?;
                self.record(service, migration).await?;
            }
            self.client.batch_execute("COMMIT").await?;
            Ok(Done::Yes)
        };
        self.or_roll_back(all.await).await
    }

    /// Begins a transaction in which the schema may be changed, unless a pod of version 0.1 is about to.
    async fn begin(&self) -> Result<bool, DatabaseError> {
        self.client.batch_execute(&format!("BEGIN; {STEP_BOUNDS}")).await?;
        if self.ask(&format!("SELECT pg_try_advisory_xact_lock({STEP_LOCK})")).await? != ["t"] {
            self.client.batch_execute("ROLLBACK").await?;
            return Ok(false);
        }
        // `IF NOT EXISTS` would ask for the right to create it even where it exists.
        if self.ask("SELECT to_regclass('schema_migrations')").await?.is_empty() {
            self.client.batch_execute(TABLE).await?;
        }
        Ok(true)
    }

    async fn record(&self, service: &str, migration: &Migration) -> Result<(), DatabaseError> {
        let insert = format!(
            "INSERT INTO schema_migrations (service, version, name) VALUES ({}, {}, {})",
            quoted(service),
            migration.version,
            quoted(migration.name)
        );
        Ok(self.client.batch_execute(&insert).await?)
    }

    async fn or_roll_back<T>(&self, done: Result<T, DatabaseError>) -> Result<T, DatabaseError> {
        if done.is_err() {
            // If this fails, too, the connection is gone, and the transaction with it.
            let _ = self.client.batch_execute("ROLLBACK").await;
        }
        done
    }

    /// Builds indexes beside everything else that goes on, and writes it down.
    async fn build(&self, service: &str, migration: &Migration) -> Result<Done, DatabaseError> {
        for statement in &migration.online().unwrap_or_default() {
            if let Some(index) = index_of(statement) {
                // One that was given up half built stays as an invalid one, which costs time and serves nobody.
                let invalid = format!(
                    "SELECT 1 FROM pg_index WHERE indexrelid = to_regclass({}) AND NOT indisvalid",
                    quoted(index)
                );
                if !self.ask(&invalid).await?.is_empty() {
                    self.client.batch_execute(&format!("DROP INDEX CONCURRENTLY IF EXISTS {index}")).await?;
                }
            }
            self.client.batch_execute(statement).await?;
        }
        let written = async {
            if !self.begin().await? {
                return Ok(Done::LockedByOldPod);
            }
            self.record(service, migration).await?;
            self.client.batch_execute("COMMIT").await?;
            Ok(Done::Yes)
        };
        self.or_roll_back(written.await).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_build_indexes_beside_buyers_are_taken_apart() {
        let sql = "-- Why; it is so.\nCREATE INDEX CONCURRENTLY IF NOT EXISTS one ON a (b);\n\
                   CREATE INDEX CONCURRENTLY IF NOT EXISTS two ON a (c)\n    WHERE d;\n";
        let statements = Migration { version: 1, name: "x", sql }.online().unwrap();
        let indexes: Vec<_> = statements.iter().map(|statement| index_of(statement).unwrap()).collect();
        assert_eq!(indexes, ["one", "two"]);
        let other = Migration { version: 1, name: "x", sql: "-- not CONCURRENTLY at all\nCREATE TABLE a ();" };
        assert_eq!(other.online(), None);
    }
}
