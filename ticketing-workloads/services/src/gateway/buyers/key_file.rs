//! Secret keys in a file, one a line: the first one signs, all of them are taken, so that they can be replaced one by one.

use arc_swap::ArcSwap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Shortest key, in bytes.
pub const MIN_KEY_BYTES: usize = 32;
/// Most keys that hold at once.
const MAX_KEYS: usize = 10;
/// Largest file, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Time between two looks at the file.
const REREAD: Duration = Duration::from_secs(5);

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("cannot read {path}: {source}", path = .path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} has more than {MAX_FILE_BYTES} bytes", path = .path.display())]
    TooLarge { path: PathBuf },
    #[error(
        "{path} has to have 1 to {MAX_KEYS} keys, one a line, of {MIN_KEY_BYTES} bytes or more, such as what \
         `openssl rand -hex 32` prints", path = .path.display()
    )]
    Keys { path: PathBuf },
}

/// Keys, of which there is at least one.
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    first: Vec<u8>,
    others: Vec<Vec<u8>>,
}

impl Keys {
    /// One key.
    pub fn one(key: Vec<u8>) -> Self {
        Self { first: key, others: Vec::new() }
    }

    /// Reads what a file has.
    fn parse(text: &str) -> Option<Self> {
        let mut lines =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| line.as_bytes().to_vec());
        let keys = Self { first: lines.next()?, others: lines.collect() };
        (keys.others.len() < MAX_KEYS && keys.all().all(|key| key.len() >= MIN_KEY_BYTES)).then_some(keys)
    }

    /// The one that signs.
    pub fn first(&self) -> &[u8] {
        &self.first
    }

    /// All that are taken.
    pub fn all(&self) -> impl Iterator<Item = &[u8]> {
        std::iter::once(&self.first).chain(&self.others).map(Vec::as_slice)
    }
}

/// The keys that hold now.
#[derive(Clone)]
pub struct KeyFile(Arc<ArcSwap<Keys>>);

impl KeyFile {
    /// Keys that never change.
    pub fn fixed(keys: Keys) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(keys)))
    }

    /// Those in the file at `path`.
    pub fn open(path: &Path) -> Result<Self, KeyFileError> {
        read(path).map(Self::fixed)
    }

    pub fn now(&self) -> Arc<Keys> {
        self.0.load_full()
    }

    /// Reads the file again whenever it has changed. One that cannot be used changes nothing.
    pub async fn watch(self, path: PathBuf) {
        let mut said = None;
        loop {
            tokio::time::sleep(REREAD).await;
            let (file, path) = (self.clone(), path.clone());
            let Ok(result) = tokio::task::spawn_blocking(move || file.refresh(&path)).await else { continue };
            let error = result.err().map(|error| error.to_string());
            if let Some(error) = error.as_ref().filter(|_| error != said) {
                tracing::warn!(%error, "keys cannot be read again; those that were read before stay in effect");
            }
            said = error;
        }
    }

    /// Takes what the file has now.
    fn refresh(&self, path: &Path) -> Result<(), KeyFileError> {
        let keys = read(path)?;
        if keys != **self.0.load() {
            tracing::info!(path = %path.display(), "keys have changed");
            self.0.store(Arc::new(keys));
        }
        Ok(())
    }
}

/// The keys in a file.
pub fn read(path: &Path) -> Result<Keys, KeyFileError> {
    use std::io::Read;
    let unreadable = |source| KeyFileError::Unreadable { path: path.to_owned(), source };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(KeyFileError::TooLarge { path: path.to_owned() });
    }
    Keys::parse(&text).ok_or_else(|| KeyFileError::Keys { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_key_signs_and_a_file_that_cannot_be_used_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        assert!(matches!(KeyFile::open(&path), Err(KeyFileError::Unreadable { .. })));
        let [new, old] = ["n", "o"].map(|letter| letter.repeat(MIN_KEY_BYTES));
        std::fs::write(&path, format!("\n{old}\n")).unwrap();
        let file = KeyFile::open(&path).unwrap();
        std::fs::write(&path, format!("{new}\r\n{old}\n")).unwrap();
        file.refresh(&path).unwrap();
        let rotated = file.now();
        assert_eq!((rotated.first(), rotated.all().count()), (new.as_bytes(), 2));
        for wrong in ["", "short", &format!("{new}\nshort"), &format!("{new}\n").repeat(MAX_KEYS + 1)] {
            std::fs::write(&path, wrong).unwrap();
            let error = file.refresh(&path).unwrap_err().to_string();
            assert!(error.contains("openssl rand -hex 32") && !error.contains(&new), "{error}");
        }
        std::fs::write(&path, format!("{new}\n").repeat(3_000)).unwrap();
        assert!(matches!(file.refresh(&path), Err(KeyFileError::TooLarge { .. })));
        assert!(file.now() == rotated);
    }
}
