//! The health checks of booking: `database`, `schema`, `memory`, `booking-consistency`, `buyer-limits`.

use super::DATABASE;
use super::seats::{self, Overview};
use crate::checks;
use crate::database::{self, Database};
use crate::schema::{BUYER_INDEXES, Schema};
use contract::CheckStatus;
use resilience::clock::in_words;
use resilience::{Check, CheckOutcome};
use serde_json::json;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

/// All checks, not running yet.
pub fn all(database: &Arc<Database>, schema: &Schema) -> [Check; 5] {
    let consistency = Arc::new(Consistency { database: Arc::clone(database), known: Mutex::default() });
    [
        database::check(database, DATABASE),
        schema.check(DATABASE),
        checks::memory(),
        Check::new("booking-consistency", &["business"], move |settings| {
            let consistency = Arc::clone(&consistency);
            async move { consistency.compare(Duration::from_millis(settings.timeout_ms) * 8 / 10).await }
        })
        .dependency(DATABASE)
        // Without an answer nothing is known of the events; that the database is silent is for its own check to say.
        .when_unanswered(CheckStatus::Unknown),
        buyer_limits(schema),
    ]
}

/// `buyer-limits`: whether buyers are counted. Without the indexes for it each order would read all bookings, so orders do not
/// wait for them, and nothing is limited meanwhile.
fn buyer_limits(schema: &Schema) -> Check {
    let schema = schema.clone();
    Check::new("buyer-limits", &["business"], move |_| {
        let outcome = if schema.has(BUYER_INDEXES) {
            CheckOutcome::new(CheckStatus::Healthy, "the limits of buyers are kept")
        } else {
            let message = format!(
                "no limit of a buyer is kept before step {BUYER_INDEXES} (buyers: indexes) is done; the check schema says \
                 how far that is"
            );
            CheckOutcome::new(CheckStatus::Degraded, message)
        };
        async move { outcome }
    })
}

/// Events that one run compares, as long as that is quick enough.
const AT_ONCE: usize = 200;
/// Changed events that one overview lists: the rest of a larger change is left to its turn.
const MAX_CHANGED: i64 = 20_000;
/// Events that are known not to add up, or to take too long, at most: others are found again in turn.
const MAX_KNOWN: usize = 1_000;

/// Compares free with sold seats, some events in each run: all that did not add up before, all that were changed, and
/// others in turn. They wait in one queue, and nothing is added before it is empty, so each has its turn.
struct Consistency {
    database: Arc<Database>,
    known: Mutex<Known>,
}

/// What is known from one run to the next.
struct Known {
    /// From where on changes are unknown.
    since: Option<String>,
    /// The last event that had its turn.
    behind: Uuid,
    /// Events that are to be compared.
    queue: VecDeque<Uuid>,
    /// Events that did not add up when they were last compared.
    wrong: BTreeSet<Uuid>,
    /// Events that even alone took too long.
    slow: BTreeSet<Uuid>,
    /// Events that the next run compares.
    at_once: usize,
}

impl Default for Known {
    fn default() -> Self {
        let (since, queue, wrong, slow) = Default::default();
        Self { since, behind: Uuid::nil(), queue, wrong, slow, at_once: AT_ONCE }
    }
}

impl Known {
    fn wanted(&self) -> seats::Wanted<'_> {
        let more = self.queue.is_empty();
        seats::Wanted {
            since: self.since.as_deref(),
            changed: if more { MAX_CHANGED } else { 0 },
            behind: self.behind,
            in_turn: if more { i64::try_from(AT_ONCE).unwrap_or(i64::MAX) } else { 0 },
        }
    }

    /// Fills the queue if it is empty.
    fn add(&mut self, overview: Overview) {
        if !self.queue.is_empty() {
            return;
        }
        let Overview { changed, in_turn, since, .. } = overview;
        self.since = since;
        // Behind the last one, it begins again with the first.
        self.behind = in_turn.last().copied().unwrap_or_default();
        let mut added = BTreeSet::new();
        // What takes too long is tried again in its turn, not each time it changes.
        let changed = changed.into_iter().filter(|event| !self.slow.contains(event));
        let all = self.wrong.iter().copied().chain(changed).chain(in_turn);
        self.queue.extend(all.filter(|event| added.insert(*event)));
    }

    /// The events that are compared now.
    fn next(&self) -> Vec<Uuid> {
        self.queue.iter().take(self.at_once).copied().collect()
    }

    fn compared(&mut self, events: &[Uuid], wrong: &[Uuid]) {
        self.queue.drain(..events.len().min(self.queue.len()));
        for event in events {
            self.wrong.remove(event);
            self.slow.remove(event);
        }
        for event in wrong {
            remember(&mut self.wrong, *event);
        }
        self.at_once = (self.at_once * 2).min(AT_ONCE);
    }

    /// Takes fewer the next time; one that takes too long alone is passed over.
    fn took_too_long(&mut self, events: &[Uuid]) {
        if let [event] = events {
            self.queue.pop_front();
            remember(&mut self.slow, *event);
        } else {
            self.at_once = (events.len() / 4).max(1);
        }
    }
}

fn remember(events: &mut BTreeSet<Uuid>, event: Uuid) {
    if events.len() < MAX_KNOWN {
        events.insert(event);
    }
}

