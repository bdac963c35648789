//! A pool of connections with its check, outside a service.

use super::app::now_ms;
use super::{eventually, within};
use contract::{
    AppliedFrom, CheckReport, DependencySettings, HealthCheckSettings, PolicySettings, RuntimeConfig, Section,
    TimeoutSettings, WorkloadId,
};
use futures::future::join_all;
use resilience::{Checks, ConfigStore, Dependency, Resilience};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};
use ticketing_services::database::{self, Connection, Database, DatabaseError, DatabaseSettings};
use tokio::sync::Barrier;

/// Name of the check, and of the dependency.
pub const NAME: &str = "database";
/// Connections in the pool.
pub const POOL: u16 = 8;
/// How its connections call themselves.
pub const APPLICATION: &str = "pool";

static NEXT: AtomicI64 = AtomicI64::new(0);

fn id() -> WorkloadId {
    WorkloadId::deployment("n", "w")
}

pub struct Pooled {
    pub database: Arc<Database>,
    pub dependency: &'static Dependency,
    checks: Arc<Checks>,
    policy: PolicySettings,
    store: Arc<ConfigStore>,
}

impl Pooled {
    /// With the ADR's numbers for the database; the break of the circuit is far longer than a test.
    pub fn new(settings: &DatabaseSettings) -> Self {
        let defaults = DependencySettings { bulkhead: None, ..database::defaults() };
        let check = HealthCheckSettings { interval_ms: 60_000, timeout_ms: 1_000, ..Default::default() };
        let policy = PolicySettings {
            dependencies: [(NAME.to_owned(), defaults)].into(),
            health_checks: [(NAME.to_owned(), check)].into(),
            ..Default::default()
        };
        let resilience = Resilience::builder(id()).dependency(NAME).defaults(policy.clone()).build();
        let dependency = resilience.dependency(NAME).unwrap();
        let connector = settings.connector(APPLICATION).unwrap();
        let database = Arc::new(Database::new(connector, POOL, dependency, None).unwrap());
        let checks = Checks::new(Arc::clone(&resilience), [database::check(&database, NAME)]);
        let running = Arc::clone(&checks);
        tokio::spawn(async move { running.run().await });
        let store = ConfigStore::new(resilience);
        Self { database, dependency, checks, policy, store }
    }

    /// Changes the time of an attempt, as a policy does it.
    pub fn set_per_try(&self, time: Duration) {
        let mut settings = self.policy.clone();
        let per_try_ms = u64::try_from(time.as_millis()).unwrap();
        settings.dependencies.get_mut(NAME).unwrap().timeout =
            TimeoutSettings { request_ms: per_try_ms * 4, per_try_ms, connect_ms: None };
        let policy = Section { sources: Vec::new(), settings };
        // Each is newer than the one before.
        let revision = NEXT.fetch_add(1, Ordering::SeqCst) + now_ms();
        let document = RuntimeConfig::new(id(), revision, policy, Section::default()).to_bytes().unwrap();
        let answer = self.store.apply(&document, AppliedFrom::Push, now_ms());
        assert_eq!(self.dependency.timeouts().per_try_ms, per_try_ms, "{}", answer.message);
    }

    /// Opens as many connections as the pool may have, however long a busy machine takes: none is given back before all are there, or it
    /// would be lent again in place of one that is still to be opened.
    pub async fn fill(&self) {
        let all = Arc::new(Barrier::new(POOL.into()));
        let fill = (0..POOL).map(|_| {
            self.database.attempt(|connection: Connection| {
                let all = Arc::clone(&all);
                async move {
                    all.wait().await;
                    connection.batch_execute("SELECT 1").await.map_err(DatabaseError::from)
                }
            })
        });
        for result in join_all(fill).await {
            result.unwrap();
        }
    }

    /// Eight callers at once, as often as it takes; the answer is how long until all of them had an answer.
    pub async fn until_all_are_served(&self) -> Duration {
        let started = Instant::now();
        within(Duration::from_secs(8), "all callers are served", async || {
            let answers = join_all((0..8).map(|_| self.database.call(ask))).await;
            answers.iter().all(Result::is_ok).then_some(())
        })
        .await;
        started.elapsed()
    }

    /// One run of the check, from now on.
    pub async fn check(&self) -> CheckReport {
        // The one at the start must not be taken for it.
        let before = eventually("the first run is over", async || {
            Some(self.checks.report().1[NAME].runs).filter(|runs| *runs > 0)
        })
        .await;
        self.checks.run_now(NAME);
        eventually("the check ran", async || {
            let report = self.checks.report().1.remove(NAME)?;
            (report.runs > before).then_some(report)
        })
        .await
    }

    /// What a statement answers in one word, once and past the circuit.
    pub async fn text(&self, statement: &str) -> String {
        let statement = statement.to_owned();
        let work = |connection: Connection| {
            let statement = statement.clone();
            async move { Ok::<_, DatabaseError>(connection.query_one(&statement, &[]).await?.get(0)) }
        };
        self.database.attempt(work).await.unwrap()
    }

    /// Runs a statement once, past the circuit.
    pub async fn run(&self, statement: &str) -> Result<(), DatabaseError> {
        let statement = statement.to_owned();
        let work = |connection: Connection| {
            let statement = statement.clone();
            async move { connection.batch_execute(&statement).await.map_err(DatabaseError::from) }
        };
        self.database.attempt(work).await
    }
}

pub async fn ask(connection: Connection) -> Result<(), DatabaseError> {
    Ok(connection.simple_query("SELECT 1").await.map(drop)?)
}
