//! The API server's audit log: who wrote what.

use super::cluster::Cluster;
use serde_json::Value;

/// A write that somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Who asked for it.
    pub user: String,
    pub verb: String,
    pub resource: String,
    pub namespace: String,
    pub name: String,
    pub code: u64,
}

/// All writes that the operator asked for in one of `namespaces`, oldest first.
pub fn operator_writes(cluster: &Cluster, namespaces: &[&str]) -> Vec<Write> {
    let log = std::fs::read_to_string(cluster.server.audit_log()).unwrap();
    // The last line may be in the middle of being written.
    let entries = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    entries
        .filter(|entry| {
            let user = entry["user"]["username"].as_str().unwrap_or_default();
            user.starts_with("system:serviceaccount:") && entry["stage"] == "ResponseComplete"
        })
        .map(|entry| {
            let object = &entry["objectRef"];
            let sub = object["subresource"].as_str().map(|sub| format!("/{sub}")).unwrap_or_default();
            Write {
                user: text(&entry["user"]["username"]),
                verb: text(&entry["verb"]),
                resource: text(&object["resource"]) + &sub,
                namespace: text(&object["namespace"]),
                name: text(&object["name"]),
                code: entry["responseStatus"]["code"].as_u64().unwrap_or(0),
            }
        })
        .filter(|write| namespaces.contains(&write.namespace.as_str()))
        .collect()
}
