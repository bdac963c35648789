//! Files that may change at any time, such as those of a mounted Secret.

use std::path::Path;
use tokio::io::AsyncReadExt;

/// What a file holds, or why it cannot be read.
pub type FileContent = Result<Vec<u8>, String>;

/// Reads a file, but no more than one byte more than `most`, so that one that is too large is known for it.
pub async fn read(path: &Path, most: usize) -> FileContent {
    let mut content = Vec::new();
    let read = async {
        let file = tokio::fs::File::open(path).await?;
        file.take(most as u64 + 1).read_to_end(&mut content).await
    };
    read.await.map_err(|error: std::io::Error| error.to_string())?;
    Ok(content)
}
