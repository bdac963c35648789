//! What a decision about recovery is made from, and what it consists of.

use super::{Gate, ladder::later};
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// Recovery of one policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// Steps by check, mildest first.
    pub ladders: BTreeMap<String, Vec<Step>>,
    /// How much may be done.
    pub limits: Limits,
    /// A check must stay healthy this long, in milliseconds, before an action counts as a success.
    pub healthy_delay_ms: u64,
    /// No pod is taken away before it is this old, in milliseconds.
    pub startup_grace_ms: u64,
    /// The policy is suspended: nothing is begun.
    pub suspended: bool,
    /// Why people want no recovery to begin for now; none, if nobody does.
    pub pause_requests: Vec<String>,
    /// How many actions are too many in a namespace.
    pub storm: Storm,
    /// Nothing is executed; decisions are recorded as if it were.
    pub dry_run: bool,
}

/// When so much is done in a namespace, over all its policies, that it must be one cause, which recovery does not find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storm {
    /// So many actions within `interval_ms` are a storm; 0: nothing is one.
    pub actions: usize,
    /// See `actions`; in milliseconds.
    pub interval_ms: u64,
    /// For how long nothing is begun after the action that made it a storm, in milliseconds.
    pub cooldown_ms: u64,
}

impl Default for Storm {
    fn default() -> Self {
        Self { actions: 20, interval_ms: 300_000, cooldown_ms: 600_000 }
    }
}

impl Storm {
    /// Until when there is a storm, if there is one now. `begun` has the times of the namespace's actions.
    pub fn until(self, begun: &[Timestamp], now: Timestamp) -> Option<Timestamp> {
        let mut begun: Vec<_> = begun.iter().copied().filter(|at| at.duration_since(now) <= MAX_AHEAD).collect();
        begun.sort_unstable();
        let last = begun.len().checked_sub(self.actions.max(1))?;
        if self.actions == 0 {
            return None;
        }
        let made_one = |first: &usize| {
            let reached = begun[first + self.actions - 1];
            (reached < later(begun[*first], self.interval_ms)).then_some(reached)
        };
        let reached = (0..=last).rev().find_map(|first| made_one(&first))?;
        Some(later(reached, self.cooldown_ms)).filter(|until| now < *until)
    }
}

/// How much may be done at once and in a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Actions at once.
    pub max_in_flight: usize,
    /// Least time between two ladders for one subject, in milliseconds.
    pub cooldown_ms: u64,
    /// Most actions over `budget_interval_ms`.
    pub budget_actions: usize,
    /// See `budget_actions`; in milliseconds.
    pub budget_interval_ms: u64,
    /// Most pods of a workload that may be unhealthy for one of them to be restarted.
    pub max_unhealthy: MaxUnhealthy,
}

/// A number or a share of a workload's pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaxUnhealthy {
    /// That many.
    Count(usize),
    /// That share in percent, rounded down; one pod at least, unless it is 0.
    Percent(usize),
}

impl Default for MaxUnhealthy {
    fn default() -> Self {
        Self::Percent(50)
    }
}

impl MaxUnhealthy {
    /// How many of `pods` that is.
    pub(super) fn of(self, pods: usize) -> usize {
        match self {
            Self::Count(count) => count,
            Self::Percent(0) => 0,
            Self::Percent(percent) => (pods * percent / 100).max(1),
        }
    }
}

/// One step of a ladder.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Step {
    /// What is done.
    pub action: Action,
    /// For [`Action::RunCleanupJob`]: the CronJob that the Job is made from.
    pub cron_job: Option<String>,
    /// How long it may take until the check is healthy again, in milliseconds.
    pub timeout_ms: u64,
}

