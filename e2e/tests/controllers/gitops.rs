//! A kill switch beside GitOps: the calls by which Flux and Argo CD apply a flag set, made by kubectl, and a person's override that is to
//! outlive them.

use crate::support::World;
use crds::FeatureFlag;
use e2e::{
    binaries::{Binaries, Tool},
    checkout,
    command::Run,
    progress::Progress,
};
use kube::api::{Patch, PatchParams};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// Who applies what is in Git.
#[derive(Clone, Copy, Debug, PartialEq)]
enum GitOps {
    /// kustomize-controller.
    Flux,
    /// Argo CD with the option `ServerSideApply=true`.
    ArgoServerSide,
    /// Argo CD without options: as `kubectl apply` does.
    Argo,
}

struct Git<'a> {
    world: &'a World,
    kubectl: PathBuf,
    by: GitOps,
}

impl<'a> Git<'a> {
    async fn new(world: &'a World, by: GitOps) -> Self {
        let kubectl = Binaries::new(Progress::quiet()).path(Tool::Kubectl).await.unwrap();
        Self { world, kubectl, by }
    }

    /// A command line of kubectl in a shell, as an administrator, in this namespace instead of `ticketing`.
    async fn paste(&self, words: &str) {
        let words = words.replace("-n ticketing", "");
        let line = format!("{} --namespace={} {words}", self.kubectl.display(), self.world.namespace);
        let kubeconfig = self.world.cluster.server.kubeconfig().display().to_string();
        Run::new("sh").args(["-c", &line]).env("KUBECONFIG", kubeconfig).run().await.unwrap();
    }

    /// One round of it.
    async fn sync(&self, manifest: &Value) {
        let words = match self.by {
            GitOps::Flux => {
                self.take_over_from_kubectl().await;
                "apply --server-side --force-conflicts --field-manager=kustomize-controller -f -"
            }
            GitOps::ArgoServerSide => {
                "apply --server-side --force-conflicts --field-manager=argocd-controller --validate=true -f -"
            }
            GitOps::Argo => "apply --validate=true -f -",
        };
        self.paste(&format!("{words} <<'EOF'\n{manifest}\nEOF")).await;
    }

    /// Before it applies, Flux makes its own what managers have written whose names begin with `kubectl`.
    async fn take_over_from_kubectl(&self) {
        let api = self.world.api::<FeatureFlag>();
        let Some(found) = api.get_opt("ticketing").await.unwrap() else { return };
        let entries = json!(found.metadata.managed_fields);
        let (taken, mut others): (Vec<_>, Vec<_>) = entries.as_array().unwrap().iter().cloned().partition(|entry| {
            let manager = entry["manager"].as_str().unwrap();
            entry["subresource"].is_null() && (manager.starts_with("kubectl") || manager == "before-first-apply")
        });
        if taken.is_empty() {
            return;
        }
        let mut own = match others.iter().position(|entry| entry["manager"] == "kustomize-controller") {
            Some(index) => others.remove(index),
            None => json!({"manager": "kustomize-controller", "operation": "Apply", "fieldsType": "FieldsV1",
                           "apiVersion": taken[0]["apiVersion"], "fieldsV1": {}}),
        };
        for entry in &taken {
            unite(own["fieldsV1"].as_object_mut().unwrap(), entry["fieldsV1"].as_object().unwrap());
        }
        others.push(own);
        let patch = json!([{"op": "replace", "path": "/metadata/managedFields", "value": others}]);
        let patch = Patch::Json::<()>(serde_json::from_value(patch).unwrap());
        api.patch("ticketing", &PatchParams::default(), &patch).await.unwrap();
    }

    /// The keys that are overridden, and the default of the flag that Git changes.
    async fn found(&self) -> (Vec<String>, Option<String>) {
        let set = self.world.api::<FeatureFlag>().get("ticketing").await.unwrap();
        let keys = set.spec.overrides.iter().map(|one| one.key.clone()).collect();
        (keys, set.spec.flag_spec.flags["EnableEmailNotifications"].default_variant.clone())
    }
}

