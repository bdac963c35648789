use super::*;
use contract::SlowCallSettings;
use proptest::prelude::*;
use std::sync::Arc;

const MINUTE: Duration = Duration::from_secs(60);

fn settings() -> CircuitBreakerSettings {
    CircuitBreakerSettings::default()
}

fn ratio(percent: u32, minimum_throughput: u32, sampling_ms: u64) -> CircuitBreakerSettings {
    let trip = TripRule::FailureRatio { percent, minimum_throughput, sampling_ms };
    CircuitBreakerSettings { trip, ..settings() }
}

fn breaker(settings: CircuitBreakerSettings) -> Breaker {
    Breaker::new(settings, Box::new(|_, _| {}))
}

fn acquire(breaker: &Breaker) -> Result<Permit<'_>, Rejection> {
    breaker.acquire(Some(Instant::now() + MINUTE))
}

fn call(breaker: &Breaker, verdict: Verdict) -> bool {
    acquire(breaker).map(|permit| permit.finish(verdict)).is_ok()
}

fn fail(breaker: &Breaker, times: u32) {
    for _ in 0..times {
        assert!(call(breaker, Verdict::Failure));
    }
}

fn state(breaker: &Breaker) -> CircuitState {
    breaker.report().state
}

async fn pass(seconds: u64) {
    tokio::time::advance(Duration::from_secs(seconds)).await;
}

#[tokio::test(start_paused = true)]
async fn opens_after_five_failures_in_a_row_and_closes_after_a_good_trial() {
    let breaker = breaker(settings());
    fail(&breaker, 4);
    assert!(call(&breaker, Verdict::Success));
    fail(&breaker, 4);
    assert_eq!(state(&breaker), CircuitState::Closed);
    fail(&breaker, 1);
    assert_eq!(acquire(&breaker).err(), Some(Rejection::CircuitOpen { retry_in: Duration::from_secs(30) }));
    pass(29).await;
    assert!(acquire(&breaker).is_err());
    assert_eq!(breaker.report().open_for_ms, Some(29_000));
    pass(1).await;
    assert_eq!(state(&breaker), CircuitState::HalfOpen);
    assert!(call(&breaker, Verdict::Success));
    assert_eq!(breaker.report(), CircuitReport { state: CircuitState::Closed, open_for_ms: None, opened_total: 1 });
}

