use super::*;
use proptest::prelude::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn stage(name: &str, enter_percent: u32) -> Stage {
    Stage { name: name.into(), enter_percent, exit_percent: enter_percent - 20 }
}

/// The stages of the issue: mail and tickets later, inventory from the cache, the waiting room.
fn settings() -> Settings {
    Settings {
        mode: Mode::Auto,
        stages: vec![stage("mail", 80), stage("cache", 90), stage("room", 95)],
        enter_for_ms: 10_000,
        exit_for_ms: 60_000,
        min_duration_ms: 60_000,
        quorum: Quorum::Percent(50),
        circuits: BTreeSet::from(["stripe".to_owned()]),
    }
}

fn pod(load_percent: u32) -> Reading {
    Reading { ready: true, heard: true, load_percent, ..Reading::default() }
}

fn unheard() -> Reading {
    Reading { ready: true, ..Reading::default() }
}

fn open() -> Reading {
    Reading { open_circuits: BTreeSet::from(["stripe".to_owned()]), ..pod(10) }
}

fn fleet(pods: &[Reading]) -> Vec<Workload> {
    vec![Workload { name: "booking".into(), pods: pods.to_vec() }]
}

fn loads(loads: &[u32]) -> Vec<Workload> {
    fleet(&loads.iter().copied().map(pod).collect::<Vec<_>>())
}

/// The levels after readings at these seconds, out of the normal state.
fn levels(settings: &Settings, readings: &[(i64, &[u32])]) -> Vec<usize> {
    let mut state = State::normal(at(0));
    let step = |(second, pods): &(i64, &[u32])| {
        state = decide(settings, &loads(pods), state, at(*second)).state;
        state.level
    };
    readings.iter().map(step).collect()
}

#[rstest::rstest]
#[case::at_once_nothing(&[(0, 99)], &[0])]
#[case::after_its_time(&[(0, 85), (9, 85), (10, 85)], &[0, 0, 1])]
#[case::a_dip_starts_the_time_over(&[(0, 85), (9, 79), (10, 85), (19, 85), (20, 85)], &[0, 0, 0, 0, 1])]
#[case::one_by_one(&[(0, 99), (10, 99), (20, 99), (30, 99), (99, 99)], &[0, 1, 2, 3, 3])]
#[case::one_by_one_however_late(&[(0, 99), (500, 99), (501, 99)], &[0, 1, 1])]
#[case::down_one_by_one(
    &[(0, 99), (10, 99), (20, 99), (30, 0), (89, 0), (90, 0), (149, 0), (150, 0)],
    &[0, 1, 2, 2, 2, 1, 1, 0]
)]
#[case::between_its_two_loads_a_stage_stays(&[(0, 85), (10, 85), (20, 61), (999, 60)], &[0, 1, 1, 1])]
#[case::each_stage_has_its_own_end(&[(0, 99), (10, 99), (20, 99), (30, 69), (90, 69), (999, 69)], &[0, 1, 2, 2, 1, 1])]
fn stages_follow_the_load(#[case] readings: &[(i64, u32)], #[case] expected: &[usize]) {
    let readings: Vec<_> = readings.iter().map(|(second, load)| (*second, std::slice::from_ref(load))).collect();
    assert_eq!(levels(&settings(), &readings), expected);
}

#[test]
fn a_stage_lasts_for_its_least_duration() {
    let settings = Settings { exit_for_ms: 0, min_duration_ms: 300_000, ..settings() };
    let readings: [(i64, &[u32]); 5] = [(0, &[85]), (10, &[85]), (11, &[0]), (309, &[0]), (310, &[0])];
    assert_eq!(levels(&settings, &readings), [0, 1, 1, 1, 0]);
}

