//! Programs in other languages under `e2e/clients`, with the libraries that they name installed beside them in the cache.

use crate::checkout;
use crate::command::{CommandError, Run};
use crate::filelock::{FileLock, LockError};
use crate::packages::{self, PackageError};
use crate::progress::Progress;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// A client could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum SdkClientError {
    /// Node, Python or the browser.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// Its libraries.
    #[error("cannot install the libraries of e2e/clients/{client}: {source}")]
    Install {
        /// The directory.
        client: String,
        /// The failed command and the end of its output.
        source: CommandError,
    },
    /// The copy could not be made.
    #[error("cannot copy {path}: {source}; set XDG_CACHE_HOME to a directory that can be written")]
    Copy {
        /// The file or directory.
        path: PathBuf,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// The copy could not be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
}

/// The interpreter of Python, below the directory of a client.
pub const PYTHON: &str = "venv/bin/python";

/// Where the client of this name is ready to run: a directory for each state of its files, so that two checkouts do not
/// take each other's. Installs what is missing: `npm ci` where there is a `package.json`, a virtual environment where there
/// is a `requirements.txt`.
pub async fn ready(client: &str, progress: &Progress) -> Result<PathBuf, SdkClientError> {
    let clients = checkout::cache_dir().join("clients");
    let lock = async |name: &Path| {
        let path = clients.join(name).with_extension("lock");
        FileLock::acquire(&path, || progress.say(format!("waiting for {}", path.display()))).await
    };
    let installing = lock(Path::new("packages")).await?;
    packages::ensure(packages::SDK_CLIENTS, progress).await?;
    drop(installing);
    let source = checkout::root().join("e2e/clients").join(client);
    let files = files(&source)?;
    let mut hash = Sha256::new();
    for (path, text) in &files {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(text);
    }
    let digest = hash.finalize();
    let state = u64::from_be_bytes(std::array::from_fn(|index| digest[index]));
    let folder = clients.join(format!("{client}-{state:016x}"));
    let _lock = lock(&folder).await?;
    let done = folder.join("installed");
    if done.is_file() {
        return Ok(folder);
    }
    let write = |path: &Path, text: &[u8]| {
        let result = path.parent().map_or(Ok(()), std::fs::create_dir_all).and_then(|()| std::fs::write(path, text));
        result.map_err(|source| SdkClientError::Copy { path: path.to_owned(), source })
    };
    for (path, text) in &files {
        write(&folder.join(path), text)?;
    }
    let install = install(&folder);
    progress
        .during(&format!("libraries of e2e/clients/{client}"), install)
        .await
        .map_err(|source| SdkClientError::Install { client: client.to_owned(), source })?;
    write(&done, b"")?;
    Ok(folder)
}

async fn install(folder: &Path) -> Result<(), CommandError> {
    if folder.join("package.json").is_file() {
        Run::new("npm").words("ci --no-audit --no-fund --ignore-scripts").dir(folder).run().await?;
    }
    if folder.join("requirements.txt").is_file() {
        Run::new("python3").words("-m venv --clear venv").dir(folder).run().await?;
        let pip = Run::new(folder.join(PYTHON)).words("-m pip install --quiet --disable-pip-version-check --no-deps");
        pip.words("-r requirements.txt").dir(folder).run().await?;
    }
    Ok(())
}

/// The files of a client, by name.
fn files(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>, SdkClientError> {
    let fail = |path: &Path| {
        let path = path.to_owned();
        |source| SdkClientError::Copy { path, source }
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(fail(folder))? {
        let path = entry.map_err(fail(folder))?.path();
        if path.is_file() {
            let text = std::fs::read(&path).map_err(fail(&path))?;
            files.push((path.file_name().unwrap_or_default().into(), text));
        }
    }
    files.sort();
    Ok(files)
}
