//! The provider simulator inside the test's process.

use reqwest::Client;
use serde_json::{Value, json};
use std::net::SocketAddr;
use ticketing_services::provider_simulator::{Settings, Simulator};

/// Providers that behave as told.
pub struct Providers {
    admin: SocketAddr,
    pub stripe: SocketAddr,
    pub paypal: SocketAddr,
    client: Client,
}

impl Providers {
    /// Providers that behave well.
    pub fn start() -> Self {
        let bind_address = Some([127, 0, 0, 1].into());
        let settings = Settings { bind_address, port: 0, stripe_port: 0, paypal_port: 0 };
        let simulator = Simulator::start(&settings).unwrap();
        let [admin, stripe, paypal] = simulator.addresses().unwrap();
        tokio::spawn(simulator.run(std::future::pending()));
        Self { admin, stripe, paypal, client: Client::builder().pool_max_idle_per_host(0).build().unwrap() }
    }

    /// Says how a provider behaves from now on; `{}`: well.
    pub async fn behave(&self, provider: &str, behaviour: Value) {
        let url = format!("http://{}/providers/{provider}", self.admin);
        let answer = self.client.put(url).body(behaviour.to_string()).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{:?}", answer.text().await);
        // Whether it refuses is seen from outside, and only a moment later.
        let address = if provider == "stripe" { self.stripe } else { self.paypal };
        let refuses = behaviour["refuse"] == json!(true);
        super::eventually("it refuses, or no longer does", async || {
            (tokio::net::TcpStream::connect(address).await.is_err() == refuses).then_some(())
        })
        .await;
    }

    /// The buyer of `key` does what a provider asks for.
    pub async fn buyer_acts(&self, key: &str) {
        let answer = self.client.put(format!("http://{}/buyers/{key}", self.admin)).send().await.unwrap();
        assert_eq!(answer.status(), 204);
    }

    /// Who has charged for `key`, each as often as they did.
    pub async fn charged(&self, key: &str) -> Vec<String> {
        let charges = self.charges().await;
        let of_key = charges.into_iter().filter(|charge| charge["key"] == key);
        of_key.map(|charge| charge["provider"].as_str().unwrap().to_owned()).collect()
    }

    /// All charges.
    pub async fn charges(&self) -> Vec<Value> {
        let answer = self.client.get(format!("http://{}/charges", self.admin)).send().await.unwrap();
        answer.json::<Value>().await.unwrap()["charges"].as_array().unwrap().clone()
    }

    /// Requests that a provider got so far.
    pub async fn requests(&self, provider: &str) -> u64 {
        let answer = self.client.get(format!("http://{}/providers", self.admin)).send().await.unwrap();
        answer.json::<Value>().await.unwrap()[provider]["requests"].as_u64().unwrap()
    }
}
