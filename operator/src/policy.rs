//! The policy controller: says in the status what became of a policy, and heals its workloads.
//!
//! One pass: gather, decide (pure), write the status with every intent in it (fenced), carry out what is pending, and
//! write what came of it. The intent is always written before the act.

use crate::{
    caches::Policy,
    clients::call,
    error::ReconcileError,
    events::Story,
    guard::Guard,
    history,
    metrics::{PassLabels, RecoveryLabels},
    pod_client::Endpoint,
    policy_status::{self, Inputs},
    policy_stories,
    pusher::find_pod,
    shard::Shard,
    target::{self, Target},
    tokens::FIELD_MANAGER,
    translate, workload,
};
use contract::{ActionOutcome, ActionRequest, WorkloadId};
use crds::{
    ResiliencePolicy,
    resilience_policy::{CheckScope, Mode},
};
use engine::recovery::{
    self, Action as RecoveryAction, CheckState, Decision, History, Observed, Outcome, Pod, Record, Subject,
};
use jiff::Timestamp;
use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Resource, ResourceExt,
    api::{Patch, PatchParams},
    core::NamespaceResourceScope,
    runtime::controller::Action,
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, PoisonError},
    time::Duration,
};
use tracing::{info, warn};

/// What this version can carry out.
pub const SUPPORTED: [RecoveryAction; 1] = [RecoveryAction::ResetConnections];

/// One pass.
pub async fn reconcile(policy: Arc<Policy>, shard: Arc<Shard>) -> Result<Action, ReconcileError> {
    if !shard.shared.fence.holds() {
        return Ok(Action::await_change());
    }
    let uid = policy.meta().uid.clone().unwrap_or_default();
    if cache_is_stale(&shard, policy.meta()) {
        return Ok(Action::requeue(Duration::from_millis(100)));
    }
    let result = match &policy.0 {
        Ok(readable) => pass(readable, &shard).await,
        Err(unreadable) => unreadable_pass(policy.meta(), &unreadable.to_string(), &shard).await,
    };
    let label = if result.is_ok() { "ok" } else { "error" };
    shard.shared.metrics.passes.get_or_create(&PassLabels { kind: "policy", result: label }).inc();
    if result.is_ok() {
        shard.backoffs.forget(&uid);
    }
    result
}

/// Whether the cache still shows the object as it was before this process's own last write of its status.
fn cache_is_stale(shard: &Shard, meta: &ObjectMeta) -> bool {
    let written = shard.written.lock().unwrap_or_else(PoisonError::into_inner);
    let uid = meta.uid.as_deref().unwrap_or_default();
    written.get(uid).is_some_and(|before| meta.resource_version.as_deref() == Some(before.as_str()))
}

async fn pass(policy: &ResiliencePolicy, shard: &Shard) -> Result<Action, ReconcileError> {
    // Whole milliseconds, as status keeps them.
    let now = Timestamp::now();
    let now = Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now);
    let namespace = policy.namespace().unwrap_or_default();
    let settings = translate::policy(&policy.spec);
    let recovery = translate::recovery(&policy.spec, shard.shared.args.dry_run);
    let targets: Vec<Target> =
        policy.spec.target_refs.iter().map(|reference| target::look_up(shard, &namespace, &reference.name)).collect();
    let lost = lost_claims(policy, shard, &namespace);
    let held: Vec<&Target> = targets.iter().filter(|target| target.found && !lost.contains_key(&target.name)).collect();
    let old = policy.status.clone().unwrap_or_default();
    let history = history::read(old.recovery.as_ref(), &policy.spec);

    let decision = if settings.is_ok() {
        let observed = observe(policy, &held, &history);
        recovery::decide(&recovery, &observed, &history, &policy.uid().unwrap_or_default(), now)
    } else {
        Decision { history: history.clone(), ..Decision::default() }
    };
    let would_publish = would_publish(policy, shard, &namespace, &held);
    let inputs = Inputs {
        policy,
        settings: &settings,
        recovery: &recovery,
        targets: &targets,
        lost: &lost,
        would_publish: &would_publish,
        operator_dry_run: shard.shared.args.dry_run,
        now,
    };
    let new = policy_status::build(&inputs, &decision, &old);
    if new != old {
        let version = write_status::<ResiliencePolicy>(shard, policy.meta(), &new).await?;
        let changed_at =
            shard.seen_at(&policy.uid().unwrap_or_default(), policy.metadata.generation.unwrap_or_default());
        let reference = object_reference::<ResiliencePolicy>(policy.meta());
        for story in policy_stories::tell(&old, &new, &decision, target::live_story(&held, changed_at)) {
            shard.shared.events.tell(&reference, &story);
        }
        count(shard, policy, &decision);
        if !decision.act.is_empty() {
            let acted = act(policy, shard, &namespace, &decision).await?;
            let after = policy_status::build(&inputs, &acted, &new);
            if after != new {
                let meta = ObjectMeta { resource_version: version, ..policy.metadata.clone() };
                write_status::<ResiliencePolicy>(shard, &meta, &after).await?;
            }
            return Ok(Action::requeue(if acted.act.is_empty() {
                Duration::from_millis(200)
            } else {
                Duration::from_secs(1)
            }));
        }
    } else if !decision.act.is_empty() {
        // Pending from before, and nobody can vouch for it: it is carried out again under its id.
        let acted = act(policy, shard, &namespace, &decision).await?;
        let after = policy_status::build(&inputs, &acted, &old);
        if after != old {
            write_status::<ResiliencePolicy>(shard, policy.meta(), &after).await?;
        }
        return Ok(Action::requeue(Duration::from_secs(1)));
    }
    let wait = decision.next_check.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default());
    Ok(wait.map_or_else(Action::await_change, |wait| Action::requeue(wait.max(Duration::from_millis(20)))))
}

