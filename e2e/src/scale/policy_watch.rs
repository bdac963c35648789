//! Watches the policies as any client would: what their status says, and when it was said.

use super::api::{ApiClient, Meta};
use futures::TryStreamExt;
use kube::core::WatchEvent;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// A policy as far as it is read.
#[derive(Clone, Debug, Deserialize)]
struct Policy {
    metadata: Meta,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    observed_generation: i64,
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl Policy {
    /// The generation that it says is programmed; 0: none.
    fn programmed_generation(&self) -> i64 {
        let programmed = |condition: &Condition| condition.kind == "Programmed" && condition.status == "True";
        if self.status.conditions.iter().any(programmed) { self.status.observed_generation } else { 0 }
    }
}

/// What was seen of one policy.
#[derive(Clone, Copy, Debug)]
struct Seen {
    programmed: i64,
    since: Instant,
}

#[derive(Default)]
struct State {
    policies: Mutex<HashMap<String, Seen>>,
    changed: Notify,
}

/// The watch. It ends when the value is dropped.
pub struct PolicyWatch {
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Drop for PolicyWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl PolicyWatch {
    /// Begins to watch.
    pub fn start(api: &ApiClient) -> Self {
        let state = Arc::new(State::default());
        let task = tokio::spawn(watch(api.clone(), Arc::clone(&state)));
        Self { state, task }
    }

    /// Waits until a policy says that `generation`, or a later one, is programmed; gives when that was seen.
    pub async fn programmed(&self, key: &str, generation: i64, patience: Duration) -> Result<Instant, String> {
        let seen = |policies: &HashMap<String, Seen>| match policies.get(key) {
            Some(seen) if seen.programmed >= generation => Ok(seen.since),
            Some(seen) => Err(format!("{key} has generation {} of {generation} programmed", seen.programmed)),
            None => Err(format!("{key} was never seen")),
        };
        self.until(patience, seen).await
    }

    /// Waits until all of `policies` (key and generation) are programmed; gives when the last one was seen to be.
    pub async fn all_programmed(&self, wanted: &[(String, i64)], patience: Duration) -> Result<Instant, String> {
        let seen = |policies: &HashMap<String, Seen>| {
            let done =
                |(key, generation): &(String, i64)| policies.get(key).filter(|seen| seen.programmed >= *generation);
            let times: Vec<Instant> = wanted.iter().filter_map(done).map(|seen| seen.since).collect();
            match times.iter().max() {
                Some(last) if times.len() == wanted.len() => Ok(*last),
                _ => Err(format!("{} of {} policies are programmed", times.len(), wanted.len())),
            }
        };
        self.until(patience, seen).await
    }

    async fn until<T>(
        &self,
        patience: Duration,
        seen: impl Fn(&HashMap<String, Seen>) -> Result<T, String>,
    ) -> Result<T, String> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let changed = self.state.changed.notified();
            let mut changed = std::pin::pin!(changed);
            changed.as_mut().enable();
            let last = match seen(&self.state.policies.lock().unwrap_or_else(PoisonError::into_inner)) {
                Ok(value) => return Ok(value),
                Err(last) => last,
            };
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return Err(format!("after {} s {last}", patience.as_secs()));
            }
            // Thousands of events come at once, and when each came is known: there is no hurry to look at all of them.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn watch(api: ApiClient, state: Arc<State>) {
    loop {
        // Without a version it begins with what there is. It ends now and then, or with an error: then it begins anew.
        let path = "/apis/resilience.ticketwave.io/v1alpha1/resiliencepolicies?watch=true&timeoutSeconds=3600";
        if let Ok(request) = http::Request::get(path).body(Vec::new())
            && let Ok(events) = api.client.request_events::<Policy>(request).await
        {
            let mut events = std::pin::pin!(events);
            while let Ok(Some(event)) = events.try_next().await {
                state.take(&event);
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl State {
    fn take(&self, event: &WatchEvent<Policy>) {
        let mut policies = self.policies.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            WatchEvent::Added(policy) | WatchEvent::Modified(policy) => {
                let programmed = policy.programmed_generation();
                let key = format!("{}/{}", policy.metadata.namespace, policy.metadata.name);
                let now = Instant::now();
                let seen = policies.entry(key).or_insert(Seen { programmed, since: now });
                // When a generation was first programmed; a later write of the same says nothing new.
                if programmed != seen.programmed {
                    *seen = Seen { programmed, since: now };
                }
            }
            WatchEvent::Deleted(policy) => {
                policies.remove(&format!("{}/{}", policy.metadata.namespace, policy.metadata.name));
            }
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => return,
        }
        drop(policies);
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(kind: &str, observed: i64, programmed: &str) -> WatchEvent<Policy> {
        let object = json!({
            "metadata": { "namespace": "n", "name": "p", "generation": 2 },
            "status": {
                "observedGeneration": observed,
                "conditions": [{ "type": "Ready", "status": "True" }, { "type": "Programmed", "status": programmed }],
            },
        });
        serde_json::from_value(json!({ "type": kind, "object": object })).unwrap()
    }

    #[tokio::test]
    async fn a_policy_counts_when_its_status_is_about_the_generation() {
        let watch = PolicyWatch { state: Arc::default(), task: tokio::spawn(std::future::pending()) };
        let patience = Duration::from_millis(20);
        let wanted = [("n/p".to_owned(), 2)];
        let error = watch.programmed("n/p", 2, patience).await.unwrap_err();
        assert!(error.ends_with("n/p was never seen"), "{error}");
        for (observed, programmed) in [(1, "True"), (2, "False")] {
            watch.state.take(&event("MODIFIED", observed, programmed));
            let error = watch.all_programmed(&wanted, patience).await.unwrap_err();
            assert!(error.ends_with("0 of 1 policies are programmed"), "{error}");
        }
        watch.state.take(&event("MODIFIED", 2, "True"));
        let first = watch.all_programmed(&wanted, patience).await.unwrap();
        watch.state.take(&event("MODIFIED", 2, "True"));
        assert_eq!(watch.programmed("n/p", 2, patience).await.unwrap(), first, "written again, but said before");
        watch.state.take(&event("DELETED", 2, "True"));
        assert!(watch.programmed("n/p", 2, patience).await.is_err());
    }

    #[test]
    fn a_policy_without_a_status_is_not_programmed() {
        let policy: Policy = serde_json::from_value(json!({ "metadata": { "name": "p" } })).unwrap();
        assert_eq!(policy.programmed_generation(), 0);
    }
}
