//! From what people write to how recovery decides. Nothing else turns `spec.recovery` into settings.

use crds::{ResiliencePolicySpec, bounded::IntOrPercent, resilience_policy as api};
use engine::recovery::{Action, Limits, MaxUnhealthy, Settings, Step, Storm};

/// How the operator recovers under a policy. `dry_run` and `storm` are the operator's own settings.
pub fn recovery(spec: &ResiliencePolicySpec, dry_run: bool, storm: Storm) -> Settings {
    let dry_run = dry_run || spec.mode == api::Mode::DryRun;
    // Where a policy says nothing of recovery, what people ask for still has its usual limits.
    let recovery = spec.recovery.clone().unwrap_or_default();
    let step = |step: &api::Step| Step {
        action: action(step.action),
        cron_job: step.cron_job_ref.as_ref().map(|reference| reference.name.clone()),
        timeout_ms: step.timeout.millis(),
    };
    Settings {
        ladders: recovery
            .ladders
            .iter()
            .map(|ladder| (ladder.check.clone(), ladder.steps.iter().map(step).collect()))
            .collect(),
        limits: Limits {
            max_in_flight: usize::try_from(recovery.limits.max_in_flight).unwrap_or(1),
            cooldown_ms: recovery.limits.cooldown.millis(),
            budget_actions: usize::try_from(recovery.limits.budget.actions).unwrap_or(0),
            budget_interval_ms: recovery.limits.budget.interval.millis(),
            max_unhealthy: match recovery.limits.max_unhealthy {
                IntOrPercent::Count(count) => MaxUnhealthy::Count(count as usize),
                IntOrPercent::Percent(percent) => MaxUnhealthy::Percent(percent as usize),
            },
        },
        healthy_delay_ms: recovery.healthy_delay.millis(),
        startup_grace_ms: recovery.startup_grace.millis(),
        suspended: spec.suspend,
        pause_requests: recovery.pause_requests.clone(),
        storm,
        dry_run,
    }
}

/// A step's action.
pub const fn action(spec: api::StepAction) -> Action {
    Action::ALL[spec as usize]
}

/// The reverse of [`action`].
pub const fn step_action(action: Action) -> api::StepAction {
    api::StepAction::ALL[action as usize]
}

// The API and the decision have the same actions, by name and in the same order. Otherwise this does not compile.
const _: () = {
    assert!(Action::ALL.len() == api::StepAction::ALL.len());
    let mut index = 0;
    while index < Action::ALL.len() {
        assert!(is_same(Action::ALL[index].as_str(), api::StepAction::ALL[index].as_str()));
        index += 1;
    }
};

const fn is_same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut index = 0;
    while index < one.len() && index < other.len() {
        if one[index] != other[index] {
            return false;
        }
        index += 1;
    }
    one.len() == other.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_of_the_api_is_one_of_the_decision() {
        for step in api::StepAction::ALL {
            assert_eq!(action(*step).as_str(), step.as_str());
            assert_eq!(step_action(action(*step)), *step);
        }
    }
}
