//! What must hold of recovery in any night: checks flip, pods start slowly or not at all, the workload is scaled and rolled out,
//! evictions are refused, people ask for actions and delete what is recorded, operators die, and clocks jump.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Names of the checks that every pod has.
const CHECKS: [&str; 2] = ["database", "memory"];
/// The check of the whole workload.
const BOOKS: &str = "books";
const TARGET: &str = "booking";
const YEAR: i64 = 366 * 24 * 3_600;

/// Something that happens.
#[derive(Clone, Debug)]
enum Event {
    /// A check of a pod changes.
    Flip(usize, usize),
    /// A pod becomes ready, or is not any more.
    Ready(usize),
    /// A pod that is missing is made, if one is.
    Spawn,
    /// Somebody asks for another number of pods; pods that are too many go.
    Scale(usize),
    /// A rollout begins or ends.
    Rollout,
    /// Seconds pass.
    Pass(i64),
    /// The operator's clock jumps, and stays so far off.
    Jump(i64),
    /// The operator dies after it has written what it decided, and another one takes over.
    Crash,
    /// A disruption budget refuses evictions, or does not any more.
    Refuse,
    /// The check of the whole workload changes.
    FlipBooks,
    /// The Jobs end, well or not.
    EndJobs(bool),
    /// A person asks for an action on a pod.
    Ask(usize, Action),
    /// A person deletes a record.
    Delete(usize),
}

fn event(jumps: bool) -> impl Strategy<Value = Event> {
    let jump = u32::from(jumps);
    let asked = prop::sample::select(vec![Action::ResetConnections, Action::RestartPod, Action::RolloutRestart]);
    let of_people = prop_oneof![
        (0usize..6).prop_map(Event::Scale),
        Just(Event::Rollout),
        (0usize..6, asked).prop_map(|(pod, action)| Event::Ask(pod, action)),
        (0usize..20).prop_map(Event::Delete),
    ];
    prop_oneof![
        8 => (0usize..6, 0usize..2).prop_map(|(pod, check)| Event::Flip(pod, check)),
        2 => Just(Event::FlipBooks),
        4 => (0usize..6).prop_map(Event::Ready),
        4 => Just(Event::Spawn),
        4 => of_people,
        8 => (1i64..90).prop_map(Event::Pass),
        jump => prop_oneof![Just(YEAR), Just(-YEAR), -60i64..60].prop_map(Event::Jump),
        2 => Just(Event::Crash),
        1 => Just(Event::Refuse),
        2 => any::<bool>().prop_map(Event::EndJobs),
    ]
}

/// A pod, and since when its checks are as they are.
#[derive(Clone, Debug)]
struct SimulatedPod {
    uid: String,
    name: String,
    created_at: i64,
    ready: bool,
    was_ready: bool,
    /// Healthy or not, and since when, by check.
    checks: [(bool, i64); 2],
}

/// The workload, by the clock of its cluster.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Debug)]
struct Simulation {
    settings: Settings,
    pods: Vec<SimulatedPod>,
    wanted: usize,
    rolling_out: bool,
    /// Ids of the restart of all pods and of the rollback that were executed last.
    carries: [Option<String>; 2],
    refuses: bool,
    /// Seconds of the cluster's clock.
    second: i64,
    /// How far the operator's clock is ahead of it.
    ahead: i64,
    watching_since: i64,
    history: History,
    made: usize,
    jumped: bool,
    /// When each action was begun that was not a repetition, by the cluster's clock.
    begun: BTreeMap<String, i64>,
    /// When each action was done, by the cluster's clock.
    done: BTreeMap<String, i64>,
    /// The pods keep their names.
    keeps_names: bool,
    /// Whether the check of the whole workload is healthy, and since when.
    books: (bool, i64),
    jobs: BTreeMap<String, Job>,
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(2_000_000_000 + second).unwrap()
}

fn step(action: Action, timeout_ms: u64) -> Step {
    Step { action, cron_job: None, timeout_ms }
}

