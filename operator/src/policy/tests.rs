//! What a policy's status says, and which Events a change of it makes: a row for each situation.

use super::{
    asked,
    events::policy_events,
    observe::observe,
    status::{Inputs, build},
};
use crate::{
    checks::results::{Current, CurrentChecks},
    kubernetes::events::Severity,
    pods::state::Problem,
    recovery::events::{newly_refused, refused},
    spec,
    status::conditions::find,
    status::target::{Target, target_key},
};
use contract::{CheckReport, CheckStatus, WorkloadId};
use crds::{
    ConditionType, Reason, ResiliencePolicy, ResiliencePolicySpec, ResiliencePolicyStatus,
    status::{ActionOutcome, DegradationStatus},
};
use engine::{
    ack::Acknowledged,
    check::{Evaluation, Thresholds, evaluate},
    fleet::CircuitView,
    recovery::{Action, CheckState, Decision, Exhausted, Gate, Outcome, Pod, Record, Step, Storm, Subject, Withheld},
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use std::{collections::BTreeMap, fmt::Write};
use tokio::time::Instant;

const LADDER: &str = "
healthChecks: [{name: database}]
recovery: {ladders: [{check: database, steps: [{action: ResetConnections, timeout: 15s}, {action: RestartPod, timeout: 60s}]}]}
";

/// A policy, its workload, and what was decided: at first, all is well.
struct World {
    spec: String,
    targets: Vec<Target>,
    lost: BTreeMap<String, String>,
    asked: CurrentChecks,
    impossible: Vec<Record>,
    operator_dry_run: bool,
    degradation: Option<DegradationStatus>,
    decision: Decision,
}

impl Default for World {
    fn default() -> Self {
        Self {
            spec: LADDER.to_owned(),
            targets: vec![target("booking")],
            lost: BTreeMap::new(),
            asked: CurrentChecks::new(),
            impossible: Vec::new(),
            operator_dry_run: false,
            degradation: None,
            decision: Decision { remaining_budget: 5, ..Decision::default() },
        }
    }
}

/// A workload whose four pods run what is published.
fn target(name: &str) -> Target {
    Target {
        name: name.to_owned(),
        key: target_key(&WorkloadId::deployment("ticketing", name)),
        found: true,
        published: Some((7, "9f2c41aa".into(), Instant::now())),
        considered: BTreeMap::from([("policy-uid".to_owned(), 3)]),
        acknowledged: Acknowledged { ready: 4, in_sync: 4, ..Acknowledged::default() },
        wanted: 4,
        ..Target::default()
    }
}

fn degraded(dry_run: bool) -> DegradationStatus {
    DegradationStatus {
        stage: "mail".to_owned(),
        level: 1,
        stages: 2,
        load_percent: 80,
        since: MicroTime(at(900)),
        until: MicroTime(at(1_500)),
        why: "booking: 3 of 4 pods at 91 % or more".to_owned(),
        flags: Vec::new(),
        message: None,
        dry_run,
    }
}

fn report(status: CheckStatus) -> CheckReport {
    CheckReport {
        status,
        message: "no answer".to_owned(),
        tags: Vec::new(),
        dependency: None,
        dependency_answers: None,
        duration_ms: 1,
        consecutive_failures: 3,
        runs: 3,
        data: BTreeMap::new(),
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

impl World {
    fn after(change: fn(&mut Self)) -> Self {
        let mut world = Self::default();
        change(&mut world);
        world
    }

    fn status(&self, old: &ResiliencePolicyStatus) -> ResiliencePolicyStatus {
        let names: Vec<_> = self.targets.iter().map(|target| format!("{{name: {}}}", target.name)).collect();
        let text = format!("targetRefs: [{}]\n{}", names.join(", "), self.spec);
        let spec: ResiliencePolicySpec = serde_saphyr::from_str(&text).unwrap();
        let mut policy = ResiliencePolicy::new("booking", spec);
        (policy.metadata.uid, policy.metadata.generation) = (Some("policy-uid".to_owned()), Some(3));
        let would_publish = BTreeMap::from([("booking".to_owned(), "1234567890".to_owned())]);
        let inputs = Inputs {
            policy: &policy,
            settings: &spec::policy::policy(&policy.spec),
            checks: &spec::checks::checks(&policy.spec),
            recovery: &spec::recovery::recovery(&policy.spec, self.operator_dry_run, Storm::default()),
            targets: &self.with_asked(),
            lost: &self.lost,
            remarks: &asked::remarks(&self.asked),
            impossible: &self.impossible,
            names: &BTreeMap::new(),
            override_warnings: &[],
            degradation: self.degradation.as_ref(),
            would_publish: &would_publish,
            operator_dry_run: self.operator_dry_run,
            now: at(1_000),
        };
        build(&inputs, &self.decision, old)
    }

    fn problem(&mut self, reason: Reason, stalled: bool) {
        self.targets[0].problem = Some(Problem { reason, message: "why".to_owned(), stalled });
    }

    /// The check fails in pods of these names, since this second.
    fn fails_in(&mut self, pods: &[&str], second: i64) {
        let report = report(CheckStatus::Unhealthy);
        for pod in pods {
            let evaluation = evaluate(None, &report, Thresholds::default(), at(second));
            let evaluations = BTreeMap::from([("database".to_owned(), evaluation)]);
            self.targets[0].pods.push((format!("uid-{pod}"), (*pod).to_owned(), evaluations));
        }
    }

    fn circuit(&mut self, open: usize, second: i64) {
        self.targets[0].circuits.insert("database".to_owned(), CircuitView { open, tripped: open, total: 4 });
        self.targets[0].open_since.insert("database".to_owned(), at(second));
    }

    fn in_flight(&mut self, action: Action, outcome: Outcome) {
        self.decision.history.in_flight.push(record(action, outcome));
    }

    fn finished(&mut self, outcome: Outcome) {
        let record = record(Action::ResetConnections, outcome);
        self.decision.finished.push(record.clone());
        self.decision.history.recent.push(record);
    }

    fn withheld(&mut self, gate: Gate) {
        self.decision.withheld.push(Withheld {
            subject: subject(),
            action: Action::RestartPod,
            gate,
            message: "why".to_owned(),
            until: Some(at(1_060)),
        });
    }
}

const SITE: &str = "
healthChecks: [{name: site, http: {service: web, port: 80}}]
recovery: {ladders: [{check: site, steps: [{action: RestartPod}]}]}
";

fn since_900(status: CheckStatus) -> Evaluation {
    evaluate(None, &report(status), Thresholds::default(), at(900))
}

/// What the operator found of the check `site` in the pods of `booking`, since second 900.
fn asked_by_pod(failing: &[&str], well: &[&str]) -> CurrentChecks {
    let failing = failing.iter().map(|name| (name, CheckStatus::Unhealthy));
    let all = failing.chain(well.iter().map(|name| (name, CheckStatus::Healthy)));
    let pods = all.map(|(name, status)| (format!("uid-{name}"), ("booking".to_owned(), since_900(status))));
    BTreeMap::from([("site".to_owned(), Current { pods: pods.collect(), ..Current::default() })])
}

/// What it found of the check `site` of a workload as a whole.
fn asked_of_workload(target: &str) -> CurrentChecks {
    let workload = Some((target.to_owned(), since_900(CheckStatus::Unhealthy)));
    BTreeMap::from([("site".to_owned(), Current { workload, ..Current::default() })])
}

fn remark(words: &str) -> CurrentChecks {
    BTreeMap::from([("site".to_owned(), Current { remark: Some(words.to_owned()), ..Current::default() })])
}

impl World {
    /// Pods that say nothing by themselves.
    fn has_pods(&mut self, names: &[&str]) {
        let pods = names.iter().map(|name| (format!("uid-{name}"), (*name).to_owned(), BTreeMap::new()));
        self.targets[0].pods.extend(pods);
    }

    fn with_asked(&self) -> Vec<Target> {
        let mut targets = self.targets.clone();
        for target in &mut targets {
            asked::add(target, &self.asked);
        }
        targets
    }

    fn observed(&self) -> Vec<(Option<String>, bool, Timestamp)> {
        let spec = serde_saphyr::from_str(&format!("targetRefs: [{{name: booking}}]\n{}", self.spec)).unwrap();
        let (checks, targets) = (spec::checks::checks(&spec), self.with_asked());
        let held: Vec<_> = targets.iter().collect();
        let observed = observe(&checks, &held, &self.decision.history, BTreeMap::new(), at(0), None);
        let pod = |check: &CheckState| check.subject.pod.as_ref().map(|pod| pod.name.clone());
        observed.checks.iter().map(|check| (pod(check), check.healthy, check.since)).collect()
    }
}

#[test]
fn what_the_operator_asked_is_observed_of_pods_that_are_there() {
    let mut world = World { spec: SITE.to_owned(), asked: asked_by_pod(&["a", "gone"], &["b"]), ..World::default() };
    world.has_pods(&["a", "b"]);
    let named = |name: &str| Some(name.to_owned());
    assert_eq!(world.observed(), [(named("a"), false, at(900)), (named("b"), true, at(900))]);
    world.asked = remark("there is no Service web");
    assert!(world.observed().is_empty(), "nobody knows");
    world.spec = SITE.replace("http:", "scope: Workload, http:");
    world.asked = asked_of_workload("booking");
    assert_eq!(world.observed(), [(None, false, at(900))]);
    world.asked = asked_of_workload("other");
    assert!(world.observed().is_empty(), "it is about another workload");
}

#[test]
fn what_pods_report_under_the_name_of_a_check_that_the_operator_asks_is_none_of_it() {
    let mut world = World { spec: SITE.replace("site", "database"), ..World::default() };
    world.fails_in(&["booking-a"], 900);
    world.asked = BTreeMap::from([("database".to_owned(), Current::default())]);
    assert!(world.observed().is_empty());
    assert!(world.status(&ResiliencePolicyStatus::default()).checks.is_empty());
}

#[test]
fn a_failure_that_began_before_goes_on_in_its_ladder() {
    let mut world = World { spec: SITE.to_owned(), asked: asked_by_pod(&["booking-a"], &[]), ..World::default() };
    world.has_pods(&["booking-a"]);
    let mut record = record(Action::RestartPod, Outcome::Verifying);
    (record.subject.check, record.failed_at) = ("site".to_owned(), at(500));
    world.decision.history.in_flight.push(record);
    assert_eq!(world.observed(), [(Some("booking-a".to_owned()), false, at(500))]);
}

fn subject() -> Subject {
    let pod = Pod { name: "booking-a".to_owned(), uid: "uid-booking-a".to_owned() };
    Subject { target: "booking".to_owned(), pod: Some(pod), check: "database".to_owned() }
}

fn record(action: Action, outcome: Outcome) -> Record {
    Record {
        id: "7f3a0000".to_owned(),
        slot: "7f3a0000".to_owned(),
        after: None,
        by_hand: false,
        withdrawn: false,
        subject: subject(),
        instance: None,
        step: Step { action, cron_job: None, timeout_ms: 15_000 },
        index: usize::from(action == Action::RestartPod),
        steps: 2,
        failed_at: at(900),
        started_at: at(990),
        executed_at: None,
        finished_at: None,
        outcome,
        healed_at: None,
        before: None,
        successor: None,
        dry_run: false,
        message: Some("said".to_owned()),
    }
}

/// The conditions as `Type=Status/Reason`.
fn conditions(status: &ResiliencePolicyStatus) -> Vec<String> {
    let shown = status.conditions.iter().map(|one| format!("{}={:?}/{}", one.type_, one.status, one.reason));
    shown.collect()
}

fn message(status: &ResiliencePolicyStatus, type_: ConditionType) -> &str {
    &status.conditions.iter().find(|condition| *condition.type_ == type_).unwrap().message
}

/// The columns PROGRAMMED, OPEN, DEGRADED and RECOVERY.
fn columns(status: &ResiliencePolicyStatus) -> String {
    let recovery = status.recovery.as_ref().and_then(|recovery| recovery.summary.as_deref());
    let mut text = status.programmed.clone().unwrap_or_default();
    for column in [status.open.as_deref(), status.degraded.map(|on| if on { "degraded" } else { "-" }), recovery] {
        write!(text, " | {}", column.unwrap_or("-")).unwrap();
    }
    text
}

#[rstest::rstest]
#[case::all_is_well(
    |_: &mut World| {},
    &["Ready=True/Programmed", "Reconciling=False/Settled", "Stalled=False/NotStalled", "Accepted=True/Accepted",
      "Programmed=True/Programmed", "Healthy=True/AllChecksPass", "Degraded=False/NotDegraded",
      "RecoveryAllowed=True/Allowed", "RecoveryExhausted=False/NotExhausted"],
    "4/4 | - | - | -"
)]
#[case::not_published_yet(
    |world: &mut World| world.targets[0].published = None,
    &["Ready=False/Publishing", "Reconciling=True/Publishing", "Stalled=False/NotStalled", "Programmed=False/Publishing"],
    "0/4 | - | - | -"
)]
#[case::an_edit_is_not_in_it_yet(
    |world: &mut World| world.targets[0].considered = BTreeMap::from([("policy-uid".to_owned(), 2)]),
    &["Ready=False/Publishing", "Accepted=True/Accepted", "RecoveryAllowed=True/Allowed"],
    "4/4 | - | - | -"
)]
#[case::one_pod_lags(
    |world: &mut World| world.targets[0].acknowledged.in_sync = 3,
    &["Ready=False/PartiallyProgrammed", "Reconciling=True/PartiallyProgrammed", "Programmed=False/PartiallyProgrammed"],
    "3/4 | - | - | -"
)]
#[case::scaled_to_zero(
    |world: &mut World| world.targets[0].acknowledged = Acknowledged::default(),
    &["Ready=True/NoPods", "Programmed=True/NoPods"],
    "0/0 | - | - | -"
)]
#[case::a_config_map_of_somebody_else(
    |world: &mut World| world.problem(Reason::ConfigMapNotOurs, true),
    &["Ready=False/ConfigMapNotOurs", "Reconciling=False/Settled", "Stalled=True/ConfigMapNotOurs"],
    "4/4 | - | - | -"
)]
#[case::the_api_server_refuses(
    |world: &mut World| world.problem(Reason::PublishFailed, false),
    &["Ready=False/PublishFailed", "Reconciling=True/PublishFailed", "Stalled=False/NotStalled"],
    "4/4 | - | - | -"
)]
#[case::no_such_workload(
    |world: &mut World| world.targets[0].found = false,
    &["Ready=False/TargetNotFound", "Reconciling=True/TargetNotFound", "Stalled=False/NotStalled",
      "Accepted=False/TargetNotFound", "Programmed=Unknown/TargetNotFound", "RecoveryAllowed=False/TargetNotFound"],
    "0/0 | - | - | -"
)]
#[case::one_of_two_is_missing(
    |world: &mut World| world.targets.push(Target { found: false, ..target("late") }),
    &["Ready=True/Programmed", "Accepted=True/Accepted"],
    "4/4 | - | - | -"
)]
#[case::an_older_policy_has_it(
    |world: &mut World| { world.lost.insert("booking".to_owned(), "older".to_owned()); },
    &["Ready=False/Conflicted", "Stalled=True/Conflicted", "Accepted=False/Conflicted", "RecoveryAllowed=False/Conflicted"],
    "0/0 | - | - | -"
)]
#[case::it_contradicts_itself(
    |world: &mut World| world.spec = "dependencies: [{name: a}, {name: a}]".to_owned(),
    &["Ready=False/InvalidPolicy", "Stalled=True/InvalidPolicy", "Accepted=False/InvalidPolicy",
      "Programmed=Unknown/InvalidPolicy", "RecoveryAllowed=False/InvalidPolicy"],
    "4/4 | - | - | -"
)]
#[case::suspended(
    |world: &mut World| { world.spec.push_str("suspend: true"); world.targets[0].acknowledged.in_sync = 1; },
    &["Ready=True/Suspended", "Programmed=True/Suspended", "RecoveryAllowed=False/Suspended"],
    "1/4 | - | - | -"
)]
#[case::a_rehearsal(
    |world: &mut World| world.spec.push_str("mode: DryRun"),
    &["Ready=True/DryRun", "Reconciling=False/Settled", "Programmed=False/DryRun", "RecoveryAllowed=False/DryRun"],
    "0/4 | - | - | -"
)]
#[case::the_operator_runs_dry(
    |world: &mut World| world.operator_dry_run = true,
    &["Ready=True/DryRun", "Programmed=False/DryRun", "RecoveryAllowed=False/DryRun"],
    "0/4 | - | - | -"
)]
#[case::no_steps(
    |world: &mut World| world.spec = "healthChecks: [{name: database}]".to_owned(),
    &["Ready=True/Programmed", "RecoveryAllowed=False/NoLadders"],
    "4/4 | - | - | -"
)]
#[case::a_check_fails(
    |world: &mut World| world.fails_in(&["booking-a"], 900),
    &["Ready=True/Programmed", "Healthy=False/CheckUnhealthy", "RecoveryAllowed=True/Allowed"],
    "4/4 | - | - | CheckUnhealthy"
)]
#[case::a_circuit_is_open(
    |world: &mut World| world.circuit(1, 900),
    &["Ready=True/Programmed", "Healthy=True/AllChecksPass"],
    "4/4 | database 1/4 | - | -"
)]
#[case::a_circuit_is_closed(|world: &mut World| world.circuit(0, 900), &["Ready=True/Programmed"], "4/4 | - | - | -")]
#[case::the_fleet_is_degraded(
    |world: &mut World| world.degradation = Some(degraded(false)),
    &["Ready=True/Programmed", "Degraded=True/FleetDegraded"],
    "4/4 | - | degraded | -"
)]
#[case::the_fleet_would_be_degraded(
    |world: &mut World| world.degradation = Some(degraded(true)),
    &["Ready=True/Programmed", "Degraded=False/NotDegraded"],
    "4/4 | - | - | -"
)]
#[case::a_pod_is_degraded(
    |world: &mut World| world.targets[0].degraded.push("booking-a".to_owned()),
    &["Ready=True/Programmed", "Degraded=True/Degraded"],
    "4/4 | - | degraded | -"
)]
#[case::an_action_is_under_way(
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Verifying),
    &["RecoveryAllowed=True/Allowed"],
    "4/4 | - | - | ResetConnections (1 of 2)"
)]
#[case::an_eviction_waits(
    |world: &mut World| world.in_flight(Action::RestartPod, Outcome::Waiting),
    &["RecoveryAllowed=True/Allowed"],
    "4/4 | - | - | RestartPod (2 of 2, waits)"
)]
#[case::an_action_is_rehearsed(
    |world: &mut World| {
        world.spec.push_str("mode: DryRun");
        world.decision.history.in_flight.push(Record { dry_run: true, ..record(Action::RestartPod, Outcome::Verifying) });
    },
    &["RecoveryAllowed=False/DryRun"],
    "0/4 | - | - | RestartPod (2 of 2, dry run)"
)]
#[case::an_action_is_held_back(
    |world: &mut World| world.withheld(Gate::Cooldown),
    &["Ready=True/Programmed", "RecoveryAllowed=False/Cooldown"],
    "4/4 | - | - | Cooldown"
)]
#[case::what_is_under_way_is_shown_first(
    |world: &mut World| { world.in_flight(Action::ResetConnections, Outcome::Pending); world.withheld(Gate::OneStepAtATime); },
    &["RecoveryAllowed=False/OneStepAtATime"],
    "4/4 | - | - | ResetConnections (1 of 2)"
)]
#[case::every_step_was_tried(
    |world: &mut World| world.decision.exhausted.push(Exhausted { subject: subject(), since: at(900) }),
    &["Ready=True/Programmed", "RecoveryAllowed=True/Allowed", "RecoveryExhausted=True/RecoveryExhausted"],
    "4/4 | - | - | RecoveryExhausted"
)]
fn a_status_says(#[case] change: fn(&mut World), #[case] expected: &[&str], #[case] shown: &str) {
    let status = World::after(change).status(&ResiliencePolicyStatus::default());
    let conditions = conditions(&status);
    for one in expected {
        assert!(conditions.iter().any(|condition| condition == one), "{one} is not among {conditions:#?}");
    }
    assert_eq!(conditions.len(), 9, "each condition once: {conditions:#?}");
    assert_eq!(columns(&status), shown);
}

