//! The processes of the local stack, and the end of their output.

use super::LocalStackError;
use crate::process::ProcessId;
use std::collections::VecDeque;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, Command};

/// Lines of output that are kept for the message about a process that ends by itself.
const LAST_LINES: usize = 15;

/// A process and the last lines of its output.
pub(super) struct Running {
    pub(super) name: &'static str,
    pub(super) child: Child,
    last: Arc<Mutex<VecDeque<String>>>,
}

impl Running {
    /// Starts a process; with `show`, its output is printed, with `name` before each line.
    pub(super) fn start(name: &'static str, mut command: Command, show: bool) -> Result<Self, LocalStackError> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let start = |source| LocalStackError::Start { what: name.to_owned(), source };
        let mut child = command.spawn().map_err(start)?;
        let last = Arc::new(Mutex::new(VecDeque::new()));
        if let Some(output) = child.stdout.take() {
            tokio::spawn(forward_lines(name, output, Arc::clone(&last), show));
        }
        if let Some(output) = child.stderr.take() {
            tokio::spawn(forward_lines(name, output, Arc::clone(&last), show));
        }
        Ok(Self { name, child, last })
    }

    pub(super) fn tail(&self) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Fails if it has ended.
    pub(super) fn check(&mut self) -> Result<(), LocalStackError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => Err(LocalStackError::Ended { what: self.name.to_owned(), tail: self.tail() }),
        }
    }

    /// The process, while it runs.
    pub(super) fn process(&self) -> Option<ProcessId> {
        self.child.id().and_then(ProcessId::of)
    }
}

/// Keeps the last lines, and with `show` prints each one with the name of its process before it.
async fn forward_lines(name: &str, output: impl AsyncRead + Unpin, last: Arc<Mutex<VecDeque<String>>>, show: bool) {
    let mut lines = BufReader::new(output).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if show {
            println!("{name:<18} | {line}");
        }
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() >= LAST_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
}
