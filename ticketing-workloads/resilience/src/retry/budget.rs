//! The retry budget: retries as a share of the calls within a sliding window, so that a dependency in trouble is not
//! buried under its callers' retries.
//!
//! Calls are not counted here: the circuit breaker counts them. The budget reads that counter when it is asked for a
//! retry, and from time to time in between ([`RetryBudget::update`]), and takes what came since the last look as spread
//! evenly over the time between.

use crate::sync::lock;
use crate::window::{Counts, Window};
use contract::RetryBudgetSettings;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Counts retries of one dependency.
pub struct RetryBudget {
    inner: Mutex<Inner>,
}

struct Inner {
    length: Duration,
    window: Window,
    seen: u64,
    seen_at: Instant,
    retries: u64,
    refused: u64,
}

impl RetryBudget {
    /// An unused budget.
    pub fn new() -> Self {
        let (length, now) = (Duration::from_secs(10), Instant::now());
        let window = Window::new(length, now);
        Self { inner: Mutex::new(Inner { length, window, seen: 0, seen_at: now, retries: 0, refused: 0 }) }
    }

    /// Takes new settings; what was counted is kept.
    pub fn configure(&self, settings: Option<&RetryBudgetSettings>) {
        if let Some(settings) = settings {
            let mut inner = lock(&self.inner);
            inner.length = Duration::from_millis(settings.interval_ms.max(1));
            inner.window.set_length(inner.length, Instant::now());
        }
    }

    /// Notes the calls made so far, retries not among them; `attempts` counts both.
    pub fn update(&self, attempts: u64) {
        lock(&self.inner).update(attempts, Instant::now());
    }

    /// Whether there is a retry in the budget. `attempts` as of [`RetryBudget::take_retry`].
    pub fn has_retry(&self, settings: Option<&RetryBudgetSettings>, attempts: u64) -> bool {
        lock(&self.inner).has_retry(settings, attempts, Instant::now())
    }

    /// Takes one retry from the budget; `false`: it is used up. Without settings there is no bound. `attempts` is how
    /// many attempts were made so far.
    pub fn take_retry(&self, settings: Option<&RetryBudgetSettings>, attempts: u64) -> bool {
        let now = Instant::now();
        let mut inner = lock(&self.inner);
        if !inner.has_retry(settings, attempts, now) {
            inner.refused += 1;
            return false;
        }
        inner.retries += 1;
        inner.window.record(Counts { failures: 1, ..Counts::default() }, now);
        true
    }

    /// Retries that the budget refused so far.
    pub fn refused(&self) -> u64 {
        lock(&self.inner).refused
    }
}

impl Inner {
    fn has_retry(&mut self, settings: Option<&RetryBudgetSettings>, attempts: u64, now: Instant) -> bool {
        self.update(attempts, now);
        settings.is_none_or(|settings| {
            let sum = self.window.sum(now);
            let allowed = (sum.calls * u64::from(settings.percent) / 100).max(settings.min_retries.into());
            sum.failures < allowed
        })
    }

    fn update(&mut self, attempts: u64, now: Instant) {
        let calls = attempts.saturating_sub(self.retries);
        let new = calls.saturating_sub(self.seen);
        let passed = now.saturating_duration_since(self.seen_at);
        self.seen = self.seen.max(calls);
        self.seen_at = now;
        // Of a longer time, only what fell into the window counts.
        let share = if passed > self.length {
            u128::from(new) * self.length.as_nanos() / passed.as_nanos()
        } else {
            new.into()
        };
        self.window.record(Counts { calls: u64::try_from(share).unwrap_or(u64::MAX), ..Counts::default() }, now);
    }
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: RetryBudgetSettings = RetryBudgetSettings { percent: 20, interval_ms: 10_000, min_retries: 3 };

    /// Asks `tries` times; an attempt is made for each retry that is granted.
    fn granted(budget: &RetryBudget, tries: u32, attempts: &mut u64) -> usize {
        (0..tries)
            .filter(|_| {
                let granted = budget.take_retry(Some(&SETTINGS), *attempts);
                *attempts += u64::from(granted);
                granted
            })
            .count()
    }

    #[tokio::test(start_paused = true)]
    async fn retries_are_a_share_of_the_calls() {
        let budget = RetryBudget::new();
        budget.configure(Some(&SETTINGS));
        let mut attempts = 0;
        assert_eq!(granted(&budget, 10, &mut attempts), 3, "a quiet service may retry too");
        attempts += 100;
        assert_eq!(granted(&budget, 100, &mut attempts), 17, "20 % of 100 calls, 3 of them used");
        assert_eq!(budget.refused(), 7 + 83);
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(granted(&budget, 10, &mut attempts), 3, "the window moved on");
    }

    #[tokio::test(start_paused = true)]
    async fn an_hour_of_good_calls_is_no_credit_for_a_storm_of_retries() {
        let budget = RetryBudget::new();
        budget.configure(Some(&SETTINGS));
        tokio::time::advance(Duration::from_secs(3_600)).await;
        let mut attempts = 36_000;
        assert_eq!(granted(&budget, 1_000, &mut attempts), 20, "20 % of the 100 calls of ten seconds");
    }
}
