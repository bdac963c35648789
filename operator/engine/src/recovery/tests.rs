use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const POD: &str = "pod-uid";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

fn subject(uid: &str) -> Subject {
    Subject {
        target: "booking".into(),
        pod: Some(Pod { name: format!("name-{uid}"), uid: uid.into() }),
        check: "database".into(),
    }
}

fn settings() -> Settings {
    let step = |timeout_ms| Step { action: Action::ResetConnections, timeout_ms };
    Settings {
        ladders: BTreeMap::from([("database".into(), vec![step(15_000), step(60_000)])]),
        limits: Limits { max_in_flight: 1, cooldown_ms: 60_000, budget_actions: 5, budget_interval_ms: 600_000 },
        healthy_delay_ms: 10_000,
        suspended: false,
        dry_run: false,
    }
}

fn check(uid: &str, healthy: bool, since: i64) -> CheckState {
    CheckState {
        subject: subject(uid),
        healthy,
        since: at(since),
        message: "no answer".into(),
        dependency: Some("database".into()),
    }
}

fn observed(checks: Vec<CheckState>) -> Observed {
    Observed {
        pods: checks.iter().filter_map(|c| c.subject.pod.as_ref().map(|pod| pod.uid.clone())).collect(),
        checks,
        supported: BTreeSet::from([Action::ResetConnections]),
        ..Observed::default()
    }
}

/// Carries out whatever a decision asks for, as the operator would.
fn carry_out(decision: &Decision, now: Timestamp) -> History {
    let mut history = decision.history.clone();
    for record in &mut history.in_flight {
        if record.outcome == Outcome::Pending {
            record.outcome = Outcome::Verifying;
            record.acted_at = Some(now);
        }
    }
    history
}

fn run(settings: &Settings, observed: &Observed, history: &History, second: i64) -> Decision {
    decide(settings, observed, history, "policy", at(second))
}

#[test]
fn heals_a_failing_check_and_verifies_it() {
    let settings = settings();
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    assert_eq!(first.act.len(), 1);
    assert_eq!(first.act[0].outcome, Outcome::Pending, "the intent is recorded before it is carried out");
    let history = carry_out(&first, at(2));

    let healed = observed(vec![check(POD, true, 5)]);
    let waiting = run(&settings, &healed, &history, 14);
    assert_eq!((waiting.act.len(), waiting.finished.len()), (0, 0));
    assert_eq!(waiting.next_check, Some(at(15)), "healthy since 5, plus the healthy delay of 10 s");
    let done = run(&settings, &healed, &waiting.history, 15);
    assert_eq!(done.finished[0].outcome, Outcome::Succeeded);
    assert_eq!(done.finished[0].message.as_deref(), Some("healthy again 5 s after it failed, and for 10 s since"));
    assert!(done.history.in_flight.is_empty());
}

#[test]
fn an_intent_that_nobody_can_vouch_for_is_carried_out_again_under_its_id() {
    let settings = settings();
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    // The operator died after it wrote the intent; the next one reads the same history.
    let again = run(&settings, &broken, &first.history, 3);
    assert_eq!(again.act, first.act);
    assert_eq!(again.history, first.history);
}