#[rstest::rstest]
#[case::half_of_four(Quorum::Percent(50), &[85, 85, 10, 10], 1)]
#[case::one_of_four(Quorum::Percent(50), &[99, 10, 10, 10], 0)]
#[case::two_of_three_is_half_of_three(Quorum::Percent(50), &[85, 85, 10], 1)]
#[case::one_of_three_is_not(Quorum::Percent(50), &[85, 10, 10], 0)]
#[case::a_count(Quorum::Count(2), &[85, 85, 10, 10, 10, 10], 1)]
#[case::a_count_of_more_than_there_are(Quorum::Count(5), &[85, 85], 1)]
#[case::none_is_one(Quorum::Count(0), &[85, 10], 1)]
#[case::the_only_one(Quorum::Percent(100), &[85], 1)]
fn it_takes_a_quorum(#[case] quorum: Quorum, #[case] pods: &[u32], #[case] expected: usize) {
    let settings = Settings { quorum, enter_for_ms: 0, ..settings() };
    assert_eq!(levels(&settings, &[(0, pods)]), [expected]);
}

/// A workload with few pods is not outvoted by one with many.
#[test]
fn each_workload_has_a_quorum_of_its_own() {
    let many = Workload { name: "gateway".into(), pods: vec![pod(1); 50] };
    let few = Workload { name: "booking".into(), pods: vec![pod(91), pod(85), pod(99)] };
    let settings = Settings { enter_for_ms: 0, ..settings() };
    let decision = decide(&settings, &[many, few], State::normal(at(0)), at(1));
    assert_eq!(decision.state.level, 1);
    assert_eq!(decision.why, "booking: 2 of 3 pods at 91 % or more");
}

#[test]
fn what_the_load_is_of_is_told() {
    let busy = Reading { cause: "queue critical".into(), ..pod(91) };
    let decision = decide(&settings(), &fleet(&[busy]), State::normal(at(0)), at(1));
    assert_eq!(decision.why, "booking: 1 of 1 pods at 91 % or more (queue critical)");
}

#[rstest::rstest]
#[case::nobody(&[unheard(), unheard()], true)]
#[case::too_few(&[pod(0), unheard(), unheard()], true)]
#[case::enough(&[pod(0), pod(0), unheard()], false)]
#[case::not_ready_does_not_count(&[pod(0), Reading::default(), Reading::default()], false)]
#[case::none_is_ready(&[Reading { heard: true, ..Reading::default() }], true)]
fn with_too_few_heard_nothing_changes(#[case] pods: &[Reading], #[case] stays: bool) {
    let degraded = State { level: 2, since: at(0), beyond: Some(Beyond { up: false, since: at(0) }) };
    let decision = decide(&settings(), &fleet(pods), degraded, at(900));
    assert_eq!(decision.state.level, if stays { 2 } else { 1 });
    assert_eq!((decision.unheard.is_some(), decision.state.beyond.is_none()), (stays, stays), "the time starts over");
    let busy: Vec<_> = pods.iter().map(|pod| Reading { load_percent: 99, ..pod.clone() }).collect();
    let normal = State { beyond: Some(Beyond { up: true, since: at(0) }), ..State::normal(at(0)) };
    assert_eq!(decide(&settings(), &fleet(&busy), normal, at(900)).state.level, usize::from(!stays));
}

/// A workload that is not heard may be the one that is overloaded.
#[test]
fn nothing_is_left_while_one_workload_is_not_heard() {
    let silent = Workload { name: "payment".into(), pods: vec![unheard()] };
    let both = [loads(&[0]).remove(0), silent];
    let degraded = State { level: 1, since: at(0), beyond: Some(Beyond { up: false, since: at(0) }) };
    let decision = decide(&settings(), &both, degraded, at(900));
    assert_eq!(decision.state.level, 1);
    assert_eq!(decision.unheard.as_deref(), Some("payment: 0 of 1 ready pods are heard"));
    let busy = [loads(&[99]).remove(0), both[1].clone()];
    let normal = State { beyond: Some(Beyond { up: true, since: at(0) }), ..State::normal(at(0)) };
    assert_eq!(decide(&settings(), &busy, normal, at(900)).state.level, 1, "another one enters all the same");
}

