//! What a person asks for, and what a person deletes.

use super::tests::*;
use super::*;

/// What a person asked for at second 1, of the first of three pods.
fn asked(action: Action, check: &str) -> History {
    let record = Record {
        by_hand: true,
        subject: Subject { check: check.to_owned(), ..subject(POD) },
        step: step(action, 60_000),
        executed_at: None,
        ..record(POD, 1, Outcome::Pending)
    };
    [record].into_iter().collect()
}

/// Three pods, all well.
fn well() -> Observed {
    observed(vec![check(POD, true, -100), check("b", true, -100), check("c", true, -100)])
}

#[test]
fn what_a_person_asks_for_is_done_though_nothing_fails() {
    let policy = ladder(Action::RestartPod);
    let history = asked(Action::ResetConnections, "");
    let decision = run(&policy, &well(), &history, 2);
    assert_eq!(decision.execute.len(), 1);
    let done = run(&policy, &well(), &execute_step(&decision, at(2)), 3);
    assert_eq!((done.finished[0].outcome, done.execute.len()), (Outcome::Succeeded, 0));
    // With a check, it is that which has to be well.
    let decision = run(&policy, &well(), &asked(Action::ResetConnections, "database"), 2);
    let waits = run(&policy, &well(), &execute_step(&decision, at(2)), 3);
    assert_eq!((waits.finished.len(), waits.next_check), (0, Some(at(12))));
}

#[test]
fn a_restart_that_a_person_asks_for_ends_with_a_pod_that_is_ready() {
    let policy = ladder(Action::ResetConnections);
    let decision = run(&policy, &well(), &asked(Action::RestartPod, ""), 2);
    assert_eq!(decision.execute.len(), 1);
    assert!(decision.execute[0].before.is_some(), "so that its successor is known");
    let history = execute_step(&decision, at(2));
    let mut booting = replaced(true, 5, false);
    booting.pods.get_mut("new").unwrap().created_at = at(4);
    assert!(run(&policy, &booting, &history, 10).finished.is_empty());
    booting.pods.get_mut("new").unwrap().ready = true;
    let done = run(&policy, &booting, &history, 20);
    assert_eq!(done.finished[0].outcome, Outcome::Succeeded);
    assert_eq!(done.finished[0].message.as_deref(), Some("done; the pod that took the place is ready"));
}

/// Each of these protects others; what the person knows better holds nothing back.
#[rstest::rstest]
#[case::nothing(|_: &mut Settings, _: &mut Observed| {}, None)]
#[case::suspended(|policy: &mut Settings, _: &mut Observed| policy.suspended = true, None)]
#[case::rollout(|_: &mut Settings, seen: &mut Observed| { seen.rolling_out.insert("booking".into()); }, None)]
#[case::starting_up(|policy: &mut Settings, _: &mut Observed| policy.startup_grace_ms = 600_000, None)]
#[case::paused(|policy: &mut Settings, _: &mut Observed| policy.pause_requests.push("why".into()), None)]
#[case::budget(|policy: &mut Settings, _: &mut Observed| policy.limits.budget_actions = 0, Some(Gate::BudgetExhausted))]
#[case::too_many_unhealthy(|_: &mut Settings, seen: &mut Observed| { seen.wanted.insert("booking".into(), 6); }, Some(Gate::TooManyUnhealthy))]
#[case::stale(|_: &mut Settings, seen: &mut Observed| seen.observer_stale = Some("old".into()), Some(Gate::ObserverStale))]
fn a_person_passes_only_the_gates_that_protect_others(
    #[case] change: fn(&mut Settings, &mut Observed),
    #[case] gate: Option<Gate>,
) {
    let (mut policy, mut seen) = (ladder(Action::ResetConnections), well());
    change(&mut policy, &mut seen);
    let decision = run(&policy, &seen, &asked(Action::RestartPod, ""), 2);
    assert!(decision.withheld.is_empty(), "nothing is held back from the policy");
    assert_eq!(decision.execute.len(), usize::from(gate.is_none()));
    let record = &decision.history.in_flight[0];
    let told = record.message.as_deref().unwrap_or_default();
    let words = match gate {
        Some(Gate::BudgetExhausted) => "actions are used up",
        Some(Gate::TooManyUnhealthy) => "maxUnhealthy allows",
        Some(Gate::OneStepAtATime) => "is under way",
        _ => "",
    };
    assert!(told.contains(words), "{told}");
    assert_eq!((record.outcome == Outcome::Waiting, told.starts_with("held back: ")), (gate.is_some(), gate.is_some()));
    assert!(run(&policy, &seen, &decision.history, 9_000).finished.is_empty() || gate.is_none(), "it waits");
}

#[test]
fn one_at_a_time_holds_for_people_too() {
    let policy = ladder(Action::ResetConnections);
    let under_way = execute_step(&run(&policy, &three(), &History::default(), 1), at(1));
    let both: History = under_way.all().cloned().chain(asked(Action::RestartPod, "").in_flight).collect();
    let held = run(&policy, &three(), &both, 2);
    let told = held.history.in_flight.iter().find(|record| record.by_hand).unwrap().message.clone().unwrap();
    assert!(held.execute.is_empty() && told.contains("is under way"), "{told}");
}

