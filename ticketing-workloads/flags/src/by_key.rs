//! A map by flag key that is made once and asked for every evaluation.

/// Values by key. A key is hashed by parts of it, which takes a nanosecond; keys that are alike in these parts are searched among
/// each other, so that keys that were chosen to be alike cost comparisons by the logarithm of their number, and no more.
#[derive(Debug)]
pub struct ByKey<T> {
    /// By slot, then by length, then by key: most comparisons are over after the length.
    entries: Box<[Entry<T>]>,
    /// Where the entries of each slot begin; and of the last one, where they end.
    slots: Box<[u32]>,
    /// By how much a hash is shifted to be a slot.
    shift: u32,
}

#[derive(Debug)]
struct Entry<T> {
    parts: Parts,
    key: Box<str>,
    value: T,
}

impl<T> Default for ByKey<T> {
    fn default() -> Self {
        Self { entries: Box::default(), slots: Box::default(), shift: 0 }
    }
}

impl<T> FromIterator<(String, T)> for ByKey<T> {
    /// Of entries with the same key, it is open which one is found.
    fn from_iter<I: IntoIterator<Item = (String, T)>>(entries: I) -> Self {
        let entry = |(key, value): (String, T)| Entry { parts: Parts::of(&key), key: key.into_boxed_str(), value };
        let mut entries: Box<[_]> = entries.into_iter().map(entry).collect();
        // Two slots for each entry, and two at least: a shift by all bits would be none.
        let bits = (entries.len() * 2).max(2).next_power_of_two().trailing_zeros();
        let shift = u64::BITS - bits;
        let slot_of = |entry: &Entry<T>| entry.parts.slot(shift);
        entries.sort_by(|left, right| slot_of(left).cmp(&slot_of(right)).then_with(|| order(&left.key, &right.key)));
        let mut slots = Vec::with_capacity((1 << bits) + 1);
        for (at, entry) in (0..).zip(&entries) {
            slots.resize(slots.len().max(slot_of(entry) + 1), at);
        }
        slots.resize((1 << bits) + 1, u32::try_from(entries.len()).unwrap_or(u32::MAX));
        Self { entries, slots: slots.into_boxed_slice(), shift }
    }
}

impl<T> ByKey<T> {
    /// The value of `key`, if there is one.
    #[inline]
    pub fn find(&self, key: &str) -> Option<&T> {
        let parts = Parts::of(key);
        let [start, end] = *self.slots.get(parts.slot(self.shift)..)?.first_chunk::<2>()?;
        match self.entries.get(start as usize..end as usize)? {
            [] => None,
            [entry] => {
                let is_it = entry.parts.are(&parts) && (key.len() <= Parts::WHOLE || *entry.key == *key);
                is_it.then_some(&entry.value)
            }
            several => search(several, key),
        }
    }

    /// All of it, in no order that means anything.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &T)> {
        self.entries.iter().map(|entry| (&*entry.key, &entry.value))
    }
}

#[cold]
#[inline(never)]
fn search<'a, T>(entries: &'a [Entry<T>], key: &str) -> Option<&'a T> {
    let at = entries.binary_search_by(|entry| order(&entry.key, key)).ok()?;
    entries.get(at).map(|entry| &entry.value)
}

