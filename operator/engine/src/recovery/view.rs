//! What was observed, indexed once for a decision: looking up a check, and counting broken pods, costs no more in a workload
//! of a thousand failing pods than in one of three.

use super::{
    ladder::{OBSERVATION_GRACE, later_by},
    model::{CheckState, Observed, Subject},
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Deref,
};

/// What was observed, indexed.
pub(super) struct View<'a> {
    observed: &'a Observed,
    checks: BTreeMap<&'a Subject, &'a CheckState>,
    /// By the pod's uid and the check's name.
    pod_checks: BTreeMap<(&'a str, &'a str), &'a CheckState>,
    /// Number of pods by workload.
    pods: BTreeMap<&'a str, usize>,
    /// Pods, by workload, of which a check fails, that the kubelet does not call ready, or that were not heard yet.
    broken: BTreeMap<&'a str, BTreeSet<&'a str>>,
}

impl Deref for View<'_> {
    type Target = Observed;

    fn deref(&self) -> &Observed {
        self.observed
    }
}

impl<'a> View<'a> {
    pub(super) fn new(observed: &'a Observed, now: Timestamp) -> Self {
        let checks = observed.checks.iter().map(|check| (&check.subject, check)).collect();
        let uid = |check: &'a CheckState| Some(check.subject.pod.as_ref()?.uid.as_str());
        let pod_checks =
            observed.checks.iter().filter_map(|check| Some(((uid(check)?, check.subject.check.as_str()), check)));
        let failing: BTreeSet<_> = observed.checks.iter().filter(|check| !check.healthy).filter_map(uid).collect();
        // A new leader has not heard all of them yet: for a while, a silent pod counts as broken.
        let blind = now < later_by(observed.watching_since, OBSERVATION_GRACE);
        let (mut pods, mut broken) = (BTreeMap::new(), BTreeMap::<_, BTreeSet<_>>::new());
        for (uid, facts) in &observed.pods {
            *pods.entry(facts.target.as_str()).or_default() += 1;
            if !facts.ready || (blind && !facts.reported) || failing.contains(uid.as_str()) {
                broken.entry(facts.target.as_str()).or_default().insert(uid.as_str());
            }
        }
        Self { observed, checks, pod_checks: pod_checks.collect(), pods, broken }
    }

    /// The check of a subject, if it is reported now.
    pub(super) fn check(&self, subject: &Subject) -> Option<&'a CheckState> {
        self.checks.get(subject).copied()
    }

    /// A check of a pod, if it is reported now.
    pub(super) fn pod_check(&self, uid: &str, check: &str) -> Option<&'a CheckState> {
        self.pod_checks.get(&(uid, check)).copied()
    }

    /// Number of pods of a workload.
    pub(super) fn pods_of(&self, target: &str) -> usize {
        self.pods.get(target).copied().unwrap_or(0)
    }

    /// The broken pods of a workload.
    pub(super) fn broken_pods(&self, target: &str) -> &BTreeSet<&'a str> {
        static NONE: BTreeSet<&str> = BTreeSet::new();
        self.broken.get(target).unwrap_or(&NONE)
    }
}
