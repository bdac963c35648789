//! The recovery controller: keeps the ledger of each workload in order. What its policies do not decide about is told so or
//! brought to its end, and what is needed no more is forgotten. The actions themselves are the policy controller's work.

use super::{
    index::MOST_WAITING,
    ledger,
    object::{Entry, Told},
};
use crate::{
    context::Context,
    error::ReconcileError,
    kubernetes::{
        clients::call,
        controller::{Next, Reconciler},
    },
    pods::prober::now_in_milliseconds,
    spec, workload,
};
use contract::WorkloadId;
use crds::{Recovery, recovery::MAX_PER_WORKLOAD, resilience_policy::Mode};
use engine::recovery::{History, Outcome, Retention, Storm, forgettable};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Preconditions},
};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::time::Instant;

/// For how long a policy that went away may come back before what it had in flight is given up: `kubectl replace` deletes it
/// and makes it again.
const POLICY_MAY_COME_BACK: Duration = Duration::from_secs(30);
/// How often a ledger in which nothing happens is looked at: what is in it grows old.
const LOOK_AGAIN: Duration = Duration::from_secs(15 * 60);
/// Most objects that are deleted in one go.
const MOST_DELETIONS: usize = 50;

/// The recovery controller.
pub struct RecoveryReconciler(pub Arc<Context>);

impl Reconciler for RecoveryReconciler {
    type Key = WorkloadId;
    const KIND: &'static str = "recovery";

    async fn reconcile(&self, id: &WorkloadId) -> Result<Next, ReconcileError> {
        let ctx = &*self.0;
        let entries = ctx.ledger.of(id);
        if entries.is_empty() || !ctx.shared.fence.holds() || !ctx.ledger.is_filled() {
            ctx.orphans().remove(id);
            return Ok(Next::AwaitChange);
        }
        let abandoned = abandoned(ctx, id, &entries);
        // What a person asks for is no remainder of a policy: that it waits for one is said at once.
        let there = ctx.index.workload(id).is_some();
        let remainders =
            abandoned.iter().any(|entry| !there || !entry.record.by_hand || entry.record.executed_at.is_some());
        let wait = if remainders {
            let since = *ctx.orphans().entry(id.clone()).or_insert_with(Instant::now);
            POLICY_MAY_COME_BACK.checked_sub(since.elapsed()).filter(|wait| !wait.is_zero())
        } else {
            ctx.orphans().remove(id);
            None
        };
        if let Some(wait) = wait {
            return Ok(Next::After(wait));
        }
        for entry in abandoned {
            give_up(ctx, id, entry).await?;
        }
        refuse_too_many(ctx, &entries).await?;
        let more = forget(ctx, id, &entries).await?;
        Ok(Next::After(if more { Duration::from_secs(1) } else { LOOK_AGAIN }))
    }

    async fn report_internal_error(&self, _: &WorkloadId, _: &str) {
        // There is no one object to say it on; the log and the metric have it.
    }
}

/// What is not over and no policy decides about.
fn abandoned<'a>(ctx: &Context, id: &WorkloadId, entries: &'a [Arc<Entry>]) -> Vec<&'a Arc<Entry>> {
    let held = workload::reconcile::holder(ctx, id).is_some();
    let names: BTreeSet<_> = ctx.index.policies_of(id).iter().map(|policy| policy.name_any()).collect();
    let decided = |entry: &Entry| {
        let own = entry.policy.as_ref().is_some_and(|policy| names.contains(policy));
        if entry.record.dry_run { own } else { held || own }
    };
    let under_way = |entry: &Entry| entry.record.finished_at.is_none() && entry.told != Told::ByNewerVersion;
    entries.iter().filter(|entry| under_way(entry) && !decided(entry)).collect()
}

/// People may have much waiting; what is more than that only keeps the rest from being looked at.
async fn refuse_too_many(ctx: &Context, entries: &[Arc<Entry>]) -> Result<(), ReconcileError> {
    let mut waiting: Vec<_> =
        entries.iter().filter(|entry| entry.record.by_hand && entry.record.finished_at.is_none()).collect();
    waiting.sort_by_key(|entry| entry.record.started_at);
    for entry in waiting.into_iter().skip(MOST_WAITING).take(MOST_DELETIONS) {
        let why = format!("more than {MOST_WAITING} Recoveries that people made wait for this workload");
        ledger::end(ctx, entry, Outcome::Failed, &why).await?;
    }
    Ok(())
}

async fn give_up(ctx: &Context, id: &WorkloadId, entry: &Entry) -> Result<(), ReconcileError> {
    let kind = id.kind;
    if ctx.index.workload(id).is_none() {
        let why = format!("there is no {kind} {}", id.name);
        return ledger::end(ctx, entry, Outcome::Cancelled, &why).await;
    }
    if entry.record.by_hand && entry.record.executed_at.is_none() {
        let why = format!("held back: no ResiliencePolicy is in force for {kind} {}; it waits for one", id.name);
        return ledger::end(ctx, entry, Outcome::Waiting, &why).await;
    }
    ledger::end(ctx, entry, Outcome::Cancelled, "no policy recovers this workload any more").await
}

/// Deletes what is needed no more; says whether there is more of it.
async fn forget(ctx: &Context, id: &WorkloadId, entries: &[Arc<Entry>]) -> Result<bool, ReconcileError> {
    let now = now_in_milliseconds();
    let understood = entries.iter().filter(|entry| entry.told != Told::ByNewerVersion);
    let history: History = understood.map(|entry| entry.record.clone()).collect();
    let policies = ctx.index.policies_of(id);
    let settings = policies.iter().filter_map(|policy| policy.0.as_ref().ok()).map(|policy| {
        let settings = spec::recovery::recovery(&policy.spec, policy.spec.mode == Mode::DryRun, Storm::default());
        settings.limits.budget_interval_ms.max(settings.limits.cooldown_ms)
    });
    let retention = Retention {
        counted_for_ms: settings.max().unwrap_or(0),
        pods: ctx.index.pods_of(id).iter().map(|pod| pod.uid.to_string()).collect(),
        most: MAX_PER_WORKLOAD,
    };
    let forgettable = forgettable(&history, &retention, now);
    let api: Api<Recovery> = Api::namespaced(ctx.shared.clients.act.clone(), &id.namespace);
    let of = |intent: &String| entries.iter().find(|entry| entry.record.id == *intent);
    let there = |entry: &&Arc<Entry>| !entry.is_being_deleted;
    for entry in forgettable.iter().filter_map(of).filter(there).take(MOST_DELETIONS) {
        if !ctx.shared.fence.holds() {
            return Err(ReconcileError::NotLeading);
        }
        let (uid, resource_version) = (entry.meta.uid.clone(), entry.meta.resource_version.clone());
        let exactly = Preconditions { uid, resource_version };
        let how = DeleteParams { preconditions: Some(exactly), ..DeleteParams::default() };
        match call(api.delete(&entry.key().name, &how)).await {
            Ok(_) => {}
            // The watch may never have shown it.
            Err(error) if error.is_not_found() => drop(ctx.ledger.remove(&entry.key(), entry.meta.uid.as_deref())),
            Err(error) if error.is_conflict() => {}
            Err(error) => return Err(ReconcileError::api("deleting a Recovery that is needed no more")(error)),
        }
    }
    Ok(forgettable.len() > MOST_DELETIONS)
}
