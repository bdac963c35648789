//! What only builds for tests do: end the process at a chosen point, fail or hang over a chosen object, lose a chosen task.

use clap::ValueEnum;
use std::{pin::pin, str::FromStr, time::Duration};

/// How long a task works on that is to end or to stall.
const FOR_TESTS: Duration = Duration::from_secs(3);

/// Where the process ends at once, as a crash would: nothing is released and nothing is finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CrashPoint {
    /// An action is decided; nothing of it is written.
    BeforeIntent,
    /// Its intent is in the ledger; nothing is done.
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
    /// The reconcile of an object of this name never ends: `hang=NAME`.
    Hang(String),
    /// The long-lived task of this name ends: `end=NAME`.
    End(String),
    /// The long-lived task of this name goes on no more, and does not end: `stall=NAME`.
    Stall(String),
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("panic", name)) => Ok(Self::Panic(name.to_owned())),
            Some(("hang", name)) => Ok(Self::Hang(name.to_owned())),
            Some(("end", name)) => Ok(Self::End(name.to_owned())),
            Some(("stall", name)) => Ok(Self::Stall(name.to_owned())),
            _ => Err("must be panic=NAME, hang=NAME, end=NAME or stall=NAME".to_owned()),
        }
    }
}

impl Fault {
    /// Fails over this object, or hangs, if it is meant for it.
    ///
    /// # Panics
    ///
    /// When it is told to: that is what a test asks for, and no release takes the flag.
    pub async fn provoke(&self, object: &str) {
        match self {
            Self::Panic(name) => assert_ne!(name, object, "provoked by a test"),
            Self::Hang(name) if name == object => std::future::pending().await,
            _ => {}
        }
    }

    /// Runs this long-lived task; if it is meant for it, only for a while.
    pub async fn limit(&self, name: &str, task: impl Future<Output = ()>) {
        let mut task = pin!(task);
        let stalls = match self {
            Self::End(meant) if meant == name => false,
            Self::Stall(meant) if meant == name => true,
            _ => return task.await,
        };
        tokio::select! {
            () = &mut task => {}
            // What it holds it keeps.
            () = tokio::time::sleep(FOR_TESTS) => if stalls { std::future::pending().await },
        }
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

/// Reads a switch that only tests may turn on.
pub fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "false" => Ok(false),
        "true" => in_tests(Ok(true)),
        _ => Err("must be true or false".to_owned()),
    }
}

/// Reads a fault.
pub fn parse_fault(text: &str) -> Result<Fault, String> {
    in_tests(text.parse())
}
