//! A controller's queue of work: each key at most once, one reconcile of a key at a time, and what is due later waits.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Least wait after a failure, whatever changes meanwhile: what fails over an object may itself be what changes it.
const LEAST_BACK_OFF: Duration = Duration::from_secs(1);
/// Longest wait after failures.
const MAX_BACK_OFF: Duration = Duration::from_secs(60);

/// Keys that are to be reconciled.
pub struct Queue<K>(Arc<Inner<K>>);

impl<K> Clone for Queue<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Inner<K> {
    state: Mutex<State<K>>,
    changed: Notify,
}

struct State<K> {
    entries: HashMap<K, Entry>,
    ready: VecDeque<K>,
    /// By moment, and by the order in which they were set.
    timers: BinaryHeap<Reverse<(Instant, u64, K)>>,
    timers_set: u64,
    /// Failures in a row, and when the last one was.
    failures: HashMap<K, (u32, Instant)>,
    running: usize,
    /// When a reconcile last ended, or the queue last had nothing to do.
    progress: Instant,
}

enum Entry {
    /// In `ready`.
    Ready,
    /// In `timers`, for this moment; an older timer of the key means nothing.
    Waiting(Instant),
    /// Being reconciled; and when it is to be again, if that was asked for meanwhile.
    Running(Option<Instant>),
}

// The oldest compiler that is supported wants an order of an empty heap, too.
impl<K: Ord> Default for Queue<K> {
    fn default() -> Self {
        let state = State {
            entries: HashMap::new(),
            ready: VecDeque::new(),
            timers: BinaryHeap::new(),
            timers_set: 0,
            failures: HashMap::new(),
            running: 0,
            progress: Instant::now(),
        };
        Self(Arc::new(Inner { state: Mutex::new(state), changed: Notify::new() }))
    }
}

impl<K: Clone + Eq + Hash + Ord> State<K> {
    fn has_work(&self, now: Instant) -> bool {
        self.running > 0 || !self.ready.is_empty() || self.next_timer().is_some_and(|at| at <= now)
    }

    fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, ..))| *at)
    }

    /// Adds a key. The value says whether there is something to do sooner than before: nobody else need be woken.
    fn add(&mut self, key: K, at: Instant, now: Instant) -> bool {
        let at = self.failures.get(&key).map_or(at, |(_, last)| at.max(*last + LEAST_BACK_OFF));
        if !self.has_work(now) {
            self.progress = now;
        }
        match self.entries.get_mut(&key) {
            Some(Entry::Ready) => false,
            Some(Entry::Running(again)) => {
                *again = Some(again.map_or(at, |again| again.min(at)));
                false
            }
            Some(Entry::Waiting(before)) if *before <= at => false,
            _ if at <= now => {
                self.entries.insert(key.clone(), Entry::Ready);
                self.ready.push_back(key);
                true
            }
            _ => {
                let first = self.next_timer().is_none_or(|first| at < first);
                self.entries.insert(key.clone(), Entry::Waiting(at));
                self.timers_set += 1;
                self.timers.push(Reverse((at, self.timers_set, key)));
                first
            }
        }
    }

    /// Moves what is due to where it is taken from.
    fn ring(&mut self, now: Instant) {
        while self.next_timer().is_some_and(|at| at <= now) {
            let Some(Reverse((at, _, key))) = self.timers.pop() else { return };
            if matches!(self.entries.get(&key), Some(Entry::Waiting(meant)) if *meant == at) {
                self.entries.insert(key.clone(), Entry::Ready);
                self.ready.push_back(key);
            }
        }
    }
}

