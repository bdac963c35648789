//! The bulkhead (ADR-007 §3): a bounded number of calls at once, so that one dependency cannot take all of a workload, and of
//! those that wait the most important ones first.

mod adaptive_limit;
mod layer;
#[cfg(test)]
mod priority_tests;
mod queue;
mod registry;
pub mod shares;
mod state;
mod word;

pub use adaptive_limit::AdaptiveLimit;
pub use layer::{BulkheadLayer, BulkheadService, ResponseFuture};
pub use registry::Bulkheads;
pub use state::{Acquired, Bulkhead, Queued, Slot, Usage};
