//! The gates that an action has to pass, in the order in which a person would want to hear of them.

use super::{
    ladder::millis,
    model::{CheckState, History, Observed, Settings, Step, Withheld},
};
use jiff::Timestamp;

/// What holds an action back. The names are the condition's reasons; each has a runbook page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// The policy is suspended.
    Suspended,
    /// The workload is being rolled out; its pods are expected to come and go.
    RolloutInProgress,
    /// The dependency behind the check fails for most pods, so the pods are not the cause.
    DependencyIsTheCause,
    /// The last ladder for this subject ended a moment ago.
    Cooldown,
    /// The policy's actions are used up.
    BudgetExhausted,
    /// As many actions as are allowed at once are under way.
    OneStepAtATime,
    /// This version cannot carry the action out.
    ActionNotSupported,
}

impl Gate {
    /// One CamelCase word.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Suspended => "Suspended",
            Self::RolloutInProgress => "RolloutInProgress",
            Self::DependencyIsTheCause => "DependencyIsTheCause",
            Self::Cooldown => "Cooldown",
            Self::BudgetExhausted => "BudgetExhausted",
            Self::OneStepAtATime => "OneStepAtATime",
            Self::ActionNotSupported => "ActionNotSupported",
        }
    }
}

/// An action that would be taken now.
pub(super) struct Proposal<'a> {
    pub(super) check: &'a CheckState,
    pub(super) step: &'a Step,
    /// It follows a rung that did not help: the same ladder goes on.
    pub(super) escalates: bool,
}

/// A gate's answer when it is closed: why, and until when.
type Closed = Option<(String, Option<Timestamp>)>;

/// The first gate that is closed. Dry-run is not among them: it comes after all of them, where the action is recorded
/// and not carried out.
pub(super) fn first_closed(
    settings: &Settings,
    observed: &Observed,
    history: &History,
    proposal: &Proposal<'_>,
    now: Timestamp,
) -> Option<Withheld> {
    let gates: [(Gate, Closed); 7] = [
        (Gate::Suspended, suspended(settings)),
        (Gate::RolloutInProgress, rollout(observed, proposal)),
        (Gate::DependencyIsTheCause, dependency(observed, proposal)),
        (Gate::ActionNotSupported, supported(observed, proposal)),
        (Gate::Cooldown, cooldown(settings, history, proposal, now)),
        (Gate::BudgetExhausted, budget(settings, history, now)),
        (Gate::OneStepAtATime, one_at_a_time(settings, history)),
    ];
    gates.into_iter().find_map(|(gate, closed)| {
        closed.map(|(message, until)| Withheld {
            subject: proposal.check.subject.clone(),
            action: proposal.step.action,
            gate,
            message,
            until,
        })
    })
}

fn suspended(settings: &Settings) -> Closed {
    settings
        .suspended
        .then(|| ("the policy is suspended; it waits for a person to set spec.suspend to false".to_owned(), None))
}

fn rollout(observed: &Observed, proposal: &Proposal<'_>) -> Closed {
    let target = &proposal.check.subject.target;
    observed
        .rolling_out
        .contains(target)
        .then(|| (format!("{target} is being rolled out; recovery goes on when that is over"), None))
}

fn dependency(observed: &Observed, proposal: &Proposal<'_>) -> Closed {
    let subject = &proposal.check.subject;
    let dependency = proposal.check.dependency.clone()?;
    let pods = observed.open_on_quorum.get(&(subject.target.clone(), dependency.clone()))?;
    Some((
        format!(
            "the circuit of {dependency} is open in {pods}, so the pods are not the cause; nothing is done to them"
        ),
        None,
    ))
}

fn supported(observed: &Observed, proposal: &Proposal<'_>) -> Closed {
    let action = proposal.step.action;
    let pod_action = matches!(action, super::Action::TrimMemory | super::Action::ResetConnections);
    if !observed.supported.contains(&action) {
        return Some((format!("this version of the operator cannot do {action:?}; it waits for a person"), None));
    }
    (pod_action && proposal.check.subject.pod.is_none()).then(|| {
        (format!("{action:?} is done by a pod, but this check is of scope Workload; it waits for a person"), None)
    })
}

fn cooldown(settings: &Settings, history: &History, proposal: &Proposal<'_>, now: Timestamp) -> Closed {
    if proposal.escalates {
        return None;
    }
    let last = history
        .of_kind(settings.dry_run)
        .filter(|record| record.subject == proposal.check.subject)
        .map(|record| record.finished_at.unwrap_or(record.started_at))
        .max()?;
    let until = last + millis(settings.limits.cooldown_ms);
    (now < until).then(|| {
        ("the last recovery of this check ended a moment ago; it waits for the cooldown".to_owned(), Some(until))
    })
}

/// When each action of the budget's interval leaves it, soonest first.
fn spent(settings: &Settings, history: &History, now: Timestamp) -> Vec<Timestamp> {
    let interval = millis(settings.limits.budget_interval_ms);
    let mut ends: Vec<_> =
        history.of_kind(settings.dry_run).map(|record| record.started_at + interval).filter(|end| now < *end).collect();
    ends.sort_unstable();
    ends
}

/// Actions that may still be begun.
pub(super) fn remaining_budget(settings: &Settings, history: &History, now: Timestamp) -> usize {
    settings.limits.budget_actions.saturating_sub(spent(settings, history, now).len())
}

fn budget(settings: &Settings, history: &History, now: Timestamp) -> Closed {
    let allowed = settings.limits.budget_actions;
    let spent = spent(settings, history, now);
    let over = (spent.len() + 1).checked_sub(allowed).filter(|over| *over > 0)?;
    let until = spent.get(over - 1).copied();
    Some((format!("{} of {allowed} actions are used up; look at why so many were needed", spent.len()), until))
}

fn one_at_a_time(settings: &Settings, history: &History) -> Closed {
    let busy: Vec<_> = history.in_flight.iter().map(|record| record.subject.display_name()).collect();
    (busy.len() >= settings.limits.max_in_flight.max(1))
        .then(|| (format!("recovery of {} is under way", busy.join(", ")), None))
}
