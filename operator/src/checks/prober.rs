//! Runs the checks that the operator asks itself, each at its own moment of its interval. Only the leader asks.
//!
//! Which checks there are is told by the reconcile of their policy; a run that brings news wakes it.

use super::{
    PLACE_HELD,
    ask::{self, Ask, AskError},
    cut_off::{self, Reach},
    lookup::{Lookups, whole},
    results::{Answer, CheckResults, CurrentChecks, Remark, Run},
    service::{self, Endpoint, Endpoints, MAX_CHECKS, MAX_ENDPOINTS, NotAsked},
    suspects::Suspects,
    tls,
    turns::Turns,
};
use crate::{
    args::PodTransport,
    context::Context,
    fleet::{facts::PodFacts, index::ObjectKey},
    kubernetes::{clients::API_DEADLINE, queue::Queue},
    pods::{
        fair_queue::{Class, FairQueue},
        prober::{now_in_milliseconds, offset},
    },
    spec::asked::{CheckSettings, Probe, Tls},
    status::target::target_key,
    telemetry::metrics::CheckAskLabels,
};
use contract::WorkloadId;
use crds::resilience_policy::CheckScope;
use engine::recovery::Pod;
use futures::{FutureExt, StreamExt, stream};
use jiff::Timestamp;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::sync::CancellationToken;
use tracing::error;

/// Endpoints of one check that are asked at once.
const SIDE_BY_SIDE: usize = 32;
/// The first run of a check is within this time, however long its interval is.
const FIRST_WITHIN: Duration = Duration::from_secs(10);
/// Shortest wait between two runs.
const SHORTEST: Duration = Duration::from_millis(100);
/// Runs of one namespace that are under way at once.
const RUNS_AT_ONCE: usize = 32;
/// Longest time until what has to be known before a run has been read.
const LONGEST_LOOKUP: Duration = Duration::from_secs(20);

/// A check of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckKey {
    /// The policy.
    pub policy: ObjectKey,
    /// Name of the check.
    pub check: String,
}

/// The checks that the operator asks: what was found, and which are due when.
pub struct Checks {
    known: Mutex<Known>,
    /// Checks to be run.
    pub due: Queue<CheckKey>,
    lookups: Lookups,
    /// Runs take turns in their namespace.
    runs: Turns<String>,
    suspects: Suspects,
    reach: Mutex<Reach>,
}

impl Default for Checks {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            due: Queue::default(),
            lookups: Lookups::default(),
            runs: Turns::new(RUNS_AT_ONCE),
            suspects: Suspects::default(),
            reach: Mutex::default(),
        }
    }
}

