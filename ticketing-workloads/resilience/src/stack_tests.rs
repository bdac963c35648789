use super::*;
use crate::bulkhead::Bulkheads;
use crate::circuit_breaker::Totals;
use crate::failure::{FailureKind, Rejection};
use crate::metrics::Metrics;
use contract::{
    BulkheadSettings, CircuitBreakerSettings, CircuitState, DependencySettings, RetryOn, RetrySettings, TimeoutSettings,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{0:?}")]
struct TestError(FailureKind);

impl Failure for TestError {
    fn kind(&self) -> FailureKind {
        self.0
    }
}

fn database() -> DependencySettings {
    DependencySettings {
        timeout: TimeoutSettings { request_ms: 5_000, per_try_ms: 1_000, connect_ms: None },
        retry: RetrySettings {
            base_interval_ms: 200,
            retry_on: [RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::VersionConflict].into(),
            ..Default::default()
        },
        ..Default::default()
    }
}

fn dependency(settings: DependencySettings) -> &'static Dependency {
    let dependency = Dependency::new("database", Bulkheads::new(), &Arc::new(Metrics::new("test")));
    dependency.configure(settings, Bulkheads::NONE);
    dependency
}

/// Calls with an attempt that takes `ms` and ends with `result`; answers how often it was made.
async fn calls(
    dependency: &'static Dependency,
    ms: u64,
    result: Result<(), FailureKind>,
) -> (u32, Result<(), CallError<TestError>>) {
    let attempts = AtomicU32::new(0);
    let answer = dependency
        .call(|| async {
            attempts.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(ms)).await;
            result.map_err(TestError)
        })
        .await;
    (attempts.into_inner(), answer)
}

