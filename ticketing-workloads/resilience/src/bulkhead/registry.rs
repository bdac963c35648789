//! The bulkheads of a workload, which come and go with its policy.

use super::state::{Bulkhead, Usage};
use crate::sync::lock;
use contract::BulkheadSettings;
use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};

/// Bulkheads that a workload may have, with some room for those of which the last calls are still under way.
const CAPACITY: usize = 64;

/// The bulkheads of a workload by index, so that a call finds its own with one load. The index of one that is gone is
/// used again once its last call has ended.
pub struct Bulkheads {
    bulkheads: [OnceLock<&'static Bulkhead>; CAPACITY],
    names: Mutex<BTreeMap<String, usize>>,
}

impl Bulkheads {
    /// The index of no bulkhead.
    pub const NONE: usize = usize::MAX;

    /// No bulkheads yet. It lives as long as the process.
    pub fn new() -> &'static Self {
        let bulkheads = Self { bulkheads: [const { OnceLock::new() }; CAPACITY], names: Mutex::default() };
        Box::leak(Box::new(bulkheads))
    }

    /// The bulkhead at an index.
    #[inline]
    pub fn get(&self, index: usize) -> Option<&'static Bulkhead> {
        self.bulkheads.get(index)?.get().copied()
    }

    /// Takes the bulkheads of a policy; those that stay keep their calls. The answer is the index of each.
    pub fn assign(&self, wanted: &BTreeMap<String, BulkheadSettings>) -> BTreeMap<String, usize> {
        let mut names = lock(&self.names);
        names.retain(|name, _| wanted.contains_key(name));
        for (name, settings) in wanted {
            let free = || {
                let taken = |index: usize| names.values().any(|used| *used == index);
                (0..CAPACITY).find(|index| !taken(*index) && self.get(*index).is_none_or(Bulkhead::is_empty))
            };
            let Some(index) = names.get(name).copied().or_else(free) else {
                tracing::warn!(bulkhead = %name, "too many bulkheads; calls pass without this one");
                continue;
            };
            let bulkhead = self.bulkheads[index].get_or_init(|| Bulkhead::new(settings));
            bulkhead.configure(settings);
            if names.insert(name.clone(), index).is_none() {
                bulkhead.begin_anew();
            }
        }
        names.clone()
    }

    /// How full each is.
    pub fn usage(&self) -> Vec<(String, Usage)> {
        let of = |(name, index): (&String, &usize)| Some((name.clone(), self.get(*index)?.usage()));
        lock(&self.names).iter().filter_map(of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_used_again_once_its_last_call_has_ended() {
        let bulkheads = Bulkheads::new();
        let one = BulkheadSettings { max_concurrent: 1, max_queued: 0, max_wait_ms: 0 };
        let assign = |names: &[&str]| {
            let wanted = names.iter().map(|name| ((*name).to_owned(), one.clone())).collect();
            let found = bulkheads.assign(&wanted);
            names.iter().map(|name| found.get(*name).copied()).collect::<Vec<_>>()
        };
        assert_eq!(assign(&["a", "b"]), [Some(0), Some(1)]);
        let held = bulkheads.get(0).unwrap().acquire(crate::Priority::default(), None).unwrap();
        assert!(bulkheads.get(0).unwrap().acquire(crate::Priority::default(), None).is_err());
        assert_eq!(assign(&["b", "c"]), [Some(1), Some(2)], "a call of a is still under way");
        drop(held);
        assert_eq!(assign(&["c", "d"]), [Some(2), Some(0)]);
        assert_eq!(
            bulkheads.usage()[1],
            ("d".to_owned(), Usage { limits: [1; 3], ..Usage::default() }),
            "nothing of a is left"
        );
        assert!(bulkheads.get(Bulkheads::NONE).is_none());
    }
}
