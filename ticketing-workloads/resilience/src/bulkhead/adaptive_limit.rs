//! How many of the less important calls a bulkhead lets in at once, so that the more important ones do not become slow.
//!
//! Slots that are kept are of no use where what is behind the bulkhead has less room than the bulkhead: a call with a slot
//! waits there, for a processor or a connection, among all that came in before it. How full that is shows in how long a probe takes
//! that is always the same. What it takes while hardly any less important call is inside is known from quiet times, and from short
//! trials. While it takes a good deal longer than that, fewer calls are let in; while it does not, and calls wait, more. (So do TCP
//! Vegas, and the gradient of Envoy's adaptive concurrency filter, with the round trip.)
//!
//! Probes vary, and what is behind may be slow for other reasons: one pod of three, or all of them since they have moved. So nothing
//! is compared but typical probes with typical probes, and what is slow even without those calls is not blamed on them.
//!
//! A function of what was measured, and of the time.

use std::ops::RangeInclusive;
use std::time::Duration;
use tokio::time::Instant;

/// Probes of which the eighth fastest is the typical one: where one pod of three is slow, it is not of that pod.
const PROBES: usize = 12;
const TYPICAL: usize = 7;
/// Probes are slow that take so many times more than an unloaded one as unloaded ones differ on average (as in RFC 6298, for round
/// trips),
const DEVIATIONS: u32 = 4;
/// but at least this share of an unloaded one, and at most this,
const SLOW: RangeInclusive<f64> = 0.3..=0.6;
/// and this much more: below, it is chance.
const CHANCE: Duration = Duration::from_micros(50);
/// What unloaded probes differ by follows each measurement by so small a part.
const FOLLOW_DEVIATION: u32 = 4;
/// What an unloaded probe takes follows each measurement by so small a part, and by so small a one while the least are inside: they
/// may be in its way a little.
const FOLLOW: u32 = 8;
const FOLLOW_WITH_THE_LEAST: u32 = 32;
/// So many less important calls are let in whatever the probes say: there is no end to a sale that cannot begin. With more, a purchase
/// took twice as long on a machine of two processors.
pub const LEAST: u32 = 1;
/// So often it has to be measured before it is known. In the first half of them connections are opened and caches filled: how far
/// they differ says nothing.
const KNOWN_AFTER: u32 = 16;
/// How long it is taken for granted what an unloaded probe takes while there is no quiet time to measure it. Then only the least are
/// let in for a moment.
const TRIAL_AFTER: Duration = Duration::from_secs(60);
/// A trial ends after so many measurements, also if other calls are inside still.
const TRIAL: u32 = 5;

/// What is known of probes that nobody is in the way of.
#[derive(Clone, Copy, Debug)]
struct Unloaded {
    typical: Duration,
    /// How far a measurement is from that, on average. Taken for much until there are several.
    deviation: Duration,
}

impl Unloaded {
    fn new(typical: Duration) -> Self {
        Self { typical, deviation: typical / 2 }
    }

    /// A probe of typical measure that takes longer is slow.
    fn quick(self) -> Duration {
        let share = |share: &f64| self.typical.mul_f64(*share);
        let more = self.deviation.saturating_mul(DEVIATIONS).clamp(share(SLOW.start()), share(SLOW.end()));
        self.typical.saturating_add(more).saturating_add(CHANCE)
    }

    /// One more measurement: it is followed by one part in `rise` if it is higher, by one in `fall` if it is lower. One that is far
    /// off counts for the deviation as one that is off by half.
    fn follow(&mut self, measured: Duration, rise: u32, fall: u32) {
        let off = measured.abs_diff(self.typical);
        self.deviation = (self.deviation * (FOLLOW_DEVIATION - 1) + off.min(self.typical / 2)) / FOLLOW_DEVIATION;
        self.typical = if measured > self.typical {
            measured.min(self.typical + self.typical / rise)
        } else {
            self.typical.saturating_sub(off / fall)
        };
    }
}

