//! The steps that replace all pods of a workload.

use super::tests::{at, execute_step, observed, record, run, step};
use super::*;

const POD: &str = tests::POD;

/// That its containers crash again and again: the kind of failure that a pod may have which was never ready.
fn check(uid: &str, healthy: bool, since: i64) -> CheckState {
    let mut check = tests::check(uid, healthy, since);
    check.subject.check = "restarts".into();
    check
}

fn ladder(action: Action) -> Settings {
    steps(&[action])
}

fn steps(actions: &[Action]) -> Settings {
    let steps = actions.iter().map(|action| step(*action, 60_000)).collect();
    let ladders = [("restarts".to_owned(), steps)].into();
    Settings { ladders, ..tests::ladder(Action::RestartPod) }
}

/// Three old pods that are well, and one of the new revision, made at 0, whose check fails since 5.
pub(super) fn bad_rollout() -> Observed {
    let mut four =
        observed(vec![check("a", true, -50), check("b", true, -50), check("c", true, -50), check("new", false, 5)]);
    four.wanted.insert("booking".into(), 3);
    for uid in ["a", "b", "c"] {
        four.pods.get_mut(uid).unwrap().outdated = true;
    }
    let new = four.pods.get_mut("new").unwrap();
    (new.created_at, new.ready, new.was_ready) = (at(0), false, false);
    four.rolling_out.insert("booking".into());
    four.rollouts.insert("booking".into(), rollout(None));
    four.watching_since = at(-1_000);
    four
}

pub(super) fn rollout(rolled_back_by: Option<String>) -> Rollout {
    let undo = Undo { began_at: at(0), from: 7, to: 6, proven: true };
    let (stuck, held, recreates) = (false, None, false);
    Rollout { restarted_by: None, rolled_back_by, complete: false, stuck, held, recreates, undo: Ok(undo) }
}

fn of_booking(observed: &mut Observed) -> &mut Rollout {
    observed.rollouts.get_mut("booking").unwrap()
}

fn gate(decision: &Decision) -> Option<(Gate, &str)> {
    decision.withheld.first().map(|held| (held.gate, held.message.as_str()))
}

#[test]
fn a_rollout_that_breaks_its_pods_is_undone_while_it_is_under_way() {
    let decision = run(&ladder(Action::Rollback), &bad_rollout(), &History::default(), 6);
    assert_eq!(decision.execute.len(), 1, "{decision:?}");
    assert_eq!(decision.execute[0].step.action, Action::Rollback);
    // Nothing else is done to a workload that is being rolled out, nor to a pod that was never ready.
    for action in [Action::RestartPod, Action::RolloutRestart] {
        let held = run(&ladder(action), &bad_rollout(), &History::default(), 6);
        assert_eq!(gate(&held).unwrap().0, Gate::StartingUp, "{action}");
    }
}

#[test]
fn all_pods_are_not_restarted_while_a_rollout_is_under_way_also_by_hand() {
    let mut three = observed(vec![check(POD, false, 0), check("b", true, 0), check("c", true, 0)]);
    three.rollouts.insert("booking".into(), rollout(None));
    three.rolling_out.insert("booking".into());
    let held = run(&ladder(Action::RolloutRestart), &three, &History::default(), 1);
    assert_eq!((gate(&held).unwrap().0, held.execute.len()), (Gate::RolloutInProgress, 0));
    // By hand, with no ladder beside it.
    three.checks[0] = check(POD, true, 0);
    let by_hand = Record {
        by_hand: true,
        executed_at: None,
        step: step(Action::RolloutRestart, 15_000),
        ..record(POD, 1, Outcome::Pending)
    };
    let asked: History = std::iter::once(by_hand).collect();
    let waits = run(&ladder(Action::ResetConnections), &three, &asked, 2);
    assert!(waits.execute.is_empty() && waits.finished.is_empty(), "{waits:?}");
    assert_eq!(waits.history.in_flight[0].outcome, Outcome::Waiting, "{waits:?}");
    three.rolling_out.clear();
    // It is asked for again after a while.
    let done = run(&ladder(Action::ResetConnections), &three, &waits.history, 8);
    assert_eq!(done.execute.iter().map(|one| one.step.action).collect::<Vec<_>>(), [Action::RolloutRestart]);
}

type Change = fn(&mut Observed);

