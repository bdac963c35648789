//! One test's part of the cluster: its namespace, the operator's home, and what is in them.

use super::{
    cluster::{self, Cluster, apply, object},
    eventually,
    operator::Operator,
    wait::within,
};
use contract::RuntimeConfig;
use crds::{Condition, FeatureFlag, Recovery, ResiliencePolicy, status::ActionRecord};
pub use e2e::testbed::phase;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, ServiceAccount},
    events::v1::Event,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// A namespace with an operator's home beside it.
pub struct World {
    pub cluster: Arc<Cluster>,
    pub client: Client,
    pub namespace: String,
    /// Namespace of the operator itself.
    pub home: String,
    /// Namespace that the operator watches; empty: every namespace.
    pub watched: String,
    /// Token of the operator's service account.
    token: String,
}

impl World {
    /// A world of its own on the shared API server.
    pub async fn new() -> Self {
        Self::on(cluster::shared().await).await
    }

    /// A world on `cluster`.
    pub async fn on(cluster: Arc<Cluster>) -> Self {
        Self::with_rights(cluster, true).await
    }

    /// A world on `cluster` in which the operator may look after every namespace.
    pub async fn watched_from_everywhere(cluster: Arc<Cluster>) -> Self {
        Self::with_rights(cluster, false).await
    }

    async fn with_rights(cluster: Arc<Cluster>, this_namespace_only: bool) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let (namespace, home) = (format!("tickets-{number}"), format!("operator-{number}"));
        let client = Client::try_from(cluster.config("admin").await).unwrap();
        for name in [&namespace, &home] {
            let manifest = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } });
            apply(&client, "", &manifest).await.unwrap();
        }
        let watched = if this_namespace_only { namespace.clone() } else { String::new() };
        for right in cluster.rights(&home, &watched).await {
            let namespace = right["metadata"]["namespace"].as_str().unwrap_or_default();
            apply(&client, namespace, &right).await.unwrap();
        }
        let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &home);
        let request = TokenRequest { spec: Some(TokenRequestSpec::default()), ..TokenRequest::default() };
        let issued = accounts.create_token_request(&home, &PostParams::default(), &request).await.unwrap();
        let token = issued.status.unwrap().token.unwrap();
        Self { cluster, client, namespace, home, watched, token }
    }

    /// How the operator connects: with a token of its service account, which may do what the chart allows it.
    pub async fn operator_config(&self) -> Config {
        self.cluster.config_with("operator", &self.token).await
    }

    /// The same as a kubeconfig, for an operator in a process of its own.
    pub fn operator_kubeconfig(&self) -> Value {
        self.cluster.kubeconfig("operator", &self.token)
    }

    /// This namespace as another release of the operator sees it: one with a home of its own, whose rights are for every
    /// namespace, and which is told to watch this one.
    pub async fn for_another_release(&self) -> Self {
        let other = Self::watched_from_everywhere(Arc::clone(&self.cluster)).await;
        Self { namespace: self.namespace.clone(), watched: self.namespace.clone(), ..other }
    }

    /// Starts an operator.
    pub async fn operator(&self) -> Operator {
        Operator::start(self, &[]).await
    }

    /// Objects of a built-in type in this namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies a manifest strictly.
    pub async fn apply(&self, manifest: &Value) -> Value {
        self.try_apply(manifest).await.unwrap_or_else(|error| panic!("{manifest} was refused: {error}"))
    }

    /// Applies a manifest strictly; the API server may refuse it.
    pub async fn try_apply(&self, manifest: &Value) -> kube::Result<Value> {
        apply(&self.client, &self.namespace, manifest).await.map(|object| serde_json::to_value(object).unwrap())
    }

    /// Patches an object as a person with an editor would.
    pub async fn edit<K>(&self, name: &str, change: Value)
    where
        K: kube::Resource<Scope = kube::core::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api: Api<K> = self.api();
        api.patch(name, &PatchParams::default(), &Patch::Merge(&change)).await.unwrap();
    }

    /// Deletes what a manifest made, and waits until it is gone.
    pub async fn delete(&self, manifest: &Value) {
        let api = object(&self.client, &self.namespace, manifest);
        let name = manifest["metadata"]["name"].as_str().unwrap();
        api.delete(name, &DeleteParams::default()).await.unwrap();
        eventually("it is gone", async || match api.get_opt(name).await.unwrap() {
            None => Ok(()),
            Some(_) => Err(name.to_owned()),
        })
        .await;
    }

    /// A policy as it is now.
    pub async fn policy(&self, name: &str) -> ResiliencePolicy {
        self.api::<ResiliencePolicy>().get(name).await.unwrap()
    }

    /// Waits until the status of a policy is about its present generation and `wanted` holds.
    pub async fn until_policy(
        &self,
        name: &str,
        what: &str,
        wanted: impl Fn(&ResiliencePolicy) -> bool,
    ) -> ResiliencePolicy {
        eventually(what, async || {
            let policy = self.policy(name).await;
            let status = policy.status.clone().unwrap_or_default();
            if status.observed_generation == policy.metadata.generation && wanted(&policy) {
                return Ok(policy);
            }
            Err(serde_json::to_string(&status).unwrap())
        })
        .await
    }

    /// Waits until a policy has a condition, about its present generation.
    pub async fn until_policy_says(&self, name: &str, type_: &str, status: &str, reason: &str) -> ResiliencePolicy {
        let what = format!("{name} says {type_}={status}/{reason}");
        self.until_policy(name, &what, |policy| says(policy_conditions(policy), type_, status, reason)).await
    }

    /// The Recoveries, the one that was begun last first.
    pub async fn recoveries(&self) -> Vec<Recovery> {
        let mut all = self.api::<Recovery>().list(&ListParams::default()).await.unwrap().items;
        let begun =
            |one: &Recovery| one.spec.decided_at.as_ref().map(|at| at.0).or_else(|| Some(one.creation_timestamp()?.0));
        all.sort_by_key(|one| std::cmp::Reverse(begun(one)));
        all
    }

    /// Waits until the Recoveries are as `wanted`, the one that was begun last first.
    pub async fn until_recoveries(&self, what: &str, wanted: impl Fn(&[Recovery]) -> bool) -> Vec<Recovery> {
        eventually(what, async || {
            let all = self.recoveries().await;
            if wanted(&all) { Ok(all) } else { Err(serde_json::to_string(&all).unwrap()) }
        })
        .await
    }

    /// Waits until a flag set has a condition, about its present generation.
    pub async fn until_flags_say(&self, name: &str, type_: &str, status: &str, reason: &str) -> FeatureFlag {
        eventually(&format!("{name} says {type_}={status}/{reason}"), async || {
            let set = self.api::<FeatureFlag>().get(name).await.unwrap();
            let now = set.status.clone().unwrap_or_default();
            if now.observed_generation == set.metadata.generation && says(&now.conditions, type_, status, reason) {
                return Ok(set);
            }
            Err(serde_json::to_string(&now).unwrap())
        })
        .await
    }

    /// The ConfigMap of a workload, if there is one.
    pub async fn config_map(&self, workload: &str) -> Option<ConfigMap> {
        self.api::<ConfigMap>()
            .get_opt(&contract::config_map_name(contract::WorkloadKind::Deployment, workload))
            .await
            .unwrap()
    }

    /// The document that is published for a workload.
    pub async fn document(&self, workload: &str) -> RuntimeConfig {
        self.until_document(workload, "a document is published", |_| true).await
    }

    /// Waits until the published document is sound and `wanted` holds.
    pub async fn until_document(
        &self,
        workload: &str,
        what: &str,
        wanted: impl Fn(&RuntimeConfig) -> bool,
    ) -> RuntimeConfig {
        within(Duration::from_secs(45), what, async || {
            let map = self.config_map(workload).await.ok_or("no ConfigMap")?;
            let text = map.data.and_then(|mut data| data.remove(contract::CONFIG_KEY)).ok_or("no document")?;
            let (document, _) = RuntimeConfig::parse(text.as_bytes()).map_err(|error| error.to_string())?;
            if wanted(&document) { Ok(document) } else { Err(text.chars().take(1000).collect()) }
        })
        .await
    }

    /// Reasons of the Events about an object, oldest first.
    pub async fn events_about(&self, name: &str) -> Vec<String> {
        let mut all = self.api::<Event>().list(&ListParams::default()).await.unwrap().items;
        all.retain(|event| event.regarding.as_ref().is_some_and(|about| about.name.as_deref() == Some(name)));
        all.sort_by_key(|event| (event.event_time.clone().map(|time| time.0), event.name_any()));
        all.into_iter().filter_map(|event| event.reason).collect()
    }

    /// Waits until all of these Events about an object were published.
    pub async fn until_events(&self, name: &str, reasons: &[&str]) {
        eventually(&format!("Events {reasons:?} about {name}"), async || {
            let published = self.events_about(name).await;
            if reasons.iter().all(|reason| published.iter().any(|one| one == reason)) {
                return Ok(());
            }
            Err(format!("{published:?}"))
        })
        .await;
    }
}

