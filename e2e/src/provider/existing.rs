//! A cluster that somebody else runs: kubectl's current context, only when asked for by name.

use super::{ClusterProvider, ProviderError};
use crate::binaries::{Binaries, Tool};
use crate::kubectl::Kubectl;
use crate::progress::Progress;
use async_trait::async_trait;
use std::path::{Path, PathBuf};

/// kubectl's current context.
#[derive(Debug)]
pub struct ExistingCluster {
    progress: Progress,
    binaries: Binaries,
}

impl ExistingCluster {
    /// Looks at nothing yet.
    pub fn new(progress: &Progress) -> Self {
        Self { progress: progress.clone(), binaries: Binaries::new(progress.clone()) }
    }

    async fn kubectl(&self) -> Result<Kubectl, ProviderError> {
        Ok(Kubectl::new(self.binaries.path(Tool::Kubectl).await?, None))
    }

    fn cannot<T>(&self, what: &'static str) -> Result<T, ProviderError> {
        Err(ProviderError::Unsupported { provider: self.name(), what })
    }
}

#[async_trait]
impl ClusterProvider for ExistingCluster {
    fn name(&self) -> &'static str {
        "existing"
    }

    async fn up(&self, _nodes: u32) -> Result<(), ProviderError> {
        let kubectl = self.kubectl().await?;
        kubectl.run("get --raw /readyz --request-timeout=5s").await.map_err(ProviderError::NoAnswer)?;
        let context = kubectl.run("config current-context").await.unwrap_or_default();
        self.progress.say(format!("the cluster of the context `{}` answers", context.trim()));
        Ok(())
    }

    async fn down(&self) -> Result<(), ProviderError> {
        self.progress.say("the cluster is not ours: nothing is taken down");
        Ok(())
    }

    async fn abandon_up(&self) -> Result<(), ProviderError> {
        Ok(())
    }

    async fn status(&self) -> Result<String, ProviderError> {
        Ok(self.kubectl().await?.run("get nodes -o wide").await?)
    }

    async fn is_up(&self) -> bool {
        match self.kubectl().await {
            Ok(kubectl) => kubectl.server_ready().await,
            Err(_) => false,
        }
    }

    async fn load_image(&self, _archive: &Path) -> Result<(), ProviderError> {
        self.cannot("load images: push them to a registry that the cluster reaches")
    }

    async fn cut_node(&self, _node: u32) -> Result<(), ProviderError> {
        self.cannot("cut nodes off")
    }

    async fn join_node(&self, _node: u32) -> Result<(), ProviderError> {
        self.cannot("join nodes")
    }

    async fn pause_api_server(&self) -> Result<(), ProviderError> {
        self.cannot("pause the API server")
    }

    async fn resume_api_server(&self) -> Result<(), ProviderError> {
        self.cannot("resume the API server")
    }

    async fn audit_log(&self) -> Result<Option<String>, ProviderError> {
        Ok(None)
    }

    fn node_name(&self, _node: u32) -> Option<String> {
        None
    }

    fn kubeconfig(&self) -> Option<PathBuf> {
        None
    }
}
