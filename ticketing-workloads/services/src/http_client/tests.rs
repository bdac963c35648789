//! Against servers of the test's own, through all layers.

use super::*;
use axum::Router;
use axum::extract::State;
use contract::{CircuitState, DependencySettings, PolicySettings, RetryOn, WorkloadId};
use resilience::Resilience;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// A dependency with these settings.
fn dependency(settings: DependencySettings) -> &'static Dependency {
    let defaults = PolicySettings { dependencies: [("peer".to_owned(), settings)].into(), ..Default::default() };
    let id = WorkloadId::deployment("ticketing", "caller");
    Resilience::builder(id).dependency("peer").defaults(defaults).build().dependency("peer").unwrap()
}

/// Settings whose retries do not wait.
fn settings(retries: u32, on: &[RetryOn], codes: &[u16]) -> DependencySettings {
    let mut settings = DependencySettings::default();
    settings.retry.num_retries = retries;
    settings.retry.base_interval_ms = 1;
    settings.retry.retry_on = on.iter().copied().collect();
    settings.retry.http_status_codes = codes.iter().copied().collect();
    settings
}

/// One answer of a [`Script`].
#[derive(Clone)]
struct Line(u16, Vec<(HeaderName, HeaderValue)>);

fn line(status: u16, headers: &[(&'static str, &str)]) -> Line {
    let header = |(name, value): &(&'static str, &str)| (HeaderName::from_static(name), value.parse().unwrap());
    Line(status, headers.iter().map(header).collect())
}

/// A server that gives these answers one after the other, and the last of them for ever.
struct Script {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Script {
    async fn start(lines: Vec<Line>) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = (Arc::clone(&asked), Arc::new(lines));
        let app = Router::new().fallback(next_line).with_state(state);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address, asked }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn service(&self, dependency: &'static Dependency) -> HttpService {
        service(&format!("http://{}", self.address), dependency)
    }
}

async fn next_line(State((asked, lines)): State<(Arc<AtomicUsize>, Arc<Vec<Line>>)>) -> Response {
    let number = asked.fetch_add(1, Ordering::SeqCst).min(lines.len() - 1);
    let Line(status, headers) = lines[number].clone();
    (StatusCode::from_u16(status).unwrap(), HeaderMap::from_iter(headers)).into_response()
}

#[tokio::test]
async fn a_503_with_retry_after_is_rate_limited() {
    let server = Script::start(vec![line(503, &[("retry-after", "0")]), line(200, &[])]).await;
    let service = server.service(dependency(settings(1, &[RetryOn::RateLimited], &[])));
    assert_eq!(ask(&service, HttpCall::get("/")).await.unwrap().status, 200);
    assert_eq!(server.asked(), 2);
}

/// While it is waited for. Who is down for hours may say the same.
#[rstest::rstest]
#[case::waited_for(1, &[RetryOn::RateLimited], "0", HttpCall::get("/"), 20, CircuitState::Closed)]
#[case::not_listed(1, &[RetryOn::Timeout], "0", HttpCall::get("/"), 5, CircuitState::Open)]
#[case::no_retries(0, &[RetryOn::RateLimited], "0", HttpCall::get("/"), 5, CircuitState::Open)]
#[case::for_longer_than_the_call(1, &[RetryOn::RateLimited], "3600", HttpCall::get("/"), 5, CircuitState::Open)]
#[case::not_to_be_made_twice(1, &[RetryOn::RateLimited], "0", post(None), 5, CircuitState::Open)]
#[tokio::test]
async fn a_server_that_says_when_to_come_back_opens_no_circuit_while_it_is_waited_for(
    #[case] retries: u32,
    #[case] on: &[RetryOn],
    #[case] wait: &str,
    #[case] call: HttpCall,
    #[case] asked: usize,
    #[case] state: CircuitState,
) {
    let busy = line(503, &[("retry-after", wait)]);
    let lines =
        (0..10).flat_map(|_| [busy.clone(), if state == CircuitState::Closed { line(200, &[]) } else { busy.clone() }]);
    let server = Script::start(lines.collect()).await;
    let dependency = dependency(settings(retries, on, &[]));
    let service = server.service(dependency);
    for _ in 0..10 {
        let _ = ask(&service, call.clone()).await;
    }
    assert_eq!((server.asked(), dependency.circuit().state), (asked, state));
}

/// No order went to the second provider for as long as the first one said so.
#[tokio::test]
async fn a_server_that_always_says_so_opens_the_circuit_with_the_last_attempts() {
    let server = Script::start(vec![line(503, &[("retry-after", "0")])]).await;
    let dependency = dependency(settings(1, &[RetryOn::RateLimited], &[]));
    let service = server.service(dependency);
    for _ in 0..10 {
        let _ = ask(&service, HttpCall::get("/")).await;
    }
    assert_eq!((server.asked(), dependency.circuit().state), (10, CircuitState::Open), "five calls of two attempts");
}

/// 429 is said to who asks too often.
#[tokio::test]
async fn a_429_opens_no_circuit() {
    let server = Script::start(vec![line(429, &[("retry-after", "1")])]).await;
    let dependency = dependency(settings(0, &[], &[]));
    let service = server.service(dependency);
    for _ in 0..10 {
        let error = ask(&service, HttpCall::get("/")).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(1)));
    }
    assert_eq!((server.asked(), dependency.circuit().state), (10, CircuitState::Closed));
}

/// Ours say when to come back with every failure; that they have retried says that it is one.
#[tokio::test]
async fn one_of_ours_that_has_failed_opens_it() {
    let server = Script::start(vec![line(503, &[("retry-after", "1"), ("x-retried", "true")])]).await;
    let dependency = dependency(settings(3, &[RetryOn::RateLimited, RetryOn::ServerError], &[503]));
    let service = server.service(dependency);
    for _ in 0..6 {
        ask(&service, HttpCall::get("/")).await.unwrap_err();
    }
    assert_eq!((server.asked(), dependency.circuit().state), (5, CircuitState::Open));
}

#[tokio::test]
async fn a_date_is_waited_for() {
    let soon = SystemTime::now() + Duration::from_secs(2);
    let server =
        Script::start(vec![line(503, &[("retry-after", &httpdate::fmt_http_date(soon))]), line(200, &[])]).await;
    let service = server.service(dependency(settings(1, &[RetryOn::RateLimited], &[])));
    let started = std::time::Instant::now();
    assert_eq!(ask(&service, HttpCall::get("/")).await.unwrap().status, 200);
    assert!(started.elapsed() >= Duration::from_millis(900), "asked again after {:?}", started.elapsed());
}

#[rstest::rstest]
#[case(408)]
#[case(409)]
#[case(425)]
#[tokio::test]
async fn a_listed_status_is_retried_and_at_last_the_answer(#[case] status: u16) {
    let server = Script::start(vec![line(status, &[("location", "/here")])]).await;
    let dependency = dependency(settings(2, &[], &[408, 409, 425]));
    let answer = ask(&server.service(dependency), HttpCall::get("/")).await.unwrap();
    assert_eq!((answer.status.as_u16(), &answer.headers["location"]), (status, &HeaderValue::from_static("/here")));
    assert_eq!(server.asked(), 3);
    assert_eq!(dependency.circuit().state, CircuitState::Closed);
    let unlisted = Script::start(vec![line(404, &[])]).await;
    assert_eq!(ask(&unlisted.service(dependency), HttpCall::get("/")).await.unwrap().status, 404);
    assert_eq!(unlisted.asked(), 1);
}

/// DNS that knows these addresses.
fn at(addresses: Vec<SocketAddr>) -> Resolve {
    Arc::new(move |_, _| {
        let addresses = addresses.clone();
        Box::pin(async move { Ok(addresses) })
    })
}

fn service_at(addresses: Vec<SocketAddr>, dependency: &'static Dependency, keep: Keep) -> HttpService {
    guarded(Bare::new("http://peer:8080", Some(dependency), at(addresses), keep), dependency)
}

/// A server that closes each connection instead of its second answer, and then takes new ones as before or not: as if the
/// connection had been idle for too long while the request was on its way.
async fn closes_instead_of_the_second_answer(takes_new_ones: bool) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&received);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            let one = async move {
                for number in 0..2 {
                    let mut request = [0; 4_096];
                    let Ok(1..) = stream.read(&mut request).await else { return };
                    count.fetch_add(1, Ordering::SeqCst);
                    if number == 0 {
                        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
                    }
                }
            };
            if takes_new_ones {
                tokio::spawn(one);
            } else {
                one.await;
                return;
            }
        }
    });
    (address, received)
}

