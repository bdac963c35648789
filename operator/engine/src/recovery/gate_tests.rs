//! Every gate with every action: which action it holds back, and which gate is named when two are closed. The order is that of
//! `docs/recovery.md`.

use super::rollout_tests::{bad_rollout, rollout};
use super::tests::{POD, at, check, observed, record, run, settings, step};
use super::*;

/// What a gate is closed by, for the pod that fails.
type Close = fn(&mut Settings, &mut Observed, &mut History, &str);

use Action::{ResetConnections, RestartPod, Rollback, RolloutRestart, RunCleanupJob, TrimMemory};

/// The gates in the order in which they are asked, what closes each, and the actions that it lets pass.
const GATES: [(Gate, Close, &[Action]); 15] = [
    (Gate::Suspended, |s, _, _, _| s.suspended = true, &[]),
    (Gate::Paused, |s, _, _, _| s.pause_requests = vec!["on-sale tonight".into()], &[]),
    (Gate::Excluded, |_, o, _, pod| _ = o.excluded.insert(pod.into()), &[]),
    (Gate::ObserverStale, |_, o, _, _| o.observer_stale = Some("pods: nothing heard for 90 s".into()), &[]),
    (Gate::StartingUp, |_, o, _, pod| o.pods.get_mut(pod).unwrap().was_ready = false, &[Rollback]),
    (Gate::RolloutInProgress, |_, o, _, _| _ = o.rolling_out.insert("booking".into()), &[Rollback]),
    (
        Gate::DependencyIsTheCause,
        |_, o, _, _| _ = o.bad_dependencies.insert(("booking".into(), "database".into()), "it is away".into()),
        &[],
    ),
    (
        Gate::ActionNotSupported,
        |_, o, _, _| o.rollouts.get_mut("booking").unwrap().held = Some("its rollout is paused".into()),
        &[TrimMemory, ResetConnections, RunCleanupJob, RestartPod],
    ),
    (
        Gate::RollbackRefused,
        |_, o, _, _| o.rollouts.get_mut("booking").unwrap().undo = Err("argocd owns its template".into()),
        &[TrimMemory, ResetConnections, RunCleanupJob, RestartPod, RolloutRestart],
    ),
    (
        Gate::Cooldown,
        |_, o, h, pod| {
            let failing = o.checks.iter().find(|check| check.subject.pod.as_ref().is_some_and(|one| one.uid == pod));
            let subject = failing.unwrap().subject.clone();
            h.recent.push(Record { subject, healed_at: Some(at(-2)), ..record(pod, -9, Outcome::Succeeded) });
        },
        &[],
    ),
    (Gate::StormActive, |_, o, _, _| o.begun_in_namespace = (0..20).map(|second| at(-second)).collect(), &[]),
    (Gate::BudgetExhausted, |s, _, _, _| s.limits.budget_actions = 0, &[]),
    (
        Gate::AllPodsUnhealthy,
        |_, o, _, _| o.pods.values_mut().for_each(|pod| pod.ready = false),
        &[TrimMemory, ResetConnections, RunCleanupJob],
    ),
    (
        Gate::TooManyUnhealthy,
        |s, _, _, _| s.limits.max_unhealthy = MaxUnhealthy::Count(0),
        &[TrimMemory, ResetConnections, RunCleanupJob, Rollback],
    ),
    (
        Gate::OneStepAtATime,
        |_, o, h, _| {
            let other = o.checks.iter().find(|check| check.subject.pod.as_ref().is_some_and(|one| one.uid == "b"));
            let subject = other.unwrap().subject.clone();
            h.in_flight.push(Record { subject, ..record("b", 0, Outcome::Verifying) });
        },
        &[],
    ),
];

/// A pod that fails, by a check of its own, in a workload to which the action may be done.
fn open(action: Action) -> (Settings, Observed, &'static str) {
    let mut settings = settings();
    if action == Rollback {
        settings.ladders = [("restarts".to_owned(), vec![step(action, 60_000)])].into();
        return (settings, bad_rollout(), "new");
    }
    settings.ladders = [("database".to_owned(), vec![step(action, 60_000)])].into();
    let mut four = observed([POD, "b", "c", "d"].map(|uid| check(uid, uid != POD, 0)).to_vec());
    four.watching_since = at(-1_000);
    four.rollouts.insert("booking".into(), rollout(None));
    (settings, four, POD)
}

/// The gate that is named when these are closed, and how many actions are begun.
fn held(action: Action, closed: &[Close]) -> (Option<Gate>, usize) {
    let (mut settings, mut observed, pod) = open(action);
    let mut history = History::default();
    for close in closed {
        close(&mut settings, &mut observed, &mut history, pod);
    }
    let decision = run(&settings, &observed, &history, 6);
    let of_pod = |held: &&Withheld| held.subject.pod.as_ref().is_some_and(|one| one.uid == pod);
    (decision.withheld.iter().find(of_pod).map(|held| held.gate), decision.execute.len())
}

#[test]
fn each_gate_holds_back_the_actions_that_it_is_asked_before() {
    for action in Action::ALL.iter().copied() {
        assert_eq!(held(action, &[]), (None, 1), "{action}: all gates are open");
        for (gate, close, passes) in GATES {
            let expected = if passes.contains(&action) { (None, 1) } else { (Some(gate), 0) };
            assert_eq!(held(action, &[close]), expected, "{action} and {gate:?}");
        }
    }
}

#[test]
fn of_two_closed_gates_the_first_is_named() {
    for action in Action::ALL.iter().copied() {
        let closing: Vec<_> = GATES.iter().filter(|(_, _, passes)| !passes.contains(&action)).collect();
        for (place, (first, close, _)) in closing.iter().enumerate() {
            for (second, close_too, _) in &closing[place + 1..] {
                assert_eq!(
                    held(action, &[*close, *close_too]).0,
                    Some(*first),
                    "{action}: {first:?} before {second:?}"
                );
            }
        }
    }
}