#[rstest::rstest]
#[case::suspended(Gate::Suspended)]
#[case::stale(Gate::ObserverStale)]
#[case::starting(Gate::StartingUp)]
#[case::rollout(Gate::RolloutInProgress)]
#[case::dependency(Gate::DependencyIsTheCause)]
#[case::cooldown(Gate::Cooldown)]
#[case::all(Gate::AllPodsUnhealthy)]
#[case::many(Gate::TooManyUnhealthy)]
#[case::budget(Gate::BudgetExhausted)]
#[case::one(Gate::OneStepAtATime)]
#[case::unsupported(Gate::ActionNotSupported)]
fn a_closed_gate_is_the_reason_of_that_name(#[case] gate: Gate) {
    let mut world = World::default();
    world.withheld(gate);
    let status = world.status(&ResiliencePolicyStatus::default());
    let expected = format!("RecoveryAllowed=False/{gate:?}");
    assert!(conditions(&status).contains(&expected), "{expected}");
}

#[rstest::rstest]
#[case::a_missing_target(
    |world: &mut World| world.targets.push(Target { found: false, ..target("late") }),
    ConditionType::Accepted,
    "valid; waits for Deployment late, which do not exist yet"
)]
#[case::an_impossible_record(
    |world: &mut World| world.impossible.push(record(Action::RestartPod, Outcome::Failed)),
    ConditionType::Accepted,
    "warning: the Recovery booking-database-7f3a0000 has a time or a phase that cannot be understood"
)]
#[case::pods_of_an_older_version(
    |world: &mut World| world.targets[0].acknowledged.older = 2,
    ConditionType::Accepted,
    "warning: 2 of 4 pods are of an older version"
)]
#[case::two_older_policies(
    |world: &mut World| {
        world.targets.push(target("other"));
        world.lost = BTreeMap::from([("booking".to_owned(), "a".to_owned()), ("other".to_owned(), "b".to_owned())]);
    },
    ConditionType::Accepted,
    "an older policy has every target: a, b;"
)]
#[case::invalid(
    |world: &mut World| world.spec = "dependencies: [{name: a}, {name: a}]".to_owned(),
    ConditionType::Accepted,
    "spec.dependencies[1].name: a is there twice. The last valid configuration stays in effect."
)]
#[case::a_pod_that_lags(
    |world: &mut World| world.targets[0].acknowledged = Acknowledged {
        ready: 4, in_sync: 3, lagging: vec!["booking-a: still runs 26785f".to_owned()], ..Acknowledged::default()
    },
    ConditionType::Programmed,
    "live in 3 of 4 pods; booking-a: still runs 26785f"
)]
#[case::dry_run(
    |world: &mut World| world.operator_dry_run = true,
    ConditionType::Programmed,
    "dry run: nothing is published; it would be 123456 for booking"
)]
#[case::a_check(
    |world: &mut World| world.fails_in(&["booking-a", "booking-b"], 900),
    ConditionType::Healthy,
    "database is unhealthy in 2 (booking-a, booking-b) since 1970-01-01T00:15:00Z: no answer"
)]
#[case::a_check_that_the_operator_asks(
    |world: &mut World| {
        (world.spec, world.asked) = (SITE.to_owned(), asked_by_pod(&["a", "b", "gone"], &["c"]));
        world.has_pods(&["a", "b", "c"]);
    },
    ConditionType::Healthy,
    "site is unhealthy in 2 (a, b) since 1970-01-01T00:15:00Z: no answer"
)]
#[case::most_endpoints_fail(
    |world: &mut World| (world.spec, world.asked) = (SITE.to_owned(), asked_of_workload("booking")),
    ConditionType::Healthy,
    "site is unhealthy of booking since 1970-01-01T00:15:00Z: no answer"
)]
#[case::nobody_can_be_asked(
    |world: &mut World| (world.spec, world.asked) = (SITE.to_owned(), remark("there is no Service web")),
    ConditionType::Healthy,
    "site: there is no Service web"
)]
#[case::nobody_can_be_asked_and_another_check_fails(
    |world: &mut World| { world.asked = remark("there is no Service web"); world.fails_in(&["booking-a"], 900); },
    ConditionType::Healthy,
    "no answer; site: there is no Service web"
)]
#[case::a_certificate_that_nobody_verifies(
    |world: &mut World| world.spec =
        "healthChecks: [{name: site, http: {service: web, port: 443, scheme: HTTPS, tls: {insecureSkipVerify: true}}}]".to_owned(),
    ConditionType::Accepted,
    "warning: site: insecureSkipVerify: the certificate of Service web is not verified"
)]
#[case::https_without_certificates(
    |world: &mut World| world.spec = "healthChecks: [{name: site, http: {service: web, port: 443, scheme: HTTPS}}]".to_owned(),
    ConditionType::Accepted,
    "spec.healthChecks[0].http.tls: HTTPS needs caConfigMapRef"
)]
#[case::held_back(
    |world: &mut World| world.withheld(Gate::Cooldown),
    ConditionType::RecoveryAllowed,
    "booking-a: RestartPod for database is held back: why; it goes on at 1970-01-01T00:17:40Z"
)]
#[case::exhausted(
    |world: &mut World| world.decision.exhausted.push(Exhausted { subject: subject(), since: at(900) }),
    ConditionType::RecoveryExhausted,
    "it waits for a person: booking-a: database fails since 1970-01-01T00:15:00Z"
)]
fn a_message_tells(#[case] change: fn(&mut World), #[case] type_: ConditionType, #[case] part: &str) {
    let status = World::after(change).status(&ResiliencePolicyStatus::default());
    let message = message(&status, type_);
    assert!(message.contains(part), "{message:?} does not say {part:?}");
}

