//! The facts, indexed so that no event costs work that grows with the cluster.
//!
//! Watches put facts in and are told what that affects; reconciles read. Every lookup goes by a key: a workload's pods by
//! their owner, the policies of a workload by their target, pods that only look like a workload's by their labels.

use super::{
    degradations::{Degradations, Degraded, winners},
    facts::{
        ConfigMapFacts, JobFacts, LabelHashes, PodFacts, PodOwner, Readiness, ReplicaSetFacts, Uid, WorkloadFacts,
    },
    flag_set::FlagSet,
    revisions::{Revision, Revisions},
};
use crate::{kubernetes::guard::Guard, spec::target_kind};
use contract::{Source, WorkloadId};
use crds::{ResiliencePolicy, resilience_policy::TargetRef};
use engine::signals::{Ready, STEADY_AFTER_MS};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};
use std::{
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{sync::watch, time::Instant};

/// A policy, or the reason why it cannot be read. One unreadable object must not hide all others.
pub type Policy = Guard<ResiliencePolicy>;

/// Namespace and name of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ObjectKey {
    /// The key of an object.
    pub fn of<K: Resource>(object: &K) -> Self {
        Self::of_meta(object.meta())
    }

    /// The key of the object with these metadata.
    pub fn of_meta(meta: &ObjectMeta) -> Self {
        Self { namespace: meta.namespace.clone().unwrap_or_default(), name: meta.name.clone().unwrap_or_default() }
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What has to be looked at after a change.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Affected {
    /// A workload, and everything that names it.
    Workload(WorkloadId),
    /// Only what names a workload.
    Status(WorkloadId),
    /// A policy.
    Policy(ObjectKey),
    /// A flag set.
    FlagSet(ObjectKey),
    /// The ledger of a workload.
    Recovery(WorkloadId),
}

/// What is known of the cluster.
#[derive(Default)]
pub struct FleetIndex(Mutex<Index>);

#[derive(Default)]
struct Index {
    workloads: HashMap<WorkloadId, Arc<WorkloadFacts>>,
    workload_of_uid: HashMap<Uid, WorkloadId>,
    /// Workloads by one label of their selector.
    by_selector: HashMap<u64, HashSet<WorkloadId>>,
    /// The Deployment of each ReplicaSet, by uid.
    deployment_of_set: HashMap<Uid, Uid>,
    sets_of_deployment: HashMap<Uid, BTreeSet<Uid>>,
    sets: HashMap<Uid, ReplicaSetFacts>,
    /// ReplicaSets of which a pod was seen ready.
    proven_sets: HashSet<Uid>,
    pods: HashMap<Uid, Arc<PodFacts>>,
    /// Pods by their controller: a ReplicaSet or a StatefulSet.
    pods_of_owner: HashMap<Uid, BTreeSet<Uid>>,
    pods_with_label: HashMap<u64, HashSet<Uid>>,
    config_maps: HashMap<WorkloadId, Arc<ConfigMapFacts>>,
    jobs: HashMap<ObjectKey, Arc<JobFacts>>,
    jobs_of_workload: HashMap<WorkloadId, BTreeSet<ObjectKey>>,
    policies: Attached<Policy>,
    /// What the fleets set that are degraded, by their policy.
    degraded: BTreeMap<ObjectKey, Degraded>,
    flag_sets: Attached<FlagSet>,
    /// How many changes of flag sets there were, for those who wait for one.
    flag_changes: watch::Sender<u64>,
}

/// Resources that name workloads.
struct Attached<K> {
    objects: BTreeMap<ObjectKey, Arc<K>>,
    seen: HashMap<ObjectKey, Edit>,
    of_target: HashMap<WorkloadId, BTreeSet<ObjectKey>>,
    /// How many changes there were.
    changes: u64,
    /// Of each namespace with such resources the number of its last change.
    versions: HashMap<String, u64>,
}

impl<K> Default for Attached<K> {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            seen: HashMap::new(),
            of_target: HashMap::new(),
            changes: 0,
            versions: HashMap::new(),
        }
    }
}

/// When an edit of an object was first seen, and which workloads it names.
struct Edit {
    uid: Option<String>,
    generation: Option<i64>,
    at: Instant,
    targets: BTreeSet<WorkloadId>,
}

/// The workload that a resource of `namespace` names.
pub fn target_id(namespace: &str, target: &TargetRef) -> WorkloadId {
    WorkloadId::new(namespace, target_kind(target.kind), target.name.as_str())
}

/// The workloads that a policy names; none, if it cannot be read.
fn policy_targets(policy: &Policy) -> BTreeSet<WorkloadId> {
    let namespace = policy.namespace().unwrap_or_default();
    policy.0.iter().flat_map(|policy| &policy.spec.target_refs).map(|target| target_id(&namespace, target)).collect()
}

/// The workloads that a flag set names; none, if it cannot be read.
fn flag_set_targets(set: &FlagSet) -> BTreeSet<WorkloadId> {
    let namespace = set.namespace().unwrap_or_default();
    set.0.iter().flat_map(|set| &set.spec.target_refs).map(|target| target_id(&namespace, target)).collect()
}

/// Takes `value` out of the set under `key`, and the set away when it is empty.
fn remove_from<K: Hash + Eq, V: Ord>(sets: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = sets.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            sets.remove(key);
        }
    }
}

