//! What to tell of a Recovery: on the object itself, and on its policy. Pure.

use super::object::name_of;
use crate::kubernetes::events::Event;
use crds::EventReason;
use engine::recovery::{History, Outcome, Record};

/// What stands before the end of a log in a message. Only the Recovery itself has that: fewer people may read it.
pub const LOG_FOLLOWS: &str = "; its log ends: ";

/// A message without the end of a log.
pub fn without_log(message: &str) -> &str {
    message.split_once(LOG_FOLLOWS).map_or(message, |(words, _)| words)
}

/// An action was decided.
pub fn started(record: &Record) -> Event {
    let (subject, action) = (record.subject.display_name(), record.step.action.as_str());
    let dry = if record.dry_run { " (dry run: nothing is done)" } else { "" };
    if record.by_hand {
        return Event::normal(
            EventReason::RecoveryStarted,
            action,
            format!("{subject}: {action}, asked for by a person"),
        );
    }
    let (check, step, steps) = (&record.subject.check, record.index + 1, record.steps);
    let name = name_of(record);
    let note = format!("{subject}: {action} for {check} (step {step} of {steps}, recovery {name}){dry}");
    Event::normal(EventReason::RecoveryStarted, action, note)
}

/// It was refused for now.
pub fn refused(record: &Record) -> Event {
    let (subject, action) = (record.subject.display_name(), record.step.action.as_str());
    let note = format!("{subject}: {action} waits: {}", record.message.as_deref().unwrap_or_default());
    Event::warning(EventReason::RecoveryRefused, "Wait", note)
}

/// What waits after an attempt and did not wait before.
pub fn newly_refused<'a>(before: &'a History, after: &'a History) -> impl Iterator<Item = &'a Record> {
    let waits = |record: &&Record| record.outcome == Outcome::Waiting;
    let waited = move |id: &str| before.in_flight.iter().filter(waits).any(|record| record.id == id);
    after.in_flight.iter().filter(waits).filter(move |record| !waited(&record.id))
}

/// It is over.
pub fn finished(record: &Record) -> Event {
    let (subject, action) = (record.subject.display_name(), record.step.action.as_str());
    let for_check =
        if record.subject.check.is_empty() { String::new() } else { format!(" for {}", record.subject.check) };
    let dry = if record.dry_run { " (dry run)" } else { "" };
    let said = without_log(record.message.as_deref().unwrap_or_default());
    let note = format!("{subject}: {action}{for_check}{dry}: {said}");
    match record.outcome {
        Outcome::Succeeded => Event::normal(EventReason::RecoverySucceeded, action, note),
        Outcome::Cancelled => Event::normal(EventReason::RecoveryCancelled, action, note),
        _ => Event::warning(EventReason::RecoveryFailed, action, note),
    }
}
