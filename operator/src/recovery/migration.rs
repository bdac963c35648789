//! What version 0.1 wrote into the status of a policy becomes Recoveries, so that what it had in flight is brought to its
//! end, and what it did counts.

use super::{ledger, object::is_slot};
use crate::{context::Context, error::ReconcileError, spec::recovery::action, status::write::take_out_of_status};
use contract::canonical;
use crds::{
    ResiliencePolicy, ResiliencePolicySpec,
    resilience_policy::{self as api, StepAction},
    status::{ActionOutcome, ActionRecord, RecoverySummary},
};
use engine::recovery::{Outcome, Pod, Record, Step, Subject};
use serde_json::json;

/// Time of a step that the policy does not have any more.
const FORGOTTEN_TIMEOUT_MS: u64 = 60_000;

/// Makes Recoveries of what a status has that names none, and takes it out of the status. Until that is done, all of it is
/// done again, and changes nothing. Says whether there was anything to do: then the policy has changed.
pub async fn migrate(ctx: &Context, policy: &ResiliencePolicy) -> Result<bool, ReconcileError> {
    let old = policy.status.as_ref().and_then(|status| status.recovery.as_ref());
    let records = old.map(|old| of_0_1(old, &policy.spec)).unwrap_or_default();
    if records.is_empty() {
        return Ok(false);
    }
    for record in &records {
        ledger::adopt(ctx, policy, record).await?;
    }
    // An applied status would leave what somebody else has written.
    let gone = json!({ "recovery": { "inFlight": null, "recent": null } });
    take_out_of_status::<ResiliencePolicy>(ctx, &policy.metadata, &gone).await?;
    Ok(true)
}

fn of_0_1(status: &RecoverySummary, spec: &ResiliencePolicySpec) -> Vec<Record> {
    let all = status.in_flight.iter().chain(&status.recent);
    all.filter(|record| record.recovery.is_none()).map(|record| self::record(record, spec)).collect()
}

/// The CronJob of a step. What has one, must name one; of a step that is not there any more, nothing is begun.
fn cron_job(action: StepAction, step: Option<&api::Step>) -> Option<String> {
    let named = step.and_then(|step| step.cron_job_ref.as_ref()).map(|reference| reference.name.clone());
    named.or_else(|| (action == StepAction::RunCleanupJob).then(|| "not-known".to_owned()))
}

fn record(from: &ActionRecord, spec: &ResiliencePolicySpec) -> Record {
    let place = |value: i32| usize::try_from(value.saturating_sub(1)).unwrap_or(0);
    let index = place(from.step);
    let ladders = spec.recovery.iter().flat_map(|recovery| &recovery.ladders);
    // Only while it is still the same step: an edit may have put another one in its place.
    let step = ladders
        .filter(|ladder| ladder.check == from.check)
        .find_map(|ladder| ladder.steps.get(index))
        .filter(|step| step.action == from.action);
    // Anybody who may edit a status can have written anything into it.
    let id =
        if is_slot(&from.id) { from.id.clone() } else { canonical::content_hash(&json!(from.id))[..16].to_owned() };
    Record {
        slot: id.clone(),
        id,
        after: None,
        by_hand: false,
        withdrawn: false,
        subject: Subject {
            target: from.target.clone(),
            pod: from.pod.clone().zip(from.pod_uid.clone()).map(|(name, uid)| Pod { name, uid }),
            check: from.check.clone(),
        },
        instance: from.pod_instance.clone(),
        step: Step {
            action: action(from.action),
            cron_job: cron_job(from.action, step),
            timeout_ms: step.map_or(FORGOTTEN_TIMEOUT_MS, |step| step.timeout.millis()),
        },
        index,
        steps: place(from.steps) + 1,
        failed_at: from.failed_at.0,
        started_at: from.started_at.0,
        executed_at: from.acted_at.as_ref().map(|at| at.0),
        finished_at: from.finished_at.as_ref().map(|at| at.0),
        outcome: match from.outcome {
            ActionOutcome::Pending => Outcome::Pending,
            ActionOutcome::Waiting => Outcome::Waiting,
            ActionOutcome::Verifying => Outcome::Verifying,
            ActionOutcome::Succeeded => Outcome::Succeeded,
            ActionOutcome::Failed => Outcome::Failed,
            ActionOutcome::Cancelled => Outcome::Cancelled,
        },
        healed_at: None,
        before: None,
        successor: None,
        dry_run: from.dry_run,
        message: from.message.clone(),
    }
}
