//! Hot reload: which document runs, and what happens to the next one.
//!
//! Whatever comes, the last good configuration stays in force; a document is taken whole or not at all.

use crate::clock;
use crate::sync::lock;
use crate::workload::Resilience;
use contract::revision::{Admission, MAX_AHEAD_MS, admit};
use contract::{Applied, AppliedFrom, CONTRACT_VERSION, EffectiveReport, PushAnswer, PushOutcome, RuntimeConfig};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Configurations that are remembered after they went live.
const HISTORY: usize = 64;

/// Keeps the configuration of a workload.
pub struct ConfigStore {
    resilience: Arc<Resilience>,
    /// Newest first. The lock is held through a change, so that a push and the mount cannot overtake each other.
    history: Mutex<VecDeque<Applied>>,
}

impl ConfigStore {
    /// A store over built-in defaults.
    pub fn new(resilience: Arc<Resilience>) -> Arc<Self> {
        Arc::new(Self { resilience, history: Mutex::default() })
    }

    /// The live configuration.
    pub fn applied(&self) -> Applied {
        self.with_flags(current(&lock(&self.history)), clock::now_ms())
    }

    /// With what there is to say of its flags by now.
    fn with_flags(&self, applied: Applied, now_ms: i64) -> Applied {
        let flags = self.resilience.flags();
        Applied { flag_problems: flags.problems(now_ms), flags_unread: flags.unread(Instant::now()), ..applied }
    }

    /// What the workload runs by now: built-in values, effective values, and where each comes from.
    pub fn effective(&self) -> EffectiveReport {
        // Locked, so that the hash is that of the settings.
        let history = lock(&self.history);
        self.resilience.effective(current(&history).content_hash)
    }

    /// The last configurations that went live, newest first.
    pub fn history(&self) -> Vec<Applied> {
        lock(&self.history).iter().cloned().collect()
    }

    /// Takes a document, if it may be taken. `now_ms` is the wall clock, in milliseconds since the Unix epoch.
    pub fn apply(&self, bytes: &[u8], from: AppliedFrom, now_ms: i64) -> PushAnswer {
        let mut history = lock(&self.history);
        let (outcome, message) = self.take(&mut history, bytes, from, now_ms);
        let applied = self.with_flags(current(&history), now_ms);
        let answer = PushAnswer { outcome, applied, message };
        drop(history);
        self.log(&answer, from);
        answer
    }

    fn take(
        &self,
        history: &mut VecDeque<Applied>,
        bytes: &[u8],
        from: AppliedFrom,
        now_ms: i64,
    ) -> (PushOutcome, String) {
        let (config, mut unsupported) = match RuntimeConfig::parse(bytes) {
            Ok(parsed) => parsed,
            Err(error) => return (PushOutcome::RefusedInvalid, error.to_string()),
        };
        if config.contract_version > CONTRACT_VERSION {
            // The part that is understood is better than an older document; the operator learns that it is not all of it.
            unsupported.push(format!("contractVersion {}", config.contract_version));
        }
        if &config.workload != self.resilience.id() {
            let message =
                format!("the document is for {}, and this pod belongs to {}", config.workload, self.resilience.id());
            return (PushOutcome::RefusedInvalid, message);
        }
        let running = history.front().map(|applied| applied.revision);
        match admit(running, config.revision, now_ms) {
            Admission::Older => {
                let message = format!(
                    "revision {} is older than revision {}, which is live",
                    config.revision,
                    running.unwrap_or(0)
                );
                return (PushOutcome::RefusedOlder, message);
            }
            Admission::TooFarAhead => {
                let message = format!(
                    "revision {} is more than {} min ahead of this pod's clock ({now_ms})",
                    config.revision,
                    MAX_AHEAD_MS / 60_000
                );
                return (PushOutcome::RefusedFuture, message);
            }
            Admission::Take => {}
        }
        if let Some(running) = history.front_mut().filter(|running| running.content_hash == config.content_hash) {
            // The meaning runs already; only the order moves on.
            running.revision = config.revision;
            running.unsupported = unsupported;
            return (PushOutcome::Unchanged, String::new());
        }
        let unknown_dependencies = self.resilience.apply(&config);
        history.push_front(Applied {
            revision: config.revision,
            content_hash: config.content_hash,
            contract_version: CONTRACT_VERSION,
            unsupported,
            unknown_dependencies,
            flag_problems: Vec::new(),
            flags_unread: Vec::new(),
            applied_at_ms: now_ms,
            from,
        });
        history.truncate(HISTORY);
        (PushOutcome::Applied, String::new())
    }

    fn log(&self, answer: &PushAnswer, from: AppliedFrom) {
        let Applied { revision, content_hash, unsupported, unknown_dependencies, .. } = &answer.applied;
        self.resilience.metrics().config(answer.outcome, *revision);
        match answer.outcome {
            PushOutcome::Applied => tracing::info!(
                ?from,
                revision,
                hash = %content_hash.get(..6).unwrap_or_default(),
                ?unsupported,
                ?unknown_dependencies,
                "configuration applied"
            ),
            PushOutcome::Unchanged => tracing::debug!(?from, revision, "configuration is live already"),
            // A mounted copy lags behind a push by a minute or so: that is how it is meant to be.
            PushOutcome::RefusedOlder if from == AppliedFrom::Mount => {
                tracing::debug!(reason = %answer.message, "the mounted configuration is older than the live one");
            }
            outcome => tracing::warn!(
                ?from,
                ?outcome,
                reason = %answer.message,
                running_revision = revision,
                "configuration refused; the last valid configuration stays in effect"
            ),
        }
    }
}

fn current(history: &VecDeque<Applied>) -> Applied {
    let built_in = || Applied { contract_version: CONTRACT_VERSION, ..Applied::default() };
    history.front().cloned().unwrap_or_else(built_in)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