async fn unreadable_pass(meta: &ObjectMeta, why: &str, shard: &Shard) -> Result<Action, ReconcileError> {
    // Its status cannot be read, so the write is remembered by generation: once for each edit.
    if written_before(shard, meta) {
        return Ok(Action::await_change());
    }
    warn!(policy = %meta.name.clone().unwrap_or_default(), why, "a policy cannot be read; what was live before stays live");
    // Merged, not applied: history and budget must outlive an edit that cannot be read.
    let new = policy_status::unreadable(meta, why, Timestamp::now());
    let status = json!({ "observedGeneration": new.observed_generation, "conditions": new.conditions });
    patch_status::<ResiliencePolicy>(shard, meta, &status, false).await?;
    note_written(shard, meta);
    let note = format!("it cannot be read: {why}; what was live before stays live");
    let story = Story::warning("InvalidPolicy", "Keep", note);
    shard.shared.events.tell(&object_reference::<ResiliencePolicy>(meta), &story);
    Ok(Action::await_change())
}

/// Whether this process has written the status of an unreadable object in its present generation.
pub fn written_before(shard: &Shard, meta: &ObjectMeta) -> bool {
    let written = shard.written.lock().unwrap_or_else(PoisonError::into_inner);
    written.get(&unreadable_key(meta)) == meta.generation.map(|generation| generation.to_string()).as_ref()
}

/// Notes that it has.
pub fn note_written(shard: &Shard, meta: &ObjectMeta) {
    let mut written = shard.written.lock().unwrap_or_else(PoisonError::into_inner);
    written.insert(unreadable_key(meta), meta.generation.unwrap_or_default().to_string());
}

fn unreadable_key(meta: &ObjectMeta) -> String {
    format!("{}/unreadable", meta.uid.as_deref().unwrap_or_default())
}

/// The targets that an older policy has, with that policy's name.
fn lost_claims(policy: &ResiliencePolicy, shard: &Shard, namespace: &str) -> BTreeMap<String, String> {
    if policy.spec.mode == Mode::DryRun {
        return BTreeMap::new();
    }
    let name = policy.name_any();
    let targets = policy.spec.target_refs.iter().map(|reference| reference.name.clone());
    let other = |target: String| {
        let id = WorkloadId { namespace: namespace.to_owned(), name: target };
        let holder = workload::holder(shard, &id).filter(|holder| *holder != name)?;
        Some((id.name, holder))
    };
    targets.filter_map(other).collect()
}

/// In a dry run: the hash that each target would get.
fn would_publish(
    policy: &ResiliencePolicy,
    shard: &Shard,
    namespace: &str,
    held: &[&Target],
) -> BTreeMap<String, String> {
    if policy.spec.mode != Mode::DryRun && !shard.shared.args.dry_run {
        return BTreeMap::new();
    }
    held.iter()
        .filter_map(|target| {
            let id = WorkloadId { namespace: namespace.to_owned(), name: target.name.clone() };
            Some((target.name.clone(), workload::preview(shard, &id, policy)?))
        })
        .collect()
}

