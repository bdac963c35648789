//! The tables, in Markdown: figures, their ratios, and the goals beside them.

use super::fleet::{CROWD, PROBE_SECONDS, SILENT};
use super::results::{Changes, Disturbed, PerEvent, Phase, Run};
use super::statistics::{Spread, millis};
use super::usage::Memory;
use std::fmt::Write;
use std::time::Duration;

/// Goals of the project.
mod goal {
    /// All policies programmed, as a multiple of applying them and the bare writes.
    pub const PROGRAMMED: f64 = 1.3;
    /// Memory, in MiB.
    pub const MEMORY_MIB: f64 = 128.0;
    /// CPU at rest, in cores, at [`PROBES`] a second.
    pub const REST_CORES: f64 = 0.10;
    /// Probes a second that the goal at rest is about.
    pub const PROBES: f64 = 2_000.0;
    /// A change, 99 percent, in milliseconds.
    pub const CHANGE_MS: f64 = 60.0;
    /// An action, 99 percent, in milliseconds.
    pub const ACTION_MS: f64 = 30.0;
    /// A new leader, in seconds beyond one probe interval.
    pub const LEADER_SECONDS: f64 = 2.0;
    /// CPU of a new leader until it knows all pods, in seconds.
    pub const LEADER_CPU_SECONDS: f64 = 3.0;
    /// How much the cost of an event may differ from one size to the next, in percent.
    pub const EVENT_PERCENT: f64 = 20.0;
}

/// Writes the whole report. `runs` are in the order in which they were made: of each size, our operator first.
pub fn markdown(runs: &[Run], cores: usize, kubernetes: &str) -> String {
    let mut text = format!("# Scale\n\nKubernetes {kubernetes}, {cores} cores shared by everything.\n");
    let mut rest = runs;
    while let Some(first) = rest.first() {
        let same = rest.iter().take_while(|run| run.size == first.size).count();
        let (group, others) = rest.split_at(same);
        table(&mut text, group);
        rest = others;
    }
    events_table(&mut text, runs);
    text
}

/// A line of a table.
struct Line {
    name: String,
    cells: Vec<String>,
    goal: String,
    met: Option<bool>,
}

fn table(text: &mut String, runs: &[Run]) {
    let Some(size) = runs.first().map(|run| run.size) else { return };
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let load: Vec<String> = runs.iter().map(|run| format!("{:.1}", run.load_before)).collect();
    let _ = writeln!(
        text,
        "\n## {} policies, {} pods\n\nLoad of the machine before: {}.\n\n| | {} | goal | |\n|---|{}---|---|",
        thousands(size.policies),
        thousands(size.pods()),
        load.join(", "),
        names.join(" | "),
        "---:|".repeat(runs.len()),
    );
    for line in lines(runs) {
        let met = match line.met {
            Some(true) => "✓",
            Some(false) => "✗",
            None => "",
        };
        let _ = writeln!(text, "| {} | {} | {} | {met} |", line.name, line.cells.join(" | "), line.goal);
    }
}

