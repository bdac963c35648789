//! The policy controller: says in the status whether a policy is in force, and recovers its workloads.
//!
//! One reconcile: gather, decide (pure), write every intent into the ledger (fenced), execute what is pending, and write the
//! outcome of that. The intent is always written before the act. The policy's status is a summary of it.

use super::{
    asked, cleanup_jobs, degradation,
    events::policy_events,
    execute::execute,
    gather::{lost_claims, override_warnings, would_publish},
    observe::observe,
    signals,
    status::{self, Inputs},
    waiting::{is_published_within, listening_for},
};
use crate::{
    checks::results::CurrentChecks,
    context::Context,
    error::ReconcileError,
    fleet::index::{ObjectKey, Policy, target_id},
    kubernetes::{
        clients::call,
        controller::{Next, Reconciler, SHORTEST_WAIT, UNTIL_SHOWN},
        events::Event,
        meta::object_reference,
    },
    pods::prober::now_in_milliseconds,
    recovery::{events, ledger::Ledger, migration::migrate},
    spec,
    status::{
        target::{self, Target},
        write::{write_internal_error, write_status, write_unreadable_status},
    },
    telemetry::metrics::RecoveryLabels,
};
use crds::{EventReason, Recovery, ResiliencePolicy, ResiliencePolicyStatus};
use engine::recovery::{self, Action as RecoveryAction, Decision, History, Outcome, Record};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Api, Resource, ResourceExt};
use serde_json::json;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::warn;

/// How soon to look again at a policy whose watch is silent.
const WHILE_SILENT: Duration = Duration::from_secs(10);
/// How soon to look again at an action that was executed: its first report may be there.
const AFTER_ACTION: Duration = Duration::from_millis(200);
/// How soon to look again at an action whose execution is not known.
const AFTER_UNKNOWN: Duration = Duration::from_secs(1);

/// The policy controller.
pub struct PolicyReconciler(pub Arc<Context>);

impl Reconciler for PolicyReconciler {
    type Key = ObjectKey;
    const KIND: &'static str = "policy";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Next, ReconcileError> {
        let ctx = &*self.0;
        let shown = ctx.index.policy(key);
        if shown.as_ref().is_none_or(|policy| policy.0.is_err()) {
            ctx.checks.forget(key);
        }
        if shown.is_none() {
            ctx.shared.metrics.set_withheld(key, BTreeMap::new());
            ctx.shared.metrics.set_degraded(key, None);
            degradation::keep_timer(ctx, key, None);
        }
        let Some(policy) = shown.filter(|_| ctx.shared.fence.holds()) else { return Ok(Next::AwaitChange) };
        ctx.shared.fail_for_test(&key.name).await;
        if !ctx.ledger.is_filled() {
            return Ok(Next::AwaitChange);
        }
        if let Some(wait) = listening_for(ctx, key, &policy) {
            return Ok(Next::After(wait.max(SHORTEST_WAIT)));
        }
        if ctx.managed_elsewhere(&key.namespace, policy.0.iter().flat_map(|policy| &policy.spec.target_refs)).is_some()
        {
            ctx.checks.forget(key);
            return Ok(Next::AwaitChange);
        }
        if !ctx.status_writes.cache_is_stale(policy.meta()) {
            return reconcile_shown(&policy, ctx).await;
        }
        if ctx.observer_stale().is_none() {
            return Ok(Next::After(UNTIL_SHOWN));
        }
        // The watch that would show the own write is silent itself, and there is that to say in the status.
        let api: Api<Policy> = Api::namespaced(ctx.shared.clients.act.clone(), &key.namespace);
        let asked = call(api.get_opt(&key.name)).await.map_err(ReconcileError::api("reading the policy"))?;
        let Some(fresh) = asked else { return Ok(Next::After(WHILE_SILENT)) };
        let next = reconcile_shown(&fresh, ctx).await;
        // What it wrote now makes what the watch showed last no newer.
        ctx.status_writes.supersede(policy.meta());
        Ok(match next? {
            Next::AwaitChange => Next::After(WHILE_SILENT),
            after @ Next::After(_) => after,
        })
    }

    async fn report_internal_error(&self, key: &ObjectKey, message: &str) {
        let Some(policy) = self.0.index.policy(key) else { return };
        let old = policy.0.as_ref().ok().and_then(|policy| policy.status.as_ref());
        let old = old.map(|status| status.conditions.as_slice()).unwrap_or_default();
        write_internal_error::<ResiliencePolicy>(&self.0, policy.meta(), old, message).await;
    }
}

