//! Kubernetes on this machine without Docker: every node is a network namespace with its own containerd, kubelet and kube-proxy.

mod addons;
mod cgroup;
mod components;
mod control_plane;
mod down;
mod error;
mod identities;
mod images;
mod network;
mod node;
mod plan;
mod record;
mod slot;
mod status;
mod sysctl;
mod up;

pub use error::LocalError;

use super::{ClusterProvider, ProviderError};
use crate::binaries::{Binaries, Tool};
use crate::checkout;
use crate::filelock::FileLock;
use crate::kubectl::Kubectl;
use crate::progress::Progress;
use async_trait::async_trait;
use record::Record;
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Above the directories of all clusters of this machine.
fn state_root() -> PathBuf {
    PathBuf::from("/var/lib/ticketwave")
}

/// A cluster on this machine.
#[derive(Debug)]
pub struct LocalCluster {
    name: String,
    dir: PathBuf,
    progress: Progress,
    binaries: Binaries,
    /// Whether our `up` has come to where it changes this machine.
    begun: AtomicBool,
}

impl LocalCluster {
    /// The cluster with this name, or the one of this checkout; it need not exist.
    pub fn open(name: Option<&str>, progress: &Progress) -> Result<Self, LocalError> {
        let name = name.map_or_else(checkout::cluster_name, str::to_owned);
        let fits = !name.is_empty()
            && name.len() <= 24
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if !fits || name.starts_with('-') || name == "slots" {
            return Err(LocalError::Name { name });
        }
        let dir = state_root().join(&name);
        Ok(Self {
            name,
            dir,
            progress: progress.clone(),
            binaries: Binaries::new(progress.clone()),
            begun: AtomicBool::new(false),
        })
    }

    /// Where everything of the cluster is, among it `log/audit.log` and the logs of the components.
    pub fn state_dir(&self) -> &Path {
        &self.dir
    }

    fn kubeconfig_file(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    async fn kubectl(&self) -> Result<Kubectl, LocalError> {
        Ok(Kubectl::new(self.binaries.path(Tool::Kubectl).await?, Some(self.kubeconfig_file())))
    }

    /// One `up`, `down` or the like at a time.
    async fn lock(&self) -> Result<FileLock, LocalError> {
        if !rustix::process::geteuid().is_root() {
            return Err(LocalError::NotRoot);
        }
        let file = state_root().join(format!(".{}.lock", self.name));
        Ok(FileLock::acquire(&file, || {
            self.progress.say(format!("waiting for another run that works on the cluster {}", self.name));
        })
        .await?)
    }

    /// The record of a cluster that is up.
    fn running(&self) -> Result<Record, LocalError> {
        let record = Record::read(&self.dir)?.filter(|r| r.ready);
        record.ok_or_else(|| LocalError::NotUp { name: self.name.clone() })
    }

    fn signal_api_server(&self, signal: Signal) -> Result<(), LocalError> {
        let process = self.running()?.process("kube-apiserver");
        let sent = process.is_some_and(|process| process.signal(signal));
        sent.then_some(()).ok_or_else(|| LocalError::NotUp { name: self.name.clone() })
    }

    async fn set_cut(&self, node: u32, cut: bool) -> Result<(), LocalError> {
        let _lock = self.lock().await?;
        let mut record = self.running()?;
        if node == 0 || node > record.nodes {
            return Err(LocalError::NoSuchNode { node, nodes: record.nodes });
        }
        network::Network::new(&self.dir, record.plan).set_port(node, !cut).await?;
        record.cut.retain(|n| *n != node);
        if cut {
            record.cut.push(node);
        }
        record.write(&self.dir)?;
        let name = plan::node_name(node);
        self.progress.say(if cut {
            format!("{name} is cut off; the API server calls it NotReady in about 20 s")
        } else {
            format!("{name} is joined again")
        });
        if cut && node == 1 {
            self.progress.say("  it holds the API server, which cannot be reached now either");
        }
        Ok(())
    }
}

#[async_trait]
impl ClusterProvider for LocalCluster {
    fn name(&self) -> &'static str {
        "local"
    }

    async fn up(&self, nodes: u32) -> Result<(), ProviderError> {
        let _lock = self.lock().await?;
        Ok(self.bring_up(nodes).await?)
    }

    async fn down(&self) -> Result<(), ProviderError> {
        let _lock = self.lock().await?;
        Ok(self.take_down(false).await?)
    }

    async fn abandon_up(&self) -> Result<(), ProviderError> {
        if !self.begun.load(Ordering::Relaxed) {
            return Ok(());
        }
        let _lock = self.lock().await?;
        // Somebody who waited for our lock may have brought it up by now.
        if Record::read(&self.dir).map_err(ProviderError::from)?.is_some_and(|r| r.ready) {
            return Ok(());
        }
        Ok(self.take_down(false).await?)
    }

    async fn status(&self) -> Result<String, ProviderError> {
        Ok(self.describe().await?)
    }

    async fn is_up(&self) -> bool {
        if self.running().is_err() {
            return false;
        }
        let Ok(kubectl) = self.kubectl().await else {
            return false;
        };
        kubectl.server_ready().await
    }

    async fn load_image(&self, archive: &Path) -> Result<(), ProviderError> {
        let _lock = self.lock().await?;
        let record = self.running()?;
        Ok(self.load(archive, &record).await?)
    }

    async fn cut_node(&self, node: u32) -> Result<(), ProviderError> {
        Ok(self.set_cut(node, true).await?)
    }

    async fn join_node(&self, node: u32) -> Result<(), ProviderError> {
        Ok(self.set_cut(node, false).await?)
    }

    async fn pause_api_server(&self) -> Result<(), ProviderError> {
        Ok(self.signal_api_server(Signal::STOP)?)
    }

    async fn resume_api_server(&self) -> Result<(), ProviderError> {
        Ok(self.signal_api_server(Signal::CONT)?)
    }

    async fn audit_log(&self) -> Result<Option<String>, ProviderError> {
        let file = self.dir.join("log/audit.log");
        Ok(Some(std::fs::read_to_string(&file).map_err(LocalError::file(&file))?))
    }

    fn node_name(&self, node: u32) -> Option<String> {
        Some(plan::node_name(node))
    }

    fn kubeconfig(&self) -> Option<PathBuf> {
        Some(self.kubeconfig_file())
    }
}

/// How long a component may take on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
