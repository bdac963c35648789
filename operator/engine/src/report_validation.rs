//! Whether what a pod says of itself can be true. A pod may be broken or hostile: what cannot be true is not believed,
//! and nothing is decided from it.

use contract::{Applied, CheckReport, HealthReport, LoadReport};

/// Most checks, or kinds of actions, of a pod.
const MAX_CHECKS: usize = 64;
/// Most circuits of a pod.
const MAX_CIRCUITS: usize = 256;
/// Longest name of anything: what a status has room for.
const MAX_NAME: usize = 63;
/// Highest load that is not nonsense, in percent.
const MAX_LOAD: u32 = 100_000;
/// Longest name of what a load is the load of, in bytes.
const MAX_CAUSE: usize = 128;

/// Judges a health report. `pod` is the name of the pod that was asked, `newest` the newest revision that was published
/// for its workload, as far as is known. The error says what cannot be.
pub fn report(report: &HealthReport, pod: &str, newest: Option<i64>) -> Result<(), String> {
    if !report.pod.is_empty() && report.pod != pod {
        return Err(format!("it calls itself {}", shown(&report.pod)));
    }
    if report.checks.len() > MAX_CHECKS
        || report.actions_done.len() > MAX_CHECKS
        || report.circuits.len() > MAX_CIRCUITS
    {
        let (checks, circuits) = (report.checks.len(), report.circuits.len());
        return Err(format!("it has {checks} checks and {circuits} circuits, more than any workload has"));
    }
    let names = report.checks.keys().chain(report.circuits.keys()).chain([&report.instance]);
    if let Some(long) = names.into_iter().find(|name| name.len() > MAX_NAME) {
        return Err(format!("it has a name of {} bytes", long.len()));
    }
    if let Some((name, _)) = report.checks.iter().find(|(_, check)| !possible(check)) {
        return Err(format!("its check {name} failed more often than it ran"));
    }
    load(&report.load)?;
    applied(&report.applied, newest)
}

/// Judges what a pod says of its load.
fn load(load: &LoadReport) -> Result<(), String> {
    let others = [load.bulkhead_percent, load.queue_percent, load.limit_percent, load.worst_percent];
    let highest = others.into_iter().flatten().chain([load.percent]).max().unwrap_or_default();
    if highest > MAX_LOAD {
        return Err(format!("its load is {highest} percent"));
    }
    if load.cause.len() > MAX_CAUSE || load.cause.chars().any(char::is_control) {
        return Err(format!("its load is of {:?}", shown(&load.cause)));
    }
    Ok(())
}

/// Judges what a pod says that it runs.
pub fn applied(applied: &Applied, newest: Option<i64>) -> Result<(), String> {
    let revision = applied.revision;
    if newest.is_some_and(|newest| revision > newest) {
        return Err(format!("it runs revision {revision}, which was never published"));
    }
    let hash = &applied.content_hash;
    let is_hash = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
    match (revision, hash.is_empty()) {
        (0, true) => Ok(()),
        (1.., false) if is_hash => Ok(()),
        _ => Err(format!("it runs revision {revision} with the hash {:?}", shown(hash))),
    }
}

fn possible(check: &CheckReport) -> bool {
    u64::from(check.consecutive_failures) <= check.runs
}

/// The beginning of what may be anything.
fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::CheckStatus;
    use std::collections::BTreeMap;

    fn check() -> CheckReport {
        CheckReport {
            status: CheckStatus::Unhealthy,
            message: String::new(),
            tags: vec![],
            dependency: None,
            dependency_answers: None,
            duration_ms: 1,
            consecutive_failures: 3,
            runs: 3,
            data: BTreeMap::new(),
        }
    }

    fn sound() -> HealthReport {
        HealthReport {
            status: CheckStatus::Unhealthy,
            pod: "pod-1".into(),
            instance: "i".into(),
            checks: BTreeMap::from([("database".into(), check())]),
            circuits: BTreeMap::new(),
            load: LoadReport { in_flight: 1, percent: 140, worst_percent: Some(150), ..LoadReport::default() },
            degraded: false,
            applied: Applied { revision: 7, content_hash: "a".repeat(64), ..Applied::default() },
            actions_done: BTreeMap::new(),
        }
    }

    #[test]
    fn what_can_be_true_is_believed() {
        assert_eq!(report(&sound(), "pod-1", Some(7)), Ok(()));
        assert_eq!(report(&sound(), "pod-1", Some(9)), Ok(()), "it lags behind");
        assert_eq!(report(&sound(), "pod-1", None), Ok(()), "nothing is known of what was published");
        assert_eq!(applied(&Applied::default(), Some(7)), Ok(()), "it started without a configuration");
    }

    #[rstest::rstest]
    #[case::another_name(|r: &mut HealthReport| r.pod = "pod-2".into(), "calls itself pod-2")]
    #[case::never_published(|r: &mut HealthReport| r.applied.revision = 8, "revision 8, which was never published")]
    #[case::negative(|r: &mut HealthReport| r.applied.revision = -1, "revision -1")]
    #[case::no_hash(|r: &mut HealthReport| r.applied.content_hash.clear(), "revision 7 with the hash")]
    #[case::nonsense_hash(|r: &mut HealthReport| r.applied.content_hash = "z".repeat(64), "with the hash")]
    #[case::more_failures_than_runs(|r: &mut HealthReport| { r.checks.get_mut("database").unwrap().runs = 2; }, "more often than it ran")]
    #[case::load(|r: &mut HealthReport| r.load.percent = u32::MAX, "load is")]
    #[case::worst_load(|r: &mut HealthReport| r.load.worst_percent = Some(u32::MAX), "load is 4294967295 percent")]
    #[case::load_of_a_queue(|r: &mut HealthReport| r.load.queue_percent = Some(100_001), "load is 100001 percent")]
    #[case::a_long_cause(|r: &mut HealthReport| r.load.cause = "x".repeat(129), "its load is of")]
    #[case::a_cause_of_two_lines(|r: &mut HealthReport| r.load.cause = "a\nb".into(), "its load is of")]
    #[case::many_checks(|r: &mut HealthReport| r.checks.extend((0..100).map(|n| (n.to_string(), check()))), "101 checks")]
    #[case::a_long_name(|r: &mut HealthReport| { r.checks.insert("x".repeat(500), check()); }, "500 bytes")]
    fn what_cannot_be_true_is_named(#[case] change: fn(&mut HealthReport), #[case] expected: &str) {
        let mut lie = sound();
        change(&mut lie);
        let error = report(&lie, "pod-1", Some(7)).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
