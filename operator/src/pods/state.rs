//! The fleet's state beyond what the API server tells: what was published, and what each pod last said. It is rebuilt
//! after a restart by asking the pods again.
//!
//! What the pods of a workload say together is in [`Tallies`].

use super::{
    built_ins::Learned,
    client::PodError,
    tallies::{MAX_TALLIES, Name, Tallies},
};
use crate::{
    fleet::{
        degradations::Degradations,
        facts::{PodFacts, Uid},
        flag_problems, unread_flags,
    },
    kubernetes::meta::cut,
};
use bytes::Bytes;
use contract::signing::ContentHash;
use contract::{Applied, CheckStatus, CircuitState, HealthReport, LoadReport, Source, WorkloadId};
use crds::Reason;
use engine::{
    admin_auth::AdminAuth,
    check::{Evaluation, Thresholds, evaluate},
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Longest text of a pod that is kept, in bytes.
const MAX_TEXT: usize = 512;
/// Most paths or names in a list of a pod that are kept.
const MAX_LIST: usize = 16;
/// Longest entry of such a list, in bytes.
const MAX_ENTRY: usize = 128;
/// How long after a workload was first seen its document, and with it a token, may take.
const TOKEN_GRACE: Duration = Duration::from_secs(5);
/// How long a new leader waits for the first answers of pods beyond their interval.
const LISTENING_GRACE: Duration = Duration::from_secs(2);

/// All workloads.
#[derive(Default)]
pub struct FleetState(Mutex<HashMap<WorkloadId, WorkloadState>>);

/// One workload.
#[derive(Default)]
pub struct WorkloadState {
    /// Which workload of that name.
    pub uid: String,
    /// The published document.
    pub published: Option<Published>,
    /// The generations, by uid, of the policies and flag sets that the last reconcile took into account. What is
    /// published says nothing of an edit that is not among them yet.
    pub considered: BTreeMap<String, i64>,
    /// Version of the ConfigMap that the last reconcile saw; with `considered` it tells whether there is anything new.
    pub config_map_version: Option<String>,
    /// What its pods have built in.
    pub learned: Learned,
    /// The policies that the published document was made from.
    pub policy_sources: Vec<Source>,
    /// The flag sets that it was made from.
    pub flag_sources: Vec<Source>,
    /// What degraded fleets say of the flags of its namespace, as far as the last reconcile took it into account.
    pub degradations: Degradations,
    /// Why nothing could be published.
    pub problem: Option<Problem>,
    /// Flag sets that do not fit into the document beside the others.
    pub left_out: Vec<String>,
    /// When the token Secret was last written by this process.
    pub token_written_at: Option<Instant>,
    /// The pods are expected to have a token: this process wrote the Secret, or found a document that came with one.
    pub has_token: bool,
    /// Since when this process knows it.
    known_since: Option<Instant>,
    /// Time between two questions for a pod's health.
    pub probe_every: Option<Duration>,
    /// When a check counts as failed.
    pub thresholds: BTreeMap<String, Thresholds>,
    /// Loads, ascending, in percent: news is only on which side of each of them a pod's load is.
    pub load_marks: Vec<u32>,
    /// What its pods say together.
    pub tallies: Tallies,
    pods: HashMap<Uid, Box<PodState>>,
}

/// A published document.
#[derive(Clone)]
pub struct Published {
    /// Its revision.
    pub revision: i64,
    /// Its meaning.
    pub content_hash: Arc<str>,
    /// Its bytes, as they are pushed.
    pub bytes: Bytes,
    /// Their hash, which signatures cover.
    pub content: ContentHash,
    /// When this process published or found it.
    pub at: Instant,
    /// It was found, not written, by this process: most pods run it already, so they are asked before they are pushed to.
    pub found: bool,
}

/// Why nothing could be published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One word.
    pub reason: Reason,
    /// What, and what to do.
    pub message: String,
    /// A person has to do something first.
    pub stalled: bool,
}

