//! What this process knows of the running workloads beyond what the API server tells: what was published, and what each
//! pod last said. It is rebuilt after a restart by asking the pods again.

use super::client::PodError;
use contract::{Applied, CheckStatus, CircuitState, HealthReport, WorkloadId};
use engine::{
    ack::PodView,
    check::{Evaluation, Thresholds, evaluate},
    fleet::{CircuitView, circuits},
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// All workloads.
#[derive(Default)]
pub struct FleetState(Mutex<HashMap<WorkloadId, Workload>>);

/// One workload.
#[derive(Default)]
pub struct Workload {
    /// Which Deployment of that name.
    pub uid: String,
    /// The published document.
    pub published: Option<Published>,
    /// The generations, by uid, of the policies and flag sets that the last reconcile took into account. What is published
    /// says nothing of an edit that is not among them yet.
    pub considered: BTreeMap<String, i64>,
    /// Why nothing could be published.
    pub problem: Option<Problem>,
    /// Flag sets that do not fit into the document beside the others.
    pub left_out: Vec<String>,
    /// Pods by uid.
    pub pods: BTreeMap<String, PodState>,
    /// What most pods say of each check: one fact that all of them see.
    pub majorities: BTreeMap<String, MajorityStatus>,
    /// Since when some pod's circuit is not closed, by dependency.
    pub open_since: BTreeMap<String, Timestamp>,
    /// When the token Secret was last written.
    pub token_written_at: Option<Instant>,
    /// Time between two questions for a pod's health.
    pub probe_every: Option<Duration>,
    /// When a check counts as failed.
    pub thresholds: BTreeMap<String, Thresholds>,
}

/// What most pods of a workload say of a check.
#[derive(Clone, Debug, PartialEq)]
pub struct MajorityStatus {
    /// Not more than half of the pods call it unhealthy.
    pub healthy: bool,
    /// Since when.
    pub since: Timestamp,
    /// It was unhealthy when this process first heard enough pods: the failure is older than `since`.
    pub began_before: bool,
    /// When a pod last said something of it.
    pub seen_at: Timestamp,
    /// What one of the pods that fail says.
    pub message: String,
}

/// A published document.
#[derive(Clone)]
pub struct Published {
    /// Its revision.
    pub revision: i64,
    /// Its meaning.
    pub content_hash: String,
    /// Its bytes, as they are pushed.
    pub bytes: Arc<Vec<u8>>,
    /// When this process published or found it.
    pub at: Instant,
}

/// Why nothing could be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One word.
    pub reason: &'static str,
    /// What, and what to do.
    pub message: String,
    /// A person has to do something first.
    pub stalled: bool,
}

/// One pod.
#[derive(Clone, Debug, Default)]
pub struct PodState {
    /// Its name.
    pub name: String,
    /// It has reported its health to this process.
    pub reported: bool,
    /// Which process answers in it.
    pub instance: Option<String>,
    /// What it last said that it runs.
    pub applied: Option<Applied>,
    /// Why its admin port does not answer.
    pub unreachable: Option<String>,
    /// Why nothing that it says is believed: its last health report cannot be true, or it is not what was acknowledged.
    pub rejected: Option<String>,
    /// What it last acknowledged: revision, hash, and when.
    pub acknowledged: Option<(i64, String, Instant)>,
    /// Why it refused what was last pushed.
    pub refused: Option<String>,
    /// Checks.
    pub evaluations: BTreeMap<String, Evaluation>,
    /// Checks that are degraded now.
    pub degraded_checks: BTreeSet<String>,
    /// Circuits.
    pub circuits: BTreeMap<String, CircuitState>,
    /// Whether it runs in degraded mode.
    pub degraded: bool,
    /// Revision of the push that is under way.
    pub pushing: Option<i64>,
    /// Pushes that failed in a row.
    pub push_failures: u32,
    /// Not to be pushed to before.
    pub push_after: Option<Instant>,
    /// When its kubelet was last asked to refresh its mounts.
    pub mount_refreshed_at: Option<Instant>,
    /// When it is asked for its health next.
    pub probe_at: Option<Instant>,
    /// A question for its health is under way.
    pub probing: bool,
}

impl FleetState {
    /// All workloads, locked. Never held across an await.
    pub fn lock(&self) -> MutexGuard<'_, HashMap<WorkloadId, Workload>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one workload.
    pub fn read<T>(&self, id: &WorkloadId, read: impl FnOnce(&Workload) -> T) -> Option<T> {
        self.lock().get(id).map(read)
    }

    /// Changes one pod, if it is known.
    pub fn with_pod<T>(&self, id: &WorkloadId, uid: &str, change: impl FnOnce(&mut PodState) -> T) -> Option<T> {
        self.lock().get_mut(id)?.pods.get_mut(uid).map(change)
    }
}

impl Workload {
    /// Keeps exactly the pods that exist. What another Deployment of the same name left behind is forgotten.
    pub fn keep(&mut self, uid: &str, pods: impl Iterator<Item = (String, String)>) {
        if self.uid != uid {
            *self = Self { uid: uid.to_owned(), ..Self::default() };
        }
        let existing: BTreeMap<_, _> = pods.collect();
        self.pods.retain(|uid, _| existing.contains_key(uid));
        for (uid, name) in existing {
            self.pods.entry(uid).or_default().name = name;
        }
    }

