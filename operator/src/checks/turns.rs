//! Who may do something now, where only so much may be done at once or in a second. Who gives up waiting leaves nothing behind.

use std::{
    collections::HashMap,
    hash::Hash,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::PollSemaphore;

/// So many at once for each key.
pub struct Turns<K> {
    each: usize,
    all: Mutex<HashMap<K, Arc<Semaphore>>>,
}

impl<K: Clone + Eq + Hash> Turns<K> {
    /// So many at once for each key.
    pub fn new(each: usize) -> Self {
        Self { each, all: Mutex::default() }
    }

    /// Waits for a turn. It is given back when the value is dropped.
    pub async fn take(&self, key: &K) -> Option<OwnedSemaphorePermit> {
        let of_key = {
            let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody has or waits for.
            all.retain(|_, turns| Arc::strong_count(turns) > 1);
            Arc::clone(all.entry(key.clone()).or_insert_with(|| Arc::new(Semaphore::new(self.each))))
        };
        // None would mean that it was closed, which nobody does.
        of_key.acquire_owned().await.ok()
    }
}

/// One after the other, with so much time in between.
pub struct Pace {
    every: Duration,
    /// The first moment for the next one. Who waits has this locked, and those behind wait for the lock: so one that gives up
    /// takes no turn away.
    next: tokio::sync::Mutex<Option<Instant>>,
}

impl Pace {
    /// One every so often.
    pub const fn new(every: Duration) -> Self {
        Self { every, next: tokio::sync::Mutex::const_new(None) }
    }

    /// Waits for a turn.
    pub async fn wait(&self) {
        let mut next = self.next.lock().await;
        if let Some(at) = *next {
            tokio::time::sleep_until(at).await;
        }
        *next = Some(Instant::now() + self.every);
    }
}

/// Lets only so many compute at once, and any number wait: a permit is had while the future is polled, so that one whose peer
/// says nothing is in nobody's way.
pub struct WhilePolled<F> {
    permits: PollSemaphore,
    inner: Pin<Box<F>>,
}

impl<F: Future> WhilePolled<F> {
    /// Of these permits one is needed whenever `inner` is polled.
    pub fn new(permits: &Arc<Semaphore>, inner: F) -> Self {
        Self { permits: PollSemaphore::new(Arc::clone(permits)), inner: Box::pin(inner) }
    }
}

impl<F: Future> Future for WhilePolled<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _permit = ready!(self.permits.poll_acquire(cx));
        self.inner.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn each_key_has_its_own_turns_and_nothing_stays_of_those_that_are_over() {
        let turns = Turns::<u32>::new(2);
        let held = [turns.take(&1).await, turns.take(&1).await];
        assert!(turns.take(&1).now_or_never().is_none(), "they are taken");
        assert!(turns.take(&2).now_or_never().is_some());
        drop(held);
        assert!(turns.take(&1).now_or_never().is_some());
        drop(turns.take(&3).await);
        assert_eq!(turns.all.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_in_a_second() {
        let (pace, began) = (Pace::new(Duration::from_millis(20)), Instant::now());
        for _ in 0..101 {
            pace.wait().await;
            assert!(pace.wait().now_or_never().is_none(), "one that gives up takes no turn away");
        }
        assert_eq!(began.elapsed(), Duration::from_secs(2));
        tokio::time::advance(Duration::from_secs(10)).await;
        let began = Instant::now();
        pace.wait().await;
        assert_eq!(began.elapsed(), Duration::ZERO, "idle time is not waited for");
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_hang_have_no_permit() {
        let permits = Arc::new(Semaphore::new(1));
        let mut hung: Vec<_> = (0..10).map(|_| WhilePolled::new(&permits, std::future::pending::<()>())).collect();
        for one in &mut hung {
            assert!(one.now_or_never().is_none());
        }
        assert_eq!(WhilePolled::new(&permits, async { 1 }).await, 1);
        let held = Arc::clone(&permits).acquire_owned().await.unwrap();
        let waits = tokio::spawn(WhilePolled::new(&permits, async { 2 }));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waits.is_finished(), "another computes");
        drop(held);
        assert_eq!(waits.await.unwrap(), 2);
    }
}
