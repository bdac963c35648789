//! What pods say of themselves, asked through the API server, so that it works on every provider.

use crate::testbed::{TICKETING, Testbed, TestbedError};
use contract::{
    Applied, HealthReport, WorkloadKind,
    admin::{self, MemoryFault},
    signing::{ContentHash, Signed},
};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::Api;
use serde::de::DeserializeOwned;

/// Port on which a pod serves its workload's callers, and its health report to everybody.
const PUBLIC_PORT: u16 = 8080;

/// Some pods of one workload.
pub struct PodAdmin {
    client: kube::Client,
    /// Names of the pods.
    pub names: Vec<String>,
    token: Vec<u8>,
}

impl PodAdmin {
    /// The booking pods and the token that they take.
    pub async fn find(testbed: &Testbed) -> Result<Self, TestbedError> {
        let names = testbed.booking_pods().await?.into_iter().filter_map(|pod| pod.metadata.name).collect();
        Self::of(testbed, WorkloadKind::Deployment, "booking", names).await
    }

    /// The pods of these names, which belong to one workload.
    pub async fn of(
        testbed: &Testbed,
        kind: WorkloadKind,
        workload: &str,
        names: Vec<String>,
    ) -> Result<Self, TestbedError> {
        let secrets: Api<Secret> = Api::namespaced(testbed.client.clone(), TICKETING);
        let secret = secrets.get(&contract::token_secret_name(kind, workload)).await?;
        let token = secret.data.and_then(|mut data| data.remove(admin::TOKEN_KEYS[0])).unwrap_or_default();
        Ok(Self { client: testbed.through.clone(), names, token: token.0 })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        request: http::request::Builder,
        body: Vec<u8>,
    ) -> Result<T, TestbedError> {
        let request = request.body(body);
        let request = request.map_err(|error| TestbedError::unexpected("a request", &error.to_string()))?;
        Ok(self.client.request(request).await?)
    }

    /// A call of a pod's admin port.
    async fn call<T: DeserializeOwned>(
        &self,
        method: http::Method,
        pod: &str,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, TestbedError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), TICKETING);
        let uid = pods.get(pod).await?.metadata.uid.unwrap_or_default();
        let signed = Signed {
            method: method.as_str(),
            path,
            time_ms: jiff::Timestamp::now().as_millisecond(),
            audience: &uid,
            content: ContentHash::of(&body),
        };
        let mut request = http::Request::builder().method(&method).uri(uri(pod, admin::DEFAULT_PORT, path));
        for (name, value) in signed.headers(&self.token) {
            request = request.header(name, value);
        }
        self.ask(request, body).await
    }

    /// The health report of a pod. Its public port has it too, where pods of every version answer without a token.
    pub async fn health(&self, pod: &str) -> Result<HealthReport, TestbedError> {
        self.ask(http::Request::get(uri(pod, PUBLIC_PORT, admin::HEALTH_PATH)), Vec::new()).await
    }

    /// Has the process of a pod hold memory that it does not need, as one that leaks does; it must have been started with
    /// faults allowed.
    pub async fn fill_memory(&self, pod: &str, fault: MemoryFault) -> Result<(), TestbedError> {
        let body = serde_json::to_vec(&fault).unwrap_or_default();
        let held: MemoryFault = self.call(http::Method::PUT, pod, admin::MEMORY_FAULT_PATH, body).await?;
        if held == fault { Ok(()) } else { Err(TestbedError::unexpected(&format!("{fault:?}"), &format!("{held:?}"))) }
    }

    /// When each pod took a revision; an error while some have not.
    pub async fn applied(&self, revision: i64) -> Result<Vec<Applied>, TestbedError> {
        let ask = |name: String| async move {
            let history: Vec<Applied> = self.call(http::Method::GET, &name, admin::APPLIED_PATH, Vec::new()).await?;
            let found = history.into_iter().find(|applied| applied.revision == revision);
            found.ok_or_else(|| TestbedError::unexpected("the revision", &format!("{name} does not run it yet")))
        };
        futures::future::try_join_all(self.names.iter().cloned().map(ask)).await
    }
}

fn uri(pod: &str, port: u16, path: &str) -> String {
    format!("/api/v1/namespaces/{TICKETING}/pods/{pod}:{port}/proxy{path}")
}
