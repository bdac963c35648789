//! The demo: the whole loop on a real cluster, printed as a timeline while it happens.

use crate::{
    pod_admin::PodAdmin,
    progress::Progress,
    provider::ProviderKind,
    sabotage::{OutdatedSessions, StoppedBackends, leak_reservations, leaked_seats, replaced_connections},
    sale::{self, Sale},
    testbed::{Images, SYSTEM, TICKETING, Testbed, TestbedError, is_true},
    traffic::{Count, Traffic},
};
use contract::CheckStatus;
use crds::{
    ConditionType, ResiliencePolicy,
    status::{ActionOutcome, ActionRecord, CheckFinding},
};
use serde_json::json;
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

/// Pods of the booking service.
const REPLICAS: u32 = 3;
/// Each buyer books this often.
const PAUSE: Duration = Duration::from_millis(200);
/// Bookings that a healthy start must show before anything is broken.
const WARM_UP: u64 = 40;
/// Reservations that are leaked.
const LEAKED: u32 = 7;
/// Longest wait for something to happen.
const LIMIT: Duration = Duration::from_secs(90);

/// Prints one line per event, each with the time since the start.
struct Timeline {
    start: Instant,
    colour: bool,
}

impl Timeline {
    fn begin() -> Self {
        Self { start: Instant::now(), colour: std::io::stdout().is_terminal() }
    }

    fn print(&self, tone: Tone, what: &str, text: &str) {
        let time = self.start.elapsed().as_secs_f64();
        let (on, off) = match (self.colour, tone) {
            (false, _) | (true, Tone::Plain) => ("", ""),
            (true, Tone::Good) => ("\x1b[32m", "\x1b[0m"),
            (true, Tone::Bad) => ("\x1b[31m", "\x1b[0m"),
        };
        println!("{time:>7.2} s  {on}{what:<11}{off} {text}");
    }
}

#[derive(Clone, Copy)]
enum Tone {
    Plain,
    Good,
    Bad,
}

/// Runs the demo. An error means that something did not happen.
pub async fn run(kind: ProviderKind, name: Option<&str>, nodes: u32, progress: &Progress) -> Result<(), TestbedError> {
    let images = Images::find(kind, progress).await?;
    let testbed = Testbed::open(kind, name, nodes, progress).await?;
    testbed.install_operator(&images, &[]).await?;
    testbed.install_all(&images, REPLICAS).await?;
    // From an earlier run: the timeline begins with nothing programmed.
    testbed.delete_resources().await?;
    println!();
    let shown = show(&testbed).await;
    println!();
    if shown.is_ok() {
        farewell(&testbed);
    } else {
        eprintln!("The operator's log:  kubectl logs -n {SYSTEM} deployment/resilience-operator");
        eprintln!("The policy's Events: kubectl describe rpol booking -n {TICKETING}");
    }
    shown
}

async fn show(testbed: &Testbed) -> Result<(), TestbedError> {
    let traffic = Traffic::start(testbed, PAUSE).await?;
    // The services may have started before their database: the timeline begins when each of them sells.
    wait_for_bookings(&traffic, WARM_UP).await?;
    let time = Timeline::begin();

    let applied = Instant::now();
    testbed.apply_file("crds/samples/quickstart.yaml").await?;
    testbed.apply_file("crds/samples/flags.yaml").await?;
    time.print(Tone::Plain, "applied", "ResiliencePolicy booking and FeatureFlag ticketing (crds/samples)");
    let programmed = testbed
        .policy_until("booking", Duration::from_secs(120), "the policy live in every pod", |policy| {
            is_true(policy, ConditionType::Programmed.as_str()) && ratio(policy) == format!("{REPLICAS}/{REPLICAS}")
        })
        .await?;
    let hash =
        programmed.status.iter().flat_map(|s| &s.targets).find_map(|t| t.content_hash.clone()).unwrap_or_default();
    let text = format!(
        "{} live in {} pods, {} ms after the apply",
        hash.get(..6).unwrap_or_default(),
        ratio(&programmed),
        applied.elapsed().as_millis()
    );
    time.print(Tone::Good, "programmed", &text);

    // Under the built-in defaults a version conflict is not retried; under the policy it is.
    let first = traffic.count.now();
    wait_for_bookings(&traffic, first.0 + WARM_UP).await?;
    print_bookings(&time, &traffic, first);

    cured_by_the_pool(testbed, &time, &traffic).await?;
    println!();
    leaked_reservations(testbed, &time, &traffic).await?;
    println!();
    outdated_sessions(testbed, &time, &traffic).await?;
    println!();
    sale(testbed, &time, &traffic).await
}

