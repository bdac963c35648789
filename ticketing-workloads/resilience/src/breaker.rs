//! The circuit breaker (ADR-007 §1), without locks held across a call and without a background task.
//!
//! Every call takes a [`Permit`] and gives its verdict through it. A permit belongs to one generation: each change of
//! state starts a new one, and what older permits report no longer counts. A permit that is dropped without a verdict
//! counts as a failure when the attempt's deadline has passed, and as nothing when the caller went away before.

use crate::failure::{Rejection, Verdict};
use crate::lock;
use crate::window::{Counts, Window};
use contract::{CircuitBreakerSettings, CircuitReport, CircuitState, ManualState, TripRule};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;

/// Window of a breaker whose rule names none; slow calls need one too.
const DEFAULT_SAMPLING: Duration = Duration::from_secs(30);
/// Calls that such a window must hold before the share of slow ones counts.
const DEFAULT_MINIMUM_THROUGHPUT: u64 = 10;
/// A trial that is not heard of this long after its deadline is given up: its future is never polled again.
const LOST_TRIAL_GRACE: Duration = Duration::from_secs(1);

/// Called after each change of state, with the new state and why it changed.
pub type OnChange = Box<dyn Fn(CircuitState, &str) + Send + Sync>;

/// A circuit breaker.
pub struct Breaker {
    inner: Mutex<Inner>,
    on_change: OnChange,
}

struct Inner {
    settings: CircuitBreakerSettings,
    state: State,
    generation: u64,
    consecutive_failures: u32,
    /// Breaks in a row without a close between them; each doubles the next.
    breaks: u32,
    window: Window,
    not_closed_since: Option<Instant>,
    opened_total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Closed,
    Open { since: Instant },
    HalfOpen { under_way: u32, successes: u32, last_deadline: Instant },
}

impl Breaker {
    /// A closed breaker.
    pub fn new(settings: CircuitBreakerSettings, on_change: OnChange) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            inner: Mutex::new(Inner {
                window: Window::new(sampling(&settings), now),
                settings,
                state: State::Closed,
                generation: 0,
                consecutive_failures: 0,
                breaks: 0,
                not_closed_since: None,
                opened_total: 0,
            }),
            on_change,
        })
    }

    /// Takes new settings. State, counts and permits under way are kept; a break under way gets its new length.
    pub fn configure(&self, settings: CircuitBreakerSettings) {
        self.with(|inner, now| {
            inner.window.set_length(sampling(&settings), now);
            let manual_changed = manual(&inner.settings) != manual(&settings);
            inner.settings = settings;
            if !manual_changed {
                return None;
            }
            // A person's word starts a new page: what was counted before it says nothing about after.
            inner.close(now);
            match manual(&inner.settings) {
                ManualState::Open => {
                    inner.not_closed_since = Some(now);
                    Some((CircuitState::Open, "held open by manualState"))
                }
                ManualState::Closed => Some((CircuitState::Closed, "held closed by manualState")),
                _ => Some((CircuitState::Closed, "no longer held by manualState")),
            }
        });
    }

    /// Asks to make a call that ends at `latest`, with its waits for anything else.
    pub fn acquire(self: &Arc<Self>, latest: Instant) -> Result<Permit, Rejection> {
        self.with_result(|inner, now| {
            let change = inner.advance(now);
            (inner.admit(now, latest).map(|trial| (inner.generation, trial)), change)
        })
        .map(|(generation, trial)| Permit {
            breaker: Arc::clone(self),
            generation,
            trial,
            started: Instant::now(),
            deadline: None,
            reported: false,
        })
    }

    /// Ends a break now: the next call is a trial. For when the cause was removed, such as after a reset of
    /// connections. Does nothing while closed or held.
    pub fn end_break(&self) {
        self.with(|inner, now| match inner.state {
            State::Open { .. } if manual(&inner.settings) == ManualState::Auto => Some(inner.half_open(now)),
            _ => None,
        });
    }

    /// The state, as the operator sees it.
    pub fn report(&self) -> CircuitReport {
        self.with_result(|inner, now| {
            let change = inner.advance(now);
            let report = CircuitReport {
                state: inner.visible_state(),
                open_for_ms: inner.not_closed_since.map(|since| crate::clock::millis(now - since)),
                opened_total: inner.opened_total,
            };
            (report, change)
        })
    }

    fn with(&self, change: impl FnOnce(&mut Inner, Instant) -> Option<Change>) {
        self.with_result(|inner, now| ((), change(inner, now)));
    }

    /// Runs `f` under the lock, and tells of a change after it is released.
    fn with_result<T>(&self, f: impl FnOnce(&mut Inner, Instant) -> (T, Option<Change>)) -> T {
        let now = Instant::now();
        let (result, change) = f(&mut lock(&self.inner), now);
        if let Some((state, why)) = change {
            (self.on_change)(state, why);
        }
        result
    }
}

