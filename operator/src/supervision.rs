//! Long-lived tasks: none of them may end unseen. The end of one ends the process, with its name, and the kubelet starts it
//! anew: a fresh start is the simplest state to be sure of.

use crate::crash_point::Fault;
use futures::FutureExt;
use std::panic::AssertUnwindSafe;
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A task ended that should not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {task} {how}: the process ends, to start anew")]
pub struct Ended {
    task: &'static str,
    how: &'static str,
}

impl Ended {
    /// The task of that name ended.
    pub fn of(task: &'static str) -> Self {
        Self { task, how: "ended by itself" }
    }
}

/// Starts tasks and watches over them.
pub struct Supervisor {
    tracker: TaskTracker,
    shutdown: CancellationToken,
    endings: mpsc::UnboundedSender<Ended>,
    fault: Option<Fault>,
}

/// Tells which task ended.
pub struct Endings(mpsc::UnboundedReceiver<Ended>);

impl Endings {
    /// Waits until a task ends that should not.
    pub async fn recv(&mut self) -> Ended {
        match self.0.recv().await {
            Some(ended) => ended,
            // The supervisor is gone, and with it whatever could end.
            None => std::future::pending().await,
        }
    }
}

impl Supervisor {
    /// A supervisor of tasks that may end after `shutdown`. A test may want one of them to end before, or to stall.
    pub fn new(shutdown: CancellationToken, fault: Option<Fault>) -> (Self, Endings) {
        let (endings, receiver) = mpsc::unbounded_channel();
        (Self { tracker: TaskTracker::new(), shutdown, endings, fault }, Endings(receiver))
    }

    /// What asks the tasks to end.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts a task that goes on until shutdown.
    pub fn start(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (shutdown, endings) = (self.shutdown.clone(), self.endings.clone());
        let fault = self.fault.clone();
        let task = async move {
            match fault {
                Some(fault) => fault.limit(name, task).await,
                None => task.await,
            }
        };
        self.tracker.spawn(async move {
            let mut task = Box::pin(AssertUnwindSafe(task).catch_unwind());
            let how = tokio::select! {
                how = &mut task => how,
                () = shutdown.cancelled() => {
                    // It may still finish what is under way.
                    let _ = task.await;
                    return;
                }
            };
            let how = if how.is_err() { "panicked" } else { "ended by itself" };
            if !shutdown.is_cancelled() {
                // The receiver is gone only when the process ends anyway.
                let _ = endings.send(Ended { task: name, how });
            }
        });
    }

    /// Waits until all tasks have ended.
    pub async fn drain(&mut self) {
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_task_is_told_with_its_name() {
        for (panics, expected) in [(false, "the prober ended by itself: "), (true, "the prober panicked: ")] {
            let (mut supervisor, mut endings) = Supervisor::new(CancellationToken::new(), None);
            supervisor.start("watch", std::future::pending());
            supervisor.start("prober", async move { assert!(!panics, "provoked") });
            let message = endings.recv().await.to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[tokio::test]
    async fn a_task_may_end_at_shutdown() {
        let shutdown = CancellationToken::new();
        let (mut supervisor, mut endings) = Supervisor::new(shutdown.clone(), None);
        supervisor.start("prober", {
            let shutdown = shutdown.clone();
            async move { shutdown.cancelled().await }
        });
        shutdown.cancel();
        supervisor.drain().await;
        assert!(endings.recv().now_or_never().is_none());
    }

    #[tokio::test]
    async fn every_task_is_watched_until_the_last() {
        let (mut supervisor, mut endings) = Supervisor::new(CancellationToken::new(), None);
        for name in ["watch", "workload controller", "policy controller"] {
            supervisor.start(name, async {});
        }
        let mut names = Vec::new();
        for _ in 0..3 {
            names.push(endings.recv().await.task);
        }
        names.sort_unstable();
        assert_eq!(names, ["policy controller", "watch", "workload controller"]);
        drop(supervisor);
        assert!(endings.recv().now_or_never().is_none(), "nothing is left that could end");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_under_way_at_shutdown_is_finished_and_its_panic_ends_nothing() {
        for panics in [false, true] {
            let shutdown = CancellationToken::new();
            let (mut supervisor, mut endings) = Supervisor::new(shutdown.clone(), None);
            let (finished, is_finished) = tokio::sync::oneshot::channel();
            supervisor.start("policy controller", {
                let shutdown = shutdown.clone();
                async move {
                    shutdown.cancelled().await;
                    tokio::time::sleep(std::time::Duration::from_secs(5)).await;
                    let _ = finished.send(());
                    assert!(!panics, "provoked");
                }
            });
            shutdown.cancel();
            supervisor.drain().await;
            assert!(is_finished.await.is_ok(), "it was waited for");
            assert!(endings.recv().now_or_never().is_none());
        }
    }
}
