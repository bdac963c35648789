//! Where drills disturb a call. A fault ends by itself: nobody has to be alive to take it away.

use arc_swap::ArcSwapOption;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// What happens to an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails before anything is sent.
    Failure,
    /// It is held up this long first.
    Latency(Duration),
}

/// A fault under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// What happens.
    pub fault: Fault,
    /// To how many attempts of a hundred.
    pub percent: u32,
    /// When it ends, if nobody renews it.
    pub until: Instant,
}

/// The faults of one dependency.
#[derive(Default)]
pub struct Faults {
    active: AtomicBool,
    injection: ArcSwapOption<Injection>,
}

impl Faults {
    /// Begins a fault, or renews or replaces the one under way.
    pub fn inject(&self, injection: Injection) {
        self.injection.store(Some(Arc::new(injection)));
        self.active.store(true, Ordering::Release);
    }

    /// Ends it.
    pub fn end(&self) {
        self.active.store(false, Ordering::Release);
        self.injection.store(None);
    }

    /// What is to happen to the attempt that starts now.
    #[inline]
    pub(crate) fn strike(&self) -> Option<Fault> {
        if self.active.load(Ordering::Acquire) { self.pick() } else { None }
    }

    #[cold]
    fn pick(&self) -> Option<Fault> {
        let injection = self.injection.load_full()?;
        if Instant::now() >= injection.until {
            self.end();
            return None;
        }
        (rand::random_range(0..100) < injection.percent).then_some(injection.fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fault_strikes_until_its_time_is_over() {
        let faults = Faults::default();
        assert_eq!(faults.strike(), None);
        let until = Instant::now() + Duration::from_secs(10);
        faults.inject(Injection { fault: Fault::Failure, percent: 100, until });
        assert_eq!(faults.strike(), Some(Fault::Failure));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(faults.strike(), None);
        faults.inject(Injection { fault: Fault::Failure, percent: 0, until: until + Duration::from_secs(10) });
        assert_eq!(faults.strike(), None, "0 of 100");
        faults.end();
        assert_eq!(faults.strike(), None);
    }
}
