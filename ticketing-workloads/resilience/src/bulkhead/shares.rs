//! How many of a bulkhead's slots the calls of each priority may have.

/// Most calls of each priority *and those below it* that may be inside a bulkhead of `size` at once, the lowest first.
///
/// Where slots are `kept`, a quarter of them, at least one, is for what is to be finished; looks have at most half, and one less
/// than all that is not kept. A bulkhead with a single slot keeps none, and no priority is ever left without any. Below
/// what is kept, no more than `held_back` are let in, if that is said.
pub fn limits(size: u32, kept: bool, held_back: Option<u32>) -> [u32; 3] {
    let size = size.max(1);
    if !kept {
        return [size; 3];
    }
    let start = (size - (size / 4).max(1)).min(held_back.unwrap_or(u32::MAX)).max(1);
    let look = size.div_ceil(2).min(start - start / 3).min(start - 1).max(1);
    [look, start, size]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::one(1, [1, 1, 1])]
    #[case::two(2, [1, 1, 2])]
    #[case::three(3, [1, 2, 3])]
    #[case::four(4, [2, 3, 4])]
    #[case::critical(10, [5, 8, 10])]
    #[case::gateway(100, [50, 75, 100])]
    #[case::most(10_000, [5_000, 7_500, 10_000])]
    #[case::none(0, [1, 1, 1])]
    fn of_all_priorities(#[case] size: u32, #[case] expected: [u32; 3]) {
        assert_eq!(limits(size, true, None), expected);
        assert_eq!(limits(size, false, Some(1)), [size.max(1); 3], "calls that are all alike have all of it");
    }

    #[rstest::rstest]
    #[case::few(2, [1, 2, 100])]
    #[case::some(9, [6, 9, 100])]
    #[case::all(75, [50, 75, 100])]
    #[case::more(90, [50, 75, 100])]
    fn of_those_that_are_held_back(#[case] most: u32, #[case] expected: [u32; 3]) {
        assert_eq!(limits(100, true, Some(most)), expected);
    }

    proptest::proptest! {
        #[test]
        fn each_has_some_and_the_higher_never_less(
            size in 0_u32..20_000,
            held_back in proptest::option::of(0_u32..200),
        ) {
            let [look, start, all] = limits(size, true, held_back);
            proptest::prop_assert!(1 <= look && look <= start && start <= all && all == size.max(1));
            proptest::prop_assert!(size < 2 || start < all, "one is kept for what is to be finished");
            let is_one = held_back.is_some_and(|most| most < 2);
            proptest::prop_assert!(size < 3 || is_one || look < start, "and one for what is begun");
            proptest::prop_assert!(held_back.is_none_or(|most| start <= most.max(1)), "no more than are to be let in");
        }
    }
}
