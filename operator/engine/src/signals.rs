//! Kubernetes' own signals, evaluated as health checks. They need no probe and no library in the workload: the kubelet and the
//! controllers of Kubernetes say them of any pod and of any Deployment.
//!
//! All times are those that Kubernetes wrote down, so every replica of the operator comes to the same evaluation.

use crate::recovery::later;
use jiff::Timestamp;

/// How long a container that crashed must have run before it does not count as crashing any more, in milliseconds. One in a
/// crash loop runs for a moment after each start, too.
pub const STEADY_AFTER_MS: u64 = 60_000;
/// Restarts from which a container that ends with an error, soon after it was started, counts as crashing, whatever the kubelet
/// calls it at the moment.
const MANY_RESTARTS: u32 = 3;
/// A container that has run for so long, in seconds, begins to count anew: so does the kubelet.
const LONG_RUN: i64 = 600;

/// A signal, and the name of the check that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// `pod-ready`: the kubelet does not call the pod ready.
    PodReady,
    /// `restarts`: a container crashes again and again, or ran out of memory.
    Restarts,
    /// `image`: the image of a container cannot be pulled.
    Image,
    /// `rollout`: the rollout of the workload does not progress.
    Rollout,
}

impl Signal {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::PodReady, Self::Restarts, Self::Image, Self::Rollout];

    /// The name of its check.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodReady => "pod-ready",
            Self::Restarts => "restarts",
            Self::Image => "image",
            Self::Rollout => "rollout",
        }
    }

    /// The signal that a check of this name is.
    pub fn of(check: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|signal| signal.name() == check)
    }

    /// How long it may be bad before its check is unhealthy, in milliseconds, where a policy does not say.
    pub const fn default_grace_ms(self) -> u64 {
        match self {
            Self::PodReady => 60_000,
            Self::Restarts | Self::Image | Self::Rollout => 0,
        }
    }
}

/// How much longer than its timeout a step may take for a check to show that it helped, in milliseconds: that containers do not
/// crash any more is not seen before they have run for a while.
pub fn proven_after_ms(check: &str) -> u64 {
    if Signal::of(check) == Some(Signal::Restarts) { STEADY_AFTER_MS } else { 0 }
}

/// What the kubelet says of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSignals {
    /// Whether it calls the pod ready.
    pub ready: Ready,
    /// Since when all containers that run do.
    pub running_since: Option<Timestamp>,
    /// The container that crashed last.
    pub crash: Option<Box<Crash>>,
    /// The container whose image cannot be pulled.
    pub image: Option<Box<ImageFailure>>,
}

/// Whether a kubelet calls a pod ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Ready {
    /// It has not said yet, or nobody hears it: its node is cut off. What runs there nobody knows.
    #[default]
    Unknown,
    /// It does, since then.
    Yes(Timestamp),
    /// It does not.
    No {
        /// Since when.
        since: Timestamp,
        /// Why.
        message: Box<str>,
    },
}

/// A container that ended with an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crash {
    /// Its name.
    pub container: Box<str>,
    /// How it ended: `OOMKilled`, or `exited with 1`.
    pub how: Box<str>,
    /// It was killed because it used more memory than it may.
    pub out_of_memory: bool,
    /// When it ended last.
    pub at: Timestamp,
    /// When it had been started before that.
    pub started_at: Option<Timestamp>,
    /// How often it was started again.
    pub restarts: u32,
    /// Since when it runs again; absent: it does not.
    pub running_since: Option<Timestamp>,
    /// The kubelet waits ever longer before it starts it again.
    pub backs_off: bool,
}

/// A container whose image cannot be pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFailure {
    /// Since when, at the earliest.
    pub since: Timestamp,
    /// Which image of which container, and what the kubelet calls it.
    pub message: Box<str>,
}

/// The evaluation of a signal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether its check is healthy.
    pub healthy: bool,
    /// Nothing is bad at all: healthy can also be what is bad only for a moment so far.
    pub well: bool,
    /// Since when.
    pub since: Timestamp,
    /// What is bad, in words that hold for as long as it is.
    pub message: String,
    /// When it changes by itself, if nothing else does.
    pub changes_at: Option<Timestamp>,
}

