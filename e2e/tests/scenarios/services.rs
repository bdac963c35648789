//! All services in the cluster, each with its policy: a sale goes through them, also while the first payment provider is
//! away.

use crate::{REPLICAS, SOON, stage};
use crds::condition::types::{PROGRAMMED, READY};
use e2e::{
    sale,
    stage::{Stage, is_true, until},
};
use serde_json::json;

const SERVICES: [&str; 5] = ["gateway", "catalog", "booking", "payment", "notification"];

#[tokio::test(flavor = "multi_thread")]
async fn all_services_run_by_their_policies_and_sell_while_the_first_provider_is_away() {
    let (stage, set) = stage().await;
    let images = set.as_ref().unwrap();
    stage.install_all(images, REPLICAS).await.unwrap();
    for file in SERVICES.into_iter().chain(["flags"]) {
        stage.apply_file(&format!("crds/samples/{file}.yaml")).await.unwrap();
    }
    for name in SERVICES {
        let live = |policy: &crds::ResiliencePolicy| {
            let pods = if name == "booking" { REPLICAS } else { 1 };
            let programmed = policy.status.as_ref().and_then(|status| status.programmed.as_deref());
            is_true(policy, PROGRAMMED) && is_true(policy, READY) && programmed == Some(&format!("{pods}/{pods}"))
        };
        stage.policy_until(name, SOON * 2, "the policy live in every pod", live).await.unwrap();
    }

    sold_by(&stage, "stripe").await;
    sale::stripe(&stage, &json!({"refuse": true})).await.unwrap();
    for _ in 0..3 {
        sold_by(&stage, "paypal").await;
    }
    let open = |policy: &crds::ResiliencePolicy| {
        let circuits = policy.status.iter().flat_map(|status| &status.circuits);
        circuits.into_iter().any(|circuit| circuit.dependency == "stripe" && circuit.open_pods == 1)
    };
    stage.policy_until("payment", SOON, "the circuit to stripe shown as open", open).await.unwrap();
    sale::stripe(&stage, &json!({})).await.unwrap();
    // The scenarios that follow have booking alone, as they found it.
    stage.delete_resources().await.unwrap();
    stage.install_booking(images, REPLICAS).await.unwrap();
}

/// Sells one seat that this provider charges for, and waits for its mail. The first call through a Service may find its pods not yet
/// known there.
async fn sold_by(stage: &Stage, provider: &str) {
    let sold = until(SOON, "a sale", || async {
        match sale::sell(stage, Some("ann@example.com")).await {
            Ok(sold) if sold.status == "Confirmed" && sold.charged_by == [provider] => Ok(Ok(sold)),
            Ok(sold) => Ok(Err(format!("{sold:?}"))),
            Err(error) => Ok(Err(error.to_string())),
        }
    })
    .await
    .unwrap();
    sale::mailed(stage, &sold.booking).await.unwrap();
}