#[test]
fn open_circuits_of_a_quorum_bring_the_first_stage_about_and_hold_it() {
    let settings = settings();
    let few = fleet(&[open(), pod(10), pod(10)]);
    let many = fleet(&[open(), open(), pod(10)]);
    assert_eq!(decide(&settings, &few, State::normal(at(0)), at(1)).next_check, None);
    let begun = decide(&settings, &many, State::normal(at(0)), at(1));
    assert_eq!(begun.next_check, Some(at(11)));
    let entered = decide(&settings, &many, begun.state, at(11));
    assert_eq!((entered.state.level, entered.next_check), (1, None), "no further: that takes load");
    let why = "booking: the circuit of stripe is open in 2 of 3 pods; booking: 3 of 3 pods at 10 % or more";
    assert_eq!(entered.why, why);
    assert_eq!(decide(&settings, &many, entered.state, at(999)).state.level, 1);
    let from_above = State { level: 2, since: at(0), beyond: Some(Beyond { up: false, since: at(0) }) };
    assert_eq!(decide(&settings, &many, from_above, at(999)).state.level, 1);
    let others = Settings { circuits: BTreeSet::new(), ..settings };
    assert_eq!(decide(&others, &many, State::normal(at(0)), at(1)).next_check, None, "only those that are named");
}

#[rstest::rstest]
#[case::all(Mode::Forced(3), 0, 3)]
#[case::one(Mode::Forced(1), 0, 1)]
#[case::fewer_than_there_were(Mode::Forced(1), 3, 1)]
#[case::more_than_there_are(Mode::Forced(9), 0, 3)]
#[case::none(Mode::Disabled, 3, 0)]
fn a_person_decides_at_once(#[case] mode: Mode, #[case] before: usize, #[case] expected: usize) {
    let before = State { level: before, since: at(0), beyond: None };
    for pods in [loads(&[50]), fleet(&[unheard()]), Vec::new()] {
        let decision = decide(&Settings { mode, ..settings() }, &pods, before, at(9));
        assert_eq!((decision.state.level, decision.changed_from), (expected, Some(before.level)));
        let again = decide(&Settings { mode, ..settings() }, &pods, decision.state, at(99));
        assert_eq!((again.state, again.changed_from), (decision.state, None), "and it stands still after that");
    }
}

#[test]
fn what_a_person_forced_is_left_in_order() {
    let forced = State { level: 3, since: at(0), beyond: None };
    let begun = decide(&settings(), &loads(&[0]), forced, at(100)).state;
    assert_eq!(begun.level, 3);
    assert_eq!(decide(&settings(), &loads(&[0]), begun, at(160)).state.level, 2);
}

#[test]
fn a_fleet_without_pods_is_not_degraded_and_one_with_fewer_stages_has_those() {
    let before = State { level: 3, since: at(0), beyond: None };
    assert_eq!(decide(&settings(), &[], before, at(1)).state, State::normal(at(1)));
    let mut fewer = settings();
    fewer.stages.truncate(1);
    assert_eq!(decide(&fewer, &loads(&[99]), before, at(1)).state.level, 1);
}

#[rstest::rstest]
#[case::by_name("cache", 1, 5, (2, 5))]
#[case::renamed("gone", 1, 5, (1, 5))]
#[case::more_than_there_are("gone", 99, 5, (3, 5))]
#[case::of_tomorrow("cache", 2, 5_000, (2, 10))]
fn what_was_written_down_is_believed_as_far_as_it_can_be(
    #[case] stage: &str,
    #[case] level: usize,
    #[case] since: i64,
    #[case] expected: (usize, i64),
) {
    let state = State::restored(&settings(), stage, level, at(since), at(10));
    assert_eq!((state.level, state.since, state.beyond), (expected.0, at(expected.1), None));
}

#[test]
fn a_clock_that_went_back_stops_nothing() {
    let ahead = State { level: 0, since: at(9_000), beyond: Some(Beyond { up: true, since: at(9_000) }) };
    let decision = decide(&settings(), &loads(&[99]), ahead, at(0));
    assert_eq!(decision.next_check, Some(at(10)));
}

