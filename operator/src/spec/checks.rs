//! The health checks of a policy: those that it lists, and the signals of Kubernetes that only its ladders name.

use crds::{
    ResiliencePolicySpec,
    resilience_policy::{self as api, CheckScope},
};
use engine::signals::Signal;

/// A health check of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check<'a> {
    /// Its name.
    pub name: &'a str,
    /// Whether it is about each pod or about the workload.
    pub scope: CheckScope,
    /// The signal of Kubernetes that it is, and for how many milliseconds that may be bad.
    pub signal: Option<(Signal, u64)>,
    /// The operator itself asks a Service.
    pub asked: bool,
}

/// All checks of a policy.
pub fn checks(spec: &ResiliencePolicySpec) -> Vec<Check<'_>> {
    let listed = spec.health_checks.iter().map(|check| {
        let asked = check.http.is_some() || check.tcp.is_some();
        let own = Check { name: &check.name, scope: check.scope, signal: None, asked };
        Signal::of(&check.name).map_or(own, |signal| of_signal(signal, check.kubernetes.as_ref()))
    });
    let mut all: Vec<_> = listed.collect();
    for ladder in spec.recovery.iter().flat_map(|recovery| &recovery.ladders) {
        if let Some(signal) = Signal::of(&ladder.check).filter(|signal| all.iter().all(|one| one.name != signal.name()))
        {
            all.push(of_signal(signal, None));
        }
    }
    all
}

fn of_signal(signal: Signal, said: Option<&api::KubernetesSignal>) -> Check<'static> {
    let grace_ms = said.and_then(|said| said.r#for).map_or(signal.default_grace_ms(), crds::Duration::millis);
    let scope = if signal == Signal::Rollout { CheckScope::Workload } else { CheckScope::Pod };
    Check { name: signal.name(), scope, signal: Some((signal, grace_ms)), asked: false }
}

/// Whether the pods themselves report a check: then the workload has our library.
pub fn is_reported(check: &api::HealthCheck) -> bool {
    let asked = check.http.is_some() || check.tcp.is_some();
    !asked && Signal::of(&check.name).is_none()
}

/// Whether the pods have something to know of a policy. One that only checks from outside and recovers is nothing to them:
/// its workloads need not have our library, and nothing is published or pushed for it.
pub fn is_published(spec: &ResiliencePolicySpec) -> bool {
    // Taken apart as a whole, so that a new member cannot be forgotten.
    let ResiliencePolicySpec {
        target_refs: _,
        mode: _,
        suspend: _,
        dependencies,
        bulkheads,
        health_checks,
        recovery,
        degradation,
        waiting_room,
    } = spec;
    let only_recovers = !health_checks.is_empty() || recovery.is_some();
    let says_how = !dependencies.is_empty() || !bulkheads.is_empty() || degradation.is_some() || waiting_room.is_some();
    says_how || health_checks.iter().any(is_reported) || !only_recovers
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(mut body: Value) -> ResiliencePolicySpec {
        body["targetRefs"] = json!([{ "name": "booking" }]);
        serde_json::from_value(body).unwrap()
    }

    #[test]
    fn a_ladder_may_name_a_signal_that_is_not_listed() {
        let spec = spec(json!({
            "healthChecks": [{ "name": "database" }, { "name": "pod-ready", "kubernetes": { "for": "2m" } }],
            "recovery": { "ladders": [
                { "check": "pod-ready", "steps": [{ "action": "RestartPod" }] },
                { "check": "rollout", "steps": [{ "action": "Rollback" }] },
            ]},
        }));
        let all: Vec<_> = checks(&spec).into_iter().map(|check| (check.name, check.scope, check.signal)).collect();
        assert_eq!(
            all,
            [
                ("database", CheckScope::Pod, None),
                ("pod-ready", CheckScope::Pod, Some((Signal::PodReady, 120_000))),
                ("rollout", CheckScope::Workload, Some((Signal::Rollout, 0))),
            ]
        );
    }

    #[rstest::rstest]
    #[case::nothing_said(json!({}), true)]
    #[case::how_to_call(json!({ "dependencies": [{ "name": "database" }] }), true)]
    #[case::waiting_room(json!({ "waitingRoom": {}, "recovery": {} }), true)]
    #[case::reported(json!({ "healthChecks": [{ "name": "database" }] }), true)]
    #[case::memory(json!({ "healthChecks": [{ "name": "memory", "memory": {} }] }), true)]
    #[case::signals(json!({ "healthChecks": [{ "name": "restarts" }] }), false)]
    #[case::asked_from_outside(json!({ "healthChecks": [{ "name": "c", "scope": "Workload", "tcp": { "service": "s", "port": 1 } }] }), false)]
    #[case::ladder(json!({ "recovery": { "ladders": [{ "check": "pod-ready", "steps": [{ "action": "RestartPod" }] }] } }), false)]
    #[case::ladder_and_how_to_call(json!({ "bulkheads": [{ "name": "b" }], "recovery": {} }), true)]
    fn a_policy_that_only_recovers_is_nothing_to_pods(#[case] body: Value, #[case] expected: bool) {
        assert_eq!(is_published(&spec(body)), expected);
    }
}
