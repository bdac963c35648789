//! Counters over a sliding window of time, in constant memory and constant time per call, without a lock.

use crate::stripes::Striped;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Slices of a window. A count leaves the window at most one slice late.
const SLICES: usize = 10;
/// The same, as numbers of slices are counted.
const RING: u64 = SLICES as u64;
/// Bits of a word that hold its count; the others hold the number of the slice that it belongs to. A slice of a day's
/// window holds billions of calls, and the numbers of the shortest slices repeat after 31 days.
const COUNT_BITS: u32 = 36;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;

/// What is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls.
    pub calls: u64,
    /// Calls that failed; of a retry budget: retries.
    pub failures: u64,
    /// Calls that were slow.
    pub slow: u64,
}

type Slice = [AtomicU64; 3];

/// Sums over the last `length` of time.
///
/// Adding and reading go side by side. What is added while the window is cleared or gets another length may be lost
/// or counted twice: a few calls of many, once per change.
#[derive(Debug)]
pub struct Window {
    start: Instant,
    slice_ns: AtomicU64,
    stripes: Striped<[Slice; SLICES]>,
}

impl Window {
    /// An empty window; lengths below 100 ms count as 100 ms.
    pub fn new(length: Duration, now: Instant) -> Self {
        Self { start: now, slice_ns: AtomicU64::new(slice_of(length)), stripes: Striped::default() }
    }

    /// Adds `counts` at `now`.
    #[inline]
    pub fn record(&self, counts: Counts, now: Instant) {
        let number = self.slice_at(now);
        let slice = &self.stripes.mine()[index_of(number)];
        for (word, count) in slice.iter().zip([counts.calls, counts.failures, counts.slow]) {
            if count > 0 {
                add(word, number, count);
            }
        }
    }

    /// Everything within the window that ends at `now`.
    pub fn sum(&self, now: Instant) -> Counts {
        let newest = self.slice_at(now);
        let mut sums = [0; 3];
        for slice in self.stripes.all().flatten() {
            for (sum, word) in sums.iter_mut().zip(slice) {
                let word = word.load(Ordering::Relaxed);
                if is_within(newest, word) {
                    *sum += word & COUNT_MASK;
                }
            }
        }
        let [calls, failures, slow] = sums;
        Counts { calls, failures, slow }
    }

    /// Changes the length. What the old window holds is kept, as if it had happened now.
    pub fn set_length(&self, length: Duration, now: Instant) {
        if slice_of(length) != self.slice_ns.load(Ordering::Relaxed) {
            let held = self.sum(now);
            self.clear();
            self.slice_ns.store(slice_of(length), Ordering::Relaxed);
            self.record(held, now);
        }
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for word in self.stripes.all().flatten().flatten() {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// The number of the slice that `now` is in.
    #[inline]
    fn slice_at(&self, now: Instant) -> u64 {
        let passed = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        // From one ring on, so that an untouched word is older than any window.
        passed / self.slice_ns.load(Ordering::Relaxed) + RING
    }
}

/// Where a slice is kept.
#[inline]
fn index_of(number: u64) -> usize {
    (number % RING) as usize
}

/// Whether `word` belongs to slice `newest` or to one of those just before it. Numbers repeat; only distances count.
fn is_within(newest: u64, word: u64) -> bool {
    (newest << COUNT_BITS).wrapping_sub(word & !COUNT_MASK) >> COUNT_BITS < RING
}

#[inline]
fn add(word: &AtomicU64, number: u64, count: u64) {
    let tag = number << COUNT_BITS;
    let mut seen = word.load(Ordering::Relaxed);
    loop {
        if seen & !COUNT_MASK == tag {
            word.fetch_add(count, Ordering::Relaxed);
            return;
        }
        // A thread that slept for longer than the window must not wipe out what is newer than its call.
        if is_within(number + RING, seen) && seen != 0 {
            return;
        }
        match word.compare_exchange_weak(seen, tag | count, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return,
            Err(now) => seen = now,
        }
    }
}

/// A slice of a window of this length, in nanoseconds.
fn slice_of(length: Duration) -> u64 {
    // A day is far more than any policy allows, and keeps the arithmetic away from its bounds.
    let length = length.clamp(Duration::from_millis(100), Duration::from_secs(86_400));
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX) / RING
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: Counts = Counts { calls: 1, failures: 0, slow: 0 };

    proptest! {
        /// Against the obvious implementation: a call counts for the length of the window, give or take one slice.
        #[test]
        fn counts_what_happened_within_its_length(gaps in proptest::collection::vec(0u64..400, 1..200)) {
            let start = Instant::now();
            let length = Duration::from_secs(1);
            let window = Window::new(length, start);
            let mut now = start;
            let mut calls = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                window.record(ONE, now);
                calls.push(now);
                let younger = |age: Duration| calls.iter().filter(|at| now - **at < age).count() as u64;
                let sum = window.sum(now).calls;
                prop_assert!(younger(length * 9 / 10) <= sum && sum <= younger(length), "{sum}");
            }
        }
    }

    #[test]
    fn a_new_length_keeps_what_was_counted() {
        let start = Instant::now();
        let window = Window::new(Duration::from_secs(10), start);
        window.record(Counts { calls: 7, failures: 3, slow: 1 }, start);
        window.set_length(Duration::from_secs(60), start);
        assert_eq!(window.sum(start + Duration::from_secs(30)), Counts { calls: 7, failures: 3, slow: 1 });
        assert_eq!(window.sum(start + Duration::from_secs(61)), Counts::default());
    }

    #[test]
    fn threads_do_not_lose_each_others_calls() {
        let start = Instant::now();
        let window = Window::new(Duration::from_secs(60), start);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1_000).for_each(|_| window.record(ONE, start)));
            }
        });
        assert_eq!(window.sum(start).calls, 4_000);
        window.clear();
        assert_eq!(window.sum(start), Counts::default());
    }
}