/// One pod.
#[derive(Debug)]
pub struct PodState {
    /// What the API server says of it.
    pub facts: Arc<PodFacts>,
    /// It has reported its health to this process.
    pub reported: bool,
    /// How it wants requests to be authenticated, as far as it was learned.
    pub auth: AdminAuth,
    /// Which process answers in it.
    pub instance: Option<Box<str>>,
    /// What it last said that it runs.
    pub applied: Option<Box<Applied>>,
    /// Why its admin port does not answer.
    pub unreachable: Option<Box<str>>,
    /// Why its reports are rejected: the last one cannot be true, or it is not what was acknowledged.
    pub rejected: Option<Box<str>>,
    /// What it last acknowledged: revision, hash, and when.
    pub acknowledged: Option<(i64, Arc<str>, Instant)>,
    /// Why it refused what was last pushed.
    pub refused: Option<Box<str>>,
    /// Whether it runs in degraded mode.
    pub degraded: bool,
    /// Its load that counts, in percent.
    pub load_percent: u32,
    /// What that is the load of.
    pub load_cause: Box<str>,
    /// Revision of the push that is under way.
    pub pushing: Option<i64>,
    /// Pushes that failed in a row.
    pub push_failures: u32,
    /// Not to be pushed to before.
    pub push_after: Option<Instant>,
    /// When its kubelet was last asked to refresh its mounts.
    pub mount_refreshed_at: Option<Instant>,
    /// Questions in a row that it did not answer.
    pub misses: u32,
    /// What it last reported of its checks, whether that counts now or not.
    pub(super) evaluations: Vec<(Name, Evaluation)>,
    degraded_checks: Vec<Name>,
    /// What it last reported of its circuits, whether that counts now or not.
    pub circuits: Vec<(Name, CircuitState)>,
}

/// Pods that are to be asked for their health.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// They were not known.
    pub new: Vec<Uid>,
    /// They can be reached now, or have another address.
    pub reachable: Vec<Uid>,
}

/// Whether a change of a pod's state is news for a person or a decision.
pub type IsNews = bool;

impl FleetState {
    /// All workloads, locked. Never held across an await.
    pub fn lock(&self) -> MutexGuard<'_, HashMap<WorkloadId, WorkloadState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one workload.
    pub fn read<T>(&self, id: &WorkloadId, read: impl FnOnce(&WorkloadState) -> T) -> Option<T> {
        self.lock().get(id).map(read)
    }

    /// Changes one workload; it is made if it is not known.
    pub fn write<T>(&self, id: &WorkloadId, change: impl FnOnce(&mut WorkloadState) -> T) -> T {
        change(self.lock().entry(id.clone()).or_default())
    }

    /// Notes how a pod wants requests to be authenticated, if it is still known.
    pub fn learn_auth(&self, id: &WorkloadId, uid: &str, auth: &AdminAuth) {
        if let Some(workload) = self.lock().get_mut(id) {
            workload.learn_auth(uid, auth);
        }
    }

    /// Changes what is noted of one pod beside its reports, if it is known.
    pub fn with_pod<T>(&self, id: &WorkloadId, uid: &str, change: impl FnOnce(&mut PodState) -> T) -> Option<T> {
        self.lock().get_mut(id)?.pods.get_mut(uid).map(|pod| change(pod))
    }
}

impl WorkloadState {
    /// Makes this the state of the workload with that uid: what another of the same name left behind is forgotten.
    pub fn belong_to(&mut self, uid: &str) {
        if self.uid != uid {
            *self = Self { uid: uid.to_owned(), ..Self::default() };
        }
    }

    /// Keeps exactly the pods that exist, and says which are new, and which of the others can be asked only now. What
    /// another workload of the same name left behind is forgotten.
    pub fn keep(&mut self, uid: &str, pods: &[Arc<PodFacts>], now: Timestamp) -> Arrivals {
        self.belong_to(uid);
        self.known_since.get_or_insert_with(Instant::now);
        let existing: HashSet<&Uid> = pods.iter().map(|pod| &pod.uid).collect();
        let gone: Vec<_> = self.pods.keys().filter(|uid| !existing.contains(uid)).cloned().collect();
        for uid in gone {
            if let Some(pod) = self.pods.remove(&uid) {
                self.tallies.remove(&pod, now);
            }
        }
        self.learned.keep(|uid| existing.contains(&Uid::from(uid)));
        let mut arrivals = Arrivals::default();
        for facts in pods {
            if let Some(known) = self.pods.get_mut(&facts.uid) {
                let became_ready = facts.is_ready() && !known.facts.is_ready() && !known.is_heard();
                if became_ready || facts.ip != known.facts.ip {
                    // It was not there yet; the next try need not wait.
                    (known.misses, known.push_failures, known.push_after) = (0, 0, None);
                    arrivals.reachable.push(Arc::clone(&facts.uid));
                }
                known.facts = Arc::clone(facts);
            } else {
                let pod = PodState::new(Arc::clone(facts));
                self.tallies.add_silent();
                self.pods.insert(Arc::clone(&facts.uid), Box::new(pod));
                arrivals.new.push(Arc::clone(&facts.uid));
            }
        }
        arrivals
    }