#[rstest::rstest]
#[case::nothing_known(|o: &mut Observed| o.rollouts.clear(), "nothing is known of its revisions")]
#[case::not_to_be_undone(|o: &mut Observed| of_booking(o).undo = Err("argocd owns its template".into()), "argocd owns its template")]
#[case::not_proven(|o: &mut Observed| of_booking(o).undo.as_mut().unwrap().proven = false, "nobody has seen a pod of revision 6 ready")]
#[case::failed_before(|o: &mut Observed| of_booking(o).undo.as_mut().unwrap().began_at = at(6), "restarts failed before the rollout of revision 7 began")]
#[case::long_ago(|o: &mut Observed| of_booking(o).undo.as_mut().unwrap().began_at = at(-3_600), "more than 1 h after the rollout of revision 7")]
#[case::of_an_older_one(|o: &mut Observed| o.pods.get_mut("new").unwrap().outdated = true, "name-new is not of revision 7")]
#[case::an_older_one_fails_too(|o: &mut Observed| o.checks[0] = check("a", false, -1), "name-a of revision 6 fails, too")]
fn a_rollback_needs_evidence(#[case] change: Change, #[case] why: &str) {
    let mut observed = bad_rollout();
    change(&mut observed);
    let decision = run(&ladder(Action::Rollback), &observed, &History::default(), 6);
    assert!(decision.execute.is_empty());
    let all: Vec<_> = decision.withheld.iter().map(|held| (held.gate, held.message.clone())).collect();
    assert!(all.iter().any(|(gate, message)| *gate == Gate::RollbackRefused && message.contains(why)), "{all:?}");
}

#[test]
fn what_failed_before_the_rollout_in_another_pod_is_not_blamed_on_it() {
    let mut history = History::default();
    let mut before = observed(vec![check("old", false, -80), check("a", true, -90), check("b", true, -90)]);
    before.watching_since = at(-1_000);
    history.in_flight =
        execute_step(&run(&ladder(Action::ResetConnections), &before, &history, -79), at(-79)).in_flight;
    let (mut record, mut ladder) = (history.in_flight.remove(0), ladder(Action::Rollback));
    (record.outcome, record.finished_at) = (Outcome::Failed, Some(at(-60)));
    history.recent.push(record);
    ladder.limits.cooldown_ms = 0;
    let decision = run(&ladder, &bad_rollout(), &history, 6);
    assert_eq!(gate(&decision).unwrap().0, Gate::RollbackRefused, "{decision:?}");
    assert!(gate(&decision).unwrap().1.contains("failed already before"));
}

#[test]
fn a_failure_that_nobody_saw_begin_is_not_blamed_on_the_rollout() {
    let mut observed = bad_rollout();
    observed.checks = vec![check("a", false, 5)];
    observed.checks[0].subject.pod = None;
    let run = |observed: &Observed| run(&ladder(Action::Rollback), observed, &History::default(), 6);
    assert_eq!(run(&observed).execute.len(), 1);
    observed.checks[0].began_before = true;
    assert!(gate(&run(&observed)).unwrap().1.contains("nobody saw when it began"));
}

#[test]
fn however_many_pods_a_rollout_breaks_it_is_undone_but_not_on_the_word_of_all() {
    let mut observed = bad_rollout();
    observed.checks.extend([check("new2", false, 5), check("new3", false, 5)]);
    for uid in ["new2", "new3"] {
        let facts = observed.pods["new"].clone();
        observed.pods.insert(uid.into(), facts);
    }
    let mut settings = ladder(Action::Rollback);
    settings.limits.max_unhealthy = MaxUnhealthy::Count(1);
    assert_eq!(run(&settings, &observed, &History::default(), 6).execute.len(), 1, "one for all of them");
    for uid in ["a", "b", "c"] {
        observed.pods.get_mut(uid).unwrap().ready = false;
    }
    let held = run(&settings, &observed, &History::default(), 6);
    assert_eq!(gate(&held).unwrap().0, Gate::AllPodsUnhealthy);
}

#[test]
fn a_rollback_is_verified_in_all_pods_once_they_are_replaced() {
    let settings = ladder(Action::Rollback);
    let begun = run(&settings, &bad_rollout(), &History::default(), 6);
    let id = begun.execute[0].id.clone();
    let history = execute_step(&begun, at(6));
    // Its pod goes away, and others come: that is what it is for.
    let mut rolls = bad_rollout();
    rolls.pods.remove("new");
    rolls.checks.pop();
    *of_booking(&mut rolls) = rollout(Some(id.clone()));
    let under_way = run(&settings, &rolls, &history, 200);
    assert!(under_way.finished.is_empty(), "it takes as long as the rollout: {under_way:?}");
    let mut done = rolls.clone();
    done.rolling_out.clear();
    of_booking(&mut done).complete = true;
    done.checks.iter_mut().for_each(|check| check.well_since = Some(at(195)));
    let waiting = run(&settings, &done, &under_way.history, 201);
    assert!(waiting.finished.is_empty(), "healthy for the healthy delay first");
    let over = run(&settings, &done, &waiting.history, 205);
    assert_eq!(over.finished[0].outcome, Outcome::Succeeded, "{over:?}");
    // Somebody else's change ends it.
    *of_booking(&mut rolls) = rollout(None);
    rolls.rolling_out.clear();
    assert_eq!(run(&settings, &rolls, &history, 200).finished[0].outcome, Outcome::Failed);
}

