//! Clients that want to hold the server up.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic, also in what they share")]

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use resilience::server::{Limits, serve};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n";
const TIMEOUT: Duration = Duration::from_secs(10);

struct Server {
    address: SocketAddr,
    /// Told when `/slow` is asked; it answers when it is told.
    asked: Arc<Notify>,
    answer: Arc<Notify>,
    stop: CancellationToken,
    _stop: DropGuard,
}

async fn start(limits: Limits) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (asked, answer) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let app = Router::new()
        .route("/", get(|| async { "small" }))
        .route("/large", get(|| async { "x".repeat(256 * 1024) }))
        .route("/slow", get(slow))
        .with_state((Arc::clone(&asked), Arc::clone(&answer)));
    let stop = CancellationToken::new();
    tokio::spawn(serve(listener, app, limits, stop.clone(), Duration::from_secs(5)));
    Server { address, asked, answer, stop: stop.clone(), _stop: stop.drop_guard() }
}

async fn slow(State((asked, answer)): State<(Arc<Notify>, Arc<Notify>)>) {
    asked.notify_one();
    answer.notified().await;
}

impl Server {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn connect_from(&self, last: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
        socket.connect(self.address).await.unwrap()
    }
}

/// Sends a request, and reads the answer's head; `None`: there is none.
async fn ask(stream: &mut TcpStream) -> Option<String> {
    stream.write_all(REQUEST).await.ok()?;
    let mut answer = vec![0; 4_096];
    let read = timeout(TIMEOUT, stream.read(&mut answer)).await.ok()?.ok()?;
    (read > 0).then(|| String::from_utf8_lossy(&answer[..read]).to_ascii_lowercase())
}

/// The end of the connection, as its client sees it.
async fn end_of(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let _ = timeout(TIMEOUT, stream.read_to_end(&mut rest)).await.expect("the server keeps the connection");
}

/// After the end, a reader would take a request; nobody does, and the kernel says so.
async fn taken_no_more(stream: &mut TcpStream) {
    let refused = async {
        loop {
            if stream.write_all(REQUEST).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_millis(500), refused).await.expect("a request after the end was taken");
}

/// Each request that came up to a second after the idle limit was read, and never answered.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_without_a_window_in_which_a_request_is_swallowed() {
    let server = start(Limits { idle_timeout: Duration::from_millis(100), ..Limits::default() }).await;
    let mut stream = server.connect().await;
    assert!(ask(&mut stream).await.is_some());
    end_of(&mut stream).await;
    taken_no_more(&mut stream).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_swallows_nothing_either() {
    let server = start(Limits::default()).await;
    let mut idle = server.connect().await;
    assert!(ask(&mut idle).await.is_some());
    let mut busy = server.connect().await;
    busy.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    timeout(TIMEOUT, server.asked.notified()).await.unwrap();
    server.stop.cancel();
    timeout(Duration::from_millis(500), end_of(&mut idle)).await.expect("until its end, a request would be taken");
    taken_no_more(&mut idle).await;
    server.answer.notify_one();
    let mut answer = String::new();
    timeout(TIMEOUT, busy.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("connection: close"), "{answer}");
}

/// Such a client held its connection for as long as it liked.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_pipelines_and_never_reads_is_cut_off() {
    let server = start(Limits { write_timeout: Duration::from_millis(300), ..Limits::default() }).await;
    let mut stream = server.connect().await;
    let pipelined = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100);
    let cut_off = async { while stream.write_all(&pipelined).await.is_ok() {} };
    timeout(TIMEOUT, cut_off).await.expect("the server keeps the connection");
}

