//! The operator, in the test's own process.

use super::world::World;
use clap::Parser;
use operator::{RunError, args::Args};
use std::{
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A running operator. Dropping it stops it without waiting.
pub struct Operator {
    shutdown: CancellationToken,
    task: Option<JoinHandle<Result<(), RunError>>>,
    listen: String,
}

impl Operator {
    /// Starts one for the world's namespace, with `extra` on its command line.
    pub async fn start(world: &World, extra: &[&str]) -> Self {
        static NUMBER: AtomicU16 = AtomicU16::new(1);
        // An address of its own for each, so that no two want the same port.
        let [high, low] = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let free = std::net::TcpListener::bind((format!("127.84.{high}.{low}"), 0)).unwrap();
        let listen = free.local_addr().unwrap().to_string();
        drop(free);
        let usual = ["resilience-operator", "--watch-namespaces", &world.watched, "--namespace", &world.home];
        let address: &[&str] = if extra.contains(&"--listen") { &[] } else { &["--listen", &listen] };
        // Long, so that a busy machine does not cost the lead; a test about losing it says otherwise.
        let lease: &[&str] = if extra.contains(&"--lease-duration") { &[] } else { &["--lease-duration", "15s"] };
        let args = Args::parse_from(usual.iter().chain(address).chain(lease).chain(extra));
        let config = world.operator_config().await;
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(operator::run(args, config, shutdown.clone()));
        Self { shutdown, task: Some(task), listen }
    }

    /// Its metrics as it serves them.
    pub async fn metrics(&self) -> String {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let answer = client.get(format!("http://{}/metrics", self.listen)).send().await.unwrap();
        answer.error_for_status().unwrap().text().await.unwrap()
    }

    /// Starts one whose Lease runs out soon after it has died.
    pub async fn start_with_short_lease(world: &World, identity: &str) -> Self {
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