fn post(key: Option<&'static str>) -> HttpCall {
    let mut call = HttpCall::post("/", &serde_json::json!({}));
    call.headers.extend(key.map(|key| (IDEMPOTENCY_KEY, HeaderValue::from_static(key))));
    call
}

/// Each of them was lost: 59 of 59 requests that came as the server closed.
#[rstest::rstest]
#[case::get(HttpCall::get("/"), true)]
#[case::with_a_key(post(Some("mine")), true)]
#[case::not_to_be_made_twice(post(None), false)]
#[tokio::test]
async fn a_request_that_meets_the_end_of_its_connection_is_sent_again(#[case] call: HttpCall, #[case] answered: bool) {
    let (address, received) = closes_instead_of_the_second_answer(true).await;
    // No retries: they have nothing to do with it.
    let service = service_at(vec![address], dependency(settings(0, &[], &[])), KEEP);
    assert_eq!(ask(&service, call.clone()).await.unwrap().status, 200);
    let second = ask(&service, call).await;
    if answered {
        assert_eq!((second.unwrap().status.as_u16(), received.load(Ordering::SeqCst)), (200, 3));
    } else {
        let error = second.unwrap_err();
        assert!(!error.never_reached() && error.to_string().contains("the connection broke"), "{error}");
        assert_eq!(received.load(Ordering::SeqCst), 2);
    }
}

