//! The images of the cluster itself: the sandbox and the DNS server.

use super::{Archive, Image, ImageError, Layer};
use crate::binaries::{Binaries, Tool};
use crate::checkout;
use crate::command::Run;
use crate::filelock::FileLock;
use std::path::Path;

/// Holds a pod's namespaces.
pub const PAUSE_IMAGE: &str = "localhost/ticketwave/pause:1";
/// The cluster's DNS server.
pub const COREDNS_IMAGE: &str = "localhost/ticketwave/coredns:1";

/// The sandbox image: a static C program that waits. Made once per cache.
pub async fn pause_image(cache: &Path) -> Result<Archive, ImageError> {
    let source = checkout::root().join("e2e/tools/pause/pause.c");
    let text = std::fs::read(&source).map_err(ImageError::file(&source))?;
    let path = cache.join(format!("pause-{}.tar", short_digest(&text)));
    let _lock = FileLock::acquire(&cache.join(".pause.lock"), || ()).await?;
    if let Ok(made) = Archive::open(&path) {
        return Ok(made);
    }
    let dir = tempfile::tempdir_in(cache).map_err(ImageError::file(cache))?;
    let program = dir.path().join("pause");
    let compile = Run::new("cc").words("-Os -static -s -o").arg(&program).arg(&source).run().await;
    compile.map_err(|source| ImageError::Build { image: PAUSE_IMAGE.into(), source })?;
    single_program(PAUSE_IMAGE, &program, "/pause", "65535:65535").write(&path)
}

/// CoreDNS. Made once per version and cache.
pub async fn coredns_image(cache: &Path, binaries: &Binaries) -> Result<Archive, ImageError> {
    let program = binaries.path(Tool::CoreDns).await?;
    let path = cache.join(format!("coredns-{}.tar", Tool::CoreDns.version()));
    let _lock = FileLock::acquire(&cache.join(".coredns.lock"), || ()).await?;
    if newer(&path, &program)
        && let Ok(made) = Archive::open(&path)
    {
        return Ok(made);
    }
    single_program(COREDNS_IMAGE, &program, "/coredns", "65532:65532").write(&path)
}

/// An image with one static program and nothing else.
pub(super) fn single_program(reference: &str, program: &Path, at: &str, user: &str) -> Image {
    let mut layer = Layer::default();
    layer.copy(program, at, 0o755);
    Image {
        reference: reference.to_owned(),
        layer,
        entrypoint: vec![at.to_owned()],
        user: user.to_owned(),
        ..Image::default()
    }
}

pub(super) fn newer(made: &Path, than: &Path) -> bool {
    let time = |path: &Path| std::fs::metadata(path).and_then(|m| m.modified()).ok();
    time(made).zip(time(than)).is_some_and(|(a, b)| a >= b)
}

pub(super) fn short_digest(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    crate::token::hex(&Sha256::digest(bytes)[..6])
}
