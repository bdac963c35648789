//! The audit log: every write, so that a test can prove what was written and what was not.

/// What goes to the audit log: every write, who asked for it and how it ended.
pub const AUDIT_POLICY: &str = r#"{
  "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
  "omitStages": ["RequestReceived"],
  "rules": [
    {"level": "None", "verbs": ["get", "list", "watch"]},
    {"level": "Metadata"}
  ]
}
"#;
