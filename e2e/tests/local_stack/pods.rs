//! Several pods of catalog and booking, named as headless Services name them; and a client that wants to keep the gateway busy.

use crate::fixture::{Fixture, Seen, order, policy, skip};
use contract::FlagsSettings;
use e2e::local_stack::{Port, can_name};
use futures::future::join_all;
use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;

/// What the gateway knows the pods as.
const NAME: &str = "catalog.pods";
const BOOKINGS: &str = "booking.pods";
/// All that fail are to be no more than so many of a hundred.
const MOST_PERCENT: usize = 2;
/// Within this time pods that were added are to have their share.
const SHARED_WITHIN: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn pods_fail_and_are_added() {
    let named = can_name().await;
    if let Err(missing) = &named {
        skip("the rows of several pods", missing);
    }
    let mut fixture = Fixture::start().await;
    never_reads(&mut fixture).await;
    if named.is_ok() {
        let hosts = three_catalogs(&mut fixture).await;
        one_fails(&mut fixture, &hosts).await;
        three_are_added(&mut fixture, &hosts).await;
        one_booking_fails(&mut fixture, &hosts).await;
        all_bookings_fail(&mut fixture, &hosts).await;
    }
    fixture.finish().await;
}

/// Pipelines requests over as many connections as there are places, and reads no answer.
async fn never_reads(fixture: &mut Fixture) {
    const CONNECTIONS: u16 = 1_024;
    let refused = "http_connections_refused_total";
    let insert = "INSERT INTO events (id, name, capacity, available)
                  SELECT gen_random_uuid(), repeat('A long evening ', 12), 9, 9 FROM generate_series(1, 200)";
    fixture.stack.connect().await.unwrap().batch_execute(insert).await.unwrap();
    let page = "/api/events?pageSize=100";
    assert_eq!(fixture.get(Port::Gateway, page).await.status, 200);
    let requests = format!("GET {page} HTTP/1.1\r\nhost: x\r\n\r\n").repeat(20);
    let gateway = SocketAddr::from((Ipv4Addr::LOCALHOST, fixture.stack.port(Port::Gateway)));
    let greedy = join_all((0..CONNECTIONS).map(|_| async {
        let socket = TcpSocket::new_v4().unwrap();
        // Small, so that little fills what the kernel keeps for it.
        socket.set_recv_buffer_size(4_096).unwrap();
        socket2::SockRef::from(&socket).set_tcp_mss(536).unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, 2), 0).into()).unwrap();
        let mut stream = socket.connect(gateway).await.unwrap();
        // One that is refused is closed before it has sent all.
        let _ = stream.write_all(requests.as_bytes()).await;
        stream
    }))
    .await;
    let begin = Instant::now();
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        let booked = fixture.book().await;
        assert_eq!(booked.in_words(), "201 Confirmed");
        slowest = slowest.max(booked.took);
    }
    // Each is cut off, at the latest when it has taken nothing for 20 s.
    let until = begin + Duration::from_secs(60);
    for mut stream in greedy {
        while stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.is_ok() {
            assert!(Instant::now() < until, "the gateway keeps the connection");
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }
    let cut_off = begin.elapsed();
    fixture.until_well().await;
    let refused = fixture.metric(Port::Gateway, refused).await;
    let metrics = format!("{refused} connections refused, the last one cut off after {} s", cut_off.as_secs());
    let what = format!("a client never reads, {CONNECTIONS} times");
    fixture.record(&what, "201 Confirmed", slowest, cut_off, &metrics);
}

fn address(pod: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, 0, pod)
}

/// Names these pods of the catalog from now on, and the first one of booking.
fn name(hosts: &Path, pods: &[u8]) {
    name_both(hosts, pods, &[1]);
}

fn name_both(hosts: &Path, catalogs: &[u8], bookings: &[u8]) {
    let lines = |name: &str, pods: &[u8]| {
        pods.iter().map(|pod| format!("{} {name}\n", address(*pod))).collect::<Vec<_>>().concat()
    };
    let (catalogs, bookings) = (lines(NAME, catalogs), lines(BOOKINGS, bookings));
    // In place, because the file itself is what the gateway sees.
    std::fs::write(hosts, format!("127.0.0.1 localhost\n{catalogs}{bookings}")).unwrap();
}

