use super::*;
use proptest::prelude::*;

const START: i64 = 1_800_000_000_000;

fn settings() -> WaitingRoomSettings {
    WaitingRoomSettings {
        exit_for_ms: 5_000,
        min_admit_per_second: 2,
        max_admit_per_second: 102,
        admission_ttl_ms: 60_000,
        ..WaitingRoomSettings::default()
    }
}

fn quiet() -> Report {
    Report { settings: settings(), ..Report::default() }
}

fn loaded(load_percent: u32) -> Report {
    Report { load_percent, ..quiet() }
}

fn arriving(arrivals: u32) -> Report {
    Report { arrivals, ..quiet() }
}

fn with_orders(completed: u32, refused: u32, failed: u32) -> Report {
    Report { orders: Orders { completed, refused, failed }, ..quiet() }
}

/// A room, and the time.
struct Clock {
    room: Room,
    now: i64,
}

impl Clock {
    fn new() -> Self {
        let mut clock = Self { room: Room::default(), now: START };
        clock.after(0, &quiet());
        clock
    }

    fn opened() -> Self {
        let mut clock = Self::new();
        assert!(clock.after(100, &loaded(80)).is_open);
        clock
    }

    fn after(&mut self, ms: i64, report: &Report) -> View {
        self.now += ms;
        self.room.take(self.now, report, 0, Uuid::nil())
    }
}

#[rstest::rstest]
#[case::idle(quiet(), 0, false)]
#[case::just_below(loaded(79), 0, false)]
#[case::at_the_load(loaded(80), 0, true)]
#[case::booking_is_busy(loaded(10), 85, true)]
#[case::one_was_refused(with_orders(50, 1, 0), 0, true)]
#[case::failures_are_no_load(with_orders(0, 0, 50), 0, false)]
fn it_opens_at_the_load_that_the_policy_names(#[case] report: Report, #[case] own_load: u32, #[case] opens: bool) {
    let mut clock = Clock::new();
    clock.now += 300;
    let view = clock.room.take(clock.now, &Report { arrivals: 3, ..report }, own_load, Uuid::nil());
    assert_eq!((view.is_open, view.first, view.drawn), (opens, u64::from(opens), if opens { 3 } else { 0 }));
    assert_eq!(view.waiting(), if opens { 3 } else { 0 });
}

#[test]
fn it_closes_once_nobody_waits_and_the_load_has_been_low_for_long_enough() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(5));
    let mut closed_after = None;
    for second in 1..=30 {
        let load = if second == 8 { 60 } else { 50 };
        if !clock.after(1_000, &loaded(load)).is_open {
            closed_after = Some(second);
            break;
        }
    }
    // Five wait for two seconds or three; then a load of 60 in the eighth one, and five calm ones after it.
    assert_eq!(closed_after, Some(13));
    assert_eq!(clock.room.admitted, clock.room.drawn);
    let mut clock = Clock::opened();
    clock.after(0, &arriving(10_000));
    for _ in 0..20 {
        assert!(clock.after(1_000, &quiet()).is_open, "somebody waits");
    }
}

#[test]
fn numbers_are_let_in_by_the_rate_in_order_and_the_rest_of_one_is_kept() {
    let mut clock = Clock::opened();
    assert!((clock.room.rate - 2.0).abs() < f64::EPSILON, "nothing was measured: the least");
    assert_eq!(clock.after(0, &arriving(100)).first, 1);
    assert_eq!(clock.after(0, &arriving(50)).first, 101);
    let admitted: Vec<_> = (0..8).map(|_| clock.after(100, &quiet()).admitted).collect();
    assert_eq!(admitted, [0, 0, 0, 0, 1, 1, 1, 1]);
}

/// What booking completes before it is too much is where the rate begins.
#[test]
fn it_begins_with_what_booking_was_measured_to_complete() {
    let mut clock = Clock::new();
    clock.after(1_000, &with_orders(40, 0, 0));
    let view = clock.after(200, &loaded(90));
    assert!((view.rate - 40.0).abs() < 1e-9, "{}", view.rate);
}

