//! The file with the static tokens, read again when it changes.

use super::{
    Access,
    static_tokens::{MAX_FILE_BYTES, StaticTokens},
};
use crate::ofrep::files::{self, FileContent};
use std::path::PathBuf;
use tracing::{info, warn};

/// A file, and what was in it.
pub struct TokenFile {
    path: PathBuf,
    /// What it held last, or why it could not be read.
    last: Option<FileContent>,
}

impl TokenFile {
    /// This file; it is not read yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, last: None }
    }

    /// Reads it, and takes its tokens if it is other than it was. A file that cannot be used changes nothing: the tokens of the last
    /// good one stay.
    pub async fn look(&mut self, access: &Access) {
        let read = files::read(&self.path, MAX_FILE_BYTES).await;
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
}
