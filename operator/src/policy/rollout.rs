//! The steps that replace all pods of a workload. Both are one write, of exactly the version that was read, that carries the
//! intent's id: it is done once, and never after somebody else's.

use super::execute::Attempt;
use crate::{
    context::Context,
    fleet::facts::{DeploymentFacts, REVISION_ANNOTATION, Seen, StatefulSetFacts},
    kubernetes::{
        clients::{ApiError, call},
        meta::{FIELD_MANAGER, RESTARTED_BY_ANNOTATION, ROLLBACK_TO_LABEL, ROLLED_BACK_BY_ANNOTATION},
    },
    pods::prober::now_in_milliseconds,
    status::target::workload_of,
};
use contract::{WorkloadId, WorkloadKind};
use engine::recovery::{Record, Undo};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, StatefulSet};
use kube::{
    Api, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams},
    core::PartialObjectMeta,
};
use serde_json::{Value, json};
use std::time::Duration;
use tracing::warn;

/// Label that a Deployment's controller adds to the template of each of its ReplicaSets.
const TEMPLATE_HASH_LABEL: &str = "pod-template-hash";
/// How soon a mark that cannot be taken away is tried again.
const SWEEP_AGAIN: Duration = Duration::from_secs(10);

/// Replaces all pods, by an annotation of their template that says for which intent.
pub async fn restart(ctx: &Context, namespace: &str, record: &Record) -> Attempt {
    attempt(restart_once(ctx, &workload_of(namespace, &record.subject.target), &record.id).await)
}

async fn restart_once(ctx: &Context, id: &WorkloadId, intent: &str) -> Result<String, Failure> {
    let api = objects(ctx, id);
    let workload = read(ctx, id, &api).await?;
    let carried = workload.data["spec"]["template"]["metadata"]["annotations"][RESTARTED_BY_ANNOTATION].as_str();
    if carried != Some(intent) {
        // A restart and an edit must not come into one revision: nobody could tell them apart later.
        if workload.data["status"]["observedGeneration"].as_i64() != workload.metadata.generation {
            return Err(changed(id));
        }
        let noted = json!({ RESTARTED_BY_ANNOTATION: intent });
        let change = json!({
            "metadata": { "resourceVersion": workload.resource_version(), "annotations": noted },
            "spec": { "template": { "metadata": { "annotations": noted } } },
        });
        learn(ctx, id, &write(ctx, &api, &id.name, &Patch::Merge(change)).await?);
    }
    Ok("all pods are being replaced".to_owned())
}

/// Gives a Deployment the template of the revision before its last rollout: of the rollout that was judged, and of no other.
pub async fn roll_back(ctx: &Context, namespace: &str, record: &Record, judged: Option<&Undo>) -> Attempt {
    attempt(roll_back_once(ctx, &workload_of(namespace, &record.subject.target), &record.id, judged).await)
}

