//! What recovery decides from: the state of every check, pod and Job of a policy's workloads, in the words of the
//! decision.

use crate::{spec::checks::Check, status::target::Target};
use contract::WorkloadKind;
use crds::resilience_policy::CheckScope;
use engine::{
    check::Evaluation,
    fleet::is_quorum,
    recovery::{CheckState, History, Job, Observed, Outage, Pod, Rollout, Subject, failing_since},
};
use jiff::Timestamp;
use std::collections::BTreeMap;

/// What recovery decides from.
pub fn observe(
    checks: &[Check<'_>],
    held: &[&Target],
    history: &History,
    jobs: BTreeMap<String, Job>,
    watching_since: Timestamp,
    observer_stale: Option<String>,
) -> Observed {
    let mut observed = Observed { jobs, watching_since, observer_stale, ..Observed::default() };
    for target in held {
        observed.pods.extend(target.existing.iter().map(|(uid, facts)| (uid.clone(), facts.clone())));
        observed.wanted.insert(target.key.clone(), target.wanted);
        if target.kind == WorkloadKind::StatefulSet {
            observed.keeps_names.insert(target.key.clone());
        }
        if target.rollout.in_progress {
            observed.rolling_out.insert(target.key.clone());
        }
        observed.rollouts.insert(target.key.clone(), rollout(target));
        observed.excluded.extend(target.excluded.iter().cloned());
        observed.paused.extend(target.paused.clone().map(|why| (target.key.clone(), why)));
        for (dependency, evidence) in bad_dependencies(target) {
            observed.bad_dependencies.insert((target.key.clone(), dependency), evidence);
        }
        for check in checks {
            match check.scope {
                CheckScope::Pod => observed.checks.extend(pod_checks(target, check, history)),
                CheckScope::Workload => observed.checks.extend(workload_check(target, check, history)),
            }
        }
    }
    observed
}

fn rollout(target: &Target) -> Rollout {
    let id = |id: &Option<Box<str>>| id.as_deref().map(str::to_owned);
    Rollout {
        restarted_by: id(&target.rollout.restarted_by),
        rolled_back_by: id(&target.rollout.rolled_back_by),
        complete: target.rollout.complete,
        stuck: target.rollout.progress.as_ref().is_some_and(|progress| !progress.progresses),
        held: target.rollout.held.map(str::to_owned),
        recreates: target.rollout.recreates,
        undo: target.undo.clone().unwrap_or_else(|| Err(format!("a {} is not rolled back", target.kind))),
    }
}

/// The dependencies of a workload of which most pods have evidence that they are bad: their circuit is open, or a fresh
/// connection got no answer when a check failed. Where others are not heard, as when a node is cut off, those that are speak for
/// all: what they miss may be on that node, too.
fn bad_dependencies(target: &Target) -> BTreeMap<String, Outage> {
    let of_dependency = target.pods.iter().flat_map(|(_, _, evaluations)| evaluations.values());
    let of_dependency = of_dependency.filter_map(|one| Some((one.dependency.as_deref()?, one)));
    let mut first: BTreeMap<&str, Timestamp> = BTreeMap::new();
    for (dependency, since) in of_dependency.filter_map(|(dependency, one)| Some((dependency, silent_since(one)?))) {
        first.entry(dependency).and_modify(|first| *first = since.min(*first)).or_insert(since);
    }
    let silent = first.into_iter().filter_map(|(dependency, first)| {
        let (mut silent, mut heard, mut unheard) = (0, 0, 0);
        for (uid, _, evaluations) in &target.pods {
            // A pod counts once, however many of its checks are about the dependency: only some of them try a fresh connection.
            // It says so below the threshold of the check, too: the first pod over it must not be acted on before the rest.
            let own = || evaluations.values().filter(|one| one.dependency.as_deref() == Some(dependency));
            let is_silent = own().any(|one| silent_since(one).is_some());
            // What one said before the others failed says nothing of now.
            let is_heard = is_silent || own().any(|one| one.seen_at >= first);
            heard += usize::from(is_heard);
            silent += usize::from(is_silent);
            unheard += usize::from(!is_heard && (target.unheard.contains(uid) || own().next().is_some()));
        }
        let said = format!("{dependency} gives fresh connections of {silent} of {heard} pods no answer");
        Some((dependency.to_owned(), evidence(said, silent, heard, unheard)?))
    });
    let tripped = target.circuits.iter().filter_map(|(dependency, view)| {
        let (tripped, total) = (view.tripped, view.total);
        let said = format!("the circuit of {dependency} is open in {tripped} of {total} pods");
        Some((dependency.clone(), evidence(said, tripped, total, target.unheard.len())?))
    });
    let mut bad: BTreeMap<String, Outage> = BTreeMap::new();
    for (dependency, evidence) in silent {
        bad.insert(dependency, Outage { evidence, away: true, over: false });
    }
    for (dependency, evidence) in tripped {
        bad.entry(dependency).or_default().evidence = evidence;
    }
    bad
}

/// What is said of a dependency, if so many witnesses are enough: a quorum of those that are heard, or all of them where others
/// are not heard.
fn evidence(said: String, witnesses: usize, heard: usize, unheard: usize) -> Option<String> {
    if is_quorum(witnesses, heard) {
        return Some(said);
    }
    let speak_for_all = witnesses > 0 && witnesses == heard && unheard > 0;
    speak_for_all.then(|| format!("{said}, and {unheard} more are not heard"))
}

/// Since when the check of a pod fails, if a fresh connection to its dependency gets no answer either.
fn silent_since(evaluation: &Evaluation) -> Option<Timestamp> {
    (evaluation.dependency_answers == Some(false)).then_some(evaluation.failing_since).flatten()
}

fn pod_checks(target: &Target, check: &Check<'_>, history: &History) -> Vec<CheckState> {
    let state = |(uid, name, evaluations): &(String, String, BTreeMap<_, Evaluation>)| {
        let evaluation = evaluations.get(check.name)?;
        let pod = Some(Pod { name: name.clone(), uid: uid.clone() });
        let subject = Subject { target: target.key.clone(), pod, check: check.name.to_owned() };
        let since = failing_since(evaluation.since, evaluation.began_before, &subject, history);
        Some(CheckState {
            since,
            well_since: evaluation.well_since,
            seen_at: evaluation.seen_at,
            subject,
            healthy: evaluation.healthy,
            message: evaluation.message.clone(),
            dependency: evaluation.dependency.clone(),
            dependency_answers: evaluation.dependency_answers,
            began_before: evaluation.began_before,
            asked: check.asked,
        })
    };
    target.pods.iter().filter_map(state).collect()
}

/// One fact that all pods see.
fn workload_check(target: &Target, check: &Check<'_>, history: &History) -> Option<CheckState> {
    let majority = target.majorities.get(check.name)?;
    let subject = Subject { target: target.key.clone(), pod: None, check: check.name.to_owned() };
    Some(CheckState {
        since: failing_since(majority.since, majority.began_before, &subject, history),
        well_since: majority.well_since,
        seen_at: majority.seen_at,
        subject,
        healthy: majority.healthy,
        message: majority.message.clone(),
        dependency: None,
        dependency_answers: None,
        began_before: majority.began_before,
        asked: check.asked,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{CheckReport, CheckStatus};
    use engine::{
        check::{Thresholds, evaluate},
        fleet::CircuitView,
    };

    fn evaluation(status: CheckStatus, dependency_answers: Option<bool>) -> Evaluation {
        let report = CheckReport {
            status,
            message: String::new(),
            tags: Vec::new(),
            dependency: Some("database".to_owned()),
            dependency_answers,
            duration_ms: 1,
            consecutive_failures: 3,
            runs: 3,
            data: BTreeMap::new(),
        };
        evaluate(None, &report, Thresholds::default(), Timestamp::UNIX_EPOCH)
    }

    /// Without visitors a circuit stays half-open once its break is over: that withheld the recovery of pods for as long as nobody
    /// came. Only that it is open now says that calls fail.
    #[rstest::rstest]
    #[case::open(2, true)]
    #[case::half_open(0, false)]
    #[case::one_has_been_called_again(1, false)]
    fn a_half_open_circuit_is_no_evidence(#[case] tripped: usize, #[case] is_evidence: bool) {
        let view = CircuitView { open: 2, tripped, total: 2 };
        let target = Target { circuits: [("catalog".to_owned(), view)].into(), ..Target::default() };
        let evidence = bad_dependencies(&target).remove("catalog").map(|one| one.evidence);
        assert_eq!(evidence, is_evidence.then(|| "the circuit of catalog is open in 2 of 2 pods".to_owned()));
    }

    /// Booking has two checks of its database, of which one never tries a fresh connection.
    #[test]
    fn a_pod_whose_fresh_connection_is_silent_counts_whatever_its_other_checks_say() {
        let silent = evaluation(CheckStatus::Unhealthy, Some(false));
        let answers = evaluation(CheckStatus::Unhealthy, Some(true));
        let other = evaluation(CheckStatus::Unknown, None);
        let pod = |name: &str, database: &Evaluation| {
            let checks = [("database", database), ("booking-consistency", &other)];
            let evaluations = checks.map(|(check, evaluation)| (check.to_owned(), evaluation.clone()));
            (name.to_owned(), name.to_owned(), BTreeMap::from(evaluations))
        };
        let evidence = |databases: [&Evaluation; 3]| {
            let pods = ["a", "b", "c"].iter().zip(databases).map(|(name, database)| pod(name, database)).collect();
            bad_dependencies(&Target { pods, ..Target::default() }).remove("database").map(|one| one.evidence)
        };
        let said = "database gives fresh connections of 2 of 3 pods no answer";
        assert_eq!(evidence([&silent, &silent, &answers]).as_deref(), Some(said));
        assert_eq!(evidence([&silent, &answers, &answers]), None);
        // What Kubernetes says of a pod is no word of its own.
        let mut ready = evaluation(CheckStatus::Healthy, None);
        ready.dependency = None;
        let signals = BTreeMap::from([("pod-ready".to_owned(), ready)]);
        let beside_unheard = |first: &Evaluation, others: usize| {
            let unheard = ["b", "c"].into_iter().take(others).map(str::to_owned);
            let mut pods = vec![pod("a", first)];
            pods.extend(unheard.clone().map(|name| (name.clone(), name, signals.clone())));
            let target = Target { pods, unheard: unheard.collect(), ..Target::default() };
            bad_dependencies(&target).remove("database").map(|one| one.evidence)
        };
        // Cut off a moment ago: what they said before is still there.
        let mut late = silent.clone();
        (late.failing_since, late.seen_at) =
            (Some(Timestamp::from_second(9).unwrap()), Timestamp::from_second(11).unwrap());
        let said = "database gives fresh connections of 1 of 1 pods no answer, and 2 more are not heard";
        assert_eq!(evidence([&late, &answers, &answers]).as_deref(), Some(said));
        assert_eq!(beside_unheard(&silent, 2).as_deref(), Some(said));
        assert_eq!(beside_unheard(&answers, 2), None);
        assert_eq!(beside_unheard(&silent, 0), None, "it may be its own fault");
        let open = |unheard: &[&str]| {
            let view = CircuitView { tripped: 1, total: 1, ..CircuitView::default() };
            let (circuits, unheard) = ([("database".to_owned(), view)].into(), unheard.iter().map(ToString::to_string));
            bad_dependencies(&Target { circuits, unheard: unheard.collect(), ..Target::default() })
                .remove("database")
                .map(|one| one.evidence)
        };
        let said = "the circuit of database is open in 1 of 1 pods, and 1 more are not heard";
        assert_eq!((open(&["b"]).as_deref(), open(&[])), (Some(said), None));
    }
}