#[test]
fn the_rate_doubles_until_booking_cannot_follow_then_it_is_what_booking_completes() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(100_000));
    let rates: Vec<_> = (0..3).map(|_| clock.after(1_000, &quiet()).rate).collect();
    assert_eq!(rates.map_tenths(), [20, 20, 20], "it holds after the window with the high load that opened it");
    let mut clock = Clock::new();
    let view = clock.after(100, &with_orders(0, 1, 0));
    assert!(view.is_open);
    clock.room.window = Window { began_at: clock.now, ..Window::default() };
    clock.after(0, &arriving(100_000));
    let rates: Vec<_> = (0..5).map(|_| clock.after(1_000, &with_orders(30, 0, 0)).rate).collect();
    assert_eq!(rates.map_tenths(), [40, 80, 160, 320, 640]);
    assert!((clock.after(1_000, &with_orders(40, 9, 0)).rate - 36.0).abs() < 1e-9, "nine tenths of 40");
    assert!((clock.after(1_000, &with_orders(40, 9, 0)).rate - 32.4).abs() < 1e-9, "at least by a tenth");
    assert!((clock.after(1_000, &with_orders(1, 9, 0)).rate - 16.2).abs() < 1e-9, "at most by half");
    let rates: Vec<_> = (0..4).map(|_| clock.after(1_000, &with_orders(16, 0, 0)).rate).collect();
    assert_eq!(rates.map_tenths(), [162, 162, 182, 202], "it holds, then it rises by a fiftieth of the range");
}

trait Tenths {
    fn map_tenths(&self) -> Vec<i64>;
}

impl Tenths for Vec<f64> {
    #[expect(clippy::cast_possible_truncation, reason = "small numbers")]
    fn map_tenths(&self) -> Vec<i64> {
        self.iter().map(|rate| (rate * 10.0).round() as i64).collect()
    }
}

#[rstest::rstest]
#[case::all_is_well(with_orders(100, 0, 0), false)]
#[case::one_refused_of_many(with_orders(200, 1, 0), false)]
#[case::some_refused(with_orders(100, 2, 0), true)]
#[case::few_failed(with_orders(100, 0, 5), false)]
#[case::many_failed(with_orders(50, 0, 10), true)]
#[case::busy(loaded(80), true)]
fn the_rate_falls_when_booking_cannot_follow(#[case] report: Report, #[case] falls: bool) {
    let mut clock = Clock::new();
    clock.after(1_000, &with_orders(50, 1, 0));
    clock.after(0, &arriving(1_000));
    let before = clock.after(1_000, &with_orders(50, 0, 0)).rate;
    assert_eq!(clock.after(1_000, &report).rate < before, falls);
}

#[test]
fn an_outage_lets_nobody_in_and_takes_no_place_away() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(1_000));
    let before = clock.after(1_000, &quiet()).admitted;
    let view = clock.after(1_800_000, &quiet());
    assert!(view.is_open && view.drawn == 1_000);
    assert!(view.admitted <= before + 9, "two seconds' worth: {view:?}");
    assert_eq!(view.lapsed, 0, "admissions last as long as if there had been none");
}

#[test]
fn a_room_that_nobody_has_asked_about_for_an_hour_is_over() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(1_000));
    let view = clock.after(FORGOTTEN_MS + 1, &quiet());
    assert_eq!((view.is_open, view.drawn, view.admitted, view.lapsed), (false, 1_000, 1_000, 1_000));
    assert_eq!(clock.after(100, &Report { arrivals: 1, ..loaded(90) }).first, 1_001, "no number is there twice");
}

/// It may be used for as long as the policy says, and at most twice as long.
#[test]
fn an_admission_lapses() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(1));
    let mut admitted_at = None;
    let mut lapsed_at = None;
    for _ in 0..2_000 {
        let view = clock.after(100, &quiet());
        admitted_at = admitted_at.or((view.admitted >= 1).then_some(clock.now));
        lapsed_at = lapsed_at.or((view.lapsed >= 1).then_some(clock.now));
    }
    let lasted = lapsed_at.unwrap() - admitted_at.unwrap();
    assert!((60_000..=120_000).contains(&lasted), "{lasted}");
}

#[test]
fn a_clock_that_is_set_back_stops_nothing() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(100));
    let before = clock.after(1_000, &quiet());
    let view = clock.after(-500_000, &quiet());
    assert_eq!((view.admitted, view.drawn, view.is_open), (before.admitted, 100, true));
    assert!((0..20).any(|_| clock.after(1_000, &quiet()).admitted > before.admitted), "nobody is let in any more");
}

