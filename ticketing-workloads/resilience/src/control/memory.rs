//! The memory check (ADR-007 §4): what the process holds against its limit. Too much makes it degraded, as in the ADR; too much
//! for too long makes it unhealthy, so that its recovery can begin.

use crate::clock::in_words;
use crate::control::health::CheckOutcome;
use crate::sync::lock;
use contract::defaults::MEMORY_DEGRADED_FOR_MS;
use contract::{CheckStatus, HealthCheckSettings};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// The ADR's limit: 1 GiB.
const DEFAULT_MAX_BYTES: u64 = 1 << 30;
/// Or this share of the container's limit, whichever is less.
const DEFAULT_MAX_PERCENT: u32 = 80;
/// cgroup v1 writes "no limit" as the largest page-aligned number.
const NO_LIMIT_FROM: u64 = 1 << 60;

/// Where the figures are read, and since when they have been too high.
#[derive(Debug)]
pub struct MemoryProbe {
    status_file: PathBuf,
    limit_files: Vec<PathBuf>,
    too_much_since: Mutex<Option<Instant>>,
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
        Self { status_file: status_file.to_owned(), limit_files, too_much_since: Mutex::default() }
    }

    /// Runs the check.
    pub fn check(&self, settings: &HealthCheckSettings) -> CheckOutcome {
        let Some(used) = self.resident_bytes() else {
            return CheckOutcome::new(
                CheckStatus::Unknown,
                "the memory in use is unknown: /proc/self/status has no VmRSS",
            );
        };
        let limit = self.limit();
        let max = threshold(settings, limit);
        let patience = Duration::from_millis(settings.memory_degraded_for_ms.unwrap_or(MEMORY_DEGRADED_FOR_MS));
        let status = self.evaluate(used >= max, patience);
        let message = if status == CheckStatus::Unhealthy {
            // Without the figure of the moment: a message that changes with every run is news each time.
            format!("more than {} MiB in use for {} or longer", max >> 20, in_words(patience))
        } else {
            format!("{} MiB in use, of {} MiB", used >> 20, max >> 20)
        };
        CheckOutcome::new(status, message)
            .with("usedBytes", json!(used))
            .with("maxBytes", json!(max))
            .with("limitBytes", json!(limit))
            .with("usedPercent", json!(used.saturating_mul(100) / max.max(1)))
    }

    /// Bytes that the process has in memory, if the kernel says so.
    pub fn resident_bytes(&self) -> Option<u64> {
        std::fs::read_to_string(&self.status_file).ok().as_deref().and_then(resident_bytes)
    }

    fn evaluate(&self, too_much: bool, patience: Duration) -> CheckStatus {
        let mut since = lock(&self.too_much_since);
        if !too_much {
            *since = None;
            return CheckStatus::Healthy;
        }
        let lasts = since.get_or_insert_with(Instant::now).elapsed();
        if lasts >= patience { CheckStatus::Unhealthy } else { CheckStatus::Degraded }
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

    #[tokio::test(start_paused = true)]
    async fn too_much_for_too_long_is_unhealthy() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("memory.max"), "104857600\n").unwrap();
        let status = root.path().join("status");
        let probe = MemoryProbe::new(&status, root.path());
        let check = |used_mib: u64, settings: &HealthCheckSettings| {
            std::fs::write(&status, format!("VmRSS: {} kB\n", used_mib * 1024)).unwrap();
            probe.check(settings)
        };
        let (usual, said) = (HealthCheckSettings::default(), |ms| HealthCheckSettings {
            memory_degraded_for_ms: Some(ms),
            ..HealthCheckSettings::default()
        });
        assert_eq!(check(90, &usual).status(), CheckStatus::Degraded);
        tokio::time::advance(Duration::from_millis(MEMORY_DEGRADED_FOR_MS - 1_000)).await;
        assert_eq!(check(90, &usual).status(), CheckStatus::Degraded);
        assert_eq!(check(90, &said(10_000)).status(), CheckStatus::Unhealthy, "the policy has less patience");
        tokio::time::advance(Duration::from_secs(1)).await;
        let words = |outcome: &CheckOutcome| outcome.message().to_owned();
        let outcome = check(90, &usual);
        assert_eq!((outcome.status(), words(&outcome)), (CheckStatus::Unhealthy, words(&check(95, &usual))));
        assert_eq!(words(&outcome), "more than 80 MiB in use for 1 min or longer");
        assert_eq!(check(90, &said(120_000)).status(), CheckStatus::Degraded, "it has more");
        assert_eq!(check(70, &usual).status(), CheckStatus::Healthy);
        assert_eq!(check(90, &usual).status(), CheckStatus::Degraded, "its time begins anew");
        assert_eq!(check(90, &said(0)).status(), CheckStatus::Unhealthy);
    }

    #[test]
    fn works_on_this_machine() {
        let outcome = MemoryProbe::default().check(&HealthCheckSettings::default());
        assert_ne!(outcome.status(), CheckStatus::Unknown, "{outcome:?}");
    }
}
