//! The workload controller: one workload, one document, one writer.
//!
//! Gather what names the workload, compile it (pure), decide whether to publish (pure), write the ConfigMap, and only
//! then push the same bytes to the pods. Pushing happens beside this reconcile, so a slow pod holds nothing up.

use super::publish::{self, Found, PublishError, Writing};
use crate::{
    context::Context,
    error::ReconcileError,
    fleet::{
        degradations::Degradations,
        facts::{ConfigMapFacts, WorkloadFacts},
        flag_inputs,
        flag_set::FlagSet,
        index::{ObjectKey, Policy},
    },
    kubernetes::{
        controller::{Next, Reconciler},
        events::Event,
        meta::{created_at, object_reference, short},
    },
    pods::{
        prober::{ProbeKey, now_in_milliseconds, offset},
        pusher,
        state::{Problem, Published},
    },
    policy::rollout,
    spec,
    status::target,
};
use bytes::Bytes;
use contract::{FlagsSettings, PolicySettings, RuntimeConfig, Source, WorkloadId, signing::ContentHash};
use crds::{EventReason, Reason, ResiliencePolicy, ResiliencePolicySpec, resilience_policy::Mode};
use engine::{
    claim::{Claimant, winner},
    compile::{self, Compiled, FlagSetInput, Input, PolicyInput},
    publish::{self as publication, Publication},
    recovery::{Action, Record},
};
use jiff::Timestamp;
use kube::{Resource, ResourceExt};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::{info, warn};

/// Time between two questions for a pod's health when no policy says otherwise.
const DEFAULT_PROBE: Duration = Duration::from_secs(5);
/// How soon to look again at what belongs to somebody else.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// The workload controller.
pub struct WorkloadReconciler(pub Arc<Context>);

impl Reconciler for WorkloadReconciler {
    type Key = WorkloadId;
    const KIND: &'static str = "workload";

    async fn reconcile(&self, id: &WorkloadId) -> Result<Next, ReconcileError> {
        let ctx = &self.0;
        let Some(facts) = ctx.index.workload(id) else {
            ctx.fleet.lock().remove(id);
            ctx.shared.metrics.forget(id);
            return Ok(Next::AwaitChange);
        };
        if !ctx.shared.fence.holds() {
            return Ok(Next::AwaitChange);
        }
        ctx.shared.fail_for_test(&id.name).await;
        reconcile(&facts, ctx).await
    }

    async fn report_internal_error(&self, id: &WorkloadId, message: &str) {
        let Some(facts) = self.0.index.workload(id) else { return };
        // The reconcile may have failed before it noted which workload of that name this is.
        self.0.fleet.write(id, |workload| workload.belong_to(&facts.uid));
        let message = format!("the operator failed over this workload ({message}); it tries again ever more rarely");
        note_problem(&self.0, id, Problem { reason: Reason::InternalError, message, stalled: false });
    }
}

/// Everything that names a workload.
struct Named {
    policies: Vec<Arc<Policy>>,
    flag_sets: Vec<Arc<FlagSet>>,
}

impl Named {
    fn of(ctx: &Context, id: &WorkloadId) -> Self {
        Self { policies: ctx.index.policies_of(id), flag_sets: ctx.index.flag_sets_of(id) }
    }

    fn is_empty(&self) -> bool {
        self.policies.is_empty() && self.flag_sets.is_empty()
    }

    fn is_readable(&self) -> bool {
        self.readable_policies().next().is_some() || self.flag_sets.iter().any(|guard| guard.0.is_ok())
    }

    fn readable_policies(&self) -> impl Iterator<Item = &ResiliencePolicy> {
        self.policies.iter().filter_map(|guard| guard.0.as_ref().ok())
    }

    /// Which edits of which resources are taken into account, by uid.
    fn generations(&self) -> BTreeMap<String, i64> {
        let policies = self.policies.iter().map(|policy| policy.meta());
        let all = policies.chain(self.flag_sets.iter().map(|set| set.meta()));
        all.filter_map(|meta| Some((meta.uid.clone()?, meta.generation?))).collect()
    }
}

