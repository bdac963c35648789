//! A kind cluster: Kubernetes in Docker.
//!
//! `KIND_NODE_IMAGE` names another node image than kind's own, `KIND_API_SERVER_ADDRESS` the address at which this
//! machine reaches the API server, for a Docker that is not on this machine's own network.

use super::{ClusterProvider, ProviderError};
use crate::audit::AUDIT_POLICY;
use crate::binaries::{Binaries, BinaryError, Tool};
use crate::checkout;
use crate::command::{CommandError, Run};
use crate::image::{Archive, ImageError};
use crate::kubectl::{Kubectl, condition, items};
use crate::progress::Progress;
use async_trait::async_trait;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most nodes, as for the other providers.
const MAX_NODES: u32 = 3;
/// Where a node finds its audit policy.
const AUDIT_DIR: &str = "/etc/kubernetes/audit";
/// Where the API server's node keeps the audit log.
const AUDIT_LOG: &str = "/var/log/kubernetes/audit.log";
/// How long the cluster may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(180);

/// Something that kind or Docker could not do.
#[derive(Debug, thiserror::Error)]
pub enum KindError {
    /// No Docker.
    #[error("Docker does not answer: {0}\nStart it, point DOCKER_HOST at one, or use PROVIDER=local, which needs none")]
    NoDocker(#[source] CommandError),
    /// Too few or too many nodes.
    #[error("a cluster has 1 to {MAX_NODES} nodes, not {0}")]
    Nodes(u32),
    /// The cluster has another size.
    #[error("the cluster {name} is up with {has} node(s), not {wanted}: take it down first with `make cluster-down`")]
    OtherSize {
        /// Its name.
        name: String,
        /// How many it has.
        has: usize,
        /// How many were asked for.
        wanted: u32,
    },
    /// No such node.
    #[error("there is no node {node}; the cluster has {nodes}")]
    NoSuchNode {
        /// Its number.
        node: u32,
        /// How many there are.
        nodes: usize,
    },
    /// It did not become ready.
    #[error("the cluster {name} did not become ready within {} s: {seen}", READY_TIMEOUT.as_secs())]
    NotReady {
        /// Its name.
        name: String,
        /// What was seen.
        seen: String,
    },
    /// A file of ours.
    #[error("cannot read or write {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// kind, docker or kubectl said no.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// kind or kubectl could not be had.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// An image archive.
    #[error(transparent)]
    Image(#[from] ImageError),
}

/// A cluster that kind runs.
#[derive(Debug)]
pub struct KindCluster {
    name: String,
    dir: PathBuf,
    progress: Progress,
    binaries: Binaries,
}

impl KindCluster {
    /// The cluster with this name, or the one of this checkout; it need not exist.
    pub fn new(name: Option<&str>, progress: &Progress) -> Self {
        let name = name.map_or_else(checkout::cluster_name, str::to_owned);
        let dir = checkout::cache_dir().join("kind").join(&name);
        Self { name, dir, progress: progress.clone(), binaries: Binaries::new(progress.clone()) }
    }

    async fn kind(&self) -> Result<Run, KindError> {
        Ok(Run::new(self.binaries.path(Tool::Kind).await?))
    }

    async fn kubectl(&self) -> Result<Kubectl, KindError> {
        Ok(Kubectl::new(self.binaries.path(Tool::Kubectl).await?, Some(self.kubeconfig_file())))
    }

    fn kubeconfig_file(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    fn file(&self, name: &str) -> impl FnOnce(std::io::Error) -> KindError {
        let path = self.dir.join(name);
        move |source| KindError::File { path, source }
    }

    /// Name of a node, from 1; the first one runs the API server.
    fn node(&self, node: u32) -> String {
        match node {
            1 => format!("{}-control-plane", self.name),
            2 => format!("{}-worker", self.name),
            other => format!("{}-worker{}", self.name, other - 1),
        }
    }

    async fn nodes(&self) -> Result<usize, KindError> {
        let text = self.kind().await?.words("get nodes --quiet --name").arg(&self.name).output().await?;
        Ok(text.split_whitespace().count())
    }

    async fn bring_up(&self, nodes: u32) -> Result<(), KindError> {
        if nodes == 0 || nodes > MAX_NODES {
            return Err(KindError::Nodes(nodes));
        }
        Run::new("docker").words("version").run().await.map_err(KindError::NoDocker)?;
        let has = self.nodes().await?;
        if has > 0 && self.kubectl().await?.server_ready().await {
            if u32::try_from(has) != Ok(nodes) {
                return Err(KindError::OtherSize { name: self.name.clone(), has, wanted: nodes });
            }
            self.progress.say(format!("the kind cluster {} is already up with {nodes} node(s)", self.name));
            return Ok(());
        }
        if has > 0 {
            self.progress.say(format!("the kind cluster {} is there, but does not answer: starting over", self.name));
        }
        // Also what an interrupted `up` has left.
        self.take_down().await?;
        std::fs::create_dir_all(self.dir.join("audit")).map_err(self.file("audit"))?;
        std::fs::write(self.dir.join("audit/policy.json"), AUDIT_POLICY).map_err(self.file("audit/policy.json"))?;
        let address = setting("KIND_API_SERVER_ADDRESS");
        // YAML is a superset of JSON.
        let config = config(nodes, address.as_deref(), &self.dir.join("audit")).to_string();
        std::fs::write(self.dir.join("kind.yaml"), config).map_err(self.file("kind.yaml"))?;
        let mut create = self.kind().await?.words("create cluster --name").arg(&self.name);
        create = create.arg("--config").arg(self.dir.join("kind.yaml"));
        create = create.arg("--kubeconfig").arg(self.kubeconfig_file()).args(["--wait", "180s"]);
        if let Some(image) = setting("KIND_NODE_IMAGE") {
            create = create.args(["--image", &image]);
        }
        let text = format!("kind create cluster {} with {nodes} node(s)", self.name);
        self.progress.during(&text, create.run()).await?;
        self.wait_ready(nodes).await?;
        self.progress.say(format!("ready: export KUBECONFIG={}", self.kubeconfig_file().display()));
        Ok(())
    }

    async fn wait_ready(&self, nodes: u32) -> Result<(), KindError> {
        let kubectl = self.kubectl().await?;
        // The scenarios put the operator beside the API server, where it is not cut off.
        let _ = kubectl.run("taint nodes --all node-role.kubernetes.io/control-plane-").await;
        let ready = |list: &Value| items(list).iter().filter(|node| condition(node, "Ready") == Some("True")).count();
        let not_ready = |seen: String| KindError::NotReady { name: self.name.clone(), seen };
        let all = |list: &Value| u32::try_from(ready(list)) == Ok(nodes);
        let waiting = kubectl.wait_until("nodes", READY_TIMEOUT, all);
        let seen = self.progress.during("waiting for the nodes", waiting).await;
        seen.map_err(|list| not_ready(format!("{} of {nodes} nodes are Ready", ready(&list))))?;
        let available = |seen: &Value| condition(seen, "Available") == Some("True");
        let waiting = kubectl.wait_until("deployment coredns -n kube-system", READY_TIMEOUT, available);
        let dns = self.progress.during("waiting for the DNS server", waiting).await;
        dns.map_err(|_| not_ready("the DNS server does not get ready".to_owned()))?;
        Ok(())
    }

    async fn take_down(&self) -> Result<(), KindError> {
        self.kind().await?.words("delete cluster --quiet --name").arg(&self.name).run().await?;
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(self.file("")(error)),
            _ => Ok(()),
        }
    }

    /// Loads an archive unless every node has this content already.
    async fn load(&self, archive: &Path) -> Result<(), KindError> {
        let image = Archive::open(archive)?;
        let name = image.references.first().map_or("", String::as_str);
        let file = self.dir.join("images.json");
        let mut known: BTreeMap<String, String> =
            std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        if known.get(name) == Some(&image.digest) {
            self.progress.say(format!("{name} is already loaded"));
            return Ok(());
        }
        let load = self.kind().await?.words("load image-archive").arg(archive).args(["--name", &self.name]);
        load.run().await?;
        known.insert(name.to_owned(), image.digest.clone());
        let bytes = serde_json::to_vec_pretty(&known).unwrap_or_default();
        std::fs::write(&file, bytes).map_err(self.file("images.json"))?;
        self.progress.say(format!("loaded {name}"));
        Ok(())
    }

    /// Runs a program on a node.
    async fn on_node(&self, node: u32, words: &str) -> Result<String, KindError> {
        let nodes = self.nodes().await?;
        if node == 0 || usize::try_from(node).is_ok_and(|node| node > nodes) {
            return Err(KindError::NoSuchNode { node, nodes });
        }
        Ok(Run::new("docker").arg("exec").arg(self.node(node)).words(words).output().await?)
    }

    /// Everything that comes in or goes out of a node's interface is dropped, or no longer is.
    async fn set_cut(&self, node: u32, cut: bool) -> Result<(), KindError> {
        for rule in ["INPUT -i eth0", "OUTPUT -o eth0", "FORWARD -i eth0", "FORWARD -o eth0"] {
            let present = self.on_node(node, &format!("iptables -w -C {rule} -j DROP")).await.is_ok();
            match (cut, present) {
                (true, false) => drop(self.on_node(node, &format!("iptables -w -I {rule} -j DROP")).await?),
                (false, true) => drop(self.on_node(node, &format!("iptables -w -D {rule} -j DROP")).await?),
                _ => {}
            }
        }
        let what = if cut { "is cut off" } else { "is joined again" };
        self.progress.say(format!("{} {what}", self.node(node)));
        Ok(())
    }
}

/// A setting from the environment; an empty one is none.
fn setting(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// kind's configuration: an audit log, and kubelets that also run on cgroup version 1.
fn config(nodes: u32, address: Option<&str>, audit: &Path) -> Value {
    let arguments = [
        ("audit-policy-file", format!("{AUDIT_DIR}/policy.json")),
        ("audit-log-path", AUDIT_LOG.to_owned()),
        ("audit-log-maxsize", "500".to_owned()),
    ];
    let volume = |name: &str, path: &str, type_: &str, read_only: bool| json!({ "name": name, "hostPath": path, "mountPath": path, "readOnly": read_only, "pathType": type_ });
    let volumes = [
        volume("audit", AUDIT_DIR, "Directory", true),
        volume("audit-log", "/var/log/kubernetes", "DirectoryOrCreate", false),
    ];
    // Kubernetes 1.36 takes a list of arguments, and a patch replaces it whole; older versions take a map.
    let list: Vec<_> = [("runtime-config", String::new())]
        .iter()
        .chain(&arguments)
        .map(|(name, value)| json!({ "name": name, "value": value }))
        .collect();
    let map: serde_json::Map<_, _> =
        arguments.iter().map(|(name, value)| ((*name).to_owned(), Value::from(value.as_str()))).collect();
    let cluster = |version: &str, arguments: Value| {
        json!({
            "apiVersion": format!("kubeadm.k8s.io/{version}"),
            "kind": "ClusterConfiguration",
            "apiServer": { "extraArgs": arguments, "extraVolumes": volumes },
        })
        .to_string()
    };
    let kubelet = json!({ "kind": "KubeletConfiguration", "failCgroupV1": false }).to_string();
    let mount = json!([{ "hostPath": audit, "containerPath": AUDIT_DIR, "readOnly": true }]);
    let node = |number: u32| match number {
        1 => json!({ "role": "control-plane", "extraMounts": mount }),
        _ => json!({ "role": "worker" }),
    };
    let mut config = json!({
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "kubeadmConfigPatches": [cluster("v1beta4", list.into()), cluster("v1beta3", map.into()), kubelet],
        "nodes": (1..=nodes).map(node).collect::<Vec<_>>(),
    });
    if let Some(address) = address {
        // kind tries a free port here, where that address may not be; -1 leaves the choice to Docker.
        config["networking"] = json!({ "apiServerAddress": address, "apiServerPort": -1 });
    }
    config
}

#[async_trait]
impl ClusterProvider for KindCluster {
    fn name(&self) -> &'static str {
        "kind"
    }

    async fn up(&self, nodes: u32) -> Result<(), ProviderError> {
        Ok(self.bring_up(nodes).await?)
    }

    async fn down(&self) -> Result<(), ProviderError> {
        Run::new("docker").words("version").run().await.map_err(KindError::NoDocker)?;
        self.take_down().await?;
        self.progress.say(format!("the kind cluster {} is down", self.name));
        Ok(())
    }

    async fn abandon_up(&self) -> Result<(), ProviderError> {
        Ok(self.take_down().await?)
    }

    async fn status(&self) -> Result<String, ProviderError> {
        if self.nodes().await? == 0 {
            return Ok(format!("kind cluster {}: not up\n", self.name));
        }
        let kubectl = self.kubectl().await?;
        let nodes = kubectl.run("get nodes -o wide").await?;
        Ok(format!(
            "kind cluster {}\n{nodes}kubeconfig  {}\nkubectl     {}\n",
            self.name,
            self.kubeconfig_file().display(),
            kubectl.program().display()
        ))
    }

    async fn is_up(&self) -> bool {
        match self.kubectl().await {
            Ok(kubectl) => self.kubeconfig_file().is_file() && kubectl.server_ready().await,
            Err(_) => false,
        }
    }

    async fn load_image(&self, archive: &Path) -> Result<(), ProviderError> {
        Ok(self.load(archive).await?)
    }

    async fn cut_node(&self, node: u32) -> Result<(), ProviderError> {
        Ok(self.set_cut(node, true).await?)
    }

    async fn join_node(&self, node: u32) -> Result<(), ProviderError> {
        Ok(self.set_cut(node, false).await?)
    }

    async fn pause_api_server(&self) -> Result<(), ProviderError> {
        Ok(self.on_node(1, "pkill -STOP -x kube-apiserver").await.map(drop)?)
    }

    async fn resume_api_server(&self) -> Result<(), ProviderError> {
        Ok(self.on_node(1, "pkill -CONT -x kube-apiserver").await.map(drop)?)
    }

    async fn audit_log(&self) -> Result<Option<String>, ProviderError> {
        Ok(Some(self.on_node(1, &format!("cat {AUDIT_LOG}")).await?))
    }

    fn node_name(&self, node: u32) -> Option<String> {
        Some(self.node(node))
    }

    fn kubeconfig(&self) -> Option<PathBuf> {
        Some(self.kubeconfig_file())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_what_was_asked_for() {
        let config = config(2, Some("10.0.0.2"), Path::new("/tmp/audit"));
        assert_eq!(config["nodes"].as_array().unwrap().len(), 2);
        assert_eq!(config["nodes"][0]["extraMounts"][0]["hostPath"], "/tmp/audit");
        assert_eq!(config["networking"]["apiServerAddress"], "10.0.0.2");
        let patch: Value = serde_json::from_str(config["kubeadmConfigPatches"][0].as_str().unwrap()).unwrap();
        assert_eq!(patch["apiServer"]["extraArgs"][0], json!({ "name": "runtime-config", "value": "" }));
        assert!(super::config(1, None, Path::new("/tmp/audit"))["networking"].is_null());
    }

    #[test]
    fn nodes_are_named_as_kind_names_them() {
        let cluster = KindCluster::new(Some("t"), &Progress::quiet());
        assert_eq!([1, 2, 3].map(|node| cluster.node(node)), ["t-control-plane", "t-worker", "t-worker2"]);
    }
}
