//! What the patterns are worth: seats sold per second and how long buyers wait while the first payment provider is down,
//! with the patterns and without them; and what a hot event sells beside many events under the same load.

use crate::bench::percentile;
use crate::load_generator::{Answer, LoadGenerator, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, NO_BUYER_LIMITS, Port, Ports};
use crate::progress::Progress;
use contract::{
    BulkheadSettings, CircuitBreakerSettings, DependencySettings, FlagSettings, FlagState, FlagsSettings, ManualState,
    PolicySettings, RetrySettings, TimeoutSettings,
};
use reqwest::Client;
use serde_json::{Value, json};
use std::time::Duration;

/// Buyers at once.
const BUYERS: usize = 32;
/// Events that they buy seats of.
const EVENTS: i32 = 200;
/// How long each case is measured.
const MEASURED: Duration = Duration::from_secs(20);
/// The only thing that is left without the patterns towards services and providers: what an HTTP client has of itself (the ADR's 10 s).
const CLIENT_TIMEOUT_MS: u64 = 10_000;

/// Buyers at once of the hot event, and its seats.
const CROWD: usize = 200;
const HOT_SEATS: i32 = 50_000;
/// The hot event is to sell at least this share of what as many buyers buy of many events.
const HOT_SHARE: f64 = 0.7;

/// What a case found.
struct Measured {
    confirmed: usize,
    pending: usize,
    failed: usize,
    /// Of the failed ones, those that were told to come back.
    unavailable: usize,
    took_ms: Vec<u64>,
}

impl Measured {
    fn of(answers: &[Answer]) -> Self {
        let count = |wanted: &dyn Fn(u16) -> bool| answers.iter().filter(|answer| wanted(answer.status)).count();
        let took = |answer: &Answer| u64::try_from(answer.took.as_millis()).unwrap_or(u64::MAX);
        let mut took_ms: Vec<u64> = answers.iter().map(took).collect();
        took_ms.sort_unstable();
        let (confirmed, pending) = (count(&|status| status == 201), count(&|status| status == 202));
        let failed = answers.len() - confirmed - pending;
        Self { confirmed, pending, failed, unavailable: count(&|status| status == 503), took_ms }
    }