/// A reading of any pod, heard or not.
fn any_pod() -> impl Strategy<Value = Reading> {
    (0u32..130, prop::bool::weighted(0.9), prop::bool::weighted(0.9), prop::bool::weighted(0.1))
        .prop_map(|(load, ready, heard, is_open)| Reading { ready, heard, ..if is_open { open() } else { pod(load) } })
}

fn any_history() -> impl Strategy<Value = Vec<(i64, Vec<Reading>)>> {
    prop::collection::vec((0i64..40, prop::collection::vec(any_pod(), 1..6)), 1..120)
}

proptest! {
    /// Whatever pods say: no stage is skipped, and no two changes come sooner after each other than the times say.
    #[test]
    fn it_never_skips_a_stage_and_never_flaps(history in any_history()) {
        let settings = settings();
        let (mut state, mut second, mut last) = (State::normal(at(0)), 0, None::<(bool, i64)>);
        for (pause, pods) in history {
            second += pause;
            let before = state;
            let decision = decide(&settings, &fleet(&pods), before, at(second));
            state = decision.state;
            prop_assert!(state.level <= settings.stages.len());
            prop_assert_eq!(decision.changed_from, (state.level != before.level).then_some(before.level));
            if state.level == before.level {
                prop_assert_eq!(state.since, before.since);
                continue;
            }
            prop_assert_eq!(state.level.abs_diff(before.level), 1);
            prop_assert_eq!(state.since, at(second));
            let up = state.level > before.level;
            if let Some((_, changed)) = last {
                let least = if up { 10 } else { 60 };
                prop_assert!(second - changed >= least);
            }
            last = Some((up, second));
        }
    }

    /// What stays as it is comes to an end: after as many times as there are stages nothing changes any more.
    #[test]
    fn what_stays_the_same_comes_to_rest(pods in prop::collection::vec(any_pod(), 1..6), level in 0usize..=3) {
        let (settings, fleet) = (settings(), fleet(&pods));
        let mut state = State { level, since: at(0), beyond: None };
        let mut now = at(0);
        for _ in 0..10 {
            let decision = decide(&settings, &fleet, state, now);
            state = decision.state;
            match decision.next_check {
                Some(next) => now = next,
                None => break,
            }
        }
        let rest = decide(&settings, &fleet, state, at(999_999));
        prop_assert_eq!((rest.state.level, rest.next_check), (state.level, None));
    }

    /// More load never leads to fewer stages.
    #[test]
    fn more_load_is_never_less_degraded(
        histories in prop::collection::vec((1i64..90, prop::collection::vec((0u32..110, 0u32..30), 3)), 1..60)
    ) {
        let settings = Settings { enter_for_ms: 0, exit_for_ms: 0, min_duration_ms: 0, ..settings() };
        let (mut less, mut more, mut second) = (State::normal(at(0)), State::normal(at(0)), 0);
        for (pause, pods) in histories {
            second += pause;
            let low: Vec<_> = pods.iter().map(|(load, _)| *load).collect();
            let high: Vec<_> = pods.iter().map(|(load, extra)| load + extra).collect();
            less = decide(&settings, &loads(&low), less, at(second)).state;
            more = decide(&settings, &loads(&high), more, at(second)).state;
            prop_assert!(less.level <= more.level, "{:?} {:?}", less, more);
        }
    }

    /// The time at which it says that it changes is when it does.
    #[test]
    fn it_changes_when_it_says(pods in prop::collection::vec(any_pod(), 1..6), level in 0usize..=3) {
        let (settings, fleet) = (settings(), fleet(&pods));
        let begun = decide(&settings, &fleet, State { level, since: at(0), beyond: None }, at(5));
        if let Some(next) = begun.next_check {
            let sooner = Timestamp::from_millisecond(next.as_millisecond() - 1).unwrap();
            prop_assert_eq!(decide(&settings, &fleet, begun.state, sooner).changed_from, None);
            prop_assert_eq!(decide(&settings, &fleet, begun.state, next).changed_from, Some(level));
        }
    }
}