#[test]
fn many_pods_are_counted_and_some_of_them_named() {
    let names: Vec<_> = (10..40).map(|number| format!("booking-{number}")).collect();
    let mut world = World::default();
    world.fails_in(&names.iter().map(String::as_str).collect::<Vec<_>>(), 900);
    let status = world.status(&ResiliencePolicyStatus::default());
    assert_eq!((status.checks[0].unhealthy_pods, status.checks[0].pods.len()), (30, 10));
}

#[test]
fn an_outage_is_as_old_as_any_operator_has_known_it() {
    let old = World::after(|world| world.circuit(1, 500)).status(&ResiliencePolicyStatus::default());
    let new = World::after(|world| world.circuit(2, 900)).status(&old);
    assert_eq!(new.circuits[0].open_since.as_ref().unwrap().0, at(500));
    assert_eq!((new.circuits[0].open_pods, new.circuits[0].total_pods), (2, 4));
}

#[test]
fn what_cannot_be_true_is_said() {
    let world = World::after(|world| world.impossible.push(record(Action::RestartPod, Outcome::Failed)));
    let status = world.status(&ResiliencePolicyStatus::default());
    let accepted = find(&status.conditions, ConditionType::Accepted).unwrap();
    let told = "the Recovery booking-database-7f3a0000 has a time or a phase that cannot be understood; it is kept and ignored";
    assert!(accepted.message.contains(told), "{}", accepted.message);
    let recovery = status.recovery.unwrap();
    assert_eq!((recovery.remaining_budget, recovery.summary, recovery.last), (Some(5), None, None));
}