impl Simulation {
    fn new(max_in_flight: usize, max_unhealthy: MaxUnhealthy, wanted: usize) -> Self {
        let steps = |first: Action| {
            let all = [first, Action::RestartPod, Action::RolloutRestart, Action::Rollback];
            all.into_iter()
                .zip([15_000, 60_000, 60_000, 60_000])
                .map(|(action, ms)| step(action, ms))
                .collect::<Vec<_>>()
        };
        let cleanup = Step { cron_job: Some("release".into()), ..step(Action::RunCleanupJob, 60_000) };
        let settings = Settings {
            ladders: [
                (CHECKS[0].to_owned(), steps(Action::ResetConnections)),
                (CHECKS[1].to_owned(), steps(Action::TrimMemory)),
                (BOOKS.to_owned(), vec![cleanup, step(Action::RolloutRestart, 60_000)]),
            ]
            .into(),
            limits: Limits {
                max_in_flight,
                cooldown_ms: 60_000,
                budget_actions: 5,
                budget_interval_ms: 600_000,
                max_unhealthy,
            },
            healthy_delay_ms: 10_000,
            startup_grace_ms: 30_000,
            ..Settings::default()
        };
        let mut new = Self {
            settings,
            pods: Vec::new(),
            wanted,
            rolling_out: false,
            carries: [None, None],
            refuses: false,
            second: 1_000,
            ahead: 0,
            watching_since: 0,
            history: History::default(),
            made: 0,
            jumped: false,
            begun: BTreeMap::new(),
            done: BTreeMap::new(),
            keeps_names: false,
            books: (true, 0),
            jobs: BTreeMap::new(),
        };
        for _ in 0..wanted {
            new.spawn(0, true);
        }
        new
    }

    fn spawn(&mut self, created_at: i64, ready: bool) {
        self.made += 1;
        let uid = format!("pod-{}", self.made);
        let mut ordinals = (0..).map(|ordinal| format!("booking-{ordinal}"));
        let is_free = |name: &String| self.pods.iter().all(|pod| pod.name != *name);
        let name = if self.keeps_names { ordinals.find(is_free).unwrap_or_default() } else { uid.clone() };
        let checks = [(true, created_at); 2];
        self.pods.push(SimulatedPod { uid, name, created_at, ready, was_ready: ready, checks });
        if self.keeps_names {
            self.pods.sort_by(|one, other| one.name.cmp(&other.name));
        }
    }

    /// As a StatefulSet and under a storm stop, or not.
    fn with(mut self, keeps_names: bool, storm: Storm) -> Self {
        self.keeps_names = keeps_names;
        self.settings.storm = storm;
        let pods = std::mem::take(&mut self.pods);
        for pod in pods {
            self.spawn(pod.created_at, pod.ready);
        }
        self
    }

    fn happen(&mut self, event: &Event) {
        let count = self.pods.len();
        match *event {
            Event::Flip(pod, check) if count > 0 => {
                let state = &mut self.pods[pod % count].checks[check];
                *state = (!state.0, self.second);
            }
            Event::Ready(pod) if count > 0 => {
                let pod = &mut self.pods[pod % count];
                pod.ready = !pod.ready;
                pod.was_ready |= pod.ready;
            }
            Event::Spawn if count < self.wanted => self.spawn(self.second, false),
            Event::Scale(wanted) => {
                self.wanted = wanted;
                // The youngest go first, as a ReplicaSet does it; of a StatefulSet those that have the last names.
                self.pods.truncate(wanted);
            }
            Event::Rollout => {
                self.rolling_out = !self.rolling_out;
                if !self.rolling_out {
                    self.pods.clear();
                    (0..self.wanted).for_each(|_| self.spawn(self.second, true));
                }
            }
            Event::Pass(seconds) => self.second += seconds,
            Event::Jump(seconds) => {
                self.ahead = seconds;
                self.jumped = true;
            }
            Event::Crash => self.watching_since = self.second + self.ahead,
            Event::Refuse => self.refuses = !self.refuses,
            Event::FlipBooks => self.books = (!self.books.0, self.second),
            Event::EndJobs(well) => {
                for job in self.jobs.values_mut().filter(|job| job.state == JobState::Running) {
                    job.state = if well { JobState::Complete } else { JobState::Failed("exit code 1".into()) };
                }
            }
            Event::Ask(pod, action) if count > 0 => self.ask(pod % count, action),
            Event::Delete(record) => self.delete(record),
            Event::Flip(..) | Event::Ready(..) | Event::Spawn | Event::Ask(..) => {}
        }
    }

