//! One view of a circuit over all pods of a workload. Pods never share breaker state: a fault of one pod must not be
//! promoted to the fleet. The operator only counts.

use contract::CircuitState;
use std::collections::BTreeMap;

/// A circuit over all pods that reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CircuitView {
    /// Pods whose circuit is not closed. Half-open counts: it is not closed until a trial call says so.
    pub open: usize,
    /// Pods that reported this circuit.
    pub total: usize,
}

impl CircuitView {
    /// More than half of the pods, and at least two: then the dependency is the cause, not the pods.
    pub fn quorum(self) -> bool {
        self.open >= 2 && self.open * 2 > self.total
    }
}

/// Counts circuits by dependency over the reports of all pods.
pub fn circuits<'a>(reports: impl Iterator<Item = (&'a str, CircuitState)>) -> BTreeMap<String, CircuitView> {
    let mut views = BTreeMap::<String, CircuitView>::new();
    for (dependency, state) in reports {
        let view = views.entry(dependency.to_owned()).or_default();
        view.total += 1;
        view.open += usize::from(matches!(state, CircuitState::Open | CircuitState::HalfOpen));
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
        assert_eq!(CircuitView { open, total }.quorum(), expected);
    }

    #[test]
    fn half_open_counts_as_open() {
        let reports = [("db", CircuitState::Open), ("db", CircuitState::HalfOpen), ("db", CircuitState::Closed)];
        assert_eq!(circuits(reports.into_iter())["db"], CircuitView { open: 2, total: 3 });
    }
}
