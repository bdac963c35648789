//! The floors: the least code that does the job, written by hand for this one job, with nothing to configure.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const STRIPES: usize = 8;
const SLICES: u64 = 10;
const SLICE_NS: u64 = 3_000_000_000;
const SLOW: Duration = Duration::from_secs(5);
const BREAK: Duration = Duration::from_secs(30);

/// Counts of one slice: its number, then calls, failures and slow calls in it.
#[derive(Default)]
struct Slice {
    number: AtomicU64,
    calls: AtomicU64,
    failures: AtomicU64,
    slow: AtomicU64,
}

#[derive(Default)]
#[repr(align(128))]
struct Stripe([Slice; SLICES as usize]);

/// A minimal circuit breaker: failure ratio and slow calls over a sliding window, one trial at a time after a break,
/// and results from before a change of state ignored. Opens at half of at least ten calls. No metrics.
pub struct FloorBreaker {
    start: Instant,
    /// The generation; even while closed.
    generation: AtomicU64,
    opened_ns: AtomicU64,
    trials: AtomicU32,
    stripes: [Stripe; STRIPES],
}

/// Leave to make one call.
#[derive(Clone, Copy)]
pub struct FloorPermit {
    generation: u64,
    started: Instant,
}

impl FloorBreaker {
    pub fn leaked() -> &'static Self {
        Box::leak(Box::new(Self {
            start: Instant::now(),
            generation: AtomicU64::new(0),
            opened_ns: AtomicU64::new(0),
            trials: AtomicU32::new(0),
            stripes: Default::default(),
        }))
    }

    #[inline]
    pub fn acquire(&self) -> Option<FloorPermit> {
        let generation = self.generation.load(Ordering::Acquire);
        let started = Instant::now();
        if generation % 2 == 1 {
            let open_for = self.ns(started) - self.opened_ns.load(Ordering::Relaxed);
            if open_for < BREAK.as_nanos() as u64 || self.trials.fetch_add(1, Ordering::AcqRel) > 0 {
                return None;
            }
        }
        Some(FloorPermit { generation, started })
    }

    #[inline]
    pub fn finish(&self, permit: FloorPermit, failed: bool) {
        if self.generation.load(Ordering::Acquire) != permit.generation {
            return;
        }
        let now = Instant::now();
        let slow = now - permit.started >= SLOW;
        if permit.generation % 2 == 1 {
            return self.judge_trial(permit.generation, failed || slow, now);
        }
        let number = self.ns(now) / SLICE_NS + 1;
        let slice = &self.stripes[stripe()].0[(number % SLICES) as usize];
        if slice.number.load(Ordering::Relaxed) != number {
            slice.number.store(number, Ordering::Relaxed);
            slice.calls.store(0, Ordering::Relaxed);
            slice.failures.store(0, Ordering::Relaxed);
            slice.slow.store(0, Ordering::Relaxed);
        }
        slice.calls.fetch_add(1, Ordering::Relaxed);
        if failed || slow {
            if failed {
                slice.failures.fetch_add(1, Ordering::Relaxed);
            }
            if slow {
                slice.slow.fetch_add(1, Ordering::Relaxed);
            }
            self.judge(permit.generation, number, now);
        }
    }

    #[cold]
    fn judge(&self, generation: u64, number: u64, now: Instant) {
        let (mut calls, mut failures, mut slow) = (0, 0, 0);
        for slice in self.stripes.iter().flat_map(|stripe| &stripe.0) {
            if number - slice.number.load(Ordering::Relaxed) < SLICES {
                calls += slice.calls.load(Ordering::Relaxed);
                failures += slice.failures.load(Ordering::Relaxed);
                slow += slice.slow.load(Ordering::Relaxed);
            }
        }
        if calls >= 10 && 2 * failures.max(slow) >= calls {
            self.opened_ns.store(self.ns(now), Ordering::Relaxed);
            self.trials.store(0, Ordering::Relaxed);
            let _ = self.generation.compare_exchange(generation, generation + 1, Ordering::AcqRel, Ordering::Relaxed);
        }
    }

    #[cold]
    fn judge_trial(&self, generation: u64, failed: bool, now: Instant) {
        self.opened_ns.store(self.ns(now), Ordering::Relaxed);
        self.trials.store(0, Ordering::Relaxed);
        let next = generation + if failed { 2 } else { 1 };
        let _ = self.generation.compare_exchange(generation, next, Ordering::AcqRel, Ordering::Relaxed);
    }

    #[inline]
    fn ns(&self, now: Instant) -> u64 {
        (now - self.start).as_nanos() as u64
    }
}

#[inline]
fn stripe() -> usize {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    thread_local!(static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) as usize % STRIPES);
    MINE.with(|mine| *mine)
}

/// A minimal bulkhead: a count and a limit; it refuses rather than queues.
#[derive(Default)]
#[repr(align(128))]
pub struct FloorBulkhead(AtomicU32);

impl FloorBulkhead {
    #[inline]
    pub fn enter(&self) -> bool {
        if self.0.fetch_add(1, Ordering::Acquire) < 100 {
            return true;
        }
        self.0.fetch_sub(1, Ordering::Release);
        false
    }

    #[inline]
    pub fn leave(&self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Retry around breaker around bulkhead around the call, in one function, for one dependency.
pub struct Fused {
    breaker: &'static FloorBreaker,
    bulkhead: FloorBulkhead,
}

/// How the fused call fails.
#[derive(Debug)]
pub struct Refused;

impl Fused {
    pub fn leaked() -> &'static Self {
        Box::leak(Box::new(Self { breaker: FloorBreaker::leaked(), bulkhead: FloorBulkhead::default() }))
    }

    #[inline]
    pub async fn call<T, F: Future<Output = Result<T, Refused>>>(&self, call: impl Fn() -> F) -> Result<T, Refused> {
        let mut wait = Duration::from_millis(100);
        for _ in 0..3 {
            let permit = self.breaker.acquire().ok_or(Refused)?;
            if !self.bulkhead.enter() {
                return Err(Refused);
            }
            let result = call().await;
            self.bulkhead.leave();
            self.breaker.finish(permit, result.is_err());
            if result.is_ok() {
                return result;
            }
            tokio::time::sleep(wait).await;
            wait *= 2;
        }
        Err(Refused)
    }
}
