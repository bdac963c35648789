//! The pool: how calls get a connection, and the ways to get rid of connections that do not answer.

use super::error::Aftermath;
use super::loan::{Connection, Generation, Loan, Pooled, says};
use super::sample::Sample;
use super::settings::{self, Sessions};
use super::{Connector, DatabaseError};
use crate::host::StartError;
use arc_swap::{ArcSwap, ArcSwapOption};
use contract::BulkheadSettings;
use deadpool::managed::{HookResult, Metrics};
use deadpool_postgres::{ClientWrapper, Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Timeouts};
use futures::FutureExt;
use futures::future::join_all;
use prometheus_client::metrics::counter::Counter;
use resilience::bulkhead::{Bulkhead, Slot};
use resilience::{CallError, Dependency, Failure, Priority, priority};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_postgres::Config;

/// Time between two looks at connections that are kept aside.
const SETTLE_POLL: Duration = Duration::from_millis(20);
/// Time that a fresh connection has to answer when the pool cures itself.
const FRESH_TIME: Duration = Duration::from_secs(2);
/// Time that each idle connection then has to answer.
const PING_TIME: Duration = Duration::from_millis(500);
/// The same while it is only suspected that they are silent.
const SUSPECT_PING_TIME: Duration = Duration::from_millis(250);
/// Shortest time between two breaks of the circuit that a cure ends, unless the silent connection is older than the first
/// one: then it is the same hang, of which some connections are found out later than others. A database that only answers
/// the simplest question in time would otherwise never get the rest that the break is to give it.
const CURE_INTERVAL: Duration = Duration::from_secs(30);

/// Time after a change of the bound of statements for which connections are given it each time that they are used: longer
/// than it takes to give one out.
const CHANGE_SETTLED: Duration = Duration::from_secs(10);

/// Longest wait for a place in the pool; a caller that waits has a shorter time of its own.
const LONGEST_WAIT: Duration = Duration::from_secs(3_600);

/// Asks for a sign of life. A replica answers, too: so the answer has to say whether writes are taken.
const PING: &str = "SHOW transaction_read_only";

/// The database, called through its dependency.
pub struct Database {
    shared: Arc<Shared>,
}

/// What outlives a call.
pub(super) struct Shared {
    pub(super) connector: Connector,
    size: usize,
    /// As many as there may be connections. A caller has one before it takes a connection from a pool, so that the most important of those that
    /// wait go first; a pool itself would let them in as they came. They outlast resets: what is under way on the old
    /// connections has its place until it ends.
    places: &'static Bulkhead,
    bound: Arc<StatementBound>,
    current: ArcSwap<Generation>,
    pub(super) dependency: &'static Dependency,
    /// What a session must be able to do to be of use, besides answering.
    sample: Option<Sample>,
    resets: Counter,
    /// Connections that were replaced because they stayed silent.
    pub(super) unresponsive: Counter,
    /// When a cure last ended a break for a hang of its own. Held while one is under way.
    cured: Mutex<Option<Instant>>,
    /// Held while idle connections are tried on a suspicion.
    suspected: Mutex<()>,
}

/// What a look at the pooled connections found.
#[derive(Debug, Default)]
pub struct PoolHealth {
    /// Connections that were asked and answered.
    pub answered: usize,
    /// Connections that gave no answer; the pool replaces them.
    pub hung: usize,
    /// Connections that gave a sign of life and failed the sample; they keep their places.
    pub failing: usize,
    /// Why no connection could be had or one broke, if so.
    pub error: Option<String>,
    /// Why no more connections can be opened, while those that there are work.
    pub refused: Option<String>,
    /// Open connections.
    pub open: usize,
    /// Most connections that there may be.
    pub max: usize,
    /// Whether a fresh connection can be worked with, if that was tried: not if it has no answer, and not if the server
    /// answers with a "no" (it refuses the password, it takes no writes), because then new connections in the pool
    /// would not help either.
    pub fresh_answers: Option<bool>,
    /// What was wrong with the fresh connection, unless it was only silent.
    pub fresh_error: Option<String>,
}

