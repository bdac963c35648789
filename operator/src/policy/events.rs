//! What to tell of a policy, from what changed in its status. Pure.

use crate::{kubernetes::events::Event, recovery::events as of_recovery, status::conditions::find};
use crds::{Condition, ConditionStatus, ConditionType, EventReason, ResiliencePolicyStatus, status::CircuitStatus};
use engine::recovery::{Decision, Record};

/// The events, in the order in which they happened.
pub fn policy_events(
    old: &ResiliencePolicyStatus,
    new: &ResiliencePolicyStatus,
    begun: &[Record],
    decision: &Decision,
    live: String,
) -> Vec<Event> {
    let mut events = Vec::new();
    events.extend(accepted(old, new));
    events.extend(programmed(old, new, live));
    events.extend(circuits(old, new));
    events.extend(unhealthy(old, new));
    events.extend(decision.finished.iter().map(of_recovery::finished));
    events.extend(begun.iter().map(of_recovery::started));
    events.extend(withheld(old, new));
    events
}

/// The reason of a condition, if it is news.
fn news<'a>(
    old: &ResiliencePolicyStatus,
    new: &'a ResiliencePolicyStatus,
    type_: ConditionType,
) -> Option<&'a Condition> {
    let after = find(&new.conditions, type_)?;
    let before = find(&old.conditions, type_);
    (before.map(|before| (&before.reason, before.status)) != Some((&after.reason, after.status))).then_some(after)
}

fn accepted(old: &ResiliencePolicyStatus, new: &ResiliencePolicyStatus) -> Option<Event> {
    let condition =
        news(old, new, ConditionType::Accepted).filter(|condition| condition.status == ConditionStatus::False)?;
    let (reason, action) = match condition.reason.as_str() {
        "InvalidPolicy" => (EventReason::InvalidPolicy, "Keep"),
        "Conflicted" => (EventReason::Conflicted, "Yield"),
        _ => (EventReason::TargetNotFound, "Wait"),
    };
    Some(Event::warning(reason, action, condition.message.clone()))
}

fn programmed(old: &ResiliencePolicyStatus, new: &ResiliencePolicyStatus, live: String) -> Option<Event> {
    let condition = find(&new.conditions, ConditionType::Programmed)?;
    let hashes = |status: &ResiliencePolicyStatus| {
        status.targets.iter().map(|target| target.content_hash.clone()).collect::<Vec<_>>()
    };
    match condition.reason.as_str() {
        "Programmed" if news(old, new, ConditionType::Programmed).is_some() || hashes(old) != hashes(new) => {
            Some(Event::normal(EventReason::Programmed, "Publish", live))
        }
        "ConfigMapNotOurs" if news(old, new, ConditionType::Programmed).is_some() => {
            Some(Event::warning(EventReason::ConfigMapNotOurs, "Wait", condition.message.clone()))
        }
        "ConfigTooLarge" if news(old, new, ConditionType::Programmed).is_some() => {
            Some(Event::warning(EventReason::ConfigTooLarge, "Keep", condition.message.clone()))
        }
        _ => None,
    }
}

fn circuits(old: &ResiliencePolicyStatus, new: &ResiliencePolicyStatus) -> Vec<Event> {
    let has = |status: &ResiliencePolicyStatus, one: &CircuitStatus| {
        let same = |other: &CircuitStatus| {
            (&other.kind, &other.target, &other.dependency) == (&one.kind, &one.target, &one.dependency)
        };
        status.circuits.iter().any(same)
    };
    let opened = new.circuits.iter().filter(|circuit| !has(old, circuit)).map(|circuit| {
        let note = format!(
            "{}: the circuit of {} is open in {} of {} pods",
            circuit.target, circuit.dependency, circuit.open_pods, circuit.total_pods
        );
        Event::warning(EventReason::CircuitOpened, "Observe", note)
    });
    let closed = old.circuits.iter().filter(|circuit| !has(new, circuit)).map(|circuit| {
        Event::normal(
            EventReason::CircuitClosed,
            "Observe",
            format!("{}: the circuit of {} is closed in all pods", circuit.target, circuit.dependency),
        )
    });
    opened.chain(closed).collect()
}

fn unhealthy(old: &ResiliencePolicyStatus, new: &ResiliencePolicyStatus) -> Vec<Event> {
    let mut events = Vec::new();
    for finding in &new.checks {
        let before = old
            .checks
            .iter()
            .find(|old| (&old.kind, &old.target, &old.name) == (&finding.kind, &finding.target, &finding.name));
        for pod in finding.pods.iter().filter(|pod| before.is_none_or(|before| !before.pods.contains(pod))) {
            events.push(Event::warning(
                EventReason::CheckUnhealthy,
                "Observe",
                format!("{pod}: {} fails: {}", finding.name, finding.message),
            ));
        }
        if finding.pods.is_empty() && before.is_none() {
            let note = format!("{}: {} fails: {}", finding.target, finding.name, finding.message);
            events.push(Event::warning(EventReason::CheckUnhealthy, "Observe", note));
        }
    }
    events
}

fn withheld(old: &ResiliencePolicyStatus, new: &ResiliencePolicyStatus) -> Vec<Event> {
    // What other Events tell, or what the policy itself says. That recovery is paused is told: who looks at the incident need
    // not be who has paused it.
    const QUIET: [&str; 6] = ["NoLadders", "DryRun", "OneStepAtATime", "InvalidPolicy", "Conflicted", "TargetNotFound"];
    let mut events = Vec::new();
    if let Some(condition) = news(old, new, ConditionType::RecoveryAllowed)
        && condition.status == ConditionStatus::False
        && !QUIET.contains(&condition.reason.as_str())
    {
        events.push(Event::warning(EventReason::RecoveryWithheld, "Wait", condition.message.clone()));
    }
    if let Some(condition) =
        news(old, new, ConditionType::RecoveryExhausted).filter(|condition| condition.status == ConditionStatus::True)
    {
        events.push(Event::warning(EventReason::RecoveryExhausted, "GiveUp", condition.message.clone()));
    }
    events
}
