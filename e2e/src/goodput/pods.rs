//! One of three pods of the catalog fails fast, as one that is cut off from its database: with a gateway that knows the pods and
//! leaves it out, and with one that knows one address, behind which each connection leads to some pod, and that can only give up
//! a connection on which a call has failed.

use super::{EVENTS, per_second, percent, sorted_ms};
use crate::bench::percentile;
use crate::load_generator::{Answer, LoadGenerator, SEATS};
use crate::local_stack::{LocalStack, LocalStackError, Port, Ports, can_name};
use crate::progress::Progress;
use contract::{DependencySettings, FlagsSettings, PolicySettings};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};

/// People who look at events at once.
const LOOKERS: usize = 32;
/// So many of a hundred calls may fail where the pod is left out.
const MOST_PERCENT: f64 = 2.0;
/// What the gateway knows the pods as.
const NAME: &str = "catalog.pods";
const PODS: [Ipv4Addr; 3] = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];

/// How the gateway gets at the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// It knows all of them, as by a headless Service.
    Each,
    /// It knows one address, as that of an ordinary Service.
    One,
}

/// The answer is the goal that was missed, if one was.
pub(super) async fn measure(time: Duration, progress: &Progress) -> Result<Option<String>, LocalStackError> {
    println!(
        "{LOOKERS} people look at events for {} s; one of three catalogs has no database. Nothing is tried again or cached",
        time.as_secs()
    );
    can_name().await?;
    println!("{:<42}{:>11}{:>10}{:>9}{:>9}{:>9}", "the gateway", "answers/s", "failed/s", "failed", "p50", "p99");
    let mut shares = Vec::new();
    for (name, way) in
        [("knows the pods, and leaves it out", Way::Each), ("knows one address, gives connections up", Way::One)]
    {
        progress.say(format!("one of three catalogs fails, and the gateway {name}"));
        let answers = case(way, time).await?;
        let failed = answers.iter().filter(|answer| answer.status != 200).count();
        let share = percent(failed, answers.len());
        let took = sorted_ms(&answers);
        let [p50, p99] = [50, 99].map(|share| percentile(&took, share));
        let [good, bad] = [answers.len() - failed, failed].map(|count| per_second(count, time));
        println!("{name:<42}{good:>11.1}{bad:>10.1}{share:>8.2}%{p50:>9}{p99:>9}");
        shares.push(share);
    }
    let [each, one] = shares[..] else { return Ok(None) };
    let found = format!(
        "{each:.2} % of the calls fail where the pod is left out (at most {MOST_PERCENT} %), {one:.2} % where only connections are"
    );
    println!("\n{found}");
    Ok((each > MOST_PERCENT).then_some(found))
}

async fn case(way: Way, time: Duration) -> Result<Vec<Answer>, LocalStackError> {
    let first_port = Ports::any_free().ok_or(LocalStackError::NoPorts)?;
    let mut stack =
        LocalStack::start(LocalStack::release_program(), first_port, &[], false, &Progress::quiet()).await?;
    let load = LoadGenerator::new(&stack, EVENTS, SEATS).await?;
    let port = stack.port(Port::Catalog);
    stack.start_pod("catalog", "catalog-2", PODS[1], &[])?;
    let nowhere = "postgres://postgres@127.0.0.1:1/postgres";
    stack.start_pod("catalog", "catalog-3", PODS[2], &[("DATABASE_URL", Some(nowhere))])?;
    let url = match way {
        Way::Each => {
            let path = stack.folder().join("hosts");
            let lines = PODS.map(|pod| format!("{pod} {NAME}\n")).concat();
            std::fs::write(&path, lines).map_err(|source| LocalStackError::File { path: path.clone(), source })?;
            stack.name_by("gateway", &path)?;
            format!("http://{NAME}:{port}")
        }
        Way::One => format!("http://{}", one_address(port).await?),
    };
    for pod in PODS {
        until_ready(&stack, &format!("http://{pod}:{port}/readyz")).await?;
    }
    stack.kill("gateway").await;
    stack.restart_with("gateway", &[("CATALOG_URL", Some(&url))])?;
    until_ready(&stack, &(stack.url(Port::Gateway) + "/readyz")).await?;
    let mut bare = DependencySettings::default();
    bare.retry.num_retries = 0;
    bare.timeout.per_try_ms = 1_000;
    let policy = PolicySettings { dependencies: [("catalog".to_owned(), bare)].into(), ..Default::default() };
    stack.push("gateway", Port::GatewayAdmin, policy, FlagsSettings::default()).await?;
    let end = Instant::now() + time;
    let one = |looker: usize| {
        let load = &load;
        async move {
            let mut answers = Vec::new();
            for page in looker.. {
                if Instant::now() >= end {
                    break;
                }
                answers.push(load.look(page).await);
            }
            answers
        }
    };
    let answers = futures::future::join_all((0..LOOKERS).map(one)).await.concat();
    stack.stop().await;
    Ok(answers)
}

async fn until_ready(stack: &LocalStack, url: &str) -> Result<(), LocalStackError> {
    let begin = Instant::now();
    while !reqwest::get(url).await.is_ok_and(|answer| answer.status().is_success()) {
        if begin.elapsed() > Duration::from_secs(60) {
            return Err(LocalStackError::NotReady { what: url.to_owned(), tail: stack.tails() });
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// An address whose connections lead to one pod after the other, for as long as this process runs.
async fn one_address(port: u16) -> Result<SocketAddr, LocalStackError> {
    let start = |source| LocalStackError::Start { what: "a proxy for the pods".to_owned(), source };
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(start)?;
    let address = listener.local_addr().map_err(start)?;
    tokio::spawn(async move {
        for pod in PODS.into_iter().cycle() {
            let Ok((mut client, _)) = listener.accept().await else { return };
            tokio::spawn(async move {
                if let Ok(mut server) = TcpStream::connect((pod, port)).await {
                    // It ends with either of them.
                    let _ = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
                    let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
    });
    Ok(address)
}
