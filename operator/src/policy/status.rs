//! The status of a policy, put together from what is known and decided. Pure.

use super::degradation;
use crate::{
    kubernetes::meta::{cut, short},
    recovery::{events::without_log, object::name_of},
    spec::{self, Invalid, checks::Check, recovery::step_action},
    status::{
        conditions::{self, Verdict},
        target::{self, Target},
    },
};
use contract::{FlagsSettings, PolicySettings, RuntimeConfig};
use crds::{
    ConditionStatus, ConditionType, Reason, ResiliencePolicy, ResiliencePolicyStatus,
    resilience_policy::Mode,
    status::{
        ActionOutcome, ActionRecord, CheckFinding, CircuitStatus, DegradationStatus, MAX_IN_FLIGHT, MAX_WITHHELD,
        RecoverySummary, TargetStatus, WithheldAction,
    },
};
use engine::{
    ack::Acknowledged,
    fleet::CircuitView,
    recovery::{Decision, Gate, History, Outcome, Record, Settings, Withheld},
};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use std::collections::{BTreeMap, BTreeSet};

/// What a status is made from.
pub struct Inputs<'a> {
    /// The policy.
    pub policy: &'a ResiliencePolicy,
    /// What it means, or why it cannot be used.
    pub settings: &'a Result<PolicySettings, Invalid>,
    /// How it recovers.
    pub recovery: &'a Settings,
    /// Its health checks.
    pub checks: &'a [Check<'a>],
    /// Its targets, in its own order.
    pub targets: &'a [Target],
    /// Targets that another policy has, with that policy's name.
    pub lost: &'a BTreeMap<String, String>,
    /// What there is to say of how its checks are asked that the operator asks itself.
    pub remarks: &'a [String],
    /// Recoveries with times that cannot be: they are kept, and nothing is computed from them.
    pub impossible: &'a [Record],
    /// Names of the Recoveries that people made, by the id of each.
    pub names: &'a BTreeMap<String, String>,
    /// What there is to say of the flags that it sets while pods are degraded.
    pub override_warnings: &'a [String],
    /// How its fleet is degraded, if it is.
    pub degradation: Option<&'a DegradationStatus>,
    /// In a dry run: the hash that each target would get.
    pub would_publish: &'a BTreeMap<String, String>,
    /// The operator itself runs dry.
    pub operator_dry_run: bool,
    /// Now.
    pub now: Timestamp,
}

impl Inputs<'_> {
    fn dry_run(&self) -> bool {
        self.operator_dry_run || self.policy.spec.mode == Mode::DryRun
    }

    /// Nothing is published for it: it says nothing that its pods have to know, and nothing else does either.
    fn only_recovers(&self, held: &[&Target]) -> bool {
        // The defaults stay where a policy was published before; pods without our library never take them.
        let defaults = RuntimeConfig::hash(&PolicySettings::default(), &FlagsSettings::default());
        let nothing = |target: &Target| target.published.as_ref().is_none_or(|(_, hash, _)| **hash == *defaults);
        let untouched = |target: &&Target| nothing(target) && target.problem.is_none();
        !held.is_empty() && !spec::checks::is_published(&self.policy.spec) && held.iter().all(untouched)
    }

    fn held(&self) -> Vec<&Target> {
        self.targets.iter().filter(|target| target.found && !self.lost.contains_key(&target.key)).collect()
    }
}

/// The status of a policy that cannot be read.
pub fn unreadable(meta: &ObjectMeta, why: &str, now: Timestamp) -> ResiliencePolicyStatus {
    let (accepted, programmed) = conditions::invalid(Reason::InvalidPolicy, format!("it cannot be read: {why}"));
    let mut verdicts = conditions::summarize(&accepted, &programmed, true, false).to_vec();
    verdicts.extend([accepted, programmed]);
    ResiliencePolicyStatus {
        observed_generation: meta.generation,
        conditions: conditions::settle(&[], verdicts, meta.generation, now),
        ..ResiliencePolicyStatus::default()
    }
}

