//! The admin ports of the booking pods, asked through the API server, so that it works on every provider.

use crate::stage::{Stage, StageError, TICKETING};
use contract::{Applied, HealthReport, admin};
use k8s_openapi::api::core::v1::Secret;
use kube::Api;
use serde::de::DeserializeOwned;

/// The admin ports of all booking pods.
pub struct PodAdmin {
    client: kube::Client,
    /// Names of the pods.
    pub names: Vec<String>,
    token: String,
}

impl PodAdmin {
    /// Finds the pods and the token that they take.
    pub async fn find(stage: &Stage) -> Result<Self, StageError> {
        let secrets: Api<Secret> = Api::namespaced(stage.client.clone(), TICKETING);
        let secret = secrets.get(&contract::token_secret_name(contract::WorkloadKind::Deployment, "booking")).await?;
        let token = secret.data.as_ref().and_then(|data| data.get(admin::TOKEN_KEYS[0]));
        let token = token.map(|value| String::from_utf8_lossy(&value.0).into_owned()).unwrap_or_default();
        let names = stage.booking_pods().await?.into_iter().filter_map(|pod| pod.metadata.name).collect();
        Ok(Self { client: stage.client.clone(), names, token })
    }

    async fn ask<T: DeserializeOwned>(&self, pod: &str, path: &str) -> Result<T, StageError> {
        let path = format!("/api/v1/namespaces/{TICKETING}/pods/{pod}:{}/proxy{path}", admin::DEFAULT_PORT);
        let request = http::Request::get(path).header(admin::TOKEN_HEADER, &self.token).body(Vec::new());
        let request = request.map_err(|error| StageError::unexpected("a request", &error.to_string()))?;
        Ok(self.client.request(request).await?)
    }

    /// The health report of a pod.
    pub async fn health(&self, pod: &str) -> Result<HealthReport, StageError> {
        self.ask(pod, admin::HEALTH_PATH).await
    }

    /// When each pod took a revision; an error while some have not.
    pub async fn applied(&self, revision: i64) -> Result<Vec<Applied>, StageError> {
        let ask = |pod: String| async move {
            let history: Vec<Applied> = self.ask(&pod, admin::APPLIED_PATH).await?;
            let found = history.into_iter().find(|applied| applied.revision == revision);
            found.ok_or_else(|| StageError::unexpected("the revision", &format!("{pod} does not run it yet")))
        };
        futures::future::try_join_all(self.names.iter().cloned().map(ask)).await
    }
}
