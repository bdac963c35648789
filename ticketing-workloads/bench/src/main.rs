//! What the layers of the library cost per call, beside hand-written floors and the best-known crates.
//!
//! The service answers at once, so that all that is measured is what is around it. Every case is measured in rounds that
//! take turns with all others; what is shown is the median round. With two threads, each makes all the calls of a round
//! on one shared state, and the time is that of a call as its thread sees it. Read the ratios: nanoseconds are of this
//! machine in this run. With the word `flags`, only flags are measured; with `FLAGD_CORE=folder`, where the reference evaluator is
//! installed, beside the same evaluations in Node.

mod allocations;
mod flags;
mod floor;

use contract::{
    BulkheadSettings, CircuitBreakerSettings, DependencySettings, FallbackSettings, SlowCallSettings, TripRule,
};
use floor::{FloorBreaker, Fused, Refused};
use resilience::bulkhead::{BulkheadLayer, Bulkheads};
use resilience::circuit_breaker::CircuitBreakerLayer;
use resilience::fallback::Fallbacks;
use resilience::fault_injection::FaultInjectionLayer;
use resilience::retry::RetryLayer;
use resilience::timeout::{AttemptTimeoutLayer, TotalTimeoutLayer};
use resilience::{Attempt, AttemptError, CallError, Dependency, Failure, FailureKind, Metrics, Repeatable};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::hint::black_box;
use std::io::IsTerminal;
use std::pin::pin;
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tower::{Layer, Service, service_fn};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const ROUNDS: usize = 21;
const CALLS: u32 = 100_000;

/// Makes a number of calls.
type Run = Box<dyn Fn(u32) + Send + Sync>;

struct Case {
    name: &'static str,
    run: Run,
    /// Nanoseconds per call: rounds with one thread and with two.
    times: [Vec<f64>; 2],
    allocations: f64,
}

#[derive(Debug, thiserror::Error)]
#[error("never")]
struct Never;

impl Failure for Never {
    fn kind(&self) -> FailureKind {
        FailureKind::Other
    }
}

#[derive(Clone)]
struct Request;

impl Repeatable for Request {
    fn may_repeat(&self, _: &contract::RetrySettings) -> bool {
        true
    }
}

/// The service that everything is put around.
#[derive(Clone)]
struct AtOnce;

impl<R> Service<R> for AtOnce {
    type Response = u64;
    type Error = Never;
    type Future = Ready<Result<u64, Never>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Never>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, _: R) -> Self::Future {
        ready(Ok(black_box(7)))
    }
}

/// The same for what is around an attempt.
#[derive(Clone)]
struct AttemptAtOnce;

impl Service<Attempt<Request>> for AttemptAtOnce {
    type Response = u64;
    type Error = AttemptError<Never>;
    type Future = Ready<Result<u64, AttemptError<Never>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, _: Attempt<Request>) -> Self::Future {
        ready(Ok(black_box(7)))
    }
}

/// The same for what is around a call.
#[derive(Clone)]
struct CallAtOnce;

impl<R> Service<R> for CallAtOnce {
    type Response = u64;
    type Error = CallError<Never>;
    type Future = Ready<Result<u64, CallError<Never>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    #[inline]
    fn call(&mut self, _: R) -> Self::Future {
        ready(Ok(black_box(7)))
    }
}

/// Polls a future until it has its answer. Ours have it at once; a peer that locks may have to wait for the other thread.
#[inline]
fn answer<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(answer) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return answer;
        }
        std::hint::spin_loop();
    }
}

fn calls<S, R>(name: &'static str, service: S, request: impl Fn() -> R + Send + Sync + 'static) -> Case
where
    S: Service<R, Response = u64> + Clone + Send + Sync + 'static,
{
    let run = move |count: u32| {
        let mut service = service.clone();
        for _ in 0..count {
            let ready = answer(std::future::poll_fn(|cx| service.poll_ready(cx)));
            assert!(ready.is_ok());
            black_box(answer(service.call(request())).is_ok());
        }
    };
    case(name, run)
}

fn case(name: &'static str, run: impl Fn(u32) + Send + Sync + 'static) -> Case {
    Case { name, run: Box::new(run), times: [vec![], vec![]], allocations: 0.0 }
}

fn dependency(circuit_breaker: CircuitBreakerSettings) -> &'static Dependency {
    let bulkheads = Bulkheads::new();
    let room = BulkheadSettings { max_concurrent: 100, ..Default::default() };
    let slot = bulkheads.assign(&[("room".to_owned(), room)].into())["room"];
    let dependency = Dependency::new("bench", bulkheads, &Arc::new(Metrics::new("bench")));
    dependency.configure(DependencySettings { circuit_breaker, ..Default::default() }, slot);
    dependency
}

/// What the floor does: a ratio over 30 s, slow calls, one trial.
fn full() -> CircuitBreakerSettings {
    CircuitBreakerSettings {
        trip: TripRule::FailureRatio { percent: 50, minimum_throughput: 10, sampling_ms: 30_000 },
        slow_call: Some(SlowCallSettings { duration_ms: 5_000, percent: 50 }),
        ..Default::default()
    }
}

