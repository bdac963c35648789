//! Workloads as the API server has them: a Deployment, a ReplicaSet and pods with a status, all without containers.

use super::api::{ApiClient, for_all};
use super::fake_pod::{Behavior, CHECK, FAILURE_THRESHOLD, FakePod};
use super::listener::{FakePods, address_of};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// Pods of the workload that fails as a whole.
pub const CROWD: usize = 200;
/// Pods of the workload that accepts connections and never answers.
pub const SILENT: usize = 400;
/// How often pods are probed, in seconds.
pub const PROBE_SECONDS: u32 = 5;
/// Namespace of the bare writes.
pub const BARE_NAMESPACE: &str = "scale-bare";

/// How many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Policies, each with a workload of its own.
    pub policies: usize,
    /// Pods of each workload.
    pub pods_each: usize,
}

impl Size {
    /// Pods of all workloads that have a policy.
    pub fn pods(self) -> usize {
        self.policies * self.pods_each
    }
}

/// One workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its namespace.
    pub namespace: String,
    /// Its name, and that of its policy.
    pub name: String,
    /// The numbers of its pods.
    pub pods: Range<usize>,
    /// How often its pods are probed.
    pub interval: String,
}

impl Workload {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Path of its policy.
    pub fn policy_path(&self) -> String {
        policy_path(&self.namespace, &self.name)
    }

    /// Its policy. Every other value of `request_ms` is another meaning. Nothing that a default could change is left out.
    pub fn policy(&self, request_ms: u64) -> Value {
        policy(&self.name, &self.interval, request_ms)
    }
}

/// The policies' collection in a namespace.
pub fn policies_path(namespace: &str) -> String {
    format!("/apis/resilience.ticketwave.io/v1alpha1/namespaces/{namespace}/resiliencepolicies")
}

/// One policy.
pub fn policy_path(namespace: &str, name: &str) -> String {
    format!("{}/{name}", policies_path(namespace))
}

/// A policy with one dependency and a ladder that begins with the pods' own action.
pub fn policy(name: &str, interval: &str, request_ms: u64) -> Value {
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1",
        "kind": "ResiliencePolicy",
        "metadata": { "name": name },
        "spec": {
            "targetRefs": [{ "group": "apps", "kind": "Deployment", "name": name }],
            "dependencies": [{
                "name": "database",
                "timeout": { "request": format!("{request_ms}ms"), "perTry": "1s" },
                "retry": {
                    "numRetries": 3,
                    "backOff": { "baseInterval": "200ms", "factor": 2, "maxInterval": "2s", "jitterPercent": 20 },
                    "retryOn": ["Timeout", "ConnectFailure", "Deadlock"],
                },
                "circuitBreaker": { "consecutiveFailures": 5, "breakDuration": "30s" },
            }],
            "healthChecks": [{
                "name": CHECK, "interval": interval,
                "unhealthyThreshold": FAILURE_THRESHOLD, "healthyThreshold": 1,
            }],
            "recovery": {
                "ladders": [{ "check": CHECK, "steps": [
                    { "action": "ResetConnections", "timeout": "15s" },
                    { "action": "RestartPod", "timeout": "60s" },
                ]}],
                // Out of the way: what is measured is how fast an action comes, not what holds it back.
                "limits": {
                    "maxInFlight": 1, "maxUnhealthy": "50%", "cooldown": "1s",
                    "budget": { "actions": 20, "interval": "10m" },
                },
                "healthyDelay": "5s",
            },
        },
    })
}

/// All workloads and their pods.
pub struct Fleet {
    /// The workloads with a policy.
    pub workloads: Vec<Workload>,
    /// A workload of [`CROWD`] pods.
    pub crowd: Workload,
    /// A workload of [`SILENT`] pods that never answer.
    pub silent: Workload,
    /// The pods behind the addresses.
    pub pods: Arc<FakePods>,
    port: u16,
    /// Uids of the ReplicaSets by their workload's key.
    replica_sets: HashMap<String, String>,
}

