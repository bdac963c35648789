//! Pooled connections that remember whether they still answer.
//!
//! A connection that hangs looks like any other to the pool: it is open, and goes back when its caller gives up. What
//! gives it away is a statement that was abandoned without an answer and none that was answered since.

use deadpool::managed::{self, Metrics, RecycleResult};
use deadpool_postgres::ClientWrapper;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// What is known of one connection. Uses of it are numbered from 1.
#[derive(Debug, Default)]
pub(super) struct Answers {
    uses: AtomicU64,
    answered: AtomicU64,
    abandoned: AtomicU64,
}

impl Answers {
    /// Whether the last thing known of it is that it did not answer.
    pub(super) fn is_suspect(&self) -> bool {
        self.abandoned.load(Ordering::Acquire) > self.answered.load(Ordering::Acquire)
    }

    /// Starts a use; unless it is reported as answered, it counts as abandoned when dropped.
    pub(super) fn start(self: &Arc<Self>) -> Use {
        Use { number: self.uses.fetch_add(1, Ordering::AcqRel) + 1, answers: Arc::clone(self), answered: false }
    }
}

/// One use of a connection.
pub(super) struct Use {
    answers: Arc<Answers>,
    number: u64,
    answered: bool,
}

impl Use {
    /// The connection answered, whatever the answer was.
    pub(super) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        let counter = if self.answered { &self.answers.answered } else { &self.answers.abandoned };
        counter.fetch_max(self.number, Ordering::AcqRel);
    }
}

/// A connection with its record.
pub struct Tracked {
    client: ClientWrapper,
    answers: Arc<Answers>,
}

impl Tracked {
    pub(super) fn answers(&self) -> &Arc<Answers> {
        &self.answers
    }
}

impl Deref for Tracked {
    type Target = ClientWrapper;

    fn deref(&self) -> &ClientWrapper {
        &self.client
    }
}

/// A connection from the pool; goes back when dropped.
pub type Connection = managed::Object<TrackingManager>;

/// Opens connections, and knows all that are open.
pub struct TrackingManager {
    inner: deadpool_postgres::Manager,
    open: Mutex<Vec<Weak<Answers>>>,
}

impl TrackingManager {
    pub(super) fn new(inner: deadpool_postgres::Manager) -> Self {
        Self { inner, open: Mutex::default() }
    }

    /// The records of all open connections, in use or not.
    pub(super) fn open(&self) -> Vec<Arc<Answers>> {
        let mut open = self.records();
        open.retain(|record| record.strong_count() > 0);
        open.iter().filter_map(Weak::upgrade).collect()
    }

    fn records(&self) -> MutexGuard<'_, Vec<Weak<Answers>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl managed::Manager for TrackingManager {
    type Type = Tracked;
    type Error = tokio_postgres::Error;

    async fn create(&self) -> Result<Tracked, Self::Error> {
        let client = self.inner.create().await?;
        let answers = Arc::new(Answers::default());
        let mut open = self.records();
        open.retain(|record| record.strong_count() > 0);
        open.push(Arc::downgrade(&answers));
        drop(open);
        Ok(Tracked { client, answers })
    }

    async fn recycle(&self, tracked: &mut Tracked, metrics: &Metrics) -> RecycleResult<Self::Error> {
        self.inner.recycle(&mut tracked.client, metrics).await
    }

    fn detach(&self, tracked: &mut Tracked) {
        self.inner.detach(&mut tracked.client);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspect_from_an_abandoned_use_until_the_next_answer() {
        let answers = Arc::new(Answers::default());
        assert!(!answers.is_suspect());
        answers.start().answered();
        assert!(!answers.is_suspect());
        drop(answers.start());
        assert!(answers.is_suspect());
        let under_way = answers.start();
        assert!(answers.is_suspect(), "nothing new is known yet");
        under_way.answered();
        assert!(!answers.is_suspect());
    }

    #[test]
    fn an_answer_after_an_older_use_was_dropped_late_still_counts() {
        let answers = Arc::new(Answers::default());
        let (older, newer) = (answers.start(), answers.start());
        newer.answered();
        drop(older);
        assert!(!answers.is_suspect());
    }
}
