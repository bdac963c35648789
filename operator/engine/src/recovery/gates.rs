//! The gates that an action has to pass, in the order in which a person would want to hear of them.

use super::{
    ladder::{later, later_by},
    model::{Action, CheckState, History, MAX_AHEAD, Outcome, Record, Settings, Step, Withheld},
    rollout,
    view::View,
};
use jiff::Timestamp;
use std::collections::BTreeSet;

/// What holds an action back. The names are the condition's reasons; each has a runbook page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Gate {
    /// The policy is suspended.
    Suspended,
    /// People want no recovery to begin for now.
    Paused,
    /// Nothing is to be done to the pod.
    Excluded,
    /// The caches have heard nothing for too long: what they show may have changed since.
    ObserverStale,
    /// The pod was never ready, or is too young to be taken away.
    StartingUp,
    /// The workload is being rolled out; its pods are expected to come and go.
    RolloutInProgress,
    /// The dependency behind the check fails for most pods, so the pods are not the cause.
    DependencyIsTheCause,
    /// The last ladder for this subject ended a moment ago.
    Cooldown,
    /// So much was done in the namespace that it must have one cause, which recovery does not find.
    StormActive,
    /// All pods look broken: then the observer is the likelier cause.
    AllPodsUnhealthy,
    /// More pods are unhealthy than may be for one of them to be restarted.
    TooManyUnhealthy,
    /// The policy's actions are used up.
    BudgetExhausted,
    /// As many actions as are allowed at once are under way.
    OneStepAtATime,
    /// There is no rollout that may be undone.
    RollbackRefused,
    /// This version cannot execute the action.
    ActionNotSupported,
}

/// An action that would be taken now.
pub(super) struct Proposal<'a> {
    pub(super) check: &'a CheckState,
    pub(super) step: &'a Step,
    /// It follows a step that did not help: the same ladder goes on.
    pub(super) escalates: bool,
}

/// A gate's answer when it is closed: why, and until when.
pub(super) type Closed = Option<(String, Option<Timestamp>)>;

/// The first gate that is closed for an action, a new one or one that is asked for again (it is part of a ladder that goes
/// on, and the caller takes it out of the history first). Dry-run is not among them: it comes after all of them, where the
/// action is recorded and not executed.
pub(super) fn first_closed(
    settings: &Settings,
    observed: &View<'_>,
    history: &History,
    proposal: &Proposal<'_>,
    now: Timestamp,
) -> Option<Withheld> {
    let cooldown = (Gate::Cooldown, cooldown(settings, observed, history, proposal, now));
    let paused = (Gate::Paused, paused(settings, observed, proposal));
    let excluded = (Gate::Excluded, excluded(observed, proposal));
    let storm = (Gate::StormActive, storm(settings, observed, history, now));
    let budget = (Gate::BudgetExhausted, budget(settings, history, now));
    let one = (Gate::OneStepAtATime, one_at_a_time(settings, history, proposal));
    let [suspended, stale, starting, rollout, dependency, supported, all, many] =
        always(settings, observed, history, proposal, now);
    let refused = (Gate::RollbackRefused, rollout::refused(settings, observed, history, proposal, now));
    let first = [suspended, paused, excluded, stale, starting, rollout, dependency, supported, refused];
    named(first, proposal).or_else(|| named([cooldown, storm, budget, all, many, one], proposal))
}

/// The first gate that is closed for what a person asks for: those that protect others. What the person knows better (what
/// the cause is, that a rollout is under way or recovery is paused, that it was tried a moment ago) holds nothing back.
pub(super) fn first_closed_by_hand(
    settings: &Settings,
    observed: &View<'_>,
    history: &History,
    proposal: &Proposal<'_>,
    now: Timestamp,
) -> Option<Withheld> {
    let budget = (Gate::BudgetExhausted, budget(settings, history, now));
    let one = (Gate::OneStepAtATime, one_at_a_time(settings, history, proposal));
    let [_, stale, _, (rolling_out, why), _, supported, _, many] = always(settings, observed, history, proposal, now);
    // Within a rollout, a restart of all pods would be one more rollout.
    let rollout = (rolling_out, why.filter(|_| proposal.step.action == Action::RolloutRestart));
    let refused = (Gate::RollbackRefused, rollout::refused_by_hand(observed, proposal));
    named([stale, rollout, supported, refused, many, budget, one], proposal)
}

