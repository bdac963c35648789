//! What the operator knows of the cluster: facts of a few hundred bytes, indexed by workload and by target.

pub mod degradations;
pub mod facts;
pub mod flag_inputs;
pub mod flag_problems;
pub mod flag_set;
pub mod index;
mod pod_signals;
pub mod revisions;
pub mod set_metadata;
pub mod unread_flags;
