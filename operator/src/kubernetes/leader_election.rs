//! Leader election: at most one replica writes.
//!
//! Every write of the Lease carries the resourceVersion that it is based on, so two replicas cannot both take it. A
//! standby never compares the leader's clock with its own: it measures, on its own monotonic clock, for how long the
//! Lease has not changed. A leader that cannot renew in time stops acting before a standby may start, and its process
//! ends: a fresh start is the simplest state to be sure of.

use super::clients::{ApiError, Clients, call};
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::api::{Api, PostParams};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tracing::{info, warn};

/// Name of the Lease, in the operator's namespace.
pub const LEASE_NAME: &str = "resilience-operator";

/// Shortest time that a try to renew is given, and wait between two that failed.
const LEAST_TRY: Duration = Duration::from_millis(250);

/// Where the Lease is kept: the API server, or a table in tests.
pub trait LeaseStore: Send + Sync {
    /// The Lease, if there is one.
    fn get(&self) -> impl Future<Output = Result<Option<Lease>, ApiError>> + Send;
    /// Makes it; fails if it exists.
    fn create(&self, lease: Lease) -> impl Future<Output = Result<Lease, ApiError>> + Send;
    /// Replaces the version that `lease` names; fails if it changed since.
    fn replace(&self, lease: Lease) -> impl Future<Output = Result<Lease, ApiError>> + Send;
}

/// The Lease in the API server.
pub struct ApiLeaseStore(Api<Lease>);

impl ApiLeaseStore {
    /// The Lease of the operator in `namespace`.
    pub fn new(clients: &Clients, namespace: &str) -> Self {
        Self(Api::namespaced(clients.lease.clone(), namespace))
    }
}

