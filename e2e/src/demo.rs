//! The demo: the whole loop on a real cluster, printed as a timeline while it happens.

use crate::{
    pod_admin::PodAdmin,
    progress::Progress,
    provider::ProviderKind,
    sabotage::{HungCalls, StoppedBackends, have_patient_calls, replaced_connections},
    sale::{self, Sale},
    testbed::{Images, SYSTEM, TICKETING, Testbed, TestbedError, is_true},
    traffic::{Count, Traffic},
};
use crds::{ConditionType, ResiliencePolicy, status::ActionOutcome};
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
/// `request` and `perTry` of calls that wait long enough for a hang to need the operator.
const PATIENT: (&str, &str) = ("60s", "50s");
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
    recovered_by_the_operator(testbed, &time, &traffic).await?;
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
    if let Some(record) = record(&policy, victim) {
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

/// What the pool cannot know: calls that are meant to wait long, and hang.
async fn recovered_by_the_operator(testbed: &Testbed, time: &Timeline, traffic: &Traffic) -> Result<(), TestbedError> {
    let Some((victim, own)) = traffic.by_pod.last() else { return Ok(()) };
    let applied = Instant::now();
    have_patient_calls(testbed, PATIENT).await?;
    let ready = |policy: &ResiliencePolicy| is_true(policy, ConditionType::Programmed.as_str());
    testbed.policy_until("booking", LIMIT, "the change live in every pod", ready).await?;
    let text = format!(
        "database.timeout.perTry {} instead of 1s, live {} ms after the change: calls that hang are not given up any more",
        PATIENT.1,
        applied.elapsed().as_millis()
    );
    time.print(Tone::Plain, "changed", &text);
    let uid = pod_uid(testbed, victim).await?;
    let before = traffic.count.now();
    let hung = HungCalls::of(testbed, victim).await?;
    let text =
        format!("{victim}: a rush, and all {} connections hang in the middle of a booking (SIGSTOP)", hung.count());
    time.print(Tone::Bad, "broken", &text);
    let recovered = follow_recovery(testbed, time, victim, hung.since()).await;
    // Also after a failure the database is left as it was found.
    hung.resume(testbed).await?;
    recovered?;
    print_bookings(time, traffic, before);
    sells_again(victim, own).await?;
    if pod_uid(testbed, victim).await? != uid {
        return Err(TestbedError::unexpected("the same pod as before", "another one"));
    }
    time.print(Tone::Good, "recovered", &format!("{victim} takes bookings again; it was never restarted"));
    testbed.apply_file("crds/samples/quickstart.yaml").await
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

/// Prints detection, action and verification as the policy's status shows them.
async fn follow_recovery(
    testbed: &Testbed,
    time: &Timeline,
    victim: &str,
    broken_at: Instant,
) -> Result<(), TestbedError> {
    let since = |at: Instant| format!("{:.1} s after the break", at.elapsed().as_secs_f64());
    let found = testbed
        .policy_until("booking", LIMIT, "the check database failing in the broken pod", |policy| {
            let findings = policy.status.iter().flat_map(|status| &status.checks);
            findings
                .into_iter()
                .any(|finding| finding.name == "database" && finding.pods.iter().any(|pod| pod == victim))
        })
        .await?;
    let message = found.status.iter().flat_map(|s| &s.checks).find(|f| f.name == "database").map(|f| f.message.clone());
    let report = PodAdmin::find(testbed).await?.health(victim).await?;
    let cause = match report.checks.get("database").and_then(|check| check.dependency_answers) {
        Some(true) => "; a fresh connection answers, so the pod is the cause",
        _ => "",
    };
    let text = format!("{victim}: database: {}{cause}; {}", message.unwrap_or_default(), since(broken_at));
    time.print(Tone::Bad, "detected", &text);

    let executing = testbed
        .policy_until("booking", LIMIT, "an action for the broken pod", |policy| record(policy, victim).is_some())
        .await?;
    if let Some(record) = record(&executing, victim) {
        let name = record.recovery.as_deref().unwrap_or(&record.id);
        let text = format!("{victim}: {:?} (step {} of {}, recovery {name})", record.action, record.step, record.steps);
        time.print(Tone::Plain, "action", &text);
    }

    let over = testbed
        .policy_until("booking", LIMIT, "the outcome of the action", |policy| {
            record(policy, victim).is_some_and(|record| record.finished_at.is_some())
        })
        .await?;
    let record = record(&over, victim).cloned();
    let message = record.as_ref().and_then(|record| record.message.clone()).unwrap_or_default();
    if record.is_none_or(|record| record.outcome != ActionOutcome::Succeeded) {
        return Err(TestbedError::Expected {
            expected: "a recovery that succeeds".into(),
            seen: message,
            waited: broken_at.elapsed(),
        });
    }
    time.print(Tone::Good, "verified", &format!("{victim}: database {message}"));
    Ok(())
}

/// The latest action for a pod.
fn record<'a>(policy: &'a ResiliencePolicy, pod: &str) -> Option<&'a crds::status::ActionRecord> {
    let recovery = policy.status.as_ref()?.recovery.as_ref()?;
    recovery.in_flight.iter().chain(&recovery.last).find(|record| record.pod.as_deref() == Some(pod))
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
