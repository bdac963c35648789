//! Points at which a test ends the process at once, as a crash would: nothing is released and nothing is finished.

use clap::ValueEnum;

/// Where the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CrashPoint {
    /// An action is decided; nothing of it is written.
    BeforeIntent,
    /// Its intent is in the status; nothing is done.
    AfterIntent,
    /// It is done; nothing of that is written.
    AfterAct,
    /// Its outcome is known; nothing of that is written.
    BeforeStatus,
}

impl CrashPoint {
    /// Ends the process if it is told to end here.
    pub fn reached(self, told: Option<Self>) {
        if told == Some(self) {
            eprintln!("crash point {self:?} reached");
            // Not an exit: no destructor runs and no buffer is flushed.
            std::process::abort();
        }
    }
}

/// Only builds for tests take the flag: a release refuses it.
pub fn parse(text: &str) -> Result<CrashPoint, String> {
    if cfg!(debug_assertions) {
        CrashPoint::from_str(text, false)
    } else {
        Err("this is a release: crash points are there in test builds only".to_owned())
    }
}