impl<K> Attached<K> {
    /// Takes an object in, or out. Says which workloads it names or named, if that or anything in its spec is news.
    fn put(
        &mut self,
        object: &Arc<K>,
        meta: &ObjectMeta,
        targets: BTreeSet<WorkloadId>,
        gone: bool,
    ) -> BTreeSet<WorkloadId> {
        let key = ObjectKey::of_meta(meta);
        let (uid, generation) = (meta.uid.clone(), meta.generation);
        if gone {
            self.objects.remove(&key);
            let before = self.seen.remove(&key).map(|edit| edit.targets).unwrap_or_default();
            for target in &before {
                remove_from(&mut self.of_target, target, &key);
            }
            self.note_change(key.namespace);
            return before;
        }
        self.objects.insert(key.clone(), Arc::clone(object));
        if self.seen.get(&key).is_some_and(|edit| edit.uid == uid && edit.generation == generation) {
            // Only its status changed.
            return BTreeSet::new();
        }
        self.note_change(key.namespace.clone());
        let edit = Edit { uid, generation, at: Instant::now(), targets: targets.clone() };
        let before = self.seen.insert(key.clone(), edit).map(|edit| edit.targets).unwrap_or_default();
        for target in before.difference(&targets) {
            remove_from(&mut self.of_target, target, &key);
        }
        for target in &targets {
            self.of_target.entry(target.clone()).or_default().insert(key.clone());
        }
        targets.into_iter().chain(before).collect()
    }

    /// A namespace without such resources is not remembered; no two changes have one number, so none is taken for another.
    fn note_change(&mut self, namespace: String) {
        self.changes += 1;
        if self.in_namespace(&namespace).next().is_some() {
            self.versions.insert(namespace, self.changes);
        } else {
            self.versions.remove(&namespace);
        }
    }

    fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<K>> {
        let first = ObjectKey { namespace: namespace.to_owned(), name: String::new() };
        let namespace = first.namespace.clone();
        self.objects.range(first..).take_while(move |(key, _)| key.namespace == namespace).map(|(_, object)| object)
    }

    fn of(&self, target: &WorkloadId) -> Vec<Arc<K>> {
        let keys = self.of_target.get(target).into_iter().flatten();
        keys.filter_map(|key| self.objects.get(key).cloned()).collect()
    }
}

impl Index {
    /// The workload that a pod belongs to.
    fn owner_of(&self, pod: &PodFacts) -> Option<&WorkloadId> {
        let (kind, uid) = pod.owner.as_ref()?;
        let workload = match kind {
            PodOwner::ReplicaSet => self.deployment_of_set.get(uid)?,
            PodOwner::StatefulSet => uid,
        };
        self.workload_of_uid.get(workload)
    }

    /// The workloads whose selector a pod's labels meet.
    fn selecting(&self, labels: &LabelHashes) -> Vec<WorkloadId> {
        let candidates = labels.iter().filter_map(|label| self.by_selector.get(label)).flatten();
        candidates.filter(|id| self.workloads.get(*id).is_some_and(|w| holds(labels, &w.selector))).cloned().collect()
    }

    /// What a change of a pod affects.
    fn affected_by(&self, pod: &PodFacts) -> Vec<Affected> {
        match self.owner_of(pod) {
            Some(id) => vec![Affected::Workload(id.clone())],
            None => self.selecting(&pod.labels).into_iter().map(Affected::Status).collect(),
        }
    }

    fn forget_pod(&mut self, pod: &PodFacts) {
        self.pods.remove(&pod.uid);
        if let Some((_, owner)) = &pod.owner {
            remove_from(&mut self.pods_of_owner, owner, &pod.uid);
            if !self.pods_of_owner.contains_key(owner) && !self.sets.contains_key(owner) {
                self.proven_sets.remove(owner);
            }
        }
        for label in &pod.labels {
            if let Some(set) = self.pods_with_label.get_mut(label) {
                set.remove(&pod.uid);
                if set.is_empty() {
                    self.pods_with_label.remove(label);
                }
            }
        }
    }

    /// Notes that the template of a pod is known to work, if the pod was ready for long enough until then.
    fn note_proof(&mut self, pod: &PodFacts, until: Timestamp) {
        if let Some((PodOwner::ReplicaSet, set)) = pod.owner.as_ref().filter(|_| was_steady(pod, until)) {
            self.proven_sets.insert(Arc::clone(set));
        }
    }

    fn keep_pod(&mut self, pod: Arc<PodFacts>) {
        if let Some((_, owner)) = &pod.owner {
            self.pods_of_owner.entry(Arc::clone(owner)).or_default().insert(Arc::clone(&pod.uid));
        }
        for label in &pod.labels {
            self.pods_with_label.entry(*label).or_default().insert(Arc::clone(&pod.uid));
        }
        self.pods.insert(Arc::clone(&pod.uid), pod);
    }

    fn forget_workload(&mut self, id: &WorkloadId) {
        let Some(facts) = self.workloads.remove(id) else { return };
        self.workload_of_uid.remove(&facts.uid);
        if let Some(label) = facts.selector.first()
            && let Some(set) = self.by_selector.get_mut(label)
        {
            set.remove(id);
            if set.is_empty() {
                self.by_selector.remove(label);
            }
        }
    }

    /// Notes what the fleet of a policy sets. Says of which flags something else holds now; `None`: nothing changed.
    fn put_degraded(&mut self, key: &ObjectKey, degraded: Option<&Degraded>) -> Option<BTreeSet<String>> {
        let before = match degraded {
            Some(degraded) => self.degraded.insert(key.clone(), degraded.clone()),
            None => self.degraded.remove(key),
        };
        if before.as_ref() == degraded {
            return None;
        }
        self.flag_sets.note_change(key.namespace.clone());
        self.flag_changes.send_replace(self.flag_sets.changes);
        Some(before.iter().chain(degraded).flat_map(Degraded::keys).map(str::to_owned).collect())
    }

