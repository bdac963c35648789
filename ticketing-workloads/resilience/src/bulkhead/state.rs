//! The bulkhead (ADR-007 §3): a bounded number of calls at once, a bounded queue before it, a bounded wait in it.
//!
//! Not a semaphore of tokio's: that cannot shrink below what is in use. Here a smaller limit simply holds newcomers
//! back until enough calls have ended.
//!
//! One word holds how many calls are inside and how many wait, so that a call that finds room takes it without a lock,
//! and one that leaves knows whether another one waits. Only calls that wait take the lock of the queue.

use crate::failure::Rejection;
use crate::sync::lock;
use contract::BulkheadSettings;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// A bounded number of calls at once, with a bounded queue before it.
pub struct Bulkhead {
    /// Calls inside in the low half, calls waiting in the high one.
    word: AtomicU64,
    max_concurrent: AtomicU32,
    max_queued: AtomicU32,
    max_wait_ms: AtomicU64,
    queue: Mutex<Queue>,
    full: AtomicU64,
    timed_out: AtomicU64,
}

#[derive(Default)]
struct Queue {
    waiters: VecDeque<Waiter>,
    next_id: u64,
}

struct Waiter {
    id: u64,
    slot: oneshot::Sender<Slot>,
}

const WAITING: u64 = 1 << 32;

/// Calls inside, by the word.
fn inside(word: u64) -> u32 {
    u32::try_from(word & (WAITING - 1)).unwrap_or(u32::MAX)
}

/// Calls waiting, by the word.
fn waiting(word: u64) -> u32 {
    u32::try_from(word >> 32).unwrap_or(u32::MAX)
}

/// How full a bulkhead is, and what it has refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Calls inside.
    pub in_use: u32,
    /// Calls waiting for a slot.
    pub queued: u32,
    /// Calls refused so far because the queue was full.
    pub full: u64,
    /// Calls that timed out in the queue so far.
    pub timed_out: u64,
}

impl Bulkhead {
    /// An empty bulkhead. It lives as long as the process, as the slots in use point to it.
    pub fn new(settings: &BulkheadSettings) -> &'static Self {
        let bulkhead = Self {
            word: AtomicU64::new(0),
            max_concurrent: AtomicU32::new(1),
            max_queued: AtomicU32::new(0),
            max_wait_ms: AtomicU64::new(0),
            queue: Mutex::default(),
            full: AtomicU64::new(0),
            timed_out: AtomicU64::new(0),
        };
        let bulkhead: &'static Self = Box::leak(Box::new(bulkhead));
        bulkhead.configure(settings);
        bulkhead
    }

    /// Takes new settings. Calls under way keep their slots; more room is given to those who wait.
    pub fn configure(&'static self, settings: &BulkheadSettings) {
        // None at all would stop the workload for good.
        self.max_concurrent.store(settings.max_concurrent.max(1), Ordering::Relaxed);
        self.max_queued.store(settings.max_queued, Ordering::Relaxed);
        self.max_wait_ms.store(settings.max_wait_ms, Ordering::Relaxed);
        self.hand_out();
    }

    /// Takes a slot, or a position in the queue until `deadline` at the latest; `None`: as long as the settings allow.
    #[inline]
    pub fn acquire(&'static self, deadline: Option<Instant>) -> Result<Acquired, Rejection> {
        match self.try_acquire() {
            Some(slot) => Ok(Acquired::Slot(slot)),
            None => self.queue_up(deadline),
        }
    }

    /// Takes a slot if one is free and no call waits for it.
    #[inline]
    fn try_acquire(&'static self) -> Option<Slot> {
        let limit = u64::from(self.max_concurrent.load(Ordering::Relaxed));
        let mut word = self.word.load(Ordering::Relaxed);
        // While a call waits, the high half makes the word larger than any limit.
        while word < limit {
            match self.word.compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Slot { bulkhead: self }),
                Err(now) => word = now,
            }
        }
        None
    }

    #[cold]
    fn queue_up(&'static self, deadline: Option<Instant>) -> Result<Acquired, Rejection> {
        let now = Instant::now();
        let max_wait = Duration::from_millis(self.max_wait_ms.load(Ordering::Relaxed));
        let give_up = deadline.unwrap_or(now + max_wait).min(now + max_wait);
        let mut queue = lock(&self.queue);
        // The lock keeps others from joining or leaving the queue; calls still go in and out. What is decided on is
        // what is written over, or a call could queue up beside a free slot that no call is left to hand out.
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let limit = self.max_concurrent.load(Ordering::Relaxed);
            let has_room = word < u64::from(limit);
            if !has_room && (waiting(word) >= self.max_queued.load(Ordering::Relaxed) || give_up <= now) {
                self.full.fetch_add(1, Ordering::Relaxed);
                return Err(Rejection::BulkheadFull { in_use: inside(word), queued: waiting(word) });
            }
            let next = if has_room { word + 1 } else { word + WAITING };
            match self.word.compare_exchange(word, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) if has_room => return Ok(Acquired::Slot(Slot { bulkhead: self })),
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        let (slot, receiver) = oneshot::channel();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.waiters.push_back(Waiter { id, slot });
        drop(queue);
        let timer = Box::pin(tokio::time::sleep_until(give_up));
        Ok(Acquired::Queued(Queued { bulkhead: self, id, since: now, receiver, timer }))
    }

    /// How full it is, and what it has refused since the process started.
    pub fn usage(&self) -> Usage {
        let word = self.word.load(Ordering::Acquire);
        Usage {
            in_use: inside(word),
            queued: waiting(word),
            full: self.full.load(Ordering::Relaxed),
            timed_out: self.timed_out.load(Ordering::Relaxed),
        }
    }

    /// Whether no call is inside and none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.word.load(Ordering::Acquire) == 0
    }

    /// Starts counting refusals anew.
    pub(super) fn reset_counts(&self) {
        self.full.store(0, Ordering::Relaxed);
        self.timed_out.store(0, Ordering::Relaxed);
    }

    /// Gives free slots to those who wait longest. A slot whose receiver has gone is released by its drop.
    fn hand_out(&'static self) {
        loop {
            let waiter = {
                let mut queue = lock(&self.queue);
                let limit = self.max_concurrent.load(Ordering::Relaxed);
                // With the lock held and a call in the queue, no other call goes in.
                if inside(self.word.load(Ordering::Acquire)) >= limit {
                    return;
                }
                let Some(waiter) = queue.waiters.pop_front() else { return };
                // One more inside, one fewer waiting.
                self.word.fetch_sub(WAITING - 1, Ordering::AcqRel);
                waiter
            };
            drop(waiter.slot.send(Slot { bulkhead: self }));
        }
    }
}

