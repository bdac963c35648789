//! What a call needs to know of a bulkhead to go in, in one word of 64 bits: how many calls are inside, and who waits.
//!
//! A field of 20 bits for each priority has the calls of that priority *and of those below it*, as the limits on them do. Two
//! bits more say whose turn it is: 0 if none waits, else one more than the highest priority that does.

use crate::priority::Priority;

/// Bits of a field.
const FIELD: u32 = 20;
/// Where the bits of those who wait begin.
const TURN: u32 = 3 * FIELD;
/// Most calls that may be inside.
pub const MOST: u32 = (1 << FIELD) - 1;

/// The fields that a call of `priority` counts in: its own and those above it.
fn fields(priority: Priority) -> impl Iterator<Item = u32> {
    (priority as u32..3).map(|field| field * FIELD)
}

fn field(word: u64, shift: u32) -> u64 {
    word >> shift & u64::from(MOST)
}

/// What a call of `priority` adds to the word.
#[inline]
pub fn entry(priority: Priority) -> u64 {
    match priority {
        Priority::Look => 1 | 1 << FIELD | 1 << (2 * FIELD),
        Priority::Start => 1 << FIELD | 1 << (2 * FIELD),
        Priority::Finish => 1 << (2 * FIELD),
    }
}

/// Limits, each at most [`MOST`], in the fields of a word.
pub fn of_limits(limits: [u32; 3]) -> u64 {
    let [look, start, finish] = limits.map(|limit| u64::from(limit.min(MOST)));
    look | start << FIELD | finish << (2 * FIELD)
}

/// Whether the limits leave room for a call of `priority`. Where there is none for it, there is none for those below it.
#[inline]
pub fn has_room(word: u64, limits: u64, priority: Priority) -> bool {
    fields(priority).all(|shift| field(word, shift) < field(limits, shift))
}

/// Whether a call of `priority` may go in: there is room, and no other one has the turn.
#[inline]
pub fn is_open(word: u64, limits: u64, priority: Priority) -> bool {
    word >> TURN <= priority as u64 && has_room(word, limits, priority)
}

/// Whether a call waits.
#[inline]
pub fn has_waiters(word: u64) -> bool {
    word >> TURN > 0
}

/// Whether a call waits that is more important than one of `priority`.
pub fn waits_above(word: u64, priority: Priority) -> bool {
    word >> TURN > priority as u64 + 1
}

/// The word with `highest` as the highest priority that waits.
pub fn with_turn(word: u64, highest: Option<Priority>) -> u64 {
    let turn = highest.map_or(0, |priority| priority as u64 + 1);
    word & ((1 << TURN) - 1) | turn << TURN
}

/// Calls inside.
pub fn inside(word: u64) -> u32 {
    inside_up_to(word, Priority::Finish)
}

/// Calls inside of this priority and those below it.
pub fn inside_up_to(word: u64, priority: Priority) -> u32 {
    u32::try_from(field(word, priority as u32 * FIELD)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Priority::{Finish, Look, Start};

    #[test]
    fn each_counts_for_itself_and_those_above() {
        let word = entry(Look) * 3 + entry(Start) * 2 + entry(Finish);
        assert_eq!((field(word, 0), field(word, FIELD), inside(word)), (3, 5, 6));
        let limits = of_limits([4, 5, 7]);
        assert_eq!([Look, Start, Finish].map(|priority| has_room(word, limits, priority)), [false, false, true]);
        let fewer = word - entry(Start);
        assert_eq!([Look, Start, Finish].map(|priority| has_room(fewer, limits, priority)), [true, true, true]);
    }

    #[rstest::rstest]
    #[case::none(None, [true, true, true], [false, false, false])]
    #[case::a_look(Some(Look), [false, true, true], [false, false, false])]
    #[case::a_start(Some(Start), [false, false, true], [true, false, false])]
    #[case::a_finish(Some(Finish), [false, false, false], [true, true, false])]
    fn who_waits_has_the_turn_among_equals_and_lower_ones(
        #[case] waits: Option<Priority>,
        #[case] open: [bool; 3],
        #[case] above: [bool; 3],
    ) {
        let word = with_turn(entry(Look) + with_turn(0, Some(Finish)), waits);
        assert_eq!(Priority::ALL.map(|priority| is_open(word, of_limits([9; 3]), priority)), open);
        assert_eq!(Priority::ALL.map(|priority| waits_above(word, priority)), above);
        assert_eq!((has_waiters(word), inside(word)), (waits.is_some(), 1));
    }

    #[test]
    fn the_largest_bulkhead_fills_its_fields_and_no_others() {
        let limits = of_limits([u32::MAX; 3]);
        let full = (0..MOST).fold(0, |word, _| word + entry(Look));
        assert_eq!((full, inside(full), has_waiters(full)), (limits, MOST, false));
        assert!(!has_room(full, limits, Finish) && has_room(full - entry(Look), limits, Look));
    }
}
