//! More buyers than can be served, and a waiting room.

use crate::fixture::{Fixture, Seen, policy};
use contract::{BulkheadSettings, WaitingRoomSettings};
use e2e::local_stack::Port;
use futures::future::join_all;
use serde_json::json;
use std::time::{Duration, Instant};

const BUYERS: usize = 60;

/// Buys one seat, as a buyer does who looks at his place until it is his turn. The answers to his orders.
async fn buy(fixture: &Fixture, number: usize) -> Vec<Seen> {
    let buyer = format!("waiting-{number}");
    let mut seen = vec![fixture.book_on(&buyer, None).await];
    while let Some(last) = seen.last().filter(|last| last.status != 201) {
        let place = last.header("x-place").or_else(|| seen.iter().find_map(|one| one.header("x-place")));
        let place = place.map(str::to_owned);
        if let Some(place) = &place {
            let turn = async || fixture.standing(&buyer, place).await.body["admitted"] == true;
            fixture.until("it is his turn", turn).await;
        }
        seen.push(fixture.book_on(&buyer, place.as_deref()).await);
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn more_buyers_than_can_be_served_wait_in_order() {
    let mut fixture = Fixture::start().await;
    let mut night = policy("gateway");
    let few = BulkheadSettings { max_concurrent: 10, max_queued: 50, max_wait_ms: 1_000 };
    night.bulkheads.insert("booking".to_owned(), few);
    night.waiting_room = Some(WaitingRoomSettings {
        enter_load_percent: 80,
        exit_load_percent: 50,
        exit_for_ms: 1_000,
        min_admit_per_second: 5,
        max_admit_per_second: 100,
        admission_ttl_ms: 60_000,
    });
    fixture.configure("gateway", night).await;
    fixture.provider("stripe", json!({"latencyMs": 200})).await;
    let is_open = async |open: u64| fixture.metric(Port::Gateway, "waiting_room_open").await == open;
    let first = join_all((0..20).map(|number| buy(&fixture, number)));
    let others = async {
        let opened = fixture.until("it opens", async || is_open(1).await).await;
        (opened, join_all((0..BUYERS).map(|number| buy(&fixture, 20 + number))).await)
    };
    let (first, (opened, others)) = tokio::join!(first, others);
    fixture.provider("stripe", json!({})).await;
    let begin = Instant::now();
    let all: Vec<_> = first.iter().chain(&others).collect();
    assert!(all.iter().all(|answers| answers.last().unwrap().status == 201), "everybody has a seat in the end");
    let waited = all.iter().filter(|answers| answers.iter().any(|one| one.in_words() == "202 Waiting")).count();
    assert!(waited > BUYERS / 2, "{waited} of {BUYERS}");
    let refused = |answers: &[Vec<Seen>]| answers.iter().flatten().filter(|one| one.status == 503).count();
    assert_eq!(refused(&others), 0, "who comes while it is open is not refused");
    // They waited for a place at the gateway when it opened.
    let before = refused(&first);
    fixture.until("it closes", async || is_open(0).await).await;
    fixture.configure("gateway", policy("gateway")).await;
    fixture.until_well().await;
    let slowest = all.iter().flat_map(|answers| answers.iter()).map(|one| one.took).max().unwrap_or(Duration::ZERO);
    let sees = format!("{} x 201, {waited} of them after a wait", all.len());
    let metrics =
        format!("waiting_room_open 1 after {} ms, 0 x 503 from then on ({before} of those before)", opened.as_millis());
    fixture.record("more buyers than can be served", &sees, slowest, begin.elapsed(), &metrics);
    fixture.finish().await;
}
