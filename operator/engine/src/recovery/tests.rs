use super::*;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const POD: &str = "pod-uid";

pub(super) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

pub(super) fn subject(uid: &str) -> Subject {
    Subject {
        target: "booking".into(),
        pod: Some(Pod { name: format!("name-{uid}"), uid: uid.into() }),
        check: "database".into(),
    }
}

pub(super) fn step(action: Action, timeout_ms: u64) -> Step {
    let cron_job = (action == Action::RunCleanupJob).then(|| "cleanup".to_owned());
    Step { action, cron_job, timeout_ms }
}

pub(super) fn settings() -> Settings {
    let step = |timeout_ms| step(Action::ResetConnections, timeout_ms);
    Settings {
        ladders: BTreeMap::from([("database".into(), vec![step(15_000), step(60_000)])]),
        limits: Limits {
            max_in_flight: 1,
            cooldown_ms: 60_000,
            budget_actions: 5,
            budget_interval_ms: 600_000,
            max_unhealthy: MaxUnhealthy::Percent(50),
        },
        healthy_delay_ms: 10_000,
        ..Settings::default()
    }
}

pub(super) fn check(uid: &str, healthy: bool, since: i64) -> CheckState {
    CheckState {
        subject: subject(uid),
        healthy,
        since: at(since),
        well_since: healthy.then(|| at(since)),
        seen_at: at(since),
        message: "no answer".into(),
        dependency: Some("database".into()),
        dependency_answers: None,
        began_before: false,
        asked: false,
    }
}

/// A pod that is as old as the story, and ready.
pub(super) fn facts() -> PodFacts {
    PodFacts {
        name: "booking-1".into(),
        target: "booking".into(),
        created_at: at(-100),
        ready: true,
        was_ready: true,
        reported: true,
        instance: None,
        outdated: false,
    }
}

pub(super) fn observed(checks: Vec<CheckState>) -> Observed {
    let pods: BTreeMap<_, _> =
        checks.iter().filter_map(|c| c.subject.pod.as_ref().map(|pod| (pod.uid.clone(), facts()))).collect();
    Observed { wanted: BTreeMap::from([("booking".into(), pods.len())]), pods, checks, ..Observed::default() }
}

/// Carries out whatever a decision asks for, as the operator would.
pub(super) fn execute_step(decision: &Decision, now: Timestamp) -> History {
    let mut history = decision.history.clone();
    for record in &mut history.in_flight {
        if record.outcome == Outcome::Pending {
            record.outcome = Outcome::Verifying;
            record.executed_at = Some(now);
        }
    }
    history
}

pub(super) fn run(settings: &Settings, observed: &Observed, history: &History, second: i64) -> Decision {
    // Every check was heard of just now.
    let mut observed = observed.clone();
    observed.checks.iter_mut().for_each(|check| check.seen_at = at(second));
    decide(settings, &observed, history, "policy", at(second))
}

#[test]
fn heals_a_failing_check_and_verifies_it() {
    let settings = settings();
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    assert_eq!(first.execute.len(), 1);
    assert_eq!(first.execute[0].outcome, Outcome::Pending, "the intent is recorded before it is executed");
    let history = execute_step(&first, at(2));

    let recovering = observed(vec![check(POD, true, 5)]);
    let waiting = run(&settings, &recovering, &history, 14);
    assert_eq!((waiting.execute.len(), waiting.finished.len()), (0, 0));
    assert_eq!(waiting.next_check, Some(at(15)), "healthy since 5, plus the healthy delay of 10 s");
    let done = run(&settings, &recovering, &waiting.history, 15);
    assert_eq!(done.finished[0].outcome, Outcome::Succeeded);
    assert_eq!(done.finished[0].message.as_deref(), Some("healthy for 10 s; recovered 3 s after the action"));
    assert!(done.history.in_flight.is_empty());
}

#[test]
fn an_intent_that_nobody_can_vouch_for_is_carried_out_again_under_its_id() {
    let settings = settings();
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    // The operator died after it wrote the intent; the next one reads the same history.
    let again = run(&settings, &broken, &first.history, 3);
    assert_eq!(again.execute, first.execute);
    assert_eq!(again.history, first.history);
}

#[test]
fn a_pending_intent_is_not_carried_out_once_the_policy_is_suspended_or_runs_dry() {
    let broken = observed(vec![check(POD, false, 0)]);
    let pending = run(&settings(), &broken, &History::default(), 1).history;
    for change in [|s: &mut Settings| s.suspended = true, |s: &mut Settings| s.dry_run = true] {
        let mut settings = settings();
        change(&mut settings);
        assert!(run(&settings, &broken, &pending, 2).execute.is_empty());
        assert_eq!(
            run(&settings, &broken, &pending, 16).finished[0].outcome,
            Outcome::Failed,
            "nothing pends for ever"
        );
    }
}

