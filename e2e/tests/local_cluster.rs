//! What an `up` that does not finish leaves of a local cluster, and two clusters at once.
//!
//! Verified from outside, by what the machine shows: processes, mounts, interfaces, namespaces, cgroups, settings.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use e2e::process::ProcessId;
use rustix::process::Signal;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::process::{Child, Command};

const STATE: &str = "/var/lib/ticketwave";
const CGROUPS: &str = "/sys/fs/cgroup";
/// How long an `up` may take; what it would download or build first, `make test` has got before.
const TIMEOUT: Duration = Duration::from_secs(120);

/// How far an `up` has come.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// It has chosen its network.
    Claimed,
    /// A node's network namespace is there.
    Networked,
    /// containerd was started.
    Stores,
    /// The kubelet was started.
    Nodes,
    /// A pod's process runs.
    Pods,
}

/// A cluster of this test alone, taken down at the end whatever happens.
struct Cluster {
    name: String,
    settings: BTreeMap<&'static str, String>,
    others: BTreeSet<String>,
}

impl Cluster {
    fn new(purpose: &str) -> Self {
        let name = format!("{purpose}-{}", std::process::id());
        Self { name, settings: settings(), others: slots().into_values().collect() }
    }

    fn dir(&self) -> PathBuf {
        Path::new(STATE).join(&self.name)
    }

