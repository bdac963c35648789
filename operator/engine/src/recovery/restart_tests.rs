//! What a restart is judged by: the pod that takes the place.

use super::tests::*;
use super::*;
use std::collections::BTreeSet;

#[test]
fn a_slow_starter_is_not_evicted_again_while_it_starts() {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.cooldown_ms = 0;
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let failed = run(&settings, &replaced(false, 10, false), &history, 62);
    assert_eq!(failed.finished[0].outcome, Outcome::Failed);
    // Hours later, for another failure than the one that the restart was about.
    let later = run(&settings, &replaced(false, 9_000, false), &failed.history, 9_001);
    assert!(later.execute.is_empty(), "{later:?}");
}

#[test]
fn a_restart_is_verified_in_the_pod_that_takes_the_place() {
    let settings = ladder(Action::RestartPod);
    let first = run(&settings, &three(), &History::default(), 1);
    assert_eq!(first.execute[0].step.action, Action::RestartPod);
    let history = execute_step(&first, at(2));
    assert!(run(&settings, &three(), &history, 3).finished.is_empty(), "the old one is still there");
    assert!(run(&settings, &replaced(true, 5, false), &history, 20).finished.is_empty(), "not ready yet");
    let waiting = run(&settings, &replaced(true, 5, true), &history, 14);
    assert_eq!((waiting.finished.len(), waiting.next_check), (0, Some(at(15))));
    let done = run(&settings, &replaced(true, 5, true), &history, 15);
    assert_eq!(done.finished[0].outcome, Outcome::Succeeded);
}

#[test]
fn a_restart_that_did_not_help_is_not_repeated_in_the_next_pod() {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let failed = run(&settings, &replaced(false, 5, true), &history, 62);
    assert_eq!(failed.finished[0].outcome, Outcome::Failed);
    assert!(failed.finished[0].message.as_ref().unwrap().contains("no answer"));
    assert_eq!(failed.exhausted[0].subject, subject("new"), "its successor is at the ladder's end, too");
    assert!(failed.execute.is_empty());
    // It gets well for a moment, and for long enough: then what fails hours later is another failure.
    let moment = run(&settings, &replaced(true, 8_000, true), &failed.history, 8_009);
    assert_eq!(moment.next_check, Some(at(8_010)), "it is looked at when it has been well for the healthy delay");
    let flaps = run(&settings, &replaced(false, 9_000, true), &moment.history, 9_001);
    assert_eq!((flaps.execute.len(), flaps.exhausted.len()), (0, 1), "too short to count");
    let healed = run(&settings, &replaced(true, 8_000, true), &moment.history, 8_010);
    assert_eq!(healed.history.recent[0].healed_at, Some(at(8_010)));
    let later = run(&settings, &replaced(false, 9_000, true), &healed.history, 9_001);
    assert_eq!((later.execute.len(), later.exhausted.len()), (1, 0));
}

/// The successor is ready after 75 s, longer than the step may take, and its check fails for 90 s from then on.
#[test]
fn a_slow_starter_is_judged_by_its_successor_until_that_was_healthy_once() {
    let settings = ladder(Action::RestartPod);
    let mut history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let mut evictions = 0;
    for second in 3..2_000 {
        let (ready, failing) = (second >= 75, (75..165).contains(&second));
        let since = if failing { 75 } else { 165.min(second) };
        let decision = run(&settings, &replaced(!failing, since, ready), &history, second);
        evictions += decision.execute.len();
        history = execute_step(&decision, at(second));
        assert_eq!(!decision.exhausted.is_empty(), failing, "{second}");
    }
    assert_eq!(evictions, 0, "it is never evicted again");
    assert!(history.recent[0].healed_at.is_some());
}

