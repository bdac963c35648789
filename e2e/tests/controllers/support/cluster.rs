//! The API server that all tests share while at least one of them runs.

use e2e::{
    apiserver::TestApiServer,
    binaries::{Binaries, Tool},
    checkout,
    command::Run,
    progress::Progress,
};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use std::{
    path::PathBuf,
    sync::{Arc, Weak},
};
use tokio::sync::Mutex;

/// An API server with our definitions.
pub struct Cluster {
    pub server: TestApiServer,
    helm: PathBuf,
}

/// Weak, so that the last test that ends takes the server and its files with it.
static SHARED: Mutex<Weak<Cluster>> = Mutex::const_new(Weak::new());

/// The shared API server; the first to ask starts it.
pub async fn shared() -> Arc<Cluster> {
    let mut shared = SHARED.lock().await;
    if let Some(running) = shared.upgrade() {
        return running;
    }
    let started = Arc::new(Cluster::start().await);
    *shared = Arc::downgrade(&started);
    started
}

impl Cluster {
    /// Starts one and installs the definitions that are made from the types.
    pub async fn start() -> Self {
        let cluster = Self::without_definitions().await;
        let definitions = crds::manifests::definitions().map(|crd| serde_json::to_value(crd).unwrap());
        cluster.define(&definitions).await;
        cluster
    }

    /// Starts one on which a test installs definitions of its own.
    pub async fn without_definitions() -> Self {
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into());
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let helm = Binaries::new(Progress::quiet()).path(Tool::Helm).await.unwrap();
        Self { server: TestApiServer::start().await.unwrap(), helm }
    }

    /// Installs definitions and waits until they are served.
    pub async fn define(&self, definitions: &[Value]) {
        let client = Client::try_from(self.config("admin").await).unwrap();
        for definition in definitions {
            apply(&client, "", definition).await.unwrap();
            let name = definition["metadata"]["name"].as_str().unwrap();
            super::eventually("the definition is served", async || {
                let found = object(&client, "", definition).get(name).await.map_err(|error| error.to_string())?;
                let established = found.data["status"]["conditions"].as_array().is_some_and(|all| {
                    all.iter().any(|condition| condition["type"] == "Established" && condition["status"] == "True")
                });
                if established { Ok(()) } else { Err(found.data["status"].to_string()) }
            })
            .await;
        }
    }

    /// How `user` connects.
    pub async fn config(&self, user: &str) -> Config {
        let token = if user == "admin" { Some(self.server.token()) } else { self.server.user_token(user) };
        self.config_with(user, token.unwrap()).await
    }

    /// How the owner of `token` connects.
    pub async fn config_with(&self, user: &str, token: &str) -> Config {
        let kubeconfig = Kubeconfig::from_yaml(&self.kubeconfig(user, token).to_string()).unwrap();
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap()
    }

    /// The kubeconfig of the owner of `token`.
    pub fn kubeconfig(&self, user: &str, token: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": {
                "server": self.server.url(),
                "certificate-authority": self.server.kubeconfig().with_file_name("ca.crt"),
            }}],
            "users": [{ "name": user, "user": { "token": token } }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": user } }],
            "current-context": "test",
        })
    }

    /// What the chart installs but for the Deployment and what it needs: service account, rights and admission policies
    /// of an operator that lives in `home` and watches `watched` (empty: every namespace). All of it is named `home`, so
    /// that many fit into one cluster.
    pub async fn rights(&self, home: &str, watched: &str) -> Vec<Value> {
        let chart = checkout::root().join("charts/resilience-operator");
        let name = format!("fullnameOverride={home}");
        let run = Run::new(&self.helm).words("template resilience-operator").arg(chart);
        // A CronJob that is listed need not be in every namespace.
        let listed = "admissionPolicy.cronJobs={booking-cleanup,refunds-cleanup}";
        let run = run.args(["--namespace", home, "--set", &name, "--set", listed]);
        let run = if watched.is_empty() { run } else { run.args(["--set", &format!("watchNamespaces={{{watched}}}")]) };
        let text = run.output().await.unwrap();
        let documents = text.split("\n---").filter_map(|document| serde_saphyr::from_str::<Value>(document).ok());
        let rights: Vec<_> = documents
            .filter(|document| {
                let group = document["apiVersion"].as_str().unwrap_or_default();
                // What people get by the built-in roles is no right of the operator.
                let labels = &document["metadata"]["labels"];
                if !labels["rbac.authorization.k8s.io/aggregate-to-admin"].is_null() {
                    return false;
                }
                group.starts_with("rbac.authorization.k8s.io/")
                    || group.starts_with("admissionregistration.k8s.io/")
                    || document["kind"] == "ServiceAccount"
            })
            .collect();
        let count = |kind: &str| rights.iter().filter(|one| one["kind"].as_str().unwrap().ends_with(kind)).count();
        assert_eq!((count("Role"), count("RoleBinding")), (2, 2), "at home, and the same for what is watched");
        let policies = count("ValidatingAdmissionPolicy");
        assert!(policies > 0 && policies == count("ValidatingAdmissionPolicyBinding"), "{policies}");
        rights
    }

    /// What the chart lets an operator that lives in `home` do besides, if it serves OFREP.
    pub async fn ofrep_rights(&self, home: &str) -> Vec<Value> {
        self.review_rights(home, "ofrep.enabled=true", "ofrep").await
    }

    /// The same, if it serves `flagd.sync.v1`.
    pub async fn flag_sync_rights(&self, home: &str) -> Vec<Value> {
        self.review_rights(home, "flagSync.enabled=true", "flag-sync").await
    }

    async fn review_rights(&self, home: &str, set: &str, template: &str) -> Vec<Value> {
        let chart = checkout::root().join("charts/resilience-operator");
        let run = Run::new(&self.helm).words("template resilience-operator").arg(chart);
        let run = run.args(["--namespace", home, "--set", &format!("fullnameOverride={home},{set}")]);
        let text = run.words(&format!("--show-only templates/{template}.yaml")).output().await.unwrap();
        let documents = text.split("\n---").filter_map(|document| serde_saphyr::from_str::<Value>(document).ok());
        documents.filter(|document| document["kind"].as_str().unwrap_or_default().starts_with("ClusterRole")).collect()
    }
}

/// The API of whatever `manifest` is.
pub fn object(client: &Client, namespace: &str, manifest: &Value) -> Api<DynamicObject> {
    let text = |field: &str| manifest[field].as_str().unwrap_or_else(|| panic!("no {field} in {manifest}"));
    let (group, version) = text("apiVersion").split_once('/').unwrap_or(("", text("apiVersion")));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("kind")));
    if namespace.is_empty() {
        Api::all_with(client.clone(), &resource)
    } else {
        Api::namespaced_with(client.clone(), namespace, &resource)
    }
}

/// Applies a manifest as a strict `kubectl apply --server-side` does.
pub async fn apply(client: &Client, namespace: &str, manifest: &Value) -> kube::Result<DynamicObject> {
    let name = manifest["metadata"]["name"].as_str().unwrap_or_default();
    let how = PatchParams::apply("test").force().validation_strict();
    object(client, namespace, manifest).patch(name, &how, &Patch::Apply(manifest)).await
}
