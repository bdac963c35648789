//! The workload controller: one workload, one document, one writer.
//!
//! Gather what names the workload, compile it (pure), decide whether to publish (pure), write the ConfigMap, and only
//! then push the same bytes to the pods. Pushing happens beside this reconcile, so a slow pod holds nothing up.

use super::publish::{self, PublishError};
use crate::{
    context::Context,
    error::ReconcileError,
    kubernetes::{
        meta::{created_at, short},
        watches::{FlagSet, Policy},
    },
    pods::{
        pusher,
        state::{Problem, Published},
    },
    spec,
    status::target,
    telemetry::metrics::ReconcileLabels,
};
use contract::{FlagsSettings, PolicySettings, RuntimeConfig, Source, WorkloadId, config_map_name};
use crds::{ResiliencePolicy, resilience_policy::Mode};
use engine::{
    claim::{Claimant, winner},
    compile::{self, Compiled, FlagSetInput, Input, PolicyInput},
    publish::{self as publication, Publication},
};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Resource, ResourceExt,
    runtime::{controller::Action, reflector::ObjectRef},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::{info, warn};

/// Time between two questions for a pod's health when no policy says otherwise.
const DEFAULT_PROBE: Duration = Duration::from_secs(5);

/// Everything that names a workload.
struct Gathered {
    policies: Vec<Arc<Policy>>,
    flag_sets: Vec<Arc<FlagSet>>,
    live: publication::Published,
    /// The last sound document; it outlives a ConfigMap that somebody damages or deletes.
    last_good: Option<RuntimeConfig>,
}

impl Gathered {
    /// Which edits of which resources are taken into account, by uid.
    fn generations(&self) -> BTreeMap<String, i64> {
        let policies = self.policies.iter().map(|policy| policy.meta());
        let all = policies.chain(self.flag_sets.iter().map(|set| set.meta()));
        all.filter_map(|meta| Some((meta.uid.clone()?, meta.generation?))).collect()
    }
}

/// Reconciles one object.
pub async fn reconcile(deployment: Arc<Deployment>, ctx: Arc<Context>) -> Result<Action, ReconcileError> {
    if !ctx.shared.fence.holds() {
        return Ok(Action::await_change());
    }
    let started = Instant::now();
    let result = publish_and_push(&deployment, &ctx).await;
    ctx.shared.metrics.reconcile_seconds.observe(started.elapsed().as_secs_f64());
    let label = if result.is_ok() { "ok" } else { "error" };
    ctx.shared.metrics.reconciliations.get_or_create(&ReconcileLabels { kind: "workload", result: label }).inc();
    if result.is_ok() {
        ctx.backoffs.forget(&deployment.uid().unwrap_or_default());
    }
    result
}