fn order(left: &str, right: &str) -> std::cmp::Ordering {
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

/// The length of a key, its first eight bytes, eight in the middle, and the last eight.
#[derive(Clone, Copy, Debug)]
struct Parts {
    length: u64,
    words: [u64; 3],
}

impl Parts {
    /// Keys of at most so many bytes are the same if their parts are.
    const WHOLE: usize = 24;

    #[inline]
    fn of(key: &str) -> Self {
        let bytes = key.as_bytes();
        let middle = bytes.get(bytes.len().saturating_sub(8) / 2..).and_then(<[u8]>::first_chunk);
        let words = if let (Some(first), Some(middle), Some(last)) = (bytes.first_chunk(), middle, bytes.last_chunk()) {
            [first, middle, last].map(|bytes| u64::from_le_bytes(*bytes))
        } else if let (Some(first), Some(last)) = (bytes.first_chunk(), bytes.last_chunk()) {
            [u32::from_le_bytes(*first).into(), 0, u32::from_le_bytes(*last).into()]
        } else {
            [bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)), 0, 0]
        };
        Self { length: bytes.len() as u64, words }
    }

    /// Word by word: compared as wider ones, they would have to be written first and read again.
    #[inline]
    const fn are(&self, other: &Self) -> bool {
        let Self { length, words: [first, middle, last] } = *self;
        let [their_first, their_middle, their_last] = other.words;
        (length ^ other.length) | (first ^ their_first) | (middle ^ their_middle) | (last ^ their_last) == 0
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "what is left of it are as many bits as there are slots")]
    const fn slot(&self, shift: u32) -> usize {
        let [first, middle, last] = self.words;
        let mixed = first ^ middle.rotate_left(11) ^ last.rotate_left(23) ^ self.length.rotate_left(49);
        // The high bits of the product are the good ones.
        (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn all_are_found(keys: &[String]) {
        let made: ByKey<usize> = keys.iter().cloned().zip(0..).collect();
        for (nth, key) in keys.iter().enumerate() {
            assert_eq!(made.find(key), Some(&nth), "{key}");
            assert_eq!(made.find(&format!("{key}x")), None);
        }
        assert_eq!(made.iter().count(), keys.len());
    }

    #[test]
    fn nothing_is_found_in_nothing() {
        assert_eq!(ByKey::<()>::default().find(""), None);
        assert_eq!(ByKey::<()>::from_iter([]).find("a"), None);
    }

    #[test]
    fn ordinary_keys_have_slots_of_their_own() {
        let keys: Vec<_> = (0..1_000).map(|nth| format!("checkout/step-{nth}/enabled")).collect();
        let short: Vec<_> = (0..1_000).map(|nth| format!("flag-{nth}")).collect();
        for keys in [keys, short] {
            all_are_found(&keys);
            let made: ByKey<()> = keys.iter().map(|key| (key.clone(), ())).collect();
            let most = made.slots.windows(2).map(|slot| slot[1] - slot[0]).max().unwrap();
            assert!(most <= 16, "{most} keys in one slot");
        }
    }

    /// They are alike in all that is hashed.
    #[test]
    fn keys_that_are_made_to_be_alike_are_found_in_a_few_steps() {
        let keys: Vec<_> = (0..5_000)
            .map(|nth| format!("{nth:04}"))
            .map(|nth| format!("beginning{nth}the-very-middle{nth}at-the-end"))
            .collect();
        let made: ByKey<()> = keys.iter().map(|key| (key.clone(), ())).collect();
        assert_eq!(made.slots.windows(2).map(|slot| slot[1] - slot[0]).max(), Some(5_000));
        all_are_found(&keys);
    }

    /// Keys of each length that differ in one place.
    #[test]
    fn each_byte_counts() {
        for length in 0..60 {
            let key = "a".repeat(length);
            let others = (0..length).map(|at| format!("{}b{}", &key[..at], &key[at + 1..]));
            let all: Vec<_> = others.chain([key.clone(), format!("{key}a")]).collect();
            all_are_found(&all);
            // One alone is not taken for another one.
            for one in &all {
                let made: ByKey<()> = [(one.clone(), ())].into_iter().collect();
                assert!(all.iter().all(|key| made.find(key).is_some() == (key == one)), "{one}");
            }
        }
    }

    proptest! {
        #[test]
        fn it_is_a_map(
            entries in proptest::collection::btree_map("[ab/ü]{0,20}", any::<u8>(), 0..40),
            keys in proptest::collection::vec("[ab/ü]{0,20}", 0..40),
        ) {
            let made: ByKey<u8> = entries.clone().into_iter().collect();
            for key in entries.keys().chain(&keys) {
                prop_assert_eq!(made.find(key), entries.get(key));
            }
            prop_assert_eq!(made.iter().map(|(key, value)| (key.to_owned(), *value)).collect::<BTreeMap<_, _>>(), entries);
        }
    }
}