async fn reconcile_shown(policy: &Policy, ctx: &Context) -> Result<Next, ReconcileError> {
    match &policy.0 {
        Ok(readable) => reconcile(readable, ctx).await,
        Err(unreadable) => reconcile_unreadable(policy.meta(), &unreadable.to_string(), ctx).await,
    }
}

async fn reconcile(policy: &ResiliencePolicy, ctx: &Context) -> Result<Next, ReconcileError> {
    let now = now_in_milliseconds();
    let namespace = policy.namespace().unwrap_or_default();
    let settings = spec::policy::policy(&policy.spec);
    let recovery = spec::recovery::recovery(&policy.spec, ctx.shared.args.dry_run, ctx.shared.args.storm());
    let checks = spec::checks::checks(&policy.spec);
    let mut targets: Vec<Target> =
        policy.spec.target_refs.iter().map(|target| target::look_up(ctx, &target_id(&namespace, target))).collect();
    let mut changes_at = targets.iter_mut().filter_map(|target| signals::add(target, &checks, now)).min();
    // What pods report reaches the policies; the workload itself is looked at only when something is to be published.
    for (reference, target) in policy.spec.target_refs.iter().zip(&targets).filter(|(_, target)| target.found) {
        target::show_gauges(ctx, &target_id(&namespace, reference), target);
    }
    let lost = lost_claims(policy, ctx, &namespace);
    let asked = asked_by_operator(ctx, policy, &namespace, &targets, &lost, now);
    for target in &mut targets {
        asked::add(target, &asked);
    }
    let remarks = asked::remarks(&asked);
    let held: Vec<&Target> = targets.iter().filter(|target| target.found && !lost.contains_key(&target.key)).collect();
    let old = policy.status.clone().unwrap_or_default();
    if migrate(ctx, policy).await? {
        return Ok(Next::After(UNTIL_SHOWN));
    }
    let mut ledger = Ledger::gather(ctx, policy, &held, now);
    if settings.is_ok() && ledger.resolve(ctx, now).await? {
        ledger = Ledger::gather(ctx, policy, &held, now);
    }
    let history = ledger.history.clone();

    let recent = recovery.storm.interval_ms.saturating_add(recovery.storm.cooldown_ms);
    let begun_there = if is_unwell(&held) { ctx.ledger.begun_in(&namespace, recent, now) } else { Vec::new() };
    let mut decision = if settings.is_ok() {
        let jobs = cleanup_jobs::gather(ctx, &namespace, &history).await;
        let stale = ctx.observer_stale();
        let mut observed = observe(&checks, &held, &history, jobs, ctx.shared.leading_since(now), stale);
        observed.begun_in_namespace.clone_from(&begun_there);
        let aftermath = ctx.outages().carry_on(&namespace, &mut observed.bad_dependencies, now);
        changes_at = changes_at.into_iter().chain(aftermath).min();
        recovery::decide(&recovery, &observed, &history, &policy.name_any(), now)
    } else {
        Decision { history: history.clone(), ..Decision::default() }
    };
    let mut degraded = degradation::decide(ctx, policy, &held, settings.is_ok(), now);
    let names = ledger.names_by_hand();
    let would_publish = would_publish(policy, ctx, &namespace, &held);
    let override_warnings = override_warnings(ctx, policy, &namespace);
    let inputs = Inputs {
        policy,
        settings: &settings,
        recovery: &recovery,
        checks: &checks,
        targets: &targets,
        lost: &lost,
        remarks: &remarks,
        impossible: &history.aside,
        names: &names,
        override_warnings: &override_warnings,
        degradation: degraded.status.as_ref(),
        would_publish: &would_publish,
        operator_dry_run: ctx.shared.args.dry_run,
        now,
    };
    let mut begun = begun(&decision, &history);
    let settling = held.iter().filter_map(|target| target.settles_within(&policy.metadata));
    let waits = settling
        .chain(is_published_within(ctx, policy, &held, now))
        .chain(ctx.status_writes.wait(policy.meta(), Instant::now()))
        .min();
    let due = decision
        .next_check
        .into_iter()
        .chain(changes_at)
        .chain(degraded.next)
        .min()
        .map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    let urgent = !begun.is_empty() || !decision.finished.is_empty() || !decision.execute.is_empty();
    if let Some(wait) = waits.filter(|_| !urgent) {
        return Ok(Next::After(due.map_or(wait, |due| due.min(wait)).max(SHORTEST_WAIT)));
    }
    // What is over is over in the ledger before the summary says so.
    ledger.update(ctx, &decision.history).await?;
    // What is counted over all policies of the namespace is counted by one at a time.
    let turn = if begun.is_empty() { None } else { Some(ctx.turn(&namespace).await) };
    if turn.is_some() && ctx.ledger.begun_in(&namespace, recent, now) != begun_there {
        return Ok(Next::After(SHORTEST_WAIT));
    }
    let new = status::build(&inputs, &decision, &old);
    let live = programmed_note(ctx, policy, &held);
    // The policy's own version is the fence: one that was edited or deleted meanwhile begins nothing.
    let mut story = policy_events(&old, &new, &begun, &decision, live);
    story.extend(degraded.event.take());
    let version = show(ctx, policy, &old, &new, story).await?;
    note_degraded(ctx, policy, &degraded);
    for (id, error) in ledger.begin(ctx, policy, &begun).await? {
        tell_unwritable(ctx, policy, &error);
        decision.history.in_flight.retain(|record| record.id != id);
        decision.execute.retain(|record| record.id != id);
        begun.retain(|record| record.id != id);
    }
    drop(turn);
    tell(ctx, &ledger, &begun, &decision.finished);
    count(ctx, policy, &begun, &decision);
    ctx.shared.metrics.set_withheld(&ObjectKey::of(policy), withheld_by_reason(&decision));
    ledger.drop_deleted(ctx, &mut decision, &begun).await;
    let executed = execute(policy, ctx, &namespace, &held, &decision).await?;
    ledger.update(ctx, &executed.history).await?;
    tell_refused(ctx, policy, &ledger, &decision.history, &executed.history);
    let after = ResiliencePolicyStatus { recovery: status::recovery(&inputs, &executed), ..new.clone() };
    if after != new {
        let meta = ObjectMeta { resource_version: version, ..policy.metadata.clone() };
        write_status::<ResiliencePolicy>(ctx, &meta, &after).await?;
    }
    if decision.execute.is_empty() {
        return Ok(due.map_or(Next::AwaitChange, |due| Next::After(due.max(SHORTEST_WAIT))));
    }
    Ok(Next::After(if executed.execute.is_empty() { AFTER_ACTION } else { AFTER_UNKNOWN }))
}

