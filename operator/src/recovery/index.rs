//! The ledger as this process knows it: what its watch shows, and what it wrote itself, at once.
//!
//! Only a leader keeps it. Its watch begins after the lead was taken, so its first list has all that another leader made.

use super::object::{Entry, Told};
use crate::{
    fleet::index::{Affected, ObjectKey},
    kubernetes::guard::Guard,
};
use contract::WorkloadId;
use crds::Recovery;
use engine::recovery::{Outcome, Record};
use jiff::{SignedDuration, Timestamp};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;
use tracing::warn;

/// How long it is remembered that a person deleted something: as long as the longest cooldown.
const WITHDRAWN_FOR: Duration = Duration::from_secs(3600);
/// Most of those that are remembered of one workload.
const MOST_WITHDRAWN: usize = 100;

/// Most workloads of which it is remembered that something was deleted.
const MOST_WORKLOADS: usize = 1_000;
/// Most Recoveries that people made and that wait for one workload.
pub const MOST_WAITING: usize = 50;
/// Most Recoveries that people made in one namespace and that are looked at.
const MOST_BY_HAND: usize = 500;

/// The Recoveries, by workload.
#[derive(Default)]
pub struct LedgerIndex {
    known: Mutex<Known>,
    filled: AtomicBool,
}

#[derive(Default)]
struct Known {
    entries: BTreeMap<ObjectKey, Arc<Entry>>,
    of_workload: HashMap<WorkloadId, BTreeSet<ObjectKey>>,
    /// What was deleted before it was over, and when.
    withdrawn: HashMap<WorkloadId, Vec<(Instant, Arc<Entry>)>>,
}

impl LedgerIndex {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the first list has come.
    pub fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// The first list has come.
    pub fn set_filled(&self) {
        self.filled.store(true, Ordering::Release);
    }

    /// Takes in what a watch shows.
    pub fn put(&self, guard: &Guard<Recovery>) -> Vec<Affected> {
        match &guard.0 {
            Ok(recovery) => self.put_entry(Entry::of(recovery)),
            Err(unreadable) => {
                let recovery = ObjectKey::of(guard);
                warn!(%recovery, why = %unreadable, "a Recovery cannot be read; it counts for nothing");
                self.remove(&recovery, None)
            }
        }
    }

    /// Takes in an object, unless what is known of it is newer.
    pub fn put_entry(&self, entry: Entry) -> Vec<Affected> {
        let (key, workload) = (entry.key(), entry.workload.clone());
        let mut known = self.lock();
        if known.entries.get(&key).is_some_and(|old| !is_newer(&entry, old)) {
            return Vec::new();
        }
        if !known.has_room_for(&entry) {
            warn!(recovery = %key, "more than {MOST_BY_HAND} Recoveries of people in this namespace: it is not looked at");
            return Vec::new();
        }
        let before = known.entries.insert(key.clone(), Arc::new(entry)).map(|old| old.workload.clone());
        if let Some(before) = before.filter(|before| *before != workload) {
            known.detach(&before, &key);
        }
        known.of_workload.entry(workload.clone()).or_default().insert(key);
        vec![Affected::Recovery(workload)]
    }

    /// Takes an object out that is gone; of that uid, if one is given. What was not over is remembered for a while, so that it
    /// does not come back at once. What was over counts no more.
    pub fn remove(&self, key: &ObjectKey, uid: Option<&str>) -> Vec<Affected> {
        let mut known = self.lock();
        let Some(entry) = known.entries.get(key).filter(|entry| uid.is_none() || entry.meta.uid.as_deref() == uid)
        else {
            return Vec::new();
        };
        let (entry, workload) = (Arc::clone(entry), entry.workload.clone());
        known.entries.remove(key);
        known.detach(&workload, key);
        for withdrawn in known.withdrawn.values_mut() {
            withdrawn.retain(|(at, _)| at.elapsed() < WITHDRAWN_FOR);
        }
        known.withdrawn.retain(|_, withdrawn| !withdrawn.is_empty());
        if entry.record.finished_at.is_none() && known.withdrawn.len() < MOST_WORKLOADS {
            let withdrawn = known.withdrawn.entry(workload.clone()).or_default();
            if withdrawn.len() >= MOST_WITHDRAWN {
                withdrawn.remove(0);
            }
            withdrawn.push((Instant::now(), entry));
        }
        vec![Affected::Recovery(workload)]
    }

