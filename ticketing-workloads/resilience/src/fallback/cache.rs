//! Answers kept for a bad moment, up to a number of bytes.

use crate::sync::lock;
use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// What an answer takes besides itself: its places in the map and in the order, headers, allocations.
const OVERHEAD: usize = 1_024;

/// Answers by key; the oldest go when there is no room for a new one.
pub struct Cache<T> {
    weight: fn(&T) -> Option<usize>,
    capacity: usize,
    kept: Mutex<Kept<T>>,
}

/// What is kept, and in which order it came. A key that came again is in the order twice; its older place is passed
/// over when its turn to go comes.
struct Kept<T> {
    answers: HashMap<String, Answer<T>>,
    order: VecDeque<(String, Instant)>,
    weight: usize,
}

struct Answer<T> {
    value: T,
    weight: usize,
    since: Instant,
}

impl<T: Clone> Cache<T> {
    /// An empty cache for `capacity` bytes of what `weight` says an answer takes; `None`: it is not to be kept.
    pub fn new(capacity: usize, weight: fn(&T) -> Option<usize>) -> Self {
        let kept = Kept { answers: HashMap::new(), order: VecDeque::new(), weight: 0 };
        Self { weight, capacity, kept: Mutex::new(kept) }
    }

    /// Keeps an answer in place of an older one. One that is larger than the whole cache is not kept.
    pub fn keep(&self, key: String, value: &T) {
        let since = Instant::now();
        let Some(weight) = (self.weight)(value) else { return };
        let weight = weight.saturating_add(2 * key.len() + OVERHEAD);
        if weight > self.capacity {
            return;
        }
        let mut kept = lock(&self.kept);
        let kept = &mut *kept;
        kept.order.push_back((key.clone(), since));
        kept.weight += weight;
        if let Some(old) = kept.answers.insert(key, Answer { value: value.clone(), weight, since }) {
            kept.weight -= old.weight;
        }
        while kept.weight > self.capacity {
            let Some((oldest, since)) = kept.order.pop_front() else { return };
            if kept.answers.get(&oldest).is_some_and(|answer| answer.since == since)
                && let Some(gone) = kept.answers.remove(&oldest)
            {
                kept.weight -= gone.weight;
            }
        }
        // Older places of keys that came again must not pile up.
        if kept.order.len() > 2 * kept.answers.len() + 16 {
            let answers = &kept.answers;
            kept.order.retain(|(key, since)| answers.get(key).is_some_and(|answer| answer.since == *since));
        }
    }

    /// Forgets all answers; how many bytes they took.
    pub fn clear(&self) -> usize {
        let empty = Kept { answers: HashMap::new(), order: VecDeque::new(), weight: 0 };
        let kept = std::mem::replace(&mut *lock(&self.kept), empty);
        kept.weight
    }

    /// An answer, and how old it is.
    pub fn find(&self, key: &str) -> Option<(T, Duration)> {
        let kept = lock(&self.kept);
        let answer = kept.answers.get(key)?;
        Some((answer.value.clone(), answer.since.elapsed()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_is_bounded_and_the_oldest_goes_first() {
        let room = 5 * (OVERHEAD + 20);
        let cache = Cache::new(room, |text: &String| Some(text.len()));
        let keep = async |key: u32| {
            tokio::time::advance(Duration::from_millis(1)).await;
            cache.keep(key.to_string(), &format!("page {key}"));
        };
        for round in 0..1_000 {
            keep(round % 3).await;
        }
        for key in 10..60 {
            keep(key).await;
        }
        assert_eq!(cache.find("59"), Some(("page 59".into(), Duration::ZERO)));
        assert_eq!((cache.find("10"), cache.find("0")), (None, None));
        let kept = lock(&cache.kept);
        assert!(kept.weight <= room && kept.order.len() <= 2 * kept.answers.len() + 16);
        assert_eq!(kept.weight, kept.answers.values().map(|answer| answer.weight).sum::<usize>());
    }

    #[test]
    fn what_is_forgotten_makes_room() {
        let cache = Cache::new(3 * OVERHEAD, |text: &String| Some(text.len()));
        cache.keep("a".into(), &"kept".into());
        assert!(cache.clear() > OVERHEAD);
        assert_eq!((cache.clear(), cache.find("a")), (0, None));
        cache.keep("a".into(), &"again".into());
        assert!(cache.find("a").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_comes_often_drives_no_other_out() {
        let cache = Cache::new(3 * OVERHEAD, |text: &String| Some(text.len()));
        cache.keep("rare".into(), &"kept".into());
        for _ in 0..100 {
            tokio::time::advance(Duration::from_millis(1)).await;
            cache.keep("hot".into(), &"again".into());
        }
        assert!(cache.find("rare").is_some());
        assert!(lock(&cache.kept).order.len() < 40);
    }

    /// Else a million answers of a few bytes would fit.
    #[test]
    fn small_answers_are_no_way_around_the_bound() {
        let cache = Cache::new(100 * OVERHEAD, |_: &String| Some(0));
        for key in 0..10_000 {
            cache.keep(key.to_string(), &String::new());
        }
        assert!(lock(&cache.kept).answers.len() <= 100);
    }

    #[test]
    fn what_does_not_fit_or_is_not_to_be_kept_is_not() {
        let cache = Cache::new(OVERHEAD + 10, |text: &String| (!text.is_empty()).then_some(text.len()));
        cache.keep("a".into(), &"x".repeat(9));
        cache.keep("b".into(), &String::new());
        assert_eq!((cache.find("a"), cache.find("b")), (None, None));
    }
}
