//! Faults at random, alone and two at once, some while a person has paused recovery or the API server answers nobody: each is
//! recovered by the steps that the policy has for it and by no other, or left alone and explained by a condition.

use crate::{
    SOON,
    incident::Before,
    on_the_first_node, programmed, selling,
    services_faults::{Done, all_sell},
    testbed, words,
};
use contract::admin::MemoryFault;
use crds::{ConditionType, Recovery, ResiliencePolicy, resilience_policy::StepAction};
use e2e::{
    memory_growth::{MAX_GROWTH_PERCENT, Readings, grown},
    pod_admin::PodAdmin,
    provider::ProviderKind,
    quick_policy::quick_policy_with_readiness,
    sabotage::{
        OutdatedSessions, StoppedBackends, StoppedProcess, give_database_back, leak_reservations, leaked_seats,
        take_database_away, take_writes,
    },
    testbed::{SYSTEM, TICKETING, Testbed, TestbedError, is_true, phase, reason, until},
};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::json;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// Rounds when `MINUTES` says nothing; `make soak-recovery` asks for half an hour.
const ROUNDS: usize = 3;
/// Longest wait for a round to be over.
const LONGEST: Duration = Duration::from_secs(180);
/// How long the API server answers nobody: less than the operator's lease lasts.
const FROZEN: Duration = Duration::from_secs(5);
/// A shorter soak says nothing of the operator's memory.
const LONG_ENOUGH: Duration = Duration::from_secs(600);
/// Time between two readings of the operator's memory.
const READ_EVERY: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// The connections of a pod hang; its pool replaces them.
    SilentConnections,
    /// A pod's sessions answer and are of no use.
    OutdatedSessions,
    /// A pod holds memory that it does not need.
    LeakedMemory,
    /// A pod's process hangs.
    StoppedProcess,
    /// Somebody deletes a pod; its Deployment replaces it.
    DeletedPod,
    /// Seats belong to nobody.
    LeakedReservations,
    /// The database refuses all pods.
    DatabaseAway,
    /// The database takes no writes.
    ReadOnlyDatabase,
}

impl Fault {
    /// Those of one pod, or of the books.
    const LOCAL: [Self; 6] = [
        Self::SilentConnections,
        Self::OutdatedSessions,
        Self::LeakedMemory,
        Self::StoppedProcess,
        Self::DeletedPod,
        Self::LeakedReservations,
    ];
    /// Those of the database, which nobody but the database can end.
    const OF_THE_DATABASE: [Self; 2] = [Self::DatabaseAway, Self::ReadOnlyDatabase];

    /// What the policy has for it.
    fn steps(self) -> &'static [(StepAction, &'static str)] {
        match self {
            Self::OutdatedSessions => &[(StepAction::ResetConnections, "Succeeded")],
            Self::LeakedMemory => &[(StepAction::TrimMemory, "Failed"), (StepAction::RestartPod, "Succeeded")],
            Self::StoppedProcess => &[(StepAction::RestartPod, "Succeeded")],
            Self::LeakedReservations => &[(StepAction::RunCleanupJob, "Succeeded")],
            Self::SilentConnections | Self::DeletedPod | Self::DatabaseAway | Self::ReadOnlyDatabase => &[],
        }
    }

    /// A migration waits for the tables, and what hangs may hold them. And of three pods, two that have to be restarted are more
    /// than may be unhealthy for that: they wait for a person.
    fn goes_with(self, other: Self) -> bool {
        const APART: [[Fault; 2]; 2] =
            [[Fault::OutdatedSessions, Fault::SilentConnections], [Fault::LeakedMemory, Fault::StoppedProcess]];
        self != other && !APART.iter().any(|pair| pair.contains(&self) && pair.contains(&other))
    }
}

/// What is done in one round.
#[derive(Debug)]
struct Round {
    faults: Vec<Fault>,
    /// A person has recovery paused when they come.
    paused: bool,
    /// The API server stops for a while when they have come.
    frozen: bool,
    /// How long the database keeps its fault.
    lasts: Duration,
}