    /// A person creates a Recovery.
    fn ask(&mut self, pod: usize, action: Action) {
        self.made += 1;
        let (id, now) = (format!("by-hand-{}", self.made), self.now());
        let pod = &self.pods[pod];
        let pod = (!action.replaces_all()).then(|| Pod { name: pod.name.clone(), uid: pod.uid.clone() });
        self.history.in_flight.push(Record {
            slot: id.clone(),
            id,
            by_hand: true,
            subject: Subject { target: TARGET.into(), pod, check: String::new() },
            step: step(action, 60_000),
            steps: 1,
            failed_at: now,
            started_at: now,
            executed_at: None,
            ..super::tests::record("", 0, Outcome::Pending)
        });
    }

    /// A person deletes a Recovery: one in flight is taken back, one that is over is forgotten.
    fn delete(&mut self, record: usize) {
        let now = self.now();
        let mut all: Vec<_> = self.history.all().chain(&self.history.aside).cloned().collect();
        if all.is_empty() {
            return;
        }
        let index = record % all.len();
        if all[index].finished_at.is_none() {
            let deleted = &mut all[index];
            (deleted.withdrawn, deleted.outcome, deleted.finished_at) = (true, Outcome::Cancelled, Some(now));
        } else {
            let forgotten = all.remove(index).id;
            self.begun.remove(&forgotten);
            self.done.remove(&forgotten);
        }
        self.history = all.into_iter().collect();
    }

    /// The operator's time of a moment of the cluster's.
    fn seen(&self, second: i64) -> Timestamp {
        at(second + self.ahead)
    }

    fn now(&self) -> Timestamp {
        self.seen(self.second)
    }

    fn observed(&self) -> Observed {
        let facts = |pod: &SimulatedPod| PodFacts {
            name: pod.name.clone(),
            target: TARGET.into(),
            created_at: at(pod.created_at),
            ready: pod.ready,
            was_ready: pod.was_ready,
            reported: true,
            instance: Some("process".into()),
            outdated: false,
        };
        let check = |pod: Option<&SimulatedPod>, name: &str, (healthy, since): (bool, i64)| CheckState {
            subject: Subject {
                target: TARGET.into(),
                pod: pod.map(|pod| Pod { name: pod.name.clone(), uid: pod.uid.clone() }),
                check: name.to_owned(),
            },
            healthy,
            since: self.seen(since),
            well_since: healthy.then(|| self.seen(since)),
            seen_at: self.now(),
            message: "no answer".into(),
            dependency: None,
            dependency_answers: None,
            began_before: false,
            asked: false,
        };
        let checks = |pod: &SimulatedPod| {
            CHECKS.iter().zip(pod.checks).map(|(name, state)| check(Some(pod), name, state)).collect::<Vec<_>>()
        };
        let books = check(None, BOOKS, self.books);
        Observed {
            checks: self.pods.iter().flat_map(checks).chain([books]).collect(),
            keeps_names: self.keeps_names.then(|| TARGET.to_owned()).into_iter().collect(),
            jobs: self.jobs.clone(),
            begun_in_namespace: self.begun_in_namespace(),
            pods: self.pods.iter().map(|pod| (pod.uid.clone(), facts(pod))).collect(),
            wanted: [(TARGET.to_owned(), self.wanted)].into(),
            rolling_out: self.rolling_out.then(|| TARGET.to_owned()).into_iter().collect(),
            rollouts: [(TARGET.to_owned(), self.rollout())].into(),
            watching_since: at(self.watching_since),
            ..Observed::default()
        }
    }

    /// As the operator reads it out of the ledger.
    fn begun_in_namespace(&self) -> Vec<Timestamp> {
        let did_something = |record: &&Record| {
            record.executed_at.is_some() || (record.outcome != Outcome::Cancelled && !record.by_hand)
        };
        let all = self.history.all().filter(did_something);
        all.map(|record| record.executed_at.unwrap_or(record.started_at)).collect()
    }

