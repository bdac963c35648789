//! What only builds for tests do: end the process at a chosen point, or fail over a chosen object.

use clap::ValueEnum;
use std::str::FromStr;

/// Where the process ends at once, as a crash would: nothing is released and nothing is finished.
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

/// What fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The reconcile of an object of this name panics: `panic=NAME`.
    Panic(String),
    /// The long-lived task of this name ends: `end=NAME`.
    End(String),
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("panic", name)) => Ok(Self::Panic(name.to_owned())),
            Some(("end", name)) => Ok(Self::End(name.to_owned())),
            _ => Err("must be panic=NAME or end=NAME".to_owned()),
        }
    }
}

impl Fault {
    /// Fails, if it is meant for this object.
    ///
    /// # Panics
    ///
    /// When it is: that is what a test asks for, and no release takes the flag.
    pub fn provoke(&self, object: &str) {
        assert!(!matches!(self, Self::Panic(name) if name == object), "provoked by a test");
    }

    /// Whether this long-lived task is to end.
    pub fn ends(&self, task: &str) -> bool {
        matches!(self, Self::End(name) if name == task)
    }
}

/// Only builds for tests take the flags: a release refuses them.
fn in_tests<T>(parsed: Result<T, String>) -> Result<T, String> {
    if cfg!(debug_assertions) { parsed } else { Err("this is a release: only test builds take this".to_owned()) }
}

/// Reads a crash point.
pub fn parse(text: &str) -> Result<CrashPoint, String> {
    in_tests(CrashPoint::from_str(text, false))
}

/// Reads a fault.
pub fn parse_fault(text: &str) -> Result<Fault, String> {
    in_tests(text.parse())
}
