//! Where this checkout, its caches and its cluster are.

use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// The directory that holds the workspace's Cargo.toml: above the current directory, or where this program was built.
pub fn root() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    let is_root = |dir: &Path| dir.join("e2e/tools/kubernetes/go.mod").is_file();
    if let Some(found) = here.ancestors().find(|dir| is_root(dir)) {
        return found.to_owned();
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    built.parent().unwrap_or(built).to_owned()
}

/// `~/.cache/ticketwave`, or what `XDG_CACHE_HOME` says.
pub fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    base.unwrap_or_else(home).join("ticketwave")
}

/// A cluster name that differs between two checkouts on one machine.
pub fn cluster_name() -> String {
    name_for(&root())
}

fn name_for(root: &Path) -> String {
    let dir = root.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let short: String = dir.chars().filter(char::is_ascii_alphanumeric).take(10).collect();
    let digest = Sha256::digest(root.as_os_str().as_encoded_bytes());
    format!(
        "{}{:02x}{:02x}{:02x}",
        if short.is_empty() { "t".into() } else { short + "-" },
        digest[0],
        digest[1],
        digest[2]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_differ_by_path() {
        let a = name_for(Path::new("/home/a/Ticket Wave"));
        let b = name_for(Path::new("/home/b/Ticket Wave"));
        assert!(a.starts_with("ticketwave-") && a.len() <= 17, "{a}");
        assert_ne!(a, b);
    }
}
