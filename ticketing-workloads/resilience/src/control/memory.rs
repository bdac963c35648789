//! The memory check (ADR-007 §4): what the process holds against its limit. Too much makes it degraded, never
//! unhealthy, as in the ADR.

use crate::control::health::CheckOutcome;
use contract::{CheckStatus, HealthCheckSettings};
use serde_json::json;
use std::path::{Path, PathBuf};

/// The ADR's limit: 1 GiB.
const DEFAULT_MAX_BYTES: u64 = 1 << 30;
/// Or this share of the container's limit, whichever is less.
const DEFAULT_MAX_PERCENT: u32 = 80;
/// cgroup v1 writes "no limit" as the largest page-aligned number.
const NO_LIMIT_FROM: u64 = 1 << 60;

/// Where the figures are read.
#[derive(Clone, Debug)]
pub struct MemoryProbe {
    status_file: PathBuf,
    limit_files: Vec<PathBuf>,
}

impl Default for MemoryProbe {
    fn default() -> Self {
        Self::new(Path::new("/proc/self/status"), Path::new("/sys/fs/cgroup"))
    }
}

impl MemoryProbe {
    /// A probe over these places.
    pub fn new(status_file: &Path, cgroup: &Path) -> Self {
        // Version 2 of cgroups, then version 1.
        let limit_files = ["memory.max", "memory/memory.limit_in_bytes"].map(|name| cgroup.join(name)).into();
        Self { status_file: status_file.to_owned(), limit_files }
    }

    /// Runs the check.
    pub fn check(&self, settings: &HealthCheckSettings) -> CheckOutcome {
        let Some(used) = std::fs::read_to_string(&self.status_file).ok().as_deref().and_then(resident_bytes) else {
            return CheckOutcome::new(
                CheckStatus::Unknown,
                "the memory in use is unknown: /proc/self/status has no VmRSS",
            );
        };
        let limit = self.limit();
        let max = threshold(settings, limit);
        let status = if used >= max { CheckStatus::Degraded } else { CheckStatus::Healthy };
        let message = format!("{} MiB in use, of {} MiB", used >> 20, max >> 20);
        CheckOutcome::new(status, message)
            .with("usedBytes", json!(used))
            .with("maxBytes", json!(max))
            .with("limitBytes", json!(limit))
            .with("usedPercent", json!(used.saturating_mul(100) / max.max(1)))
    }

    fn limit(&self) -> Option<u64> {
        let text = self.limit_files.iter().find_map(|file| std::fs::read_to_string(file).ok())?;
        text.trim().parse().ok().filter(|limit| *limit < NO_LIMIT_FROM)
    }
}

/// What is set holds alone; with nothing set, the lesser of the defaults.
fn threshold(settings: &HealthCheckSettings, limit: Option<u64>) -> u64 {
    let share = |percent: u32| limit.map(|limit| limit / 100 * u64::from(percent));
    match (settings.memory_max_bytes, settings.memory_max_percent) {
        (Some(bytes), None) => bytes,
        (None, Some(percent)) => share(percent).unwrap_or(DEFAULT_MAX_BYTES),
        (bytes, percent) => {
            let bytes = bytes.unwrap_or(DEFAULT_MAX_BYTES);
            share(percent.unwrap_or(DEFAULT_MAX_PERCENT)).map_or(bytes, |share| share.min(bytes))
        }
    }
}

/// `VmRSS:     5120 kB`, as the kernel writes it.
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[rstest::rstest]
    #[case::no_limit(None, None, None, 1024 * MIB)]
    #[case::small_container(None, None, Some(100 * MIB), 80 * MIB)]
    #[case::large_container(None, None, Some(64 * 1024 * MIB), 1024 * MIB)]
    #[case::bytes_alone(Some(2048 * MIB), None, Some(100 * MIB), 2048 * MIB)]
    #[case::percent_alone(None, Some(50), Some(4000 * MIB), 2000 * MIB)]
    #[case::both(Some(1500 * MIB), Some(50), Some(4000 * MIB), 1500 * MIB)]
    fn thresholds(
        #[case] bytes: Option<u64>,
        #[case] percent: Option<u32>,
        #[case] limit: Option<u64>,
        #[case] expected: u64,
    ) {
        let settings =
            HealthCheckSettings { memory_max_bytes: bytes, memory_max_percent: percent, ..Default::default() };
        assert!(threshold(&settings, limit).abs_diff(expected) < 100, "rounding by percent");
    }

    #[rstest::rstest]
    #[case::version_2("memory.max", "104857600\n", 90, CheckStatus::Degraded)]
    #[case::version_2_without("memory.max", "max\n", 90, CheckStatus::Healthy)]
    #[case::version_1("memory/memory.limit_in_bytes", "104857600\n", 90, CheckStatus::Degraded)]
    #[case::version_1_without("memory/memory.limit_in_bytes", "9223372036854771712\n", 90, CheckStatus::Healthy)]
    #[case::enough("memory.max", "104857600\n", 70, CheckStatus::Healthy)]
    fn reads_both_versions_of_cgroups(
        #[case] file: &str,
        #[case] limit: &str,
        #[case] used_mib: u64,
        #[case] expected: CheckStatus,
    ) {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("memory")).unwrap();
        std::fs::write(root.path().join(file), limit).unwrap();
        let status = root.path().join("status");
        std::fs::write(&status, format!("Name:\tticketing\nVmRSS:\t  {} kB\n", used_mib * 1024)).unwrap();
        let outcome = MemoryProbe::new(&status, root.path()).check(&HealthCheckSettings::default());
        assert_eq!(outcome.status(), expected, "{outcome:?}");
    }

    #[test]
    fn works_on_this_machine() {
        let outcome = MemoryProbe::default().check(&HealthCheckSettings::default());
        assert_ne!(outcome.status(), CheckStatus::Unknown, "{outcome:?}");
    }
}