#[test]
fn the_status_sums_recovery_up() {
    let world = World::after(|world| {
        world.in_flight(Action::RestartPod, Outcome::Waiting);
        world.finished(Outcome::Failed);
        world.withheld(Gate::TooManyUnhealthy);
    });
    let recovery = world.status(&ResiliencePolicyStatus::default()).recovery.unwrap();
    assert_eq!(recovery.summary.as_deref(), Some("RestartPod (2 of 2, waits)"));
    assert_eq!(recovery.in_flight[0].recovery.as_deref(), Some("booking-database-7f3a0000"));
    assert_eq!(recovery.last.unwrap().outcome, ActionOutcome::Failed);
    let held = &recovery.withheld[0];
    assert_eq!((held.reason.as_str(), held.pod.as_deref()), ("TooManyUnhealthy", Some("booking-a")));
    assert!(recovery.recent.is_empty(), "that is what version 0.1 wrote");
}

/// The Events as `Severity Reason`.
fn events(before: &World, world: &World) -> Vec<String> {
    let old = before.status(&ResiliencePolicyStatus::default());
    tell(&old, Some(before), world)
}

fn tell(old: &ResiliencePolicyStatus, before: Option<&World>, world: &World) -> Vec<String> {
    let new = world.status(old);
    let history = before.map(|before| before.decision.history.clone()).unwrap_or_default();
    let after = &world.decision.history;
    let begun: Vec<_> =
        after.in_flight.iter().filter(|record| !history.all().any(|old| old.id == record.id)).cloned().collect();
    let mut events = policy_events(old, &new, &begun, &world.decision, "9f2c41 live in 4 of 4 pods".to_owned());
    events.extend(newly_refused(&history, after).map(refused));
    let severity = |severity| if severity == Severity::Normal { "Normal" } else { "Warning" };
    events.iter().map(|event| format!("{} {}: {}", severity(event.severity), event.reason, event.note)).collect()
}

