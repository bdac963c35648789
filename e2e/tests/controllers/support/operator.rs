//! The operator, in the test's own process.

use super::world::World;
use clap::Parser;
use kube::Config;
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
        Self::start_through(world, world.operator_config().await, extra)
    }

    /// Starts one that reaches the API server as `config` says.
    pub fn start_through(world: &World, config: Config, extra: &[&str]) -> Self {
        static NUMBER: AtomicU16 = AtomicU16::new(1);
        // An address of its own for each, so that no two want the same port.
        let [high, low] = NUMBER.fetch_add(1, Ordering::Relaxed).to_be_bytes();
        let free = std::net::TcpListener::bind((format!("127.84.{high}.{low}"), 0)).unwrap();
        let told = extra.iter().position(|flag| *flag == "--listen");
        let listen = told.map_or_else(|| free.local_addr().unwrap().to_string(), |flag| extra[flag + 1].to_owned());
        drop(free);
        let usual = ["resilience-operator", "--watch-namespaces", &world.watched, "--namespace", &world.home];
        let address: &[&str] = if told.is_some() { &[] } else { &["--listen", &listen] };
        // Long, so that a busy machine does not cost the lead; a test about losing it says otherwise.
        let lease: &[&str] = if extra.contains(&"--lease-duration") { &[] } else { &["--lease-duration", "15s"] };
        let args = Args::parse_from(usual.iter().chain(address).chain(lease).chain(extra));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(operator::run(args, config, shutdown.clone()));
        Self { shutdown, task: Some(task), listen }
    }

    /// Its metrics as it serves them.
    pub async fn metrics(&self) -> String {
        let answer = self.get("/metrics").await;
        answer.error_for_status().unwrap().text().await.unwrap()
    }

    /// The value of one line of its metrics, named with its labels in the order in which they are served; 0 if there is none.
    pub async fn metric(&self, line: &str) -> u64 {
        let metrics = self.metrics().await;
        metrics
            .lines()
            .find_map(|each| each.strip_prefix(line)?.strip_prefix(' '))
            .map_or(0, |value| value.parse().unwrap())
    }

    /// Its own word on whether it should be restarted.
    pub async fn assert_alive(&self) {
        assert_eq!(self.why_not_alive().await, None);
        assert!(!self.has_ended(), "it ended");
    }

    /// Why it should be restarted, if it says so.
    pub async fn why_not_alive(&self) -> Option<String> {
        let answer = self.get("/livez").await;
        let succeeds = answer.status().is_success();
        let text = answer.text().await.unwrap();
        (!succeeds || text != "ok").then_some(text)
    }

    /// Whether it calls itself ready, and its words. It may not serve yet.
    pub async fn readiness(&self) -> (bool, String) {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        match client.get(format!("http://{}/readyz", self.listen)).send().await {
            Ok(answer) => (answer.status().is_success(), answer.text().await.unwrap()),
            Err(error) => (false, error.to_string()),
        }
    }

    /// Whether it has ended, for whatever reason.
    pub fn has_ended(&self) -> bool {
        self.task.as_ref().is_none_or(JoinHandle::is_finished)
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        client.get(format!("http://{}{path}", self.listen)).send().await.unwrap()
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
