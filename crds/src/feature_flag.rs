//! `FeatureFlag`: flagd flag definitions, delivered to workloads, with overrides that a person can set and that end by
//! themselves.

use crate::{
    Condition, Moment,
    resilience_policy::TargetRef,
    schema::{FLAG_KEY_PATTERN, any_object, moment},
};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, sync::Arc};

/// Largest `flagSpec`, in bytes of JSON.
pub const MAX_FLAG_SPEC_BYTES: usize = 256 * 1024;
/// Deepest nesting of the schemaless parts.
pub const MAX_DEPTH: usize = 64;
/// Longest key of a flag, and longest name of a variant, in characters.
pub const MAX_NAME: usize = 128;
/// Most bytes that the annotations of an object may have together. `kubectl apply` without `--server-side` keeps the whole
/// manifest in one.
pub const MAX_ANNOTATION_BYTES: usize = 256 * 1024;

/// A FeatureFlag holds a set of flags, defined as flagd does, that the named workloads evaluate; a person can override a flag at once (kill switch), with an end and a reason.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "resilience.ticketwave.io",
    version = "v1alpha1",
    kind = "FeatureFlag",
    doc = "A FeatureFlag holds a set of flags that workloads evaluate, and a person's overrides of them.",
    plural = "featureflags",
    shortname = "fflag",
    category = "ticketwave",
    namespaced,
    status = "FeatureFlagStatus",
    derive = "PartialEq",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Flags", type_ = "integer", json_path = ".status.flagCount"),
    printcolumn(name = "Overridden", type_ = "integer", json_path = ".status.overridden", description = "Flags that a person has overridden and that are still so"),
    printcolumn(name = "Programmed", type_ = "string", json_path = ".status.programmed", description = "Ready pods that run these flags, of all ready pods"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", priority = 1),
    validation = Rule::new("self.metadata.name.size() <= 63").message("a flag set's name must have at most 63 characters"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.flagSpec.flags.all(key, size(key) >= 1 && size(key) <= 128)")
        .message("every key of a flag must have 1 to 128 characters").field_path(".flagSpec.flags").reason(Reason::FieldValueInvalid),
    validation = Rule::new("self.overrides.all(o, o.key in self.flagSpec.flags)")
        .message("every overrides[].key must name a flag of flagSpec.flags").field_path(".overrides").reason(Reason::FieldValueInvalid),
)]
pub struct FeatureFlagSpec {
    /// The flags, as a flagd flag-definition document.
    pub flag_spec: FlagSpec,
    /// The workloads that evaluate these flags: Deployments of the same namespace, at most 16. Default: none.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["group".into(), "kind".into(), "name".into()]))]
    #[schemars(length(max = 16))]
    pub target_refs: Vec<TargetRef>,
    /// When two sets define one flag for a workload, the higher priority wins, then the older set; -1000 to 1000. Default: 0.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
    /// A person's word over a flag; it stands above degradation and above the flag's own rules. At most 64.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["key".into()]))]
    #[schemars(length(max = 64))]
    pub overrides: Vec<Override>,
    /// When this set should be gone. It only warns: condition Expired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "moment")]
    pub expires_at: Option<Moment>,
}

/// A flagd flag-definition document.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct FlagSpec {
    /// Where the schema of flagd documents is. It is ignored.
    #[serde(default, rename = "$schema", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub schema: Option<String>,
    /// Flags by key, at most 500; 256 KiB for the whole document. Keys have 1 to 128 characters, none of them a control character.
    #[schemars(extend("maxProperties" = 500))]
    pub flags: BTreeMap<String, FlagDefinition>,
    /// Targeting rules that flags share by `$ref`.
    #[serde(default, rename = "$evaluators", skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub evaluators: Option<Map<String, Value>>,
    /// Metadata that every flag of the set carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub metadata: Option<Map<String, Value>>,
}

/// One flag.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct FlagDefinition {
    /// ENABLED: evaluated. DISABLED: callers get their own default.
    pub state: FlagState,
    /// Type of the values. It is checked, and makes a float of every number of a float flag: without it 1.0 is the whole number 1. Default: what the values are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "ValueType")]
    pub value_type: Option<ValueType>,
    /// Values by variant name, all of one type: boolean, string, number or object. Names have 1 to 128 characters, none of them a control character.
    #[schemars(schema_with = "any_object")]
    pub variants: Map<String, Value>,
    /// Variant without a targeting match. null, empty or absent: callers get their own default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub default_variant: Option<String>,
    /// Targeting rule as JSON logic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub targeting: Option<Arc<Value>>,
    /// Metadata of the flag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub metadata: Option<Map<String, Value>>,
}

/// Type of a flag's values, as OpenFeature has them.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "described on FlagDefinition::value_type, which is what people see")]
pub enum ValueType {
    Boolean,
    String,
    Integer,
    Float,
    Object,
}

