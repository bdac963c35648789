//! Whether the operator itself is cut off from the pods: then what its asks give says nothing of any of them. Pure.
//!
//! One pod that cannot be reached is one pod that cannot be reached. Several of different workloads that fall silent without
//! anybody being reached in between are more likely one network, and it is the operator's own. So their silence is then no
//! failure: otherwise a broken policy of the network would have every checked workload restarted.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// How long an ask says something of the operator, or for two intervals of its check if that is longer.
const WINDOW: Duration = Duration::from_secs(30);
/// That somebody was reached vouches no longer than this, however rarely that check is asked.
const LONGEST_TRUST: Duration = Duration::from_secs(300);
/// Pods that must be silent.
const LEAST_PODS: usize = 3;
/// Time between two times that what is old is thrown away.
const TIDY_EVERY: Duration = Duration::from_secs(10);

/// An ask, as far as it says something of the way to the pods.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Uid of the pod.
    pub pod: Arc<str>,
    /// What it belongs to: its workload, or the Service that was asked for.
    pub group: String,
    /// Interval of the check.
    pub interval: Duration,
    /// Somebody was there: a connection came about, or was refused. Whatever was said after that is about the pod.
    pub reached: bool,
}

/// What the last asks of all checks of this process say of the way to the pods.
#[derive(Debug, Default)]
pub struct Reach {
    /// Pods that could not be reached and came after the last one that could.
    silent: HashMap<Arc<str>, Silence>,
    /// Pods that could not be reached while others could: those alone do not tell that the operator is cut off.
    dead: HashMap<Arc<str>, Silence>,
    /// Until when it counts that somebody was reached.
    trusted_until: Option<Instant>,
    cut_off: bool,
    tidied: Option<Instant>,
}

#[derive(Debug)]
struct Silence {
    group: String,
    until: Instant,
}

/// That of this process.
pub fn reach() -> MutexGuard<'static, Reach> {
    static REACH: LazyLock<Mutex<Reach>> = LazyLock::new(Mutex::default);
    REACH.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Reach {
    /// Takes in an ask.
    pub fn take(&mut self, asked: Asked, now: Instant) {
        self.tidy(now);
        let counts_for = WINDOW.max(asked.interval.saturating_mul(2));
        if asked.reached {
            self.cut_off = false;
            self.dead.extend(self.silent.drain());
            self.dead.remove(&asked.pod);
            let until = now + counts_for.min(LONGEST_TRUST);
            self.trusted_until = Some(self.trusted_until.map_or(until, |before| before.max(until)));
            return;
        }
        let silence = Silence { group: asked.group, until: now + counts_for };
        let side = if self.dead.contains_key(&asked.pod) { &mut self.dead } else { &mut self.silent };
        side.insert(asked.pod, silence);
        let trusted = self.trusted_until.is_some_and(|until| now < until);
        self.cut_off |= is_many(self.silent.values(), now) || (!trusted && self.is_all_silent(now));
    }

    /// Whether the operator is likely to be cut off: until one ask reaches somebody, or the pods that told it are asked no more.
    pub fn is_cut_off(&self, now: Instant) -> bool {
        self.cut_off && self.is_all_silent(now)
    }

    fn is_all_silent(&self, now: Instant) -> bool {
        is_many(self.silent.values().chain(self.dead.values()), now)
    }

    fn tidy(&mut self, now: Instant) {
        if self.tidied.is_some_and(|last| now < last + TIDY_EVERY) {
            return;
        }
        self.tidied = Some(now);
        self.silent.retain(|_, silence| now < silence.until);
        self.dead.retain(|_, silence| now < silence.until);
    }
}

/// Whether so many pods of at least two workloads or Services are silent.
fn is_many<'a>(silences: impl Iterator<Item = &'a Silence>, now: Instant) -> bool {
    let (mut pods, mut first, mut differ) = (0, None, false);
    for silence in silences.filter(|silence| now < silence.until) {
        pods += 1;
        differ |= *first.get_or_insert(&silence.group) != &silence.group;
        if differ && pods >= LEAST_PODS {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said after these asks, one each second: pod `1` of workload `a` was reached (`a1+`) or not (`a1-`), or time passes
    /// (`.`, ten seconds).
    fn after(asks: &str, interval: u64) -> bool {
        let (mut reach, mut now) = (Reach::default(), Instant::now());
        for ask in asks.split_whitespace() {
            now += Duration::from_secs(if ask == "." { 10 } else { 1 });
            if ask != "." {
                let asked = Asked {
                    pod: ask[..2].into(),
                    group: ask[..1].to_owned(),
                    interval: Duration::from_secs(interval),
                    reached: ask.ends_with('+'),
                };
                reach.take(asked, now);
            }
        }
        reach.is_cut_off(now)
    }

    #[rstest::rstest]
    #[case::nothing("", false)]
    #[case::one_pod("a1- a1- a1- a1-", false)]
    #[case::two_pods("a1- b1-", false)]
    #[case::one_workload("a1- a2- a3- a4-", false)]
    #[case::three_of_two("a1- a2- b1-", true)]
    #[case::all_at_once_though_all_were_well_a_moment_ago("a1+ a2+ b1+ a1- a2- b1-", true)]
    #[case::one_is_reached("a1- a2- b1- c1+", false)]
    #[case::one_is_reached_again("a1- a2- b1- b1+", false)]
    #[case::again_after_that("a1- a2- b1- a1+ a2+ b1+ a1- a2- b1-", true)]
    #[case::the_same_are_dead_while_another_is_well("c1+ a1- a2- c1+ b1- a1- a2- c1+ b1- a1- a2-", false)]
    #[case::nobody_was_reached_for_long("c1+ a1- c1+ a2- c1+ b1- c1+ . . . a1- a2- b1-", true)]
    #[case::long_ago("a1- a2- . . . . b1-", false)]
    #[case::it_lasts("a1- a2- b1- . . a1- a2- b1- . . a1- a2- b1-", true)]
    #[case::nobody_asks_any_more("a1- a2- b1- . . . .", false)]
    fn silence_of_many_without_anybody_reached_is_the_operators_own(#[case] asks: &str, #[case] expected: bool) {
        assert_eq!(after(asks, 5), expected);
    }

    #[test]
    fn what_is_asked_rarely_counts_until_it_is_asked_again() {
        assert!(after("a1- a2- . . . . b1-", 60));
        assert!(!after("c1+ a1- c1+ a2- c1+ b1- c1+ . . . a1- a2- b1-", 60), "c is asked every minute");
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let (mut reach, mut now) = (Reach::default(), Instant::now());
        for number in 0..1_000 {
            now += Duration::from_secs(1);
            let asked = Asked {
                pod: number.to_string().into(),
                group: String::new(),
                interval: Duration::from_secs(1),
                reached: number % 100 == 0,
            };
            reach.take(asked, now);
        }
        assert!(reach.silent.len() + reach.dead.len() <= 41);
    }
}