impl Consistency {
    /// Compares some events, for no longer than `time`.
    async fn compare(&self, time: Duration) -> CheckOutcome {
        let mut known = self.known.lock().await;
        // The overview and the comparison have the same time each.
        let time = time / 2;
        let wanted = known.wanted();
        let overview = self.database.attempt(async |connection| seats::overview(&connection, wanted, time).await).await;
        let expired_holds = match overview {
            Ok(overview) => {
                let expired_holds = overview.expired_holds;
                known.add(overview);
                expired_holds
            }
            Err(error) => return known.outcome(None, 0, Some(format!("failed to read the events: {error}"))),
        };
        let events = known.next();
        let compared = self.database.attempt(async |connection| seats::compare(&connection, &events, time).await).await;
        let trouble = match compared {
            Ok(wrong) => {
                known.compared(&events, &wrong);
                None
            }
            Err(error) if error.sql_state() == Some(&SqlState::QUERY_CANCELED) => {
                known.took_too_long(&events);
                Some(format!("comparing {} events was given up after {}", events.len(), in_words(time)))
            }
            Err(error) => Some(format!("failed to compare seats with bookings: {error}")),
        };
        known.outcome(Some(expired_holds), events.len(), trouble)
    }
}

impl Known {
    /// What is known stays known while there is trouble.
    fn outcome(&self, expired_holds: Option<i64>, compared: usize, trouble: Option<String>) -> CheckOutcome {
        let (wrong, slow) = (self.wrong.len(), self.slow.len());
        let status = if wrong > 0 || expired_holds.is_some_and(|holds| holds > 0) {
            CheckStatus::Unhealthy
        } else if slow > 0 {
            CheckStatus::Degraded
        } else if trouble.is_some() {
            CheckStatus::Unknown
        } else {
            CheckStatus::Healthy
        };
        let said = [
            Some(format!("{wrong} events do not add up")),
            expired_holds.map(|holds| format!("{holds} expired reservations still hold seats")),
            Some(format!("{slow} events take too long to be compared")).filter(|_| slow > 0),
            trouble,
        ];
        let message = said.into_iter().flatten().collect::<Vec<_>>().join("; ");
        let outcome = CheckOutcome::new(status, message)
            .with("wrongEvents", json!(wrong))
            .with("slowEvents", json!(slow))
            .with("eventsCompared", json!(compared));
        match expired_holds {
            Some(holds) => outcome.with("expiredHolds", json!(holds)),
            None => outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(range: std::ops::Range<u128>) -> Vec<Uuid> {
        range.map(Uuid::from_u128).collect()
    }

    fn overview(changed: Vec<Uuid>, in_turn: Vec<Uuid>) -> Overview {
        Overview { expired_holds: 0, changed, in_turn, since: Some("7".to_owned()) }
    }

    /// Compares as the check does, with a server on which these are wrong and these take too long; the answer is how each
    /// run ended.
    fn runs(known: &mut Known, events: &[Uuid], wrong: &[Uuid], slow: &[Uuid], count: usize) -> Vec<CheckStatus> {
        let run = |_| {
            let behind = known.behind;
            let in_turn = events.iter().filter(|event| **event > behind).take(AT_ONCE).copied().collect();
            known.add(overview(Vec::new(), in_turn));
            let next = known.next();
            if next.iter().any(|event| slow.contains(event)) {
                known.took_too_long(&next);
                known.outcome(Some(0), next.len(), Some("given up".to_owned())).status()
            } else {
                let found: Vec<_> = next.iter().filter(|event| wrong.contains(event)).copied().collect();
                known.compared(&next, &found);
                known.outcome(Some(0), next.len(), None).status()
            }
        };
        (0..count).map(run).collect()
    }

    /// It was unknown for ever as soon as more events were wrong than one run could compare.
    #[test]
    fn many_wrong_events_stay_known_and_are_forgotten_once_they_are_repaired() {
        let (events, mut known) = (ids(1..3_000), Known::default());
        runs(&mut known, &events, &events, &[], 40);
        assert_eq!(known.wrong.len(), MAX_KNOWN);
        let statuses = runs(&mut known, &events, &events, &events[..50], 40);
        assert!(statuses.iter().all(|status| *status == CheckStatus::Unhealthy), "{statuses:?}");
        let statuses = runs(&mut known, &events, &[], &[], 60);
        assert_eq!((statuses.last(), known.wrong.len()), (Some(&CheckStatus::Healthy), 0));
    }

    /// One event that took too long kept all behind it from their turn.
    #[test]
    fn an_event_that_takes_too_long_is_passed_over() {
        let (events, mut known) = (ids(1..1_000), Known::default());
        let (slow, wrong) = (&events[100..101], &events[900..901]);
        let statuses = runs(&mut known, &events, wrong, slow, 40);
        assert_eq!(statuses.last(), Some(&CheckStatus::Unhealthy));
        assert_eq!((known.wrong.len(), known.slow.len()), (1, 1));
        runs(&mut known, &events, &[], slow, 40);
        assert_eq!(known.outcome(Some(0), 0, None).status(), CheckStatus::Degraded, "it is not hidden");
    }

    /// Of many that were changed at once, those past the limit of one run were skipped.
    #[test]
    fn all_changed_events_are_compared_before_the_next_overview() {
        let (events, mut known) = (ids(1..1_001), Known::default());
        known.add(overview(events.clone(), ids(5_000..5_001)));
        let mut compared = BTreeSet::new();
        while !known.queue.is_empty() {
            assert_eq!(known.wanted().changed, 0);
            let next = known.next();
            compared.extend(next.iter().copied());
            known.compared(&next, &[]);
        }
        assert!(events.iter().all(|event| compared.contains(event)));
        assert_eq!(known.wanted().since, Some("7"));
    }
}
