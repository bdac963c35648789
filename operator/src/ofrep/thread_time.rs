//! The time that a processor has worked for a thread.

use rustix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// A moment, as this thread counts. Time in which it waited for a processor, or for anything else, is none of it: where many have to
/// share a processor, work does not look longer than it is.
#[derive(Clone, Copy, Debug)]
pub struct ThreadTime(Duration);

impl ThreadTime {
    /// Now.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::ThreadCPUTime);
        let (seconds, nanos) = (u64::try_from(now.tv_sec), u32::try_from(now.tv_nsec));
        Self(Duration::new(seconds.unwrap_or_default(), nanos.unwrap_or_default()))
    }

    /// How long this thread has worked since then. Ask on the thread that has noted the moment.
    pub fn elapsed(self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn work_counts_and_waiting_does_not() {
        const TIME: Duration = Duration::from_millis(20);
        let (begun, at) = (ThreadTime::now(), Instant::now());
        std::thread::sleep(TIME);
        assert!(at.elapsed() >= TIME && begun.elapsed() < TIME, "{:?}", begun.elapsed());
        let begun = ThreadTime::now();
        let mut work = 0_u64;
        while begun.elapsed() < TIME {
            work = std::hint::black_box(work + 1);
        }
        assert!(work > 0);
    }
}
