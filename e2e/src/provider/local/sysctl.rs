//! The kubelet changes settings of the whole machine; the first cluster up remembers them, the last one down puts them back.

use super::state_root;
use std::collections::BTreeMap;
use std::path::PathBuf;

const CHANGED_BY_KUBELET: &[&str] = &[
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

fn file() -> PathBuf {
    state_root().join("slots/sysctl-before.json")
}

/// Remembers the settings, unless a cluster that is up already did.
pub fn remember() -> std::io::Result<()> {
    if file().exists() {
        return Ok(());
    }
    let read = |name: &&'static str| Some((*name, std::fs::read_to_string(format!("/proc/sys/{name}")).ok()?));
    let before: BTreeMap<_, _> = CHANGED_BY_KUBELET.iter().filter_map(read).collect();
    std::fs::write(file(), serde_json::to_vec_pretty(&before)?)
}

/// Puts them back.
pub fn restore() {
    let before = std::fs::read(file()).ok().and_then(|b| serde_json::from_slice::<BTreeMap<String, String>>(&b).ok());
    for (name, value) in before.unwrap_or_default() {
        let path = format!("/proc/sys/{name}");
        if std::fs::read_to_string(&path).is_ok_and(|now| now != value) {
            let _ = std::fs::write(path, value.trim());
        }
    }
    let _ = std::fs::remove_file(file());
}
