//! How many mails are under way to each domain: one that is slow, or that greets with delays, must not use up all sessions.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Domains that get fewer mails than the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// None at all.
    pub closed: BTreeSet<String>,
    /// One at a time.
    pub single: BTreeSet<String>,
}

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

    /// At most so many at once to a domain.
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit_of(&self, domain: &str, limits: &Limits) -> usize {
        if limits.closed.contains(domain) {
            0
        } else if limits.single.contains(domain) {
            1
        } else {
            self.limit
        }
    }

    /// Those that have no place.
    pub fn full(&self, limits: &Limits) -> BTreeSet<String> {
        let under_way = self.lock();
        let full = under_way.iter().filter(|(domain, count)| **count >= self.limit_of(domain, limits));
        limits.closed.iter().chain(full.map(|(domain, _)| domain)).cloned().collect()
    }

    /// A place for a mail to `domain`, until it is dropped; `None`: there is none. A mail without an address takes no place.
    pub fn enter(self: &Arc<Self>, domain: &str, limits: &Limits) -> Option<Place> {
        if !domain.is_empty() {
            let mut under_way = self.lock();
            let count = under_way.get(domain).copied().unwrap_or_default();
            if count >= self.limit_of(domain, limits) {
                return None;
            }
            under_way.insert(domain.to_owned(), count + 1);
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
        let none = Limits::default();
        let places: Vec<_> = (0..3).map(|_| domains.enter("slow.example", &none)).collect();
        assert_eq!(places.iter().flatten().count(), 2);
        assert_eq!(domains.full(&none), BTreeSet::from(["slow.example".to_owned()]));
        let nowhere: Vec<_> = (0..3).map(|_| domains.enter("", &none)).collect();
        assert!(nowhere.iter().all(Option::is_some) && domains.enter("other.example", &none).is_some());
        drop(places);
        assert!(domains.full(&none).is_empty() && domains.lock().is_empty());
    }

    #[test]
    fn a_domain_that_is_set_aside_has_no_place_and_then_one() {
        let domains = Domains::new(2);
        let closed = Limits { closed: ["slow.example".to_owned()].into(), ..Limits::default() };
        assert!(domains.enter("slow.example", &closed).is_none());
        assert_eq!(domains.full(&closed), closed.closed);
        let single = Limits { single: closed.closed, ..Limits::default() };
        let place = domains.enter("slow.example", &single);
        assert!(place.is_some() && domains.enter("slow.example", &single).is_none());
        assert_eq!(domains.full(&single), single.single);
        assert!(domains.enter("other.example", &single).is_some());
        assert!(domains.lock().len() <= 1, "the second place is given back");
    }
}