#[test]
fn a_rung_that_does_not_help_leads_to_the_next_and_then_to_giving_up() {
    let settings = settings();
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    let history = execute_step(&first, at(1));
    let second = run(&settings, &broken, &history, 16);
    assert_eq!(second.finished[0].outcome, Outcome::Failed);
    assert_eq!(second.execute[0].index, 1, "the next step follows at once: the cooldown is between ladders, not steps");
    assert_ne!(second.execute[0].id, first.execute[0].id);
    let given_up = run(&settings, &broken, &execute_step(&second, at(16)), 76);
    assert_eq!(given_up.exhausted, vec![Exhausted { subject: subject(POD), since: at(0) }]);
    assert!(given_up.execute.is_empty());
    let still = run(&settings, &broken, &given_up.history, 3_600);
    assert!(
        still.execute.is_empty() && still.exhausted.len() == 1,
        "giving up is for good, until the check was healthy"
    );
}

#[test]
fn a_new_failure_starts_the_ladder_again_after_the_cooldown() {
    let settings = settings();
    let first = run(&settings, &observed(vec![check(POD, false, 0)]), &History::default(), 1);
    let history = execute_step(&first, at(1));
    let recovering = run(&settings, &observed(vec![check(POD, true, 2)]), &history, 12);
    let broken = observed(vec![check(POD, false, 20)]);
    let held = run(&settings, &broken, &recovering.history, 21);
    assert_eq!((held.withheld[0].gate, held.withheld[0].until), (Gate::Cooldown, Some(at(72))));
    assert_eq!(held.next_check, Some(at(72)));
    let again = run(&settings, &broken, &held.history, 72);
    assert_eq!(again.execute[0].index, 0);
}

/// For how long a pod that starts up is left alone.
enum Held {
    Not,
    UntilAge(i64),
    UntilReady,
}

/// A pod that was never ready, and one of this age.
#[rstest::rstest]
#[case::booting(Action::RestartPod, false, 3, Held::UntilReady)]
#[case::booting_for_hours(Action::RestartPod, false, 9_000, Held::UntilReady)]
#[case::booting_a_reset(Action::ResetConnections, false, 3, Held::UntilReady)]
#[case::young(Action::RestartPod, true, 3, Held::UntilAge(60))]
#[case::young_a_reset(Action::ResetConnections, true, 3, Held::Not)]
#[case::old_enough(Action::RestartPod, true, 60, Held::Not)]
#[case::a_clock_behind(Action::RestartPod, true, -20, Held::UntilAge(60))]
#[case::a_clock_a_year_behind(Action::RestartPod, true, -31_536_000, Held::Not)]
#[case::a_clock_a_year_ahead(Action::RestartPod, true, 31_536_000, Held::Not)]
fn a_pod_that_starts_up_is_left_alone(
    #[case] action: Action,
    #[case] was_ready: bool,
    #[case] age: i64,
    #[case] expected: Held,
) {
    let mut settings = ladder(action);
    settings.startup_grace_ms = 60_000;
    let created_at = at(1_000);
    let mut starting = three();
    let pod = starting.pods.get_mut(POD).unwrap();
    (pod.created_at, pod.was_ready, pod.ready) = (created_at, was_ready, was_ready);
    let decision = run(&settings, &starting, &History::default(), 1_000 + age);
    let held: Vec<_> = decision.withheld.iter().map(|held| (held.gate, held.until)).collect();
    let gates = match expected {
        Held::Not => vec![],
        Held::UntilAge(seconds) => vec![(Gate::StartingUp, Some(at(1_000 + seconds)))],
        Held::UntilReady => vec![(Gate::StartingUp, None)],
    };
    assert_eq!(held, gates);
    assert_eq!(decision.execute.len(), usize::from(gates.is_empty()));
}

type Change = fn(&mut Settings, &mut Observed, &mut History);

#[test]
fn a_closed_gate_holds_the_action() {
    let cases: [(Gate, Change); 10] = [
        (Gate::Suspended, |s, _, _| s.suspended = true),
        (Gate::Paused, |s, _, _| s.pause_requests = vec!["on-sale tonight".into(), "drill".into()]),
        (Gate::Paused, |_, o, _| {
            o.paused.insert("booking".into(), "we look at it".into());
        }),
        (Gate::Excluded, |_, o, _| {
            o.excluded.insert(POD.into());
        }),
        (Gate::StormActive, |_, o, _| o.begun_in_namespace = (0..20).map(|second| at(-second)).collect()),
        (Gate::RolloutInProgress, |_, o, _| {
            o.rolling_out.insert("booking".into());
        }),
        (Gate::DependencyIsTheCause, |_, o, _| {
            o.bad_dependencies.insert(("booking".into(), "database".into()), "its circuit is open".into());
        }),
        (Gate::ActionNotSupported, |_, o, _| o.checks[0].subject.pod = None),
        (Gate::BudgetExhausted, |s, _, _| s.limits.budget_actions = 0),
        (Gate::OneStepAtATime, |_, o, h| {
            o.checks.push(check("other", true, 0));
            o.pods.insert("other".into(), facts());
            h.in_flight.push(record("other", 0, Outcome::Verifying));
        }),
    ];
    for (gate, change) in cases {
        let (mut settings, mut observed, mut history) =
            (settings(), observed(vec![check(POD, false, 0)]), History::default());
        change(&mut settings, &mut observed, &mut history);
        let decision = run(&settings, &observed, &history, 1);
        assert!(decision.execute.is_empty(), "{gate:?}");
        assert_eq!(decision.withheld.iter().map(|held| held.gate).collect::<Vec<_>>(), [gate]);
    }
}