fn programmed_note(ctx: &Context, policy: &ResiliencePolicy, held: &[&Target]) -> String {
    target::programmed_note(held, ctx.index.policy_seen_at(&ObjectKey::of(policy)))
}

/// Notes what the status says now of the degraded mode of the fleet.
fn note_degraded(ctx: &Context, policy: &ResiliencePolicy, degraded: &degradation::Outcome) {
    let key = ObjectKey::of(policy);
    degradation::keep_timer(ctx, &key, degraded.beyond);
    ctx.shared.metrics.set_degraded(&key, degraded.status.as_ref().map(|status| status.stage.as_str()));
}

/// Writes the status, if it is news, and publishes what there is to tell of it. The answer is the policy's version then.
async fn show(
    ctx: &Context,
    policy: &ResiliencePolicy,
    old: &ResiliencePolicyStatus,
    new: &ResiliencePolicyStatus,
    story: Vec<Event>,
) -> Result<Option<String>, ReconcileError> {
    if new == old {
        return Ok(policy.metadata.resource_version.clone());
    }
    let version = write_status::<ResiliencePolicy>(ctx, &policy.metadata, new).await?;
    let reference = object_reference::<ResiliencePolicy>(policy.meta());
    for event in story {
        ctx.shared.events.publish(&reference, &event);
    }
    Ok(version)
}

/// Tells that nothing is done, because it cannot be written down before: a quota, a missing right, a name that is taken.
fn tell_unwritable(ctx: &Context, policy: &ResiliencePolicy, error: &ReconcileError) {
    if error.is_conflict() || matches!(error, ReconcileError::NotLeading) {
        return;
    }
    let note = format!("nothing is done, because it cannot be written down first: {error}; it is tried again");
    let event = Event::warning(EventReason::RecoveryWithheld, "Wait", note);
    ctx.shared.events.publish(&object_reference::<ResiliencePolicy>(policy.meta()), &event);
}

/// Tells on the Recoveries themselves what begins and what is over.
fn tell(ctx: &Context, ledger: &Ledger, begun: &[Record], finished: &[Record]) {
    let all = begun.iter().map(|record| (record, events::started(record)));
    for (record, event) in all.chain(finished.iter().map(|record| (record, events::finished(record)))) {
        tell_on(ctx, ledger, record, &event);
    }
}