fn lines(runs: &[Run]) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut line = |name: String, goal: String, met: Option<bool>, cell: &dyn Fn(&Run) -> String| {
        lines.push(Line { name, cells: runs.iter().map(cell).collect(), goal, met });
    };
    let Some(ours) = runs.first() else { return lines };
    let count = thousands(ours.size.policies);
    line(format!("applying {count} policies, nobody listens"), String::new(), None, &|run| {
        show(&run.bare, |bare| seconds(bare.applying))
    });
    line(format!("bare writes: {count} ConfigMaps, status patches, Secrets"), String::new(), None, &|run| {
        show(&run.bare, |bare| seconds(bare.writes))
    });
    line("applying them to the operator".to_owned(), String::new(), None, &|run| {
        show(&run.programmed, |programmed| seconds(programmed.applying))
    });
    let met = programmed_ratio(ours).map(|ratio| ratio <= goal::PROGRAMMED && ahead_of_all(runs));
    line(
        "**all Programmed** (× applying + bare writes)".to_owned(),
        format!("≤ {} ×, {}", goal::PROGRAMMED, if runs.len() > 1 { "ahead of the peer" } else { "no peer measured" }),
        met,
        &|run| {
            show(&run.programmed, |programmed| {
                let ratio = programmed_ratio(run).map(|ratio| format!(" ({ratio:.2} ×)")).unwrap_or_default();
                seconds(programmed.all) + &ratio
            })
        },
    );
    line("CPU for it".to_owned(), String::new(), None, &|run| {
        show(&run.programmed, |programmed| {
            let each = programmed.cpu.as_secs_f64() * 1_000.0 / decimal(run.size.policies);
            format!("{}, {each:.1} ms a policy", seconds(programmed.cpu))
        })
    });
    line("writes and pushes for it".to_owned(), String::new(), None, &|run| {
        show(&run.programmed, |programmed| {
            let each = f64::from(programmed.writes.total()) / decimal(run.size.policies);
            format!("{each:.1} writes a policy, {} pushes, {} in vain", programmed.told.pushes, programmed.told.in_sync)
        })
    });
    line("RSS, caches filled".to_owned(), String::new(), None, &|run| show(&run.idle, |memory| mib(*memory)));
    line("RSS, programmed".to_owned(), String::new(), None, &|run| {
        show(&run.programmed, |programmed| mib(programmed.memory))
    });
    let met = ours.hour.done().map(|hour| hour.memory.peak_kib).map(|peak| to_mib(peak) <= goal::MEMORY_MIB);
    line(
        "**RSS, after an hour's worth of events** (peak)".to_owned(),
        format!("≤ {} MiB", goal::MEMORY_MIB),
        met,
        &|run| show(&run.hour, |hour| format!("{} ({:.0})", mib(hour.memory), to_mib(hour.memory.peak_kib))),
    );
    // With few pods it says nothing about the goal.
    let probed = ours.rest.done().filter(|rest| rest.probes_per_second >= 0.95 * goal::PROBES);
    let met = probed.map(|rest| rest.cores <= goal::REST_CORES);
    line(
        "**CPU at rest** (probes a second)".to_owned(),
        format!("≤ {:.2} core at {}", goal::REST_CORES, goal::PROBES),
        met,
        &|run| {
            show(&run.rest, |rest| {
                format!("{:.3} core ({:.0}; {} writes)", rest.cores, rest.probes_per_second, rest.writes)
            })
        },
    );
    line("one bare write p50 / p99".to_owned(), String::new(), None, &|run| show(&run.write, Spread::to_string));
    change_lines(&mut line, ours, "change", &|run| run.changes.clone());
    let met = ours.actions.done().map(|actions| at_most(actions.delay.p99, goal::ACTION_MS) && actions.missing == 0);
    line(
        "**third failing report → action** p50 / p99".to_owned(),
        format!("p99 ≤ {} ms", goal::ACTION_MS),
        met,
        &|run| {
            show(&run.actions, |actions| {
                let missing = if actions.missing > 0 { format!(", {} never", actions.missing) } else { String::new() };
                format!("{}{missing}", actions.delay)
            })
        },
    );
    line("CPU per status of a pod that says nothing new".to_owned(), "below".to_owned(), None, &|run| {
        show(&run.events, |events| micros(events.plain))
    });
    line("CPU per pod that turns ready or not".to_owned(), "below".to_owned(), None, &|run| {
        show(&run.events, |events| micros(events.ready))
    });
    leader_lines(&mut line, ours);
    for (name, phase) in disturbances() {
        disturbed_lines(&mut line, ours, &name, phase);
    }
    line("CPU of this tool: programming; at rest".to_owned(), String::new(), None, &|run| {
        let programming = show(&run.programmed, |programmed| seconds(programmed.tool_cpu));
        format!("{programming}; {}", show(&run.rest, |rest| format!("{:.2} core", rest.tool_cores)))
    });
    lines
}

type AddLine<'a> = dyn FnMut(String, String, Option<bool>, &dyn Fn(&Run) -> String) + 'a;

fn change_lines(line: &mut AddLine<'_>, ours: &Run, what: &str, of: &dyn Fn(&Run) -> Phase<Changes>) {
    let goal = format!("p99 ≤ {} ms", goal::CHANGE_MS);
    let pods = of(ours).done().map(|changes| at_most(changes.pods.p99, goal::CHANGE_MS));
    line(format!("**{what} → pods** p50 / p99"), goal.clone(), pods, &|run| {
        show(&of(run), |changes| {
            let late = if changes.late > 0 { format!(", {} given up", changes.late) } else { String::new() };
            format!("{}{late}", changes.pods)
        })
    });
    let status = of(ours).done().map(|changes| at_most(changes.status.p99, goal::CHANGE_MS));
    line(format!("**{what} → status** p50 / p99"), goal, status, &|run| {
        show(&of(run), |changes| changes.status.to_string())
    });
}

