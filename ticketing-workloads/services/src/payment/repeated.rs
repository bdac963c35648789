//! Failures of a provider that come back for the same order. A provider that has failed for one order may do so again each time
//! it is asked: it keeps a failure for its key and replays it, or stumbles over that order alone. So an order counts once, or
//! its retries would open the circuit for everybody else. Where several orders fail and none goes well between them, it is the
//! provider, and everything counts.

use crate::http_client::HttpAnswer;
use axum::http::{HeaderValue, StatusCode};
use std::collections::VecDeque;

/// Orders that are remembered.
const REMEMBERED: usize = 64;
/// So many different orders that fail without one that goes well are no fault of an order.
const SEVERAL: usize = 3;
/// What Stripe says of an answer that it has kept for the key.
const REPLAYED: &str = "idempotent-replayed";

/// Whether a failure is one that its order had before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repetition {
    /// It counts.
    None,
    /// The order has failed before; the next try of it may go better.
    SameOrder,
    /// The provider says that it answers the same to this key for ever.
    SameKey,
}

/// The orders that a provider has failed for, the last new one last.
#[derive(Debug, Default)]
pub struct FailedOrders(VecDeque<Failed>);

#[derive(Debug)]
struct Failed {
    order: String,
    /// Whether it has failed since an order last went well.
    lately: bool,
}

impl FailedOrders {
    /// Notes that the provider has failed for `order` with this answer.
    pub fn note(&mut self, order: &str, answer: &HttpAnswer) -> Repetition {
        let replayed = answer.headers.get(REPLAYED) == Some(&HeaderValue::from_static("true"));
        // Nothing else is kept for a key: it comes from something before the provider, which is in trouble.
        if !replayed && answer.status != StatusCode::INTERNAL_SERVER_ERROR {
            return Repetition::None;
        }
        let known = self.0.iter_mut().find(|failed| failed.order == order);
        let is_new = known.is_none();
        if let Some(failed) = known {
            failed.lately = true;
        } else {
            if self.0.len() >= REMEMBERED {
                self.0.pop_front();
            }
            self.0.push_back(Failed { order: order.to_owned(), lately: true });
        }
        let several = self.0.iter().filter(|failed| failed.lately).count() >= SEVERAL;
        match (several, replayed, is_new) {
            (true, ..) | (_, false, true) => Repetition::None,
            (_, true, _) => Repetition::SameKey,
            (_, false, false) => Repetition::SameOrder,
        }
    }

    /// Notes that the provider has answered whether it charges `order`.
    pub fn answered(&mut self, order: &str) {
        self.0.retain(|failed| failed.order != order);
        self.0.iter_mut().for_each(|failed| failed.lately = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderMap, HeaderName};

    fn answer(status: u16, replayed: bool) -> HttpAnswer {
        let header = (HeaderName::from_static(REPLAYED), HeaderValue::from_static("true"));
        let headers: HeaderMap = replayed.then_some(header).into_iter().collect();
        let status = StatusCode::from_u16(status).unwrap();
        HttpAnswer { status, headers, body: axum::body::Bytes::new(), from_ejected: false }
    }

    #[test]
    fn an_order_counts_once_until_it_is_answered() {
        let mut failed = FailedOrders::default();
        let orders = ["a", "a", "b", "a"].map(|order| failed.note(order, &answer(500, false)));
        let [first, again] = [Repetition::None, Repetition::SameOrder];
        assert_eq!(orders, [first, again, first, again]);
        failed.answered("a");
        assert_eq!(failed.note("b", &answer(500, false)), again);
        assert_eq!(failed.note("a", &answer(500, false)), first);
    }

    #[test]
    fn what_is_replayed_does_not_count_and_what_is_not_kept_always_does() {
        let mut failed = FailedOrders::default();
        assert_eq!(failed.note("a", &answer(500, true)), Repetition::SameKey, "kept before this process began");
        for _ in 0..3 {
            assert_eq!(failed.note("a", &answer(503, false)), Repetition::None);
        }
    }

    /// Or a provider that fails for all would not open the circuit as soon as without any of this.
    #[test]
    fn everything_counts_while_several_orders_fail_and_none_goes_well() {
        let mut failed = FailedOrders::default();
        let mut note = |order: &str, replayed| failed.note(order, &answer(500, replayed));
        note("a", false);
        note("b", false);
        assert_eq!(note("b", true), Repetition::SameKey);
        assert_eq!(["c", "a", "b"].map(|order| note(order, true)), [Repetition::None; 3]);
        failed.answered("d");
        assert_eq!(["a", "b"].map(|order| failed.note(order, &answer(500, true))), [Repetition::SameKey; 2]);
    }

    #[test]
    fn the_orders_that_are_remembered_are_bounded() {
        let mut failed = FailedOrders::default();
        for order in 0..=REMEMBERED {
            failed.note(&order.to_string(), &answer(500, false));
        }
        assert_eq!((failed.0.len(), failed.0[0].order.as_str()), (REMEMBERED, "1"));
    }
}
