//! A state of the whole system, and the steps between states.

use crate::world::{Act, Answer, Fate, Flaw, Intent, Intents, JobState, Millis, Place, World};
use engine::recovery::Action;
use std::fmt::{self, Display};

/// A ledger in the model's list of ledgers.
pub type LedgerId = u32;
/// A record in the model's list of records.
pub type RecordId = u32;
/// Writes in the model's list of writes.
pub type WritesId = u32;
/// What can be seen of the world, in the model's list of that.
pub type ViewId = u32;
/// A plan in the model's list of plans.
pub type PlanId = u32;

/// What is explored.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// What the checks are about.
    pub scope: Scope,
    /// Steps of the ladder, for both subjects.
    pub ladder: Vec<Action>,
    /// Time of a step, in steps of time.
    pub rung_ticks: u8,
    /// What may happen how often.
    pub bounds: Bounds,
    /// What is broken on purpose.
    pub flaw: Option<Flaw>,
}

/// What the checks are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Two pods, each with one check that it answers for itself.
    Pods,
    /// One workload with two checks.
    Workload,
}

/// What may still happen how often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// Time reconciles.
    pub ticks: u8,
    /// Anything of the following, in sum.
    pub faults: u8,
    /// An operator dies.
    pub crashes: u8,
    /// An operator gives up waiting for an answer.
    pub lost: u8,
    /// An operator begins to lead while another one still takes itself for the leader.
    pub overlaps: u8,
    /// A pod's process starts again.
    pub restarts: u8,
    /// A disruption budget refuses an eviction.
    pub refusals: u8,
    /// An operator looks at a cache that lags behind.
    pub stale: u8,
    /// A person deletes a record.
    pub deletions: u8,
}

/// Everything that what comes next depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// What may still happen.
    pub left: Bounds,
    /// The time.
    pub now: Millis,
    /// The ledger at the API server.
    pub ledger: LedgerId,
    /// The one before it, as long as somebody may still take it for the present one.
    pub ledger_before: Option<LedgerId>,
    /// Every intent that ever had a record.
    pub recorded: Intents,
    /// Those of them that a person deleted.
    pub deleted: Intents,
    /// What is acted on.
    pub world: World,
    /// The replicas whose fence is up, the one that began last at the end. A replica whose fence is down does nothing and
    /// remembers nothing, so all such are the same, and the state has no names for them.
    pub leaders: Vec<Leader>,
    /// Requests that nobody waits for any more. Each may land at any time, or never.
    pub late: Vec<Request>,
}

/// A replica whose fence is up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Leader {
    /// Since when it leads. Before that it asked no pod.
    pub since: Millis,
    /// What it heard of the two checks; nothing until the pods first answered it.
    pub seen: Option<[Seen; 2]>,
    /// What it saw before the world last changed, as long as its caches may still show that.
    pub lagging: Option<ViewId>,
    /// What it is doing.
    pub task: Task,
}

/// Since when a check is as it is, as far as one operator knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seen {
    /// Since then.
    pub since: Millis,
    /// It saw the check become so. Otherwise it was so when the operator first looked.
    pub witnessed: bool,
}

/// Where an operator is in its pass.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Task {
    /// Between two reconciles.
    Idle,
    /// Waits for the answer to a write of what it decided.
    Intending {
        /// What comes after that.
        plan: PlanId,
        /// All that is written.
        writes: WritesId,
        /// The one that was sent.
        turn: u8,
        /// The ledger, as the operator takes it to be when all is written.
        after: LedgerId,
    },
    /// Asks for one action after the other.
    Asking {
        /// All of them.
        plan: PlanId,
        /// The one that is asked for now.
        turn: u8,
        /// The ledger, as the operator takes it to be.
        written: LedgerId,
        /// The same, with what came of the actions before.
        after: LedgerId,
        /// What came back, as long as the operator has not taken note of it.
        answer: Option<Answer>,
    },
    /// Waits for the answer to a write of what came of it.
    Recording {
        /// All that is written.
        writes: WritesId,
        /// The one that was sent.
        turn: u8,
        /// Some of it is news of an effect.
        vouches: bool,
    },
}