/// Why a text is neither the key of a flag nor the name of a variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoName {
    /// There is nothing.
    #[error("must not be empty")]
    Empty,
    /// It is too long.
    #[error("must have at most {MAX_NAME} characters")]
    TooLong,
    /// It cannot be written on one line.
    #[error("must not have control characters, such as the end of a line")]
    ControlCharacter,
}

/// Whether `name` may be the key of a flag or the name of a variant: the rule of [`crate::schema::FLAG_KEY_PATTERN`] with its bounds.
pub fn validate_name(name: &str) -> Result<(), NoName> {
    if name.is_empty() {
        Err(NoName::Empty)
    } else if name.chars().nth(MAX_NAME).is_some() {
        Err(NoName::TooLong)
    } else if name.chars().any(char::is_control) {
        Err(NoName::ControlCharacter)
    } else {
        Ok(())
    }
}

/// Whether a flag is evaluated.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "UPPERCASE")]
#[expect(missing_docs, reason = "described on FlagDefinition::state, which is what people see")]
pub enum FlagState {
    Enabled,
    Disabled,
}

/// A person's word over a flag.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq)]
pub struct Override {
    /// Key of the flag.
    #[schemars(length(min = 1, max = 128), regex(pattern = FLAG_KEY_PATTERN))]
    pub key: String,
    /// Variant that holds.
    #[schemars(length(min = 1, max = 128), regex(pattern = FLAG_KEY_PATTERN))]
    pub variant: String,
    /// When the override ends by itself, also while the operator is down. Default: when a person takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "moment")]
    pub until: Option<Moment>,
    /// Why, at most 512 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub reason: Option<String>,
}

/// What became of the flags.
#[derive(Serialize, Deserialize, KubeSchema, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct FeatureFlagStatus {
    /// The generation that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Ready, Reconciling and Stalled as kstatus reads them; Accepted, Programmed, Overridden, TypeMismatch and Expired.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    #[schemars(length(max = 16))]
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// Ready pods that run these flags, of all ready pods, such as 11/11.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub programmed: Option<String>,
    /// Number of flags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub flag_count: Option<i32>,
    /// Number of flags that a person has overridden and that are still so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub overridden: Option<i32>,
    /// The workloads, in the order of spec.targetRefs.
    #[x_kube(merge_strategy = ListMerge::Map(vec!["kind".into(), "name".into()]))]
    #[schemars(length(max = 16))]
    #[serde(default)]
    pub targets: Vec<crate::status::TargetStatus>,
    /// The flags: those that are overridden first, then those that a degraded fleet sets, then those that another set has, then the others.
    #[schemars(length(max = 500))]
    #[serde(default)]
    pub flags: Vec<FlagFinding>,
}

/// One flag, as it is where this set is live.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct FlagFinding {
    /// Key of the flag.
    #[schemars(length(max = 128))]
    pub key: String,
    /// Type of its values: boolean, string, integer, float or object.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub type_: Option<String>,
    /// Where its value comes from: Spec, Override, Degradation, OtherSet, or Code where code reads another type and uses its own default.
    #[schemars(length(max = 63))]
    pub source: String,
    /// True where each ready pod of each workload has had it for an hour: no code in them has read it since they started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread: Option<bool>,
    /// The variant that holds without targeting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub effective_variant: Option<String>,
    /// Who has overridden it: the field manager that wrote the override last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub overridden_by: Option<String>,
    /// The policy whose fleet is degraded and sets it so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub degraded_by: Option<String>,
    /// When the override, or what the degraded fleet says, ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "moment")]
    pub until: Option<Moment>,
    /// What is wrong, why it is overridden, or which workloads have it from another set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::flagd_takes_any_text("checkout/new-flow", Ok(()))]
    #[case::ends_with_a_mark("new_flow_", Ok(()))]
    #[case::begins_with_a_mark("-1", Ok(()))]
    #[case::space("v 2", Ok(()))]
    #[case::letters("größe-水", Ok(()))]
    #[case::longest(&"ü水".repeat(64), Ok(()))]
    #[case::empty("", Err(NoName::Empty))]
    #[case::too_long(&"x".repeat(129), Err(NoName::TooLong))]
    #[case::end_of_line("a\nb", Err(NoName::ControlCharacter))]
    #[case::deleted("a\u{7f}", Err(NoName::ControlCharacter))]
    #[case::second_block("\u{85}", Err(NoName::ControlCharacter))]
    fn names(#[case] name: &str, #[case] expected: Result<(), NoName>) {
        assert_eq!(validate_name(name), expected);
        // The schema says the same.
        let matches = regex::Regex::new(FLAG_KEY_PATTERN).unwrap().is_match(name);
        assert_eq!(matches && name.chars().count() <= MAX_NAME, expected.is_ok());
    }
}
