//! What other objects mean for a policy: who else claims its targets, which flags there are, and what a rehearsal would publish.

use crate::{
    context::Context,
    fleet::index::target_id,
    kubernetes::meta::created_at,
    spec,
    status::target::{Target, target_key},
    workload,
};
use crds::{ResiliencePolicy, resilience_policy::Mode};
use engine::policy_review;
use kube::ResourceExt;
use std::{cmp::Reverse, collections::BTreeMap};

/// The targets that an older policy has, with that policy's name.
pub fn lost_claims(policy: &ResiliencePolicy, ctx: &Context, namespace: &str) -> BTreeMap<String, String> {
    if policy.spec.mode == Mode::DryRun {
        return BTreeMap::new();
    }
    let name = policy.name_any();
    let targets = policy.spec.target_refs.iter().map(|target| target_id(namespace, target));
    let other = |id| {
        let holder = workload::reconcile::holder(ctx, &id).filter(|holder| *holder != name)?;
        Some((target_key(&id), holder))
    };
    targets.filter_map(other).collect()
}

/// In a dry run: the hash that each target would get.
pub fn would_publish(
    policy: &ResiliencePolicy,
    ctx: &Context,
    namespace: &str,
    held: &[&Target],
) -> BTreeMap<String, String> {
    if policy.spec.mode != Mode::DryRun && !ctx.shared.args.dry_run {
        return BTreeMap::new();
    }
    let ids = policy.spec.target_refs.iter().map(|target| target_id(namespace, target));
    let held = ids.filter(|id| held.iter().any(|target| target.key == target_key(id)));
    held.filter_map(|id| Some((target_key(&id), workload::reconcile::preview(ctx, &id, policy)?))).collect()
}

/// What there is to say of the flags that a policy sets while it is degraded: the fleet sets them wherever they are live in the
/// namespace. While some flag set there cannot be read it is not known which flags there are.
pub fn override_warnings(ctx: &Context, policy: &ResiliencePolicy, namespace: &str) -> Vec<String> {
    let overrides = policy.spec.degradation.as_ref().map(spec::degradation::all_overrides).unwrap_or_default();
    if overrides.is_empty() {
        return Vec::new();
    }
    let sets = ctx.index.flag_sets_in(namespace);
    let Ok(mut sets) = sets.iter().map(|set| set.0.as_ref()).collect::<Result<Vec<_>, _>>() else { return Vec::new() };
    // The one that wins a flag comes last.
    sets.sort_by_key(|set| (set.spec.priority, Reverse(created_at(*set)), Reverse(set.name_any())));
    let is_there = |(flag, variant): &(String, String)| {
        let definition = sets.iter().rev().find_map(|set| set.spec.flag_spec.flags.get(flag));
        definition.is_some_and(|definition| definition.variants.contains_key(variant))
    };
    if overrides.iter().all(is_there) {
        return Vec::new();
    }
    let mut defined: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (flag, definition) in sets.iter().flat_map(|set| &set.spec.flag_spec.flags) {
        let wanted = overrides.iter().any(|(wanted, _)| wanted == flag);
        let variants = wanted.then(|| definition.variants.keys().cloned().collect());
        defined.insert(flag.clone(), variants.unwrap_or_default());
    }
    policy_review::override_warnings(&overrides, &defined)
}