impl Database {
    /// A database that is connected to when it is first called. Its health check has every session do `sample`.
    pub fn new(
        connector: Connector,
        size: u16,
        dependency: &'static Dependency,
        sample: Option<Sample>,
    ) -> Result<Self, StartError> {
        let bound = Arc::new(StatementBound::new(dependency.timeouts().per_try_ms));
        let connector = connector.pooled(Arc::clone(&bound.now_ms));
        let places = Bulkhead::new(&BulkheadSettings {
            max_concurrent: size.into(),
            max_queued: u32::MAX,
            max_wait_ms: resilience::clock::millis(LONGEST_WAIT),
        });
        if dependency.keeps_slots() {
            places.keep_slots();
        }
        let size = usize::from(size);
        let current = ArcSwap::from_pointee(Generation::new(pool(&connector, &bound, size)?));
        let (resets, unresponsive, cured, suspected) = Default::default();
        let shared = Shared {
            connector,
            size,
            places,
            bound,
            current,
            dependency,
            sample,
            resets,
            unresponsive,
            cured,
            suspected,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Name of the bulkhead that calls pass through, if there is one.
    pub fn bulkhead(&self) -> Option<String> {
        self.shared.dependency.settings().bulkhead.clone()
    }

    /// Calls that wait for a connection.
    pub fn waiting(&self) -> u32 {
        self.shared.places.usage().queued
    }

    /// Counts resets.
    pub fn resets(&self) -> &Counter {
        &self.shared.resets
    }

    /// Counts connections that were replaced because they did not answer.
    pub fn unresponsive(&self) -> &Counter {
        &self.shared.unresponsive
    }

    /// Calls the database through all layers of its dependency: `work` is done once per attempt, each on a connection
    /// of its own, so it must be safe to do more than once.
    pub async fn call<T, E, F, Fut>(&self, work: F) -> Result<T, CallError<E>>
    where
        E: Failure + From<DatabaseError> + 'static,
        F: Fn(Connection) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.shared.dependency.call(|| self.attempt(&work)).await
    }

    /// Does `work` once, past timeout, retry and circuit. For health checks, which are to see the database as it is.
    pub async fn attempt<T, E, F, Fut>(&self, work: F) -> Result<T, E>
    where
        E: std::error::Error + From<DatabaseError> + 'static,
        F: Fn(Connection) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let place = self.shared.place(priority::current().unwrap_or_default(), None).await?;
        // Which is the one of now: there may have been a reset meanwhile.
        let generation = self.shared.current.load_full();
        let allowed = self.shared.dependency.timeouts();
        let create = allowed.connect_ms.map(Duration::from_millis);
        self.shared.bound.follow(allowed.per_try_ms);
        let attempt = async {
            let timeouts = Timeouts { wait: None, create, recycle: None };
            let connection = generation.pool.timeout_get(&timeouts).await.map_err(DatabaseError::from)?;
            let connection = Pooled::new(connection, place);
            let (loan, connection) = Loan::new(&self.shared, &generation, connection);
            let result = work(connection).await;
            match result.as_ref().err().map_or(Aftermath::Kept, |error| Aftermath::of(error)) {
                Aftermath::Lost => loan.lost(),
                Aftermath::ReadOnly if self.shared.connector.needs_writes() => {
                    loan.lost();
                    self.shared.leave(&generation);
                }
                Aftermath::Kept | Aftermath::ReadOnly => loan.answered(),
            }
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
    pub fn reset(&self) -> Result<usize, StartError> {
        let new = Generation::new(pool(&self.shared.connector, &self.shared.bound, self.shared.size)?);
        let old = self.shared.current.swap(Arc::new(new));
        let open = old.pool.status().size;
        old.given_up.cancel();
        old.pool.close();
        self.shared.resets.inc();
        self.shared.dependency.end_break();
        Ok(open)
    }

    /// Asks every pooled connection that is idle for an answer, all at once, and replaces those that give none. One that is in
    /// use is trusted, unless its last use was abandoned: then it has until the end of `time` to answer. At least one
    /// connection is asked; none is opened beyond the pool's size.
    ///
    /// One that answers has to do the sample, too. If it fails that, it stays: an error is an answer, and pools that replaced
    /// their connections for errors would storm a database that has a reason for them. What it means, and what is to be
    /// done, is for those to decide who see the whole workload.
    ///
    /// If not all have answered by half of `time`, or one of them not as it should, a fresh connection is opened beside the
    /// pool: its answer tells whether the database or the pool is the cause. So it is after a login that was refused, as
    /// long as none has succeeded.
    pub async fn examine(&self, time: Duration) -> PoolHealth {
        let shared = &self.shared;
        let generation = shared.current.load_full();
        let (half, deadline) = (Instant::now() + time / 2, Instant::now() + time);
        let (open, replaced) = (generation.pool.status().size, generation.replaced());
        let mut asking = std::pin::pin!(async {
            let pings = shared.ping_idle(&generation, Look::Thorough, deadline).await;
            while generation.settling() > 0 && Instant::now() < deadline {
                tokio::time::sleep_until(deadline.min(Instant::now() + SETTLE_POLL)).await;
            }
            pings
        });
        let (pings, mut fresh) = tokio::select! {
            pings = &mut asking => (pings, None),
            () = tokio::time::sleep_until(half) => {
                let (pings, fresh) = tokio::join!(asking, shared.try_fresh(Look::Thorough, deadline));
                (pings, Some(fresh))
            }
        };
        let mut health = PoolHealth { max: shared.size, ..PoolHealth::default() };
        for ping in pings {
            match ping {
                Ping::Answered => health.answered += 1,
                Ping::NotAsked => {}
                Ping::Hung(loan) => loan.silent(),
                Ping::Failing(error) => {
                    health.failing += 1;
                    health.error = Some(error.to_string());
                }
                Ping::Failed(error) => {
                    let is_fresh = matches!(error, DatabaseError::Connect(_) | DatabaseError::ConnectTimeout);
                    if is_fresh && fresh.is_none() {
                        fresh = Some(Fresh::Silent);
                    }
                    health.error = Some(shared.connector.explain(&error));
                }
            }
        }
        health.hung = generation.replaced().saturating_sub(replaced) + generation.settling();
        health.open = open.max(health.answered + health.hung + health.failing);
        let fails = health.hung > 0 || health.error.is_some();
        if fresh.is_none() && (health.error.is_some() || shared.connector.refusal().is_some()) {
            fresh = Some(shared.try_fresh(Look::Thorough, deadline).await);
        }
        if fails || matches!(fresh, Some(Fresh::Failed(_))) {
            health.fresh_answers = fresh.as_ref().map(|fresh| matches!(fresh, Fresh::Answers));
        }
        // A cure that is under way ends the break itself; the check has no time to wait for it.
        if health.hung > 0
            && health.fresh_answers == Some(true)
            && let Ok(mut cured) = shared.cured.try_lock()
        {
            shared.end_break(&mut cured, None);
        }
        match fresh {
            Some(Fresh::Failed(error)) if fails => health.fresh_error = Some(error),
            // The ones that there are answer all the same.
            Some(Fresh::Failed(error)) if shared.connector.refusal().is_some() => health.refused = Some(error),
            _ => {}
        }
        health
    }
}

/// What came of opening a connection beside the pool.
enum Fresh {
    Answers,
    /// It gave no answer in time, or was closed without one.
    Silent,
    /// The words are for the person on call.
    Failed(String),
}

/// How closely connections are looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Those that are idle, for a sign of life.
    Brief,
    /// At least one of them, and each has to do the sample.
    Thorough,
}

/// How one connection took the question.
enum Ping {
    Answered,
    /// It gave a sign of life, and failed the sample.
    Failing(DatabaseError),
    /// It has not answered, and has its place until this is decided.
    Hung(Loan),
    /// It was taken by a call meanwhile.
    NotAsked,
    Failed(DatabaseError),
}

impl Shared {
    /// A place for a connection, as soon as it is the caller's turn.
    async fn place(&self, priority: Priority, deadline: Option<Instant>) -> Result<Slot, DatabaseError> {
        let in_use = |_| DatabaseError::Pool("all of them are in use".to_owned());
        self.places.acquire(priority, deadline).map_err(in_use)?.slot().await.map_err(in_use)
    }

