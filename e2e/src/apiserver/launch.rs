//! The processes of a test API server: their arguments, their ports, and how they are started.

use super::{ApiServerError, io};
use crate::audit::AUDIT_POLICY;
use crate::pki::Pki;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

pub(super) fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

pub(super) fn etcd_args(dir: &Path, client: u16, peer: u16) -> Vec<String> {
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls=http://127.0.0.1:{client}"),
        format!("--advertise-client-urls=http://127.0.0.1:{client}"),
        format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
        format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
        format!("--initial-cluster=default=http://127.0.0.1:{peer}"),
        "--unsafe-no-fsync".into(),
        "--logger=zap".into(),
        "--log-level=warn".into(),
    ]
}

pub(super) fn server_args(dir: &Path, pki: &Pki, etcd: u16, port: u16) -> Vec<String> {
    let policy = dir.join("audit-policy.json");
    // A missing policy only shows as an error of the API server, whose log is part of ours.
    let _ = std::fs::write(&policy, AUDIT_POLICY);
    vec![
        format!("--etcd-servers=http://127.0.0.1:{etcd}"),
        "--bind-address=127.0.0.1".into(),
        format!("--secure-port={port}"),
        "--service-cluster-ip-range=10.96.0.0/16".into(),
        format!("--tls-cert-file={}", pki.server_cert().display()),
        format!("--tls-private-key-file={}", pki.server_key().display()),
        format!("--client-ca-file={}", pki.ca().display()),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        format!("--service-account-key-file={}", pki.service_account_public().display()),
        format!("--service-account-signing-key-file={}", pki.service_account_key().display()),
        format!("--token-auth-file={}", dir.join("tokens.csv").display()),
        "--authorization-mode=RBAC".into(),
        "--anonymous-auth=false".into(),
        // Nobody makes the default service account of a namespace here.
        "--disable-admission-plugins=ServiceAccount".into(),
        // There is no address that pods could reach it at.
        "--endpoint-reconciler-type=none".into(),
        format!("--audit-policy-file={}", policy.display()),
        format!("--audit-log-path={}", dir.join("audit.log").display()),
        "--profiling=false".into(),
    ]
}

/// Three ports that are free now.
pub(super) fn free_ports() -> std::io::Result<[u16; 3]> {
    let bind = || TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)));
    let held = [bind()?, bind()?, bind()?];
    let port = |i: usize| held[i].local_addr().map(|a| a.port());
    Ok([port(0)?, port(1)?, port(2)?])
}

/// Starts a process that the kernel kills when this one dies.
///
/// The kernel takes the end of the *thread* that started it for the end of its parent, and threads of a test or of an
/// async runtime come and go. So one thread, which never ends, starts them all.
pub(crate) fn spawn(program: &Path, args: Vec<String>, log: &Path) -> Result<Child, ApiServerError> {
    use std::sync::{Mutex, OnceLock};
    type Order = (Command, mpsc::Sender<std::io::Result<Child>>);
    static STARTER: OnceLock<Mutex<mpsc::Sender<Order>>> = OnceLock::new();

    let what = "start the test API server";
    let log = std::fs::File::create(log).map_err(io(what))?;
    // setpriv becomes the program, so the process id is the program's.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
    command.stdin(Stdio::null()).stdout(log.try_clone().map_err(io(what))?).stderr(log);

    let starter = STARTER.get_or_init(|| {
        let (orders, queue) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in queue {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (answer, child) = mpsc::channel();
    let orders = starter.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    let gone = |()| std::io::Error::other("the starting thread is gone");
    orders.send((command, answer)).map_err(|_| gone(())).map_err(io(what))?;
    child.recv().map_err(|_| gone(())).map_err(io(what))?.map_err(io(what))
}
