//! The bulkhead (ADR-007 §3): a bounded number of calls at once, a bounded queue before it, a bounded wait in it.
//!
//! Not a semaphore of tokio's: that cannot shrink below what is in use. Here a smaller limit simply holds newcomers
//! back until enough calls have ended.
//!
//! One [word] holds how many calls are inside and whose turn it is, so that a call that finds room takes it
//! without a lock, and one that leaves knows whether another one waits. Only calls that wait take the lock of the queue.
//!
//! Of those that wait the most important ones go first, and a full queue makes room for one by refusing the least important.
//! Calls of which nobody said how important they are go with the first.

use super::queue::Queue;
use super::shares;
use super::word::{self, entry};
use crate::failure::Rejection;
use crate::priority::Priority;
use crate::sync::lock;
use contract::BulkheadSettings;
use std::future::Future;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep};

/// A bounded number of calls at once, with a bounded queue before it.
pub struct Bulkhead {
    word: AtomicU64,
    /// The limits on what is inside, by `max_concurrent` and `keeps_slots`. Written with the lock held.
    limits: AtomicU64,
    keeps_slots: AtomicBool,
    /// Most calls below the highest priority that are let in; 0: as many as there are slots for.
    held_back: AtomicU32,
    max_concurrent: AtomicU32,
    max_queued: AtomicU32,
    max_wait_ms: AtomicU64,
    /// Since when each waits, and where its slot goes.
    queue: Mutex<Queue<(Instant, oneshot::Sender<Slot>)>>,
    full: AtomicU64,
    timed_out: AtomicU64,
    shed: AtomicU64,
    refused: [AtomicU64; 3],
}

/// Above this a load says nothing more, in percent.
const MAX_PERCENT: u32 = 1_000;

/// How full a bulkhead is, and what it has refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Calls inside.
    pub in_use: u32,
    /// Most calls of each [`Priority`] and those below it that may be inside now.
    pub limits: [u32; 3],
    /// Calls waiting for a slot.
    pub queued: u32,
    /// Calls refused so far because the queue was full.
    pub full: u64,
    /// Calls that timed out in the queue so far.
    pub timed_out: u64,
    /// Calls refused so far for others that are more important.
    pub shed: u64,
    /// All these, by [`Priority`].
    pub refused: [u64; 3],
    /// Calls inside that are not of the highest priority.
    pub less_important: u32,
    /// Most of those that are let in now, where it is told to hold them back.
    pub held_back: Option<u32>,
    /// Most calls that may wait.
    pub max_queued: u32,
    /// How long the one has waited that waits longest.
    pub oldest: Duration,
    /// How long each may.
    pub max_wait: Duration,
}

impl Usage {
    /// Calls inside and waiting, in percent of the slots that there are now and the places in the queue.
    pub fn percent(&self) -> u32 {
        let of = |inside: u32, slots: u32| {
            let (taken, places) =
                (u64::from(inside) + u64::from(self.queued), u64::from(slots) + u64::from(self.max_queued));
            u32::try_from(taken * 100 / places.max(1)).unwrap_or(u32::MAX).min(MAX_PERCENT)
        };
        let all = of(self.in_use, self.limits[Priority::Finish as usize]);
        self.held_back.map_or(all, |most| all.max(of(self.less_important, most)))
    }

    /// How long the one that waits longest has waited, in percent of the time that it may.
    pub fn queue_percent(&self) -> u32 {
        let percent = self.oldest.as_millis() * 100 / self.max_wait.as_millis().max(1);
        u32::try_from(percent).unwrap_or(u32::MAX).min(MAX_PERCENT)
    }

    /// What an adaptive limit leaves of the slots, in percent; `None`: there is none.
    pub fn limit_percent(&self) -> Option<u32> {
        let slots = u64::from(self.limits[Priority::Finish as usize]).max(1);
        self.held_back.map(|most| u32::try_from(u64::from(most) * 100 / slots).unwrap_or(u32::MAX))
    }
}

