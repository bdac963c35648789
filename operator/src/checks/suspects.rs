//! Pods that held a place for long when they were asked last: they share few places, so that others find some. Pure.
//!
//! They are known by namespace and uid, whatever check asked: an edit of a policy must not make them look quick again.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Who holds a place for so long is suspect, whatever it answers then.
const SLOW: Duration = Duration::from_secs(1);
/// How long it is known of one that is not asked again.
const KEPT: Duration = Duration::from_secs(3_600);
/// Most that are known of one namespace.
const MOST: usize = 4_096;

/// The pods that are suspect, and since when they were last found so.
#[derive(Default)]
pub struct Suspects(Mutex<HashMap<String, BTreeMap<Arc<str>, Instant>>>);

impl Suspects {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, BTreeMap<Arc<str>, Instant>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in an ask that ended now: for how long it held its place, and whether no answer came.
    pub fn take(&self, namespace: &str, uid: &Arc<str>, held: Duration, silent: bool, now: Instant) {
        let mut all = self.lock();
        if silent || held >= SLOW {
            if !all.contains_key(namespace) {
                // A namespace may be gone, and nobody asks there any more.
                all.retain(|_, pods| pods.values().any(|at| now < *at + KEPT));
            }
            let pods = all.entry(namespace.to_owned()).or_default();
            pods.insert(Arc::clone(uid), now);
            if pods.len() > MOST {
                pods.retain(|_, at| now < *at + KEPT);
            }
            if pods.len() > MOST {
                let oldest = pods.iter().min_by_key(|(_, at)| **at).map(|(uid, _)| Arc::clone(uid));
                oldest.and_then(|oldest| pods.remove(&oldest));
            }
        } else if let Some(pods) = all.get_mut(namespace) {
            pods.remove(uid);
            if pods.is_empty() {
                all.remove(namespace);
            }
        }
    }

    /// Whether a pod is suspect.
    pub fn is_suspect(&self, namespace: &str, uid: &str, now: Instant) -> bool {
        self.lock().get(namespace).and_then(|pods| pods.get(uid)).is_some_and(|at| now < *at + KEPT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(999);

    #[test]
    fn a_pod_is_suspect_until_it_was_quick_or_for_an_hour() {
        let (suspects, now) = (Suspects::default(), Instant::now());
        let [a, b]: [Arc<str>; 2] = ["a".into(), "b".into()];
        suspects.take("n", &a, Duration::ZERO, true, now);
        suspects.take("n", &b, SLOW, false, now);
        assert!(suspects.is_suspect("n", "a", now) && !suspects.is_suspect("other", "a", now));
        suspects.take("n", &a, QUICK, false, now);
        assert!(!suspects.is_suspect("n", "a", now) && suspects.is_suspect("n", "b", now));
        assert!(!suspects.is_suspect("n", "b", now + KEPT));
        suspects.take("n", &b, QUICK, false, now);
        assert!(suspects.lock().is_empty(), "nothing stays");
        suspects.take("gone", &a, SLOW, false, now);
        suspects.take("n", &a, SLOW, false, now + KEPT);
        assert_eq!(suspects.lock().keys().collect::<Vec<_>>(), ["n"]);
    }

    #[test]
    fn only_so_many_are_known_the_latest() {
        let (suspects, now) = (Suspects::default(), Instant::now());
        for number in 0..MOST as u64 + 10 {
            suspects.take("n", &number.to_string().into(), SLOW, false, now + Duration::from_millis(number));
        }
        assert_eq!(suspects.lock()["n"].len(), MOST);
        assert!(!suspects.is_suspect("n", "9", now) && suspects.is_suspect("n", "10", now));
    }
}
