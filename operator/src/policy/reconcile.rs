//! The policy controller: says in the status the outcome of a policy, and recovers its workloads.
//!
//! One reconcile: gather, decide (pure), write the status with every intent in it (fenced), execute what is pending, and
//! write what came of it. The intent is always written before the act.

use super::{
    events::{policy_events, refused},
    execute::execute,
    history,
    observe::observe,
    status::{self, Inputs},
};
use crate::{
    context::Context,
    crash_point::CrashPoint,
    error::ReconcileError,
    kubernetes::{events::Event, meta::object_reference, watches::Policy},
    policy::cleanup_jobs,
    spec,
    status::{
        target::{self, Target},
        write::{cache_is_stale, note_written, patch_status, write_status, written_before},
    },
    telemetry::metrics::{ReconcileLabels, RecoveryLabels},
    workload,
};
use contract::WorkloadId;
use crds::{ResiliencePolicy, resilience_policy::Mode};
use engine::recovery::{self, Action as RecoveryAction, Decision, Outcome, Record};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt, runtime::controller::Action};
use serde_json::json;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tracing::warn;

/// Reconciles one object.
pub async fn reconcile(policy: Arc<Policy>, ctx: Arc<Context>) -> Result<Action, ReconcileError> {
    if !ctx.shared.fence.holds() {
        return Ok(Action::await_change());
    }
    let uid = policy.meta().uid.clone().unwrap_or_default();
    if cache_is_stale(&ctx, policy.meta()) {
        return Ok(Action::requeue(Duration::from_millis(100)));
    }
    let result = match &policy.0 {
        Ok(readable) => reconcile_readable(readable, &ctx).await,
        Err(unreadable) => reconcile_unreadable(policy.meta(), &unreadable.to_string(), &ctx).await,
    };
    let label = if result.is_ok() { "ok" } else { "error" };
    ctx.shared.metrics.reconciliations.get_or_create(&ReconcileLabels { kind: "policy", result: label }).inc();
    if result.is_ok() {
        ctx.backoffs.forget(&uid);
    }
    result
}

async fn reconcile_readable(policy: &ResiliencePolicy, ctx: &Context) -> Result<Action, ReconcileError> {
    // Whole milliseconds, as status keeps them.
    let now = Timestamp::now();
    let now = Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now);
    let namespace = policy.namespace().unwrap_or_default();
    let settings = spec::policy::policy(&policy.spec);
    let recovery = spec::recovery::recovery(&policy.spec, ctx.shared.args.dry_run);
    let targets: Vec<Target> =
        policy.spec.target_refs.iter().map(|reference| target::look_up(ctx, &namespace, &reference.name)).collect();
    let lost = lost_claims(policy, ctx, &namespace);
    let held: Vec<&Target> = targets.iter().filter(|target| target.found && !lost.contains_key(&target.name)).collect();
    let old = policy.status.clone().unwrap_or_default();
    let history = history::read(old.recovery.as_ref(), &policy.spec);

    let decision = if settings.is_ok() {
        let jobs = cleanup_jobs::gather(ctx, &namespace, &history).await;
        let observed = observe(policy, &held, &history, jobs, ctx.shared.leading_since(now));
        recovery::decide(&recovery, &observed, &history, &policy.uid().unwrap_or_default(), now)
    } else {
        Decision { history: history.clone(), ..Decision::default() }
    };
    let would_publish = would_publish(policy, ctx, &namespace, &held);
    let inputs = Inputs {
        policy,
        settings: &settings,
        recovery: &recovery,
        targets: &targets,
        lost: &lost,
        would_publish: &would_publish,
        operator_dry_run: ctx.shared.args.dry_run,
        now,
    };
    let new = status::build(&inputs, &decision, &old);
    let reference = object_reference::<ResiliencePolicy>(policy.meta());
    let mut meta = policy.metadata.clone();
    if new != old {
        let begun: Vec<_> =
            decision.execute.iter().filter(|act| !history.in_flight.iter().any(|known| known.id == act.id)).collect();
        if !begun.is_empty() {
            ctx.shared.crash(CrashPoint::BeforeIntent);
        }
        if !decision.finished.is_empty() {
            ctx.shared.crash(CrashPoint::BeforeStatus);
        }
        meta.resource_version = write_status::<ResiliencePolicy>(ctx, &meta, &new).await?;
        if !begun.is_empty() {
            ctx.shared.crash(CrashPoint::AfterIntent);
        }
        let changed_at = ctx.seen_at(&policy.uid().unwrap_or_default(), policy.metadata.generation.unwrap_or_default());
        for event in policy_events(&old, &new, &decision, target::programmed_note(&held, changed_at)) {
            ctx.shared.events.publish(&reference, &event);
        }
        count(ctx, policy, &begun, &decision);
    }
    if !decision.execute.is_empty() {
        // Also what was pending before, if nobody can vouch for it: it is executed again under its id.
        let executed = execute(policy, ctx, &namespace, &decision).await?;
        let after = status::build(&inputs, &executed, &new);
        if after != new {
            write_status::<ResiliencePolicy>(ctx, &meta, &after).await?;
            for event in refused(&new, &after) {
                ctx.shared.events.publish(&reference, &event);
            }
        }
        let pause = if executed.execute.is_empty() { Duration::from_millis(200) } else { Duration::from_secs(1) };
        return Ok(Action::requeue(pause));
    }
    let wait = decision.next_check.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    Ok(wait.map_or_else(Action::await_change, |wait| Action::requeue(wait.max(Duration::from_millis(20)))))
}

