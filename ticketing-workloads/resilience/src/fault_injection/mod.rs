//! Fault injection: drills delay attempts or make them fail, or have the process hold memory, for a limited time.

mod layer;
mod memory;
mod state;

pub use layer::{FaultInjection, FaultInjectionLayer, ResponseFuture};
pub use memory::FilledMemory;
pub use state::{Fault, Faults, Injection};