async fn publish_and_push(deployment: &Deployment, ctx: &Arc<Context>) -> Result<Action, ReconcileError> {
    let id = WorkloadId { namespace: deployment.namespace().unwrap_or_default(), name: deployment.name_any() };
    let uid = deployment.uid().unwrap_or_default();
    let shared = &ctx.shared;
    let map_ref = ObjectRef::new(&config_map_name(&id.name)).within(&id.namespace);
    let map = ctx.caches.config_maps.get(&map_ref);
    let live = publish::read(map.as_deref(), &id);
    let gathered = Gathered {
        policies: ctx.caches.policies_for(&id.namespace, &id.name),
        flag_sets: ctx.caches.flag_sets_for(&id.namespace, &id.name),
        last_good: last_good(ctx, &id, &uid, &live),
        live,
    };
    let winner = effective_policy(ctx, &id, &gathered);
    let sets = effective_flag_sets(ctx, &id, &gathered);
    let named = winner.is_some() || !sets.is_empty();
    observe(ctx, deployment, &id, &uid, &gathered);
    if !named && gathered.live == publication::Published::Nothing {
        ctx.fleet.lock().entry(id).or_default().published = None;
        return Ok(Action::await_change());
    }

    let compiled = match compile::compile(winner, &sets, gathered.last_good.as_ref()) {
        Ok(compiled) => compiled,
        Err(error) => {
            warn!(workload = %id, %error, "nothing can be published");
            note_problem(ctx, &id, Problem { reason: "ConfigTooLarge", message: error.to_string(), stalled: true });
            return Ok(Action::await_change());
        }
    };
    let defaults = RuntimeConfig::hash(&PolicySettings::default(), &FlagsSettings::default());
    let wanted = named.then_some(compiled.content_hash.as_str());
    let now = Timestamp::now().as_millisecond();
    match publication::decide(&gathered.live, wanted, &defaults, last_known(ctx, &id, &gathered), now) {
        Publication::None => {}
        // What would be published is said by each policy for itself.
        _ if shared.args.dry_run => return Ok(Action::await_change()),
        Publication::InSync { revision } => {
            if let Some(bytes) = map.as_ref().and_then(|map| map.data.as_ref()?.get(contract::CONFIG_KEY)) {
                adopt(ctx, &id, revision, &compiled, &gathered, bytes.clone().into_bytes());
            }
        }
        Publication::Write { revision } => {
            if !shared.fence.holds() {
                return Err(ReconcileError::NotLeading);
            }
            let document = compiled.document(id.clone(), revision);
            match publish::write(&shared.clients, &document, &uid, map.as_deref()).await {
                Ok(bytes) => {
                    info!(workload = %id, revision, hash = %short(&compiled.content_hash), "published");
                    shared.metrics.publications.inc();
                    adopt(ctx, &id, revision, &compiled, &gathered, bytes);
                }
                Err(error @ PublishError::NotOurs(_)) => {
                    note_problem(
                        ctx,
                        &id,
                        Problem { reason: "ConfigMapNotOurs", message: error.to_string(), stalled: true },
                    );
                    return Ok(Action::requeue(Duration::from_secs(30)));
                }
                Err(error) => {
                    let conflict = matches!(&error, PublishError::Api(api) if api.is_conflict());
                    if !conflict {
                        note_problem(
                            ctx,
                            &id,
                            Problem { reason: "PublishFailed", message: error.to_string(), stalled: false },
                        );
                    }
                    return Err(error.into());
                }
            }
        }
    }
    pusher::ensure_token(ctx, &id, &uid).await;
    pusher::push_to_all(ctx, &id);
    Ok(Action::await_change())
}

/// What this process published or found last; else what the ConfigMap holds. This process is the only writer, so its own
/// memory is never older than the ConfigMap, and an edit by hand does not reach it.
fn last_good(ctx: &Context, id: &WorkloadId, uid: &str, live: &publication::Published) -> Option<RuntimeConfig> {
    let found = match live {
        publication::Published::Document(document) => Some(document.as_ref()),
        publication::Published::Nothing | publication::Published::Damaged => None,
    };
    let remembered = ctx.fleet.read(id, |workload| workload.published.clone().filter(|_| workload.uid == uid));
    match remembered.flatten() {
        Some(published) if found.is_none_or(|found| found.content_hash != published.content_hash) => {
            RuntimeConfig::parse(&published.bytes).ok().map(|(document, _)| document)
        }
        _ => found.cloned(),
    }
}

/// Policies that cannot be read any more and still hold what they held: what is live from them stays.
fn unreadable_holders(ctx: &Context, namespace: &str, live: Option<&RuntimeConfig>) -> Vec<(Claimant, Source)> {
    let mut holders = Vec::new();
    for source in live.iter().flat_map(|live| &live.policy.sources) {
        let Some(guard) = ctx.caches.policies.get(&ObjectRef::new(&source.name).within(namespace)) else { continue };
        if guard.0.is_err() && guard.meta().uid.as_deref() == Some(source.uid.as_str()) {
            let name = source.name.clone();
            holders.push((Claimant { name, created_at: created_at(&*guard), holds_claim: true }, source.clone()));
        }
    }
    holders
}

