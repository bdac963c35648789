//! Clusters behind one small interface.

mod existing;
mod kind;
mod local;

pub use existing::ExistingCluster;
pub use kind::{KindCluster, KindError};
pub use local::{LocalCluster, LocalError};

use crate::binaries::BinaryError;
use crate::command::CommandError;
use crate::image::ImageError;
use crate::progress::Progress;
use async_trait::async_trait;
use std::path::{Path, PathBuf};

/// Something a cluster could not do.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// This provider has no such thing.
    #[error("the provider `{provider}` cannot {what}; use --provider local")]
    Unsupported {
        /// Its name.
        provider: &'static str,
        /// What was asked.
        what: &'static str,
    },
    /// The current context of kubectl does not answer.
    #[error(
        "the current context of kubectl does not answer: {0}\nPoint KUBECONFIG at a cluster that runs, or use --provider local"
    )]
    NoAnswer(#[source] CommandError),
    /// The local cluster.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The kind cluster.
    #[error(transparent)]
    Kind(Box<KindError>),
    /// kubectl could not be had.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// An image archive.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// kubectl said no.
    #[error(transparent)]
    Command(#[from] CommandError),
}

impl From<KindError> for ProviderError {
    fn from(error: KindError) -> Self {
        Self::Kind(Box::new(error))
    }
}

/// What the scenarios and the demo need from a cluster. Nodes are numbered from 1.
#[async_trait]
pub trait ClusterProvider: Send + Sync {
    /// The provider's name, as given on the command line.
    fn name(&self) -> &'static str;

    /// Brings the cluster up with this many nodes and waits until it is ready; fine if it already is.
    async fn up(&self, nodes: u32) -> Result<(), ProviderError>;

    /// Takes the cluster down and leaves nothing behind; fine if there is none.
    async fn down(&self) -> Result<(), ProviderError>;

    /// Takes down what an `up` that was dropped half way has left; does nothing if that had not begun to change anything.
    async fn abandon_up(&self) -> Result<(), ProviderError>;

    /// What a person wants to know about the cluster, as text.
    async fn status(&self) -> Result<String, ProviderError>;

    /// Whether the cluster is up.
    async fn is_up(&self) -> bool;

    /// Puts an image archive on every node; quick if that content is already there.
    async fn load_image(&self, archive: &Path) -> Result<(), ProviderError>;

    /// Cuts a node off the network.
    async fn cut_node(&self, node: u32) -> Result<(), ProviderError>;

    /// Joins a node that was cut off.
    async fn join_node(&self, node: u32) -> Result<(), ProviderError>;

    /// Freezes the API server: connections stay open and nothing answers.
    async fn pause_api_server(&self) -> Result<(), ProviderError>;

    /// Lets it go on.
    async fn resume_api_server(&self) -> Result<(), ProviderError>;

    /// The log of every write to the API server, one JSON object a line, if the provider keeps one.
    async fn audit_log(&self) -> Result<Option<String>, ProviderError>;

    /// What Kubernetes calls a node, if the provider knows.
    fn node_name(&self, node: u32) -> Option<String>;

    /// The kubeconfig to use; `None` means the user's own.
    fn kubeconfig(&self) -> Option<PathBuf>;
}

/// The providers that there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ProviderKind {
    /// Kubernetes on this machine, from binaries, without Docker; needs root
    #[default]
    Local,
    /// Kubernetes in Docker; KIND_NODE_IMAGE and KIND_API_SERVER_ADDRESS say with which image and where
    Kind,
    /// The cluster of kubectl's current context
    Existing,
}

/// The provider of this kind; `name` tells clusters apart and defaults to one per checkout.
pub fn open(
    kind: ProviderKind,
    name: Option<&str>,
    progress: &Progress,
) -> Result<Box<dyn ClusterProvider>, ProviderError> {
    Ok(match kind {
        ProviderKind::Local => Box::new(LocalCluster::open(name, progress)?),
        ProviderKind::Kind => Box::new(KindCluster::new(name, progress)),
        ProviderKind::Existing => Box::new(ExistingCluster::new(progress)),
    })
}