/// The status of a readable policy.
pub fn build(inputs: &Inputs<'_>, decision: &Decision, old: &ResiliencePolicyStatus) -> ResiliencePolicyStatus {
    let generation = inputs.policy.metadata.generation;
    let held = inputs.held();
    let (accepted, refused) = accepted(inputs, &held);
    let (programmed, stuck) = programmed(inputs, &held, &accepted);
    let rests = inputs.dry_run();
    let usable = accepted.status == ConditionStatus::True;
    let not_allowed = Verdict::new(
        ConditionType::RecoveryAllowed,
        false,
        accepted.reason,
        "the policy is not in force, so nothing is recovering by it",
    );
    let mut verdicts = conditions::summarize(&accepted, &programmed, refused || stuck, rests).to_vec();
    verdicts.extend([accepted, programmed]);
    let checks = findings(inputs, &held);
    verdicts.push(healthy(inputs, &checks, &held));
    let degraded = degraded(inputs.degradation, &held);
    let is_degraded = degraded.status == ConditionStatus::True;
    verdicts.push(degraded);
    verdicts.push(if usable { allowed(inputs, decision) } else { not_allowed });
    verdicts.push(exhausted(decision));
    ResiliencePolicyStatus {
        observed_generation: generation,
        conditions: conditions::settle(&old.conditions, verdicts, generation, inputs.now),
        programmed: Some(if rests {
            format!("0/{}", held.iter().map(|t| t.acknowledged.ready).sum::<usize>())
        } else if inputs.only_recovers(&held) {
            "-".to_owned()
        } else {
            target::ratio(&held)
        }),
        open: open(&held),
        degraded: Some(is_degraded),
        degradation: inputs.degradation.cloned().map(Box::new),
        targets: inputs.targets.iter().map(|target| target_status(inputs, target)).collect(),
        circuits: circuits(&held, old),
        checks,
        recovery: recovery(inputs, decision),
    }
}

/// Whether the fleet is degraded, or some pods by themselves.
fn degraded(fleet: Option<&DegradationStatus>, held: &[&Target]) -> Verdict {
    let pods: Vec<_> = held.iter().flat_map(|target| &target.degraded).cloned().collect();
    let by_themselves = (!pods.is_empty()).then(|| format!("degraded under load: {}", first(&pods, 5)));
    let is_set = fleet.is_some_and(|fleet| !fleet.dry_run);
    let words: Vec<_> = fleet.map(degradation::in_words).into_iter().chain(by_themselves).collect();
    let reason = match (is_set, pods.is_empty()) {
        (true, _) => Reason::FleetDegraded,
        (false, false) => Reason::Degraded,
        (false, true) => Reason::NotDegraded,
    };
    Verdict::new(ConditionType::Degraded, is_set || !pods.is_empty(), reason, words.join("; "))
}

/// Accepted, and whether only a person can change that.
fn accepted(inputs: &Inputs<'_>, held: &[&Target]) -> (Verdict, bool) {
    let settings = match inputs.settings {
        Ok(settings) => settings,
        Err(error) => return (conditions::invalid(Reason::InvalidPolicy, error.to_string()).0, true),
    };
    if held.is_empty() && !inputs.lost.is_empty() {
        let others: BTreeSet<_> = inputs.lost.values().map(String::as_str).collect();
        let others: Vec<_> = others.into_iter().collect();
        let message = format!(
            "an older policy has every target: {}; delete one of the policies, or let them name different targets",
            others.join(", ")
        );
        return (Verdict::new(ConditionType::Accepted, false, Reason::Conflicted, message), true);
    }
    let missing: Vec<_> = inputs
        .targets
        .iter()
        .filter(|target| !target.found)
        .map(|target| format!("{} {}", target.kind, target.name))
        .collect();
    if held.is_empty() {
        return (
            Verdict::new(
                ConditionType::Accepted,
                false,
                Reason::TargetNotFound,
                format!("there is no {}; waits for one", missing.join(", ")),
            ),
            false,
        );
    }
    let mut message = vec!["valid".to_owned()];
    if !missing.is_empty() {
        message.push(format!("waits for {}, which do not exist yet", missing.join(", ")));
    }
    message.extend(inputs.lost.iter().map(|(target, other)| format!("{target} runs by the older policy {other}")));
    let notes = spec::asked::warnings(&inputs.policy.spec);
    let about_flags = inputs.override_warnings.iter().cloned();
    let warnings: Vec<_> =
        notes.into_iter().chain(warnings(settings, held)).chain(about_flags).chain(impossible(inputs)).collect();
    message.extend(warnings.iter().take(MAX_WARNINGS).map(|warning| format!("warning: {warning}")));
    if let Some(more) = warnings.len().checked_sub(MAX_WARNINGS).filter(|more| *more > 0) {
        message.push(format!("and {more} more warnings"));
    }
    (Verdict::new(ConditionType::Accepted, true, Reason::Accepted, message.join("; ")), false)
}

