//! The resilience patterns of ADR-007 inside a workload, configured live by the operator.
//!
//! A workload declares what it calls ([`Resilience::builder`]), makes every call through the [`Dependency`] of that
//! name, and registers its health checks and recovery actions. The rest is done here: settings arrive as a
//! [`contract::RuntimeConfig`], pushed to the [`admin`] port or read from the [`mount`], and take effect in place,
//! without losing the state of a circuit breaker or the permits of a bulkhead.
//!
//! Layers of a call, outermost first:
//!
//! ```text
//! fallback( total timeout( retry( circuit breaker( bulkhead( attempt timeout( call ))))))
//! ```

pub mod actions;
pub mod admin;
pub mod breaker;
pub mod budget;
pub mod bulkhead;
pub mod cache;
pub mod clock;
pub mod config;
pub mod deadline;
pub mod degradation;
pub mod dependency;
pub mod failure;
pub mod faults;
pub mod feature_flags;
pub mod health;
pub mod layers;
pub mod memory;
pub mod metrics;
pub mod mount;
pub mod retry;
pub mod server;
pub mod stripes;
pub mod token;
pub mod window;
mod workload;

pub use actions::Actions;
pub use config::ConfigStore;
pub use dependency::Dependency;
pub use failure::{CallError, Failure, FailureKind, Rejection};
pub use feature_flags::Flags;
pub use flags::{Attribute, Context};
pub use health::{Check, CheckOutcome, Checks};
pub use metrics::Metrics;
pub use token::Tokens;
pub use workload::{Builder, Resilience};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`, also after a thread panicked while it held it: no code here panics between two writes that belong
/// together.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
