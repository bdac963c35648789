//! When to try again, and how long to wait before it (ADR-007 §1).

use crate::failure::FailureKind;
use contract::{RetryBudgetSettings, RetrySettings};
use std::time::Duration;

/// A budget for calls between services: a fifth of the calls, as in Gateway API's `retryConstraint`, and ten in ten seconds
/// for a quiet one.
pub const BUDGET: RetryBudgetSettings = contract::defaults::RETRY_BUDGET;

/// The wait before retry number `retry` (from 1). `random` in `0.0..1.0` shortens it by up to the jitter.
#[expect(clippy::cast_precision_loss, reason = "waits are far below 2^52 ms")]
pub fn wait(settings: &RetrySettings, retry: u32, random: f64) -> Duration {
    let share = f64::from(settings.jitter_percent.min(100)) / 100.0 * random.clamp(0.0, 1.0);
    Duration::try_from_secs_f64(settings.wait_ms(retry) as f64 / 1_000.0 * (1.0 - share)).unwrap_or_default()
}

/// How long to wait before another attempt; `None`: give up. `attempts` were made, the last one failed with `kind`.
pub fn next(settings: &RetrySettings, kind: FailureKind, attempts: u32, random: f64) -> Option<Duration> {
    (attempts <= settings.num_retries && kind.is_retried(settings)).then(|| wait(settings, attempts, random))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn jitter_only_shortens_and_never_by_more_than_its_share(
            base in 0u64..100_000, factor in 0.0f64..10.0, max in 0u64..100_000, jitter in 0u32..150, retry in 1u32..40, random in 0.0f64..1.0,
        ) {
            let settings = RetrySettings {
                base_interval_ms: base, factor, max_interval_ms: max, jitter_percent: jitter, ..Default::default()
            };
            let full = Duration::from_millis(settings.wait_ms(retry));
            let least = full.mul_f64(1.0 - f64::from(jitter.min(100)) / 100.0);
            let wait = wait(&settings, retry, random);
            let rounding = Duration::from_micros(1);
            prop_assert!(wait <= full && wait + rounding >= least, "{wait:?} of {full:?}");
        }
    }

    #[test]
    fn waits_are_the_adrs_for_the_database() {
        let settings = RetrySettings { base_interval_ms: 200, num_retries: 3, ..Default::default() };
        let waits = (1..=4).map(|attempts| next(&settings, FailureKind::Timeout, attempts, 0.0));
        let ms = |ms| Some(Duration::from_millis(ms));
        assert_eq!(waits.collect::<Vec<_>>(), [ms(200), ms(400), ms(800), None]);
    }
}
