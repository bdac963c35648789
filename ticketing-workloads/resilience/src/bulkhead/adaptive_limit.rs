//! How many of the less important calls a bulkhead lets in at once, so that the more important ones do not become slow.
//!
//! Slots that are kept are of no use where what is behind the bulkhead has less room than the bulkhead: a call with a slot
//! waits there, for a processor or a connection, among all that came in before it. How full that is shows in how long a probe takes
//! that is always the same. Its fastest time of late is what it takes when nobody is in its way. While most probes take a good
//! deal longer, fewer calls are let in; while they do not, and calls wait, more. (So do TCP Vegas, and the gradient of
//! Envoy's adaptive concurrency filter, with the round trip.)
//!
//! A function of what was measured, and of the time.

use std::time::Duration;
use tokio::time::Instant;

/// Probes of which the slower half decides.
const PROBES: usize = 4;
/// A probe is slow from this multiple of the fastest on,
const SLOW: u32 = 2;
/// and this much more: below, it is chance.
const CHANCE: Duration = Duration::from_micros(500);
/// How long the fastest probe is remembered, at least; at most twice that. Not long, as what is behind may have moved further
/// away. While few calls are let in, a probe is as fast as it can be.
const MEMORY: Duration = Duration::from_secs(30);
/// So many less important calls are let in whatever the probes say: there is no end to a sale that cannot begin.
pub const LEAST: u32 = 2;
/// The limit falls to no less than this part of itself at once.
const MOST_STEP: u32 = 8;

/// The limit, and what it follows.
#[derive(Clone, Debug)]
pub struct AdaptiveLimit {
    limit: u32,
    /// The fastest probe of this while and of the one before.
    fastest: [Duration; 2],
    since: Instant,
    probes: Vec<Duration>,
    busiest: u32,
}

impl AdaptiveLimit {
    /// No limit yet.
    pub fn new(now: Instant) -> Self {
        Self {
            limit: u32::MAX,
            fastest: [Duration::MAX; 2],
            since: now,
            probes: Vec::with_capacity(PROBES),
            busiest: 0,
        }
    }

    /// Less important calls that may be inside at once, of the `most` that the bulkhead has room for otherwise.
    pub fn limit(&self, most: u32) -> u32 {
        self.limit.max(LEAST).min(most)
    }

    /// A probe took so long while `inside` less important calls were inside, of at most `most`.
    pub fn take(&mut self, now: Instant, took: Duration, inside: u32, most: u32) {
        if now.duration_since(self.since) >= MEMORY {
            self.fastest = [Duration::MAX, self.fastest[0]];
            self.since = now;
        }
        self.fastest[0] = self.fastest[0].min(took);
        self.busiest = self.busiest.max(inside);
        self.probes.push(took);
        if self.probes.len() < PROBES {
            return;
        }
        self.probes.sort_unstable();
        let typical = self.probes[PROBES / 2];
        let busiest = std::mem::take(&mut self.busiest);
        self.probes.clear();
        self.limit = self.next(typical, busiest, most);
    }