impl Round {
    fn draw(random: &mut StdRng, may_freeze: bool) -> Self {
        let mut faults = Vec::new();
        if random.random_ratio(1, 4) {
            faults.push(Fault::OF_THE_DATABASE[random.random_range(0..Fault::OF_THE_DATABASE.len())]);
        } else {
            let mut all = Fault::LOCAL;
            all.shuffle(random);
            faults.push(all[0]);
            if random.random_ratio(1, 2) {
                faults.extend(all.iter().find(|fault| fault.goes_with(all[0])));
            }
        }
        let needs_help = faults.iter().any(|fault| !fault.steps().is_empty());
        Self {
            paused: needs_help && random.random_ratio(1, 5),
            frozen: may_freeze && random.random_ratio(1, 6),
            lasts: Duration::from_secs(random.random_range(3..15)),
            faults,
        }
    }

    fn is_of_the_database(&self) -> bool {
        self.faults.iter().any(|fault| Fault::OF_THE_DATABASE.contains(fault))
    }
}

/// Faults that were brought about, and what ends those that do not end by themselves.
#[derive(Default)]
struct Brought {
    silent: Option<StoppedBackends>,
    outdated: Option<OutdatedSessions>,
    stopped: Option<StoppedProcess>,
    /// Pods that are to be replaced, by uid, by the operator or by Kubernetes.
    gone: Vec<String>,
    /// Pods that are to be reset.
    resets: BTreeMap<String, u64>,
    /// The pod whose connections are silent.
    silent_pod: Option<String>,
}

impl Brought {
    /// Brings each fault about in another pod.
    async fn about(testbed: &Testbed, faults: &[Fault], random: &mut StdRng) -> Self {
        let mut pods = testbed.booking_pods().await.unwrap();
        pods.shuffle(random);
        let mut brought = Self::default();
        for (fault, pod) in faults.iter().zip(&pods) {
            let (name, uid) = (pod.name_any(), pod.uid().unwrap());
            let others: Vec<_> = pods.iter().map(ResourceExt::name_any).filter(|other| *other != name).collect();
            let others: Vec<_> = others.iter().map(String::as_str).collect();
            match fault {
                Fault::SilentConnections => {
                    brought.silent = Some(StoppedBackends::of(testbed, &[&name]).await.unwrap());
                    brought.silent_pod = Some(name);
                }
                Fault::OutdatedSessions => {
                    brought.outdated = Some(OutdatedSessions::of(testbed, &[&name], &others).await.unwrap());
                    brought.resets.insert(name, 1);
                }
                Fault::LeakedMemory => {
                    let fault = MemoryFault { mebibytes: 64, lease_seconds: 600 };
                    PodAdmin::find(testbed).await.unwrap().fill_memory(&name, fault).await.unwrap();
                    brought.gone.push(uid);
                }
                Fault::StoppedProcess => {
                    brought.stopped = Some(StoppedProcess::of(testbed, &name).await.unwrap());
                    brought.gone.push(uid);
                }
                Fault::DeletedPod => {
                    let pods: Api<Pod> = Api::namespaced(testbed.client.clone(), TICKETING);
                    pods.delete(&name, &DeleteParams::default()).await.unwrap();
                    brought.gone.push(uid);
                }
                Fault::LeakedReservations => leak_reservations(testbed, 7).await.unwrap(),
                Fault::DatabaseAway => take_database_away(testbed).await.unwrap(),
                Fault::ReadOnlyDatabase => take_writes(testbed, false).await.unwrap(),
            }
        }
        brought
    }

    /// Ends what would go on for ever; what was cured is gone already.
    async fn end(self, testbed: &Testbed, faults: &[Fault]) {
        for fault in faults {
            match fault {
                Fault::DatabaseAway => give_database_back(testbed).await.unwrap(),
                Fault::ReadOnlyDatabase => take_writes(testbed, true).await.unwrap(),
                _ => {}
            }
        }
        if let Some(silent) = self.silent {
            silent.resume(testbed).await.unwrap();
        }
        if let Some(outdated) = self.outdated {
            outdated.end(testbed).await.unwrap();
        }
        if let Some(stopped) = self.stopped {
            // An error if it is gone, as it should be.
            let _ = stopped.resume(testbed).await;
        }
    }
}

