//! A bulkhead whose calls are not all alike: against a plain model of it, and case by case.

use super::shares::limits;
use super::{Acquired, Bulkhead, Queued, Slot};
use crate::failure::Rejection;
use crate::priority::Priority::{self, Finish, Look, Start};
use contract::BulkheadSettings;
use futures::FutureExt;
use proptest::prelude::{Strategy, any, prop};
use std::time::Duration;

fn settings(max_concurrent: u32, max_queued: u32, max_wait_ms: u64) -> BulkheadSettings {
    BulkheadSettings { max_concurrent, max_queued, max_wait_ms }
}

fn taken(bulkhead: &'static Bulkhead, priority: Priority) -> Option<Slot> {
    bulkhead.try_acquire(priority)
}

fn queued(bulkhead: &'static Bulkhead, priority: Priority) -> Queued {
    match bulkhead.acquire(priority, None).unwrap() {
        Acquired::Queued(queued) => queued,
        Acquired::Slot(_) => panic!("it did not have to wait"),
    }
}

/// What happens to a bulkhead.
#[derive(Clone, Copy, Debug)]
enum Step {
    Arrive(Priority),
    /// One of those inside ends.
    End(usize),
    /// One of those that wait gives up.
    Leave(usize),
    Resize(u32, u32),
    HoldBack(Option<u32>),
}

fn priority() -> impl Strategy<Value = Priority> {
    prop::sample::select(vec![Look, Look, Start, Start, Finish])
}

fn step() -> impl Strategy<Value = Step> {
    proptest::prop_oneof![
        6 => priority().prop_map(Step::Arrive),
        3 => any::<usize>().prop_map(Step::End),
        1 => any::<usize>().prop_map(Step::Leave),
        1 => (1_u32..9, 0_u32..6).prop_map(|(size, queue)| Step::Resize(size, queue)),
        1 => prop::option::of(1_u32..9).prop_map(Step::HoldBack),
    ]
}

/// The same in plain words: who is inside, and who waits, in the order of arrival.
#[derive(Debug)]
struct Model {
    size: u32,
    queue: usize,
    kept: bool,
    held_back: Option<u32>,
    inside: Vec<(usize, Priority)>,
    waiting: Vec<(usize, Priority)>,
    refused: [u64; 3],
}

impl Model {
    fn has_room(&self, priority: Priority) -> bool {
        let limits = limits(self.size, self.kept, self.held_back);
        Priority::ALL.into_iter().filter(|level| *level >= priority).all(|level| {
            let count = self.inside.iter().filter(|(_, inside)| *inside <= level).count();
            count < limits[level as usize] as usize
        })
    }

    fn arrive(&mut self, call: usize, priority: Priority) {
        let has_turn = self.waiting.iter().all(|(_, waits)| *waits < priority);
        if has_turn && self.has_room(priority) {
            self.inside.push((call, priority));
            return;
        }
        if self.waiting.len() >= self.queue {
            // Of the lowest the youngest.
            let lowest = self.waiting.iter().map(|(_, waits)| *waits).min().filter(|lowest| *lowest < priority);
            let Some(lowest) = lowest else {
                self.refused[priority as usize] += 1;
                return;
            };
            let youngest = self.waiting.iter().rposition(|(_, waits)| *waits == lowest).unwrap();
            self.waiting.remove(youngest);
            self.refused[lowest as usize] += 1;
        }
        self.waiting.push((call, priority));
    }

    /// Lets in who may go in, the most important first.
    fn let_in(&mut self) {
        while let Some(highest) = self.waiting.iter().map(|(_, waits)| *waits).max() {
            if !self.has_room(highest) {
                return;
            }
            let first = self.waiting.iter().position(|(_, waits)| *waits == highest).unwrap();
            self.inside.push(self.waiting.remove(first));
        }
    }
}

