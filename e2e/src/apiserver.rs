//! A bare API server for tests of controllers: etcd and kube-apiserver on this machine's loopback, no nodes.
//!
//! Nothing runs pods and nothing collects garbage: objects are what the test makes of them. It ends when the value
//! is dropped, and also when the test's process dies.

mod launch;

use crate::binaries::{Binaries, BinaryError, KUBERNETES_VERSION, Tool};
use crate::command::{find_program, last_lines};
use crate::pki::{Pki, PkiError};
use crate::process::ProcessId;
use crate::progress::Progress;
use crate::{kubeconfig, token};
pub(crate) use launch::spawn as spawn_child;
use launch::{end, etcd_args, free_ports, server_args, spawn};
use rustix::process::Signal;
use std::fmt::Write;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// Users that exist from the start; [`TestApiServer::user_token`] gives their tokens.
/// They may do nothing until a test binds a role to them: `user-1`, `user-2` and so on.
pub const USERS: &[&str] = &["user-1", "user-2", "user-3", "user-4", "operator", "viewer"];

const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The API server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ApiServerError {
    /// A program is missing.
    #[error(transparent)]
    Binary(#[from] BinaryError),
    /// Keys.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A file, a port or a process.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The reason that the operating system gives.
        source: std::io::Error,
    },
    /// It did not come up.
    #[error("the test API server (Kubernetes {KUBERNETES_VERSION}) {what}; the end of its logs:\n{tail}")]
    NotUp {
        /// What it did.
        what: String,
        /// The last lines of both logs.
        tail: String,
    },
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> ApiServerError {
    move |source| ApiServerError::Io { what, source }
}

/// An API server that lives as long as this value.
#[derive(Debug)]
pub struct TestApiServer {
    etcd: Child,
    server: Child,
    url: String,
    ca: String,
    tokens: Vec<(String, String)>,
    // Last, so that the directory goes when nobody writes to it any more.
    dir: tempfile::TempDir,
}

impl TestApiServer {
    /// Starts etcd and the API server, and waits until it is ready.
    pub async fn start() -> Result<Self, ApiServerError> {
        let binaries = Binaries::new(Progress::new());
        let (etcd, server) = (binaries.etcd().await?, binaries.path(Tool::ApiServer).await?);
        // Between choosing a port and taking it, somebody else may; then it is tried again.
        let mut attempts = 3;
        loop {
            attempts -= 1;
            match Self::launch(&etcd, &server).await {
                Err(ApiServerError::NotUp { tail, .. }) if attempts > 0 && tail.contains("address already in use") => {}
                result => return result,
            }
        }
    }

    async fn launch(etcd: &Path, server: &Path) -> Result<Self, ApiServerError> {
        let dir =
            tempfile::Builder::new().prefix("ticketwave-api-").tempdir().map_err(io("make a temporary directory"))?;
        let [client_port, peer_port, port] = free_ports().map_err(io("find free ports"))?;
        let names = ["localhost", "127.0.0.1", "kubernetes.default.svc", "10.96.0.1"].map(str::to_owned);
        let pki = Pki::create(dir.path(), &names)?;
        let mut tokens = Vec::new();
        let mut lines = String::new();
        for (number, user) in ["admin"].iter().chain(USERS).enumerate() {
            let token = token::random().map_err(io("read /dev/urandom"))?;
            let groups = if *user == "admin" { "system:masters" } else { "" };
            let _ = writeln!(lines, "{token},{user},{number},\"{groups}\"");
            tokens.push(((*user).to_owned(), token));
        }
        kubeconfig::write_private(&dir.path().join("tokens.csv"), lines.as_bytes()).map_err(io("write the tokens"))?;

        let url = format!("https://127.0.0.1:{port}");
        let etcd = spawn(etcd, etcd_args(dir.path(), client_port, peer_port), &dir.path().join("etcd.log"))?;
        let server = spawn(server, server_args(dir.path(), &pki, client_port, port), &dir.path().join("apiserver.log"));
        let server = match server {
            Ok(server) => server,
            Err(error) => {
                end(etcd);
                return Err(error);
            }
        };
        let ca = std::fs::read_to_string(pki.ca()).map_err(io("read the authority's certificate"))?;
        let mut started = Self { etcd, server, url, ca, tokens, dir };
        kubeconfig::write(&started.kubeconfig(), "test", &started.url, &pki.ca(), started.token())
            .map_err(io("write the kubeconfig"))?;
        started.wait_ready(port).await?;
        Ok(started)
    }

    async fn wait_ready(&mut self, port: u16) -> Result<(), ApiServerError> {
        let begin = Instant::now();
        loop {
            let ended = [&mut self.etcd, &mut self.server].into_iter().any(|c| !matches!(c.try_wait(), Ok(None)));
            if ended || begin.elapsed() > START_TIMEOUT {
                let read = |name: &str| {
                    last_lines(&std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default(), 8)
                };
                let what = if ended {
                    "ended".to_owned()
                } else {
                    format!("was not ready after {} s", START_TIMEOUT.as_secs())
                };
                return Err(ApiServerError::NotUp {
                    what,
                    tail: format!("{}\n{}", read("etcd.log"), read("apiserver.log")),
                });
            }
            if TcpStream::connect(("127.0.0.1", port)).is_ok() && self.answers().await {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Asks `/readyz` with a program that every machine has: a TLS client of our own would be a big dependency.
    async fn answers(&self) -> bool {
        let Some(curl) = find_program("curl") else {
            return self.kubectl_answers().await;
        };
        let run = crate::command::Run::new(curl)
            .words("--silent --fail --max-time 2 --cacert")
            .arg(self.dir.path().join("ca.crt"))
            .arg("--header")
            .arg(format!("Authorization: Bearer {}", self.token()))
            .arg(format!("{}/readyz", self.url));
        run.run().await.is_ok()
    }

    async fn kubectl_answers(&self) -> bool {
        let Ok(kubectl) = Binaries::new(Progress::quiet()).path(Tool::Kubectl).await else {
            return false;
        };
        crate::kubectl::Kubectl::new(kubectl, Some(self.kubeconfig())).server_ready().await
    }

    /// A kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The token of the administrator.
    pub fn token(&self) -> &str {
        self.tokens.first().map_or("", |(_, token)| token)
    }

    /// The token of one of [`USERS`].
    pub fn user_token(&self, user: &str) -> Option<&str> {
        self.tokens.iter().find(|(name, _)| name == user).map(|(_, token)| token.as_str())
    }

    /// The certificate of the authority, as PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca
    }

    /// Every write, one JSON object per line.
    pub fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
    }

    /// Freezes the API server: connections stay open and nothing answers.
    pub fn pause(&self) -> bool {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub fn resume(&self) -> bool {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> bool {
        ProcessId::of(self.server.id()).is_some_and(|p| p.signal(signal))
    }
}

impl Drop for TestApiServer {
    fn drop(&mut self) {
        for child in [&mut self.server, &mut self.etcd] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
