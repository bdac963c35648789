//! A call behind a dependency: it is retried, its circuit opens when it goes on failing, and what is left is an error that
//! says what happened.
//!
//! ```sh
//! cargo run --package resilience --example protect_a_call
//! ```

use contract::{PolicySettings, WorkloadId};
use resilience::{CallError, Failure, FailureKind, Rejection, Resilience};
use serde_json::json;
use std::sync::atomic::{AtomicU32, Ordering};

/// How asking for a price can fail. The library needs to know of each error only what kind it is.
#[derive(Debug, thiserror::Error)]
#[error("the price service refused the connection")]
struct Refused;

impl Failure for Refused {
    fn kind(&self) -> FailureKind {
        FailureKind::NotSent
    }
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    // What holds as long as no ResiliencePolicy says otherwise, in the words of the document that the operator sends.
    let defaults: PolicySettings = serde_json::from_value(json!({
        "dependencies": { "prices": {
            "timeout": { "requestMs": 2_000, "perTryMs": 500 },
            "retry": { "numRetries": 2, "baseIntervalMs": 10 },
            "circuitBreaker": { "trip": { "type": "ConsecutiveFailures", "failures": 4 }, "breakMs": 30_000 },
        } },
    }))?;
    let id: WorkloadId =
        serde_json::from_value(json!({ "namespace": "ticketing", "kind": "Deployment", "name": "shop" }))?;
    let workload = Resilience::builder(id).dependency("prices").defaults(defaults).build();
    let prices = workload.dependency("prices").ok_or("it was declared above")?;

    // The first attempt is refused, the second one works; the caller sees only the price.
    let attempts = AtomicU32::new(0);
    let price = prices
        .call(async || match attempts.fetch_add(1, Ordering::Relaxed) {
            0 => Err(Refused),
            _ => Ok(4_200),
        })
        .await?;
    println!("the price is {price} cents, after {} attempts", attempts.load(Ordering::Relaxed));
    assert_eq!((price, attempts.load(Ordering::Relaxed)), (4_200, 2));

    // Now it is down for good. Every failed attempt counts, and the fourth opens the circuit.
    let down = async || Err::<u32, _>(Refused);
    for call in 1..=3 {
        let error = prices.call(down).await.err().ok_or("it is down")?;
        println!("call {call}: {error}");
    }
    let error = prices.call(down).await.err().ok_or("its circuit is open")?;
    assert!(
        matches!(error, CallError::Rejected { rejection: Rejection::CircuitOpen { .. }, attempts: 0, .. }),
        "{error}"
    );
    println!("the circuit is {:?}; ask again in {:?}", prices.circuit().state, error.retry_after());
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    run().await
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn it_runs() {
        super::run().await.unwrap();
    }
}
