//! Who may work now: namespaces take turns, and none has more than its share, so that what one tenant asks for holds up no other.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::oneshot, time::timeout};

/// Gives out places.
pub struct Turns {
    limits: Limits,
    state: Mutex<State>,
}

/// How many may do what at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Places.
    pub places: usize,
    /// Places of one namespace.
    pub share: usize,
    /// Those of one namespace that wait; more are turned away at once.
    pub waiting: usize,
    /// Longest wait.
    pub patience: Duration,
}

#[derive(Default)]
struct State {
    taken: usize,
    by_namespace: HashMap<Arc<str>, Namespace>,
    /// Namespaces in which somebody waits, in turn.
    turns: VecDeque<Arc<str>>,
}

#[derive(Default)]
struct Namespace {
    taken: usize,
    waiting: VecDeque<oneshot::Sender<Place>>,
}

/// There is no place, and there will be none soon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many calls at once")]
pub struct Crowded;

/// A place. It is given back when this is dropped.
pub struct Place {
    /// None once it has been given back.
    turns: Option<Arc<Turns>>,
    namespace: Arc<str>,
}

impl Turns {
    /// With these limits.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a place.
    pub async fn take(self: &Arc<Self>, namespace: &str) -> Result<Place, Crowded> {
        let granted = self.lock().queue(self, namespace)?;
        match timeout(self.limits.patience, granted).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_)) | Err(_) => Err(Crowded),
        }
    }
}

impl State {
    fn queue(&mut self, turns: &Arc<Turns>, namespace: &str) -> Result<oneshot::Receiver<Place>, Crowded> {
        let key =
            self.by_namespace.get_key_value(namespace).map_or_else(|| namespace.into(), |(key, _)| Arc::clone(key));
        let own = self.by_namespace.entry(Arc::clone(&key)).or_default();
        // Those that have given up.
        own.waiting.retain(|waiter| !waiter.is_closed());
        if own.waiting.len() >= turns.limits.waiting {
            return Err(Crowded);
        }
        let (sender, receiver) = oneshot::channel();
        own.waiting.push_back(sender);
        if !self.turns.contains(&key) {
            self.turns.push_back(key);
        }
        self.grant(turns);
        Ok(receiver)
    }

    /// Gives out the places that are free.
    fn grant(&mut self, turns: &Arc<Turns>) {
        while self.taken < turns.limits.places {
            let may = |key: &Arc<str>| self.by_namespace.get(key).is_none_or(|own| own.taken < turns.limits.share);
            let Some(key) = self.turns.iter().position(may).and_then(|turn| self.turns.remove(turn)) else { return };
            let Some(own) = self.by_namespace.get_mut(&key) else { continue };
            let Some(waiter) = own.waiting.pop_front() else {
                self.forget(&key);
                continue;
            };
            if !own.waiting.is_empty() {
                self.turns.push_back(Arc::clone(&key));
            }
            match waiter.send(Place { turns: Some(Arc::clone(turns)), namespace: Arc::clone(&key) }) {
                Ok(()) => {
                    own.taken += 1;
                    self.taken += 1;
                }
                // It has given up: its place was never taken, and must not be given back.
                Err(mut place) => {
                    place.turns = None;
                    self.forget(&key);
                }
            }
        }
    }

    /// Remembers nothing of a namespace that wants nothing.
    fn forget(&mut self, key: &Arc<str>) {
        if self.by_namespace.get(key).is_some_and(|own| own.taken == 0 && own.waiting.is_empty()) {
            self.by_namespace.remove(key);
        }
    }

    fn give_back(&mut self, turns: &Arc<Turns>, key: &Arc<str>) {
        self.taken -= 1;
        if let Some(own) = self.by_namespace.get_mut(key) {
            own.taken -= 1;
        }
        self.forget(key);
        self.grant(turns);
    }
}