#[tokio::test(start_paused = true)]
async fn retries_what_may_pass_after_the_adrs_waits() {
    let dependency = dependency(database());
    let started = Instant::now();
    let (attempts, answer) = calls(dependency, 0, Err(FailureKind::ConnectFailure)).await;
    assert_eq!(attempts, 4);
    assert_eq!(started.elapsed(), Duration::from_millis(200 + 400 + 800));
    assert_eq!(answer.unwrap_err().to_string(), "database: failed after 4 attempt(s): ConnectFailure");
    let text = dependency.metrics().encode();
    assert!(text.contains(r#"retry_attempts_total{service="database",attempt="3"} 1"#), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_business_no_is_final_and_good_news_for_the_circuit() {
    let dependency = dependency(database());
    for _ in 0..10 {
        assert_eq!(calls(dependency, 0, Err(FailureKind::Business)).await.0, 1);
    }
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn conflicts_are_retried_but_do_not_open_the_circuit() {
    let dependency = dependency(database());
    for _ in 0..5 {
        assert_eq!(calls(dependency, 0, Err(FailureKind::VersionConflict)).await.0, 4);
    }
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_and_the_whole_call_are_bounded() {
    let dependency = dependency(database());
    let started = Instant::now();
    let (attempts, answer) = calls(dependency, 60_000, Ok(())).await;
    // 1 s + 0.2 + 1 s + 0.4 + 1 s + 0.8 + 0.6 s, which is all that is left.
    assert_eq!((attempts, started.elapsed()), (4, Duration::from_secs(5)));
    assert!(matches!(answer, Err(CallError::Timeout { attempts: 4, .. })));
}

#[tokio::test(start_paused = true)]
async fn no_attempt_starts_after_the_callers_deadline() {
    let dependency = dependency(database());
    let deadline = Instant::now() + Duration::from_millis(1_100);
    let attempts = AtomicU32::new(0);
    let call = dependency.call(|| async {
        attempts.fetch_add(1, Ordering::SeqCst);
        std::future::pending::<Result<(), TestError>>().await
    });
    let answer = deadline::within(Some(deadline), call).await;
    assert!(answer.is_err());
    assert_eq!(attempts.into_inner(), 1, "the wait of 200 ms would pass the deadline");
    assert!(Instant::now() < deadline);
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_refuses_at_once_and_is_not_retried() {
    let dependency = dependency(database());
    let _ = calls(dependency, 0, Err(FailureKind::ConnectFailure)).await;
    let (attempts, answer) = calls(dependency, 0, Err(FailureKind::ConnectFailure)).await;
    assert_eq!(attempts, 1, "the fifth failure in a row opens it, and the retry is refused");
    assert!(matches!(answer, Err(CallError::Rejected { rejection: Rejection::CircuitOpen { .. }, .. })));
    let started = Instant::now();
    let (attempts, answer) = calls(dependency, 0, Ok(())).await;
    assert_eq!((attempts, started.elapsed()), (0, Duration::ZERO));
    assert!(answer.unwrap_err().retry_after().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_full_bulkhead_is_not_retried_and_tells_the_circuit_nothing() {
    let dependency = dependency(database());
    let one_place = BulkheadSettings { max_concurrent: 1, max_queued: 0, max_wait_ms: 0 };
    let slot = dependency.bulkheads.assign(&[("critical".to_owned(), one_place)].into())["critical"];
    dependency.configure(database(), slot);
    let _held = dependency.bulkhead().unwrap().acquire(crate::Priority::default(), None).unwrap();
    for _ in 0..10 {
        let (attempts, answer) = calls(dependency, 0, Ok(())).await;
        assert_eq!(attempts, 0);
        assert!(matches!(answer, Err(CallError::Rejected { rejection: Rejection::BulkheadFull { .. }, .. })));
    }
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_leaves_is_neutral_also_half_open() {
    let trip = contract::TripRule::ConsecutiveFailures { failures: 1 };
    let breaker = CircuitBreakerSettings { trip, ..Default::default() };
    let dependency = dependency(DependencySettings { circuit_breaker: breaker, ..database() });
    let _ = calls(dependency, 0, Err(FailureKind::Other)).await;
    assert_eq!(dependency.circuit().state, CircuitState::Open);
    tokio::time::advance(Duration::from_secs(30)).await;
    for _ in 0..3 {
        let hangs = dependency.call(std::future::pending::<Result<(), TestError>>);
        assert!(tokio::time::timeout(Duration::from_millis(10), hangs).await.is_err());
        assert_eq!(dependency.circuit().state, CircuitState::HalfOpen);
    }
    assert!(calls(dependency, 0, Ok(())).await.1.is_ok());
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn who_turns_retries_off_stops_those_under_way() {
    let dependency = dependency(database());
    let attempts = AtomicU32::new(0);
    let call = dependency.call(|| async {
        if attempts.fetch_add(1, Ordering::SeqCst) == 1 {
            let none = RetrySettings { num_retries: 0, ..database().retry };
            dependency.configure(DependencySettings { retry: none, ..database() }, Bulkheads::NONE);
        }
        Err::<(), _>(TestError(FailureKind::ConnectFailure))
    });
    assert!(call.await.is_err());
    assert_eq!(attempts.into_inner(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_whose_caller_has_gone_is_not_started() {
    let dependency = dependency(database());
    let (attempts, answer) = deadline::within(Some(Instant::now()), calls(dependency, 0, Ok(()))).await;
    assert_eq!(attempts, 0);
    assert!(matches!(answer, Err(CallError::Rejected { rejection: Rejection::TooLate, .. })));
    assert_eq!(dependency.breaker().totals(), Totals::default());
}

#[tokio::test(start_paused = true)]
async fn what_an_attempt_calls_in_turn_has_no_more_time_than_the_attempt() {
    let (outer, inner) = (dependency(database()), dependency(database()));
    let started = Instant::now();
    let answer = outer
        .call(|| async move {
            let deadline = deadline::current().unwrap();
            assert_eq!(deadline - Instant::now(), Duration::from_secs(1));
            let never = || std::future::pending::<Result<(), TestError>>();
            inner.call(never).await.map_err(|_| TestError(FailureKind::Business))
        })
        .await;
    assert!(answer.is_err());
    assert!(started.elapsed() <= Duration::from_secs(1));
}

/// An error that says more than its kind.
#[derive(Debug, Clone, thiserror::Error)]
#[error("busy")]
struct Busy {
    retry_after: Option<Duration>,
    was_retried: bool,
}

impl Failure for Busy {
    fn kind(&self) -> FailureKind {
        FailureKind::Status(503)
    }

    fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    fn was_retried(&self) -> bool {
        self.was_retried
    }
}

#[rstest::rstest]
#[case::own_wait(Busy { retry_after: None, was_retried: false }, 2, 200)]
#[case::asked_for_more(Busy { retry_after: Some(Duration::from_secs(2)), was_retried: false }, 2, 2_000)]
#[case::asked_for_less(Busy { retry_after: Some(Duration::from_millis(1)), was_retried: false }, 2, 200)]
#[case::asked_for_more_than_there_is(Busy { retry_after: Some(Duration::from_secs(9)), was_retried: false }, 1, 0)]
#[case::retried_below(Busy { retry_after: None, was_retried: true }, 1, 0)]
#[tokio::test(start_paused = true)]
async fn the_other_side_has_a_say_in_retries(#[case] busy: Busy, #[case] expected: u32, #[case] waited_ms: u64) {
    let retry = RetrySettings { num_retries: 1, retry_on: [RetryOn::ServerError].into(), ..database().retry };
    let dependency = dependency(DependencySettings { retry, ..database() });
    let (attempts, started) = (AtomicU32::new(0), Instant::now());
    let answer = dependency
        .call(|| {
            attempts.fetch_add(1, Ordering::SeqCst);
            std::future::ready(Err::<(), _>(busy.clone()))
        })
        .await;
    assert!(answer.is_err());
    assert_eq!((attempts.into_inner(), started.elapsed()), (expected, Duration::from_millis(waited_ms)));
}

/// It never did, for as long as the budget was used up by others.
#[tokio::test(start_paused = true)]
async fn a_server_that_says_when_to_come_back_opens_the_circuit_once_nobody_comes_back() {
    let budget = contract::RetryBudgetSettings { percent: 0, interval_ms: 60_000, min_retries: 3 };
    let retry = RetrySettings {
        num_retries: 3,
        base_interval_ms: 1,
        retry_on: [RetryOn::RateLimited].into(),
        budget: Some(budget),
        ..Default::default()
    };
    let dependency = dependency(DependencySettings { retry, ..database() });
    assert_eq!(calls(dependency, 0, Err(FailureKind::Overloaded(503))).await.0, 4);
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
    let mut attempts = 0;
    while dependency.circuit().state == CircuitState::Closed && attempts < 10 {
        attempts += calls(dependency, 0, Err(FailureKind::Overloaded(503))).await.0;
    }
    assert_eq!(attempts, 4, "with the last of the first call, five in a row");
}

/// A request that may not be made twice.
#[derive(Clone)]
struct Once;

impl crate::attempt::Repeatable for Once {
    fn may_repeat(&self, _: &RetrySettings) -> bool {
        false
    }
}

#[rstest::rstest]
#[case::perhaps_done(FailureKind::ConnectFailure, 1)]
#[case::never_begun(FailureKind::NotSent, 4)]
#[tokio::test(start_paused = true)]
async fn what_must_not_be_done_twice_is_repeated_only_if_it_never_began(
    #[case] kind: FailureKind,
    #[case] expected: u32,
) {
    use tower::{Layer as _, ServiceExt as _};
    let attempts = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&attempts);
    let service = dependency(database()).layer().layer(service_fn(move |attempt: Attempt<Once>| {
        counted.fetch_add(1, Ordering::SeqCst);
        assert_eq!(attempt.number, counted.load(Ordering::SeqCst));
        std::future::ready(Err::<(), _>(TestError(kind)))
    }));
    assert!(service.oneshot(Once).await.is_err());
    assert_eq!(attempts.load(Ordering::SeqCst), expected);
}

#[tokio::test(start_paused = true)]
async fn waits_in_a_queue_do_not_make_a_call_slow() {
    let slow_call = Some(contract::SlowCallSettings { duration_ms: 500, percent: 1 });
    let trip = contract::TripRule::FailureRatio { percent: 100, minimum_throughput: 1, sampling_ms: 60_000 };
    let breaker = CircuitBreakerSettings { slow_call, trip, ..Default::default() };
    let dependency = dependency(DependencySettings { circuit_breaker: breaker.clone(), ..database() });
    let one_place = BulkheadSettings { max_concurrent: 1, max_queued: 9, max_wait_ms: 9_000 };
    let slot = dependency.bulkheads.assign(&[("critical".to_owned(), one_place)].into())["critical"];
    dependency.configure(DependencySettings { circuit_breaker: breaker, ..database() }, slot);
    let answers = futures::future::join_all((0..5).map(|_| calls(dependency, 400, Ok(())))).await;
    assert!(answers.iter().all(|(attempts, answer)| *attempts == 1 && answer.is_ok()), "{answers:?}");
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
    assert!(calls(dependency, 500, Ok(())).await.1.is_ok());
    assert_eq!(dependency.circuit().state, CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_given_up_after_its_time_is_a_failure_of_the_dependency() {
    let trip = contract::TripRule::ConsecutiveFailures { failures: 1 };
    let breaker = CircuitBreakerSettings { trip, ..Default::default() };
    let dependency = dependency(DependencySettings { circuit_breaker: breaker, ..database() });
    let hangs = Box::pin(dependency.call(std::future::pending::<Result<(), TestError>>));
    let hangs = poll_once(hangs);
    tokio::time::advance(Duration::from_secs(1)).await;
    // Nobody has polled it since.
    drop(hangs);
    assert_eq!(dependency.circuit().state, CircuitState::Open);
}

/// Else a header with a short deadline, sent five times, would open the circuit for everybody.
#[rstest::rstest]
#[case::short_deadline(499, CircuitState::Closed)]
#[case::with_half_of_its_time(500, CircuitState::Open)]
#[tokio::test(start_paused = true)]
async fn a_short_deadline_opens_no_circuit(#[case] time_left_ms: u64, #[case] expected: CircuitState) {
    let trip = contract::TripRule::ConsecutiveFailures { failures: 1 };
    let breaker = CircuitBreakerSettings { trip, ..Default::default() };
    let dependency = dependency(DependencySettings { circuit_breaker: breaker, ..database() });
    let never = || std::future::pending::<Result<(), TestError>>();
    for dropped in [false, true] {
        let until = Some(Instant::now() + Duration::from_millis(time_left_ms));
        let mut call = Box::pin(deadline::within(until, dependency.call(never)));
        if dropped {
            let call = poll_once(call);
            tokio::time::advance(Duration::from_millis(time_left_ms)).await;
            drop(call);
        } else {
            assert!(matches!((&mut call).await, Err(CallError::Timeout { .. })));
        }
        assert_eq!(dependency.circuit().state, expected, "dropped: {dropped}");
        dependency.end_break();
    }
}

/// Nor by a connection that breaks in so little time; but a connection that is refused, or an answer that tells of a
/// failure, needs none.
#[rstest::rstest]
#[case::broken_in_no_time(FailureKind::ConnectFailure, 499, CircuitState::Closed)]
#[case::the_other_side_ran_out_of_time(FailureKind::Timeout, 499, CircuitState::Closed)]
#[case::time_enough(FailureKind::Timeout, 500, CircuitState::Open)]
#[case::received(FailureKind::Status(503), 1, CircuitState::Open)]
#[case::received_and_no_failure(FailureKind::Status(404), 1, CircuitState::Closed)]
#[case::connection_refused(FailureKind::NotSent, 1, CircuitState::Open)]
#[tokio::test(start_paused = true)]
async fn what_fails_under_a_short_deadline_says_little(
    #[case] kind: FailureKind,
    #[case] time_left_ms: u64,
    #[case] expected: CircuitState,
) {
    let trip = contract::TripRule::ConsecutiveFailures { failures: 1 };
    let breaker = CircuitBreakerSettings { trip, ..Default::default() };
    let dependency = dependency(DependencySettings { circuit_breaker: breaker, ..database() });
    let until = Some(Instant::now() + Duration::from_millis(time_left_ms));
    assert!(deadline::within(until, calls(dependency, 0, Err(kind))).await.1.is_err());
    assert_eq!(dependency.circuit().state, expected);
}

/// The dependency's own total timeout is not a caller's short deadline: each attempt that it cuts short counts.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_the_total_time_cuts_short_counts() {
    let timeout = TimeoutSettings { request_ms: 1_300, per_try_ms: 1_000, connect_ms: None };
    let trip = contract::TripRule::ConsecutiveFailures { failures: 2 };
    let breaker = CircuitBreakerSettings { trip, ..Default::default() };
    let dependency = dependency(DependencySettings { timeout, circuit_breaker: breaker, ..database() });
    assert!(dependency.call(std::future::pending::<Result<(), TestError>>).await.is_err());
    assert_eq!(dependency.circuit().state, CircuitState::Open, "after 1 s, and after 100 ms more");
}

/// Polls once, and keeps what is not done.
fn poll_once<F: Future + Unpin>(mut future: F) -> Option<F> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::Pin::new(&mut future).poll(&mut context).is_pending().then_some(future)
}

#[tokio::test(start_paused = true)]
async fn a_drill_can_hold_calls_up_and_make_them_fail() {
    use crate::fault_injection::{Fault, Injection};
    let dependency =
        dependency(DependencySettings { retry: RetrySettings { num_retries: 0, ..Default::default() }, ..database() });
    let until = Instant::now() + Duration::from_secs(60);
    dependency.faults().inject(Injection { fault: Fault::Latency(Duration::from_millis(300)), percent: 100, until });
    let started = Instant::now();
    assert!(calls(dependency, 0, Ok(())).await.1.is_ok());
    assert_eq!(started.elapsed(), Duration::from_millis(300));
    dependency.faults().inject(Injection { fault: Fault::Failure, percent: 100, until });
    let (attempts, answer) = calls(dependency, 0, Ok(())).await;
    assert!(attempts == 0 && matches!(answer, Err(CallError::Injected { .. })));
    assert_eq!(dependency.breaker().totals().failures, 1);
}

/// What is logged, as text.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn each_attempt_has_a_span_and_each_change_of_the_circuit_a_line() {
    use tracing_subscriber::fmt::format::FmtSpan;
    use tracing_subscriber::util::SubscriberInitExt;
    let trip = contract::TripRule::ConsecutiveFailures { failures: 2 };
    let breaker = CircuitBreakerSettings { trip, ..Default::default() };
    let retry = RetrySettings { num_retries: 1, ..database().retry };
    let settings = DependencySettings { circuit_breaker: breaker, retry, ..database() };
    let fails_and_recovers = async || {
        let dependency = dependency(settings.clone());
        assert!(calls(dependency, 0, Err(FailureKind::ConnectFailure)).await.1.is_err());
        tokio::time::advance(Duration::from_secs(30)).await;
        assert!(calls(dependency, 0, Ok(())).await.1.is_ok());
    };
    // Another test may be the first one to come by these lines, without anybody who reads them, and say just then that nobody does.
    fails_and_recovers().await;
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::DEBUG);
    let subscriber = subscriber.with_span_events(FmtSpan::NEW).with_writer(move || writer.clone());
    let _guard = subscriber.finish().set_default();
    fails_and_recovers().await;
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let mut from = 0;
    for expected in [
        r#"attempt{dependency="database" number=1}"#,
        r#"WARN resilience::retry::layer: retrying dependency="database" attempt=1 kind=ConnectFailure wait=200 ms"#,
        r#"attempt{dependency="database" number=2}"#,
        "circuit opened dependency=database",
        "circuit half-open dependency=database",
        "circuit closed dependency=database",
    ] {
        let found = lines[from..].iter().position(|line| line.contains(expected));
        from += found.unwrap_or_else(|| panic!("no line with `{expected}` after line {from}:\n{text}"));
    }
}