fn leader_lines(line: &mut AddLine<'_>, ours: &Run) {
    let within = f64::from(PROBE_SECONDS) + goal::LEADER_SECONDS;
    let failover = ours.failover.done();
    line(
        "**leader killed: the next one knows all pods** (lease after)".to_owned(),
        format!("≤ {within:.0} s after the lease"),
        failover.map(|failover| failover.knows_all.as_secs_f64() <= within),
        &|run| show(&run.failover, |failover| format!("{} ({})", seconds(failover.knows_all), seconds(failover.leads))),
    );
    line(
        "**CPU of the next one until then**".to_owned(),
        format!("≤ {:.0} s", goal::LEADER_CPU_SECONDS),
        failover.map(|failover| failover.cpu.as_secs_f64() <= goal::LEADER_CPU_SECONDS),
        &|run| show(&run.failover, |failover| seconds(failover.cpu)),
    );
    line(
        "**pushes to pods in sync by the next one**".to_owned(),
        "0".to_owned(),
        failover.map(|failover| failover.told.in_sync == 0),
        &|run| show(&run.failover, |failover| format!("{} of {}", failover.told.in_sync, failover.told.pushes)),
    );
}

type DisturbedPhase = fn(&Run) -> &Phase<Disturbed>;

fn disturbances() -> [(String, DisturbedPhase); 2] {
    [
        (format!("{CROWD} pods of one workload fail"), |run| &run.crowd),
        (format!("{SILENT} pods do not answer"), |run| &run.silent),
    ]
}

fn disturbed_lines(line: &mut AddLine<'_>, ours: &Run, name: &str, phase: DisturbedPhase) {
    line(format!("{name}: CPU (beyond that of the changes)"), String::new(), None, &|run| {
        show(phase(run), |disturbed| {
            let beyond = beyond_changes(run, disturbed).map(|(cores, _)| format!(" ({cores:+.2})")).unwrap_or_default();
            format!("{:.2} core{beyond}", disturbed.changes.cores)
        })
    });
    line(format!("{name}: writes (beyond those of the changes)"), String::new(), None, &|run| {
        show(phase(run), |disturbed| {
            let beyond =
                beyond_changes(run, disturbed).map(|(_, writes)| format!(" ({writes:+.0})")).unwrap_or_default();
            let window = disturbed.window.as_secs();
            format!("{}{beyond} in {window} s; {} actions", disturbed.changes.writes, disturbed.actions)
        })
    });
    line(format!("{name}: other pods asked"), String::new(), None, &|run| {
        show(phase(run), |disturbed| format!("{:.0} % of their probes", disturbed.heard_percent))
    });
    change_lines(line, ours, &format!("{name}: change elsewhere"), &|run| match phase(run) {
        Phase::Done(disturbed) => Phase::Done(disturbed.changes),
        Phase::Failed(why) => Phase::Failed(why.clone()),
        Phase::NotRun => Phase::NotRun,
    });
}

/// What the misbehaving pods cost beyond what the changes alone cost in calm: cores and writes.
fn beyond_changes(run: &Run, disturbed: &Disturbed) -> Option<(f64, f64)> {
    let calm = run.changes.done()?;
    let writes_each = f64::from(calm.writes) / f64::from(calm.count.max(1));
    let writes = f64::from(disturbed.changes.writes) - writes_each * f64::from(disturbed.changes.count);
    Some((disturbed.changes.cores - calm.cores, writes))
}

fn programmed_ratio(run: &Run) -> Option<f64> {
    let (programmed, bare) = (run.programmed.done()?, run.bare.done()?);
    Some(programmed.all.as_secs_f64() / (programmed.applying + bare.writes).as_secs_f64())
}

/// Whether the first run was the fastest to program.
fn ahead_of_all(runs: &[Run]) -> bool {
    let all = |run: &Run| run.programmed.done().map(|programmed| programmed.all);
    let Some((ours, others)) = runs.split_first() else { return false };
    others.iter().filter_map(all).all(|other| all(ours).is_some_and(|ours| ours <= other))
}