impl Verdict {
    fn healthy(since: Timestamp) -> Self {
        Self { healthy: true, well: true, since, message: String::new(), changes_at: None }
    }

    /// Nothing is known to be bad, but it is too early to call it well; that is so since then.
    fn not_yet_well(since: Timestamp, well_at: Timestamp) -> Self {
        Self { healthy: true, well: false, since, message: String::new(), changes_at: Some(well_at) }
    }

    /// Bad since then, and unhealthy once that has lasted for so many milliseconds.
    fn bad(since: Timestamp, message: String, grace_ms: u64, now: Timestamp) -> Self {
        let at = later(since, grace_ms);
        if at <= now {
            Self { healthy: false, well: false, since: at, message, changes_at: None }
        } else {
            Self { healthy: true, well: false, since, message: String::new(), changes_at: Some(at) }
        }
    }
}

/// Evaluates a signal of a pod. None: nobody knows, or it is no signal of pods.
pub fn pod(signal: Signal, pod: &PodSignals, grace_ms: u64, now: Timestamp) -> Option<Verdict> {
    let runs_since = pod.running_since;
    match signal {
        Signal::PodReady => match &pod.ready {
            Ready::Unknown => None,
            Ready::Yes(since) => Some(Verdict::healthy(*since)),
            Ready::No { since, message } => {
                Some(Verdict::bad(*since, format!("not ready since {since}: {message}"), grace_ms, now))
            }
        },
        Signal::Restarts => {
            let Some(crash) = pod.crash.as_deref().filter(|crash| crash.counts()) else {
                let since = runs_since?;
                let well_at = later(since, STEADY_AFTER_MS);
                let well = well_at <= now;
                return Some(if well { Verdict::healthy(since) } else { Verdict::not_yet_well(since, well_at) });
            };
            let steady_at = crash.running_since.map(|since| later(since, STEADY_AFTER_MS));
            if steady_at.is_some_and(|steady_at| steady_at <= now) {
                return crash.running_since.map(Verdict::healthy);
            }
            let (container, how, restarts) = (&crash.container, &crash.how, crash.restarts);
            let times = if restarts == 1 { "once".to_owned() } else { format!("{restarts} times") };
            let message = format!("container {container} {how} and was started again {times}");
            let mut verdict = Verdict::bad(crash.at, message, grace_ms, now);
            verdict.changes_at = verdict.changes_at.into_iter().chain(steady_at).min();
            Some(verdict)
        }
        Signal::Image => match &pod.image {
            Some(failure) => Some(Verdict::bad(failure.since, failure.message.to_string(), grace_ms, now)),
            None => runs_since.map(Verdict::healthy),
        },
        Signal::Rollout => None,
    }
}

/// What the controller of a Deployment says of its rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// It went on, or came to its end, within its deadline.
    pub progresses: bool,
    /// Since when that is so.
    pub since: Timestamp,
    /// What the controller says.
    pub message: Box<str>,
}

/// Evaluates the signal of a rollout.
pub fn rollout(progress: &Progress, grace_ms: u64, now: Timestamp) -> Verdict {
    if progress.progresses {
        return Verdict::healthy(progress.since);
    }
    let message = format!("its rollout does not progress: {}", progress.message);
    Verdict::bad(progress.since, message, grace_ms, now)
}

