//! One workload as a policy or flag set sees it: found or not, whose it is, and who of its pods runs what.

use super::conditions::Verdict;
use crate::{
    context::Context,
    kubernetes::{
        meta::{created_at, cut, short},
        watches::is_ready,
    },
    pods::state::{MajorityStatus, Problem},
    telemetry::metrics::{CircuitLabels, WorkloadLabels},
};
use contract::WorkloadId;
use crds::{condition::types::PROGRAMMED, status::TargetStatus};
use engine::{
    ack::{self, Acknowledged},
    check::Evaluation,
    fleet::CircuitView,
    recovery::PodFacts,
};
use jiff::Timestamp;
use k8s_openapi::{
    api::{apps::v1::Deployment, core::v1::Pod},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::ResourceExt;
use std::collections::{BTreeMap, BTreeSet};
use tokio::time::Instant;

/// A workload, as far as this process knows it.
#[derive(Clone, Default)]
pub struct Target {
    /// Its name.
    pub name: String,
    /// It exists.
    pub found: bool,
    /// It is being rolled out.
    pub rolling_out: bool,
    /// Revision, hash and moment of what is published.
    pub published: Option<(i64, String, Instant)>,
    /// The generations, by uid, of the policies and flag sets that are taken into account in it.
    pub considered: BTreeMap<String, i64>,
    /// Why nothing could be published.
    pub problem: Option<Problem>,
    /// Flag sets that do not fit into its document beside the others.
    pub left_out: Vec<String>,
    /// Who runs what is published.
    pub acknowledged: Acknowledged,
    /// The pods that the cluster has, by uid, also those that this process knows nothing else of yet.
    pub existing: BTreeMap<String, PodFacts>,
    /// Pods that it is to have.
    pub wanted: usize,
    /// Names of pods that carry its labels and are not its own.
    pub unowned_pods: Vec<String>,
    /// Pods: uid, name, evaluations.
    pub pods: Vec<(String, String, BTreeMap<String, Evaluation>)>,
    /// What most pods say of each check.
    pub majorities: BTreeMap<String, MajorityStatus>,
    /// Circuits over all pods.
    pub circuits: BTreeMap<String, CircuitView>,
    /// Since when they are open.
    pub open_since: BTreeMap<String, Timestamp>,
    /// Pods whose answers cannot be true.
    pub rejected: usize,
    /// Names of the pods in degraded mode.
    pub degraded: Vec<String>,
    /// Checks that are degraded somewhere.
    pub degraded_checks: BTreeSet<String>,
}

/// Looks a workload up.
pub fn look_up(ctx: &Context, namespace: &str, name: &str) -> Target {
    let Some(deployment) = ctx.caches.deployment(namespace, name) else {
        return Target { name: name.to_owned(), ..Target::default() };
    };
    let id = WorkloadId { namespace: namespace.to_owned(), name: name.to_owned() };
    let facts = |pod: &Pod| PodFacts {
        target: name.to_owned(),
        created_at: created_at(pod),
        ready: is_ready(pod),
        reported: false,
        instance: None,
    };
    let existing: BTreeMap<_, _> =
        ctx.caches.pods_of(&deployment).iter().map(|pod| (pod.uid().unwrap_or_default(), facts(pod))).collect();
    let base = Target {
        name: name.to_owned(),
        found: true,
        rolling_out: rolling_out(&deployment),
        existing,
        unowned_pods: ctx.caches.unowned_pods(&deployment),
        wanted: deployment.spec.replicas.map_or(1, |wanted| usize::try_from(wanted).unwrap_or(0)),
        ..Target::default()
    };
    let uid = deployment.uid().unwrap_or_default();
    ctx.fleet
        .read(&id, |workload| {
            // What is known of another Deployment of that name says nothing of this one.
            if workload.uid != uid {
                return base.clone();
            }
            // A pod that the board does not know yet counts too: it has not answered.
            let mut existing = base.existing.clone();
            let mut views = Vec::new();
            for (uid, facts) in &mut existing {
                let pod = workload.pods.get(uid).cloned().unwrap_or_default();
                facts.instance.clone_from(&pod.instance);
                facts.reported = pod.reported;
                views.push(pod.view(facts.ready));
            }
            let published = workload.published.as_ref();
            Target {
                existing,
                acknowledged: ack::count(&views, published.map_or("", |published| &published.content_hash)),
                published: published.map(|p| (p.revision, p.content_hash.clone(), p.at)),
                considered: workload.considered.clone(),
                problem: workload.problem.clone(),
                left_out: workload.left_out.clone(),
                // What an unreachable pod said last says nothing of now: silence is neither health nor sickness.
                pods: workload
                    .pods
                    .iter()
                    .map(|(uid, pod)| {
                        let heard = if pod.is_heard() { pod.evaluations.clone() } else { BTreeMap::new() };
                        (uid.clone(), pod.name.clone(), heard)
                    })
                    .collect(),
                majorities: workload.current_majorities(),
                circuits: workload.circuits(),
                open_since: workload.open_since.clone(),
                rejected: workload.pods.values().filter(|pod| pod.rejected.is_some()).count(),
                degraded: workload
                    .pods
                    .values()
                    .filter(|pod| pod.degraded && pod.is_heard())
                    .map(|pod| pod.name.clone())
                    .collect(),
                degraded_checks: workload
                    .pods
                    .values()
                    .filter(|pod| pod.is_heard())
                    .flat_map(|pod| pod.degraded_checks.iter().cloned())
                    .collect(),
                ..base.clone()
            }
        })
        .unwrap_or(base)
}

/// Sets the gauges of a workload to what is known now.
pub fn gauge(ctx: &Context, id: &WorkloadId) {
    let target = look_up(ctx, &id.namespace, &id.name);
    let metrics = &ctx.shared.metrics;
    let value = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    if target.published.is_some() {
        let labels = WorkloadLabels { namespace: id.namespace.clone(), workload: id.name.clone() };
        metrics.pods.get_or_create(&labels).set(value(target.acknowledged.ready));
        metrics.pods_in_sync.get_or_create(&labels).set(value(target.acknowledged.in_sync));
        metrics.pods_unreachable.get_or_create(&labels).set(value(target.acknowledged.unreachable));
        metrics.pods_reports_rejected.get_or_create(&labels).set(value(target.rejected));
        metrics.pods_unowned.get_or_create(&labels).set(value(target.unowned_pods.len()));
    }
    for (dependency, view) in &target.circuits {
        let (namespace, workload) = (id.namespace.clone(), id.name.clone());
        let labels = CircuitLabels { namespace, workload, dependency: dependency.clone() };
        metrics.circuit_open_pods.get_or_create(&labels).set(value(view.open));
    }
}

/// Whether pods of an old template are still being replaced.
fn rolling_out(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else { return false };
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let updated = status.updated_replicas.unwrap_or(0);
    status.observed_generation < deployment.metadata.generation
        || updated < wanted
        || status.replicas.unwrap_or(0) > updated
}

/// Status of a target that is accepted, or would be.
pub fn status(target: &Target, accepted: bool, reason: &str, message: Option<String>) -> TargetStatus {
    let count = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
    let shown = accepted && target.published.is_some();
    let message = message.or_else(|| unowned(target));
    TargetStatus {
        kind: "Deployment".to_owned(),
        name: target.name.clone(),
        accepted,
        reason: reason.to_owned(),
        pods: count(target.acknowledged.ready),
        pods_in_sync: if shown { count(target.acknowledged.in_sync) } else { 0 },
        pods_unreachable: count(target.acknowledged.unreachable),
        revision: target.published.as_ref().filter(|_| shown).map(|(revision, ..)| *revision),
        content_hash: target.published.as_ref().filter(|_| shown).map(|(_, hash, _)| hash.clone()),
        would_publish: None,
        message: message.map(|message| cut(&message, 1000).to_owned()),
    }
}

/// What there is to say of pods that only look like the workload's.
fn unowned(target: &Target) -> Option<String> {
    let names = target.unowned_pods.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
    (!target.unowned_pods.is_empty()).then(|| {
        format!("pods with its labels that are not its own, and get nothing: {} ({names})", target.unowned_pods.len())
    })
}

/// Programmed over the targets that a resource holds. The second value says that a person is needed.
pub fn programmed(held: &[&Target], resource: &ObjectMeta) -> (Verdict, bool) {
    if let Some((target, problem)) = held.iter().find_map(|target| Some((target, target.problem.as_ref()?))) {
        return (
            Verdict::new(PROGRAMMED, false, problem.reason, format!("{}: {}", target.name, problem.message)),
            problem.stalled,
        );
    }
    let considered = |target: &&&Target| {
        resource.uid.as_ref().and_then(|uid| target.considered.get(uid)).copied() == resource.generation
    };
    if let Some(target) = held.iter().find(|target| target.published.is_none() || !considered(target)) {
        return (
            Verdict::new(
                PROGRAMMED,
                false,
                "Publishing",
                format!("{}: the configuration is being published", target.name),
            ),
            false,
        );
    }
    let ready: usize = held.iter().map(|target| target.acknowledged.ready).sum();
    let in_sync: usize = held.iter().map(|target| target.acknowledged.in_sync).sum();
    let lagging: Vec<_> = held.iter().flat_map(|target| &target.acknowledged.lagging).take(10).cloned().collect();
    let verdict = if held.is_empty() {
        Verdict::new(PROGRAMMED, true, "NoTargets", "no workload is named, so there is nothing to publish")
    } else if ready == 0 {
        Verdict::new(PROGRAMMED, true, "NoPods", "published; there is no ready pod to run it")
    } else if in_sync == ready {
        Verdict::new(PROGRAMMED, true, "Programmed", format!("live in {in_sync} of {ready} pods"))
    } else {
        let message = format!("live in {in_sync} of {ready} pods; {}", lagging.join("; "));
        Verdict::new(PROGRAMMED, false, "PartiallyProgrammed", message)
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
    #[case::this_edit(Some(2), ConditionStatus::True, "Programmed")]
    #[case::an_earlier_edit(Some(1), ConditionStatus::False, "Publishing")]
    #[case::before_it_existed(None, ConditionStatus::False, "Publishing")]
    fn what_is_live_counts_only_if_this_edit_is_in_it(
        #[case] considered: Option<i64>,
        #[case] status: ConditionStatus,
        #[case] reason: &str,
    ) {
        let resource = ObjectMeta { uid: Some("uid".into()), generation: Some(2), ..ObjectMeta::default() };
        let (verdict, stuck) = programmed(&[&target(considered)], &resource);
        assert_eq!((verdict.status, verdict.reason, stuck), (status, reason, false));
    }
}
