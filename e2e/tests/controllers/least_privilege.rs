//! What somebody with the operator's token is refused: by RBAC, and where RBAC is too coarse by the admission policies of
//! the chart. Each attempt is a dry run, which admission sees like any other, so an early one does no harm.

use crate::support::{
    World,
    cluster::{apply, object},
    eventually, policy,
    workload::owned_by,
};
use k8s_openapi::api::{
    apps::v1::{Deployment, ReplicaSet},
    core::v1::{ConfigMap, Pod, Secret},
    rbac::v1::{Role, RoleBinding},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};

const UID: &str = "6f0f1f7e-0000-4000-8000-000000000001";
const INTENT: &str = "0123456789abcdef";

/// Names of a workload's objects, as the contract makes them.
fn token_secret_name(kind: &str, workload: &str) -> String {
    contract::token_secret_name(kind.parse().unwrap(), workload)
}

fn config_map_name(kind: &str, workload: &str) -> String {
    contract::config_map_name(kind.parse().unwrap(), workload)
}

/// A client with the operator's token.
async fn thief(world: &World) -> Client {
    Client::try_from(world.operator_config().await).unwrap()
}

fn dry() -> PostParams {
    PostParams { dry_run: true, ..PostParams::default() }
}

async fn create(client: &Client, namespace: &str, manifest: &Value) -> kube::Result<DynamicObject> {
    object(client, namespace, manifest).create(&dry(), &serde_json::from_value(manifest.clone()).unwrap()).await
}

async fn replace(client: &Client, namespace: &str, manifest: &Value) -> kube::Result<DynamicObject> {
    let name = manifest["metadata"]["name"].as_str().unwrap();
    object(client, namespace, manifest).replace(name, &dry(), &serde_json::from_value(manifest.clone()).unwrap()).await
}

/// Waits until the admission policies refuse an attempt; they take effect a moment after they were made.
async fn refused<T>(what: &str, words: &str, attempt: impl AsyncFn() -> kube::Result<T>) {
    eventually(&format!("refused: {what}"), async || match attempt().await {
        Ok(_) => Err("allowed".to_owned()),
        Err(kube::Error::Api(status))
            if (status.code == 403 || status.code == 422)
                && status.message.contains("ValidatingAdmissionPolicy")
                && status.message.contains(words) =>
        {
            Ok(())
        }
        Err(other) => Err(other.to_string()),
    })
    .await;
}

/// The same for many that are to be created.
async fn none_can_be_created(world: &World, words: &str, attempts: Vec<(&str, Value)>) {
    let client = thief(world).await;
    for (what, manifest) in attempts {
        refused(what, words, async || create(&client, &world.namespace, &manifest).await).await;
    }
}

fn with(mut manifest: Value, pointer: &str, value: Value) -> Value {
    let (parent, field) = pointer.rsplit_once('/').unwrap();
    manifest.pointer_mut(parent).unwrap()[field] = value;
    manifest
}

fn token_secret(kind: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "type": "resilience.ticketwave.io/admin-token",
        "metadata": { "name": token_secret_name("Deployment", "booking"), "ownerReferences": owned_by(kind, "booking", UID) },
        "stringData": { "current": "a" },
    })
}