impl Bulkhead {
    /// An empty bulkhead. It lives as long as the process, as the slots in use point to it.
    pub fn new(settings: &BulkheadSettings) -> &'static Self {
        let bulkhead = Self {
            word: AtomicU64::new(0),
            limits: AtomicU64::new(0),
            keeps_slots: AtomicBool::new(false),
            held_back: AtomicU32::new(0),
            max_concurrent: AtomicU32::new(1),
            max_queued: AtomicU32::new(0),
            max_wait_ms: AtomicU64::new(0),
            queue: Mutex::default(),
            full: AtomicU64::new(0),
            timed_out: AtomicU64::new(0),
            shed: AtomicU64::new(0),
            refused: Default::default(),
        };
        let bulkhead: &'static Self = Box::leak(Box::new(bulkhead));
        bulkhead.configure(settings);
        bulkhead
    }

    /// Takes new settings. Calls under way keep their slots; more room is given to those who wait.
    pub fn configure(&'static self, settings: &BulkheadSettings) {
        self.max_concurrent.store(settings.max_concurrent, Ordering::Relaxed);
        self.max_queued.store(settings.max_queued, Ordering::Relaxed);
        self.max_wait_ms.store(settings.max_wait_ms, Ordering::Relaxed);
        self.set_limits();
        self.hand_out();
    }

    /// Most calls at once.
    pub(crate) fn max_concurrent(&self) -> u32 {
        self.max_concurrent.load(Ordering::Relaxed).max(1)
    }

    /// Keeps slots for the more important calls from now on ([`shares::limits`]): some of them take long, and what is inside
    /// is not interrupted.
    pub fn keep_slots(&self) {
        self.keeps_slots.store(true, Ordering::Relaxed);
        self.set_limits();
    }

    /// Where it keeps slots: lets at most so many calls in that are not of the highest priority, until it is told otherwise.
    /// `None`: as many as it has slots for. Those that are inside stay.
    pub fn hold_back(&'static self, most: Option<u32>) {
        let most = most.map_or(0, |most| most.max(1));
        if self.held_back.swap(most, Ordering::Relaxed) != most {
            self.set_limits();
            self.hand_out();
        }
    }

    /// Calls inside that are not of the highest priority.
    pub fn less_important(&self) -> u32 {
        word::inside_up_to(self.word.load(Ordering::Relaxed), Priority::Start)
    }

    fn set_limits(&self) {
        // What is read here is written before anybody else reads it.
        let _queue = lock(&self.queue);
        let limits = self.shares();
        self.limits.store(word::of_limits(limits), Ordering::Relaxed);
    }

    fn shares(&self) -> [u32; 3] {
        let held_back = Some(self.held_back.load(Ordering::Relaxed)).filter(|most| *most > 0);
        shares::limits(self.max_concurrent(), self.keeps_slots.load(Ordering::Relaxed), held_back)
    }

    /// Takes a slot, or a position in the queue until `deadline` at the latest; `None`: as long as the settings allow.
    #[inline]
    pub fn acquire(&'static self, priority: Priority, deadline: Option<Instant>) -> Result<Acquired, Rejection> {
        match self.try_acquire(priority) {
            Some(slot) => Ok(Acquired::Slot(slot)),
            None => self.queue_up(priority, deadline),
        }
    }

    /// Takes a slot if one is free, and no call waits for it that is as important, or more so.
    #[inline]
    pub fn try_acquire(&'static self, priority: Priority) -> Option<Slot> {
        let limits = self.limits.load(Ordering::Relaxed);
        let mut word = self.word.load(Ordering::Relaxed);
        while word::is_open(word, limits, priority) {
            let next = word + entry(priority);
            match self.word.compare_exchange_weak(word, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(Slot { bulkhead: self, priority }),
                Err(now) => word = now,
            }
        }
        None
    }

    #[cold]
    fn queue_up(&'static self, priority: Priority, deadline: Option<Instant>) -> Result<Acquired, Rejection> {
        let now = Instant::now();
        let max_wait = Duration::from_millis(self.max_wait_ms.load(Ordering::Relaxed));
        let give_up = deadline.unwrap_or(now + max_wait).min(now + max_wait);
        let most = usize::try_from(self.max_queued.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        let mut queue = lock(&self.queue);
        let may_wait = give_up > now && queue.admits(priority, most);
        let highest = queue.highest().max(Some(priority));
        // The lock keeps others from joining or leaving the queue; calls still go in and out. What is decided on is
        // what is written over, or a call could queue up beside a free slot that no call is left to hand out.
        let limits = self.limits.load(Ordering::Relaxed);
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let is_open = word::is_open(word, limits, priority);
            if !is_open && !may_wait {
                return Err(self.refuse(priority, word, queue.len()));
            }
            let next = if is_open { word + entry(priority) } else { word::with_turn(word, highest) };
            match self.word.compare_exchange(word, next, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) if is_open => return Ok(Acquired::Slot(Slot { bulkhead: self, priority })),
                Ok(_) => break,
                Err(now) => word = now,
            }
        }
        let (slot, receiver) = oneshot::channel();
        let id = queue.next_id();
        let displaced = queue.join(priority, most, (now, slot));
        drop(queue);
        // It finds that out by the end of its channel.
        drop(displaced);
        let timer = Box::pin(tokio::time::sleep_until(give_up));
        Ok(Acquired::Queued(Queued { bulkhead: self, priority, id, since: now, receiver, timer }))
    }

    /// Refuses an arrival.
    fn refuse(&self, priority: Priority, word: u64, queued: usize) -> Rejection {
        if word::waits_above(word, priority) {
            return self.shed(priority, Duration::ZERO);
        }
        self.full.fetch_add(1, Ordering::Relaxed);
        self.refused[priority as usize].fetch_add(1, Ordering::Relaxed);
        Rejection::BulkheadFull { in_use: word::inside(word), queued: u32::try_from(queued).unwrap_or(u32::MAX) }
    }

    fn shed(&self, priority: Priority, waited: Duration) -> Rejection {
        self.shed.fetch_add(1, Ordering::Relaxed);
        self.refused[priority as usize].fetch_add(1, Ordering::Relaxed);
        Rejection::Shed { waited }
    }

    /// How full it is, and what it has refused since the process started.
    pub fn usage(&self) -> Usage {
        let (queued, oldest) = {
            let queue = lock(&self.queue);
            (queue.len(), queue.oldest().map(|(since, _)| *since).min())
        };
        let held_back = Some(self.held_back.load(Ordering::Relaxed)).filter(|most| *most > 0);
        Usage {
            less_important: self.less_important(),
            held_back: held_back.filter(|_| self.keeps_slots.load(Ordering::Relaxed)),
            max_queued: self.max_queued.load(Ordering::Relaxed),
            oldest: oldest.map(|since| since.elapsed()).unwrap_or_default(),
            max_wait: Duration::from_millis(self.max_wait_ms.load(Ordering::Relaxed)),
            in_use: word::inside(self.word.load(Ordering::Acquire)),
            limits: self.shares(),
            queued: u32::try_from(queued).unwrap_or(u32::MAX),
            full: self.full.load(Ordering::Relaxed),
            timed_out: self.timed_out.load(Ordering::Relaxed),
            shed: self.shed.load(Ordering::Relaxed),
            refused: self.refused.each_ref().map(|count| count.load(Ordering::Relaxed)),
        }
    }

    /// Whether no call is inside and none waits.
    pub(super) fn is_empty(&self) -> bool {
        self.word.load(Ordering::Acquire) == 0
    }

    /// Starts counting refusals anew, keeps no slots, and holds nobody back.
    pub(super) fn begin_anew(&self) {
        let counts = [&self.full, &self.timed_out, &self.shed].into_iter().chain(&self.refused);
        counts.for_each(|count| count.store(0, Ordering::Relaxed));
        self.keeps_slots.store(false, Ordering::Relaxed);
        self.held_back.store(0, Ordering::Relaxed);
        self.set_limits();
    }

    /// Gives free slots to the most important of those who wait, and among equals to those who wait longest. A slot whose
    /// receiver has gone is released by its drop.
    fn hand_out(&'static self) {
        loop {
            let (priority, (_, slot)) = {
                let mut queue = lock(&self.queue);
                let Some(first) = queue.highest() else { return };
                let limits = self.limits.load(Ordering::Relaxed);
                let enter = |word| word::has_room(word, limits, first).then(|| word + entry(first));
                // Where there is no room for the first, there is none for those after it.
                if self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, enter).is_err() {
                    return;
                }
                let Some(next) = queue.next() else { return };
                self.set_turn(&queue);
                next
            };
            drop(slot.send(Slot { bulkhead: self, priority }));
        }
    }

    /// Says in the word who waits, with the lock held.
    fn set_turn<W>(&self, queue: &Queue<W>) {
        let turn = |word| Some(word::with_turn(word, queue.highest()));
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, turn);
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
    priority: Priority,
    id: u64,
    since: Instant,
    receiver: oneshot::Receiver<Slot>,
    timer: Pin<Box<Sleep>>,
}