    /// What is done once a connection turned out to be silent: if a fresh one answers, the database works and the pool is
    /// the cause. Then the other idle connections are tried, so that the next calls do not each wait for another
    /// silent one, and the circuit, which was opened for nothing that the database did, gets its next trial.
    /// `opened` is when the silent one was opened.
    pub(super) async fn cure(self: &Arc<Self>, generation: &Arc<Generation>, opened: Instant) {
        // Several find out at the same moment; one cure is enough.
        let Ok(mut cured) = self.cured.try_lock() else { return };
        if !matches!(self.try_fresh(Look::Brief, Instant::now() + FRESH_TIME).await, Fresh::Answers) {
            return;
        }
        replace_silent(self.ping_idle(generation, Look::Brief, Instant::now() + PING_TIME).await);
        self.end_break(&mut cured, Some(opened));
    }

    /// What is done while an abandoned connection is silent, before it has lost its place: idle ones have no statement to
    /// be busy with, so if they are silent, too, the retry of the call that left must not wait for one of them.
    pub(super) async fn suspect(self: &Arc<Self>, generation: &Arc<Generation>) {
        let Ok(_one_at_a_time) = self.suspected.try_lock() else { return };
        let pings = self.ping_idle(generation, Look::Brief, Instant::now() + SUSPECT_PING_TIME).await;
        // Of a database that answers nobody in time, connections are not to be replaced by more of them.
        if pings.iter().any(|ping| matches!(ping, Ping::Hung(_)))
            && matches!(self.try_fresh(Look::Brief, Instant::now() + SUSPECT_PING_TIME).await, Fresh::Answers)
        {
            replace_silent(pings);
        }
    }

