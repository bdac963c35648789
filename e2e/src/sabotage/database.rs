//! What happens to the database as a whole.

use super::{DATABASE_POD, in_database_pod, sql};
use crate::testbed::{TICKETING, Testbed, TestbedError, until};
use serde_json::{Value, json};
use std::time::Duration;

/// A label that no pod has: with it among those that the Service of the database asks for, the Service leads nowhere.
const NOWHERE: &str = "e2e/nowhere";

/// Stops the whole database: it keeps its data, and answers nobody.
pub async fn stop_database(testbed: &Testbed) -> Result<(), TestbedError> {
    in_database_pod(testbed, "kill -STOP $(pidof postgres)").await
}

/// Lets the whole database go on.
pub async fn resume_database(testbed: &Testbed) -> Result<(), TestbedError> {
    in_database_pod(testbed, "kill -CONT $(pidof postgres)").await
}

/// Has the server refuse writes, or take them again, also from sessions that are open: as one that was failed over from, or
/// whose disk is full.
pub async fn take_writes(testbed: &Testbed, writes: bool) -> Result<(), TestbedError> {
    let value = if writes { "off" } else { "on" };
    // Each by itself: the first one may not be part of a transaction.
    sql(testbed, &format!("alter system set default_transaction_read_only = {value}")).await?;
    sql(testbed, "select pg_reload_conf()").await?;
    until(Duration::from_secs(10), &format!("default_transaction_read_only is {value}"), || async {
        let now = sql(testbed, "show default_transaction_read_only").await?;
        Ok(if now.trim() == value { Ok(()) } else { Err(now) })
    })
    .await
}

/// Takes the database away from the services: their connections end, and new ones are refused. The server itself goes on,
/// because its data is gone with its pod.
pub async fn take_database_away(testbed: &Testbed) -> Result<(), TestbedError> {
    lead_to(testbed, &json!("nowhere")).await?;
    let all = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
               where backend_type = 'client backend' and pid <> pg_backend_pid()";
    // Until every node knows, some may come back.
    until(Duration::from_secs(20), "no connection to the database", || async {
        let left = sql(testbed, all).await?;
        Ok(if left.trim() == "0" { Ok(()) } else { Err(format!("{} were left", left.trim())) })
    })
    .await
}

/// Gives it back.
pub async fn give_database_back(testbed: &Testbed) -> Result<(), TestbedError> {
    lead_to(testbed, &Value::Null).await
}

async fn lead_to(testbed: &Testbed, nowhere: &Value) -> Result<(), TestbedError> {
    let patch = json!({ "spec": { "selector": { NOWHERE: nowhere } } }).to_string();
    let words = ["patch", "service", "postgres", "-n", TICKETING, "--type=merge", "-p", &patch];
    Ok(testbed.kubectl.args(&words).await.map(drop)?)
}

/// The image that the database's pod runs: it has a shell, and every node has it.
pub(super) async fn image(testbed: &Testbed) -> Result<String, TestbedError> {
    let path = "jsonpath={.spec.containers[0].image}";
    Ok(testbed.kubectl.args(&["get", "pod", "-n", TICKETING, DATABASE_POD, "-o", path]).await?)
}
