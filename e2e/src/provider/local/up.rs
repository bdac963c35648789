//! `up`: from nothing, or from whatever is there, to a cluster that is ready.

use super::cgroup::Cgroups;
use super::components::{start, wait_ready, while_all_run};
use super::network::Network;
use super::node::Node;
use super::plan::{MAX_NODES, Plan, node_name};
use super::record::Record;
use super::{LocalCluster, LocalError, READY_TIMEOUT, addons, control_plane, slot, sysctl};
use crate::binaries::{KUBERNETES_VERSION, Tool};
use crate::command::{Run, find_program};
use crate::image::{COREDNS_IMAGE, coredns_image, pause_image};
use crate::kubectl::{condition, items};
use crate::pki::Pki;
use crate::{checkout, packages};
use serde_json::Value;
use std::collections::HashMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Where all programs are.
struct Programs {
    etcd: PathBuf,
    containerd: PathBuf,
    tools: HashMap<&'static str, PathBuf>,
    images: [PathBuf; 2],
}

impl Programs {
    fn tool(&self, tool: Tool) -> PathBuf {
        self.tools.get(tool.program()).cloned().unwrap_or_else(|| tool.program().into())
    }
}

impl LocalCluster {
    pub(super) async fn bring_up(&self, nodes: u32) -> Result<(), LocalError> {
        if nodes == 0 || nodes > MAX_NODES {
            return Err(LocalError::Nodes { nodes, max: MAX_NODES });
        }
        if let Some(record) = Record::read(&self.dir)? {
            if self.healthy(&record).await? {
                if record.nodes != nodes {
                    return Err(LocalError::OtherSize { name: self.name.clone(), has: record.nodes, wanted: nodes });
                }
                self.progress.say(format!("the cluster {} is already up with {nodes} node(s)", self.name));
                return Ok(());
            }
            self.progress.say(format!("the cluster {} is there, but not healthy: starting over", self.name));
            self.take_down(false).await?;
        }
        // Slow and harmless, so before anything is there to clean up.
        let programs = self.get_programs().await?;
        self.begun.store(true, Ordering::Relaxed);
        match self.create(nodes, &programs).await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.progress.say("that failed: cleaning up (the logs stay)");
                self.take_down(true).await?;
                Err(error)
            }
        }
    }

    async fn healthy(&self, record: &Record) -> Result<bool, LocalError> {
        if !record.ready || !record.processes.iter().all(|p| p.process.alive()) {
            return Ok(false);
        }
        let network = Network::new(&self.dir, record.plan);
        for node in &record.cut {
            self.progress.say(format!("{} was cut off: joining it", node_name(*node)));
            network.set_port(*node, true).await?;
        }
        if !record.cut.is_empty() {
            Record { cut: Vec::new(), ..record.clone() }.write(&self.dir)?;
        }
        let ready = self.wait_nodes(record.nodes, Duration::from_secs(30)).await;
        Ok(ready.is_ok())
    }

    async fn get_programs(&self) -> Result<Programs, LocalError> {
        packages::ensure(packages::LOCAL_CLUSTER, &self.progress).await?;
        let mut tools = HashMap::new();
        for tool in
            [Tool::ApiServer, Tool::ControllerManager, Tool::Scheduler, Tool::Kubelet, Tool::KubeProxy, Tool::Kubectl]
        {
            tools.insert(tool.program(), self.binaries.path(tool).await?);
        }
        let images = checkout::cache_dir().join("images");
        let images = [pause_image(&images).await?.path, coredns_image(&images, &self.binaries).await?.path];
        let containerd = find_program("containerd").unwrap_or_else(|| "/usr/bin/containerd".into());
        Ok(Programs { etcd: self.binaries.etcd().await?, containerd, tools, images })
    }

    async fn create(&self, nodes: u32, programs: &Programs) -> Result<(), LocalError> {
        // A failed run may have left its logs.
        let _ = std::fs::remove_dir_all(&self.dir);
        std::fs::create_dir_all(self.dir.join("log")).map_err(LocalError::file(&self.dir))?;
        let plan = Plan { slot: slot::take(&self.name).await? };
        let mut record = Record { plan, nodes, ready: false, cut: Vec::new(), processes: Vec::new() };
        record.write(&self.dir)?;
        self.progress.say(format!(
            "cluster {}, Kubernetes {KUBERNETES_VERSION}, {nodes} node(s), network {}",
            self.name,
            plan.network()
        ));

        sysctl::remember().map_err(LocalError::file("/var/lib/ticketwave/slots"))?;
        let cgroups = Cgroups::new(plan.cgroup());
        cgroups.create(nodes).map_err(LocalError::file("/sys/fs/cgroup"))?;
        let pki = Pki::create(&self.dir.join("pki"), &control_plane::server_names(plan))?;
        self.write_identities(&pki, plan, nodes)?;
        Network::new(&self.dir, plan).create(nodes).await?;
        let nodes: Vec<Node> = (1..=nodes).map(|n| Node::new(n, &self.dir, plan)).collect();
        for node in &nodes {
            node.write_files(&pki)?;
        }

        self.start_stores(programs, &nodes, &pki, &cgroups, &mut record)?;
        let begin = self.wait_stores(programs, &nodes, &record);
        while_all_run(&self.dir, &record, begin).await?;
        self.start_workers(programs, &nodes, &pki, &cgroups, &mut record)?;
        while_all_run(&self.dir, &record, self.wait_cluster(&record)).await?;
        record.ready = true;
        record.write(&self.dir)?;
        self.progress.say(format!("ready: export KUBECONFIG={}", self.kubeconfig_file().display()));
        Ok(())
    }

    /// What the rest needs before it starts.
    fn start_stores(
        &self,
        programs: &Programs,
        nodes: &[Node],
        pki: &Pki,
        cgroups: &Cgroups,
        record: &mut Record,
    ) -> Result<(), LocalError> {
        self.progress.say("starting etcd, the API server and containerd");
        let plan = record.plan;
        let network = Network::new(&self.dir, plan);
        let first = network.of_node(1);
        let mut components = vec![
            control_plane::etcd(programs.etcd.clone(), &first, &self.dir),
            control_plane::api_server(programs.tool(Tool::ApiServer), &first, &self.dir, pki, plan),
        ];
        components.extend(nodes.iter().map(|node| {
            let namespace = network.of_node(node.number);
            node.containerd(programs.containerd.clone(), &namespace)
        }));
        for component in &components {
            start(component, &self.dir, cgroups, record)?;
        }
        Ok(())
    }

    async fn wait_stores(&self, programs: &Programs, nodes: &[Node], record: &Record) -> Result<(), LocalError> {
        self.wait_containerd(nodes).await?;
        for image in &programs.images {
            self.load(image, record).await?;
        }
        let kubectl = self.kubectl().await?;
        let ready = || kubectl.server_ready();
        wait_ready(&self.dir, "kube-apiserver", READY_TIMEOUT, ready).await
    }

    /// Everything that talks to the API server.
    fn start_workers(
        &self,
        programs: &Programs,
        nodes: &[Node],
        pki: &Pki,
        cgroups: &Cgroups,
        record: &mut Record,
    ) -> Result<(), LocalError> {
        self.progress.say("starting the controllers, the scheduler and the nodes");
        let network = Network::new(&self.dir, record.plan);
        let first = network.of_node(1);
        let program = programs.tool(Tool::ControllerManager);
        let mut components = vec![
            control_plane::controller_manager(program, &first, &self.dir, pki),
            control_plane::scheduler(programs.tool(Tool::Scheduler), &first, &self.dir),
        ];
        for node in nodes {
            let namespace = network.of_node(node.number);
            if let Some(containerd) = record.process(&format!("containerd-{}", node.number)) {
                let program = programs.tool(Tool::Kubelet);
                components.push(node.kubelet(program, &namespace, containerd));
            }
            let program = programs.tool(Tool::KubeProxy);
            components.push(node.kube_proxy(program, &namespace, &self.dir));
        }
        for component in &components {
            start(component, &self.dir, cgroups, record)?;
        }
        Ok(())
    }

    async fn wait_containerd(&self, nodes: &[Node]) -> Result<(), LocalError> {
        for node in nodes {
            let answers = || async {
                Run::new("ctr").words("--connect-timeout 1s -a").arg(node.socket()).arg("version").run().await.is_ok()
            };
            wait_ready(&self.dir, &format!("containerd-{}", node.number), READY_TIMEOUT, answers).await?;
        }
        Ok(())
    }

    async fn wait_cluster(&self, record: &Record) -> Result<(), LocalError> {
        let kubectl = self.kubectl().await?;
        kubectl.apply(&addons::dns_manifest(record.plan, COREDNS_IMAGE)).await?;
        self.progress.during("waiting for the nodes", self.wait_nodes(record.nodes, READY_TIMEOUT)).await?;
        let dns = "deployment coredns -n kube-system";
        let available = |seen: &Value| condition(seen, "Available") == Some("True");
        let waiting = kubectl.wait_until(dns, READY_TIMEOUT, available);
        let result = self.progress.during("waiting for the DNS server", waiting).await;
        result.map_err(|_| self.not_ready("the DNS server is", "its pod does not get ready".into()))?;
        let account =
            kubectl.wait_until("serviceaccount default -n default", READY_TIMEOUT, |seen| !seen.is_null()).await;
        account.map(|_| ()).map_err(|_| self.not_ready("the default service account is", "it does not exist".into()))
    }

    async fn wait_nodes(&self, nodes: u32, limit: Duration) -> Result<(), LocalError> {
        let kubectl = self.kubectl().await?;
        let ready = |list: &Value| items(list).iter().filter(|n| condition(n, "Ready") == Some("True")).count();
        let all = |list: &Value| u32::try_from(ready(list)).is_ok_and(|n| n == nodes);
        match kubectl.wait_until("nodes", limit, all).await {
            Ok(_) => Ok(()),
            Err(seen) => {
                let mut text = format!("{} of {nodes} are Ready", ready(&seen));
                for node in items(&seen) {
                    let why =
                        node["status"]["conditions"].as_array().and_then(|c| c.iter().find(|c| c["type"] == "Ready"));
                    let _ =
                        write!(text, "; {}: {}", node["metadata"]["name"], why.map_or(&Value::Null, |w| &w["message"]));
                }
                Err(self.not_ready("the nodes are", text))
            }
        }
    }

    fn not_ready(&self, what: &str, seen: String) -> LocalError {
        LocalError::NotReady {
            what: what.to_owned(),
            seconds: READY_TIMEOUT.as_secs(),
            seen,
            logs: self.dir.join("log"),
        }
    }
}
