//! What is known of our API key at a provider: whether it can be read here, whether it is taken there, and whether it
//! may be used for what it is there for.

use arc_swap::ArcSwapOption;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Orders in a row for which a provider forbids the same, after which that is about our key, not about them.
const FORBIDDEN_ORDERS: usize = 5;

/// What an order needs a key for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// To make an object.
    Create,
    /// To confirm it, which charges.
    Charge,
}

/// Why our key is good for nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyTrouble {
    /// Nothing is sent without it.
    #[error("the API key cannot be sent: {0}; see to the Secret that holds it")]
    Unusable(String),
    /// With the provider's words.
    #[error("it does not take the API key: {0}; check the Secret that holds it")]
    Refused(String),
    /// With the provider's words.
    #[error(
        "it let the API key make no payment for the last {FORBIDDEN_ORDERS} orders or more: {0}; check what the key may do"
    )]
    MayNotCreate(String),
    /// With the provider's words.
    #[error(
        "it let the API key confirm no payment for the last {FORBIDDEN_ORDERS} orders or more: {0}; check what the key may do"
    )]
    MayNotCharge(String),
}

/// Different orders in a row for which the same was forbidden.
#[derive(Default)]
struct Forbidden {
    orders: Vec<String>,
    /// What the provider said of the last of them.
    words: String,
}

impl Forbidden {
    /// One order may be tried as often as it likes, and so may a few in turn.
    fn note(&mut self, order: &str, words: &str) {
        if self.orders.len() < FORBIDDEN_ORDERS && !self.orders.iter().any(|known| known == order) {
            self.orders.push(order.to_owned());
        }
        words.clone_into(&mut self.words);
    }

    fn words(&self) -> Option<String> {
        (self.orders.len() >= FORBIDDEN_ORDERS).then(|| self.words.clone())
    }
}

/// What is known of a key.
#[derive(Default)]
pub struct Key {
    /// Since it was last taken.
    trouble: ArcSwapOption<KeyTrouble>,
    /// Whether the provider has forbidden something since the key was last tried: one order, or all that the key is
    /// for.
    forbade: AtomicBool,
    creations: Mutex<Forbidden>,
    charges: Mutex<Forbidden>,
}

impl Key {
    fn forbidden(&self, usage: Use) -> MutexGuard<'_, Forbidden> {
        let of_usage = match usage {
            Use::Create => &self.creations,
            Use::Charge => &self.charges,
        };
        of_usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing could be sent for want of it.
    pub fn is_unusable(&self, why: &str) {
        self.trouble.store(Some(Arc::new(KeyTrouble::Unusable(why.to_owned()))));
    }

    /// It can be sent. If it could not be, nobody knows what the provider says of it.
    pub fn is_usable(&self) {
        if self.trouble.load().as_deref().is_some_and(|trouble| matches!(trouble, KeyTrouble::Unusable(_))) {
            self.trouble.store(None);
            self.forbade.store(true, Ordering::Relaxed);
        }
    }

    /// The provider does not take it.
    pub fn is_refused(&self, words: &str) {
        self.trouble.store(Some(Arc::new(KeyTrouble::Refused(words.to_owned()))));
    }

    /// Something was forbidden.
    pub fn has_forbidden(&self) {
        self.forbade.store(true, Ordering::Relaxed);
    }

    /// It was taken.
    pub fn is_taken(&self) {
        self.trouble.store(None);
    }

    /// It was tried: a "no" is about the key, whatever was asked for.
    pub fn was_tried(&self, refusal: Option<String>) {
        self.forbade.store(refusal.is_some(), Ordering::Relaxed);
        self.trouble.store(refusal.map(|words| Arc::new(KeyTrouble::Refused(words))));
    }

    /// Whether there is a reason to try it.
    pub fn is_in_doubt(&self) -> bool {
        self.forbade.load(Ordering::Relaxed) || self.trouble.load().is_some()
    }

    /// The provider has done for an order what the key is for, or has answered that it does not.
    pub fn may(&self, usage: Use) {
        *self.forbidden(usage) = Forbidden::default();
    }

    /// The provider has forbidden to do that for `order`.
    pub fn may_not(&self, usage: Use, order: &str, words: &str) {
        self.forbidden(usage).note(order, words);
    }

    /// What is wrong with it. A key with which something can be read is taken all the same, and all orders go
    /// elsewhere.
    pub fn trouble(&self) -> Option<KeyTrouble> {
        let known = self.trouble.load_full().map(|trouble| KeyTrouble::clone(&trouble));
        known
            .or_else(|| self.forbidden(Use::Create).words().map(KeyTrouble::MayNotCreate))
            .or_else(|| self.forbidden(Use::Charge).words().map(KeyTrouble::MayNotCharge))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One order may be forbidden, however often it is tried, and so may a few that are tried in turn; many are not.
    #[test]
    fn forbidden_orders_are_counted_each_once() {
        let key = Key::default();
        for order in ["a", "a", "b", "a", "b", "c", "d", "a", "d"] {
            key.may_not(Use::Create, order, "no");
        }
        assert_eq!(key.trouble(), None);
        key.may_not(Use::Create, "e", "never");
        assert_eq!(key.trouble(), Some(KeyTrouble::MayNotCreate("never".to_owned())));
        key.may(Use::Create);
        assert_eq!(key.trouble(), None);
    }

    /// A key may be good for making objects and not for confirming them: each order makes one first.
    #[test]
    fn that_something_is_made_says_nothing_of_confirmations() {
        let key = Key::default();
        for order in ["a", "b", "c", "d", "e"] {
            key.may(Use::Create);
            key.may_not(Use::Charge, order, "no");
        }
        assert_eq!(key.trouble(), Some(KeyTrouble::MayNotCharge("no".to_owned())));
        key.may(Use::Charge);
        assert_eq!(key.trouble(), None);
    }

    #[test]
    fn a_key_that_is_there_again_is_tried() {
        let key = Key::default();
        key.is_usable();
        assert!(!key.is_in_doubt(), "nothing was wrong with it");
        key.is_unusable("it is empty");
        assert_eq!(key.trouble(), Some(KeyTrouble::Unusable("it is empty".to_owned())));
        key.is_usable();
        assert_eq!((key.trouble(), key.is_in_doubt()), (None, true));
        key.was_tried(Some("revoked".to_owned()));
        key.is_usable();
        assert_eq!(key.trouble(), Some(KeyTrouble::Refused("revoked".to_owned())), "that it can be sent helps nothing");
        key.was_tried(None);
        assert_eq!((key.trouble(), key.is_in_doubt()), (None, false));
    }
}
