//! Whether the operator itself is cut off from the pods: then what its asks give says nothing of any of them. Pure.
//!
//! One pod that cannot be reached is one pod that cannot be reached. Several of different workloads that fall silent without
//! anybody being reached in between are more likely one network, and it is the operator's own. So their silence is then no
//! failure: otherwise a broken policy of the network would have every checked workload restarted.

use std::{collections::HashMap, sync::Arc, time::Duration};
use tokio::time::Instant;

/// How long an ask says something of the operator, or for two intervals of its check if that is longer.
const WINDOW: Duration = Duration::from_secs(30);
/// That somebody was reached vouches no longer than this, however rarely that check is asked.
const LONGEST_TRUST: Duration = Duration::from_secs(300);
/// Pods that must be silent.
const LEAST_PODS: usize = 3;
/// An endpoint that fell silent so often while others were reached is dead: it does not tell that the operator is cut off.
const DEAD_AFTER: u32 = 2;
/// Time between two times that what is old is thrown away.
const TIDY_EVERY: Duration = Duration::from_secs(10);

/// An ask, as far as it says something of the way to the pods.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Uid of the pod.
    pub pod: Arc<str>,
    /// The port that was asked. That others of the pod are open says nothing of one that is not.
    pub port: u16,
    /// What it belongs to: its workload, or the Service that was asked for.
    pub group: String,
    /// Interval of the check.
    pub interval: Duration,
    /// When somebody was there: a connection came about, or was refused. Whatever was said after that is about the pod.
    pub reached: Option<Instant>,
}

/// What the last asks of all checks of this process say of the way to the pods.
#[derive(Debug, Default)]
pub struct Reach {
    /// Endpoints that could not be reached, and nobody was reached since.
    silent: HashMap<Endpoint, Silence>,
    /// Endpoints that could not be reached, and others were since.
    past: HashMap<Endpoint, Silence>,
    /// Until when it counts that somebody was reached.
    trusted_until: Option<Instant>,
    cut_off: bool,
    tidied: Option<Instant>,
}

/// Uid of a pod, and a port.
type Endpoint = (Arc<str>, u16);

#[derive(Debug)]
struct Silence {
    group: String,
    ended: Instant,
    /// Until when it counts.
    until: Instant,
    /// How often somebody else was reached after it.
    strikes: u32,
}

impl Reach {
    /// Takes in an ask.
    pub fn take(&mut self, asked: Asked, now: Instant) {
        self.tidy(now);
        let endpoint = (asked.pod, asked.port);
        let counts_for = WINDOW.max(asked.interval.saturating_mul(2));
        if let Some(at) = asked.reached {
            self.silent.remove(&endpoint);
            self.past.remove(&endpoint);
            // An answer can come late on a connection that came about before the others fell silent.
            let before = self.silent.extract_if(|_, silence| silence.ended <= at);
            self.past.extend(before.map(|(one, silence)| (one, Silence { strikes: silence.strikes + 1, ..silence })));
            self.cut_off &= is_many(&self.silent, now);
            let until = at + counts_for.min(LONGEST_TRUST);
            self.trusted_until = Some(self.trusted_until.map_or(until, |before| before.max(until)));
            return;
        }
        let before = self.silent.get(&endpoint).or_else(|| self.past.get(&endpoint));
        let strikes = before.map_or(0, |silence| silence.strikes);
        let silence = Silence { group: asked.group, ended: now, until: now + counts_for, strikes };
        if strikes < DEAD_AFTER {
            self.past.remove(&endpoint);
            self.silent.insert(endpoint, silence);
        } else {
            self.past.insert(endpoint, silence);
        }
        let trusted = self.trusted_until.is_some_and(|until| now < until);
        self.cut_off |= is_many(&self.silent, now) || (!trusted && self.is_all_silent(now));
    }

    /// Whether the operator is likely to be cut off: until one ask reaches somebody, or the pods that told it are asked no more.
    pub fn is_cut_off(&self, now: Instant) -> bool {
        self.cut_off && self.is_all_silent(now)
    }

    fn is_all_silent(&self, now: Instant) -> bool {
        is_many(self.silent.iter().chain(&self.past), now)
    }

    fn tidy(&mut self, now: Instant) {
        if self.tidied.is_some_and(|last| now < last + TIDY_EVERY) {
            return;
        }
        self.tidied = Some(now);
        self.silent.retain(|_, silence| now < silence.until);
        self.past.retain(|_, silence| now < silence.until);
    }
}

