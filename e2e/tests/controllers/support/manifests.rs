//! Manifests that most tests start from; a test changes what it is about.

use serde_json::{Value, json};

/// A policy with one dependency, `database`.
pub fn policy(name: &str, workload: &str) -> Value {
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1",
        "kind": "ResiliencePolicy",
        "metadata": { "name": name },
        "spec": {
            "targetRefs": [{ "group": "apps", "kind": "Deployment", "name": workload }],
            "dependencies": [{
                "name": "database",
                "timeout": { "request": "5s", "perTry": "1s" },
                "retry": { "numRetries": 3, "backOff": { "baseInterval": "200ms" } },
            }],
        },
    })
}

/// The same with another total time, which is how tests tell one edit from another.
pub fn policy_with_request(name: &str, workload: &str, request: &str) -> Value {
    let mut policy = policy(name, workload);
    policy["spec"]["dependencies"][0]["timeout"]["request"] = json!(request);
    policy
}

/// A policy that resets connections when the check `database` fails, with gates that are out of the way.
pub fn recovery_policy(name: &str, workload: &str) -> Value {
    let mut policy = policy(name, workload);
    policy["spec"]["healthChecks"] = json!([{ "name": "database", "interval": "1s", "unhealthyThreshold": 1 }]);
    policy["spec"]["recovery"] = json!({
        "ladders": [{ "check": "database", "steps": [{ "action": "ResetConnections", "timeout": "3s" }] }],
        "limits": { "cooldown": "0s", "budget": { "actions": 20, "interval": "10m" } },
        "healthyDelay": "1s", "startupGrace": "0s",
    });
    policy
}

/// A set with one boolean flag, `EnablePdf`, that is on.
pub fn flag_set(name: &str, workload: &str) -> Value {
    json!({
        "apiVersion": "resilience.ticketwave.io/v1alpha1",
        "kind": "FeatureFlag",
        "metadata": { "name": name },
        "spec": {
            "targetRefs": [{ "group": "apps", "kind": "Deployment", "name": workload }],
            "flagSpec": { "flags": { "EnablePdf": {
                "state": "ENABLED", "variants": { "on": true, "off": false }, "defaultVariant": "on",
            }}},
        },
    })
}