/// Declares the actions, mildest first: the name of each, and what the protocol has to know of it.
macro_rules! actions {
    ($($(#[$doc:meta])* $name:ident {
        needs_pod: $needs_pod:literal, done_by_pod: $done_by_pod:literal, disrupts: $disrupts:literal
    },)+) => {
        /// What can be done, mildest first.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Action {
            $($(#[$doc])* $name,)+
        }

        impl Action {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// Its name, as people write it in a policy.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)+
                }
            }

            /// It is done to one pod, so it needs one.
            pub(super) const fn needs_pod(self) -> bool {
                match self {
                    $(Self::$name => $needs_pod,)+
                }
            }

            /// The pod does it itself, in its running process.
            pub(super) const fn done_by_pod(self) -> bool {
                match self {
                    $(Self::$name => $done_by_pod,)+
                }
            }

            /// All pods of the workload are replaced by it, as fast as the workload allows.
            pub(super) const fn replaces_all(self) -> bool {
                matches!(self, Self::RolloutRestart | Self::Rollback)
            }

            /// It takes pods away for a while.
            pub(super) const fn disrupts(self) -> bool {
                match self {
                    $(Self::$name => $disrupts,)+
                }
            }
        }
    };
}

actions! {
    /// The pod gives memory back.
    TrimMemory { needs_pod: true, done_by_pod: true, disrupts: false },
    /// The pod gives up its pooled connections.
    ResetConnections { needs_pod: true, done_by_pod: true, disrupts: false },
    /// A Job is made from a CronJob.
    RunCleanupJob { needs_pod: false, done_by_pod: false, disrupts: false },
    /// The pod is evicted.
    RestartPod { needs_pod: true, done_by_pod: false, disrupts: true },
    /// All pods are replaced, one after the other.
    RolloutRestart { needs_pod: false, done_by_pod: false, disrupts: true },
    /// The current rollout is undone.
    Rollback { needs_pod: false, done_by_pod: false, disrupts: true },
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What is recovering.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject {
    /// Name of the workload.
    pub target: String,
    /// The pod, for a check that each pod answers for itself.
    pub pod: Option<Pod>,
    /// Name of the check; empty for what a person asked for without naming one.
    pub check: String,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pod {
    /// Name.
    pub name: String,
    /// Which pod of that name.
    pub uid: String,
}

impl Subject {
    /// Whether there is a check that says how it is.
    pub(super) fn has_check(&self) -> bool {
        !self.check.is_empty()
    }

    /// As a person would name it.
    pub fn display_name(&self) -> &str {
        self.pod.as_ref().map_or(&self.target, |pod| &pod.name)
    }
}

/// State of one check of one subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckState {
    /// Whose check.
    pub subject: Subject,
    /// Its evaluation, after thresholds.
    pub healthy: bool,
    /// Since when.
    pub since: Timestamp,
    /// Since when it has passed, if it has.
    pub well_since: Option<Timestamp>,
    /// When it was last heard of.
    pub seen_at: Timestamp,
    /// What the check said.
    pub message: String,
    /// The dependency behind the check.
    pub dependency: Option<String>,
    /// Whether a fresh connection to it answered, if that was tried: then what the pod keeps is the cause, and not the dependency.
    pub dependency_answers: Option<bool>,
    /// It failed already when this operator first looked: the failure is older than `since`.
    pub began_before: bool,
    /// The operator itself asks, and no pod says it.
    pub asked: bool,
}

impl CheckState {
    /// What a person asks for stands for a check that fails.
    pub(super) fn asked_for(record: &Record) -> Self {
        Self {
            subject: record.subject.clone(),
            healthy: false,
            since: record.started_at,
            well_since: None,
            seen_at: record.started_at,
            message: String::new(),
            dependency: None,
            dependency_answers: None,
            began_before: false,
            asked: false,
        }
    }
}

/// A dependency that is bad, or was until a moment ago.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outage {
    /// The evidence, in words.
    pub evidence: String,
    /// Fresh connections got no answer: it was away. Open circuits alone may also mean connections that hang.
    pub away: bool,
    /// It has ended.
    pub over: bool,
}

impl From<&str> for Outage {
    fn from(evidence: &str) -> Self {
        Self { evidence: evidence.to_owned(), ..Self::default() }
    }
}