/// The database is bad, by the circuits of most pods; a check of its own says what a fresh connection says.
#[rstest::rstest]
#[case::nobody_tried(None, Action::ResetConnections, 0, Some(Gate::DependencyIsTheCause))]
#[case::it_does_not_answer(Some(false), Action::ResetConnections, 0, Some(Gate::DependencyIsTheCause))]
#[case::it_answers(Some(true), Action::ResetConnections, 3, None)]
#[case::it_answers_and_a_restart_would_take_all(Some(true), Action::RestartPod, 0, Some(Gate::AllPodsUnhealthy))]
fn what_a_fresh_connection_says_stands_above_circuits(
    #[case] answers: Option<bool>,
    #[case] action: Action,
    #[case] begun: usize,
    #[case] gate: Option<Gate>,
) {
    let mut all = observed(["a", "b", "c"].map(|uid| check(uid, false, 0)).to_vec());
    all.checks.iter_mut().for_each(|check| check.dependency_answers = answers);
    all.bad_dependencies.insert(("booking".into(), "database".into()), "its circuit is open in 3 of 3 pods".into());
    let decision = run(&ladder(action), &all, &History::default(), 1);
    assert_eq!(decision.execute.len(), begun, "in all pods at once, or in none");
    assert_eq!(decision.withheld.first().map(|held| held.gate), gate);
}

/// The database was away and is back; the first word of a pod may be that a fresh connection answers while its own do not yet.
#[rstest::rstest]
#[case::back(true, true, 0)]
#[case::still_away(true, false, 3)]
#[case::connections_that_hang(false, true, 3)]
fn pods_have_the_time_to_notice_that_a_dependency_is_back(
    #[case] away: bool,
    #[case] over: bool,
    #[case] begun: usize,
) {
    let mut all = observed(["a", "b", "c"].map(|uid| check(uid, false, 0)).to_vec());
    all.checks.iter_mut().for_each(|check| check.dependency_answers = Some(true));
    let outage = Outage { evidence: "it was away".into(), away, over };
    all.bad_dependencies.insert(("booking".into(), "database".into()), outage);
    let decision = run(&ladder(Action::ResetConnections), &all, &History::default(), 1);
    assert_eq!(decision.execute.len(), begun);
}

/// 3 actions within 60 s are a storm, which then lasts 100 s.
#[rstest::rstest]
#[case::too_few(&[0, 10], 20, None)]
#[case::three(&[0, 10, 59], 60, Some(159))]
#[case::just_not_within_a_minute(&[0, 10, 60], 61, None)]
#[case::in_any_order(&[59, 0, 10], 60, Some(159))]
#[case::the_last_that_made_it_one(&[0, 10, 20, 69], 71, Some(169))]
#[case::one_more_does_not_make_it_longer(&[0, 10, 20, 90], 91, Some(120))]
#[case::it_is_over(&[0, 10, 59], 159, None)]
#[case::from_the_future(&[0, 10, 9_999_999], 20, None)]
fn a_storm_lasts_from_the_action_that_made_it_one(
    #[case] begun: &[i64],
    #[case] now: i64,
    #[case] expected: Option<i64>,
) {
    let storm = Storm { actions: 3, interval_ms: 60_000, cooldown_ms: 100_000 };
    let begun: Vec<_> = begun.iter().map(|second| at(*second)).collect();
    assert_eq!(storm.until(&begun, at(now)), expected.map(at));
    assert_eq!(Storm { actions: 0, ..storm }.until(&begun, at(now)), None, "it is switched off");
}

#[test]
fn the_first_closed_gate_is_the_one_that_is_named() {
    let mut settings = settings();
    settings.suspended = true;
    settings.limits.budget_actions = 0;
    let decision = run(&settings, &observed(vec![check(POD, false, 0)]), &History::default(), 1);
    assert_eq!(decision.withheld[0].gate, Gate::Suspended);
}