impl Future for Queued {
    type Output = Result<Slot, Rejection>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match Pin::new(&mut self.receiver).poll(cx) {
            Poll::Ready(Ok(slot)) => return Poll::Ready(Ok(slot)),
            // A more important call has its place.
            Poll::Ready(Err(_)) => return Poll::Ready(Err(self.bulkhead.shed(self.priority, self.since.elapsed()))),
            Poll::Pending => {}
        }
        self.timer.as_mut().poll(cx).map(|()| {
            let (bulkhead, waited) = (self.bulkhead, self.since.elapsed());
            if word::waits_above(bulkhead.word.load(Ordering::Relaxed), self.priority) {
                return Err(bulkhead.shed(self.priority, waited));
            }
            bulkhead.timed_out.fetch_add(1, Ordering::Relaxed);
            bulkhead.refused[self.priority as usize].fetch_add(1, Ordering::Relaxed);
            Err(Rejection::BulkheadWait { waited })
        })
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let mut queue = lock(&self.bulkhead.queue);
        if queue.leave(self.priority, self.id).is_some() {
            self.bulkhead.set_turn(&queue);
        }
    }
}

/// A slot in a bulkhead; released when dropped.
pub struct Slot {
    bulkhead: &'static Bulkhead,
    priority: Priority,
}

