//! Outages of dependencies that ended a moment ago. What a pod said last may still be of the outage, and nothing is done to it for
//! that: each pod is given the time to say how it is now.

use engine::recovery::Outage;
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, HashMap};

/// How long after the end of an outage what fails for that dependency is left alone.
const AFTERMATH: SignedDuration = SignedDuration::from_secs(15);

/// When each dependency of each workload was last known to be bad.
#[derive(Default)]
pub struct Outages(HashMap<Key, Last>);

/// Namespace, workload and dependency.
type Key = (String, String, String);

/// When a dependency was last known to be bad.
#[derive(Default)]
struct Last {
    bad: Timestamp,
    /// When fresh connections had no answer.
    away: Option<Timestamp>,
}

impl Outages {
    /// Notes which dependencies are bad now, by workload and name, and adds those that were until a moment ago. The answer is when
    /// the first of these is forgotten.
    pub fn carry_on(
        &mut self,
        namespace: &str,
        bad: &mut BTreeMap<(String, String), Outage>,
        now: Timestamp,
    ) -> Option<Timestamp> {
        let end = |at: Timestamp| at.checked_add(AFTERMATH).unwrap_or(Timestamp::MAX);
        self.0.retain(|_, last| now < end(last.bad));
        for ((target, dependency), outage) in &*bad {
            let last = self.0.entry((namespace.to_owned(), target.clone(), dependency.clone())).or_default();
            last.bad = now;
            last.away = if outage.away { Some(now) } else { last.away };
        }
        let mut ends = None;
        let mut forgotten_at = |at: Timestamp| ends = ends.into_iter().chain([end(at)]).min();
        for ((_, target, dependency), last) in self.0.iter().filter(|((of, ..), _)| of == namespace) {
            let away = last.away.filter(|at| now < end(*at));
            let key = (target.clone(), dependency.clone());
            if let Some(outage) = bad.get_mut(&key) {
                // Circuits stay open for a while after it has come back.
                if let Some(at) = away.filter(|_| !outage.away) {
                    (outage.away, outage.over) = (true, true);
                    forgotten_at(at);
                }
                continue;
            }
            forgotten_at(last.bad);
            let evidence = format!("{dependency} was out of order until a moment ago");
            bad.insert(key, Outage { evidence, away: away.is_some(), over: true });
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn bad(names: &[&str]) -> BTreeMap<(String, String), Outage> {
        names.iter().map(|name| (("booking".to_owned(), (*name).to_owned()), "its circuit is open".into())).collect()
    }

    #[test]
    fn what_was_bad_a_moment_ago_is_bad_a_little_longer() {
        let mut outages = Outages::default();
        let mut now = bad(&["database"]);
        assert_eq!(outages.carry_on("a", &mut now, at(100)), None);
        assert_eq!(now, bad(&["database"]), "as it is said now");
        let mut later = bad(&[]);
        assert_eq!(outages.carry_on("a", &mut later, at(110)), Some(at(115)));
        let over =
            |away| Outage { evidence: "database was out of order until a moment ago".to_owned(), away, over: true };
        assert!(later.values().eq([&over(false)]));
        assert_eq!((outages.carry_on("b", &mut bad(&[]), at(110)), outages.0.len()), (None, 1), "of another namespace");
        let mut none = bad(&[]);
        assert_eq!((outages.carry_on("a", &mut none, at(115)), none.len(), outages.0.len()), (None, 0, 0));

        // That it was away is not forgotten while it is still bad.
        let mut away = bad(&["database"]);
        for outage in away.values_mut() {
            outage.away = true;
        }
        outages.carry_on("a", &mut away, at(200));
        // Its circuits are still open.
        let mut circuits = bad(&["database"]);
        assert_eq!(outages.carry_on("a", &mut circuits, at(205)), Some(at(215)));
        let back = Outage { away: true, over: true, ..Outage::from("its circuit is open") };
        assert!(circuits.values().eq([&back]));
        let mut later = bad(&[]);
        assert_eq!(outages.carry_on("a", &mut later, at(210)), Some(at(220)));
        assert!(later.values().eq([&over(true)]));
        let mut long_open = bad(&["database"]);
        assert_eq!(outages.carry_on("a", &mut long_open, at(216)), None);
        assert_eq!(long_open, bad(&["database"]), "what hangs now, hangs by itself");
    }
}