    fn end_break(&self, cured: &mut Option<Instant>, opened: Option<Instant>) {
        let is_other_hang = cured.is_none_or(|last| last.elapsed() >= CURE_INTERVAL);
        if is_other_hang {
            *cured = Some(Instant::now());
        }
        if is_other_hang || opened.is_some_and(|opened| cured.is_some_and(|last| opened < last)) {
            tracing::info!(
                dependency = self.dependency.name(),
                "fresh connections answer: silent pooled ones are replaced, and the circuit gets its next trial"
            );
            self.dependency.end_break();
        }
    }

    /// Whether a connection that is opened now can be worked with by `deadline`.
    async fn try_fresh(&self, look: Look, deadline: Instant) -> Fresh {
        let ask = async {
            let (client, connection) = self.connector.open().await.map_err(DatabaseError::Connect)?;
            let works = async {
                client.simple_query(PING).await?;
                match self.sample.filter(|_| look == Look::Thorough) {
                    Some(sample) => sample.works_on(&client, self.connector.sessions()).await,
                    None => Ok(()),
                }
            };
            tokio::select! {
                answer = works => answer.map(|()| Fresh::Answers),
                end = connection => end.map(|()| Fresh::Silent).map_err(DatabaseError::from),
            }
        };
        match tokio::time::timeout_at(deadline, ask).await {
            Ok(Ok(fresh)) => fresh,
            Ok(Err(error)) => Fresh::Failed(self.connector.explain(&error)),
            Err(_) => Fresh::Silent,
        }
    }

