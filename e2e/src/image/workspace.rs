//! Images of this workspace's own programs: one static binary, nothing else, not root.

use super::system::single_program;
use super::{Archive, Image, ImageError};
use crate::checkout;
use crate::command::Run;
use crate::progress::Progress;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Image name, package and binary of each program that runs in the cluster.
pub const IMAGE_BINARIES: &[(&str, &str, &str)] = &[
    ("resilience-operator", "resilience-operator", "resilience-operator"),
    ("workloads", "ticketing-services", "ticketing"),
];

/// `localhost/ticketwave/NAME:dev` with one static binary, user 65532.
pub fn workspace_image(name: &str, binary: &Path) -> Result<Image, ImageError> {
    if !is_static(binary)? {
        return Err(ImageError::NotStatic { path: binary.to_owned() });
    }
    let at = format!("/{}", binary.file_name().unwrap_or_default().to_string_lossy());
    let reference = format!("localhost/ticketwave/{name}:dev");
    Ok(single_program(&reference, binary, &at, "65532:65532"))
}

/// Builds the workspace's programs as static release binaries and writes their images to `dir`.
pub async fn build_workspace_images(dir: &Path, progress: &Progress) -> Result<Vec<Archive>, ImageError> {
    let root = checkout::root();
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let what = "building the operator and the services (release, static)";
    progress.during(what, build_images(&root, &target, dir)).await
}

/// Builds the programs of the workspace in `source` in the target directory `target`, and writes their images to `dir`.
pub(crate) async fn build_images(source: &Path, target: &Path, dir: &Path) -> Result<Vec<Archive>, ImageError> {
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // With a target triple cargo keeps these flags away from build scripts and the host's own builds.
    let mut build = Run::new(cargo).words("build --release --quiet --target").arg(&triple).dir(source);
    build = build.env("RUSTFLAGS", "-C target-feature=+crt-static");
    build = build.env("CARGO_TARGET_DIR", target.to_string_lossy());
    // What cargo tells a program that it runs about that program's package would make build scripts run again, and
    // with them half of the dependencies be built again, whenever this is called another way.
    build = build.without_env(&["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_", "LD_LIBRARY_PATH"]);
    for (_, package, _) in IMAGE_BINARIES {
        build = build.args(["-p", package]);
    }
    let image = || IMAGE_BINARIES.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(" and ");
    build.run().await.map_err(|source| ImageError::Build { image: image(), source })?;
    let mut archives = Vec::new();
    for (name, _, binary) in IMAGE_BINARIES {
        let binary = target.join(&triple).join("release").join(binary);
        archives.push(workspace_image(name, &binary)?.write(&dir.join(format!("{name}.tar")))?);
    }
    Ok(archives)
}

/// A static ELF program names no interpreter.
fn is_static(binary: &Path) -> Result<bool, ImageError> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(binary).map_err(ImageError::file(binary))?;
    file.take(1 << 16).read_to_end(&mut bytes).map_err(ImageError::file(binary))?;
    Ok(!has_interpreter(&bytes))
}

/// Looks for a `PT_INTERP` program header in a 64-bit little-endian ELF file.
fn has_interpreter(elf: &[u8]) -> bool {
    let number = |at: usize, size: usize| -> usize {
        elf.get(at..at + size).map_or(0, |b| b.iter().rev().fold(0, |sum, byte| sum << 8 | usize::from(*byte)))
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    elf.starts_with(b"\x7fELF") && (0..count).any(|i| number(table + i * size, 4) == 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_refused() {
        let error = workspace_image("x", Path::new("/bin/ls")).unwrap_err().to_string();
        assert!(error.contains("crt-static"), "{error}");
    }
}
