//! The queue before a bulkhead: by priority, and among equals in the order of arrival. A decision apart from who waits and how.

use crate::priority::Priority;
use std::collections::VecDeque;

/// Waiters of one bulkhead, each with an id of its own.
#[derive(Debug)]
pub struct Queue<W> {
    waiters: [VecDeque<(u64, W)>; 3],
    next_id: u64,
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { waiters: std::array::from_fn(|_| VecDeque::new()), next_id: 0 }
    }
}

impl<W> Queue<W> {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiters.iter().map(VecDeque::len).sum()
    }

    /// The highest priority of which one waits.
    pub fn highest(&self) -> Option<Priority> {
        Priority::ALL.into_iter().rev().find(|priority| !self.waiters[*priority as usize].is_empty())
    }

    /// Of each priority the one that has waited longest.
    pub fn oldest(&self) -> impl Iterator<Item = &W> {
        self.waiters.iter().filter_map(|waiters| waiters.front()).map(|(_, waiter)| waiter)
    }

    /// The id that the next one to join will have.
    pub fn next_id(&self) -> u64 {
        self.next_id
    }

    /// Whether one more may wait in a queue of at most `most`: there is room, or one that is less important.
    pub fn admits(&self, priority: Priority, most: usize) -> bool {
        let lower = &self.waiters[..priority as usize];
        self.len() < most || lower.iter().any(|waiters| !waiters.is_empty())
    }

    /// Adds a waiter that it [admits](Self::admits). In a full queue it has the place of the youngest of the lowest priority,
    /// which is the answer.
    pub fn join(&mut self, priority: Priority, most: usize, waiter: W) -> Option<(Priority, W)> {
        let displaced = if self.len() < most {
            None
        } else {
            let lower = Priority::ALL.into_iter().filter(|lower| *lower < priority);
            let youngest = |lower| Some((lower, self.waiters[lower as usize].pop_back()?.1));
            lower.into_iter().find_map(youngest)
        };
        self.waiters[priority as usize].push_back((self.next_id, waiter));
        self.next_id += 1;
        displaced
    }

    /// Takes the first one.
    pub fn next(&mut self) -> Option<(Priority, W)> {
        let priority = self.highest()?;
        let (_, waiter) = self.waiters[priority as usize].pop_front()?;
        Some((priority, waiter))
    }

    /// Takes one that gives up, if it still waits.
    pub fn leave(&mut self, priority: Priority, id: u64) -> Option<W> {
        let waiters = &mut self.waiters[priority as usize];
        // Ids grow, so that the place is found without a look at each.
        let index = waiters.binary_search_by_key(&id, |(other, _)| *other).ok()?;
        waiters.remove(index).map(|(_, waiter)| waiter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Priority::{Finish, Look, Start};

    #[test]
    fn the_more_important_go_first_and_equals_in_the_order_of_arrival() {
        let mut queue = Queue::default();
        for (priority, name) in [(Look, "a"), (Finish, "b"), (Start, "c"), (Finish, "d"), (Look, "e"), (Start, "f")] {
            assert_eq!(queue.join(priority, 10, name), None);
        }
        let order: Vec<_> = std::iter::from_fn(|| queue.next()).map(|(_, name)| name).collect();
        assert_eq!(order, ["b", "d", "c", "f", "a", "e"]);
    }

    #[rstest::rstest]
    #[case::of_the_lowest_the_youngest(&[Look, Look, Start], Finish, Some(1))]
    #[case::not_an_equal(&[Start, Finish, Finish], Start, None)]
    #[case::not_a_higher_one(&[Start, Finish, Finish], Look, None)]
    #[case::a_start_if_there_is_no_look(&[Finish, Start, Start], Finish, Some(2))]
    #[case::a_look_for_a_start(&[Finish, Look, Start], Start, Some(1))]
    #[case::equals(&[Finish, Finish, Finish], Finish, None)]
    fn a_full_queue_sheds_from_the_bottom(
        #[case] waiting: &[Priority],
        #[case] arrival: Priority,
        #[case] displaced: Option<usize>,
    ) {
        let mut queue = Queue::default();
        for (index, priority) in waiting.iter().enumerate() {
            queue.join(*priority, 3, index);
        }
        assert_eq!(queue.admits(arrival, 3), displaced.is_some());
        if let Some(index) = displaced {
            assert_eq!(queue.join(arrival, 3, 3), Some((waiting[index], index)));
        }
        assert_eq!(queue.len(), 3);
    }

    #[test]
    fn without_room_to_wait_nobody_is_displaced() {
        assert!(!Queue::<()>::default().admits(Finish, 0));
    }

    #[test]
    fn one_that_leaves_is_found_also_after_others_have_left() {
        let mut queue = Queue::default();
        let ids: Vec<u64> = (0..4)
            .map(|name| {
                let id = queue.next_id();
                queue.join(Look, 9, name);
                id
            })
            .collect();
        assert_eq!(queue.next(), Some((Look, 0)));
        assert_eq!((queue.leave(Look, ids[2]), queue.leave(Look, ids[2])), (Some(2), None));
        assert_eq!((queue.leave(Look, ids[0]), queue.leave(Start, ids[1])), (None, None));
        assert_eq!(queue.oldest().collect::<Vec<_>>(), [&1]);
        assert_eq!((queue.next(), queue.next(), queue.next()), (Some((Look, 1)), Some((Look, 3)), None));
    }
}