/// A new state and why it came.
type Change = (CircuitState, &'static str);

impl Inner {
    /// Lets time pass: the end of a break, and trials that got lost.
    fn advance(&mut self, now: Instant) -> Option<Change> {
        match self.state {
            State::Open { since } if now >= since + self.break_length() => Some(self.half_open(now)),
            State::HalfOpen { under_way, last_deadline, .. }
                if under_way >= self.trials() && now >= last_deadline + LOST_TRIAL_GRACE =>
            {
                Some(self.open(now, "its trial calls never came back"))
            }
            _ => None,
        }
    }

    /// Whether a call may go through, and whether it is a trial.
    fn admit(&mut self, now: Instant, latest: Instant) -> Result<bool, Rejection> {
        match manual(&self.settings) {
            ManualState::Open => return Err(Rejection::HeldOpen),
            ManualState::Closed => return Ok(false),
            _ => {}
        }
        let (trials, break_length) = (self.trials(), self.break_length());
        match &mut self.state {
            State::Closed => Ok(false),
            State::Open { since } => {
                Err(Rejection::CircuitOpen { retry_in: (*since + break_length).saturating_duration_since(now) })
            }
            State::HalfOpen { under_way, .. } if *under_way >= trials => {
                Err(Rejection::TrialsUnderWay { trials: *under_way })
            }
            State::HalfOpen { under_way, last_deadline, .. } => {
                *under_way += 1;
                *last_deadline = latest.max(*last_deadline);
                Ok(true)
            }
        }
    }

    fn record(&mut self, verdict: Verdict, took: Duration, now: Instant) -> Option<Change> {
        if manual(&self.settings) != ManualState::Auto {
            return None;
        }
        let slow = verdict != Verdict::Neutral
            && self.settings.slow_call.as_ref().is_some_and(|slow| took >= Duration::from_millis(slow.duration_ms));
        let needed = self.trials();
        match &mut self.state {
            State::Open { .. } => None,
            State::Closed => self.record_closed(verdict, slow, now),
            State::HalfOpen { under_way, successes, .. } => {
                *under_way = under_way.saturating_sub(1);
                match verdict {
                    Verdict::Neutral => None,
                    Verdict::Success if !slow => {
                        *successes += 1;
                        let enough = *successes >= needed;
                        enough.then(|| {
                            self.close(now);
                            (CircuitState::Closed, "its trial calls succeeded")
                        })
                    }
                    Verdict::Success => Some(self.open(now, "a trial call was slow")),
                    Verdict::Failure => Some(self.open(now, "a trial call failed")),
                }
            }
        }
    }

    fn record_closed(&mut self, verdict: Verdict, slow: bool, now: Instant) -> Option<Change> {
        let failed = match verdict {
            Verdict::Neutral => return None,
            Verdict::Success => false,
            Verdict::Failure => true,
        };
        self.consecutive_failures = if failed { self.consecutive_failures.saturating_add(1) } else { 0 };
        self.window.record(Counts { calls: 1, failures: failed.into(), slow: slow.into() }, now);
        let sum = self.window.sum(now);
        let why = match self.settings.trip {
            TripRule::FailureRatio { percent, minimum_throughput, .. }
                if failed && share_reached(sum.failures, sum.calls, percent, minimum_throughput.into()) =>
            {
                Some("too large a share of its calls failed")
            }
            TripRule::ConsecutiveFailures { failures } if failed && self.consecutive_failures >= failures.max(1) => {
                Some("too many calls in a row failed")
            }
            TripRule::Unknown if failed && self.consecutive_failures >= default_failures() => {
                Some("too many calls in a row failed")
            }
            _ => None,
        };
        let why = why.or_else(|| {
            let rule = self.settings.slow_call.as_ref().filter(|_| slow)?;
            share_reached(sum.slow, sum.calls, rule.percent, self.minimum_throughput())
                .then_some("too large a share of its calls was slow")
        });
        why.map(|why| self.open(now, why))
    }

    fn open(&mut self, now: Instant, why: &'static str) -> Change {
        self.state = State::Open { since: now };
        self.generation += 1;
        self.breaks = self.breaks.saturating_add(1);
        self.opened_total += 1;
        self.not_closed_since.get_or_insert(now);
        (CircuitState::Open, why)
    }

    fn half_open(&mut self, now: Instant) -> Change {
        self.state = State::HalfOpen { under_way: 0, successes: 0, last_deadline: now };
        self.generation += 1;
        (CircuitState::HalfOpen, "its break is over")
    }

    fn close(&mut self, now: Instant) {
        self.state = State::Closed;
        self.generation += 1;
        self.consecutive_failures = 0;
        self.breaks = 0;
        self.not_closed_since = None;
        self.window.clear(now);
    }

    fn break_length(&self) -> Duration {
        let base = self.settings.break_ms;
        let Some(max) = self.settings.max_break_ms else { return Duration::from_millis(base) };
        let doublings = self.breaks.saturating_sub(1).min(63);
        Duration::from_millis(base.saturating_mul(1 << doublings).min(max.max(base)))
    }

    fn trials(&self) -> u32 {
        self.settings.half_open_max_requests.max(1)
    }

    fn minimum_throughput(&self) -> u64 {
        match self.settings.trip {
            TripRule::FailureRatio { minimum_throughput, .. } => minimum_throughput.into(),
            _ => DEFAULT_MINIMUM_THROUGHPUT,
        }
    }

    fn visible_state(&self) -> CircuitState {
        match (manual(&self.settings), self.state) {
            (ManualState::Open, _) | (ManualState::Auto, State::Open { .. }) => CircuitState::Open,
            (ManualState::Auto, State::HalfOpen { .. }) => CircuitState::HalfOpen,
            _ => CircuitState::Closed,
        }
    }
}

/// A word that this reader does not know leaves the breaker to itself.
fn manual(settings: &CircuitBreakerSettings) -> ManualState {
    match settings.manual_state {
        ManualState::Unknown => ManualState::Auto,
        known => known,
    }
}

fn sampling(settings: &CircuitBreakerSettings) -> Duration {
    match settings.trip {
        TripRule::FailureRatio { sampling_ms, .. } => Duration::from_millis(sampling_ms),
        _ => DEFAULT_SAMPLING,
    }
}

fn default_failures() -> u32 {
    match CircuitBreakerSettings::default().trip {
        TripRule::ConsecutiveFailures { failures } => failures,
        _ => 5,
    }
}

fn share_reached(part: u64, whole: u64, percent: u32, minimum: u64) -> bool {
    whole >= minimum.max(1) && part * 100 >= whole * u64::from(percent.clamp(1, 100))
}

/// Leave to make one call.
#[must_use = "dropping a permit counts as a call that was cancelled"]
pub struct Permit {
    breaker: Arc<Breaker>,
    generation: u64,
    trial: bool,
    started: Instant,
    deadline: Option<Instant>,
    reported: bool,
}

impl Permit {
    /// Says that the attempt starts now and ends at `deadline` at the latest. Before that, a dropped permit is a call
    /// that was never made.
    pub fn start(&mut self, deadline: Instant) {
        self.started = Instant::now();
        self.deadline = Some(deadline);
    }

    /// Whether the call is a trial of a half-open circuit.
    pub fn is_trial(&self) -> bool {
        self.trial
    }

    /// Reports how the call ended.
    pub fn finish(mut self, verdict: Verdict) {
        self.report(verdict);
    }

    fn report(&mut self, verdict: Verdict) {
        if std::mem::replace(&mut self.reported, true) {
            return;
        }
        let (generation, started) = (self.generation, self.started);
        self.breaker.with(|inner, now| {
            if inner.generation == generation { inner.record(verdict, now - started, now) } else { None }
        });
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        self.report(if late || std::thread::panicking() { Verdict::Failure } else { Verdict::Neutral });
    }
}

#[cfg(test)]
#[path = "breaker_tests.rs"]
mod tests;
