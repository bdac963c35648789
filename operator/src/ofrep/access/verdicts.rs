//! What the API server said of tokens, for a short time.

use super::Digest;
use std::{collections::HashMap, time::Duration};
use tokio::time::Instant;

/// How long a yes holds: so long somebody whose right was taken away may still read flags.
pub const YES_FOR: Duration = Duration::from_secs(60);
/// How long a no holds: so long somebody who was just given the right waits.
pub const NO_FOR: Duration = Duration::from_secs(5);
/// Most verdicts that are kept.
const MAX_VERDICTS: usize = 4096;
/// Longest name of a user that is kept, in bytes.
pub const MAX_USER_BYTES: usize = 256;

/// Whether the holder of a token may read the flags of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may.
    Allowed,
    /// It is this user, who may not.
    Forbidden(String),
    /// It is nobody.
    Unauthenticated,
}

/// Verdicts by token and namespace.
#[derive(Default)]
pub struct Verdicts(HashMap<(Digest, String), (Verdict, Instant)>);

impl Verdicts {
    /// The verdict, if it still holds.
    pub fn get(&self, digest: &Digest, namespace: &str, now: Instant) -> Option<Verdict> {
        let (verdict, until) = self.0.get(&(*digest, namespace.to_owned()))?;
        (now < *until).then(|| verdict.clone())
    }

    /// Keeps a verdict from now on.
    pub fn put(&mut self, digest: Digest, namespace: &str, verdict: Verdict, now: Instant) {
        if self.0.len() >= MAX_VERDICTS {
            self.0.retain(|_, (_, until)| now < *until);
        }
        if self.0.len() >= MAX_VERDICTS {
            let first = self.0.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| key.clone());
            first.and_then(|key| self.0.remove(&key));
        }
        let time = if verdict == Verdict::Allowed { YES_FOR } else { NO_FOR };
        self.0.insert((digest, namespace.to_owned()), (verdict, now + time));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(Verdict::Allowed, YES_FOR)]
    #[case(Verdict::Forbidden("ann".into()), NO_FOR)]
    #[case(Verdict::Unauthenticated, NO_FOR)]
    fn a_verdict_holds_for_its_time_its_token_and_its_namespace(#[case] verdict: Verdict, #[case] time: Duration) {
        let (mut verdicts, now) = (Verdicts::default(), Instant::now());
        verdicts.put([1; 32], "n", verdict.clone(), now);
        let before_the_end = now + time - Duration::from_millis(1);
        assert_eq!(verdicts.get(&[1; 32], "n", before_the_end), Some(verdict));
        assert_eq!(verdicts.get(&[1; 32], "n", now + time), None);
        assert_eq!(verdicts.get(&[2; 32], "n", now).or(verdicts.get(&[1; 32], "m", now)), None);
    }

    #[test]
    fn there_are_never_too_many() {
        let (mut verdicts, now) = (Verdicts::default(), Instant::now());
        verdicts.put([0; 32], "allowed", Verdict::Allowed, now);
        for number in 0..2 * MAX_VERDICTS {
            verdicts.put([0; 32], &number.to_string(), Verdict::Unauthenticated, now);
        }
        assert_eq!(verdicts.0.len(), MAX_VERDICTS);
        assert!(verdicts.get(&[0; 32], "allowed", now).is_some(), "what ends first makes room");
        let later = now + NO_FOR;
        verdicts.put([0; 32], "later", Verdict::Unauthenticated, later);
        assert_eq!(verdicts.0.len(), 2, "what is over makes room");
    }
}
