//! What the patterns are worth: seats sold per second and how long buyers wait while something is wrong, with the patterns and
//! without them; what a hot event sells beside many under the same load; and how long the end of a sale takes under overload.

mod finishing;
mod hot;
mod pods;
mod providers;

use crate::load_generator::Answer;
use crate::local_stack::LocalStackError;
use crate::progress::Progress;
use std::time::Duration;

/// Events that buyers buy seats of, where it is not to matter which.
const EVENTS: i32 = 200;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// One event that everybody wants, beside many.
    Hot,
    /// The first payment provider refuses, hangs or fails, with the patterns and without.
    Providers,
    /// One of three pods of the catalog fails, with ejection and without.
    Pods,
    /// The end of a sale, under overload and without.
    Finishing,
}

/// Settings of the measurement.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Which parts, separated by commas [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Seconds for each case.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    case_seconds: u64,
}

/// What a case found.
struct Measured {
    time: Duration,
    confirmed: usize,
    pending: usize,
    failed: usize,
    /// Of the failed ones, those that were told to come back.
    unavailable: usize,
    took_ms: Vec<u64>,
}

impl Measured {
    /// The last order of each buyer is given up when the time is over: nobody has refused that.
    fn of(answers: &[Answer], buyers: usize, time: Duration) -> Self {
        let count = |wanted: u16| answers.iter().filter(|answer| answer.status == wanted).count();
        let (confirmed, pending, unavailable) = (count(201), count(202), count(503));
        let given_up = count(0).min(buyers);
        let failed = answers.len() - confirmed - pending - given_up;
        Self { time, confirmed, pending, failed, unavailable, took_ms: sorted_ms(answers) }
    }

    /// Seats per second that somebody has or will have.
    fn goodput(&self) -> f64 {
        self.per_second(self.confirmed + self.pending)
    }

    fn per_second(&self, count: usize) -> f64 {
        per_second(count, self.time)
    }
}

fn sorted_ms(answers: &[Answer]) -> Vec<u64> {
    let mut all: Vec<u64> =
        answers.iter().map(|answer| u64::try_from(answer.took.as_millis()).unwrap_or(u64::MAX)).collect();
    all.sort_unstable();
    all
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
fn per_second(count: usize, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
fn percent(part: usize, of: usize) -> f64 {
    if of == 0 { 0.0 } else { part as f64 * 100.0 / of as f64 }
}

/// Runs it and prints the tables. A goal that is missed is an error once all of them are printed.
pub async fn run(options: &Options, progress: &Progress) -> Result<(), LocalStackError> {
    let time = Duration::from_secs(options.case_seconds);
    let wanted = |part| options.only.is_empty() || options.only.contains(&part);
    let mut missed = Vec::new();
    if wanted(Part::Providers) {
        missed.extend(providers::measure(time, progress).await?);
        println!();
    }
    if wanted(Part::Hot) {
        missed.extend(hot::measure(time, progress).await?);
        println!();
    }
    if wanted(Part::Pods) {
        missed.extend(pods::measure(time, progress).await?);
        println!();
    }
    if wanted(Part::Finishing) {
        missed.extend(finishing::measure(time, progress).await?);
        println!();
    }
    if missed.is_empty() { Ok(()) } else { Err(LocalStackError::TooLittle(missed.join("; "))) }
}
