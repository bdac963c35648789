//! What all resources' statuses have in common.

pub mod conditions;
pub mod target;
pub mod write;
pub mod writes;