impl Place {
    /// Lets those of other namespaces go first, if some wait, and waits for the next turn. It blocks the thread.
    pub fn give_way(&mut self) -> Result<(), Crowded> {
        let Some(turns) = &self.turns else { return Err(Crowded) };
        let mut state = turns.lock();
        let is_other = |key: &Arc<str>| *key != self.namespace;
        if !state.turns.iter().any(is_other) {
            return Ok(());
        }
        // First in its own queue, before its place is given to anybody.
        let turns = Arc::clone(turns);
        let own = state.by_namespace.entry(Arc::clone(&self.namespace)).or_default();
        let (sender, receiver) = oneshot::channel();
        own.waiting.push_front(sender);
        let key = Arc::clone(&self.namespace);
        state.turns.retain(|turn| *turn != key);
        state.turns.push_back(Arc::clone(&key));
        state.give_back(&turns, &key);
        drop(state);
        self.turns = None;
        *self = receiver.blocking_recv().map_err(|_| Crowded)?;
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(turns) = self.turns.take() {
            turns.lock().give_back(&turns, &self.namespace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    const LIMITS: Limits = Limits { places: 2, share: 1, waiting: 3, patience: Duration::from_secs(3) };

    fn is_empty(turns: &Turns) -> bool {
        let state = turns.lock();
        state.taken == 0 && state.by_namespace.is_empty() && state.turns.is_empty()
    }

    #[tokio::test]
    async fn nobody_has_more_than_its_share() {
        let turns = Turns::new(LIMITS);
        let a = turns.take("a").await.unwrap();
        let mut second = std::pin::pin!(turns.take("a"));
        assert!(second.as_mut().now_or_never().is_none());
        let b = turns.take("b").await.unwrap();
        assert!(turns.take("c").now_or_never().is_none(), "there are two places in all");
        drop(a);
        let second = second.await.unwrap();
        drop((b, second));
        assert!(is_empty(&turns));
    }

    #[tokio::test]
    async fn namespaces_take_turns() {
        let turns = Turns::new(Limits { places: 1, ..LIMITS });
        let first = turns.take("a").await.unwrap();
        let mut waiting: Vec<_> =
            ["a", "a", "a", "b", "c"].map(|namespace| Box::pin(turns.take(namespace))).into_iter().collect();
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        drop(first);
        let mut order = Vec::new();
        while !waiting.is_empty() {
            let at = waiting.iter_mut().position(|one| {
                one.now_or_never().is_some_and(|place| {
                    order.push(place.unwrap().namespace.to_string());
                    true
                })
            });
            drop(waiting.remove(at.unwrap()));
        }
        assert_eq!(order, ["a", "b", "c", "a", "a"]);
        assert!(is_empty(&turns));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_too_long_or_where_too_many_wait_is_turned_away() {
        let turns = Turns::new(LIMITS);
        let place = turns.take("a").await.unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(turns.take("a"))).collect();
        for one in &mut waiting {
            assert!(one.now_or_never().is_none());
        }
        assert_eq!(turns.take("a").await.err(), Some(Crowded), "at once");
        for one in waiting {
            assert_eq!(one.await.err(), Some(Crowded));
        }
        let mut later = std::pin::pin!(turns.take("a"));
        assert!(later.as_mut().now_or_never().is_none(), "those that gave up are in nobody's way");
        drop(place);
        drop(later.await.unwrap());
        assert!(is_empty(&turns));
    }

    /// Between being given a place and taking it.
    #[tokio::test]
    async fn a_caller_that_is_gone_leaves_its_place() {
        let turns = Turns::new(LIMITS);
        let place = turns.take("a").await.unwrap();
        let mut second = Box::pin(turns.take("a"));
        assert!(second.as_mut().now_or_never().is_none());
        drop(place);
        drop(second);
        assert!(is_empty(&turns));
    }

    #[tokio::test]
    async fn a_long_call_gives_way_to_other_namespaces_and_goes_on_before_its_own() {
        let turns = Turns::new(Limits { places: 1, ..LIMITS });
        let mut long = turns.take("a").now_or_never().unwrap().unwrap();
        long.give_way().unwrap();
        let (mut own, mut other) = (Box::pin(turns.take("a")), Box::pin(turns.take("b")));
        assert!(own.as_mut().now_or_never().is_none() && other.as_mut().now_or_never().is_none());
        std::thread::scope(|threads| {
            let long = threads.spawn(move || {
                long.give_way().unwrap();
                long
            });
            let other = loop {
                if let Some(place) = other.as_mut().now_or_never() {
                    break place.unwrap();
                }
                std::thread::yield_now();
            };
            assert!(!long.is_finished() && own.as_mut().now_or_never().is_none());
            drop(other);
            let is_overtaken = own.as_mut().now_or_never().is_some();
            let long = long.join().unwrap();
            assert!(!is_overtaken && own.as_mut().now_or_never().is_none(), "what has begun comes first");
            drop(long);
        });
        drop(own.now_or_never().unwrap().unwrap());
        assert!(is_empty(&turns));
    }
}
