//! What the waiting room does next: a function of what is written down, of one gateway's report, and of the time.
//!
//! Numbers are let in in the order in which they were drawn: all up to `admitted`, and none above it. A buyer who has gone
//! is passed over, because the count goes on without him.
//!
//! How many are let in follows what booking is measured to complete: while it copes, more and more; when it does not, nine
//! tenths of what it has completed. The time is that of the database, so that all pods of booking have the same.

use super::{Orders, Report, View};
use contract::WaitingRoomSettings;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Time over which orders are counted before the rate is set anew, in milliseconds.
const WINDOW_MS: i64 = 1_000;
/// After the rate has fallen, it does not rise for so long: those who were let in before still come.
const HOLD_MS: i64 = 3_000;
/// Longest time between two reports for which numbers are let in, in milliseconds. After an outage there is no flood.
const MAX_STEP_MS: i64 = 2_000;
/// A room that no gateway has asked about for this long is over, in milliseconds.
const FORGOTTEN_MS: i64 = 3_600_000;
/// While nobody waits, so many seconds' worth of admissions may be left for those who come next.
const BURST_SECONDS: f64 = 0.5;
/// Windows in which the rate rises from its lower to its upper bound, once it is known what booking can do.
const RISE_WINDOWS: f64 = 50.0;
/// Of what booking completes while it is overloaded, so much is let in; and the rate falls by no less than this at once.
const BACK_OFF: f64 = 0.9;
/// It falls by no more than this at once.
const MOST_BACK_OFF: f64 = 0.5;
/// Refused orders in a hundred that are more than chance.
const REFUSED_PERCENT: u64 = 1;
/// Failed ones: those may have other reasons than load.
const FAILED_PERCENT: u64 = 10;

/// All that is known of the room. It is written down, and read by the next version, too: what is absent has its default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Room {
    /// Whether everybody new gets a number.
    pub is_open: bool,
    /// The last number that was drawn; the first one is 1.
    pub drawn: u64,
    /// The last number that was let in.
    pub admitted: u64,
    /// The last number whose admission is over.
    pub lapsed: u64,
    /// Numbers that are let in each second.
    pub rate: f64,
    /// What is let in besides, less than one number while somebody waits.
    credit: f64,
    /// Whether it is not known yet what booking can do: the rate doubles.
    is_probing: bool,
    /// When the last report came, in milliseconds since 1970.
    moved_at: i64,
    /// No rise of the rate before.
    hold_until: i64,
    /// Since when nobody has waited and the load has been low.
    calm_since: Option<i64>,
    /// Orders that booking completed each second in the last window.
    capacity: f64,
    window: Window,
    /// `admitted` as it was `mark_age_ms` ago; numbers up to it lapse when that is the time of an admission.
    mark: u64,
    mark_age_ms: i64,
}

/// What was measured since `began_at`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Window {
    began_at: i64,
    completed: u64,
    refused: u64,
    failed: u64,
    /// The highest load of any gateway, and of booking.
    load_percent: u32,
}

/// Settings that make sense, whatever was said.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    enter: u32,
    exit: u32,
    exit_for_ms: i64,
    min: f64,
    max: f64,
    admission_ms: i64,
}

impl Bounds {
    fn of(said: &WaitingRoomSettings) -> Self {
        let ms = |said: u64| i64::try_from(said).unwrap_or(i64::MAX);
        let enter = said.enter_load_percent.max(1);
        let min = said.min_admit_per_second.max(1);
        Self {
            enter,
            exit: said.exit_load_percent.min(enter - 1),
            exit_for_ms: ms(said.exit_for_ms),
            min: min.into(),
            max: said.max_admit_per_second.max(min).into(),
            admission_ms: ms(said.admission_ttl_ms).max(1_000),
        }
    }
}

impl Room {
    /// Takes a gateway's report at `now`, in milliseconds; `own_load`: how busy booking is, in percent. The answer is for that
    /// gateway, `epoch` is passed through.
    pub fn take(&mut self, now: i64, report: &Report, own_load: u32, epoch: Uuid) -> View {
        let bounds = Bounds::of(&report.settings);
        if now < self.moved_at {
            self.set_back(now);
        }
        if self.moved_at == 0 || now - self.moved_at > FORGOTTEN_MS {
            self.begin(now);
        }
        let elapsed = (now - self.moved_at).min(MAX_STEP_MS);
        self.moved_at = now;
        let load = report.load_percent.max(own_load);
        self.window.add(&report.orders, load);
        let opens = !self.is_open && (report.orders.refused > 0 || load >= bounds.enter);
        if opens {
            self.open(bounds, now);
        }
        if now - self.window.began_at >= WINDOW_MS {
            self.set_rate(bounds, now);
        }
        let mut first = 0;
        if self.is_open && report.arrivals > 0 {
            first = self.drawn + 1;
            self.drawn += u64::from(report.arrivals);
        }
        // Nobody is let in for the time before it opened.
        self.admit(bounds, if opens { 0 } else { elapsed });
        self.lapse(bounds, elapsed);
        let Self { is_open, drawn, admitted, lapsed, rate, .. } = *self;
        View { epoch, is_open, first, drawn, admitted, lapsed, rate }
    }