    fn rollout(&self) -> Rollout {
        let [restarted_by, rolled_back_by] = self.carries.clone();
        let ready = self.pods.iter().filter(|pod| pod.ready).count();
        let undo = if self.keeps_names {
            Err("it is a StatefulSet".to_owned())
        } else {
            Ok(Undo { began_at: at(0), from: 2, to: 1, proven: true })
        };
        Rollout {
            restarted_by,
            rolled_back_by,
            complete: !self.rolling_out && ready >= self.wanted,
            stuck: false,
            held: None,
            recreates: false,
            undo,
        }
    }

    /// How many wanted pods do not serve: they are missing, not ready or failing, or their recovery is under way.
    fn unhealthy(&self, history: &History) -> usize {
        let failing = |pod: &&SimulatedPod| {
            let recovering = history
                .in_flight
                .iter()
                .any(|record| record.subject.pod.as_ref().is_some_and(|subject| subject.uid == pod.uid));
            recovering || !pod.ready || pod.checks.iter().any(|(healthy, _)| !healthy)
        };
        let well = self.pods.iter().filter(|pod| !failing(pod)).count();
        self.wanted.saturating_sub(well).max(1)
    }

    /// One reconcile. The operator does all that was decided, but for `crash`.
    fn reconcile(&mut self, crash: bool) -> Result<(), TestCaseError> {
        let now = self.now();
        // As the operator reads it together each time, and forgets.
        let all = self.history.all().chain(&self.history.aside).cloned();
        self.history = all.collect();
        let pods = self.pods.iter().map(|pod| pod.uid.clone()).collect();
        let counted_for_ms = self.settings.limits.budget_interval_ms;
        let forgotten = forgettable(&self.history, &Retention { counted_for_ms, pods, most: 200 }, now);
        self.history.recent.retain(|record| !forgotten.contains(&record.id));
        self.history.set_impossible_aside(now);
        let observed = self.observed();
        let decision = decide(&self.settings, &observed, &self.history, "policy", now);
        let again = decide(&self.settings, &observed, &self.history, "policy", now);
        prop_assert_eq!(&decision, &again, "same input, same answer");
        self.check(&decision, now)?;
        self.history = decision.history.clone();
        if crash {
            self.watching_since = self.second + self.ahead;
            return Ok(());
        }
        for record in &decision.execute {
            let Some(own) = self.history.in_flight.iter_mut().find(|own| own.id == record.id) else { continue };
            if record.step.action == Action::RestartPod {
                if self.refuses {
                    own.outcome = Outcome::Waiting;
                    continue;
                }
                let uid = record.subject.pod.as_ref().map(|pod| pod.uid.clone()).unwrap_or_default();
                self.pods.retain(|pod| pod.uid != uid);
            }
            let replaces = match record.step.action {
                Action::RolloutRestart => Some(0),
                Action::Rollback => Some(1),
                _ => None,
            };
            if let Some(which) = replaces {
                self.carries[which] = Some(record.id.clone());
                self.rolling_out = true;
            }
            if record.step.action == Action::RunCleanupJob {
                let job = Job { created_at: at(self.second), state: JobState::Running };
                self.jobs.entry(record.id.clone()).or_insert(job);
            }
            for known in [&mut self.begun, &mut self.done] {
                known.entry(record.id.clone()).or_insert(self.second);
            }
            own.outcome = Outcome::Verifying;
            own.executed_at = Some(now);
        }
        Ok(())
    }

