//! What a cluster has started, written down before and while it happens, so that `down` finds it.

use super::LocalError;
use super::plan::Plan;
use crate::process::ProcessId;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A process that the cluster started.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Started {
    /// Which component, such as `kubelet-2`; its log is `log/COMPONENT.log`.
    pub component: String,
    /// The process.
    pub process: ProcessId,
}

/// The file `cluster.json` of a cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Addresses and names.
    pub plan: Plan,
    /// How many nodes.
    pub nodes: u32,
    /// Whether `up` came to its end.
    pub ready: bool,
    /// Nodes that are cut off.
    pub cut: Vec<u32>,
    /// In the order of their start.
    pub processes: Vec<Started>,
}

impl Record {
    fn file(dir: &Path) -> PathBuf {
        dir.join("cluster.json")
    }

    /// Reads the record; `None` if there is no cluster.
    pub fn read(dir: &Path) -> Result<Option<Self>, LocalError> {
        let file = Self::file(dir);
        match std::fs::read(&file) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).map_err(|e| LocalError::file(&file)(e.into()))?)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(LocalError::file(&file)(e)),
        }
    }

    /// Writes the record, complete or not at all.
    pub fn write(&self, dir: &Path) -> Result<(), LocalError> {
        let file = Self::file(dir);
        let fresh = file.with_extension("json.new");
        let write = || {
            std::fs::write(&fresh, serde_json::to_vec_pretty(self)?)?;
            std::fs::rename(&fresh, &file)
        };
        write().map_err(LocalError::file(&file))
    }

    /// The process of a component.
    pub fn process(&self, component: &str) -> Option<ProcessId> {
        self.processes.iter().rev().find(|p| p.component == component).map(|p| p.process)
    }
}
