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
use std::collections::BTreeMap;

/// Largest `flagSpec`, in bytes of JSON.
pub const MAX_FLAG_SPEC_BYTES: usize = 256 * 1024;
/// Deepest nesting of the schemaless parts.
pub const MAX_DEPTH: usize = 64;

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
    /// Flags by key, at most 500; 256 KiB for the whole document.
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
    /// Values by variant name, all of one type: boolean, string, number or object.
    #[schemars(schema_with = "any_object")]
    pub variants: Map<String, Value>,
    /// Variant without a targeting match. null or absent: callers get their own default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub default_variant: Option<String>,
    /// Targeting rule as JSON logic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub targeting: Option<Map<String, Value>>,
    /// Metadata of the flag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub metadata: Option<Map<String, Value>>,
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
    /// Flags that are overridden, in error, or lost to another set; at most 100.
    #[schemars(length(max = 100))]
    #[serde(default)]
    pub flags: Vec<FlagFinding>,
}

/// One flag about which there is something to say.
#[derive(Serialize, Deserialize, JsonSchema, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct FlagFinding {
    /// Key of the flag.
    #[schemars(length(max = 128))]
    pub key: String,
    /// Where its value comes from: Spec, Override, OtherSet, or Code where code reads another type and uses its own default.
    #[schemars(length(max = 63))]
    pub source: String,
    /// The variant that holds without targeting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub effective_variant: Option<String>,
    /// What is wrong, or why it is overridden.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}