/// The cost of an event at each size, of each operator.
fn events_table(text: &mut String, runs: &[Run]) {
    let names: Vec<&str> = {
        let mut names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
        let mut seen = std::collections::BTreeSet::new();
        names.retain(|name| seen.insert(*name));
        names
    };
    if runs.iter().filter(|run| run.name == names[0] && run.events.done().is_some()).count() < 2 {
        return;
    }
    let _ = writeln!(
        text,
        "\n## Cost of an event\n\nCPU of the operator for each, at the first size and at the last; they should be the same (± {} %).\n\n| | first | last | difference | |\n|---|---:|---:|---:|---|",
        goal::EVENT_PERCENT
    );
    for (number, name) in names.iter().enumerate() {
        let measured: Vec<_> =
            runs.iter().filter(|run| run.name == *name).filter_map(|run| run.events.done()).collect();
        let (Some(first), Some(last)) = (measured.first(), measured.last()) else { continue };
        for (what, first, last) in
            [("says nothing new", first.plain, last.plain), ("ready or not", first.ready, last.ready)]
        {
            let difference = (last.micros / first.micros.max(1.0) - 1.0) * 100.0;
            let met = match (number, difference.abs() <= goal::EVENT_PERCENT) {
                (0, true) => "✓",
                (0, false) => "✗",
                _ => "",
            };
            let _ = writeln!(
                text,
                "| {name}: a pod's status {what} | {} | {} | {difference:+.0} % | {met} |",
                micros(first),
                micros(last)
            );
        }
    }
}

fn show<T>(phase: &Phase<T>, cell: impl FnOnce(&T) -> String) -> String {
    match phase {
        Phase::Done(value) => cell(value),
        // A table's line has no room for line breaks and columns of its own.
        Phase::Failed(why) => format!("failed: {}", why.replace('\n', " ").replace('|', "/")),
        Phase::NotRun => "–".to_owned(),
    }
}

fn at_most(duration: Duration, goal_ms: f64) -> bool {
    duration.as_secs_f64() * 1_000.0 <= goal_ms
}

