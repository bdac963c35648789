//! The flag set controller: says in the status whether a set is in force. Publishing is the workload controller's work.

use super::{
    events::publish_events,
    status::{Settling, refused, status},
};
use crate::{
    context::Context,
    error::ReconcileError,
    fleet::{flag_set::FlagSet, index::ObjectKey},
    kubernetes::controller::{Next, Reconciler, SHORTEST_WAIT, UNTIL_SHOWN},
    status::{
        conditions,
        write::{write_internal_error, write_status, write_unreadable_status},
    },
};
use crds::{FeatureFlag, FeatureFlagStatus, Reason};
use jiff::Timestamp;
use kube::Resource;
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// The flag set controller.
pub struct FlagSetReconciler(pub Arc<Context>);

impl Reconciler for FlagSetReconciler {
    type Key = ObjectKey;
    const KIND: &'static str = "flag";

    async fn reconcile(&self, key: &ObjectKey) -> Result<Next, ReconcileError> {
        let ctx = &*self.0;
        let Some(set) = ctx.index.flag_set(key).filter(|_| ctx.shared.fence.holds()) else {
            return Ok(Next::AwaitChange);
        };
        ctx.shared.fail_for_test(&key.name).await;
        if ctx.managed_elsewhere(&key.namespace, set.0.iter().flat_map(|set| &set.spec.target_refs)).is_some() {
            return Ok(Next::AwaitChange);
        }
        reconcile(&set, ctx).await
    }

    async fn report_internal_error(&self, key: &ObjectKey, message: &str) {
        let Some(set) = self.0.index.flag_set(key) else { return };
        let old = set.0.as_ref().ok().and_then(|set| set.status.as_ref());
        let old = old.map(|status| status.conditions.as_slice()).unwrap_or_default();
        write_internal_error::<FeatureFlag>(&self.0, set.meta(), old, message).await;
    }
}

async fn reconcile(set: &FlagSet, ctx: &Context) -> Result<Next, ReconcileError> {
    let now = Timestamp::now();
    let readable = match &set.0 {
        Ok(readable) => readable,
        // Its status cannot be compared, so it is written once for each edit.
        Err(_) if ctx.status_writes.told_unreadable(set.meta()) => return Ok(Next::AwaitChange),
        Err(unreadable) => {
            let verdicts = conditions::invalid(Reason::InvalidFlagSet, format!("it cannot be read: {unreadable}"));
            let new = refused(FeatureFlagStatus::default(), verdicts, set.meta().generation, now);
            let parts = json!({ "observedGeneration": new.observed_generation, "conditions": new.conditions });
            write_unreadable_status::<FeatureFlag>(ctx, set.meta(), &parts).await?;
            publish_events(ctx, set, None, &new);
            return Ok(Next::AwaitChange);
        }
    };
    let Some(reviewed) = set.reviewed() else { return Ok(Next::AwaitChange) };
    if ctx.status_writes.cache_is_stale(set.meta()) {
        return Ok(Next::After(UNTIL_SHOWN));
    }
    let (new, next) = match status(readable, reviewed, ctx, now) {
        Ok(known) => known,
        Err(Settling(wait)) => return Ok(Next::After(wait.max(SHORTEST_WAIT))),
    };
    let old = readable.status.as_ref();
    if old != Some(&new) {
        if let Some(wait) = ctx.status_writes.wait(set.meta(), Instant::now()) {
            return Ok(Next::After(wait));
        }
        write_status::<FeatureFlag>(ctx, set.meta(), &new).await?;
        publish_events(ctx, set, old, &new);
    }
    let wait = next.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    Ok(wait.map_or(Next::AwaitChange, |wait| Next::After(wait + Duration::from_millis(1))))
}