#[tokio::test(start_paused = true)]
async fn opens_at_a_share_of_failures_once_there_is_enough_traffic() {
    let breaker = breaker(ratio(50, 10, 30_000));
    for _ in 0..4 {
        call(&breaker, Verdict::Success);
        fail(&breaker, 1);
    }
    fail(&breaker, 1);
    assert_eq!(state(&breaker), CircuitState::Closed, "9 calls are too few");
    fail(&breaker, 1);
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_day_of_good_calls_does_not_hide_an_outage() {
    let breaker = breaker(ratio(50, 10, 30_000));
    for _ in 0..1_000 {
        call(&breaker, Verdict::Success);
    }
    pass(31).await;
    fail(&breaker, 10);
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn neutral_results_count_for_nothing() {
    let breaker = breaker(settings());
    fail(&breaker, 4);
    assert!(call(&breaker, Verdict::Neutral));
    fail(&breaker, 1);
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn lets_a_bounded_number_of_trials_through_and_needs_as_many_successes() {
    let breaker = breaker(CircuitBreakerSettings { half_open_max_requests: 3, ..settings() });
    fail(&breaker, 5);
    pass(30).await;
    let trials: Vec<_> = (0..3).map(|_| acquire(&breaker).unwrap()).collect();
    assert_eq!(acquire(&breaker).err(), Some(Rejection::TrialsUnderWay { trials: 3 }));
    for (index, trial) in trials.into_iter().enumerate() {
        assert_eq!(state(&breaker), CircuitState::HalfOpen, "after {index}");
        trial.finish(Verdict::Success);
    }
    assert_eq!(state(&breaker), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn failed_trials_make_the_break_grow_up_to_its_maximum() {
    let breaker = breaker(CircuitBreakerSettings { max_break_ms: Some(100_000), ..settings() });
    fail(&breaker, 5);
    for expected in [30, 60, 100, 100] {
        let retry_in = Duration::from_secs(expected);
        assert_eq!(acquire(&breaker).err(), Some(Rejection::CircuitOpen { retry_in }));
        pass(expected).await;
        fail(&breaker, 1);
    }
    pass(100).await;
    assert!(call(&breaker, Verdict::Success));
    fail(&breaker, 5);
    let first_again = Rejection::CircuitOpen { retry_in: Duration::from_secs(30) };
    assert_eq!(acquire(&breaker).err(), Some(first_again));
}

#[tokio::test(start_paused = true)]
async fn results_from_before_a_change_of_state_never_count() {
    let breaker = breaker(settings());
    let old: Vec<_> = (0..3).map(|_| acquire(&breaker).unwrap()).collect();
    fail(&breaker, 5);
    pass(30).await;
    let trial = acquire(&breaker).unwrap();
    for permit in old {
        permit.finish(Verdict::Success);
    }
    assert_eq!(state(&breaker), CircuitState::HalfOpen, "a success from before the outage closes nothing");
    trial.finish(Verdict::Failure);
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_trial_gives_its_place_back_and_a_late_one_is_a_failure() {
    let breaker = breaker(settings());
    fail(&breaker, 5);
    pass(30).await;
    drop(acquire(&breaker).unwrap());
    assert_eq!(state(&breaker), CircuitState::HalfOpen);
    let late = acquire(&breaker).unwrap();
    breaker.record_abandoned(late.ticket());
    drop(late);
    assert_eq!(state(&breaker), CircuitState::Open);
    pass(30).await;
    let late = acquire(&breaker).unwrap();
    let ticket = late.ticket();
    drop(late);
    breaker.record_abandoned(ticket);
    assert_eq!(state(&breaker), CircuitState::Open, "in whichever order they are told");
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_call_is_a_failure_while_closed_too() {
    let breaker = breaker(settings());
    for _ in 0..5 {
        let permit = acquire(&breaker).unwrap();
        breaker.record_abandoned(permit.ticket());
    }
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_trial_without_a_deadline_is_given_up_after_a_minute() {
    let breaker = breaker(settings());
    fail(&breaker, 5);
    pass(30).await;
    std::mem::forget(breaker.acquire(None).unwrap());
    pass(60).await;
    assert_eq!(state(&breaker), CircuitState::HalfOpen);
    pass(1).await;
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn says_what_became_of_every_call() {
    let breaker = breaker(settings());
    assert!(call(&breaker, Verdict::Success) && call(&breaker, Verdict::Neutral));
    fail(&breaker, 5);
    assert!(!call(&breaker, Verdict::Success));
    assert_eq!(breaker.totals(), Totals { successes: 1, failures: 5, ignored: 1, rejected: 1 });
}

/// Threads that fail, succeed and give up at once: afterwards the circuit still works.
#[test]
fn survives_many_threads() {
    let breaker = breaker(CircuitBreakerSettings { break_ms: 1, half_open_max_requests: 2, ..ratio(50, 10, 1_000) });
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let breaker = &breaker;
            scope.spawn(move || {
                for call in 0..20_000u64 {
                    let Ok(permit) = breaker.acquire(None) else { continue };
                    match (call.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ thread) >> 60 {
                        0..5 => permit.finish(Verdict::Failure),
                        5 => drop(permit),
                        _ => permit.finish(Verdict::Success),
                    }
                }
            });
        }
    });
    breaker.end_break();
    for _ in 0..2 {
        assert!(call(&breaker, Verdict::Success));
    }
    assert_eq!(state(&breaker), CircuitState::Closed);
    let Totals { successes, failures, ignored, rejected } = breaker.totals();
    assert_eq!(successes + failures + ignored + rejected, 80_002);
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_is_never_dropped_does_not_wedge_half_open() {
    let breaker = breaker(settings());
    fail(&breaker, 5);
    pass(30).await;
    std::mem::forget(breaker.acquire(Some(Instant::now() + Duration::from_secs(10))).unwrap());
    pass(10).await;
    assert!(acquire(&breaker).is_err(), "it may still come back");
    pass(1).await;
    assert_eq!(state(&breaker), CircuitState::Open);
    pass(30).await;
    assert!(call(&breaker, Verdict::Success));
    assert_eq!(state(&breaker), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn new_settings_keep_what_is_known() {
    let breaker = breaker(settings());
    fail(&breaker, 4);
    breaker.configure(CircuitBreakerSettings { break_ms: 60_000, ..settings() });
    fail(&breaker, 1);
    assert_eq!(state(&breaker), CircuitState::Open, "the four failures from before still count");
    pass(10).await;
    breaker.configure(CircuitBreakerSettings { break_ms: 20_000, ..settings() });
    let rest = Rejection::CircuitOpen { retry_in: Duration::from_secs(10) };
    assert_eq!(acquire(&breaker).err(), Some(rest), "the break under way has its new length");
    pass(10).await;
    let trial = acquire(&breaker).unwrap();
    breaker.configure(settings());
    trial.finish(Verdict::Success);
    assert_eq!(state(&breaker), CircuitState::Closed, "a permit outlives new settings");
}

#[tokio::test(start_paused = true)]
async fn a_new_rule_counts_from_when_it_applies() {
    let breaker = breaker(settings());
    for _ in 0..20 {
        fail(&breaker, 1);
        for _ in 0..9 {
            call(&breaker, Verdict::Success);
        }
    }
    breaker.configure(ratio(50, 10, 30_000));
    for _ in 0..19 {
        call(&breaker, Verdict::Success);
    }
    fail(&breaker, 1);
    assert_eq!(state(&breaker), CircuitState::Closed, "1 of 20 failed");
}

#[tokio::test(start_paused = true)]
async fn a_rule_of_tomorrow_means_the_default_rule() {
    let breaker = breaker(CircuitBreakerSettings { trip: TripRule::Unknown, ..settings() });
    fail(&breaker, 4);
    assert_eq!(state(&breaker), CircuitState::Closed);
    fail(&breaker, 1);
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_persons_word_holds_until_it_is_taken_back() {
    let held = |manual_state| CircuitBreakerSettings { manual_state, ..settings() };
    let breaker = breaker(held(ManualState::Open));
    breaker.configure(held(ManualState::Auto));
    breaker.configure(held(ManualState::Open));
    assert_eq!(acquire(&breaker).err(), Some(Rejection::HeldOpen));
    pass(3_600).await;
    assert_eq!((state(&breaker), breaker.report().open_for_ms), (CircuitState::Open, Some(3_600_000)));
    breaker.end_break();
    assert_eq!(acquire(&breaker).err(), Some(Rejection::HeldOpen));
    breaker.configure(held(ManualState::Closed));
    fail(&breaker, 50);
    assert_eq!(state(&breaker), CircuitState::Closed);
    breaker.configure(held(ManualState::Unknown));
    fail(&breaker, 5);
    assert_eq!(state(&breaker), CircuitState::Open, "an unknown word is nobody's");
}

#[tokio::test(start_paused = true)]
async fn slow_calls_open_it_and_a_slow_trial_keeps_it_open() {
    let slow_call = Some(SlowCallSettings { duration_ms: 1_000, percent: 50 });
    let breaker = breaker(CircuitBreakerSettings { slow_call, ..ratio(90, 4, 60_000) });
    assert_eq!(breaker.slow_from(), Some(Duration::from_secs(1)));
    let slow = || {
        let permit = acquire(&breaker).unwrap();
        breaker.record_slow(permit.ticket());
        permit.finish(Verdict::Success);
    };
    for _ in 0..2 {
        call(&breaker, Verdict::Success);
    }
    slow();
    assert_eq!(state(&breaker), CircuitState::Closed, "3 calls are too few");
    slow();
    assert_eq!(state(&breaker), CircuitState::Open);
    pass(30).await;
    slow();
    assert_eq!(state(&breaker), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_break_can_be_ended_when_the_cause_was_removed() {
    let breaker = breaker(settings());
    fail(&breaker, 5);
    breaker.end_break();
    assert_eq!(state(&breaker), CircuitState::HalfOpen);
    assert!(call(&breaker, Verdict::Success));
    assert_eq!(state(&breaker), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn tells_of_every_change_once() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let breaker = Breaker::new(settings(), Box::new(move |state, _| lock(&log).push(state)));
    fail(&breaker, 5);
    pass(30).await;
    assert!(call(&breaker, Verdict::Success));
    assert_eq!(*lock(&seen), [CircuitState::Open, CircuitState::HalfOpen, CircuitState::Closed]);
}

/// What a caller of the breaker may do.
#[derive(Clone, Debug)]
enum Step {
    Acquire,
    Finish(usize, Verdict),
    Cancel(usize),
    Pass(u64),
    Configure(u32, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let verdict = prop_oneof![Just(Verdict::Success), Just(Verdict::Failure), Just(Verdict::Neutral)];
    let step = prop_oneof![
        4 => Just(Step::Acquire),
        4 => (any::<usize>(), verdict).prop_map(|(index, verdict)| Step::Finish(index, verdict)),
        1 => any::<usize>().prop_map(Step::Cancel),
        2 => (0u64..40_000).prop_map(Step::Pass),
        1 => (0u32..4, 0u64..40_000).prop_map(|(trials, break_ms)| Step::Configure(trials, break_ms)),
    ];
    proptest::collection::vec(step, 1..300)
}

proptest! {
    /// Whatever happens: trials stay bounded, and a circuit with no call under way lets one through in the end.
    #[test]
    fn never_wedges_and_never_lets_too_many_trials_through(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let breaker = breaker(settings());
            let mut permits: Vec<Permit<'_>> = Vec::new();
            let mut most_trials = 1;
            for step in steps {
                match step {
                    Step::Acquire => permits.extend(breaker.acquire(Some(Instant::now() + MINUTE * 60 * 24)).ok()),
                    Step::Finish(index, verdict) if !permits.is_empty() => {
                        permits.swap_remove(index % permits.len()).finish(verdict);
                    }
                    Step::Cancel(index) if !permits.is_empty() => drop(permits.swap_remove(index % permits.len())),
                    Step::Pass(ms) => tokio::time::advance(Duration::from_millis(ms)).await,
                    Step::Configure(trials, break_ms) => {
                        most_trials = most_trials.max(trials);
                        breaker.configure(CircuitBreakerSettings { half_open_max_requests: trials, break_ms, ..settings() });
                    }
                    _ => {}
                }
                let State::HalfOpen { under_way, .. } = lock(&breaker.inner).state else { continue };
                let word = lock(&breaker.inner).word();
                let trials = permits.iter().filter(|permit| permit.trial && permit.word == word).count();
                assert_eq!(trials, under_way as usize);
                assert!(under_way <= most_trials.max(1));
            }
            drop(permits);
            tokio::time::advance(MINUTE).await;
            assert!(acquire(&breaker).is_ok());
        });
    }
}