fn tell_on(ctx: &Context, ledger: &Ledger, record: &Record, event: &Event) {
    if let Some(entry) = ledger.entry(&record.id) {
        ctx.shared.events.publish(&object_reference::<Recovery>(&entry.meta), event);
    }
}

/// Tells what was refused for now, when that is news.
fn tell_refused(ctx: &Context, policy: &ResiliencePolicy, ledger: &Ledger, before: &History, after: &History) {
    let reference = object_reference::<ResiliencePolicy>(policy.meta());
    for record in events::newly_refused(before, after) {
        let event = events::refused(record);
        ctx.shared.events.publish(&reference, &event);
        tell_on(ctx, ledger, record, &event);
    }
}

/// Sees to it that the checks of a policy are asked that the operator asks itself, and says what they say now. Of a policy that
/// has no workload, or cannot be used, none is asked.
fn asked_by_operator(
    ctx: &Context,
    policy: &ResiliencePolicy,
    namespace: &str,
    targets: &[Target],
    lost: &BTreeMap<String, String>,
    now: Timestamp,
) -> CurrentChecks {
    let key = ObjectKey::of(policy);
    let held = targets.iter().filter(|target| target.found && !lost.contains_key(&target.key));
    let held: Vec<_> = held.map(|target| target::workload_of(namespace, &target.key)).collect();
    ctx.checks.keep(&key, spec::asked::asked(&policy.spec).unwrap_or_default(), &held);
    ctx.checks.current(&key, now)
}

/// Whether a check fails in some workload, so that something may have to be begun.
fn is_unwell(held: &[&Target]) -> bool {
    held.iter().any(|target| {
        target.majorities.values().any(|majority| !majority.healthy)
            || target.pods.iter().any(|(_, _, evaluations)| evaluations.values().any(|one| !one.healthy))
    })
}

/// The actions that this decision begins.
fn begun(decision: &Decision, history: &History) -> Vec<Record> {
    let known = |id: &str| history.in_flight.iter().any(|known| known.id == id);
    decision.history.in_flight.iter().filter(|record| !known(&record.id)).cloned().collect()
}

async fn reconcile_unreadable(meta: &ObjectMeta, why: &str, ctx: &Context) -> Result<Next, ReconcileError> {
    // Its status cannot be compared, so it is written once for each edit.
    if ctx.status_writes.told_unreadable(meta) {
        return Ok(Next::AwaitChange);
    }
    warn!(why, "a policy cannot be read; the last valid configuration stays in effect");
    // Merged, not applied: history and budget must outlive an edit that cannot be read.
    let new = status::unreadable(meta, why, Timestamp::now());
    let parts = json!({ "observedGeneration": new.observed_generation, "conditions": new.conditions });
    write_unreadable_status::<ResiliencePolicy>(ctx, meta, &parts).await?;
    let note = format!("it cannot be read: {why}; the last valid configuration stays in effect");
    let event = Event::warning(EventReason::InvalidPolicy, "Keep", note);
    ctx.shared.events.publish(&object_reference::<ResiliencePolicy>(meta), &event);
    Ok(Next::AwaitChange)
}

/// How many steps are held back, by the reason that the status gives for it.
fn withheld_by_reason(decision: &Decision) -> BTreeMap<&'static str, i64> {
    let mut held = BTreeMap::new();
    for one in &decision.withheld {
        *held.entry(status::gate_reason(one.gate).as_str()).or_default() += 1;
    }
    held
}

fn count(ctx: &Context, policy: &ResiliencePolicy, begun: &[Record], decision: &Decision) {
    let labels = |action: RecoveryAction, outcome| RecoveryLabels {
        namespace: policy.namespace().unwrap_or_default(),
        policy: policy.name_any(),
        action: action.as_str(),
        outcome,
    };
    let counter = |record: &Record, outcome| {
        // What was only rehearsed is no action.
        let outcome = if record.dry_run { "simulated" } else { outcome };
        ctx.shared.metrics.recovery_actions.get_or_create(&labels(record.step.action, outcome)).inc();
    };
    for record in decision.finished.iter().filter(|record| !record.dry_run) {
        match record.outcome {
            Outcome::Succeeded => counter(record, "succeeded"),
            Outcome::Failed => counter(record, "failed"),
            Outcome::Cancelled => counter(record, "cancelled"),
            Outcome::Pending | Outcome::Waiting | Outcome::Verifying => {}
        }
    }
    for record in begun {
        counter(record, "started");
    }
}
