//! Connections on loan from the pool, and what happens to one that does not come back with an answer.
//!
//! A connection that hangs looks like any other to a pool: it is open, and would go back when its caller gives up. So a
//! connection whose last use was abandoned is kept aside until it has answered. One that is only slow goes back to
//! the pool; one that stays silent loses its place in the pool to a new connection.

use super::pool::Shared;
use super::settings::Sessions;
use deadpool_postgres::{ClientWrapper, Object};
use resilience::bulkhead::Slot;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_postgres::{Client, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

/// How long a connection has to answer after its use was abandoned. Longer than the wait for a row lock
/// (`lock_timeout`), so that contention closes no connections.
const SETTLE_TIME: Duration = Duration::from_millis(600);
/// How long it may be silent before the idle ones are suspected, too: less than its caller waits before a retry.
const SUSPECT_TIME: Duration = Duration::from_millis(50);
/// How long a connection that has lost its place is kept for the end of its statement, which was asked to be cancelled: a
/// commit that is slow cannot be, and may still be made, to be found by the caller's next attempt.
const LINGER_TIME: Duration = Duration::from_secs(15);
/// Time to ask the server to cancel a statement.
const CANCEL_TIME: Duration = Duration::from_secs(2);

/// Whether no transaction is open: then the one of this statement began with it.
const IS_IDLE: &str = "SELECT now() = statement_timestamp()";

/// One pool, from one reset to the next.
pub(super) struct Generation {
    pub(super) pool: deadpool_postgres::Pool,
    pub(super) given_up: CancellationToken,
    /// Connections that are kept aside.
    settling: AtomicUsize,
    /// Connections that stayed silent and have lost their place.
    replaced: AtomicUsize,
    /// As many as the pool has places may linger, so that a server whose statements are all too slow is not flooded with
    /// connections.
    lingering: Semaphore,
}

impl Generation {
    pub(super) fn new(pool: deadpool_postgres::Pool) -> Self {
        let (settling, replaced) = Default::default();
        let lingering = Semaphore::new(pool.status().max_size);
        Self { pool, given_up: CancellationToken::new(), settling, replaced, lingering }
    }

    /// Connections whose last use was abandoned and that have not answered yet.
    pub(super) fn settling(&self) -> usize {
        self.settling.load(Ordering::Acquire)
    }

    /// Connections that have lost their place so far because they stayed silent.
    pub(super) fn replaced(&self) -> usize {
        self.replaced.load(Ordering::Acquire)
    }
}

/// A connection out of the pool, and the place among those that there may be that it has until it is back.
pub(super) struct Pooled {
    // Dropped first: who gets the place finds the connection.
    object: Object,
    place: Slot,
}

impl Pooled {
    pub(super) fn new(object: Object, place: Slot) -> Self {
        Self { object, place }
    }

    /// Takes the connection out of the pool for good.
    fn take(self) -> ClientWrapper {
        let Self { object, place } = self;
        let client = Object::take(object);
        drop(place);
        client
    }
}

impl Deref for Pooled {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.object
    }
}

/// A connection from the pool, for one use.
pub struct Connection {
    object: Arc<Pooled>,
    sessions: Sessions,
}

impl Connection {
    /// The driver's side of it.
    pub(super) fn client(&self) -> &ClientWrapper {
        &self.object
    }

    /// Whose the session behind it is.
    pub(super) fn sessions(&self) -> Sessions {
        self.sessions
    }
}

impl Deref for Connection {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.object
    }
}

/// The pool's side of a loan. Unless the use is reported as answered, it counts as abandoned when this is dropped.
pub(super) struct Loan {
    shared: Arc<Shared>,
    generation: Arc<Generation>,
    connection: Option<Arc<Pooled>>,
}

impl Loan {
    pub(super) fn new(shared: &Arc<Shared>, generation: &Arc<Generation>, connection: Pooled) -> (Self, Connection) {
        let connection = Arc::new(connection);
        let sessions = shared.connector.sessions();
        let borrowed = Connection { object: Arc::clone(&connection), sessions };
        let loan =
            Self { shared: Arc::clone(shared), generation: Arc::clone(generation), connection: Some(connection) };
        (loan, borrowed)
    }

