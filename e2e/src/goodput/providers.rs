//! The first payment provider refuses, hangs or fails, with the patterns and without them.

use super::{EVENTS, Measured, percent};
use crate::bench::percentile;
use crate::load_generator::{LoadGenerator, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, Port, Ports};
use crate::progress::Progress;
use contract::{
    BulkheadSettings, CircuitBreakerSettings, DependencyPolicy, DependencySettings, FlagsSettings, ManualState,
    PolicySettings, RetrySettings, TimeoutSettings,
};
use reqwest::Client;
use serde_json::{Value, json};
use std::time::Duration;

/// Buyers at once.
const BUYERS: usize = 32;
/// Of a hundred orders so many are taken with the patterns, whatever is wrong with one provider.
const LEAST_TAKEN: f64 = 99.0;
/// Before a retry, where it is not the second of the ADR.
const SHORT_BACKOFF_MS: u64 = 100;
/// The only thing that is left without the patterns towards services and providers: what an HTTP client has of itself (the ADR's 10 s).
const CLIENT_TIMEOUT_MS: u64 = 10_000;

/// What stands before the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// The services' own settings.
    Patterns,
    /// They, and less time before a retry.
    ShortBackoff,
    Nothing,
}

/// The answer is the goal that was missed, if one was.
pub(super) async fn measure(time: Duration, progress: &Progress) -> Result<Option<String>, LocalStackError> {
    println!("{BUYERS} buyers at once for {} s a case; seats per second, milliseconds", time.as_secs());
    println!(
        "without the patterns: towards services and providers a timeout of {} s and nothing else\n",
        CLIENT_TIMEOUT_MS / 1_000
    );
    println!(
        "{:<42}{:>11}{:>10}{:>10}{:>9}{:>9}",
        "the first provider", "confirmed/s", "pending/s", "failed/s", "p50", "p99"
    );
    let (mut ratios, mut missed) = (Vec::new(), Vec::new());
    for (name, behaviour) in [
        ("works", json!({})),
        ("refuses connections", json!({"refuse": true})),
        ("takes them and never answers", json!({"latencyMs": 3_600_000})),
        ("fails each fifth request", json!({"failPercent": 20})),
        ("fails 20 % at random", json!({"failPercent": 20, "failAtRandom": true})),
    ] {
        let mut goodput = Vec::new();
        let waits = behaviour["failPercent"].is_number();
        for policy in [Policy::Patterns, Policy::ShortBackoff, Policy::Nothing] {
            if policy == Policy::ShortBackoff && !waits {
                continue;
            }
            let with = match policy {
                Policy::Patterns => "with",
                Policy::ShortBackoff => "with, 0.1 s",
                Policy::Nothing => "without",
            };
            progress.say(format!("the first provider {name}, {with} the patterns"));
            let measured = case(&behaviour, policy, time).await?;
            let [p50, p99] = [50, 99].map(|share| percentile(&measured.took_ms, share));
            let name = format!("{name}, {with}");
            let counts = [measured.confirmed, measured.pending, measured.failed];
            let [confirmed, pending, failed] = counts.map(|count| measured.per_second(count));
            println!("{name:<42}{confirmed:>11.1}{pending:>10.1}{failed:>10.1}{p50:>9}{p99:>9}");
            let taken = measured.confirmed + measured.pending;
            let share = percent(taken, taken + measured.failed);
            if policy != Policy::Nothing && share < LEAST_TAKEN {
                missed.push(format!(
                    "{name} the patterns: {share:.1} % of the orders are taken (at least {LEAST_TAKEN})"
                ));
            }
            if policy != Policy::ShortBackoff {
                goodput.push((measured.goodput(), share, p99));
            }
        }
        if let [(with, share_with, p99_with), (without, share_without, p99_without)] = goodput[..] {
            let times = if without > 0.0 { format!("{:.2} times", with / without) } else { "all of".to_owned() };
            let taken = format!("{share_with:.0} instead of {share_without:.0} % of the orders taken");
            ratios.push(format!("{name}: {times} the seats, {taken}, p99 {p99_with} instead of {p99_without} ms"));
        }
    }
    // Buyers wait for their answer, so that what takes long sells less: a wait before a retry, too, of a second by the ADR.
    println!("\nwith the patterns, when the first provider …");
    for ratio in ratios {
        println!("  {ratio}");
    }
    Ok((!missed.is_empty()).then(|| missed.join("; ")))
}

async fn case(behaviour: &Value, policy: Policy, time: Duration) -> Result<Measured, LocalStackError> {
    let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
    // Each case has a local stack of its own: the circuits of the one before would still be open.
    let stack = LocalStack::start(LocalStack::release_program(), first_port, &[], false, &Progress::quiet()).await?;
    match policy {
        Policy::Patterns => {}
        Policy::ShortBackoff => {
            stack.push("payment", Port::PaymentAdmin, short_backoff(), FlagsSettings::default()).await?;
        }
        Policy::Nothing => {
            for (service, admin) in
                [("gateway", Port::GatewayAdmin), ("booking", Port::BookingAdmin), ("payment", Port::PaymentAdmin)]
            {
                stack.push(service, admin, nothing(service), FlagsSettings::default()).await?;
            }
        }
    }
    let load = LoadGenerator::new(&stack, EVENTS, SEATS).await?;
    // Connections are open, statements are prepared.
    load.run(BUYERS, Duration::from_secs(2)).await;
    let url = stack.url(Port::Providers) + "/providers/stripe";
    let set = Client::new().put(url).body(behaviour.to_string()).send().await;
    set.and_then(reqwest::Response::error_for_status).map_err(LocalStackError::Simulator)?;
    let answers = load.run(BUYERS, time).await;
    stack.stop().await;
    Ok(Measured::of(&answers, BUYERS, time))
}

/// The built-in settings of payment, but for the wait before a retry.
fn short_backoff() -> PolicySettings {
    let mut said = DependencyPolicy::default();
    said.retry.base_interval_ms = Some(SHORT_BACKOFF_MS);
    PolicySettings { dependency_policies: [("stripe".to_owned(), said)].into(), ..Default::default() }
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
