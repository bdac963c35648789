//! Names for a process alone: what a headless Service's DNS is in a cluster, a file is here.

use super::LocalStackError;
use std::path::Path;
use std::process::Stdio;
use tokio::process::Command;

/// Its own mounts; who is not root becomes it inside, which gives no right over anything outside.
fn unshare() -> Command {
    let mut command = Command::new("unshare");
    command.arg("--mount");
    if !rustix::process::getuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command
}

/// What a process with names of its own runs first: its names in place of the machine's.
const BIND: &str = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";

/// Fails where this machine lets no process have names of its own: root may, and others where the kernel gives them user
/// namespaces.
pub async fn can_name() -> Result<(), LocalStackError> {
    let tried = naming(Path::new("/etc/hosts"), Path::new("true")).stdin(Stdio::null()).output().await;
    match tried {
        Ok(tried) if tried.status.success() => Ok(()),
        Ok(tried) => Err(LocalStackError::NoNames(String::from_utf8_lossy(&tried.stderr).trim().to_owned())),
        Err(error) => Err(LocalStackError::NoNames(error.to_string())),
    }
}

/// A command that runs `program` with `hosts` in place of `/etc/hosts`. What is written to that file later holds, too.
pub(super) fn naming(hosts: &Path, program: &Path) -> Command {
    let mut command = unshare();
    command.args(["sh", "-c", BIND, "sh"]).arg(hosts).arg(program);
    command
}