/// The records whose times cannot be.
fn impossible(inputs: &Inputs<'_>) -> impl Iterator<Item = String> {
    inputs.impossible.iter().filter(|record| !record.withdrawn).map(|record| {
        let name = inputs.names.get(&record.id).cloned().unwrap_or_else(|| name_of(record));
        format!("the Recovery {name} has a time or a phase that cannot be understood; it is kept and ignored")
    })
}

/// Most warnings that one message holds.
const MAX_WARNINGS: usize = 20;

/// What the author should know of the policy in each of its targets; the same word of several targets once.
fn warnings(settings: &PolicySettings, held: &[&Target]) -> Vec<String> {
    let mut of: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for target in held {
        for warning in spec::policy::policy_warnings(settings, target.built_ins.as_deref()) {
            of.entry(warning).or_default().push(&target.name);
        }
        let Acknowledged { older, ready, .. } = &target.acknowledged;
        if *older > 0 {
            let warning = format!(
                "{older} of {ready} pods are of an older version, in which an entry of dependencies replaces what is built in: what it does not say is ADR-007's number there, and a fallback that it does not list is off; upgrade the workload"
            );
            of.entry(warning).or_default().push(&target.name);
        }
    }
    let in_all = |targets: &[&str]| targets.len() == held.len();
    of.into_iter()
        .map(|(warning, targets)| if in_all(&targets) { warning } else { format!("{}: {warning}", targets.join(", ")) })
        .collect()
}

fn programmed(inputs: &Inputs<'_>, held: &[&Target], accepted: &Verdict) -> (Verdict, bool) {
    if inputs.dry_run() {
        let hashes: Vec<_> =
            inputs.would_publish.iter().map(|(target, hash)| format!("{} for {target}", short(hash))).collect();
        let would = if hashes.is_empty() { String::new() } else { format!("; it would be {}", hashes.join(", ")) };
        let message = format!("dry run: nothing is published{would}");
        return (Verdict::new(ConditionType::Programmed, false, Reason::DryRun, message), false);
    }
    if accepted.status != ConditionStatus::True {
        return (
            Verdict::new(
                ConditionType::Programmed,
                ConditionStatus::Unknown,
                accepted.reason,
                "the last valid configuration stays in effect",
            ),
            false,
        );
    }
    if inputs.only_recovers(held) {
        let message = "the policy only checks and recovers; nothing is published or pushed for it";
        return (Verdict::new(ConditionType::Programmed, true, Reason::RecoveryOnly, message), false);
    }
    let (verdict, stuck) = target::programmed(held, &inputs.policy.metadata);
    if inputs.policy.spec.suspend {
        // Nothing is under way, whatever the pods run.
        let message = format!("suspended: changes are not published; {}", verdict.message);
        return (Verdict::new(ConditionType::Programmed, true, Reason::Suspended, message), false);
    }
    (verdict, stuck)
}

fn target_status(inputs: &Inputs<'_>, target: &Target) -> TargetStatus {
    if !target.found {
        return target::status(
            target,
            false,
            Reason::TargetNotFound,
            Some(format!("no such {}; waits for one", target.kind)),
        );
    }
    if let Some(other) = inputs.lost.get(&target.key) {
        return target::status(target, false, Reason::Conflicted, Some(format!("runs by the older policy {other}")));
    }
    let problem = target.problem.as_ref().map(|problem| problem.message.clone());
    if inputs.dry_run() {
        let would_publish = inputs.would_publish.get(&target.key).cloned();
        return TargetStatus { would_publish, ..target::status(target, false, Reason::DryRun, problem) };
    }
    target::status(target, true, if inputs.policy.spec.suspend { Reason::Suspended } else { Reason::Accepted }, problem)
}

