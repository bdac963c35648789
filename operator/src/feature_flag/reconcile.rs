//! The flag set controller: says in the status the outcome of a set. Publishing is the workload controller's work.

use super::{
    events::publish_events,
    status::{refused, status},
};
use crate::{
    context::Context,
    error::ReconcileError,
    kubernetes::watches::FlagSet,
    status::{
        conditions,
        write::{note_written, write_status, written_before},
    },
    telemetry::metrics::ReconcileLabels,
};
use crds::{FeatureFlag, FeatureFlagStatus};
use jiff::Timestamp;
use kube::{Resource, runtime::controller::Action};
use std::{sync::Arc, time::Duration};

/// Reconciles one object.
pub async fn reconcile(set: Arc<FlagSet>, ctx: Arc<Context>) -> Result<Action, ReconcileError> {
    if !ctx.shared.fence.holds() {
        return Ok(Action::await_change());
    }
    let result = reconcile_readable(&set, &ctx).await;
    let label = if result.is_ok() { "ok" } else { "error" };
    ctx.shared.metrics.reconciliations.get_or_create(&ReconcileLabels { kind: "flag", result: label }).inc();
    if result.is_ok() {
        ctx.backoffs.forget(&set.meta().uid.clone().unwrap_or_default());
    }
    result
}

async fn reconcile_readable(set: &FlagSet, ctx: &Context) -> Result<Action, ReconcileError> {
    let now = Timestamp::now();
    let (old, new, next) = match &set.0 {
        // Its status cannot be read, so the write is remembered by generation: once for each edit.
        Err(_) if written_before(ctx, set.meta()) => return Ok(Action::await_change()),
        Err(unreadable) => {
            let verdicts = conditions::invalid("InvalidFlagSet", format!("it cannot be read: {unreadable}"));
            (None, refused(FeatureFlagStatus::default(), verdicts, set.meta().generation, now), None)
        }
        Ok(set) => {
            let (status, next) = status(set, ctx, now);
            (set.status.clone(), status, next)
        }
    };
    if old.as_ref() != Some(&new) {
        write_status::<FeatureFlag>(ctx, set.meta(), &new).await?;
        if set.0.is_err() {
            note_written(ctx, set.meta());
        }
        publish_events(ctx, set, old.as_ref(), &new);
    }
    let wait = next.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    Ok(wait.map_or_else(Action::await_change, |wait| Action::requeue(wait + Duration::from_millis(1))))
}