    /// When the actions of a namespace were begun within a time, over all its policies; what was only rehearsed is none.
    pub fn begun_in(&self, namespace: &str, within_ms: u64, now: Timestamp) -> Vec<Timestamp> {
        let within = SignedDuration::from_millis(i64::try_from(within_ms).unwrap_or(i64::MAX));
        let since = now.checked_sub(within).unwrap_or(Timestamp::MIN);
        let known = self.lock();
        let first = ObjectKey { namespace: namespace.to_owned(), name: String::new() };
        let all = known.entries.range(first..).take_while(|(key, _)| key.namespace == namespace);
        let known = all.filter(|(_, entry)| entry.told != Told::ByNewerVersion).map(|(_, entry)| &entry.record);
        let real = known.filter(|record| !record.dry_run);
        // What was cancelled before it was done has done nothing, and neither has what a person waits for.
        let done = real
            .filter(|record| record.executed_at.is_some() || (record.outcome != Outcome::Cancelled && !record.by_hand));
        done.map(|record| record.executed_at.unwrap_or(record.started_at)).filter(|at| *at >= since).collect()
    }

    /// An object.
    pub fn get(&self, key: &ObjectKey) -> Option<Arc<Entry>> {
        self.lock().entries.get(key).cloned()
    }

    /// The objects of a workload.
    pub fn of(&self, workload: &WorkloadId) -> Vec<Arc<Entry>> {
        let known = self.lock();
        let keys = known.of_workload.get(workload).into_iter().flatten();
        keys.filter_map(|key| known.entries.get(key).cloned()).collect()
    }

    /// What was deleted of a workload lately before it was over, with what is to be made of it.
    pub fn withdrawn_of(&self, workload: &WorkloadId, now: Timestamp) -> Vec<(Arc<Entry>, Record)> {
        let known = self.lock();
        let lately = known.withdrawn.get(workload).into_iter().flatten();
        let lately = lately.filter(|(at, _)| at.elapsed() < WITHDRAWN_FOR);
        lately.map(|(at, entry)| (Arc::clone(entry), withdrawn(&entry.record, at.elapsed(), now))).collect()
    }

    /// Every workload that has some.
    pub fn workloads(&self) -> Vec<WorkloadId> {
        self.lock().of_workload.keys().cloned().collect()
    }
}

impl Known {
    /// Anybody who may create Recoveries may create many. What the operator makes itself, it bounds itself.
    fn has_room_for(&self, entry: &Entry) -> bool {
        let key = entry.key();
        if !entry.record.by_hand || self.entries.contains_key(&key) {
            return true;
        }
        let first = ObjectKey { namespace: key.namespace.clone(), name: String::new() };
        let all = self.entries.range(first..).take_while(|(other, _)| other.namespace == key.namespace);
        all.filter(|(_, other)| other.record.by_hand).count() < MOST_BY_HAND
    }

    fn detach(&mut self, workload: &WorkloadId, key: &ObjectKey) {
        if let Some(keys) = self.of_workload.get_mut(workload) {
            keys.remove(key);
            if keys.is_empty() {
                self.of_workload.remove(workload);
            }
        }
    }
}

/// What is to be made of a record that was deleted before it was over: it is cancelled.
pub fn withdrawn(record: &Record, ago: Duration, now: Timestamp) -> Record {
    let at = now.checked_sub(ago).unwrap_or(now);
    Record { withdrawn: true, outcome: Outcome::Cancelled, finished_at: Some(at), ..record.clone() }
}