#[tokio::test]
async fn faults_at_random_are_recovered_as_the_policy_says_or_explained() {
    let (testbed, turn) = testbed().await;
    let minutes: Option<u64> = std::env::var("MINUTES").ok().and_then(|minutes| minutes.parse().ok());
    let time = minutes.map(|minutes| Duration::from_secs(minutes * 60));
    let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random::<u64>);
    println!("random faults with SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (images, own) = (turn.as_ref().unwrap(), on_the_first_node(&testbed));
    if time.is_some() {
        // So many faults in so short a time are a storm, and that would be stopped.
        testbed.install_operator(images, &[words(&own), vec!["storm.actions=0"]].concat()).await.unwrap();
    }
    testbed.kubectl.apply(&quick_policy_with_readiness("booking").to_string()).await.unwrap();
    programmed(&testbed).await;
    let (begin, operator) = (Instant::now(), operator_pod(&testbed).await);
    let memory = Memory::read(&testbed, &operator.name_any(), begin);
    let before = Before::look(&testbed).await;
    let mut times = BTreeMap::<Vec<Fault>, Vec<Duration>>::new();
    let (mut evictions, mut jobs, mut rounds) = (0, 0, 0);
    while time.map_or(rounds < ROUNDS, |time| begin.elapsed() < time) {
        rounds += 1;
        let round = Round::draw(&mut random, crate::provider() != ProviderKind::Existing);
        let took = play(&testbed, &round, &mut random).await;
        println!("{:>4} s, round {rounds}: {round:?}: {:.1} s", begin.elapsed().as_secs(), took.as_secs_f64());
        let steps = round.faults.iter().flat_map(|fault| fault.steps());
        evictions += steps.clone().filter(|(action, _)| *action == StepAction::RestartPod).count();
        jobs += steps.filter(|(action, _)| *action == StepAction::RunCleanupJob).count();
        let mut faults = round.faults;
        faults.sort_unstable();
        times.entry(faults).or_default().push(took);
    }
    // Also between the rounds.
    let after = Before::look(&testbed).await;
    if testbed.cluster.audit_log().await.unwrap().is_some() {
        let done = (after.evictions - before.evictions, after.jobs - before.jobs);
        assert_eq!(done, (evictions, jobs), "evictions and Jobs over all rounds");
    }
    let still = operator_pod(&testbed).await;
    assert_eq!(still.uid(), operator.uid(), "the operator is the same");
    let restarts = still.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    assert_eq!(restarts.map(|one| one.restart_count).sum::<i32>(), 0, "and has not been restarted");
    println!("\n{rounds} rounds; until all was well again, in seconds:");
    for (faults, mut times) in times {
        times.sort_unstable();
        let shown: Vec<_> = times.iter().map(|time| format!("{:.1}", time.as_secs_f64())).collect();
        println!("{:<44}{}", format!("{faults:?}"), shown.join(" "));
    }
    let lasted = begin.elapsed();
    if time.is_some() {
        testbed.install_operator(images, &words(&own)).await.unwrap();
    }
    let grown = grown(&memory.readings(), lasted / 3, lasted);
    if lasted >= LONG_ENOUGH {
        assert!(grown.is_empty(), "more than {MAX_GROWTH_PERCENT} % more memory than after a third of the time");
    }
}