    /// The pods that are known.
    #[cfg(test)]
    fn pods(&self) -> impl Iterator<Item = &PodState> {
        self.pods.values().map(|pod| &**pod)
    }

    /// A pod.
    pub fn pod(&self, uid: &str) -> Option<&PodState> {
        self.pods.get(uid).map(|pod| &**pod)
    }

    /// Notes how a pod wants requests to be authenticated, if it is known.
    pub fn learn_auth(&mut self, uid: &str, auth: &AdminAuth) {
        if let Some(pod) = self.pods.get_mut(uid).filter(|pod| pod.auth != *auth) {
            pod.auth = auth.clone();
        }
    }

    /// The pods that are known, to note something of them beside what they report.
    pub fn pods_mut(&mut self) -> impl Iterator<Item = &mut PodState> {
        self.pods.values_mut().map(|pod| &mut **pod)
    }

    /// Takes in a health report that was asked for at `asked`.
    pub fn take(&mut self, uid: &str, report: &HealthReport, asked: Instant, now: Timestamp) -> Option<IsNews> {
        let pod = self.pods.get_mut(uid)?;
        let before = self.tallies.withdraw(pod);
        let mut news = pod.take_load(&report.load, &self.load_marks);
        news |= pod.take(report, &self.thresholds, &self.tallies, asked, now);
        self.tallies.put_back(&before, pod, now);
        Some(news)
    }

    /// Notes that a pod did not answer, or not with something that can be read.
    pub fn miss(&mut self, uid: &str, error: &PodError, now: Timestamp) -> Option<IsNews> {
        self.change(uid, now, |pod| pod.miss(error))
    }

    /// Changes what a pod is known to say.
    pub fn change<T>(&mut self, uid: &str, now: Timestamp, change: impl FnOnce(&mut PodState) -> T) -> Option<T> {
        let pod = self.pods.get_mut(uid)?;
        let before = self.tallies.withdraw(pod);
        let result = change(pod);
        self.tallies.put_back(&before, pod, now);
        Some(result)
    }

    /// Whether its pods may still get a token: it was seen a moment ago. Until then they are not asked at their public port,
    /// where anybody could answer for them.
    pub fn may_get_token(&self, now: Instant) -> bool {
        let known_for = self.known_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        !self.has_token && known_for < TOKEN_GRACE
    }

    /// Whether a document that was found is live in its pods is not known yet: they are being asked for the first time, for
    /// at most this time to come.
    pub fn listening_for(&self, now: Instant) -> Option<Duration> {
        let published = self.published.as_ref().filter(|published| published.found)?;
        if self.tallies.silent() == 0 && !self.learned.is_asking() {
            return None;
        }
        let grace = self.probe_every.unwrap_or_default() + LISTENING_GRACE;
        grace.checked_sub(now.saturating_duration_since(published.at)).filter(|rest| !rest.is_zero())
    }
}

/// The beginning of a list of texts of a pod.
fn bounded(list: &[String]) -> Vec<String> {
    list.iter().take(MAX_LIST).map(|entry| cut(entry, MAX_ENTRY).to_owned()).collect()
}

impl PodState {
    fn new(facts: Arc<PodFacts>) -> Self {
        Self {
            facts,
            reported: false,
            auth: AdminAuth::default(),
            instance: None,
            applied: None,
            unreachable: None,
            rejected: None,
            acknowledged: None,
            refused: None,
            degraded: false,
            load_percent: 0,
            load_cause: Box::default(),
            pushing: None,
            push_failures: 0,
            push_after: None,
            mount_refreshed_at: None,
            misses: 0,
            evaluations: Vec::new(),
            degraded_checks: Vec::new(),
            circuits: Vec::new(),
        }
    }