/// Everything that is known of the policy's workloads now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Checks of all subjects. A check that nobody reports now is absent: absence is neither health nor sickness.
    pub checks: Vec<CheckState>,
    /// The pods that exist and are not going away, by uid.
    pub pods: BTreeMap<String, PodFacts>,
    /// Pods that each workload is to have.
    pub wanted: BTreeMap<String, usize>,
    /// Workloads whose pods keep their names: a StatefulSet's successor of a pod is called as that was.
    pub keeps_names: BTreeSet<String>,
    /// Jobs that were made for an intent, by its id.
    pub jobs: BTreeMap<String, Job>,
    /// Dependencies, by workload, of which a quorum of pods has evidence that they are bad.
    pub bad_dependencies: BTreeMap<(String, String), Outage>,
    /// Workloads that are being rolled out.
    pub rolling_out: BTreeSet<String>,
    /// What is known of the last rollout of each workload.
    pub rollouts: BTreeMap<String, Rollout>,
    /// Workloads of which people want no recovery to begin for now, with the reason.
    pub paused: BTreeMap<String, String>,
    /// Pods, by uid, to which nothing is to be done.
    pub excluded: BTreeSet<String>,
    /// When the actions of the namespace were begun, over all its policies.
    pub begun_in_namespace: Vec<Timestamp>,
    /// Why what is shown here may be too old to act on, if it may.
    pub observer_stale: Option<String>,
    /// Since when this operator looks. Of the time before, it knows only what was written down: that a deadline passed
    /// meanwhile says nothing of what came of the action.
    pub watching_since: Timestamp,
}

/// The last rollout of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rollout {
    /// Id of the [`Action::RolloutRestart`] that the template carries.
    pub restarted_by: Option<String>,
    /// Id of the [`Action::Rollback`] that the workload carries.
    pub rolled_back_by: Option<String>,
    /// All pods that are wanted are of the present template, and available.
    pub complete: bool,
    /// It does not progress, and its deadline is over.
    pub stuck: bool,
    /// Why a change of its template replaces no pods, if it does not.
    pub held: Option<String>,
    /// All its pods are taken away before others come.
    pub recreates: bool,
    /// What a rollback would undo; or why there is nothing that may be undone.
    pub undo: Result<Undo, String>,
}

/// A rollout that may be undone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Undo {
    /// When it began: when the first ReplicaSet of the present template was made.
    pub began_at: Timestamp,
    /// The revision that it brought.
    pub from: u64,
    /// The revision before it.
    pub to: u64,
    /// A pod of the revision before it was seen ready.
    pub proven: bool,
}

/// A pod that exists.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Its name. The successor of a StatefulSet's pod has the same.
    pub name: String,
    /// Its workload.
    pub target: String,
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// Whether the kubelet calls it ready.
    pub ready: bool,
    /// Whether the kubelet has ever called it ready.
    pub was_ready: bool,
    /// Whether it has said anything of its health to this operator.
    pub reported: bool,
    /// Which process answers in it, as far as is known.
    pub instance: Option<String>,
    /// It is of an older template than its workload has now.
    pub outdated: bool,
}

/// A Job that was made for an intent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// When it was created, in whole seconds.
    pub created_at: Timestamp,
    /// The outcome of it.
    pub state: JobState,
}

/// The outcome of a Job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobState {
    /// It is not over.
    Running,
    /// Its pod ended well.
    Complete,
    /// It failed; why, and how its log ends.
    Failed(String),
}

