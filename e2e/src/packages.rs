//! Debian packages: says what is missing and why, installs it, and leaves no service running.

use crate::command::{CommandError, Run, find_program};
use crate::progress::Progress;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Packages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// Only root may install.
    #[error(
        "these Debian packages are missing: {missing}; run `apt-get install --no-install-recommends {missing}` as root, or run this as root"
    )]
    NotRoot {
        /// Their names.
        missing: String,
    },
    /// Not Debian.
    #[error(
        "these programs are missing: {missing} (names of Debian packages); there is no apt-get here, install them your system's way"
    )]
    NotDebian {
        /// Their names.
        missing: String,
    },
    /// apt-get failed.
    #[error("cannot install {missing}: {source}")]
    Install {
        /// Their names.
        missing: String,
        /// The failed command and the end of its output.
        source: CommandError,
    },
    /// apt-get was content, but what we need is not there.
    #[error("{package} was installed, but {wanted} is still missing; check `dpkg -L {package}`")]
    Incomplete {
        /// The package.
        package: &'static str,
        /// A file or program.
        wanted: &'static str,
    },
}

/// A package, why it is needed, and what shows that it is there.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    name: &'static str,
    why: &'static str,
    /// A path, in which one `*` may stand for a directory, or a program's name.
    shows: &'static str,
    /// The systemd units that Debian would start.
    units: &'static [&'static str],
}

/// etcd.
pub const ETCD: Package =
    Package { name: "etcd-server", why: "the API server's store", shows: "etcd", units: &["etcd"] };

/// What the local provider needs.
pub const LOCAL_CLUSTER: &[Package] = &[
    ETCD,
    Package { name: "containerd", why: "runs containers", shows: "containerd", units: &["containerd"] },
    Package { name: "runc", why: "starts containers", shows: "runc", units: &[] },
    Package {
        name: "containernetworking-plugins",
        why: "joins pods to the network",
        shows: "/usr/lib/cni/ptp",
        units: &[],
    },
    Package { name: "iptables", why: "Services (kube-proxy)", shows: "iptables", units: &[] },
    Package { name: "conntrack", why: "Services (kube-proxy)", shows: "conntrack", units: &[] },
    Package { name: "iproute2", why: "network namespaces", shows: "ip", units: &[] },
    Package { name: "util-linux", why: "nsenter, unshare, setpriv", shows: "nsenter", units: &[] },
];

/// What the PostgreSQL image is made of.
pub const POSTGRES_IMAGE: &[Package] = &[
    Package {
        // The distribution's own version: 15 on Debian 12, 16 on Ubuntu 24.04.
        name: "postgresql",
        why: "goes into the postgres image",
        shows: "/usr/lib/postgresql/*/bin/postgres",
        units: &["postgresql"],
    },
    Package { name: "busybox-static", why: "the shell in the postgres image", shows: "busybox", units: &[] },
    Package { name: "tzdata", why: "time zones in the postgres image", shows: "/usr/share/zoneinfo/UTC", units: &[] },
];

/// What the tests of the services need besides PostgreSQL.
pub const SERVICE_TESTS: &[Package] = &[Package {
    name: "pgbouncer",
    why: "stands before PostgreSQL in the tests of the services",
    shows: "pgbouncer",
    units: &["pgbouncer"],
}];

/// What programs with the SDKs of other languages need.
pub const SDK_CLIENTS: &[Package] = &[
    Package { name: "nodejs", why: "runs the JavaScript SDKs in the tests", shows: "node", units: &[] },
    Package { name: "npm", why: "installs the JavaScript SDKs", shows: "npm", units: &[] },
    Package { name: "python3-venv", why: "runs the Python SDK in the tests", shows: "python3", units: &[] },
    Package { name: "chromium", why: "runs the SDK for web pages in the tests", shows: "chromium", units: &[] },
];

impl Package {
    fn present(&self) -> bool {
        match self.shows.split_once('*') {
            Some((above, below)) => newest_in(above, below).is_some(),
            None if self.shows.starts_with('/') => Path::new(self.shows).exists(),
            None => find_program(self.shows).is_some(),
        }
    }
}

/// The directory in `above` with the highest number for a name that holds `below`.
pub fn newest_in(above: &str, below: &str) -> Option<u32> {
    let entries = std::fs::read_dir(above).ok()?.flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|number| Path::new(&format!("{above}{number}{below}")).exists()).max()
}

/// Installs those that are missing.
pub async fn ensure(packages: &[Package], progress: &Progress) -> Result<(), PackageError> {
    let missing: Vec<Package> = packages.iter().copied().filter(|p| !p.present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|p| p.name).collect();
    let list = names.join(" ");
    if find_program("apt-get").is_none() {
        return Err(PackageError::NotDebian { missing: list });
    }
    if !rustix::process::geteuid().is_root() {
        return Err(PackageError::NotRoot { missing: list });
    }
    progress.say("Debian packages are needed:");
    for package in &missing {
        progress.say(format!("  {:<28} {}", package.name, package.why));
    }
    install(&names, &missing, progress).await.map_err(|source| PackageError::Install { missing: list, source })?;
    match missing.iter().find(|p| !p.present()) {
        Some(p) => Err(PackageError::Incomplete { package: p.name, wanted: p.shows }),
        None => Ok(()),
    }
}

async fn install(names: &[&str], missing: &[Package], progress: &Progress) -> Result<(), CommandError> {
    // The package lists of a fresh machine or container are empty or old.
    if Run::new("apt-get").words("install --simulate --no-install-recommends").args(names).run().await.is_err() {
        progress.during("apt-get update", Run::new("apt-get").words("update -qq").run()).await?;
    }
    let _no_start = NoServiceStarts::guard();
    let install = |names: Vec<String>| {
        Run::new("apt-get")
            .words("install --yes -qq --no-install-recommends -o DPkg::Lock::Timeout=120")
            .args(names)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .run()
    };
    let all = || names.iter().map(ToString::to_string).collect::<Vec<_>>();
    if progress.during("apt-get install", install(all())).await.is_err() {
        // An old package list names files that the mirror has replaced.
        progress.during("apt-get update", Run::new("apt-get").words("update -qq").run()).await?;
        progress.during("apt-get install", install(all())).await?;
    }
    if Path::new("/run/systemd/system").is_dir() {
        for unit in missing.iter().flat_map(|p| p.units) {
            // Nothing of ours may run as a service; a unit that does not exist is fine.
            let _ = Run::new("systemctl").args(["disable", "--now", unit]).run().await;
        }
    }
    Ok(())
}

/// While it lives, Debian's installer starts no service; leaves an existing policy alone.
struct NoServiceStarts(bool);

impl NoServiceStarts {
    const POLICY: &'static str = "/usr/sbin/policy-rc.d";

    fn guard() -> Self {
        let file = std::fs::OpenOptions::new().create_new(true).write(true).mode(0o755).open(Self::POLICY);
        Self(file.and_then(|mut f| f.write_all(b"#!/bin/sh\nexit 101\n")).is_ok())
    }
}

impl Drop for NoServiceStarts {
    fn drop(&mut self) {
        if self.0 {
            let _ = std::fs::remove_file(Self::POLICY);
        }
    }
}
