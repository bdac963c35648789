//! What all pods of a workload say together: the majority verdict of each check, and how many of them have a circuit open.
//!
//! It is counted as each of them speaks: taking in one pod's report costs no more in a workload of a thousand pods than in
//! one of three.

use super::state::PodState;
use contract::CircuitState;
use engine::fleet::CircuitView;
use jiff::Timestamp;
use std::{collections::BTreeMap, sync::Arc};

/// Most circuits, and most checks, that are counted over the pods of one workload. Names are the pods' own.
pub const MAX_TALLIES: usize = 64;

/// Name of a check or a circuit, shared by the pods of a workload.
pub type Name = Arc<str>;

/// The counts.
#[derive(Default)]
pub struct Tallies {
    pub(super) checks: BTreeMap<Name, CheckTally>,
    pub(super) circuits: BTreeMap<Name, CircuitTally>,
    /// Pods that may yet speak: they have neither reported nor failed to.
    pub(super) silent: usize,
}

/// What the pods that are heard say of a check.
#[derive(Default)]
pub(super) struct CheckTally {
    pub(super) said: usize,
    pub(super) failing: usize,
    failing_from_the_start: usize,
    /// Pods in which it has passed, and does not fail.
    well: usize,
    message: String,
    majority: Option<MajorityStatus>,
}

/// What the pods that are heard say of a circuit.
#[derive(Default)]
pub(super) struct CircuitTally {
    pub(super) view: CircuitView,
    open_since: Option<Timestamp>,
}

/// The majority verdict of a check.
#[derive(Clone, Debug, PartialEq)]
pub struct MajorityStatus {
    /// Not more than half of the pods call it unhealthy.
    pub healthy: bool,
    /// Since when.
    pub since: Timestamp,
    /// Since when it has passed in at least half of the pods; absent if it has not.
    pub well_since: Option<Timestamp>,
    /// It was unhealthy when this process first heard enough pods: the failure is older than `since`.
    pub began_before: bool,
    /// When a pod last reported it.
    pub seen_at: Timestamp,
    /// What one of the pods that fail says.
    pub message: String,
}

/// What a pod said that is taken out of the counts.
pub struct Withdrawn {
    checks: Vec<Name>,
    /// How many pods could still speak before.
    silent: usize,
}

impl Tallies {
    /// There is one more pod, which has said nothing yet.
    pub fn add_silent(&mut self) {
        self.silent += 1;
    }

    /// Pods that may yet speak: they have neither reported nor failed to.
    pub fn silent(&self) -> usize {
        self.silent
    }

    /// The name of a check, shared with what is counted already.
    pub fn check_name(&self, name: &str) -> Name {
        shared(&self.checks, name)
    }

    /// The name of a circuit, shared with what is counted already.
    pub fn circuit_name(&self, name: &str) -> Name {
        shared(&self.circuits, name)
    }

    /// A pod is gone, and with it what it said.
    pub fn remove(&mut self, pod: &PodState, now: Timestamp) {
        let gone = self.withdraw(pod);
        self.decide_majorities(&gone.checks, now);
        self.circuits.retain(|_, tally| tally.view.total > 0);
    }

    /// Counts what a pod says now, and decides what that turns; `before` is what was withdrawn of it.
    pub fn put_back(&mut self, before: &Withdrawn, pod: &PodState, now: Timestamp) {
        self.contribute(pod, now);
        if before.silent == self.silent {
            self.decide_majorities(&before.checks, now);
            self.decide_majorities(&check_names(pod), now);
        } else {
            // There is one less that could turn any of them.
            let all: Vec<_> = self.checks.keys().cloned().collect();
            self.decide_majorities(&all, now);
        }
        self.circuits.retain(|_, tally| tally.view.total > 0);
        // What nobody reports for a while is remembered, as long as there is room.
        if self.checks.len() >= MAX_TALLIES {
            self.checks.retain(|_, tally| tally.said > 0);
        }
    }

