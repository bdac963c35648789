//! How long it takes to buy a seat that is kept already, while nobody else is there, and while crowds poll and order. The seats
//! are kept before that: under overload hardly anybody gets one.

use super::EVENTS;
use crate::bench::percentile;
use crate::load_generator::{Answer, LoadGenerator, Reservation, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, Ports};
use crate::progress::Progress;
use futures::future::join_all;
use std::time::{Duration, Instant};

/// 99 of 100 may take so many times as long as where nobody else is.
const MOST_TIMES: f64 = 2.0;
/// Each case is measured so often, in turns, and all its answers count: the 99th of a hundred of a few hundred differs from one time to
/// the next by half, also where nobody else is there.
const ROUNDS: u32 = 3;
/// What fewer answers say of 99 of 100 is chance.
const LEAST_ANSWERS: usize = 500;
/// Meanwhile at least this share of the orders are taken that are where nobody is held back.
const LEAST_ORDERS: f64 = 0.5;
/// Buyers at once who buy a seat that is kept for them, each one after the other with a pause.
const FINISHING: usize = 4;
/// Under overload: those who ask all the time how their reservation stands, and those who order.
const POLLING: usize = 100;
const ORDERING: usize = 100;
/// Between two of them; and who is told to come back does so after this time, much sooner than he was told.
const PAUSE: Duration = Duration::from_millis(100);
/// All are there for so long before it is measured.
const BEFORE: Duration = Duration::from_secs(3);

/// The services have been up for so long when the first buyer comes, as before a sale: the gateway knows by then what booking is like
/// when it is quiet.
const QUIET: Duration = Duration::from_secs(5);

/// What buyers found who bought a seat that was kept.
#[derive(Default)]
struct Finished {
    /// Until they had it, however often they were told to come back.
    answers: Vec<Answer>,
    refused: usize,
    /// What those beside them got.
    looks: Shown,
    orders: Shown,
}

impl Finished {
    fn add(&mut self, other: Self) {
        self.answers.extend(other.answers);
        self.refused += other.refused;
        self.looks = self.looks.and(other.looks);
        self.orders = self.orders.and(other.orders);
    }
}

/// Answers with what was asked for, and others.
#[derive(Clone, Copy, Default)]
struct Shown {
    good: usize,
    other: usize,
}

impl Shown {
    fn count(&mut self, good: bool) {
        if good { self.good += 1 } else { self.other += 1 }
    }

    fn and(self, other: Self) -> Self {
        Self { good: self.good + other.good, other: self.other + other.other }
    }

    fn per_second(self, time: Duration) -> String {
        let [good, other] = [self.good, self.other].map(|count| super::per_second(count, time));
        format!("{good:.0} (+{other:.0})")
    }
}

/// The answer is the goal that was missed, if one was.
pub(super) async fn measure(time: Duration, progress: &Progress) -> Result<Option<String>, LocalStackError> {
    println!(
        "{FINISHING} buyers buy seats that are kept for them, {ROUNDS} times for {} s a case, in turns; until each is theirs, in \
         milliseconds",
        time.as_secs()
    );
    println!(
        "{:<42}{:>11}{:>10}{:>9}{:>9}{:>16}{:>16}",
        "beside them", "bought/s", "refused", "p50", "p99", "orders/s (503)", "looks/s (503)"
    );
    let cases = [
        // Nor does anything ask how quick booking is.
        ("nobody", 0, 0, "no"),
        ("100 who poll and 100 who order", POLLING, ORDERING, "yes"),
        ("the same, and nobody is held back", POLLING, ORDERING, "no"),
    ];
    let mut all = cases.map(|_| Finished::default());
    for round in 1..=ROUNDS {
        for ((name, polling, ordering, hold_back), all) in cases.iter().zip(&mut all) {
            progress.say(format!("{FINISHING} buyers finish, beside {name} ({round} of {ROUNDS})"));
            all.add(case(*polling, *ordering, hold_back, time).await?);
        }
    }
    let mut found = Vec::new();
    for ((name, ..), finished) in cases.iter().zip(&all) {
        let mut took: Vec<_> = finished.answers.iter().map(|answer| micros(answer.took)).collect();
        took.sort_unstable();
        let [p50, p99] = [50, 99].map(|share| millis(percentile(&took, share)));
        let bought = super::per_second(took.len(), time * ROUNDS);
        let [orders, looks] = [finished.orders, finished.looks].map(|shown| shown.per_second(time * ROUNDS));
        println!("{name:<42}{bought:>11.1}{:>10}{p50:>9.1}{p99:>9.1}{orders:>16}{looks:>16}", finished.refused);
        if took.len() < LEAST_ANSWERS {
            return Ok(Some(format!("beside {name}, only {} seats were bought: too few to know a p99", took.len())));
        }
        found.push((p99, finished.orders.good));
    }
    let [(unloaded, _), (loaded, orders), (_, all_orders)] = found[..] else { return Ok(None) };
    let times = loaded / unloaded;
    let share = super::percent(orders, all_orders) / 100.0;
    let found = format!(
        "under overload, 99 of 100 have their seat within {times:.1} times the time (at most {MOST_TIMES}), and {share:.2} of the \
         orders are taken that are where nobody is held back (at least {LEAST_ORDERS})"
    );
    println!("\n{found}");
    Ok((times > MOST_TIMES || share < LEAST_ORDERS).then_some(found))
}

