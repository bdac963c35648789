//! How long it takes until all pods are well again, with the operator and with the kubelet's liveness probe alone: the same
//! faults at the same time, side by side in one run; and what each of the two restarts while the database is away.
//!
//! Both Deployments run the booking service on the same database, with the same policy but for recovery. The twin has none:
//! its liveness probe fails when its own checks do, as often and as fast as the policy counts.

use crate::{
    pod_admin::PodAdmin,
    progress::Progress,
    provider::ProviderKind,
    quick_policy::{quick_policy, quick_policy_with_readiness},
    sabotage::{OutdatedSessions, StoppedProcess, give_database_back, take_database_away},
    testbed::{Images, TICKETING, Testbed, TestbedError, is_true, until},
};
use contract::{CheckStatus, WorkloadKind, admin::MemoryFault};
use crds::{ConditionType, ResiliencePolicy};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt, api::ListParams};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// The one that the operator recovers.
const OPERATED: &str = "booking";
/// The one that has nothing but its liveness probe.
const PROBED: &str = "booking-probed";
/// Pods of each.
const PODS: usize = 3;
/// How often each fault is brought about.
const ROUNDS: usize = 3;
/// How long the database is away.
const AWAY: Duration = Duration::from_secs(60);
/// All pods are well when they have been for so long.
const STAYS_WELL: Duration = Duration::from_secs(3);
/// Longest wait for a fault to show.
const SHOWS_WITHIN: Duration = Duration::from_secs(60);
/// Longest wait for all pods to be well again.
const LONGEST: Duration = Duration::from_secs(300);
/// Longest wait for one pod's report.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// What befalls one pod of each.
#[derive(Clone, Copy, Debug)]
enum Fault {
    OutdatedSessions,
    LeakedMemory,
    StoppedProcess,
}

impl Fault {
    const ALL: [Self; 3] = [Self::OutdatedSessions, Self::LeakedMemory, Self::StoppedProcess];

    fn in_words(self) -> &'static str {
        match self {
            Self::OutdatedSessions => "its database sessions are of no use",
            Self::LeakedMemory => "it holds memory above its limit",
            Self::StoppedProcess => "its process hangs",
        }
    }
}

/// What it was like for one of the two.
#[derive(Clone, Debug, Default)]
struct Outcome {
    /// Until all pods were well; none: not within [`LONGEST`].
    well: Option<Duration>,
    /// Containers that the kubelet has restarted meanwhile.
    containers: u64,
    /// Pods that were replaced meanwhile.
    pods: usize,
}

/// Runs it and prints the tables.
pub async fn run(kind: ProviderKind, name: Option<&str>, progress: &Progress) -> Result<(), TestbedError> {
    let images = Images::find(kind, progress).await?;
    let testbed = Testbed::open(kind, name, 1, progress).await?;
    testbed.install_operator(&images, &[]).await?;
    testbed.install_booking(&images, PODS.try_into().unwrap_or(1)).await?;
    testbed.delete_resources().await?;
    create_probed(&testbed).await?;
    let measured = measure(&testbed, progress).await;
    let words = format!("delete deployment {PROBED} -n {TICKETING} --ignore-not-found");
    testbed.kubectl.run(&words).await?;
    testbed.delete_resources().await?;
    let (faults, away) = measured?;
    print_faults(&faults);
    print_away(&away);
    Ok(())
}

type Pair = [Outcome; 2];

async fn measure(testbed: &Testbed, progress: &Progress) -> Result<(Vec<(Fault, Vec<Pair>)>, Pair), TestbedError> {
    testbed.kubectl.apply(&quick_policy_with_readiness(OPERATED).to_string()).await?;
    let mut without_recovery = quick_policy(PROBED);
    without_recovery["spec"]["recovery"] = Value::Null;
    testbed.kubectl.apply(&without_recovery.to_string()).await?;
    let mut faults = Vec::new();
    for fault in Fault::ALL {
        let mut rounds = Vec::new();
        for round in 1..=ROUNDS {
            begin_anew(testbed).await?;
            let outcomes = bring_about(testbed, fault).await?;
            let times: Vec<_> = outcomes.iter().map(|outcome| shown(outcome.well)).collect();
            progress.say(format!("{}, {round} of {ROUNDS}: well after {}", fault.in_words(), times.join(" and ")));
            rounds.push(outcomes);
        }
        faults.push((fault, rounds));
    }
    begin_anew(testbed).await?;
    progress.say(format!("the database is away for {} s", AWAY.as_secs()));
    Ok((faults, without_database(testbed).await?))
}

