//! What a pod runs by, and where each value comes from.
//!
//! The answer to `GET` [`crate::admin::EFFECTIVE_PATH`]. What a workload has built in changes only with its image, so
//! the operator asks one pod of a workload once and foretells the rest itself ([`BuiltIns::resolve`]).

use crate::{
    BuiltIns, BulkheadSettings, DegradationSettings, DependencySettings, FallbackSettings, Origin, PolicySettings,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Largest report that is read, in bytes.
pub const MAX_EFFECTIVE_BYTES: usize = 128 * 1024;
/// Most dependencies, and most bulkheads, of a report.
pub const MAX_ENTRIES: usize = 64;
/// Longest name in a report, in bytes.
const MAX_NAME: usize = 63;
/// Most origins of one dependency.
const MAX_ORIGINS: usize = 64;
/// Most retries that a workload may have built in.
const MAX_RETRIES: u32 = 1_000;
/// Characters of a fixed answer that are shown.
const SHOWN_BODY: usize = 128;

/// What a pod runs by.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EffectiveReport {
    /// Version of the contract that the pod speaks.
    pub contract_version: u32,
    /// Hash of the document that it runs; empty: built-in values alone.
    pub content_hash: String,
    /// Every dependency of the workload.
    pub dependencies: BTreeMap<String, EffectiveDependency>,
    /// Every bulkhead, of the workload and of the policy.
    pub bulkheads: BTreeMap<String, Sourced<BulkheadSettings>>,
    /// Whether the pod has a waiting room that the policy can open.
    pub has_waiting_room: bool,
    /// When the pod calls itself degraded; absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degradation: Option<Sourced<DegradationSettings>>,
}

/// One dependency. Bodies of fixed answers are cut to their first 128 characters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EffectiveDependency {
    /// What the workload has built in; absent: nothing, so that the ADR's numbers hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub built_in: Option<DependencySettings>,
    /// What holds.
    pub effective: DependencySettings,
    /// Where each value of `effective` comes from, by its path in a policy's manifest.
    pub origins: BTreeMap<String, Origin>,
}

/// Settings that the policy or the workload gives as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sourced<T> {
    /// What the workload has built in.
    #[serde(default = "Option::default", skip_serializing_if = "Option::is_none")]
    pub built_in: Option<T>,
    /// What holds.
    pub effective: T,
    /// Where it comes from.
    pub origin: Origin,
}

impl<T: Clone> Sourced<T> {
    /// What the policy says, else what is built in.
    pub fn of(said: Option<&T>, built_in: Option<&T>) -> Option<Self> {
        let origin = if said.is_some() { Origin::Policy } else { Origin::BuiltIn };
        let effective = said.or(built_in)?.clone();
        Some(Self { built_in: built_in.cloned(), effective, origin })
    }
}

impl EffectiveReport {
    /// The report of a workload under `policy`.
    pub fn new(
        content_hash: String,
        policy: &PolicySettings,
        built_ins: &BuiltIns,
        built_in_degradation: Option<&DegradationSettings>,
    ) -> Self {
        let dependencies = built_ins.resolve(policy).into_iter().map(|(name, resolved)| {
            let mut built_in = built_ins.dependencies.get(&name).cloned().flatten();
            let mut effective = resolved.settings;
            built_in.iter_mut().chain([&mut effective]).for_each(cut_bodies);
            (name, EffectiveDependency { built_in, effective, origins: resolved.origins })
        });
        let names = built_ins.bulkheads.keys().chain(policy.bulkheads.keys());
        let bulkhead = |name: &String| Sourced::of(policy.bulkheads.get(name), built_ins.bulkheads.get(name));
        Self {
            contract_version: crate::CONTRACT_VERSION,
            content_hash,
            dependencies: dependencies.collect(),
            bulkheads: names.filter_map(|name| Some((name.clone(), bulkhead(name)?))).collect(),
            has_waiting_room: built_ins.waiting_room,
            degradation: Sourced::of(policy.degradation.as_ref(), built_in_degradation),
        }
    }

