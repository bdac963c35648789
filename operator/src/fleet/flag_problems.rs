//! What the pods of a workload find wrong with the flags of what is published.

use crate::kubernetes::meta::cut;
use contract::{
    Applied, FlagProblem, FlagProblemKind, Source,
    flag_problem::{MAX_FLAG_PROBLEM_BYTES, MAX_FLAG_PROBLEMS},
};
use std::collections::BTreeMap;

/// Most flags of a workload that are kept, each with one kind of problem.
const MAX_FLAGS: usize = 4 * MAX_FLAG_PROBLEMS;

/// A flag with which pods have a problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlagTrouble {
    /// Key of the flag.
    pub key: String,
    /// What kind of problem it is.
    pub kind: FlagProblemKind,
    /// What one of the pods says of it.
    pub message: String,
    /// How many ready pods have it.
    pub pods: usize,
    /// The flag set, by uid, that the published flag is of.
    pub set: String,
}

/// The beginning of what a pod reports: it may report anything.
pub fn bounded(problems: &[FlagProblem]) -> Vec<FlagProblem> {
    let shortened = |problem: &FlagProblem| FlagProblem {
        key: cut(&problem.key, MAX_FLAG_PROBLEM_BYTES).to_owned(),
        kind: problem.kind,
        message: cut(&problem.message, MAX_FLAG_PROBLEM_BYTES).to_owned(),
    };
    // Of two kinds.
    problems.iter().take(2 * MAX_FLAG_PROBLEMS).map(shortened).collect()
}

/// Counts the problems of pods.
#[derive(Default)]
pub struct FlagTroubles<'a>(BTreeMap<(&'a str, FlagProblemKind), (&'a str, usize)>);

impl<'a> FlagTroubles<'a> {
    /// Counts those of one pod, if it runs `content_hash`: what it says of another document says nothing of this one.
    pub fn count(&mut self, applied: &'a Applied, content_hash: &str) {
        let runs_it = applied.content_hash == content_hash;
        for problem in applied.flag_problems.iter().filter(|_| runs_it) {
            let full = self.0.len() >= MAX_FLAGS;
            let key = (problem.key.as_str(), problem.kind);
            if let Some((_, pods)) = self.0.get_mut(&key) {
                *pods += 1;
            } else if !full {
                self.0.insert(key, (&problem.message, 1));
            }
        }
    }

    /// The count, given the flag sets that the published document was made from. A flag that none of them has is left out.
    pub fn done(self, sources: &[Source]) -> Vec<FlagTrouble> {
        let found = |((key, kind), (message, pods)): ((&str, FlagProblemKind), (&str, usize))| {
            let source = sources.iter().find(|source| source.keys.iter().any(|one| one == key))?;
            Some(FlagTrouble { key: key.to_owned(), kind, message: message.to_owned(), pods, set: source.uid.clone() })
        };
        self.0.into_iter().filter_map(found).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(key: &str, kind: FlagProblemKind, message: &str) -> FlagProblem {
        FlagProblem { key: key.to_owned(), kind, message: message.to_owned() }
    }

    fn applied(content_hash: &str, flag_problems: Vec<FlagProblem>) -> Applied {
        Applied { content_hash: content_hash.to_owned(), flag_problems, ..Applied::default() }
    }

    #[test]
    fn problems_are_counted_by_flag_and_belong_to_the_set_of_the_flag() {
        let source = |name: &str, keys: &[&str]| Source {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            generation: 1,
            keys: keys.iter().map(ToString::to_string).collect(),
            ..Source::default()
        };
        let (rule, type_) = (FlagProblemKind::InvalidRule, FlagProblemKind::TypeMismatch);
        let one = applied("now", vec![problem("pdf", type_, "a string"), problem("vip", rule, "unknown")]);
        let other = applied("now", vec![problem("pdf", type_, "a list"), problem("gone", rule, "unknown")]);
        let behind = applied("before", vec![problem("pdf", type_, "a string"), problem("x", type_, "a string")]);
        let mut troubles = FlagTroubles::default();
        for pod in [&one, &other, &behind] {
            troubles.count(pod, "now");
        }
        let found = troubles.done(&[source("a", &["vip"]), source("b", &["pdf", "x"])]);
        let trouble = |key: &str, kind, message: &str, pods, set: &str| FlagTrouble {
            key: key.to_owned(),
            kind,
            message: message.to_owned(),
            pods,
            set: set.to_owned(),
        };
        assert_eq!(found, [trouble("pdf", type_, "a string", 2, "uid-b"), trouble("vip", rule, "unknown", 1, "uid-a")]);
    }

    #[test]
    fn what_a_pod_says_is_cut() {
        let endless: Vec<_> = (0..1_000)
            .map(|nth| problem(&format!("{nth}{}", "ß".repeat(500)), FlagProblemKind::Unknown, &"ß".repeat(500)))
            .collect();
        let kept = bounded(&endless);
        assert_eq!(kept.len(), 2 * MAX_FLAG_PROBLEMS);
        let is_short = |text: &str| text.len() <= MAX_FLAG_PROBLEM_BYTES;
        assert!(kept.iter().all(|one| is_short(&one.key) && is_short(&one.message)));
        let mut troubles = FlagTroubles::default();
        let pods: Vec<_> = endless.chunks(10).map(|some| applied("now", bounded(some))).collect();
        for pod in &pods {
            troubles.count(pod, "now");
        }
        assert_eq!(troubles.0.len(), MAX_FLAGS);
    }
}