fn named<const N: usize>(gates: [(Gate, Closed); N], proposal: &Proposal<'_>) -> Option<Withheld> {
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

/// The gates that hold whenever an action is about to be executed.
fn always(
    settings: &Settings,
    observed: &View<'_>,
    history: &History,
    proposal: &Proposal<'_>,
    now: Timestamp,
) -> [(Gate, Closed); 8] {
    let action = proposal.step.action;
    let unhealthy = action.disrupts().then(|| Unhealthy::count(observed, history, proposal));
    // The more pods a rollout breaks, the more it has to be undone; the pods that serve are not touched before others do.
    let counted = unhealthy.as_ref().filter(|_| action != Action::Rollback);
    [
        (Gate::Suspended, suspended(settings)),
        (Gate::ObserverStale, observer_stale(observed)),
        (Gate::StartingUp, starting_up(settings, observed, proposal, now)),
        (Gate::RolloutInProgress, rolling_out(observed, proposal)),
        (Gate::DependencyIsTheCause, dependency(observed, proposal)),
        (Gate::ActionNotSupported, supported(observed, proposal)),
        (Gate::AllPodsUnhealthy, unhealthy.as_ref().and_then(|unhealthy| unhealthy.suspect(proposal))),
        (Gate::TooManyUnhealthy, counted.and_then(|unhealthy| unhealthy.too_many(settings))),
    ]
}

/// How the pods of a workload are, before one of them is taken away.
struct Unhealthy {
    /// Pods that it is to have.
    wanted: usize,
    /// Pods that it has.
    pods: usize,
    /// A check of theirs fails, the kubelet does not call them ready, or they were not heard yet.
    broken: usize,
    /// Others that are recovering.
    recovering: usize,
}

impl Unhealthy {
    fn count(view: &View<'_>, history: &History, proposal: &Proposal<'_>) -> Self {
        let target = proposal.check.subject.target.as_str();
        let broken = view.broken_pods(target);
        // What is being done is little, however many pods there are.
        let under_recovery = history.in_flight.iter().filter(|record| record.subject.target == target);
        let under_recovery = under_recovery.filter_map(|record| Some(record.subject.pod.as_ref()?.uid.as_str()));
        // The pod that is to be taken away may be well: a person asks for it.
        let own = proposal.check.subject.pod.as_ref().map(|pod| pod.uid.as_str());
        let under_recovery = under_recovery.chain(own);
        let more: BTreeSet<_> =
            under_recovery.filter(|uid| !broken.contains(uid) && view.pods.contains_key(*uid)).collect();
        let pods = view.pods_of(target);
        let wanted = view.wanted.get(target).copied().unwrap_or(pods);
        let at_once = view.rollouts.get(target).is_some_and(|rollout| rollout.recreates);
        let all = at_once && proposal.step.action.replaces_all();
        Self { wanted, pods, broken: broken.len(), recovering: if all { pods - broken.len() } else { more.len() } }
    }

    /// Whether the observer is the likelier cause.
    fn suspect(&self, proposal: &Proposal<'_>) -> Closed {
        // A network that only the operator cannot reach is a failure of the operator.
        let alone = proposal.check.asked && proposal.check.subject.pod.is_none() && self.broken == 0;
        let why = || {
            let check = &proposal.check.subject.check;
            format!(
                "no pod is unhealthy, and only the operator's own asking for {check} fails; no pod is taken away for it"
            )
        };
        alone.then(|| (why(), None)).or_else(|| self.all())
    }

    fn all(&self) -> Closed {
        (self.wanted.max(self.pods) >= 3 && self.broken == self.pods).then(|| {
            let message = format!(
                "all {} pods look broken, are missing or were not heard yet, so the observer is the likelier cause; no pod is restarted for it",
                self.wanted
            );
            (message, None)
        })
    }

    fn too_many(&self, settings: &Settings) -> Closed {
        let allowed = settings.limits.max_unhealthy.of(self.wanted);
        // What serves is counted, so that a pod that is missing and one that was made beside it count once. Whatever is
        // restarted counts in any case.
        let well = self.pods.saturating_sub(self.broken + self.recovering);
        let unhealthy = self.wanted.saturating_sub(well).max(1);
        (unhealthy > allowed).then(|| {
            let message = format!(
                "{unhealthy} of {} pods are unhealthy, recovering, missing or not heard yet, and maxUnhealthy allows {allowed}; no pod is restarted",
                self.wanted
            );
            (message, None)
        })
    }
}

fn suspended(settings: &Settings) -> Closed {
    settings
        .suspended
        .then(|| ("the policy is suspended; it waits for a person to set spec.suspend to false".to_owned(), None))
}

fn paused(settings: &Settings, observed: &View<'_>, proposal: &Proposal<'_>) -> Closed {
    let target = &proposal.check.subject.target;
    let on_it = observed.paused.get(target).map(|why| format!("the workload is paused: {why}"));
    let why = on_it.or_else(|| settings.pause_requests.first().map(|why| format!("the policy is paused: {why}")))?;
    Some((format!("{why}; it waits for a person to take that back"), None))
}

fn excluded(observed: &View<'_>, proposal: &Proposal<'_>) -> Closed {
    let pod = proposal.check.subject.pod.as_ref()?;
    let why = || (format!("the label of {} excludes it; nothing is done to it", pod.name), None);
    observed.excluded.contains(&pod.uid).then(why)
}

fn storm(settings: &Settings, observed: &View<'_>, history: &History, now: Timestamp) -> Closed {
    if settings.dry_run {
        return None;
    }
    // What this very decision has begun is not in the namespace's ledger yet.
    let just_now = history.in_flight.iter().filter(|record| record.started_at == now && record.executed_at.is_none());
    let begun: Vec<_> =
        observed.begun_in_namespace.iter().copied().chain(just_now.map(|record| record.started_at)).collect();
    let until = settings.storm.until(&begun, now)?;
    let (actions, seconds) = (settings.storm.actions, settings.storm.interval_ms / 1_000);
    Some((
        format!(
            "{actions} actions were begun in this namespace within {seconds} s: what fails has one cause, which recovery does not find"
        ),
        Some(until),
    ))
}

fn observer_stale(observed: &View<'_>) -> Closed {
    let why = observed.observer_stale.as_ref()?;
    Some((format!("{why}; nothing is done on a view that old, and recovery goes on when it is fresh again"), None))
}

/// What fails in a pod that was never ready is that it starts slowly, or not at all: nothing that is done to it helps it to.
fn starting_up(settings: &Settings, observed: &View<'_>, proposal: &Proposal<'_>, now: Timestamp) -> Closed {
    let pod = proposal.check.subject.pod.as_ref()?;
    let facts = observed.pods.get(&pod.uid)?;
    if proposal.step.action == Action::Rollback {
        // That the pods of a rollout never become ready is what it is for.
        return None;
    }
    if !facts.was_ready {
        return Some((format!("{} was never ready: it is starting up; nothing is done to it before", pod.name), None));
    }
    // Clocks differ, but not by so much.
    let until = later(facts.created_at, settings.startup_grace_ms);
    let young = proposal.step.action.disrupts() && facts.created_at <= later_by(now, MAX_AHEAD) && now < until;
    young.then(|| {
        let grace = settings.startup_grace_ms / 1000;
        let why = format!("{} is younger than {grace} s (startupGrace), and no pod is taken away before", pod.name);
        (why, Some(until))
    })
}

fn rolling_out(observed: &View<'_>, proposal: &Proposal<'_>) -> Closed {
    if proposal.step.action == Action::Rollback {
        // The rollout is what it ends.
        return None;
    }
    let target = &proposal.check.subject.target;
    observed
        .rolling_out
        .contains(target)
        .then(|| (format!("{target} is being rolled out; recovery goes on when that is over"), None))
}

fn dependency(observed: &View<'_>, proposal: &Proposal<'_>) -> Closed {
    let dependency = proposal.check.dependency.clone()?;
    let outage = observed.bad_dependencies.get(&(proposal.check.subject.target.clone(), dependency))?;
    // One that was away and has come back: what the pod says is that it notices.
    let notices = outage.away && outage.over;
    if dependency_answers(proposal) && !notices {
        return None;
    }
    Some((format!("{}, so the pods are not the cause; nothing is done to them", outage.evidence), None))
}

/// A fresh connection answers, whatever circuits say: what the pod keeps is broken, and giving that up is right in all pods.
fn dependency_answers(proposal: &Proposal<'_>) -> bool {
    proposal.check.dependency_answers == Some(true)
}

fn supported(observed: &View<'_>, proposal: &Proposal<'_>) -> Closed {
    let action = proposal.step.action;
    let rollout = observed.rollouts.get(&proposal.check.subject.target).filter(|_| action.replaces_all());
    if let Some(why) = rollout.and_then(|rollout| rollout.held.as_ref()) {
        return Some((format!("{action} would replace no pod: {why}; it waits for a person"), None));
    }
    (action.needs_pod() && proposal.check.subject.pod.is_none()).then(|| {
        (format!("{action} is done to a pod, but this check is of scope Workload; it waits for a person"), None)
    })
}

fn cooldown(
    settings: &Settings,
    observed: &View<'_>,
    history: &History,
    proposal: &Proposal<'_>,
    now: Timestamp,
) -> Closed {
    let last = history
        .of_kind(settings.dry_run)
        // The steps of one ladder follow each other at once, unless a person took one of them back.
        .filter(|record| record.withdrawn || !proposal.escalates)
        // Nothing was done that had to show its effect.
        .filter(|record| !record.by_hand || record.executed_at.is_some())
        .filter(|record| record.outcome != Outcome::Cancelled || record.executed_at.is_some() || record.withdrawn)
        // A pod that took the place of another has its past, or a pod could be restarted over and over.
        .filter(|record| {
            record.subject == proposal.check.subject || super::ladder::succeeds(record, proposal.check, observed)
        })
        .map(|record| record.finished_at.unwrap_or(record.started_at))
        .max()?;
    let until = later(last, settings.limits.cooldown_ms);
    (now < until).then(|| {
        ("the last recovery of this check ended a moment ago; it waits for the cooldown".to_owned(), Some(until))
    })
}

/// When each action of the budget's interval leaves it, soonest first.
fn spent(settings: &Settings, history: &History, now: Timestamp) -> Vec<Timestamp> {
    let mut ends: Vec<_> = history
        .of_kind(settings.dry_run)
        // What a person waits for has done nothing yet.
        .filter(|record| !record.by_hand || record.executed_at.is_some())
        .map(|record| later(record.executed_at.unwrap_or(record.started_at), settings.limits.budget_interval_ms))
        .filter(|end| now < *end)
        .collect();
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

/// Most actions in flight, those that wait too: the ledger of a workload is bounded.
const MAX_IN_FLIGHT: usize = 100;

fn one_at_a_time(settings: &Settings, history: &History, proposal: &Proposal<'_>) -> Closed {
    // What waits for leave to begin does nothing meanwhile, and must not keep milder help from others.
    let busy = || history.in_flight.iter().filter(|record| record.outcome != Outcome::Waiting);
    // An action for this pod, or a restart that is judged by it.
    let uid = proposal.check.subject.pod.as_ref().map(|pod| &pod.uid);
    let concerns =
        |record: &&Record| record.subject.pod.as_ref().map(|pod| &pod.uid) == uid || record.successor.as_ref() == uid;
    if let Some(record) = uid.and_then(|_| busy().find(concerns)) {
        let (name, action, check) = (record.subject.display_name(), record.step.action, &record.subject.check);
        let for_check = if check.is_empty() { String::new() } else { format!(" for {check}") };
        return Some((format!("{action} of {name}{for_check} is under way"), None));
    }
    // Beside what replaces all pods of a workload, nothing else is done to it.
    let target = &proposal.check.subject.target;
    let of_all = proposal.step.action.replaces_all();
    let beside = |record: &&Record| record.subject.target == *target && (of_all || record.step.action.replaces_all());
    if let Some(record) = busy().find(beside) {
        let (name, action) = (record.subject.display_name(), record.step.action);
        return Some((format!("{action} of {name} is under way"), None));
    }
    let busy: Vec<_> = busy().map(|record| record.subject.display_name()).collect();
    let own = history.in_flight.iter().filter(|record| !(record.by_hand && record.outcome == Outcome::Waiting));
    if own.count() >= MAX_IN_FLIGHT {
        return Some((format!("{MAX_IN_FLIGHT} actions are in flight, and no policy has more"), None));
    }
    if dependency_answers(proposal) && !proposal.step.action.disrupts() {
        // It takes nothing away, and what hangs in one pod hangs in all of them: it is done at once.
        return None;
    }
    (busy.len() >= settings.limits.max_in_flight.max(1))
        .then(|| (format!("recovery of {} is under way", busy.join(", ")), None))
}
