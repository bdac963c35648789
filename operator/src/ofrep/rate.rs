//! How often a client may call: a bucket each, which holds a second's worth, and calls that it was asked for beside.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Buckets by client.
pub struct Rates<K> {
    per_second: f64,
    most: usize,
    buckets: Mutex<Buckets<K>>,
}

struct Buckets<K> {
    by_client: HashMap<K, Bucket>,
    swept_at: Option<Instant>,
}

struct Bucket {
    left: f64,
    /// Calls that the client was asked for.
    extra: u32,
    at: Instant,
}

/// Most calls that a client was asked for and has not made yet.
const MAX_EXTRA: u32 = 4096;
/// A bucket is full again after this time, and need not be remembered.
const FULL_AFTER: Duration = Duration::from_secs(1);

impl<K: Hash + Eq> Rates<K> {
    /// So many calls a second for each client, and at most so many clients that are remembered.
    pub fn new(per_second: u32, most: usize) -> Self {
        let buckets = Buckets { by_client: HashMap::new(), swept_at: None };
        Self { per_second: f64::from(per_second), most, buckets: Mutex::new(buckets) }
    }

    /// Takes a call out of a client's bucket; if it is empty, the error says when the next call may come. While more clients
    /// call than can be remembered, the newest wait.
    pub fn take(&self, client: K, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.by_client.len() >= self.most && !buckets.by_client.contains_key(&client) {
            // It goes through all of them, so not for every call.
            if buckets.swept_at.is_none_or(|at| now.saturating_duration_since(at) >= FULL_AFTER) {
                buckets.swept_at = Some(now);
                buckets.by_client.retain(|_, bucket| now.saturating_duration_since(bucket.at) < FULL_AFTER);
            }
            if buckets.by_client.len() >= self.most {
                return Err(FULL_AFTER);
            }
        }
        let bucket = buckets.by_client.entry(client).or_insert(Bucket { left: self.per_second, extra: 0, at: now });
        let more = now.saturating_duration_since(bucket.at).as_secs_f64() * self.per_second;
        bucket.left = (bucket.left + more).min(self.per_second);
        bucket.at = now;
        if bucket.left >= 1.0 {
            bucket.left -= 1.0;
            Ok(())
        } else if bucket.extra > 0 {
            bucket.extra -= 1;
            Ok(())
        } else {
            Err(Duration::from_secs_f64((1.0 - bucket.left) / self.per_second))
        }
    }

    /// Lets a client call once more, because it was asked to: all that listen to changes call when there is one, and may be one client.
    pub fn give(&self, client: &K) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.by_client.get_mut(client) {
            bucket.extra = (bucket.extra + 1).min(MAX_EXTRA);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_its_rate_and_takes_nothing_from_others() {
        let (rates, start) = (Rates::new(10, 8), Instant::now());
        let granted = |client, at| (0..30).filter(|_| rates.take(client, at).is_ok()).count();
        assert_eq!(granted("a", start), 10);
        assert_eq!(rates.take("a", start), Err(Duration::from_millis(100)));
        assert_eq!(granted("b", start), 10);
        assert_eq!(granted("a", start + Duration::from_millis(500)), 5);
        assert_eq!(granted("a", start + Duration::from_secs(60)), 10, "no more than a second's worth is saved");
    }

    #[test]
    fn calls_that_a_client_was_asked_for_come_beside_its_rate() {
        let (rates, start) = (Rates::new(10, 8), Instant::now());
        let granted = |at| (0..10_000).filter(|_| rates.take("a", at).is_ok()).count();
        rates.give(&"a");
        assert_eq!(granted(start), 10, "nobody who has not called is known");
        for _ in 0..5 {
            rates.give(&"a");
        }
        assert_eq!((granted(start), granted(start)), (5, 0));
        for _ in 0..2 * MAX_EXTRA {
            rates.give(&"a");
        }
        assert_eq!(granted(start), MAX_EXTRA as usize);
    }

    #[test]
    fn no_more_clients_are_remembered_than_are_allowed() {
        let (rates, start) = (Rates::new(10, 3), Instant::now());
        let take = |client: u32, at| rates.take(client, at).is_ok();
        assert_eq!([1, 2, 3, 4].map(|client| take(client, start)), [true, true, true, false]);
        assert!(take(1, start), "who is known goes on");
        assert!(take(4, start + FULL_AFTER), "whose bucket is full again makes room");
    }
}