/// The limit, and what it follows.
#[derive(Clone, Debug)]
pub struct AdaptiveLimit {
    limit: u32,
    /// What a probe takes that nobody is in the way of, when that is known.
    unloaded: Option<Unloaded>,
    measured_at: Instant,
    measured: u32,
    /// Measurements that are left of a trial.
    trial: u32,
    /// The limit at which probes were slow last; up to there it rises with care.
    slow_from: u32,
    probes: Vec<Duration>,
    busiest: u32,
}

impl AdaptiveLimit {
    /// No limit yet.
    pub fn new(now: Instant) -> Self {
        Self {
            limit: u32::MAX,
            unloaded: None,
            measured_at: now,
            measured: 0,
            trial: 0,
            slow_from: u32::MAX,
            probes: Vec::with_capacity(PROBES),
            busiest: 0,
        }
    }

    /// Less important calls that may be inside at once, of the `most` that the bulkhead has room for otherwise.
    pub fn limit(&self, most: u32) -> u32 {
        let limit = if self.trial > 0 { LEAST } else { self.limit.max(LEAST) };
        limit.min(most)
    }

    /// Whether it is known what an unloaded probe takes. Until then, probes should come fast.
    pub fn is_known(&self) -> bool {
        self.measured >= KNOWN_AFTER
    }

    /// No limit, until probes are slow again: what is known of them stays.
    pub fn lift(&mut self) {
        (self.limit, self.trial, self.slow_from) = (u32::MAX, 0, u32::MAX);
    }

    /// A probe took so long while `inside` less important calls were inside, of at most `most`. `holds`: whether calls are
    /// held back by the limit now.
    pub fn take(&mut self, now: Instant, took: Duration, inside: u32, most: u32, holds: bool) {
        self.busiest = self.busiest.max(inside);
        self.probes.push(took);
        if self.probes.len() < PROBES {
            return;
        }
        self.probes.sort_unstable();
        let typical = self.probes[TYPICAL];
        let busiest = std::mem::take(&mut self.busiest);
        self.probes.clear();
        if busiest <= LEAST {
            self.learn(now, typical, busiest);
        } else if self.trial > 0 {
            self.trial -= 1;
            if self.trial == 0 {
                // As good as it gets.
                (self.unloaded, self.measured_at) = (self.unloaded.or(Some(Unloaded::new(typical))), now);
            }
        } else if holds && (self.unloaded.is_none() || now.duration_since(self.measured_at) >= TRIAL_AFTER) {
            self.trial = TRIAL;
        }
        if self.trial == 0
            && let Some(unloaded) = self.unloaded
        {
            self.limit = self.next(typical, unloaded.quick(), busiest, most);
        }
    }

    /// What a trial finds below is believed at once: that is what it is for.
    fn learn(&mut self, now: Instant, typical: Duration, busiest: u32) {
        let follow = if busiest == 0 { FOLLOW } else { FOLLOW_WITH_THE_LEAST };
        let fall = if self.trial > 0 || !self.is_known() { 2 } else { follow };
        let unloaded = self.unloaded.get_or_insert(Unloaded::new(typical));
        unloaded.follow(typical, follow, fall);
        if self.measured < KNOWN_AFTER / 2 {
            *unloaded = Unloaded::new(unloaded.typical);
        }
        (self.measured_at, self.measured, self.trial) = (now, self.measured.saturating_add(1), 0);
    }

