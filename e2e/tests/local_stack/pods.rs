//! Several pods of the catalog, named as a headless Service names them; and a client that wants to keep the gateway busy.

use crate::fixture::{Fixture, Seen, policy, skip};
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

/// Names these pods from now on.
fn name(hosts: &Path, pods: &[u8]) {
    let lines = pods.iter().map(|pod| format!("{} {NAME}\n", address(*pod))).collect::<Vec<_>>().concat();
    // In place, because the file itself is what the gateway sees.
    std::fs::write(hosts, format!("127.0.0.1 localhost\n{lines}")).unwrap();
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

async fn until_ready(fixture: &Fixture, pod: u8) {
    let url = format!("http://{}:{}/readyz", address(pod), fixture.stack.port(Port::Catalog));
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
        until_ready(fixture, pod).await;
    }
    fixture.stack.name_by("gateway", &hosts).unwrap();
    let url = format!("http://{NAME}:{}", fixture.stack.port(Port::Catalog));
    fixture.restart_with("gateway", &[("CATALOG_URL", Some(&url))]).await;
    let mut bare = policy("gateway");
    let catalog = bare.dependencies.get_mut("catalog").unwrap();
    catalog.fallback.clear();
    catalog.retry.num_retries = 0;
    fixture.configure("gateway", bare).await;
    hosts
}

/// Eight people look at events, one time after the other, until `done`.
async fn look(fixture: &Fixture, done: impl AsyncFn() -> bool) -> Vec<Seen> {
    let over = Cell::new(false);
    let lookers = join_all((0..8).map(|_| async {
        let mut seen = Vec::new();
        while !over.get() {
            seen.push(fixture.events("").await);
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
        until_ready(fixture, pod).await;
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