/// Five workloads share a namespace.
fn layout(size: Size) -> (Vec<Workload>, Workload, Workload) {
    let workload =
        |namespace, name, pods, seconds: u32| Workload { namespace, name, pods, interval: format!("{seconds}s") };
    let namespaces = size.policies.div_ceil(5).max(1);
    let workloads: Vec<_> = (0..size.policies)
        .map(|number| {
            let first = number * size.pods_each;
            let namespace = format!("scale-{}", number % namespaces);
            workload(namespace, format!("svc-{number}"), first..first + size.pods_each, PROBE_SECONDS)
        })
        .collect();
    let [crowd, silent] = [size.pods(), size.pods() + CROWD];
    (
        workloads,
        workload("scale-crowd".to_owned(), "crowd".to_owned(), crowd..crowd + CROWD, PROBE_SECONDS),
        // As often as a policy may reasonably ask: the more unanswered calls are under way, the worse for the others.
        workload("scale-silent".to_owned(), "silent".to_owned(), silent..silent + SILENT, 1),
    )
}

fn pod_name(workload: &Workload, number: usize, generation: u32) -> String {
    let ordinal = number - workload.pods.start;
    if generation == 0 {
        format!("{}-1-{ordinal}", workload.name)
    } else {
        format!("{}-1-{ordinal}-{generation}", workload.name)
    }
}

impl Fleet {
    /// The pods of a fleet, without anything in the API server; [`Fleet::create`] writes it.
    pub fn new(size: Size) -> Self {
        let (workloads, crowd, silent) = layout(size);
        let pods: Vec<FakePod> = workloads
            .iter()
            .chain([&crowd])
            .map(|workload| (workload, Behavior::Healthy))
            .chain([(&silent, Behavior::Silent)])
            .flat_map(|(workload, behavior)| {
                workload.pods.clone().map(move |number| FakePod::new(pod_name(workload, number, 0), behavior))
            })
            .collect();
        Self { workloads, crowd, silent, pods: FakePods::new(pods, size.pods()), port: 0, replica_sets: HashMap::new() }
    }

    /// The workload that pod `number` belongs to.
    pub fn workload_of(&self, number: usize) -> Option<&Workload> {
        let each = self.workloads.first()?.pods.len().max(1);
        self.workloads.get(number / each)
    }

    /// Pods of workloads that have a policy all the time.
    pub fn pod_count(&self) -> usize {
        self.crowd.pods.start
    }

