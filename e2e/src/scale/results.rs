//! What one run measures. The report is made from this and nothing else.

use super::audit_tail::Writes;
use super::fleet::Size;
use super::listener::Counts;
use super::statistics::Spread;
use super::usage::Memory;
use std::time::Duration;

/// One measurement: made, failed with what it waited for, or left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Phase<T> {
    /// Left out.
    #[default]
    NotRun,
    /// What it waited for.
    Failed(String),
    /// What was measured.
    Done(T),
}

impl<T> Phase<T> {
    /// What was measured, if it was.
    pub fn done(&self) -> Option<&T> {
        match self {
            Self::Done(value) => Some(value),
            Self::NotRun | Self::Failed(_) => None,
        }
    }
}

/// What the API server itself takes, without any operator.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bare {
    /// Applying all policies while nobody listens.
    pub applying: Duration,
    /// As many ConfigMaps, status patches and Secrets as there are policies, made by the tool.
    pub writes: Duration,
}

/// From the first apply until every policy is programmed.
#[derive(Clone, Debug, PartialEq)]
pub struct Programmed {
    /// Until the last apply was answered.
    pub applying: Duration,
    /// Until the last policy said so.
    pub all: Duration,
    /// CPU time of the operator.
    pub cpu: Duration,
    /// CPU time of this tool.
    pub tool_cpu: Duration,
    /// What the pods were told.
    pub told: Counts,
    /// What the operator wrote.
    pub writes: Writes,
    /// Memory afterwards.
    pub memory: Memory,
}

/// Nothing happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rest {
    /// CPU of the operator, in cores.
    pub cores: f64,
    /// CPU of this tool, in cores.
    pub tool_cores: f64,
    /// Health reports that the pods were asked for.
    pub probes_per_second: f64,
    /// Writes other than those of the lease.
    pub writes: u32,
}

/// One policy after another is edited.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Changes {
    /// From the answer of the apply until a pod has the change.
    pub pods: Spread,
    /// From the answer of the apply until the status says so.
    pub status: Spread,
    /// CPU of the operator meanwhile, in cores.
    pub cores: f64,
    /// How many.
    pub count: u32,
    /// Writes of the operator.
    pub writes: u32,
    /// Samples that were given up; they count as long as was waited.
    pub late: usize,
}

/// Checks fail, one pod here, one there.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Actions {
    /// From the third failing report until the action is there; measured in the pod.
    pub delay: Spread,
    /// Pods that were never told to act.
    pub missing: usize,
}

/// Pods' statuses change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Events {
    /// CPU for a status that changes nothing of meaning.
    pub plain: PerEvent,
    /// CPU for a pod that becomes ready, or not ready.
    pub ready: PerEvent,
}

/// CPU time of the operator for each event, less what it uses while as much is written that it does not look at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerEvent {
    /// Events.
    pub events: u32,
    /// In microseconds.
    pub micros: f64,
}

/// After an hour's worth of events.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hour {
    /// Statuses of pods that changed nothing of meaning.
    pub updates: usize,
    /// Pods that were replaced.
    pub replaced: usize,
    /// Policies that were edited.
    pub edited: usize,
    /// Memory afterwards.
    pub memory: Memory,
}

/// The leader is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Failover {
    /// From the kill until another replica holds the lease.
    pub leads: Duration,
    /// From then until every pod was asked for its health.
    pub knows_all: Duration,
    /// CPU time of the new leader from the kill until then.
    pub cpu: Duration,
    /// What the pods were told until three seconds of quiet.
    pub told: Counts,
    /// Memory of the new leader afterwards.
    pub memory: Memory,
}

/// Many pods of one workload misbehave, and policies elsewhere are edited meanwhile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Disturbed {
    /// What the edits elsewhere took, and the CPU and writes of all of it.
    pub changes: Changes,
    /// For how long.
    pub window: Duration,
    /// Health reports that the other pods were asked for, as a share of those that their policies ask for, in percent.
    pub heard_percent: f64,
    /// Actions that pods were told.
    pub actions: u64,
}

/// Everything of one operator at one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    /// The operator.
    pub name: String,
    /// Policies and pods.
    pub size: Size,
    /// Load of the machine when it began.
    pub load_before: f64,
    /// The API server alone.
    pub bare: Phase<Bare>,
    /// Memory with filled caches and without a policy.
    pub idle: Phase<Memory>,
    /// All policies at once.
    pub programmed: Phase<Programmed>,
    /// Nothing happens.
    pub rest: Phase<Rest>,
    /// One small write at a time, by the tool.
    pub write: Phase<Spread>,
    /// One change at a time.
    pub changes: Phase<Changes>,
    /// One failure at a time.
    pub actions: Phase<Actions>,
    /// Cost of an event.
    pub events: Phase<Events>,
    /// An hour's worth of events.
    pub hour: Phase<Hour>,
    /// The leader is killed.
    pub failover: Phase<Failover>,
    /// All pods of a workload of 200 fail at once.
    pub crowd: Phase<Disturbed>,
    /// 400 pods do not answer.
    pub silent: Phase<Disturbed>,
}

impl Run {
    /// Nothing is measured yet.
    pub fn new(name: &str, size: Size, load_before: f64) -> Self {
        Self {
            name: name.to_owned(),
            size,
            load_before,
            bare: Phase::NotRun,
            idle: Phase::NotRun,
            programmed: Phase::NotRun,
            rest: Phase::NotRun,
            write: Phase::NotRun,
            changes: Phase::NotRun,
            actions: Phase::NotRun,
            events: Phase::NotRun,
            hour: Phase::NotRun,
            failover: Phase::NotRun,
            crowd: Phase::NotRun,
            silent: Phase::NotRun,
        }
    }
}
