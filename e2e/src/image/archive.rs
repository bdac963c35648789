//! Docker archives: one image, one layer, no engine.

use super::{ImageError, Layer};
use crate::token::hex;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// What an image holds and how it is run.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Name and tag, such as `localhost/ticketwave/postgres:15`.
    pub reference: String,
    /// Its files.
    pub layer: Layer,
    /// The program and its fixed arguments.
    pub entrypoint: Vec<String>,
    /// Arguments that a pod may replace.
    pub command: Vec<String>,
    /// Environment, as `NAME=value`.
    pub env: Vec<String>,
    /// Numeric user and group, as `uid:gid`.
    pub user: String,
    /// The signal that asks it to stop, if not SIGTERM.
    pub stop_signal: Option<String>,
}

/// An image written to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// The file.
    pub path: PathBuf,
    /// Digest of the image's configuration, which covers its content: 64 hexadecimal digits.
    pub digest: String,
    /// Every name of the image; the last carries the digest in its tag.
    pub references: Vec<String>,
}

impl Archive {
    /// The name whose tag changes with the content: use it in a Deployment, so that new content rolls it.
    pub fn pinned(&self) -> &str {
        self.references.last().map_or("", String::as_str)
    }

    /// Reads the names and the digest from an archive.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let bad = |reason: &str| ImageError::NotAnArchive { path: path.to_owned(), reason: reason.to_owned() };
        let file = std::fs::File::open(path).map_err(ImageError::file(path))?;
        let mut tar = tar::Archive::new(file);
        for entry in tar.entries().map_err(ImageError::file(path))? {
            let mut entry = entry.map_err(ImageError::file(path))?;
            if entry.path().is_ok_and(|p| p.as_ref() == Path::new("manifest.json")) {
                let mut text = String::new();
                entry.read_to_string(&mut text).map_err(ImageError::file(path))?;
                let manifest: Value = serde_json::from_str(&text).map_err(|e| bad(&e.to_string()))?;
                let config =
                    manifest[0]["Config"].as_str().ok_or_else(|| bad("its manifest names no configuration"))?;
                let tags = manifest[0]["RepoTags"].as_array().ok_or_else(|| bad("its manifest names no tags"))?;
                let references = tags.iter().filter_map(|t| t.as_str().map(str::to_owned)).collect();
                let digest = config.trim_end_matches(".json").rsplit('/').next().unwrap_or_default().to_owned();
                return Ok(Self { path: path.to_owned(), digest, references });
            }
        }
        Err(bad("it holds no manifest.json"))
    }
}

impl Image {
    /// Writes the archive to `path`, complete or not at all.
    pub fn write(&self, path: &Path) -> Result<Archive, ImageError> {
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir).map_err(ImageError::file(dir))?;
        let mut layer = Hashing {
            inner: tempfile::tempfile_in(dir).map_err(ImageError::file(dir))?,
            digest: Sha256::new(),
            size: 0,
        };
        self.layer.write(&mut layer)?;
        let Hashing { inner: mut layer, digest, size } = layer;
        let layer_digest = hex(&digest.finalize());
        layer.rewind().map_err(ImageError::file(path))?;

        let config = self.config(&layer_digest).to_string();
        let digest = hex(&Sha256::digest(config.as_bytes()));
        let references = vec![self.reference.clone(), format!("{}-{}", self.reference, &digest[..12])];
        let manifest = json!([{
            "Config": format!("{digest}.json"),
            "RepoTags": references,
            "Layers": [format!("{layer_digest}/layer.tar")],
        }])
        .to_string();

        let fresh = tempfile::NamedTempFile::new_in(dir).map_err(ImageError::file(dir))?;
        let mut tar = tar::Builder::new(std::io::BufWriter::new(fresh));
        for (name, bytes) in
            [("manifest.json".to_owned(), manifest.as_bytes()), (format!("{digest}.json"), config.as_bytes())]
        {
            tar.append_data(&mut header(bytes.len() as u64), name, bytes).map_err(ImageError::file(path))?;
        }
        tar.append_data(&mut header(size), format!("{layer_digest}/layer.tar"), layer)
            .map_err(ImageError::file(path))?;
        let buffered = tar.into_inner().map_err(ImageError::file(path))?;
        let fresh = buffered.into_inner().map_err(|e| ImageError::file(path)(e.into_error()))?;
        readable_by_all(fresh.path()).map_err(ImageError::file(path))?;
        fresh.persist(path).map_err(|e| ImageError::file(path)(e.error))?;
        Ok(Archive { path: path.to_owned(), digest, references })
    }

    fn config(&self, layer_digest: &str) -> Value {
        let architecture = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
        let mut config = json!({"Env": self.env, "Entrypoint": self.entrypoint, "User": self.user, "WorkingDir": "/"});
        if !self.command.is_empty() {
            config["Cmd"] = json!(self.command);
        }
        if let Some(signal) = &self.stop_signal {
            config["StopSignal"] = json!(signal);
        }
        json!({
            "architecture": architecture,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_digest}")]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "ticketwave-e2e images"}],
        })
    }
}

/// Temporary files are private; other users load images, too.
fn readable_by_all(file: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644))
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    header
}

/// Writes through and hashes.
struct Hashing<W> {
    inner: W,
    digest: Sha256,
    size: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.digest.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Entry;

    fn sample(order: &[&str]) -> Image {
        let mut layer = Layer::default();
        for name in order {
            layer.add(name, Entry::Text { text: format!("I am {name}"), mode: 0o644 });
        }
        layer.add("/bin/sh", Entry::Link { to: "busybox".into() });
        Image { reference: "localhost/t/sample:1".into(), layer, entrypoint: vec!["/a".into()], ..Image::default() }
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let one = sample(&["/etc/x/a", "/b"]).write(&dir.path().join("1.tar")).unwrap();
        let two = sample(&["/b", "/etc/x/a"]).write(&dir.path().join("2.tar")).unwrap();
        assert_eq!(std::fs::read(&one.path).unwrap(), std::fs::read(&two.path).unwrap());
        assert_eq!(one.digest, two.digest);
    }

    #[test]
    fn other_content_gives_another_digest_and_pinned_name() {
        let dir = tempfile::tempdir().unwrap();
        let one = sample(&["/a"]).write(&dir.path().join("1.tar")).unwrap();
        let two = sample(&["/a", "/b"]).write(&dir.path().join("2.tar")).unwrap();
        assert_ne!(one.pinned(), two.pinned());
        assert_eq!(one.references[0], two.references[0]);
        assert!(one.pinned().starts_with("localhost/t/sample:1-"), "{}", one.pinned());
    }

    #[test]
    fn an_archive_tells_its_names_and_digest() {
        let dir = tempfile::tempdir().unwrap();
        let written = sample(&["/a"]).write(&dir.path().join("1.tar")).unwrap();
        assert_eq!(Archive::open(&written.path).unwrap(), written);
    }

    #[test]
    fn something_else_is_not_an_archive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tar");
        std::fs::write(&path, [0_u8; 1024]).unwrap();
        assert!(Archive::open(&path).unwrap_err().to_string().contains("manifest.json"));
    }

    #[test]
    fn directories_above_come_first() {
        let mut bytes = Vec::new();
        sample(&["/etc/x/a"]).layer.write(&mut bytes).unwrap();
        let mut tar = tar::Archive::new(bytes.as_slice());
        let names: Vec<String> =
            tar.entries().unwrap().map(|e| e.unwrap().path().unwrap().display().to_string()).collect();
        assert_eq!(names, ["bin/", "bin/sh", "etc/", "etc/x/", "etc/x/a"]);
    }
}
