//! A Deployment, its ReplicaSet and its pods, or a StatefulSet and its pods: what the controllers of a whole cluster would have made.

use super::{FakePod, World, fake_pod::Blueprint};
use contract::WorkloadKind;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use kube::{
    ResourceExt,
    api::{DeleteParams, Patch, PatchParams, PostParams, PropagationPolicy},
};
use serde_json::{Value, json};

/// A workload.
pub struct Workload {
    pub name: String,
    pub uid: String,
    set_name: String,
    set_uid: String,
    pub pods: Vec<FakePod>,
}

/// A StatefulSet.
pub struct Ordinals {
    pub name: String,
    pub uid: String,
    pub pods: Vec<FakePod>,
}

/// The owner reference of a controller.
pub fn owned_by(kind: &str, name: &str, uid: &str) -> Value {
    json!([{ "apiVersion": "apps/v1", "kind": kind, "name": name, "uid": uid, "controller": true }])
}

impl World {
    /// A workload of `count` fake pods that are ready and answer correctly.
    pub async fn workload(&self, name: &str, count: usize) -> Workload {
        let template = json!({
            "metadata": { "labels": { "app": name } },
            "spec": { "containers": [{ "name": "main", "image": "none" }] },
        });
        let spec = json!({ "replicas": count, "selector": { "matchLabels": { "app": name } }, "template": template });
        let deployment =
            json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": name }, "spec": spec });
        let made: Deployment =
            self.api().create(&PostParams::default(), &serde_json::from_value(deployment).unwrap()).await.unwrap();
        let uid = made.uid().unwrap();
        let status = json!({ "status": {
            "observedGeneration": made.metadata.generation,
            "replicas": count, "updatedReplicas": count, "readyReplicas": count,
        }});
        let how = PatchParams::default();
        self.api::<Deployment>().patch_status(name, &how, &Patch::Merge(&status)).await.unwrap();

        let set_name = format!("{name}-1");
        let set = json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet",
            "metadata": { "name": set_name, "ownerReferences": owned_by("Deployment", name, &uid) },
            "spec": spec,
        });
        let set: ReplicaSet =
            self.api().create(&PostParams::default(), &serde_json::from_value(set).unwrap()).await.unwrap();
        let set_uid = set.uid().unwrap();
        let mut workload = Workload { name: name.to_owned(), uid, set_name, set_uid, pods: Vec::new() };
        for _ in 0..count {
            let pod = workload.new_pod(self, true).await;
            workload.pods.push(pod);
        }
        workload
    }
}

impl World {
    /// A StatefulSet of `count` fake pods that are ready and answer correctly, with this update strategy.
    pub async fn stateful_set(&self, name: &str, count: usize, strategy: Value) -> Ordinals {
        let set = json!({
            "apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": { "name": name },
            "spec": {
                "replicas": count,
                "serviceName": name,
                "selector": { "matchLabels": { "app": name } },
                "template": {
                    "metadata": { "labels": { "app": name } },
                    "spec": { "containers": [{ "name": "main", "image": "none" }] },
                },
                "updateStrategy": strategy,
            },
        });
        let made: StatefulSet =
            self.api().create(&PostParams::default(), &serde_json::from_value(set).unwrap()).await.unwrap();
        let mut set = Ordinals { name: name.to_owned(), uid: made.uid().unwrap(), pods: Vec::new() };
        set.has_updated(self, count, count).await;
        for ordinal in 0..count {
            let pod = set.new_pod(self, ordinal).await;
            set.pods.push(pod);
        }
        set
    }
}

impl Ordinals {
    /// The pod of an ordinal, as its controller makes it: a successor has its predecessor's name.
    pub async fn new_pod(&self, world: &World, ordinal: usize) -> FakePod {
        let owners = owned_by("StatefulSet", &self.name, &self.uid);
        let name = Some(format!("{}-{ordinal}", self.name));
        FakePod::make(world, Blueprint { name, ..Blueprint::new(WorkloadKind::StatefulSet, &self.name, owners) }).await
    }

    /// Its controller says that so many of its pods run the present template.
    pub async fn has_updated(&self, world: &World, updated: usize, count: usize) {
        let set = world.api::<StatefulSet>().get(&self.name).await.unwrap();
        let status = json!({ "status": {
            "observedGeneration": set.metadata.generation,
            "replicas": count, "updatedReplicas": updated, "readyReplicas": count,
        }});
        let how = PatchParams::default();
        world.api::<StatefulSet>().patch_status(&self.name, &how, &Patch::Merge(&status)).await.unwrap();
    }
}

impl Workload {
    /// Somebody scales it, and its controller has got so far as this status says.
    pub async fn scale(&self, world: &World, replicas: usize, status: &Value) {
        let deployments = world.api::<Deployment>();
        let how = PatchParams::default();
        let spec = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        let scaled = deployments.patch(&self.name, &how, &spec).await.unwrap();
        let mut status = status.clone();
        status["observedGeneration"] = json!(scaled.metadata.generation);
        deployments.patch_status(&self.name, &how, &Patch::Merge(json!({ "status": status }))).await.unwrap();
    }

    /// One more pod of this workload.
    pub async fn new_pod(&self, world: &World, ready: bool) -> FakePod {
        FakePod::start(world, &self.name, self.owners(), ready).await
    }

    /// One more pod of this workload that is made in another way.
    pub async fn new_pod_of(&self, world: &World, address: Option<&str>, annotated: bool) -> FakePod {
        let blueprint = Blueprint::new(WorkloadKind::Deployment, &self.name, self.owners());
        FakePod::make(world, Blueprint { address, annotated, ..blueprint }).await
    }

    /// The owner references of its pods.
    pub fn owners(&self) -> Value {
        owned_by("ReplicaSet", &self.set_name, &self.set_uid)
    }

    /// Deletes the Deployment, its ReplicaSet and its pods, and leaves what else they own.
    pub async fn delete(&self, world: &World) {
        let background =
            DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
        world.api::<Deployment>().delete(&self.name, &background).await.unwrap();
        world.api::<ReplicaSet>().delete(&self.set_name, &background).await.unwrap();
        for pod in &self.pods {
            pod.delete(world).await;
        }
    }

    /// A pod with the workload's labels and without an owner.
    pub async fn unowned_pod(&self, world: &World) -> FakePod {
        FakePod::start(world, &self.name, json!([]), true).await
    }

    /// The revisions that went live in a pod, in order, must have grown.
    pub fn assert_revisions_grow(&self) {
        for pod in &self.pods {
            let revisions = pod.applied_revisions();
            assert!(revisions.windows(2).all(|pair| pair[0] < pair[1]), "{}: {revisions:?}", pod.name);
        }
    }
}
