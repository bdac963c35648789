//! Breaks things for real, and mends them.

mod database;
mod process;
mod reservations;
mod sessions;

pub use database::{
    fail_back, fail_over_to_replica, give_database_back, resume_database, stop_database, take_database_away,
    take_writes,
};
pub use process::StoppedProcess;
pub use reservations::{leak_reservations, leaked_seats};
pub use sessions::OutdatedSessions;

use crate::{
    testbed::{TICKETING, Testbed, TestbedError, until},
    traffic::{Forward, book},
};
use http::{HeaderName, HeaderValue};
use serde_json::json;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// `request` and `perTry` of a call that outlasts any scenario when it hangs.
pub const PATIENT: (&str, &str) = ("5m", "4m");
/// The pod of the database.
const DATABASE_POD: &str = "postgres-0";

/// Database connections that hang: the processes that serve them are stopped, so nothing answers on them, while new
/// connections work. The pods' pools find out and replace them by themselves.
pub struct StoppedBackends {
    /// Ids of the stopped processes, in the database's pod.
    pub pids: Vec<u32>,
    /// When they were stopped.
    pub since: Instant,
}

impl StoppedBackends {
    /// Stops every database process that serves one of `pods`.
    pub async fn of(testbed: &Testbed, pods: &[&str]) -> Result<Self, TestbedError> {
        // A process that is stopped in the middle of a commit holds its row locks for all pods: that would be another
        // failure than the one to be shown. So it is tried again until none of the stopped ones holds any.
        until(Duration::from_secs(20), "connections stopped outside a transaction", || async {
            let pids = backends(testbed, pods).await?;
            if pids.is_empty() {
                return Ok(Err(format!("{pods:?} have no database connections")));
            }
            signal(testbed, "STOP", &pids).await?;
            let since = Instant::now();
            let list = join(&pids, ",");
            let query = format!(
                "select count(*) from pg_locks where granted and mode = 'RowExclusiveLock' and pid in ({list})"
            );
            if sql(testbed, &query).await?.trim() == "0" {
                return Ok(Ok(Self { pids, since }));
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

/// Changes `request` and `perTry` of the first dependency of the policy `booking`: with long ones, a pool never learns that a
/// call hangs.
pub async fn have_patient_calls(testbed: &Testbed, (request, per_try): (&str, &str)) -> Result<(), TestbedError> {
    let timeout = json!({ "request": request, "perTry": per_try });
    let patch = json!([{ "op": "replace", "path": "/spec/dependencies/0/timeout", "value": timeout }]).to_string();
    let words = ["patch", "rpol", "booking", "-n", TICKETING, "--type=json", "-p", &patch];
    Ok(testbed.kubectl.args(&words).await.map(drop)?)
}

/// How many connections the pool of a pod has replaced because they did not answer, since the pod started.
pub async fn replaced_connections(testbed: &Testbed, pod: &str) -> Result<usize, TestbedError> {
    const METRIC: &str = "database_unresponsive_connections_total ";
    let uri = format!("/api/v1/namespaces/{TICKETING}/pods/{pod}:8080/proxy/metrics");
    let request = http::Request::get(uri).body(Vec::new());
    let request = request.map_err(|error| TestbedError::unexpected("a request", &error.to_string()))?;
    let metrics = testbed.through.request_text(request).await?;
    let value = metrics.lines().find_map(|line| line.strip_prefix(METRIC)?.trim().parse().ok());
    value.ok_or_else(|| TestbedError::unexpected(METRIC, "no such metric"))
}

/// Every place in one pod's pool is taken by a call that hangs, while new connections would work.
///
/// The pool replaces a connection whose call was given up, and one that is idle and does not answer. So it takes calls that
/// wait long (`perTry` in the policy) for it to have no reason to: then only ResetConnections helps, or another pod.
pub struct HungCalls {
    stopped: StoppedBackends,
    /// Those whose calls hang.
    buyers: Vec<JoinHandle<()>>,
    _forward: Forward,
}

impl HungCalls {
    /// Has more buyers than there are connections book in `pod`, and stops the database processes that serve it at a
    /// moment when all of them are busy.
    pub async fn of(testbed: &Testbed, pod: &str) -> Result<Self, TestbedError> {
        let places = pool_size(testbed, pod).await?;
        let forward = Forward::open(testbed, pod, 8080).await?;
        // Orders alone would leave the connections free that booking keeps for finishing sales.
        let important = [(HeaderName::from_static("x-priority"), HeaderValue::from_static("finish"))];
        let client = reqwest::Client::builder().no_proxy().default_headers(important.into_iter().collect()).build();
        let client = client.map_err(|error| TestbedError::unexpected("an HTTP client", &error.to_string()))?;
        let over = Arc::new(AtomicBool::new(false));
        let buyer = |_| {
            let (client, address, over) = (client.clone(), forward.address.clone(), Arc::clone(&over));
            tokio::spawn(async move {
                while !over.load(Ordering::Acquire) {
                    book(&client, &address).await;
                }
            })
        };
        let buyers = (0..2 * places).map(buyer).collect();
        let stopped = until(Duration::from_secs(30), "all connections busy at the same moment", || async {
            let pids = stop_if_all_wait(testbed, pod, places).await?;
            let since = Instant::now();
            if pids.is_empty() {
                return Ok(Err(format!("{pod} has fewer than {places} busy connections")));
            }
            Ok(Ok(StoppedBackends { pids, since }))
        })
        .await;
        over.store(true, Ordering::Release);
        // From here on the buyers are ended even after a failure.
        let mut hung =
            Self { stopped: StoppedBackends { pids: Vec::new(), since: Instant::now() }, buyers, _forward: forward };
        hung.stopped = stopped?;
        Ok(hung)
    }

    /// How many calls hang.
    pub fn count(&self) -> usize {
        self.stopped.pids.len()
    }

    /// When they began to.
    pub fn since(&self) -> Instant {
        self.stopped.since
    }

    /// Lets the database's processes go on.
    pub async fn resume(&self, testbed: &Testbed) -> Result<(), TestbedError> {
        self.stopped.resume(testbed).await
    }
}

impl Drop for HungCalls {
    fn drop(&mut self) {
        for buyer in &self.buyers {
            buyer.abort();
        }
    }
}

/// Most connections of a pod, as it was told to have.
async fn pool_size(testbed: &Testbed, pod: &str) -> Result<usize, TestbedError> {
    let path = "jsonpath={.spec.containers[*].env[?(@.name==\"DATABASE_POOL_SIZE\")].value}";
    let size = testbed.kubectl.args(&["get", "pod", "-n", TICKETING, pod, "-o", path]).await?;
    size.trim().parse().map_err(|_| TestbedError::unexpected("DATABASE_POOL_SIZE of the pod", &size))
}

/// Stops the database processes that serve a pod if `places` of them are busy; the answer is which were stopped, if any.
///
/// A lock on the table makes every booking wait that comes to its one writing statement. There it holds nothing that the
/// other pods need, whatever happens to it then. What only reads passes, so those that wait are bookings.
async fn stop_if_all_wait(testbed: &Testbed, pod: &str, places: usize) -> Result<Vec<u32>, TestbedError> {
    let waiting = format!(
        "select l.pid from pg_locks l join pg_stat_activity a on a.pid = l.pid \
         where not l.granted and l.relation = 'events'::regclass and a.application_name = '{pod}'"
    );
    // The pods' own `lock_timeout` ends such a wait after 500 ms.
    let script = format!(
        "begin;\n\
         lock table events in exclusive mode;\n\
         do $$ begin\n\
           for round in 1..18 loop\n\
             perform pg_sleep(0.02), pg_stat_clear_snapshot();\n\
             exit when (select count(*) from ({waiting}) w) >= {places};\n\
           end loop;\n\
         end $$;\n\
         select pid from (select pid, count(*) over () as n from ({waiting}) w) v where n >= {places} \\g |xargs -r sh -c 'kill -STOP \"$@\"; echo stopped \"$@\"' sh\n\
         select 'still waiting', count(*) from ({waiting}) w;\n\
         commit;\n"
    );
    let psql = "printf '%s' \"$0\" | psql -U \"$POSTGRES_USER\" -d \"$POSTGRES_DB\" -qAt -v ON_ERROR_STOP=1";
    let words = ["exec", "-n", TICKETING, DATABASE_POD, "-c", "postgres", "--", "sh", "-c", psql, &script];
    let answer = testbed.kubectl.args(&words).await?;
    let pids: Vec<u32> = answer
        .lines()
        .filter_map(|line| line.strip_prefix("stopped "))
        .flat_map(|pids| pids.split_whitespace().filter_map(|pid| pid.parse().ok()))
        .collect();
    if answer.lines().any(|line| line == format!("still waiting|{places}")) && pids.len() == places {
        return Ok(pids);
    }
    // One of them was done waiting just before it was stopped.
    signal(testbed, "CONT", &pids).await?;
    Ok(Vec::new())
}

async fn in_database_pod(testbed: &Testbed, script: &str) -> Result<(), TestbedError> {
    let words = ["exec", "-n", TICKETING, DATABASE_POD, "-c", "postgres", "--", "sh", "-c", script];
    Ok(testbed.kubectl.args(&words).await.map(drop)?)
}

/// The database processes that serve some pods: connections carry the name of their pod.
async fn backends(testbed: &Testbed, pods: &[&str]) -> Result<Vec<u32>, TestbedError> {
    let query = format!(
        "select pid from pg_stat_activity where application_name in ({}) and backend_type = 'client backend'",
        quoted(pods)
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

/// Names as a list in SQL.
fn quoted(names: &[&str]) -> String {
    names.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
}

fn join(pids: &[u32], by: &str) -> String {
    pids.iter().map(u32::to_string).collect::<Vec<_>>().join(by)
}