    /// Seats per second that somebody has or will have.
    fn goodput(&self) -> f64 {
        per_second(self.confirmed + self.pending)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
fn per_second(count: usize) -> f64 {
    count as f64 / MEASURED.as_secs_f64()
}

/// Runs it and prints the tables; `hot_only`: only that of the hot event.
pub async fn run(hot_only: bool, progress: &Progress) -> Result<(), LocalStackError> {
    if !hot_only {
        providers(progress).await?;
        println!();
    }
    hot_event(progress).await
}

/// As many buyers of one event as of many, with limits that none of them reaches.
async fn hot_event(progress: &Progress) -> Result<(), LocalStackError> {
    println!(
        "{CROWD} buyers at once for {} s a case, with limits that they do not reach and a database that waits for the disk",
        MEASURED.as_secs()
    );
    println!("{:<42}{:>11}{:>10}{:>9}{:>9}{:>9}", "they buy seats of", "seats/s", "failed/s", "503", "p50", "p99");
    let mut goodput = Vec::new();
    for (name, events, seats) in [("200 events", EVENTS, SEATS), ("one event of 50,000 seats", 1, HOT_SEATS)] {
        progress.say(format!("{CROWD} buyers of {name}"));
        let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
        let stack =
            LocalStack::start(LocalStack::release_program(), first_port, &NO_BUYER_LIMITS, false, &Progress::quiet())
                .await?;
        for (service, admin) in
            [("gateway", Port::GatewayAdmin), ("booking", Port::BookingAdmin), ("payment", Port::PaymentAdmin)]
        {
            stack.push(service, admin, room_for_all(service), room_for_all_flags()).await?;
        }
        let client = stack.connect().await?;
        client.batch_execute("ALTER SYSTEM SET fsync = on").await?;
        client.batch_execute("SELECT pg_reload_conf()").await?;
        let load = LoadGenerator::new(&stack, events, seats).await?;
        load.run(CROWD, Duration::from_secs(2)).await;
        let measured = Measured::of(&load.run(CROWD, MEASURED).await);
        stack.stop().await;
        let [p50, p99] = [50, 99].map(|share| percentile(&measured.took_ms, share));
        let failed = per_second(measured.failed);
        let seats = measured.goodput();
        println!("{name:<42}{seats:>11.1}{failed:>10.1}{:>9}{p50:>9}{p99:>9}", measured.unavailable);
        goodput.push(seats);
    }
    if let [spread, hot] = goodput[..] {
        let share = if spread > 0.0 { hot / spread } else { 0.0 };
        let found = format!("the hot event sells {share:.2} of what the {EVENTS} events sell (at least {HOT_SHARE})");
        if share < HOT_SHARE {
            return Err(LocalStackError::TooLittle(found));
        }
        println!("\n{found}");
    }
    Ok(())
}

/// The services' own settings, but for limits of what may be under way: the buyers are to wait for nothing but the sale.
fn room_for_all(service: &str) -> PolicySettings {
    // As many at once as ever, because they are what the connections of the pool are for; all others wait.
    let wide = |max_concurrent: u32| BulkheadSettings { max_concurrent, max_queued: 1_000, max_wait_ms: 60_000 };
    let bulkheads: &[(&str, u32)] = match service {
        "gateway" => &[("catalog", 100), ("booking", 400)],
        "booking" => &[("critical", 10)],
        _ => &[("external-api", 20), ("database", 10)],
    };
    PolicySettings {
        bulkheads: bulkheads.iter().map(|(name, at_once)| ((*name).to_owned(), wide(*at_once))).collect(),
        ..Default::default()
    }
}

fn room_for_all_flags() -> FlagsSettings {
    let limit = FlagSettings {
        state: FlagState::Enabled,
        variants: [("wide".to_owned(), json!(1_000))].into(),
        default_variant: Some("wide".to_owned()),
        targeting: None,
        kill_switch: None,
    };
    FlagsSettings { flags: [("MaxConcurrentBookings".to_owned(), limit)].into(), ..FlagsSettings::default() }
}

async fn providers(progress: &Progress) -> Result<(), LocalStackError> {
    println!("{BUYERS} buyers at once for {} s a case; seats per second, milliseconds", MEASURED.as_secs());
    println!(
        "without the patterns: towards services and providers a timeout of {} s and nothing else\n",
        CLIENT_TIMEOUT_MS / 1_000
    );
    println!(
        "{:<42}{:>11}{:>10}{:>10}{:>9}{:>9}",
        "the first provider", "confirmed/s", "pending/s", "failed/s", "p50", "p99"
    );
    let mut ratios = Vec::new();
    for (name, behaviour) in [
        ("works", json!({})),
        ("refuses connections", json!({"refuse": true})),
        ("takes them and never answers", json!({"latencyMs": 3_600_000})),
    ] {
        let mut goodput = Vec::new();
        for patterns in [true, false] {
            progress
                .say(format!("the first provider {name}, {} the patterns", if patterns { "with" } else { "without" }));
            let measured = case(&behaviour, patterns).await?;
            let [p50, p99] = [50, 99].map(|share| percentile(&measured.took_ms, share));
            let name = format!("{name}, {}", if patterns { "with" } else { "without" });
            let [confirmed, pending, failed] = [measured.confirmed, measured.pending, measured.failed].map(per_second);
            println!("{name:<42}{confirmed:>11.1}{pending:>10.1}{failed:>10.1}{p50:>9}{p99:>9}");
            goodput.push((measured.goodput(), p99));
        }
        if let [(with, p99_with), (without, p99_without)] = goodput[..] {
            let times = if without > 0.0 { format!("{:.2} times", with / without) } else { "all of".to_owned() };
            ratios.push(format!("{name}: {times} the seats, p99 {p99_with} instead of {p99_without} ms"));
        }
    }
    println!("\nwith the patterns, when the first provider …");
    for ratio in ratios {
        println!("  {ratio}");
    }
    Ok(())
}

async fn case(behaviour: &Value, patterns: bool) -> Result<Measured, LocalStackError> {
    let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
    // Each case has a local stack of its own: the circuits of the one before would still be open.
    let stack =
        LocalStack::start(LocalStack::release_program(), first_port, &NO_BUYER_LIMITS, false, &Progress::quiet())
            .await?;
    if !patterns {
        for (service, admin) in
            [("gateway", Port::GatewayAdmin), ("booking", Port::BookingAdmin), ("payment", Port::PaymentAdmin)]
        {
            stack.push(service, admin, nothing(service), FlagsSettings::default()).await?;
        }
    }
    let load = LoadGenerator::new(&stack, EVENTS, SEATS).await?;
    // Connections are open, statements are prepared.
    load.run(BUYERS, Duration::from_secs(2)).await;
    let url = stack.url(Port::Providers) + "/providers/stripe";
    let set = Client::new().put(url).body(behaviour.to_string()).send().await;
    set.and_then(reqwest::Response::error_for_status).map_err(LocalStackError::Simulator)?;
    let answers = load.run(BUYERS, MEASURED).await;
    stack.stop().await;
    Ok(Measured::of(&answers))
}

/// A policy that takes everything away but a timeout; the database is called as ever.
fn nothing(service: &str) -> PolicySettings {
    const WIDE: &str = "wide";
    let bare = DependencySettings {
        timeout: TimeoutSettings { request_ms: CLIENT_TIMEOUT_MS, per_try_ms: CLIENT_TIMEOUT_MS, connect_ms: None },
        retry: RetrySettings { num_retries: 0, ..Default::default() },
        circuit_breaker: CircuitBreakerSettings { manual_state: ManualState::Closed, ..Default::default() },
        bulkhead: Some(WIDE.to_owned()),
        fallback: Vec::new(),
    };
    let names: &[&str] = match service {
        "gateway" => &["catalog", "booking"],
        "booking" => &["payment"],
        _ => &["stripe", "paypal"],
    };
    let wide = BulkheadSettings { max_concurrent: 10_000, max_queued: 0, max_wait_ms: 0 };
    PolicySettings {
        dependencies: names.iter().map(|name| ((*name).to_owned(), bare.clone())).collect(),
        bulkheads: [(WIDE.to_owned(), wide)].into(),
        ..Default::default()
    }
}