/// As many of them as there are places shut the port for everybody.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_read_shut_no_port() {
    const CLIENTS: u16 = 1_024;
    let server = start(Limits { write_timeout: Duration::from_millis(500), ..Limits::default() }).await;
    assert_eq!(Limits::default().connections, usize::from(CLIENTS), "all places are taken");
    // More than the kernel takes for one that does not read; the least that it has, so that the answers fill it soon.
    let pipelined = b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n".repeat(20);
    let mut greedy = Vec::new();
    for number in 0..CLIENTS {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, if number % 2 == 0 { 2 } else { 3 }), 0).into()).unwrap();
        let mut stream = socket.connect(server.address).await.unwrap();
        stream.write_all(&pipelined).await.unwrap();
        greedy.push(stream);
    }
    let mut buyer = server.connect_from(4).await;
    assert!(ask(&mut buyer).await.is_some_and(|answer| answer.starts_with("http/1.1 200")), "the port is shut");
    for mut stream in greedy {
        let cut_off = async { while stream.write_all(&pipelined).await.is_ok() {} };
        timeout(TIMEOUT, cut_off).await.expect("the server keeps the connection");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_end_is_cut_off_though_idle_connections_are_kept() {
    let server = start(Limits { head_timeout: Duration::from_millis(200), ..Limits::default() }).await;
    let (mut slow, mut idle) = (server.connect().await, server.connect().await);
    assert!(ask(&mut idle).await.is_some());
    slow.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
    end_of(&mut slow).await;
    assert!(ask(&mut idle).await.is_some(), "it was idle for longer than a head may take");
}

/// One address could shut the port for everybody.
#[tokio::test(flavor = "multi_thread")]
async fn one_peer_does_not_keep_the_others_out() {
    let server = start(Limits { connections: 8, connections_per_peer: 4, ..Limits::default() }).await;
    let mut hog = Vec::new();
    for _ in 0..11 {
        let mut stream = server.connect_from(2).await;
        stream.write_all(&REQUEST[..10]).await.unwrap();
        hog.push(stream);
    }
    let mut refused = server.connect_from(2).await;
    end_of(&mut refused).await;
    let mut other = server.connect_from(3).await;
    assert!(ask(&mut other).await.is_some());
    // One that waits is served when another one ends.
    let mut waiting = hog.pop().unwrap();
    drop(hog);
    waiting.write_all(&REQUEST[10..]).await.unwrap();
    let mut answer = [0; 12];
    timeout(TIMEOUT, waiting.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_place_is_told_so() {
    let place_timeout = Duration::from_millis(100);
    let server = start(Limits { connections: 1, place_timeout, ..Limits::default() }).await;
    let mut served = server.connect().await;
    assert!(ask(&mut served).await.is_some());
    let answer = ask(&mut server.connect().await).await.unwrap();
    assert!(answer.starts_with("http/1.1 503") && answer.contains("retry-after: 1"), "{answer}");
    assert!(ask(&mut served).await.is_some());
}

/// Behind one proxy, or one address for all callers, half of the port stood empty.
#[tokio::test(flavor = "multi_thread")]
async fn one_peer_may_have_nearly_all_places_while_nobody_else_wants_them() {
    let server = start(Limits { connections: 32, connections_per_peer: 4, ..Limits::default() }).await;
    let mut streams = Vec::new();
    for _ in 0..28 {
        let mut stream = server.connect_from(2).await;
        assert!(ask(&mut stream).await.is_some());
        streams.push(stream);
    }
}

/// Each held a place for as long as a connection may be idle.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_never_asks_for_anything_is_closed_soon() {
    let (first_byte_timeout, idle_timeout) = (Duration::from_millis(200), Duration::from_secs(2));
    let server = start(Limits { first_byte_timeout, idle_timeout, ..Limits::default() }).await;
    let (mut silent, mut idle) = (server.connect().await, server.connect().await);
    assert!(ask(&mut idle).await.is_some());
    end_of(&mut silent).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(ask(&mut idle).await.is_some(), "one that has asked before may be idle for longer");
    // The time begins with the answer, not when somebody looks next.
    let answered = std::time::Instant::now();
    end_of(&mut idle).await;
    assert!((1_900..3_000).contains(&answered.elapsed().as_millis()), "{:?}", answered.elapsed());
}

/// Those that never asked for anything, too: nobody could come in for 75 s.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_make_room() {
    let server = start(Limits { connections: 4, ..Limits::default() }).await;
    let mut held = Vec::new();
    for number in 0..4 {
        let mut stream = server.connect().await;
        if number >= 2 {
            assert!(ask(&mut stream).await.is_some());
        }
        held.push(stream);
    }
    let mut busy = Vec::new();
    for _ in 0..4 {
        let mut stream = server.connect_from(2).await;
        stream.write_all(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        timeout(TIMEOUT, server.asked.notified()).await.expect("no idle connection made room");
        busy.push(stream);
    }
    for mut stream in held {
        end_of(&mut stream).await;
    }
    // A request that is being answered makes no room.
    let mut waits = server.connect_from(3).await;
    waits.write_all(REQUEST).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    server.answer.notify_waiters();
    for mut stream in busy {
        let mut answer = [0; 12];
        timeout(TIMEOUT, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
    }
}

/// While they were listened to, nobody else was accepted.
#[tokio::test(flavor = "multi_thread")]
async fn those_that_are_refused_keep_nobody_from_being_told() {
    let place_timeout = Duration::from_millis(50);
    let server = start(Limits { connections: 1, place_timeout, ..Limits::default() }).await;
    let mut served = server.connect().await;
    served.write_all(&REQUEST[..10]).await.unwrap();
    let started = std::time::Instant::now();
    let mut refused = Vec::new();
    for _ in 0..5 {
        let mut stream = server.connect().await;
        let answer = ask(&mut stream).await.unwrap();
        assert!(answer.starts_with("http/1.1 503"), "{answer}");
        // It stays open here, and is listened to there.
        refused.push(stream);
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

/// Three new pods got nothing of a steady load: the connections stayed where they were.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_connection_ends_with_an_answer_that_says_so() {
    let server = start(Limits { connection_age: Duration::from_secs(1), ..Limits::default() }).await;
    let mut stream = server.connect().await;
    assert!(!ask(&mut stream).await.unwrap().contains("connection: close"));
    let told = async {
        loop {
            let answer = ask(&mut stream).await.expect("it ended without a word");
            if answer.contains("connection: close") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(TIMEOUT, told).await.unwrap();
    end_of(&mut stream).await;
    assert!(ask(&mut server.connect().await).await.is_some());
}
