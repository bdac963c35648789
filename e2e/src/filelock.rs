//! A lock between processes, held until dropped; the kernel frees it when the process dies.

use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A lock file could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot lock {path}: {source}; check that the directory is writable")]
pub struct LockError {
    path: PathBuf,
    source: std::io::Error,
}

/// Holds the lock while it lives.
#[derive(Debug)]
pub struct FileLock(#[allow(dead_code)] File);

impl FileLock {
    /// Waits for the lock; calls `waiting` once if somebody else holds it.
    pub async fn acquire(path: &Path, waiting: impl FnOnce()) -> Result<Self, LockError> {
        let fail = |source| LockError { path: path.to_owned(), source };
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(fail)?;
        }
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).map_err(fail)?;
        let mut waiting = Some(waiting);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    if let Some(report) = waiting.take() {
                        report();
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(e) => return Err(fail(e.into())),
            }
        }
    }
}
