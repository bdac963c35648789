//! What can go wrong with a local cluster.

use crate::binaries::BinaryError;
use crate::command::CommandError;
use crate::filelock::LockError;
use crate::image::ImageError;
use crate::packages::PackageError;
use crate::pki::PkiError;
use std::path::PathBuf;

/// A local cluster could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Namespaces, mounts and cgroups are root's.
    #[error("the local cluster needs root: run this as root, or use --provider existing")]
    NotRoot,
    /// A name that would not do as a directory.
    #[error("`{name}` is no name for a cluster: use up to 24 lower-case letters, digits and dashes")]
    Name {
        /// The name.
        name: String,
    },
    /// More nodes than the address plan has been tried with.
    #[error("{nodes} nodes are not possible: use 1 to {max}")]
    Nodes {
        /// How many were asked for.
        nodes: u32,
        /// The most.
        max: u32,
    },
    /// The cluster is up, but different.
    #[error(
        "the cluster {name} is up with {has} node(s), not {wanted}: take it down first (`ticketwave-e2e cluster down`)"
    )]
    OtherSize {
        /// Name of the cluster.
        name: String,
        /// How many nodes it has.
        has: u32,
        /// How many were asked for.
        wanted: u32,
    },
    /// There is no cluster.
    #[error("the cluster {name} is not up: run `ticketwave-e2e cluster up`")]
    NotUp {
        /// Name of the cluster.
        name: String,
    },
    /// A node that does not exist.
    #[error("there is no node {node}: the cluster has nodes 1 to {nodes}")]
    NoSuchNode {
        /// What was asked for.
        node: u32,
        /// How many there are.
        nodes: u32,
    },
    /// All address ranges are taken.
    #[error(
        "no free network: routes of this machine or other clusters use all of 10.224.0.0 to 10.247.255.255; take a cluster down, see /var/lib/ticketwave/slots"
    )]
    NoSlot,
    /// A component could not be started.
    #[error("cannot start {component}: {source}")]
    Start {
        /// Its name.
        component: String,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// A component did not come up.
    #[error("{component} {what}; the end of its log ({}):\n{tail}", .log.display())]
    Component {
        /// Its name.
        component: String,
        /// What it did.
        what: String,
        /// The last lines of its log.
        tail: String,
        /// The whole log.
        log: PathBuf,
    },
    /// The cluster did not get ready although all components run.
    #[error("{what} not ready after {seconds} s: {seen}\nThe logs are in {}", .logs.display())]
    NotReady {
        /// What.
        what: String,
        /// For how long.
        seconds: u64,
        /// What was seen last.
        seen: String,
        /// Where to look.
        logs: PathBuf,
    },
    /// Something could not be removed.
    #[error(
        "not everything could be removed: {left}\nRun `ticketwave-e2e cluster down` again; if it stays, look for the processes that hold it"
    )]
    Leftovers {
        /// What is left.
        left: String,
    },
    /// A file could not be read or written.
    #[error("cannot read or write {path}: {source}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// A program failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A program is missing.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// A Debian package is missing.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// An image could not be made.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Keys could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A lock could not be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
}

impl LocalError {
    pub(super) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}
