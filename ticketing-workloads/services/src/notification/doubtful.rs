//! Claims whose outcome is not known: a statement whose caller has given up may still be made, and then claims messages that nobody
//! works on. They are given back until no such statement can be under way any more.

use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;
use uuid::Uuid;

/// How long after its claim began a statement may still be made: as long as the call may take with all its attempts, and as long as a connection
/// that was given up is kept for the end of its statement.
const LATE: Duration = Duration::from_secs(30);
/// Claims in doubt that are remembered. What others have claimed is free again when the claim runs out.
const MOST: usize = 16;

/// Messages that a claim may have, and that nobody works on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    pub claim: Uuid,
    pub messages: Vec<i64>,
    until: Instant,
}

/// All claims in doubt.
#[derive(Debug, Default)]
pub struct Doubtful(VecDeque<Doubt>);

impl Doubtful {
    /// A claim of some of these messages begins: until its answer is there, it may have all of them.
    pub fn begin(&mut self, claim: Uuid, messages: Vec<i64>, now: Instant) {
        self.0.push_back(Doubt { claim, messages, until: now + LATE });
        if self.0.len() > MOST {
            self.0.pop_front();
        }
    }

    /// The answer to a claim is there: only what is left may still be claimed by another attempt; nothing: there was none.
    pub fn settle(&mut self, claim: Uuid, left: Vec<i64>) {
        if left.is_empty() {
            self.0.retain(|doubt| doubt.claim != claim);
        } else if let Some(doubt) = self.0.iter_mut().find(|doubt| doubt.claim == claim) {
            doubt.messages = left;
        }
    }

    /// What is to be given back now.
    pub fn all(&self) -> Vec<Doubt> {
        self.0.iter().cloned().collect()
    }

    /// It was given back at `now`: that is the end of the doubt if nothing can claim it any more.
    pub fn given_back(&mut self, claim: Uuid, now: Instant) {
        self.0.retain(|doubt| doubt.claim != claim || now < doubt.until);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(doubtful: &Doubtful) -> Vec<(u128, Vec<i64>)> {
        doubtful.all().into_iter().map(|doubt| (doubt.claim.as_u128(), doubt.messages)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_still_be_claimed_is_given_back_again() {
        let (mut doubtful, claim) = (Doubtful::default(), Uuid::from_u128(1));
        doubtful.begin(claim, vec![1, 2, 3], Instant::now());
        assert_eq!(claims(&doubtful), [(1, vec![1, 2, 3])]);
        doubtful.settle(claim, vec![3]);
        for _ in 0..3 {
            assert_eq!(claims(&doubtful), [(1, vec![3])]);
            doubtful.given_back(claim, Instant::now());
            tokio::time::advance(LATE / 3).await;
        }
        // Once more, now that no statement is under way any more.
        assert_eq!(claims(&doubtful), [(1, vec![3])]);
        doubtful.given_back(claim, Instant::now());
        assert_eq!(claims(&doubtful), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_with_an_answer_to_its_only_attempt_is_in_no_doubt() {
        let (mut doubtful, now) = (Doubtful::default(), Instant::now());
        doubtful.begin(Uuid::from_u128(1), vec![1], now);
        doubtful.begin(Uuid::from_u128(2), vec![2], now);
        doubtful.settle(Uuid::from_u128(1), Vec::new());
        doubtful.given_back(Uuid::from_u128(1), now + LATE);
        assert_eq!(claims(&doubtful), [(2, vec![2])]);
    }

    #[tokio::test(start_paused = true)]
    async fn some_are_remembered() {
        let mut doubtful = Doubtful::default();
        for claim in 0..100 {
            doubtful.begin(Uuid::from_u128(claim), vec![1], Instant::now());
        }
        assert_eq!(claims(&doubtful).len(), MOST);
        assert_eq!(claims(&doubtful).last(), Some(&(99, vec![1])));
    }
}
