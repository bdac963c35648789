//! Executes intents. Each action carries the intent's id, or a precondition, to where it lands: so a repetition, late or
//! from another replica, changes nothing.

use super::{cleanup_jobs, rollout};
use crate::{
    context::Context,
    crash_point::CrashPoint,
    error::ReconcileError,
    kubernetes::clients::call,
    pods::{
        client::{Access, Endpoint, PodError},
        fair_queue::Class,
        prober::now_in_milliseconds,
    },
    status::target::{Target, workload_of},
    telemetry::metrics::PodCallLabels,
};
use contract::{ActionOutcome, ActionRequest};
use crds::ResiliencePolicy;
use engine::recovery::{Action, Decision, Outcome, Pod as SubjectPod, Record, Undo};
use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt, api::PostParams};
use serde_json::{Value, json};
use std::{sync::PoisonError, time::Duration};
use tokio::time::Instant;
use tracing::{info, warn};

/// How long until what was refused for now is asked for again.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// Actions of one policy that are under way at once.
const AT_ONCE: usize = 16;

/// What came of executing an intent.
pub enum Attempt {
    /// It is done, now or before; what there is to say of it.
    Done(Option<String>),
    /// What protects the workload refused it for now.
    Refused(String),
    /// It is not known to be done.
    Unknown(String),
}

/// Executes what a decision asks for, and says what is known of it then. What is left to do is in its `execute`.
pub async fn execute(
    policy: &ResiliencePolicy,
    ctx: &Context,
    namespace: &str,
    held: &[&Target],
    decision: &Decision,
) -> Result<Decision, ReconcileError> {
    let mut after = decision.clone();
    after.execute.clear();
    after.finished.clear();
    // Side by side: a pod that hangs must not use up the time of those behind it.
    let mut attempts = Vec::new();
    for record in &decision.execute {
        let target = held.iter().find(|target| target.key == record.subject.target);
        let undo = target.and_then(|target| target.undo.as_ref()?.as_ref().ok());
        attempts.push(fenced(ctx, namespace, record, undo));
    }
    let attempts: Vec<_> = futures::stream::iter(attempts).buffered(AT_ONCE).collect().await;
    for attempt in attempts {
        let (record, attempt) = attempt?;
        let now = now_in_milliseconds();
        let Some(known) = after.history.in_flight.iter_mut().find(|other| other.id == record.id) else { continue };
        let (policy, intent, subject) = (policy.name_any(), &record.id, record.subject.display_name());
        let action = record.step.action;
        match attempt {
            Attempt::Done(message) => {
                info!(%policy, %intent, subject, %action, "executed");
                known.outcome = Outcome::Verifying;
                known.executed_at = Some(now);
                known.message = message;
            }
            Attempt::Refused(why) => {
                if known.outcome != Outcome::Waiting {
                    warn!(%policy, %intent, subject, %action, why, "refused for now");
                }
                known.outcome = Outcome::Waiting;
                known.message = Some(why);
                after.execute.push(record.clone());
            }
            Attempt::Unknown(why) => {
                warn!(%policy, %intent, subject, %action, why, "not executed yet");
                known.message = Some(why);
                after.execute.push(record.clone());
            }
        }
    }
    Ok(after)
}

async fn fenced<'a>(
    ctx: &Context,
    namespace: &str,
    record: &'a Record,
    undo: Option<&Undo>,
) -> Result<(&'a Record, Attempt), ReconcileError> {
    if !ctx.shared.fence.holds() {
        return Err(ReconcileError::NotLeading);
    }
    let attempt = execute_step(ctx, namespace, record, undo).await;
    ctx.shared.crash(CrashPoint::AfterAct);
    Ok((record, attempt))
}

async fn execute_step(ctx: &Context, namespace: &str, record: &Record, undo: Option<&Undo>) -> Attempt {
    let result = match (record.step.action, &record.subject.pod) {
        (Action::TrimMemory, Some(pod)) => ask_pod(ctx, namespace, record, pod, contract::Action::TrimMemory).await,
        (Action::ResetConnections, Some(pod)) => {
            ask_pod(ctx, namespace, record, pod, contract::Action::ResetConnections).await
        }
        (Action::RunCleanupJob, _) => cleanup_jobs::run(ctx, namespace, record).await,
        (Action::RestartPod, Some(pod)) => return evict(ctx, namespace, record, pod).await,
        (Action::RolloutRestart, _) => return rollout::restart(ctx, namespace, record).await,
        (Action::Rollback, _) => return rollout::roll_back(ctx, namespace, record, undo).await,
        (action, _) => Err(format!("this version cannot do {action}")),
    };
    result.map_or_else(Attempt::Unknown, Attempt::Done)
}

