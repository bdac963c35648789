//! Who may call a pod now. Calls are many, pods may be slow or hostile, and no workload may be in another's way.
//!
//! - At most [`TOTAL`] calls are under way, [`SHARE`] of one workload; those that wait take turns by workload.
//! - Actions come before pushes, and those before probes. Actions are few and urgent: the share does not hold them.
//! - Pods that did not answer last time share [`SUSPECTS`] places among them, however many they are.

use contract::WorkloadId;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::oneshot;

/// Calls that are under way at once.
const TOTAL: usize = 256;
/// Calls to the pods of one workload that are under way at once.
const SHARE: usize = 32;
/// Calls to pods that did not answer last time that are under way at once.
const SUSPECTS: usize = 64;

/// What a call is for, the most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A recovery action.
    Action,
    /// A new configuration.
    Push,
    /// A question for its health.
    Probe,
}

/// Gives out places for calls.
#[derive(Clone, Default)]
pub struct FairQueue(Arc<Mutex<State>>);

/// A place. It is given back when this is dropped.
pub struct Slot {
    queue: Option<FairQueue>,
    workload: WorkloadId,
    suspect: bool,
}

#[derive(Default)]
struct State {
    total: usize,
    suspects: usize,
    by_workload: HashMap<WorkloadId, usize>,
    /// By class; pods that answer, and then suspects.
    waiting: [[Waiting; 2]; 3],
    /// Number of the last call that had to wait.
    waited: u64,
}

/// Calls that wait, in turns by workload.
#[derive(Default)]
struct Waiting {
    /// By workload, in the order of their numbers.
    calls: HashMap<WorkloadId, BTreeMap<u64, oneshot::Sender<Slot>>>,
    turns: VecDeque<WorkloadId>,
}

/// A call that waits. When it is dropped, nothing of the call is left behind: a caller that gives up again and again must not make the
/// queue grow.
struct Waiter<'a> {
    queue: &'a FairQueue,
    workload: &'a WorkloadId,
    class: Class,
    suspect: bool,
    number: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        let waiting = &mut state.waiting[self.class as usize][usize::from(self.suspect)];
        let Some(calls) = waiting.calls.get_mut(self.workload) else { return };
        if calls.remove(&self.number).is_some() && calls.is_empty() {
            waiting.calls.remove(self.workload);
            waiting.turns.retain(|workload| workload != self.workload);
        }
    }
}

impl State {
    fn admits(&self, workload: &WorkloadId, class: Class, suspect: bool) -> bool {
        let share = class == Class::Action || self.by_workload.get(workload).copied().unwrap_or(0) < SHARE;
        self.total < TOTAL && share && (!suspect || self.suspects < SUSPECTS)
    }

    fn admit(&mut self, queue: &FairQueue, workload: WorkloadId, suspect: bool) -> Slot {
        self.total += 1;
        self.suspects += usize::from(suspect);
        *self.by_workload.entry(workload.clone()).or_insert(0) += 1;
        Slot { queue: Some(queue.clone()), workload, suspect }
    }

    /// The most urgent call that may begin, if one may.
    fn pick(&mut self) -> Option<(oneshot::Sender<Slot>, WorkloadId, bool)> {
        for class in [Class::Action, Class::Push, Class::Probe] {
            for suspect in [false, true] {
                if self.total >= TOTAL || (suspect && self.suspects >= SUSPECTS) {
                    continue;
                }
                let turns = &self.waiting[class as usize][usize::from(suspect)].turns;
                // Only so many workloads can have used up their share, so this looks at few.
                let Some(turn) = turns.iter().position(|workload| self.admits(workload, class, suspect)) else {
                    continue;
                };
                let waiting = &mut self.waiting[class as usize][usize::from(suspect)];
                let Some(workload) = waiting.turns.remove(turn) else { continue };
                let Some(calls) = waiting.calls.get_mut(&workload) else { continue };
                let call = calls.pop_first().map(|(_, call)| call);
                if calls.is_empty() {
                    waiting.calls.remove(&workload);
                } else {
                    waiting.turns.push_back(workload.clone());
                }
                if let Some(call) = call {
                    return Some((call, workload, suspect));
                }
            }
        }
        None
    }
}

impl FairQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place. `suspect`: the pod did not answer last time.
    pub async fn slot(&self, workload: &WorkloadId, class: Class, suspect: bool) -> Slot {
        let (turn, _waiter) = {
            let mut state = self.lock();
            if state.admits(workload, class, suspect) {
                return state.admit(self, workload.clone(), suspect);
            }
            let (sender, turn) = oneshot::channel();
            state.waited += 1;
            let number = state.waited;
            let waiting = &mut state.waiting[class as usize][usize::from(suspect)];
            let calls = waiting.calls.entry(workload.clone()).or_default();
            if calls.is_empty() {
                waiting.turns.push_back(workload.clone());
            }
            calls.insert(number, sender);
            (turn, Waiter { queue: self, workload, class, suspect, number })
        };
        match turn.await {
            Ok(slot) => slot,
            // The sender is only dropped unused with the queue itself, which this holds.
            Err(_) => std::future::pending().await,
        }
    }

    /// Lets those begin that may begin now.
    fn advance(&self) {
        loop {
            let (sender, slot) = {
                let mut state = self.lock();
                let Some((sender, workload, suspect)) = state.pick() else { return };
                let slot = state.admit(self, workload, suspect);
                (sender, slot)
            };
            // Who gave up waiting gets nothing: the place goes on to the next.
            if let Err(mut unwanted) = sender.send(slot) {
                unwanted.release();
            }
        }
    }
}

