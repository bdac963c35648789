//! What a process uses, as `/proc` tells it.

use std::time::Duration;

/// `/proc/PID/stat` counts CPU time in these; Linux shows 100 a second to programs on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU time (user and system) that a process has used since its start, in steps of 10 ms; `None`: it is gone.
pub fn cpu(pid: u32) -> Option<Duration> {
    parse_cpu(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Resident memory of a process; `None`: it is gone.
pub fn memory(pid: u32) -> Option<Memory> {
    parse_memory(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

/// Resident memory, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Now.
    pub now_kib: u64,
    /// The most since the process started.
    pub peak_kib: u64,
}

/// The load of the machine over the last minute.
pub fn load_average() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// Fields 14 and 15. The command name (field 2) may hold blanks and parentheses, so counting begins behind its last one.
fn parse_cpu(stat: &str) -> Option<Duration> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace().skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(Duration::from_secs_f64((f64::from(user) + f64::from(system)) / TICKS_PER_SECOND))
}

fn parse_memory(status: &str) -> Option<Memory> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    Some(Memory { now_kib: field("VmRSS")?, peak_kib: field("VmHWM")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_user_and_system_time() {
        let line = "42 (a (b) c) S 1 42 42 0 -1 4194560 1 2 3 4 1250 50 7 8 20 0 1 0 987654 1 2";
        assert_eq!(parse_cpu(line), Some(Duration::from_secs(13)));
        assert_eq!(parse_cpu("42 (x) S 1"), None);
        assert_eq!(parse_cpu(""), None);
    }

    #[test]
    fn memory_is_read_by_name() {
        let status =
            "Name:\tVmRSS: 7 kB\nVmPeak:\t  999999 kB\nVmHWM:\t  415232 kB\nVmRSS:\t  131072 kB\nRssAnon:\t 1 kB\n";
        assert_eq!(parse_memory(status), Some(Memory { now_kib: 131_072, peak_kib: 415_232 }));
        assert_eq!(parse_memory("Name:\tkthreadd\n"), None, "a kernel thread has no memory of its own");
    }

    #[test]
    fn this_process_is_found_and_a_missing_one_is_not() {
        let me = std::process::id();
        assert!(cpu(me).is_some() && memory(me).is_some_and(|memory| memory.peak_kib >= memory.now_kib));
        assert!(cpu(u32::MAX).is_none() && memory(u32::MAX).is_none());
    }
}
