//! The real code under test, asked through what an operator would see; and short names for what it answers.

use crate::{
    properties::{Landmark, Landmarks},
    search::Map,
    state::{Leader, LedgerId, PlanId, RecordId, Scenario, Scope, Seen, ViewId, Write, WritesId},
    world::{Act, Answer, Flaw, Intent, Intents, Job, JobState, Millis, Place, World},
};
use engine::recovery::{
    Action, Change, CheckState, History, Job as ObservedJob, JobState as ObservedJobState, Limits, MaxUnhealthy,
    Observed, Outcome, Pod, PodFacts, Record, Settings, Step, Subject, decide, failing_since,
};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
    rc::Rc,
};

/// How far time reconciles in one step.
pub const TICK: Millis = 15_000;
/// When time begins. A multiple of a second and a bit: creation times are cut to whole seconds, and a model in which
/// nothing is cut would hide that.
const ZERO_MS: i64 = 1_000_000_700;
const TARGET: &str = "booking";

/// What an operator decides, as far as the model needs it.
#[derive(Clone, Copy)]
pub struct Decided {
    /// The ledger as it would be after that.
    pub ledger: LedgerId,
    /// What it would write for it.
    pub writes: WritesId,
    /// What it would ask for.
    pub plan: PlanId,
    /// It would ask for something.
    pub acts: bool,
    /// When it would look again.
    pub next_check: Option<Millis>,
    /// What is remarkable about it.
    pub landmarks: Landmarks,
}

/// Which intents a ledger knows of.
#[derive(Clone, Copy)]
pub struct Knows {
    /// Those in flight.
    pub in_flight: Intents,
    /// Those, and the ones that are over.
    pub all: Intents,
}

/// What an operator can see of the world.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct View {
    places: [Place; 2],
    jobs: Vec<Job>,
    seen: Option<[Seen; 2]>,
    /// When the pods were last heard.
    heard_at: Millis,
    /// Since when the operator leads.
    leads_since: Millis,
}

/// A ledger as a key. Two that differ only in what is not hashed are told apart by their equality.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ledger(History);

impl Hash for Ledger {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_usize(self.0.in_flight.len());
        self.0.all().for_each(|record| hash_record(record, state));
    }
}

/// A record as a key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry(Record);

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        hash_record(&self.0, state);
    }
}

fn hash_record<H: Hasher>(record: &Record, state: &mut H) {
    state.write(record.id.as_bytes());
    record.outcome.hash(state);
    for at in [Some(record.started_at), record.executed_at, record.finished_at] {
        state.write_u64(at.map_or(0, |at| at.as_millisecond().cast_unsigned()));
    }
}

/// Values with a number each, so that a state of the model is small and quick to compare.
struct Numbered<T> {
    values: Vec<Rc<T>>,
    numbers: Map<Rc<T>, u32>,
}

impl<T: Eq + Hash> Numbered<T> {
    fn new() -> Self {
        Self { values: Vec::new(), numbers: Map::default() }
    }

    fn number(&mut self, value: T) -> u32 {
        if let Some(number) = self.numbers.get(&value) {
            return *number;
        }
        let (number, value) = (u32::try_from(self.values.len()).expect("few enough"), Rc::new(value));
        self.values.push(Rc::clone(&value));
        self.numbers.insert(value, number);
        number
    }

    fn get(&self, number: u32) -> Rc<T> {
        Rc::clone(&self.values[number as usize])
    }
}

/// Every decision that was made so far, so that none is made twice.
pub struct Decisions {
    scope: Scope,
    flaw: Option<Flaw>,
    settings: Settings,
    intents: Vec<String>,
    ledgers: Numbered<Ledger>,
    records: Numbered<Entry>,
    writes: Numbered<Vec<Write>>,
    knows: Vec<Knows>,
    views: Numbered<View>,
    plans: Numbered<Vec<Act>>,
    made: Map<(LedgerId, ViewId, Millis), Decided>,
}

impl Decisions {
    /// The empty ledger.
    pub const NOTHING: LedgerId = 0;

    /// None was made yet.
    pub fn new(scenario: &Scenario) -> Self {
        let mut decisions = Self {
            scope: scenario.scope,
            flaw: scenario.flaw,
            settings: settings(scenario),
            intents: Vec::new(),
            ledgers: Numbered::new(),
            records: Numbered::new(),
            writes: Numbered::new(),
            knows: Vec::new(),
            views: Numbered::new(),
            plans: Numbered::new(),
            made: Map::default(),
        };
        let empty = decisions.number_ledger(History::default());
        assert_eq!(empty, Self::NOTHING);
        decisions
    }

