//! All services in the cluster, each with its policy: a sale goes through them, also while the first payment provider is
//! away.

use crate::{REPLICAS, SOON, testbed};
use crds::ConditionType;
use e2e::{
    sale,
    testbed::{Testbed, is_true, until},
};
use serde_json::json;

const SERVICES: [&str; 5] = ["gateway", "catalog", "booking", "payment", "notification"];

#[tokio::test(flavor = "multi_thread")]
async fn all_services_run_by_their_policies_and_sell_while_the_first_provider_is_away() {
    let (testbed, set) = testbed().await;
    let images = set.as_ref().unwrap();
    testbed.install_all(images, REPLICAS).await.unwrap();
    for file in SERVICES.into_iter().chain(["flags"]) {
        testbed.apply_file(&format!("crds/samples/{file}.yaml")).await.unwrap();
    }
    for name in SERVICES {
        let live = |policy: &crds::ResiliencePolicy| {
            let pods = if name == "booking" { REPLICAS } else { 1 };
            let programmed = policy.status.as_ref().and_then(|status| status.programmed.as_deref());
            is_true(policy, ConditionType::Programmed.as_str())
                && is_true(policy, ConditionType::Ready.as_str())
                && programmed == Some(&format!("{pods}/{pods}"))
        };
        testbed.policy_until(name, SOON * 2, "the policy live in every pod", live).await.unwrap();
    }

    sold_by(&testbed, "stripe").await;
    sale::stripe(&testbed, &json!({"refuse": true})).await.unwrap();
    for _ in 0..3 {
        sold_by(&testbed, "paypal").await;
    }
    let open = |policy: &crds::ResiliencePolicy| {
        let circuits = policy.status.iter().flat_map(|status| &status.circuits);
        circuits.into_iter().any(|circuit| circuit.dependency == "stripe" && circuit.open_pods == 1)
    };
    testbed.policy_until("payment", SOON, "the circuit to stripe shown as open", open).await.unwrap();
    sale::stripe(&testbed, &json!({})).await.unwrap();
    // The scenarios that follow have booking alone, as they found it.
    testbed.delete_resources().await.unwrap();
    testbed.install_booking(images, REPLICAS).await.unwrap();
}

/// Sells one seat that this provider charges for, and waits for its mail. The first call through a Service may find its pods not yet
/// known there.
async fn sold_by(testbed: &Testbed, provider: &str) {
    let sold = until(SOON, "a sale", || async {
        match sale::sell(testbed, Some("ann@example.com")).await {
            Ok(sold) if sold.status == "Confirmed" && sold.charged_by == [provider] => Ok(Ok(sold)),
            Ok(sold) => Ok(Err(format!("{sold:?}"))),
            Err(error) => Ok(Err(error.to_string())),
        }
    })
    .await
    .unwrap();
    sale::mailed(testbed, &sold.booking).await.unwrap();
}