pub(super) fn record(uid: &str, started: i64, outcome: Outcome) -> Record {
    Record {
        id: format!("{uid}-{started}"),
        slot: format!("{uid}-{started}"),
        after: None,
        by_hand: false,
        withdrawn: false,
        subject: subject(uid),
        instance: None,
        step: step(Action::ResetConnections, 15_000),
        index: 0,
        steps: 2,
        failed_at: at(started),
        started_at: at(started),
        executed_at: Some(at(started)),
        finished_at: matches!(outcome, Outcome::Succeeded | Outcome::Failed).then(|| at(started + 1)),
        outcome,
        healed_at: None,
        before: None,
        successor: None,
        dry_run: false,
        message: None,
    }
}

#[test]
fn the_budget_frees_itself_as_actions_grow_old() {
    let mut settings = settings();
    settings.limits.cooldown_ms = 0;
    let history = History {
        recent: (0..5).map(|n| record(POD, 10 * n, Outcome::Succeeded)).rev().collect(),
        ..History::default()
    };
    let broken = observed(vec![check(POD, false, 100)]);
    let held = run(&settings, &broken, &history, 101);
    assert_eq!((held.withheld[0].gate, held.withheld[0].until), (Gate::BudgetExhausted, Some(at(600))));
    assert_eq!(held.remaining_budget, 0);
    assert_eq!(run(&settings, &broken, &history, 600).execute.len(), 1);
}

#[test]
fn dry_run_says_once_what_would_be_done_and_does_nothing() {
    let mut settings = settings();
    settings.dry_run = true;
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    assert!(first.execute.is_empty());
    assert!(first.history.in_flight[0].dry_run);
    let second = run(&settings, &broken, &first.history, 2);
    assert_eq!(second.history, first.history, "the same intent is not told twice");
    let escalated = run(&settings, &broken, &second.history, 16);
    assert_eq!(escalated.history.in_flight[0].index, 1, "it shows what really would follow");
    settings.dry_run = false;
    let real = run(&settings, &broken, &escalated.history, 80);
    assert_eq!(real.execute.len(), 1, "a rehearsal uses up neither ladder nor budget");
    assert_eq!(real.remaining_budget, 4);
}

#[test]
fn a_pod_that_is_gone_ends_its_recovery() {
    let settings = settings();
    let history = History { in_flight: vec![record(POD, 0, Outcome::Verifying)], ..History::default() };
    let decision = run(&settings, &Observed::default(), &history, 1);
    assert_eq!(decision.finished[0].outcome, Outcome::Cancelled);
}

#[test]
fn silence_is_not_health() {
    let settings = settings();
    let mut silent = observed(vec![]);
    silent.pods.insert(POD.into(), facts());
    let history = History { in_flight: vec![record(POD, 0, Outcome::Verifying)], ..History::default() };
    let waiting = run(&settings, &silent, &history, 15);
    assert_eq!((waiting.finished.len(), waiting.next_check), (0, Some(at(16))), "nobody can say what came of it");
    assert_eq!(run(&settings, &silent, &history, 45).finished[0].outcome, Outcome::Failed);
}

#[test]
fn an_operator_that_was_blind_looks_before_it_judges() {
    let settings = settings();
    let history = History { in_flight: vec![record(POD, 0, Outcome::Verifying)], ..History::default() };
    // The deadline passed at 15. What was heard before says nothing of it.
    let mut stale = observed(vec![check(POD, false, 0)]);
    stale.checks[0].seen_at = at(14);
    let waiting = decide(&settings, &stale, &history, "policy", at(20));
    assert!(waiting.finished.is_empty() && waiting.next_check == Some(at(21)));
    assert_eq!(run(&settings, &stale, &history, 20).finished[0].outcome, Outcome::Failed, "it was heard again");
    // A new leader begins to look at 100, and hears at 101 that all is well.
    let mut new = observed(vec![]);
    new.pods.insert(POD.into(), facts());
    new.watching_since = at(100);
    let waiting = run(&settings, &new, &history, 100);
    assert!(waiting.finished.is_empty() && waiting.next_check == Some(at(101)));
    new.checks = vec![check(POD, true, 101)];
    assert_eq!(run(&settings, &new, &history, 111).finished[0].outcome, Outcome::Succeeded);
}

#[test]
fn a_pending_intent_is_tried_by_the_next_leader_once_the_check_is_heard_to_fail() {
    let settings = settings();
    let pending = run(&settings, &observed(vec![check(POD, false, 0)]), &History::default(), 1).history;
    let mut new = observed(vec![]);
    new.pods.insert(POD.into(), facts());
    new.watching_since = at(3_600);
    let silent = run(&settings, &new, &pending, 3_601);
    assert!(silent.execute.is_empty() && silent.finished.is_empty() && silent.next_check == Some(at(3_630)));
    new.checks = vec![check(POD, false, 0)];
    assert_eq!(run(&settings, &new, &pending, 3_602).execute, pending.in_flight);
}

#[test]
fn a_pod_that_got_well_meanwhile_is_not_evicted_for_what_was_intended_once() {
    let settings = ladder(Action::RestartPod);
    let pending = run(&settings, &three(), &History::default(), 1).history;
    let mut well = three();
    well.checks[0] = check(POD, true, 5);
    let decision = run(&settings, &well, &pending, 6);
    assert!(decision.execute.is_empty());
    assert_eq!(decision.finished[0].outcome, Outcome::Cancelled);
}