/// A write of one record. It is accepted only if the record is there as it was read; a new one, only if it is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Write {
    /// As it was read; nothing for a new one.
    pub from: Option<RecordId>,
    /// What is written.
    pub to: RecordId,
    /// Whose record it is.
    pub intent: Intent,
}

/// A request on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Request {
    /// To write a record.
    Write(Write),
    /// To do something.
    Act(Act),
}

/// Which leader does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Who(pub usize);

/// What an operator decides from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// The ledger before the present one.
    pub old_ledger: bool,
    /// Pods, Jobs and checks as they were before they last changed.
    pub old_world: bool,
}

/// What happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// Time reconciles, and some of what was under way comes to its end. An operator that lost the Lease notices.
    Tick(Vec<Change>),
    /// A replica begins to lead; whether another one has not noticed.
    TakesOver(bool),
    /// It hears of the checks for the first time.
    HearsPods(Who),
    /// It decides, and sends the write of that, or the first action if there is nothing to write.
    Decides(Who, Look),
    /// What it waits for is done, and it will hear of it.
    Lands(Who, Request, Fate),
    /// What it waits for is done, and the answer is lost.
    AnswerLost(Who, Request, Fate),
    /// It waits no longer; what it sent may land late.
    GivesUp(Who, Request),
    /// It hears what came of an action, and sends what comes next.
    Hears(Who, Answer),
    /// It dies.
    Crashes(Who),
    /// A request that nobody waits for lands.
    LandsLate(Request, Fate),
    /// A pod's process starts again.
    ProcessStarts(u8, Fresh),
    /// A person deletes the record of an intent.
    Deletes(Intent),
}

/// What happens by itself while time reconciles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// A pod takes the place of one that was evicted.
    Successor(u8, Fresh),
    /// A Job ends, the one at this place of the list.
    JobEnds(usize, JobState, Fate),
}

/// How the check of a new process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// Well.
    Healthy,
    /// It begins to fail after its first report.
    Fails,
    /// It fails in its first report.
    FailsAtOnce,
}

impl State {
    /// What an operator is doing.
    pub fn task(&self, who: Who) -> &Task {
        &self.leaders[who.0].task
    }

    /// An operator goes on to something else.
    pub fn set_task(&mut self, who: Who, task: Task) {
        self.leaders[who.0].task = task;
    }

    /// A fault happens; only so many may.
    pub fn spend(&mut self, fault: fn(&mut Bounds) -> &mut u8) {
        self.left.faults -= 1;
        *fault(&mut self.left) -= 1;
    }

    /// The pods answer a leader for the first time.
    pub fn hear_pods(&mut self, who: Who) {
        self.leaders[who.0].seen = Some([Seen { since: self.now, witnessed: false }; 2]);
    }

    /// The leader hears from the pods that a check changed.
    pub fn see(&mut self, place: u8, witnessed: bool) {
        for seen in self.leaders.iter_mut().filter_map(|leader| leader.seen.as_mut()) {
            seen[usize::from(place)] = Seen { since: self.now, witnessed };
        }
    }

    /// The same, if the check changed indeed.
    pub fn see_change(&mut self, place: u8, failed_before: bool) {
        if self.world.places[usize::from(place)].failing != failed_before {
            self.see(place, true);
        }
    }

    /// A pod's process starts again, and has forgotten what it did.
    pub fn start_process(&mut self, place: u8, fresh: Fresh) {
        let started = &mut self.world.places[usize::from(place)];
        started.process += 1;
        started.remembers = Intents::default();
        started.failing = fresh != Fresh::Healthy;
        self.see(place, fresh != Fresh::FailsAtOnce);
    }

    /// Something that was under way comes to its end.
    pub fn make(&mut self, change: Change) {
        match change {
            Change::Successor(place, fresh) => {
                let successor = &mut self.world.places[usize::from(place)];
                let uid = successor.uid + 1;
                *successor = Place { uid, created: self.now, failing: fresh != Fresh::Healthy, ..Place::NEW };
                self.see(place, fresh != Fresh::FailsAtOnce);
            }
            Change::JobEnds(index, end, fate) => {
                let job = &mut self.world.jobs[index];
                job.state = end;
                let recovering = &mut self.world.places[usize::from(job.place)].failing;
                let (place, failed_before) = (job.place, *recovering);
                *recovering &= fate != Fate::Heals;
                self.see_change(place, failed_before);
            }
        }
    }
}