/// What a call has got from a bulkhead.
pub enum Acquired {
    /// A slot.
    Slot(Slot),
    /// A position in the queue; to be awaited.
    Queued(Queued),
}

impl Acquired {
    /// Waits for the slot, if it is not there yet.
    pub async fn slot(self) -> Result<Slot, Rejection> {
        match self {
            Self::Slot(slot) => Ok(slot),
            Self::Queued(queued) => queued.await,
        }
    }
}

/// A call in the queue; leaves it when dropped.
#[must_use = "a call that is not awaited leaves the queue"]
pub struct Queued {
    bulkhead: &'static Bulkhead,
    id: u64,
    since: Instant,
    receiver: oneshot::Receiver<Slot>,
    timer: Pin<Box<Sleep>>,
}

impl Future for Queued {
    type Output = Result<Slot, Rejection>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(Ok(slot)) = Pin::new(&mut self.receiver).poll(cx) {
            return Poll::Ready(Ok(slot));
        }
        self.timer.as_mut().poll(cx).map(|()| {
            self.bulkhead.timed_out.fetch_add(1, Ordering::Relaxed);
            Err(Rejection::BulkheadWait { waited: self.since.elapsed() })
        })
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let mut queue = lock(&self.bulkhead.queue);
        let before = queue.waiters.len();
        queue.waiters.retain(|waiter| waiter.id != self.id);
        if queue.waiters.len() < before {
            self.bulkhead.word.fetch_sub(WAITING, Ordering::Relaxed);
        }
    }
}

/// A slot in a bulkhead; released when dropped.
pub struct Slot {
    bulkhead: &'static Bulkhead,
}