    /// The circuits over all pods.
    pub fn circuits(&self) -> BTreeMap<String, CircuitView> {
        // What an unreachable pod said last says nothing of now.
        let heard = self.pods.values().filter(|pod| pod.is_heard());
        circuits(heard.flat_map(|pod| pod.circuits.iter().map(|(name, state)| (name.as_str(), *state))))
    }

    /// Notes what most of the pods that report a check say of it. While so many have not reported at all yet that they
    /// could turn it, there is no new majority: one pod's word at the start is not that of most.
    pub fn update_majorities(&mut self, now: Timestamp) {
        let heard: Vec<_> = self.pods.values().filter(|pod| pod.is_heard()).collect();
        let names: BTreeSet<_> = heard.iter().flat_map(|pod| pod.evaluations.keys()).cloned().collect();
        for name in names {
            let said: Vec<_> = heard.iter().filter_map(|pod| pod.evaluations.get(&name)).collect();
            let failing: Vec<_> = said.iter().filter(|one| !one.healthy).collect();
            let silent = heard.iter().filter(|pod| !pod.reported).count();
            let all = said.len() + silent;
            let healthy = match (failing.len() * 2 > all, (failing.len() + silent) * 2 <= all) {
                (true, _) => false,
                (false, true) => true,
                (false, false) => continue,
            };
            let before = self.majorities.get(&name);
            let same = before.filter(|before| before.healthy == healthy);
            let began_before =
                same.map_or_else(|| failing.iter().all(|one| one.began_before), |before| before.began_before);
            let majority = MajorityStatus {
                healthy,
                since: same.map_or(now, |before| before.since),
                began_before: began_before && !healthy,
                seen_at: now,
                message: failing.first().map(|one| one.message.clone()).unwrap_or_default(),
            };
            self.majorities.insert(name, majority);
        }
    }

    /// What most pods say of the checks that some pod reports now. What nobody reports for a while is remembered.
    pub fn current_majorities(&self) -> BTreeMap<String, MajorityStatus> {
        let heard = || self.pods.values().filter(|pod| pod.is_heard());
        let reported = |name: &str| heard().any(|pod| pod.evaluations.contains_key(name));
        self.majorities
            .iter()
            .filter(|(name, _)| reported(name))
            .map(|(name, majority)| (name.clone(), majority.clone()))
            .collect()
    }

    /// Notes since when circuits are open.
    pub fn note_circuits(&mut self, now: Timestamp) {
        let open: BTreeSet<_> =
            self.circuits().into_iter().filter(|(_, view)| view.open > 0).map(|(name, _)| name).collect();
        self.open_since.retain(|name, _| open.contains(name));
        for name in open {
            self.open_since.entry(name).or_insert(now);
        }
    }
}

impl PodState {
    /// Whether what it says counts: silence and lies are neither health nor sickness.
    pub fn is_heard(&self) -> bool {
        self.unreachable.is_none() && self.rejected.is_none()
    }

    /// Takes in a health report that was asked for at `asked`. Says whether anything changed that a person or a decision
    /// would look at.
    pub fn take(
        &mut self,
        report: &HealthReport,
        thresholds: &BTreeMap<String, Thresholds>,
        asked: Instant,
        now: Timestamp,
    ) -> bool {
        let before = self.essence();
        self.reported = true;
        let instance = (!report.instance.is_empty()).then(|| report.instance.clone());
        if self.instance != instance {
            // Another process: what the one before it failed at, it has yet to show.
            self.evaluations.clear();
            self.acknowledged = None;
            self.instance = instance;
        }
        let broken_word = self.acknowledged.as_ref().filter(|(revision, hash, at)| {
            *at < asked && report.applied.revision < *revision && report.applied.content_hash != *hash
        });
        self.rejected = broken_word.map(|(revision, ..)| {
            format!("it acknowledged revision {revision} and says now that it runs {}", report.applied.revision)
        });
        self.applied = Some(report.applied.clone());
        self.unreachable = None;
        self.degraded = report.degraded;
        self.circuits = report.circuits.iter().map(|(name, circuit)| (name.clone(), circuit.state)).collect();
        self.degraded_checks = report
            .checks
            .iter()
            .filter(|(_, check)| check.status == CheckStatus::Degraded)
            .map(|(name, _)| name.clone())
            .collect();
        self.evaluations.retain(|name, _| report.checks.contains_key(name));
        for (name, check) in &report.checks {
            let limits = thresholds.get(name).copied().unwrap_or_default();
            let evaluation = evaluate(self.evaluations.get(name), check, limits, now);
            self.evaluations.insert(name.clone(), evaluation);
        }
        before != self.essence()
    }

