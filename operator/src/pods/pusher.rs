//! Brings published documents to pods, each pod by itself: a slow one delays no other.

use super::{
    client::{Access, Endpoint, PodError},
    fair_queue::Class,
    prober::now_in_milliseconds,
    state::{PodState, Published},
};
use crate::{
    context::Context,
    fleet::facts::Uid,
    kubernetes::{
        clients::call,
        meta::{MOUNT_REFRESH_ANNOTATION, cut},
    },
    telemetry::metrics::PodCallLabels,
};
use contract::{PushAnswer, WorkloadId};
use engine::report_validation;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::{debug, warn};

/// A pod's mounts are refreshed, and its Secret written again, at most this often.
const MOUNT_REFRESH_INTERVAL: Duration = Duration::from_secs(30);
/// Longest wait until a push that failed is repeated.
const MAX_BACK_OFF: Duration = Duration::from_secs(15);

/// Writes the token Secret of a workload once, unless its pods can be expected to have it: a document that was found came
/// with one. A pod that does not take the token has it written again.
pub async fn ensure_token(ctx: &Context, id: &WorkloadId, uid: &str) {
    if !ctx.fleet.read(id, |workload| workload.has_token).unwrap_or(false) {
        write_token(ctx, id, uid).await;
    }
}

async fn write_token(ctx: &Context, id: &WorkloadId, uid: &str) {
    if !ctx.shared.fence.holds() || ctx.shared.args.dry_run {
        return;
    }
    match ctx.shared.tokens.write(&ctx.shared.clients, id, uid).await {
        Ok(()) => ctx.fleet.write(id, |workload| {
            workload.token_written_at = Some(Instant::now());
            workload.has_token = true;
        }),
        Err(error) => {
            warn!(workload = %id, %error, "the token Secret could not be written; its pods cannot be reached until it is");
        }
    }
}

/// Whether a pod is to be pushed to now.
fn is_due(pod: &PodState, published: &Published, now: Instant) -> bool {
    let in_sync = pod.applied.as_ref().is_some_and(|applied| applied.content_hash == *published.content_hash);
    let busy = pod.pushing.is_some_and(|revision| revision >= published.revision);
    // Most pods run a document that was found; so they are heard first.
    let unheard = published.found && pod.applied.is_none();
    // It did not take the last push, and does not answer since: its next answer, not a timer, starts the next one. A question
    // alone that it did not answer says less: it may have been asked before it had a token.
    let silent = pod.unreachable.is_some() && pod.misses > 0 && pod.push_failures > 0;
    !in_sync && !busy && !unheard && !silent && pod.push_after.is_none_or(|after| now >= after)
}

/// Pushes what is published to every pod that does not run it and is not being pushed to.
pub fn push_to_all(ctx: &Arc<Context>, id: &WorkloadId) {
    let now = Instant::now();
    let mut due = Vec::new();
    {
        let mut fleet = ctx.fleet.lock();
        let Some(workload) = fleet.get_mut(id) else { return };
        let Some(published) = workload.published.clone() else { return };
        for pod in workload.pods_mut().filter(|pod| is_due(pod, &published, now)) {
            if let Some(endpoint) = Endpoint::admin(&pod.facts) {
                pod.pushing = Some(published.revision);
                due.push((Arc::clone(&pod.facts.uid), endpoint, published.clone()));
            }
        }
    }
    for (uid, endpoint, published) in due {
        let (ctx, id) = (Arc::clone(ctx), id.clone());
        tokio::spawn(async move { push(&ctx, &id, &uid, &endpoint, &published).await });
    }
}