impl Drop for Slot {
    #[inline]
    fn drop(&mut self) {
        if self.bulkhead.word.fetch_sub(1, Ordering::AcqRel) >= WAITING {
            self.bulkhead.hand_out();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;

    async fn enter(bulkhead: &'static Bulkhead, deadline: Instant) -> Result<Slot, Rejection> {
        bulkhead.acquire(Some(deadline))?.slot().await
    }

    fn usage(bulkhead: &Bulkhead) -> (u32, u32) {
        let Usage { in_use, queued, .. } = bulkhead.usage();
        (in_use, queued)
    }

    fn settings(max_concurrent: u32, max_queued: u32, max_wait_ms: u64) -> BulkheadSettings {
        BulkheadSettings { max_concurrent, max_queued, max_wait_ms }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test(start_paused = true)]
    async fn refuses_when_the_queue_is_full_and_when_the_wait_is_over() {
        let bulkhead = Bulkhead::new(&settings(1, 1, 500));
        let _held = enter(bulkhead, soon()).await.unwrap();
        let (first, second) = tokio::join!(enter(bulkhead, soon()), enter(bulkhead, soon()));
        assert_eq!(first.err(), Some(Rejection::BulkheadWait { waited: Duration::from_millis(500) }));
        assert_eq!(second.err(), Some(Rejection::BulkheadFull { in_use: 1, queued: 1 }));
        assert_eq!(usage(bulkhead), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn waits_no_longer_than_the_deadline() {
        let bulkhead = Bulkhead::new(&settings(1, 10, 60_000));
        let _held = enter(bulkhead, soon()).await.unwrap();
        let deadline = Instant::now() + Duration::from_millis(30);
        assert!(enter(bulkhead, deadline).await.is_err());
        assert_eq!(Instant::now(), deadline);
    }

    #[tokio::test(start_paused = true)]
    async fn a_larger_limit_lets_waiters_in_and_a_smaller_one_waits_for_the_excess() {
        let bulkhead = Bulkhead::new(&settings(1, 10, 60_000));
        let first = enter(bulkhead, soon()).await.unwrap();
        let waiting = tokio::spawn(join_all((0..2).map(move |_| enter(bulkhead, soon()))));
        tokio::task::yield_now().await;
        assert_eq!(usage(bulkhead), (1, 2));
        bulkhead.configure(&settings(3, 10, 60_000));
        let others = waiting.await.unwrap();
        assert_eq!(usage(bulkhead), (3, 0));
        bulkhead.configure(&settings(1, 0, 60_000));
        drop(others);
        assert!(enter(bulkhead, soon()).await.is_err(), "still one inside");
        drop(first);
        assert!(enter(bulkhead, soon()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_waiter_leaves_nothing_behind() {
        let bulkhead = Bulkhead::new(&settings(1, 10, 60_000));
        let held = enter(bulkhead, soon()).await.unwrap();
        let waiter = tokio::spawn(async move { enter(bulkhead, soon()).await.is_ok() });
        tokio::task::yield_now().await;
        assert_eq!(usage(bulkhead), (1, 1));
        waiter.abort();
        assert!(waiter.await.unwrap_err().is_cancelled());
        assert_eq!(usage(bulkhead), (1, 0));
        drop(held);
        assert_eq!(usage(bulkhead), (0, 0));
    }

    /// Many callers, some of whom give up: never too many inside, and every slot is released.
    #[tokio::test]
    async fn holds_its_limit_under_many_callers() {
        use std::sync::{Arc, atomic::AtomicUsize};
        let bulkhead = Bulkhead::new(&settings(4, 1_000, 60_000));
        let inside = Arc::new(AtomicUsize::new(0));
        let callers = (0..400).map(|caller: u64| {
            let inside = Arc::clone(&inside);
            tokio::spawn(async move {
                let enter = enter(bulkhead, soon());
                let slot = if caller.is_multiple_of(3) {
                    tokio::time::timeout(Duration::from_micros(caller), enter).await.ok().and_then(Result::ok)
                } else {
                    enter.await.ok()
                };
                if let Some(_slot) = slot {
                    assert!(inside.fetch_add(1, Ordering::SeqCst) < 4);
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                }
            })
        });
        for caller in callers.collect::<Vec<_>>() {
            caller.await.unwrap();
        }
        assert_eq!(usage(bulkhead), (0, 0));
    }

    /// Threads that go in and out, some through the queue: never too many inside, and none is forgotten in the queue.
    #[test]
    fn threads_share_it_without_forgetting_anybody() {
        use std::sync::atomic::AtomicUsize;
        let bulkhead = Bulkhead::new(&settings(2, 100, 20_000));
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                    runtime.block_on(async {
                        for _ in 0..5_000 {
                            let slot = enter(bulkhead, soon()).await.unwrap();
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                            std::hint::spin_loop();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(slot);
                        }
                    });
                });
            }
        });
        assert_eq!(usage(bulkhead), (0, 0));
    }
}