/// The booking service once more, under another name and with a liveness probe that asks its checks.
async fn create_probed(testbed: &Testbed) -> Result<(), TestbedError> {
    let deployment = testbed.kubectl.get(&format!("deployment {OPERATED} -n {TICKETING}")).await?;
    let probed = probed(&deployment);
    testbed.kubectl.apply(&probed.to_string()).await?;
    Ok(())
}

fn probed(deployment: &Value) -> Value {
    let mut template = deployment["spec"]["template"].clone();
    template["metadata"]["labels"]["app.kubernetes.io/name"] = json!(PROBED);
    let container = &mut template["spec"]["containers"][0];
    for variable in container["env"].as_array_mut().into_iter().flatten() {
        if variable["name"] == "WORKLOAD_NAME" {
            variable["value"] = json!(PROBED);
        }
    }
    // As the policy's check: every second, three failures.
    container["livenessProbe"] = json!({
        "exec": { "command": ["/ticketing", "health", "--timeout", "1"] },
        "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 3,
    });
    for volume in template["spec"]["volumes"].as_array_mut().into_iter().flatten() {
        if volume["configMap"].is_object() {
            volume["configMap"]["name"] = json!(contract::config_map_name(WorkloadKind::Deployment, PROBED));
        } else if volume["name"] == "resilience-token" {
            volume["secret"]["secretName"] = json!(contract::token_secret_name(WorkloadKind::Deployment, PROBED));
        }
    }
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": PROBED, "namespace": TICKETING },
        "spec": {
            "replicas": PODS, "template": template,
            "selector": { "matchLabels": { "app.kubernetes.io/name": PROBED } },
        },
    })
}

/// Pods that nothing has happened to yet: a container that was restarted lately waits longer for the next time.
async fn begin_anew(testbed: &Testbed) -> Result<(), TestbedError> {
    for name in [OPERATED, PROBED] {
        testbed.kubectl.run(&format!("rollout restart -n {TICKETING} deployment/{name}")).await?;
    }
    for name in [OPERATED, PROBED] {
        testbed.kubectl.run(&format!("rollout status -n {TICKETING} deployment/{name} --timeout=180s")).await?;
        let live = |policy: &ResiliencePolicy| {
            let all = format!("{PODS}/{PODS}");
            is_true(policy, ConditionType::Programmed.as_str())
                && policy.status.as_ref().and_then(|status| status.programmed.as_deref()) == Some(all.as_str())
        };
        testbed.policy_until(name, LONGEST, "the policy live in every pod", live).await?;
        until(LONGEST, &format!("all pods of {name} well, and those before them gone"), || async {
            let gone = pods(testbed, name).await?.len() == PODS;
            Ok(if gone && are_well(testbed, name).await { Ok(()) } else { Err("not yet".to_owned()) })
        })
        .await?;
    }
    Ok(())
}

async fn bring_about(testbed: &Testbed, fault: Fault) -> Result<Pair, TestbedError> {
    let (operated, probed) = (pods(testbed, OPERATED).await?, pods(testbed, PROBED).await?);
    let all: Vec<String> = operated.iter().chain(&probed).map(ResourceExt::name_any).collect();
    let victims = [all[0].as_str(), all[PODS].as_str()];
    match fault {
        Fault::OutdatedSessions => {
            let others: Vec<_> = all.iter().map(String::as_str).filter(|name| !victims.contains(name)).collect();
            let outdated = OutdatedSessions::of(testbed, &victims, &others).await?;
            let seen = both(testbed, [outdated.since; 2]).await;
            outdated.end(testbed).await?;
            seen
        }
        Fault::LeakedMemory => {
            for (workload, victim) in [OPERATED, PROBED].into_iter().zip(victims) {
                let admin = PodAdmin::of(testbed, WorkloadKind::Deployment, workload, vec![victim.to_owned()]).await?;
                admin.fill_memory(victim, MemoryFault { mebibytes: 64, lease_seconds: 600 }).await?;
            }
            both(testbed, [Instant::now(); 2]).await
        }
        Fault::StoppedProcess => {
            let first = StoppedProcess::of(testbed, victims[0]).await?;
            let second = StoppedProcess::of(testbed, victims[1]).await;
            let seen = match &second {
                Ok(second) => both(testbed, [first.since, second.since]).await,
                Err(_) => Ok(Pair::default()),
            };
            // Those that hung are gone by now, and their helpers with nothing to do.
            let _ = first.resume(testbed).await;
            let _ = second?.resume(testbed).await;
            seen
        }
    }
}

