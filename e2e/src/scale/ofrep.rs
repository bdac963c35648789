//! How many flags the operator answers over OFREP, beside flagd's evaluator for Node behind a plain HTTP server, and beside flagd where
//! it is given; and how soon a thousand clients hear of a change.
//!
//! Each has the same 10,000 flags and is asked the same by the same clients, one server at a time, on the same processors as they.

use super::{
    ScaleError,
    api::{ApiClient, for_all},
    binary,
    measure::{HOME, install, io, until, waited},
    operator_process::{Contender, OperatorProcess},
    raise_file_limit,
    statistics::{Spread, millis},
};
use crate::{apiserver::TestApiServer, checkout, progress::Progress, sdk_clients};
use futures::future::{join_all, try_join_all};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde_json::{Map, Value, json};
use std::{
    net::TcpListener,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use tokio::sync::Barrier;

const NAMESPACE: &str = "flags";
const SETS: usize = 20;
const FLAGS_EACH: usize = 500;
/// Clients that ask at once, each over a connection of its own.
const ASKING: usize = 32;
/// It opens nothing outside of this machine, and nothing after the run.
const TOKEN: &str = "a-token-of-a-benchmark";
const PATIENCE: Duration = Duration::from_secs(120);
/// Changes that are told to everybody who listens.
const CHANGES: usize = 10;

/// What is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Seconds for which each server is asked
    #[arg(long, env = "CASE_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub case_seconds: u64,
    /// How many clients listen to changes
    #[arg(long, env = "LISTENERS", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    pub listeners: u16,
    /// A built operator [default: a release build of the working tree]
    #[arg(long, env = "OPERATOR", value_name = "PATH")]
    pub operator: Option<PathBuf>,
    /// A flagd to measure in the same way
    #[arg(long, env = "FLAGD", value_name = "PATH")]
    pub flagd: Option<PathBuf>,
}

/// What a server took.
struct Served {
    name: &'static str,
    per_second: f64,
    spread: Spread,
    kib: u64,
}

/// Measures and prints the tables.
pub async fn run(options: &Options, progress: &Progress) -> Result<(), ScaleError> {
    raise_file_limit(4 * usize::from(options.listeners))?;
    let logs = checkout::root().join("target/scale/ofrep");
    std::fs::create_dir_all(&logs).map_err(io("make target/scale/ofrep"))?;
    let binary = binary(options.operator.as_deref(), progress).await?;
    let node = sdk_clients::ready("flagd-core-node", progress).await.map_err(|error| waited(error.to_string()))?;
    let server = progress.during("starting etcd and an API server", TestApiServer::start()).await?;
    let api = ApiClient::new(&server.kubeconfig()).await?;
    install(&api).await?;
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } });
    api.create("/api/v1/namespaces", &namespace).await?;
    progress.during("writing 10,000 flags", for_all(SETS, |set| put(&api, set, "on"))).await?;
    let tokens = logs.join("tokens");
    std::fs::write(&tokens, format!("bench {TOKEN} {NAMESPACE}\n")).map_err(io("write the token"))?;
    let document = logs.join("flags.json");
    let flags: Map<_, _> = (0..SETS).flat_map(|set| flags(set, "on")).collect();
    std::fs::write(&document, json!({ "flags": flags }).to_string()).map_err(io("write the flags"))?;

    let (own_port, port) = (free_port()?, free_port()?);
    let operator = format!(
        "'{}' --namespace {HOME} --listen 127.0.0.1:{own_port} --identity bench --ofrep-listen 127.0.0.1:{port} \
         --ofrep-rate 100000 --ofrep-tokens '{}'",
        binary.display(),
        tokens.display(),
    );
    let base = format!("http://127.0.0.1:{port}/namespaces/{NAMESPACE}");
    let start = |command: &str| Contender::peer(command).start("bench", &server.kubeconfig(), &logs);
    let mut process = start(&operator)?;
    answers(&base, &mut process).await?;
    let mut served = vec![measure("the operator", &base, &process, options, progress).await?];
    let told = progress.during("telling changes", tell(&api, &base, usize::from(options.listeners))).await?;
    let after = process.memory().map_or(0, |memory| memory.now_kib);
    drop(process);

    let port = free_port()?;
    let script = node.join("flagd_core_server.mjs");
    let mut peers =
        vec![("flagd-core in Node", format!("node '{}' '{}' {port}", script.display(), document.display()), port)];
    if let Some(flagd) = options.flagd.as_ref().filter(|path| !path.as_os_str().is_empty()) {
        let [port, sync, own, rpc] = [free_port()?, free_port()?, free_port()?, free_port()?];
        let ports = format!("--ofrep-port {port} --sync-port {sync} --management-port {own} --port {rpc}");
        peers.push(("flagd", format!("'{}' start --uri 'file:{}' {ports}", flagd.display(), document.display()), port));
    }
    for (name, command, port) in peers {
        let base = format!("http://127.0.0.1:{port}");
        let mut process = start(&command)?;
        answers(&base, &mut process).await?;
        served.push(measure(name, &base, &process, options, progress).await?);
    }
    print(&served, &told, after, options);
    Ok(())
}

