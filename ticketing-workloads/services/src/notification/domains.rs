//! How many mails are under way to each domain: one that is slow, or that greets with delays, must not use up all sessions.
//!
//! What counts is the domain that somebody has registered ([`site`]): below it there may be as many names as its owner likes.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Names below full sites that are remembered, so that the outbox need not be asked for mails to them.
const MAX_TURNED_AWAY: usize = 300;

/// The part of a domain that was registered with a registry, by the public suffix list: that of `mx.tickets.example.co.uk` is
/// `example.co.uk`. A domain whose owner gives names below it to strangers counts as one, too.
pub fn site(domain: &str) -> &str {
    let mut name = domain;
    loop {
        let private = psl::suffix(name.as_bytes()).filter(|suffix| suffix.typ() == Some(psl::Type::Private));
        let Some(suffix) = private.and_then(|suffix| name.get(name.len() - suffix.as_bytes().len()..)) else {
            return psl::domain_str(name).unwrap_or(name);
        };
        let Some(parent) = suffix.split_once('.').and_then(|(_, above)| psl::domain_str(above)) else { return suffix };
        name = parent;
    }
}

/// Sites that get fewer mails than the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// None at all.
    pub closed: BTreeSet<String>,
    /// One at a time.
    pub single: BTreeSet<String>,
}

/// Mails under way, by site.
pub struct Domains {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    under_way: HashMap<String, usize>,
    /// Domains of mails that had no place.
    turned_away: BTreeSet<String>,
}

impl State {
    fn is_full(&self, site: &str, limit: usize, limits: &Limits) -> bool {
        let most = if limits.closed.contains(site) {
            0
        } else if limits.single.contains(site) {
            1
        } else {
            limit
        };
        self.under_way.get(site).copied().unwrap_or_default() >= most
    }
}

impl Domains {
    /// At most `limit` at once to each site.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, state: Mutex::default() })
    }

    /// At most so many at once to a site.
    pub fn limit(&self) -> usize {
        self.limit
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is no place for a mail to this domain.
    pub fn is_full(&self, domain: &str, limits: &Limits) -> bool {
        !domain.is_empty() && self.lock().is_full(site(domain), self.limit, limits)
    }

    /// Domains that have no place, as far as they are known by name.
    pub fn full(&self, limits: &Limits) -> BTreeSet<String> {
        let mut state = self.lock();
        let turned_away = std::mem::take(&mut state.turned_away);
        state.turned_away =
            turned_away.into_iter().filter(|domain| state.is_full(site(domain), self.limit, limits)).collect();
        let full = state.under_way.keys().filter(|site| state.is_full(site, self.limit, limits));
        limits.closed.iter().chain(full).chain(&state.turned_away).cloned().collect()
    }

    /// A place for a mail to `domain`, until it is dropped; `None`: there is none. A mail without an address takes no place.
    pub fn enter(self: &Arc<Self>, domain: &str, limits: &Limits) -> Option<Place> {
        let site = site(domain);
        if !domain.is_empty() {
            let mut state = self.lock();
            if state.is_full(site, self.limit, limits) {
                if state.turned_away.len() < MAX_TURNED_AWAY {
                    state.turned_away.insert(domain.to_owned());
                }
                return None;
            }
            *state.under_way.entry(site.to_owned()).or_default() += 1;
        }
        Some(Place { domains: Arc::clone(self), site: site.to_owned() })
    }
}

/// One mail under way to a site.
pub struct Place {
    domains: Arc<Domains>,
    site: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.domains.lock();
        if let Some(count) = state.under_way.get_mut(&self.site) {
            *count -= 1;
            if *count == 0 {
                state.under_way.remove(&self.site);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("example.com", "example.com")]
    #[case("a.b.example.com", "example.com")]
    #[case("mx.tickets.example.co.uk", "example.co.uk")]
    #[case("hotmail.co.uk", "hotmail.co.uk")]
    #[case("a.münchen.example", "münchen.example")]
    #[case::names_for_strangers("one.duckdns.org", "duckdns.org")]
    #[case::deeper("a.b.one.github.io", "github.io")]
    #[case::in_a_name_of_its_own("bucket.s3.amazonaws.com", "amazonaws.com")]
    #[case::a_suffix_itself("co.uk", "co.uk")]
    #[case::no_dot("localhost", "localhost")]
    #[case::none("", "")]
    fn names_below_one_are_its_own(#[case] domain: &str, #[case] expected: &str) {
        assert_eq!(site(domain), expected);
    }

    /// Each of a stranger's names had places of its own, and together they had all sessions.
    #[test]
    fn all_names_of_one_owner_share_its_places() {
        let domains = Domains::new(2);
        let none = Limits::default();
        let names: Vec<_> = (0..1_000).map(|nth| format!("name{nth}.stranger.example")).collect();
        let places: Vec<_> = names.iter().map(|name| domains.enter(name, &none)).collect();
        assert_eq!(places.iter().flatten().count(), 2);
        let full = domains.full(&none);
        assert!(full.contains("stranger.example") && full.contains("name2.stranger.example"), "they are not asked for");
        assert!(full.len() <= 1 + MAX_TURNED_AWAY, "{}", full.len());
        assert!(domains.is_full("another.stranger.example", &none) && !domains.is_full("other.example", &none));
        drop(places);
        assert!(domains.full(&none).is_empty());
    }

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
        assert!(domains.full(&none).is_empty() && domains.lock().under_way.is_empty());
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
        assert!(domains.lock().under_way.len() <= 1, "the second place is given back");
    }
}
