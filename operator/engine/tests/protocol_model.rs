//! A model of the recovery protocol, explored exhaustively. The decisions in it are those of `engine::recovery::decide`;
//! around it the model has what surrounds it in a cluster, as small as it can be made:
//!
//! - **The API server** keeps the ledger: one record in each place, which is its name. It refuses to make a record in a place
//!   that is taken, and to change one that is not any more as it was read.
//! - **Two replicas of the operator** run the pass: look, decide, write each record that is new or has changed, ask for each
//!   action in turn, write what came of them. A write that is refused ends the pass. A replica whose fence is down does
//!   nothing. At most two have their fence up: in reality the Lease keeps that to one, so the model allows more than can happen.
//! - **Two subjects** fail their check, so two intents are in flight at once. A pod's process remembers the ids that it
//!   has done and refuses what is meant for another process; an eviction names the pod's uid; a Job is named by its intent.
//!   Whether something helps is open: every search follows both.
//! - **Time** reconciles in steps of half a step or of a whole one. At each of them, successors of evicted pods start and Jobs
//!   end, or not yet.
//!
//! What goes wrong, wherever it can, in every order:
//!
//! - an operator dies, between any two steps of its pass, and another one begins with no memory and without having heard
//!   any pod;
//! - an operator gives up on a call. Its request landed and the answer is lost, or it lands later, also after another
//!   operator began to lead, or never. So does what an operator sent before it died: the creation of a record, too;
//! - another operator begins to lead while the first has not noticed; it does so when time reconciles next;
//! - a pod's process starts again and forgets what it did;
//! - a disruption budget refuses an eviction;
//! - a cache lags: an operator decides from the ledger, or from the pods and Jobs, as they were before the last change;
//! - a person deletes a record, whatever state it is in.
//!
//! A search bounds how often each of these may happen, and how many may happen in all. Bugs in such protocols need few
//! faults, but in an unlucky order; so the searches have two faults of any kind, three or four of the kinds that matter most,
//! or one over a longer time. Together they end within a minute, and each asserts that it was not cut short.
//!
//! What must hold in every state: no intent takes effect twice, and no two intents do the same about one failure (but for
//! what a person deleted: that may be done once more); nothing takes effect that the
//! ledger never knew of; what the ledger had, it has, but for what a person deleted, and what was over stays over; and an
//! operator that begins to lead then ends what is in flight, asks for it, or knows when to look again. From every state in
//! which no pass is under way, one operator alone then brings all of it to its end, whether that helps, does not help, or no
//! pod is ever heard again.
//!
//! Left out, because it would only add states: gates other than the cooldown, the budget and the number in flight; a check
//! that gets well by itself or fails again; processes that do not say which they are; that the ledger forgets what is old. And
//! an operator's guard against a cache from before its own last write: without it more can go wrong, not less.
//!
//! A search that finds nothing means little unless it came across what the protocol is made for, and unless the model
//! notices when a part of the protocol is missing. So each search names situations that it must reach, and further tests
//! leave out one part each and must find what that breaks. Whatever is found is told as the shortest sequence of steps.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "protocol_model/decisions.rs"]
mod decisions;
#[path = "protocol_model/model.rs"]
mod model;
#[path = "protocol_model/properties.rs"]
mod properties;
#[path = "protocol_model/search.rs"]
mod search;
#[path = "protocol_model/settling.rs"]
mod settling;
#[path = "protocol_model/state.rs"]
mod state;
#[path = "protocol_model/world.rs"]
mod world;

use engine::recovery::Action;
use model::Model;
use properties::{
    Landmark::{self, *},
    Property, Violation,
};
use search::Found;
use state::{Bounds, Scenario, Scope, Step};
use std::time::Instant;
use world::Flaw;

/// A search that knows more states than this has left its bounds.
const MOST_STATES: usize = 2_000_000;

/// Every fault once, or twice where a second one of the kind makes a difference.
const ANY_FAULT: Bounds =
    Bounds { ticks: 0, faults: 0, crashes: 2, lost: 2, overlaps: 1, restarts: 1, refusals: 1, stale: 1, deletions: 0 };
