//! A PostgreSQL of its own, in a temporary folder.

use super::child::Running;
use super::{LocalStackError, START_TIMEOUT, STOP_TIMEOUT};
use rustix::process::Signal;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// `nobody` and its group on Debian: PostgreSQL refuses to run as root.
const NOBODY: (u32, u32) = (65_534, 65_534);

/// The server and its data.
pub(super) struct Postgres {
    programs: PathBuf,
    home: PathBuf,
    port: u16,
    show: bool,
    server: Option<Running>,
}

impl Postgres {
    /// Makes an empty data directory in `home` and starts a server on it.
    pub(super) async fn create(home: &Path, port: u16, show: bool) -> Result<Self, LocalStackError> {
        let installed = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let mut found: Vec<_> = installed.map(|entry| entry.path().join("bin")).collect();
        found.retain(|programs| programs.join("initdb").exists() && programs.join("postgres").exists());
        found.sort();
        let programs = found.pop().ok_or(LocalStackError::NoPostgres)?;
        let file = |source| LocalStackError::File { path: home.to_owned(), source };
        std::fs::create_dir(home).map_err(file)?;
        std::fs::set_permissions(home, std::fs::Permissions::from_mode(0o700)).map_err(file)?;
        if is_root() {
            chown(home, Some(NOBODY.0), Some(NOBODY.1)).map_err(file)?;
        }
        let start = |source| LocalStackError::Start { what: "PostgreSQL".into(), source };
        let made = unprivileged(&programs.join("initdb"), home)
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"])
            .arg(home.join("data"))
            .output()
            .await
            .map_err(start)?;
        if !made.status.success() {
            let output = String::from_utf8_lossy(&made.stderr).into_owned();
            return Err(LocalStackError::Program { program: "initdb", output });
        }
        // In its file and not among its arguments, so that it can be changed: what is measured there has to wait for the disk.
        let path = home.join("data/postgresql.conf");
        let file = OpenOptions::new().append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(b"fsync = off\n"));
        written.map_err(|source| LocalStackError::File { path, source })?;
        let mut postgres = Self { programs, home: home.to_owned(), port, show, server: None };
        postgres.start().await?;
        Ok(postgres)
    }

    /// Starts the server on its data, and waits until it answers. The services would come up without it, and say so at
    /// length.
    pub(super) async fn start(&mut self) -> Result<(), LocalStackError> {
        let port = self.port.to_string();
        let mut command = unprivileged(&self.programs.join("postgres"), &self.home);
        command.arg("-D").arg(self.home.join("data")).arg("-k").arg(&self.home).args(["-p", &port]);
        command.args(["-c", "listen_addresses=127.0.0.1", "-c", "log_min_messages=fatal"]);
        let mut server = Running::start("postgres", command, self.show)?;
        let begin = Instant::now();
        let ask =
            || Command::new(self.programs.join("pg_isready")).args(["-q", "-h", "127.0.0.1", "-p", &port]).status();
        while !ask().await.is_ok_and(|status| status.success()) {
            server.check()?;
            if begin.elapsed() > START_TIMEOUT {
                return Err(LocalStackError::NotReady { what: "PostgreSQL".into(), tail: server.tail() });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.server = Some(server);
        Ok(())
    }

    /// Ends the server at once, as a crash does; its data stay.
    pub(super) async fn crash(&mut self) {
        if let Some(mut server) = self.server.take() {
            if let Some(process) = server.process() {
                process.signal(Signal::QUIT);
                process.stop(STOP_TIMEOUT).await;
            }
            // Only to leave no zombie behind.
            let _ = server.child.wait().await;
        }
    }

    /// Fails if the server has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), LocalStackError> {
        self.server.iter_mut().try_for_each(Running::check)
    }
}

/// A command that runs as `nobody` if we are root.
fn unprivileged(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(directory).stdin(Stdio::null()).process_group(0);
    if is_root() {
        command.uid(NOBODY.0).gid(NOBODY.1);
    }
    command
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}