fn document(kind: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": { "name": config_map_name("Deployment", "booking"), "ownerReferences": owned_by(kind, "booking", UID) },
        "data": { "a": "b" },
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_of_others_can_be_neither_made_nor_replaced() {
    let world = World::new().await;
    let good = token_secret("Deployment");
    let account_token = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
        "metadata": {
            "name": token_secret_name("Deployment", "booking"), "annotations": { "kubernetes.io/service-account.name": "default" },
            "ownerReferences": owned_by("Deployment", "booking", UID),
        },
    });
    let key = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "resilience-operator-key" } });
    let attempts = vec![
        ("a token of a service account", account_token),
        ("another name", with(good.clone(), "/metadata/name", json!("database-password"))),
        (
            "the name of another workload",
            with(good.clone(), "/metadata/name", json!(token_secret_name("Deployment", "payment"))),
        ),
        ("a type that others use", with(good.clone(), "/type", json!("Opaque"))),
        ("no owner", with(good.clone(), "/metadata/ownerReferences", json!([]))),
        ("an owner that is no workload", token_secret("ReplicaSet")),
        ("the name of a workload of another kind", token_secret("StatefulSet")),
        ("the operator's own key in a namespace that it watches", key),
    ];
    none_can_be_created(&world, "may write only Secrets", attempts).await;

    let client = thief(&world).await;
    let theirs = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "database" }, "stringData": { "password": "hunter2" } });
    let own_name = json!({ "apiVersion": "v1", "kind": "Secret", "type": "resilience.ticketwave.io/admin-token", "metadata": { "name": token_secret_name("Deployment", "booking") } });
    for manifest in [&theirs, &own_name] {
        apply(&world.client, &world.namespace, manifest).await.unwrap();
    }
    refused("replacing a Secret of others", "may write only", async || {
        replace(&client, &world.namespace, &with(theirs.clone(), "/stringData/password", json!("mine"))).await
    })
    .await;
    refused("replacing one of our name and type that nobody owns", "may change no Secret", async || {
        replace(&client, &world.namespace, &good).await
    })
    .await;

    // What the operator itself does stays allowed, by the names of the contract.
    for kind in ["Deployment", "StatefulSet"] {
        let owned = with(good.clone(), "/metadata/ownerReferences", owned_by(kind, "payment", UID));
        let allowed = with(owned, "/metadata/name", json!(token_secret_name(kind, "payment")));
        create(&client, &world.namespace, &allowed).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_cannot_be_read_by_patching_it() {
    let world = World::new().await;
    let theirs = json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "database" }, "stringData": { "password": "hunter2 hunter2" } });
    apply(&world.client, &world.namespace, &theirs).await.unwrap();
    let client = thief(&world).await;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), &world.namespace);
    let nothing = async || secrets.patch("database", &PatchParams::default(), &Patch::Merge(&json!({}))).await;
    let error = nothing().await.unwrap_err().to_string();
    assert!(error.contains("cannot patch resource \"secrets\""), "RBAC is the first to refuse: {error}");

    // Were RBAC wider by mistake, the policies refuse it still.
    let rules = json!([{ "apiGroups": [""], "resources": ["secrets"], "verbs": ["patch", "delete"] }]);
    let role = json!({ "metadata": { "name": "too-much" }, "rules": rules });
    let binding = json!({
        "metadata": { "name": "too-much" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "too-much" },
        "subjects": [{ "kind": "ServiceAccount", "name": world.home, "namespace": world.home }],
    });
    world.api::<Role>().create(&PostParams::default(), &serde_json::from_value(role).unwrap()).await.unwrap();
    world.api::<RoleBinding>().create(&PostParams::default(), &serde_json::from_value(binding).unwrap()).await.unwrap();
    refused("an empty patch", "may write only Secrets", nothing).await;
    refused("its deletion", "may write only Secrets", async || {
        secrets.delete("database", &kube::api::DeleteParams { dry_run: true, ..Default::default() }).await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn config_maps_of_others_can_be_neither_made_nor_patched() {
    let world = World::new().await;
    let good = document("Deployment");
    let attempts = vec![
        ("another name", with(good.clone(), "/metadata/name", json!("nginx"))),
        (
            "the name of another workload",
            with(good.clone(), "/metadata/name", json!(config_map_name("Deployment", "payment"))),
        ),
        ("no owner", with(good.clone(), "/metadata/ownerReferences", json!([]))),
        ("an owner that is no workload", document("DaemonSet")),
        ("the name of a workload of another kind", document("StatefulSet")),
    ];
    none_can_be_created(&world, "may write only ConfigMaps", attempts).await;

    let client = thief(&world).await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), &world.namespace);
    for (name, words) in [
        ("nginx", "may write only ConfigMaps"),
        (&*config_map_name("Deployment", "booking"), "may change no ConfigMap"),
    ] {
        let theirs = with(with(good.clone(), "/metadata/ownerReferences", json!([])), "/metadata/name", json!(name));
        apply(&world.client, &world.namespace, &theirs).await.unwrap();
        let taken_over = with(good.clone(), "/metadata/name", json!(name));
        refused(&format!("taking over {name}"), words, async || {
            maps.patch(name, &PatchParams::apply("thief").force().dry_run(), &Patch::Apply(&taken_over)).await
        })
        .await;
    }
    for kind in ["Deployment", "StatefulSet"] {
        let owned = with(good.clone(), "/metadata/ownerReferences", owned_by(kind, "payment", UID));
        let allowed = with(owned, "/metadata/name", json!(config_map_name(kind, "payment")));
        create(&client, &world.namespace, &allowed).await.unwrap();
    }
}