impl Slot {
    /// Gives the place back; the value is the queue, unless that was done before.
    fn release(&mut self) -> Option<FairQueue> {
        let queue = self.queue.take()?;
        let mut state = queue.lock();
        state.total = state.total.saturating_sub(1);
        state.suspects = state.suspects.saturating_sub(usize::from(self.suspect));
        if let Some(count) = state.by_workload.get_mut(&self.workload) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.by_workload.remove(&self.workload);
            }
        }
        drop(state);
        Some(queue)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(queue) = self.release() {
            queue.advance();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::pin::pin;

    fn id(name: &str) -> WorkloadId {
        WorkloadId::deployment("n", name)
    }

    /// As many places as can be had at once for probes of one workload.
    fn fill(queue: &FairQueue, name: &str, suspect: bool) -> Vec<Slot> {
        std::iter::from_fn(|| queue.slot(&id(name), Class::Probe, suspect).now_or_never()).collect()
    }

    #[tokio::test]
    async fn one_workload_gets_its_share_and_no_more() {
        let queue = FairQueue::default();
        let greedy = fill(&queue, "greedy", false);
        assert_eq!(greedy.len(), SHARE);
        assert!(queue.slot(&id("other"), Class::Probe, false).now_or_never().is_some());
        assert!(queue.slot(&id("greedy"), Class::Action, false).now_or_never().is_some(), "an action does not wait");
    }

    #[tokio::test]
    async fn pods_that_do_not_answer_share_few_places() {
        let queue = FairQueue::default();
        let held: Vec<_> = (0..9).flat_map(|number| fill(&queue, &format!("hung-{number}"), true)).collect();
        assert_eq!(held.len(), SUSPECTS);
        assert_eq!(fill(&queue, "good", false).len(), SHARE);
    }

    #[tokio::test]
    async fn the_urgent_come_first_and_workloads_take_turns() {
        let queue = FairQueue::default();
        let mut held: Vec<_> = (0..8).flat_map(|number| fill(&queue, &format!("w-{number}"), false)).collect();
        assert_eq!(held.len(), TOTAL);
        let [a, b, c] = ["a", "b", "c"].map(id);
        let mut probes_a = [pin!(queue.slot(&a, Class::Probe, false)), pin!(queue.slot(&a, Class::Probe, false))];
        let mut probe_b = pin!(queue.slot(&b, Class::Probe, false));
        let mut push = pin!(queue.slot(&c, Class::Push, false));
        for probe in &mut probes_a {
            assert!(probe.as_mut().now_or_never().is_none());
        }
        assert!(probe_b.as_mut().now_or_never().is_none() && push.as_mut().now_or_never().is_none());
        held.pop();
        let _push = push.as_mut().now_or_never().expect("a push comes before probes");
        held.pop();
        let _first = probes_a[0].as_mut().now_or_never().expect("who came first");
        held.pop();
        assert!(probes_a[1].as_mut().now_or_never().is_none(), "another workload's turn");
        let _b = probe_b.as_mut().now_or_never().expect("its turn");
    }

    #[tokio::test]
    async fn those_that_gave_up_waiting_leave_nothing_behind() {
        let queue = FairQueue::default();
        let held = fill(&queue, "a", false);
        let (a, b) = (id("a"), id("b"));
        for _ in 0..10_000 {
            assert!(queue.slot(&a, Class::Probe, false).now_or_never().is_none());
        }
        let others: Vec<_> = (0..7).flat_map(|number| fill(&queue, &format!("w-{number}"), false)).collect();
        for number in 0..100 {
            let waits = pin!(queue.slot(&b, Class::Probe, number % 2 == 0));
            assert!(waits.now_or_never().is_none());
        }
        {
            let state = queue.lock();
            let waiting = state.waiting.iter().flatten();
            assert_eq!(waiting.map(|one| one.calls.len() + one.turns.len()).sum::<usize>(), 0);
        }
        drop((held, others));
        assert_eq!(queue.lock().total, 0);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_takes_no_place() {
        let queue = FairQueue::default();
        let mut held = fill(&queue, "a", false);
        {
            let a = id("a");
            let mut given_up = pin!(queue.slot(&a, Class::Probe, false));
            assert!(given_up.as_mut().now_or_never().is_none());
        }
        let a = id("a");
        let mut waits = pin!(queue.slot(&a, Class::Probe, false));
        assert!(waits.as_mut().now_or_never().is_none());
        held.pop();
        assert!(waits.as_mut().now_or_never().is_some());
        drop(held);
        assert_eq!(fill(&queue, "b", false).len(), SHARE);
        let state = queue.lock();
        assert_eq!((state.total, state.by_workload.len()), (0, 0), "everything came back");
    }
}
