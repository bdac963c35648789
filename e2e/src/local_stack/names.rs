//! Names for a process alone: what a headless Service's DNS is in a cluster, a file is here.

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

/// Whether this machine lets a process have names of its own: root may, and others where the kernel gives them user namespaces.
pub async fn can_name() -> bool {
    let tried = unshare().arg("true").stdout(Stdio::null()).stderr(Stdio::null()).status().await;
    tried.is_ok_and(|status| status.success())
}

/// A command that runs `program` with `hosts` in place of `/etc/hosts`. What is written to that file later holds, too.
pub(super) fn naming(hosts: &Path, program: &Path) -> Command {
    let mut command = unshare();
    let script = "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"";
    command.args(["sh", "-c", script, "sh"]).arg(hosts).arg(program);
    command
}
