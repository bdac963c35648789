//! What a pod says of itself.

use crate::FlagProblem;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// The deep report at `GET /health`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthReport {
    /// Worst status of all checks.
    pub status: CheckStatus,
    /// Name of the pod that answers.
    pub pod: String,
    /// Which process answers: another one in the same pod has another value. Empty if the workload is too old to say.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub instance: String,
    /// The last run of each check, by name.
    #[serde(default)]
    pub checks: BTreeMap<String, CheckReport>,
    /// The circuit of each dependency, by the dependency's name.
    #[serde(default)]
    pub circuits: BTreeMap<String, CircuitReport>,
    /// How busy the pod is.
    #[serde(default)]
    pub load: LoadReport,
    /// Whether the pod runs in degraded mode.
    #[serde(default)]
    pub degraded: bool,
    /// The configuration that the pod really runs.
    #[serde(default)]
    pub applied: Applied,
    /// How often each recovery action took effect since the process started, by action.
    #[serde(default)]
    pub actions_done: BTreeMap<String, u64>,
}

/// State of a check, best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum CheckStatus {
    /// It works.
    #[default]
    Healthy,
    /// It works, but not as it should; nothing is restarted for it.
    Degraded,
    /// It does not work.
    Unhealthy,
    /// A status that this reader does not know; it counts as neither healthy nor unhealthy.
    #[serde(other)]
    Unknown,
}

/// One run of a check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CheckReport {
    /// The outcome of the run.
    pub status: CheckStatus,
    /// What was found, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Tags such as `critical` or `database`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// The dependency whose failure makes the check fail, if it is one of the workload's dependencies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dependency: Option<String>,
    /// Whether a fresh connection to the dependency answered, while the connections that the pod keeps did not. `true`: the
    /// pod's own connections are the cause, not the dependency. `false`: a fresh one did not answer either. Absent: it was
    /// not tried, or the pod is of version 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dependency_answers: Option<bool>,
    /// How long the run took, in milliseconds.
    #[serde(default)]
    pub duration_ms: u64,
    /// Failed runs in a row up to this one; 0 after a success.
    #[serde(default)]
    pub consecutive_failures: u32,
    /// Runs since the process started: two reports with the same number describe the same run.
    #[serde(default)]
    pub runs: u64,
    /// Figures behind the outcome, such as how many connections were asked.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub data: BTreeMap<String, Value>,
}

/// State of a circuit breaker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum CircuitState {
    /// Calls go through.
    #[default]
    Closed,
    /// Calls are refused at once.
    Open,
    /// A few trial calls go through.
    HalfOpen,
    /// A state that this reader does not know.
    #[serde(other)]
    Unknown,
}

/// The circuit breaker of one dependency.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CircuitReport {
    /// The state now, after a break that has ended meanwhile.
    pub state: CircuitState,
    /// Since when it has not been closed, in milliseconds of age (clocks of pods are not compared).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_for_ms: Option<u64>,
    /// Times it opened since the process started.
    #[serde(default)]
    pub opened_total: u64,
}

/// How busy a pod is. All but the first two members are absent in a report of version 0.1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadReport {
    /// Requests in flight.
    pub in_flight: u32,
    /// Share of its capacity that is in use, in percent.
    pub percent: u32,
    /// The fullest bulkhead: calls in it and before it, in percent of the slots that it gives now and the places in its queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bulkhead_percent: Option<u32>,
    /// How long the call has waited that waits longest before a bulkhead, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub oldest_queued_ms: Option<u64>,
    /// The same in percent of the time that it may wait; of all bulkheads the highest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_percent: Option<u32>,
    /// What the adaptive limit leaves of the slots of the bulkhead that it bounds, in percent; absent: it bounds none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_percent: Option<u32>,
    /// The load that counts, in percent: the highest of those above, but for what the limit leaves, which is in the first of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worst_percent: Option<u32>,
    /// What that is the load of, such as `requests`, `bulkhead critical` or `queue critical`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub cause: String,
}

impl LoadReport {
    /// The load that counts, in percent.
    pub fn counts(&self) -> u32 {
        self.worst_percent.unwrap_or_default().max(self.percent)
    }
}

