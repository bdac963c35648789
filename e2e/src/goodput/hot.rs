//! As many buyers of one event as of many.

use super::{EVENTS, Measured};
use crate::bench::percentile;
use crate::load_generator::{LoadGenerator, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, Port, Ports};
use crate::progress::Progress;
use contract::{BulkheadSettings, FlagSettings, FlagState, FlagsSettings, PolicySettings};
use serde_json::json;
use std::time::Duration;

/// Buyers at once, and the seats of the hot event.
const CROWD: usize = 200;
const HOT_SEATS: i32 = 50_000;
/// The hot event is to sell at least this share of what as many buyers buy of many events.
const HOT_SHARE: f64 = 0.7;

/// With limits that none of them reaches. The answer is the goal that was missed, if one was.
pub(super) async fn measure(time: Duration, progress: &Progress) -> Result<Option<String>, LocalStackError> {
    println!(
        "{CROWD} buyers at once for {} s a case, with limits that they do not reach and a database that waits for the disk",
        time.as_secs()
    );
    println!("{:<42}{:>11}{:>10}{:>9}{:>9}{:>9}", "they buy seats of", "seats/s", "failed/s", "503", "p50", "p99");
    let mut goodput = Vec::new();
    let mut missed = None;
    for (name, events, seats) in [("200 events", EVENTS, SEATS), ("one event of 50,000 seats", 1, HOT_SEATS)] {
        progress.say(format!("{CROWD} buyers of {name}"));
        let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
        let stack =
            LocalStack::start(LocalStack::release_program(), first_port, &[], false, &Progress::quiet()).await?;
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
        let measured = Measured::of(&load.run(CROWD, time).await, CROWD, time);
        stack.stop().await;
        let [p50, p99] = [50, 99].map(|share| percentile(&measured.took_ms, share));
        let failed = measured.per_second(measured.failed);
        let seats = measured.goodput();
        println!("{name:<42}{seats:>11.1}{failed:>10.1}{:>9}{p50:>9}{p99:>9}", measured.unavailable);
        goodput.push(seats);
        if measured.failed > 0 {
            missed = Some(format!(
                "{} of the orders for seats of {name} were not taken ({} times 503): either seats were free, or the time was \
                 long enough to sell all of them, and a shorter one says more",
                measured.failed, measured.unavailable
            ));
        }
    }
    let [spread, hot] = goodput[..] else { return Ok(None) };
    let share = if spread > 0.0 { hot / spread } else { 0.0 };
    let found = format!("the hot event sells {share:.2} of what the {EVENTS} events sell (at least {HOT_SHARE})");
    println!("\n{found}");
    Ok(missed.or_else(|| (share < HOT_SHARE).then_some(found)))
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
        degraded: None,
    };
    FlagsSettings { flags: [("MaxConcurrentBookings".to_owned(), limit.into())].into(), ..FlagsSettings::default() }
}
