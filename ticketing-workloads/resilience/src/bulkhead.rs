//! The bulkhead (ADR-007 §3): a bounded number of calls at once, a bounded queue before it, a bounded wait in it.
//!
//! Not a semaphore of tokio's: that cannot shrink below what is in use. Here a smaller limit simply holds newcomers
//! back until enough calls have ended.
//!
//! One word holds how many calls are inside and how many wait, so that a call that finds room takes it without a lock,
//! and one that leaves knows whether somebody waits. Only those who wait take the lock of the queue.

use crate::failure::Rejection;
use crate::lock;
use contract::BulkheadSettings;
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// A compartment.
pub struct Bulkhead {
    /// Calls inside in the low half, calls waiting in the high one.
    word: AtomicU64,
    max_concurrent: AtomicU32,
    max_queued: AtomicU32,
    max_wait_ms: AtomicU64,
    queue: Mutex<Queue>,
    full: AtomicU64,
    waited_in_vain: AtomicU64,
}

#[derive(Default)]
struct Queue {
    waiters: VecDeque<Waiter>,
    next_id: u64,
}

struct Waiter {
    id: u64,
    place: oneshot::Sender<Place>,
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

/// How a bulkhead stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Calls inside.
    pub in_use: u32,
    /// Calls waiting for a place.
    pub queued: u32,
    /// Calls refused so far because the queue was full.
    pub full: u64,
    /// Calls that waited for a place in vain so far.
    pub waited_in_vain: u64,
}

impl Bulkhead {
    /// An empty bulkhead. It lives as long as the process, as the places in it point to it.
    pub fn new(settings: &BulkheadSettings) -> &'static Self {
        let bulkhead = Self {
            word: AtomicU64::new(0),
            max_concurrent: AtomicU32::new(1),
            max_queued: AtomicU32::new(0),
            max_wait_ms: AtomicU64::new(0),
            queue: Mutex::default(),
            full: AtomicU64::new(0),
            waited_in_vain: AtomicU64::new(0),
        };
        let bulkhead: &'static Self = Box::leak(Box::new(bulkhead));
        bulkhead.configure(settings);
        bulkhead
    }

    /// Takes new settings. Calls under way keep their places; more room is given to those who wait.
    pub fn configure(&'static self, settings: &BulkheadSettings) {
        // None at all would stop the workload for good.
        self.max_concurrent.store(settings.max_concurrent.max(1), Ordering::Relaxed);
        self.max_queued.store(settings.max_queued, Ordering::Relaxed);
        self.max_wait_ms.store(settings.max_wait_ms, Ordering::Relaxed);
        self.hand_out();
    }

    /// Takes a place, or a place in the queue, where it stays until `deadline` at the latest; `None`: as long as the
    /// settings allow.
    #[inline]
    pub fn enter(&'static self, deadline: Option<Instant>) -> Result<Entry, Rejection> {
        match self.try_enter() {
            Some(place) => Ok(Entry::Inside(place)),
            None => self.queue_up(deadline),
        }
    }

    /// Takes a place if there is one and nobody waits for it.
    #[inline]
    fn try_enter(&'static self) -> Option<Place> {
        let limit = u64::from(self.max_concurrent.load(Ordering::Relaxed));
        let mut word = self.word.load(Ordering::Relaxed);
        // While somebody waits, the high half makes the word larger than any limit.
        while word < limit {
            match self.word.compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Place { bulkhead: self }),
                Err(now) => word = now,
            }
        }
        None
    }

    #[cold]
    fn queue_up(&'static self, deadline: Option<Instant>) -> Result<Entry, Rejection> {
        let now = Instant::now();
        let max_wait = Duration::from_millis(self.max_wait_ms.load(Ordering::Relaxed));
        let give_up = deadline.unwrap_or(now + max_wait).min(now + max_wait);
        let mut queue = lock(&self.queue);
        // The lock keeps others from joining or leaving the queue; calls still go in and out. What is decided on is
        // what is written over, or a call could queue up beside a free place that nobody is left to hand out.
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
                Ok(_) if has_room => return Ok(Entry::Inside(Place { bulkhead: self })),
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        let (place, receiver) = oneshot::channel();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.waiters.push_back(Waiter { id, place });
        drop(queue);
        let timer = Box::pin(tokio::time::sleep_until(give_up));
        Ok(Entry::Queued(Queued { bulkhead: self, id, since: now, receiver, timer }))
    }

    /// How it stands.
    pub fn usage(&self) -> Usage {
        let word = self.word.load(Ordering::Acquire);
        Usage {
            in_use: inside(word),
            queued: waiting(word),
            full: self.full.load(Ordering::Relaxed),
            waited_in_vain: self.waited_in_vain.load(Ordering::Relaxed),
        }
    }

    /// Gives free places to those who wait longest. A place whose receiver has gone comes back through its drop.
    fn hand_out(&'static self) {
        loop {
            let waiter = {
                let mut queue = lock(&self.queue);
                let limit = self.max_concurrent.load(Ordering::Relaxed);
                // With the lock held and somebody in the queue, nobody else goes in.
                if inside(self.word.load(Ordering::Acquire)) >= limit {
                    return;
                }
                let Some(waiter) = queue.waiters.pop_front() else { return };
                // One more inside, one fewer waiting.
                self.word.fetch_sub(WAITING - 1, Ordering::AcqRel);
                waiter
            };
            drop(waiter.place.send(Place { bulkhead: self }));
        }
    }
}

/// What a call got from a bulkhead.
pub enum Entry {
    /// A place.
    Inside(Place),
    /// A place in the queue; to be awaited.
    Queued(Queued),
}

