//! Pieces of schema that several types share.

use schemars::{Schema, SchemaGenerator, json_schema};

/// A name as Kubernetes writes labels: RFC 1123, at most 63 characters.
pub const NAME_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$";
/// Name of a Kubernetes object: RFC 1123 subdomain.
pub const OBJECT_NAME_PATTERN: &str = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$";
/// Key of a flag, or name of one of its variants, wherever it is written: anything without control characters, as flagd takes
/// any text. [`crate::feature_flag::validate_name`] is the same rule for places that a schema cannot reach.
pub const FLAG_KEY_PATTERN: &str = r"^[^\x00-\x1F\x7F-\x9F]+$";

/// Any JSON object; its size and depth are bounded by the reconciler.
pub fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true })
}

/// A moment as RFC 3339 writes it.
pub fn moment(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}
