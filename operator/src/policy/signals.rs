//! Kubernetes' own signals of a policy's workloads, as evaluations beside those that pods report.

use crate::{pods::tallies::MajorityStatus, spec::checks::Check, status::target::Target};
use engine::{check::Evaluation, signals};
use jiff::Timestamp;

/// Adds what Kubernetes says to what the pods of a workload say. The answer is when some of it changes by itself.
pub fn add(target: &mut Target, checks: &[Check<'_>], now: Timestamp) -> Option<Timestamp> {
    let mut changes = Vec::new();
    for (check, (signal, grace_ms)) in checks.iter().filter_map(|check| Some((check, check.signal?))) {
        // A pod that reports a check of that name means something else by it.
        target.majorities.remove(check.name);
        for (uid, _, evaluations) in &mut target.pods {
            evaluations.remove(check.name);
            let said = target.signals.get(uid).and_then(|pod| signals::pod(signal, pod, grace_ms, now));
            let Some(verdict) = said else { continue };
            changes.extend(verdict.changes_at);
            evaluations.insert(check.name.to_owned(), Evaluation::of_signal(&verdict, now));
        }
        let progress = target.rollout.progress.as_ref().filter(|_| signal == signals::Signal::Rollout);
        if let Some(verdict) = progress.map(|progress| signals::rollout(progress, grace_ms, now)) {
            changes.extend(verdict.changes_at);
            let Evaluation { healthy, since, well_since, seen_at, message, began_before, .. } =
                Evaluation::of_signal(&verdict, now);
            let status = MajorityStatus { healthy, since, well_since, began_before, seen_at, message };
            target.majorities.insert(check.name.to_owned(), status);
        }
    }
    changes.into_iter().min()
}
