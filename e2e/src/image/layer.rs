//! The one layer of an image: files in sorted order, times zero.

use super::ImageError;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// One thing in the image's file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory with its mode and owner.
    Dir {
        /// Permission bits.
        mode: u32,
        /// Owner and group.
        uid: u64,
    },
    /// A file copied from this machine.
    Copy {
        /// Where it is here.
        from: PathBuf,
        /// Permission bits.
        mode: u32,
    },
    /// A file with this text.
    Text {
        /// What it holds.
        text: String,
        /// Permission bits.
        mode: u32,
    },
    /// A symbolic link.
    Link {
        /// Where it points.
        to: String,
    },
}

/// The files of an image by absolute path.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    entries: BTreeMap<String, Entry>,
}

impl Layer {
    /// Adds an entry, and the directories above it.
    pub fn add(&mut self, path: &str, entry: Entry) {
        let path = path.trim_matches('/').to_owned();
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert(Entry::Dir { mode: 0o755, uid: 0 });
        }
        self.entries.insert(path, entry);
    }

    /// Adds a copy of a file.
    pub fn copy(&mut self, from: &Path, to: &str, mode: u32) {
        self.add(to, Entry::Copy { from: from.to_owned(), mode });
    }

    /// Adds copies of a whole directory at the same place, keeping symbolic links; `keep` decides per path.
    pub fn copy_tree(&mut self, dir: &Path, keep: &dyn Fn(&Path) -> bool) -> Result<(), ImageError> {
        for item in std::fs::read_dir(dir).map_err(ImageError::file(dir))? {
            let path = item.map_err(ImageError::file(dir))?.path();
            if !keep(&path) {
                continue;
            }
            let meta = std::fs::symlink_metadata(&path).map_err(ImageError::file(&path))?;
            let name = path.to_string_lossy().into_owned();
            if meta.is_dir() {
                self.add(&name, Entry::Dir { mode: 0o755, uid: 0 });
                self.copy_tree(&path, keep)?;
            } else if meta.is_symlink() {
                let to = std::fs::read_link(&path).map_err(ImageError::file(&path))?;
                self.add(&name, Entry::Link { to: to.to_string_lossy().into_owned() });
            } else if meta.is_file() {
                use std::os::unix::fs::PermissionsExt;
                self.copy(&path, &name, meta.permissions().mode() & 0o755);
            }
        }
        Ok(())
    }

    /// Whether the path is there.
    pub fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_matches('/'))
    }

    /// Writes the layer as a tar stream.
    pub fn write(&self, out: impl Write) -> Result<(), ImageError> {
        let mut tar = tar::Builder::new(out);
        for (path, entry) in &self.entries {
            let mut header = tar::Header::new_gnu();
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            header.set_size(0);
            let fail = ImageError::file(path);
            match entry {
                Entry::Dir { mode, uid } => {
                    header.set_entry_type(tar::EntryType::Directory);
                    header.set_mode(*mode);
                    header.set_uid(*uid);
                    header.set_gid(*uid);
                    tar.append_data(&mut header, format!("{path}/"), std::io::empty()).map_err(fail)?;
                }
                Entry::Copy { from, mode } => {
                    let file = std::fs::File::open(from).map_err(ImageError::file(from))?;
                    header.set_size(file.metadata().map_err(ImageError::file(from))?.len());
                    header.set_mode(*mode);
                    tar.append_data(&mut header, path, file).map_err(fail)?;
                }
                Entry::Text { text, mode } => {
                    header.set_size(text.len() as u64);
                    header.set_mode(*mode);
                    tar.append_data(&mut header, path, text.as_bytes()).map_err(fail)?;
                }
                Entry::Link { to } => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_mode(0o777);
                    tar.append_link(&mut header, path, to).map_err(fail)?;
                }
            }
        }
        tar.finish().map_err(ImageError::file("the layer"))
    }
}
