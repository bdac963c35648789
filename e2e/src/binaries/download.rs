//! Official release binaries, checked against the published checksum.

use super::Tool;
use crate::command::{CommandError, Run, find_program};
use crate::token::hex;
use sha2::{Digest, Sha256};
use std::io::Read;
use std::path::Path;

/// A release could not be downloaded; not an error for the caller, who then builds from source.
#[derive(Debug, thiserror::Error)]
pub(super) enum DownloadError {
    #[error("curl is not installed")]
    NoCurl,
    #[error("{host} does not answer")]
    Unreachable { host: &'static str },
    #[error("{0}")]
    Transfer(#[from] CommandError),
    #[error("the checksum of {url} is {found}, published is {wanted}")]
    Checksum { url: String, found: String, wanted: String },
    #[error("cannot read the download: {0}")]
    Read(#[from] std::io::Error),
}

impl DownloadError {
    /// Whether the next download would fail for the same reason.
    pub(super) fn is_network(&self) -> bool {
        matches!(self, Self::NoCurl | Self::Unreachable { .. })
    }
}

struct Release {
    host: &'static str,
    url: String,
    checksum_url: String,
    /// The path inside the archive, unless the download is the program itself.
    member: Option<String>,
}

fn release(tool: Tool) -> Release {
    let arch = if std::env::consts::ARCH == "aarch64" { "arm64" } else { "amd64" };
    let (program, version) = (tool.program(), tool.version());
    match tool {
        Tool::Helm => {
            let url = format!("https://get.helm.sh/helm-{version}-linux-{arch}.tar.gz");
            Release {
                host: "get.helm.sh",
                checksum_url: format!("{url}.sha256sum"),
                url,
                member: Some(format!("linux-{arch}/helm")),
            }
        }
        Tool::Kind => {
            let url = format!("https://github.com/kubernetes-sigs/kind/releases/download/{version}/kind-linux-{arch}");
            Release { host: "github.com", checksum_url: format!("{url}.sha256sum"), url, member: None }
        }
        Tool::CoreDns => {
            let number = version.trim_start_matches('v');
            let url = format!(
                "https://github.com/coredns/coredns/releases/download/{version}/coredns_{number}_linux_{arch}.tgz"
            );
            Release { host: "github.com", checksum_url: format!("{url}.sha256"), url, member: Some("coredns".into()) }
        }
        _ => {
            let url = format!("https://dl.k8s.io/release/{version}/bin/linux/{arch}/{program}");
            Release { host: "dl.k8s.io", checksum_url: format!("{url}.sha256"), url, member: None }
        }
    }
}

/// Downloads to `fresh`.
pub(super) async fn fetch(tool: Tool, fresh: &Path) -> Result<(), DownloadError> {
    let curl = find_program("curl").ok_or(DownloadError::NoCurl)?;
    let release = release(tool);
    let get = || {
        Run::new(&curl).words("--silent --show-error --fail --location --connect-timeout 3 --speed-limit 20000 --speed-time 10 --max-time 900")
    };
    // The small file first: it shows at once whether the host can be reached.
    let published = get().args(["--max-time", "6"]).arg(&release.checksum_url).output().await;
    let published = published.map_err(|_| DownloadError::Unreachable { host: release.host })?;
    let wanted = published.split_whitespace().next().unwrap_or_default().to_lowercase();
    let part = fresh.with_extension("part");
    get().arg("--output").arg(&part).arg(&release.url).run().await?;
    let found = sha256(&part)?;
    if found != wanted {
        std::fs::remove_file(&part)?;
        return Err(DownloadError::Checksum { url: release.url, found, wanted });
    }
    let Some(member) = release.member else {
        std::fs::rename(&part, fresh)?;
        return Ok(());
    };
    let dir = tempfile::tempdir_in(fresh.parent().unwrap_or(Path::new(".")))?;
    Run::new("tar").arg("-xzf").arg(&part).arg("-C").arg(dir.path()).arg(&member).run().await?;
    std::fs::rename(dir.path().join(&member), fresh)?;
    std::fs::remove_file(&part)?;
    Ok(())
}

fn sha256(file: &Path) -> std::io::Result<String> {
    let mut file = std::fs::File::open(file)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0_u8; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&digest.finalize())),
            n => digest.update(&buffer[..n]),
        }
    }
}
