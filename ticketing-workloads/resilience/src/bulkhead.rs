//! The bulkhead (ADR-007 §3): a bounded number of calls at once, a bounded queue before it, a bounded wait in it.
//!
//! Not a semaphore of tokio's: that cannot shrink below what is in use. Here a smaller limit simply holds newcomers
//! back until enough calls have ended.

use crate::failure::Rejection;
use crate::lock;
use contract::BulkheadSettings;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// A compartment.
pub struct Bulkhead {
    inner: Mutex<Inner>,
}

struct Inner {
    settings: BulkheadSettings,
    in_use: u32,
    queue: VecDeque<Waiter>,
    next_id: u64,
}

struct Waiter {
    id: u64,
    place: oneshot::Sender<Place>,
}

impl Bulkhead {
    /// An empty bulkhead.
    pub fn new(settings: BulkheadSettings) -> Arc<Self> {
        Arc::new(Self { inner: Mutex::new(Inner { settings, in_use: 0, queue: VecDeque::new(), next_id: 0 }) })
    }

    /// Takes new settings. Calls under way keep their places; more room is given to those who wait.
    pub fn configure(self: &Arc<Self>, settings: BulkheadSettings) {
        lock(&self.inner).settings = settings;
        self.hand_out();
    }

    /// Takes a place, waiting for it until `deadline` at the latest.
    pub async fn enter(self: &Arc<Self>, deadline: Instant) -> Result<Place, Rejection> {
        let started = Instant::now();
        let (waiting, give_up) = {
            let mut inner = lock(&self.inner);
            if inner.in_use < limit(&inner.settings) && inner.queue.is_empty() {
                inner.in_use += 1;
                return Ok(Place { bulkhead: Arc::clone(self) });
            }
            let max_wait = Duration::from_millis(inner.settings.max_wait_ms);
            let queued = u32::try_from(inner.queue.len()).unwrap_or(u32::MAX);
            if queued >= inner.settings.max_queued || max_wait.is_zero() {
                return Err(Rejection::BulkheadFull { in_use: inner.in_use, queued });
            }
            let (place, receiver) = oneshot::channel();
            let id = inner.next_id;
            inner.next_id += 1;
            inner.queue.push_back(Waiter { id, place });
            (Waiting { bulkhead: self, id, receiver }, deadline.min(started + max_wait))
        };
        waiting.place(give_up).await.ok_or_else(|| Rejection::BulkheadWait { waited: started.elapsed() })
    }

    /// Calls under way and calls waiting.
    pub fn usage(&self) -> (u32, usize) {
        let inner = lock(&self.inner);
        (inner.in_use, inner.queue.len())
    }

    /// Gives free places to those who wait longest. A place whose receiver has gone comes back through its drop.
    fn hand_out(self: &Arc<Self>) {
        loop {
            let waiter = {
                let mut inner = lock(&self.inner);
                if inner.in_use >= limit(&inner.settings) {
                    return;
                }
                let Some(waiter) = inner.queue.pop_front() else { return };
                inner.in_use += 1;
                waiter
            };
            drop(waiter.place.send(Place { bulkhead: Arc::clone(self) }));
        }
    }
}

/// None at all would stop the workload for good.
fn limit(settings: &BulkheadSettings) -> u32 {
    settings.max_concurrent.max(1)
}

/// A call in the queue; leaves it when dropped.
struct Waiting<'a> {
    bulkhead: &'a Arc<Bulkhead>,
    id: u64,
    receiver: oneshot::Receiver<Place>,
}

impl Waiting<'_> {
    async fn place(mut self, give_up: Instant) -> Option<Place> {
        tokio::time::timeout_at(give_up, &mut self.receiver).await.ok()?.ok()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.bulkhead.inner).queue.retain(|waiter| waiter.id != self.id);
    }
}

/// A place in a bulkhead; given back when dropped.
pub struct Place {
    bulkhead: Arc<Bulkhead>,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.bulkhead.inner).in_use -= 1;
        self.bulkhead.hand_out();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;

    fn settings(max_concurrent: u32, max_queued: u32, max_wait_ms: u64) -> BulkheadSettings {
        BulkheadSettings { max_concurrent, max_queued, max_wait_ms }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test(start_paused = true)]
    async fn refuses_when_the_queue_is_full_and_when_the_wait_is_over() {
        let bulkhead = Bulkhead::new(settings(1, 1, 500));
        let _held = bulkhead.enter(soon()).await.unwrap();
        let (first, second) = tokio::join!(bulkhead.enter(soon()), bulkhead.enter(soon()));
        assert_eq!(first.err(), Some(Rejection::BulkheadWait { waited: Duration::from_millis(500) }));
        assert_eq!(second.err(), Some(Rejection::BulkheadFull { in_use: 1, queued: 1 }));
        assert_eq!(bulkhead.usage(), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn waits_no_longer_than_the_deadline() {
        let bulkhead = Bulkhead::new(settings(1, 10, 60_000));
        let _held = bulkhead.enter(soon()).await.unwrap();
        let deadline = Instant::now() + Duration::from_millis(30);
        assert!(bulkhead.enter(deadline).await.is_err());
        assert_eq!(Instant::now(), deadline);
    }

    #[tokio::test(start_paused = true)]
    async fn a_larger_limit_lets_waiters_in_and_a_smaller_one_waits_for_the_excess() {
        let bulkhead = Bulkhead::new(settings(1, 10, 60_000));
        let first = bulkhead.enter(soon()).await.unwrap();
        let waiting = tokio::spawn({
            let bulkhead = Arc::clone(&bulkhead);
            async move { join_all((0..2).map(|_| bulkhead.enter(soon()))).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(bulkhead.usage(), (1, 2));
        bulkhead.configure(settings(3, 10, 60_000));
        let others = waiting.await.unwrap();
        assert_eq!(bulkhead.usage(), (3, 0));
        bulkhead.configure(settings(1, 0, 60_000));
        drop(others);
        assert!(bulkhead.enter(soon()).await.is_err(), "still one inside");
        drop(first);
        assert!(bulkhead.enter(soon()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_waiter_leaves_nothing_behind() {
        let bulkhead = Bulkhead::new(settings(1, 10, 60_000));
        let held = bulkhead.enter(soon()).await.unwrap();
        let waiter = tokio::spawn({
            let bulkhead = Arc::clone(&bulkhead);
            async move { bulkhead.enter(soon()).await.is_ok() }
        });
        tokio::task::yield_now().await;
        assert_eq!(bulkhead.usage(), (1, 1));
        waiter.abort();
        assert!(waiter.await.unwrap_err().is_cancelled());
        assert_eq!(bulkhead.usage(), (1, 0));
        drop(held);
        assert_eq!(bulkhead.usage(), (0, 0));
    }

    /// Many callers, some of whom give up: never too many inside, and every place comes back.
    #[tokio::test]
    async fn holds_its_limit_under_many_callers() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let bulkhead = Bulkhead::new(settings(4, 1_000, 60_000));
        let inside = Arc::new(AtomicUsize::new(0));
        let callers = (0..400).map(|caller: u64| {
            let (bulkhead, inside) = (Arc::clone(&bulkhead), Arc::clone(&inside));
            tokio::spawn(async move {
                let enter = bulkhead.enter(soon());
                let place = if caller.is_multiple_of(3) {
                    tokio::time::timeout(Duration::from_micros(caller), enter).await.ok().and_then(Result::ok)
                } else {
                    enter.await.ok()
                };
                if let Some(_place) = place {
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < 4);
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.unwrap();
        }
        assert_eq!(bulkhead.usage(), (0, 0));
    }
}