async fn reconcile(facts: &WorkloadFacts, ctx: &Arc<Context>) -> Result<Next, ReconcileError> {
    let id = &facts.id;
    if facts.marked && !is_being_rolled_back(ctx, id) {
        rollout::sweep(ctx, id).await;
    }
    let named = Named::of(ctx, id);
    let map = ctx.index.config_map(id);
    if named.is_empty() && map.is_none() {
        // Nobody asks for anything, so nothing is remembered of it either.
        ctx.fleet.lock().remove(id);
        ctx.shared.metrics.forget(id);
        return Ok(Next::AwaitChange);
    }
    let gone = match map.as_ref().and_then(|map| map.operator.clone()).filter(|other| *other != ctx.shared.release) {
        Some(other) if ctx.shared.releases.is_alive(&ctx.shared.clients, &other).await => {
            yield_to(ctx, id, &other, &named);
            return Ok(Next::After(LOOK_AGAIN));
        }
        gone => gone,
    };
    observe(ctx, facts, &named);
    let next = if is_settled(ctx, id, map.as_deref(), &named) {
        pusher::push_to_all(ctx, id);
        Next::AwaitChange
    } else {
        publish_document(facts, &named, map.as_deref(), gone.as_deref(), ctx).await?
    };
    // What names it and can be read shows them, and hears of every pod.
    if !named.is_readable() {
        target::set_gauges(ctx, id);
    }
    Ok(next)
}

/// Whether a rollback of a workload is still to be done.
fn is_being_rolled_back(ctx: &Context, id: &WorkloadId) -> bool {
    let pending = |record: &Record| record.step.action == Action::Rollback && record.executed_at.is_none();
    ctx.ledger.of(id).iter().any(|entry| entry.record.finished_at.is_none() && pending(&entry.record))
}

/// Whether the last reconcile saw exactly what there is to be seen now, and published it.
fn is_settled(ctx: &Context, id: &WorkloadId, map: Option<&ConfigMapFacts>, named: &Named) -> bool {
    let generations = named.generations();
    let degradations = ctx.index.degradations_in(&id.namespace);
    let settled = ctx.fleet.read(id, |workload| {
        workload.published.is_some()
            && workload.problem.is_none()
            && workload.considered == generations
            && workload.degradations == degradations
            && workload.config_map_version.as_deref() == map.map(|map| map.resource_version.as_str())
    });
    settled.unwrap_or(false)
}

async fn publish_document(
    facts: &WorkloadFacts,
    named: &Named,
    map: Option<&ConfigMapFacts>,
    gone: Option<&str>,
    ctx: &Arc<Context>,
) -> Result<Next, ReconcileError> {
    let (id, uid, shared) = (&facts.id, &*facts.uid, &ctx.shared);
    let found = match map {
        Some(_) => publish::read(&shared.clients, id).await?,
        None => None,
    };
    let live = match &found {
        Some(found) => publish::document(found.text.as_deref(), id),
        None => publication::Published::Nothing,
    };
    let last_good = last_good(ctx, id, uid, &live);
    let winner = effective_policy(ctx, id, named, last_good.as_ref());
    let sets = effective_flag_sets(ctx, id, named, last_good.as_ref());
    let wants = winner.is_some() || !sets.is_empty();
    if !wants && live == publication::Published::Nothing {
        ctx.fleet.write(id, |workload| workload.published = None);
        return Ok(Next::AwaitChange);
    }
    let degradations = ctx.index.degradations_in(&id.namespace);
    let compiled = match compile::compile_degraded(winner, &sets, last_good.as_ref(), &degradations) {
        Ok(compiled) => compiled,
        Err(error) => {
            warn!(workload = %id, %error, "nothing can be published");
            note_problem(
                ctx,
                id,
                Problem { reason: Reason::ConfigTooLarge, message: error.to_string(), stalled: true },
            );
            return Ok(Next::AwaitChange);
        }
    };
    let defaults = RuntimeConfig::hash(&PolicySettings::default(), &FlagsSettings::default());
    let wanted = wants.then_some(compiled.content_hash.as_str());
    let now = Timestamp::now().as_millisecond();
    let (revision, in_sync) = match publication::decide(&live, wanted, &defaults, last_known(ctx, id, named), now) {
        Publication::None => return Ok(Next::AwaitChange),
        // What would be published is said by each policy for itself.
        _ if shared.args.dry_run => return Ok(Next::AwaitChange),
        Publication::InSync { revision } => {
            let marked = map.is_some_and(|map| map.operator.as_deref() == Some(shared.release.as_str()));
            // What the operator notes there for itself means nothing to pods, and has no revision of its own.
            let noted = matches!(&live, publication::Published::Document(live)
                if compile::notes(&live.flags) == compile::notes(&compiled.flags));
            if let Some((text, version)) = found.as_ref().filter(|_| marked && noted).and_then(text_and_version) {
                let adopted =
                    Adopted { revision, compiled: &compiled, degradations, named, text, version, found: true };
                adopt(ctx, id, adopted);
                return finish(ctx, facts).await;
            }
            // Of a version that did not mark what it writes, or of a release that is gone; or there is something to note.
            (revision, true)
        }
        Publication::Write { revision } => (revision, false),
    };
    if !shared.fence.holds() {
        return Err(ReconcileError::NotLeading);
    }
    let document = compiled.document(id.clone(), revision);
    let writing = Writing { document: &document, workload_uid: uid, release: &shared.release, gone };
    match publish::write(&shared.clients, &writing, found.as_ref()).await {
        Ok((text, version)) => {
            info!(workload = %id, revision, hash = %short(&compiled.content_hash), "published");
            shared.metrics.publications.inc();
            let version = version.unwrap_or_default();
            let compiled = &compiled;
            adopt(ctx, id, Adopted { revision, compiled, degradations, named, text, version, found: in_sync });
            finish(ctx, facts).await
        }
        Err(error @ PublishError::NotOurs(_)) => {
            let message = error.to_string();
            note_problem(ctx, id, Problem { reason: Reason::ConfigMapNotOurs, message, stalled: true });
            Ok(Next::After(LOOK_AGAIN))
        }
        Err(PublishError::OtherRelease(other)) => {
            yield_to(ctx, id, &other, named);
            Ok(Next::After(LOOK_AGAIN))
        }
        Err(error) => {
            if !matches!(&error, PublishError::Api(api) if api.is_conflict()) {
                let message = error.to_string();
                note_problem(ctx, id, Problem { reason: Reason::PublishFailed, message, stalled: false });
            }
            Err(error.into())
        }
    }
}

