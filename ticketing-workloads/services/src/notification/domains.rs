//! How many mails are under way to each domain: one that is slow, or that greets with delays, must not use up all sessions.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Mails under way, by domain.
pub struct Domains {
    limit: usize,
    under_way: Mutex<HashMap<String, usize>>,
}

impl Domains {
    /// At most `limit` at once to each domain.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, under_way: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that have enough under way.
    pub fn full(&self) -> Vec<String> {
        let under_way = self.lock();
        under_way.iter().filter(|(_, count)| **count >= self.limit).map(|(domain, _)| domain.clone()).collect()
    }

    /// A place for a mail to `domain`, until it is dropped; `None`: there is none. Who has no address takes no place.
    pub fn enter(self: &Arc<Self>, domain: &str) -> Option<Place> {
        if !domain.is_empty() {
            let mut under_way = self.lock();
            let count = under_way.entry(domain.to_owned()).or_default();
            if *count >= self.limit {
                return None;
            }
            *count += 1;
        }
        Some(Place { domains: Arc::clone(self), domain: domain.to_owned() })
    }
}

/// One mail under way to a domain.
pub struct Place {
    domains: Arc<Domains>,
    domain: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut under_way = self.domains.lock();
        if let Some(count) = under_way.get_mut(&self.domain) {
            *count -= 1;
            if *count == 0 {
                under_way.remove(&self.domain);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_has_so_many_places_and_forgets_those_that_are_given_back() {
        let domains = Domains::new(2);
        let places: Vec<_> = (0..3).map(|_| domains.enter("slow.example")).collect();
        assert_eq!(places.iter().flatten().count(), 2);
        assert_eq!(domains.full(), ["slow.example"]);
        let nowhere: Vec<_> = (0..3).map(|_| domains.enter("")).collect();
        assert!(nowhere.iter().all(Option::is_some) && domains.enter("other.example").is_some());
        drop(places);
        assert!(domains.full().is_empty() && domains.lock().is_empty());
    }
}
