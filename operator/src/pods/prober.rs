//! Asks pods for their health, each at its own moment of the interval, so that ten thousand pods are asked evenly and not
//! all at once. Only the leader asks. A pod that does not answer is asked ever more rarely, up to [`MAX_BACK_OFF`].

use super::{
    built_ins,
    client::{Access, Endpoint, PodError},
    fair_queue::Class,
    pusher::refresh_token,
};
use crate::{context::Context, fleet::facts::Uid, telemetry::metrics::PodCallLabels};
use contract::WorkloadId;
use engine::{admin_auth::AdminAuth, report_validation};
use jiff::Timestamp;
use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Longest wait until a pod that does not answer is asked again, unless its interval is longer.
const MAX_BACK_OFF: Duration = Duration::from_secs(15);
/// Wait for the token of a workload that was seen a moment ago.
const UNTIL_TOKEN: Duration = Duration::from_millis(500);
/// Pods that are due within this time are asked together: then the process is woken once for all of them.
const BEAT: Duration = Duration::from_millis(10);
/// Questions in a row without an answer after which the waits grow.
const PATIENT_MISSES: u32 = 3;

/// A pod to be asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProbeKey {
    /// Its workload.
    pub workload: Arc<WorkloadId>,
    /// Which pod.
    pub uid: Uid,
}

/// Asks until `shutdown`.
pub async fn run(ctx: Arc<Context>, shutdown: CancellationToken) {
    let started = Instant::now();
    let mut tidied = started;
    while let Some(key) = shutdown.run_until_cancelled(ctx.probes.next()).await {
        if tidied.elapsed() > Duration::from_secs(30) {
            ctx.shared.pods.close_unused();
            tidied = Instant::now();
        }
        let ctx = Arc::clone(&ctx);
        tokio::spawn(async move {
            let again = probe(&ctx, &key).await;
            ctx.probes.done(&key, again.map(|wait| on_beat(started.elapsed(), wait)));
        });
    }
}

/// The wait that ends with the first beat after `wait`, when so much time has passed since the first one.
fn on_beat(passed: Duration, wait: Duration) -> Duration {
    let due = (passed + wait).as_millis();
    let beats = due.div_ceil(BEAT.as_millis());
    let due = BEAT.saturating_mul(u32::try_from(beats).unwrap_or(u32::MAX));
    due.saturating_sub(passed).max(wait)
}

/// The moment within the interval at which a pod is asked for the first time.
pub fn offset(uid: &str, every: Duration) -> Duration {
    every.mul_f64(f64::from(u16::try_from(hash(uid) % 1000).unwrap_or(0)) / 1000.0)
}

fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// When a pod that has missed so many questions in a row is asked again.
fn wait(uid: &str, every: Duration, misses: u32) -> Duration {
    let Some(doublings) = misses.checked_sub(PATIENT_MISSES) else { return every };
    let longest = MAX_BACK_OFF.max(every);
    let wait = every.saturating_mul(2u32.saturating_pow(doublings.min(16))).min(longest);
    // Pods that went silent together are not asked together.
    wait.mul_f64(0.8 + 0.4 * f64::from(u16::try_from(hash((uid, misses)) % 1000).unwrap_or(0)) / 1000.0)
}

/// What is known of a pod before it is asked.
struct Question {
    every: Duration,
    endpoint: Option<Endpoint>,
    /// Where else the report may be without a token.
    at_admin: Option<Endpoint>,
    with_token: bool,
    workload_uid: String,
    postponed: Option<Duration>,
    suspect: bool,
    signs: bool,
    auth: AdminAuth,
}

fn question(ctx: &Context, key: &ProbeKey) -> Option<Question> {
    ctx.fleet
        .read(&key.workload, |workload| {
            let pod = workload.pod(&key.uid)?;
            // Without a token (nothing was ever published, as in a dry run) the public port has the same report.
            let with_token = workload.has_token;
            Some(Question {
                every: workload.probe_every?,
                endpoint: if with_token { Endpoint::admin(&pod.facts) } else { Endpoint::public(&pod.facts) },
                at_admin: if with_token { None } else { Endpoint::admin(&pod.facts) },
                with_token,
                workload_uid: workload.uid.clone(),
                postponed: workload.may_get_token(Instant::now()).then_some(UNTIL_TOKEN),
                suspect: pod.misses > 0,
                signs: pod.facts.signs,
                auth: pod.auth.clone(),
            })
        })
        .flatten()
}