async fn roll_back_once(
    ctx: &Context,
    id: &WorkloadId,
    intent: &str,
    judged: Option<&Undo>,
) -> Result<String, Failure> {
    // One at a time in a namespace: each takes the marks of others away.
    let _turn = ctx.turn(&id.namespace).await;
    let api = objects(ctx, id);
    let deployment = read(ctx, id, &api).await?;
    if deployment.annotations().get(ROLLED_BACK_BY_ANNOTATION).map(String::as_str) == Some(intent) {
        unmark(ctx, id, None).await?;
        return Ok("its last rollout is being undone".to_owned());
    }
    let uid = deployment.uid().unwrap_or_default();
    let revisions = ctx.index.revisions_of(&uid, now_in_milliseconds());
    let undo = revisions.undo.map_err(Failure::Not)?;
    let newest = deployment.annotations().get(REVISION_ANNOTATION).map(String::as_str);
    let observed = &deployment.data["status"]["observedGeneration"];
    let as_known = newest == Some(revisions.newest.to_string().as_str())
        && observed.as_i64() == deployment.metadata.generation
        && judged.is_some_and(|judged| (judged.from, judged.to) == (undo.from, undo.to) && undo.proven);
    if !as_known {
        return Err(changed(id));
    }
    let name = revisions.previous.unwrap_or_default();
    let sets: Api<DynamicObject> = of_kind::<ReplicaSet>(ctx, &id.namespace);
    let mut templates = Vec::new();
    for same in revisions.same.iter().filter(|_| revisions.same.len() > 1) {
        templates.push(bare_template(&call(sets.get(same)).await?));
    }
    if templates.windows(2).any(|pair| pair[0] != pair[1]) {
        let why = format!("{id} was changed and restarted at once, so it is not known which revision to go back to");
        return Err(Failure::Not(why));
    }
    let set = call(sets.get(&name)).await?;
    let owned = set.owner_references().iter().any(|owner| owner.controller == Some(true) && owner.uid == uid);
    let mut template = set.data["spec"]["template"].clone();
    if let Some(labels) = template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(TEMPLATE_HASH_LABEL);
    }
    if !owned || !template.is_object() || template == deployment.data["spec"]["template"] {
        return Err(Failure::Not(format!("revision {} is not there any more; the view of it is read again", undo.to)));
    }
    unmark(ctx, id, Some(&name)).await?;
    mark(ctx, &sets, &name, json!(intent)).await?;
    let (mut annotations, mut labels) = (deployment.annotations().clone(), deployment.labels().clone());
    annotations.insert(ROLLED_BACK_BY_ANNOTATION.to_owned(), intent.to_owned());
    labels.insert(ROLLBACK_TO_LABEL.to_owned(), intent.to_owned());
    let change = json!([
        { "op": "replace", "path": "/metadata/resourceVersion", "value": deployment.resource_version() },
        { "op": "add", "path": "/metadata/annotations", "value": annotations },
        { "op": "add", "path": "/metadata/labels", "value": labels },
        { "op": "replace", "path": "/spec/template", "value": template },
    ]);
    let change: json_patch::Patch = serde_json::from_value(change).map_err(|error| Failure::Not(error.to_string()))?;
    learn(ctx, id, &write(ctx, &api, &id.name, &Patch::Json::<()>(change)).await?);
    unmark(ctx, id, None).await?;
    Ok(format!("the rollout of revision {} is being undone; revision {} comes back", undo.from, undo.to))
}

fn changed(id: &WorkloadId) -> Failure {
    Failure::Not(format!("the template of {id} was changed a moment ago; it is looked at again"))
}

/// The template of a ReplicaSet without what its controller and restarts add.
fn bare_template(set: &DynamicObject) -> Value {
    let mut template = set.data["spec"]["template"].clone();
    for (list, added) in [("labels", TEMPLATE_HASH_LABEL), ("annotations", RESTARTED_BY_ANNOTATION)] {
        let Some(metadata) = template["metadata"].as_object_mut() else { continue };
        let Some(entries) = metadata.get_mut(list).and_then(Value::as_object_mut) else { continue };
        entries.remove(added);
        if entries.is_empty() {
            metadata.remove(list);
        }
    }
    template
}

/// Takes away the mark that a rollback has left on a Deployment, because the operator that did it died or stopped leading: once its
/// ReplicaSet is gone, the admission policy would let nobody change it any more.
pub async fn sweep(ctx: &Context, id: &WorkloadId) {
    let _turn = ctx.turn(&id.namespace).await;
    if let Attempt::Unknown(why) = attempt(unmark(ctx, id, None).await.map(|()| String::new())) {
        warn!(workload = %id, why, "the mark of a rollback cannot be taken away");
        ctx.enqueue_workload_after(id, SWEEP_AGAIN);
    }
}

