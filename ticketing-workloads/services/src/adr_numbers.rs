//! ADR-007's own numbers, as each service has them without a policy, to the millisecond by a clock that stands still.

use crate::{booking, catalog, gateway, notification, payment};
use contract::{CircuitState, FallbackSettings, PolicySettings, WorkloadId};
use resilience::{CallError, Dependency, Failure, FailureKind, Resilience};
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Connections in a pool: as many as there are by default.
const POOL: u16 = 10;

#[derive(Debug, thiserror::Error)]
#[error("{0:?}")]
struct Fails(FailureKind);

impl Failure for Fails {
    fn kind(&self) -> FailureKind {
        self.0
    }
}

fn defaults(service: &str) -> PolicySettings {
    match service {
        "gateway" => gateway::defaults(),
        "catalog" => catalog::defaults(POOL),
        "booking" => booking::defaults(),
        "payment" => payment::defaults(POOL),
        _ => notification::defaults(POOL, 5),
    }
}

/// A dependency of a service that was just started.
fn dependency(service: &str, name: &str) -> &'static Dependency {
    let id = WorkloadId::deployment("ticketing", service);
    let resilience = Resilience::builder(id).dependency(name).defaults(defaults(service)).build();
    resilience.dependency(name).unwrap()
}

/// When the attempts of one call are made that fail in this way, in milliseconds.
async fn attempts(dependency: &'static Dependency, kind: FailureKind) -> Vec<u128> {
    let (started, made) = (Instant::now(), Mutex::new(Vec::new()));
    let answer = dependency
        .call(|| {
            made.lock().unwrap().push(started.elapsed().as_millis());
            std::future::ready(Err::<(), _>(Fails(kind)))
        })
        .await;
    assert!(answer.is_err());
    made.into_inner().unwrap()
}

/// Notes when it was dropped, if nothing was before it.
struct Over<'a>(&'a Mutex<Option<u128>>, Instant);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap().get_or_insert(self.1.elapsed().as_millis());
    }
}

const HTTP: &[u128] = &[0, 2_000, 6_000, 14_000];

#[rstest::rstest]
#[case::http("gateway", "catalog", FailureKind::Status(503), HTTP)]
#[case::http_broken("gateway", "catalog", FailureKind::ConnectFailure, HTTP)]
#[case::http_no("gateway", "catalog", FailureKind::Status(404), &[0])]
#[case::one_tier_retries("gateway", "booking", FailureKind::Status(503), &[0])]
#[case::payment_retries("booking", "payment", FailureKind::Status(503), &[0])]
#[case::stripe_5xx("payment", "stripe", FailureKind::Status(500), &[0, 1_000, 2_000])]
#[case::stripe_4xx("payment", "stripe", FailureKind::Status(402), &[0])]
#[case::stripe_in_doubt("payment", "stripe", FailureKind::ConnectFailure, &[0])]
#[case::paypal("payment", "paypal", FailureKind::Status(500), &[0])]
#[case::business("booking", "database", FailureKind::Business, &[0])]
#[case::mail_not_sent("notification", "smtp", FailureKind::NotSent, &[0, 1_000])]
#[tokio::test(start_paused = true)]
async fn retries(#[case] service: &str, #[case] name: &str, #[case] kind: FailureKind, #[case] expected: &[u128]) {
    assert_eq!(attempts(dependency(service, name), kind).await, expected);
}

/// 100 ms doubled: 200, 400 and 800 ms, shortened by up to a half so that two who met do not meet again.
#[rstest::rstest]
#[case(FailureKind::Deadlock)]
#[case(FailureKind::Timeout)]
#[case(FailureKind::VersionConflict)]
#[tokio::test(start_paused = true)]
async fn retries_of_the_database(#[case] kind: FailureKind) {
    for service in ["booking", "catalog", "payment", "notification"] {
        let made = attempts(dependency(service, "database"), kind).await;
        let waits: Vec<u128> = made.windows(2).map(|two| two[1] - two[0]).collect();
        assert_eq!(waits.len(), 3);
        for (wait, full) in waits.into_iter().zip([200, 400, 800]) {
            assert!((full / 2..=full).contains(&wait), "{service}: {wait} of {full}");
        }
    }
}

#[rstest::rstest]
#[case::http("gateway", "catalog", 10_000)]
#[case::booking("gateway", "booking", 25_000)]
#[case::database("booking", "database", 1_000)]
#[case::payment("booking", "payment", 20_000)]
#[case::stripe("payment", "stripe", 3_000)]
#[case::paypal("payment", "paypal", 6_000)]
#[case::mail("notification", "smtp", 10_000)]
#[tokio::test(start_paused = true)]
async fn time_of_an_attempt(#[case] service: &str, #[case] name: &str, #[case] ms: u128) {
    let (started, first_over) = (Instant::now(), Mutex::new(None));
    let hang = || async {
        let _over = Over(&first_over, started);
        std::future::pending::<Result<(), Fails>>().await
    };
    let answer = dependency(service, name).call(hang).await;
    assert!(matches!(answer, Err(CallError::Timeout { .. })), "{answer:?}");
    assert_eq!(first_over.into_inner().unwrap(), Some(ms));
}