/// Asks one pod. The value says when to ask it again; none, if it is not to be asked any more.
async fn probe(ctx: &Arc<Context>, key: &ProbeKey) -> Option<Duration> {
    let Question { every, endpoint, at_admin, with_token, postponed, workload_uid, suspect, signs, auth } =
        question(ctx, key)?;
    if !ctx.shared.fence.holds() {
        return Some(every);
    }
    if let Some(wait) = postponed {
        return Some(every.min(wait));
    }
    // It gets an address later, and then it is asked at once.
    let endpoint = endpoint?;
    let token = with_token.then(|| ctx.shared.tokens.current(&workload_uid));
    let mut access = Access { to: &endpoint, uid: &key.uid, signs, token, auth };
    let (asked, result) = {
        let _slot = ctx.shared.pod_calls.slot(&key.workload, Class::Probe, suspect).await;
        let asked = Instant::now();
        let pods = &ctx.shared.pods;
        let report = if with_token {
            pods.health(&mut access).await
        } else {
            pods.public_health(&mut access, at_admin.as_ref()).await
        };
        (asked, report)
    };
    let now = now_in_milliseconds();
    let (label, speaks, unauthorized, news, behind, wait) = {
        let mut fleet = ctx.fleet.lock();
        let workload = fleet.get_mut(&*key.workload)?;
        workload.learn_auth(&key.uid, &access.auth);
        let result = result.and_then(|report| {
            // Published by now, not when it was asked: a push may have crossed the question.
            let newest = workload.published.as_ref().map(|published| published.revision);
            report_validation::report(&report, &endpoint.pod, newest).map_err(PodError::InvalidResponse)?;
            Ok(report)
        });
        let label = result.as_ref().map_or_else(PodError::label, |_| "ok");
        let speaks = result.as_ref().ok().map(|report| report.applied.contract_version);
        let unauthorized = result.as_ref().err() == Some(&PodError::Unauthorized);
        let answered = result.is_ok();
        let news = match result {
            Ok(report) => workload.take(&key.uid, &report, asked, now),
            Err(error) => workload.miss(&key.uid, &error, now),
        }?;
        let pod = workload.pod(&key.uid)?;
        let published = workload.published.as_ref().map(|published| &*published.content_hash);
        let runs = pod.applied.as_ref().map(|applied| applied.content_hash.as_str());
        // While a new leader listens there is nothing to say yet; the last pod that speaks ends that.
        let news = news.then(|| workload.listening_for(Instant::now()).unwrap_or_default());
        // A pod that does not answer has nothing pushed to it until it does: it would not take it either.
        let behind = answered && published.is_some() && published != runs;
        (label, speaks, unauthorized, news, behind, wait(&key.uid, every, pod.misses))
    };
    ctx.shared.metrics.pod_calls.get_or_create(&PodCallLabels { call: "health", result: label }).inc();
    if unauthorized {
        refresh_token(ctx, &key.workload, &key.uid, &workload_uid, &endpoint).await;
    }
    if let Some(speaks) = speaks.filter(|_| with_token) {
        built_ins::learn(ctx, &key.workload, &mut access, speaks).await;
    }
    if let Some(wait) = news {
        ctx.enqueue_status_after(&key.workload, wait);
    }
    if behind {
        ctx.enqueue_workload(&key.workload);
    }
    Some(wait)
}

/// Now, in whole milliseconds, as statuses keep times.
pub fn now_in_milliseconds() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_does_not_answer_is_asked_ever_more_rarely() {
        let every = Duration::from_secs(1);
        assert_eq!([0, 1, 2].map(|misses| wait("u", every, misses)), [every; 3]);
        let waits: Vec<_> = (3..12).map(|misses| wait("u", every, misses).as_secs_f64()).collect();
        assert!((0.8..=1.2).contains(&waits[0]) && (1.6..=2.4).contains(&waits[1]), "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= 18.0) && *waits.last().unwrap() >= 12.0, "{waits:?}");
        assert_eq!(wait("u", Duration::from_secs(60), 2), Duration::from_secs(60));
        assert!(wait("u", Duration::from_secs(60), 20).as_secs() >= 48, "never more often than its interval");
    }

    #[rstest::rstest]
    #[case::on_time(100, 5_000, 5_000)]
    #[case::up_to_the_next_beat(101, 5_000, 5_009)]
    #[case::just_before_it(109, 5_000, 5_001)]
    #[case::at_once(100, 0, 0)]
    fn pods_that_are_due_at_about_the_same_time_are_asked_together(
        #[case] passed: u64,
        #[case] wait: u64,
        #[case] expected: u64,
    ) {
        let ms = Duration::from_millis;
        assert_eq!(on_beat(ms(passed), ms(wait)), ms(expected));
        assert_eq!(on_beat(ms(u64::MAX), ms(wait)), ms(wait), "never sooner");
    }

    #[test]
    fn pods_are_asked_evenly_over_the_interval() {
        let every = Duration::from_secs(10);
        let offsets: Vec<_> = (0..1000).map(|number| offset(&format!("uid-{number}"), every).as_secs()).collect();
        for second in 0..10 {
            let count = offsets.iter().filter(|offset| **offset == second).count();
            assert!((50..=160).contains(&count), "{count} in second {second}");
        }
    }
}