/// Five pods that are as young as each other; the first one was evicted, and its successor is there.
fn five_siblings() -> (Settings, History, Observed) {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.cooldown_ms = 0;
    let names = [POD, "b", "c", "d", "e"];
    let mut five = observed(names.iter().map(|uid| check(uid, *uid != POD, -8)).collect());
    five.pods.values_mut().for_each(|facts| facts.created_at = at(-8));
    let history = execute_step(&run(&settings, &five, &History::default(), 0), at(0));
    five.pods.remove(POD);
    five.checks[0] = check("new", true, 2);
    five.pods.insert("new".into(), PodFacts { created_at: at(0), ..facts() });
    (settings, history, five)
}

#[test]
fn a_sibling_is_no_successor_however_young_it_is() {
    let (settings, history, mut five) = five_siblings();
    let done = run(&settings, &five, &history, 12);
    assert_eq!(done.finished[0].outcome, Outcome::Succeeded);
    five.checks[1] = check("b", false, 13);
    let next = run(&settings, &five, &done.history, 14);
    assert_eq!((next.execute.len(), next.exhausted.len()), (1, 0), "it has a ladder of its own");
    // As long as the restart is judged, too.
    let next = run(&settings, &five, &history, 8);
    assert_eq!(next.withheld[0].gate, Gate::OneStepAtATime);
}

#[test]
fn a_restart_has_not_succeeded_because_its_siblings_are_healthy() {
    let (settings, history, mut five) = five_siblings();
    let new = five.pods.get_mut("new").unwrap();
    (new.ready, new.was_ready) = (false, false);
    five.checks.remove(0);
    assert!(run(&settings, &five, &history, 40).finished.is_empty());
    let over = run(&settings, &five, &history, 60);
    assert_eq!(over.finished[0].outcome, Outcome::Failed);
    assert!(over.finished[0].message.as_ref().unwrap().contains("4 of 5 pods are ready"));
}

/// One bad successor is the end of one ladder, and not of those of all pods that come after it.
#[test]
fn only_the_pod_that_took_the_place_goes_on_in_the_ladder() {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.cooldown_ms = 0;
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let failed = run(&settings, &replaced(false, 5, true), &history, 62);
    assert_eq!(failed.exhausted[0].subject, subject("new"));
    assert_eq!(failed.history.recent[0].successor.as_deref(), Some("new"));
    // Scaled up by one, much later; and that one fails, too.
    let mut grown = replaced(false, 5, true);
    grown.checks.push(check("newer", false, 9_000));
    grown.pods.insert("newer".into(), PodFacts { created_at: at(8_000), ..facts() });
    grown.wanted.insert("booking".into(), 4);
    let decision = run(&settings, &grown, &failed.history, 9_001);
    assert_eq!(decision.exhausted.iter().map(|end| &end.subject).collect::<Vec<_>>(), [&subject("new")]);
    assert_eq!(decision.execute.iter().map(|act| &act.subject).collect::<Vec<_>>(), [&subject("newer")]);
    // Somebody deletes the bad one: what was failing is gone.
    let mut gone = grown.clone();
    gone.checks.remove(0);
    gone.pods.remove("new");
    gone.checks.push(check("newest", false, 9_500));
    gone.pods.insert("newest".into(), PodFacts { created_at: at(9_400), ..facts() });
    let closed = run(&settings, &gone, &failed.history, 9_501);
    assert!(closed.history.recent[0].healed_at.is_some() && closed.exhausted.is_empty(), "{closed:?}");
}

/// Of two restarts at once, each is judged by its own successor.
#[test]
fn two_restarts_at_once_have_a_successor_each() {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.max_in_flight = 2;
    settings.limits.max_unhealthy = MaxUnhealthy::Percent(100);
    let uids = ["a", "b", "c", "d"];
    let four = observed(uids.iter().map(|uid| check(uid, *uid > "b", -5)).collect());
    let history = execute_step(&run(&settings, &four, &History::default(), 1), at(2));
    assert_eq!(history.in_flight.len(), 2);
    let mut replaced =
        observed(vec![check("c", true, -5), check("d", true, -5), check("x", true, 5), check("y", false, 5)]);
    for (uid, second) in [("x", 3), ("y", 4)] {
        replaced.pods.get_mut(uid).unwrap().created_at = at(second);
    }
    let first = run(&settings, &replaced, &history, 20);
    assert_eq!(first.finished.iter().map(|record| record.outcome).collect::<Vec<_>>(), [Outcome::Succeeded]);
    let successors: BTreeSet<_> = first
        .history
        .in_flight
        .iter()
        .chain(&first.history.recent)
        .filter_map(|record| record.successor.clone())
        .collect();
    assert_eq!(successors, BTreeSet::from(["x".to_owned(), "y".to_owned()]));
    let second = run(&settings, &replaced, &first.history, 62);
    assert_eq!(second.finished[0].outcome, Outcome::Failed);
    assert_eq!(second.exhausted.iter().map(|end| &end.subject).collect::<Vec<_>>(), [&subject("y")]);
}

