//! When a fleet is degraded: from what its pods report to the stage that it is in.
//!
//! Each pod protects itself at once. Here it is decided for all of them, by quorum: the load of a workload is the load that a quorum of
//! those of its ready pods have at least that are heard. So one pod that is slow degrades nobody else, and one that is idle keeps
//! nobody else from it.
//!
//! Stages are entered and left one by one. The next one is entered when the load has been at its own for the time of `enter`; a stage
//! is left when the load has been below the one that ends it for the time of `exit`, and it has lasted for its least duration. A stage
//! ends as far below the load at which it begins as `exit` is below `enter`, so that there is always room between the two.

use crate::recovery::later;
use jiff::Timestamp;
use std::collections::BTreeSet;

/// One stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Its name.
    pub name: String,
    /// Load from which it is entered out of the stage before it, in percent.
    pub enter_percent: u32,
    /// Load below which it is left for the stage before it, in percent.
    pub exit_percent: u32,
}

/// Who decides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// The load does.
    #[default]
    Auto,
    /// A person does: that many stages are in force.
    Forced(usize),
    /// A person does: none is.
    Disabled,
}

/// How many pods it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quorum {
    /// That many, or all of them where there are fewer.
    Count(u32),
    /// That share of them, in percent.
    Percent(u32),
}

impl Quorum {
    /// How many of so many pods are enough; at least one.
    pub fn of(self, pods: usize) -> usize {
        let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let wanted = match self {
            Self::Count(number) => count(number).min(pods),
            Self::Percent(percent) => pods.saturating_mul(count(percent)).div_ceil(100),
        };
        wanted.max(1)
    }
}

/// How a fleet is degraded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who decides.
    pub mode: Mode,
    /// The stages, by ascending load.
    pub stages: Vec<Stage>,
    /// How long the load must be at that of the next stage, in milliseconds.
    pub enter_for_ms: u64,
    /// How long it must be below that which ends the present one, in milliseconds.
    pub exit_for_ms: u64,
    /// How long a stage lasts at least, in milliseconds.
    pub min_duration_ms: u64,
    /// How many pods it takes, of those that are ready and heard.
    pub quorum: Quorum,
    /// Dependencies whose circuit, open in a quorum of pods, brings the first stage about and holds it.
    pub circuits: BTreeSet<String>,
}

/// What a pod last said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// The kubelet calls it ready. Of one that is not, nothing counts.
    pub ready: bool,
    /// It was heard, and believed.
    pub heard: bool,
    /// The load that counts, in percent.
    pub load_percent: u32,
    /// What it is the load of.
    pub cause: String,
    /// Dependencies whose circuit is open.
    pub open_circuits: BTreeSet<String>,
}

/// The pods of one workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Its name, for people.
    pub name: String,
    /// What its pods said.
    pub pods: Vec<Reading>,
}

/// How far a fleet is degraded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Stages in force; 0: it is not degraded.
    pub level: usize,
    /// Since when it is that many.
    pub since: Timestamp,
    /// On which side of what would change it the load is, and since when.
    pub beyond: Option<Beyond>,
}

/// A load that will change the stage if it stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beyond {
    /// Towards the next stage, and not to the one before.
    pub up: bool,
    /// Since when.
    pub since: Timestamp,
}

impl State {
    /// Not degraded.
    pub const fn normal(since: Timestamp) -> Self {
        Self { level: 0, since, beyond: None }
    }

    /// The state that was written down: the stage of that name; where there is none any more, as many stages as there were. What cannot
    /// be is brought to what can.
    pub fn restored(settings: &Settings, stage: &str, level: usize, since: Timestamp, now: Timestamp) -> Self {
        let named = settings.stages.iter().position(|known| known.name == stage).map(|index| index + 1);
        let level = named.unwrap_or(level).min(settings.stages.len());
        Self { level, since: since.min(now), beyond: None }
    }
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The state now.
    pub state: State,
    /// How many stages were in force before, if that changed.
    pub changed_from: Option<usize>,
    /// What it was decided from, in words. It is of this moment: what is shown for long is that of the last change.
    pub why: String,
    /// The workloads of which too few pods are heard, in words. Their load is not known, so nothing is left.
    pub unheard: Option<String>,
    /// When it changes by itself, if the load stays as it is.
    pub next_check: Option<Timestamp>,
}

