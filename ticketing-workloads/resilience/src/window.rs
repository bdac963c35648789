//! Counters over a sliding window of time, in constant memory and constant time per call.

use std::time::Duration;
use tokio::time::Instant;

/// Slices of a window. A count leaves the window at most one slice late.
const SLICES: usize = 10;

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

impl Counts {
    fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.failures += other.failures;
        self.slow += other.slow;
    }

    fn subtract(&mut self, other: Self) {
        self.calls -= other.calls;
        self.failures -= other.failures;
        self.slow -= other.slow;
    }
}

/// Sums over the last `length` of time.
#[derive(Debug)]
pub struct Window {
    slice: Duration,
    slices: [Counts; SLICES],
    newest: usize,
    newest_start: Instant,
    sum: Counts,
}

impl Window {
    /// An empty window; lengths below 100 ms count as 100 ms.
    pub fn new(length: Duration, now: Instant) -> Self {
        let slice = slice_of(length);
        Self { slice, slices: [Counts::default(); SLICES], newest: 0, newest_start: now, sum: Counts::default() }
    }

    /// Adds `counts` at `now`.
    pub fn record(&mut self, counts: Counts, now: Instant) {
        self.slide(now);
        self.slices[self.newest].add(counts);
        self.sum.add(counts);
    }

    /// Everything within the window that ends at `now`.
    pub fn sum(&mut self, now: Instant) -> Counts {
        self.slide(now);
        self.sum
    }

    /// Changes the length. What the old window holds is kept, as if it had happened now.
    pub fn set_length(&mut self, length: Duration, now: Instant) {
        if slice_of(length) != self.slice {
            let held = self.sum(now);
            *self = Self::new(length, now);
            self.record(held, now);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self, now: Instant) {
        self.slices = [Counts::default(); SLICES];
        self.sum = Counts::default();
        self.newest_start = now;
    }

    fn slide(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.newest_start).as_nanos() / self.slice.as_nanos();
        if passed >= SLICES as u128 {
            self.clear(now);
            return;
        }
        for _ in 0..passed {
            self.newest = (self.newest + 1) % SLICES;
            self.newest_start += self.slice;
            self.sum.subtract(self.slices[self.newest]);
            self.slices[self.newest] = Counts::default();
        }
    }
}

fn slice_of(length: Duration) -> Duration {
    // A day is far more than any policy allows, and keeps the arithmetic away from its bounds.
    length.clamp(Duration::from_millis(100), Duration::from_secs(86_400)) / 10
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
            let mut window = Window::new(length, start);
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
        let mut window = Window::new(Duration::from_secs(10), start);
        window.record(Counts { calls: 7, failures: 3, slow: 1 }, start);
        window.set_length(Duration::from_secs(60), start);
        assert_eq!(window.sum(start + Duration::from_secs(30)), Counts { calls: 7, failures: 3, slow: 1 });
        assert_eq!(window.sum(start + Duration::from_secs(61)), Counts::default());
    }
}