/// A restart has succeeded when its own successor is well, though other pods are missing or not ready.
#[test]
fn a_restart_is_not_judged_by_other_pods() {
    let settings = ladder(Action::RestartPod);
    let mut more = three();
    more.wanted.insert("booking".into(), 4);
    let history = execute_step(&run(&settings, &more, &History::default(), 1), at(2));
    let mut other = replaced(true, 5, true);
    other.wanted.insert("booking".into(), 5);
    let b = other.pods.get_mut("b").unwrap();
    b.ready = false;
    assert_eq!(run(&settings, &other, &history, 15).finished[0].outcome, Outcome::Succeeded);
}

/// Its readiness does not depend on the check, and the check has not failed often enough yet to count.
#[test]
fn a_successor_that_has_not_passed_yet_is_not_well() {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let mut starting = replaced(true, 5, true);
    starting.checks[0].well_since = None;
    assert!(run(&settings, &starting, &history, 30).finished.is_empty());
    let failed = run(&settings, &replaced(false, 40, true), &history, 62);
    assert_eq!(failed.finished[0].outcome, Outcome::Failed);
    assert_eq!((failed.execute.len(), failed.exhausted.len()), (0, 1));
    // Nor does a process that was started again heal what failed before.
    let again = run(&settings, &starting, &failed.history, 500);
    assert!(again.history.recent[0].healed_at.is_none());
    let flaps = run(&settings, &replaced(false, 520, true), &again.history, 521);
    assert_eq!((flaps.execute.len(), flaps.exhausted.len()), (0, 1));
}

#[test]
fn a_pod_that_somebody_deletes_while_its_eviction_waits_is_judged_from_then_on() {
    let settings = ladder(Action::RestartPod);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let gone = run(&settings, &replaced(false, 600, false), &waiting, 600);
    assert!(gone.finished.is_empty(), "{gone:?}");
    let well = run(&settings, &replaced(true, 610, true), &gone.history, 620);
    assert_eq!(well.finished[0].outcome, Outcome::Succeeded);
}

#[test]
fn pods_that_came_while_an_eviction_waited_are_no_successors() {
    let settings = ladder(Action::RestartPod);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let mut grown = three();
    grown.checks.push(check("fourth", true, 100));
    grown.pods.insert("fourth".into(), PodFacts { created_at: at(100), ..facts() });
    grown.wanted.insert("booking".into(), 4);
    let evicted = execute_step(&run(&settings, &grown, &waiting, 500), at(500));
    assert_eq!(
        evicted.in_flight[0].before.as_ref().map(|before| (before.wanted, before.youngest_at)),
        Some((4, at(100)))
    );
    grown.checks.remove(0);
    grown.pods.remove(POD);
    assert!(run(&settings, &grown, &evicted, 520).finished.is_empty(), "the fourth was there before");
}

