//! What the operator found of the checks that it asks itself, as evaluations beside those that pods report.

use crate::{checks::results::CurrentChecks, pods::tallies::MajorityStatus, status::target::Target};
use engine::check::Evaluation;

/// Adds it to what the pods of a workload say.
pub fn add(target: &mut Target, asked: &CurrentChecks) {
    for (check, current) in asked {
        // A pod that reports a check of that name means something else by it.
        target.majorities.remove(check);
        target.degraded_checks.remove(check);
        for (uid, _, evaluations) in &mut target.pods {
            evaluations.remove(check);
            if let Some((_, said)) = current.pods.get(uid).filter(|(of, _)| *of == target.key) {
                evaluations.insert(check.clone(), said.clone());
            }
        }
        if let Some((_, said)) = current.workload.as_ref().filter(|(of, _)| *of == target.key) {
            let Evaluation { healthy, since, well_since, seen_at, message, began_before, .. } = said.clone();
            let status = MajorityStatus { healthy, since, well_since, began_before, seen_at, message };
            target.majorities.insert(check.clone(), status);
        }
    }
}

/// What a person should know of how they were asked: above all, why nobody could be.
pub fn remarks(asked: &CurrentChecks) -> Vec<String> {
    asked.iter().filter_map(|(check, current)| Some(format!("{check}: {}", current.remark.as_ref()?))).collect()
}
