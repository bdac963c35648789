//! The cluster's network: one namespace per node, one for the bridge that joins them, one pair of interfaces to this machine.
//!
//! The namespaces are files in the cluster's own directory, not under `/run/netns`. No namespace has a default route:
//! nothing leaves the cluster.

use super::LocalError;
use super::plan::{Plan, node_name};
use crate::command::{CommandError, Run};
use std::path::{Path, PathBuf};

/// The network of one cluster.
#[derive(Debug)]
pub struct Network<'a> {
    dir: &'a Path,
    plan: Plan,
}

impl<'a> Network<'a> {
    /// `dir` is the cluster's directory.
    pub fn new(dir: &'a Path, plan: Plan) -> Self {
        Self { dir, plan }
    }

    /// The file of a node's namespace.
    pub fn of_node(&self, node: u32) -> PathBuf {
        self.dir.join("netns").join(node_name(node))
    }

    fn of_bridge(&self) -> PathBuf {
        self.dir.join("netns/bridge")
    }

    /// Makes everything.
    pub async fn create(&self, nodes: u32) -> Result<(), LocalError> {
        let bridge = self.of_bridge();
        std::fs::create_dir_all(self.dir.join("netns")).map_err(LocalError::file(self.dir))?;
        new_namespace(&bridge).await?;
        ip(&bridge, "link add br0 type bridge").await?;
        ip(&bridge, "link set br0 up").await?;
        for node in 1..=nodes {
            self.create_node(node, nodes).await?;
        }
        self.create_host_link(nodes).await
    }

    async fn create_node(&self, node: u32, nodes: u32) -> Result<(), LocalError> {
        let (inside, bridge) = (self.of_node(node), self.of_bridge());
        new_namespace(&inside).await?;
        let namespace = inside.to_string_lossy();
        ip(&bridge, &format!("link add port-{node} type veth peer name eth0 netns {namespace}")).await?;
        ip(&bridge, &format!("link set port-{node} master br0 up")).await?;
        ip(&inside, &format!("addr add {}/24 dev eth0", self.plan.node(node))).await?;
        ip(&inside, "link set eth0 up").await?;
        for other in (1..=nodes).filter(|other| *other != node) {
            ip(&inside, &format!("route add {} via {}", self.plan.pods_of(other), self.plan.node(other))).await?;
        }
        // kube-proxy rewrites the address of a Service only after a route was found for it.
        ip(&inside, &format!("route add {} dev eth0", self.plan.services())).await?;
        enter(&inside).args(["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]).run().await?;
        Ok(())
    }

    async fn create_host_link(&self, nodes: u32) -> Result<(), LocalError> {
        let (interface, bridge) = (self.plan.interface(), self.of_bridge());
        let here = |line: String| Run::new("ip").words(&line).run();
        here(format!("link add {interface} type veth peer name host netns {}", bridge.to_string_lossy())).await?;
        ip(&bridge, "link set host master br0 up").await?;
        here(format!("addr add {}/24 dev {interface}", self.plan.host())).await?;
        here(format!("link set {interface} up")).await?;
        for node in 1..=nodes {
            here(format!("route add {} via {}", self.plan.pods_of(node), self.plan.node(node))).await?;
        }
        here(format!("route add {} via {}", self.plan.services(), self.plan.node(1))).await?;
        Ok(())
    }

    /// Takes a node's port on the bridge up or down.
    pub async fn set_port(&self, node: u32, up: bool) -> Result<(), LocalError> {
        let state = if up { "up" } else { "down" };
        Ok(ip(&self.of_bridge(), &format!("link set port-{node} {state}")).await?)
    }

    /// Removes everything that is there; the processes inside must have ended.
    pub async fn remove(&self) {
        let _ = Run::new("ip").words("link delete").arg(self.plan.interface()).run().await;
        let Ok(namespaces) = std::fs::read_dir(self.dir.join("netns")) else {
            return;
        };
        for namespace in namespaces.flatten() {
            let _ = Run::new("umount").arg(namespace.path()).run().await;
            let _ = std::fs::remove_file(namespace.path());
        }
        let _ = std::fs::remove_dir(self.dir.join("netns"));
    }
}

async fn new_namespace(file: &Path) -> Result<(), LocalError> {
    std::fs::write(file, "").map_err(LocalError::file(file))?;
    let mut net = std::ffi::OsString::from("--net=");
    net.push(file);
    Run::new("unshare").arg(net).arg("true").run().await?;
    Ok(ip(file, "link set lo up").await?)
}

fn enter(namespace: &Path) -> Run {
    let mut net = std::ffi::OsString::from("--net=");
    net.push(namespace);
    Run::new("nsenter").arg(net).arg("--")
}

async fn ip(namespace: &Path, words: &str) -> Result<(), CommandError> {
    enter(namespace).arg("ip").words(words).run().await
}
