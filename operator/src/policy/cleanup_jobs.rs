//! Cleanup Jobs: made from a CronJob of the policy's namespace, named by the intent, owned by the workload.

use super::job_pods;
use crate::{
    context::Context,
    fleet::facts::JobFacts as KnownJob,
    kubernetes::{
        clients::call,
        meta::{FIELD_MANAGER, INTENT_LABEL, owner_reference},
    },
    recovery::events::LOG_FOLLOWS,
    status::target::workload_of,
};
use contract::WorkloadId;
use engine::recovery::{Action, History, Job as JobFacts, JobState, Record};
use k8s_openapi::api::{
    batch::v1::{CronJob, Job},
    core::v1::Pod,
};
use kube::{
    Api, ResourceExt,
    api::{ListParams, LogParams, PostParams},
};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Annotation of a Job that was made for an intent: the CronJob that it was made from. The chart's admission policy compares
/// the two.
const CRON_JOB_ANNOTATION: &str = "resilience.ticketwave.io/cron-job";
/// How long a Job is kept after its end: far longer than any lease, because its name is what keeps it from being made
/// twice.
const KEPT_SECONDS: i64 = 24 * 3600;
/// Lines and bytes of a failed Job's log that are told.
const LOG_LINES: i64 = 10;
const LOG_BYTES: usize = 500;

/// Name of the Job of an intent. Nothing that a person can edit meanwhile has a part in it.
fn name(record: &Record) -> String {
    // A StatefulSet's key has its kind in it; the name of an object has no room for that.
    let target = record.subject.target.rsplit('/').next().unwrap_or_default();
    let target: String = target.chars().take(37).collect();
    format!("{}-cleanup-{}", target.trim_end_matches(['-', '.']), record.id)
}

/// The Job that a CronJob would make, for one intent.
fn job(cron_job: &CronJob, record: &Record, workload: &WorkloadId, workload_uid: &str) -> Result<Job, String> {
    let template = cron_job.spec.job_template.clone();
    let mut spec = template.spec.ok_or("the CronJob's template has no spec")?;
    let meta = template.metadata.unwrap_or_default();
    let seconds = i64::try_from(record.step.timeout_ms.div_ceil(1000)).unwrap_or(i64::MAX);
    // It must not go on when the next step is tried.
    spec.active_deadline_seconds = Some(spec.active_deadline_seconds.map_or(seconds, |own| own.min(seconds)));
    spec.ttl_seconds_after_finished = i32::try_from(KEPT_SECONDS).ok();
    let mut labels = meta.labels.unwrap_or_default();
    labels.insert("app.kubernetes.io/managed-by".to_owned(), FIELD_MANAGER.to_owned());
    labels.insert(INTENT_LABEL.to_owned(), record.id.clone());
    // Besides the annotation: the admission policies select Jobs by labels.
    labels.insert(CRON_JOB_ANNOTATION.to_owned(), cron_job.name_any());
    let mut annotations = meta.annotations.unwrap_or_default();
    annotations.insert("cronjob.kubernetes.io/instantiate".to_owned(), "manual".to_owned());
    annotations.insert(CRON_JOB_ANNOTATION.to_owned(), cron_job.name_any());
    annotations.insert("resilience.ticketwave.io/check".to_owned(), record.subject.check.clone());
    let manifest = json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name(record),
            "namespace": workload.namespace,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [owner_reference(workload, workload_uid)],
        },
        "spec": serde_json::to_value(spec).unwrap_or(Value::Null),
    });
    serde_json::from_value(manifest).map_err(|error| error.to_string())
}

/// Makes the Job of an intent. One that is there already is the same one.
pub async fn run(ctx: &Context, namespace: &str, record: &Record) -> Result<Option<String>, String> {
    let cron_name = record.step.cron_job.as_deref().ok_or("the policy does not name this step's CronJob any more")?;
    let workload = workload_of(namespace, &record.subject.target);
    let known = ctx.index.workload(&workload).ok_or("the workload is gone")?;
    let client = &ctx.shared.clients.act;
    let cron_jobs: Api<CronJob> = Api::namespaced(client.clone(), namespace);
    let cron_job = match call(cron_jobs.get(cron_name)).await {
        Ok(cron_job) => cron_job,
        Err(error) if error.is_not_found() => {
            return Err(format!("there is no CronJob {cron_name} in namespace {namespace}: create it"));
        }
        Err(error) => return Err(format!("the CronJob {cron_name} cannot be read: {error}")),
    };
    let job = job(&cron_job, record, &workload, &known.uid)?;
    let name = job.name_any();
    let jobs: Api<Job> = Api::namespaced(client.clone(), namespace);
    let how = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
    match call(jobs.create(&how, &job)).await {
        Ok(_) => Ok(Some(format!("Job {name} was made from CronJob {cron_name}"))),
        Err(error) if error.is_already_there() => Ok(Some(format!("Job {name} was there already"))),
        Err(error) => Err(format!("the Job {name} cannot be made: {error}")),
    }
}