/// Asks the pod to do something for itself. It remembers the ids that it has done, and does nothing for a process that it is
/// not.
async fn ask_pod(
    ctx: &Context,
    namespace: &str,
    record: &Record,
    pod: &SubjectPod,
    action: contract::Action,
) -> Result<Option<String>, String> {
    let id = workload_of(namespace, &record.subject.target);
    let workload_uid = ctx.fleet.read(&id, |workload| workload.uid.clone()).ok_or("the workload is not known")?;
    // Of this workload only: no other pod may see its token.
    let found = ctx.index.pods_of(&id).into_iter().find(|known| *known.uid == *pod.uid).ok_or("the pod is gone")?;
    let endpoint = Endpoint::admin(&found).ok_or("the pod has no address")?;
    let request = ActionRequest {
        intent_id: record.id.clone(),
        action,
        check: record.subject.check.clone(),
        instance: record.instance.clone(),
    };
    let auth = ctx.fleet.read(&id, |workload| workload.pod(&pod.uid).map(|pod| pod.auth.clone())).flatten();
    let token = Some(ctx.shared.tokens.current(&workload_uid));
    let auth = auth.unwrap_or_default();
    let mut access = Access { to: &endpoint, uid: &pod.uid, signs: found.signs, token, auth };
    let answer = {
        let _slot = ctx.shared.pod_calls.slot(&id, Class::Action, false).await;
        ctx.shared.pods.execute(&mut access, &request).await
    };
    ctx.fleet.learn_auth(&id, &pod.uid, &access.auth);
    let label = answer.as_ref().map_or_else(PodError::label, |_| "ok");
    ctx.shared.metrics.pod_calls.get_or_create(&PodCallLabels { call: "action", result: label }).inc();
    let answer = answer.map_err(|error| error.to_string())?;
    match answer.outcome {
        ActionOutcome::Done | ActionOutcome::AlreadyDone => Ok((!answer.message.is_empty()).then_some(answer.message)),
        outcome => Err(format!("the pod answered {outcome:?}: {}", answer.message)),
    }
}

/// Evicts the pod, so that disruption budgets hold. The uid is a precondition: a pod of the same name that took its place
/// is never evicted for it.
async fn evict(ctx: &Context, namespace: &str, record: &Record, pod: &SubjectPod) -> Attempt {
    if let Some(why) = refused_lately(ctx, &record.id) {
        return Attempt::Refused(why);
    }
    // Not kube's own helper: it names the options `delete_options`, which the API server does not read.
    let eviction = json!({
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": { "name": pod.name, "namespace": namespace },
        "deleteOptions": { "preconditions": { "uid": pod.uid } },
    });
    let api: Api<Pod> = Api::namespaced(ctx.shared.clients.act.clone(), namespace);
    let how = PostParams::default();
    let answer = call(api.create_subresource::<_, Value>("eviction", &pod.name, &how, &eviction)).await;
    let mut refused = ctx.refused.lock().unwrap_or_else(PoisonError::into_inner);
    match answer {
        Ok(_) => {
            refused.remove(&record.id);
            Attempt::Done(Some("evicted; another pod takes its place".to_owned()))
        }
        // Gone, or another pod has its name: what was wanted has happened.
        Err(error) if error.is_not_found() || (error.is_conflict() && error.to_string().contains("UID")) => {
            refused.remove(&record.id);
            Attempt::Done(Some("the pod was gone already".to_owned()))
        }
        Err(error) if error.is_of_disruption_budget() => {
            let why = format!("the eviction is refused for now: {error}");
            refused.retain(|_, (at, _)| at.elapsed() < Duration::from_secs(600));
            refused.insert(record.id.clone(), (Instant::now(), why.clone()));
            Attempt::Refused(why)
        }
        // The API server itself is too busy, as a rule for a second.
        Err(error) if error.code() == Some(429) => {
            Attempt::Unknown(format!("the API server is busy, and is asked again: {error}"))
        }
        Err(error) => Attempt::Unknown(error.to_string()),
    }
}

/// Why an intent was refused a moment ago, if it was.
fn refused_lately(ctx: &Context, id: &str) -> Option<String> {
    let refused = ctx.refused.lock().unwrap_or_else(PoisonError::into_inner);
    refused.get(id).filter(|(at, _)| at.elapsed() < ASK_AGAIN).map(|(_, why)| why.clone())
}