    /// Whether its reports count: silence and rejected reports say neither that it is healthy nor that it is not.
    pub fn is_heard(&self) -> bool {
        self.unreachable.is_none() && self.rejected.is_none()
    }

    /// Whether nothing is known that keeps it from being brought the document of this hash.
    pub fn is_about_to_be_pushed_to(&self, hash: &str) -> bool {
        let runs = self.applied.as_ref().map(|applied| applied.content_hash.as_str());
        runs != Some(hash) && self.is_heard() && self.push_failures == 0
    }

    /// It may yet speak.
    pub(super) fn is_silent(&self) -> bool {
        self.is_heard() && !self.reported
    }

    /// Its checks, if it is heard: what an unreachable pod said last says nothing of now.
    pub fn evaluations(&self) -> &[(Arc<str>, Evaluation)] {
        if self.is_heard() { &self.evaluations } else { &[] }
    }

    /// Its checks that are degraded, if it is heard.
    pub fn degraded_checks(&self) -> &[Arc<str>] {
        if self.is_heard() { &self.degraded_checks } else { &[] }
    }

    fn take(
        &mut self,
        report: &HealthReport,
        thresholds: &BTreeMap<String, Thresholds>,
        names: &Tallies,
        asked: Instant,
        now: Timestamp,
    ) -> IsNews {
        let mut news = !self.reported || self.unreachable.is_some();
        (self.reported, self.misses) = (true, 0);
        let instance = (!report.instance.is_empty()).then_some(report.instance.as_str());
        if self.instance.as_deref() != instance {
            // Another process: what the one before it failed at, it has yet to show.
            self.evaluations.clear();
            self.acknowledged = None;
            self.instance = instance.map(Into::into);
            news = true;
        }
        // It says that it runs something older than what it has acknowledged.
        let behind = self
            .acknowledged
            .as_ref()
            .filter(|(revision, hash, _)| report.applied.revision < *revision && report.applied.content_hash != **hash);
        // It may have said so before it acknowledged that.
        let crossed = behind.is_some_and(|(.., at)| *at >= asked);
        let rejected = behind.filter(|_| !crossed).map(|(revision, ..)| {
            format!("it acknowledged revision {revision} and says now that it runs {}", report.applied.revision).into()
        });
        news |= self.rejected.is_some() != rejected.is_some() || self.degraded != report.degraded;
        self.rejected = rejected;
        self.unreachable = None;
        self.degraded = report.degraded;
        if !crossed {
            news |= self.take_applied(&report.applied);
        }
        news |= self.take_circuits(report, names);
        news |= self.take_checks(report, thresholds, names, now);
        news
    }

    fn take_load(&mut self, load: &LoadReport, marks: &[u32]) -> IsNews {
        let band = |load: u32| marks.partition_point(|mark| *mark <= load);
        let before = std::mem::replace(&mut self.load_percent, load.counts());
        if *self.load_cause != *load.cause {
            self.load_cause = cut(&load.cause, MAX_ENTRY).into();
        }
        band(before) != band(self.load_percent)
    }

    fn take_applied(&mut self, applied: &Applied) -> IsNews {
        let mut new = applied.clone();
        new.unsupported = bounded(&applied.unsupported);
        new.unknown_dependencies = bounded(&applied.unknown_dependencies);
        new.flag_problems = flag_problems::bounded(&applied.flag_problems);
        new.flags_unread = unread_flags::bounded(&applied.flags_unread);
        let same = self.applied.as_ref().is_some_and(|old| {
            old.content_hash == new.content_hash
                && old.unsupported == new.unsupported
                && old.unknown_dependencies == new.unknown_dependencies
                && old.flag_problems == new.flag_problems
                && old.flags_unread == new.flags_unread
        });
        self.applied = Some(Box::new(new));
        !same
    }

