//! Fault injection: drills delay attempts or make them fail, for a limited time.

mod layer;
mod state;

pub use layer::{FaultInjection, FaultInjectionLayer, ResponseFuture};
pub use state::{Fault, Faults, Injection};
