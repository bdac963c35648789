//! The testbed: a cluster with the operator and the ticketing workloads, installed as users do, with Helm.
//!
//! The demo, the scenarios and the benchmark use it, with every provider.

use crate::{
    binaries::{Binaries, BinaryError, Tool},
    checkout,
    command::{CommandError, Run},
    image::{Archive, ImageError, build_workspace_images, postgres_image},
    kubectl::Kubectl,
    progress::Progress,
    provider::{self, ClusterProvider, ProviderError, ProviderKind},
    release::{Release, ReleaseError},
};
use crds::{FeatureFlag, Recovery, ResiliencePolicy};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Namespace of the ticketing workloads.
pub const TICKETING: &str = "ticketing";
/// Namespace of the operator.
pub const SYSTEM: &str = "resilience-system";
/// Longest wait for a Helm release to be ready.
const HELM_TIMEOUT: &str = "180s";
/// An answer that is on its way when the time is over is waited for so long.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// Why an operation on the testbed failed.
#[derive(Debug, thiserror::Error)]
pub enum TestbedError {
    /// The cluster could not be brought up or reached.
    #[error(transparent)]
    Provider(#[from] ProviderError),
    /// An image could not be built.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An earlier release could not be built.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// A program such as helm could not be found, downloaded or built.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// A program such as helm or kubectl failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A request to the API server failed.
    #[error("the API server: {0}")]
    Kube(#[from] Box<kube::Error>),
    /// The kubeconfig is of no use.
    #[error("the kubeconfig cannot be used: {0}")]
    Kubeconfig(String),
    /// Something that was expected did not happen.
    #[error("expected: {expected}\n    seen: {seen}\n    after: {} s", .waited.as_secs())]
    Expected {
        /// What was expected.
        expected: String,
        /// What was seen instead.
        seen: String,
        /// For how long.
        waited: Duration,
    },
}

impl TestbedError {
    /// Something else than `expected` was seen.
    pub fn unexpected(expected: &str, seen: &str) -> Self {
        Self::Expected { expected: expected.to_owned(), seen: seen.to_owned(), waited: Duration::ZERO }
    }
}

impl From<kube::Error> for TestbedError {
    fn from(error: kube::Error) -> Self {
        Self::Kube(Box::new(error))
    }
}

/// A cluster that is up, and the clients for it.
pub struct Testbed {
    /// The provider that runs the cluster.
    pub cluster: Box<dyn ClusterProvider>,
    /// kubectl, pointed at it.
    pub kubectl: Kubectl,
    /// A client of its API server.
    pub client: Client,
    /// A client for what the API server passes on to pods and Services: their answers are theirs. The other one takes a 429 for the
    /// API server's own, and waits for as long as `Retry-After` says, which may be the night.
    pub through: Client,
    helm: PathBuf,
    progress: Progress,
}

/// The images to install, and the charts that install them.
pub struct Images {
    charts: PathBuf,
    operator: Image,
    workloads: Image,
    postgres: Image,
}

/// One image: its reference, and its archive if it was built here.
struct Image {
    reference: String,
    archive: Option<PathBuf>,
}

impl From<Archive> for Image {
    fn from(archive: Archive) -> Self {
        Self { reference: archive.pinned().to_owned(), archive: Some(archive.path) }
    }
}

/// PostgreSQL where images can be pulled.
const OFFICIAL_POSTGRES: &str = "docker.io/library/postgres:17";
/// Names the images that a cluster of somebody else pulls by itself.
const IMAGES_VARIABLE: &str = "E2E_IMAGES";

impl Images {
    /// Reference of the operator's image.
    pub fn operator(&self) -> &str {
        &self.operator.reference
    }

    /// The images for a provider: built here and loaded into a cluster of ours; named by `E2E_IMAGES` for another one,
    /// which pulls them by itself.
    pub async fn find(kind: ProviderKind, progress: &Progress) -> Result<Self, TestbedError> {
        match kind {
            ProviderKind::Local | ProviderKind::Kind => Self::build(kind, progress).await,
            ProviderKind::Existing => Self::named(&std::env::var(IMAGES_VARIABLE).unwrap_or_default()),
        }
    }

    /// The images and the charts of an earlier release, built from this repository's history.
    pub async fn of_release(release: Release, kind: ProviderKind, progress: &Progress) -> Result<Self, TestbedError> {
        if kind == ProviderKind::Existing {
            let expected = "PROVIDER=local or kind: the images of an earlier release are built here, and an existing \
                            cluster could not pull them";
            return Err(TestbedError::unexpected(expected, "PROVIDER=existing"));
        }
        let built = release.build(progress).await?;
        Self::with_postgres(built.images, built.charts, kind, progress).await
    }

    async fn build(kind: ProviderKind, progress: &Progress) -> Result<Self, TestbedError> {
        let built = build_workspace_images(&images_dir(), progress).await?;
        Self::with_postgres(built, charts(), kind, progress).await
    }

    async fn with_postgres(
        mut built: Vec<Archive>,
        charts: PathBuf,
        kind: ProviderKind,
        progress: &Progress,
    ) -> Result<Self, TestbedError> {
        let dir = images_dir();
        let mut take = |name: &str| {
            let position = built.iter().position(|archive| archive.pinned().contains(name));
            let archive = position.map(|position| built.remove(position));
            archive.map(Image::from).ok_or_else(|| TestbedError::unexpected(&format!("an image named {name}"), "none"))
        };
        let (operator, workloads) = (take("resilience-operator")?, take("workloads")?);
        let postgres = match kind {
            // Docker can pull where there is a registry to pull from.
            ProviderKind::Kind if pulled(OFFICIAL_POSTGRES, progress).await => {
                let path = dir.join("postgres-official.tar");
                Run::new("docker").args(["save", "--output"]).arg(&path).arg(OFFICIAL_POSTGRES).output().await?;
                Image { reference: OFFICIAL_POSTGRES.to_owned(), archive: Some(path) }
            }
            _ => postgres_image(&dir, progress).await?.into(),
        };
        Ok(Self { charts, operator, workloads, postgres })
    }

    /// `operator=REFERENCE,workloads=REFERENCE`, and `postgres=REFERENCE` if it is not the official one.
    fn named(text: &str) -> Result<Self, TestbedError> {
        let entries: Vec<_> = text.split(',').filter_map(|entry| entry.split_once('=')).collect();
        let find = |name: &str| {
            let found = entries.iter().find(|(key, _)| key.trim() == name);
            found.map(|(_, reference)| Image { reference: reference.trim().to_owned(), archive: None })
        };
        let missing = |name: &str| {
            let expected = format!(
                "{IMAGES_VARIABLE}=operator=REFERENCE,workloads=REFERENCE, of images that the cluster can pull"
            );
            TestbedError::unexpected(&expected, &format!("no {name} in {text:?}"))
        };
        Ok(Self {
            charts: charts(),
            operator: find("operator").ok_or_else(|| missing("operator"))?,
            workloads: find("workloads").ok_or_else(|| missing("workloads"))?,
            postgres: find("postgres")
                .unwrap_or_else(|| Image { reference: OFFICIAL_POSTGRES.to_owned(), archive: None }),
        })
    }
}

/// Where the images of this checkout are written.
fn images_dir() -> PathBuf {
    checkout::root().join("target/images")
}

/// The charts of this checkout.
fn charts() -> PathBuf {
    checkout::root().join("charts")
}

/// Whether Docker has an image, or can get it.
async fn pulled(reference: &str, progress: &Progress) -> bool {
    let docker = |words: &str| Run::new("docker").words(words).arg(reference).run();
    if docker("image inspect").await.is_ok() {
        return true;
    }
    let pull = tokio::time::timeout(Duration::from_secs(120), docker("pull --quiet"));
    matches!(progress.during(&format!("docker pull {reference}"), pull).await, Ok(Ok(())))
}

impl Testbed {
    /// Brings up a cluster (or finds the one that is up) and connects to it.
    pub async fn open(
        kind: ProviderKind,
        name: Option<&str>,
        nodes: u32,
        progress: &Progress,
    ) -> Result<Self, TestbedError> {
        let cluster = provider::open(kind, name, progress)?;
        cluster.up(nodes).await?;
        Self::connect(cluster, progress).await
    }

    /// Connects to a cluster that is up.
    pub async fn connect(cluster: Box<dyn ClusterProvider>, progress: &Progress) -> Result<Self, TestbedError> {
        let binaries = Binaries::new(progress.clone());
        let helm = binaries.path(Tool::Helm).await?;
        let kubectl = Kubectl::new(binaries.path(Tool::Kubectl).await?, cluster.kubeconfig());
        let unusable = |error: kube::config::KubeconfigError| TestbedError::Kubeconfig(error.to_string());
        let config = match cluster.kubeconfig() {
            None => Config::infer().await.map_err(|error| TestbedError::Kubeconfig(error.to_string()))?,
            Some(path) => {
                let file = Kubeconfig::read_from(path).map_err(unusable)?;
                Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(unusable)?
            }
        };
        let mut without_retries = config.clone();
        without_retries.default_retry = false;
        let through = Client::try_from(without_retries)?;
        let client = Client::try_from(config)?;
        Ok(Self { cluster, kubectl, client, through, helm, progress: progress.clone() })
    }

    /// Loads the operator's image into the cluster, so that an upgrade that follows does not wait for it.
    pub async fn load_operator(&self, images: &Images) -> Result<(), TestbedError> {
        self.load(&images.operator).await
    }

    /// Installs or upgrades the operator. `extra` are further `--set` values.
    pub async fn install_operator(&self, images: &Images, extra: &[&str]) -> Result<(), TestbedError> {
        self.load(&images.operator).await?;
        // An interrupted run may have left it scaled down, which Helm would take for somebody else's decision.
        let operators: Api<Deployment> = Api::namespaced(self.client.clone(), SYSTEM);
        if operators.get_opt("resilience-operator").await?.is_some() {
            let patch = Patch::Merge(json!({ "spec": { "replicas": 1 } }));
            operators.patch("resilience-operator", &PatchParams::default(), &patch).await?;
        }
        let image = image_values("image", &images.operator.reference);
        let values = image.iter().map(String::as_str).chain(extra.iter().copied()).collect::<Vec<_>>();
        self.progress
            .during(
                "helm install resilience-operator",
                self.helm(&images.charts, "resilience-operator", SYSTEM, &values),
            )
            .await
    }

    /// Installs or upgrades the booking service with its database, and nothing else: what is measured or counted there
    /// depends on nobody.
    pub async fn install_booking(&self, images: &Images, replicas: u32) -> Result<(), TestbedError> {
        let mut values = vec![
            "simulators.enabled=false".to_owned(),
            "services.booking.env.PAYMENT_URL=".to_owned(),
            "services.booking.env.CHARGE_NOTHING=yes".to_owned(),
        ];
        // The scenarios fill its memory.
        values.push("services.booking.env.ALLOW_FAULTS=yes".to_owned());
        values.extend(["gateway", "catalog", "payment", "notification"].map(|s| format!("services.{s}.enabled=false")));
        self.install_ticketing(images, replicas, &values).await
    }

    /// Installs or upgrades all services and the simulators, one pod of each but of booking.
    pub async fn install_all(&self, images: &Images, replicas: u32) -> Result<(), TestbedError> {
        self.install_ticketing(images, replicas, &["serviceDefaults.replicas=1".to_owned()]).await
    }

    async fn install_ticketing(&self, images: &Images, replicas: u32, extra: &[String]) -> Result<(), TestbedError> {
        self.load(&images.workloads).await?;
        self.load(&images.postgres).await?;
        let mut values: Vec<String> = image_values("image", &images.workloads.reference).into();
        values.extend(image_values("postgresql.image", &images.postgres.reference));
        values.push(format!("services.booking.replicas={replicas}"));
        values.extend_from_slice(extra);
        let values: Vec<_> = values.iter().map(String::as_str).collect();
        self.progress.during("helm install ticketing", self.helm(&images.charts, "ticketing", TICKETING, &values)).await
    }

    async fn load(&self, image: &Image) -> Result<(), TestbedError> {
        match &image.archive {
            Some(archive) => Ok(self.cluster.load_image(archive).await?),
            None => Ok(()),
        }
    }

    async fn helm(&self, charts: &Path, release: &str, namespace: &str, values: &[&str]) -> Result<(), TestbedError> {
        let chart = charts.join(release);
        let mut run = Run::new(&self.helm).args(["upgrade", "--install", release]).arg(chart).args([
            "--namespace",
            namespace,
            "--create-namespace",
            "--wait",
            "--timeout",
            HELM_TIMEOUT,
        ]);
        for value in values {
            run = run.args(["--set", value]);
        }
        if let Some(kubeconfig) = self.cluster.kubeconfig() {
            run = run.arg("--kubeconfig").arg(kubeconfig);
        }
        Ok(run.output().await.map(drop)?)
    }

    /// Removes both releases and their namespaces.
    pub async fn uninstall(&self) -> Result<(), TestbedError> {
        for (release, namespace) in [("ticketing", TICKETING), ("resilience-operator", SYSTEM)] {
            let mut run =
                Run::new(&self.helm).args(["uninstall", release, "--namespace", namespace, "--ignore-not-found"]);
            if let Some(kubeconfig) = self.cluster.kubeconfig() {
                run = run.arg("--kubeconfig").arg(kubeconfig);
            }
            run.output().await?;
            self.kubectl
                .run(&format!("delete namespace {namespace} --ignore-not-found --wait=true --timeout=60s"))
                .await?;
        }
        Ok(())
    }

    /// Removes our custom resource definitions, and with them every object of their kinds.
    pub async fn delete_definitions(&self) -> Result<(), TestbedError> {
        for definition in crds::manifests::definitions() {
            let name = definition.metadata.name.unwrap_or_default();
            self.kubectl.run(&format!("delete crd {name} --ignore-not-found --wait=true --timeout=60s")).await?;
        }
        Ok(())
    }

    /// Applies a file of the checkout, as `kubectl apply -f` does.
    pub async fn apply_file(&self, file: &str) -> Result<(), TestbedError> {
        let path = checkout::root().join(file);
        let path = path.to_string_lossy();
        Ok(self.kubectl.args(&["apply", "-f", &path]).await.map(drop)?)
    }

    /// The entries of the API server's audit log so far; none if the provider keeps no log.
    pub async fn audit_lines(&self) -> Result<Vec<Value>, TestbedError> {
        let text = self.cluster.audit_log().await?.unwrap_or_default();
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Policies in the ticketing namespace.
    pub fn policies(&self) -> Api<ResiliencePolicy> {
        Api::namespaced(self.client.clone(), TICKETING)
    }

    /// Recoveries in the ticketing namespace, the one that was begun last first. Where version 0.1 runs, there are none.
    pub async fn recoveries(&self) -> Result<Vec<Recovery>, TestbedError> {
        let api: Api<Recovery> = Api::namespaced(self.client.clone(), TICKETING);
        let mut all = match api.list(&ListParams::default()).await {
            Ok(all) => all.items,
            Err(kube::Error::Api(status)) if status.code == 404 => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        all.sort_by_key(|one| std::cmp::Reverse(one.spec.decided_at.as_ref().map(|at| at.0)));
        Ok(all)
    }

    /// Flag sets in the ticketing namespace.
    pub fn flag_sets(&self) -> Api<FeatureFlag> {
        Api::namespaced(self.client.clone(), TICKETING)
    }

    /// Deployments in the ticketing namespace.
    pub fn deployments(&self) -> Api<Deployment> {
        Api::namespaced(self.client.clone(), TICKETING)
    }

    /// The running pods of the booking service, by name.
    pub async fn booking_pods(&self) -> Result<Vec<Pod>, TestbedError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), TICKETING);
        let list = pods.list(&ListParams::default().labels("app.kubernetes.io/name=booking")).await?;
        let mut pods: Vec<_> = list.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect();
        pods.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
        Ok(pods)
    }

    /// Changes a policy with a merge patch of its spec.
    pub async fn patch_policy(&self, name: &str, spec: &Value) -> Result<ResiliencePolicy, TestbedError> {
        Ok(self.policies().patch(name, &PatchParams::default(), &Patch::Merge(json!({ "spec": spec }))).await?)
    }

    /// Deletes every policy and flag set, and the ledger of what was done: what was done before counts no more.
    pub async fn delete_resources(&self) -> Result<(), TestbedError> {
        self.policies().delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        self.flag_sets().delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        let ledger: Api<Recovery> = Api::namespaced(self.client.clone(), TICKETING);
        match ledger.delete_collection(&DeleteParams::default(), &ListParams::default()).await {
            // Where version 0.1 runs, there is none.
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            done => Ok(done.map(drop)?),
        }
    }

    /// Sends the operator away, or brings it back, and waits until that is so.
    pub async fn scale_operator(&self, replicas: i32) -> Result<(), TestbedError> {
        let operators: Api<Deployment> = Api::namespaced(self.client.clone(), SYSTEM);
        let patch = Patch::Merge(json!({ "spec": { "replicas": replicas } }));
        operators.patch("resilience-operator", &PatchParams::default(), &patch).await?;
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM);
        until(Duration::from_secs(90), "the operator scaled", || async {
            let ready = operators
                .get("resilience-operator")
                .await?
                .status
                .and_then(|status| status.ready_replicas)
                .unwrap_or(0);
            let all = pods.list(&ListParams::default()).await?.items.len();
            let there = usize::try_from(replicas).unwrap_or(0);
            Ok(if ready == replicas && all == there { Ok(()) } else { Err(format!("{ready} of {all} pods are ready")) })
        })
        .await
    }