    fn check(&mut self, decision: &Decision, now: Timestamp) -> Result<(), TestCaseError> {
        let Decision { history, execute, next_check, .. } = decision;
        let limits = self.settings.limits.clone();
        prop_assert!(next_check.is_none_or(|at| at > now), "it would be looked at again at once");
        prop_assert!(history.in_flight.is_empty() || next_check.is_some(), "nothing is left without a next step");
        let is_new = |record: &&Record| !self.begun.contains_key(&record.id) && !record.by_hand;
        let busy: Vec<_> = history.in_flight.iter().filter(|record| record.outcome != Outcome::Waiting).collect();
        let begun = history.in_flight.iter().filter(is_new).count();
        prop_assert!(begun == 0 || busy.len() <= limits.max_in_flight, "more at once than may be: {busy:#?}");
        let undoes = |record: &&Record| record.step.action == Action::Rollback;
        let undone = history.in_flight.iter().filter(undoes).filter(is_new).count();
        prop_assert!(begun == undone || !self.rolling_out, "begun during a rollout");
        for record in execute {
            let of_all = record.step.action.replaces_all();
            let beside = busy.iter().filter(|other| other.id != record.id);
            let beside = beside.filter(|other| of_all || other.step.action.replaces_all()).count();
            prop_assert!(beside == 0, "something beside what replaces all pods: {busy:#?}");
        }

        let everything = || history.all().chain(&history.aside);
        let ids: BTreeSet<_> = everything().map(|record| &record.id).collect();
        prop_assert!(ids.len() == everything().count(), "an id is there twice");
        let slots: BTreeSet<_> = everything().map(|record| &record.slot).collect();
        prop_assert!(slots.len() == everything().count(), "a place is taken twice");

        let pods: Vec<_> = execute.iter().filter_map(|record| record.subject.pod.as_ref()).collect();
        let under_way = busy.iter().filter(|record| record.executed_at.is_some());
        let under_way: Vec<_> = under_way.filter_map(|record| record.subject.pod.as_ref()).collect();
        for (index, pod) in pods.iter().enumerate() {
            prop_assert!(!pods[..index].contains(pod) && !under_way.contains(pod), "two actions on {}", pod.name);
        }
        // A person may know better.
        for record in execute.iter().filter(|record| !record.by_hand) {
            let uid = record.subject.pod.as_ref().map(|pod| &pod.uid);
            let came_up = |uid: &String| self.pods.iter().any(|pod| pod.uid == *uid && pod.was_ready);
            let undoes = record.step.action == Action::Rollback;
            prop_assert!(undoes || uid.is_none_or(came_up), "an action on a pod that is starting up, or gone");
            let takes = record.step.action.disrupts() && !undoes;
            prop_assert!(!self.rolling_out || !takes, "a pod is taken away during a rollout");
        }
        let takes = |action: Action| action.disrupts() && action != Action::Rollback;
        let everything = || history.all().chain(&history.aside);
        let undone = everything().filter(|record| undoes(record) && record.executed_at.is_some()).count();
        prop_assert!(self.jumped || undone <= 1, "one rollout is undone twice");
        let evictions = execute.iter().filter(|record| takes(record.step.action)).count();
        let allowed = limits.max_unhealthy.of(self.wanted);
        prop_assert!(
            evictions == 0 || self.unhealthy(history) <= allowed,
            "{} of {} wanted pods are missing, unhealthy or taken, and {allowed} may be",
            self.unhealthy(history),
            self.wanted
        );

        prop_assert!(self.jumped || begun == 0 || !self.is_storm(), "something is begun in a storm");
        for record in everything().filter(|record| record.step.action == Action::RestartPod && self.keeps_names) {
            let successor = self.pods.iter().find(|pod| record.successor.as_ref() == Some(&pod.uid));
            let same = |pod: &SimulatedPod| record.subject.pod.as_ref().is_some_and(|own| own.name == pod.name);
            prop_assert!(successor.is_none_or(same), "a pod of another name is no successor");
        }

        // What a person asks for uses the budget up once it is done.
        for record in history.in_flight.iter().filter(|record| !record.by_hand) {
            self.begun.entry(record.id.clone()).or_insert(self.second);
        }
        let interval = i64::try_from(limits.budget_interval_ms / 1_000).unwrap();
        let spent = self.begun.values().filter(|second| **second + interval > self.second).count();
        prop_assert!(self.jumped || spent <= limits.budget_actions, "{spent} actions in {interval} s");
        Ok(())
    }
}

impl Simulation {
    /// Whether so much was done of late that nothing may be begun.
    fn is_storm(&self) -> bool {
        let Storm { actions, interval_ms, cooldown_ms } = self.settings.storm;
        let seconds = |millis: u64| i64::try_from(millis / 1_000).unwrap();
        let mut done: Vec<_> = self.done.values().copied().collect();
        done.sort_unstable();
        actions > 0
            && done.windows(actions).any(|these| {
                let last = these[actions - 1];
                last - these[0] < seconds(interval_ms) && self.second < last + seconds(cooldown_ms)
            })
    }
}