#[test]
fn a_pending_intent_is_not_carried_out_once_the_policy_is_suspended_or_runs_dry() {
    let broken = observed(vec![check(POD, false, 0)]);
    let pending = run(&settings(), &broken, &History::default(), 1).history;
    for change in [|s: &mut Settings| s.suspended = true, |s: &mut Settings| s.dry_run = true] {
        let mut settings = settings();
        change(&mut settings);
        assert!(run(&settings, &broken, &pending, 2).act.is_empty());
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
    let history = carry_out(&first, at(1));
    let second = run(&settings, &broken, &history, 16);
    assert_eq!(second.finished[0].outcome, Outcome::Failed);
    assert_eq!(second.act[0].index, 1, "the next rung follows at once: the cooldown is between ladders, not rungs");
    assert_ne!(second.act[0].id, first.act[0].id);
    let given_up = run(&settings, &broken, &carry_out(&second, at(16)), 76);
    assert_eq!(given_up.exhausted, vec![Exhausted { subject: subject(POD), since: at(0) }]);
    assert!(given_up.act.is_empty());
    let still = run(&settings, &broken, &given_up.history, 3_600);
    assert!(still.act.is_empty() && still.exhausted.len() == 1, "giving up is for good, until the check was healthy");
}

#[test]
fn a_new_failure_starts_the_ladder_again_after_the_cooldown() {
    let settings = settings();
    let first = run(&settings, &observed(vec![check(POD, false, 0)]), &History::default(), 1);
    let history = carry_out(&first, at(1));
    let healed = run(&settings, &observed(vec![check(POD, true, 2)]), &history, 12);
    let broken = observed(vec![check(POD, false, 20)]);
    let held = run(&settings, &broken, &healed.history, 21);
    assert_eq!((held.withheld[0].gate, held.withheld[0].until), (Gate::Cooldown, Some(at(72))));
    assert_eq!(held.next_check, Some(at(72)));
    let again = run(&settings, &broken, &held.history, 72);
    assert_eq!(again.act[0].index, 0);
}

type Change = fn(&mut Settings, &mut Observed, &mut History);

#[test]
fn a_closed_gate_holds_the_action() {
    let cases: [(Gate, Change); 7] = [
        (Gate::Suspended, |s, _, _| s.suspended = true),
        (Gate::RolloutInProgress, |_, o, _| {
            o.rolling_out.insert("booking".into());
        }),
        (Gate::DependencyIsTheCause, |_, o, _| {
            o.open_on_quorum.insert(("booking".into(), "database".into()), "4 of 4 pods".into());
        }),
        (Gate::ActionNotSupported, |_, o, _| o.supported.clear()),
        (Gate::ActionNotSupported, |_, o, _| o.checks[0].subject.pod = None),
        (Gate::BudgetExhausted, |s, _, _| s.limits.budget_actions = 0),
        (Gate::OneStepAtATime, |_, o, h| {
            o.checks.push(check("other", true, 0));
            o.pods.insert("other".into());
            h.in_flight.push(record("other", 0, Outcome::Verifying));
        }),
    ];
    for (gate, change) in cases {
        let (mut settings, mut observed, mut history) =
            (settings(), observed(vec![check(POD, false, 0)]), History::default());
        change(&mut settings, &mut observed, &mut history);
        let decision = run(&settings, &observed, &history, 1);
        assert!(decision.act.is_empty(), "{gate:?}");
        assert_eq!(decision.withheld.iter().map(|held| held.gate).collect::<Vec<_>>(), [gate]);
    }
}

#[test]
fn the_first_closed_gate_is_the_one_that_is_named() {
    let mut settings = settings();
    settings.suspended = true;
    settings.limits.budget_actions = 0;
    let decision = run(&settings, &observed(vec![check(POD, false, 0)]), &History::default(), 1);
    assert_eq!(decision.withheld[0].gate, Gate::Suspended);
}

fn record(uid: &str, started: i64, outcome: Outcome) -> Record {
    Record {
        id: format!("{uid}-{started}"),
        subject: subject(uid),
        step: Step { action: Action::ResetConnections, timeout_ms: 15_000 },
        index: 0,
        steps: 2,
        failed_at: at(started),
        started_at: at(started),
        acted_at: Some(at(started)),
        finished_at: matches!(outcome, Outcome::Succeeded | Outcome::Failed).then(|| at(started + 1)),
        outcome,
        dry_run: false,
        message: None,
    }
}

#[test]
fn the_budget_frees_itself_as_actions_grow_old() {
    let mut settings = settings();
    settings.limits.cooldown_ms = 0;
    let history =
        History { in_flight: vec![], recent: (0..5).map(|n| record(POD, 10 * n, Outcome::Succeeded)).rev().collect() };
    let broken = observed(vec![check(POD, false, 100)]);
    let held = run(&settings, &broken, &history, 101);
    assert_eq!((held.withheld[0].gate, held.withheld[0].until), (Gate::BudgetExhausted, Some(at(600))));
    assert_eq!(held.remaining_budget, 0);
    assert_eq!(run(&settings, &broken, &history, 600).act.len(), 1);
}

#[test]
fn dry_run_says_once_what_would_be_done_and_does_nothing() {
    let mut settings = settings();
    settings.dry_run = true;
    let broken = observed(vec![check(POD, false, 0)]);
    let first = run(&settings, &broken, &History::default(), 1);
    assert!(first.act.is_empty());
    assert!(first.history.in_flight[0].dry_run);
    let second = run(&settings, &broken, &first.history, 2);
    assert_eq!(second.history, first.history, "the same intent is not told twice");
    let escalated = run(&settings, &broken, &second.history, 16);
    assert_eq!(escalated.history.in_flight[0].index, 1, "it shows what really would follow");
    settings.dry_run = false;
    let real = run(&settings, &broken, &escalated.history, 80);
    assert_eq!(real.act.len(), 1, "a rehearsal uses up neither ladder nor budget");
    assert_eq!(real.remaining_budget, 4);
}

#[test]
fn a_pod_that_is_gone_ends_its_recovery() {
    let settings = settings();
    let history = History { in_flight: vec![record(POD, 0, Outcome::Verifying)], recent: vec![] };
    let decision = run(&settings, &Observed::default(), &history, 1);
    assert_eq!(decision.finished[0].outcome, Outcome::Cancelled);
}

#[test]
fn silence_is_not_health() {
    let settings = settings();
    let mut silent = observed(vec![]);
    silent.pods.insert(POD.into());
    let history = History { in_flight: vec![record(POD, 0, Outcome::Verifying)], recent: vec![] };
    assert!(run(&settings, &silent, &history, 14).finished.is_empty());
    assert_eq!(run(&settings, &silent, &history, 15).finished[0].outcome, Outcome::Failed);
}

/// A random night: checks flip, time passes, the operator dies between deciding and carrying out.
#[derive(Clone, Debug)]
enum Event {
    Flip(usize),
    Pass(i64),
    Crash,
    Decide,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0usize..4).prop_map(Event::Flip),
        (1i64..90).prop_map(Event::Pass),
        Just(Event::Crash),
        Just(Event::Decide)
    ]
}