/// A figure of one pod of the catalog: the requests that it has answered from its database.
async fn answered(fixture: &Fixture, pod: u8) -> u64 {
    let url = format!("http://{}:{}/metrics", address(pod), fixture.stack.port(Port::Catalog));
    let text = reqwest::get(url).await.unwrap().text().await.unwrap();
    let is_it = |line: &&str| {
        line.starts_with("circuit_breaker_calls_total{")
            && line.contains(r#"service="database""#)
            && line.contains(r#"result="success""#)
    };
    text.lines().find(is_it).and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_default()
}

async fn until_ready(fixture: &Fixture, of: Port, pod: u8) {
    let url = format!("http://{}:{}/readyz", address(pod), fixture.stack.port(of));
    fixture
        .until("the pod is ready", async || reqwest::get(&url).await.is_ok_and(|answer| answer.status().is_success()))
        .await;
}

/// The gateway asks three pods, of which the third has no database; it neither tries again nor answers from memory.
async fn three_catalogs(fixture: &mut Fixture) -> PathBuf {
    let hosts = fixture.stack.folder().join("hosts");
    name(&hosts, &[1, 2]);
    fixture.stack.start_pod("catalog", "catalog-2", address(2), &[]).unwrap();
    let nowhere = [("DATABASE_URL", Some("postgres://postgres@127.0.0.1:1/postgres"))];
    fixture.stack.start_pod("catalog", "catalog-3", address(3), &nowhere).unwrap();
    for pod in [2, 3] {
        until_ready(fixture, Port::Catalog, pod).await;
    }
    fixture.stack.name_by("gateway", &hosts).unwrap();
    let url = format!("http://{NAME}:{}", fixture.stack.port(Port::Catalog));
    let bookings = format!("http://{BOOKINGS}:{}", fixture.stack.port(Port::Booking));
    fixture.restart_with("gateway", &[("CATALOG_URL", Some(&url)), ("BOOKING_URL", Some(&bookings))]).await;
    let mut bare = policy("gateway");
    let catalog = bare.dependencies.get_mut("catalog").unwrap();
    catalog.fallback.clear();
    catalog.retry.num_retries = 0;
    fixture.configure("gateway", bare).await;
    hosts
}

/// Eight people look at events, one time after the other, until `done`.
async fn look(fixture: &Fixture, done: impl AsyncFn() -> bool) -> Vec<Seen> {
    eight(async || fixture.events("").await, done).await
}

/// Eight people ask one time after the other, until `done`.
async fn eight(ask: impl AsyncFn() -> Seen, done: impl AsyncFn() -> bool) -> Vec<Seen> {
    let over = Cell::new(false);
    let lookers = join_all((0..8).map(|_| async {
        let mut seen = Vec::new();
        while !over.get() {
            seen.push(ask().await);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        seen
    }));
    let wait = async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        over.set(true);
    };
    tokio::join!(lookers, wait).0.into_iter().flatten().collect()
}

async fn one_fails(fixture: &mut Fixture, hosts: &Path) {
    let ejections = r#"http_endpoint_ejections_total{service="catalog"}"#;
    let answers = r#"circuit_breaker_calls_total{service="catalog",result="success"}"#;
    let before = fixture.metric(Port::Gateway, answers).await;
    let begin = Instant::now();
    name(hosts, &[1, 2, 3]);
    let left_out = Cell::new(None);
    let seen = look(fixture, async || {
        if left_out.get().is_none() && fixture.metric(Port::Gateway, ejections).await >= 1 {
            left_out.set(Some(begin.elapsed()));
        }
        let answered = fixture.metric(Port::Gateway, answers).await - before;
        assert!(begin.elapsed() < Duration::from_secs(60), "{answered} answers, left out: {:?}", left_out.get());
        // It comes back for one call after 5 s. Few calls would make a large share of the three that it takes to see it.
        left_out.get().is_some() && begin.elapsed() > Duration::from_secs(12) && answered >= 1_000
    })
    .await;
    let failed = seen.iter().filter(|one| one.status != 200).count();
    assert!(failed >= 1 && failed * 100 <= MOST_PERCENT * seen.len(), "{failed} of {} failed", seen.len());
    let opened = fixture.metric(Port::Gateway, r#"circuit_breaker_opened_total{service="catalog"}"#).await;
    assert_eq!(opened, 0, "one pod is not the catalog");
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let left_out = left_out.get().unwrap();
    name(hosts, &[1, 2]);
    fixture.stack.kill("catalog-3").await;
    let sees = format!("{} x 200, {failed} x 503", seen.len() - failed);
    let count = fixture.metric(Port::Gateway, ejections).await;
    let metrics = format!("left out {count} times, first after {} ms", left_out.as_millis());
    fixture.record("one of 3 catalogs without its database", &sees, slowest, left_out, &metrics);
}

async fn three_are_added(fixture: &mut Fixture, hosts: &Path) {
    let pods = [1, 2, 4, 5, 6];
    for (pod, of) in [(4, "catalog-4"), (5, "catalog-5"), (6, "catalog-6")] {
        fixture.stack.start_pod("catalog", of, address(pod), &[]).unwrap();
        until_ready(fixture, Port::Catalog, pod).await;
    }
    let figures = async || {
        let all = join_all(pods.map(|pod| answered(fixture, pod))).await;
        (Instant::now(), all)
    };
    let before = RefCell::new(figures().await);
    name(hosts, &pods);
    let begin = Instant::now();
    let seen = look(fixture, async || {
        let now = figures().await;
        let mut before = before.borrow_mut();
        if now.0 - before.0 < Duration::from_secs(1) {
            return false;
        }
        let calls: Vec<_> = now.1.iter().zip(&before.1).map(|(now, before)| now - before).collect();
        *before = now;
        let all: u64 = calls.iter().sum();
        assert!(begin.elapsed() < SHARED_WITHIN, "{calls:?} in the last second");
        // A fifth would be its share.
        calls.iter().all(|one| *one > 0 && *one * 10 >= all)
    })
    .await;
    let shared = begin.elapsed();
    assert!(seen.iter().all(|one| one.status == 200));
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let sees = format!("{} x 200", seen.len());
    let metrics = format!("each has its share after {} ms", shared.as_millis());
    fixture.record("three more catalogs beside two", &sees, slowest, shared, &metrics);
}

/// A figure of one pod of booking.
async fn figure(fixture: &Fixture, pod: u8, start: &str) -> u64 {
    let url = format!("http://{}:{}/metrics", address(pod), fixture.stack.port(Port::Booking));
    let text = reqwest::get(url).await.unwrap().text().await.unwrap();
    let figures = text.lines().filter(|line| line.starts_with(start));
    figures.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// The pods of booking in the end.
const BOOKING_PODS: [u8; 3] = [1, 2, 4];

/// A figure of each of them.
async fn figures(fixture: &Fixture, start: &str) -> Vec<u64> {
    join_all(BOOKING_PODS.map(|pod| figure(fixture, pod, start))).await
}

/// Whether it has grown since then, for each of them.
async fn grown(fixture: &Fixture, start: &str, before: &[u64]) -> bool {
    figures(fixture, start).await.iter().zip(before).all(|(now, before)| now > before)
}

/// One more pod of booking, with these changes; ready, and asked by nobody yet.
async fn add_booking(fixture: &mut Fixture, pod: u8, name: &'static str, changes: &[(&'static str, Option<&str>)]) {
    fixture.stack.start_pod("booking", name, address(pod), changes).unwrap();
    until_ready(fixture, Port::Booking, pod).await;
    let flags = FlagsSettings::default();
    fixture.stack.push_pod("booking", Port::BookingAdmin, address(pod), policy("booking"), flags).await.unwrap();
}

/// One of three pods of booking is cut off from its database and answers 503 at once, so it would have the fewest calls under way.
async fn one_booking_fails(fixture: &mut Fixture, hosts: &Path) {
    let ejections = r#"http_endpoint_ejections_total{service="booking"}"#;
    add_booking(fixture, 2, "booking-2", &[]).await;
    add_booking(fixture, 3, "booking-3", &[("DATABASE_URL", Some("postgres://postgres@127.0.0.1:1/postgres"))]).await;
    let bad = format!("http://{}:{}/api/bookings", address(3), fixture.stack.port(Port::Booking));
    let client = reqwest::Client::new();
    fixture
        .until("it fails at once", async || {
            let begin = Instant::now();
            let answer = client.post(&bad).body(order().to_string()).send().await.unwrap();
            answer.status() == 503 && begin.elapsed() < Duration::from_millis(100)
        })
        .await;
    let begin = Instant::now();
    name_both(hosts, &[1, 2], &[1, 2, 3]);
    let left_out = Cell::new(None);
    let answers = Cell::new(0);
    let ask = async || {
        let seen = fixture.book().await;
        answers.set(answers.get() + 1);
        seen
    };
    let seen = eight(ask, async || {
        if left_out.get().is_none() && fixture.metric(Port::Gateway, ejections).await >= 1 {
            left_out.set(Some(begin.elapsed()));
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{} answers, left out: {:?}", answers.get(), left_out.get());
        left_out.get().is_some() && begin.elapsed() > Duration::from_secs(8) && answers.get() >= 600
    })
    .await;
    let failed = seen.iter().filter(|one| !matches!(one.status, 201 | 202)).count();
    assert!(failed >= 1 && failed * 100 <= MOST_PERCENT * seen.len(), "{failed} of {} failed", seen.len());
    let opened = fixture.metric(Port::Gateway, r#"circuit_breaker_opened_total{service="booking"}"#).await;
    assert_eq!(opened, 0, "one pod is not booking");
    let slowest = seen.iter().map(|one| one.took).max().unwrap();
    let left_out = left_out.get().unwrap();
    name_both(hosts, &[1, 2], &[1, 2]);
    fixture.stack.kill("booking-3").await;
    let sees = format!("{} x sold, {failed} x 503", seen.len() - failed);
    let count = fixture.metric(Port::Gateway, ejections).await;
    let metrics = format!("left out {count} times, first after {} ms", left_out.as_millis());
    fixture.record("one of 3 bookings without its database", &sees, slowest, left_out, &metrics);
}

/// What fails everywhere is the fault of none: all are asked, and none has to be let in again when it is over.
async fn all_bookings_fail(fixture: &mut Fixture, hosts: &Path) {
    let sold = r#"bookings_total{outcome="confirmed"}"#;
    let failed = r#"bookings_total{outcome="failed"}"#;
    add_booking(fixture, 4, "booking-4", &[]).await;
    name_both(hosts, &[1, 2], &BOOKING_PODS);
    let before = figures(fixture, sold).await;
    eight(async || fixture.book().await, async || grown(fixture, sold, &before).await).await;
    fixture.stack.crash_database().await;
    let begin = Instant::now();
    let in_time =
        || assert!(begin.elapsed() < Duration::from_secs(60), "not all of them are left out, and asked all the same");
    let left_out = async || {
        in_time();
        fixture.metric(Port::Gateway, r#"http_endpoints_ejected{service="booking"}"#).await >= 2
    };
    let mut seen = eight(async || fixture.book().await, left_out).await;
    let failures = figures(fixture, failed).await;
    let asked = async || {
        in_time();
        grown(fixture, failed, &failures).await
    };
    seen.extend(eight(async || fixture.book().await, asked).await);
    assert!(seen.iter().all(|one| matches!(one.status, 201 | 202 | 503 | 504)));
    fixture.stack.start_database().await.unwrap();
    let back = Instant::now();
    let before = figures(fixture, sold).await;
    let after = eight(
        async || fixture.book().await,
        async || {
            assert!(back.elapsed() < Duration::from_secs(60), "{:?} {before:?}", figures(fixture, sold).await);
            grown(fixture, sold, &before).await
        },
    )
    .await;
    let well = back.elapsed();
    let slowest = seen.iter().chain(&after).map(|one| one.took).max().unwrap();
    let count = |seen: &[Seen], good: bool| seen.iter().filter(|one| (one.status < 300) == good).count();
    let sees = format!("{} x 503; then all three sell", count(&seen, false));
    let metrics = "2 or 3 count as left out, and all are asked";
    fixture.record("all 3 bookings without their database", &sees, slowest, well, metrics);
}