/// The end of the connection has arrived here, and nobody has looked yet: the request does not begin on it, so it is sent on
/// another one, whatever it is.
#[tokio::test]
async fn a_request_that_never_began_is_sent_again() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (may_close, told) = std::sync::mpsc::channel::<()>();
    let (closed, has_closed) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let answer_one = || {
            let (mut stream, _) = listener.accept().unwrap();
            let read = stream.read(&mut [0; 4_096]).unwrap();
            assert!(read > 0);
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
            stream
        };
        let first = answer_one();
        told.recv().unwrap();
        drop(first);
        closed.send(()).unwrap();
        answer_one();
    });
    let service = service_at(vec![address], dependency(settings(0, &[], &[])), KEEP);
    ask(&service, post(None)).await.unwrap();
    // The only thread of the runtime waits here, and then asks before what drives the connection has its turn.
    may_close.send(()).unwrap();
    has_closed.recv().unwrap();
    tokio::task::yield_now().await;
    assert_eq!(ask(&service, post(None)).await.unwrap().status, 200);
    server.join().unwrap();
}

/// What may have arrived is never said not to have been sent: its sender would take it for not charged.
#[tokio::test]
async fn what_may_have_arrived_was_sent_though_no_new_connection_is_taken() {
    let (address, received) = closes_instead_of_the_second_answer(false).await;
    let service = service_at(vec![address], dependency(settings(0, &[], &[])), KEEP);
    ask(&service, post(Some("mine"))).await.unwrap();
    let error = ask(&service, post(Some("mine"))).await.unwrap_err();
    assert!(!error.never_reached(), "{error}");
    assert_eq!(received.load(Ordering::SeqCst), 2);
}