/// The name of the policy that a workload runs by.
pub fn holder(ctx: &Context, id: &WorkloadId) -> Option<String> {
    let map_ref = ObjectRef::new(&config_map_name(&id.name)).within(&id.namespace);
    let map = ctx.caches.config_maps.get(&map_ref);
    let live = match publish::read(map.as_deref(), id) {
        publication::Published::Document(document) => Some(document),
        publication::Published::Nothing | publication::Published::Damaged => None,
    };
    let rivals = ctx.caches.policies_for(&id.namespace, &id.name);
    let mut claimants: Vec<_> = rivals.iter().filter_map(|guard| guard.0.as_ref().ok()).map(claimant).collect();
    claimants.extend(unreadable_holders(ctx, &id.namespace, live.as_deref()).into_iter().map(|(claimant, _)| claimant));
    winner(&claimants).map(str::to_owned)
}

/// The policy that the workload runs by, and what it contributes.
fn effective_policy(ctx: &Context, id: &WorkloadId, gathered: &Gathered) -> Option<PolicyInput> {
    let mut candidates: Vec<(Claimant, Source, Input<PolicySettings>)> = Vec::new();
    for policy in gathered.policies.iter().filter_map(|guard| guard.0.as_ref().ok()) {
        let settings = match spec::policy::policy(&policy.spec) {
            Ok(settings) if !policy.spec.suspend => Input::Valid(settings),
            _ => Input::KeepLive,
        };
        candidates.push((claimant(policy), source(policy), settings));
    }
    let held = unreadable_holders(ctx, &id.namespace, gathered.last_good.as_ref());
    candidates.extend(held.into_iter().map(|(claimant, source)| (claimant, source, Input::KeepLive)));
    let claimants: Vec<_> = candidates.iter().map(|(claimant, ..)| claimant.clone()).collect();
    let name = winner(&claimants)?.to_owned();
    let (_, source, settings) = candidates.into_iter().find(|(claimant, ..)| claimant.name == name)?;
    Some(PolicyInput { source, settings })
}

/// The flag sets of the workload, and what each contributes.
fn effective_flag_sets(ctx: &Context, id: &WorkloadId, gathered: &Gathered) -> Vec<FlagSetInput> {
    let mut inputs = Vec::new();
    for set in gathered.flag_sets.iter().filter_map(|guard| guard.0.as_ref().ok()) {
        let settings = spec::flags::flags(&set.spec).map_or(Input::KeepLive, Input::Valid);
        inputs.push(FlagSetInput {
            source: source(set),
            priority: set.spec.priority,
            created_at: created_at(set),
            settings,
        });
    }
    if let Some(live) = &gathered.last_good {
        for source in &live.flags.sources {
            let held = ctx.caches.flag_sets.get(&ObjectRef::new(&source.name).within(&id.namespace));
            if let Some(guard) =
                held.filter(|guard| guard.0.is_err() && guard.meta().uid.as_deref() == Some(source.uid.as_str()))
            {
                // Its priority cannot be read; the keys that it had, it keeps.
                let created_at = created_at(&*guard);
                inputs.push(FlagSetInput {
                    source: source.clone(),
                    priority: i32::MAX,
                    created_at,
                    settings: Input::KeepLive,
                });
            }
        }
    }
    inputs
}

/// A policy's claim on its targets.
pub fn claimant(policy: &ResiliencePolicy) -> Claimant {
    Claimant { name: policy.name_any(), created_at: created_at(policy), holds_claim: policy.spec.mode == Mode::Enforce }
}

fn source<K: Resource>(object: &K) -> Source {
    let meta = object.meta();
    Source {
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        generation: meta.generation.unwrap_or_default(),
        keys: Vec::new(),
    }
}

/// The highest revision that is known from elsewhere than the ConfigMap.
fn last_known(ctx: &Context, id: &WorkloadId, gathered: &Gathered) -> Option<i64> {
    let in_memory =
        ctx.fleet.read(id, |workload| workload.published.as_ref().map(|published| published.revision)).flatten();
    let policies = gathered
        .policies
        .iter()
        .filter_map(|guard| guard.0.as_ref().ok()?.status.as_ref())
        .map(|status| &status.targets);
    let flags = gathered
        .flag_sets
        .iter()
        .filter_map(|guard| guard.0.as_ref().ok()?.status.as_ref())
        .map(|status| &status.targets);
    let in_status =
        policies.chain(flags).flatten().filter(|target| target.name == id.name).filter_map(|target| target.revision);
    in_status.chain(in_memory).max()
}