    fn tool(&self, action: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ticketwave-e2e"));
        command.args(["cluster", "--provider", "local", "--name", &self.name]).args(action);
        command.env_remove("NODES").kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn up(&self) -> Child {
        // Its output goes to a file: a pipe that nobody reads would hold it up.
        let log = fs::File::create(std::env::temp_dir().join(format!("{}.log", self.name))).unwrap();
        self.tool(&["up", "--nodes", "1"]).stderr(log).spawn().unwrap()
    }

    fn said(&self) -> String {
        fs::read_to_string(std::env::temp_dir().join(format!("{}.log", self.name))).unwrap_or_default()
    }

    async fn down(&self) {
        let output = self.tool(&["down"]).stderr(Stdio::piped()).output().await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn slot(&self) -> Option<u8> {
        slots().into_iter().find(|(_, owner)| *owner == self.name).map(|(slot, _)| slot)
    }

    /// The process of a component, once it is written down.
    fn component(&self, name: &str) -> Option<ProcessId> {
        let record: serde_json::Value =
            serde_json::from_slice(&fs::read(self.dir().join("cluster.json")).ok()?).ok()?;
        let found = record["processes"].as_array()?.iter().find(|one| one["component"] == name)?.clone();
        serde_json::from_value(found["process"].clone()).ok()
    }

    fn has_come_to(&self, moment: Moment) -> bool {
        match moment {
            Moment::Claimed => self.slot().is_some(),
            Moment::Networked => self.dir().join("netns/node-1").exists(),
            Moment::Stores => self.component("containerd-1").is_some(),
            Moment::Nodes => self.component("kubelet-1").is_some(),
            Moment::Pods => self.slot().is_some_and(|slot| {
                let ours = format!("/ticketwave-{slot}/node-1/");
                processes().iter().any(|process| process.cgroups.contains(&ours))
            }),
        }
    }

    async fn until(&self, moment: Moment, up: &mut Child) {
        let begin = Instant::now();
        while !self.has_come_to(moment) {
            assert!(up.try_wait().unwrap().is_none(), "it ended before {moment:?}:\n{}", self.said());
            assert!(begin.elapsed() < TIMEOUT, "it never came to {moment:?}:\n{}", self.said());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What it has by now that must be gone in the end.
    fn footprint(&self) -> Footprint {
        let namespaces = fs::read_dir(self.dir().join("netns")).into_iter().flatten().flatten();
        let inodes = namespaces.filter_map(|file| Some(fs::metadata(file.path()).ok()?.ino())).collect();
        Footprint { dir: self.dir(), slot: self.slot(), namespaces: inodes }
    }

    /// Fails unless nothing of it is left; the logs may stay where `logs` says so.
    async fn is_gone(&self, footprint: &Footprint, logs: bool) {
        let begin = Instant::now();
        loop {
            // A killed process needs a moment until nothing of it shows.
            let left = footprint.left(logs);
            if left.is_empty() {
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(5), "left behind: {left:#?}\n{}", self.said());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(self.slot().is_none());
        // Where another cluster is up, the settings are its own.
        if self.others.is_empty() && slots().is_empty() {
            assert_eq!(settings(), self.settings);
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = fs::remove_file(std::env::temp_dir().join(format!("{}.log", self.name)));
        if self.slot().is_some() || self.dir().exists() {
            let _ = self.tool(&["down"]).into_std().stderr(Stdio::null()).status();
        }
    }
}

/// The marks by which something belongs to a cluster.
struct Footprint {
    dir: PathBuf,
    slot: Option<u8>,
    namespaces: BTreeSet<u64>,
}

impl Footprint {
    fn left(&self, logs: bool) -> Vec<String> {
        let mut left = Vec::new();
        let dir = self.dir.to_string_lossy();
        let files = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
        left.extend(files.filter(|name| !(logs && name == "log")).map(|name| format!("file {dir}/{}", name.display())));
        if self.dir.exists() && !logs {
            left.push(format!("directory {dir}"));
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        left.extend(mounts.lines().filter(|line| line.contains(dir.as_ref())).map(|line| format!("mount {line}")));
        let cgroup = self.slot.map(|slot| format!("ticketwave-{slot}"));
        if let (Some(slot), Some(cgroup)) = (self.slot, &cgroup) {
            let interface = format!("tw{slot}");
            if Path::new("/sys/class/net").join(&interface).exists() {
                left.push(format!("interface {interface}"));
            }
            let hierarchies = fs::read_dir(CGROUPS).into_iter().flatten().flatten().map(|entry| entry.path());
            let tops = hierarchies.chain([PathBuf::from(CGROUPS)]).map(|root| root.join(cgroup));
            left.extend(tops.filter(|top| top.exists()).map(|top| format!("cgroup {}", top.display())));
        }
        for process in processes() {
            let in_cgroup = cgroup.as_ref().is_some_and(|cgroup| process.cgroups.contains(&format!("/{cgroup}/")));
            let in_network = process.network.is_some_and(|inode| self.namespaces.contains(&inode));
            if in_cgroup || in_network || process.line.contains(&format!("{dir}/")) {
                left.push(format!("process {} {}", process.pid, process.line));
            }
        }
        left
    }
}

struct Process {
    pid: u32,
    line: String,
    cgroups: String,
    network: Option<u64>,
}

fn processes() -> Vec<Process> {
    let ids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let alive = ids.filter(|pid| ProcessId::of(*pid).is_some_and(|process| process.alive()));
    let describe = |pid: u32| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let cgroups = String::from_utf8_lossy(&read("cgroup")).into_owned();
        Process { pid, line, cgroups, network: fs::metadata(format!("/proc/{pid}/ns/net")).ok().map(|ns| ns.ino()) }
    };
    alive.map(describe).collect()
}

/// Which cluster has which network.
fn slots() -> BTreeMap<u8, String> {
    let files = fs::read_dir(Path::new(STATE).join("slots")).into_iter().flatten().flatten();
    let owner = |file: fs::DirEntry| {
        let slot = file.file_name().to_str()?.parse().ok()?;
        Some((slot, fs::read_to_string(file.path()).ok()?.trim().to_owned()))
    };
    files.filter_map(owner).collect()
}

/// The settings of this machine that a kubelet changes.
fn settings() -> BTreeMap<&'static str, String> {
    let names = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops"];
    names.into_iter().map(|name| (name, fs::read_to_string(format!("/proc/sys/{name}")).unwrap())).collect()
}

fn send(child: &Child, signal: Signal) {
    assert!(ProcessId::of(child.id().unwrap()).unwrap().signal(signal));
}

#[tokio::test]
async fn an_interrupted_up_cleans_up_after_itself() {
    for moment in [Moment::Networked, Moment::Nodes, Moment::Pods] {
        let cluster = Cluster::new("interrupted");
        let mut up = cluster.up();
        cluster.until(moment, &mut up).await;
        let footprint = cluster.footprint();
        send(&up, Signal::INT);
        let status = tokio::time::timeout(TIMEOUT, up.wait()).await.expect("it ends").unwrap();
        assert_eq!(status.code(), Some(1), "{moment:?}: {}", cluster.said());
        assert!(cluster.said().contains("interrupted"), "{}", cluster.said());
        cluster.is_gone(&footprint, false).await;
    }
}

#[tokio::test]
async fn down_removes_what_a_killed_up_has_left() {
    for moment in [Moment::Claimed, Moment::Networked, Moment::Stores, Moment::Nodes, Moment::Pods] {
        let cluster = Cluster::new("killed");
        let mut up = cluster.up();
        cluster.until(moment, &mut up).await;
        send(&up, Signal::KILL);
        up.wait().await.unwrap();
        let footprint = cluster.footprint();
        assert!(!footprint.left(false).is_empty(), "{moment:?}: it left something, or this proves nothing");
        cluster.down().await;
        cluster.is_gone(&footprint, false).await;
    }
}

#[tokio::test]
async fn an_up_that_fails_cleans_up_and_keeps_the_logs() {
    let cluster = Cluster::new("failed");
    let mut up = cluster.up();
    cluster.until(Moment::Nodes, &mut up).await;
    let footprint = cluster.footprint();
    assert!(cluster.component("kube-apiserver").unwrap().signal(Signal::KILL));
    let status = tokio::time::timeout(TIMEOUT, up.wait()).await.expect("it ends").unwrap();
    assert_eq!(status.code(), Some(1), "{}", cluster.said());
    assert!(cluster.said().contains("kube-apiserver"), "it says who ended: {}", cluster.said());
    assert!(cluster.dir().join("log/kube-apiserver.log").is_file());
    cluster.is_gone(&footprint, true).await;
    cluster.down().await;
    cluster.is_gone(&footprint, false).await;
}

#[tokio::test]
async fn two_clusters_do_not_touch_each_other() {
    let (first, second) = (Cluster::new("first"), Cluster::new("second"));
    let (mut one, mut other) = (first.up(), second.up());
    let (one, other) = tokio::join!(one.wait(), other.wait());
    assert!(one.unwrap().success(), "{}", first.said());
    assert!(other.unwrap().success(), "{}", second.said());
    assert_ne!(first.slot(), second.slot());
    let footprint = first.footprint();
    first.down().await;
    assert!(footprint.left(false).is_empty(), "{:#?}", footprint.left(false));
    // `up` of a cluster that is well says so and changes nothing.
    assert!(second.up().wait().await.unwrap().success());
    assert!(second.said().contains("already up"), "the other one was harmed: {}", second.said());
    let footprint = second.footprint();
    second.down().await;
    second.is_gone(&footprint, false).await;
}