    fn owned_pods(&self, workload: &WorkloadFacts) -> Vec<Arc<PodFacts>> {
        let sets = self.sets_of_deployment.get(&workload.uid).into_iter().flatten();
        let owners = sets.chain(std::iter::once(&workload.uid));
        let uids = owners.filter_map(|owner| self.pods_of_owner.get(owner)).flatten();
        uids.filter_map(|uid| self.pods.get(uid).cloned()).collect()
    }
}

/// Whether a pod has been ready for so long that its template is known to work: without a readiness probe, one that crashes again
/// and again is ready now and then.
fn was_steady(pod: &PodFacts, until: Timestamp) -> bool {
    let Ready::Yes(since) = pod.signals.ready else { return false };
    let steady = SignedDuration::from_millis(i64::try_from(STEADY_AFTER_MS).unwrap_or(i64::MAX));
    until.duration_since(since) >= steady
}

/// Whether `labels` has all of `selector`. An empty selector selects nothing here.
fn holds(labels: &[u64], selector: &[u64]) -> bool {
    !selector.is_empty() && selector.iter().all(|wanted| labels.binary_search(wanted).is_ok())
}

impl FleetIndex {
    fn lock(&self) -> MutexGuard<'_, Index> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a workload.
    pub fn put_workload(&self, facts: WorkloadFacts) -> Vec<Affected> {
        let mut index = self.lock();
        if index.workloads.get(&facts.id).is_some_and(|old| **old == facts) {
            return Vec::new();
        }
        let id = facts.id.clone();
        index.forget_workload(&id);
        index.workload_of_uid.insert(Arc::clone(&facts.uid), id.clone());
        if let Some(label) = facts.selector.first() {
            index.by_selector.entry(*label).or_default().insert(id.clone());
        }
        index.workloads.insert(id.clone(), Arc::new(facts));
        vec![Affected::Workload(id)]
    }

    /// Takes a workload out, if it is still the one of that uid.
    pub fn remove_workload(&self, id: &WorkloadId, uid: &str) -> Vec<Affected> {
        let mut index = self.lock();
        if index.workloads.get(id).is_none_or(|known| &*known.uid != uid) {
            return Vec::new();
        }
        index.forget_workload(id);
        vec![Affected::Workload(id.clone())]
    }

    /// Takes in a ReplicaSet.
    pub fn put_replica_set(&self, facts: ReplicaSetFacts) -> Vec<Affected> {
        let mut index = self.lock();
        let before = index.deployment_of_set.get(&facts.uid).cloned();
        if facts.deployment.is_none() {
            index.sets.remove(&facts.uid);
            index.proven_sets.remove(&facts.uid);
        } else if index.sets.insert(Arc::clone(&facts.uid), facts.clone()).as_ref() == Some(&facts) {
            return Vec::new();
        }
        if let Some(before) = &before {
            remove_from(&mut index.sets_of_deployment, before, &facts.uid);
            index.deployment_of_set.remove(&facts.uid);
        }
        if let Some(deployment) = &facts.deployment {
            index.sets_of_deployment.entry(Arc::clone(deployment)).or_default().insert(Arc::clone(&facts.uid));
            index.deployment_of_set.insert(Arc::clone(&facts.uid), Arc::clone(deployment));
        }
        let has_pods = index.pods_of_owner.contains_key(&facts.uid);
        let concerned = before.into_iter().chain(facts.deployment).filter(|_| has_pods);
        concerned.filter_map(|uid| index.workload_of_uid.get(&uid).cloned()).map(Affected::Workload).collect()
    }

    /// Takes a ReplicaSet out.
    pub fn remove_replica_set(&self, uid: &str) -> Vec<Affected> {
        self.put_replica_set(ReplicaSetFacts::bare(uid.into(), None))
    }

    /// Takes in a pod.
    pub fn put_pod(&self, mut facts: PodFacts) -> Vec<Affected> {
        let mut index = self.lock();
        let before = index.pods.get(&facts.uid).cloned();
        // What its own conditions may not tell any more.
        if facts.readiness == Readiness::Never && before.as_ref().is_some_and(|one| one.readiness != Readiness::Never) {
            facts.readiness = Readiness::NotNow;
        }
        if before.as_ref().is_some_and(|before| **before == facts) {
            return Vec::new();
        }
        let mut affected = Vec::new();
        if let Some(before) = before {
            // The watch may show only late that it is not ready any more.
            let until = match facts.signals.ready {
                Ready::No { since, .. } | Ready::Yes(since) => since,
                Ready::Unknown => Timestamp::now(),
            };
            index.note_proof(&before, until);
            affected = index.affected_by(&before);
            index.forget_pod(&before);
        }
        affected.extend(index.affected_by(&facts));
        index.keep_pod(Arc::new(facts));
        affected
    }

    /// Takes a pod out.
    pub fn remove_pod(&self, uid: &str) -> Vec<Affected> {
        let mut index = self.lock();
        let Some(pod) = index.pods.get(uid).cloned() else { return Vec::new() };
        let affected = index.affected_by(&pod);
        index.note_proof(&pod, Timestamp::now());
        index.forget_pod(&pod);
        affected
    }