/// A port that nobody has.
fn free_port() -> Result<u16, ScaleError> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).map_err(io("find a port"))?;
    Ok(listener.local_addr().map_err(io("find a port"))?.port())
}

fn key(number: usize) -> String {
    format!("feature-{number}")
}

/// The flags of a set: every other one has a rule.
fn flags(set: usize, default: &str) -> Vec<(String, Value)> {
    let flag = |number: usize| {
        let mut flag =
            json!({ "state": "ENABLED", "variants": { "on": true, "off": false }, "defaultVariant": default });
        if number % 2 == 1 {
            flag["targeting"] = json!({ "if": [{ "ends_with": [{ "var": "email" }, "@shop.example"] }, "on", "off"] });
        }
        (key(number), flag)
    };
    (set * FLAGS_EACH..(set + 1) * FLAGS_EACH).map(flag).collect()
}

/// Writes a set whose flags without a rule have this variant.
async fn put(api: &ApiClient, set: usize, default: &str) -> kube::Result<()> {
    let flags: Map<_, _> = flags(set, default).into_iter().collect();
    let set = json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
        "metadata": { "name": format!("set-{set}"), "namespace": NAMESPACE },
        "spec": { "targetRefs": [{ "name": "shop" }], "flagSpec": { "flags": flags } },
    });
    let name = set["metadata"]["name"].as_str().unwrap_or_default();
    let path = format!("/apis/resilience.ticketwave.io/v1alpha1/namespaces/{NAMESPACE}/featureflags/{name}");
    api.apply(&path, &set).await.map(drop)
}

fn client() -> Client {
    Client::builder().no_proxy().build().unwrap_or_default()
}

/// Asks for one flag, as somebody of the shop and as a buyer in turn.
fn ask(client: &Client, base: &str, number: usize) -> RequestBuilder {
    let domain = if number % 4 < 2 { "shop" } else { "buyer" };
    let context = json!({ "targetingKey": format!("user-{number}"), "email": format!("u{number}@{domain}.example") });
    let url = format!("{base}/ofrep/v1/evaluate/flags/{}", key(number % (SETS * FLAGS_EACH)));
    let body = json!({ "context": context }).to_string();
    client.post(url).bearer_auth(TOKEN).header("content-type", "application/json").body(body)
}

/// Waits until the server has all flags.
async fn answers(base: &str, process: &mut OperatorProcess) -> Result<(), ScaleError> {
    let client = client();
    until(PATIENCE, "a server that answers for flags", async || {
        if let Some(ended) = process.ended() {
            return Err(waited(ended));
        }
        let last = ask(&client, base, SETS * FLAGS_EACH - 1).send().await;
        Ok(match last {
            Ok(answer) if answer.status() == StatusCode::OK => Ok(()),
            Ok(answer) => Err(answer.status().to_string()),
            Err(error) => Err(error.to_string()),
        })
    })
    .await
}

/// Asks for flags for a while; an answer that is not the right one ends it.
async fn measure(
    name: &'static str,
    base: &str,
    process: &OperatorProcess,
    options: &Options,
    progress: &Progress,
) -> Result<Served, ScaleError> {
    let time = Duration::from_secs(options.case_seconds);
    let next = AtomicUsize::new(0);
    let begin = Instant::now();
    let asking = async |_| {
        let (client, mut times) = (client(), Vec::new());
        while begin.elapsed() < time {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let asked = Instant::now();
            let answer = ask(&client, base, number).send().await.and_then(Response::error_for_status);
            let body = async { answer?.json::<Value>().await }.await.map_err(|error| waited(error.to_string()))?;
            let expected = number.is_multiple_of(2) || number % 4 < 2;
            if body["value"] != expected {
                return Err(waited(format!("{name} answers {body} for request {number}, not {expected}")));
            }
            times.push(asked.elapsed());
        }
        Ok::<_, ScaleError>(times)
    };
    let all = progress.during(&format!("asking {name}"), try_join_all((0..ASKING).map(asking))).await?;
    let times: Vec<_> = all.into_iter().flatten().collect();
    #[expect(clippy::cast_precision_loss, reason = "requests are far fewer than 2^52")]
    let per_second = times.len() as f64 / begin.elapsed().as_secs_f64();
    let spread = Spread::of(times).ok_or_else(|| waited(format!("{name} answered nothing")))?;
    Ok(Served { name, per_second, spread, kib: process.memory().map_or(0, |memory| memory.peak_kib) })
}

