//! What runs on every node: containerd, the kubelet, kube-proxy.

use super::LocalError;
use super::components::{Component, Mounts};
use super::plan::{Plan, node_name};
use crate::image::PAUSE_IMAGE;
use crate::pki::Pki;
use crate::process::ProcessId;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Paths that containerd, the kubelet and CNI plugins use wherever they run: each node gets its own.
const PRIVATE_DIRS: &[&str] = &["/run/netns", "/run/containerd", "/var/lib/cni", "/var/log/containers"];

/// One node and its files.
#[derive(Clone, Debug)]
pub struct Node {
    /// From 1.
    pub number: u32,
    /// Its directory.
    pub dir: PathBuf,
    plan: Plan,
}

impl Node {
    /// A node of the cluster in `dir`.
    pub fn new(number: u32, dir: &Path, plan: Plan) -> Self {
        Self { number, dir: dir.join(node_name(number)), plan }
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("run/containerd.sock")
    }

    /// The kubeconfig of its kubelet.
    pub fn kubelet_config(&self) -> PathBuf {
        self.dir.join("kubelet.kubeconfig")
    }

    /// Writes its configuration.
    pub fn write_files(&self, pki: &Pki) -> Result<(), LocalError> {
        let write = |name: &str, text: String| {
            let file = self.dir.join(name);
            std::fs::write(&file, text).map_err(LocalError::file(&file))
        };
        for dir in ["run", "containerd", "kubelet", "pod-logs", "cni"] {
            let dir = self.dir.join(dir);
            std::fs::create_dir_all(&dir).map_err(LocalError::file(&dir))?;
        }
        for dir in PRIVATE_DIRS {
            std::fs::create_dir_all(dir).map_err(LocalError::file(dir))?;
        }
        // No name server from outside: what the cluster's own does not know does not exist.
        write("resolv.conf", String::new())?;
        write("containerd.toml", self.containerd_config())?;
        write("cni/10-pods.conflist", self.cni_config())?;
        write("kubelet.json", self.kubelet_settings(pki))
    }

    fn containerd_config(&self) -> String {
        let dir = self.dir.display();
        format!(
            r#"version = 2
root = "{dir}/containerd"
state = "{dir}/run"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp"]

[grpc]
address = "{dir}/run/containerd.sock"

[ttrpc]
address = "{dir}/run/containerd.sock.ttrpc"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = {restricted}
stream_server_address = "127.0.0.1"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{dir}/cni"

[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#,
            restricted = !has_sys_resource(),
        )
    }

    /// `ptp` routes every packet through the node, so that Services work without bridge filtering in the kernel.
    fn cni_config(&self) -> String {
        let ipam = json!({
            "type": "host-local",
            "dataDir": self.dir.join("cni-addresses"),
            "ranges": [[{"subnet": self.plan.pods_of(self.number)}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        });
        let plugins = json!([{"type": "ptp", "ipMasq": false, "ipam": ipam}, {"type": "portmap", "capabilities": {"portMappings": true}}]);
        json!({"cniVersion": "0.4.0", "name": "pods", "plugins": plugins}).to_string()
    }

    fn kubelet_settings(&self, pki: &Pki) -> String {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true}, "x509": {"clientCAFile": pki.ca()}},
            "authorization": {"mode": "Webhook"},
            "address": self.plan.node(self.number),
            "healthzBindAddress": "127.0.0.1",
            "readOnlyPort": 0,
            "clusterDNS": [self.plan.dns_service()],
            "clusterDomain": "cluster.local",
            "resolvConf": self.dir.join("resolv.conf"),
            "containerRuntimeEndpoint": format!("unix://{}", self.socket().display()),
            "podLogsDir": self.dir.join("pod-logs"),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": format!("/{}/{}", self.plan.cgroup(), node_name(self.number)),
            "failCgroupV1": false,
            "failSwapOn": false,
            "enforceNodeAllocatable": [],
            "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageMinimumGCAge": "24h",
            // Changes are reported within 2 s; without one the status is not written again.
            "nodeStatusUpdateFrequency": "2s",
            "nodeStatusReportFrequency": "5m",
            "nodeLeaseDurationSeconds": 12,
            "shutdownGracePeriod": "0s",
            "volumePluginDir": self.dir.join("volume-plugins"),
            "maxPods": 200,
        })
        .to_string()
    }

    /// containerd; the mounts of the node are its own.
    pub fn containerd(&self, program: PathBuf, network: &Path) -> Component {
        Component {
            name: format!("containerd-{}", self.number),
            program,
            args: vec![format!("--config={}", self.dir.join("containerd.toml").display())],
            network: network.to_owned(),
            mounts: Mounts::Private(PRIVATE_DIRS.iter().map(PathBuf::from).collect()),
        }
    }

    /// The kubelet, in the mounts of containerd.
    pub fn kubelet(&self, program: PathBuf, network: &Path, containerd: ProcessId) -> Component {
        let args = vec![
            format!("--config={}", self.dir.join("kubelet.json").display()),
            format!("--kubeconfig={}", self.kubelet_config().display()),
            format!("--root-dir={}", self.dir.join("kubelet").display()),
            format!("--cert-dir={}", self.dir.join("kubelet-pki").display()),
            format!("--hostname-override={}", node_name(self.number)),
            format!("--node-ip={}", self.plan.node(self.number)),
        ];
        let name = format!("kubelet-{}", self.number);
        Component { name, program, args, network: network.to_owned(), mounts: Mounts::Of(containerd) }
    }

    /// kube-proxy. It must not touch settings of the whole machine, hence the zeros.
    pub fn kube_proxy(&self, program: PathBuf, network: &Path, cluster: &Path) -> Component {
        let args = vec![
            format!("--kubeconfig={}", cluster.join("pki/kube-proxy.kubeconfig").display()),
            format!("--hostname-override={}", node_name(self.number)),
            format!("--cluster-cidr={}", self.plan.pods()),
            "--proxy-mode=iptables".into(),
            "--iptables-min-sync-period=100ms".into(),
            "--conntrack-max-per-core=0".into(),
            "--conntrack-tcp-timeout-established=0s".into(),
            "--conntrack-tcp-timeout-close-wait=0s".into(),
        ];
        Component {
            name: format!("kube-proxy-{}", self.number),
            program,
            args,
            network: network.to_owned(),
            mounts: Mounts::Shared,
        }
    }
}

/// Without `CAP_SYS_RESOURCE` no process can be made less likely to be killed when memory runs out.
fn has_sys_resource() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|v| u64::from_str_radix(v.trim(), 16).ok());
    mask.is_none_or(|mask| mask & (1 << 24) != 0)
}
