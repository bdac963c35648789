use super::*;
use serde_json::{Value, json};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + second).unwrap()
}

const STAGES: &str = r#"{"stages": [
    {"name": "mail", "loadPercent": 80, "flagOverrides": [{"key": "Mail", "variant": "off"}]},
    {"name": "cache", "loadPercent": 90, "flagOverrides": [{"key": "Cache", "variant": "on"}]}
]}"#;

fn policy(degradation: &Value, status: Option<&DegradationStatus>) -> ResiliencePolicy {
    let policy = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": {"name": "booking", "namespace": "n"},
        "spec": {"targetRefs": [{"name": "booking"}], "degradation": degradation},
        "status": {"degradation": status},
    });
    serde_json::from_str(&policy.to_string()).unwrap()
}

fn stages() -> Value {
    serde_json::from_str(STAGES).unwrap()
}

fn fleet(load_percent: u32) -> Vec<Workload> {
    let pod = Reading { ready: true, heard: true, load_percent, ..Reading::default() };
    vec![Workload { name: "booking".into(), pods: vec![pod; 2] }]
}

/// What a test changes of the usual.
struct Case {
    degradation: Value,
    status: Option<DegradationStatus>,
    beyond: Option<Beyond>,
    load: u32,
    second: i64,
    may_change: bool,
    in_force: bool,
    dry_run: bool,
    all: Degradations,
}

fn case() -> Case {
    Case {
        degradation: stages(),
        status: None,
        beyond: None,
        load: 50,
        second: 0,
        may_change: true,
        in_force: true,
        dry_run: false,
        all: Degradations::new(),
    }
}

impl Case {
    fn next(&self) -> Outcome {
        let policy = policy(&self.degradation, self.status.as_ref());
        let inputs = Inputs {
            policy: &policy,
            may_change: self.may_change,
            in_force: self.in_force,
            dry_run: self.dry_run,
            beyond: self.beyond,
            all: &self.all,
            now: at(self.second),
        };
        next(&inputs, || fleet(self.load))
    }
}

/// A load that has been at the next stage for its time.
fn beyond(up: bool) -> Beyond {
    Beyond { up, since: at(-100) }
}

fn entered() -> Outcome {
    Case { load: 91, beyond: Some(beyond(true)), ..case() }.next()
}

fn degraded() -> Case {
    Case { status: entered().status, load: 85, ..case() }
}

fn told(outcome: &Outcome) -> Option<(&str, &str)> {
    outcome.event.as_ref().map(|event| (event.reason.as_str(), event.note.as_str()))
}

#[test]
fn a_stage_that_is_entered_is_written_down_with_an_end_and_told() {
    let outcome = entered();
    let status = outcome.status.as_ref().unwrap();
    assert_eq!((status.stage.as_str(), status.level, status.stages, status.load_percent), ("mail", 1, 2, 80));
    assert_eq!((status.since.0, status.until.0), (at(0), at(600)));
    assert_eq!(status.why, "booking: 2 of 2 pods at 91 % or more");
    assert_eq!(status.flags, [FlagVariant { key: "Mail".into(), variant: "off".into() }]);
    let words = format!(
        "the fleet is in stage mail (1 of 2, 80 %) since {}: booking: 2 of 2 pods at 91 % or more; sets Mail=off",
        at(0)
    );
    assert_eq!(told(&outcome), Some(("FleetDegraded", words.as_str())));
    assert_eq!(outcome.next, Some(at(10)), "the next stage is due then");
}

#[test]
fn nothing_is_written_while_the_load_goes_up_and_down_in_a_stage() {
    for (load, second) in [(85, 1), (70, 100), (99, 200), (61, 299)] {
        let case = Case { load, second, ..degraded() };
        let outcome = case.next();
        assert_eq!((outcome.status, outcome.event.is_none()), (case.status, true));
    }
}

#[test]
fn its_end_is_put_off_when_half_of_it_is_left() {
    let after = |second| Case { second, ..degraded() }.next();
    assert_eq!((after(299).status, after(299).next), (degraded().status, Some(at(300))));
    let renewed = after(300);
    assert_eq!(renewed.status.as_ref().unwrap().until.0, at(900));
    assert_eq!((told(&renewed), renewed.next), (None, Some(at(600))));
    let mut insane = degraded();
    insane.status.as_mut().unwrap().until = MicroTime(at(9_999_999));
    assert_eq!(insane.next().status.unwrap().until.0, at(600), "further away than it can be");
}

