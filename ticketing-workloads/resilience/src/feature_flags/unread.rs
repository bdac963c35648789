//! Flags that no code reads: somebody has misspelt a key, or nobody needs the flag any more.

use crate::sync::lock;
use contract::flag_problem::{MAX_FLAG_PROBLEM_BYTES, MAX_FLAG_PROBLEMS, UNREAD_AFTER_MS};
use flags::{Flag, FlagSet};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Since when each flag has been there. Which of them were read is noted in the flags themselves.
#[derive(Default)]
pub(super) struct Known(Mutex<BTreeMap<Box<str>, Instant>>);

impl Known {
    /// Takes over what is known of the flags that stay.
    pub(super) fn configured(&self, before: &FlagSet, now_live: &FlagSet, now: Instant) {
        let mut since = lock(&self.0);
        let old = std::mem::take(&mut *since);
        for (key, flag) in now_live.iter() {
            if before.find(key).is_some_and(Flag::is_read) {
                flag.note_read();
            }
            since.insert(key.into(), old.get(key).copied().unwrap_or(now));
        }
    }

    /// Those that are long enough there, and that nobody has read.
    pub(super) fn unread(&self, live: &FlagSet, now: Instant) -> Vec<String> {
        let after = Duration::from_millis(UNREAD_AFTER_MS);
        let since = lock(&self.0);
        let is_old = |since: &Instant| now.saturating_duration_since(*since) >= after;
        let is_unread =
            |key: &str| key.len() <= MAX_FLAG_PROBLEM_BYTES && live.find(key).is_some_and(|flag| !flag.is_read());
        let unread = since.iter().filter(|(key, since)| is_old(since) && is_unread(key));
        unread.take(MAX_FLAG_PROBLEMS).map(|(key, _)| key.to_string()).collect()
    }
}