fn text_and_version(found: &Found) -> Option<(Bytes, String)> {
    Some((found.text.clone()?, found.version()?.to_owned()))
}

async fn finish(ctx: &Arc<Context>, facts: &WorkloadFacts) -> Result<Next, ReconcileError> {
    pusher::ensure_token(ctx, &facts.id, &facts.uid).await;
    pusher::push_to_all(ctx, &facts.id);
    Ok(Next::AwaitChange)
}

/// Leaves a workload to another release of the operator, and says so once.
fn yield_to(ctx: &Context, id: &WorkloadId, other: &str, named: &Named) {
    let problem = Problem {
        reason: Reason::Conflicted,
        message: format!(
            "the release {other} of the operator manages it; {} leaves its documents, tokens and statuses alone. Let the releases watch different namespaces",
            ctx.shared.release
        ),
        stalled: true,
    };
    let news = ctx.fleet.write(id, |workload| {
        let news = workload.problem.as_ref() != Some(&problem);
        workload.probe_every = None;
        workload.published = None;
        workload.problem = Some(problem.clone());
        news
    });
    if !news {
        return;
    }
    warn!(workload = %id, %other, "Conflicted: another release of the operator manages this workload");
    let note = format!("{} {}: {}", id.kind, id.name, problem.message);
    let event = Event::warning(EventReason::Conflicted, "Yield", note);
    for policy in named.readable_policies() {
        ctx.shared.events.publish(&object_reference::<ResiliencePolicy>(&policy.metadata), &event);
    }
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
        Some(published) if found.is_none_or(|found| *found.content_hash != *published.content_hash) => {
            RuntimeConfig::parse(&published.bytes).ok().map(|(document, _)| document)
        }
        _ => found.cloned(),
    }
}

/// Policies that cannot be read any more and still hold what they held: what is live from them stays.
fn unreadable_holders(ctx: &Context, namespace: &str, live: &[Source]) -> Vec<(Claimant, Source)> {
    let mut holders = Vec::new();
    for source in live {
        let key = ObjectKey { namespace: namespace.to_owned(), name: source.name.clone() };
        let Some(guard) = ctx.index.policy(&key) else { continue };
        if guard.0.is_err() && guard.meta().uid.as_deref() == Some(source.uid.as_str()) {
            let name = source.name.clone();
            holders.push((Claimant { name, created_at: created_at(&*guard), holds_claim: true }, source.clone()));
        }
    }
    holders
}

/// The name of the policy that a workload runs by.
pub fn holder(ctx: &Context, id: &WorkloadId) -> Option<String> {
    let live = ctx.fleet.read(id, |workload| workload.policy_sources.clone()).unwrap_or_default();
    let named = Named::of(ctx, id);
    let mut claimants: Vec<_> = named.readable_policies().map(claimant).collect();
    claimants.extend(unreadable_holders(ctx, &id.namespace, &live).into_iter().map(|(claimant, _)| claimant));
    winner(&claimants).map(str::to_owned)
}