fn micros(took: Duration) -> u64 {
    u64::try_from(took.as_micros()).unwrap_or(u64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of one answer are far below 2^52")]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1_000.0
}

async fn case(polling: usize, ordering: usize, hold_back: &str, time: Duration) -> Result<Finished, LocalStackError> {
    let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
    let stack = LocalStack::start(
        LocalStack::release_program(),
        first_port,
        &[("REQUESTS_PER_USER", "0"), ("HOLD_BACK", hold_back)],
        false,
        &Progress::quiet(),
    )
    .await?;
    let load = LoadGenerator::new(&stack, EVENTS, SEATS).await?;
    tokio::time::sleep(QUIET).await;
    let count = usize::try_from((BEFORE + time).as_millis() / PAUSE.as_millis()).unwrap_or(usize::MAX);
    let kept = join_all((0..FINISHING).map(|_| keep(&load, count))).await;
    // Each asks about a reservation of his own.
    let polled = join_all((0..polling).map(|_| keep(&load, 1))).await.concat();
    let begin = Instant::now() + BEFORE;
    let end = begin + time;
    // On a thread of its own: a request that waits for those of the crowd before it has even been sent is none that a service keeps
    // waiting.
    let own = load.apart();
    let finishing = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(join_all(kept.iter().map(|kept| finish(&own, kept, begin, end)))))
    });
    let (finished, looks, orders) = tokio::join!(
        finishing,
        join_all(polled.iter().map(|own| crowd(begin, end, || async { load.ask_about(own).await.status == 200 }))),
        join_all((0..ordering).map(|_| crowd(begin, end, || async { matches!(load.book().await.status, 201 | 202) }))),
    );
    stack.stop().await;
    let sum = |shown: Vec<Shown>| shown.into_iter().fold(Shown::default(), Shown::and);
    let mut all = Finished { looks: sum(looks), orders: sum(orders), ..Finished::default() };
    let start = |source| LocalStackError::Start { what: "a thread for those who finish".to_owned(), source };
    for one in finished.map_err(std::io::Error::other).flatten().map_err(start)? {
        all.add(one);
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

/// Buys one after the other. Those that began from `begin` on count.
async fn finish(load: &LoadGenerator, kept: &[Reservation], begin: Instant, end: Instant) -> Finished {
    let mut finished = Finished::default();
    for reservation in kept {
        let since = Instant::now();
        if since >= end {
            break;
        }
        let mut refused = 0;
        let answer = loop {
            let answer = load.confirm(reservation).await;
            // One that is not through at the end counts with the time that it has taken so far.
            if matches!(answer.status, 200 | 201) || Instant::now() >= end {
                break answer;
            }
            refused += 1;
            tokio::time::sleep(PAUSE).await;
        };
        if since >= begin {
            finished.answers.push(Answer { took: since.elapsed(), ..answer });
            finished.refused += refused;
        }
        tokio::time::sleep(PAUSE).await;
    }
    finished
}

/// Asks again and again. What it got from `begin` on counts.
async fn crowd(begin: Instant, end: Instant, ask: impl AsyncFn() -> bool) -> Shown {
    let mut shown = Shown::default();
    while Instant::now() < end {
        let good = ask().await;
        if Instant::now() >= begin {
            shown.count(good);
        }
        if !good {
            tokio::time::sleep(PAUSE).await;
        }
    }
    shown
}