    /// Takes in a ConfigMap that is named as a workload's document.
    pub fn put_config_map(&self, facts: ConfigMapFacts) -> Vec<Affected> {
        let mut index = self.lock();
        let id = facts.owner.0.clone();
        // Only for a workload that exists: a ConfigMap cannot make itself remembered by naming an owner.
        if index.config_maps.get(&id).is_some_and(|old| **old == facts) {
            return Vec::new();
        }
        index.config_maps.insert(id.clone(), Arc::new(facts));
        vec![Affected::Workload(id)]
    }

    /// Takes a workload's ConfigMap out.
    pub fn remove_config_map(&self, id: &WorkloadId) -> Vec<Affected> {
        let gone = self.lock().config_maps.remove(id);
        gone.map(|_| Affected::Workload(id.clone())).into_iter().collect()
    }

    /// Takes in a Job that was made for an intent.
    pub fn put_job(&self, namespace: &str, facts: JobFacts) -> Vec<Affected> {
        let Some((owner, _)) = facts.owner.clone() else { return Vec::new() };
        let key = ObjectKey { namespace: namespace.to_owned(), name: facts.name.clone() };
        let mut index = self.lock();
        if index.jobs.get(&key).is_some_and(|old| **old == facts) {
            return Vec::new();
        }
        index.jobs_of_workload.entry(owner.clone()).or_default().insert(key.clone());
        index.jobs.insert(key, Arc::new(facts));
        vec![Affected::Status(owner)]
    }

    /// Takes a Job out.
    pub fn remove_job(&self, key: &ObjectKey) -> Vec<Affected> {
        let mut index = self.lock();
        let owner = index.jobs.remove(key).and_then(|job| job.owner.clone());
        let Some((owner, _)) = owner else { return Vec::new() };
        remove_from(&mut index.jobs_of_workload, &owner, key);
        vec![Affected::Status(owner)]
    }

    /// Takes in a policy.
    pub fn put_policy(&self, policy: Policy) -> Vec<Affected> {
        self.attach_policy(&Arc::new(policy), false)
    }

    fn attach_policy(&self, policy: &Arc<Policy>, gone: bool) -> Vec<Affected> {
        let key = ObjectKey::of(policy.as_ref());
        let mut index = self.lock();
        let mut targets = index.policies.put(policy, policy.meta(), policy_targets(policy), gone);
        let degraded = match &policy.0 {
            _ if gone => None,
            Ok(readable) => Degraded::of(readable),
            // What it set stays until its end: what it says now nobody knows.
            Err(_) => index.degraded.get(&key).cloned(),
        };
        let Some(flags) = index.put_degraded(&key, degraded.as_ref()) else {
            return targets.into_iter().map(Affected::Workload).chain([Affected::Policy(key)]).collect();
        };
        let flag_sets: Vec<_> = index.flag_sets.in_namespace(&key.namespace).cloned().collect();
        let documents: Vec<_> = index.config_maps.keys().filter(|id| id.namespace == key.namespace).cloned().collect();
        // To review a set takes a while, and everybody waits for the index.
        drop(index);
        // What an edit that cannot be used says is not what holds: of such a set any flag may be live.
        let may_have_one = |set: &&Arc<FlagSet>| {
            let has_one =
                set.0.as_ref().is_ok_and(|set| flags.iter().any(|key| set.spec.flag_spec.flags.contains_key(key)));
            has_one || set.reviewed().is_some_and(|reviewed| reviewed.is_err())
        };
        let concerned: Vec<_> = flag_sets.iter().filter(may_have_one).collect();
        targets.extend(concerned.iter().flat_map(|set| flag_set_targets(set)));
        // Nobody knows which workloads an unreadable one names.
        if flag_sets.iter().any(|set| set.0.is_err()) {
            targets.extend(documents);
        }
        let sets = concerned.iter().map(|set| Affected::FlagSet(ObjectKey::of_meta(set.meta())));
        let own = Affected::Policy(key);
        targets.into_iter().map(Affected::Workload).chain(sets).chain([own]).collect()
    }

    /// Takes a policy out.
    pub fn remove_policy(&self, key: &ObjectKey) -> Vec<Affected> {
        let known = self.lock().policies.objects.get(key).cloned();
        known.map(|policy| self.attach_policy(&policy, true)).unwrap_or_default()
    }

    /// Takes in a flag set.
    pub fn put_flag_set(&self, set: FlagSet) -> Vec<Affected> {
        let before = self.flag_set(&ObjectKey::of_meta(set.meta()));
        let set = before.iter().fold(set, |set, before| set.after(before));
        self.attach_flag_set(&Arc::new(set), false)
    }

    fn attach_flag_set(&self, set: &Arc<FlagSet>, gone: bool) -> Vec<Affected> {
        let mut index = self.lock();
        let before = index.flag_sets.changes;
        let targets = index.flag_sets.put(set, set.meta(), flag_set_targets(set), gone);
        if index.flag_sets.changes != before {
            index.flag_changes.send_replace(index.flag_sets.changes);
        }
        drop(index);
        let own = Affected::FlagSet(ObjectKey::of_meta(set.meta()));
        targets.into_iter().map(Affected::Workload).chain([own]).collect()
    }

    /// Takes a flag set out.
    pub fn remove_flag_set(&self, key: &ObjectKey) -> Vec<Affected> {
        let known = self.lock().flag_sets.objects.get(key).cloned();
        known.map(|set| self.attach_flag_set(&set, true)).unwrap_or_default()
    }

