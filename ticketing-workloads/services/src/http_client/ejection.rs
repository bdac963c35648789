//! Which of several endpoints are asked: those that fail are left out for a while (outlier ejection). A circuit breaker
//! cannot do that: it knows the dependency as a whole, of which two pods in three may be well.
//!
//! Decides only; time and results are given to it.

use resilience::failure::Verdict;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::time::Instant;

/// Failures in a row after which an endpoint is ejected.
const IN_A_ROW: u32 = 3;
/// The same for a share of its calls within [`WINDOW`], in percent, and calls that there must be.
const PERCENT: u32 = 50;
const MINIMUM_CALLS: u32 = 10;
const WINDOW: Duration = Duration::from_secs(10);
/// Length of the first ejection; each further one is twice as long as the one before.
const SHORTEST: Duration = Duration::from_secs(5);
/// Longest ejection; and after as long a time without one, the next is the first again.
const LONGEST: Duration = Duration::from_secs(60);
/// An endpoint that has had a call for so long, and has answered nothing well since that began, is asked only for want of others.
const UNRESPONSIVE_AFTER: Duration = Duration::from_secs(2);
/// How long an endpoint that has refused a call is asked only for want of others, if it does not ask for longer. Who refuses is
/// done at once, and would have the fewest calls under way.
const REFUSING: Duration = Duration::from_secs(1);
/// With a smaller share of endpoints left, in percent, all of them are asked: what fails everywhere is the fault of none, and
/// those that are left would not bear the load of all.
const PANIC_PERCENT: usize = 50;

/// The endpoints of one dependency.
#[derive(Debug, Default)]
pub struct Ejection {
    endpoints: BTreeMap<SocketAddr, Endpoint>,
    /// Who was asked last.
    last: Option<SocketAddr>,
    /// Calls so far.
    calls: u64,
}

#[derive(Debug)]
struct Endpoint {
    state: State,
    /// When it got into this state; results of calls that began before say nothing of it.
    since: Instant,
    failures_in_a_row: u32,
    window: Window,
    /// Ejections without [`LONGEST`] between them.
    ejections: u32,
    /// Calls without a result yet, in the order in which they began.
    under_way: BTreeMap<u64, Instant>,
    /// When the last success arrived.
    answered: Option<Instant>,
    refused: Option<Refused>,
}

/// It has said that it takes no more for now.
#[derive(Clone, Copy, Debug)]
struct Refused {
    at: Instant,
    until: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Admitted,
    Ejected {
        until: Instant,
    },
    /// Its ejection is over, and one call finds out whether it is well.
    Tried,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    calls: u32,
    failures: u32,
}

/// An endpoint that is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub address: SocketAddr,
    /// Whether this call decides if it is admitted again. It must be followed by [`Ejection::record`].
    pub trial: bool,
    begun: Instant,
    number: u64,
}

/// What a result has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Ejected { length: Duration },
    Readmitted,
}

impl Endpoint {
    fn new(now: Instant) -> Self {
        let window = Window { since: now, calls: 0, failures: 0 };
        Self {
            state: State::Admitted,
            since: now,
            failures_in_a_row: 0,
            window,
            ejections: 0,
            under_way: BTreeMap::new(),
            answered: None,
            refused: None,
        }
    }

    fn admit(&mut self, now: Instant) {
        let under_way = std::mem::take(&mut self.under_way);
        let (ejections, answered, refused) = (self.ejections, self.answered, self.refused);
        *self = Self { ejections, under_way, answered, refused, ..Self::new(now) };
    }

    /// Whether it wants no calls now.
    fn refuses(&self, now: Instant) -> bool {
        self.refused.is_some_and(|refused| refused.until > now)
    }

    fn has_answered_since(&self, begun: Instant) -> bool {
        self.answered.is_some_and(|at| at >= begun)
    }

    /// Whether it may be frozen: its oldest call has waited for long, in which it has answered nothing else either.
    fn is_unresponsive(&self, now: Instant) -> bool {
        let oldest = self.under_way.values().next();
        oldest.is_some_and(|begun| {
            now.saturating_duration_since(*begun) >= UNRESPONSIVE_AFTER && !self.has_answered_since(*begun)
        })
    }