fn storm() -> impl Strategy<Value = Storm> {
    (0usize..4).prop_map(|actions| Storm { actions, interval_ms: 200_000, cooldown_ms: 150_000 })
}

fn max_unhealthy() -> impl Strategy<Value = MaxUnhealthy> {
    prop_oneof![(0usize..4).prop_map(MaxUnhealthy::Count), (0usize..=100).prop_map(MaxUnhealthy::Percent)]
}

fn simulate(events: &[Event], mut simulation: Simulation) -> Result<Simulation, TestCaseError> {
    for event in events {
        simulation.happen(event);
        simulation.reconcile(matches!(event, Event::Crash))?;
    }
    Ok(simulation)
}

proptest! {
    #[test]
    fn limits_hold_whatever_happens(
        events in proptest::collection::vec(event(false), 1..150),
        max_in_flight in 1usize..4,
        max_unhealthy in max_unhealthy(),
        wanted in 1usize..6,
        keeps_names in any::<bool>(),
        storm in storm(),
    ) {
        simulate(&events, Simulation::new(max_in_flight, max_unhealthy, wanted).with(keeps_names, storm))?;
    }

    #[test]
    fn clocks_that_jump_break_no_limit_of_what_is_taken_away(
        events in proptest::collection::vec(event(true), 1..150),
        max_in_flight in 1usize..4,
        max_unhealthy in max_unhealthy(),
        wanted in 1usize..6,
        keeps_names in any::<bool>(),
        storm in storm(),
    ) {
        simulate(&events, Simulation::new(max_in_flight, max_unhealthy, wanted).with(keeps_names, storm))?;
    }

    /// One pod and one check, which flap; no eviction helps. Whatever happens in between, the first step is begun again only
    /// after the check was healthy for the healthy delay.
    #[test]
    fn a_ladder_never_starts_over_without_health(passes in proptest::collection::vec((1i64..40, any::<bool>()), 1..80)) {
        let mut simulation = Simulation::new(1, MaxUnhealthy::Percent(100), 1);
        simulation.settings.limits.cooldown_ms = 0;
        simulation.settings.limits.budget_actions = 20;
        simulation.settings.ladders.remove("memory");
        let (mut healthy_since, mut first_steps, mut healed) = (Some(0), 0, 1);
        for (seconds, flips) in passes {
            simulation.second += seconds;
            if simulation.pods.is_empty() {
                simulation.spawn(simulation.second, true);
                simulation.pods[0].checks[0] = (false, simulation.second);
                healthy_since = None;
            }
            if simulation.rolling_out {
                simulation.happen(&Event::Rollout);
                simulation.pods[0].checks[0] = (false, simulation.second);
                healthy_since = None;
            }
            // It is looked at often enough to be seen.
            if healthy_since.is_some_and(|since| simulation.second - since >= 10) {
                healed = first_steps + 1;
                simulation.reconcile(false)?;
            }
            if flips {
                let check = &mut simulation.pods[0].checks[0];
                *check = (!check.0, simulation.second);
                healthy_since = check.0.then_some(simulation.second);
            }
            let known = simulation.begun.len();
            simulation.reconcile(false)?;
            if simulation.begun.len() > known && simulation.history.in_flight[0].index == 0 {
                first_steps += 1;
                prop_assert!(first_steps <= healed, "it starts over without health");
            }
        }
    }

    /// A dry run decides as the real thing would, and does nothing.
    #[test]
    fn a_dry_run_executes_nothing(events in proptest::collection::vec(event(false), 1..80)) {
        let mut simulation = Simulation::new(2, MaxUnhealthy::Percent(50), 3);
        simulation.settings.dry_run = true;
        for event in &events {
            simulation.happen(event);
            let decision =
                decide(&simulation.settings, &simulation.observed(), &simulation.history, "policy", simulation.now());
            prop_assert!(decision.execute.is_empty());
            prop_assert!(decision.next_check.is_none_or(|at| at > simulation.now()));
            simulation.history = decision.history;
        }
    }
}