/// Decides.
pub fn decide(settings: &Settings, fleet: &[Workload], before: State, now: Timestamp) -> Decision {
    let last = settings.stages.len();
    let set = |level: usize, why: &str| {
        let level = level.min(last);
        let changed = level != before.level;
        let state = State { level, since: if changed { now } else { before.since }, beyond: None };
        let changed_from = changed.then_some(before.level);
        Decision { state, changed_from, why: why.to_owned(), unheard: None, next_check: None }
    };
    match settings.mode {
        Mode::Disabled => return set(0, "a person has disabled it"),
        Mode::Forced(level) => return set(level, "a person forces it"),
        Mode::Auto if before.level > last => return set(last, "the policy has fewer stages now"),
        Mode::Auto if fleet.is_empty() => return set(0, "there is no workload that has pods"),
        Mode::Auto => {}
    }
    let demand = Demand::of(settings, fleet);
    let unheard = (!demand.unheard.is_empty()).then(|| demand.unheard.join("; "));
    let why = demand.why();
    let Some(up) = demand.side(settings, before.level) else {
        let state = State { beyond: None, ..before };
        return Decision { state, changed_from: None, why, unheard, next_check: None };
    };
    // What was on its way up is not on its way down.
    let since = before.beyond.filter(|beyond| beyond.up == up).map_or(now, |beyond| beyond.since.min(now));
    let due = due(settings, before.since, Beyond { up, since });
    if due > now {
        let state = State { beyond: Some(Beyond { up, since }), ..before };
        return Decision { state, changed_from: None, why, unheard, next_check: Some(due) };
    }
    let level = if up { before.level + 1 } else { before.level.saturating_sub(1) };
    let beyond = demand.side(settings, level).map(|up| Beyond { up, since: now });
    let state = State { level, since: now, beyond };
    let next_check = beyond.map(|beyond| self::due(settings, now, beyond));
    Decision { state, changed_from: Some(before.level), why, unheard, next_check }
}

/// When a stage that began at `began` changes.
fn due(settings: &Settings, began: Timestamp, beyond: Beyond) -> Timestamp {
    if beyond.up {
        later(beyond.since, settings.enter_for_ms)
    } else {
        later(beyond.since, settings.exit_for_ms).max(later(began, settings.min_duration_ms))
    }
}

/// What all workloads ask for together: the highest load, and whether a circuit is open.
struct Demand {
    load_percent: Option<u32>,
    circuit: Option<String>,
    load_words: String,
    unheard: Vec<String>,
}

impl Demand {
    fn of(settings: &Settings, fleet: &[Workload]) -> Self {
        let mut demand = Self { load_percent: None, circuit: None, load_words: String::new(), unheard: Vec::new() };
        for workload in fleet {
            let ready: Vec<_> = workload.pods.iter().filter(|pod| pod.ready).collect();
            let mut heard: Vec<_> = ready.iter().filter(|pod| pod.heard).collect();
            if heard.is_empty() || heard.len() < settings.quorum.of(ready.len()) {
                demand.unheard.push(format!(
                    "{}: {} of {} ready pods are heard",
                    workload.name,
                    heard.len(),
                    ready.len()
                ));
                continue;
            }
            let quorum = settings.quorum.of(heard.len());
            for dependency in &settings.circuits {
                let open = heard.iter().filter(|pod| pod.open_circuits.contains(dependency)).count();
                if open >= quorum && demand.circuit.is_none() {
                    let (name, all) = (&workload.name, heard.len());
                    demand.circuit =
                        Some(format!("{name}: the circuit of {dependency} is open in {open} of {all} pods"));
                }
            }
            heard.sort_by_key(|pod| std::cmp::Reverse(pod.load_percent));
            let Some(least) = heard.get(quorum - 1) else { continue };
            if demand.load_percent.is_none_or(|highest| least.load_percent > highest) {
                let at_least = heard.iter().filter(|pod| pod.load_percent >= least.load_percent).count();
                let of_what = if least.cause.is_empty() { String::new() } else { format!(" ({})", least.cause) };
                let (name, all, percent) = (&workload.name, heard.len(), least.load_percent);
                demand.load_words = format!("{name}: {at_least} of {all} pods at {percent} % or more{of_what}");
                demand.load_percent = Some(least.load_percent);
            }
        }
        demand
    }

    /// Whether the next stage is asked for, or an end of the present one; `None`: neither.
    fn side(&self, settings: &Settings, level: usize) -> Option<bool> {
        let load = self.load_percent;
        let next = settings.stages.get(level);
        let by_load = next.is_some_and(|next| load.is_some_and(|load| load >= next.enter_percent));
        if by_load || (level == 0 && next.is_some() && self.circuit.is_some()) {
            return Some(true);
        }
        let present = settings.stages.get(level.checked_sub(1)?)?;
        let is_over = load.is_some_and(|load| load < present.exit_percent) && self.unheard.is_empty();
        (is_over && !(level == 1 && self.circuit.is_some())).then_some(false)
    }

    fn why(&self) -> String {
        let words = self.circuit.iter().map(String::as_str).chain([self.load_words.as_str()]);
        let words = words.chain(self.unheard.iter().map(String::as_str)).filter(|words| !words.is_empty());
        words.collect::<Vec<_>>().join("; ")
    }
}

#[cfg(test)]
#[path = "degradation_tests.rs"]
mod tests;
