//! The Go programs that a cluster needs: found, downloaded, or built from the modules under `e2e/tools`.
//!
//! In this order: `KUBEBUILDER_ASSETS`, the PATH (kubectl, helm and kind, if they work and fit), the cache
//! under `~/.cache/ticketwave/bin`, the official release with its checksum, a build from source.

mod download;
mod source;

use crate::command::{CommandError, Run, find_program, is_executable};
use crate::filelock::{FileLock, LockError};
use crate::progress::Progress;
use crate::{checkout, packages};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// The Kubernetes version of everything here.
pub const KUBERNETES_VERSION: &str = "v1.36.3";
/// Its major and minor number.
const KUBERNETES_MINOR: (u32, u32) = (1, 36);
const HELM_VERSION: &str = "v4.3.1";
const KIND_VERSION: &str = "v0.33.0";
const COREDNS_VERSION: &str = "v1.15.0";

/// A program could not be had.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// No Go to build with, and nothing to download.
    #[error(
        "{program} {version} is not in the cache and cannot be downloaded; to build it from source install Go 1.26 or newer (https://go.dev/dl)"
    )]
    NoGo {
        /// The program.
        program: &'static str,
        /// Its version.
        version: &'static str,
    },
    /// The build failed.
    #[error("cannot build {program} from {module}: {source}")]
    Build {
        /// The program.
        program: &'static str,
        /// The tools module.
        module: PathBuf,
        /// The failed command and the end of its output.
        source: CommandError,
    },
    /// The cache could not be written.
    #[error("cannot write {path}: {source}; set XDG_CACHE_HOME to a directory that can be written")]
    Cache {
        /// The file.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// The cache could not be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// etcd comes from Debian.
    #[error(transparent)]
    Package(#[from] packages::PackageError),
}

/// A program of the cluster, or one to talk to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// The API server.
    ApiServer,
    /// The controllers.
    ControllerManager,
    /// The scheduler.
    Scheduler,
    /// Runs pods on a node.
    Kubelet,
    /// Makes Services reachable on a node.
    KubeProxy,
    /// The command line client.
    Kubectl,
    /// The package manager.
    Helm,
    /// The cluster's DNS server.
    CoreDns,
    /// Runs Kubernetes in Docker.
    Kind,
}

impl Tool {
    /// The file's name.
    pub fn program(self) -> &'static str {
        match self {
            Self::ApiServer => "kube-apiserver",
            Self::ControllerManager => "kube-controller-manager",
            Self::Scheduler => "kube-scheduler",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
            Self::Kubectl => "kubectl",
            Self::Helm => "helm",
            Self::CoreDns => "coredns",
            Self::Kind => "kind",
        }
    }

    /// The version that is pinned here.
    pub fn version(self) -> &'static str {
        match self {
            Self::Helm => HELM_VERSION,
            Self::CoreDns => COREDNS_VERSION,
            Self::Kind => KIND_VERSION,
            _ => KUBERNETES_VERSION,
        }
    }

    fn is_kubernetes(self) -> bool {
        !matches!(self, Self::Helm | Self::CoreDns | Self::Kind)
    }
}

/// Finds programs, and gets those that are missing.
#[derive(Debug)]
pub struct Binaries {
    progress: Progress,
    cache: PathBuf,
    offline: AtomicBool,
}

impl Binaries {
    /// Uses the cache in the home directory.
    pub fn new(progress: Progress) -> Self {
        Self { progress, cache: checkout::cache_dir().join("bin"), offline: AtomicBool::new(false) }
    }

