//! Whether the services keep their memory under load: ten minutes of buyers, failures and changes of the configuration.

use crate::load_generator::{LoadGenerator, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, NO_BUYER_LIMITS, Port, Ports};
use crate::memory_growth::{MAX_GROWTH_PERCENT, Readings, grown, mebibytes};
use crate::progress::Progress;
use contract::{DependencySettings, FlagsSettings, PolicySettings, RetryOn};
use reqwest::Client;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Buyers at once.
const BUYERS: usize = 8;
/// The pause of a buyer between two orders: a load that two cores can bear beside everything else.
const PAUSE: Duration = Duration::from_millis(50);
/// Events that they buy seats of.
const EVENTS: i32 = 100;
/// Time between two readings of the memory.
const READ_EVERY: Duration = Duration::from_secs(2);
/// When the memory is first evaluated.
const WARM: Duration = Duration::from_secs(60);
/// The services whose memory is evaluated, and where they are configured.
const SERVICES: [(&str, Port); 5] = [
    ("gateway", Port::GatewayAdmin),
    ("catalog", Port::CatalogAdmin),
    ("booking", Port::BookingAdmin),
    ("payment", Port::PaymentAdmin),
    ("notification", Port::NotificationAdmin),
];

/// Why the soak did not pass.
#[derive(Debug, thiserror::Error)]
pub enum SoakError {
    /// The local stack could not be run.
    #[error(transparent)]
    LocalStack(#[from] LocalStackError),
    /// A service has more memory in the end.
    #[error("more than {MAX_GROWTH_PERCENT} % more memory in the end than after {} s: {services}", WARM.as_secs())]
    Grown {
        /// Names of the services, joined by commas.
        services: String,
    },
    /// The memory of a process cannot be read.
    #[error("cannot read the memory of {0}")]
    Unreadable(&'static str),
    /// Next to nothing was sold.
    #[error("only {sold} of {asked} orders were taken: this proves nothing")]
    Idle {
        /// Orders that were taken.
        sold: usize,
        /// All orders.
        asked: usize,
    },
}

/// Counts of what one buyer did.
#[derive(Default)]
struct Tally {
    asked: usize,
    taken: usize,
    looks: usize,
}

/// Runs it and prints the table.
pub async fn run(time: Duration, progress: &Progress) -> Result<(), SoakError> {
    let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
    let settings = [[("HOLD_SECONDS", "5")].as_slice(), &NO_BUYER_LIMITS].concat();
    let stack =
        LocalStack::start(LocalStack::release_program(), first_port, &settings, false, &Progress::quiet()).await?;
    let load = LoadGenerator::new(&stack, EVENTS, SEATS).await?;
    let begin = Instant::now();
    let end = begin + time;
    let (readings, tallies, failures) = tokio::join!(
        read_memory(&stack, begin, end, progress),
        futures::future::join_all((0..BUYERS).map(|buyer| buy(&load, buyer, end))),
        trouble(&stack, end),
    );
    let readings = readings?;
    let troubles = failures?;
    stack.stop().await;
    let sum = |figure: fn(&Tally) -> usize| tallies.iter().map(figure).sum::<usize>();
    let (asked, taken, looks) = (sum(|tally| tally.asked), sum(|tally| tally.taken), sum(|tally| tally.looks));
    println!("{} s, {BUYERS} buyers: {asked} orders, {taken} of them taken, {looks} looks at events", time.as_secs());
    println!("meanwhile {troubles} changes of provider, configuration or database connections\n");
    if taken * 2 < asked || asked == 0 {
        return Err(SoakError::Idle { sold: taken, asked });
    }
    match &grown(&readings, WARM, time)[..] {
        [] => Ok(()),
        grown => Err(SoakError::Grown { services: grown.join(", ") }),
    }
}

async fn buy(load: &LoadGenerator, buyer: usize, end: Instant) -> Tally {
    let mut tally = Tally::default();
    for nth in buyer.. {
        if Instant::now() >= end {
            break;
        }
        if nth % 2 == 0 {
            load.look(nth).await;
            tally.looks += 1;
        } else {
            let answer = if nth % 5 == 0 { load.reserve().await } else { load.book().await };
            tally.asked += 1;
            tally.taken += usize::from(matches!(answer.status, 201 | 202));
        }
        tokio::time::sleep(PAUSE).await;
    }
    tally
}

/// Something changes every five seconds; the answer is how often.
async fn trouble(stack: &LocalStack, end: Instant) -> Result<usize, LocalStackError> {
    let client = Client::new();
    let behave = async |behaviour: Value| {
        let url = stack.url(Port::Providers) + "/providers/stripe";
        let set = client.put(url).body(behaviour.to_string()).send().await;
        set.and_then(reqwest::Response::error_for_status).map(drop).map_err(LocalStackError::Simulator)
    };
    let mut times = 0;
    while Instant::now() < end {
        match times % 6 {
            0 => behave(json!({"refuse": true})).await?,
            1 => behave(json!({"latencyMs": 200})).await?,
            2 => behave(json!({"failPercent": 30})).await?,
            3 => behave(json!({})).await?,
            4 => {
                let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
                           AND backend_type = 'client backend'";
                stack.connect().await?.execute(cut, &[]).await?;
            }
            _ => {
                // A change that means something each time, and nothing to those who are called.
                let mut database = DependencySettings::default();
                database.timeout.request_ms += times;
                database.retry.base_interval_ms = 100;
                database.retry.retry_on =
                    [RetryOn::Timeout, RetryOn::ConnectFailure, RetryOn::Deadlock, RetryOn::VersionConflict].into();
                let policy =
                    PolicySettings { dependencies: [("database".to_owned(), database)].into(), ..Default::default() };
                for (service, admin) in SERVICES.into_iter().filter(|(service, _)| *service != "gateway") {
                    stack.push(service, admin, policy.clone(), FlagsSettings::default()).await?;
                }
            }
        }
        times += 1;
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    Ok(usize::try_from(times).unwrap_or(usize::MAX))
}

async fn read_memory(
    stack: &LocalStack,
    begin: Instant,
    end: Instant,
    progress: &Progress,
) -> Result<Readings, SoakError> {
    let mut readings = Readings::new();
    let mut minute = 1;
    while Instant::now() < end {
        for (service, _) in SERVICES {
            let process = stack.process(service)?;
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap_or_default();
            let bytes = resident_bytes(&status).ok_or(SoakError::Unreadable(service))?;
            readings.entry(service).or_default().push((begin.elapsed(), bytes));
        }
        if begin.elapsed().as_secs() >= minute * 60 {
            let now = |(service, all): (&&str, &Vec<(Duration, u64)>)| {
                format!("{service} {:.1}", mebibytes(all.last().map_or(0, |(_, bytes)| *bytes)))
            };
            let all: Vec<String> = readings.iter().map(now).collect();
            progress.say(format!("{minute} min, MiB: {}", all.join(", ")));
            minute += 1;
        }
        tokio::time::sleep(READ_EVERY).await;
    }
    Ok(readings)
}

/// `VmRSS:     5120 kB`, as the kernel writes it.
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1_024)
}