/// Whether flags of a set that cannot be read any more are among those of a workload.
pub fn has_unreadable_flag_set(ctx: &Context, id: &WorkloadId) -> bool {
    let live = ctx.fleet.read(id, |workload| workload.flag_sources.clone()).unwrap_or_default();
    let set =
        |source: &Source| ctx.index.flag_set(&ObjectKey { namespace: id.namespace.clone(), name: source.name.clone() });
    live.iter().filter_map(set).any(|guard| guard.0.is_err())
}

/// The policy that the workload runs by, and what it contributes; none, if it only recovers.
fn effective_policy(
    ctx: &Context,
    id: &WorkloadId,
    named: &Named,
    last_good: Option<&RuntimeConfig>,
) -> Option<PolicyInput> {
    let mut candidates: Vec<(Claimant, Source, Input<PolicySettings>)> = Vec::new();
    for policy in named.readable_policies() {
        let settings = match spec::policy::policy(&policy.spec) {
            Ok(settings) if !policy.spec.suspend => Input::Valid(settings),
            _ => Input::KeepLive,
        };
        candidates.push((claimant(policy), source(policy), settings));
    }
    let live = last_good.map(|live| live.policy.sources.as_slice()).unwrap_or_default();
    let held = unreadable_holders(ctx, &id.namespace, live);
    candidates.extend(held.into_iter().map(|(claimant, source)| (claimant, source, Input::KeepLive)));
    let claimants: Vec<_> = candidates.iter().map(|(claimant, ..)| claimant.clone()).collect();
    let name = winner(&claimants)?.to_owned();
    let spec = named.readable_policies().find(|policy| policy.name_any() == name).map(|policy| &policy.spec);
    let stays = |spec: &ResiliencePolicySpec| spec.suspend && live.iter().any(|source| source.name == name);
    if spec.is_some_and(|spec| !spec::checks::is_published(spec) && !stays(spec)) {
        return None;
    }
    let (_, source, settings) = candidates.into_iter().find(|(claimant, ..)| claimant.name == name)?;
    Some(PolicyInput { source, settings })
}

/// The flag sets of the workload, and what each contributes.
fn effective_flag_sets(
    ctx: &Context,
    id: &WorkloadId,
    named: &Named,
    last_good: Option<&RuntimeConfig>,
) -> Vec<FlagSetInput> {
    let live = last_good.map(|live| &live.flags);
    let sources = live.map(|live| live.sources.as_slice()).unwrap_or_default();
    let unreadable = ctx.index.unreadable_flag_sets(&id.namespace, sources);
    let sets: Vec<_> = named.flag_sets.iter().cloned().chain(unreadable).collect();
    flag_inputs::inputs(&sets, live)
}

/// A policy's claim on its targets.
fn claimant(policy: &ResiliencePolicy) -> Claimant {
    Claimant { name: policy.name_any(), created_at: created_at(policy), holds_claim: policy.spec.mode == Mode::Enforce }
}

fn source<K: Resource>(object: &K) -> Source {
    let meta = object.meta();
    Source {
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        generation: meta.generation.unwrap_or_default(),
        ..Source::default()
    }
}

/// The highest revision that is known from elsewhere than the ConfigMap.
fn last_known(ctx: &Context, id: &WorkloadId, named: &Named) -> Option<i64> {
    let in_memory = ctx.fleet.read(id, |workload| Some(workload.published.as_ref()?.revision)).flatten();
    let policies = named.readable_policies().filter_map(|policy| policy.status.as_ref()).map(|status| &status.targets);
    let flags = named.flag_sets.iter().filter_map(|guard| guard.0.as_ref().ok()?.status.as_ref());
    let targets = policies.chain(flags.map(|status| &status.targets)).flatten();
    let own = targets.filter(|target| target.name == id.name && target.kind == id.kind.as_str());
    own.filter_map(|target| target.revision).chain(in_memory).max()
}

