//! The wall clock and durations in words.
//!
//! Waits and breaks are measured with [`tokio::time::Instant`], which tests can pause; the wall clock only dates
//! things that leave the process, and ends overrides that a person gave an hour of day.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// `duration` as people say it: `250 ms`, `1 s`, `1.5 s`, `2 min`.
pub fn in_words(duration: Duration) -> String {
    let ms = duration.as_millis();
    match ms {
        0..1_000 => format!("{ms} ms"),
        60_000.. if ms.is_multiple_of(60_000) => format!("{} min", ms / 60_000),
        _ if ms.is_multiple_of(1_000) => format!("{} s", ms / 1_000),
        _ => format!("{}.{} s", ms / 1_000, ms % 1_000 / 100),
    }
}

/// Whole milliseconds of `duration`; saturates.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(0, "0 ms")]
    #[case(250, "250 ms")]
    #[case(1_000, "1 s")]
    #[case(1_550, "1.5 s")]
    #[case(90_000, "90 s")]
    #[case(120_000, "2 min")]
    fn words(#[case] ms: u64, #[case] expected: &str) {
        assert_eq!(in_words(Duration::from_millis(ms)), expected);
    }
}
