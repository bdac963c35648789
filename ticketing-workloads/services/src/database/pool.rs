//! The pool, its health, and the way to give all its connections up at once.

use super::tracking::{Connection, TrackingManager};
use super::{DatabaseError, DatabaseSettings};
use arc_swap::ArcSwap;
use deadpool::managed::{Pool, Timeouts};
use deadpool_postgres::{Manager, ManagerConfig, RecyclingMethod};
use futures::future::join_all;
use prometheus_client::metrics::counter::Counter;
use resilience::{CallError, Dependency, Failure};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;

/// Time between two looks at a connection that is in use and under suspicion.
const SUSPECT_POLL: Duration = Duration::from_millis(20);

/// The database, called through its dependency.
pub struct Database {
    config: Config,
    size: usize,
    current: ArcSwap<Generation>,
    dependency: &'static Dependency,
    resets: Counter,
}

/// One pool, from one reset to the next.
struct Generation {
    pool: Pool<TrackingManager>,
    given_up: CancellationToken,
}

/// What a look at the pooled connections found.
#[derive(Debug)]
pub struct PoolHealth {
    /// Connections that were asked and answered.
    pub answered: usize,
    /// Connections that gave no answer.
    pub hung: usize,
    /// Why no connection could be had or one broke, if so.
    pub error: Option<String>,
    /// Open connections.
    pub open: usize,
    /// Most connections that there may be.
    pub max: usize,
}

impl Database {
    /// A database that is connected to when it is first called.
    pub fn new(config: Config, size: u16, dependency: &'static Dependency) -> Result<Self, crate::host::StartError> {
        let config = DatabaseSettings::pooled(config);
        let size = usize::from(size);
        let current = ArcSwap::from_pointee(Generation::new(&config, size)?);
        Ok(Self { config, size, current, dependency, resets: Counter::default() })
    }

    /// Name of the bulkhead that calls pass through, if there is one.
    pub fn bulkhead(&self) -> Option<String> {
        self.dependency.settings().bulkhead.clone()
    }

    /// Counts resets.
    pub fn resets(&self) -> &Counter {
        &self.resets
    }

    /// Calls the database through all layers of its dependency: `work` is done once per attempt, each on a connection
    /// of its own, so it must be safe to do more than once.
    pub async fn call<T, E, F, Fut>(&self, work: F) -> Result<T, CallError<E>>
    where
        E: Failure + From<DatabaseError>,
        F: Fn(Connection) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.dependency.call(|| self.attempt(&work)).await
    }

    /// Does `work` once, past timeout, retry and circuit. For health checks, which are to see the database as it is.
    pub async fn attempt<T, E, F, Fut>(&self, work: F) -> Result<T, E>
    where
        E: From<DatabaseError>,
        F: Fn(Connection) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let generation = self.current.load_full();
        let create = self.dependency.timeouts().connect_ms.map(Duration::from_millis);
        let attempt = async {
            let timeouts = Timeouts { wait: None, create, recycle: None };
            let connection = generation.pool.timeout_get(&timeouts).await.map_err(DatabaseError::from)?;
            let usage = connection.answers().start();
            let result = work(connection).await;
            usage.answered();
            result
        };
        tokio::select! {
            result = attempt => result,
            () = generation.given_up.cancelled() => Err(DatabaseError::GivenUp.into()),
        }
    }

    /// Gives up every connection at once, in use or not, and ends a break of the circuit: the next call opens a new
    /// connection. What was under way on the old ones fails and is retried on new ones. The answer is how many
    /// connections there were.
    pub fn reset(&self) -> Result<usize, crate::host::StartError> {
        let new = Generation::new(&self.config, self.size)?;
        let old = self.current.swap(Arc::new(new));
        let open = old.pool.manager().open().len();
        old.given_up.cancel();
        old.pool.close();
        self.resets.inc();
        self.dependency.end_break();
        Ok(open)
    }

    /// Asks every pooled connection that is idle for an answer, all at once. One that is in use is trusted, unless the
    /// last that is known of it is a statement without an answer: then it has until the end of `time` to answer its
    /// caller. At least one connection is asked; none is opened beyond the pool's size.
    pub async fn examine(&self, time: Duration) -> PoolHealth {
        let generation = self.current.load_full();
        let deadline = Instant::now() + time;
        let idle = generation.pool.status().available.clamp(1, self.size);
        // The first may wait for a connection; the others only take what is idle.
        let pings = join_all((0..idle).map(|index| generation.ping(index == 0, deadline))).await;
        let mut health = PoolHealth { answered: 0, hung: 0, error: None, open: 0, max: self.size };
        for ping in pings {
            match ping {
                Ping::Answered => health.answered += 1,
                Ping::NotAsked | Ping::Hung => {}
                Ping::Failed(error) => health.error = Some(error),
            }
        }
        let open = loop {
            let open = generation.pool.manager().open();
            health.hung = open.iter().filter(|record| record.is_suspect()).count();
            if health.hung == 0 || Instant::now() >= deadline {
                break open.len();
            }
            tokio::time::sleep_until(deadline.min(Instant::now() + SUSPECT_POLL)).await;
        };
        health.open = open;
        health
    }
}

/// How one connection took the question.
enum Ping {
    Answered,
    /// It keeps the mark of an abandoned use.
    Hung,
    /// It was taken by somebody else meanwhile.
    NotAsked,
    Failed(String),
}

impl Generation {
    fn new(config: &Config, size: usize) -> Result<Self, crate::host::StartError> {
        // Fast on purpose: a connection is taken for good while it is open, so one that hangs is seen by the check
        // and cured by the operator, as ADR-007 has it, and no call pays for a ping.
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = TrackingManager::new(Manager::from_config(config.clone(), NoTls, recycling));
        let pool = Pool::builder(manager)
            .max_size(size)
            .runtime(deadpool::Runtime::Tokio1)
            .build()
            .map_err(|error| crate::host::StartError::Setting(format!("no pool: {error}")))?;
        Ok(Self { pool, given_up: CancellationToken::new() })
    }

    async fn ping(&self, may_wait: bool, deadline: Instant) -> Ping {
        let time = deadline.saturating_duration_since(Instant::now());
        let wait = if may_wait { time } else { Duration::ZERO };
        let timeouts = Timeouts { wait: Some(wait), create: Some(time), recycle: None };
        let connection = match self.pool.timeout_get(&timeouts).await {
            Ok(connection) => connection,
            Err(_) if !may_wait => return Ping::NotAsked,
            Err(error) => return Ping::Failed(DatabaseError::from(error).to_string()),
        };
        let usage = connection.answers().start();
        match tokio::time::timeout_at(deadline, connection.simple_query("SELECT 1")).await {
            Ok(Ok(_)) => {
                usage.answered();
                Ping::Answered
            }
            Ok(Err(error)) => {
                usage.answered();
                Ping::Failed(DatabaseError::from(error).to_string())
            }
            Err(_) => Ping::Hung,
        }
    }
}