async fn push(ctx: &Arc<Context>, id: &WorkloadId, uid: &Uid, endpoint: &Endpoint, published: &Published) {
    let known = ctx.fleet.read(id, |workload| {
        let pod = workload.pod(uid)?;
        Some((workload.uid.clone(), pod.misses > 0, pod.facts.signs, pod.auth.clone()))
    });
    let Some((workload_uid, suspect, signs, auth)) = known.flatten() else { return };
    let token = Some(ctx.shared.tokens.current(&workload_uid));
    let mut access = Access { to: endpoint, uid, signs, token, auth };
    let result = {
        let _slot = ctx.shared.pod_calls.slot(id, Class::Push, suspect).await;
        if !ctx.shared.fence.holds() {
            ctx.fleet.with_pod(id, uid, |pod| pod.pushing = None);
            return;
        }
        ctx.shared.pods.push(&mut access, published.bytes.clone(), published.content).await
    };
    ctx.fleet.learn_auth(id, uid, &access.auth);
    let label = result.as_ref().map_or_else(PodError::label, |_| "ok");
    ctx.shared.metrics.pod_calls.get_or_create(&PodCallLabels { call: "push", result: label }).inc();
    let unauthorized = result == Err(PodError::Unauthorized);
    let retry = settle(ctx, id, uid, published, result);
    if unauthorized {
        refresh_token(ctx, id, uid, &workload_uid, endpoint).await;
    }
    ctx.enqueue_status(id);
    if let Some(after) = retry {
        ctx.enqueue_workload_after(id, after);
    }
}

/// Notes the outcome of a push. The value says when to try again.
fn settle(
    ctx: &Context,
    id: &WorkloadId,
    uid: &str,
    published: &Published,
    result: Result<PushAnswer, PodError>,
) -> Option<Duration> {
    let now = now_in_milliseconds();
    let mut fleet = ctx.fleet.lock();
    let workload = fleet.get_mut(id)?;
    // It may run something newer by now than what this push brought.
    let newest = workload.published.as_ref().map(|one| one.revision);
    let result = result.and_then(|answer| {
        report_validation::applied(&answer.applied, newest).map_err(PodError::InvalidResponse)?;
        Ok(answer)
    });
    let retry = match result {
        Ok(answer) => workload.change(uid, now, |pod| take_answer(ctx, id, pod, published, &answer)),
        Err(error) => {
            debug!(workload = %id, pod = uid, %error, "push failed");
            workload.miss(uid, &error, now);
            let quick = error == PodError::Unauthorized;
            workload.change(uid, now, |pod| Some(put_off(pod, published, quick)))
        }
    };
    retry.flatten()
}

fn take_answer(
    ctx: &Context,
    id: &WorkloadId,
    pod: &mut PodState,
    published: &Published,
    answer: &PushAnswer,
) -> Option<Duration> {
    let message = cut(&answer.message, 200);
    if !message.is_empty() {
        warn!(workload = %id, pod = %pod.facts.name, outcome = ?answer.outcome, %message, "a pod did not take the configuration");
    }
    pod.refused = (!message.is_empty()).then(|| message.into());
    pod.acknowledge(&answer.applied);
    if answer.applied.content_hash != *published.content_hash {
        return Some(put_off(pod, published, false));
    }
    pod.acknowledged = Some((published.revision, Arc::clone(&published.content_hash), Instant::now()));
    if pod.push_failures == 0 && !published.found {
        ctx.shared.metrics.acknowledge_seconds.observe(published.at.elapsed().as_secs_f64());
    }
    (pod.push_failures, pod.push_after) = (0, None);
    no_longer_pushing(pod, published);
    None
}

/// A newer push may have begun meanwhile; it settles for itself.
fn no_longer_pushing(pod: &mut PodState, published: &Published) {
    if pod.pushing == Some(published.revision) {
        pod.pushing = None;
    }
}

fn put_off(pod: &mut PodState, published: &Published, quick: bool) -> Duration {
    no_longer_pushing(pod, published);
    pod.push_failures = pod.push_failures.saturating_add(1);
    let wait = back_off(pod.push_failures, quick, rand::random());
    pod.push_after = Some(Instant::now() + wait);
    wait + Duration::from_millis(1)
}

/// The wait after so many pushes that failed in a row: 0.25 s (0.1 s where a mount is on its way) doubled up to 15 s,
/// with up to a fifth more or less of it by `random`.
fn back_off(failures: u32, quick: bool, random: u16) -> Duration {
    let (first, longest) = if quick { (100, Duration::from_secs(5)) } else { (250, MAX_BACK_OFF) };
    let wait = Duration::from_millis(first * 2u64.pow(failures.saturating_sub(1).min(10))).min(longest);
    wait.mul_f64(0.8 + 0.4 * f64::from(random) / f64::from(u16::MAX))
}