#[test]
fn an_action_is_for_the_process_that_was_meant() {
    let settings = settings();
    let mut broken = observed(vec![check(POD, false, 0)]);
    let pod = |o: &mut Observed, instance: &str| {
        o.pods.get_mut(POD).unwrap().instance = Some(instance.to_owned());
    };
    pod(&mut broken, "one");
    let first = run(&settings, &broken, &History::default(), 1);
    assert_eq!(first.execute[0].instance.as_deref(), Some("one"));
    pod(&mut broken, "two");
    let after = run(&settings, &broken, &first.history, 2);
    assert_eq!(after.finished[0].outcome, Outcome::Cancelled, "nobody knows whether the first process did it");
    let verifying = execute_step(&first, at(1));
    assert!(run(&settings, &broken, &verifying, 2).finished.is_empty(), "it was done; only the check counts now");
}

/// A ladder with one step for the check `database`.
pub(super) fn ladder(action: Action) -> Settings {
    let mut settings = settings();
    settings.ladders.insert("database".into(), vec![step(action, 60_000)]);
    settings
}

/// Three pods; the first one fails.
pub(super) fn three() -> Observed {
    observed(vec![check(POD, false, 0), check("b", true, -100), check("c", true, -100)])
}

/// The first pod is gone and another one, with this state, has its place.
pub(super) fn replaced(healthy: bool, since: i64, ready: bool) -> Observed {
    let mut observed = observed(vec![check("new", healthy, since), check("b", true, -100), check("c", true, -100)]);
    let new = observed.pods.get_mut("new").unwrap();
    (new.created_at, new.ready, new.was_ready) = (at(2), ready, ready);
    observed
}

/// A stuck rollout with a surge pod that is not ready: of the three that are wanted, one is missing.
#[test]
fn a_pod_that_was_made_beside_those_that_are_wanted_counts_once() {
    let settings = ladder(Action::RestartPod);
    let mut surge = three();
    surge.pods.insert("surge".into(), PodFacts { ready: false, was_ready: false, ..facts() });
    assert_eq!(run(&settings, &surge, &History::default(), 1).execute.len(), 1);
}

#[test]
fn a_new_leader_looks_again_when_it_has_waited_long_enough_for_silent_pods() {
    let settings = ladder(Action::RestartPod);
    let mut started = three();
    started.watching_since = at(0);
    started.pods.get_mut("b").unwrap().reported = false;
    started.checks.remove(1);
    let held = run(&settings, &started, &History::default(), 2);
    assert_eq!((held.withheld[0].gate, held.next_check), (Gate::TooManyUnhealthy, Some(at(30))));
    assert_eq!(run(&settings, &started, &held.history, 30).execute.len(), 1);
}

#[test]
fn a_ladder_that_was_edited_begins_with_its_first_step() {
    let settings = ladder(Action::RestartPod);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let edited = run(&ladder(Action::ResetConnections), &three(), &waiting, 10);
    assert_eq!(edited.finished[0].outcome, Outcome::Cancelled);
    assert_eq!(edited.execute.iter().map(|act| act.step.action).collect::<Vec<_>>(), [Action::ResetConnections]);
    assert_ne!(edited.execute[0].id, edited.finished[0].id);
}

/// Ten pods whose ladders are used up, and an eleventh that flaps, and whose successor does the same.
#[rstest::rstest]
#[case(Action::ResetConnections)]
#[case(Action::RestartPod)]
fn what_else_is_remembered_frees_no_budget(#[case] action: Action) {
    let mut settings = settings();
    settings.ladders.insert("database".into(), vec![step(action, 1_000); 2]);
    settings.limits.cooldown_ms = 60_000;
    (settings.limits.budget_actions, settings.limits.budget_interval_ms) = (2, 90_000);
    settings.limits.max_unhealthy = MaxUnhealthy::Percent(100);
    settings.healthy_delay_ms = 1_000;
    let exhausted = |n: i64| format!("exhausted-{n}");
    let steps = |n: i64, index: usize| Record {
        index,
        id: format!("{n}-{index}"),
        slot: format!("{n}-{index}"),
        step: step(action, 1_000),
        ..record(&exhausted(n), -1_000 + n, Outcome::Failed)
    };
    let recent = (0..10).flat_map(|n| [steps(n, 1), steps(n, 0)]).collect();
    let mut history = History { recent, ..History::default() };
    let (mut actions, mut pod, mut created_at) = (0, "flaps-0".to_owned(), -100);
    for second in 0..90 {
        let failing = second % 4 < 2;
        let mut checks: Vec<_> = (0..10).map(|n| check(&exhausted(n), false, -1_000 + n)).collect();
        checks.push(check(&pod, !failing, second - second % 2));
        checks.push(check("well", true, -100));
        let mut seen = observed(checks);
        seen.pods.get_mut(&pod).unwrap().created_at = at(created_at);
        let decision = run(&settings, &seen, &history, second);
        history = execute_step(&decision, at(second));
        actions += decision.execute.len();
        if action == Action::RestartPod && !decision.execute.is_empty() {
            (pod, created_at) = (format!("flaps-{actions}"), second + 1);
        }
    }
    assert_eq!(actions, 2);
}