proptest! {
    #[test]
    fn limits_hold_whatever_happens(events in proptest::collection::vec(event(), 1..120), dry_run in any::<bool>(), max_in_flight in 1usize..3) {
        let mut settings = settings();
        settings.dry_run = dry_run;
        settings.limits.max_in_flight = max_in_flight;
        let mut checks: Vec<_> = (0..4).map(|n| check(&format!("pod-{n}"), true, 0)).collect();
        let mut history = History::default();
        let mut second = 1;
        let mut started: Vec<(String, Timestamp)> = Vec::new();
        for event in events {
            let mut crash = false;
            match event {
                Event::Flip(n) => {
                    checks[n].healthy = !checks[n].healthy;
                    checks[n].since = at(second);
                }
                Event::Pass(seconds) => second += seconds,
                Event::Crash => crash = true,
                Event::Decide => {}
            }
            let now = at(second);
            let decision = decide(&settings, &observed(checks.clone()), &history, "policy", now);
            prop_assert_eq!(&decision, &decide(&settings, &observed(checks.clone()), &history, "policy", now), "same input, same answer");
            prop_assert!(decision.history.in_flight.len() <= max_in_flight);
            prop_assert!(decision.next_check.is_none_or(|at| at > now));
            prop_assert!(decision.history.in_flight.is_empty() || decision.next_check.is_some(), "nothing is left without a next step");
            prop_assert!(!dry_run || decision.act.is_empty());
            for record in &decision.history.in_flight {
                if !started.iter().any(|(id, _)| *id == record.id) {
                    started.push((record.id.clone(), record.started_at));
                }
            }
            let interval = SignedDuration::from_secs(600);
            prop_assert!(started.iter().filter(|(_, at)| *at + interval > now).count() <= settings.limits.budget_actions);
            let mut ids: Vec<_> = decision.history.in_flight.iter().chain(&decision.history.recent).map(|r| &r.id).collect();
            ids.sort();
            ids.dedup();
            prop_assert_eq!(ids.len(), decision.history.in_flight.len() + decision.history.recent.len(), "no id twice");
            history = if crash { decision.history } else { carry_out(&decision, now) };
        }
    }
}
