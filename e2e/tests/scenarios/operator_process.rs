//! The operator as a process of this machine, so that a test can kill it, pause it, and start it again without waiting for
//! a kubelet's back-off.

use crate::SOON;
use e2e::{
    process::ProcessId,
    testbed::{SYSTEM, TICKETING, Testbed, until},
};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use rustix::process::Signal;
use std::{
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::process::{Child, Command};

/// A running operator; it ends with this value.
pub struct OperatorProcess {
    name: String,
    child: Child,
    log: PathBuf,
}

impl OperatorProcess {
    /// Starts one; it ends itself at the crash point, if one is named.
    pub fn start(testbed: &Testbed, name: &str, crash_at: Option<&str>) -> Self {
        // Built beside this test.
        let own = std::env::current_exe().unwrap();
        let program = own.ancestors().nth(2).unwrap().join("resilience-operator");
        let log = std::env::temp_dir().join(format!("operator-{}-{name}.log", std::process::id()));
        let output = std::fs::File::create(&log).unwrap();
        let mut command = Command::new(program);
        command.args(["--namespace", SYSTEM, "--watch-namespaces", TICKETING, "--identity", name]);
        command.args(["--listen", "127.0.0.1:0", "--lease-duration", "6s", "--pod-transport", "apiserver-proxy"]);
        // So many incidents in so short a time are a storm, and that would be stopped.
        command.args(["--storm-actions", "0"]);
        command.args(crash_at.iter().flat_map(|point| ["--crash-at", *point]));
        if let Some(kubeconfig) = testbed.cluster.kubeconfig() {
            command.env("KUBECONFIG", kubeconfig);
        }
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output).kill_on_drop(true);
        Self { name: name.to_owned(), child: command.spawn().expect("`make e2e` builds the operator"), log }
    }

    /// Waits until it leads.
    pub async fn leads(&self, testbed: &Testbed) {
        let leases: Api<Lease> = Api::namespaced(testbed.client.clone(), SYSTEM);
        until(SOON, &format!("{} leads", self.name), || async {
            let holder = leases.get_opt("resilience-operator").await?.and_then(|lease| lease.spec?.holder_identity);
            Ok(if holder.as_ref() == Some(&self.name) { Ok(()) } else { Err(format!("{holder:?}\n{}", self.said())) })
        })
        .await
        .unwrap();
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let ended = tokio::time::timeout(SOON, self.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("{} goes on:\n{}", self.name, self.said())).unwrap()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let process = self.child.id().and_then(ProcessId::of);
        assert!(process.is_some_and(|process| process.signal(signal)), "{} is gone:\n{}", self.name, self.said());
    }

    /// Kills it on the spot.
    pub async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.child.wait().await.unwrap();
    }

    /// Asks it to end, and waits until it has given its lead up.
    pub async fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await.expect("it ends").unwrap();
        assert!(status.success(), "{status}: {}", self.said());
    }

    /// The end of its log.
    pub fn said(&self) -> String {
        e2e::command::last_lines(&std::fs::read_to_string(&self.log).unwrap_or_default(), 25)
    }
}

impl Drop for OperatorProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the end of the log of {}:\n{}", self.name, self.said());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}
