//! Asks pods for their health, each at its own moment of the interval, so that ten thousand pods are asked evenly and
//! not all at once. Only the leader asks.

use super::{
    client::{Endpoint, PodError},
    pusher::{find_pod, refresh_token},
};
use crate::{context::Context, status::target, telemetry::metrics::PodCallLabels};
use contract::WorkloadId;
use engine::report_validation;
use jiff::Timestamp;
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// How finely questions are spread.
const TICK: Duration = Duration::from_millis(100);

/// Asks until `shutdown`.
pub async fn run(ctx: Arc<Context>, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        if ctx.shared.fence.holds() {
            for due in due(&ctx, Instant::now()) {
                let ctx = Arc::clone(&ctx);
                tokio::spawn(async move { probe(&ctx, due).await });
            }
        }
    }
}

/// A pod that is to be asked now.
struct Due {
    id: WorkloadId,
    uid: String,
    workload_uid: String,
    endpoint: Endpoint,
    with_token: bool,
}

/// The pods that are to be asked now; each is given its next moment.
fn due(ctx: &Context, now: Instant) -> Vec<Due> {
    let mut all = Vec::new();
    let mut fleet = ctx.fleet.lock();
    for (id, workload) in &mut *fleet {
        let Some(every) = workload.probe_every else { continue };
        // Without a token (nothing was ever published, as in a dry run) the public port has the same report.
        let with_token = workload.token_written_at.is_some();
        for (uid, pod) in &mut workload.pods {
            let at = *pod.probe_at.get_or_insert_with(|| now + offset(uid, every));
            if pod.probing || now < at {
                continue;
            }
            let Some(found) = find_pod(&ctx.caches, &id.namespace, &pod.name, uid) else { continue };
            let endpoint = if with_token { Endpoint::admin(&found) } else { Endpoint::public(&found) };
            if let Some(endpoint) = endpoint {
                pod.probing = true;
                pod.probe_at = Some(now + every);
                all.push(Due {
                    id: id.clone(),
                    uid: uid.clone(),
                    workload_uid: workload.uid.clone(),
                    endpoint,
                    with_token,
                });
            }
        }
    }
    all
}

/// A pod's own moment within the interval.
fn offset(uid: &str, every: Duration) -> Duration {
    let mut hasher = DefaultHasher::new();
    uid.hash(&mut hasher);
    every.mul_f64(f64::from(u16::try_from(hasher.finish() % 1000).unwrap_or(0)) / 1000.0)
}

async fn probe(ctx: &Arc<Context>, due: Due) {
    let token = if due.with_token { ctx.shared.tokens.current(&due.workload_uid) } else { String::new() };
    let asked = Instant::now();
    let result = {
        let Ok(_permit) = ctx.shared.pod_calls.acquire().await else { return };
        ctx.shared.pods.health(&due.endpoint, &token).await
    };
    let newest = ctx.fleet.read(&due.id, |workload| workload.published.as_ref().map(|one| one.revision)).flatten();
    let result = result.and_then(|report| {
        report_validation::report(&report, &due.endpoint.pod, newest).map_err(PodError::InvalidResponse)?;
        Ok(report)
    });
    let label = result.as_ref().map_or_else(PodError::label, |_| "ok");
    ctx.shared.metrics.pod_calls.get_or_create(&PodCallLabels { call: "health", result: label }).inc();
    // Whole milliseconds, as status keeps them.
    let now = Timestamp::now();
    let now = Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now);
    let unauthorized = result.as_ref().err() == Some(&PodError::Unauthorized);
    let news = {
        let mut fleet = ctx.fleet.lock();
        let Some(workload) = fleet.get_mut(&due.id) else { return };
        let published = workload.published.as_ref().map(|published| published.content_hash.clone());
        let Some(pod) = workload.pods.get_mut(&due.uid) else { return };
        pod.probing = false;
        let changed = match result {
            Ok(report) => pod.take(&report, &workload.thresholds, asked, now),
            Err(error) => pod.miss(&error),
        };
        let behind =
            published.is_some() && published.as_ref() != pod.applied.as_ref().map(|applied| &applied.content_hash);
        workload.note_circuits(now);
        workload.update_majorities(now);
        (changed, behind)
    };
    if unauthorized {
        refresh_token(ctx, &due.id, &due.uid, &due.workload_uid, &due.endpoint).await;
    }
    let (changed, behind) = news;
    if changed {
        target::gauge(ctx, &due.id);
        ctx.enqueue_status(&due.id.namespace, &due.id.name);
    }
    if changed || behind {
        ctx.enqueue_workload(&due.id.namespace, &due.id.name);
    }
}
