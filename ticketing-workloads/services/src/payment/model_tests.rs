//! Every payment that a few faults can make, by the real decision function: answers that are lost, requests that arrive after
//! their sender gave up, processes that die between any two steps or go on after their claim ran out, searches that lag,
//! events of a provider at any time and in any order, buyers who act or do not.
//!
//! Never two charges; never a charge of what was closed; and once the faults are over, a charge has a booking or a refund.

use super::decision::{Answer, Attempt, Facts, KEYS_LAST, Next, PROVIDERS, Progress, Purpose, State, learn, next};
use std::collections::{BTreeSet, HashSet, VecDeque};
use std::time::Duration;

const CANCELS: [bool; PROVIDERS] = [true, false];
const BUYER_LIMIT: Duration = Duration::from_secs(900);
/// Numbers of attempts that are told apart.
const NUMBERS: i32 = 3;

/// An object at a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Object {
    Unconfirmed,
    Processing,
    NeedsBuyer,
    Charged,
    Declined,
    Cancelled,
}

/// What a provider keeps for an idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stored {
    /// It did something, and answers by how its object stands.
    Done,
    Declined,
    NeedsBuyer,
    /// It failed, and says so again for the same key.
    Failure,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Provider {
    /// By the number under which they were created.
    objects: Vec<(i32, Object)>,
    /// By the key of a confirmation.
    stored: Vec<(i32, Stored)>,
    /// The charge of the one-step protocol, with the order's own key; `false`: it was declined.
    one_step: Option<bool>,
}

