//! Whether processes keep their memory over time.

use std::{collections::BTreeMap, time::Duration};

/// The memory at a time is the median of the readings within so much time before it.
const READINGS: Duration = Duration::from_secs(20);
/// How much more it may be in the end, in percent.
pub const MAX_GROWTH_PERCENT: u64 = 10;

/// Resident bytes of each process, each with the time since the start.
pub type Readings = BTreeMap<&'static str, Vec<(Duration, u64)>>;

/// Prints the memory of each process once it was `warm` and at the `end`; the answer is which have grown by more than
/// [`MAX_GROWTH_PERCENT`].
pub fn grown(readings: &Readings, warm: Duration, end: Duration) -> Vec<&'static str> {
    let first = format!("after {} min", warm.as_secs() / 60);
    println!("{:<16}{first:>14}{:>14}{:>12}", "MiB resident", "in the end", "change");
    let mut grown = Vec::new();
    for (process, all) in readings {
        let (first, last) = (median(all, warm), median(all, end));
        let change = i128::from(last) * 1_000 / i128::from(first.max(1)) - 1_000;
        println!(
            "{process:<16}{:>14.2}{:>14.2}{:>+10}.{} %",
            mebibytes(first),
            mebibytes(last),
            change / 10,
            change.abs() % 10
        );
        if last * 100 > first * (100 + MAX_GROWTH_PERCENT) {
            grown.push(*process);
        }
    }
    grown
}

/// The median of the readings in the time before `until`.
fn median(readings: &[(Duration, u64)], until: Duration) -> u64 {
    let within = |(at, _): &&(Duration, u64)| *at <= until && *at + READINGS > until;
    let mut bytes: Vec<u64> = readings.iter().filter(within).map(|(_, bytes)| *bytes).collect();
    bytes.sort_unstable();
    bytes.get(bytes.len() / 2).copied().unwrap_or_default()
}

/// For people to read.
#[expect(clippy::cast_precision_loss, reason = "a memory is far below 2^52 bytes")]
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_may_grow_by_a_tenth_and_no_more() {
        let grown = |last: u64| {
            let at = |second: u64| (Duration::from_secs(second), if second > 300 { last } else { 1_000_000 });
            let readings = Readings::from([("booking", (0..300).map(|nth| at(nth * 2)).collect())]);
            super::grown(&readings, Duration::from_secs(60), Duration::from_secs(600))
        };
        assert!(grown(1_100_000).is_empty());
        assert!(grown(500_000).is_empty());
        assert_eq!(grown(1_100_001), ["booking"]);
    }
}