/// A call of the real bulkhead.
enum Call {
    Inside(#[expect(dead_code, reason = "it is held")] Slot),
    Waits(Queued),
    /// It has ended, left, or was refused.
    Over,
}

/// The real one beside the model.
struct Both {
    real: &'static Bulkhead,
    calls: Vec<Call>,
    model: Model,
}

impl Both {
    fn step(&mut self, step: Step) {
        match step {
            Step::Arrive(priority) => {
                self.model.arrive(self.calls.len(), priority);
                self.calls.push(match self.real.acquire(priority, None) {
                    Ok(Acquired::Slot(slot)) => Call::Inside(slot),
                    Ok(Acquired::Queued(queued)) => Call::Waits(queued),
                    Err(_) => Call::Over,
                });
            }
            Step::End(which) if !self.model.inside.is_empty() => {
                let (call, _) = self.model.inside.remove(which % self.model.inside.len());
                self.calls[call] = Call::Over;
            }
            Step::Leave(which) if !self.model.waiting.is_empty() => {
                let (call, _) = self.model.waiting.remove(which % self.model.waiting.len());
                self.calls[call] = Call::Over;
            }
            Step::Resize(size, queue) => {
                (self.model.size, self.model.queue) = (size, queue as usize);
                self.real.configure(&settings(size, queue, 60_000));
            }
            Step::HoldBack(most) => {
                self.model.held_back = most;
                self.real.hold_back(most);
            }
            Step::End(_) | Step::Leave(_) => {}
        }
        self.model.let_in();
    }

    /// Who is inside and who waits, in the order of arrival.
    fn real_calls(&mut self) -> (Vec<usize>, Vec<usize>) {
        for call in &mut self.calls {
            if let Call::Waits(queued) = call
                && let Some(result) = queued.now_or_never()
            {
                *call = result.map_or(Call::Over, Call::Inside);
            }
        }
        let of = |wanted: fn(&Call) -> bool| (0..self.calls.len()).filter(|call| wanted(&self.calls[*call])).collect();
        (of(|call| matches!(call, Call::Inside(_))), of(|call| matches!(call, Call::Waits(_))))
    }
}

proptest::proptest! {
    /// Whatever arrives, ends and gives up: the same calls are inside, wait and are refused as in the model, in which no call
    /// waits beside a slot that it may have, and none goes before one that is more important, or as important and older.
    #[test]
    fn it_does_as_the_model_does(
        size in 1_u32..9,
        queue in 0_u32..6,
        kept: bool,
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let real = Bulkhead::new(&settings(size, queue, 60_000));
            if kept {
                real.keep_slots();
            }
            let model = Model {
                size,
                queue: queue as usize,
                kept,
                held_back: None,
                inside: Vec::new(),
                waiting: Vec::new(),
                refused: [0; 3],
            };
            let mut both = Both { real, calls: Vec::new(), model };
            for step in steps {
                both.step(step);
                let (inside, waiting) = both.real_calls();
                let mut expected: Vec<usize> = both.model.inside.iter().map(|(call, _)| *call).collect();
                expected.sort_unstable();
                assert_eq!(inside, expected, "inside after {step:?}, {:?}", both.model);
                let expected: Vec<usize> = both.model.waiting.iter().map(|(call, _)| *call).collect();
                assert_eq!(waiting, expected, "waiting after {step:?}, {:?}", both.model);
                let usage = real.usage();
                assert_eq!((usage.in_use as usize, usage.queued as usize), (inside.len(), waiting.len()));
                assert_eq!(usage.refused, both.model.refused, "{step:?}");
                assert_eq!(usage.full + usage.shed, usage.refused.iter().sum::<u64>());
            }
            both.calls.clear();
            assert!(real.is_empty(), "nothing is left");
        });
    }
}

