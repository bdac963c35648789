//! Whether a compiled document has to be published, and under which revision.

use contract::{RuntimeConfig, revision};

/// The ConfigMap of a workload, as it was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Published {
    /// There is none.
    Nothing,
    /// It is ours and holds a sound document.
    Document(Box<RuntimeConfig>),
    /// It is ours, but what it holds is no sound document: somebody edited it.
    Damaged,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Publication {
    /// Nobody asked for anything and nothing is published.
    None,
    /// What is published means what was compiled.
    InSync {
        /// Its revision.
        revision: i64,
    },
    /// Publish what was compiled.
    Write {
        /// Under this revision.
        revision: i64,
    },
}

/// Decides. `wanted` is the hash of what was compiled, absent when no resource names the workload; `last_known` is the
/// highest revision known from elsewhere (status, memory), which counts when the ConfigMap was damaged or deleted.
pub fn decide(
    published: &Published,
    wanted: Option<&str>,
    defaults: &str,
    last_known: Option<i64>,
    now_ms: i64,
) -> Publication {
    let target = match (published, wanted) {
        (Published::Nothing, None) => return Publication::None,
        (_, Some(hash)) => hash,
        // The policy is gone: its workload goes back to the defaults.
        (_, None) => defaults,
    };
    let found = match published {
        Published::Document(document) => Some(document.revision),
        Published::Nothing | Published::Damaged => None,
    };
    // A revision from too far ahead is one that no pod took, so it does not count as the last one.
    let reachable = |revision: &i64| *revision < now_ms.saturating_add(revision::MAX_AHEAD_MS);
    let newest = last_known.filter(reachable);
    match published {
        Published::Document(document)
            if document.content_hash == target
                // Somebody may have put an older document of the same meaning back; pods take nothing older than theirs.
                && newest.is_none_or(|newest| newest <= document.revision)
                && revision::admit(None, document.revision, now_ms) == revision::Admission::Take =>
        {
            Publication::InSync { revision: document.revision }
        }
        _ => {
            let last = found.into_iter().chain(last_known).filter(reachable).max();
            Publication::Write { revision: revision::mint(last, now_ms) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{Section, WorkloadId};

    const NOW: i64 = 10_000_000;
    const FAR: i64 = NOW + revision::MAX_AHEAD_MS + 1;

    fn document(revision: i64) -> Published {
        let workload = WorkloadId::deployment("n", "w");
        let mut document = RuntimeConfig::new(workload, revision, Section::default(), Section::default());
        document.content_hash = "live".into();
        Published::Document(Box::new(document))
    }

    #[rstest::rstest]
    #[case::unknown_workload(Published::Nothing, None, None, Publication::None)]
    #[case::first(Published::Nothing, Some("x"), None, Publication::Write { revision: NOW })]
    #[case::same_meaning(document(5), Some("live"), None, Publication::InSync { revision: 5 })]
    #[case::an_older_one_restored(document(5), Some("live"), Some(7), Publication::Write { revision: NOW })]
    #[case::known_from_far_ahead(document(5), Some("live"), Some(FAR), Publication::InSync { revision: 5 })]
    #[case::new_meaning(document(5), Some("x"), None, Publication::Write { revision: NOW })]
    #[case::clock_behind(document(NOW + 50), Some("x"), None, Publication::Write { revision: NOW + 51 })]
    #[case::policy_gone(document(5), None, None, Publication::Write { revision: NOW })]
    #[case::deleted_by_hand(Published::Nothing, Some("x"), Some(NOW + 7), Publication::Write { revision: NOW + 8 })]
    #[case::damaged(Published::Damaged, Some("x"), Some(NOW + 7), Publication::Write { revision: NOW + 8 })]
    #[case::far_future(document(FAR), Some("x"), None, Publication::Write { revision: NOW })]
    #[case::far_future_same_meaning(document(FAR), Some("live"), None, Publication::Write { revision: NOW })]
    #[case::far_future_and_known(document(FAR), Some("x"), Some(NOW + 7), Publication::Write { revision: NOW + 8 })]
    fn publication(
        #[case] published: Published,
        #[case] wanted: Option<&str>,
        #[case] last_known: Option<i64>,
        #[case] expected: Publication,
    ) {
        assert_eq!(decide(&published, wanted, "defaults", last_known, NOW), expected);
    }
}
