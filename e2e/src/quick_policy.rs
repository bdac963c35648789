//! A policy that recovers what can be cured, and wastes no time.

use crate::testbed::TICKETING;
use serde_json::{Value, json};

/// A policy for the Deployment `workload`, by the same name, that knows a cure for every failing check of the booking service.
/// A circuit's break is longer than it takes the checks of all pods to fail: one that tries the database again does not say
/// meanwhile that it is bad.
pub fn quick_policy(workload: &str) -> Value {
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "ResiliencePolicy",
        "metadata": { "name": workload, "namespace": TICKETING },
        "spec": {
            "targetRefs": [{ "name": workload }],
            "dependencies": [{ "name": "database", "circuitBreaker": { "breakDuration": "5s" } }],
            "healthChecks": [
                { "name": "database", "interval": "1s", "unhealthyThreshold": 3 },
                { "name": "booking-consistency", "scope": "Workload", "interval": "1s", "unhealthyThreshold": 2 },
                { "name": "memory", "interval": "1s", "unhealthyThreshold": 1,
                  "memory": { "max": "48Mi", "degradedFor": "1s" } },
            ],
            "recovery": {
                "ladders": [
                    { "check": "database", "steps": [
                        { "action": "ResetConnections", "timeout": "15s" }, { "action": "RestartPod", "timeout": "60s" }] },
                    { "check": "booking-consistency", "steps": [
                        { "action": "RunCleanupJob", "cronJobRef": { "name": "booking-cleanup" }, "timeout": "60s" }] },
                    { "check": "memory", "steps": [
                        { "action": "TrimMemory", "timeout": "3s" }, { "action": "RestartPod", "timeout": "60s" }] },
                ],
                "limits": { "cooldown": "0s", "budget": { "actions": 20, "interval": "1s" } },
                "healthyDelay": "1s", "startupGrace": "0s",
            },
        },
    })
}

/// The same, and a pod that is not ready for 2 s is restarted.
pub fn quick_policy_with_readiness(workload: &str) -> Value {
    let mut policy = quick_policy(workload);
    let add = |list: &mut Value, entry: Value| {
        if let Some(list) = list.as_array_mut() {
            list.push(entry);
        }
    };
    add(&mut policy["spec"]["healthChecks"], json!({ "name": "pod-ready", "kubernetes": { "for": "2s" } }));
    let restart = json!({ "check": "pod-ready", "steps": [{ "action": "RestartPod", "timeout": "60s" }] });
    add(&mut policy["spec"]["recovery"]["ladders"], restart);
    policy
}