/// All three pods fail from time to time; the ladder goes up to a restart of all of them.
#[test]
fn a_restart_of_all_pods_that_did_not_help_is_not_repeated_in_the_next_pods() {
    use tests::check;
    let mut settings = tests::ladder(Action::RolloutRestart);
    settings.limits.cooldown_ms = 0;
    let mut three = observed(vec![check(POD, false, 0), check("b", true, -9), check("c", true, -9)]);
    three.watching_since = at(-1_000);
    three.rollouts.insert("booking".into(), rollout(None));
    let begun = run(&settings, &three, &History::default(), 1);
    assert_eq!(begun.execute.len(), 1, "{begun:?}");
    let id = begun.execute[0].id.clone();
    let mut new = observed(vec![check("x", true, 12), check("y", false, 20), check("z", true, 12)]);
    new.pods.values_mut().for_each(|facts| facts.created_at = at(10));
    new.watching_since = three.watching_since;
    new.rollouts.insert("booking".into(), Rollout { restarted_by: Some(id), complete: true, ..rollout(None) });
    // The answer was lost; what the workload carries says that it was executed.
    let judged = run(&settings, &new, &begun.history, 69);
    assert!(judged.finished.is_empty() && judged.execute.is_empty(), "{judged:?}");
    let failed = run(&settings, &new, &judged.history, 101);
    assert_eq!(failed.finished[0].outcome, Outcome::Failed, "{failed:?}");
    assert!(failed.execute.is_empty(), "the ladder of the successor is at its end, too");
    assert_eq!(failed.exhausted.len(), 1);
    new.checks[1] = check("y", true, 200);
    let healed = run(&settings, &new, &failed.history, 210);
    assert_eq!(healed.history.recent[0].healed_at, Some(at(210)));
}

#[test]
fn beside_a_restart_of_all_pods_nothing_is_done() {
    let mut settings = ladder(Action::RolloutRestart);
    settings.limits.max_in_flight = 9;
    settings.limits.max_unhealthy = MaxUnhealthy::Percent(100);
    settings.ladders.insert("other".into(), vec![step(Action::RestartPod, 15_000)]);
    let mut two = observed(vec![check(POD, false, 0), check("b", false, 0), check("c", true, 0), check("d", true, 0)]);
    let mut other = check("c", false, 0);
    other.subject.check = "other".into();
    two.checks.push(other);
    two.rollouts.insert("booking".into(), rollout(None));
    let begun = run(&settings, &two, &History::default(), 1);
    assert_eq!(begun.execute.len(), 1, "once for the workload, though two of its pods ask for it");
    assert_eq!(begun.withheld.len(), 1, "the other one is what it is judged by: {begun:?}");
    let (gate, why) = gate(&begun).unwrap();
    assert_eq!((gate, why), (Gate::OneStepAtATime, "RolloutRestart of name-pod-uid is under way"));
}

#[test]
fn a_person_needs_no_evidence_for_a_rollback_but_something_to_go_back_to() {
    let mut observed = bad_rollout();
    of_booking(&mut observed).undo.as_mut().unwrap().began_at = at(-9_000);
    let asked = |observed: &Observed| {
        let mut record = run(&ladder(Action::Rollback), &bad_rollout(), &History::default(), 6).execute.remove(0);
        (record.by_hand, record.subject.pod, record.subject.check) = (true, None, String::new());
        run(&ladder(Action::Rollback), observed, &History::from_iter([record]), 7)
    };
    assert!(asked(&observed).execute.iter().any(|record| record.by_hand));
    of_booking(&mut observed).undo = Err("there is no revision before it".into());
    let held = asked(&observed);
    let own = held.history.in_flight.iter().find(|record| record.by_hand).unwrap();
    assert_eq!(own.outcome, Outcome::Waiting);
    assert!(own.message.as_ref().unwrap().contains("there is no revision before it"), "{own:?}");
}