/// Keeps the board's pods and settings up to date with the cluster.
fn observe(ctx: &Context, deployment: &Deployment, id: &WorkloadId, uid: &str, gathered: &Gathered) {
    let pods = ctx.caches.pods_of(deployment);
    // The policy that the workload runs by says how its health is judged; a rehearsal only where there is none.
    let readable: Vec<_> = gathered.policies.iter().filter_map(|guard| guard.0.as_ref().ok()).collect();
    let claimants: Vec<_> = readable.iter().map(|policy| claimant(policy)).collect();
    let winner = winner(&claimants).and_then(|name| readable.iter().find(|policy| policy.name_any() == name));
    let judge = winner.or_else(|| readable.iter().min_by_key(|policy| (created_at(**policy), policy.name_any())));
    let intervals =
        judge.iter().flat_map(|policy| &policy.spec.health_checks).map(|check| Duration::from(check.interval));
    let named = !gathered.policies.is_empty() || !gathered.flag_sets.is_empty();
    {
        let mut fleet = ctx.fleet.lock();
        let workload = fleet.entry(id.clone()).or_default();
        workload.keep(uid, pods.iter().map(|pod| (pod.uid().unwrap_or_default(), pod.name_any())));
        workload.probe_every = named.then(|| intervals.min().unwrap_or(DEFAULT_PROBE));
        workload.thresholds = judge.map(|policy| spec::policy::thresholds(&policy.spec)).unwrap_or_default();
    }
    target::gauge(ctx, id);
}

/// Notes what is published now.
fn adopt(ctx: &Context, id: &WorkloadId, revision: i64, compiled: &Compiled, gathered: &Gathered, bytes: Vec<u8>) {
    let considered = gathered.generations();
    let changed = {
        let mut fleet = ctx.fleet.lock();
        let workload = fleet.entry(id.clone()).or_default();
        let had_problem = workload.problem.take().is_some() || workload.left_out != compiled.left_out;
        workload.left_out.clone_from(&compiled.left_out);
        let same = workload.published.as_ref().is_some_and(|old| old.revision == revision);
        if !same {
            let content_hash = compiled.content_hash.clone();
            workload.published = Some(Published { revision, content_hash, bytes: Arc::new(bytes), at: Instant::now() });
            for pod in workload.pods.values_mut() {
                pod.push_after = None;
            }
        }
        let edits = workload.considered != considered;
        workload.considered = considered;
        had_problem || !same || edits
    };
    if changed {
        ctx.enqueue_status(&id.namespace, &id.name);
    }
}

fn note_problem(ctx: &Context, id: &WorkloadId, problem: Problem) {
    let changed = {
        let mut fleet = ctx.fleet.lock();
        let workload = fleet.entry(id.clone()).or_default();
        let known = workload.problem.as_ref() == Some(&problem);
        workload.problem = Some(problem);
        !known
    };
    if changed {
        ctx.enqueue_status(&id.namespace, &id.name);
    }
}

/// The hash that a policy alone, with the flag sets of the workload, would have published.
pub fn preview(ctx: &Context, id: &WorkloadId, policy: &ResiliencePolicy) -> Option<String> {
    let map_ref = ObjectRef::new(&config_map_name(&id.name)).within(&id.namespace);
    let live = publish::read(ctx.caches.config_maps.get(&map_ref).as_deref(), id);
    let uid = ctx.fleet.read(id, |workload| workload.uid.clone()).unwrap_or_default();
    let last_good = last_good(ctx, id, &uid, &live);
    let flag_sets = ctx.caches.flag_sets_for(&id.namespace, &id.name);
    let gathered = Gathered { policies: Vec::new(), flag_sets, live, last_good };
    let settings = spec::policy::policy(&policy.spec).ok()?;
    let input = PolicyInput { source: source(policy), settings: Input::Valid(settings) };
    let sets = effective_flag_sets(ctx, id, &gathered);
    compile::compile(Some(input), &sets, gathered.last_good.as_ref()).ok().map(|compiled| compiled.content_hash)
}