/// A pod was to be restarted for two checks, and was, for the first one.
#[test]
fn a_pod_that_was_restarted_for_two_checks_has_one_successor() {
    let mut settings = ladder(Action::RestartPod);
    settings.ladders.insert("memory".into(), vec![step(Action::RestartPod, 60_000)]);
    settings.limits.max_in_flight = 2;
    let memory = |uid: &str, healthy: bool, since: i64| CheckState {
        subject: Subject { check: "memory".into(), ..subject(uid) },
        ..check(uid, healthy, since)
    };
    let mut both = three();
    both.checks.push(memory(POD, false, 0));
    let mut history = refuse(&run(&settings, &both, &History::default(), 1));
    history = refuse(&run(&settings, &both, &history, 2));
    assert_eq!(history.in_flight.len(), 2, "{history:?}");
    let mut new = replaced(true, 5, true);
    new.checks.push(memory("new", true, 5));
    let gone = run(&settings, &new, &history, 6);
    let successors: Vec<_> = gone.history.in_flight.iter().map(|record| record.successor.as_deref()).collect();
    assert_eq!(successors, [Some("new"), Some("new")]);
    let done = run(&settings, &new, &gone.history, 16);
    assert!(done.finished.iter().all(|record| record.outcome == Outcome::Succeeded) && done.finished.len() == 2);
}

/// Other pods of a StatefulSet come and go meanwhile.
#[test]
fn the_successor_of_a_stateful_sets_pod_has_its_name() {
    let settings = ladder(Action::RestartPod);
    let mut set = three();
    set.keeps_names.insert("booking".into());
    let named = |set: &mut Observed, uid: &str, name: &str, second: i64| {
        let facts = PodFacts { name: name.into(), created_at: at(second), ..facts() };
        set.pods.insert(uid.into(), facts);
    };
    set.checks[0].subject.pod.as_mut().unwrap().name = "booking-1".into();
    named(&mut set, "b", "booking-0", -100);
    let history = execute_step(&run(&settings, &set, &History::default(), 1), at(2));
    let mut other = set.clone();
    other.pods.remove(POD);
    other.pods.remove("b");
    other.checks = vec![check("c", true, -100), check("new-0", true, 3)];
    named(&mut other, "new-0", "booking-0", 3);
    other.wanted.insert("booking".into(), 2);
    let stranger = run(&settings, &other, &history, 20);
    assert_eq!(stranger.history.recent.iter().chain(&stranger.history.in_flight).next().unwrap().successor, None);
    named(&mut other, "new-1", "booking-1", 4);
    other.wanted.insert("booking".into(), 3);
    other.checks.push(check("new-1", true, 5));
    let own = run(&settings, &other, &history, 20);
    assert_eq!(own.finished[0].outcome, Outcome::Succeeded);
    assert_eq!(own.finished[0].successor.as_deref(), Some("new-1"));
}

#[test]
fn what_a_policy_does_not_hold_is_not_healed() {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let failed = run(&settings, &replaced(false, 5, true), &history, 62).history;
    let lost = run(&settings, &Observed::default(), &failed, 100).history;
    assert_eq!(lost.recent[0].healed_at, None);
    let back = run(&settings, &replaced(false, 5, true), &lost, 200);
    assert_eq!((back.execute.len(), back.exhausted.len()), (0, 1));
}

#[test]
fn nothing_is_done_to_the_pod_that_a_restart_is_judged_by() {
    let mut settings = ladder(Action::RestartPod);
    settings.ladders.insert("memory".into(), vec![step(Action::ResetConnections, 15_000)]);
    settings.limits.max_in_flight = 3;
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let mut new = replaced(false, 5, true);
    new.checks
        .push(CheckState { subject: Subject { check: "memory".into(), ..subject("new") }, ..check("new", false, 5) });
    let held = run(&settings, &new, &history, 10);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::OneStepAtATime));
}

#[test]
fn pods_of_one_second_are_told_apart_by_their_uids() {
    let (_, history, _) = five_siblings();
    let before = history.in_flight[0].before.clone().unwrap();
    assert_eq!(before.wanted, 5);
    assert!(!before.has_not("b", at(-8)) && before.has_not("new", at(-8)) && before.has_not("b", at(-7)));
    assert!(!before.has_not("new", at(-9)));
    let mut crowd = observed((0..50).map(|n| check(&format!("pod-{n}"), true, 0)).collect());
    crowd.pods.values_mut().for_each(|facts| facts.created_at = at(0));
    let before = Before::of("booking", &crowd).unwrap();
    assert!(before.youngest.len() <= 16);
    assert!((0..50).all(|n| !before.has_not(&format!("pod-{n}"), at(0))), "none of them is taken for a successor");
}