impl Drop for Slot {
    #[inline]
    fn drop(&mut self) {
        if word::has_waiters(self.bulkhead.word.fetch_sub(entry(self.priority), Ordering::AcqRel)) {
            self.bulkhead.hand_out();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::future::join_all;

    async fn enter(bulkhead: &'static Bulkhead, deadline: Instant) -> Result<Slot, Rejection> {
        bulkhead.acquire(Priority::default(), Some(deadline))?.slot().await
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
        let bulkhead = Bulkhead::new(&settings(3, 100, 20_000));
        bulkhead.keep_slots();
        // Calls of each priority and those below it.
        let inside = [0; 3].map(AtomicUsize::new);
        let limits = [1, 2, 3];
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let inside = &inside;
                scope.spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                    runtime.block_on(async {
                        for round in 0..4_000 {
                            let priority = Priority::ALL[(thread + round) % 3];
                            let counted = inside.iter().zip(limits).skip(priority as usize);
                            let slot = bulkhead.acquire(priority, Some(soon())).unwrap().slot().await.unwrap();
                            for (count, limit) in counted.clone() {
                                assert!(count.fetch_add(1, Ordering::SeqCst) < limit);
                            }
                            std::hint::spin_loop();
                            for (count, _) in counted {
                                count.fetch_sub(1, Ordering::SeqCst);
                            }
                            drop(slot);
                        }
                    });
                });
            }
        });
        assert_eq!(usage(bulkhead), (0, 0));
        assert!(bulkhead.is_empty(), "nobody has the turn");
    }
}