    /// How many different decisions were made.
    pub fn len(&self) -> usize {
        self.made.len()
    }

    /// Which intents a ledger knows of.
    pub fn knows(&self, ledger: LedgerId) -> Knows {
        self.knows[ledger as usize]
    }

    /// A list of writes.
    pub fn writes(&self, writes: WritesId) -> Rc<Vec<Write>> {
        self.writes.get(writes)
    }

    /// A record, in words.
    pub fn tell_record(&self, record: RecordId) -> String {
        format!("{:?}", self.records.get(record).0.outcome)
    }

    /// Whether what a write has to say is that something is not over that was.
    pub fn reopens(&self, write: Write) -> bool {
        let is_over = |record: RecordId| self.records.get(record).0.finished_at.is_some();
        !is_over(write.to) && write.from.is_some_and(is_over)
    }

    /// The present record of an intent.
    pub fn record_of(&mut self, ledger: LedgerId, intent: Intent) -> Option<RecordId> {
        let ledger = self.ledgers.get(ledger);
        let record = ledger.0.all().find(|record| record.id == self.intents[usize::from(intent)])?;
        Some(self.records.number(Entry(record.clone())))
    }

    /// The record that has the place which a new one is to have.
    pub fn taken_by(&mut self, ledger: LedgerId, new: RecordId) -> Option<RecordId> {
        let (ledger, new) = (self.ledgers.get(ledger), self.records.get(new));
        let record = ledger.0.all().find(|record| record.slot == new.0.slot)?;
        Some(self.records.number(Entry(record.clone())))
    }

    /// The ledger with another record of an intent, or without one.
    pub fn with_record(&mut self, ledger: LedgerId, intent: Intent, record: Option<RecordId>) -> LedgerId {
        let (ledger, id) = (self.ledgers.get(ledger), self.intents[usize::from(intent)].clone());
        let others = ledger.0.all().filter(|other| other.id != id).cloned();
        let record = record.map(|record| self.records.get(record).0.clone());
        let all: Vec<_> = others.chain(record).collect();
        self.number_ledger(all.into_iter().collect())
    }

    /// What has to be written so that a ledger becomes another one.
    pub fn between(&mut self, before: LedgerId, after: LedgerId) -> WritesId {
        let (before, after) = (self.ledgers.get(before), self.ledgers.get(after));
        let mut writes = Vec::new();
        for change in after.0.changes_since(&before.0) {
            let (record, is_new) = match change {
                Change::Begin(record) => (record, true),
                Change::Update(record) => (record, false),
            };
            let intent = self.intent(&record.id);
            let old = before.0.all().find(|old| old.id == record.id && !is_new).cloned();
            let from = old.map(|old| self.records.number(Entry(old)));
            writes.push(Write { from, to: self.records.number(Entry(record.clone())), intent });
        }
        self.writes.number(writes)
    }

    /// What a plan asks for.
    pub fn plan(&self, plan: PlanId) -> Rc<Vec<Act>> {
        self.plans.get(plan)
    }

    /// Whether something in a ledger waits for a disruption budget.
    pub fn waits(&self, ledger: LedgerId) -> bool {
        self.ledgers.get(ledger).0.in_flight.iter().any(|record| record.outcome == Outcome::Waiting)
    }

    /// What a leader's caches show once they have caught up.
    pub fn view(&mut self, world: &World, leader: &Leader, now: Millis) -> ViewId {
        // What a process remembers is for itself.
        let places = world.places.map(|place| Place { remembers: Intents::default(), ..place });
        self.views.number(View {
            places,
            jobs: world.jobs.clone(),
            seen: leader.seen,
            heard_at: now,
            leads_since: leader.since,
        })
    }