    /// Reads the report of a pod that may be broken or hostile. The error says what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MAX_EFFECTIVE_BYTES {
            return Err(format!("the report of effective settings has more than {MAX_EFFECTIVE_BYTES} bytes"));
        }
        let report: Self = serde_json::from_slice(bytes).map_err(|error| format!("invalid report: {error}"))?;
        report.check_bounds()?;
        Ok(report)
    }

    fn check_bounds(&self) -> Result<(), String> {
        let (dependencies, bulkheads) = (self.dependencies.len(), self.bulkheads.len());
        if dependencies > MAX_ENTRIES || bulkheads > MAX_ENTRIES {
            return Err(format!("{dependencies} dependencies and {bulkheads} bulkheads, more than any workload has"));
        }
        if self.dependencies.values().any(|one| one.origins.len() > MAX_ORIGINS) {
            return Err(format!("a dependency with more than {MAX_ORIGINS} origins"));
        }
        let settings = || self.dependencies.values().flat_map(|one| one.built_in.iter().chain([&one.effective]));
        if settings().any(|one| one.retry.num_retries > MAX_RETRIES) {
            return Err(format!("a dependency with more than {MAX_RETRIES} retries"));
        }
        let providers = settings().flat_map(|one| &one.fallback).filter_map(|fallback| match fallback {
            FallbackSettings::Provider { provider } => Some(provider),
            _ => None,
        });
        let names = self.dependencies.keys().chain(self.bulkheads.keys()).chain(providers);
        let of_bulkheads = settings().filter_map(|one| one.bulkhead.as_ref());
        if names.chain(of_bulkheads).any(|name| !is_name(name)) {
            return Err(format!("a name that is not of 1 to {MAX_NAME} letters, digits, '-', '_' and '.'"));
        }
        Ok(())
    }

    /// What the workload has built in.
    pub fn built_ins(&self) -> BuiltIns {
        let dependencies = self.dependencies.iter().map(|(name, one)| (name.clone(), one.built_in.clone()));
        let bulkheads = self.bulkheads.iter().filter_map(|(name, one)| Some((name.clone(), one.built_in.clone()?)));
        BuiltIns {
            dependencies: dependencies.collect(),
            bulkheads: bulkheads.collect(),
            waiting_room: self.has_waiting_room,
        }
    }
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