/// What needs no operator: idle connections that do not answer any more.
async fn cured_by_the_pool(testbed: &Testbed, time: &Timeline, traffic: &Traffic) -> Result<(), TestbedError> {
    let Some((victim, own)) = traffic.by_pod.first() else { return Ok(()) };
    let replaced = replaced_connections(testbed, victim).await?;
    let before = traffic.count.now();
    let stopped = StoppedBackends::of(testbed, &[victim.as_str()]).await?;
    let silent = stopped.pids.len();
    let text = format!(
        "{victim}: the {silent} processes that serve its database connections are stopped (SIGSTOP); new connections would work"
    );
    time.print(Tone::Bad, "broken", &text);
    let cured = crate::testbed::until(LIMIT, "every silent connection replaced by the pod's pool", || async {
        let now = replaced_connections(testbed, victim).await?.saturating_sub(replaced);
        Ok(if now >= silent { Ok(()) } else { Err(format!("{now} of {silent} replaced")) })
    });
    let cured = cured.await;
    let took = stopped.since.elapsed();
    let sells = if cured.is_ok() { sells_again(victim, own).await } else { Ok(()) };
    // Also after a failure the database is left as it was found.
    stopped.resume(testbed).await?;
    cured.and(sells)?;
    let policy = testbed.policies().get("booking").await?;
    if let Some(record) = record(&policy, "database", Some(victim)) {
        return Err(TestbedError::unexpected("no action of the operator", &format!("{record:?}")));
    }
    let text = format!(
        "{victim}: all {silent} replaced by the pool itself in {:.1} s; the operator did nothing, nothing was restarted",
        took.as_secs_f64()
    );
    time.print(Tone::Good, "cured", &text);
    print_bookings(time, traffic, before);
    Ok(())
}

/// What no pod can cure, and none is to blame for: seats of reservations that are gone. One Job puts it right for all pods.
async fn leaked_reservations(testbed: &Testbed, time: &Timeline, traffic: &Traffic) -> Result<(), TestbedError> {
    let before = traffic.count.now();
    leak_reservations(testbed, LEAKED).await?;
    let broken_at = Instant::now();
    let text = format!("{LEAKED} reservations were deleted by hand: nobody has their seats, and nobody can buy them");
    time.print(Tone::Bad, "broken", &text);
    follow_recovery(testbed, time, "booking-consistency", None, broken_at).await?;
    crate::testbed::until(LIMIT, "every seat free or sold", || async {
        // A booking may be between the two figures for a moment.
        let leaked = leaked_seats(testbed).await?;
        Ok(if leaked == 0 { Ok(()) } else { Err(format!("{leaked} are neither")) })
    })
    .await?;
    let text = "every seat is free or sold again: one Job did it for the whole workload, nothing was restarted";
    time.print(Tone::Good, "recovered", text);
    print_bookings(time, traffic, before);
    Ok(())
}

/// What a pod could cure, and its pool does not know of: sessions that answer and fail what they are asked to do.
async fn outdated_sessions(testbed: &Testbed, time: &Timeline, traffic: &Traffic) -> Result<(), TestbedError> {
    let names: Vec<_> = traffic.by_pod.iter().map(|(name, _)| name.as_str()).collect();
    let (Some((victim, others)), Some((_, own))) = (names.split_last(), traffic.by_pod.last()) else { return Ok(()) };
    let uid = pod_uid(testbed, victim).await?;
    let before = traffic.count.now();
    let outdated = OutdatedSessions::of(testbed, &[*victim], others).await?;
    let text = format!(
        "{victim}: a migration changes a column; its {} database sessions are older: they answer, and fail every booking",
        outdated.pids.len()
    );
    time.print(Tone::Bad, "broken", &text);
    let recovered = follow_recovery(testbed, time, "database", Some(victim), outdated.since).await;
    // Also after a failure the pod is left as it was found.
    outdated.end(testbed).await?;
    recovered?;
    sells_again(victim, own).await?;
    if pod_uid(testbed, victim).await? != uid {
        return Err(TestbedError::unexpected("the same pod as before", "another one"));
    }
    time.print(Tone::Good, "recovered", &format!("{victim} takes bookings again; it was never restarted"));
    print_bookings(time, traffic, before);
    Ok(())
}

/// Identity and restarts of a booking pod.
async fn pod_uid(testbed: &Testbed, name: &str) -> Result<(String, i32), TestbedError> {
    let pods = testbed.booking_pods().await?;
    let pod = pods.into_iter().find(|pod| pod.metadata.name.as_deref() == Some(name));
    let pod = pod.ok_or_else(|| TestbedError::unexpected(name, "no such pod"))?;
    let containers = pod.status.and_then(|status| status.container_statuses).unwrap_or_default();
    let restarts = containers.iter().map(|container| container.restart_count).sum();
    Ok((pod.metadata.uid.unwrap_or_default(), restarts))
}