    /// Leaves a server that takes no writes any more: calls from now on open new connections, to one that does. What is
    /// under way on the old ones is not broken off: what writes fails by itself, and what reads does no harm.
    pub(super) fn leave(&self, generation: &Arc<Generation>) {
        // It cannot fail: the first one was made the same way.
        let Ok(pool) = pool(&self.connector, &self.bound, self.size) else { return };
        let found = self.current.compare_and_swap(generation, Arc::new(Generation::new(pool)));
        // Several find out at the same moment; the first one has left.
        if Arc::ptr_eq(&found, generation) {
            let open = generation.pool.status().size;
            generation.pool.close();
            tracing::warn!(
                dependency = self.dependency.name(),
                open,
                "the server of the pooled connections is read-only: leaving it for one that takes writes"
            );
        }
    }

    /// Asks all idle connections at once for an answer by `deadline`. In a thorough look, where none is idle, one is waited
    /// for or opened.
    async fn ping_idle(self: &Arc<Self>, generation: &Arc<Generation>, look: Look, deadline: Instant) -> Vec<Ping> {
        let at_least_one = look == Look::Thorough;
        let idle = generation.pool.status().available.clamp(usize::from(at_least_one), self.size);
        // The first may wait for a connection; the others only take what is idle.
        join_all((0..idle).map(|index| self.ping(generation, look, at_least_one && index == 0, deadline))).await
    }

    async fn ping(
        self: &Arc<Self>,
        generation: &Arc<Generation>,
        look: Look,
        may_wait: bool,
        deadline: Instant,
    ) -> Ping {
        let place = match self.places.try_acquire(Priority::default()) {
            Some(place) => place,
            None if !may_wait => return Ping::NotAsked,
            None => match self.place(Priority::default(), Some(deadline)).await {
                Ok(place) => place,
                Err(error) => return Ping::Failed(error),
            },
        };
        let time = deadline.saturating_duration_since(Instant::now());
        let wait = if may_wait { time } else { Duration::ZERO };
        let timeouts = Timeouts { wait: Some(wait), create: Some(time), recycle: None };
        let connection = match generation.pool.timeout_get(&timeouts).await {
            Ok(connection) => Pooled::new(connection, place),
            Err(_) if !may_wait => return Ping::NotAsked,
            Err(error) => return Ping::Failed(error.into()),
        };
        let (loan, connection) = Loan::new(self, generation, connection);
        let answer = tokio::time::timeout_at(deadline, connection.simple_query(PING)).await;
        match answer {
            Err(_) => {
                drop(connection);
                Ping::Hung(loan)
            }
            Ok(Ok(rows)) if self.connector.needs_writes() && says(&rows, "on") => {
                drop(connection);
                loan.lost();
                self.leave(generation);
                Ping::Failed(DatabaseError::ReadOnly)
            }
            Ok(Ok(_)) => {
                let sample = self.sample.filter(|_| look == Look::Thorough);
                do_sample(sample, loan, connection, deadline).await
            }
            Ok(Err(error)) => {
                drop(connection);
                loan.lost();
                Ping::Failed(error.into())
            }
        }
    }
}

/// Whether a connection that gave a sign of life can be worked with.
async fn do_sample(sample: Option<Sample>, loan: Loan, connection: Connection, deadline: Instant) -> Ping {
    let Some(sample) = sample else {
        loan.answered();
        return Ping::Answered;
    };
    let done = tokio::time::timeout_at(deadline, sample.works_in(&connection)).await;
    drop(connection);
    match done {
        // It waits for something; as after any statement that was given up, it comes back when it has answered.
        Err(_) => Ping::NotAsked,
        Ok(Ok(())) => {
            loan.answered();
            Ping::Answered
        }
        Ok(Err(error)) if Aftermath::of(&error) == Aftermath::Lost => {
            loan.lost();
            Ping::Failed(error)
        }
        Ok(Err(error)) => {
            loan.answered();
            Ping::Failing(error)
        }
    }
}

/// Takes the places of those that gave no answer.
fn replace_silent(pings: Vec<Ping>) {
    for ping in pings {
        if let Ping::Hung(loan) = ping {
            loan.silent();
        }
    }
}

/// How long the server goes on with a statement: as long as an attempt has, by the policy of the moment, and a little more.
struct StatementBound {
    now_ms: Arc<AtomicU64>,
    /// When it was last changed, as far as it was since the start.
    changed: ArcSwapOption<std::time::Instant>,
}

impl StatementBound {
    fn new(per_try_ms: u64) -> Self {
        let now_ms = Arc::new(AtomicU64::new(settings::statement_ms(per_try_ms)));
        Self { now_ms, changed: ArcSwapOption::empty() }
    }