    /// Takes what a pod says out of the counts.
    pub fn withdraw(&mut self, pod: &PodState) -> Withdrawn {
        let withdrawn = Withdrawn { checks: check_names(pod), silent: self.silent };
        self.silent -= usize::from(pod.is_silent());
        if !pod.is_heard() {
            return withdrawn;
        }
        for (name, evaluation) in &pod.evaluations {
            if let Some(tally) = self.checks.get_mut(name) {
                tally.said = tally.said.saturating_sub(1);
                tally.failing = tally.failing.saturating_sub(usize::from(!evaluation.healthy));
                tally.well = tally.well.saturating_sub(usize::from(evaluation.well_since.is_some()));
                let old = !evaluation.healthy && evaluation.began_before;
                tally.failing_from_the_start = tally.failing_from_the_start.saturating_sub(usize::from(old));
            }
        }
        for (name, state) in &pod.circuits {
            if let Some(tally) = self.circuits.get_mut(name) {
                tally.view.total = tally.view.total.saturating_sub(1);
                tally.view.open = tally.view.open.saturating_sub(usize::from(is_open(*state)));
                tally.view.tripped = tally.view.tripped.saturating_sub(usize::from(*state == CircuitState::Open));
            }
        }
        withdrawn
    }

    /// Counts what a pod says.
    fn contribute(&mut self, pod: &PodState, now: Timestamp) {
        self.silent += usize::from(pod.is_silent());
        if pod.is_heard() {
            for (name, evaluation) in &pod.evaluations {
                if !self.checks.contains_key(name) && self.checks.len() >= MAX_TALLIES {
                    continue;
                }
                let tally = self.checks.entry(Arc::clone(name)).or_default();
                tally.said += 1;
                tally.well += usize::from(evaluation.well_since.is_some());
                if !evaluation.healthy {
                    tally.failing += 1;
                    tally.failing_from_the_start += usize::from(evaluation.began_before);
                    tally.message.clone_from(&evaluation.message);
                }
            }
            for (name, state) in &pod.circuits {
                if !self.circuits.contains_key(name) && self.circuits.len() >= MAX_TALLIES {
                    continue;
                }
                let tally = self.circuits.entry(Arc::clone(name)).or_default();
                tally.view.total += 1;
                tally.view.open += usize::from(is_open(*state));
                tally.view.tripped += usize::from(*state == CircuitState::Open);
            }
        }
        for (name, _) in &pod.circuits {
            if let Some(tally) = self.circuits.get_mut(name) {
                tally.open_since = (tally.view.open > 0).then(|| tally.open_since.unwrap_or(now));
            }
        }
    }

    /// Decides anew what most of the pods that report these checks say of them. While so many have not reported at all yet
    /// that they could turn it, there is no new verdict: one pod's word at the start is not that of most.
    fn decide_majorities(&mut self, names: &[Name], now: Timestamp) {
        for name in names {
            let Some(tally) = self.checks.get_mut(name) else { continue };
            let all = tally.said + self.silent;
            let healthy = match (tally.failing * 2 > all, (tally.failing + self.silent) * 2 <= all) {
                _ if tally.said == 0 => continue,
                (true, _) => false,
                (false, true) => true,
                (false, false) => continue,
            };
            let same = tally.majority.as_ref().filter(|before| before.healthy == healthy);
            let from_the_start = tally.failing_from_the_start == tally.failing;
            let well = healthy && tally.well * 2 >= all;
            tally.majority = Some(MajorityStatus {
                healthy,
                since: same.map_or(now, |before| before.since),
                well_since: well.then(|| same.and_then(|before| before.well_since).unwrap_or(now)),
                began_before: same.map_or(from_the_start, |before| before.began_before) && !healthy,
                seen_at: now,
                message: if tally.failing > 0 { tally.message.clone() } else { String::new() },
            });
        }
    }

    /// The majority verdicts of the checks that some pod reports now. What nobody reports for a while is remembered.
    pub fn current_majorities(&self) -> BTreeMap<String, MajorityStatus> {
        let reported = self.checks.iter().filter(|(_, tally)| tally.said > 0);
        reported.filter_map(|(name, tally)| Some((name.to_string(), tally.majority.clone()?))).collect()
    }

    /// The circuits over all pods that are heard, each with the moment since when some pod's is not closed.
    pub fn circuits(&self) -> impl Iterator<Item = (&str, CircuitView, Option<Timestamp>)> {
        self.circuits.iter().map(|(name, tally)| (&**name, tally.view, tally.open_since))
    }
}

fn check_names(pod: &PodState) -> Vec<Name> {
    pod.evaluations.iter().map(|(name, _)| Arc::clone(name)).collect()
}

fn shared<T>(known: &BTreeMap<Name, T>, name: &str) -> Name {
    known.get_key_value(name).map_or_else(|| name.into(), |(name, _)| Arc::clone(name))
}

fn is_open(state: CircuitState) -> bool {
    // Half-open counts: it is not closed until a trial call says so.
    matches!(state, CircuitState::Open | CircuitState::HalfOpen)
}