/// A request on its way, whose sender no longer waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Late {
    Confirm { object: i32, key: i32 },
    Cancel { object: i32 },
    OneStep,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum At {
    Decide,
    /// This is written down, and is sent next.
    Send(Next),
    /// This was answered, and is written down next.
    Write(Next, Answer),
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Process {
    purpose: Purpose,
    /// What it read of the ledger, and has written since.
    attempts: [Option<Attempt>; PROVIDERS],
    progress: [Progress; PROVIDERS],
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Booking {
    Pending,
    Confirmed,
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct World {
    attempts: [Option<Attempt>; PROVIDERS],
    closed: bool,
    /// Closed, and the answer was that nothing is charged.
    closed_for_good: bool,
    /// Which process may write.
    claim: Option<usize>,
    processes: [Option<Process>; 2],
    providers: [Provider; PROVIDERS],
    late: BTreeSet<(usize, Late)>,
    booking: Booking,
    refund: bool,
    faults: u8,
    /// Requests that may still be begun.
    requests: u8,
}

/// A mistake that the model must find.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// What a search does not find was never charged.
    BelievesSearch,
    /// A confirmation without an answer was not made.
    BelievesSilence,
    /// What is not confirmed is left as it is instead of being cancelled.
    NeverCancels,
    /// A closed payment may be begun again.
    ForgetsClosing,
    /// Who has no claim any more writes all the same.
    WritesWithoutClaim,
    /// Nobody looks for charges of cancelled bookings.
    NoRefunds,
}

fn object_id(number: i32) -> String {
    number.to_string()
}

fn number_of(object: &str) -> i32 {
    object.parse().unwrap()
}

fn decision(process: &Process) -> Next {
    next(&Facts {
        attempts: &process.attempts,
        progress: &process.progress,
        may_ask: [true, true],
        cancels: CANCELS,
        purpose: process.purpose,
        buyer_limit: BUYER_LIMIT,
    })
}

impl Provider {
    fn object(&mut self, number: i32) -> Option<&mut Object> {
        self.objects.iter_mut().find(|(own, _)| *own == number).map(|(_, object)| object)
    }

    fn stored(&self, key: i32) -> Option<Stored> {
        self.stored.iter().find(|(own, _)| *own == key).map(|(_, stored)| *stored)
    }

    fn charges(&self) -> usize {
        let two_steps = self.objects.iter().filter(|(_, object)| *object == Object::Charged).count();
        two_steps + usize::from(self.one_step == Some(true))
    }

    /// All that a confirmation may do when it arrives, with the answer.
    fn confirm(&self, object: i32, key: i32) -> Vec<(Self, Answer)> {
        let id = object_id(object);
        let mut changed = self.clone();
        let Some(now) = changed.object(object).copied() else { return vec![(changed, Answer::Unanswered)] };
        let by_state = |state| match state {
            Object::Charged => Answer::Charged { object: id.clone() },
            Object::Processing => Answer::Processing,
            Object::NeedsBuyer => Answer::NeedsBuyer { object: id.clone() },
            _ => Answer::Unanswered,
        };
        match self.stored(key) {
            Some(Stored::Failure) => return vec![(changed, Answer::Unanswered)],
            Some(Stored::Declined) => return vec![(changed, Answer::Declined)],
            Some(Stored::NeedsBuyer) => return vec![(changed, Answer::NeedsBuyer { object: id })],
            Some(Stored::Done) => return vec![(changed, by_state(now))],
            None => {}
        }
        if now != Object::Unconfirmed {
            // Already confirmed under another key, or cancelled: it says so, and does nothing.
            return vec![(changed, Answer::Unanswered)];
        }
        let outcomes = [
            (Object::Charged, Stored::Done),
            (Object::Processing, Stored::Done),
            (Object::NeedsBuyer, Stored::NeedsBuyer),
            (Object::Declined, Stored::Declined),
            (Object::Unconfirmed, Stored::Failure),
        ];
        let one = |(after, stored)| {
            let mut changed = self.clone();
            *changed.object(object).unwrap() = after;
            changed.stored.push((key, stored));
            changed.stored.sort_unstable();
            let answer = match stored {
                Stored::Failure => Answer::Unanswered,
                Stored::Declined => Answer::Declined,
                _ => by_state(after),
            };
            (changed, answer)
        };
        outcomes.into_iter().map(one).collect()
    }

    fn cancel(&self, object: i32) -> (Self, Answer) {
        let mut changed = self.clone();
        let answer = match changed.object(object) {
            Some(state @ (Object::Unconfirmed | Object::NeedsBuyer | Object::Declined | Object::Cancelled)) => {
                *state = Object::Cancelled;
                Answer::Cancelled
            }
            Some(Object::Charged) => Answer::Charged { object: object_id(object) },
            _ => Answer::Unanswered,
        };
        (changed, answer)
    }

    fn read(&self, object: i32) -> Answer {
        match self.clone().object(object) {
            Some(Object::Unconfirmed) => Answer::Unconfirmed,
            Some(Object::Processing) => Answer::Processing,
            Some(Object::NeedsBuyer) => Answer::NeedsBuyer { object: object_id(object) },
            Some(Object::Charged) => Answer::Charged { object: object_id(object) },
            Some(Object::Declined) => Answer::Declined,
            Some(Object::Cancelled) => Answer::Cancelled,
            None => Answer::Unanswered,
        }
    }

    /// All that a charge of the one-step protocol may do: the same key again is the same charge.
    fn one_step(&self) -> Vec<(Self, Answer)> {
        let answer = |charged| if charged { Answer::Charged { object: "0".into() } } else { Answer::Declined };
        match self.one_step {
            Some(charged) => vec![(self.clone(), answer(charged))],
            None => {
                [true, false].map(|charged| (Self { one_step: Some(charged), ..self.clone() }, answer(charged))).into()
            }
        }
    }
}

impl World {
    /// A new order.
    fn new(faults: u8, requests: u8) -> Self {
        Self {
            attempts: [None, None],
            closed: false,
            closed_for_good: false,
            claim: None,
            processes: [None, None],
            providers: [Provider::default(), Provider::default()],
            late: BTreeSet::new(),
            booking: Booking::Pending,
            refund: false,
            faults,
            requests,
        }
    }

    /// An order that a pod of version 0.1 has asked this provider for: it was charged, is on its way, or never left.
    fn legacy(provider: usize, fate: usize, faults: u8, requests: u8) -> Self {
        let mut world = Self::new(faults, requests);
        world.attempts[provider] = Some(Attempt { number: 1, state: State::Begun, age: Duration::ZERO });
        match fate {
            0 => world.providers[provider].one_step = Some(true),
            1 => drop(world.late.insert((provider, Late::OneStep))),
            _ => {}
        }
        world
    }

    fn charges(&self) -> usize {
        self.providers.iter().map(Provider::charges).sum()
    }

    fn check(&self) -> Result<(), String> {
        if self.charges() > 1 {
            return Err("charged twice".into());
        }
        if self.closed_for_good && self.charges() > 0 {
            return Err("charged after it was closed".into());
        }
        if self.booking == Booking::Confirmed && self.charges() == 0 {
            return Err("confirmed without a charge".into());
        }
        Ok(())
    }

    fn begin(&self, slot: usize, purpose: Purpose) -> Self {
        let mut world = self.clone();
        world.closed |= purpose == Purpose::Close;
        let purpose = if world.closed && purpose == Purpose::Pay { Purpose::Close } else { purpose };
        let attempts = world.attempts.clone();
        world.claim = Some(slot);
        world.processes[slot] = Some(Process { purpose, attempts, progress: Default::default(), at: At::Decide });
        world
    }

    /// Everything that can happen next.
    fn successors(&self, flaw: Flaw) -> Vec<Self> {
        let mut all = Vec::new();
        self.providers_act(&mut all);
        // Time passes: the buyer's time, and that of the keys.
        for index in 0..PROVIDERS {
            if let Some(attempt) = &self.attempts[index]
                && attempt.age == Duration::ZERO
                && matches!(attempt.state, State::NeedsBuyer { .. } | State::Begun)
            {
                let mut world = self.clone();
                world.attempts[index] = Some(Attempt { age: KEYS_LAST.max(BUYER_LIMIT), ..attempt.clone() });
                all.push(world);
            }
        }
        // Requests begin: when nobody works on it, or, as a fault, when the claim of who does has run out.
        for slot in 0..self.processes.len() {
            if self.processes[slot].is_some() || self.requests == 0 {
                continue;
            }
            let taken_over = self.claim.is_some();
            if taken_over && self.faults == 0 {
                continue;
            }
            for purpose in [Purpose::Pay, Purpose::Close, Purpose::Look] {
                let mut world = self.begin(slot, purpose);
                if flaw == Flaw::ForgetsClosing && purpose == Purpose::Pay {
                    world.processes[slot].as_mut().unwrap().purpose = Purpose::Pay;
                }
                world.requests -= 1;
                world.faults -= u8::from(taken_over);
                all.push(world);
            }
        }
        for slot in 0..self.processes.len() {
            if let Some(process) = &self.processes[slot] {
                self.step(slot, process, flaw, true, &mut all);
                if self.faults > 0 {
                    // It dies; its claim runs out in time.
                    let mut world = self.clone();
                    world.faults -= 1;
                    world.end(slot);
                    all.push(world);
                }
            }
        }
        if flaw != Flaw::NoRefunds {
            all.extend(self.sweep());
        }
        all
    }

    fn end(&mut self, slot: usize) {
        self.processes[slot] = None;
        if self.claim == Some(slot) {
            self.claim = None;
        }
    }

    /// What comes late arrives, and what is open at a provider goes on.
    fn providers_act(&self, all: &mut Vec<Self>) {
        for (index, late) in &self.late {
            let provider = &self.providers[*index];
            let after = match *late {
                Late::Confirm { object, key } => provider.confirm(object, key),
                Late::Cancel { object } => vec![provider.cancel(object)],
                Late::OneStep => provider.one_step(),
            };
            for (provider, _) in after {
                let mut world = self.clone();
                world.late.remove(&(*index, *late));
                world.providers[*index] = provider;
                all.push(world);
            }
        }
        for (index, cancels) in CANCELS.into_iter().enumerate() {
            for (place, (_, object)) in self.providers[index].objects.iter().enumerate() {
                let becomes: &[Object] = match object {
                    Object::Processing => &[Object::Charged, Object::Declined],
                    Object::NeedsBuyer if cancels => &[Object::Charged, Object::Declined, Object::Unconfirmed],
                    Object::NeedsBuyer => &[Object::Unconfirmed],
                    _ => &[],
                };
                for object in becomes {
                    let mut world = self.clone();
                    world.providers[index].objects[place].1 = *object;
                    all.push(world);
                }
            }
        }
    }

    /// A process goes on. `faulty`: requests and answers may be lost.
    fn step(&self, slot: usize, process: &Process, flaw: Flaw, faulty: bool, all: &mut Vec<Self>) {
        match &process.at {
            At::Decide => {
                let decided = self.decide(slot, process, flaw);
                // Without a queue, booking gives up what nobody has charged.
                let gives_up = faulty && decision(process) == Next::Exhausted && self.booking == Booking::Pending;
                all.extend(
                    decided
                        .iter()
                        .filter(|_| gives_up)
                        .map(|world| Self { booking: Booking::Cancelled, ..world.clone() }),
                );
                all.extend(decided);
            }
            At::Send(next) => self.send(slot, process, *next, flaw, faulty, all),
            At::Write(next, answer) => all.extend(self.write(slot, process, *next, answer, flaw)),
        }
    }

    fn decide(&self, slot: usize, process: &Process, flaw: Flaw) -> Option<Self> {
        let mut world = self.clone();
        let step = decision(process);
        let mine = world.processes[slot].as_mut().unwrap();
        match step {
            Next::Paid(_) => {
                world.booking = match world.booking {
                    Booking::Cancelled => {
                        world.refund |= flaw != Flaw::NoRefunds;
                        Booking::Cancelled
                    }
                    _ => Booking::Confirmed,
                };
                world.end(slot);
            }
            Next::Exhausted => {
                let refuses = |one: &Option<Attempt>| {
                    matches!(one, Some(Attempt { state: State::Declined | State::Expired | State::Refused, .. }))
                };
                let has_claim = world.claim == Some(slot);
                let closed = process.purpose == Purpose::Close && has_claim;
                let declined = process.attempts.iter().all(refuses) && process.purpose == Purpose::Pay;
                world.closed_for_good |= closed;
                // The booking is cancelled, unless it was confirmed meanwhile.
                if (closed || declined) && world.booking == Booking::Pending {
                    world.booking = Booking::Cancelled;
                }
                world.end(slot);
            }
            Next::Wait | Next::AwaitBuyer(_) => world.end(slot),
            Next::Create(index, number) => {
                if number > NUMBERS {
                    return None;
                }
                return self.note(slot, index, number, State::Creating, At::Send(step), flaw);
            }
            Next::Confirm(index, number) => {
                let object = process.attempts[index].as_ref()?.state.object()?.to_owned();
                if number > NUMBERS {
                    return None;
                }
                return self.note(slot, index, number, State::Confirming { object }, At::Send(step), flaw);
            }
            Next::Expire(index) => {
                let number = process.attempts[index].as_ref()?.number;
                return self.note(slot, index, number, State::Expired, At::Decide, flaw);
            }
            Next::Cancel(index) if flaw == Flaw::NeverCancels => {
                let number = process.attempts[index].as_ref()?.number;
                return self.note(slot, index, number, State::NotCharged, At::Decide, flaw);
            }
            _ => mine.at = At::Send(step),
        }
        Some(world)
    }

    /// Writes a state down, if the claim still holds.
    fn note(&self, slot: usize, index: usize, number: i32, state: State, then: At, flaw: Flaw) -> Option<Self> {
        let mut world = self.clone();
        if world.claim != Some(slot) && flaw != Flaw::WritesWithoutClaim {
            world.processes[slot] = None;
            return Some(world);
        }
        let attempt = Attempt { number, state, age: Duration::ZERO };
        world.attempts[index] = Some(attempt.clone());
        let mine = world.processes[slot].as_mut()?;
        mine.attempts[index] = Some(attempt);
        mine.at = then;
        Some(world)
    }

    fn send(&self, slot: usize, process: &Process, step: Next, flaw: Flaw, faulty: bool, all: &mut Vec<Self>) {
        let faulty = faulty && self.faults > 0;
        let (index, executed, late) = self.request(process, step);
        let answered = |provider: Provider, answer: Answer, fault: bool, late: Option<Late>| {
            let mut world = self.clone();
            world.providers[index] = provider;
            world.faults -= u8::from(fault);
            world.late.extend(late.map(|late| (index, late)));
            let answer = match (flaw, &answer, step) {
                (Flaw::BelievesSilence, Answer::Unanswered, Next::Confirm(..)) => Answer::NotReached,
                _ => answer,
            };
            world.processes[slot].as_mut().unwrap().at = At::Write(step, answer);
            world
        };
        for (provider, answer) in executed {
            if faulty {
                all.push(answered(provider.clone(), Answer::Unanswered, true, None));
            }
            all.push(answered(provider, answer, false, None));
        }
        if faulty {
            all.push(answered(self.providers[index].clone(), Answer::NotReached, true, None));
            // It arrives later, or never.
            all.push(answered(self.providers[index].clone(), Answer::Unanswered, true, late));
        }
        if let Next::Search(_) = step {
            // It lags, for as long as it likes.
            all.push(answered(self.providers[index].clone(), Answer::Unconfirmed, false, None));
        }
    }

    /// What a request does when it arrives now, and what it is when it arrives later.
    fn request(&self, process: &Process, step: Next) -> (usize, Vec<(Provider, Answer)>, Option<Late>) {
        let attempt = |index: usize| process.attempts[index].as_ref().unwrap();
        let object = |index: usize| number_of(attempt(index).state.object().unwrap());
        match step {
            Next::Create(index, number) => {
                let mut provider = self.providers[index].clone();
                if provider.object(number).is_none() {
                    provider.objects.push((number, Object::Unconfirmed));
                }
                let created = (provider, Answer::Created { object: object_id(number) });
                (index, vec![created, (self.providers[index].clone(), Answer::Refused)], None)
            }
            Next::Confirm(index, key) => {
                let late = Late::Confirm { object: object(index), key };
                (index, self.providers[index].confirm(object(index), key), Some(late))
            }
            Next::ConfirmAgain(index) => {
                let key = attempt(index).number;
                let late = Late::Confirm { object: object(index), key };
                (index, self.providers[index].confirm(object(index), key), Some(late))
            }
            Next::Read(index) => {
                let provider = &self.providers[index];
                (index, vec![(provider.clone(), provider.read(object(index)))], None)
            }
            Next::Cancel(index) => {
                let late = Late::Cancel { object: object(index) };
                (index, vec![self.providers[index].cancel(object(index))], Some(late))
            }
            Next::Search(index) => {
                let provider = self.providers[index].clone();
                let found = if provider.one_step == Some(true) {
                    Answer::Charged { object: "0".into() }
                } else {
                    Answer::Unconfirmed
                };
                (index, vec![(provider, found)], None)
            }
            Next::ChargeAgain(index) => (index, self.providers[index].one_step(), Some(Late::OneStep)),
            other => unreachable!("{other:?} is not sent"),
        }
    }

    fn write(&self, slot: usize, process: &Process, step: Next, answer: &Answer, flaw: Flaw) -> Option<Self> {
        let (Next::Create(index, _)
        | Next::Confirm(index, _)
        | Next::ConfirmAgain(index)
        | Next::Read(index)
        | Next::Cancel(index)
        | Next::Search(index)
        | Next::ChargeAgain(index)) = step
        else {
            return None;
        };
        let attempt = process.attempts[index].as_ref()?;
        let (state, progress) = match (flaw, step, answer) {
            (Flaw::BelievesSearch, Next::Search(_), Answer::Unconfirmed) => (Some(State::NotCharged), Progress::Spent),
            _ => learn(step, &attempt.state, answer, CANCELS[index]),
        };
        let mut world = match state {
            Some(state) => self.note(slot, index, attempt.number, state, At::Decide, flaw)?,
            None => self.clone(),
        };
        if let Some(mine) = world.processes[slot].as_mut() {
            mine.progress[index] = progress;
            mine.at = At::Decide;
        }
        Some(world)
    }

    /// A charge of a cancelled booking gets its refund.
    fn sweep(&self) -> Option<Self> {
        let charged = self.attempts.iter().flatten().any(|one| matches!(one.state, State::Charged { .. }));
        (charged && self.booking == Booking::Cancelled && !self.refund).then(|| Self { refund: true, ..self.clone() })
    }

    /// No more faults: what is late arrives, who is at work ends, and the order is asked for until nothing changes.
    fn settle(&self, flaw: Flaw) -> Result<(), String> {
        let mut world = Self { faults: 0, requests: u8::MAX, ..self.clone() };
        for _ in 0..200 {
            world.check()?;
            let mut all = Vec::new();
            world.providers_act(&mut all);
            if all.is_empty() {
                if let Some((slot, process)) =
                    world.processes.iter().enumerate().find_map(|(slot, one)| Some((slot, one.clone()?)))
                {
                    world.step(slot, &process, flaw, false, &mut all);
                } else if flaw != Flaw::NoRefunds
                    && let Some(swept) = world.sweep()
                {
                    all.push(swept);
                } else {
                    let is_open = |one: &Attempt| one.state.in_doubt() || matches!(one.state, State::NeedsBuyer { .. });
                    let open = world.attempts.iter().flatten().any(is_open);
                    if world.booking == Booking::Confirmed || (world.booking == Booking::Cancelled && !open) {
                        break;
                    }
                    // After PENDING_LIMIT, and where the booking is cancelled, payment is asked to end it.
                    all.push(world.begin(0, Purpose::Close));
                }
            }
            let Some(first) = all.into_iter().next() else { break };
            world = first;
        }
        // What only a person can settle: keys that are gone, and a failure that a provider repeats for the same key while
        // its objects cannot be cancelled.
        let for_a_person =
            world.attempts.iter().zip(&world.providers).zip(CANCELS).any(|((attempt, provider), cancels)| {
                attempt.as_ref().is_some_and(|one| match one.state {
                    State::Begun => one.age >= KEYS_LAST,
                    State::Confirming { .. } => !cancels && provider.stored(one.number) == Some(Stored::Failure),
                    _ => false,
                })
            });
        match world.booking {
            Booking::Pending if for_a_person => Ok(()),
            Booking::Pending => Err("it never ends".into()),
            Booking::Confirmed => Ok(()),
            Booking::Cancelled if world.charges() == 0 || world.refund => Ok(()),
            Booking::Cancelled => Err("charged without a booking or a refund".into()),
        }
    }
}

/// Goes through everything that can happen from there; the answer is how many states there are.
fn explore(begin: World, flaw: Flaw) -> Result<usize, String> {
    let mut seen = HashSet::from([begin.clone()]);
    let mut open = VecDeque::from([begin]);
    while let Some(world) = open.pop_front() {
        world.check().map_err(|error| format!("{error}: {world:#?}"))?;
        // While somebody is at work, what they do next is explored anyhow.
        if world.processes.iter().all(Option::is_none) {
            world.settle(flaw).map_err(|error| format!("in the end, {error}: {world:#?}"))?;
        }
        for next in world.successors(flaw) {
            if seen.insert(next.clone()) {
                open.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

fn all(flaw: Flaw, faults: u8, requests: u8) -> Result<usize, String> {
    let mut states = explore(World::new(faults, requests), flaw)?;
    for provider in 0..PROVIDERS {
        for fate in 0..3 {
            states += explore(World::legacy(provider, fate, faults - 1, requests), flaw)?;
        }
    }
    Ok(states)
}

#[test]
fn nobody_is_charged_twice_or_for_nothing() {
    let begin = std::time::Instant::now();
    let states = all(Flaw::None, 2, 2).unwrap();
    println!("{states} states in {:?}", begin.elapsed());
    assert!(states > 10_000, "{states}");
}

/// Each mistake leads to a state that must not be.
#[rstest::rstest]
#[case::search(Flaw::BelievesSearch)]
#[case::silence(Flaw::BelievesSilence)]
#[case::no_cancellation(Flaw::NeverCancels)]
#[case::closing(Flaw::ForgetsClosing)]
#[case::claim(Flaw::WritesWithoutClaim)]
#[case::refunds(Flaw::NoRefunds)]
fn the_model_finds_mistakes(#[case] flaw: Flaw) {
    let error = all(flaw, 2, 2).unwrap_err();
    assert!(error.contains("charged"), "{error}");
}
