//! The circuit breaker (ADR-007 §1), without locks held across a call and without a background task.
//!
//! Every call takes a [`Permit`] and gives its verdict through it. A permit belongs to one generation: each change of
//! state starts a new one, and what older permits report no longer counts. A permit that is dropped without a verdict
//! counts for nothing: the caller went away.
//!
//! A call that succeeds while the circuit is closed reads a few words that hardly ever change, and writes only to
//! counters of its own thread. Everything else (failures, trials, changes of state) takes a short lock.

use crate::attempt::Ticket;
use crate::failure::{Rejection, Verdict};
use crate::stripes::{Alone, Counters};
use crate::sync::lock;
use crate::window::{Counts, Window};
use contract::{CircuitBreakerSettings, CircuitReport, CircuitState, ManualState, TripRule};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Window of a breaker whose rule names none; slow calls need one too.
const DEFAULT_SAMPLING: Duration = Duration::from_secs(30);
/// Calls that such a window must hold before the share of slow ones counts.
const DEFAULT_MINIMUM_THROUGHPUT: u64 = 10;
/// A trial that is not heard of this long after its deadline is given up: its future is never polled again.
const LOST_TRIAL_GRACE: Duration = Duration::from_secs(1);
/// How long a trial without a deadline may take before it is given up.
const TRIAL_WITHOUT_DEADLINE: Duration = Duration::from_secs(60);

/// Called after each change of state, with the new state and the reason.
pub type OnChange = Box<dyn Fn(CircuitState, &str) + Send + Sync>;

/// A circuit breaker.
pub struct Breaker {
    fast: Alone<Fast>,
    calls: Counters<4>,
    window: Window,
    inner: Mutex<Inner>,
    on_change: OnChange,
}

/// What a call reads on its way; written on failures and changes only.
struct Fast {
    /// The generation, and in its lowest bits how calls are taken.
    word: AtomicU64,
    /// Failures since the last success.
    failures_in_a_row: AtomicU32,
    /// Whether a rule needs the window.
    windowed: AtomicBool,
    /// From which duration on a call is slow, in nanoseconds; `u64::MAX`: none is.
    slow_ns: AtomicU64,
}

/// How calls are taken: lowest bits of the word.
mod mode {
    /// Closed: calls pass, and their verdicts count.
    pub const CLOSED: u64 = 0;
    /// Held closed by a person: calls pass, and nothing counts.
    pub const HELD_CLOSED: u64 = 1;
    /// Anything else: ask under the lock.
    pub const ASK: u64 = 2;
    /// All bits of a mode.
    pub const MASK: u64 = 3;
}

/// How the calls that came to a breaker ended, since the process started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Calls that succeeded, as far as the health of the dependency goes.
    pub successes: u64,
    /// Calls that failed.
    pub failures: u64,
    /// Calls that say nothing about the dependency: cancelled by this side, or refused by a layer further in.
    pub ignored: u64,
    /// Calls that were not let through.
    pub rejected: u64,
}

const SUCCESSES: usize = 0;
const FAILURES: usize = 1;
const IGNORED: usize = 2;
const REJECTED: usize = 3;

struct Inner {
    settings: CircuitBreakerSettings,
    state: State,
    generation: u64,
    /// Breaks in a row without a close between them; each doubles the next.
    breaks: u32,
    not_closed_since: Option<Instant>,
    opened_total: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Closed,
    Open { since: Instant },
    HalfOpen { under_way: u32, successes: u32, last_deadline: Option<Instant> },
}

impl Breaker {
    /// A closed breaker.
    pub fn new(settings: CircuitBreakerSettings, on_change: OnChange) -> Self {
        let breaker = Self {
            fast: Alone(Fast {
                word: AtomicU64::new(mode::CLOSED),
                failures_in_a_row: AtomicU32::new(0),
                windowed: AtomicBool::new(false),
                slow_ns: AtomicU64::new(u64::MAX),
            }),
            calls: Counters::default(),
            window: Window::new(sampling(&settings), Instant::now()),
            inner: Mutex::new(Inner {
                settings,
                state: State::Closed,
                generation: 0,
                breaks: 0,
                not_closed_since: None,
                opened_total: 0,
            }),
            on_change,
        };
        breaker.publish(&lock(&breaker.inner));
        breaker
    }

