//! A process that hangs.

use super::database;
use crate::testbed::{TICKETING, Testbed, TestbedError};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, ResourceExt};
use serde_json::json;
use std::time::Instant;

/// The process of one pod, stopped: it keeps its connections and its memory, and does nothing.
///
/// A container's first process takes no SIGSTOP from inside the container. So the signal comes from a helper pod on the same
/// node that sees all processes of the node; that works on every provider whose admission lets it in.
pub struct StoppedProcess {
    helper: String,
    script: String,
    /// When it was stopped.
    pub since: Instant,
}

impl StoppedProcess {
    /// Stops the process of `pod`.
    pub async fn of(testbed: &Testbed, pod: &str) -> Result<Self, TestbedError> {
        let pods: Api<Pod> = Api::namespaced(testbed.client.clone(), TICKETING);
        let victim = pods.get(pod).await?;
        let node = victim.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
        let mut statuses = victim.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        // "containerd://4f1c…"
        let id = statuses.find_map(|one| one.container_id.as_deref()?.split("//").nth(1));
        let id = id.ok_or_else(|| TestbedError::unexpected("a container that runs", pod))?;
        // Whatever the kubelet makes of cgroups, the name of a container's one has its id.
        let script = format!(
            "found=; for process in /proc/[0-9]*; do \
               if grep -q {id} $process/cgroup 2>/dev/null; then kill -$0 ${{process#/proc/}} && found=1; fi; \
             done; test $found"
        );
        let helper = format!("signals-{}", victim.uid().unwrap_or_default());
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": helper, "namespace": TICKETING },
            "spec": {
                "hostPID": true, "nodeName": node, "restartPolicy": "Never", "activeDeadlineSeconds": 900,
                "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": false,
                "containers": [{
                    "name": "shell", "image": database::image(testbed).await?, "imagePullPolicy": "IfNotPresent",
                    "command": ["sleep", "900"], "securityContext": { "runAsUser": 0 },
                }],
            },
        });
        testbed.kubectl.apply(&manifest.to_string()).await?;
        let wait = format!("wait -n {TICKETING} pod/{helper} --for=condition=Ready --timeout=30s");
        let stopped = Self { helper, script, since: Instant::now() };
        let done = async {
            testbed.kubectl.run(&wait).await?;
            stopped.signal(testbed, "STOP").await
        };
        match done.await {
            Ok(()) => Ok(Self { since: Instant::now(), ..stopped }),
            Err(error) => {
                stopped.remove_helper(testbed).await?;
                Err(error)
            }
        }
    }

    /// Lets it go on. An error if it is gone, as after a restart.
    pub async fn resume(self, testbed: &Testbed) -> Result<(), TestbedError> {
        let resumed = self.signal(testbed, "CONT").await;
        self.remove_helper(testbed).await?;
        resumed
    }

    async fn signal(&self, testbed: &Testbed, signal: &str) -> Result<(), TestbedError> {
        let words = ["exec", "-n", TICKETING, &self.helper, "--", "sh", "-c", &self.script, signal];
        Ok(testbed.kubectl.args(&words).await.map(drop)?)
    }

    async fn remove_helper(&self, testbed: &Testbed) -> Result<(), TestbedError> {
        let words = format!("delete pod -n {TICKETING} {} --ignore-not-found --wait=false", self.helper);
        Ok(testbed.kubectl.run(&words).await.map(drop)?)
    }
}