fn first() -> Attempt<Request> {
    Attempt::first(Request, None)
}

fn cases() -> Vec<Case> {
    let breaker = FloorBreaker::leaked();
    let fused = Fused::leaked();
    let (adr, ratio) = (dependency(CircuitBreakerSettings::default()), dependency(full()));
    let kept = dependency(full());
    let fallback = vec![FallbackSettings::Cache { ttl_ms: 300_000, max_stale_ms: 0 }];
    kept.configure(DependencySettings { fallback, ..Default::default() }, Bulkheads::NONE);
    let inner = || BulkheadLayer(ratio).layer(FaultInjectionLayer(ratio).layer(AtOnce));
    let untimed = RetryLayer(ratio).layer(CircuitBreakerLayer(ratio).layer(inner()));

    let recloser = recloser::Recloser::custom().error_rate(0.5).closed_len(100).build();
    let failsafe_policy =
        || failsafe::failure_policy::consecutive_failures(5, failsafe::backoff::constant(Duration::from_secs(30)));
    let failsafe = failsafe::Config::new().failure_policy(failsafe_policy()).build();
    let tower_resilience = tower_resilience_circuitbreaker::CircuitBreakerLayer::builder()
        .failure_rate_threshold(0.5)
        .sliding_window_size(100)
        .slow_call_duration_threshold(Duration::from_secs(5))
        .build()
        .expect("its settings are right");
    let bulkhead = tower_resilience_bulkhead::BulkheadLayer::builder()
        .max_concurrent_calls(100)
        .build()
        .expect("its settings are right");

    vec![
        calls("bare call", AtOnce, || ()),
        case("floor: minimal breaker", move |count| {
            for _ in 0..count {
                let permit = breaker.acquire().expect("it stays closed");
                let result = answer(AtOnce.call(()));
                breaker.finish(permit, black_box(result).is_err());
            }
        }),
        calls("breaker layer, ratio", CircuitBreakerLayer(ratio).layer(AttemptAtOnce), first),
        calls("breaker layer, failures in a row (the ADR's)", CircuitBreakerLayer(adr).layer(AttemptAtOnce), first),
        case("peer: recloser", move |count| {
            for _ in 0..count {
                black_box(recloser.call(|| answer(AtOnce.call(()))).is_ok());
            }
        }),
        case("peer: failsafe", move |count| {
            use failsafe::CircuitBreaker as _;
            for _ in 0..count {
                black_box(failsafe.call(|| answer(AtOnce.call(()))).is_ok());
            }
        }),
        calls(
            "peer: tower-resilience breaker",
            tower_resilience.layer(service_fn(|(): ()| ready(Ok::<_, Infallible>(black_box(7))))),
            || (),
        ),
        calls("bulkhead layer", BulkheadLayer(ratio).layer(AttemptAtOnce), first),
        calls(
            "peer: tower's global concurrency limit",
            tower::limit::GlobalConcurrencyLimitLayer::new(100).layer(AtOnce),
            || (),
        ),
        calls(
            "peer: tower-resilience bulkhead",
            bulkhead.layer(service_fn(|(): ()| ready(Ok::<_, tower_resilience_bulkhead::BulkheadError>(black_box(7))))),
            || (),
        ),
        calls("attempt timeout layer", AttemptTimeoutLayer(adr).layer(AttemptAtOnce), first),
        // Slow calls are timed here, where the clock has to be looked at anyway and waits in a queue are over.
        calls("attempt timeout layer, with slow calls", AttemptTimeoutLayer(ratio).layer(AttemptAtOnce), first),
        calls("peer: tower's timeout", tower::timeout::TimeoutLayer::new(Duration::from_secs(10)).layer(AtOnce), || ()),
        calls("retry layer", RetryLayer(ratio).layer(AttemptAtOnce), first),
        calls("total timeout layer", TotalTimeoutLayer(ratio).layer(CallAtOnce), || Request),
        case("fallback layer, none configured", move |count| {
            let mut service = Fallbacks::new(ratio).layer().layer(CallAtOnce);
            for _ in 0..count {
                black_box(answer(service.call(Request)).is_ok());
            }
        }),
        case("fallback layer that keeps each answer", move |count| {
            let keep = Fallbacks::new(kept).cache(1 << 20, |_: &Request| Some("page".to_owned()), |_: &u64| Some(8));
            let mut service = keep.layer().layer(CallAtOnce);
            for _ in 0..count {
                black_box(answer(service.call(Request)).is_ok());
            }
        }),
        case("floor: retry, breaker, bulkhead fused by hand", move |count| {
            for _ in 0..count {
                black_box(answer(fused.call(|| ready(Ok::<_, Refused>(black_box(7))))).is_ok());
            }
        }),
        calls("stack without timer", untimed, first),
        calls("full stack", ratio.layer().layer(AtOnce), || Request),
    ]
}