/// Case 15: each request that came as our server gave its connection up got no answer. Over real sockets, requests come within
/// the 150 ms around that moment.
#[tokio::test(flavor = "multi_thread")]
async fn none_of_many_requests_around_the_idle_limit_is_swallowed() {
    const IDLE_MS: u64 = 400;
    let answered = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&answered);
    let app = Router::new().fallback(move || {
        count.fetch_add(1, Ordering::SeqCst);
        std::future::ready("here")
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let idle_timeout = Duration::from_millis(IDLE_MS);
    let limits = resilience::server::Limits { idle_timeout, ..resilience::server::Limits::DEFAULT };
    let stop = tokio_util::sync::CancellationToken::new();
    tokio::spawn(resilience::server::serve(listener, app, limits, stop.clone(), Duration::ZERO));
    let _stop = stop.drop_guard();
    // As clients that keep their connections for longer than the server does; ours do not, see below.
    let keep = Keep { idle_time: Duration::from_secs(60), age: Duration::from_secs(60), ..KEEP };
    let clients = (0..150).map(|late| async move {
        let service = service_at(vec![address], dependency(settings(0, &[], &[])), keep);
        ask(&service, post(Some("mine"))).await.unwrap();
        tokio::time::sleep(Duration::from_millis(IDLE_MS - 75 + late)).await;
        let started = std::time::Instant::now();
        let answer = ask(&service, post(Some("mine"))).await;
        assert!(answer.as_ref().is_ok_and(|answer| answer.status == 200), "{late} ms: {answer:?}");
        assert!(started.elapsed() < Duration::from_secs(5), "{late} ms: answered after {:?}", started.elapsed());
    });
    futures::future::join_all(clients).await;
    assert_eq!(answered.load(Ordering::SeqCst), 300, "each is made once");
}

/// Ours never meet that moment; and with connections that a Service's one address spreads, added pods get their share in 30 s.
#[test]
fn our_clients_give_connections_up_before_our_servers_do() {
    let server = resilience::server::Limits::DEFAULT;
    assert!(KEEP.idle_time * 2 < server.idle_timeout && KEEP.idle_time * 2 < server.first_byte_timeout);
    assert!(KEEP.age < server.connection_age && server.connection_age < Duration::from_secs(30));
}

/// Case 17: three pods that were added got none of a steady load. DNS names them from some moment on.
#[tokio::test(flavor = "multi_thread")]
async fn pods_that_are_added_get_their_share_within_30_seconds() {
    let mut servers = Vec::new();
    for _ in 0..6 {
        servers.push(Script::start(vec![line(200, &[])]).await);
    }
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let named = Arc::new(AtomicUsize::new(3));
    let resolve: Resolve = {
        let named = Arc::clone(&named);
        Arc::new(move |_, _| {
            let now = addresses[..named.load(Ordering::SeqCst)].to_vec();
            Box::pin(async move { Ok(now) })
        })
    };
    let dependency = dependency(settings(0, &[], &[]));
    let service = guarded(Bare::new("http://peer:8080", Some(dependency), resolve, KEEP), dependency);
    let stop = tokio_util::sync::CancellationToken::new();
    let buyers: Vec<_> = (0..8)
        .map(|_| {
            let (service, stop) = (service.clone(), stop.clone());
            tokio::spawn(async move {
                while !stop.is_cancelled() {
                    ask(&service, post(Some("mine"))).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            })
        })
        .collect();
    let asked = || servers.iter().map(Script::asked).collect::<Vec<_>>();
    while asked()[..3].iter().any(|calls| *calls < 100) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(asked()[3..].iter().all(|calls| *calls == 0));
    named.store(6, Ordering::SeqCst);
    let added_at = std::time::Instant::now();
    // Of the calls of a second, each gets a tenth at least; it would be a sixth.
    loop {
        let before = asked();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let calls: Vec<_> = asked().iter().zip(before).map(|(now, before)| now - before).collect();
        if calls.iter().all(|one| *one * 10 >= calls.iter().sum::<usize>() && *one > 0) {
            break;
        }
        assert!(added_at.elapsed() < Duration::from_secs(30), "{calls:?} of the last second");
    }
    stop.cancel();
    for buyer in buyers {
        buyer.await.unwrap();
    }
}

/// A server that says with each answer which connection it came on.
async fn numbers_connections() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut number = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            number += 1;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-connection: {number}\r\n\r\n");
            tokio::spawn(async move {
                let mut request = [0; 4_096];
                while let Ok(1..) = stream.read(&mut request).await {
                    let _ = stream.write_all(answer.as_bytes()).await;
                }
            });
        }
    });
    address
}

