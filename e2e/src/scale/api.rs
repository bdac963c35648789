//! Calls of the API server, as plain JSON: typed objects would cost the tool more than the calls do.

use super::ScaleError;
use futures::{StreamExt, TryStreamExt};
use kube::{Client, Config, config::KubeConfigOptions, config::Kubeconfig};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use std::path::Path;

/// Calls under way at once when many objects are written.
pub const WORKERS: usize = 16;
/// Owner of the fields that the tool applies.
const MANAGER: &str = "scale";

/// What is read of an answer.
#[derive(Clone, Debug, Deserialize)]
pub struct Object {
    /// Its metadata.
    pub metadata: Meta,
}

/// What is read of an object's metadata.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Uid.
    pub uid: String,
    /// Generation of the spec.
    pub generation: i64,
}

/// One user's way to the API server.
#[derive(Clone)]
pub struct ApiClient {
    /// The client behind it.
    pub client: Client,
}

impl ApiClient {
    /// Connects by a kubeconfig.
    pub async fn new(kubeconfig: &Path) -> Result<Self, ScaleError> {
        let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        Ok(Self { client: Client::try_from(config)? })
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: Option<&Value>,
    ) -> kube::Result<T> {
        let body = body.map(Value::to_string).unwrap_or_default().into_bytes();
        let request = http::Request::builder().method(method).uri(path).header(http::header::CONTENT_TYPE, kind);
        self.client.request(request.body(body).map_err(kube::Error::HttpError)?).await
    }

    /// Reads.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> kube::Result<T> {
        self.call("GET", path, "application/json", None).await
    }

    /// Makes an object.
    pub async fn create(&self, path: &str, object: &Value) -> kube::Result<Object> {
        self.call("POST", path, "application/json", Some(object)).await
    }

    /// Changes the fields that `patch` names.
    pub async fn merge(&self, path: &str, patch: &Value) -> kube::Result<Object> {
        self.call("PATCH", path, "application/merge-patch+json", Some(patch)).await
    }

    /// Applies as `kubectl apply --server-side` does.
    pub async fn apply(&self, path: &str, object: &Value) -> kube::Result<Object> {
        let path = format!("{path}?fieldManager={MANAGER}&force=true");
        self.call("PATCH", &path, "application/apply-patch+yaml", Some(object)).await
    }

    /// Deletes at once, an object or a collection; fine if it is gone.
    pub async fn delete(&self, path: &str) -> kube::Result<()> {
        let options = serde_json::json!({ "gracePeriodSeconds": 0, "propagationPolicy": "Background" });
        match self.call::<Value>("DELETE", path, "application/json", Some(&options)).await {
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            other => other.map(drop),
        }
    }
}

/// Does `each` for 0 to `count` - 1, [`WORKERS`] at once, and ends with the first error.
pub async fn for_all<F, Fut, T>(count: usize, each: F) -> kube::Result<Vec<T>>
where
    F: FnMut(usize) -> Fut,
    Fut: Future<Output = kube::Result<T>>,
{
    futures::stream::iter((0..count).map(each)).buffered(WORKERS).try_collect().await
}

/// The same, but begins at most `per_second` of them in a second.
pub async fn at_rate<F, Fut, T>(count: usize, per_second: u32, mut each: F) -> kube::Result<Vec<T>>
where
    F: FnMut(usize) -> Fut,
    Fut: Future<Output = kube::Result<T>>,
{
    let begin = tokio::time::Instant::now();
    for_all(count, |number| {
        let due = begin + std::time::Duration::from_secs(1) / per_second * u32::try_from(number).unwrap_or(u32::MAX);
        let work = each(number);
        async move {
            tokio::time::sleep_until(due).await;
            work.await
        }
    })
    .await
}
