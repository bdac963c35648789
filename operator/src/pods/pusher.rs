//! Brings published documents to pods, each pod by itself: a slow one delays no other.

use super::{
    client::{Endpoint, PodError},
    state::Published,
};
use crate::{
    context::Context,
    kubernetes::{
        clients::call,
        meta::{MOUNT_REFRESH_ANNOTATION, cut},
        watches::Caches,
    },
    status::target,
    telemetry::metrics::PodCallLabels,
};
use contract::{PushAnswer, WorkloadId};
use engine::report_validation;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api,
    api::{Patch, PatchParams},
    runtime::reflector::ObjectRef,
};
use serde_json::json;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;
use tracing::{debug, warn};

/// A pod's mounts are refreshed, and its Secret written again, at most this often.
const MOUNT_REFRESH_INTERVAL: Duration = Duration::from_secs(30);

/// Writes the token Secret of a workload once in the life of this process, and again when pods do not take the token.
pub async fn ensure_token(ctx: &Context, id: &WorkloadId, uid: &str) {
    let written = ctx.fleet.read(id, |workload| workload.token_written_at).flatten();
    if written.is_some() {
        return;
    }
    write_token(ctx, id, uid).await;
}

async fn write_token(ctx: &Context, id: &WorkloadId, uid: &str) {
    if !ctx.shared.fence.holds() || ctx.shared.args.dry_run {
        return;
    }
    match ctx.shared.tokens.write(&ctx.shared.clients, id, uid).await {
        Ok(()) => {
            if let Some(workload) = ctx.fleet.lock().get_mut(id) {
                workload.token_written_at = Some(Instant::now());
            }
        }
        Err(error) => {
            warn!(workload = %id, %error, "the token Secret could not be written; its pods cannot be reached until it is");
        }
    }
}

/// The pod of that name and uid, if the cluster still has it.
pub fn find_pod(caches: &Caches, namespace: &str, name: &str, uid: &str) -> Option<Arc<Pod>> {
    caches.pods.get(&ObjectRef::new(name).within(namespace)).filter(|pod| pod.metadata.uid.as_deref() == Some(uid))
}

/// Pushes what is published to every pod that does not run it and is not being pushed to.
pub fn push_to_all(ctx: &Arc<Context>, id: &WorkloadId) {
    let now = Instant::now();
    let mut due = Vec::new();
    {
        let mut fleet = ctx.fleet.lock();
        let Some(workload) = fleet.get_mut(id) else { return };
        let Some(published) = workload.published.clone() else { return };
        for (uid, pod) in &mut workload.pods {
            let in_sync = pod.applied.as_ref().is_some_and(|applied| applied.content_hash == published.content_hash);
            let busy = pod.pushing.is_some_and(|revision| revision >= published.revision);
            if in_sync || busy || pod.push_after.is_some_and(|after| now < after) {
                continue;
            }
            let endpoint = find_pod(&ctx.caches, &id.namespace, &pod.name, uid).and_then(|pod| Endpoint::admin(&pod));
            if let Some(endpoint) = endpoint {
                pod.pushing = Some(published.revision);
                due.push((uid.clone(), endpoint, published.clone()));
            }
        }
    }
    for (uid, endpoint, published) in due {
        let (ctx, id) = (Arc::clone(ctx), id.clone());
        tokio::spawn(async move { push(&ctx, &id, &uid, &endpoint, &published).await });
    }
}

async fn push(ctx: &Arc<Context>, id: &WorkloadId, uid: &str, endpoint: &Endpoint, published: &Published) {
    let workload_uid = ctx.fleet.read(id, |workload| workload.uid.clone()).unwrap_or_default();
    let token = ctx.shared.tokens.current(&workload_uid);
    let result = {
        let Ok(_permit) = ctx.shared.pod_calls.acquire().await else { return };
        if !ctx.shared.fence.holds() {
            ctx.fleet.with_pod(id, uid, |pod| pod.pushing = None);
            return;
        }
        ctx.shared.pods.push(endpoint, &token, published.bytes.as_ref().clone()).await
    };
    let label = result.as_ref().map_or_else(PodError::label, |_| "ok");
    ctx.shared.metrics.pod_calls.get_or_create(&PodCallLabels { call: "push", result: label }).inc();
    let unauthorized = result == Err(PodError::Unauthorized);
    let retry = settle(ctx, id, uid, published, result);
    if unauthorized {
        refresh_token(ctx, id, uid, &workload_uid, endpoint).await;
    }
    target::gauge(ctx, id);
    ctx.enqueue_status(&id.namespace, &id.name);
    if let Some(after) = retry {
        ctx.enqueue_workload_later(id.clone(), after);
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
    // It may run something newer by now than what this push brought.
    let newest = ctx.fleet.read(id, |workload| workload.published.as_ref().map(|one| one.revision)).flatten();
    let result = result.and_then(|answer| {
        report_validation::applied(&answer.applied, newest).map_err(PodError::InvalidResponse)?;
        Ok(answer)
    });
    ctx
        .fleet
        .with_pod(id, uid, |pod| {
            // A newer push may have begun meanwhile; it settles for itself.
            if pod.pushing == Some(published.revision) {
                pod.pushing = None;
            }
            let mut quick = false;
            match result {
                Ok(answer) => {
                    if !answer.message.is_empty() {
                        warn!(workload = %id, pod = %pod.name, outcome = ?answer.outcome, message = %cut(&answer.message, 200), "a pod did not take the configuration");
                    }
                    pod.unreachable = None;
                    pod.refused = (!answer.message.is_empty()).then(|| cut(&answer.message, 200).to_owned());
                    pod.applied = Some(answer.applied);
                    if pod.applied.as_ref().is_some_and(|applied| applied.content_hash == published.content_hash) {
                        pod.acknowledged =
                            Some((published.revision, published.content_hash.clone(), Instant::now()));
                        if pod.push_failures == 0 {
                            ctx.shared.metrics.acknowledge_seconds.observe(published.at.elapsed().as_secs_f64());
                        }
                        pod.push_failures = 0;
                        pod.push_after = None;
                        return None;
                    }
                }
                Err(error) => {
                    debug!(workload = %id, pod = %pod.name, %error, "push failed");
                    quick = error == PodError::Unauthorized;
                    pod.miss(&error);
                }
            }
            pod.push_failures = pod.push_failures.saturating_add(1);
            let (first, most) = if quick { (100, 5_000) } else { (250, 15_000) };
            let wait = Duration::from_millis((first * 2u64.pow((pod.push_failures - 1).min(10))).min(most));
            pod.push_after = Some(Instant::now() + wait);
            Some(wait + Duration::from_millis(1))
        })
        .flatten()
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