    fn next(&mut self, typical: Duration, quick: Duration, busiest: u32, most: u32) -> u32 {
        let limit = self.limit.clamp(LEAST.min(most), most);
        if typical > quick {
            if busiest <= LEAST {
                return limit;
            }
            // What was inside was too much. A limit that it was far below would not be felt.
            let felt = limit.min(busiest);
            self.slow_from = felt;
            let share = quick.as_secs_f64() / typical.as_secs_f64();
            return scaled(felt, share).max(felt / 2).max(LEAST).min(most);
        }
        // One that nobody comes up against says nothing of whether more would do.
        if busiest < limit {
            return limit;
        }
        if limit >= self.slow_from {
            self.slow_from = u32::MAX;
        }
        let step = if limit.saturating_mul(2) <= self.slow_from { limit / 2 } else { limit / 8 };
        (limit + step.max(1)).min(most)
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of the limit")]
fn scaled(limit: u32, share: f64) -> u32 {
    (f64::from(limit) * share) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    const MOST: u32 = 75;
    const TICK: Duration = Duration::from_millis(25);
    const A_MINUTE: usize = 2_400;

    /// Something that does `room` calls at once as quickly as it can, and is as much slower as more are inside.
    struct Model {
        room: u32,
        /// What probes take while nobody is in their way, one after the other.
        pods: Vec<Duration>,
        /// Probes vary by up to this factor, either way.
        varies: f64,
        /// Calls of others that are inside, whom this limit does not hold back.
        others: u32,
        limit: AdaptiveLimit,
        now: Instant,
        random: SmallRng,
        probes: usize,
    }

    impl Model {
        fn new(room: u32, unloaded: Duration) -> Self {
            let now = Instant::now();
            let random = SmallRng::seed_from_u64(7);
            let limit = AdaptiveLimit::new(now);
            Self { room, pods: vec![unloaded], varies: 1.0, others: 0, limit, now, random, probes: 0 }
        }

        /// As many as `wanted` try to be inside, for `probes` probes. The answer: what the limit was, from probe to probe.
        fn run(&mut self, wanted: u32, probes: usize) -> Vec<u32> {
            let mut limits = Vec::new();
            for _ in 0..probes {
                let inside = wanted.min(self.limit.limit(MOST));
                let load = (inside + self.others).max(self.room);
                let unloaded = self.pods[self.probes % self.pods.len()] * load / self.room;
                let took = unloaded.mul_f64(self.varies.powf(self.random.random_range(-1.0..=1.0)));
                self.now += TICK;
                self.probes += 1;
                self.limit.take(self.now, took, inside, MOST, true);
                limits.push(self.limit.limit(MOST));
            }
            limits
        }
    }

    fn mean(limits: &[u32]) -> u32 {
        limits.iter().sum::<u32>() / u32::try_from(limits.len()).unwrap()
    }

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// It is slow from twice as many on as there is room for. A quick one may be half a millisecond slower, too.
    #[rstest::rstest]
    #[case::small(2, 2_000, 2..=5)]
    #[case::quick(2, 200, 3..=8)]
    #[case::medium(8, 2_000, 8..=18)]
    #[case::large(60, 2_000, 70..=MOST)]
    fn it_finds_what_there_is_room_for_and_stays_there(
        #[case] room: u32,
        #[case] micros: u64,
        #[case] expected: RangeInclusive<u32>,
        #[values(1.0, 1.5)] varies: f64,
    ) {
        let mut model = Model::new(room, Duration::from_micros(micros));
        model.varies = varies;
        model.run(1, 24);
        model.run(200, 100);
        for minute in 1..=10 {
            let limits = model.run(200, A_MINUTE);
            assert!(expected.contains(&mean(&limits)), "minute {minute}: {}, {:?}", mean(&limits), model.limit);
        }
    }

    /// Whatever probes take by themselves, however much that varies: nobody is held back where there is room for all.
    #[rstest::rstest]
    #[case::vary(&[2], 3.0)]
    #[case::vary_a_little(&[10], 2.0)]
    #[case::one_slow_pod_of_three(&[2, 2, 20], 1.2)]
    #[case::one_quick_pod_of_three(&[1, 3, 3], 1.2)]
    #[case::two_slow_pods_of_three(&[2, 20, 20], 1.2)]
    fn it_holds_nobody_back_where_there_is_room(
        #[case] pods: &[u64],
        #[case] varies: f64,
        #[values(1, 30, 200)] before: u32,
    ) {
        let mut model = Model::new(200, millis(1));
        (model.pods, model.varies) = (pods.iter().copied().map(millis).collect(), varies);
        model.run(before, A_MINUTE);
        for minute in 1..=5 {
            let limits = model.run(200, A_MINUTE);
            assert!(mean(&limits) >= MOST * 8 / 10, "minute {minute}: {}, {:?}", mean(&limits), model.limit);
        }
    }

    /// With one bound for all, either a purchase was twice as slow or half of a healthy sale stood outside.
    #[test]
    fn the_steadier_probes_are_the_less_slower_they_may_become() {
        let found = |varies| {
            let mut model = Model::new(20, millis(4));
            model.varies = varies;
            model.run(1, A_MINUTE);
            model.run(200, A_MINUTE);
            mean(&model.run(200, A_MINUTE))
        };
        let (steady, noisy) = (found(1.05), found(3.0));
        assert!((20..=27).contains(&steady) && (28..=40).contains(&noisy), "{steady} {noisy}");
    }

    #[test]
    fn it_falls_within_two_seconds_and_rises_within_four() {
        let mut model = Model::new(2, millis(1));
        model.run(1, 24);
        model.run(200, 80);
        assert!(model.limit.limit(MOST) <= 6, "{:?}", model.limit);
        model.room = 200;
        model.run(200, 160);
        assert_eq!(model.limit.limit(MOST), MOST);
    }

    #[test]
    fn a_moment_in_which_all_stands_still_costs_little() {
        let mut model = Model::new(200, millis(1));
        model.run(3, 80);
        model.pods = vec![millis(200)];
        model.run(3, 12);
        model.pods = vec![millis(1)];
        model.run(3, 80);
        model.run(200, 120);
        assert_eq!(model.limit.limit(MOST), MOST, "{:?}", model.limit);
    }

    /// As a pod that is added during the sale: it has never seen it quiet.
    #[test]
    fn one_that_starts_under_load_finds_out_what_it_is_like_without() {
        let mut model = Model::new(2, millis(2));
        model.run(200, 200);
        assert!(mean(&model.run(200, A_MINUTE)) <= 6, "{:?}", model.limit);
    }

    #[test]
    fn what_nobody_comes_up_against_does_not_rise() {
        let mut model = Model::new(1, millis(1));
        model.run(1, 24);
        model.run(200, 48);
        let limit = model.limit.limit(MOST);
        model.room = 200;
        model.run(1, 400);
        assert_eq!(model.limit.limit(MOST), limit);
    }

    /// As after a failover to a place further away; and by others, who are not held back here.
    #[rstest::rstest]
    #[case::further_away(10, 0)]
    #[case::others(1, 2_000)]
    fn what_is_slow_without_those_calls_is_not_blamed_on_them(#[case] unloaded: u64, #[case] others: u32) {
        let mut model = Model::new(200, millis(1));
        model.run(200, 400);
        (model.pods, model.others) = (vec![millis(unloaded)], others);
        model.run(200, 2 * A_MINUTE);
        assert!(mean(&model.run(200, A_MINUTE)) >= MOST * 9 / 10, "{:?}", model.limit);
    }

    #[test]
    fn a_trial_is_short() {
        let mut model = Model::new(8, millis(2));
        model.run(1, 24);
        model.run(200, 200);
        let limits = model.run(200, 10 * A_MINUTE);
        let least = limits.iter().filter(|limit| **limit == LEAST).count();
        assert!((10..=120).contains(&least), "{least} of {}", limits.len());
    }

    proptest::proptest! {
        #[test]
        fn it_is_never_less_than_the_least_nor_more_than_there_is_room_for(
            probes in proptest::collection::vec((0_u64..2_000_000, 0_u32..200, 1_u32..200, proptest::bool::ANY), 1..200),
        ) {
            let mut now = Instant::now();
            let mut limit = AdaptiveLimit::new(now);
            for (micros, inside, most, holds) in probes {
                now += Duration::from_micros(micros) + TICK;
                limit.take(now, Duration::from_micros(micros), inside, most, holds);
                proptest::prop_assert!((LEAST.min(most)..=most).contains(&limit.limit(most)));
            }
        }
    }
}
