//! The file with the static tokens, read again when it changes.

use super::{
    Access,
    static_tokens::{MAX_FILE_BYTES, StaticTokens},
};
use std::path::PathBuf;
use tokio::io::AsyncReadExt;
use tracing::{info, warn};

/// A file, and what was in it.
pub struct TokenFile {
    path: PathBuf,
    /// What it held last, or why it could not be read.
    last: Option<Result<Vec<u8>, String>>,
}

impl TokenFile {
    /// This file; it is not read yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, last: None }
    }

    /// Reads it, and takes its tokens if it is other than it was. A file that cannot be used changes nothing: the tokens of the last
    /// good one stay.
    pub async fn look(&mut self, access: &Access) {
        let read = self.read().await.map_err(|error| error.to_string());
        if self.last.as_ref() == Some(&read) {
            return;
        }
        let parsed = match &read {
            Ok(content) => StaticTokens::parse(content).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        let file = self.path.display();
        match parsed {
            Ok(tokens) => {
                info!(%file, tokens = tokens.len(), "static tokens read");
                access.set_static_tokens(tokens);
            }
            Err(error) => {
                warn!(%file, %error, "the static tokens cannot be read; those that were read before stay");
            }
        }
        self.last = Some(read);
    }

    /// What the file holds, but no more than one byte more than is allowed.
    async fn read(&self) -> std::io::Result<Vec<u8>> {
        let mut content = Vec::new();
        let file = tokio::fs::File::open(&self.path).await?;
        file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut content).await?;
        Ok(content)
    }
}
