//! What operators, API server and pods can do, as steps from state to state.

use crate::{
    decisions::{Decisions, TICK},
    properties::{Landmark, Landmarks, Property, Violation},
    search::{self, Counterexample, Set, System},
    settling::Course,
    state::{Bounds, Change, Fresh, Leader, Look, Request, Scenario, Scope, State, Step, Task, Who, Write},
    world::{Act, Answer, Fate, Flaw, Intent, Intents, Millis, World},
};
use engine::recovery::Action;

/// When the story begins. The pods are older than that by more than any time that counts.
const BEGINNING: Millis = 10 * TICK;

/// The system that is explored.
pub struct Model {
    scenario: Scenario,
    /// The code under test.
    pub decisions: Decisions,
    /// What the search came across.
    pub reached: Landmarks,
    /// From where it is known that what is in flight comes to its end.
    pub settling: Set<(State, Course)>,
}

/// All steps out of a state.
type Steps = search::Steps<Step, State, Violation>;

impl Model {
    /// What a scenario describes.
    pub fn new(scenario: Scenario) -> Self {
        let decisions = Decisions::new(&scenario);
        Self { scenario, decisions, reached: Landmarks::default(), settling: Set::default() }
    }

    /// What is wrong and how it comes to that, for people to read.
    pub fn tell(&self, wrong: &Counterexample<Step, Violation>) -> String {
        let Violation { property, what, ahead } = &wrong.violation;
        let line = |(number, step): (usize, &Step)| {
            let written = match step {
                Step::Lands(_, Request::Write(write), _)
                | Step::AnswerLost(_, Request::Write(write), _)
                | Step::LandsLate(Request::Write(write), _) => {
                    format!(" [{}]", self.decisions.tell_record(write.to))
                }
                _ => String::new(),
            };
            let free =
                if number == wrong.steps.len() + 1 { "     And from there, without any more faults:\n" } else { "" };
            format!("{free}{number:>3}. {step}{written}\n")
        };
        let lines: String = (1..).zip(wrong.steps.iter().chain(ahead)).map(line).collect();
        format!("{property:?}: {what}, after:\n{lines}")
    }

    fn has_flaw(&self, flaw: Flaw) -> bool {
        self.scenario.flaw == Some(flaw)
    }

    /// Brings a state to the form that stands for all that behave the same.
    pub fn canonicalise(&mut self, state: &mut State) {
        if state.left.faults == 0 {
            state.left = Bounds { ticks: state.left.ticks, ..Bounds::default() };
        }
        // Versions never become present again, so an outdated write can only be refused, whenever it lands; and so can the
        // creation of a record that is there, as long as nobody deletes it.
        if !self.has_flaw(Flaw::WritesUnfenced) {
            let (ledger, deletions) = (state.ledger, state.left.deletions);
            let decisions = &mut self.decisions;
            state.late.retain(|late| match late {
                Request::Write(write) => {
                    let present = match write.from {
                        Some(_) => decisions.record_of(ledger, write.intent),
                        None => decisions.taken_by(ledger, write.to),
                    };
                    present == write.from || (write.from.is_none() && deletions > 0)
                }
                Request::Act(_) => true,
            });
        }
        // What would change nothing now never will: a process does not forget what it did, no process and no pod comes
        // back, and Jobs stay. With a flaw that need not be so.
        if self.scenario.flaw.is_none() {
            let (count, world) = (state.late.len(), &state.world);
            state.late.retain(|late| !matches!(late, Request::Act(act) if !world.would_act(*act, None)));
            if state.late.len() < count {
                self.reached.insert(Landmark::LateRepetition);
            }
        }
        state.late.sort_unstable();
        if state.left.stale == 0 {
            state.ledger_before = None;
            state.leaders.iter_mut().for_each(|leader| leader.lagging = None);
        }
    }
}

