//! The operators that are measured: how they are started, and what is known of the process.

use super::usage;
use crate::apiserver::{ApiServerError, spawn_child};
use crate::process::ProcessId;
use rustix::process::Signal;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

/// An operator to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its name in the report.
    pub name: String,
    /// A shell command; `{identity}`, `{port}` and `{port2}` are replaced, and `KUBECONFIG` is set.
    pub command: String,
}

impl Contender {
    /// Our own operator, or another build of it.
    pub fn operator(name: &str, binary: &Path) -> Self {
        let binary = binary.display().to_string().replace('\'', r"'\''");
        let command =
            format!("'{binary}' --namespace resilience-system --listen 127.0.0.1:{{port}} --identity {{identity}}");
        Self { name: name.to_owned(), command }
    }

    /// An operator that somebody else's command starts.
    pub fn peer(command: &str) -> Self {
        Self { name: "peer".to_owned(), command: command.to_owned() }
    }

    fn line(&self, identity: &str, ports: [u16; 2]) -> String {
        let [port, port2] = ports.map(|port| port.to_string());
        self.command.replace("{identity}", identity).replace("{port}", &port).replace("{port2}", &port2)
    }

    /// Starts it. The log goes to `dir`.
    pub fn start(&self, identity: &str, kubeconfig: &Path, dir: &Path) -> Result<OperatorProcess, ApiServerError> {
        let what = "start the operator";
        let io = |source| ApiServerError::Io { what, source };
        let hold = || TcpListener::bind(("127.0.0.1", 0));
        let held = [hold().map_err(io)?, hold().map_err(io)?];
        let [first, second] = held.each_ref().map(TcpListener::local_addr);
        let ports = [first.map_err(io)?.port(), second.map_err(io)?.port()];
        drop(held);
        std::fs::create_dir_all(dir).map_err(io)?;
        let log = dir.join(format!("{}-{identity}.log", self.name.replace(['/', ' '], "-")));
        // env and the shell become the command, so the process id is the operator's own.
        let args = vec![
            format!("KUBECONFIG={}", kubeconfig.display()),
            "sh".to_owned(),
            "-c".to_owned(),
            format!("exec {}", self.line(identity, ports)),
        ];
        let child = spawn_child(Path::new("env"), args, &log)?;
        let id = ProcessId::of(child.id());
        Ok(OperatorProcess { child, id, log })
    }
}

/// A running operator. It ends when the value is dropped.
pub struct OperatorProcess {
    child: Child,
    id: Option<ProcessId>,
    log: PathBuf,
}

impl OperatorProcess {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time since its start; none if it has ended.
    pub fn cpu(&self) -> Duration {
        usage::cpu(self.pid()).unwrap_or_default()
    }

    /// Its memory; `None` if it has ended.
    pub fn memory(&self) -> Option<usage::Memory> {
        usage::memory(self.pid())
    }

    /// Why it is not running, if it is not: how it ended, and the last lines of its log.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        Some(format!(
            "the operator ended ({status}); the end of {}:\n{}",
            self.log.display(),
            crate::command::last_lines(&log, 5)
        ))
    }

    /// Ends it as a crash does.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(id) = self.id {
            id.signal(Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for OperatorProcess {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_gets_its_ports_and_its_name() {
        let peer = Contender::peer("./peer -metrics :{port} -probes :{port2} -id {identity}");
        assert_eq!(peer.line("b", [1, 2]), "./peer -metrics :1 -probes :2 -id b");
        let ours = Contender::operator("operator", Path::new("/a b/operator"));
        let line = ours.line("a", [8, 9]);
        assert!(line.starts_with("'/a b/operator' ") && line.ends_with("--listen 127.0.0.1:8 --identity a"), "{line}");
    }

    #[tokio::test]
    async fn it_is_the_command_itself_that_is_watched_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let sleeper = Contender::peer("sleep 60");
        let mut process = sleeper.start("a", Path::new("/none"), dir.path()).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let name = || std::fs::read_to_string(format!("/proc/{}/comm", process.pid())).unwrap_or_default();
        while name().trim() != "sleep" {
            assert!(std::time::Instant::now() < deadline, "{} runs", name());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(process.ended().is_none() && process.memory().is_some());
        let id = process.id.unwrap();
        drop(process);
        assert!(!id.alive());
    }

    #[tokio::test]
    async fn a_command_that_ends_is_told_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let broken = Contender::peer("sh -c 'echo no such flag; exit 3'");
        let mut process = broken.start("a", Path::new("/none"), dir.path()).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let told = loop {
            if let Some(told) = process.ended() {
                break told;
            }
            assert!(std::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        assert!(told.contains("exit status: 3") && told.ends_with("no such flag"), "{told}");
    }
}
