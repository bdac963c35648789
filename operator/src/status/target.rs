//! One workload as a policy or flag set sees it: found or not, whose it is, and who of its pods runs what.

use super::{conditions::Verdict, writes::WRITE_INTERVAL};
use crate::{
    context::Context,
    fleet::{
        facts::{self, PodOwner, Readiness, Rollout},
        flag_problems::{FlagTrouble, FlagTroubles},
        unread_flags::UnreadFlags,
    },
    kubernetes::meta::{cut, short},
    pods::{
        prober::now_in_milliseconds,
        state::{PodState, Problem, WorkloadState},
        tallies::MajorityStatus,
    },
    telemetry::metrics::WorkloadLabels,
};
use contract::{BuiltIns, WorkloadId, WorkloadKind};
use crds::{ConditionType, Reason, status::TargetStatus};
use engine::{
    ack::{Acknowledged, Counter, PodView},
    check::Evaluation,
    fleet::CircuitView,
    recovery::{PodFacts, Undo},
    signals::PodSignals,
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// A workload, as far as this process knows it.
#[derive(Clone, Default)]
pub struct Target {
    /// Its kind and name, as a status shows them.
    pub name: String,
    /// Its kind.
    pub kind: WorkloadKind,
    /// What recovery calls it; see [`target_key`].
    pub key: String,
    /// It exists.
    pub found: bool,
    /// How far a change of its template has come.
    pub rollout: Rollout,
    /// What may be undone of its last rollout, or why nothing may be.
    pub undo: Option<Result<Undo, String>>,
    /// Revision, hash and moment of what is published.
    pub published: Option<(i64, Arc<str>, Instant)>,
    /// Some of its pods are being pushed to, or are about to be.
    pub pushing: bool,
    /// Some of its pods have not been heard yet since this replica leads; they are waited for, for this time at most.
    pub listening: Option<Duration>,
    /// The generations, by uid, of the policies and flag sets that are taken into account in it.
    pub considered: BTreeMap<String, i64>,
    /// Why nothing could be published.
    pub problem: Option<Problem>,
    /// Flag sets that do not fit into its document beside the others.
    pub left_out: Vec<String>,
    /// Who runs what is published.
    pub acknowledged: Acknowledged,
    /// What ready pods that run it find wrong with its flags.
    pub flag_troubles: Vec<FlagTrouble>,
    /// Flags that none of its ready pods reads, as each of them says.
    pub unread_flags: BTreeSet<String>,
    /// The pods that the cluster has, by uid, also those that this process knows nothing else of yet.
    pub existing: BTreeMap<String, PodFacts>,
    /// Pods that it is to have.
    pub wanted: usize,
    /// What the kubelets say of them, by uid.
    pub signals: BTreeMap<String, PodSignals>,
    /// Names of pods that carry its labels and are not its own.
    pub unowned_pods: Vec<Arc<str>>,
    /// Pods: uid, name, evaluations.
    pub pods: Vec<(String, String, BTreeMap<String, Evaluation>)>,
    /// Pods, by uid, that do not answer, or have not yet.
    pub unheard: BTreeSet<String>,
    /// What most pods say of each check.
    pub majorities: BTreeMap<String, MajorityStatus>,
    /// Why nothing is to be begun to recover it, if somebody said so on it.
    pub paused: Option<String>,
    /// Pods, by uid, to which nothing is to be done.
    pub excluded: Vec<String>,
    /// Circuits over all pods.
    pub circuits: BTreeMap<String, CircuitView>,
    /// Since when they are open.
    pub open_since: BTreeMap<String, Timestamp>,
    /// Pods whose reports are rejected.
    pub rejected: usize,
    /// Names of the pods in degraded mode.
    pub degraded: Vec<String>,
    /// Checks that are degraded somewhere.
    pub degraded_checks: BTreeSet<String>,
    /// What its pods have built in, as one of them told; absent: none has told yet.
    pub built_ins: Option<Arc<BuiltIns>>,
}

impl Target {
    /// For how long, at most, what there is to say of it is about to change by itself: it was published, or its edit seen,
    /// a moment ago and its pods are being pushed to; or its pods are being asked for the first time. Each step of that
    /// wakes what looks at it.
    pub fn settles_within(&self, resource: &ObjectMeta) -> Option<Duration> {
        let considered = resource.uid.as_ref().and_then(|uid| self.considered.get(uid)).copied() == resource.generation;
        let young = self.published.as_ref().and_then(|(_, _, at)| WRITE_INTERVAL.checked_sub(at.elapsed()));
        self.listening.or(young.filter(|_| considered && self.pushing))
    }
}

/// What recovery calls a workload within its namespace: the name of a Deployment, and of another kind its kind, too.
pub fn target_key(id: &WorkloadId) -> String {
    match id.kind {
        WorkloadKind::Deployment => id.name.clone(),
        WorkloadKind::StatefulSet => format!("{}/{}", id.kind, id.name),
    }
}

/// The workload that recovery calls so; see [`target_key`].
pub fn workload_of(namespace: &str, key: &str) -> WorkloadId {
    match key.split_once('/').and_then(|(kind, name)| Some((kind.parse().ok()?, name))) {
        Some((kind, name)) => WorkloadId::new(namespace, kind, name),
        None => WorkloadId::deployment(namespace, key),
    }
}

/// Looks a workload up.
pub fn look_up(ctx: &Context, id: &WorkloadId) -> Target {
    let bare = Target { name: id.name.clone(), kind: id.kind, key: target_key(id), ..Target::default() };
    let Some(facts) = ctx.index.workload(id) else { return bare };
    let pods = ctx.index.pods_of(id);
    let revisions =
        (id.kind == WorkloadKind::Deployment).then(|| ctx.index.revisions_of(&facts.uid, now_in_milliseconds()));
    let undo = revisions.as_ref().map(|revisions| match &facts.rollout.template_owner {
        Some(owner) => Err(format!("{owner} owns the template of {} and would put it back; roll back there", id.name)),
        None => revisions.undo.clone(),
    });
    let current = revisions.map(|revisions| revisions.current).unwrap_or_default();
    let mut target = Target {
        found: true,
        rollout: facts.rollout.clone(),
        undo,
        unowned_pods: ctx.index.unowned_pods(id),
        wanted: facts.wanted,
        paused: facts.paused.clone(),
        excluded: pods.iter().filter(|pod| pod.excluded).map(|pod| pod.uid.to_string()).collect(),
        ..bare
    };
    let fleet = ctx.fleet.lock();
    // What is known of another workload of that name says nothing of this one.
    let workload = fleet.get(id).filter(|workload| *workload.uid == *facts.uid);
    if let Some(workload) = workload {
        describe(&mut target, workload);
    }
    let hash = target.published.as_ref().map_or("", |(_, hash, _)| hash);
    let mut counter = Counter::new(hash);
    let (mut flag_troubles, mut unread_flags) = (FlagTroubles::default(), UnreadFlags::default());
    for pod in &pods {
        // A pod that is not known yet counts too: it has not answered.
        let state = workload.and_then(|workload| workload.pod(&pod.uid));
        let facts = PodFacts {
            name: pod.name.to_string(),
            target: target.key.clone(),
            created_at: pod.created_at,
            ready: pod.is_ready(),
            was_ready: pod.readiness != Readiness::Never,
            // One that is not asked has nothing to say.
            reported: workload.is_some_and(|known| known.probe_every.is_none())
                || state.is_some_and(|state| state.reported),
            instance: state.and_then(|state| state.instance.as_deref()).map(str::to_owned),
            outdated: matches!(&pod.owner, Some((PodOwner::ReplicaSet, set)) if !current.contains(set)),
        };
        counter.count(&view(pod, state));
        if pod.is_ready() {
            let heard = state.filter(|state| state.is_heard());
            unread_flags.count(heard.and_then(|state| state.applied.as_deref()), hash);
        }
        target.existing.insert(pod.uid.to_string(), facts);
        target.signals.insert(pod.uid.to_string(), pod.signals.clone());
        if !state.is_some_and(|state| state.reported && state.is_heard()) {
            target.unheard.insert(pod.uid.to_string());
        }
        let Some(state) = state else {
            target.pods.push((pod.uid.to_string(), pod.name.to_string(), BTreeMap::new()));
            continue;
        };
        target.pushing |= state.pushing.is_some() || state.is_about_to_be_pushed_to(hash);
        target.rejected += usize::from(state.rejected.is_some());
        if state.is_heard() && state.degraded {
            target.degraded.push(pod.name.to_string());
        }
        if let Some(applied) = state.applied.as_deref().filter(|_| state.is_heard() && pod.is_ready()) {
            flag_troubles.count(applied, hash);
        }
        target.degraded_checks.extend(state.degraded_checks().iter().map(ToString::to_string));
        let evaluations = state.evaluations().iter().map(|(name, one)| (name.to_string(), one.clone())).collect();
        target.pods.push((pod.uid.to_string(), pod.name.to_string(), evaluations));
    }
    target.acknowledged = counter.done();
    target.unread_flags = unread_flags.done();
    target.flag_troubles = flag_troubles.done(workload.map(|known| known.flag_sources.as_slice()).unwrap_or_default());
    target
}

/// What is known of a workload as a whole.
fn describe(target: &mut Target, workload: &WorkloadState) {
    target.published = workload.published.as_ref().map(|p| (p.revision, Arc::clone(&p.content_hash), p.at));
    target.listening = workload.listening_for(Instant::now());
    target.considered = workload.considered.clone();
    target.problem.clone_from(&workload.problem);
    target.left_out.clone_from(&workload.left_out);
    target.built_ins.clone_from(&workload.learned.built_ins);
    target.majorities = workload.tallies.current_majorities();
    for (name, view, since) in workload.tallies.circuits() {
        target.circuits.insert(name.to_owned(), view);
        if let Some(since) = since {
            target.open_since.insert(name.to_owned(), since);
        }
    }
}

fn view<'a>(pod: &'a facts::PodFacts, state: Option<&'a PodState>) -> PodView<'a> {
    PodView {
        name: &pod.name,
        ready: pod.is_ready(),
        applied: state.and_then(|state| state.applied.as_deref()),
        unreachable: state.and_then(|state| state.unreachable.as_deref()),
        rejected: state.and_then(|state| state.rejected.as_deref()),
        refused: state.and_then(|state| state.refused.as_deref()),
    }
}

/// Sets the gauges of a workload to what is known now.
pub fn set_gauges(ctx: &Context, id: &WorkloadId) {
    show_gauges(ctx, id, &look_up(ctx, id));
}

/// Sets the gauges of a workload that was looked up.
pub fn show_gauges(ctx: &Context, id: &WorkloadId, target: &Target) {
    let metrics = &ctx.shared.metrics;
    let value = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    if target.published.is_some() {
        let labels = WorkloadLabels::of(id);
        metrics.pods.get_or_create(&labels).set(value(target.acknowledged.ready));
        metrics.pods_in_sync.get_or_create(&labels).set(value(target.acknowledged.in_sync));
        metrics.pods_unreachable.get_or_create(&labels).set(value(target.acknowledged.unreachable));
        metrics.pods_reports_rejected.get_or_create(&labels).set(value(target.rejected));
        metrics.pods_unowned.get_or_create(&labels).set(value(target.unowned_pods.len()));
    }
    metrics.set_circuits(id, target.circuits.iter().map(|(name, view)| (name.as_str(), view.open)));
}

/// Status of a target that is accepted, or would be.
pub fn status(target: &Target, accepted: bool, reason: Reason, message: Option<String>) -> TargetStatus {
    let count = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
    let shown = accepted && target.published.is_some();
    let message = message.or_else(|| target.rollout.note.clone()).or_else(|| unowned(target));
    TargetStatus {
        kind: target.kind.as_str().to_owned(),
        name: target.name.clone(),
        accepted,
        reason: reason.as_str().to_owned(),
        pods: count(target.acknowledged.ready),
        pods_in_sync: if shown { count(target.acknowledged.in_sync) } else { 0 },
        pods_unreachable: count(target.acknowledged.unreachable),
        revision: target.published.as_ref().filter(|_| shown).map(|(revision, ..)| *revision),
        content_hash: target.published.as_ref().filter(|_| shown).map(|(_, hash, _)| hash.to_string()),
        would_publish: None,
        message: message.map(|message| cut(&message, 1000).to_owned()),
    }
}

/// What there is to say of pods that only look like the workload's.
fn unowned(target: &Target) -> Option<String> {
    let names = target.unowned_pods.iter().take(5).map(|name| &**name).collect::<Vec<_>>().join(", ");
    (!target.unowned_pods.is_empty()).then(|| {
        format!("pods with its labels that are not its own, and get nothing: {} ({names})", target.unowned_pods.len())
    })
}

/// Programmed over the targets that a resource holds. The second value says that a person is needed.
pub fn programmed(held: &[&Target], resource: &ObjectMeta) -> (Verdict, bool) {
    if let Some((target, problem)) = held.iter().find_map(|target| Some((target, target.problem.as_ref()?))) {
        return (
            Verdict::new(
                ConditionType::Programmed,
                false,
                problem.reason,
                format!("{}: {}", target.name, problem.message),
            ),
            problem.stalled,
        );
    }
    let considered = |target: &&&Target| {
        resource.uid.as_ref().and_then(|uid| target.considered.get(uid)).copied() == resource.generation
    };
    if let Some(target) = held.iter().find(|target| target.published.is_none() || !considered(target)) {
        return (
            Verdict::new(
                ConditionType::Programmed,
                false,
                Reason::Publishing,
                format!("{}: the configuration is being published", target.name),
            ),
            false,
        );
    }
    let ready: usize = held.iter().map(|target| target.acknowledged.ready).sum();
    let in_sync: usize = held.iter().map(|target| target.acknowledged.in_sync).sum();
    let lagging: Vec<_> = held.iter().flat_map(|target| &target.acknowledged.lagging).take(10).cloned().collect();
    let verdict = if held.is_empty() {
        Verdict::new(
            ConditionType::Programmed,
            true,
            Reason::NoTargets,
            "no workload is named, so there is nothing to publish",
        )
    } else if ready == 0 {
        Verdict::new(ConditionType::Programmed, true, Reason::NoPods, "published; there is no ready pod to run it")
    } else if in_sync == ready {
        Verdict::new(ConditionType::Programmed, true, Reason::Programmed, format!("live in {in_sync} of {ready} pods"))
    } else {
        let message = format!("live in {in_sync} of {ready} pods; {}", lagging.join("; "));
        Verdict::new(ConditionType::Programmed, false, Reason::PartiallyProgrammed, message)
    };
    (verdict, false)
}

/// `in sync/ready` over the targets that a resource holds.
pub fn ratio(held: &[&Target]) -> String {
    let sum = |part: fn(&Acknowledged) -> usize| held.iter().map(|target| part(&target.acknowledged)).sum::<usize>();
    let shown = held.iter().all(|target| target.published.is_some());
    format!("{}/{}", if shown { sum(|a| a.in_sync) } else { 0 }, sum(|a| a.ready))
}

/// How the news that a configuration is live reads: "9f2c41 live in 4 of 4 pods, 212 ms after the change".
pub fn programmed_note(held: &[&Target], changed_at: Option<Instant>) -> String {
    let hashes: BTreeSet<_> =
        held.iter().filter_map(|target| target.published.as_ref()).map(|(_, hash, _)| short(hash)).collect();
    let hashes: Vec<_> = hashes.into_iter().collect();
    let ready: usize = held.iter().map(|target| target.acknowledged.ready).sum();
    let after = changed_at.map(|at| format!(", {} ms after the change", at.elapsed().as_millis())).unwrap_or_default();
    format!("{} live in {ready} of {ready} pods{after}", hashes.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::ConditionStatus;

    /// A workload whose one ready pod runs what is published, which took generation `considered` of the resource into account.
    fn target(considered: Option<i64>) -> Target {
        Target {
            name: "booking".into(),
            found: true,
            published: Some((1, "hash".into(), Instant::now())),
            considered: considered.map(|generation| ("uid".to_owned(), generation)).into_iter().collect(),
            acknowledged: Acknowledged { ready: 1, in_sync: 1, ..Acknowledged::default() },
            ..Target::default()
        }
    }

    #[rstest::rstest]
    #[case::this_edit(Some(2), ConditionStatus::True, Reason::Programmed)]
    #[case::an_earlier_edit(Some(1), ConditionStatus::False, Reason::Publishing)]
    #[case::before_it_existed(None, ConditionStatus::False, Reason::Publishing)]
    fn what_is_live_counts_only_if_this_edit_is_in_it(
        #[case] considered: Option<i64>,
        #[case] status: ConditionStatus,
        #[case] reason: Reason,
    ) {
        let resource = ObjectMeta { uid: Some("uid".into()), generation: Some(2), ..ObjectMeta::default() };
        let (verdict, stuck) = programmed(&[&target(considered)], &resource);
        assert_eq!((verdict.status, verdict.reason, stuck), (status, reason, false));
    }
}