/// How long after an edit clients hear that flags have changed.
struct ToldAfter {
    /// From its beginning on.
    begin: Spread,
    /// From the API server's answer on, before which it has told the operator.
    answer: Spread,
}

/// How long after an edit each of so many clients hears that flags have changed.
async fn tell(api: &ApiClient, base: &str, listeners: usize) -> Result<ToldAfter, ScaleError> {
    let client = client();
    let url = format!("{base}/ofrep/v1/events");
    let failed = |error: reqwest::Error| waited(error.to_string());
    let open = async |_| client.get(&url).bearer_auth(TOKEN).send().await.and_then(Response::error_for_status);
    let mut streams = Vec::new();
    // Not all at once: that is another measurement.
    for number in 0..listeners {
        let mut stream = open(number).await.map_err(failed)?;
        heard(&mut stream).await?;
        streams.push(stream);
    }
    let (mut since_begin, mut since_answer) = (Vec::new(), Vec::new());
    for change in 0..CHANGES {
        let barrier = Barrier::new(listeners + 1);
        let listen = streams.iter_mut().map(async |stream| {
            barrier.wait().await;
            heard(stream).await?;
            Ok::<_, ScaleError>(Instant::now())
        });
        let edit = async {
            barrier.wait().await;
            let begin = Instant::now();
            put(api, 0, if change % 2 == 0 { "off" } else { "on" }).await?;
            Ok::<_, ScaleError>((begin, Instant::now()))
        };
        let (heard, edited) = tokio::join!(join_all(listen), edit);
        let (begin, answered) = edited?;
        for at in heard {
            let at = at?;
            since_begin.push(at.saturating_duration_since(begin));
            since_answer.push(at.saturating_duration_since(answered));
        }
    }
    let spread = |times| Spread::of(times).ok_or_else(|| waited("nobody listens"));
    Ok(ToldAfter { begin: spread(since_begin)?, answer: spread(since_answer)? })
}

/// Waits for the next event of a stream.
async fn heard(stream: &mut Response) -> Result<(), ScaleError> {
    let next = async {
        loop {
            match stream.chunk().await.map_err(|error| waited(error.to_string()))? {
                Some(part) if part.windows(5).any(|window| window == b"data:") => return Ok(()),
                // A comment, so that the connection stays.
                Some(_) => {}
                None => return Err(waited("a stream of changes has ended")),
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.unwrap_or_else(|_| Err(waited("an event did not come")))
}

fn print(served: &[Served], told: &ToldAfter, after_kib: u64, options: &Options) {
    println!(
        "{ASKING} clients ask for one of 10,000 flags each, for {} s; every other flag has a rule",
        options.case_seconds
    );
    println!("{:<22}{:>12}{:>10}{:>10}{:>14}", "", "answers/s", "p50", "p99", "peak MiB");
    for one in served {
        let [p50, p99] = [one.spread.p50, one.spread.p99].map(millis);
        println!("{:<22}{:>12.0}{p50:>10}{p99:>10}{:>14}", one.name, one.per_second, one.kib / 1024);
    }
    if let Some((ours, others)) = served.split_first() {
        for other in others {
            #[expect(clippy::cast_precision_loss, reason = "a memory in KiB is far below 2^52")]
            let memory = ours.kib as f64 / other.kib.max(1) as f64;
            println!(
                "{:.1} times the answers of {}, in {memory:.2} times its memory",
                ours.per_second / other.per_second,
                other.name
            );
        }
    }
    println!(
        "{} clients hear of a change, from the beginning of the edit: p50 {} ms, p99 {} ms; from the API server's answer on: p50 {} ms, \
         p99 {} ms (goal: 200); then the operator has {} MiB",
        options.listeners,
        millis(told.begin.p50),
        millis(told.begin.p99),
        millis(told.answer.p50),
        millis(told.answer.p99),
        after_kib / 1024
    );
}
