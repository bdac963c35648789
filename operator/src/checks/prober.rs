//! Runs the checks that the operator asks itself, each at its own moment of its interval. Only the leader asks.
//!
//! Which checks there are is told by the reconcile of their policy; a run that brings news wakes it.

use super::{
    PLACE_HELD,
    ask::{self, Ask, AskError},
    lookup::{Lookups, Source, whole},
    results::{Answer, CheckResults, CurrentChecks, Run},
    service::{self, Endpoint, Endpoints, MAX_ENDPOINTS, NotAsked},
    tls,
};
use crate::{
    args::PodTransport,
    context::Context,
    fleet::index::ObjectKey,
    kubernetes::queue::Queue,
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
    collections::{BTreeMap, HashMap},
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

/// A check of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckKey {
    /// The policy.
    pub policy: ObjectKey,
    /// Name of the check.
    pub check: String,
}

/// The checks that the operator asks: what was found, and which are due when.
#[derive(Default)]
pub struct Checks {
    known: Mutex<Known>,
    /// Checks to be run.
    pub due: Queue<CheckKey>,
    lookups: Lookups,
}

#[derive(Default)]
struct Known {
    policies: HashMap<ObjectKey, BTreeMap<String, Check>>,
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
        let mut begun = Vec::new();
        {
            let mut known = self.lock();
            let Known { policies, made } = &mut *known;
            let checks = policies.entry(policy.clone()).or_default();
            checks.retain(|name, check| wanted.get(name).is_some_and(|settings| *settings == *check.settings));
            for (name, settings) in wanted {
                if let Some(check) = checks.get_mut(&name) {
                    if *check.targets != *targets {
                        check.targets = targets.into();
                    }
                    continue;
                }
                *made += 1;
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
    }

    /// Forgets the checks of a policy; they are asked no more.
    pub fn forget(&self, policy: &ObjectKey) {
        self.lock().policies.remove(policy);
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
        Some(Question { number: check.number, settings, targets, runs: check.runs })
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

    /// Whether each of these did not answer in time when it was asked last.
    fn was_silent(&self, key: &CheckKey, endpoints: &[Endpoint]) -> Vec<bool> {
        let known = self.lock();
        let check = known.policies.get(&key.policy).and_then(|checks| checks.get(&key.check));
        endpoints.iter().map(|one| check.is_some_and(|check| check.results.was_silent(&one.uid))).collect()
    }
}

/// A check that is due.
struct Question {
    number: u64,
    settings: Arc<CheckSettings>,
    targets: Arc<[WorkloadId]>,
    /// Runs before this one.
    runs: u64,
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
        return Some(settings.interval);
    }
    let began = Instant::now();
    let run = match prepare(ctx, key, settings, &question.targets).await {
        Ok((endpoints, ask)) => ask_all(ctx, key, &question, endpoints, ask).await,
        Err(why) => Err(why),
    };
    let run = run.unwrap_or_else(|why| Run::NotAsked(why.to_string()));
    let (news, runs) = ctx.checks.take(key, *number, run, now_in_milliseconds())?;
    if news {
        ctx.policies.enqueue(key.policy.clone());
    }
    Some(wait(key, settings.interval, runs).saturating_sub(began.elapsed()).max(SHORTEST))
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
    let from = Source { client: &ctx.shared.clients.act, places: &ctx.shared.check_calls };
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
    let pods = ctx.index.pods_selected(namespace, &selector);
    let question = service::Question {
        service: &settings.service,
        port: settings.port,
        targets,
        only_targets: settings.scope == CheckScope::Pod,
        loopback: ctx.shared.args.ask_loopback,
    };
    Ok((service.endpoints(question, &pods)?, ask))
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
    let what = &what;
    let one = |endpoint: Endpoint| async move {
        let result = ask::ask(endpoint.to, what, settings.timeout).await;
        let label = result.as_ref().err().map_or("ok", AskError::label);
        ctx.shared.metrics.check_asks.get_or_create(&CheckAskLabels { probe, result: label }).inc();
        let owner = endpoint.owner.filter(|owner| targets.contains(owner));
        Answer {
            pod: Pod { name: endpoint.pod.to_string(), uid: endpoint.uid.to_string() },
            target: owner.as_ref().map(target_key),
            silent: result.as_ref().err().is_some_and(AskError::is_silence),
            failure: result.err().map(|error| error.to_string()),
        }
    };
    let chosen = asked.len();
    asked.rotate_left(first_of(*runs, chosen));
    let silent = ctx.checks.was_silent(key, &asked);
    let asked = asked.into_iter().zip(silent).collect();
    let until = Instant::now() + settings.interval;
    let mut answers = in_time(&ctx.shared.check_calls, &whole(&key.policy.namespace), asked, until, one).await;
    if answers.is_empty() {
        return Err(NotAsked::TooBusy(chosen));
    }
    let service = &settings.service;
    let note = if answers.len() < chosen {
        Some(format!("some of the {chosen} pods of Service {service} could not be asked within the interval"))
    } else if chosen < found {
        Some(format!("{found} pods of Service {service} could be asked; the first {MAX_ENDPOINTS} by name are"))
    } else {
        None
    };
    answers.sort_by(|one, other| one.pod.name.cmp(&other.pod.name));
    // The policy's first workload stands for a Service of something else.
    let about = first_owner.as_ref().or(targets.first()).map(target_key).unwrap_or_default();
    Ok(Run::Asked { answers, about, note })
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
        let told = || Run::NotAsked("why".to_owned());
        assert_eq!(checks.take(&key("a"), number, told(), Timestamp::UNIX_EPOCH), Some((true, 1)));
        assert_eq!(checks.take(&key("b"), of_b, told(), Timestamp::UNIX_EPOCH), Some((true, 1)));
        keep(&checks, &[("a", 2), ("b", 1)]);
        assert_eq!((remark(&checks, "a"), remark(&checks, "b").is_some()), (None, true));
        assert_eq!(checks.take(&key("a"), number, told(), Timestamp::UNIX_EPOCH), None);
        assert_eq!(remark(&checks, "a"), None);
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
