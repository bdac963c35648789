//! For how long there is nothing new to say of a policy yet. Each step of what it waits for wakes it.

use crate::{
    context::Context,
    fleet::index::{ObjectKey, Policy, target_id},
    status::target::Target,
};
use crds::{ResiliencePolicy, resilience_policy::Mode};
use jiff::Timestamp;
use std::time::Duration;
use tokio::time::Instant;

/// How long an edit that was just seen may be on its way before that is said.
const ON_ITS_WAY: Duration = Duration::from_millis(200);
/// How long a new leader may take to find out what is published before it says that nothing is.
const TAKING_OVER: Duration = Duration::from_secs(2);

/// For how long, at most, some pods of its workloads are still listened for by a new leader. What they fail at is not known
/// before they were heard, and the last of them wakes this.
pub fn listening_for(ctx: &Context, key: &ObjectKey, policy: &Policy) -> Option<Duration> {
    let targets = policy.0.iter().flat_map(|policy| &policy.spec.target_refs);
    let fleet = ctx.fleet.lock();
    let now = Instant::now();
    targets.filter_map(|target| fleet.get(&target_id(&key.namespace, target))?.listening_for(now)).max()
}

/// For how long, at most, an edit that was seen a moment ago is on its way to the pods: what there is to say of it changes
/// at once, and that wakes what looks at it. A new leader finds out first what is published; it may have seen the policy
/// long before, as a standby.
pub fn is_published_within(
    ctx: &Context,
    policy: &ResiliencePolicy,
    held: &[&Target],
    now: Timestamp,
) -> Option<Duration> {
    let seen = ctx.index.policy_seen_at(&ObjectKey::of(policy)).and_then(|at| ON_ITS_WAY.checked_sub(at.elapsed()));
    let led = now.duration_since(ctx.shared.leading_since(now));
    let taken_over = TAKING_OVER.checked_sub(Duration::try_from(led).unwrap_or_default());
    let rest = seen.max(taken_over)?;
    let uid = policy.metadata.uid.as_deref().unwrap_or_default();
    let unpublished = |target: &&&Target| {
        target.problem.is_none() && target.considered.get(uid).copied() != policy.metadata.generation
    };
    let enforced = policy.spec.mode == Mode::Enforce && !ctx.shared.args.dry_run;
    (enforced && held.iter().any(|target| unpublished(&target))).then_some(rest)
}