    fn next(&self, typical: Duration, busiest: u32, most: u32) -> u32 {
        let limit = self.limit(most);
        let quick = self.fastest[0].min(self.fastest[1]).saturating_mul(SLOW).saturating_add(CHANCE);
        if typical > quick {
            // What was inside was too much. A limit that it was far below would not be felt.
            let share = quick.as_secs_f64() / typical.as_secs_f64();
            let felt = limit.min(busiest.max(1));
            return scaled(felt, share).max(felt / MOST_STEP).max(LEAST).min(limit);
        }
        // One that nobody comes up against says nothing of whether more would do.
        if busiest >= limit { limit + (limit / 4).max(1) } else { limit }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of the limit")]
fn scaled(limit: u32, share: f64) -> u32 {
    (f64::from(limit) * share) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u32 = 75;
    const TICK: Duration = Duration::from_millis(50);

    /// Something that does `room` calls at once as quickly as it can, and is as much slower as more are inside.
    struct Model {
        room: u32,
        unloaded: Duration,
        limit: AdaptiveLimit,
        now: Instant,
    }

    impl Model {
        fn new(room: u32, unloaded: Duration) -> Self {
            let now = Instant::now();
            Self { room, unloaded, limit: AdaptiveLimit::new(now), now }
        }

        /// As many as `wanted` try to be inside, for `probes` probes. The answer: the most that were at the end.
        fn run(&mut self, wanted: u32, probes: usize) -> u32 {
            let mut inside = Vec::new();
            for _ in 0..probes {
                self.now += TICK;
                inside.push(wanted.min(self.limit.limit(MOST)));
                let inside = *inside.last().unwrap();
                let took = self.unloaded * inside.max(self.room) / self.room;
                self.limit.take(self.now, took, inside, MOST);
            }
            inside.split_off(probes - probes.min(40)).into_iter().max().unwrap()
        }
    }

    /// Twice as many as there is room for are as slow as a probe may be; a quick one may be half a millisecond slower, too.
    #[rstest::rstest]
    #[case::small(2, 200, 8..=12)]
    #[case::medium(8, 2_000, 14..=24)]
    #[case::large(40, 2_000, MOST..=MOST)]
    fn it_finds_what_there_is_room_for(
        #[case] room: u32,
        #[case] micros: u64,
        #[case] expected: std::ops::RangeInclusive<u32>,
    ) {
        let mut model = Model::new(room, Duration::from_micros(micros));
        model.run(1, 8);
        let most = model.run(200, 400);
        assert!(expected.contains(&most), "{most}");
    }

    #[test]
    fn it_falls_within_a_second_and_rises_within_five() {
        let mut model = Model::new(2, Duration::from_millis(1));
        model.run(1, 8);
        model.run(200, 20);
        assert!(model.limit.limit(MOST) <= 6, "{:?}", model.limit);
        model.room = 200;
        model.run(200, 100);
        assert_eq!(model.limit.limit(MOST), MOST);
    }

    #[test]
    fn one_slow_probe_of_four_is_chance() {
        let mut model = Model::new(200, Duration::from_millis(1));
        model.run(200, 8);
        for _ in 0..100 {
            model.run(200, 3);
            model.now += TICK;
            model.limit.take(model.now, Duration::from_millis(500), MOST, MOST);
        }
        assert_eq!(model.limit.limit(MOST), MOST);
    }

    #[test]
    fn what_nobody_comes_up_against_does_not_rise() {
        let mut model = Model::new(1, Duration::from_millis(1));
        model.run(1, 8);
        model.run(200, 40);
        let limit = model.limit.limit(MOST);
        model.room = 200;
        model.run(1, 400);
        assert_eq!(model.limit.limit(MOST), limit);
    }

    /// As after a failover to a place further away.
    #[test]
    fn what_has_become_slower_for_good_is_not_taken_for_full_for_more_than_a_minute() {
        let mut model = Model::new(200, Duration::from_millis(1));
        model.run(200, 400);
        model.unloaded = Duration::from_millis(10);
        model.run(200, 100);
        assert_eq!(model.limit.limit(MOST), LEAST, "at first it is");
        let probes = usize::try_from(2 * MEMORY.as_millis() / TICK.as_millis()).unwrap() + 100;
        model.run(200, probes);
        assert_eq!(model.limit.limit(MOST), MOST);
    }

    proptest::proptest! {
        #[test]
        fn it_is_never_less_than_the_least_nor_more_than_there_is_room_for(
            probes in proptest::collection::vec((0_u64..2_000_000, 0_u32..200, 1_u32..200), 1..200),
        ) {
            let mut now = Instant::now();
            let mut limit = AdaptiveLimit::new(now);
            for (micros, inside, most) in probes {
                now += Duration::from_micros(micros) + TICK;
                limit.take(now, Duration::from_micros(micros), inside, most);
                proptest::prop_assert!((LEAST.min(most)..=most).contains(&limit.limit(most)));
            }
        }
    }
}
