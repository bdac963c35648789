//! The fleet's state beyond what the API server tells: what was published, and what each pod last said. It is rebuilt
//! after a restart by asking the pods again.
//!
//! What all pods of a workload say together (the majority verdict of a check, a circuit's count) is counted as each of
//! them speaks: taking in one pod's report costs no more in a workload of a thousand pods than in one of three.

use super::{built_ins::Learned, client::PodError};
use crate::{
    fleet::facts::{PodFacts, Uid},
    kubernetes::meta::cut,
};
use bytes::Bytes;
use contract::signing::ContentHash;
use contract::{Applied, CheckStatus, CircuitState, HealthReport, Source, WorkloadId};
use crds::Reason;
use engine::{
    admin_auth::AdminAuth,
    check::{Evaluation, Thresholds, evaluate},
    fleet::CircuitView,
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
/// Most circuits, and most checks, that are counted over the pods of one workload. Names are the pods' own.
const MAX_TALLIES: usize = 64;

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
    pods: HashMap<Uid, Box<PodState>>,
    checks: BTreeMap<Name, CheckTally>,
    circuits: BTreeMap<Name, CircuitTally>,
    /// Pods that may yet speak: they have neither reported nor failed to.
    silent: usize,
}

/// Name of a check or a circuit, shared by the pods of a workload.
type Name = Arc<str>;

/// What the pods that are heard say of a check.
#[derive(Default)]
struct CheckTally {
    said: usize,
    failing: usize,
    failing_from_the_start: usize,
    message: String,
    majority: Option<MajorityStatus>,
}

/// What the pods that are heard say of a circuit.
#[derive(Default)]
struct CircuitTally {
    view: CircuitView,
    open_since: Option<Timestamp>,
}