    /// A workload.
    pub fn workload(&self, id: &WorkloadId) -> Option<Arc<WorkloadFacts>> {
        self.lock().workloads.get(id).cloned()
    }

    /// What the ReplicaSets of a Deployment say of its last rollout.
    pub fn revisions_of(&self, deployment_uid: &str, now: Timestamp) -> Revisions {
        let index = self.lock();
        let sets = index.sets_of_deployment.get(deployment_uid).into_iter().flatten();
        let steady = |uid: &Uid| {
            let pods = index.pods_of_owner.get(uid).into_iter().flatten();
            pods.filter_map(|pod| index.pods.get(pod)).any(|pod| was_steady(pod, now))
        };
        let proven = |uid: &Uid| index.proven_sets.contains(uid) || steady(uid);
        let revision = |uid: &Uid| Some(Revision { set: index.sets.get(uid)?, proven: proven(uid) });
        Revisions::of(sets.filter_map(revision).collect())
    }

    /// The pods of a workload that are not going away, by name.
    pub fn pods_of(&self, id: &WorkloadId) -> Vec<Arc<PodFacts>> {
        let index = self.lock();
        let Some(workload) = index.workloads.get(id) else { return Vec::new() };
        let mut pods = index.owned_pods(workload);
        pods.retain(|pod| pod.alive);
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        pods
    }

    /// Of the pods of a namespace that have all labels of `selector` and are not going away so many as `most`, each with the
    /// workload that it belongs to: those that `rank` first, and of one rank by name. An empty selector selects nothing.
    ///
    /// Everybody else waits meanwhile, and a selector can find very many: they are looked at, and no more are kept than are
    /// asked for.
    pub fn pods_selected<K: Ord>(
        &self,
        namespace: &str,
        selector: &[u64],
        most: usize,
        mut rank: impl FnMut(&PodFacts, Option<&WorkloadId>) -> K,
    ) -> Vec<(Arc<PodFacts>, Option<WorkloadId>)> {
        let index = self.lock();
        let sets = selector.iter().map(|label| index.pods_with_label.get(label));
        let Some(candidates) = sets.min_by_key(|set| set.map_or(0, HashSet::len)).flatten() else { return Vec::new() };
        let pods = candidates.iter().filter_map(|uid| index.pods.get(uid));
        let selected = pods.filter(|pod| pod.alive && *pod.namespace == *namespace && holds(&pod.labels, selector));
        // The last of those that are kept is on top.
        let mut first = BinaryHeap::with_capacity(most.saturating_add(1).min(1024));
        for pod in selected {
            first.push((rank(pod, index.owner_of(pod)), &*pod.name, &pod.uid));
            if first.len() > most {
                first.pop();
            }
        }
        let first = first.into_sorted_vec().into_iter().filter_map(|(_, _, uid)| index.pods.get(uid));
        first.map(|pod| (Arc::clone(pod), index.owner_of(pod).cloned())).collect()
    }

    /// Names of pods that carry the labels of a workload and do not belong to it.
    pub fn unowned_pods(&self, id: &WorkloadId) -> Vec<Arc<str>> {
        let index = self.lock();
        let Some(workload) = index.workloads.get(id) else { return Vec::new() };
        // By the rarest of its labels, so that one that everybody carries costs nothing.
        let sets = workload.selector.iter().map(|label| index.pods_with_label.get(label));
        let Some(candidates) = sets.min_by_key(|set| set.map_or(0, HashSet::len)).flatten() else { return Vec::new() };
        let pods = candidates.iter().filter_map(|uid| index.pods.get(uid));
        let unowned =
            pods.filter(|pod| pod.alive && holds(&pod.labels, &workload.selector) && index.owner_of(pod) != Some(id));
        let mut names: Vec<_> = unowned.map(|pod| Arc::clone(&pod.name)).collect();
        names.sort();
        names
    }

    /// The pod of that uid.
    pub fn pod(&self, uid: &str) -> Option<Arc<PodFacts>> {
        self.lock().pods.get(uid).cloned()
    }

    /// The ConfigMap of a workload, if this very workload owns it.
    pub fn config_map(&self, id: &WorkloadId) -> Option<Arc<ConfigMapFacts>> {
        let index = self.lock();
        let uid = &index.workloads.get(id)?.uid;
        index.config_maps.get(id).filter(|map| map.owner.1 == *uid).cloned()
    }

    /// The Job that was made for an intent about a workload.
    pub fn job_of(&self, id: &WorkloadId, intent: &str) -> Option<Arc<JobFacts>> {
        let index = self.lock();
        let uid = &index.workloads.get(id)?.uid;
        let jobs = index.jobs_of_workload.get(id)?.iter().filter_map(|key| index.jobs.get(key));
        let mut own = jobs.filter(|job| job.owner.as_ref().is_some_and(|(_, owner)| owner == uid));
        own.find(|job| job.intent == intent).cloned()
    }

    /// A policy.
    pub fn policy(&self, key: &ObjectKey) -> Option<Arc<Policy>> {
        self.lock().policies.objects.get(key).cloned()
    }

    /// The policies that name a workload.
    pub fn policies_of(&self, id: &WorkloadId) -> Vec<Arc<Policy>> {
        self.lock().policies.of(id)
    }

    /// Keys of the policies that name a workload.
    pub fn policy_keys_of(&self, id: &WorkloadId) -> Vec<ObjectKey> {
        self.lock().policies.of_target.get(id).into_iter().flatten().cloned().collect()
    }

