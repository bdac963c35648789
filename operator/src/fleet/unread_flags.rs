//! The flags that no pod of a workload reads.

use crate::kubernetes::meta::cut;
use contract::{
    Applied,
    flag_problem::{MAX_FLAG_PROBLEM_BYTES, MAX_FLAG_PROBLEMS},
};
use std::collections::BTreeSet;

/// The beginning of what a pod reports: it may report anything.
pub fn bounded(keys: &[String]) -> Vec<String> {
    keys.iter().take(MAX_FLAG_PROBLEMS).map(|key| cut(key, MAX_FLAG_PROBLEM_BYTES).to_owned()).collect()
}

/// Goes through the ready pods of a workload. A flag is unread if each of them says so: one that was not heard, that runs another
/// document, or that is too old to say it, may well read it.
#[derive(Default)]
pub struct UnreadFlags<'a>(Option<BTreeSet<&'a str>>);

impl<'a> UnreadFlags<'a> {
    /// Counts one ready pod; `None`: it was not heard.
    pub fn count(&mut self, applied: Option<&'a Applied>, content_hash: &str) {
        let applied = applied.filter(|applied| applied.content_hash == content_hash);
        let says: BTreeSet<&str> = applied.into_iter().flat_map(|one| &one.flags_unread).map(String::as_str).collect();
        self.0 = Some(match self.0.take() {
            None => says,
            Some(before) => before.intersection(&says).copied().collect(),
        });
    }

    /// The keys.
    pub fn done(self) -> BTreeSet<String> {
        self.0.unwrap_or_default().into_iter().map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(content_hash: &str, unread: &[&str]) -> Applied {
        let flags_unread = unread.iter().map(|key| (*key).to_owned()).collect();
        Applied { content_hash: content_hash.to_owned(), flags_unread, ..Applied::default() }
    }

    #[rstest::rstest]
    #[case::all_say_so(&[Some(applied("now", &["a", "b"])), Some(applied("now", &["b", "c"]))], &["b"])]
    #[case::one_reads_it(&[Some(applied("now", &["a"])), Some(applied("now", &[]))], &[])]
    #[case::one_runs_another_document(&[Some(applied("now", &["a"])), Some(applied("before", &["a"]))], &[])]
    #[case::one_was_not_heard(&[None, Some(applied("now", &["a"]))], &[])]
    #[case::no_pod(&[], &[])]
    fn a_flag_is_unread_if_every_pod_says_so(#[case] pods: &[Option<Applied>], #[case] expected: &[&str]) {
        let mut unread = UnreadFlags::default();
        for pod in pods {
            unread.count(pod.as_ref(), "now");
        }
        assert_eq!(unread.done().iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_a_pod_says_is_cut() {
        let endless: Vec<_> = (0..1_000).map(|nth| format!("{nth}{}", "ß".repeat(500))).collect();
        let kept = bounded(&endless);
        assert_eq!(kept.len(), MAX_FLAG_PROBLEMS);
        assert!(kept.iter().all(|key| key.len() <= MAX_FLAG_PROBLEM_BYTES));
    }
}