/// Brings what is known of the workload's pods up to date with the cluster, and sees to it that they are asked.
fn observe(ctx: &Context, facts: &WorkloadFacts, named: &Named) {
    let id = &facts.id;
    let pods = ctx.index.pods_of(id);
    // The policy that the workload runs by says how its checks are evaluated; a rehearsal only where there is none.
    let readable: Vec<_> = named.readable_policies().collect();
    let claimants: Vec<_> = readable.iter().map(|policy| claimant(policy)).collect();
    let winner = winner(&claimants).and_then(|name| readable.iter().find(|policy| policy.name_any() == name));
    let decisive = winner.or_else(|| readable.iter().min_by_key(|policy| (created_at(**policy), policy.name_any())));
    let is_published = decisive.is_none_or(|policy| spec::checks::is_published(&policy.spec));
    let reported =
        decisive.iter().flat_map(|policy| &policy.spec.health_checks).filter(|check| spec::checks::is_reported(check));
    let every = reported.map(|check| Duration::from(check.interval)).min().unwrap_or(DEFAULT_PROBE);
    let (arrivals, all) = ctx.fleet.write(id, |workload| {
        let arrivals = workload.keep(&facts.uid, &pods, now_in_milliseconds());
        let was_asked = workload.probe_every.is_some();
        // Nothing is asked of pods that get nothing: they need not have our library.
        let asked = is_published || !named.flag_sets.is_empty() || workload.published.is_some();
        workload.probe_every = (!named.is_empty() && asked).then_some(every);
        workload.thresholds = decisive.map(|policy| spec::policy::thresholds(&policy.spec)).unwrap_or_default();
        let degradation = decisive.and_then(|policy| policy.spec.degradation.as_ref());
        workload.load_marks = degradation.map(spec::degradation::marks).unwrap_or_default();
        (arrivals, !was_asked)
    });
    if named.is_empty() {
        return;
    }
    let workload = Arc::new(id.clone());
    let key = |uid| ProbeKey { workload: Arc::clone(&workload), uid };
    let new = if all { pods.iter().map(|pod| Arc::clone(&pod.uid)).collect() } else { arrivals.new };
    for uid in new {
        let wait = offset(&uid, every);
        ctx.probes.enqueue_after(key(uid), wait);
    }
    for uid in arrivals.reachable {
        ctx.probes.enqueue(key(uid));
    }
}

/// What is published now.
struct Adopted<'a> {
    revision: i64,
    compiled: &'a Compiled,
    degradations: Degradations,
    named: &'a Named,
    text: Bytes,
    version: String,
    found: bool,
}

/// Notes what is published now.
fn adopt(ctx: &Context, id: &WorkloadId, adopted: Adopted<'_>) {
    let Adopted { revision, compiled, degradations, named, text, version, found } = adopted;
    let considered = named.generations();
    let changed = ctx.fleet.write(id, |workload| {
        let had_problem = workload.problem.take().is_some() || workload.left_out != compiled.left_out;
        workload.left_out.clone_from(&compiled.left_out);
        workload.policy_sources.clone_from(&compiled.policy.sources);
        workload.flag_sources.clone_from(&compiled.flags.sources);
        workload.config_map_version = Some(version);
        workload.degradations = degradations;
        let same = workload.published.as_ref().is_some_and(|old| old.revision == revision);
        if !same {
            let content_hash = compiled.content_hash.as_str().into();
            let at = Instant::now();
            let content = ContentHash::of(&text);
            workload.published = Some(Published { revision, content_hash, bytes: text, content, at, found });
            // A document that was found came with a token.
            workload.has_token |= found;
            for pod in workload.pods_mut() {
                pod.push_after = None;
            }
        }
        let edits = workload.considered != considered;
        workload.considered = considered;
        had_problem || !same || edits
    });
    if changed {
        ctx.enqueue_status(id);
    }
}

fn note_problem(ctx: &Context, id: &WorkloadId, problem: Problem) {
    let changed = ctx.fleet.write(id, |workload| {
        let known = workload.problem.as_ref() == Some(&problem);
        workload.problem = Some(problem);
        !known
    });
    if changed {
        ctx.enqueue_status(id);
    }
}

/// The hash that a policy alone, with the flag sets of the workload, would have published.
pub fn preview(ctx: &Context, id: &WorkloadId, policy: &ResiliencePolicy) -> Option<String> {
    if !spec::checks::is_published(&policy.spec) {
        return None;
    }
    let uid = ctx.fleet.read(id, |workload| workload.uid.clone()).unwrap_or_default();
    let last_good = last_good(ctx, id, &uid, &publication::Published::Nothing);
    let named = Named { policies: Vec::new(), flag_sets: ctx.index.flag_sets_of(id) };
    let settings = spec::policy::policy(&policy.spec).ok()?;
    let input = PolicyInput { source: source(policy), settings: Input::Valid(settings) };
    let sets = effective_flag_sets(ctx, id, &named, last_good.as_ref());
    let degradations = ctx.index.degradations_in(&id.namespace);
    let compiled = compile::compile_degraded(Some(input), &sets, last_good.as_ref(), &degradations);
    compiled.ok().map(|compiled| compiled.content_hash)
}
