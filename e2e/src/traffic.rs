//! Buyers: a steady stream of bookings, each pod asked in turn, with a count of outcomes.

use crate::testbed::{TICKETING, Testbed, TestbedError, until};
use serde_json::json;
use std::{
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    task::JoinHandle,
};

/// The event that every installation starts with.
pub const EVENT: &str = "11111111-1111-4111-8111-111111111111";

/// A way to one port of one pod, as long as this value lives.
pub struct Forward {
    /// Address on this machine.
    pub address: String,
    _child: Child,
}

impl Forward {
    /// Opens a way to a port of a pod. It works the same on every provider.
    pub async fn open(testbed: &Testbed, pod: &str, port: u16) -> Result<Self, TestbedError> {
        // A kubelet that is busy ends a stream before it has begun.
        let ask = || async { Ok(Self::try_open(testbed, pod, port).await.map_err(|error| error.to_string())) };
        until(Duration::from_secs(45), "a forwarded port", ask).await
    }

    async fn try_open(testbed: &Testbed, pod: &str, port: u16) -> Result<Self, TestbedError> {
        let failed = |what: &str, why: String| TestbedError::Expected {
            expected: what.to_owned(),
            seen: why,
            waited: Duration::ZERO,
        };
        let mut command = Command::new(testbed.kubectl.program());
        if let Some(kubeconfig) = testbed.cluster.kubeconfig() {
            command.arg("--kubeconfig").arg(kubeconfig);
        }
        command.args(["port-forward", "-n", TICKETING, &format!("pod/{pod}"), &format!(":{port}")]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| failed("kubectl port-forward", error.to_string()))?;
        let mut lines = BufReader::new(child.stdout.take().ok_or_else(|| failed("its output", "none".into()))?).lines();
        let first = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await;
        // "Forwarding from 127.0.0.1:40321 -> 8080"
        let line = first.ok().and_then(Result::ok).flatten().unwrap_or_default();
        let address = line.split_whitespace().find(|word| word.starts_with("127.0.0.1:")).map(str::to_owned);
        let address = address.ok_or_else(|| failed("a forwarded port", format!("{line:?}")))?;
        // Keeps the pipe open and empty: kubectl says a line for every connection.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { address, _child: child })
    }
}

/// Books one seat at a pod; the answer is whether that succeeded.
pub async fn book(client: &reqwest::Client, address: &str) -> bool {
    let body = json!({ "eventId": EVENT, "userId": "demo", "ticketCount": 1 });
    let answer = client.post(format!("http://{address}/api/bookings")).json(&body).send().await;
    answer.is_ok_and(|answer| answer.status().is_success())
}

/// Counts of one stream.
#[derive(Debug, Default)]
pub struct Count {
    succeeded: AtomicU64,
    failed: AtomicU64,
}

impl Count {
    /// Bookings that succeeded and that failed so far.
    pub fn now(&self) -> (u64, u64) {
        (self.succeeded.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }
}

/// A stream of bookings that ends when it is dropped.
pub struct Traffic {
    /// Over all pods.
    pub count: Arc<Count>,
    /// For each pod: its name and its own count.
    pub by_pod: Vec<(String, Arc<Count>)>,
    buyers: Vec<JoinHandle<()>>,
    _forwards: Vec<Forward>,
}

impl Traffic {
    /// Starts a buyer for each pod, who books every `pause`.
    pub async fn start(testbed: &Testbed, pause: Duration) -> Result<Self, TestbedError> {
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(Duration::from_secs(15))
            .build()
            .map_err(|error| TestbedError::Kubeconfig(error.to_string()))?;
        let count = Arc::new(Count::default());
        let (mut buyers, mut by_pod, mut forwards) = (Vec::new(), Vec::new(), Vec::new());
        for pod in testbed.booking_pods().await? {
            let name = pod.metadata.name.unwrap_or_default();
            let forward = Forward::open(testbed, &name, 8080).await?;
            let own = Arc::new(Count::default());
            // Several buyers for each pod, so that one that waits does not hide what happens to the others.
            for number in 0..4u32 {
                let (client, address) = (client.clone(), forward.address.clone());
                let (count, own) = (Arc::clone(&count), Arc::clone(&own));
                buyers.push(tokio::spawn(async move {
                    tokio::time::sleep(pause * number / 4).await;
                    loop {
                        let good = book(&client, &address).await;
                        for count in [&count, &own] {
                            let which = if good { &count.succeeded } else { &count.failed };
                            which.fetch_add(1, Ordering::Relaxed);
                        }
                        tokio::time::sleep(pause).await;
                    }
                }));
            }
            by_pod.push((name, own));
            forwards.push(forward);
        }
        Ok(Self { count, by_pod, buyers, _forwards: forwards })
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        for buyer in &self.buyers {
            buyer.abort();
        }
    }
}
