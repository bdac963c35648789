//! How long it takes to buy a seat that is kept already, while nobody else is there, and while crowds poll and order. The seats
//! are kept before that: under overload hardly anybody gets one.

use super::{EVENTS, sorted_ms};
use crate::bench::percentile;
use crate::load_generator::{Answer, LoadGenerator, Reservation, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, Ports};
use crate::progress::Progress;
use futures::future::join_all;
use std::time::{Duration, Instant};

/// Buyers at once who buy a seat that is kept for them, each one after the other with a pause.
const FINISHING: usize = 4;
/// Under overload: those who ask all the time how their reservation stands, and those who order.
const POLLING: usize = 100;
const ORDERING: usize = 100;
/// Between two of them; and who is told to come back does so after this time.
const PAUSE: Duration = Duration::from_millis(100);

/// What buyers found who bought a seat that was kept.
#[derive(Default)]
struct Finished {
    /// Until they had it, however often they were told to come back.
    answers: Vec<Answer>,
    refused: usize,
}

pub(super) async fn measure(time: Duration, progress: &Progress) -> Result<(), LocalStackError> {
    println!(
        "{FINISHING} buyers buy seats that are kept for them, for {} s a case; until each is theirs, in milliseconds",
        time.as_secs()
    );
    println!("{:<42}{:>11}{:>10}{:>9}{:>9}", "beside them", "bought/s", "refused", "p50", "p99");
    let mut slowest = Vec::new();
    for (name, polling, ordering) in [("nobody", 0, 0), ("100 who poll and 100 who order", POLLING, ORDERING)] {
        progress.say(format!("{FINISHING} buyers finish, beside {name}"));
        let finished = case(polling, ordering, time).await?;
        let took = sorted_ms(&finished.answers);
        let [p50, p99] = [50, 99].map(|share| percentile(&took, share));
        let bought = super::per_second(finished.answers.len(), time);
        println!("{name:<42}{bought:>11.1}{:>10}{p50:>9}{p99:>9}", finished.refused);
        slowest.push(p99);
    }
    if let [unloaded, loaded] = slowest[..] {
        let times = super::percent(
            usize::try_from(loaded).unwrap_or(usize::MAX),
            usize::try_from(unloaded.max(1)).unwrap_or(1),
        ) / 100.0;
        println!("\nunder overload, 99 of 100 have their seat within {times:.1} times the time (wanted: 2)");
    }
    Ok(())
}

async fn case(polling: usize, ordering: usize, time: Duration) -> Result<Finished, LocalStackError> {
    let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
    let stack = LocalStack::start(
        LocalStack::release_program(),
        first_port,
        &[("REQUESTS_PER_USER", "0")],
        false,
        &Progress::quiet(),
    )
    .await?;
    let load = LoadGenerator::new(&stack, EVENTS, SEATS).await?;
    load.run(FINISHING, Duration::from_secs(2)).await;
    let count = usize::try_from(time.as_millis() / PAUSE.as_millis()).unwrap_or(usize::MAX);
    let kept = join_all((0..FINISHING).map(|_| keep(&load, count))).await;
    // Each asks about a reservation of his own.
    let polled = join_all((0..polling).map(|_| keep(&load, 1))).await.concat();
    let end = Instant::now() + time;
    let (finished, ..) = tokio::join!(
        join_all(kept.iter().map(|kept| finish(&load, kept, end))),
        join_all(polled.iter().map(|own| poll(&load, own, end))),
        async { if ordering > 0 { load.run(ordering, time).await } else { Vec::new() } },
    );
    stack.stop().await;
    let mut all = Finished::default();
    for one in finished {
        all.answers.extend(one.answers);
        all.refused += one.refused;
    }
    Ok(all)
}

/// Keeps so many seats, however often that is refused.
async fn keep(load: &LoadGenerator, count: usize) -> Vec<Reservation> {
    let mut kept = Vec::new();
    while kept.len() < count {
        match load.keep_a_seat().await {
            (Answer { status: 201, .. }, Some(reservation)) => kept.push(reservation),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
    kept
}

async fn finish(load: &LoadGenerator, kept: &[Reservation], end: Instant) -> Finished {
    let mut finished = Finished::default();
    for reservation in kept {
        let begin = Instant::now();
        if begin >= end {
            break;
        }
        let answer = loop {
            let answer = load.confirm(reservation).await;
            // One that is not through at the end counts with the time that it has taken so far.
            if matches!(answer.status, 200..=299) || Instant::now() >= end {
                break answer;
            }
            finished.refused += 1;
            tokio::time::sleep(PAUSE).await;
        };
        finished.answers.push(Answer { took: begin.elapsed(), ..answer });
        tokio::time::sleep(PAUSE).await;
    }
    finished
}

async fn poll(load: &LoadGenerator, known: &Reservation, end: Instant) {
    while Instant::now() < end {
        if load.ask_about(known).await.status != 200 {
            tokio::time::sleep(PAUSE).await;
        }
    }
}
