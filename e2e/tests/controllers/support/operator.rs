//! The operator, in the test's own process.

use super::{cluster::OPERATOR, world::World};
use clap::Parser;
use operator::{RunError, args::Args};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A running operator. Dropping it stops it without waiting.
pub struct Operator {
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), RunError>>>,
}

impl Operator {
    /// Starts one for the world's namespace, with `extra` on its command line.
    pub async fn start(world: &World, extra: &[&str]) -> Self {
        let usual = [
            "resilience-operator",
            "--watch-namespaces",
            &world.watched,
            "--namespace",
            &world.home,
            "--listen",
            "127.0.0.1:0",
        ];
        // Long, so that a busy machine does not cost the lead; a test about losing it says otherwise.
        let lease: &[&str] = if extra.contains(&"--lease-duration") { &[] } else { &["--lease-duration", "15s"] };
        let args = Args::parse_from(usual.iter().chain(lease).chain(extra));
        let config = world.cluster.config(OPERATOR).await;
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(operator::run(args, config, shutdown.clone()));
        Self { shutdown, task: Some(task) }
    }

    /// Starts one whose Lease runs out soon after it has died.
    pub async fn start_mortal(world: &World, identity: &str) -> Self {
        Self::start(world, &["--identity", identity, "--lease-duration", "3s"]).await
    }

    /// Asks it to end, and waits until it has.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        self.task.take().unwrap().await.unwrap().unwrap();
    }

    /// Waits until it ends by itself.
    pub async fn ended(mut self) -> Result<(), RunError> {
        tokio::time::timeout(Duration::from_secs(30), self.task.take().unwrap()).await.unwrap().unwrap()
    }

    /// Ends it at once, as a crash does: nothing is released and nothing is finished.
    pub async fn crash(mut self) {
        let task = self.task.take().unwrap();
        task.abort();
        let _ = task.await;
        // What it had started ends too; its lease stays taken.
        self.shutdown.cancel();
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}
