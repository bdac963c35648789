//! How often somebody may ask. What is remembered of all of them is bounded: of many more, those that have been quiet for
//! longest are forgotten first.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Those of one kind that are remembered, at most.
const MOST_REMEMBERED: usize = 65_536;

/// Whom a limit is for: a part of a hash.
pub type Who = [u8; 16];

/// So many requests in a second in the long run, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    per_second: f64,
    burst: u32,
}

/// A setting of a rate that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no limit: write requests per second and how many may come at once, such as 20:40; 0: no limit")]
pub struct UnknownRate(String);

/// What a setting allows; `None`: everything.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit(pub Option<Rate>);

impl FromStr for Limit {
    type Err = UnknownRate;

    fn from_str(text: &str) -> Result<Self, UnknownRate> {
        let wrong = || UnknownRate(text.to_owned());
        let (per_second, burst) = text.split_once(':').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
        let per_second: f64 = per_second.trim().parse().map_err(|_| wrong())?;
        if per_second == 0.0 {
            return Ok(Self(None));
        }
        if !(0.001..=1_000_000.0).contains(&per_second) {
            return Err(wrong());
        }
        let burst = match burst {
            Some(burst) => {
                burst.trim().parse().ok().filter(|burst| (1..=1_000_000).contains(burst)).ok_or_else(wrong)?
            }
            None => bounded(per_second * 2.0),
        };
        Ok(Self(Some(Rate { per_second, burst })))
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is between 1 and 2,000,000")]
fn bounded(burst: f64) -> u32 {
    burst.ceil().max(1.0) as u32
}

/// The requests of each of many, against one limit.
pub struct Buckets {
    limit: Limit,
    most: usize,
    remembered: Mutex<Remembered>,
}

/// When each of them would be back to nothing owed (GCRA, the leaky bucket as a time). In two halves: when the young one is
/// full, the old one, whose members have not asked since the last time, is forgotten.
#[derive(Default)]
struct Remembered {
    young: HashMap<Who, Instant>,
    old: HashMap<Who, Instant>,
}

impl Buckets {
    pub fn new(limit: Limit) -> Self {
        Self { limit, most: MOST_REMEMBERED, remembered: Mutex::default() }
    }

    /// One more request, now. `Err`: not yet, but after this time.
    pub fn take(&self, who: Who, now: Instant) -> Result<(), Duration> {
        let Some(Rate { per_second, burst }) = self.limit.0 else { return Ok(()) };
        let each = Duration::from_secs_f64(1.0 / per_second);
        let allowed = each * (burst - 1);
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        let Remembered { young, old } = &mut *remembered;
        let owed = young.get(&who).or_else(|| old.get(&who)).map_or(now, |owed| now.max(*owed));
        let ahead = owed.saturating_duration_since(now);
        let too_soon = ahead.saturating_sub(allowed);
        let taken = if too_soon.is_zero() { Ok(()) } else { Err(too_soon) };
        let owed = if taken.is_ok() { owed + each } else { owed };
        // Also one that is refused has asked.
        if young.len() >= self.most / 2 && !young.contains_key(&who) {
            *old = std::mem::take(young);
        }
        young.insert(who, owed);
        taken
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        let remembered = self.remembered.lock().unwrap();
        remembered.young.len() + remembered.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buckets(limit: &str, most: usize) -> Buckets {
        Buckets { most, ..Buckets::new(limit.parse().unwrap()) }
    }

    fn who(nth: u32) -> Who {
        let mut who = Who::default();
        who[..4].copy_from_slice(&nth.to_be_bytes());
        who
    }

    #[test]
    fn so_many_at_once_and_then_one_after_the_other() {
        let (buckets, begin) = (buckets("2:3", 100), Instant::now());
        let taken = |ms: u64| buckets.take(who(1), begin + Duration::from_millis(ms));
        assert_eq!([taken(0), taken(0), taken(0)], [Ok(()); 3]);
        assert_eq!(taken(0), Err(Duration::from_millis(500)));
        assert_eq!(taken(400), Err(Duration::from_millis(100)), "a refusal costs nothing");
        assert_eq!(taken(500), Ok(()));
        assert_eq!(taken(500), Err(Duration::from_millis(500)));
        assert_eq!(
            [taken(10_000), taken(10_000), taken(10_000)],
            [Ok(()); 3],
            "no more is saved up than may come at once"
        );
        assert!(taken(10_000).is_err());
        assert!(buckets.take(who(2), begin).is_ok(), "each has its own");
    }

    #[test]
    fn without_a_limit_nothing_is_remembered() {
        let buckets = buckets("0", 100);
        assert!((0..10_000).all(|_| buckets.take(who(1), Instant::now()).is_ok()));
        assert_eq!(buckets.len(), 0);
    }

    /// Somebody with many addresses has no more of our memory than anybody.
    #[test]
    fn of_many_those_that_are_quiet_are_forgotten_first() {
        let (buckets, now) = (buckets("0.001:1", 100), Instant::now());
        assert!(buckets.take(who(0), now).is_ok());
        assert!(buckets.take(who(1), now).is_ok());
        for nth in 2..10_000 {
            assert!(buckets.take(who(nth), now).is_ok());
            assert!(buckets.take(who(0), now).is_err(), "one that goes on asking is not forgotten");
            assert!(buckets.len() <= 100, "{}", buckets.len());
        }
        assert!(buckets.take(who(1), now).is_ok());
    }

    #[test]
    fn a_limit_is_read_as_it_is_written() {
        let rate = |per_second, burst| Limit(Some(Rate { per_second, burst }));
        for (text, limit) in
            [("20:40", rate(20.0, 40)), ("0.5", rate(0.5, 1)), ("5", rate(5.0, 10)), ("0", Limit(None))]
        {
            assert_eq!(text.parse::<Limit>().unwrap(), limit, "{text}");
        }
        for text in ["", "-1", "x", "5:0", "5:-1", "5:x", "inf", "NaN", "1e9", "0.0001"] {
            let error = text.parse::<Limit>().unwrap_err().to_string();
            assert!(error.contains("such as 20:40"), "{error}");
        }
    }

    proptest! {
        /// Whenever they come: in any time there are no more than the burst and what the rate gives.
        #[test]
        fn never_more_than_the_limit(pauses in proptest::collection::vec(0u64..400, 1..200)) {
            let (buckets, begin) = (buckets("10:5", 100), Instant::now());
            let (mut at, mut taken) = (0, Vec::new());
            for pause in pauses {
                at += pause;
                if buckets.take(who(1), begin + Duration::from_millis(at)).is_ok() {
                    taken.push(at);
                }
            }
            for (from, first) in taken.iter().enumerate() {
                for (count, last) in (1u64..).zip(&taken[from..]) {
                    prop_assert!(count * 100 <= 500 + (last - first), "{count} in {} ms", last - first);
                }
            }
        }
    }
}