fn cron_job(name: &str, image: &str) -> Value {
    let pod = json!({ "restartPolicy": "Never", "containers": [{ "name": "cleanup", "image": image }] });
    let template = json!({ "metadata": { "labels": { "app": "cleanup" } }, "spec": pod });
    json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": name },
        "spec": { "schedule": "@yearly", "suspend": true, "jobTemplate": { "spec": { "template": template } } },
    })
}

/// What the operator would make of the CronJob `booking-cleanup`.
fn job() -> Value {
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {
            "name": format!("booking-cleanup-{INTENT}"),
            "labels": {
                "app.kubernetes.io/managed-by": "resilience-operator", "resilience.ticketwave.io/intent": INTENT,
                "resilience.ticketwave.io/cron-job": "booking-cleanup",
            },
            "annotations": {
                "cronjob.kubernetes.io/instantiate": "manual", "resilience.ticketwave.io/cron-job": "booking-cleanup",
            },
            "ownerReferences": owned_by("Deployment", "booking", UID),
        },
        "spec": cron_job("", "cleanup:1")["spec"]["jobTemplate"]["spec"],
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_run_what_a_cron_job_runs_and_nothing_else() {
    let world = World::new().await;
    for name in ["booking-cleanup", "other"] {
        apply(&world.client, &world.namespace, &cron_job(name, "cleanup:1")).await.unwrap();
    }
    let labels = "/metadata/labels";
    let annotations = "/metadata/annotations";
    let attempts = vec![
        ("no label of ours", with(job(), labels, json!({ "app.kubernetes.io/managed-by": "resilience-operator" }))),
        ("an intent that is none", with(job(), labels, json!({ "resilience.ticketwave.io/intent": "x" }))),
        ("a name of its own", with(job(), "/metadata/name", json!("miner"))),
        ("no owner", with(job(), "/metadata/ownerReferences", json!([]))),
    ];
    none_can_be_created(&world, "may only create Jobs, named and labelled", attempts).await;
    let attempts = vec![
        ("from no CronJob", with(job(), annotations, json!({ "cronjob.kubernetes.io/instantiate": "manual" }))),
        (
            "a label that says another one",
            with(
                job(),
                labels,
                json!({
                    "app.kubernetes.io/managed-by": "resilience-operator", "resilience.ticketwave.io/intent": INTENT,
                    "resilience.ticketwave.io/cron-job": "other",
                }),
            ),
        ),
        (
            "no sign that it was made by hand",
            with(job(), annotations, json!({ "resilience.ticketwave.io/cron-job": "booking-cleanup" })),
        ),
    ];
    none_can_be_created(&world, "only from a CronJob", attempts).await;
    let mut other = job();
    for place in ["labels", "annotations"] {
        other["metadata"][place]["resilience.ticketwave.io/cron-job"] = json!("other");
    }
    none_can_be_created(&world, "admissionPolicy.cronJobs", vec![("from a CronJob that nobody listed", other)]).await;

    let pod = "/spec/template/spec";
    let attempts = vec![
        ("another image", with(job(), &format!("{pod}/containers/0/image"), json!("miner"))),
        ("another command", with(job(), &format!("{pod}/containers/0/command"), json!(["sh"]))),
        ("a service account", with(job(), &format!("{pod}/serviceAccountName"), json!("admin"))),
        (
            "a Secret of others",
            with(job(), &format!("{pod}/volumes"), json!([{ "name": "a", "secret": { "secretName": "database" } }])),
        ),
        ("the node", with(job(), &format!("{pod}/hostPID"), json!(true))),
        ("labels of a Service's pods", with(job(), "/spec/template/metadata/labels", json!({ "app": "gateway" }))),
        ("annotations", with(job(), "/spec/template/metadata/annotations", json!({ "a": "b" }))),
        ("many at once", with(job(), "/spec/parallelism", json!(100))),
    ];
    none_can_be_created(&world, "differs from what CronJob booking-cleanup runs", attempts).await;

    let client = thief(&world).await;
    create(&client, &world.namespace, &job()).await.unwrap();
    // In another namespace a CronJob of that name would be another.
    world.delete(&cron_job("booking-cleanup", "cleanup:1")).await;
    refused("from a CronJob that is not there", "", async || create(&client, &world.namespace, &job()).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn recoveries_are_made_by_policies_for_the_workload_that_owns_them_and_stay_until_they_are_over() {
    let world = World::new().await;
    let recovery = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "Recovery",
        "metadata": { "name": "w-database-1", "ownerReferences": owned_by("Deployment", "w", UID) },
        "spec": {
            "targetRef": { "group": "apps", "kind": "Deployment", "name": "w" }, "policyRef": { "name": "p" }, "intent": INTENT,
            "check": "database", "action": "RestartPod", "pod": { "name": "w-1", "uid": UID },
        },
    });
    let none = without_policy(&recovery);
    let attempts = vec![
        ("as if a person asked", none),
        ("owned by nobody", with(recovery.clone(), "/metadata/ownerReferences", json!([]))),
        ("for another workload", with(recovery.clone(), "/spec/targetRef/name", json!("other"))),
        ("for one of another kind", with(recovery.clone(), "/spec/targetRef/kind", json!("StatefulSet"))),
    ];
    none_can_be_created(&world, "may only create Recoveries by a policy", attempts).await;
    let thief = thief(&world).await;
    create(&thief, &world.namespace, &recovery).await.unwrap();

    let made = with(without_policy(&recovery), "/metadata/ownerReferences", json!([]));
    world.apply(&made).await;
    let api = object(&thief, &world.namespace, &made);
    let delete = async || api.delete("w-database-1", &DeleteParams { dry_run: true, ..DeleteParams::default() }).await;
    refused("deleting one that is not over", "may delete no Recovery that is not over", delete).await;
    let over = json!({ "status": { "phase": "Failed", "finishedAt": "2026-01-02T03:04:05.000000Z" } });
    let own = object(&world.client, &world.namespace, &made);
    own.patch_status("w-database-1", &PatchParams::default(), &Patch::Merge(&over)).await.unwrap();
    delete().await.unwrap();
}

/// Who may create Recoveries may not say that a policy decided them.
#[tokio::test(flavor = "multi_thread")]
async fn only_the_operator_writes_down_what_a_policy_decided() {
    let world = World::new().await;
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": { "name": "editor" },
        "rules": [{ "apiGroups": ["resilience.ticketwave.io"], "resources": ["recoveries"], "verbs": ["create"] }],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": { "name": "editor" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "editor" },
        "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "editor" }],
    });
    for manifest in [&role, &binding] {
        world.apply(manifest).await;
    }
    let mut config = world.cluster.config("admin").await;
    config.auth_info.impersonate = Some("editor".to_owned());
    let editor = Client::try_from(config).unwrap();
    let recovery = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "Recovery", "metadata": { "name": "forged" },
        "spec": {
            "targetRef": { "name": "w" }, "policyRef": { "name": "p" }, "intent": INTENT,
            "action": "ResetConnections", "pod": { "name": "w-1", "uid": UID },
        },
    });
    let forge = async || create(&editor, &world.namespace, &recovery).await;
    refused("as if a policy had decided it", "only the resilience operator makes Recoveries by a policy", forge).await;
    create(&editor, &world.namespace, &without_policy(&recovery)).await.unwrap();
}