/// A pod does not take the token: it has most likely not mounted the Secret yet, because it started before the Secret
/// was there. A kubelet refreshes such a mount within a minute or two by itself, and at once when the pod is touched.
pub async fn refresh_token(ctx: &Context, id: &WorkloadId, uid: &str, workload_uid: &str, endpoint: &Endpoint) {
    let due = |at: Option<Instant>| at.is_none_or(|at| at.elapsed() >= MOUNT_REFRESH_INTERVAL);
    let refresh = ctx.fleet.with_pod(id, uid, |pod| {
        let refresh = due(pod.mount_refreshed_at);
        if refresh {
            pod.mount_refreshed_at = Some(Instant::now());
        }
        refresh
    });
    if refresh != Some(true) || !ctx.shared.fence.holds() || ctx.shared.args.dry_run {
        return;
    }
    if due(ctx.fleet.read(id, |workload| workload.token_written_at).flatten()) {
        write_token(ctx, id, workload_uid).await;
    }
    let api: Api<Pod> = Api::namespaced(ctx.shared.clients.act.clone(), &id.namespace);
    let patch = json!({
        "metadata": { "uid": uid, "annotations": { MOUNT_REFRESH_ANNOTATION: jiff::Timestamp::now().to_string() } },
    });
    // By way of the status, which cannot touch what the pod runs.
    if let Err(error) = call(api.patch_status(&endpoint.pod, &PatchParams::default(), &Patch::Merge(&patch))).await {
        warn!(workload = %id, pod = %endpoint.pod, %error, "the pod's kubelet could not be asked to refresh its mounts; it does so by itself within two minutes");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::state::tests::known_pod;
    use contract::Applied;
    use contract::signing::ContentHash;

    fn published(found: bool) -> Published {
        Published {
            revision: 7,
            content_hash: "new".into(),
            bytes: bytes::Bytes::new(),
            content: ContentHash::of(b""),
            at: Instant::now(),
            found,
        }
    }

    #[rstest::rstest]
    #[case::never_heard(|_: &mut PodState| {}, false, true)]
    #[case::never_heard_and_the_document_was_found(|_: &mut PodState| {}, true, false)]
    #[case::it_runs_another(|pod: &mut PodState| pod.applied = Some(Box::default()), true, true)]
    #[case::in_sync(|pod: &mut PodState| {
        pod.applied = Some(Box::new(Applied { content_hash: "new".into(), ..Applied::default() }));
    }, false, false)]
    #[case::being_pushed_to(|pod: &mut PodState| pod.pushing = Some(7), false, false)]
    #[case::being_pushed_something_older(|pod: &mut PodState| pod.pushing = Some(6), false, true)]
    #[case::it_missed_a_question(|pod: &mut PodState| {
        (pod.unreachable, pod.misses) = (Some("refused".into()), 1);
    }, false, true)]
    #[case::it_missed_a_push_too(|pod: &mut PodState| {
        (pod.unreachable, pod.misses, pod.push_failures) = (Some("refused".into()), 2, 1);
    }, false, false)]
    #[case::put_off(|pod: &mut PodState| pod.push_after = Some(Instant::now() + MAX_BACK_OFF), false, false)]
    fn a_pod_is_pushed_to_when_it_can_be(#[case] state: fn(&mut PodState), #[case] found: bool, #[case] due: bool) {
        let mut pod = known_pod();
        state(&mut pod);
        assert_eq!(is_due(&pod, &published(found), Instant::now()), due);
    }

    #[rstest::rstest]
    #[case::the_first(1, false, 200..=300)]
    #[case::the_third(3, false, 800..=1_200)]
    #[case::a_mount_on_its_way(1, true, 80..=120)]
    #[case::the_longest(60, false, 12_000..=18_000)]
    #[case::the_longest_for_a_mount(60, true, 4_000..=6_000)]
    fn waits_grow_up_to_a_limit_and_differ(
        #[case] failures: u32,
        #[case] quick: bool,
        #[case] expected: std::ops::RangeInclusive<u128>,
    ) {
        for random in [0, u16::MAX / 2, u16::MAX] {
            let wait = back_off(failures, quick, random).as_millis();
            assert!(expected.contains(&wait), "{wait}");
        }
    }
}
