//! Versioned migrations, in steps that pods of the version before survive while they run.
//!
//! - One pod at a time migrates. It holds an advisory lock in a transaction that does nothing else, so no pod waits in a
//!   statement for another: a statement that waits would itself hold up an index that is built `CONCURRENTLY`, and so would
//!   one that is made in that transaction. The server ends the transaction of a pod that is not heard of.
//! - Each step is a transaction of its own, so half a step never stays and what is done is not begun again. No step is
//!   given up for its length. In a new database, steps are done together.
//! - A step waits for a lock for less time than a booking does. Buyers who queue behind it meanwhile do not notice, and
//!   the step lets them pass before it tries again.
//! - A step that builds indexes `CONCURRENTLY` takes no lock that a booking meets, and may wait for as long as it takes. So
//!   its session must have no bounds; behind a pooler that is for the role to say, or for an address of the server itself.
//!
//! All else works through PgBouncer in transaction mode: nothing is kept in a session.

use super::connector::Driver;
use super::settings::Sessions;
use super::{Connector, DatabaseError};
use arc_swap::ArcSwap;
use backon::{BackoffBuilder, ExponentialBuilder};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
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
/// Time without a sign of life after which the pod that migrates loses its lock; it gives several in that time.
const LOCK_BOUND: &str = "20s";
/// Time after which it is asked again whether the pod that migrates is done, or a lock is free.
const POLL: Duration = Duration::from_millis(500);
/// Time after which it is asked again what holds up a step that was just begun: several times, while it waits for a lock.
const ASK_EARLY: Duration = Duration::from_millis(100);
/// After this time, a step that is under way is said to be, and what holds it up.
const SAY_AFTER: Duration = Duration::from_secs(1);
/// Time that the server has to say what holds a step up. If it has nothing to say, it is not there any more.
const SAY_TIME: Duration = Duration::from_secs(10);

/// What holds for a step. The wait for a lock is shorter than that of a booking (`lock_timeout` of the pool).
const STEP_BOUNDS: &str = "
    SET LOCAL lock_timeout = '300ms'; SET LOCAL statement_timeout = 0;
    SET LOCAL idle_in_transaction_session_timeout = '10s';
    SET LOCAL tcp_keepalives_idle = 10; SET LOCAL tcp_keepalives_interval = 5; SET LOCAL tcp_keepalives_count = 3;
    SELECT set_config(name, '1s', true) FROM pg_settings WHERE name = 'client_connection_check_interval'";

/// Lifts the bound of a transaction as a whole, which PostgreSQL has from version 17 on, for this transaction or (`false`) for
/// this session.
fn without_transaction_bound(for_this_transaction: bool) -> String {
    format!("SELECT set_config(name, '0', {for_this_transaction}) FROM pg_settings WHERE name = 'transaction_timeout'")
}

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
    /// The server refused a statement of this step.
    #[error("{step} failed: {source}{}", hint(.source))]
    Step { step: String, source: DatabaseError },
    /// The server did not answer any more during this step.
    #[error("{step}: the server did not answer for {} s", SAY_TIME.as_secs())]
    Silent { step: String },
    /// Behind a pooler, the bounds of a session cannot be lifted for this step.
    #[error(
        "{step} builds indexes, for which the role has too little time behind a pooler (lock_timeout, statement_timeout, \
         transaction_timeout): set DATABASE_MIGRATION_URL to the address of the server itself"
    )]
    Bounded { step: String },
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
pub struct Progress {
    state: Arc<ArcSwap<State>>,
    /// Steps that are done, as far as was seen.
    done: Arc<ArcSwap<BTreeSet<i32>>>,
}

impl Default for Progress {
    fn default() -> Self {
        let state = State::Unknown("the database was not asked yet".to_owned());
        Self { state: Arc::new(ArcSwap::from_pointee(state)), done: Arc::default() }
    }
}

impl Progress {
    /// How far it is now.
    pub fn state(&self) -> State {
        State::clone(&self.state.load())
    }

    /// Whether this step is known to be done, by whichever pod. Those behind it may wait for as long as they take.
    pub fn is_done(&self, version: i32) -> bool {
        self.done.load().contains(&version)
    }