#[rstest::rstest]
#[case::old(Keep { age: Duration::from_secs(1), ..KEEP })]
#[case::idle(Keep { idle_time: Duration::from_millis(800), ..KEEP })]
#[tokio::test]
async fn a_connection_is_used_again_until_it_is_old_or_idle_for_too_long(#[case] keep: Keep) {
    let service = service_at(vec![numbers_connections().await], dependency(settings(0, &[], &[])), keep);
    let connection = async || ask(&service, HttpCall::get("/")).await.unwrap().headers["x-connection"].clone();
    assert_eq!((connection().await, connection().await), ("1".parse().unwrap(), "1".parse().unwrap()));
    // For as long as there is: that it is not used any more cannot be seen from outside.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(connection().await, "2");
}

/// One of three pods was cut from its database and said so at once: 84 % of the answers were failures.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_that_fails_fast_costs_few_calls() {
    let failing = || line(503, &[("retry-after", "1"), ("x-retried", "true")]);
    let (well, ill) = (Script::start(vec![line(200, &[])]).await, Script::start(vec![failing()]).await);
    let third = Script::start(vec![line(200, &[])]).await;
    let dependency = dependency(settings(0, &[], &[]));
    let service = service_at(vec![well.address, ill.address, third.address], dependency, KEEP);
    let buyers = (0..16).map(|_| {
        let service = service.clone();
        tokio::spawn(async move {
            let mut failed = 0;
            for _ in 0..200 {
                failed += usize::from(ask(&service, post(Some("mine"))).await.is_err());
            }
            failed
        })
    });
    let failed: usize = futures::future::join_all(buyers).await.into_iter().map(Result::unwrap).sum();
    assert!(failed >= 3 && failed * 100 <= 2 * 3_200, "{failed} of 3200 calls failed");
    assert_eq!((dependency.circuit().state, dependency.circuit().opened_total), (CircuitState::Closed, 0));
    println!("{failed} of 3200 calls failed, of which {} were asked of the one that fails", ill.asked());
}

/// One buyer after another: none of 60 was sold anything.
#[tokio::test]
async fn one_of_three_that_fails_fast_costs_a_single_buyer_three_calls() {
    let (well, ill) = (Script::start(vec![line(200, &[])]).await, Script::start(vec![line(503, &[])]).await);
    let third = Script::start(vec![line(200, &[])]).await;
    let service = service_at(vec![well.address, ill.address, third.address], dependency(settings(0, &[], &[])), KEEP);
    let mut failed = 0;
    for _ in 0..60 {
        failed += usize::from(ask(&service, HttpCall::get("/")).await.is_err());
    }
    assert_eq!((failed, ill.asked()), (3, 3));
}

/// A buyer who had reached a limit made the pod that said so one with too much to do, for as long as the buyer was to wait.
#[tokio::test]
async fn who_refuses_one_buyer_goes_on_serving_the_others() {
    let refuses = line(429, &[("retry-after", "3600"), ("x-retried", "true"), ("x-refused", "asker")]);
    let (refusing, other) = (Script::start(vec![refuses]).await, Script::start(vec![line(200, &[])]).await);
    let dependency = dependency(settings(2, &[RetryOn::RateLimited, RetryOn::ServerError], &[]));
    let service = service_at(vec![refusing.address, other.address], dependency, KEEP);
    let mut refused = 0;
    for _ in 0..40 {
        refused += usize::from(ask(&service, HttpCall::get("/")).await.is_err());
    }
    assert_eq!((refused, refusing.asked(), other.asked()), (20, 20, 20));
    assert_eq!((dependency.circuit().state, dependency.circuit().opened_total), (CircuitState::Closed, 0));
}