impl Leader {
    /// A replica that begins to lead. Before that it asked no pod.
    pub fn new(now: Millis) -> Self {
        Self { since: now, seen: None, lagging: None, task: Task::Idle }
    }
}

impl Change {
    /// What comes to its end by itself: for each such thing, the ways in which it may.
    pub fn under_way(world: &World) -> Vec<Vec<Self>> {
        let gone = (0..2u8).filter(|place| !world.places[usize::from(*place)].there);
        let starts = [Fresh::Healthy, Fresh::Fails];
        let successors = gone.map(|place| starts.map(|fresh| Self::Successor(place, fresh)).to_vec());
        let running = (0..world.jobs.len()).filter(|index| world.jobs[*index].state == JobState::Running);
        let ends = [
            (JobState::Complete, Fate::Heals),
            (JobState::Complete, Fate::HealsNot),
            (JobState::Failed, Fate::HealsNot),
        ];
        let jobs = running.map(|index| ends.map(|(end, fate)| Self::JobEnds(index, end, fate)).to_vec());
        successors.chain(jobs).collect()
    }

    /// Every way in which some, all or none of that happens.
    pub fn combinations(world: &World) -> Vec<Vec<Self>> {
        let mut all = vec![Vec::new()];
        for ways in Self::under_way(world) {
            let with = |one: &Self| all.iter().map(|some| [some.as_slice(), &[*one]].concat()).collect::<Vec<_>>();
            let more: Vec<_> = ways.iter().flat_map(with).collect();
            all.extend(more);
        }
        all
    }
}

impl Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0 == 0 { "the leader" } else { "the new leader" })
    }
}

impl Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} for intent {} at place {}, pod {}", self.action, self.intent, self.place, self.uid)?;
        self.process.map_or(Ok(()), |process| write!(f, ", process {process}"))
    }
}

impl Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Act(act) => write!(f, "request ({act})"),
            Self::Write(Write { from: None, intent, .. }) => write!(f, "creation of the record of intent {intent}"),
            Self::Write(Write { from: Some(_), intent, .. }) => write!(f, "change of the record of intent {intent}"),
        }
    }
}

impl Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tick(changes) => {
                f.write_str("time reconciles")?;
                changes.iter().try_for_each(|change| write!(f, ", {change}"))
            }
            Self::TakesOver(false) => f.write_str("a replica begins to lead"),
            Self::TakesOver(true) => f.write_str("another replica begins to lead, and the leader has not noticed"),
            Self::HearsPods(who) => write!(f, "{who} hears of the checks for the first time"),
            Self::Decides(who, look) => {
                write!(f, "{who} decides")?;
                f.write_str(if look.old_ledger { ", its cache still shows the old ledger" } else { "" })?;
                f.write_str(if look.old_world { ", its cache still shows the old pods and Jobs" } else { "" })
            }
            Self::Lands(who, request, fate) => write!(f, "{who}'s {request} lands{fate}"),
            Self::AnswerLost(who, request, fate) => {
                write!(f, "{who}'s {request} lands{fate}, and the answer is lost")
            }
            Self::GivesUp(who, request) => write!(f, "{who} gives up on its {request}; it may land later"),
            Self::Hears(who, answer) => write!(f, "{who} hears {answer:?}, and goes on"),
            Self::Crashes(who) => write!(f, "{who} crashes"),
            Self::LandsLate(request, fate) => write!(f, "a late {request} lands{fate}"),
            Self::Deletes(intent) => write!(f, "a person deletes the record of intent {intent}"),
            Self::ProcessStarts(place, fresh) => write!(f, "the process at place {place} starts again: {fresh:?}"),
        }
    }
}

impl Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Successor(place, fresh) => write!(f, "a successor starts at place {place} ({fresh:?})"),
            Self::JobEnds(job, state, fate) => write!(f, "Job {job} ends ({state:?}){fate}"),
        }
    }
}
