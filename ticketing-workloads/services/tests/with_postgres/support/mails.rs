//! The mail sink inside the test's process.

use reqwest::Client;
use serde_json::Value;
use std::net::SocketAddr;
use ticketing_services::mail_sink::{MailSink, Settings, Stats};

/// A mail server that keeps what it gets.
pub struct Mails {
    admin: SocketAddr,
    pub smtp: SocketAddr,
    client: Client,
}

impl Mails {
    /// One that behaves well.
    pub fn start() -> Self {
        let sink =
            MailSink::start(&Settings { bind_address: Some([127, 0, 0, 1].into()), port: 0, smtp_port: 0 }).unwrap();
        let [admin, smtp] = sink.addresses().unwrap();
        tokio::spawn(sink.run(std::future::pending()));
        Self { admin, smtp, client: Client::builder().pool_max_idle_per_host(0).build().unwrap() }
    }

    /// Says how it behaves from now on; `{}`: well.
    pub async fn behave(&self, behaviour: Value) {
        let url = format!("http://{}/behaviour", self.admin);
        let answer = self.client.put(url).body(behaviour.to_string()).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{:?}", answer.text().await);
    }

    /// What it got.
    pub async fn all(&self) -> Vec<Value> {
        let answer = self.client.get(format!("http://{}/mails", self.admin)).send().await.unwrap();
        answer.json::<Value>().await.unwrap()["mails"].as_array().unwrap().clone()
    }

    /// How much it got, and over how many conversations.
    pub async fn stats(&self) -> Stats {
        let answer = self.client.get(format!("http://{}/stats", self.admin)).send().await.unwrap();
        answer.json().await.unwrap()
    }
}
