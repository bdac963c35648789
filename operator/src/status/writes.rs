//! What this process wrote of statuses: how a stale cache is told from a fresh one, and how writes are kept few.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Least time between two writes of one status, unless an intent waits to be written.
pub const WRITE_INTERVAL: Duration = Duration::from_millis(200);
/// Versions that are remembered as superseded: as many writes as can follow each other before a watch shows the first.
const MOST_SUPERSEDED: usize = 4;
/// Objects whose writes are remembered before those that wrote long ago are forgotten.
const MANY: usize = 1024;

/// The writes, by the object's uid.
#[derive(Default)]
pub struct StatusWrites(Mutex<HashMap<String, Write>>);

/// The last write of an object's status.
struct Write {
    /// Versions of the object before it and before the writes just before it, newest first: a cache that still shows one of
    /// them is stale.
    superseded: VecDeque<String>,
    /// The generation for which an unreadable object was written; its status cannot be compared.
    unreadable_generation: Option<i64>,
    at: Instant,
}

impl Write {
    fn supersede(&mut self, version: String) {
        self.superseded.retain(|known| *known != version);
        self.superseded.truncate(MOST_SUPERSEDED - 1);
        self.superseded.push_front(version);
    }
}

impl StatusWrites {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Write>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the cache still shows the object as it was before one of this process's own last writes of its status.
    pub fn cache_is_stale(&self, meta: &ObjectMeta) -> bool {
        let (all, version) = (self.lock(), meta.resource_version.as_deref());
        let write = all.get(meta.uid.as_deref().unwrap_or_default());
        write.is_some_and(|write| write.superseded.iter().any(|superseded| Some(superseded.as_str()) == version))
    }

    /// Notes that what the cache shows of an object is older than the own writes, however many there were since.
    pub fn supersede(&self, cached: &ObjectMeta) {
        let mut all = self.lock();
        let write = all.get_mut(cached.uid.as_deref().unwrap_or_default());
        if let (Some(write), Some(version)) = (write, cached.resource_version.clone()) {
            write.supersede(version);
        }
    }

    /// How long the next write of this status has to wait, if it does.
    pub fn wait(&self, meta: &ObjectMeta, now: Instant) -> Option<Duration> {
        let at = self.lock().get(meta.uid.as_deref().unwrap_or_default())?.at;
        WRITE_INTERVAL.checked_sub(now.saturating_duration_since(at)).filter(|wait| !wait.is_zero())
    }

    /// Whether this process has written the status of an unreadable object in its present generation.
    pub fn told_unreadable(&self, meta: &ObjectMeta) -> bool {
        let all = self.lock();
        let write = all.get(meta.uid.as_deref().unwrap_or_default());
        write.is_some_and(|write| {
            write.unreadable_generation.is_some() && write.unreadable_generation == meta.generation
        })
    }

    /// Notes a write that changed an object from the version in `meta`.
    pub fn note(&self, meta: &ObjectMeta, unreadable: bool, now: Instant) {
        let Some(uid) = meta.uid.clone() else { return };
        let mut all = self.lock();
        if all.len() > MANY {
            all.retain(|_, write| {
                write.unreadable_generation.is_some()
                    || now.saturating_duration_since(write.at) < Duration::from_secs(60)
            });
        }
        let unreadable_generation = meta.generation.filter(|_| unreadable);
        let superseded = all.remove(&uid).map(|write| write.superseded).unwrap_or_default();
        let mut write = Write { superseded, unreadable_generation, at: now };
        if let Some(version) = meta.resource_version.clone() {
            write.supersede(version);
        }
        all.insert(uid, write);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(version: &str, generation: i64) -> ObjectMeta {
        ObjectMeta {
            uid: Some("u".into()),
            resource_version: Some(version.into()),
            generation: Some(generation),
            ..ObjectMeta::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_is_written_at_most_every_so_often() {
        let writes = StatusWrites::default();
        assert_eq!(writes.wait(&meta("1", 1), Instant::now()), None);
        writes.note(&meta("1", 1), false, Instant::now());
        assert_eq!(writes.wait(&meta("2", 1), Instant::now()), Some(WRITE_INTERVAL));
        tokio::time::sleep(WRITE_INTERVAL).await;
        assert_eq!(writes.wait(&meta("2", 1), Instant::now()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_cache_that_lags_behind_the_own_write_is_stale() {
        let writes = StatusWrites::default();
        writes.note(&meta("1", 1), false, Instant::now());
        assert!(writes.cache_is_stale(&meta("1", 1)) && !writes.cache_is_stale(&meta("2", 1)));
        writes.note(&meta("2", 1), false, Instant::now());
        assert!(writes.cache_is_stale(&meta("1", 1)), "it lags behind two writes");
        assert!(writes.cache_is_stale(&meta("2", 1)) && !writes.cache_is_stale(&meta("3", 1)));
        for version in 3..50 {
            writes.note(&meta(&version.to_string(), 1), false, Instant::now());
            writes.supersede(&meta("1", 1));
        }
        assert!(writes.cache_is_stale(&meta("1", 1)), "it still shows that one");
        assert!(writes.lock()["u"].superseded.len() <= MOST_SUPERSEDED);
        assert!(!writes.told_unreadable(&meta("2", 1)));
        writes.note(&meta("2", 3), true, Instant::now());
        assert!(writes.told_unreadable(&meta("9", 3)) && !writes.told_unreadable(&meta("9", 4)), "once for each edit");
    }
}