/// One round, from all well to all well; the answer is how long that took once the faults were there.
async fn play(testbed: &Testbed, round: &Round, random: &mut StdRng) -> Duration {
    let traffic = selling(testbed).await;
    let (before, known) = (Before::look(testbed).await, uids(&testbed.recoveries().await.unwrap()));
    if round.paused {
        pause_recovery(testbed, true).await.unwrap();
    }
    let mut brought = Brought::about(testbed, &round.faults, random).await;
    let since = Instant::now();
    if round.frozen {
        testbed.cluster.pause_api_server().await.unwrap();
        tokio::time::sleep(FROZEN).await;
        testbed.cluster.resume_api_server().await.unwrap();
    }
    let silent_pod = brought.silent_pod.clone();
    let silent_pod = silent_pod.as_deref();
    let recovered = async {
        if round.paused {
            explained(testbed, "Paused").await?;
            let begun = new_recoveries(testbed, &known).await?;
            assert!(begun.is_empty(), "recovery is paused: {begun:#?}");
            pause_recovery(testbed, false).await?;
        }
        if round.is_of_the_database() {
            explained(testbed, "DependencyIsTheCause").await?;
            tokio::time::sleep(round.lasts).await;
            return Ok(());
        }
        recovered_by(testbed, round, silent_pod, &known).await.map(|_| ())
    };
    let recovered = recovered.await;
    drop(traffic);
    let (gone, mut resets) = (std::mem::take(&mut brought.gone), std::mem::take(&mut brought.resets));
    // Also after a failure the faults are ended; what is silent stays so until the pods sell in spite of it.
    let sells = if brought.silent.is_some() && recovered.is_ok() { Some(selling(testbed).await) } else { None };
    brought.end(testbed, &round.faults).await;
    recovered.unwrap_or_else(|error| panic!("{round:?}: {error}"));
    let healthy = |policy: &ResiliencePolicy| is_true(policy, ConditionType::Healthy.as_str());
    testbed.policy_until("booking", SOON, "all checks healthy", healthy).await.unwrap();
    programmed(testbed).await;
    let took = since.elapsed();
    let traffic = match sells {
        Some(traffic) => traffic,
        None => selling(testbed).await,
    };
    all_sell(&traffic, SOON).await;
    drop(traffic);
    until(SOON, "every seat is free or sold", || async {
        let leaked = leaked_seats(testbed).await?;
        Ok(if leaked == 0 { Ok(()) } else { Err(format!("{leaked} are neither")) })
    })
    .await
    .unwrap();
    let also = recovered_by(testbed, round, silent_pod, &known).await;
    resets.extend(also.unwrap_or_else(|error| panic!("{round:?}: {error}")).map(|pod| (pod, 1)));
    expect(testbed, round, &before, gone, resets).await;
    took
}

/// Waits until the policy says that something is wrong and why nothing is done about it.
async fn explained(testbed: &Testbed, why: &str) -> Result<(), TestbedError> {
    let explained = |policy: &ResiliencePolicy| {
        reason(policy, ConditionType::RecoveryAllowed.as_str()) == Some(why)
            && reason(policy, ConditionType::Healthy.as_str()) == Some("CheckUnhealthy")
    };
    testbed.policy_until("booking", SOON, &format!("a failing check, and {why}"), explained).await.map(drop)
}

async fn pause_recovery(testbed: &Testbed, pause: bool) -> Result<(), TestbedError> {
    let requests = if pause { json!(["a drill"]) } else { json!([]) };
    testbed.patch_policy("booking", &json!({ "recovery": { "pauseRequests": requests } })).await.map(drop)
}