/// One pass of an operator.
impl Model {
    /// A reconcile begins: the operator decides, and sends the write of that. If there is nothing to write, it asks for what
    /// is pending at once; if there is neither, it stays idle. The answer is what was remarkable, and when to look again.
    pub fn begin_pass(&mut self, state: &mut State, who: Who, look: Look) -> (Landmarks, Option<Millis>) {
        let leader = &state.leaders[who.0];
        let ledger = state.ledger_before.filter(|_| look.old_ledger).unwrap_or(state.ledger);
        let view = match leader.lagging.filter(|_| look.old_world) {
            Some(lagging) => lagging,
            None => self.decisions.view(&state.world, leader, state.now),
        };
        let decided = self.decisions.decide(ledger, view, state.now);
        let acts_first = decided.acts && self.has_flaw(Flaw::ActsBeforeIntent);
        let (plan, writes, after) = (decided.plan, decided.writes, decided.ledger);
        if !self.decisions.writes(writes).is_empty() && !acts_first {
            state.set_task(who, Task::Intending { plan, writes, turn: 0, after });
        } else if decided.acts {
            state.set_task(who, Task::Asking { plan, turn: 0, written: ledger, after, answer: None });
        }
        (decided.landmarks, decided.next_check)
    }

    /// What an operator waits for lands. After a write, the operator goes on at once; what comes of an action it has yet
    /// to hear.
    pub fn land(&mut self, state: &mut State, who: Who, fate: Fate) -> Result<(), Violation> {
        match state.task(who).clone() {
            Task::Intending { plan, writes, turn, after } => {
                let all = self.decisions.writes(writes);
                let written = self.land_write(state, all[usize::from(turn)])?;
                let next = if !written {
                    Task::Idle
                } else if usize::from(turn) + 1 < all.len() {
                    Task::Intending { plan, writes, turn: turn + 1, after }
                } else if self.decisions.plan(plan).is_empty() {
                    Task::Idle
                } else {
                    Task::Asking { plan, turn: 0, written: after, after, answer: None }
                };
                state.set_task(who, next);
            }
            Task::Asking { plan, turn, written, after, answer: None } => {
                let act = self.decisions.plan(plan)[usize::from(turn)];
                let (answer, _) = self.land_act(state, act, fate)?;
                state.set_task(who, Task::Asking { plan, turn, written, after, answer: Some(answer) });
            }
            Task::Recording { writes, turn, vouches } => {
                let all = self.decisions.writes(writes);
                self.land_write(state, all[usize::from(turn)])?;
                // What came of one action says nothing of what came of another: all of it is written.
                let more = usize::from(turn) + 1 < all.len();
                state
                    .set_task(who, if more { Task::Recording { writes, turn: turn + 1, vouches } } else { Task::Idle });
            }
            Task::Idle | Task::Asking { .. } => {}
        }
        Ok(())
    }

    /// An operator hears what came of an action. It asks for the next one, or writes what came of all.
    pub fn hear(&mut self, state: &mut State, who: Who) {
        let Task::Asking { plan, turn, written, after, answer: Some(answer) } = state.task(who).clone() else { return };
        let acts = self.decisions.plan(plan);
        let noted = self.decisions.noted(after, acts[usize::from(turn)], answer, state.now);
        let next = if usize::from(turn) + 1 < acts.len() {
            Task::Asking { plan, turn: turn + 1, written, after: noted, answer: None }
        } else if noted == written {
            Task::Idle
        } else {
            let writes = self.decisions.between(written, noted);
            Task::Recording { writes, turn: 0, vouches: answer == Answer::Done }
        };
        state.set_task(who, next);
    }

    /// An operator gives up waiting. Without the answer to a write the pass ends; without that to an action it goes on.
    fn hear_nothing(state: &mut State, who: Who) {
        let next = match state.task(who).clone() {
            Task::Asking { plan, turn, written, after, answer: None } => {
                Task::Asking { plan, turn, written, after, answer: Some(Answer::Nothing) }
            }
            _ => Task::Idle,
        };
        state.set_task(who, next);
    }

    /// What an operator has sent and has no answer to.
    pub fn sent(&self, state: &State, who: Who) -> Option<Request> {
        match state.task(who) {
            Task::Intending { writes, turn, .. } | Task::Recording { writes, turn, .. } => {
                Some(Request::Write(self.decisions.writes(*writes)[usize::from(*turn)]))
            }
            Task::Asking { plan, turn, answer: None, .. } => {
                Some(Request::Act(self.decisions.plan(*plan)[usize::from(*turn)]))
            }
            Task::Idle | Task::Asking { .. } => None,
        }
    }

    /// An operator ends, by a crash or because it lost the Lease. All that it knows is gone; what it sent is not.
    fn end(&self, state: &mut State, who: Who) {
        state.late.extend(self.sent(state, who));
        state.leaders.remove(who.0);
    }
}