/// Checks that fail somewhere.
fn findings(inputs: &Inputs<'_>, held: &[&Target]) -> Vec<CheckFinding> {
    let mut findings = Vec::new();
    for target in held {
        for check in inputs.checks {
            let failing: Vec<_> = target
                .pods
                .iter()
                .filter_map(|(_, pod, evaluations)| {
                    evaluations.get(check.name).filter(|j| !j.healthy).map(|j| (pod, j))
                })
                .collect();
            let of_pod = failing.iter().min_by_key(|(_, evaluation)| evaluation.since);
            // What no pod says is said of the workload as a whole.
            let of_workload = target.majorities.get(check.name).filter(|majority| !majority.healthy);
            let of_pod = of_pod.map(|(_, oldest)| (oldest.since, &oldest.message));
            let Some((since, message)) = of_pod.or(of_workload.map(|one| (one.since, &one.message))) else { continue };
            findings.push(CheckFinding {
                kind: target.kind.as_str().to_owned(),
                target: target.name.clone(),
                name: check.name.to_owned(),
                pods: failing.iter().take(10).map(|(pod, _)| (*pod).clone()).collect(),
                unhealthy_pods: i32::try_from(failing.len()).unwrap_or(i32::MAX),
                since: MicroTime(since),
                message: cut(message, 1000).to_owned(),
            });
        }
    }
    findings
}

fn healthy(inputs: &Inputs<'_>, findings: &[CheckFinding], held: &[&Target]) -> Verdict {
    // Of a check that nobody can be asked for it is not known how it is: it is neither good nor bad, and is told.
    let remarks = inputs.remarks.iter().cloned();
    if findings.is_empty() {
        let degraded: BTreeSet<_> = held.iter().flat_map(|target| &target.degraded_checks).cloned().collect();
        let degraded: Vec<_> = degraded.into_iter().collect();
        let degraded = (!degraded.is_empty()).then(|| format!("degraded, but working: {}", degraded.join(", ")));
        let message = degraded.into_iter().chain(remarks).collect::<Vec<_>>().join("; ");
        return Verdict::new(ConditionType::Healthy, true, Reason::AllChecksPass, message);
    }
    let parts: Vec<_> = findings
        .iter()
        .map(|finding| {
            let CheckFinding { name, target, pods, unhealthy_pods, since, message, .. } = finding;
            let place = if pods.is_empty() {
                format!("of {target}")
            } else {
                format!("in {unhealthy_pods} ({})", pods.join(", "))
            };
            format!("{name} is unhealthy {place} since {}: {message}", since.0)
        })
        .chain(remarks)
        .collect();
    Verdict::new(ConditionType::Healthy, false, Reason::CheckUnhealthy, parts.join("; "))
}

fn allowed(inputs: &Inputs<'_>, decision: &Decision) -> Verdict {
    if let Some(held) = decision.withheld.first() {
        let until = held.until.map(|until| format!("; it goes on at {until}")).unwrap_or_default();
        let subject = held.subject.display_name();
        let check = &held.subject.check;
        let for_check = if check.is_empty() { String::new() } else { format!(" for {check}") };
        let message = format!("{subject}: {}{for_check} is held back: {}{until}", held.action, held.message);
        return Verdict::new(ConditionType::RecoveryAllowed, false, gate_reason(held.gate), message);
    }
    if inputs.recovery.ladders.is_empty() {
        return Verdict::new(
            ConditionType::RecoveryAllowed,
            false,
            Reason::NoLadders,
            "no recovery steps are configured",
        );
    }
    if inputs.recovery.suspended {
        return Verdict::new(ConditionType::RecoveryAllowed, false, Reason::Suspended, "the policy is suspended");
    }
    if let Some(why) = inputs.recovery.pause_requests.first() {
        let message = format!("the policy is paused: {why}");
        return Verdict::new(ConditionType::RecoveryAllowed, false, Reason::Paused, message);
    }
    if inputs.recovery.dry_run {
        return Verdict::new(
            ConditionType::RecoveryAllowed,
            false,
            Reason::DryRun,
            "decisions become Recoveries of phase Simulated and are not executed",
        );
    }
    Verdict::new(ConditionType::RecoveryAllowed, true, Reason::Allowed, "")
}