/// The Jobs of what is in flight, by intent.
pub async fn gather(ctx: &Context, namespace: &str, history: &History) -> BTreeMap<String, JobFacts> {
    let mut found = BTreeMap::new();
    for record in history.in_flight.iter().filter(|record| record.step.action == Action::RunCleanupJob) {
        let workload = workload_of(namespace, &record.subject.target);
        let Some(job) = ctx.index.job_of(&workload, &record.id) else { continue };
        let state = match job.state.clone() {
            JobState::Complete => JobState::Complete,
            JobState::Failed(why) => match latest_pod(ctx, namespace, &job).await {
                Some(pod) if job_pods::main_is_done(&pod) => JobState::Complete,
                Some(pod) => JobState::Failed(why_it_failed(ctx, namespace, &pod, why).await),
                None => JobState::Failed(why),
            },
            // A container that only accompanies the main one may run for ever.
            JobState::Running => match latest_pod(ctx, namespace, &job).await {
                Some(pod) if job_pods::main_is_done(&pod) => JobState::Complete,
                Some(pod) if job_pods::main_has_failed(&pod) => {
                    let why = "it is the Job's main container".to_owned();
                    JobState::Failed(why_it_failed(ctx, namespace, &pod, why).await)
                }
                _ => JobState::Running,
            },
        };
        found.insert(record.id.clone(), JobFacts { created_at: job.created_at, state });
    }
    found
}

/// The pod that a Job made last, if it is still there.
async fn latest_pod(ctx: &Context, namespace: &str, job: &KnownJob) -> Option<Pod> {
    let pods: Api<Pod> = Api::namespaced(ctx.shared.clients.act.clone(), namespace);
    let of_job = ListParams::default().labels(&format!("batch.kubernetes.io/job-name={}", job.name)).limit(20);
    let mut found = call(pods.list(&of_job)).await.ok()?.items;
    found.sort_by_key(|pod| pod.creation_timestamp().map(|time| time.0));
    found.pop()
}

/// Which container failed, and how its log ends; that only if it may be told.
async fn why_it_failed(ctx: &Context, namespace: &str, pod: &Pod, mut why: String) -> String {
    let Some(failed) = job_pods::failed(pod) else { return why };
    why = format!("{}: {why}", failed.told);
    if ctx.shared.args.job_logs
        && let Some(tail) = log_tail(ctx, namespace, &pod.name_any(), &failed.name).await
    {
        why.push_str(LOG_FOLLOWS);
        why.push_str(&tail);
    }
    why
}

/// How the log of a container ends, without what looks like a secret; nothing if it cannot be had.
async fn log_tail(ctx: &Context, namespace: &str, pod: &str, container: &str) -> Option<String> {
    let pods: Api<Pod> = Api::namespaced(ctx.shared.clients.act.clone(), namespace);
    let what = LogParams {
        container: Some(container.to_owned()),
        tail_lines: Some(LOG_LINES),
        limit_bytes: Some(64 * 1024),
        ..LogParams::default()
    };
    let text = call(pods.logs(pod, &what)).await.ok()?;
    // Masked before it is cut: half of a secret does not look like one.
    let text = job_pods::masked(text.trim());
    let tail = &text[text.ceil_char_boundary(text.len().saturating_sub(LOG_BYTES))..];
    (!tail.is_empty()).then(|| tail.lines().map(str::trim).collect::<Vec<_>>().join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::recovery::{Outcome, Step, Subject};
    use jiff::Timestamp;

    fn record() -> Record {
        Record {
            id: "0123456789abcdef".into(),
            slot: "0123456789abcdef".into(),
            after: None,
            by_hand: false,
            withdrawn: false,
            subject: Subject { target: "booking".into(), pod: None, check: "booking-consistency".into() },
            instance: None,
            step: Step { action: Action::RunCleanupJob, cron_job: Some("cleanup".into()), timeout_ms: 90_500 },
            index: 0,
            steps: 1,
            failed_at: Timestamp::UNIX_EPOCH,
            started_at: Timestamp::UNIX_EPOCH,
            executed_at: None,
            finished_at: None,
            outcome: Outcome::Pending,
            healed_at: None,
            before: None,
            successor: None,
            dry_run: false,
            message: None,
        }
    }

    fn cron_job(deadline: &Value) -> CronJob {
        let template = json!({ "metadata": { "labels": { "team": "booking" } }, "spec": {
            "activeDeadlineSeconds": deadline, "backoffLimit": 0,
            "template": { "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": "i" }] } },
        }});
        let spec = json!({ "schedule": "@daily", "suspend": true, "jobTemplate": template });
        serde_json::from_value(json!({ "metadata": { "name": "cleanup" }, "spec": spec })).unwrap()
    }

    #[rstest::rstest]
    #[case::none_of_its_own(Value::Null, 91)]
    #[case::a_shorter_one(json!(30), 30)]
    #[case::a_longer_one(json!(600), 91)]
    fn a_job_is_the_cron_jobs_bound_to_its_intent(#[case] deadline: Value, #[case] expected: i64) {
        let workload = WorkloadId::deployment("ticketing", "booking");
        let job = job(&cron_job(&deadline), &record(), &workload, "uid").unwrap();
        assert_eq!(job.name_any(), "booking-cleanup-0123456789abcdef");
        assert_eq!(job.labels()[INTENT_LABEL], "0123456789abcdef");
        assert_eq!(job.labels()["team"], "booking");
        assert_eq!(job.annotations()[CRON_JOB_ANNOTATION], "cleanup");
        assert_eq!(job.owner_references()[0].uid, "uid");
        let spec = job.spec.unwrap();
        assert_eq!((spec.active_deadline_seconds, spec.backoff_limit), (Some(expected), Some(0)));
        assert_eq!(spec.ttl_seconds_after_finished, Some(86_400));
    }

    #[test]
    fn the_longest_names_still_fit() {
        let mut record = record();
        record.subject.target = "a".repeat(36) + "-" + &"b".repeat(26);
        let name = name(&record);
        assert!(name.len() <= 63 && name.ends_with("-cleanup-0123456789abcdef") && !name.contains("--"), "{name}");
    }
}
