//! Counters that many threads may add to at once without waiting for each other.
//!
//! One shared word costs every thread a cache miss per call. So each counter is there several times, each thread adds
//! to its own copy, and a reader adds them up.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Copies of each counter: enough for the cores of a pod.
pub const STRIPES: usize = 8;

/// A value alone on its cache lines; two of 64 bytes, as processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Alone<T>(pub T);

/// A value per stripe.
#[derive(Debug, Default)]
pub struct Striped<T>([Alone<T>; STRIPES]);

impl<T> Striped<T> {
    /// The value of this thread's stripe.
    #[inline]
    pub fn mine(&self) -> &T {
        &self.0[stripe()].0
    }

    /// The values of all stripes.
    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|alone| &alone.0)
    }
}

/// `N` counters.
#[derive(Debug)]
pub struct Counters<const N: usize>(Striped<[AtomicU64; N]>);

impl<const N: usize> Default for Counters<N> {
    fn default() -> Self {
        let zeros = || Alone(std::array::from_fn(|_| AtomicU64::new(0)));
        Self(Striped(std::array::from_fn(|_| zeros())))
    }
}

impl<const N: usize> Counters<N> {
    /// Adds one to counter `index`.
    #[inline]
    pub fn add(&self, index: usize) {
        self.0.mine()[index].fetch_add(1, Ordering::Relaxed);
    }

    /// What counter `index` has come to.
    pub fn get(&self, index: usize) -> u64 {
        self.0.all().map(|counters| counters[index].load(Ordering::Relaxed)).sum()
    }
}

/// The stripe of this thread.
#[inline]
fn stripe() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
    MINE.with(|mine| *mine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_lost_between_threads() {
        let counters = Counters::<2>::default();
        std::thread::scope(|scope| {
            for _ in 0..STRIPES + 2 {
                scope.spawn(|| (0..1_000).for_each(|_| counters.add(1)));
            }
        });
        assert_eq!((counters.get(0), counters.get(1)), (0, 1_000 * (STRIPES as u64 + 2)));
    }
}
