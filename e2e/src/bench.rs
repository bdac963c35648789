//! How long a change of a policy takes to reach running pods, beside what a mounted ConfigMap alone takes.

use crate::{
    pod_admin::PodAdmin,
    progress::Progress,
    provider::ProviderKind,
    testbed::{Images, TICKETING, Testbed, TestbedError, is_true, until},
};
use contract::AppliedFrom;
use crds::ConditionType;
use kube::Api;
use serde_json::json;
use std::time::{Duration, Instant};

/// Pods that have to acknowledge.
const PODS: u32 = 20;
/// Changes of the policy.
const CHANGES: u64 = 50;
/// Changes that reach the pods by the mount alone.
const MOUNT_CHANGES: u64 = 3;

/// Runs it and prints the table.
pub async fn run(kind: ProviderKind, name: Option<&str>, progress: &Progress) -> Result<(), TestbedError> {
    let images = Images::find(kind, progress).await?;
    let testbed = Testbed::open(kind, name, 1, progress).await?;
    testbed.install_operator(&images, &[]).await?;
    testbed.install_booking(&images, PODS).await?;
    testbed.delete_resources().await?;
    testbed.apply_file("crds/samples/quickstart.yaml").await?;
    let wanted = format!("{PODS}/{PODS}");
    testbed
        .policy_until("booking", Duration::from_secs(180), "the policy live in every pod", |policy| {
            is_true(policy, ConditionType::Programmed.as_str())
                && policy.status.as_ref().and_then(|s| s.programmed.as_deref()) == Some(&wanted)
        })
        .await?;
    let pods = PodAdmin::find(&testbed).await?;

    let (mut acknowledged, mut in_status) = (Vec::new(), Vec::new());
    for change in 0..CHANGES {
        // Every value is a new meaning, so every change is published.
        let (answered_at, answered) = change_policy(&testbed, change).await?;
        let policy = testbed
            .policy_until("booking", Duration::from_secs(30), "the change live in every pod", |policy| {
                is_true(policy, ConditionType::Programmed.as_str()) && revision(policy) > 0
            })
            .await?;
        in_status.push(millis(answered.elapsed()));
        for applied in pods.applied(revision(&policy)).await? {
            acknowledged.push(applied.applied_at_ms.saturating_sub(answered_at).max(0).unsigned_abs());
        }
        if change % 10 == 9 {
            progress.say(format!("{} of {CHANGES} changes", change + 1));
        }
    }

    progress.say("the same by the mounted ConfigMap alone: the operator writes it and cannot reach the pods");
    let mut mounted = Vec::new();
    for change in 0..MOUNT_CHANGES {
        mounted.extend(by_mount(&testbed, &pods, CHANGES + change, progress).await?);
    }
    print_table(&mut acknowledged, &mut in_status, &mut mounted);
    Ok(())
}

async fn change_policy(testbed: &Testbed, change: u64) -> Result<(i64, Instant), TestbedError> {
    let dependencies = json!([{ "name": "database", "timeout": { "request": format!("{}ms", 5_001 + change), "perTry": "1s" },
        "retry": { "numRetries": 3, "backOff": { "baseInterval": "200ms" } } }]);
    testbed.patch_policy("booking", &json!({ "dependencies": dependencies })).await?;
    Ok((jiff::Timestamp::now().as_millisecond(), Instant::now()))
}

fn revision(policy: &crds::ResiliencePolicy) -> i64 {
    policy.status.iter().flat_map(|status| &status.targets).find_map(|target| target.revision).unwrap_or_default()
}

/// One change that the pods get by their mount only: the document is written by hand as the operator would have, while
/// the operator is away.
async fn by_mount(
    testbed: &Testbed,
    pods: &PodAdmin,
    change: u64,
    progress: &Progress,
) -> Result<Vec<u64>, TestbedError> {
    testbed.scale_operator(0).await?;
    let maps: Api<k8s_openapi::api::core::v1::ConfigMap> = Api::namespaced(testbed.client.clone(), TICKETING);
    let name = contract::config_map_name(contract::WorkloadKind::Deployment, "booking");
    let map = maps.get(&name).await?;
    let text = map.data.as_ref().and_then(|data| data.get(contract::CONFIG_KEY)).cloned().unwrap_or_default();
    let (mut document, _) = contract::RuntimeConfig::parse(text.as_bytes())
        .map_err(|error| TestbedError::unexpected("a sound document", &error.to_string()))?;
    if let Some(database) = document.policy.settings.dependencies.get_mut("database") {
        database.timeout.request_ms = 5_001 + change;
    }
    let now = jiff::Timestamp::now().as_millisecond();
    let document = contract::RuntimeConfig::new(document.workload, now, document.policy, document.flags);
    let bytes = document.to_bytes().map_err(|error| TestbedError::unexpected("a document", &error.to_string()))?;
    let patch = json!({ "data": { (contract::CONFIG_KEY): String::from_utf8_lossy(&bytes) } });
    maps.patch(&name, &kube::api::PatchParams::default(), &kube::api::Patch::Merge(patch)).await?;
    let written = jiff::Timestamp::now().as_millisecond();
    let samples = progress
        .during(
            "waiting for the kubelet",
            until(Duration::from_secs(240), "the change live in every pod by its mount", || async {
                match pods.applied(document.revision).await {
                    Ok(all) if all.iter().all(|applied| applied.from == AppliedFrom::Mount) => Ok(Ok(all)),
                    Ok(_) => Ok(Err("some pods got it by a push".to_owned())),
                    Err(error) => Ok(Err(error.to_string())),
                }
            }),
        )
        .await?;
    testbed.scale_operator(1).await?;
    Ok(samples.iter().map(|applied| applied.applied_at_ms.saturating_sub(written).max(0).unsigned_abs()).collect())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn print_table(acknowledged: &mut [u64], in_status: &mut [u64], mounted: &mut [u64]) {
    println!("{CHANGES} policy changes on {PODS} pods; milliseconds from the answer of the apply");
    println!("{:<44}{:>8}{:>8}{:>8}{:>8}{:>8}", "", "samples", "p50", "p90", "p99", "max");
    row("to the pod's acknowledgement (push)", acknowledged);
    row("until the status says so", in_status);
    row("by the mounted ConfigMap alone", mounted);
    let ratio = percentile(mounted, 50) / percentile(acknowledged, 50).max(1);
    println!("the mount alone takes {ratio} times as long as the push (medians)");
}

fn row(name: &str, samples: &mut [u64]) {
    samples.sort_unstable();
    let max = samples.last().copied().unwrap_or_default();
    let [p50, p90, p99] = [50, 90, 99].map(|share| percentile(samples, share));
    println!("{name:<44}{:>8}{p50:>8}{p90:>8}{p99:>8}{max:>8}", samples.len());
}

/// The smallest sample that at least `share` percent do not exceed.
pub(crate) fn percentile(sorted: &[u64], share: usize) -> u64 {
    let rank = (sorted.len() * share).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_nearest_rank() {
        let samples: Vec<u64> = (1..=1000).collect();
        assert_eq!([50, 99, 100].map(|share| percentile(&samples, share)), [500, 990, 1000]);
        assert_eq!(percentile(&[7], 99), 7);
        assert_eq!(percentile(&[], 99), 0);
    }
}