#[test]
fn a_ladder_of_several_steps_goes_to_its_rollback_where_the_pods_of_a_rollout_do_not_come_up() {
    let settings = steps(&[Action::RestartPod, Action::RolloutRestart, Action::Rollback]);
    let decision = run(&settings, &bad_rollout(), &History::default(), 6);
    assert_eq!((decision.execute[0].step.action, decision.execute[0].index), (Action::Rollback, 2));
    assert!(decision.withheld.is_empty());
    // Where it may not be undone, the pod is starting up as before.
    let mut unproven = bad_rollout();
    of_booking(&mut unproven).undo.as_mut().unwrap().proven = false;
    let held = run(&settings, &unproven, &History::default(), 6);
    assert_eq!((held.execute.len(), gate(&held).unwrap().0), (0, Gate::StartingUp));
    assert!(held.exhausted.is_empty());
}

#[test]
fn a_rollback_that_is_refused_is_passed_over_and_at_the_end_a_person_is_called() {
    let mut observed = bad_rollout();
    of_booking(&mut observed).undo = Err("argocd owns its template".into());
    let pod = observed.pods.get_mut("new").unwrap();
    (pod.was_ready, pod.ready) = (true, true);
    observed.rolling_out.clear();
    let next = run(&steps(&[Action::Rollback, Action::RestartPod]), &observed, &History::default(), 6);
    assert_eq!(next.execute[0].step.action, Action::RestartPod, "{next:?}");
    assert_eq!(gate(&next).unwrap().0, Gate::RollbackRefused, "and that is said");
    let last = run(&steps(&[Action::Rollback]), &observed, &History::default(), 6);
    assert_eq!((last.execute.len(), last.exhausted.len()), (0, 1));
    assert_eq!(gate(&last).unwrap().0, Gate::RollbackRefused);
}

#[test]
fn a_pod_that_only_starts_slowly_undoes_nothing() {
    let mut observed = bad_rollout();
    observed.checks.iter_mut().for_each(|check| check.subject.check = "pod-ready".into());
    let mut settings = ladder(Action::Rollback);
    settings.ladders = [("pod-ready".to_owned(), settings.ladders.remove("restarts").unwrap())].into();
    let held = run(&settings, &observed, &History::default(), 6);
    assert!(gate(&held).unwrap().1.contains("was never ready, and its rollout may still come to its end"), "{held:?}");
    of_booking(&mut observed).stuck = true;
    assert_eq!(run(&settings, &observed, &History::default(), 6).execute.len(), 1, "its deadline is over");
}

#[test]
fn one_of_many_pods_of_a_revision_does_not_undo_it() {
    let mut observed = bad_rollout();
    observed.checks.extend([check("new2", true, 1), check("new3", false, 1)]);
    for uid in ["new2", "new3"] {
        let facts = observed.pods["new"].clone();
        observed.pods.insert(uid.into(), facts);
    }
    assert_eq!(run(&ladder(Action::Rollback), &observed, &History::default(), 6).execute.len(), 1, "two of three");
    observed.checks.pop();
    let held = run(&ladder(Action::Rollback), &observed, &History::default(), 6);
    assert!(gate(&held).unwrap().1.contains("2 of 3 pods of revision 7 do not fail"), "{held:?}");
}

#[test]
fn what_was_undone_and_brought_back_is_left_to_people() {
    let begun = run(&ladder(Action::Rollback), &bad_rollout(), &History::default(), 6);
    let mut history = execute_step(&begun, at(7));
    let mut record = history.in_flight.remove(0);
    (record.outcome, record.finished_at) = (Outcome::Succeeded, Some(at(30)));
    history.recent.push(record);
    let mut again = bad_rollout();
    again.checks[3] = check("new", false, 900);
    let held = run(&ladder(Action::Rollback), &again, &history, 901);
    assert!(gate(&held).unwrap().1.contains("revision 7 was undone already, and somebody brought it back"), "{held:?}");
}

#[test]
fn a_rollback_that_waits_is_given_up_when_another_rollout_begins() {
    let begun = run(&ladder(Action::Rollback), &bad_rollout(), &History::default(), 6);
    let mut later = bad_rollout();
    of_booking(&mut later).undo.as_mut().unwrap().began_at = at(60);
    let over = run(&ladder(Action::Rollback), &later, &begun.history, 61);
    assert_eq!(over.finished[0].outcome, Outcome::Cancelled);
    assert!(over.execute.is_empty());
}

