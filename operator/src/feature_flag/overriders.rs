//! Who has overridden a flag: the field manager that the API server has noted for it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{FieldsV1, ManagedFieldsEntry};
use kube::Resource;
use serde_json::{Value, json};

/// A flag set, of whose managed fields only those are left that are about overrides.
pub fn with_overriders_only<K: Resource>(mut set: K) -> K {
    let meta = set.meta_mut();
    let of_overrides = |mut entry: ManagedFieldsEntry| {
        let overrides = entry.fields_v1.as_ref()?.0.pointer("/f:spec/f:overrides")?.clone();
        entry.fields_v1 = Some(FieldsV1(json!({ "f:spec": { "f:overrides": overrides } })));
        Some(entry)
    };
    let entries: Vec<_> = meta.managed_fields.take().into_iter().flatten().filter_map(of_overrides).collect();
    meta.managed_fields = (!entries.is_empty()).then_some(entries);
    set
}

/// The field manager that wrote the override of this key last.
pub fn overrider<'e>(entries: &'e [ManagedFieldsEntry], key: &str) -> Option<&'e str> {
    let of_key = entries.iter().filter(|entry| {
        let fields = entry.fields_v1.as_ref().and_then(|fields| fields.0.pointer("/f:spec/f:overrides"));
        fields.and_then(Value::as_object).is_some_and(|fields| fields.keys().any(|field| names(field, key)))
    });
    of_key.max_by_key(|entry| entry.time.as_ref().map(|time| time.0))?.manager.as_deref()
}

/// Whether a field is the item of this key, such as `k:{"key":"EnablePdf"}`.
fn names(field: &str, key: &str) -> bool {
    let item = field.strip_prefix("k:").and_then(|item| serde_json::from_str::<Value>(item).ok());
    item.is_some_and(|item| item["key"] == key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crds::FeatureFlag;

    fn set(entries: &Value) -> FeatureFlag {
        let set = json!({
            "apiVersion": "resilience.ticketwave.io/v1alpha1", "kind": "FeatureFlag",
            "metadata": {"name": "ticketing", "managedFields": entries}, "spec": {"flagSpec": {"flags": {}}},
        });
        with_overriders_only(serde_json::from_value(set).unwrap())
    }

    fn entry(manager: &str, time: &str, fields: &Value) -> Value {
        json!({"manager": manager, "operation": "Update", "time": time, "fieldsType": "FieldsV1", "fieldsV1": fields,
               "apiVersion": "resilience.ticketwave.io/v1alpha1"})
    }

    #[test]
    fn the_last_who_wrote_an_override_is_known_and_nothing_else_is_kept() {
        let item = |key: &str| json!({"f:spec": {"f:overrides": {format!("k:{{\"key\":\"{key}\"}}"): {".": {}}}}});
        let all = json!([
            entry("git", "2026-11-01T00:00:00Z", &json!({"f:spec": {"f:flagSpec": {"f:flags": {}}}})),
            entry("ann", "2026-11-02T00:00:00Z", &item("EnablePdf")),
            entry("bob", "2026-11-03T00:00:00Z", &item("EnablePdf")),
            entry("cid", "2026-11-04T00:00:00Z", &item("EnableEmail")),
        ]);
        let set = set(&all);
        let entries = set.metadata.managed_fields.unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(overrider(&entries, "EnablePdf"), Some("bob"));
        assert_eq!(overrider(&entries, "EnableEmail"), Some("cid"));
        assert_eq!(overrider(&entries, "Enable"), None);
    }

    #[test]
    fn without_an_override_nothing_is_kept() {
        let all = json!([entry("git", "2026-11-01T00:00:00Z", &json!({"f:spec": {"f:flagSpec": {}}}))]);
        assert_eq!(set(&all).metadata.managed_fields, None);
    }
}