/// Two crashes and two lost calls.
const CRASHES_AND_LOSSES: Bounds = Bounds { overlaps: 0, restarts: 0, refusals: 0, stale: 0, ..ANY_FAULT };

fn pods(ladder: &[Action], bounds: Bounds) -> Scenario {
    Scenario { scope: Scope::Pods, ladder: ladder.to_vec(), rung_ticks: 2, bounds, flaw: None }
}

fn resets(bounds: Bounds) -> Scenario {
    pods(&[Action::ResetConnections], bounds)
}

/// That a process starts again makes no difference to an eviction.
fn evictions(bounds: Bounds) -> Scenario {
    pods(&[Action::RestartPod], Bounds { restarts: 0, ..bounds })
}

fn jobs(bounds: Bounds) -> Scenario {
    Scenario { scope: Scope::Workload, ..pods(&[Action::RunCleanupJob], bounds) }
}

/// A reset, and then an eviction. The steps are short, so that the second one is over, too.
fn ladder(bounds: Bounds) -> Scenario {
    Scenario { rung_ticks: 1, ..pods(&[Action::ResetConnections, Action::RestartPod], bounds) }
}

/// Explores everything, and tells the shortest way to what is wrong, if anything is.
fn explore(scenario: Scenario) -> (Model, Found<Step, Violation>) {
    let mut model = Model::new(scenario);
    let found = search::explore(&mut model, MOST_STATES);
    assert!(!found.cut_short, "the search was cut short after {} states", found.states);
    (model, found)
}

#[rstest::rstest]
#[case::resets_with_two_faults(
    resets(Bounds { ticks: 2, faults: 2, ..ANY_FAULT }),
    &[TwoLeadersAtWork, OtherProcess, BlindDecision, Succeeded, Failed],
)]
#[case::resets_with_four_crashes_and_losses(resets(Bounds { ticks: 1, faults: 4, ..CRASHES_AND_LOSSES }), &[Succeeded])]
#[case::resets_for_long(resets(Bounds { ticks: 4, faults: 1, ..ANY_FAULT }), &[OtherProcess, Succeeded, Failed])]
#[case::evictions_with_two_faults(
    evictions(Bounds { ticks: 2, faults: 2, ..ANY_FAULT }),
    &[TwoLeadersAtWork, EvictionRefused, OtherPod, FoundDone, BlindDecision],
)]
#[case::evictions_with_four_crashes_and_losses(
    evictions(Bounds { ticks: 1, faults: 4, ..CRASHES_AND_LOSSES }),
    &[FoundDone],
)]
#[case::evictions_for_long(evictions(Bounds { ticks: 3, faults: 1, ..ANY_FAULT }), &[FoundDone, Succeeded, Failed])]
#[case::jobs_with_two_faults(
    jobs(Bounds { ticks: 2, faults: 2, overlaps: 0, ..ANY_FAULT }),
    &[FoundDone, BlindDecision, Succeeded, Failed],
)]
#[case::jobs_with_three_crashes_and_losses(jobs(Bounds { ticks: 1, faults: 3, ..CRASHES_AND_LOSSES }), &[FoundDone])]
#[case::jobs_with_two_leaders(jobs(Bounds { ticks: 2, faults: 1, ..ANY_FAULT }), &[TwoLeadersAtWork, FoundDone])]
#[case::resets_whose_records_are_deleted(
    resets(Bounds { ticks: 1, faults: 3, deletions: 2, overlaps: 0, ..ANY_FAULT }),
    &[DeletedInFlight, BegunAgain],
)]
#[case::evictions_whose_records_are_deleted(
    evictions(Bounds { ticks: 1, faults: 2, deletions: 1, crashes: 1, lost: 1, ..ANY_FAULT }),
    &[DeletedInFlight, BegunAgain],
)]
#[case::jobs_whose_records_are_deleted(
    jobs(Bounds { ticks: 1, faults: 2, deletions: 1, crashes: 1, lost: 1, ..ANY_FAULT }),
    &[DeletedInFlight, BegunAgain],
)]
#[case::a_ladder(
    ladder(Bounds { ticks: 3, faults: 1, restarts: 0, ..ANY_FAULT }),
    &[SecondRung, TwoLeadersAtWork, EvictionRefused, FoundDone, Succeeded, Failed],
)]
fn nothing_is_done_twice_or_lost_or_left(#[case] scenario: Scenario, #[case] reaches: &[Landmark]) {
    /// What every search comes across.
    const ALWAYS: [Landmark; 9] = [
        TwoInFlight,
        SeenTwice,
        CrashBetweenIntentAndAct,
        CrashBetweenActAndRecord,
        AnswerLost,
        LateWriteAccepted,
        LateEffect,
        StaleWriteRefused,
        LateRepetition,
    ];
    let (began, bounds) = (Instant::now(), scenario.bounds);
    println!("{:?} {:?}, steps of {} steps of time", scenario.scope, scenario.ladder, scenario.rung_ticks);
    println!("at most {bounds:?}");
    let (model, found) = explore(scenario);
    let Found { states, transitions, depth, .. } = found;
    println!("{states} states, {transitions} transitions, {depth} steps deep, {:?}", began.elapsed());
    println!("{} decisions, {} states of runs to the end", model.decisions.len(), model.settling.len());
    if let Some(wrong) = found.violation {
        panic!("{}", model.tell(&wrong));
    }
    let missed: Vec<_> = ALWAYS.iter().chain(reaches).filter(|landmark| !model.reached.contains(**landmark)).collect();
    assert!(missed.is_empty(), "the search is too narrow to mean anything; it never came across {missed:?}");
}

