//! What recovery decides from: the state of every check, pod and Job of a policy's workloads, in the words of the
//! decision.

use super::execute::SUPPORTED;
use crate::status::target::Target;
use contract::WorkloadKind;
use crds::{ResiliencePolicy, resilience_policy::CheckScope};
use engine::{
    check::Evaluation,
    recovery::{CheckState, History, Job, Observed, Pod, Subject, failing_since},
};
use jiff::Timestamp;
use std::collections::BTreeMap;

/// What recovery decides from.
pub fn observe(
    policy: &ResiliencePolicy,
    held: &[&Target],
    history: &History,
    jobs: BTreeMap<String, Job>,
    watching_since: Timestamp,
    observer_stale: Option<String>,
) -> Observed {
    let supported = SUPPORTED.into();
    let mut observed = Observed { supported, jobs, watching_since, observer_stale, ..Observed::default() };
    for target in held {
        observed.pods.extend(target.existing.iter().map(|(uid, facts)| (uid.clone(), facts.clone())));
        observed.wanted.insert(target.key.clone(), target.wanted);
        if target.kind == WorkloadKind::StatefulSet {
            observed.keeps_names.insert(target.key.clone());
        }
        if target.rollout.in_progress {
            observed.rolling_out.insert(target.key.clone());
        }
        for (dependency, view) in target.circuits.iter().filter(|(_, view)| view.quorum()) {
            let pods = format!("{} of {} pods", view.open, view.total);
            observed.open_on_quorum.insert((target.key.clone(), dependency.clone()), pods);
        }
        for check in &policy.spec.health_checks {
            match check.scope {
                CheckScope::Pod => observed.checks.extend(pod_checks(target, &check.name, history)),
                CheckScope::Workload => observed.checks.extend(workload_check(target, &check.name, history)),
            }
        }
    }
    observed
}

fn pod_checks(target: &Target, check: &str, history: &History) -> Vec<CheckState> {
    let state = |(uid, name, evaluations): &(String, String, BTreeMap<_, Evaluation>)| {
        let evaluation = evaluations.get(check)?;
        let pod = Some(Pod { name: name.clone(), uid: uid.clone() });
        let subject = Subject { target: target.key.clone(), pod, check: check.to_owned() };
        let since = failing_since(evaluation.since, evaluation.began_before, &subject, history);
        Some(CheckState {
            since,
            well_since: evaluation.well_since,
            seen_at: evaluation.seen_at,
            subject,
            healthy: evaluation.healthy,
            message: evaluation.message.clone(),
            dependency: evaluation.dependency.clone(),
        })
    };
    target.pods.iter().filter_map(state).collect()
}

/// One fact that all pods see.
fn workload_check(target: &Target, check: &str, history: &History) -> Option<CheckState> {
    let majority = target.majorities.get(check)?;
    let subject = Subject { target: target.key.clone(), pod: None, check: check.to_owned() };
    Some(CheckState {
        since: failing_since(majority.since, majority.began_before, &subject, history),
        well_since: majority.well_since,
        seen_at: majority.seen_at,
        subject,
        healthy: majority.healthy,
        message: majority.message.clone(),
        dependency: None,
    })
}