    /// The file of a program that fits, downloaded or built if need be.
    pub async fn path(&self, tool: Tool) -> Result<PathBuf, BinaryError> {
        if let Some(found) = self.installed(tool).await {
            return Ok(found);
        }
        let target = self.cache.join(tool.version()).join(tool.program());
        if is_executable(&target) {
            return Ok(target);
        }
        let dir = self.cache.join(tool.version());
        let lock = dir.join(format!(".{}.lock", tool.program()));
        let wait = || {
            self.progress.say(format!("waiting for another run that gets {}", tool.program()));
        };
        let _lock = FileLock::acquire(&lock, wait).await?;
        if is_executable(&target) {
            return Ok(target);
        }
        // What an interrupted run left is of no use; the name is ours while we hold the lock.
        let fresh = dir.join(format!(".{}.new", tool.program()));
        self.fetch_or_build(tool, &fresh).await?;
        let cache = |source| BinaryError::Cache { path: target.clone(), source };
        make_executable(&fresh).map_err(cache)?;
        std::fs::rename(&fresh, &target).map_err(cache)?;
        Ok(target)
    }

    /// etcd, from `KUBEBUILDER_ASSETS` or Debian.
    pub async fn etcd(&self) -> Result<PathBuf, BinaryError> {
        if let Some(found) = asset("etcd").or_else(|| find_program("etcd")) {
            return Ok(found);
        }
        packages::ensure(&[packages::ETCD], &self.progress).await?;
        Ok(find_program("etcd").unwrap_or_else(|| "/usr/bin/etcd".into()))
    }

    async fn installed(&self, tool: Tool) -> Option<PathBuf> {
        let on_path =
            matches!(tool, Tool::Kubectl | Tool::Helm | Tool::Kind).then(|| find_program(tool.program())).flatten();
        for candidate in [asset(tool.program()), on_path].into_iter().flatten() {
            if fits(tool, &candidate).await {
                return Some(candidate);
            }
        }
        None
    }

    async fn fetch_or_build(&self, tool: Tool, fresh: &Path) -> Result<(), BinaryError> {
        if !self.offline.load(Ordering::Relaxed) {
            let what = format!("downloading {} {}", tool.program(), tool.version());
            match self.progress.during(&what, download::fetch(tool, fresh)).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.progress.say(format!("  no download: {error}"));
                    self.offline.store(error.is_network(), Ordering::Relaxed);
                }
            }
        }
        source::build(tool, fresh, &self.progress).await
    }
}

fn asset(program: &str) -> Option<PathBuf> {
    let dir = std::env::var_os("KUBEBUILDER_ASSETS").filter(|v| !v.is_empty())?;
    Some(PathBuf::from(dir).join(program)).filter(|file| is_executable(file))
}

/// Whether a program that somebody else installed works and is of a version that may be used here.
async fn fits(tool: Tool, file: &Path) -> bool {
    let args = match tool {
        Tool::Kubectl => "version --client --output=json",
        Tool::Helm => "version --short",
        Tool::Kind => "version",
        _ => "--version",
    };
    let Ok(text) = Run::new(file).words(args).output().await else {
        return false;
    };
    let Some((major, minor)) = version_in(&text) else {
        return false;
    };
    match tool {
        // kubectl may be one minor version away from the API server.
        Tool::Kubectl => major == KUBERNETES_MINOR.0 && minor.abs_diff(KUBERNETES_MINOR.1) <= 1,
        Tool::Kind => major == 0 && minor >= 30,
        Tool::Helm => major == 4 || (major == 3 && minor >= 14),
        _ => !tool.is_kubernetes() || (major, minor) == KUBERNETES_MINOR,
    }
}

/// The first `vMAJOR.MINOR` in a text.
fn version_in(text: &str) -> Option<(u32, u32)> {
    text.match_indices('v').find_map(|(at, _)| {
        let mut numbers = text[at + 1..].split(|c: char| !c.is_ascii_digit());
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        Some((major, minor))
    })
}

fn make_executable(file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755))
}

#[cfg(test)]
mod tests {
    use super::version_in;

    #[test]
    fn versions_are_found_in_what_programs_print() {
        assert_eq!(version_in("Kubernetes v1.36.3"), Some((1, 36)));
        assert_eq!(version_in(r#"{"clientVersion":{"gitVersion":"v1.32.4-dispatcher"}}"#), Some((1, 32)));
        assert_eq!(version_in("v4.3.1+g1234"), Some((4, 3)));
        assert_eq!(version_in("over and out"), None);
    }
}
