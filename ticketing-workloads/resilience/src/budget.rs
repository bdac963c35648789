//! The retry budget: retries as a share of the calls within a sliding window, so that a dependency in trouble is not
//! buried under its callers' retries.

use crate::lock;
use crate::window::{Counts, Window};
use contract::RetryBudgetSettings;
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Counts calls and retries of one dependency.
pub struct RetryBudget {
    window: Mutex<Window>,
}

impl RetryBudget {
    /// An unused budget.
    pub fn new() -> Self {
        Self { window: Mutex::new(Window::new(Duration::from_secs(10), Instant::now())) }
    }

    /// Takes new settings; what was counted is kept.
    pub fn configure(&self, settings: Option<&RetryBudgetSettings>) {
        if let Some(settings) = settings {
            lock(&self.window).set_length(Duration::from_millis(settings.interval_ms), Instant::now());
        }
    }

    /// Notes a call.
    pub fn record_call(&self) {
        lock(&self.window).record(Counts { calls: 1, ..Counts::default() }, Instant::now());
    }

    /// Takes one retry from the budget; `false`: it is used up. Without settings there is no bound.
    pub fn take_retry(&self, settings: Option<&RetryBudgetSettings>) -> bool {
        let now = Instant::now();
        let mut window = lock(&self.window);
        if let Some(settings) = settings {
            let sum = window.sum(now);
            let allowed = (sum.calls * u64::from(settings.percent) / 100).max(settings.min_retries.into());
            if sum.failures >= allowed {
                return false;
            }
        }
        window.record(Counts { failures: 1, ..Counts::default() }, now);
        true
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

    #[tokio::test(start_paused = true)]
    async fn retries_are_a_share_of_the_calls() {
        let settings = RetryBudgetSettings { percent: 20, interval_ms: 10_000, min_retries: 3 };
        let budget = RetryBudget::new();
        budget.configure(Some(&settings));
        let granted = |tries: u32| (0..tries).filter(|_| budget.take_retry(Some(&settings))).count();
        assert_eq!(granted(10), 3, "a quiet service may retry too");
        (0..100).for_each(|_| budget.record_call());
        assert_eq!(granted(100), 17, "20 % of 100 calls, 3 of them used");
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(granted(10), 3, "the window moved on");
    }
}