async fn sells_again(pod: &str, count: &Count) -> Result<(), TestbedError> {
    let begin = count.now().0;
    crate::testbed::until(Duration::from_secs(30), &format!("{pod} takes bookings again"), || async {
        let sold = count.now().0 - begin;
        Ok(if sold >= 5 { Ok(()) } else { Err(format!("{sold} bookings since")) })
    })
    .await
}

/// The last part: a sale through all services, and another one while the first payment provider is away.
async fn sale(testbed: &Testbed, time: &Timeline, traffic: &Traffic) -> Result<(), TestbedError> {
    let others = ["gateway", "catalog", "payment", "notification"];
    for file in others {
        testbed.apply_file(&format!("crds/samples/{file}.yaml")).await?;
    }
    for name in others {
        let live =
            |policy: &ResiliencePolicy| is_true(policy, ConditionType::Programmed.as_str()) && ratio(policy) == "1/1";
        testbed.policy_until(name, Duration::from_secs(120), "the policy live in its pod", live).await?;
    }
    time.print(Tone::Good, "programmed", "the policies of gateway, catalog, payment and notification are live, too");

    let sold = sell_by(testbed, "stripe", Some("ann@example.com")).await?;
    let begin = Instant::now();
    sale::mailed(testbed, &sold.booking).await?;
    let text = format!(
        "gateway → catalog → booking → payment → notification: {}, charged by stripe, mailed {:.1} s later",
        sold.status,
        begin.elapsed().as_secs_f64()
    );
    time.print(Tone::Good, "sold", &text);

    sale::stripe(testbed, &json!({"refuse": true})).await?;
    let before = traffic.count.now();
    time.print(Tone::Bad, "broken", "the Stripe-shaped provider refuses connections");
    let during = sell_during(testbed, time).await;
    // Also after a failure the provider is left as it was found.
    sale::stripe(testbed, &json!({})).await?;
    during?;
    let after = traffic.count.now();
    let text = format!("{} succeeded, {} failed while it was away", after.0 - before.0, after.1 - before.1);
    time.print(Tone::Plain, "bookings", &text);
    time.print(Tone::Good, "done", "the provider is back; its circuit tries it again when its break of 2 min is over");
    Ok(())
}

async fn sell_during(testbed: &Testbed, time: &Timeline) -> Result<(), TestbedError> {
    let begin = Instant::now();
    let sold = sell_by(testbed, "paypal", None).await?;
    let text = format!("{}, charged by paypal, {} ms for all of it", sold.status, begin.elapsed().as_millis());
    time.print(Tone::Good, "sold", &text);
    let open = |policy: &ResiliencePolicy| {
        let circuits = policy.status.iter().flat_map(|status| &status.circuits);
        circuits.into_iter().any(|circuit| circuit.dependency == "stripe" && circuit.open_pods > 0)
    };
    testbed.policy_until("payment", Duration::from_secs(60), "the circuit to stripe open", open).await?;
    time.print(
        Tone::Bad,
        "circuit",
        "stripe is open in 1/1 pods of payment: no call waits for it (`kubectl get rpol`)",
    );
    Ok(())
}

/// Sells one seat that this provider, and nobody else, charges for.
async fn sell_by(testbed: &Testbed, provider: &str, email: Option<&str>) -> Result<Sale, TestbedError> {
    let sold = sale::sell(testbed, email).await?;
    if sold.status == "Confirmed" && sold.charged_by == [provider] {
        return Ok(sold);
    }
    Err(TestbedError::unexpected(&format!("a sale that is confirmed and charged by {provider}"), &format!("{sold:?}")))
}