fn cut_bodies(settings: &mut DependencySettings) {
    for fallback in &mut settings.fallback {
        if let FallbackSettings::Static { body, .. } = fallback {
            *body = body.chars().take(SHOWN_BODY).collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DependencyPolicy, RetrySettings};
    use serde_json::{Value, json};

    fn report() -> EffectiveReport {
        let own = DependencySettings {
            bulkhead: Some("external-api".into()),
            fallback: vec![
                FallbackSettings::Provider { provider: "paypal".into() },
                FallbackSettings::Static { status_code: 503, body: "é".repeat(4_096) },
            ],
            ..DependencySettings::default()
        };
        let built_ins = BuiltIns {
            dependencies: [("stripe".to_owned(), Some(own)), ("paypal".to_owned(), None)].into(),
            bulkheads: [("external-api".to_owned(), BulkheadSettings::default())].into(),
            waiting_room: true,
        };
        let mut policy = PolicySettings::default();
        policy.bulkheads.insert("own".into(), BulkheadSettings { max_concurrent: 3, ..Default::default() });
        let mut said = DependencyPolicy::default();
        said.timeout.request_ms = Some(5_000);
        policy.insert_dependency("stripe".into(), said);
        EffectiveReport::new("a".repeat(64), &policy, &built_ins, None)
    }

    #[test]
    fn says_what_is_built_in_what_holds_and_where_it_comes_from() {
        let bytes = serde_json::to_vec(&report()).unwrap();
        let read = EffectiveReport::parse(&bytes).unwrap();
        assert_eq!(read, report());
        let stripe = &read.dependencies["stripe"];
        assert_eq!(stripe.built_in.as_ref().unwrap().timeout.request_ms, 15_000);
        assert_eq!((stripe.effective.timeout.request_ms, stripe.origins["timeout.request"]), (5_000, Origin::Policy));
        assert_eq!(stripe.origins["timeout.perTry"], Origin::Fitted);
        assert_eq!(read.bulkheads["own"].origin, Origin::Policy);
        assert_eq!(read.bulkheads["external-api"].origin, Origin::BuiltIn);
        let built_ins = read.built_ins();
        assert_eq!(built_ins.dependencies["paypal"], None);
        assert_eq!(built_ins.bulkheads.len(), 1, "one of the policy is not built in");
        assert!(built_ins.waiting_room);
        assert!(bytes.len() < 8 * 1024, "{} bytes: bodies are cut", bytes.len());
    }

    #[test]
    fn a_large_workload_fits() {
        let stripe = report().dependencies["stripe"].clone();
        let mut large = report();
        large.dependencies = (0..24).map(|number| (format!("dependency-{number}"), stripe.clone())).collect();
        assert!(EffectiveReport::parse(&serde_json::to_vec(&large).unwrap()).is_ok());
    }

    #[rstest::rstest]
    #[case::not_json(|_: &mut Value| (), "invalid report", true)]
    #[case::no_object(|report: &mut Value| *report = json!("no"), "invalid report", false)]
    #[case::negative(|report: &mut Value| report["dependencies"]["stripe"]["effective"]["timeout"]["requestMs"] = json!(-1), "invalid report", false)]
    #[case::too_large(|report: &mut Value| report["contentHash"] = json!("x".repeat(MAX_EFFECTIVE_BYTES)), "more than", false)]
    #[case::many(|report: &mut Value| report["dependencies"] = (0..65).map(|n| (n.to_string(), json!({}))).collect(), "65 dependencies", false)]
    #[case::many_bulkheads(|report: &mut Value| report["bulkheads"] = (0..65).map(|n| (n.to_string(), report["bulkheads"]["own"].clone())).collect(), "65 bulkheads", false)]
    #[case::long_name(|report: &mut Value| report["dependencies"][&"x".repeat(64)] = json!({}), "a name that is not", false)]
    #[case::name_of_another_kind(|report: &mut Value| report["dependencies"]["a\n<b>"] = json!({}), "a name that is not", false)]
    #[case::bulkhead_name(|report: &mut Value| report["dependencies"]["stripe"]["effective"]["bulkhead"] = json!("x y"), "a name that is not", false)]
    #[case::provider_name(|report: &mut Value| report["dependencies"]["stripe"]["builtIn"]["fallback"][0]["provider"] = json!(""), "a name that is not", false)]
    #[case::origins(|report: &mut Value| report["dependencies"]["stripe"]["origins"] = (0..65).map(|n| (n.to_string(), json!("Policy"))).collect(), "origins", false)]
    #[case::retries(|report: &mut Value| report["dependencies"]["stripe"]["builtIn"]["retry"]["numRetries"] = json!(4_000_000_000_u32), "retries", false)]
    fn what_a_hostile_pod_may_send_is_refused(
        #[case] change: fn(&mut Value),
        #[case] expected: &str,
        #[case] cut: bool,
    ) {
        let mut value = json!(report());
        change(&mut value);
        let mut bytes = value.to_string().into_bytes();
        if cut {
            bytes.pop();
        }
        let error = EffectiveReport::parse(&bytes).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn what_a_newer_pod_adds_is_passed_over() {
        let mut value = json!(report());
        value["hedging"] = json!(true);
        value["dependencies"]["stripe"]["origins"]["hedge.after"] = json!("Namespace");
        let read = EffectiveReport::parse(value.to_string().as_bytes()).unwrap();
        assert_eq!(read.dependencies["stripe"].origins["hedge.after"], Origin::Unknown);
        assert_eq!(RetrySettings::default(), read.dependencies["stripe"].built_in.clone().unwrap().retry);
    }
}