/// What recovery decides from.
fn observe(policy: &ResiliencePolicy, held: &[&Target], history: &History) -> Observed {
    let mut observed = Observed { supported: SUPPORTED.into(), ..Observed::default() };
    for target in held {
        observed.pods.extend(target.existing.iter().cloned());
        if target.rolling_out {
            observed.rolling_out.insert(target.name.clone());
        }
        for (dependency, view) in target.circuits.iter().filter(|(_, view)| view.quorum()) {
            let pods = format!("{} of {} pods", view.open, view.total);
            observed.open_on_quorum.insert((target.name.clone(), dependency.clone()), pods);
        }
        for check in &policy.spec.health_checks {
            match check.scope {
                CheckScope::Pod => observed.checks.extend(pod_checks(target, &check.name, history)),
                CheckScope::Workload => observed.checks.extend(workload_check(target, &check.name)),
            }
        }
    }
    observed
}

fn pod_checks(target: &Target, check: &str, history: &History) -> Vec<CheckState> {
    let state = |(uid, name, judgements): &(String, String, BTreeMap<_, engine::check::Judgement>)| {
        let judgement = judgements.get(check)?;
        let pod = Some(Pod { name: name.clone(), uid: uid.clone() });
        let subject = Subject { target: target.name.clone(), pod, check: check.to_owned() };
        // A failure that began before this process did: the history knows since when, so that its ladder goes on.
        let known = || history.in_flight.iter().chain(&history.recent).find(|record| record.subject == subject);
        let since = match judgement.began_before.then(known).flatten() {
            Some(record) if matches!(record.outcome, Outcome::Failed | Outcome::Pending | Outcome::Verifying) => {
                record.failed_at
            }
            _ => judgement.since,
        };
        Some(CheckState {
            since,
            subject,
            healthy: judgement.healthy,
            message: judgement.message.clone(),
            dependency: judgement.dependency.clone(),
        })
    };
    target.pods.iter().filter_map(state).collect()
}

/// One fact that all pods see: it is what most of them say.
fn workload_check(target: &Target, check: &str) -> Option<CheckState> {
    let reports: Vec<_> = target.pods.iter().filter_map(|(_, _, judgements)| judgements.get(check)).collect();
    let bad: BTreeSet<_> =
        reports.iter().filter(|judgement| !judgement.healthy).map(|judgement| judgement.since).collect();
    let failing = reports.iter().filter(|judgement| !judgement.healthy).count();
    let healthy = failing * 2 <= reports.len();
    let since = if healthy { reports.iter().map(|judgement| judgement.since).max()? } else { bad.first().copied()? };
    let message = reports
        .iter()
        .find(|judgement| !judgement.healthy)
        .map(|judgement| judgement.message.clone())
        .unwrap_or_default();
    let subject = Subject { target: target.name.clone(), pod: None, check: check.to_owned() };
    Some(CheckState { subject, healthy, since, message, dependency: None })
}

/// Carries out what is pending, and says what is known of it then.
async fn act(
    policy: &ResiliencePolicy,
    shard: &Shard,
    namespace: &str,
    decision: &Decision,
) -> Result<Decision, ReconcileError> {
    let mut after = decision.clone();
    after.act.clear();
    after.finished.clear();
    for record in &decision.act {
        if !shard.shared.fence.holds() {
            return Err(ReconcileError::NotLeading);
        }
        let result = carry_out(shard, namespace, record).await;
        let now = Timestamp::now();
        let now = Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now);
        let Some(position) = after.history.in_flight.iter().position(|other| other.id == record.id) else { continue };
        let known = &mut after.history.in_flight[position];
        match result {
            Ok(message) => {
                info!(policy = %policy.name_any(), intent = %record.id, subject = record.subject.display_name(), action = ?record.step.action, "carried out");
                known.outcome = Outcome::Verifying;
                known.acted_at = Some(now);
                known.message = message;
            }
            Err(why) => {
                warn!(policy = %policy.name_any(), intent = %record.id, subject = record.subject.display_name(), why, "not carried out yet");
                known.message = Some(why);
                after.act.push(record.clone());
            }
        }
    }
    Ok(after)
}