    fn take_circuits(&mut self, report: &HealthReport, names: &Tallies) -> IsNews {
        let same = self.circuits.len() == report.circuits.len()
            && self
                .circuits
                .iter()
                .zip(&report.circuits)
                .all(|((old, state), (name, circuit))| **old == **name && *state == circuit.state);
        if !same {
            let circuits = report.circuits.iter().take(MAX_TALLIES);
            self.circuits = circuits.map(|(name, circuit)| (names.circuit_name(name), circuit.state)).collect();
        }
        !same
    }

    fn take_checks(
        &mut self,
        report: &HealthReport,
        thresholds: &BTreeMap<String, Thresholds>,
        names: &Tallies,
        now: Timestamp,
    ) -> IsNews {
        let mut news = self.evaluations.len() != report.checks.len();
        self.evaluations.retain(|(name, _)| report.checks.contains_key(&**name));
        for (name, check) in &report.checks {
            let limits = thresholds.get(name).copied().unwrap_or_default();
            let place = self.evaluations.iter().position(|(known, _)| **known == **name);
            let before = place.map(|place| &self.evaluations[place].1);
            let mut after = evaluate(before, check, limits, now);
            if after.message.len() > MAX_TEXT {
                after.message.truncate(cut(&after.message, MAX_TEXT).len());
            }
            if let Some(dependency) = after.dependency.as_mut().filter(|dependency| dependency.len() > MAX_ENTRY) {
                dependency.truncate(cut(dependency, MAX_ENTRY).len());
            }
            news |= before.is_none_or(|before| {
                (before.healthy, before.since, before.well_since) != (after.healthy, after.since, after.well_since)
            });
            match place {
                Some(place) => self.evaluations[place].1 = after,
                None => self.evaluations.push((names.check_name(name), after)),
            }
        }
        let degraded = || report.checks.iter().filter(|(_, check)| check.status == CheckStatus::Degraded);
        if !degraded().map(|(name, _)| name.as_str()).eq(self.degraded_checks.iter().map(|name| &**name)) {
            self.degraded_checks = degraded().map(|(name, _)| names.check_name(name)).collect();
            news = true;
        }
        news
    }

    fn miss(&mut self, error: &PodError) -> IsNews {
        let before = (self.unreachable.is_some(), self.rejected.is_some());
        // An answer that is of no use is one all the same.
        let answered = !matches!(error, PodError::Deadline(_) | PodError::Unreachable(_));
        self.misses = if answered { 0 } else { self.misses.saturating_add(1) };
        let text = error.to_string();
        let text = cut(&text, MAX_TEXT);
        self.unreachable = Some(text.into());
        self.rejected = matches!(error, PodError::InvalidResponse(_)).then(|| text.into());
        before != (self.unreachable.is_some(), self.rejected.is_some())
    }

