//! The workload controller: one workload, one document, one writer.

pub mod publish;
pub mod reconcile;
