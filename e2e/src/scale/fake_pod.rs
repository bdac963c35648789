//! A pod that is no more than an address and a state. It answers on its admin port as the contract says, to every caller:
//! neither token nor signature is looked at.

use contract::{AppliedFrom, CONTRACT_VERSION};
use serde::Deserialize;
use serde_json::{Value, json};
use std::time::Instant;

/// Failing reports in a row after which a check counts as failed; the policies say the same.
pub const FAILURE_THRESHOLD: u32 = 3;
/// The one check that a fake pod has, and the one dependency.
pub const CHECK: &str = "database";

/// How a pod treats its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// It answers that it is well.
    Healthy,
    /// It answers that its check fails; an action heals it.
    Failing,
    /// It accepts connections and never answers.
    Silent,
}

/// What one pod is and was told.
#[derive(Debug)]
pub struct FakePod {
    /// Its name.
    pub name: String,
    /// How it behaves.
    pub behavior: Behavior,
    /// Hash of the configuration that it runs; empty: none yet.
    pub hash: String,
    /// When it was first asked for its health since [`FakePod::forget_probes`].
    pub first_probe: Option<Instant>,
    /// When the last report before the check counts as failed was sent.
    pub third_failure: Option<Instant>,
    revision: i64,
    applied_at_ms: i64,
    process: u32,
    runs: u64,
    failures: u32,
    actions_done: u32,
}

/// What a push did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Push {
    /// The pod runs a new configuration.
    Applied,
    /// The pod ran it already: the push was for nothing.
    InSync,
    /// Older than what runs, or no configuration.
    Refused,
}

impl FakePod {
    /// A pod that has just started and runs on built-in settings.
    pub fn new(name: String, behavior: Behavior) -> Self {
        Self {
            name,
            behavior,
            hash: String::new(),
            first_probe: None,
            third_failure: None,
            revision: 0,
            applied_at_ms: 0,
            process: 1,
            runs: 0,
            failures: 0,
            actions_done: 0,
        }
    }

    /// Another pod takes its place, under another name and at the same address.
    pub fn replace(&mut self, name: String) {
        let process = self.process + 1;
        *self = Self { process, ..Self::new(name, self.behavior) };
    }

    /// From now on the check fails, from its first failure on.
    pub fn fail(&mut self) {
        self.behavior = Behavior::Failing;
        self.failures = 0;
        self.third_failure = None;
    }

    /// What was asked so far does not count any more.
    pub fn forget_probes(&mut self) {
        self.first_probe = None;
    }

    /// Somebody wants to know how it is.
    pub fn asked(&mut self) {
        self.first_probe.get_or_insert_with(Instant::now);
    }

    /// The health report, which is one more run of the check.
    pub fn report(&mut self) -> Value {
        self.asked();
        self.runs += 1;
        let failing = self.behavior == Behavior::Failing;
        self.failures = if failing { self.failures.saturating_add(1) } else { 0 };
        if self.failures == FAILURE_THRESHOLD {
            self.third_failure = Some(Instant::now());
        }
        let status = if failing { "Unhealthy" } else { "Healthy" };
        let message = if failing { "no connection answers" } else { "" };
        json!({
            "status": status,
            "pod": self.name,
            "instance": format!("{}-{}", self.name, self.process),
            "checks": { CHECK: {
                "status": status, "message": message, "dependency": CHECK, "durationMs": 1,
                "consecutiveFailures": self.failures, "runs": self.runs,
            }},
            "circuits": { CHECK: { "state": "Closed", "openedTotal": 0 } },
            "load": { "inFlight": 1, "percent": 10 },
            "degraded": false,
            "applied": self.applied(),
            "actionsDone": { "ResetConnections": self.actions_done },
        })
    }

    /// What it runs.
    pub fn applied(&self) -> Value {
        json!({
            "revision": self.revision, "contentHash": self.hash, "contractVersion": CONTRACT_VERSION,
            "appliedAtMs": self.applied_at_ms,
            "from": if self.revision == 0 { AppliedFrom::BuiltIn } else { AppliedFrom::Push },
        })
    }

    /// What it calls, and by which settings: the one dependency, without settings of its own.
    pub fn effective(&self) -> Value {
        json!({ "contractVersion": CONTRACT_VERSION, "contentHash": self.hash, "dependencies": { CHECK: {} } })
    }

