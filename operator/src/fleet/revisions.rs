//! The revisions of a Deployment: which one its pods are to be of, and which one it would go back to.

use super::facts::{ReplicaSetFacts, Uid};
use engine::recovery::Undo;
use std::sync::Arc;

/// A revision, and whether one of its pods was seen ready.
pub struct Revision<'a> {
    /// Its ReplicaSet.
    pub set: &'a ReplicaSetFacts,
    /// A pod of it was seen ready.
    pub proven: bool,
}

/// What the ReplicaSets of a Deployment say of its last rollout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revisions {
    /// The ReplicaSets, by uid, that have the present template. More than one, if all pods were restarted: a restart changes
    /// nothing but an annotation.
    pub current: Vec<Uid>,
    /// What a rollback would undo, or why nothing may be undone.
    pub undo: Result<Undo, String>,
    /// The highest revision there is.
    pub newest: u64,
    /// Names of the ReplicaSets that restarts made, newest first, and of the one whose template they are to have.
    pub same: Vec<Box<str>>,
    /// Name of the ReplicaSet whose template it would bring back.
    pub previous: Option<Box<str>>,
}

impl Revisions {
    /// Puts the revisions in order.
    pub fn of(mut all: Vec<Revision<'_>>) -> Self {
        all.sort_by_key(|revision| std::cmp::Reverse(revision.set.revision));
        // A Deployment gives its annotations to the ReplicaSet of its template as long as that is the newest. So the oldest one
        // that carries the id of a restart was made by it, and has the template of the one before it.
        let is_restart = |pair: &[Revision<'_>]| {
            pair[0].set.restarted_by.is_some() && pair[0].set.restarted_by != pair[1].set.restarted_by
        };
        let restarts = all.windows(2).take_while(|pair| is_restart(pair)).count();
        let current = all.iter().take(restarts + 1).map(|revision| Arc::clone(&revision.set.uid)).collect();
        let undo = match (all.get(restarts), all.get(restarts + 1)) {
            (Some(now), Some(before)) if now.set.created_at < before.set.created_at => {
                Err(format!("revision {} is itself a return to an older template", now.set.revision))
            }
            (Some(now), Some(before)) => Ok(Undo {
                began_at: now.set.created_at,
                from: now.set.revision,
                to: before.set.revision,
                proven: before.proven,
            }),
            _ => Err("there is no revision before the present one".to_owned()),
        };
        let previous = all.get(restarts + 1).filter(|_| undo.is_ok()).map(|before| before.set.name.clone());
        let same = all.iter().take(restarts + 1).map(|revision| revision.set.name.clone()).collect();
        let newest = all.first().map_or(0, |revision| revision.set.revision);
        Self { current, undo, newest, same, previous }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::Timestamp;

    /// Revision, second of its creation, id of the restart that it carries.
    fn set(revision: u64, created_at: i64, restarted_by: Option<&str>) -> ReplicaSetFacts {
        ReplicaSetFacts {
            uid: revision.to_string().into(),
            deployment: Some("d".into()),
            name: format!("booking-{revision}").into(),
            revision,
            created_at: Timestamp::from_second(created_at).unwrap(),
            restarted_by: restarted_by.map(Into::into),
        }
    }

    /// Which revision would be undone, which would come back, and when the first of the two was made.
    type Found<E> = Result<(u64, u64, i64), E>;

    fn revisions(sets: &[ReplicaSetFacts]) -> (Vec<String>, Found<String>) {
        let all = sets.iter().map(|set| Revision { set, proven: set.revision == 1 }).collect();
        let Revisions { current, undo, .. } = Revisions::of(all);
        let undo = undo.map(|undo| (undo.from, undo.to, undo.began_at.as_second()));
        (current.iter().map(ToString::to_string).collect(), undo)
    }

    #[rstest::rstest]
    #[case::two(&[set(1, 10, None), set(2, 20, None)], &["2"], Ok((2, 1, 20)))]
    #[case::restarted(&[set(1, 10, None), set(2, 20, None), set(3, 30, Some("a"))], &["3", "2"], Ok((2, 1, 20)))]
    #[case::restarted_twice(&[set(2, 20, None), set(1, 10, None), set(3, 30, Some("a")), set(4, 40, Some("b"))], &["4", "3", "2"], Ok((2, 1, 20)))]
    #[case::rolled_out_after_a_restart(&[set(2, 20, Some("a")), set(1, 10, None), set(3, 30, Some("a"))], &["3"], Ok((3, 2, 30)))]
    #[case::rolled_back(&[set(3, 10, None), set(2, 20, None)], &["3"], Err("revision 3 is itself a return to an older template"))]
    #[case::rolled_back_and_restarted(&[set(4, 30, Some("a")), set(3, 10, None), set(2, 20, None)], &["4", "3"], Err("revision 3 is itself"))]
    #[case::one(&[set(1, 10, None)], &["1"], Err("there is no revision before"))]
    #[case::only_restarted(&[set(1, 10, None), set(2, 20, Some("a"))], &["2", "1"], Err("there is no revision before"))]
    #[case::none(&[], &[], Err("there is no revision before"))]
    fn the_rollout_that_would_be_undone_is_the_last_that_changed_the_template(
        #[case] sets: &[ReplicaSetFacts],
        #[case] current: &[&str],
        #[case] expected: Found<&str>,
    ) {
        let (found, undo) = revisions(sets);
        assert_eq!(found, current);
        match (undo, expected) {
            (Ok(undo), Ok(expected)) => assert_eq!(undo, expected),
            (Err(why), Err(expected)) => assert!(why.contains(expected), "{why}"),
            (undo, expected) => panic!("{undo:?}, not {expected:?}"),
        }
    }
}
