//! Other releases of the operator. Two that look after one workload would undo each other's work for ever, so each marks
//! what it writes, and leaves alone what carries the mark of another that lives.
//!
//! Whether it lives is told by its Lease, as leaders are told: by whether it changes, measured on this process's own clock.

use super::{
    clients::{Clients, call},
    leader_election::LEASE_NAME,
};
use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A Lease is looked at again after this time.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Least time without a renewal after which a release counts as gone.
const GONE_AFTER: Duration = Duration::from_secs(30);

/// What is known of the other releases, by their mark.
#[derive(Default)]
pub struct Releases(Mutex<HashMap<String, Known>>);

#[derive(Clone)]
struct Known {
    version: String,
    changed_at: Instant,
    looked_at: Instant,
    alive: bool,
}

/// How a release in `namespace` marks what it writes.
pub fn mark(namespace: &str) -> String {
    format!("{namespace}/{LEASE_NAME}")
}

impl Releases {
    /// Whether the release that left this mark is still at work. One whose Lease cannot be looked at counts as such: it is
    /// safer to do nothing.
    pub async fn is_alive(&self, clients: &Clients, mark: &str) -> bool {
        let now = Instant::now();
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(mark).cloned();
        if let Some(known) = known.as_ref().filter(|known| now.duration_since(known.looked_at) < LOOK_AGAIN) {
            return known.alive;
        }
        let Some((namespace, name)) = mark.split_once('/') else { return false };
        let leases: Api<Lease> = Api::namespaced(clients.act.clone(), namespace);
        let seen = match call(leases.get(name)).await {
            Ok(lease) => assess(known.as_ref(), &lease, now),
            Err(error) if error.is_not_found() => {
                Known { version: String::new(), changed_at: now, looked_at: now, alive: false }
            }
            Err(_) => return true,
        };
        let alive = seen.alive;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(mark.to_owned(), seen);
        alive
    }
}

fn assess(before: Option<&Known>, lease: &Lease, now: Instant) -> Known {
    let version = lease.metadata.resource_version.clone().unwrap_or_default();
    let spec = lease.spec.as_ref();
    let held = spec.and_then(|spec| spec.holder_identity.as_deref()).is_some_and(|holder| !holder.is_empty());
    let stated = spec.and_then(|spec| spec.lease_duration_seconds).and_then(|seconds| u64::try_from(seconds).ok());
    let changed_at = before.filter(|before| before.version == version).map_or(now, |before| before.changed_at);
    let patience = GONE_AFTER.max(Duration::from_secs(stated.unwrap_or(0)) * 2);
    Known { version, changed_at, looked_at: now, alive: held && now.duration_since(changed_at) < patience }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lease(version: &str, holder: &str, seconds: i32) -> Lease {
        let spec = json!({ "holderIdentity": holder, "leaseDurationSeconds": seconds });
        serde_json::from_value(json!({ "metadata": { "resourceVersion": version }, "spec": spec })).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_release_is_gone_when_its_lease_is_released_or_stands_still() {
        let first = assess(None, &lease("1", "a", 15), Instant::now());
        assert!(first.alive, "at first sight it lives");
        tokio::time::sleep(Duration::from_secs(29)).await;
        assert!(assess(Some(&first), &lease("1", "a", 15), Instant::now()).alive);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!assess(Some(&first), &lease("1", "a", 15), Instant::now()).alive, "30 s without a change");
        assert!(assess(Some(&first), &lease("1", "a", 60), Instant::now()).alive, "it renews more rarely");
        assert!(assess(Some(&first), &lease("2", "a", 15), Instant::now()).alive);
        assert!(!assess(Some(&first), &lease("2", "", 1), Instant::now()).alive, "released");
    }
}
