//! The operator's program in a process of its own: what it takes of memory is its own alone.

use super::{World, eventually};
use e2e::{checkout, command::Run};
use std::{
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
};
use tokio::sync::OnceCell;

/// A running program; it ends with this value.
pub struct OperatorProcess {
    child: Child,
    listen: String,
    _kubeconfig: tempfile::NamedTempFile,
}

impl Drop for OperatorProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What cargo tells the tests about their own package would make build scripts run again.
const OWN: [&str; 5] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_", "LD_LIBRARY_PATH"];

/// Builds the program as the tests were built, and says where it is.
async fn program() -> PathBuf {
    static BUILT: OnceCell<PathBuf> = OnceCell::const_new();
    let build = || async {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let build = Run::new(cargo).words("build --quiet --workspace --bin resilience-operator").dir(&checkout::root());
        build.without_env(&OWN).run().await.unwrap();
        // The tests are in `deps` beside it.
        let tests = std::env::current_exe().unwrap();
        tests.parent().unwrap().parent().unwrap().join("resilience-operator")
    };
    BUILT.get_or_init(build).await.clone()
}

impl OperatorProcess {
    /// Starts it for the world's namespace, with few files that it may open, and waits until it leads.
    pub async fn start(world: &World) -> Self {
        let program = program().await;
        let mut kubeconfig = tempfile::NamedTempFile::new().unwrap();
        kubeconfig.write_all(world.operator_kubeconfig().to_string().as_bytes()).unwrap();
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let listen = free.local_addr().unwrap().to_string();
        drop(free);
        let child = Command::new("sh")
            .args(["-c", "ulimit -S -n 128 && exec \"$0\" \"$@\""])
            .arg(program)
            .args(["--watch-namespaces", &world.watched, "--namespace", &world.home, "--listen", &listen])
            .args(["--lease-duration", "3s", "--log-level", "off"])
            .env("KUBECONFIG", kubeconfig.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let started = Self { child, listen, _kubeconfig: kubeconfig };
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        eventually("the operator's process leads", async || {
            let answer = client.get(format!("http://{}/metrics", started.listen)).send().await;
            let text = answer.map_err(|error| error.to_string())?.text().await.map_err(|error| error.to_string())?;
            if text.contains("resilience_operator_leader 1") { Ok(()) } else { Err("it does not lead".to_owned()) }
        })
        .await;
        started
    }

    /// How many files it may open at once, and how many the system would let it.
    pub fn open_files(&self) -> [String; 2] {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", self.child.id())).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
        let mut words = line.split_whitespace().map(str::to_owned);
        [words.next().unwrap(), words.next().unwrap()]
    }

    /// The most memory that it ever had, in MiB.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }
}