/// Four pods of which one was evicted; nobody makes its successor.
#[test]
fn a_pod_that_is_missing_counts_as_unhealthy() {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.max_in_flight = 2;
    settings.limits.max_unhealthy = MaxUnhealthy::Count(1);
    let mut four = three();
    four.checks.push(check("d", true, -100));
    four.pods.insert("d".into(), facts());
    four.wanted.insert("booking".into(), 4);
    let history = execute_step(&run(&settings, &four, &History::default(), 1), at(2));
    let mut missing = four.clone();
    missing.pods.remove(POD);
    missing.checks.remove(0);
    missing.checks[0] = check("b", false, 5);
    let held = run(&settings, &missing, &history, 6);
    assert!(held.execute.is_empty());
    assert_eq!(held.withheld[0].gate, Gate::TooManyUnhealthy);
    assert!(held.withheld[0].message.starts_with("2 of 4 pods"), "{}", held.withheld[0].message);
    settings.limits.max_unhealthy = MaxUnhealthy::Count(2);
    assert_eq!(run(&settings, &missing, &history, 6).execute.len(), 1, "as many as that may be");

    // However few are left: the share is that of the pods that are wanted.
    settings.limits.max_unhealthy = MaxUnhealthy::Percent(50);
    missing.checks.truncate(1);
    missing.pods.retain(|uid, _| uid == "b");
    let held = run(&settings, &missing, &History::default(), 6);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::AllPodsUnhealthy));
}

#[test]
fn a_rehearsed_restart_is_judged_by_the_check() {
    let mut settings = ladder(Action::RestartPod);
    settings.dry_run = true;
    let rehearsed = run(&settings, &three(), &History::default(), 1);
    let mut well = three();
    well.checks[0] = check(POD, true, 5);
    assert_eq!(run(&settings, &well, &rehearsed.history, 15).finished[0].outcome, Outcome::Succeeded);
}

/// Refuses whatever is asked for, as a disruption budget does.
pub(super) fn refuse(decision: &Decision) -> History {
    let mut history = decision.history.clone();
    for record in history.in_flight.iter_mut().filter(|record| decision.execute.iter().any(|act| act.id == record.id)) {
        record.outcome = Outcome::Waiting;
        record.message = Some("refused".to_owned());
    }
    history
}

#[test]
fn a_refused_eviction_waits_as_long_as_it_takes_and_lets_milder_help_through() {
    let mut settings = ladder(Action::RestartPod);
    settings.ladders.insert("memory".into(), vec![step(Action::ResetConnections, 15_000)]);
    settings.limits.max_unhealthy = MaxUnhealthy::Percent(100);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let hours = run(&settings, &three(), &waiting, 7_200);
    assert_eq!(hours.execute.len(), 1, "it is asked for again");
    assert_eq!(hours.execute[0].id, waiting.in_flight[0].id);
    assert_eq!(hours.next_check, Some(at(7_205)));

    let mut more = three();
    more.checks
        .push(CheckState { subject: Subject { check: "memory".into(), ..subject("b") }, ..check("b", false, 5) });
    let helped = run(&settings, &more, &waiting, 10);
    assert_eq!(helped.execute.len(), 1);
    assert_eq!(helped.execute[0].subject.check, "memory");
    assert_eq!(helped.withheld[0].gate, Gate::OneStepAtATime, "meanwhile the eviction is not asked for");

    let mut well = three();
    well.checks[0] = check(POD, true, 8);
    let cancelled = run(&settings, &well, &waiting, 9);
    assert_eq!(cancelled.finished[0].outcome, Outcome::Cancelled);
    assert!(cancelled.execute.is_empty());
}

#[test]
fn a_new_leader_hears_all_pods_before_it_takes_one_away() {
    let settings = ladder(Action::RestartPod);
    let mut started = three();
    started.watching_since = at(0);
    for uid in ["b", "c"] {
        started.pods.get_mut(uid).unwrap().reported = false;
    }
    started.checks.truncate(1);
    let held = run(&settings, &started, &History::default(), 1);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::AllPodsUnhealthy));
    started.pods.get_mut("b").unwrap().reported = true;
    let held = run(&settings, &started, &History::default(), 1);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::TooManyUnhealthy));
    assert_eq!(
        run(&settings, &started, &History::default(), 30).execute.len(),
        1,
        "a silent pod holds nobody up for ever"
    );
}