/// What happens where a request lands.
impl Model {
    /// A write of a record lands at the API server, which refuses it unless the record is as it was read.
    fn land_write(&mut self, state: &mut State, write: Write) -> Result<bool, Violation> {
        let present = match write.from {
            Some(_) => self.decisions.record_of(state.ledger, write.intent),
            None => self.decisions.taken_by(state.ledger, write.to),
        };
        let unfenced = self.has_flaw(Flaw::WritesUnfenced) && write.from.is_some() && present.is_some();
        if present != write.from && !unfenced {
            let landmark = if write.from.is_none() { Landmark::SeenTwice } else { Landmark::StaleWriteRefused };
            self.reached.insert(landmark);
            return Ok(false);
        }
        if self.decisions.reopens(Write { from: present, ..write }) {
            let what = format!("intent {} was over, and is not any more", write.intent);
            return Err(Violation::new(Property::NotLost, what));
        }
        if state.deleted.len() > 0 && write.from.is_none() {
            self.reached.insert(Landmark::BegunAgain);
        }
        self.change_ledger(state, write.intent, Some(write.to));
        state.recorded.insert(write.intent);
        Ok(true)
    }

    fn change_ledger(&mut self, state: &mut State, intent: Intent, record: Option<u32>) {
        state.ledger_before = Some(state.ledger);
        state.ledger = self.decisions.with_record(state.ledger, intent, record);
    }

    /// A request lands where it is to be done. Says also whether it took effect.
    fn land_act(&mut self, state: &mut State, act: Act, fate: Fate) -> Result<(Answer, bool), Violation> {
        let before = state.world.clone();
        let landed = state.world.land(act, fate, self.scenario.flaw, state.now);
        let (place, intent) = (before.places[usize::from(act.place)], act.intent);
        let done_before = before.effects.contains(intent);
        if landed.effect {
            // Here, what a person deleted can come again at the very time at which it was decided, and so under its id; it may
            // then be done to a process that was started since.
            let forgotten =
                state.deleted.contains(intent) && act.action == Action::ResetConnections && place.process > 0;
            if done_before && !forgotten {
                let what = format!("intent {intent} takes effect for the second time");
                return Err(Violation::new(Property::OnlyOnce, what));
            }
            if !state.recorded.contains(intent) {
                let what = format!("intent {intent} takes effect, and the ledger never knew of it");
                return Err(Violation::new(Property::WrittenFirst, what));
            }
            let steps = self.scenario.ladder.iter().filter(|action| **action == act.action).count();
            // What a person deleted may be done once more: nobody else knows of it.
            let allowed = steps + state.deleted.len();
            if state.world.times_done(act).is_some_and(|times| times > allowed) {
                let what = format!("intent {intent} does about a failure what another intent has done about it");
                return Err(Violation::new(Property::OnlyOnce, what));
            }
            self.world_changes(state, &before);
            state.see_change(act.place, place.failing);
        } else if done_before {
            self.reached.insert(Landmark::AskedAgain);
            if place.there && place.uid != act.uid {
                self.reached.insert(Landmark::OtherPod);
            }
        }
        if landed.answer == Answer::OtherProcess {
            self.reached.insert(Landmark::OtherProcess);
        }
        if landed.answer == Answer::Refused {
            self.reached.insert(Landmark::EvictionRefused);
            state.spend(|left| &mut left.refusals);
        }
        Ok((landed.answer, landed.effect))
    }

    /// The world is not as it was `before` any more; an operator's caches may still show that.
    fn world_changes(&mut self, state: &mut State, before: &World) {
        if state.left.stale > 0 {
            for leader in &mut state.leaders {
                leader.lagging = Some(self.decisions.view(before, leader, state.now));
            }
        }
    }

    /// What may come of a request.
    fn fates(&self, state: &State, act: Act) -> &'static [Fate] {
        let effect = state.world.would_act(act, self.scenario.flaw);
        let failing = state.world.places[usize::from(act.place)].failing;
        match act.action {
            Action::ResetConnections if effect && failing => &[Fate::Heals, Fate::HealsNot],
            Action::RestartPod if effect && state.left.refusals > 0 => &[Fate::HealsNot, Fate::Refused],
            _ => &[Fate::HealsNot],
        }
    }
}

/// The steps.
impl Model {
    fn take_over(state: &State, steps: &mut Steps) {
        let overlaps = !state.leaders.is_empty();
        if state.leaders.len() == 2 || overlaps && state.left.overlaps == 0 {
            return;
        }
        let mut next = state.clone();
        if overlaps {
            next.spend(|left| &mut left.overlaps);
        }
        next.leaders.push(Leader::new(state.now));
        steps.push((Step::TakesOver(overlaps), Ok(next)));
    }

