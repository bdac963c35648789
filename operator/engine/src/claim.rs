//! Which policy a workload runs by.
//!
//! Policies do not merge (GEP-713, direct policy attachment): the oldest one that claims a workload has it, names decide
//! between two of one age, and the others are told which one it was.

use jiff::Timestamp;

/// A policy that names a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// Name; all claimants of one workload share its namespace.
    pub name: String,
    /// When it was created.
    pub created_at: Timestamp,
    /// A policy that only runs dry says what it would do and holds nothing.
    pub holds_claim: bool,
}

/// The name of the claimant that has the workload.
pub fn winner(claimants: &[Claimant]) -> Option<&str> {
    claimants
        .iter()
        .filter(|claimant| claimant.holds_claim)
        .min_by_key(|claimant| (claimant.created_at, claimant.name.as_str()))
        .map(|claimant| claimant.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claimant(name: &str, created: i64, holds_claim: bool) -> Claimant {
        Claimant { name: name.into(), created_at: Timestamp::from_second(created).unwrap(), holds_claim }
    }

    #[rstest::rstest]
    #[case::none(vec![], None)]
    #[case::older_wins(vec![claimant("a", 2, true), claimant("b", 1, true)], Some("b"))]
    #[case::name_decides(vec![claimant("b", 1, true), claimant("a", 1, true)], Some("a"))]
    #[case::dry_run_holds_nothing(vec![claimant("a", 1, false), claimant("b", 2, true)], Some("b"))]
    #[case::only_dry_run(vec![claimant("a", 1, false)], None)]
    fn oldest_has_it(#[case] claimants: Vec<Claimant>, #[case] expected: Option<&str>) {
        assert_eq!(winner(&claimants), expected);
        let mut reversed = claimants.clone();
        reversed.reverse();
        assert_eq!(winner(&reversed), expected, "the order of the list must not matter");
    }
}