/// Prints detection, action and verification as the policy's status shows them. `victim`: the pod that the check fails in,
/// unless it is a fact about the whole workload.
async fn follow_recovery(
    testbed: &Testbed,
    time: &Timeline,
    check: &str,
    victim: Option<&str>,
    broken_at: Instant,
) -> Result<(), TestbedError> {
    let place = victim.map_or_else(String::new, |victim| format!("{victim}: "));
    let is_it = |finding: &&CheckFinding| {
        finding.name == check && victim.is_none_or(|victim| finding.pods.iter().any(|pod| pod == victim))
    };
    let find = |policy: &ResiliencePolicy| {
        let mut findings = policy.status.iter().flat_map(|status| &status.checks);
        findings.find(is_it).map(|finding| finding.message.clone())
    };
    let cause = match victim {
        Some(victim) => cause(testbed, victim, check).await?,
        None => "; all pods say so",
    };
    let expected = format!("the check {check} failing");
    let found = testbed.policy_until("booking", LIMIT, &expected, |policy| find(policy).is_some()).await?;
    let since = broken_at.elapsed().as_secs_f64();
    let message = find(&found).unwrap_or_default();
    time.print(Tone::Bad, "detected", &format!("{place}{check}: {message}{cause}; {since:.1} s after the break"));

    let executing = testbed
        .policy_until("booking", LIMIT, "an action for it", |policy| record(policy, check, victim).is_some())
        .await?;
    if let Some(record) = record(&executing, check, victim) {
        let name = record.recovery.as_deref().unwrap_or(&record.id);
        let text = format!("{place}{:?} (step {} of {}, recovery {name})", record.action, record.step, record.steps);
        time.print(Tone::Plain, "action", &text);
    }

    let over = testbed
        .policy_until("booking", LIMIT, "the outcome of the action", |policy| {
            record(policy, check, victim).is_some_and(|record| record.finished_at.is_some())
        })
        .await?;
    let record = record(&over, check, victim).cloned();
    let message = record.as_ref().and_then(|record| record.message.clone()).unwrap_or_default();
    if record.is_none_or(|record| record.outcome != ActionOutcome::Succeeded) {
        return Err(TestbedError::Expected {
            expected: "a recovery that succeeds".into(),
            seen: message,
            waited: broken_at.elapsed(),
        });
    }
    time.print(Tone::Good, "verified", &format!("{place}{check} {message}"));
    Ok(())
}

/// Whom the report of a pod whose check fails names as the cause, in words. It is asked before the operator acts.
async fn cause(testbed: &Testbed, pod: &str, check: &str) -> Result<&'static str, TestbedError> {
    let report = crate::testbed::until(LIMIT, &format!("{check} failing in {pod}"), || async {
        let report = PodAdmin::find(testbed).await?.health(pod).await?.checks.remove(check);
        Ok(match report {
            Some(report) if report.status == CheckStatus::Unhealthy => Ok(report),
            other => Err(format!("{other:?}")),
        })
    })
    .await?;
    Ok(match report.dependency_answers {
        Some(true) => "; a new connection works, so the pod is the cause",
        _ => "",
    })
}

/// The latest action for a check of a pod, or of the workload.
fn record<'a>(policy: &'a ResiliencePolicy, check: &str, pod: Option<&str>) -> Option<&'a ActionRecord> {
    let recovery = policy.status.as_ref()?.recovery.as_ref()?;
    let mut records = recovery.in_flight.iter().chain(&recovery.last);
    records.find(|record| record.check == check && record.pod.as_deref() == pod)
}

fn ratio(policy: &ResiliencePolicy) -> String {
    policy.status.as_ref().and_then(|status| status.programmed.clone()).unwrap_or_default()
}

async fn wait_for_bookings(traffic: &Traffic, wanted: u64) -> Result<(), TestbedError> {
    crate::testbed::until(Duration::from_secs(60), "bookings that succeed in every pod", || async {
        let slowest = traffic.by_pod.iter().map(|(_, count)| count.now().0).min().unwrap_or_default();
        let (succeeded, failed) = traffic.count.now();
        let enough = succeeded >= wanted && slowest >= 4;
        Ok(if enough {
            Ok(())
        } else {
            Err(format!("{succeeded} succeeded, {failed} failed, {slowest} in the slowest pod"))
        })
    })
    .await
}

fn print_bookings(time: &Timeline, traffic: &Traffic, since: (u64, u64)) {
    let (succeeded, failed) = traffic.count.now();
    let text = format!("{} succeeded, {} failed meanwhile", succeeded - since.0, failed - since.1);
    time.print(Tone::Plain, "bookings", &text);
}

fn farewell(testbed: &Testbed) {
    let kubectl = testbed.kubectl.program().display();
    if let Some(kubeconfig) = testbed.cluster.kubeconfig() {
        println!("The cluster is still up:  export KUBECONFIG={}", kubeconfig.display());
    }
    println!("Try next:");
    println!("  {kubectl} describe rpol booking -n {TICKETING}        # what just happened, as Events");
    println!(
        "  {kubectl} edit rpol booking -n {TICKETING}            # change a timeout; watch `get rpol -w` in another window"
    );
    println!("  {kubectl} get recoveries -n {TICKETING}              # what was done, why, and what came of it");
    println!("Remove it all with: make demo-down");
}