fn seconds(duration: Duration) -> String {
    if duration < Duration::from_secs(1) {
        format!("{} ms", millis(duration))
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

fn micros(cost: PerEvent) -> String {
    format!("{:.0} µs (n = {})", cost.micros, thousands(usize::try_from(cost.events).unwrap_or(usize::MAX)))
}

fn mib(memory: Memory) -> String {
    format!("{:.0} MiB", to_mib(memory.now_kib))
}

fn to_mib(kib: u64) -> f64 {
    Duration::from_millis(kib).as_secs_f64() * 1_000.0 / 1_024.0
}

fn decimal(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// With commas: 10,000.
fn thousands(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::audit_tail::Writes;
    use crate::scale::fleet::Size;
    use crate::scale::listener::Counts;
    use crate::scale::results::{Actions, Bare, Events, Failover, Hour, Programmed, Rest};
    use std::collections::BTreeMap;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn spread(p99: u64) -> Spread {
        let ms = Duration::from_millis;
        Spread { samples: 200, min: ms(1), p50: ms(5), p99: ms(p99), max: ms(p99 + 1) }
    }

    fn changes(p99: u64) -> Changes {
        Changes { pods: spread(p99), status: spread(p99 + 10), cores: 0.1, count: 200, writes: 400, late: 0 }
    }

    fn disturbed(p99: u64) -> Disturbed {
        let changes = Changes { count: 100, writes: 250, cores: 0.3, ..changes(p99) };
        Disturbed { changes, window: s(30), heard_percent: 99.6, actions: 7 }
    }

    fn run(name: &str, policies: usize, all: u64) -> Run {
        let memory = Memory { now_kib: 102_400, peak_kib: 129_024 };
        Run {
            bare: Phase::Done(Bare { applying: s(2), writes: s(3) }),
            idle: Phase::Done(memory),
            programmed: Phase::Done(Programmed {
                applying: s(7),
                all: s(all),
                cpu: s(8),
                tool_cpu: s(1),
                told: Counts { pushes: 10_000, in_sync: 3, ..Counts::default() },
                writes: Writes(BTreeMap::from([("configmaps".to_owned(), 1_500), ("secrets".to_owned(), 1_000)])),
                memory,
            }),
            rest: Phase::Done(Rest { cores: 0.09, tool_cores: 0.1, probes_per_second: 2_000.4, writes: 0 }),
            changes: Phase::Done(changes(50)),
            actions: Phase::Done(Actions { delay: spread(30), missing: 0 }),
            events: Phase::Done(Events {
                plain: PerEvent { events: 10_000, micros: 40.0 },
                ready: PerEvent { events: 1_000, micros: 900.0 },
            }),
            hour: Phase::Done(Hour { updates: 20_000, replaced: 1_000, edited: 100, memory }),
            failover: Phase::Done(Failover {
                leads: s(15),
                knows_all: s(6),
                cpu: s(4),
                told: Counts::default(),
                memory,
            }),
            crowd: Phase::Done(disturbed(61)),
            silent: Phase::Failed("after 60 s 3 of 400 pods\nwere asked | once".to_owned()),
            ..Run::new(name, Size { policies, pods_each: 10 }, 0.5)
        }
    }

    fn row<'a>(report: &'a str, begins: &str) -> &'a str {
        report
            .lines()
            .find(|line| line.starts_with(&format!("| {begins}")))
            .unwrap_or_else(|| panic!("{begins}: {report}"))
    }

    #[test]
    fn figures_stand_beside_the_peers_and_the_goals() {
        let report = markdown(&[run("operator", 1_000, 12), run("peer", 1_000, 26)], 2, "v1.37.0");
        assert!(report.contains("## 1,000 policies, 10,000 pods"), "{report}");
        assert!(report.contains("| | operator | peer | goal | |\n|---|---:|---:|---|---|\n"), "{report}");
        let programmed = row(&report, "**all Programmed**");
        assert!(
            programmed.contains("| 12.0 s (1.20 ×) | 26.0 s (2.60 ×) | ≤ 1.3 ×, ahead of the peer | ✓ |"),
            "{programmed}"
        );
        assert!(row(&report, "writes and pushes").contains("2.5 writes a policy, 10000 pushes, 3 in vain"));
        assert!(row(&report, "**RSS, after an hour").contains("| 100 MiB (126) | 100 MiB (126) | ≤ 128 MiB | ✓ |"));
        assert!(row(&report, "**CPU at rest").contains("0.090 core (2000; 0 writes)"));
        assert!(row(&report, "CPU of this tool").contains("1.0 s; 0.10 core"));
        assert!(row(&report, "**change → pods**").ends_with("| p99 ≤ 60 ms | ✓ |"));
        assert!(row(&report, "**change → status**").contains("5.0 / 60 ms (1.0–61, n = 200)"));
        assert!(row(&report, "**third failing report").ends_with("| p99 ≤ 30 ms | ✓ |"));
        assert!(row(&report, "**CPU of the next one").contains("| 4.0 s | 4.0 s | ≤ 3 s | ✗ |"));
        assert!(row(&report, "200 pods of one workload fail: CPU").contains("0.30 core (+0.20)"));
        assert!(row(&report, "200 pods of one workload fail: writes").contains("250 (+50) in 30 s; 7 actions"));
        assert!(row(&report, "**200 pods of one workload fail: change elsewhere → pods").ends_with("✗ |"));
        // As many columns in every line of a table.
        let columns: Vec<usize> =
            report.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
        assert!(columns.iter().all(|count| *count == 6), "{report}");
    }

    #[test]
    fn a_phase_that_failed_says_what_it_waited_for() {
        let report = markdown(&[run("operator", 100, 12)], 2, "v1.37.0");
        assert!(row(&report, "**all Programmed**").contains("| ≤ 1.3 ×, no peer measured | ✓ |"));
        let cells = row(&report, "400 pods do not answer: CPU");
        assert!(cells.contains("| failed: after 60 s 3 of 400 pods were asked / once |"), "{cells}");
        let none = markdown(&[Run::new("operator", Size { policies: 1, pods_each: 1 }, 0.0)], 2, "v1.37.0");
        assert!(row(&none, "**CPU at rest").contains("| – |") && !none.contains('✓') && !none.contains('✗'), "{none}");
    }

    #[test]
    fn an_operator_behind_the_peer_has_not_met_the_goal() {
        let report = markdown(&[run("operator", 1_000, 12), run("peer", 1_000, 11)], 2, "v1.37.0");
        assert!(row(&report, "**all Programmed**").ends_with("✗ |"));
    }

    #[test]
    fn the_cost_of_an_event_is_compared_between_the_sizes() {
        let mut large = run("operator", 1_000, 12);
        large.events = Phase::Done(Events {
            plain: PerEvent { events: 10_000, micros: 46.0 },
            ready: PerEvent { events: 1_000, micros: 1_800.0 },
        });
        let report =
            markdown(&[run("operator", 100, 2), run("peer", 100, 2), large, run("peer", 1_000, 20)], 2, "v1.37.0");
        assert!(row(&report, "operator: a pod's status says nothing new").ends_with("| +15 % | ✓ |"), "{report}");
        assert!(row(&report, "operator: a pod's status ready or not").ends_with("| +100 % | ✗ |"));
        assert!(row(&report, "peer: a pod's status ready or not").ends_with("| +0 % |  |"));
        assert!(!markdown(&[run("operator", 100, 2)], 2, "v1.37.0").contains("Cost of an event"));
    }

    #[test]
    fn numbers_have_commas() {
        assert_eq!([0, 999, 1_000, 12_345_678].map(thousands), ["0", "999", "1,000", "12,345,678"]);
    }
}