    /// Follows the policy.
    fn follow(&self, per_try_ms: u64) {
        let wanted = settings::statement_ms(per_try_ms);
        if self.now_ms.load(Ordering::Acquire) != wanted && self.now_ms.swap(wanted, Ordering::AcqRel) != wanted {
            self.changed.store(Some(Arc::new(std::time::Instant::now())));
        }
    }

    /// The bound, if it was changed since the start.
    fn changed(&self) -> Option<u64> {
        self.changed.load().as_ref().map(|_| self.now_ms.load(Ordering::Acquire))
    }

    /// The new bound, for a connection that may not have it: the pool notes when a connection was given out only a moment
    /// after it has asked for this, and the change may have come in between.
    fn news(&self, metrics: &Metrics) -> Option<u64> {
        let changed = self.changed.load();
        let last = metrics.recycled.unwrap_or(metrics.created);
        let is_news = |changed: std::time::Instant| last < changed + CHANGE_SETTLED;
        changed.as_ref().filter(|changed| is_news(***changed)).map(|_| self.now_ms.load(Ordering::Acquire))
    }
}

/// Has the server keep to another bound in this session, if there is one. It is sent and not waited for: the server does it
/// before whatever is sent next, and the caller that gets a connection that hangs is to find that out, and not the pool.
fn set_bound(client: &ClientWrapper, statement_ms: Option<u64>) -> HookResult<tokio_postgres::Error> {
    let Some(statement_ms) = statement_ms else { return Ok(()) };
    let change = format!("SET statement_timeout = {statement_ms}");
    client.batch_execute(&change).now_or_never().unwrap_or(Ok(())).map_err(HookError::Backend)
}

fn pool(connector: &Connector, bound: &Arc<StatementBound>, size: usize) -> Result<Pool, StartError> {
    // Fast on purpose: no call pays for a ping. A connection that hangs costs one attempt and is replaced.
    let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let builder = Pool::builder(Manager::from_connect(Config::new(), connector.clone(), recycling))
        .max_size(size)
        .runtime(deadpool_postgres::Runtime::Tokio1);
    let builder = if connector.sessions() == Sessions::Own {
        let bound = Arc::clone(bound);
        let at_first = Arc::clone(&bound);
        builder
            // It may have been changed while this one was being opened.
            .post_create(Hook::sync_fn(move |client, _| set_bound(client, at_first.changed())))
            .pre_recycle(Hook::sync_fn(move |client, metrics| set_bound(client, bound.news(metrics))))
    } else {
        // A setting of a session would be somebody else's, too.
        builder
    };
    builder.build().map_err(|error| StartError::Setting(format!("no pool: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    /// The pool asks for news, the bound changes, and only then the pool notes that the connection was given out.
    #[test]
    fn a_change_while_a_connection_is_given_out_is_not_missed() {
        let bound = StatementBound::new(1_000);
        let mut metrics = Metrics::default();
        assert_eq!((bound.news(&metrics), bound.changed()), (None, None));
        bound.follow(4_000);
        metrics.recycled = Some(Instant::now() + Duration::from_millis(5));
        assert_eq!((bound.news(&metrics), bound.changed()), (Some(5_000), Some(5_000)));
        metrics.recycled = Some(Instant::now() + CHANGE_SETTLED * 2);
        assert_eq!(bound.news(&metrics), None, "not for ever");
    }
}