/// Takes the marks of a rollback away in the namespace, but for this ReplicaSet. Those of Deployments first: as long as one has a
/// mark, the admission policy wants a ReplicaSet that has one.
async fn unmark(ctx: &Context, id: &WorkloadId, but: Option<&str>) -> Result<(), Failure> {
    let marked = ListParams::default().labels(ROLLBACK_TO_LABEL);
    let (deployments, sets) = (of_kind::<Deployment>(ctx, &id.namespace), of_kind::<ReplicaSet>(ctx, &id.namespace));
    let left = call(deployments.list_metadata(&marked)).await?.items;
    if let Some(deployment) = left.first()
        && call(sets.list_metadata(&marked)).await?.items.is_empty()
    {
        // Without one, not even the mark of the Deployment may be taken away.
        let all = call(sets.list_metadata(&ListParams::default())).await?.items;
        let is_its = |set: &&PartialObjectMeta<DynamicObject>| {
            set.owner_references().iter().any(|owner| Some(&owner.uid) == deployment.metadata.uid.as_ref())
        };
        // Any will do: nothing but the mark changes.
        if let Some(set) = all.iter().find(is_its).or(all.first()) {
            let value = deployment.labels().get(ROLLBACK_TO_LABEL).cloned();
            mark(ctx, &sets, &set.name_any(), json!(value)).await?;
        }
    }
    for api in [deployments, sets] {
        for object in call(api.list_metadata(&marked)).await?.items {
            if but != Some(&*object.name_any()) || api.resource_url().ends_with("deployments") {
                mark(ctx, &api, &object.name_any(), Value::Null).await?;
            }
        }
    }
    Ok(())
}

async fn mark(ctx: &Context, api: &Api<DynamicObject>, name: &str, value: Value) -> Result<(), Failure> {
    let change = json!({ "metadata": { "labels": { ROLLBACK_TO_LABEL: value } } });
    write(ctx, api, name, &Patch::Merge(change)).await.map(drop)
}

/// Why a step is not done.
enum Failure {
    /// The API server did not do it.
    Api(ApiError),
    /// It cannot be done now.
    Not(String),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Api(error)
    }
}

fn attempt(result: Result<String, Failure>) -> Attempt {
    match result {
        Ok(done) => Attempt::Done(Some(done)),
        Err(Failure::Api(error)) => Attempt::Unknown(error.to_string()),
        Err(Failure::Not(why)) => Attempt::Unknown(why),
    }
}

/// Reads the workload that the operator means: another one may have its name by now.
async fn read(ctx: &Context, id: &WorkloadId, api: &Api<DynamicObject>) -> Result<DynamicObject, Failure> {
    let known = ctx.index.workload(id).ok_or_else(|| Failure::Not(format!("there is no {id}")))?;
    let found = call(api.get(&id.name)).await?;
    if found.uid().as_deref() == Some(&*known.uid) {
        return Ok(found);
    }
    Err(Failure::Not(format!("{id} was made again meanwhile")))
}

async fn write<P: serde::Serialize + std::fmt::Debug>(
    ctx: &Context,
    api: &Api<DynamicObject>,
    name: &str,
    change: &Patch<P>,
) -> Result<DynamicObject, Failure> {
    // It may have stopped leading since it read.
    if !ctx.shared.fence.holds() {
        return Err(Failure::Not("this replica does not lead any more".to_owned()));
    }
    let how = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
    Ok(call(api.patch(name, &how, change)).await?)
}

/// Takes in what a workload is after a write, so that it is not judged by what it was, should its watch be slow.
fn learn(ctx: &Context, id: &WorkloadId, after: &DynamicObject) {
    let Ok(value) = serde_json::to_value(after) else { return };
    let facts = match id.kind {
        WorkloadKind::Deployment => serde_json::from_value::<Seen<DeploymentFacts>>(value).map(|seen| seen.facts.0),
        WorkloadKind::StatefulSet => serde_json::from_value::<Seen<StatefulSetFacts>>(value).map(|seen| seen.facts.0),
    };
    if let Ok(facts) = facts {
        drop(ctx.index.put_workload(facts));
    }
}

/// The objects of the kind of a workload, as they are: a template may have members that this version does not know.
fn objects(ctx: &Context, id: &WorkloadId) -> Api<DynamicObject> {
    match id.kind {
        WorkloadKind::Deployment => of_kind::<Deployment>(ctx, &id.namespace),
        WorkloadKind::StatefulSet => of_kind::<StatefulSet>(ctx, &id.namespace),
    }
}

fn of_kind<K: kube::Resource<DynamicType = ()>>(ctx: &Context, namespace: &str) -> Api<DynamicObject> {
    let kind = ApiResource::erase::<K>(&());
    Api::namespaced_with(ctx.shared.clients.act.clone(), namespace, &kind)
}