    /// The decision of the real code, for what an operator sees.
    pub fn decide(&mut self, ledger: LedgerId, view: ViewId, now: Millis) -> Decided {
        if let Some(decided) = self.made.get(&(ledger, view, now)) {
            return *decided;
        }
        let (mut history, view_seen) = (self.ledgers.get(ledger).0.clone(), self.views.get(view));
        if self.flaw == Some(Flaw::DropsPending) {
            history.in_flight.retain(|record| record.outcome != Outcome::Pending);
        }
        let observed = self.observe(&view_seen, &history);
        let mut decision = decide(&self.settings, &observed, &history, "policy", at(now));
        if self.flaw == Some(Flaw::NamedBySight) {
            let known: BTreeSet<_> = history.all().map(|record| record.id.clone()).collect();
            let rename = |record: &mut Record| {
                if !known.contains(&record.id) {
                    record.slot = format!("{} seen {}", record.slot, record.failed_at);
                    record.id = format!("{} seen {}", record.id, record.failed_at);
                }
            };
            decision.history.in_flight.iter_mut().chain(&mut decision.execute).for_each(rename);
        }
        let acts: Vec<_> = decision.execute.iter().map(|record| self.request(record)).collect();
        let mut landmarks = landmarks(&history, &decision.history, &decision.finished);
        if view_seen.seen.is_none() && !history.in_flight.is_empty() {
            landmarks.insert(Landmark::BlindDecision);
        }
        if self.flaw == Some(Flaw::NeverEnds) && !decision.finished.is_empty() {
            let (plan, writes) = (self.plans.number(Vec::new()), self.writes.number(Vec::new()));
            return Decided { ledger, writes, plan, acts: false, next_check: Some(now + TICK), landmarks };
        }
        let next_check = decision.next_check.filter(|_| self.flaw != Some(Flaw::NeverLooksAgain));
        if self.flaw == Some(Flaw::DropsPending) {
            // It does not know of them, and writes nothing about them.
            let known = &self.ledgers.get(ledger).0;
            let dropped = known.all().filter(|record| !history.all().any(|kept| kept.id == record.id));
            let dropped: Vec<_> =
                dropped.filter(|record| !decision.history.all().any(|new| new.id == record.id)).cloned().collect();
            decision.history.in_flight.extend(dropped);
        }
        let after = self.number_ledger(decision.history.all().cloned().collect());
        let decided = Decided {
            ledger: after,
            writes: self.between(ledger, after),
            acts: !acts.is_empty(),
            plan: self.plans.number(acts),
            next_check: next_check.map(millis),
            landmarks,
        };
        self.made.insert((ledger, view, now), decided);
        decided
    }

    /// The history after an operator heard what came of an action, as the operator notes it.
    pub fn noted(&mut self, after: LedgerId, act: Act, answer: Answer, now: Millis) -> LedgerId {
        let mut history = self.ledgers.get(after).0.clone();
        let id = &self.intents[usize::from(act.intent)];
        let Some(record) = history.in_flight.iter_mut().find(|record| record.id == *id) else { return after };
        let words = match answer {
            Answer::Done => {
                record.outcome = Outcome::Verifying;
                record.executed_at = Some(at(now));
                "done"
            }
            Answer::Refused => {
                record.outcome = Outcome::Waiting;
                "refused for now"
            }
            Answer::OtherProcess => "the pod answered OtherInstance",
            Answer::NoSuchPod => "the pod is gone",
            Answer::Nothing => "no answer",
        };
        record.message = Some(words.to_owned());
        self.number_ledger(history)
    }

    fn intent(&mut self, id: &str) -> Intent {
        let known = self.intents.iter().position(|known| known == id).unwrap_or_else(|| {
            self.intents.push(id.to_owned());
            self.intents.len() - 1
        });
        u8::try_from(known).expect("few intents")
    }

    fn number_ledger(&mut self, history: History) -> LedgerId {
        let mut knows = Knows { in_flight: Intents::default(), all: Intents::default() };
        for (index, record) in history.all().enumerate() {
            let intent = self.intent(&record.id);
            assert!(!knows.all.contains(intent), "intent {intent} has two records");
            knows.all.insert(intent);
            if index < history.in_flight.len() {
                knows.in_flight.insert(intent);
            }
        }
        let number = self.ledgers.number(Ledger(history));
        if number as usize == self.knows.len() {
            self.knows.push(knows);
        }
        number
    }