    /// The connection has answered, whatever the answer was: it goes back to the pool.
    pub(super) fn answered(mut self) {
        self.connection = None;
    }

    /// The connection has ended, or is not wanted any more: the pool opens a new one in its place when it needs it.
    pub(super) fn lost(mut self) {
        if let Some(connection) = self.take() {
            drop(connection.take());
        }
    }

    /// The connection has had its time: it loses its place.
    pub(super) fn silent(mut self) {
        if let Some(connection) = self.take() {
            replace(&self.shared, &self.generation, connection);
        }
    }

    /// The connection, unless its user still has it: then it goes back to the pool when that one drops it.
    fn take(&mut self) -> Option<Pooled> {
        self.connection.take().and_then(Arc::into_inner)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        let Some(connection) = self.take() else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                let (shared, generation) = (Arc::clone(&self.shared), Arc::clone(&self.generation));
                generation.settling.fetch_add(1, Ordering::AcqRel);
                runtime.spawn(settle(shared, generation, connection));
            }
            // The process ends.
            Err(_) => drop(connection.take()),
        }
    }
}

/// Waits until an abandoned connection has answered, or takes its place away.
async fn settle(shared: Arc<Shared>, generation: Arc<Generation>, connection: Pooled) {
    // It is answered after whatever was abandoned before it.
    let answered = async {
        let mut answer = std::pin::pin!(connection.simple_query(IS_IDLE));
        if let Ok(answer) = tokio::time::timeout(SUSPECT_TIME, answer.as_mut()).await {
            return Some(answer);
        }
        let (shared, generation) = (Arc::clone(&shared), Arc::clone(&generation));
        // On its own: if this one answers meanwhile, the others still have to be waited for.
        tokio::spawn(async move { shared.suspect(&generation).await });
        tokio::time::timeout(SETTLE_TIME.saturating_sub(SUSPECT_TIME), answer).await.ok()
    };
    let answer = tokio::select! {
        answer = answered => answer,
        () = generation.given_up.cancelled() => Some(Ok(Vec::new())),
    };
    if let Some(answer) = answer {
        if answer.is_ok_and(|rows| says(&rows, "t")) {
            drop(connection);
        } else {
            // It broke, its pool was given up, or the next one to get it would go on with somebody else's transaction.
            drop(connection.take());
        }
        generation.settling.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let opened = Instant::from_std(Object::metrics(&connection.object).created);
    replace(&shared, &generation, connection);
    generation.settling.fetch_sub(1, Ordering::AcqRel);
    shared.cure(&generation, opened).await;
}

/// Whether the answer to a simple query is this one word.
pub(super) fn says(answer: &[SimpleQueryMessage], word: &str) -> bool {
    answer.iter().any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some(word)))
}

/// Takes a silent connection out of the pool, which opens a new one in its place when it needs it.
fn replace(shared: &Arc<Shared>, generation: &Arc<Generation>, connection: Pooled) {
    let silent = connection.take();
    generation.replaced.fetch_add(1, Ordering::AcqRel);
    shared.unresponsive.inc();
    tracing::warn!(dependency = shared.dependency.name(), "a pooled connection did not answer; replacing it");
    tokio::spawn(linger(Arc::clone(shared), Arc::clone(generation), silent));
}

/// Has the statement of a connection that has lost its place cancelled, so that it keeps nobody from the rows that it has
/// locked, and waits for its end.
async fn linger(shared: Arc<Shared>, generation: Arc<Generation>, silent: ClientWrapper) {
    let cancel = silent.cancel_token();
    let tls = shared.connector.tls().await;
    // Of a server that is silent, too, nothing more can be wanted.
    let _ = tokio::time::timeout(CANCEL_TIME, cancel.cancel_query(tls)).await;
    if let Ok(_place) = generation.lingering.try_acquire() {
        let end = tokio::time::timeout(LINGER_TIME, silent.simple_query(""));
        tokio::select! {
            _ = end => {}
            () = generation.given_up.cancelled() => {}
        }
    }
}
