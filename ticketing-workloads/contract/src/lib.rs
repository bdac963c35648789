//! The wire between the operator and the ticketing workloads.
//!
//! Everything that crosses the line is defined here and nowhere else: the [`RuntimeConfig`] document that the operator
//! publishes, the [`HealthReport`] that a pod answers with, and the calls of the pod's admin port. The crate knows
//! neither Kubernetes nor HTTP, so that both sides can test against it in milliseconds.
//!
//! Compatibility rule: a reader ignores what it does not know and says so ([`Applied::unsupported`]); it never refuses
//! a document for a field that a newer writer added.

pub mod admin;
pub mod canonical;
pub mod defaults;
pub mod dependency_policy;
pub mod duration;
pub mod effective;
pub mod flag_problem;
pub mod flags;
pub mod health;
pub mod resolution;
pub mod revision;
pub mod runtime_config;
pub mod settings;
pub mod signing;
pub mod workload_id;

pub use admin::{Action, ActionAnswer, ActionOutcome, ActionRequest, PushAnswer, PushOutcome};
pub use dependency_policy::{
    CircuitBreakerPolicy, DependencyPolicy, FallbackPolicy, RetryBudgetPolicy, RetryPolicy, SlowCallPolicy,
    TimeoutPolicy,
};
pub use effective::{EffectiveDependency, EffectiveReport, Sourced};
pub use flag_problem::{FlagProblem, FlagProblemKind};
pub use flags::{FlagDegradation, FlagOverride, FlagSettings, FlagState, FlagsSettings};
pub use health::{
    Applied, AppliedFrom, CheckReport, CheckStatus, CircuitReport, CircuitState, HealthReport, LoadReport,
};
pub use resolution::{BuiltIns, Origin, Resolved};
pub use runtime_config::{ConfigError, RuntimeConfig, Section, Source};
pub use settings::{
    BulkheadSettings, CircuitBreakerSettings, DegradationSettings, DegradationStage, DependencySettings,
    FallbackSettings, HealthCheckSettings, ManualState, PolicySettings, RetryBudgetSettings, RetryOn, RetrySettings,
    SlowCallSettings, TimeoutSettings, TripRule, WaitingRoomSettings,
};
pub use workload_id::{WorkloadId, WorkloadKind, config_map_name, token_secret_name};

/// Version of the contract that this code speaks, as pods report it ([`Applied::contract_version`]).
///
/// - 1: version 0.1. An entry of `policy.settings.dependencies` replaces what the workload has built in.
/// - 2: `policy.settings.dependencyPolicies` says only what the policy says, and is resolved over what is built in.
pub const CONTRACT_VERSION: u32 = 2;

/// Oldest contract whose readers can run by the documents that this code writes. It grows when such a reader would
/// misunderstand a document, not when something is added that it finds in another form as well.
pub const DOCUMENT_VERSION: u32 = 1;

/// Whether a reader of an older contract reports `path` as unknown although nothing is lost on it, because the document
/// has the same in a form that it knows, because it is for the operator itself, or because it comes and goes with the load of
/// other workloads and the status of the flag set says how many pods ignore it.
pub fn is_said_otherwise(reader_version: u32, path: &str) -> bool {
    let is_for_the_operator = || {
        let of_source = path.strip_prefix("flags.sources[").and_then(|rest| rest.split_once("]."));
        of_source.is_some_and(|(_, field)| ["priority", "shadowed"].contains(&field))
    };
    let is_of_a_fleet = || path.starts_with("flags.settings.flags.") && path.ends_with(".degraded");
    reader_version == 1 && (path == "policy.settings.dependencyPolicies" || is_for_the_operator() || is_of_a_fleet())
}

/// Key of the document inside the ConfigMap, and the file name that pods see under their mount.
pub const CONFIG_KEY: &str = "runtime-config.json";

/// Largest document that is published, in bytes. A ConfigMap holds 1 MiB with everything around it.
pub const MAX_CONFIG_BYTES: usize = 900 * 1024;

/// Largest health report that the operator reads, in bytes; the rest of the answer is not even received.
pub const MAX_REPORT_BYTES: usize = 256 * 1024;
