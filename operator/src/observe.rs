//! What recovery decides from: the state of every check, pod and Job of a policy's workloads, in the words of the
//! decision.

use crate::{acts::SUPPORTED, target::Target};
use crds::{ResiliencePolicy, resilience_policy::CheckScope};
use engine::{
    check::Judgement,
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
) -> Observed {
    let mut observed = Observed { supported: SUPPORTED.into(), jobs, watching_since, ..Observed::default() };
    for target in held {
        observed.pods.extend(target.existing.iter().map(|(uid, facts)| (uid.clone(), facts.clone())));
        observed.wanted.insert(target.name.clone(), target.wanted);
        if target.rolling_out {
            observed.rolling_out.insert(target.name.clone());
        }
        for (dependency, view) in target.circuits.iter().filter(|(_, view)| view.quorum()) {
            let pods = format!("{} of {} pods", view.open, view.total);
            observed.open_on_quorum.insert((target.name.clone(), dependency.clone()), pods);
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
    let state = |(uid, name, judgements): &(String, String, BTreeMap<_, Judgement>)| {
        let judgement = judgements.get(check)?;
        let pod = Some(Pod { name: name.clone(), uid: uid.clone() });
        let subject = Subject { target: target.name.clone(), pod, check: check.to_owned() };
        let created_at = target.existing.get(uid).map(|facts| facts.created_at);
        let since = failing_since(judgement.since, judgement.began_before, &subject, created_at, history);
        Some(CheckState {
            since,
            seen_at: judgement.seen_at,
            subject,
            healthy: judgement.healthy,
            message: judgement.message.clone(),
            dependency: judgement.dependency.clone(),
        })
    };
    target.pods.iter().filter_map(state).collect()
}

/// One fact that all pods see.
fn workload_check(target: &Target, check: &str, history: &History) -> Option<CheckState> {
    let opinion = target.opinions.get(check)?;
    let subject = Subject { target: target.name.clone(), pod: None, check: check.to_owned() };
    Some(CheckState {
        since: failing_since(opinion.since, opinion.began_before, &subject, None, history),
        seen_at: opinion.seen_at,
        subject,
        healthy: opinion.healthy,
        message: opinion.message.clone(),
        dependency: None,
    })
}