async fn reconcile_unreadable(meta: &ObjectMeta, why: &str, ctx: &Context) -> Result<Action, ReconcileError> {
    // Its status cannot be read, so the write is remembered by generation: once for each edit.
    if written_before(ctx, meta) {
        return Ok(Action::await_change());
    }
    warn!(policy = %meta.name.clone().unwrap_or_default(), why, "a policy cannot be read; the last valid configuration stays in effect");
    // Merged, not applied: history and budget must outlive an edit that cannot be read.
    let new = status::unreadable(meta, why, Timestamp::now());
    let status = json!({ "observedGeneration": new.observed_generation, "conditions": new.conditions });
    patch_status::<ResiliencePolicy>(ctx, meta, &status, false).await?;
    note_written(ctx, meta);
    let note = format!("it cannot be read: {why}; the last valid configuration stays in effect");
    let event = Event::warning("InvalidPolicy", "Keep", note);
    ctx.shared.events.publish(&object_reference::<ResiliencePolicy>(meta), &event);
    Ok(Action::await_change())
}

/// The targets that an older policy has, with that policy's name.
fn lost_claims(policy: &ResiliencePolicy, ctx: &Context, namespace: &str) -> BTreeMap<String, String> {
    if policy.spec.mode == Mode::DryRun {
        return BTreeMap::new();
    }
    let name = policy.name_any();
    let targets = policy.spec.target_refs.iter().map(|reference| reference.name.clone());
    let other = |target: String| {
        let id = WorkloadId { namespace: namespace.to_owned(), name: target };
        let holder = workload::reconcile::holder(ctx, &id).filter(|holder| *holder != name)?;
        Some((id.name, holder))
    };
    targets.filter_map(other).collect()
}

/// In a dry run: the hash that each target would get.
fn would_publish(
    policy: &ResiliencePolicy,
    ctx: &Context,
    namespace: &str,
    held: &[&Target],
) -> BTreeMap<String, String> {
    if policy.spec.mode != Mode::DryRun && !ctx.shared.args.dry_run {
        return BTreeMap::new();
    }
    held.iter()
        .filter_map(|target| {
            let id = WorkloadId { namespace: namespace.to_owned(), name: target.name.clone() };
            Some((target.name.clone(), workload::reconcile::preview(ctx, &id, policy)?))
        })
        .collect()
}

fn count(ctx: &Context, policy: &ResiliencePolicy, begun: &[&Record], decision: &Decision) {
    let labels = |action: RecoveryAction, outcome| RecoveryLabels {
        namespace: policy.namespace().unwrap_or_default(),
        policy: policy.name_any(),
        action: status::action_name(action),
        outcome,
    };
    for record in &decision.finished {
        let outcome = match record.outcome {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
            Outcome::Pending | Outcome::Waiting | Outcome::Verifying => continue,
        };
        ctx.shared.metrics.recovery_actions.get_or_create(&labels(record.step.action, outcome)).inc();
    }
    for record in begun {
        ctx.shared.metrics.recovery_actions.get_or_create(&labels(record.step.action, "started")).inc();
    }
}
