//! etcd, the API server, the controllers and the scheduler, on the first node.

use super::components::{Component, Mounts};
use super::plan::Plan;
use crate::pki::Pki;
use std::path::{Path, PathBuf};

/// Names and addresses in the API server's certificate.
pub fn server_names(plan: Plan) -> Vec<String> {
    let mut names: Vec<String> = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    .map(str::to_owned)
    .to_vec();
    names.extend([plan.node(1), plan.kubernetes_service(), "127.0.0.1".to_owned()]);
    names
}

fn component(name: &str, program: PathBuf, network: &Path, args: Vec<String>) -> Component {
    Component { name: name.to_owned(), program, args, network: network.to_owned(), mounts: Mounts::Shared }
}

/// etcd. Data may be lost when the machine crashes; the cluster would not survive that anyway.
pub fn etcd(program: PathBuf, network: &Path, dir: &Path) -> Component {
    let args = vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        "--listen-client-urls=http://127.0.0.1:2379".into(),
        "--advertise-client-urls=http://127.0.0.1:2379".into(),
        "--listen-peer-urls=http://127.0.0.1:2380".into(),
        "--initial-advertise-peer-urls=http://127.0.0.1:2380".into(),
        "--initial-cluster=default=http://127.0.0.1:2380".into(),
        "--unsafe-no-fsync".into(),
        "--logger=zap".into(),
        "--log-level=warn".into(),
    ];
    component("etcd", program, network, args)
}

/// The API server.
pub fn api_server(program: PathBuf, network: &Path, dir: &Path, pki: &Pki, plan: Plan) -> Component {
    let file = |name: &str, path: PathBuf| format!("--{name}={}", path.display());
    let args = vec![
        "--etcd-servers=http://127.0.0.1:2379".into(),
        format!("--bind-address={}", plan.node(1)),
        format!("--advertise-address={}", plan.node(1)),
        "--secure-port=6443".into(),
        format!("--service-cluster-ip-range={}", plan.services()),
        file("client-ca-file", pki.ca()),
        file("tls-cert-file", pki.server_cert()),
        file("tls-private-key-file", pki.server_key()),
        file("kubelet-client-certificate", pki.kubelet_client_cert()),
        file("kubelet-client-key", pki.kubelet_client_key()),
        "--kubelet-preferred-address-types=InternalIP".into(),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local".into(),
        file("service-account-key-file", pki.service_account_public()),
        file("service-account-signing-key-file", pki.service_account_key()),
        file("token-auth-file", dir.join("pki/tokens.csv")),
        "--anonymous-auth=false".into(),
        "--authorization-mode=Node,RBAC".into(),
        "--enable-admission-plugins=NodeRestriction".into(),
        file("audit-policy-file", dir.join("audit-policy.json")),
        file("audit-log-path", dir.join("log/audit.log")),
        "--audit-log-maxsize=500".into(),
        "--profiling=false".into(),
    ];
    component("kube-apiserver", program, network, args)
}

/// The controllers.
pub fn controller_manager(program: PathBuf, network: &Path, dir: &Path, pki: &Pki) -> Component {
    let file = |name: &str, path: PathBuf| format!("--{name}={}", path.display());
    let args = vec![
        file("kubeconfig", dir.join("pki/controller-manager.kubeconfig")),
        file("root-ca-file", pki.ca()),
        file("cluster-signing-cert-file", pki.ca()),
        file("cluster-signing-key-file", pki.ca_key()),
        file("service-account-private-key-file", pki.service_account_key()),
        "--use-service-account-credentials".into(),
        "--leader-elect=false".into(),
        "--controllers=*,-nodeipam".into(),
        "--bind-address=127.0.0.1".into(),
        // A node that is cut off is NotReady after this time: the tests wait for it.
        "--node-monitor-grace-period=20s".into(),
        "--node-monitor-period=2s".into(),
    ];
    component("kube-controller-manager", program, network, args)
}

/// The scheduler.
pub fn scheduler(program: PathBuf, network: &Path, dir: &Path) -> Component {
    let args = vec![
        format!("--kubeconfig={}", dir.join("pki/scheduler.kubeconfig").display()),
        "--leader-elect=false".into(),
        "--bind-address=127.0.0.1".into(),
    ];
    component("kube-scheduler", program, network, args)
}
