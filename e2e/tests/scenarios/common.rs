//! What the scenarios and the upgrade share: which cluster, and the state of the booking service on it.

use crds::ConditionType;
use e2e::{
    pod_admin::PodAdmin,
    provider::ProviderKind,
    testbed::{Testbed, TestbedError, is_true},
};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use std::{collections::BTreeMap, time::Duration};

/// Pods of the booking service.
pub const REPLICAS: u32 = 3;
/// Longest wait for what should happen within seconds.
pub const SOON: Duration = Duration::from_secs(60);

pub fn nodes() -> u32 {
    std::env::var("NODES").ok().and_then(|nodes| nodes.parse().ok()).unwrap_or(2)
}

pub fn provider() -> ProviderKind {
    let name = std::env::var("PROVIDER").unwrap_or_else(|_| "local".to_owned());
    clap::ValueEnum::from_str(&name, true).expect("PROVIDER names a provider")
}

/// Whether what each pod runs is as `check` wants it: hash and revision.
pub async fn in_every_pod(
    testbed: &Testbed,
    check: impl Fn(&str, i64) -> bool,
) -> Result<Result<(), String>, TestbedError> {
    // Before anything was ever published there is no token, and the pods run what is built in: that is fine.
    let Ok(pods) = PodAdmin::find(testbed).await else { return Ok(Ok(())) };
    for name in &pods.names {
        let applied = pods.health(name).await?.applied;
        if !check(&applied.content_hash, applied.revision) {
            return Ok(Err(format!("{name} runs {:?} at revision {}", applied.content_hash, applied.revision)));
        }
    }
    Ok(Ok(()))
}

pub async fn programmed(testbed: &Testbed) -> crds::ResiliencePolicy {
    let wanted = format!("{REPLICAS}/{REPLICAS}");
    let live = |policy: &crds::ResiliencePolicy| {
        is_true(policy, ConditionType::Programmed.as_str())
            && is_true(policy, ConditionType::Ready.as_str())
            && policy.status.as_ref().and_then(|status| status.programmed.as_deref()) == Some(&wanted)
    };
    testbed.policy_until("booking", SOON * 2, "the policy live in every pod", live).await.unwrap()
}

pub fn published(policy: &crds::ResiliencePolicy) -> (i64, String) {
    let target = &policy.status.as_ref().unwrap().targets[0];
    (target.revision.unwrap(), target.content_hash.clone().unwrap())
}

/// How often the containers of each booking pod were restarted, by the pod's uid.
pub async fn restarts(testbed: &Testbed) -> BTreeMap<String, i32> {
    let count = |pod: Pod| {
        let statuses = pod.status.iter().filter_map(|status| status.container_statuses.as_ref()).flatten();
        (pod.uid().unwrap(), statuses.map(|status| status.restart_count).sum())
    };
    testbed.booking_pods().await.unwrap().into_iter().map(count).collect()
}