    /// Writes the fleet to the API server; its pods listen at `port`.
    pub async fn create(&mut self, api: &ApiClient, port: u16) -> kube::Result<()> {
        self.port = port;
        let all: Vec<&Workload> = self.workloads.iter().chain([&self.crowd, &self.silent]).collect();
        let mut namespaces: Vec<&str> = all.iter().map(|workload| workload.namespace.as_str()).collect();
        namespaces.push(BARE_NAMESPACE);
        namespaces.sort_unstable();
        namespaces.dedup();
        let namespaces = &namespaces;
        for_all(namespaces.len(), |number| async move {
            let object = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": namespaces[number] } });
            api.create("/api/v1/namespaces", &object).await
        })
        .await?;
        let (fleet, all) = (&*self, &all);
        let sets = for_all(all.len(), |number| fleet.create_workload(api, all[number])).await?;
        self.replica_sets = sets.into_iter().collect();
        let fleet = &*self;
        let pods: Vec<(&Workload, usize)> =
            fleet.all().flat_map(|workload| workload.pods.clone().map(move |number| (workload, number))).collect();
        let pods = &pods;
        for_all(pods.len(), |index| async move {
            let (workload, number) = pods[index];
            fleet.create_pod(api, workload, number, &pod_name(workload, number, 0)).await
        })
        .await?;
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &Workload> {
        self.workloads.iter().chain([&self.crowd, &self.silent])
    }

    /// Makes a Deployment and its ReplicaSet; gives the latter's key and uid.
    async fn create_workload(&self, api: &ApiClient, workload: &Workload) -> kube::Result<(String, String)> {
        let Workload { namespace, name, pods, .. } = workload;
        let count = pods.len();
        let spec = json!({
            "replicas": count,
            "selector": { "matchLabels": { "app": name } },
            "template": { "metadata": { "labels": { "app": name } }, "spec": self.pod_spec() },
        });
        let apps = format!("/apis/apps/v1/namespaces/{namespace}");
        let deployment = json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": name }, "spec": spec,
        });
        let made = api.create(&format!("{apps}/deployments"), &deployment).await?;
        let status = json!({ "status": {
            "observedGeneration": made.metadata.generation,
            "replicas": count, "updatedReplicas": count, "readyReplicas": count, "availableReplicas": count,
        }});
        api.merge(&format!("{apps}/deployments/{name}/status"), &status).await?;
        let set = json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "spec": spec,
            "metadata": {
                "name": format!("{name}-1"), "labels": { "app": name },
                "annotations": { "deployment.kubernetes.io/revision": "1" },
                "ownerReferences": owned_by("Deployment", name, &made.metadata.uid),
            },
        });
        let set = api.create(&format!("{apps}/replicasets"), &set).await?;
        Ok((workload.key(), set.metadata.uid))
    }

    fn pod_spec(&self) -> Value {
        json!({ "containers": [
            { "name": "main", "image": "none", "ports": [{ "name": contract::admin::PORT_NAME, "containerPort": self.port }] },
        ]})
    }

    async fn create_pod(&self, api: &ApiClient, workload: &Workload, number: usize, name: &str) -> kube::Result<()> {
        let Workload { namespace, name: owner, .. } = workload;
        let set_uid = self.replica_sets.get(&workload.key()).map_or("", String::as_str);
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "spec": self.pod_spec(),
            "metadata": {
                "name": name, "labels": { "app": owner },
                "ownerReferences": owned_by("ReplicaSet", &format!("{owner}-1"), set_uid),
            },
        });
        let pods = format!("/api/v1/namespaces/{namespace}/pods");
        api.create(&pods, &pod).await?;
        let ip = address_of(number).map(|address| address.to_string()).unwrap_or_default();
        let status = json!({ "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{ "ip": ip }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        }});
        api.merge(&format!("{pods}/{name}/status"), &status).await?;
        Ok(())
    }

    /// Deletes pod `number` and makes another one at its address, as a rollout would.
    pub async fn replace_pod(&self, api: &ApiClient, number: usize, generation: u32) -> kube::Result<()> {
        let Some(workload) = self.workload_of(number) else { return Ok(()) };
        api.delete(&self.pod_path(number)).await?;
        let name = pod_name(workload, number, generation);
        if let Some(mut pod) = self.pods.pod(number) {
            pod.replace(name.clone());
        }
        self.create_pod(api, workload, number, &name).await
    }

    /// Path of the pod that has this number now.
    pub fn pod_path(&self, number: usize) -> String {
        let namespace = self.workload_of(number).map(|workload| workload.namespace.as_str()).unwrap_or_default();
        let name = self.pods.pod(number).map(|pod| pod.name.clone()).unwrap_or_default();
        format!("/api/v1/namespaces/{namespace}/pods/{name}")
    }
}

fn owned_by(kind: &str, name: &str, uid: &str) -> Value {
    json!([{ "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": uid, "controller": true }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pod_belongs_to_one_workload() {
        let fleet = Fleet::new(Size { policies: 7, pods_each: 3 });
        assert_eq!(fleet.pod_count(), 21);
        assert_eq!(fleet.workload_of(20).unwrap().name, "svc-6");
        assert_eq!(fleet.workload_of(20).unwrap().namespace, "scale-0");
        assert_eq!(fleet.workload_of(21), None, "the crowd has no policy at first");
        let numbers: Vec<usize> = fleet.all().flat_map(|workload| workload.pods.clone()).collect();
        assert_eq!(numbers, (0..21 + CROWD + SILENT).collect::<Vec<_>>());
        assert_eq!(fleet.pods.pod(20).unwrap().name, "svc-6-1-2");
        assert_eq!(fleet.pods.pod(21 + CROWD).unwrap().behavior, Behavior::Silent);
        assert!(fleet.pod_path(20).ends_with("/namespaces/scale-0/pods/svc-6-1-2"));
    }

    #[test]
    fn the_policy_is_one_of_the_api() {
        let fleet = Fleet::new(Size { policies: 1, pods_each: 1 });
        let policy: crds::ResiliencePolicy = serde_json::from_value(fleet.workloads[0].policy(5_001)).unwrap();
        assert_eq!(policy.spec.target_refs[0].name, "svc-0");
    }
}