impl LeaseStore for ApiLeaseStore {
    async fn get(&self) -> Result<Option<Lease>, ApiError> {
        // Not get_opt: it has no deadline of its own either way, and 404 is an answer here, not an error.
        match call(self.0.get(LEASE_NAME)).await {
            Ok(lease) => Ok(Some(lease)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn create(&self, lease: Lease) -> Result<Lease, ApiError> {
        call(self.0.create(&PostParams::default(), &lease)).await
    }

    async fn replace(&self, lease: Lease) -> Result<Lease, ApiError> {
        call(self.0.replace(LEASE_NAME, &PostParams::default(), &lease)).await
    }
}

/// Says whether this replica may act right now. It expires by itself, so a leader that is cut off stops in time.
#[derive(Clone, Debug, Default)]
pub struct Fence(Arc<Mutex<Option<Instant>>>);

impl Fence {
    /// Whether this replica leads at this moment.
    pub fn holds(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| Instant::now() < until)
    }

    fn set(&self, until: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }
}

/// How the election ended.
#[derive(Debug, thiserror::Error)]
pub enum LostLead {
    /// The Lease could not be renewed in time.
    #[error("the lease could not be renewed for {0:?}, so another replica may take it: this one stops")]
    NotRenewed(Duration),
    /// Another replica has it.
    #[error("{0} took the lease: this replica stops")]
    Taken(String),
}

/// One replica's part in the election.
pub struct Election<S> {
    store: S,
    identity: String,
    duration: Duration,
    fence: Fence,
}

impl<S: LeaseStore> Election<S> {
    /// Takes part as `identity`.
    pub fn new(store: S, identity: String, duration: Duration, fence: Fence) -> Self {
        Self { store, identity, duration, fence }
    }

    /// A leader acts for this long after a renewal that it *began*; the rest of the duration is the margin in which it
    /// surely has stopped.
    fn acting_time(&self) -> Duration {
        self.duration * 2 / 3
    }

    /// Waits until this replica leads.
    pub async fn acquire(&self) {
        // What was last seen of another holder, and since when it has stood still.
        let mut seen: Option<(String, Instant)> = None;
        loop {
            let began = Instant::now();
            match self.try_acquire(&mut seen).await {
                Ok(true) => {
                    self.fence.set(Some(began + self.acting_time()));
                    info!(identity = %self.identity, "this replica leads");
                    return;
                }
                Ok(false) => {}
                Err(error) if error.is_conflict() => {}
                Err(error) => warn!(%error, "the lease could not be read or taken; trying again"),
            }
            tokio::time::sleep(self.duration / 8).await;
        }
    }

    async fn try_acquire(&self, seen: &mut Option<(String, Instant)>) -> Result<bool, ApiError> {
        let Some(lease) = self.store.get().await? else {
            self.store.create(self.claim(unclaimed())).await?;
            return Ok(true);
        };
        let holder = holder(&lease);
        if holder.is_some_and(|holder| holder != self.identity) {
            let version = lease.metadata.resource_version.clone().unwrap_or_default();
            let now = Instant::now();
            match seen {
                Some((last, since)) if *last == version => {
                    // The holder's own word on its duration counts, if it is longer.
                    let stated = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or(0);
                    let stated = Duration::from_secs(u64::try_from(stated).unwrap_or(0));
                    if now.duration_since(*since) < stated.max(self.duration) {
                        return Ok(false);
                    }
                }
                _ => {
                    *seen = Some((version, now));
                    return Ok(false);
                }
            }
        }
        self.store.replace(self.claim(lease)).await?;
        Ok(true)
    }

    /// Renews until the lead is lost; then nothing may be done any more.
    pub async fn keep(&self) -> LostLead {
        let mut renewed_at = Instant::now();
        let mut failed = false;
        loop {
            if failed {
                // Time is short.
                tokio::time::sleep(LEAST_TRY).await;
            } else {
                tokio::time::sleep(self.duration / 5).await;
            }
            failed = true;
            let began = Instant::now();
            let left = self.acting_time().saturating_sub(began.duration_since(renewed_at));
            // One try that hangs must leave time for another, over a fresh connection.
            match tokio::time::timeout((left / 2).max(LEAST_TRY), self.renew()).await {
                Ok(Ok(None)) => {
                    failed = false;
                    renewed_at = began;
                    self.fence.set(Some(began + self.acting_time()));
                }
                Ok(Ok(Some(other))) => {
                    self.fence.set(None);
                    return LostLead::Taken(other);
                }
                Ok(Err(error)) => warn!(%error, "the lease could not be renewed; trying again"),
                Err(_) => warn!("the lease was not renewed in time; trying again over another connection"),
            }
            if renewed_at.elapsed() >= self.acting_time() {
                self.fence.set(None);
                return LostLead::NotRenewed(renewed_at.elapsed());
            }
        }
    }

    /// Renews once. The value names another holder, if there is one.
    async fn renew(&self) -> Result<Option<String>, ApiError> {
        let Some(lease) = self.store.get().await? else {
            return self.store.create(self.claim(unclaimed())).await.map(|_| None);
        };
        match holder(&lease) {
            Some(other) if other != self.identity => Ok(Some(other.to_owned())),
            _ => self.store.replace(self.claim(lease)).await.map(|_| None),
        }
    }

    /// Gives the lead up, so that a standby need not wait. Failing to is no harm.
    pub async fn release(&self) {
        self.fence.set(None);
        let released = async {
            if let Some(mut lease) = self.store.get().await?
                && holder(&lease) == Some(self.identity.as_str())
            {
                if let Some(spec) = &mut lease.spec {
                    spec.holder_identity = None;
                    spec.lease_duration_seconds = Some(1);
                }
                self.store.replace(lease).await?;
            }
            Ok::<_, ApiError>(())
        };
        if let Err(error) = released.await {
            warn!(%error, "the lease could not be given up; a standby takes it when it runs out");
        }
    }

    /// `lease` with this replica as its holder.
    fn claim(&self, mut lease: Lease) -> Lease {
        let now = MicroTime(jiff::Timestamp::now());
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if spec.holder_identity.as_deref() != Some(self.identity.as_str()) {
            spec.holder_identity = Some(self.identity.clone());
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.renew_time = Some(now);
        spec.lease_duration_seconds = Some(i32::try_from(self.duration.as_secs()).unwrap_or(i32::MAX));
        lease
    }
}

/// A Lease that nobody holds yet.
fn unclaimed() -> Lease {
    Lease { metadata: ObjectMeta { name: Some(LEASE_NAME.into()), ..Default::default() }, spec: None }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref().filter(|holder| !holder.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A Lease in memory with resourceVersion semantics, and a switch that cuts one replica off.
    #[derive(Clone, Default)]
    struct Table {
        lease: Arc<Mutex<Option<Lease>>>,
        cut_off: Arc<AtomicBool>,
    }

    fn refusal(code: u16) -> ApiError {
        ApiError::Kube(kube::Error::Api(Box::new(Status { code, ..Status::failure("no", "Test") })))
    }

    impl Table {
        fn second_replica(&self) -> Self {
            Self { lease: self.lease.clone(), cut_off: Arc::default() }
        }

        async fn reach(&self) {
            if self.cut_off.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
        }

        fn put(&self, mut lease: Lease, expected: Option<&str>) -> Result<Lease, ApiError> {
            let mut slot = self.lease.lock().unwrap();
            let current = slot.as_ref().and_then(|old| old.metadata.resource_version.clone());
            if current.as_deref() != expected {
                return Err(refusal(409));
            }
            let next = current.and_then(|version| version.parse::<u64>().ok()).unwrap_or(0) + 1;
            lease.metadata.resource_version = Some(next.to_string());
            *slot = Some(lease.clone());
            Ok(lease)
        }
    }

    impl LeaseStore for Table {
        async fn get(&self) -> Result<Option<Lease>, ApiError> {
            self.reach().await;
            Ok(self.lease.lock().unwrap().clone())
        }

        async fn create(&self, lease: Lease) -> Result<Lease, ApiError> {
            self.reach().await;
            self.put(lease, None)
        }

        async fn replace(&self, lease: Lease) -> Result<Lease, ApiError> {
            self.reach().await;
            let expected = lease.metadata.resource_version.clone();
            self.put(lease, expected.as_deref())
        }
    }

    const LEASE: Duration = Duration::from_secs(15);

    fn election(table: &Table, identity: &str) -> (Election<Table>, Fence) {
        let fence = Fence::default();
        (Election::new(table.clone(), identity.into(), LEASE, fence.clone()), fence)
    }

    #[tokio::test(start_paused = true)]
    async fn a_cut_off_leader_stops_before_the_standby_starts() {
        let table = Table::default();
        let (first, first_fence) = election(&table, "first");
        let (second, second_fence) = election(&table.second_replica(), "second");
        first.acquire().await;
        assert!(first_fence.holds());
        let kept = tokio::spawn(async move { first.keep().await });
        let waiting = tokio::spawn(async move { second.acquire().await });
        tokio::time::sleep(LEASE * 4).await;
        assert!(first_fence.holds() && !second_fence.holds(), "a leader that renews keeps the lead");

        table.cut_off.store(true, Ordering::SeqCst);
        let cut_at = Instant::now();
        let stopped_at = loop {
            assert!(!(first_fence.holds() && second_fence.holds()), "two leaders at once");
            if !first_fence.holds() {
                break Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        waiting.await.unwrap();
        let took = Instant::now().duration_since(cut_at);
        assert!(Instant::now() > stopped_at, "the standby starts after the leader has stopped");
        assert!(took <= LEASE + Duration::from_secs(2), "a standby takes over within the lease and 2 s: {took:?}");
        assert!(matches!(kept.await.unwrap(), LostLead::NotRenewed(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_released_lease_is_taken_at_once() {
        let table = Table::default();
        let (first, _) = election(&table, "first");
        let (second, fence) = election(&table.second_replica(), "second");
        first.acquire().await;
        first.release().await;
        let began = Instant::now();
        second.acquire().await;
        assert!(fence.holds() && began.elapsed() < Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_try_at_once_one_wins() {
        let table = Table::default();
        let (first, first_fence) = election(&table, "first");
        let (second, second_fence) = election(&table.second_replica(), "second");
        tokio::select! {
            () = async { tokio::join!(first.acquire(), second.acquire()); } => panic!("both lead"),
            () = tokio::time::sleep(LEASE / 2) => {}
        }
        assert!(first_fence.holds() ^ second_fence.holds());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_taken_by_another_ends_the_lead() {
        let table = Table::default();
        let (first, fence) = election(&table, "first");
        first.acquire().await;
        {
            let mut slot = table.lease.lock().unwrap();
            let lease = slot.as_mut().unwrap();
            lease.spec.as_mut().unwrap().holder_identity = Some("other".into());
            lease.metadata.resource_version = Some("77".into());
        }
        assert!(matches!(first.keep().await, LostLead::Taken(other) if other == "other"));
        assert!(!fence.holds());
    }
}