    /// Whether it is known that this step is not done. Before the server was asked nothing is.
    pub fn is_missing(&self, version: i32) -> bool {
        let done = self.done.load();
        !done.is_empty() && !done.contains(&version)
    }

    /// How many steps are known to be done.
    pub fn done(&self) -> usize {
        self.done.load().len()
    }

    /// In the log, too, but not over and over.
    fn under_way(&self, message: &str, subject: &str) {
        let is_new = !matches!(&**self.state.load(), State::UnderWay(before) if before.starts_with(subject));
        if is_new {
            tracing::info!("schema migration: {message}");
        }
        self.set(State::UnderWay(message.to_owned()));
    }

    fn set(&self, state: State) {
        self.state.store(Arc::new(state));
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
        let missing = migrations.iter().filter(|migration| !done.contains(&migration.version)).copied().collect();
        progress.done.store(Arc::new(done));
        Ok(missing)
    };
    // Nothing is locked and no right is needed where nothing is to be done. A schema that is newer than this program is
    // left alone: during an update both versions run.
    if missing().await?.is_empty() {
        return Ok(0);
    }
    let (lock, watcher) = (Session::open(connector).await?, Session::open(connector).await?);
    while !lock.takes_lock().await.map_err(looking)? {
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
        step(&session, &lock, &watcher, service, some, progress).await?;
        let done = progress.done.load().iter().copied().chain(some.iter().map(|one| one.version)).collect();
        progress.done.store(Arc::new(done));
        rest = others;
    }
    Ok(missing.len())
}

/// Does one step, or several together, however long it takes and however often it has to begin again because a lock was not
/// free. `lock` is the session whose transaction says that this pod migrates.
async fn step(
    session: &Session,
    lock: &Session,
    watcher: &Session,
    service: &str,
    migrations: &[Migration],
    progress: &Progress,
) -> Result<(), MigrationError> {
    let (began, under_way) = (Instant::now(), UnderWay::default());
    let words = || migrations.get(under_way.step()).map_or_else(String::new, Migration::in_words);
    let failed = |source| MigrationError::Step { step: words(), source };
    // Keeps the lock, and asks who holds up the step.
    let holds_up = async || {
        let said = async {
            lock.keep_lock().await?;
            watcher.blockers(under_way.pid()).await
        };
        match tokio::time::timeout(SAY_TIME, said).await {
            Ok(said) => said.map_err(failed),
            Err(_) => Err(MigrationError::Silent { step: words() }),
        }
    };
    let mut pauses = ExponentialBuilder::new()
        .with_min_delay(POLL)
        .with_max_delay(Duration::from_secs(5))
        .with_jitter()
        .without_max_times()
        .build();
    let mut tries = 0_u32;
    loop {
        tries += 1;
        let attempt = async {
            match migrations {
                [one] if one.online().is_some() => session.build(service, one, &under_way).await,
                several => session.change(service, several, &under_way).await,
            }
        };
        let mut attempt = std::pin::pin!(attempt);
        let (tried, mut blocker) = (Instant::now(), None);
        let done = loop {
            tokio::select! {
                done = &mut attempt => break done,
                () = tokio::time::sleep(if tried.elapsed() < SAY_AFTER { ASK_EARLY } else { SAY_AFTER }) => {}
            }
            blocker = holds_up().await?.or(blocker);
            if began.elapsed() >= SAY_AFTER {
                let waits = blocker.as_ref().map_or_else(String::new, |who| format!("; it waits for {who}"));
                let message = format!("{} has been under way for {} s{waits}", words(), began.elapsed().as_secs());
                progress.under_way(&message, &words());
            }
        };
        let waits_for = match done {
            Ok(Done::Yes) => {
                for Migration { version, name, .. } in migrations {
                    tracing::info!(step = version, name, tries, "schema migrated");
                }
                return Ok(());
            }
            Ok(Done::Bounded) => return Err(MigrationError::Bounded { step: words() }),
            Ok(Done::Elsewhere) => "another session, which builds the same index or vacuums its table".to_owned(),
            Ok(Done::LockedByOldPod) => {
                "a pod of version 0.1, which asks whether it has something to migrate".to_owned()
            }
            Err(error) if error.sql_state() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                format!("a lock, held by {}", blocker.unwrap_or_else(|| "a session that is gone by now".to_owned()))
            }
            Err(source) => return Err(failed(source)),
        };
        let message = format!(
            "{} waits for {waits_for}; tried {tries} times in {} s, and lets others pass in between",
            words(),
            began.elapsed().as_secs()
        );
        progress.under_way(&message, &words());
        holds_up().await?;
        tokio::time::sleep(pauses.next().unwrap_or(POLL)).await;
        holds_up().await?;
    }
}