    fn operator_steps(&mut self, state: &State, who: Who, steps: &mut Steps) {
        if state.leaders[who.0].seen.is_none() {
            let mut next = state.clone();
            next.hear_pods(who);
            steps.push((Step::HearsPods(who), Ok(next)));
        }
        match state.task(who) {
            Task::Idle => self.decide_steps(state, who, steps),
            Task::Asking { answer: Some(answer), .. } => {
                let mut next = state.clone();
                self.hear(&mut next, who);
                steps.push((Step::Hears(who, *answer), Ok(next)));
            }
            _ => self.call_steps(state, who, steps),
        }
        if state.left.crashes > 0 {
            self.note_crash(state, who);
            let mut next = state.clone();
            next.spend(|left| &mut left.crashes);
            self.end(&mut next, who);
            steps.push((Step::Crashes(who), Ok(next)));
        }
    }

    fn note_crash(&mut self, state: &State, who: Who) {
        match state.task(who) {
            Task::Asking { answer: Some(Answer::Done), .. } | Task::Recording { vouches: true, .. } => {
                self.reached.insert(Landmark::CrashBetweenActAndRecord);
            }
            Task::Asking { plan, turn, answer: None, .. } => {
                let act = self.decisions.plan(*plan)[usize::from(*turn)];
                if !state.world.effects.contains(act.intent) {
                    self.reached.insert(Landmark::CrashBetweenIntentAndAct);
                }
            }
            _ => {}
        }
    }

    fn decide_steps(&mut self, state: &State, who: Who, steps: &mut Steps) {
        for (old_ledger, old_world) in [(false, false), (true, false), (false, true), (true, true)] {
            let shown = (!old_ledger || state.ledger_before.is_some())
                && (!old_world || state.leaders[who.0].lagging.is_some());
            if !shown {
                continue;
            }
            let (look, mut next) = (Look { old_ledger, old_world }, state.clone());
            if old_ledger || old_world {
                next.spend(|left| &mut left.stale);
            }
            let (landmarks, _) = self.begin_pass(&mut next, who, look);
            self.reached.extend(landmarks);
            if *next.task(who) != Task::Idle {
                steps.push((Step::Decides(who, look), Ok(next)));
            }
        }
    }

    /// What can become of a call that an operator waits for.
    fn call_steps(&mut self, state: &State, who: Who, steps: &mut Steps) {
        let Some(request) = self.sent(state, who) else { return };
        if state.leaders.get(1 - who.0).is_some_and(|other| other.task != Task::Idle) {
            self.reached.insert(Landmark::TwoLeadersAtWork);
        }
        let fates = match &request {
            Request::Act(act) => self.fates(state, *act),
            Request::Write(_) => &[Fate::HealsNot],
        };
        for fate in fates {
            let mut next = state.clone();
            let result = self.land(&mut next, who, *fate);
            if result.is_ok() && next.left.faults > 0 && next.left.lost > 0 {
                let step = Step::AnswerLost(who, request, *fate);
                steps.push((step, Ok(self.without_answer(state, next.clone(), who))));
            }
            steps.push((Step::Lands(who, request, *fate), result.map(|()| next)));
        }
        if state.left.lost > 0 {
            let mut next = state.clone();
            next.spend(|left| &mut left.lost);
            next.late.push(request);
            Self::hear_nothing(&mut next, who);
            steps.push((Step::GivesUp(who, request), Ok(next)));
        }
    }

    /// As if a call landed, but the operator does not hear of it.
    fn without_answer(&mut self, before: &State, mut landed: State, who: Who) -> State {
        if landed.world.effects != before.world.effects {
            self.reached.insert(Landmark::AnswerLost);
        }
        landed.spend(|left| &mut left.lost);
        landed.set_task(who, before.task(who).clone());
        Self::hear_nothing(&mut landed, who);
        landed
    }

