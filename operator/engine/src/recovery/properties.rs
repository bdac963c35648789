//! What must hold of recovery in any night: checks flip, pods start slowly or not at all, the workload is scaled and rolled out,
//! evictions are refused, operators die, and clocks jump.

use super::*;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Names of the checks that every pod has.
const CHECKS: [&str; 2] = ["database", "memory"];
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
}

fn event(jumps: bool) -> impl Strategy<Value = Event> {
    let jump = u32::from(jumps);
    prop_oneof![
        8 => (0usize..6, 0usize..2).prop_map(|(pod, check)| Event::Flip(pod, check)),
        4 => (0usize..6).prop_map(Event::Ready),
        4 => Just(Event::Spawn),
        1 => (0usize..6).prop_map(Event::Scale),
        1 => Just(Event::Rollout),
        8 => (1i64..90).prop_map(Event::Pass),
        jump => prop_oneof![Just(YEAR), Just(-YEAR), -60i64..60].prop_map(Event::Jump),
        2 => Just(Event::Crash),
        1 => Just(Event::Refuse),
    ]
}

/// A pod, and since when its checks are as they are.
#[derive(Clone, Debug)]
struct SimulatedPod {
    uid: String,
    created_at: i64,
    ready: bool,
    was_ready: bool,
    /// Healthy or not, and since when, by check.
    checks: [(bool, i64); 2],
}

/// The workload, by the clock of its cluster.
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
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(2_000_000_000 + second).unwrap()
}

fn step(action: Action, timeout_ms: u64) -> Step {
    Step { action, cron_job: None, timeout_ms }
}

impl Simulation {
    fn new(max_in_flight: usize, max_unhealthy: MaxUnhealthy, wanted: usize) -> Self {
        let steps = [Action::ResetConnections, Action::RestartPod, Action::RolloutRestart, Action::Rollback];
        let steps: Vec<_> =
            steps.into_iter().zip([15_000, 60_000, 60_000, 60_000]).map(|(a, ms)| step(a, ms)).collect();
        let settings = Settings {
            ladders: CHECKS.map(|check| (check.to_owned(), steps.clone())).into(),
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
        };
        for _ in 0..wanted {
            new.spawn(0, true);
        }
        new
    }

    fn spawn(&mut self, created_at: i64, ready: bool) {
        self.made += 1;
        let uid = format!("pod-{}", self.made);
        let checks = [(true, created_at); 2];
        self.pods.push(SimulatedPod { uid, created_at, ready, was_ready: ready, checks });
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
                // The youngest go first, as a ReplicaSet does it.
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
            Event::Flip(..) | Event::Ready(..) | Event::Spawn => {}
        }
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
            name: pod.uid.clone(),
            target: TARGET.into(),
            created_at: at(pod.created_at),
            ready: pod.ready,
            was_ready: pod.was_ready,
            reported: true,
            instance: Some("process".into()),
            outdated: false,
        };
        let check = |pod: &SimulatedPod, name: &str, (healthy, since): (bool, i64)| CheckState {
            subject: Subject {
                target: TARGET.into(),
                pod: Some(Pod { name: pod.uid.clone(), uid: pod.uid.clone() }),
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
            CHECKS.iter().zip(pod.checks).map(|(name, state)| check(pod, name, state)).collect::<Vec<_>>()
        };
        Observed {
            checks: self.pods.iter().flat_map(checks).collect(),
            pods: self.pods.iter().map(|pod| (pod.uid.clone(), facts(pod))).collect(),
            wanted: [(TARGET.to_owned(), self.wanted)].into(),
            rolling_out: self.rolling_out.then(|| TARGET.to_owned()).into_iter().collect(),
            rollouts: [(TARGET.to_owned(), self.rollout())].into(),
            watching_since: at(self.watching_since),
            ..Observed::default()
        }
    }

    fn rollout(&self) -> Rollout {
        let [restarted_by, rolled_back_by] = self.carries.clone();
        let ready = self.pods.iter().filter(|pod| pod.ready).count();
        let undo = Undo { began_at: at(0), from: 2, to: 1, proven: true };
        Rollout {
            restarted_by,
            rolled_back_by,
            complete: !self.rolling_out && ready >= self.wanted,
            stuck: false,
            held: None,
            recreates: false,
            undo: Ok(undo),
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
        let busy: Vec<_> = history.in_flight.iter().filter(|record| record.outcome != Outcome::Waiting).collect();
        let begun = history.in_flight.iter().filter(|record| !self.begun.contains_key(&record.id)).count();
        prop_assert!(begun == 0 || busy.len() <= limits.max_in_flight, "more at once than may be: {busy:#?}");
        let undoes = |record: &&Record| record.step.action == Action::Rollback;
        let undone =
            history.in_flight.iter().filter(undoes).filter(|record| !self.begun.contains_key(&record.id)).count();
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
        for record in execute {
            let pod = self.pods.iter().find(|pod| record.subject.pod.as_ref().is_some_and(|one| one.uid == pod.uid));
            let undoes = record.step.action == Action::Rollback;
            prop_assert!(undoes || pod.is_some_and(|pod| pod.was_ready), "an action on a pod that is starting up");
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

        for record in &history.in_flight {
            self.begun.entry(record.id.clone()).or_insert(self.second);
        }
        let interval = i64::try_from(limits.budget_interval_ms / 1_000).unwrap();
        let spent = self.begun.values().filter(|second| **second + interval > self.second).count();
        prop_assert!(self.jumped || spent <= limits.budget_actions, "{spent} actions in {interval} s");
        Ok(())
    }
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
    ) {
        simulate(&events, Simulation::new(max_in_flight, max_unhealthy, wanted))?;
    }

    #[test]
    fn clocks_that_jump_break_no_limit_of_what_is_taken_away(
        events in proptest::collection::vec(event(true), 1..150),
        max_in_flight in 1usize..4,
        max_unhealthy in max_unhealthy(),
        wanted in 1usize..6,
    ) {
        simulate(&events, Simulation::new(max_in_flight, max_unhealthy, wanted))?;
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