/// Six at once, of which the budget allows two: those are done, and what only waits has used nothing up.
#[test]
fn what_people_wait_for_uses_no_budget_up() {
    let mut policy = ladder(Action::RestartPod);
    (policy.limits.budget_actions, policy.limits.max_in_flight) = (2, 10);
    let mut seen = observed((0..6).map(|pod| check(&format!("pod-{pod}"), true, -100)).collect());
    seen.pods.values_mut().for_each(|facts| facts.created_at = at(-1_000));
    let asked = |pod: i64| Record {
        by_hand: true,
        subject: Subject { check: String::new(), ..subject(&format!("pod-{pod}")) },
        executed_at: None,
        ..record(&format!("pod-{pod}"), pod, Outcome::Pending)
    };
    let history: History = (0..6).map(asked).collect();
    let decision = run(&policy, &seen, &history, 10);
    assert_eq!((decision.execute.len(), decision.remaining_budget), (2, 2));
    assert_eq!(decision.history.in_flight.iter().filter(|one| one.outcome == Outcome::Waiting).count(), 4);
}

#[test]
fn what_has_to_wait_holds_no_ladder_up() {
    let mut policy = ladder(Action::ResetConnections);
    policy.limits.max_unhealthy = MaxUnhealthy::Percent(0);
    let waits = run(&policy, &three(), &asked(Action::RestartPod, "database"), 2);
    assert!(waits.execute.is_empty());
    let next = run(&policy, &three(), &waits.history, 3);
    assert_eq!(next.execute.iter().map(|record| record.by_hand).collect::<Vec<_>>(), [false]);
}

#[test]
fn what_is_pending_leaves_alone_what_people_want_left_alone() {
    let policy = ladder(Action::ResetConnections);
    let pending = run(&policy, &three(), &History::default(), 1).history;
    assert_eq!(run(&policy, &three(), &pending, 2).execute.len(), 1);
    let mut excluded = three();
    excluded.excluded.insert(POD.into());
    assert!(run(&policy, &excluded, &pending, 2).execute.is_empty());
    let paused = Settings { pause_requests: vec!["drill".into()], ..policy };
    assert!(run(&paused, &three(), &pending, 2).execute.is_empty());
}

#[test]
fn no_ladder_counts_what_a_person_asked_for() {
    let policy = ladder(Action::ResetConnections);
    let failed = Record { by_hand: true, ..record(POD, -100, Outcome::Failed) };
    let decision = run(&policy, &three(), &[failed].into_iter().collect(), 1);
    assert_eq!((decision.execute.len(), decision.execute[0].index), (1, 0));
}

#[test]
fn what_a_person_deleted_comes_back_after_the_cooldown_and_not_as_the_next_step() {
    let settings = settings();
    let first = run(&settings, &three(), &History::default(), 1);
    let mut deleted = first.history.in_flight[0].clone();
    (deleted.withdrawn, deleted.outcome, deleted.finished_at) = (true, Outcome::Cancelled, Some(at(5)));
    let history: History = [deleted].into_iter().collect();
    let held = run(&settings, &three(), &history, 6);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::Cooldown));
    let again = run(&settings, &three(), &history, 65);
    assert_eq!((again.execute[0].index, again.execute[0].after.as_ref()), (0, Some(&first.execute[0].slot)));
}

/// The reset did not help, and a person takes the restart back: that is not asked for again at once either.
#[test]
fn a_later_step_that_a_person_deleted_waits_for_the_cooldown_too() {
    let settings = settings();
    let failed = run(&settings, &three(), &execute_step(&run(&settings, &three(), &History::default(), 1), at(1)), 16);
    assert_eq!(failed.execute[0].index, 1);
    let mut history = failed.history.clone();
    let second = &mut history.in_flight[0];
    (second.withdrawn, second.outcome, second.finished_at) = (true, Outcome::Cancelled, Some(at(20)));
    let history: History = history.all().cloned().collect();
    let held = run(&settings, &three(), &history, 21);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::Cooldown));
    assert_eq!(run(&settings, &three(), &history, 80).execute[0].index, 1);
}

/// When a person deletes what was over, its place is free again, and what takes it is another intent.
#[test]
fn an_id_never_comes_again() {
    let settings = settings();
    let first = run(&settings, &three(), &History::default(), 1);
    let again = run(&settings, &three(), &History::default(), 2);
    assert_eq!(first.execute[0].slot, again.execute[0].slot);
    assert_ne!(first.execute[0].id, again.execute[0].id);
}

#[test]
fn two_operators_that_know_the_same_want_the_same_place() {
    let settings = settings();
    let one = run(&settings, &three(), &History::default(), 1);
    let mut later = three();
    later.checks[0].since = at(7);
    let other = run(&settings, &later, &History::default(), 9);
    assert_eq!(one.execute[0].slot, other.execute[0].slot, "though they saw the failure begin at another time");
    let history = run(
        &settings,
        &observed(vec![check(POD, true, 9), check("b", true, 9), check("c", true, 9)]),
        &execute_step(&one, at(1)),
        20,
    )
    .history;
    let next = run(
        &settings,
        &observed(vec![check(POD, false, 100), check("b", true, 9), check("c", true, 9)]),
        &history,
        200,
    );
    assert_ne!(next.execute[0].slot, one.execute[0].slot);
    assert_eq!(next.execute[0].after.as_ref(), Some(&one.execute[0].slot));
}
