//! That whatever is in flight has a next step, and that these steps lead to its end.

use crate::{
    decisions::Decisions,
    model::Model,
    properties::{Property, Violation},
    state::{Bounds, Change, Fresh, Leader, Look, Request, State, Step, Task, Who},
    world::{Fate, Intents, JobState, Millis},
};

/// How a run without faults goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Course {
    /// What is done helps.
    Helps,
    /// Nothing helps.
    HelpsNot,
    /// Nothing helps, and no pod is heard any more.
    Silence,
}

/// Far more steps than any ladder here needs.
const MOST_STEPS: usize = 200;
/// How long an operator waits after a reconcile that asked for something.
const PAUSE: Millis = 1_000;

impl Model {
    /// Checks a state in which something is in flight.
    pub fn check_next_step(&mut self, state: &State) -> Result<(), Violation> {
        self.has_next_step(state)?;
        let survivor = match state.leaders.last() {
            Some(leader) if leader.task == Task::Idle => leader.clone(),
            // In the middle of a reconcile. Its end is a state of its own, and no more steps away than the pass has.
            Some(_) => return Ok(()),
            None => Leader::new(state.now),
        };
        for course in [Course::Helps, Course::HelpsNot] {
            self.settles(state, survivor.clone(), course)?;
        }
        // What a disruption budget refuses waits as long as it takes. All else ends also if no pod is ever heard again.
        if !self.decisions.waits(state.ledger) {
            self.settles(state, Leader::new(state.now), Course::Silence)?;
        }
        Ok(())
    }

    /// An operator that just began to lead ends what is in flight, asks for something, or knows when to look again.
    fn has_next_step(&mut self, state: &State) -> Result<(), Violation> {
        let view = self.decisions.view(&state.world, &Leader::new(state.now), state.now);
        let decided = self.decisions.decide(state.ledger, view, state.now);
        let over = nothing_in_flight(&self.decisions, decided.ledger);
        if over || decided.acts || decided.next_check.is_some() {
            return Ok(());
        }
        let what = "an operator that begins to lead would do nothing about what is in flight, and never look again";
        Err(Violation::new(Property::NextStep, what))
    }

    /// From here, `survivor` alone brings everything in flight to its end, if nothing else goes wrong. It looks again
    /// when its decision says so, and no change wakes it before.
    fn settles(&mut self, state: &State, survivor: Leader, course: Course) -> Result<(), Violation> {
        let mut state = State {
            left: Bounds::default(),
            leaders: vec![survivor],
            late: Vec::new(),
            world: state.world.clone(),
            ..*state
        };
        let (mut way, mut steps) = (Vec::new(), Vec::new());
        while way.len() < MOST_STEPS {
            self.canonicalise(&mut state);
            let settles = self.settling.contains(&(state.clone(), course));
            if settles || nothing_in_flight(&self.decisions, state.ledger) {
                // And so does everything on the way.
                self.settling.extend(way.into_iter().map(|state| (state, course)));
                return Ok(());
            }
            way.push(state.clone());
            let (step, result) = self.proceed(&mut state, course);
            steps.push(step);
            if let Err(violation) = result {
                return Err(Violation { ahead: steps, ..violation });
            }
        }
        let what = format!("what is in flight does not come to its end within {MOST_STEPS} steps");
        let violation = Violation::new(Property::NextStep, what);
        // They repeat themselves.
        steps.truncate(MOST_STEPS / 10);
        Err(Violation { ahead: steps, ..violation })
    }

    /// The next thing that happens if nothing goes wrong.
    fn proceed(&mut self, state: &mut State, course: Course) -> (Step, Result<(), Violation>) {
        let who = Who(0);
        let fate = if course == Course::Helps { Fate::Heals } else { Fate::HealsNot };
        if course != Course::Silence && state.leaders[who.0].seen.is_none() {
            state.hear_pods(who);
            return (Step::HearsPods(who), Ok(()));
        }
        if *state.task(who) != Task::Idle {
            return self.go_on(state, who, fate);
        }
        let fresh = if course == Course::Helps { Fresh::Healthy } else { Fresh::Fails };
        let likely = |change: &Change| match change {
            Change::Successor(_, check) => *check == fresh,
            Change::JobEnds(_, end, recovers) => *end == JobState::Complete && *recovers == fate,
        };
        let changes: Vec<_> = Change::under_way(&state.world).into_iter().flatten().filter(likely).collect();
        if !changes.is_empty() {
            for change in &changes {
                state.make(*change);
            }
            return (Step::Tick(changes), Ok(()));
        }
        let (_, next_check) = self.begin_pass(state, who, Look::default());
        if *state.task(who) != Task::Idle {
            return (Step::Decides(who, Look::default()), Ok(()));
        }
        let what = "with something in flight, the operator waits for a change that need not come";
        let wakes = next_check.ok_or_else(|| Violation::new(Property::NextStep, what));
        (Step::Tick(Vec::new()), wakes.map(|at| state.now = at))
    }

    /// An operator goes on with its pass.
    fn go_on(&mut self, state: &mut State, who: Who, fate: Fate) -> (Step, Result<(), Violation>) {
        let asked = !matches!(state.task(who), Task::Intending { .. });
        let (step, result) = match (self.sent(state, who), state.task(who)) {
            (Some(request), _) => {
                let told = if matches!(request, Request::Act(_)) { fate } else { Fate::HealsNot };
                (Step::Lands(who, request, told), self.land(state, who, fate))
            }
            (None, Task::Asking { answer: Some(answer), .. }) => {
                let step = Step::Hears(who, *answer);
                self.hear(state, who);
                (step, Ok(()))
            }
            (None, task) => unreachable!("nothing is to be done in {task:?}"),
        };
        if asked && *state.task(who) == Task::Idle {
            state.now += PAUSE;
        }
        (step, result)
    }
}

fn nothing_in_flight(decisions: &Decisions, ledger: u32) -> bool {
    decisions.knows(ledger).in_flight == Intents::default()
}
