//! Order of documents.
//!
//! A revision says only which of two documents is newer; whether two documents *mean* the same is decided by the content
//! hash alone. Revisions are milliseconds since the Unix epoch, pushed up where the clock does not grow, so that they
//! keep growing across policies deleted and created again, across operators restarted, and across leaders.

/// How far ahead of its own clock a pod accepts a revision, in milliseconds. A document from further ahead would lock
/// every later one out, so it is refused.
pub const MAX_AHEAD_MS: i64 = 60 * 60 * 1000;

/// The revision of a new document: later than `last`, and not before `now_ms`.
///
/// A `last` beyond [`MAX_AHEAD_MS`] cannot be live in any pod, so it does not count: one forged document must not drag
/// all later ones out of the pods' reach.
pub fn mint(last: Option<i64>, now_ms: i64) -> i64 {
    match last {
        Some(last) if last < now_ms.saturating_add(MAX_AHEAD_MS) => now_ms.max(last.saturating_add(1)),
        _ => now_ms,
    }
}

/// What a pod does with an incoming revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is newer than, or the same as, what runs: take it.
    Take,
    /// It is older than what runs.
    Older,
    /// It is more than [`MAX_AHEAD_MS`] ahead of the pod's clock.
    TooFarAhead,
}

/// Decides about an incoming revision, given the one that is live.
pub fn admit(running: Option<i64>, incoming: i64, now_ms: i64) -> Admission {
    if incoming > now_ms.saturating_add(MAX_AHEAD_MS) {
        Admission::TooFarAhead
    } else if running.is_some_and(|running| incoming < running) {
        Admission::Older
    } else {
        Admission::Take
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn minted_is_newer_and_never_too_far_ahead(last in any::<i64>(), now in 0..4_102_444_800_000i64) {
            let minted = mint(Some(last), now);
            prop_assert!(minted >= now);
            prop_assert!(minted > last || last >= now + MAX_AHEAD_MS);
            prop_assert_eq!(admit(None, minted, now), Admission::Take);
        }

        #[test]
        fn a_pod_that_took_the_last_one_takes_the_next(last in 0..4_102_444_800_000i64, now in 0..4_102_444_800_000i64) {
            prop_assume!(admit(None, last, now) == Admission::Take && last < now + MAX_AHEAD_MS);
            prop_assert_eq!(admit(Some(last), mint(Some(last), now), now), Admission::Take);
        }
    }

    #[rstest::rstest]
    #[case::first(None, 1_000, Admission::Take)]
    #[case::same_again(Some(1_000), 1_000, Admission::Take)]
    #[case::older(Some(1_001), 1_000, Admission::Older)]
    #[case::an_hour_ahead(Some(1_000), 1_000 + MAX_AHEAD_MS, Admission::Take)]
    #[case::beyond_an_hour(Some(1_000), 1_001 + MAX_AHEAD_MS, Admission::TooFarAhead)]
    #[case::end_of_time(None, i64::MAX, Admission::TooFarAhead)]
    fn admission(#[case] running: Option<i64>, #[case] incoming: i64, #[case] expected: Admission) {
        assert_eq!(admit(running, incoming, 1_000), expected);
    }
}
