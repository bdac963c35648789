//! What the process tells of itself: logs, metrics, probes.

pub mod logging;
pub mod metrics;
pub mod process;
pub mod server;