/// What an attempt at some steps does at this moment.
#[derive(Default)]
struct UnderWay {
    /// Which of the steps.
    step: AtomicUsize,
    /// Process id of the session that does it; 0 while there is no session that is certainly its own.
    pid: AtomicI32,
}

impl UnderWay {
    fn step(&self) -> usize {
        self.step.load(Ordering::Relaxed)
    }

    fn pid(&self) -> i32 {
        self.pid.load(Ordering::Relaxed)
    }
}

/// How an attempt ended that did not fail.
enum Done {
    Yes,
    /// A pod of version 0.1 asks whether it has something to migrate.
    LockedByOldPod,
    /// Another session builds the index, such as that of a pod that is gone.
    Elsewhere,
    /// The session is a pooler's, and has bounds that an index may need more than.
    Bounded,
}

/// A connection of its own, with what drives it.
struct Session {
    client: Client,
    sessions: Sessions,
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
        Ok(Self { client, sessions: connector.sessions(), _driver: AbortOnDrop(driver) })
    }

    async fn ask(&self, statement: &str) -> Result<Vec<String>, DatabaseError> {
        Ok(first_columns(&self.client.simple_query(statement).await?))
    }

    /// Whether the pod may migrate from now on, for as long as it keeps its lock.
    async fn takes_lock(&self) -> Result<bool, DatabaseError> {
        let unbounded = without_transaction_bound(true);
        let begin = format!("BEGIN; SET LOCAL idle_in_transaction_session_timeout = '{LOCK_BOUND}'; {unbounded}");
        self.client.batch_execute(&begin).await?;
        let is_ours = self.ask(&format!("SELECT pg_try_advisory_xact_lock({POD_LOCK})")).await? == ["t"];
        if !is_ours {
            self.client.batch_execute("ROLLBACK").await?;
        }
        Ok(is_ours)
    }

    /// Says that the pod is there still. An empty statement has no snapshot, for which an index would wait.
    async fn keep_lock(&self) -> Result<(), DatabaseError> {
        Ok(self.client.batch_execute("").await?)
    }

    /// Steps that are done.
    async fn done(&self, service: &str) -> Result<BTreeSet<i32>, DatabaseError> {
        if self.ask("SELECT to_regclass('schema_migrations')").await?.is_empty() {
            return Ok(BTreeSet::new());
        }
        let query = format!("SELECT version FROM schema_migrations WHERE service = {}", quoted(service));
        Ok(self.ask(&query).await?.iter().filter_map(|version| version.parse().ok()).collect())
    }

    /// The session that holds up the one with this process id, in words; unknown for 0.
    async fn blockers(&self, pid: i32) -> Result<Option<String>, DatabaseError> {
        if pid == 0 {
            return Ok(None);
        }
        let query = format!(
            "SELECT format('process %s (%s, %s for %s s)', pid, COALESCE(NULLIF(application_name, ''), usename, 'unnamed'),
                           COALESCE(state, backend_type), COALESCE(floor(extract(epoch FROM now() - xact_start)), 0))
             FROM pg_stat_activity WHERE pid = ANY(pg_blocking_pids({pid})) LIMIT 3"
        );
        let who = self.ask(&query).await?.join(" and ");
        Ok(Some(who).filter(|who| !who.is_empty()))
    }

    /// Says which session is at work, so that others can ask what it waits for.
    async fn tell_pid(&self, under_way: &UnderWay) -> Result<(), DatabaseError> {
        let pid = self.ask("SELECT pg_backend_pid()").await?.concat();
        under_way.pid.store(pid.parse().unwrap_or_default(), Ordering::Relaxed);
        Ok(())
    }

    /// Does steps in a transaction, with their records.
    async fn change(
        &self,
        service: &str,
        migrations: &[Migration],
        under_way: &UnderWay,
    ) -> Result<Done, DatabaseError> {
        let all = async {
            if !self.begin().await? {
                return Ok(Done::LockedByOldPod);
            }
            self.tell_pid(under_way).await?;
            for (index, migration) in migrations.iter().enumerate() {
                under_way.step.store(index, Ordering::Relaxed);
                self.client.batch_execute(migration.sql).await?;
                self.record(service, migration).await?;
            }
            self.client.batch_execute("COMMIT").await?;
            Ok(Done::Yes)
        };
        let done = all.await;
        // Behind a pooler, the session may be somebody else's from now on.
        under_way.pid.store(0, Ordering::Relaxed);
        self.or_roll_back(done).await
    }

    /// Begins a transaction in which the schema may be changed, unless a pod of version 0.1 is about to.
    async fn begin(&self) -> Result<bool, DatabaseError> {
        self.client.batch_execute(&format!("BEGIN; {STEP_BOUNDS}; {}", without_transaction_bound(true))).await?;
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

    /// Lifts the bounds of the session, or says that it has none.
    async fn is_unbounded(&self) -> Result<bool, DatabaseError> {
        if self.sessions == Sessions::Own {
            // For this session alone, and whatever the role has: the waits for older transactions count, too.
            let unbounded = without_transaction_bound(false);
            let lift = format!("SET lock_timeout = 0; SET statement_timeout = 0; {unbounded}");
            self.client.batch_execute(&lift).await?;
        }
        let bounded = "SELECT 1 FROM pg_settings
            WHERE name IN ('lock_timeout', 'statement_timeout', 'transaction_timeout') AND setting <> '0'";
        Ok(self.ask(bounded).await?.is_empty())
    }

    /// Whether an index is valid; absent if there is none.
    async fn is_valid(&self, index: &str) -> Result<Option<bool>, DatabaseError> {
        let query = format!("SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass({})", quoted(index));
        Ok(self.ask(&query).await?.first().map(|valid| valid == "t"))
    }

    /// Whether another session has the lock on the index's table with which it is built.
    async fn is_built_elsewhere(&self, index: &str) -> Result<bool, DatabaseError> {
        let query = format!(
            "SELECT 1 FROM pg_locks l JOIN pg_index i ON i.indrelid = l.relation
             WHERE i.indexrelid = to_regclass({}) AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            quoted(index)
        );
        Ok(!self.ask(&query).await?.is_empty())
    }

    /// Builds indexes beside everything else that goes on, and writes it down.
    async fn build(&self, service: &str, migration: &Migration, under_way: &UnderWay) -> Result<Done, DatabaseError> {
        if !self.is_unbounded().await? {
            return Ok(Done::Bounded);
        }
        if self.sessions == Sessions::Own {
            self.tell_pid(under_way).await?;
        }
        let statements = migration.online().unwrap_or_default();
        for statement in &statements {
            if let Some(index) = index_of(statement)
                && self.is_valid(index).await? == Some(false)
            {
                // The server may go on with it after its pod is gone.
                if self.is_built_elsewhere(index).await? {
                    return Ok(Done::Elsewhere);
                }
                // One that was given up half built costs time and serves nobody.
                if self.is_valid(index).await? == Some(false) {
                    self.client.batch_execute(&format!("DROP INDEX CONCURRENTLY IF EXISTS {index}")).await?;
                }
            }
            self.client.batch_execute(statement).await?;
        }
        // `IF NOT EXISTS` passes over one that another session has begun meanwhile.
        for index in statements.iter().filter_map(|statement| index_of(statement)) {
            if self.is_valid(index).await? != Some(true) {
                return Ok(Done::Elsewhere);
            }
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
