//! What Kubernetes mounts into the pod: the configuration and the admin token.
//!
//! Both mounts are optional and may appear later. The kubelet swaps the symlink `..data`, so a look at it and at the
//! file once a second costs two system calls and misses nothing; no file handle is held over a swap.

use crate::clock;
use crate::control::config::ConfigStore;
use contract::{AppliedFrom, CONFIG_KEY, MAX_CONFIG_BYTES};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::io::AsyncReadExt;

/// Time between two looks at a mount.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// What identifies the content of a file without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fingerprint {
    data_link: Option<PathBuf>,
    modified: Option<SystemTime>,
    length: u64,
}

/// One file of a mounted directory.
pub struct MountedFile {
    directory: PathBuf,
    name: &'static str,
    max_bytes: usize,
    seen: Option<Fingerprint>,
}

/// What a look at a mounted file found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// What it was at the last look.
    Same,
    /// New content; of a file that is too large, just enough to see that it is.
    Changed(Vec<u8>),
    /// It is gone.
    Gone,
}

impl MountedFile {
    /// The file `name` in `directory`, which need not exist; at most `max_bytes` are of interest.
    pub fn new(directory: &Path, name: &'static str, max_bytes: usize) -> Self {
        Self { directory: directory.to_owned(), name, max_bytes, seen: None }
    }

    /// Looks at it, and reads it if it changed since the last look.
    pub async fn look(&mut self) -> std::io::Result<Found> {
        let path = self.directory.join(self.name);
        let now = match tokio::fs::metadata(&path).await {
            Ok(metadata) => Some(Fingerprint {
                data_link: tokio::fs::read_link(self.directory.join("..data")).await.ok(),
                modified: metadata.modified().ok(),
                length: metadata.len(),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        if now == self.seen {
            return Ok(Found::Same);
        }
        let found = if now.is_some() { Found::Changed(self.read(&path).await?) } else { Found::Gone };
        self.seen = now;
        Ok(found)
    }

    async fn read(&self, path: &Path) -> std::io::Result<Vec<u8>> {
        let file = tokio::fs::File::open(path).await?;
        let mut content = Vec::new();
        let one_more = u64::try_from(self.max_bytes).unwrap_or(u64::MAX).saturating_add(1);
        file.take(one_more).read_to_end(&mut content).await?;
        Ok(content)
    }
}

/// Keeps a store up to date with the mounted ConfigMap. One that goes away changes nothing: the last good configuration
/// stays.
pub struct ConfigMount {
    file: MountedFile,
    store: Arc<ConfigStore>,
    trouble: Trouble,
}

impl ConfigMount {
    /// The ConfigMap mounted at `directory`, which may appear later.
    pub fn new(directory: &Path, store: Arc<ConfigStore>) -> Self {
        let file = MountedFile::new(directory, CONFIG_KEY, MAX_CONFIG_BYTES);
        Self { file, store, trouble: Trouble::default() }
    }

    /// Reads the mount once.
    pub async fn refresh(&mut self) {
        let found = self.file.look().await;
        self.trouble.log(found.as_ref().err(), "failed to read the mounted configuration");
        match found {
            Ok(Found::Changed(content)) => {
                self.store.apply(&content, AppliedFrom::Mount, clock::now_ms());
            }
            Ok(Found::Gone) => {
                tracing::warn!("the mounted configuration is gone; the last valid configuration stays in effect");
            }
            Ok(Found::Same) | Err(_) => {}
        }
    }

    /// Reads the mount every [`POLL_INTERVAL`], for as long as it is polled.
    pub async fn watch(mut self) {
        let mut ticks = tokio::time::interval(POLL_INTERVAL);
        loop {
            ticks.tick().await;
            self.refresh().await;
        }
    }
}

/// Logs an error once, not at every look, until it is over.
#[derive(Debug, Default)]
pub(crate) struct Trouble(bool);

impl Trouble {
    pub(crate) fn log(&mut self, error: Option<&std::io::Error>, what: &str) {
        let before = std::mem::replace(&mut self.0, error.is_some());
        if let Some(error) = error.filter(|_| !before) {
            tracing::warn!(%error, "{what}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn changed(file: &mut MountedFile) -> Option<String> {
        match file.look().await.unwrap() {
            Found::Changed(content) => Some(String::from_utf8(content).unwrap()),
            _ => None,
        }
    }

    /// As the kubelet does it: a new directory, and one rename that swaps the symlink.
    fn publish(directory: &Path, version: &str, content: &str) {
        std::fs::create_dir(directory.join(version)).unwrap();
        std::fs::write(directory.join(version).join("a.json"), content).unwrap();
        std::os::unix::fs::symlink(version, directory.join("..tmp")).unwrap();
        std::fs::rename(directory.join("..tmp"), directory.join("..data")).unwrap();
        let link = directory.join("a.json");
        if !link.exists() {
            std::os::unix::fs::symlink("..data/a.json", link).unwrap();
        }
    }

    #[tokio::test]
    async fn follows_a_mount_that_appears_later_and_is_swapped() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("config");
        let mut file = MountedFile::new(&directory, "a.json", 100);
        assert_eq!(file.look().await.unwrap(), Found::Same, "not there yet");
        std::fs::create_dir(&directory).unwrap();
        publish(&directory, "..1", "one");
        assert_eq!(changed(&mut file).await.as_deref(), Some("one"));
        assert_eq!(changed(&mut file).await, None);
        publish(&directory, "..2", "two");
        assert_eq!(changed(&mut file).await.as_deref(), Some("two"));
        std::fs::remove_dir_all(&directory).unwrap();
        assert_eq!(file.look().await.unwrap(), Found::Gone);
        assert_eq!(file.look().await.unwrap(), Found::Same);
    }

    #[tokio::test]
    async fn reads_no_more_than_it_needs_to_see_that_it_is_too_much() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.json"), vec![b'x'; 5_000]).unwrap();
        let mut file = MountedFile::new(directory.path(), "a.json", 100);
        assert_eq!(changed(&mut file).await.map(|content| content.len()), Some(101));
    }
}