    /// Notes that the pod did not answer, or not in a way that can be believed. Says whether that is news.
    pub fn miss(&mut self, error: &PodError) -> bool {
        let before = (self.unreachable.is_some(), self.rejected.is_some());
        self.unreachable = Some(error.to_string());
        if matches!(error, PodError::InvalidResponse(_)) {
            self.rejected = Some(error.to_string());
        }
        before != (self.unreachable.is_some(), self.rejected.is_some())
    }

    /// What matters of the state, without counters and durations that change with every report.
    fn essence(&self) -> impl PartialEq + use<> {
        (
            self.applied.as_ref().map(|applied| {
                (applied.content_hash.clone(), applied.unsupported.clone(), applied.unknown_dependencies.clone())
            }),
            (self.unreachable.is_some(), self.rejected.is_some(), self.instance.clone()),
            self.degraded,
            self.circuits.clone(),
            self.degraded_checks.clone(),
            self.evaluations.iter().map(|(name, j)| (name.clone(), j.healthy, j.since)).collect::<Vec<_>>(),
        )
    }

    /// The pod as the count of acknowledgements sees it.
    pub fn view(&self, ready: bool) -> PodView {
        PodView {
            name: self.name.clone(),
            ready,
            applied: self.applied.clone(),
            unreachable: self.unreachable.clone(),
            rejected: self.rejected.clone(),
            refused: self.refused.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{CheckReport, LoadReport};

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn report(healthy: bool, instance: &str) -> HealthReport {
        let status = if healthy { CheckStatus::Healthy } else { CheckStatus::Unhealthy };
        let check = CheckReport {
            status,
            message: String::new(),
            tags: vec![],
            dependency: None,
            dependency_answers: None,
            duration_ms: 0,
            consecutive_failures: u32::from(!healthy),
            runs: 1,
            data: BTreeMap::new(),
        };
        HealthReport {
            status,
            pod: "p".into(),
            instance: instance.into(),
            checks: BTreeMap::from([("books".into(), check)]),
            circuits: BTreeMap::new(),
            load: LoadReport::default(),
            degraded: false,
            applied: Applied::default(),
            actions_done: BTreeMap::new(),
        }
    }

    fn thresholds() -> BTreeMap<String, Thresholds> {
        BTreeMap::from([("books".into(), Thresholds { unhealthy: 1, healthy: 1 })])
    }

    /// A workload of `pods` pods, of which the first few have reported.
    fn workload(pods: usize, reports: &[bool]) -> Workload {
        let mut workload = Workload::default();
        for number in 0..pods {
            let pod = workload.pods.entry(number.to_string()).or_default();
            if let Some(healthy) = reports.get(number) {
                pod.take(&report(*healthy, "i"), &thresholds(), Instant::now(), at(1));
            }
        }
        workload.update_majorities(at(2));
        workload
    }

    #[rstest::rstest]
    #[case::nobody_yet(3, &[], None)]
    #[case::one_of_three_so_far(3, &[false], None)]
    #[case::one_well_of_three_so_far(3, &[true], None)]
    #[case::two_of_three_say_no(3, &[false, false], Some(false))]
    #[case::two_of_three_say_yes(3, &[true, true], Some(true))]
    #[case::most_say_no(3, &[false, true, false], Some(false))]
    #[case::half_is_not_most(2, &[false, true], Some(true))]
    #[case::the_only_one(1, &[false], Some(false))]
    fn a_majority_waits_for_those_who_could_turn_it(
        #[case] pods: usize,
        #[case] reports: &[bool],
        #[case] expected: Option<bool>,
    ) {
        let workload = workload(pods, reports);
        assert_eq!(workload.current_majorities().get("books").map(|majority| majority.healthy), expected);
    }

    #[test]
    fn a_failure_that_was_there_from_the_start_is_older_than_this_process() {
        assert!(workload(3, &[false; 3]).current_majorities()["books"].began_before);
        let mut well = workload(3, &[true; 3]);
        for pod in well.pods.values_mut() {
            pod.take(&report(false, "i"), &thresholds(), Instant::now(), at(6));
        }
        well.update_majorities(at(6));
        let majority = &well.current_majorities()["books"];
        assert_eq!((majority.healthy, majority.since, majority.began_before), (false, at(6), false));
    }

    #[test]
    fn a_pod_that_breaks_its_word_is_not_believed_until_it_keeps_it() {
        let mut pod = PodState::default();
        let told = |revision: i64, instance: &str| HealthReport {
            applied: Applied { revision, content_hash: format!("hash {revision}"), ..Applied::default() },
            ..report(true, instance)
        };
        let hear = |pod: &mut PodState, report: &HealthReport| {
            pod.take(report, &BTreeMap::new(), Instant::now() + Duration::from_secs(1), at(1));
            pod.rejected.is_some()
        };
        hear(&mut pod, &told(1, "i"));
        pod.acknowledged = Some((2, "hash 2".into(), Instant::now()));
        assert!(hear(&mut pod, &told(1, "i")), "it acknowledged 2");
        assert!(!hear(&mut pod, &told(2, "i")));
        assert!(!hear(&mut pod, &told(3, "i")), "something newer came by its mount");
        assert!(!hear(&mut pod, &told(0, "j")), "another process has acknowledged nothing");
    }
}