    /// Takes a pushed document.
    pub fn push(&mut self, body: &[u8]) -> (Push, Value) {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Document {
            revision: i64,
            content_hash: String,
        }
        let (push, outcome) = match serde_json::from_slice::<Document>(body) {
            Err(_) => (Push::Refused, "RefusedInvalid"),
            Ok(document) if document.revision < self.revision => (Push::Refused, "RefusedOlder"),
            Ok(document) => {
                let same = document.content_hash == self.hash;
                self.revision = document.revision;
                if !same {
                    self.hash = document.content_hash;
                    self.applied_at_ms = jiff::Timestamp::now().as_millisecond();
                }
                if same { (Push::InSync, "Unchanged") } else { (Push::Applied, "Applied") }
            }
        };
        (push, json!({ "outcome": outcome, "applied": self.applied() }))
    }

    /// Carries out an action, which heals it.
    pub fn act(&mut self, body: &[u8]) -> Value {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Request {
            intent_id: String,
        }
        let Ok(request) = serde_json::from_slice::<Request>(body) else {
            return json!({ "intentId": "", "outcome": "Failed", "message": "not an action" });
        };
        self.actions_done += 1;
        if self.behavior == Behavior::Failing {
            self.behavior = Behavior::Healthy;
        }
        json!({ "intentId": request.intent_id, "outcome": "Done" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use contract::{ActionAnswer, ActionOutcome, CheckStatus, HealthReport, PushAnswer, PushOutcome};

    fn pod() -> FakePod {
        FakePod::new("svc-1-0".into(), Behavior::Healthy)
    }

    fn report(pod: &mut FakePod) -> HealthReport {
        serde_json::from_value(pod.report()).unwrap()
    }

    fn document(revision: i64, hash: &str) -> Vec<u8> {
        json!({ "revision": revision, "contentHash": hash, "policy": {}, "flags": {} }).to_string().into_bytes()
    }

    #[test]
    fn its_report_is_one_of_the_contract() {
        let mut pod = pod();
        let healthy = report(&mut pod);
        assert_eq!((healthy.status, healthy.applied.revision), (CheckStatus::Healthy, 0));
        assert_eq!(healthy.applied.contract_version, CONTRACT_VERSION);
        pod.fail();
        let failures: Vec<_> = (0..3).map(|_| report(&mut pod).checks[CHECK].consecutive_failures).collect();
        assert_eq!(failures, [1, 2, 3]);
        assert!(pod.third_failure.is_some());
        assert!(report(&mut pod).checks[CHECK].runs > 3);
    }

    #[test]
    fn a_push_is_applied_once_and_an_older_one_is_refused() {
        let mut pod = pod();
        let answers = [(7, "aa"), (8, "aa"), (3, "bb"), (9, "bb")].map(|(revision, hash)| {
            let (push, answer) = pod.push(&document(revision, hash));
            let answer: PushAnswer = serde_json::from_value(answer).unwrap();
            (push, answer.outcome, answer.applied.revision)
        });
        assert_eq!(
            answers,
            [
                (Push::Applied, PushOutcome::Applied, 7),
                (Push::InSync, PushOutcome::Unchanged, 8),
                (Push::Refused, PushOutcome::RefusedOlder, 8),
                (Push::Applied, PushOutcome::Applied, 9),
            ]
        );
        assert_eq!(pod.push(b"<html>").0, Push::Refused);
        assert_eq!(report(&mut pod).applied.content_hash, "bb");
    }

    #[test]
    fn an_action_heals_it() {
        let mut pod = pod();
        pod.fail();
        let answer: ActionAnswer =
            serde_json::from_value(pod.act(br#"{"intentId":"i1","action":"ResetConnections"}"#)).unwrap();
        assert_eq!((answer.intent_id.as_str(), answer.outcome), ("i1", ActionOutcome::Done));
        let after = report(&mut pod);
        assert_eq!((after.status, after.actions_done["ResetConnections"]), (CheckStatus::Healthy, 1));
    }

    #[test]
    fn its_successor_is_another_process_on_built_in_settings() {
        let mut pod = pod();
        pod.push(&document(7, "aa"));
        let before = report(&mut pod).instance;
        pod.replace("svc-1-0-2".into());
        let after = report(&mut pod);
        assert_eq!((after.pod.as_str(), after.applied.revision, after.checks[CHECK].runs), ("svc-1-0-2", 0, 1));
        assert_ne!(after.instance, before);
    }
}