/// Then it is nobody's fault alone.
#[tokio::test]
async fn if_all_fail_all_are_asked() {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(Script::start(vec![line(503, &[])]).await);
    }
    let mut settings = settings(0, &[], &[]);
    settings.circuit_breaker.manual_state = contract::ManualState::Closed;
    let service = service_at(servers.iter().map(|server| server.address).collect(), dependency(settings), KEEP);
    for _ in 0..60 {
        ask(&service, HttpCall::get("/")).await.unwrap_err();
    }
    assert!(servers.iter().all(|server| server.asked() > 15));
}

/// One that is left out is no evidence against the others; if most fail, the circuit has it soon.
#[tokio::test]
async fn if_all_fail_the_circuit_opens_hardly_later() {
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(Script::start(vec![line(503, &[])]).await);
    }
    let dependency = dependency(settings(0, &[], &[]));
    let service = service_at(servers.iter().map(|server| server.address).collect(), dependency, KEEP);
    let mut calls = 0;
    while dependency.circuit().state == CircuitState::Closed {
        ask(&service, HttpCall::get("/")).await.unwrap_err();
        calls += 1;
        assert!(calls <= 10, "it is still closed");
    }
    assert!(servers.iter().all(|server| server.asked() > 0));
}

/// A pod that has gone is not missed: the next one is asked within the same attempt.
#[tokio::test]
async fn an_endpoint_that_takes_no_connection_is_passed_over() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let server = Script::start(vec![line(200, &[])]).await;
    let service = service_at(vec![gone, server.address], dependency(settings(0, &[], &[])), KEEP);
    for _ in 0..20 {
        assert_eq!(ask(&service, post(None)).await.unwrap().status, 200);
    }
    assert_eq!(server.asked(), 20);
}

/// A server that takes requests and never answers.
async fn frozen() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&received);
    tokio::spawn(async move {
        let mut streams = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4_096];
            let _ = stream.read(&mut request).await;
            count.fetch_add(1, Ordering::SeqCst);
            streams.push(stream);
        }
    });
    (address, received)
}

/// It held all places of the bulkhead for the time of an attempt, and then its timeouts opened the circuit.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_that_is_frozen_costs_few_calls_and_no_circuit() {
    let (well, third) = (Script::start(vec![line(200, &[])]).await, Script::start(vec![line(200, &[])]).await);
    let (frozen, received) = frozen().await;
    let mut settings = settings(0, &[], &[]);
    settings.timeout.per_try_ms = 1_000;
    settings.timeout.request_ms = 1_000;
    let dependency = dependency(settings);
    let service = service_at(vec![well.address, frozen, third.address], dependency, KEEP);
    let started = std::time::Instant::now();
    let buyers = (0..32).map(|_| {
        let service = service.clone();
        tokio::spawn(async move {
            let (mut sold, mut failed) = (0, 0);
            while started.elapsed() < Duration::from_secs(3) {
                match ask(&service, post(Some("mine"))).await {
                    Ok(_) => sold += 1,
                    Err(_) => failed += 1,
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            (sold, failed)
        })
    });
    let outcomes = futures::future::join_all(buyers).await.into_iter().map(Result::unwrap);
    let (sold, failed) = outcomes.fold((0, 0), |(sold, failed), one| (sold + one.0, failed + one.1));
    println!("{failed} calls failed, {sold} did not; the frozen one got {}", received.load(Ordering::SeqCst));
    assert!(failed >= 1 && failed * 100 <= 5 * sold, "{failed} calls failed, {sold} did not");
    assert_eq!((dependency.circuit().state, dependency.circuit().opened_total), (CircuitState::Closed, 0));
}

/// If all hang, it is nobody's fault alone.
#[tokio::test(flavor = "multi_thread")]
async fn if_all_are_frozen_the_circuit_opens() {
    let mut settings = settings(0, &[], &[]);
    (settings.timeout.per_try_ms, settings.timeout.request_ms) = (100, 100);
    let dependency = dependency(settings);
    let servers = [frozen().await, frozen().await, frozen().await];
    let service = service_at(servers.iter().map(|(address, _)| *address).collect(), dependency, KEEP);
    for _ in 0..6 {
        assert!(ask(&service, post(None)).await.is_err());
    }
    assert_eq!(dependency.circuit().state, CircuitState::Open);
}

/// A server that answers one request on its only connection, closes it so long after the second one, and takes no other.
async fn closes_late(after: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        drop(listener);
        let mut request = [0; 4_096];
        let _ = stream.read(&mut request).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let _ = stream.read(&mut request).await;
        tokio::time::sleep(after).await;
    });
    address
}

