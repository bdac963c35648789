//! Buyers who send nonsense, and more of it than anybody wants.

use crate::fixture::{Fixture, OPENING_NIGHT, order};
use e2e::local_stack::Port;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_gets_a_clear_answer_and_harms_nobody() {
    let fixture = Fixture::start().await;
    let with = |field: &str, value: Value| {
        let mut order = order();
        order[field] = value;
        order
    };
    let mut first = order();
    first["idempotencyKey"] = json!("mine");
    assert_eq!(fixture.post("/api/bookings", &first).await.in_words(), "201 Confirmed");
    let mut other = first.clone();
    other["ticketCount"] = json!(2);
    let unknown_event = with("eventId", json!("22222222-2222-4222-8222-222222222222"));
    for (what, order, expected, word) in [
        ("a text", json!("a booking, please"), "400 INVALID_REQUEST", "JSON object"),
        ("a negative count", with("ticketCount", json!(-1)), "422 INVALID_REQUEST", "ticketCount"),
        ("a huge count", with("ticketCount", json!(1e300)), "422 INVALID_REQUEST", "ticketCount"),
        ("an unknown event", unknown_event, "404 EVENT_NOT_FOUND", "no event"),
        ("a key with another body", other, "409 IDEMPOTENCY_KEY_REUSED", "idempotency key"),
        ("a body of 1 MiB", with("userId", json!("x".repeat(1 << 20))), "413 INVALID_REQUEST", ""),
    ] {
        let seen = fixture.post("/api/bookings", &order).await;
        assert_eq!(seen.in_words(), expected, "{what}: {}", seen.body);
        assert!(seen.body["message"].as_str().unwrap().contains(word), "{what}: {}", seen.body);
    }
    for malformed in ["{", "", "{\"eventId\": ", "\u{0}", "[[[[[[[["] {
        let seen = fixture.post_text("/api/bookings", malformed.to_owned()).await;
        assert_eq!(seen.in_words(), "400 INVALID_REQUEST", "{malformed:?}: {}", seen.body);
    }
    headers_of_a_mebibyte(&fixture).await;
    slow_clients_keep_nobody_out(&fixture).await;
    let free = fixture.get(Port::Booking, "/api/events").await.body["events"][0]["available"].clone();
    assert_eq!(free, json!(99_998), "the first booking, and the one beside the slow clients");
    fixture.finish().await;
}

async fn raw(fixture: &Fixture, request: &[u8]) -> TcpStream {
    let address = fixture.stack.url(Port::Gateway);
    let mut stream = TcpStream::connect(address.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(request).await.unwrap();
    stream
}

async fn headers_of_a_mebibyte(fixture: &Fixture) {
    let head = format!("GET /api/events HTTP/1.1\r\nhost: x\r\nx-filler: {}\r\n\r\n", "x".repeat(1 << 20));
    let mut stream = raw(fixture, head.as_bytes()).await;
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
}

async fn slow_clients_keep_nobody_out(fixture: &Fixture) {
    let head = format!(
        "POST /api/bookings HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{{\"eventId\": \"{OPENING_NIGHT}\""
    );
    let begin = Instant::now();
    let mut slow = Vec::new();
    for _ in 0..100 {
        slow.push(raw(fixture, head.as_bytes()).await);
    }
    assert_eq!(fixture.book().await.in_words(), "201 Confirmed");
    let mut answer = String::new();
    let mut stream = slow.pop().unwrap();
    let read = tokio::time::timeout(Duration::from_secs(30), stream.read_to_string(&mut answer)).await;
    assert!(read.is_ok() && answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(begin.elapsed() < Duration::from_secs(20));
}