/// Nanoseconds per call.
fn one_thread(run: &Run) -> f64 {
    let started = Instant::now();
    run(CALLS);
    started.elapsed().as_nanos() as f64 / f64::from(CALLS)
}

fn two_threads(run: &Run, runtime: &tokio::runtime::Runtime) -> f64 {
    let barrier = Barrier::new(2);
    let work = || {
        let _runtime = runtime.enter();
        run(100);
        barrier.wait();
        let started = Instant::now();
        run(CALLS);
        started.elapsed().as_nanos() as f64 / f64::from(CALLS)
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mine = work();
        f64::midpoint(mine, other.join().expect("it makes its calls"))
    })
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().expect("a runtime");
    let _in_it = runtime.enter();
    let only_flags = std::env::args().any(|word| word == "flags");
    let mut cases = if only_flags { Vec::new() } else { cases() };
    let of_calls = cases.len();
    cases.extend(flags::cases());
    for case in &mut cases {
        (case.run)(CALLS / 10);
        let before = allocations::so_far();
        (case.run)(1_000);
        case.allocations = (allocations::so_far() - before) as f64 / 1_000.0;
    }
    for round in 0..ROUNDS {
        for case in &mut cases {
            case.times[0].push(one_thread(&case.run));
            case.times[1].push(two_threads(&case.run, &runtime));
        }
        if std::io::stderr().is_terminal() {
            eprint!("\rround {} of {ROUNDS}", round + 1);
        }
    }
    eprintln!();

    let medians: Vec<[f64; 2]> =
        cases.iter_mut().map(|case| case.times.each_mut().map(|times| median(times))).collect();
    if !only_flags {
        print_layers(&cases[..of_calls], &medians);
    }
    print_flags(&cases[of_calls..], &medians[of_calls..]);
    if let Some(place) = std::env::var_os("FLAGD_CORE") {
        let find = |name: &str| cases.iter().position(|case| case.name == name).expect("a case of that name");
        let theirs = flags::in_node(place.as_ref()).expect("the evaluator in Node answers");
        println!("\n{:<52} {:>9} {:>9} {:>7}", "the same by @openfeature/flagd-core in Node", "Node", "ours", "ratio");
        for (name, median) in theirs {
            let ours = medians[find(name)][0];
            println!("{name:<52} {median:>6.1} ns {ours:>6.1} ns {:>7.1}", median / ours);
        }
    }
}

fn print_layers(cases: &[Case], medians: &[[f64; 2]]) {
    let find = |name: &str| cases.iter().position(|case| case.name.starts_with(name)).expect("a case of that name");
    let (bare, breaker, fused) = (find("bare"), find("floor: minimal"), find("floor: retry"));
    println!(
        "{:<52} {:>9} {:>9} {:>7} {:>10} {:>8}",
        "added per call", "1 thread", "2 threads", "2 : 1", "x floor", "allocs"
    );
    for (index, case) in cases.iter().enumerate() {
        let added = [0, 1].map(|threads| medians[index][threads] - medians[bare][threads]);
        let floor = match index {
            _ if index == bare => None,
            _ if index >= fused => Some(fused),
            _ if index <= find("peer: tower-resilience breaker") => Some(breaker),
            _ => None,
        };
        let ratio = floor.map_or_else(String::new, |floor| format!("{:.2}", medians[index][0] / medians[floor][0]));
        println!(
            "{:<52} {:>6.1} ns {:>6.1} ns {:>7.2} {:>10} {:>8.2}",
            case.name,
            if index == bare { medians[bare][0] } else { added[0] },
            if index == bare { medians[bare][1] } else { added[1] },
            medians[index][1] / medians[index][0],
            ratio,
            case.allocations,
        );
    }
    let [window, timeout, slow] = ["breaker layer, ratio", "attempt timeout layer", "attempt timeout layer, with"]
        .map(|name| medians[find(name)]);
    let whole = [0, 1].map(|threads| window[threads] + (slow[threads] - timeout[threads]).max(0.0));
    println!(
        "\nthe breaker with all it can, so with what slow calls add to the attempt timeout: {:.1} ns, {:.2} x its floor, 2 : 1 {:.2}",
        whole[0],
        whole[0] / medians[breaker][0],
        whole[1] / whole[0],
    );
    println!(
        "x floor: against the hand-written floor above it, with one thread. Floors count no metrics; the layers do."
    );
}

fn print_flags(cases: &[Case], medians: &[[f64; 2]]) {
    println!(
        "\n{:<52} {:>9} {:>9} {:>7} {:>10} {:>8}",
        "flags, per evaluation", "1 thread", "2 threads", "2 : 1", "", "allocs"
    );
    for (case, [one, two]) in cases.iter().zip(medians) {
        println!(
            "{:<52} {one:>6.1} ns {two:>6.1} ns {:>7.2} {:>10} {:>8.2}",
            case.name,
            two / one,
            "",
            case.allocations
        );
    }
}
