//! Long-lived tasks: none of them may end unseen. The end of one ends the process, with its name, and the kubelet starts it
//! anew: a fresh start is the simplest state to be sure of.

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
    /// A supervisor of tasks that may end after `shutdown`.
    pub fn new(shutdown: CancellationToken) -> (Self, Endings) {
        let (endings, receiver) = mpsc::unbounded_channel();
        (Self { tracker: TaskTracker::new(), shutdown, endings }, Endings(receiver))
    }

    /// What asks the tasks to end.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Starts a task that goes on until shutdown.
    pub fn start(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let (shutdown, endings) = (self.shutdown.clone(), self.endings.clone());
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
            let (mut supervisor, mut endings) = Supervisor::new(CancellationToken::new());
            supervisor.start("watch", std::future::pending());
            supervisor.start("prober", async move { assert!(!panics, "provoked") });
            let message = endings.recv().await.to_string();
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[tokio::test]
    async fn a_task_may_end_at_shutdown() {
        let shutdown = CancellationToken::new();
        let (mut supervisor, mut endings) = Supervisor::new(shutdown.clone());
        supervisor.start("prober", {
            let shutdown = shutdown.clone();
            async move { shutdown.cancelled().await }
        });
        shutdown.cancel();
        supervisor.drain().await;
        assert!(endings.recv().now_or_never().is_none());
    }
}
