//! What other objects mean for a policy: who else claims its targets, which flags there are, and what a rehearsal would publish.

use crate::{
    context::Context,
    fleet::index::target_id,
    kubernetes::meta::created_at,
    status::target::{self, Target, target_key},
    workload,
};
use contract::PolicySettings;
use crds::{ResiliencePolicy, resilience_policy::Mode};
use engine::policy_review;
use kube::ResourceExt;
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

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

/// What there is to say of the flags that a policy sets while pods are degraded; the same word of several targets once. Of a
/// workload of which some flag set cannot be read it is not known which flags it has.
pub fn override_warnings(
    ctx: &Context,
    settings: Option<&PolicySettings>,
    namespace: &str,
    held: &[&Target],
) -> Vec<String> {
    let overrides = settings.and_then(|settings| Some(&settings.degradation.as_ref()?.flag_overrides));
    let Some(overrides) = overrides.filter(|overrides| !overrides.is_empty()) else { return Vec::new() };
    let mut warnings = BTreeSet::new();
    for target in held {
        let id = target::workload_of(namespace, &target.key);
        if workload::reconcile::has_unreadable_flag_set(ctx, &id) {
            continue;
        }
        let sets = ctx.index.flag_sets_of(&id);
        let mut sets: Vec<_> = sets.iter().filter_map(|set| set.0.as_ref().ok()).collect();
        // The one that wins a flag comes last.
        sets.sort_by_key(|set| (set.spec.priority, Reverse(created_at(*set)), Reverse(set.name_any())));
        let mut defined: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (flag, definition) in sets.iter().flat_map(|set| &set.spec.flag_spec.flags) {
            let wanted = overrides.contains_key(flag);
            let variants = wanted.then(|| definition.variants.keys().cloned().collect());
            defined.insert(flag.clone(), variants.unwrap_or_default());
        }
        warnings.extend(policy_review::override_warnings(overrides, &defined));
    }
    warnings.into_iter().collect()
}
