//! Load, and the degraded mode that a high load puts the workload in (ADR-007 §5).

use crate::bulkhead::Usage;
use crate::sync::lock;
use contract::{DegradationSettings, DegradationStage, LoadReport};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Longest name of what the load that counts is the load of, in bytes.
const MAX_CAUSE_BYTES: usize = 96;

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

    /// How many requests are under way, for the health report.
    pub fn report(&self) -> LoadReport {
        let in_flight = self.in_flight.load(Ordering::Acquire);
        let capacity = u64::from(self.capacity.load(Ordering::Relaxed).max(1));
        let percent = u32::try_from(u64::from(in_flight) * 100 / capacity).unwrap_or(u32::MAX);
        LoadReport { in_flight, percent, ..LoadReport::default() }
    }
}

/// A request under way; ends when dropped.
pub struct InFlight<'a>(&'a Load);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Adds to what requests say of the load what each bulkhead says, and which of it counts.
pub(crate) fn with_bulkheads(mut load: LoadReport, bulkheads: &[(String, Usage)]) -> LoadReport {
    let mut worst = (load.percent, "requests".to_owned());
    let mut note = |percent: u32, what: &str, name: &str| {
        if percent > worst.0 {
            worst = (percent, format!("{what} {name}"));
        }
    };
    for (name, usage) in bulkheads {
        note(usage.percent(), "bulkhead", name);
        note(usage.queue_percent(), "queue", name);
    }
    let all = || bulkheads.iter().map(|(_, usage)| usage);
    load.bulkhead_percent = all().map(Usage::percent).max();
    load.queue_percent = all().map(Usage::queue_percent).max();
    load.oldest_queued_ms = all().map(|usage| crate::clock::millis(usage.oldest)).max();
    load.limit_percent = all().filter_map(Usage::limit_percent).min();
    load.worst_percent = Some(worst.0);
    worst.1.truncate(worst.1.floor_char_boundary(MAX_CAUSE_BYTES));
    load.cause = worst.1;
    load
}

/// In how many of its stages the workload is, with hysteresis: it enters and leaves them one by one.
#[derive(Debug, Default)]
pub struct Degradation {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    level: usize,
    /// Since when the load has been on the side that would change the state, and whether that is the higher one.
    beyond_since: Option<(bool, Instant)>,
}

impl Degradation {
    /// Takes a reading of the load; the answer is the number of stages that the workload is in now.
    pub fn observe(
        &self,
        settings: Option<&DegradationSettings>,
        stages: &[DegradationStage],
        load_percent: u32,
    ) -> usize {
        let mut inner = lock(&self.inner);
        let Some(settings) = settings else {
            *inner = Inner::default();
            return 0;
        };
        if inner.level > stages.len() {
            // There are fewer of them now.
            *inner = Inner { level: stages.len(), beyond_since: None };
        }
        let now = Instant::now();
        let next = stages.get(inner.level).is_some_and(|next| load_percent >= next.load_percent);
        let below = inner.level.checked_sub(1).and_then(|last| stages.get(last));
        let below = below.is_some_and(|last| load_percent < last.exit_load_percent);
        // A stage ends below the load at which the next one begins, so it is never both.
        let (beyond, needed_ms) = if next { (true, settings.enter_for_ms) } else { (below, settings.exit_for_ms) };
        if !beyond {
            inner.beyond_since = None;
            return inner.level;
        }
        // What was on its way up is not on its way down.
        let since = inner.beyond_since.filter(|(up, _)| *up == next).map_or(now, |(_, since)| since);
        if now - since >= Duration::from_millis(needed_ms) {
            let level = if next { inner.level + 1 } else { inner.level.saturating_sub(1) };
            *inner = Inner { level, beyond_since: None };
        } else {
            inner.beyond_since = Some((next, since));
        }
        inner.level
    }