    /// Notes what it said that it runs, in answer to a push.
    pub fn acknowledge(&mut self, applied: &Applied) {
        self.unreachable = None;
        self.take_applied(applied);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::fleet::facts::Readiness;
    use contract::{CheckReport, CircuitReport, FlagProblem, FlagProblemKind};
    use engine::fleet::CircuitView;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn report(healthy: bool, instance: &str) -> HealthReport {
        let status = if healthy { CheckStatus::Healthy } else { CheckStatus::Unhealthy };
        let check = serde_json::json!({ "status": status, "consecutiveFailures": u32::from(!healthy), "runs": 1 });
        let check: CheckReport = serde_json::from_value(check).unwrap();
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

    fn facts(number: usize) -> Arc<PodFacts> {
        Arc::new(PodFacts {
            uid: number.to_string().into(),
            namespace: "n".into(),
            name: format!("pod-{number}").into(),
            owner: None,
            labels: Box::default(),
            ip: None,
            admin_port: 1,
            public_port: 1,
            named_ports: Box::default(),
            host_network: false,
            created_at: Timestamp::UNIX_EPOCH,
            readiness: Readiness::Ready,
            alive: true,
            signs: false,
            excluded: false,
            signals: engine::signals::PodSignals::default(),
        })
    }

    /// A pod that has said nothing yet.
    pub fn known_pod() -> PodState {
        PodState::new(facts(0))
    }

    fn empty(pods: usize) -> WorkloadState {
        let thresholds = BTreeMap::from([("books".into(), Thresholds { unhealthy: 1, healthy: 1 })]);
        let mut workload = WorkloadState { thresholds, ..WorkloadState::default() };
        workload.keep("", &(0..pods).map(facts).collect::<Vec<_>>(), at(0));
        workload
    }

    /// A workload of `pods` pods, of which the first few have reported.
    fn workload(pods: usize, reports: &[bool]) -> WorkloadState {
        let mut workload = empty(pods);
        for (number, healthy) in reports.iter().enumerate() {
            workload.take(&number.to_string(), &report(*healthy, "i"), Instant::now(), at(1));
        }
        workload
    }

    fn verdict(workload: &WorkloadState) -> Option<bool> {
        workload.tallies.current_majorities().get("books").map(|majority| majority.healthy)
    }

    #[rstest::rstest]
    #[case::nobody_yet(3, &[], None)]
    #[case::one_of_three_so_far(3, &[false], None)]
    #[case::one_healthy_of_three_so_far(3, &[true], None)]
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
        assert_eq!(verdict(&workload(pods, reports)), expected);
    }

    #[test]
    fn a_pod_that_does_not_answer_is_not_waited_for() {
        let mut workload = workload(3, &[false]);
        assert_eq!(verdict(&workload), None);
        workload.miss("1", &PodError::Unauthorized, at(2));
        workload.miss("2", &PodError::Unauthorized, at(2));
        assert_eq!(verdict(&workload), Some(false), "who is heard says so");
        workload.miss("0", &PodError::Unauthorized, at(3));
        assert_eq!(verdict(&workload), None, "nobody reports it now");
        workload.take("0", &report(false, "i"), Instant::now(), at(9));
        assert_eq!(workload.tallies.current_majorities()["books"].since, at(2), "it is remembered meanwhile");
    }

    #[test]
    fn a_failure_that_was_there_from_the_start_is_older_than_this_process() {
        assert!(workload(3, &[false; 3]).tallies.current_majorities()["books"].began_before);
        let mut healthy = workload(3, &[true; 3]);
        for number in 0..3 {
            healthy.take(&number.to_string(), &report(false, "i"), Instant::now(), at(6));
        }
        let majority = &healthy.tallies.current_majorities()["books"];
        assert_eq!((majority.healthy, majority.since, majority.began_before), (false, at(6), false));
    }

    #[test]
    fn a_pod_that_breaks_its_word_is_rejected_until_it_keeps_it() {
        let mut workload = empty(1);
        let told = |revision: i64, instance: &str| HealthReport {
            applied: Applied { revision, content_hash: format!("hash {revision}"), ..Applied::default() },
            ..report(true, instance)
        };
        let hear = |workload: &mut WorkloadState, report: &HealthReport| {
            workload.take("0", report, Instant::now() + Duration::from_secs(1), at(1));
            workload.pod("0").unwrap().rejected.is_some()
        };
        hear(&mut workload, &told(1, "i"));
        workload.change("0", at(1), |pod| pod.acknowledged = Some((2, "hash 2".into(), Instant::now())));
        assert!(hear(&mut workload, &told(1, "i")), "it acknowledged 2");
        assert!(!hear(&mut workload, &told(2, "i")));
        assert!(!hear(&mut workload, &told(3, "i")), "something newer came by its mount");
        assert!(!hear(&mut workload, &told(0, "j")), "another process has acknowledged nothing");
    }

    #[test]
    fn an_answer_that_crossed_a_push_says_nothing_of_what_runs_now() {
        let mut workload = empty(1);
        let runs = |revision: i64| Applied { revision, content_hash: format!("hash {revision}"), ..Applied::default() };
        let report = HealthReport { applied: runs(1), ..report(true, "i") };
        workload.take("0", &report, Instant::now(), at(1));
        let asked = Instant::now();
        workload.change("0", at(1), |pod| {
            pod.acknowledge(&runs(2));
            pod.acknowledged = Some((2, "hash 2".into(), Instant::now()));
        });
        assert_eq!(workload.take("0", &report, asked, at(2)), Some(false), "it is no news");
        let pod = workload.pod("0").unwrap();
        assert_eq!((pod.applied.as_ref().unwrap().revision, pod.rejected.as_deref()), (2, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_document_that_was_found_is_listened_for_until_all_have_spoken() {
        let mut workload = empty(2);
        let found = |found| Published {
            revision: 1,
            content_hash: "hash".into(),
            bytes: Bytes::new(),
            content: ContentHash::of(b""),
            at: Instant::now(),
            found,
        };
        workload.probe_every = Some(Duration::from_secs(5));
        workload.published = Some(found(false));
        assert_eq!(workload.listening_for(Instant::now()), None, "it was published by this process");
        workload.published = Some(found(true));
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(workload.listening_for(Instant::now()), Some(Duration::from_secs(4)));
        workload.take("0", &report(true, "i"), Instant::now(), at(1));
        workload.miss("1", &PodError::Unauthorized, at(1));
        assert_eq!(workload.listening_for(Instant::now()), None, "each has spoken, or failed to");
        let mut workload = empty(2);
        workload.published = Some(found(true));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!(workload.listening_for(Instant::now()), None, "nobody is waited for that long");
    }

    fn with_circuits(circuits: &[(&str, CircuitState)]) -> HealthReport {
        let circuits = circuits
            .iter()
            .map(|(name, state)| ((*name).to_owned(), CircuitReport { state: *state, ..CircuitReport::default() }));
        HealthReport { circuits: circuits.collect(), ..report(true, "i") }
    }

    fn circuits(workload: &WorkloadState) -> Vec<(String, CircuitView)> {
        workload.tallies.circuits().map(|(name, view, _)| (name.to_owned(), view)).collect()
    }

    #[test]
    fn circuits_are_counted_as_pods_speak_and_go_when_nobody_reports_them() {
        let mut workload = empty(2);
        let open = with_circuits(&[("db", CircuitState::Open)]);
        workload.take("0", &open, Instant::now(), at(1));
        workload.take("1", &with_circuits(&[("db", CircuitState::Closed)]), Instant::now(), at(2));
        assert_eq!(circuits(&workload), [("db".to_owned(), CircuitView { open: 1, tripped: 1, total: 2 })]);
        assert_eq!(workload.tallies.circuits().next().unwrap().2, Some(at(1)));
        workload.take("1", &with_circuits(&[("db", CircuitState::HalfOpen)]), Instant::now(), at(3));
        assert_eq!(circuits(&workload), [("db".to_owned(), CircuitView { open: 2, tripped: 1, total: 2 })]);
        workload.miss("0", &PodError::Unauthorized, at(4));
        assert_eq!(circuits(&workload), [("db".to_owned(), CircuitView { open: 1, tripped: 0, total: 1 })]);
        workload.take("1", &with_circuits(&[]), Instant::now(), at(5));
        assert!(circuits(&workload).is_empty());
        workload.take("0", &open, Instant::now(), at(6));
        workload.keep("", &[facts(1)], at(7));
        assert!(circuits(&workload).is_empty() && workload.tallies.checks.len() == 1, "with the pod goes what it said");
    }

    #[tokio::test(start_paused = true)]
    async fn pods_without_a_token_are_asked_elsewhere_only_when_none_is_to_be_expected() {
        let mut workload = empty(1);
        assert!(workload.may_get_token(Instant::now()));
        workload.has_token = true;
        assert!(!workload.may_get_token(Instant::now()));
        workload.has_token = false;
        tokio::time::sleep(TOKEN_GRACE).await;
        assert!(!workload.may_get_token(Instant::now()), "a dry run: there will be none");
    }

    #[test]
    fn the_same_again_is_no_news() {
        let mut workload = workload(2, &[true, true]);
        assert_eq!(workload.take("0", &report(true, "i"), Instant::now(), at(3)), Some(false));
        assert_eq!(workload.take("0", &report(false, "i"), Instant::now(), at(4)), Some(true));
        assert_eq!(workload.take("nobody", &report(false, "i"), Instant::now(), at(4)), None);
        assert_eq!(workload.miss("1", &PodError::Unauthorized, at(5)), Some(true));
        assert_eq!(workload.miss("1", &PodError::Unauthorized, at(6)), Some(false));
    }

    #[test]
    fn a_load_is_news_where_something_may_come_of_it() {
        let mut workload = workload(1, &[true]);
        workload.load_marks = vec![60, 80];
        let loads = [0, 59, 60, 79, 80, 99, 61, 59].map(|load| {
            let mut report = report(true, "i");
            report.load = LoadReport { worst_percent: Some(load), cause: "x".repeat(200), ..LoadReport::default() };
            workload.take("0", &report, Instant::now(), at(3)).unwrap()
        });
        assert_eq!(loads, [false, false, true, false, true, false, true, true]);
        let pod = workload.pod("0").unwrap();
        assert_eq!((pod.load_percent, pod.load_cause.len()), (59, MAX_ENTRY));
    }

    #[test]
    fn a_flag_that_does_not_work_is_news_once_and_again_when_it_does() {
        let mut workload = workload(1, &[true]);
        let mut with_problem = report(true, "i");
        let problem = FlagProblem { key: "k".into(), kind: FlagProblemKind::TypeMismatch, message: "m".into() };
        with_problem.applied.flag_problems.push(problem);
        let news = [&with_problem, &with_problem, &report(true, "i"), &report(true, "i")]
            .map(|report| workload.take("0", report, Instant::now(), at(3)));
        assert_eq!(news, [Some(true), Some(false), Some(true), Some(false)]);
    }

    #[test]
    fn what_a_pod_says_is_bounded_when_it_is_read() {
        let mut workload = empty(1);
        let mut wordy = report(false, "i");
        wordy.checks.get_mut("books").unwrap().message = "ü".repeat(10_000);
        wordy.applied.unsupported = vec!["x".repeat(10_000); 1000];
        let problem =
            FlagProblem { key: "k".repeat(10_000), kind: FlagProblemKind::TypeMismatch, message: "m".repeat(10_000) };
        wordy.applied.flag_problems = vec![problem; 1000];
        for number in 0..200 {
            wordy.circuits.insert(format!("c-{number}"), CircuitReport::default());
        }
        workload.take("0", &wordy, Instant::now(), at(1));
        let pod = workload.pod("0").unwrap();
        assert!(pod.evaluations()[0].1.message.len() <= MAX_TEXT);
        let unsupported = &pod.applied.as_ref().unwrap().unsupported;
        assert!(unsupported.len() == MAX_LIST && unsupported.iter().all(|path| path.len() <= MAX_ENTRY));
        let problems = &pod.applied.as_ref().unwrap().flag_problems;
        assert!(problems.len() <= 64 && problems.iter().all(|one| one.key.len() + one.message.len() <= MAX_TEXT));
        assert_eq!(workload.tallies.circuits().count(), MAX_TALLIES);
    }

    #[test]
    fn counts_come_out_even_whatever_the_order() {
        let mut workload = empty(3);
        for round in 0..50_i64 {
            for number in 0..3 {
                let uid = number.to_string();
                match (round + number) % 4 {
                    0 => drop(workload.take(&uid, &report(round % 3 == 0, "i"), Instant::now(), at(round))),
                    1 => drop(workload.miss(&uid, &PodError::Unauthorized, at(round))),
                    2 => drop(workload.take(
                        &uid,
                        &with_circuits(&[("db", CircuitState::Open)]),
                        Instant::now(),
                        at(round),
                    )),
                    _ => drop(workload.take(&uid, &report(true, "other"), Instant::now(), at(round))),
                }
            }
            let heard: Vec<_> = workload.pods().filter(|pod| pod.is_heard()).collect();
            let failing = heard.iter().flat_map(|pod| pod.evaluations()).filter(|(_, e)| !e.healthy).count();
            let said = heard.iter().flat_map(|pod| pod.evaluations()).count();
            let open = heard.iter().flat_map(|pod| &pod.circuits).count();
            let tally = &workload.tallies.checks.get("books");
            assert_eq!((tally.map_or(0, |t| t.said), tally.map_or(0, |t| t.failing)), (said, failing), "round {round}");
            assert_eq!(workload.tallies.circuits.get("db").map_or(0, |tally| tally.view.open), open);
            assert_eq!(workload.tallies.silent, workload.pods().filter(|pod| pod.is_silent()).count());
        }
    }
}
