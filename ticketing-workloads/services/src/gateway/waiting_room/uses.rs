//! How often a place was used: somebody who was let in may begin some orders, not any number of them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Orders that may be begun on one place, at each gateway. One that fails, or for which there is no room, does not count.
pub const MAX_ORDERS: u8 = 5;
/// Places that are counted at once; 16 bytes each. Above it the ones that come then are not, for lack of memory must not stop
/// the sale.
const MAX_PLACES: usize = 100_000;

#[derive(Default)]
pub struct Uses(Mutex<HashMap<u64, u8>>);

impl Uses {
    /// Counts an order on the place `number`. `false`: there were too many. Those up to `lapsed` are forgotten.
    pub fn take(&self, number: u64, lapsed: u64) -> bool {
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if uses.len() >= MAX_PLACES && !uses.contains_key(&number) {
            uses.retain(|used, _| *used > lapsed);
            if uses.len() >= MAX_PLACES {
                return true;
            }
        }
        let count = uses.entry(number).or_default();
        let is_left = *count < MAX_ORDERS;
        *count += u8::from(is_left);
        is_left
    }

    /// The order came to nothing.
    pub fn give_back(&self, number: u64) {
        let mut uses = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = uses.get_mut(&number) {
            *count = count.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_good_for_some_orders_and_one_that_failed_does_not_count() {
        let uses = Uses::default();
        assert!((0..MAX_ORDERS).all(|_| uses.take(7, 0)));
        assert!(!uses.take(7, 0));
        assert!(uses.take(8, 0), "each place for itself");
        uses.give_back(7);
        assert!(uses.take(7, 0) && !uses.take(7, 0));
        uses.give_back(99);
        assert_eq!(uses.0.lock().unwrap().len(), 2);
    }

    #[test]
    fn no_more_places_are_counted_than_there_is_memory_for() {
        let uses = Uses::default();
        let most = u64::try_from(MAX_PLACES).unwrap();
        assert!((1..=most + 10).all(|number| uses.take(number, 0)));
        assert_eq!(uses.0.lock().unwrap().len(), MAX_PLACES);
        assert!(uses.take(most + 11, most - 1), "lapsed ones are forgotten");
        assert_eq!(uses.0.lock().unwrap().len(), 2);
    }
}
