//! What the operators act on: pods and Jobs, and how a request lands there.

use engine::recovery::Action;
use std::fmt::{self, Display};

/// Milliseconds since the beginning.
pub type Millis = u32;

/// Place of an intent's id in the model's list of ids.
pub type Intent = u8;

/// A set of intents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Intents(u64);

impl Intents {
    /// How many they are.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether it is one of them.
    pub fn contains(self, intent: Intent) -> bool {
        self.0 & Self::bit(intent) != 0
    }

    /// Adds one.
    pub fn insert(&mut self, intent: Intent) {
        self.0 |= Self::bit(intent);
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = Intent> {
        (0..64).filter(move |intent| self.contains(*intent))
    }

    /// What is not among others.
    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// One that is missing in `other`.
    pub fn first_not_in(self, other: Self) -> Option<Intent> {
        let missing = self.0 & !other.0;
        (missing != 0).then(|| u8::try_from(missing.trailing_zeros()).expect("less than 64"))
    }

    fn bit(intent: Intent) -> u64 {
        1u64.checked_shl(u32::from(intent)).expect("no more than 64 intents in one search")
    }
}

/// One of two places where something can fail: a pod and, after it, the successor that has its name. For a check of the
/// whole workload only `failing` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which pod of that name.
    pub uid: u8,
    /// Which process of that pod.
    pub process: u8,
    /// The pod exists.
    pub there: bool,
    /// When it was created.
    pub created: Millis,
    /// Its check fails.
    pub failing: bool,
    /// What its process knows to have done.
    pub remembers: Intents,
}

/// A Job at the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Job {
    /// Its name.
    pub intent: Intent,
    /// The place whose check it is to recover.
    pub place: u8,
    /// When it was created.
    pub created: Millis,
    /// How it is getting on.
    pub state: JobState,
}

/// How a Job is getting on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum JobState {
    /// Not over.
    Running,
    /// Its pod ended well.
    Complete,
    /// Its pod failed.
    Failed,
}

/// Everything outside of the operators and of the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    /// The places.
    pub places: [Place; 2],
    /// Jobs, in the order of their names.
    pub jobs: Vec<Job>,
    /// Every intent that took effect anywhere. Nobody in the model sees it; it is there to find a second effect.
    pub effects: Intents,
}

impl Place {
    /// A pod that was made at the beginning of time, and is well.
    pub const NEW: Self = Self { uid: 0, process: 0, there: true, created: 0, failing: false, remembers: Intents(0) };
}

impl World {
    /// Two places whose checks fail.
    pub fn failing() -> Self {
        let place = Place { failing: true, ..Place::NEW };
        Self { places: [place; 2], jobs: Vec::new(), effects: Intents::default() }
    }
}

/// A request to do something, on its way to where it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Act {
    /// Whose effect it is to have.
    pub intent: Intent,
    /// What is to be done.
    pub action: Action,
    /// The place that it is addressed to.
    pub place: u8,
    /// The pod that is meant.
    pub uid: u8,
    /// The process that is meant.
    pub process: Option<u8>,
}

/// What is left to chance when a request lands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It recovers the check at once.
    Heals,
    /// It changes nothing about the check yet.
    HealsNot,
    /// A disruption budget refuses it.
    Refused,
}

/// What the operator hears of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// It is done, now or before.
    Done,
    /// What protects the workload refused it.
    Refused,
    /// Another process answers than the one that is meant.
    OtherProcess,
    /// There is no such pod.
    NoSuchPod,
    /// Nothing came in time.
    Nothing,
}

/// A part that is left out or broken on purpose, to show that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A pod does not remember what it has done.
    PodForgets,
    /// A pod does what is meant for the process before it.
    PodIgnoresInstance,
    /// An eviction names the pod without its uid.
    EvictionWithoutUid,
    /// A Job gets a name of its own each time.
    JobWithRandomName,
    /// The operator acts before it writes the intent.
    ActsBeforeIntent,
    /// A record is changed whatever it has become since.
    WritesUnfenced,
    /// What an intent is called depends on when its operator saw the failure, and not on the record that it follows.
    NamedBySight,
    /// What is pending is dropped by an operator that did not begin it itself.
    DropsPending,
    /// The operator never says of anything that it is over.
    NeverEnds,
    /// The operator does not look again at the time that the decision names.
    NeverLooksAgain,
}