#[tokio::test(start_paused = true)]
async fn the_more_important_overtake_those_that_wait() {
    let bulkhead = Bulkhead::new(&settings(1, 10, 60_000));
    let held = taken(bulkhead, Look).unwrap();
    let arrivals = [Look, Start, Finish, Look, Start, Finish];
    let mut waiting: Vec<_> = arrivals.iter().map(|priority| Some(queued(bulkhead, *priority))).collect();
    drop(held);
    let mut order = Vec::new();
    while order.len() < arrivals.len() {
        for (index, one) in waiting.iter_mut().enumerate() {
            if let Some(slot) = one.as_mut().and_then(FutureExt::now_or_never) {
                order.push(index);
                *one = None;
                drop(slot.unwrap());
                break;
            }
        }
    }
    assert_eq!(order, [2, 5, 1, 4, 0, 3]);
    assert!(bulkhead.is_empty());
}

/// A crowd that asks how its orders stand, and holds its slots for as long as it likes, keeps no purchase from its end.
#[tokio::test(start_paused = true)]
async fn slots_are_kept_for_the_more_important() {
    let bulkhead = Bulkhead::new(&settings(8, 0, 60_000));
    let all: Vec<_> = std::iter::from_fn(|| taken(bulkhead, Look)).collect();
    assert_eq!(all.len(), 8, "nobody has asked for it");
    drop(all);
    bulkhead.keep_slots();
    let counts = Priority::ALL.map(|priority| {
        let slots: Vec<_> = std::iter::from_fn(|| taken(bulkhead, priority)).collect();
        slots.len()
    });
    assert_eq!(counts, [4, 6, 8]);
    let looks: Vec<_> = std::iter::from_fn(|| taken(bulkhead, Look)).collect();
    let starts: Vec<_> = std::iter::from_fn(|| taken(bulkhead, Start)).collect();
    let finishes: Vec<_> = std::iter::from_fn(|| taken(bulkhead, Finish)).collect();
    assert_eq!((looks.len(), starts.len(), finishes.len()), (4, 2, 2));
}

#[tokio::test(start_paused = true)]
async fn who_is_refused_is_told_whether_it_was_for_others() {
    let bulkhead = Bulkhead::new(&settings(1, 2, 500));
    let _held = taken(bulkhead, Start).unwrap();
    let (first, second) = (queued(bulkhead, Look), queued(bulkhead, Look));
    let full = bulkhead.acquire(Look, None).err();
    assert_eq!(full, Some(Rejection::BulkheadFull { in_use: 1, queued: 2 }), "all are equals");
    tokio::time::advance(Duration::from_millis(200)).await;
    let third = queued(bulkhead, Finish);
    assert_eq!(second.await.err(), Some(Rejection::Shed { waited: Duration::from_millis(200) }), "the youngest");
    let late = bulkhead.acquire(Start, None).unwrap();
    assert_eq!(first.await.err(), Some(Rejection::Shed { waited: Duration::from_millis(200) }));
    let full = bulkhead.acquire(Start, None).err();
    assert_eq!(full, Some(Rejection::Shed { waited: Duration::ZERO }), "one that is more important waits");
    assert_eq!(third.await.err(), Some(Rejection::BulkheadWait { waited: Duration::from_millis(500) }));
    assert_eq!(late.slot().await.err(), Some(Rejection::BulkheadWait { waited: Duration::from_millis(500) }));
    let usage = bulkhead.usage();
    assert_eq!((usage.full, usage.timed_out, usage.shed), (1, 2, 3));
    assert_eq!(usage.refused, [3, 2, 1]);
}

/// One that waited for nothing because others went first is told so, too.
#[tokio::test(start_paused = true)]
async fn a_wait_behind_others_ends_as_theirs() {
    let bulkhead = Bulkhead::new(&settings(1, 9, 500));
    let _held = taken(bulkhead, Start).unwrap();
    let look = queued(bulkhead, Look);
    tokio::time::advance(Duration::from_millis(100)).await;
    let finish = queued(bulkhead, Finish);
    assert_eq!(look.await.err(), Some(Rejection::Shed { waited: Duration::from_millis(500) }));
    drop(finish);
    let look = queued(bulkhead, Look);
    assert_eq!(look.await.err(), Some(Rejection::BulkheadWait { waited: Duration::from_millis(500) }));
}