/// Waits until exactly the steps that the faults need are over; and at most one reset of the pod whose connections are silent. A
/// session of it that hangs may hold what all others of the pod wait for: then its check fails, and a reset is right. The answer is
/// that pod, if it was reset.
async fn recovered_by(
    testbed: &Testbed,
    round: &Round,
    silent_pod: Option<&str>,
    known: &[String],
) -> Result<Option<String>, TestbedError> {
    let shown = |(action, phase): (StepAction, &str)| format!("{action:?} {phase}");
    let mut wanted: Vec<_> = round.faults.iter().flat_map(|fault| fault.steps()).map(|step| shown(*step)).collect();
    wanted.sort_unstable();
    until(LONGEST, &format!("{wanted:?}"), || async {
        let new = new_recoveries(testbed, known).await?;
        let of_silent_pod = |one: &&Recovery| {
            let pod = one.spec.pod.as_ref().map(|pod| pod.name.as_str());
            one.spec.action == StepAction::ResetConnections && silent_pod.is_some() && pod == silent_pod
        };
        let reset = new.iter().find(of_silent_pod);
        let needed = new.iter().filter(|one| reset.is_none_or(|reset| reset.uid() != one.uid()));
        let mut seen: Vec<_> = needed.map(|one| shown((one.spec.action, phase(one)))).collect();
        seen.sort_unstable();
        let all_over = seen == wanted && reset.is_none_or(|reset| phase(reset) == "Succeeded");
        let pod = reset.and_then(|reset| reset.spec.pod.as_ref()).map(|pod| pod.name.clone());
        Ok(if all_over { Ok(pod) } else { Err(format!("{seen:?}: {}", serde_json::to_string(&new).unwrap())) })
    })
    .await
}

async fn new_recoveries(testbed: &Testbed, known: &[String]) -> Result<Vec<Recovery>, TestbedError> {
    let mut all = testbed.recoveries().await?;
    all.retain(|one| one.uid().is_none_or(|uid| !known.contains(&uid)));
    Ok(all)
}

fn uids(all: &[Recovery]) -> Vec<String> {
    all.iter().filter_map(ResourceExt::uid).collect()
}

/// What was done, as the pods count it and as the API server's log has it.
async fn expect(
    testbed: &Testbed,
    round: &Round,
    before: &Before,
    mut gone: Vec<String>,
    resets: BTreeMap<String, u64>,
) {
    gone.sort_unstable();
    let logged = testbed.cluster.audit_log().await.unwrap().is_some();
    let count = |wanted: StepAction| {
        let steps = round.faults.iter().flat_map(|fault| fault.steps());
        if logged { steps.filter(|(action, _)| *action == wanted).count() } else { 0 }
    };
    let done = Done::since(testbed, before).await;
    let (evictions, jobs) = (count(StepAction::RestartPod), count(StepAction::RunCleanupJob));
    assert_eq!(done, Done { resets, evictions, jobs, gone }, "{round:?}");
}

async fn operator_pod(testbed: &Testbed) -> Pod {
    let pods: Api<Pod> = Api::namespaced(testbed.client.clone(), SYSTEM);
    let mut all = pods.list(&ListParams::default()).await.unwrap().items;
    assert_eq!(all.len(), 1, "one operator");
    all.remove(0)
}

/// The operator's memory, read in the background as long as this lives.
struct Memory {
    readings: Arc<Mutex<Vec<(Duration, u64)>>>,
    task: JoinHandle<()>,
}

impl Memory {
    fn read(testbed: &Testbed, pod: &str, begin: Instant) -> Self {
        let readings = Arc::<Mutex<Vec<_>>>::default();
        let (client, kept) = (testbed.through.clone(), Arc::clone(&readings));
        let uri = format!("/api/v1/namespaces/{SYSTEM}/pods/{pod}:8080/proxy/metrics");
        let task = tokio::spawn(async move {
            loop {
                let request = http::Request::get(&uri).body(Vec::new()).unwrap();
                // While the API server answers nobody, there is none.
                if let Ok(Ok(text)) = tokio::time::timeout(READ_EVERY, client.request_text(request)).await {
                    let line = text.lines().find_map(|line| line.strip_prefix("process_resident_memory_bytes "));
                    let bytes = line.and_then(|value| value.trim().parse().ok());
                    kept.lock().unwrap().extend(bytes.map(|bytes: u64| (begin.elapsed(), bytes)));
                }
                tokio::time::sleep(READ_EVERY).await;
            }
        });
        Self { readings, task }
    }

    fn readings(&self) -> Readings {
        let readings = self.readings.lock().unwrap().clone();
        assert!(!readings.is_empty(), "the operator says what it uses");
        Readings::from([("operator", readings)])
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.task.abort();
    }
}