/// The step and the phase of each.
pub fn steps_and_phases(all: &[Recovery]) -> Vec<(&str, &str)> {
    all.iter().map(|one| (one.spec.step.as_str(), phase(one))).collect()
}

/// What a Recovery says of itself.
pub fn message(recovery: &Recovery) -> &str {
    recovery.status.as_ref().and_then(|status| status.message.as_deref()).unwrap_or_default()
}

/// What a policy says was over last.
pub fn last(policy: &ResiliencePolicy) -> Option<&ActionRecord> {
    policy.status.as_ref()?.recovery.as_ref()?.last.as_ref()
}

/// The conditions of a policy.
pub fn policy_conditions(policy: &ResiliencePolicy) -> &[Condition] {
    policy.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default()
}

/// A condition of a policy.
pub fn condition<'a>(policy: &'a ResiliencePolicy, type_: &str) -> &'a Condition {
    policy_conditions(policy).iter().find(|one| one.type_ == type_).unwrap_or_else(|| panic!("no condition {type_}"))
}

/// Whether the conditions hold this one; an empty reason is any.
pub fn says(conditions: &[Condition], type_: &str, status: &str, reason: &str) -> bool {
    conditions.iter().any(|one| {
        one.type_ == type_ && format!("{:?}", one.status) == status && (reason.is_empty() || one.reason == reason)
    })
}

/// The total time of the dependency `database` in a document, in milliseconds.
pub fn request_ms(document: &RuntimeConfig) -> Option<u64> {
    document.policy.settings.dependencies.get("database").map(|dependency| dependency.timeout.request_ms)
}