fn exhausted(decision: &Decision) -> Verdict {
    if decision.exhausted.is_empty() {
        return Verdict::new(ConditionType::RecoveryExhausted, false, Reason::NotExhausted, "");
    }
    let parts: Vec<_> = decision
        .exhausted
        .iter()
        .take(5)
        .map(|end| format!("{}: {} fails since {}", end.subject.display_name(), end.subject.check, end.since))
        .collect();
    let message = format!("every step was tried and did not help; it waits for a person: {}", parts.join("; "));
    Verdict::new(ConditionType::RecoveryExhausted, true, Reason::RecoveryExhausted, message)
}

fn open(held: &[&Target]) -> Option<String> {
    let open: Vec<_> = held
        .iter()
        .flat_map(|target| &target.circuits)
        .filter(|(_, view)| view.open > 0)
        .map(|(dependency, view)| in_words(dependency, *view))
        .take(20)
        .collect();
    (!open.is_empty()).then(|| cut(&open.join(", "), 1000).to_owned())
}

/// A circuit that is half-open is not closed, and no evidence: it may only be that nobody has called since its break.
fn in_words(dependency: &str, view: CircuitView) -> String {
    let CircuitView { open, tripped, total } = view;
    let half_open = open.saturating_sub(tripped);
    match (tripped, half_open) {
        (_, 0) => format!("{dependency} {tripped}/{total}"),
        (0, _) => format!("{dependency} {half_open}/{total} half-open"),
        _ => format!("{dependency} {tripped}/{total} and {half_open}/{total} half-open"),
    }
}

fn circuits(held: &[&Target], old: &ResiliencePolicyStatus) -> Vec<CircuitStatus> {
    let mut circuits = Vec::new();
    for target in held {
        for (dependency, view) in target.circuits.iter().filter(|(_, view)| view.open > 0) {
            // The operator may be younger than the outage.
            let same = |old: &&CircuitStatus| {
                old.kind == *target.kind.as_str() && old.target == target.name && old.dependency == *dependency
            };
            let before = old.circuits.iter().find(same);
            let before = before.and_then(|old| old.open_since.as_ref()).map(|since| since.0);
            let since = target.open_since.get(dependency).copied().into_iter().chain(before).min();
            circuits.push(CircuitStatus {
                kind: target.kind.as_str().to_owned(),
                target: target.name.clone(),
                dependency: dependency.clone(),
                open_pods: i32::try_from(view.open).unwrap_or(i32::MAX),
                total_pods: i32::try_from(view.total).unwrap_or(i32::MAX),
                open_since: since.map(MicroTime),
            });
        }
    }
    circuits.truncate(256);
    circuits
}

/// The part of the status that says in short what recovery does.
pub fn recovery(inputs: &Inputs<'_>, decision: &Decision) -> Option<RecoverySummary> {
    let History { in_flight, recent, .. } = &decision.history;
    let unhealthy = !findings(inputs, &inputs.held()).is_empty();
    if inputs.recovery.ladders.is_empty() && in_flight.is_empty() && recent.is_empty() && !unhealthy {
        return None;
    }
    let shown = in_flight.first().map(|record| {
        let dry = match (record.dry_run, record.outcome) {
            (true, _) => ", dry run",
            (false, Outcome::Waiting) => ", waits",
            _ => "",
        };
        let more = match in_flight.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("{} ({} of {}{dry}){more}", record.step.action, record.index + 1, record.steps)
    });
    let summary = shown
        .or_else(|| decision.withheld.first().map(|held| gate_reason(held.gate).as_str().to_owned()))
        .or_else(|| (!decision.exhausted.is_empty()).then(|| Reason::RecoveryExhausted.as_str().to_owned()))
        // Something fails, and nothing is to be done about it.
        .or_else(|| unhealthy.then(|| Reason::CheckUnhealthy.as_str().to_owned()));
    Some(RecoverySummary {
        summary,
        remaining_budget: i32::try_from(decision.remaining_budget).ok().filter(|_| !inputs.recovery.ladders.is_empty()),
        in_flight: in_flight.iter().take(MAX_IN_FLIGHT).map(|record| action_record(inputs, record)).collect(),
        last: recent.iter().find(|record| !record.withdrawn).map(|record| action_record(inputs, record)),
        withheld: decision.withheld.iter().take(MAX_WITHHELD).map(withheld).collect(),
        recent: Vec::new(),
    })
}

