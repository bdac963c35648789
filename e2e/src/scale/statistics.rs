//! Percentiles of what was measured.

use std::fmt;
use std::time::Duration;

/// The smallest sample that at least `share` percent do not exceed (nearest rank); `sorted` is in ascending order.
pub fn percentile<T: Copy>(sorted: &[T], share: usize) -> Option<T> {
    let rank = (sorted.len() * share).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// How long something took, over many samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// How many samples.
    pub samples: usize,
    /// The fastest.
    pub min: Duration,
    /// The median.
    pub p50: Duration,
    /// 99 percent took at most this.
    pub p99: Duration,
    /// The slowest.
    pub max: Duration,
}

impl Spread {
    /// Of samples in any order; `None` without samples.
    pub fn of(mut samples: Vec<Duration>) -> Option<Self> {
        samples.sort_unstable();
        Some(Self {
            samples: samples.len(),
            min: *samples.first()?,
            p50: percentile(&samples, 50)?,
            p99: percentile(&samples, 99)?,
            max: *samples.last()?,
        })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [min, p50, p99, max] = [self.min, self.p50, self.p99, self.max].map(millis);
        write!(f, "{p50} / {p99} ms ({min}–{max}, n = {})", self.samples)
    }
}

/// Milliseconds with one decimal below 10, whole ones above.
pub fn millis(duration: Duration) -> String {
    let millis = duration.as_secs_f64() * 1_000.0;
    if millis < 10.0 { format!("{millis:.1}") } else { format!("{millis:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let sorted: Vec<u64> = (1..=200).collect();
        assert_eq!(
            [1, 50, 99, 100].map(|share| percentile(&sorted, share)),
            [Some(2), Some(100), Some(198), Some(200)]
        );
        assert_eq!(percentile(&[7], 99), Some(7));
        assert_eq!(percentile::<u64>(&[], 50), None);
    }

    #[test]
    fn a_spread_does_not_depend_on_the_order() {
        let spread = Spread::of(vec![ms(30), ms(1), ms(20), ms(10)]).unwrap();
        assert_eq!(spread, Spread { samples: 4, min: ms(1), p50: ms(10), p99: ms(30), max: ms(30) });
        assert_eq!(spread.to_string(), "10 / 30 ms (1.0–30, n = 4)");
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
