//! Lines on standard error that show a person what is going on and for how long.

use std::future::Future;
use std::time::{Duration, Instant};

/// How often a long step says that it is still running.
const STILL_RUNNING_EVERY: Duration = Duration::from_secs(15);

/// Prints progress lines, each with the time since the start.
#[derive(Clone, Debug)]
pub struct Progress {
    start: Instant,
    quiet: bool,
}

impl Progress {
    /// Starts the clock.
    pub fn new() -> Self {
        Self { start: Instant::now(), quiet: false }
    }

    /// Says nothing; for tests.
    pub fn quiet() -> Self {
        Self { start: Instant::now(), quiet: true }
    }

    /// Time since the start.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// Prints one line.
    pub fn say(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("[{:>6.1}s] {}", self.elapsed().as_secs_f64(), text.as_ref());
        }
    }

    /// Prints `text`, then waits for `step`, and says now and then that it is still running.
    pub async fn during<T>(&self, text: &str, step: impl Future<Output = T>) -> T {
        self.say(format!("{text} …"));
        let begin = Instant::now();
        let short = text.split(" (").next().unwrap_or(text);
        let mut step = std::pin::pin!(step);
        loop {
            match tokio::time::timeout(STILL_RUNNING_EVERY, &mut step).await {
                Ok(done) => return done,
                Err(_) => self.say(format!("  still {short} ({} s)", begin.elapsed().as_secs())),
            }
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}