/// One action, from its intent to its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Id of the intent: no two records have the same. It is carried to where the action lands.
    pub id: String,
    /// The place that this record has among those of its subject. There is one record in each place, so of two operators that
    /// decide at once, only one can begin.
    pub slot: String,
    /// The place before it.
    pub after: Option<String>,
    /// A person asked for it: no ladder knows of it, and only what protects others holds it back.
    pub by_hand: bool,
    /// A person deleted it: no ladder knows of it, and the cooldown begins when that happened.
    pub withdrawn: bool,
    /// What is recovering.
    pub subject: Subject,
    /// For an action that a pod does itself: the process that is meant. Another one in that pod must not do it.
    pub instance: Option<String>,
    /// The step.
    pub step: Step,
    /// Its place in the ladder, from 0.
    pub index: usize,
    /// Steps of the ladder.
    pub steps: usize,
    /// When the check began to fail.
    pub failed_at: Timestamp,
    /// When the intent was decided.
    pub started_at: Timestamp,
    /// When it was executed.
    pub executed_at: Option<Timestamp>,
    /// When its outcome was known.
    pub finished_at: Option<Timestamp>,
    /// What came of it.
    pub outcome: Outcome,
    /// For an action that failed: when its check had been healthy for the healthy delay after all. Until then its ladder goes
    /// on, however often the check changes.
    pub healed_at: Option<Timestamp>,
    /// For a restart: the workload when it was decided. No pod that was there then takes the place of the one that is restarted.
    pub before: Option<Before>,
    /// For a restart: uid of the pod that took the place, once it is there. Only that pod goes on in the ladder.
    pub successor: Option<String>,
    /// Nothing was executed.
    pub dry_run: bool,
    /// Detail in words.
    pub message: Option<String>,
}

/// Most pods of one second that are told apart from those that come later in it.
const MOST_OF_A_SECOND: usize = 16;

/// A workload as it was when a restart was decided. Times are those of the API server, in whole seconds: the operator's clock has
/// no say in which pod came later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Before {
    /// Pods that it was to have.
    pub wanted: usize,
    /// When the youngest of its pods were created.
    pub youngest_at: Timestamp,
    /// The uids of those, as many as are told apart.
    pub youngest: BTreeSet<String>,
}

impl Before {
    /// A workload as it is now, if it has pods.
    pub(super) fn of(target: &str, observed: &Observed) -> Option<Self> {
        let pods = || observed.pods.iter().filter(|(_, facts)| facts.target == target);
        let youngest_at = pods().map(|(_, facts)| facts.created_at).max()?;
        let youngest = pods().filter(|(_, facts)| facts.created_at == youngest_at);
        let youngest = youngest.map(|(uid, _)| uid.clone()).take(MOST_OF_A_SECOND).collect();
        Some(Self { wanted: observed.wanted.get(target).copied().unwrap_or_default(), youngest_at, youngest })
    }

    /// Whether a pod came later.
    pub(super) fn has_not(&self, uid: &str, created_at: Timestamp) -> bool {
        let told_apart = self.youngest.len() < MOST_OF_A_SECOND && !self.youngest.contains(uid);
        created_at > self.youngest_at || (created_at == self.youngest_at && told_apart)
    }
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Intended; whether it was executed is not known.
    Pending,
    /// Refused for now by what protects the workload, a disruption budget for one; it is asked for again.
    Waiting,
    /// Executed; the check is watched.
    Verifying,
    /// The check was healthy for the healthy delay.
    Succeeded,
    /// It did not help in time, or could not be done.
    Failed,
    /// Its subject went away.
    Cancelled,
}

/// What was done so far: the ledger of a policy's workloads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// Not settled yet.
    pub in_flight: Vec<Record>,
    /// Settled, newest first.
    pub recent: Vec<Record>,
    /// Records from which nothing is computed but what follows them: their times cannot be, or they are gone.
    pub aside: Vec<Record>,
}

/// How far ahead of now a recorded time may be: clocks of replicas differ, but not by more.
pub(super) const MAX_AHEAD: SignedDuration = SignedDuration::from_hours(1);

impl Record {
    /// Whether its ladder goes on after it: it did not help, and its check was not healthy since.
    pub(super) fn goes_on(&self) -> bool {
        self.outcome == Outcome::Failed && self.healed_at.is_none() && !self.by_hand && !self.withdrawn
    }

    /// Whether this is of the pod that took the place of the one that it restarted.
    pub(super) fn is_succeeded_by(&self, subject: &Subject) -> bool {
        (&self.subject.target, &self.subject.check) == (&subject.target, &subject.check)
            && self.successor.is_some()
            && self.successor.as_ref() == subject.pod.as_ref().map(|pod| &pod.uid)
    }

