//! Timeouts (ADR-007 §2): of one attempt, and of a call with all its attempts and waits.

mod attempt;
mod total;

pub use attempt::{AttemptTimeout, AttemptTimeoutLayer, ResponseFuture};
pub use total::{TotalTimeout, TotalTimeoutLayer};
