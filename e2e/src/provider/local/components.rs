//! Starts components in their own session, namespaces and cgroup, and watches them come up.

use super::LocalError;
use super::cgroup::Cgroups;
use super::record::{Record, Started};
use crate::command::last_lines;
use crate::process::ProcessId;
use std::ffi::OsString;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Puts itself into the cgroups that it is given, up to `--`, then becomes the rest. The process id stays.
const ENTER_CGROUPS: &str = r#"while [ "$1" != -- ]; do echo $$ > "$1" || exit 1; shift; done; shift; exec "$@""#;

/// Where a component runs.
#[derive(Clone, Debug)]
pub enum Mounts {
    /// Shares this machine's mounts.
    Shared,
    /// In new ones; before it starts, these directories get an empty file system of their own.
    Private(Vec<PathBuf>),
    /// In those of another process.
    Of(ProcessId),
}

/// How to start a component.
#[derive(Debug)]
pub struct Component {
    /// Its name, and that of its log.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// The network namespace.
    pub network: PathBuf,
    /// The mounts.
    pub mounts: Mounts,
}

/// Starts a component and writes it down.
pub fn start(
    component: &Component,
    dir: &Path,
    cgroups: &Cgroups,
    record: &mut Record,
) -> Result<ProcessId, LocalError> {
    let log = log_file(dir, &component.name);
    let open = || std::fs::OpenOptions::new().create(true).append(true).open(&log).map_err(LocalError::file(&log));
    // A helper does not lead its process group, so `setsid` does not fork and the process id is that of the component.
    let mut command = tokio::process::Command::new("setsid");
    command.args(["sh", "-c", ENTER_CGROUPS, "sh"]).args(cgroups.system_procs()).arg("--");
    command.args(enter(component)).arg(&component.program).args(&component.args);
    // Components call iptables, mount, runc and more; the process that starts them may have an odd PATH.
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.stdin(Stdio::null()).stdout(open()?).stderr(open()?).current_dir("/");
    let spawn = |source| LocalError::Start { component: component.name.clone(), source };
    let child = command.spawn().map_err(spawn)?;
    let gone = || spawn(std::io::Error::other("it ended at once"));
    let process = child.id().and_then(ProcessId::of).ok_or_else(gone)?;
    record.processes.push(Started { component: component.name.clone(), process });
    record.write(dir)?;
    Ok(process)
}

fn enter(component: &Component) -> Vec<OsString> {
    let flag = |name: &str, path: &Path| {
        let mut flag = OsString::from(name);
        flag.push(path);
        flag
    };
    let mut line = vec!["nsenter".into(), flag("--net=", &component.network)];
    match &component.mounts {
        Mounts::Shared => line.push("--".into()),
        Mounts::Of(process) => {
            line.push(flag("--mount=", Path::new(&format!("/proc/{}/ns/mnt", process.pid))));
            line.push("--".into());
        }
        Mounts::Private(empty) => {
            // `unshare` without --fork becomes the program: still the same process.
            line.extend(["--", "unshare", "--mount", "--propagation", "private", "sh", "-c"].map(OsString::from));
            line.push(r#"while [ "$1" != -- ]; do mount -t tmpfs -o mode=755 tmpfs "$1" || exit 1; shift; done; shift; exec "$@""#.into());
            line.push("sh".into());
            line.extend(empty.iter().map(|dir| dir.as_os_str().to_owned()));
            line.push("--".into());
        }
    }
    line
}

/// Where a component's log is.
pub fn log_file(dir: &Path, component: &str) -> PathBuf {
    dir.join("log").join(format!("{component}.log"))
}

/// How long after a failure a component that is about to end may take to do so.
const ENDING: Duration = Duration::from_secs(1);

/// Waits for `step`, but not longer than all components run: one that ends is the error, with the end of its log, also
/// where `step` is the first to notice.
pub async fn while_all_run<T>(
    dir: &Path,
    record: &Record,
    step: impl Future<Output = Result<T, LocalError>>,
) -> Result<T, LocalError> {
    tokio::select! {
        done = step => match done {
            Err(error) => match tokio::time::timeout(ENDING, first_to_end(record)).await {
                Ok(dead) => Err(explain(dir, &dead, "ended")),
                Err(_) => Err(error),
            },
            done => done,
        },
        dead = first_to_end(record) => Err(explain(dir, &dead, "ended")),
    }
}

async fn first_to_end(record: &Record) -> String {
    loop {
        if let Some(dead) = record.processes.iter().find(|p| !p.process.alive()) {
            return dead.component.clone();
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Asks until `ready` says so; after `limit` the error holds the end of the component's log.
pub async fn wait_ready<F: Future<Output = bool>>(
    dir: &Path,
    component: &str,
    limit: Duration,
    ready: impl Fn() -> F,
) -> Result<(), LocalError> {
    let begin = Instant::now();
    while !ready().await {
        if begin.elapsed() > limit {
            return Err(explain(dir, component, &format!("was not ready after {} s", limit.as_secs())));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

fn explain(dir: &Path, component: &str, what: &str) -> LocalError {
    let log = log_file(dir, component);
    let text = std::fs::read(&log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    LocalError::Component { component: component.to_owned(), what: what.to_owned(), tail: last_lines(&text, 12), log }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::provider::local::plan::Plan;

    fn a_failure() -> Result<(), LocalError> {
        Err(LocalError::NoSuchNode { node: 7, nodes: 1 })
    }

    #[tokio::test]
    async fn a_component_that_ends_is_the_cause_of_what_fails_meanwhile() {
        let mut child = tokio::process::Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
        let process = ProcessId::of(child.id().unwrap()).unwrap();
        let processes = vec![Started { component: "kube-apiserver".into(), process }];
        let record = Record { plan: Plan { slot: 0 }, nodes: 1, ready: false, cut: Vec::new(), processes };
        let dir = tempfile::tempdir().unwrap();

        let failed = while_all_run(dir.path(), &record, async { a_failure() }).await.unwrap_err();
        assert!(matches!(failed, LocalError::NoSuchNode { .. }), "all run, so it is what it says: {failed}");

        let ends_after = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            child.kill().await.unwrap();
        };
        let (failed, ()) = tokio::join!(while_all_run(dir.path(), &record, async { a_failure() }), ends_after);
        let failed = failed.unwrap_err().to_string();
        assert!(failed.starts_with("kube-apiserver ended"), "{failed}");
    }
}