/// Carries one intent out. An error means that it is not known to be done; it is asked for again under the same id.
async fn carry_out(shard: &Shard, namespace: &str, record: &Record) -> Result<Option<String>, String> {
    let (Some(pod), RecoveryAction::ResetConnections) = (&record.subject.pod, record.step.action) else {
        return Err(format!("this version cannot do {:?}", record.step.action));
    };
    let id = WorkloadId { namespace: namespace.to_owned(), name: record.subject.target.clone() };
    let workload_uid = shard.board.read(&id, |workload| workload.uid.clone()).ok_or("the workload is not known")?;
    let found = find_pod(&shard.caches, namespace, &pod.name, &pod.uid).ok_or("the pod is gone")?;
    let endpoint = Endpoint::admin(&found).ok_or("the pod has no address")?;
    let request = ActionRequest {
        intent_id: record.id.clone(),
        action: contract::Action::ResetConnections,
        check: record.subject.check.clone(),
    };
    let token = shard.shared.tokens.current(&workload_uid);
    let answer = shard.shared.pods.act(&endpoint, &token, &request).await.map_err(|error| error.to_string())?;
    match answer.outcome {
        ActionOutcome::Done | ActionOutcome::AlreadyDone => Ok((!answer.message.is_empty()).then_some(answer.message)),
        outcome => Err(format!("the pod answered {outcome:?}: {}", answer.message)),
    }
}

fn count(shard: &Shard, policy: &ResiliencePolicy, decision: &Decision) {
    let labels = |action: RecoveryAction, outcome| RecoveryLabels {
        namespace: policy.namespace().unwrap_or_default(),
        policy: policy.name_any(),
        action: policy_status::action_name(action),
        outcome,
    };
    for record in &decision.finished {
        let outcome = match record.outcome {
            Outcome::Succeeded => "succeeded",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
            Outcome::Pending | Outcome::Verifying => continue,
        };
        shard.shared.metrics.recovery_actions.get_or_create(&labels(record.step.action, outcome)).inc();
    }
    for record in &decision.act {
        shard.shared.metrics.recovery_actions.get_or_create(&labels(record.step.action, "started")).inc();
    }
}

/// A reference to an object, for Events.
pub fn object_reference<K: Resource<DynamicType = ()>>(meta: &ObjectMeta) -> ObjectReference {
    ObjectReference {
        api_version: Some(K::api_version(&()).into_owned()),
        kind: Some(K::kind(&()).into_owned()),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        uid: meta.uid.clone(),
        resource_version: meta.resource_version.clone(),
        ..ObjectReference::default()
    }
}

/// Writes a status, in exactly the version of the object that it was made from. The answer is the new version.
pub async fn write_status<K>(
    shard: &Shard,
    meta: &ObjectMeta,
    status: &impl Serialize,
) -> Result<Option<String>, ReconcileError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
    patch_status::<K>(shard, meta, status, true).await
}

/// `whole`: what the status does not have is removed; otherwise it stays.
async fn patch_status<K>(
    shard: &Shard,
    meta: &ObjectMeta,
    status: &impl Serialize,
    whole: bool,
) -> Result<Option<String>, ReconcileError>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + std::fmt::Debug + DeserializeOwned,
{
    if !shard.shared.fence.holds() {
        return Err(ReconcileError::NotLeading);
    }
    let (name, namespace) = (meta.name.clone().unwrap_or_default(), meta.namespace.clone().unwrap_or_default());
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": { "name": name, "namespace": namespace, "uid": meta.uid, "resourceVersion": meta.resource_version },
        "status": status,
    });
    // Guarded, because the answer may not be readable as the type: that is one of the things a status tells.
    let api: Api<Guard<K>> = Api::namespaced(shard.shared.clients.act.clone(), &namespace);
    let (params, patch) = if whole {
        (PatchParams::apply(FIELD_MANAGER).force(), Patch::Apply(&patch))
    } else {
        (PatchParams::default(), Patch::Merge(&patch))
    };
    let answer =
        call(api.patch_status(&name, &params, &patch)).await.map_err(ReconcileError::api("writing the status"))?;
    let mut written = shard.written.lock().unwrap_or_else(PoisonError::into_inner);
    if let (Some(uid), Some(before)) = (meta.uid.clone(), meta.resource_version.clone())
        && answer.meta().resource_version != meta.resource_version
    {
        written.insert(uid, before);
    }
    Ok(answer.meta().resource_version.clone())
}