/// The catalog's series ends within its 15 s, unlike the ADR's, which would need 54 s.
#[tokio::test(start_paused = true)]
async fn total_time_of_the_catalog() {
    let started = Instant::now();
    let hang = || std::future::pending::<Result<(), Fails>>();
    assert!(dependency("gateway", "catalog").call(hang).await.is_err());
    assert_eq!(started.elapsed(), Duration::from_secs(15));
}

#[rstest::rstest]
#[case::http("gateway", "catalog", 5, 30)]
#[case::booking("gateway", "booking", 5, 30)]
#[case::database("booking", "database", 5, 30)]
#[case::payment("booking", "payment", 5, 30)]
#[case::stripe("payment", "stripe", 3, 120)]
#[case::paypal_half_of_ten("payment", "paypal", 10, 30)]
#[case::mail("notification", "smtp", 5, 30)]
#[tokio::test(start_paused = true)]
async fn circuits(#[case] service: &str, #[case] name: &str, #[case] failures: usize, #[case] break_seconds: u64) {
    let dependency = dependency(service, name);
    let (mut made, mut opened) = (0, Instant::now());
    while dependency.circuit().state == CircuitState::Closed {
        let started = Instant::now();
        let series = attempts(dependency, FailureKind::Status(500)).await;
        made += series.len();
        // The last one was the last straw; after it there was only a wait for a retry that was refused.
        opened = started + Duration::from_millis(u64::try_from(series[series.len() - 1]).unwrap());
    }
    assert_eq!(made, failures, "opens with the failure of that number");
    assert!(attempts(dependency, FailureKind::Status(500)).await.is_empty(), "no call is made");
    let over = opened + Duration::from_secs(break_seconds);
    tokio::time::sleep_until(over - Duration::from_millis(1)).await;
    assert!(attempts(dependency, FailureKind::Status(500)).await.is_empty(), "nor a moment before the break is over");
    tokio::time::sleep_until(over).await;
    let trial = dependency.call(|| std::future::ready(Ok::<_, Fails>(()))).await;
    assert!(trial.is_ok() && dependency.circuit().state == CircuitState::Closed, "one good trial closes it");
}

#[rstest::rstest]
#[case::critical("booking", "database", 10, 50, 1)]
#[case::external("payment", "stripe", 20, 100, 30)]
#[case::external_too("payment", "paypal", 20, 100, 30)]
#[case::background("notification", "smtp", 5, 100, 30)]
#[case::catalog("gateway", "catalog", 100, 200, 1)]
#[tokio::test(start_paused = true)]
async fn bulkheads(
    #[case] service: &str,
    #[case] name: &str,
    #[case] at_once: usize,
    #[case] waiting: usize,
    #[case] seconds: u64,
) {
    let dependency = dependency(service, name);
    let under_way = std::cell::Cell::new(0_usize);
    let call = || {
        dependency.call(|| async {
            under_way.set(under_way.get() + 1);
            std::future::pending::<Result<(), Fails>>().await
        })
    };
    let mut calls: Vec<_> = (0..at_once + waiting).map(|_| Box::pin(call())).collect();
    for one in &mut calls {
        assert!(futures::poll!(one).is_pending());
    }
    assert_eq!(under_way.get(), at_once);
    let started = Instant::now();
    assert!(matches!(call().await, Err(CallError::Rejected { .. })), "one more is turned away at once");
    assert_eq!(started.elapsed(), Duration::ZERO);
    let settings = &defaults(service).bulkheads[defaults(service).dependencies[name].bulkhead.as_ref().unwrap()];
    assert_eq!(settings.max_wait_ms, seconds * 1_000);
}

#[test]
fn fallbacks() {
    let of = |service: &str, name: &str| defaults(service).dependencies[name].fallback.clone();
    let five_minutes = FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 0 };
    assert_eq!(of("gateway", "catalog")[0], five_minutes);
    assert!(matches!(of("gateway", "catalog")[1], FallbackSettings::Static { status_code: 503, .. }));
    assert_eq!(of("catalog", "database"), [five_minutes]);
    assert_eq!(of("booking", "payment"), [FallbackSettings::Queue]);
    assert_eq!(of("payment", "stripe"), [FallbackSettings::Provider { provider: "paypal".into() }]);
    let degraded = defaults("booking").degradation.unwrap();
    assert_eq!((degraded.enter_load_percent, degraded.exit_load_percent), (80, 60));
}
