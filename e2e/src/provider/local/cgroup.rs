//! The cluster's cgroups: everything it starts is in them, so that everything can be found.
//!
//! `ticketwave-SLOT/system` holds the components and the containers' shims, `ticketwave-SLOT/node-N` the pods of a node.
//! Works with the separate controllers of version 1 and with version 2.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The cgroups of one cluster, in every hierarchy of this machine.
#[derive(Debug)]
pub struct Cgroups {
    roots: Vec<PathBuf>,
    name: String,
}

impl Cgroups {
    /// Looks at what is mounted; `name` is the cluster's own cgroup.
    pub fn new(name: String) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self { roots: hierarchies(&mounts), name }
    }

    /// Makes the cgroups of this many nodes.
    pub fn create(&self, nodes: u32) -> std::io::Result<()> {
        for root in &self.roots {
            // In version 2 a controller is only there below if the level above passes it on.
            pass_controllers_on(root);
            let top = root.join(&self.name);
            make(&top)?;
            pass_controllers_on(&top);
            make(&top.join("system"))?;
            for node in 1..=nodes {
                make(&top.join(super::plan::node_name(node)))?;
            }
        }
        Ok(())
    }

    /// The files that a component writes its process id to.
    pub fn system_procs(&self) -> Vec<PathBuf> {
        self.roots.iter().map(|root| root.join(&self.name).join("system/cgroup.procs")).collect()
    }

    /// Kills all that is left in them, and removes them; returns what could not be removed.
    pub async fn remove(&self) -> Vec<PathBuf> {
        for attempt in 0..100 {
            let mut left = Vec::new();
            for root in &self.roots {
                let top = root.join(&self.name);
                if top.is_dir() {
                    kill_and_remove(&top);
                    if top.is_dir() {
                        left.push(top);
                    }
                }
            }
            if left.is_empty() || attempt == 99 {
                return left;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Vec::new()
    }
}

/// Mount points of the cgroup hierarchies.
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let find = |kind: &str| -> Vec<PathBuf> {
        mountinfo
            .lines()
            .filter_map(|line| {
                let (mount, filesystem) = line.split_once(" - ")?;
                let fields: Vec<&str> = mount.split_whitespace().collect();
                (filesystem.split_whitespace().next()? == kind).then(|| PathBuf::from(fields[4]))
            })
            .collect()
    };
    let mut found = find("cgroup");
    found.extend(find("cgroup2"));
    found
}

fn make(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    // Version 1: nothing can run in a cpuset that has no processors and no memory.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = dir.join(file);
        let empty = std::fs::read_to_string(&own).is_ok_and(|text| text.trim().is_empty());
        if empty && !dir.join("cgroup.controllers").exists() {
            let above = std::fs::read_to_string(dir.join("..").join(file))?;
            std::fs::write(own, above.trim())?;
        }
    }
    Ok(())
}

fn pass_controllers_on(dir: &Path) {
    let Ok(list) = std::fs::read_to_string(dir.join("cgroup.controllers")) else {
        return;
    };
    for controller in list.split_whitespace() {
        // One that cannot be passed on is reported by the kubelet if it matters.
        let _ = std::fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

fn kill_and_remove(dir: &Path) {
    if let Ok(children) = std::fs::read_dir(dir) {
        for child in children.flatten().filter(|c| c.file_type().is_ok_and(|t| t.is_dir())) {
            kill_and_remove(&child.path());
        }
    }
    // A frozen process cannot die.
    let _ = std::fs::write(dir.join("freezer.state"), "THAWED");
    for pid in std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Some(pid) = pid.parse().ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    let _ = std::fs::remove_dir(dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_the_mount_table() {
        let text = "25 20 0:22 / /sys rw - sysfs sysfs rw\n\
                    30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                    31 25 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(hierarchies(text), [PathBuf::from("/sys/fs/cgroup/cpu"), PathBuf::from("/sys/fs/cgroup/unified")]);
    }
}