#[rstest::rstest]
#[case::nothing_changed(|_: &mut World| {}, |_: &mut World| {}, &[])]
#[case::new_content(
    |_: &mut World| {},
    |world: &mut World| world.targets[0].published = Some((8, "aaaaaaaa".into(), Instant::now())),
    &["Normal Programmed: 9f2c41 live in 4 of 4 pods"]
)]
#[case::it_went_through(|world: &mut World| world.targets[0].acknowledged.in_sync = 3, |_: &mut World| {}, &["Normal Programmed: 9f2c41"])]
#[case::it_lags(|_: &mut World| {}, |world: &mut World| world.targets[0].acknowledged.in_sync = 3, &[])]
#[case::invalid(
    |_: &mut World| {},
    |world: &mut World| world.spec = "dependencies: [{name: a}, {name: a}]".to_owned(),
    &["Warning InvalidPolicy: spec.dependencies[1].name"]
)]
#[case::conflicted(
    |_: &mut World| {},
    |world: &mut World| { world.lost.insert("booking".to_owned(), "older".to_owned()); },
    &["Warning Conflicted: an older policy has every target: older"]
)]
#[case::the_workload_is_gone(
    |_: &mut World| {},
    |world: &mut World| world.targets[0].found = false,
    &["Warning TargetNotFound: there is no Deployment booking; waits for one"]
)]
#[case::a_config_map_of_somebody_else(
    |_: &mut World| {},
    |world: &mut World| world.problem(Reason::ConfigMapNotOurs, true),
    &["Warning ConfigMapNotOurs: booking: why"]
)]
#[case::still_of_somebody_else(
    |world: &mut World| world.problem(Reason::ConfigMapNotOurs, true),
    |world: &mut World| world.problem(Reason::ConfigMapNotOurs, true),
    &[]
)]
#[case::too_large(
    |_: &mut World| {},
    |world: &mut World| world.problem(Reason::ConfigTooLarge, true),
    &["Warning ConfigTooLarge: booking: why"]
)]
#[case::the_first_circuit_opens(
    |_: &mut World| {},
    |world: &mut World| world.circuit(1, 900),
    &["Warning CircuitOpened: booking: the circuit of database is open in 1 of 4 pods"]
)]
#[case::another_pod_opens_it(|world: &mut World| world.circuit(1, 900), |world: &mut World| world.circuit(2, 900), &[])]
#[case::the_last_one_closes_it(
    |world: &mut World| world.circuit(1, 900),
    |world: &mut World| world.circuit(0, 900),
    &["Normal CircuitClosed: booking: the circuit of database is closed in all pods"]
)]
#[case::a_check_begins_to_fail(
    |_: &mut World| {},
    |world: &mut World| world.fails_in(&["booking-a"], 900),
    &["Warning CheckUnhealthy: booking-a: database fails: no answer"]
)]
#[case::it_fails_in_another_pod_too(
    |world: &mut World| world.fails_in(&["booking-a"], 900),
    |world: &mut World| world.fails_in(&["booking-a", "booking-b"], 900),
    &["Warning CheckUnhealthy: booking-b: database fails: no answer"]
)]
#[case::an_action_begins(
    |_: &mut World| {},
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Pending),
    &["Normal RecoveryStarted: booking-a: ResetConnections for database (step 1 of 2, recovery booking-database-7f3a0000)"]
)]
#[case::it_was_executed(
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Pending),
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Verifying),
    &[]
)]
#[case::it_was_refused(
    |world: &mut World| world.in_flight(Action::RestartPod, Outcome::Pending),
    |world: &mut World| world.in_flight(Action::RestartPod, Outcome::Waiting),
    &["Warning RecoveryRefused: booking-a: RestartPod waits: said"]
)]
#[case::it_is_still_refused(
    |world: &mut World| world.in_flight(Action::RestartPod, Outcome::Waiting),
    |world: &mut World| world.in_flight(Action::RestartPod, Outcome::Waiting),
    &[]
)]
#[case::it_helped(
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Verifying),
    |world: &mut World| world.finished(Outcome::Succeeded),
    &["Normal RecoverySucceeded: booking-a: ResetConnections for database: said"]
)]
#[case::it_did_not_help(
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Verifying),
    |world: &mut World| world.finished(Outcome::Failed),
    &["Warning RecoveryFailed: booking-a: ResetConnections for database: said"]
)]
#[case::it_was_not_needed(
    |world: &mut World| world.in_flight(Action::ResetConnections, Outcome::Pending),
    |world: &mut World| world.finished(Outcome::Cancelled),
    &["Normal RecoveryCancelled: booking-a: ResetConnections for database: said"]
)]
#[case::a_gate_closes(
    |_: &mut World| {},
    |world: &mut World| world.withheld(Gate::BudgetExhausted),
    &["Warning RecoveryWithheld: booking-a: RestartPod for database is held back: why"]
)]
#[case::it_is_still_closed(
    |world: &mut World| world.withheld(Gate::BudgetExhausted),
    |world: &mut World| world.withheld(Gate::BudgetExhausted),
    &[]
)]
#[case::another_action_says_enough(|_: &mut World| {}, |world: &mut World| world.withheld(Gate::OneStepAtATime), &[])]
#[case::a_person_suspended_it(|_: &mut World| {}, |world: &mut World| world.spec.push_str("suspend: true"), &["Warning RecoveryWithheld"])]
#[case::no_step_is_left(
    |_: &mut World| {},
    |world: &mut World| world.decision.exhausted.push(Exhausted { subject: subject(), since: at(900) }),
    &["Warning RecoveryExhausted: every step was tried and did not help"]
)]
#[case::one_after_the_other(
    |_: &mut World| {},
    |world: &mut World| {
        world.circuit(1, 900);
        world.fails_in(&["booking-a"], 900);
        world.finished(Outcome::Failed);
        world.withheld(Gate::TooManyUnhealthy);
    },
    &["Warning CircuitOpened", "Warning CheckUnhealthy", "Warning RecoveryFailed", "Warning RecoveryWithheld"]
)]
fn a_change_is_told_once(#[case] before: fn(&mut World), #[case] after: fn(&mut World), #[case] expected: &[&str]) {
    let events = events(&World::after(before), &World::after(after));
    assert_eq!(events.len(), expected.len(), "{events:#?}");
    for (event, expected) in events.iter().zip(expected) {
        assert!(event.starts_with(expected), "{event:?} does not begin with {expected:?}");
    }
}

#[test]
fn a_new_policy_that_is_live_is_told() {
    let events = tell(&ResiliencePolicyStatus::default(), None, &World::default());
    assert_eq!(events, ["Normal Programmed: 9f2c41 live in 4 of 4 pods"]);
}
