//! Load, and the degraded mode that a high load puts the workload in (ADR-007 §5).

use crate::sync::lock;
use contract::{DegradationSettings, LoadReport};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How busy the workload is: requests under way against its capacity.
#[derive(Debug)]
pub struct Load {
    in_flight: AtomicU32,
    capacity: AtomicU32,
}

impl Default for Load {
    fn default() -> Self {
        Self { in_flight: AtomicU32::new(0), capacity: AtomicU32::new(u32::MAX) }
    }
}

impl Load {
    /// Takes a place among `capacity` requests at once; `None`: all are taken.
    pub fn enter(&self, capacity: u32) -> Option<InFlight<'_>> {
        self.enter_beyond(capacity, 0)
    }

    /// The same where there are so many places `more` for this request, and for others like it. They are no part of the
    /// capacity: with them, the load may be above 100 %.
    pub fn enter_beyond(&self, capacity: u32, more: u32) -> Option<InFlight<'_>> {
        self.capacity.store(capacity, Ordering::Relaxed);
        let before = self.in_flight.fetch_add(1, Ordering::AcqRel);
        let place = InFlight(self);
        (before < capacity.saturating_add(more)).then_some(place)
    }

    /// The figures for the health report.
    pub fn report(&self) -> LoadReport {
        let in_flight = self.in_flight.load(Ordering::Acquire);
        let capacity = u64::from(self.capacity.load(Ordering::Relaxed).max(1));
        let percent = u32::try_from(u64::from(in_flight) * 100 / capacity).unwrap_or(u32::MAX);
        LoadReport { in_flight, percent }
    }
}

/// A request under way; ends when dropped.
pub struct InFlight<'a>(&'a Load);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Whether the workload is degraded, with hysteresis.
#[derive(Debug, Default)]
pub struct Degradation {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    degraded: bool,
    /// Since when the load has been on the side that would change the state.
    beyond_since: Option<Instant>,
}

impl Degradation {
    /// Takes a reading of the load; the answer is whether the workload is degraded now.
    pub fn observe(&self, settings: Option<&DegradationSettings>, load_percent: u32) -> bool {
        let mut inner = lock(&self.inner);
        let Some(settings) = settings else {
            *inner = Inner::default();
            return false;
        };
        let now = Instant::now();
        let (beyond, needed_ms) = if inner.degraded {
            (load_percent < settings.exit_load_percent, settings.exit_for_ms)
        } else {
            (load_percent >= settings.enter_load_percent, settings.enter_for_ms)
        };
        if !beyond {
            inner.beyond_since = None;
        } else if now - *inner.beyond_since.get_or_insert(now) >= Duration::from_millis(needed_ms) {
            *inner = Inner { degraded: !inner.degraded, beyond_since: None };
        }
        inner.degraded
    }

    /// Whether the workload is degraded.
    pub fn is_active(&self) -> bool {
        lock(&self.inner).degraded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn enters_and_leaves_only_after_a_while() {
        let settings = DegradationSettings {
            enter_load_percent: 80,
            enter_for_ms: 10_000,
            exit_load_percent: 60,
            exit_for_ms: 60_000,
            flag_overrides: std::collections::BTreeMap::new(),
        };
        let degradation = Degradation::default();
        let at = |seconds: u64, load| {
            let degradation = &degradation;
            let settings = &settings;
            async move {
                tokio::time::advance(Duration::from_secs(seconds)).await;
                degradation.observe(Some(settings), load)
            }
        };
        assert!(!at(0, 90).await);
        assert!(!at(9, 79).await, "a dip starts the time over");
        assert!(!at(1, 90).await);
        assert!(at(10, 90).await);
        assert!(at(60, 70).await, "between the limits nothing changes");
        assert!(at(1, 59).await);
        assert!(!at(60, 59).await);
        assert!(!degradation.observe(None, 100), "without settings: never");
    }

    #[test]
    fn load_is_bounded_and_comes_back() {
        let load = Load::default();
        let first = load.enter(2);
        let second = load.enter(2);
        assert!(first.is_some() && second.is_some());
        assert!(load.enter(2).is_none());
        assert_eq!(load.report(), LoadReport { in_flight: 2, percent: 100 });
        let third = load.enter_beyond(2, 1);
        assert!(third.is_some() && load.enter_beyond(2, 1).is_none(), "one more, for what is to be finished");
        assert_eq!(load.report(), LoadReport { in_flight: 3, percent: 150 });
        drop((first, second, third));
        assert_eq!(load.report(), LoadReport { in_flight: 0, percent: 0 });
    }
}