#[rstest::rstest]
#[case::a_pod_that_forgets(resets(Bounds { crashes: 1, ..NONE }), Flaw::PodForgets, Property::OnlyOnce)]
#[case::a_pod_that_does_what_another_process_was_to_do(
    resets(Bounds { crashes: 1, restarts: 1, ..NONE }),
    Flaw::PodIgnoresInstance,
    Property::OnlyOnce
)]
#[case::an_eviction_by_name_only(
    evictions(Bounds { lost: 1, stale: 1, ..NONE }),
    Flaw::EvictionWithoutUid,
    Property::OnlyOnce
)]
#[case::a_job_with_a_random_name(jobs(Bounds { crashes: 1, lost: 1, stale: 1, ..NONE }), Flaw::JobWithRandomName, Property::OnlyOnce)]
#[case::an_operator_that_acts_before_it_writes(resets(NONE), Flaw::ActsBeforeIntent, Property::WrittenFirst)]
#[case::a_record_that_is_written_over(
    resets(Bounds { ticks: 2, overlaps: 1, lost: 1, ..NONE }),
    Flaw::WritesUnfenced,
    Property::NotLost
)]
#[case::two_operators_that_name_one_intent_differently(
    resets(Bounds { overlaps: 1, ..NONE }),
    Flaw::NamedBySight,
    Property::OnlyOnce
)]
#[case::an_operator_that_drops_what_is_pending(
    resets(Bounds { ticks: 0, crashes: 1, ..NONE }),
    Flaw::DropsPending,
    Property::NextStep
)]
#[case::an_operator_that_never_ends_anything(resets(NONE), Flaw::NeverEnds, Property::NextStep)]
#[case::an_operator_that_never_looks_again(resets(NONE), Flaw::NeverLooksAgain, Property::NextStep)]
fn the_model_notices(#[case] scenario: Scenario, #[case] flaw: Flaw, #[case] hurts: Property) {
    let (model, found) = explore(Scenario { flaw: Some(flaw), ..scenario.clone() });
    let wrong = found.violation.expect("the flaw is noticed");
    let told = model.tell(&wrong);
    println!("{told}");
    assert_eq!(wrong.violation.property, hurts, "{told}");

    let (model, found) = explore(scenario);
    let without = found.violation.map(|wrong| model.tell(&wrong));
    assert_eq!(without, None, "without the flaw nothing is wrong");
}

/// As little as a flaw needs.
const NONE: Bounds =
    Bounds { ticks: 1, faults: 2, crashes: 0, lost: 0, overlaps: 0, restarts: 0, refusals: 0, stale: 0, deletions: 0 };
