//! One view of a circuit over all pods of a workload. Pods never share breaker state: a fault of one pod must not be
//! promoted to the fleet. The operator only counts.

use contract::CircuitState;
use std::collections::BTreeMap;

/// A circuit over all pods that reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CircuitView {
    /// Pods whose circuit is not closed. Half-open counts: it is not closed until a trial call says so.
    pub open: usize,
    /// Those of them whose circuit is open, and not half-open: of the others it is only known that no call was tried since.
    pub tripped: usize,
    /// Pods that reported this circuit.
    pub total: usize,
}

/// More than half, and at least two.
pub fn is_quorum(some: usize, of: usize) -> bool {
    some >= 2 && some * 2 > of
}

/// Counts circuits by dependency over the reports of all pods.
pub fn circuits<'a>(reports: impl Iterator<Item = (&'a str, CircuitState)>) -> BTreeMap<String, CircuitView> {
    let mut views = BTreeMap::<String, CircuitView>::new();
    for (dependency, state) in reports {
        let view = views.entry(dependency.to_owned()).or_default();
        view.total += 1;
        view.open += usize::from(matches!(state, CircuitState::Open | CircuitState::HalfOpen));
        view.tripped += usize::from(state == CircuitState::Open);
    }
    views
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(0, 0, false)]
    #[case(1, 1, false)]
    #[case(1, 2, false)]
    #[case(2, 2, true)]
    #[case(2, 4, false)]
    #[case(3, 4, true)]
    fn quorum(#[case] open: usize, #[case] total: usize, #[case] expected: bool) {
        assert_eq!(is_quorum(open, total), expected);
        let half_open = CircuitView { open, tripped: 0, total };
        assert!(!is_quorum(half_open.tripped, half_open.total), "nobody has called since");
    }

    #[test]
    fn half_open_counts_as_open() {
        let reports = [("db", CircuitState::Open), ("db", CircuitState::HalfOpen), ("db", CircuitState::Closed)];
        assert_eq!(circuits(reports.into_iter())["db"], CircuitView { open: 2, tripped: 1, total: 3 });
    }
}