    /// What the degraded fleets of a namespace say of its flags.
    pub fn degradations_in(&self, namespace: &str) -> Degradations {
        let index = self.lock();
        let first = ObjectKey { namespace: namespace.to_owned(), name: String::new() };
        let own = index.degraded.range(first..).take_while(|(key, _)| key.namespace == namespace);
        winners(own.map(|(key, degraded)| (key.name.as_str(), degraded)))
    }

    /// A flag set.
    pub fn flag_set(&self, key: &ObjectKey) -> Option<Arc<FlagSet>> {
        self.lock().flag_sets.objects.get(key).cloned()
    }

    /// The flag sets of a namespace, by name.
    pub fn flag_sets_in(&self, namespace: &str) -> Vec<Arc<FlagSet>> {
        self.lock().flag_sets.in_namespace(namespace).cloned().collect()
    }

    /// A number that differs after each change of a flag set's spec in a namespace, and of what degraded fleets say of its flags;
    /// none without flag sets there.
    pub fn flag_sets_version(&self, namespace: &str) -> Option<u64> {
        self.lock().flag_sets.versions.get(namespace).copied()
    }

    /// Tells of every such change in any namespace; [`FleetIndex::flag_sets_version`] says of which.
    pub fn flag_changes(&self) -> watch::Receiver<u64> {
        self.lock().flag_changes.subscribe()
    }

    /// Those of these flag sets that cannot be read any more. They name no workload, and what was live from them stays.
    pub fn unreadable_flag_sets(&self, namespace: &str, live: &[Source]) -> Vec<Arc<FlagSet>> {
        let index = self.lock();
        let held = |source: &Source| {
            let key = ObjectKey { namespace: namespace.to_owned(), name: source.name.clone() };
            let set = index.flag_sets.objects.get(&key)?;
            (set.0.is_err() && set.meta().uid.as_deref() == Some(source.uid.as_str())).then(|| Arc::clone(set))
        };
        live.iter().filter_map(held).collect()
    }

    /// The flag sets that name a workload.
    pub fn flag_sets_of(&self, id: &WorkloadId) -> Vec<Arc<FlagSet>> {
        self.lock().flag_sets.of(id)
    }

    /// Keys of the flag sets that name a workload.
    pub fn flag_set_keys_of(&self, id: &WorkloadId) -> Vec<ObjectKey> {
        self.lock().flag_sets.of_target.get(id).into_iter().flatten().cloned().collect()
    }

    /// When the present edit of a policy was first seen by this process.
    pub fn policy_seen_at(&self, key: &ObjectKey) -> Option<Instant> {
        self.lock().policies.seen.get(key).map(|edit| edit.at)
    }

