use super::*;
use contract::{BulkheadSettings, CircuitBreakerSettings, RetryOn, RetrySettings};
use std::sync::atomic::{AtomicU32, Ordering};

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

fn dependency(settings: DependencySettings) -> Dependency {
    let dependency = Dependency::new("database", Arc::new(Metrics::new("test")));
    dependency.configure(settings, None);
    dependency
}

/// Calls with an attempt that takes `ms` and ends with `result`; answers how often it was made.
async fn calls(
    dependency: &Dependency,
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
    let (attempts, answer) = calls(&dependency, 0, Err(FailureKind::ConnectFailure)).await;
    assert_eq!(attempts, 4);
    assert_eq!(started.elapsed(), Duration::from_millis(200 + 400 + 800));
    assert_eq!(answer.unwrap_err().to_string(), "database: failed after 4 attempt(s): ConnectFailure");
    let text = dependency.metrics.encode();
    assert!(text.contains(r#"retry_attempts_total{service="database",attempt="3"} 1"#), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_business_no_is_final_and_good_news_for_the_circuit() {
    let dependency = dependency(database());
    for _ in 0..10 {
        assert_eq!(calls(&dependency, 0, Err(FailureKind::Business)).await.0, 1);
    }
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn conflicts_are_retried_but_do_not_open_the_circuit() {
    let dependency = dependency(database());
    for _ in 0..5 {
        assert_eq!(calls(&dependency, 0, Err(FailureKind::VersionConflict)).await.0, 4);
    }
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn an_attempt_and_the_whole_call_are_bounded() {
    let dependency = dependency(database());
    let started = Instant::now();
    let (attempts, answer) = calls(&dependency, 60_000, Ok(())).await;
    // 1 s + 0.2 + 1 s + 0.4 + 1 s + 0.8 + 0.6 s, which is all that is left.
    assert_eq!((attempts, started.elapsed()), (4, Duration::from_secs(5)));
    assert!(matches!(answer, Err(CallError::Timeout { attempts: 4, .. })));
}

#[tokio::test(start_paused = true)]
async fn no_attempt_starts_after_the_callers_deadline() {
    let dependency = dependency(database());
    let deadline = Instant::now() + Duration::from_millis(1_100);
    let attempts = AtomicU32::new(0);
    let answer = dependency
        .call_until(deadline, || async {
            attempts.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<Result<(), TestError>>().await
        })
        .await;
    assert!(answer.is_err());
    assert_eq!(attempts.into_inner(), 1, "the wait of 200 ms would pass the deadline");
    assert!(Instant::now() < deadline);
}

#[tokio::test(start_paused = true)]
async fn an_open_circuit_refuses_at_once_and_is_not_retried() {
    let dependency = dependency(database());
    let _ = calls(&dependency, 0, Err(FailureKind::ConnectFailure)).await;
    let (attempts, answer) = calls(&dependency, 0, Err(FailureKind::ConnectFailure)).await;
    assert_eq!(attempts, 1, "the fifth failure in a row opens it, and the retry is refused");
    assert!(matches!(answer, Err(CallError::Rejected { rejection: Rejection::CircuitOpen { .. }, .. })));
    let started = Instant::now();
    let (attempts, answer) = calls(&dependency, 0, Ok(())).await;
    assert_eq!((attempts, started.elapsed()), (0, Duration::ZERO));
    assert!(answer.unwrap_err().retry_after().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_full_bulkhead_is_not_retried_and_tells_the_circuit_nothing() {
    let dependency = dependency(database());
    let bulkhead = Bulkhead::new(BulkheadSettings { max_concurrent: 1, max_queued: 0, max_wait_ms: 0 });
    dependency.configure(database(), Some(Arc::clone(&bulkhead)));
    let _held = bulkhead.enter(Instant::now() + Duration::from_secs(60)).await.unwrap();
    for _ in 0..10 {
        let (attempts, answer) = calls(&dependency, 0, Ok(())).await;
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
    let _ = calls(&dependency, 0, Err(FailureKind::Other)).await;
    assert_eq!(dependency.circuit().state, CircuitState::Open);
    tokio::time::advance(Duration::from_secs(30)).await;
    for _ in 0..3 {
        let hangs = dependency.call(std::future::pending::<Result<(), TestError>>);
        assert!(tokio::time::timeout(Duration::from_millis(10), hangs).await.is_err());
        assert_eq!(dependency.circuit().state, CircuitState::HalfOpen);
    }
    assert!(calls(&dependency, 0, Ok(())).await.1.is_ok());
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_call_goes_by_the_settings_that_it_started_with() {
    let dependency = dependency(database());
    let call = dependency.call(|| async {
        dependency.configure(DependencySettings::default(), None);
        Err::<(), _>(TestError(FailureKind::ConnectFailure))
    });
    let started = Instant::now();
    assert!(call.await.is_err());
    assert_eq!(started.elapsed(), Duration::from_millis(200 + 400 + 800));
}

#[tokio::test(start_paused = true)]
async fn a_fallback_answers_for_a_failure_and_not_for_a_business_no() {
    let dependency = dependency(database());
    let answer =
        |kind| dependency.call_or_else(move || async move { Err(TestError(kind)) }, |_| async { Ok("from memory") });
    assert_eq!(answer(FailureKind::ConnectFailure).await.unwrap(), "from memory");
    assert!(answer(FailureKind::Business).await.is_err());
    assert!(dependency.metrics.encode().contains(r#"fallback_duration_seconds_count{service="database"} 1"#));
}
