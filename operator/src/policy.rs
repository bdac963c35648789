//! The policy controller: says in the status what became of a policy, and heals its workloads.
//!
//! One pass: gather, decide (pure), write the status with every intent in it (fenced), carry out what is pending, and
//! write what came of it. The intent is always written before the act.

use crate::{
    acts::act,
    caches::Policy,
    clients::call,
    crash_point::CrashPoint,
    error::ReconcileError,
    events::Story,
    guard::Guard,
    history, jobs,
    metrics::{PassLabels, RecoveryLabels},
    observe::observe,
    policy_status::{self, Inputs},
    policy_stories,
    shard::Shard,
    target::{self, Target},
    tokens::FIELD_MANAGER,
    translate, workload,
};
use contract::WorkloadId;
use crds::{ResiliencePolicy, resilience_policy::Mode};
use engine::recovery::{self, Action as RecoveryAction, Decision, Outcome, Record};
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
    collections::BTreeMap,
    sync::{Arc, PoisonError},
    time::Duration,
};
use tracing::warn;

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
        let jobs = jobs::gather(shard, &namespace, &history).await;
        let observed = observe(policy, &held, &history, jobs, shard.shared.leading_since(now));
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
    let reference = object_reference::<ResiliencePolicy>(policy.meta());
    let mut meta = policy.metadata.clone();
    if new != old {
        let begun: Vec<_> =
            decision.act.iter().filter(|act| !history.in_flight.iter().any(|known| known.id == act.id)).collect();
        if !begun.is_empty() {
            shard.shared.crash(CrashPoint::BeforeIntent);
        }
        if !decision.finished.is_empty() {
            shard.shared.crash(CrashPoint::BeforeStatus);
        }
        meta.resource_version = write_status::<ResiliencePolicy>(shard, &meta, &new).await?;
        if !begun.is_empty() {
            shard.shared.crash(CrashPoint::AfterIntent);
        }
        let changed_at =
            shard.seen_at(&policy.uid().unwrap_or_default(), policy.metadata.generation.unwrap_or_default());
        for story in policy_stories::tell(&old, &new, &decision, target::live_story(&held, changed_at)) {
            shard.shared.events.tell(&reference, &story);
        }
        count(shard, policy, &begun, &decision);
    }
    if !decision.act.is_empty() {
        // Also what was pending before, if nobody can vouch for it: it is carried out again under its id.
        let acted = act(policy, shard, &namespace, &decision).await?;
        let after = policy_status::build(&inputs, &acted, &new);
        if after != new {
            write_status::<ResiliencePolicy>(shard, &meta, &after).await?;
            for story in policy_stories::refused(&new, &after) {
                shard.shared.events.tell(&reference, &story);
            }
        }
        let pause = if acted.act.is_empty() { Duration::from_millis(200) } else { Duration::from_secs(1) };
        return Ok(Action::requeue(pause));
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

fn count(shard: &Shard, policy: &ResiliencePolicy, begun: &[&Record], decision: &Decision) {
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
            Outcome::Pending | Outcome::Waiting | Outcome::Verifying => continue,
        };
        shard.shared.metrics.recovery_actions.get_or_create(&labels(record.step.action, outcome)).inc();
    }
    for record in begun {
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