    /// Whether the workload is degraded.
    pub fn is_active(&self) -> bool {
        lock(&self.inner).level > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> DegradationSettings {
        DegradationSettings {
            enter_load_percent: 80,
            enter_for_ms: 10_000,
            exit_load_percent: 60,
            exit_for_ms: 60_000,
            ..DegradationSettings::never()
        }
    }

    /// What comes of loads, each read so many seconds after the one before it.
    async fn levels(settings: &DegradationSettings, readings: &[(u64, u32)]) -> Vec<usize> {
        let (degradation, stages) = (Degradation::default(), settings.all_stages());
        let mut levels = Vec::new();
        for (seconds, load) in readings {
            tokio::time::advance(Duration::from_secs(*seconds)).await;
            levels.push(degradation.observe(Some(settings), &stages, *load));
            assert_eq!(degradation.is_active(), levels.last() != Some(&0));
        }
        assert_eq!(degradation.observe(None, &stages, 100), 0, "without settings: never");
        levels
    }

    #[tokio::test(start_paused = true)]
    async fn enters_and_leaves_only_after_a_while() {
        // A dip starts the time over; between the limits nothing changes.
        let readings = [(0, 90), (9, 79), (1, 90), (10, 90), (60, 70), (1, 59), (60, 59)];
        assert_eq!(levels(&settings(), &readings).await, [0, 0, 0, 1, 1, 1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn stages_are_entered_and_left_one_by_one() {
        let stage = |name: &str, load_percent: u32| DegradationStage {
            name: name.into(),
            load_percent,
            exit_load_percent: load_percent - 20,
            flag_overrides: std::collections::BTreeMap::new(),
        };
        let settings = DegradationSettings { stages: vec![stage("mail", 80), stage("cache", 90)], ..settings() };
        let readings = [(0, 99), (10, 99), (1, 99), (10, 99), (10, 99), (1, 75), (60, 69), (60, 65), (1, 50), (60, 50)];
        assert_eq!(levels(&settings, &readings).await, [0, 1, 1, 2, 2, 2, 2, 1, 1, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_begins_never_begins() {
        assert_eq!(levels(&DegradationSettings::never(), &[(0, 90_000), (60, u32::MAX)]).await, [0, 0]);
    }

    #[test]
    fn the_worst_of_requests_and_bulkheads_counts_and_is_named() {
        let usage = Usage { in_use: 10, limits: [10; 3], max_queued: 10, ..Usage::default() };
        let waits = Usage { queued: 1, oldest: Duration::from_millis(900), max_wait: Duration::from_secs(1), ..usage };
        let limited = Usage { less_important: 9, held_back: Some(2), ..usage };
        let of = |usage: &Usage| {
            let load = LoadReport { in_flight: 1, percent: 40, ..LoadReport::default() };
            with_bulkheads(load, &[("idle".to_owned(), Usage::default()), ("critical".to_owned(), *usage)])
        };
        let worst = |usage: &Usage| {
            let load = of(usage);
            assert_eq!((load.in_flight, load.percent), (1, 40), "requests are reported as before");
            (load.counts(), load.cause)
        };
        assert_eq!(worst(&Usage::default()), (40, "requests".to_owned()));
        assert_eq!(worst(&usage), (50, "bulkhead critical".to_owned()));
        assert_eq!(worst(&waits), (90, "queue critical".to_owned()));
        assert_eq!(worst(&limited), (75, "bulkhead critical".to_owned()), "9 of the 12 that may be inside or wait");
        assert_eq!((of(&limited).limit_percent, of(&usage).limit_percent), (Some(20), None));
        assert_eq!((of(&waits).oldest_queued_ms, of(&waits).bulkhead_percent), (Some(900), Some(55)));
    }

    #[test]
    fn load_is_bounded_and_comes_back() {
        let load = Load::default();
        let first = load.enter(2);
        let second = load.enter(2);
        assert!(first.is_some() && second.is_some());
        assert!(load.enter(2).is_none());
        assert_eq!(load.report(), LoadReport { in_flight: 2, percent: 100, ..LoadReport::default() });
        let third = load.enter_beyond(2, 1);
        assert!(third.is_some() && load.enter_beyond(2, 1).is_none(), "one more, for what is to be finished");
        assert_eq!(load.report(), LoadReport { in_flight: 3, percent: 150, ..LoadReport::default() });
        drop((first, second, third));
        assert_eq!(load.report(), LoadReport { in_flight: 0, percent: 0, ..LoadReport::default() });
    }
}
