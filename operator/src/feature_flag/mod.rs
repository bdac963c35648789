//! The flag set controller.

pub mod events;
pub mod findings;
pub mod mismatch;
pub mod overriders;
pub mod reconcile;
pub mod status;