#[test]
fn an_eviction_that_another_leader_began_goes_through_the_gates_again() {
    let settings = ladder(Action::RestartPod);
    let pending = run(&settings, &three(), &History::default(), 1).history;
    assert_eq!(run(&settings, &three(), &pending, 2).execute.len(), 1);
    let mut rolling = three();
    rolling.rolling_out.insert("booking".into());
    assert!(run(&settings, &rolling, &pending, 2).execute.is_empty());
    let edited = run(&ladder(Action::ResetConnections), &three(), &pending, 2);
    assert_eq!(edited.finished[0].outcome, Outcome::Cancelled, "the policy no longer has this step");
}

#[test]
fn a_waiting_eviction_keeps_no_help_from_younger_pods() {
    let settings = ladder(Action::RestartPod);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let mut grown = three();
    grown.checks.push(check("younger", false, 100));
    grown.pods.insert("younger".into(), PodFacts { created_at: at(50), ..facts() });
    grown.pods.insert("fifth".into(), facts());
    grown.wanted.insert("booking".into(), 5);
    let decision = run(&settings, &grown, &waiting, 102);
    let younger = decision.history.in_flight.iter().any(|record| record.subject == subject("younger"));
    assert!(younger, "{decision:?}");
}

#[test]
fn each_refused_eviction_is_asked_for_in_its_turn() {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.max_unhealthy = MaxUnhealthy::Count(3);
    let both =
        observed(vec![check("a", false, 0), check("b", false, 0), check("c", true, -100), check("d", true, -100)]);
    let mut history = refuse(&run(&settings, &both, &History::default(), 1));
    history = refuse(&run(&settings, &both, &history, 2));
    assert_eq!(history.in_flight.len(), 2);
    let asked: BTreeSet<_> =
        (10..20).flat_map(|second| run(&settings, &both, &history, second).execute).map(|record| record.id).collect();
    assert_eq!(asked.len(), 2);
}

#[test]
fn a_refused_eviction_ends_when_the_policy_drops_its_step() {
    let settings = ladder(Action::RestartPod);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let decision = run(&ladder(Action::ResetConnections), &three(), &waiting, 10);
    assert_eq!(decision.finished[0].outcome, Outcome::Cancelled);
    assert!(decision.execute.iter().all(|record| record.step.action == Action::ResetConnections));
}

#[test]
fn a_refused_eviction_passes_the_gates_again() {
    let settings = ladder(Action::RestartPod);
    let waiting = refuse(&run(&settings, &three(), &History::default(), 1));
    let mut rolling = three();
    rolling.rolling_out.insert("booking".into());
    let held = run(&settings, &rolling, &waiting, 10);
    assert_eq!((held.execute.len(), held.withheld[0].gate), (0, Gate::RolloutInProgress));
    assert!(held.next_check.is_some(), "and is looked at again");
}

#[rstest::rstest]
#[case::one_pod(1, 1, MaxUnhealthy::Percent(50), None)]
#[case::none_allowed(1, 1, MaxUnhealthy::Percent(0), Some(Gate::TooManyUnhealthy))]
#[case::half_of_two(2, 1, MaxUnhealthy::Percent(50), None)]
#[case::both_of_two(2, 2, MaxUnhealthy::Percent(50), Some(Gate::TooManyUnhealthy))]
#[case::both_of_two_allowed(2, 2, MaxUnhealthy::Percent(100), None)]
#[case::one_of_three(3, 1, MaxUnhealthy::Percent(50), None)]
#[case::two_of_three(3, 2, MaxUnhealthy::Percent(50), Some(Gate::TooManyUnhealthy))]
#[case::two_of_three_by_count(3, 2, MaxUnhealthy::Count(2), None)]
#[case::all_of_three(3, 3, MaxUnhealthy::Percent(100), Some(Gate::AllPodsUnhealthy))]
fn a_pod_is_restarted_only_while_enough_others_are_well(
    #[case] pods: usize,
    #[case] failing: usize,
    #[case] max_unhealthy: MaxUnhealthy,
    #[case] gate: Option<Gate>,
) {
    let mut settings = ladder(Action::RestartPod);
    settings.limits.max_unhealthy = max_unhealthy;
    let checks = (0..pods).map(|n| check(&format!("pod-{n}"), n >= failing, 0)).collect();
    let decision = run(&settings, &observed(checks), &History::default(), 1);
    assert_eq!(decision.execute.len(), usize::from(gate.is_none()));
    assert_eq!(
        decision.withheld.first().map(|held| held.gate),
        gate.or_else(|| (failing > 1).then_some(Gate::OneStepAtATime))
    );
    settings.ladders.insert("database".into(), vec![step(Action::ResetConnections, 15_000)]);
    let checks = (0..pods).map(|n| check(&format!("pod-{n}"), n >= failing, 0)).collect();
    assert_eq!(run(&settings, &observed(checks), &History::default(), 1).execute.len(), 1, "a reset takes no pod away");
}