fn withheld(held: &Withheld) -> WithheldAction {
    WithheldAction {
        target: held.subject.target.clone(),
        pod: held.subject.pod.as_ref().map(|pod| pod.name.clone()),
        check: held.subject.check.clone(),
        action: held.action.as_str().to_owned(),
        reason: gate_reason(held.gate).as_str().to_owned(),
        until: held.until.map(MicroTime),
        message: cut(&held.message, 1000).to_owned(),
    }
}

/// A record as the status shows it.
fn action_record(inputs: &Inputs<'_>, from: &Record) -> ActionRecord {
    let place = |index: usize| i32::try_from(index).unwrap_or(i32::MAX);
    ActionRecord {
        recovery: Some(inputs.names.get(&from.id).cloned().unwrap_or_else(|| name_of(from))),
        id: from.id.clone(),
        target: from.subject.target.clone(),
        pod: from.subject.pod.as_ref().map(|pod| pod.name.clone()),
        pod_uid: from.subject.pod.as_ref().map(|pod| pod.uid.clone()),
        pod_instance: from.instance.clone(),
        check: from.subject.check.clone(),
        action: step_action(from.step.action),
        step: place(from.index + 1),
        steps: place(from.steps.max(from.index + 1)),
        failed_at: MicroTime(from.failed_at),
        started_at: MicroTime(from.started_at),
        acted_at: from.executed_at.map(MicroTime),
        finished_at: from.finished_at.map(MicroTime),
        outcome: match from.outcome {
            Outcome::Pending => ActionOutcome::Pending,
            Outcome::Waiting => ActionOutcome::Waiting,
            Outcome::Verifying => ActionOutcome::Verifying,
            Outcome::Succeeded => ActionOutcome::Succeeded,
            Outcome::Failed => ActionOutcome::Failed,
            Outcome::Cancelled => ActionOutcome::Cancelled,
        },
        dry_run: from.dry_run,
        message: from.message.as_ref().map(|message| cut(without_log(message), 1000).to_owned()),
    }
}

/// The reason for which a gate holds an action back.
pub(super) const fn gate_reason(gate: Gate) -> Reason {
    match gate {
        Gate::Suspended => Reason::Suspended,
        Gate::Paused => Reason::Paused,
        Gate::Excluded => Reason::Excluded,
        Gate::StormActive => Reason::StormActive,
        Gate::ObserverStale => Reason::ObserverStale,
        Gate::StartingUp => Reason::StartingUp,
        Gate::RolloutInProgress => Reason::RolloutInProgress,
        Gate::DependencyIsTheCause => Reason::DependencyIsTheCause,
        Gate::Cooldown => Reason::Cooldown,
        Gate::AllPodsUnhealthy => Reason::AllPodsUnhealthy,
        Gate::TooManyUnhealthy => Reason::TooManyUnhealthy,
        Gate::BudgetExhausted => Reason::BudgetExhausted,
        Gate::OneStepAtATime => Reason::OneStepAtATime,
        Gate::RollbackRefused => Reason::RollbackRefused,
        Gate::ActionNotSupported => Reason::ActionNotSupported,
    }
}

fn first(names: &[String], most: usize) -> String {
    let shown = names.iter().take(most).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.len() > most { format!("{shown} and {} more", names.len() - most) } else { shown }
}

#[cfg(test)]
mod circuit_words {
    use super::*;

    /// Without visitors, a circuit was shown as open for as long as nobody came.
    #[rstest::rstest]
    #[case::open(2, 2, "catalog 2/3")]
    #[case::half_open(2, 0, "catalog 2/3 half-open")]
    #[case::both(3, 1, "catalog 1/3 and 2/3 half-open")]
    fn half_open_is_shown_as_half_open(#[case] open: usize, #[case] tripped: usize, #[case] expected: &str) {
        assert_eq!(in_words("catalog", CircuitView { open, tripped, total: 3 }), expected);
    }
}
