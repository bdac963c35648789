//! The resilience patterns of ADR-007 inside a workload, configured live by the operator.
//!
//! A workload declares what it calls ([`Resilience::builder`]), makes every call through the [`Dependency`] of that
//! name, and registers its health checks and recovery actions. The rest is done here: settings arrive as a
//! [`contract::RuntimeConfig`], pushed to the [admin](control::admin) port or read from the [mount](control::mount), and take effect in place,
//! without losing the state of a circuit breaker or the permits of a bulkhead.
//!
//! Layers of a call, outermost first:
//!
//! ```text
//! fallback( total timeout( retry( circuit breaker( bulkhead( attempt timeout( call ))))))
//! ```

pub mod attempt;
pub mod bulkhead;
pub mod circuit_breaker;
pub mod clock;
pub mod control;
pub mod deadline;
pub mod dependency;
mod dependency_layer;
pub mod failure;
pub mod fallback;
pub mod fault_injection;
pub mod feature_flags;
pub mod metrics;
pub mod priority;
pub mod retry;
pub mod server;
mod stack;
pub mod stripes;
mod sync;
pub mod timeout;
pub mod window;
mod workload;

pub use attempt::{Attempt, AttemptError, Repeatable};
pub use control::actions::Actions;
pub use control::config::ConfigStore;
pub use control::health::{Check, CheckOutcome, Checks};
pub use control::token::Tokens;
pub use dependency::Dependency;
pub use failure::{CallError, Failure, FailureKind, Rejection};
pub use feature_flags::Flags;
pub use flags::{Attribute, Context};
pub use metrics::Metrics;
pub use priority::Priority;
pub use stack::{DependencyLayer, Guarded, GuardedAttempt};
pub use workload::{Builder, Resilience};