/// In the last moments of an attempt, too: a payment that was charged was taken for one that was never asked for, and charged
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn what_may_have_arrived_was_sent_though_the_attempt_is_almost_over() {
    let one = async |after| {
        let mut settings = settings(0, &[], &[]);
        settings.timeout.per_try_ms = 300;
        let service = service_at(vec![closes_late(after).await], dependency(settings), KEEP);
        ask(&service, post(Some("mine"))).await.unwrap();
        let error = ask(&service, post(Some("mine"))).await.unwrap_err();
        (after, error.to_string(), error.never_reached())
    };
    let all = (0..200).map(|nth| one(Duration::from_micros(285_000 + nth * 100)));
    for (after, error, never_reached) in futures::future::join_all(all).await {
        assert!(!never_reached, "closed after {after:?}: {error}");
    }
}

/// A server that answers each connection's first request, takes the second, and is killed when it is told: all that is under
/// way breaks, and nothing new is taken.
async fn killed(kill: Arc<tokio::sync::Notify>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut connections = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                () = kill.notified() => return,
                Ok((mut stream, _)) = listener.accept() => connections.spawn(async move {
                    let mut request = [0; 4_096];
                    let _ = stream.read(&mut request).await;
                    std::future::pending::<()>().await;
                }),
            };
        }
    });
    address
}

/// All requests under way to it break at once: more than open the circuit.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_that_crashes_opens_no_circuit() {
    let kill = Arc::new(tokio::sync::Notify::new());
    let crashing = killed(Arc::clone(&kill)).await;
    let (well, third) = (Script::start(vec![line(200, &[])]).await, Script::start(vec![line(200, &[])]).await);
    let dependency = dependency(settings(0, &[], &[]));
    let service = service_at(vec![well.address, crashing, third.address], dependency, KEEP);
    let calls: Vec<_> = (0..60)
        .map(|_| {
            let service = service.clone();
            tokio::spawn(async move { ask(&service, post(None)).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    kill.notify_one();
    let failed =
        futures::future::join_all(calls).await.into_iter().filter(|call| call.as_ref().unwrap().is_err()).count();
    println!("{failed} calls were under way");
    assert!(failed >= 6, "{failed} calls were under way");
    assert_eq!((dependency.circuit().state, dependency.circuit().opened_total), (CircuitState::Closed, 0));
    for _ in 0..20 {
        assert_eq!(ask(&service, post(None)).await.unwrap().status, 200);
    }
}

/// What may be made twice does not fail with its endpoint.
#[tokio::test]
async fn a_request_that_meets_the_end_of_its_endpoint_goes_to_the_next_one() {
    let (gone, received) = closes_instead_of_the_second_answer(false).await;
    let server = Script::start(vec![line(200, &[])]).await;
    let service = service_at(vec![gone, server.address], dependency(settings(0, &[], &[])), KEEP);
    for _ in 0..8 {
        assert_eq!(ask(&service, post(Some("mine"))).await.unwrap().status, 200);
    }
    assert_eq!(received.load(Ordering::SeqCst), 2);
}

/// It may have been at work on it: to do it all again is for retries to decide.
#[tokio::test]
async fn a_request_that_is_lost_later_is_not_sent_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let received = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&received);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            for answer in [&b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"[..], b""] {
                let mut request = [0; 4_096];
                let Ok(1..) = stream.read(&mut request).await else { break };
                count.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(if answer.is_empty() { 700 } else { 0 })).await;
                let _ = stream.write_all(answer).await;
            }
        }
    });
    let service = service_at(vec![address], dependency(settings(0, &[], &[])), KEEP);
    ask(&service, HttpCall::get("/")).await.unwrap();
    let error = ask(&service, HttpCall::get("/")).await.unwrap_err();
    assert!(error.to_string().contains("the connection broke"), "{error}");
    assert_eq!(received.load(Ordering::SeqCst), 2);
}