#[test]
fn what_replaces_no_pods_or_all_at_once_is_held_back() {
    let mut three = observed(vec![check(POD, false, 0), check("b", true, 0), check("c", true, 0)]);
    three.rollouts.insert("booking".into(), rollout(None));
    let settings = ladder(Action::RolloutRestart);
    assert_eq!(run(&settings, &three, &History::default(), 1).execute.len(), 1);
    of_booking(&mut three).recreates = true;
    let held = run(&settings, &three, &History::default(), 1);
    assert_eq!(gate(&held).unwrap().0, Gate::TooManyUnhealthy, "all three would go at once");
    of_booking(&mut three).held = Some("its rollout is paused".into());
    let held = run(&settings, &three, &History::default(), 1);
    assert_eq!(
        gate(&held).unwrap(),
        (Gate::ActionNotSupported, "RolloutRestart would replace no pod: its rollout is paused; it waits for a person")
    );
}

#[test]
fn a_node_whose_clock_is_ahead_keeps_nothing_in_flight() {
    let begun = run(
        &ladder(Action::RestartPod),
        &observed(vec![check(POD, false, 0), check("b", true, 0), check("c", true, 0)]),
        &History::default(),
        1,
    );
    let history = execute_step(&begun, at(2));
    let mut replaced = observed(vec![check("new", true, 1_800), check("b", true, 0), check("c", true, 0)]);
    replaced.pods.get_mut("new").unwrap().created_at = at(3);
    let done = run(&ladder(Action::RestartPod), &replaced, &history, 14);
    assert_eq!(done.finished[0].outcome, Outcome::Succeeded, "{done:?}");
}

#[test]
fn a_pod_that_is_too_young_or_alone_undoes_nothing() {
    // Its workload has no readiness probe: it is ready at once, and warms up.
    let mut observed = bad_rollout();
    observed.checks.iter_mut().for_each(|check| check.subject.check = "database".into());
    let pod = observed.pods.get_mut("new").unwrap();
    (pod.ready, pod.was_ready) = (true, true);
    observed.rolling_out.clear();
    let mut settings = tests::ladder(Action::RestartPod);
    settings.ladders.get_mut("database").unwrap().push(step(Action::Rollback, 60_000));
    settings.startup_grace_ms = 60_000;
    let held = run(&settings, &observed, &History::default(), 6);
    assert_eq!((held.execute.len(), gate(&held).unwrap().0), (0, Gate::StartingUp), "{held:?}");
    let mut only = tests::ladder(Action::Rollback);
    only.startup_grace_ms = 60_000;
    let held = run(&only, &observed, &History::default(), 6);
    assert!(gate(&held).unwrap().1.contains("too young to be judged"), "{held:?}");
    // Of ten new pods one was heard.
    let mut ten = bad_rollout();
    for nth in 0..9 {
        let facts = ten.pods["new"].clone();
        ten.pods.insert(format!("silent-{nth}"), facts);
    }
    let held = run(&ladder(Action::Rollback), &ten, &History::default(), 6);
    assert!(gate(&held).unwrap().1.contains("9 of 10 pods of revision 7 do not fail"), "{held:?}");
}

#[test]
fn what_only_the_operator_sees_takes_no_pods_away() {
    let mut three = observed(vec![check("a", true, 0), check("b", true, 0), check("c", true, 0)]);
    three.rollouts.insert("booking".into(), rollout(None));
    let mut asked = tests::check("none", false, 0);
    (asked.subject.pod, asked.asked) = (None, true);
    three.checks.push(asked);
    let held = run(&tests::ladder(Action::RolloutRestart), &three, &History::default(), 1);
    assert_eq!(gate(&held).unwrap().0, Gate::AllPodsUnhealthy, "{held:?}");
    three.pods.get_mut("a").unwrap().ready = false;
    let begun = run(&tests::ladder(Action::RolloutRestart), &three, &History::default(), 1);
    assert_eq!(begun.execute.len(), 1, "a kubelet sees something, too: {begun:?}");
    let held = run(&tests::ladder(Action::Rollback), &three, &History::default(), 1);
    assert!(gate(&held).unwrap().1.contains("says nothing of the pods of a revision"), "{held:?}");
}

#[test]
fn a_person_does_not_undo_a_rollout_that_began_later() {
    let mut record = run(&ladder(Action::Rollback), &bad_rollout(), &History::default(), 6).execute.remove(0);
    (record.by_hand, record.subject.pod, record.subject.check) = (true, None, String::new());
    let mut later = bad_rollout();
    of_booking(&mut later).undo.as_mut().unwrap().began_at = at(8);
    let over = run(&ladder(Action::RestartPod), &later, &History::from_iter([record]), 9);
    assert_eq!(over.finished[0].outcome, Outcome::Cancelled, "{over:?}");
}
