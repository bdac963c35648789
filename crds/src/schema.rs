//! Pieces of schema that several types share.

use schemars::{Schema, SchemaGenerator, json_schema};

/// A name as Kubernetes writes labels: RFC 1123, at most 63 characters.
pub const NAME_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// Name of a Kubernetes object: RFC 1123 subdomain.
pub const OBJECT_NAME_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
/// Key of a flag, or name of one of its variants.
pub const FLAG_KEY_PATTERN: &str = "^[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$";

/// Any JSON object; its size and depth are bounded by the reconciler.
pub fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// A moment as RFC 3339 writes it.
pub fn moment(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}