/// A server without a place has read nothing: another one may have a place, and nobody is at fault.
#[tokio::test]
async fn who_has_no_place_for_a_connection_is_passed_over_and_has_not_failed() {
    let full = async || {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = resilience::server::Limits {
            connections: 1,
            place_timeout: Duration::ZERO,
            ..resilience::server::Limits::DEFAULT
        };
        let stop = tokio_util::sync::CancellationToken::new();
        tokio::spawn(resilience::server::serve(listener, Router::new(), limits, stop.clone(), Duration::ZERO));
        let mut held = tokio::net::TcpStream::connect(address).await.unwrap();
        held.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        (address, held, stop.drop_guard())
    };
    let (one, two, server) = (full().await, full().await, Script::start(vec![line(200, &[])]).await);
    let first = dependency(settings(0, &[], &[]));
    let service = service_at(vec![one.0, server.address], first, KEEP);
    for _ in 0..10 {
        assert_eq!(ask(&service, post(None)).await.unwrap().status, 200);
    }
    let second = dependency(settings(0, &[], &[]));
    let service = service_at(vec![one.0, two.0], second, KEEP);
    for _ in 0..10 {
        let error = ask(&service, post(None)).await.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(1)), "{error}");
    }
    assert_eq!(second.circuit().state, CircuitState::Closed);
}

/// A listener whose queue is full: the kernel answers no further connection.
fn takes_no_connection() -> (SocketAddr, impl Sized) {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    let connect = || std::net::TcpStream::connect_timeout(&address, Duration::from_millis(200));
    let queued: Vec<_> = std::iter::repeat_with(connect).map_while(Result::ok).take(100_000).collect();
    (address, (socket, queued))
}

#[tokio::test]
async fn the_connect_timeout_acts() {
    let (address, _held) = tokio::task::spawn_blocking(takes_no_connection).await.unwrap();
    let mut settings = settings(0, &[], &[]);
    settings.timeout.connect_ms = Some(100);
    let service = service_at(vec![address], dependency(settings), KEEP);
    let started = std::time::Instant::now();
    let error = ask(&service, post(None)).await.unwrap_err();
    assert!(error.never_reached() && error.to_string().contains("within 100 ms"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[rstest::rstest]
#[case("https://peer", "is not of HTTP without TLS")]
#[case("http://me:secret@peer", "has credentials")]
#[case("peer", "is not of HTTP")]
#[case("/path", "names no host")]
#[case("http://a b", "is no URL")]
#[tokio::test]
async fn an_address_that_cannot_be_asked_is_said(#[case] base: &str, #[case] why: &str) {
    let error = ask(&service(base, dependency(settings(0, &[], &[]))), HttpCall::get("/")).await.unwrap_err();
    assert!(error.never_reached() && error.to_string().contains(why), "{error}");
}

#[tokio::test]
async fn a_base_may_have_a_path() {
    let server = Script::start(vec![line(200, &[])]).await;
    let base = format!("http://{}/prefix/", server.address);
    assert_eq!(ask(&service(&base, dependency(settings(0, &[], &[]))), HttpCall::get("/x")).await.unwrap().status, 200);
}
