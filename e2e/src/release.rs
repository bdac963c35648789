//! Earlier releases, built from this repository's history, so that upgrades from them can be tried.

use crate::{
    checkout,
    command::{CommandError, Run},
    filelock::{FileLock, LockError},
    image::{Archive, IMAGE_BINARIES, ImageError, build_images},
    progress::Progress,
};
use std::path::{Path, PathBuf};

/// A release and the commit that it was made from.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    /// Its version, such as `0.1`.
    pub version: &'static str,
    /// The whole id of its commit; a server hands single commits out by nothing shorter.
    pub commit: &'static str,
}

/// The first version.
pub const VERSION_0_1: Release = Release { version: "0.1", commit: "963103a287b75751df3eb8a2562c661f7ef8ccca" };

/// Why an earlier release could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    /// The commit is neither in this clone nor to be had from its origin.
    #[error(
        "version {version} is built from commit {commit}, which this clone does not have, and it cannot be fetched: \
         {source}\nrun `git fetch --unshallow`, or clone with the whole history (in GitHub Actions `fetch-depth: 0`)"
    )]
    NoCommit {
        /// The version that was asked for.
        version: &'static str,
        /// The commit that it is built from.
        commit: &'static str,
        /// The failed `git fetch` and the end of its output.
        source: CommandError,
    },
    /// git or tar failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The release's images could not be built.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The lock that keeps two builds of one release apart could not be taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file or folder below `target/releases` could not be written.
    #[error("cannot write {path}: {source}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
}

/// A release that was built: its images, and the charts that install them.
#[derive(Debug)]
pub struct Built {
    /// The images of [`IMAGE_BINARIES`], in that order.
    pub images: Vec<Archive>,
    /// The folder that holds its charts.
    pub charts: PathBuf,
}

impl Release {
    /// Builds it from git, or takes what an earlier run has built: all of it is in `target/releases/COMMIT`. A cold build
    /// takes about as long as a release build of this workspace.
    pub async fn build(self, progress: &Progress) -> Result<Built, ReleaseError> {
        let home = checkout::root().join("target/releases").join(self.commit);
        let wait = || progress.say(format!("waiting for another run that builds version {}", self.version));
        let _lock = FileLock::acquire(&home.join(".lock"), wait).await?;
        let source = home.join("source");
        if !source.is_dir() {
            self.export(&checkout::root(), &source, progress).await?;
        }
        let (charts, dir) = (source.join("charts"), home.join("images"));
        let written = IMAGE_BINARIES.iter().map(|(name, ..)| dir.join(format!("{name}.tar")));
        // An archive is written whole or not at all, and a commit never changes.
        if let Ok(images) = written.map(|path| Archive::open(&path)).collect() {
            return Ok(Built { images, charts });
        }
        let what = format!("building version {} (commit {}, release, static)", self.version, &self.commit[..7]);
        let target = home.join("target");
        let images = progress.during(&what, build_images(&source, &target, &dir)).await?;
        // The images are what is kept; what they were made from is a hundred times as large.
        std::fs::remove_dir_all(&target).map_err(|source| ReleaseError::File { path: target, source })?;
        Ok(Built { images, charts })
    }

    /// Writes the files of the commit in `repository` to `source`, all of them or none.
    async fn export(self, repository: &Path, source: &Path, progress: &Progress) -> Result<(), ReleaseError> {
        let git = || Run::new("git").dir(repository);
        if git().args(["cat-file", "-e", &format!("{}^{{commit}}", self.commit)]).run().await.is_err() {
            let what = format!("fetching commit {} of version {}", self.commit, self.version);
            let fetch = git().args(["fetch", "--depth=1", "origin", self.commit]).run();
            let (version, commit) = (self.version, self.commit);
            let fetched = progress.during(&what, fetch).await;
            fetched.map_err(|source| ReleaseError::NoCommit { version, commit, source })?;
        }
        let home = source.parent().unwrap_or(source);
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| ReleaseError::File { path, source }
        };
        let fresh = tempfile::tempdir_in(home).map_err(file(home))?;
        let archive = fresh.path().join("source.tar");
        git().args(["archive", "--format=tar", "--output"]).arg(&archive).arg(self.commit).run().await?;
        let files = fresh.path().join("files");
        std::fs::create_dir(&files).map_err(file(&files))?;
        Run::new("tar").arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(&files).run().await?;
        std::fs::rename(&files, source).map_err(file(source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn git(repository: &Path, words: &str) -> String {
        let run =
            Run::new("git").dir(repository).words("-c user.name=test -c user.email=test@example.com").words(words);
        run.output().await.unwrap().trim().to_owned()
    }

    #[tokio::test]
    async fn a_commit_is_exported_also_from_a_shallow_clone_and_one_that_cannot_be_had_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("repository");
        std::fs::create_dir(&repository).unwrap();
        git(&repository, "init --quiet").await;
        std::fs::write(repository.join("file"), "then").unwrap();
        git(&repository, "add file").await;
        git(&repository, "commit --quiet --message=first").await;
        let commit = git(&repository, "rev-parse HEAD").await.leak();
        std::fs::write(repository.join("file"), "now").unwrap();
        git(&repository, "commit --quiet --all --message=second").await;
        let shallow = dir.path().join("shallow");
        let origin = format!("file://{}", repository.display());
        git(dir.path(), &format!("clone --quiet --depth=1 {origin} {}", shallow.display())).await;

        let quiet = Progress::quiet();
        for (number, clone) in [&repository, &shallow].into_iter().enumerate() {
            let source = dir.path().join(format!("source-{number}"));
            Release { version: "0.1", commit }.export(clone, &source, &quiet).await.unwrap();
            assert_eq!(std::fs::read_to_string(source.join("file")).unwrap(), "then", "from {}", clone.display());
        }

        let unknown = Release { version: "0.0", commit: "0000000000000000000000000000000000000001" };
        let other = dir.path().join("other");
        let error = unknown.export(&repository, &other, &quiet).await.unwrap_err().to_string();
        assert!(error.contains("version 0.0") && error.contains("git fetch --unshallow"), "{error}");
        assert!(!other.exists());
    }
}