    fn late_steps(&mut self, state: &State, steps: &mut Steps) {
        for (index, request) in state.late.iter().enumerate() {
            // Two that are equal do the same.
            if index > 0 && state.late[index - 1] == *request {
                continue;
            }
            let mut without = state.clone();
            without.late.remove(index);
            match request {
                Request::Write(write) => {
                    let result = self.land_write(&mut without, *write);
                    if let Ok(true) = result {
                        self.reached.insert(Landmark::LateWriteAccepted);
                    }
                    steps.push((Step::LandsLate(*request, Fate::HealsNot), result.map(|_| without)));
                }
                Request::Act(act) => {
                    for fate in self.fates(state, *act) {
                        let mut next = without.clone();
                        let result = self.land_act(&mut next, *act, *fate);
                        if let Ok((_, true)) = result {
                            self.reached.insert(Landmark::LateEffect);
                        }
                        steps.push((Step::LandsLate(*request, *fate), result.map(|_| next)));
                    }
                }
            }
        }
    }

    fn restart_steps(&mut self, state: &State, steps: &mut Steps) {
        if self.scenario.scope == Scope::Workload || state.left.restarts == 0 {
            return;
        }
        for place in (0..2u8).filter(|place| state.world.places[usize::from(*place)].there) {
            for fresh in [Fresh::Healthy, Fresh::Fails, Fresh::FailsAtOnce] {
                let mut next = state.clone();
                next.spend(|left| &mut left.restarts);
                self.world_changes(&mut next, &state.world);
                next.start_process(place, fresh);
                steps.push((Step::ProcessStarts(place, fresh), Ok(next)));
            }
        }
    }

    fn deletion_steps(&mut self, state: &State, steps: &mut Steps) {
        if state.left.deletions == 0 {
            return;
        }
        let knows = self.decisions.knows(state.ledger);
        for intent in knows.all.iter() {
            let mut next = state.clone();
            next.spend(|left| &mut left.deletions);
            next.deleted.insert(intent);
            self.change_ledger(&mut next, intent, None);
            if knows.in_flight.contains(intent) && state.world.effects.contains(intent) {
                self.reached.insert(Landmark::DeletedInFlight);
            }
            steps.push((Step::Deletes(intent), Ok(next)));
        }
    }

    fn tick_steps(&mut self, state: &State, steps: &mut Steps) {
        if state.left.ticks == 0 {
            return;
        }
        for changes in Change::combinations(&state.world) {
            let mut next = state.clone();
            next.left.ticks -= 1;
            // Of two, the one that has the Lease is the one that began last; the other one's fence falls by itself.
            if next.leaders.len() == 2 {
                self.end(&mut next, Who(0));
            }
            if !changes.is_empty() {
                self.world_changes(&mut next, &state.world);
            }
            next.now += TICK;
            for change in &changes {
                next.make(*change);
            }
            steps.push((Step::Tick(changes), Ok(next)));
        }
    }
}

impl System for Model {
    type State = State;
    type Step = Step;
    type Violation = Violation;

    /// One replica leads; it saw both checks begin to fail.
    fn initial(&mut self) -> State {
        let mut state = State {
            left: self.scenario.bounds,
            now: BEGINNING,
            ledger: Decisions::NOTHING,
            ledger_before: None,
            recorded: Intents::default(),
            deleted: Intents::default(),
            world: World::failing(),
            leaders: vec![Leader::new(BEGINNING)],
            late: Vec::new(),
        };
        state.hear_pods(Who(0));
        state.see(0, true);
        state.see(1, true);
        self.canonicalise(&mut state);
        state
    }

    fn steps(&mut self, state: &State) -> Steps {
        let mut steps = Steps::new();
        Self::take_over(state, &mut steps);
        for who in (0..state.leaders.len()).map(Who) {
            self.operator_steps(state, who, &mut steps);
        }
        self.late_steps(state, &mut steps);
        self.restart_steps(state, &mut steps);
        self.deletion_steps(state, &mut steps);
        self.tick_steps(state, &mut steps);
        for next in steps.iter_mut().filter_map(|(_, next)| next.as_mut().ok()) {
            self.canonicalise(next);
        }
        steps
    }

    fn check(&mut self, state: &State) -> Result<(), Violation> {
        let knows = self.decisions.knows(state.ledger);
        if let Some(lost) = state.recorded.without(state.deleted).first_not_in(knows.all) {
            let what = format!("intent {lost} was in flight, and the ledger knows nothing of it any more");
            return Err(Violation::new(Property::NotLost, what));
        }
        if knows.in_flight == Intents::default() {
            return Ok(());
        }
        // What is only looked ahead at was not come across.
        let reached = self.reached;
        let result = self.check_next_step(state);
        self.reached = reached;
        result
    }
}
