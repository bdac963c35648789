//! What the degraded fleets of a namespace say of its flags, from the statuses of their policies. Pure.
//!
//! The status of a policy is the only place where that is written down: the documents of workloads, the statuses of flag sets and the
//! answers over the network follow from it, in every replica alike.

use crate::kubernetes::meta::created_at;
use contract::FlagDegradation;
use crds::{
    ResiliencePolicy,
    resilience_policy::{DegradationMode, Mode},
    status::DegradationStatus,
};
use jiff::Timestamp;
use std::{cmp::Reverse, collections::BTreeMap};

/// What one degraded fleet sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Degraded {
    created_at: Timestamp,
    load_percent: u32,
    until_ms: i64,
    flags: BTreeMap<String, String>,
}

/// What holds of each flag that some degraded fleet of the namespace sets.
pub type Degradations = BTreeMap<String, FlagDegradation>;

impl Degraded {
    /// What the fleet of a policy sets; none, if it is not degraded or may not set anything.
    pub fn of(policy: &ResiliencePolicy) -> Option<Self> {
        let spec = policy.spec.degradation.as_ref()?;
        let status = policy.status.as_ref()?.degradation.as_deref()?;
        let enforced = policy.spec.mode == Mode::Enforce && !status.dry_run;
        // A suspended policy holds what it has.
        let may = policy.spec.suspend || spec.mode != DegradationMode::Disabled;
        let DegradationStatus { load_percent, until, flags, .. } = status;
        (enforced && may).then(|| Self {
            created_at: created_at(policy),
            load_percent: u32::try_from(*load_percent).unwrap_or_default(),
            until_ms: until.0.as_millisecond(),
            flags: flags.iter().map(|flag| (flag.key.clone(), flag.variant.clone())).collect(),
        })
    }

    /// The flags that it sets.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.flags.keys().map(String::as_str)
    }
}

/// Which of them has the say over each flag: the one in the stage of the highest load, then the older policy, then the name.
pub fn winners<'a>(all: impl Iterator<Item = (&'a str, &'a Degraded)>) -> Degradations {
    let mut ranked: Vec<_> = all.collect();
    ranked.sort_by_key(|(name, one)| (Reverse(one.load_percent), one.created_at, *name));
    let mut winners = Degradations::new();
    for (name, one) in ranked {
        for (key, variant) in &one.flags {
            winners.entry(key.clone()).or_insert_with(|| FlagDegradation {
                variant: variant.clone(),
                until_ms: one.until_ms,
                by: name.to_owned(),
                load_percent: one.load_percent,
            });
        }
    }
    winners
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn policy(spec: &Value, status: &Value) -> ResiliencePolicy {
        let mut policy = json!({
            "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
            "metadata": {"name": "p", "namespace": "n"},
            "spec": {"targetRefs": [{"name": "w"}], "degradation": {}},
            "status": {"degradation": {
                "stage": "mail", "level": 1, "stages": 2, "loadPercent": 80, "since": "2026-01-01T00:00:00.000000Z",
                "until": "2026-01-01T00:10:00.000000Z", "flags": [{"key": "Mail", "variant": "off"}],
            }},
        });
        for (name, value) in spec.as_object().unwrap() {
            policy["spec"][name] = value.clone();
        }
        for (name, value) in status.as_object().unwrap() {
            policy["status"]["degradation"][name] = value.clone();
        }
        serde_json::from_str(&policy.to_string()).unwrap()
    }

    #[rstest::rstest]
    #[case::degraded(json!({}), json!({}), true)]
    #[case::forced(json!({"degradation": {"mode": "Forced"}}), json!({}), true)]
    #[case::suspended(json!({"suspend": true, "degradation": {"mode": "Disabled"}}), json!({}), true)]
    #[case::disabled(json!({"degradation": {"mode": "Disabled"}}), json!({}), false)]
    #[case::a_rehearsal(json!({"mode": "DryRun"}), json!({}), false)]
    #[case::was_a_rehearsal(json!({}), json!({"dryRun": true}), false)]
    #[case::taken_out(json!({"degradation": null}), json!({}), false)]
    fn only_what_is_in_force_sets_flags(#[case] spec: Value, #[case] status: Value, #[case] expected: bool) {
        let found = Degraded::of(&policy(&spec, &status));
        assert_eq!(found.is_some(), expected);
        assert!(found.is_none_or(|found| found.keys().eq(["Mail"])));
    }

    fn degraded(created: i64, load_percent: u32, variant: &str) -> Degraded {
        Degraded {
            created_at: Timestamp::from_second(created).unwrap(),
            load_percent,
            until_ms: 7,
            flags: BTreeMap::from([("Mail".into(), variant.into()), (variant.into(), variant.into())]),
        }
    }

    #[rstest::rstest]
    #[case::the_higher_stage(degraded(1, 80, "a"), degraded(2, 90, "b"), "y")]
    #[case::then_the_older(degraded(2, 80, "a"), degraded(1, 80, "b"), "y")]
    #[case::then_the_name(degraded(1, 80, "a"), degraded(1, 80, "b"), "x")]
    fn one_policy_has_the_say_over_a_flag(#[case] x: Degraded, #[case] y: Degraded, #[case] expected: &str) {
        for all in [[("x", &x), ("y", &y)], [("y", &y), ("x", &x)]] {
            let winners = winners(all.into_iter());
            assert_eq!(winners["Mail"].by, expected);
            assert_eq!(winners.len(), 3, "what only one of them sets is its own");
        }
    }
}