fn without_policy(recovery: &Value) -> Value {
    let mut recovery = recovery.clone();
    let spec = recovery["spec"].as_object_mut().unwrap();
    spec.remove("policyRef");
    spec.remove("intent");
    recovery
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_pod_nothing_but_one_annotation_can_be_changed() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let name = workload.pods[0].name.clone();
    let pods: Api<Pod> = Api::namespaced(thief(&world).await, &world.namespace);
    let patch = async |change: &Value| {
        pods.patch_status(&name, &PatchParams::default().dry_run(), &Patch::Merge(change)).await.map(drop)
    };
    let ours = "resilience.ticketwave.io/mounts-wanted-at";
    for (what, change) in [
        ("labels", json!({ "metadata": { "labels": { "app": "gateway" } } })),
        ("finalizers", json!({ "metadata": { "finalizers": ["ticketwave.io/stay"] } })),
        ("another annotation", json!({ "metadata": { "annotations": { "a": "b" } } })),
        ("another annotation beside ours", json!({ "metadata": { "annotations": { "a": "b", ours: "now" } } })),
        ("its phase", json!({ "status": { "phase": "Failed" } })),
        ("its address", json!({ "status": { "podIP": "10.9.9.9", "podIPs": [{ "ip": "10.9.9.9" }] } })),
        ("its readiness", json!({ "status": { "conditions": [{ "type": "Ready", "status": "False" }] } })),
    ] {
        refused(what, "may change nothing of a pod", async || patch(&change).await).await;
    }
    patch(&json!({ "metadata": { "annotations": { ours: "now" } } })).await.unwrap();
    patch(&json!({})).await.unwrap();
}