impl Crash {
    /// Whether it is one of many, or a matter of memory: a container may end once, and one that is old has ended before.
    pub fn counts(&self) -> bool {
        let ran_for = self.started_at.map(|started_at| self.at.duration_since(started_at).as_secs());
        let soon = ran_for.is_some_and(|seconds| seconds < LONG_RUN);
        self.backs_off || self.out_of_memory || (self.restarts >= MANY_RESTARTS && soon)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn crash(restarts: u32, backs_off: bool, running_since: Option<i64>) -> PodSignals {
        let crash = Crash {
            container: "app".into(),
            how: "exited with 1".into(),
            out_of_memory: false,
            at: at(100),
            started_at: Some(at(90)),
            restarts,
            running_since: running_since.map(at),
            backs_off,
        };
        PodSignals { crash: Some(Box::new(crash)), running_since: running_since.map(at), ..PodSignals::default() }
    }

    fn not_ready(since: i64) -> PodSignals {
        let ready = Ready::No { since: at(since), message: "containers with unready status: [app]".into() };
        PodSignals { ready, ..PodSignals::default() }
    }

    fn verdict(signal: Signal, of: &PodSignals, grace_ms: u64, now: i64) -> Option<(bool, i64, Option<i64>)> {
        let verdict = pod(signal, of, grace_ms, at(now))?;
        Some((verdict.healthy, verdict.since.as_second(), verdict.changes_at.map(Timestamp::as_second)))
    }

    #[rstest::rstest]
    #[case::for_a_moment(not_ready(100), 130, Some((true, 100, Some(160))))]
    #[case::for_too_long(not_ready(100), 160, Some((false, 160, None)))]
    #[case::ready(PodSignals { ready: Ready::Yes(at(90)), ..PodSignals::default() }, 100, Some((true, 90, None)))]
    #[case::nobody_knows(PodSignals::default(), 100, None)]
    fn a_pod_is_not_ready_for_longer_than_a_time(
        #[case] pod: PodSignals,
        #[case] now: i64,
        #[case] expected: Option<(bool, i64, Option<i64>)>,
    ) {
        assert_eq!(verdict(Signal::PodReady, &pod, 60_000, now), expected);
    }

    #[rstest::rstest]
    #[case::ended_once(crash(1, false, Some(101)), 102, Some((true, 101, Some(161))))]
    #[case::loops(crash(2, true, None), 102, Some((false, 100, None)))]
    #[case::started_again_a_moment_ago(crash(3, false, Some(110)), 112, Some((false, 100, Some(170))))]
    #[case::runs_for_good(crash(3, false, Some(110)), 170, Some((true, 110, None)))]
    #[case::never_crashed(PodSignals { running_since: Some(at(5)), ..PodSignals::default() }, 65, Some((true, 5, None)))]
    #[case::too_early(PodSignals { running_since: Some(at(5)), ..PodSignals::default() }, 64, Some((true, 5, Some(65))))]
    #[case::does_not_run_yet(PodSignals::default(), 9, None)]
    fn a_container_crashes_until_it_has_run_for_a_while(
        #[case] pod: PodSignals,
        #[case] now: i64,
        #[case] expected: Option<(bool, i64, Option<i64>)>,
    ) {
        assert_eq!(verdict(Signal::Restarts, &pod, 0, now), expected);
    }

    #[test]
    fn an_old_container_may_end_once_more() {
        let mut of = crash(7, false, Some(101));
        of.crash.as_mut().unwrap().started_at = Some(at(-900));
        assert!(pod(Signal::Restarts, &of, 0, at(102)).unwrap().healthy);
    }

    #[test]
    fn the_container_that_ran_out_of_memory_is_named_at_the_first_time() {
        let mut of = crash(1, false, Some(101));
        let crash = of.crash.as_mut().unwrap();
        (crash.out_of_memory, crash.how) = (true, "was OOMKilled".into());
        let said = pod(Signal::Restarts, &of, 0, at(102)).unwrap();
        assert_eq!(
            (said.healthy, said.message.as_str()),
            (false, "container app was OOMKilled and was started again once")
        );
    }

    #[rstest::rstest]
    #[case(false, 0, false)]
    #[case(false, 60_000, true)]
    #[case(true, 0, true)]
    fn a_rollout_that_does_not_progress_is_unhealthy(
        #[case] progresses: bool,
        #[case] grace: u64,
        #[case] healthy: bool,
    ) {
        let progress = Progress { progresses, since: at(100), message: "ReplicaSet \"a\" has timed out".into() };
        assert_eq!(rollout(&progress, grace, at(101)).healthy, healthy);
    }

    #[test]
    fn times_that_cannot_be_stop_nothing() {
        let never =
            PodSignals { ready: Ready::No { since: Timestamp::MAX, message: "x".into() }, ..PodSignals::default() };
        assert!(pod(Signal::PodReady, &never, u64::MAX, at(1)).unwrap().healthy);
    }

    #[test]
    fn each_signal_has_a_name_of_its_own() {
        for signal in Signal::ALL {
            assert_eq!(Signal::of(signal.name()), Some(signal));
        }
        assert_eq!(Signal::of("database"), None);
    }
}