fn unite(fields: &mut Map<String, Value>, others: &Map<String, Value>) {
    for (name, other) in others {
        match (fields.entry(name.clone()).or_insert_with(|| json!({})), other) {
            (Value::Object(own), Value::Object(other)) => unite(own, other),
            (own, other) => *own = other.clone(),
        }
    }
}

/// The set of the samples without its override, as it would be in Git.
fn in_git(default: &str) -> Value {
    let sample = std::fs::read_to_string(checkout::root().join("crds/samples/flags.yaml")).unwrap();
    let mut set: Value = serde_saphyr::from_str(&sample).unwrap();
    set["metadata"]["namespace"].take();
    set["spec"].as_object_mut().unwrap().remove("overrides");
    set["spec"]["flagSpec"]["flags"]["EnableEmailNotifications"]["defaultVariant"] = json!(default);
    set
}

/// A command of the documentation that has these words, as it is pasted.
fn documented(word: &str) -> String {
    let page = std::fs::read_to_string(checkout::root().join("docs/featureflag.md")).unwrap();
    let is_it = |line: &&str| line.starts_with("$ kubectl patch") && line.contains(word);
    page.lines().find(is_it).unwrap().trim_start_matches("$ kubectl ").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_kill_switch_stays_until_it_is_taken_back() {
    for by in [GitOps::Flux, GitOps::ArgoServerSide, GitOps::Argo] {
        let world = World::new().await;
        let git = Git::new(&world, by).await;
        git.sync(&in_git("on")).await;
        git.paste(&documented(r#""op":"add""#)).await;
        let overridden = vec!["EnablePdfGeneration".to_owned()];
        assert_eq!(git.found().await, (overridden.clone(), Some("on".to_owned())), "{by:?}");
        for default in ["off", "on", "on"] {
            git.sync(&in_git(default)).await;
            assert_eq!(git.found().await, (overridden.clone(), Some(default.to_owned())), "{by:?}");
        }
        git.paste(&documented(r#""op":"remove""#)).await;
        git.sync(&in_git("off")).await;
        assert_eq!(git.found().await, (Vec::new(), Some("off".to_owned())), "{by:?}");
    }
}

/// Without a field manager of its own, an edit is named `kubectl-patch`, and Flux undoes what begins with `kubectl`.
#[tokio::test(flavor = "multi_thread")]
async fn an_edit_without_a_field_manager_stays_where_the_documentation_says_so() {
    for (by, stays) in [(GitOps::Flux, false), (GitOps::ArgoServerSide, true), (GitOps::Argo, true)] {
        let world = World::new().await;
        let git = Git::new(&world, by).await;
        git.sync(&in_git("on")).await;
        git.paste(&documented(r#""op":"add""#).replace("--field-manager=incident-4711", "")).await;
        assert_eq!(git.found().await.0.len(), 1, "{by:?}");
        git.sync(&in_git("off")).await;
        let left = vec!["EnablePdfGeneration".to_owned(); usize::from(stays)];
        assert_eq!(git.found().await, (left, Some("off".to_owned())), "{by:?}");
    }
}

/// With overrides in Git, too.
#[tokio::test(flavor = "multi_thread")]
async fn overrides_in_git_stand_beside_others_or_in_their_place() {
    for (by, stays) in [(GitOps::Flux, true), (GitOps::ArgoServerSide, true), (GitOps::Argo, false)] {
        let world = World::new().await;
        let git = Git::new(&world, by).await;
        let mut set = in_git("on");
        set["spec"]["overrides"] = json!([{"key": "EnableEmailNotifications", "variant": "off"}]);
        git.sync(&set).await;
        git.paste(&documented(r#""op":"add""#)).await;
        assert_eq!(git.found().await.0.len(), 2, "{by:?}");
        git.sync(&set).await;
        assert_eq!(git.found().await.0.len(), if stays { 2 } else { 1 }, "{by:?}");
    }
}