/// The configuration that a pod runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Applied {
    /// Its revision; 0: the pod runs on built-in defaults.
    pub revision: i64,
    /// Its hash; empty: built-in defaults.
    pub content_hash: String,
    /// Version of the contract that the pod speaks.
    pub contract_version: u32,
    /// Paths of the document that the pod does not know and ignores.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unsupported: Vec<String>,
    /// Dependencies that the document names and the workload does not have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unknown_dependencies: Vec<String>,
    /// Flags of the document that do not do what it says. Empty from a pod of version 0.1; an operator of version 0.1 does not
    /// look at it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flag_problems: Vec<FlagProblem>,
    /// Flags of the document that this pod has had for [`UNREAD_AFTER_MS`](crate::flag_problem::UNREAD_AFTER_MS) or longer, and that no
    /// code in it has read since it started; by key, at most [`MAX_FLAG_PROBLEMS`](crate::flag_problem::MAX_FLAG_PROBLEMS). Empty from
    /// an older pod; an older operator does not look at it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub flags_unread: Vec<String>,
    /// When it went live, in milliseconds since the Unix epoch by the pod's clock.
    pub applied_at_ms: i64,
    /// How it came to the pod.
    pub from: AppliedFrom,
}

/// How a configuration came to a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AppliedFrom {
    /// Built into the workload.
    #[default]
    BuiltIn,
    /// Read from the mounted ConfigMap.
    Mount,
    /// Pushed by the operator.
    Push,
    /// A source that this reader does not know.
    #[serde(other)]
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FlagProblemKind;
    use serde_json::json;

    /// Reports of version 0.1 have no `flagProblems`, and later ones may have kinds that are not known here.
    #[rstest::rstest]
    #[case::of_version_0_1(json!({}), None)]
    #[case::known(json!([{"key": "k", "kind": "TypeMismatch", "message": "m"}]), Some(FlagProblemKind::TypeMismatch))]
    #[case::of_a_later_version(json!([{"key": "k", "kind": "Haunted", "since": 1}]), Some(FlagProblemKind::Unknown))]
    fn problems_of_flags(#[case] problems: Value, #[case] expected: Option<FlagProblemKind>) {
        let mut report = json!({"revision": 7});
        if problems.is_array() {
            report["flagProblems"] = problems;
        }
        let read: Applied = serde_json::from_value(report).unwrap();
        assert_eq!(read.flag_problems.first().map(|problem| problem.kind), expected);
        assert_eq!(json!(read).get("flagProblems").is_some(), expected.is_some(), "nothing is said of no problems");
    }

    /// Reports of version 0.1 have two numbers of the load.
    #[rstest::rstest]
    #[case::of_version_0_1(json!({"inFlight": 3, "percent": 40}), 40)]
    #[case::a_bulkhead_is_fuller(json!({"inFlight": 3, "percent": 40, "worstPercent": 90, "cause": "bulkhead critical"}), 90)]
    #[case::never_less_than_the_requests(json!({"inFlight": 3, "percent": 40, "worstPercent": 10}), 40)]
    fn the_worst_load_counts(#[case] report: Value, #[case] expected: u32) {
        let read: LoadReport = serde_json::from_value(report).unwrap();
        assert_eq!(read.counts(), expected);
    }

    /// Reports of version 0.1 have no `dependencyAnswers`, and one that was not tried is left out.
    #[rstest::rstest]
    #[case::of_version_0_1(json!({"status": "Unhealthy"}), None)]
    #[case::the_pool_is_the_cause(json!({"status": "Unhealthy", "dependencyAnswers": true}), Some(true))]
    #[case::the_dependency_is(json!({"status": "Unhealthy", "dependencyAnswers": false}), Some(false))]
    fn evidence_of_a_check(#[case] report: Value, #[case] expected: Option<bool>) {
        let read: CheckReport = serde_json::from_value(report.clone()).unwrap();
        assert_eq!(read.dependency_answers, expected);
        assert_eq!(json!(read).get("dependencyAnswers"), report.get("dependencyAnswers"));
    }
}
