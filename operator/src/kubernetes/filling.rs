//! The first filling of the caches: how far it is, and what keeps it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// How long a kind is waited for that the API server refuses to show.
const PATIENCE: Duration = Duration::from_secs(60);

/// Which watches of a namespace have not been filled yet. A kind that is refused is waited for, because roles and
/// definitions take a moment to be in force, but not for ever: then the person who runs the operator has to hear what is missing.
#[derive(Clone, Default)]
pub struct Filling(Arc<(Mutex<Progress>, Notify)>);

#[derive(Default)]
struct Progress {
    /// The kinds that are missing, by their plural.
    missing: BTreeMap<String, Obstacle>,
}

/// What keeps a kind from being filled.
#[derive(Default)]
struct Obstacle {
    /// What last went wrong; nothing, as long as its list is under way.
    why: Option<String>,
    /// Since when the API server has answered with nothing but refusals.
    refused_since: Option<Instant>,
}

/// A kind was refused for too long.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} cannot be watched: {why}; check the operator's roles, and that its CRDs are installed")]
pub struct NotFilled {
    kind: String,
    why: String,
}

impl Filling {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A kind is to be filled.
    pub fn expect(&self, kind: &str) {
        self.lock().missing.entry(kind.to_owned()).or_default();
    }

    /// A kind is filled; says whether it was the last.
    pub fn filled(&self, kind: &str) -> bool {
        let last = {
            let mut progress = self.lock();
            progress.missing.remove(kind);
            progress.missing.is_empty()
        };
        self.0.1.notify_waiters();
        last
    }

    /// The list of a kind has begun to come: nothing keeps it any more.
    pub fn listing(&self, kind: &str) {
        if let Some(obstacle) = self.lock().missing.get_mut(kind) {
            *obstacle = Obstacle::default();
        }
        self.0.1.notify_waiters();
    }

    /// The watch of a kind failed. `answered`: the API server answered, and this is what it said.
    pub fn failed(&self, kind: &str, why: &str, answered: bool) {
        if let Some(obstacle) = self.lock().missing.get_mut(kind) {
            obstacle.why = Some(why.to_owned());
            obstacle.refused_since = answered.then(|| obstacle.refused_since.unwrap_or_else(Instant::now));
        }
        self.0.1.notify_waiters();
    }

    /// What is missing, each kind with what keeps it.
    pub fn missing(&self) -> Vec<String> {
        let progress = self.lock();
        let missing = progress.missing.iter();
        missing
            .map(|(kind, obstacle)| obstacle.why.as_ref().map_or_else(|| kind.clone(), |why| format!("{kind} ({why})")))
            .collect()
    }

    /// Waits until every kind is filled.
    ///
    /// # Errors
    ///
    /// The API server has refused one for a minute.
    pub async fn done(&self) -> Result<(), NotFilled> {
        loop {
            let changed = self.0.1.notified();
            let longest = {
                let progress = self.lock();
                if progress.missing.is_empty() {
                    return Ok(());
                }
                let refused = progress.missing.iter().filter_map(|(kind, obstacle)| {
                    let why = obstacle.why.clone().unwrap_or_default();
                    Some((obstacle.refused_since?, NotFilled { kind: kind.clone(), why }))
                });
                refused.min_by_key(|(since, _)| *since)
            };
            match longest {
                Some((since, refusal)) if since.elapsed() >= PATIENCE => return Err(refusal),
                Some((since, _)) => drop(tokio::time::timeout_at(since + PATIENCE, changed).await),
                None => changed.await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn expecting(kinds: &[&str]) -> Filling {
        let filling = Filling::default();
        for kind in kinds {
            filling.expect(kind);
        }
        filling
    }

    #[tokio::test(start_paused = true)]
    async fn every_kind_is_waited_for() {
        let filling = expecting(&["pods", "jobs"]);
        assert!(!filling.filled("pods"));
        assert_eq!(filling.missing(), ["jobs"]);
        assert!(filling.done().now_or_never().is_none());
        let waiting = tokio::spawn({
            let filling = filling.clone();
            async move { filling.done().await }
        });
        tokio::time::sleep(PATIENCE * 10).await;
        assert!(filling.filled("jobs"), "the last");
        assert_eq!(waiting.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_kind_that_stays_refused_is_named_after_a_minute() {
        let (filling, begin) = (expecting(&["pods", "jobs"]), Instant::now());
        let waiting = tokio::spawn({
            let filling = filling.clone();
            async move { filling.done().await }
        });
        filling.failed("pods", "pods is forbidden", true);
        assert_eq!(filling.missing(), ["jobs", "pods (pods is forbidden)"]);
        let refusal = waiting.await.unwrap().unwrap_err();
        assert_eq!(begin.elapsed(), PATIENCE);
        assert!(refusal.to_string().starts_with("pods cannot be watched: pods is forbidden; check"), "{refusal}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_that_comes_slowly_is_waited_for() {
        let filling = expecting(&["pods"]);
        let waiting = tokio::spawn({
            let filling = filling.clone();
            async move { filling.done().await }
        });
        filling.failed("pods", "too many requests", true);
        tokio::time::sleep(PATIENCE / 2).await;
        filling.listing("pods");
        tokio::time::sleep(PATIENCE * 10).await;
        assert!(filling.filled("pods"));
        assert_eq!(waiting.await.unwrap(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_cannot_be_reached_in_between_is_given_another_minute() {
        let (filling, begin) = (expecting(&["pods"]), Instant::now());
        let waiting = tokio::spawn({
            let filling = filling.clone();
            async move { filling.done().await }
        });
        for (answered, seconds) in [(true, 30), (false, 600), (true, 30), (true, 60)] {
            filling.failed("pods", "why", answered);
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
        assert!(waiting.await.unwrap().is_err());
        assert!(begin.elapsed() >= Duration::from_secs(690), "{:?}", begin.elapsed());
    }
}