/// Waits for both at the same time.
async fn both(testbed: &Testbed, since: [Instant; 2]) -> Result<Pair, TestbedError> {
    let (operated, probed) = tokio::join!(recovered(testbed, OPERATED, since[0]), recovered(testbed, PROBED, since[1]));
    Ok([operated?, probed?])
}

/// Waits until a fault has shown and all pods are well again.
async fn recovered(testbed: &Testbed, workload: &str, since: Instant) -> Result<Outcome, TestbedError> {
    let before = pods(testbed, workload).await?;
    let (mut has_shown, mut well_since) = (false, None);
    let well = loop {
        if are_well(testbed, workload).await {
            let first = *well_since.get_or_insert_with(Instant::now);
            if has_shown && first.elapsed() >= STAYS_WELL {
                break Some(first.duration_since(since));
            }
        } else {
            (has_shown, well_since) = (true, None);
        }
        if !has_shown && since.elapsed() > SHOWS_WITHIN {
            return Err(TestbedError::unexpected("a pod that is not well", &format!("all of {workload} are")));
        }
        if since.elapsed() > LONGEST {
            break None;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    outcome(testbed, workload, &before, well).await
}

async fn without_database(testbed: &Testbed) -> Result<Pair, TestbedError> {
    let before = [pods(testbed, OPERATED).await?, pods(testbed, PROBED).await?];
    take_database_away(testbed).await?;
    tokio::time::sleep(AWAY).await;
    let failing = [are_well(testbed, OPERATED).await, are_well(testbed, PROBED).await];
    // Also after a failure the database is left as it was found.
    give_database_back(testbed).await?;
    if failing.contains(&true) {
        return Err(TestbedError::unexpected("pods that lack their database", "all of them are well without it"));
    }
    let back = Instant::now();
    let [operated, probed] = both(testbed, [back; 2]).await?.map(|outcome| outcome.well);
    Ok([outcome(testbed, OPERATED, &before[0], operated).await?, outcome(testbed, PROBED, &before[1], probed).await?])
}

/// What was done to the pods since `before`.
async fn outcome(
    testbed: &Testbed,
    workload: &str,
    before: &[Pod],
    well: Option<Duration>,
) -> Result<Outcome, TestbedError> {
    let mut now = pods(testbed, workload).await?;
    // One whose process hangs stays for as long as it may.
    now.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    let uids = |pods: &[Pod]| pods.iter().filter_map(ResourceExt::uid).collect::<BTreeSet<_>>();
    Ok(Outcome {
        well,
        containers: restarts(&now).saturating_sub(restarts(before)),
        pods: uids(before).difference(&uids(&now)).count(),
    })
}

async fn pods(testbed: &Testbed, workload: &str) -> Result<Vec<Pod>, TestbedError> {
    let api: Api<Pod> = Api::namespaced(testbed.client.clone(), TICKETING);
    let mut all = api.list(&ListParams::default().labels(&format!("app.kubernetes.io/name={workload}"))).await?.items;
    all.sort_by_key(ResourceExt::name_any);
    Ok(all)
}

/// How often the kubelet has restarted their containers.
fn restarts(pods: &[Pod]) -> u64 {
    let statuses = pods.iter().filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref()).flatten();
    statuses.map(|status| u64::try_from(status.restart_count).unwrap_or_default()).sum()
}

/// Whether as many pods as there are to be are ready, and every check of each has run and is healthy.
async fn are_well(testbed: &Testbed, workload: &str) -> bool {
    let Ok(all) = pods(testbed, workload).await else { return false };
    let ready = |pod: &&Pod| {
        let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
        pod.metadata.deletion_timestamp.is_none()
            && conditions.into_iter().flatten().any(|one| one.type_ == "Ready" && one.status == "True")
    };
    let names: Vec<_> = all.iter().filter(ready).map(ResourceExt::name_any).collect();
    if names.len() < PODS {
        return false;
    }
    let ask = async {
        let pods = PodAdmin::of(testbed, WorkloadKind::Deployment, workload, names).await?;
        futures::future::try_join_all(pods.names.iter().map(|name| pods.health(name))).await
    };
    let Ok(Ok(reports)) = tokio::time::timeout(REPORT_TIMEOUT, ask).await else { return false };
    reports.iter().all(|report| {
        let healthy = |name: &&str| {
            report.checks.get(*name).is_some_and(|check| check.runs > 0 && check.status == CheckStatus::Healthy)
        };
        ["database", "memory"].iter().all(healthy)
    })
}

fn shown(well: Option<Duration>) -> String {
    well.map_or_else(|| format!("> {} s", LONGEST.as_secs()), |time| format!("{:.1} s", time.as_secs_f64()))
}

fn print_faults(faults: &[(Fault, Vec<Pair>)]) {
    println!(
        "\nOne of {PODS} pods fails: until all are well again; the median of {ROUNDS}, all of them in parentheses"
    );
    println!("{:<38}{:<30}{:<30}", "", "operator", "liveness probe");
    for (fault, rounds) in faults {
        let [operated, probed] = [0, 1].map(|side| {
            let mut times: Vec<_> = rounds.iter().map(|pair| pair[side].well).collect();
            times.sort_by_key(|time| time.unwrap_or(Duration::MAX));
            let all: Vec<_> = times.iter().map(|time| shown(*time)).collect();
            format!("{} ({})", shown(times[times.len() / 2]), all.join(", "))
        });
        println!("{:<38}{operated:<30}{probed:<30}", fault.in_words());
        let [operated, probed] = [0, 1].map(|side| {
            let sum = |figure: fn(&Outcome) -> usize| rounds.iter().map(|pair| figure(&pair[side])).sum::<usize>();
            done(sum(|outcome| outcome.pods), sum(|outcome| usize::try_from(outcome.containers).unwrap_or(usize::MAX)))
        });
        println!("{:<38}{operated:<30}{probed:<30}", "  and for that, in all");
    }
}

fn done(pods: usize, containers: usize) -> String {
    match (pods, containers) {
        (0, 0) => "nothing restarted".to_owned(),
        (pods, 0) => format!("{pods} pods replaced"),
        (0, containers) => format!("{containers} containers restarted"),
        (pods, containers) => format!("{pods} pods, {containers} containers"),
    }
}

fn print_away(away: &Pair) {
    println!("\nThe database is away for {} s, which no restart helps against", AWAY.as_secs());
    println!("{:<38}{:<30}{:<30}", "", "operator", "liveness probe");
    let [operated, probed] = [0, 1].map(|side| {
        let outcome: &Outcome = &away[side];
        done(outcome.pods, usize::try_from(outcome.containers).unwrap_or(usize::MAX))
    });
    println!("{:<38}{operated:<30}{probed:<30}", "in vain");
    println!("{:<38}{:<30}{:<30}", "all well again, after it was back", shown(away[0].well), shown(away[1].well));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probed_twin_shares_nothing_with_the_original() {
        let deployment = json!({ "spec": { "template": {
            "metadata": { "labels": { "app.kubernetes.io/name": "booking" } },
            "spec": {
                "containers": [{ "env": [{ "name": "WORKLOAD_NAME", "value": "booking" }, { "name": "PORT", "value": "8080" }] }],
                "volumes": [
                    { "name": "resilience-config", "configMap": { "name": "booking-resilience" } },
                    { "name": "resilience-token", "secret": { "secretName": "booking-resilience-token" } },
                    { "name": "database", "secret": { "secretName": "postgres" } },
                ],
            },
        } } });
        let pod = &probed(&deployment)["spec"]["template"];
        assert_eq!(pod["metadata"]["labels"]["app.kubernetes.io/name"], PROBED);
        let text = pod.to_string();
        assert!(!text.contains("\"booking\"") && !text.contains("\"booking-resilience"), "{text}");
        assert_eq!(pod["spec"]["volumes"][2]["secret"]["secretName"], "postgres");
        assert_eq!(pod["spec"]["containers"][0]["env"][1]["value"], "8080");
        assert!(pod["spec"]["containers"][0]["livenessProbe"]["exec"].is_object());
    }

    #[test]
    fn what_was_done_is_said_in_words() {
        assert_eq!(done(0, 0), "nothing restarted");
        assert_eq!(done(2, 0), "2 pods replaced");
        assert_eq!(done(0, 9), "9 containers restarted");
        assert_eq!(shown(None), "> 300 s");
    }
}