/// A ReplicaSet of the workload, with the template that its Deployment is to have had before.
async fn earlier_revision(world: &World, owner: &str, image: &str, mark: Option<&str>) -> String {
    let labels = json!({ "app": "booking", "pod-template-hash": image });
    let mut set = json!({
        "apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": { "name": format!("booking-{image}"), "labels": labels, "ownerReferences": owned_by("Deployment", "booking", owner) },
        "spec": {
            "replicas": 0, "selector": { "matchLabels": labels },
            "template": { "metadata": { "labels": labels }, "spec": { "containers": [{ "name": "main", "image": image }] } },
        },
    });
    if let Some(mark) = mark {
        set["metadata"]["labels"]["resilience.ticketwave.io/rollback-to"] = json!(mark);
    }
    let made: ReplicaSet =
        world.api().create(&PostParams::default(), &serde_json::from_value(set).unwrap()).await.unwrap();
    made.metadata.name.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_workload_nothing_is_changed_but_back_to_a_revision_of_its_own() {
    let world = World::new().await;
    let workload = world.workload("booking", 0).await;
    let deployments: Api<Deployment> = Api::namespaced(thief(&world).await, &world.namespace);
    let patch = async |change: &Value| {
        deployments.patch("booking", &PatchParams::default().dry_run(), &Patch::Strategic(change)).await.map(drop)
    };
    let by = "resilience.ticketwave.io/restarted-by";
    let restart = json!({ "metadata": { "annotations": { by: INTENT } }, "spec": { "template": { "metadata": { "annotations": { by: INTENT } } } } });
    patch(&restart).await.unwrap();
    let image = |image: &str| json!({ "containers": [{ "name": "main", "image": image }] });
    for (what, change) in [
        ("replicas", json!({ "spec": { "replicas": 100 } })),
        ("its strategy", json!({ "spec": { "strategy": { "type": "Recreate", "rollingUpdate": null } } })),
        ("pausing it", json!({ "spec": { "paused": true } })),
        ("labels", json!({ "metadata": { "labels": { "a": "b" } } })),
        ("annotations", json!({ "metadata": { "annotations": { "a": "b" } } })),
        ("an id that is none", json!({ "metadata": { "annotations": { by: "x" } } })),
        ("finalizers", json!({ "metadata": { "finalizers": ["ticketwave.io/stay"] } })),
        ("an image", json!({ "spec": { "template": { "spec": image("miner") } } })),
        ("annotations of its pods", json!({ "spec": { "template": { "metadata": { "annotations": { "a": "b" } } } } })),
        ("labels of its pods", json!({ "spec": { "template": { "metadata": { "labels": { "a": "b" } } } } })),
        ("the node", json!({ "spec": { "template": { "spec": { "hostPID": true } } } })),
        ("finalizers of its pods", json!({ "spec": { "template": { "metadata": { "finalizers": ["a.b/c"] } } } })),
        (
            "an id of its pods that is none",
            json!({ "spec": { "template": { "metadata": { "annotations": { by: "x" } } } } }),
        ),
    ] {
        refused(what, "may change nothing of a workload but", async || patch(&change).await).await;
    }
    let back = |image_of: &str| {
        json!({
            "metadata": { "labels": { "resilience.ticketwave.io/rollback-to": INTENT } }, "spec": { "template": { "spec": image(image_of) } },
        })
    };
    refused("a template that is compared with nothing", "no params found", async || patch(&back("miner")).await).await;
    let unreal = "00000000-0000-0000-0000-000000000000";
    let of_another = earlier_revision(&world, unreal, "miner", Some(INTENT)).await;
    let only = "may give a Deployment only the template of a ReplicaSet that it owns";
    refused("the template of another's ReplicaSet", only, async || patch(&back("miner")).await).await;
    let sets = world.api::<ReplicaSet>();
    sets.delete(&of_another, &DeleteParams::default()).await.unwrap();
    let own = earlier_revision(&world, &workload.uid, "shop1", None).await;

    let marks: Api<ReplicaSet> = Api::namespaced(thief(&world).await, &world.namespace);
    for (what, change) in [
        ("its size", json!({ "spec": { "replicas": 5 } })),
        ("its template", json!({ "spec": { "template": { "spec": image("miner") } } })),
        ("another label", json!({ "metadata": { "labels": { "a": "b" } } })),
        ("its owner", json!({ "metadata": { "ownerReferences": [] } })),
    ] {
        refused(what, "may change nothing of a ReplicaSet but", async || {
            marks.patch(&own, &PatchParams::default().dry_run(), &Patch::Merge(&change)).await
        })
        .await;
    }
    let mark = json!({ "metadata": { "labels": { "resilience.ticketwave.io/rollback-to": INTENT } } });
    marks.patch(&own, &PatchParams::default(), &Patch::Merge(&mark)).await.unwrap();
    refused("another template than the one that is marked", only, async || patch(&back("miner")).await).await;
    for more in [json!({ "annotations": { "a": "b" } }), json!({ "finalizers": ["a.b/c"] })] {
        let mut change = back("shop1");
        change["spec"]["template"]["metadata"] = more;
        refused("more than the template has", only, async || patch(&change).await).await;
    }
    eventually("the template that is marked comes back", async || {
        patch(&back("shop1")).await.map_err(|error| error.to_string())
    })
    .await;
    // Nobody else is hindered meanwhile, nor by what was left behind.
    let others = world.api::<Deployment>();
    let left = json!({ "metadata": { "labels": { "resilience.ticketwave.io/rollback-to": INTENT } } });
    others.patch("booking", &PatchParams::default(), &Patch::Merge(&left)).await.unwrap();
    let edit = json!({ "spec": { "template": { "spec": image("shop3") } } });
    others.patch("booking", &PatchParams::default().dry_run(), &Patch::Strategic(&edit)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_policies_ask_nobody_but_the_operator_and_do_not_hinder_it() {
    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let client = thief(&world).await;
    let secret = with(token_secret("Deployment"), "/metadata/name", json!("other"));
    refused("what is no business of the operator", "", async || create(&client, &world.namespace, &secret).await).await;
    create(&world.client, &world.namespace, &secret).await.unwrap();
    // No CronJob and no ReplicaSet of a rollback is here that a Job or a template could be compared with.
    let mut others_job = job();
    others_job["metadata"] = json!({ "name": "migration" });
    create(&world.client, &world.namespace, &others_job).await.unwrap();
    let edit = json!({ "spec": { "template": { "spec": { "containers": [{ "name": "main", "image": "other" }] } } } });
    let (deployments, how) = (world.api::<Deployment>(), PatchParams::default().dry_run());
    deployments.patch("booking", &how, &Patch::Strategic(edit)).await.unwrap();

    workload.pods[0].script().behavior = crate::support::Behavior::NoTokenYet;
    let operator = world.operator().await;
    world.apply(&policy("booking", "booking")).await;
    eventually("the pod is annotated", async || {
        let pod = world.api::<Pod>().get(&workload.pods[0].name).await.unwrap();
        let found = pod.annotations().contains_key("resilience.ticketwave.io/mounts-wanted-at");
        if found { Ok(()) } else { Err(format!("{:?}", pod.annotations())) }
    })
    .await;
    workload.pods[0].script().behavior = crate::support::Behavior::Correct;
    world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    // Written anew over the one that is there, as after a change of the key's epoch.
    let secrets = world.api::<Secret>();
    let first = secrets.get(&token_secret_name("Deployment", "booking")).await.unwrap();
    world.edit::<Secret>(&first.name_any(), json!({ "data": { "current": "bm9uc2Vuc2U=" } })).await;
    operator.stop().await;
    let _operator = world.operator().await;
    eventually("the token is what it was", async || {
        let now = secrets.get(&first.name_any()).await.unwrap();
        if now.data == first.data && now.metadata.uid == first.metadata.uid { Ok(()) } else { Err(String::new()) }
    })
    .await;
    let refusals = crate::support::audit::operator_writes(&world.cluster, &[&world.namespace, &world.home]);
    let refusals: Vec<_> = refusals.into_iter().filter(|write| write.code == 403 && write.name != "other").collect();
    assert!(refusals.is_empty(), "{refusals:?}");
}
