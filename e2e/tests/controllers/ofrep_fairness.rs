//! Namespaces take turns: what one asks for holds up no other.

use crate::{
    ofrep::{Served, address, prepare, read},
    support::{World, cluster, cluster::apply, eventually, flag_set, operator::Operator},
};
use futures::future::join_all;
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const BULK: &str = "/ofrep/v1/evaluate/flags";

/// Flags whose rules take as many steps as a rule may, as many as fit into a set.
fn expensive() -> Value {
    let mut set = flag_set("expensive", "booking");
    let many: Vec<u32> = (0..150).collect();
    // For each of many numbers all of them, again.
    let sum = json!({ "reduce": [many, { "+": [{ "var": "current" }, { "var": "accumulator" }] }, 0] });
    let rule = json!({ "if": [{ ">": [{ "reduce": [many, { "+": [sum, { "var": "accumulator" }] }, 0] }, 0] }, "on"] });
    let flag = json!({ "state": "ENABLED", "variants": { "on": true, "off": false }, "defaultVariant": "off", "targeting": rule });
    let flags: serde_json::Map<_, _> = (0..100).map(|nth| (format!("flag-{nth}"), flag.clone())).collect();
    set["spec"]["flagSpec"]["flags"] = json!(flags);
    set
}

#[tokio::test(flavor = "multi_thread")]
async fn expensive_flags_of_one_namespace_do_not_keep_another_from_being_answered() {
    let world = prepare(World::watched_from_everywhere(cluster::shared().await).await).await;
    let hostile = format!("{}-hostile", world.namespace);
    let manifest = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": hostile } });
    apply(&world.client, "", &manifest).await.unwrap();
    apply(&world.client, &hostile, &expensive()).await.unwrap();
    // So many that all of them together need a turn.
    let mut many = flag_set("flags", "booking");
    for nth in 0..150 {
        many["spec"]["flagSpec"]["flags"][format!("flag-{nth}")] =
            many["spec"]["flagSpec"]["flags"]["EnablePdf"].clone();
    }
    world.apply(&many).await;
    let listen = address();
    let operator = Operator::start(&world, &["--ofrep-listen", &listen, "--ofrep-rate", "100000"]).await;
    let served = Served::of(world, operator, &listen);
    served.until("EnablePdf", &json!(true)).await;
    // Who may do everything may read there, too.
    let admin = served.world.cluster.server.token();
    let ask_hostile = |path: &str| {
        let call = served.client.post(format!("{}/namespaces/{hostile}{path}", served.base));
        call.bearer_auth(admin).body("{}")
    };
    let single = format!("{BULK}/flag-7");
    eventually("the hostile flags are there", async || match read(ask_hostile(&single)).await {
        (StatusCode::OK | StatusCode::BAD_REQUEST, _) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;

    let calm = async |count: usize| {
        let mut times = Vec::new();
        for nth in 0..count {
            let path = if nth % 2 == 0 { BULK.to_owned() } else { format!("{BULK}/EnablePdf") };
            let begun = Instant::now();
            let (status, answer) = read(served.call("user-1", &path, &json!({}))).await;
            times.push(begun.elapsed());
            assert_eq!(status, StatusCode::OK, "{answer}");
        }
        times.sort();
        (times[count / 2], times[count * 99 / 100])
    };
    let alone = calm(50).await;
    let flood = join_all((0..24).map(|nth| {
        let (path, ask_hostile) = (if nth % 2 == 0 { BULK } else { single.as_str() }, &ask_hostile);
        async move {
            let (mut answered, end) = (0, Instant::now() + Duration::from_secs(4));
            while Instant::now() < end {
                // A flood is not all answered; what matters is who else is.
                answered += usize::from(ask_hostile(path).send().await.is_ok());
            }
            answered
        }
    }));
    let (flooded, meanwhile) = futures::join!(flood, calm(150));
    let flooded: usize = flooded.into_iter().sum();
    println!(
        "alone p50 {:?}, p99 {:?}; beside {flooded} hostile calls p50 {:?}, p99 {:?}",
        alone.0, alone.1, meanwhile.0, meanwhile.1
    );
    assert!(flooded > 0);
    served.operator.assert_alive().await;
}