    /// Waits until a policy is as `check` wants it; `expected` says that in words.
    pub async fn policy_until(
        &self,
        name: &str,
        limit: Duration,
        expected: &str,
        check: impl Fn(&ResiliencePolicy) -> bool,
    ) -> Result<ResiliencePolicy, TestbedError> {
        let api = self.policies();
        until(limit, expected, || async {
            let policy = api.get_opt(name).await?;
            Ok(match policy {
                Some(policy) if check(&policy) => Ok(policy),
                Some(policy) => Err(serde_json::to_string(&policy.status).unwrap_or_default()),
                None => Err("there is no such policy".to_owned()),
            })
        })
        .await
    }
}

/// How far a Recovery is, in the word of its status.
pub fn phase(recovery: &Recovery) -> &str {
    recovery.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Asks again and again until the answer is good. The inner error says what was seen. One that does not answer is not waited for any
/// longer than that either.
pub async fn until<T, F, Fut>(limit: Duration, expected: &str, ask: F) -> Result<T, TestbedError>
where
    F: Fn() -> Fut,
    Fut: Future<Output = Result<Result<T, String>, TestbedError>>,
{
    let begin = tokio::time::Instant::now();
    loop {
        let left = limit.saturating_sub(begin.elapsed()) + LAST_ANSWER;
        let seen = match tokio::time::timeout(left, ask()).await {
            Ok(Ok(Ok(found))) => return Ok(found),
            Ok(Ok(Err(seen))) => seen,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer for {left:?}"),
        };
        if begin.elapsed() >= limit {
            return Err(TestbedError::Expected { expected: expected.to_owned(), seen, waited: begin.elapsed() });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Helm values that name an image: repository and tag.
fn image_values(key: &str, reference: &str) -> [String; 2] {
    let (repository, tag) = reference.rsplit_once(':').unwrap_or((reference, "latest"));
    [format!("{key}.repository={repository}"), format!("{key}.tag={tag}")]
}

/// Whether a condition of a policy is True.
pub fn is_true(policy: &ResiliencePolicy, type_: &str) -> bool {
    let generation = policy.metadata.generation;
    policy
        .status
        .iter()
        .filter(|status| status.observed_generation == generation)
        .flat_map(|status| &status.conditions)
        .any(|condition| condition.type_ == type_ && condition.status == crds::ConditionStatus::True)
}

/// The reason of a condition of a policy.
pub fn reason<'a>(policy: &'a ResiliencePolicy, type_: &str) -> Option<&'a str> {
    let conditions = &policy.status.as_ref()?.conditions;
    conditions.iter().find(|condition| condition.type_ == type_).map(|condition| condition.reason.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_somebody_elses_cluster_are_named() {
        let images = Images::named("operator=r.example/op:1, workloads=r.example/w:2").unwrap();
        assert_eq!(images.operator.reference, "r.example/op:1");
        assert_eq!(images.postgres.reference, "docker.io/library/postgres:17");
        let error = Images::named("operator=x:1").err().unwrap().to_string();
        assert!(error.contains("no workloads"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_answers_is_waited_for_no_longer_than_what_never_is() {
        const LIMIT: Duration = Duration::from_secs(60);
        for (never_answers, expected) in [(true, "no answer for 65s"), (false, "not yet")] {
            let begin = tokio::time::Instant::now();
            let waited: Result<(), _> = until(LIMIT, "an answer", || async {
                if never_answers {
                    std::future::pending::<()>().await;
                }
                Ok(Err("not yet".to_owned()))
            })
            .await;
            assert!(waited.unwrap_err().to_string().contains(expected));
            assert!((LIMIT..=LIMIT + LAST_ANSWER).contains(&begin.elapsed()), "{:?}", begin.elapsed());
        }
    }

    #[test]
    fn a_reference_becomes_helm_values() {
        assert_eq!(image_values("image", "r.example:5000/op:1"), ["image.repository=r.example:5000/op", "image.tag=1"]);
    }
}