    fn eject(&mut self, now: Instant) -> Change {
        if self.state == State::Admitted && now.saturating_duration_since(self.since) > LONGEST {
            self.ejections = 0;
        }
        let length = SHORTEST.saturating_mul(1 << self.ejections.min(16)).min(LONGEST);
        self.ejections += 1;
        (self.state, self.since) = (State::Ejected { until: now + length }, now);
        Change::Ejected { length }
    }

    /// Counts a result; whether there are too many failures now.
    fn count(&mut self, failed: bool, now: Instant) -> bool {
        if now.saturating_duration_since(self.window.since) > WINDOW {
            self.window = Window { since: now, calls: 0, failures: 0 };
        }
        let Window { calls, failures, .. } = &mut self.window;
        *calls = calls.saturating_add(1);
        *failures = failures.saturating_add(failed.into());
        self.failures_in_a_row = if failed { self.failures_in_a_row.saturating_add(1) } else { 0 };
        let share = u64::from(*failures) * 100 >= u64::from(PERCENT) * u64::from(*calls);
        failed && (self.failures_in_a_row >= IN_A_ROW || (share && *calls >= MINIMUM_CALLS))
    }
}

impl Ejection {
    /// These are the endpoints from now on. What is known of those that stay is kept.
    pub fn set(&mut self, addresses: &BTreeSet<SocketAddr>, now: Instant) {
        self.endpoints.retain(|address, _| addresses.contains(address));
        for address in addresses {
            self.endpoints.entry(*address).or_insert_with(|| Endpoint::new(now));
        }
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// How many of them are left out.
    pub fn ejected(&self) -> usize {
        self.endpoints.values().filter(|endpoint| endpoint.state != State::Admitted).count()
    }

    /// Whether a failure of this call says nothing of the others, who are asked instead: its endpoint is left out or no longer
    /// one of them. One from whom nothing came at all (`no_answer`) is known to be alone in that, too, if others have answered since.
    pub fn is_isolated_failure(&self, chosen: &Chosen, no_answer: bool) -> bool {
        let Some(endpoint) = self.endpoints.get(&chosen.address) else { return !self.endpoints.is_empty() };
        let alone = || {
            !endpoint.has_answered_since(chosen.begun)
                && self.endpoints.values().any(|other| other.has_answered_since(chosen.begun))
        };
        !self.panics() && (endpoint.state != State::Admitted || (no_answer && alone()))
    }

    /// Whether too few are left.
    fn panics(&self) -> bool {
        (self.len() - self.ejected()) * 100 < PANIC_PERCENT * self.len()
    }

    pub fn contains(&self, address: SocketAddr) -> bool {
        self.endpoints.contains_key(&address)
    }

    /// Whom to ask: the one with the fewest calls under way, in turn if there are several, but none of `tried`. So one that hangs
    /// gets no more calls than the others have at once, and one that refuses gets none while others do not. `None`: there is
    /// nobody else.
    pub fn choose(&mut self, tried: &[SocketAddr], now: Instant) -> Option<Chosen> {
        let panic = self.panics();
        let rank = |address: SocketAddr, endpoint: &Endpoint, had_its_turn: bool| {
            let (silent, refuses) = (endpoint.is_unresponsive(now), endpoint.refuses(now));
            (silent, refuses, endpoint.under_way.len(), had_its_turn, address)
        };
        let usable = |(address, endpoint): (&SocketAddr, &Endpoint)| {
            let trial = match endpoint.state {
                _ if tried.contains(address) => return None,
                State::Admitted => false,
                State::Ejected { until } if until <= now && !panic => true,
                State::Ejected { .. } | State::Tried if panic => false,
                State::Ejected { .. } | State::Tried => return None,
            };
            let had_its_turn = self.last.is_some_and(|last| *address <= last);
            Some((rank(*address, endpoint, had_its_turn), trial))
        };
        // Rather one that is left out than none.
        let any = || {
            let others = self.endpoints.iter().filter(|(address, _)| !tried.contains(address));
            others.map(|(address, endpoint)| (rank(*address, endpoint, false), false))
        };
        let ((.., address), trial) = self.endpoints.iter().filter_map(usable).min().or_else(|| any().min())?;
        self.last = Some(address);
        self.calls += 1;
        let number = self.calls;
        if let Some(endpoint) = self.endpoints.get_mut(&address) {
            endpoint.under_way.insert(number, now);
            if trial {
                (endpoint.state, endpoint.since) = (State::Tried, now);
            }
        }
        Some(Chosen { address, trial, begun: now, number })
    }

    /// The endpoint has refused a call because of its load, and asks to wait for so long, if it says. To be followed by
    /// [`Ejection::record`].
    pub fn refused(&mut self, chosen: &Chosen, wait: Option<Duration>, now: Instant) {
        if let Some(endpoint) = self.endpoints.get_mut(&chosen.address) {
            let until = now + wait.unwrap_or_default().clamp(REFUSING, LONGEST);
            endpoint.refused = Some(Refused { at: now, until });
        }
    }

    /// How a call to an endpoint ended.
    pub fn record(&mut self, chosen: &Chosen, verdict: Verdict, now: Instant) -> Option<Change> {
        let several = self.endpoints.len() > 1;
        let endpoint = self.endpoints.get_mut(&chosen.address)?;
        endpoint.under_way.remove(&chosen.number);
        if verdict == Verdict::Success {
            endpoint.answered = Some(now);
            // A call that began before says nothing of it.
            endpoint.refused = endpoint.refused.filter(|refused| chosen.begun < refused.at);
        }
        if chosen.begun < endpoint.since {
            return None;
        }
        match (endpoint.state, verdict) {
            (State::Admitted, Verdict::Success | Verdict::Failure) => {
                let too_many = endpoint.count(verdict == Verdict::Failure, now);
                // The only one is asked in any case.
                (too_many && several).then(|| endpoint.eject(now))
            }
            // Also one that was asked for want of others.
            (State::Ejected { .. } | State::Tried, Verdict::Success) => {
                endpoint.admit(now);
                Some(Change::Readmitted)
            }
            (State::Tried, Verdict::Failure) if chosen.trial => Some(endpoint.eject(now)),
            (State::Tried, Verdict::Neutral) if chosen.trial => {
                // It has found out nothing; the next call may. Not at once where it was refused, or all calls would be trials.
                let until = if endpoint.refuses(now) { now + SHORTEST } else { now };
                (endpoint.state, endpoint.since) = (State::Ejected { until }, now);
                None
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn address(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, number], 8_080))
    }

    fn endpoints(count: u8) -> (Ejection, Instant) {
        let (mut ejection, now) = (Ejection::default(), Instant::now());
        ejection.set(&(1..=count).map(address).collect(), now);
        (ejection, now)
    }

    /// Calls, of which those to `bad` fail; how many went to each.
    fn calls(ejection: &mut Ejection, count: usize, bad: &[u8], now: Instant) -> BTreeMap<SocketAddr, usize> {
        let mut asked = BTreeMap::new();
        for _ in 0..count {
            let chosen = ejection.choose(&[], now).unwrap();
            let failed = bad.iter().any(|number| address(*number) == chosen.address);
            ejection.record(&chosen, if failed { Verdict::Failure } else { Verdict::Success }, now);
            *asked.entry(chosen.address).or_default() += 1;
        }
        asked
    }

    #[test]
    fn all_are_asked_in_turn() {
        let (mut ejection, now) = endpoints(3);
        assert!(calls(&mut ejection, 30, &[], now).into_values().all(|asked| asked == 10));
        let only_other = ejection.choose(&[address(1), address(3)], now).unwrap();
        assert_eq!(only_other.address, address(2));
        assert_eq!(ejection.choose(&[address(1), address(2), address(3)], now), None);
        assert_eq!(Ejection::default().choose(&[], now), None);
    }

    #[test]
    fn one_of_three_that_fails_is_left_out_and_tried_by_one_call_later() {
        let (mut ejection, start) = endpoints(3);
        assert_eq!(calls(&mut ejection, 300, &[2], start)[&address(2)], 3);
        let mut at = start;
        for length in [5, 10, 20, 40, 60, 60] {
            at += Duration::from_millis(length * 1_000 - 1);
            assert!(!calls(&mut ejection, 10, &[2], at).contains_key(&address(2)), "before {length} s");
            at += Duration::from_millis(1);
            assert_eq!(calls(&mut ejection, 10, &[2], at)[&address(2)], 1, "after {length} s");
        }
        at += LONGEST;
        assert!(calls(&mut ejection, 30, &[], at)[&address(2)] >= 9, "it is well again");
        assert_eq!(ejection.ejected(), 0);
    }

    #[test]
    fn only_one_call_at_a_time_finds_out() {
        let (mut ejection, start) = endpoints(3);
        calls(&mut ejection, 9, &[2], start);
        let later = start + SHORTEST;
        let chosen: Vec<_> = (0..12).map(|_| ejection.choose(&[], later).unwrap()).collect();
        let trials: Vec<_> = chosen.iter().filter(|chosen| chosen.address == address(2)).collect();
        assert!(matches!(trials[..], [Chosen { trial: true, .. }]));
        assert_eq!(ejection.record(trials[0], Verdict::Neutral, later), None);
        let again: Vec<_> = (0..3).map(|_| ejection.choose(&[], later).unwrap()).collect();
        assert!(again.iter().any(|chosen| chosen.trial), "one that says nothing leaves it to the next");
    }

    #[test]
    fn a_share_of_failures_is_enough_though_never_in_a_row() {
        let (mut ejection, now) = endpoints(2);
        let one = address(1);
        let mut turns = 0_u32;
        while ejection.ejected() == 0 {
            let chosen = ejection.choose(&[], now).unwrap();
            let verdict = if chosen.address == one && turns % 4 < 2 { Verdict::Failure } else { Verdict::Success };
            turns += 1;
            ejection.record(&chosen, verdict, now);
            assert!(turns < 100);
        }
        assert_eq!(turns.div_ceil(2), 11, "the tenth call of the one makes ten, and the eleventh fails");
    }

    #[test]
    fn if_most_fail_all_are_asked() {
        let (mut ejection, now) = endpoints(3);
        let asked = calls(&mut ejection, 300, &[1, 2, 3], now);
        assert!(asked.values().all(|asked| *asked > 90), "{asked:?}");
        // When they are well again, the first are admitted at once, and the last one when its first ejection is over.
        let later = now + Duration::from_millis(1);
        calls(&mut ejection, 3, &[], later);
        assert_eq!(ejection.ejected(), 1);
        calls(&mut ejection, 3, &[], now + SHORTEST);
        assert_eq!(ejection.ejected(), 0);
    }

    #[test]
    fn half_may_be_left_out_and_the_only_one_never() {
        let (mut ejection, now) = endpoints(4);
        let asked = calls(&mut ejection, 100, &[1, 2], now);
        assert_eq!((asked[&address(1)], asked[&address(2)], ejection.ejected()), (3, 3, 2));
        let (mut ejection, now) = endpoints(1);
        assert_eq!((calls(&mut ejection, 100, &[1], now)[&address(1)], ejection.ejected()), (100, 0));
    }

    #[test]
    fn results_of_before_change_nothing() {
        let (mut ejection, start) = endpoints(3);
        let old: Vec<_> = (0..9).map(|_| ejection.choose(&[], start).unwrap()).collect();
        let later = start + Duration::from_millis(1);
        let to_two = old.iter().filter(|chosen| chosen.address == address(2)).collect::<Vec<_>>();
        for chosen in &to_two {
            ejection.record(chosen, Verdict::Failure, later);
        }
        assert_eq!(ejection.ejected(), 1);
        assert_eq!(ejection.record(to_two[0], Verdict::Success, later), None, "a success from before its ejection");
        assert_eq!(ejection.ejected(), 1);
    }

    #[test]
    fn what_is_known_is_kept_and_what_is_gone_forgotten() {
        let (mut ejection, now) = endpoints(3);
        calls(&mut ejection, 9, &[2], now);
        ejection.set(&[address(2), address(3), address(4), address(5)].into(), now);
        assert_eq!((ejection.len(), ejection.ejected(), ejection.contains(address(1))), (4, 1, false));
        let gone = Chosen { address: address(1), trial: false, begun: now, number: 1 };
        assert_eq!(ejection.record(&gone, Verdict::Failure, now), None);
        ejection.set(&[address(3)].into(), now);
        assert_eq!((ejection.len(), ejection.ejected()), (1, 0));
    }

    /// It held as many buyers as there are, each for as long as an attempt may take.
    #[test]
    fn one_that_hangs_gets_no_more_calls_than_the_others_have_at_once() {
        let (mut ejection, start) = endpoints(3);
        let mut hanging = Vec::new();
        for call in 0..3_000 {
            let now = start + Duration::from_millis(10 * call);
            let chosen = ejection.choose(&[], now).unwrap();
            if chosen.address == address(2) {
                hanging.push(chosen);
            } else {
                ejection.record(&chosen, Verdict::Success, now);
            }
        }
        assert_eq!(hanging.len(), 1);
        let late = start + Duration::from_secs(30);
        assert!(ejection.is_isolated_failure(&hanging[0], true), "others have answered all the time");
        assert!(!ejection.is_isolated_failure(&hanging[0], false), "a failure that it told would count");
        ejection.record(&hanging[0], Verdict::Success, late);
        assert!(calls(&mut ejection, 30, &[], late)[&address(2)] >= 10, "it goes on");
    }

    #[test]
    fn one_that_is_silent_for_long_is_asked_only_for_want_of_others() {
        let (mut ejection, start) = endpoints(2);
        let silent = ejection.choose(&[], start).unwrap();
        let busy: Vec<_> = (0..9).map(|_| ejection.choose(&[silent.address], start).unwrap()).collect();
        assert_eq!(ejection.choose(&[], start).unwrap().address, silent.address, "it has fewer calls");
        let later = start + UNRESPONSIVE_AFTER;
        ejection.record(&busy[0], Verdict::Success, later);
        assert_eq!(ejection.choose(&[], later).unwrap().address, busy[0].address);
        assert_eq!(ejection.choose(&[busy[0].address], later).unwrap().address, silent.address);
    }

    /// Of two, one is left out, and the other one takes no connection: it restarts.
    #[test]
    fn one_that_is_left_out_is_asked_rather_than_none() {
        let (mut ejection, now) = endpoints(2);
        calls(&mut ejection, 20, &[2], now);
        assert_eq!(ejection.ejected(), 1);
        let only = ejection.choose(&[address(1)], now).unwrap();
        assert_eq!((only.address, only.trial), (address(2), false));
        assert_eq!(ejection.record(&only, Verdict::Success, now + Duration::from_millis(1)), Some(Change::Readmitted));
        assert_eq!(ejection.choose(&[address(1), address(2)], now), None);
    }

    /// Of three with as many calls under way, it had none, and so got all that came.
    #[test]
    fn one_that_refuses_at_once_gets_few_calls() {
        let (mut ejection, start) = endpoints(3);
        // The others take 200 ms each.
        let mut busy: VecDeque<_> = (0..20).map(|_| ejection.choose(&[address(2)], start).unwrap()).collect();
        let mut refused = 0;
        for call in 0..400 {
            let now = start + Duration::from_millis(10 * call);
            let chosen = ejection.choose(&[], now).unwrap();
            if chosen.address == address(2) {
                refused += 1;
                ejection.refused(&chosen, None, now);
                ejection.record(&chosen, Verdict::Neutral, now);
            } else {
                busy.push_back(chosen);
                ejection.record(&busy.pop_front().unwrap(), Verdict::Success, now);
            }
        }
        assert_eq!(refused, 4, "one a second");
        let later = start + Duration::from_secs(4);
        let chosen = ejection.choose(&[address(1), address(3)], later).unwrap();
        ejection.refused(&chosen, Some(Duration::from_secs(30)), later);
        ejection.record(&chosen, Verdict::Neutral, later);
        let before = later + Duration::from_millis(29_999);
        assert_ne!(ejection.choose(&[], before).unwrap().address, address(2), "it has said for how long");
        let only = ejection.choose(&[address(1), address(3)], before).unwrap();
        assert_eq!(only.address, address(2), "rather it than none");
        ejection.record(&only, Verdict::Success, before);
        assert_eq!(ejection.choose(&[], before).unwrap().address, address(2), "it takes calls again");
    }

    #[test]
    fn a_trial_that_is_refused_is_made_again_later() {
        let (mut ejection, start) = endpoints(3);
        calls(&mut ejection, 9, &[2], start);
        let trials = |ejection: &mut Ejection, now| {
            let mut trials = 0;
            for _ in 0..30 {
                let chosen = ejection.choose(&[], now).unwrap();
                trials += usize::from(chosen.trial);
                if chosen.trial {
                    ejection.refused(&chosen, None, now);
                }
                ejection.record(&chosen, Verdict::Neutral, now);
            }
            trials
        };
        let first = start + SHORTEST;
        assert_eq!(trials(&mut ejection, first), 1);
        assert_eq!(trials(&mut ejection, first + SHORTEST - Duration::from_millis(1)), 0);
        assert_eq!(trials(&mut ejection, first + SHORTEST), 1);
    }

    #[test]
    fn silence_of_all_is_excused_in_none() {
        let (mut ejection, start) = endpoints(3);
        let hanging: Vec<_> = (0..6).map(|_| ejection.choose(&[], start).unwrap()).collect();
        for chosen in &hanging {
            ejection.record(chosen, Verdict::Failure, start + LONGEST);
            assert!(!ejection.is_isolated_failure(chosen, true));
        }
    }

    #[test]
    fn a_failure_of_one_that_has_gone_is_excused() {
        let (mut ejection, start) = endpoints(3);
        let chosen = ejection.choose(&[], start).unwrap();
        ejection.set(&[2, 3].map(address).into(), start);
        assert!(ejection.is_isolated_failure(&chosen, false));
    }

    proptest! {
        /// Whatever happens, somebody is asked, and nobody twice in one call.
        #[test]
        fn somebody_is_asked(
            count in 1u8..8,
            steps in proptest::collection::vec((0u8..3, 0u64..20_000, any::<bool>()), 1..200),
        ) {
            let (mut ejection, mut now) = endpoints(count);
            let mut under_way = Vec::new();
            for (verdict, wait, finish) in steps {
                now += Duration::from_millis(wait);
                let chosen = ejection.choose(&[], now);
                prop_assert!(chosen.is_some());
                let chosen = chosen.unwrap();
                if let Some(other) = ejection.choose(&[chosen.address], now) {
                    prop_assert_ne!(other.address, chosen.address);
                    under_way.push(other);
                }
                under_way.push(chosen);
                if finish {
                    let verdict = [Verdict::Success, Verdict::Failure, Verdict::Neutral][usize::from(verdict)];
                    let chosen = under_way.swap_remove(usize::try_from(wait).unwrap() % under_way.len());
                    ejection.record(&chosen, verdict, now);
                }
                prop_assert!(count > 1 || ejection.ejected() == 0);
            }
        }

        /// With half of the endpoints well or more, the share of failed calls is small.
        #[test]
        fn few_calls_fail(count in 2u8..10, bad in 0u8..5, seconds in 60u64..300) {
            let bad: Vec<u8> = (1..=bad.min(count / 2)).collect();
            let (mut ejection, start) = endpoints(count);
            let mut failed = 0;
            let total = seconds * 10;
            for call in 0..total {
                let now = start + Duration::from_millis(100 * call);
                let asked = calls(&mut ejection, 1, &bad, now);
                failed += usize::from(bad.iter().any(|number| asked.contains_key(&address(*number))));
            }
            // Three to begin with, and one for each trial: after 5, 10, 20, 40 and then each 60 s.
            prop_assert!(failed <= bad.len() * (3 + 4 + usize::try_from(seconds).unwrap() / 60), "{failed} of {total}");
        }
    }
}