    /// What the operator's caches and probes make of the world.
    fn observe(&self, view: &View, history: &History) -> Observed {
        let mut observed = Observed {
            wanted: BTreeMap::from([(TARGET.to_owned(), view.places.len())]),
            watching_since: at(view.leads_since),
            ..Observed::default()
        };
        for (index, place) in (0u8..).zip(&view.places).filter(|(_, place)| place.there) {
            let subject = subject(self.scope, index, place.uid);
            if let Some(pod) = &subject.pod {
                let facts = PodFacts {
                    name: pod.name.clone(),
                    target: TARGET.to_owned(),
                    created_at: whole_second(place.created),
                    ready: true,
                    was_ready: true,
                    reported: view.seen.is_some(),
                    instance: Some(place.process.to_string()),
                    outdated: false,
                };
                observed.pods.insert(pod.uid.clone(), facts);
            }
            let Some(seen) = view.seen else { continue };
            observed.checks.push(CheckState {
                since: since(place, seen[usize::from(index)], &subject, history),
                well_since: (!place.failing).then(|| at(seen[usize::from(index)].since)),
                seen_at: at(view.heard_at),
                subject,
                healthy: !place.failing,
                message: "no answer".to_owned(),
                dependency: None,
                dependency_answers: None,
                began_before: false,
                asked: false,
            });
        }
        for job in &view.jobs {
            let id = &self.intents[usize::from(job.intent)];
            // Only Jobs of what is in flight are looked up.
            if history.in_flight.iter().any(|record| record.id == *id) {
                let state = match job.state {
                    JobState::Running => ObservedJobState::Running,
                    JobState::Complete => ObservedJobState::Complete,
                    JobState::Failed => ObservedJobState::Failed("exit code 1".to_owned()),
                };
                observed.jobs.insert(id.clone(), ObservedJob { created_at: whole_second(job.created), state });
            }
        }
        observed
    }

    /// What is sent for a record: everything is addressed by what the record says, as the operator does it.
    fn request(&mut self, record: &Record) -> Act {
        let number = |text: &str| text.parse().expect("a number");
        let (place, uid) = match &record.subject.pod {
            Some(pod) => pod.uid.split_once('.').map(|(place, uid)| (number(place), number(uid))).expect("two parts"),
            None => (number(record.subject.check.trim_start_matches("check-")), 0),
        };
        let process = record.instance.as_deref().map(number);
        Act { intent: self.intent(&record.id), action: record.step.action, place, uid, process }
    }
}

fn settings(scenario: &Scenario) -> Settings {
    let step = |action: &Action| Step {
        action: *action,
        cron_job: (*action == Action::RunCleanupJob).then(|| "cleanup".to_owned()),
        timeout_ms: u64::from(TICK) * u64::from(scenario.rung_ticks),
    };
    let ladder: Vec<_> = scenario.ladder.iter().map(step).collect();
    let checks = (0..2).map(|place| subject(scenario.scope, place, 0).check);
    Settings {
        ladders: checks.map(|check| (check, ladder.clone())).collect(),
        limits: Limits {
            max_in_flight: 2,
            cooldown_ms: u64::from(TICK) * 4,
            budget_actions: 20,
            budget_interval_ms: 600_000,
            max_unhealthy: MaxUnhealthy::Count(2),
        },
        healthy_delay_ms: u64::from(TICK),
        ..Settings::default()
    }
}

fn landmarks(before: &History, after: &History, finished: &[Record]) -> Landmarks {
    let mut landmarks = Landmarks::default();
    for record in finished {
        landmarks.insert(match record.outcome {
            Outcome::Failed => Landmark::Failed,
            Outcome::Succeeded => Landmark::Succeeded,
            _ => Landmark::Cancelled,
        });
    }
    for record in &after.in_flight {
        let was = before.in_flight.iter().find(|old| old.id == record.id).map(|old| old.outcome);
        if was == Some(Outcome::Pending) && record.outcome == Outcome::Verifying {
            landmarks.insert(Landmark::FoundDone);
        }
        if record.index > 0 {
            landmarks.insert(Landmark::SecondRung);
        }
    }
    if after.in_flight.len() == 2 {
        landmarks.insert(Landmark::TwoInFlight);
    }
    landmarks
}

fn subject(scope: Scope, place: u8, uid: u8) -> Subject {
    let pod = Pod { name: format!("booking-{place}"), uid: format!("{place}.{uid}") };
    match scope {
        Scope::Pods => Subject { target: TARGET.to_owned(), pod: Some(pod), check: "database".to_owned() },
        Scope::Workload => Subject { target: TARGET.to_owned(), pod: None, check: format!("check-{place}") },
    }
}

/// Since when a check is as it is, by the operator's own rule for failures that are older than its first look.
fn since(place: &Place, seen: Seen, subject: &Subject, history: &History) -> Timestamp {
    failing_since(at(seen.since), place.failing && !seen.witnessed, subject, history)
}

fn at(millis: Millis) -> Timestamp {
    Timestamp::from_millisecond(ZERO_MS + i64::from(millis)).expect("a time")
}

fn millis(at: Timestamp) -> Millis {
    Millis::try_from(at.as_millisecond() - ZERO_MS).expect("not before time begins")
}

fn whole_second(millis: Millis) -> Timestamp {
    Timestamp::from_second(at(millis).as_second()).expect("a time")
}