/// What came of a request that landed.
pub struct Landed {
    /// What is said of it.
    pub answer: Answer,
    /// It changed something, so it took effect.
    pub effect: bool,
}

impl World {
    /// Whether a request would change something.
    pub fn would_act(&self, act: Act, flaw: Option<Flaw>) -> bool {
        self.clone().land(act, Fate::HealsNot, flaw, 0).effect
    }

    /// A request lands.
    pub fn land(&mut self, act: Act, fate: Fate, flaw: Option<Flaw>, now: Millis) -> Landed {
        let landed = match act.action {
            Action::ResetConnections => self.reset_connections(act, fate, flaw),
            Action::RestartPod => self.evict(act, fate, flaw),
            Action::RunCleanupJob => self.make_job(act, flaw, now),
            other => panic!("the model has no {other:?}"),
        };
        if landed.effect {
            self.effects.insert(act.intent);
        }
        landed
    }

    /// How often that was done about one failure, under whatever ids. A check that got well does not fail again here, so
    /// a process has one failure at most. After an eviction it is another pod that fails, so that is not counted.
    pub fn times_done(&self, act: Act) -> Option<usize> {
        match act.action {
            Action::ResetConnections => Some(self.places[usize::from(act.place)].remembers.len()),
            Action::RunCleanupJob => Some(self.jobs.iter().filter(|job| job.place == act.place).count()),
            _ => None,
        }
    }

    /// The pod's process remembers the ids that it has done, and does nothing that is meant for another process.
    fn reset_connections(&mut self, act: Act, fate: Fate, flaw: Option<Flaw>) -> Landed {
        let place = &mut self.places[usize::from(act.place)];
        if !place.there || place.uid != act.uid {
            return Landed { answer: Answer::NoSuchPod, effect: false };
        }
        let meant = act.process.filter(|_| flaw != Some(Flaw::PodIgnoresInstance));
        if meant.is_some_and(|process| process != place.process) {
            return Landed { answer: Answer::OtherProcess, effect: false };
        }
        if place.remembers.contains(act.intent) {
            return Landed { answer: Answer::Done, effect: false };
        }
        if flaw != Some(Flaw::PodForgets) {
            place.remembers.insert(act.intent);
        }
        place.failing &= fate != Fate::Heals;
        Landed { answer: Answer::Done, effect: true }
    }

    /// The uid is a precondition: the successor is not evicted for the pod before it.
    fn evict(&mut self, act: Act, fate: Fate, flaw: Option<Flaw>) -> Landed {
        let place = &mut self.places[usize::from(act.place)];
        let meant = place.uid == act.uid || flaw == Some(Flaw::EvictionWithoutUid);
        if !place.there || !meant {
            return Landed { answer: Answer::Done, effect: false };
        }
        if fate == Fate::Refused {
            return Landed { answer: Answer::Refused, effect: false };
        }
        place.there = false;
        Landed { answer: Answer::Done, effect: true }
    }

    /// The intent is in the Job's name, and there is one Job of a name.
    fn make_job(&mut self, act: Act, flaw: Option<Flaw>, now: Millis) -> Landed {
        let there = self.jobs.iter().any(|job| job.intent == act.intent);
        if there && flaw != Some(Flaw::JobWithRandomName) {
            return Landed { answer: Answer::Done, effect: false };
        }
        self.jobs.push(Job { intent: act.intent, place: act.place, created: now, state: JobState::Running });
        self.jobs.sort_unstable();
        Landed { answer: Answer::Done, effect: true }
    }
}

impl Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Heals => " and recovers",
            Self::HealsNot => "",
            Self::Refused => " and is refused",
        })
    }
}