#[test]
fn what_is_written_down_is_read_and_so_is_what_a_version_before_wrote() {
    let mut clock = Clock::opened();
    clock.after(0, &arriving(7));
    let text = serde_json::to_string(&clock.room).unwrap();
    assert_eq!(serde_json::from_str::<Room>(&text).unwrap(), clock.room);
    let less: Room = serde_json::from_str(r#"{"drawn": 7, "admitted": 3, "isOpen": true, "later": 1}"#).unwrap();
    assert_eq!((less.drawn, less.admitted, less.is_open), (7, 3, true));
}

/// A closed loop: buyers who come a moment after they are let in, and a booking that completes `capacity` a second.
#[test]
fn the_rate_settles_at_what_booking_can_do() {
    let capacity = 40;
    let mut clock = Clock::opened();
    clock.after(0, &arriving(10_000));
    let mut come = std::collections::VecDeque::from([0_u64; 2]);
    let (mut admitted, mut completed, mut refused) = (0, 0, 0);
    for second in 0..200 {
        let orders = come.pop_front().unwrap();
        let done = orders.min(capacity);
        if second >= 20 {
            completed += done;
            refused += orders - done;
        }
        // Who is refused comes again.
        come[0] += orders - done;
        let report = with_orders(u32::try_from(done).unwrap(), u32::try_from(orders - done).unwrap(), 0);
        let view = clock.after(1_000, &report);
        come.push_back(view.admitted - admitted);
        admitted = view.admitted;
    }
    assert!(completed > 180 * capacity * 8 / 10, "{completed} completed: booking is used");
    assert!(refused < completed / 5, "{refused} refused of {completed}: and not flooded");
}

#[derive(Clone, Debug)]
struct Step {
    ms: i64,
    report: Report,
    own_load: u32,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        prop_oneof![9 => 0..1_500_i64, 1 => -10_000..4_000_000_i64],
        (0..300_u32, 0..150_u32, 0..150_u32),
        (0..100_u32, 0..20_u32, 0..20_u32),
        (1..20_u32, 0..200_u32),
    );
    let step = step.prop_map(|(ms, (arrivals, load_percent, own_load), (completed, refused, failed), (min, max))| {
        let settings = WaitingRoomSettings { min_admit_per_second: min, max_admit_per_second: max, ..settings() };
        let orders = Orders { completed, refused, failed };
        Step { ms, report: Report { settings, arrivals, load_percent, orders }, own_load }
    });
    proptest::collection::vec(step, 1..200)
}

proptest! {
    #[test]
    fn whatever_is_reported_numbers_are_drawn_once_and_let_in_in_order(steps in steps()) {
        let mut room = Room::default();
        let (mut now, mut before) = (START, View::default());
        for Step { ms, report, own_load } in steps {
            now += ms;
            let was_forgotten = now - room.moved_at > FORGOTTEN_MS;
            let view = room.take(now, &report, own_load, Uuid::nil());
            // Each number once, one after the other.
            prop_assert_eq!(view.first, if view.is_open && report.arrivals > 0 { before.drawn + 1 } else { 0 });
            prop_assert_eq!(view.drawn, before.drawn + if view.first > 0 { u64::from(report.arrivals) } else { 0 });
            // Who was let in stays so, nobody is before it is drawn, and nobody waits outside of an open room.
            prop_assert!(view.admitted >= before.admitted && view.admitted <= view.drawn);
            prop_assert!(view.lapsed >= before.lapsed && view.lapsed <= view.admitted);
            prop_assert!(view.is_open || view.admitted == view.drawn);
            // Within the bounds, and no more at once than two seconds and the burst.
            let (min, max) = (report.settings.min_admit_per_second, report.settings.max_admit_per_second);
            let max = f64::from(max.max(min));
            if view.is_open {
                prop_assert!(view.rate >= f64::from(min) && view.rate <= max, "{:?}", view);
                if before.is_open && !was_forgotten {
                    let let_in = f64::from(u32::try_from(view.admitted - before.admitted).unwrap());
                    prop_assert!(let_in <= max * 2.0 + 101.0, "{let_in} at once");
                }
            }
            before = view;
        }
    }
}