/// Whether one state of an object is newer than another. Versions grow. They are numbers wherever the store is etcd; where they
/// are not, what came last is the newest.
fn is_newer(one: &Entry, other: &Entry) -> bool {
    let (one, other) = (one.meta.resource_version.as_deref(), other.meta.resource_version.as_deref());
    let number = |version: Option<&str>| version.and_then(|version| version.parse::<u128>().ok());
    number(one).zip(number(other)).map_or(one != other, |(one, other)| one > other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(uid: &str, version: u64, phase: &str) -> Entry {
        let object = json!({
            "metadata": { "name": "one", "namespace": "n", "uid": uid, "resourceVersion": version.to_string() },
            "spec": { "targetRef": { "name": "w" }, "action": "RestartPod", "pod": { "name": "p", "uid": "u" } },
            "status": { "phase": phase },
        });
        Entry::of(&serde_json::from_value(object).unwrap())
    }

    fn workload() -> WorkloadId {
        WorkloadId::deployment("n", "w")
    }

    #[test]
    fn a_watch_that_lags_behind_the_own_write_changes_nothing() {
        let index = LedgerIndex::default();
        index.put_entry(entry("a", 10, "Waiting"));
        for late in [9, 10] {
            assert!(index.put_entry(entry("a", late, "Pending")).is_empty());
        }
        assert_eq!(index.of(&workload())[0].record.outcome, Outcome::Waiting);
        assert_eq!(index.put_entry(entry("a", 11, "Verifying")), [Affected::Recovery(workload())]);
        // Where versions are no numbers, what came last counts.
        let odd = |version: &str| {
            let mut odd = entry("a", 0, "Verifying");
            odd.meta.resource_version = Some(version.to_owned());
            odd
        };
        assert!(is_newer(&odd("x"), &odd("y")) && is_newer(&odd("y"), &odd("x")) && !is_newer(&odd("x"), &odd("x")));
        // It was deleted and made again under the same name: the end of the old one says nothing of the new one.
        index.put_entry(entry("b", 20, "Pending"));
        assert!(index.remove(&entry("a", 12, "Failed").key(), Some("a")).is_empty());
        assert!(index.put_entry(entry("a", 12, "Failed")).is_empty(), "a late word of the old one");
        assert_eq!(index.of(&workload())[0].meta.uid.as_deref(), Some("b"));
    }

    #[test]
    fn people_cannot_fill_the_memory() {
        let index = LedgerIndex::default();
        let named = |number: usize, by_hand: bool| {
            let mut one = entry("a", 1, "Pending");
            (one.meta.name, one.record.by_hand) = (Some(number.to_string()), by_hand);
            one
        };
        for number in 0..MOST_BY_HAND + 5 {
            index.put_entry(named(number, true));
        }
        assert_eq!(index.of(&workload()).len(), MOST_BY_HAND);
        index.put_entry(named(MOST_BY_HAND + 10, false));
        assert_eq!(index.of(&workload()).len(), MOST_BY_HAND + 1, "what the operator makes has room");
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_person_deleted_is_remembered_for_the_longest_cooldown() {
        let index = LedgerIndex::default();
        let now = Timestamp::UNIX_EPOCH;
        index.put_entry(entry("a", 1, "Waiting"));
        index.remove(&entry("a", 1, "").key(), None);
        assert!(index.of(&workload()).is_empty() && index.workloads().is_empty());
        let [(_, record)] = &index.withdrawn_of(&workload(), now)[..] else { panic!("one is withdrawn") };
        assert!(record.withdrawn && record.outcome == Outcome::Cancelled && record.finished_at == Some(now));
        tokio::time::advance(WITHDRAWN_FOR).await;
        assert!(index.withdrawn_of(&workload(), now).is_empty());
        // What was over counts no more.
        let mut over = entry("b", 2, "Failed");
        over.record.finished_at = Some(now);
        index.put_entry(over.clone());
        index.remove(&over.key(), None);
        assert!(index.withdrawn_of(&workload(), now).is_empty());
        for number in 0..2 * MOST_WITHDRAWN {
            let mut more = entry(&number.to_string(), 3, "Failed");
            more.meta.name = Some(number.to_string());
            index.put_entry(more.clone());
            index.remove(&more.key(), None);
        }
        assert_eq!(index.withdrawn_of(&workload(), now).len(), MOST_WITHDRAWN);
    }
}