/// The majority verdict of a check.
#[derive(Clone, Debug, PartialEq)]
pub struct MajorityStatus {
    /// Not more than half of the pods call it unhealthy.
    pub healthy: bool,
    /// Since when.
    pub since: Timestamp,
    /// It was unhealthy when this process first heard enough pods: the failure is older than `since`.
    pub began_before: bool,
    /// When a pod last reported it.
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
    /// It has reported, or failed to, since this process leads.
    pub asked: bool,
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
    evaluations: Vec<(Name, Evaluation)>,
    degraded_checks: Vec<Name>,
    circuits: Vec<(Name, CircuitState)>,
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
    pub fn learn_auth(&self, id: &WorkloadId, uid: &str, auth: AdminAuth) {
        self.with_pod(id, uid, |pod| pod.auth = auth);
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
                self.withdraw(&pod);
                self.decide_majorities(&pod.check_names(), now);
            }
        }
        self.circuits.retain(|_, tally| tally.view.total > 0);
        self.learned.keep(|uid| existing.contains(&Uid::from(uid)));
        let mut arrivals = Arrivals::default();
        for facts in pods {
            if let Some(known) = self.pods.get_mut(&facts.uid) {
                let became_ready = facts.ready && !known.facts.ready && !known.is_heard();
                if became_ready || facts.ip != known.facts.ip {
                    // It was not there yet; the next try need not wait.
                    (known.misses, known.push_failures, known.push_after) = (0, 0, None);
                    arrivals.reachable.push(Arc::clone(&facts.uid));
                }
                known.facts = Arc::clone(facts);
            } else {
                let pod = PodState::new(Arc::clone(facts));
                self.silent += 1;
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

    /// The pods that are known, to note something of them beside what they report.
    pub fn pods_mut(&mut self) -> impl Iterator<Item = &mut PodState> {
        self.pods.values_mut().map(|pod| &mut **pod)
    }

    /// Takes in a health report that was asked for at `asked`.
    pub fn take(&mut self, uid: &str, report: &HealthReport, asked: Instant, now: Timestamp) -> Option<IsNews> {
        let mut pod = self.pods.remove(uid)?;
        let silent = self.silent;
        self.withdraw(&pod);
        let before = pod.check_names();
        let news =
            pod.take(report, &self.thresholds, &Names { checks: &self.checks, circuits: &self.circuits }, asked, now);
        self.put_back(pod, &before, silent, now);
        Some(news)
    }

    /// Notes that a pod did not answer, or not with something that can be read.
    pub fn miss(&mut self, uid: &str, error: &PodError, now: Timestamp) -> Option<IsNews> {
        self.change(uid, now, |pod| pod.miss(error))
    }

    /// Changes what a pod is known to say.
    pub fn change<T>(&mut self, uid: &str, now: Timestamp, change: impl FnOnce(&mut PodState) -> T) -> Option<T> {
        let mut pod = self.pods.remove(uid)?;
        let silent = self.silent;
        self.withdraw(&pod);
        let before = pod.check_names();
        let result = change(&mut pod);
        self.put_back(pod, &before, silent, now);
        Some(result)
    }

    /// Counts what a pod says now, and decides what that turns. `before`: the checks that it reported; `silent`: how many
    /// pods could still speak.
    fn put_back(&mut self, pod: Box<PodState>, before: &[Name], silent: usize, now: Timestamp) {
        self.contribute(&pod, now);
        if silent == self.silent {
            self.decide_majorities(before, now);
            self.decide_majorities(&pod.check_names(), now);
        } else {
            // There is one less that could turn any of them.
            let all: Vec<_> = self.checks.keys().cloned().collect();
            self.decide_majorities(&all, now);
        }
        self.pods.insert(Arc::clone(&pod.facts.uid), pod);
        self.circuits.retain(|_, tally| tally.view.total > 0);
        // What nobody reports for a while is remembered, as long as there is room.
        if self.checks.len() >= MAX_TALLIES {
            self.checks.retain(|_, tally| tally.said > 0);
        }
    }

    /// Takes what a pod says out of the counts.
    fn withdraw(&mut self, pod: &PodState) {
        self.silent -= usize::from(pod.is_silent());
        if !pod.is_heard() {
            return;
        }
        for (name, evaluation) in &pod.evaluations {
            if let Some(tally) = self.checks.get_mut(name) {
                tally.said = tally.said.saturating_sub(1);
                tally.failing = tally.failing.saturating_sub(usize::from(!evaluation.healthy));
                let old = !evaluation.healthy && evaluation.began_before;
                tally.failing_from_the_start = tally.failing_from_the_start.saturating_sub(usize::from(old));
            }
        }
        for (name, state) in &pod.circuits {
            if let Some(tally) = self.circuits.get_mut(name) {
                tally.view.total = tally.view.total.saturating_sub(1);
                tally.view.open = tally.view.open.saturating_sub(usize::from(is_open(*state)));
            }
        }
    }

    /// Counts what a pod says.
    fn contribute(&mut self, pod: &PodState, now: Timestamp) {
        self.silent += usize::from(pod.is_silent());
        if pod.is_heard() {
            for (name, evaluation) in &pod.evaluations {
                if !self.checks.contains_key(name) && self.checks.len() >= MAX_TALLIES {
                    continue;
                }
                let tally = self.checks.entry(Arc::clone(name)).or_default();
                tally.said += 1;
                if !evaluation.healthy {
                    tally.failing += 1;
                    tally.failing_from_the_start += usize::from(evaluation.began_before);
                    tally.message.clone_from(&evaluation.message);
                }
            }
            for (name, state) in &pod.circuits {
                if !self.circuits.contains_key(name) && self.circuits.len() >= MAX_TALLIES {
                    continue;
                }
                let tally = self.circuits.entry(Arc::clone(name)).or_default();
                tally.view.total += 1;
                tally.view.open += usize::from(is_open(*state));
            }
        }
        for (name, _) in &pod.circuits {
            if let Some(tally) = self.circuits.get_mut(name) {
                tally.open_since = (tally.view.open > 0).then(|| tally.open_since.unwrap_or(now));
            }
        }
    }

    /// Decides anew what most of the pods that report these checks say of them. While so many have not reported at all yet
    /// that they could turn it, there is no new verdict: one pod's word at the start is not that of most.
    fn decide_majorities(&mut self, names: &[Name], now: Timestamp) {
        for name in names {
            let Some(tally) = self.checks.get_mut(name) else { continue };
            let all = tally.said + self.silent;
            let healthy = match (tally.failing * 2 > all, (tally.failing + self.silent) * 2 <= all) {
                _ if tally.said == 0 => continue,
                (true, _) => false,
                (false, true) => true,
                (false, false) => continue,
            };
            let same = tally.majority.as_ref().filter(|before| before.healthy == healthy);
            let from_the_start = tally.failing_from_the_start == tally.failing;
            tally.majority = Some(MajorityStatus {
                healthy,
                since: same.map_or(now, |before| before.since),
                began_before: same.map_or(from_the_start, |before| before.began_before) && !healthy,
                seen_at: now,
                message: if tally.failing > 0 { tally.message.clone() } else { String::new() },
            });
        }
    }

    /// The majority verdicts of the checks that some pod reports now. What nobody reports for a while is remembered.
    pub fn current_majorities(&self) -> BTreeMap<String, MajorityStatus> {
        let reported = self.checks.iter().filter(|(_, tally)| tally.said > 0);
        reported.filter_map(|(name, tally)| Some((name.to_string(), tally.majority.clone()?))).collect()
    }

    /// The circuits over all pods that are heard, each with the moment since when some pod's is not closed.
    pub fn circuits(&self) -> impl Iterator<Item = (&str, CircuitView, Option<Timestamp>)> {
        self.circuits.iter().map(|(name, tally)| (&**name, tally.view, tally.open_since))
    }

    /// Whether its pods may still get a token: it was seen a moment ago. Until then they are not asked at their public port,
    /// where anybody could answer for them.
    pub fn may_get_token(&self, now: Instant) -> bool {
        let known_for = self.known_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        !self.has_token && known_for < TOKEN_GRACE
    }

    /// Whether a document that was found is live in its pods is not known yet: they are being asked for the first time.
    pub fn is_listening(&self, now: Instant) -> bool {
        let Some(published) = self.published.as_ref().filter(|published| published.found) else { return false };
        let grace = self.probe_every.unwrap_or_default() + LISTENING_GRACE;
        now.saturating_duration_since(published.at) < grace && self.pods.values().any(|pod| !pod.asked)
    }
}

/// The names that are known already, so that pods share them.
struct Names<'a> {
    checks: &'a BTreeMap<Name, CheckTally>,
    circuits: &'a BTreeMap<Name, CircuitTally>,
}

