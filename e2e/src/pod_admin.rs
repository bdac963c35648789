//! The admin ports of pods, asked through the API server, so that it works on every provider.

use crate::testbed::{TICKETING, Testbed, TestbedError};
use contract::{Applied, HealthReport, admin};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde::de::DeserializeOwned;

/// The admin ports of some pods of one workload.
pub struct PodAdmin {
    client: kube::Client,
    /// Names of the pods.
    pub names: Vec<String>,
    token: String,
}

impl PodAdmin {
    /// The booking pods and the token that they take.
    pub async fn find(testbed: &Testbed) -> Result<Self, TestbedError> {
        let names = testbed.booking_pods().await?.into_iter().filter_map(|pod| pod.metadata.name).collect();
        Self::of(testbed, &contract::token_secret_name(contract::WorkloadKind::Deployment, "booking"), names).await
    }

    /// The pods of these names, which take the token in this Secret.
    pub async fn of(testbed: &Testbed, token_secret: &str, names: Vec<String>) -> Result<Self, TestbedError> {
        let secrets: Api<Secret> = Api::namespaced(testbed.client.clone(), TICKETING);
        let secret = secrets.get(token_secret).await?;
        let token = secret.data.as_ref().and_then(|data| data.get(admin::TOKEN_KEYS[0]));
        let token = token.map(|value| String::from_utf8_lossy(&value.0).into_owned()).unwrap_or_default();
        Ok(Self { client: testbed.client.clone(), names, token })
    }

    async fn ask<T: DeserializeOwned>(&self, pod: &str, path: &str) -> Result<T, TestbedError> {
        let path = format!("/api/v1/namespaces/{TICKETING}/pods/{pod}:{}/proxy{path}", admin::DEFAULT_PORT);
        let request = http::Request::get(path).header(admin::TOKEN_HEADER, &self.token).body(Vec::new());
        let request = request.map_err(|error| TestbedError::unexpected("a request", &error.to_string()))?;
        Ok(self.client.request(request).await?)
    }

    /// The health report of a pod, from its public port: that asks for no token, and the report is the same.
    pub async fn health(&self, pod: &str) -> Result<HealthReport, TestbedError> {
        let path = format!("/api/v1/namespaces/{TICKETING}/pods/{pod}:8080/proxy/health");
        let request = http::Request::get(path).body(Vec::new());
        let request = request.map_err(|error| TestbedError::unexpected("a request", &error.to_string()))?;
        Ok(self.client.request(request).await?)
    }

    /// When each pod took a revision; an error while some have not.
    pub async fn applied(&self, revision: i64) -> Result<Vec<Applied>, TestbedError> {
        let ask = |pod: String| async move {
            let history: Vec<Applied> = self.ask(&pod, admin::APPLIED_PATH).await?;
            let found = history.into_iter().find(|applied| applied.revision == revision);
            found.ok_or_else(|| TestbedError::unexpected("the revision", &format!("{pod} does not run it yet")))
        };
        futures::future::try_join_all(self.names.iter().cloned().map(ask)).await
    }
}