    /// Whether its times can be true. Anybody who may edit a status can write any time into it.
    pub(super) fn is_possible(&self, now: Timestamp) -> bool {
        let times = [Some(self.failed_at), Some(self.started_at), self.executed_at, self.finished_at, self.healed_at];
        times.into_iter().flatten().all(|at| at.duration_since(now) <= MAX_AHEAD)
    }
}

impl FromIterator<Record> for History {
    fn from_iter<T: IntoIterator<Item = Record>>(records: T) -> Self {
        let (mut recent, mut in_flight): (Vec<_>, Vec<_>) =
            records.into_iter().partition(|record| record.finished_at.is_some());
        in_flight.sort_by(|one, other| (one.started_at, &one.id).cmp(&(other.started_at, &other.id)));
        recent.sort_by(|one, other| (other.finished_at, &other.id).cmp(&(one.finished_at, &one.id)));
        Self { in_flight, recent, aside: Vec::new() }
    }
}

impl History {
    /// Puts the records aside whose times cannot be.
    pub fn set_impossible_aside(&mut self, now: Timestamp) {
        let split = |records: Vec<Record>| records.into_iter().partition(|record: &Record| record.is_possible(now));
        let (in_flight, impossible_in_flight) = split(std::mem::take(&mut self.in_flight));
        let (recent, impossible_recent) = split(std::mem::take(&mut self.recent));
        (self.in_flight, self.recent) = (in_flight, recent);
        self.aside.extend(impossible_in_flight.into_iter().chain(impossible_recent));
    }

    /// Every record of a run of the same kind, dry or not.
    pub(super) fn of_kind(&self, dry_run: bool) -> impl Iterator<Item = &Record> {
        self.all().filter(move |record| record.dry_run == dry_run)
    }

    /// What has to be written so that a ledger that has `before` comes to have this: what has changed, and then what is new.
    pub fn changes_since<'a>(&'a self, before: &'a Self) -> Vec<Change<'a>> {
        let known: BTreeMap<_, _> = before.all().map(|record| (record.id.as_str(), record)).collect();
        let mut changes = Vec::new();
        let mut begun = Vec::new();
        for record in self.all() {
            match known.get(record.id.as_str()) {
                Some(old) if *old == record => {}
                Some(_) => changes.push(Change::Update(record)),
                None => begun.push(Change::Begin(record)),
            }
        }
        changes.extend(begun);
        changes
    }

    /// Every record that something is computed from.
    pub fn all(&self) -> impl Iterator<Item = &Record> {
        self.in_flight.iter().chain(&self.recent)
    }
}

/// What has to be written of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// It is new: it must not be there yet.
    Begin(&'a Record),
    /// It has changed: it must be as it was read.
    Update(&'a Record),
}

/// An action that is needed and held back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Withheld {
    /// What is not recovering.
    pub subject: Subject,
    /// The action that waits.
    pub action: Action,
    /// What holds it.
    pub gate: Gate,
    /// Why, for people.
    pub message: String,
    /// When the gate opens by itself, if it does.
    pub until: Option<Timestamp>,
}

/// A ladder with no step left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exhausted {
    /// What still fails.
    pub subject: Subject,
    /// Since when.
    pub since: Timestamp,
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// To be written before anything is executed.
    pub history: History,
    /// To be executed, in this order.
    pub execute: Vec<Record>,
    /// Settled by this decision.
    pub finished: Vec<Record>,
    /// Needed and held back.
    pub withheld: Vec<Withheld>,
    /// Ladders with no step left.
    pub exhausted: Vec<Exhausted>,
    /// Actions that may still be begun now.
    pub remaining_budget: usize,
    /// When to decide again if nothing happens before.
    pub next_check: Option<Timestamp>,
}

impl Decision {
    pub(super) fn wake_at(&mut self, at: Option<Timestamp>) {
        if let Some(at) = at {
            self.next_check = Some(self.next_check.map_or(at, |old| old.min(at)));
        }
    }
}