    /// The clock was set back, as by a failover to another server: what was to come counts from now on.
    fn set_back(&mut self, now: i64) {
        self.moved_at = now;
        self.window.began_at = self.window.began_at.min(now);
        self.hold_until = self.hold_until.min(now + HOLD_MS);
        self.calm_since = self.calm_since.map(|since| since.min(now));
    }

    /// The buyers who waited in a room before have gone. Numbers go on, so that none is there twice.
    fn begin(&mut self, now: i64) {
        let drawn = self.drawn;
        *self = Self { drawn, admitted: drawn, lapsed: drawn, mark: drawn, moved_at: now, ..Self::default() };
        self.window.began_at = now;
    }

    fn open(&mut self, bounds: Bounds, now: i64) {
        self.is_open = true;
        // What was completed in the window until now counts, if there was time to see it.
        let rate = self.capacity.max(self.window.completed_per_second(now));
        self.rate = rate.clamp(bounds.min, bounds.max);
        self.is_probing = true;
        self.credit = 0.0;
        self.calm_since = None;
    }

    /// At the end of a window: more, or fewer, or the room closes.
    fn set_rate(&mut self, bounds: Bounds, now: i64) {
        let window = std::mem::replace(&mut self.window, Window { began_at: now, ..Window::default() });
        let completed = window.completed_per_second(now);
        let is_overloaded = window.is_overloaded(bounds.enter);
        self.capacity = completed;
        if !self.is_open {
            return;
        }
        if is_overloaded {
            self.is_probing = false;
            self.hold_until = now + HOLD_MS;
            self.rate = (completed * BACK_OFF).clamp(self.rate * MOST_BACK_OFF, self.rate * BACK_OFF);
        } else if now >= self.hold_until {
            let rise = if self.is_probing { self.rate } else { (bounds.max - bounds.min) / RISE_WINDOWS };
            self.rate += rise.max(1.0);
        }
        self.rate = self.rate.clamp(bounds.min, bounds.max);
        if is_overloaded || self.drawn > self.admitted || window.load_percent > bounds.exit {
            self.calm_since = None;
        } else if now - *self.calm_since.get_or_insert(window.began_at) >= bounds.exit_for_ms {
            self.is_open = false;
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a credit is at most some seconds of the highest rate, far below 2^53, and never negative"
    )]
    fn admit(&mut self, bounds: Bounds, elapsed_ms: i64) {
        if !self.is_open {
            self.admitted = self.drawn;
            return;
        }
        self.rate = self.rate.clamp(bounds.min, bounds.max);
        self.credit += self.rate * (elapsed_ms as f64) / 1_000.0;
        let let_in = (self.credit as u64).min(self.drawn - self.admitted);
        self.admitted += let_in;
        self.credit -= let_in as f64;
        self.credit = self.credit.min((self.rate * BURST_SECONDS).max(1.0));
    }

    /// Time counts only while gateways report: who could not order meanwhile has lost nothing.
    fn lapse(&mut self, bounds: Bounds, elapsed_ms: i64) {
        self.mark_age_ms += elapsed_ms;
        if self.mark_age_ms >= bounds.admission_ms {
            self.lapsed = self.mark;
            self.mark = self.admitted;
            self.mark_age_ms = 0;
        }
    }
}

impl Window {
    fn add(&mut self, orders: &Orders, load_percent: u32) {
        self.completed += u64::from(orders.completed);
        self.refused += u64::from(orders.refused);
        self.failed += u64::from(orders.failed);
        self.load_percent = self.load_percent.max(load_percent);
    }

    #[expect(clippy::cast_precision_loss, reason = "orders of a window, far below 2^53")]
    fn completed_per_second(&self, now: i64) -> f64 {
        self.completed as f64 * 1_000.0 / (now - self.began_at).max(WINDOW_MS) as f64
    }

    fn is_overloaded(&self, enter: u32) -> bool {
        let all = self.completed + self.refused + self.failed;
        self.load_percent >= enter
            || self.refused * 100 > all * REFUSED_PERCENT
            || self.failed * 100 > all * FAILED_PERCENT
    }
}

#[cfg(test)]
#[path = "decision_tests.rs"]
mod tests;
