//! What pods say of themselves, asked through the API server, so that it works on every provider.

use crate::testbed::{TICKETING, Testbed, TestbedError};
use contract::{
    Applied, HealthReport, WorkloadKind, admin,
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
        Ok(Self { client: testbed.client.clone(), names, token: token.0 })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        pod: &str,
        port: u16,
        path: &str,
        headers: &[(&'static str, String)],
    ) -> Result<T, TestbedError> {
        let mut request = http::Request::get(format!("/api/v1/namespaces/{TICKETING}/pods/{pod}:{port}/proxy{path}"));
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.body(Vec::new());
        let request = request.map_err(|error| TestbedError::unexpected("a request", &error.to_string()))?;
        Ok(self.client.request(request).await?)
    }

    /// The health report of a pod. Its public port has it too, where pods of every version answer without a token.
    pub async fn health(&self, pod: &str) -> Result<HealthReport, TestbedError> {
        self.ask(pod, PUBLIC_PORT, admin::HEALTH_PATH, &[]).await
    }

    /// When each pod took a revision; an error while some have not.
    pub async fn applied(&self, revision: i64) -> Result<Vec<Applied>, TestbedError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), TICKETING);
        let ask = |name: String| {
            let pods = pods.clone();
            async move {
                let uid = pods.get(&name).await?.metadata.uid.unwrap_or_default();
                let signed = Signed {
                    method: "GET",
                    path: admin::APPLIED_PATH,
                    time_ms: jiff::Timestamp::now().as_millisecond(),
                    audience: &uid,
                    content: ContentHash::of(&[]),
                };
                let headers = signed.headers(&self.token);
                let history: Vec<Applied> = self.ask(&name, admin::DEFAULT_PORT, admin::APPLIED_PATH, &headers).await?;
                let found = history.into_iter().find(|applied| applied.revision == revision);
                found.ok_or_else(|| TestbedError::unexpected("the revision", &format!("{name} does not run it yet")))
            }
        };
        futures::future::try_join_all(self.names.iter().cloned().map(ask)).await
    }
}