impl Checks {
    /// What the last asks say of the way to the pods.
    fn reach(&self) -> MutexGuard<'_, Reach> {
        self.reach.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Known {
    policies: HashMap<ObjectKey, BTreeMap<String, Check>>,
    /// Numbers of the checks of each namespace: those that came first are asked.
    of_namespace: HashMap<String, BTreeSet<u64>>,
    /// Number of the last check that was made.
    made: u64,
}

struct Check {
    /// Tells it from another one of its name that was there before: what that one is still being asked says nothing of it.
    number: u64,
    settings: Arc<CheckSettings>,
    /// The policy's workloads, in its own order.
    targets: Arc<[WorkloadId]>,
    results: CheckResults,
    runs: u64,
}

impl Known {
    /// Whether a namespace has as many checks as are asked, without this one.
    fn is_too_many(&self, namespace: &str, number: u64) -> bool {
        let before = self.of_namespace.get(namespace).into_iter().flat_map(|numbers| numbers.range(..number));
        before.take(MAX_CHECKS).count() == MAX_CHECKS
    }
}

/// Takes the numbers of checks out that are gone.
fn remove_numbers(
    of_namespace: &mut HashMap<String, BTreeSet<u64>>,
    namespace: &str,
    gone: impl IntoIterator<Item = u64>,
) {
    let Some(numbers) = of_namespace.get_mut(namespace) else { return };
    for number in gone {
        numbers.remove(&number);
    }
    if numbers.is_empty() {
        of_namespace.remove(namespace);
    }
}

impl Checks {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes these the checks of a policy. What was found of one that is there no more, or is another one now, is forgotten.
    pub fn keep(&self, policy: &ObjectKey, wanted: BTreeMap<String, CheckSettings>, targets: &[WorkloadId]) {
        if wanted.is_empty() || targets.is_empty() {
            self.forget(policy);
            return;
        }
        let (mut begun, mut gone) = (Vec::new(), Vec::new());
        {
            let mut known = self.lock();
            let Known { policies, of_namespace, made } = &mut *known;
            let checks = policies.entry(policy.clone()).or_default();
            let stays = |name: &String, check: &mut Check| {
                wanted.get(name).is_some_and(|settings| *settings == *check.settings)
            };
            let over: Vec<_> = checks.extract_if(.., |name, check| !stays(name, check)).collect();
            remove_numbers(of_namespace, &policy.namespace, over.iter().map(|(_, check)| check.number));
            gone.extend(over.into_iter().map(|(name, _)| name).filter(|name| !wanted.contains_key(name)));
            for (name, settings) in wanted {
                if let Some(check) = checks.get_mut(&name) {
                    if *check.targets != *targets {
                        check.targets = targets.into();
                    }
                    continue;
                }
                *made += 1;
                of_namespace.entry(policy.namespace.clone()).or_default().insert(*made);
                let key = CheckKey { policy: policy.clone(), check: name.clone() };
                begun.push((key.clone(), offset(&phase(&key), settings.interval.min(FIRST_WITHIN))));
                let check = Check {
                    number: *made,
                    settings: Arc::new(settings),
                    targets: targets.into(),
                    results: CheckResults::default(),
                    runs: 0,
                };
                checks.insert(name, check);
            }
        }
        for (key, after) in begun {
            self.due.enqueue_after(key, after);
        }
        self.leave(policy, gone);
    }

    /// Has the queue look at checks that are gone, so that it lets go of them now and not only when they would have been due.
    fn leave(&self, policy: &ObjectKey, gone: impl IntoIterator<Item = String>) {
        for check in gone {
            self.due.enqueue(CheckKey { policy: policy.clone(), check });
        }
    }

    /// Forgets the checks of a policy; they are asked no more.
    pub fn forget(&self, policy: &ObjectKey) {
        let gone = {
            let mut known = self.lock();
            let gone = known.policies.remove(policy).unwrap_or_default();
            let numbers = gone.values().map(|check| check.number);
            remove_numbers(&mut known.of_namespace, &policy.namespace, numbers);
            gone
        };
        self.leave(policy, gone.into_keys());
    }

    /// What the checks of a policy say now.
    pub fn current(&self, policy: &ObjectKey, now: Timestamp) -> CurrentChecks {
        let known = self.lock();
        let checks = known.policies.get(policy).into_iter().flatten();
        checks.map(|(name, check)| (name.clone(), check.results.current(&check.settings, now))).collect()
    }

    fn question(&self, key: &CheckKey) -> Option<Question> {
        let known = self.lock();
        let check = known.policies.get(&key.policy)?.get(&key.check)?;
        let (settings, targets) = (Arc::clone(&check.settings), Arc::clone(&check.targets));
        let too_many = known.is_too_many(&key.policy.namespace, check.number);
        Some(Question { number: check.number, settings, targets, runs: check.runs, too_many })
    }