#[test]
fn what_has_ended_without_an_operator_is_not_gone_on_from() {
    let outcome = Case { second: 600, ..degraded() }.next();
    assert_eq!(outcome.status, None);
    let note = "stage mail (1 of 2, 80 %) is over: it ended while no operator put that off";
    assert_eq!(told(&outcome), Some(("FleetRecovered", note)));
    let suspended = Case { second: 600, may_change: false, ..degraded() }.next();
    assert_eq!((suspended.status.as_ref(), told(&suspended)), (None, Some(("FleetRecovered", note))));
    let mut forced = stages();
    forced["mode"] = json!("Forced");
    let again = Case { degradation: forced, second: 600, ..degraded() }.next();
    assert_eq!(told(&again).map(|(reason, _)| reason), Some("FleetDegraded"), "a person forces it still");
}

#[test]
fn a_stage_that_is_left_is_told_with_what_is_still_in_force() {
    let two = Case { load: 95, beyond: Some(beyond(true)), ..degraded() }.next();
    assert_eq!(two.status.as_ref().map(|status| (status.level, status.flags.len())), Some((2, 2)));
    let one = Case { load: 65, beyond: Some(beyond(false)), second: 100, status: two.status, ..case() }.next();
    assert_eq!(one.status.as_ref().map(|status| (status.level, status.flags.len())), Some((1, 1)));
    let note = told(&one).unwrap();
    assert!(
        note.1.starts_with("stage cache (2 of 2, 90 %) is over: stage mail (1 of 2, 80 %) is still in force"),
        "{note:?}"
    );
    let none = Case { load: 5, beyond: Some(beyond(false)), second: 200, status: one.status, ..case() }.next();
    assert_eq!((none.status.is_none(), told(&none).unwrap().0), (true, "FleetRecovered"));
}

#[rstest::rstest]
#[case::held(Case { may_change: false, load: 0, beyond: Some(beyond(false)), ..degraded() }, Some(1))]
#[case::held_and_put_off(Case { may_change: false, second: 400, ..degraded() }, Some(1))]
#[case::cannot_be_used(Case { degradation: json!({"exit": {"loadPercent": 90}}), ..degraded() }, Some(1))]
#[case::not_degraded_stays_so(Case { may_change: false, load: 99, beyond: Some(beyond(true)), ..case() }, None)]
#[case::not_in_force(Case { in_force: false, ..degraded() }, None)]
#[case::taken_out(Case { degradation: Value::Null, ..degraded() }, None)]
#[case::disabled(Case { degradation: json!({"mode": "Disabled"}), ..degraded() }, None)]
#[case::earnest_is_no_rehearsal(Case { dry_run: true, ..degraded() }, None)]
fn who_may_change_what_is_in_force(#[case] case: Case, #[case] expected: Option<i32>) {
    let outcome = case.next();
    assert_eq!(outcome.status.as_ref().map(|status| status.level), expected);
    let until = outcome.status.as_ref().map(|status| status.until.0);
    assert_eq!(until, expected.map(|_| if case.second > 300 { at(1_000) } else { at(600) }));
    let was = case.status.is_some();
    assert_eq!(told(&outcome).is_some(), was && expected.is_none());
}

#[test]
fn a_rehearsal_says_what_would_be() {
    let outcome = Case { dry_run: true, load: 91, beyond: Some(beyond(true)), ..case() }.next();
    let status = outcome.status.clone().unwrap();
    assert!(status.dry_run && in_words(&status).starts_with("dry run: the fleet would be in stage mail"));
    let earnest = Case { status: Some(status), load: 91, beyond: None, ..case() }.next();
    assert_eq!((earnest.status.is_none(), earnest.event.is_none()), (true, true), "it begins anew");
}

#[test]
fn a_person_forces_all_stages() {
    let mut forced = stages();
    forced["mode"] = json!("Forced");
    let outcome = Case { degradation: forced, load: 0, ..case() }.next();
    let status = outcome.status.unwrap();
    assert_eq!((status.level, status.flags.len(), status.why.as_str()), (2, 2, "a person forces it"));
}

#[test]
fn flags_of_another_policy_are_named() {
    let other = contract::FlagDegradation { variant: "x".into(), until_ms: 0, by: "payment".into(), load_percent: 95 };
    let outcome = Case { all: [("Mail".to_owned(), other)].into(), ..degraded() }.next();
    assert_eq!(outcome.status.unwrap().message.as_deref(), Some("Mail is as the policy payment says"));
}

#[test]
fn what_was_written_by_somebody_else_does_no_harm() {
    let mut status = degraded().status.unwrap();
    (status.stage, status.level, status.since) = ("x".repeat(63), 8, MicroTime(Timestamp::MAX));
    let outcome = Case { status: Some(status), load: 85, ..case() }.next();
    let status = outcome.status.unwrap();
    assert_eq!((status.stage.as_str(), status.level, status.since.0), ("cache", 2, at(0)));
}