    /// Takes new settings. State, counts and permits under way are kept; a break under way gets its new length.
    pub fn configure(&self, settings: CircuitBreakerSettings) {
        self.with(|inner, now| {
            self.window.set_length(sampling(&settings), now);
            if !is_windowed(&inner.settings) && is_windowed(&settings) {
                // What it holds was counted while no rule used it.
                self.window.clear();
            }
            let manual_changed = manual(&inner.settings) != manual(&settings);
            inner.settings = settings;
            if !manual_changed {
                return None;
            }
            // A manual change starts a new count: results from before it say nothing about after.
            self.close(inner);
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

    /// Asks to make a call whose outcome is known by `latest`; `None`: it has no deadline.
    #[inline]
    pub fn acquire(&self, latest: Option<Instant>) -> Result<Permit<'_>, Rejection> {
        let word = self.fast.0.word.load(Ordering::Acquire);
        if word & mode::MASK == mode::ASK { self.ask(latest) } else { Ok(Permit::new(self, word, false)) }
    }

    #[cold]
    fn ask(&self, latest: Option<Instant>) -> Result<Permit<'_>, Rejection> {
        let admitted = self.with_result(|inner, now| {
            let change = inner.advance(now);
            // Published here, as the word is part of the permit.
            self.publish(inner);
            (
                inner.admit(now, latest.unwrap_or(now + TRIAL_WITHOUT_DEADLINE)).map(|trial| (inner.word(), trial)),
                change,
            )
        });
        match admitted {
            Ok((word, trial)) => Ok(Permit::new(self, word, trial)),
            Err(rejection) => {
                self.calls.add(REJECTED);
                Err(rejection)
            }
        }
    }

    /// From which duration on a call is to be reported to [`Breaker::record_slow`].
    #[inline]
    pub fn slow_from(&self) -> Option<Duration> {
        let ns = self.fast.0.slow_ns.load(Ordering::Relaxed);
        (ns != u64::MAX).then(|| Duration::from_nanos(ns))
    }

    /// Records that a call was slow, whatever its answer; `ticket` is that of its permit. Called before the permit is
    /// finished, by the layer that knows when the call began.
    pub fn record_slow(&self, ticket: Ticket) {
        self.with(|inner, now| {
            if inner.word() != ticket.0 || manual(&inner.settings) != ManualState::Auto {
                return None;
            }
            match inner.state {
                State::Open { .. } => None,
                State::HalfOpen { .. } => Some(inner.open(now, "a trial call was slow")),
                State::Closed => {
                    self.window.record(Counts { slow: 1, ..Counts::default() }, now);
                    let sum = self.window.sum(now);
                    let percent = inner.settings.slow_call.as_ref().map_or(100, |rule| rule.percent);
                    // This call itself is counted when it is finished.
                    share_reached(sum.slow, sum.calls + 1, percent, inner.minimum_throughput())
                        .then(|| inner.open(now, "the share of slow calls reached the limit"))
                }
            }
        });
    }

    /// Records that a call's deadline passed after its caller had gone: a failure, though its permit reports nothing. `ticket` is that of the permit.
    pub fn record_abandoned(&self, ticket: Ticket) {
        self.count(ticket.0, Verdict::Failure, false);
    }

    /// Ends a break now: the next call is a trial. For when the cause was removed, such as after a reset of
    /// connections. Does nothing while closed or held.
    pub fn end_break(&self) {
        self.with(|inner, _| match inner.state {
            State::Open { .. } if manual(&inner.settings) == ManualState::Auto => Some(inner.half_open()),
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

    /// How the calls so far ended.
    pub fn totals(&self) -> Totals {
        Totals {
            successes: self.calls.get(SUCCESSES),
            failures: self.calls.get(FAILURES),
            ignored: self.calls.get(IGNORED),
            rejected: self.calls.get(REJECTED),
        }
    }

    /// A verdict of a call that was let through with `word`.
    #[inline]
    fn record(&self, word: u64, trial: bool, verdict: Verdict) {
        self.calls.add(match verdict {
            Verdict::Success => SUCCESSES,
            Verdict::Failure => FAILURES,
            Verdict::Neutral => IGNORED,
        });
        let fast = &self.fast.0;
        if verdict == Verdict::Success && word & mode::MASK == mode::CLOSED && fast.word.load(Ordering::Acquire) == word
        {
            if fast.failures_in_a_row.load(Ordering::Relaxed) != 0 {
                fast.failures_in_a_row.store(0, Ordering::Relaxed);
            }
            if fast.windowed.load(Ordering::Relaxed) {
                self.window.record(Counts { calls: 1, ..Counts::default() }, Instant::now());
            }
            return;
        }
        if word & mode::MASK != mode::HELD_CLOSED && (verdict != Verdict::Neutral || trial) {
            self.count(word, verdict, trial);
        }
    }

    /// Takes a verdict under the lock, if its generation is still the present one.
    #[cold]
    fn count(&self, word: u64, verdict: Verdict, trial: bool) {
        self.with(|inner, now| {
            if inner.word() != word || manual(&inner.settings) != ManualState::Auto {
                return None;
            }
            let needed = inner.trials();
            match &mut inner.state {
                State::Open { .. } => None,
                State::Closed => self.count_closed(inner, verdict, now),
                State::HalfOpen { under_way, successes, .. } => {
                    *under_way -= u32::from(trial);
                    match verdict {
                        Verdict::Neutral => None,
                        Verdict::Failure => Some(inner.open(now, "a trial call failed")),
                        Verdict::Success => {
                            *successes += 1;
                            (*successes >= needed).then(|| {
                                self.close(inner);
                                (CircuitState::Closed, "the trial calls succeeded")
                            })
                        }
                    }
                }
            }
        });
    }

    fn count_closed(&self, inner: &mut Inner, verdict: Verdict, now: Instant) -> Option<Change> {
        if verdict != Verdict::Failure {
            return None;
        }
        let in_a_row = self.fast.0.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if is_windowed(&inner.settings) {
            self.window.record(Counts { calls: 1, failures: 1, slow: 0 }, now);
        }
        let why = match inner.settings.trip {
            TripRule::FailureRatio { percent, minimum_throughput, .. } => {
                let sum = self.window.sum(now);
                share_reached(sum.failures, sum.calls, percent, minimum_throughput.into())
                    .then_some("the share of failed calls reached the limit")
            }
            TripRule::ConsecutiveFailures { failures } => {
                (in_a_row >= failures.max(1)).then_some("too many calls failed in a row")
            }
            TripRule::Unknown => (in_a_row >= default_failures()).then_some("too many calls failed in a row"),
        };
        why.map(|why| inner.open(now, why))
    }

    fn close(&self, inner: &mut Inner) {
        inner.state = State::Closed;
        inner.generation += 1;
        inner.breaks = 0;
        inner.not_closed_since = None;
        self.fast.0.failures_in_a_row.store(0, Ordering::Relaxed);
        self.window.clear();
    }

    /// Copies what calls need to where they read it.
    fn publish(&self, inner: &Inner) {
        let fast = &self.fast.0;
        fast.windowed.store(is_windowed(&inner.settings), Ordering::Relaxed);
        let slow_ns = inner.settings.slow_call.as_ref().map(|slow| slow.duration_ms.saturating_mul(1_000_000));
        fast.slow_ns.store(slow_ns.unwrap_or(u64::MAX), Ordering::Relaxed);
        if fast.word.load(Ordering::Relaxed) != inner.word() {
            fast.word.store(inner.word(), Ordering::Release);
        }
    }

    fn with(&self, change: impl FnOnce(&mut Inner, Instant) -> Option<Change>) {
        self.with_result(|inner, now| ((), change(inner, now)));
    }

    /// Runs `f` under the lock, publishes the result to calls, and reports a change after the lock is released.
    fn with_result<T>(&self, f: impl FnOnce(&mut Inner, Instant) -> (T, Option<Change>)) -> T {
        let now = Instant::now();
        let (result, change) = {
            let mut inner = lock(&self.inner);
            let answer = f(&mut inner, now);
            self.publish(&inner);
            answer
        };
        if let Some((state, why)) = change {
            (self.on_change)(state, why);
        }
        result
    }
}

/// A new state and why it came.
type Change = (CircuitState, &'static str);

impl Inner {
    /// What calls see of this state.
    fn word(&self) -> u64 {
        let mode = match (manual(&self.settings), self.state) {
            (ManualState::Closed, _) => mode::HELD_CLOSED,
            (ManualState::Auto, State::Closed) => mode::CLOSED,
            _ => mode::ASK,
        };
        self.generation << 2 | mode
    }

    /// Lets time pass: the end of a break, and trials that got lost.
    fn advance(&mut self, now: Instant) -> Option<Change> {
        match self.state {
            State::Open { since } if now >= since + self.break_length() => Some(self.half_open()),
            State::HalfOpen { under_way, last_deadline: Some(last_deadline), .. }
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
                *last_deadline = (*last_deadline).max(Some(latest));
                Ok(true)
            }
        }
    }

    fn open(&mut self, now: Instant, why: &'static str) -> Change {
        self.state = State::Open { since: now };
        self.generation += 1;
        self.breaks = self.breaks.saturating_add(1);
        self.opened_total += 1;
        self.not_closed_since.get_or_insert(now);
        (CircuitState::Open, why)
    }

    fn half_open(&mut self) -> Change {
        self.state = State::HalfOpen { under_way: 0, successes: 0, last_deadline: None };
        self.generation += 1;
        (CircuitState::HalfOpen, "the break is over")
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

/// The manual state; one that this version does not know counts as `Auto`.
fn manual(settings: &CircuitBreakerSettings) -> ManualState {
    match settings.manual_state {
        ManualState::Unknown => ManualState::Auto,
        known => known,
    }
}

/// Whether a rule needs the window.
fn is_windowed(settings: &CircuitBreakerSettings) -> bool {
    matches!(settings.trip, TripRule::FailureRatio { .. }) || settings.slow_call.is_some()
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
pub struct Permit<'a> {
    breaker: &'a Breaker,
    word: u64,
    trial: bool,
    reported: bool,
}

impl<'a> Permit<'a> {
    #[inline]
    fn new(breaker: &'a Breaker, word: u64, trial: bool) -> Self {
        Self { breaker, word, trial, reported: false }
    }

    /// Identifies the call to the breaker.
    #[inline]
    pub fn ticket(&self) -> Ticket {
        Ticket(self.word)
    }

    /// Reports how the call ended.
    #[inline]
    pub fn finish(mut self, verdict: Verdict) {
        self.reported = true;
        self.breaker.record(self.word, self.trial, verdict);
    }
}

impl Drop for Permit<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.reported {
            let verdict = if std::thread::panicking() { Verdict::Failure } else { Verdict::Neutral };
            self.breaker.record(self.word, self.trial, verdict);
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