impl<K: Clone + Eq + Hash + Ord> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, State<K>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for a reconcile now.
    pub fn enqueue(&self, key: K) {
        let now = Instant::now();
        if self.lock().add(key, now, now) {
            self.0.changed.notify_one();
        }
    }

    /// Asks for a reconcile after a while; one that is due earlier stands for it.
    pub fn enqueue_after(&self, key: K, after: Duration) {
        let now = Instant::now();
        if self.lock().add(key, now + after, now) {
            self.0.changed.notify_one();
        }
    }

    /// Waits for the next key. There is one caller: another one would not be woken for it. The caller reports its end with
    /// [`Queue::done`].
    pub async fn next(&self) -> K {
        loop {
            let changed = self.0.changed.notified();
            let timer = {
                let mut state = self.lock();
                state.ring(Instant::now());
                if let Some(key) = state.ready.pop_front() {
                    state.entries.insert(key.clone(), Entry::Running(None));
                    state.running += 1;
                    return key;
                }
                state.next_timer()
            };
            match timer {
                Some(at) => tokio::select! { () = changed => {}, () = tokio::time::sleep_until(at) => {} },
                None => changed.await,
            }
        }
    }

    /// The reconcile of a key has ended; `again` says after what time it is to be reconciled again by itself.
    pub fn done(&self, key: &K, again: Option<Duration>) {
        let now = Instant::now();
        let mut state = self.lock();
        state.running = state.running.saturating_sub(1);
        state.progress = now;
        let asked = match state.entries.remove(key) {
            Some(Entry::Running(asked)) => asked,
            _ => None,
        };
        let at = again.map(|after| now + after).into_iter().chain(asked).min();
        let sooner = at.is_some_and(|at| state.add(key.clone(), at, now));
        drop(state);
        if sooner {
            self.0.changed.notify_one();
        }
    }

    /// The wait after one more failure in a row: 1 s doubled up to 60 s.
    pub fn back_off(&self, key: &K) -> Duration {
        let mut state = self.lock();
        let (failures, last) = state.failures.entry(key.clone()).or_insert((0, Instant::now()));
        *failures = failures.saturating_add(1);
        *last = Instant::now();
        Duration::from_millis(500 << (*failures).min(8)).min(MAX_BACK_OFF)
    }

    /// The key was reconciled without a failure, or its object is gone.
    pub fn forget_failures(&self, key: &K) {
        self.lock().failures.remove(key);
    }

    /// For how long there has been work and none of it was done.
    pub fn stuck_for(&self, now: Instant) -> Option<Duration> {
        let state = self.lock();
        state.has_work(now).then(|| {
            // What is due by a timer has only been work since then.
            let since = if state.running == 0 && state.ready.is_empty() {
                state.next_timer().map_or(state.progress, |at| at.max(state.progress))
            } else {
                state.progress
            };
            now.saturating_duration_since(since)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn next_within(queue: &Queue<u32>, seconds: u64) -> Option<u32> {
        tokio::time::timeout(Duration::from_secs(seconds), queue.next()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_is_there_once_and_never_beside_itself() {
        let queue = Queue::default();
        queue.enqueue(1);
        queue.enqueue(1);
        assert_eq!(next_within(&queue, 1).await, Some(1));
        queue.enqueue(1);
        assert_eq!(next_within(&queue, 1).await, None, "it is being reconciled");
        queue.done(&1, None);
        assert_eq!(next_within(&queue, 1).await, Some(1), "it was asked for meanwhile");
        queue.done(&1, None);
        assert_eq!(next_within(&queue, 1).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_earliest_moment_counts() {
        let queue = Queue::default();
        queue.enqueue_after(1, Duration::from_secs(10));
        queue.enqueue_after(1, Duration::from_secs(5));
        queue.enqueue_after(1, Duration::from_secs(20));
        assert_eq!(next_within(&queue, 4).await, None);
        assert_eq!(next_within(&queue, 2).await, Some(1));
        queue.done(&1, Some(Duration::from_secs(30)));
        queue.enqueue(1);
        assert_eq!(next_within(&queue, 1).await, Some(1), "now is earlier than in 30 s");
        queue.done(&1, None);
        assert_eq!(next_within(&queue, 60).await, None, "no older timer rings for it");
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_after_failures_grows_up_to_a_minute() {
        let queue = Queue::default();
        let waits: Vec<_> = (0..12).map(|_| queue.back_off(&1)).collect();
        assert_eq!((waits[0], waits[1]), (Duration::from_secs(1), Duration::from_secs(2)));
        assert_eq!(waits[11], MAX_BACK_OFF);
        queue.forget_failures(&1);
        assert_eq!(queue.back_off(&1), Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn changes_do_not_cut_the_wait_after_a_failure_short() {
        let queue = Queue::default();
        queue.enqueue(1);
        assert_eq!(next_within(&queue, 1).await, Some(1));
        let wait = queue.back_off(&1);
        queue.done(&1, Some(wait));
        let began = Instant::now();
        for _ in 0..10 {
            queue.enqueue(1);
        }
        assert_eq!(next_within(&queue, 5).await, Some(1));
        assert_eq!(began.elapsed(), LEAST_BACK_OFF);
        queue.forget_failures(&1);
        queue.done(&1, None);
        queue.enqueue(1);
        assert_eq!(next_within(&queue, 1).await, Some(1), "all is well again");
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_nobody_does_is_told() {
        let queue = Queue::default();
        tokio::time::sleep(Duration::from_secs(1000)).await;
        assert_eq!(queue.stuck_for(Instant::now()), None, "idle is not stuck");
        queue.enqueue(1);
        queue.enqueue_after(2, Duration::from_secs(500));
        tokio::time::sleep(Duration::from_secs(70)).await;
        assert_eq!(queue.stuck_for(Instant::now()), Some(Duration::from_secs(70)));
        assert_eq!(next_within(&queue, 1).await, Some(1));
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(queue.stuck_for(Instant::now()).unwrap() >= Duration::from_secs(80), "it was taken, not done");
        queue.done(&1, None);
        assert_eq!(queue.stuck_for(Instant::now()), None);
    }
}