fn shared<T>(known: &BTreeMap<Name, T>, name: &str) -> Name {
    known.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name))
}

fn is_open(state: CircuitState) -> bool {
    // Half-open counts: it is not closed until a trial call says so.
    matches!(state, CircuitState::Open | CircuitState::HalfOpen)
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
            asked: false,
            auth: AdminAuth::default(),
            instance: None,
            applied: None,
            unreachable: None,
            rejected: None,
            acknowledged: None,
            refused: None,
            degraded: false,
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

    /// It may yet speak.
    fn is_silent(&self) -> bool {
        self.is_heard() && !self.reported
    }

    fn check_names(&self) -> Vec<Name> {
        self.evaluations.iter().map(|(name, _)| Arc::clone(name)).collect()
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
        names: &Names<'_>,
        asked: Instant,
        now: Timestamp,
    ) -> IsNews {
        let mut news = !self.reported || self.unreachable.is_some();
        (self.reported, self.asked, self.misses) = (true, true, 0);
        let instance = (!report.instance.is_empty()).then_some(report.instance.as_str());
        if self.instance.as_deref() != instance {
            // Another process: what the one before it failed at, it has yet to show.
            self.evaluations.clear();
            self.acknowledged = None;
            self.instance = instance.map(Into::into);
            news = true;
        }
        let broken_word = self.acknowledged.as_ref().filter(|(revision, hash, at)| {
            *at < asked && report.applied.revision < *revision && report.applied.content_hash != **hash
        });
        let rejected = broken_word.map(|(revision, ..)| {
            format!("it acknowledged revision {revision} and says now that it runs {}", report.applied.revision).into()
        });
        news |= self.rejected.is_some() != rejected.is_some() || self.degraded != report.degraded;
        self.rejected = rejected;
        self.unreachable = None;
        self.degraded = report.degraded;
        news |= self.take_applied(&report.applied);
        news |= self.take_circuits(report, names);
        news |= self.take_checks(report, thresholds, names, now);
        news
    }

    fn take_applied(&mut self, applied: &Applied) -> IsNews {
        let mut new = applied.clone();
        new.unsupported = bounded(&applied.unsupported);
        new.unknown_dependencies = bounded(&applied.unknown_dependencies);
        let same = self.applied.as_ref().is_some_and(|old| {
            old.content_hash == new.content_hash
                && old.unsupported == new.unsupported
                && old.unknown_dependencies == new.unknown_dependencies
        });
        self.applied = Some(Box::new(new));
        !same
    }

    fn take_circuits(&mut self, report: &HealthReport, names: &Names<'_>) -> IsNews {
        let same = self.circuits.len() == report.circuits.len()
            && self
                .circuits
                .iter()
                .zip(&report.circuits)
                .all(|((old, state), (name, circuit))| **old == **name && *state == circuit.state);
        if !same {
            let circuits = report.circuits.iter().take(MAX_TALLIES);
            self.circuits = circuits.map(|(name, circuit)| (shared(names.circuits, name), circuit.state)).collect();
        }
        !same
    }

    fn take_checks(
        &mut self,
        report: &HealthReport,
        thresholds: &BTreeMap<String, Thresholds>,
        names: &Names<'_>,
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
            news |= before.is_none_or(|before| (before.healthy, before.since) != (after.healthy, after.since));
            match place {
                Some(place) => self.evaluations[place].1 = after,
                None => self.evaluations.push((shared(names.checks, name), after)),
            }
        }
        let degraded = || report.checks.iter().filter(|(_, check)| check.status == CheckStatus::Degraded);
        if !degraded().map(|(name, _)| name.as_str()).eq(self.degraded_checks.iter().map(|name| &**name)) {
            self.degraded_checks = degraded().map(|(name, _)| shared(names.checks, name)).collect();
            news = true;
        }
        news
    }

    fn miss(&mut self, error: &PodError) -> IsNews {
        let before = (self.unreachable.is_some(), self.rejected.is_some(), self.asked);
        self.asked = true;
        // An answer that is of no use is one all the same.
        let answered = !matches!(error, PodError::Deadline(_) | PodError::Unreachable(_));
        self.misses = if answered { 0 } else { self.misses.saturating_add(1) };
        let text = error.to_string();
        let text = cut(&text, MAX_TEXT);
        self.unreachable = Some(text.into());
        self.rejected = matches!(error, PodError::InvalidResponse(_)).then(|| text.into());
        before != (self.unreachable.is_some(), self.rejected.is_some(), self.asked)
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
    use contract::{CheckReport, CircuitReport, LoadReport};

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
            created_at: Timestamp::UNIX_EPOCH,
            ready: true,
            alive: true,
            signs: false,
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
        workload.current_majorities().get("books").map(|majority| majority.healthy)
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
        assert_eq!(workload.current_majorities()["books"].since, at(2), "it is remembered meanwhile");
    }

    #[test]
    fn a_failure_that_was_there_from_the_start_is_older_than_this_process() {
        assert!(workload(3, &[false; 3]).current_majorities()["books"].began_before);
        let mut healthy = workload(3, &[true; 3]);
        for number in 0..3 {
            healthy.take(&number.to_string(), &report(false, "i"), Instant::now(), at(6));
        }
        let majority = &healthy.current_majorities()["books"];
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

    fn with_circuits(circuits: &[(&str, CircuitState)]) -> HealthReport {
        let circuits = circuits
            .iter()
            .map(|(name, state)| ((*name).to_owned(), CircuitReport { state: *state, ..CircuitReport::default() }));
        HealthReport { circuits: circuits.collect(), ..report(true, "i") }
    }

    fn circuits(workload: &WorkloadState) -> Vec<(String, usize, usize)> {
        workload.circuits().map(|(name, view, _)| (name.to_owned(), view.open, view.total)).collect()
    }

    #[test]
    fn circuits_are_counted_as_pods_speak_and_go_when_nobody_reports_them() {
        let mut workload = empty(2);
        let open = with_circuits(&[("db", CircuitState::Open)]);
        workload.take("0", &open, Instant::now(), at(1));
        workload.take("1", &with_circuits(&[("db", CircuitState::Closed)]), Instant::now(), at(2));
        assert_eq!(circuits(&workload), [("db".to_owned(), 1, 2)]);
        assert_eq!(workload.circuits().next().unwrap().2, Some(at(1)));
        workload.take("1", &with_circuits(&[("db", CircuitState::HalfOpen)]), Instant::now(), at(3));
        assert_eq!(circuits(&workload), [("db".to_owned(), 2, 2)]);
        workload.miss("0", &PodError::Unauthorized, at(4));
        assert_eq!(circuits(&workload), [("db".to_owned(), 1, 1)]);
        workload.take("1", &with_circuits(&[]), Instant::now(), at(5));
        assert!(circuits(&workload).is_empty());
        workload.take("0", &open, Instant::now(), at(6));
        workload.keep("", &[facts(1)], at(7));
        assert!(circuits(&workload).is_empty() && workload.checks.len() == 1, "with the pod goes what it said");
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
    fn what_a_pod_says_is_bounded_when_it_is_read() {
        let mut workload = empty(1);
        let mut wordy = report(false, "i");
        wordy.checks.get_mut("books").unwrap().message = "ü".repeat(10_000);
        wordy.applied.unsupported = vec!["x".repeat(10_000); 1000];
        for number in 0..200 {
            wordy.circuits.insert(format!("c-{number}"), CircuitReport::default());
        }
        workload.take("0", &wordy, Instant::now(), at(1));
        let pod = workload.pod("0").unwrap();
        assert!(pod.evaluations()[0].1.message.len() <= MAX_TEXT);
        let unsupported = &pod.applied.as_ref().unwrap().unsupported;
        assert!(unsupported.len() == MAX_LIST && unsupported.iter().all(|path| path.len() <= MAX_ENTRY));
        assert_eq!(workload.circuits().count(), MAX_TALLIES);
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
            let tally = &workload.checks.get("books");
            assert_eq!((tally.map_or(0, |t| t.said), tally.map_or(0, |t| t.failing)), (said, failing), "round {round}");
            assert_eq!(workload.circuits.get("db").map_or(0, |tally| tally.view.open), open);
            assert_eq!(workload.silent, workload.pods().filter(|pod| pod.is_silent()).count());
        }
    }
}