/// Whether so many pods of at least two workloads or Services are silent.
fn is_many<'a>(silences: impl IntoIterator<Item = (&'a Endpoint, &'a Silence)>, now: Instant) -> bool {
    let (mut pods, mut first, mut differ) = (Vec::with_capacity(LEAST_PODS), None, false);
    for ((pod, _), silence) in silences.into_iter().filter(|(_, silence)| now < silence.until) {
        if pods.len() < LEAST_PODS && !pods.contains(&pod) {
            pods.push(pod);
        }
        differ |= *first.get_or_insert(&silence.group) != &silence.group;
        if differ && pods.len() >= LEAST_PODS {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said after these asks, one each second: pod `1` of workload `a` was reached (`a1+`) or not (`a1-`), or time passes
    /// (`.`, ten seconds). `a1x` is another port of it.
    fn after(asks: &str, interval: u64) -> bool {
        let (mut reach, mut now) = (Reach::default(), Instant::now());
        for ask in asks.split_whitespace() {
            now += Duration::from_secs(if ask == "." { 10 } else { 1 });
            if ask != "." {
                let asked = Asked {
                    pod: ask[..2].into(),
                    port: if ask.contains('x') { 81 } else { 80 },
                    group: ask[..1].to_owned(),
                    interval: Duration::from_secs(interval),
                    reached: ask.ends_with('+').then_some(now),
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
    #[case::one_after_the_other("a1- a2- b1+ b2+ b1- b2- a1- a2-", true)]
    #[case::one_is_reached("a1- a2- b1- c1+", false)]
    #[case::one_is_reached_again("a1- a2- b1- b1+", false)]
    #[case::again_after_that("a1- a2- b1- a1+ a2+ b1+ a1- a2- b1-", true)]
    #[case::the_same_are_dead_while_another_is_well("c1+ a1- a2- c1+ b1- a1- a2- c1+ b1- a1- a2-", false)]
    #[case::the_same_pods_have_a_dead_port_each(
        "a1+ a2+ b1+ a1x- a2x- a1+ a2+ b1+ b1x- a1+ a2+ b1+ a1x- a2x- b1x- a1+ a2+ b1+ a1x- a2x- b1x-",
        false
    )]
    #[case::two_ports_are_one_pod("a1- a1x- b1- b1x-", false)]
    #[case::nobody_was_reached_for_long("c1+ a1- a2- c1+ b1- c1+ a1- a2- c1+ b1- c1+ . . . a1- a2- b1-", true)]
    #[case::long_ago("a1- a2- . . . . b1-", false)]
    #[case::it_lasts("a1- a2- b1- . . a1- a2- b1- . . a1- a2- b1-", true)]
    #[case::nobody_asks_any_more("a1- a2- b1- . . . .", false)]
    fn silence_of_many_without_anybody_reached_is_the_operators_own(#[case] asks: &str, #[case] expected: bool) {
        assert_eq!(after(asks, 5), expected);
    }

    #[test]
    fn what_is_asked_rarely_counts_until_it_is_asked_again() {
        assert!(after("a1- a2- . . . . b1-", 60));
        assert!(!after("c1+ a1- a2- c1+ b1- c1+ a1- a2- c1+ b1- c1+ . . . a1- a2- b1-", 60), "c is asked every minute");
    }

    #[test]
    fn a_late_answer_on_an_early_connection_does_not_vouch_for_the_way() {
        let (mut reach, before) = (Reach::default(), Instant::now());
        let now = before + Duration::from_secs(1);
        let asked = |pod: &str, reached| Asked {
            pod: pod.into(),
            port: 80,
            group: pod[..1].to_owned(),
            interval: Duration::from_secs(5),
            reached,
        };
        for pod in ["a1", "a2", "b1"] {
            reach.take(asked(pod, None), now);
        }
        reach.take(asked("c1", Some(before)), now);
        assert!(reach.is_cut_off(now));
        reach.take(asked("c1", Some(now)), now);
        assert!(!reach.is_cut_off(now));
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let (mut reach, mut now) = (Reach::default(), Instant::now());
        for number in 0..1_000 {
            now += Duration::from_secs(1);
            let asked = Asked {
                pod: number.to_string().into(),
                port: 80,
                group: String::new(),
                interval: Duration::from_secs(1),
                reached: (number % 100 == 0).then_some(now),
            };
            reach.take(asked, now);
        }
        assert!(reach.silent.len() + reach.past.len() <= 41);
    }
}