/// The check of the whole workload fails.
fn inconsistent(healthy: bool, since: i64) -> Observed {
    let mut observed = three();
    observed.checks = vec![check(POD, healthy, since)];
    observed.checks[0].subject.pod = None;
    observed
}

#[test]
fn a_cleanup_job_is_awaited_and_then_the_check_decides() {
    let settings = ladder(Action::RunCleanupJob);
    let first = run(&settings, &inconsistent(false, 0), &History::default(), 1);
    assert_eq!(first.execute[0].step.cron_job.as_deref(), Some("cleanup"));
    let history = execute_step(&first, at(2));
    let id = first.execute[0].id.clone();
    let with = |mut observed: Observed, state| {
        observed.jobs.insert(id.clone(), Job { created_at: at(2), state });
        observed
    };
    let running = with(inconsistent(true, 3), JobState::Running);
    assert!(run(&settings, &running, &history, 14).finished.is_empty(), "the Job is not over");
    let complete = with(inconsistent(true, 3), JobState::Complete);
    assert_eq!(run(&settings, &complete, &history, 14).finished[0].outcome, Outcome::Succeeded);
    let useless = with(inconsistent(false, 0), JobState::Complete);
    assert!(run(&settings, &useless, &history, 14).finished.is_empty(), "it may need a moment");
    assert_eq!(run(&settings, &useless, &history, 62).finished[0].outcome, Outcome::Failed);
    let failed = run(&settings, &with(inconsistent(false, 0), JobState::Failed("exit code 1".into())), &history, 14);
    assert_eq!(failed.finished[0].outcome, Outcome::Failed, "at once");
    assert_eq!(failed.finished[0].message.as_deref(), Some("the Job failed: exit code 1"));
}

#[test]
fn a_job_that_nobody_wrote_down_is_found_also_after_its_time() {
    let settings = ladder(Action::RunCleanupJob);
    let first = run(&settings, &inconsistent(false, 0), &History::default(), 1);
    let mut found = inconsistent(true, 5);
    found.jobs.insert(first.execute[0].id.clone(), Job { created_at: at(2), state: JobState::Complete });
    let decision = run(&settings, &found, &first.history, 3_600);
    assert!(decision.execute.is_empty());
    assert_eq!(decision.finished[0].outcome, Outcome::Succeeded);
}

/// A time that somebody wrote into a status is no reason to fail, however far away it is.
#[test]
fn no_time_in_a_record_makes_a_decision_fail() {
    let settings = settings();
    let observed = observed(vec![check(POD, false, 1)]);
    let first = run(&settings, &observed, &History::default(), 1);
    let extremes = [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX];
    for (a, b) in extremes.into_iter().flat_map(|a| extremes.map(|b| (a, b))) {
        for outcome in [Outcome::Pending, Outcome::Waiting, Outcome::Verifying, Outcome::Succeeded, Outcome::Failed] {
            let mut record = first.history.in_flight[0].clone();
            (record.started_at, record.failed_at, record.outcome) = (a, b, outcome);
            (record.executed_at, record.finished_at) = (Some(b), Some(a));
            let in_flight = History { in_flight: vec![record.clone()], ..History::default() };
            let recent = History { recent: vec![record], ..History::default() };
            for history in [in_flight, recent] {
                for now in [Timestamp::MIN, at(2), Timestamp::MAX] {
                    decide(&settings, &observed, &history, "policy", now);
                }
            }
        }
    }
}

#[test]
fn a_record_from_the_future_is_kept_and_not_counted() {
    let settings = settings();
    let observed = observed(vec![check(POD, false, 1)]);
    let mut history = run(&settings, &observed, &History::default(), 1).history;
    history
        .recent
        .push(Record { executed_at: Some("9999-12-30T21:59:00Z".parse().unwrap()), ..history.in_flight[0].clone() });
    let mut early = history.clone();
    history.set_impossible_aside(at(2));
    assert_eq!((history.in_flight.len(), history.recent.len(), history.aside.len()), (1, 0, 1));
    early.set_impossible_aside(at(-3_700));
    assert_eq!(early.aside.len(), 2, "an hour ahead is too far");
    // What follows it has another place: that one is taken.
    let again = run(&settings, &observed, &early, 2);
    assert_ne!(again.execute[0].slot, early.aside[0].slot);
    assert_eq!(again.execute[0].after.as_ref(), Some(&early.aside[0].slot));
}

#[test]
fn nothing_is_begun_on_a_view_that_is_too_old() {
    let settings = settings();
    let stale = Observed {
        observer_stale: Some("pods were last heard 100 s ago".into()),
        ..observed(vec![check(POD, false, 1)])
    };
    let decision = run(&settings, &stale, &History::default(), 1);
    assert!(decision.execute.is_empty());
    assert_eq!(decision.withheld[0].gate, Gate::ObserverStale);
}
