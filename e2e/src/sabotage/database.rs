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
    end_all_connections(testbed).await
}

/// Ends every connection to the first server, those too that are opened until every node knows where the Service leads.
async fn end_all_connections(testbed: &Testbed) -> Result<(), TestbedError> {
    let all = "select count(pg_terminate_backend(pid)) from pg_stat_activity \
               where backend_type = 'client backend' and pid <> pg_backend_pid()";
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

/// The pod of a hot standby.
const REPLICA: &str = "postgres-replica";

/// Fails the database over to a hot standby that is not promoted: the services' connections end, and new ones lead to a server
/// that answers and takes no writes.
pub async fn fail_over_to_replica(testbed: &Testbed) -> Result<(), TestbedError> {
    let primary = testbed.kubectl.get(&format!("pod {DATABASE_POD} -n {TICKETING}")).await?;
    in_database_pod(testbed, "echo 'host replication all all scram-sha-256' >> \"$PGDATA/pg_hba.conf\"").await?;
    sql(testbed, "select pg_reload_conf()").await?;
    testbed.kubectl.apply(&replica(&primary).to_string()).await?;
    let wait = format!("wait -n {TICKETING} pod/{REPLICA} --for=condition=Ready --timeout=60s");
    testbed.kubectl.run(&wait).await?;
    select(testbed, &json!({ REPLICA: "yes" })).await?;
    end_all_connections(testbed).await
}

/// Leads back to the first server, and removes the standby.
pub async fn fail_back(testbed: &Testbed) -> Result<(), TestbedError> {
    let set = testbed.kubectl.get(&format!("statefulset postgres -n {TICKETING}")).await?;
    select(testbed, &set["spec"]["selector"]["matchLabels"]).await?;
    let words = format!("delete pod -n {TICKETING} {REPLICA} --ignore-not-found --grace-period=1 --wait=true");
    testbed.kubectl.run(&words).await.map(drop)?;
    Ok(())
}

/// A standby of the server in the pod `primary`, with the same image and user. It has labels of its own, so that nothing takes
/// it for its own pod.
fn replica(primary: &Value) -> Value {
    let container = &primary["spec"]["containers"][0];
    let script = "pg_basebackup --host=\"$PRIMARY\" --username=\"$POSTGRES_USER\" --pgdata=\"$PGDATA\" \
                  --wal-method=stream --checkpoint=fast --write-recovery-conf && exec postgres -c listen_addresses='*' \"$@\"";
    let mut variables = container["env"].as_array().cloned().unwrap_or_default();
    let password = variables.iter().find(|one| one["name"] == "POSTGRES_PASSWORD").cloned();
    variables.extend(password.map(|mut password| {
        password["name"] = json!("PGPASSWORD");
        password
    }));
    variables.push(json!({ "name": "PRIMARY", "value": primary["status"]["podIP"] }));
    // A standby has to take as many connections as the first server.
    let settings: Vec<_> =
        container["args"].as_array().into_iter().flatten().filter(|one| *one != "postgres").collect();
    let volumes = ["/var/lib/postgresql/data", "/var/run/postgresql", "/tmp"].iter().enumerate();
    let (mounts, volumes): (Vec<_>, Vec<_>) = volumes
        .map(|(number, path)| {
            let name = format!("volume-{number}");
            (json!({ "name": name, "mountPath": path }), json!({ "name": name, "emptyDir": {} }))
        })
        .unzip();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": REPLICA, "namespace": TICKETING, "labels": { REPLICA: "yes" } },
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false, "securityContext": primary["spec"]["securityContext"],
            "containers": [{
                "name": "postgres", "image": container["image"], "imagePullPolicy": container["imagePullPolicy"],
                "command": ["sh", "-c", script, "postgres"], "args": settings, "env": variables, "ports": container["ports"],
                "readinessProbe": container["readinessProbe"], "volumeMounts": mounts,
            }],
            "volumes": volumes,
        },
    })
}

/// Has the Service of the database lead to the pods with these labels.
async fn select(testbed: &Testbed, labels: &Value) -> Result<(), TestbedError> {
    let patch = json!([{ "op": "replace", "path": "/spec/selector", "value": labels }]).to_string();
    let words = ["patch", "service", "postgres", "-n", TICKETING, "--type=json", "-p", &patch];
    Ok(testbed.kubectl.args(&words).await.map(drop)?)
}

/// The image that the database's pod runs: it has a shell, and every node has it.
pub(super) async fn image(testbed: &Testbed) -> Result<String, TestbedError> {
    let path = "jsonpath={.spec.containers[0].image}";
    Ok(testbed.kubectl.args(&["get", "pod", "-n", TICKETING, DATABASE_POD, "-o", path]).await?)
}
