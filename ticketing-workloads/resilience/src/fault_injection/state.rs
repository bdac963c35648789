//! The fault that a drill injects into a dependency. It ends by itself: no process has to be alive to remove it.

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
    /// It is delayed by this long first.
    Latency(Duration),
}

/// A fault, how many attempts it hits, and until when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// The effect on an attempt that is hit.
    pub fault: Fault,
    /// Share of attempts that are hit, in percent.
    pub percent: u32,
    /// When it ends unless it is renewed.
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

    /// Ends the fault now.
    pub fn end(&self) {
        self.active.store(false, Ordering::Release);
        self.injection.store(None);
    }

    /// The fault for the attempt that starts now, if it gets one.
    #[inline]
    pub(crate) fn next_fault(&self) -> Option<Fault> {
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
    async fn a_fault_is_injected_until_its_time_is_over() {
        let faults = Faults::default();
        assert_eq!(faults.next_fault(), None);
        let until = Instant::now() + Duration::from_secs(10);
        faults.inject(Injection { fault: Fault::Failure, percent: 100, until });
        assert_eq!(faults.next_fault(), Some(Fault::Failure));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(faults.next_fault(), None);
        faults.inject(Injection { fault: Fault::Failure, percent: 0, until: until + Duration::from_secs(10) });
        assert_eq!(faults.next_fault(), None, "0 of 100");
        faults.end();
        assert_eq!(faults.next_fault(), None);
    }
}
