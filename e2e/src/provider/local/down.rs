//! `down`: whatever is there is removed, from a cluster that is ready as well as from one that never was.

use super::cgroup::Cgroups;
use super::network::Network;
use super::plan::Plan;
use super::record::Record;
use super::{LocalCluster, LocalError, slot, sysctl};
use std::path::Path;
use std::time::Duration;

impl LocalCluster {
    /// Leaves nothing but, if asked, the logs.
    pub(super) async fn take_down(&self, keep_logs: bool) -> Result<(), LocalError> {
        let Some(record) = self.record_or_guess()? else {
            let _ = std::fs::remove_dir_all(&self.dir);
            self.progress.say(format!("the cluster {} is not up: nothing to take down", self.name));
            return Ok(());
        };
        self.progress.say(format!("taking the cluster {} down", self.name));
        stop_processes(&record).await;
        // The pods, their shims, and whatever a killed run could not write down.
        let mut left: Vec<String> =
            Cgroups::new(record.plan.cgroup()).remove().await.iter().map(|p| p.display().to_string()).collect();
        Network::new(&self.dir, record.plan).remove().await;
        left.extend(self.unmount_all().await);
        if !left.is_empty() {
            return Err(LocalError::Leftovers { left: left.join(", ") });
        }
        self.remove_files(keep_logs)?;
        slot::give_back(record.plan.slot, || {
            sysctl::restore();
            // Other clusters mount over these, so only the last one may remove them; those that hold something stay.
            for dir in ["/run/netns", "/run/containerd", "/var/lib/cni", "/var/log/containers"] {
                let _ = std::fs::remove_dir(dir);
            }
        })
        .await?;
        self.progress.say("down, nothing is left");
        Ok(())
    }

    /// The record, or if `up` was killed before it wrote one, what the slot's file says.
    fn record_or_guess(&self) -> Result<Option<Record>, LocalError> {
        if let Some(record) = Record::read(&self.dir)? {
            return Ok(Some(record));
        }
        let slot = slot::of(&self.name);
        Ok(slot.map(|slot| Record {
            plan: Plan { slot },
            nodes: 0,
            ready: false,
            cut: Vec::new(),
            processes: Vec::new(),
        }))
    }

    async fn unmount_all(&self) -> Vec<String> {
        let mut left = Vec::new();
        for _ in 0..3 {
            left = mounts_below(&self.dir);
            for mount in &left {
                let _ = crate::command::Run::new("umount").arg(mount).run().await;
            }
            if left.is_empty() {
                break;
            }
        }
        mounts_below(&self.dir).into_iter().filter(|m| left.contains(m)).collect()
    }

    fn remove_files(&self, keep_logs: bool) -> Result<(), LocalError> {
        let Ok(entries) = std::fs::read_dir(&self.dir) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if keep_logs && entry.file_name() == "log" {
                continue;
            }
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.map_err(LocalError::file(&path))?;
        }
        if !keep_logs {
            std::fs::remove_dir(&self.dir).map_err(LocalError::file(&self.dir))?;
        }
        Ok(())
    }
}

/// Kubelets first, so that nothing starts pods again, then all the others. Nothing here is worth a long goodbye.
async fn stop_processes(record: &Record) {
    let (kubelets, others): (Vec<_>, Vec<_>) =
        record.processes.iter().partition(|p| p.component.starts_with("kubelet"));
    for group in [kubelets, others] {
        let mut stopping = tokio::task::JoinSet::new();
        for started in group {
            let process = started.process;
            stopping.spawn(async move { process.stop(Duration::from_secs(1)).await });
        }
        while stopping.join_next().await.is_some() {}
    }
}

/// Mount points below a directory, the deepest first.
fn mounts_below(dir: &Path) -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<String> = table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4))
        .filter(|mount| Path::new(mount).starts_with(dir))
        .map(str::to_owned)
        .collect();
    found.sort_by_key(|mount| std::cmp::Reverse(mount.len()));
    found
}