#[test]
fn a_pod_that_nothing_replaces_ends_its_recovery() {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let mut smaller = observed(vec![check("b", true, -100), check("c", true, -100)]);
    smaller.wanted.insert("booking".into(), 3);
    assert!(run(&settings, &smaller, &history, 3).finished.is_empty(), "one may still come");
    let over = run(&settings, &smaller, &history, 62);
    assert_eq!(over.finished[0].outcome, Outcome::Failed);
    assert!(over.finished[0].message.as_ref().unwrap().contains("2 of 3 pods are ready"), "{over:?}");
    smaller.wanted.clear();
    assert_eq!(run(&settings, &smaller, &history, 3).finished[0].outcome, Outcome::Cancelled, "no workload either");
}

#[rstest::rstest]
#[case::by_one(2)]
#[case::to_one(1)]
#[case::to_zero(0)]
fn a_restart_ends_when_the_workload_is_scaled_down_meanwhile(#[case] left: usize) {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let mut siblings = vec![check("b", true, -100), check("c", true, -100)];
    siblings.truncate(left);
    let smaller = observed(siblings);
    let over = run(&settings, &smaller, &history, 3);
    assert_eq!(over.finished[0].outcome, Outcome::Cancelled);
    let message = over.finished[0].message.as_deref().unwrap();
    assert!(message.contains(&format!("scaled down to {left}")), "{message}");
    assert!(over.exhausted.is_empty() && over.withheld.is_empty(), "{over:?}");
}

#[test]
fn an_eviction_that_nobody_wrote_down_is_found_and_not_repeated() {
    let settings = ladder(Action::RestartPod);
    let pending = run(&settings, &three(), &History::default(), 1).history;
    let found = run(&settings, &replaced(true, 5, true), &pending, 6);
    assert!(found.execute.is_empty());
    assert_eq!(found.history.in_flight[0].outcome, Outcome::Verifying);
    assert_eq!(run(&settings, &replaced(true, 5, true), &found.history, 15).finished[0].outcome, Outcome::Succeeded);
}

#[test]
fn a_clock_ahead_of_the_servers_does_not_hide_the_successor() {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let mut behind = replaced(true, 5, true);
    behind.pods.get_mut("new").unwrap().created_at = at(-10);
    assert_eq!(run(&settings, &behind, &history, 15).finished[0].outcome, Outcome::Succeeded);
}

#[test]
fn a_successor_is_left_alone_while_its_predecessors_restart_is_judged_and_cools_down_after_it() {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.max_in_flight = 3;
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let judging = run(&settings, &replaced(false, 5, true), &history, 10);
    assert!(judging.execute.is_empty() && judging.withheld.is_empty(), "{judging:?}");
    let recovering = run(&settings, &replaced(true, 11, true), &history, 21);
    assert_eq!(recovering.finished[0].outcome, Outcome::Succeeded);
    let again = run(&settings, &replaced(false, 25, true), &recovering.history, 26);
    assert_eq!((again.withheld[0].gate, again.withheld[0].until), (Gate::Cooldown, Some(at(81))));
}

#[test]
fn a_restart_that_did_not_help_is_known_to_the_next_leader_too() {
    let settings = ladder(Action::RestartPod);
    let history = execute_step(&run(&settings, &three(), &History::default(), 1), at(2));
    let failed = run(&settings, &replaced(false, 5, true), &history, 62).history;
    let since = |began_before| failing_since(at(500), began_before, &subject("new"), &failed);
    assert_eq!((since(true), since(false)), (at(62), at(500)));
    let mut later = replaced(false, 5, true);
    later.checks[0].since = since(true);
    let decision = run(&settings, &later, &failed, 501);
    assert!(decision.execute.is_empty() && decision.exhausted.len() == 1, "{decision:?}");
}
