//! Runs a controller: takes keys off its queue, reconciles them side by side, and survives whatever one of them does.

use super::queue::Queue;
use crate::{
    error::{RECONCILE_DEADLINE, ReconcileError},
    telemetry::{
        logging::trace_id,
        metrics::{KindLabels, Metrics, ReconcileLabels},
    },
};
use futures::FutureExt;
use std::{any::Any, fmt::Display, hash::Hash, panic::AssertUnwindSafe, sync::Arc, time::Duration};
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info_span, warn};

/// Objects of one kind that are reconciled at once.
const CONCURRENCY: usize = 16;
/// Shortest wait of an object that is to be looked at again.
pub const SHORTEST_WAIT: Duration = Duration::from_millis(20);
/// How soon to look again at an object of which the watch does not show the own last write yet. It is looked at when it does.
pub const UNTIL_SHOWN: Duration = Duration::from_secs(1);
/// Wait after a conflict: somebody else changed the object, and the watch is about to show it.
const CONFLICT_PAUSE: Duration = Duration::from_millis(100);

/// When an object is to be reconciled again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// When something changes.
    AwaitChange,
    /// After this time, if nothing changes before.
    After(Duration),
}

/// One controller.
pub trait Reconciler: Send + Sync + 'static {
    /// What it reconciles by.
    type Key: Clone + Display + Eq + Hash + Ord + Send + Sync + 'static;
    /// Label for logs and metrics: `workload`, `policy`, `flag` or `recovery`.
    const KIND: &'static str;

    /// Reconciles one object.
    fn reconcile(&self, key: &Self::Key) -> impl Future<Output = Result<Next, ReconcileError>> + Send;

    /// Says on the object that the operator itself failed over it. Best effort.
    fn report_internal_error(&self, key: &Self::Key, message: &str) -> impl Future<Output = ()> + Send;
}

/// Runs until `shutdown`; then waits for what is under way.
pub async fn run<R: Reconciler>(
    reconciler: Arc<R>,
    queue: Queue<R::Key>,
    metrics: Metrics,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(CONCURRENCY));
    let mut running = JoinSet::new();
    while let Some(Ok(slot)) = shutdown.run_until_cancelled(Arc::clone(&slots).acquire_owned()).await {
        let Some(key) = shutdown.run_until_cancelled(queue.next()).await else { break };
        while running.try_join_next().is_some() {}
        let (reconciler, queue, metrics) = (Arc::clone(&reconciler), queue.clone(), metrics.clone());
        let span = info_span!("reconcile", kind = R::KIND, object = %key, trace_id = trace_id());
        running.spawn(
            async move {
                let again = supervised(&*reconciler, &key, &queue, &metrics).await;
                queue.done(&key, again);
                drop(slot);
            }
            .instrument(span),
        );
    }
    while running.join_next().await.is_some() {}
}

/// One reconcile: a panic and a passed deadline are errors of that object, and nothing else.
async fn supervised<R: Reconciler>(
    reconciler: &R,
    key: &R::Key,
    queue: &Queue<R::Key>,
    metrics: &Metrics,
) -> Option<Duration> {
    let started = Instant::now();
    let work = AssertUnwindSafe(reconciler.reconcile(key)).catch_unwind();
    let result = match tokio::time::timeout(RECONCILE_DEADLINE, work).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(ReconcileError::Panicked(panic_message(panic.as_ref()))),
        Err(_) => Err(ReconcileError::TimedOut),
    };
    let label = result.as_ref().map_or_else(ReconcileError::label, |_| "ok");
    metrics.reconciliations.get_or_create(&ReconcileLabels { kind: R::KIND, result: label }).inc();
    metrics.reconcile_seconds.get_or_create(&KindLabels { kind: R::KIND }).observe(started.elapsed().as_secs_f64());
    let failure = match result {
        Ok(next) => {
            queue.forget_failures(key);
            return match next {
                Next::AwaitChange => None,
                Next::After(time) => Some(time),
            };
        }
        Err(failure) => failure,
    };
    if failure.is_conflict() {
        debug!(error = %failure, "changed meanwhile; reconciling again");
        return Some(CONFLICT_PAUSE);
    }
    let wait = queue.back_off(key);
    if let ReconcileError::Panicked(message) = &failure {
        error!(error = %failure, retry_in = ?wait, "reconciliation failed: this is a bug of the operator; other objects go on");
        let report = AssertUnwindSafe(reconciler.report_internal_error(key, message)).catch_unwind();
        let _ = tokio::time::timeout(RECONCILE_DEADLINE, report).await;
    } else {
        warn!(error = %failure, retry_in = ?wait, "reconciliation failed");
    }
    Some(wait)
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Hangs over one object, and notes when it was asked to look at which.
    struct Hanging(Mutex<Vec<(u32, Instant)>>);

    const HANGS: u32 = 7;

    impl Reconciler for Hanging {
        type Key = u32;
        const KIND: &'static str = "policy";

        async fn reconcile(&self, key: &u32) -> Result<Next, ReconcileError> {
            self.0.lock().unwrap().push((*key, Instant::now()));
            if *key == HANGS {
                std::future::pending::<()>().await;
            }
            Ok(Next::AwaitChange)
        }

        async fn report_internal_error(&self, _: &u32, _: &str) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_reconcile_that_hangs_is_given_up_and_backs_off_while_others_go_on() {
        let (reconciler, queue) = (Arc::new(Hanging(Mutex::default())), Queue::default());
        let (metrics, shutdown, began) = (Metrics::default(), CancellationToken::new(), Instant::now());
        let run = tokio::spawn(run(Arc::clone(&reconciler), queue.clone(), metrics.clone(), shutdown.clone()));
        queue.enqueue(HANGS);
        for _ in 0..30 {
            queue.enqueue(1);
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
        let seen = reconciler.0.lock().unwrap().clone();
        let tries: Vec<_> = seen.iter().filter(|(key, _)| *key == HANGS).map(|(_, at)| *at - began).collect();
        // Each wait after 45 s is twice the one before.
        assert_eq!(tries.iter().map(Duration::as_secs).collect::<Vec<_>>(), [0, 46, 93, 142]);
        assert_eq!(seen.iter().filter(|(key, _)| *key == 1).count(), 30);
        let timeouts = ReconcileLabels { kind: "policy", result: "timeout" };
        assert_eq!(metrics.reconciliations.get_or_create(&timeouts).get(), 3);
        shutdown.cancel();
        run.await.unwrap();
    }
}
