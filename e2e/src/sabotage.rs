//! Breaks things for real, and mends them.

use crate::testbed::{TICKETING, Testbed, TestbedError, until};
use std::time::Duration;

/// The pod of the database.
const DATABASE_POD: &str = "postgres-0";

/// Database connections of one pod that hang: the processes that serve them are stopped, so nothing answers on them,
/// while new connections work.
pub struct StoppedBackends {
    /// Ids of the stopped processes, in the database's pod.
    pub pids: Vec<u32>,
}

impl StoppedBackends {
    /// Stops every database process that serves `pod`.
    pub async fn of(testbed: &Testbed, pod: &str) -> Result<Self, TestbedError> {
        // A process that is stopped in the middle of a commit holds its row locks for all pods: that would be another
        // failure than the one to be shown. So it is tried again until none of the stopped ones holds any.
        until(Duration::from_secs(20), "connections stopped outside a transaction", || async {
            let pids = backends(testbed, pod).await?;
            if pids.is_empty() {
                return Ok(Err(format!("{pod} has no database connections")));
            }
            signal(testbed, "STOP", &pids).await?;
            let list = join(&pids, ",");
            let query = format!(
                "select count(*) from pg_locks where granted and mode = 'RowExclusiveLock' and pid in ({list})"
            );
            if sql(testbed, &query).await?.trim() == "0" {
                return Ok(Ok(Self { pids }));
            }
            signal(testbed, "CONT", &pids).await?;
            Ok(Err("each time in the middle of a transaction".to_owned()))
        })
        .await
    }

    /// Lets them go on; those whose client went away end then.
    pub async fn resume(&self, testbed: &Testbed) -> Result<(), TestbedError> {
        signal(testbed, "CONT", &self.pids).await
    }
}

/// Stops the whole database: it keeps its data, and answers nobody.
pub async fn stop_database(testbed: &Testbed) -> Result<(), TestbedError> {
    in_database_pod(testbed, "kill -STOP $(pidof postgres)").await
}

/// Lets the whole database go on.
pub async fn resume_database(testbed: &Testbed) -> Result<(), TestbedError> {
    in_database_pod(testbed, "kill -CONT $(pidof postgres)").await
}

async fn in_database_pod(testbed: &Testbed, script: &str) -> Result<(), TestbedError> {
    let words = ["exec", "-n", TICKETING, DATABASE_POD, "-c", "postgres", "--", "sh", "-c", script];
    Ok(testbed.kubectl.args(&words).await.map(drop)?)
}

/// The database processes that serve a pod: its connections carry the pod's name.
async fn backends(testbed: &Testbed, pod: &str) -> Result<Vec<u32>, TestbedError> {
    let query = format!(
        "select pid from pg_stat_activity where application_name = '{pod}' and backend_type = 'client backend'"
    );
    Ok(sql(testbed, &query).await?.lines().filter_map(|line| line.trim().parse().ok()).collect())
}

/// Asks the database.
pub async fn sql(testbed: &Testbed, query: &str) -> Result<String, TestbedError> {
    let script = "psql -U \"$POSTGRES_USER\" -d \"$POSTGRES_DB\" -At -c \"$0\"";
    Ok(testbed
        .kubectl
        .args(&["exec", "-n", TICKETING, DATABASE_POD, "-c", "postgres", "--", "sh", "-c", script, query])
        .await?)
}

async fn signal(testbed: &Testbed, signal: &str, pids: &[u32]) -> Result<(), TestbedError> {
    // Some may have ended meanwhile; the others count.
    in_database_pod(testbed, &format!("kill -{signal} {} 2>/dev/null; true", join(pids, " "))).await
}

fn join(pids: &[u32], by: &str) -> String {
    pids.iter().map(u32::to_string).collect::<Vec<_>>().join(by)
}
