//! Who is told of changes: one task for each scope that somebody listens to, and the open streams, which are bounded.

use super::{scopes::Scope, stream::Event, tickets::Client};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{sync::watch, task::JoinHandle};

/// What a scope's flags are, for its streams.
pub type State = watch::Sender<Option<Arc<Event>>>;

/// The open streams.
pub struct Hub {
    /// Most streams in all.
    most: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    total: usize,
    by_client: HashMap<Client, usize>,
    scopes: HashMap<Scope, Told>,
}

struct Told {
    streams: usize,
    state: watch::Receiver<Option<Arc<Event>>>,
    teller: JoinHandle<()>,
}

/// There are too many streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// In all.
    #[error("there are too many streams of changes: this replica has {0}; ask for all flags now and then instead")]
    Total(usize),
    /// Of this client.
    #[error("this client has {0} streams of changes, which is as many as one may have")]
    Client(usize),
}

/// A place for one stream. It is given back when this is dropped.
pub struct Subscription {
    hub: Arc<Hub>,
    scope: Scope,
    client: Client,
    /// What the flags are.
    pub state: watch::Receiver<Option<Arc<Event>>>,
}

impl Hub {
    /// With at most so many streams.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, inner: Mutex::default() })
    }

    /// Whether there are streams at all.
    pub const fn is_open(&self) -> bool {
        self.most > 0
    }

    /// Most streams of one client. All browsers that have one static token are one, so this leaves little to others.
    const fn share(&self) -> usize {
        self.most - self.most / 5
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one stream of `scope`. `tell` starts the task that says what its flags are, if there is none.
    pub fn subscribe(
        self: &Arc<Self>,
        scope: &Scope,
        client: Client,
        tell: impl FnOnce(State) -> JoinHandle<()>,
    ) -> Result<Subscription, Full> {
        let mut inner = self.lock();
        let own = inner.by_client.get(&client).copied().unwrap_or(0);
        if inner.total >= self.most {
            return Err(Full::Total(self.most));
        }
        if own >= self.share() {
            return Err(Full::Client(own));
        }
        let start = || {
            let (sender, state) = watch::channel(None);
            Told { streams: 0, state, teller: tell(sender) }
        };
        let told = match inner.scopes.get_mut(scope) {
            Some(told) if !told.teller.is_finished() => told,
            // One that failed is started anew; its streams have ended.
            Some(told) => {
                let streams = told.streams;
                *told = Told { streams, ..start() };
                told
            }
            None => inner.scopes.entry(scope.clone()).or_insert_with(start),
        };
        told.streams += 1;
        let state = told.state.clone();
        inner.total += 1;
        inner.by_client.insert(client, own + 1);
        drop(inner);
        Ok(Subscription { hub: Arc::clone(self), scope: scope.clone(), client, state })
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut inner = self.hub.lock();
        inner.total -= 1;
        if let Some(own) = inner.by_client.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                inner.by_client.remove(&self.client);
            }
        }
        let Some(told) = inner.scopes.get_mut(&self.scope) else { return };
        told.streams -= 1;
        if told.streams == 0 {
            told.teller.abort();
            inner.scopes.remove(&self.scope);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Client = [1; 16];
    const TWO: Client = [2; 16];

    fn scope(name: &str) -> Scope {
        Scope::Namespace(name.to_owned())
    }

    /// A task that goes on until it is ended, and what shows whether it is there.
    fn teller(alive: &Arc<()>) -> impl FnOnce(State) -> JoinHandle<()> + use<> {
        let alive = Arc::clone(alive);
        move |state| {
            tokio::spawn(async move {
                let _kept = (alive, state);
                std::future::pending::<()>().await;
            })
        }
    }

    #[tokio::test]
    async fn a_scope_has_one_task_as_long_as_somebody_listens() {
        let (hub, alive) = (Hub::new(10), Arc::new(()));
        let first = hub.subscribe(&scope("a"), ONE, teller(&alive)).unwrap();
        let second = hub.subscribe(&scope("a"), TWO, teller(&alive)).unwrap();
        let other = hub.subscribe(&scope("b"), TWO, teller(&alive)).unwrap();
        assert_eq!(Arc::strong_count(&alive), 3, "one for each scope");
        drop((first, other));
        assert!(!second.state.has_changed().unwrap());
        drop(second);
        while Arc::strong_count(&alive) > 1 {
            tokio::task::yield_now().await;
        }
        let inner = hub.lock();
        assert!(inner.total == 0 && inner.by_client.is_empty() && inner.scopes.is_empty());
    }

    #[tokio::test]
    async fn streams_are_bounded_in_all_and_for_each_client() {
        let (hub, alive) = (Hub::new(10), Arc::new(()));
        let subscribe = |client| hub.subscribe(&scope("a"), client, teller(&alive));
        let mut open: Vec<_> = (0..8).map(|_| subscribe(ONE).unwrap()).collect();
        assert_eq!(subscribe(ONE).err(), Some(Full::Client(8)));
        open.extend((0..2).map(|_| subscribe(TWO).unwrap()));
        assert_eq!(subscribe([3; 16]).err(), Some(Full::Total(10)));
        open.pop();
        assert!(subscribe(TWO).is_ok());
        assert_eq!(Hub::new(0).subscribe(&scope("a"), ONE, teller(&alive)).err(), Some(Full::Total(0)));
    }

    #[tokio::test]
    async fn a_task_that_failed_is_started_anew() {
        let (hub, alive) = (Hub::new(10), Arc::new(()));
        let mut first = hub.subscribe(&scope("a"), ONE, |_| tokio::spawn(async {})).unwrap();
        assert!(first.state.changed().await.is_err(), "its stream ends");
        while !hub.lock().scopes[&scope("a")].teller.is_finished() {
            tokio::task::yield_now().await;
        }
        let second = hub.subscribe(&scope("a"), ONE, teller(&alive)).unwrap();
        drop(first);
        assert_eq!(Arc::strong_count(&alive), 2, "its end is not the end of the new one");
        drop(second);
        assert!(hub.lock().scopes.is_empty());
    }
}
