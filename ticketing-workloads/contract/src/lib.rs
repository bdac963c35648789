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
pub mod flags;
pub mod health;
pub mod revision;
pub mod runtime_config;
pub mod settings;
pub mod signing;
pub mod workload_id;

pub use admin::{Action, ActionAnswer, ActionOutcome, ActionRequest, PushAnswer, PushOutcome};
pub use flags::{FlagOverride, FlagSettings, FlagState, FlagsSettings};
pub use health::{
    Applied, AppliedFrom, CheckReport, CheckStatus, CircuitReport, CircuitState, HealthReport, LoadReport,
};
pub use runtime_config::{ConfigError, RuntimeConfig, Section, Source};
pub use settings::{
    BulkheadSettings, CircuitBreakerSettings, DegradationSettings, DependencySettings, FallbackSettings,
    HealthCheckSettings, ManualState, PolicySettings, RetryBudgetSettings, RetryOn, RetrySettings, SlowCallSettings,
    TimeoutSettings, TripRule,
};
pub use workload_id::{WorkloadId, WorkloadKind, config_map_name, token_secret_name};

/// Version of this contract. It grows when a reader of the older version would misunderstand a document, not when a
/// field is added.
pub const CONTRACT_VERSION: u32 = 1;

/// Key of the document inside the ConfigMap, and the file name that pods see under their mount.
pub const CONFIG_KEY: &str = "runtime-config.json";

/// Largest document that is published, in bytes. A ConfigMap holds 1 MiB with everything around it.
pub const MAX_CONFIG_BYTES: usize = 900 * 1024;

/// Largest health report that the operator reads, in bytes; the rest of the answer is not even received.
pub const MAX_REPORT_BYTES: usize = 256 * 1024;