    /// Takes in a run, if it is of a check that is still there. The value says whether it is news, and how many runs there were.
    fn take(&self, key: &CheckKey, number: u64, run: Run, now: Timestamp) -> Option<(bool, u64)> {
        let mut known = self.lock();
        let check = known.policies.get_mut(&key.policy)?.get_mut(&key.check)?;
        if check.number != number {
            return None;
        }
        check.runs += 1;
        Some((check.results.take(run, &check.settings, now), check.runs))
    }
}

/// A check that is due.
struct Question {
    number: u64,
    settings: Arc<CheckSettings>,
    targets: Arc<[WorkloadId]>,
    /// Runs before this one.
    runs: u64,
    /// Its namespace has too many checks for this one to be asked.
    too_many: bool,
}

/// What the moment of a check is made from.
fn phase(key: &CheckKey) -> String {
    format!("{}/{}", key.policy, key.check)
}

/// Asks until `shutdown`.
pub async fn run(ctx: Arc<Context>, shutdown: CancellationToken) {
    if shutdown.run_until_cancelled(ctx.shared.leads.wait()).await.is_none() {
        return;
    }
    while let Some(key) = shutdown.run_until_cancelled(ctx.checks.due.next()).await {
        let ctx = Arc::clone(&ctx);
        tokio::spawn(async move {
            let ran = AssertUnwindSafe(run_once(&ctx, &key)).catch_unwind().await;
            let again = ran.unwrap_or_else(|_| {
                error!(policy = %key.policy, check = key.check, "the run of a check panicked; it is run again");
                Some(FIRST_WITHIN)
            });
            ctx.checks.due.done(&key, again);
        });
    }
}

/// One run. The value says when the next one is due; none, if the check is there no more.
async fn run_once(ctx: &Arc<Context>, key: &CheckKey) -> Option<Duration> {
    let question = ctx.checks.question(key)?;
    let Question { number, settings, .. } = &question;
    if !ctx.shared.fence.holds() {
        return Some(until_leading_again(settings.interval));
    }
    let began = Instant::now();
    let run = in_turn(ctx, key, &question).await;
    let run = run.unwrap_or_else(|why| Run::NotAsked(why.into()));
    let (news, runs) = ctx.checks.take(key, *number, run, now_in_milliseconds())?;
    if news {
        ctx.policies.enqueue(key.policy.clone());
    }
    Some(wait(key, settings.interval, runs).saturating_sub(began.elapsed()).max(SHORTEST))
}

/// When a check is due again that was due while this replica might not act: it may be back in a moment, and hours are too long.
fn until_leading_again(interval: Duration) -> Duration {
    interval.min(FIRST_WITHIN)
}

/// A turn among the runs of a namespace, if there is one within the interval: runs that come too late must not pile up.
async fn turn(runs: &Turns<String>, namespace: &str, interval: Duration) -> Result<impl Sized + use<>, NotAsked> {
    tokio::time::timeout(interval, runs.take(&namespace.to_owned())).await.map_err(|_| NotAsked::NoTurn)
}

/// What is found within the time for that. The run that looks it up has a turn that others wait for.
async fn looked_up<T>(
    service: &str,
    interval: Duration,
    look: impl Future<Output = Result<T, NotAsked>>,
) -> Result<T, NotAsked> {
    let found = tokio::time::timeout(interval.clamp(API_DEADLINE, LONGEST_LOOKUP), look).await;
    found.unwrap_or_else(|_| Err(NotAsked::LateLookup(service.to_owned())))
}

/// A run, when it is its turn among those of its namespace: one that cannot begin within its interval is not made up for.
async fn in_turn(ctx: &Context, key: &CheckKey, question: &Question) -> Result<Run, NotAsked> {
    if question.too_many {
        return Err(NotAsked::TooManyChecks);
    }
    let settings = &question.settings;
    let _turn = turn(&ctx.checks.runs, &key.policy.namespace, settings.interval).await?;
    let prepared = prepare(ctx, key, settings, &question.targets);
    let (endpoints, ask) = looked_up(&settings.service, settings.interval, prepared).await?;
    ask_all(ctx, key, question, endpoints, ask).await
}

/// From the beginning of a run to that of the next one. Those of a long interval begin together and are spread by the second.
fn wait(key: &CheckKey, interval: Duration, runs: u64) -> Duration {
    if runs == 1 && interval > FIRST_WITHIN { interval / 2 + offset(&phase(key), interval / 2) } else { interval }
}

/// Whom to ask, and what.
async fn prepare(
    ctx: &Context,
    key: &CheckKey,
    settings: &CheckSettings,
    targets: &[WorkloadId],
) -> Result<(Endpoints, Ask), NotAsked> {
    if ctx.shared.args.pod_transport == PodTransport::ApiserverProxy {
        return Err(NotAsked::Transport);
    }
    if ctx.observer_stale().is_some() {
        return Err(NotAsked::Stale);
    }
    let namespace = &key.policy.namespace;
    let named = |name: &str| ObjectKey { namespace: namespace.clone(), name: name.to_owned() };
    let from = &ctx.shared.clients.act;
    let service = ctx.checks.lookups.service(from, &named(&settings.service)).await?;
    let config = match &settings.probe {
        Probe::Http { tls: Some(Tls { ca: Some(ca), .. }), .. } => {
            Some(ctx.checks.lookups.certificates(from, &named(ca)).await?)
        }
        Probe::Http { tls: Some(_), .. } => Some(tls::unverified().map_err(|error| NotAsked::NoCa(error.to_string()))?),
        _ => None,
    };
    let ask = match &settings.probe {
        Probe::Tcp => Ask::Tcp,
        Probe::Http { path, expected, tls } => {
            let own = format!("{}.{namespace}.svc", settings.service);
            let name = tls.as_ref().and_then(|tls| tls.server_name.clone()).unwrap_or(own);
            let usual = if tls.is_some() { 443 } else { 80 };
            let host = if settings.port == usual { name.clone() } else { format!("{name}:{}", settings.port) };
            let server = ServerName::try_from(name)
                .map_err(|error| NotAsked::NoCa(format!("no certificate can be for that name: {error}")));
            let tls = config.map(|config| server.map(|server| (config, server))).transpose()?;
            Ask::Http { request: ask::request(path, &host), expected: expected.clone(), tls }
        }
    };
    let selector = service.selector(namespace, &settings.service)?;
    let question = service::Question {
        service: &settings.service,
        port: settings.port,
        targets,
        only_targets: settings.scope == CheckScope::Pod,
        loopback: ctx.shared.args.ask_loopback,
    };
    let mut choice = service.choice(question)?;
    let rank = |pod: &PodFacts, owner: Option<&WorkloadId>| choice.rank(pod, owner);
    let pods = ctx.index.pods_selected(namespace, &selector, MAX_ENDPOINTS, rank);
    Ok((choice.of(&pods)?, ask))
}

/// Asks all of them that can be asked before the interval is over: a run must not take so long that the one before it says
/// nothing any more when it ends. Each run begins with others.
async fn ask_all(
    ctx: &Context,
    key: &CheckKey,
    question: &Question,
    endpoints: Endpoints,
    what: Ask,
) -> Result<Run, NotAsked> {
    let Question { settings, targets, runs, .. } = question;
    let Endpoints { mut asked, found, first_owner } = endpoints;
    let probe = settings.probe.label();
    let namespace = &key.policy.namespace;
    let (what, suspects) = (&what, &ctx.checks.suspects);
    let one = |endpoint: Endpoint| async move {
        let began = Instant::now();
        let ask::Asked { result, reached } = ask::ask(endpoint.to, what, settings.timeout).await;
        let (now, silent) = (Instant::now(), result.as_ref().err().is_some_and(AskError::is_silence));
        suspects.take(namespace, &endpoint.uid, now.duration_since(began), silent, now);
        let group = endpoint.owner.as_ref().map_or_else(
            || format!("{namespace} Service {}", settings.service),
            |owner| format!("{namespace} {}", target_key(owner)),
        );
        let (pod, port) = (Arc::clone(&endpoint.uid), endpoint.to.port());
        let asked = cut_off::Asked { pod, port, group, interval: settings.interval, reached };
        ctx.checks.reach().take(asked, now);
        let label = result.as_ref().err().map_or("ok", AskError::label);
        ctx.shared.metrics.check_asks.get_or_create(&CheckAskLabels { probe, result: label }).inc();
        let owner = endpoint.owner.filter(|owner| targets.contains(owner));
        Answer {
            pod: Pod { name: endpoint.pod.to_string(), uid: endpoint.uid.to_string() },
            target: owner.as_ref().map(target_key),
            silent,
            failure: result.err().map(|error| error.to_string()),
        }
    };
    let chosen = asked.len();
    asked.rotate_left(first_of(*runs, chosen));
    let mut unasked: BTreeSet<_> = asked.iter().map(|one| one.uid.to_string()).collect();
    let now = Instant::now();
    let suspect = |one: Endpoint| {
        let suspect = suspects.is_suspect(namespace, &one.uid, now);
        (one, suspect)
    };
    let asked = asked.into_iter().map(suspect).collect();
    let until = Instant::now() + settings.interval;
    let mut answers = in_time(&ctx.shared.check_calls, &whole(namespace), asked, until, one).await;
    if answers.is_empty() {
        return Err(NotAsked::TooBusy(chosen));
    }
    if ctx.checks.reach().is_cut_off(Instant::now()) {
        return Err(NotAsked::CutOff);
    }
    for answer in &answers {
        unasked.remove(&answer.pod.uid);
    }
    let service = &settings.service;
    let note = if answers.len() < chosen {
        let text = format!("some of the {chosen} pods of Service {service} could not be asked within the interval");
        Some(Remark { kind: "some-unasked", text })
    } else if chosen < found {
        let text = format!("{found} pods of Service {service} could be asked; the first {MAX_ENDPOINTS} by name are");
        Some(Remark { kind: "too-many-pods", text })
    } else {
        None
    };
    answers.sort_by(|one, other| one.pod.name.cmp(&other.pod.name));
    // The policy's first workload stands for a Service of something else.
    let about = first_owner.as_ref().or(targets.first()).map(target_key).unwrap_or_default();
    Ok(Run::Asked { answers, unasked: unasked.into_iter().collect(), about, note })
}

/// What those give that get a place before that moment. `true`: it gave no answer in time when it was asked last.
async fn in_time<T, F: Future>(
    places: &FairQueue,
    namespace: &WorkloadId,
    asked: Vec<(T, bool)>,
    until: Instant,
    ask: impl Fn(T) -> F,
) -> Vec<F::Output> {
    let ask = &ask;
    let one = |(endpoint, silent): (T, bool)| async move {
        if Instant::now() >= until {
            return None;
        }
        let place = places.slot(namespace, Class::Probe, silent);
        let _place = tokio::time::timeout_at(until, place).await.ok()?;
        let (answer, ()) = futures::future::join(ask(endpoint), tokio::time::sleep(PLACE_HELD)).await;
        Some(answer)
    };
    stream::iter(asked).map(one).buffer_unordered(SIDE_BY_SIDE).filter_map(std::future::ready).collect().await
}

/// The place of the endpoint that is asked first.
fn first_of(runs: u64, endpoints: usize) -> usize {
    let endpoints = endpoints.max(1);
    usize::try_from(runs).unwrap_or(0).wrapping_mul(SIDE_BY_SIDE) % endpoints
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::check::Thresholds;

    fn key(check: &str) -> CheckKey {
        let policy = ObjectKey { namespace: "n".to_owned(), name: "p".to_owned() };
        CheckKey { policy, check: check.to_owned() }
    }

    fn settings(port: u16) -> CheckSettings {
        CheckSettings {
            scope: CheckScope::Workload,
            service: "web".to_owned(),
            port,
            probe: Probe::Tcp,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            thresholds: Thresholds::default(),
        }
    }

    fn keep(checks: &Checks, wanted: &[(&str, u16)]) {
        let wanted = wanted.iter().map(|(name, port)| ((*name).to_owned(), settings(*port)));
        checks.keep(&key("").policy, wanted.collect(), &[WorkloadId::deployment("n", "w")]);
    }

    fn remark(checks: &Checks, check: &str) -> Option<String> {
        checks.current(&key("").policy, Timestamp::UNIX_EPOCH).remove(check)?.remark
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_is_due_once_within_its_interval_and_is_forgotten_with_its_policy() {
        let checks = Checks::default();
        keep(&checks, &[("a", 1), ("b", 1)]);
        keep(&checks, &[("a", 1), ("b", 1)]);
        let mut due = Vec::new();
        while let Ok(key) = tokio::time::timeout(Duration::from_secs(10), checks.due.next()).await {
            due.push(key.check);
        }
        due.sort();
        assert_eq!(due, ["a", "b"]);
        assert!(checks.question(&key("a")).is_some());
        keep(&checks, &[("a", 1)]);
        assert!(checks.question(&key("a")).is_some() && checks.question(&key("b")).is_none());
        checks.forget(&key("").policy);
        assert!(checks.question(&key("a")).is_none() && checks.lock().policies.is_empty());
    }

    #[tokio::test]
    async fn what_was_asked_of_another_check_of_that_name_says_nothing() {
        let checks = Checks::default();
        keep(&checks, &[("a", 1), ("b", 1)]);
        let [number, of_b] = ["a", "b"].map(|name| checks.question(&key(name)).unwrap().number);
        let told = || Run::NotAsked(NotAsked::Stale.into());
        assert_eq!(checks.take(&key("a"), number, told(), Timestamp::UNIX_EPOCH), Some((true, 1)));
        assert_eq!(checks.take(&key("b"), of_b, told(), Timestamp::UNIX_EPOCH), Some((true, 1)));
        keep(&checks, &[("a", 2), ("b", 1)]);
        assert_eq!((remark(&checks, "a"), remark(&checks, "b").is_some()), (None, true));
        assert_eq!(checks.take(&key("a"), number, told(), Timestamp::UNIX_EPOCH), None);
        assert_eq!(remark(&checks, "a"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_lets_go_of_checks_that_are_gone() {
        let checks = Checks::default();
        let hour = CheckSettings { interval: Duration::from_secs(3_600), ..settings(1) };
        let wanted = ["a", "b"].map(|name| (name.to_owned(), hour.clone()));
        checks.keep(&key("").policy, wanted.into(), &[WorkloadId::deployment("n", "w")]);
        let next = async || tokio::time::timeout(Duration::from_secs(11), checks.due.next()).await.ok();
        for _ in 0..2 {
            checks.due.done(&next().await.unwrap(), Some(hour.interval));
        }
        assert_eq!(next().await, None);
        checks.keep(&key("").policy, [("a".to_owned(), hour.clone())].into(), &[WorkloadId::deployment("n", "w")]);
        assert_eq!(next().await, Some(key("b")));
        checks.due.done(&key("b"), None);
        checks.forget(&key("").policy);
        assert_eq!(next().await, Some(key("a")));
    }

    #[tokio::test]
    async fn the_checks_of_a_namespace_that_came_last_are_not_asked_if_there_are_too_many() {
        let checks = Checks::default();
        let names: Vec<_> = (0..MAX_CHECKS + 2).map(|number| format!("{number:03}")).collect();
        let wanted = |from: usize| names[from..].iter().map(|name| (name.as_str(), 1)).collect::<Vec<_>>();
        keep(&checks, &wanted(0));
        let not_asked = || {
            names.iter().filter(|name| checks.question(&key(name)).is_some_and(|one| one.too_many)).collect::<Vec<_>>()
        };
        assert_eq!(not_asked(), ["256", "257"]);
        let elsewhere = ObjectKey { namespace: "other".to_owned(), name: "p".to_owned() };
        checks.keep(&elsewhere, [("a".to_owned(), settings(1))].into(), &[WorkloadId::deployment("other", "w")]);
        let of_other = CheckKey { policy: elsewhere.clone(), check: "a".to_owned() };
        assert!(!checks.question(&of_other).unwrap().too_many, "each namespace counts for itself");
        keep(&checks, &wanted(1));
        assert_eq!(not_asked(), ["257"], "one has gone");
        checks.forget(&key("").policy);
        checks.forget(&elsewhere);
        assert!(checks.lock().of_namespace.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn runs_that_cannot_begin_within_their_interval_are_left_out() {
        let (runs, interval) = (Turns::new(RUNS_AT_ONCE), Duration::from_secs(5));
        let mut held = Vec::new();
        for _ in 0..RUNS_AT_ONCE {
            held.push(turn(&runs, "n", interval).await.unwrap());
        }
        let began = Instant::now();
        let late = futures::future::join_all((0..1_000).map(|_| turn(&runs, "n", interval))).await;
        assert!(late.into_iter().all(|turn| turn.err() == Some(NotAsked::NoTurn)));
        assert_eq!(began.elapsed(), interval);
        assert!(turn(&runs, "other", interval).now_or_never().is_some(), "they are in nobody else's way");
        held.pop();
        assert!(turn(&runs, "n", interval).now_or_never().is_some(), "and wait for nothing any more");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_looked_up_has_its_time() {
        for (interval, expected) in [(1, 10), (15, 15), (3_600, 20)] {
            let began = Instant::now();
            let looked = looked_up("web", Duration::from_secs(interval), std::future::pending::<Result<(), _>>()).await;
            assert_eq!(looked, Err(NotAsked::LateLookup("web".to_owned())));
            assert_eq!(began.elapsed().as_secs(), expected);
        }
        assert_eq!(looked_up("web", Duration::from_secs(1), async { Ok(1) }).await, Ok(1));
    }

    #[test]
    fn a_check_that_was_due_while_nobody_led_is_due_again_soon() {
        let waits = [1, 5, 3_600].map(|interval| until_leading_again(Duration::from_secs(interval)).as_secs());
        assert_eq!(waits, [1, 5, 10]);
    }

    /// How many of a hundred endpoints that never answer are asked in a run, and for how many seconds that goes on.
    async fn hung(interval: u64, timeout: u64) -> (usize, u64) {
        let (queue, began) = (FairQueue::default(), Instant::now());
        let asked = (0..100).map(|number| (number, false)).collect();
        let ask = |_: i32| tokio::time::sleep(Duration::from_secs(timeout));
        let until = began + Duration::from_secs(interval);
        let answers = in_time(&queue, &whole("n"), asked, until, ask).await;
        (answers.len(), began.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_ends_before_the_last_one_says_nothing_any_more() {
        assert_eq!(hung(5, 1).await, (100, 4));
        assert_eq!(hung(1, 1).await, (32, 1));
        assert_eq!(hung(30, 29).await, (64, 58), "never longer than two intervals");
    }

    #[tokio::test(start_paused = true)]
    async fn a_namespace_whose_endpoints_hang_does_not_hold_up_another() {
        let queue = FairQueue::default();
        let until = Instant::now() + Duration::from_secs(30);
        let namespaces = ["a", "b", "c"].map(whole);
        let hang = |_: i32| tokio::time::sleep(Duration::from_secs(30));
        let many = || (0..100).map(|number| (number, true)).collect();
        let hostile = futures::future::join(
            in_time(&queue, &namespaces[0], many(), until, hang),
            in_time(&queue, &namespaces[1], many(), until, hang),
        );
        let began = Instant::now();
        let good = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            in_time(&queue, &namespaces[2], vec![(1, false)], until, std::future::ready).await;
            began.elapsed().as_secs()
        };
        let (_, after) = futures::future::join(hostile, good).await;
        assert_eq!(after, 1);
    }

    #[test]
    fn runs_begin_with_others_until_all_had_their_turn() {
        let first: std::collections::BTreeSet<_> = (0..25).map(|runs| first_of(runs, 100)).collect();
        assert_eq!(first.len(), 25);
        assert_eq!((first_of(7, 0), first_of(7, 1), first_of(u64::MAX, 3) < 3), (0, 0, true));
    }

    #[test]
    fn runs_are_spread_over_a_long_interval_by_the_second() {
        let hour = Duration::from_secs(3_600);
        let waits: Vec<_> = (0..100).map(|number| wait(&key(&number.to_string()), hour, 1)).collect();
        assert!(waits.iter().all(|wait| *wait >= hour / 2 && *wait <= hour));
        let early = waits.iter().filter(|wait| **wait < hour * 3 / 4).count();
        assert!((25..=75).contains(&early), "{early}");
        assert_eq!(wait(&key("a"), hour, 2), hour);
        assert_eq!(wait(&key("a"), Duration::from_secs(5), 1), Duration::from_secs(5));
    }
}