    /// All there is to look at: at the start, and when this replica comes to lead.
    pub fn everything(&self) -> Vec<Affected> {
        let index = self.lock();
        let named: BTreeSet<_> = index.policies.of_target.keys().chain(index.flag_sets.of_target.keys()).collect();
        // A workload that nobody names any more may still have a document.
        let workloads = named.into_iter().chain(index.config_maps.keys()).collect::<BTreeSet<_>>();
        let workloads = workloads.into_iter().cloned().map(Affected::Workload);
        let policies = index.policies.objects.keys().cloned().map(Affected::Policy);
        let flag_sets = index.flag_sets.objects.keys().cloned().map(Affected::FlagSet);
        workloads.chain(policies).chain(flag_sets).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::facts::Rollout;
    use contract::WorkloadKind;
    use engine::signals::PodSignals;

    fn id(kind: WorkloadKind, name: &str) -> WorkloadId {
        WorkloadId::new("n", kind, name)
    }

    fn workload(kind: WorkloadKind, name: &str, selector: &[u64]) -> WorkloadFacts {
        WorkloadFacts {
            id: id(kind, name),
            uid: format!("{kind:?}-{name}").into(),
            selector: selector.into(),
            wanted: 1,
            rollout: Rollout::default(),
            paused: None,
            marked: false,
        }
    }

    fn pod(name: &str, owner: Option<(PodOwner, &str)>, labels: &[u64]) -> PodFacts {
        PodFacts {
            uid: format!("uid-{name}").into(),
            namespace: "n".into(),
            name: name.into(),
            owner: owner.map(|(kind, uid)| (kind, uid.into())),
            labels: labels.into(),
            ip: None,
            admin_port: 1,
            public_port: 2,
            named_ports: Box::default(),
            host_network: false,
            created_at: Timestamp::UNIX_EPOCH,
            readiness: Readiness::Ready,
            alive: true,
            signs: false,
            excluded: false,
            signals: PodSignals::default(),
        }
    }

    fn names(pods: &[Arc<PodFacts>]) -> Vec<&str> {
        pods.iter().map(|pod| &*pod.name).collect()
    }

    use WorkloadKind::{Deployment, StatefulSet};

    #[test]
    fn a_pod_belongs_by_its_owners_whatever_comes_first() {
        let set = || ReplicaSetFacts::bare("rs".into(), Some("Deployment-a".into()));
        for pod_first in [true, false] {
            let index = FleetIndex::default();
            let put_pod = || index.put_pod(pod("p", Some((PodOwner::ReplicaSet, "rs")), &[1]));
            if pod_first {
                put_pod();
            }
            index.put_workload(workload(Deployment, "a", &[1]));
            let joined = index.put_replica_set(set());
            if pod_first {
                assert_eq!(joined, [Affected::Workload(id(Deployment, "a"))]);
            } else {
                assert_eq!(put_pod(), [Affected::Workload(id(Deployment, "a"))]);
            }
            assert_eq!(names(&index.pods_of(&id(Deployment, "a"))), ["p"]);
            assert!(index.unowned_pods(&id(Deployment, "a")).is_empty());
        }
    }

    #[test]
    fn a_deployment_and_a_stateful_set_of_one_name_share_nothing() {
        let index = FleetIndex::default();
        index.put_workload(workload(Deployment, "a", &[1]));
        index.put_workload(workload(StatefulSet, "a", &[2]));
        index.put_pod(pod("a-0", Some((PodOwner::StatefulSet, "StatefulSet-a")), &[2]));
        assert_eq!(names(&index.pods_of(&id(StatefulSet, "a"))), ["a-0"]);
        assert!(index.pods_of(&id(Deployment, "a")).is_empty());
    }

    #[test]
    fn what_only_looks_like_a_workloads_pod_is_found_by_its_labels() {
        let index = FleetIndex::default();
        index.put_workload(workload(Deployment, "a", &[1, 5]));
        assert_eq!(index.put_pod(pod("alien", None, &[1, 3, 5])), [Affected::Status(id(Deployment, "a"))]);
        assert!(index.put_pod(pod("other", None, &[1, 3])).is_empty(), "it lacks a label");
        assert_eq!(index.unowned_pods(&id(Deployment, "a")), ["alien".into()]);
        index.remove_pod("uid-alien");
        assert!(index.unowned_pods(&id(Deployment, "a")).is_empty());
    }

    #[test]
    fn a_selector_finds_the_pods_of_its_own_namespace_whatever_owns_them() {
        let index = FleetIndex::default();
        index.put_workload(workload(StatefulSet, "a", &[1]));
        index.put_pod(pod("b-alien", None, &[1, 2]));
        index.put_pod(pod("a-own", Some((PodOwner::StatefulSet, "StatefulSet-a")), &[1, 2, 3]));
        index.put_pod(pod("less", None, &[1]));
        index.put_pod(PodFacts { namespace: "other".into(), ..pod("elsewhere", None, &[1, 2]) });
        index.put_pod(PodFacts { alive: false, ..pod("leaving", None, &[1, 2]) });
        let found = |selector: &[u64]| {
            let found = index.pods_selected("n", selector, 10, |_, _| 0);
            found.into_iter().map(|(pod, owner)| (pod.name.to_string(), owner)).collect::<Vec<_>>()
        };
        let own = ("a-own".to_owned(), Some(id(StatefulSet, "a")));
        assert_eq!(found(&[1, 2]), [own, ("b-alien".to_owned(), None)]);
        assert!(found(&[]).is_empty() && found(&[9]).is_empty());
    }

    #[test]
    fn of_many_that_a_selector_finds_those_that_rank_first_are_picked() {
        let index = FleetIndex::default();
        for number in 0..300 {
            let readiness = if number < 200 { Readiness::NotNow } else { Readiness::Ready };
            index.put_pod(PodFacts { readiness, ..pod(&format!("{number:03}"), None, &[1]) });
        }
        let mut seen = 0;
        let found = index.pods_selected("n", &[1], 101, |pod, _| {
            seen += 1;
            !pod.is_ready()
        });
        let names: Vec<_> = found.iter().map(|(pod, _)| pod.name.to_string()).collect();
        let expected: Vec<_> = (200..300).chain([0]).map(|number| format!("{number:03}")).collect();
        assert_eq!((names, seen), (expected, 300));
    }

    #[test]
    fn what_says_nothing_new_affects_nothing() {
        let index = FleetIndex::default();
        index.put_workload(workload(Deployment, "a", &[1]));
        index.put_replica_set(ReplicaSetFacts::bare("rs".into(), Some("Deployment-a".into())));
        let facts = pod("p", Some((PodOwner::ReplicaSet, "rs")), &[1]);
        assert_eq!(index.put_pod(facts.clone()).len(), 1);
        assert!(index.put_pod(facts.clone()).is_empty());
        let unready = PodFacts { readiness: Readiness::NotNow, ..facts };
        assert!(index.put_pod(unready).contains(&Affected::Workload(id(Deployment, "a"))));
        assert!(index.put_workload(workload(Deployment, "a", &[1])).is_empty());
    }

    #[test]
    fn a_pod_that_was_seen_ready_was_ready_for_good() {
        let index = FleetIndex::default();
        index.put_workload(workload(Deployment, "a", &[1]));
        index.put_replica_set(ReplicaSetFacts::bare("rs".into(), Some("Deployment-a".into())));
        let shown = |readiness: Readiness| {
            let pod = pod("p", Some((PodOwner::ReplicaSet, "rs")), &[1]);
            index.put_pod(PodFacts { readiness, ..pod });
            index.pods_of(&id(Deployment, "a"))[0].readiness
        };
        let told = [Readiness::Never, Readiness::Ready, Readiness::Never].map(shown);
        assert_eq!(told, [Readiness::Never, Readiness::Ready, Readiness::NotNow]);
    }

    fn flag_set(namespace: &str, name: &str, generation: i64) -> FlagSet {
        let spec = serde_json::json!({
            "metadata": {"namespace": namespace, "name": name, "uid": name, "generation": generation},
            "spec": {"flagSpec": {"flags": {}}},
        });
        serde_json::from_str(&spec.to_string()).unwrap()
    }

    #[test]
    fn a_namespace_has_a_version_of_its_flag_sets_that_changes_with_every_edit() {
        let index = FleetIndex::default();
        let version = || index.flag_sets_version("n");
        let mut changes = index.flag_changes();
        let mut is_told = || changes.borrow_and_update().has_changed();
        assert_eq!((version(), is_told()), (None, false));
        index.put_flag_set(flag_set("n", "a", 1));
        let first = version();
        assert!(is_told());
        index.put_flag_set(flag_set("n", "a", 1));
        assert!(!is_told(), "its status");
        index.put_flag_set(flag_set("na", "b", 1));
        assert_eq!(version(), first, "its status, or another namespace");
        index.put_flag_set(flag_set("n", "a", 2));
        let second = version();
        assert!(first < second);
        assert_eq!(index.flag_sets_in("n").len(), 1);
        index.remove_flag_set(&ObjectKey { namespace: "n".into(), name: "a".into() });
        assert_eq!((version(), index.flag_sets_in("n").len()), (None, 0));
        index.put_flag_set(flag_set("n", "a", 2));
        assert!(second < version());
    }

    #[test]
    fn what_a_degraded_fleet_says_of_flags_is_a_change_of_them() {
        let index = FleetIndex::default();
        index.put_flag_set(flag_set("n", "a", 1));
        let mut changes = index.flag_changes();
        let mut put = |variant: &str| {
            let before = (index.flag_sets_version("n"), index.degradations_in("n"));
            let policy = serde_json::json!({
                "metadata": {"namespace": "n", "name": "p", "uid": "p"},
                "spec": {"targetRefs": [{"name": "w"}], "degradation": {}},
                "status": {"degradation": {
                    "stage": "mail", "level": 1, "stages": 1, "loadPercent": 80, "since": "2026-01-01T00:00:00.000000Z",
                    "until": "2026-01-01T00:10:00.000000Z", "flags": [{"key": "Mail", "variant": variant}],
                }},
            });
            index.put_policy(serde_json::from_str(&policy.to_string()).unwrap());
            let is_told = changes.borrow_and_update().has_changed();
            (is_told, before.0 != index.flag_sets_version("n"), before.1 != index.degradations_in("n"))
        };
        assert_eq!(put("off"), (true, true, true));
        assert_eq!(put("off"), (false, false, false), "the same again");
        assert_eq!(put("dim"), (true, true, true));
        index.remove_policy(&ObjectKey { namespace: "n".into(), name: "p".into() });
        assert!(changes.borrow_and_update().has_changed() && index.degradations_in("n").is_empty());
    }

    /// What is live of it is not what its edit says, and of one that cannot be read nobody knows which workloads it names.
    #[test]
    fn what_a_degraded_fleet_says_is_looked_at_where_a_flag_set_cannot_be_used() {
        let index = FleetIndex::default();
        let own = |name: &str| (id(Deployment, name), name.into());
        for name in ["a", "b"] {
            index.put_workload(workload(Deployment, name, &[1]));
        }
        index.put_config_map(ConfigMapFacts { resource_version: "1".into(), owner: own("a"), operator: None });
        let policy = |variant: &str| {
            let policy = serde_json::json!({
                "metadata": {"namespace": "n", "name": "p", "uid": "p", "generation": 1},
                "spec": {"targetRefs": [], "degradation": {}},
                "status": {"degradation": {
                    "stage": "mail", "level": 1, "stages": 1, "loadPercent": 80, "since": "2026-01-01T00:00:00.000000Z",
                    "until": "2026-01-01T00:10:00.000000Z", "flags": [{"key": "Mail", "variant": variant}],
                }},
            });
            let affected = index.put_policy(serde_json::from_str(&policy.to_string()).unwrap());
            ["a", "b"].map(|name| affected.contains(&Affected::Workload(id(Deployment, name))))
        };
        assert_eq!(policy("off"), [false, false]);
        let flag = serde_json::json!({"state": "ENABLED", "variants": {}});
        let invalid = serde_json::json!({
            "metadata": {"namespace": "n", "name": "i", "uid": "i", "generation": 1},
            "spec": {"targetRefs": [{"name": "b"}], "flagSpec": {"flags": {"Renamed": flag}}},
        });
        index.put_flag_set(serde_json::from_str(&invalid.to_string()).unwrap());
        assert_eq!(policy("on"), [false, true]);
        let unreadable = r#"{"metadata": {"namespace": "n", "name": "s", "uid": "s"}, "spec": {"flagSpec": 7}}"#;
        index.put_flag_set(serde_json::from_str(unreadable).unwrap());
        assert_eq!([policy("dim"), policy("dim")], [[true, true], [false, false]]);
    }

    #[test]
    fn everything_that_was_put_can_be_taken_out() {
        let index = FleetIndex::default();
        index.put_workload(workload(Deployment, "a", &[1]));
        index.put_replica_set(ReplicaSetFacts::bare("rs".into(), Some("Deployment-a".into())));
        index.put_pod(pod("p", Some((PodOwner::ReplicaSet, "rs")), &[1, 2]));
        index.remove_pod("uid-p");
        index.remove_replica_set("rs");
        assert!(index.remove_workload(&id(Deployment, "a"), "another").is_empty(), "another of that name");
        index.remove_workload(&id(Deployment, "a"), "Deployment-a");
        let left = index.lock();
        assert!(left.workloads.is_empty() && left.workload_of_uid.is_empty() && left.by_selector.is_empty());
        assert!(left.pods.is_empty() && left.pods_of_owner.is_empty() && left.pods_with_label.is_empty());
        assert!(left.deployment_of_set.is_empty() && left.sets_of_deployment.is_empty());
    }
}
