//! IPv6: where the operator listens, and how it reaches pods.

use crate::support::{World, operator::Operator, recovery_policy, within, world::request_ms};
use clap::Parser;
use operator::args::Args;
use std::{net::Ipv6Addr, time::Duration};

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_answers_over_both_families_and_calls_pods_over_ipv6() {
    let usual = Args::parse_from(["resilience-operator"]).listen;
    assert_eq!(usual.ip(), Ipv6Addr::UNSPECIFIED, "by default it listens everywhere");

    let world = World::new().await;
    let workload = world.workload("booking", 1).await;
    let pod = workload.new_pod_of(&world, Some("::1"), false).await;
    let free = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let _operator = Operator::start(&world, &["--listen", &format!("[::]:{port}")]).await;
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for address in ["127.0.0.1", "[::1]"] {
        for path in ["livez", "readyz", "metrics"] {
            within(Duration::from_secs(30), &format!("{path} answers at {address}"), async || {
                let answer = client.get(format!("http://{address}:{port}/{path}")).send().await;
                let answer = answer.map_err(|error| error.to_string())?;
                answer.error_for_status().map(drop).map_err(|error| error.to_string())
            })
            .await;
        }
    }

    world.apply(&recovery_policy("booking", "booking")).await;
    pod.until_it_runs("the policy", |running| request_ms(running) == Some(5_000)).await;
    let done = world.until_policy_says("booking", "Ready", "True", "Programmed").await;
    assert_eq!(done.status.unwrap().programmed.as_deref(), Some("2/2"));
    pod.script().failing = true;
    pod.until_asked(1).await;
}