impl Entry {
    /// Waits for the place, if it is not there yet.
    pub async fn place(self) -> Result<Place, Rejection> {
        match self {
            Self::Inside(place) => Ok(place),
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
    receiver: oneshot::Receiver<Place>,
    timer: Pin<Box<Sleep>>,
}

impl Future for Queued {
    type Output = Result<Place, Rejection>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(Ok(place)) = Pin::new(&mut self.receiver).poll(cx) {
            return Poll::Ready(Ok(place));
        }
        self.timer.as_mut().poll(cx).map(|()| {
            self.bulkhead.waited_in_vain.fetch_add(1, Ordering::Relaxed);
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

/// A place in a bulkhead; given back when dropped.
pub struct Place {
    bulkhead: &'static Bulkhead,
}

impl Drop for Place {
    #[inline]
    fn drop(&mut self) {
        if self.bulkhead.word.fetch_sub(1, Ordering::AcqRel) >= WAITING {
            self.bulkhead.hand_out();
        }
    }
}

/// Bulkheads that a workload may have, with some room for those of which the last calls are still under way.
const SLOTS: usize = 64;

/// The bulkheads of a workload, by number, so that a call finds its own by one look. They come and go with the policy;
/// the slot of one that is gone is used again once its last call has ended.
pub struct Slots {
    bulkheads: [OnceLock<&'static Bulkhead>; SLOTS],
    names: Mutex<BTreeMap<String, usize>>,
}

impl Slots {
    /// The number of no slot.
    pub const NONE: usize = usize::MAX;

    /// No bulkheads yet. It lives as long as the process.
    pub fn new() -> &'static Self {
        let slots = Self { bulkheads: [const { OnceLock::new() }; SLOTS], names: Mutex::default() };
        Box::leak(Box::new(slots))
    }

    /// The bulkhead in a slot.
    #[inline]
    pub fn get(&self, slot: usize) -> Option<&'static Bulkhead> {
        self.bulkheads.get(slot)?.get().copied()
    }

    /// Takes the bulkheads of a policy; those that stay keep their calls. The answer is the slot of each.
    pub fn assign(&self, wanted: &BTreeMap<String, BulkheadSettings>) -> BTreeMap<String, usize> {
        let mut names = lock(&self.names);
        names.retain(|name, _| wanted.contains_key(name));
        for (name, settings) in wanted {
            let free = || {
                let taken = |slot: usize| names.values().any(|used| *used == slot);
                let empty = |slot| self.get(slot).is_none_or(|old| old.word.load(Ordering::Acquire) == 0);
                (0..SLOTS).find(|slot| !taken(*slot) && empty(*slot))
            };
            let Some(slot) = names.get(name).copied().or_else(free) else {
                tracing::warn!(bulkhead = %name, "there are too many bulkheads; calls pass without this one");
                continue;
            };
            let bulkhead = self.bulkheads[slot].get_or_init(|| Bulkhead::new(settings));
            bulkhead.configure(settings);
            if names.insert(name.clone(), slot).is_none() {
                bulkhead.full.store(0, Ordering::Relaxed);
                bulkhead.waited_in_vain.store(0, Ordering::Relaxed);
            }
        }
        names.clone()
    }

    /// How each stands.
    pub fn usage(&self) -> Vec<(String, Usage)> {
        let of = |(name, slot): (&String, &usize)| Some((name.clone(), self.get(*slot)?.usage()));
        lock(&self.names).iter().filter_map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;

    async fn enter(bulkhead: &'static Bulkhead, deadline: Instant) -> Result<Place, Rejection> {
        bulkhead.enter(Some(deadline))?.place().await
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

    /// Many callers, some of whom give up: never too many inside, and every place comes back.
    #[tokio::test]
    async fn holds_its_limit_under_many_callers() {
        use std::sync::{Arc, atomic::AtomicUsize};
        let bulkhead = Bulkhead::new(&settings(4, 1_000, 60_000));
        let inside = Arc::new(AtomicUsize::new(0));
        let callers = (0..400).map(|caller: u64| {
            let inside = Arc::clone(&inside);
            tokio::spawn(async move {
                let enter = enter(bulkhead, soon());
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
        assert_eq!(usage(bulkhead), (0, 0));
    }
    #[tokio::test(start_paused = true)]
    async fn a_slot_is_used_again_once_its_last_call_has_ended() {
        let slots = Slots::new();
        let assign = |names: &[&str]| {
            let wanted = names.iter().map(|name| ((*name).to_owned(), settings(1, 0, 0))).collect();
            let found = slots.assign(&wanted);
            names.iter().map(|name| found.get(*name).copied()).collect::<Vec<_>>()
        };
        assert_eq!(assign(&["a", "b"]), [Some(0), Some(1)]);
        let held = enter(slots.get(0).unwrap(), soon()).await.unwrap();
        assert!(enter(slots.get(0).unwrap(), soon()).await.is_err());
        assert_eq!(assign(&["b", "c"]), [Some(1), Some(2)], "a call of a is still under way");
        drop(held);
        assert_eq!(assign(&["c", "d"]), [Some(2), Some(0)]);
        assert_eq!(slots.usage()[1], ("d".to_owned(), Usage::default()), "nothing of a is left");
        assert!(slots.get(Slots::NONE).is_none());
    }

    /// Threads that go in and out, some through the queue: never too many inside, and nobody is forgotten in the queue.
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
                            let place = enter(bulkhead, soon()).await.unwrap();
                            assert!(inside.fetch_add(1, Ordering::SeqCst) < 2);
                            std::hint::spin_loop();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(place);
                        }
                    });
                });
            }
        });
        assert_eq!(usage(bulkhead), (0, 0));
    }
}
