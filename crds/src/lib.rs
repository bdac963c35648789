//! API types of group `resilience.ticketwave.io`, version `v1alpha1`.
//!
//! The doc comments on fields are what `kubectl explain` prints, and the bounds and CEL rules are what the API server
//! checks on `kubectl apply`; the types refuse the same again when they are read, so that an object that got past an
//! older schema cannot do harm. `crdgen` turns these types into the manifests under `crds/yaml/` and into the chart's
//! copy of them.

pub mod bounded;
pub mod condition;
pub mod feature_flag;
pub mod manifests;
pub mod moment;
pub mod reason;
pub mod recovery;
pub mod resilience_policy;
pub mod schema;
pub mod status;
mod words;

pub use bounded::{ByteSize, Duration, IntOrPercent};
pub use condition::{Condition, ConditionStatus, ConditionType};
pub use feature_flag::{FeatureFlag, FeatureFlagSpec, FeatureFlagStatus};
pub use moment::Moment;
pub use reason::{EventReason, Reason};
pub use recovery::{Recovery, RecoverySpec};
pub use resilience_policy::{ResiliencePolicy, ResiliencePolicySpec};
pub use status::ResiliencePolicyStatus;

/// API group of every resource here.
pub const GROUP: &str = "resilience.ticketwave.io";
/// API version of every resource here.
pub const VERSION: &str = "v1alpha1";

#[cfg(test)]
mod stated_defaults;
