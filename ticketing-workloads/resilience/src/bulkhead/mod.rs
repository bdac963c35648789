//! The bulkhead (ADR-007 §3): a bounded number of calls at once, so that one dependency cannot take all of a workload.

mod layer;
mod registry;
mod state;

pub use layer::{BulkheadLayer, BulkheadService, ResponseFuture};
pub use registry::Bulkheads;
pub use state::{Acquired, Bulkhead, Queued, Slot, Usage};
